"""Soft actor-critic (SAC) for thousands of robots on one device: simulator, replay, critics and policy never leave it.

    python sac_gpu_torch.py --env-id InvertedPendulum-v5                    # half a minute
    python sac_gpu_torch.py --env-id HalfCheetah-v5                         # on a GPU if there is one, else on the CPU
    python sac_gpu_torch.py --env-id HalfCheetah-v5 --preset vanilla        # textbook SAC in the same setting
    python sac_gpu_torch.py --env-id Ant-v5 --bf16                          # on a GPU with 1,024 environments
    python sac_gpu_torch.py --resume runs/NAME/checkpoint.pt --total-timesteps 4000000
    python sac_gpu_torch.py --play runs/NAME/checkpoint.pt --capture-video
    python sac_gpu_torch.py --play runs/NAME/checkpoint.pt --export policy.onnx
    torchrun --nproc-per-node=2 sac_gpu_torch.py --env-id Ant-v5            # gradients are averaged over the processes

Scores on one AMD EPYC core, medians of 3 or 5 seeds in Gymnasium's own environments: Ant-v5 4,611 and Walker2d-v5 4,750
after 400 thousand environment steps, HalfCheetah-v5 4,436 after 160 thousand, Hopper-v5 3,219 after 200 thousand,
Humanoid-v5 6,963 after 1.5 million, InvertedPendulum-v5 1,000 after 6 to 10 thousand.

Each trick beyond the textbook is one flag, so an ablation is a loop over flags:

    trick                       off (textbook)                on
    categorical critic          --critic scalar               --critic categorical
    normalised layers           --network mlp                 --network layer_norm; flash: residual blocks, batch norm
    scaled observations         --no-normalize-observations   --normalize-observations
    scaled rewards              --no-normalize-rewards        --normalize-rewards
    longer returns              --n-step 1                    --n-step 3 (on for Hopper, Walker2d, Ant and Humanoid)
    held exploration noise      --noise-repeat-max 1          --noise-repeat-max 16
    mean of the two critics     --critic-reduction min        --critic-reduction mean

--preset vanilla turns all of them off. It also sets the textbook's learning rates, tau, temperature, target entropy,
network sizes, policy_frequency and reward scale.

The script needs `vecsim_torch.py` beside it and no other file of this project. Copy the two files and they are yours.

Your own environment: call `train(Args(env_id="my-robot"), make_env=make_env)`. The function
`make_env(env_id, num_envs, device, seed, **env_kwargs)` returns a vector environment of tensors on that device.
It needs reset, step, two spaces and info["final_obs"]; `vecsim_torch.CompletedEnv` says the details.

Sources: SAC, Haarnoja et al. 2018b (arXiv:1812.05905), eq. 5 to 7 and 18; categorical critic, Bellemare et al. 2017
(arXiv:1707.06887), algorithm 1; many environments and large batches, FastTD3, Seo et al. 2025 (arXiv:2505.22642);
residual blocks, reward scale and held noise, FlashSAC 2026 (arXiv:2604.04539); batch norm over both halves of a batch,
CrossQ, Bhatt et al. 2024 (arXiv:1902.05605); time limits, Pardo et al. 2018 (arXiv:1712.00378); running moments,
Chan et al. 1983.
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
from torch import Tensor, distributed, nn
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

    All numbers of steps are environment steps, summed over all environments. These defaults are for a CPU, --preset
    best and a task without a row in TASKS."""

    preset: Literal["best", "vanilla"] = "best"
    """best: our tuned SAC; vanilla: textbook SAC and its hyperparameters; other flags override either"""
    num_envs: int = 128
    """environments that are stepped in parallel, over all processes (>= 1)"""
    total_timesteps: int = 2_000_000
    """environment steps of the whole run (> learning_starts; rounded up to whole steps of all environments)"""
    bf16: bool = False
    """run the networks in bfloat16, the rest in float32; a CPU without AVX512_BF16 gets slower"""
    checkpoint_replay: bool = False
    """save the replay too, so that a run resumes bit for bit; otherwise a resumed run starts with an empty replay"""
    normalize_rewards: bool = True
    """divide rewards by a running scale of the discounted return, so that returns fit +-value_limit"""

    # the replay and the batch
    replay_capacity: int = 1_000_000
    """transitions kept, over all processes (>= learning_starts); the start of a run prints their memory"""
    half_precision_replay: bool = False
    """store observations in float16, with three decimal digits and almost half the memory"""
    learning_starts: int = 10_000
    """steps with random actions before the first update (>= 1); a run that resumes without a replay waits as long"""
    batch_size: int = 512
    """transitions of one gradient step, over all processes (>= 1)"""
    updates_per_step: int = 4
    """updates of the critics after each step of all environments (>= 1)"""
    policy_frequency: int = 2
    """updates of the critics per update of policy and temperature (>= 1)"""

    # the networks
    network: Literal["mlp", "layer_norm", "flash"] = "layer_norm"
    """mlp: ReLU; layer_norm: layer norm and SiLU; flash: FlashSAC's residual blocks with batch norm"""
    actor_hidden: tuple[int, ...] = (256, 256)
    """hidden layer sizes of the policy; flash: one residual block for each, all of one width"""
    critic_hidden: tuple[int, ...] = (256, 256)
    """hidden layer sizes of each critic; flash: one residual block for each, all of one width"""
    normalize_observations: bool = True
    """scale observations by their running mean and standard deviation"""

    # the objective
    critic: Literal["categorical", "scalar"] = "categorical"
    """scalar: predict the return; categorical: predict its distribution; scaled returns must fit +-value_limit"""
    num_atoms: int = 101
    """values of the categorical distribution (>= 2)"""
    value_limit: float = 5.0
    """largest value of the categorical distribution, in scaled rewards; normalize_rewards scales to it (> 0)"""
    critic_reduction: Literal["min", "mean"] = "mean"
    """how the two critics become one value, in the target and for the policy"""
    gamma: float = 0.99
    """discount per environment step (0 to 1)"""
    n_step: int = 1
    """rewards summed before the bootstrap (>= 1); the end of an episode cuts the sum short"""
    tau: float = 0.05
    """share of the critics that is mixed into the target critics after each update (> 0, <= 1)"""
    target_entropy: float = -0.5
    """entropy to hold, per action, in half the action range (textbook: -1; a Gaussian of deviation 0.15: -0.48)"""
    temperature_init: float = 0.01
    """initial weight of the entropy (> 0)"""
    noise_repeat_max: int = 16
    """longest time in steps that a robot keeps one draw of exploration noise (>= 1; 1: new noise each step)"""

    # the learning rates
    learning_rate: float = 1e-3
    """initial learning rate of Adam for policy and critics (> 0)"""
    learning_rate_final: float = 3e-4
    """the learning rate moves linearly to this value over the run (> 0)"""
    temperature_learning_rate: float = 1e-3
    """learning rate of Adam for the logarithm of the temperature (> 0)"""


