"""PPO on MuJoCo MJX: from physics to gradient one compiled JAX program, for one agent or for many at once. Copy me.

    python ppo_mjx_jax.py --env-id InvertedPendulum-v5                                  HEADER_RESULT
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import inspect
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any, Callable, Literal, NamedTuple

import flax.linen as nn
import gymnasium
import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import optax
import tyro
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from mujoco import mjx
from tqdm import tqdm

try:
    from jax import shard_map
except ImportError:  # before jax 0.6
    from jax.experimental.shard_map import shard_map

# ------------------------------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Args:
    """A flag left at None takes the value of its task in TASK_DEFAULTS. All counts are environment steps over all environments."""

    env_id: str = "InvertedPendulum-v5"
    """task: one of TASK_DEFAULTS, Gymnasium's own"""
    num_envs: int | None = None
    """environments stepped in parallel by each agent, over all devices (>= 1)"""
    total_timesteps: int | None = None
    """environment steps of the whole run, of each agent (>= 1; rounded up to whole iterations)"""
    seed: int = 1
    """seed of weights, environments and noise (>= 0)"""
    device: str = "auto"
    """auto (JAX's choice), cpu or cuda; all devices of that kind share the environments"""
    run_dir: str | None = None
    """folder of this run (default: runs/<env_id>__ppo_mjx__<seed>__<time>; the checkpoint's own folder with --resume)"""
    resume: str | None = None
    """checkpoint to continue from; flags not given keep the checkpoint's values"""
    checkpoint_every: int | None = None
    """environment steps between checkpoints (>= 1; default: a tenth of total_timesteps); the last state is always saved"""
    log_every: int | None = None
    """environment steps between log lines (>= 1; default: total_timesteps / 200): the program runs this long without the host"""
    eval_episodes: int = 20
    """episodes of the final evaluation in MJX, in gymnasium.make(env_id), and of --play (>= 0; 0 skips both evaluations)"""
    play: str | None = None
    """checkpoint to play deterministically instead of training; prints its score"""
    capture_video: bool = False
    """with --play: write one episode, rendered by Gymnasium, beside the checkpoint (needs `pip install imageio[ffmpeg]`)"""
    track: bool = False
    """mirror the metrics to Weights & Biases (needs `pip install wandb`)"""

    # many agents in one program
    num_seeds: int = 1
    """independent agents, with seeds seed, seed + 1, ... (>= 1)"""
    sweep: str | None = None
    """NAME=V1,V2,...: train every agent once with each value of this scalar hyperparameter (the fields of Hyperparameters)"""
    distributed: bool = False
    """join the other hosts of this job (jax.distributed.initialize) and share the environments with them"""
    compilation_cache: str = "~/.cache/onefile-gpu-rl/jax"
    """folder that keeps compiled programs between runs ("" keeps none)"""

    # the environment
    env_kwargs: dict[str, bool | int | float | str] | None = None
    """task options, pairs of name and value, those of Gymnasium's constructor"""
    integrator: Literal["euler", "implicitfast", "rk4", "mjcf"] | None = None
    """integrator of the training physics (mjcf: the one that Gymnasium's own environment uses)"""
    iterations: int | None = None
    """Newton iterations of the contact solver, at most (>= 1)"""
    ls_iterations: int = 8
    """line-search steps of each Newton iteration, at most (>= 1)"""
    self_collision: bool = False
    """let the robot's own limbs collide (Hopper and Humanoid; contact with the ground is always on)"""
    impl: Literal["jax", "warp"] = "jax"
    """MJX's backend; warp needs an NVIDIA GPU, `pip install warp-lang` and self_collision"""
    random_initial_ages: bool = True
    """start the first episodes at random ages, so that thousands of robots do not time out together"""
    reward_scale: float | None = None
    """factor on the rewards that the learner sees (> 0; logged returns are unscaled)"""
    benchmark: str | None = None
    """instead of training: time the physics under random actions, measure its error against MuJoCo C, write both to this JSON file"""

    # the batch
    num_steps: int | None = None
    """steps per environment and iteration (>= 1)"""
    update_epochs: int | None = None
    """passes over each batch (>= 1)"""
    num_minibatches: int | None = None
    """gradient steps per pass (>= 1; must divide num_envs x num_steps)"""

    # the networks
    actor_hidden: tuple[int, ...] | None = None
    """hidden layer sizes of the policy (ELU)"""
    critic_hidden: tuple[int, ...] | None = None
    """hidden layer sizes of the value function (ELU)"""
    log_std_init: float | None = None
    """initial log standard deviation of the policy, in units of half the action range"""
    log_std_min: float | None = None
    """floor of the log standard deviation, in the same units"""
    normalize_observations: bool = True
    """scale observations by their running mean and deviation"""
    normalize_values: bool = True
    """train the value function on returns scaled by their running mean and deviation"""

    # the objective
    gamma: float | None = None
    """discount per environment step (0 to 1)"""
    gae_lambda: float | None = None
    """decay of generalised advantage estimation (0 to 1)"""
    clip_coef: float = 0.2
    """clipping range of the probability ratio (> 0; inf turns clipping off)"""
    clip_value_loss: bool = False
    """clip the change of the value function by clip_coef too"""
    normalize_advantages: bool = True
    """scale the advantages of a batch to mean 0 and deviation 1"""
    entropy_coef: float | None = None
    """weight of the entropy bonus (>= 0)"""
    bounds_coef: float | None = None
    """weight of the penalty on action means more than 1.1 half ranges from the centre (>= 0)"""
    max_grad_norm: float = 1.0
    """largest gradient norm, of the policy and of the value function apart (> 0; inf turns clipping off)"""

    # the learning rate
    learning_rate: float | None = None
    """Adam's initial learning rate (> 0)"""
    learning_rate_schedule: Literal["adaptive", "linear", "constant"] = "adaptive"
    """adaptive: hold the KL divergence of an update near desired_kl; linear: decay to 0 over the run; constant"""
    desired_kl: float | None = None
    """adaptive schedule: exact KL(old policy || new policy), mean over a minibatch, to aim at (> 0)"""
    desired_kl_final: float | None = None
    """adaptive schedule: desired_kl moves linearly to this value over the run (> 0)"""
    learning_rate_min: float = 1e-5
    """adaptive schedule: lower bound (> 0)"""
    learning_rate_max: float = 5e-3
    """adaptive schedule: upper bound (>= learning_rate_min)"""


