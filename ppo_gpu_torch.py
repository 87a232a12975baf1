"""PPO for thousands of robots on one device: simulator, rollout, advantages and gradient steps never leave it.

    python ppo_gpu_torch.py --env-id InvertedPendulum-v5 --no-compile       # small networks: eager is quick enough on a CPU
    python ppo_gpu_torch.py --env-id HalfCheetah-v5                         # a GPU where there is one, else the CPU
    python ppo_gpu_torch.py --env-id Ant-v5 --num-envs 4096 --bf16
    python ppo_gpu_torch.py --resume runs/NAME/checkpoint.pt --total-timesteps 40000000
    python ppo_gpu_torch.py --play runs/NAME/checkpoint.pt --capture-video
    python ppo_gpu_torch.py --play runs/NAME/checkpoint.pt --export policy.onnx
    torchrun --nproc-per-node=2 ppo_gpu_torch.py --env-id Ant-v5            # data parallel: gradients averaged over the processes

On one AMD EPYC core: InvertedPendulum-v5 1,000 in 12 s, HalfCheetah-v5 8,506 in 6 minutes, Hopper-v5 3,478 in 8, Ant-v5 4,578 in 14 (medians
of 3 seeds in Gymnasium's own environments; README.md has all). A flag whose default reads None takes the value of its task in TASK_DEFAULTS.
A2C is PPO with one epoch, one minibatch and no clipping (Huang et al. 2022, arXiv:2205.09123):

    python ppo_gpu_torch.py --update-epochs 1 --num-minibatches 1 --clip-coef inf --num-steps 5 --learning-rate-schedule constant

This is A2C with GAE, normalised advantages, two networks and Adam. For the textbook's plain n-step returns and advantages add
--gae-lambda 1 --no-normalize-advantages (and --no-normalize-values --bounds-coef 0); RMSprop, which the first A2C used, is not here.

Needs `vecsim_torch.py` beside it and nothing else of this project: copy the two files and they are yours.

Sources: PPO, Schulman et al. 2017 (arXiv:1707.06347), eq. 7; GAE, Schulman et al. 2016 (arXiv:1506.02438), eq. 16;
time limits, Pardo et al. 2018 (arXiv:1712.00378); learning rate from the KL divergence and the many-environments regime,
Rudin et al. 2022 (arXiv:2109.11978); running moments, Chan et al. 1983.
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
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium
import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor, distributed, nn
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
    """Flags of a run. None means the value of the task's row in TASK_DEFAULTS, else of COMMON, unless the help says otherwise.
    total_timesteps and every *_every count environment steps, summed over all environments."""

    env_id: str = "Ant-v5"
    """task: any id that vecsim_torch.make knows"""
    num_envs: int | None = None
    """environments stepped in parallel, over all processes (>= 1)"""
    total_timesteps: int | None = None
    """environment steps of the whole run (>= 1; rounded up to whole iterations)"""
    seed: int = 1
    """seed of weights, environments and noise (>= 0; process r of a distributed run draws from its own stream)"""
    device: str = "auto"
    """auto (CUDA where there is a GPU, else CPU), cpu, cuda or cuda:N"""
    compile: bool = True
    """compile physics, policy step and loss with torch.compile (a minute or so, reported apart)"""
    cpu_threads: int | None = None
    """threads of PyTorch on a CPU (>= 1; default: 1 with --no-compile, whose many small operations more threads only delay, else PyTorch's choice)"""
    cuda_graphs: bool = True
    """capture the policy step and the minibatch update in CUDA graphs (no effect on a CPU)"""
    bf16: bool = False
    """run the networks, never the physics, under bfloat16 autocast"""
    run_dir: str | None = None
    """folder of this run, without one in it already (default: runs/<env_id>__ppo__<seed>__<time>; the checkpoint's own folder with --resume)"""
    resume: str | None = None
    """checkpoint to continue from; flags not given keep the checkpoint's values, and the learning rate the one it was adapted to"""
    checkpoint_every: int | None = None
    """environment steps between checkpoints (>= 1; default: a tenth of total_timesteps); the last state is always saved"""
    log_every: int | None = None
    """environment steps between log lines, at most; checkpoints and evaluations log too (>= 1; default: total_timesteps / 200)"""
    eval_episodes: int = 20
    """episodes of an evaluation in gymnasium.make(env_id), and of --play (>= 0; 0 skips the evaluations); vecsim is scored on one episode of each environment"""
    eval_every: int | None = None
    """environment steps between evaluations in Gymnasium during training (>= 1; default: only the final one); their time is not counted"""
    play: str | None = None
    """checkpoint to play deterministically instead of training, on the CPU; prints its score"""
    export: str | None = None
    """with --play: write policy, normaliser and action scale to this ONNX file (--eval-episodes 0: no episodes)"""
    capture_video: bool = False
    """with --play of a task that Gymnasium has: write one episode, rendered there, beside the checkpoint"""
    track: bool = False
    """mirror the metrics to Weights & Biases (needs `pip install wandb`)"""
    profile: bool = False
    """time the stages of ten iterations, after three of warm-up, then trace one more: profile.json and trace.json.gz in the run folder, and a printed table"""

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

    # the batch
    num_steps: int | None = None
    """steps per environment and iteration (>= 1)"""
    update_epochs: int | None = None
    """passes over each batch (>= 1)"""
    num_minibatches: int | None = None
    """gradient steps per pass (>= 1; must divide num_envs x num_steps of each process)"""
    microbatch_size: int | None = None
    """largest number of samples in one backward pass; gradients add up over a minibatch (>= 1; default: 2,048 on a CPU, for its cache; a whole minibatch on a GPU)"""

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
    """adaptive schedule: upper bound (>= learning_rate_min, and learning_rate lies between the two)"""


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
    # reward_scale: rewards per second, so that returns are large beside what an untrained value function says
    "Quadruped-Flat": dict(
        total_timesteps=50_000_000, integrator="implicitfast", env_kwargs={"velocity_in_observation": True},
        reward_scale=50.0, num_steps=24, num_minibatches=4, log_std_init=-1.0, entropy_coef=0.005, desired_kl=0.02),
    "Quadruped-Rough": dict(
        total_timesteps=200_000_000, num_envs=4096, integrator="implicitfast", reward_scale=50.0, num_steps=24,
        num_minibatches=4, log_std_init=-1.0, entropy_coef=0.005, desired_kl=0.02, actor_hidden=(512, 256, 128),
        critic_hidden=(512, 256, 128)),
}  # fmt: skip


