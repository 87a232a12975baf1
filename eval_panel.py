"""Judges trained policies: one panel of seeds and perturbations, the same for every checkpoint, and one folder of evidence.

    python eval_panel.py runs/A/checkpoint.pt                               # one policy
    python eval_panel.py runs/A/checkpoint.pt runs/B/checkpoint.pt          # two or more, compared on the same panel
    python eval_panel.py runs/A/checkpoint.pt --quick                       # a few episodes of everything, no video
    python eval_panel.py runs/A/checkpoint.pt --perturbations push mjx --episodes 512 --device cuda --out results/panel/A

A cell is one checkpoint under one perturbation (PERTURBATIONS lists them) and one seed. Its policy acts deterministically, statistics
frozen, and each environment counts with its first episode. Episode k of a seed begins in the same state in every cell, a quadruped's
with the same command and heading, so every difference is taken episode by episode. Its later commands are the same too, but where the
clock or the draws are others: under `timestep` they come in other steps, and `mujoco_c` draws its own, from the episode's seed. The
simulator is vecsim with the integrator of the MJCF; `mujoco_c` is Gymnasium's own environment, `mjx` the tasks of ppo_mjx_jax.py. What
a checkpoint says of randomisation and perturbation in training is left out.

The folder, readable without running anything:

    record.json     the task in words, configuration, checkpoints, versions, hardware, and what was left out and why
    episodes.csv    one row per episode: return, length, success, tracking, and all that its failure label follows from
    summary.csv     one row per checkpoint and perturbation: middles with 95% intervals, also of the differences from `none`
                    and between checkpoints
    worst.npz       traces of the worst episodes, "<checkpoint>/<perturbation>/<seed>/<episode>/<what>", (T, ...), SI units:
                    time, qpos, qvel, action, unit_action (+-1 spans the range), obs, reward; row t is before step t, reward what it earned
    *.png, *.mp4    scores, failures and traces; the worst failure on film
    postmortem.md   what happened, in sentences made from the data
    cells/          finished cells, while the panel runs: the same command goes on where it stopped; gone when all is written

A failed episode gets one label, by the first rule of RULES that holds (`failure_label`). Its twin is the episode of the same seed and
number under `none`, from the same start under the same command. Causes are counterfactual: the twin succeeded, so what the perturbation
changes is to blame (or, under `timestep` and in `mujoco_c`, a later command of a quadruped, which is another then).

The middle of returns, lengths, speeds and velocity errors is their interquartile mean (Agarwal et al. 2021,
arXiv:2108.13264), which a few episodes that fall cannot move. The middle of shares (success, unsafe steps) is their mean.
A difference is the middle of the differences between twins. Intervals are percentile bootstraps (Efron 1979) over the
episodes of all seeds; where one contains 0, no difference is shown. They cover initial states and disturbances, never the
training. A teacher that reads privileged observations is not run under noise: they have none.

A checkpoint says itself how it is read: the file's kind, then its field `algorithm` (LOADERS): a .npz is of ppo_mjx_jax.py, "ppo" of
ppo_gpu_torch.py, "sac" of sac_gpu_torch.py, "distill" of ppo_distill_teacher_student.py, whose `stage` says if it is teacher or student.
Needs `vecsim_torch.py` beside it, and ppo_mjx_jax.py for the perturbation `mjx` alone.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import errno
import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium
import mujoco
import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

import vecsim_torch

# ------------------------------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------------------------------


class InputError(ValueError):
    """What a user typed breaks a rule: one line, exit status 2. Any other error is a defect and shows its traceback."""


@contextlib.contextmanager
def refusals_of_the_simulator():
    """While a run is set up, a ValueError of vecsim_torch says that an option or a checkpoint does not fit: bad input.

    So does a MemoryError: there are too many environments."""
    try:
        yield
    except (ValueError, MemoryError) as error:
        raise InputError(str(error)) from error


class Perturbation(NamedTuple):
    """One departure from the training conditions."""

    words: str
    blamed: str  # the label of a failure whose twin under `none` succeeded
    options: dict = {}  # fields of vecsim_torch.Perturb
    simulator: str = "vecsim"


PERTURBATIONS = {
    "none": Perturbation("nothing changed", "state"),
    "observation_noise": Perturbation(
        "uniform noise on each observation, +-0.1 in its own unit; for a quadruped, its sensors' noise",
        "perception",
        dict(observation_noise=0.1),
    ),
    "action_delay": Perturbation("actions take effect 120 ms later", "timing", dict(action_delay_ms=120.0)),
    "friction": Perturbation("half the friction", "state", dict(friction_scale=0.5)),
    "mass": Perturbation("30% more mass and inertia", "state", dict(mass_scale=1.3)),
    "gravity": Perturbation("20% more gravity", "state", dict(gravity_scale=1.2)),
    "push": Perturbation("pushed by 1 m/s in a random direction every 2 s", "state", dict(push=1.0, push_interval=2.0)),
    "timestep": Perturbation("25% longer control steps, of as many physics steps", "timing", dict(timestep_scale=1.25)),
    "sparse_reward": Perturbation(
        "the return is paid at the end; a frozen policy sees no reward, so this checks the bookkeeping",
        "evaluation",
        dict(sparse_reward=True),
    ),
    "mujoco_c": Perturbation("Gymnasium's own environment, MuJoCo C in float64", "evaluation", simulator="mujoco_c"),
    "mjx": Perturbation("MuJoCo MJX in float32", "evaluation", simulator="mjx"),
}


@dataclasses.dataclass
class Args:
    """The panel: seeds x perturbations x episodes, for each checkpoint."""

    checkpoints: tyro.conf.Positional[tuple[str, ...]] = ()
    """files that the trainers wrote, all of one task"""
    seeds: tuple[int, ...] = (3, 7, 11, 19, 23)
    """seeds of initial states and disturbances (>= 0, no two alike)"""
    perturbations: tuple[str, ...] = tuple(PERTURBATIONS)
    """names of PERTURBATIONS; `none` always runs, because every other is compared with it"""
    episodes: int | None = None
    """episodes of a cell (>= 2; default 64, with --quick 8)"""
    num_envs: int = 1024
    """environments simulated side by side, at most (>= 1); fewer take less memory, and other initial states"""
    device: str = "auto"
    """auto (CUDA where there is a GPU, else CPU), cpu, cuda or cuda:N"""
    compile: bool | None = None
    """compile vecsim's physics (default: on a GPU only, because every perturbation compiles anew)"""
    integrator: Literal["mjcf", "euler", "implicitfast", "rk4"] = "mjcf"
    """integrator of every simulator; mjcf is the model's own, as in Gymnasium"""
    solver_iterations: int = 4
    """Newton iterations of the contact solver in vecsim and MJX (>= 1)"""
    agent: int = 0
    """which agent of a checkpoint that holds several (ppo_mjx_jax.py --num-seeds, --sweep) (>= 0)"""
    resamples: int = 2000
    """draws of the bootstrap (>= 100)"""
    worst: int = 4
    """worst episodes of each checkpoint to trace (>= 1)"""
    video: bool = True
    """film the worst failure"""
    quick: bool = False
    """8 episodes a cell and no video: a first look"""
    out: str | None = None
    """folder of the evidence (default: runs/panel__<env_id>__<time>)"""


def check_args(args: Args) -> Args:
    """Refuse what cannot run, before anything is loaded; fill in what follows from other flags."""
    if not args.checkpoints:
        raise InputError("give at least one checkpoint: python eval_panel.py runs/NAME/checkpoint.pt")
    args = dataclasses.replace(
        args, episodes=args.episodes if args.episodes is not None else 8 if args.quick else 64,
        video=args.video and not args.quick,
    )  # fmt: skip
    for name, least in dict(episodes=2, num_envs=1, solver_iterations=1, agent=0, resamples=100, worst=1).items():
        if getattr(args, name) < least:
            raise InputError(f"{name} = {getattr(args, name)} must be >= {least}")
    if not args.seeds or min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        raise InputError(f"seeds = {args.seeds} must be at least one, all >= 0, no two alike")
    for name in args.perturbations:
        if name not in PERTURBATIONS:
            raise InputError(f"unknown perturbation {name!r}; choose from {', '.join(PERTURBATIONS)}")
    if args.out == "":
        raise InputError("out is empty; name a folder, or omit --out for its default")
    ordered = tuple(name for name in PERTURBATIONS if name == "none" or name in args.perturbations)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    with refusals_of_the_simulator():
        kind = vecsim_torch.check_device(device).type
    compiled = kind == "cuda" if args.compile is None else args.compile
    return dataclasses.replace(args, perturbations=ordered, device=device, compile=compiled)


# ------------------------------------------------------------------------------------------------------------------------
# The tasks, in words and in numbers
# ------------------------------------------------------------------------------------------------------------------------


class SafetyLimit(NamedTuple):
    """|x| <= limit at every step, for the rows of the state that it names."""

    words: str
    group: str  # qpos or qvel
    rows: slice
    limit: float  # m, rad, m/s or rad/s


class Contract(NamedTuple):
    """What a task is, for a reader; and what the panel needs to judge it. Success also needs the time limit to be reached."""

    observation: str
    action: str
    reward: str
    termination: str
    safety: SafetyLimit
    traced: tuple[int, str]  # coordinate of qpos that tells most at a glance, and its name
    least_speed: float | None = None  # m/s, mean over an episode
    largest_tracking: float | None = None  # m/s, mean error of the velocity
    observation_noise: float | None = None  # in place of the perturbation's own
    options: dict = {}  # of vecsim_torch.make, in place of the checkpoint's


def joint_speed(first: int, limit: float) -> SafetyLimit:
    return SafetyLimit(f"no joint turns faster than {limit:g} rad/s", "qvel", slice(first, None), limit)


