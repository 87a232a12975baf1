"""ppo_gpu_torch as a whole: probe environments, resume, reproducibility, processes, the command line and the run folder.

Bit for bit on one CPU with the same versions: same seed, and resume. Statistical or within a tolerance: everything else."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from probe_envs import ProbeEnv, probe_args
from two_processes import updates_on_fixed_data

import ppo_gpu_torch as ppo

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
    a2c = dict(update_epochs=1, num_minibatches=1, clip_coef=math.inf, num_steps=5, learning_rate_schedule="constant")
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


def test_statistics_are_in_the_checkpoint_and_frozen_in_evaluation(tmp_path):
    ppo.train(probe_args(tmp_path, "delayed", total_timesteps=5_120), ProbeEnv)
    agent, checkpoint = trained_agent(tmp_path)
    assert checkpoint["agent"]["obs_statistics.count"] == 5_120
    assert checkpoint["agent"]["return_statistics.count"] == 5_120
    before = {key: value.clone() for key, value in agent.state_dict().items()}
    ppo.evaluate_vecsim(agent, ProbeEnv("delayed"), seed=3)
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
    assert_same(whole, parts)


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
        (["--nonsense", "1"], "nonsense"),
        (["--device", "gpu"], "must be auto, cpu, cuda or cuda:N"),
        (["--resume", "nowhere.pt"], "checkpoint nowhere.pt does not exist"),
        (["--resume", "a.pt", "--play", "b.pt"], "give one of them"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, monkeypatch, capsys):
    status, err = run_main(monkeypatch, capsys, *arguments)
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
        (["--num-envs", "128"], "holds 64 environments, not 128"),
        (["--actor-hidden", "8"], "was trained with actor_hidden = (32,), not (8,)"),
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


def test_a_failing_capture_or_environment_is_not_bad_input(monkeypatch):
    def explode(*arguments, **options):
        raise RuntimeError("no such luck")

    with pytest.raises(RuntimeError, match="no such luck"):
        ppo.train(probe_args("unused"), explode)


# With the simulator -------------------------------------------------------------------------------------------------------


def test_resume_with_the_simulator_is_bit_for_bit(tmp_path):
    """Physics state, warm start, ages and generators travel through the checkpoint."""
    small = dict(env_id="Hopper-v5", num_envs=16, num_steps=8, num_minibatches=2, eval_episodes=0)
    ppo.train(probe_args(tmp_path / "whole", **small, total_timesteps=4 * 128))
    ppo.train(probe_args(tmp_path / "parts", **small, total_timesteps=2 * 128))
    resume = str(tmp_path / "parts" / "checkpoint.pt")
    ppo.train(probe_args(tmp_path / "parts", **small, total_timesteps=4 * 128, resume=resume))
    assert_same(state_of(tmp_path / "whole"), state_of(tmp_path / "parts"))


def test_inverted_pendulum_balances_in_gymnasium(tmp_path):
    """The defaults of the table, and the score in Gymnasium's own environment: the longest possible episode, every time."""
    args = ppo.Args(env_id="InvertedPendulum-v5", device="cpu", compile=False, run_dir=str(tmp_path))
    result = ppo.train(args)
    assert result["gymnasium"] == dict(mean=1000.0, std=0.0, min=1000.0, episodes=20, mean_length=1000.0)
    assert result["vecsim"]["mean"] > 990.0
