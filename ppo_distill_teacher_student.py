"""Teacher and student on one device: a privileged teacher learns by PPO, a student that sees less imitates it.

    python ppo_distill_teacher_student.py                                   # all stages on Quadruped-Rough, for a GPU
    python ppo_distill_teacher_student.py --student-network gru
    python ppo_distill_teacher_student.py --stages student finetune --teacher runs/NAME/teacher/checkpoint.pt
    python ppo_distill_teacher_student.py --resume runs/NAME/student/checkpoint.pt       # and then the later stages
    python ppo_distill_teacher_student.py --play runs/NAME/student/checkpoint.pt --capture-video
    python ppo_distill_teacher_student.py --play runs/NAME/student/checkpoint.pt --export policy.onnx
    python eval_panel.py runs/NAME/*/checkpoint.pt                          # compare the stages under perturbations

For two CPU cores, with fewer robots and smaller networks:

    python ppo_distill_teacher_student.py --env-id Quadruped-Flat --num-envs 512 --total-timesteps 10000000 \
        --actor-hidden 128 64 --critic-hidden 128 64 --student-hidden 128 64 --student-history 6
    python ppo_distill_teacher_student.py --num-envs 512 --total-timesteps 60000000 --env-kwargs first_levels 1 \
        --actor-hidden 128 64 --critic-hidden 128 64 --student-hidden 128 64 --student-history 6

The stages run in this order. Each has its own folder, with log and checkpoint, in the folder of the run.

    teacher     PPO. Policy and value function see the privileged observation `critic_obs`.
    student     On-policy imitation. The student acts, and the teacher's mean action labels every state that it visits.
                Each iteration learns from its own rollout only (DAgger without aggregation).
    finetune    PPO on the student. The value function starts as the teacher's and learns alone at first.
    baseline    PPO on an untrained student, with as many environment steps as the three stages above together.

The last of these commands trained for 75 minutes on one core of an AMD EPYC; results/README.md has the scores.

In a task without `critic_obs` the teacher sees `obs`, like the student.

The script needs `vecsim_torch.py` beside it, and `tasks/quadruped.py` for the quadrupeds. Copy them and they are yours.
Your own robot and your own simulator work as in ppo_gpu_torch.py: --env-id my_task.py:MyTask, or train(args, make_env).

Sources: imitation on the student's own states, Ross et al. 2011 (arXiv:1011.0686), algorithm 3.1 with beta = 0 and
without aggregation; teacher and student on rough terrain, Lee et al. 2020 (arXiv:2010.11251); PPO, Schulman et al. 2017
(arXiv:1707.06347), eq. 7; GAE, Schulman et al. 2016 (arXiv:1506.02438), eq. 16; time limits, Pardo et al. 2018
(arXiv:1712.00378); learning rate from the KL divergence, many environments, terrain, Rudin et al. 2022
(arXiv:2109.11978); a value function that sees more than the policy, Pinto et al. 2018 (arXiv:1710.06542); running
moments, Chan et al. 1983.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import gymnasium
import torch
from torch import Tensor, nn
from torch.profiler import record_function

import vecsim_torch as vecsim
from vecsim_torch import InputError, RunningStatistics, sum_over_processes, weighted_moments

# ----------------------------------------------------------------------------------------------------------------------
# Arguments
# ----------------------------------------------------------------------------------------------------------------------

Stage = Literal["teacher", "student", "finetune", "baseline"]


@dataclasses.dataclass
class Args(vecsim.RunFlags):
    """Flags of a run, on top of those that all trainers have (`vecsim_torch.RunFlags`).

    Steps are environment steps, summed over all environments, except in num_steps. These defaults are for a CPU and a
    task without a row in TASKS. Each stage draws its own random numbers, writes its own log and is evaluated."""

    env_id: str = "Quadruped-Rough"
    """task: a name that vecsim_torch.make knows, or your own as my_task.py:MyTask"""
    stages: tuple[Stage, ...] = get_args(Stage)
    """stages to run; their order is always teacher, student, finetune, baseline"""
    teacher: str | None = None
    """checkpoint of a teacher, for a run without that stage"""
    student: str | None = None
    """checkpoint of a student, fine-tuned or not, for a run without that stage"""
    num_envs: int = 1024
    """environments that are stepped in parallel, over all processes (>= 1)"""
    total_timesteps: int = 20_000_000
    """steps of teacher, student and finetune together, and of baseline (>= 3; rounded up to whole iterations)"""
    student_timesteps: int | None = None
    """steps of the stage student (>= 1; default: 15% of total_timesteps)"""
    finetune_timesteps: int | None = None
    """steps of the stage finetune (>= 1; default: 20% of total_timesteps); the teacher gets the rest"""
    checkpoint_every: int | None = None
    """steps between checkpoints (>= 1; default: a 20th of total_timesteps); the last state is always saved"""
    resume: str | None = None
    """checkpoint of a stage to continue, and then the later stages; omitted flags keep its values"""
    eval_episodes: int = 20
    """episodes of the evaluation in Gymnasium after each stage, and of --play (>= 0; 0: no evaluation)"""
    track: bool = False
    """log to Weights & Biases too, as one run per stage (needs `pip install wandb`)"""
    profile: bool = False
    """profile iterations 4 to 6 of each stage, or its last: print a table of their parts and write trace.json.gz"""

    # the networks
    actor_hidden: tuple[int, ...] = (256, 128, 64)
    """hidden layer sizes of the teacher's policy"""
    critic_hidden: tuple[int, ...] = (256, 128, 64)
    """hidden layer sizes of the value function"""
    student_network: Literal["mlp", "gru"] = "mlp"
    """memory of student and baseline: mlp sees the last student_history observations, gru has a hidden state"""
    student_hidden: tuple[int, ...] = (256, 128, 64)
    """hidden layer sizes of the policy of student and baseline, after the memory"""
    student_history: int = 10
    """mlp: observations that it sees at once, the newest included (>= 1)"""
    student_memory: int = 128
    """gru: size of the hidden state (>= 1)"""
    log_std_init: float = -1.0
    """initial log standard deviation of teacher and baseline, in units of half the action range"""
    log_std_min: float = -2.3
    """lowest log standard deviation, in the same units"""

    # PPO: teacher, finetune and baseline
    num_steps: int = 24
    """steps of each environment in an iteration (>= 1)"""
    update_epochs: int = 4
    """passes over the samples of an iteration, all in the same random order (>= 1)"""
    num_minibatches: int = 8
    """gradient steps in a pass, each on whole environments (>= 1; must divide the environments of each process)"""
    gamma: float = 0.99
    """discount per environment step (0 to 1)"""
    gae_lambda: float = 0.95
    """decay of generalised advantage estimation (0 to 1)"""
    clip_coef: float = 0.2
    """clipping range of the probability ratio (> 0; inf: no clipping)"""
    entropy_coef: float = 0.0
    """weight of the entropy bonus (>= 0)"""
    bounds_coef: float = 1e-4
    """weight of the penalty on mean actions outside 1.1 times the action range (>= 0)"""
    max_grad_norm: float = 1.0
    """largest gradient norm in every stage, for policy and value function separately (> 0; inf: no clipping)"""
    learning_rate: float = 1e-3
    """initial learning rate of Adam in teacher and baseline, and of the value function in finetune (> 0)"""
    learning_rate_max: float = 5e-3
    """highest learning rate to which the rate is adapted (> 0); the lowest is 1e-5"""
    desired_kl: float = 0.01
    """KL(old policy || new policy) to aim at; the learning rate is adapted to it (> 0)"""

    # imitation: student
    distill_steps: int = 120
    """steps of each environment in an iteration (>= 1)"""
    distill_epochs: int = 2
    """passes over the samples of an iteration (>= 1)"""
    distill_minibatches: int = 4
    """groups of environments in a pass (>= 1; must divide the environments of each process)"""
    gradient_length: int = 15
    """consecutive steps in a gradient step; a GRU's gradient goes back no further (>= 1; must divide distill_steps)"""
    distill_learning_rate: float = 1e-3
    """initial learning rate of Adam; it decays linearly to 0 over the stage (> 0)"""
    distill_noise: float = 0.1
    """standard deviation of the noise on the student's actions, in units of half the action range (> 0)"""

    # finetune
    critic_warmup_iterations: int = 20
    """iterations in which the policy is frozen and only the value function learns (>= 0)"""
    finetune_learning_rate: float = 1e-4
    """learning rate of Adam when the policy begins to learn; it is adapted from then on (> 0)"""
    finetune_log_std: float = -1.6
    """initial log standard deviation of the stage, in units of half the action range"""