TORQUES = "torques of the joint motors, as fractions of their range"
RUN = "forward speed, plus a bonus for every healthy step, less the squared action"
TRACK = (
    "follow commanded forward, sideways and turning speeds; penalties on bouncing, tilting, torque, jerk and collisions"
)
COMMANDED = "body's turning rates, direction of gravity, command, joint positions and speeds, last action"
OFFSETS = "offsets of twelve servo targets from the home pose, in units of 0.5 rad"
FALLS = "the trunk touches the ground, or tilts more than 1.2 rad"
CONTRACTS = {
    "InvertedPendulum-v5": Contract(
        "cart position, pole angle, and their rates", "force on the cart", "1 for each step that the pole stands",
        "the pole leans more than 0.2 rad",
        SafetyLimit("the cart stays within 0.9 m of the middle of its 2 m rail", "qpos", slice(0, 1), 0.9),
        (1, "pole angle, rad"),
    ),
    "Hopper-v5": Contract(
        "height, pitch, joint angles, and all speeds", TORQUES, RUN, "torso under 0.7 m or pitched over 0.2 rad",
        joint_speed(3, 20.0), (1, "torso height, m"), least_speed=1.0,
    ),
    "Walker2d-v5": Contract(
        "height, pitch, joint angles, and all speeds", TORQUES, RUN, "torso outside 0.8 to 2 m or pitched over 1 rad",
        joint_speed(3, 20.0), (1, "torso height, m"), least_speed=1.0,
    ),
    "HalfCheetah-v5": Contract(
        "height, pitch, joint angles, and all speeds", TORQUES, "forward speed, less 0.1 of the squared action",
        "never", SafetyLimit("the torso stays within 1.57 rad of level: not on its back", "qpos", slice(2, 3), 1.57),
        (2, "torso pitch, rad"), least_speed=1.0,
    ),
    "Ant-v5": Contract(
        "height, orientation, joint angles, and all speeds; contact forces where the checkpoint asks for them", TORQUES,
        RUN + " and the contact forces", "torso outside 0.2 to 1 m", joint_speed(6, 20.0), (2, "torso height, m"),
        least_speed=1.0,
    ),
    "Humanoid-v5": Contract(
        "height, orientation, joint angles, and all speeds; inertias and forces where the checkpoint asks for them",
        TORQUES, RUN + " and the contact forces", "torso outside 1 to 2 m", joint_speed(6, 20.0),
        (2, "torso height, m"), least_speed=1.0,
    ),
    "Quadruped-Flat": Contract(
        COMMANDED, OFFSETS, TRACK, FALLS, joint_speed(6, 30.0), (2, "trunk height, m"), largest_tracking=0.3,
        observation_noise=1.0,
    ),
    "Quadruped-Rough": Contract(
        COMMANDED + "; heights about the robot where the checkpoint asks for them", OFFSETS, TRACK, FALLS,
        joint_speed(6, 30.0), (2, "trunk height, m"), largest_tracking=0.5, observation_noise=1.0,
        options=dict(curriculum=False),  # every level of difficulty alike
    ),
}  # fmt: skip


def success_words(contract: Contract) -> str:
    words = "the time limit is reached"
    if contract.least_speed is not None:
        words += f", at a mean forward speed of at least {contract.least_speed:g} m/s"
    if contract.largest_tracking is not None:
        words += f", with a mean velocity error of at most {contract.largest_tracking:g} m/s"
    return words


# ------------------------------------------------------------------------------------------------------------------------
# Policies: networks as the trainers build them (copied word for word; a test keeps the copies equal)
# ------------------------------------------------------------------------------------------------------------------------


def mlp(sizes: list[int], last_gain: float) -> nn.Sequential:
    """ELU layers, orthogonal weights, zero biases."""
    layers = []
    for i in range(len(sizes) - 1):
        last = i == len(sizes) - 2
        linear = nn.Linear(sizes[i], sizes[i + 1])
        nn.init.orthogonal_(linear.weight, last_gain if last else math.sqrt(2.0))
        nn.init.zeros_(linear.bias)
        layers += [linear] if last else [linear, nn.ELU()]
    return nn.Sequential(*layers)


def linear_layer(inputs: int, outputs: int, gain: float, bias: bool = True) -> nn.Linear:
    """Orthogonal weights, zero bias."""
    linear = nn.Linear(inputs, outputs, bias)
    nn.init.orthogonal_(linear.weight, gain)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


class PlainNetwork(nn.Module):
    """ReLU layers; or, normalised, layers each followed by layer norm and SiLU. The head starts near zero.

    Layer norm alone would divide the size of the input away: x and 2 x would look the same, and a robot near its target has only
    small errors to tell apart. So normalised layers start with biases of the size that torch.nn.Linear gives them, not with zeros."""

    def __init__(self, inputs: int, hidden: tuple[int, ...], outputs: int, normalized: bool):
        super().__init__()
        sizes, layers = [inputs, *hidden], []
        for i in range(len(hidden)):
            layers += [linear_layer(sizes[i], sizes[i + 1], math.sqrt(2.0))]
            if normalized:
                nn.init.uniform_(layers[-1].bias, -(sizes[i] ** -0.5), sizes[i] ** -0.5)
            layers += [nn.LayerNorm(sizes[i + 1]), nn.SiLU()] if normalized else [nn.ReLU()]
        self.hidden = nn.Sequential(*layers)
        self.head = linear_layer(sizes[-1], outputs, gain=0.01)

    def forward(self, x: Tensor, learning: bool) -> Tensor:
        return self.head(self.hidden(x))  # the same whether learning or not


