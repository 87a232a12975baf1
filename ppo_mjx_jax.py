"""PPO on MuJoCo MJX: from physics to gradient one compiled JAX program, for one agent or for many at once. Copy me.

    python ppo_mjx_jax.py                                                   InvertedPendulum-v5 to 1000
    python ppo_mjx_jax.py --num-seeds 8                                     eight agents in one program
    python ppo_mjx_jax.py --sweep learning_rate=1e-4,3e-4,1e-3 --num-seeds 3 --learning-rate-schedule constant
    python ppo_mjx_jax.py --env-id HalfCheetah-v5 --num-envs 256 --num-steps 64 --total-timesteps 3000000
    python ppo_mjx_jax.py --env-id Ant-v5 --num-envs 4096                   on a GPU
    python ppo_mjx_jax.py --resume runs/NAME/checkpoint.npz --total-timesteps 40000000
    python ppo_mjx_jax.py --play runs/NAME/checkpoint.npz --capture-video   score a checkpoint, film one episode
    python ppo_mjx_jax.py --env-id Ant-v5 --benchmark ant.json              physics steps/s, and error against MuJoCo C

The first command ends at 1000 in Gymnasium's own environment in all of 20 episodes, in 2 s of training and 24 s of compilation on one
AMD EPYC core; a test runs it. What else has been measured is in results/mjx/, each file with its versions and hardware.

The whole iteration is one program: MJX steps, resets to fresh random states, rollout, advantages, epochs over minibatches, learning
rate, log sums. `train` calls it for as many iterations as pass before the host must log, evaluate or save. An agent is a pure function of its
hyperparameters and seed, so `vmap` makes it many.

The tasks are Gymnasium's own: model and options from gymnasium.make, observation, reward and termination as in its source. The physics
is MuJoCo's: with a converged solver in float64 a step equals MuJoCo C's to 1e-9. MJX alone does not: it chooses another friction
pyramid for near-vertical capsules (`align_capsules` mends it) and its RK4 adds rotations up like vectors (`runge_kutta`, `pull_back`).
Training defaults are cheaper: Euler where the MJCF asks for RK4, 4 Newton iterations, 2 line-search steps, no self-collision, float32.
--benchmark prints what they cost: qacc_error is float32 and few iterations alone, step_error is everything, against Gymnasium's own
model. A policy that they fool shows in the score, which is taken in MuJoCo C with the MJCF's settings.

Sources: Schulman et al. 2016 (GAE, eq. 16) and 2017 (PPO, eq. 7); Pardo et al. 2018 (time limits); rsl_rl's adaptive learning rate
(Rudin et al. 2022); PureJaxRL's idea of training as one function (Lu et al. 2022). The PyTorch twin with the same flags, defaults and
algorithm is ppo_gpu_torch.py; this file imports no other.

Read in this order: arguments, physics, tasks, auto-reset, networks, algorithm, evaluation, log, train.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import dataclasses
import functools
import importlib.util
import inspect
import io
import json
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

# XLA's pool on a CPU has a thread for each core. Each of MJX's batched Cholesky factorisations holds one while it waits for tasks
# queued behind it, so as many at once as there are cores wait for ever (seen with jaxlib 0.10.2 on two; one core runs them inline).
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
if 1 < cores < 16:
    os.environ.setdefault("NPROC", "16")  # XLA reads it once, when JAX first computes

import flax.linen as nn
import gymnasium
import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import optax
import tyro
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from mujoco import mjx
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tqdm import tqdm

try:
    from jax import shard_map

    shard_map = functools.partial(shard_map, check_vma=False)
except ImportError:  # before jax 0.6
    from jax.experimental.shard_map import shard_map

    shard_map = functools.partial(shard_map, check_rep=False)



def show_mujoco_warning(text: str) -> None:
    """MuJoCo's warnings as lines on standard error, and not in a MUJOCO_LOG.TXT of the working folder too. One is left out: Gymnasium's
    half_cheetah.xml raises it whenever it is compiled, and nobody here can act on it. Holds for the whole process."""
    if "settotalmass" not in text:
        print(f"MuJoCo: {text.strip()}", file=sys.stderr)


mujoco.set_mju_user_warning(show_mujoco_warning)

# ------------------------------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Args:
    """Flags of a run. None means the value of the task's row in TASK_DEFAULTS, else of COMMON, unless the help says otherwise.
    total_timesteps and every *_every count environment steps over all environments, of each agent."""

    env_id: str = "InvertedPendulum-v5"
    """task: one of TASK_DEFAULTS, Gymnasium's own"""
    num_envs: int | None = None
    """environments stepped in parallel by each agent, over all devices (>= 1)"""
    total_timesteps: int | None = None
    """environment steps of the whole run, of each agent (>= 1; rounded up to whole iterations)"""
    seed: int = 1
    """seed of weights, environments and noise (0 to 2,000,000,000)"""
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
    eval_every: int | None = None
    """environment steps between evaluations in Gymnasium during training (>= 1; default: only the final one); their time is not counted"""
    play: str | None = None
    """checkpoint to play deterministically instead of training; prints its score"""
    capture_video: bool = False
    """with --play: write one episode, rendered by Gymnasium, beside the checkpoint (needs `pip install imageio[ffmpeg]`); of many agents the best"""
    track: bool = False
    """mirror the metrics to Weights & Biases (needs `pip install wandb`)"""
    profile: bool = False
    """before the training, time the parts of an iteration, each as a program of its own, and trace one whole iteration: profile.json and trace.json.gz in the run folder, and a printed table"""

    # many agents in one program
    num_seeds: int = 1
    """independent agents, with seeds seed, seed + 1, ... (>= 1)"""
    sweep: str | None = None
    """NAME=V1,V2,...: train every agent once with each value of this scalar hyperparameter (the fields of Hyperparameters)"""
    distributed: bool = False
    """share the environments with the other processes of this job, one per host; found through Slurm, Open MPI, Kubernetes or a TPU pod,
    elsewhere by JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID"""
    compilation_cache: str = "~/.cache/onefile-gpu-rl/jax"
    """folder that keeps compiled programs between runs ("" keeps none)"""

    # the environment
    env_kwargs: dict[str, bool | int | float | str] | None = None
    """task options, pairs of name and value, on top of those in the task's row; those of Gymnasium's constructor"""
    integrator: Literal["euler", "implicitfast", "rk4", "mjcf"] | None = None
    """integrator of the training physics (mjcf: the one that Gymnasium's own environment uses)"""
    solver_iterations: int | None = None
    """Newton iterations of the contact solver, at most (>= 1)"""
    ls_iterations: int = 2
    """line-search steps of each Newton iteration, at most (>= 1)"""
    self_collision: bool = False
    """let the robot's own limbs collide (Hopper and Humanoid; contact with the ground is always on)"""
    impl: Literal["jax", "warp"] = "jax"
    """MJX's backend; warp needs an NVIDIA GPU, `pip install warp-lang` and self_collision"""
    random_initial_ages: bool = True
    """start the first episodes at random ages, so that thousands of robots do not time out together; the log leaves these
    episodes out"""
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
    """adaptive schedule: desired_kl moves linearly to this value over the run (> 0; default: desired_kl, also where only --desired-kl is given for a task whose row has both)"""
    learning_rate_min: float = 1e-5
    """adaptive schedule: lower bound (> 0)"""
    learning_rate_max: float | None = None
    """adaptive schedule: upper bound (>= learning_rate_min)"""


# One row of values per task; a task without a row (or a value missing from its row) takes COMMON's.
COMMON = dict(
    num_envs=1024, total_timesteps=20_000_000, env_kwargs={}, integrator="euler", solver_iterations=4, reward_scale=1.0,
    num_steps=16, update_epochs=4, num_minibatches=8, actor_hidden=(256, 128, 64), critic_hidden=(256, 128, 64),
    log_std_init=0.0, log_std_min=-2.3, gamma=0.99, gae_lambda=0.95, entropy_coef=0.0, bounds_coef=1e-4,
    learning_rate=1e-3, learning_rate_max=5e-3, desired_kl=0.01,
)  # fmt: skip
TASK_DEFAULTS = {
    "InvertedPendulum-v5": dict(
        num_envs=512, num_minibatches=4, total_timesteps=250_000, actor_hidden=(64, 64), critic_hidden=(64, 64)),
    "Hopper-v5": dict(total_timesteps=6_000_000, gamma=0.995, bounds_coef=0.01, learning_rate_max=1e-3),
    "Walker2d-v5": dict(total_timesteps=6_000_000, gamma=0.995, num_steps=32, num_minibatches=16),
    "HalfCheetah-v5": dict(total_timesteps=5_000_000),
    "Ant-v5": dict(
        total_timesteps=9_000_000, env_kwargs={"include_cfrc_ext_in_observation": False}, gamma=0.98, gae_lambda=0.9,
        log_std_init=-0.7, log_std_min=-1.7, desired_kl=0.015, desired_kl_final=0.009),
    "Humanoid-v5": dict(total_timesteps=4_500_000, env_kwargs={
        "include_cinert_in_observation": False, "include_cvel_in_observation": False,
        "include_qfrc_actuator_in_observation": False, "include_cfrc_ext_in_observation": False}),
}  # fmt: skip


PROFILED = 3, 10  # runs of each part before --profile starts to time, and runs timed


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


class InputError(ValueError):
    """What a user typed breaks a rule: one line, exit status 2."""


def require(condition: bool, rule: str):
    if not condition:
        raise InputError(rule)