# One row of values per task; a task without a row (or a value missing from its row) takes COMMON's.
COMMON = dict(
    num_envs=1024, total_timesteps=20_000_000, env_kwargs={}, integrator="euler", iterations=4, reward_scale=1.0,
    num_steps=32, update_epochs=4, num_minibatches=4, actor_hidden=(256, 128, 64), critic_hidden=(256, 128, 64),
    log_std_init=0.0, log_std_min=-2.3, gamma=0.99, gae_lambda=0.95, entropy_coef=0.0, bounds_coef=1e-4,
    learning_rate=1e-3, desired_kl=0.01, desired_kl_final=0.01,
)  # fmt: skip
TASK_DEFAULTS = {
    "InvertedPendulum-v5": dict(num_envs=256, total_timesteps=400_000, actor_hidden=(64, 64), critic_hidden=(64, 64)),
    "Hopper-v5": dict(total_timesteps=20_000_000),
    "Walker2d-v5": dict(total_timesteps=25_000_000),
    "HalfCheetah-v5": dict(total_timesteps=30_000_000),
    "Ant-v5": dict(total_timesteps=30_000_000, env_kwargs={"include_cfrc_ext_in_observation": False}),
    "Humanoid-v5": dict(total_timesteps=30_000_000, env_kwargs={
        "include_cinert_in_observation": False, "include_cvel_in_observation": False,
        "include_qfrc_actuator_in_observation": False, "include_cfrc_ext_in_observation": False}),
}  # fmt: skip