class BatchNorm(nn.Module):
    """Batch norm that is told by its caller whose moments to use: those of the batch when learning, else their running means."""

    def __init__(self, size: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("variance", torch.ones(size))

    def forward(self, x: Tensor, learning: bool) -> Tensor:
        return functional.batch_norm(
            x, self.mean, self.variance, self.weight, self.bias, training=learning, momentum=0.01
        )


class ResidualBlock(nn.Module):
    """FlashSAC's inverted bottleneck: x + f(x), where f widens by 4 and narrows again, each time with batch norm and ReLU."""

    def __init__(self, size: int):
        super().__init__()
        self.widen = linear_layer(size, 4 * size, math.sqrt(2.0), bias=False)
        self.narrow = linear_layer(4 * size, size, math.sqrt(2.0), bias=False)
        self.wide_norm, self.narrow_norm = BatchNorm(4 * size), BatchNorm(size)

    def forward(self, x: Tensor, learning: bool) -> Tensor:
        wide = self.wide_norm(self.widen(x), learning).relu()
        return x + self.narrow_norm(self.narrow(wide), learning).relu()


class FlashNetwork(nn.Module):
    """Batch norm on the input, residual blocks, RMS norm before the head. The head starts near zero."""

    def __init__(self, inputs: int, hidden: tuple[int, ...], outputs: int):
        super().__init__()
        self.input_norm = BatchNorm(inputs)
        self.embed = linear_layer(inputs, hidden[0], gain=1.0, bias=False)
        self.blocks = nn.ModuleList(ResidualBlock(size) for size in hidden)
        self.output_norm = nn.RMSNorm(hidden[0])
        self.head = linear_layer(hidden[0], outputs, gain=0.01)

    def forward(self, x: Tensor, learning: bool) -> Tensor:
        x = self.embed(self.input_norm(x, learning))
        for block in self.blocks:
            x = block(x, learning)
        return self.head(self.output_norm(x))


def make_network(kind: str, inputs: int, hidden: tuple[int, ...], outputs: int) -> nn.Module:
    if kind == "flash":
        return FlashNetwork(inputs, hidden, outputs)
    return PlainNetwork(inputs, hidden, outputs, normalized=kind == "layer_norm")


class FrozenStatistics(nn.Module):
    """The trainers' RunningStatistics, for reading alone."""

    def __init__(self, size: int, enabled: bool, limit: float = math.inf):
        super().__init__()
        self.enabled, self.limit = enabled, limit
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(size, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def deviation(self) -> Tensor:
        return (self.variance + 1e-6).sqrt().float()

    def normalize(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return x
        return ((x - self.mean.float()) / self.deviation()).clamp(-self.limit, self.limit)


class Policy(nn.Module):
    """A deterministic policy: observations (N, obs) in, actions (N, actions) in the environment's units out."""

    privileged = False  # whether it reads the observations that only a simulator knows
    groups: tuple[str, ...] = ()  # of the observation that it reads, by name; all where none is named

    def __init__(self, actor: nn.Module, action_size: int, obs_size: int, normalizes: bool, bf16: bool = False):
        super().__init__()
        self.actor, self.bf16 = actor, bf16
        self.obs_statistics = FrozenStatistics(obs_size, normalizes, limit=10.0)
        self.register_buffer("action_centre", torch.zeros(action_size))
        self.register_buffer("action_half_range", torch.ones(action_size))

    def autocast(self, x: Tensor) -> torch.autocast:
        # No cache: a cast cached inside a graph capture would go stale.
        return torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False)

    def unit_action(self, normalized_obs: Tensor) -> Tensor:
        """(N, actions) in half ranges: the mean of PPO's Gaussian."""
        with self.autocast(normalized_obs):
            return self.actor(normalized_obs).float()

    def to_env(self, action: Tensor) -> Tensor:
        return self.action_centre + self.action_half_range * action

    def to_units(self, action: Tensor) -> Tensor:
        """The inverse of to_env."""
        return (action - self.action_centre) / self.action_half_range

    def begin(self, envs: int) -> None:
        """Forget: N new episodes begin."""

    def view(self, obs: Tensor, critic_obs: Tensor) -> Tensor:
        """What this policy sees of obs (N, obs) and of what only a simulator knows (N, critic obs)."""
        return obs

    @torch.no_grad()
    def act(self, seen: Tensor) -> Tensor:
        return self.to_env(self.unit_action(self.obs_statistics.normalize(seen)))


class SquashedPolicy(Policy):
    """SAC's: the actor's outputs are means and spreads, and the mean goes through tanh."""

    def unit_action(self, normalized_obs: Tensor) -> Tensor:
        with self.autocast(normalized_obs):
            mean, _ = self.actor(normalized_obs, False).float().chunk(2, -1)
        return mean.tanh()


class DistilledPolicy(Policy):
    """A teacher or a student: sees some columns of either observation; a student remembers its last observations, or has a GRU."""

    def __init__(
        self, hidden: tuple[int, ...], actions: int, columns: list[int], privileged: bool, history: int, gru_size: int
    ):
        size = len(columns)
        memory_size = gru_size or (history - 1) * size
        actor = mlp([size + memory_size, *hidden, actions], last_gain=0.01)
        super().__init__(actor, actions, size, normalizes=True)
        self.gru = nn.GRUCell(size, gru_size) if gru_size else None
        self.privileged, self.columns, self.memory_size = privileged, columns, memory_size

    def begin(self, envs: int) -> None:
        self.memory = self.action_centre.new_zeros(envs, self.memory_size)

    def view(self, obs: Tensor, critic_obs: Tensor) -> Tensor:
        return (critic_obs if self.privileged else obs)[:, self.columns]

    def unit_action(self, normalized_obs: Tensor) -> Tensor:
        if self.gru is not None:
            self.memory = self.gru(normalized_obs, self.memory)
            return self.actor(torch.cat([normalized_obs, self.memory], 1))
        frames = torch.cat([self.memory, normalized_obs], 1)  # oldest first
        self.memory = frames[:, normalized_obs.shape[1] :]
        return self.actor(frames)


# ------------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ------------------------------------------------------------------------------------------------------------------------


class Subject(NamedTuple):
    """One policy on the panel."""

    label: str  # its name in every table: the algorithm or its stage, numbered where two are alike
    path: str  # as it was typed
    env_id: str
    options: dict  # of the task, as the checkpoint was trained
    policy: Policy
    env_steps: int
    sha256: str
    versions: dict


def with_actor_state(policy: Policy, state: dict[str, Tensor]) -> Policy:
    """The policy with its part of an agent's state_dict: all of the actor, or it would act as another than was trained."""
    own = policy.state_dict().keys()
    others = {name for name in state if name.startswith("actor.")} ^ {name for name in own if name.startswith("actor.")}
    if others:
        raise InputError(f"the checkpoint's actor is of another version than this panel: they differ in {', '.join(sorted(others))}")
    policy.load_state_dict({name: state[name] for name in own})
    return policy


def load_ppo(checkpoint: dict) -> Policy:
    args, state = checkpoint["args"], checkpoint["agent"]
    obs_size, action_size = len(state["obs_statistics.mean"]), len(state["action_centre"])
    actor = mlp([obs_size, *args["actor_hidden"], action_size], last_gain=0.01)
    return with_actor_state(Policy(actor, action_size, obs_size, args["normalize_observations"], args["bf16"]), state)


def load_sac(checkpoint: dict) -> Policy:
    args, state = checkpoint["args"], checkpoint["agent"]
    obs_size, action_size = len(state["obs_statistics.mean"]), len(state["action_centre"])
    actor = make_network(args["network"], obs_size, tuple(args["actor_hidden"]), 2 * action_size)
    policy = SquashedPolicy(actor, action_size, obs_size, args["normalize_observations"], args["bf16"])
    return with_actor_state(policy, state)


def load_ppo_mjx(checkpoint: dict) -> Policy:
    """One agent of ppo_mjx_jax.py: axis 0 of every array counts agents, and flax keeps kernels as (inputs, outputs)."""
    layer = ".parameters['actor']['network']['params']['Dense_{}']['{}']"
    args, arrays, agent = checkpoint["args"], checkpoint["arrays"], checkpoint["agent"]
    depth, agents = len(args["actor_hidden"]) + 1, len(arrays[".obs_statistics.mean"])
    if agent >= agents:
        raise InputError(f"agent = {agent}: the checkpoint holds {agents}, numbered from 0")
    state = {}
    for i in range(depth):
        state[f"actor.{2 * i}.weight"] = arrays[layer.format(i, "kernel")][agent].T
        state[f"actor.{2 * i}.bias"] = arrays[layer.format(i, "bias")][agent]
    for name in ("mean", "variance", "count"):
        state[f"obs_statistics.{name}"] = arrays[f".obs_statistics.{name}"][agent]
    obs_size, action_size = len(state["obs_statistics.mean"]), len(state[f"actor.{2 * depth - 2}.bias"])
    task = vecsim_torch.make(args["env_id"], 1)  # the file leaves the range of actions to the task
    low, high = (torch.as_tensor(x) for x in (task.single_action_space.low, task.single_action_space.high))
    state |= {"action_centre": (low + high) / 2, "action_half_range": (high - low) / 2}
    actor = mlp([obs_size, *args["actor_hidden"], action_size], last_gain=0.01)
    policy = Policy(actor, action_size, obs_size, args["normalize_observations"])
    return with_actor_state(policy, {name: torch.tensor(np.asarray(x)) for name, x in state.items()})


def load_distilled(checkpoint: dict) -> Policy:
    """The stages teacher, student, finetune and baseline; `groups` says by name what each of them sees."""
    args, state = checkpoint["args"], checkpoint["agent"]
    is_teacher, is_recurrent = checkpoint["stage"] == "teacher", args["student_network"] == "gru"
    task = vecsim_torch.make(checkpoint["env_id"], 1, **task_options(checkpoint))  # knows where each group stands
    slices = task.critic_slices if is_teacher and task.critic_slices else task.observation_slices
    columns = []
    for name, size in checkpoint["groups"]["teacher" if is_teacher else "student"].items():
        if name not in slices or slices[name].stop - slices[name].start != size:
            raise InputError(
                f"the policy sees the group {name}, {size} numbers, which {checkpoint['env_id']} does not give"
            )
        columns += range(slices[name].start, slices[name].stop)
    hidden = args["actor_hidden"] if is_teacher else args["student_hidden"]
    history = 1 if is_teacher or is_recurrent else args["student_history"]
    gru_size = args["student_memory"] if is_recurrent and not is_teacher else 0
    privileged = is_teacher and bool(task.critic_slices)
    policy = DistilledPolicy(tuple(hidden), len(state["action_centre"]), columns, privileged, history, gru_size)
    policy.groups = tuple(checkpoint["groups"]["teacher" if is_teacher else "student"])
    return with_actor_state(policy, state)


LOADERS = {"ppo": load_ppo, "sac": load_sac, "distill": load_distilled, "ppo_mjx": load_ppo_mjx}


def is_numpy_archive(path: str) -> bool:
    """PyTorch's files are zip archives too."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return "header.npy" in archive.namelist()


def read_checkpoint(path: str, agent: int) -> dict:
    """The checkpoint's fields; a .npz, of which `agent` is wanted, gets those of a .pt. InputError where it cannot be read."""
    if os.path.isdir(path):  # also of a name that is too long
        raise InputError(f"checkpoint {path} is a folder; give a file in it, such as {Path(path) / 'checkpoint.pt'}")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch.load compares no checksums
                if (damaged := archive.testzip()) is not None:
                    raise ValueError(f"{damaged} differs from its checksum")
        if is_numpy_archive(path):
            with np.load(path, allow_pickle=False) as file:
                header = json.loads(str(file["header"]))
                arrays = {name: file[name] for name in file.files if name != "header"}
            env_id, counters = header["args"]["env_id"], header["counters"]
            return header | counters | dict(algorithm="ppo_mjx", env_id=env_id, arrays=arrays, agent=agent)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"checkpoint {path} does not exist") from None
    except Exception as error:  # torch.load and numpy raise many types on a damaged file
        reason = str(error).split("\n")[0][:100]
        raise InputError(
            f"checkpoint {path} cannot be read; is it damaged? ({type(error).__name__}: {reason})"
        ) from None
    if not isinstance(checkpoint, dict) or checkpoint.get("algorithm") not in LOADERS:
        known = ", ".join(LOADERS)
        found = checkpoint.get("algorithm") if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise InputError(f"checkpoint {path} is of no trainer that the panel knows ({known}): algorithm {found!r}")
    lacks = [name for name in ("env_id", "args", "env_steps", "versions") if name not in checkpoint]
    if lacks:
        raise InputError(f"checkpoint {path} lacks {', '.join(lacks)}: it is not whole, or of another version of its trainer")
    return checkpoint


def gymnasium_options(env_kwargs: dict) -> dict:
    """What gymnasium.make gets: the task's options, without those that only the simulator has, which say how it trains."""
    simulator_alone = ("randomize", "perturb", "pair_slots", "self_collision", "chunk")
    return {name: value for name, value in env_kwargs.items() if name.split(".")[0] not in simulator_alone}


def task_options(checkpoint: dict) -> dict:
    """The task on the panel: as the checkpoint was trained, less what only the simulator has, and what the contract sets."""
    return gymnasium_options(checkpoint["args"]["env_kwargs"]) | CONTRACTS[checkpoint["env_id"]].options


def load_subjects(args: Args) -> list[Subject]:
    """Every checkpoint's policy and task. InputError for a file, a task or a mixture of tasks that cannot be judged."""
    checkpoints = [read_checkpoint(path, args.agent) for path in args.checkpoints]
    names = [checkpoint.get("stage", checkpoint["algorithm"]) for checkpoint in checkpoints]
    subjects = []
    for k, (path, checkpoint) in enumerate(zip(args.checkpoints, checkpoints, strict=True)):
        env_id = checkpoint["env_id"]
        if env_id not in CONTRACTS or env_id not in vecsim_torch.TASKS:
            known = ", ".join(name for name in CONTRACTS if name in vecsim_torch.TASKS)
            raise InputError(f"checkpoint {path} was trained on {env_id!r}, which is no task here; there are {known}")
        label = f"{names[k]}-{names[: k + 1].count(names[k])}" if names.count(names[k]) > 1 else names[k]
        try:
            options = task_options(checkpoint)
            with refusals_of_the_simulator():
                policy = LOADERS[checkpoint["algorithm"]](checkpoint).to(args.device)
        except (KeyError, TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:150]
            raise InputError(f"checkpoint {path} was written by another version of its trainer: {reason}") from None
        sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        env_steps, made_with = checkpoint["env_steps"], checkpoint["versions"]
        subjects.append(Subject(label, path, env_id, options, policy, env_steps, sha256, made_with))
    check_one_task(subjects)
    return subjects


def check_one_task(subjects: list[Subject]) -> None:
    """Checkpoints on one panel may differ in what they observe, in nothing else of the task."""

    def judged(options: dict) -> dict:
        return {name: value for name, value in options.items() if "observation" not in name}

    first = subjects[0]
    for other in subjects[1:]:
        if other.env_id != first.env_id:
            raise InputError(
                f"one panel, one task: {first.path} is of {first.env_id}, {other.path} of {other.env_id}; judge them apart"
            )
        if judged(other.options) != judged(first.options):
            raise InputError(
                f"one panel, one task: {first.path} has the options {judged(first.options)}, {other.path} has "
                f"{judged(other.options)}; judge them apart"
            )


# ------------------------------------------------------------------------------------------------------------------------
# Simulators: reset, step and state of N robots, the same three for each
# ------------------------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """What one step of N robots gives, (N,) each but for the observations. What a robot gives after its end means nothing."""

    obs: Tensor  # (N, obs)
    critic_obs: Tensor  # (N, critic obs); obs where the task has no more
    paid: Tensor  # the reward
    earned: Tensor  # the same before sparse_reward holds it back
    terminated: Tensor  # bool
    truncated: Tensor  # bool
    invalid: Tensor  # bool: the simulation diverged
    speed: Tensor  # m/s forward, NaN where the task has none
    tracking: Tensor  # m/s, error of the velocity, NaN where the task commands none


def perturb_fields(perturbation: Perturbation, env_id: str) -> dict:
    """What vecsim_torch.make gets: noise is in the units of the task."""
    noise = CONTRACTS[env_id].observation_noise
    adapted = {} if noise is None or "observation_noise" not in perturbation.options else dict(observation_noise=noise)
    return perturbation.options | adapted


class Vecsim:
    """vecsim under a perturbation."""

    def __init__(self, subject: Subject, perturbation: Perturbation, num_envs: int, args: Args):
        self.env = vecsim_torch.make(
            subject.env_id, num_envs, device=args.device, compile=args.compile, iterations=args.solver_iterations,
            integrator=None if args.integrator == "mjcf" else args.integrator,
            perturb=perturb_fields(perturbation, subject.env_id), **subject.options,
        )  # fmt: skip
        self.seconds = self.env.task.frame_skip * self.env.mj_model.opt.timestep
        self.limit = self.env.settings.max_episode_steps

    def reset(self, seed: int) -> tuple[Tensor, Tensor]:
        """obs (N, obs) and critic_obs."""
        obs, info = self.env.reset(seed=seed)
        return obs, info.get("critic_obs", obs)

    def state(self) -> tuple[Tensor, Tensor]:
        """qpos (nq, N) and qvel (nv, N)."""
        state = self.env.state()
        return state.qpos, state.qvel

    def commanded(self) -> dict[str, Tensor]:
        """What the task carries, (rows, N) by name: a quadruped's command, heading and more; nothing for most tasks."""
        return vecsim_torch.split_rows(self.env.state_dict()["carry"]["memory"], self.env.task.memory)

    def start(self) -> Tensor:
        """(rows, N): all that the panel gives an episode to begin with: state, command and heading."""
        memory, (qpos, qvel) = self.commanded(), self.state()
        return torch.cat([qpos, qvel, *(memory[name].to(qpos) for name in ("command", "heading") if name in memory)])

    def step(self, action: Tensor) -> Step:
        obs, reward, terminated, truncated, info = self.env.step(action)
        missing = torch.full_like(reward, math.nan)
        return Step(
            obs, info.get("critic_obs", obs), reward, self.env.task.total(info), terminated, truncated, info["invalid"],
            info.get("x_velocity", missing), info.get("velocity_error", missing),
        )  # fmt: skip

    def scene(self) -> mujoco.MjModel:
        """The model to draw."""
        return self.env.task.drawn_model(self.env.model, self.env.mj_model)


class MujocoC(Vecsim):
    """Gymnasium's own environments, from vecsim's initial states (to float32) and under its first commands."""

    def __init__(self, subject: Subject, perturbation: Perturbation, num_envs: int, args: Args):
        if subject.env_id not in gymnasium.registry:
            raise ValueError(f"Gymnasium has no {subject.env_id}")
        super().__init__(subject, perturbation, num_envs, dataclasses.replace(args, compile=False))
        make = functools.partial(gymnasium.make, subject.env_id, disable_env_checker=True, **subject.options)
        self.robots = [make() for _ in range(num_envs)]
        if args.integrator != "mjcf":
            names = {name: number for number, name in vecsim_torch.INTEGRATORS.items()}
            for robot in self.robots:
                robot.unwrapped.model.opt.integrator = names[args.integrator]

    def reset(self, seed: int) -> tuple[Tensor, Tensor]:
        """The observation is vecsim's, which equals Gymnasium's at the same state. A commanded robot begins with vecsim's command and
        heading, and draws those that follow with a seed of its own."""
        obs, critic_obs = super().reset(seed)
        qpos, qvel = (x.T.double().cpu().numpy() for x in super().state())
        memory = super().commanded()
        for k, (robot, position, velocity) in enumerate(zip(self.robots, qpos, qvel, strict=True)):
            robot.reset(seed=stream_seed(seed, k, 1))
            robot.unwrapped.set_state(position, velocity)
            if memory:
                robot.unwrapped.memory = {name: rows[:, k : k + 1].double() for name, rows in memory.items()}
        self.obs, self.critic_obs, self.ended = obs, critic_obs, np.zeros(len(self.robots), bool)
        return obs, critic_obs

    def state(self) -> tuple[Tensor, Tensor]:
        datas = [robot.unwrapped.data for robot in self.robots]
        rows = np.stack([data.qpos for data in datas], 1), np.stack([data.qvel for data in datas], 1)
        qpos, qvel = (torch.as_tensor(x).float().to(self.obs.device) for x in rows)
        return qpos, qvel

    def commanded(self) -> dict[str, Tensor]:
        memories = [getattr(robot.unwrapped, "memory", {}) for robot in self.robots]
        return {name: torch.cat([memory[name] for memory in memories], 1).float() for name in memories[0]}

    def step(self, action: Tensor) -> Step:
        commands, obs, critic_obs = action.cpu().numpy(), self.obs.cpu().numpy().copy(), self.critic_obs.cpu().numpy().copy()
        reward, speed, tracking = np.zeros(len(obs)), *np.full((2, len(obs)), math.nan)
        terminated, truncated = np.zeros(len(obs), bool), np.zeros(len(obs), bool)
        for k in np.flatnonzero(~self.ended):
            obs[k], reward[k], terminated[k], truncated[k], info = self.robots[k].step(commands[k])
            critic_obs[k] = info.get("critic_obs", obs[k])
            speed[k], tracking[k] = (info.get(name, math.nan) for name in ("x_velocity", "velocity_error"))
        self.ended |= terminated | truncated
        device = self.obs.device
        self.obs, self.critic_obs = (torch.as_tensor(x).to(device) for x in (obs, critic_obs))
        reward, speed, tracking = (torch.as_tensor(x).float().to(device) for x in (reward, speed, tracking))
        terminated, truncated = (torch.as_tensor(x).to(device) for x in (terminated, truncated))
        ends = terminated, truncated & ~terminated, torch.zeros_like(terminated)
        return Step(self.obs, self.critic_obs, reward, reward, *ends, speed, tracking)


class Mjx(Vecsim):
    """MuJoCo MJX, from vecsim's initial states."""

    def __init__(self, subject: Subject, perturbation: Perturbation, num_envs: int, args: Args):
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs some of the GPU's memory
        import ppo_mjx_jax as trainer  # MJX's versions of the tasks stand there and nowhere else

        if subject.env_id not in trainer.TASK_DEFAULTS:
            raise ValueError(f"ppo_mjx_jax.py has no {subject.env_id}")
        super().__init__(subject, perturbation, num_envs, dataclasses.replace(args, compile=False))
        settings = trainer.Args(
            env_id=subject.env_id, env_kwargs=subject.options, integrator=args.integrator, self_collision=True,
            solver_iterations=args.solver_iterations, ls_iterations=8, device=args.device.split(":")[0],
        )  # fmt: skip
        trainer.configure(settings)
        trainer.pick_devices(settings)
        task = trainer.make_task(settings)
        self.limit = task.max_episode_steps
        self.jax = trainer.jax
        self.begin = self.jax.jit(self.jax.vmap(functools.partial(trainer.state_at, task)))
        self.advance = self.jax.jit(self.jax.vmap(functools.partial(trainer.task_step, task)))
        self.has_speed = CONTRACTS[subject.env_id].least_speed is not None

    def to_torch(self, x) -> Tensor:
        return torch.as_tensor(np.array(x)).to(self.env.device)

    def reset(self, seed: int) -> tuple[Tensor, Tensor]:
        super().reset(seed)
        qpos, qvel = (x.T.cpu().numpy() for x in super().state())
        self.robots, obs = self.begin(qpos, qvel)
        self.age = 0
        return (self.to_torch(obs),) * 2

    def state(self) -> tuple[Tensor, Tensor]:
        return self.to_torch(self.robots.qpos).T, self.to_torch(self.robots.qvel).T

    def step(self, action: Tensor) -> Step:
        before, self.age = self.robots.x_position, self.age + 1
        self.robots, *outcome = self.advance(self.robots, action.cpu().numpy())
        obs, reward, terminated = (self.to_torch(x) for x in outcome)
        speed = self.to_torch((self.robots.x_position - before) / self.seconds)
        invalid = ~(torch.isfinite(obs).all(1) & torch.isfinite(reward) & (obs.abs().amax(1) < vecsim_torch.RUNAWAY))
        truncated = torch.full_like(terminated, self.age >= self.limit) & ~terminated
        missing = torch.full_like(reward, math.nan)
        speed = speed if self.has_speed else missing
        return Step(obs, obs, reward, reward, terminated & ~invalid, truncated | invalid, invalid, speed, missing)


BACKENDS = {"vecsim": Vecsim, "mujoco_c": MujocoC, "mjx": Mjx}


def unfit(subject: Subject, name: str) -> str | None:
    """Why a perturbation changes nothing for this subject, though the task has it; None where it does."""
    if subject.policy.privileged and "observation_noise" in PERTURBATIONS[name].options:
        return "it reads privileged observations, which are without noise"
    return None


def open_simulator(subject: Subject, name: str, args: Args) -> Vecsim:
    """ValueError or ImportError where the task or this machine has no such thing."""
    perturbation, num_envs = PERTURBATIONS[name], min(args.num_envs, args.episodes)
    return BACKENDS[perturbation.simulator](subject, perturbation, num_envs, args)


# ------------------------------------------------------------------------------------------------------------------------
# Episodes
# ------------------------------------------------------------------------------------------------------------------------


def stream_seed(seed: int, rank: int, stream: int) -> int:
    """Independent seeds for each process and each use, however close the users' seeds are."""
    return int(np.random.SeedSequence((seed, rank, stream)).generate_state(1)[0])


def saturated_share(action: Tensor, policy: Policy) -> Tensor:
    """(N,): the share of the components of action (N, actions) at 99% of their range or beyond."""
    return (policy.to_units(action).abs() >= 0.99).float().mean(1)


@torch.no_grad()
def run_batch(
    policy: Policy, simulator: Vecsim, safety: SafetyLimit, seed: int, watched: tuple[int, ...] = ()
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The first episode of each of N robots, and traces of the watched ones.

    Episodes: (N,) each, and windows (N, K), the mean reward of each whole second, NaN after the end. Traces: (T, watched, ...), of
    which each episode's first `length` rows are its own. The panel reads the device once a step: has everyone ended?
    """
    seen = policy.view(*simulator.reset(seed))
    policy.begin(len(seen))
    start, running = simulator.start(), torch.ones(len(seen), dtype=torch.bool, device=seen.device)
    zero = torch.zeros(len(seen), dtype=torch.float64, device=seen.device)
    length, sums = zero, dict.fromkeys(("return", "speed", "tracking", "unsafe"), zero)
    ends = dict.fromkeys(("terminated", "survived", "invalid"), ~running)
    earned, saturated, traces = [], [], {name: [] for name in ("qpos", "qvel", "action", "obs", "reward")}
    while running.any():  # host sync
        qpos, qvel = simulator.state()
        action = policy.act(seen)
        step = simulator.step(action)
        counted = running & ~step.invalid
        length = length + running
        limited = dict(qpos=qpos, qvel=qvel)[safety.group][safety.rows]
        amounts = {"return": step.paid, "speed": step.speed, "tracking": step.tracking}
        amounts |= {"unsafe": (limited.abs() > safety.limit).any(0)}
        sums = {name: sums[name] + torch.where(counted, x, 0.0) for name, x in amounts.items()}
        now = dict(terminated=step.terminated, survived=step.truncated & ~step.invalid, invalid=step.invalid)
        ends = {name: ends[name] | (running & x) for name, x in now.items()}
        earned.append(torch.where(counted, step.earned, 0.0))
        saturated.append(saturated_share(action, policy))
        columns = dict(qpos=qpos.T, qvel=qvel.T, action=action, obs=seen, reward=step.earned)
        for name, x in columns.items() if watched else ():
            traces[name].append(x[list(watched)].cpu().numpy())
        seen = policy.view(step.obs, step.critic_obs)
        running = running & ~(step.terminated | step.truncated | step.invalid)
    second = max(1, round(1 / simulator.seconds))
    windows = window_means(torch.stack(earned), length, second, math.ceil(simulator.limit / second))
    ending, whole = saturation(torch.stack(saturated), length, second)
    episodes = {"return": sums["return"], "length": length, "seconds": length * simulator.seconds}
    episodes |= {name: sums[name] / length for name in ("speed", "tracking", "unsafe")}
    episodes |= ends | dict(saturation=whole, saturation_end=ending, windows=windows, start=start.T)
    return (
        {name: x.cpu().numpy() for name, x in episodes.items()},
        {name: np.stack(rows) for name, rows in traces.items() if rows},
    )


def window_means(earned: Tensor, length: Tensor, second: int, count: int) -> Tensor:
    """(N, count): mean of earned (T, N) over each whole second of `second` steps within an episode of length (N,); else NaN."""
    steps, n = earned.shape
    windows = torch.full((n, count), math.nan, dtype=torch.float64, device=earned.device)
    whole = steps // second
    means = earned[: whole * second].double().reshape(whole, second, n).mean(1).T
    inside = (torch.arange(1, whole + 1, device=earned.device) * second)[None] <= length[:, None]
    windows[:, :whole] = torch.where(inside, means, math.nan)
    return windows


def saturation(saturated: Tensor, length: Tensor, second: int) -> tuple[Tensor, Tensor]:
    """(N,) each: mean of saturated (T, N) over the last second of an episode of length (N,), and over the whole of it."""
    total = functional.pad(saturated.double().cumsum(0), (0, 0, 1, 0))  # (T + 1, N): of the steps before
    end = length.long()[None]
    begin = (end - second).clamp(min=0)
    at_end = total.gather(0, end)
    return ((at_end - total.gather(0, begin)) / (end - begin))[0], (at_end / end)[0]


def run_cell(subject: Subject, simulator: Vecsim, seed: int, args: Args) -> dict[str, np.ndarray]:
    """args.episodes episodes of one seed, in as many batches as it takes; what counts as success is decided here."""
    contract, n = CONTRACTS[subject.env_id], min(args.num_envs, args.episodes)
    parts = []
    for batch in range(math.ceil(args.episodes / n)):
        parts.append(run_batch(subject.policy, simulator, contract.safety, stream_seed(seed, batch, 0))[0])
    cell = {name: np.concatenate([part[name] for part in parts])[: args.episodes] for name in parts[0]}
    success = cell["survived"].copy()
    if contract.least_speed is not None:
        success &= cell["speed"] >= contract.least_speed
    if contract.largest_tracking is not None:
        success &= cell["tracking"] <= contract.largest_tracking
    digest = hashlib.sha256(np.ascontiguousarray(cell.pop("start"), np.float32)).hexdigest()
    return cell | dict(success=success, start=np.array(digest))


# ------------------------------------------------------------------------------------------------------------------------
# Failure labels
# ------------------------------------------------------------------------------------------------------------------------

RULES = {  # in this order: the first that holds names the failure
    "evaluation": "the simulation diverged and the episode was quarantined",
    "late recovery": "lasted to the time limit, with a slump (seconds that earned under half the usual reward) of 2 s or more that "
    "ended before it did",
    "reward": "lasted to the time limit with at least 80% of the return of a typical success: the reward pays for what the "
    "task calls a failure",
    "perception, timing, state, evaluation": "the twin under `none` succeeded: the label of what the perturbation changes "
    "(sensors; delay or timestep; robot, ground, gravity or pushes; the judge)",
    "action": "in its last second at least half of the action's components were at their bounds, and 25 points more than usual",
    "state": "none of these: the robot got into a state from which its policy does not recover",
}
LABELS = ("perception", "state", "action", "timing", "reward", "evaluation", "late recovery")
SLUMP_SECONDS, REWARD_SHARE, SATURATED, UNUSUAL = 2.0, 0.8, 0.5, 0.25


class Usual(NamedTuple):
    """Medians of one checkpoint under `none`: over its successes, NaN where there is none; saturation over all its episodes then."""

    episode_return: float
    reward: float  # per step
    saturation: float


def usual(cells: list[dict[str, np.ndarray]]) -> Usual:
    """From the cells of one checkpoint under `none`."""
    columns = {name: np.concatenate([cell[name] for cell in cells]) for name in ("return", "length", "saturation")}
    good = np.concatenate([cell["success"] for cell in cells])
    if not good.any():
        return Usual(math.nan, math.nan, float(np.median(columns["saturation"])))
    returns, lengths, shares = (columns[name][good] for name in ("return", "length", "saturation"))
    return Usual(*(float(np.median(x)) for x in (returns, returns / lengths, shares)))


def longest_slump(windows: np.ndarray, usual_reward: float) -> tuple[int, bool]:
    """Seconds of the longest run of windows (K,) under half the usual reward, and whether one above it follows.

    No slump where there is no usual reward, or one that is not positive."""
    known = windows[~np.isnan(windows)]
    if not usual_reward > 0:
        return 0, False
    low, longest, over, run = known < 0.5 * usual_reward, 0, False, 0
    for k, poor in enumerate(low):
        run = run + 1 if poor else 0
        if run > longest:
            longest, over = run, not low[k:].all()
    return longest, bool(over)


def failure_label(blamed: str, episode: dict, twin_success: bool, typical: Usual) -> str:
    """The label of a failed episode, or "" for a success: RULES, in order.

    blamed: `Perturbation.blamed`; episode: success, survived, invalid, return, saturation_end, slump_seconds, slump_over.
    """
    if episode["success"]:
        return ""
    if episode["invalid"]:
        return "evaluation"
    if episode["survived"] and episode["slump_seconds"] >= SLUMP_SECONDS and episode["slump_over"]:
        return "late recovery"
    if episode["survived"] and 0 < REWARD_SHARE * typical.episode_return <= episode["return"]:
        return "reward"
    if twin_success:
        return blamed
    if episode["saturation_end"] >= max(SATURATED, typical.saturation + UNUSUAL):
        return "action"
    return "state"


Cells = dict[tuple[str, str, int], dict[str, np.ndarray]]  # by checkpoint's label, perturbation and seed
MEASURED = (
    "return", "length", "seconds", "success", "survived", "terminated", "invalid", "speed", "tracking", "unsafe", "saturation",
    "saturation_end",
)  # fmt: skip


def episode_rows(subjects: list[Subject], cells: Cells, seeds: tuple[int, ...]) -> list[dict]:
    """One row per episode, in the columns of episodes.csv."""
    typical = {s.label: usual([cells[s.label, "none", seed] for seed in seeds]) for s in subjects}
    rows = []
    for (label, name, seed), cell in cells.items():
        perturbation, twins = PERTURBATIONS[name], cells[label, "none", seed]["success"]
        place = dict(checkpoint=label, perturbation=name, simulator=perturbation.simulator, seed=seed)
        for k in range(len(twins)):
            row = place | dict(episode=k) | {column: cell[column][k].item() for column in MEASURED}
            slump, over = longest_slump(cell["windows"][k], typical[label].reward)
            row |= dict(slump_seconds=slump, slump_over=over)
            rows.append(row | dict(label=failure_label(perturbation.blamed, row, bool(twins[k]), typical[label])))
    return rows


# ------------------------------------------------------------------------------------------------------------------------
# Statistics
# ------------------------------------------------------------------------------------------------------------------------

METRICS = ("return", "success", "length", "speed", "tracking", "unsafe")


def middle_of(metric: str) -> Callable:
    """The mean of a share; the interquartile mean of anything else."""
    share = metric in ("success", "unsafe")
    return np.mean if share else functools.partial(stats.trim_mean, proportiontocut=0.25)


def estimate(values: np.ndarray, metric: str, resamples: int) -> tuple[float, float, float]:
    """The middle of values (episodes,) and the ends of its 95% interval; NaN where a value is missing."""
    if np.isnan(values).any():
        return (math.nan,) * 3
    middle, drawing = middle_of(metric), dict(method="percentile", rng=0, batch=500)
    low, high = stats.bootstrap((values,), middle, n_resamples=resamples, **drawing).confidence_interval
    return float(middle(values)), float(low), float(high)


def summarize(rows: list[dict], resamples: int) -> list[dict]:
    """Rows of episodes.csv -> one row per checkpoint and perturbation, in the columns of summary.csv."""
    values, first = {}, rows[0]["checkpoint"]  # values: (episodes, metrics) by checkpoint and perturbation
    for row in rows:
        values.setdefault((row["checkpoint"], row["perturbation"]), []).append([row[metric] for metric in METRICS])
    values = {pair: np.array(x, float) for pair, x in values.items()}
    summary, several = [], len({label for label, _ in values}) > 1

    def columns(name: str, metric: str, pair: tuple, twin: tuple | None = None) -> dict[str, float]:
        k = METRICS.index(metric)
        missing = np.full(len(values[pair]), math.nan)  # the first checkpoint may have run none of this
        own = values[pair][:, k] - (0.0 if twin is None else values[twin][:, k] if twin in values else missing)
        return dict(zip((name, f"{name}_low", f"{name}_high"), estimate(own, metric, resamples), strict=True))

    for pair in values:
        label, perturbation = pair
        own = [row for row in rows if (row["checkpoint"], row["perturbation"]) == pair]
        row = dict(checkpoint=label, perturbation=perturbation, simulator=PERTURBATIONS[perturbation].simulator)
        row |= dict(seeds=len({one["seed"] for one in own}), episodes=len(own))
        for metric in METRICS:
            row |= columns(metric, metric, pair)
        for metric in ("return", "success"):
            row |= columns(f"{metric}_change_from_none", metric, pair, (label, "none"))
            row |= columns(f"{metric}_beyond_{first}", metric, pair, (first, perturbation)) if several else {}
        summary.append(row)
    return summary


# ------------------------------------------------------------------------------------------------------------------------
# The folder: cells while the panel runs, then the evidence
# ------------------------------------------------------------------------------------------------------------------------


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Write beside, then rename: a full disk or an interruption never leaves half a file."""
    partial = path.with_name(f"partial-{path.name}")  # keeps the ending, which numpy and matplotlib go by
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_whole(path, lambda partial: partial.write_text(text))


def write_rows(path: Path, rows: list[dict]) -> None:
    """CSV; numbers to six digits, empty where there is none."""

    def plain(x):
        if isinstance(x, float):
            return "" if math.isnan(x) else f"{x:.6g}"
        return int(x) if isinstance(x, bool) else x

    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: plain(x) for name, x in row.items()} for row in rows)
    write_text(path, text.getvalue())