# Flags of a task that differ from the defaults. The quadruped acts 50 times a second; reward_scale 50 turns its rewards
# into rewards per second. Its returns are then large compared with the output of an untrained value function.
TASKS = {
    "Quadruped-Flat": dict(
        total_timesteps=75_000_000, env_kwargs={"randomize": True}, reward_scale=50.0, num_minibatches=4,
        entropy_coef=0.005, desired_kl=0.02),
    "Quadruped-Rough": dict(
        total_timesteps=300_000_000, num_envs=4096, env_kwargs={"randomize": True}, reward_scale=50.0,
        num_minibatches=4, entropy_coef=0.005, desired_kl=0.02, actor_hidden=(512, 256, 128),
        critic_hidden=(512, 256, 128), student_hidden=(512, 256, 128)),
}  # fmt: skip


def task_defaults(env_id: str, device: str = "auto") -> Args:
    """The defaults of a task: its row in TASKS on top of those of Args.

    A GPU has four times the environments, 4,096 at most, and as many times the steps. So a run has as many iterations
    and gradient steps as on a CPU, each on more samples."""
    args = Args(env_id=env_id, device=device, **TASKS.get(env_id, {}))
    return vecsim.sizes_for_device(args, "total_timesteps", factor=4, most=4096)


def parse_args(argv: list[str]) -> Args:
    """Read the flags. Omitted flags have the task's values, or the checkpoint's with --resume and --play."""
    return vecsim.parse_args(argv, "distill", Args(), lambda given: task_defaults(given.env_id, given.device), __doc__)


# ----------------------------------------------------------------------------------------------------------------------
# Sizes and checks
# ----------------------------------------------------------------------------------------------------------------------


def check_ranges(args: Args) -> None:
    """InputError for a flag that is out of its range."""
    counts = "student_history student_memory num_steps update_epochs num_minibatches distill_steps distill_epochs"
    counts += " distill_minibatches gradient_length"
    positive = "learning_rate learning_rate_max desired_kl distill_learning_rate distill_noise"
    rules = (  # flags, whether a value is legal, and the rule in words
        (counts, lambda x: x >= 1, ">= 1"),
        ("student_timesteps finetune_timesteps", lambda x: x is None or x >= 1, ">= 1"),
        ("critic_warmup_iterations", lambda x: x >= 0, ">= 0"),
        ("gamma gae_lambda", lambda x: 0 <= x <= 1, "between 0 and 1"),
        ("entropy_coef bounds_coef", lambda x: 0 <= x < math.inf, ">= 0 and finite"),
        (f"{positive} finetune_learning_rate", lambda x: 0 < x < math.inf, "> 0 and finite"),
        ("clip_coef max_grad_norm", lambda x: x > 0, "> 0"),
        ("log_std_init log_std_min finetune_log_std", math.isfinite, "finite"),
        ("actor_hidden critic_hidden student_hidden", lambda x: all(size >= 1 for size in x), "sizes >= 1"),
    )
    vecsim.check_rules(args, rules)


class Plan(NamedTuple):
    """The length of a stage."""

    num_steps: int  # of each environment in an iteration
    steps_per_iteration: int  # environment steps of all processes
    iterations: int
    gradient_steps: int  # in an iteration


class Sizes(NamedTuple):
    """Numbers that follow from the flags."""

    envs: int  # environments of this process
    minibatch: int  # environments of this process in a gradient step of PPO
    microbatch: int  # environments of this process in a backward pass of PPO
    distill_minibatch: int  # environments of this process in a gradient step of the imitation
    plans: dict[str, Plan]  # of each stage


