"""PPO on MuJoCo MJX: one compiled JAX program from physics to gradient, for one agent or for many at once. Copy me.

    python ppo_mjx_jax.py                                                   InvertedPendulum-v5, ends at 1000
    python ppo_mjx_jax.py --num-seeds 8                                     eight agents in one program
    python ppo_mjx_jax.py --sweep gae_lambda --sweep-values 0.9 0.95 1 --num-seeds 3
    python ppo_mjx_jax.py --env-id HalfCheetah-v5 --num-envs 256 --num-steps 64 --total-timesteps 3000000
    python ppo_mjx_jax.py --env-id Ant-v5 --num-envs 4096                   on a GPU
    python ppo_mjx_jax.py --resume runs/NAME/checkpoint.npz --total-timesteps 40000000
    python ppo_mjx_jax.py --play runs/NAME/checkpoint.npz --capture-video   score a checkpoint, film one episode

The first command reaches 1000 in all 20 episodes of Gymnasium's own environment. On one AMD EPYC core it takes 28 s to
compile and 3 s to train; a test runs it. Other measured results are in results/mjx/, each with versions and hardware.

An iteration is one program: rollout with MJX, resets, advantages, epochs over minibatches, learning rate, sums for the
log. `train` runs as many iterations as possible before the host must log, evaluate or save. An agent is a pure function
of its hyperparameters and its seed, so `vmap` trains many agents at once.

The tasks are Gymnasium's: model and options come from gymnasium.make; observation, reward and termination follow its
source. With a converged solver in float64, one step equals MuJoCo C's to 1e-9. Training uses cheaper physics: 4 Newton
iterations, 2 line-search steps, no collisions between the robot's own limbs, float32. A policy that exploits the
difference is exposed by its score in Gymnasium, which runs MuJoCo C with the MJCF's own settings.

Sources: Schulman et al. 2016 (GAE, eq. 16) and 2017 (PPO, eq. 7); Pardo et al. 2018 (time limits); Rudin et al. 2022
(the adaptive learning rate of rsl_rl); Lu et al. 2022 (PureJaxRL: training as one function). ppo_gpu_torch.py is the
same algorithm in PyTorch, with the same flags and defaults. This file imports no other file of the project.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import inspect
import io
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

# On a CPU, MJX's batched Cholesky factorisations can fill XLA's thread pool with threads that wait for each other (seen
# with jaxlib 0.10.2 on two cores). A larger pool and single-threaded calls prevent that. XLA reads both variables once.
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
if 1 < cores < 16:
    os.environ.setdefault("NPROC", "16")
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false " + os.environ.get("XLA_FLAGS", "")  # the last one wins

import flax.linen as nn
import gymnasium
import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import optax
import tyro
from flax.traverse_util import unflatten_dict
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from mujoco import mjx
from tensorboard.summary import Writer
from tqdm import tqdm

# MuJoCo would write its warnings to MUJOCO_LOG.TXT. half_cheetah.xml always raises the one that is skipped.
mujoco.set_mju_user_warning(lambda text: None if "settotalmass" in text else print(text, file=sys.stderr))


class InputError(ValueError):
    """A user's mistake: printed as one line, exit status 2."""


def require(condition: bool, rule: str):
    if not condition:
        raise InputError(rule)


# ----------------------------------------------------------------------------------------------------------------------
# Arguments
# ----------------------------------------------------------------------------------------------------------------------

# Options of Humanoid that this script does not have.
UNSUPPORTED = ("include_cinert_in_observation", "include_cvel_in_observation", "include_qfrc_actuator_in_observation")
TASKS = {  # flags of a task that differ from the defaults
    "InvertedPendulum-v5": dict(
        num_envs=512, num_minibatches=4, total_timesteps=250_000, actor_hidden=(64, 64), critic_hidden=(64, 64)),
    "Hopper-v5": dict(total_timesteps=6_000_000, gamma=0.995, bounds_coef=0.01, learning_rate_max=1e-3),
    "Walker2d-v5": dict(total_timesteps=6_000_000, gamma=0.995, num_steps=32, num_minibatches=16),
    "HalfCheetah-v5": dict(total_timesteps=5_000_000),
    "Ant-v5": dict(
        total_timesteps=9_000_000, env_kwargs={"include_cfrc_ext_in_observation": False}, gamma=0.98, gae_lambda=0.9,
        log_std_init=-0.7, log_std_min=-1.7, desired_kl=(0.015, 0.009)),
    "Humanoid-v5": dict(
        total_timesteps=15_000_000, gamma=0.97, log_std_min=-1.7, desired_kl=(0.015, 0.009),
        env_kwargs=dict.fromkeys((*UNSUPPORTED, "include_cfrc_ext_in_observation"), False)),
}  # fmt: skip
# The flags that enter the program as data, one value per agent. --sweep maps over one of them.
Hyperparameters = collections.namedtuple(
    "Hyperparameters", "learning_rate learning_rate_max desired_kl gamma gae_lambda clip_coef entropy_coef bounds_coef "
    "max_grad_norm log_std_init log_std_min reward_scale")  # fmt: skip


@dataclasses.dataclass
class Args:
    """Flags of a run. All numbers of steps are environment steps of one agent, summed over its environments."""

    env_id: Literal[tuple(TASKS)] = "InvertedPendulum-v5"  # task; it sets the other defaults
    num_envs: int = 1024  # environments of each agent that are stepped in parallel, over all devices (>= 1)
    total_timesteps: int = 20_000_000  # environment steps of the whole run (>= 1; rounded up to whole iterations)
    seed: int = 1  # seed of the weights, the environments and the noise (0 to 2,000,000,000)
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: JAX's choice; all devices of a kind share the environments
    run_dir: str | None = None  # output folder without a run in it (default: runs/<env_id>__ppo_mjx__<seed>__<time>)
    resume: str | None = None  # checkpoint to continue in its folder; omitted flags keep its values
    checkpoint_every: int | None = None  # steps between checkpoints (>= 1; default: a tenth of the run)
    log_every: int | None = None  # steps between log lines (>= 1; default: total_timesteps / 200)
    eval_episodes: int = 20  # episodes of an evaluation in Gymnasium (>= 0; 0: no evaluation)
    eval_every: int | None = None  # steps between evaluations (>= 1; default: only a final one); the run's clock stops
    play: str | None = None  # checkpoint to play deterministically instead of training; prints its scores
    capture_video: bool = False  # with --play: film one episode of the best agent, into the checkpoint's folder
    track: bool = False  # log to Weights & Biases too (needs `pip install wandb`)
    compilation_cache: str = "~/.cache/onefile-gpu-rl/jax"  # folder that keeps compiled programs ("" keeps none)

    # many agents in one program
    num_seeds: int = 1  # independent agents, with seeds seed, seed + 1, ... (>= 1)
    sweep: Literal[Hyperparameters._fields] | None = None  # train every agent with each of sweep_values
    sweep_values: tuple[float, ...] = ()  # values of the flag that --sweep names

    # the environment
    env_kwargs: dict[str, bool | int | float | str] = dataclasses.field(default_factory=dict)
    """options of the task, on top of those in TASKS, for example --env-kwargs ctrl_cost_weight 0.1"""
    integrator: Literal["mjcf", "euler", "implicitfast", "rk4"] = "mjcf"
    """integrator of the training physics; mjcf: that of the MJCF, as in Gymnasium"""
    solver_iterations: int = 4  # Newton iterations of the contact solver (>= 1)
    ls_iterations: int = 2  # line-search steps of each Newton iteration, at most (>= 1)
    self_collision: bool = False  # let the robot's limbs collide with each other (matters for Hopper and Humanoid)
    reward_scale: float = 1.0  # factor on the rewards that the learner sees (> 0); logged returns are unscaled

    # the batch
    num_steps: int = 16  # steps of each environment in an iteration (>= 1)
    update_epochs: int = 4  # passes over the samples of an iteration, all in the same random order (>= 1)
    num_minibatches: int = 8  # gradient steps per pass (>= 1; must divide num_envs x num_steps)

    # the networks
    actor_hidden: tuple[int, ...] = (256, 128, 64)  # hidden layer sizes of the policy
    critic_hidden: tuple[int, ...] = (256, 128, 64)  # hidden layer sizes of the value function
    log_std_init: float = 0.0  # initial log standard deviation of the policy, in units of half the action range
    log_std_min: float = -2.3  # lowest log standard deviation, in the same units
    normalize_observations: bool = True  # scale observations by their running mean and standard deviation
    normalize_values: bool = True  # train the value function on returns scaled by their running mean and deviation

    # the objective
    gamma: float = 0.99  # discount per environment step (0 to 1)
    gae_lambda: float = 0.95  # decay of generalised advantage estimation (0 to 1)
    clip_coef: float = 0.2  # clipping range of the probability ratio (> 0; inf: no clipping)
    normalize_advantages: bool = True  # scale the advantages of an iteration to mean 0 and standard deviation 1
    entropy_coef: float = 0.0  # weight of the entropy bonus (>= 0)
    bounds_coef: float = 1e-4  # weight of the penalty on mean actions beyond 1.1 half ranges from the centre (>= 0)
    max_grad_norm: float = 1.0  # largest gradient norm of each of the two networks (> 0; inf: no clipping)

    # the learning rate
    learning_rate: float = 1e-3  # initial learning rate of Adam (> 0); a new one replaces the adapted one on --resume
    learning_rate_schedule: Literal["adaptive", "linear", "constant"] = "adaptive"
    """adaptive: keep the KL divergence of an update near desired_kl; linear: decay to 0 over the run; constant"""
    learning_rate_max: float = 5e-3  # adaptive schedule: highest learning rate (> 0); the lowest is 1e-5
    desired_kl: tuple[float, float] = (0.01, 0.01)
    """adaptive schedule: KL(old policy || new policy) to aim at, at the start and at the end of the run (> 0)"""


