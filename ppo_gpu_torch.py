"""PPO for thousands of robots on one device: simulator, rollout, advantages and gradient steps never leave it.

    python ppo_gpu_torch.py --env-id InvertedPendulum-v5                    # half a minute
    python ppo_gpu_torch.py --env-id HalfCheetah-v5                         # on a GPU if there is one, else on the CPU
    python ppo_gpu_torch.py --env-id Ant-v5 --bf16                          # networks in bfloat16
    python ppo_gpu_torch.py --env-id Ant-v5 --help                          # all flags, with Ant's defaults
    python ppo_gpu_torch.py --resume runs/NAME/checkpoint.pt --total-timesteps 40000000
    python ppo_gpu_torch.py --play runs/NAME/checkpoint.pt --capture-video
    python ppo_gpu_torch.py --play runs/NAME/checkpoint.pt --export policy.onnx
    torchrun --nproc-per-node=2 ppo_gpu_torch.py --env-id Ant-v5            # several GPUs share the environments

Scores on one AMD EPYC core, medians of 5 seeds in Gymnasium's own environments: InvertedPendulum-v5 1,000 after 2 s,
HalfCheetah-v5 8,014 after 3 minutes, Hopper-v5 3,560 after 4, Ant-v5 6,639 after 8. README.md has the other tasks.

The script needs `vecsim_torch.py` beside it and no other file of this project. Copy the two files and they are yours.

Your own robot in vecsim: --env-id my_task.py:MyTask; README.md shows how to write one.
Your own simulator: call `train(Args(env_id="my-robot"), make_env=make_env)` with a function
`make_env(env_id, num_envs, device, seed, **env_kwargs)` that returns a vector environment of tensors on that device.
It needs reset, step, two spaces and info["final_obs"]; the docstring of `vecsim_torch.CompletedEnv` has the details.

A2C is PPO with one epoch, one minibatch and no clipping (Huang et al. 2022, arXiv:2205.09123):

    python ppo_gpu_torch.py --update-epochs 1 --num-minibatches 1 --clip-coef inf --num-steps 5 \
        --learning-rate-schedule constant

For the textbook's A2C with plain n-step returns, append --gae-lambda 1 --no-normalize-advantages
--no-normalize-values --bounds-coef 0.

Sources: PPO, Schulman et al. 2017 (arXiv:1707.06347), eq. 7; GAE, Schulman et al. 2016 (arXiv:1506.02438), eq. 16;
time limits, Pardo et al. 2018 (arXiv:1712.00378); learning rate from the KL divergence, and the regime of many
environments, Rudin et al. 2022 (arXiv:2109.11978); running moments, Chan et al. 1983.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium
import torch
from torch import Tensor, nn
from torch.profiler import record_function

import vecsim_torch as vecsim
from vecsim_torch import InputError, RunningStatistics, sum_over_processes, weighted_moments

# ----------------------------------------------------------------------------------------------------------------------
# Arguments
# ----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Args(vecsim.RunFlags):
    """Flags of a run, on top of those that all trainers have (`vecsim_torch.RunFlags`).

    Steps are environment steps, summed over all environments, except in num_steps. These defaults are for a CPU and a
    task without a row in TASKS."""

    num_envs: int = 1024
    """environments that are stepped in parallel, over all processes (>= 1)"""
    total_timesteps: int = 20_000_000
    """environment steps of the whole run (>= 1; rounded up to whole iterations)"""
    bf16: bool = False
    """run the networks in bfloat16, the rest in float32; a CPU without AVX512_BF16 gets slower"""

    # the batch
    num_steps: int = 16
    """steps of each environment in an iteration (>= 1)"""
    update_epochs: int = 4
    """passes over the samples of an iteration, all in the same random order (>= 1)"""
    num_minibatches: int = 8
    """gradient steps in a pass (>= 1; must divide num_envs x num_steps of each process)"""

    # the networks
    actor_hidden: tuple[int, ...] = (256, 128, 64)
    """hidden layer sizes of the policy"""
    critic_hidden: tuple[int, ...] = (256, 128, 64)
    """hidden layer sizes of the value function"""
    log_std_init: float = 0.0
    """initial log standard deviation of the policy, in units of half the action range"""
    log_std_min: float = -2.3
    """lowest log standard deviation, in the same units"""
    normalize_observations: bool = True
    """scale observations by their running mean and standard deviation"""
    normalize_values: bool = True
    """train the value function on returns that are scaled by their running mean and standard deviation"""

    # the objective
    gamma: float = 0.99
    """discount per environment step (0 to 1)"""
    gae_lambda: float = 0.95
    """decay of generalised advantage estimation (0 to 1)"""
    clip_coef: float = 0.2
    """clipping range of the probability ratio (> 0; inf: no clipping)"""
    normalize_advantages: bool = True
    """scale the advantages of an iteration to mean 0 and standard deviation 1"""
    entropy_coef: float = 0.0
    """weight of the entropy bonus (>= 0)"""
    bounds_coef: float = 1e-4
    """weight of the penalty on mean actions outside 1.1 times the action range (>= 0)"""
    max_grad_norm: float = 1.0
    """largest gradient norm, for policy and value function separately (> 0; inf: no clipping)"""

    # the learning rate
    learning_rate: float = 1e-3
    """initial learning rate of Adam (> 0)"""
    learning_rate_schedule: Literal["adaptive", "linear", "constant"] = "adaptive"
    """adaptive: keep the KL divergence of an update near desired_kl; linear: decay to 0 over the run; constant"""
    learning_rate_max: float = 5e-3
    """adaptive schedule: highest learning rate (> 0); the lowest is 1e-5"""
    desired_kl: tuple[float, float] = (0.01, 0.01)
    """adaptive schedule: target of KL(old policy || new policy) at the start and at the end of the run (> 0)"""


# Flags of a task that differ from the defaults. The quadruped acts 50 times a second; reward_scale 50 turns its rewards
# into rewards per second. Its returns are then large compared with the output of an untrained value function.
TASKS = {
    "InvertedPendulum-v5": dict(
        num_envs=512, num_minibatches=4, total_timesteps=250_000, actor_hidden=(64, 64), critic_hidden=(64, 64)),
    "InvertedDoublePendulum-v5": dict(num_envs=512, num_minibatches=4, total_timesteps=1_000_000),
    "Reacher-v5": dict(
        num_envs=512, num_minibatches=4, total_timesteps=2_000_000, actor_hidden=(64, 64), critic_hidden=(64, 64)),
    "Pusher-v5": dict(total_timesteps=4_000_000, actor_hidden=(128, 128), critic_hidden=(128, 128)),
    "Hopper-v5": dict(total_timesteps=6_000_000, gamma=0.995, bounds_coef=0.01, learning_rate_max=1e-3),
    "Walker2d-v5": dict(total_timesteps=6_000_000, gamma=0.995, num_steps=32, num_minibatches=16),
    "HalfCheetah-v5": dict(total_timesteps=5_000_000),
    "Swimmer-v5": dict(total_timesteps=6_000_000, gamma=0.9999, gae_lambda=0.98),
    "Ant-v5": dict(
        total_timesteps=9_000_000, env_kwargs={"include_cfrc_ext_in_observation": False}, gamma=0.98, gae_lambda=0.9,
        log_std_init=-0.7, log_std_min=-1.7, desired_kl=(0.015, 0.009)),
    "Humanoid-v5": dict(
        total_timesteps=15_000_000, gamma=0.97, log_std_min=-1.7, desired_kl=(0.015, 0.009), env_kwargs={
            "include_cinert_in_observation": False, "include_cvel_in_observation": False,
            "include_qfrc_actuator_in_observation": False, "include_cfrc_ext_in_observation": False}),
    "HumanoidStandup-v5": dict(total_timesteps=2_500_000, env_kwargs={
        "include_cinert_in_observation": False, "include_cvel_in_observation": False,
        "include_qfrc_actuator_in_observation": False, "include_cfrc_ext_in_observation": False}),
    "Quadruped-Flat": dict(
        total_timesteps=50_000_000, env_kwargs={"velocity_in_observation": True}, reward_scale=50.0, num_steps=24,
        num_minibatches=4, log_std_init=-1.0, entropy_coef=0.005, desired_kl=(0.02, 0.02)),
    "Quadruped-Rough": dict(
        total_timesteps=200_000_000, num_envs=4096, reward_scale=50.0, num_steps=24, num_minibatches=4,
        log_std_init=-1.0, entropy_coef=0.005, desired_kl=(0.02, 0.02), actor_hidden=(512, 256, 128),
        critic_hidden=(512, 256, 128)),
}  # fmt: skip


def task_defaults(env_id: str, device: str = "auto") -> Args:
    """The defaults of a task: its row in TASKS on top of those of Args.

    A GPU has four times the environments, 4,096 at most, and as many times the steps. So a run has as many iterations
    and gradient steps as on a CPU, each on more samples."""
    args = Args(env_id=env_id, device=device, **TASKS.get(env_id, {}))
    return vecsim.sizes_for_device(args, "total_timesteps", factor=4, most=4096)


def parse_args(argv: list[str]) -> Args:
    """Read the flags. Omitted flags have the task's values, or the checkpoint's with --resume and --play."""
    return vecsim.parse_args(argv, "ppo", Args(), lambda given: task_defaults(given.env_id, given.device), __doc__)


# ----------------------------------------------------------------------------------------------------------------------
# Sizes and checks
# ----------------------------------------------------------------------------------------------------------------------


def check_ranges(args: Args) -> None:
    """InputError for a flag that is out of its range."""
    rules = (  # flags, whether a value is legal, and the rule in words
        ("num_steps update_epochs num_minibatches", lambda x: x >= 1, ">= 1"),
        ("gamma gae_lambda", lambda x: 0 <= x <= 1, "between 0 and 1"),
        ("entropy_coef bounds_coef", lambda x: 0 <= x < math.inf, ">= 0 and finite"),
        ("learning_rate learning_rate_max", lambda x: 0 < x < math.inf, "> 0 and finite"),
        ("desired_kl", lambda x: all(0 < kl < math.inf for kl in x), "> 0 and finite"),
        ("clip_coef max_grad_norm", lambda x: x > 0, "> 0"),
        ("log_std_init log_std_min", math.isfinite, "finite"),
        ("actor_hidden critic_hidden", lambda x: all(size >= 1 for size in x), "sizes >= 1"),
    )
    vecsim.check_rules(args, rules)


class Sizes(NamedTuple):
    """Numbers that follow from the flags."""

    envs: int  # environments of this process
    batch: int  # samples of this process in an iteration: envs x num_steps
    minibatch: int  # samples of this process in a gradient step
    microbatch: int  # samples of this process in a backward pass
    steps_per_iteration: int  # environment steps of all processes
    iterations: int


def derive_sizes(args: Args, world_size: int, device: torch.device) -> Sizes:
    """Compute the sizes. InputError if environments or samples do not split evenly; it names a near one."""
    if args.num_envs % world_size:
        nearest = math.ceil(args.num_envs / world_size) * world_size
        raise InputError(f"num_envs = {args.num_envs:,} does not split over {world_size} processes; use {nearest}")
    envs = args.num_envs // world_size
    batch = envs * args.num_steps
    if batch % args.num_minibatches:
        nearest = next(n for n in range(min(batch, args.num_minibatches), 0, -1) if batch % n == 0)
        raise InputError(
            f"num_envs x num_steps = {batch:,} per process does not split into {args.num_minibatches} minibatches; "
            f"use {nearest}"
        )
    minibatch = batch // args.num_minibatches
    parts = math.ceil(minibatch / 2048) if device.type == "cpu" else 1  # 2,048 samples fit the cache of a CPU
    microbatch = math.ceil(minibatch / parts)
    steps_per_iteration = args.num_envs * args.num_steps
    iterations = math.ceil(args.total_timesteps / steps_per_iteration)
    return Sizes(envs, batch, minibatch, microbatch, steps_per_iteration, iterations)


# ----------------------------------------------------------------------------------------------------------------------
# Networks
# ----------------------------------------------------------------------------------------------------------------------


def mlp(sizes: list[int], last_gain: float) -> nn.Sequential:
    """Linear layers with ELU between them, orthogonal weights and zero biases."""
    layers = []
    for i in range(len(sizes) - 1):
        last = i == len(sizes) - 2
        linear = nn.Linear(sizes[i], sizes[i + 1])
        nn.init.orthogonal_(linear.weight, last_gain if last else math.sqrt(2.0))
        nn.init.zeros_(linear.bias)
        layers += [linear] if last else [linear, nn.ELU()]
    return nn.Sequential(*layers)


class Agent(nn.Module):
    """Gaussian policy and value function, two networks.

    Inside the agent an action is in half ranges: 0 is the centre of the action range, -1 and 1 are its ends.
    critic_obs_size: size of the privileged observation of the value function; None: it sees what the policy sees."""

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
        self.return_statistics = RunningStatistics(1, args.normalize_values)
        self.actor = mlp([obs_size, *args.actor_hidden, len(low)], last_gain=0.01)
        self.critic = mlp([critic_obs_size or obs_size, *args.critic_hidden, 1], last_gain=1.0)
        self.log_std = nn.Parameter(torch.full((len(low),), args.log_std_init))  # independent of the state
        self.bf16 = args.bf16

    def autocast(self, x: Tensor) -> torch.autocast:
        # No cache of weights in bfloat16: a captured graph would use the cached ones after the weights have changed.
        return torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False)

    def policy_mean(self, normalized_obs: Tensor) -> Tensor:
        with self.autocast(normalized_obs):
            return self.actor(normalized_obs).float()  # (B, actions), half ranges

    def normalized_value(self, normalized_critic_obs: Tensor) -> Tensor:
        with self.autocast(normalized_critic_obs):
            return self.critic(normalized_critic_obs).float().squeeze(-1)  # (B,)

    def to_env(self, action: Tensor) -> Tensor:
        """Half ranges to the environment's units."""
        return self.action_centre + self.action_half_range * action

    @torch.no_grad()
    def act(self, obs: Tensor, started: Tensor | None = None) -> Tensor:
        """The deterministic action (B, actions) in the environment's units. `started` is for policies with memory."""
        return self.to_env(self.policy_mean(self.obs_statistics.normalize(obs)))


