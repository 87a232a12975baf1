"""Judge trained policies on one panel of seeds and perturbations, and write a folder of evidence.

    python eval_panel.py runs/A/checkpoint.pt                               # one policy
    python eval_panel.py runs/A/checkpoint.pt runs/B/checkpoint.pt          # two or more, compared on the same panel
    python eval_panel.py runs/A/checkpoint.pt --quick                       # a few episodes of everything, no film
    python eval_panel.py runs/A/checkpoint.pt --perturbations push mjx --episodes 512 --device cuda --out results/A

A cell is one checkpoint under one perturbation and one seed. The policy acts deterministically, and each environment
counts with its first episode. Episode k of a seed begins in the same state in every cell, a quadruped's with the same
command and heading, so that every difference is taken episode by episode. (Later commands of a quadruped may differ
under `timestep` and in `mujoco_c`.) The simulator is vecsim with the integrator of the MJCF, without the checkpoint's
own randomisation. `mujoco_c` is Gymnasium's environment; `mjx` is the task of ppo_mjx_jax.py. A task of your own
(my_task.py:Class) is judged in vecsim: an episode that lasts to the time limit is a success.

The folder can be read without running anything:

    postmortem.md   scores, failures and the worst episodes, in tables and a few sentences
    record.json     task, flags, checkpoints, versions, hardware, and what was left out and why
    episodes.csv    one row per episode: return, length, success, ..., and the label of a failure (LABELS)
    summary.csv     one row per checkpoint and perturbation: middles with 95% intervals, also of the differences from
                    `none` and from the first checkpoint
    worst.npz       traces of the worst episodes, "<checkpoint>/<perturbation>/<seed>/<episode>/<what>", (T, ...), in SI
                    units: time, qpos, qvel, action, unit_action (+-1 is the range), obs, reward; row t is before step t
    *.png, *.mp4    scores, failures and traces; the worst episode on film
    cells/          finished cells while the panel runs: the same command with the same --out continues from them

The middle of returns, lengths, speeds and velocity errors is the interquartile mean (Agarwal et al. 2021,
arXiv:2108.13264), which a few falls cannot move. The middle of shares (success, unsafe) is the mean. A difference is
the middle of the differences between episodes that began alike. Intervals are percentile bootstraps over the episodes
of all seeds; if one contains 0, no difference is shown. They do not cover the training: another run, another policy.

Needs vecsim_torch.py, the checkpoint's trainer, pandas and tabulate (`pip install pandas tabulate`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import inspect
import json
import math
import os
import re
import shlex
import shutil
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import mujoco
import numpy as np
import pandas as pd
import torch
import tyro
from gymnasium.wrappers import FrameStackObservation
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor
from tqdm import tqdm

import vecsim_torch as vecsim
from vecsim_torch import InputError

# ----------------------------------------------------------------------------------------------------------------------
# Arguments
# ----------------------------------------------------------------------------------------------------------------------


class Perturbation(NamedTuple):
    """One departure from the conditions of training."""

    words: str
    options: dict = {}  # of vecsim_torch.make
    simulator: str = "vecsim"
    sparse: bool = False  # the whole return is paid at the end


PERTURBATIONS = {
    "none": Perturbation("nothing changed"),
    "observation_noise": Perturbation(
        "uniform noise on each observation, +-0.1 in its own unit; for a quadruped, the noise of its sensors",
        dict(observation_noise=0.1),
    ),
    "action_delay": Perturbation("actions take effect 120 ms later", dict(action_delay_ms=120.0)),
    "friction": Perturbation("half the friction", dict(randomize={"friction": (0.5, 0.5)})),
    "mass": Perturbation("30% more mass and inertia", dict(randomize={"mass": (1.3, 1.3)})),
    "gravity": Perturbation("20% more gravity", dict(randomize={"gravity": (1.2, 1.2)})),
    "push": Perturbation(
        "pushed by 1 m/s in a random direction every 2 s",
        dict(randomize={"push": (1.0, 1.0), "push_interval": (2.0, 2.0)}),
    ),
    "timestep": Perturbation("25% longer control steps, of as many physics steps", dict(timestep_scale=1.25)),
    "sparse_reward": Perturbation("the return is paid at the end: checks the bookkeeping", sparse=True),
    "mujoco_c": Perturbation("Gymnasium's own environment, MuJoCo C in float64", simulator="mujoco_c"),
    "mjx": Perturbation("MuJoCo MJX in float32", simulator="mjx"),
}


@dataclasses.dataclass
class Args:
    """The panel: seeds x perturbations x episodes, for each checkpoint."""

    checkpoints: tyro.conf.Positional[tuple[str, ...]] = ()  # files that the trainers wrote, all of one task
    seeds: tuple[int, ...] = (3, 7, 11, 19, 23)  # seeds of initial states and disturbances (>= 0, all different)
    # names of PERTURBATIONS; `none` always runs, because the others are compared with it
    perturbations: tuple[str, ...] = tuple(PERTURBATIONS)
    episodes: int = 64  # episodes of a cell (>= 2)
    # environments simulated side by side, at most (>= 1); another number gives other initial states
    num_envs: int = 1024
    # where the simulator runs: auto (a GPU if there is one, else the CPU), cpu, cuda, cuda:N; policies use the CPU
    device: str = "auto"
    # compile vecsim's physics, anew for every perturbation; --no-compile starts at once and is many times slower
    compile: bool = True
    # integrator of every simulator; mjcf: that of the MJCF, as in Gymnasium
    integrator: Literal["mjcf", "euler", "implicitfast", "rk4"] = "mjcf"
    solver_iterations: int | None = None  # Newton iterations in vecsim and MJX (>= 1; default: the task's own)
    agent: int = 0  # which agent of a checkpoint of ppo_mjx_jax.py that holds several (>= 0)
    resamples: int = 2000  # draws of the bootstrap (>= 100)
    worst: int = 4  # worst episodes of each checkpoint to trace (>= 1)
    video: bool = True  # film the worst episode
    quick: bool = False  # a first look: 8 episodes a cell and no film
    out: str | None = None  # folder of the evidence (default: runs/panel__<env_id>__<time>)


def parse_args(argv: list[str]) -> Args:
    """Read and check the flags. InputError names the rule that is broken, on one line."""
    return check_args(vecsim.parse_flags(argv, Args(), __doc__))


def check_args(args: Args) -> Args:
    """The flags with --quick applied and the perturbations in the order of PERTURBATIONS."""
    if not args.checkpoints:
        raise InputError("give at least one checkpoint: python eval_panel.py runs/NAME/checkpoint.pt")
    if args.solver_iterations is not None and args.solver_iterations < 1:
        raise InputError(f"solver_iterations = {args.solver_iterations} must be >= 1")
    for name, least in dict(episodes=2, num_envs=1, agent=0, resamples=100, worst=1).items():
        if getattr(args, name) < least:
            raise InputError(f"{name} = {getattr(args, name)} must be >= {least}")
    if not args.seeds or min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        raise InputError(f"seeds = {args.seeds} must be at least one, all >= 0 and all different")
    for name in args.perturbations:
        if name not in PERTURBATIONS:
            raise InputError(f"unknown perturbation {name!r}; choose from {', '.join(PERTURBATIONS)}")
    ordered = tuple(name for name in PERTURBATIONS if name == "none" or name in args.perturbations)
    quick = dict(episodes=8, video=False) if args.quick else {}
    return dataclasses.replace(args, perturbations=ordered, device=str(vecsim.pick_device(args.device)), **quick)


# ----------------------------------------------------------------------------------------------------------------------
# The tasks, in words and in numbers
# ----------------------------------------------------------------------------------------------------------------------


class SafetyLimit(NamedTuple):
    """A step is safe if |x| <= limit for these rows of the state."""

    words: str
    group: str  # qpos or qvel
    rows: slice
    limit: float  # m, rad, m/s or rad/s


class Contract(NamedTuple):
    """What the panel needs to judge a task. Success also requires that the episode lasts to the time limit."""

    task: str  # what the policy observes; how it acts; what it earns; what ends an episode early
    safety: SafetyLimit | None
    traced: tuple[int, str]  # row of qpos that tells most at a glance, and its name
    least_speed: float | None = None  # m/s, mean over an episode
    largest_tracking: float | None = None  # m/s, mean error of the velocity
    observation_noise: float | None = None  # replaces the perturbation's
    options: dict = {}  # of vecsim_torch.make, on top of the checkpoint's

    def success(self) -> str:
        """When an episode is a success, in words."""
        words = "the time limit is reached"
        if self.least_speed is not None:
            words += f", at a mean forward speed of at least {self.least_speed:g} m/s"
        if self.largest_tracking is not None:
            words += f", with a mean velocity error of at most {self.largest_tracking:g} m/s"
        return words


def joint_speed(first: int, limit: float) -> SafetyLimit:
    return SafetyLimit(f"no joint turns faster than {limit:g} rad/s", "qvel", slice(first, None), limit)


RUN = (
    "joint angles and all speeds; joint torques; forward speed, less the squared action, plus a bonus for healthy steps"
)
WALK = (
    "sensors, command, last action; servo targets; follow the command smoothly; trunk on the ground or tilted 1.2 rad"
)
HEIGHT = (2, "torso height, m")
RAIL = SafetyLimit("the cart stays within 0.9 m of the middle of its 2 m rail", "qpos", slice(0, 1), 0.9)
CONTRACTS = {
    "InvertedPendulum-v5": Contract(
        "positions and speeds; force on the cart; 1 for each step; the pole leans more than 0.2 rad",
        RAIL, (1, "pole angle, rad"),
    ),
    "InvertedDoublePendulum-v5": Contract(
        "position, sines and cosines of the angles, speeds; force on the cart; 10 for each step, less the distance of "
        "the tip from its place above the middle; the tip falls under 1 m",
        RAIL, (1, "angle of the lower pole, rad"),
    ),
    "Reacher-v5": Contract(
        "angles and speeds of the arm, target; joint torques; minus distance to the target and squared action; never",
        joint_speed(0, 20.0), (0, "shoulder angle, rad"),
    ),
    "Pusher-v5": Contract(
        "angles and speeds of the arm, places of tip, object and goal; joint torques; minus the distances and the "
        "squared action; never",
        joint_speed(0, 20.0), (7, "place of the object along y, m"),
    ),
    "Hopper-v5": Contract(
        f"{RUN}; torso under 0.7 m or pitched over 0.2 rad",
        joint_speed(3, 20.0), (1, "torso height, m"), least_speed=1.0,
    ),
    "Walker2d-v5": Contract(
        f"{RUN}; torso outside 0.8 to 2 m or pitched over 1 rad",
        joint_speed(3, 20.0), (1, "torso height, m"), least_speed=1.0,
    ),
    "HalfCheetah-v5": Contract(
        "joint angles and all speeds; joint torques; forward speed, less 0.1 of the squared action; never",
        SafetyLimit("the torso stays within 1.57 rad of level: not on its back", "qpos", slice(2, 3), 1.57),
        (2, "torso pitch, rad"), least_speed=1.0,
    ),
    "Swimmer-v5": Contract(
        "joint angles and all speeds; joint torques; forward speed, less the squared action; never",
        joint_speed(3, 20.0), (2, "heading, rad"), least_speed=0.1,
    ),
    "Ant-v5": Contract(f"{RUN}; torso outside 0.2 to 1 m", joint_speed(6, 20.0), HEIGHT, least_speed=1.0),
    "Humanoid-v5": Contract(f"{RUN}; torso outside 1 to 2 m", joint_speed(6, 20.0), HEIGHT, least_speed=1.0),
    "HumanoidStandup-v5": Contract(
        "joint angles and all speeds; joint torques; height, less the squared action; never",
        joint_speed(6, 20.0), HEIGHT,
    ),
    "Quadruped-Flat": Contract(WALK, joint_speed(6, 30.0), HEIGHT, largest_tracking=0.3, observation_noise=1.0),
    "Quadruped-Rough": Contract(
        WALK, joint_speed(6, 30.0), HEIGHT, largest_tracking=0.5, observation_noise=1.0,
        options=dict(curriculum=False),  # every level of difficulty alike
    ),
}  # fmt: skip


def contract_of(env_id: str) -> Contract:
    """A row of CONTRACTS, or what the panel asks of a user's own task. InputError if there is no such task."""
    vecsim.find_task(env_id)
    return CONTRACTS.get(env_id) or Contract("see its file", None, (0, "first coordinate"))


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ----------------------------------------------------------------------------------------------------------------------

