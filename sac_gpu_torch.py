"""Soft actor-critic for thousands of robots on one device: simulator, replay ring, critics and policy never leave it.

    python sac_gpu_torch.py --env-id InvertedPendulum-v5 --no-compile       # small networks: eager is quick enough on a CPU
    python sac_gpu_torch.py --env-id HalfCheetah-v5                         # a GPU where there is one, else the CPU
    python sac_gpu_torch.py --env-id HalfCheetah-v5 --preset vanilla        # textbook SAC in the same setting
    python sac_gpu_torch.py --env-id Ant-v5 --num-envs 1024 --batch-size 8192 --updates-per-step 2 --replay-capacity 10000000 --bf16
    python sac_gpu_torch.py --resume runs/NAME/checkpoint.pt --total-timesteps 4000000
    python sac_gpu_torch.py --play runs/NAME/checkpoint.pt --capture-video
    python sac_gpu_torch.py --play runs/NAME/checkpoint.pt --export policy.onnx
    torchrun --nproc-per-node=2 sac_gpu_torch.py --env-id Ant-v5            # data parallel: gradients averaged over the processes

On one AMD EPYC core: HalfCheetah-v5 5,156 after 160 thousand environment steps, Hopper-v5 3,342 after 200 thousand (medians of three
seeds, in Gymnasium's own environments, two to seven minutes on shared cores), InvertedPendulum-v5 1,000 from 6 to 10 thousand on.

A flag whose default reads None takes its value from PRESETS, then from its task in TASK_DEFAULTS, then from COMMON. Each trick beyond
the textbook is one flag, so that an ablation is a loop over flags. (--preset vanilla turns all of them off, and sets the textbook's
learning rates, tau, temperature, target entropy, network sizes and policy_frequency too: an ablation starts from one preset or the other.)

    trick                          off (textbook)               on
    categorical critic             --critic scalar              --critic categorical (needs scaled rewards or a --value-limit)
    normalised layers              --network mlp                --network layer_norm, or flash (residual, batch norm; off by default)
    unit weight rows               --weight-projection False    --weight-projection True (off by default)
    scaled observations            --normalize-observations False   --normalize-observations True
    scaled rewards                 --normalize-rewards False    --normalize-rewards True
    longer returns                 --n-step 1                   --n-step 3 (on for Hopper only)
    held exploration noise         --noise-repeat-max 1         --noise-repeat-max 16
    mean of the two critics        --critic-reduction min       --critic-reduction mean

Needs `vecsim_torch.py` beside it and nothing else of this project: copy the two files and they are yours.

Sources: SAC, Haarnoja et al. 2018b (arXiv:1812.05905), eq. 5 to 7, 18; categorical critic, Bellemare et al. 2017 (arXiv:1707.06887),
algorithm 1; many environments and large batches, Seo et al. 2025 (FastTD3, arXiv:2505.22642; FastSAC); residual blocks, unit rows,
reward scale and held noise, FlashSAC 2026 (arXiv:2604.04539); batch norm of both halves of a batch at once, Bhatt et al. 2024
(CrossQ, arXiv:1902.05605); time limits, Pardo et al. 2018 (arXiv:1712.00378); running moments, Chan et al. 1983.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import io
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium
import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor, distributed, nn
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


@dataclasses.dataclass
class Args:
    """None: the preset, else the task's row in TASK_DEFAULTS, else COMMON, unless the help says otherwise. total_timesteps, learning_starts and every *_every count environment steps over all environments."""

    env_id: str = "Ant-v5"
    """task: any id that vecsim_torch.make knows"""
    preset: Literal["best", "vanilla"] = "best"
    """best: the tricks of the table at the top but those marked off by default; vanilla: textbook SAC, its learning rates, tau, temperature and policy_frequency included; other flags still win over the preset"""
    num_envs: int | None = None
    """environments stepped in parallel, over all processes (>= 1)"""
    total_timesteps: int | None = None
    """environment steps of the whole run (>= 1; rounded up to whole vector steps)"""
    seed: int = 1
    """seed of weights, environments and noise (>= 0; process r of a distributed run draws from its own stream)"""
    device: str = "auto"
    """auto (CUDA where there is a GPU, else CPU), cpu, cuda or cuda:N"""
    compile: bool = True
    """compile physics, policy step and losses with torch.compile (a minute or so, reported apart)"""
    cpu_threads: int | None = None
    """threads of PyTorch on a CPU (>= 1; default: 1 with --no-compile, whose many small operations more threads only delay, else PyTorch's choice)"""
    cuda_graphs: bool = True
    """capture the policy step and the gradient steps in CUDA graphs (no effect on a CPU)"""
    bf16: bool = False
    """run the networks, never the physics, under bfloat16 autocast"""
    run_dir: str | None = None
    """folder of this run, without one in it already (default: runs/<env_id>__sac__<seed>__<time>; the checkpoint's own folder with --resume)"""
    resume: str | None = None
    """checkpoint to continue from; flags not given keep the checkpoint's values"""
    checkpoint_every: int | None = None
    """environment steps between checkpoints (>= 1; default: a tenth of total_timesteps); the last state is always saved"""
    checkpoint_replay: bool = False
    """put the replay into the checkpoint, so that a run resumes bit for bit (on a CPU writing it takes the replay's memory once more); without it a resumed run starts with an empty replay"""
    log_every: int | None = None
    """environment steps between log lines, at most; checkpoints and evaluations log too (>= 1; default: total_timesteps / 200)"""
    eval_episodes: int = 20
    """episodes of an evaluation in gymnasium.make(env_id), and of --play (>= 0; 0 skips the evaluations); vecsim is scored on one episode of each environment"""
    eval_every: int | None = None
    """environment steps between evaluations in Gymnasium during training (>= 1; default: only the final one); their time is not counted"""
    play: str | None = None
    """checkpoint to play deterministically instead of training; prints its score"""
    export: str | None = None
    """with --play: write policy, normaliser and action scale to this ONNX file (--eval-episodes 0: no episodes)"""
    capture_video: bool = False
    """with --play of a task that Gymnasium has: write one episode, rendered there, beside the checkpoint"""
    track: bool = False
    """mirror the metrics to Weights & Biases (needs `pip install wandb`)"""
    profile: bool = False
    """time the stages of a hundred learning iterations, after ten of warm-up, then trace one more: profile.json and trace.json.gz in the run folder, and a printed table"""

    # the environment
    env_kwargs: dict[str, bool | int | float | str] | None = None
    """task options, pairs of name and value, on top of those in the task's row; for vecsim_torch.make and gymnasium.make alike, but for the simulator's own (randomize, perturb, pair_slots, self_collision, chunk)"""
    integrator: Literal["euler", "implicitfast", "rk4"] | None = None
    """integrator of the training physics (Gymnasium's own environments keep that of their MJCF)"""
    solver_iterations: int | None = None
    """Newton iterations of the contact solver (>= 1)"""
    random_initial_ages: bool = True
    """start the first episodes at random ages, so that thousands of robots do not time out together"""
    reward_scale: float | None = None
    """factor on the rewards that the learner sees (> 0; logged returns are unscaled)"""
    normalize_rewards: bool | None = None
    """divide rewards by a running scale of the discounted return, so that returns fit +-value_limit"""

    # the replay and the batch
    replay_capacity: int | None = None
    """transitions kept, over all processes (>= learning_starts; rounded up to whole vector steps); its memory is printed before it is taken"""
    half_precision_replay: bool = False
    """keep observations in float16: nearly half the memory, 3 decimal digits"""
    learning_starts: int | None = None
    """environment steps under uniformly random actions before the first update (>= 1); also what an empty replay is refilled to"""
    batch_size: int | None = None
    """transitions of one gradient step, over all processes (>= 1)"""
    updates_per_step: int | None = None
    """critic updates after each step of all environments (>= 1)"""
    policy_frequency: int | None = None
    """critic updates per update of policy and temperature (>= 1)"""

    # the networks
    network: Literal["mlp", "layer_norm", "flash"] | None = None
    """mlp: ReLU; layer_norm: layer norm and SiLU after each layer; flash: FlashSAC's residual blocks with batch norm, where each of several processes takes the moments of its own share of the batch, so that together they are not exactly one"""
    actor_hidden: tuple[int, ...] | None = None
    """hidden layer sizes of the policy; flash: one residual block per entry, all of one width"""
    critic_hidden: tuple[int, ...] | None = None
    """hidden layer sizes of each critic; flash: one residual block per entry, all of one width"""
    asymmetric_critic: bool = True
    """let the critics see the task's privileged observation, where it has one, instead of the policy's"""
    normalize_observations: bool | None = None
    """scale observations by their running mean and deviation"""
    log_std_min: float = -5.0
    """lower bound of the policy's log standard deviation before squashing, in units of half the action range; reached smoothly"""
    log_std_max: float = 2.0
    """upper bound of the same (> log_std_min)"""

    # the objective
    critic: Literal["categorical", "scalar"] | None = None
    """scalar: regress on the return; categorical: cross-entropy on its distribution over num_atoms values"""
    num_atoms: int = 101
    """values of the categorical distribution (>= 2)"""
    value_limit: float = 5.0
    """the values span +-value_limit, in scaled rewards; also what normalize_rewards scales returns to fit (> 0)"""
    critic_reduction: Literal["min", "mean"] | None = None
    """how the two critics become one, in the target and for the policy: the smaller value or the mean"""
    gamma: float | None = None
    """discount per environment step (0 to 1)"""
    n_step: int | None = None
    """rewards summed before the bootstrap (>= 1); an episode's end cuts the sum short"""
    tau: float | None = None
    """share of the online critics mixed into the target critics after each critic update (> 0, <= 1)"""
    target_entropy: float | None = None
    """entropy to hold, per action dimension, in units of half the action range (textbook: -1; -0.48 is a Gaussian of deviation 0.15)"""
    temperature_init: float | None = None
    """initial weight of the entropy (> 0)"""
    learn_temperature: bool = True
    """adapt the temperature so that the policy's entropy meets target_entropy; else it stays at temperature_init"""
    noise_repeat_max: int | None = None
    """longest time in steps that a robot keeps one draw of exploration noise; durations follow a zeta(2) law (>= 1; 1: fresh noise each step)"""

    # the learning rates
    learning_rate: float | None = None
    """Adam's initial learning rate of policy and critics (> 0)"""
    learning_rate_final: float | None = None
    """the learning rate moves linearly to this value over the run (> 0)"""
    temperature_learning_rate: float | None = None
    """Adam's learning rate of the temperature's logarithm (> 0)"""


