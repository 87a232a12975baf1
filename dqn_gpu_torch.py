"""Q-learning for thousands of robots on one device: DQN with its replay on the device, or PQN, which needs none.

    python dqn_gpu_torch.py --env-id InvertedPendulum-v5                    # half a minute
    python dqn_gpu_torch.py --env-id HalfCheetah-v5                         # on a GPU if there is one, else on the CPU
    python dqn_gpu_torch.py --env-id HalfCheetah-v5 --algorithm pqn
    python dqn_gpu_torch.py --env-id HalfCheetah-v5 --algorithm pqn --num-envs 4096 --bf16
    python dqn_gpu_torch.py --resume runs/NAME/checkpoint.pt --total-timesteps 4000000
    python dqn_gpu_torch.py --play runs/NAME/checkpoint.pt --capture-video
    python dqn_gpu_torch.py --play runs/NAME/checkpoint.pt --export policy.onnx
    torchrun --nproc-per-node=2 dqn_gpu_torch.py --env-id HalfCheetah-v5    # gradients are averaged over the processes

Actions: each actuator takes one of --bins values, evenly spaced over its range; two bins are its ends ("bang-bang").
The network has one head per actuator, and Q(s, a) is the mean over the heads of the values of their bins. So the best
action is each head's best bin, and the outputs grow linearly with the actuators. With one actuator this is plain DQN.

    --algorithm dqn   replay, target network, double Q, n-step returns
    --algorithm pqn   neither replay nor target network: many environments make the batch, and layer norm keeps the
                      bootstrapped values stable; targets are Q(lambda) over the rollout

Both explore epsilon-greedily; each environment has its own epsilon.

Scores on one AMD EPYC core within about two and a half minutes, medians of 3 seeds in Gymnasium's own environments:
InvertedPendulum-v5 1,000 with both; HalfCheetah-v5 5,644 with DQN and 4,952 with PQN; Hopper-v5 2,652 and 2,418;
Walker2d-v5 1,809 and 3,882. results/README.md has PPO and SAC beside them.

The script needs `vecsim_torch.py` beside it and no other file of this project. Copy the two files and they are yours.

Your own environment: call `train(Args(env_id="my-robot"), make_env=make_env)`. The function
`make_env(env_id, num_envs, device, seed, **env_kwargs)` returns a vector environment of tensors on that device.
It needs reset, step, two spaces and info["final_obs"]; `vecsim_torch.CompletedEnv` says the details.

Sources: DQN, Mnih et al. 2015 (Nature 518); double Q, van Hasselt et al. 2016 (arXiv:1509.06461); decoupled heads and
bang-bang actions, Seyde et al. 2023 (arXiv:2210.12566); PQN, Gallici et al. 2024 (arXiv:2407.04811), here with Adam in
place of RAdam; a rate of exploration for each environment, Ape-X, Horgan et al. 2018 (arXiv:1803.00933), section 4.1;
time limits, Pardo et al. 2018 (arXiv:1712.00378); running moments, Chan et al. 1983.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import record_function

import vecsim_torch as vecsim
from vecsim_torch import InputError, RunningStatistics

# ----------------------------------------------------------------------------------------------------------------------
# Arguments
# ----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Args(vecsim.RunFlags):
    """Flags of a run, on top of those that all trainers have (`vecsim_torch.RunFlags`).

    Steps are environment steps, summed over all environments, except in num_steps and n_step. These defaults are for
    --algorithm dqn and a task without a row in TASKS."""

    env_id: str = "HalfCheetah-v5"
    """task: a name that vecsim_torch.make knows, or your own as my_task.py:MyTask"""
    algorithm: Literal["dqn", "pqn"] = "dqn"
    """dqn: replay and target network; pqn: neither, Q(lambda) over the rollout"""
    num_envs: int = 128
    """environments that are stepped in parallel, over all processes (>= 1)"""
    total_timesteps: int = 2_000_000
    """environment steps of the whole run (> learning_starts; rounded up to whole iterations)"""
    bf16: bool = False
    """run the networks in bfloat16, the rest in float32; a CPU without AVX512_BF16 gets slower"""
    checkpoint_replay: bool = False
    """dqn: save the replay, so that a run resumes bit for bit; otherwise a resumed run starts with an empty replay"""
    normalize_rewards: bool = True
    """divide rewards by the running standard deviation of the discounted return"""

    # the replay and the batch
    num_steps: int = 1
    """steps of each environment in an iteration (>= 1); pqn: they are its rollout"""
    replay_capacity: int = 1_000_000
    """dqn: transitions kept, over all processes (>= learning_starts); the start of a run prints their memory"""
    learning_starts: int = 5_000
    """steps with uniformly random actions before the first update (>= 0); dqn refills an empty replay to as many"""
    batch_size: int = 256
    """transitions of one gradient step, over all processes (>= 1); pqn: must divide num_envs x num_steps"""
    updates: int = 8
    """dqn: gradient steps in an iteration (>= 1)"""
    update_epochs: int = 4
    """pqn: passes over the rollout in an iteration, each in a new order (>= 1)"""

    # the network
    bins: int = 2
    """values that each actuator can take, evenly spaced over its range (2 to 256)"""
    critic_hidden: tuple[int, ...] = (256, 256)
    """hidden layer sizes of the Q network"""
    layer_norm: bool = True
    """layer norm and SiLU after each hidden layer; otherwise ReLU"""
    normalize_observations: bool = True
    """scale observations by their running mean and standard deviation"""

    # the objective
    gamma: float = 0.99
    """discount per environment step (0 to 1)"""
    n_step: int = 3
    """dqn: rewards summed before the bootstrap (>= 1); the end of an episode cuts the sum short"""
    double_q: bool = True
    """dqn: the online network chooses the action that the target network values; otherwise the latter does both"""
    tau: float = 0.01
    """dqn: share of the network that is mixed into the target network after each gradient step (> 0, <= 1)"""
    q_lambda: float = 0.9
    """pqn: decay of Q(lambda), from 0 (bootstrap after one step) to 1 (at the end of the rollout)"""
    epsilon: tuple[float, float] = (0.01, 0.2)
    """probabilities that an actuator acts at random (> 0, <= 1): each environment has its own, from low to high"""
    epsilon_decay: float = 0.1
    """share of the run in which the probabilities fall linearly from 1 to their final values (> 0, <= 1)"""
    max_grad_norm: float = 10.0
    """largest gradient norm (> 0; inf: no clipping)"""

    # the learning rate
    learning_rate: float = 1e-3
    """initial learning rate of Adam (> 0)"""
    learning_rate_final: float = 3e-4
    """the learning rate moves linearly to this value over the run (> 0)"""


# What is different for pqn, and for an algorithm and a task on top of that.
PQN = dict(num_envs=512, num_steps=32, learning_starts=0, batch_size=1024, learning_rate_final=1e-4)
TASKS = {
    ("dqn", "InvertedPendulum-v5"): dict(
        num_envs=32, total_timesteps=65_536, learning_starts=1_000, critic_hidden=(64, 64)),
    ("pqn", "InvertedPendulum-v5"): dict(
        num_envs=128, total_timesteps=250_000, batch_size=512, update_epochs=2, critic_hidden=(64, 64),
        learning_rate_final=3e-4),
    ("dqn", "HalfCheetah-v5"): dict(total_timesteps=600_000, gamma=0.98),
    ("pqn", "HalfCheetah-v5"): dict(total_timesteps=3_000_000, gamma=0.98),
    ("dqn", "Hopper-v5"): dict(total_timesteps=600_000),
    ("pqn", "Hopper-v5"): dict(total_timesteps=3_000_000),
    ("dqn", "Walker2d-v5"): dict(total_timesteps=600_000),
    ("pqn", "Walker2d-v5"): dict(total_timesteps=3_000_000),
}  # fmt: skip


def task_defaults(env_id: str, algorithm: str, device: str = "auto") -> Args:
    """The defaults of an algorithm and a task: those of Args, then PQN, then the row in TASKS.

    A GPU has eight times the environments, batch, replay and steps: 1,024 environments, or 4,096 for pqn. So a run
    makes as many gradient steps as on a CPU, each on more transitions."""
    changes = (PQN if algorithm == "pqn" else {}) | TASKS.get((algorithm, env_id), {})
    args = Args(env_id=env_id, algorithm=algorithm, device=device, **changes)
    scaled = "total_timesteps learning_starts replay_capacity batch_size"
    return vecsim.sizes_for_device(args, scaled, factor=8, most=4096 if algorithm == "pqn" else 1024)


def parse_args(argv: list[str]) -> Args:
    """Read the flags. Omitted ones have the values of the task, or the checkpoint's with --resume and --play."""

    def of_task(given: Args) -> Args:
        return task_defaults(given.env_id, given.algorithm, given.device)

    return vecsim.parse_args(argv, "dqn", Args(), of_task, __doc__)


