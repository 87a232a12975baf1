"""What PPO and SAC do alike: reproducibility, resume, compilation, processes, run folder, command line and profile."""

from __future__ import annotations

import functools
import gzip
import json
import math
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from probe_envs import ProbeEnv
from probe_envs import probe_args as ppo_args
from test_ppo import CLOCKS, assert_same, log_of, messages, read_checkpoint, state_of
from two_processes_sac import probe_args as sac_args

import ppo_gpu_torch as ppo
import sac_gpu_torch as sac

NOT_HERE = [
    ("--env-id Ant-v5", "was trained with env_id = action, not Ant-v5; omit that flag"),
    ("--num-envs 128", "was trained with num_envs = 64, not 128; omit that flag"),
    ("--actor-hidden 8", "was trained with actor_hidden = (32,), not (8,)"),
    ("--seed 2", "was trained with seed = 1, not 2"),
    ("", "has 5,120 steps already; give a larger --total-timesteps"),
]
PPO = types.SimpleNamespace(
    module=ppo,
    make_args=ppo_args,
    iteration=512,  # environment steps
    terms=ppo.LossTerms._fields,
    stages=dict(infer=3 * 8, simulate=3 * 8, targets=3, update=3),  # how often in 3 iterations
    of_hopper=dict(num_envs=16, num_steps=8, num_minibatches=2, learning_rate=1e-3),
    refusals=[*NOT_HERE, ("--no-normalize-values", "was trained with normalize_values = True, not False")],
    bad_input=[
        ("--num-envs 1000 --num-minibatches 3 --num-steps 32", "does not split into 3 minibatches; use 2"),
        ("--gamma high", "--gamma"),
        ("--nonsense 1", "nonsense"),
        ("--device gpu", "must be auto, cpu, cuda or cuda:N"),
        ("--seed 11111111111111111111111", "seed = 11111111111111111111111 must be between 0 and 2**63 - 1"),
        ("--resume tests", "checkpoint tests cannot be read: [Errno 21] Is a directory"),
        ("--export policy.onnx", "--export and --capture-video need a checkpoint"),
        ("--run-dir README.md", "File exists: 'README.md'"),
        (f"--run-dir {'a' * 300}", "File name too long"),
        ("--env-id Nowhere-v5", "unknown task 'Nowhere-v5'"),
        ("--env-kwargs randomize.weight 0.1", "unknown field 'weight' of randomize"),
        ("--env-kwargs iterations 8", "sets iterations, which this script sets itself; use --solver-iterations"),
    ],
)
SAC = types.SimpleNamespace(
    module=sac,
    make_args=functools.partial(sac_args, checkpoint_replay=True),
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
        ("--total-timesteps 5000", "total_timesteps = 5000 must be > learning_starts = 10000"),
        ("--preset newest", "vanilla"),
    ],
)
FOR_BOTH = [
    ("--gamma 2", "gamma = 2.0 must be between 0 and 1"),
    ("--resume nowhere.pt", "checkpoint nowhere.pt cannot be read: [Errno 2] No such file or directory"),
    ("--capture-video", "--export and --capture-video need a checkpoint"),
    ("--env-kwargs no_such_option 1", "no_such_option"),
]
TRAINERS = dict(ppo=PPO, sac=SAC)


def cases(name):
    """Each trainer with each of its cases."""
    common = FOR_BOTH if name == "bad_input" else []
    return [(key, *case) for key, trainer in TRAINERS.items() for case in common + getattr(trainer, name)]


def train(trainer, run_dir, env_id="action", env=ProbeEnv, **changes):
    return trainer.module.train(trainer.make_args(run_dir, env_id, **changes), env)


