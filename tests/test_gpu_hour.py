"""The first hour on a GPU: its commands are accepted, its blocks survive each other, its predictions are by hand."""

import ast
import importlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_benchmark import accept

import vecsim_torch
from benchmarks import gpu, gpu_kernels, simulator, tables
from benchmarks.__main__ import parse_args

ROOT = Path(__file__).parents[1]


def options(tmp_path, *words):
    return parse_args(["gpu", "--device", "cpu", "--quick", "--results", str(tmp_path), *words])


def accept_any(words):
    """SystemExit or InputError if the program of a block refuses its command."""
    if words[0] == "./benchmark.sh":
        parse_args(words[1:])
    elif words[1] == "vecsim_torch.py":
        vecsim_torch.parse_flags(words[2:], simulator.BenchmarkArgs(), None)
    elif words[1].endswith(".py"):
        accept(words)
        trainer = importlib.import_module(words[1].removesuffix(".py"))
        trainer.check_ranges(trainer.parse_args(words[2:]))


@pytest.mark.parametrize("block", gpu.BLOCKS, ids=lambda block: block.name)
def test_a_block_takes_at_most_nine_minutes_and_its_program_accepts_its_command(block, tmp_path, monkeypatch):
    assert 0 < block.minutes <= 9
    plan = options(tmp_path)
    for plan.quick in (True, False):
        accept_any(gpu.words_of(block, plan, tmp_path))


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["gpu", "card", "fly"], "unknown block 'fly'; choose from card, physics-Ant-v5"),
        (["gpu", "--device", "cpu"], "rehearse with --device cpu --quick"),
    ],
)
def test_bad_input_is_one_line_and_status_2(words, complaint, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(words)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and complaint in said and said.count("\n") == 1


@pytest.mark.slow
def test_the_rehearsal_of_the_cheapest_blocks(tmp_path):
    names = "card", "physics-Ant-v5", "ppo-InvertedPendulum-v5"
    words = ["gpu", *names, "--device", "cpu", "--quick", "--results", tmp_path]
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run([ROOT / "benchmark.sh", *words], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(",")[0] for line in lines] == list(names)
    records = [json.loads((tmp_path / "gpu" / f"{name}-quick.json").read_text()) for name in names]
    card, physics, ppo = (record["figures"] for record in records)
    assert 0.1 < card["launch, us"][0] < 1000 and card["memory, GB/s"][0] > 0.5
    assert physics["environment steps/s"][0] > 10 and 0 < physics["error of qacc, 99th percentile"][0] < 1e-2
    assert ppo["environment steps"] == [16384, 16384] and ppo["best score"][0] > 1 and ppo["best score"][1] == 1000
    assert all(f"best score {gpu.shown(ppo['best score'][0])} (predicted 1,000)" in line for line in lines[2:])
    text = tables.first_hour(records)
    assert text.count("\n| card |") == len(card) and "16,384 | 16,384 |" in text


def test_a_block_that_fails_or_takes_too_long_stops_no_other(tmp_path, monkeypatch, capsys):
    def read(out):
        return {"lines": (len((out / "log").read_text().splitlines()), 1)}

    def refuse(out):
        raise KeyError("row")

    program = "print('begun', flush=True); import time; time.sleep({})"
    commands = {
        "broken": (["python", "-c", "raise ValueError('no card')"], read),
        "slow": (["python", "-c", program.format(60)], read),
        "unreadable": (["python", "-c", "pass"], refuse),
        "good": (["python", "-c", program.format(0)], read),
    }
    blocks = [gpu.Block(name, 1, shlex.join(words), reader, "") for name, (words, reader) in commands.items()]
    monkeypatch.setattr(gpu, "BLOCKS", blocks)
    monkeypatch.setattr(gpu, "LIMIT", 2)
    assert not gpu.run(parse_args(["gpu", "--device", "cpu", "--quick", "--results", str(tmp_path)]))
    found = {block.name: json.loads((tmp_path / "gpu" / f"{block.name}-quick.json").read_text()) for block in blocks}
    assert found["broken"]["status"] == "failed with status 1: ValueError: no card"
    assert found["slow"]["status"].startswith("ended after") and found["slow"]["seconds"] < 30
    assert found["slow"]["figures"] == found["good"]["figures"] == {"lines": [1, 1]}
    assert found["unreadable"]["status"] == "no figures: KeyError: 'row'" and found["good"]["status"] == "done"
    assert len(capsys.readouterr().out.splitlines()) == 4
    gpu.run(options(tmp_path, "good"))
    assert "--force runs it again" in capsys.readouterr().err


def test_blocks_find_the_packages_of_the_python_path(tmp_path, monkeypatch):
    """A borrowed machine may have them in another folder."""
    (tmp_path / "only_here.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    words = ["python", "-c", "import benchmarks.gpu, only_here"]
    assert gpu.execute(words, tmp_path / "log") == "done", (tmp_path / "log").read_text()
    shell = tmp_path / "python"
    shell.write_text('#!/bin/sh\necho "$PYTHONPATH"\n')
    shell.chmod(0o755)
    environment = os.environ | {"PYTHON": str(shell)}
    done = subprocess.run([ROOT / "benchmark.sh", "gpu"], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == f"{ROOT}:{tmp_path}"


def test_the_first_blocks_fit_a_short_loan():
    """A loan may be of a quarter of an hour, of which the start takes two minutes; a command ends after ten."""
    minutes = [block.minutes for block in gpu.BLOCKS[:5]]
    assert sum(minutes[:3]) <= 9 and sum(minutes) <= 12


def test_the_counts_of_pytest_are_read(tmp_path):
    (tmp_path / "log").write_text("slowest\n1 failed, 7 passed, 3 skipped, 900 deselected in 61.00s\n")
    assert gpu.tests(tmp_path) == {"passed": (7, None), "failed": (1, 0), "skipped": (3, 0)}
    (tmp_path / "log").write_text("(10 durations < 0.005s hidden)\n")
    with pytest.raises(ValueError, match="durations"):
        gpu.tests(tmp_path)


def test_runge_kutta_evaluates_the_dynamics_four_times():
    names = "euler", "rk4", "mjcf"
    *found, mjcf = [gpu.simulation(dict(env_id="Ant-v5", num_envs=4096, integrator=name)) for name in names]
    for euler, rk4 in zip(*found, strict=True):
        assert 3.5 * rk4 < euler < 4 * rk4  # rewards and resets are computed once
    assert mjcf == found[1]


def test_a_rate_is_predicted_by_hand():
    """Three launches: two of a region, one outside. At 1,000 environments all take the time of a launch."""
    regions = [dict(region="a", calls=2, bytes=[30_000.0])]
    counted = dict(env_id="Ant-v5", regions=regions, outside=1)
    assert gpu_kernels.step_seconds(counted, 100, 2e-6, chunk=16_384) == pytest.approx(3 * 2e-6)
    large = 2 * 30_000 * 2000 / gpu_kernels.MEMORY  # 60 MB do not fit the cache
    assert gpu_kernels.step_seconds(counted, 2000, 2e-6, chunk=16_384) == pytest.approx(large + 2e-6)
    in_cache = 2 * 30_000 * 1000 / gpu_kernels.CACHE  # 30 MB do
    assert gpu_kernels.step_seconds(counted, 4000, 2e-6, chunk=1000) == pytest.approx(4 * (in_cache + 2e-6))
    regions[0] |= dict(instructions=[3400], cycles=[8500])  # 2 and 5 us for one warp
    assert gpu_kernels.step_seconds(counted, 100, 2e-6, chunk=16_384) == pytest.approx(3 * 2e-6 + 2 * 5e-6)
    warps = 132 * 4 * 32  # of a card that is full once
    full = gpu_kernels.step_seconds(counted | dict(outside=0), 5 * warps, 1.0, chunk=10 * warps)
    assert full == pytest.approx(2 * (1.0 + 5 * 2e-6))
    task = gpu_kernels.predict(counted, chunk=16_384)
    assert task["launches"] == 2 and task["bytes"] == 60_000
    record = json.loads(json.dumps(dict(tasks=[task])))
    low, high = gpu_kernels.rates(record, "Ant-v5", 5000, "euler")
    assert low == pytest.approx(4096 / gpu_kernels.step_seconds(counted, 4096, 2.5e-6, 16_384)) and low <= high
    assert gpu_kernels.rates(record, "Hopper-v5", 5000, "euler") is None


@pytest.mark.slow
def test_the_code_for_a_gpu_computes_what_eager_pytorch_does(tmp_path):
    """Emulated on the CPU; and the counts of that code, which become a prediction."""
    for package in ("triton", *(() if torch.version.cuda else ("nvidia.cuda_nvrtc",))):
        pytest.importorskip(package, reason=f'no {package}; pip install -e ".[gpu-kernels]"')
    words = [sys.executable, "-m", "benchmarks", "gpu-kernels", "--env-id", "InvertedPendulum-v5"]
    words += ["--results", str(tmp_path)]
    done = subprocess.run([*words, "--emulate"], cwd=ROOT, capture_output=True, text=True, check=True)
    steps = ast.literal_eval(done.stdout.removeprefix("InvertedPendulum-v5 "))
    for step in steps:
        assert step["launches"] == 2 * (1 + 4 + 1) + 2 and step["flags"] == 0  # two physics steps, its begin and end
        assert max(step[name] for name in ("obs", "reward", "qpos", "qvel")) < 1e-5
    subprocess.run(words, cwd=ROOT, check=True)
    [task] = json.loads((tmp_path / "gpu/predicted.json").read_text())["tasks"]
    assert task["launches"] == steps[0]["launches"] and 2_000 < task["bytes"] < 4_000
    stacks = {region["region"]: region["stack"] for region in task["regions"]}
    assert stacks.pop("begin_dynamics") <= 40  # sine and cosine of large angles
    assert set(stacks.values()) == {0}  # no spills