def simulator_hash() -> str:
    return hashlib.sha256(Path(vecsim_torch.__file__).read_bytes()).hexdigest()


def fingerprint(subjects: list[Subject], args: Args) -> dict:
    """What finished cells must agree with, to be of this panel."""
    options = "episodes num_envs integrator solver_iterations agent".split()
    changes = {name: [p.blamed, p.options] for name, p in PERTURBATIONS.items()}
    return dict(
        checkpoints={s.label: s.sha256 for s in subjects},
        perturbations=changes,
        device=args.device.split(":")[0],
        simulator=simulator_hash(),
        torch=str(torch.__version__),
        **{name: getattr(args, name) for name in options},
    )


@contextlib.contextmanager
def own_folder(out: Path, mark: dict):
    """`out/cells` for this process alone, new or of the same panel. InputError where `out` is anyone else's."""
    cells = out / "cells"
    # A full disk may have stopped an earlier run before its panel.json.
    begun = (cells / "panel.json").is_file() or (cells.is_dir() and {*out.iterdir(), *cells.iterdir()} <= {cells, cells / "lock"})
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not begun:
        raise InputError(f"out = {out} holds something else already, or a finished panel; choose another folder")
    cells.mkdir(parents=True, exist_ok=True)
    with (cells / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"out = {out} is in use by a panel that is running; choose another folder") from None
        known = json.loads((cells / "panel.json").read_text()) if (cells / "panel.json").exists() else mark
        for name in mark:
            if known.get(name) != json.loads(json.dumps(mark[name])):
                raise InputError(
                    f"out = {out} holds the cells of another panel ({name} differs); choose another folder"
                )
        write_text(cells / "panel.json", json.dumps(mark))
        yield cells