TRAINERS = {
    "ppo": "ppo_gpu_torch",
    "ppo_recurrent": "ppo_recurrent_gpu_torch",
    "sac": "sac_gpu_torch",
    "dqn": "dqn_gpu_torch",
    "distill": "ppo_distill_teacher_student",
    "ppo_mjx": "ppo_mjx_jax",
}  # the file that can read a checkpoint, by the checkpoint's field `algorithm`


class Subject(NamedTuple):
    """One policy on the panel."""

    label: str  # its name in every table: the algorithm or its stage, numbered where two are alike
    path: str
    env_id: str
    options: dict  # of the task, as the checkpoint was trained
    act: Callable  # act(obs (N, k), started (N,) bool) -> action (N, actions), tensors on the simulator's device
    observes: str  # obs, or critic_obs for a teacher
    env_steps: int
    sha256: str
    versions: dict


def load_checkpoint(path: str, args: Args) -> tuple[dict, Callable]:
    """The checkpoint and its policy, which takes and returns tensors on any device.

    InputError if the file cannot be read or no trainer here wrote it."""
    try:
        with zipfile.ZipFile(path) as archive:
            in_numpy = "header.npy" in archive.namelist()
        algorithm = "ppo_mjx" if in_numpy else str(torch.load(path, map_location="cpu", weights_only=True)["algorithm"])
    except Exception as error:  # torch.load raises many types
        raise InputError(f"checkpoint {path} cannot be read: {type(error).__name__}: {str(error)[:100]}") from None
    if algorithm not in TRAINERS:
        raise InputError(f"checkpoint {path} has the algorithm {algorithm!r}; the panel knows {', '.join(TRAINERS)}")
    trainer = importlib.import_module(TRAINERS[algorithm])
    try:
        checkpoint = trainer.load_checkpoint(path)
        policy = trainer.load_policy(checkpoint, args.agent) if in_numpy else trainer.load_policy(checkpoint)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        about = "" if path in str(error) else f"checkpoint {path}: "
        raise InputError(f"{about}{' '.join(str(error).split())[:300]}") from None

    @torch.no_grad()
    def act(obs: Tensor, started: Tensor) -> Tensor:
        inputs = [x.cpu().numpy() if in_numpy else x.cpu() for x in (obs, started)]
        return torch.as_tensor(policy(*inputs)).to(obs.device)

    return checkpoint, act


