"""Teacher and student on one device: a privileged teacher learns with PPO, a student that sees what a robot sees learns from it.

    python ppo_distill_teacher_student.py                                   # all of it: Quadruped-Rough, sized for a GPU
    python ppo_distill_teacher_student.py --student-network gru
    python ppo_distill_teacher_student.py --stages student finetune --teacher runs/NAME/teacher/checkpoint.pt
    python ppo_distill_teacher_student.py --resume runs/NAME/student/checkpoint.pt          # and on with what follows
    python ppo_distill_teacher_student.py --resume runs/NAME/finetune/checkpoint.pt --stages evidence
    python ppo_distill_teacher_student.py --play runs/NAME/student/checkpoint.pt --capture-video
    python ppo_distill_teacher_student.py --play runs/NAME/student/checkpoint.pt --export policy.onnx

Sized for two CPU cores (fewer robots, smaller networks):

    python ppo_distill_teacher_student.py --env-id Quadruped-Flat --num-envs 512 --total-timesteps 10000000 \
        --actor-hidden 128 64 --critic-hidden 128 64 --student-hidden 128 64 --student-history 6
    python ppo_distill_teacher_student.py --num-envs 512 --total-timesteps 24000000 --env-kwargs first_levels 1 \
        --actor-hidden 128 64 --critic-hidden 128 64 --student-hidden 128 64 --student-history 6

The stages, in order; each has a folder with its own log and checkpoint in the folder of the run:

    teacher     PPO; policy and value function see the privileged observation (`critic_obs`)
    student     on-policy imitation: the student drives, the teacher's mean action labels every state it visits; each
                iteration learns from its own rollout alone
    finetune    PPO on the student, whose value function, the teacher's, adapts first while the policy stands still
    baseline    PPO on an untrained student, with as many environment steps as the three before it together
    evidence    all of them on seeds x perturbations: evidence.json, .csv, .png and pictures.png, the student on stairs

The second command for CPU cores took 83 minutes of training and some 30 of evidence on one of an AMD EPYC: tracking score of teacher,
student, fine-tuned student and blind baseline over all ten levels 0.43, 0.40, 0.55 and 0.51 (README.md has all).

The privileged observation of a task without `critic_obs` is `obs`; what its student lacks is then said by --student-groups.

Needs `vecsim_torch.py` beside it and nothing else of this project: copy the two files and they are yours.

Sources: imitation on the student's own states, Ross et al. 2011 (arXiv:1011.0686), algorithm 3.1 with beta = 0 and without
its aggregation of data (so not DAgger); teacher and student on rough terrain, Lee et al. 2020 (arXiv:2010.11251); PPO,
Schulman et al. 2017 (arXiv:1707.06347), eq. 7; GAE, Schulman et al. 2016 (arXiv:1506.02438), eq. 16; time limits, Pardo et
al. 2018 (arXiv:1712.00378); learning rate from the KL divergence, many environments, terrain, Rudin et al. 2022
(arXiv:2109.11978); a value function that sees more than the policy, Pinto et al. 2018 (arXiv:1710.06542); running moments,
Chan et al. 1983.
"""

from __future__ import annotations

import contextlib
import csv
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
from typing import Literal, NamedTuple, get_args

import gymnasium
import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor, distributed, nn
from tqdm import tqdm

import vecsim_torch

# ------------------------------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------------------------------

Stage = Literal["teacher", "student", "finetune", "baseline", "evidence"]


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
    """None: the task's row in TASK_DEFAULTS, else COMMON, unless the help says otherwise. *_timesteps and every *_every count environment steps over all environments."""

    env_id: str = "Quadruped-Rough"
    """task: any id that vecsim_torch.make knows"""
    stages: tuple[Stage, ...] = get_args(Stage)
    """what to run, always in the order in which the stages are listed here"""
    teacher: str | None = None
    """checkpoint of a teacher, for a run without that stage"""
    student: str | None = None
    """checkpoint of a student, fine-tuned or not, for a run without that stage"""
    num_envs: int | None = None
    """environments stepped in parallel, over all processes (>= 1)"""
    total_timesteps: int | None = None
    """environment steps of teacher, student and fine-tuning together, and of the baseline alone (>= 3; rounded up to whole iterations)"""
    student_timesteps: int | None = None
    """environment steps of the student stage (>= 1; default: 15% of total_timesteps)"""
    finetune_timesteps: int | None = None
    """environment steps of the finetune stage (>= 1; default: 20% of total_timesteps; the teacher has the rest)"""
    seed: int = 1
    """seed of weights, environments and noise (>= 0; every stage and every process draws from its own stream)"""
    device: str = "auto"
    """auto (CUDA where there is a GPU, else CPU), cpu, cuda or cuda:N"""
    compile: bool = True
    """compile physics, policy step and losses with torch.compile (a minute or so a stage, reported apart)"""
    run_dir: str | None = None
    """folder of this run, without one in it already (default: runs/<env_id>__distill__<seed>__<time>; the checkpoint's own run with --resume)"""
    resume: str | None = None
    """checkpoint of any stage to continue from, and on with the stages after it; flags not given keep the checkpoint's values"""
    checkpoint_every: int | None = None
    """environment steps between checkpoints (>= 1; default: a twentieth of total_timesteps); the last state of a stage is always saved"""
    log_every: int | None = None
    """environment steps between log lines, at most; checkpoints log too (>= 1; default: total_timesteps / 200)"""
    eval_episodes: int = 50
    """robots, one episode each, of every cell of the evidence and of --play (>= 1); a finished stage is scored on one episode of each of its environments"""
    play: str | None = None
    """checkpoint of any stage to play deterministically instead of training; prints its score"""
    export: str | None = None
    """with --play: write policy, normaliser and action scale to this ONNX file (--eval-episodes 0: no episodes)"""
    capture_video: bool = False
    """with --play: write a strip of pictures, MuJoCo's, beside the checkpoint; the evidence has one in any case"""
    track: bool = False
    """mirror the metrics to Weights & Biases, a run for each stage (needs `pip install wandb`)"""
    profile: bool = False
    """time the parts of ten iterations of each stage, after three of warm-up, then trace one more: profile.json and trace.json.gz in the stage's folder, and a printed table"""

    # the environment
    env_kwargs: dict[str, bool | int | float | str] | None = None
    """task options, pairs of name and value, on top of those in the task's row; the evidence is taken without their randomize and perturb"""
    integrator: Literal["euler", "implicitfast", "rk4"] | None = None
    """integrator of the physics"""
    solver_iterations: int | None = None
    """Newton iterations of the contact solver (>= 1)"""
    random_initial_ages: bool = True
    """start the first episodes at random ages, so that thousands of robots do not time out together"""
    reward_scale: float | None = None
    """factor on the rewards that the learner sees (> 0; logged returns are unscaled)"""

    # who sees what
    teacher_groups: tuple[str, ...] | None = None
    """groups of the privileged observation that the teacher sees (default: all; the value function sees all in any case)"""
    student_groups: tuple[str, ...] | None = None
    """groups of `obs` that student and baseline see (default: all)"""

    # the networks
    actor_hidden: tuple[int, ...] | None = None
    """hidden layer sizes of the teacher (ELU)"""
    critic_hidden: tuple[int, ...] | None = None
    """hidden layer sizes of the value function (ELU)"""
    student_network: Literal["mlp", "gru"] = "mlp"
    """memory of student and baseline: mlp sees the last student_history observations, gru carries a hidden state"""
    student_hidden: tuple[int, ...] | None = None
    """hidden layer sizes of student and baseline, after the memory (ELU)"""
    student_history: int | None = None
    """mlp: observations that it sees at once, the newest included (>= 1)"""
    student_memory: int | None = None
    """gru: size of the hidden state (>= 1)"""

    # PPO: teacher, finetune and baseline
    num_steps: int | None = None
    """steps per environment and iteration (>= 1)"""
    update_epochs: int | None = None
    """passes over each batch (>= 1)"""
    num_minibatches: int | None = None
    """gradient steps per pass, each on all steps of some environments (>= 1; must divide the environments of each process)"""
    microbatch_size: int | None = None
    """largest number of samples in one backward pass, rounded to whole environments; gradients add up over a minibatch (>= 1; default: 2,048 on a CPU, for its cache; a whole minibatch on a GPU)"""
    log_std_init: float | None = None
    """initial log standard deviation of teacher and baseline, in units of half the action range"""
    log_std_min: float | None = None
    """floor of the log standard deviation, in the same units"""
    gamma: float | None = None
    """discount per environment step (0 to 1)"""
    gae_lambda: float | None = None
    """decay of generalised advantage estimation (0 to 1)"""
    clip_coef: float = 0.2
    """clipping range of the probability ratio (> 0; inf turns clipping off)"""
    entropy_coef: float | None = None
    """weight of the entropy bonus (>= 0)"""
    bounds_coef: float | None = None
    """weight of the penalty on action means more than 1.1 half ranges from the centre (>= 0)"""
    max_grad_norm: float = 1.0
    """largest gradient norm, of the policy and of the value function apart, in every stage (> 0; inf turns clipping off)"""
    learning_rate: float | None = None
    """Adam's initial learning rate in teacher and baseline (learning_rate_min to learning_rate_max)"""
    desired_kl: float | None = None
    """exact KL(old policy || new policy), mean over a minibatch, that the learning rate is adapted to (> 0)"""
    learning_rate_min: float = 1e-5
    """lower bound of the adapted learning rate (> 0)"""
    learning_rate_max: float | None = None
    """upper bound of the adapted learning rate (>= learning_rate_min)"""

    # On-policy imitation: student
    distill_steps: int | None = None
    """steps per environment and iteration of the student stage (>= 1)"""
    distill_epochs: int = 2
    """passes over each batch (>= 1)"""
    distill_minibatches: int | None = None
    """groups of environments, each with its own gradient steps (>= 1; must divide the environments of each process)"""
    gradient_length: int = 15
    """steps per gradient step, in order; a GRU's gradient goes no further back (>= 1; must divide distill_steps)"""
    distill_learning_rate: float = 1e-3
    """Adam's learning rate at the start of the student stage, decaying to 0 over it (> 0)"""
    distill_noise: float = 0.1
    """standard deviation of the noise on the actions with which the student drives, in units of half the action range (> 0)"""

    # finetune
    critic_warmup_iterations: int = 20
    """iterations in which only the value function learns, at learning_rate (>= 0)"""
    finetune_learning_rate: float = 1e-4
    """learning rate when the policy begins to move, adapted from then on (learning_rate_min to learning_rate_max)"""
    finetune_log_std: float | None = None
    """log standard deviation that the fine-tuned policy starts with (>= log_std_min)"""

    # evidence
    evidence_seeds: tuple[int, ...] = (3, 7, 11, 19, 23)
    """seeds of the panel (>= 0)"""
    evidence_perturbations: tuple[str, ...] | None = None
    """names from PERTURBATIONS (default: all)"""