# ----------------------------------------------------------------------------------------------------------------------
# Sizes and checks
# ----------------------------------------------------------------------------------------------------------------------


def check_ranges(args: Args) -> None:
    """InputError for a flag that is out of its range."""
    starts = f"learning_starts = {args.learning_starts}"
    rules = (  # flags, whether a value is legal, and the rule in words
        ("num_steps replay_capacity batch_size updates update_epochs n_step", lambda x: x >= 1, ">= 1"),
        ("learning_starts", lambda x: x >= 0, ">= 0"),
        ("learning_rate learning_rate_final", lambda x: 0 < x < math.inf, "> 0 and finite"),
        ("max_grad_norm", lambda x: x > 0, "> 0"),
        ("bins", lambda x: 2 <= x <= 256, "between 2 and 256"),
        ("gamma q_lambda", lambda x: 0 <= x <= 1, "between 0 and 1"),
        ("tau epsilon_decay", lambda x: 0 < x <= 1, "> 0 and <= 1"),
        ("epsilon", lambda x: 0 < x[0] <= x[1] <= 1, "two numbers > 0 and <= 1, the lower one first"),
        ("total_timesteps", lambda x: x > args.learning_starts, f"> {starts}"),
        ("replay_capacity", lambda x: x >= args.learning_starts or args.algorithm == "pqn", f">= {starts}"),
        ("critic_hidden", lambda x: all(size >= 1 for size in x), "sizes >= 1"),
    )
    vecsim.check_rules(args, rules)