def resolve(args: Args) -> Args:
    """Fill the flags left at None, from the task's row or from other flags, then check every value before anything is allocated."""
    require(args.env_id in TASK_DEFAULTS, f"env_id {args.env_id!r} is unknown; use one of {', '.join(TASK_DEFAULTS)}")
    row = COMMON | TASK_DEFAULTS[args.env_id]
    swept, values = parse_sweep(args.sweep)
    if args.desired_kl is not None or swept == "desired_kl":  # a row's last value goes with its first
        row.pop("desired_kl_final", None)
    filled = {name: value for name, value in row.items() if getattr(args, name) is None}
    filled["env_kwargs"] = row["env_kwargs"] | (args.env_kwargs or {})  # options given go on top of the row's
    args = dataclasses.replace(args, **filled)
    run_name = f"{args.env_id}__ppo_mjx__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    derived = dict(
        run_dir=str(Path(args.resume).parent) if args.resume else f"runs/{run_name}",
        desired_kl_final=None if swept == "desired_kl" else args.desired_kl,  # None: each agent's own
        checkpoint_every=max(1, args.total_timesteps // 10),
        log_every=max(1, args.total_timesteps // 200),
    )
    args = dataclasses.replace(args, **{name: value for name, value in derived.items() if getattr(args, name) is None})
    words = {"true": True, "false": False}
    args.env_kwargs = {name: words.get(str(value).lower(), value) for name, value in args.env_kwargs.items()}
    check(args)
    for value in values if swept else []:
        check(dataclasses.replace(args, **{swept: value}))
    return args


def check(args: Args):
    """Refuse what breaks a rule, with the rule."""
    counts = "num_envs total_timesteps num_seeds num_steps update_epochs num_minibatches solver_iterations ls_iterations"
    positive = "reward_scale learning_rate desired_kl learning_rate_min learning_rate_max"
    lowest, highest = args.learning_rate_min, args.learning_rate_max
    rules = (  # flags, what is legal, and how to say it
        (f"{counts} checkpoint_every log_every", lambda x: x >= 1, ">= 1"),
        ("eval_every", lambda x: x is None or x >= 1, ">= 1"),
        ("seed eval_episodes", lambda x: x >= 0, ">= 0"),
        ("seed", lambda x: x <= 2_000_000_000, "at most 2,000,000,000, because JAX seeds with 32 bits"),
        ("run_dir resume play benchmark", lambda x: x != "", "a path that is not empty; omit the flag for its default"),
        ("entropy_coef bounds_coef", lambda x: 0 <= x < np.inf, ">= 0 and finite"),
        ("clip_coef max_grad_norm", lambda x: x > 0, "> 0"),
        (positive, lambda x: 0 < x < np.inf, "> 0 and finite"),
        ("desired_kl_final", lambda x: x is None or 0 < x < np.inf, "> 0 and finite"),
        ("log_std_init", np.isfinite, "finite"),
        ("gamma gae_lambda", lambda x: 0 <= x <= 1, "between 0 and 1"),
        ("actor_hidden critic_hidden", lambda x: all(size >= 1 for size in x), "made of sizes >= 1"),
        ("learning_rate_max", lambda x: x >= lowest, f">= learning_rate_min = {lowest:g}"),
        ("log_std_min", lambda x: x <= args.log_std_init, f"<= log_std_init = {args.log_std_init:g}"),
        ("device", lambda x: x in ("auto", "cpu", "cuda"), "auto, cpu or cuda"),
    )  # fmt: skip
    for names, legal, rule in rules:
        for name in names.split():
            require(legal(getattr(args, name)), f"{name} = {getattr(args, name)} must be {rule}")
    require(args.learning_rate_schedule != "adaptive" or lowest <= args.learning_rate <= highest,
            f"learning_rate = {args.learning_rate:g} must be between learning_rate_min = {lowest:g} and learning_rate_max = {highest:g} "
            "under the adaptive schedule")  # fmt: skip
    require(not args.clip_value_loss or np.isfinite(args.clip_coef),
            "clip_value_loss needs a finite clip_coef; use --clip-coef 0.2 or --no-clip-value-loss")  # fmt: skip
    require(
        args.eval_every is None or args.eval_episodes, "eval_every needs eval_episodes >= 1; use --eval-episodes 20"
    )
    batch, agents = args.num_envs * args.num_steps, args.num_seeds * len(parse_sweep(args.sweep)[1])
    sizes = f"{agents:,} x {args.num_envs:,} x {args.num_steps:,} = {agents * batch:,}"
    rule = f"agents x num_envs x num_steps = {sizes} must be below 2,147,483,648; use fewer environments"
    require(agents * batch < 2**31, rule)
    if batch % args.num_minibatches:
        near, least = 10**6, min(args.num_minibatches, batch)  # a search without end for huge numbers helps nobody
        below = next((n for n in range(least, max(0, least - near), -1) if batch % n == 0), 1)
        above = next((n for n in range(least, min(batch, least + near) + 1) if batch % n == 0), below)
        choices = f"{below} or {above}" if above != below else f"{below}"
        raise InputError(
            f"num_envs x num_steps = {batch:,} does not split into {args.num_minibatches} minibatches; use {choices}"
        )
    require(
        args.impl == "jax" or args.self_collision, "impl=warp runs MuJoCo's own collision filter: add --self-collision"
    )
    needs = (("track", args.track, "wandb"), ("capture_video", args.capture_video, "imageio"),
             ("impl=warp", args.impl == "warp", "warp-lang"))  # fmt: skip
    for flag, wanted, package in needs:
        module = package.removesuffix("-lang")
        require(not wanted or importlib.util.find_spec(module),
                f"{flag} needs {package}: run `pip install {package}` or leave that flag away")  # fmt: skip


def parse_sweep(sweep: str | None) -> tuple[str | None, list[float]]:
    """learning_rate=1e-4,3e-4 -> ("learning_rate", [1e-4, 3e-4]); without a sweep one nameless value, so that agents = values x seeds."""
    if sweep is None:
        return None, [0.0]
    name, _, values = sweep.partition("=")
    require(name in Hyperparameters._fields, f"sweep maps one of {', '.join(Hyperparameters._fields)}; not {name!r}")
    try:
        return name, [float(value) for value in values.split(",")]
    except ValueError:
        raise InputError(f"sweep needs NAME=V1,V2,... with numbers, not {sweep!r}") from None


# ------------------------------------------------------------------------------------------------------------------------
# Physics: MuJoCo MJX, one robot (vmap makes it a batch)
# ------------------------------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """One Gymnasium task, on the host: everything that is the same for all robots."""

    env_id: str
    options: dict[str, Any]  # Gymnasium's constructor arguments, defaults included
    mjcf_model: mujoco.MjModel  # as Gymnasium's own environment steps it
    mj_model: mujoco.MjModel  # with the solver settings of the flags
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
        raise InputError(f"env_kwargs: {error}") from None
    signature = inspect.signature(type(env.unwrapped).__init__).parameters.values()
    options = {p.name: p.default for p in signature if p.default is not p.empty} | args.env_kwargs
    require(args.impl == "jax" or jax.default_backend() == "gpu", "impl=warp needs an NVIDIA GPU; use --impl jax")
    require(args.impl == "jax" or not reads_contact_wrenches(options),
            "impl=warp has no contact wrenches: add --env-kwargs contact_cost_weight 0 include_cfrc_ext_in_observation False")  # fmt: skip
    model = copy.copy(env.unwrapped.model)
    integrators = {"euler": "EULER", "implicitfast": "IMPLICITFAST", "rk4": "RK4"}
    if args.integrator != "mjcf":
        model.opt.integrator = getattr(mujoco.mjtIntegrator, "mjINT_" + integrators[args.integrator])
    model.opt.solver = mujoco.mjtSolver.mjSOL_NEWTON  # Humanoid's MJCF asks for PGS, which MJX does not have
    model.opt.jacobian = mujoco.mjtJacobian.mjJAC_DENSE
    model.opt.iterations, model.opt.ls_iterations = args.solver_iterations, args.ls_iterations
    if not args.self_collision:
        is_floor = model.geom_type == mujoco.mjtGeom.mjGEOM_PLANE
        collides = (model.geom_contype | model.geom_conaffinity) != 0
        model.geom_contype[:] = ~is_floor & collides
        model.geom_conaffinity[:] = is_floor & collides
    # Left alone, MJX takes the first device of all hosts.
    place = dict(device=jax.config.jax_default_device or jax.local_devices()[0], impl=args.impl)
    return Task(
        args.env_id, options, env.unwrapped.model, model, mjx.put_model(model, **place), mjx.make_data(model, **place), env.unwrapped.frame_skip,
        env.spec.max_episode_steps, env.observation_space.shape[0], args.impl,
    )  # fmt: skip


def align_capsules(task: Task, data: mjx.Data) -> mjx.Data:
    """Turn the friction pyramid of every plane-capsule contact to the capsule's axis, as MuJoCo C does. (MJX keeps contacts, like
    cinert and cfrc_ext below, in `_impl`; it has no public way to them.)

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
    if task.impl == "warp":
        return mjx.forward(task.model, data)
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

    def stage(carry, fraction):
        (velocity, acceleration), data = carry
        moved = move(task, qpos, fraction * h * velocity)
        data = forward(task, data.replace(qpos=moved, qvel=qvel + fraction * h * acceleration))
        slope = pull_back(task, fraction * h * velocity, data.qvel), data.qacc
        return (slope, data), slope

    first = data.qvel, data.qacc
    (_, data), later = jax.lax.scan(stage, (first, data), jnp.array([0.5, 0.5, 1.0]))
    weights = jnp.array([1.0, 2.0, 2.0, 1.0]) / 6
    velocity, acceleration = (weights @ jnp.vstack([k, ks]) for k, ks in zip(first, later))
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


# ------------------------------------------------------------------------------------------------------------------------
# Tasks: Gymnasium's observations, rewards and terminations, one robot
# ------------------------------------------------------------------------------------------------------------------------


class RobotState(NamedTuple):
    """What must be kept of one robot between two environment steps."""

    qpos: jax.Array  # (nq,) m and rad; a free joint is position then quaternion (w, x, y, z)
    qvel: jax.Array  # (nv,) m/s and rad/s
    qacc_warmstart: jax.Array  # (nv,) where the solver starts
    x_position: jax.Array  # () m: the forward coordinate of which Gymnasium takes the difference, as it last read it


def x_position(task: Task, data: mjx.Data) -> jax.Array:
    """Ant and Humanoid read Cartesian positions, which lag one physics step behind qpos (mj_step does not refresh them)."""
    if task.env_id == "Ant-v5":
        return data.xpos[task.options["main_body"], 0]
    if task.env_id == "Humanoid-v5":
        mass = jnp.asarray(task.mj_model.body_mass)
        return (mass @ data.xipos[:, 0]) / mass.sum()
    return data.qpos[0]


def is_healthy(task: Task, data: mjx.Data) -> jax.Array:
    """() bool. Bounds are open, except Ant's and the pendulum's."""
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


def observe(task: Task, data: mjx.Data) -> jax.Array:
    """(observation,): positions without the root's x (and y), velocities, then the groups that the task's options ask for."""
    options = task.options
    free_root = task.env_id in ("Ant-v5", "Humanoid-v5")
    skipped = (2 if free_root else 1) if options.get("exclude_current_positions_from_observation") else 0
    clipped = task.env_id in ("Hopper-v5", "Walker2d-v5")
    groups = [data.qpos[skipped:], jnp.clip(data.qvel, -10, 10) if clipped else data.qvel]
    if options.get("include_cinert_in_observation"):
        groups.append(data._impl.cinert[1:].ravel())
    if options.get("include_cvel_in_observation"):
        groups.append(data.cvel[1:].ravel())
    if options.get("include_qfrc_actuator_in_observation"):
        groups.append(data.qfrc_actuator[6:])
    if options.get("include_cfrc_ext_in_observation"):
        force = data._impl.cfrc_ext[1:].ravel()
        groups.append(jnp.clip(force, *options["contact_force_range"]) if task.env_id == "Ant-v5" else force)
    return jnp.concatenate(groups)


def contact_cost(task: Task, data: mjx.Data) -> jax.Array:
    """() >= 0, from cfrc_ext: (bodies, 6), the contact wrench on each body about its tree's centre of mass."""
    options, force = task.options, data._impl.cfrc_ext
    if task.env_id == "Ant-v5":
        return options["contact_cost_weight"] * jnp.square(jnp.clip(force, *options["contact_force_range"])).sum()
    return jnp.clip(options["contact_cost_weight"] * jnp.square(force).sum(), *options["contact_cost_range"])


def reward_of(task: Task, data: mjx.Data, action: jax.Array, x_velocity: jax.Array) -> jax.Array:
    """(): forward speed and health, minus control and contact cost."""
    options, healthy = task.options, is_healthy(task, data).astype(x_velocity.dtype)
    if task.env_id == "InvertedPendulum-v5":
        return healthy
    reward = options["forward_reward_weight"] * x_velocity + options.get("healthy_reward", 0.0) * healthy
    reward -= options["ctrl_cost_weight"] * jnp.square(action).sum()
    return reward - contact_cost(task, data) if options.get("contact_cost_weight") else reward


def reads_contact_wrenches(options: dict) -> bool:
    return bool(options.get("contact_cost_weight") or options.get("include_cfrc_ext_in_observation"))


def with_contact_wrenches(task: Task, data: mjx.Data) -> mjx.Data:
    """Fill cfrc_ext where the task reads it."""
    return mjx.rne_postconstraint(task.model, data) if reads_contact_wrenches(task.options) else data


def task_reset(task: Task, key: jax.Array) -> tuple[RobotState, jax.Array]:
    """A fresh random state by the task's own rule, and its observation."""
    options, (key_position, key_velocity) = task.options, jax.random.split(key)
    scale, nv = options["reset_noise_scale"], task.mj_model.nv
    qpos = jnp.asarray(task.mj_model.qpos0, dtype=task.blank.qpos.dtype)
    qpos = qpos + jax.random.uniform(key_position, qpos.shape, qpos.dtype, -scale, scale)
    if task.env_id in ("HalfCheetah-v5", "Ant-v5"):
        qvel = scale * jax.random.normal(key_velocity, (nv,), qpos.dtype)
    else:
        qvel = jax.random.uniform(key_velocity, (nv,), qpos.dtype, -scale, scale)
    return state_at(task, qpos, qvel)


def state_at(task: Task, qpos: jax.Array, qvel: jax.Array) -> tuple[RobotState, jax.Array]:
    """The state with these coordinates, as after Gymnasium's set_state, and its observation."""
    data = forward(task, task.blank.replace(qpos=qpos, qvel=qvel))  # the compiler drops all that is not read
    data = with_contact_wrenches(task, data)
    return RobotState(qpos, qvel, jnp.zeros_like(qvel), x_position(task, data)), observe(task, data)


def data_fields(state: RobotState) -> dict[str, jax.Array]:
    return dict(qpos=state.qpos, qvel=state.qvel, qacc_warmstart=state.qacc_warmstart)


def simulate(task: Task, state: RobotState, action: jax.Array) -> mjx.Data:
    """frame_skip physics steps under one control. MuJoCo clamps it to the control range."""

    def body(data, _):
        later = physics_step(task, data)
        # In float64 MJX widens some integers.
        return jax.tree.map(lambda new, old: new.astype(old.dtype), later, data), None

    data = task.blank.replace(**data_fields(state), ctrl=action)
    return jax.lax.scan(body, data, None, length=task.frame_skip)[0]


def task_step(task: Task, state: RobotState, action: jax.Array) -> tuple[RobotState, jax.Array, jax.Array, jax.Array]:
    """Next state, observation, reward, terminated. `action` is in the units of Gymnasium's action space and, as there, may exceed
    it: the control cost sees the action itself."""
    data = with_contact_wrenches(task, simulate(task, state, action))
    x = x_position(task, data)
    seconds = task.mj_model.opt.timestep * task.frame_skip
    reward = reward_of(task, data, action, (x - state.x_position) / seconds)
    terminated = ~is_healthy(task, data) & task.options.get("terminate_when_unhealthy", True)
    return RobotState(data.qpos, data.qvel, data.qacc_warmstart, x), observe(task, data), reward, terminated


class Environment(NamedTuple):
    """What the learner needs to know of an environment; its functions are pure and describe one robot."""

    reset: Callable  # key -> state, observation (observation,)
    step: Callable  # state, action (actions,) -> state, observation, reward (), terminated () bool
    observation_size: int
    action_low: np.ndarray  # (actions,)
    action_high: np.ndarray  # (actions,)
    max_episode_steps: int


def to_env(env: Environment, action: jax.Array) -> jax.Array:
    """Half ranges, in which the policy acts, to the environment's units: +-1 spans the action space."""
    half_range, centre = (env.action_high - env.action_low) / 2, (env.action_high + env.action_low) / 2
    return (centre + half_range * action).astype(action.dtype)


def make_environment(task: Task) -> Environment:
    low, high = task.mj_model.actuator_ctrlrange.T
    reset, step = functools.partial(task_reset, task), functools.partial(task_step, task)
    return Environment(reset, step, task.observation_size, low, high, task.max_episode_steps)


# ------------------------------------------------------------------------------------------------------------------------
# Auto-reset and quarantine, one robot
# ------------------------------------------------------------------------------------------------------------------------

RUNAWAY = 1e6  # an observation beyond this has left physics


class Slot(NamedTuple):
    """One of the parallel environments: the robot in it and its episode so far."""

    state: Any
    obs: jax.Array  # (observation,)
    age: jax.Array  # () environment steps on the time limit's clock; the first episode may start late
    length: jax.Array  # () environment steps of this episode
    episode_return: jax.Array  # () unscaled


class Transition(NamedTuple):
    """One environment step. In a rollout every field gets the axes (T, N) in front: T = num_steps, N = num_envs."""

    obs: jax.Array  # (observation,)
    final_obs: jax.Array  # (observation,): what the step led to, before any auto-reset
    action: jax.Array  # (actions,), half ranges
    mean: jax.Array  # (actions,), half ranges: the policy's mean when it acted
    reward: jax.Array  # () unscaled
    terminated: jax.Array  # () bool
    truncated: jax.Array  # () bool
    invalid: jax.Array  # () bool: quarantined, masked everywhere
    episode_return: jax.Array  # () return and length of the episode that this step may have ended
    length: jax.Array  # ()
    age: jax.Array  # () larger than length in an episode that began at a random age


def first_slot(env: Environment, random_initial_ages: bool, key: jax.Array) -> Slot:
    key_state, key_age = jax.random.split(key)
    state, obs = env.reset(key_state)
    age = jax.random.randint(key_age, (), 0, env.max_episode_steps) if random_initial_ages else jnp.array(0)
    return Slot(state, obs, age, jnp.array(0), jnp.zeros((), obs.dtype))


def autoreset_step(
    env: Environment, slot: Slot, action: jax.Array, mean: jax.Array, key: jax.Array
) -> tuple[Slot, Transition]:
    """Step one environment and, where its episode ended, start the next from a state drawn here and now.

    An environment that is not finite or has run away is quarantined: it is reset, and its transition is marked invalid, which no
    learner or statistic reads. final_obs is then the fresh observation, so that nothing downstream meets a NaN.
    """
    state, obs, reward, terminated = env.step(slot.state, to_env(env, action))
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


# ------------------------------------------------------------------------------------------------------------------------
# Networks
# ------------------------------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    """ELU layers, orthogonal weights, zero biases."""

    hidden: tuple[int, ...]
    outputs: int
    last_gain: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for size in self.hidden:
            x = nn.elu(nn.Dense(size, kernel_init=nn.initializers.orthogonal(2**0.5))(x))
        return nn.Dense(self.outputs, kernel_init=nn.initializers.orthogonal(self.last_gain))(x)


class Statistics(NamedTuple):
    """Running mean and variance of vectors; part of the agent's state, so that every checkpoint holds them."""

    mean: jax.Array  # (k,)
    variance: jax.Array  # (k,)
    count: jax.Array  # ()

    @staticmethod
    def of(x: jax.Array, valid: jax.Array) -> Statistics:
        """Of the valid rows of x: (B, k); without one, zeros that `merge` gives no weight."""
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

    def deviation(self) -> jax.Array:
        return jnp.sqrt(self.variance + 1e-6)

    def normalize(self, x: jax.Array) -> jax.Array:
        return (x - self.mean) / self.deviation()

    def denormalize(self, x: jax.Array) -> jax.Array:
        return x * self.deviation() + self.mean


SAME_POLICY = "env_id env_kwargs actor_hidden critic_hidden normalize_observations num_envs num_seeds sweep"  # to play a checkpoint
SAME_RUN = SAME_POLICY + " num_steps seed normalize_values log_std_init random_initial_ages"  # to resume it


class AgentState(NamedTuple):
    """All that changes during training: what a checkpoint holds."""

    parameters: dict  # actor: {network, log_std (actions,)}, critic: {network}
    adam: Any
    learning_rate: jax.Array
    obs_statistics: Statistics
    return_statistics: Statistics
    slots: Slot  # (N, ...)
    key: jax.Array
    iteration: jax.Array  # () finished so far


class Setup(NamedTuple):
    """All that does not: the program is compiled for it."""

    env: Environment
    actor: MLP
    critic: MLP
    args: Args
    mesh: Mesh  # devices, one axis, "envs"
    iterations: int  # of the whole run


def make_setup(env: Environment, args: Args, devices: list | None = None) -> Setup:
    mesh = Mesh(np.array(devices or jax.local_devices()[:1]), ("envs",))
    require(args.num_envs % mesh.size == 0, f"num_envs = {args.num_envs:,} does not split over {mesh.size} devices; use "
            f"{max(1, round(args.num_envs / mesh.size)) * mesh.size:,}")  # fmt: skip
    actor, critic = MLP(args.actor_hidden, len(env.action_low), 0.01), MLP(args.critic_hidden, 1, 1.0)
    return Setup(env, actor, critic, args, mesh, -(-args.total_timesteps // (args.num_envs * args.num_steps)))


def network_input(setup: Setup, statistics: Statistics, obs: jax.Array) -> jax.Array:
    """What both networks see of obs: (..., observation): at most 10 deviations, or the observation itself."""
    return jnp.clip(statistics.normalize(obs), -10.0, 10.0) if setup.args.normalize_observations else obs


def policy_mean(setup: Setup, parameters: dict, statistics: Statistics, obs: jax.Array) -> jax.Array:
    """obs: (B, observation) -> (B, actions), half ranges. Deterministic evaluation acts on it."""
    return setup.actor.apply(parameters["actor"]["network"], network_input(setup, statistics, obs))


def values_of(setup: Setup, state: AgentState, obs: jax.Array) -> jax.Array:
    """V: (..., observation) -> (...), in scaled reward units."""
    value = setup.critic.apply(state.parameters["critic"]["network"], network_input(setup, state.obs_statistics, obs))
    return state.return_statistics.denormalize(value[..., 0])


def adam() -> optax.GradientTransformation:
    """Adam's direction; the learning rate is the agent's own and multiplies it in `update_minibatch`."""
    return optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8)


def initialise(setup: Setup, hyper: Hyperparameters, seed: jax.Array) -> AgentState:
    """One agent before its first step."""
    args, env = setup.args, setup.env
    key, key_actor, key_critic, key_slots = jax.random.split(jax.random.PRNGKey(seed), 4)
    obs = jnp.zeros((1, env.observation_size))
    log_std = hyper.log_std_init * jnp.ones(len(env.action_low))
    parameters = {
        "actor": {"network": setup.actor.init(key_actor, obs), "log_std": log_std},
        "critic": {"network": setup.critic.init(key_critic, obs)},
    }
    statistics = [Statistics(jnp.zeros(size), jnp.ones(size), jnp.zeros(())) for size in (env.observation_size, 1)]
    make_slot = functools.partial(first_slot, env, args.random_initial_ages)
    slots = jax.vmap(make_slot)(jax.random.split(key_slots, args.num_envs))
    return AgentState(parameters, adam().init(parameters), hyper.learning_rate, *statistics, slots, key, jnp.array(0))


# ------------------------------------------------------------------------------------------------------------------------
# Algorithm: pure functions of one agent (vmap makes it many)
# ------------------------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """The samples of one update, B of them in a row; what the old policy and value function said is frozen here."""

    obs: jax.Array  # (B, observation), normalised
    action: jax.Array  # (B, actions), half ranges
    mean: jax.Array  # (B, actions), old policy
    log_prob: jax.Array  # (B,), old policy
    value: jax.Array  # (B,), old value function, normalised
    target: jax.Array  # (B,), return to regress on, normalised
    advantage: jax.Array  # (B,)
    weight: jax.Array  # (B,): 0 for a quarantined transition, else such that the mean is 1


def gaussian_log_prob(action: jax.Array, mean: jax.Array, log_std: jax.Array) -> jax.Array:
    """log density (B,) of diagonal Gaussians."""
    z = (action - mean) * jnp.exp(-log_std)
    return (-0.5 * jnp.square(z) - log_std - 0.5 * np.log(2 * np.pi)).sum(-1)


def gaussian_kl(old_mean: jax.Array, old_log_std: jax.Array, mean: jax.Array, log_std: jax.Array) -> jax.Array:
    """Exact KL(old || new) (B,) of diagonal Gaussians: no epsilon, so that it is unbiased for small deviations too."""
    squares = jnp.exp(2 * (old_log_std - log_std)) + jnp.square((old_mean - mean) * jnp.exp(-log_std))
    return (log_std - old_log_std + 0.5 * (squares - 1)).sum(-1)


def advantages_gae(reward, value, next_value, terminated, truncated, invalid, gamma, gae_lambda) -> jax.Array:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16) over (T, ...) arrays.

    next_value is V(final_obs), the value of the state that the step really led to, never that of a state after auto-reset. A step
    that ran on or hit the time limit (truncated) is bootstrapped with it, because the robot would have gone on; after a real end
    (terminated, which wins over truncated) nothing follows and the bootstrap is 0. Any end stops the sum over later steps. An
    invalid step has advantage 0 and stops it too.
    """
    delta = reward + gamma * jnp.where(terminated, 0.0, next_value) - value
    delta = jnp.where(invalid, 0.0, delta)
    decay = jnp.where(terminated | truncated | invalid, 0.0, gamma * gae_lambda)

    def step_back(following, row):
        advantage = row[0] + row[1] * following
        return advantage, advantage

    _, advantage = jax.lax.scan(step_back, jnp.zeros_like(delta[0]), (delta, decay), reverse=True)
    return advantage


def explore(setup: Setup, state: AgentState, obs: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sampled actions and their means, both (N, actions)."""
    mean = policy_mean(setup, state.parameters, state.obs_statistics, obs)
    return mean + jnp.exp(state.parameters["actor"]["log_std"]) * jax.random.normal(key, mean.shape, mean.dtype), mean


def environment_steps(setup: Setup) -> Callable:
    """One step of every environment: (slots, action, mean, key) -> (slots, transition)."""
    spec = PartitionSpec("envs")
    # No robot talks to another device.
    step = jax.vmap(functools.partial(autoreset_step, setup.env))
    step = shard_map(step, mesh=setup.mesh, in_specs=spec, out_specs=spec)
    return lambda slots, action, mean, key: step(slots, action, mean, jax.random.split(key, setup.args.num_envs))


def collect(setup: Setup, state: AgentState, key: jax.Array) -> tuple[Slot, Transition]:
    """num_steps steps of every environment: the slots afterwards, and all transitions (T, N, ...)."""
    step = environment_steps(setup)

    def rollout_step(slots: Slot, key: jax.Array) -> tuple[Slot, Transition]:
        key_noise, key_reset = jax.random.split(key)
        action, mean = explore(setup, state, slots.obs, key_noise)
        return step(slots, action, mean, key_reset)

    return jax.lax.scan(rollout_step, state.slots, jax.random.split(key, setup.args.num_steps))


def make_batch(
    setup: Setup, hyper: Hyperparameters, state: AgentState, rollout: Transition, key: jax.Array
) -> tuple[Batch, Statistics]:
    """Values, advantages and targets, normalised once and shuffled once: every epoch walks over the same minibatches.

    Also the return statistics, updated here and only here, before the targets are scaled with them."""
    args = setup.args
    value, next_value = values_of(setup, state, rollout.obs), values_of(setup, state, rollout.final_obs)
    ends = rollout.terminated, rollout.truncated, rollout.invalid
    reward = rollout.reward * hyper.reward_scale
    advantage = advantages_gae(reward, value, next_value, *ends, hyper.gamma, hyper.gae_lambda)
    rollout, value, advantage = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (rollout, value, advantage))

    valid, returns = ~rollout.invalid, advantage + value
    statistics = state.return_statistics
    if args.normalize_values:
        statistics = statistics.merge(Statistics.of(returns[:, None], valid))
    if args.normalize_advantages:
        moments = Statistics.of(advantage[:, None], valid)
        advantage = (advantage - moments.mean) / (jnp.sqrt(moments.variance) + 1e-8)
    log_prob = gaussian_log_prob(rollout.action, rollout.mean, state.parameters["actor"]["log_std"])
    batch = Batch(
        network_input(setup, state.obs_statistics, rollout.obs), rollout.action, rollout.mean, log_prob, statistics.normalize(value),
        statistics.normalize(returns), advantage, valid / jnp.maximum(valid.mean(), 1e-8),
    )  # fmt: skip
    order = jax.random.permutation(key, len(valid)).reshape(args.num_minibatches, -1)
    return jax.tree.map(lambda x: x[order], batch), statistics  # (minibatches, B, ...)