# What is different for a task, and what --preset vanilla changes on top of that.
TASKS = {
    "InvertedPendulum-v5": dict(
        num_envs=32, total_timesteps=16_384, learning_starts=1_000, batch_size=256, updates_per_step=8,
        actor_hidden=(64, 64), critic_hidden=(64, 64), critic_reduction="min",
        normalize_rewards=False, reward_scale=0.04),  # returns of at most 100 then fit without a running scale
    "InvertedDoublePendulum-v5": dict(
        num_envs=32, total_timesteps=65_536, learning_starts=2_000, batch_size=256, updates_per_step=8,
        actor_hidden=(64, 64), critic_hidden=(64, 64), critic_reduction="min"),
    "Reacher-v5": dict(
        num_envs=32, total_timesteps=65_536, learning_starts=2_000, batch_size=256, updates_per_step=8,
        actor_hidden=(64, 64), critic_hidden=(64, 64), critic_reduction="min"),
    "Pusher-v5": dict(total_timesteps=300_000, learning_starts=5_000, batch_size=256, updates_per_step=8),
    "Hopper-v5": dict(
        total_timesteps=200_000, learning_starts=5_000, batch_size=256, updates_per_step=8, critic_reduction="min",
        n_step=3),
    "Walker2d-v5": dict(
        total_timesteps=400_000, learning_starts=5_000, batch_size=256, updates_per_step=8, critic_reduction="min",
        n_step=3),
    "HalfCheetah-v5": dict(
        total_timesteps=160_000, learning_starts=5_000, batch_size=256, updates_per_step=8, gamma=0.98),
    "Swimmer-v5": dict(
        total_timesteps=200_000, learning_starts=5_000, batch_size=256, updates_per_step=8, gamma=0.999),
    "Ant-v5": dict(
        total_timesteps=400_000, learning_starts=5_000, batch_size=256, updates_per_step=8, critic_reduction="min",
        n_step=3, env_kwargs={"include_cfrc_ext_in_observation": False}),
    "Humanoid-v5": dict(
        total_timesteps=1_500_000, learning_starts=5_000, batch_size=256, updates_per_step=8, critic_reduction="min",
        n_step=3, env_kwargs={
            "include_cinert_in_observation": False, "include_cvel_in_observation": False,
            "include_qfrc_actuator_in_observation": False, "include_cfrc_ext_in_observation": False}),
    "HumanoidStandup-v5": dict(total_timesteps=2_000_000, env_kwargs={
        "include_cinert_in_observation": False, "include_cvel_in_observation": False,
        "include_qfrc_actuator_in_observation": False, "include_cfrc_ext_in_observation": False}),
}  # fmt: skip
VANILLA = dict(
    reward_scale=1.0, normalize_rewards=False, normalize_observations=False, policy_frequency=1, network="mlp",
    actor_hidden=(256, 256), critic_hidden=(256, 256), critic="scalar", critic_reduction="min", n_step=1, tau=0.005,
    target_entropy=-1.0, temperature_init=1.0, noise_repeat_max=1, learning_rate=3e-4, learning_rate_final=3e-4,
    temperature_learning_rate=3e-4,
)  # fmt: skip


