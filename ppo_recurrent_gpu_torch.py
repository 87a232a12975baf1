"""PPO for robots that cannot see everything: policy and value function have a memory, a GRU, an LSTM or a minGRU.

    python ppo_recurrent_gpu_torch.py --env-id HalfCheetah-v5 --env-kwargs hidden_observations qvel
    python ppo_recurrent_gpu_torch.py --env-id HalfCheetah-v5 --memory mingru --memory-width 64 --memory-layers 2
    python ppo_recurrent_gpu_torch.py --env-id Quadruped-Flat --env-kwargs velocity_in_observation False randomize True
    python ppo_recurrent_gpu_torch.py --env-id Ant-v5 --env-kwargs delay_observations 2 observation_noise 0.05
    python ppo_recurrent_gpu_torch.py --play runs/NAME/checkpoint.pt --export policy.onnx

It reads as ppo_gpu_torch.py does, section by section, so that a diff shows what memory changes:

- The memory is set to 0 where an episode begins, inside a rollout too, and after a quarantined step.
- V(final_obs) of an episode that the time limit cuts has the memory of that episode, not of the next one.
- Gradients flow through sequences, which begin with the memory that the policy had there.
- A minibatch is made of whole sequences of whole environments.
- A value function with privileged observations has no memory.

The script needs `vecsim_torch.py` beside it and no other file of this project. Copy the two files and they are yours.
Your own robot in vecsim: --env-id my_task.py:MyTask. Your own simulator: call
`train(Args(env_id="my-robot"), make_env=make_env)`; the docstring of `vecsim_torch.CompletedEnv` has the details.

Sources: those of ppo_gpu_torch.py; GRU, Cho et al. 2014 (arXiv:1406.1078), in the form of cuDNN; LSTM, Gers et al.
2000; minGRU, Feng et al. 2024 (arXiv:2410.01201), section 3.1; gate biases, Tallec and Ollivier 2018
(arXiv:1804.11188).
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
    """run the networks in bfloat16; the physics and the weights stay in float32"""

    # the batch
    num_steps: int = 16
    """steps of each environment in an iteration (>= 1)"""
    update_epochs: int = 4
    """passes over the environments of an iteration, all in the same random order (>= 1)"""
    num_minibatches: int = 8
    """gradient steps in a pass (>= 1; must divide num_envs of each process)"""
    sequence_length: int | None = None
    """steps through which a gradient flows back (>= 1; must divide num_steps; default: num_steps)"""

    # the networks
    memory: Literal["gru", "lstm", "mingru"] = "gru"
    """kind of the memory; mingru computes all steps of a sequence at once"""
    memory_width: int = 128
    """size of each layer of the memory (>= 1)"""
    memory_layers: int = 1
    """layers of the memory (>= 1)"""
    memory_position: Literal["before", "after"] = "before"
    """before or after the hidden layers; what follows sees the memory and its input"""
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

    def of_task(given: Args) -> Args:
        return task_defaults(given.env_id, given.device)

    return vecsim.parse_args(argv, "ppo_recurrent", Args(), of_task, __doc__)


# ----------------------------------------------------------------------------------------------------------------------
# Sizes and checks
# ----------------------------------------------------------------------------------------------------------------------


def check_ranges(args: Args) -> None:
    """InputError for a flag that is out of its range."""
    rules = (  # flags, whether a value is legal, and the rule in words
        ("num_steps update_epochs num_minibatches memory_width memory_layers", lambda x: x >= 1, ">= 1"),
        ("sequence_length", lambda x: x is None or x >= 1, ">= 1"),
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
    minibatch: int  # environments of this process in a gradient step
    sequence: int  # steps of a sequence
    steps_per_iteration: int  # environment steps of all processes
    iterations: int


def derive_sizes(args: Args, world_size: int) -> Sizes:
    """Compute the sizes. InputError if environments or steps do not split evenly; it names a near one."""
    if args.num_envs % world_size:
        nearest = math.ceil(args.num_envs / world_size) * world_size
        raise InputError(f"num_envs = {args.num_envs:,} does not split over {world_size} processes; use {nearest}")
    envs, sequence = args.num_envs // world_size, args.sequence_length or args.num_steps
    splits = (
        (envs, args.num_minibatches, f"num_envs = {envs:,} per process does not split into %d minibatches"),
        (args.num_steps, sequence, f"num_steps = {args.num_steps} does not split into sequences of %d steps"),
    )
    for whole, part, rule in splits:
        if whole % part:
            nearest = next(n for n in range(min(whole, part), 0, -1) if whole % n == 0)
            raise InputError(f"{rule % part}; use {nearest}")
    steps_per_iteration = args.num_envs * args.num_steps
    iterations = math.ceil(args.total_timesteps / steps_per_iteration)
    return Sizes(envs, envs // args.num_minibatches, sequence, steps_per_iteration, iterations)


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


def parallel_scan(decay: Tensor, value: Tensor) -> Tensor:
    """h_t = decay_t h_(t-1) + value_t from h = 0, for all steps at once: (T, B, k) tensors.

    Each round joins every step with what came before it, twice as far back as the last round (Hillis and Steele 1986):
    log2(T) rounds. Nothing is divided, so a decay may be 0 where an episode begins."""
    steps, reach = len(value.unbind()), 1  # value.shape[0] is a tensor for the ONNX exporter
    while reach < steps:
        value = torch.cat([value[:reach], value[reach:] + decay[reach:] * value[:-reach]])
        decay = torch.cat([decay[:reach], decay[reach:] * decay[:-reach]])
        reach *= 2
    return value


def gru_step(from_input: Tensor, state: Tensor, from_state: nn.Linear) -> Tensor:
    """The state (B, k) after a step. from_input: (B, 3k), the input's part of keep gate, reset gate and candidate."""
    inputs, states = from_input.chunk(3, -1), from_state(state).float().chunk(3, -1)
    keep, reset = (torch.sigmoid(inputs[i] + states[i]) for i in (0, 1))
    return keep * state + (1.0 - keep) * torch.tanh(inputs[2] + reset * states[2])