PROFILED = 3, 10  # iterations before --profile starts to time, and iterations timed


def with_task_defaults(args: Args, common: dict = COMMON, tasks: dict = TASK_DEFAULTS) -> Args:
    """Fill in what was left at None: from the task's row, then from COMMON, then what follows from other flags."""
    row = common | tasks.get(args.env_id, {})
    if args.desired_kl is not None:  # a row's last value goes with its first
        row.pop("desired_kl_final", None)
    filled = {name: value for name, value in row.items() if getattr(args, name) is None}
    filled["env_kwargs"] = row["env_kwargs"] | (args.env_kwargs or {})  # options given go on top of the row's
    args = dataclasses.replace(args, **filled)
    name = f"{args.env_id.replace('/', '-')}__ppo__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    derived = dict(
        run_dir=str(Path(args.resume).parent) if args.resume else f"runs/{name}",
        checkpoint_every=max(1, args.total_timesteps // 10),
        log_every=max(1, args.total_timesteps // 200),
        microbatch_size=2048 if pick_device(args.device).type == "cpu" else args.num_envs * args.num_steps,
        desired_kl_final=args.desired_kl,
        cpu_threads=torch.get_num_threads() if args.compile else 1,
    )
    return dataclasses.replace(args, **{name: value for name, value in derived.items() if getattr(args, name) is None})


# ------------------------------------------------------------------------------------------------------------------------
# Derived sizes
# ------------------------------------------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """What follows from the flags; computed here, printed once, nowhere else."""

    envs: int  # environments of this process
    batch: int  # samples of this process in one iteration: envs x num_steps
    minibatch: int  # samples of this process in one gradient step
    microbatch: int  # samples in one backward pass
    steps_per_iteration: int  # environment steps of all processes in one iteration
    iterations: int


def derive_sizes(args: Args, world_size: int, profiled: tuple[int, int] = PROFILED, done: int = 0) -> Sizes:
    """Check every flag before anything is allocated, then compute the sizes. done: iterations before a resume."""
    counts = "num_envs total_timesteps num_steps update_epochs num_minibatches solver_iterations microbatch_size cpu_threads"
    positive = "reward_scale learning_rate desired_kl desired_kl_final learning_rate_min learning_rate_max"
    lowest_rate, highest_rate = args.learning_rate_min, args.learning_rate_max
    rules = (  # flags, what is legal, and how to say it
        (f"{counts} checkpoint_every log_every", lambda x: x >= 1, ">= 1"),
        ("eval_every", lambda x: x is None or x >= 1, ">= 1"),
        ("seed", lambda x: 0 <= x < 2**63, "between 0 and 2**63 - 1"),
        ("eval_episodes", lambda x: x >= 0, ">= 0"),
        ("entropy_coef bounds_coef", lambda x: 0 <= x < math.inf, ">= 0 and finite"),
        ("clip_coef max_grad_norm", lambda x: x > 0, "> 0"),
        (positive, lambda x: 0 < x < math.inf, "> 0 and finite"),
        ("gamma gae_lambda", lambda x: 0 <= x <= 1, "between 0 and 1"),
        ("actor_hidden critic_hidden", lambda x: all(size >= 1 for size in x), "made of sizes >= 1"),
        ("learning_rate_max", lambda x: x >= lowest_rate, f">= learning_rate_min = {lowest_rate:g}"),
        ("log_std_init", math.isfinite, "finite"),
        ("log_std_min", lambda x: x <= args.log_std_init, f"<= log_std_init = {args.log_std_init:g}"),
    )  # fmt: skip
    for names, legal, rule in rules:
        for name in names.split():
            if not legal(getattr(args, name)):
                raise InputError(f"{name} = {getattr(args, name)} must be {rule}")
    if args.learning_rate_schedule == "adaptive" and not lowest_rate <= args.learning_rate <= highest_rate:
        raise InputError(
            f"learning_rate = {args.learning_rate:g} must be between learning_rate_min = {lowest_rate:g} and learning_rate_max = "
            f"{highest_rate:g} under the adaptive schedule"
        )
    if args.clip_value_loss and math.isinf(args.clip_coef):
        raise InputError("clip_value_loss needs a finite clip_coef; use --clip-coef 0.2 or --no-clip-value-loss")
    if args.eval_every is not None and not args.eval_episodes:
        raise InputError("eval_every needs eval_episodes >= 1; use --eval-episodes 20")
    if args.eval_every is not None and args.env_id not in gymnasium.registry:
        raise InputError(f"eval_every: Gymnasium has no {args.env_id} to evaluate in; leave that flag away")
    if args.track and importlib.util.find_spec("wandb") is None:
        raise InputError("track needs Weights & Biases; run `pip install wandb` or leave --track away")
    if args.num_envs % world_size:
        below = args.num_envs // world_size * world_size
        choices = f"{below} or {below + world_size}" if below else f"{world_size}"
        raise InputError(f"num_envs = {args.num_envs:,} does not split over {world_size} processes; use {choices}")
    envs = args.num_envs // world_size
    batch = envs * args.num_steps
    if batch % args.num_minibatches:
        near, least = 10**6, min(args.num_minibatches, batch)  # a search without end for huge numbers helps nobody
        below = next((n for n in range(least, max(0, least - near), -1) if batch % n == 0), 1)
        above = next((n for n in range(least, min(batch, least + near) + 1) if batch % n == 0), below)
        choices = f"{below} or {above}" if above != below else f"{below}"
        what = f"num_envs x num_steps = {batch:,}" + (" of each process" if world_size > 1 else "")
        raise InputError(f"{what} does not split into {args.num_minibatches} minibatches; use {choices}")
    minibatch = batch // args.num_minibatches
    microbatch = math.ceil(minibatch / math.ceil(minibatch / args.microbatch_size))
    steps_per_iteration = args.num_envs * args.num_steps
    iterations = math.ceil(args.total_timesteps / steps_per_iteration)
    if args.profile and iterations < (least := done + sum(profiled) + 1):
        needed = least * steps_per_iteration
        raise InputError(f"profile needs {least - done} iterations; use --total-timesteps {needed} or more")
    return Sizes(envs, batch, minibatch, microbatch, steps_per_iteration, iterations)


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


class Agent(nn.Module):
    """Gaussian policy and value function, separate networks. The policy acts in half ranges: +-1 spans the action space."""

    def __init__(self, obs_size: int, critic_obs_size: int | None, action_space: gymnasium.spaces.Box, args: Args):
        super().__init__()
        low, high = torch.as_tensor(action_space.low), torch.as_tensor(action_space.high)
        bounded = low.isfinite() & high.isfinite()
        self.register_buffer("action_centre", torch.where(bounded, (high + low) / 2, 0.0))
        self.register_buffer("action_half_range", torch.where(bounded, (high - low) / 2, 1.0))
        self.obs_statistics = RunningStatistics(obs_size, args.normalize_observations, limit=10.0)
        self.critic_obs_statistics = self.obs_statistics
        if critic_obs_size is not None:  # the task has privileged observations for the value function
            self.critic_obs_statistics = RunningStatistics(critic_obs_size, args.normalize_observations, limit=10.0)
        self.return_statistics = RunningStatistics(1, args.normalize_values)
        self.actor = mlp([obs_size, *args.actor_hidden, len(low)], last_gain=0.01)
        self.critic = mlp([critic_obs_size or obs_size, *args.critic_hidden, 1], last_gain=1.0)
        self.log_std = nn.Parameter(torch.full((len(low),), args.log_std_init))  # independent of the state
        self.bf16 = args.bf16

    def autocast(self, x: Tensor) -> torch.autocast:
        # No cache: a cast cached inside a graph capture would go stale.
        return torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False)

    def policy_mean(self, normalized_obs: Tensor) -> Tensor:
        with self.autocast(normalized_obs):
            return self.actor(normalized_obs).float()  # (B, actions), half ranges

    def normalized_value(self, normalized_critic_obs: Tensor) -> Tensor:
        with self.autocast(normalized_critic_obs):
            return self.critic(normalized_critic_obs).float().squeeze(-1)  # (B,)

    def to_env(self, action: Tensor) -> Tensor:
        return self.action_centre + self.action_half_range * action

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """The deterministic action, in the environment's units."""
        return self.to_env(self.policy_mean(self.obs_statistics.normalize(obs)))