# One row of values per task; a task without a row (or a value missing from its row) takes COMMON's.
COMMON = dict(
    num_envs=1024, total_timesteps=20_000_000, env_kwargs={}, integrator="euler", solver_iterations=4, reward_scale=1.0,
    actor_hidden=(256, 128, 64), critic_hidden=(256, 128, 64), student_hidden=(256, 128, 64), student_history=10,
    student_memory=128, num_steps=24, update_epochs=4, num_minibatches=8, log_std_init=-1.0, log_std_min=-2.3,
    gamma=0.99, gae_lambda=0.95, entropy_coef=0.0, bounds_coef=1e-4, learning_rate=1e-3, learning_rate_max=5e-3,
    desired_kl=0.01, distill_steps=120, distill_minibatches=4, finetune_log_std=-1.6,
)  # fmt: skip
TASK_DEFAULTS = {
    # reward_scale: rewards per second, so that returns are large beside what an untrained value function says
    "Quadruped-Flat": dict(
        total_timesteps=75_000_000, integrator="implicitfast", env_kwargs={"randomize": True}, reward_scale=50.0,
        num_minibatches=4, entropy_coef=0.005, desired_kl=0.02),
    "Quadruped-Rough": dict(
        total_timesteps=300_000_000, num_envs=4096, integrator="implicitfast", env_kwargs={"randomize": True},
        reward_scale=50.0, num_minibatches=4, entropy_coef=0.005, desired_kl=0.02, actor_hidden=(512, 256, 128),
        critic_hidden=(512, 256, 128), student_hidden=(512, 256, 128)),
}  # fmt: skip

# Of vecsim_torch.make's `perturb`, one at a time on the robot that is not randomised.
PERTURBATIONS = {
    "nominal": {},
    "observation_noise": {"observation_noise": 1.0},  # of `obs`; the privileged observation has none
    "action_delay": {"action_delay_ms": 120.0},
    "low_friction": {"friction_scale": 0.4},
    "heavy": {"mass_scale": 1.3},
    "strong_gravity": {"gravity_scale": 1.2},
    "pushes": {"push": 1.5, "push_interval": 3.0},
    "long_timestep": {"timestep_scale": 1.25},
}
# Task options of the evidence: robots on all levels alike; and of its pictures: forward over the third level of stairs.
EVIDENCE_OPTIONS = {"Quadruped-Rough": {"curriculum": False}}
FORWARD = {"command_forward": (0.6, 0.6), "command_sideways": (0.0, 0.0), "standing_share": 0.0}
FILM_OPTIONS = {"Quadruped-Flat": FORWARD, "Quadruped-Rough": FORWARD | {"terrain_level": 2}}

PROFILED = 3, 10  # iterations before --profile starts to time, and iterations timed