def lstm_step(from_input: Tensor, state: Tensor, from_state: nn.Linear) -> Tensor:
    """The state (B, 2k) after a step: output and cell. from_input: (B, 4k), the input's part of gates and candidate."""
    output, cell = state.chunk(2, -1)
    keep, enter, leave, candidate = (from_input + from_state(output).float()).chunk(4, -1)
    cell = torch.sigmoid(keep) * cell + torch.sigmoid(enter) * torch.tanh(candidate)
    return torch.cat([torch.sigmoid(leave) * torch.tanh(cell), cell], -1)


class Memory(nn.Module):
    """Recurrent layers, one upon the other. They keep nothing between calls: the state comes in and goes out.

    The gate of a minGRU sees the input alone: h_t = z_t h_(t-1) + (1 - z_t) (W x_t + b), z_t = sigmoid(V x_t + c)."""

    def __init__(self, size: int, args: Args):
        super().__init__()
        self.kind, self.width, self.layers = args.memory, args.memory_width, args.memory_layers
        gates = dict(gru=3, lstm=4, mingru=2)[self.kind] * self.width
        self.state_size = self.layers * self.width * (2 if self.kind == "lstm" else 1)
        self.from_input = nn.ModuleList(nn.Linear(n, gates) for n in [size, *[self.width] * (self.layers - 1)])
        recurrent = 0 if self.kind == "mingru" else self.layers
        self.from_state = nn.ModuleList(nn.Linear(self.width, gates) for _ in range(recurrent))
        for linear in self.from_state:
            nn.init.orthogonal_(linear.weight)
            nn.init.zeros_(linear.bias)
        horizon = args.sequence_length or args.num_steps  # units begin with memories of 2 to horizon + 1 steps
        for linear in self.from_input:
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)  # so the memory is as large as what it sees
            nn.init.zeros_(linear.bias)
            linear.bias.data[: self.width] = torch.linspace(1.0, horizon, self.width).log()  # of the keep gate

    def forward(self, x: Tensor, state: Tensor, started: Tensor) -> tuple[Tensor, Tensor]:
        """The outputs (T, B, width) and the states after each step (T, B, state_size) of T steps in order.

        x: (T, B, size). state: (B, state_size), before the first step. started: (T, B) bool, True where an episode
        begins: there the state is set to 0 first."""
        states, begins = [], started[..., None]
        for layer, before in enumerate(state.chunk(self.layers, -1)):
            from_input, after = self.from_input[layer](x).float(), []
            if self.kind == "mingru":
                keep, candidate = from_input.chunk(2, -1)
                keep = torch.sigmoid(keep)
                value, keep = (1.0 - keep) * candidate, keep.masked_fill(begins, 0.0)
                after = parallel_scan(keep, torch.cat([value[:1] + keep[:1] * before, value[1:]]))
            else:
                step = gru_step if self.kind == "gru" else lstm_step
                for inputs, begin in zip(from_input.unbind(), begins.unbind(), strict=True):
                    before = step(inputs, before.masked_fill(begin, 0.0), self.from_state[layer])
                    after.append(before)
                after = torch.stack(after)
            x = after[..., : self.width]
            states.append(after)
        return x, torch.cat(states, -1)