# ----------------------------------------------------------------------------------------------------------------------
# Algorithm: pure functions
# ----------------------------------------------------------------------------------------------------------------------


class Rollout(NamedTuple):
    """The transitions of one iteration on the device: T = num_steps, N = environments of this process."""

    obs: Tensor  # (T, N, obs)
    critic_obs: Tensor  # (T, N, critic obs); the tensor obs itself if the task has no privileged observation
    final_critic_obs: Tensor  # (T, N, critic obs): what the step led to, before any automatic reset
    action: Tensor  # (T, N, actions), half ranges
    mean: Tensor  # (T, N, actions), half ranges: the mean of the policy that acted
    reward: Tensor  # (T, N), scaled
    terminated: Tensor  # (T, N) bool
    truncated: Tensor  # (T, N) bool
    invalid: Tensor  # (T, N) bool: the simulation diverged; such a quarantined step is ignored by the learner


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
    """The B samples of one update, with the outputs of the policy and the value function before the update."""

    obs: Tensor  # (B, obs), normalised
    critic_obs: Tensor  # (B, critic obs), normalised
    action: Tensor  # (B, actions), half ranges
    mean: Tensor  # (B, actions), old policy
    log_prob: Tensor  # (B,), old policy
    target: Tensor  # (B,), the return that the value function learns, normalised
    advantage: Tensor  # (B,)
    weight: Tensor  # (B,): 0 for a quarantined transition, equal for all others; the mean is 1