def task_defaults(env_id: str) -> Args:
    """The defaults of a task: its row in TASKS on top of those of Args."""
    return Args(env_id=env_id, **TASKS[env_id])


def parse_args(argv: list[str]) -> Args:
    """Read the flags. Omitted ones are those of the task, or of the checkpoint with --resume and --play."""

    def parse(words: list[str], default: Args) -> Args:
        complaint = io.StringIO()
        try:
            with contextlib.redirect_stderr(complaint):
                return tyro.cli(Args, args=words, default=default, description=__doc__)
        except SystemExit as stop:
            if not stop.code:
                raise  # --help
            raise InputError(re.sub(r"[^\x21-\x7e]+", " ", complaint.getvalue()).strip()) from None

    given = parse([word for word in argv if word not in ("-h", "--help")], Args())
    require(not (given.resume and given.play), "--resume continues a run and --play plays one: give one of them")
    require(bool(given.play) or not given.capture_video, "--capture-video needs a checkpoint; give it with --play")
    path = given.resume or given.play
    default = task_defaults(given.env_id)
    if path:
        of_one_command = dict(run_dir=None, resume=None, play=None, capture_video=False)
        default = Args(**load_checkpoint(path)["args"] | of_one_command)
    args = parse(argv, dataclasses.replace(default, env_kwargs={}))  # tyro would make a flag of each option
    ranges = {}
    for name, value in args.env_kwargs.items():
        with contextlib.suppress(AttributeError, ValueError):  # it is not two numbers as a text
            low, high = value.split(":")
            ranges[name] = [float(low), float(high)]
    return dataclasses.replace(args, env_kwargs=default.env_kwargs | args.env_kwargs | ranges)


def check_flags(args: Args):
    """InputError names the rule that a flag breaks and, if it can, a legal value that is near."""
    counts = "num_envs total_timesteps num_seeds num_steps update_epochs num_minibatches"
    rules = (  # flags, whether a value is legal, and the rule in words
        (f"{counts} solver_iterations ls_iterations", lambda x: x >= 1, ">= 1"),
        ("checkpoint_every log_every eval_every", lambda x: x is None or x >= 1, ">= 1"),
        ("seed", lambda x: 0 <= x <= 2_000_000_000, "between 0 and 2,000,000,000"),
        ("eval_episodes", lambda x: x >= 0, ">= 0"),
        ("gamma gae_lambda", lambda x: 0 <= x <= 1, "between 0 and 1"),
        ("entropy_coef bounds_coef", lambda x: 0 <= x < np.inf, ">= 0 and finite"),
        ("reward_scale learning_rate learning_rate_max", lambda x: 0 < x < np.inf, "> 0 and finite"),
        ("desired_kl", lambda x: all(0 < kl < np.inf for kl in x), "> 0 and finite"),
        ("clip_coef max_grad_norm", lambda x: x > 0, "> 0"),
        ("log_std_init log_std_min", np.isfinite, "finite"),
        ("actor_hidden critic_hidden", lambda x: all(size >= 1 for size in x), "sizes >= 1"),
    )
    for names, legal, rule in rules:
        for name in names.split():
            require(legal(getattr(args, name)), f"{name} = {getattr(args, name)} must be {rule}")
    require(not args.eval_every or args.eval_episodes, "eval_every needs eval_episodes >= 1; use --eval-episodes 20")
    batch = args.num_envs * args.num_steps
    if batch % args.num_minibatches:
        nearest = next(n for n in range(min(batch, args.num_minibatches), 0, -1) if batch % n == 0)
        split = f"num_envs x num_steps = {batch:,} does not split into {args.num_minibatches} minibatches"
        raise InputError(f"{split}; use {nearest}")
    require(bool(args.sweep) == bool(args.sweep_values), "--sweep names a flag, --sweep-values its values; give both")
    for one in swept(args) if args.sweep else []:
        check_flags(one)


def swept(args: Args) -> list[Args]:
    """The flags for each value of the sweep. A value of desired_kl holds from the start to the end of the run."""
    values = [(x, x) if args.sweep == "desired_kl" else x for x in args.sweep_values]
    return [dataclasses.replace(args, sweep=None, sweep_values=(), **{args.sweep: x}) for x in values] or [args]