def task_defaults(env_id: str, preset: str = "best", device: str = "auto") -> Args:
    """The defaults of a task: those of Args, then its row in TASKS, then the preset.

    A GPU has eight times the environments, batch, replay and steps: for Ant 1,024, 2,048, 8 million and 3.2 million.
    So a run makes as many gradient steps as on a CPU, each on more transitions."""
    changes = TASKS.get(env_id, {}) | (VANILLA if preset == "vanilla" else {})
    args = Args(env_id=env_id, preset=preset, device=device, **changes)
    scaled = "total_timesteps learning_starts replay_capacity batch_size"
    return vecsim.sizes_for_device(args, scaled, factor=8, most=1024)


def parse_args(argv: list[str]) -> Args:
    """Read the flags. Omitted ones have the values of task and preset, or the checkpoint's with --resume and --play."""

    def of_task(given: Args) -> Args:
        return task_defaults(given.env_id, given.preset, given.device)

    return vecsim.parse_args(argv, "sac", Args(), of_task, __doc__)


# ----------------------------------------------------------------------------------------------------------------------
# Sizes and checks
# ----------------------------------------------------------------------------------------------------------------------


def check_ranges(args: Args) -> None:
    """InputError for a flag that is out of its range."""
    counts = "replay_capacity learning_starts batch_size updates_per_step policy_frequency n_step noise_repeat_max"
    rates = "learning_rate learning_rate_final temperature_learning_rate"
    widths = "one or more blocks of one width for --network flash, such as 256 256"
    rules = (  # flags, whether a value is legal, and the rule in words
        (counts, lambda x: x >= 1, ">= 1"),
        (f"{rates} value_limit temperature_init", lambda x: 0 < x < math.inf, "> 0 and finite"),
        ("num_atoms", lambda x: x >= 2, ">= 2"),
        ("gamma", lambda x: 0 <= x <= 1, "between 0 and 1"),
        ("tau", lambda x: 0 < x <= 1, "> 0 and <= 1"),
        ("target_entropy", math.isfinite, "finite"),
        ("total_timesteps", lambda x: x > args.learning_starts, f"> learning_starts = {args.learning_starts}"),
        ("replay_capacity", lambda x: x >= args.learning_starts, f">= learning_starts = {args.learning_starts}"),
        ("actor_hidden critic_hidden", lambda x: all(size >= 1 for size in x), "sizes >= 1"),
        ("actor_hidden critic_hidden", lambda x: args.network != "flash" or len(set(x)) == 1, widths),
    )
    vecsim.check_rules(args, rules)


class Sizes(NamedTuple):
    """Numbers that follow from the flags."""

    envs: int  # environments of this process
    batch: int  # transitions of this process in a gradient step
    slots: int  # steps that the replay holds
    first_slots: int  # steps that the replay must hold before an update
    iterations: int  # steps of each environment in the whole run