def explained_variance(batch: Batch) -> jax.Array:
    """1 - Var[target - value] / Var[target], () over the transitions that were not quarantined."""
    columns = jnp.stack([batch.target - batch.value, batch.target], -1)
    error, spread = Statistics.of(columns.reshape(-1, 2), batch.weight.ravel() > 0).variance
    return 1 - error / jnp.maximum(spread, 1e-8)


def ppo_loss(
    setup: Setup, hyper: Hyperparameters, parameters: dict, batch: Batch, old_log_std: jax.Array
) -> tuple[jax.Array, dict]:
    """Clipped surrogate (Schulman et al. 2017, eq. 7) + value error + bounds penalty - entropy, and their means.

    There is no weight on the value loss: policy and value function share no parameter and are clipped apart, and Adam does not
    see the scale of a gradient."""
    log_std = parameters["actor"]["log_std"]
    mean = setup.actor.apply(parameters["actor"]["network"], batch.obs)
    value = setup.critic.apply(parameters["critic"]["network"], batch.obs)[:, 0]
    ratio = jnp.exp(gaussian_log_prob(batch.action, mean, log_std) - batch.log_prob)
    clipped_ratio = jnp.clip(ratio, 1 - hyper.clip_coef, 1 + hyper.clip_coef)
    policy_loss = -jnp.minimum(batch.advantage * ratio, batch.advantage * clipped_ratio)
    value_loss = 0.5 * jnp.square(value - batch.target)
    if setup.args.clip_value_loss:
        clipped_value = batch.value + jnp.clip(value - batch.value, -hyper.clip_coef, hyper.clip_coef)
        value_loss = jnp.maximum(value_loss, 0.5 * jnp.square(clipped_value - batch.target))
    bounds_loss = jnp.square(jnp.maximum(jnp.abs(mean) - 1.1, 0.0)).sum(-1)
    entropy = (log_std + 0.5 * np.log(2 * np.pi * np.e)).sum()
    kl = gaussian_kl(batch.mean, old_log_std, mean, log_std)
    clip_fraction = jnp.abs(ratio - 1) > hyper.clip_coef
    terms = dict(
        policy_loss=policy_loss, value_loss=value_loss, bounds_loss=bounds_loss, kl=kl, clip_fraction=clip_fraction
    )
    terms = {name: (term * batch.weight).mean() for name, term in terms.items()} | {"entropy": entropy}
    loss = terms["policy_loss"] + terms["value_loss"]
    loss += hyper.bounds_coef * terms["bounds_loss"] - hyper.entropy_coef * terms["entropy"]
    return loss, terms


