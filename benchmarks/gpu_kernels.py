"""Predicts the speed on a GPU from the code for it: `python -m benchmarks gpu-kernels`.

It needs NVRTC and cuobjdump, but no GPU: `pip install -e ".[gpu-kernels]"` (cuobjdump is in triton). For each task it
compiles a control step for an H100 and counts the launches, the bytes that they read and write, and the registers that
they need. The rates follow from a model and are a prediction:

- A launch within a CUDA graph takes 1.5 to 2.5 us and the time of its arithmetic, or longer if its bytes do. Both ends
  are predicted.
- The arithmetic of a kernel takes at least the cycles for which its instructions make a warp wait, by the machine code.
  Where a scheduler has several warps, it issues one instruction a cycle.
- Memory moves 3.0 TB/s. A launch whose bytes fit 40 MB finds them in the cache of the card, which moves 5.5 TB/s.
- More than 8,192 robots are stepped in chunks, one after the other.

The model knows no waiting for memory, so it is an upper bound. The tensors are on the CPU, and nothing is launched.
With --emulate, which needs g++ alone, the kernels run on the CPU beside eager PyTorch, see tests/emulated_cuda.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import math
import re
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ppo_distill_teacher_student as distill
import ppo_gpu_torch as ppo
import vecsim_torch as vecsim
from benchmarks import machine
from benchmarks.comparisons import GYMNASIUM_TASKS
from benchmarks.referee import save, say

LAUNCH = 1.5e-6, 2.5e-6  # s
CLOCK, SCHEDULERS = 1.7e9, 132 * 4  # cycles/s; four for each multiprocessor
MEMORY, CACHE, CACHE_SIZE = 3.0e12, 5.5e12, 40e6  # bytes/s, bytes/s, bytes
BYTES_OUTSIDE = 60  # of a launch outside of compiled functions, for one environment: a copy of a few rows
COUNTED, EMULATED = 4096, 32  # environments of a counted and of an emulated step
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


def with_runge_kutta(task: dict) -> dict:
    """The prediction of a task whose physics step evaluates the dynamics four times, where one was counted."""
    of_dynamics = "begin_dynamics", "newton_iteration"
    calls = [region["calls"] * (4 if region["region"] in of_dynamics else 1) for region in task["regions"]]
    regions = [region | dict(calls=n) for region, n in zip(task["regions"], calls, strict=True)]
    return predict(task | dict(regions=regions), vecsim.CHUNK)


def rates(predicted: dict, env_id: str, num_envs: int, integrator: str) -> list[float] | None:
    """Environment steps/s, [lowest, highest], at the counted size that is nearest to num_envs."""
    task = next((task for task in predicted["tasks"] if task["env_id"] == env_id), None)
    if task is None:
        return None
    model = vecsim.compile_mjcf(vecsim.build_task(env_id, {}).source())
    if integrator == "rk4" or (integrator, vecsim.integrator_of(model)) == ("mjcf", "rk4"):
        task = with_runge_kutta(task)
    return task["rates"][min(task["rates"], key=lambda size: abs(math.log(int(size) / num_envs)))]


def make_environment(env_id: str, num_envs: int, compiled: bool) -> vecsim.VecSim:
    """An environment with the options of its trainer, but one evaluation of the dynamics in a physics step."""
    args = (distill if "Quadruped" in env_id else ppo).task_defaults(env_id, "cpu")
    integrator = "mjcf" if "Quadruped" in env_id else "euler"
    options = dict(integrator=integrator, chunk=num_envs, compile=compiled) | args.env_kwargs
    env = vecsim.make(env_id, num_envs, seed=5, **options)
    env.reset(seed=7)
    return env


def usage(cubin: bytes) -> dict[str, int]:
    """The registers of a thread, the bytes of its stack, its instructions, and the cycles for which they make it wait.

    An instruction of this architecture has 128 bits. Bits 105 to 108 are the cycles until the next one may follow.
    They don't contain the time that loads take. Each instruction is counted once, as if the code had no branches."""
    [folder] = importlib.util.find_spec("triton.backends.nvidia").submodule_search_locations
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        words = [Path(folder) / "bin/cuobjdump", "-res-usage", "-sass", file.name]
        text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    upper = [int(word, 16) for word in re.findall(r"/\* 0x([0-9a-f]{16}) \*/", text)[1::2]]
    found = {key: int(re.search(rf"{word}:(\d+)", text)[1]) for key, word in (("registers", "REG"), ("stack", "STACK"))}
    return found | dict(instructions=len(upper), cycles=sum(word >> 41 & 15 for word in upper))


def find_nvrtc() -> ctypes.CDLL:
    """PyTorch's own, or for a build of PyTorch for CPUs, which has none, that of the package nvidia-cuda-nvrtc-cu12."""
    if torch.version.cuda:
        return torch.cuda._utils._get_nvrtc_library()
    [folder] = importlib.util.find_spec("nvidia.cuda_nvrtc").submodule_search_locations
    return ctypes.CDLL(str(Path(folder) / "lib/libnvrtc.so.12"))