def derive_sizes(args: Args, world_size: int, device: torch.device) -> Sizes:
    """InputError if something does not split evenly, with the nearest numbers that do, or if no steps are left."""
    envs = args.num_envs // world_size
    splits = (  # a number, and the number that it must divide
        ("the number of processes", world_size, "num_envs", args.num_envs),
        ("num_minibatches", args.num_minibatches, "num_envs per process", envs),
        ("distill_minibatches", args.distill_minibatches, "num_envs per process", envs),
        ("gradient_length", args.gradient_length, "distill_steps", args.distill_steps),
    )
    for name, parts, of, whole in splits:
        if whole % parts:
            divisors = [n for n in range(1, min(whole, 10**6) + 1) if whole % n == 0]
            nearest = sorted(sorted(divisors, key=lambda n: abs(n - parts))[:2])
            choices = " or ".join(str(n) for n in nearest)
            raise InputError(f"{name} = {parts} does not divide {of} = {whole:,}; use {choices}")
    student_timesteps = args.student_timesteps or max(1, args.total_timesteps * 15 // 100)
    finetune_timesteps = args.finetune_timesteps or max(1, args.total_timesteps * 20 // 100)
    teacher_timesteps = args.total_timesteps - student_timesteps - finetune_timesteps
    if teacher_timesteps < 1:
        spent = f"student_timesteps + finetune_timesteps = {student_timesteps + finetune_timesteps:,}"
        raise InputError(f"total_timesteps = {args.total_timesteps:,} must be > {spent}")

    def plan(timesteps: int, num_steps: int, gradient_steps: int) -> Plan:
        steps_per_iteration = num_steps * args.num_envs
        return Plan(num_steps, steps_per_iteration, math.ceil(timesteps / steps_per_iteration), gradient_steps)

    of_ppo = args.num_steps, args.update_epochs * args.num_minibatches
    slices = args.distill_steps // args.gradient_length
    imitation_steps = args.distill_epochs * args.distill_minibatches * slices
    plans = dict(
        teacher=plan(teacher_timesteps, *of_ppo),
        student=plan(student_timesteps, args.distill_steps, imitation_steps),
        finetune=plan(finetune_timesteps, *of_ppo),
        baseline=plan(args.total_timesteps, *of_ppo),
    )
    minibatch, distill_minibatch = envs // args.num_minibatches, envs // args.distill_minibatches
    largest = max(1, 2048 // args.num_steps) if device.type == "cpu" else minibatch  # 2,048 samples fit a CPU's cache
    microbatch = math.ceil(minibatch / math.ceil(minibatch / largest))
    return Sizes(envs, minibatch, microbatch, distill_minibatch, plans)


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


def stack_history(obs: Tensor, memory: Tensor, started: Tensor, history: int) -> tuple[Tensor, Tensor]:
    """Join the last `history` observations of each step, oldest first: (T, N, history k). Return the next memory too.

    obs: (T, N, k), T steps in order. memory: (N, (history - 1) k), the observations before the first step.
    started: (T, N) bool, True where an episode begins. Observations of an earlier episode become 0."""
    steps, envs, size = obs.shape
    past = memory.reshape(envs, history - 1, size).transpose(0, 1)
    frames = torch.cat([past, obs])  # (history - 1 + T, N, k)
    episode = started.long().cumsum(0)  # number of the episode; 0 was running before the first step
    episodes = torch.cat([episode.new_zeros(history - 1, envs), episode])
    stack = []
    for age in range(history):
        same = episodes[age : age + steps] == episode
        stack.append(torch.where(same[..., None], frames[age : age + steps], 0.0))
    features = torch.cat(stack, -1)
    return features, features[-1, :, size:].contiguous()  # contiguous: another layout would be compiled once more


def unroll_gru(cell: nn.GRUCell, obs: Tensor, memory: Tensor, started: Tensor) -> tuple[Tensor, Tensor]:
    """Observation and hidden state of each step, (T, N, k + h), and the hidden state after the last step.

    obs: (T, N, k), T steps in order. memory: (N, h), the hidden state before the first step. started: (T, N) bool, True
    where an episode begins: there the hidden state is set to 0 first."""
    hidden = []
    for t in range(len(obs)):
        memory = cell(obs[t], torch.where(started[t][:, None], 0.0, memory))
        hidden.append(memory)
    return torch.cat([obs, torch.stack(hidden)], -1), memory


class Agent(nn.Module):
    """Gaussian policy and value function, two networks. The policy acts in half ranges: -1 to 1 is the action range.

    In all stages except the teacher the policy has a memory (N, memory_size): the last normalised observations, or the
    hidden state of a GRU. The agent does not keep it. It is an input and an output of each step, so rollouts and
    checkpoints store it like any other tensor. The memory of a teacher has no columns."""

    def __init__(self, stage: str, obs_size: int, critic_obs_size: int, action_space: gymnasium.spaces.Box, args: Args):
        super().__init__()
        low, high = torch.as_tensor(action_space.low), torch.as_tensor(action_space.high)
        bounded = low.isfinite() & high.isfinite()
        self.register_buffer("action_centre", torch.where(bounded, (high + low) / 2, 0.0))
        self.register_buffer("action_half_range", torch.where(bounded, (high - low) / 2, 1.0))
        self.obs_statistics = RunningStatistics(obs_size, enabled=True, limit=10.0)
        self.critic_obs_statistics = RunningStatistics(critic_obs_size, enabled=True, limit=10.0)
        self.return_statistics = RunningStatistics(1, enabled=True)
        remembers = stage != "teacher"
        recurrent = remembers and args.student_network == "gru"
        self.history = args.student_history if remembers and not recurrent else 1
        self.memory_size = args.student_memory if recurrent else (self.history - 1) * obs_size
        self.gru = nn.GRUCell(obs_size, self.memory_size) if recurrent else None
        hidden = args.student_hidden if remembers else args.actor_hidden
        self.actor = mlp([obs_size + self.memory_size, *hidden, len(low)], last_gain=0.01)
        self.critic = mlp([critic_obs_size, *args.critic_hidden, 1], last_gain=1.0)
        self.log_std = nn.Parameter(torch.full((len(low),), args.log_std_init))  # independent of the state

    def policy_parameters(self) -> list[nn.Parameter]:
        return [x for name, x in self.named_parameters() if not name.startswith("critic.")]

    def empty_memory(self, envs: int) -> Tensor:
        return self.log_std.new_zeros(envs, self.memory_size)

    def policy_mean(self, normalized_obs: Tensor, memory: Tensor, started: Tensor) -> tuple[Tensor, Tensor]:
        """Means (T, N, actions) of T steps in order, in half ranges, and the memory after the last step.

        normalized_obs: (T, N, obs). memory: (N, memory_size) before the first step. started: (T, N) bool, True where an
        episode begins."""
        if self.gru is None:
            features, memory = stack_history(normalized_obs, memory, started, self.history)
        else:
            features, memory = unroll_gru(self.gru, normalized_obs, memory, started)
        return self.actor(features), memory

    def normalized_value(self, normalized_critic_obs: Tensor) -> Tensor:
        return self.critic(normalized_critic_obs).squeeze(-1)  # (..., critic obs) -> (...)

    def to_env(self, action: Tensor) -> Tensor:
        """Half ranges to the environment's units."""
        return self.action_centre + self.action_half_range * action

    @torch.no_grad()
    def act(self, obs: Tensor, memory: Tensor, started: Tensor) -> tuple[Tensor, Tensor]:
        """The deterministic action (N, actions) in the environment's units, and the memory after it."""
        mean, memory = self.policy_mean(self.obs_statistics.normalize(obs)[None], memory, started[None])
        return self.to_env(mean[0]), memory


def make_agent(stage: str, env: Any, args: Args) -> Agent:
    """An untrained agent of this stage on the CPU. A teacher's policy sees what the value function sees."""
    obs_size = critic_obs_size = env.single_observation_space.shape[0]
    if env.single_critic_space is not None:
        critic_obs_size = env.single_critic_space.shape[0]
    seen = critic_obs_size if stage == "teacher" else obs_size
    return Agent(stage, seen, critic_obs_size, env.single_action_space, args)


# ----------------------------------------------------------------------------------------------------------------------
# Algorithm: pure functions
# ----------------------------------------------------------------------------------------------------------------------


class Rollout(NamedTuple):
    """The transitions of one iteration on the device: T = steps of an iteration, N = environments of this process."""

    obs: Tensor  # (T, N, obs): what the policy saw
    started: Tensor  # (T, N) bool: the observation begins an episode
    memory: Tensor  # (N, memory): of the policy, before the first step
    critic_obs: Tensor  # (T, N, critic obs)
    final_critic_obs: Tensor  # (T, N, critic obs): what the step led to, before any automatic reset
    action: Tensor  # (T, N, actions), half ranges
    mean: Tensor  # (T, N, actions), half ranges: the mean of the policy that acted
    reward: Tensor  # (T, N), scaled
    terminated: Tensor  # (T, N) bool
    truncated: Tensor  # (T, N) bool
    invalid: Tensor  # (T, N) bool: the simulation diverged; such a quarantined step is ignored by the learner


def allocate_rollout(steps: int, envs: int, agent: Agent, device: torch.device) -> Rollout:
    """An empty rollout of the sizes of this agent's observations, memory and actions."""

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(steps, envs, *shape, dtype=dtype, device=device)

    sizes = [len(x) for x in (agent.obs_statistics.mean, agent.critic_obs_statistics.mean, agent.log_std)]
    obs, critic_obs, actions = sizes
    started, *flags = [zeros(dtype=torch.bool) for _ in range(4)]
    features = zeros(critic_obs), zeros(critic_obs), zeros(actions), zeros(actions), zeros()
    return Rollout(zeros(obs), started, agent.empty_memory(envs), *features, *flags)


class Batch(NamedTuple):
    """The samples of one update, T steps in order of B environments, with the outputs of the old policy."""

    obs: Tensor  # (T, B, obs), normalised
    started: Tensor  # (T, B) bool
    memory: Tensor  # (1, B, memory), before the first step
    critic_obs: Tensor  # (T, B, critic obs), normalised
    action: Tensor  # (T, B, actions), half ranges
    mean: Tensor  # (T, B, actions), old policy
    log_prob: Tensor  # (T, B), old policy
    target: Tensor  # (T, B), the return that the value function learns, normalised
    advantage: Tensor  # (T, B)
    weight: Tensor  # (T, B): 0 for a quarantined transition, equal for all others; the mean is 1


class LossTerms(NamedTuple):
    """PPO: means over a minibatch, in the order in which ppo_loss stacks them."""

    policy_loss: Tensor
    value_loss: Tensor
    bounds_loss: Tensor
    entropy: Tensor
    kl: Tensor
    clip_fraction: Tensor


class ImitationTerms(NamedTuple):
    """Imitation: means over a minibatch and over the actions, in the order in which imitation_loss stacks them."""

    imitation_loss: Tensor  # squared difference to the teacher's action, half ranges squared
    action_error: Tensor  # absolute difference to the teacher's action, half ranges


@torch.no_grad()
def policy_step(
    agent: Agent, obs: Tensor, memory: Tensor, started: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and sampled action (N, actions) in half ranges, that action in the environment's units, the next memory."""
    mean, memory = agent.policy_mean(agent.obs_statistics.normalize(obs)[None], memory, started[None])
    action = mean[0] + agent.log_std.exp() * noise
    return mean[0], action, agent.to_env(action), memory


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
def make_batch(agent: Agent, rollout: Rollout, value: Tensor, advantage: Tensor, order: Tensor) -> Batch:
    """Normalise the samples and shuffle the environments once. Every epoch then walks over the same minibatches.

    The return statistics are updated here and nowhere else, before they scale the targets. order: (N,) permutation."""
    valid, returns = ~rollout.invalid, advantage + value
    agent.return_statistics.update(returns.flatten()[:, None], valid.flatten())
    count, mean, variance = weighted_moments(advantage.flatten()[:, None], valid.flatten())
    advantage = (advantage - mean.float()) / (variance.sqrt().float() + 1e-8)
    weight = valid * (sum_over_processes(torch.full_like(count, valid.numel())) / count.clamp(min=1.0)).float()
    obs = agent.obs_statistics.normalize(rollout.obs)
    critic_obs = agent.critic_obs_statistics.normalize(rollout.critic_obs)
    log_prob = gaussian_log_prob(rollout.action, rollout.mean, agent.log_std)
    target = agent.return_statistics.normalize(returns)
    # A quarantined transition may hold NaN, which a weight of 0 would not remove.
    advantage, target = (torch.where(valid, x, 0.0) for x in (advantage, target))
    sequences = obs, rollout.started, rollout.memory[None], critic_obs, rollout.action, rollout.mean, log_prob
    return Batch(*(x[:, order] for x in (*sequences, target, advantage, weight)))


def ppo_loss(agent: Agent, batch: Batch, old_log_std: Tensor, samples: int, args: Args) -> tuple[Tensor, Tensor]:
    """The loss of this (part of a) minibatch of `samples` samples, and its LossTerms, stacked; parts add up.

    There is no value_coef: policy and value function share no weights, their gradients are clipped separately, and Adam
    ignores the scale of a gradient that is not clipped."""
    mean, _ = agent.policy_mean(batch.obs, batch.memory[0], batch.started)
    value = agent.normalized_value(batch.critic_obs)
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
        terms = (torch.stack(terms) * batch.weight).sum((1, 2)) / samples
    return (loss * batch.weight).sum() / samples, terms


def accumulate_gradients(
    agent: Agent, batch: Batch, old_log_std: Tensor, microbatch: int, loss_function: Callable, args: Args
) -> Tensor:
    """Add up the gradients of a minibatch over parts of `microbatch` environments; return its LossTerms, stacked."""
    agent.zero_grad()
    total = 0.0
    for part in zip(*(x.split(microbatch, 1) for x in batch), strict=True):
        loss, terms = loss_function(agent, Batch(*part), old_log_std, batch.weight.numel(), args)
        loss.backward()
        total = total + terms
    return total


@torch.no_grad()
def apply_gradients(agent: Agent, optimizer: torch.optim.Optimizer, policy_frozen: bool, args: Args) -> None:
    """Clip the gradients, take one Adam step, then keep the exploration noise above its floor.

    policy_frozen: only the value function moves, and Adam's state of the policy stays that of the start."""
    policy = agent.policy_parameters()
    if policy_frozen:
        for parameter in policy:
            parameter.grad.zero_()
    nn.utils.clip_grad_norm_(policy, args.max_grad_norm)
    nn.utils.clip_grad_norm_(agent.critic.parameters(), args.max_grad_norm)
    optimizer.step()
    if policy_frozen:
        for parameter in policy:
            optimizer.state[parameter]["step"].zero_()  # Adam's bias correction must not count the frozen steps
    else:
        agent.log_std.clamp_(min=args.log_std_min)


def adapted_learning_rate(
    learning_rate: Tensor, kl: Tensor, desired_kl: float, lowest: float, highest: float
) -> Tensor:
    """Divide by 1.5 if kl, the policy's change, is over twice the desired one; multiply by 1.5 if it is under half."""
    factor = torch.where(kl > 2.0 * desired_kl, 1.0 / 1.5, torch.where(kl < 0.5 * desired_kl, 1.5, 1.0))
    return (learning_rate * factor).clamp(lowest, highest)


class Functions(NamedTuple):
    """What build_ppo makes."""

    policy: Callable  # (obs, memory, started, noise): policy_step
    estimate: Callable  # (): values_and_advantages
    accumulate: Callable  # (old_log_std, *batch): accumulate_gradients
    take_step: Callable  # (): apply_gradients
    take_frozen_step: Callable  # (): apply_gradients, which leaves the policy as it is


def update(
    agent: Agent, functions: Functions, batch: Batch, policy_frozen: bool, learning_rate: Tensor, args: Args
) -> Tensor:
    """All gradient steps of an iteration of PPO; returns the sum of their LossTerms, stacked.

    Each minibatch measures how far the policy has moved since the rollout, adapts the learning rate, takes a step."""
    old_log_std = agent.log_std.detach().clone()
    total = torch.zeros(len(LossTerms._fields), device=old_log_std.device)
    minibatches = list(zip(*(x.chunk(args.num_minibatches, 1) for x in batch), strict=True))
    take_step = functions.take_frozen_step if policy_frozen else functions.take_step
    for k, rows in enumerate(minibatches * args.update_epochs):
        terms = functions.accumulate(old_log_std, *rows)
        vecsim.average_over_processes([*(p.grad for p in agent.parameters()), terms])
        policy_moved = k > 0  # before the first step the divergence is 0 and says nothing
        if policy_moved and not policy_frozen:
            kl = LossTerms(*terms).kl
            rate = adapted_learning_rate(learning_rate, kl, args.desired_kl, 1e-5, args.learning_rate_max)
            learning_rate.copy_(rate)
        take_step()
        total += terms
    return total


@torch.no_grad()
def teacher_actions(teacher: Agent, obs: Tensor) -> Tensor:
    """The teacher's mean actions (T, N, actions) in half ranges. obs: (T, N, critic obs), not normalised.

    The teacher keeps the statistics of its training. It has no memory, so it ignores `started`."""
    started = torch.ones(obs.shape[:2], dtype=torch.bool, device=obs.device)
    return teacher.policy_mean(teacher.obs_statistics.normalize(obs), teacher.empty_memory(obs.shape[1]), started)[0]


def imitation_loss(
    agent: Agent, obs: Tensor, started: Tensor, memory: Tensor, label: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean squared difference to the labels over some steps, ImitationTerms, stacked, and the memory after the steps.

    obs: (T, B, obs), normalised. started: (T, B) bool. memory: (B, memory), before the first step. label: (T, B,
    actions), half ranges. weight: (T, B), 0 for a quarantined transition, else 1."""
    mean, memory = agent.policy_mean(obs, memory, started)
    total = weight.sum().clamp(min=1.0)
    loss = ((mean - label).square().mean(-1) * weight).sum() / total
    error = ((mean - label).abs().mean(-1) * weight).sum() / total
    return loss, torch.stack([loss, error]).detach(), memory


def imitation_gradients(agent: Agent, loss_function: Callable, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Set the gradients of the agent to those of imitation_loss; return its terms and the memory after the steps.

    inputs: obs, started, memory, label and weight, as for imitation_loss."""
    loss, terms, memory = loss_function(agent, *inputs)
    agent.zero_grad(set_to_none=False)
    loss.backward()
    return terms, memory.detach()


class ImitationFunctions(NamedTuple):
    """What build_imitation makes."""

    policy: Callable  # (obs, memory, started, noise): policy_step
    label: Callable  # (): teacher_actions in the rollout
    gradients: Callable  # (obs, started, memory, label, weight): imitation_gradients
    take_step: Callable  # (): clip the gradients and take one Adam step


def imitate(
    agent: Agent, functions: ImitationFunctions, rollout: Rollout, label: Tensor, order: Tensor, args: Args
) -> Tensor:
    """All gradient steps of an iteration of imitation; returns the sum of their ImitationTerms, stacked.

    Each gradient step takes gradient_length consecutive steps of a minibatch of environments, in order of time. The
    memory goes on to the next gradient step, its gradient does not. label: (T, N, actions), half ranges. order: (N,)
    permutation of the environments."""
    sequences = agent.obs_statistics.normalize(rollout.obs), rollout.started, label, (~rollout.invalid).float()
    total = torch.zeros(len(ImitationTerms._fields), device=label.device)
    for _ in range(args.distill_epochs):
        for envs in order.chunk(args.distill_minibatches):
            memory = rollout.memory[envs]
            slices = (x[:, envs].split(args.gradient_length) for x in sequences)
            for obs, started, target, weight in zip(*slices, strict=True):
                terms, memory = functions.gradients(obs, started, memory, target, weight)
                vecsim.average_over_processes([*(p.grad for p in agent.parameters()), terms])
                functions.take_step()
                total += terms
    return total


# ----------------------------------------------------------------------------------------------------------------------
# Compilation and CUDA graphs
# ----------------------------------------------------------------------------------------------------------------------


def compiled(function: Callable, args: Args) -> Callable:
    return torch.compile(function, dynamic=False) if args.compile else function


def build_ppo(agent: Agent, optimizer: torch.optim.Optimizer, rollout: Rollout, sizes: Sizes, args: Args) -> Functions:
    """Make the five functions, eager or compiled, and captured on a GPU."""
    step_function, loss_function = compiled(policy_step, args), compiled(ppo_loss, args)

    @vecsim.one_thread()
    def policy(obs: Tensor, memory: Tensor, started: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        return step_function(agent, obs, memory, started, noise)

    def estimate() -> tuple[Tensor, Tensor]:
        samples = sizes.microbatch * len(rollout.reward)
        return values_and_advantages(agent, rollout, samples, args.gamma, args.gae_lambda)

    def accumulate(old_log_std: Tensor, *batch: Tensor) -> Tensor:
        return accumulate_gradients(agent, Batch(*batch), old_log_std, sizes.microbatch, loss_function, args)

    def take_step() -> None:
        apply_gradients(agent, optimizer, False, args)

    def take_frozen_step() -> None:
        apply_gradients(agent, optimizer, True, args)

    acting = rollout.obs[0], rollout.memory, rollout.started[0], rollout.action[0]
    features = rollout.obs, rollout.started, rollout.memory[None], rollout.critic_obs, rollout.action, rollout.mean
    example = [x[:, : sizes.minibatch] for x in (*features, *[rollout.reward] * 4)]
    examples = acting, (), (agent.log_std.detach(), *example), (), ()
    functions = policy, estimate, accumulate, take_step, take_frozen_step
    return Functions(*vecsim.prepare(functions, examples, agent, [optimizer], args.cuda_graphs))


def build_imitation(
    agent: Agent, teacher: Agent, optimizer: torch.optim.Optimizer, rollout: Rollout, sizes: Sizes, args: Args
) -> ImitationFunctions:
    """Make the four functions, eager or compiled, and captured on a GPU."""
    step_function, loss_function = compiled(policy_step, args), compiled(imitation_loss, args)

    @vecsim.one_thread()
    def policy(obs: Tensor, memory: Tensor, started: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        return step_function(agent, obs, memory, started, noise)

    def label() -> Tensor:
        return teacher_actions(teacher, rollout.critic_obs)

    def gradients(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return imitation_gradients(agent, loss_function, *inputs)

    def take_step() -> None:
        nn.utils.clip_grad_norm_(agent.policy_parameters(), args.max_grad_norm)
        optimizer.step()

    acting = rollout.obs[0], rollout.memory, rollout.started[0], rollout.action[0]
    envs = torch.arange(sizes.distill_minibatch, device=rollout.obs.device)
    sequences = rollout.obs, rollout.started, rollout.action, rollout.reward
    obs, started, action, weight = (x[: args.gradient_length, envs] for x in sequences)
    functions = policy, label, gradients, take_step
    examples = acting, (), (obs, started, rollout.memory[envs], action, weight), ()
    return ImitationFunctions(*vecsim.prepare(functions, examples, agent, [optimizer], args.cuda_graphs))


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoint
# ----------------------------------------------------------------------------------------------------------------------


def load_checkpoint(path: str) -> dict:
    """Read a checkpoint of this script onto the CPU. InputError if it is damaged or not of this script."""
    return vecsim.load_checkpoint(path, "distill", Args)


def describe_agent(stage: str, env: Any, args: Args) -> dict:
    """What the weights of an agent depend on: the parts of its observations, its actions and its networks."""
    student = "student_network student_hidden student_history student_memory"
    names = f"critic_hidden {'actor_hidden' if stage == 'teacher' else student}"
    description = {name: getattr(args, name) for name in names.split()}
    spaces = dict(obs=env.single_observation_space, critic_obs=env.single_critic_space or env.single_observation_space)
    slices = dict(obs=getattr(env, "observation_slices", {}), critic_obs=getattr(env, "critic_slices", {}))
    for seen in ["critic_obs"] if stage == "teacher" else ["obs", "critic_obs"]:
        parts = [f"{name} {part.stop - part.start}" for name, part in slices[seen].items()]
        description[seen] = ", ".join(parts) or f"{spaces[seen].shape[0]} numbers"
    actions = env.single_action_space.shape[0]
    return description | dict(actions=actions, action_scale=args.env_kwargs.get("action_scale"))


def load_start(needed: str, env: Any, args: Args) -> dict[str, Tensor]:
    """The weights in the checkpoint of --teacher or --student. InputError if they do not fit this run."""
    path = getattr(args, needed)
    if not path:
        raise InputError(
            f"stages = {' '.join(args.stages)} start from a {needed}; give --{needed} PATH or add that stage"
        )
    checkpoint = load_checkpoint(path)
    found, then, now = checkpoint["stage"], checkpoint["description"], describe_agent(needed, env, args)
    if found != needed and (needed, found) != ("student", "finetune"):
        raise InputError(f"{path} is the checkpoint of a {found}, not of a {needed}")
    for name, value in then.items():
        if value != now[name]:
            raise InputError(f"{path} was trained with {name} = {value}; this run has {name} = {now[name]}")
    return checkpoint["agent"]


def stages_to_run(args: Args, checkpoint: dict | None, sizes: Sizes) -> list[str]:
    """The stages in order; with --resume those that the checkpoint has not finished. InputError if none is left."""
    order, reached = list(get_args(Stage)), 0
    if checkpoint:
        finished = checkpoint["iteration"] >= sizes.plans[checkpoint["stage"]].iterations
        reached = order.index(checkpoint["stage"]) + finished
    stages = [stage for stage in order[reached:] if stage in args.stages]
    if not stages:
        done = f"; the checkpoint has finished {checkpoint['stage']}" if checkpoint else ""
        raise InputError(f"stages = {' '.join(args.stages)} leaves nothing to run{done}")
    return stages


def check_resumable(checkpoint: dict, args: Args, world_size: int) -> None:
    """InputError for flags that do not fit the checkpoint's state, or that would have no effect."""
    fixed = "env_id env_kwargs num_envs num_steps distill_steps seed teacher student actor_hidden critic_hidden"
    fixed += " student_network student_hidden student_history student_memory log_std_init distill_noise"
    fixed += " finetune_log_std critic_warmup_iterations"
    vecsim.check_resumable(checkpoint, args, fixed, world_size)


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def critic_observation(env: Any, obs: Tensor, info: dict, prefix: str = "") -> Tensor:
    """The privileged observation (N, critic obs), or `obs` if the task has none. prefix: "final_" or nothing."""
    return obs if env.single_critic_space is None else info[f"{prefix}critic_obs"]


class Moment(NamedTuple):
    """What the policy needs for the next step of the environments."""

    obs: Tensor  # (N, obs)
    critic_obs: Tensor  # (N, critic obs); the very tensor obs if the task has no privileged observation
    memory: Tensor  # (N, memory)
    started: Tensor  # (N,) bool: the observation begins an episode


class StageRun(vecsim.Run):
    """One stage in training: a run with its own folder, agent, optimizer, log and checkpoint.

    Its random numbers depend only on the seed and the stage: alone and within a run it gives the same result."""

    checkpoints = 20

    def __init__(self, stage: str, whole: vecsim.Run, sizes: Sizes, starts: dict[str, dict], resumed: bool):
        """whole: what the stages share, such as flags and environment. Start from the weights in `starts`, by stage, or
        go on from the stage's own checkpoint."""
        vars(self).update(vars(whole))
        self.began, self.stage, self.run_dir = time.perf_counter(), stage, whole.run_dir / stage
        self.label = f" the {stage}"
        self.sizes, self.plan = sizes, sizes.plans[stage]
        args, env, device, envs = self.args, self.env, self.device, sizes.envs
        if not resumed:
            self.checkpoint, self.seed = None, args.seed
            self.iteration, self.env_steps, self.train_seconds = 0, 0, 0.0
        stream, checkpoint = 3 * get_args(Stage).index(stage), self.checkpoint
        torch.manual_seed(vecsim.stream_seed(args.seed, 0, stream))  # the initial weights, the same in every process
        self.generator = torch.Generator(device).manual_seed(vecsim.stream_seed(self.seed, self.rank, stream + 1))
        self.agent, self.teacher = make_agent(stage, env, args).to(device), None
        self.observes = "critic_obs" if stage == "teacher" and env.single_critic_space is not None else "obs"
        self.learning_rate = torch.tensor(args.learning_rate, device=device)  # the optimizer reads it
        if stage == "student":
            self.teacher = make_agent("teacher", env, args).to(device).requires_grad_(False)
            self.teacher.load_state_dict(checkpoint["teacher"] if checkpoint else starts["teacher"])
            self.agent.log_std.data.fill_(math.log(args.distill_noise))
            for part in ("critic", "critic_obs_statistics", "return_statistics"):  # for the fine-tuning
                getattr(self.agent, part).load_state_dict(getattr(self.teacher, part).state_dict())
        elif stage == "finetune" and not checkpoint:
            self.agent.load_state_dict(starts["student"])
            self.agent.log_std.data.fill_(args.finetune_log_std)
        self.optimizer = vecsim.make_optimizer(self.agent, self.learning_rate)
        self.rollout = allocate_rollout(self.plan.num_steps, envs, self.agent, device)
        self.names = ImitationTerms._fields if stage == "student" else LossTerms._fields
        self.terms = torch.zeros(len(self.names), device=device)
        env.random_initial_ages = True  # so that the robots do not reach the time limit together
        obs, info = env.reset(seed=vecsim.stream_seed(self.seed, self.rank, stream + 2))
        started = torch.ones(envs, dtype=torch.bool, device=device)
        self.moment = Moment(obs, critic_observation(env, obs, info), self.agent.empty_memory(envs), started)
        if checkpoint:
            self.load(checkpoint)
        self.open_log()
        if self.rank == 0:
            plan = self.plan
            print(
                f"{stage}: {args.num_envs:,} environments x {plan.num_steps} steps = {plan.steps_per_iteration:,} "
                f"samples, {plan.gradient_steps} gradient steps, {plan.iterations:,} times"
            )

    def load(self, checkpoint: dict) -> None:
        """Go on from this checkpoint. Exactly so, if it is of the same kind of device."""
        self.agent.load_state_dict(checkpoint["agent"])
        vecsim.load_moments(self.optimizer, checkpoint["moments"])
        self.learning_rate.copy_(checkpoint["learning_rate"])
        flag = "finetune_learning_rate" if self.stage == "finetune" else "learning_rate"
        if getattr(self.args, flag) != checkpoint["args"][flag]:  # a new value wins over the adapted one
            self.learning_rate.fill_(getattr(self.args, flag))
        saved = self.restore()
        if saved["env"]:
            self.moment = Moment(*(x.to(self.device) for x in saved["moment"]))

    def collect(self, policy: Callable) -> Tensor:
        """Fill the rollout of an iteration; return the order (N,) in which its environments are shuffled.

        The rollout gets copies, because the simulator's tensors live until its next step."""
        rollout, moment = self.rollout, self.moment
        noise = torch.randn(rollout.action.shape, generator=self.generator, device=self.device)
        rollout.memory.copy_(moment.memory)
        for t in range(self.plan.num_steps):
            seen = moment.critic_obs if self.stage == "teacher" else moment.obs
            rollout.obs[t], rollout.started[t], rollout.critic_obs[t] = seen, moment.started, moment.critic_obs
            with record_function("infer"):
                outputs = policy(seen, moment.memory, moment.started, noise[t])
                rollout.mean[t], rollout.action[t], env_action, memory = outputs
            with record_function("simulate"):
                obs, reward, rollout.terminated[t], rollout.truncated[t], info = self.env.step(env_action)
            rollout.reward[t], rollout.invalid[t] = reward * self.args.reward_scale, info["invalid"]
            rollout.final_critic_obs[t] = critic_observation(self.env, info["final_obs"], info, "final_")
            started = rollout.terminated[t] | rollout.truncated[t] | rollout.invalid[t]
            moment = Moment(obs, critic_observation(self.env, obs, info), memory, started)
        self.moment = moment
        return torch.randperm(self.sizes.envs, generator=self.generator, device=self.device)

    def end_iteration(self, terms: Tensor) -> None:
        """Log and save, each when a multiple of its interval was crossed. terms: sums over the gradient steps."""
        self.terms += terms
        if self.profiler:
            self.profiler.step()
        if not self.due(self.iteration):
            return
        gradient_steps = (self.env_steps - self.logged_step) // self.plan.steps_per_iteration * self.plan.gradient_steps
        means = dict(zip(self.names, self.terms / gradient_steps, strict=True))
        means |= dict(learning_rate=self.learning_rate, action_std=self.agent.log_std.exp().mean())
        self.write_record(self.agent, means, needed=self.names)
        if self.save_now:
            state = dict(stage=self.stage, observes=self.observes, agent=self.agent.state_dict())
            state |= dict(description=describe_agent(self.stage, self.env, self.args))
            state |= dict(moments=list(self.optimizer.state.values()), learning_rate=self.learning_rate)
            state |= dict(teacher=self.teacher and self.teacher.state_dict())
            self.save(dict(moment=list(self.moment)), **state)
        self.terms.zero_()
        self.go_on()


def train_by_ppo(run: StageRun) -> None:
    """The stages teacher, finetune and baseline. In finetune the policy is frozen for critic_warmup_iterations."""
    args, sizes, agent, rollout = run.args, run.sizes, run.agent, run.rollout
    with vecsim.first_process_first():
        functions = build_ppo(agent, run.optimizer, rollout, sizes, args)
    for iteration in run.start_clock(run.plan.steps_per_iteration, run.plan.iterations):
        order = run.collect(functions.policy)

        # Targets: values and advantages, with the observation statistics of the rollout.
        with record_function("targets"):
            value, advantage = functions.estimate()
            batch = make_batch(agent, rollout, value, advantage, order)

        # Update. The observation statistics change only after it, so that old and new policy see equal inputs.
        frozen = run.stage == "finetune" and iteration < args.critic_warmup_iterations
        if run.stage == "finetune" and iteration <= args.critic_warmup_iterations:
            run.learning_rate.fill_(args.learning_rate if frozen else args.finetune_learning_rate)
        with record_function("update"):
            terms = update(agent, functions, batch, frozen, run.learning_rate, args)
        agent.critic_obs_statistics.update(rollout.critic_obs.flatten(0, 1), ~rollout.invalid.flatten())
        if not frozen:  # other statistics would change the actions of a frozen policy
            agent.obs_statistics.update(rollout.obs.flatten(0, 1), ~rollout.invalid.flatten())
        run.end_iteration(terms)


def train_by_imitation(run: StageRun) -> None:
    """The stage student: the student acts with noise, and learns the teacher's mean action in each state it visits."""
    args, sizes, agent, rollout = run.args, run.sizes, run.agent, run.rollout
    with vecsim.first_process_first():
        functions = build_imitation(agent, run.teacher, run.optimizer, rollout, sizes, args)
    for iteration in run.start_clock(run.plan.steps_per_iteration, run.plan.iterations):
        order = run.collect(functions.policy)
        with record_function("targets"):
            labels = functions.label()
        run.learning_rate.fill_(args.distill_learning_rate * (1.0 - iteration / run.plan.iterations))
        with record_function("update"):
            terms = imitate(agent, functions, rollout, labels, order, args)
        agent.obs_statistics.update(rollout.obs.flatten(0, 1), ~rollout.invalid.flatten())
        run.end_iteration(terms)


def train(args: Args, make_env=None, stop: vecsim.StopSignals | None = None) -> dict:
    """Run the stages and write their folders; return the last log record of each together with its evaluation.

    make_env: see the top of this file. After a signal, the iteration is finished and saved; then KeyboardInterrupt."""
    # Check everything before anything is trained.
    check_ranges(args)
    run = vecsim.Run(args, "distill", make_env, stop)
    sizes = derive_sizes(args, run.world_size, run.device)
    checkpoint = run.checkpoint
    if checkpoint:
        check_resumable(checkpoint, args, run.world_size)
    stages = stages_to_run(args, checkpoint, sizes)
    resumed = checkpoint["stage"] if checkpoint and checkpoint["stage"] in stages else None
    env = run.start(sizes.envs, f"stages: {', '.join(stages)}", stages=stages)
    starts = {checkpoint["stage"]: checkpoint["agent"]} if checkpoint else {}
    for stage, needed in (("student", "teacher"), ("finetune", "student")):
        if stage in stages and stage != resumed and needed not in {*stages, *starts}:
            starts[needed] = load_start(needed, env, args)

    # The stages share one simulator.
    with vecsim.first_process_first():
        env.reset()
        env.step(torch.zeros(sizes.envs, env.single_action_space.shape[0], device=run.device))  # compiles the physics
    results = {}
    for stage in stages:
        of_stage = StageRun(stage, run, sizes, starts, stage == resumed)
        if stage == "student":
            train_by_imitation(of_stage)
        else:
            train_by_ppo(of_stage)
        starts[stage], results[stage] = of_stage.agent.state_dict(), of_stage.finish(of_stage.agent, stage, stage=stage)
        if of_stage.log and args.track:
            import wandb

            wandb.finish()  # the next stage is another run
    env.close()
    return results


# ----------------------------------------------------------------------------------------------------------------------
# Policy: load, export, play
# ----------------------------------------------------------------------------------------------------------------------


def load_agent(checkpoint: dict) -> Agent:
    """The agent of a checkpoint, on the CPU. The saved tensors tell its sizes."""
    saved = checkpoint["agent"]
    obs_size, critic_obs_size = (len(saved[f"{name}_statistics.mean"]) for name in ("obs", "critic_obs"))
    action_space = gymnasium.spaces.Box(-1.0, 1.0, saved["log_std"].shape)  # the saved range replaces this one
    agent = Agent(checkpoint["stage"], obs_size, critic_obs_size, action_space, Args(**checkpoint["args"]))
    agent.load_state_dict(saved)
    return agent


def load_policy(checkpoint: dict) -> Callable:
    """The deterministic policy: act(obs (N, obs), started (N,) bool) -> action (N, actions), on the CPU.

    obs is the observation that checkpoint["observes"] names: "critic_obs" for a teacher, else "obs"."""
    return vecsim.policy_of(load_agent(checkpoint))


class ExportedPolicy(nn.Module):
    """What --export writes: obs (B, obs) to the deterministic action (B, actions) in the environment's units.

    A policy with a memory (B, memory_size) takes it too and returns the memory after the step. A history holds the
    last normalised observations, oldest first."""

    def __init__(self, agent: Agent):
        super().__init__()
        self.agent = agent

    def forward(self, obs: Tensor, memory: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        features = self.agent.obs_statistics.normalize(obs)
        if self.agent.gru is not None:
            memory = self.agent.gru(features, memory)
            features = torch.cat([features, memory], -1)
        elif memory is not None:
            features = torch.cat([memory, features], -1)
            memory = features[:, -self.agent.memory_size :]
        action = self.agent.to_env(self.agent.actor(features))
        return action if memory is None else (action, memory)


def export(path: str, checkpoint: dict) -> None:
    """Write the deterministic policy to an ONNX file, in float32, because ONNX Runtime needs it on a CPU."""
    agent, facts = load_agent(checkpoint), dict(script=Path(__file__).name, stage=checkpoint["stage"])
    inputs, outputs = dict(obs=torch.zeros(2, len(agent.obs_statistics.mean))), ["action"]
    if agent.memory_size:
        inputs["memory_in"], outputs = agent.empty_memory(2), ["action", "memory_out"]
        facts["memory"] = "memory_in is zero where an episode begins, then the memory_out of the step before"
    vecsim.write_file(Path(path), vecsim.to_onnx(ExportedPolicy(agent), inputs, outputs, checkpoint, **facts))


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