def hyperparameters(args: Args) -> tuple[Hyperparameters, np.ndarray]:
    """The hyperparameters of all agents, (agents, ...) each, and their seeds: every swept value with every seed."""
    agents = [one for one in swept(args) for _ in range(args.num_seeds)]
    fields = {name: np.array([getattr(one, name) for one in agents], float) for name in Hyperparameters._fields}
    return Hyperparameters(**fields), np.tile(args.seed + np.arange(args.num_seeds), len(agents) // args.num_seeds)


# ----------------------------------------------------------------------------------------------------------------------
# Physics: MuJoCo MJX, one robot (vmap makes it a batch)
# ----------------------------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """One Gymnasium task: what is the same for all robots."""

    env_id: str
    options: dict[str, Any]  # arguments of Gymnasium's constructor, defaults included
    mj_model: mujoco.MjModel  # with the solver settings of the flags
    model: mjx.Model
    blank: mjx.Data  # all zeros; every step starts from it
    frame_skip: int  # physics steps per environment step
    max_episode_steps: int


def make_task(args: Args) -> Task:
    """Gymnasium's own model and options, with the solver settings of `args`."""
    try:
        env = gymnasium.make(args.env_id, **args.env_kwargs)
    except TypeError as error:
        raise InputError(f"env_kwargs: {error}") from None
    signature = inspect.signature(type(env.unwrapped).__init__).parameters.values()
    options = {p.name: p.default for p in signature if p.default is not p.empty} | args.env_kwargs
    for name in UNSUPPORTED:
        require(not options.get(name), f"env_kwargs: this script has no {name}; use --env-kwargs {name} False")
    model = env.unwrapped.model
    if args.integrator != "mjcf":
        model.opt.integrator = getattr(mujoco.mjtIntegrator, f"mjINT_{args.integrator.upper()}")
    if model.opt.integrator == mujoco.mjtIntegrator.mjINT_RK4:  # see `runge_kutta`
        model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_EULERDAMP
    model.opt.solver = mujoco.mjtSolver.mjSOL_NEWTON  # Humanoid's MJCF asks for PGS, which MJX does not have
    model.opt.jacobian = mujoco.mjtJacobian.mjJAC_DENSE
    model.opt.iterations, model.opt.ls_iterations = args.solver_iterations, args.ls_iterations
    if not args.self_collision:
        is_floor = model.geom_type == mujoco.mjtGeom.mjGEOM_PLANE
        collides = (model.geom_contype | model.geom_conaffinity) != 0
        model.geom_contype[:] = ~is_floor & collides
        model.geom_conaffinity[:] = is_floor & collides
    device = jax.config.jax_default_device  # MJX would take the first GPU
    return Task(
        args.env_id, options, model, mjx.put_model(model, device=device, impl="jax"),
        mjx.make_data(model, device=device, impl="jax"), env.unwrapped.frame_skip, env.spec.max_episode_steps,
    )  # fmt: skip


def align_capsules(task: Task, data: mjx.Data) -> mjx.Data:
    """Turn the friction pyramid of every plane-capsule contact to the capsule's axis, as MuJoCo C does.

    MuJoCo C (mjc_PlaneCapsule) projects the capsule's axis on the plane and takes it as the first tangent. MJX does so
    only where the projection is longer than 1/2. For a capsule within 30 degrees of vertical it takes the world's y
    axis, hence another pyramid and another friction force. (MJX keeps contacts and cfrc_ext only in `_impl`.)
    """
    contact = data._impl.contact  # frame: (contacts, 3, 3), rows normal and two tangents
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
    return mjx.make_constraint(task.model, data)  # the compiler drops the rows that fwd_position made


def forward(task: Task, data: mjx.Data) -> mjx.Data:
    """State and control -> acceleration: mj_forward, with the capsule contacts of MuJoCo C."""
    data = align_capsules(task, mjx.fwd_position(task.model, data))
    for stage in (mjx.fwd_velocity, mjx.fwd_actuation, mjx.fwd_acceleration, mjx.solve):
        data = stage(task.model, data)
    return data


def keep_types(new: mjx.Data, old: mjx.Data) -> mjx.Data:
    """`new` in the number formats of `old`: in float64, MJX widens some integers."""
    return jax.tree.map(lambda x, of_old: x.astype(of_old.dtype), new, old)


def chart_rate(task: Task, qvel: Array, displacement: Array) -> Array:
    """(nv,), m/s and rad/s: how fast the displacement of a Runge-Kutta stage (nv,), m and rad, changes at `qvel`.

    This is qvel, except for the rotation vector u of a free root. If the root turns at w in its own axes, u changes at
    w + u x w / 2 + c u x (u x w), where c = (1 - (t/2) cot(t/2)) / t^2 with t = |u|, here as a series. MuJoCo 4 uses
    this form too (Iserles et al. 2000, Lie-group methods, B.3)."""
    if task.mj_model.jnt_type[0] != mujoco.mjtJoint.mjJNT_FREE:
        return qvel
    w, u = qvel[3:6], displacement[3:6]
    square, bracket = u @ u, jnp.cross(u, w)
    c = 1 / 12 + square / 720 + square**2 / 30_240 + square**3 / 1_209_600  # to 1e-10 below half a radian
    return qvel.at[3:6].set(w + bracket / 2 + c * jnp.cross(u, bracket))


def runge_kutta(task: Task, start: mjx.Data) -> mjx.Data:
    """One timestep: mj_RungeKutta, of classical fourth order. qpos and qvel are new afterwards; all else is of the
    fourth evaluation."""
    model, timestep = task.model, task.mj_model.opt.timestep

    def moved(data: mjx.Data, seconds: Array, rate: Array, qacc: Array) -> mjx.Data:
        """`data` with the coordinates of `start` after so many seconds."""
        # mjx.euler changes qpos alone, because qacc is 0 and the implicit damping, which would replace it, is disabled.
        still = start.replace(qvel=rate, qacc=jnp.zeros_like(qacc))
        qpos = mjx.euler(model.tree_replace({"opt.timestep": seconds}), still).qpos
        return data.replace(qpos=qpos, qvel=start.qvel + seconds * qacc)

    def evaluate(carry: tuple, stage: Array) -> tuple[tuple, None]:
        data, rate, mean_rate, mean_qacc = carry
        seconds, weight = stage
        data = keep_types(forward(task, moved(data, seconds, rate, data.qacc)), data)
        rate = chart_rate(task, data.qvel, seconds * rate)
        data = data.replace(qacc_warmstart=data.qacc)
        return (data, rate, mean_rate + weight * rate, mean_qacc + weight * data.qacc), None

    none, stages = jnp.zeros_like(start.qvel), [(0, 1 / 6), (1 / 2, 1 / 3), (1 / 2, 1 / 3), (1, 1 / 6)]
    stages = jnp.array(stages, none.dtype) * jnp.array([timestep, 1], none.dtype)
    (data, _, mean_rate, mean_qacc), _ = jax.lax.scan(evaluate, (start, none, none, none), stages)
    return moved(data, timestep, mean_rate, mean_qacc)


def physics_step(task: Task, data: mjx.Data) -> mjx.Data:
    """One timestep: mj_step. Only qpos and qvel are new afterwards. All else in `data` is of the last evaluation of the
    dynamics: at the state before, or of Runge-Kutta's fourth stage."""
    integrators = mujoco.mjtIntegrator
    if task.mj_model.opt.integrator == integrators.mjINT_RK4:
        return runge_kutta(task, data)
    integrate = mjx.euler if task.mj_model.opt.integrator == integrators.mjINT_EULER else mjx.implicit
    return keep_types(integrate(task.model, forward(task, data)), data)


# ----------------------------------------------------------------------------------------------------------------------
# Tasks: Gymnasium's observations, rewards and terminations, one robot
# ----------------------------------------------------------------------------------------------------------------------


class RobotState(NamedTuple):
    """What one robot keeps between two environment steps."""

    qpos: Array  # (nq,) m and rad; a free joint is position, then quaternion (w, x, y, z)
    qvel: Array  # (nv,) m/s and rad/s
    qacc_warmstart: Array  # (nv,) where the solver starts
    x_position: Array  # () m: Gymnasium's forward coordinate after the last step; its difference gives the speed


def x_position(task: Task, data: mjx.Data) -> Array:
    """(): forward coordinate, m. Ant's and Humanoid's are Cartesian positions, which mj_step does not refresh: they are
    of its last evaluation of the dynamics."""
    if task.env_id == "Ant-v5":
        return data.xpos[task.options["main_body"], 0]
    if task.env_id == "Humanoid-v5":
        mass = jnp.asarray(task.mj_model.body_mass)
        return (mass @ data.xipos[:, 0]) / mass.sum()
    return data.qpos[0]


def is_healthy(task: Task, data: mjx.Data) -> Array:
    """() bool. Bounds are open, except for Ant and the pendulum."""
    options, qpos, state = task.options, data.qpos, jnp.concatenate([data.qpos, data.qvel])
    if task.env_id == "InvertedPendulum-v5":
        return jnp.isfinite(state).all() & (jnp.abs(qpos[1]) <= 0.2)
    if task.env_id == "HalfCheetah-v5":
        return jnp.array(True)
    low, high = options["healthy_z_range"]
    if task.env_id == "Ant-v5":
        return jnp.isfinite(state).all() & (low <= qpos[2]) & (qpos[2] <= high)
    if task.env_id == "Humanoid-v5":
        return (low < qpos[2]) & (qpos[2] < high)
    height, (low_angle, high_angle) = qpos[1], options["healthy_angle_range"]
    healthy = (low < height) & (height < high) & (low_angle < qpos[2]) & (qpos[2] < high_angle)
    if task.env_id == "Hopper-v5":
        low_state, high_state = options["healthy_state_range"]
        healthy &= ((low_state < state[2:]) & (state[2:] < high_state)).all()
    return healthy


def observe(task: Task, data: mjx.Data) -> Array:
    """(observation,): positions without the root's x (and y), velocities, and contact wrenches if the options ask."""
    options = task.options
    free_root = task.env_id in ("Ant-v5", "Humanoid-v5")
    skipped = (2 if free_root else 1) if options.get("exclude_current_positions_from_observation") else 0
    clipped = task.env_id in ("Hopper-v5", "Walker2d-v5")
    groups = [data.qpos[skipped:], jnp.clip(data.qvel, -10, 10) if clipped else data.qvel]
    if options.get("include_cfrc_ext_in_observation"):
        force = data._impl.cfrc_ext[1:].ravel()
        groups.append(jnp.clip(force, *options["contact_force_range"]) if task.env_id == "Ant-v5" else force)
    return jnp.concatenate(groups)


def reward_of(task: Task, data: mjx.Data, action: Array, x_velocity: Array) -> Array:
    """(): forward speed and health, minus control and contact cost."""
    options, healthy = task.options, is_healthy(task, data).astype(x_velocity.dtype)
    if task.env_id == "InvertedPendulum-v5":
        return healthy
    reward = options["forward_reward_weight"] * x_velocity + options.get("healthy_reward", 0.0) * healthy
    reward -= options["ctrl_cost_weight"] * jnp.square(action).sum()
    if not options.get("contact_cost_weight"):
        return reward
    force, weight = data._impl.cfrc_ext, options["contact_cost_weight"]
    if task.env_id == "Ant-v5":
        return reward - weight * jnp.square(jnp.clip(force, *options["contact_force_range"])).sum()
    return reward - jnp.clip(weight * jnp.square(force).sum(), *options["contact_cost_range"])


def with_contact_wrenches(task: Task, data: mjx.Data) -> mjx.Data:
    """Fill cfrc_ext if the task reads it: (bodies, 6), contact wrenches about each tree's centre of mass."""
    read = task.options.get("contact_cost_weight") or task.options.get("include_cfrc_ext_in_observation")
    return mjx.rne_postconstraint(task.model, data) if read else data


def task_reset(task: Task, key: Array) -> tuple[RobotState, Array]:
    """A random initial state by the task's own rule, and its observation."""
    options, (key_position, key_velocity) = task.options, jax.random.split(key)
    scale, nv = options["reset_noise_scale"], task.mj_model.nv
    qpos = jnp.asarray(task.mj_model.qpos0, dtype=task.blank.qpos.dtype)
    qpos = qpos + jax.random.uniform(key_position, qpos.shape, qpos.dtype, -scale, scale)
    if task.env_id in ("HalfCheetah-v5", "Ant-v5"):
        qvel = scale * jax.random.normal(key_velocity, (nv,), qpos.dtype)
    else:
        qvel = jax.random.uniform(key_velocity, (nv,), qpos.dtype, -scale, scale)
    return state_at(task, qpos, qvel)


def state_at(task: Task, qpos: Array, qvel: Array) -> tuple[RobotState, Array]:
    """The state with these coordinates, as after Gymnasium's set_state, and its observation."""
    data = forward(task, task.blank.replace(qpos=qpos, qvel=qvel))  # the compiler drops what nobody reads
    data = with_contact_wrenches(task, data)
    return RobotState(qpos, qvel, jnp.zeros_like(qvel), x_position(task, data)), observe(task, data)


def task_step(task: Task, state: RobotState, action: Array) -> tuple[RobotState, Array, Array, Array]:
    """Next state, observation, reward, terminated. `action` is in the units of Gymnasium's action space. Like there, it
    may exceed that space, and the control cost then counts the whole action."""
    start = dict(qpos=state.qpos, qvel=state.qvel, qacc_warmstart=state.qacc_warmstart)
    data = task.blank.replace(**start, ctrl=action)  # MuJoCo clamps ctrl to the control range
    data = jax.lax.fori_loop(0, task.frame_skip, lambda _, data: physics_step(task, data), data)
    data = with_contact_wrenches(task, data)
    x = x_position(task, data)
    seconds = task.mj_model.opt.timestep * task.frame_skip
    reward = reward_of(task, data, action, (x - state.x_position) / seconds)
    terminated = ~is_healthy(task, data) & task.options.get("terminate_when_unhealthy", True)
    return RobotState(data.qpos, data.qvel, data.qacc_warmstart, x), observe(task, data), reward, terminated


class Environment(NamedTuple):
    """What the learner needs from an environment. Its functions are pure and describe one robot."""

    reset: Callable  # key -> state, observation (observation,)
    step: Callable  # state, action (actions,) -> state, observation, reward (), terminated () bool
    action_low: np.ndarray  # (actions,)
    action_high: np.ndarray  # (actions,)
    max_episode_steps: int


def to_env(low: np.ndarray, high: np.ndarray, action: Array) -> Array:
    """Half ranges, in which the policy acts, to the environment's units: -1 becomes low, +1 becomes high."""
    half_range, centre = (high - low) / 2, (high + low) / 2
    return (centre + half_range * action).astype(action.dtype)


def make_environment(task: Task) -> Environment:
    low, high = task.mj_model.actuator_ctrlrange.T
    reset, step = functools.partial(task_reset, task), functools.partial(task_step, task)
    return Environment(reset, step, low, high, task.max_episode_steps)


# ----------------------------------------------------------------------------------------------------------------------
# Auto-reset and quarantine, one robot
# ----------------------------------------------------------------------------------------------------------------------

RUNAWAY = 1e6  # an observation beyond this has left physics


class Slot(NamedTuple):
    """One of the parallel environments: its robot and its episode so far."""

    state: Any
    obs: Array  # (observation,)
    age: Array  # () environment steps on the time limit's clock; the first episode may start late
    length: Array  # () environment steps of this episode
    episode_return: Array  # () unscaled


class Transition(NamedTuple):
    """One environment step. In a rollout every field gets the axes (T, N) in front: T = num_steps, N = num_envs."""

    obs: Array  # (observation,)
    final_obs: Array  # (observation,): what the step led to, before any auto-reset
    action: Array  # (actions,), half ranges
    mean: Array  # (actions,), half ranges: the policy's mean when it acted
    reward: Array  # () unscaled
    terminated: Array  # () bool
    truncated: Array  # () bool
    invalid: Array  # () bool: the simulation diverged; such a quarantined step is ignored by the learner
    episode_return: Array  # () return and length of the episode that this step may have ended
    length: Array  # ()
    age: Array  # () larger than length in an episode that began at a random age


def first_slot(env: Environment, key: Array) -> Slot:
    """A new environment. Its random first age keeps the environments from timing out together."""
    key_state, key_age = jax.random.split(key)
    state, obs = env.reset(key_state)
    age = jax.random.randint(key_age, (), 0, env.max_episode_steps)
    return Slot(state, obs, age, jnp.array(0), jnp.zeros((), obs.dtype))


def autoreset_step(env: Environment, slot: Slot, action: Array, mean: Array, key: Array) -> tuple[Slot, Transition]:
    """Step one environment. Where its episode ended, start the next one from a fresh random state.

    An environment that is not finite or has run away is quarantined: it is reset and its transition is marked invalid,
    which every loss and statistic masks. Its final_obs is the fresh observation, so no NaN reaches the learner.
    """
    state, obs, reward, terminated = env.step(slot.state, to_env(env.action_low, env.action_high, action))
    age, length, episode_return = slot.age + 1, slot.length + 1, slot.episode_return + reward
    finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((state, reward))]
    invalid = ~(jnp.array(finite).all() & (jnp.abs(obs) < RUNAWAY).all())
    terminated, truncated = terminated & ~invalid, (age >= env.max_episode_steps) & ~invalid
    ended = terminated | truncated | invalid
    fresh_state, fresh_obs = env.reset(key)
    transition = Transition(
        slot.obs, jnp.where(invalid, fresh_obs, obs), action, mean, jnp.where(invalid, 0.0, reward),
        terminated, truncated, invalid, episode_return, length, age,
    )  # fmt: skip
    current = Slot(state, obs, age, length, episode_return)
    fresh = Slot(fresh_state, fresh_obs, *(jnp.zeros_like(x) for x in (age, length, episode_return)))
    return jax.tree.map(lambda new, old: jnp.where(ended, new, old), fresh, current), transition


