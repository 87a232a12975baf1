"""What the trainers do alike: probe environments, equal and resumed runs, compilation, processes, run folder, flags.

Bit for bit on one CPU with equal versions: two runs of one seed, and a resumed run. Everything else has a tolerance."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import gzip
import inspect
import json
import math
import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from probe_envs import ProbeEnv, dqn_args, mortal, sac_args
from probe_envs import probe_args as ppo_args
from test_distill import small_args
from test_ppo import (
    CLOCKS,
    assert_same,
    log_of,
    logged,
    messages,
    read_checkpoint,
    run_main,
    signalled,
    state_of,
)
from two_processes import RUNS, UPDATES

import dqn_gpu_torch as dqn
import ppo_distill_teacher_student as distill
import ppo_gpu_torch as ppo
import ppo_recurrent_gpu_torch as recurrent
import sac_gpu_torch as sac
import vecsim_torch as vecsim

NOT_HERE = [
    ("--env-id Ant-v5", "was trained with env_id = action, not Ant-v5; omit that flag"),
    ("--num-envs 128", "was trained with num_envs = 64, not 128; omit that flag"),
    ("--critic-hidden 8", "was trained with critic_hidden = (32,), not (8,)"),
    ("--seed 2", "was trained with seed = 1, not 2"),
    ("--integrator euler", "was trained with integrator = mjcf, not euler"),
    ("", "has 5,120 steps already; give a larger --total-timesteps"),
]
ILLEGAL = [  # for every trainer
    (dict(num_envs=0), "num_envs = 0 must be >= 1"),
    (dict(gamma=1.5), "gamma = 1.5 must be between 0 and 1"),
    (dict(learning_rate=0.0), "learning_rate = 0.0 must be > 0"),
    (dict(reward_scale=math.inf), "reward_scale = inf must be > 0 and finite"),
    (dict(reward_scale=math.nan), "reward_scale = nan must be > 0 and finite"),
    (dict(critic_hidden=(16, 0)), "critic_hidden = (16, 0) must be sizes >= 1"),
    (dict(eval_every=0), "eval_every = 0 must be >= 1"),
    (dict(eval_every=10, eval_episodes=0), "eval_episodes = 0 must be >= 1 with eval_every"),
    (dict(eval_every=10, env_id="robot.py:Mine"), "eval_every = 10 must be omitted: Gymnasium has no robot.py:Mine"),
]


def value_of_ppo(agent, rows):
    """Values (B,) of critic observations (B, k), in unscaled rewards."""
    return agent.return_statistics.denormalize(agent.normalized_value(agent.critic_obs_statistics.normalize(rows)))


def value_of_recurrent(agent, rows):
    """The same of a critic without memory, because it has privileged observations."""
    rows, started = agent.critic_obs_statistics.normalize(rows)[None], torch.ones(1, len(rows), dtype=torch.bool)
    return agent.return_statistics.denormalize(agent.normalized_value(rows, torch.zeros(len(rows), 0), started)[0][0])


def value_of_sac(agent, rows):
    outputs = agent.critics(agent.critic_obs_statistics.normalize(rows), torch.zeros(len(rows), 1), learning=False)
    return agent.combined_value(outputs) * agent.reward_divisor()


def value_of_dqn(agent, rows):
    """Values (B,) of the best action."""
    values = agent.values(agent.network, agent.obs_statistics.normalize(rows))
    return values.amax(-1).mean(-1) * agent.reward_divisor()


PPO = types.SimpleNamespace(
    module=ppo,
    make_args=ppo_args,
    value_of=value_of_ppo,
    learned=(0.1, -0.01),  # the largest error of an action, and the least score, after a probe is solved
    iteration=512,  # environment steps
    terms=ppo.LossTerms._fields,
    stages=dict(infer=3 * 8, simulate=3 * 8, targets=3, update=3),  # how often in 3 iterations
    of_hopper=dict(num_envs=16, num_steps=8, num_minibatches=2, learning_rate=1e-3),
    refusals=[*NOT_HERE, ("--no-normalize-values", "was trained with normalize_values = True, not False")],
    bad_input=[("--num-envs 1000 --num-minibatches 3 --num-steps 32", "does not split into 3 minibatches; use 2")],
    illegal=[
        *ILLEGAL,
        (dict(num_envs=1000, num_steps=32, num_minibatches=3), "num_envs x num_steps = 32,000 per process does not"),
        (dict(num_envs=7, num_steps=1, num_minibatches=8), "7 per process does not split into 8 minibatches; use 7"),
        (dict(num_envs=10**14, num_minibatches=7), "does not split into 7 minibatches; use 5"),
        (dict(desired_kl=(0.01, 0.0)), "desired_kl = (0.01, 0.0) must be > 0 and finite"),
        (dict(entropy_coef=math.inf), "entropy_coef = inf must be >= 0 and finite"),
        (dict(log_std_init=math.inf), "log_std_init = inf must be finite"),
    ],
)
RECURRENT = types.SimpleNamespace(**vars(PPO))
RECURRENT.module, RECURRENT.make_args = recurrent, functools.partial(ppo_args, flags=recurrent.Args, memory_width=32)
RECURRENT.value_of = value_of_recurrent
RECURRENT.refusals = [*PPO.refusals, ("--memory lstm", "was trained with memory = gru, not lstm")]
ODD = "num_envs = 1,000 per process does not split into 3 minibatches; use 2"
RECURRENT.bad_input = [("--num-envs 1000 --num-minibatches 3", ODD)]
RECURRENT.illegal = [
    *ILLEGAL,
    (dict(num_envs=10, num_minibatches=4), "num_envs = 10 per process does not split into 4 minibatches; use 2"),
    (dict(num_steps=12, sequence_length=5), "num_steps = 12 does not split into sequences of 5 steps; use 4"),
    (dict(memory_width=0), "memory_width = 0 must be >= 1"),
    (dict(sequence_length=0), "sequence_length = 0 must be >= 1"),
]
SAC = types.SimpleNamespace(
    module=sac,
    make_args=functools.partial(sac_args, checkpoint_replay=True),
    value_of=value_of_sac,
    learned=(0.15, -0.02),
    iteration=64,
    terms=sac.CriticTerms._fields + sac.PolicyTerms._fields,
    stages=dict(infer=3, simulate=3, sample=3, update=3),
    of_hopper=dict(num_envs=8, learning_starts=40, replay_capacity=80, batch_size=32, updates_per_step=1),
    refusals=[
        *NOT_HERE,
        ("--critic scalar", "was trained with critic = categorical, not scalar"),
        ("--temperature-init 2", "was trained with temperature_init = 0.01, not 2.0"),
        ("--preset vanilla", "was trained with preset = best, not vanilla"),
    ],
    bad_input=[
        ("--network flash --actor-hidden 64 32", "one or more blocks of one width for --network flash"),
        ("--total-timesteps 5000", "total_timesteps = 5000 must be > learning_starts = 5000"),
        ("--preset newest", "vanilla"),
    ],
    illegal=[
        *ILLEGAL,
        (dict(tau=0.0), "tau = 0.0 must be > 0 and <= 1"),
        (dict(num_atoms=1), "num_atoms = 1 must be >= 2"),
        (dict(target_entropy=math.nan), "target_entropy = nan must be finite"),
        (dict(replay_capacity=100), "replay_capacity = 100 must be >= learning_starts = 640"),
        (dict(total_timesteps=640), "total_timesteps = 640 must be > learning_starts = 640"),
        (dict(network="flash", critic_hidden=(64, 32)), "one or more blocks of one width"),
        (dict(network="flash", actor_hidden=()), "one or more blocks of one width"),
    ],
)
DQN = types.SimpleNamespace(
    module=dqn,
    make_args=functools.partial(dqn_args, checkpoint_replay=True, epsilon_decay=1e-9),
    value_of=value_of_dqn,
    learned=(1e-6, -1e-9),  # 0.5 and -0.5 are two of its 9 bins
    iteration=64,
    terms=dqn.LossTerms._fields,
    stages=dict(infer=3, simulate=3, targets=3, update=3),
    refusals=[*NOT_HERE, ("--bins 2", "was trained with bins = 9, not 2")],
    bad_input=[
        ("--algorithm pqn --batch-size 1000", "batch_size must divide num_envs x num_steps = 16,384; use 512"),
        ("--algorithm ddqn", "pqn"),
    ],
    illegal=[
        *ILLEGAL,
        (dict(bins=1), "bins = 1 must be between 2 and 256"),
        (dict(q_lambda=1.5), "q_lambda = 1.5 must be between 0 and 1"),
        (dict(epsilon=(0.2, 0.1)), "epsilon = (0.2, 0.1) must be two numbers > 0 and <= 1, the lower one first"),
        (dict(epsilon=(0.0, 0.1)), "epsilon = (0.0, 0.1) must be two numbers > 0"),
        (dict(tau=0.0), "tau = 0.0 must be > 0 and <= 1"),
        (dict(replay_capacity=600), "replay_capacity = 600 must be >= learning_starts = 640"),
        (dict(total_timesteps=640), "total_timesteps = 640 must be > learning_starts = 640"),
    ],
)
PQN = types.SimpleNamespace(
    module=dqn,
    make_args=functools.partial(dqn_args, algorithm="pqn", epsilon_decay=1e-9),
    value_of=value_of_dqn,
    learned=DQN.learned,
    iteration=512,
    terms=dqn.LossTerms._fields,
    stages=dict(infer=3 * 8, simulate=3 * 8, targets=3, update=3),
    refusals=[
        ("--num-steps 4", "was trained with num_steps = 8, not 4"),
        ("--algorithm dqn", "was trained with algorithm = pqn, not dqn"),
    ],
    bad_input=[],
    illegal=[],
)
TRAINERS = dict(ppo=PPO, ppo_recurrent=RECURRENT, sac=SAC, dqn=DQN, pqn=PQN)
DISTILL = types.SimpleNamespace(
    module=distill,
    make_args=small_args,
    refusals=[],
    bad_input=[
        ("--stages pupil", "pupil"),
        ("--stages student --teacher nowhere.pt --num-envs 4 --no-compile", "nowhere.pt cannot be read"),
    ],
    illegal=[
        *ILLEGAL,
        (dict(num_minibatches=3), "num_minibatches = 3 does not divide num_envs per process = 64; use 2 or 4"),
        (dict(gradient_length=5), "gradient_length = 5 does not divide distill_steps = 12; use 4 or 6"),
        (dict(total_timesteps=20_000), "= 20,000 must be > student_timesteps + finetune_timesteps = 21,000"),
        (dict(distill_noise=0.0), "distill_noise = 0.0 must be > 0 and finite"),
        (dict(student_history=0), "student_history = 0 must be >= 1"),
    ],
)
ALL = TRAINERS | dict(distill=DISTILL)


def cases(name):
    """Each trainer with each of its cases."""
    return [(key, *case) for key, trainer in ALL.items() for case in getattr(trainer, name)]


def train(trainer, run_dir, env_id="action", env=ProbeEnv, **changes):
    return trainer.module.train(trainer.make_args(run_dir, env_id, **changes), env)


@pytest.fixture(params=TRAINERS.values(), ids=TRAINERS.keys())
def trainer(request):
    return request.param


@pytest.fixture(scope="module")
def finished_runs(tmp_path_factory):
    folders = {name: tmp_path_factory.mktemp(name) for name in TRAINERS}
    for name, trainer in TRAINERS.items():
        train(trainer, folders[name], total_timesteps=5_120, log_every=512)
    return folders


# Probe environments ---------------------------------------------------------------------------------------------------

UNSCALED = dict(normalize_rewards=False, n_step=3, tau=0.2)
DECAYS = dict(epsilon_decay=dqn.Args.epsilon_decay)  # exploration, as by default
VALUES = {  # trainer, probe environment, flags
    "ppo": (PPO, "value", dict(total_timesteps=20_000)),
    "ppo, privileged": (PPO, "privileged", dict(total_timesteps=20_000)),
    "ppo, time limit": (PPO, "truncation", dict(total_timesteps=100_000)),
    "gru, privileged": (RECURRENT, "privileged", dict(total_timesteps=20_000)),
    "sac": (SAC, "value", dict(total_timesteps=12_800, critic="categorical")),
    "sac, scalar": (SAC, "value", dict(total_timesteps=12_800, critic="scalar")),
    "sac, privileged": (SAC, "privileged", dict(total_timesteps=12_800)),
    "sac, time limit": (
        SAC, "truncation", UNSCALED | dict(total_timesteps=16_000, n_step=1, updates_per_step=4, value_limit=15.0)),
    "sac, time limit, 3 steps": (
        SAC, "truncation", UNSCALED | dict(total_timesteps=16_000, updates_per_step=4, value_limit=15.0)),
    "dqn": (DQN, "value", DECAYS | dict(total_timesteps=25_600)),
    "dqn, time limit": (DQN, "truncation", UNSCALED | DECAYS | dict(total_timesteps=40_000, updates=4)),
    "pqn": (PQN, "value", DECAYS | dict(total_timesteps=25_600)),
    "pqn, time limit": (PQN, "truncation", UNSCALED | DECAYS | dict(total_timesteps=40_000, q_lambda=0.9)),
}  # fmt: skip
POLICIES = {
    "ppo": (PPO, "action", {}),
    "ppo, delayed": (PPO, "delayed", {}),
    "ppo, broken": (PPO, "broken", {}),
    "sac": (SAC, "action", {}),
    "sac, vanilla": (SAC, "action", dict(preset="vanilla", temperature_learning_rate=1e-2, tau=0.005)),
    "flash": (SAC, "action", dict(network="flash", critic_reduction="min", total_timesteps=40_000)),
    "sac, held noise": (SAC, "action", dict(noise_repeat_max=16, half_precision_replay=True)),
    "sac, delayed": (SAC, "delayed", dict(n_step=1, total_timesteps=40_000)),
    "sac, delayed, 3 steps": (SAC, "delayed", dict(n_step=3)),
    "sac, broken": (SAC, "broken", {}),
}
for name, q_learner in dict(dqn=DQN, pqn=PQN).items():
    plain = dict(layer_norm=False, double_q=False, normalize_rewards=False)
    POLICIES[name], POLICIES[f"{name}, plain"] = (q_learner, "action", {}), (q_learner, "action", plain)
    POLICIES[f"{name}, delayed"] = q_learner, "delayed", dict(n_step=1, q_lambda=0.5)
    POLICIES[f"{name}, broken"] = q_learner, "broken", {}
START = [(1.0, 0.0, 0.0), (-1.0, 0.0, 0.0)]  # observations at the start of an episode


def fast_or_slow(table, *fast):
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in table]


@pytest.mark.parametrize("name", fast_or_slow(VALUES, "ppo"))
def test_values_are_learned(name, tmp_path):
    """A time limit is bootstrapped: reward 1 without end is worth 10, and as a termination at most 4.1."""
    trainer, env_id, flags = VALUES[name]
    train(trainer, tmp_path, env_id, **flags)
    agent, rows, values, tolerance = trainer.module.load_agent(read_checkpoint(tmp_path)), START, [1.0, -1.0], 0.05
    if env_id == "privileged":
        rows = [row[:1] for row in rows]
    if env_id == "truncation":
        rows = [(x, age, 0.0) for x in (-1.0, 1.0) for age in range(5)]
        values, tolerance = [10.0] * len(rows), 1.0
    with torch.no_grad():
        assert trainer.value_of(agent, torch.tensor(rows)).tolist() == pytest.approx(values, abs=tolerance)


@pytest.mark.parametrize("name", fast_or_slow(POLICIES, "ppo", "sac", "dqn", "pqn"))
def test_policy_learns(name, tmp_path):
    trainer, env_id, flags = POLICIES[name]
    result = train(trainer, tmp_path, env_id, **flags)
    actions = trainer.module.load_agent(read_checkpoint(tmp_path)).act(torch.tensor(START))[:, 0].tolist()
    tolerance, least = trainer.learned
    assert actions == pytest.approx([0.5, -0.5], abs=tolerance) and result["vecsim"]["mean"] > least
    if env_id == "broken":
        assert result["invalid"] == result["env_steps"] // 64 and result["vecsim"]["episodes"] == 63


# Reproducibility and resume -------------------------------------------------------------------------------------------


class Reusing(ProbeEnv):
    """Writes all its observations into the same tensor, as some simulators on a GPU do."""

    def reset(self, **options):
        obs, info = super().reset(**options)
        return self.reused(obs), info

    def step(self, action):
        obs, *others = super().step(action)
        return self.reused(obs), *others

    def reused(self, obs):
        self.buffer = getattr(self, "buffer", torch.empty_like(obs))
        return self.buffer.copy_(obs)


@pytest.mark.parametrize("name", TRAINERS)
def test_an_environment_may_write_its_observations_into_the_same_tensors(name, tmp_path):
    trainer, flags = TRAINERS[name], dict(total_timesteps=2_560, eval_episodes=0)
    agents = []
    for env in (ProbeEnv, Reusing):
        train(trainer, tmp_path / env.__name__, "delayed", env, **flags)
        agents.append(read_checkpoint(tmp_path / env.__name__)["agent"])
    for part, x in agents[0].items():
        assert torch.equal(x, agents[1][part]), part


@pytest.mark.parametrize("name", TRAINERS)
def test_an_own_environment_is_not_scored_in_gymnasiums_of_the_same_name(name, tmp_path):
    result = train(TRAINERS[name], tmp_path, "Pendulum-v1", total_timesteps=2_560)
    assert result["gymnasium"] is None and result["vecsim"]["episodes"] == 64
    with pytest.raises(vecsim.InputError, match="omit it with your own environment"):
        train(TRAINERS[name], tmp_path / "other", "Pendulum-v1", total_timesteps=2_560, eval_every=1_280)


@pytest.mark.parametrize("name", TRAINERS)
def test_another_seed_is_another_run(name, finished_runs, tmp_path):
    """test_a_killed_run_resumes_bit_for_bit shows that one seed is one run."""
    train(TRAINERS[name], tmp_path, total_timesteps=5_120, seed=2)
    one, other = state_of(finished_runs[name]), state_of(tmp_path)
    assert all(not torch.equal(one["agent"][key], x) for key, x in other["agent"].items() if key.endswith("weight"))
    assert not torch.equal(one["processes"][0]["generator"], other["processes"][0]["generator"])


@pytest.mark.slow
@pytest.mark.parametrize("trainer", [PPO, SAC], ids=["ppo", "sac"])
def test_resume_with_the_simulator_is_bit_for_bit(trainer, tmp_path):
    """The checkpoint holds the physics state, the warm start, the ages, the random generators and the replay."""
    small = dict(env=None, env_id="Hopper-v5", eval_episodes=0, **trainer.of_hopper)
    steps = trainer.of_hopper["num_envs"] * 8
    train(trainer, tmp_path / "whole", **small, total_timesteps=4 * steps)
    train(trainer, tmp_path / "parts", **small, total_timesteps=2 * steps)
    resume = str(tmp_path / "parts" / "checkpoint.pt")
    train(trainer, tmp_path / "parts", **small, total_timesteps=4 * steps, resume=resume)
    assert_same(state_of(tmp_path / "whole"), state_of(tmp_path / "parts"))


RESUMED = {  # trainer, probe environment, flags
    "ppo": (PPO, "truncation", {}),
    "ppo, privileged": (PPO, "privileged", {}),
    "ppo, linear rate": (PPO, "delayed", dict(learning_rate_schedule="linear")),
    "ppo, desired_kl": (PPO, "delayed", dict(desired_kl=(0.01, 0.001))),
    "gru": (RECURRENT, "recall-8", dict(memory="gru", num_steps=4, sequence_length=2)),
    "lstm": (RECURRENT, "recall-8", dict(memory="lstm", num_steps=4, sequence_length=2)),
    "mingru": (RECURRENT, "recall-8", dict(memory="mingru", num_steps=4, sequence_length=2)),
    "sac": (SAC, "delayed", dict(n_step=3, noise_repeat_max=16, learning_rate_final=3e-4)),
    "sac, wrapped ring": (SAC, "privileged", dict(replay_capacity=1_280)),
    "flash": (SAC, "truncation", dict(network="flash", policy_frequency=3, half_precision_replay=True)),
    "dqn": (DQN, "delayed", dict(n_step=3, replay_capacity=1_280, learning_rate_final=3e-4, epsilon_decay=0.9)),
    "pqn": (PQN, "delayed", dict(learning_rate_final=3e-4, epsilon_decay=0.9)),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_killed_run_resumes_bit_for_bit(name, tmp_path):
    """It repeats the steps since the last checkpoint, on its schedules; its log has no line twice."""
    trainer, env_id, changes = RESUMED[name]
    iteration = 64 * changes.get("num_steps", trainer.iteration // 64)
    whole_run, saved, dies = (40, 24, 27) if trainer in (SAC, DQN) else (20, 12, 13)  # iterations
    flags = dict(total_timesteps=whole_run * iteration, checkpoint_every=saved * iteration, log_every=iteration)
    flags |= dict(eval_episodes=0) | changes
    env = mortal(dies * iteration // 64 + iteration // 128)
    train(trainer, tmp_path / "whole", env_id, **flags)
    with pytest.raises(KeyboardInterrupt):
        train(trainer, tmp_path / "killed", env_id, env, **flags)
    whole, killed = state_of(tmp_path / "whole"), read_checkpoint(tmp_path / "killed")
    assert killed["env_steps"] == saved * iteration
    train(trainer, None, env_id, resume=str(tmp_path / "killed" / "checkpoint.pt"), **flags)
    assert_same(whole, state_of(tmp_path / "killed"))
    assert len(log_of(tmp_path / "whole")) == whole_run
    assert_same(log_of(tmp_path / "whole"), log_of(tmp_path / "killed"), but=CLOCKS)
    if trainer is RECURRENT:  # the checkpoint falls into all episodes, and holds both memories
        assert all(x.abs().sum() > 0 for x in killed["processes"][0]["moment"][2::2])


@pytest.mark.parametrize("trainer", [SAC, DQN], ids=["sac", "dqn"])
def test_without_its_replay_a_resumed_run_says_so_and_refills_before_it_learns(trainer, tmp_path, capsys):
    """Learning starts at the 10th step of a replay. Each step has two updates."""
    flags = dict(checkpoint_replay=False, eval_episodes=0)
    train(trainer, tmp_path, total_timesteps=20 * 64, **flags)
    assert read_checkpoint(tmp_path)["processes"][0]["replay"] is None and "no replay" not in capsys.readouterr().out
    resume = dict(resume=str(tmp_path / "checkpoint.pt"), log_every=64)
    train(trainer, tmp_path, total_timesteps=31 * 64, **flags, **resume)
    assert "the checkpoint has no replay, so updates wait" in capsys.readouterr().out
    assert read_checkpoint(tmp_path)["updates"] == 2 * 11 + 2 * 2
    losses = logged(tmp_path, trainer.terms[0])[-11:]
    assert [loss is None for loss in losses] == [True] * 9 + [False] * 2


class Stateless(ProbeEnv):
    @property
    def state_dict(self):
        raise AttributeError


@pytest.mark.parametrize("trainer", [SAC, DQN], ids=["sac", "dqn"])
def test_a_resumed_replay_has_an_end_where_the_environments_began_anew(trainer, tmp_path):
    """An environment without state_dict begins new episodes; no window of steps goes on from the old ones."""
    flags = dict(checkpoint_replay=True, eval_episodes=0, n_step=3)
    train(trainer, tmp_path, "truncation", Stateless, total_timesteps=23 * 64, **flags)
    resume = dict(resume=str(tmp_path / "checkpoint.pt"))
    train(trainer, tmp_path, "truncation", Stateless, total_timesteps=31 * 64, **flags, **resume)
    rings = read_checkpoint(tmp_path)["processes"][0]["replay"]["rings"]
    assert rings["truncated"][:, 0].nonzero().flatten().tolist() == [4, 9, 14, 19, 22, 27]
    assert rings["obs"][23, :, 1].max() == 0  # age


def test_terms_of_a_policy_that_was_not_updated_are_null(tmp_path):
    flags = dict(updates_per_step=1, policy_frequency=4, log_every=64, eval_episodes=0, total_timesteps=20 * 64)
    train(SAC, tmp_path, **flags)
    losses = [[x is None for x in logged(tmp_path, name)] for name in ("critic_loss", "policy_loss", "temperature")]
    assert losses[0] == [True] * 9 + [False] * 11
    assert losses[1] == losses[2] == [True] * 9 + ([True] * 3 + [False]) * 2 + [True] * 3


@pytest.mark.slow
def test_a_signal_saves_a_checkpoint_and_stops(trainer, tmp_path, monkeypatch, capsys):
    """It comes in the middle of the 13th iteration, twice at once, as `timeout` sends it."""
    steps, iteration = trainer.iteration // 64, trainer.iteration
    args = trainer.make_args(tmp_path, total_timesteps=24 * iteration)
    env = signalled(signals=[signal.SIGTERM] * 2, step_number=1 + 12 * steps + (steps + 1) // 2)
    start = trainer.module.train
    monkeypatch.setattr(trainer.module, "train", lambda _, stop: start(args, env, stop=stop))
    monkeypatch.setattr(sys, "argv", ["trainer.py"])
    assert trainer.module.main() == 143
    said = f"stopped after {13 * iteration:,} steps; continue with --resume {tmp_path / 'checkpoint.pt'}"
    assert said in capsys.readouterr().out
    assert logged(tmp_path, "env_steps") == [read_checkpoint(tmp_path)["env_steps"]] == [13 * iteration]
    assert not (tmp_path / "eval.json").exists()


@pytest.mark.parametrize(
    "trainer, env_id, changes, names",
    [
        (PPO, "delayed", {}, ("obs", "return")),
        (PPO, "privileged", {}, ("obs", "critic_obs", "return")),
        (RECURRENT, "privileged", {}, ("obs", "critic_obs", "return")),
        (SAC, "delayed", dict(network="flash"), ("obs", "return")),
        (DQN, "delayed", {}, ("obs", "return")),
    ],
    ids=["ppo", "privileged", "ppo_recurrent", "sac", "dqn"],
)
def test_statistics_are_in_the_checkpoint_and_frozen_in_evaluation(trainer, env_id, changes, names, tmp_path):
    train(trainer, tmp_path, env_id, total_timesteps=3_584, **changes)
    agent = trainer.module.load_agent(read_checkpoint(tmp_path))
    before = {key: value.clone() for key, value in agent.state_dict().items()}
    assert all(before[f"{name}_statistics.count"] == 3_584 for name in names)
    act = vecsim.policy_of(agent)
    vecsim.evaluate(ProbeEnv(env_id), act, seed=3)
    assert_same(before, dict(agent.state_dict()))


# Compiled, reduced precision, on a GPU --------------------------------------------------------------------------------


def assert_two_runs_agree(trainer, run_dir, flag, atol, **changes):
    """Two short runs, the second with a flag, differ by rounding only: same noise, same order of samples."""
    agents = []
    for value in (False, True):
        run = run_dir / str(value)
        steps = max(5 * trainer.iteration, 15 * 64)  # 5 iterations of PPO, 12 updates of SAC
        train(trainer, run, "delayed", total_timesteps=steps, **changes, **{flag: value})
        agents.append(read_checkpoint(run)["agent"])
    assert agents[0].keys() == agents[1].keys()  # uncompiled names
    for key in agents[0]:
        torch.testing.assert_close(agents[1][key], agents[0][key], rtol=1e-3, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize(
    "trainer, backend, changes",
    [
        (PPO, "inductor", {}),
        (RECURRENT, "aot_eager", dict(memory="gru", num_steps=4)),
        (RECURRENT, "aot_eager", dict(memory="lstm", num_steps=4)),
        (RECURRENT, "aot_eager", dict(memory="mingru", num_steps=4)),
        (SAC, "inductor", dict(n_step=2)),
        (SAC, "aot_eager", dict(n_step=2, network="flash", critic_reduction="min")),
        (DQN, "aot_eager", dict(n_step=2)),
        (PQN, "aot_eager", {}),
    ],
    ids=["ppo", "gru", "lstm", "mingru", "sac", "flash", "dqn", "pqn"],
)
def test_compiled_and_eager_runs_agree(trainer, backend, changes, tmp_path, monkeypatch):
    """aot_eager traces as Inductor does, which shows what a graph does to the weights and moments that it must write.

    Inductor's kernels take half a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    assert_two_runs_agree(trainer, tmp_path, "compile", 2e-4 if trainer is SAC else 1e-4, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", [PPO, SAC], ids=["ppo", "sac"])