class Network(nn.Module):
    """An MLP with a memory before or after its hidden layers, or none. What follows sees the memory's input too."""

    def __init__(self, size: int, hidden: tuple[int, ...], outputs: int, last_gain: float, remembers: bool, args: Args):
        super().__init__()
        early = hidden if args.memory_position == "after" else ()
        self.early = nn.Sequential(mlp([size, *early], math.sqrt(2.0)), nn.ELU()) if early else nn.Identity()
        features = [size, *early][-1]
        self.memory = Memory(features, args) if remembers else None
        self.state_size = self.memory.state_size if remembers else 0
        features += args.memory_width if remembers else 0
        self.late = mlp([features, *hidden[len(early) :], outputs], last_gain)

    def forward(self, x: Tensor, state: Tensor, started: Tensor) -> tuple[Tensor, Tensor]:
        """The outputs (T, B, outputs) and the states after each step; the inputs are those of Memory.forward."""
        x = self.early(x)
        if self.memory is None:
            return self.late(x).float(), state.expand(len(x), -1, -1)  # states without columns
        remembered, states = self.memory(x, state, started)
        return self.late(torch.cat([x, remembered], -1)).float(), states


class Agent(nn.Module):
    """Gaussian policy and value function, two networks.

    Inside the agent an action is in half ranges: 0 is the centre of the action range, -1 and 1 are its ends.
    The agent keeps no memory: the states of both networks are inputs and outputs, like any other tensor of a rollout.
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
        self.actor = Network(obs_size, args.actor_hidden, len(low), 0.01, True, args)
        remembers = critic_obs_size is None
        self.critic = Network(critic_obs_size or obs_size, args.critic_hidden, 1, 1.0, remembers, args)
        self.log_std = nn.Parameter(torch.full((len(low),), args.log_std_init))  # independent of the state
        self.bf16 = args.bf16

    def autocast(self, x: Tensor) -> torch.autocast:
        # No cache of weights in bfloat16: a captured graph would use the cached ones after the weights have changed.
        return torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False)

    def policy_mean(self, normalized_obs: Tensor, memory: Tensor, started: Tensor) -> tuple[Tensor, Tensor]:
        """Means (T, B, actions), half ranges, and the memory after each step; see Memory.forward."""
        with self.autocast(normalized_obs):
            return self.actor(normalized_obs, memory, started)

    def normalized_value(self, normalized_critic_obs: Tensor, memory: Tensor, started: Tensor) -> tuple[Tensor, Tensor]:
        """Values (T, B), and the memory of the value function after each step."""
        with self.autocast(normalized_critic_obs):
            value, memory = self.critic(normalized_critic_obs, memory, started)
        return value.squeeze(-1), memory

    def empty_memory(self, envs: int) -> Tensor:
        return self.log_std.new_zeros(envs, self.actor.state_size)

    def to_env(self, action: Tensor) -> Tensor:
        """Half ranges to the environment's units."""
        return self.action_centre + self.action_half_range * action

    @torch.no_grad()
    def act(self, obs: Tensor, memory: Tensor, started: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The deterministic action (B, actions) in the environment's units, and the memory after it.

        started: (B,) bool, True where an episode begins; None: nowhere, because the caller cleared the memory."""
        started = torch.zeros_like(obs[:, 0], dtype=torch.bool) if started is None else started
        mean, states = self.policy_mean(self.obs_statistics.normalize(obs)[None], memory, started[None])
        return self.to_env(mean[0]), states[0]


# ----------------------------------------------------------------------------------------------------------------------
# Algorithm: pure functions
# ----------------------------------------------------------------------------------------------------------------------


class Rollout(NamedTuple):
    """The transitions of one iteration on the device: T = num_steps, N = environments of this process."""

    obs: Tensor  # (T, N, obs)
    started: Tensor  # (T, N) bool: the observation begins an episode
    memory: Tensor  # (sequences of an environment, N, memory): of the policy, before the first step of each sequence
    critic_memory: Tensor  # (N, critic memory): of the value function, before the first step
    critic_obs: Tensor  # (T, N, critic obs); the tensor obs itself if the task has no privileged observation
    final_critic_obs: Tensor  # (T, N, critic obs): what the step led to, before any automatic reset
    action: Tensor  # (T, N, actions), half ranges
    mean: Tensor  # (T, N, actions), half ranges: the mean of the policy that acted
    reward: Tensor  # (T, N), scaled
    terminated: Tensor  # (T, N) bool
    truncated: Tensor  # (T, N) bool
    invalid: Tensor  # (T, N) bool: the simulation diverged; such a quarantined step is ignored by the learner


def allocate_rollout(agent: Agent, sizes: Sizes, steps: int) -> Rollout:
    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=agent.log_std.device)

    statistics = agent.obs_statistics, agent.critic_obs_statistics
    seen, privileged = (zeros(steps, sizes.envs, len(x.mean)) for x in statistics)
    privileged = seen if statistics[0] is statistics[1] else privileged
    memory = zeros(steps // sizes.sequence, sizes.envs, agent.actor.state_size)
    memories = memory, zeros(sizes.envs, agent.critic.state_size)
    action, mean = (zeros(steps, sizes.envs, len(agent.log_std)) for _ in range(2))
    reward, (started, *flags) = zeros(steps, sizes.envs), (zeros(steps, sizes.envs, dtype=torch.bool) for _ in range(4))
    return Rollout(seen, started, *memories, privileged, torch.zeros_like(privileged), action, mean, reward, *flags)


class Batch(NamedTuple):
    """The samples of one gradient step, with the outputs of the policy and the value function before the update.

    They are B sequences of L steps. The sequences of an environment are in the same batch."""

    memory: Tensor  # (1, B, memory), before the first step
    critic_memory: Tensor  # (1, B, critic memory), before the first step
    obs: Tensor  # (L, B, obs), normalised
    started: Tensor  # (L, B) bool
    critic_obs: Tensor  # (L, B, critic obs), normalised
    action: Tensor  # (L, B, actions), half ranges
    mean: Tensor  # (L, B, actions), old policy
    log_prob: Tensor  # (L, B), old policy
    target: Tensor  # (L, B), the return that the value function learns, normalised
    advantage: Tensor  # (L, B)
    weight: Tensor  # (L, B): 0 for a quarantined transition, equal for all others; the mean over the iteration is 1


class LossTerms(NamedTuple):
    """Means over a minibatch, in the order in which ppo_loss stacks them."""

    policy_loss: Tensor
    value_loss: Tensor
    bounds_loss: Tensor
    entropy: Tensor
    kl: Tensor
    clip_fraction: Tensor


@torch.no_grad()
def policy_step(agent: Agent, obs: Tensor, memory: Tensor, started: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
    """Mean and sampled action (N, actions) in half ranges, that action in the environment's units, the next memory."""
    mean, states = agent.policy_mean(agent.obs_statistics.normalize(obs)[None], memory, started[None])
    action = mean[0] + agent.log_std.exp() * noise
    return mean[0], action, agent.to_env(action), states[0]


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
    agent: Agent, rollout: Rollout, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor, Tensor]:
    """V(s_t) and the advantages, (T, N) in units of the scaled reward; the value function's memory after each step.

    V(final_obs) of step t is one more step of the value function, from its memory after s_t. So it has the memory of
    the episode that the step belongs to, even where the step ended it."""
    normalize, denormalize = agent.critic_obs_statistics.normalize, agent.return_statistics.denormalize
    value, memory = agent.normalized_value(normalize(rollout.critic_obs), rollout.critic_memory, rollout.started)
    final_obs, nowhere = rollout.final_critic_obs.flatten(0, 1)[None], torch.zeros_like(rollout.started).flatten()[None]
    next_value, _ = agent.normalized_value(normalize(final_obs), memory.flatten(0, 1), nowhere)
    value, next_value = denormalize(value), denormalize(next_value).view_as(value)
    return value, advantages_gae(rollout, value, next_value, gamma, gae_lambda), memory