def load_cell(path: Path) -> dict[str, np.ndarray] | None:
    """A finished cell, None where there is none."""
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def run_panel(subjects: list[Subject], args: Args, folder: Path) -> tuple[Cells, dict[str, str]]:
    """All cells, those on disk included, and why perturbations were left out: "NAME", or "NAME, LABEL" for one checkpoint alone."""
    cells, left_out = {}, {name: "not asked for" for name in PERTURBATIONS if name not in args.perturbations}
    total = len(subjects) * len(args.perturbations) * len(args.seeds)
    with tqdm(total=total, unit=" cells", disable=not sys.stderr.isatty()) as bar:
        for name in args.perturbations:
            for subject in subjects:
                if reason := unfit(subject, name):
                    left_out[f"{name}, {subject.label}"] = reason
                    continue
                paths = {seed: folder / f"{subject.label}--{name}--{seed}.npz" for seed in args.seeds}
                found = {seed: load_cell(path) for seed, path in paths.items()}
                missing = [seed for seed in args.seeds if found[seed] is None]
                bar.set_postfix_str(f"{subject.label}, {name}")
                try:
                    simulator = open_simulator(subject, name, args) if missing else None
                except (ValueError, ImportError) as error:
                    if name == "none":
                        raise InputError(str(error)) from error
                    left_out[name] = " ".join(str(error).split())
                    break  # for one checkpoint, for all: they are compared
                for seed in missing:
                    found[seed] = run_cell(subject, simulator, seed, args)
                    write_whole(paths[seed], lambda partial, cell=found[seed]: np.savez(partial, **cell))
                cells |= {(subject.label, name, seed): found[seed] for seed in args.seeds}
                bar.update(len(args.seeds))
    cells = {key: cell for key, cell in cells.items() if key[1] not in left_out}
    check_same_starts(cells)
    return cells, left_out