# ----------------------------------------------------------------------------------------------------------------------
# Statistics and networks
# ----------------------------------------------------------------------------------------------------------------------


class Statistics(NamedTuple):
    """Running mean and variance of vectors. They are part of the agent's state, so every checkpoint holds them."""

    mean: Array  # (k,)
    variance: Array  # (k,)
    count: Array  # ()

    @staticmethod
    def of(x: Array, valid: Array) -> Statistics:
        """Of the valid rows of x: (B, k). Without a valid row the count is 0, and `merge` ignores the result."""
        count = valid.sum().astype(x.dtype)
        mean = jnp.where(valid[:, None], x, 0.0).sum(0) / jnp.maximum(count, 1.0)
        variance = jnp.where(valid[:, None], jnp.square(x - mean), 0.0).sum(0) / jnp.maximum(count, 1.0)
        return Statistics(mean, variance, count)

    def merge(self, other: Statistics) -> Statistics:
        """Chan et al. 1983."""
        count = self.count + other.count
        shift, share = other.mean - self.mean, other.count / jnp.maximum(count, 1.0)
        variance = self.variance * (1 - share) + other.variance * share + jnp.square(shift) * share * (1 - share)
        return Statistics(self.mean + shift * share, variance, count)

    def deviation(self) -> Array:
        return jnp.sqrt(self.variance + 1e-6)

    def normalize(self, x: Array) -> Array:
        return (x - self.mean) / self.deviation()

    def denormalize(self, x: Array) -> Array:
        return x * self.deviation() + self.mean