class Sizes(NamedTuple):
    """Numbers that follow from the flags."""

    envs: int  # environments of this process
    batch: int  # transitions of this process in a gradient step
    slots: int  # steps that the replay holds; pqn: those of a rollout
    first_slots: int  # steps that must be stored before an update
    updates: int  # gradient steps in an iteration
    iterations: int


def derive_sizes(args: Args, world_size: int) -> Sizes:
    """InputError if environments or batches do not split evenly; it names a near number that does."""
    for name in ("num_envs", "batch_size"):
        count = getattr(args, name)
        if count % world_size:
            nearest = math.ceil(count / world_size) * world_size
            raise InputError(f"{name} = {count:,} does not split over {world_size} processes; use {nearest}")
    iterations = math.ceil(args.total_timesteps / (args.num_envs * args.num_steps))
    slots, updates = max(args.n_step, math.ceil(args.replay_capacity / args.num_envs)), args.updates
    if args.algorithm == "pqn":
        slots, rollout = args.num_steps, args.num_envs * args.num_steps
        updates = args.update_epochs * rollout // args.batch_size
        if rollout % args.batch_size:
            nearest = next(n for n in range(min(rollout, args.batch_size), 0, -1) if rollout % n == 0)
            raise InputError(f"batch_size must divide num_envs x num_steps = {rollout:,}; use {nearest}")
    least = args.n_step if args.algorithm == "dqn" else 1
    first_slots = max(least, math.ceil(args.learning_starts / args.num_envs))
    return Sizes(args.num_envs // world_size, args.batch_size // world_size, slots, first_slots, updates, iterations)


# ----------------------------------------------------------------------------------------------------------------------
# Network
# ----------------------------------------------------------------------------------------------------------------------


def make_network(inputs: int, hidden: tuple[int, ...], outputs: int, normalized: bool) -> nn.Sequential:
    """ReLU layers or, if normalised, layers that are each followed by layer norm and SiLU. The head starts near zero.

    Layer norm alone would hide the size of its input: x and 2 x would look the same. Therefore hidden layers keep the
    random biases of nn.Linear."""
    layers = []
    for size in hidden:
        linear = nn.Linear(inputs, size)
        nn.init.orthogonal_(linear.weight, math.sqrt(2.0))
        layers += [linear, nn.LayerNorm(size), nn.SiLU()] if normalized else [linear, nn.ReLU()]
        inputs = size
    head = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(head.weight, 0.01)
    nn.init.zeros_(head.bias)
    return nn.Sequential(*layers, head)


class Agent(nn.Module):
    """Q network with one head per actuator, and for dqn its target network.

    Inside the agent an action is the number of each actuator's bin: 0 is the low end of its range, bins - 1 the high
    end. Values are in scaled rewards."""

    def __init__(self, obs_size: int, action_space: gymnasium.spaces.Box, args: Args):
        super().__init__()
        low, high = torch.as_tensor(action_space.low), torch.as_tensor(action_space.high)
        bounded = low.isfinite() & high.isfinite()
        self.register_buffer("action_centre", torch.where(bounded, (high + low) / 2, 0.0))
        self.register_buffer("action_half_range", torch.where(bounded, (high - low) / 2, 1.0))
        self.obs_statistics = RunningStatistics(obs_size, args.normalize_observations, limit=10.0)
        self.return_statistics = RunningStatistics(1, args.normalize_rewards)
        self.network = make_network(obs_size, args.critic_hidden, len(low) * args.bins, args.layer_norm)
        dqn = args.algorithm == "dqn"
        self.target_network = copy.deepcopy(self.network).requires_grad_(False) if dqn else None
        self.bins, self.bf16 = args.bins, args.bf16

    def autocast(self, x: Tensor) -> torch.autocast:
        # No cache of weights in bfloat16: a captured graph would use the cached ones after the weights have changed.
        return torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False)

    def values(self, network: nn.Module, normalized_obs: Tensor) -> Tensor:
        """What each head says about each of its bins (B, actions, bins)."""
        with self.autocast(normalized_obs):
            return network(normalized_obs).float().unflatten(-1, (-1, self.bins))

    def reward_divisor(self) -> Tensor:
        """Scale of the rewards: the standard deviation of the discounted return; 1 without normalize_rewards."""
        deviation = self.return_statistics.deviation().squeeze(0)
        return deviation if self.return_statistics.enabled else torch.ones_like(deviation)

    def to_env(self, action: Tensor) -> Tensor:
        """Numbers of bins to the environment's units."""
        return self.action_centre + self.action_half_range * (action * (2.0 / (self.bins - 1)) - 1.0)

    @torch.no_grad()
    def act(self, obs: Tensor, started: Tensor | None = None) -> Tensor:
        """The greedy action (B, actions) in the environment's units. `started` is for policies with memory."""
        return self.to_env(self.values(self.network, self.obs_statistics.normalize(obs)).argmax(-1))