def left_out_lines(left_out: dict[str, str]) -> list[str]:
    """One line for each reason."""
    by_reason = {}
    for name, reason in left_out.items():
        by_reason.setdefault(reason, []).append(words_of(name))
    return [f"{'; '.join(names)}: {reason}" for reason, names in by_reason.items()]


def check_same_starts(cells: Cells) -> None:
    """Whatever the checkpoint and the perturbation, a seed's episodes begin alike in one simulator, or no comparison means anything."""
    starts = {}
    for (label, name, seed), cell in cells.items():
        place = PERTURBATIONS[name].simulator, seed
        (first_label, first_name), first = starts.setdefault(place, ((label, name), str(cell["start"])))
        if str(cell["start"]) != first:
            raise RuntimeError(
                f"{label} began {name}, seed {seed}, in other states or under other commands than {first_label} began {first_name}"
            )


def choose_worst(rows: list[dict], count: int) -> list[dict]:
    """Lowest returns of one checkpoint's rows: of each label first, then of each perturbation, then any; failures, while there are any."""
    failures = [row for row in rows if not row["success"]]
    ordered, chosen = sorted(failures or rows, key=lambda row: row["return"]), []
    for feature in ("label", "perturbation", None):
        for row in ordered:
            taken = [other[feature] for other in chosen] if feature else []
            if len(chosen) < count and row not in chosen and (feature is None or row[feature] not in taken):
                chosen.append(row)
    return sorted(chosen, key=lambda row: row["return"])


def trace_worst(subjects: list[Subject], rows: list[dict], args: Args) -> list[dict]:
    """The chosen rows with `trace`, the replayed episode, and `replay_return`, which equals the row's where replays are exact."""
    traced = []
    for subject in subjects:
        for row in choose_worst([row for row in rows if row["checkpoint"] == subject.label], args.worst):
            simulator = open_simulator(subject, row["perturbation"], args)
            batch, place = divmod(row["episode"], min(args.num_envs, args.episodes))
            safety = CONTRACTS[subject.env_id].safety
            seed = stream_seed(row["seed"], batch, 0)
            episodes, traces = run_batch(subject.policy, simulator, safety, seed, (place,))
            length = int(episodes["length"][place])
            trace = {name: x[:length, 0] for name, x in traces.items()}
            trace["time"] = np.arange(length) * simulator.seconds
            action = torch.as_tensor(trace["action"], device=args.device)
            trace["unit_action"] = subject.policy.to_units(action).cpu().numpy()
            replay = dict(trace=trace, replay_return=episodes["return"][place].item(), second=simulator.seconds)
            traced.append(row | replay | dict(scene=simulator.scene()))
    return traced


def episode_name(row: dict) -> str:
    return f"{row['checkpoint']}/{row['perturbation']}/{row['seed']}/{row['episode']}"


# ------------------------------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------------------------------

SUBJECT_COLOURS = ("#1f5fa8", "#d1620e", "#2b8a3e", "#7a3fa0", "#8a6d1d", "#444444")
LABEL_COLOURS = dict(
    zip(LABELS, ("#4477aa", "#cc3311", "#ee9922", "#228833", "#aa3377", "#777777", "#66ccee"), strict=True)
)


def conditions(rows: list[dict]) -> list[str]:
    """The perturbations of rows, in the order of PERTURBATIONS; a checkpoint may lack some."""
    found = {row["perturbation"] for row in rows}
    return [name for name in PERTURBATIONS if name in found]


def words_of(perturbation: str) -> str:
    return {"mujoco_c": "MuJoCo C", "mjx": "MJX"}.get(perturbation, perturbation.replace("_", " "))