ADAM = optax.scale_by_adam()  # Adam's direction; `update` multiplies it by the agent's learning rate


class MLP(nn.Module):
    """ELU layers, orthogonal weights, zero biases."""

    hidden: tuple[int, ...]
    outputs: int
    last_gain: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for size in self.hidden:
            x = nn.elu(nn.Dense(size, kernel_init=nn.initializers.orthogonal(2**0.5))(x))
        return nn.Dense(self.outputs, kernel_init=nn.initializers.orthogonal(self.last_gain))(x)


class AgentState(NamedTuple):
    """Everything that changes during training: the content of a checkpoint."""

    parameters: dict  # actor: {network, log_std (actions,)}, critic: {network}
    adam: Any
    learning_rate: Array
    obs_statistics: Statistics
    return_statistics: Statistics
    slots: Slot  # (N, ...)
    key: Array
    iteration: Array  # () finished so far


class Setup(NamedTuple):
    """Everything that does not change: the program is compiled for it."""

    env: Environment
    actor: MLP
    critic: MLP
    args: Args
    mesh: Mesh  # devices, one axis, "envs"
    iterations: int  # of the whole run


def make_setup(env: Environment, args: Args, devices: list | None = None) -> Setup:
    mesh = Mesh(np.array(devices or jax.devices()[:1]), ("envs",))
    rule = f"num_envs = {args.num_envs:,} does not split over {mesh.size} devices; use a multiple of {mesh.size}"
    require(args.num_envs % mesh.size == 0, rule)
    actor, critic = MLP(args.actor_hidden, len(env.action_low), 0.01), MLP(args.critic_hidden, 1, 1.0)
    return Setup(env, actor, critic, args, mesh, -(-args.total_timesteps // (args.num_envs * args.num_steps)))


def network_input(args: Args, statistics: Statistics, obs: Array) -> Array:
    """What both networks see of obs: (..., observation): normalised and clipped at 10 deviations, or obs itself."""
    return jnp.clip(statistics.normalize(obs), -10.0, 10.0) if args.normalize_observations else obs


def policy_mean(setup: Setup, parameters: dict, statistics: Statistics, obs: Array) -> Array:
    """obs: (B, observation) -> (B, actions), half ranges. Deterministic evaluation uses it as the action."""
    return setup.actor.apply(parameters["actor"]["network"], network_input(setup.args, statistics, obs))


def values_of(setup: Setup, state: AgentState, obs: Array) -> Array:
    """V: (..., observation) -> (...), in scaled reward units."""
    seen = network_input(setup.args, state.obs_statistics, obs)
    value = setup.critic.apply(state.parameters["critic"]["network"], seen)
    return state.return_statistics.denormalize(value[..., 0])


def initialise(setup: Setup, hyper: Hyperparameters, seed: Array) -> AgentState:
    """One agent before its first step."""
    args, env = setup.args, setup.env
    key, key_actor, key_critic, key_slots = jax.random.split(jax.random.PRNGKey(seed), 4)
    slots = jax.vmap(functools.partial(first_slot, env))(jax.random.split(key_slots, args.num_envs))
    obs, log_std = jnp.zeros_like(slots.obs[:1]), hyper.log_std_init * jnp.ones(len(env.action_low))
    parameters = {
        "actor": {"network": setup.actor.init(key_actor, obs), "log_std": log_std},
        "critic": {"network": setup.critic.init(key_critic, obs)},
    }
    statistics = [Statistics(jnp.zeros(size), jnp.ones(size), jnp.zeros(())) for size in (obs.size, 1)]
    return AgentState(parameters, ADAM.init(parameters), hyper.learning_rate, *statistics, slots, key, jnp.array(0))


# ----------------------------------------------------------------------------------------------------------------------
# Algorithm: pure functions of one agent (vmap makes it many)
# ----------------------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """The B samples of one update. What the old policy and value function said about them is frozen here."""

    obs: Array  # (B, observation), normalised
    action: Array  # (B, actions), half ranges
    mean: Array  # (B, actions), old policy
    log_prob: Array  # (B,), old policy
    value: Array  # (B,), old value function, normalised
    target: Array  # (B,), return to regress on, normalised
    advantage: Array  # (B,)
    weight: Array  # (B,): 0 for a quarantined transition, otherwise such that the mean is 1


def gaussian_log_prob(action: Array, mean: Array, log_std: Array) -> Array:
    """log density (B,) of diagonal Gaussians."""
    z = (action - mean) * jnp.exp(-log_std)
    return (-0.5 * jnp.square(z) - log_std - 0.5 * np.log(2 * np.pi)).sum(-1)


def gaussian_kl(old_mean: Array, old_log_std: Array, mean: Array, log_std: Array) -> Array:
    """KL(old || new) (B,) of diagonal Gaussians, in closed form and without an epsilon."""
    squares = jnp.exp(2 * (old_log_std - log_std)) + jnp.square((old_mean - mean) * jnp.exp(-log_std))
    return (log_std - old_log_std + 0.5 * (squares - 1)).sum(-1)


def advantages_gae(rollout: Transition, value, next_value, hyper: Hyperparameters) -> Array:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16) over (T, ...) arrays.

    next_value is V(final_obs): the value of the state that the step really led to, never of the state after an
    auto-reset. Running and truncated steps bootstrap with it, because the robot would have gone on after a time limit.
    After a termination nothing follows and the bootstrap is 0; terminated wins over truncated. Any end stops the sum
    over later steps. An invalid step has advantage 0 and stops the sum too.
    """
    reward, ended = rollout.reward * hyper.reward_scale, rollout.terminated | rollout.truncated
    delta = reward + hyper.gamma * jnp.where(rollout.terminated, 0.0, next_value) - value
    delta = jnp.where(rollout.invalid, 0.0, delta)
    decay = jnp.where(ended | rollout.invalid, 0.0, hyper.gamma * hyper.gae_lambda)

    def step_back(following, row):
        advantage = row[0] + row[1] * following
        return advantage, advantage

    _, advantage = jax.lax.scan(step_back, jnp.zeros_like(delta[0]), (delta, decay), reverse=True)
    return advantage


def collect(setup: Setup, state: AgentState, key: Array) -> tuple[Slot, Transition]:
    """num_steps steps of every environment: the slots afterwards, and all transitions (T, N, ...)."""
    args, spec = setup.args, PartitionSpec("envs")
    step = jax.vmap(functools.partial(autoreset_step, setup.env))
    # No robot talks to another device.
    step = jax.shard_map(step, mesh=setup.mesh, in_specs=spec, out_specs=spec, check_vma=False)

    def rollout_step(slots: Slot, key: Array) -> tuple[Slot, Transition]:
        key_noise, key_reset = jax.random.split(key)
        mean = policy_mean(setup, state.parameters, state.obs_statistics, slots.obs)
        noise = jax.random.normal(key_noise, mean.shape, mean.dtype)
        action = mean + jnp.exp(state.parameters["actor"]["log_std"]) * noise
        return step(slots, action, mean, jax.random.split(key_reset, args.num_envs))

    return jax.lax.scan(rollout_step, state.slots, jax.random.split(key, args.num_steps))


def make_batch(
    setup: Setup, hyper: Hyperparameters, state: AgentState, rollout: Transition, key: Array
) -> tuple[Batch, Statistics]:
    """Values, advantages and targets, normalised and shuffled once: every epoch uses the same minibatches.

    Also returns the return statistics, which are updated only here, before they scale the targets."""
    args = setup.args
    value, next_value = values_of(setup, state, rollout.obs), values_of(setup, state, rollout.final_obs)
    advantage = advantages_gae(rollout, value, next_value, hyper)
    rollout, value, advantage = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (rollout, value, advantage))

    valid, returns = ~rollout.invalid, advantage + value
    statistics = state.return_statistics
    if args.normalize_values:
        statistics = statistics.merge(Statistics.of(returns[:, None], valid))
    if args.normalize_advantages:
        moments = Statistics.of(advantage[:, None], valid)
        advantage = (advantage - moments.mean) / (jnp.sqrt(moments.variance) + 1e-8)
    batch = Batch(
        obs=network_input(args, state.obs_statistics, rollout.obs),
        action=rollout.action,
        mean=rollout.mean,
        log_prob=gaussian_log_prob(rollout.action, rollout.mean, state.parameters["actor"]["log_std"]),
        value=statistics.normalize(value),
        target=statistics.normalize(returns),
        advantage=advantage,
        weight=valid / jnp.maximum(valid.mean(), 1e-8),
    )
    order = jax.random.permutation(key, len(valid)).reshape(args.num_minibatches, -1)
    return jax.tree.map(lambda x: x[order], batch), statistics  # (minibatches, B, ...)


def explained_variance(batch: Batch) -> Array:
    """(): 1 - Var[target - value] / Var[target], over the transitions that were not quarantined."""
    columns = jnp.stack([batch.target - batch.value, batch.target], -1)
    error, spread = Statistics.of(columns.reshape(-1, 2), batch.weight.ravel() > 0).variance
    return 1 - error / jnp.maximum(spread, 1e-8)


def ppo_loss(
    setup: Setup, hyper: Hyperparameters, parameters: dict, batch: Batch, old_log_std: Array
) -> tuple[Array, dict]:
    """Clipped surrogate (Schulman et al. 2017, eq. 7) + value error + bounds penalty - entropy, and their means.

    No value_coef: policy and value function share no weights, their gradients are clipped separately, and Adam ignores
    the scale of a gradient that is not clipped."""
    log_std = parameters["actor"]["log_std"]
    mean = setup.actor.apply(parameters["actor"]["network"], batch.obs)
    value = setup.critic.apply(parameters["critic"]["network"], batch.obs)[:, 0]
    ratio = jnp.exp(gaussian_log_prob(batch.action, mean, log_std) - batch.log_prob)
    clipped_ratio = jnp.clip(ratio, 1 - hyper.clip_coef, 1 + hyper.clip_coef)
    terms = dict(
        policy_loss=-jnp.minimum(batch.advantage * ratio, batch.advantage * clipped_ratio),
        value_loss=0.5 * jnp.square(value - batch.target),
        bounds_loss=jnp.square(jnp.maximum(jnp.abs(mean) - 1.1, 0.0)).sum(-1),
        kl=gaussian_kl(batch.mean, old_log_std, mean, log_std),
        clip_fraction=jnp.abs(ratio - 1) > hyper.clip_coef,
    )
    terms = {name: (term * batch.weight).mean() for name, term in terms.items()}
    terms["entropy"] = (log_std + 0.5 * np.log(2 * np.pi * np.e)).sum()
    loss = terms["policy_loss"] + terms["value_loss"]
    loss += hyper.bounds_coef * terms["bounds_loss"] - hyper.entropy_coef * terms["entropy"]
    return loss, terms


def scheduled_learning_rate(setup: Setup, hyper: Hyperparameters, state: AgentState, kl: Array, moved: Array) -> Array:
    """Adaptive: 1.5 times less where the KL is over twice the desired one, 1.5 times more where it is under half of it.

    moved: () bool, false before the first gradient step of an iteration, when the KL is 0 and says nothing."""
    progress = state.iteration / setup.iterations
    if setup.args.learning_rate_schedule == "constant":
        return hyper.learning_rate
    if setup.args.learning_rate_schedule == "linear":
        return hyper.learning_rate * (1 - progress)
    first, last = hyper.desired_kl
    desired_kl = first + (last - first) * progress
    factor = jnp.where(kl > 2 * desired_kl, 1 / 1.5, jnp.where(kl < 0.5 * desired_kl, 1.5, 1.0))
    adapted = jnp.clip(state.learning_rate * factor, 1e-5, hyper.learning_rate_max)
    return jnp.where(moved, adapted, state.learning_rate)


def update(setup: Setup, hyper: Hyperparameters, state: AgentState, batch: Batch) -> tuple[AgentState, dict]:
    """All gradient steps on a batch (minibatches, B, ...); the loss terms of each.

    A step clips both networks' gradients separately, and keeps the deviation of the policy above its floor."""
    args, old_log_std = setup.args, state.parameters["actor"]["log_std"]
    loss_and_gradients = jax.value_and_grad(ppo_loss, argnums=2, has_aux=True)

    def gradient_step(state: AgentState, step: Array) -> tuple[AgentState, dict]:
        minibatch = jax.tree.map(lambda x: x[step % args.num_minibatches], batch)
        (_, terms), gradients = loss_and_gradients(setup, hyper, state.parameters, minibatch, old_log_std)
        for name, gradient in gradients.items():
            norm = jnp.sqrt(sum(jnp.square(g).sum() for g in jax.tree.leaves(gradient)))
            scale = jnp.minimum(1.0, hyper.max_grad_norm / (norm + 1e-6))
            gradients[name] = jax.tree.map(lambda g, scale=scale: g * scale, gradient)
        direction, adam_state = ADAM.update(gradients, state.adam)
        learning_rate = scheduled_learning_rate(setup, hyper, state, terms["kl"], moved=step > 0)
        parameters = jax.tree.map(lambda p, d: p - learning_rate * d, state.parameters, direction)
        parameters["actor"]["log_std"] = jnp.maximum(parameters["actor"]["log_std"], hyper.log_std_min)
        return state._replace(parameters=parameters, adam=adam_state, learning_rate=learning_rate), terms

    return jax.lax.scan(gradient_step, state, jnp.arange(args.update_epochs * args.num_minibatches))


def iterate(setup: Setup, hyper: Hyperparameters, state: AgentState) -> tuple[AgentState, dict]:
    """Rollout, targets, update; also sums and means for the log."""
    args, (key, key_collect, key_batch) = setup.args, jax.random.split(state.key, 3)
    with jax.named_scope("rollout"):
        slots, rollout = collect(setup, state, key_collect)
    with jax.named_scope("targets"):
        batch, return_statistics = make_batch(setup, hyper, state, rollout, key_batch)
    state = state._replace(slots=slots, return_statistics=return_statistics, key=key)
    with jax.named_scope("update"):
        state, terms = update(setup, hyper, state, batch)
    obs_statistics = state.obs_statistics
    if args.normalize_observations:  # after the update, so that old and new policy see equal inputs
        rows = rollout.obs.reshape(-1, rollout.obs.shape[-1])
        obs_statistics = obs_statistics.merge(Statistics.of(rows, ~rollout.invalid.ravel()))

    # Log. An episode that began at a random age is shorter than the others, so it is left out.
    ended = (rollout.terminated | rollout.truncated) & (rollout.age == rollout.length)
    metrics = {name: term.mean() for name, term in terms.items()} | dict(
        episodes=ended.sum(),
        success=(ended & ~rollout.terminated).sum(),
        episode_return=jnp.where(ended, rollout.episode_return, 0.0).sum(),
        episode_length=(rollout.length * ended).sum(),
        invalid=rollout.invalid.sum(),
        learning_rate=state.learning_rate,
        action_std=jnp.exp(state.parameters["actor"]["log_std"]).mean(),
        explained_variance=explained_variance(batch),
    )
    return state._replace(obs_statistics=obs_statistics, iteration=state.iteration + 1), metrics


def advance(setup: Setup, hyper: Hyperparameters, state: AgentState, iterations: Array) -> tuple[AgentState, dict]:
    """Run `iterations` iterations without the host; the metrics are summed over them."""

    def body(_, carry):
        state, sums = carry
        state, metrics = iterate(setup, hyper, state)
        return state, jax.tree.map(jnp.add, sums, metrics)

    shapes = jax.eval_shape(functools.partial(iterate, setup), hyper, state)[1]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.fori_loop(0, iterations, body, (state, zeros))


# ----------------------------------------------------------------------------------------------------------------------
# Around a training: devices, signals, checkpoint, log
# ----------------------------------------------------------------------------------------------------------------------


def configure(args: Args) -> list[jax.Device]:
    """Set JAX's options; return all devices of the wanted kind. The first one runs all that is not sharded."""
    # NVIDIA GPUs since Ampere would round the inputs of matrix products to TF32's 10 bits, which ruins the physics.
    jax.config.update("jax_default_matmul_precision", "highest")
    if args.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", str(Path(args.compilation_cache).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    try:
        devices = jax.devices(None if args.device == "auto" else args.device)
    except RuntimeError:
        raise InputError(f"device = {args.device}: JAX sees none here; use --device auto") from None
    jax.config.update("jax_default_device", devices[0])
    return devices


def versions() -> dict[str, str]:
    names = "jax jaxlib flax optax mujoco mujoco-mjx gymnasium numpy".split()
    return {"python": sys.version.split()[0]} | {name: metadata.version(name) for name in names}


def named_arrays(state: AgentState) -> dict[str, Array]:
    """Every array of the state, (agents, ...), by its path: parameters/actor/log_std."""
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree.leaves_with_path(state)}