def load_subjects(args: Args) -> list[Subject]:
    """Every checkpoint's policy and task. InputError for a task or a mixture of tasks that cannot be judged."""
    loaded = [load_checkpoint(path, args) for path in args.checkpoints]
    names = [x.get("stage", x["args"].get("algorithm", x["algorithm"])) for x, _ in loaded]
    if args.agent and "ppo_mjx" not in names:
        raise InputError(f"agent = {args.agent}, but each of these checkpoints holds one agent; omit --agent")
    subjects = []
    for k, (path, (checkpoint, act)) in enumerate(zip(args.checkpoints, loaded, strict=True)):
        env_id = checkpoint["env_id"]
        label = f"{names[k]}-{names[: k + 1].count(names[k])}" if names.count(names[k]) > 1 else names[k]
        options = vecsim.gymnasium_options(checkpoint["args"]["env_kwargs"]) | contract_of(env_id).options
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        facts = checkpoint.get("observes", "obs"), checkpoint["env_steps"], digest, checkpoint["versions"]
        subject = Subject(label, path, env_id, options, act, *facts)
        subjects.append(subject)
        first, mine = ({n: x for n, x in s.options.items() if "observation" not in n} for s in (subjects[0], subject))
        if (env_id, mine) != (subjects[0].env_id, first):
            raise InputError(
                f"one panel, one task: {subjects[0].path} is of {subjects[0].env_id} with {first}, "
                f"{path} of {env_id} with {mine}; judge them separately"
            )
    return subjects


# ----------------------------------------------------------------------------------------------------------------------
# Simulators: reset, step and state of N robots, the same three for each
# ----------------------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """What one step of N robots gives, (N,) each except the observation. After a robot's end it means nothing."""

    seen: Tensor  # (N, k): obs or critic_obs, whichever the policy observes
    reward: Tensor
    terminated: Tensor  # bool
    truncated: Tensor  # bool
    invalid: Tensor  # bool: the simulation diverged
    speed: Tensor  # m/s forward; NaN if the task has none
    tracking: Tensor  # m/s, error of the velocity; NaN if the task commands none


class Vecsim:
    """vecsim under a perturbation."""

    def __init__(self, subject: Subject, perturbation: Perturbation, num_envs: int, args: Args):
        changes, noise = perturbation.options, contract_of(subject.env_id).observation_noise
        if noise is not None and "observation_noise" in changes:
            changes = changes | dict(observation_noise=noise)
        options = dict(device=args.device, compile=args.compile)
        options |= dict(integrator=args.integrator, iterations=args.solver_iterations)
        self.env = vecsim.make(subject.env_id, num_envs, **options | subject.options | changes)
        self.observes = subject.observes
        self.seconds = self.env.control_step
        low, high = (torch.as_tensor(x) for x in (self.env.single_action_space.low, self.env.single_action_space.high))
        bounded = torch.isfinite(high - low)
        self.centre = torch.where(bounded, (high + low) / 2, 0.0).to(self.env.device)
        self.half_range = torch.where(bounded, (high - low) / 2, 1.0).to(self.env.device)

    def unit_action(self, action: Tensor) -> Tensor:
        """The action in half ranges: +-1 are the ends of the range."""
        return (action - self.centre) / self.half_range

    def reset(self, seed: int) -> Tensor:
        """What the policy observes."""
        obs, info = self.env.reset(seed=seed)
        return self.look(obs, info)

    def look(self, obs: Tensor, info: dict) -> Tensor:
        return obs if self.observes == "obs" else info[self.observes]

    def state(self) -> tuple[Tensor, Tensor]:
        """qpos (nq, N) and qvel (nv, N)."""
        state = self.env.state()
        return state.qpos, state.qvel

    def memory(self) -> dict[str, Tensor]:
        """What the task remembers, (rows, N) by name: a quadruped's command, heading and more; empty for most tasks."""
        return self.env.state_dict()["carry"]["memory"]

    def start(self) -> Tensor:
        """(rows, N): everything that the panel gives an episode to begin with: state, command and heading."""
        memory, (qpos, qvel) = self.memory(), self.state()
        return torch.cat([qpos, qvel, *(memory[name].to(qpos) for name in ("command", "heading") if name in memory)])

    def step(self, action: Tensor) -> Step:
        obs, reward, terminated, truncated, info = self.env.step(action)
        missing = torch.full_like(reward, math.nan)
        speed, tracking = (info.get(name, missing) for name in ("x_velocity", "velocity_error"))
        return Step(self.look(obs, info), reward, terminated, truncated, info["invalid"], speed, tracking)


