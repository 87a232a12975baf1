"""The code for a GPU, on a machine without one: counted, compiled for an H100, or run on the CPU.

    python -m benchmarks.gpu_code GUARD Ant-v5              # JSON: launches, bytes, registers; see gpu_kernels.py
    python -m benchmarks.gpu_code GUARD Ant-v5 interpret    # emulated steps, beside eager ones

Needs triton and NVRTC. GUARD is a library that tests/fake_cuda.py builds; it lets a build of PyTorch for CPUs believe
in CUDA.

An environment is compiled on the CPU, with the options of a GPU. vecsim writes the physics as CUDA C++, which NVRTC
compiles. PyTorch writes the other regions: just before Inductor lowers a graph, the graph moves to fake CUDA tensors,
which have a shape and a device but no memory. Inductor then writes Triton kernels. To be counted, no kernel is run:
PyTorch's regions return zeros, those of the physics arbitrary numbers. To be emulated, the kernels of PyTorch run in
Triton's interpreter, and those of the physics are compiled by g++, see tests/emulated_cuda.py. This uses private names
of PyTorch 2.13 and triton 3.7.
"""

from __future__ import annotations

import ctypes
import os
import sys

INTERPRET = sys.argv[3:] == ["interpret"]
ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)  # before PyTorch
os.environ |= dict(TORCHINDUCTOR_FX_GRAPH_CACHE="0", TORCHINDUCTOR_COMPILE_THREADS="1")
os.environ |= dict(TRITON_INTERPRET="1") if INTERPRET else {}

import contextlib
import importlib.util
import json
import re
import subprocess
import tempfile
import types
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import triton
import triton.backends.nvidia
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

import ppo_distill_teacher_student as distill
import ppo_gpu_torch as ppo
import vecsim_torch as vecsim
from benchmarks import machine

sys.path.insert(0, str(machine.ROOT / "tests"))
import emulated_cuda

ENVIRONMENTS = 32 if INTERPRET else 4096
TARGET = GPUTarget("cuda", 90, 32)
H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, warp_size=32,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, regs_per_multiprocessor=65536,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20, gcnArchName="", is_integrated=False, uuid="", memory_bus_width=5120, clock_rate=1980000,
)  # fmt: skip
PROPERTIES = {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}


class Driver(DriverBase):
    """Triton's view of the card."""

    utils = types.SimpleNamespace(get_device_properties=lambda _: PROPERTIES)
    is_active = staticmethod(lambda: True)
    get_current_target = lambda self: TARGET
    get_active_torch_device = lambda self: torch.device("cuda", 0)
    get_current_device = get_current_stream = lambda self, _=None: 0
    map_python_to_cpp_type = lambda self, name: name
    get_benchmarker = lambda self: None


def pretend_to_have_a_gpu() -> None:
    """Before Dynamo is imported, because it copies functions of torch.cuda."""
    answers = dict(
        is_available=True, device_count=1, current_device=0, get_device_name=H100.name, get_device_properties=H100,
        get_device_capability=(9, 0), is_bf16_supported=True, is_initialized=True, _lazy_init=None, set_device=None,
        synchronize=None, _is_in_bad_fork=False, _exchange_device=0, _maybe_exchange_device=0, memory_allocated=0,
        mem_get_info=(80 << 30, 80 << 30), current_stream=types.SimpleNamespace(cuda_stream=0),
        get_rng_state=torch.zeros(16, dtype=torch.uint8), set_rng_state=None,
    )  # fmt: skip
    functions = {name: lambda *_, answer=answer, **__: answer for name, answer in answers.items()}
    functions["stream"] = lambda _: contextlib.nullcontext()
    for name, function in functions.items():
        setattr(torch.cuda, name, function)
    torch._C._cuda_getCurrentRawStream = torch._C._cuda_getDevice = lambda *_: 0
    torch.version.cuda = "12.8"
    FakeTensorMode.avoid_device_init = property(lambda self: True)
    fake_tensor.init_gpu_context = lambda device: None
    triton.runtime.driver.set_active(Driver())
    import torch._dynamo.device_interface as interface

    for name, function in functions.items():
        if hasattr(interface.CudaInterface, name):
            setattr(interface.CudaInterface, name, staticmethod(function))
    interface.CudaInterface.get_raw_stream = staticmethod(lambda _: 0)