def nvrtc_version() -> str:
    """Of the library of `find_nvrtc`: "12.9"."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    find_nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


class Operators(TorchDispatchMode):
    """Bytes of what each operator returns, of those that launch a kernel."""

    def __init__(self):
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator._schema.name.removeprefix("aten::")
        returned = operator(*args, **kwargs or {})
        view = not operator._schema.is_mutable and any(r.alias_info for r in operator._schema.returns)
        if not view and not name.startswith("empty") and name not in ("detach", "_reshape_alias"):
            self.sizes.append(sum(x.nbytes for x in tree_leaves(returned) if isinstance(x, torch.Tensor)))
        return returned


class CountedCode(vecsim.Code):
    """A compiled function that counts its calls, and what its kernels use. It launches nothing."""

    def __init__(self, *arguments):
        self.calls, self.operators = 0, Operators()
        super().__init__(*arguments)
        self.used = USED[-len(self.kernels) :]  # of its kernels, which were the last to be loaded

    def __call__(self, *arguments):
        self.calls, self.operators = self.calls + 1, Operators()
        with self.operators:  # inputs that are not contiguous are copied
            return super().__call__(*arguments)

    def record(self, name: str) -> dict:
        """What a call launches; bytes are those of one environment. registers: the most of a kernel."""
        copied = [2 * size / COUNTED for size in self.operators.sizes]
        sizes = [kernel.rows * self.dtype.itemsize for kernel in self.kernels]
        most = {key: max(kernel[key] for kernel in self.used) for key in ("registers", "stack")}
        record = dict(region=name, calls=self.calls, bytes=[round(size, 1) for size in (*copied, *sizes)]) | most
        for key in ("instructions", "cycles"):
            record[key] = [0] * len(copied) + [kernel[key] for kernel in self.used]
        return record


USED: list[dict] = []  # by each kernel that was loaded


@contextlib.contextmanager
def compiled_for_a_gpu():
    """Compile as for an H100, on a machine without a GPU. Kernels are counted instead of launched."""

    def load_module(cubin: bytes, names: list[str]) -> dict:
        USED.append(usage(cubin))
        return dict(run=lambda grid, block, arguments: None)

    library = find_nvrtc()
    with contextlib.ExitStack() as stack:
        replace = lambda owner, **names: stack.enter_context(mock.patch.multiple(owner, **names))
        replace(vecsim, on_gpu=lambda device: True, Code=CountedCode)
        replace(torch.cuda, get_device_capability=lambda device=None: (9, 0))
        replace(torch.cuda._utils, _get_nvrtc_library=lambda: library, _cuda_load_module=load_module)
        yield


def count(env_id: str) -> dict:
    """What an environment step launches: by compiled function, and outside of them."""
    with compiled_for_a_gpu():
        env = make_environment(env_id, COUNTED, True)
        action = torch.zeros(env.model.nu, COUNTED)
        with torch.no_grad(), mock.patch.object(torch, "empty", torch.zeros):  # zeros are indices that exist
            env._step_chunks(action)
        codes = [(name, code) for name, f in vars(env._run).items() for code in f.codes.values()]
        for _, code in codes:
            code.calls = 0
        with torch.no_grad(), Operators() as operators:
            env._step_chunks(action)
    inside = sum(code.calls * len(code.operators.sizes) for _, code in codes)  # both count them
    regions = [code.record(name) for name, code in codes if code.calls]
    return dict(env_id=env_id, frame_skip=env.task.frame_skip, regions=regions, outside=len(operators.sizes) - inside)


def emulate(env_id: str, steps: int = 2) -> list[dict]:
    """Steps of the kernels, built by g++, beside eager ones: the largest difference relative to 1 + the eager value."""
    sys.path.insert(0, str(machine.ROOT / "tests"))
    import emulated_cuda

    def difference(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(((a.double() - b.double()).abs() / (1.0 + b.double().abs())).max())

    launched, found = Counter(), []
    with emulated_cuda.emulated_cuda(launched):
        env, eager = (make_environment(env_id, EMULATED, compiled) for compiled in (True, False))
        for k in range(steps):
            action = torch.rand(EMULATED, env.model.nu, generator=torch.Generator().manual_seed(k)) * 2 - 1
            launched.clear()
            (obs, reward, *ends, _), (right_obs, right_reward, *right_ends, _) = (x.step(action) for x in (env, eager))
            pairs = dict(obs=(obs, right_obs), reward=(reward, right_reward))
            pairs |= {name: (getattr(env.state(), name), getattr(eager.state(), name)) for name in ("qpos", "qvel")}
            flags = sum(int((a != b).sum()) for a, b in zip(ends, right_ends, strict=True))
            differences = {name: difference(*pair) for name, pair in pairs.items()}
            found.append(dict(launches=launched.total(), flags=flags) | differences)
            env._set_carry(eager._get_carry())
    return found


def write(options: Namespace) -> None:
    """Count the tasks and write results/gpu/predicted.json, which keeps the counts of others.

    With --emulate run the kernels on the CPU instead, and print how far they are from eager PyTorch."""
    torch.set_num_threads(1)
    path = options.results / "gpu/predicted.json"
    record = json.loads(path.read_text()) if path.exists() else dict(tasks=[])
    tasks = {task["env_id"]: task for task in record["tasks"]}
    for env_id in options.env_id or [*GYMNASIUM_TASKS, "Quadruped-Flat", "Quadruped-Rough"]:
        say(f"{'emulate' if options.emulate else 'count'} {env_id}")
        if options.emulate:
            print(env_id, emulate(env_id))
            continue
        try:
            tasks[env_id] = count(env_id) | dict(commit=machine.commit())
        except ModuleNotFoundError as error:
            raise SystemExit(f'error: {error}; pip install -e ".[gpu-kernels]"') from None
        versions = dict(torch=torch.__version__, nvrtc=nvrtc_version())
        rows = [predict(task, vecsim.CHUNK) for task in tasks.values()]
        about = dict(hardware=HARDWARE, commit=machine.commit(), command="python -m benchmarks gpu-kernels")
        save(path, about | dict(versions=versions, tasks=rows))