def scheduled_learning_rate(
    setup: Setup, hyper: Hyperparameters, state: AgentState, kl: jax.Array, moved: jax.Array
) -> jax.Array:
    """adaptive: a factor of 1.5 down where the policy moved over twice as far as desired, up where less than half as far.

    moved: () bool, false before the first gradient step of an iteration, when a KL of 0 says nothing."""
    progress = state.iteration / setup.iterations
    if setup.args.learning_rate_schedule == "constant":
        return hyper.learning_rate
    if setup.args.learning_rate_schedule == "linear":
        return hyper.learning_rate * (1 - progress)
    desired_kl = hyper.desired_kl + (hyper.desired_kl_final - hyper.desired_kl) * progress
    factor = jnp.where(kl > 2 * desired_kl, 1 / 1.5, jnp.where(kl < 0.5 * desired_kl, 1.5, 1.0))
    adapted = jnp.clip(state.learning_rate * factor, hyper.learning_rate_min, hyper.learning_rate_max)
    return jnp.where(moved, adapted, state.learning_rate)


def update_minibatch(
    setup: Setup, hyper: Hyperparameters, old_log_std: jax.Array, state: AgentState, batch: Batch, moved: jax.Array
) -> tuple[AgentState, dict]:
    """One gradient step: clip the policy's and the value function's gradient apart, Adam, floor of the exploration noise."""
    loss_and_gradients = jax.value_and_grad(ppo_loss, argnums=2, has_aux=True)
    (_, terms), gradients = loss_and_gradients(setup, hyper, state.parameters, batch, old_log_std)
    for name, gradient in gradients.items():
        norm = jnp.sqrt(sum(jnp.square(g).sum() for g in jax.tree.leaves(gradient)))
        scale = jnp.minimum(1.0, hyper.max_grad_norm / (norm + 1e-6))
        gradients[name] = jax.tree.map(lambda g, scale=scale: g * scale, gradient)
    direction, adam_state = adam().update(gradients, state.adam)
    learning_rate = scheduled_learning_rate(setup, hyper, state, terms["kl"], moved)
    parameters = jax.tree.map(lambda p, d: p - learning_rate * d, state.parameters, direction)
    parameters["actor"]["log_std"] = jnp.maximum(parameters["actor"]["log_std"], hyper.log_std_min)
    return state._replace(parameters=parameters, adam=adam_state, learning_rate=learning_rate), terms