def compile_for_cuda(make_call) -> None:
    """Let Inductor lower for CUDA. make_call(graph, source) is what a compiled region runs instead of the source."""
    import torch._inductor.compile_fx as compile_fx
    from torch._inductor import config, graph
    from torch._inductor.runtime import triton_helpers

    lower = compile_fx.fx_codegen_and_compile
    triton_helpers.set_driver_to_gpu = lambda: None
    config.profile_bandwidth = not INTERPRET  # writes the bytes of each kernel into the source

    def moved(x):
        with x.fake_mode if isinstance(x, FakeTensor) else FakeTensorMode():
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")

    def lower_for_cuda(module, inputs, *words, **options):
        for node in module.graph.nodes:
            if node.kwargs.get("device") is not None:
                node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
            if "val" in node.meta:
                node.meta["val"] = tree_map_only(torch.Tensor, moved, node.meta["val"])
        return lower(module, [moved(x) for x in inputs], *words, **options)

    def to_module(self):
        source = self.codegen()[0].value
        call = make_call(self, source)
        return types.SimpleNamespace(call=call, __file__="", recursively_apply_fns=None, runner=None, partitions=[])

    compile_fx.fx_codegen_and_compile = lower_for_cuda
    graph.GraphLowering._compile_to_module = to_module


def make_environment(env_id: str, compiled: bool) -> vecsim.VecSim:
    """An environment with the options of its trainer."""
    args = (distill if "Quadruped" in env_id else ppo).task_defaults(env_id, "cpu")
    options = dict(integrator=args.integrator, chunk=ENVIRONMENTS, compile=compiled) | args.env_kwargs
    env = vecsim.make(env_id, ENVIRONMENTS, seed=5, **options)
    env.reset(seed=7)
    return env


# ----------------------------------------------------------------------------------------------------------------------
# Counting
# ----------------------------------------------------------------------------------------------------------------------


def kernels_of(source: str) -> dict[str, str]:
    """The source of each kernel of a region."""
    return dict(re.findall(r"(\w+) = async_compile\.triton\('\w+', '''(.*?)''', device_str", source, re.DOTALL))


def launches_of(source: str) -> list[str]:
    """What a region launches, in order: names of kernels, and operators for which Inductor writes none."""
    body = source[source.index("def call(") :]
    return re.findall(r"(triton_\w+)\.run\(|((?:extern_kernels|torch\.ops)\.[\w.]+)\(", body)


def number(kernel: str, name: str) -> float:
    found = re.search(rf"'{name}': ([0-9.e+-]+)", kernel)
    return float(found[1]) if found else 0.0


def load_source(kernel: str) -> dict:
    """The names that the source of a kernel defines, and the kernel itself as "kernel"."""
    path = Path(tempfile.mkdtemp()) / "kernel.py"
    path.write_text(kernel)  # Triton reads it there
    names = {"__name__": "kernel", "__file__": str(path)}
    exec(compile(kernel, path, "exec"), names)
    names["kernel"] = names[re.search(r"def (triton_\w+)\(", kernel)[1]]
    return names


def usage(cubin: bytes) -> dict[str, int]:
    """The registers of a thread, the bytes of its stack, its instructions, and the cycles for which they make it wait.

    An instruction of this architecture has 128 bits. Bits 105 to 108 are the cycles until the next one may follow.
    They don't contain the time that loads take. Each instruction is counted once, as if the code had no branches."""
    tool = Path(triton.backends.nvidia.__file__).parent / "bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        words = [tool, "-res-usage", "-sass", file.name]
        text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    upper = [int(word, 16) for word in re.findall(r"/\* 0x([0-9a-f]{16}) \*/", text)[1::2]]
    found = {key: int(re.search(rf"{word}:(\d+)", text)[1]) for key, word in (("registers", "REG"), ("stack", "STACK"))}
    return found | dict(instructions=len(upper), cycles=sum(word >> 41 & 15 for word in upper))