@torch.no_grad()
def explained_variance(value: Tensor, advantage: Tensor, invalid: Tensor) -> Tensor:
    """1 - Var[returns - value] / Var[returns], (), over the transitions (T, N) that were not quarantined."""
    columns = torch.stack([advantage.flatten(), (advantage + value).flatten()], 1)
    _, _, (error, spread) = weighted_moments(columns, ~invalid.flatten())
    return (1.0 - error / spread).float()


def to_sequences(x: Tensor, envs: Tensor, length: int) -> Tensor:
    """x (T, N, ...) of some environments as sequences (length, B, ...); those of an environment are side by side."""
    return x[:, envs].unflatten(0, (-1, length)).movedim(0, 2).flatten(1, 2)


@torch.no_grad()
def make_batches(
    agent: Agent, rollout: Rollout, estimate: tuple[Tensor, ...], envs: Tensor, sizes: Sizes, args: Args
) -> list[Batch]:
    """Normalise the samples and split the environments into minibatches once, for all epochs.

    The return statistics are updated here and nowhere else, before they scale the targets. estimate: the result of
    values_and_advantages. envs: (N,) permutation."""
    (value, advantage, critic_memory), valid = estimate, ~rollout.invalid
    returns = advantage + value
    agent.return_statistics.update(returns.flatten()[:, None], valid.flatten())
    count, mean, variance = weighted_moments(advantage.flatten()[:, None], valid.flatten())
    if args.normalize_advantages:
        advantage = (advantage - mean.float()) / (variance.sqrt().float() + 1e-8)
    weight = valid * (sum_over_processes(torch.full_like(count, valid.numel())) / count.clamp(min=1.0)).float()
    obs = agent.obs_statistics.normalize(rollout.obs)
    critic_obs = obs if rollout.critic_obs is rollout.obs else agent.critic_obs_statistics.normalize(rollout.critic_obs)
    log_prob = gaussian_log_prob(rollout.action, rollout.mean, agent.log_std)
    target = agent.return_statistics.normalize(returns)
    # A quarantined transition may hold NaN, which a weight of 0 would not remove.
    advantage, target = (torch.where(valid, x, 0.0) for x in (advantage, target))
    critic_memory = torch.cat([rollout.critic_memory[None], critic_memory[:-1]])[:: sizes.sequence]
    steps = obs, rollout.started, critic_obs, rollout.action, rollout.mean, log_prob, target, advantage, weight
    return [
        Batch(
            *(to_sequences(x, part, 1) for x in (rollout.memory, critic_memory)),  # one memory for each sequence
            *(to_sequences(x, part, sizes.sequence) for x in steps),
        )
        for part in envs.split(sizes.minibatch)
    ]


