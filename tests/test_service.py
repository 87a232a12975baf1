"""What the PyTorch trainers share in vecsim_torch.py: signals, errors, checkpoint, run folder, log, profile.

The tests run PPO, because all three trainers call the same functions. Tests of a trainer check what only it does."""

from __future__ import annotations

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
from probe_envs import ProbeEnv, probe_args
from test_ppo import (
    full_disk,
    logged,
    messages,
    read_checkpoint,
    run_main,
    run_main_with,
    short_args,
    signalled,
)  # fmt: skip

import dqn_gpu_torch as dqn
import ppo_distill_teacher_student as distill
import ppo_gpu_torch as ppo
import ppo_recurrent_gpu_torch as recurrent
import sac_gpu_torch as sac
import vecsim_torch as vecsim

ROOT = Path(__file__).parent.parent


SIZED = [(x, f"--env-id {env_id}") for x in (ppo, recurrent, sac, distill) for env_id in ("mine", *x.TASKS)]
SIZED += [(dqn, f"--algorithm {algorithm} --env-id {env_id}") for algorithm, env_id in dqn.TASKS]


@pytest.mark.parametrize("module, flags", SIZED)
def test_a_gpu_has_more_environments_and_the_same_number_of_gradient_steps(module, flags, monkeypatch):
    """Where a user gives no sizes."""
    words, most = flags.split(), 1024 if module is sac or "algorithm dqn" in flags else 4096
    small = module.parse_args([*words, "--device", "cpu"])
    monkeypatch.setattr(vecsim, "pick_device", lambda name: torch.device("cuda" if name == "auto" else name))
    large = module.parse_args(words)
    module.check_ranges(large)
    assert large.num_envs <= most
    factor = large.num_envs // small.num_envs
    assert factor == (1 if small.num_envs == 4096 else 8 if module in (sac, dqn) else 4)
    device = () if module in (sac, dqn, recurrent) else (torch.device("cuda"),)
    sizes = [module.derive_sizes(args, 1, *device) for args in (small, large)]
    if module is distill:
        assert [plan.iterations for plan in sizes[0].plans.values()] == [x.iterations for x in sizes[1].plans.values()]
    else:
        assert sizes[0].iterations == sizes[1].iterations
        assert getattr(sizes[0], "updates", None) == getattr(sizes[1], "updates", None)
    assert flags != "--env-id mine" or module.parse_args(["--num-envs", "64"]).num_envs == 64


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    ppo.train(probe_args(run_dir, total_timesteps=10_240, log_every=1_024, num_minibatches=4), ProbeEnv)
    return run_dir


# Signals --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["before", "during", "after"])
def test_a_second_signal_and_one_outside_of_training_end_a_run_at_once(moment, tmp_path, monkeypatch, capsys):
    sent = dict(before=dict(step_number=1), during=dict(step_number=3), after=dict(step_number=1 + 2 * 8 + 1))
    signals = dict(signals=[signal.SIGTERM] * 2, pause=1.1) if moment == "during" else dict(signals=[signal.SIGTERM])
    args, env = probe_args(tmp_path, total_timesteps=2 * 512), signalled(**sent[moment], **signals)
    monkeypatch.setattr(ppo, "train", lambda _, stop, train=ppo.train: train(args, env, stop=stop))
    monkeypatch.setattr(sys, "argv", ["ppo_gpu_torch.py"])
    assert ppo.main() == 143
    out, err = capsys.readouterr()
    assert out.endswith(f"\nstopped {moment} training\n") and messages(err) == []
    assert (tmp_path / "checkpoint.pt").exists() == (moment == "after")
    assert not (tmp_path / "eval.json").exists()


def test_a_signal_before_the_first_line_of_training_or_during_play_is_one_line(monkeypatch, capsys):
    def interrupted(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)

    for args, moment in ((ppo.Args(), "before training"), (ppo.Args(play="checkpoint.pt"), "during play")):
        assert vecsim.run_command(lambda _, args=args: args, interrupted, interrupted) == 130
        assert capsys.readouterr() == (f"stopped {moment}\n", "")
    assert vecsim.run_command(interrupted, None, None) == 130
    monkeypatch.setenv("RANK", "1")  # torchrun's second process leaves that line to the first
    assert vecsim.run_command(interrupted, None, None) == 130
    assert capsys.readouterr() == ("stopped before training\n", "")