# One row of values per task; a task without a row (or a value missing from its row) takes COMMON's; a preset's values go before both.
COMMON = dict(
    num_envs=128, total_timesteps=2_000_000, env_kwargs={}, integrator="euler", solver_iterations=4, reward_scale=1.0, normalize_rewards=True,
    replay_capacity=1_000_000, learning_starts=10_000, batch_size=512, updates_per_step=4, policy_frequency=2,
    network="layer_norm", actor_hidden=(256, 256), critic_hidden=(256, 256), normalize_observations=True,
    critic="categorical", critic_reduction="mean", gamma=0.99, n_step=1, tau=0.05, target_entropy=-0.5, temperature_init=0.01,
    noise_repeat_max=16, learning_rate=1e-3, learning_rate_final=3e-4, temperature_learning_rate=1e-3,
)  # fmt: skip
TASK_DEFAULTS = {
    "InvertedPendulum-v5": dict(num_envs=32, total_timesteps=16_384, learning_starts=1_000, batch_size=256, updates_per_step=8,
                                actor_hidden=(64, 64), critic_hidden=(64, 64), critic_reduction="min",
                                normalize_rewards=False, reward_scale=0.04),  # returns of at most 100 fit as they are
    "Hopper-v5": dict(total_timesteps=200_000, learning_starts=5_000, batch_size=256, updates_per_step=8,
                      critic_reduction="min", n_step=3),
    "Walker2d-v5": dict(total_timesteps=3_000_000),
    "HalfCheetah-v5": dict(total_timesteps=160_000, learning_starts=5_000, batch_size=256, updates_per_step=8, gamma=0.98),
    "Ant-v5": dict(total_timesteps=4_000_000, env_kwargs={"include_cfrc_ext_in_observation": False}),
    "Humanoid-v5": dict(total_timesteps=8_000_000, env_kwargs={
        "include_cinert_in_observation": False, "include_cvel_in_observation": False,
        "include_qfrc_actuator_in_observation": False, "include_cfrc_ext_in_observation": False}),
}  # fmt: skip
PRESETS = {
    "best": dict(),
    "vanilla": dict(
        reward_scale=1.0, normalize_rewards=False, normalize_observations=False, policy_frequency=1, network="mlp", actor_hidden=(256, 256),
        critic_hidden=(256, 256), critic="scalar", critic_reduction="min", n_step=1, tau=0.005,
        target_entropy=-1.0, temperature_init=1.0, noise_repeat_max=1, learning_rate=3e-4, learning_rate_final=3e-4,
        temperature_learning_rate=3e-4),
}  # fmt: skip


PROFILED = 10, 100  # learning iterations before --profile starts to time, and iterations timed