class LossTerms(NamedTuple):
    """Means over a minibatch, in the order in which ppo_loss stacks them."""

    policy_loss: Tensor
    value_loss: Tensor
    bounds_loss: Tensor
    entropy: Tensor
    kl: Tensor
    clip_fraction: Tensor


@torch.no_grad()
def policy_step(agent: Agent, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and sampled action (N, actions) in half ranges, and that action in the environment's units."""
    mean = agent.policy_mean(agent.obs_statistics.normalize(obs))
    action = mean + agent.log_std.exp() * noise
    return mean, action, agent.to_env(action)


def gaussian_log_prob(action: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log density (B,) of diagonal Gaussians."""
    z = (action - mean) * (-log_std).exp()
    return (-0.5 * z.square() - log_std - 0.5 * math.log(2.0 * math.pi)).sum(-1)


def gaussian_kl(old_mean: Tensor, old_log_std: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """KL(old || new) (B,) of diagonal Gaussians, in closed form and without an epsilon."""
    squares = (2.0 * (old_log_std - log_std)).exp() + ((old_mean - mean) * (-log_std).exp()).square()
    return (log_std - old_log_std + 0.5 * (squares - 1.0)).sum(-1)


def advantages_gae(rollout: Rollout, value: Tensor, next_value: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """Generalised advantage estimation over (T, N) tensors.

    value is V(s_t). next_value is V(final_obs): the value of the state that the step led to, never that of the state
    after an automatic reset.

    - A step that goes on, or that the time limit cuts (truncated), is bootstrapped with next_value. A truncated robot
      is alive and would collect more reward.
    - A step that ends the episode for real (terminated) is not bootstrapped: the bootstrap is 0. If a step is both,
      terminated wins.
    - Every end stops the sum over later steps, because they belong to another episode.
    - A quarantined step (invalid) has advantage 0 and stops the sum too.
    """
    delta = rollout.reward + gamma * torch.where(rollout.terminated, 0.0, next_value) - value
    delta = torch.where(rollout.invalid, 0.0, delta)
    decay = gamma * gae_lambda * (~(rollout.terminated | rollout.truncated | rollout.invalid)).float()
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
    """V(s_t) and the advantages, both (T, N), in units of the scaled reward."""

    def value_of(critic_obs: Tensor) -> Tensor:
        rows = agent.critic_obs_statistics.normalize(critic_obs.flatten(0, 1))
        value = torch.cat([agent.normalized_value(part) for part in rows.split(microbatch)])
        return agent.return_statistics.denormalize(value).view(critic_obs.shape[:2])

    value, next_value = value_of(rollout.critic_obs), value_of(rollout.final_critic_obs)
    return value, advantages_gae(rollout, value, next_value, gamma, gae_lambda)


@torch.no_grad()
def explained_variance(value: Tensor, advantage: Tensor, invalid: Tensor) -> Tensor:
    """1 - Var[returns - value] / Var[returns], (), over the transitions (T, N) that were not quarantined."""
    columns = torch.stack([advantage.flatten(), (advantage + value).flatten()], 1)
    _, _, (error, spread) = weighted_moments(columns, ~invalid.flatten())
    return (1.0 - error / spread).float()


@torch.no_grad()
def make_batch(
    agent: Agent, rollout: Rollout, value: Tensor, advantage: Tensor, normalize_advantages: bool, order: Tensor
) -> Batch:
    """Normalise and shuffle the samples once. Every epoch then walks over the same contiguous minibatches.

    The return statistics are updated here and nowhere else, before they scale the targets. order: (B,) permutation."""
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
    target = agent.return_statistics.normalize(returns)
    # A quarantined transition may hold NaN, which a weight of 0 would not remove.
    advantage, target = (torch.where(valid, x, 0.0) for x in (advantage.flatten(), target))
    rows = Batch(obs, critic_obs, action, old_mean, log_prob, target, advantage, weight)
    return Batch(*(x[order] for x in rows))


def ppo_loss(agent: Agent, batch: Batch, old_log_std: Tensor, samples: int, args: Args) -> tuple[Tensor, Tensor]:
    """Loss () and stacked LossTerms of a minibatch, or of a part of it: sums over its samples, divided by the size
    `samples` of the whole minibatch. So the results of the parts add up to the means over the minibatch.

    There is no value_coef: policy and value function share no weights, their gradients are clipped separately, and Adam
    ignores the scale of a gradient that is not clipped."""
    mean, value = agent.policy_mean(batch.obs), agent.normalized_value(batch.critic_obs)
    log_ratio = gaussian_log_prob(batch.action, mean, agent.log_std) - batch.log_prob
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1.0 - args.clip_coef, 1.0 + args.clip_coef)
    policy_loss = -torch.min(batch.advantage * ratio, batch.advantage * clipped_ratio)
    value_loss = 0.5 * (value - batch.target).square()
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
    """Add up the gradients of a minibatch over parts of `microbatch` samples; return its LossTerms, stacked."""
    agent.zero_grad()
    total = 0.0
    for part in zip(*(x.split(microbatch) for x in batch), strict=True):
        loss, terms = loss_function(agent, Batch(*part), old_log_std, len(batch.weight), args)
        loss.backward()
        total = total + terms
    return total


@torch.no_grad()
def apply_gradients(agent: Agent, optimizer: torch.optim.Optimizer, max_grad_norm: float, log_std_min: float) -> None:
    """Clip the gradients, take one Adam step, then keep the exploration noise above its floor."""
    nn.utils.clip_grad_norm_([*agent.actor.parameters(), agent.log_std], max_grad_norm)
    nn.utils.clip_grad_norm_(agent.critic.parameters(), max_grad_norm)
    optimizer.step()
    agent.log_std.clamp_(min=log_std_min)


def adapted_learning_rate(
    learning_rate: Tensor, kl: Tensor, desired_kl: float, lowest: float, highest: float
) -> Tensor:
    """Divide by 1.5 if kl, the policy's change, is over twice the desired one; multiply by 1.5 if it is under half."""
    factor = torch.where(kl > 2.0 * desired_kl, 1.0 / 1.5, torch.where(kl < 0.5 * desired_kl, 1.5, 1.0))
    return (learning_rate * factor).clamp(lowest, highest)


class Functions(NamedTuple):
    """What build_functions makes."""

    policy: Callable  # (obs, noise): policy_step
    estimate: Callable  # (): values_and_advantages
    accumulate: Callable  # (old_log_std, *batch): accumulate_gradients
    take_step: Callable  # (): apply_gradients


def update(
    agent: Agent, functions: Functions, batch: Batch, learning_rate: Tensor, desired_kl: float, args: Args
) -> Tensor:
    """All gradient steps of an iteration; returns the sum of their LossTerms, stacked.

    Each minibatch measures how far the policy has moved since the rollout, adapts the learning rate, and takes a
    step."""
    old_log_std = agent.log_std.detach().clone()
    total = torch.zeros(len(LossTerms._fields), device=old_log_std.device)
    minibatches = list(zip(*(x.chunk(args.num_minibatches) for x in batch), strict=True))
    for k, rows in enumerate(minibatches * args.update_epochs):
        terms = functions.accumulate(old_log_std, *rows)
        vecsim.average_over_processes([*(p.grad for p in agent.parameters()), terms])
        policy_moved = k > 0  # before the first step the divergence is 0 and says nothing
        if args.learning_rate_schedule == "adaptive" and policy_moved:
            kl = LossTerms(*terms).kl
            learning_rate.copy_(adapted_learning_rate(learning_rate, kl, desired_kl, 1e-5, args.learning_rate_max))
        functions.take_step()
        total += terms
    return total


# ----------------------------------------------------------------------------------------------------------------------
# Compilation and CUDA graphs
# ----------------------------------------------------------------------------------------------------------------------


def build_functions(
    agent: Agent, optimizer: torch.optim.Optimizer, rollout: Rollout, sizes: Sizes, args: Args
) -> Functions:
    """Make the four functions, eager or compiled, and captured on a GPU. agent and optimizer do not change."""
    step_function, loss_function = policy_step, ppo_loss
    if args.compile:
        step_function, loss_function = (torch.compile(f, dynamic=False) for f in (policy_step, ppo_loss))

    @vecsim.one_thread()
    def policy(obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return step_function(agent, obs, noise)

    def estimate() -> tuple[Tensor, Tensor]:
        return values_and_advantages(agent, rollout, sizes.microbatch, args.gamma, args.gae_lambda)

    def accumulate(old_log_std: Tensor, *batch: Tensor) -> Tensor:
        return accumulate_gradients(agent, Batch(*batch), old_log_std, sizes.microbatch, loss_function, args)

    def take_step() -> None:
        apply_gradients(agent, optimizer, args.max_grad_norm, args.log_std_min)

    obs, action, scalars = rollout.obs[0], rollout.action[0], torch.zeros(sizes.minibatch, device=rollout.obs.device)
    features = [scalars.new_zeros(sizes.minibatch, x.shape[-1]) for x in (obs, rollout.critic_obs, action, action)]
    example = (torch.zeros_like(agent.log_std), *features, *[scalars] * 4)
    functions = policy, estimate, accumulate, take_step
    examples = (obs, torch.zeros_like(action)), (), example, ()
    return Functions(*vecsim.prepare(functions, examples, agent, [optimizer], args.cuda_graphs))


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoint
# ----------------------------------------------------------------------------------------------------------------------


def load_checkpoint(path: str) -> dict:
    """Read a checkpoint of this script onto the CPU. InputError if it is damaged or not of this script."""
    return vecsim.load_checkpoint(path, "ppo", Args)


def check_resumable(checkpoint: dict, args: Args, world_size: int) -> None:
    """InputError for flags that do not fit the checkpoint's state, or that would have no effect."""
    fixed = "env_id env_kwargs num_envs num_steps seed actor_hidden critic_hidden log_std_init normalize_observations"
    vecsim.check_resumable(checkpoint, args, f"{fixed} normalize_values", world_size)


# ----------------------------------------------------------------------------------------------------------------------
# Training
#
# What a line of metrics.jsonl holds; TensorBoard has the same names. null: no value.
#   env_steps                      environment steps of all environments and processes; the clock of every flag
#   wall_seconds, steps_per_second training time without compilation and evaluations; speed since the last line
#   episode_return, episode_length means over the whole episodes since the last line, with exploration and unscaled
#   episodes, success              number of these episodes; share that reached the time limit
#   invalid                        environments quarantined since the last line
#   dropped_contacts               contacts that found no slot, per robot and physics step
#   gymnasium_return               deterministic score in Gymnasium's environment (--eval-every)
#   policy_loss, value_loss        minus the clipped objective; half the squared error of the normalised value
#   bounds_loss                    squared excess of mean actions beyond 1.1 half ranges
#   entropy, action_std            entropy of the policy in nats; its mean standard deviation, in half ranges
#   kl, clip_fraction              KL(policy of the rollout || policy now); share of clipped probability ratios
#   learning_rate                  Adam's, after the last gradient step
#   explained_variance             1 - var(advantage) / var(return) in the last iteration; 1: returns are predicted
# Losses, kl and clip_fraction are means over all gradient steps since the last line.
# ----------------------------------------------------------------------------------------------------------------------


def train(args: Args, make_env=None, stop: vecsim.StopSignals | None = None) -> dict:
    """Train, write the run folder and evaluate; return the last log record together with the evaluation.

    make_env: see the top of this file. After a signal, training finishes the iteration and saves a checkpoint; then it
    raises KeyboardInterrupt."""
    # Check the flags before anything is allocated.
    check_ranges(args)
    run = vecsim.Run(args, "ppo", make_env, stop)
    sizes = derive_sizes(args, run.world_size, run.device)
    if run.checkpoint:
        check_resumable(run.checkpoint, args, run.world_size)
    env = run.start(
        sizes.envs,
        f"{args.num_envs:,} environments x {args.num_steps} steps = {sizes.steps_per_iteration:,} samples, "
        f"{sizes.iterations:,} times; {args.update_epochs} epochs x {args.num_minibatches} minibatches of "
        f"{sizes.minibatch:,} in parts of {sizes.microbatch:,}",
    )

    # Make the networks and the functions; then continue where the checkpoint ended.
    device, generator = run.device, run.generator
    obs_size, action_size = env.single_observation_space.shape[0], env.single_action_space.shape[0]
    privileged = env.single_critic_space is not None
    critic_obs_size = env.single_critic_space.shape[0] if privileged else None
    agent = Agent(obs_size, critic_obs_size, env.single_action_space, args).to(device)
    learning_rate = torch.tensor(args.learning_rate, device=device)
    optimizer = vecsim.make_optimizer(agent, learning_rate)
    rollout = allocate_rollout(args.num_steps, sizes.envs, obs_size, critic_obs_size, action_size, device)
    if run.checkpoint:
        agent.load_state_dict(run.checkpoint["agent"])
        vecsim.load_moments(optimizer, run.checkpoint["moments"])
        same_rate = args.learning_rate == run.checkpoint["args"]["learning_rate"]
        if args.learning_rate_schedule == "adaptive" and same_rate:  # a new value wins over the adapted one
            learning_rate.copy_(run.checkpoint["learning_rate"])
    with vecsim.first_process_first():
        functions = build_functions(agent, optimizer, rollout, sizes, args)
        env.reset()
        env.step(torch.zeros(sizes.envs, action_size, device=device))  # compiles the physics
    obs, info = env.reset(seed=run.env_seed)
    critic_obs = info["critic_obs"] if privileged else obs
    saved = run.restore()
    if saved.get("env"):
        obs, critic_obs = saved["obs"].to(device), saved["critic_obs"].to(device)

    terms = torch.zeros(len(LossTerms._fields), device=device)
    for iteration in run.start_clock(sizes.steps_per_iteration, sizes.iterations):
        # Rollout. It copies the simulator's tensors, which the next step may overwrite.
        noise = torch.randn(args.num_steps, sizes.envs, action_size, generator=generator, device=device)
        for t in range(args.num_steps):
            rollout.obs[t] = obs
            if privileged:
                rollout.critic_obs[t] = critic_obs
            with record_function("infer"):
                rollout.mean[t], rollout.action[t], env_action = functions.policy(obs, noise[t])
            with record_function("simulate"):
                obs, reward, rollout.terminated[t], rollout.truncated[t], info = env.step(env_action)
            rollout.reward[t] = reward * args.reward_scale
            rollout.final_critic_obs[t] = info["final_critic_obs"] if privileged else info["final_obs"]
            rollout.invalid[t] = info["invalid"]
            critic_obs = info["critic_obs"] if privileged else obs

        # Targets: values and advantages, with the observation statistics of the rollout.
        with record_function("targets"):
            value, advantage = functions.estimate()
            order = torch.randperm(sizes.batch, generator=generator, device=device)
            batch = make_batch(agent, rollout, value, advantage, args.normalize_advantages, order)

        # Update. The observation statistics change only after it, so that old and new policy see equal inputs.
        progress = iteration / sizes.iterations
        desired_kl = args.desired_kl[0] + progress * (args.desired_kl[1] - args.desired_kl[0])
        if args.learning_rate_schedule == "linear":
            learning_rate.fill_(args.learning_rate * (1.0 - progress))
        with record_function("update"):
            terms += update(agent, functions, batch, learning_rate, desired_kl, args)
        agent.obs_statistics.update(rollout.obs.flatten(0, 1), ~rollout.invalid.flatten())
        if privileged:
            agent.critic_obs_statistics.update(rollout.critic_obs.flatten(0, 1), ~rollout.invalid.flatten())
        if run.profiler:
            run.profiler.step()

        # Log, evaluate, save: each when a multiple of its interval was crossed.
        if not run.due(iteration):
            continue
        iterations = (run.env_steps - run.logged_step) // sizes.steps_per_iteration  # since the last record
        means = LossTerms(*(terms / (iterations * args.update_epochs * args.num_minibatches)))._asdict()
        means |= dict(learning_rate=learning_rate, action_std=agent.log_std.exp().mean())
        means |= dict(explained_variance=explained_variance(value, advantage, rollout.invalid))  # of this iteration
        run.write_record(agent, means, needed=LossTerms._fields)
        if run.save_now:
            state = dict(agent=agent.state_dict(), moments=list(optimizer.state.values()), learning_rate=learning_rate)
            run.save(dict(obs=obs, critic_obs=critic_obs), **state)
        terms.zero_()
        run.go_on()

    result = run.finish(agent, "PPO")
    env.close()
    return result


# ----------------------------------------------------------------------------------------------------------------------
# Policy: load, export, play
# ----------------------------------------------------------------------------------------------------------------------


def load_agent(checkpoint: dict) -> Agent:
    """The agent of a checkpoint, on the CPU. The saved tensors tell its sizes."""
    saved = checkpoint["agent"]
    obs_size, critic_obs_size = (len(saved[f"{name}_statistics.mean"]) for name in ("obs", "critic_obs"))
    action_space = gymnasium.spaces.Box(-1.0, 1.0, saved["log_std"].shape)  # the saved range replaces this one
    agent = Agent(obs_size, critic_obs_size, action_space, Args(**checkpoint["args"]))
    agent.load_state_dict(saved)
    return agent


def load_policy(checkpoint: dict):
    """The deterministic policy: act(obs (N, obs), started (N,) bool) -> action (N, actions), on the CPU."""
    return load_agent(checkpoint).act


def export(path: str, checkpoint: dict) -> None:
    """Write the deterministic policy to an ONNX file, in float32, because ONNX Runtime needs it on a CPU."""
    agent = load_agent(checkpoint)
    agent.bf16, agent.forward = False, agent.act
    inputs = dict(obs=torch.zeros(2, len(agent.obs_statistics.mean)))
    vecsim.write_file(Path(path), vecsim.to_onnx(agent, inputs, ["action"], checkpoint, script=Path(__file__).name))


def play(args: Args, make_env=None) -> dict | None:
    """Export, score and film the policy of a checkpoint, each on request; return the score."""
    check_ranges(args)
    checkpoint = load_checkpoint(args.play)
    return vecsim.play_checkpoint(args, checkpoint, load_agent(checkpoint), export, make_env)


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------


def main() -> int:
    return vecsim.run_command(parse_args, train, play)


if __name__ == "__main__":
    sys.exit(main())
