"""sac_gpu_torch as a whole: probe environments, resume, reproducibility, processes, the command line and the run folder.

Bit for bit on one CPU with the same versions: same seed, and resume with the replay saved. Statistical or within a tolerance:
everything else. test_sac_algorithms.py holds the hand-computed cases."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
import math
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from probe_envs import ProbeEnv
from score_onnx import OnnxPolicy, check_file, randomize, read_names
from two_processes_sac import probe_args, updates_on_fixed_data

import sac_gpu_torch as sac
import vecsim_torch

TESTS = Path(__file__).parent
BOTH = [(1.0, 0.0, 0.0), (-1.0, 0.0, 0.0)]  # observations of the probes at the start of an episode


def trained_agent(run_dir):
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    env = ProbeEnv(checkpoint["env_id"])
    args = sac.Args(**checkpoint["args"])
    agent = sac.Agent(3, sac.critic_observation_size(env, args), env.single_action_space, args)
    agent.load_state_dict(checkpoint["agent"])
    return agent, checkpoint


def value_of(agent, rows, actions):
    rows = agent.critic_obs_statistics.normalize(torch.tensor(rows))
    with torch.no_grad():
        outputs = agent.critics(rows, torch.tensor(actions)[:, None], learning=False)
        return (agent.combined_value(outputs) * agent.reward_divisor()).tolist()


# Probe environments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("critic", ["categorical", "scalar"])
@pytest.mark.parametrize(
    "env_id, rows, values",
    [("constant", BOTH, [1.0, 1.0]), ("value", BOTH, [1.0, -1.0]), ("privileged", [(1.0,), (-1.0,)], [1.0, -1.0])],
)
def test_critic_learns(env_id, rows, values, critic, tmp_path):
    sac.train(probe_args(tmp_path, env_id, total_timesteps=12_800, critic=critic), ProbeEnv)
    assert value_of(trained_agent(tmp_path)[0], rows, [0.5, -0.5]) == pytest.approx(values, abs=0.05)


def test_symmetric_critic_does_not_see_the_privileged_observation(tmp_path):
    sac.train(probe_args(tmp_path, "privileged", total_timesteps=12_800, asymmetric_critic=False), ProbeEnv)
    assert value_of(trained_agent(tmp_path)[0], [(0.0, 0.0, 0.0)], [0.5]) == pytest.approx([0.0], abs=0.2)


@pytest.mark.parametrize("n_step", [1, 3])
def test_a_time_limit_is_bootstrapped(n_step, tmp_path):
    """Reward 1 for ever is worth 1 / (1 - 0.9) = 10; as a termination it would be worth at most 4.1."""
    changes = dict(n_step=n_step, tau=0.2, updates_per_step=4, normalize_rewards=False, value_limit=15.0)
    sac.train(probe_args(tmp_path, "truncation", total_timesteps=16_000, **changes), ProbeEnv)
    rows = [(x, float(age), 0.0) for x in (-1, 1) for age in range(5)]
    values = value_of(trained_agent(tmp_path)[0], rows, [0.0] * 10)
    assert all(9.0 < value < 11.0 for value in values), values


@pytest.mark.parametrize(
    "env_id, changes",
    [
        ("action", {}),
        ("action", dict(preset="vanilla", learning_rate=3e-3, temperature_learning_rate=1e-2)),
        ("action", dict(network="flash", weight_projection=True, critic_reduction="min")),
        ("action", dict(noise_repeat_max=16, half_precision_replay=True)),
        ("delayed", dict(n_step=1, total_timesteps=40_000)),
        ("delayed", dict(n_step=3)),
        ("broken", {}),
    ],
)
def test_policy_learns(env_id, changes, tmp_path):
    result = sac.train(probe_args(tmp_path, env_id, **changes), ProbeEnv)
    agent, _ = trained_agent(tmp_path)
    actions = agent.act(torch.tensor(BOTH))[:, 0].tolist()
    assert actions == pytest.approx([0.5, -0.5], abs=0.15)
    assert result["vecsim"]["mean"] > -0.02
    if env_id == "broken":
        assert result["invalid"] == 20_032 // 64 and result["vecsim"]["episodes"] == 63


# What train does with what it is given ------------------------------------------------------------------------------------


class Recorder(ProbeEnv):
    """Keeps what the steps after the compiling one gave, in the order of Replay's fields but for the action."""

    def __init__(self, *arguments, **options):
        self.columns, self.after_reset = [], []
        super().__init__(*arguments, **options)

    def reset(self, **options):
        obs, info = super().reset(**options)
        self.columns, self.after_reset, self.before = [], [], (obs.clone(), info["critic_obs"].clone())
        return obs, info

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        after = obs.clone(), info["critic_obs"].clone()
        ends = reward, terminated, truncated, info["invalid"]
        columns = *self.before, info["final_obs"], info["final_critic_obs"], *ends
        self.columns.append([x.clone() for x in columns])
        self.after_reset.append(after)
        self.before = after
        return obs, reward, terminated, truncated, info