def update(setup: Setup, hyper: Hyperparameters, state: AgentState, batch: Batch) -> tuple[AgentState, dict]:
    """All gradient steps on a batch (minibatches, B, ...); the loss terms of each."""
    args, old_log_std = setup.args, state.parameters["actor"]["log_std"]

    def gradient_step(state: AgentState, step: jax.Array) -> tuple[AgentState, dict]:
        minibatch = jax.tree.map(lambda x: x[step % args.num_minibatches], batch)
        return update_minibatch(setup, hyper, old_log_std, state, minibatch, moved=step > 0)

    return jax.lax.scan(gradient_step, state, jnp.arange(args.update_epochs * args.num_minibatches))


def iterate(setup: Setup, hyper: Hyperparameters, state: AgentState) -> tuple[AgentState, dict]:
    """Rollout, targets, update; also sums and means for the log."""
    args, (key, key_collect, key_batch) = setup.args, jax.random.split(state.key, 3)

    # Rollout
    slots, rollout = collect(setup, state, key_collect)

    # Targets: values and advantages, under the statistics of the rollout.
    batch, return_statistics = make_batch(setup, hyper, state, rollout, key_batch)
    explained = explained_variance(batch)
    state = state._replace(slots=slots, return_statistics=return_statistics, key=key)

    # Update. The observation statistics follow it, so that its ratios compare like with like.
    state, terms = update(setup, hyper, state, batch)
    obs_statistics = state.obs_statistics
    if args.normalize_observations:
        rows = rollout.obs.reshape(-1, rollout.obs.shape[-1])
        obs_statistics = obs_statistics.merge(Statistics.of(rows, ~rollout.invalid.ravel()))

    # Log. An episode that began at a random age is cut short: its return would pull the mean down.
    ended = (rollout.terminated | rollout.truncated) & (rollout.age == rollout.length)
    metrics = {name: term.mean() for name, term in terms.items()} | dict(
        episodes=ended.sum(), success_sum=(ended & ~rollout.terminated).sum(),
        return_sum=jnp.where(ended, rollout.episode_return, 0.0).sum(), length_sum=(rollout.length * ended).sum(),
        invalid=rollout.invalid.sum(), learning_rate=state.learning_rate, action_std=jnp.exp(state.parameters["actor"]["log_std"]).mean(),
        explained_variance=explained,
    )  # fmt: skip
    return state._replace(obs_statistics=obs_statistics, iteration=state.iteration + 1), metrics


def advance(setup: Setup, hyper: Hyperparameters, state: AgentState, iterations: jax.Array) -> tuple[AgentState, dict]:
    """So many iterations without the host; the metrics are summed over them."""

    def body(_, carry):
        state, sums = carry
        state, metrics = iterate(setup, hyper, state)
        return state, jax.tree.map(jnp.add, sums, metrics)

    shapes = jax.eval_shape(functools.partial(iterate, setup), hyper, state)[1]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.fori_loop(0, iterations, body, (state, zeros))


# ------------------------------------------------------------------------------------------------------------------------
# Evaluation: deterministic, statistics frozen, the first episode of each environment
# ------------------------------------------------------------------------------------------------------------------------


class Score(NamedTuple):
    """One agent's episodes, (eval_episodes,) each."""

    episode_return: jax.Array
    length: jax.Array
    failed: jax.Array  # bool: quarantined, so that the episode does not count


def deterministic_action(setup: Setup, parameters: dict, statistics: Statistics, obs: jax.Array) -> jax.Array:
    """obs: (B, observation) -> (B, actions), in the environment's units."""
    return to_env(setup.env, policy_mean(setup, parameters, statistics, obs))


def evaluate_in_mjx(setup: Setup, parameters: dict, statistics: Statistics, key: jax.Array) -> Score:
    """One agent in the training physics, until its time limit or its first end."""
    episodes = setup.args.eval_episodes
    step = jax.vmap(functools.partial(autoreset_step, setup.env))

    def body(carry: tuple, key: jax.Array) -> tuple[tuple, None]:
        slots, running, score = carry
        mean = policy_mean(setup, parameters, statistics, slots.obs)
        slots, transition = step(slots, mean, mean, jax.random.split(key, episodes))
        episode_return = score.episode_return + running * transition.reward
        score = Score(episode_return, score.length + running, score.failed | (running & transition.invalid))
        return (slots, running & ~(transition.terminated | transition.truncated | transition.invalid), score), None

    key, key_slots = jax.random.split(key)
    slots = jax.vmap(functools.partial(first_slot, setup.env, False))(jax.random.split(key_slots, episodes))
    running = jnp.ones(episodes, bool)
    score = Score(jnp.zeros_like(slots.episode_return), jnp.zeros_like(slots.length), ~running)
    (_, _, score), _ = jax.lax.scan(body, (slots, running, score), jax.random.split(key, setup.env.max_episode_steps))
    return score


def evaluate_in_gymnasium(args: Args, act: Callable, seed: int) -> Score:
    """The same in gymnasium.make(env_id): MuJoCo C, the MJCF's own integrator and solver. `act` maps observations to actions."""
    envs = [gymnasium.make(args.env_id, **args.env_kwargs) for _ in range(args.eval_episodes)]
    obs = np.stack([one.reset(seed=seed + i)[0] for i, one in enumerate(envs)])
    score = Score(np.zeros(len(envs)), np.zeros(len(envs), int), np.zeros(len(envs), bool))
    running = ~score.failed
    while running.any():
        action = np.asarray(act(obs))
        for i in np.flatnonzero(running):
            obs[i], reward, terminated, truncated, _ = envs[i].step(action[i])
            score.episode_return[i] += reward
            score.length[i] += 1
            running[i] = not (terminated or truncated)
    for one in envs:
        one.close()
    return score


def summary(score: Score) -> dict | None:
    """Over the episodes that were not quarantined; None where none is left."""
    returns, lengths = (np.asarray(x)[~np.asarray(score.failed)] for x in (score.episode_return, score.length))
    if not len(returns):
        return None
    return dict(mean=float(returns.mean()), std=float(returns.std()), min=float(returns.min()), episodes=len(returns),
                mean_length=float(lengths.mean()))  # fmt: skip


def across_agents(scores: list[float | None]) -> dict:
    """Median, interquartile mean (a quarter cut off each end, Agarwal et al. 2021) and worst of the agents that have a score; how many
    diverged and have none."""
    known = sorted(score for score in scores if score is not None)
    diverged, cut = len(scores) - len(known), len(known) // 4
    if not known:
        return dict(median=None, interquartile_mean=None, worst=None, diverged=diverged)
    middle = known[cut : len(known) - cut]
    return dict(
        median=float(np.median(known)), interquartile_mean=float(np.mean(middle)), worst=known[0], diverged=diverged
    )


# ------------------------------------------------------------------------------------------------------------------------
# Checkpoint and log
# ------------------------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    names = "jax jaxlib flax optax mujoco mujoco-mjx gymnasium numpy".split()
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in names}


def cpu_cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def hardware() -> str:
    """Of the devices in use."""
    device = jax.config.jax_default_device or jax.local_devices()[0]
    return f"{len(jax.local_devices(backend=device.platform))} x {device.device_kind}, {cpu_cores()} CPU cores"