# ----------------------------------------------------------------------------------------------------------------------
# Replay
# ----------------------------------------------------------------------------------------------------------------------


class Transitions(NamedTuple):
    """One vector step of N environments; or the replay, a ring of S such steps. Step number t is in slot t % S.

    Shapes are those of the replay; a step has no first dimension. Where a step led to is stored beside it (final_obs)
    and not read from the next slot: after the end of an episode the next slot holds the first observation of another
    episode, and the slot after the newest step holds the oldest one. For pqn the ring is one rollout, in its order."""

    obs: Tensor  # (S, N, obs)
    final_obs: Tensor  # (S, N, obs): where the step led to, before any auto-reset
    action: Tensor  # (S, N, actions) uint8, numbers of bins
    reward: Tensor  # (S, N), unscaled
    terminated: Tensor  # (S, N) bool
    truncated: Tensor  # (S, N) bool
    invalid: Tensor  # (S, N) bool: the simulation diverged; such a quarantined step is ignored by the learner


def allocate_replay(agent: Agent, sizes: Sizes) -> Transitions:
    """An empty replay on the agent's device. InputError if it does not fit."""
    device = agent.action_centre.device

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(sizes.slots, sizes.envs, *shape, dtype=dtype, device=device)

    try:
        obs, final_obs = (zeros(len(agent.obs_statistics.mean)) for _ in range(2))
        action = zeros(len(agent.action_centre), dtype=torch.uint8)
        return Transitions(obs, final_obs, action, zeros(), *(zeros(dtype=torch.bool) for _ in range(3)))
    except RuntimeError as error:  # torch.OutOfMemoryError is one too
        raise InputError(
            f"the replay of {sizes.slots * sizes.envs:,} transitions does not fit into the memory of {device}; "
            "use a smaller --replay-capacity"
        ) from error


def store(replay: Transitions, number: int, step: Transitions) -> None:
    """Write step number `number`, over the oldest one if the ring is full."""
    for ring, x in zip(replay, step, strict=True):
        ring[number % len(ring)] = x