@pytest.mark.parametrize("env_id", ["truncation", "privileged", "broken"])
def test_the_replay_gets_what_a_step_led_to_and_not_the_state_after_its_reset(env_id, tmp_path, monkeypatch):
    environments, stored, store = [], [], sac.store

    def make(*arguments, **options):
        environments.append(Recorder(*arguments, **options))
        return environments[0]

    def recording(replay, step, *columns):
        stored.append([x.clone() for x in columns])
        assert step == len(stored) - 1
        store(replay, step, *columns)

    monkeypatch.setattr(sac, "store", recording)
    sac.train(probe_args(tmp_path, env_id, total_timesteps=12 * 64, eval_episodes=0), make)
    (env,) = environments
    privileged = env_id == "privileged"
    assert len(stored) == len(env.columns) == 12
    for (obs, critic_obs, final_obs, final_critic_obs, *given), (*columns, action, reward, terminated, truncated, invalid) in zip(
        env.columns, stored, strict=True
    ):
        if not privileged:
            critic_obs, final_critic_obs = obs, final_obs
        expected = obs, critic_obs, final_obs, final_critic_obs, *given
        for x, y in zip(expected, (*columns, reward, terminated, truncated, invalid), strict=True):
            torch.testing.assert_close(y, x, rtol=0, atol=0, equal_nan=True)
        assert action.abs().max() <= 1.0
    ended = torch.stack([columns[-3] | columns[-2] for columns in env.columns])
    for k in (0, 1):
        final, fresh = torch.stack([x[2 + k] for x in env.columns]), torch.stack([x[k] for x in env.after_reset])
        assert not torch.equal(final[ended], fresh[ended])  # or the comparison above would show nothing


def test_statistics_follow_both_observations_and_skip_quarantined_rows(tmp_path):
    class Quarantining(Recorder):
        def step(self, action):
            obs, reward, terminated, truncated, info = super().step(action)
            info["invalid"][0] = True
            return obs, reward, terminated, truncated, info

    environments = []

    def make(*arguments, **options):
        environments.append(Quarantining(*arguments, **options))
        return environments[0]

    sac.train(probe_args(tmp_path, "privileged", total_timesteps=12 * 64, eval_episodes=0), make)
    state = trained_agent(tmp_path)[0].state_dict()
    for k, name in enumerate(("obs_statistics", "critic_obs_statistics")):
        rows = torch.cat([columns[k][1:] for columns in environments[0].columns]).double()
        assert state[f"{name}.count"] == len(rows) == 12 * 63
        torch.testing.assert_close(state[f"{name}.mean"], rows.mean(0))
        torch.testing.assert_close(state[f"{name}.variance"], rows.var(0, correction=0))


def test_the_policy_acts_on_noise_that_is_held(tmp_path, monkeypatch):
    given, policy_step = [], sac.policy_step

    def recording(agent, obs, noise):
        given.append(noise.clone())
        return policy_step(agent, obs, noise)

    monkeypatch.setattr(sac, "policy_step", recording)
    for longest, least, most in ((1, 0.0, 0.0), (16, 0.3, 0.9)):
        given.clear()
        run = tmp_path / str(longest)
        sac.train(probe_args(run, total_timesteps=18 * 64, noise_repeat_max=longest, eval_episodes=0), ProbeEnv)
        noise = torch.stack(given[1:])  # the first call compiles
        same = (noise[1:] == noise[:-1]).float().mean().item()
        assert len(noise) == 8 and least <= same <= most
        assert (noise[1:] != noise[:-1]).any()


def test_the_learning_rate_moves_linearly_to_its_final_value(tmp_path):
    rates = dict(learning_rate=1e-3, learning_rate_final=2e-4)
    sac.train(probe_args(tmp_path, total_timesteps=20 * 64, log_every=64, eval_episodes=0, **rates), ProbeEnv)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()][10:]  # learning starts at the 10th
    expected = [1e-3 - 8e-4 * iteration / 20 for iteration in range(10, 20)]
    assert [line["learning_rate"] for line in lines] == pytest.approx(expected)


# Reproducibility and resume -----------------------------------------------------------------------------------------------


def state_of(run_dir):
    """What a run ends with, without the clocks."""
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    return {key: checkpoint[key] for key in ("agent", "moments", "learning_rate", "processes", "env_steps", "updates")}