def derive_sizes(args: Args, world_size: int) -> Sizes:
    """InputError if the environments or the batches do not split evenly; it names a near number that does."""
    for name in ("num_envs", "batch_size"):
        count = getattr(args, name)
        if count % world_size:
            nearest = math.ceil(count / world_size) * world_size
            raise InputError(f"{name} = {count:,} does not split over {world_size} processes; use {nearest}")
    envs, batch = args.num_envs // world_size, args.batch_size // world_size
    if args.network == "flash" and batch < 2:
        raise InputError(f"batch_size = {args.batch_size} is too small: batch norm needs 2 rows in each process")
    slots = max(args.n_step, math.ceil(args.replay_capacity / args.num_envs))
    first_slots = max(args.n_step, math.ceil(args.learning_starts / args.num_envs))
    iterations = math.ceil(args.total_timesteps / args.num_envs)
    return Sizes(envs, batch, slots, first_slots, iterations)


# ----------------------------------------------------------------------------------------------------------------------
# Networks
# ----------------------------------------------------------------------------------------------------------------------


def linear_layer(inputs: int, outputs: int, gain: float, bias: bool = True) -> nn.Linear:
    """Orthogonal weights, zero bias."""
    linear = nn.Linear(inputs, outputs, bias)
    nn.init.orthogonal_(linear.weight, gain)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


class PlainNetwork(nn.Module):
    """ReLU layers or, if normalised, layers that are each followed by layer norm and SiLU. The head starts near zero.

    Layer norm alone would hide the size of its input: x and 2 x would look the same, and a robot near its target could
    not tell a small error from a large one. Therefore normalised layers start with random biases, as nn.Linear's do."""

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
            # At first the distribution is a Gaussian of deviation value_limit / 5. A uniform one would stay wide until
            # the discount has shrunk it, and would lose probability at one edge, which pulls all values towards 0.
            for critic in (self.critics.first, self.critics.second):
                critic.head.bias.data.copy_(-0.5 * (5.0 * atoms / args.value_limit).square())
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.temperature = Temperature(args.temperature_init)
        self.value_limit, self.reduction = args.value_limit, args.critic_reduction
        self.bf16 = args.bf16

    def autocast(self, x: Tensor) -> torch.autocast:
        # No cache of weights in bfloat16: a captured graph would use the cached ones after the weights have changed.
        return torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False)

    def policy(self, normalized_obs: Tensor, learning: bool) -> tuple[Tensor, Tensor]:
        """Mean and log deviation (B, actions) of the Gaussian before squashing."""
        with self.autocast(normalized_obs):
            mean, spread = self.actor(normalized_obs, learning).float().split(self.actor.head.out_features // 2, -1)
        return mean, 3.5 * spread.tanh() - 1.5  # smoothly between -5 and 2

    def value(self, outputs: Tensor) -> Tensor:
        """Critic outputs (..., outputs) to values (...): the mean of the distribution if the critic is categorical."""
        return outputs.squeeze(-1) if self.atoms is None else outputs.softmax(-1) @ self.atoms

    def combined_value(self, outputs: Tensor) -> Tensor:
        """Outputs (2, B, outputs) of both critics to one value (B,)."""
        first, second = self.value(outputs)
        return torch.min(first, second) if self.reduction == "min" else (first + second) / 2

    def reward_divisor(self) -> Tensor:
        """Scale of the rewards: the deviation of the discounted return, or more if the largest exceeds value_limit.

        1 without normalize_rewards. As in FlashSAC the largest return never decays: outliers have a lasting effect."""
        if not self.return_statistics.enabled:
            return torch.ones_like(self.largest_return)
        return torch.max(self.return_statistics.deviation().squeeze(0), self.largest_return / self.value_limit)

    def to_env(self, action: Tensor) -> Tensor:
        """Half ranges to the environment's units."""
        return self.action_centre + self.action_half_range * action

    @torch.no_grad()
    def act(self, obs: Tensor, started: Tensor | None = None) -> Tensor:
        """The deterministic action (B, actions) in the environment's units. `started` is for policies with memory."""
        mean, _ = self.policy(self.obs_statistics.normalize(obs), learning=False)
        return self.to_env(mean.tanh())


# ----------------------------------------------------------------------------------------------------------------------
# Replay
# ----------------------------------------------------------------------------------------------------------------------


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
    invalid: Tensor  # (S, N) bool: the simulation diverged; such a quarantined step is ignored by the learner
    critic_obs: Tensor | None = None  # (S, N, critic obs); None if the critics see obs
    final_critic_obs: Tensor | None = None  # (S, N, critic obs); None if the critics see final_obs


def allocate_replay(agent: Agent, sizes: Sizes, half_precision: bool) -> Transitions:
    """An empty replay on the agent's device. half_precision: observations in float16. InputError if it does not fit."""
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
            f"the replay of {sizes.slots * sizes.envs:,} transitions does not fit into the memory of {device}; "
            "use a smaller --replay-capacity or --half-precision-replay"
        ) from error