# ------------------------------------------------------------------------------------------------------------------------
# Algorithm: pure functions
# ------------------------------------------------------------------------------------------------------------------------


class Rollout(NamedTuple):
    """What one iteration collects, (T, N, ...) on the device: T = num_steps, N = environments of this process."""

    obs: Tensor  # (T, N, obs)
    critic_obs: Tensor  # (T, N, critic obs); the same tensor as obs where the task has no privileged observation
    final_critic_obs: Tensor  # (T, N, critic obs): what the step led to, before any auto-reset
    action: Tensor  # (T, N, actions), half ranges
    mean: Tensor  # (T, N, actions), half ranges: the policy's mean when it acted
    reward: Tensor  # (T, N), scaled
    terminated: Tensor  # (T, N) bool
    truncated: Tensor  # (T, N) bool
    invalid: Tensor  # (T, N) bool: quarantined, masked everywhere


def allocate_rollout(
    steps: int, envs: int, obs: int, critic_obs: int | None, actions: int, device: torch.device
) -> Rollout:
    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(steps, envs, *shape, dtype=dtype, device=device)

    seen = zeros(obs)
    privileged = seen if critic_obs is None else zeros(critic_obs)
    flags = [zeros(dtype=torch.bool) for _ in range(3)]
    return Rollout(seen, privileged, torch.zeros_like(privileged), zeros(actions), zeros(actions), zeros(), *flags)