# Errors are one line --------------------------------------------------------------------------------------------------


def test_errors_of_an_environment(tmp_path, monkeypatch, capsys):
    """InputError and too little memory are one line. Any other error is a defect and keeps its traceback."""

    class Refusing(ProbeEnv):
        def __init__(self, *arguments, **options):
            raise ppo.InputError("unknown task")

    class TooLarge(ProbeEnv):
        def step(self, action):
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB.")

    class Defective(ProbeEnv):
        def step(self, action):
            raise ValueError("shapes differ")

    status, err = run_main_with(monkeypatch, capsys, probe_args(tmp_path / "refused"), Refusing)
    assert status == 2 and messages(err) == ["error: unknown task"]
    status, err = run_main_with(monkeypatch, capsys, probe_args(tmp_path / "large"), TooLarge)
    assert status == 2 and messages(err) == ["error: CUDA out of memory. Tried to allocate 2 GiB."]
    with pytest.raises(ValueError, match="shapes differ"):
        run_main_with(monkeypatch, capsys, probe_args(tmp_path / "defect"), Defective)


@pytest.mark.parametrize("room, name", [(20_000, "checkpoint.pt"), (100, "config.json")])
def test_a_full_disk_is_one_line_and_loses_nothing(room, name, tmp_path, monkeypatch, capsys):
    ppo.train(probe_args(tmp_path, total_timesteps=1_024, log_every=512, eval_episodes=0), ProbeEnv)
    kept = {path: path.read_bytes() for path in tmp_path.iterdir() if path.name in ("checkpoint.pt", "config.json")}
    args = probe_args(tmp_path, total_timesteps=2_048, resume=str(tmp_path / "checkpoint.pt"), eval_episodes=0)
    with full_disk(room):
        status, err = run_main_with(monkeypatch, capsys, args, ProbeEnv)
    assert status == 2 and messages(err) == [f"error: {tmp_path / name} cannot be written: File too large"]
    assert not list(tmp_path.glob("*.tmp"))
    kept = {path: old for path, old in kept.items() if path.name in ("checkpoint.pt", name)}
    assert all(path.read_bytes() == old for path, old in kept.items())


BAD_INPUT = [
    ("--gamma high", "--gamma"),
    ("--nonsense 1", "nonsense"),
    ("--gamma 2", "gamma = 2.0 must be between 0 and 1"),
    ("--device gpu", "must be auto, cpu, cuda or cuda:N"),
    ("--seed 11111111111111111111111", "seed = 11111111111111111111111 must be between 0 and 2**63 - 1"),
    ("--resume nowhere.pt", "checkpoint nowhere.pt cannot be read: [Errno 2] No such file or directory"),
    ("--resume tests", "checkpoint tests cannot be read: [Errno 21] Is a directory"),
    ("--resume a.pt --play b.pt", "give one of them"),
    ("--resume=", "resume is empty"),
    ("--run-dir=", "run_dir is empty; give a path or omit --run-dir"),
    ("--run-dir README.md", "File exists: 'README.md'"),
    (f"--run-dir {'a' * 300}", "File name too long"),
    ("--capture-video", "--export and --capture-video need a checkpoint"),
    ("--export policy.onnx", "--export and --capture-video need a checkpoint"),
    ("--track", "track needs Weights & Biases; run `pip install wandb` or omit --track"),
    ("--env-id Nowhere-v5", "unknown task 'Nowhere-v5'"),
    ("--env-kwargs no_such_option 1", "no_such_option"),
    ("--env-kwargs env_id Hopper-v5", "env_kwargs sets env_id"),
    ("--env-kwargs numpy True", "env_kwargs sets numpy, which this script sets itself"),
    ("--env-kwargs iterations 8", "sets iterations, which this script sets itself; use --solver-iterations"),
    ("--env-kwargs chunk 1.5", "chunk must be of type int | None, not 1.5"),
    ("--env-kwargs randomize.weight 0.1", "this robot has no weight to vary"),
]