def save_checkpoint(path: Path, args: Args, state: AgentState, counters: dict):
    """One .npz: the arrays of the state by name, and a header in JSON. A failed write leaves the old file as it was."""
    header = dict(algorithm="ppo_mjx", env_id=args.env_id, args=dataclasses.asdict(args), versions=versions())
    unfinished = path.with_name("unfinished.npz")
    np.savez(unfinished, header=json.dumps(header | counters), **named_arrays(state))
    unfinished.replace(path)


def load_checkpoint(path: str) -> dict:
    """The header of a checkpoint, and its `arrays`. InputError if it is damaged, or not of this script."""
    try:
        with np.load(path) as file:
            arrays = dict(file)  # this compares the checksums
        checkpoint = json.loads(str(arrays.pop("header"))) | dict(arrays=arrays)
        args = {name: tuple(x) if isinstance(x, list) else x for name, x in checkpoint["args"].items()}
        Args(**args)  # TypeError for a flag of another version
    except Exception as error:  # NumPy raises many types
        raise InputError(f"checkpoint {path} cannot be read: {type(error).__name__}: {error}") from None
    return checkpoint | dict(args=args)


def check_resumable(checkpoint: dict, args: Args):
    """Refuse flags that do not fit the run of a checkpoint."""
    kept = "env_id env_kwargs num_envs num_steps num_seeds sweep sweep_values seed actor_hidden critic_hidden"
    for name in f"{kept} log_std_init normalize_observations normalize_values".split():
        old, new = checkpoint["args"][name], getattr(args, name)
        require(old == new, f"the checkpoint was trained with {name} = {old}, not {new}; omit that flag")
    done = checkpoint["env_steps"]
    require(done < args.total_timesteps, f"the checkpoint already has {done:,} steps; give a larger --total-timesteps")