def store(replay: Transitions, number: int, step: Transitions) -> None:
    """Write step number `number`, over the oldest one if the ring is full. float16 clips to its largest number."""
    slot = number % len(replay.reward)
    for ring, x in zip(replay, step, strict=True):
        if ring is not None:
            ring[slot] = x.clamp(-65504.0, 65504.0) if ring.dtype == torch.float16 else x


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
    """The B transitions of one gradient step. Observations are normalised, actions in half ranges."""

    obs: Tensor  # (B, obs)
    critic_obs: Tensor  # (B, critic obs)
    action: Tensor  # (B, actions)
    reward: Tensor  # (B,): discounted sum of up to n_step rewards, scaled
    discount: Tensor  # (B,): factor on the value that follows; 0 after a termination
    next_obs: Tensor  # (B, obs): where the last of those steps led to, before any auto-reset
    next_critic_obs: Tensor  # (B, critic obs)
    weight: Tensor  # (B,): 0 for a quarantined transition, otherwise 1


class CriticTerms(NamedTuple):
    """What critic_loss returns for the log: means over a batch, in which quarantined transitions count as 0."""

    critic_loss: Tensor
    value: Tensor  # of the first critic, in scaled rewards
    target_clipped: Tensor  # share of categorical targets whose mean is outside +-value_limit


class PolicyTerms(NamedTuple):
    """What policy_loss returns for the log: means over a batch, in which quarantined transitions count as 0."""

    policy_loss: Tensor
    entropy: Tensor
    temperature: Tensor