def test_bf16_learns_and_keeps_float32_weights(trainer, tmp_path):
    """fake_cuda.py trains the others with it."""
    result = train(trainer, tmp_path, bf16=True)
    assert result["vecsim"]["mean"] > -0.03
    assert all(x.dtype != torch.bfloat16 for x in read_checkpoint(tmp_path)["agent"].values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize(
    "trainer, changes",
    [(PPO, {}), (RECURRENT, {}), (SAC, {}), (SAC, dict(network="flash")), (DQN, {}), (PQN, {})],
)
def test_captured_graphs_agree_with_eager(trainer, changes, tmp_path):
    atol = 1e-3 if trainer is SAC else 1e-4
    assert_two_runs_agree(trainer, tmp_path, "cuda_graphs", atol, device="cuda", **changes)


# Run folder and command line ------------------------------------------------------------------------------------------


def test_the_policy_runs_on_one_thread(trainer, tmp_path, monkeypatch):
    """PyTorch's other threads would wait busily into the next step of the simulator."""
    threads, at_work = [], []
    policy_step, one_thread = trainer.module.policy_step, vecsim.one_thread

    @contextlib.contextmanager
    def noted():
        with one_thread():
            at_work.append(True)
            yield
            at_work.clear()

    def step(*inputs):
        threads.append(1 if at_work else 2)
        return policy_step(*inputs)

    monkeypatch.setattr(vecsim, "one_thread", noted)
    monkeypatch.setattr(trainer.module, "policy_step", step)
    train(trainer, tmp_path, total_timesteps=1_280)
    assert threads and set(threads) == {1}


@pytest.mark.parametrize("name", TRAINERS)
def test_run_folder_has_the_names_that_machines_read(name, finished_runs):
    run = finished_runs[name]
    present = {path.name for path in run.iterdir()}
    assert {"config.json", "metrics.jsonl", "checkpoint.pt", "eval.json", "curve.png"} <= present
    assert any(name.startswith("events.out.tfevents") for name in present)
    lines = log_of(run)
    names = {"env_steps", "wall_seconds", "steps_per_second", "episode_return", "episode_length", "episodes"}
    assert len(lines) == 10 and all(names <= line.keys() for line in lines)
    assert [line["env_steps"] for line in lines] == list(range(512, 5_121, 512))
    assert sum(line["episodes"] for line in lines) == 5_120  # every episode is counted, here one per step
    assert all(math.isfinite(line[term]) for line in lines[1:] for term in TRAINERS[name].terms)
    evaluation = json.loads((run / "eval.json").read_text())
    names = ["env_id", "algorithm", "seed", "env_steps", "train_seconds", "compile_seconds", "vecsim", "gymnasium"]
    assert list(evaluation) == names and evaluation["gymnasium"] is None and evaluation["algorithm"] == name
    assert evaluation["vecsim"].keys() == {"mean", "std", "min", "episodes", "mean_length"}
    assert json.loads((run / "config.json").read_text())["num_envs"] == 64


@pytest.mark.parametrize("name, arguments, message", cases("bad_input"))
def test_bad_input_is_one_line_and_status_2(name, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, err = run_main(monkeypatch, capsys, "--device", "cpu", *arguments.split(), trainer=ALL[name].module)
    assert status == 2 and message in err and messages(err) == [err.strip()], err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name, changes, message", cases("illegal"))
def test_illegal_flags_name_the_rule_and_legal_values(name, changes, message):
    module = ALL[name].module
    with pytest.raises(module.InputError) as error:
        args = ALL[name].make_args(None, **changes)
        module.check_ranges(args)
        module.derive_sizes(args, 1, *[torch.device("cpu")] * (module in (ppo, distill)))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name, arguments, message", cases("refusals"))
def test_resume_refuses_flags_that_do_not_fit(name, arguments, message, finished_runs, monkeypatch, capsys):
    flags = "--resume", finished_runs[name] / "checkpoint.pt", *arguments.split()
    status, err = run_main(monkeypatch, capsys, *flags, trainer=TRAINERS[name].module)
    assert status == 2 and message in err and messages(err) == [err.strip()], err


@pytest.mark.parametrize("name", TRAINERS)
def test_resume_keeps_the_checkpoints_flags_and_play_prints_the_score(name, finished_runs, capsys):
    module, checkpoint = TRAINERS[name].module, str(finished_runs[name] / "checkpoint.pt")
    args = module.parse_args(["--resume", checkpoint, "--total-timesteps", "20480"])
    assert (args.env_id, args.critic_hidden, args.gamma, args.total_timesteps) == ("action", (32,), 0.9, 20_480)
    assert args.run_dir is None and vecsim.pick_run_dir(args, name) == finished_runs[name]
    score = module.play(module.parse_args(["--play", checkpoint, "--eval-episodes", "5"]), ProbeEnv)
    assert score["episodes"] == 5 and "5 episodes" in capsys.readouterr().out


@pytest.mark.slow
def test_profile_shows_the_stages(trainer, tmp_path, capsys):
    """How often each ran in iterations 4 to 6."""
    steps = max(7 * trainer.iteration, 20 * 64)
    flags = dict(total_timesteps=steps, eval_episodes=0) | ({} if trainer is SAC else dict(update_epochs=1))  # short
    train(trainer, tmp_path, profile=True, **flags)
    out = capsys.readouterr().out
    assert all(re.search(rf"^ +{stage} .* (\d+) *$", out, re.MULTILINE) for stage in trainer.stages)
    with gzip.open(tmp_path / "trace.json.gz") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert {stage: names.count(stage) for stage in trainer.stages} == trainer.stages


# Processes ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """torchrun runs two_processes.py over Gloo: its folder, and what each of its processes found."""
    folder, tests = tmp_path_factory.mktemp("processes"), Path(__file__).parent
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(tests / "two_processes.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, [torch.load(folder / f"process-{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("name", UPDATES)
def test_two_processes_with_half_the_data_each_equal_one(name, two_processes):
    """Equal data, split, lead to equal statistics, masks, targets and weights, after 12 to 18 steps of Adam.

    Tolerance 1e-4: the sums in float32 have another order."""
    single, (first, second) = UPDATES[name](0, 1), (found[name] for found in two_processes[1])
    assert_same(first, second)  # bit for bit between the processes, or they would drift apart
    if name == "sac-flash":  # each process normalises its own half, so one process ends elsewhere, but not far away
        assert any(key.endswith("norm.mean") and value.any() for key, value in first["agent"].items())
        key = "critics.first.blocks.0.widen.weight"
        assert 1e-5 < (first["agent"][key] - single["agent"][key]).abs().max() < 0.2
        return
    for key, value in single["agent"].items():
        torch.testing.assert_close(first["agent"][key], value, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first["terms"], single["terms"], rtol=1e-3, atol=1e-4)
    if name == "ppo":  # the schedule acted
        assert single["learning_rate"] != pytest.approx(3e-3)
        torch.testing.assert_close(first["learning_rate"], single["learning_rate"])


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_one_run_and_resume_it(name, two_processes):
    folder = two_processes[0] / name
    assert len(log_of(folder / "whole")) == 8  # one writer
    assert json.loads((folder / "whole" / "eval.json").read_text())["vecsim"]["mean"] > -0.3
    whole, parts = state_of(folder / "whole"), state_of(folder / "parts")
    first, second = whole["processes"]
    assert not torch.equal(first["env"]["env"]["x"], second["env"]["env"]["x"])  # own seeds
    assert not torch.equal(first["generator"], second["generator"])  # own noise
    assert_same(whole, parts)
    if name == "ppo":
        assert (folder / "stopped.txt").read_text() == "1536"  # one process got SIGTERM, in the third iteration
        assert_same(whole, state_of(folder / "stopped"))


@pytest.mark.slow
def test_two_processes_train_one_run_of_all_stages_of_the_distillation(two_processes):
    """One process writes, each has its own robots and noise, and both have the same weights."""
    folder, (first, second) = two_processes
    assert first["distill"].keys() == {"teacher", "student", "finetune"}
    assert_same(first["distill"], second["distill"])  # bit for bit, or they would drift apart
    for stage, weights in first["distill"].items():
        checkpoint = read_checkpoint(folder / "distill" / stage)
        assert len(log_of(folder / "distill" / stage)) == 2  # one writer
        one, other = checkpoint["processes"]
        assert not torch.equal(one["env"]["env"]["x"], other["env"]["env"]["x"])
        assert not torch.equal(one["generator"], other["generator"])
        assert_same(checkpoint["agent"], weights)


@pytest.mark.slow
def test_processes_merge_their_statistics_and_the_first_compiles_before_the_other(two_processes):
    """If they compiled at once, they would write the same cache files and read them half written."""
    first, second = two_processes[1]
    expected = dict(episode_return=2 / 3, episode_length=2.0, success=None, episodes=3, invalid=2)
    assert first["episodes"] == second["episodes"] == expected and first["compiled"] < second["compiled"]


# The source itself ----------------------------------------------------------------------------------------------------

SHARED = vecsim.parse_args, vecsim.pick_run_dir, vecsim.make_environment, vecsim.score_in_gymnasium
SHARED += vecsim.RunLog, vecsim.Run, vecsim.play_checkpoint  # what reads the flags of all trainers
every_module = pytest.mark.parametrize("module", [ppo, recurrent, sac, dqn, distill], ids=lambda x: x.__name__)


@every_module
def test_every_flag_has_one_help_line_and_is_read(module):
    tree = ast.parse(inspect.getsource(module))
    body = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Args").body
    for flag, text in zip(body[1::2], body[2::2], strict=True):
        assert isinstance(flag, ast.AnnAssign) and isinstance(text, ast.Expr), ast.unparse(flag)
        assert "\n" not in text.value.value, flag.target.id
    flags = {field.name for field in dataclasses.fields(module.Args)}
    assert flags > {field.name for field in dataclasses.fields(vecsim.RunFlags)}
    by_name = {"preset", "teacher", "student", "finetune_learning_rate"}  # by parse_args and getattr
    read = [node for x in (module, *SHARED) for node in ast.walk(ast.parse(inspect.getsource(x)))]
    read = [node for node in read if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)]
    assert flags <= {node.attr for node in read if ast.unparse(node.value).split(".")[-1] == "args"} | by_name


@every_module
def test_only_the_defaults_read_a_module_variable(module):
    for function in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(function, ast.FunctionDef) and function.name != "task_defaults":
            used = {x.id for statement in function.body for x in ast.walk(statement) if isinstance(x, ast.Name)}
            assert not used & {"TASKS", "VANILLA", "PQN"}, function.name


COPIES = [  # two files, and the names that they define with different meanings; all others are equal word for word
    (distill, ppo, "Args check_ranges Sizes derive_sizes Agent Rollout allocate_rollout Batch LossTerms policy_step "
     "make_batch Functions ppo_loss accumulate_gradients apply_gradients update check_resumable train load_agent "
     "load_policy export"),
    (sac, ppo, "Args task_defaults parse_args check_ranges Sizes derive_sizes Agent Batch policy_step Functions "
     "build_functions update check_resumable train load_agent export"),
    (dqn, sac, "Args task_defaults parse_args check_ranges Sizes derive_sizes make_network Agent Transitions "
     "allocate_replay store Batch policy_step follow_returns Functions update build_functions check_resumable "
     "filled_part train load_agent export"),
]  # fmt: skip


@pytest.mark.parametrize("module, origin, names", COPIES, ids=lambda x: getattr(x, "__name__", ""))
def test_helpers_of_two_trainers_are_equal_word_for_word(module, origin, names):
    def definitions(module):
        own = {name: x for name, x in vars(module).items() if inspect.isfunction(x) or inspect.isclass(x)}
        return {name: inspect.getsource(x) for name, x in own.items() if x.__module__ == module.__name__}

    def words(source):  # without line breaks, which follow from the lengths of "ppo" and "distill"
        return ast.unparse(ast.parse(source))

    ours, theirs = definitions(module), definitions(origin)
    algorithms = {ppo: '"ppo"', sac: '"sac"', dqn: '"dqn"', distill: '"distill"'}
    renamed = {name: source.replace(algorithms[origin], algorithms[module]) for name, source in theirs.items()}
    shared = ours.keys() & theirs.keys()
    differ = {name for name in shared if words(ours[name]) != words(renamed[name])}
    assert differ == set(names.split()) and len(shared - differ) >= 5
    if module is sac:
        for method in ("autocast", "to_env"):
            assert inspect.getsource(getattr(sac.Agent, method)) == inspect.getsource(getattr(ppo.Agent, method))


def test_prepare_runs_each_function_once_in_order_and_restores_weights_and_moments():
    agent, rows, called = torch.nn.Linear(2, 1), torch.ones(3, 2), []
    optimizer = vecsim.make_optimizer(agent, torch.tensor(0.1))
    before = [x.detach().clone() for x in agent.parameters()]

    def differentiate(x):
        called.append("differentiate")
        agent(x).sum().backward()

    def take_step():
        called.append("take_step")
        optimizer.step()
        assert not any(map(torch.equal, agent.parameters(), before))

    prepared = vecsim.prepare((differentiate, take_step), ((rows,), ()), agent, [optimizer], cuda_graphs=True)
    assert prepared == [differentiate, take_step] and called == ["differentiate", "take_step"]
    assert all(map(torch.equal, agent.parameters(), before))
    assert not any(x.any() for moments in optimizer.state.values() for x in moments.values())