@pytest.mark.parametrize("arguments, message", BAD_INPUT)
def test_bad_input_is_one_line_and_status_2(arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    status, err = run_main(monkeypatch, capsys, "--device", "cpu", *arguments.split())
    assert status == 2 and message in err and messages(err) == [err.strip()], err


@pytest.mark.slow
def test_an_error_of_all_processes_of_torchrun_is_one_line(tmp_path):
    command = "-m torch.distributed.run --standalone --nproc-per-node=2"
    words = [sys.executable, *command.split(), ROOT / "ppo_gpu_torch.py", "--device", "cpu", "--gamma", "2"]
    result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    printed = [line for line in result.stderr.splitlines() if "gamma" in line or "Interrupt" in line]
    assert result.returncode != 0 and printed == ["error: gamma = 2.0 must be between 0 and 1"], result.stderr


# Checkpoint and run folder --------------------------------------------------------------------------------------------


def flip_a_bit(whole):
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        largest = max((x for x in archive.infolist() if "/data/" in x.filename), key=lambda x: x.file_size)
        start = whole.index(archive.read(largest))
    flipped = bytearray(whole)
    flipped[start + largest.file_size // 2] ^= 64
    torch.load(io.BytesIO(flipped), weights_only=True)  # torch alone reads it without an error
    return bytes(flipped)


def pickled(tree):
    buffer = io.BytesIO()
    torch.save(tree, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("flag", ["--resume", "--play"])
def test_damaged_and_foreign_checkpoints_are_one_line(flag, finished_run, tmp_path, monkeypatch, capsys):
    whole = (finished_run / "checkpoint.pt").read_bytes()
    older = read_checkpoint(finished_run)
    older["args"]["iterations"] = 4
    for content, message in (
        (whole[: len(whole) // 2], "cannot be read: File is not a zip file"),
        (flip_a_bit(whole), "cannot be read: the checksum of "),
        (pickled({"weights": torch.zeros(1)}), "was not written by this version of ppo_gpu_torch.py"),
        (pickled(older), "was not written by this version of ppo_gpu_torch.py"),
    ):
        (tmp_path / "bad.pt").write_bytes(content)
        status, err = run_main(monkeypatch, capsys, flag, tmp_path / "bad.pt")
        assert status == 2 and message in err and messages(err) == [err.strip()], err


def test_a_run_never_writes_over_another(finished_run, monkeypatch, capsys):
    before = (finished_run / "metrics.jsonl").read_bytes()
    status, err = run_main(monkeypatch, capsys, "--device", "cpu", "--run-dir", finished_run)
    assert status == 2 and "contains a run; choose another --run-dir, or --resume its checkpoint.pt" in err
    assert messages(err) == [err.strip()] and (finished_run / "metrics.jsonl").read_bytes() == before


# Log and profile ------------------------------------------------------------------------------------------------------


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
    assert logged(tmp_path, "env_steps") == [512 * k for k in range(1, 7)]
    assert purge_steps == [None, 4 * 512 + 1]


def test_weights_and_biases_mirrors_tensorboard(tmp_path, monkeypatch):
    options = {}
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=options.update))
    ppo.train(short_args(tmp_path, track=True), ProbeEnv)
    assert options["sync_tensorboard"] and options["name"] == tmp_path.name and options["config"]["num_envs"] == 64


@pytest.mark.parametrize(
    "iterations, profiled", [(1, [1]), (2, [2]), (4, [4]), (5, [4, 5]), (6, [4, 5, 6]), (9, [4, 5, 6])]
)
def test_a_profile_is_of_iterations_4_to_6_or_of_the_last(iterations, profiled, tmp_path, capsys):
    profiler = vecsim.start_profiler(tmp_path, iterations)
    for k in range(iterations):
        with torch.profiler.record_function(f"iteration {k + 1}"):
            torch.zeros(1)
        profiler.step()
    profiler.stop()
    with gzip.open(tmp_path / "trace.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert [k for k in range(1, 10) if f"iteration {k}" in names] == profiled
    assert f"iteration {profiled[0]}" in capsys.readouterr().out


def test_crossed_fires_once_for_each_multiple():
    assert [k for k in range(10) if vecsim.crossed(3, k, k + 1)] == [2, 5, 8]
    assert vecsim.crossed(100, 90, 350) and not vecsim.crossed(100, 100, 199) and vecsim.crossed(100, 199, 200)
    assert not vecsim.crossed(None, 0, 10**9)