def gaussian_log_prob(action: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log density (B,) of diagonal Gaussians."""
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
    if distributed.is_initialized():
        distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    agent.largest_return.copy_(largest)
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

    A shifted atom shares its probability between its two neighbours, which keeps the mean, but not beyond the edges."""
    low, spacing = atoms[0], (atoms[-1] - atoms[0]) / (len(atoms) - 1)  # more exact than a difference of neighbours
    shifted = (reward[:, None] + discount[:, None] * atoms).clamp(atoms[0], atoms[-1])
    position = ((shifted - low) / spacing).clamp(0.0, len(atoms) - 1.0)  # in atoms; rounding may leave the range
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


class Functions(NamedTuple):
    """What build_functions makes."""

    policy: Callable  # (obs, noise) -> action in half ranges, action in the environment's units
    critic_gradients: Callable  # (noise, *batch) -> CriticTerms, stacked
    critic_step: Callable
    policy_gradients: Callable  # (noise, *batch) -> PolicyTerms, stacked
    actor_step: Callable
    sample: Callable  # (slot, env) -> Batch: gather_batch


def update(
    agent: Agent, functions: Functions, batch: Batch, noise: Tensor, first_update: int, args: Args
) -> tuple[Tensor, Tensor, int]:
    """Do all gradient steps after one step of the environments; return sums of CriticTerms and of PolicyTerms, stacked,
    and the number of policy updates.

    batch: the rows of all updates; noise: (updates, 2, B, actions); first_update: how many updates the run has done.
    The policy is updated whenever a multiple of policy_frequency is crossed. Several processes average gradients, terms
    and the buffers of the networks, which are the running moments of batch norm."""
    critic_terms = torch.zeros(len(CriticTerms._fields), device=noise.device)
    policy_terms, policy_updates = torch.zeros(len(PolicyTerms._fields), device=noise.device), 0
    for k, rows in enumerate(zip(*(x.chunk(args.updates_per_step) for x in batch), strict=True)):
        terms = functions.critic_gradients(noise[k, 0], *rows)
        buffers = *agent.critics.buffers(), *agent.target_critics.buffers()
        vecsim.average_over_processes([*(p.grad for p in agent.critics.parameters()), *buffers, terms])
        functions.critic_step()
        critic_terms += terms
        done = first_update + k
        if vecsim.crossed(args.policy_frequency, done, done + 1):
            terms = functions.policy_gradients(noise[k, 1], *rows)
            gradients = [p.grad for p in (*agent.actor.parameters(), *agent.temperature.parameters())]
            vecsim.average_over_processes([*gradients, *agent.actor.buffers(), terms])
            functions.actor_step()
            policy_terms += terms
            policy_updates += 1
    return critic_terms, policy_terms, policy_updates


# ----------------------------------------------------------------------------------------------------------------------
# Compilation and CUDA graphs
# ----------------------------------------------------------------------------------------------------------------------


def make_optimizers(
    agent: Agent, learning_rate: Tensor, temperature_learning_rate: float
) -> dict[str, torch.optim.Optimizer]:
    """One each for policy, critics and temperature, because they step at different times and rates."""
    return dict(
        actor=vecsim.make_optimizer(agent.actor, learning_rate),
        critics=vecsim.make_optimizer(agent.critics, learning_rate),
        temperature=vecsim.make_optimizer(agent.temperature, torch.full_like(learning_rate, temperature_learning_rate)),
    )


def build_functions(
    agent: Agent, optimizers: dict[str, torch.optim.Optimizer], replay: Transitions, sizes: Sizes, args: Args
) -> Functions:
    """Make the six functions, eager or compiled, and captured on a GPU. agent and optimizers do not change."""
    step_function, critic_function, policy_function = policy_step, critic_loss, policy_loss
    if args.compile:
        step_function, critic_function, policy_function = (
            torch.compile(f, dynamic=False) for f in (policy_step, critic_loss, policy_loss)
        )

    @vecsim.one_thread()
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

    def sample(slot: Tensor, env: Tensor) -> Batch:
        return gather_batch(agent, replay, slot, env, args)

    drawn = torch.zeros(2, args.updates_per_step * sizes.batch, dtype=torch.long, device=replay.reward.device)
    acting = torch.zeros_like(replay.obs[0], dtype=torch.float32), torch.zeros_like(replay.action[0])
    critic_ring = replay.obs if replay.critic_obs is None else replay.critic_obs
    row = replay.action.new_zeros(sizes.batch)
    obs, critic_obs, action = (row[:, None].repeat(1, x.shape[-1]) for x in (replay.obs, critic_ring, replay.action))
    batch = Batch(obs, critic_obs, action, row, row, obs, critic_obs, row)
    example = tuple(x.clone() for x in (action, *batch))
    functions = policy, critic_gradients, step_critics, policy_gradients, step_actor, sample
    examples = acting, example, (), example, (), tuple(drawn)
    return Functions(*vecsim.prepare(functions, examples, agent, optimizers.values(), args.cuda_graphs))


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoint
# ----------------------------------------------------------------------------------------------------------------------


def load_checkpoint(path: str) -> dict:
    """Read a checkpoint of this script onto the CPU. InputError if it is damaged or not of this script."""
    return vecsim.load_checkpoint(path, "sac", Args)


def check_resumable(checkpoint: dict, args: Args, world_size: int) -> None:
    """InputError for flags that do not fit the checkpoint's state, or that would have no effect."""
    fixed = "env_id env_kwargs preset num_envs seed network actor_hidden critic_hidden critic num_atoms value_limit"
    fixed += " normalize_observations normalize_rewards temperature_init"
    if checkpoint["args"]["checkpoint_replay"]:
        fixed += " replay_capacity half_precision_replay"
    vecsim.check_resumable(checkpoint, args, fixed, world_size)


def filled_part(replay: Transitions, written: int) -> dict:
    """What a checkpoint saves of the replay: the filled slots, copied to the CPU."""
    rings = {name: ring for name, ring in replay._asdict().items() if ring is not None}
    stored = min(written, len(replay.reward))
    return dict(written=written, rings={name: x[:stored].to("cpu", copy=True) for name, x in rings.items()})


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
#   gymnasium_return               deterministic score in Gymnasium's environment (--eval-every)
#   updates, replay_transitions    gradient steps so far; transitions in the replay
#   critic_loss, policy_loss       sum over both critics; temperature x log-probability - value of the critics
#   value, target_clipped          mean value of the first critic; share of targets outside the categorical range
#   entropy, temperature           entropy of the squashed policy in nats, in half ranges; its weight
#   learning_rate, reward_divisor  that of policy and critics; what rewards are divided by
# Losses, value and entropy are means over the gradient steps since the last line.
# ----------------------------------------------------------------------------------------------------------------------


def train(args: Args, make_env=None, stop: vecsim.StopSignals | None = None) -> dict:
    """Train, write the run folder and evaluate; return the last log record together with the evaluation.

    make_env: see the top of this file. After a signal, the iteration is finished and saved; then KeyboardInterrupt."""
    # Check the flags before anything is allocated.
    check_ranges(args)
    run = vecsim.Run(args, "sac", make_env, stop)
    sizes = derive_sizes(args, run.world_size)
    if run.checkpoint:
        check_resumable(run.checkpoint, args, run.world_size)
    env = run.start(
        sizes.envs,
        f"{args.num_envs:,} environments, {sizes.iterations:,} steps of each; {args.updates_per_step} updates "
        f"after each step, on batches of {args.batch_size:,}; one of {args.policy_frequency} updates the policy too",
    )

    # Make the networks, the replay and the functions; then continue where the checkpoint ended.
    device, generator = run.device, run.generator
    obs_size, action_size = env.single_observation_space.shape[0], env.single_action_space.shape[0]
    privileged = env.single_critic_space is not None
    critic_obs_size = env.single_critic_space.shape[0] if privileged else None
    agent = Agent(obs_size, critic_obs_size, env.single_action_space, args).to(device)
    learning_rate = torch.tensor(args.learning_rate, device=device)
    optimizers = make_optimizers(agent, learning_rate, args.temperature_learning_rate)
    replay = allocate_replay(agent, sizes, args.half_precision_replay)
    if run.rank == 0:
        size = sum(ring.nbytes for ring in replay if ring is not None) / 2**20
        print(f"replay: {sizes.slots:,} steps of {sizes.envs:,} environments, {size:,.1f} MiB in each process")
    if run.checkpoint:
        agent.load_state_dict(run.checkpoint["agent"])
        for name, optimizer in optimizers.items():
            vecsim.load_moments(optimizer, run.checkpoint["moments"][name])
    with vecsim.first_process_first():
        functions = build_functions(agent, optimizers, replay, sizes, args)
        env.reset()
        env.step(torch.zeros(sizes.envs, action_size, device=device))  # compiles the physics
    obs, info = env.reset(seed=run.env_seed)
    critic_obs = info["critic_obs"] if privileged else obs
    durations = zeta_distribution(args.noise_repeat_max).to(device)
    held = torch.zeros(sizes.envs, action_size, device=device)
    remaining = torch.zeros(sizes.envs, dtype=torch.long, device=device)
    returns = torch.zeros(sizes.envs, device=device)
    updates, written = 0, 0
    saved = run.restore()
    if saved.get("env"):
        obs, critic_obs = saved["obs"].to(device), saved["critic_obs"].to(device)
    if saved:
        updates = run.checkpoint["updates"]
        held, remaining, returns = (saved[name].to(device) for name in ("held", "remaining", "returns"))
        if saved["replay"]:
            written = load_replay(replay, saved["replay"])
            if not saved["env"]:  # the environments began new episodes
                replay.truncated[(written - 1) % sizes.slots] = True
        elif run.rank == 0:
            print("the checkpoint has no replay, so updates wait until a new one is filled; see --checkpoint-replay")
        saved["replay"] = None  # frees its memory

    critic_terms = torch.zeros(len(CriticTerms._fields), device=device)
    policy_terms = torch.zeros(len(PolicyTerms._fields), device=device)
    logged_updates, policy_updates = updates, 0
    waiting = max(0, sizes.first_slots - 1 - written)  # iterations without updates
    for iteration in run.start_clock(args.num_envs, sizes.iterations, waiting):
        # Act: at first uniformly at random, later with the policy and its exploration noise.
        fresh = torch.randn(sizes.envs, action_size, generator=generator, device=device)
        uniform = torch.rand(sizes.envs, generator=generator, device=device)
        held, remaining = hold_noise(held, remaining, fresh, uniform, durations)
        if iteration * args.num_envs < args.learning_starts:
            action = 2.0 * torch.rand(sizes.envs, action_size, generator=generator, device=device) - 1.0
            env_action = agent.to_env(action)
        else:
            with record_function("infer"):
                action, env_action = functions.policy(obs, held)
        with record_function("simulate"):
            next_obs, reward, terminated, truncated, info = env.step(env_action)
        invalid = info["invalid"]
        step = Transitions(obs, info["final_obs"], action, reward, terminated, truncated, invalid)
        agent.obs_statistics.update(obs, ~invalid)
        if privileged:
            step = step._replace(critic_obs=critic_obs, final_critic_obs=info["final_critic_obs"])
            agent.critic_obs_statistics.update(critic_obs, ~invalid)
        store(replay, written, step)
        written += 1
        if args.normalize_rewards:
            scaled = reward * args.reward_scale
            returns = follow_returns(agent, returns, scaled, terminated, invalid, args.gamma)
        obs, critic_obs = next_obs, info["critic_obs"] if privileged else next_obs

        # Update: one large draw from the replay, split into the batches of all updates.
        if written >= sizes.first_slots:
            progress = iteration / sizes.iterations
            learning_rate.fill_(args.learning_rate + progress * (args.learning_rate_final - args.learning_rate))
            rows = args.updates_per_step * sizes.batch
            with record_function("sample"):
                drawn = draw_transitions(replay, written, args.n_step, rows, generator)
                batch = functions.sample(*drawn)
            shape = args.updates_per_step, 2, sizes.batch, action_size
            noise = torch.randn(shape, generator=generator, device=device)
            with record_function("update"):
                sums = update(agent, functions, batch, noise, updates, args)
            critic_terms += sums[0]
            policy_terms += sums[1]
            policy_updates += sums[2]
            updates += args.updates_per_step
            if run.profiler:
                run.profiler.step()

        # Log, evaluate, save: each when a multiple of its interval was crossed.
        if not run.due(iteration):
            continue
        means = CriticTerms(*(critic_terms / max(1, updates - logged_updates)))._asdict()
        means |= PolicyTerms(*(policy_terms / max(1, policy_updates)))._asdict()
        means |= dict(learning_rate=learning_rate, reward_divisor=agent.reward_divisor())
        counts = dict(updates=updates, replay_transitions=min(written, sizes.slots) * args.num_envs)
        counts |= {} if updates > logged_updates else dict.fromkeys(CriticTerms._fields)  # nothing was learned
        counts |= {} if policy_updates else dict.fromkeys(PolicyTerms._fields)
        run.write_record(agent, means, needed=means, **counts)
        if run.save_now:
            mine = dict(obs=obs, critic_obs=critic_obs, held=held, remaining=remaining, returns=returns)
            mine |= dict(replay=filled_part(replay, written) if args.checkpoint_replay else None)
            moments = {name: list(optimizer.state.values()) for name, optimizer in optimizers.items()}
            run.save(mine, agent=agent.state_dict(), moments=moments, updates=updates)
            del mine  # frees the copy of the replay
        critic_terms.zero_()
        policy_terms.zero_()
        logged_updates, policy_updates = updates, 0
        run.go_on()

    result = run.finish(agent, "SAC")
    env.close()
    return result


# ----------------------------------------------------------------------------------------------------------------------
# Policy: load, export, play
# ----------------------------------------------------------------------------------------------------------------------


def load_agent(checkpoint: dict) -> Agent:
    """The agent of a checkpoint, on the CPU. The saved tensors tell its sizes."""
    saved = checkpoint["agent"]
    obs_size, critic_obs_size = (len(saved[f"{name}_statistics.mean"]) for name in ("obs", "critic_obs"))
    action_space = gymnasium.spaces.Box(-1.0, 1.0, saved["action_centre"].shape)  # the saved range replaces this one
    agent = Agent(obs_size, critic_obs_size, action_space, Args(**checkpoint["args"]))
    agent.load_state_dict(saved)
    return agent


def load_policy(checkpoint: dict):
    """The deterministic policy: act(obs (N, obs), started (N,) bool) -> action (N, actions), on the CPU."""
    return load_agent(checkpoint).act


def rms_norm_in_onnx(g, x, shape, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight in ONNX operators: PyTorch's exporter has no rule for torch.nn.RMSNorm."""
    eps = g.op("Constant", value_t=torch.tensor(torch.finfo(torch.float32).eps))  # torch.nn.RMSNorm's default
    mean_square = g.op("ReduceMean", g.op("Mul", x, x), axes_i=[-1], keepdims_i=1)
    return g.op("Mul", g.op("Div", x, g.op("Sqrt", g.op("Add", mean_square, eps))), weight)


def export(path: str, checkpoint: dict) -> None:
    """Write the deterministic policy to an ONNX file, in float32, because ONNX Runtime needs it on a CPU."""
    agent = load_agent(checkpoint)
    agent.bf16, agent.forward = False, agent.act
    torch.onnx.register_custom_op_symbolic("aten::rms_norm", rms_norm_in_onnx, opset_version=17)
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