def assert_same(one, other, where="checkpoint"):
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for k, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}[{k}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


def test_same_seed_same_run_other_seed_other_run(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        args = probe_args(tmp_path / name, "delayed", seed=seed, total_timesteps=3_200, checkpoint_replay=True)
        sac.train(args, ProbeEnv)
    assert_same(state_of(tmp_path / "a"), state_of(tmp_path / "b"))
    one, other = (state_of(tmp_path / name)["agent"] for name in "ac")
    assert all(not torch.equal(one[key], other[key]) for key in one if key.endswith("head.weight"))
    generators = [state_of(tmp_path / name)["processes"][0] for name in "ac"]
    assert not torch.equal(generators[0]["generator"], generators[1]["generator"])


@pytest.mark.parametrize(
    "env_id, changes",
    [
        ("delayed", dict(n_step=3, noise_repeat_max=16)),
        ("privileged", dict(replay_capacity=1_280)),  # the ring has wrapped at the checkpoint
        ("truncation", dict(network="flash", policy_frequency=3, half_precision_replay=True)),
    ],
)
def test_resumed_run_with_its_replay_equals_uninterrupted_run(env_id, changes, tmp_path, capsys):
    common = dict(checkpoint_replay=True, learning_rate_final=3e-4, **changes)  # a schedule, which resuming keeps
    half = dict(total_timesteps=100 * 64, checkpoint_every=50 * 64)

    def mortal(*arguments, **options):
        env = ProbeEnv(*arguments, **options)
        env.steps_left = 1 + 73  # the compiling step, and a bit past the first checkpoint
        return env

    sac.train(probe_args(tmp_path / "whole", env_id, **common, **half), ProbeEnv)
    with pytest.raises(KeyboardInterrupt):
        sac.train(probe_args(tmp_path / "killed", env_id, **common, **half), mortal)
    checkpoint = torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)
    assert checkpoint["env_steps"] == 50 * 64 and checkpoint["replay_inside"] is True
    capsys.readouterr()
    args = probe_args(None, env_id, **common, **half, resume=str(tmp_path / "killed" / "checkpoint.pt"))
    sac.train(args, ProbeEnv)
    stored = min(50 * 64, changes.get("replay_capacity", 10_000))
    assert f"the checkpoint holds the replay, {stored:,} transitions" in capsys.readouterr().out
    assert_same(state_of(tmp_path / "whole"), state_of(tmp_path / "killed"))


def test_a_signal_saves_a_checkpoint_that_resumes_bit_for_bit(tmp_path, monkeypatch, capsys):
    class Signalled(ProbeEnv):
        steps_taken = 0

        def step(self, action):
            self.steps_taken += 1
            if self.steps_taken == 1 + 23:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().step(action)

    common = dict(checkpoint_replay=True, total_timesteps=40 * 64, eval_episodes=0)
    args = probe_args(tmp_path / "stopped", **common)
    monkeypatch.setattr(sac, "train", lambda _, stop, train=sac.train: train(args, Signalled, stop=stop))
    status, err = run_main(monkeypatch, capsys)
    monkeypatch.undo()
    path = tmp_path / "stopped" / "checkpoint.pt"
    assert status == 143 and f"stopped: {path} is the last checkpoint; --resume continues from it" in err
    assert state_of(tmp_path / "stopped")["env_steps"] == 23 * 64
    sac.train(dataclasses.replace(args, resume=str(path)), ProbeEnv)
    sac.train(probe_args(tmp_path / "whole", **common), ProbeEnv)
    assert_same(state_of(tmp_path / "whole"), state_of(tmp_path / "stopped"))


def test_a_checkpoint_of_another_device_goes_on_and_says_so(tmp_path, capsys):
    small = dict(total_timesteps=20 * 64, eval_episodes=0)
    sac.train(probe_args(tmp_path, **small), ProbeEnv)
    path = tmp_path / "checkpoint.pt"
    checkpoint = torch.load(path, weights_only=True) | dict(device="cuda")
    checkpoint["processes"][0]["generator"] = torch.zeros(16, dtype=torch.uint8)  # a GPU's
    torch.save(checkpoint, path)
    result = sac.train(probe_args(tmp_path, **small | dict(total_timesteps=40 * 64), resume=str(path)), ProbeEnv)
    assert result["env_steps"] == 40 * 64 and "was written on cuda: on cpu the random" in capsys.readouterr().out


def test_nothing_keeps_a_second_replay_alive(tmp_path, monkeypatch):
    """Neither a checkpoint that was loaded nor one that was written."""
    alive, load, on_cpu, gather = [], sac.load_replay_state, sac.on_cpu, sac.gather_batch

    def loading(replay, saved):
        alive.append(weakref.ref(saved["rings"][0]))
        return load(replay, saved)

    def copying(tree):
        copied = on_cpu(tree)
        if isinstance(tree, dict) and "replay" in tree:
            alive.append(weakref.ref(copied["replay"]["rings"][0]))
        return copied

    def gathering(*inputs):
        assert not any(reference() is not None for reference in alive)
        return gather(*inputs)

    monkeypatch.setattr(sac, "load_replay_state", loading)
    monkeypatch.setattr(sac, "on_cpu", copying)
    monkeypatch.setattr(sac, "gather_batch", gathering)
    common = dict(checkpoint_replay=True, eval_episodes=0, checkpoint_every=5 * 64)
    sac.train(probe_args(tmp_path, total_timesteps=20 * 64, **common), ProbeEnv)
    assert len(alive) == 4
    resume = str(tmp_path / "checkpoint.pt")
    sac.train(probe_args(tmp_path, total_timesteps=22 * 64, resume=resume, **common), ProbeEnv)
    assert len(alive) == 6


def test_without_its_replay_a_resumed_run_says_so_and_refills_before_it_learns(tmp_path, capsys):
    sac.train(probe_args(tmp_path, total_timesteps=3_200), ProbeEnv)
    before, capsys_text = torch.load(tmp_path / "checkpoint.pt", weights_only=True), capsys.readouterr().out
    assert before["replay_inside"] is False and before["processes"][0]["replay"] is None
    assert "checkpoint holds" not in capsys_text
    resume = dict(resume=str(tmp_path / "checkpoint.pt"), log_every=64)
    with pytest.raises(sac.InputError, match="before the first update .*no replay.* use --total-timesteps 3840 or more"):
        sac.train(probe_args(tmp_path, total_timesteps=3_200 + 9 * 64, **resume), ProbeEnv)  # 10 steps are needed

    def mortal(*arguments, **options):
        env = ProbeEnv(*arguments, **options)
        env.steps_left = 1 + 9  # the compiling step, and those of the refill
        return env

    long = dict(total_timesteps=3_200 + 19 * 64, checkpoint_every=3_200 + 9 * 64)
    with pytest.raises(KeyboardInterrupt):
        sac.train(probe_args(tmp_path, **long, **resume), mortal)
    assert "holds no replay (--checkpoint-replay puts it there), so it starts empty" in capsys.readouterr().out
    after = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert after["env_steps"] == 3_200 + 9 * 64
    assert after["updates"] == before["updates"] == 2 * 41  # from the 10th of 50 steps on
    for key, value in before["agent"].items():  # no gradient step; the observation statistics go on
        assert "statistics" in key or torch.equal(value, after["agent"][key]), key
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["replay_transitions"] == 9 * 64 and line["critic_loss"] is None
    sac.train(probe_args(tmp_path, **long, **resume), ProbeEnv)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["updates"] == 2 * 42


def test_resume_refuses_a_replay_of_another_shape(tmp_path):
    sac.train(probe_args(tmp_path, total_timesteps=1_280, checkpoint_replay=True, eval_episodes=0), ProbeEnv)
    resume = dict(total_timesteps=2_560, resume=str(tmp_path / "checkpoint.pt"))
    with pytest.raises(sac.InputError, match="replay has 157 steps, not 313; leave --replay-capacity away"):
        sac.train(probe_args(tmp_path, replay_capacity=20_000, **resume), make_env=None)  # before there is a simulator
    with pytest.raises(sac.InputError, match="leave --half-precision-replay away"):
        sac.train(probe_args(tmp_path, half_precision_replay=True, **resume), make_env=None)


def test_statistics_are_in_the_checkpoint_and_frozen_in_evaluation(tmp_path):
    sac.train(probe_args(tmp_path, "delayed", total_timesteps=3_200, network="flash"), ProbeEnv)
    agent, checkpoint = trained_agent(tmp_path)
    assert checkpoint["agent"]["obs_statistics.count"] == 3_200
    assert checkpoint["agent"]["return_statistics.count"] == 3_200
    before = {key: value.clone() for key, value in agent.state_dict().items()}
    sac.evaluate_vecsim(agent, ProbeEnv("delayed"), seed=3)
    assert_same(before, dict(agent.state_dict()))


def test_a_replay_that_does_not_fit_is_refused_before_it_is_allocated(tmp_path):
    with pytest.raises(ValueError, match=r"replay_capacity = .* needs .* GiB .* use at most --replay-capacity \d+"):
        sac.train(probe_args(tmp_path, replay_capacity=10**13), ProbeEnv)


def test_exploration_noise_is_squashed_into_the_action_space(tmp_path):
    """Uniform at random until learning_starts, then the policy: always within +-2, and never outside the ring's +-1."""
    seen = []

    class Watched(ProbeEnv):
        def step(self, action):
            seen.append(action.clone())
            return super().step(action)

    sac.train(probe_args(tmp_path, total_timesteps=1_280, eval_episodes=0), Watched)
    actions = torch.cat(seen[1:11])  # without the compiling step: 10 steps before learning starts
    assert actions.abs().max() <= 2.0 and actions.var().item() == pytest.approx(4.0 / 3.0, rel=0.15)
    assert torch.cat(seen[12:]).abs().max() <= 2.0


# Compiled, reduced precision, on a GPU ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "backend, changes",
    [("inductor", {}), ("aot_eager", dict(network="flash", critic_reduction="min", weight_projection=True))],
    ids=["layer_norm", "flash"],
)
def test_compiled_and_eager_runs_agree(backend, changes, tmp_path, monkeypatch):
    """Same noise, same order: 12 updates differ by rounding only.

    What flash adds to a graph are moments that it must write; tracing shows that, without the two minutes of Inductor's kernels."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    agents = []
    for name, compiled in (("eager", False), ("compiled", True)):
        args = probe_args(tmp_path / name, "delayed", total_timesteps=15 * 64, n_step=2, compile=compiled, **changes)
        sac.train(args, ProbeEnv)
        agents.append(trained_agent(tmp_path / name)[0].state_dict())
    eager, compiled = agents
    assert eager.keys() == compiled.keys()  # uncompiled names
    for key in eager:
        torch.testing.assert_close(compiled[key], eager[key], rtol=1e-3, atol=2e-4)


def test_bf16_learns_and_keeps_float32_weights(tmp_path):
    result = sac.train(probe_args(tmp_path, bf16=True), ProbeEnv)
    assert result["vecsim"]["mean"] > -0.03
    assert all(x.dtype != torch.bfloat16 for x in trained_agent(tmp_path)[0].state_dict().values())


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


@needs_cuda
@pytest.mark.parametrize("network", ["layer_norm", "flash"])
def test_captured_graphs_agree_with_eager(network, tmp_path):
    agents = []
    for name, graphs in (("eager", False), ("graphs", True)):
        changes = dict(device="cuda", cuda_graphs=graphs, network=network, total_timesteps=15 * 64)
        sac.train(probe_args(tmp_path / name, "delayed", **changes), ProbeEnv)
        agents.append(trained_agent(tmp_path / name)[0].state_dict())
    for key in agents[0]:
        torch.testing.assert_close(agents[1][key], agents[0][key], rtol=1e-3, atol=1e-3)


@needs_cuda
def test_captured_policy_sees_fresh_noise_and_new_weights():
    args = sac.with_task_defaults(probe_args("unused", device="cuda"))
    agent = sac.Agent(3, None, ProbeEnv("action").single_action_space, args).cuda()
    obs, noise = torch.randn(4, 3, device="cuda"), torch.randn(2, 4, 1, device="cuda")
    policy = sac.capture(lambda *inputs: sac.policy_step(agent, *inputs), (obs, noise[0]))
    first, second = (policy(obs, x)[0].clone() for x in noise)
    assert not torch.equal(first, second)
    with torch.no_grad():
        agent.actor.head.bias[0].add_(1.0)
    torch.testing.assert_close(policy(obs, noise[1])[0].atanh(), second.atanh() + 1.0, rtol=1e-3, atol=1e-3)


@needs_cuda
def test_a_vector_step_on_a_gpu_never_waits_for_the_host(tmp_path):
    """One vector step's work under sync debug mode "error", graphs and all."""
    args = sac.with_task_defaults(probe_args(tmp_path, device="cuda", n_step=3, noise_repeat_max=16))
    agent = sac.Agent(3, None, ProbeEnv("action").single_action_space, args).cuda()
    sizes, cuda = sac.derive_sizes(args, 1), torch.device("cuda")
    optimizers = sac.make_optimizers(agent, torch.tensor(1e-3, device="cuda"), 1e-3)
    replay = sac.allocate_replay(sizes.slots, 64, 3, None, 1, False, cuda)
    functions = sac.build_functions(agent, optimizers, replay, sizes, args)
    generator, durations = torch.Generator("cuda"), sac.zeta_distribution(16).cuda()
    obs, noise, uniform = (
        torch.randn(64, 3, device="cuda"),
        torch.zeros(64, 1, device="cuda"),
        torch.rand(64, device="cuda"),
    )
    remaining, never = (
        torch.zeros(64, dtype=torch.long, device="cuda"),
        torch.zeros(64, dtype=torch.bool, device="cuda"),
    )
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(4):
            noise, remaining = sac.hold_noise(noise, remaining, torch.randn_like(noise), uniform, durations)
            action, _ = functions.policy(obs, noise)
            sac.store(replay, step, obs, obs, obs, obs, action, uniform, never, never, never)
            agent.obs_statistics.update(obs, ~never)
            sac.follow_returns(agent, uniform, uniform, never, never, args.gamma)
        drawn = sac.draw_transitions(4, sizes.slots, 64, 3, 2 * sizes.batch, generator)
        batch = sac.gather_batch(agent, replay, *drawn, args)
        sac.update(agent, functions, batch, torch.randn(2, 2, sizes.batch, 1, device="cuda"), 0, args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Processes ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What two_processes_sac.py leaves behind, run by torchrun with 2 processes over Gloo."""
    folder = tmp_path_factory.mktemp("processes")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(TESTS / "two_processes_sac.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_two_processes_with_half_the_batch_each_equal_one(two_processes):
    """Same data, split: statistics, masks, gradients, targets and temperature agree after 12 updates. Tolerance 1e-4: sums of
    float32 in another order, through 12 steps of Adam."""
    single = updates_on_fixed_data(rank=0, world_size=1)
    first, second = (torch.load(two_processes / f"layer_norm-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert_same(first, second)  # bit for bit between the processes, or they would drift apart
    assert single["policy_updates"] == first["policy_updates"] == 2
    for key, value in single["agent"].items():
        torch.testing.assert_close(first["agent"][key], value, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first["terms"], single["terms"], rtol=1e-3, atol=1e-4)


def test_two_processes_of_batch_norm_stay_equal_to_each_other_though_not_to_one(two_processes):
    """Running moments included, of the target critics too; each normalises its own half, so one process goes another way."""
    single = updates_on_fixed_data(rank=0, world_size=1, network="flash")
    first, second = (torch.load(two_processes / f"flash-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert_same(first, second)
    assert any(key.endswith("norm.mean") and value.any() for key, value in first["agent"].items())
    key = "critics.first.blocks.0.widen.weight"
    difference = (first["agent"][key] - single["agent"][key]).abs().max()
    assert 1e-5 < difference < 0.2  # another way, not far away


def test_two_processes_train_one_run_and_resume_it(two_processes):
    assert len((two_processes / "whole" / "metrics.jsonl").read_text().splitlines()) == 8  # one writer
    assert json.loads((two_processes / "whole" / "eval.json").read_text())["vecsim"]["mean"] > -0.1
    whole, parts = state_of(two_processes / "whole"), state_of(two_processes / "parts")
    assert len(whole["processes"]) == 2
    assert not torch.equal(whole["processes"][0]["env"]["x"], whole["processes"][1]["env"]["x"])  # own seeds
    assert_same(whole, parts)


# Run folder and command line ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    sac.train(probe_args(run_dir, total_timesteps=6_400, log_every=640), ProbeEnv)
    return run_dir


def test_run_folder_has_the_names_that_machines_read(finished_run):
    present = {path.name for path in finished_run.iterdir()}
    assert {"config.json", "metrics.jsonl", "checkpoint.pt", "eval.json", "curve.png"} <= present
    assert any(name.startswith("events.out.tfevents") for name in present)
    lines = [json.loads(line) for line in (finished_run / "metrics.jsonl").open()]
    names = {"env_steps", "wall_seconds", "steps_per_second", "episode_return", "episode_length", "episodes"}
    assert len(lines) == 10 and all(names <= line.keys() for line in lines)
    assert [line["env_steps"] for line in lines] == list(range(640, 6_401, 640))
    assert sum(line["episodes"] for line in lines) == 6_400  # every episode is counted, here one per step
    terms = sac.CriticTerms._fields + sac.PolicyTerms._fields
    assert all(math.isfinite(line[name]) for line in lines[1:] for name in terms)
    evaluation = json.loads((finished_run / "eval.json").read_text())
    names = ["env_id", "algorithm", "seed", "env_steps", "train_seconds", "compile_seconds", "vecsim", "gymnasium"]
    assert list(evaluation) == names and evaluation["gymnasium"] is None and evaluation["algorithm"] == "sac"
    assert evaluation["vecsim"].keys() == {"mean", "std", "min", "episodes", "mean_length"}
    assert json.loads((finished_run / "config.json").read_text())["num_envs"] == 64


def run_main(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["sac_gpu_torch.py", *map(str, arguments)])
    status = sac.main()
    return status, capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--network", "flash", "--actor-hidden", "64", "32"], "use (64, 64)"),
        (["--gamma", "2"], "gamma = 2.0 must be between 0 and 1"),
        (["--gamma", "high"], "--gamma"),
        (["--seed", "1" * 23], "seed = 11111111111111111111111 must be between 0 and 2**63 - 1"),
        (["--run-dir", ""], "--run-dir is empty: give a path or omit it"),
        (["--nonsense", "1"], "nonsense"),
        (["--preset", "newest"], "vanilla"),
        (["--device", "gpu"], "must be auto, cpu, cuda or cuda:N"),
        (["--resume", "nowhere.pt"], "checkpoint nowhere.pt does not exist"),
        (["--resume", "a.pt", "--play", "b.pt"], "give one of them"),
        (["--capture-video"], "--capture-video films a checkpoint: give --play"),
        (["--reward-scale", "inf", "--device", "cpu"], "reward_scale = inf must be > 0 and finite"),
        (["--env-kwargs", "no_such_option", "1", "--device", "cpu"], "no_such_option"),
        (
            ["--env-kwargs", "iterations", "8", "--device", "cpu"],
            "env_kwargs sets iterations, which this script sets itself",
        ),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, monkeypatch, capsys):
    status, err = run_main(monkeypatch, capsys, *arguments)
    assert status == 2 and message in err and err.count("\n") == 1, err


@pytest.mark.parametrize("flag", ["--resume", "--play"])
def test_damaged_and_foreign_checkpoints_are_one_line(flag, finished_run, tmp_path, monkeypatch, capsys):
    whole = (finished_run / "checkpoint.pt").read_bytes()
    (tmp_path / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    torch.save({"algorithm": "ppo"}, tmp_path / "foreign.pt")
    for name, message in (
        ("truncated", "cannot be read; is it truncated?"),
        ("foreign", "was not written by this script"),
    ):
        status, err = run_main(monkeypatch, capsys, flag, tmp_path / f"{name}.pt")
        assert status == 2 and message in err and err.count("\n") == 1, err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--env-id", "Ant-v5"], "was trained with env_id = action, not Ant-v5"),
        (["--num-envs", "128"], "was trained with num_envs = 64, not 128; leave that flag away"),
        (["--actor-hidden", "8"], "was trained with actor_hidden = (32,), not (8,)"),
        (["--critic", "scalar"], "was trained with critic = categorical, not scalar"),
        (["--seed", "2"], "was trained with seed = 1, not 2"),
        (["--temperature-init", "2"], "was trained with temperature_init = 0.01, not 2.0"),
        (["--preset", "vanilla"], "was trained with preset = best, not vanilla"),
        (["--log-std-min", "-4"], "was trained with log_std_min = -5.0, not -4.0"),
        (["--log-std-max", "1"], "was trained with log_std_max = 2.0, not 1.0"),
        (["--no-random-initial-ages"], "was trained with random_initial_ages = True, not False"),
        ([], "has 6,400 steps already; give a larger --total-timesteps"),
    ],
)
def test_resume_refuses_what_does_not_fit(arguments, message, finished_run, monkeypatch, capsys):
    status, err = run_main(monkeypatch, capsys, "--resume", finished_run / "checkpoint.pt", *arguments)
    assert status == 2 and message in err and err.count("\n") == 1, err


def test_resume_keeps_the_checkpoints_flags(finished_run):
    args = sac.parse_args(["--resume", str(finished_run / "checkpoint.pt"), "--total-timesteps", "20480"])
    assert (args.env_id, args.batch_size, args.gamma, args.total_timesteps) == ("action", 128, 0.9, 20_480)
    assert args.run_dir is None and sac.with_task_defaults(args).run_dir == str(finished_run)


def test_a_value_error_is_bad_input_only_while_a_run_is_set_up(tmp_path, monkeypatch, capsys):
    class Refusing(ProbeEnv):
        def __init__(self, *arguments, **options):
            raise ValueError("unknown task")

    class Defective(ProbeEnv):
        def step(self, action):
            raise ValueError("shapes differ")

    train = sac.train
    monkeypatch.setattr(sac, "train", lambda args, stop: train(probe_args(tmp_path / "refused"), Refusing))
    assert run_main(monkeypatch, capsys) == (2, "error: unknown task\n")
    monkeypatch.setattr(sac, "train", lambda args, stop: train(probe_args(tmp_path / "defect"), Defective))
    with pytest.raises(ValueError, match="shapes differ"):
        run_main(monkeypatch, capsys)


def test_what_does_not_suit_is_found_before_training(finished_run, monkeypatch, capsys):
    flags = ["--env-id", "Hopper-v5", "--device", "cpu", "--no-compile"]
    for more, message in (
        (["--run-dir", finished_run], "holds a run already; choose another, or --resume its checkpoint.pt"),
        (["--play", finished_run / "checkpoint.pt", "--eval-episodes", "0"], "must be >= 1 to play"),
    ):
        status, err = run_main(monkeypatch, capsys, *flags, *more)
        assert status == 2 and message in err and err.count("\n") == 1, err


def test_one_simulator_and_one_last_evaluation(tmp_path):
    given = []

    def recording(env_id, **options):
        given.append(options)
        return ProbeEnv(env_id, **options)

    sac.train(probe_args(tmp_path, total_timesteps=1_280, solver_iterations=7, env_kwargs={"option": 3}), recording)
    assert len(given) == 1 and given[0]["iterations"] == 7 and given[0]["option"] == 3


def test_preset_and_tricks_are_flags():
    args = sac.with_task_defaults(sac.parse_args("--preset vanilla --normalize-rewards True --device cpu".split()))
    assert args.normalize_rewards is True and args.critic == "scalar" and args.normalize_observations is False


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")  # a number frozen, which may be the number of rows
@pytest.mark.parametrize("network", ["mlp", "layer_norm", "flash"])
def test_exported_policy_acts_like_the_trained_one(network, tmp_path, monkeypatch, capsys):
    args = sac.with_task_defaults(sac.Args(env_id="InvertedPendulum-v5", device="cpu", network=network))
    env = vecsim_torch.make(args.env_id, num_envs=1)
    torch.manual_seed(0)
    agent = sac.Agent(4, None, env.single_action_space, args)
    randomize(agent)
    state = dict(algorithm="sac", env_id=args.env_id, args=dataclasses.asdict(args), env_steps=640)
    torch.save(state | dict(agent=agent.state_dict(), versions=sac.versions()), tmp_path / "checkpoint.pt")
    flags = ["--play", tmp_path / "checkpoint.pt", "--export", tmp_path / "policy.onnx", "--eval-episodes", "1"]
    assert run_main(monkeypatch, capsys, *flags) == (0, "")
    policy = OnnxPolicy(tmp_path / "policy.onnx")
    check_file(policy, agent.act, agent.obs_statistics, (torch.tensor([-3.0]), torch.tensor([3.0])), squashed=True)
    names = ["qpos/slider", "qpos/hinge", "qvel/slider", "qvel/hinge"], ["slide"]
    assert read_names(policy, "sac_gpu_torch.py", env_steps=640) == (*names, pytest.approx(0.04))
    args = dataclasses.replace(args, eval_episodes=1)
    score = sac.evaluate_gymnasium(policy, args)
    assert score == pytest.approx(sac.evaluate_gymnasium(agent, args)) and score["mean_length"] > 1


def test_play_prints_the_score(finished_run, capsys):
    score = sac.play(sac.parse_args(["--play", str(finished_run / "checkpoint.pt"), "--eval-episodes", "5"]), ProbeEnv)
    assert score["episodes"] == 5 and "5 episodes" in capsys.readouterr().out


# With the simulator -------------------------------------------------------------------------------------------------------


def test_resume_with_the_simulator_is_bit_for_bit(tmp_path):
    """Physics state, warm start, ages, generators and replay travel through the checkpoint."""
    small = dict(env_id="Hopper-v5", num_envs=8, learning_starts=40, replay_capacity=80, batch_size=32, eval_episodes=0)
    small |= dict(checkpoint_replay=True, updates_per_step=1)
    sac.train(probe_args(tmp_path / "whole", **small, total_timesteps=20 * 8))
    sac.train(probe_args(tmp_path / "parts", **small, total_timesteps=13 * 8))
    resume = str(tmp_path / "parts" / "checkpoint.pt")
    sac.train(dataclasses.replace(probe_args(tmp_path / "parts", **small), total_timesteps=20 * 8, resume=resume))
    assert_same(state_of(tmp_path / "whole"), state_of(tmp_path / "parts"))


def test_profile_times_the_stages_of_learning(tmp_path):
    sac.train(probe_args(tmp_path, total_timesteps=64 * 120, learning_starts=640, profile=True, eval_episodes=0), ProbeEnv)
    table = json.loads((tmp_path / "profile.json").read_text())
    assert list(table["stages"]) == ["infer", "simulate", "sample", "update", "the rest"] and table["steps"] == 64
    assert sum(stage["share"] for stage in table["stages"].values()) == pytest.approx(1.0)
    with gzip.open(tmp_path / "trace.json.gz") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert names.count("update") == names.count("simulate") == 1
    with pytest.raises(sac.InputError, match="before the end of the profile; use --total-timesteps 7680 or more"):
        sac.train(probe_args(tmp_path / "short", total_timesteps=64 * 119, learning_starts=640, profile=True), ProbeEnv)


def test_profile_counts_from_where_a_run_resumes(tmp_path):
    """Ten steps refill the replay, the last of them learns already; then 2 of warm-up, 3 timed and one traced end at the 15th."""
    sac.train(probe_args(tmp_path, total_timesteps=20 * 64, eval_episodes=0), ProbeEnv)
    resume = dict(resume=str(tmp_path / "checkpoint.pt"), profile=True, eval_episodes=0)
    with pytest.raises(sac.InputError, match="use --total-timesteps 2240 or more"):
        sac.train(probe_args(tmp_path, total_timesteps=34 * 64, **resume), ProbeEnv, profiled=(2, 3))
    sac.train(probe_args(tmp_path, total_timesteps=35 * 64, **resume), ProbeEnv, profiled=(2, 3))
    assert (tmp_path / "profile.json").exists() and (tmp_path / "trace.json.gz").exists()