def with_task_defaults(args: Args, common: dict = COMMON, tasks: dict = TASK_DEFAULTS, presets: dict = PRESETS) -> Args:
    """Fill in what was left at None: from the preset, the task's row, COMMON, then what follows from other flags."""
    row = common | tasks.get(args.env_id, {}) | presets[args.preset]
    filled = {name: value for name, value in row.items() if getattr(args, name) is None}
    filled["env_kwargs"] = row["env_kwargs"] | (args.env_kwargs or {})  # options given go on top of the row's
    args = dataclasses.replace(args, **filled)
    name = f"{args.env_id.replace('/', '-')}__sac__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    derived = dict(
        run_dir=str(Path(args.resume).parent) if args.resume else f"runs/{name}",
        checkpoint_every=max(1, args.total_timesteps // 10),
        log_every=max(1, args.total_timesteps // 200),
        cpu_threads=torch.get_num_threads() if args.compile else 1,
    )
    return dataclasses.replace(args, **{name: value for name, value in derived.items() if getattr(args, name) is None})


# ------------------------------------------------------------------------------------------------------------------------
# Derived sizes
# ------------------------------------------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """What follows from the flags; computed here, printed once, nowhere else."""

    envs: int  # environments of this process
    batch: int  # transitions of this process in one gradient step
    slots: int  # vector steps that the replay holds
    first_slots: int  # vector steps that the replay must hold before an update
    iterations: int  # vector steps of the whole run


def derive_sizes(args: Args, world_size: int) -> Sizes:
    """Check every flag before anything is allocated, then compute the sizes."""
    counts = "num_envs total_timesteps solver_iterations replay_capacity learning_starts batch_size updates_per_step"
    counts += " policy_frequency n_step noise_repeat_max checkpoint_every log_every cpu_threads"
    rates = "learning_rate learning_rate_final temperature_learning_rate"
    rules = (  # flags, what is legal, and how to say it
        (counts, lambda x: x >= 1, ">= 1"),
        ("eval_every", lambda x: x is None or x >= 1, ">= 1"),
        ("seed", lambda x: 0 <= x < 2**63, "between 0 and 2**63 - 1"),
        ("eval_episodes", lambda x: x >= 0, ">= 0"),
        (f"{rates} reward_scale value_limit temperature_init", lambda x: 0 < x < math.inf, "> 0 and finite"),
        ("num_atoms", lambda x: x >= 2, ">= 2"),
        ("gamma", lambda x: 0 <= x <= 1, "between 0 and 1"),
        ("tau", lambda x: 0 < x <= 1, "> 0 and <= 1"),
        ("actor_hidden critic_hidden", lambda x: all(size >= 1 for size in x), "made of sizes >= 1"),
        ("target_entropy log_std_min log_std_max", math.isfinite, "finite"),
        ("log_std_max", lambda x: x > args.log_std_min, f"> log_std_min = {args.log_std_min:g}"),
        ("replay_capacity", lambda x: x >= args.learning_starts, f">= learning_starts = {args.learning_starts:,}"),
    )  # fmt: skip
    for names, legal, rule in rules:
        for name in names.split():
            if not legal(getattr(args, name)):
                raise InputError(f"{name} = {getattr(args, name)} must be {rule}")
    for name in ("actor_hidden", "critic_hidden"):
        hidden = getattr(args, name)
        if args.network == "flash" and len(set(hidden)) != 1:
            alike = (max(hidden, default=256),) * max(1, len(hidden))
            raise InputError(f"{name} = {hidden} must be blocks of one width for --network flash; use {alike}")
    if args.eval_every is not None and not args.eval_episodes:
        raise InputError("eval_every needs eval_episodes >= 1; use --eval-episodes 20")
    if args.eval_every is not None and args.env_id not in gymnasium.registry:
        raise InputError(f"eval_every: Gymnasium has no {args.env_id} to evaluate in; leave that flag away")
    if args.track and importlib.util.find_spec("wandb") is None:
        raise InputError("track needs Weights & Biases; run `pip install wandb` or leave --track away")
    for name in ("num_envs", "batch_size"):
        count = getattr(args, name)
        if count % world_size:
            below = count // world_size * world_size
            choices = f"{below} or {below + world_size}" if below else f"{world_size}"
            raise InputError(f"{name} = {count:,} does not split over {world_size} processes; use {choices}")
    slots = math.ceil(args.replay_capacity / args.num_envs)
    if slots < args.n_step:
        least = args.n_step * args.num_envs
        raise InputError(
            f"replay_capacity = {args.replay_capacity:,} holds {slots} steps of {args.num_envs:,} environments, fewer than "
            f"n_step = {args.n_step}; use --replay-capacity {least} or --n-step {slots}"
        )
    first_slots = max(args.n_step, math.ceil(args.learning_starts / args.num_envs))
    iterations = math.ceil(args.total_timesteps / args.num_envs)
    return Sizes(args.num_envs // world_size, args.batch_size // world_size, slots, first_slots, iterations)


def check_length(args: Args, sizes: Sizes, checkpoint: dict | None, profiled: tuple[int, int]) -> None:
    """Refuse a run that would end before its first update, or before the iterations that --profile times and traces."""
    done, written = 0, 0
    if checkpoint:
        replay = checkpoint["processes"][0]["replay"]
        done, written = checkpoint["iteration"], replay["written"] if replay else 0
    least = done + max(1, sizes.first_slots - written)  # vector steps up to and with the first that is followed by updates
    missed = "the first update"
    if args.profile:
        least, missed = least + sum(profiled), "the end of the profile"  # the first of these counts, and one more is traced
    if sizes.iterations < least:
        refill = " (the checkpoint holds no replay, so it is filled anew)" if checkpoint and not written else ""
        raise InputError(
            f"total_timesteps = {args.total_timesteps:,} ends before {missed}{refill}; "
            f"use --total-timesteps {least * args.num_envs} or more"
        )


# ------------------------------------------------------------------------------------------------------------------------
# Networks
# ------------------------------------------------------------------------------------------------------------------------


class RunningStatistics(nn.Module):
    """Running mean and variance of vectors, as buffers, so that every checkpoint holds them and evaluation freezes them."""

    def __init__(self, size: int, enabled: bool, limit: float = math.inf):
        super().__init__()
        self.enabled, self.limit = enabled, limit
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(size, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def update(self, x: Tensor, valid: Tensor) -> None:
        """Merge in the valid rows of x: (B, size), of all processes (Chan et al. 1983)."""
        if not self.enabled:
            return
        count, mean, variance = weighted_moments(x, valid)
        total = self.count + count
        divisor = total.clamp(min=1.0)
        shift = mean - self.mean
        squares = self.variance * self.count + variance * count + shift.square() * self.count * count / divisor
        self.mean += shift * count / divisor
        self.variance.copy_(torch.where(total > 0, squares / divisor, self.variance))  # no valid row yet: as it was
        self.count.copy_(total)

    def deviation(self) -> Tensor:
        return (self.variance + 1e-6).sqrt().float()

    def normalize(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return x
        return ((x - self.mean.float()) / self.deviation()).clamp(-self.limit, self.limit)

    def denormalize(self, x: Tensor) -> Tensor:
        return x * self.deviation() + self.mean.float() if self.enabled else x


def linear_layer(inputs: int, outputs: int, gain: float, bias: bool = True) -> nn.Linear:
    """Orthogonal weights, zero bias."""
    linear = nn.Linear(inputs, outputs, bias)
    nn.init.orthogonal_(linear.weight, gain)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


class PlainNetwork(nn.Module):
    """ReLU layers or, if normalized, layers that are each followed by layer norm and SiLU. The head starts near zero.

    Layer norm alone would hide the size of its input: x and 2 x would look the same, and a robot near its target could
    not tell a small error from a large one. Therefore normalized layers start with random biases, as nn.Linear's do."""

    def __init__(self, inputs: int, hidden: tuple[int, ...], outputs: int, normalized: bool):
        super().__init__()
        sizes, layers = [inputs, *hidden], []
        for i in range(len(hidden)):
            linear = linear_layer(sizes[i], sizes[i + 1], math.sqrt(2.0))
            if normalized:
                nn.init.uniform_(linear.bias, -(sizes[i] ** -0.5), sizes[i] ** -0.5)
                layers += [linear, nn.LayerNorm(sizes[i + 1]), nn.SiLU()]
            else:
                layers += [linear, nn.ReLU()]
        self.hidden = nn.Sequential(*layers)
        self.head = linear_layer(sizes[-1], outputs, gain=0.01)

    def forward(self, x: Tensor, learning: bool) -> Tensor:
        return self.head(self.hidden(x))  # the same whether learning or not


class BatchNorm(nn.Module):
    """Batch norm whose caller chooses the moments: those of the batch when learning, otherwise the running ones."""

    def __init__(self, size: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("variance", torch.ones(size))

    def forward(self, x: Tensor, learning: bool) -> Tensor:
        moments = self.mean, self.variance
        return functional.batch_norm(x, *moments, self.weight, self.bias, training=learning, momentum=0.01)


class ResidualBlock(nn.Module):
    """FlashSAC's block x + f(x): f widens by 4 and narrows again, each time with batch norm and ReLU."""

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


def critic_observation_size(env: gymnasium.vector.VectorEnv, args: Args) -> int | None:
    """None if the critics see what the policy sees."""
    return env.single_critic_space.shape[0] if env.single_critic_space and args.asymmetric_critic else None


class TwinCritics(nn.Module):
    """Two action-value networks with the same input and different initial weights."""

    def __init__(self, kind: str, inputs: int, hidden: tuple[int, ...], outputs: int):
        super().__init__()
        self.first = make_network(kind, inputs, hidden, outputs)
        self.second = make_network(kind, inputs, hidden, outputs)

    def forward(self, critic_obs: Tensor, action: Tensor, learning: bool) -> Tensor:
        x = torch.cat([critic_obs, action], -1)
        return torch.stack([self.first(x, learning), self.second(x, learning)])  # (2, B, outputs)


class Temperature(nn.Module):
    """Weight of the entropy. It learns the logarithm, so it stays positive."""

    def __init__(self, initial: float):
        super().__init__()
        self.log_value = nn.Parameter(torch.tensor(math.log(initial)))

    def forward(self) -> Tensor:
        return self.log_value.exp()


class Agent(nn.Module):
    """Squashed Gaussian policy, twin critics, target critics and temperature.

    Inside the agent an action is in half ranges: -1 to 1 spans the action space. critic_obs_size is None if the critics
    see what the policy sees."""

    def __init__(self, obs_size: int, critic_obs_size: int | None, action_space: gymnasium.spaces.Box, args: Args):
        super().__init__()
        low, high = torch.as_tensor(action_space.low), torch.as_tensor(action_space.high)
        bounded = low.isfinite() & high.isfinite()
        self.register_buffer("action_centre", torch.where(bounded, (high + low) / 2, 0.0))
        self.register_buffer("action_half_range", torch.where(bounded, (high - low) / 2, 1.0))
        self.obs_statistics = RunningStatistics(obs_size, args.normalize_observations, limit=10.0)
        self.critic_obs_statistics = self.obs_statistics
        if critic_obs_size is not None:
            self.critic_obs_statistics = RunningStatistics(critic_obs_size, args.normalize_observations, limit=10.0)
        self.return_statistics = RunningStatistics(1, args.normalize_rewards)
        self.register_buffer("largest_return", torch.zeros(()))  # absolute value, of all discounted returns so far
        outputs = args.num_atoms if args.critic == "categorical" else 1
        critic_inputs = (critic_obs_size or obs_size) + len(low)
        self.actor = make_network(args.network, obs_size, args.actor_hidden, 2 * len(low))
        self.critics = TwinCritics(args.network, critic_inputs, args.critic_hidden, outputs)
        atoms = torch.linspace(-args.value_limit, args.value_limit, args.num_atoms)
        self.register_buffer("atoms", atoms if args.critic == "categorical" else None, persistent=False)
        if self.atoms is not None:
            # The first distribution is a Gaussian of deviation value_limit / 5. A uniform one would stay wide until the
            # discount has shrunk it. Meanwhile it would lose probability at one edge, which pulls every value towards 0.
            for critic in (self.critics.first, self.critics.second):
                critic.head.bias.data.copy_(-0.5 * (5.0 * atoms / args.value_limit).square())
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.temperature = Temperature(args.temperature_init).requires_grad_(args.learn_temperature)
        self.value_limit, self.reduction = args.value_limit, args.critic_reduction
        self.log_std_min, self.log_std_max = args.log_std_min, args.log_std_max
        self.bf16 = args.bf16

    def autocast(self, x: Tensor) -> torch.autocast:
        # No cache: a cast cached inside a graph capture would go stale.
        return torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False)

    def policy(self, normalized_obs: Tensor, learning: bool) -> tuple[Tensor, Tensor]:
        """Mean and log deviation (B, actions) of the Gaussian before squashing."""
        with self.autocast(normalized_obs):
            mean, spread = self.actor(normalized_obs, learning).float().chunk(2, -1)
        middle, reach = (self.log_std_max + self.log_std_min) / 2, (self.log_std_max - self.log_std_min) / 2
        return mean, middle + reach * spread.tanh()

    def value(self, outputs: Tensor) -> Tensor:
        """Critic outputs (..., outputs) to values (...): the mean of the distribution if the critic is categorical."""
        return outputs.squeeze(-1) if self.atoms is None else outputs.softmax(-1) @ self.atoms

    def combined_value(self, outputs: Tensor) -> Tensor:
        """Outputs (2, B, outputs) of both critics to one value (B,)."""
        first, second = self.value(outputs)
        return torch.min(first, second) if self.reduction == "min" else (first + second) / 2

    def reward_divisor(self) -> Tensor:
        """Scale of the rewards: deviation of the discounted return, or more if the largest exceeds +-value_limit.

        1 without normalize_rewards. The largest return never decays, as in FlashSAC: one outlier shrinks rewards for good."""
        if not self.return_statistics.enabled:
            return torch.ones_like(self.largest_return)
        return torch.max(self.return_statistics.deviation().squeeze(0), self.largest_return / self.value_limit)

    def to_env(self, action: Tensor) -> Tensor:
        """An action in half ranges to the environment's units."""
        return self.action_centre + self.action_half_range * action

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """The deterministic action, in the environment's units."""
        mean, _ = self.policy(self.obs_statistics.normalize(obs), learning=False)
        return self.to_env(mean.tanh())


# ------------------------------------------------------------------------------------------------------------------------
# Replay
# ------------------------------------------------------------------------------------------------------------------------


class Transitions(NamedTuple):
    """One vector step of N environments; or the replay, a ring of S such steps. Step number t is in slot t % S.

    Shapes are those of the replay; a step has no first dimension. Where a step led to is stored beside it (final_obs)
    and not read from the next slot: after the end of an episode the next slot holds the first observation of another
    episode, and the slot after the newest step holds the oldest one."""

    obs: Tensor  # (S, N, obs)
    final_obs: Tensor  # (S, N, obs): where the step led to, before any auto-reset
    action: Tensor  # (S, N, actions), half ranges
    reward: Tensor  # (S, N), unscaled
    terminated: Tensor  # (S, N) bool
    truncated: Tensor  # (S, N) bool
    invalid: Tensor  # (S, N) bool: quarantined, masked everywhere
    critic_obs: Tensor | None = None  # (S, N, critic obs); None if the critics see obs
    final_critic_obs: Tensor | None = None  # (S, N, critic obs); None if the critics see final_obs


def allocate_replay(agent: Agent, sizes: Sizes, half_precision: bool) -> Transitions:
    """An empty ring on the agent's device for its observations and actions; half_precision: observations in float16.

    InputError if the memory is too small."""
    observed, device = torch.float16 if half_precision else torch.float32, agent.action_centre.device

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(sizes.slots, sizes.envs, *shape, dtype=dtype, device=device)

    obs_size, critic_obs_size = len(agent.obs_statistics.mean), len(agent.critic_obs_statistics.mean)
    try:
        flags = [zeros(dtype=torch.bool) for _ in range(3)]
        obs, final_obs = (zeros(obs_size, dtype=observed) for _ in range(2))
        replay = Transitions(obs, final_obs, zeros(len(agent.action_centre)), zeros(), *flags)
        if agent.critic_obs_statistics is not agent.obs_statistics:
            critic_obs, final_critic_obs = (zeros(critic_obs_size, dtype=observed) for _ in range(2))
            replay = replay._replace(critic_obs=critic_obs, final_critic_obs=final_critic_obs)
        return replay
    except RuntimeError as error:  # torch.OutOfMemoryError is one too
        raise InputError(
            f"the replay's {sizes.slots:,} steps of {sizes.envs:,} environments do not fit into the memory of {device}; "
            "use a smaller --replay-capacity or --half-precision-replay"
        ) from error


def replay_size(replay: Transitions) -> str:
    """One line about its transitions and its memory in this process."""
    slots, envs = replay.reward.shape
    size = sum(ring.nbytes for ring in replay if ring is not None) / 2**20
    return f"replay: {slots:,} steps x {envs:,} environments, {size:,.1f} MiB on {replay.reward.device}"


def store(replay: Transitions, number: int, step: Transitions) -> None:
    """Write step number `number`, over the oldest one if the ring is full. float16 stores what exceeds it as its largest number."""
    slot = number % len(replay.reward)
    for ring, x in zip(replay, step, strict=True):
        if ring is not None:
            ring[slot] = x.clamp(-65504.0, 65504.0) if ring.dtype == torch.float16 else x


def draw_transitions(
    replay: Transitions, written: int, n_step: int, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Slot and environment (count,) of uniformly drawn transitions, with replacement, after `written` steps were stored.

    A transition can be drawn only once the n_step - 1 steps after it are stored too. So no window of n_step steps
    crosses from the newest step to the oldest one."""
    slots, envs = replay.reward.shape
    stored = min(written, slots)
    starts = stored - n_step + 1
    draw = torch.randint(starts * envs, (count,), generator=generator, device=generator.device)
    oldest = written - stored
    return (oldest + draw // envs) % slots, draw % envs


# ------------------------------------------------------------------------------------------------------------------------
# Algorithm: pure functions
# ------------------------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """The B transitions of one gradient step. Observations are normalized, actions in half ranges."""

    obs: Tensor  # (B, obs)
    critic_obs: Tensor  # (B, critic obs)
    action: Tensor  # (B, actions)
    reward: Tensor  # (B,): discounted sum of up to n_step rewards, scaled
    discount: Tensor  # (B,): factor on the value that follows; 0 after a termination
    next_obs: Tensor  # (B, obs): where the last of those steps led to, before any auto-reset
    next_critic_obs: Tensor  # (B, critic obs)
    weight: Tensor  # (B,): 0 for a quarantined transition, otherwise 1


class CriticTerms(NamedTuple):
    """Logged by critic_loss: means over a batch, in which quarantined transitions count as 0."""

    critic_loss: Tensor
    value: Tensor  # of the first critic, in scaled rewards
    target_clipped: Tensor  # share of categorical targets whose mean is outside +-value_limit


class PolicyTerms(NamedTuple):
    """Logged by policy_loss: means over a batch, in which quarantined transitions count as 0."""

    policy_loss: Tensor
    entropy: Tensor
    temperature: Tensor


def weighted_moments(x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count (), mean (k,) and variance (k,) of the valid rows of x: (B, k), over all processes, in float64."""
    rows = torch.where(valid[:, None], x, 0.0).double()
    sums = sum_over_processes(torch.cat([valid.sum().double()[None], rows.sum(0), rows.square().sum(0)]))
    mean, mean_square = (sums[1:] / sums[0].clamp(min=1.0)).chunk(2)
    return sums[0], mean, (mean_square - mean.square()).clamp(min=0.0)


def gaussian_log_prob(action: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log density (B,) of diagonal Gaussians."""
    z = (action - mean) * (-log_std).exp()
    return (-0.5 * z.square() - log_std - 0.5 * math.log(2.0 * math.pi)).sum(-1)


def squashed_gaussian(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Action tanh(u) with u ~ N(mean, std), and its log density (B,): that of u minus the sum of log(d tanh(u) / du).

    log(1 - tanh(u)^2) is computed as 2 (log 2 - u - softplus(-2 u)), which stays exact where tanh saturates."""
    u = mean + log_std.exp() * noise
    log_slope = 2.0 * (math.log(2.0) - u - functional.softplus(-2.0 * u))
    return u.tanh(), gaussian_log_prob(u, mean, log_std) - log_slope.sum(-1)


@torch.no_grad()
def policy_step(agent: Agent, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Sampled action (N, actions), in half ranges and in the environment's units."""
    mean, log_std = agent.policy(agent.obs_statistics.normalize(obs), learning=False)
    action = (mean + log_std.exp() * noise).tanh()
    return action, agent.to_env(action)


def zeta_distribution(longest: int) -> Tensor:
    """Cumulative probability (longest,) of the durations 1, 2, ..., longest, each in proportion to 1 / duration^2."""
    weight = torch.arange(1, longest + 1, dtype=torch.float64) ** -2.0
    return (weight.cumsum(0) / weight.sum()).float()


def hold_noise(
    held: Tensor, remaining: Tensor, fresh: Tensor, uniform: Tensor, durations: Tensor
) -> tuple[Tensor, Tensor]:
    """Exploration noise (N, actions) of this step, and for how many more steps (N,) each robot keeps it.

    A robot keeps one draw for several steps (FlashSAC), because held noise explores further than noise that averages
    out. When its time is up, it takes `fresh`, and `uniform` (N,) is looked up in `durations`, the cumulative
    probabilities. The end of an episode does not replace the noise."""
    over = remaining == 0
    duration = torch.searchsorted(durations, uniform, right=True).clamp(max=len(durations) - 1) + 1
    return torch.where(over[:, None], fresh, held), torch.where(over, duration, remaining) - 1


@torch.no_grad()
def follow_returns(
    agent: Agent, returns: Tensor, reward: Tensor, terminated: Tensor, invalid: Tensor, gamma: float
) -> Tensor:
    """Discounted sum (N,) of each robot's rewards so far. Updates the statistics of its size, here and only here.

    A time limit does not reset the sum: bootstrapped values look past the time limit, so their scale must too."""
    returns = gamma * returns + torch.where(invalid, 0.0, reward)
    agent.return_statistics.update(returns[:, None], ~invalid)
    largest = torch.max(agent.largest_return, returns.abs().max())
    agent.largest_return.copy_(max_over_processes(largest))
    return torch.where(terminated | invalid, 0.0, returns)


def n_step_returns(
    reward: Tensor, terminated: Tensor, truncated: Tensor, invalid: Tensor, gamma: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return, discount of the bootstrap, and index of the last step used, all (B,), of windows (B, n) of n steps.

    The sum stops after a step that ended its episode and before a quarantined step. The value that follows is that of
    final_obs of the last step used. It counts with gamma^(steps used) if that step ran on or was truncated, because the
    robot would have gone on. It counts 0 after a termination, which wins over a truncation."""
    ended = terminated | truncated
    reached = torch.cat([torch.zeros_like(ended[:, :1]), ended[:, :-1]], 1).cumsum(1) == 0  # no end before this step
    used = reached & (invalid.cumsum(1) == 0)
    steps = torch.arange(reward.shape[1], device=reward.device)
    total = torch.where(used, reward * gamma**steps, 0.0).sum(1)
    length = used.sum(1)
    last = (length - 1).clamp(min=0)  # a window that starts quarantined has length 0; its weight masks it
    bootstrapped = ~terminated.gather(1, last[:, None]).squeeze(1)
    return total, bootstrapped * torch.full_like(total, gamma) ** length, last


@torch.no_grad()
def gather_batch(agent: Agent, replay: Transitions, slot: Tensor, env: Tensor, args: Args) -> Batch:
    """The drawn transitions as rows, scaled by the current statistics."""
    slots = len(replay.reward)
    window = (slot[:, None] + torch.arange(args.n_step, device=slot.device)) % slots
    columns = replay.reward, replay.terminated, replay.truncated, replay.invalid
    total, discount, last = n_step_returns(*(x[window, env[:, None]] for x in columns), args.gamma)
    valid = ~replay.invalid[slot, env]
    last_slot = (slot + last) % slots

    def normalized_pair(before: Tensor, after: Tensor, statistics: RunningStatistics) -> tuple[Tensor, Tensor]:
        seen, final = before[slot, env].float(), after[last_slot, env].float()
        # A quarantined transition may lead to NaN, which a weight of 0 does not remove.
        final = torch.where(valid[:, None], final, seen)
        return statistics.normalize(seen), statistics.normalize(final)

    obs, next_obs = normalized_pair(replay.obs, replay.final_obs, agent.obs_statistics)
    critic_obs, next_critic_obs = obs, next_obs
    if replay.critic_obs is not None:
        pair = replay.critic_obs, replay.final_critic_obs
        critic_obs, next_critic_obs = normalized_pair(*pair, agent.critic_obs_statistics)
    total = total * (args.reward_scale / agent.reward_divisor())
    action = replay.action[slot, env]
    return Batch(obs, critic_obs, action, total, discount, next_obs, next_critic_obs, valid.float())


def project_categorical(probability: Tensor, reward: Tensor, discount: Tensor, atoms: Tensor) -> Tensor:
    """Distribution (B, K) of reward + discount * Z on the K atoms, where Z has this probability (B, K) on them.

    Each moved atom shares its probability between its two neighbours, which keeps the mean. Outside goes to the edge."""
    low, spacing = atoms[0], (atoms[-1] - atoms[0]) / (len(atoms) - 1)  # more exact than a difference of neighbours
    moved = (reward[:, None] + discount[:, None] * atoms).clamp(atoms[0], atoms[-1])
    position = ((moved - low) / spacing).clamp(0.0, len(atoms) - 1.0)  # in atoms; rounding may leave the range
    below = position.floor()
    share_above = position - below
    below = below.long()
    above = (below + 1).clamp(max=len(atoms) - 1)
    projected = torch.zeros_like(probability)
    projected = projected.scatter_add(1, below, probability * (1.0 - share_above))
    return projected.scatter_add(1, above, probability * share_above)


def critic_target(agent: Agent, outputs: Tensor, reward: Tensor, discount: Tensor) -> Tensor:
    """Target of both critics, from the outputs (2, B, K) of the target critics: (B, K) probabilities or (B, 1) values.

    reward (B,) already holds the entropy bonus of the next action."""
    if agent.atoms is None:
        return (reward + discount * agent.combined_value(outputs))[:, None]
    first, second = outputs.softmax(-1)
    if agent.reduction == "mean":
        probability = (first + second) / 2
    else:
        first_value, second_value = agent.value(outputs)
        probability = torch.where((first_value < second_value)[:, None], first, second)
    return project_categorical(probability, reward, discount, agent.atoms)


def critic_loss(agent: Agent, noise: Tensor, batch: Batch, args: Args) -> tuple[Tensor, Tensor]:
    """Loss of both critics on a batch, and CriticTerms, stacked (Haarnoja et al. 2018b, eq. 5 and 6).

    With n_step > 1 only the entropy of the last action counts, as usual."""
    size = len(batch.obs)
    with torch.no_grad():
        next_action, next_log_prob = squashed_gaussian(*agent.policy(batch.next_obs, learning=False), noise)
    critic_obs, action, next_critic_obs = batch.critic_obs, batch.action, batch.next_critic_obs
    if args.network == "flash":  # one batch norm over current and next rows, which have different distributions
        critic_obs = next_critic_obs = torch.cat([batch.critic_obs, batch.next_critic_obs])
        action = next_action = torch.cat([batch.action, next_action])
    with agent.autocast(action):
        outputs = agent.critics(critic_obs, action, learning=True).float()[:, :size]
        with torch.no_grad():
            next_outputs = agent.target_critics(next_critic_obs, next_action, learning=True).float()[:, -size:]
    with torch.no_grad():
        soft_reward = batch.reward - batch.discount * agent.temperature() * next_log_prob
        target = critic_target(agent, next_outputs, soft_reward, batch.discount)
        expected = soft_reward + batch.discount * agent.combined_value(next_outputs)
    if agent.atoms is None:
        losses = 0.5 * (outputs - target).square().sum(-1)  # (2, B)
    else:
        losses = -(target * outputs.log_softmax(-1)).sum(-1)
    losses = losses.sum(0)
    with torch.no_grad():
        clipped = (expected.abs() > args.value_limit).float() if agent.atoms is not None else torch.zeros_like(losses)
        terms = torch.stack(CriticTerms(losses, agent.value(outputs[0]), clipped))
        terms = (terms * batch.weight).mean(1)
    return (losses * batch.weight).mean(), terms


def temperature_loss(temperature: Tensor, log_prob: Tensor, target_entropy: float) -> Tensor:
    """Haarnoja et al. 2018b, eq. 18: raises the temperature where the entropy -log_prob is below its target."""
    return -temperature * (log_prob.detach() + target_entropy)


def policy_loss(agent: Agent, noise: Tensor, batch: Batch, args: Args) -> tuple[Tensor, Tensor]:
    """Loss of policy and temperature on a batch, and PolicyTerms, stacked (Haarnoja et al. 2018b, eq. 7 and 18).

    The critics run with detached parameters, so that they get no gradient."""
    action, log_prob = squashed_gaussian(*agent.policy(batch.obs, learning=True), noise)
    frozen = {name: parameter.detach() for name, parameter in agent.critics.named_parameters()}
    with agent.autocast(action):
        outputs = torch.func.functional_call(agent.critics, frozen, (batch.critic_obs, action, False)).float()
    temperature = agent.temperature()
    losses = temperature.detach() * log_prob - agent.combined_value(outputs)
    loss = losses + temperature_loss(temperature, log_prob, args.target_entropy * action.shape[-1])
    with torch.no_grad():
        terms = torch.stack(PolicyTerms(losses, -log_prob, temperature.expand_as(losses)))
        terms = (terms * batch.weight).mean(1)
    return (loss * batch.weight).mean(), terms


@torch.no_grad()
def critic_step(agent: Agent, optimizer: torch.optim.Optimizer, tau: float) -> None:
    """One Adam step of the critics; then the target critics follow."""
    optimizer.step()
    for target, online in zip(agent.target_critics.parameters(), agent.critics.parameters(), strict=True):
        target.lerp_(online, tau)


def make_optimizer(module: nn.Module, learning_rate: Tensor) -> torch.optim.Adam:
    """Adam whose learning rate is a tensor on the device and whose moments exist from the start, at fixed addresses."""
    on_gpu = learning_rate.device.type == "cuda"
    optimizer = torch.optim.Adam(module.parameters(), lr=learning_rate, fused=True, capturable=on_gpu)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # zero gradients: creates the moments, moves nothing
    for moments in optimizer.state.values():
        moments["step"].zero_()
    return optimizer


def make_optimizers(
    agent: Agent, learning_rate: Tensor, temperature_learning_rate: float
) -> dict[str, torch.optim.Optimizer]:
    """One each for the policy, the critics and the temperature, because they step at different times and rates."""
    return dict(
        actor=make_optimizer(agent.actor, learning_rate),
        critics=make_optimizer(agent.critics, learning_rate),
        temperature=make_optimizer(agent.temperature, torch.full_like(learning_rate, temperature_learning_rate)),
    )


def capture(function, inputs: tuple[Tensor, ...]):
    """A CUDA graph of `function`, which must not read the host: call it like the function; its outputs live until the next call.

    The warm-up calls run the function for real; the caller restores what they change."""
    static_inputs = tuple(x.clone() for x in inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function(*static_inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function(*static_inputs)

    def replay(*inputs: Tensor):
        for static, x in zip(static_inputs, inputs, strict=True):
            static.copy_(x)
        graph.replay()
        return outputs

    return replay


class Functions(NamedTuple):
    """The functions that do the work: eager, compiled or, on a GPU, captured."""

    policy: Callable  # (obs, noise) -> action in half ranges, action in the environment's units
    critic_gradients: Callable  # (noise, *batch) -> CriticTerms, stacked
    critic_step: Callable
    policy_gradients: Callable  # (noise, *batch) -> PolicyTerms, stacked
    actor_step: Callable


def build_functions(
    agent: Agent, optimizers: dict[str, torch.optim.Optimizer], replay: Transitions, sizes: Sizes, args: Args
) -> Functions:
    """Compile and capture the functions; leaves agent and optimizers as they were."""
    step_function, critic_function, policy_function = policy_step, critic_loss, policy_loss
    if args.compile:
        step_function, critic_function, policy_function = (
            torch.compile(f, dynamic=False) for f in (policy_step, critic_loss, policy_loss)
        )

    def policy(obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        return step_function(agent, obs, noise)

    def critic_gradients(noise: Tensor, *batch: Tensor) -> Tensor:
        agent.critics.zero_grad(set_to_none=False)
        loss, terms = critic_function(agent, noise, Batch(*batch), args)
        loss.backward()
        return terms

    def policy_gradients(noise: Tensor, *batch: Tensor) -> Tensor:
        agent.actor.zero_grad(set_to_none=False)
        agent.temperature.zero_grad(set_to_none=False)
        loss, terms = policy_function(agent, noise, Batch(*batch), args)
        loss.backward()
        return terms

    def step_critics() -> None:
        critic_step(agent, optimizers["critics"], args.tau)

    def step_actor() -> None:
        optimizers["actor"].step()
        optimizers["temperature"].step()

    functions = Functions(policy, critic_gradients, step_critics, policy_gradients, step_actor)
    acting = torch.zeros_like(replay.obs[0], dtype=torch.float32), torch.zeros_like(replay.action[0])
    critic_ring = replay.obs if replay.critic_obs is None else replay.critic_obs
    row = replay.action.new_zeros(sizes.batch)
    obs, critic_obs, action = (row[:, None].repeat(1, x.shape[-1]) for x in (replay.obs, critic_ring, replay.action))
    batch = Batch(obs, critic_obs, action, row, row, obs, critic_obs, row)
    example = tuple(x.clone() for x in (action, *batch))
    state = [*agent.state_dict().values()]
    state += [x for optimizer in optimizers.values() for moments in optimizer.state.values() for x in moments.values()]
    before = [x.clone() for x in state]
    if args.cuda_graphs and row.device.type == "cuda":
        try:
            inputs = acting, example, (), example, ()
            functions = Functions(*(capture(f, x) for f, x in zip(functions, inputs, strict=True)))
        except RuntimeError as error:
            raise RuntimeError("capture in CUDA graphs failed; --no-cuda-graphs runs without them") from error
    else:  # compile now, so that compilation is timed apart from training
        functions.policy(*acting), functions.critic_gradients(*example), functions.policy_gradients(*example)
    for x, saved in zip(state, before, strict=True):
        x.copy_(saved)
    return functions


def update(
    agent: Agent, functions: Functions, batch: Batch, noise: Tensor, first_update: int, args: Args
) -> tuple[Tensor, Tensor, int]:
    """All gradient steps after one vector step; returns CriticTerms and PolicyTerms, stacked and summed, and the policy's updates.

    batch holds the rows of all updates, noise is (updates, 2, B, actions), and first_update counts those of the run so far: the
    policy takes its turn whenever a multiple of policy_frequency is crossed. Processes average gradients, terms and the running
    means of batch norm, which are the networks' only buffers."""
    critic_terms = torch.zeros(len(CriticTerms._fields), device=noise.device)
    policy_terms, policy_updates = torch.zeros(len(PolicyTerms._fields), device=noise.device), 0
    for k, rows in enumerate(zip(*(x.chunk(args.updates_per_step) for x in batch), strict=True)):
        terms = functions.critic_gradients(noise[k, 0], *rows)
        buffers = *agent.critics.buffers(), *agent.target_critics.buffers()
        average_over_processes([*(p.grad for p in agent.critics.parameters()), *buffers, terms])
        functions.critic_step()
        critic_terms += terms
        done = first_update + k
        if crossed(args.policy_frequency, done, done + 1):
            terms = functions.policy_gradients(noise[k, 1], *rows)
            gradients = [p.grad for p in (*agent.actor.parameters(), *agent.temperature.parameters())]
            average_over_processes([*gradients, *agent.actor.buffers(), terms])
            functions.actor_step()
            policy_terms += terms
            policy_updates += 1
    return critic_terms, policy_terms, policy_updates


# ------------------------------------------------------------------------------------------------------------------------
# Processes, checkpoint, log and evaluation
# ------------------------------------------------------------------------------------------------------------------------


def pick_device(name: str) -> torch.device:
    """auto, cpu, cuda or cuda:N; under torchrun each process takes the GPU of its own local rank."""
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not available):
        return torch.device("cpu")
    match = re.fullmatch(r"auto|cuda(?::(\d+))?", name)
    if not match:
        raise InputError(f"device = {name} must be auto, cpu, cuda or cuda:N")
    if not available:
        raise InputError(f"device = {name}: PyTorch {torch.__version__} sees no CUDA device here; use --device cpu")
    local_rank, processes = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1 and match[1]:
        raise InputError(
            f"device = {name}: {processes} processes cannot share one GPU; use --device cuda, one GPU for each"
        )
    if processes > 1 and int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1)) > available:  # all find it alike
        raise InputError(
            f"device = {name}: a process for each GPU, and there are {available} here; use --nproc-per-node={available}"
        )
    index = int(match[1] or local_rank)
    if index >= available:
        raise InputError(f"device = {name}: there is no GPU {index} here; use cuda:0 to cuda:{available - 1}")
    return torch.device("cuda", index)


def start_processes(device: torch.device) -> tuple[int, int]:
    """Rank and number of the processes that torchrun started (0 and 1 without it)."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1 and not distributed.is_initialized():
        distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return int(os.environ.get("RANK", 0)), world_size


@contextlib.contextmanager
def first_process_first():
    """One process of each machine compiles, and the others find what it compiled; at once they would write the same files."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if distributed.is_initialized() and not first:
        distributed.barrier()
    yield
    if distributed.is_initialized() and first:
        distributed.barrier()


class StopSignals:
    """Ctrl-C and SIGTERM. During training the first signal waits until the iteration has ended and is saved.

    A second signal raises KeyboardInterrupt at once, and so does the first one before and after training. A repetition
    within a second is ignored: `timeout` signals a process and then its group."""

    def __init__(self):
        self.number, self.time = 0, 0.0  # of the first signal; number 0: none came
        self.training = False  # set by the training loop
        self.checkpoint: Path | str | None = None  # the newest one

    def __enter__(self) -> StopSignals:
        self.before = {number: signal.signal(number, self.receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number: int, _) -> None:
        second = self.number > 0
        if second and time.monotonic() - self.time < 1.0:
            return
        if not second:
            self.number, self.time = number, time.monotonic()
        if second or not self.training:
            raise KeyboardInterrupt

    def requested(self) -> bool:
        """Whether a signal came to any process: all processes get the same answer."""
        number = torch.tensor(self.number)  # on the host, so that no process waits for its GPU
        if distributed.is_initialized():
            distributed.all_reduce(number, distributed.ReduceOp.MAX)
        if number > 0:
            self.number = int(number)
        return bool(number > 0)

    def end_training(self) -> None:
        """From now on a signal takes effect at once; so does one that came after the last call of `requested`."""
        self.training = False
        if self.number:
            raise KeyboardInterrupt

    def advice(self) -> str:
        if self.checkpoint is None:
            return "stopped: no checkpoint was written"
        return f"stopped: {self.checkpoint} is the last checkpoint; --resume continues from it"


def sum_over_processes(x: Tensor) -> Tensor:
    """Sum of a tensor over all processes, in place."""
    if distributed.is_initialized():
        distributed.all_reduce(x)
    return x


def max_over_processes(x: Tensor) -> Tensor:
    """Largest of a tensor over all processes, in place."""
    if distributed.is_initialized():
        distributed.all_reduce(x, distributed.ReduceOp.MAX)
    return x


def average_over_processes(tensors: list[Tensor]) -> None:
    """Mean of each tensor over all processes, in place, by one all-reduce of one flat vector."""
    if not distributed.is_initialized():
        return
    flat = torch.cat([x.flatten() for x in tensors])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for x, mean in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
        x.copy_(mean.view_as(x))


def gather_from_processes(state: dict) -> list[dict]:
    """The state of every process, in the order of ranks."""
    states = [state]
    if distributed.is_initialized():
        states = [None] * distributed.get_world_size()
        distributed.all_gather_object(states, state)
    return states


def merge_episode_statistics(statistics: dict[str, float], device: torch.device) -> dict[str, float | None]:
    """Means over all processes; None where no episode ended, or where the task has no success.

    Return, length and success are means over episodes. What else the task averages (terms of its reward, say) it averages over
    steps, of which every process makes as many."""
    counts, over_episodes = ("episodes", "invalid"), ("episode_return", "episode_length", "success")
    over_steps = [name for name in statistics if name not in counts + over_episodes]
    episodes = statistics["episodes"]
    sums = {name: statistics[name] * episodes if episodes else 0.0 for name in over_episodes}
    sums |= {name: statistics[name] for name in (*over_steps, *counts)} | dict(processes=1)
    total = sum_over_processes(torch.tensor([*sums.values()], dtype=torch.float64, device=device))
    total = dict(zip(sums, total.tolist(), strict=True))  # host sync
    divisors = dict.fromkeys(over_episodes, total["episodes"]) | dict.fromkeys(over_steps, total["processes"])
    means = {name: total[name] / n if n and math.isfinite(total[name]) else None for name, n in divisors.items()}
    return means | {name: int(total[name]) for name in counts}


def crossed(every: int | None, before: int, after: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]; never, where `every` is None."""
    return every is not None and after // every > before // every


def stream_seed(seed: int, rank: int, stream: int) -> int:
    """Independent seeds for each process and each use, however close the users' seeds are."""
    return int(np.random.SeedSequence((seed, rank, stream)).generate_state(1)[0])


def reseeded(seed: int, checkpoint: dict, device: torch.device, rank: int) -> int:
    """A new seed from `seed` and the step of the checkpoint, whose random generators are of another kind of device."""
    if rank == 0:
        print(
            f"the checkpoint was written on {checkpoint['device']}: on {device.type} the random generators start from "
            "a new seed, so the run continues, but not bit for bit"
        )
    return stream_seed(seed, checkpoint["env_steps"], stream=2)


def on_cpu(tree):
    """The same tree of dicts and lists with every tensor copied, once, to the CPU."""
    if isinstance(tree, dict):
        return {key: on_cpu(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(on_cpu(value) for value in tree)
    return tree.detach().to("cpu", copy=True) if isinstance(tree, Tensor) else tree


@contextlib.contextmanager
def refusals_of_the_disk(path: Path):
    """While `path` is written, a full disk, a read-only folder and the like are one line: InputError names the path."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error
        while cause and not isinstance(cause, OSError):  # torch.save and TensorBoard raise their own from it
            cause = cause.__context__
        if cause is None:
            raise
        raise InputError(f"{path} cannot be written: {cause.strerror}") from error


def make_writable(folder: Path) -> None:
    """Make the folder and try to write into it: a run must not find out at its first checkpoint that it cannot."""
    with refusals_of_the_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


@contextlib.contextmanager
def writing(path: Path):
    """Yield a file name beside `path` to write to, then rename it: a failed write leaves the old file as it was."""
    beside = path.with_suffix(".tmp")
    with refusals_of_the_disk(path):
        try:
            yield beside
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write what on_cpu made."""
    with writing(path) as beside, beside.open("wb") as file:
        torch.save(checkpoint, file)


def write_text(path: Path, text: str) -> None:
    with writing(path) as beside:
        beside.write_text(text)


def load_checkpoint(path: str, algorithm: str) -> dict:
    if os.path.isdir(path):  # False for a name that is too long, too
        raise InputError(f"checkpoint {path} is a folder; give the file in it, {Path(path) / 'checkpoint.pt'}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load ignores the checksums
        checkpoint = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"checkpoint {path} does not exist") from None
    except Exception as error:  # torch.load raises many types on a damaged file
        reason = str(error).split("\n")[0][:100]
        raise InputError(
            f"checkpoint {path} cannot be read; is it truncated? ({type(error).__name__}: {reason})"
        ) from None
    if damaged:
        raise InputError(f"checkpoint {path} is damaged: the checksum of {damaged} in it is wrong")
    if not isinstance(checkpoint, dict) or checkpoint.get("algorithm") != algorithm or "args" not in checkpoint:
        raise InputError(f"checkpoint {path} was not written by this script (algorithm {algorithm})")
    unknown = checkpoint["args"].keys() - {field.name for field in dataclasses.fields(Args)}
    if unknown:
        names = ", ".join(sorted(unknown))
        raise InputError(f"checkpoint {path} was written by another version of this script, which had the flag {names}")
    return checkpoint


def check_unchanged(checkpoint: dict, args: Args, names: str) -> None:
    for name in names.split():
        then, now = checkpoint["args"][name], getattr(args, name)
        if now != then:
            raise InputError(f"the checkpoint was trained with {name} = {then}, not {now}; leave that flag away")


def check_same_task(checkpoint: dict, args: Args) -> None:
    """Refuse other observations and networks than the checkpoint's."""
    networks = "network actor_hidden critic_hidden asymmetric_critic critic num_atoms value_limit"
    check_unchanged(checkpoint, args, f"env_id env_kwargs {networks} normalize_observations normalize_rewards")


def check_resumable(checkpoint: dict, args: Args, sizes: Sizes, world_size: int) -> None:
    """Refuse to continue under flags that do not fit the state, or that would do nothing because it holds what they set."""
    check_same_task(checkpoint, args)
    held = "preset num_envs seed temperature_init random_initial_ages log_std_min log_std_max"  # a preset was filled in before
    check_unchanged(checkpoint, args, held)
    if args.total_timesteps <= checkpoint["env_steps"]:
        raise InputError(
            f"the checkpoint has {checkpoint['env_steps']:,} steps already; give a larger --total-timesteps"
        )
    if len(checkpoint["processes"]) != world_size:
        raise InputError(f"the checkpoint was written by {len(checkpoint['processes'])} processes, not {world_size}")
    if checkpoint["replay_inside"]:
        check_unchanged(checkpoint, args, "replay_capacity half_precision_replay")


def training_state(agent: Agent, optimizers: dict[str, torch.optim.Optimizer], learning_rate: Tensor) -> dict:
    moments = {name: list(optimizer.state.values()) for name, optimizer in optimizers.items()}
    return dict(agent=agent.state_dict(), moments=moments, learning_rate=learning_rate)


def load_training_state(
    checkpoint: dict, agent: Agent, optimizers: dict[str, torch.optim.Optimizer], learning_rate: Tensor
) -> None:
    """Copy in place, so that captured graphs keep their addresses."""
    agent.load_state_dict(checkpoint["agent"])
    learning_rate.copy_(checkpoint["learning_rate"])
    for name, optimizer in optimizers.items():
        for moments, saved in zip(optimizer.state.values(), checkpoint["moments"][name], strict=True):
            for key, x in moments.items():
                x.copy_(saved[key])


def replay_state(replay: Transitions, written: int) -> dict:
    """The filled slots, copied to the CPU."""
    rings = {name: ring for name, ring in replay._asdict().items() if ring is not None}
    stored = min(written, len(replay.reward))
    copies = {name: ring[:stored].to("cpu", copy=True) for name, ring in rings.items()}
    return dict(written=written, slots=len(replay.reward), rings=copies)


def load_replay_state(replay: Transitions, saved: dict) -> int:
    """Copy the saved steps in; returns their number."""
    for name, x in saved["rings"].items():
        getattr(replay, name)[: len(x)] = x.to(replay.reward.device)
    return saved["written"]


def describe_resumed_replay(inside: bool, written: int, sizes: Sizes, num_envs: int) -> str:
    if inside:
        return f"the checkpoint holds the replay, {min(written, sizes.slots) * num_envs:,} transitions"
    return (
        "the checkpoint holds no replay (--checkpoint-replay puts it there), so it starts empty: updates wait until it holds "
        f"{sizes.first_slots * num_envs:,} transitions"
    )


def check_run_dir(args: Args) -> None:
    """Make the folder. A run must not write over another one; only a resumed run goes on in its own folder."""
    folder = Path(args.run_dir)
    own = args.resume and Path(args.resume).resolve().parent == folder.resolve()
    if not own and os.path.exists(folder / "metrics.jsonl"):  # False for a name that is too long, too
        advice = ", or --resume its checkpoint.pt" if (folder / "checkpoint.pt").exists() else ""
        raise InputError(f"run_dir = {args.run_dir} holds a run already; choose another{advice}")
    make_writable(folder)


class RunLog:
    """Progress bar, metrics.jsonl, TensorBoard and W&B of one run; the writing process alone has one."""

    def __init__(self, run_dir: Path, args: Args, first_step: int):
        from torch.utils.tensorboard import SummaryWriter  # a second of import that --help and --play need not wait for

        self.path = run_dir / "metrics.jsonl"
        with refusals_of_the_disk(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
            write_text(run_dir / "config.json", json.dumps(dataclasses.asdict(args), indent=2))
            old = self.path.read_text().splitlines(keepends=True) if first_step and self.path.exists() else []
            whole = [line for line in old if line.endswith("\n")]  # a killed run may leave half of its last line
            # What an interrupted run logged after its checkpoint is run, and logged, again.
            write_text(self.path, "".join(line for line in whole if json.loads(line)["env_steps"] <= first_step))
            self.tensorboard = SummaryWriter(run_dir, purge_step=first_step + 1 if first_step else None)
        patience = 0.1 if sys.stderr.isatty() else 30.0  # seconds between two drawings of the bar
        self.bar = tqdm(
            total=args.total_timesteps, initial=first_step, unit=" steps", unit_scale=True, mininterval=patience
        )
        self.wandb = None
        if args.track:
            import wandb

            self.wandb = wandb.init(project="onefile-gpu-rl", name=run_dir.name, config=dataclasses.asdict(args))

    def write(self, record: dict) -> None:
        with refusals_of_the_disk(self.path):
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
            for name, value in record.items():
                if value is not None:
                    self.tensorboard.add_scalar(name, value, record["env_steps"])
        if self.wandb:
            self.wandb.log(record, step=record["env_steps"])
        self.bar.update(record["env_steps"] - self.bar.n)
        shown = "(no whole episode)" if record["episode_return"] is None else f"{record['episode_return']:.1f}"
        self.bar.set_postfix_str(f"return {shown}")

    def close(self) -> None:
        self.bar.close()
        with refusals_of_the_disk(self.path.parent):
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


class Profile:
    """Where the time of an iteration goes, with --profile; without it, nothing happens here.

    A profiled stage waits for the device, so that its time is its own; on a GPU that makes the profiled iterations slower."""

    def __init__(self, enabled: bool, device: torch.device, warm_up: int, timed: int):
        self.enabled, self.device, self.warm_up, self.timed = enabled, device, warm_up, timed  # one more is traced
        self.iteration, self.seconds, self.started, self.tracer = 0, {}, 0.0, None

    def wait(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextlib.contextmanager
    def stage(self, name: str):
        if not self.enabled:
            yield
            return
        started = self.wait()
        with torch.profiler.record_function(name):
            yield
            self.seconds[name] = self.seconds.get(name, 0.0) + self.wait() - started

    def start_iteration(self) -> None:
        if self.enabled and self.iteration == self.warm_up:
            self.seconds, self.started = {}, self.wait()

    def end_iteration(self, run_dir: Path, steps: int) -> None:
        """After the last timed iteration print and write the table; after the traced one write the trace."""
        if not self.enabled:
            return
        self.iteration += 1
        if self.iteration == self.warm_up + self.timed:
            seconds = self.wait() - self.started
            stages = self.seconds | {"the rest": seconds - sum(self.seconds.values())}
            table = {name: dict(seconds=x / self.timed, share=x / seconds) for name, x in stages.items()}
            (run_dir / "profile.json").write_text(json.dumps(dict(steps=steps, stages=table), indent=2))
            lines = [f"{name:<10} {x['seconds'] * 1e3:9.1f} ms {x['share']:6.1%}" for name, x in table.items()]
            tqdm.write("\n".join([f"an iteration of {steps:,} environment steps, mean of {self.timed}:", *lines]))
            self.tracer = torch.profiler.profile()
            self.tracer.start()
        elif self.tracer:
            self.wait()
            self.tracer.stop()
            self.tracer.export_chrome_trace(str(run_dir / "trace.json.gz"))
            self.enabled = False


def plot_curve(run_dir: Path, title: str) -> None:
    """curve.png: return of the training episodes, and scores in Gymnasium where there are any, over steps and over time."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    clocks = (("env_steps", "million environment steps", 1e6), ("wall_seconds", "minutes of training", 60.0))
    for axis, (name, unit, scale) in zip(axes, clocks, strict=True):
        for metric, style in (("episode_return", "-"), ("gymnasium_return", "o")):
            points = [(r[name] / scale, r[metric]) for r in records if r.get(metric) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), style, label=metric)
        axis.set_xlabel(unit)
        axis.grid(alpha=0.3)
    if axes[0].lines:  # no episode may have ended yet
        axes[0].legend()
    figure.suptitle(title)
    with refusals_of_the_disk(run_dir / "curve.png"):
        figure.savefig(run_dir / "curve.png", dpi=120)


def summarize(returns: np.ndarray, lengths: np.ndarray) -> dict[str, float]:
    return dict(
        mean=float(returns.mean()),
        std=float(returns.std()),
        min=float(returns.min()),
        episodes=len(returns),
        mean_length=float(lengths.mean()),
    )


def first_episodes(step, obs: Tensor, agent: Agent) -> dict[str, float]:
    """Return and length of the first episode of each environment, under the deterministic policy and frozen statistics.

    step(action) -> obs, reward, ended, invalid; an environment quarantined in its first episode is left out."""
    returns = torch.zeros(len(obs), dtype=torch.float64, device=obs.device)
    lengths, failed = torch.zeros_like(returns), torch.zeros_like(returns, dtype=torch.bool)
    running = ~failed
    while running.any():  # host sync
        obs, reward, ended, invalid = step(agent.act(obs))
        returns += torch.where(running & ~invalid, reward, 0.0)
        lengths += running
        failed |= running & invalid
        running &= ~(ended | invalid)
    if failed.all():
        raise RuntimeError("every environment of the evaluation was quarantined: the policy breaks the simulator")
    return summarize(returns[~failed].cpu().numpy(), lengths[~failed].cpu().numpy())


def describe(score: dict[str, float]) -> str:
    spread = f"{score['mean']:.1f} +- {score['std']:.1f} (lowest {score['min']:.1f}"
    return f"{spread}, {score['episodes']} episodes of {score['mean_length']:.0f} steps)"


def evaluate_vecsim(agent: Agent, env: gymnasium.vector.VectorEnv, seed: int) -> dict[str, float]:
    obs, _ = env.reset(seed=seed)

    def step(action: Tensor):
        obs, reward, terminated, truncated, info = env.step(action)
        return obs, reward, terminated | truncated, info["invalid"]

    return first_episodes(step, obs, agent)


def gymnasium_options(env_kwargs: dict) -> dict:
    """What gymnasium.make gets: the task's options, without those that only the simulator has, which say how it trains."""
    simulator_alone = ("randomize", "perturb", "pair_slots", "self_collision", "chunk")
    return {name: value for name, value in env_kwargs.items() if name.split(".")[0] not in simulator_alone}


def check_env_kwargs(args: Args) -> None:
    """Refuse options that this script sets itself, and those that Gymnasium would refuse after the whole run."""
    other_advice = {"iterations": "use --solver-iterations", "dtype": "it is float32", "numpy": "it is False"}
    for name in "env_id num_envs device dtype seed compile integrator iterations random_initial_ages numpy".split():
        if name in args.env_kwargs:
            advice = other_advice.get(name, f"use --{name.replace('_', '-')}")
            raise InputError(f"env_kwargs sets {name}, which this script sets itself; {advice}")
    if args.eval_episodes and args.env_id in gymnasium.registry:
        try:
            gymnasium.make(args.env_id, **gymnasium_options(args.env_kwargs)).close()
        except (TypeError, ValueError, ZeroDivisionError, gymnasium.error.Error) as error:
            raise InputError(f"env_kwargs = {args.env_kwargs} do not suit gymnasium.make: {error}") from error


def evaluate_gymnasium(agent: Agent, args: Args) -> dict[str, float] | None:
    """The score in Gymnasium's own environment, policy on the CPU; None where Gymnasium has no such task."""
    if args.env_id not in gymnasium.registry:
        return None
    agent = copy.deepcopy(agent).cpu()
    options = gymnasium_options(args.env_kwargs)
    envs = gymnasium.vector.SyncVectorEnv([lambda: gymnasium.make(args.env_id, **options)] * args.eval_episodes)
    obs, _ = envs.reset(seed=args.seed)

    def step(action: Tensor):
        obs, reward, terminated, truncated, _ = envs.step(action.numpy())
        return (
            torch.as_tensor(obs).float(),
            torch.as_tensor(reward),
            torch.as_tensor(terminated | truncated),
            torch.zeros(len(obs), dtype=torch.bool),
        )

    score = first_episodes(step, torch.as_tensor(obs).float(), agent)
    envs.close()
    return score


def film(agent: Agent, args: Args, folder: Path) -> Path:
    """One deterministic episode of Gymnasium's own environment as play.mp4 (play.gif without imageio-ffmpeg)."""
    import imageio.v2 as imageio

    if "DISPLAY" not in os.environ:
        # Without a screen MuJoCo draws through EGL; where that is missing too, set MUJOCO_GL=osmesa.
        os.environ.setdefault("MUJOCO_GL", "egl")
    # "track" follows the robot; Gymnasium takes its free camera where the model has no camera of this name.
    options = dict(render_mode="rgb_array", camera_name="track") | gymnasium_options(args.env_kwargs)
    env = gymnasium.make(args.env_id, **options)
    obs, _ = env.reset(seed=args.seed)
    frames, ended = [], False
    while not ended:
        frames.append(env.render())
        obs, _, terminated, truncated, _ = env.step(agent.act(torch.as_tensor(obs).float()[None])[0].numpy())
        ended = terminated or truncated
    env.close()
    path = folder / ("play.mp4" if importlib.util.find_spec("imageio_ffmpeg") else "play.gif")
    if path.suffix == ".mp4":
        imageio.mimwrite(path, frames, fps=env.metadata["render_fps"], macro_block_size=8)
    else:
        imageio.mimwrite(path, frames[::2], duration=2000 / env.metadata["render_fps"], loop=0)
    return path


def versions() -> dict[str, str]:
    return dict(
        python=sys.version.split()[0],
        torch=str(torch.__version__),
        gymnasium=gymnasium.__version__,
        numpy=np.__version__,
    )


# ------------------------------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------------------------------


def train(
    args: Args, make_env=vecsim_torch.make, profiled: tuple[int, int] = PROFILED, stop: StopSignals | None = None
) -> dict:
    """Train, write the run folder, evaluate; returns the last log record and the evaluation.

    Raises KeyboardInterrupt when `stop` asks for it, after the iteration at hand and with its checkpoint written."""
    # Set-up: every flag is checked before anything is allocated.
    stop = stop or StopSignals()
    stop.checkpoint = args.resume
    args = with_task_defaults(args)
    device = pick_device(args.device)
    rank, world_size = start_processes(device)
    sizes = derive_sizes(args, world_size)
    check_env_kwargs(args)
    checkpoint = load_checkpoint(args.resume, "sac") if args.resume else None
    if checkpoint:
        check_resumable(checkpoint, args, sizes, world_size)
    check_length(args, sizes, checkpoint, profiled)
    check_run_dir(args)
    preparation_started = time.perf_counter()
    moved = checkpoint is not None and checkpoint["device"] != device.type
    seed = reseeded(args.seed, checkpoint, device, rank) if moved else args.seed
    if device.type == "cpu":
        torch.set_num_threads(args.cpu_threads)
    torch.manual_seed(args.seed)  # the initial weights, the same in every process
    torch.set_float32_matmul_precision("high")  # TF32 for the networks on a GPU; the physics multiplies no matrices
    generator = torch.Generator(device).manual_seed(stream_seed(seed, rank, stream=0))
    env_options = dict(num_envs=sizes.envs, device=str(device), seed=stream_seed(seed, rank, stream=1))
    env_options |= dict(compile=args.compile, integrator=args.integrator, iterations=args.solver_iterations)
    env_options |= args.env_kwargs
    with refusals_of_the_simulator():
        env = make_env(args.env_id, random_initial_ages=args.random_initial_ages, **env_options)
    obs_size, action_size = env.single_observation_space.shape[0], env.single_action_space.shape[0]
    critic_obs_size = critic_observation_size(env, args)
    privileged = critic_obs_size is not None
    agent = Agent(obs_size, critic_obs_size, env.single_action_space, args).to(device)
    learning_rate = torch.tensor(args.learning_rate, device=device)
    optimizers = make_optimizers(agent, learning_rate, args.temperature_learning_rate)
    replay = allocate_replay(agent, sizes, args.half_precision_replay)
    if rank == 0:
        print(replay_size(replay))
    with first_process_first():
        functions = build_functions(agent, optimizers, replay, sizes, args)
        env.reset()
        env.step(torch.zeros(sizes.envs, action_size, device=device))  # compiles the physics
    durations = zeta_distribution(args.noise_repeat_max).to(device)
    obs, info = env.reset(seed=env_options["seed"])
    critic_obs = info["critic_obs"] if privileged else obs
    held = torch.zeros(sizes.envs, action_size, device=device)
    remaining = torch.zeros(sizes.envs, dtype=torch.long, device=device)
    returns = torch.zeros(sizes.envs, device=device)
    first_iteration, train_seconds, updates, written = 0, 0.0, 0, 0
    if checkpoint:
        load_training_state(checkpoint, agent, optimizers, learning_rate)
        mine = checkpoint["processes"][rank]
        with refusals_of_the_simulator():
            env.load_state_dict(mine["env"])
        if not moved:
            generator.set_state(mine["generator"])
        obs, critic_obs, held, remaining, returns = (
            mine[name].to(device) for name in ("obs", "critic_obs", "held", "remaining", "returns")
        )
        first_iteration, train_seconds = checkpoint["iteration"], checkpoint["train_seconds"]
        updates = checkpoint["updates"]
        written = load_replay_state(replay, mine["replay"]) if checkpoint["replay_inside"] else 0
        if rank == 0:
            print(describe_resumed_replay(checkpoint["replay_inside"], written, sizes, args.num_envs))
        del checkpoint, mine  # a second replay may hang on them
    compile_seconds = time.perf_counter() - preparation_started
    run_dir, log = Path(args.run_dir), None
    logged_step, logged_seconds = first_iteration * args.num_envs, train_seconds
    if rank == 0:  # the one writer
        log = RunLog(run_dir, args, logged_step)
        tqdm.write(
            f"{args.env_id} on {device} into {run_dir}, prepared in {compile_seconds:.1f} s\n"
            f"{args.num_envs:,} environments, {sizes.iterations:,} steps of each; after each, {args.updates_per_step} updates "
            f"on batches of {args.batch_size:,}, the policy every {args.policy_frequency}; {world_size} process(es)"
        )
    profile = Profile(args.profile and rank == 0, device, *profiled)
    critic_terms = torch.zeros(len(CriticTerms._fields), device=device)
    policy_terms = torch.zeros(len(PolicyTerms._fields), device=device)
    logged_updates, policy_updates, record, clock = updates, 0, {}, time.perf_counter()

    stop.training = True
    for iteration in range(first_iteration, sizes.iterations):
        # Act: uniformly at random at first, then the policy with its exploration noise.
        learning = written + 1 >= sizes.first_slots  # there will be enough to learn from after this step
        if learning:
            profile.start_iteration()
        fresh = torch.randn(sizes.envs, action_size, generator=generator, device=device)
        uniform = torch.rand(sizes.envs, generator=generator, device=device)
        held, remaining = hold_noise(held, remaining, fresh, uniform, durations)
        if iteration * args.num_envs < args.learning_starts:
            action = 2.0 * torch.rand(sizes.envs, action_size, generator=generator, device=device) - 1.0
            env_action = agent.to_env(action)
        else:
            with profile.stage("infer"):
                action, env_action = functions.policy(obs, held)
        with profile.stage("simulate"):
            next_obs, reward, terminated, truncated, info = env.step(env_action)
        invalid, final_obs = info["invalid"], info["final_obs"]
        step = Transitions(obs, final_obs, action, reward, terminated, truncated, invalid)
        if privileged:
            step = step._replace(critic_obs=critic_obs, final_critic_obs=info["final_critic_obs"])
        store(replay, written, step)
        written += 1
        agent.obs_statistics.update(obs, ~invalid)
        if privileged:
            agent.critic_obs_statistics.update(critic_obs, ~invalid)
        if args.normalize_rewards:
            scaled = reward * args.reward_scale
            returns = follow_returns(agent, returns, scaled, terminated, invalid, args.gamma)
        obs, critic_obs = next_obs, info["critic_obs"] if privileged else next_obs

        # Update: one large draw from the replay, split into the batches of all updates.
        if learning:
            progress = iteration / sizes.iterations
            learning_rate.fill_(args.learning_rate + progress * (args.learning_rate_final - args.learning_rate))
            rows = args.updates_per_step * sizes.batch
            with profile.stage("sample"):
                drawn = draw_transitions(replay, written, args.n_step, rows, generator)
                batch = gather_batch(agent, replay, *drawn, args)
            shape = args.updates_per_step, 2, sizes.batch, action_size
            noise = torch.randn(shape, generator=generator, device=device)
            with profile.stage("update"):
                sums = update(agent, functions, batch, noise, updates, args)
            critic_terms += sums[0]
            policy_terms += sums[1]
            policy_updates += sums[2]
            updates += args.updates_per_step
            profile.end_iteration(run_dir, args.num_envs)

        # Log, evaluate, save: whenever a multiple of the interval was crossed.
        env_steps = (iteration + 1) * args.num_envs
        last = iteration + 1 == sizes.iterations
        before = env_steps - args.num_envs
        stopping = stop.requested()
        log_now = last or stopping or crossed(args.log_every, before, env_steps)
        evaluate_now = crossed(args.eval_every, before, env_steps) or (last and args.eval_every is not None)
        save_now = last or stopping or crossed(args.checkpoint_every, before, env_steps)
        if not (log_now or evaluate_now or save_now):
            continue
        means = critic_terms / max(1, updates - logged_updates), policy_terms / max(1, policy_updates)
        numbers = torch.stack([*means[0], *means[1], learning_rate, agent.reward_divisor()]).tolist()  # host sync
        names = (*CriticTerms._fields, *PolicyTerms._fields, "learning_rate", "reward_divisor")
        episodes = merge_episode_statistics(env.pop_statistics(), device)  # host sync
        train_seconds += time.perf_counter() - clock
        speed = (env_steps - logged_step) / (train_seconds - logged_seconds)
        record = dict(env_steps=env_steps, wall_seconds=train_seconds, steps_per_second=speed) | episodes
        record |= dict(updates=updates, replay_transitions=min(written, sizes.slots) * args.num_envs)
        record |= dict(zip(names, numbers, strict=True))
        if not all(math.isfinite(x) for x in numbers):
            raise FloatingPointError(f"training diverged by {env_steps:,} steps: {record}")
        if updates == logged_updates:  # nothing was learned yet
            record |= dict.fromkeys(CriticTerms._fields + PolicyTerms._fields)
        if log and evaluate_now:  # with eval_every the last iteration evaluates too
            score = evaluate_gymnasium(agent, args)
            record |= dict(gymnasium_return=score["mean"]) if score else {}
        if log:
            log.write(record)
        if save_now:
            mine = dict(env=env.state_dict(), generator=generator.get_state(), obs=obs, critic_obs=critic_obs)
            mine |= dict(held=held, remaining=remaining, returns=returns)
            mine |= dict(replay=replay_state(replay, written) if args.checkpoint_replay else None)
            state = dict(algorithm="sac", env_id=args.env_id, args=dataclasses.asdict(args), device=device.type)
            state |= dict(iteration=iteration + 1, env_steps=env_steps, updates=updates, train_seconds=train_seconds)
            state |= dict(versions=versions(), replay_inside=args.checkpoint_replay)
            state |= dict(processes=gather_from_processes(on_cpu(mine)))
            if log:
                state |= on_cpu(training_state(agent, optimizers, learning_rate))
                save_checkpoint(run_dir / "checkpoint.pt", state)
                stop.checkpoint = run_dir / "checkpoint.pt"
            del state, mine  # a second replay may hang on them
        critic_terms.zero_(), policy_terms.zero_()
        logged_step, logged_seconds, logged_updates, policy_updates = env_steps, train_seconds, updates, 0
        clock = time.perf_counter()
        if stopping:
            if log:
                log.close()
            raise KeyboardInterrupt

    # Final evaluation, by the one writer.
    stop.end_training()
    if not log:
        env.close()
        return record
    log.close()
    plot_curve(run_dir, f"{args.env_id}, SAC, seed {args.seed}")
    evaluation = dict(env_id=args.env_id, algorithm="sac", seed=args.seed, env_steps=logged_step)
    evaluation |= dict(train_seconds=train_seconds, compile_seconds=compile_seconds, vecsim=None, gymnasium=None)
    if args.eval_episodes:
        env.random_initial_ages = False  # whole episodes
        evaluation["vecsim"] = evaluate_vecsim(agent, env, args.seed)
        evaluation["gymnasium"] = score if args.eval_every else evaluate_gymnasium(agent, args)
    env.close()
    write_text(run_dir / "eval.json", json.dumps(evaluation, indent=2))
    reason = f"Gymnasium has no {args.env_id}" if args.eval_episodes else "eval_episodes = 0"
    for name in ("vecsim", "gymnasium"):
        print(f"{name}: {describe(evaluation[name]) if evaluation[name] else f'no score, because {reason}'}")
    return record | evaluation


class ExportedPolicy(nn.Module):
    """What --export writes: obs (B, obs) to the deterministic action (B, actions), clipped to low and high (actions,).

    In float32, as ONNX Runtime's CPU kernels need it, also where the training ran under bfloat16."""

    def __init__(self, agent: Agent, low: Tensor, high: Tensor):
        super().__init__()
        self.agent, self.low, self.high, self.actions = agent, low, high, len(low)

    def forward(self, obs: Tensor) -> Tensor:
        outputs = self.agent.actor(self.agent.obs_statistics.normalize(obs), learning=False)
        mean = outputs[:, : self.actions]  # the rest is the deviation's
        return self.agent.to_env(mean.tanh()).clamp(self.low, self.high)


def rms_norm_in_onnx(g, x, shape, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight in ONNX operators: PyTorch's exporter has no rule for torch.nn.RMSNorm."""
    eps = g.op("Constant", value_t=torch.tensor(torch.finfo(torch.float32).eps))  # torch.nn.RMSNorm's default
    mean_square = g.op("ReduceMean", g.op("Mul", x, x), axes_i=[-1], keepdims_i=1)
    return g.op("Mul", g.op("Div", x, g.op("Sqrt", g.op("Add", mean_square, eps))), weight)


def export_onnx(
    policy: nn.Module, inputs: dict[str, Tensor], outputs: list[str], facts: dict, args: Args, checkpoint: dict
) -> None:
    """Write `policy`, which maps `inputs` to `outputs`, to the ONNX file args.export, with `facts` as metadata.

    inputs: an example of each, (rows, k); the file takes any number of rows. Facts that are not strings become JSON.
    InputError where onnx is missing or the file cannot be written."""
    try:
        import onnx
    except ImportError:
        raise InputError("export needs ONNX; run `pip install onnx` or omit --export") from None
    names, file = [*inputs, *outputs], io.BytesIO()
    with warnings.catch_warnings():
        # The newer exporter needs two more packages and takes twenty times as long.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            policy,
            tuple(inputs.values()),
            file,
            dynamo=False,
            opset_version=17,
            input_names=list(inputs),
            output_names=outputs,
            dynamic_axes={name: {0: "batch"} for name in names},
        )
    model = onnx.load_from_string(file.getvalue())
    facts = dict(env_id=args.env_id, env_kwargs=args.env_kwargs) | facts
    facts |= dict(script=Path(__file__).name, env_steps=checkpoint["env_steps"], versions=checkpoint["versions"])
    text = {name: x if isinstance(x, str) else json.dumps(x) for name, x in facts.items()}
    onnx.helper.set_model_props(model, text)
    with writing(Path(args.export)) as beside:
        onnx.save(model, str(beside), format="protobuf")
    print(f"ONNX: {args.export}")


def play(args: Args, make_env=vecsim_torch.make) -> dict:
    """Score a checkpoint deterministically, in Gymnasium's own environment where there is one; film one episode on request."""
    checkpoint = load_checkpoint(args.play, "sac")
    if args.eval_episodes < (1 if args.export is None else 0):
        raise InputError(f"eval_episodes = {args.eval_episodes} must be >= 1 to play; use --eval-episodes 20")
    if not 0 <= args.seed < 2**63:
        raise InputError(f"seed = {args.seed} must be between 0 and 2**63 - 1")
    args = with_task_defaults(dataclasses.replace(args, device="cpu", num_envs=args.eval_episodes or 1))
    check_same_task(checkpoint, args)
    check_env_kwargs(args)
    if args.capture_video and args.env_id not in gymnasium.registry:
        raise InputError(f"capture_video: Gymnasium has no {args.env_id} to film")
    with refusals_of_the_simulator():
        options = dict(integrator=args.integrator, iterations=args.solver_iterations) | args.env_kwargs
        env = make_env(args.env_id, num_envs=args.num_envs, device="cpu", seed=args.seed, **options)
    sizes = env.single_observation_space.shape[0], critic_observation_size(env, args)
    agent = Agent(*sizes, env.single_action_space, args)
    agent.load_state_dict(checkpoint["agent"])
    if args.export is not None:
        torch.onnx.register_custom_op_symbolic("aten::rms_norm", rms_norm_in_onnx, opset_version=17)
        facts = dict(observation_names=env.observation_names(env.observation_slices), action_names=env.action_names())
        facts |= dict(control_step_seconds=env.control_step)
        policy = ExportedPolicy(agent, *env.task.action_limits(env.model))
        export_onnx(policy, dict(obs=torch.zeros(2, sizes[0])), ["action"], facts, args, checkpoint)
    score = {}
    if args.eval_episodes:
        score = evaluate_gymnasium(agent, args) or evaluate_vecsim(agent, env, args.seed)
        print(f"{args.env_id}, {checkpoint['env_steps']:,} steps of training: {describe(score)}")
    env.close()
    if args.capture_video:
        print(f"video: {film(agent, args, Path(args.play).parent)}")
    return score


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
    if args.resume and args.play:
        raise InputError("--resume continues training and --play plays: give one of them")
    if args.capture_video and not args.play:
        raise InputError("--capture-video films a checkpoint: give --play, after training")
    if args.export is not None and not args.play:
        raise InputError("--export writes the policy of a checkpoint: give --play, after training")
    for name in ("run_dir", "resume", "play", "export"):
        if getattr(args, name) == "":
            raise InputError(f"--{name.replace('_', '-')} is empty: give a path or omit it")
    path = args.resume or args.play
    if path is None:
        return args
    forgotten = dict(resume=None, play=None, run_dir=None, export=None, capture_video=False, profile=False)
    saved = load_checkpoint(path, "sac")["args"] | forgotten
    return parse(Args(**saved))


def main() -> int:
    first_process = int(os.environ.get("RANK", 0)) == 0
    with StopSignals() as stop:
        try:
            args = parse_args(sys.argv[1:])
            play(args) if args.play else train(args, stop=stop)
            if distributed.is_initialized():
                distributed.destroy_process_group()
        except InputError as error:
            with contextlib.suppress(KeyboardInterrupt):
                if not first_process:  # the first one prints the same error, and torchrun then ends this one
                    time.sleep(10.0)
                tqdm.write(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            if first_process:
                tqdm.write(stop.advice(), file=sys.stderr)
            return 128 + (stop.number or signal.SIGINT)  # as shells report a process that a signal ended
    return 0


if __name__ == "__main__":
    sys.exit(main())