class MujocoC(Vecsim):
    """Gymnasium's own environments, from vecsim's initial states (to float32) and under its first commands."""

    def __init__(self, subject: Subject, perturbation: Perturbation, num_envs: int, args: Args):
        if not vecsim.gymnasium_id(subject.env_id):
            raise ValueError(f"Gymnasium has no {subject.env_id}")
        super().__init__(subject, perturbation, num_envs, dataclasses.replace(args, compile=False))
        make = vecsim.gymnasium_maker(subject.env_id, subject.options, disable_env_checker=True)
        self.robots = [make() for _ in range(num_envs)]
        if args.integrator != "mjcf":
            for robot in self.robots:
                robot.unwrapped.model.opt.integrator = getattr(mujoco.mjtIntegrator, f"mjINT_{args.integrator.upper()}")

    def reset(self, seed: int) -> Tensor:
        """vecsim's observation, which equals Gymnasium's in the same state. A commanded robot begins with vecsim's
        command and heading, and draws the later ones with its own seed."""
        seen, memory = super().reset(seed), super().memory()
        qpos, qvel = (x.T.double().cpu().numpy() for x in super().state())
        for k, (robot, position, velocity) in enumerate(zip(self.robots, qpos, qvel, strict=True)):
            robot.reset(seed=vecsim.stream_seed(seed, k, 1))
            robot.unwrapped.set_state(position, velocity)
            frames = robot.env  # past observations, where the policy sees through `vecsim_torch.partly_observed`
            if isinstance(frames, FrameStackObservation):
                newest = seen[k, -frames.observation_space.shape[1] :].cpu().numpy()
                frames.obs_queue.extend([newest] * frames.stack_size)
            if memory:
                robot.unwrapped.memory = {name: rows[:, k : k + 1].double() for name, rows in memory.items()}
        self.seen, self.ended = seen.cpu().numpy().copy(), np.zeros(len(self.robots), bool)
        return seen

    def state(self) -> tuple[Tensor, Tensor]:
        datas = [robot.unwrapped.data for robot in self.robots]
        rows = np.stack([data.qpos for data in datas], 1), np.stack([data.qvel for data in datas], 1)
        qpos, qvel = (torch.as_tensor(x).float().to(self.env.device) for x in rows)
        return qpos, qvel

    def memory(self) -> dict[str, Tensor]:
        memories = [getattr(robot.unwrapped, "memory", {}) for robot in self.robots]
        return {name: torch.cat([memory[name] for memory in memories], 1).float() for name in memories[0]}

    def step(self, action: Tensor) -> Step:
        numbers = np.zeros((3, len(self.robots)))  # reward, speed, tracking
        ends = np.zeros((2, len(self.robots)), bool)  # terminated, truncated
        for k in np.flatnonzero(~self.ended):
            obs, reward, terminated, truncated, info = self.robots[k].step(action[k].cpu().numpy())
            self.seen[k] = self.look(obs, info)
            numbers[:, k] = reward, *(info.get(name, math.nan) for name in ("x_velocity", "velocity_error"))
            ends[:, k] = terminated, truncated and not terminated
        self.ended |= ends.any(0)
        seen, numbers, ends = (torch.as_tensor(x).to(action.device) for x in (self.seen.copy(), numbers, ends))
        reward, speed, tracking = numbers.float()
        terminated, truncated = ends
        return Step(seen, reward, terminated, truncated, torch.zeros_like(terminated), speed, tracking)


class Mjx(Vecsim):
    """MuJoCo MJX, from vecsim's initial states."""

    def __init__(self, subject: Subject, perturbation: Perturbation, num_envs: int, args: Args):
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs some of the GPU's memory
        trainer = importlib.import_module("ppo_mjx_jax")
        if subject.env_id not in trainer.TASKS:
            raise ValueError(f"ppo_mjx_jax.py has no {subject.env_id}")
        super().__init__(subject, perturbation, num_envs, dataclasses.replace(args, compile=False))
        options, self.columns, *past = vecsim.split_view(subject.env_id, subject.options)
        if past != [1, 0]:
            raise ValueError("ppo_mjx_jax.py shows no past observations")
        settings = trainer.Args(
            env_id=subject.env_id, env_kwargs=options, self_collision=True, device=args.device.split(":")[0],
            integrator=args.integrator, solver_iterations=self.env.settings.iterations, ls_iterations=8,
        )  # fmt: skip
        trainer.configure(settings)
        task = trainer.make_task(settings)
        self.limit = task.max_episode_steps
        self.begin = trainer.jax.jit(trainer.jax.vmap(functools.partial(trainer.state_at, task)))
        self.advance = trainer.jax.jit(trainer.jax.vmap(functools.partial(trainer.task_step, task)))
        self.has_speed = contract_of(subject.env_id).least_speed is not None

    def to_torch(self, x) -> Tensor:
        return torch.as_tensor(np.array(x)).to(self.env.device)

    def reset(self, seed: int) -> Tensor:
        super().reset(seed)
        self.robots, obs = self.begin(*(x.T.cpu().numpy() for x in super().state()))
        self.age = 0
        return self.to_torch(obs)[:, self.columns]

    def state(self) -> tuple[Tensor, Tensor]:
        return self.to_torch(self.robots.qpos).T, self.to_torch(self.robots.qvel).T

    def step(self, action: Tensor) -> Step:
        before, self.age = self.robots.x_position, self.age + 1
        self.robots, *outcome = self.advance(self.robots, action.cpu().numpy())
        obs, reward, terminated = (self.to_torch(x) for x in outcome)
        missing = torch.full_like(reward, math.nan)
        speed = self.to_torch((self.robots.x_position - before) / self.seconds) if self.has_speed else missing
        invalid = ~(torch.isfinite(obs).all(1) & torch.isfinite(reward) & (obs.abs().amax(1) < vecsim.RUNAWAY))
        truncated = torch.full_like(terminated, self.age >= self.limit) & ~terminated
        return Step(obs[:, self.columns], reward, terminated & ~invalid, truncated | invalid, invalid, speed, missing)


def open_simulator(subject: Subject, name: str, args: Args) -> Vecsim:
    """The simulator of a perturbation. ValueError or ImportError if the task or this machine has no such thing."""
    perturbation, num_envs = PERTURBATIONS[name], min(args.num_envs, args.episodes)
    if subject.observes == "critic_obs" and "observation_noise" in perturbation.options:
        raise ValueError(f"{subject.label} reads privileged observations, which have no noise")
    back_end = dict(vecsim=Vecsim, mujoco_c=MujocoC, mjx=Mjx)[perturbation.simulator]
    return back_end(subject, perturbation, num_envs, args)