def ppo_loss(agent: Agent, batch: Batch, old_log_std: Tensor, args: Args) -> tuple[Tensor, Tensor]:
    """Loss () and stacked LossTerms of a minibatch, means over its samples.

    There is no value_coef: policy and value function share no weights, their gradients are clipped separately, and Adam
    ignores the scale of a gradient that is not clipped."""
    mean, _ = agent.policy_mean(batch.obs, batch.memory[0], batch.started)
    value, _ = agent.normalized_value(batch.critic_obs, batch.critic_memory[0], batch.started)
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
        terms = (torch.stack(terms) * batch.weight).mean((1, 2))
    return (loss * batch.weight).mean(), terms


def compute_gradients(agent: Agent, batch: Batch, old_log_std: Tensor, loss_function, args: Args) -> Tensor:
    """The gradients of a minibatch, in the parameters; returns its LossTerms, stacked."""
    agent.zero_grad()
    loss, terms = loss_function(agent, batch, old_log_std, args)
    loss.backward()
    return terms


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

    policy: Callable  # (obs, memory, started, noise): policy_step
    estimate: Callable  # (): values_and_advantages
    differentiate: Callable  # (old_log_std, *batch): compute_gradients
    take_step: Callable  # (): apply_gradients


def update(
    agent: Agent, functions: Functions, batches: list[Batch], learning_rate: Tensor, desired_kl: float, args: Args
) -> Tensor:
    """All gradient steps of an iteration; returns the sum of their LossTerms, stacked.

    Each minibatch measures how far the policy has moved since the rollout, adapts the learning rate, and takes a
    step."""
    old_log_std = agent.log_std.detach().clone()
    total = torch.zeros(len(LossTerms._fields), device=old_log_std.device)
    for k, batch in enumerate(batches * args.update_epochs):
        terms = functions.differentiate(old_log_std, *batch)
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
    def policy(*inputs: Tensor) -> tuple[Tensor, ...]:
        return step_function(agent, *inputs)

    def estimate() -> tuple[Tensor, Tensor, Tensor]:
        return values_and_advantages(agent, rollout, args.gamma, args.gae_lambda)

    def differentiate(old_log_std: Tensor, *batch: Tensor) -> Tensor:
        return compute_gradients(agent, Batch(*batch), old_log_std, loss_function, args)

    def take_step() -> None:
        apply_gradients(agent, optimizer, args.max_grad_norm, args.log_std_min)

    noise, scalar = torch.zeros_like(rollout.action[0]), rollout.reward
    step_example = rollout.obs[0], rollout.memory[0], rollout.started[0], noise
    memories = rollout.memory, rollout.critic_memory.expand(len(rollout.memory), -1, -1)
    steps = rollout.obs, rollout.started, rollout.critic_obs, rollout.action, rollout.mean, *[scalar] * 4
    shapes = [(x, 1) for x in memories] + [(x, sizes.sequence) for x in steps]
    some = torch.arange(sizes.minibatch, device=noise.device)
    example = (torch.zeros_like(agent.log_std), *(to_sequences(x, some, length) for x, length in shapes))
    functions, examples = (policy, estimate, differentiate, take_step), (step_example, (), example, ())
    return Functions(*vecsim.prepare(functions, examples, agent, [optimizer], args.cuda_graphs))


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoint
# ----------------------------------------------------------------------------------------------------------------------