def pick_run_dir(args: Args) -> Path:
    """The folder of this run. Only a resumed run may continue in a folder that has a run: its own."""
    resumed = args.resume and Path(args.resume).parent
    new = f"runs/{args.env_id}__ppo_mjx__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = Path(args.run_dir or resumed or new)
    if (run_dir / "metrics.jsonl").exists() and not (resumed and run_dir.samefile(resumed)):
        raise InputError(f"run_dir = {run_dir} contains a run; choose another, or --resume its checkpoint.npz")
    return run_dir


class RunLog:
    """Progress bar, metrics.jsonl, TensorBoard and W&B of one run."""

    def __init__(self, run_dir: Path, args: Args, first_step: int):
        config = dataclasses.asdict(args)
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.json").write_text(json.dumps(config, indent=2))
        self.metrics = run_dir / "metrics.jsonl"
        if self.metrics.exists():  # drop what will be logged again, and the half line that a killed run may leave
            lines = self.metrics.read_bytes().splitlines(keepends=True)
            kept = [x for x in lines if x.endswith(b"\n") and json.loads(x)["env_steps"] <= first_step]
            os.truncate(self.metrics, sum(map(len, kept)))
        if args.track:
            import wandb

            wandb.init(project="onefile-gpu-rl", name=run_dir.name, config=config, sync_tensorboard=True)
        self.tensorboard = Writer(str(run_dir))
        self.bar = tqdm(total=args.total_timesteps, initial=first_step, unit=" steps", unit_scale=True)

    def write(self, record: dict):
        """record: numbers, None where no episode ended, and lists over agents, which only metrics.jsonl holds."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(record) + "\n")
        for name, value in record.items():
            if isinstance(value, (int, float)):
                self.tensorboard.add_scalar(name, value, record["env_steps"])
        episode_return = record["episode_return"]
        shown = "no whole episode" if episode_return is None else f"return {episode_return:.1f}"
        self.bar.set_postfix_str(shown, refresh=False)
        self.bar.update(record["env_steps"] - self.bar.n)

    def close(self):
        self.bar.close()
        self.tensorboard.close()


def metrics_record(sums: dict, iterations: int, counters: dict, steps_per_second: float) -> dict:
    """Sums over an interval, (agents,) each -> means over agents and iterations; None where there is nothing finite.

    env_steps are those of each agent, steps_per_second those of all together."""
    sums = {name: np.asarray(x, np.float64) for name, x in sums.items()}  # host sync
    episodes, invalid = sums.pop("episodes"), sums.pop("invalid")
    record = dict(env_steps=counters["env_steps"], wall_seconds=counters["train_seconds"])
    record |= dict(steps_per_second=steps_per_second, episodes=int(episodes.sum()), invalid=int(invalid.sum()))
    for name in ("episode_return", "episode_length", "success"):
        total = sums.pop(name)
        record[name] = total.sum() / episodes.sum() if record["episodes"] else None
        if name == "episode_return" and len(episodes) > 1:
            record["agent_episode_return"] = [x / n if n else None for x, n in zip(total, episodes)]
    for name, total in sums.items():
        finite = total[np.isfinite(total)]  # an agent that diverged does not hide the others
        record[name] = finite.mean() / iterations if len(finite) else None
    return record


def plot_curve(run_dir: Path, title: str):
    """curve.png from metrics.jsonl: training returns over environment steps, a line for each agent."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    returns = [row.get("agent_episode_return", [row["episode_return"]]) for row in rows]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["env_steps"] for row in rows], np.array(returns, dtype=float))  # None becomes NaN
    axes.set(title=title, xlabel="environment steps", ylabel="episode return while training")
    axes.grid(alpha=0.3)
    figure.savefig(run_dir / "curve.png", dpi=120)


# ----------------------------------------------------------------------------------------------------------------------
# Policy and evaluation
# ----------------------------------------------------------------------------------------------------------------------


def load_policy(checkpoint: dict, agent: int = 0) -> Callable:
    """act(obs (N, observation), started) -> action (N, actions) of a checkpoint's agent, in the units of Gymnasium.

    It is deterministic, with NumPy in and out. `started` is ignored: the policy has no memory."""
    args, agents = Args(**checkpoint["args"]), len(checkpoint["arrays"]["learning_rate"])
    require(agent < agents, f"agent = {agent}: the checkpoint holds {agents}, numbered from 0")
    saved = unflatten_dict({name: x[agent] for name, x in checkpoint["arrays"].items()}, sep="/")
    space = gymnasium.make(args.env_id, **args.env_kwargs).action_space
    actor, network = MLP(args.actor_hidden, space.shape[0], 0.01), saved["parameters"]["actor"]["network"]
    statistics = Statistics(**saved["obs_statistics"])

    @jax.jit
    def policy(obs: Array) -> Array:
        return to_env(space.low, space.high, actor.apply(network, network_input(args, statistics, obs)))

    return lambda obs, started=None: np.array(policy(np.asarray(obs, np.float32)))


def score(envs: gymnasium.vector.VectorEnv, act: Callable, seed: int) -> dict | None:
    """Statistics of the first episode of each environment; None for a policy that diverged."""
    obs, _ = envs.reset(seed=seed)
    returns, lengths, running = np.zeros(envs.num_envs), np.zeros(envs.num_envs, int), np.ones(envs.num_envs, bool)
    while running.any():
        action = act(obs)
        if not np.isfinite(action).all():
            return None
        obs, reward, terminated, truncated, _ = envs.step(action)
        returns += reward * running
        lengths += running
        running &= ~(terminated | truncated)
    envs.close()
    moments = dict(mean=float(returns.mean()), std=float(returns.std()), min=float(returns.min()))
    return moments | dict(episodes=len(returns), mean_length=float(lengths.mean()))