# ----------------------------------------------------------------------------------------------------------------------
# Episodes
# ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def run_batch(
    subject: Subject, simulator: Vecsim, seed: int, watched: tuple[int, ...] = (), sparse: bool = False
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The first episode of each of N robots, and traces of the watched ones.

    Episodes: (N,) each, and `start` (N, rows). Traces: (T, watched, ...), of which the first `length` rows count.
    """
    safety, seen = contract_of(subject.env_id).safety, simulator.reset(seed)
    start, running = simulator.start(), torch.ones(len(seen), dtype=torch.bool, device=seen.device)
    started, zero = running, torch.zeros(len(seen), dtype=torch.float64, device=seen.device)
    sums = dict.fromkeys(("return", "length", "speed", "tracking", "unsafe", "saturation"), zero)
    ends = dict.fromkeys(("terminated", "survived", "invalid"), ~running)
    held, traces = zero, {name: [] for name in ("qpos", "qvel", "action", "obs", "reward")}
    while running.any():  # host sync
        qpos, qvel = simulator.state()
        action = subject.act(seen, started)
        step = simulator.step(action)
        over = step.terminated | step.truncated | step.invalid
        reward = step.reward.double()
        if sparse:  # hold every reward back until the end
            held = held + torch.where(step.invalid, 0.0, reward)
            reward = torch.where(over, held, 0.0)
        amounts = {"return": reward, "length": torch.ones_like(zero), "speed": step.speed, "tracking": step.tracking}
        amounts["unsafe"] = torch.full_like(zero, math.nan)
        if safety:
            limited = dict(qpos=qpos, qvel=qvel)[safety.group][safety.rows]
            amounts["unsafe"] = (limited.abs() > safety.limit).any(0).double()
        amounts["saturation"] = (simulator.unit_action(action).abs() >= 0.99).double().mean(1)
        counted = running & ~step.invalid
        for name, amount in amounts.items():
            sums[name] = sums[name] + torch.where(running if name == "length" else counted, amount, 0.0)
        now = dict(terminated=step.terminated, survived=step.truncated & ~step.invalid, invalid=step.invalid)
        ends = {name: ends[name] | (running & x) for name, x in now.items()}
        columns = dict(qpos=qpos.T, qvel=qvel.T, action=action, obs=seen, reward=step.reward)
        for name, x in columns.items() if watched else ():
            traces[name].append(x[list(watched)].cpu().numpy())
        seen, running, started = step.seen, running & ~over, over
    episodes = {name: x / sums["length"] for name, x in sums.items()}
    episodes |= {"return": sums["return"], "length": sums["length"], "seconds": sums["length"] * simulator.seconds}
    episodes |= ends | dict(start=start.T)
    traces = {name: np.stack(rows) for name, rows in traces.items() if rows}
    return {name: x.cpu().numpy() for name, x in episodes.items()}, traces


def run_cell(subject: Subject, simulator: Vecsim, name: str, seed: int, args: Args) -> dict[str, np.ndarray]:
    """args.episodes episodes of one seed, in as many batches as needed; their success and a digest of their starts."""
    contract, n, sparse = contract_of(subject.env_id), min(args.num_envs, args.episodes), PERTURBATIONS[name].sparse
    parts = []
    for batch in range(math.ceil(args.episodes / n)):
        parts.append(run_batch(subject, simulator, vecsim.stream_seed(seed, batch, 0), sparse=sparse)[0])
    cell = {what: np.concatenate([part[what] for part in parts])[: args.episodes] for what in parts[0]}
    success = cell["survived"].copy()
    if contract.least_speed is not None:
        success &= cell["speed"] >= contract.least_speed
    if contract.largest_tracking is not None:
        success &= cell["tracking"] <= contract.largest_tracking
    digest = hashlib.sha256(np.ascontiguousarray(cell.pop("start"), np.float32)).hexdigest()
    return cell | dict(success=success, start=np.array(digest))


Cells = dict[tuple[str, str, int], dict[str, np.ndarray]]  # by checkpoint's label, perturbation and seed


def run_panel(subjects: list[Subject], args: Args, folder: Path) -> tuple[Cells, dict[str, str]]:
    """All cells, including those in `folder`, and why perturbations were left out: "NAME", or "NAME, LABEL" for one
    checkpoint. A perturbation that one checkpoint cannot run is left out for it alone."""
    folder.mkdir(parents=True, exist_ok=True)
    cells, left_out = {}, {name: "not asked for" for name in PERTURBATIONS if name not in args.perturbations}
    flags = [args.episodes, args.num_envs, args.integrator, args.solver_iterations, args.device, args.agent]
    flags.append(args.compile)
    total = len(subjects) * len(args.perturbations) * len(args.seeds)
    with tqdm(total=total, unit=" cells", disable=not sys.stderr.isatty()) as bar:
        for name in args.perturbations:
            for subject in subjects:
                files = simulator_hash(subject.env_id, PERTURBATIONS[name].simulator)
                facts = [subject.sha256, files, torch.__version__, *PERTURBATIONS[name], *flags]
                code = hashlib.sha256(repr(facts).encode()).hexdigest()[:12]
                paths = {seed: folder / f"{subject.label}--{name}--{seed}--{code}.npz" for seed in args.seeds}
                missing = [seed for seed, path in paths.items() if not path.exists()]
                bar.set_postfix_str(f"{subject.label}, {name}")
                try:
                    simulator = open_simulator(subject, name, args) if missing else None
                except (ValueError, ImportError) as error:
                    if name == "none":
                        raise InputError(str(error)) from error
                    left_out[f"{name}, {subject.label}"] = " ".join(str(error).split())
                    bar.update(len(args.seeds))
                    continue
                for seed in missing:
                    partial = folder / "partial.npz"
                    np.savez(partial, **run_cell(subject, simulator, name, seed, args))
                    partial.replace(paths[seed])
                for seed, path in paths.items():
                    with np.load(path, allow_pickle=False) as file:
                        cells[subject.label, name, seed] = {column: file[column] for column in file.files}
                bar.update(len(args.seeds))
    check_same_starts(cells)
    return cells, left_out


def simulator_hash(env_id: str, simulator: str = "vecsim") -> str:
    """Of the files that simulate a task: vecsim, those of the task and of the tasks that it extends, and its MJCF."""
    file, kind = Path(vecsim.__file__), vecsim.find_task(env_id)
    files = [file, *(Path(inspect.getsourcefile(cls)) for cls in kind.__mro__ if issubclass(cls, vecsim.Task))]
    files += [file.with_name("ppo_mjx_jax.py")] if simulator == "mjx" else []
    source = vecsim.build_task(env_id, {}).source()
    parts = [source.read_bytes() if isinstance(source, Path) else source.encode()]
    return hashlib.sha256(b"".join(parts + [file.read_bytes() for file in files if file.exists()])).hexdigest()


def check_same_starts(cells: Cells) -> None:
    """RuntimeError if a seed's episodes in one simulator did not begin alike: then nothing could be compared."""
    starts = {}
    for (label, name, seed), cell in cells.items():
        place = PERTURBATIONS[name].simulator, seed
        (first_label, first_name), first = starts.setdefault(place, ((label, name), str(cell["start"])))
        if str(cell["start"]) != first:
            raise RuntimeError(f"{label} began {name}, seed {seed}, otherwise than {first_label} began {first_name}")


# ----------------------------------------------------------------------------------------------------------------------
# Labels and statistics
# ----------------------------------------------------------------------------------------------------------------------

LABELS = {  # a failure gets the first label that holds
    "quarantined": "the simulation diverged",
    "twin succeeded": "without the perturbation, the episode from the same start succeeded: it is to blame",
    "fell": "the task terminated the episode",
    "too slow": "the time limit was reached, but too slowly or too far from the commanded velocity",
}
LABEL_COLOURS = dict(zip(LABELS, ("#777777", "#228833", "#cc3311", "#ee9922"), strict=True))
MEASURED = (
    "return", "length", "seconds", "success", "survived", "terminated", "invalid", "speed", "tracking", "unsafe",
    "saturation",
)  # fmt: skip
METRICS = ("return", "success", "length", "speed", "tracking", "unsafe")