class Batch(NamedTuple):
    """The samples of one update, B of them in a row; what the old policy and value function said is frozen here."""

    obs: Tensor  # (B, obs), normalised
    critic_obs: Tensor  # (B, critic obs), normalised
    action: Tensor  # (B, actions), half ranges
    mean: Tensor  # (B, actions), old policy
    log_prob: Tensor  # (B,), old policy
    value: Tensor  # (B,), old value function, normalised
    target: Tensor  # (B,), return to regress on, normalised
    advantage: Tensor  # (B,)
    weight: Tensor  # (B,): 0 for a quarantined transition, else such that the mean is 1


class LossTerms(NamedTuple):
    """Means over a minibatch, in the order in which ppo_loss stacks them."""

    policy_loss: Tensor
    value_loss: Tensor
    bounds_loss: Tensor
    entropy: Tensor
    kl: Tensor
    clip_fraction: Tensor


def weighted_moments(x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count (), mean (k,) and variance (k,) of the valid rows of x: (B, k), over all processes, in float64."""
    rows = torch.where(valid[:, None], x, 0.0).double()
    sums = sum_over_processes(torch.cat([valid.sum().double()[None], rows.sum(0), rows.square().sum(0)]))
    mean, mean_square = (sums[1:] / sums[0].clamp(min=1.0)).chunk(2)
    return sums[0], mean, (mean_square - mean.square()).clamp(min=0.0)


@torch.no_grad()
def policy_step(agent: Agent, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and sampled action (N, actions) in half ranges, and that action in the environment's units."""
    mean = agent.policy_mean(agent.obs_statistics.normalize(obs))
    action = mean + agent.log_std.exp() * noise
    return mean, action, agent.to_env(action)


def gaussian_log_prob(action: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log density (B,) of diagonal Gaussians."""
    z = (action - mean) * (-log_std).exp()
    return (-0.5 * z.square() - log_std - 0.5 * math.log(2.0 * math.pi)).sum(-1)


def gaussian_kl(old_mean: Tensor, old_log_std: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Exact KL(old || new) (B,) of diagonal Gaussians: no epsilon, so that it is unbiased for small deviations too."""
    squares = (2.0 * (old_log_std - log_std)).exp() + ((old_mean - mean) * (-log_std).exp()).square()
    return (log_std - old_log_std + 0.5 * (squares - 1.0)).sum(-1)


def advantages_gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    invalid: Tensor,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    """Generalised advantage estimation over (T, N) tensors.

    next_value is V(final_obs), the value of the state that the step really led to, never that of a state after auto-reset. A step
    that ran on or hit the time limit (truncated) is bootstrapped with it, because the robot would have gone on; after a real end
    (terminated, which wins over truncated) nothing follows and the bootstrap is 0. Any end stops the sum over later steps. An
    invalid step has advantage 0 and stops it too.
    """
    delta = reward + gamma * torch.where(terminated, 0.0, next_value) - value
    delta = torch.where(invalid, 0.0, delta)
    decay = gamma * gae_lambda * (~(terminated | truncated | invalid)).float()
    advantage = torch.empty_like(delta)
    following = torch.zeros_like(delta[0])
    for t in reversed(range(len(delta))):
        following = delta[t] + decay[t] * following
        advantage[t] = following
    return advantage


@torch.no_grad()
def values_and_advantages(
    agent: Agent, rollout: Rollout, microbatch: int, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """V(s_t) and the advantages, both (T, N), in scaled reward units."""

    def value_of(critic_obs: Tensor) -> Tensor:
        rows = agent.critic_obs_statistics.normalize(critic_obs.flatten(0, 1))
        value = torch.cat([agent.normalized_value(part) for part in rows.split(microbatch)])
        return agent.return_statistics.denormalize(value).view(critic_obs.shape[:2])

    value, next_value = value_of(rollout.critic_obs), value_of(rollout.final_critic_obs)
    ends = rollout.terminated, rollout.truncated, rollout.invalid
    return value, advantages_gae(rollout.reward, value, next_value, *ends, gamma, gae_lambda)


@torch.no_grad()
def explained_variance(value: Tensor, advantage: Tensor, invalid: Tensor) -> Tensor:
    """1 - Var[returns - value] / Var[returns], () over the transitions (T, N) that were not quarantined."""
    columns = torch.stack([advantage.flatten(), (advantage + value).flatten()], 1)
    _, _, (error, spread) = weighted_moments(columns, ~invalid.flatten())
    return (1.0 - error / spread).float()


@torch.no_grad()
def make_batch(
    agent: Agent, rollout: Rollout, value: Tensor, advantage: Tensor, normalize_advantages: bool, order: Tensor
) -> Batch:
    """Normalise everything once, shuffle once: every epoch then walks over the same contiguous minibatches.

    The return statistics are updated here and only here, before the targets are scaled with them."""
    valid = ~rollout.invalid.flatten()
    returns = (advantage + value).flatten()
    agent.return_statistics.update(returns[:, None], valid)
    count, mean, variance = weighted_moments(advantage.flatten()[:, None], valid)
    if normalize_advantages:
        advantage = (advantage - mean.float()) / (variance.sqrt().float() + 1e-8)
    weight = valid * (sum_over_processes(torch.full_like(count, len(valid))) / count.clamp(min=1.0)).float()
    obs, critic_obs = rollout.obs.flatten(0, 1), rollout.critic_obs.flatten(0, 1)
    obs = agent.obs_statistics.normalize(obs)
    critic_obs = obs if rollout.critic_obs is rollout.obs else agent.critic_obs_statistics.normalize(critic_obs)
    action, old_mean = rollout.action.flatten(0, 1), rollout.mean.flatten(0, 1)
    log_prob = gaussian_log_prob(action, old_mean, agent.log_std)
    value, target = agent.return_statistics.normalize(value.flatten()), agent.return_statistics.normalize(returns)
    # A quarantined transition may hold NaN, which a weight of 0 does not remove.
    advantage, target = (torch.where(valid, x, 0.0) for x in (advantage.flatten(), target))
    rows = Batch(obs, critic_obs, action, old_mean, log_prob, value, target, advantage, weight)
    return Batch(*(x[order] for x in rows))


def ppo_loss(agent: Agent, batch: Batch, old_log_std: Tensor, samples: int, args: Args) -> tuple[Tensor, Tensor]:
    """The share of this (part of a) batch in the loss of a minibatch of `samples`, and the same share of LossTerms, stacked.

    A weight on the value loss would only move the point at which max_grad_norm bites: the networks share no parameter, and Adam
    divides the scale out."""
    mean, value = agent.policy_mean(batch.obs), agent.normalized_value(batch.critic_obs)
    log_ratio = gaussian_log_prob(batch.action, mean, agent.log_std) - batch.log_prob
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1.0 - args.clip_coef, 1.0 + args.clip_coef)
    policy_loss = -torch.min(batch.advantage * ratio, batch.advantage * clipped_ratio)
    value_loss = 0.5 * (value - batch.target).square()
    if args.clip_value_loss:
        clipped_value = batch.value + (value - batch.value).clamp(-args.clip_coef, args.clip_coef)
        value_loss = torch.max(value_loss, 0.5 * (clipped_value - batch.target).square())
    bounds_loss = (mean.abs() - 1.1).clamp(min=0.0).square().sum(-1)
    entropy = (agent.log_std + 0.5 * math.log(2.0 * math.pi * math.e)).sum() * torch.ones_like(ratio)
    loss = policy_loss + value_loss + args.bounds_coef * bounds_loss - args.entropy_coef * entropy
    with torch.no_grad():
        kl = gaussian_kl(batch.mean, old_log_std, mean, agent.log_std)
        clip_fraction = ((ratio - 1.0).abs() > args.clip_coef).float()
        terms = LossTerms(policy_loss, value_loss, bounds_loss, entropy, kl, clip_fraction)
        terms = (torch.stack(terms) * batch.weight).sum(1) / samples
    return (loss * batch.weight).sum() / samples, terms


def accumulate_gradients(
    agent: Agent, batch: Batch, old_log_std: Tensor, microbatch: int, loss_function, args: Args
) -> Tensor:
    """Gradients of the minibatch's loss, added up over parts that fit the cache; returns its LossTerms, stacked."""
    agent.zero_grad()
    total = 0.0
    for part in zip(*(x.split(microbatch) for x in batch), strict=True):
        loss, terms = loss_function(agent, Batch(*part), old_log_std, len(batch.weight), args)
        loss.backward()
        total = total + terms
    return total


@torch.no_grad()
def apply_gradients(agent: Agent, optimizer: torch.optim.Optimizer, max_grad_norm: float, log_std_min: float) -> None:
    """One Adam step on clipped gradients, then the floor under the exploration noise."""
    nn.utils.clip_grad_norm_([*agent.actor.parameters(), agent.log_std], max_grad_norm)
    nn.utils.clip_grad_norm_(agent.critic.parameters(), max_grad_norm)
    optimizer.step()
    agent.log_std.clamp_(min=log_std_min)


def update(
    agent: Agent, batch: Batch, accumulate, apply, learning_rate: Tensor, desired_kl: float, minibatch: int, args: Args
) -> Tensor:
    """All gradient steps of one iteration; returns the LossTerms summed over them, stacked.

    Each minibatch measures how far the policy has moved since the rollout, sets the learning rate, and takes one step."""
    old_log_std = agent.log_std.detach().clone()
    total = torch.zeros(len(LossTerms._fields), device=old_log_std.device)
    for epoch in range(args.update_epochs):
        for start in range(0, len(batch.weight), minibatch):
            terms = accumulate(old_log_std, *(x[start : start + minibatch] for x in batch))
            average_over_processes([*(p.grad for p in agent.parameters()), terms])
            moved = epoch > 0 or start > 0  # before the first step the divergence is 0 and says nothing
            if args.learning_rate_schedule == "adaptive" and moved:
                bounds = args.learning_rate_min, args.learning_rate_max
                learning_rate.copy_(adapted_learning_rate(learning_rate, LossTerms(*terms).kl, desired_kl, *bounds))
            apply()
            total += terms
    return total


def adapted_learning_rate(
    learning_rate: Tensor, kl: Tensor, desired_kl: float, lowest: float, highest: float
) -> Tensor:
    """A factor of 1.5 down where the policy moved over twice as far as desired, up where less than half as far."""
    factor = torch.where(kl > 2.0 * desired_kl, 1.0 / 1.5, torch.where(kl < 0.5 * desired_kl, 1.5, 1.0))
    return (learning_rate * factor).clamp(lowest, highest)


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


def build_functions(agent: Agent, optimizer: torch.optim.Optimizer, rollout: Rollout, sizes: Sizes, args: Args):
    """The four functions that do the work, as functions of tensors alone: eager, compiled and, on a GPU, captured.

    Returns policy(obs, noise), targets(), accumulate(old_log_std, *batch) and apply(); leaves agent and optimizer as they were."""
    step_function, loss_function = policy_step, ppo_loss
    if args.compile:
        step_function, loss_function = (torch.compile(f, dynamic=False) for f in (policy_step, ppo_loss))

    def policy(obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return step_function(agent, obs, noise)

    def targets() -> tuple[Tensor, Tensor]:
        return values_and_advantages(agent, rollout, sizes.microbatch, args.gamma, args.gae_lambda)

    def accumulate(old_log_std: Tensor, *batch: Tensor) -> Tensor:
        return accumulate_gradients(agent, Batch(*batch), old_log_std, sizes.microbatch, loss_function, args)

    def apply() -> None:
        apply_gradients(agent, optimizer, args.max_grad_norm, args.log_std_min)

    obs, action, scalars = rollout.obs[0], rollout.action[0], torch.zeros(sizes.minibatch, device=rollout.obs.device)
    features = [
        scalars.new_zeros(sizes.minibatch, x.shape[-1]) for x in (rollout.obs, rollout.critic_obs, action, action)
    ]
    example = (torch.zeros_like(agent.log_std), *features, *[scalars] * 5)
    if args.cuda_graphs and obs.device.type == "cuda":
        state = [*agent.state_dict().values(), *(x for moments in optimizer.state.values() for x in moments.values())]
        before = [x.clone() for x in state]
        try:
            policy, targets = capture(policy, (obs, torch.zeros_like(action))), capture(targets, ())
            accumulate = capture(accumulate, example)
            accumulate(*example)  # a captured graph has not run yet: its gradients would be whatever was in memory
            apply = capture(apply, ())
        except RuntimeError as error:
            raise RuntimeError("capture in CUDA graphs failed; --no-cuda-graphs runs without them") from error
        for x, saved in zip(state, before, strict=True):
            x.copy_(saved)
    else:  # compile now, so that compilation is timed apart from training
        policy(obs, torch.zeros_like(action)), accumulate(*example)
    return policy, targets, accumulate, apply


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
    check_unchanged(
        checkpoint, args, "env_id env_kwargs actor_hidden critic_hidden normalize_observations normalize_values"
    )


def check_resumable(checkpoint: dict, args: Args, world_size: int) -> None:
    """Refuse to continue under flags that do not fit the state, or that would do nothing because it holds what they set."""
    check_same_task(checkpoint, args)
    check_unchanged(checkpoint, args, "num_envs num_steps seed log_std_init random_initial_ages")
    if args.total_timesteps <= checkpoint["env_steps"]:
        raise InputError(
            f"the checkpoint has {checkpoint['env_steps']:,} steps already; give a larger --total-timesteps"
        )
    if len(checkpoint["processes"]) != world_size:
        raise InputError(f"the checkpoint was written by {len(checkpoint['processes'])} processes, not {world_size}")


def training_state(agent: Agent, optimizer: torch.optim.Optimizer, learning_rate: Tensor) -> dict:
    return dict(agent=agent.state_dict(), moments=list(optimizer.state.values()), learning_rate=learning_rate)


def load_training_state(
    checkpoint: dict, agent: Agent, optimizer: torch.optim.Optimizer, learning_rate: Tensor
) -> None:
    """Copy in place, so that captured graphs keep their addresses."""
    agent.load_state_dict(checkpoint["agent"])
    learning_rate.copy_(checkpoint["learning_rate"])
    for moments, saved in zip(optimizer.state.values(), checkpoint["moments"], strict=True):
        for name, x in moments.items():
            x.copy_(saved[name])


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
    checkpoint = load_checkpoint(args.resume, "ppo") if args.resume else None
    sizes = derive_sizes(args, world_size, profiled, checkpoint["iteration"] if checkpoint else 0)
    check_env_kwargs(args)
    check_run_dir(args)
    if checkpoint:
        check_resumable(checkpoint, args, world_size)
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
    critic_obs_size = None if env.single_critic_space is None else env.single_critic_space.shape[0]
    privileged = critic_obs_size is not None
    agent = Agent(obs_size, critic_obs_size, env.single_action_space, args).to(device)
    learning_rate = torch.tensor(args.learning_rate, device=device)
    optimizer = make_optimizer(agent, learning_rate)
    rollout = allocate_rollout(args.num_steps, sizes.envs, obs_size, critic_obs_size, action_size, device)
    with first_process_first():
        policy, targets, accumulate, apply = build_functions(agent, optimizer, rollout, sizes, args)
        env.reset()
        env.step(torch.zeros(sizes.envs, action_size, device=device))  # compiles the physics
    obs, info = env.reset(seed=env_options["seed"])
    critic_obs = info["critic_obs"] if privileged else obs
    first_iteration, train_seconds = 0, 0.0
    if checkpoint:
        load_training_state(checkpoint, agent, optimizer, learning_rate)
        if args.learning_rate != checkpoint["args"]["learning_rate"]:  # a rate given anew wins over the adapted one
            learning_rate.fill_(args.learning_rate)
        mine = checkpoint["processes"][rank]
        with refusals_of_the_simulator():
            env.load_state_dict(mine["env"])
        if not moved:
            generator.set_state(mine["generator"])
        obs, critic_obs = mine["obs"].to(device), mine["critic_obs"].to(device)
        first_iteration, train_seconds = checkpoint["iteration"], checkpoint["train_seconds"]
    compile_seconds = time.perf_counter() - preparation_started
    run_dir, log = Path(args.run_dir), None
    logged_step, logged_seconds = first_iteration * sizes.steps_per_iteration, train_seconds
    if rank == 0:  # the one writer
        log = RunLog(run_dir, args, logged_step)
        tqdm.write(
            f"{args.env_id} on {device} into {run_dir}, prepared in {compile_seconds:.1f} s\n"
            f"{args.num_envs:,} environments x {args.num_steps} steps = {sizes.steps_per_iteration:,} samples, "
            f"{sizes.iterations:,} times; {args.update_epochs} epochs x {args.num_minibatches} minibatches of "
            f"{sizes.minibatch:,} in parts of {sizes.microbatch:,}; {world_size} process(es)"
        )
    profile = Profile(args.profile and rank == 0, device, *profiled)
    terms, record, clock = torch.zeros(len(LossTerms._fields), device=device), {}, time.perf_counter()

    stop.training = True
    for iteration in range(first_iteration, sizes.iterations):
        # Rollout: copies into the storage, because the simulator's tensors live until its next step.
        profile.start_iteration()
        noise = torch.randn(args.num_steps, sizes.envs, action_size, generator=generator, device=device)
        for t in range(args.num_steps):
            rollout.obs[t] = obs
            if privileged:
                rollout.critic_obs[t] = critic_obs
            with profile.stage("infer"):
                rollout.mean[t], rollout.action[t], env_action = policy(obs, noise[t])
            with profile.stage("simulate"):
                obs, reward, rollout.terminated[t], rollout.truncated[t], info = env.step(env_action)
            rollout.reward[t] = reward * args.reward_scale
            rollout.final_critic_obs[t] = info["final_critic_obs"] if privileged else info["final_obs"]
            rollout.invalid[t] = info["invalid"]
            critic_obs = info["critic_obs"] if privileged else obs

        # Targets: values and advantages, under the statistics of the rollout.
        with profile.stage("targets"):
            value, advantage = targets()
            order = torch.randperm(sizes.batch, generator=generator, device=device)
            batch = make_batch(agent, rollout, value, advantage, args.normalize_advantages, order)

        # Update. The observation statistics follow it, so that its ratios compare like with like.
        progress = iteration / sizes.iterations
        desired_kl = args.desired_kl + progress * (args.desired_kl_final - args.desired_kl)
        if args.learning_rate_schedule == "linear":
            learning_rate.fill_(args.learning_rate * (1.0 - progress))
        with profile.stage("update"):
            terms += update(agent, batch, accumulate, apply, learning_rate, desired_kl, sizes.minibatch, args)
        agent.obs_statistics.update(rollout.obs.flatten(0, 1), ~rollout.invalid.flatten())
        if privileged:
            agent.critic_obs_statistics.update(rollout.critic_obs.flatten(0, 1), ~rollout.invalid.flatten())
        profile.end_iteration(run_dir, sizes.steps_per_iteration)

        # Log, evaluate, save: whenever a multiple of the interval was crossed.
        env_steps = (iteration + 1) * sizes.steps_per_iteration
        last = iteration + 1 == sizes.iterations
        before = env_steps - sizes.steps_per_iteration
        stopping = stop.requested()
        log_now = last or stopping or crossed(args.log_every, before, env_steps)
        evaluate_now = crossed(args.eval_every, before, env_steps) or (last and args.eval_every is not None)
        save_now = last or stopping or crossed(args.checkpoint_every, before, env_steps)
        if not (log_now or evaluate_now or save_now):
            continue
        iterations = (env_steps - logged_step) // sizes.steps_per_iteration
        gradient_steps = iterations * args.update_epochs * args.num_minibatches
        terms /= gradient_steps
        names = (*LossTerms._fields, "learning_rate", "action_std", "explained_variance")
        # Of the last iteration alone; the terms are means over all gradient steps since the last line.
        explained = explained_variance(value, advantage, rollout.invalid)
        numbers = torch.stack([*terms, learning_rate, agent.log_std.exp().mean(), explained])
        numbers = numbers.tolist()  # host sync
        episodes = merge_episode_statistics(env.pop_statistics(), device)  # host sync
        train_seconds += time.perf_counter() - clock
        speed = (env_steps - logged_step) / (train_seconds - logged_seconds)
        record = dict(env_steps=env_steps, wall_seconds=train_seconds, steps_per_second=speed) | episodes
        record |= {name: x if math.isfinite(x) else None for name, x in zip(names, numbers, strict=True)}
        if None in [record[name] for name in LossTerms._fields]:
            raise FloatingPointError(f"training diverged by {env_steps:,} steps: {record}")
        if log and evaluate_now:  # with eval_every the last iteration evaluates too
            score = evaluate_gymnasium(agent, args)
            record |= dict(gymnasium_return=score["mean"]) if score else {}
        if log:
            log.write(record)
        if save_now:
            mine = dict(env=env.state_dict(), generator=generator.get_state(), obs=obs, critic_obs=critic_obs)
            state = dict(algorithm="ppo", env_id=args.env_id, args=dataclasses.asdict(args), device=device.type)
            state |= dict(
                iteration=iteration + 1, env_steps=env_steps, train_seconds=train_seconds, versions=versions()
            )
            state |= dict(processes=gather_from_processes(on_cpu(mine)))
            if log:
                state |= on_cpu(training_state(agent, optimizer, learning_rate))
                save_checkpoint(run_dir / "checkpoint.pt", state)
                stop.checkpoint = run_dir / "checkpoint.pt"
        terms.zero_()
        logged_step, logged_seconds, clock = env_steps, train_seconds, time.perf_counter()
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
    plot_curve(run_dir, f"{args.env_id}, PPO, seed {args.seed}")
    evaluation = dict(env_id=args.env_id, algorithm="ppo", seed=args.seed, env_steps=logged_step)
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
        self.agent, self.low, self.high = agent, low, high

    def forward(self, obs: Tensor) -> Tensor:
        mean = self.agent.actor(self.agent.obs_statistics.normalize(obs))
        return self.agent.to_env(mean).clamp(self.low, self.high)


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
    checkpoint = load_checkpoint(args.play, "ppo")
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
    critic_obs_size = None if env.single_critic_space is None else env.single_critic_space.shape[0]
    obs_size = env.single_observation_space.shape[0]
    agent = Agent(obs_size, critic_obs_size, env.single_action_space, args)
    agent.load_state_dict(checkpoint["agent"])
    if args.export is not None:
        facts = dict(observation_names=env.observation_names(env.observation_slices), action_names=env.action_names())
        facts |= dict(control_step_seconds=env.control_step)
        policy = ExportedPolicy(agent, *env.task.action_limits(env.model))
        export_onnx(policy, dict(obs=torch.zeros(2, obs_size)), ["action"], facts, args, checkpoint)
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
    saved = load_checkpoint(path, "ppo")["args"] | forgotten
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
