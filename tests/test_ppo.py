"""ppo_gpu_torch as a whole: probe environments, resume, reproducibility, processes, the command line and the run folder.

Bit for bit on one CPU with the same versions: same seed, and resume. Statistical or within a tolerance: everything else."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gzip
import importlib.machinery
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
import types
import zipfile
from pathlib import Path

import onnx
import pytest
import torch
from probe_envs import ProbeEnv, documented_a2c, probe_args
from score_onnx import OnnxPolicy, check_file, randomize, read_names
from two_processes import updates_on_fixed_data

import ppo_gpu_torch as ppo
import vecsim_torch

TESTS = Path(__file__).parent


def trained_agent(run_dir):
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    env = ProbeEnv(checkpoint["env_id"])
    args = ppo.Args(**checkpoint["args"])
    critic_obs_size = None if env.single_critic_space is None else 1
    agent = ppo.Agent(3, critic_obs_size, env.single_action_space, args)
    agent.load_state_dict(checkpoint["agent"])
    return agent, checkpoint


def value_of(agent, *rows):
    rows = agent.critic_obs_statistics.normalize(torch.tensor(rows))
    return agent.return_statistics.denormalize(agent.normalized_value(rows)).tolist()


# Probe environments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "env_id, rows, values",
    [
        ("constant", [(1.0, 0.0, 0.0), (-1.0, 0.0, 0.0)], [1.0, 1.0]),
        ("value", [(1.0, 0.0, 0.0), (-1.0, 0.0, 0.0)], [1.0, -1.0]),
        ("privileged", [(1.0,), (-1.0,)], [1.0, -1.0]),
    ],
)
def test_value_function_learns(env_id, rows, values, tmp_path):
    ppo.train(probe_args(tmp_path, env_id, total_timesteps=20_000), ProbeEnv)
    assert value_of(trained_agent(tmp_path)[0], *rows) == pytest.approx(values, abs=0.05)


def test_a_time_limit_is_bootstrapped(tmp_path):
    """Reward 1 for ever is worth 1 / (1 - 0.9) = 10; as a termination it would be worth at most 4.1, averaged 2.6."""
    ppo.train(probe_args(tmp_path, "truncation", total_timesteps=100_000), ProbeEnv)
    values = value_of(trained_agent(tmp_path)[0], *[(x, float(age), 0.0) for x in (-1, 1) for age in range(5)])
    assert all(9.0 < value < 11.0 for value in values), values


@pytest.mark.parametrize("env_id", ["truncation", "privileged"])
def test_the_learner_gets_what_a_step_led_to_and_not_the_state_after_its_reset(env_id, tmp_path, monkeypatch):
    final, fresh = ("final_critic_obs", "critic_obs") if env_id == "privileged" else ("final_obs", None)
    led_to, after, stored, make_batch = [], [], [], ppo.make_batch

    class Recorder(ProbeEnv):
        def step(self, action):
            result = super().step(action)
            led_to.append(result[4][final].clone())
            after.append((result[4][fresh] if fresh else result[0]).clone())
            return result

    def recording(agent, rollout, *rest):
        stored.append(rollout.final_critic_obs.clone())
        return make_batch(agent, rollout, *rest)

    monkeypatch.setattr(ppo, "make_batch", recording)
    ppo.train(probe_args(tmp_path, env_id, total_timesteps=512), Recorder)
    rollout = slice(1, 9)  # the first step compiles
    assert torch.equal(stored[0], torch.stack(led_to[rollout]))
    assert not torch.equal(stored[0], torch.stack(after[rollout]))


@pytest.mark.parametrize("env_id", ["action", "delayed", "broken"])
def test_policy_learns(env_id, tmp_path):
    result = ppo.train(probe_args(tmp_path, env_id), ProbeEnv)
    agent, _ = trained_agent(tmp_path)
    actions = agent.act(torch.tensor([(1.0, 0.0, 0.0), (-1.0, 0.0, 0.0)]))[:, 0].tolist()
    assert actions == pytest.approx([0.5, -0.5], abs=0.1)
    assert result["vecsim"]["mean"] > -0.01
    if env_id == "broken":
        assert result["invalid"] == 40_448 // 64 and result["vecsim"]["episodes"] == 63


def test_noise_stays_above_its_floor(tmp_path):
    result = ppo.train(probe_args(tmp_path, log_std_min=-1.0), ProbeEnv)
    assert result["action_std"] == pytest.approx(math.exp(-1.0), rel=0.1)


def test_a2c_learns(tmp_path):
    a2c, defaults = dataclasses.asdict(documented_a2c()), dataclasses.asdict(ppo.Args())
    a2c = {name: value for name, value in a2c.items() if value != defaults[name]}
    assert len(a2c) == 5
    result = ppo.train(probe_args(tmp_path, total_timesteps=100_000, **a2c), ProbeEnv)
    assert result["vecsim"]["mean"] > -0.05


# Reproducibility and resume -----------------------------------------------------------------------------------------------


def state_of(run_dir):
    """What a run ends with, without the clocks."""
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    return {key: checkpoint[key] for key in ("agent", "moments", "learning_rate", "processes", "env_steps")}


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
        ppo.train(probe_args(tmp_path / name, "delayed", seed=seed, total_timesteps=4_000), ProbeEnv)
    assert_same(state_of(tmp_path / "a"), state_of(tmp_path / "b"))
    one, other = (state_of(tmp_path / name)["agent"] for name in "ac")
    assert all(not torch.equal(one[key], other[key]) for key in one if key.endswith("weight"))
    generators = [state_of(tmp_path / name)["processes"][0] for name in "ac"]
    assert not torch.equal(generators[0]["generator"], generators[1]["generator"])


@pytest.mark.parametrize("env_id", ["delayed", "privileged", "truncation"])
def test_resumed_run_equals_uninterrupted_run(env_id, tmp_path):
    ppo.train(probe_args(tmp_path / "whole", env_id, total_timesteps=20 * 512), ProbeEnv)
    ppo.train(probe_args(tmp_path / "parts", env_id, total_timesteps=10 * 512), ProbeEnv)
    checkpoint = str(tmp_path / "parts" / "checkpoint.pt")
    args = probe_args(None, env_id, total_timesteps=20 * 512, resume=checkpoint)
    ppo.train(dataclasses.replace(args, run_dir=None), ProbeEnv)
    assert_same(state_of(tmp_path / "whole"), state_of(tmp_path / "parts"))


@pytest.mark.parametrize("schedule", [dict(learning_rate_schedule="linear"), dict(desired_kl_final=0.001)])
def test_interrupted_run_resumes_on_its_schedule(schedule, tmp_path):
    """Killed between two checkpoints: the steps since the last one are run again, and the log has no line twice."""
    common = dict(total_timesteps=20 * 512, log_every=512, checkpoint_every=8 * 512, **schedule)

    def mortal(*arguments, **options):
        env = ProbeEnv(*arguments, **options)
        env.steps_left = 1 + 13 * 8 + 3  # the compiling step, 13 iterations, and a bit
        return env

    ppo.train(probe_args(tmp_path / "whole", **common), ProbeEnv)
    with pytest.raises(KeyboardInterrupt):
        ppo.train(probe_args(tmp_path / "killed", **common), mortal)
    assert state_of(tmp_path / "killed")["env_steps"] == 8 * 512
    args = probe_args(tmp_path / "killed", resume=str(tmp_path / "killed" / "checkpoint.pt"), **common)
    ppo.train(args, ProbeEnv)
    assert_same(state_of(tmp_path / "whole"), state_of(tmp_path / "killed"))
    logs = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()] for name in ("whole", "killed")]
    clocks = ("wall_seconds", "steps_per_second")
    one, other = ([{k: v for k, v in line.items() if k not in clocks} for line in log] for log in logs)
    assert one == other and len(one) == 20


def test_resume_drops_a_half_written_last_line_and_what_tensorboard_saw_after_the_checkpoint(tmp_path, monkeypatch):
    from torch.utils import tensorboard

    purge_steps = []

    class Recorder(tensorboard.SummaryWriter):
        def __init__(self, *arguments, purge_step=None, **options):
            purge_steps.append(purge_step)
            super().__init__(*arguments, purge_step=purge_step, **options)

    monkeypatch.setattr(tensorboard, "SummaryWriter", Recorder)
    common = dict(log_every=512, eval_episodes=0)
    ppo.train(probe_args(tmp_path, total_timesteps=4 * 512, **common), ProbeEnv)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"env_steps": 25')
    resume = str(tmp_path / "checkpoint.pt")
    ppo.train(probe_args(tmp_path, total_timesteps=6 * 512, resume=resume, **common), ProbeEnv)
    steps = [json.loads(line)["env_steps"] for line in (tmp_path / "metrics.jsonl").open()]
    assert steps == [512 * k for k in range(1, 7)]
    assert purge_steps == [None, 4 * 512 + 1]


def test_a_learning_rate_given_with_resume_wins_over_the_adapted_one(tmp_path):
    """One iteration of one gradient step, before which the adaptive schedule changes nothing."""
    single = dict(num_minibatches=1, update_epochs=1, eval_episodes=0)
    ppo.train(probe_args(tmp_path, total_timesteps=512, **single), ProbeEnv)
    resume = dict(resume=str(tmp_path / "checkpoint.pt"), **single)
    kept = ppo.train(probe_args(tmp_path, total_timesteps=1_024, **resume), ProbeEnv)
    given = ppo.train(probe_args(tmp_path, total_timesteps=1_536, learning_rate=1e-4, **resume), ProbeEnv)
    assert kept["learning_rate"] == pytest.approx(3e-3) and given["learning_rate"] == pytest.approx(1e-4)


@pytest.mark.parametrize("env_id, names", [("delayed", "obs return"), ("privileged", "obs critic_obs return")])
def test_statistics_are_in_the_checkpoint_and_frozen_in_evaluation(env_id, names, tmp_path):
    ppo.train(probe_args(tmp_path, env_id, total_timesteps=5_120), ProbeEnv)
    agent, checkpoint = trained_agent(tmp_path)
    for name in names.split():
        assert checkpoint["agent"][f"{name}_statistics.count"] == 5_120
    before = {key: value.clone() for key, value in agent.state_dict().items()}
    ppo.evaluate_vecsim(agent, ProbeEnv(env_id), seed=3)
    assert_same(before, dict(agent.state_dict()))


def test_evaluation_counts_the_first_episode_of_each_environment():
    env = ProbeEnv("truncation", num_envs=8)
    agent = ppo.Agent(3, None, env.single_action_space, ppo.with_task_defaults(probe_args("unused")))
    score = ppo.evaluate_vecsim(agent, env, seed=1)
    assert score == dict(mean=5.0, std=0.0, min=5.0, episodes=8, mean_length=5.0)


# Compiled, reduced precision, on a GPU ------------------------------------------------------------------------------------


def test_compiled_and_eager_runs_agree(tmp_path):
    """Same noise, same order: 5 iterations differ by rounding only."""
    agents = []
    for name, compiled in (("eager", False), ("compiled", True)):
        args = probe_args(tmp_path / name, "delayed", total_timesteps=5 * 512, microbatch_size=128, compile=compiled)
        ppo.train(args, ProbeEnv)
        agents.append(trained_agent(tmp_path / name)[0].state_dict())
    eager, compiled = agents
    assert eager.keys() == compiled.keys()  # uncompiled names
    for key in eager:
        torch.testing.assert_close(compiled[key], eager[key], rtol=1e-3, atol=1e-4)


def test_bf16_learns_and_keeps_float32_weights(tmp_path):
    result = ppo.train(probe_args(tmp_path, bf16=True), ProbeEnv)
    assert result["vecsim"]["mean"] > -0.02
    assert all(x.dtype != torch.bfloat16 for x in trained_agent(tmp_path)[0].state_dict().values())


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


@needs_cuda
def test_captured_graphs_agree_with_eager(tmp_path):
    agents = []
    for name, graphs in (("eager", False), ("graphs", True)):
        args = probe_args(tmp_path / name, "delayed", device="cuda", cuda_graphs=graphs, total_timesteps=5 * 512)
        ppo.train(args, ProbeEnv)
        agents.append(trained_agent(tmp_path / name)[0].state_dict())
    for key in agents[0]:
        torch.testing.assert_close(agents[1][key], agents[0][key], rtol=1e-3, atol=1e-4)


@needs_cuda
def test_a_failed_capture_stops_the_run(tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(ppo, "capture", fail)
    with pytest.raises(RuntimeError, match="--no-cuda-graphs runs without them"):
        ppo.train(probe_args(tmp_path, device="cuda"), ProbeEnv)


@needs_cuda
def test_the_gradients_exist_before_the_step_that_uses_them_is_captured(monkeypatch):
    """A capture runs nothing, so without a replay the gradients would be whatever was in memory."""
    order, capture = [], ppo.capture

    def recording(function, inputs):
        order.append(f"capture {function.__name__}")
        replay = capture(function, inputs)
        return lambda *given: order.append(f"replay {function.__name__}") or replay(*given)

    monkeypatch.setattr(ppo, "capture", recording)
    args = ppo.with_task_defaults(probe_args("unused", device="cuda"))
    sizes = ppo.derive_sizes(args, 1)
    agent = ppo.Agent(3, None, ProbeEnv("action").single_action_space, args).cuda()
    rollout = ppo.allocate_rollout(8, 64, 3, None, 1, torch.device("cuda"))
    ppo.build_functions(agent, ppo.make_optimizer(agent, torch.tensor(1e-3, device="cuda")), rollout, sizes, args)
    assert order[-2:] == ["replay accumulate", "capture apply"]


@needs_cuda
def test_captured_policy_sees_fresh_noise_and_new_weights():
    args = ppo.with_task_defaults(probe_args("unused", device="cuda"))
    agent = ppo.Agent(3, None, ProbeEnv("action").single_action_space, args).cuda()
    obs, noise = torch.randn(4, 3, device="cuda"), torch.randn(2, 4, 1, device="cuda")
    policy = ppo.capture(lambda *inputs: ppo.policy_step(agent, *inputs), (obs, noise[0]))
    first, second = (policy(obs, x)[1].clone() for x in noise)
    assert not torch.equal(first, second)
    with torch.no_grad():
        agent.actor[-1].bias.add_(1.0)
    torch.testing.assert_close(policy(obs, noise[1])[1], second + 1.0)


@needs_cuda
def test_update_on_a_gpu_never_waits_for_the_host(tmp_path):
    """One iteration's work under sync debug mode "error", graphs and all."""
    args = ppo.with_task_defaults(probe_args(tmp_path, device="cuda"))
    agent = ppo.Agent(3, None, ProbeEnv("action").single_action_space, args).cuda()
    sizes = ppo.derive_sizes(args, 1)
    learning_rate = torch.tensor(1e-3, device="cuda")
    optimizer = ppo.make_optimizer(agent, learning_rate)
    floats = [torch.randn(8, 64, k, device="cuda") for k in (3, 3, 1, 1)]
    flags = [torch.zeros(8, 64, dtype=torch.bool, device="cuda") for _ in range(3)]
    rollout = ppo.Rollout(floats[0], floats[0], *floats[1:], torch.randn(8, 64, device="cuda"), *flags)
    policy, targets, accumulate, apply = ppo.build_functions(agent, optimizer, rollout, sizes, args)
    generator = torch.Generator("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        policy(rollout.obs[0], torch.randn(64, 1, generator=generator, device="cuda"))
        value, advantage = targets()
        order = torch.randperm(sizes.batch, generator=generator, device="cuda")
        batch = ppo.make_batch(agent, rollout, value, advantage, True, order)
        ppo.update(agent, batch, accumulate, apply, learning_rate, 0.01, sizes.minibatch, args)
        agent.obs_statistics.update(rollout.obs.flatten(0, 1), ~rollout.invalid.flatten())
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Processes ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What two_processes.py leaves behind, run by torchrun with 2 processes over Gloo."""
    folder = tmp_path_factory.mktemp("processes")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(TESTS / "two_processes.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_two_processes_with_half_the_environments_each_equal_one(two_processes, tmp_path):
    """Same data, split by environment: statistics, advantages, masks, gradients, divergence and learning rate agree after 3
    iterations of 6 steps. Tolerance 1e-4: sums of float32 in another order, through 18 steps of Adam."""
    single = updates_on_fixed_data(rank=0, world_size=1)
    first, second = (torch.load(two_processes / f"update-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert_same(first, second)  # bit for bit between the processes, or they would drift apart
    assert first["episodes"] == dict(episode_return=2 / 3, episode_length=2.0, success=None, episodes=3, invalid=2)
    assert first["learning_rate"] != pytest.approx(3e-3)  # the schedule acted
    for key, value in single["agent"].items():
        torch.testing.assert_close(first["agent"][key], value, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first["terms"], single["terms"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(first["learning_rate"], single["learning_rate"])


def test_two_processes_train_one_run_and_resume_it(two_processes):
    assert len((two_processes / "whole" / "metrics.jsonl").read_text().splitlines()) == 8  # one writer
    assert json.loads((two_processes / "whole" / "eval.json").read_text())["vecsim"]["mean"] > -0.1
    whole, parts = state_of(two_processes / "whole"), state_of(two_processes / "parts")
    assert len(whole["processes"]) == 2
    assert not torch.equal(whole["processes"][0]["env"]["x"], whole["processes"][1]["env"]["x"])  # own seeds
    assert not torch.equal(whole["processes"][0]["generator"], whole["processes"][1]["generator"])  # own noise
    assert_same(whole, parts)


def test_a_signal_to_one_process_stops_all_after_the_same_iteration(two_processes):
    """Only the second process got SIGTERM, in the third iteration; the run then resumes, and equals the uninterrupted one."""
    assert (two_processes / "stopped.txt").read_text() == "1536"
    assert_same(state_of(two_processes / "whole"), state_of(two_processes / "stopped"))


def test_bad_input_of_several_processes_is_one_line(tmp_path):
    """torchrun adds its own summary of every process that fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(TESTS.parent / "ppo_gpu_torch.py"), "--gamma", "2", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    lines = [line for line in done.stderr.splitlines() if "gamma" in line]
    assert lines == ["error: gamma = 2.0 must be between 0 and 1"] and done.returncode != 0, done.stderr
    assert "in train\n" not in done.stderr  # no traceback of the script


def test_the_first_process_compiles_before_the_others(two_processes):
    """Compiling at once, they would write the same files of the compiler's cache, and read them half written."""
    first, second = (torch.load(two_processes / f"compiled-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first < second


# What reaches the functions and the environment --------------------------------------------------------------------------


def short_args(run_dir, **changes):
    """10 iterations of one gradient step."""
    single = dict(total_timesteps=10 * 512, num_minibatches=1, update_epochs=1, log_every=512, eval_episodes=0)
    return probe_args(run_dir, **(single | changes))


def logged(run_dir, name):
    return [json.loads(line)[name] for line in (run_dir / "metrics.jsonl").open()]


def test_linear_learning_rate_by_value(tmp_path):
    ppo.train(short_args(tmp_path, learning_rate=1e-3, learning_rate_schedule="linear"), ProbeEnv)
    assert logged(tmp_path, "learning_rate") == pytest.approx([1e-3 * (1 - k / 10) for k in range(10)])


def test_desired_kl_moves_over_the_run(tmp_path, monkeypatch):
    given, update = [], ppo.update

    def recording(agent, batch, accumulate, apply, learning_rate, desired_kl, *rest):
        given.append(desired_kl)
        return update(agent, batch, accumulate, apply, learning_rate, desired_kl, *rest)

    monkeypatch.setattr(ppo, "update", recording)
    ppo.train(short_args(tmp_path, desired_kl=0.02, desired_kl_final=0.01), ProbeEnv)
    assert given == pytest.approx([0.02 - 0.001 * k for k in range(10)])


def test_every_flag_of_the_environment_reaches_it(tmp_path):
    given = []

    def recording(env_id, **options):
        given.append((env_id, options))
        return ProbeEnv(env_id, **options)

    flags = dict(integrator="rk4", solver_iterations=7, env_kwargs={"option": 3}, random_initial_ages=False, seed=5)
    ppo.train(short_args(tmp_path, eval_episodes=1, **flags), recording)
    assert len(given) == 1  # the final evaluation compiles no second simulator
    env_id, options = given[0]
    assert env_id == "action" and options == dict(
        integrator="rk4", iterations=7, option=3, random_initial_ages=False, compile=False, num_envs=64, device="cpu",
        seed=ppo.stream_seed(5, rank=0, stream=1),
    )  # fmt: skip


def test_reward_scale_is_what_the_learner_sees_and_the_log_does_not(tmp_path):
    unscaled = dict(env_id="constant", normalize_values=False, update_epochs=1)
    for name, scale in (("one", 1.0), ("ten", 10.0)):
        ppo.train(short_args(tmp_path / name, **unscaled, reward_scale=scale), ProbeEnv)
        assert logged(tmp_path / name, "episode_return") == [1.0] * 10
    one, ten = (logged(tmp_path / name, "value_loss")[0] for name in ("one", "ten"))
    assert 50.0 < ten / one < 200.0  # squares, of a value function near 0


def test_a_reward_that_is_no_number_stops_the_run(tmp_path):
    class Broken(ProbeEnv):
        def step(self, action):
            obs, reward, *rest = super().step(action)
            return obs, torch.full_like(reward, torch.nan), *rest

    with pytest.raises(FloatingPointError, match="training diverged by 512 steps"):
        ppo.train(short_args(tmp_path), Broken)


def test_metrics_are_mirrored_to_weights_and_biases(tmp_path, monkeypatch):
    runs = []

    class Run:
        def __init__(self, **options):
            self.options, self.records, self.finished = options, [], False
            runs.append(self)

        def log(self, record, step):
            self.records.append((step, record))

        def finish(self):
            self.finished = True

    wandb = types.ModuleType("wandb")
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", loader=None)  # what importlib.util.find_spec looks for
    wandb.init = Run
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    ppo.train(short_args(tmp_path, track=True), ProbeEnv)
    (run,) = runs
    assert run.finished and run.options["name"] == tmp_path.name and run.options["config"]["num_envs"] == 64
    assert run.records == [(line["env_steps"], line) for line in map(json.loads, (tmp_path / "metrics.jsonl").open())]


# Run folder and command line ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    ppo.train(probe_args(run_dir, total_timesteps=10_240, log_every=1_024, num_minibatches=4), ProbeEnv)
    return run_dir


def test_run_folder_has_the_names_that_machines_read(finished_run):
    present = {path.name for path in finished_run.iterdir()}
    assert {"config.json", "metrics.jsonl", "checkpoint.pt", "eval.json", "curve.png"} <= present
    assert any(name.startswith("events.out.tfevents") for name in present)
    lines = [json.loads(line) for line in (finished_run / "metrics.jsonl").open()]
    names = {"env_steps", "wall_seconds", "steps_per_second", "episode_return", "episode_length", "episodes"}
    assert len(lines) == 10 and all(names <= line.keys() for line in lines)
    assert [line["env_steps"] for line in lines] == list(range(1_024, 10_241, 1_024))
    assert sum(line["episodes"] for line in lines) == 10_240  # every episode is counted, here one per step
    evaluation = json.loads((finished_run / "eval.json").read_text())
    names = ["env_id", "algorithm", "seed", "env_steps", "train_seconds", "compile_seconds", "vecsim", "gymnasium"]
    assert list(evaluation) == names and evaluation["gymnasium"] is None
    assert evaluation["vecsim"].keys() == {"mean", "std", "min", "episodes", "mean_length"}
    assert json.loads((finished_run / "config.json").read_text())["num_envs"] == 64


def run_main(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["ppo_gpu_torch.py", *map(str, arguments)])
    status = ppo.main()
    return status, capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--num-envs", "1000", "--num-minibatches", "3", "--num-steps", "32"],
            "does not split into 3 minibatches; use 2 or 4",
        ),
        (["--gamma", "2"], "gamma = 2.0 must be between 0 and 1"),
        (["--gamma", "high"], "--gamma"),
        (["--seed", "1" * 23], "seed = 11111111111111111111111 must be between 0 and 2**63 - 1"),
        (["--run-dir", ""], "--run-dir is empty: give a path or omit it"),
        (["--resume", ""], "--resume is empty: give a path or omit it"),
        (["--play", ""], "--play is empty: give a path or omit it"),
        (["--run-dir", "/sys/kernel", "--device", "cpu"], "/sys/kernel cannot be written"),
        (["--cpu-threads", "0"], "cpu_threads = 0 must be >= 1"),
        (["--nonsense", "1"], "nonsense"),
        (["--device", "gpu"], "must be auto, cpu, cuda or cuda:N"),
        (["--resume", "nowhere.pt"], "checkpoint nowhere.pt does not exist"),
        (["--resume", "a.pt", "--play", "b.pt"], "give one of them"),
        (["--capture-video"], "--capture-video films a checkpoint: give --play"),
        (["--export", "policy.onnx"], "--export writes the policy of a checkpoint: give --play"),
        (["--resume", "tests"], "checkpoint tests is a folder; give the file in it, tests/checkpoint.pt"),
        (["--env-id", "Quadruped-Rough", "--eval-every", "1000"], "eval_every: Gymnasium has no Quadruped-Rough to evaluate in"),
        (["--run-dir", "README.md", "--device", "cpu"], "README.md cannot be written: File exists"),
        (["--run-dir", "a" * 300, "--device", "cpu"], "cannot be written: File name too long"),
        (["--play", "a" * 300], "cannot be read"),
        (["--num-envs", str(10**14), "--num-minibatches", "7"], "does not split into 7 minibatches; use 5 or 8"),
        (["--run-dir", "README.md/a", "--device", "cpu"], "README.md/a cannot be written: Not a directory"),
        (["--env-kwargs", "no_such_option", "1", "--device", "cpu"], "no_such_option"),
        (["--env-kwargs", "randomize.weight", "0.1", "--device", "cpu"], "unknown field 'weight' of randomize"),
        (
            ["--env-kwargs", "iterations", "8", "--device", "cpu"],
            "env_kwargs sets iterations, which this script sets itself; use --solver-iterations",
        ),
        (
            ["--env-kwargs", "num_envs", "8", "--device", "cpu"],
            "env_kwargs sets num_envs, which this script sets itself; use --num-envs",
        ),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(Path(__file__).parent.parent)
    status, err = run_main(monkeypatch, capsys, *arguments)
    assert status == 2 and message in err and err.count("\n") == 1, err


@pytest.mark.parametrize("flags, threads", [({}, 1), (dict(cpu_threads=3), 3), (dict(compile=True), 5)])
def test_threads_on_a_cpu(flags, threads, tmp_path, monkeypatch):
    chosen = []

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    with pytest.raises(KeyboardInterrupt):
        ppo.train(probe_args(tmp_path, **flags), stop)
    assert chosen == [threads]


def messages(err):
    """The lines of stderr beside those of the progress bar."""
    return [line.strip() for line in re.split(r"[\r\n]|\x1b\[A", err) if line.strip() and " steps/s" not in line]


class Signalled(ProbeEnv):
    """Sends these signals to its own process in the step of this number, with a pause between them, seconds."""

    signals, step_number, pause = (), 0, 0.0

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.steps_taken = 0

    def step(self, action):
        self.steps_taken += 1
        if self.steps_taken == self.step_number:
            for number in self.signals:
                os.kill(os.getpid(), number)
                time.sleep(self.pause)
        return super().step(action)


def run_signalled(monkeypatch, capsys, args, **attributes):
    """What main returns and prints when a run receives the signals of `attributes`."""
    env = type("Signalled", (Signalled,), attributes)
    monkeypatch.setattr(ppo, "train", lambda _, stop, train=ppo.train: train(args, env, stop=stop))
    with monkeypatch.context():
        status, err = run_main(monkeypatch, capsys)
    monkeypatch.undo()
    return status, *messages(err)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_a_checkpoint_that_resumes_bit_for_bit(number, status, tmp_path, monkeypatch, capsys):
    """It comes in the middle of an iteration, twice at once, as `timeout` sends it."""
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    args = probe_args(tmp_path / "stopped", total_timesteps=20 * 512)
    sent = dict(signals=(number, number), step_number=1 + 5 * 8 + 3)
    checkpoint = tmp_path / "stopped" / "checkpoint.pt"
    message = f"stopped: {checkpoint} is the last checkpoint; --resume continues from it"
    assert run_signalled(monkeypatch, capsys, args, **sent) == (status, message)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert state_of(tmp_path / "stopped")["env_steps"] == 6 * 512 and logged(tmp_path / "stopped", "env_steps") == [6 * 512]
    assert not (tmp_path / "stopped" / "eval.json").exists()
    ppo.train(dataclasses.replace(args, resume=str(checkpoint)), ProbeEnv)
    ppo.train(probe_args(tmp_path / "whole", total_timesteps=20 * 512), ProbeEnv)
    assert_same(state_of(tmp_path / "whole"), state_of(tmp_path / "stopped"))


def test_a_second_signal_and_one_outside_of_training_end_a_run_at_once(tmp_path, monkeypatch, capsys):
    small, end = dict(total_timesteps=2 * 512), 1 + 2 * 8
    term, path = (signal.SIGTERM,), tmp_path / "evaluating" / "checkpoint.pt"
    for name, sent, message in (
        ("training", dict(signals=2 * term, pause=1.1, step_number=3), "no checkpoint was written"),
        ("preparing", dict(signals=term, step_number=1), "no checkpoint was written"),
        ("evaluating", dict(signals=term, step_number=end + 1), f"{path} is the last checkpoint"),
    ):
        status, line = run_signalled(monkeypatch, capsys, probe_args(tmp_path / name, **small), **sent)
        assert status == 143 and line.startswith(f"stopped: {message}"), line
        assert (tmp_path / name / "checkpoint.pt").exists() == (name == "evaluating")
        assert not (tmp_path / name / "eval.json").exists()


def test_resume_refuses_another_number_of_processes(finished_run, tmp_path, monkeypatch, capsys):
    checkpoint = torch.load(finished_run / "checkpoint.pt", weights_only=True)
    torch.save(checkpoint | dict(processes=checkpoint["processes"] * 2), tmp_path / "other.pt")
    arguments = ["--resume", tmp_path / "other.pt", "--total-timesteps", "20480", "--device", "cpu"]
    status, err = run_main(monkeypatch, capsys, *arguments)
    assert status == 2 and "was written by 2 processes, not 1" in err and err.count("\n") == 1, err


def written_on_a_gpu(path):
    """The checkpoint as a GPU would have written it: its random generators have states of another size."""
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["device"] = "cuda"
    for process in checkpoint["processes"]:
        process["generator"] = torch.zeros(16, dtype=torch.uint8)
        process["env"]["configuration"]["device"] = "cuda"
        process["env"] |= dict(generator=process["generator"], perturb_generator=process["generator"])
    torch.save(checkpoint, path)


def test_a_checkpoint_of_another_device_goes_on_from_new_seeds_and_says_so(tmp_path, capsys):
    small = dict(env_id="InvertedPendulum-v5", num_envs=16, num_minibatches=2, eval_episodes=0)
    ppo.train(probe_args(tmp_path / "first", **small, total_timesteps=2 * 128))
    path = tmp_path / "first" / "checkpoint.pt"
    written_on_a_gpu(path)
    before, ends = torch.load(path, weights_only=True), []
    for name in "ab":
        args = probe_args(tmp_path / name, **small, total_timesteps=4 * 128, resume=str(path))
        result = ppo.train(args)
        out = capsys.readouterr().out
        assert out.count("the checkpoint was written on cuda: on cpu the random generators start from a new seed") == 1
        assert result["env_steps"] == 4 * 128
        ends.append(state_of(tmp_path / name))
    assert_same(*ends)
    assert ends[0]["agent"]["obs_statistics.count"] == 2 * before["agent"]["obs_statistics.count"]  # it went on
    start = torch.Generator().manual_seed(ppo.stream_seed(1, rank=0, stream=0)).get_state()
    assert not torch.equal(ends[0]["processes"][0]["generator"], start)
    fresh = ppo.train(probe_args(tmp_path / "fresh", **small, total_timesteps=4 * 128)) and state_of(tmp_path / "fresh")
    assert not torch.equal(fresh["processes"][0]["generator"], ends[0]["processes"][0]["generator"])  # no numbers twice


@contextlib.contextmanager
def full_disk(room):
    """Files of this process cannot grow beyond `room` bytes: writing fails as on a full disk, with another reason."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("room, what", [(20_000, "checkpoint.pt"), (100, "config.json")])
def test_a_full_disk_is_one_line_and_loses_nothing(room, what, tmp_path, monkeypatch, capsys):
    ppo.train(probe_args(tmp_path, total_timesteps=1_024, log_every=512, eval_episodes=0), ProbeEnv)
    kept = {name: (tmp_path / name).read_bytes() for name in ("checkpoint.pt", "config.json", "metrics.jsonl")}
    args = probe_args(tmp_path, total_timesteps=2_048, resume=str(tmp_path / "checkpoint.pt"), eval_episodes=0)
    monkeypatch.setattr(ppo, "train", lambda _, stop, train=ppo.train: train(args, ProbeEnv, stop=stop))
    with full_disk(room):
        status, err = run_main(monkeypatch, capsys)
    assert status == 2 and messages(err) == [f"error: {tmp_path / what} cannot be written: File too large"]
    assert not list(tmp_path.glob("*.tmp"))
    assert (tmp_path / "checkpoint.pt").read_bytes() == kept["checkpoint.pt"]
    if what == "config.json":
        assert all((tmp_path / name).read_bytes() == before for name, before in kept.items())


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "eval.json"
    ppo.write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), ppo.writing(path) as beside:
        beside.write_text("new")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and [path] == list(tmp_path.iterdir())


def test_a_flipped_bit_in_a_checkpoint_is_one_line(finished_run, tmp_path, monkeypatch, capsys):
    whole = (finished_run / "checkpoint.pt").read_bytes()
    with zipfile.ZipFile(finished_run / "checkpoint.pt") as archive:
        largest = max((x for x in archive.infolist() if "/data/" in x.filename), key=lambda x: x.file_size)
        start = whole.index(archive.read(largest))
    flipped = bytearray(whole)
    flipped[start + largest.file_size // 2] ^= 64
    (tmp_path / "flipped.pt").write_bytes(flipped)
    torch.load(tmp_path / "flipped.pt", weights_only=True)  # reads it without a word
    for flag in ("--resume", "--play"):
        status, err = run_main(monkeypatch, capsys, flag, tmp_path / "flipped.pt")
        message = f"is damaged: the checksum of {largest.filename} in it is wrong"
        assert status == 2 and message in err and err.count("\n") == 1, err


@pytest.mark.parametrize("flag", ["--resume", "--play"])
def test_damaged_and_foreign_checkpoints_are_one_line(flag, finished_run, tmp_path, monkeypatch, capsys):
    whole = (finished_run / "checkpoint.pt").read_bytes()
    (tmp_path / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    torch.save({"weights": torch.zeros(1)}, tmp_path / "foreign.pt")
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
        (["--num-steps", "16"], "was trained with num_steps = 8, not 16; leave that flag away"),
        (["--no-normalize-observations"], "was trained with normalize_observations = True, not False"),
        (["--no-normalize-values"], "was trained with normalize_values = True, not False"),
        (["--seed", "2"], "was trained with seed = 1, not 2"),
        (["--log-std-init", "1"], "was trained with log_std_init = 0.0, not 1.0"),
        (["--no-random-initial-ages"], "was trained with random_initial_ages = True, not False"),
        ([], "has 10,240 steps already; give a larger --total-timesteps"),
    ],
)
def test_resume_refuses_what_does_not_fit(arguments, message, finished_run, monkeypatch, capsys):
    status, err = run_main(monkeypatch, capsys, "--resume", finished_run / "checkpoint.pt", *arguments)
    assert status == 2 and message in err and err.count("\n") == 1, err


def test_resume_keeps_the_checkpoints_flags(finished_run):
    args = ppo.parse_args(["--resume", str(finished_run / "checkpoint.pt"), "--total-timesteps", "20480"])
    assert (args.env_id, args.num_minibatches, args.gamma, args.total_timesteps) == ("action", 4, 0.9, 20_480)
    assert args.run_dir is None and ppo.with_task_defaults(args).run_dir == str(finished_run)


def test_play_prints_the_score(finished_run, capsys):
    score = ppo.play(ppo.parse_args(["--play", str(finished_run / "checkpoint.pt"), "--eval-episodes", "5"]), ProbeEnv)
    assert score["episodes"] == 5 and "5 episodes" in capsys.readouterr().out


def test_the_last_lines_say_why_there_is_no_score(tmp_path, capsys):
    for episodes, lines in (
        (1, ["vecsim: -", "gymnasium: no score, because Gymnasium has no action"]),
        (0, [f"{name}: no score, because eval_episodes = 0" for name in ("vecsim", "gymnasium")]),
    ):
        ppo.train(short_args(tmp_path / str(episodes), eval_episodes=episodes, total_timesteps=512), ProbeEnv)
        out = capsys.readouterr().out.splitlines()[-2:]
        assert all(found.startswith(expected) for found, expected in zip(out, lines, strict=True)), out


def test_an_error_of_the_environment_is_not_bad_input(tmp_path, monkeypatch, capsys):
    """ValueError is bad input while a run is set up, and a defect, with its traceback, from then on."""

    def explode(*arguments, **options):
        raise RuntimeError("no such luck")

    with pytest.raises(RuntimeError, match="no such luck"):
        ppo.train(probe_args(tmp_path / "constructor"), explode)

    class Refusing(ProbeEnv):
        def __init__(self, *arguments, **options):
            raise ValueError("unknown task")

    class Defective(ProbeEnv):
        def step(self, action):
            raise ValueError("shapes differ")

    train = ppo.train
    monkeypatch.setattr(ppo, "train", lambda args, stop: train(probe_args(tmp_path / "refused"), Refusing))
    status, err = run_main(monkeypatch, capsys)
    assert status == 2 and err == "error: unknown task\n"
    monkeypatch.setattr(ppo, "train", lambda args, stop: train(probe_args(tmp_path / "defect"), Defective))
    with pytest.raises(ValueError, match="shapes differ"):
        run_main(monkeypatch, capsys)


def test_a_run_never_writes_over_another(finished_run, monkeypatch, capsys):
    before = (finished_run / "metrics.jsonl").read_bytes()
    flags = ["--env-id", "Hopper-v5", "--device", "cpu", "--no-compile"]
    status, err = run_main(monkeypatch, capsys, *flags, "--run-dir", finished_run)
    assert status == 2 and "holds a run already; choose another, or --resume its checkpoint.pt" in err
    assert err.count("\n") == 1 and (finished_run / "metrics.jsonl").read_bytes() == before


def test_flags_of_another_version_in_a_checkpoint_are_one_line(finished_run, tmp_path, monkeypatch, capsys):
    checkpoint = torch.load(finished_run / "checkpoint.pt", weights_only=True)
    checkpoint["args"]["iterations"] = 4
    torch.save(checkpoint, tmp_path / "older.pt")
    status, err = run_main(monkeypatch, capsys, "--play", tmp_path / "older.pt")
    assert status == 2 and "another version of this script, which had the flag iterations" in err
    assert err.count("\n") == 1


def test_play_needs_an_episode_and_a_film_needs_gymnasium(finished_run, monkeypatch, capsys):
    for flags, message in (
        (["--eval-episodes", "0"], "eval_episodes = 0 must be >= 1 to play; use --eval-episodes 20"),
        (["--capture-video"], "capture_video: Gymnasium has no action to film"),
    ):
        status, err = run_main(monkeypatch, capsys, "--play", finished_run / "checkpoint.pt", *flags)
        assert status == 2 and message in err and err.count("\n") == 1, err


def test_options_of_the_simulator_alone_are_not_given_to_gymnasium():
    own = {"randomize": True, "randomize.mass": 0.1, "perturb.action_delay_ms": 40, "self_collision": False, "chunk": 8}
    shared = {"reset_noise_scale": 0.1, "max_episode_steps": 50}
    assert ppo.gymnasium_options(own | shared) == shared
    args = ppo.with_task_defaults(ppo.Args(env_id="Hopper-v5", device="cpu", env_kwargs=own | shared))
    ppo.check_env_kwargs(args)
    with pytest.raises(ppo.InputError, match="do not suit gymnasium.make.*reset_noise"):
        ppo.check_env_kwargs(dataclasses.replace(args, env_kwargs={"reset_noise": 0.1}))
    with pytest.raises(ppo.InputError, match="'frame_skip': 0} do not suit gymnasium.make"):
        ppo.check_env_kwargs(dataclasses.replace(args, env_kwargs={"frame_skip": 0}))
    with pytest.raises(ppo.InputError, match="env_kwargs sets numpy, which this script sets itself; it is False"):
        ppo.check_env_kwargs(dataclasses.replace(args, env_kwargs={"numpy": True}))


# With the simulator -------------------------------------------------------------------------------------------------------


def test_resume_with_the_simulator_is_bit_for_bit(tmp_path):
    """Physics state, warm start, ages and generators travel through the checkpoint."""
    small = dict(env_id="Hopper-v5", num_envs=16, num_steps=8, num_minibatches=2, learning_rate=1e-3, eval_episodes=0)
    ppo.train(probe_args(tmp_path / "whole", **small, total_timesteps=4 * 128))
    ppo.train(probe_args(tmp_path / "parts", **small, total_timesteps=2 * 128))
    resume = str(tmp_path / "parts" / "checkpoint.pt")
    ppo.train(probe_args(tmp_path / "parts", **small, total_timesteps=4 * 128, resume=resume))
    assert_same(state_of(tmp_path / "whole"), state_of(tmp_path / "parts"))


def test_final_evaluation_in_the_training_environment_equals_one_in_a_fresh_one(tmp_path):
    """It starts whole episodes, from its own seed, whatever training left behind."""
    limit = {"max_episode_steps": 20}
    small = dict(env_id="InvertedPendulum-v5", num_envs=16, num_steps=8, num_minibatches=2, env_kwargs=limit)
    envs = []

    def keeping(*arguments, **options):
        envs.append(vecsim_torch.make(*arguments, **options))
        return envs[-1]

    result = ppo.train(probe_args(tmp_path, **small, total_timesteps=2 * 128), keeping)
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    fresh = vecsim_torch.make("InvertedPendulum-v5", num_envs=16, integrator="euler", iterations=4, **limit)
    agent = ppo.Agent(4, None, fresh.single_action_space, ppo.Args(**checkpoint["args"]))
    agent.load_state_dict(checkpoint["agent"])
    assert len(envs) == 1 and result["vecsim"] == ppo.evaluate_vecsim(agent, fresh, seed=1)
    assert result["vecsim"]["mean_length"] == result["gymnasium"]["mean_length"] == 20.0


def write_checkpoint(folder, **flags):
    """Of an agent with random weights and observation statistics; returns the agent and the checkpoint's path."""
    args = ppo.with_task_defaults(ppo.Args(device="cpu", **flags))
    env = vecsim_torch.make(args.env_id, num_envs=1, **args.env_kwargs)
    torch.manual_seed(0)
    agent = ppo.Agent(env.single_observation_space.shape[0], None, env.single_action_space, args)
    randomize(agent)
    state = dict(algorithm="ppo", env_id=args.env_id, args=dataclasses.asdict(args), env_steps=640)
    torch.save(state | dict(agent=agent.state_dict(), versions=ppo.versions()), folder / "checkpoint.pt")
    return agent, folder / "checkpoint.pt"


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")  # a number frozen, which may be the number of rows
def test_exported_policy_acts_like_the_trained_one(tmp_path, monkeypatch, capsys):
    agent, checkpoint = write_checkpoint(tmp_path, env_id="HalfCheetah-v5")
    flags = ["--play", checkpoint, "--export", tmp_path / "policy.onnx", "--eval-episodes", "0"]
    assert run_main(monkeypatch, capsys, *flags) == (0, "")
    policy = OnnxPolicy(tmp_path / "policy.onnx")
    limits = -torch.ones(6), torch.ones(6)
    check_file(policy, agent.act, agent.obs_statistics, limits)
    joints = ["bthigh", "bshin", "bfoot", "fthigh", "fshin", "ffoot"]
    observed, actions, control_step = read_names(policy, "ppo_gpu_torch.py", env_steps=640)
    positions, velocities = ["rootz", "rooty", *joints], ["rootx", "rootz", "rooty", *joints]
    assert observed == [f"qpos/{x}" for x in positions] + [f"qvel/{x}" for x in velocities]
    assert actions == joints and control_step == pytest.approx(0.05)
    assert policy.metadata["env_id"] == "HalfCheetah-v5" and json.loads(policy.metadata["env_kwargs"]) == {}

    policy.seen.clear()
    short = {"max_episode_steps": 50}
    args = ppo.with_task_defaults(ppo.Args(env_id="HalfCheetah-v5", env_kwargs=short, eval_episodes=2))
    assert ppo.evaluate_gymnasium(policy, args)["mean_length"] == len(policy.seen) == 50
    assert all((action - agent.act(obs).clamp(*limits)).abs().max() <= 1e-5 for obs, action in policy.seen)


def test_exported_policy_of_a_bf16_run_is_float32_and_its_options_are_in_the_file(tmp_path, monkeypatch, capsys):
    options = {"exclude_current_positions_from_observation": False}
    agent, checkpoint = write_checkpoint(tmp_path, env_id="Ant-v5", bf16=True, env_kwargs=options)
    flags = ["--play", checkpoint, "--export", tmp_path / "policy.onnx", "--eval-episodes", "0"]
    assert run_main(monkeypatch, capsys, *flags) == (0, "")
    policy, agent.bf16 = OnnxPolicy(tmp_path / "policy.onnx"), False
    check_file(policy, agent.act, agent.obs_statistics, (-torch.ones(8), torch.ones(8)))
    observed, actions, _ = read_names(policy, "ppo_gpu_torch.py", env_steps=640)
    assert observed[:8] == [f"qpos/root/{x}" for x in "x y z qw qx qy qz".split()] + ["qpos/hip_1"]
    assert observed[15:22] == [f"qvel/root/{x}" for x in "vx vy vz wx wy wz".split()] + ["qvel/hip_1"]
    assert actions == "hip_4 ankle_4 hip_1 ankle_1 hip_2 ankle_2 hip_3 ankle_3".split()
    assert json.loads(policy.metadata["env_kwargs"]) == options | {"include_cfrc_ext_in_observation": False}


def test_an_export_that_cannot_be_is_one_line(tmp_path, monkeypatch, capsys):
    _, checkpoint = write_checkpoint(tmp_path, env_id="InvertedPendulum-v5")
    flags = ["--play", checkpoint, "--eval-episodes", "0", "--export"]
    nowhere = tmp_path / "nowhere" / "policy.onnx"
    status, err = run_main(monkeypatch, capsys, *flags, nowhere)
    assert status == 2 and err == f"error: {nowhere} cannot be written: No such file or directory\n"
    status, err = run_main(monkeypatch, capsys, *flags, "")
    assert status == 2 and err == "error: --export is empty: give a path or omit it\n"

    def fill_the_disk(model, path, **options):
        Path(path).write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    good = tmp_path / "good.onnx"
    good.write_text("an earlier export")
    with monkeypatch.context() as full:
        full.setattr(onnx, "save", fill_the_disk)
        status, err = run_main(monkeypatch, capsys, *flags, good)
    assert status == 2 and err == f"error: {good} cannot be written: No space left on device\n"
    assert good.read_text() == "an earlier export"
    good.unlink()
    monkeypatch.setitem(sys.modules, "onnx", None)
    status, err = run_main(monkeypatch, capsys, *flags, tmp_path / "policy.onnx")
    assert status == 2 and err == "error: export needs ONNX; run `pip install onnx` or omit --export\n"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_evaluations_during_training_then_play_and_film(tmp_path, monkeypatch, capsys):
    flags = "--env-id InvertedPendulum-v5 --device cpu --no-compile --num-envs 16 --num-steps 8 --total-timesteps 512"
    flags += " --eval-every 256 --eval-episodes 2 --env-kwargs randomize.mass 0.1"
    evaluations, evaluate = [], ppo.evaluate_gymnasium

    def counted(agent, args):
        evaluations.append(evaluate(agent, args))
        return evaluations[-1]

    monkeypatch.setattr(ppo, "evaluate_gymnasium", counted)
    status, err = run_main(monkeypatch, capsys, *flags.split(), "--run-dir", tmp_path)
    assert status == 0, err
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    scores = {line["env_steps"]: line["gymnasium_return"] for line in lines if "gymnasium_return" in line}
    assert scores == {256: evaluations[0]["mean"], 512: evaluations[1]["mean"]}
    assert len(evaluations) == 2  # the last serves as the final one
    evaluation = json.loads((tmp_path / "eval.json").read_text())
    assert evaluation["gymnasium"] == evaluations[1] and evaluation["gymnasium"]["episodes"] == 2
    play = ["--play", tmp_path / "checkpoint.pt", "--eval-episodes", "2"]
    assert run_main(monkeypatch, capsys, *play)[0] == 0 and evaluations[2] == evaluations[1]
    monkeypatch.delenv("DISPLAY", raising=False)
    try:
        status, err = run_main(monkeypatch, capsys, *play, "--capture-video")
    except Exception as error:  # MuJoCo's renderers raise AttributeError, ImportError, RuntimeError or their own
        if re.search(r"\b(E?GL|OSMesa|OpenGL|GLFW|gladLoad\w*|DISPLAY)", str(error), re.IGNORECASE):
            pytest.skip(f"no OpenGL on this machine: {error}")
        raise
    assert status == 0, err
    (video,) = [path for path in tmp_path.iterdir() if path.stem == "play"]
    assert video.stat().st_size > 1_000


def test_inverted_pendulum_balances_in_gymnasium(tmp_path):
    """The defaults of the table, and the score in Gymnasium's own environment: the longest possible episode, every time."""
    args = ppo.Args(env_id="InvertedPendulum-v5", device="cpu", compile=False, run_dir=str(tmp_path))
    result = ppo.train(args)
    assert result["gymnasium"] == dict(mean=1000.0, std=0.0, min=1000.0, episodes=20, mean_length=1000.0)
    assert result["vecsim"]["mean"] > 990.0


def test_profile_times_the_stages_and_leaves_the_training_as_it_was(tmp_path, capsys):
    plain = ppo.train(short_args(tmp_path / "plain", total_timesteps=14 * 512), ProbeEnv)
    profiled = ppo.train(short_args(tmp_path / "profiled", total_timesteps=14 * 512, profile=True), ProbeEnv)
    assert profiled["policy_loss"] == plain["policy_loss"]
    table = json.loads((tmp_path / "profiled" / "profile.json").read_text())
    assert list(table["stages"]) == ["infer", "simulate", "targets", "update", "the rest"]
    assert sum(stage["share"] for stage in table["stages"].values()) == pytest.approx(1.0)
    assert all(stage["seconds"] > 0 for stage in table["stages"].values())
    with gzip.open(tmp_path / "profiled" / "trace.json.gz") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert names.count("update") == 1 and names.count("simulate") == short_args(tmp_path).num_steps
    assert "an iteration of 512 environment steps" in capsys.readouterr().out


def test_profile_needs_enough_iterations(tmp_path):
    with pytest.raises(ppo.InputError, match="profile needs 14 iterations; use --total-timesteps 7168 or more"):
        ppo.train(short_args(tmp_path, total_timesteps=13 * 512, profile=True), ProbeEnv)


def test_profile_counts_from_where_a_run_resumes(tmp_path):
    ppo.train(short_args(tmp_path, total_timesteps=4 * 512), ProbeEnv)
    resume = dict(resume=str(tmp_path / "checkpoint.pt"), profile=True)
    with pytest.raises(ppo.InputError, match="profile needs 6 iterations; use --total-timesteps 5120 or more"):
        ppo.train(short_args(tmp_path, total_timesteps=9 * 512, **resume), ProbeEnv, profiled=(2, 3))
    ppo.train(short_args(tmp_path, total_timesteps=10 * 512, **resume), ProbeEnv, profiled=(2, 3))
    assert (tmp_path / "profile.json").exists() and (tmp_path / "trace.json.gz").exists()