def episode_table(cells: Cells) -> pd.DataFrame:
    """One row per episode, in the columns of episodes.csv."""
    tables = []
    for (label, name, seed), cell in cells.items():
        row = dict(checkpoint=label, perturbation=name, simulator=PERTURBATIONS[name].simulator, seed=seed)
        row |= dict(episode=np.arange(len(cell["success"])))
        table = pd.DataFrame(row | {column: cell[column] * 1 for column in MEASURED})  # * 1: True is 1
        twin = cells[label, "none", seed]["success"]
        rules = [cell["success"], cell["invalid"], twin, cell["terminated"]]
        table["label"] = np.select(rules, ["", *list(LABELS)[:3]], "too slow")
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def estimate(values: np.ndarray, metric: str, resamples: int) -> tuple[float, float, float]:
    """The middle of values (episodes,) and the ends of its 95% interval; NaN if a value is missing."""
    if np.isnan(values).any():
        return (math.nan,) * 3
    middle = np.mean if metric in ("success", "unsafe") else functools.partial(stats.trim_mean, proportiontocut=0.25)
    drawn = stats.bootstrap((values,), middle, n_resamples=resamples, method="percentile", rng=0, batch=500)
    return float(middle(values)), float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)


def summarize(episodes: pd.DataFrame, resamples: int) -> pd.DataFrame:
    """One row per checkpoint and perturbation, in the columns of summary.csv. A difference without a twin is NaN."""
    groups = {pair: group for pair, group in episodes.groupby(["checkpoint", "perturbation"], sort=False)}
    first, several, rows = episodes["checkpoint"].iloc[0], episodes["checkpoint"].nunique() > 1, []
    for (label, name), group in groups.items():
        row = dict(checkpoint=label, perturbation=name, simulator=PERTURBATIONS[name].simulator)
        row |= dict(seeds=group["seed"].nunique(), episodes=len(group))
        columns = {metric: (metric, None) for metric in METRICS}
        for metric in ("return", "success"):
            columns[f"{metric}_change_from_none"] = metric, (label, "none")
            columns |= {f"{metric}_beyond_{first}": (metric, (first, name))} if several else {}
        for column, (metric, twin) in columns.items():
            values = group[metric].to_numpy(float)
            if twin is not None:
                values = values - (groups[twin][metric].to_numpy(float) if twin in groups else math.nan)
            ends = (column, f"{column}_low", f"{column}_high")
            row |= dict(zip(ends, estimate(values, metric, resamples), strict=True))
        rows.append(row)
    return pd.DataFrame(rows)


# ----------------------------------------------------------------------------------------------------------------------
# The worst episodes, traced
# ----------------------------------------------------------------------------------------------------------------------


def choose_worst(episodes: pd.DataFrame, count: int) -> pd.DataFrame:
    """The lowest returns of failures, or of all if none failed: first one of each label, then any."""
    failures = episodes[episodes["success"] == 0]
    ordered = (failures if len(failures) else episodes).sort_values("return", kind="stable")
    chosen = pd.concat([ordered.drop_duplicates("label"), ordered])
    return chosen[~chosen.index.duplicated()].head(count).sort_values("return", kind="stable")


def trace_worst(subjects: list[Subject], episodes: pd.DataFrame, args: Args) -> list[dict]:
    """The chosen rows, with the replayed episode as `trace`, its return as `replay_return`, and vecsim's `env`."""
    traced = []
    for subject in subjects:
        own = episodes[episodes["checkpoint"] == subject.label]
        for row in choose_worst(own, args.worst).to_dict("records"):
            name, simulator = row["perturbation"], open_simulator(subject, row["perturbation"], args)
            batch, place = divmod(row["episode"], min(args.num_envs, args.episodes))
            seed = vecsim.stream_seed(row["seed"], batch, 0)
            replay, traces = run_batch(subject, simulator, seed, (place,), PERTURBATIONS[name].sparse)
            length = int(replay["length"][place])
            trace = {what: x[:length, 0] for what, x in traces.items()}
            trace["time"] = np.arange(length) * simulator.seconds
            action = torch.as_tensor(trace["action"], device=simulator.env.device)
            trace["unit_action"] = simulator.unit_action(action).cpu().numpy()
            traced.append(row | dict(trace=trace, replay_return=replay["return"][place].item(), env=simulator.env))
    return traced


def episode_name(row: dict) -> str:
    return f"{row['checkpoint']}/{row['perturbation']}/{row['seed']}/{row['episode']}"


# ----------------------------------------------------------------------------------------------------------------------
# Pictures
# ----------------------------------------------------------------------------------------------------------------------