def plot_scores(path: Path, summary: list[dict], title: str) -> None:
    """Middle return and success rate of each checkpoint under each perturbation, with their intervals."""
    names = conditions(summary)
    labels = list(dict.fromkeys(row["checkpoint"] for row in summary))
    figure = Figure(figsize=(10, 1.6 + 0.42 * len(names)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for k, label in enumerate(labels):
        rows = {row["perturbation"]: row for row in summary if row["checkpoint"] == label}
        own = [name for name in names if name in rows]
        offset = 0.22 * (k - (len(labels) - 1) / 2)
        for axis, metric, scale in ((axes[0], "return", 1.0), (axes[1], "success", 100.0)):
            middle = np.array([rows[name][metric] for name in own]) * scale
            ends = [np.array([rows[name][f"{metric}_{end}"] for name in own]) * scale for end in ("low", "high")]
            errors = np.abs(np.array([middle - ends[0], ends[1] - middle]))
            place, colour = np.array([names.index(name) for name in own]) + offset, SUBJECT_COLOURS[k % len(SUBJECT_COLOURS)]
            axis.errorbar(middle, place, xerr=errors, fmt="o", color=colour, ms=5, capsize=2.5, lw=1.6, label=label)
            axis.axvline(middle[0], color=colour, lw=0.8, ls=":")
    axes[0].set_yticks(range(len(names)), [words_of(name) for name in names])
    axes[0].invert_yaxis()
    axes[0].set_xlabel("return, interquartile mean")
    axes[0].locator_params(axis="x", nbins=5)
    axes[1].set_xlabel("success, % of episodes")
    axes[1].set_xlim(-3, 103)
    for axis in axes:
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    if len(labels) > 1:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=len(labels), frameon=False)
    figure.suptitle(f"{title}: 95% intervals; dotted: undisturbed", x=0.01, ha="left", fontsize=11)
    write_whole(path, lambda partial: figure.savefig(partial, dpi=130))


def plot_failures(path: Path, rows: list[dict], title: str) -> None:
    """Share of failed episodes under each perturbation, by label, one panel per checkpoint."""
    names = conditions(rows)
    labels = list(dict.fromkeys(row["checkpoint"] for row in rows))
    figure = Figure(figsize=(2.2 + 4.2 * len(labels), 1.9 + 0.36 * len(names)), layout="constrained")
    axes = figure.subplots(1, len(labels), sharey=True, squeeze=False)[0]
    found = [label for label in LABELS if any(row["label"] == label for row in rows)]
    for axis, checkpoint in zip(axes, labels, strict=True):
        for place, name in enumerate(names):
            cell = [row["label"] for row in rows if (row["checkpoint"], row["perturbation"]) == (checkpoint, name)]
            if not cell:
                axis.text(1.5, place, "not run", va="center", fontsize=8, color="#777777")
                continue
            left = 0.0
            for label in found:
                width = 100 * cell.count(label) / len(cell)
                axis.barh(place, width, left=left, color=LABEL_COLOURS[label], height=0.7)
                left += width
            axis.text(
                left + 1.5, place, f"{left:.0f}%" if left >= 1 or not left else f"{left:.1f}%", va="center", fontsize=8
            )
        axis.set_xlim(0, 112)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_xticks(range(0, 101, 25))
        axis.set_title(checkpoint, fontsize=10)
        axis.set_xlabel("failed episodes, %")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(names)), [words_of(name) for name in names])
    handles = [axes[0].barh(0, 0, color=LABEL_COLOURS[label], label=label) for label in found]
    if handles:
        figure.legend(handles, found, loc="outside lower center", ncols=min(4, len(found)), frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    write_whole(path, lambda partial: figure.savefig(partial, dpi=130))


def plot_worst(path: Path, traced: list[dict], contract: Contract, usual_reward: dict[str, float]) -> None:
    """Of each traced episode: reward of each step, its telling coordinate, and the actions, over time."""
    figure = Figure(figsize=(11, 0.6 + 1.55 * len(traced)), layout="constrained")
    axes = figure.subplots(len(traced), 3, squeeze=False, sharex="row")
    coordinate, coordinate_name = contract.traced
    for line, row in zip(axes, traced, strict=True):
        trace, colour = row["trace"], LABEL_COLOURS.get(row["label"], "#228833")
        short = len(trace["time"]) * row["second"] < 1.0  # each step matters: raw, with markers
        dots = dict(marker="o", ms=3) if short else {}
        width = 1 if short else max(1, round(0.2 / row["second"]))
        smooth = np.convolve(trace["reward"], np.ones(width) / width, "valid")
        line[0].plot(trace["time"][len(trace["time"]) - len(smooth) :], smooth, color=colour, lw=1.1, **dots)
        line[0].axhline(0.0, color="#999999", lw=0.6)  # keeps 0 in sight: an axis about a constant shows noise
        if usual_reward[row["checkpoint"]] > 0:
            line[0].axhline(usual_reward[row["checkpoint"]], color="black", lw=0.8, ls=":")
        line[1].plot(trace["time"], trace["qpos"][:, coordinate], color=colour, lw=1.1, **dots)
        line[2].plot(trace["time"], trace["unit_action"].clip(-1, 1), color=colour, lw=0.7, alpha=0.8, **dots)
        line[2].set_ylim(-1.1, 1.1)
        title = f"{row['checkpoint']}, {words_of(row['perturbation'])}, seed {row['seed']}, episode {row['episode']}: "
        line[0].set_title(f"{title}{row['label'] or 'success'}", loc="left", fontsize=9)
        for axis in line:
            axis.grid(alpha=0.25)
            axis.tick_params(labelsize=7)
            axis.spines[["top", "right"]].set_visible(False)
    names = (
        "reward per step (dotted: usual)\nmeans of 0.2 s; if all is under 1 s, each step",
        coordinate_name,
        "actions, clipped to +-1 of their range",
    )
    for axis, name in zip(axes[-1], names, strict=True):
        axis.set_xlabel(f"s\n{name}", fontsize=9)
    write_whole(path, lambda partial: figure.savefig(partial, dpi=130))


def write_film(path: Path, write: Callable[[Path], None]) -> None:
    """`write_whole`; an encoder's OSError, which names no file and may have no number, gets both."""
    try:
        write_whole(path, write)
    except OSError as error:
        raise OSError(error.errno or errno.EIO, " ".join(str(error).split()), str(path)) from error


def film(path: Path, row: dict) -> str:
    """Draw the last 10 s of a traced episode; returns what the film shows. Raises what MuJoCo's renderers raise."""
    import imageio.v2 as imageio
    from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer

    model, seconds = row["scene"], row["second"]
    data = mujoco.MjData(model)
    # "track" follows the robot; Gymnasium takes its free camera where the model has no camera of this name.
    renderer = MujocoRenderer(model, data, width=480, height=360, camera_name="track")
    states = row["trace"]["qpos"][-round(10 / seconds) :]
    slower = max(1, math.ceil(2.0 / (len(states) * seconds)))  # a short fall is stretched to 2 s or so
    every = max(1, round(0.04 / slower / seconds))
    frames = []
    for qpos in states[::every]:
        data.qpos[:] = qpos
        mujoco.mj_forward(model, data)
        frames.append(renderer.render("rgb_array"))
    renderer.close()
    frame_seconds = every * seconds * slower
    timing = dict(duration=1000 * frame_seconds, loop=0)
    if path.suffix == ".mp4":
        timing = dict(fps=1 / frame_seconds, macro_block_size=8)
    write_film(path, lambda partial: imageio.mimwrite(partial, frames, **timing))
    slowed = f", {slower} times slower" if slower > 1 else ""
    return f"the last {len(states) * seconds:.1f} s of {episode_name(row)}{slowed}"


def is_disk_full(error: Exception, folder: Path) -> bool:
    """Encoders that are other programs hide the error's number: then the text says it, or the space that is left."""
    if not isinstance(error, OSError):
        return False
    numbered = error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    return numbered or (error.filename is not None and shutil.disk_usage(folder).free < 2**24)  # 16 MiB: films are under 10


def try_film(out: Path, row: dict) -> tuple[str | None, str]:
    """The film's name, None where there is none, and one line about it. A process of its own draws: OpenGL can abort the whole of it."""
    if "DISPLAY" not in os.environ:
        # Without a screen MuJoCo draws through EGL; where that is missing too, set MUJOCO_GL=osmesa.
        os.environ.setdefault("MUJOCO_GL", "egl")
    name = "worst.mp4" if importlib.util.find_spec("imageio_ffmpeg") else "worst.gif"
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            return name, process.submit(film, out / name, row).result()
    except Exception as error:  # MuJoCo's back ends raise many types where there is nothing to draw with
        if is_disk_full(error, out):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out / name)) from error
        reason = " ".join(str(error).split())[:120]
        if isinstance(error, OSError) and error.filename == str(out / name):
            return None, f"no film: it cannot be written ({reason})"
    backend = os.environ.get("MUJOCO_GL", "glfw")
    return None, f"no film: MuJoCo cannot draw here with MUJOCO_GL={backend} ({reason}); try egl or osmesa"


# ------------------------------------------------------------------------------------------------------------------------
# The record and the postmortem
# ------------------------------------------------------------------------------------------------------------------------


def sized(x: float) -> str:
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x + 0.0:.3g}"  # no -0


def with_interval(row: dict, name: str, scale: float = 1.0, unit: str = "") -> str:
    middle, low, high = (sized(scale * row[f"{name}{end}"]) for end in ("", "_low", "_high"))
    return f"{middle}{unit} [{low}, {high}]"


def verdict(row: dict, name: str) -> int:
    """1 or -1 where the interval of a difference excludes 0, else 0."""
    return int(row[f"{name}_low"] > 0) - int(row[f"{name}_high"] < 0)


def is_worse(row: dict) -> bool:
    """Return or success fell, against `none`, by an interval that excludes 0."""
    return -1 in (verdict(row, "return_change_from_none"), verdict(row, "success_change_from_none"))


def headline(subjects: list[Subject], summary: list[dict], rows: list[dict]) -> list[str]:
    """What happened, one sentence each."""
    lines = []
    for subject in subjects:
        own = [row for row in summary if row["checkpoint"] == subject.label]
        undisturbed, swaps = own[0], [row for row in own[1:] if row["simulator"] != "vecsim"]
        lines.append(
            f"**{subject.label}**, undisturbed: return {with_interval(undisturbed, 'return')}, success "
            f"{with_interval(undisturbed, 'success', 100, '%')} of {undisturbed['episodes']:,} episodes."
        )
        hurt = [row for row in own[1:] if row["simulator"] == "vecsim" and is_worse(row)]
        if hurt:
            weakest = min(hurt, key=lambda row: (row["success"], row["return"]))
            lines.append(
                f"**{subject.label}** is weakest under {words_of(weakest['perturbation'])} "
                f"({PERTURBATIONS[weakest['perturbation']].words}): success {with_interval(weakest, 'success', 100, '%')}, "
                f"return changed by {with_interval(weakest, 'return_change_from_none')}."
            )
        else:
            lines.append(f"**{subject.label}**: no drop of return or success is shown under any perturbation.")
        lines += [f"**{subject.label}**: {swap_words(row, rows)}." for row in swaps]
        same = kept(rows, subject.label, ("return", "length"))
        if "sparse_reward" in kept(rows, subject.label, MEASURED):
            lines.append(f"**{subject.label}**: the bookkeeping holds, no episode changed at all under sparse reward.")
        same = [words_of(name) for name in same if name != "sparse_reward"]
        if same:
            lines.append(f"**{subject.label}**: every episode kept its return and length under {', '.join(same)}.")
        failed = Counter(row["label"] for row in rows if row["checkpoint"] == subject.label and row["label"])
        counts = ", ".join(f"{label} {count}" for label, count in failed.most_common())
        lines.append(
            f"**{subject.label}** failed {sum(failed.values()):,} episodes" + (f": {counts}." if counts else ".")
        )
    for other in subjects[1:]:
        first, name = subjects[0].label, f"return_beyond_{subjects[0].label}"
        own = [row for row in summary if row["checkpoint"] == other.label]
        own = [row for row in own if not math.isnan(row[name])]
        equal = [row["perturbation"] for row in own if all_returns_equal(rows, row["perturbation"], (first, other.label))]
        parts = [f"equal in every episode under {', '.join(map(words_of, equal))}"] if equal else []
        for sign, words in ((1, "more"), (-1, "less"), (0, "no difference shown")):
            compared = [row for row in own if row["perturbation"] not in equal and verdict(row, name) == sign]
            names = [words_of(row["perturbation"]) for row in compared]
            parts += [f"{words} under {', '.join(names)}"] if names else []
        lines.append(f"**{other.label}** against **{first}**, return, paired by episode: {'; '.join(parts)}.")
    return lines


def all_returns_equal(rows: list[dict], perturbation: str, labels: tuple[str, str]) -> bool:
    return len({row["return"] for row in rows if row["perturbation"] == perturbation and row["checkpoint"] in labels}) == 1


def swap_words(row: dict, rows: list[dict]) -> str:
    """What another simulator made of a checkpoint's return and success; equal returns in every episode show no agreement."""
    name = words_of(row["perturbation"])
    seen = (row["perturbation"], "none")
    returns = {r["return"] for r in rows if r["checkpoint"] == row["checkpoint"] and r["perturbation"] in seen}
    success = with_interval(row, "success_change_from_none", 100, " points")
    changes = f"return changed by {with_interval(row, 'return_change_from_none')}, success by {success}"
    if verdict(row, "return_change_from_none") or verdict(row, "success_change_from_none"):
        return f"{name} differs from vecsim from the same initial states: {changes}"
    if len(returns) == 1:
        return (
            f"{name} and vecsim are both at a return of {sized(*returns)} in every episode, a limit that may hide "
            f"differences; success changed by {success}"
        )
    return f"no difference shown between {name} and vecsim from the same initial states: {changes}"