def registers(name: str, kernel: str) -> list[dict]:
    """Registers, and bytes of the stack of a thread, for each configuration that Inductor would try."""
    tuner, found = load_source(kernel)["kernel"], []
    meta, function = tuner.triton_meta, tuner.fn
    for config in tuner.configs:
        constants = {(function.arg_names.index(k),): v for k, v in (meta["constants"] | config.kwargs).items()}
        signature = meta["signature"] | dict.fromkeys(config.kwargs, "constexpr")
        attributes = {tuple(k): v for k, v in meta["configs"][0].items()} if meta["configs"] else {}
        source = triton.compiler.ASTSource(function, signature, constants, attributes)
        options = dict(num_warps=config.num_warps, num_stages=config.num_stages, debug=True, sanitize_overflow=False)
        used = usage(triton.compile(source, target=TARGET, options=options).asm["cubin"])
        found.append(dict(kernel=name, **config.kwargs, warps=config.num_warps) | used)
    return found


def find_nvrtc() -> ctypes.CDLL:
    """The library in the package nvidia-cuda-nvrtc-cu12. A build of PyTorch for CPUs comes without it."""
    [folder] = importlib.util.find_spec("nvidia.cuda_nvrtc").submodule_search_locations
    return ctypes.CDLL(str(Path(folder) / "lib/libnvrtc.so.12"))


class CountedCode(vecsim.Code):
    """A compiled function of the physics that counts its calls, and what its kernels use. It launches nothing."""

    def __init__(self, *arguments):
        def load_module(cubin: bytes, names: list[str]) -> dict:
            self.used.append(usage(cubin))
            return dict(run=lambda grid, block, arguments: None)

        self.record, self.used = dict(calls=0), []
        with mock.patch.object(torch.cuda._utils, "_cuda_load_module", load_module):
            super().__init__(*arguments)

    def __call__(self, *arguments):
        with Operators() as operators:
            result = super().__call__(*arguments)
        sizes = [kernel.rows * self.dtype.itemsize for kernel in self.kernels]
        copied = [2 * size / ENVIRONMENTS for size in operators.sizes]  # inputs that are not contiguous
        self.record["calls"] += 1
        self.record |= dict(bytes=[round(size, 1) for size in (*copied, *sizes)], fallbacks=operators.names)
        for name in ("instructions", "cycles"):
            self.record[name] = [0] * len(copied) + [kernel[name] for kernel in self.used]
        return result