def run_main(module, monkeypatch, capsys, *arguments):
    """The exit status, and what main printed to stderr."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
    status = module.main()
    return status, capsys.readouterr().err


@pytest.fixture(params=TRAINERS.values(), ids=TRAINERS.keys())
def trainer(request):
    return request.param


@pytest.fixture(scope="module")
def finished_runs(tmp_path_factory):
    folders = {name: tmp_path_factory.mktemp(name) for name in TRAINERS}
    for name, trainer in TRAINERS.items():
        train(trainer, folders[name], total_timesteps=5_120, log_every=512)
    return folders


# Reproducibility and resume -------------------------------------------------------------------------------------------


def test_same_seed_same_run_other_seed_other_run(trainer, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(trainer, tmp_path / name, "delayed", seed=seed, total_timesteps=3_584)
    a, b, c = (state_of(tmp_path / name) for name in "abc")
    assert_same(a, b)
    assert all(not torch.equal(a["agent"][key], c["agent"][key]) for key in a["agent"] if key.endswith("weight"))
    assert not torch.equal(a["processes"][0]["generator"], c["processes"][0]["generator"])


def test_resume_with_the_simulator_is_bit_for_bit(trainer, tmp_path):
    """The checkpoint holds the physics state, the warm start, the ages, the random generators and the replay."""
    small = dict(env=None, env_id="Hopper-v5", eval_episodes=0, **trainer.of_hopper)
    steps = trainer.of_hopper["num_envs"] * 8
    train(trainer, tmp_path / "whole", **small, total_timesteps=4 * steps)
    train(trainer, tmp_path / "parts", **small, total_timesteps=2 * steps)
    resume = str(tmp_path / "parts" / "checkpoint.pt")
    train(trainer, tmp_path / "parts", **small, total_timesteps=4 * steps, resume=resume)
    assert_same(state_of(tmp_path / "whole"), state_of(tmp_path / "parts"))


# Compiled, reduced precision, on a GPU --------------------------------------------------------------------------------


def test_bf16_learns_and_keeps_float32_weights(trainer, tmp_path):
    result = train(trainer, tmp_path, bf16=True)
    assert result["vecsim"]["mean"] > -0.03
    assert all(x.dtype != torch.bfloat16 for x in read_checkpoint(tmp_path)["agent"].values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_captured_graphs_agree_with_eager(trainer, tmp_path):
    steps, agents = max(5 * trainer.iteration, 15 * 64), []
    for graphs in (False, True):
        run = tmp_path / str(graphs)
        train(trainer, run, "delayed", device="cuda", cuda_graphs=graphs, total_timesteps=steps)
        agents.append(read_checkpoint(run)["agent"])
    for key in agents[0]:
        torch.testing.assert_close(agents[1][key], agents[0][key], rtol=1e-3, atol=1e-4 if trainer is PPO else 1e-3)


# Run folder and command line ------------------------------------------------------------------------------------------


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
def test_bad_input_is_one_line_and_status_2(name, arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(Path(__file__).parent.parent)
    status, err = run_main(TRAINERS[name].module, monkeypatch, capsys, "--device", "cpu", *arguments.split())
    assert status == 2 and message in err and messages(err) == [err.strip()], err


@pytest.mark.parametrize("name, arguments, message", cases("refusals"))
def test_resume_refuses_flags_that_do_not_fit(name, arguments, message, finished_runs, monkeypatch, capsys):
    flags = "--resume", finished_runs[name] / "checkpoint.pt", *arguments.split()
    status, err = run_main(TRAINERS[name].module, monkeypatch, capsys, *flags)
    assert status == 2 and message in err and messages(err) == [err.strip()], err


@pytest.mark.parametrize("name", TRAINERS)
def test_resume_keeps_the_checkpoints_flags_and_play_prints_the_score(name, finished_runs, capsys):
    module, checkpoint = TRAINERS[name].module, str(finished_runs[name] / "checkpoint.pt")
    args = module.parse_args(["--resume", checkpoint, "--total-timesteps", "20480"])
    assert (args.env_id, args.actor_hidden, args.gamma, args.total_timesteps) == ("action", (32,), 0.9, 20_480)
    assert args.run_dir is None and module.pick_run_dir(args) == finished_runs[name]
    score = module.play(module.parse_args(["--play", checkpoint, "--eval-episodes", "5"]), ProbeEnv)
    assert score["episodes"] == 5 and "5 episodes" in capsys.readouterr().out


def test_profile_shows_the_stages_and_changes_nothing(trainer, tmp_path, capsys):
    steps = 7 * 512 if trainer is PPO else 20 * 64
    plain, profiled = (
        train(trainer, tmp_path / str(profile), total_timesteps=steps, eval_episodes=0, profile=profile)
        for profile in (False, True)
    )
    assert_same(plain, profiled, but=(*CLOCKS, "train_seconds", "compile_seconds"))
    out = capsys.readouterr().out
    assert all(re.search(rf"^ +{stage} .* (\d+) *$", out, re.MULTILINE) for stage in trainer.stages)
    with gzip.open(tmp_path / "True" / "trace.json.gz") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert {stage: names.count(stage) for stage in trainer.stages} == trainer.stages