def draw_transitions(
    replay: Transitions, written: int, n_step: int, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw transitions uniformly, with replacement, after `written` steps were stored: slot and environment (count,).

    A transition can be drawn only if the n_step - 1 steps after it are stored too. So no window of n_step steps goes on
    from the newest step to the oldest one."""
    slots, envs = replay.reward.shape
    stored = min(written, slots)
    starts = stored - n_step + 1
    draw = torch.randint(starts * envs, (count,), generator=generator, device=generator.device)
    oldest = written - stored
    return (oldest + draw // envs) % slots, draw % envs


# ----------------------------------------------------------------------------------------------------------------------
# Algorithm: pure functions
# ----------------------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """The B transitions of one gradient step, or of all gradient steps of an iteration."""

    obs: Tensor  # (B, obs), normalised
    action: Tensor  # (B, actions), numbers of bins
    target: Tensor  # (B,): what Q(obs, action) should be, in scaled rewards
    weight: Tensor  # (B,): 0 for a quarantined transition, otherwise 1


class LossTerms(NamedTuple):
    """What q_loss returns for the log: means over a batch, in which quarantined transitions count as 0."""

    loss: Tensor
    value: Tensor  # Q(obs, action), in scaled rewards
    target: Tensor


@torch.no_grad()
def policy_step(agent: Agent, obs: Tensor, epsilon: Tensor, uniform: Tensor, fresh: Tensor) -> tuple[Tensor, Tensor]:
    """Action (N, actions) of the environments, in numbers of bins and in the environment's units.

    Each actuator takes its bin from `fresh` (N, actions) if `uniform` (N, actions) is below epsilon (N, 1), the rate of
    its environment. Otherwise it takes the best bin of its head."""
    greedy = agent.values(agent.network, agent.obs_statistics.normalize(obs)).argmax(-1)
    action = torch.where(uniform < epsilon, fresh, greedy)
    return action, agent.to_env(action)


def exploration_rates(lowest: float, highest: float, count: int) -> Tensor:
    """Final epsilon (count, 1) of the environments: equal factors from the lowest to the highest (Ape-X)."""
    return torch.linspace(math.log(lowest), math.log(highest), count).exp()[:, None]


@torch.no_grad()
def follow_returns(
    agent: Agent, returns: Tensor, reward: Tensor, terminated: Tensor, invalid: Tensor, gamma: float
) -> Tensor:
    """Discounted sum (N,) of each robot's rewards so far. Updates the statistics of its size, here and only here.

    A time limit does not reset the sum: bootstrapped values look past the time limit, so their scale must too."""
    returns = gamma * returns + torch.where(invalid, 0.0, reward)
    agent.return_statistics.update(returns[:, None], ~invalid)
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


def lambda_returns(rollout: Transitions, next_value: Tensor, gamma: float, q_lambda: float) -> Tensor:
    """Targets of Q(lambda) over (T, N) tensors (Gallici et al. 2024, section 3; Peng and Williams 1994).

    rollout: with scaled rewards. next_value is the largest value in final_obs: that of the state that the step led to,
    before any automatic reset.
    The target of a step is its reward + gamma x what follows. That is

    - if the next step is in the same episode: (1 - lambda) x next_value + lambda x the target of the next step,
    - at the end of the rollout, after a truncation and before a quarantined step: next_value,
    - after a termination, which wins over a truncation: 0.

    A random action does not cut the sum: this is Peng's Q(lambda). The target of a quarantined step is finite, and its
    weight is 0."""
    invalid, terminated = rollout.invalid, rollout.terminated
    same_episode = ~(terminated | rollout.truncated)
    same_episode = torch.cat([same_episode[:-1] & ~invalid[1:], torch.zeros_like(same_episode[:1])])
    decay = q_lambda * same_episode.float()
    reward = torch.where(invalid, 0.0, rollout.reward)
    next_value = torch.where(terminated | invalid, 0.0, next_value)
    target, following = torch.empty_like(reward), torch.zeros_like(reward[0])
    for t in reversed(range(len(reward))):
        following = reward[t] + gamma * torch.lerp(next_value[t], following, decay[t])
        target[t] = following
    return target


def action_value(values: Tensor, action: Tensor) -> Tensor:
    """Q(s, a) (B,) from the heads (B, actions, bins): their mean, each at its actuator's bin."""
    return values.gather(-1, action[..., None]).squeeze(-1).mean(-1)


@torch.no_grad()
def bootstrap_value(agent: Agent, normalized_obs: Tensor, double_q: bool) -> Tensor:
    """Value (B,) of the best action, each head's best bin. dqn: the target network says it, and with double_q about the
    action that the online network prefers. pqn: the online network alone."""
    if agent.target_network is None:
        return agent.values(agent.network, normalized_obs).amax(-1).mean(-1)
    values = agent.values(agent.target_network, normalized_obs)
    chooser = agent.values(agent.network, normalized_obs) if double_q else values
    return action_value(values, chooser.argmax(-1))


@torch.no_grad()
def replay_batch(agent: Agent, replay: Transitions, slot: Tensor, env: Tensor, value_of: Callable, args: Args) -> Batch:
    """dqn: the drawn transitions as rows, with n-step targets. value_of: normalised observations -> bootstrap_value.

    Statistics and networks are those before the gradient steps of this iteration."""
    slots = len(replay.reward)
    window = (slot[:, None] + torch.arange(args.n_step, device=slot.device)) % slots
    columns = replay.reward, replay.terminated, replay.truncated, replay.invalid
    total, discount, last = n_step_returns(*(x[window, env[:, None]] for x in columns), args.gamma)
    valid, obs = ~replay.invalid[slot, env], replay.obs[slot, env]
    # A quarantined transition may lead to NaN, which a weight of 0 does not remove.
    next_obs = torch.where(valid[:, None], replay.final_obs[(slot + last) % slots, env], obs)
    obs, next_obs = (agent.obs_statistics.normalize(x) for x in (obs, next_obs))
    target = total * (args.reward_scale / agent.reward_divisor()) + discount * value_of(next_obs)
    return Batch(obs, replay.action[slot, env].long(), target, valid.float())


@torch.no_grad()
def rollout_batch(agent: Agent, rollout: Transitions, order: Tensor, value_of: Callable, args: Args) -> Batch:
    """pqn: the transitions of the rollout as rows in this order, with targets of Q(lambda)."""
    next_obs = agent.obs_statistics.normalize(rollout.final_obs.flatten(0, 1))
    next_value = value_of(next_obs).view_as(rollout.reward)
    scaled = rollout._replace(reward=rollout.reward * (args.reward_scale / agent.reward_divisor()))
    target = lambda_returns(scaled, next_value, args.gamma, args.q_lambda)
    obs = agent.obs_statistics.normalize(rollout.obs.flatten(0, 1))
    rows = obs, rollout.action.flatten(0, 1).long(), target.flatten(), (~rollout.invalid).flatten().float()
    return Batch(*(x[order] for x in rows))


def q_loss(agent: Agent, batch: Batch) -> tuple[Tensor, Tensor]:
    """Huber loss of Q(obs, action) on a batch, as in Seyde et al., and LossTerms, stacked."""
    value = action_value(agent.values(agent.network, batch.obs), batch.action)
    losses = functional.huber_loss(value, batch.target, reduction="none")
    terms = torch.stack(LossTerms(losses, value, batch.target)).detach()
    return (losses * batch.weight).mean(), (terms * batch.weight).mean(1)


@torch.no_grad()
def apply_gradients(agent: Agent, optimizer: torch.optim.Optimizer, max_grad_norm: float, tau: float) -> None:
    """Clip the gradients and take one Adam step; then the target network of dqn follows."""
    nn.utils.clip_grad_norm_(agent.network.parameters(), max_grad_norm)
    optimizer.step()
    if agent.target_network is not None:
        for target, online in zip(agent.target_network.parameters(), agent.network.parameters(), strict=True):
            target.lerp_(online, tau)


class Functions(NamedTuple):
    """What build_functions makes."""

    policy: Callable  # (obs, epsilon, uniform, fresh) -> action in numbers of bins, action in the environment's units
    value: Callable  # normalised obs of all gradient steps of an iteration -> bootstrap_value
    gradients: Callable  # (*batch) -> LossTerms, stacked
    step: Callable


def update(agent: Agent, functions: Functions, batch: Batch, updates: int) -> Tensor:
    """Do all gradient steps of an iteration; return the sum of their LossTerms, stacked."""
    total = torch.zeros(len(LossTerms._fields), device=batch.target.device)
    for rows in zip(*(x.chunk(updates) for x in batch), strict=True):
        terms = functions.gradients(*rows)
        vecsim.average_over_processes([*(p.grad for p in agent.network.parameters()), terms])
        functions.step()
        total += terms
    return total


# ----------------------------------------------------------------------------------------------------------------------
# Compilation and CUDA graphs
# ----------------------------------------------------------------------------------------------------------------------


def build_functions(
    agent: Agent, optimizer: torch.optim.Optimizer, replay: Transitions, sizes: Sizes, args: Args
) -> Functions:
    """Make the four functions, eager or compiled, and captured on a GPU. agent and optimizer do not change."""
    step_function, value_function, loss_function = policy_step, bootstrap_value, q_loss
    if args.compile:
        step_function, value_function, loss_function = (
            torch.compile(f, dynamic=False) for f in (policy_step, bootstrap_value, q_loss)
        )

    @vecsim.one_thread()
    def policy(obs: Tensor, epsilon: Tensor, uniform: Tensor, fresh: Tensor) -> tuple[Tensor, Tensor]:
        return step_function(agent, obs, epsilon, uniform, fresh)

    def value(normalized_obs: Tensor) -> Tensor:
        return value_function(agent, normalized_obs, args.double_q)

    def gradients(*batch: Tensor) -> Tensor:
        agent.network.zero_grad(set_to_none=False)
        loss, terms = loss_function(agent, Batch(*batch))
        loss.backward()
        return terms

    def step() -> None:
        apply_gradients(agent, optimizer, args.max_grad_norm, args.tau)

    uniform = torch.zeros_like(replay.action[0], dtype=torch.float32)
    acting = torch.zeros_like(replay.obs[0]), uniform[:, :1].clone(), uniform, uniform.long()
    row = uniform.new_zeros(sizes.batch)
    obs, action = (row[:, None].repeat(1, x.shape[-1]) for x in (replay.obs, replay.action))
    examples = acting, (obs,), (obs, action.long(), row, row), ()
    prepared = vecsim.prepare((policy, value, gradients, step), examples, agent, [optimizer], args.cuda_graphs)
    functions = Functions(*prepared)

    def all_values(normalized_obs: Tensor) -> Tensor:
        return torch.cat([functions.value(rows).clone() for rows in normalized_obs.split(sizes.batch)])

    return functions._replace(value=all_values)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoint
# ----------------------------------------------------------------------------------------------------------------------


def load_checkpoint(path: str) -> dict:
    """Read a checkpoint of this script onto the CPU. InputError if it is damaged or not of this script."""
    return vecsim.load_checkpoint(path, "dqn", Args)


def check_resumable(checkpoint: dict, args: Args, world_size: int) -> None:
    """InputError for flags that do not fit the checkpoint's state, or that would have no effect."""
    fixed = "env_id env_kwargs algorithm num_envs num_steps seed bins critic_hidden layer_norm normalize_observations"
    fixed += " normalize_rewards" + " replay_capacity" * checkpoint["args"]["checkpoint_replay"]
    vecsim.check_resumable(checkpoint, args, fixed, world_size)


def filled_part(replay: Transitions, written: int) -> dict:
    """What a checkpoint saves of the replay: the filled slots, copied to the CPU."""
    stored = min(written, len(replay.reward))
    rings = {name: x[:stored].to("cpu", copy=True) for name, x in replay._asdict().items()}
    return dict(written=written, rings=rings)


def load_replay(replay: Transitions, saved: dict) -> int:
    """Copy the saved slots in; returns how many steps were stored so far."""
    for name, x in saved["rings"].items():
        getattr(replay, name)[: len(x)] = x.to(replay.reward.device)
    return saved["written"]


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
#   gymnasium_return               greedy score in Gymnasium's environment (--eval-every)
#   updates, replay_transitions    gradient steps so far; transitions in the replay or the rollout
#   loss, value, target            Huber loss; mean of Q(obs, action) and of its target, in scaled rewards
#   epsilon                        mean probability that an actuator acts at random
#   learning_rate, reward_divisor  that of Adam; what rewards are divided by
# Loss, value and target are means over the gradient steps since the last line.
# ----------------------------------------------------------------------------------------------------------------------


def train(args: Args, make_env=None, stop: vecsim.StopSignals | None = None) -> dict:
    """Train, write the run folder and evaluate; return the last log record together with the evaluation.

    make_env: see the top of this file. After a signal, the iteration is finished and saved; then KeyboardInterrupt."""
    # Check the flags before anything is allocated.
    check_ranges(args)
    run = vecsim.Run(args, "dqn", make_env, stop)
    sizes = derive_sizes(args, run.world_size)
    if run.checkpoint:
        check_resumable(run.checkpoint, args, run.world_size)
    what = (
        f"{args.algorithm}: {args.num_envs:,} environments x {args.num_steps} steps, {sizes.iterations:,} times; "
        f"{sizes.updates} updates each time, on batches of {args.batch_size:,}"
    )
    env = run.start(sizes.envs, what, name=args.algorithm)

    # Make the network, the replay and the functions; then continue where the checkpoint ended.
    device, generator = run.device, run.generator
    obs_size, action_size = env.single_observation_space.shape[0], env.single_action_space.shape[0]
    agent = Agent(obs_size, env.single_action_space, args).to(device)
    learning_rate = torch.tensor(args.learning_rate, device=device)
    optimizer = vecsim.make_optimizer(agent.network, learning_rate)
    replay = allocate_replay(agent, sizes)
    if run.rank == 0:
        size = sum(ring.nbytes for ring in replay) / 2**20
        print(f"replay: {sizes.slots:,} steps of {sizes.envs:,} environments, {size:,.1f} MiB in each process")
    if run.checkpoint:
        agent.load_state_dict(run.checkpoint["agent"])
        vecsim.load_moments(optimizer, run.checkpoint["moments"])
    with vecsim.first_process_first():
        functions = build_functions(agent, optimizer, replay, sizes, args)
        env.reset()
        env.step(torch.zeros(sizes.envs, action_size, device=device))  # compiles the physics
    obs, _ = env.reset(seed=run.env_seed)
    rates = exploration_rates(*args.epsilon, args.num_envs).to(device)  # of all processes
    mine = slice(run.rank * sizes.envs, (run.rank + 1) * sizes.envs)
    returns = torch.zeros(sizes.envs, device=device)
    updates, written = 0, 0
    saved = run.restore()
    if saved.get("env"):
        obs = saved["obs"].to(device)
    if saved:
        updates, returns = run.checkpoint["updates"], saved["returns"].to(device)
        if saved["replay"]:
            written = load_replay(replay, saved["replay"])
            if not saved["env"]:  # the environments began new episodes
                replay.truncated[(written - 1) % sizes.slots] = True
        elif run.rank == 0:
            print("the checkpoint has no replay, so updates wait until a new one is filled; see --checkpoint-replay")
        saved["replay"] = None  # frees its memory

    terms, logged_updates = torch.zeros(len(LossTerms._fields), device=device), updates
    steps_per_iteration = args.num_envs * args.num_steps
    waiting = max(0, math.ceil((sizes.first_slots - written) / args.num_steps) - 1)  # iterations without updates
    for iteration in run.start_clock(steps_per_iteration, sizes.iterations, waiting):
        # Act: at first uniformly at random, later with the best action and less and less exploration.
        decayed = (iteration * steps_per_iteration - args.learning_starts) / (args.epsilon_decay * args.total_timesteps)
        epsilon = 1.0 + min(max(decayed, 0.0), 1.0) * (rates - 1.0)
        for _ in range(args.num_steps):
            uniform = torch.rand(sizes.envs, action_size, generator=generator, device=device)
            fresh = torch.randint(args.bins, (sizes.envs, action_size), generator=generator, device=device)
            with record_function("infer"):
                action, env_action = functions.policy(obs, epsilon[mine], uniform, fresh)
            with record_function("simulate"):
                next_obs, reward, terminated, truncated, info = env.step(env_action)
            invalid = info["invalid"]
            agent.obs_statistics.update(obs, ~invalid)
            store(replay, written, Transitions(obs, info["final_obs"], action, reward, terminated, truncated, invalid))
            written += 1
            if args.normalize_rewards:
                scaled = reward * args.reward_scale
                returns = follow_returns(agent, returns, scaled, terminated, invalid, args.gamma)
            obs = next_obs

        # Update: targets for all gradient steps of this iteration, then these steps.
        if written >= sizes.first_slots:
            progress = iteration / sizes.iterations
            learning_rate.fill_(args.learning_rate + progress * (args.learning_rate_final - args.learning_rate))
            with record_function("targets"):
                if args.algorithm == "dqn":
                    rows = sizes.updates * sizes.batch
                    slot, row_env = draw_transitions(replay, written, args.n_step, rows, generator)
                    batch = replay_batch(agent, replay, slot, row_env, functions.value, args)
                else:
                    rows = args.num_steps * sizes.envs
                    order = torch.rand(args.update_epochs, rows, generator=generator, device=device).argsort(1)
                    batch = rollout_batch(agent, replay, order.flatten(), functions.value, args)
            with record_function("update"):
                terms += update(agent, functions, batch, sizes.updates)
            updates += sizes.updates
            if run.profiler:
                run.profiler.step()

        # Log, evaluate, save: each when a multiple of its interval was crossed.
        if not run.due(iteration):
            continue
        means = LossTerms(*(terms / max(1, updates - logged_updates)))._asdict()
        means |= dict(epsilon=epsilon.mean(), learning_rate=learning_rate, reward_divisor=agent.reward_divisor())
        counts = dict(updates=updates, replay_transitions=min(written, sizes.slots) * args.num_envs)
        if updates == logged_updates:  # nothing was learned yet
            counts |= dict.fromkeys(LossTerms._fields)
        run.write_record(agent, means, needed=means, **counts)
        if run.save_now:
            with_replay = args.checkpoint_replay or args.algorithm == "pqn"
            own = dict(obs=obs, returns=returns, replay=filled_part(replay, written) if with_replay else None)
            run.save(own, agent=agent.state_dict(), moments=list(optimizer.state.values()), updates=updates)
            del own  # frees the copy of the replay
        terms.zero_()
        logged_updates = updates
        run.go_on()

    result = run.finish(agent, args.algorithm.upper())
    env.close()
    return result


# ----------------------------------------------------------------------------------------------------------------------
# Policy: load, export, play
# ----------------------------------------------------------------------------------------------------------------------


def load_agent(checkpoint: dict) -> Agent:
    """The agent of a checkpoint, on the CPU. The saved tensors tell its sizes."""
    saved = checkpoint["agent"]
    action_space = gymnasium.spaces.Box(-1.0, 1.0, saved["action_centre"].shape)  # the saved range replaces this one
    agent = Agent(len(saved["obs_statistics.mean"]), action_space, Args(**checkpoint["args"]))
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