class Hyperparameters(NamedTuple):
    """The scalars that enter the program as data, one value per agent: what --sweep can map without compiling again."""

    learning_rate: jax.Array
    learning_rate_min: jax.Array
    learning_rate_max: jax.Array
    desired_kl: jax.Array
    desired_kl_final: jax.Array
    gamma: jax.Array
    gae_lambda: jax.Array
    clip_coef: jax.Array
    entropy_coef: jax.Array
    bounds_coef: jax.Array
    max_grad_norm: jax.Array
    log_std_init: jax.Array
    log_std_min: jax.Array
    reward_scale: jax.Array


def require(condition: bool, rule: str):
    """Refuse what a user typed, with the rule it breaks."""
    if not condition:
        raise ValueError(rule)


def resolve(args: Args) -> Args:
    """Fill the flags left at None from the task's row, then check every value before anything is allocated."""
    require(args.env_id in TASK_DEFAULTS, f"env_id {args.env_id!r} is unknown; use one of {', '.join(TASK_DEFAULTS)}")
    row = COMMON | TASK_DEFAULTS[args.env_id]
    args = dataclasses.replace(args, **{name: value for name, value in row.items() if getattr(args, name) is None})
    args.env_kwargs = {name: {"true": True, "false": False}.get(str(value).lower(), value) for name, value in args.env_kwargs.items()}
    args.checkpoint_every = args.checkpoint_every or max(1, args.total_timesteps // 10)
    args.log_every = args.log_every or max(1, args.total_timesteps // 200)

    at_least_one = "num_envs total_timesteps num_seeds iterations ls_iterations num_steps update_epochs num_minibatches"
    for name in (at_least_one + " checkpoint_every log_every").split():
        require(getattr(args, name) >= 1, f"{name} must be at least 1, not {getattr(args, name)}")
    for name in "seed eval_episodes entropy_coef bounds_coef".split():
        require(getattr(args, name) >= 0, f"{name} must be at least 0, not {getattr(args, name)}")
    above_zero = "reward_scale clip_coef max_grad_norm learning_rate desired_kl desired_kl_final learning_rate_min"
    for name in above_zero.split():
        require(getattr(args, name) > 0, f"{name} must be above 0, not {getattr(args, name)}")
    for name in "gamma gae_lambda".split():
        require(0 <= getattr(args, name) <= 1, f"{name} must lie between 0 and 1, not {getattr(args, name)}")
    require(args.learning_rate_min <= args.learning_rate_max,
            f"learning_rate_max {args.learning_rate_max} is below learning_rate_min {args.learning_rate_min}")  # fmt: skip
    require(all(size >= 1 for size in (*args.actor_hidden, *args.critic_hidden)), "hidden layer sizes must be at least 1")
    batch = args.num_envs * args.num_steps
    if batch % args.num_minibatches:
        below, above = (next(k for k in range(args.num_minibatches, limit, step) if batch % k == 0) for limit, step in ((0, -1), (batch + 1, 1)))
        raise ValueError(f"num_envs x num_steps = {batch:,} does not split into {args.num_minibatches} minibatches; use {below} or {above}")
    require(args.device in ("auto", "cpu", "cuda"), f"device must be auto, cpu or cuda, not {args.device!r}")
    require(args.impl == "jax" or args.self_collision, "impl=warp runs MuJoCo's own collision filter: add --self-collision")
    require(args.impl == "jax" or args.integrator != "mjcf", "impl=warp needs an integrator by name: euler, implicitfast or rk4")
    for path in (args.resume, args.play):
        require(path is None or Path(path).is_file(), f"there is no checkpoint {path}")
    parse_sweep(args.sweep)
    return args


def parse_sweep(sweep: str | None) -> tuple[str | None, list[float]]:
    """"learning_rate=1e-4,3e-4" -> ("learning_rate", [1e-4, 3e-4])."""
    if sweep is None:
        return None, [0.0]
    name, _, values = sweep.partition("=")
    require(name in Hyperparameters._fields, f"sweep maps one of {', '.join(Hyperparameters._fields)}; not {name!r}")
    try:
        return name, [float(value) for value in values.split(",")]
    except ValueError:
        raise ValueError(f"sweep needs NAME=V1,V2,... with numbers, not {sweep!r}") from None


# ------------------------------------------------------------------------------------------------------------------------
# Physics: MuJoCo MJX, one robot (vmap makes it a batch)
# ------------------------------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """One Gymnasium task, on the host: everything that is the same for all robots."""

    env_id: str
    options: dict[str, Any]  # Gymnasium's constructor arguments, defaults included
    mj_model: mujoco.MjModel
    model: mjx.Model
    blank: mjx.Data  # the state that every step starts from: all zeros
    frame_skip: int  # physics steps per environment step
    max_episode_steps: int
    observation_size: int
    impl: str


def make_task(args: Args) -> Task:
    """Gymnasium's own model and options, with the solver settings of `args`."""
    try:
        env = gymnasium.make(args.env_id, **args.env_kwargs)
    except TypeError as error:
        raise ValueError(f"env_kwargs: {error}") from None
    signature = inspect.signature(type(env.unwrapped).__init__).parameters.values()
    options = {p.name: p.default for p in signature if p.default is not p.empty} | args.env_kwargs
    model = env.unwrapped.model
    integrators = {"euler": "EULER", "implicitfast": "IMPLICITFAST", "rk4": "RK4"}
    if args.integrator != "mjcf":
        model.opt.integrator = getattr(mujoco.mjtIntegrator, "mjINT_" + integrators[args.integrator])
    model.opt.solver = mujoco.mjtSolver.mjSOL_NEWTON  # Humanoid's MJCF asks for PGS, which MJX does not have
    model.opt.jacobian = mujoco.mjtJacobian.mjJAC_DENSE
    model.opt.iterations, model.opt.ls_iterations = args.iterations, args.ls_iterations
    if not args.self_collision:
        is_floor = model.geom_type == mujoco.mjtGeom.mjGEOM_PLANE
        collides = (model.geom_contype | model.geom_conaffinity) != 0
        model.geom_contype[:] = ~is_floor & collides
        model.geom_conaffinity[:] = is_floor & collides
    backend = {} if args.impl == "jax" else {"impl": "warp"}
    return Task(
        args.env_id, options, model, mjx.put_model(model, **backend), mjx.make_data(model, **backend), env.unwrapped.frame_skip,
        env.spec.max_episode_steps, env.observation_space.shape[0], args.impl,
    )  # fmt: skip


def align_capsules(task: Task, data: mjx.Data) -> mjx.Data:
    """Turn the friction pyramid of every plane-capsule contact to the capsule's axis, as MuJoCo C does.

    C (mjc_PlaneCapsule) takes the capsule's axis for the first tangent, projects and normalises it. MJX drops a projected axis that is
    shorter than 1/2, that is within 30 degrees of vertical, and takes the world's y: another pyramid, hence another friction force.
    """
    contact = data._impl.contact  # frame: (contacts, 3, 3), rows normal and two tangents
    if contact.frame.shape[0] == 0:
        return data
    geom_type = jnp.asarray(task.mj_model.geom_type)
    plane, capsule = int(mujoco.mjtGeom.mjGEOM_PLANE), int(mujoco.mjtGeom.mjGEOM_CAPSULE)
    is_pair = (geom_type[contact.geom[:, 0]] == plane) & (geom_type[contact.geom[:, 1]] == capsule)
    normal = contact.frame[:, 0]
    axis = data.geom_xmat[contact.geom[:, 1]][:, :, 2]
    tangent = axis - normal * jnp.sum(normal * axis, axis=1, keepdims=True)
    length = jnp.linalg.norm(tangent, axis=1, keepdims=True)
    tangent = tangent / jnp.maximum(length, mujoco.mjMINVAL)
    frame = jnp.stack([normal, tangent, jnp.cross(normal, tangent)], axis=1)
    replaced = (is_pair & (length[:, 0] > mujoco.mjMINVAL))[:, None, None]
    data = data.tree_replace({"_impl.contact.frame": jnp.where(replaced, frame, contact.frame)})
    return mjx.make_constraint(task.model, data)  # the rows that fwd_position made are dropped by the compiler


def forward(task: Task, data: mjx.Data) -> mjx.Data:
    """State and control -> acceleration: mj_forward, with the capsule contacts of MuJoCo C."""
    data = mjx.fwd_position(task.model, data)
    data = align_capsules(task, data)
    data = mjx.fwd_velocity(task.model, data)
    data = mjx.fwd_actuation(task.model, data)
    data = mjx.fwd_acceleration(task.model, data)
    return mjx.solve(task.model, data)


def physics_step(task: Task, data: mjx.Data) -> mjx.Data:
    """One timestep: mj_step. Afterwards qpos and qvel are new; all else in `data` belongs to the last evaluated state, as in C."""
    if task.impl == "warp":
        return mjx.step(task.model, data)
    data = forward(task, data)
    integrator = task.mj_model.opt.integrator
    if integrator == mujoco.mjtIntegrator.mjINT_EULER:
        return mjx.euler(task.model, data)
    if integrator == mujoco.mjtIntegrator.mjINT_IMPLICITFAST:
        return mjx.implicit(task.model, data)
    return runge_kutta(task, data)


def runge_kutta(task: Task, data: mjx.Data) -> mjx.Data:
    """Classical fourth order: mj_RungeKutta. `data` holds the evaluated first stage."""
    h, qpos, qvel = task.mj_model.opt.timestep, data.qpos, data.qvel
    slopes = [(data.qvel, data.qacc)]
    for fraction in (0.5, 0.5, 1.0):
        velocity, acceleration = slopes[-1]
        stage = data.replace(qpos=move(task, qpos, fraction * h * velocity), qvel=qvel + fraction * h * acceleration)
        data = forward(task, stage)
        slopes.append((pull_back(task, fraction * h * velocity, data.qvel), data.qacc))
    velocity, acceleration = (sum(w * k for w, k in zip((1 / 6, 1 / 3, 1 / 3, 1 / 6), ks)) for ks in zip(*slopes))
    return data.replace(qpos=move(task, qpos, h * velocity), qvel=qvel + h * acceleration, qacc_warmstart=data.qacc)


def move(task: Task, qpos: jax.Array, displacement: jax.Array) -> jax.Array:
    """qpos: (nq,) moved by displacement: (nv,), metres or radians: mj_integratePos for hinges, slides and a free root joint."""
    if task.mj_model.nq == task.mj_model.nv:
        return qpos + displacement
    position, quaternion, joints = qpos[:3], qpos[3:7], qpos[7:]  # quaternion: (w, x, y, z)
    rotation = displacement[3:6]  # in the body's frame
    angle = jnp.linalg.norm(rotation)
    half = 0.5 * angle
    scale = jnp.where(angle > 1e-6, jnp.sin(half) / jnp.maximum(angle, 1e-6), 0.5)
    w, v, c, u = quaternion[0], quaternion[1:], jnp.cos(half), scale * rotation
    turned = jnp.concatenate([jnp.array([w * c - v @ u]), w * u + c * v + jnp.cross(v, u)])
    return jnp.concatenate([position + displacement[:3], turned / jnp.linalg.norm(turned), joints + displacement[6:]])


def pull_back(task: Task, displacement: jax.Array, qvel: jax.Array) -> jax.Array:
    """A velocity at move(qpos, displacement) in the coordinates of qpos: a rotation does not add up like a vector.

    Inverse of the right Jacobian of rotations, to third order (Munthe-Kaas 1998): w + u x w / 2 + u x (u x w) / 12.
    """
    if task.mj_model.nq == task.mj_model.nv:
        return qvel
    u, w = displacement[3:6], qvel[3:6]
    turn = jnp.cross(u, w)
    return qvel.at[3:6].set(w + turn / 2 + jnp.cross(u, turn) / 12)