def kept(rows: list[dict], label: str, columns: tuple[str, ...]) -> list[str]:
    """Perturbations under which every episode of a checkpoint equals its twin in these columns."""
    outcomes = {}
    for row in rows:
        if row["checkpoint"] == label:
            outcome = str([row[name] for name in ("seed", "episode", *columns)])  # as text NaN equals NaN
            outcomes.setdefault(row["perturbation"], set()).add(outcome)
    return [name for name, own in outcomes.items() if name != "none" and own == outcomes["none"]]


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows]) + "\n"


def describe_worst(row: dict) -> str:
    """One line of a traced episode."""
    facts = [f"return {sized(row['return'])} after {row['length']:,.0f} steps ({row['seconds']:.1f} s)"]
    facts.append("lasted to the time limit" if row["survived"] else "quarantined" if row["invalid"] else "terminated")
    if not math.isnan(row["speed"]):
        facts.append(f"{row['speed']:.2f} m/s forward")
    if not math.isnan(row["tracking"]):
        facts.append(f"velocity error {row['tracking']:.2f} m/s")
    facts.append(f"{100 * row['saturation_end']:.0f}% of the actions at their bounds in its last second")
    if row["slump_seconds"]:
        facts.append(f"slump of {row['slump_seconds']} s, {'ended' if row['slump_over'] else 'to the end'}")
    exact = row["replay_return"] == row["return"]
    replay = "" if exact else f"; its replay returned {sized(row['replay_return'])}, so the trace is of a sibling"
    return f"- `{episode_name(row)}`, **{row['label'] or 'success'}**: {', '.join(facts)}{replay}."


def postmortem(record: dict, summary: list[dict], rows: list[dict], traced: list[dict], subjects: list[Subject]) -> str:
    """The page that a reader opens first."""
    labels, names = [s.label for s in subjects], conditions(summary)
    by_place = {(row["checkpoint"], row["perturbation"]): row for row in summary}
    columns = {"return": ("return", 1, ""), "success": ("success", 100, "%"), "unsafe steps": ("unsafe", 100, "%")}
    if CONTRACTS[record["env_id"]].largest_tracking is not None:
        columns["velocity error"] = ("tracking", 1, " m/s")
    places = [(words, label) for words in columns for label in labels]

    def score(words: str, label: str, name: str) -> str:
        row = by_place.get((label, name))
        return "not run" if row is None else with_interval(row, *columns[words])

    scores = [[words_of(name), *(score(*place, name) for place in places)] for name in names]
    counts = Counter((row["checkpoint"], row["perturbation"], row["label"]) for row in rows)
    found = [label for label in LABELS if any(key[2] == label for key in counts)]
    failures = [
        [checkpoint, words_of(name), *(str(counts[checkpoint, name, label] or "") for label in found)]
        for checkpoint in labels
        for name in names
        if any(counts[checkpoint, name, label] for label in found)
    ]
    task = record["task"]
    parts = [
        f"# {record['env_id']}: {' against '.join(labels)}\n",
        f"{len(rows):,} episodes: seeds {', '.join(map(str, record['configuration']['seeds']))}, {record['configuration']['episodes']} "
        f"episodes each, {len(names)} conditions; {record['hardware']}. Made by `{record['command']}`.\n",
        "## What happened\n",
        "\n".join(f"- {line}" for line in headline(subjects, summary, rows)) + "\n",
        "![scores](scores.png)\n",
        markdown_table(["condition", *(f"{words}, {label}" for words, label in places)], scores),
        "## How it failed\n",
        "![failures](failures.png)\n",
        markdown_table(["checkpoint", "condition", *found], failures) if failures else "No episode failed.\n",
        "## The worst episodes\n",
        "\n".join(describe_worst(row) for row in traced) + "\n",
        "![worst](worst.png)\n",
        "Rows of the traces are before each step; the state that ended an episode is not among them.\n",
        f"Film: {record['film']}.\n",
        "## Failure labels, the first rule that holds\n",
        markdown_table(["label", "rule"], [[label, rule] for label, rule in RULES.items()]),
        "## The task\n",
        markdown_table(["", ""], [[name, text] for name, text in task.items()]),
        "## How far this goes\n",
        "- Returns and velocity errors are interquartile means; success and unsafe steps are means. A change is taken "
        "episode by episode, then averaged in the same way.\n"
        "- Intervals are 95%, paired by episode, over initial states and disturbances: another training run is another policy.\n"
        "- Where no episode of n failed or none succeeded, the interval has no width; by the rule of three the rate may still be 3/n off.\n"
        "- With intervals for many conditions, one in twenty differences is expected to exclude 0 by chance.",
        *(f"- Left out: {line}." for line in left_out_lines(record["left_out"])),
    ]
    return "\n".join(parts) + "\n"


def clock_and_options(subject: Subject, env: vecsim_torch.VecSim) -> dict:
    """The time limit, the control step, and the options in which the task departs from its own defaults."""
    control_step = env.task.frame_skip * env.mj_model.opt.timestep
    limit = env.settings.max_episode_steps
    defaults = vars(type(env.task)())
    changed = {name: x for name, x in vars(env.task).items() if x != defaults[name]}
    return dict(
        time_limit=f"{limit:,} steps, {limit * control_step:g} s",
        control_step=f"{control_step:g} s, {env.task.frame_skip} physics steps",
        options=", ".join(f"{name} = {x}" for name, x in changed.items()) or "the task's own",
    )


def make_record(subjects: list[Subject], args: Args, left_out: dict[str, str], cells: Cells, seconds: float) -> dict:
    contract, env_id = CONTRACTS[subjects[0].env_id], subjects[0].env_id
    on_gpu = args.device.startswith("cuda")
    envs = [vecsim_torch.make(env_id, 1, **subject.options) for subject in subjects]
    checkpoints = [{name: x for name, x in s._asdict().items() if name != "policy"} for s in subjects]
    for checkpoint, subject, env in zip(checkpoints, subjects, envs, strict=True):
        checkpoint["reads"] = list(subject.policy.groups or env.observation_slices)
        checkpoint["reads_privileged"] = subject.policy.privileged
    return dict(
        env_id=env_id,
        task=dict(
            observation=contract.observation,
            action=contract.action,
            reward=contract.reward,
            termination=contract.termination,
            success=success_words(contract),
            safety_constraint=contract.safety.words,
            **clock_and_options(subjects[0], envs[0]),
        ),
        command=shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        configuration=dataclasses.asdict(args),
        perturbations={
            name: PERTURBATIONS[name]._replace(options=perturb_fields(PERTURBATIONS[name], env_id))._asdict()
            for name in args.perturbations
        },
        left_out=left_out,
        checkpoints=checkpoints,
        initial_states={f"{name}, seed {seed}": str(cell["start"])[:16] for (_, name, seed), cell in cells.items()},
        seconds=round(seconds, 1),
        versions=versions(),
        simulator=simulator_hash(),
        hardware=torch.cuda.get_device_name(args.device) if on_gpu else vecsim_torch.cpu_name(),
        threads=torch.get_num_threads(),
    )  # fmt: skip


def versions() -> dict[str, str]:
    known = dict(
        python=sys.version.split()[0],
        torch=str(torch.__version__),
        mujoco=mujoco.__version__,
        gymnasium=gymnasium.__version__,
        numpy=np.__version__,
    )
    for name in ("jax", "jaxlib", "mujoco-mjx"):  # read from the packages: an import of jax would take memory of the GPU
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            known[name] = importlib.metadata.version(name)
    return known


def write_evidence(
    out: Path, subjects: list[Subject], args: Args, cells: Cells, left_out: dict[str, str], started: float
) -> dict:
    """Everything but the cells; returns the record."""
    contract = CONTRACTS[subjects[0].env_id]
    rows = episode_rows(subjects, cells, args.seeds)
    write_rows(out / "episodes.csv", rows)
    summary = summarize(rows, args.resamples)
    write_rows(out / "summary.csv", summary)
    traced = trace_worst(subjects, rows, args)
    arrays = {f"{episode_name(row)}/{name}": x for row in traced for name, x in row["trace"].items()}
    write_whole(out / "worst.npz", lambda partial: np.savez_compressed(partial, **arrays))
    usual_reward = {s.label: usual([cells[s.label, "none", seed] for seed in args.seeds]).reward for s in subjects}
    title = f"{subjects[0].env_id}, {' against '.join(s.label for s in subjects)}"
    plot_scores(out / "scores.png", summary, title)
    plot_failures(out / "failures.png", rows, title)
    plot_worst(out / "worst.png", traced, contract, usual_reward)
    worst = min(traced, key=lambda row: (row["success"], row["return"]))
    name, words = try_film(out, worst) if args.video else (None, "not asked for")
    record = make_record(subjects, args, left_out, cells, time.perf_counter() - started)
    record |= dict(film=f"[{words}]({name})" if name else words)
    write_text(out / "record.json", json.dumps(record, indent=2) + "\n")
    write_text(out / "postmortem.md", postmortem(record, summary, rows, traced, subjects))
    return record


# ------------------------------------------------------------------------------------------------------------------------
# Main
# ------------------------------------------------------------------------------------------------------------------------


def evaluate(args: Args) -> Path:
    """Run the panel and write its folder, whose path is returned."""
    started = time.perf_counter()
    args = check_args(args)
    subjects = load_subjects(args)
    out = Path(args.out or f"runs/panel__{subjects[0].env_id}__{time.strftime('%Y%m%d-%H%M%S')}")
    args = dataclasses.replace(args, out=str(out))
    with own_folder(out, fingerprint(subjects, args)) as folder:
        try:
            cells, left_out = run_panel(subjects, args, folder)
            record = write_evidence(out, subjects, args, cells, left_out, started)
        except (OSError, KeyboardInterrupt) as error:
            error.add_note(f"{len(list(folder.glob('*--*.npz')))} finished cells are kept; go on with --out {out}")
            raise
        for line in left_out_lines(left_out):
            print(f"left out: {line}")
        print(f"film: {record['film']}")
        shutil.rmtree(folder)
    print((out / "postmortem.md").read_text().split("## What happened\n")[1].split("![scores]")[0].strip())
    print(f"evidence: {out / 'postmortem.md'}")
    return out


def parse_args(argv: list[str]) -> Args:
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(Args, args=argv, description=__doc__)
    except SystemExit as stop:
        if not stop.code:
            raise  # --help
        raise InputError(" ".join(re.sub(r"[^\x20-\x7e]+", " ", complaint.getvalue()).split())) from None


def main() -> int:
    try:
        evaluate(parse_args(sys.argv[1:]))
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (OSError, KeyboardInterrupt) as error:  # the disk, or the user; a defect shows its traceback
        what = f"cannot write: {error}" if isinstance(error, OSError) else "interrupted"
        print("; ".join([f"error: {what}", *getattr(error, "__notes__", [])]), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