def plot_scores(path: Path, summary: pd.DataFrame, title: str) -> None:
    """Middle return and success rate of each checkpoint under each perturbation, with their intervals."""
    names, labels = list(summary["perturbation"].unique()), list(summary["checkpoint"].unique())
    figure = Figure(figsize=(10, 1.6 + 0.42 * len(names)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, metric, scale in ((axes[0], "return", 1.0), (axes[1], "success", 100.0)):
        for k, label in enumerate(labels):
            rows = summary[summary["checkpoint"] == label]
            middle, low, high = (scale * rows[f"{metric}{end}"].to_numpy() for end in ("", "_low", "_high"))
            place = [names.index(name) + 0.22 * (k - (len(labels) - 1) / 2) for name in rows["perturbation"]]
            errors = np.abs([middle - low, high - middle])
            axis.errorbar(middle, place, xerr=errors, fmt="o", color=f"C{k}", ms=5, capsize=2.5, label=label)
            axis.axvline(middle[0], color=f"C{k}", lw=0.8, ls=":")
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("return, interquartile mean")
    axes[1].set(xlabel="success, % of episodes", xlim=(-3, 103))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(f"{title}: 95% intervals; dotted: undisturbed", x=0.01, ha="left", fontsize=11)
    figure.savefig(path, dpi=130)


def failure_table(episodes: pd.DataFrame) -> pd.DataFrame:
    """How many episodes failed: one row per checkpoint and perturbation, one column per label."""
    index = [episodes["checkpoint"], episodes["perturbation"]]
    pairs = pd.MultiIndex.from_frame(episodes[["checkpoint", "perturbation"]].drop_duplicates())
    return pd.crosstab(index, episodes["label"]).reindex(pairs).reindex(columns=list(LABELS), fill_value=0)


def plot_failures(path: Path, episodes: pd.DataFrame, title: str) -> None:
    """Share of failed episodes under each perturbation, by label, one panel per checkpoint."""
    counts, total = failure_table(episodes), episodes.groupby(["checkpoint", "perturbation"]).size()
    shares, labels = 100 * counts.div(total, axis=0).reindex(counts.index), list(episodes["checkpoint"].unique())
    figure = Figure(figsize=(2.2 + 4.2 * len(labels), 1.9 + 0.36 * len(shares) / len(labels)), layout="constrained")
    axes = figure.subplots(1, len(labels), squeeze=False)[0]
    for axis, label in zip(axes, labels, strict=True):
        shares.loc[label].plot.barh(ax=axis, stacked=True, color=LABEL_COLOURS, width=0.7, legend=False)
        axis.invert_yaxis()
        axis.set(title=label, xlabel="failed episodes, %", ylabel="", xlim=(0, 100))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.savefig(path, dpi=130)


def plot_worst(path: Path, traced: list[dict], contract: Contract) -> None:
    """Of each traced episode: reward of each step, one telling coordinate, and the actions, over time."""
    figure = Figure(figsize=(11, 0.6 + 1.55 * len(traced)), layout="constrained")
    axes = figure.subplots(len(traced), 3, squeeze=False, sharex="row")
    coordinate, coordinate_name = contract.traced
    for line, row in zip(axes, traced, strict=True):
        trace, colour = row["trace"], LABEL_COLOURS.get(row["label"], "#4477aa")
        line[0].plot(trace["time"], trace["reward"], color=colour, lw=0.9)
        line[1].plot(trace["time"], trace["qpos"][:, coordinate], color=colour, lw=1.1)
        line[2].plot(trace["time"], trace["unit_action"].clip(-1, 1), color=colour, lw=0.7, alpha=0.8)
        line[2].set_ylim(-1.1, 1.1)
        line[0].set_title(f"{episode_name(row)}: {row['label'] or 'success'}", loc="left", fontsize=9)
        for axis in line:
            axis.grid(alpha=0.25)
            axis.tick_params(labelsize=7)
    names = "reward per step", coordinate_name, "actions, clipped to +-1 of their range"
    for axis, name in zip(axes[-1], names, strict=True):
        axis.set_xlabel(f"s\n{name}", fontsize=9)
    figure.savefig(path, dpi=130)


def film(path: Path, row: dict) -> str:
    """Draw the last 10 s of a traced episode; returns what the film shows. Raises what MuJoCo's renderers raise."""
    import imageio.v2 as imageio

    if "DISPLAY" not in os.environ:
        # Without a screen MuJoCo draws through EGL; where that is missing too, set MUJOCO_GL=osmesa.
        os.environ.setdefault("MUJOCO_GL", "egl")
    renderer, seconds = vecsim.make_renderer(row["env"]), row["env"].control_step
    states = row["trace"]["qpos"][-round(10 / seconds) :]
    slower = max(1, math.ceil(2.0 / (len(states) * seconds)))  # stretch a short fall to about 2 s
    every = max(1, round(0.04 / slower / seconds))
    frames = []
    for qpos in states[::every]:
        renderer.data.qpos[:] = qpos
        mujoco.mj_forward(renderer.model, renderer.data)
        frames.append(renderer.render("rgb_array"))
    renderer.close()
    imageio.mimwrite(path, frames, fps=1 / (every * seconds * slower), macro_block_size=8)
    slowed = f", {slower} times slower" if slower > 1 else ""
    return f"the last {len(states) * seconds:.1f} s of {episode_name(row)}{slowed}"


# ----------------------------------------------------------------------------------------------------------------------
# The record and the page
# ----------------------------------------------------------------------------------------------------------------------


def sized(x: float) -> str:
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x + 0.0:.3g}"  # + 0.0: no -0


def with_interval(row: pd.Series, name: str, scale: float = 1.0, unit: str = "") -> str:
    middle, low, high = (sized(scale * row[f"{name}{end}"]) for end in ("", "_low", "_high"))
    return f"{middle}{unit} [{low}, {high}]"


def verdict(row: pd.Series, name: str) -> int:
    """1 or -1 if the interval of a difference excludes 0, else 0: no difference shown."""
    return int(row[f"{name}_low"] > 0) - int(row[f"{name}_high"] < 0)


def sentences(summary: pd.DataFrame) -> list[str]:
    """What happened: two sentences about each checkpoint, and one that compares it with the first."""
    lines, first = [], summary["checkpoint"].iloc[0]
    for label, rows in summary.groupby("checkpoint", sort=False):
        undisturbed, changes = rows.iloc[0], ("return_change_from_none", "success_change_from_none")
        lines.append(
            f"**{label}**, undisturbed: return {with_interval(undisturbed, 'return')}, success "
            f"{with_interval(undisturbed, 'success', 100, '%')} of {undisturbed['episodes']:,} episodes."
        )
        worse = [row for _, row in rows.iterrows() if -1 in [verdict(row, name) for name in changes]]
        if worse:
            weakest = min(worse, key=lambda row: (row["success"], row["return"]))
            names = ", ".join(row["perturbation"] for row in worse)
            lines.append(
                f"**{label}** is worse under {names}; weakest under {weakest['perturbation']}: success "
                f"{with_interval(weakest, 'success', 100, '%')}, return changed by "
                f"{with_interval(weakest, 'return_change_from_none')}."
            )
        elif len(rows) > 1:
            lines.append(f"**{label}**: no drop of return or success is shown under any perturbation.")
        if label != first:
            column = f"return_beyond_{first}"
            compared = [row for _, row in rows.iterrows() if not math.isnan(row[column])]
            parts = []
            for sign, words in ((1, "more"), (-1, "less"), (0, "no difference shown")):
                names = [row["perturbation"] for row in compared if verdict(row, column) == sign]
                parts += [f"{words} under {', '.join(names)}"] if names else []
            lines.append(f"**{label}** against **{first}**, return, paired by episode: {'; '.join(parts)}.")
    return lines


def score_table(summary: pd.DataFrame) -> pd.DataFrame:
    """The scores with their intervals, as texts."""
    columns = {"return": ("return", 1, ""), "success": ("success", 100, "%"), "unsafe steps": ("unsafe", 100, "%")}
    columns["velocity error"] = ("tracking", 1, " m/s")
    columns = {words: column for words, column in columns.items() if summary[column[0]].notna().any()}
    rows = []
    for _, row in summary.iterrows():
        shown = verdict(row, "return_change_from_none")
        change = with_interval(row, "return_change_from_none") if shown else "no difference shown"
        cells = {words: with_interval(row, *column) for words, column in columns.items()}
        place = dict(perturbation=row["perturbation"], checkpoint=row["checkpoint"])
        rows.append(place | cells | {"change of return": "" if row["perturbation"] == "none" else change})
    return pd.DataFrame(rows)


def describe_worst(row: dict) -> str:
    """One line about a traced episode."""
    exact = row["replay_return"] == row["return"]
    replay = "" if exact else f"; its replay returned {sized(row['replay_return'])}, so the trace is of a sibling"
    return (
        f"- `{episode_name(row)}`, **{row['label'] or 'success'}**: return {sized(row['return'])} after "
        f"{row['length']:,.0f} steps ({row['seconds']:.1f} s){replay}."
    )


def write_page(path: Path, record: dict, summary: pd.DataFrame, episodes: pd.DataFrame, traced: list[dict]) -> None:
    """postmortem.md, the page that a reader opens first."""
    failed = failure_table(episodes)
    failed = failed[failed.sum(axis=1) > 0].reset_index()
    left_out = [f"- Left out: {name}: {reason}." for name, reason in record["left_out"].items()]
    flags = record["configuration"]
    parts = [
        f"# {record['env_id']}: {' against '.join(summary['checkpoint'].unique())}",
        f"{len(episodes):,} episodes: seeds {', '.join(map(str, flags['seeds']))}, {flags['episodes']} episodes each, "
        f"{summary['perturbation'].nunique()} conditions; {record['hardware']}. Made by `{record['command']}`.",
        "\n".join(f"- **{x['label']}** is `{x['path']}`" for x in record["checkpoints"]),
        "## What happened",
        "\n".join(f"- {line}" for line in sentences(summary)),
        "![scores](scores.png)",
        score_table(summary).to_markdown(index=False, disable_numparse=True),
        "## How it failed",
        "![failures](failures.png)",
        failed.to_markdown(index=False) if len(failed) else "No episode failed.",
        "A failure gets the first label that holds:",
        "\n".join(f"- **{label}**: {rule}." for label, rule in LABELS.items()),
        "## The worst episodes",
        "\n".join(describe_worst(row) for row in traced),
        "![worst](worst.png)",
        f"Film: {record['film']}.",
        "## The task",
        "\n".join(f"- {name.replace('_', ' ').capitalize()}: {text}" for name, text in record["task"].items()),
        "## Limits",
        "- Returns and velocity errors are interquartile means; success and unsafe steps are means.\n"
        "- A change is the middle of the differences between episodes that began alike.\n"
        "- Intervals are 95%, over initial states and disturbances. Another training run gives another policy.\n"
        "- If no episode of n failed, or all did, the interval has no width, but the true rate may be 3/n off.\n"
        "- Of many intervals, one in twenty excludes 0 by chance.\n"
        f"- Integrator: {record['integrator']}.",
        "\n".join(left_out),
    ]
    path.write_text("\n\n".join(part for part in parts if part) + "\n")


def make_record(subjects: list[Subject], args: Args, left_out: dict[str, str], cells: Cells) -> dict:
    """record.json, except the film and the time taken."""
    first, contract = subjects[0], contract_of(subjects[0].env_id)
    env = open_simulator(first, "none", args).env
    limit, jax = env.settings.max_episode_steps, {}
    for name in ("jax", "jaxlib", "mujoco-mjx"):  # from the packages' metadata: importing jax would take GPU memory
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            jax[name] = importlib.metadata.version(name)
    return dict(
        env_id=first.env_id,
        task=dict(
            observes_acts_earns_ends=contract.task,
            success=contract.success(),
            safety_constraint=contract.safety.words if contract.safety else "none",
            time_limit=f"{limit:,} steps, {limit * env.control_step:g} s",
            control_step=f"{env.control_step:g} s, {env.task.frame_skip} physics steps",
            options=first.options,
        ),
        command=shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        configuration=dataclasses.asdict(args),
        perturbations={name: PERTURBATIONS[name]._asdict() for name in args.perturbations},
        integrator=env.settings.integrator,
        left_out=left_out,
        checkpoints=[{name: x for name, x in subject._asdict().items() if name != "act"} for subject in subjects],
        initial_states={f"{name}, seed {seed}": str(cell["start"])[:16] for (_, name, seed), cell in cells.items()},
        versions=vecsim.versions() | jax,
        simulator=simulator_hash(first.env_id),
        hardware=vecsim.cpu_name() if args.device == "cpu" else torch.cuda.get_device_name(args.device),
        threads=torch.get_num_threads(),
    )


# ----------------------------------------------------------------------------------------------------------------------
# Main
# ----------------------------------------------------------------------------------------------------------------------


def evaluate(args: Args) -> Path:
    """Run the panel and write its folder, whose path is returned."""
    began = time.perf_counter()
    subjects = load_subjects(args)
    task = re.sub(r"[^\w.-]+", "-", subjects[0].env_id)  # it may be a file: path/to/robot.py:Task
    out = Path(args.out or f"runs/panel__{task}__{time.strftime('%Y%m%d-%H%M%S')}")
    if (out / "postmortem.md").exists() or out.is_file():
        raise InputError(f"out = {out} holds a finished panel or is a file; choose another folder")
    args = dataclasses.replace(args, out=str(out))
    total = len(subjects) * len(args.perturbations) * len(args.seeds)
    words = f"{total} cells of {args.episodes} episodes into {out}; --out {out} continues after an interruption"
    print(words, flush=True)
    cells, left_out = run_panel(subjects, args, out / "cells")
    episodes = episode_table(cells)
    episodes.to_csv(out / "episodes.csv", index=False, float_format="%.6g")
    summary = summarize(episodes, args.resamples)
    summary.to_csv(out / "summary.csv", index=False, float_format="%.6g")
    traced = trace_worst(subjects, episodes, args)
    arrays = {f"{episode_name(row)}/{name}": x for row in traced for name, x in row["trace"].items()}
    np.savez_compressed(out / "worst.npz", **arrays)
    title = f"{subjects[0].env_id}, {' against '.join(subject.label for subject in subjects)}"
    plot_scores(out / "scores.png", summary, title)
    plot_failures(out / "failures.png", episodes, title)
    plot_worst(out / "worst.png", traced, contract_of(subjects[0].env_id))
    record = make_record(subjects, args, left_out, cells) | dict(film="not asked for")
    if args.video:
        try:
            worst = min(traced, key=lambda row: (row["success"], row["return"]))
            record["film"] = f"[{film(out / 'worst.mp4', worst)}](worst.mp4)"
        except Exception as error:  # MuJoCo's back ends raise many types where there is nothing to draw with
            record["film"] = f"none, because MuJoCo cannot draw here ({' '.join(str(error).split())[:120]})"
    record["seconds"] = round(time.perf_counter() - began, 1)
    (out / "record.json").write_text(json.dumps(record, indent=2) + "\n")
    write_page(out / "postmortem.md", record, summary, episodes, traced)
    shutil.rmtree(out / "cells")
    print("\n".join(sentences(summary)))
    print(f"evidence: {out / 'postmortem.md'}")
    return out


def main() -> int:
    try:
        evaluate(parse_args(sys.argv[1:]))
    except (InputError, OSError) as error:  # a user's mistake, or a full disk
        tqdm.write(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130  # as shells report a process that Ctrl-C ended
    return 0


if __name__ == "__main__":
    sys.exit(main())