def load_checkpoint(path: str) -> dict:
    """Read a checkpoint of this script onto the CPU. InputError if it is damaged or not of this script."""
    return vecsim.load_checkpoint(path, "ppo_recurrent", Args)


def check_resumable(checkpoint: dict, args: Args, world_size: int) -> None:
    """InputError for flags that do not fit the checkpoint's state, or that would have no effect."""
    fixed = "env_id env_kwargs num_envs num_steps seed actor_hidden critic_hidden log_std_init normalize_observations"
    fixed += " normalize_values memory memory_width memory_layers memory_position"
    vecsim.check_resumable(checkpoint, args, fixed, world_size)


# ----------------------------------------------------------------------------------------------------------------------
# Training
#
# A line of metrics.jsonl has the names that section Training of ppo_gpu_torch.py defines.
# ----------------------------------------------------------------------------------------------------------------------


def train(args: Args, make_env=None, stop: vecsim.StopSignals | None = None) -> dict:
    """Train, write the run folder and evaluate; return the last log record together with the evaluation.

    make_env: see the top of this file. After a signal, training finishes the iteration and saves a checkpoint; then it
    raises KeyboardInterrupt."""
    # Check the flags before anything is allocated.
    check_ranges(args)
    run = vecsim.Run(args, "ppo_recurrent", make_env, stop)
    sizes = derive_sizes(args, run.world_size)
    if run.checkpoint:
        check_resumable(run.checkpoint, args, run.world_size)
    env = run.start(
        sizes.envs,
        f"{args.num_envs:,} environments x {args.num_steps} steps = {sizes.steps_per_iteration:,} samples, "
        f"{sizes.iterations:,} times; {args.update_epochs} epochs x {args.num_minibatches} minibatches of "
        f"{sizes.minibatch:,} environments, in sequences of {sizes.sequence} steps",
    )

    # Make the networks and the functions; then continue where the checkpoint ended.
    device, generator = run.device, run.generator
    obs_size, action_size = env.single_observation_space.shape[0], env.single_action_space.shape[0]
    privileged = env.single_critic_space is not None
    critic_obs_size = env.single_critic_space.shape[0] if privileged else None
    agent = Agent(obs_size, critic_obs_size, env.single_action_space, args).to(device)
    learning_rate = torch.tensor(args.learning_rate, device=device)
    optimizer = vecsim.make_optimizer(agent, learning_rate)
    rollout = allocate_rollout(agent, sizes, args.num_steps)
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
    memory, started = agent.empty_memory(sizes.envs), torch.ones(sizes.envs, dtype=torch.bool, device=device)
    saved = run.restore()
    if saved.get("env"):
        obs, critic_obs, memory, started, critic_memory = (x.to(device) for x in saved["moment"])
        rollout.critic_memory.copy_(critic_memory)

    terms = torch.zeros(len(LossTerms._fields), device=device)
    for iteration in run.start_clock(sizes.steps_per_iteration, sizes.iterations):
        # Rollout. It copies the simulator's tensors, which the next step may overwrite.
        noise = torch.randn(args.num_steps, sizes.envs, action_size, generator=generator, device=device)
        for t in range(args.num_steps):
            rollout.obs[t], rollout.started[t] = obs, started
            if t % sizes.sequence == 0:
                rollout.memory[t // sizes.sequence] = memory
            if privileged:
                rollout.critic_obs[t] = critic_obs
            with record_function("infer"):
                rollout.mean[t], rollout.action[t], env_action, memory = functions.policy(
                    obs, memory, started, noise[t]
                )
            with record_function("simulate"):
                obs, reward, rollout.terminated[t], rollout.truncated[t], info = env.step(env_action)
            rollout.reward[t] = reward * args.reward_scale
            rollout.final_critic_obs[t] = info["final_critic_obs"] if privileged else info["final_obs"]
            rollout.invalid[t] = info["invalid"]
            started = rollout.terminated[t] | rollout.truncated[t] | rollout.invalid[t]
            critic_obs = info["critic_obs"] if privileged else obs

        # Targets: values and advantages, with the observation statistics of the rollout.
        with record_function("targets"):
            value, advantage, critic_memory = functions.estimate()
            order = torch.randperm(sizes.envs, generator=generator, device=device)
            batches = make_batches(agent, rollout, (value, advantage, critic_memory), order, sizes, args)
            rollout.critic_memory.copy_(critic_memory[-1])  # before the first step of the next rollout

        # Update. The observation statistics change only after it, so that old and new policy see equal inputs.
        progress = iteration / sizes.iterations
        desired_kl = args.desired_kl[0] + progress * (args.desired_kl[1] - args.desired_kl[0])
        if args.learning_rate_schedule == "linear":
            learning_rate.fill_(args.learning_rate * (1.0 - progress))
        with record_function("update"):
            terms += update(agent, functions, batches, learning_rate, desired_kl, args)
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
            moment = [obs, critic_obs, memory, started, rollout.critic_memory]
            state = dict(agent=agent.state_dict(), moments=list(optimizer.state.values()), learning_rate=learning_rate)
            run.save(dict(moment=moment), **state)
        terms.zero_()
        run.go_on()

    result = run.finish(agent, f"PPO with {args.memory}")
    env.close()
    return result


# ----------------------------------------------------------------------------------------------------------------------
# Policy: load, export, play
# ----------------------------------------------------------------------------------------------------------------------


def load_agent(checkpoint: dict) -> Agent:
    """The agent of a checkpoint, on the CPU. The saved tensors tell its sizes."""
    saved = checkpoint["agent"]
    obs_size, critic_obs_size = (len(saved[f"{name}_statistics.mean"]) for name in ("obs", "critic_obs"))
    if "critic.memory.from_input.0.weight" in saved:
        critic_obs_size = None  # not privileged
    action_space = gymnasium.spaces.Box(-1.0, 1.0, saved["log_std"].shape)  # the saved range replaces this one
    agent = Agent(obs_size, critic_obs_size, action_space, Args(**checkpoint["args"]))
    agent.load_state_dict(saved)
    return agent


def load_policy(checkpoint: dict) -> vecsim.Act:
    """The deterministic policy: act(obs (N, obs), started (N,) bool) -> action (N, actions), on the CPU."""
    return vecsim.policy_of(load_agent(checkpoint))


def export(path: str, checkpoint: dict) -> None:
    """Write the deterministic policy to an ONNX file, in float32, because ONNX Runtime needs it on a CPU.

    Its inputs are obs and memory_in, its outputs action and memory_out."""
    agent = load_agent(checkpoint)
    agent.bf16, agent.forward = False, agent.act
    inputs = dict(obs=torch.zeros(2, len(agent.obs_statistics.mean)), memory_in=agent.empty_memory(2))
    facts = dict(memory="memory_in is zero where an episode begins, then the memory_out of the step before")
    file = vecsim.to_onnx(agent, inputs, ["action", "memory_out"], checkpoint, script=Path(__file__).name, **facts)
    vecsim.write_file(Path(path), file)


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