def with_task_defaults(
    args: Args, common: dict = COMMON, tasks: dict = TASK_DEFAULTS, panel: dict = PERTURBATIONS
) -> Args:
    """Fill in what was left at None: from the task's row, then from COMMON, then what follows from other flags."""
    row = common | tasks.get(args.env_id, {})
    filled = {name: value for name, value in row.items() if getattr(args, name) is None}
    filled["env_kwargs"] = row["env_kwargs"] | (args.env_kwargs or {})  # options given go on top of the row's
    args = dataclasses.replace(args, **filled)
    name = f"{args.env_id.replace('/', '-')}__distill__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    derived = dict(
        run_dir=str(Path(args.resume).parent.parent) if args.resume else f"runs/{name}",
        student_timesteps=max(1, args.total_timesteps * 15 // 100),
        finetune_timesteps=max(1, args.total_timesteps * 20 // 100),
        checkpoint_every=max(1, args.total_timesteps // 20),
        log_every=max(1, args.total_timesteps // 200),
        microbatch_size=2048 if pick_device(args.device).type == "cpu" else args.num_envs * args.num_steps,
        evidence_perturbations=tuple(panel),
    )
    return dataclasses.replace(args, **{name: value for name, value in derived.items() if getattr(args, name) is None})


# ------------------------------------------------------------------------------------------------------------------------
# Derived sizes
# ------------------------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How long a stage runs."""

    num_steps: int  # per environment and iteration
    steps_per_iteration: int  # environment steps of all processes in one iteration
    iterations: int
    gradient_steps: int  # in one iteration


class Sizes(NamedTuple):
    """What follows from the flags; computed here, printed once, nowhere else."""

    envs: int  # environments of this process
    minibatch: int  # environments of this process in one gradient step of PPO
    microbatch: int  # environments in one backward pass of PPO
    distill_minibatch: int  # environments of this process in one gradient step of the student stage
    plans: dict[str, Plan]  # of each training stage


def check_divides(parts: int, name: str, whole: int, what: str) -> None:
    """Refuse a number of parts that leaves a rest, and name the nearest ones that leave none."""
    if whole % parts:
        near, least = 10**6, min(parts, whole)  # a search without end for huge numbers helps nobody
        below = next((n for n in range(least, max(0, least - near), -1) if whole % n == 0), 1)
        above = next((n for n in range(least, min(whole, least + near) + 1) if whole % n == 0), below)
        choices = f"{below} or {above}" if above != below else f"{below}"
        raise InputError(f"{name} = {parts} does not divide {what} = {whole:,}; use {choices}")


def derive_sizes(
    args: Args,
    world_size: int,
    panel: dict = PERTURBATIONS,
    profiled: tuple[int, int] = PROFILED,
    checkpoint: dict | None = None,
) -> Sizes:
    """Check every flag before anything is allocated, then compute the sizes. checkpoint: the one to resume."""
    counts = "num_envs student_timesteps finetune_timesteps checkpoint_every log_every eval_episodes solver_iterations"
    counts += " student_history student_memory num_steps update_epochs num_minibatches microbatch_size distill_steps"
    counts += " distill_epochs distill_minibatches gradient_length"
    positive = "reward_scale learning_rate_min learning_rate_max desired_kl distill_learning_rate distill_noise"
    lowest_rate, highest_rate = args.learning_rate_min, args.learning_rate_max
    spent = args.student_timesteps + args.finetune_timesteps
    rules = (  # flags, what is legal, and how to say it
        (counts, lambda x: x >= 1, ">= 1"),
        ("total_timesteps", lambda x: x > spent, f"> student_timesteps + finetune_timesteps = {spent:,}"),
        ("seed", lambda x: 0 <= x < 2**63, "between 0 and 2**63 - 1"),
        ("critic_warmup_iterations", lambda x: x >= 0, ">= 0"),
        ("entropy_coef bounds_coef", lambda x: 0 <= x < math.inf, ">= 0 and finite"),
        ("clip_coef max_grad_norm", lambda x: x > 0, "> 0"),
        (positive, lambda x: 0 < x < math.inf, "> 0 and finite"),
        ("gamma gae_lambda", lambda x: 0 <= x <= 1, "between 0 and 1"),
        ("actor_hidden critic_hidden student_hidden", lambda x: all(size >= 1 for size in x), "made of sizes >= 1"),
        ("learning_rate_max", lambda x: x >= lowest_rate, f">= learning_rate_min = {lowest_rate:g}"),
        ("learning_rate finetune_learning_rate", lambda x: lowest_rate <= x <= highest_rate,
         f"between learning_rate_min = {lowest_rate:g} and learning_rate_max = {highest_rate:g}"),
        ("log_std_init finetune_log_std", lambda x: args.log_std_min <= x < math.inf,
         f"finite and >= log_std_min = {args.log_std_min:g}"),
        ("log_std_min", math.isfinite, "finite"),
        ("stages", len, "one stage or more"),
        ("evidence_seeds", lambda x: x and min(x) >= 0 and max(x) < 2**63, "one seed or more, between 0 and 2**63 - 1"),
        ("evidence_perturbations", lambda x: x and set(x) <= set(panel), f"some of: {', '.join(panel)}"),
    )  # fmt: skip
    for names, legal, rule in rules:
        for name in names.split():
            if not legal(getattr(args, name)):
                raise InputError(f"{name} = {getattr(args, name)} must be {rule}")
    if args.track and importlib.util.find_spec("wandb") is None:
        raise InputError("track needs Weights & Biases; run `pip install wandb` or leave --track away")
    check_divides(world_size, "the number of processes", args.num_envs, "num_envs")
    envs = args.num_envs // world_size
    of_a_process = "num_envs" if world_size == 1 else "the environments of a process"
    check_divides(args.num_minibatches, "num_minibatches", envs, of_a_process)
    check_divides(args.distill_minibatches, "distill_minibatches", envs, of_a_process)
    check_divides(args.gradient_length, "gradient_length", args.distill_steps, "distill_steps")
    minibatch, microbatch = envs // args.num_minibatches, max(1, args.microbatch_size // args.num_steps)
    microbatch = math.ceil(minibatch / math.ceil(minibatch / microbatch))
    of_ppo = args.num_steps, args.num_steps * args.num_envs, args.update_epochs * args.num_minibatches
    slices = args.distill_steps // args.gradient_length
    of_dagger = args.distill_steps, args.distill_steps * args.num_envs
    of_dagger += (args.distill_epochs * args.distill_minibatches * slices,)
    budgets = dict(
        teacher=(args.total_timesteps - spent, of_ppo),
        student=(args.student_timesteps, of_dagger),
        finetune=(args.finetune_timesteps, of_ppo),
        baseline=(args.total_timesteps, of_ppo),
    )
    plans = {
        stage: Plan(steps, per_iteration, math.ceil(timesteps / per_iteration), gradient_steps)
        for stage, (timesteps, (steps, per_iteration, gradient_steps)) in budgets.items()
    }
    for stage, plan in plans.items():
        done = checkpoint["iteration"] if checkpoint and checkpoint["stage"] == stage else 0
        left, least = plan.iterations - done, sum(profiled) + 1
        if args.profile and stage in args.stages and 0 < left < least:
            raise InputError(
                f"profile needs {least} iterations of each stage; {stage}, of {budgets[stage][0]:,} steps, has {left} left"
            )
    return Sizes(envs, minibatch, microbatch, envs // args.distill_minibatches, plans)


# ------------------------------------------------------------------------------------------------------------------------
# Observation groups: who sees what
# ------------------------------------------------------------------------------------------------------------------------


class View(NamedTuple):
    """What a network sees: named groups of `obs`, or of the privileged observation."""

    privileged: bool
    groups: dict[str, int]  # name: numbers, in order
    columns: Tensor  # (k,) where they stand

    def of(self, obs: Tensor, privileged_obs: Tensor) -> Tensor:
        """(N, k) of obs: (N, all) and privileged_obs: (N, all privileged)."""
        return (privileged_obs if self.privileged else obs).index_select(-1, self.columns)


def make_views(env: gymnasium.vector.VectorEnv, args: Args) -> dict[str, View]:
    """What teacher, student and critic see. InputError names a group that the task does not have."""
    everything = env.critic_slices or env.observation_slices  # a task without critic_obs has no more than obs
    chosen = dict(
        teacher=(True, everything, args.teacher_groups),
        student=(False, env.observation_slices, args.student_groups),
        critic=(True, everything, None),
    )
    views = {}
    for who, (privileged, slices, names) in chosen.items():
        names = tuple(slices) if names is None else names
        unknown = [name for name in names if name not in slices]
        if unknown or not names or len(set(names)) < len(names):
            problem = f"{unknown[0]} is no group" if unknown else "at least one, and each once"
            raise InputError(f"{who}_groups: {problem}; the {who} of {args.env_id} can see {', '.join(slices)}")
        columns = [column for name in names for column in range(slices[name].start, slices[name].stop)]
        groups = {name: slices[name].stop - slices[name].start for name in names}
        views[who] = View(privileged, groups, torch.tensor(columns, device=env.device))
    return views


def privileged_observation(obs: Tensor, info: dict, prefix: str = "") -> Tensor:
    """What only a simulator knows, (N, all privileged); `obs` where the task has no more. prefix: "final_" or none."""
    return info.get(f"{prefix}critic_obs", obs)


def check_groups(whose: str, then: dict[str, int], now: dict[str, int], env_id: str) -> None:
    """Refuse an observation other than the checkpoint's, and say which group is wrong."""
    for name, size in then.items():
        if name not in now:
            raise InputError(f"{whose} sees the group {name}, {size} numbers, which {env_id} does not give it here; it gives {', '.join(now)}")  # fmt: skip
        if now[name] != size:
            raise InputError(f"{whose} sees {size} numbers of the group {name}; {env_id} has {now[name]} here")
    for name, size in now.items():
        if name not in then:
            raise InputError(f"{whose} does not see the group {name}, {size} numbers, which {env_id} gives it here; it sees {', '.join(then)}")  # fmt: skip
    if list(then) != list(now):
        raise InputError(f"{whose} sees its groups in the order {', '.join(then)}, not {', '.join(now)}")


def check_start(whose: str, start: dict, views: dict[str, View], actions: int, args: Args) -> None:
    """Refuse a checkpoint whose observation groups, actions or networks are not those of this run."""
    role = "teacher" if start["stage"] == "teacher" else "student"
    for part, name in ((role, "policy"), ("critic", "value function")):
        check_groups(f"{whose}, {name},", start["groups"][part], views[part].groups, args.env_id)
    if len(start["agent"]["action_centre"]) != actions:
        raise InputError(f"{whose} has {len(start['agent']['action_centre'])} actions; {args.env_id} has {actions}")
    then, now = (x["env_kwargs"].get("action_scale") for x in (start["args"], dataclasses.asdict(args)))
    if then != now:  # None: the task's own
        raise InputError(f"{whose} acts in units of action_scale = {then}, not {now}; give --env-kwargs action_scale as it was")
    memory = {"mlp": "student_history", "gru": "student_memory"}[args.student_network]
    flags = dict(teacher="actor_hidden", student=f"student_network student_hidden {memory}")[role]
    for flag in f"{flags} critic_hidden".split():
        then, now = start["args"][flag], getattr(args, flag)
        if tuple(then) != tuple(now) if isinstance(now, tuple) else then != now:
            raise InputError(
                f"{whose} was trained with {flag} = {then}, not {now}; give --{flag.replace('_', '-')} as it was"
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


def stack_history(obs: Tensor, memory: Tensor, fresh: Tensor, history: int) -> tuple[Tensor, Tensor]:
    """The last `history` observations at each step, oldest first, and the memory after the last step.

    obs: (T, N, k); memory: (N, (history - 1) k), the observations before the first of `obs`; fresh: (T, N) bool, where an episode
    begins. What belongs to an earlier episode, or to none, is zero. Returns (T, N, history k) and a memory."""
    steps, envs, size = obs.shape
    past = memory.reshape(envs, history - 1, size).transpose(0, 1)
    frames = torch.cat([past, obs])  # (history - 1 + T, N, k)
    episode = fresh.long().cumsum(0)  # of this sequence; 0 is the one that was running
    episodes = torch.cat([episode.new_zeros(history - 1, envs), episode])
    stack = []
    for age in range(history):
        same = episodes[age : age + steps] == episode
        stack.append(torch.where(same[..., None], frames[age : age + steps], 0.0))
    features = torch.cat(stack, -1)
    return features, features[-1, :, size:].contiguous()  # of one layout always, or each stage would compile twice


def unroll_gru(cell: nn.GRUCell, obs: Tensor, memory: Tensor, fresh: Tensor) -> tuple[Tensor, Tensor]:
    """Observation and hidden state at each step, (T, N, k + h), and the hidden state after the last step.

    obs: (T, N, k); memory: (N, h), the hidden state before the first step; fresh: (T, N) bool, where an episode begins: there the
    hidden state is zero before the cell sees the observation."""
    hidden = []
    for t in range(len(obs)):
        memory = cell(obs[t], torch.where(fresh[t][:, None], 0.0, memory))
        hidden.append(memory)
    return torch.cat([obs, torch.stack(hidden)], -1), memory


class Agent(nn.Module):
    """Gaussian policy and value function, separate networks. The policy acts in half ranges: +-1 spans the action space.

    A policy that remembers hands itself a memory (N, memory_size) from step to step: the normalised observations of the last
    steps, or a GRU's hidden state. It is a tensor like any other, so a rollout stores it and a checkpoint holds it; a policy that
    does not remember has a memory of no columns."""

    def __init__(
        self, obs_size: int, critic_obs_size: int, action_space: gymnasium.spaces.Box, remembers: bool, args: Args
    ):
        super().__init__()
        low, high = torch.as_tensor(action_space.low), torch.as_tensor(action_space.high)
        bounded = low.isfinite() & high.isfinite()
        self.register_buffer("action_centre", torch.where(bounded, (high + low) / 2, 0.0))
        self.register_buffer("action_half_range", torch.where(bounded, (high - low) / 2, 1.0))
        self.obs_statistics = RunningStatistics(obs_size, enabled=True, limit=10.0)
        self.critic_obs_statistics = RunningStatistics(critic_obs_size, enabled=True, limit=10.0)
        self.return_statistics = RunningStatistics(1, enabled=True)
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

    def policy_mean(self, normalized_obs: Tensor, memory: Tensor, fresh: Tensor) -> tuple[Tensor, Tensor]:
        """Means (T, N, actions), half ranges, of T steps in order, and the memory after them.

        normalized_obs: (T, N, obs); memory: (N, memory_size) before them; fresh: (T, N) bool, where an episode begins."""
        if self.gru is None:
            features, memory = stack_history(normalized_obs, memory, fresh, self.history)
        else:
            features, memory = unroll_gru(self.gru, normalized_obs, memory, fresh)
        return self.actor(features), memory

    def normalized_value(self, normalized_critic_obs: Tensor) -> Tensor:
        return self.critic(normalized_critic_obs).squeeze(-1)  # (..., critic obs) -> (...)

    def to_env(self, action: Tensor) -> Tensor:
        return self.action_centre + self.action_half_range * action

    def blank(self, envs: int) -> tuple[Tensor, Tensor]:
        """Memory (N, memory_size) and `fresh` (N,) of episodes that begin."""
        memory = self.log_std.new_zeros(envs, self.memory_size)
        return memory, torch.ones(envs, dtype=torch.bool, device=memory.device)

    @torch.no_grad()
    def act(self, obs: Tensor, memory: Tensor, fresh: Tensor) -> tuple[Tensor, Tensor]:
        """The deterministic action (N, actions), in the environment's units, and the memory after it."""
        mean, memory = self.policy_mean(self.obs_statistics.normalize(obs)[None], memory, fresh[None])
        return self.to_env(mean[0]), memory


def make_agent(stage: str, views: dict[str, View], action_space: gymnasium.spaces.Box, args: Args) -> Agent:
    view, remembers = (views["teacher"], False) if stage == "teacher" else (views["student"], True)
    return Agent(len(view.columns), len(views["critic"].columns), action_space, remembers, args)


# ------------------------------------------------------------------------------------------------------------------------
# Algorithm: pure functions
# ------------------------------------------------------------------------------------------------------------------------


class Rollout(NamedTuple):
    """What one iteration collects, (T, N, ...) on the device: T = steps, N = environments of this process."""

    obs: Tensor  # (T, N, obs): what the policy saw
    fresh: Tensor  # (T, N) bool: the first observation of an episode
    memory: Tensor  # (N, memory): the policy's, before the first step
    critic_obs: Tensor  # (T, N, critic obs)
    final_critic_obs: Tensor  # (T, N, critic obs): what the step led to, before any auto-reset
    action: Tensor  # (T, N, actions), half ranges
    mean: Tensor  # (T, N, actions), half ranges: the policy's mean when it acted
    reward: Tensor  # (T, N), scaled
    terminated: Tensor  # (T, N) bool
    truncated: Tensor  # (T, N) bool
    invalid: Tensor  # (T, N) bool: quarantined, masked everywhere


def allocate_rollout(
    steps: int, envs: int, obs: int, memory: int, critic_obs: int, actions: int, device: torch.device
) -> Rollout:
    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(steps, envs, *shape, dtype=dtype, device=device)

    fresh, *flags = [zeros(dtype=torch.bool) for _ in range(4)]
    features = zeros(critic_obs), zeros(critic_obs), zeros(actions), zeros(actions), zeros()
    return Rollout(zeros(obs), fresh, torch.zeros(envs, memory, device=device), *features, *flags)


class Batch(NamedTuple):
    """The samples of one update: T steps, in order, of B environments; what the old policy said is frozen here."""

    obs: Tensor  # (T, B, obs), normalised
    fresh: Tensor  # (T, B) bool
    memory: Tensor  # (1, B, memory), before the first step
    critic_obs: Tensor  # (T, B, critic obs), normalised
    action: Tensor  # (T, B, actions), half ranges
    mean: Tensor  # (T, B, actions), old policy
    log_prob: Tensor  # (T, B), old policy
    target: Tensor  # (T, B), return to regress on, normalised
    advantage: Tensor  # (T, B)
    weight: Tensor  # (T, B): 0 for a quarantined transition, else such that the mean is 1


class LossTerms(NamedTuple):
    """PPO: means over a minibatch, in the order in which ppo_loss stacks them."""

    policy_loss: Tensor
    value_loss: Tensor
    bounds_loss: Tensor
    entropy: Tensor
    kl: Tensor
    clip_fraction: Tensor


class ImitationTerms(NamedTuple):
    """On-policy imitation: means over a minibatch, in the order in which imitation_loss stacks them."""

    imitation_loss: Tensor  # square of the difference to the teacher's action, mean over actions, half ranges squared
    action_error: Tensor  # size of that difference, mean over actions, half ranges


def weighted_moments(x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count (), mean (k,) and variance (k,) of the valid rows of x: (B, k), over all processes, in float64."""
    rows = torch.where(valid[:, None], x, 0.0).double()
    sums = sum_over_processes(torch.cat([valid.sum().double()[None], rows.sum(0), rows.square().sum(0)]))
    mean, mean_square = (sums[1:] / sums[0].clamp(min=1.0)).chunk(2)
    return sums[0], mean, (mean_square - mean.square()).clamp(min=0.0)


@torch.no_grad()
def policy_step(
    agent: Agent, obs: Tensor, memory: Tensor, fresh: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and sampled action (N, actions) in half ranges, that action in the environment's units, the memory after it."""
    mean, memory = agent.policy_mean(agent.obs_statistics.normalize(obs)[None], memory, fresh[None])
    action = mean[0] + agent.log_std.exp() * noise
    return mean[0], action, agent.to_env(action), memory


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
def make_batch(agent: Agent, rollout: Rollout, value: Tensor, advantage: Tensor, order: Tensor) -> Batch:
    """Normalise everything once, shuffle the environments once: every epoch then walks over the same minibatches of sequences.

    The return statistics are updated here and only here, before the targets are scaled with them."""
    valid, returns = ~rollout.invalid, advantage + value
    agent.return_statistics.update(returns.flatten()[:, None], valid.flatten())
    count, mean, variance = weighted_moments(advantage.flatten()[:, None], valid.flatten())
    advantage = (advantage - mean.float()) / (variance.sqrt().float() + 1e-8)
    weight = valid * (sum_over_processes(torch.full_like(count, valid.numel())) / count.clamp(min=1.0)).float()
    obs = agent.obs_statistics.normalize(rollout.obs)
    critic_obs = agent.critic_obs_statistics.normalize(rollout.critic_obs)
    log_prob = gaussian_log_prob(rollout.action, rollout.mean, agent.log_std)
    # A quarantined transition may hold NaN, which a weight of 0 does not remove.
    target, advantage = (torch.where(valid, x, 0.0) for x in (agent.return_statistics.normalize(returns), advantage))
    sequences = obs, rollout.fresh, rollout.memory[None], critic_obs, rollout.action, rollout.mean, log_prob
    return Batch(*(x[:, order] for x in (*sequences, target, advantage, weight)))


def ppo_loss(agent: Agent, batch: Batch, old_log_std: Tensor, samples: int, args: Args) -> tuple[Tensor, Tensor]:
    """The share of this (part of a) batch in the loss of a minibatch of `samples`, and the same share of LossTerms, stacked.

    A weight on the value loss would only move the point at which max_grad_norm bites: the networks share no parameter, and Adam
    divides the scale out."""
    mean, _ = agent.policy_mean(batch.obs, batch.memory[0], batch.fresh)
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
    agent: Agent, batch: Batch, old_log_std: Tensor, microbatch: int, loss_function, args: Args
) -> Tensor:
    """Gradients of the minibatch's loss, added up over parts that fit the cache; returns its LossTerms, stacked."""
    agent.zero_grad()
    total = 0.0
    for part in zip(*(x.split(microbatch, 1) for x in batch), strict=True):
        loss, terms = loss_function(agent, Batch(*part), old_log_std, batch.weight.numel(), args)
        loss.backward()
        total = total + terms
    return total


@torch.no_grad()
def apply_gradients(
    agent: Agent, optimizer: torch.optim.Optimizer, max_grad_norm: float, log_std_min: float, policy_stands: bool
) -> None:
    """One Adam step on clipped gradients, then the floor under the exploration noise.

    policy_stands: the value function alone moves, and Adam's state of the policy stays that of a fresh start."""
    policy = agent.policy_parameters()
    if policy_stands:
        for parameter in policy:
            parameter.grad.zero_()
    nn.utils.clip_grad_norm_(policy, max_grad_norm)
    nn.utils.clip_grad_norm_(agent.critic.parameters(), max_grad_norm)
    optimizer.step()
    if policy_stands:
        for parameter in policy:
            optimizer.state[parameter]["step"].zero_()  # else its first steps would be corrected for a past it had not
    else:
        agent.log_std.clamp_(min=log_std_min)


def update(
    agent: Agent,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    learning_rate: Tensor,
    policy_stands: bool,
    sizes: Sizes,
    loss_function,
    args: Args,
) -> Tensor:
    """All gradient steps of one iteration of PPO; returns the LossTerms summed over them, stacked.

    Each minibatch measures how far the policy has moved since the rollout, sets the learning rate, and takes one step."""
    old_log_std = agent.log_std.detach().clone()
    total = torch.zeros(len(LossTerms._fields), device=old_log_std.device)
    for epoch in range(args.update_epochs):
        for start in range(0, batch.weight.shape[1], sizes.minibatch):
            part = Batch(*(x[:, start : start + sizes.minibatch] for x in batch))
            terms = accumulate_gradients(agent, part, old_log_std, sizes.microbatch, loss_function, args)
            average_over_processes([*(p.grad for p in agent.parameters()), terms])
            moved = epoch > 0 or start > 0  # before the first step the divergence is 0 and says nothing
            if moved and not policy_stands:
                bounds = args.learning_rate_min, args.learning_rate_max
                kl = LossTerms(*terms).kl
                learning_rate.copy_(adapted_learning_rate(learning_rate, kl, args.desired_kl, *bounds))
            apply_gradients(agent, optimizer, args.max_grad_norm, args.log_std_min, policy_stands)
            total += terms
    return total


def adapted_learning_rate(
    learning_rate: Tensor, kl: Tensor, desired_kl: float, lowest: float, highest: float
) -> Tensor:
    """A factor of 1.5 down where the policy moved over twice as far as desired, up where less than half as far."""
    factor = torch.where(kl > 2.0 * desired_kl, 1.0 / 1.5, torch.where(kl < 0.5 * desired_kl, 1.5, 1.0))
    return (learning_rate * factor).clamp(lowest, highest)


@torch.no_grad()
def teacher_actions(teacher: Agent, view: View, obs: Tensor) -> Tensor:
    """The teacher's mean action (T, N, actions), half ranges, on privileged observations (T, N, all privileged).

    No noise, and its statistics as its own training left them."""
    seen = teacher.obs_statistics.normalize(view.of(obs, obs))
    memory, fresh = teacher.blank(obs.shape[1])  # a teacher remembers nothing
    return teacher.policy_mean(seen, memory, fresh.expand(len(obs), -1))[0]


def imitation_loss(
    agent: Agent, obs: Tensor, fresh: Tensor, memory: Tensor, label: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean square difference to the labels over a slice, ImitationTerms, stacked, and the memory after the slice.

    obs: (T, B, obs), normalised; fresh: (T, B) bool; memory: (B, memory) before the slice; label: (T, B, actions), half ranges;
    weight: (T, B), 0 for a quarantined transition."""
    mean, memory = agent.policy_mean(obs, memory, fresh)
    total = weight.sum().clamp(min=1.0)
    loss = ((mean - label).square().mean(-1) * weight).sum() / total
    error = ((mean - label).abs().mean(-1) * weight).sum() / total
    return loss, torch.stack([loss, error]).detach(), memory


def imitate(
    agent: Agent,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    label: Tensor,
    order: Tensor,
    sizes: Sizes,
    loss_function,
    args: Args,
) -> Tensor:
    """All gradient steps of one iteration of imitation; returns the ImitationTerms summed over them, stacked.

    Slices of gradient_length steps follow one another in time, one Adam step each; the memory goes on from slice to slice, its
    gradient does not. label: (T, N, actions), half ranges; order: (N,) in which the environments fall into minibatches."""
    sequences = agent.obs_statistics.normalize(rollout.obs), rollout.fresh, label, (~rollout.invalid).float()
    total = torch.zeros(len(ImitationTerms._fields), device=label.device)
    for _ in range(args.distill_epochs):
        for part in order.split(sizes.distill_minibatch):
            memory = rollout.memory[part]
            slices = (x[:, part].split(args.gradient_length) for x in sequences)
            for obs, fresh, target, weight in zip(*slices, strict=True):
                loss, terms, memory = loss_function(agent, obs, fresh, memory.detach(), target, weight)
                agent.zero_grad(set_to_none=False)
                loss.backward()
                average_over_processes([*(p.grad for p in agent.parameters()), terms])
                nn.utils.clip_grad_norm_(agent.policy_parameters(), args.max_grad_norm)
                optimizer.step()
                total += terms
    return total


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


@torch.no_grad()
def begin_student(agent: Agent, teacher: Agent, args: Args) -> None:
    """A student explores with distill_noise and inherits the teacher's value function, for fine-tuning: both see the same."""
    agent.log_std.fill_(math.log(args.distill_noise))
    for part in ("critic", "critic_obs_statistics", "return_statistics"):
        getattr(agent, part).load_state_dict(getattr(teacher, part).state_dict())


@torch.no_grad()
def begin_finetune(agent: Agent, student: dict, args: Args) -> None:
    """The student of a checkpoint, with exploration noise of its own."""
    agent.load_state_dict(student["agent"])
    agent.log_std.fill_(args.finetune_log_std)


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


def check_resumable(checkpoint: dict, args: Args, world_size: int) -> None:
    """Refuse to continue under flags that do not fit the state, or that would do nothing because it holds what they set."""
    names = "env_id env_kwargs teacher_groups student_groups actor_hidden critic_hidden student_network student_hidden"
    names += " student_history student_memory num_envs num_steps distill_steps seed log_std_init distill_noise"
    check_unchanged(checkpoint, args, f"{names} finetune_log_std random_initial_ages teacher student")
    if checkpoint["stage"] == "finetune" and not warming_up(checkpoint):  # the policy must not be frozen again
        check_unchanged(checkpoint, args, "critic_warmup_iterations")
    if len(checkpoint["processes"]) != world_size:
        raise InputError(f"the checkpoint was written by {len(checkpoint['processes'])} processes, not {world_size}")


def warming_up(checkpoint: dict) -> bool:
    """Whether the checkpoint is of a fine-tuning in which the policy has not moved yet."""
    warm_up = checkpoint["args"]["critic_warmup_iterations"]
    return checkpoint["stage"] == "finetune" and checkpoint["iteration"] <= warm_up


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


def stages_to_run(args: Args, checkpoint: dict | None, sizes: Sizes) -> list[str]:
    """In their order; with --resume what the checkpoint leaves to do. InputError where that is nothing."""
    order = get_args(Stage)
    stages = [stage for stage in order if stage in args.stages]
    for stage, given in (("teacher", args.teacher), ("student", args.student)):
        if stage in stages and given:
            raise InputError(f"--{stage} stands for the stage {stage}, which --stages asks for: give one of them")
    if not checkpoint:
        return stages
    stage, iteration = checkpoint["stage"], checkpoint["iteration"]
    finished = iteration >= sizes.plans[stage].iterations
    left = [name for name in stages if order.index(name) >= order.index(stage) + finished]
    if not left:
        raise InputError(
            f"the checkpoint has {checkpoint['env_steps']:,} steps of the stage {stage} already and --stages "
            f"{' '.join(stages)} names none after it; give more --total-timesteps or a later stage"
        )
    return left


def load_starts(args: Args, stages: list[str]) -> dict[str, dict]:
    """Checkpoints of stages that this run does not train: those given, and those in its own folder."""
    starts, given = {}, dict(teacher=args.teacher, student=args.student)
    for stage in get_args(Stage)[:-1]:
        own = Path(args.run_dir) / stage / "checkpoint.pt"
        path = given.get(stage) or (str(own) if own.exists() else None)
        if stage in stages or path is None:
            continue
        starts[stage] = load_checkpoint(path, "distill")
        found = starts[stage]["stage"]
        if found != stage and (stage, found) != ("student", "finetune"):
            raise InputError(f"{path} is the checkpoint of a {found}, not of a {stage}")
    return starts


def check_stages(args: Args, stages: list[str], starts: dict[str, dict], resumed: str | None) -> None:
    """Every stage must have what it starts from, and must not write over another run's."""
    available = {*stages, *starts}
    for stage, needed in (("student", "teacher"), ("finetune", "student")):
        if stage in stages and stage != resumed and needed not in available:
            raise InputError(f"the stage {stage} starts from a {needed}: add it to --stages, or give --{needed} PATH")
    if not available - {"evidence"}:
        raise InputError("the stage evidence has no policy to look at: give --resume, --teacher or --student PATH")
    run_dir = Path(args.run_dir)
    own = args.resume and Path(args.resume).resolve().parent.parent == run_dir.resolve()
    for stage in stages:
        holds_one = os.path.exists(run_dir / stage / "checkpoint.pt") and stage != resumed
        if holds_one or (not own and os.path.exists(run_dir / "config.json")):
            raise InputError(
                f"run_dir = {args.run_dir} holds a run already; choose another, or --resume a checkpoint.pt in it"
            )


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


def describe(score: dict[str, float]) -> str:
    spread = f"{score['mean']:.1f} +- {score['std']:.1f} (lowest {score['min']:.1f}"
    return f"{spread}, {score['episodes']} episodes of {score['mean_length']:.0f} steps)"


@torch.no_grad()
def first_episode_outcomes(
    agent: Agent, view: View, env: gymnasium.vector.VectorEnv, seed: int
) -> dict[str, np.ndarray]:
    """The first episode of each environment, (N,) each, under the deterministic policy and frozen statistics.

    episode_return; length, steps; fell: terminated; failed: quarantined; and of a task that reports its velocity_error (m/s) the mean
    of it and of yaw_error (rad/s) over the episode's steps, tracking, exp(-velocity_error^2 / 0.25 (m/s)^2) averaged over the steps
    that the episode could have had, so that a fall costs the rest, and terrain_level where there is terrain."""
    obs, info = env.reset(seed=seed)
    memory, fresh = agent.blank(len(obs))
    running = fresh.clone()
    names = "episode_return length fell failed velocity_error yaw_error tracking terrain_level".split()
    sums = {name: torch.zeros(len(obs), dtype=torch.float64, device=obs.device) for name in names}
    reported = set()
    while running.any():  # host sync
        action, memory = agent.act(view.of(obs, privileged_observation(obs, info)), memory, fresh)
        obs, reward, terminated, truncated, info = env.step(action)
        valid = running & ~info["invalid"]
        terms = dict(episode_return=reward, length=torch.ones_like(reward), fell=terminated)
        terms |= {name: info[name] for name in ("velocity_error", "yaw_error", "terrain_level") if name in info}
        if "velocity_error" in info:
            terms |= dict(tracking=torch.exp(-info["velocity_error"].square() / 0.25))
        for name, value in terms.items():
            sums[name] += torch.where(valid, value.double(), 0.0)
        sums["failed"] += running & info["invalid"]
        fresh = terminated | truncated | info["invalid"]
        running &= ~fresh
        reported.update(terms)
    length = sums["length"].clamp(min=1.0)
    for name in ("velocity_error", "yaw_error", "terrain_level"):
        sums[name] /= length
    if "tracking" in reported:
        sums["tracking"] /= env.settings.max_episode_steps
    kept = [name for name in names if name in reported | {"failed"}]
    return {name: sums[name].cpu().numpy() for name in kept}  # host sync


def score(outcomes: dict[str, np.ndarray], levels: int | None, largest_error: float = 0.5) -> dict:
    """Shares of all robots; other means over those that were not quarantined; None where the task has no such thing.

    success: share of the robots that neither fell nor were quarantined and, where velocities are commanded, had a mean error under
    largest_error (m/s). falls: share that fell or were quarantined. by_level: of each terrain level how many robots were put on
    it, and how many succeeded."""
    valid = outcomes["failed"] == 0
    if not valid.any():
        raise RuntimeError("every environment of the evaluation was quarantined: the policy breaks the simulator")
    success = valid & (outcomes["fell"] == 0)
    if "velocity_error" in outcomes:
        success = success & (outcomes["velocity_error"] < largest_error)
    mean = {name: float(x[valid].mean()) for name, x in outcomes.items()}
    by_level = None
    if levels is not None and "terrain_level" in outcomes:
        put = [outcomes["terrain_level"].round() == k for k in range(levels)]
        by_level = [[int(row.sum()), int(success[row].sum())] for row in put]
    return dict(
        success=float(success.mean()),
        falls=float(((outcomes["fell"] > 0) | ~valid).mean()),
        velocity_error=mean.get("velocity_error"),
        yaw_error=mean.get("yaw_error"),
        tracking=float(outcomes["tracking"].mean()) if "tracking" in outcomes else None,  # what was left counts as nothing
        terrain_level=mean.get("terrain_level"),
        episode_return=mean["episode_return"],
        length=mean["length"],
        episodes=len(valid),
        quarantined=int((~valid).sum()),
        by_level=by_level,
    )


def levels_mastered(by_level: list[list[list[int]]], share: float = 0.5) -> int:
    """How many levels, from the lowest on, at least `share` of the robots put on them master; by_level of each seed, added up."""
    for level, cells in enumerate(zip(*by_level, strict=True)):
        robots, successes = (sum(x) for x in zip(*cells, strict=True))
        if successes < share * max(robots, 1):  # nobody there: nothing is known of it, nor of what is above
            return level
    return len(by_level[0])


def versions() -> dict[str, str]:
    return dict(
        python=sys.version.split()[0],
        torch=str(torch.__version__),
        gymnasium=gymnasium.__version__,
        numpy=np.__version__,
    )


def check_env_kwargs(args: Args) -> None:
    """Refuse options that this script sets itself."""
    other_advice = {"iterations": "use --solver-iterations", "dtype": "it is float32", "numpy": "it is False"}
    for name in "env_id num_envs device dtype seed compile integrator iterations random_initial_ages numpy".split():
        if name in args.env_kwargs:
            advice = other_advice.get(name, f"use --{name.replace('_', '-')}")
            raise InputError(f"env_kwargs sets {name}, which this script sets itself; {advice}")


# ------------------------------------------------------------------------------------------------------------------------
# Evidence
# ------------------------------------------------------------------------------------------------------------------------


def make_evidence_env(
    args: Args, make_env, device: torch.device, num_envs: int, compile: bool, **options
) -> gymnasium.vector.VectorEnv:
    """An environment without randomisation, but for what `options` add."""
    kept = {x: value for x, value in args.env_kwargs.items() if x.split(".")[0] not in ("randomize", "perturb")}
    options = dict(num_envs=num_envs, device=str(device), seed=0, compile=compile, integrator=args.integrator) | options
    with refusals_of_the_simulator():
        return make_env(args.env_id, iterations=args.solver_iterations, **(kept | options))


def check_evidence(
    args: Args, make_env, device: torch.device, panel: dict = PERTURBATIONS, film_options: dict = FILM_OPTIONS
) -> None:
    """Refuse now, rather than after the training, a perturbation or a film that the task cannot have."""
    conditions = {f"perturbation {name}": dict(perturb=panel[name]) for name in args.evidence_perturbations}
    for name, options in (conditions | {"film": film_options.get(args.env_id, {})}).items():
        try:
            make_evidence_env(args, make_env, device, 1, False, **options).close()
        except InputError as error:
            raise InputError(f"evidence, {name}: {error}") from error


def gather_evidence(
    policies: dict[str, tuple[Agent, View]],
    args: Args,
    make_env,
    device: torch.device,
    panel: dict = PERTURBATIONS,
    task_options: dict = EVIDENCE_OPTIONS,
) -> list[dict]:
    """A row for each policy, perturbation and seed. With one seed all policies meet the same robots, commands and pushes."""
    rows = []
    for name in args.evidence_perturbations:
        options = task_options.get(args.env_id, {}) | dict(perturb=panel[name])
        env = make_evidence_env(args, make_env, device, args.eval_episodes, args.compile, **options)
        for policy, (agent, view) in policies.items():
            for seed in args.evidence_seeds:
                outcomes = first_episode_outcomes(agent, view, env, seed)
                levels = getattr(env.task, "terrain_rows", None)
                rows.append(dict(policy=policy, perturbation=name, seed=seed) | score(outcomes, levels))
            tqdm.write(f"evidence: {name}, {policy}: success {rows[-1]['success']:.2f} with the last seed")
        env.close()
    return rows


def mean_over_seeds(rows: list[dict], policy: str, perturbation: str, metric: str) -> float | None:
    values = [row[metric] for row in rows if (row["policy"], row["perturbation"]) == (policy, perturbation)]
    return None if None in values or not values else sum(values) / len(values)


def paired_difference(rows: list[dict], policy: str, other: str, perturbation: str, metric: str) -> dict | None:
    """Mean of policy - other, paired by seed, and the ends of its 95% t interval; None with less than two seeds."""
    values = {(row["policy"], row["seed"]): row[metric] for row in rows if row["perturbation"] == perturbation}
    seeds = [seed for name, seed in values if name == policy]
    if len(seeds) < 2 or None in values.values():
        return None
    differences = np.array([values[policy, seed] - values[other, seed] for seed in seeds])
    half = stats.t.ppf(0.975, len(seeds) - 1) * differences.std(ddof=1) / math.sqrt(len(seeds))
    mean = float(differences.mean())
    return dict(mean=mean, low=mean - float(half), high=mean + float(half))


def write_evidence(
    rows: list[dict], sources: dict, args: Args, device: torch.device, run_dir: Path, panel: dict = PERTURBATIONS
) -> dict:
    """evidence.json, with what made it, evidence.csv and evidence.png; returns what the JSON holds."""
    metrics = "success falls velocity_error yaw_error tracking episode_return length quarantined".split()
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    summary = {
        policy: {
            name: {metric: mean_over_seeds(rows, policy, name, metric) for metric in metrics}
            for name in args.evidence_perturbations
        }
        for policy in policies
    }
    for name in args.evidence_perturbations:  # what was lost on the way
        reference = summary.get("teacher", {}).get(name, {}).get("tracking")
        for policy in policies:
            mine = summary[policy][name]
            mine["tracking_of_teacher"] = mine["tracking"] / reference if reference else None
            by_level = [row["by_level"] for row in rows if (row["policy"], row["perturbation"]) == (policy, name)]
            mine["levels_mastered"] = None if None in by_level else levels_mastered(by_level)
            others = [other for other in policies if other != policy]
            for metric in ("tracking", "falls"):  # a difference is shown where its interval does not contain 0
                pairs = {other: paired_difference(rows, policy, other, name, metric) for other in others}
                mine[f"{metric}_beyond"] = pairs
    on_gpu = device.type == "cuda"
    hardware = torch.cuda.get_device_name(device) if on_gpu else vecsim_torch.cpu_name()
    evidence = dict(env_id=args.env_id, algorithm="distill", seeds=args.evidence_seeds, episodes=args.eval_episodes)
    evidence |= dict(perturbations={name: panel[name] for name in args.evidence_perturbations}, policies=sources)
    evidence |= dict(summary=summary, rows=rows, args=dataclasses.asdict(args), versions=versions(), hardware=hardware)
    (run_dir / "evidence.json").write_text(json.dumps(evidence, indent=2))
    with (run_dir / "evidence.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [x for x in rows[0] if x != "by_level"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    plot_evidence(rows, summary, args, run_dir / "evidence.png")
    return evidence


def plot_evidence(rows: list[dict], summary: dict, args: Args, path: Path) -> None:
    """Bars: means over seeds, or over all robots; dots: the seeds."""
    titles = dict(success="success rate", velocity_error="velocity error, m/s", falls="share of falls", levels_mastered="levels mastered", tracking="tracking score")  # fmt: skip
    policies, names = list(summary), args.evidence_perturbations
    shown = {metric: title for metric, title in titles.items() if summary[policies[0]][names[0]][metric] is not None}
    figure, width = Figure(figsize=(11, 2.2 * len(shown) + 1), layout="constrained"), 0.8 / len(policies)
    axes = np.atleast_1d(figure.subplots(len(shown), sharex=True))
    for axis, (metric, title) in zip(axes, shown.items(), strict=True):
        for k, policy in enumerate(policies):
            places = [i + (k - (len(policies) - 1) / 2) * width for i in range(len(names))]
            means = [summary[policy][name][metric] for name in names]
            axis.bar(places, [math.nan if x is None else x for x in means], width, label=policy)
            for place, name in zip(places, names, strict=True):
                seeds = [row.get(metric) for row in rows if (row["policy"], row["perturbation"]) == (policy, name)]
                dots = [x for x in seeds if x is not None]
                axis.plot([place] * len(dots), dots, "k.", markersize=2)
        axis.set_ylabel(title)
        axis.grid(axis="y", alpha=0.3)
    axes[-1].set_xticks(range(len(names)), [name.replace("_", " ") for name in names], rotation=15, ha="right")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=len(policies))
    figure.suptitle(f"{args.env_id}: {len(args.evidence_seeds)} seeds x {args.eval_episodes} episodes", x=0.01, ha="left")
    figure.savefig(path, dpi=120)


def film(
    agent: Agent, view: View, args: Args, make_env, path: Path, task_options: dict = FILM_OPTIONS, pictures: int = 8
) -> str:
    """Pictures of one episode, in two lines, at most 6 s: the first robot on stairs where there are any, whatever becomes of it.

    Returns a line that says where they are, or why there are none."""
    import imageio.v2 as imageio
    import mujoco
    from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer

    if "DISPLAY" not in os.environ:
        # Without a screen MuJoCo draws through EGL; where that is missing too, set MUJOCO_GL=osmesa.
        os.environ.setdefault("MUJOCO_GL", "egl")
    options = task_options.get(args.env_id, {})
    env = make_evidence_env(args, make_env, torch.device("cpu"), 20, False, **options)
    obs, info = env.reset(seed=args.seed)
    agent = agent.cpu()
    view = view._replace(columns=view.columns.cpu())
    memory, fresh = agent.blank(len(obs))
    alive, positions, length = fresh.clone(), [], torch.zeros(len(obs), dtype=torch.long)
    for _ in range(round(6 * env.metadata["render_fps"])):
        positions.append(env.state().qpos)
        length += alive
        action, memory = agent.act(view.of(obs, privileged_observation(obs, info)), memory, fresh)
        obs, _, terminated, truncated, info = env.step(action)
        fresh = terminated | truncated
        alive &= ~fresh
    robot, model = 0, env.task.drawn_model(env.model, env.mj_model)
    if env.model.terrain is not None:
        quadruped = sys.modules[type(env.task).__module__]
        columns = info["terrain_column"].long()  # robots keep theirs
        ends = torch.tensor(quadruped.TERRAIN_SHARES).cumsum(0)
        kinds = torch.searchsorted(ends, (columns + 0.5) / env.model.terrain.tiles[1])
        stairs = [k for k, kind in enumerate(kinds.tolist()) if "stairs" in quadruped.TERRAIN_TYPES[kind]]
        robot = stairs[0] if stairs else 0
    env.close()
    try:
        renderer = MujocoRenderer(model, data := mujoco.MjData(model), width=320, height=240, camera_name="track")
        frames = []
        for moment in np.linspace(0, int(length[robot]) - 1, pictures).round().astype(int):
            data.qpos[:] = positions[moment][:, robot].numpy()
            mujoco.mj_forward(model, data)
            frames.append(renderer.render("rgb_array"))
        renderer.close()
    except (AttributeError, ImportError, RuntimeError, mujoco.FatalError) as error:  # what its OpenGL back ends raise
        return f"no pictures: MuJoCo cannot draw here ({type(error).__name__}: {error}); try MUJOCO_GL=osmesa"
    lines = np.concatenate(frames[: pictures // 2], 1), np.concatenate(frames[pictures // 2 :], 1)
    imageio.imwrite(path, np.concatenate(lines, 0))
    return f"pictures over {int(length[robot]) / env.metadata['render_fps']:.1f} s: {path}"


# ------------------------------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------------------------------


def train_stage(
    stage: str,
    args: Args,
    sizes: Sizes,
    env: gymnasium.vector.VectorEnv,
    views: dict[str, View],
    starts: dict[str, dict],
    checkpoint: dict | None,
    rank: int,
    profiled: tuple[int, int],
    stop: StopSignals,
) -> tuple[dict, dict]:
    """One training stage, from `starts` or from its own checkpoint; writes its folder, returns its last checkpoint and its results."""
    # Set-up: the stage alone decides its random numbers, so that it comes out the same within a run and by itself.
    preparation_started = time.perf_counter()
    device, plan, stream = env.device, sizes.plans[stage], 3 * get_args(Stage).index(stage)
    moved = checkpoint is not None and checkpoint["device"] != device.type
    seed = reseeded(args.seed, checkpoint, device, rank) if moved else args.seed
    torch.manual_seed(stream_seed(args.seed, 0, stream))  # the initial weights, the same in every process
    generator = torch.Generator(device).manual_seed(stream_seed(seed, rank, stream + 1))
    view, action_size = views["teacher" if stage == "teacher" else "student"], env.single_action_space.shape[0]
    agent = make_agent(stage, views, env.single_action_space, args).to(device)
    teacher, first_learning_rate = None, args.learning_rate
    if stage == "student":
        teacher = make_agent("teacher", views, env.single_action_space, args).to(device)
        teacher.load_state_dict(checkpoint["teacher"] if checkpoint else starts["teacher"]["agent"])
        begin_student(agent, teacher.requires_grad_(False).eval(), args)
        first_learning_rate = args.distill_learning_rate
    elif stage == "finetune" and not checkpoint:
        begin_finetune(agent, starts["student"], args)
    learning_rate = torch.tensor(first_learning_rate, device=device)
    optimizer = make_optimizer(agent, learning_rate)
    sizes_of_rows = len(view.columns), agent.memory_size, len(views["critic"].columns), action_size
    rollout = allocate_rollout(plan.num_steps, sizes.envs, *sizes_of_rows, device)
    policy, loss_function = prepare_functions(stage, agent, rollout, sizes, args)
    env.random_initial_ages = args.random_initial_ages
    obs, info = env.reset(seed=stream_seed(seed, rank, stream + 2))
    privileged_obs = privileged_observation(obs, info)
    memory, fresh = agent.blank(sizes.envs)
    first_iteration, train_seconds = 0, 0.0
    if checkpoint:
        load_training_state(checkpoint, agent, optimizer, learning_rate)
        name = "finetune_learning_rate" if stage == "finetune" else "learning_rate"
        given = getattr(args, name) != checkpoint["args"][name]
        if given or warming_up(checkpoint):  # a rate given anew wins over the adapted one
            learning_rate.fill_(getattr(args, name))
        mine = checkpoint["processes"][rank]
        with refusals_of_the_simulator():
            env.load_state_dict(mine["env"])
        if not moved:
            generator.set_state(mine["generator"])
        obs, privileged_obs, memory, fresh = (mine[x].to(device) for x in ("obs", "privileged_obs", "memory", "fresh"))
        first_iteration, train_seconds = checkpoint["iteration"], checkpoint["train_seconds"]
    compile_seconds = time.perf_counter() - preparation_started
    run_dir, log = Path(args.run_dir) / stage, None
    logged_step, logged_seconds = first_iteration * plan.steps_per_iteration, train_seconds
    if rank == 0:  # the one writer
        budget = plan.iterations * plan.steps_per_iteration
        log = RunLog(run_dir, dataclasses.replace(args, total_timesteps=budget), logged_step)
        tqdm.write(
            f"{stage}: prepared in {compile_seconds:.1f} s; sees {', '.join(view.groups)}\n{args.num_envs:,} environments x "
            f"{plan.num_steps} steps = {plan.steps_per_iteration:,} samples, {plan.gradient_steps} gradient steps, "
            f"{plan.iterations:,} times"
        )
        if stage == "finetune" and plan.iterations <= args.critic_warmup_iterations:
            tqdm.write("finetune: all of it is warm-up of the value function, the policy will not move; see --critic-warmup-iterations")
    kind = ImitationTerms if stage == "student" else LossTerms
    profile = Profile(args.profile and rank == 0, device, *profiled)
    terms, record, state, clock = torch.zeros(len(kind._fields), device=device), {}, {}, time.perf_counter()

    stop.training = True
    for iteration in range(first_iteration, plan.iterations):
        # Rollout: copies into the storage, because the simulator's tensors live until its next step.
        profile.start_iteration()
        noise = torch.randn(plan.num_steps, sizes.envs, action_size, generator=generator, device=device)
        rollout.memory.copy_(memory)
        for t in range(plan.num_steps):
            seen = view.of(obs, privileged_obs)
            rollout.obs[t], rollout.fresh[t], rollout.critic_obs[t] = seen, fresh, privileged_obs
            with profile.stage("infer"):
                rollout.mean[t], rollout.action[t], env_action, memory = policy(agent, seen, memory, fresh, noise[t])
            with profile.stage("simulate"):
                obs, reward, rollout.terminated[t], rollout.truncated[t], info = env.step(env_action)
            rollout.reward[t], rollout.invalid[t] = reward * args.reward_scale, info["invalid"]
            rollout.final_critic_obs[t] = privileged_observation(info["final_obs"], info, "final_")
            fresh = rollout.terminated[t] | rollout.truncated[t] | rollout.invalid[t]
            privileged_obs = privileged_observation(obs, info)

        # Update, under the statistics of the rollout.
        order = torch.randperm(sizes.envs, generator=generator, device=device)
        policy_stands = stage == "finetune" and iteration < args.critic_warmup_iterations
        if stage == "finetune" and iteration <= args.critic_warmup_iterations:
            learning_rate.fill_(args.learning_rate if policy_stands else args.finetune_learning_rate)
        if stage == "student":
            learning_rate.fill_(args.distill_learning_rate * (1.0 - iteration / plan.iterations))
            with profile.stage("targets"):
                label = teacher_actions(teacher, views["teacher"], rollout.critic_obs)
            with profile.stage("update"):
                terms += imitate(agent, optimizer, rollout, label, order, sizes, loss_function, args)
        else:
            with profile.stage("targets"):
                rows = sizes.microbatch * plan.num_steps
                value, advantage = values_and_advantages(agent, rollout, rows, args.gamma, args.gae_lambda)
                batch = make_batch(agent, rollout, value, advantage, order)
            with profile.stage("update"):
                terms += update(agent, optimizer, batch, learning_rate, policy_stands, sizes, loss_function, args)
            agent.critic_obs_statistics.update(rollout.critic_obs.flatten(0, 1), ~rollout.invalid.flatten())
        if not policy_stands:  # a policy whose statistics move does not stand
            agent.obs_statistics.update(rollout.obs.flatten(0, 1), ~rollout.invalid.flatten())
        profile.end_iteration(run_dir, plan.steps_per_iteration)

        # Log and save: whenever a multiple of the interval was crossed.
        env_steps = (iteration + 1) * plan.steps_per_iteration
        before, last = env_steps - plan.steps_per_iteration, iteration + 1 == plan.iterations
        stopping = stop.requested()
        log_now = last or stopping or crossed(args.log_every, before, env_steps)
        save_now = last or stopping or crossed(args.checkpoint_every, before, env_steps)
        if not (log_now or save_now):
            continue
        terms /= (env_steps - logged_step) // plan.steps_per_iteration * plan.gradient_steps
        names = (*kind._fields, "learning_rate", "action_std")
        numbers = torch.stack([*terms, learning_rate, agent.log_std.exp().mean()]).tolist()  # host sync
        episodes = merge_episode_statistics(env.pop_statistics(), device)  # host sync
        train_seconds += time.perf_counter() - clock
        speed = (env_steps - logged_step) / (train_seconds - logged_seconds)
        record = dict(env_steps=env_steps, wall_seconds=train_seconds, steps_per_second=speed) | episodes
        record |= {name: x if math.isfinite(x) else None for name, x in zip(names, numbers, strict=True)}
        if None in [record[name] for name in kind._fields]:
            raise FloatingPointError(f"{stage}: training diverged by {env_steps:,} steps: {record}")
        if log:
            log.write(record)
        if save_now:
            mine = dict(env=env.state_dict(), generator=generator.get_state(), obs=obs, privileged_obs=privileged_obs)
            mine |= dict(memory=memory, fresh=fresh)
            state = dict(algorithm="distill", stage=stage, env_id=args.env_id, args=dataclasses.asdict(args))
            state |= dict(iteration=iteration + 1, env_steps=env_steps, train_seconds=train_seconds)
            state |= dict(groups={who: x.groups for who, x in views.items()}, device=device.type, versions=versions())
            state |= dict(teacher=teacher.state_dict() if teacher else None)
            state |= dict(processes=gather_from_processes(on_cpu(mine)))
            state = on_cpu(state | training_state(agent, optimizer, learning_rate))
            if log:
                save_checkpoint(run_dir / "checkpoint.pt", state)
                stop.checkpoint = run_dir / "checkpoint.pt"
        terms.zero_()
        logged_step, logged_seconds, clock = env_steps, train_seconds, time.perf_counter()
        if stopping:
            if log:
                log.close()
            raise KeyboardInterrupt

    # Score of the stage, by the one writer.
    stop.end_training()
    if not log:
        return state, record
    log.close()
    plot_curve(run_dir, f"{args.env_id}, {stage}, seed {args.seed}")
    env.random_initial_ages = False  # whole episodes
    outcomes = first_episode_outcomes(agent, view, env, args.seed)
    valid = outcomes["failed"] == 0
    evaluation = dict(env_id=args.env_id, algorithm="distill", seed=args.seed, env_steps=logged_step)
    evaluation |= dict(train_seconds=train_seconds, compile_seconds=compile_seconds, stage=stage)
    evaluation |= dict(outcomes=score(outcomes, levels=None), gymnasium=None)
    evaluation |= dict(vecsim=summarize(outcomes["episode_return"][valid], outcomes["length"][valid]))
    write_text(run_dir / "eval.json", json.dumps(evaluation, indent=2))
    level = evaluation["outcomes"]["terrain_level"]
    where = "" if level is None else f", on level {level:.1f} of the terrain, where the curriculum begins"
    print(f"{stage}, vecsim: {describe(evaluation['vecsim'])}{where}")
    return state, record | evaluation


def prepare_functions(
    stage: str, agent: Agent, rollout: Rollout, sizes: Sizes, args: Args
) -> tuple[Callable, Callable]:
    """policy_step and the loss function of the stage, eager or compiled; run once, so that compilation is timed apart."""
    policy, loss_function = policy_step, imitation_loss if stage == "student" else ppo_loss
    if args.compile:
        policy, loss_function = (torch.compile(f, dynamic=False) for f in (policy, loss_function))
    r = rollout
    policy(agent, r.obs[0], r.memory, r.fresh[0], r.action[0])
    if stage == "student":
        part = torch.arange(sizes.distill_minibatch, device=r.obs.device)
        obs, fresh, label, weight = (x[: args.gradient_length, part] for x in (r.obs, r.fresh, r.action, r.reward))
        loss_function(agent, obs, fresh, r.memory[part], label, weight)[0].backward()
    else:
        features = r.obs, r.fresh, r.memory[None], r.critic_obs, r.action, r.mean
        example = Batch(*(x[:, : sizes.minibatch] for x in (*features, *[r.reward] * 4)))
        accumulate_gradients(agent, example, agent.log_std.detach(), sizes.microbatch, loss_function, args)
    return policy, loss_function


def train(
    args: Args, make_env=vecsim_torch.make, profiled: tuple[int, int] = PROFILED, stop: StopSignals | None = None
) -> dict:
    """Run the stages and write the run folder; returns the results of each.

    Raises KeyboardInterrupt when `stop` asks for it, after the iteration at hand and with its checkpoint written."""
    # Everything is checked before anything is trained.
    stop = stop or StopSignals()
    stop.checkpoint = args.resume
    args = with_task_defaults(args)
    device = pick_device(args.device)
    rank, world_size = start_processes(device)
    checkpoint = load_checkpoint(args.resume, "distill") if args.resume else None
    sizes = derive_sizes(args, world_size, profiled=profiled, checkpoint=checkpoint)
    check_env_kwargs(args)
    stages = stages_to_run(args, checkpoint, sizes)
    starts = load_starts(args, stages)
    resumed = checkpoint["stage"] if checkpoint and checkpoint["stage"] in stages else None
    if resumed:
        check_resumable(checkpoint, args, world_size)
    check_stages(args, stages, starts, resumed)
    torch.set_float32_matmul_precision("high")  # TF32 for the networks on a GPU; the physics multiplies no matrices
    options = dict(num_envs=sizes.envs, device=str(device), seed=args.seed, compile=args.compile)
    options |= dict(integrator=args.integrator, iterations=args.solver_iterations) | args.env_kwargs
    with refusals_of_the_simulator():
        env = make_env(args.env_id, random_initial_ages=args.random_initial_ages, **options)
    views = make_views(env, args)
    for stage, start in starts.items():
        check_start(f"the {stage}", start, views, env.single_action_space.shape[0], args)
    if "evidence" in stages:
        check_evidence(args, make_env, device)
    make_writable(Path(args.run_dir))
    if distributed.is_initialized():
        distributed.barrier()  # all processes have looked at the folder, before one writes into it

    # The training stages share one simulator.
    compile_started = time.perf_counter()
    if stages != ["evidence"]:
        env.reset(seed=args.seed)
        env.step(torch.zeros(sizes.envs, env.single_action_space.shape[0], device=device))  # compiles the physics
    run_dir, results = Path(args.run_dir), {}
    if rank == 0:
        write_text(run_dir / "config.json", json.dumps(dataclasses.asdict(args), indent=2))
        seconds = time.perf_counter() - compile_started
        tqdm.write(f"{args.env_id} on {device} into {run_dir}, physics prepared in {seconds:.1f} s; {world_size} process(es): {', '.join(stages)}")  # fmt: skip
    for stage in stages:
        if stage != "evidence":
            own = checkpoint if stage == resumed else None
            arguments = args, sizes, env, views, starts, own, rank, profiled, stop
            starts[stage], results[stage] = train_stage(stage, *arguments)
    action_space = env.single_action_space
    env.close()

    # Evidence, by the one writer.
    if "evidence" in stages and rank == 0:
        policies = {}
        for stage, start in sorted(starts.items(), key=lambda x: get_args(Stage).index(x[0])):
            agent = make_agent(stage, views, action_space, args)
            agent.load_state_dict(start["agent"])
            policies[stage] = agent.to(device), views["teacher" if stage == "teacher" else "student"]
        rows = gather_evidence(policies, args, make_env, device)
        sources = {
            stage: {x: start[x] for x in ("stage", "env_steps", "train_seconds")} for stage, start in starts.items()
        }
        with refusals_of_the_disk(run_dir):
            results["evidence"] = write_evidence(rows, sources, args, device, run_dir)
        best = next(stage for stage in ("finetune", "student", "baseline", "teacher") if stage in policies)
        print(film(*policies[best], args, make_env, run_dir / "pictures.png"))
        print(f"evidence: {run_dir / 'evidence.json'}")
    return results


class ExportedPolicy(nn.Module):
    """What --export writes: obs (B, obs) to the deterministic action (B, actions), clipped to low and high (actions,).

    A policy that remembers also takes its memory (B, memory_size) and returns the memory after the step, as
    Agent.policy_mean does within an episode. A history holds the last normalised observations, oldest first."""

    def __init__(self, agent: Agent, low: Tensor, high: Tensor):
        super().__init__()
        self.agent, self.low, self.high = agent, low, high

    def forward(self, obs: Tensor, memory: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        features = self.agent.obs_statistics.normalize(obs)
        if self.agent.gru is not None:
            memory = self.agent.gru(features, memory)
            features = torch.cat([features, memory], -1)
        elif memory is not None:
            features = torch.cat([memory, features], -1)
            memory = features[:, -self.agent.memory_size :]
        action = self.agent.to_env(self.agent.actor(features)).clamp(self.low, self.high)
        return action if memory is None else (action, memory)


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


def play(args: Args, make_env=vecsim_torch.make, task_options: dict = EVIDENCE_OPTIONS) -> dict:
    """Score a checkpoint of any stage deterministically, in the environment it was trained in, on all its levels alike; pictures on request."""
    checkpoint = load_checkpoint(args.play, "distill")
    if not 0 <= args.seed < 2**63:
        raise InputError(f"seed = {args.seed} must be between 0 and 2**63 - 1")
    args = with_task_defaults(dataclasses.replace(args, device="cpu"))
    check_unchanged(checkpoint, args, "env_id")
    check_env_kwargs(args)
    options = dict(integrator=args.integrator, iterations=args.solver_iterations) | args.env_kwargs
    options |= task_options.get(args.env_id, {})
    robots = args.eval_episodes or int(args.export is not None)
    with refusals_of_the_simulator():
        env = make_env(args.env_id, num_envs=robots, device="cpu", seed=args.seed, **options)
    views, stage = make_views(env, args), checkpoint["stage"]
    check_start(f"the {stage}", checkpoint, views, env.single_action_space.shape[0], args)
    agent = make_agent(stage, views, env.single_action_space, args)
    agent.load_state_dict(checkpoint["agent"])
    view = views["teacher" if stage == "teacher" else "student"]
    if args.export is not None:
        slices = env.critic_slices if view.privileged and env.critic_slices else env.observation_slices
        names = env.observation_names(slices)
        facts = dict(stage=stage, observation_names=[names[column] for column in view.columns.tolist()])
        facts |= dict(action_names=env.action_names(), control_step_seconds=env.control_step)
        inputs, outputs = dict(obs=torch.zeros(2, len(view.columns))), ["action"]
        if agent.memory_size:
            inputs["memory_in"], outputs = agent.blank(2)[0], ["action", "memory_out"]
            facts["memory"] = "memory_in is zero where an episode begins, then the memory_out of the step before"
        export_onnx(ExportedPolicy(agent, *env.task.action_limits(env.model)), inputs, outputs, facts, args, checkpoint)
    result = {}
    if args.eval_episodes:
        result = score(first_episode_outcomes(agent, view, env, args.seed), levels=None)
        shown = {name: round(x, 3) for name, x in result.items() if x is not None}
        print(f"{args.env_id}, {stage}, {checkpoint['env_steps']:,} steps of training: {shown}")
    if args.capture_video:
        print(film(agent, view, args, make_env, Path(args.play).parent / "pictures.png"))
    return result


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
        raise InputError("--capture-video draws a checkpoint: give --play, after training")
    if args.export is not None and not args.play:
        raise InputError("--export writes the policy of a checkpoint: give --play, after training")
    for name in ("run_dir", "resume", "play", "export", "teacher", "student"):
        if getattr(args, name) == "":
            raise InputError(f"--{name.replace('_', '-')} is empty: give a path or omit it")
    path = args.resume or args.play
    if path is None:
        return args
    forgotten = dict(resume=None, play=None, run_dir=None, export=None, capture_video=False, profile=False)
    saved = load_checkpoint(path, "distill")["args"] | forgotten
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
