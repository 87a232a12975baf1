"""Predicts the speed on a GPU from the code for it: `python -m benchmarks gpu-kernels`.

It needs triton and NVRTC (`pip install -e ".[gpu-kernels]"`) and g++, but no GPU. For each task it counts the launches
of an environment step, the bytes that they read and write, and the registers that they need on an H100. The counts are
those of the code that vecsim and PyTorch write. The rates follow from a model and are a prediction:

- A launch within a CUDA graph takes 1.5 to 2.5 us and the time of its arithmetic, or longer if its bytes do. Both ends
  are predicted.
- The arithmetic of a kernel of the physics takes at least the cycles for which its instructions make a warp wait, by
  the machine code. Where a scheduler has several warps, it issues one instruction a cycle.
- Memory moves 3.0 TB/s. A launch whose bytes fit 40 MB finds them in the cache of the card, which moves 5.5 TB/s.
- More than 8,192 robots are stepped in chunks, one after the other.

The model knows no arithmetic of PyTorch's kernels and no waiting for memory, so it is an upper bound.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from argparse import Namespace
from importlib import metadata
from pathlib import Path

from benchmarks import machine
from benchmarks.comparisons import GYMNASIUM_TASKS
from benchmarks.referee import save, say

LAUNCH = 1.5e-6, 2.5e-6  # s
CLOCK, SCHEDULERS = 1.7e9, 132 * 4  # cycles/s; four for each multiprocessor
MEMORY, CACHE, CACHE_SIZE = 3.0e12, 5.5e12, 40e6  # bytes/s, bytes/s, bytes
BYTES_OUTSIDE = 60  # of a launch outside of regions, for one environment: a copy of a few rows
SIZES = 1024, 4096, 16384, 65536, 131072
HARDWARE = "no GPU; predicted for an NVIDIA H100 (sm_90)"


def step_seconds(counted: dict, num_envs: int, launch: float, chunk: int) -> float:
    """Predicted time of one environment step of all environments."""
    if num_envs > chunk:
        return math.ceil(num_envs / chunk) * step_seconds(counted, chunk, launch, chunk)

    warps = math.ceil(num_envs / 32 / SCHEDULERS)  # of a scheduler

    def seconds(size: float, instructions: int = 0, cycles: int = 0) -> float:
        """Of a launch that moves `size` bytes for each environment."""
        moved = size * num_envs
        arithmetic = max(cycles, warps * instructions) / CLOCK
        return max(launch + arithmetic, moved / (CACHE if moved < CACHE_SIZE else MEMORY))

    inside = 0.0
    for region in counted["regions"]:
        columns = (region.get(name, [0] * len(region["bytes"])) for name in ("instructions", "cycles"))
        inside += region["calls"] * sum(map(seconds, region["bytes"], *columns))
    return inside + counted["outside"] * seconds(BYTES_OUTSIDE)


def predict(counted: dict, chunk: int) -> dict:
    """What the file of predictions holds of a task."""
    regions = counted["regions"]
    launches = sum(region["calls"] * len(region["bytes"]) for region in regions)
    moved = sum(region["calls"] * sum(region["bytes"]) for region in regions)
    found = {
        num_envs: [num_envs / step_seconds(counted, num_envs, launch, chunk) for launch in reversed(LAUNCH)]
        for num_envs in SIZES
    }
    return counted | dict(launches=launches, bytes=moved, rates=found)


def rates(predicted: dict, env_id: str, num_envs: int) -> list[float] | None:
    """Environment steps/s, [lowest, highest], at the counted size that is nearest to num_envs."""
    task = next((task for task in predicted["tasks"] if task["env_id"] == env_id), None)
    if task is None:
        return None
    return task["rates"][min(task["rates"], key=lambda size: abs(math.log(int(size) / num_envs)))]


def write(options: Namespace) -> None:
    """Count the tasks, each in a new process, and write results/gpu/predicted.json, which keeps the counts of others.

    With --interpret run the code on the CPU instead, and print how far it is from eager PyTorch."""
    sys.path.insert(0, str(machine.ROOT / "tests"))
    import fake_cuda

    import vecsim_torch

    mode, path = ["interpret"] if options.interpret else [], options.results / "gpu/predicted.json"
    record = json.loads(path.read_text()) if path.exists() else dict(tasks=[])
    tasks = {task["env_id"]: task for task in record["tasks"]}
    with tempfile.TemporaryDirectory() as scratch:
        guard = fake_cuda.build_guard(Path(scratch))
        for env_id in options.env_id or [*GYMNASIUM_TASKS, "Quadruped-Flat", "Quadruped-Rough"]:
            say(f"{' '.join(mode) or 'count'} {env_id}")
            command = [sys.executable, "-m", "benchmarks.gpu_code", guard, env_id, *mode]
            done = subprocess.run(command, cwd=machine.ROOT, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise SystemExit(f"error: {env_id} could not be compiled; are triton and NVRTC installed?")
            counted = json.loads(done.stdout.splitlines()[-1])
            if mode:
                print(env_id, counted)
                continue
            tasks[env_id] = counted | dict(commit=machine.commit())
            versions = {name: metadata.version(name) for name in ("torch", "triton", "nvidia-cuda-nvrtc-cu12")}
            rows = [predict(task, vecsim_torch.CHUNK) for task in tasks.values()]
            about = dict(hardware=HARDWARE, commit=machine.commit(), command="python -m benchmarks gpu-kernels")
            save(path, about | dict(versions=versions, tasks=rows))
