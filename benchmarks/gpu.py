"""The first hour on a GPU: blocks of work in the order of what they teach, each with what was predicted for it.

    ./benchmark.sh gpu --dry-run                # the plan with its minutes
    ./benchmark.sh gpu                          # all blocks, those that are done excepted
    ./benchmark.sh gpu card tests               # these blocks
    ./benchmark.sh gpu --device cpu --quick     # a rehearsal: small sizes, files of their own

The first five blocks should take 12 minutes. They show what a step and a training of Ant cost, and where the time goes.
A block is one command. It writes results/gpu/<block>.json and prints one line. It is ended after 9 minutes; what its
files hold by then counts. A block that fails stops no other. Rates are predicted in results/gpu/predicted.json, which
`python -m benchmarks gpu-kernels` writes. Scores to reach are those of runs.toml, and errors are those of a CPU. Where
there is no git, $COMMIT is the commit that the files name.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import gpu_kernels, machine, runs
from benchmarks.referee import CACHES, end, save, say
from benchmarks.tables import shown

LIMIT = 540  # s until a block is ended
TO_A_MINUTE = [0, 60]  # s from the start of a training to its first step: our goal
COMPILATION = [3, 45]  # s; in `gpu-kernels` one core took 4 (HalfCheetah) to 38 (Quadruped-Rough); more take less

# What a block found, by name: the value and what was predicted, which is a number, [lowest, highest] or None.
Figures = dict[str, tuple[Any, Any]]


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def simulation(settings: dict) -> list[float] | None:
    """The predicted environment steps/s of the simulator alone: [lowest, highest]."""
    path = machine.ROOT / "results/gpu/predicted.json"
    names = "env_id", "num_envs", "integrator"
    return gpu_kernels.rates(read_json(path), *map(settings.get, names)) if path.exists() else None


# ----------------------------------------------------------------------------------------------------------------------
# Reading what a command left in its folder `out`; its output is in out/log
# ----------------------------------------------------------------------------------------------------------------------


def card(out: Path) -> Figures:
    found = read_json(out / "card.json")
    microseconds = {name: found[name] and found[name] * 1e6 for name in ("launch_seconds", "graph_launch_seconds")}
    return {
        "launch in a graph, us": (microseconds["graph_launch_seconds"], [x * 1e6 for x in gpu_kernels.LAUNCH]),
        "launch, us": (microseconds["launch_seconds"], None),
        "memory, GB/s": (found["bytes_per_second"] / 1e9, gpu_kernels.MEMORY / 1e9),
        "versions": (found["versions"], None),
    }


def tests(out: Path) -> Figures:
    """The last line of pytest: "7 passed, 3 skipped, 900 deselected in 61.00s". ValueError if it has no such counts."""
    last = (out / "log").read_text().splitlines()[-1]
    counts = {name: int(number) for number, name in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    if not counts:
        raise ValueError(last)
    return {name: (counts.get(name, 0), None if name == "passed" else 0) for name in ("passed", "failed", "skipped")}


def physics(out: Path) -> Figures:
    found = read_json(out / "physics.json")
    figures = {"environment steps/s": (found["env_steps_per_second"], simulation(found))}
    on_cpu = machine.ROOT / f"results/vecsim/{found['env_id']}-cpu-1core.json"
    if "qacc_error_p99_by_iterations" in found:
        expected = read_json(on_cpu)["qacc_error_p99_by_iterations"]["4"] if on_cpu.exists() else None
        figures["error of qacc, 99th percentile"] = found["qacc_error_p99_by_iterations"]["4"], expected
    return figures | {"compilation, s": (found["compile_seconds"], COMPILATION), "diverged": (found["invalid"], 0)}


def scaling(out: Path) -> Figures:
    figures = {}
    for path in sorted((out / "benchmark").glob("scaling-*.json"), key=lambda path: path.stat().st_mtime):
        record = read_json(path)
        shared = record["settings"]
        rate = record["rows"][0]["median"] / shared["frame_skip"]
        figures[f"environment steps/s at {shared['num_envs']:,}"] = rate, simulation(shared)
    return figures


def contenders(out: Path) -> Figures:
    """Ours first, in the unit of the comparison; there is no prediction for others."""
    figures = {}
    for path in (out / "benchmark").glob("*.json"):
        record = read_json(path)
        for row in record["rows"]:
            figures[f"{row['contender']}, {record['unit']}"] = row["median"], None
            if "step_error_p99" in row:
                figures[f"{row['contender']}, error of a step"] = row["step_error_p99"], None
        figures |= {f"{name} is missing": (reason, None) for name, reason in record["failed"].items()}
    return figures


def training(out: Path) -> Figures:
    """The speed of a training, its scores in Gymnasium and when they reached the threshold of runs.toml."""
    log, config = runs.lines_of(out / "run/metrics.jsonl"), read_json(out / "run/config.json")
    trainer, env_id = "sac" if "replay_capacity" in config else "ppo", config["env_id"]
    goal = runs.SETS[trainer]["runs"].get(env_id, {}).get("threshold")
    record = runs.scored(out / "run")
    limit = simulation(config)
    middle = log[len(log) // 2]
    figures = {"environment steps/s": (middle["steps_per_second"], limit and [0, limit[1]])}
    if "compile_seconds" in record:
        figures["until the first step, s"] = record["compile_seconds"], TO_A_MINUTE
    if curve := record["curve"]:
        figures["best score"] = max(score for _, _, score in curve), goal
        figures["seconds to that goal"] = next((t for _, t, score in curve if goal and score >= goal), None), None
    if "velocity_error" in log[-1]:
        on_cpu = read_json(machine.ROOT / "results/quadruped/Quadruped-Flat/training.json")
        last = dict(zip(on_cpu["curve_columns"], on_cpu["curves"]["policy"][-1], strict=True))
        figures["velocity error, m/s"] = log[-1]["velocity_error"], last["velocity_error"]  # both with exploration
    return figures | {"environment steps": (log[-1]["env_steps"], config["total_timesteps"])}


def profile(out: Path) -> Figures:
    config = read_json(out / "run/config.json")
    limit = simulation(config)
    steps = config["num_envs"] * config.get("num_steps", 1)
    figures = {}
    for name, stage in runs.stage_times(out / "run/trace.json.gz").items():
        expected = [1e3 * steps / rate for rate in reversed(limit)] if limit and name == "simulate" else None
        figures[f"{name}, ms"] = 1e3 * stage["seconds"], expected
    return figures


def stages(out: Path) -> Figures:
    """Teacher and student: the speed of each stage and how long its last episodes were."""
    figures = {}
    for folder in sorted((out / "run").iterdir(), key=lambda folder: folder.stat().st_mtime):
        log, config = runs.lines_of(folder / "metrics.jsonl"), read_json(folder / "config.json")
        limit = simulation(config)
        speed = log[len(log) // 2]["steps_per_second"]
        figures[f"{folder.name}, environment steps/s"] = speed, limit and [0, limit[1]]
        figures[f"{folder.name}, episode length"] = log[-1]["episode_length"], None
    return figures


# ----------------------------------------------------------------------------------------------------------------------
# The table
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    name: str
    minutes: int  # on a GPU, with compilation; an estimate until one has run it
    command: str  # {out} is its folder, {device} is cpu or cuda
    read: Callable[[Path], Figures]
    rehearsal: str  # flags that --quick adds: they make it short


# Beginnings of commands, and flags of a rehearsal: the last of equal flags counts.
PHYSICS = "python vecsim_torch.py --device {device} --json {out}/physics.json --env-id"
SIM = "./benchmark.sh sim --repeats 3 --seconds 3 --device {device} --results {out} --env-id"
SIZES = "--num-envs 4096,16384,1024,65536,131072"
PPO = "python ppo_gpu_torch.py --device {device} --run-dir {out}/run --num-envs 4096 --env-id"
SAC = "python sac_gpu_torch.py --device {device} --run-dir {out}/run --env-id"
DISTILL = "python ppo_distill_teacher_student.py --device {device} --run-dir {out}/run --num-envs 4096 --env-id"
LEARNER = "./benchmark.sh learner --repeats 3 --seconds 3 --device {device} --results {out}"
TRAIN = "./benchmark.sh train --repeats 3 --seconds 3 --device {device} --results {out} --env-id"
GPU_TESTS = "'test_cuda_graph or captured_graphs_agree or captured_policy_sees or never_waits'"

PENDULUM = "--env-id InvertedPendulum-v5"
SMALL_PHYSICS = f"{PENDULUM} --num-envs 64 --no-compile --seconds 0.2"
SMALL_SIZES = f"{PENDULUM} --num-envs 16,32 --seconds 1"
SMALL_PPO = f"{PENDULUM} --num-envs 64 --no-compile --total-timesteps 16384"
SMALL_SAC = f"{PENDULUM} --num-envs 16 --no-compile --total-timesteps 1600"
SCORED_PPO = f"{SMALL_PPO} --eval-every 8192 --eval-episodes 2"
SCORED_SAC = f"{SMALL_SAC} --eval-every 800 --eval-episodes 2"
SMALL_WALK = "--num-envs 8 --num-steps 2 --num-minibatches 1 --total-timesteps 64 --no-compile --eval-episodes 0"
SMALL_DISTILL = f"{SMALL_WALK} --stages teacher --distill-steps 15 --distill-minibatches 1"
SMALL_SIM = f"{PENDULUM} --quick --seconds 1 --contenders 'MuJoCo C'"
PROFILED = "--profile --eval-episodes 0 --log-every 1"

BLOCKS = [
    Block("card", 1, "python -m benchmarks.card {device} {out}/card.json", card, ""),
    Block("physics-Ant-v5", 2, f"{PHYSICS} Ant-v5", physics, SMALL_PHYSICS),
    Block("ppo-Ant-v5", 4, f"{PPO} Ant-v5 --eval-every 4000000", training, SCORED_PPO),
    Block("profile-ppo", 2, f"{PPO} Ant-v5 --total-timesteps 1000000 {PROFILED}", profile, f"{SMALL_PPO} {PROFILED}"),
    Block("sizes-Ant-v5", 3, f"{SIM} Ant-v5 {SIZES}", scaling, SMALL_SIZES),
    Block("tests", 9, f"python -m pytest -k {GPU_TESTS}", tests, "tests/test_ppo.py"),
    Block("ppo-InvertedPendulum-v5", 2, f"{PPO} InvertedPendulum-v5 --eval-every 250000", training, SCORED_PPO),
    Block("warp", 6, f"{SIM} Ant-v5 --contenders vecsim 'MuJoCo Warp'", contenders, SMALL_SIM),
    Block("physics-HalfCheetah-v5", 2, f"{PHYSICS} HalfCheetah-v5", physics, SMALL_PHYSICS),
    Block("physics-Humanoid-v5", 3, f"{PHYSICS} Humanoid-v5", physics, SMALL_PHYSICS),
    Block("physics-Quadruped-Flat", 3, f"{PHYSICS} Quadruped-Flat --integrator implicitfast", physics, SMALL_PHYSICS),
    Block("ppo-HalfCheetah-v5", 4, f"{PPO} HalfCheetah-v5 --eval-every 2500000", training, SCORED_PPO),
    Block("ppo-Humanoid-v5", 9, f"{PPO} Humanoid-v5 --eval-every 3000000", training, SCORED_PPO),
    Block("walk", 9, f"{PPO} Quadruped-Flat", training, SMALL_WALK),
    Block("sac-HalfCheetah-v5", 6, f"{SAC} HalfCheetah-v5 --eval-every 320000", training, SCORED_SAC),
    Block("profile-sac", 3, f"{SAC} Ant-v5 --total-timesteps 200000 {PROFILED}", profile, f"{SMALL_SAC} {PROFILED}"),
    Block("mjx", 9, f"{SIM} Ant-v5 --contenders MJX", contenders, SMALL_SIM),
    Block("learner", 8, f"{LEARNER} --contenders 'ours, compiled' 'ours, bf16' 'rsl_rl, compiled'", contenders,
          "--quick --contenders 'ours, eager' --seconds 1"),
    Block("train", 9, f"{TRAIN} Ant-v5 --contenders ours 'rsl_rl on vecsim'", contenders,
          f"{PENDULUM} --quick --contenders 'SB3, DummyVecEnv' --seconds 1"),
    Block("distill", 9, f"{DISTILL} Quadruped-Flat --total-timesteps 60000000", stages, SMALL_DISTILL),
    Block("sizes-Humanoid-v5", 6, f"{SIM} Humanoid-v5 {SIZES}", scaling, SMALL_SIZES),
    Block("sizes-HalfCheetah-v5", 4, f"{SIM} HalfCheetah-v5 {SIZES}", scaling, SMALL_SIZES),
]  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Running
# ----------------------------------------------------------------------------------------------------------------------


def words_of(block: Block, options: Namespace, out: Path | str) -> list[str]:
    command = block.command.format(device=options.device, out=out)
    return shlex.split(f"{command} {block.rehearsal}" if options.quick else command)


def execute(words: list[str], log: Path) -> str:
    """Run a command, for LIMIT seconds at most; return how it ended: "done" or what went wrong."""
    environment = os.environ | dict(PYTHON=sys.executable, PYTHONPATH=machine.python_path(), PYTHONUNBUFFERED="1")
    environment |= {name: str(log.parent / name) for name in CACHES}  # empty: every block compiles
    words = [sys.executable, *words[1:]] if words[0] == "python" else words
    with log.open("w") as out:
        options = dict(cwd=machine.ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)
        process = subprocess.Popen(words, **options, start_new_session=True)
    try:
        status = process.wait(LIMIT)
        last = log.read_text(errors="replace").strip().splitlines() or ["no message"]
        return "done" if status == 0 else f"failed with status {status}: {last[-1][:200]}"
    except subprocess.TimeoutExpired:
        return f"ended after {LIMIT // 60} minutes"
    finally:
        end(process, 20)  # a trainer then saves a checkpoint


def summary(record: dict) -> str:
    """One line: what a block found beside what was predicted."""
    parts = [
        f"{name} {shown(found)}" + (f" (predicted {shown(predicted)})" if predicted is not None else "")
        for name, (found, predicted) in record["figures"].items()
    ]
    return f"{record['block']}, {record['seconds']:.0f} s, {record['status']}: {'; '.join(parts) or 'no figures'}"


def run_block(block: Block, options: Namespace) -> dict:
    """Run a block and read its figures; a record of how it went, whatever happens."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        out, began = Path(scratch), time.perf_counter()
        status = execute(words_of(block, options, out), out / "log")
        seconds = time.perf_counter() - began
        try:
            figures = block.read(out)
        except Exception as error:  # no block may stop the others
            figures = {}
            status = f"no figures: {type(error).__name__}: {error}" if status == "done" else status
    record = dict(block=block.name, minutes=block.minutes, seconds=round(seconds, 1), status=status, figures=figures)
    command = shlex.join(words_of(block, options, "OUT"))
    return record | dict(command=command, hardware=machine.hardware(options.device), commit=machine.commit())


def run(options: Namespace) -> bool:
    """Run the chosen blocks in the order of the table; False: one of them is not done."""
    finished, total = True, 0
    for block in BLOCKS:
        if options.blocks and block.name not in options.blocks:
            continue
        path = options.results / "gpu" / f"{block.name}{'-quick' if options.quick else ''}.json"
        total += block.minutes
        earlier = read_json(path) if path.exists() else {}
        if options.dry_run:
            command = shlex.join(words_of(block, options, "OUT"))
            print(f"{block.minutes:2d} min, {total:3d} by then  {block.name}: {command}")
        elif earlier.get("status") == "done" and not options.force:
            say(f"{block.name}: there ({earlier['hardware']}, commit {earlier['commit']}); --force runs it again")
        else:
            say(f"{block.name}, about {block.minutes} minutes")
            record = run_block(block, options)
            save(path, record)
            print(summary(record), flush=True)
            finished &= record["status"] == "done"
    return finished