def evaluate(args: Args, checkpoint: dict) -> list[dict]:
    """Score every agent of a checkpoint in Gymnasium's own environment, and print the scores."""
    agents, values = [], args.sweep_values or (None,)
    for k, seed in enumerate(hyperparameters(args)[1]):
        envs = gymnasium.make_vec(args.env_id, args.eval_episodes, **args.env_kwargs)
        found = score(envs, load_policy(checkpoint, k), int(seed))
        agents.append(dict(seed=int(seed), value=values[k // args.num_seeds], gymnasium=found))
        value = f", {args.sweep} {agents[-1]['value']:g}" if args.sweep else ""
        shown = "{mean:.1f} ± {std:.1f} (worst {min:.1f})".format(**found) if found else "no score: it diverged"
        tqdm.write(f"{args.env_id} in Gymnasium, seed {seed}{value}: {shown}")
    return agents


def film(args: Args, act: Callable, path: Path):
    """One deterministic episode of Gymnasium's own environment as an MP4 file."""
    import imageio.v2 as imageio

    if "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")  # headless; use osmesa where EGL is missing
    # "track" follows the robot; Gymnasium uses its free camera where the model has no camera of this name.
    envs = gymnasium.make_vec(args.env_id, 1, render_mode="rgb_array", camera_name="track", **args.env_kwargs)
    frames = []

    def draw_and_act(obs: np.ndarray) -> np.ndarray:
        frames.append(envs.render()[0])
        return act(obs)

    score(envs, draw_and_act, args.seed)
    imageio.mimwrite(path, frames, fps=envs.metadata["render_fps"], macro_block_size=8)


# ----------------------------------------------------------------------------------------------------------------------
# Train and play
# ----------------------------------------------------------------------------------------------------------------------


def train(args: Args, env: Environment | None = None) -> dict:
    """The whole run; returns the content of eval.json. `env` replaces the task by your own, which is not evaluated."""
    # Set-up
    check_flags(args)
    devices, run_dir = configure(args), pick_run_dir(args)
    counters = dict(env_steps=0, train_seconds=0.0, compile_seconds=0.0)
    checkpoint = load_checkpoint(args.resume) if args.resume else None
    if checkpoint:
        check_resumable(checkpoint, args)
        counters = {name: checkpoint[name] for name in counters}
    setup = make_setup(env or make_environment(make_task(args)), args, devices)
    hyper, seeds = hyperparameters(args)
    steps_per_iteration = args.num_envs * args.num_steps
    print(f"{args.env_id} on {setup.mesh.size} device(s), into {run_dir}: {len(seeds)} agent(s), "
          f"{args.num_envs:,} environments x {args.num_steps} steps = {steps_per_iteration:,} samples, "
          f"{setup.iterations:,} times; {args.update_epochs} epochs x {args.num_minibatches} minibatches\n"
          "compiling; this takes one to four minutes the first time", flush=True)  # fmt: skip
    log = RunLog(run_dir, args, counters["env_steps"])

    # Compile
    started = time.perf_counter()
    create = jax.vmap(functools.partial(initialise, setup))
    shapes = jax.eval_shape(create, hyper, seeds)
    # The environments (agents, N, ...) are split over the devices; all else is on every device.
    split, whole = (NamedSharding(setup.mesh, spec) for spec in (PartitionSpec(None, "envs"), PartitionSpec()))
    placement = jax.tree.map(lambda _: whole, shapes)._replace(slots=jax.tree.map(lambda _: split, shapes.slots))
    if checkpoint:
        arrays = [checkpoint["arrays"][name] for name in named_arrays(shapes)]
        state = jax.tree.unflatten(jax.tree.structure(shapes), arrays)
        if args.learning_rate != checkpoint["args"]["learning_rate"]:  # a new rate replaces the adapted one
            state = state._replace(learning_rate=hyper.learning_rate)
        state = jax.device_put(state, placement)
    else:
        state = jax.jit(create, out_shardings=placement)(hyper, seeds)
    run = jax.vmap(functools.partial(advance, setup), in_axes=(0, 0, None))
    run = jax.jit(run, in_shardings=(whole, placement, whole), out_shardings=(placement, whole))
    run = run.lower(hyper, state, np.int32(1)).compile()
    counters["compile_seconds"] += time.perf_counter() - started

    # Train: the program runs until the host has something to do
    path, first = run_dir / "checkpoint.npz", counters["env_steps"] // steps_per_iteration
    log_every = args.log_every or max(1, args.total_timesteps // 200)
    checkpoint_every = args.checkpoint_every or max(1, args.total_timesteps // 10)
    stretch = -(-min(log_every, checkpoint_every, args.eval_every or log_every) // steps_per_iteration)
    agents = []
    try:
        for done in range(first, setup.iterations, stretch):
            iterations = min(stretch, setup.iterations - done)
            started = time.perf_counter()
            state, sums = run(hyper, state, np.int32(iterations))
            jax.block_until_ready(state)  # host sync
            seconds = time.perf_counter() - started
            before, after = done * steps_per_iteration, (done + iterations) * steps_per_iteration
            counters |= dict(env_steps=after, train_seconds=counters["train_seconds"] + seconds)
            record = metrics_record(sums, iterations, counters, len(seeds) * (after - before) / seconds)
            if None in (record[name] for name in ("policy_loss", "value_loss", "kl")):  # of every agent
                raise FloatingPointError(f"training diverged by {after:,} steps: {record}")
            last, crossed = done + iterations == setup.iterations, lambda every: after // every > before // every
            evaluate_now = args.eval_every and not env and (last or crossed(args.eval_every))
            if last or evaluate_now or crossed(checkpoint_every):
                save_checkpoint(path, args, state, counters)
            if evaluate_now:
                agents = evaluate(args, load_checkpoint(path))
                means = [agent["gymnasium"]["mean"] for agent in agents if agent["gymnasium"]]
                record["gymnasium_return"] = float(np.mean(means)) if means else None
            log.write(record)
    except KeyboardInterrupt:  # Ctrl-C or SIGTERM; it comes when the program has returned to Python
        after = int(state.iteration[0]) * steps_per_iteration
        if after > counters["env_steps"]:  # it came while a stretch was running
            seconds = time.perf_counter() - started
            counters |= dict(env_steps=after, train_seconds=counters["train_seconds"] + seconds)
            speed = len(seeds) * iterations * steps_per_iteration / seconds
            log.write(metrics_record(sums, iterations, counters, speed))
        save_checkpoint(path, args, state, counters)
        message = f"stopped after {counters['env_steps']:,} steps; continue with --resume {path}"
        raise KeyboardInterrupt(message) from None
    finally:
        log.close()

    # Evaluate
    plot_curve(run_dir, f"{args.env_id}, {len(seeds)} agent(s)")
    print(f"trained {counters['env_steps']:,} steps in {counters['train_seconds']:.1f} s, "
          f"compiled in {counters['compile_seconds']:.1f} s")  # fmt: skip
    if args.eval_episodes and not env and not agents:
        agents = evaluate(args, load_checkpoint(path))
    scored = sorted((x for x in agents if x["gymnasium"]), key=lambda agent: agent["gymnasium"]["mean"])
    median = scored[(len(scored) - 1) // 2] if scored else dict(seed=args.seed, gymnasium=None)
    result = dict(env_id=args.env_id, algorithm="ppo_mjx", **median, **counters, versions=versions())
    result |= dict(agents=agents) if len(agents) > 1 else {}
    (run_dir / "eval.json").write_text(json.dumps(result, indent=2))
    return result


def play(args: Args) -> list[dict]:
    """Score the agents of a checkpoint. With capture_video also film one episode of the best of them."""
    check_flags(args)
    configure(args)
    checkpoint = load_checkpoint(args.play)
    require(args.eval_episodes >= 1, "--play needs episodes; use --eval-episodes 20")
    agents = evaluate(args, checkpoint)
    if args.capture_video:
        means = [agent["gymnasium"]["mean"] if agent["gymnasium"] else -np.inf for agent in agents]
        path = Path(args.play).with_name("play.mp4")
        film(args, load_policy(checkpoint, int(np.argmax(means))), path)
        print(f"video: {path}")
    return agents


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: it raises KeyboardInterrupt
    try:
        args = parse_args(sys.argv[1:])
        command = play if args.play else train
        command(args)
    except (InputError, OSError, FloatingPointError) as error:  # a mistake, a full disk, or a training that diverged
        tqdm.write(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "stopped")
        return 128 + signal.SIGINT  # as shells report a process that a signal ended
    return 0


if __name__ == "__main__":
    sys.exit(main())