def most_registers(name: str, code: CountedCode) -> list[dict]:
    """The most registers and the largest stack of the kernels of a function of the physics."""
    most = {key: max(kernel[key] for kernel in code.used) for key in ("registers", "stack")}
    return [dict(kernel=f"{name}, the most of its {len(code.used)} kernels", warps=vecsim.BLOCK // 32) | most]


class Operators(TorchDispatchMode):
    """Names of the operators that launch a kernel, and bytes of what they return."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []
        self.sizes: list[int] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator._schema.name.removeprefix("aten::")
        returned = operator(*args, **kwargs or {})
        view = not operator._schema.is_mutable and any(r.alias_info for r in operator._schema.returns)
        if not view and not name.startswith("empty") and name not in ("detach", "_reshape_alias"):
            self.names.append(name)
            self.sizes.append(sum(x.nbytes for x in tree_leaves(returned) if isinstance(x, torch.Tensor)))
        return returned


def count(env_id: str) -> dict:
    """What an environment step launches: by region, and outside of regions, within the CUDA graph of a step.

    bytes: of each launch, for one environment. fallbacks: launches of PyTorch's own kernels. registers: of the kernel
    of a region with the most loads and stores; of the physics the most of all kernels."""
    found, now, results, counting = [], [""], {}, False

    def make_call(graph, source):
        integers = lambda sizes: [int(size) for size in sizes]
        outputs = [(integers(x.get_size()), integers(x.get_stride()), x.get_dtype()) for x in graph.graph_outputs]
        record = dict(region=now[0], calls=0, source=source)
        found.append(record)

        def call(arguments):
            arguments.clear()
            record["calls"] += 1
            return [torch.empty_strided(size, stride, dtype=dtype).zero_() for size, stride, dtype in outputs]

        return call

    def watch(name, function):
        def region(*arguments):
            now[0] = name
            if not counting:
                results[name] = function(*arguments)
            return results[name]

        return region

    compile_for_cuda(make_call)
    vecsim.Code = CountedCode
    env = make_environment(env_id, True)
    physics = {name: function for name, function in vars(env._run).items() if hasattr(function, "codes")}
    watched = {name: watch(name, function) for name, function in vars(env._run).items() if name != "physics"}
    vars(env._run).update(watched)
    action = torch.zeros(env.model.nu, ENVIRONMENTS)
    with torch.no_grad():
        env._step_chunks(action)
        counting = True
        with Operators() as operators:
            env._step_chunks(action)
    regions = []
    for name, function in physics.items():
        for code in function.codes.values():
            regions.append(dict(region=name) | code.record | dict(registers=most_registers(name, code)))
    for record in found:
        source = record.pop("source")
        kernels = kernels_of(source)
        launched = ["".join(pair) for pair in launches_of(source)]
        sizes = [number(kernels.get(name, ""), "kernel_num_gb") * 1e9 / ENVIRONMENTS for name in launched]
        record["bytes"] = [round(size, 1) for size in sizes]
        record["fallbacks"] = [name for name in launched if name not in kernels]
        heaviest = max(kernels, key=lambda name: number(kernels[name], "num_load") + number(kernels[name], "num_store"))
        record["registers"] = registers(heaviest, kernels[heaviest])
    return dict(env_id=env_id, frame_skip=env.task.frame_skip, regions=regions + found, outside=len(operators.names))


# ----------------------------------------------------------------------------------------------------------------------
# Emulation: Triton's interpreter for the kernels of PyTorch, g++ for those of the physics
# ----------------------------------------------------------------------------------------------------------------------


def through_numpy(function, boolean: bool = False):
    """A function of CUDA's library of mathematics, which the interpreter lacks."""
    from triton import language
    from triton.runtime.interpreter import TensorHandle

    def call(*inputs):
        first, output = inputs[0], function(*(np.asarray(x.handle.data) for x in inputs))
        if boolean:
            kind = first.type.with_element_ty(language.int1) if first.type.is_block() else language.int1
            return language.core.tensor(TensorHandle(output.astype(np.bool_), language.int1), kind)
        handle = TensorHandle(output.astype(first.handle.data.dtype), first.handle.dtype)
        return language.core.tensor(handle, first.type)

    return staticmethod(call)


def load_kernel(name: str, source: str, launched: Counter):
    """An object whose `run` runs this kernel in the interpreter."""
    head, body = source[: source.index("@triton_heuristics")], source[source.index("@triton.jit") :]
    loaded = load_source(f"{head}\n{body}")
    names = dict(rsqrt=lambda x: 1 / np.sqrt(x), sqrt=np.sqrt, exp=np.exp, hypot=np.hypot, tanh=np.tanh)
    library = {key: through_numpy(function) for key, function in names.items()}
    library |= {key: through_numpy(getattr(np, key), boolean=True) for key in ("isnan", "isinf")}
    loaded["libdevice"], function = type("Libdevice", (), library), loaded["kernel"]
    arguments = re.search(r"def triton_\w+\((.*?)\):", body, re.DOTALL)[1]
    rows, columns = (re.search(rf"\b{word} = (\d+)", body) for word in ("xnumel", "r0_numel"))

    def run(*inputs, stream=None, **_):
        launched[name] += 1
        if "'combo_grid_meta'" in source:  # several kernels in one; each has separate blocks
            sizes = [int(x) for x in re.findall(r"'xnumel_\d+': (\d+)", source)]
            inside = re.search(r"XBLOCK: tl.constexpr = (\d+)", body)
            width = int(inside[1]) if inside else 256
            whole = re.findall(r"'no_x_dim_\d+': (\w+)", source)
            parts = [-(-size // (1 if x == "True" else width)) for size, x in zip(sizes, whole, strict=True)]
            grid = sum(parts) if "SequentialCombo" in source else len(parts) * max(parts)
            function[(grid,)](*inputs, **({} if inside else dict(XBLOCK=width)))
            return
        blocks = {"XBLOCK": 64 if columns else 256} if "XBLOCK" in arguments else {}
        if "R0_BLOCK" in arguments:
            blocks["R0_BLOCK"] = 1 << (int(columns[1]) - 1).bit_length()
        function[(-(-int(rows[1]) // blocks.get("XBLOCK", 1)),)](*inputs, **blocks)

    return types.SimpleNamespace(run=run)


def interpreted(source: str, launched: Counter):
    """The `call` of a region's source, on the CPU, with its kernels in the interpreter."""
    replaced = {
        r"from torch\._C import _cuda_getCurrentRawStream.*": "",
        r"async_compile = AsyncCompile\(\)": "async_compile = COMPILE",
        r"torch\.cuda\._DeviceGuard\(0\)": "contextlib.nullcontext()",
        r"torch\.cuda\.set_device\(0\)": "pass",
        r"_empty_strided_cuda\b": "_empty_strided_cpu",
        r"device=device\(type='cuda', index=0\)|device='cuda:0'": "device='cpu'",
    }
    for old, new in replaced.items():
        source = re.sub(old, new, source)
    load = lambda name, kernel, device_str: load_kernel(name, kernel, launched)
    compiler = types.SimpleNamespace(triton=load, wait=lambda scope: None)
    space = dict(get_raw_stream=lambda _: 0, COMPILE=compiler, contextlib=contextlib, __name__="", __file__="")
    exec(source.split("if __name__ ==")[0], space)
    return space["call"] if "call" in space else space["runner"].call


def interpret(env_id: str, steps: int = 2) -> list[dict]:
    """Steps of the interpreted code beside eager steps: the largest difference, relative to 1 + the eager value."""
    launched, found = Counter(), []

    def make_call(graph, source):
        made = []

        def call(arguments):
            if not made:
                made.append(interpreted(source, launched))
            return made[0](arguments)

        return call

    def difference(a, b):
        return float(((a.double() - b.double()).abs() / (1.0 + b.double().abs())).max())

    np.seterr(all="ignore")  # the interpreter divides where a mask then chooses another value
    compile_for_cuda(make_call)
    env, eager = make_environment(env_id, True), make_environment(env_id, False)
    for k in range(steps):
        action = torch.rand(ENVIRONMENTS, env.model.nu, generator=torch.Generator().manual_seed(k)) * 2 - 1
        launched.clear()
        with emulated_cuda.emulated_cuda(launched):
            obs, reward, *ends, _ = env.step(action)
        right_obs, right_reward, *right_ends, _ = eager.step(action)
        pairs = dict(obs=(obs, right_obs), reward=(reward, right_reward))
        pairs |= {name: (getattr(env.state(), name), getattr(eager.state(), name)) for name in ("qpos", "qvel")}
        flags = sum(int((a != b).sum()) for a, b in zip(ends, right_ends, strict=True))
        found.append(dict(launches=launched.total(), flags=flags) | {name: difference(*x) for name, x in pairs.items()})
        env._set_carry(eager._get_carry())
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    pretend_to_have_a_gpu()
    vecsim.on_gpu = lambda device: True
    torch.cuda._utils._get_gpu_rtc_library = find_nvrtc
    print(json.dumps((interpret if INTERPRET else count)(sys.argv[2])))
