"""The CUDA kernels of a step on a CPU, for machines without a GPU.

g++ compiles their source. A kernel then runs on tensors of the CPU, one thread after the other.
"""

import contextlib
import ctypes
import re
from collections import Counter
from unittest import mock

import torch

import vecsim_torch as vecsim

# What NVRTC defines and g++ does not.
BEFORE = """
#include <math.h>
#include <string.h>
#define __global__ __attribute__((noinline))
#define __device__
static thread_local struct { int x; } blockIdx, blockDim, threadIdx;
static inline float __int_as_float(int bits) { float x; memcpy(&x, &bits, sizeof x); return x; }
"""
# A function for `build_cpp`: tensors[0] holds the number of blocks, and of threads in a block.
AFTER = """
extern "C" void run(void* const* tensors) {
    const long long* sizes = (const long long*)tensors[0];
    blockDim.x = sizes[1];
    for (blockIdx.x = 0; blockIdx.x < sizes[0]; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < blockDim.x; threadIdx.x++)
            kernel(ARGUMENTS);
}
"""


def addresses(tensors: list[torch.Tensor]) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*[x.data_ptr() for x in tensors])


class Kernel:
    """Stands in for a kernel that torch.cuda has loaded."""

    def __init__(self, source: str, launched: Counter):
        source = source.replace(" void run(", " void kernel(")
        types = re.search(r"void kernel\((.*)\) {", source)[1].split(", ")  # real* __restrict__ y, ...
        pointers = [kind.split(" __restrict__ ")[0] for kind in types]
        arguments = ", ".join(f"({pointer})tensors[{k + 1}]" for k, pointer in enumerate(pointers))
        self.launched = launched
        self.function = vecsim.build_cpp(BEFORE + source + AFTER.replace("ARGUMENTS", arguments))

    def __call__(self, grid: tuple[int, int, int], block: tuple[int, int, int], args: list) -> None:
        assert grid[1:] == block[1:] == (1, 1) and all(x.is_contiguous() for x in args)
        self.launched["kernels"] += 1
        sizes = torch.tensor([grid[0], block[0]])
        self.function(addresses([sizes, *args]))


@contextlib.contextmanager
def emulated_cuda(launched: Counter):
    """Compile functions of a step as for a GPU, but run them on the CPU, where `launched` counts launches."""

    def load_module(source: str, names: list[str]) -> dict[str, Kernel]:
        assert names == ["run"]
        return dict(run=Kernel(source, launched))

    with contextlib.ExitStack() as stack:
        replace = lambda owner, **names: stack.enter_context(mock.patch.multiple(owner, **names))
        replace(vecsim, on_gpu=lambda device: True, nvrtc=lambda source, capability: source)
        replace(torch.cuda, get_device_capability=lambda device=None: (9, 0))
        replace(torch.cuda._utils, _cuda_load_module=load_module)
        yield