def write_whole(path: Path, content: bytes | memoryview):
    """Write beside the file, then rename: a full disk or a kill leaves the earlier file as it was."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def save_checkpoint(path: Path, args: Args, state: AgentState, counters: dict):
    """One .npz of plain arrays: every leaf of the state (axis 0: the agents) under its own name, and a JSON header."""
    leaves = {jax.tree_util.keystr(name): np.asarray(leaf) for name, leaf in jax.tree_util.tree_leaves_with_path(state)}
    header = json.dumps(dict(args=dataclasses.asdict(args), counters=counters, versions=versions()))
    archive = io.BytesIO()
    np.savez(archive, header=np.array(header), **leaves)
    write_whole(path, archive.getbuffer())


def load_header(path: str) -> dict:
    """Flags, counters and versions of a checkpoint, once every array of it agrees with its checksum."""
    require(not Path(path).is_dir(), f"checkpoint {path} is a folder; give the file in it, {Path(path) / 'checkpoint.npz'}")
    require(Path(path).is_file(), f"there is no checkpoint {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            require(file.zip.testzip() is None, "an array differs from its checksum")
            header = json.loads(str(file["header"]))
            return header | {name: dict(header[name]) for name in ("args", "counters")}
    except (ValueError, KeyError, TypeError, OSError, EOFError, RuntimeError, zipfile.BadZipFile):
        raise InputError(f"{path} is not a checkpoint of this script, or it is damaged") from None


def saved_args(path: str) -> Args:
    """The flags that a checkpoint was written with, less those that say what to do with it."""
    saved = load_header(path)["args"]
    saved = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
    try:
        return Args(**saved | dict(run_dir=None, resume=None, play=None, capture_video=False, benchmark=None, profile=False))
    except TypeError as error:
        raise InputError(f"{path} was written by another version of this script: {error}") from None


def check_same_run(path: str, args: Args, names: str):
    """Refuse flags that no longer describe the agents of a checkpoint."""
    then = saved_args(path)
    for name in names.split():
        require(getattr(args, name) == getattr(then, name),
                f"the checkpoint was trained with {name} = {getattr(then, name)}, not {getattr(args, name)}; leave that flag away")  # fmt: skip


def resumable_counters(args: Args) -> dict:
    """Steps and seconds of the checkpoint to continue from, which must fit the flags."""
    check_same_run(args.resume, args, SAME_RUN)
    counters = load_header(args.resume)["counters"]
    require(counters["env_steps"] < args.total_timesteps,
            f"the checkpoint has {counters['env_steps']:,} steps already; give a larger --total-timesteps")  # fmt: skip
    return counters


def load_state(path: str, like: AgentState) -> AgentState:
    """The arrays of a checkpoint, in the structure of `like`."""
    with np.load(path, allow_pickle=False) as file:
        names = [jax.tree_util.keystr(name) for name, _ in jax.tree_util.tree_leaves_with_path(like)]
        require(
            set(names) == set(file.files) - {"header"}, f"{path} holds another kind of agent than these flags describe"
        )
        for name, leaf in zip(names, jax.tree.leaves(like)):
            require(
                file[name].shape == leaf.shape,
                f"{path}: {name} has shape {file[name].shape}, these flags need {leaf.shape}",
            )
        return jax.tree.unflatten(jax.tree.structure(like), [file[name] for name in names])


def check_run_dir(args: Args):
    """Make the folder. A run must not write over another one; only a resumed run goes on in its own folder."""
    folder = Path(args.run_dir)
    own = args.resume and Path(args.resume).resolve().parent == folder.resolve()
    advice = ", or --resume its checkpoint.npz" if (folder / "checkpoint.npz").exists() else ""
    rule = f"run_dir = {args.run_dir} holds a run already; choose another{advice}"
    require(bool(own) or not (folder / "metrics.jsonl").exists(), rule)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"run_dir = {args.run_dir} cannot be made: {error.strerror}") from None
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"run_dir = {args.run_dir} cannot be written: {error.strerror}") from None


class Log:
    """metrics.jsonl, TensorBoard and a progress bar."""

    def __init__(self, run_dir: Path, args: Args, first_step: int):
        path = run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]  # a killed run may leave half of its last line
        # What an interrupted run logged after its checkpoint is run, and logged, again.
        kept = [line for line in whole if json.loads(line)["env_steps"] <= first_step]
        write_whole(path, "".join(kept).encode())
        self.file = open(path, "a")
        self.events = EventFileWriter(str(run_dir))
        if first_step:  # TensorBoard drops what comes after the checkpoint
            start = SessionLog(status=SessionLog.START)
            self.events.add_event(Event(step=first_step + 1, wall_time=time.time(), session_log=start))
        patience = 0.1 if sys.stderr.isatty() else 30.0  # seconds between two drawings of the bar
        self.bar = tqdm(
            total=args.total_timesteps, initial=first_step, unit=" steps", unit_scale=True, mininterval=patience
        )
        self.wandb = None
        if args.track:
            import wandb

            self.wandb = wandb.init(project="onefile-gpu-rl", name=run_dir.name, config=dataclasses.asdict(args))

    def write(self, row: dict):
        """`row`: numbers, None where no episode ended, and a list over agents, which only metrics.jsonl holds."""
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        scalars = {name: value for name, value in row.items() if isinstance(value, (int, float))}
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self.events.add_event(Event(step=row["env_steps"], wall_time=time.time(), summary=Summary(value=values)))
        if self.wandb:
            self.wandb.log(scalars, step=row["env_steps"])
        self.bar.update(row["env_steps"] - self.bar.n)
        if row["episode_return"] is not None:
            self.bar.set_postfix_str(f"return {row['episode_return']:.1f}")

    def close(self):
        self.bar.close()  # first, because the others fail on a full disk
        self.file.close()
        self.events.close()
        if self.wandb:
            self.wandb.finish()


def crossed(env_steps: int, last: int, every: int | None) -> bool:
    """Did the last so many environment steps cross a multiple of `every`?"""
    return every is not None and env_steps // every > (env_steps - last) // every


def next_stop(done: int, end: int, steps_per_iteration: int, intervals: tuple[int | None, ...]) -> int:
    """The first iteration after `done` at which a multiple of one of the intervals, in environment steps, is crossed."""
    next_multiples = [(done * steps_per_iteration // every + 1) * every for every in intervals if every]
    return min(end, *(-(-multiple // steps_per_iteration) for multiple in next_multiples))


def metrics_row(sums: dict, iterations: int, counters: dict, steps_per_second: float) -> dict:
    """Sums over an interval, (agents,) each -> means, None where nothing finite is left to average. Many agents give their mean, and
    agent_episode_return; env_steps are those of each agent, steps_per_second those of all together."""

    def mean(values: np.ndarray) -> float | None:
        finite = values[np.isfinite(values)]  # an agent that diverged does not hide the others
        return float(finite.mean()) if len(finite) else None

    sums = {name: np.asarray(value, dtype=np.float64) for name, value in sums.items()}  # host sync
    names = "episodes return_sum length_sum invalid success_sum"
    episodes, returns, lengths, invalid, successes = (sums.pop(name) for name in names.split())
    total = episodes.sum()
    row = dict(
        env_steps=counters["env_steps"], wall_seconds=counters["train_seconds"], steps_per_second=steps_per_second,
        episode_return=returns.sum() / total if total else None, episode_length=lengths.sum() / total if total else None,
        episodes=int(total), success=successes.sum() / total if total else None, invalid=int(invalid.sum()),
        **{name: mean(value / iterations) for name, value in sums.items()},
    )  # fmt: skip
    if len(episodes) > 1:
        row["agent_episode_return"] = [float(r / n) if n else None for r, n in zip(returns, episodes)]
    return row


def plot_curve(run_dir: Path, title: str):
    """curve.png from metrics.jsonl: episode return over environment steps; of many agents the median and the whole range."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["episode_return"] is not None]
    if not rows:
        return
    steps = [row["env_steps"] for row in rows]
    returns = [row.get("agent_episode_return", [row["episode_return"]]) for row in rows]
    returns = np.array(returns, dtype=float)  # None becomes NaN
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, np.nanmedian(returns, axis=1))
    axes.fill_between(steps, np.nanmin(returns, axis=1), np.nanmax(returns, axis=1), alpha=0.2)
    axes.set(title=title, xlabel="environment steps", ylabel="episode return while training")
    axes.grid(alpha=0.3)
    figure.savefig(run_dir / "curve.png", dpi=120)


def write_sweep(run_dir: Path, name: str, agents: list[dict]):
    """sweep.csv, one row per value: what across_agents says of its seeds; sweep.png, every agent a point."""
    values = sorted({agent["value"] for agent in agents})
    rows = [across_agents([agent["score"] for agent in agents if agent["value"] == value]) for value in values]
    with open(run_dir / "sweep.csv", "w", newline="") as file:
        table = csv.DictWriter(file, [name, *rows[0]])
        table.writeheader()
        table.writerows({name: value} | row for value, row in zip(values, rows))
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    scored = [agent for agent in agents if agent["score"] is not None]
    axes.scatter(
        [agent["value"] for agent in scored], [agent["score"] for agent in scored], alpha=0.6, label="one agent"
    )
    axes.plot(values, np.array([row["median"] for row in rows], dtype=float), label="median")  # None: NaN, a gap
    axes.set(xlabel=name, ylabel="final score", xscale="log" if min(values) > 0 else "linear")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(run_dir / "sweep.png", dpi=120)


# ------------------------------------------------------------------------------------------------------------------------
# Train, play, benchmark
# ------------------------------------------------------------------------------------------------------------------------


def hyperparameters(args: Args) -> tuple[Hyperparameters, np.ndarray]:
    """Of all agents, (agents,) each, and their seeds: every value of the sweep with every seed."""
    swept, values = parse_sweep(args.sweep)
    seeds = np.tile(args.seed + np.arange(args.num_seeds), len(values))
    dtype = jnp.zeros(()).dtype  # float32, or float64 under JAX_ENABLE_X64
    fields = {name: np.full(len(seeds), getattr(args, name), dtype) for name in Hyperparameters._fields}
    if swept:
        fields[swept] = np.repeat(np.array(values, dtype), args.num_seeds)
    if args.desired_kl_final is None:  # desired_kl is swept
        fields["desired_kl_final"] = fields["desired_kl"]
    return Hyperparameters(**fields), seeds


def shardings(setup: Setup, state: AgentState) -> AgentState:
    """Where each array lives: environments, (agents, N, ...), split over the devices, all else on every device."""
    split, whole = (NamedSharding(setup.mesh, spec) for spec in (PartitionSpec(None, "envs"), PartitionSpec()))
    everywhere = jax.tree.map(lambda _: whole, state)
    return everywhere._replace(slots=jax.tree.map(lambda _: split, state.slots))


def configure(args: Args):
    """JAX's own settings, before it looks for devices. Compiled programs are kept on disk, where the second run reads them.

    Matrix products are true float32: NVIDIA GPUs since Ampere would else round their inputs to TF32's 10 bits, which the physics
    does not bear. That holds for the networks too, which are small beside the physics."""
    jax.config.update("jax_default_matmul_precision", "highest")
    if "xla_cpu_multi_thread_eigen" not in os.environ.get("XLA_FLAGS", ""):
        # XLA's CPU thread pool waits for itself and hangs when batched LAPACK calls of MJX run in it (seen with 8 agents, jaxlib 0.10.2).
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
    if "xla_force_host_platform_device_count" in os.environ["XLA_FLAGS"]:
        # Pool threads: devices that wait for each other must not starve each other.
        os.environ.setdefault("NPROC", "16")
    if args.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", str(Path(args.compilation_cache).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def join_hosts():
    """Slurm, Open MPI, Kubernetes and TPU pods tell JAX who takes part; elsewhere three environment variables do."""
    processes, rank = (os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # the default of newer releases
    try:  # JAX reads JAX_COORDINATOR_ADDRESS itself
        jax.distributed.initialize(num_processes=processes and int(processes), process_id=rank and int(rank))
    except ValueError as error:
        names = "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        raise InputError(f"distributed found no cluster manager; set {names} ({error})") from None


def pick_devices(args: Args) -> list:
    """All devices of the asked kind, of all hosts; the first of this host is where everything outside the sharded program runs."""
    try:
        devices = jax.devices(None if args.device == "auto" else args.device)
    except RuntimeError:
        raise InputError(f"device = {args.device}: JAX sees none here; use --device auto") from None
    jax.config.update("jax_default_device", next(one for one in devices if one.process_index == jax.process_index()))
    return devices


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """The list that the first Ctrl-C or SIGTERM goes into, instead of ending the process; a second one ends it at once.

    One process of several must not stop alone, since the others wait for it: there signals keep their usual effect."""
    received, numbers = [], (signal.SIGINT, signal.SIGTERM)

    def receive(number: int, _):
        received.append(number)
        for one in numbers:
            signal.signal(one, signal.SIG_DFL)

    handles = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
    usual = {number: signal.signal(number, receive) for number in numbers} if handles else {}
    try:
        yield received
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def train(args: Args, env: Environment | None = None, devices: list | None = None) -> dict:
    """The whole run; returns what eval.json holds. `env` replaces the task by one of the caller's own (its env_id then only names it)."""
    # Set-up
    args = resolve(args)
    require(env is None or args.eval_every is None, "eval_every: Gymnasium has no such environment to evaluate in; leave that flag away")
    configure(args)
    counters = dict(env_steps=0, train_seconds=0.0, compile_seconds=0.0)
    if args.resume:
        counters = resumable_counters(args)
    if args.distributed:
        join_hosts()
    devices = devices or pick_devices(args)
    leads = jax.process_index() == 0
    if leads:  # the one writer
        check_run_dir(args)
    own_env = env is not None
    setup = make_setup(env or make_environment(make_task(args)), args, devices)
    hyper, seeds = hyperparameters(args)
    steps_per_iteration = args.num_envs * args.num_steps
    run_dir = Path(args.run_dir)
    if leads:
        config = dataclasses.asdict(args) | dict(versions=versions(), hardware=hardware())
        write_whole(run_dir / "config.json", json.dumps(config, indent=2).encode())
        print(f"{run_dir}: {len(seeds)} agent(s), {setup.mesh.size} device(s), {setup.iterations:,} iterations of {args.num_envs:,} x "
              f"{args.num_steps} = {steps_per_iteration:,} steps, minibatches of {steps_per_iteration // args.num_minibatches:,}")  # fmt: skip

    # Compile
    start = time.perf_counter()
    create = jax.vmap(functools.partial(initialise, setup))
    shapes = jax.eval_shape(create, hyper, seeds)
    placement = shardings(setup, shapes)
    if args.resume:
        state = load_state(args.resume, shapes)
        if args.learning_rate != saved_args(args.resume).learning_rate:  # a rate given anew wins over the adapted ones
            state = state._replace(learning_rate=hyper.learning_rate)
        state = jax.device_put(state, placement)
    else:
        state = jax.jit(create, out_shardings=placement)(hyper, seeds)
    run = jax.vmap(functools.partial(advance, setup), in_axes=(0, 0, None))
    whole = NamedSharding(setup.mesh, PartitionSpec())
    run = jax.jit(run, in_shardings=(whole, placement, whole), out_shardings=(placement, whole))
    run = run.lower(hyper, state, np.int32(1)).compile()
    counters["compile_seconds"] += time.perf_counter() - start
    if args.profile:
        profile(setup, hyper, state, run)

    # Train: the program runs until the next thing that the host has to do
    log = Log(run_dir, args, counters["env_steps"]) if leads else None
    gather = jax.jit(lambda state: state, out_shardings=whole)
    done = counters["env_steps"] // steps_per_iteration
    intervals = args.log_every, args.eval_every, args.checkpoint_every
    # Another thread waits for XLA, so that this one can receive signals.
    with contextlib.closing(log or io.BytesIO()), stop_signals() as stopped, ThreadPoolExecutor(1) as waiter:
        while done < setup.iterations:
            before, done = done, next_stop(done, setup.iterations, steps_per_iteration, intervals)
            begin = time.perf_counter()
            program = waiter.submit(lambda: jax.block_until_ready(run(hyper, state, np.int32(done - before))))
            state, sums = program.result()  # host sync
            seconds, steps = time.perf_counter() - begin, (done - before) * steps_per_iteration
            counters |= dict(env_steps=done * steps_per_iteration, train_seconds=counters["train_seconds"] + seconds)
            last = done == setup.iterations
            evaluate_now, save_now = (last or crossed(counters["env_steps"], steps, every) for every in intervals[1:])
            row = metrics_row(sums, done - before, counters, len(seeds) * steps / seconds)
            if None in (row[name] for name in ("policy_loss", "value_loss", "kl")):  # of every agent
                raise FloatingPointError(f"training diverged by {counters['env_steps']:,} steps: {row}")
            snapshot = gather(state) if evaluate_now or save_now else None  # all hosts take part
            if leads and evaluate_now and args.eval_every and not own_env and not stopped:
                scores = [score and score["mean"] for score in gymnasium_scores(setup, snapshot, seeds)]
                known = [score for score in scores if score is not None]
                row["gymnasium_return"] = float(np.mean(known)) if known else None
                row |= {"agent_gymnasium_return": scores} if len(scores) > 1 else {}
            if leads:
                log.write(row)
            if leads and (save_now or stopped):
                save_checkpoint(run_dir / "checkpoint.npz", args, snapshot or gather(state), counters)
            if stopped:
                raise KeyboardInterrupt

    # Evaluate
    if leads:
        plot_curve(run_dir, f"{args.env_id}, {len(seeds)} agent(s)")
        return report(setup, args, run_dir, gather(state), counters, own_env)
    gather(state)
    return {}


def profile(setup: Setup, hyper: Hyperparameters, state: AgentState, whole: Callable, profiled: tuple[int, int] = PROFILED):
    """Where the time of an iteration goes: profile.json, trace.json.gz and a printed table. Nothing of it changes the state.

    The training is one program, whose parts share buffers and overlap. Here each part is a program of its own, run on the data
    of one iteration; "the rest" is what the whole takes longer than the parts together, or shorter, where it is negative."""
    args, run_dir, (warm_up, timed) = setup.args, Path(setup.args.run_dir), profiled

    def infer(state: AgentState, rollout: Transition) -> tuple[jax.Array, jax.Array]:
        keys = jax.random.split(state.key, args.num_steps)
        return jax.lax.map(lambda x: explore(setup, state, *x), (rollout.obs, keys))

    def simulate(state: AgentState, rollout: Transition) -> tuple[Slot, Transition]:
        step, keys = environment_steps(setup), jax.random.split(state.key, args.num_steps)
        return jax.lax.scan(lambda slots, x: step(slots, *x), state.slots, (rollout.action, rollout.mean, keys))

    def seconds(program: Callable, *inputs: Any) -> tuple[float, Any]:
        program, times = jax.jit(jax.vmap(program)), []
        for _ in range(warm_up + timed):
            begin = time.perf_counter()
            output = jax.block_until_ready(program(*inputs))  # host sync
            times.append(time.perf_counter() - begin)
        return sum(times[warm_up:]) / timed, output

    _, rollout = jax.jit(jax.vmap(functools.partial(collect, setup)))(state, state.key)
    stages = dict(infer=seconds(infer, state, rollout)[0], simulate=seconds(simulate, state, rollout)[0])
    targets = functools.partial(make_batch, setup)
    stages["targets"], (batch, _) = seconds(targets, hyper, state, rollout, state.key)
    stages["update"], _ = seconds(functools.partial(update, setup), hyper, state, batch)
    total, _ = seconds(functools.partial(iterate, setup), hyper, state)
    stages["the rest"] = total - sum(stages.values())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(whole(hyper, state, np.int32(1)))  # host sync
        for path in Path(folder).rglob("*.trace.json.gz"):
            if jax.process_index() == 0:  # the one writer
                shutil.copy(path, run_dir / "trace.json.gz")
    table = {name: dict(seconds=x, share=x / total) for name, x in stages.items()}
    steps = len(hyper.gamma) * args.num_envs * args.num_steps
    if jax.process_index() == 0:
        (run_dir / "profile.json").write_text(json.dumps(dict(steps=steps, stages=table), indent=2))
        lines = [f"{name:<10} {x['seconds'] * 1e3:9.1f} ms {x['share']:6.1%}" for name, x in table.items()]
        print("\n".join([f"an iteration of {steps:,} environment steps, {total * 1e3:.1f} ms; its parts by themselves, mean of {timed}:", *lines]))


def gymnasium_scores(setup: Setup, state: AgentState, seeds: np.ndarray) -> list[dict | None]:
    """Of every agent, in Gymnasium's own environment, on initial states that training has not drawn; None of one that diverged."""
    policy = jax.device_get((state.parameters, state.obs_statistics))
    act = jax.jit(functools.partial(deterministic_action, setup))
    scores = []
    for i, seed in enumerate(seeds):
        agent = jax.tree.map(lambda x, i=i: x[i], policy)
        if not all(np.isfinite(x).all() for x in jax.tree.leaves(agent)):
            scores.append(None)
            continue
        score = evaluate_in_gymnasium(setup.args, functools.partial(act, *agent), int(seed) + 1_000_000)
        scores.append(summary(score))
    return scores


def evaluate(setup: Setup, args: Args, state: AgentState, own_env: bool) -> list[dict]:
    """Score every agent in MJX and in Gymnasium's own environment."""
    _, seeds = hyperparameters(args)
    _, values = parse_sweep(args.sweep)
    policy = jax.device_get((state.parameters, state.obs_statistics))
    keys = jax.vmap(jax.random.PRNGKey)(seeds + 1_000_000)
    in_mjx = jax.device_get(jax.jit(jax.vmap(functools.partial(evaluate_in_mjx, setup)))(*policy, keys))
    in_gymnasium = [None] * len(seeds) if own_env else gymnasium_scores(setup, state, seeds)
    agents = []
    for i, seed in enumerate(seeds):
        mine, theirs = summary(jax.tree.map(lambda x, i=i: x[i], in_mjx)), in_gymnasium[i]
        decides = mine if own_env else theirs
        agent = dict(seed=int(seed), mjx=mine, gymnasium=theirs, score=decides and decides["mean"])
        agents.append(agent | ({"value": values[i // args.num_seeds]} if args.sweep else {}))
    return agents


def report(setup: Setup, args: Args, run_dir: Path, state: AgentState, counters: dict, own_env: bool) -> dict:
    """Evaluate, write eval.json (its top level is the median agent), print both scores."""
    agents = evaluate(setup, args, state, own_env) if args.eval_episodes else []
    nothing = dict(seed=args.seed, mjx=None, gymnasium=None)
    scored = sorted((agent for agent in agents if agent["score"] is not None), key=lambda agent: agent["score"])
    median = scored[(len(scored) - 1) // 2] if scored else nothing
    result = dict(env_id=args.env_id, algorithm="ppo_mjx", seed=median["seed"], **counters, vecsim=None, mjx=median["mjx"], gymnasium=median["gymnasium"],
                  versions=versions(), hardware=hardware())  # fmt: skip
    if len(agents) > 1:
        result |= dict(agents=agents, across_agents=across_agents([agent["score"] for agent in agents]))
    if args.sweep and agents:
        write_sweep(run_dir, args.sweep.partition("=")[0], agents)
    (run_dir / "eval.json").write_text(json.dumps(result, indent=2))
    seconds = f"in {counters['train_seconds']:.1f} s, compiled in {counters['compile_seconds']:.1f} s"
    print(f"trained {counters['env_steps']:,} steps {seconds}")
    for agent in agents:
        print_agent(agent)
    if len(agents) > 1:
        numbers = ((name, value) for name, value in result["across_agents"].items() if value is not None)
        print("across agents: " + ", ".join(f"{name} {value:g}" for name, value in numbers))
    return result


def print_agent(agent: dict):
    scores = [f"{name} {agent[name]['mean']:.1f} +- {agent[name]['std']:.1f} (worst {agent[name]['min']:.1f})"
              for name in ("mjx", "gymnasium") if agent[name]]  # fmt: skip
    value = f", value {agent['value']:g}" if "value" in agent else ""
    print(f"seed {agent['seed']}{value}: {', '.join(scores) or 'no score, because it diverged'}")


def play(args: Args) -> list[dict]:
    """Score the agents of a checkpoint; with capture_video also film the best of them."""
    require(args.eval_episodes >= 1, f"eval_episodes = {args.eval_episodes} must be >= 1 to play; use --eval-episodes 20")
    configure(args)
    check_same_run(args.play, args, SAME_POLICY)
    setup = make_setup(make_environment(make_task(args)), args, pick_devices(args)[:1])
    shapes = jax.eval_shape(jax.vmap(functools.partial(initialise, setup)), *hyperparameters(args))
    state = load_state(args.play, shapes)
    agents = evaluate(setup, args, state, own_env=False)
    for agent in agents:
        print_agent(agent)
    if args.capture_video:
        best = max(range(len(agents)), key=lambda i: -np.inf if agents[i]["score"] is None else agents[i]["score"])
        agent = jax.tree.map(lambda x: x[best], (state.parameters, state.obs_statistics))
        act = jax.jit(functools.partial(deterministic_action, setup, *agent))
        print(f"video: {film(args, act, Path(args.play).parent)}")
    return agents


def film(args: Args, act: Callable, folder: Path) -> Path:
    """One deterministic episode of Gymnasium's own environment as play.mp4 (play.gif without imageio-ffmpeg)."""
    import imageio.v2 as imageio

    if "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")  # headless; osmesa where EGL is missing
    # "track" follows the robot; Gymnasium takes its free camera where the model has no camera of this name.
    env = gymnasium.make(args.env_id, render_mode="rgb_array", camera_name="track", **args.env_kwargs)
    obs, _ = env.reset(seed=args.seed)
    frames, ended = [], False
    while not ended:
        frames.append(env.render())
        obs, _, terminated, truncated, _ = env.step(np.asarray(act(obs[None]))[0])
        ended = terminated or truncated
    env.close()
    path = folder / ("play.mp4" if importlib.util.find_spec("imageio_ffmpeg") else "play.gif")
    if path.suffix == ".mp4":
        imageio.mimwrite(path, frames, fps=env.metadata["render_fps"], macro_block_size=8)
    else:
        imageio.mimwrite(path, frames[::2], duration=2000 / env.metadata["render_fps"], loop=0)
    return path


def timed(program: Callable, *inputs: Any) -> tuple[Any, float, float]:
    """Last output, median seconds of three calls after a warm-up call, compile seconds. The output feeds the next call."""
    start = time.perf_counter()
    program = jax.jit(program).lower(*inputs).compile()
    compile_seconds = time.perf_counter() - start
    state, key = inputs
    seconds = []
    for _ in range(4):
        key, key_now = jax.random.split(key)
        start = time.perf_counter()
        state = jax.block_until_ready(program(state, key_now))
        seconds.append(time.perf_counter() - start)
    return state, float(np.median(seconds[1:])), compile_seconds


def in_mujoco_c(
    model: mujoco.MjModel, function: Callable, name: str, states: RobotState, ctrl: np.ndarray
) -> np.ndarray:
    """The field `name` of mjData after function(model, data), from every state."""
    data, found = mujoco.MjData(model), []
    for row in zip(*(np.asarray(x, np.float64) for x in (states.qpos, states.qvel, states.qacc_warmstart, ctrl))):
        data.qpos, data.qvel, data.qacc_warmstart, data.ctrl = row
        function(model, data)
        found.append(getattr(data, name).copy())
    return np.array(found)


def relative_errors(mine: jax.Array, reference: np.ndarray) -> np.ndarray:
    """(states,): the largest difference of each state, relative to its largest entry (at least 1)."""
    return np.abs(np.asarray(mine) - reference).max(1) / np.maximum(1.0, np.abs(reference).max(1))


def acceleration_errors(task: Task, states: RobotState, ctrl: np.ndarray) -> np.ndarray:
    """Error of qacc against MuJoCo C with a converged solver and the same contacts: what float32 and few iterations cost."""

    def acceleration(state: RobotState, ctrl: jax.Array) -> jax.Array:
        return forward(task, task.blank.replace(**data_fields(state), ctrl=ctrl)).qacc

    converged = copy.copy(task.mj_model)
    converged.opt.iterations, converged.opt.ls_iterations, converged.opt.tolerance = 100, 50, 0.0
    mine = jax.jit(jax.vmap(acceleration))(states, ctrl)
    return relative_errors(mine, in_mujoco_c(converged, mujoco.mj_forward, "qacc", states, ctrl))


def step_errors(task: Task, states: RobotState, ctrl: np.ndarray) -> np.ndarray:
    """Error of qvel after one physics step against Gymnasium's own model: what integrator, solver and collision flags cost in all."""

    def velocity(state: RobotState, ctrl: jax.Array) -> jax.Array:
        return physics_step(task, task.blank.replace(**data_fields(state), ctrl=ctrl)).qvel

    mine = jax.jit(jax.vmap(velocity))(states, ctrl)
    return relative_errors(mine, in_mujoco_c(task.mjcf_model, mujoco.mj_step, "qvel", states, ctrl))


def mujoco_c_speed(model: mujoco.MjModel, ctrl: np.ndarray) -> float:
    """Physics steps/s of MuJoCo C on one core, under random controls."""
    data, start, rounds = mujoco.MjData(model), time.perf_counter(), 400
    for i in range(rounds):
        data.ctrl = ctrl[i % len(ctrl)]
        mujoco.mj_step(model, data, nstep=25)
    return 25 * rounds / (time.perf_counter() - start)


def benchmark(args: Args) -> dict:
    """Speed of the physics, and of whole environment steps with rewards and resets, under random actions; error of this very configuration."""
    args = resolve(args)
    folder = Path(args.benchmark).parent
    rule = f"benchmark = {args.benchmark} cannot be written; give a file in an existing folder"
    require(folder.is_dir() and not Path(args.benchmark).is_dir(), rule)
    configure(args)
    device = pick_devices(args)[0]
    task = make_task(args)
    env, length = make_environment(task), 50  # environment steps in one call
    draw = functools.partial(jax.random.uniform, shape=(args.num_envs, len(env.action_low)), minval=-1.0, maxval=1.0)

    step = jax.vmap(functools.partial(autoreset_step, env))

    def random_steps(slots: Slot, key: jax.Array) -> Slot:
        def body(slots, key):
            action = draw(key)
            return step(slots, action, action, jax.random.split(key, args.num_envs))[0], None

        return jax.lax.scan(body, slots, jax.random.split(key, length))[0]

    def random_physics(states: RobotState, key: jax.Array) -> RobotState:
        def body(states, key):
            data = jax.vmap(functools.partial(simulate, task))(states, to_env(env, draw(key)))
            return RobotState(data.qpos, data.qvel, data.qacc_warmstart, states.x_position), None

        return jax.lax.scan(body, states, jax.random.split(key, length))[0]

    key, key_slots, key_ctrl = jax.random.split(jax.random.PRNGKey(args.seed), 3)
    slots = jax.jit(jax.vmap(functools.partial(first_slot, env, True)))(jax.random.split(key_slots, args.num_envs))
    slots, env_seconds, env_compile = timed(random_steps, slots, key)
    states, physics_seconds, physics_compile = timed(random_physics, slots.state, key)
    ctrl = np.asarray(to_env(env, draw(key_ctrl)))
    errors = dict(qacc_error=acceleration_errors(task, states, ctrl), step_error=step_errors(task, states, ctrl))
    errors = {f"{name}_p{p}": float(np.percentile(x, p)) for name, x in errors.items() for p in (50, 99, 100)}
    steps = args.num_envs * length
    result = dict(
        env_id=args.env_id, num_envs=args.num_envs, device=str(device), dtype=str(states.qpos.dtype), integrator=args.integrator,
        iterations=args.solver_iterations, ls_iterations=args.ls_iterations, physics_steps_per_second=steps * task.frame_skip / physics_seconds,
        env_steps_per_second=steps / env_seconds, compile_seconds=env_compile + physics_compile,
        **{name.replace("p100", "max"): value for name, value in errors.items()},
        mujoco_c_physics_steps_per_second=mujoco_c_speed(task.mj_model, ctrl), threads=cpu_cores(), versions=versions(), hardware=hardware(),
    )  # fmt: skip
    Path(args.benchmark).write_text(json.dumps(result, indent=2))
    print(json.dumps(result, indent=2))
    return result


# ------------------------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str]) -> Args:
    """The flags; with --resume or --play, flags not given keep the values of the checkpoint."""

    def parse(default: Args) -> Args:
        complaint = io.StringIO()
        try:
            with contextlib.redirect_stderr(complaint):
                return tyro.cli(Args, args=argv, default=default, description=__doc__)
        except SystemExit as stop:
            if not stop.code:
                raise  # --help
            raise InputError(" ".join(re.sub(r"[^\x20-\x7e]+", " ", complaint.getvalue()).split())) from None

    args = parse(Args())
    modes = [name for name in ("resume", "play", "benchmark") if getattr(args, name)]
    require(len(modes) < 2, "--resume continues, --play plays and --benchmark measures: give one of them")
    require(bool(args.play) or not args.capture_video, "--capture-video films a checkpoint: give --play, after training")
    checkpoint = args.resume or args.play
    return resolve(parse(saved_args(checkpoint)) if checkpoint else args)


def saved_words(args: Args | None) -> str:
    """What an interrupted run leaves to go on from."""
    path = args and Path(args.run_dir) / "checkpoint.npz"
    if not path or not path.is_file():
        return "no checkpoint was written"
    return f"the run is saved, continue it with --resume {path}"


def main() -> int:
    args = None
    try:
        args = parse_args(sys.argv[1:])
        play(args) if args.play else benchmark(args) if args.benchmark else train(args)
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:  # the disk
        print(f"error: {error}; {saved_words(args)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"stopped: {saved_words(args)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
