"""CUDA graphs emulated on a CPU, for tests on machines without a GPU.

The emulation records the operators that run during a capture. A replay runs them again on the same memory. Four rules
are those of a GPU:

- A capture computes nothing. Memory that it wrote gets its old values back, what it allocated becomes NaN, and the
  random generators do not move.
- A replay runs no Python. Inputs and outputs keep their addresses.
- The host reads nothing during a capture.
- Only generators that are registered draw numbers during a capture.

The emulation knows no streams and never reuses memory.
"""

import contextlib
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

HOST_READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2")


def tensors_in(tree) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def written_tensors(operator, args: tuple, kwargs: dict) -> list[Tensor]:
    """The arguments that an operator writes to, by its schema."""
    values = dict(zip([argument.name for argument in operator._schema.arguments], args, strict=False)) | kwargs
    changed = [a.name for a in operator._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return tensors_in([values.get(name) for name in changed])


class Graph:
    """Stands in for torch.cuda.CUDAGraph."""

    def __init__(self):
        self.operations, self.generators, self.captured, self.replays = [], [], False, 0

    def register_generator_state(self, generator: torch.Generator) -> None:
        self.generators.append(generator)

    @torch.no_grad()
    def replay(self) -> None:
        """Run the recorded operators, then copy new results to the addresses of the capture."""
        if not self.captured:
            raise RuntimeError("this graph was never captured")
        self.replays += 1
        for operator, args, kwargs, results in self.operations:
            for old, new in zip(results, tensors_in(operator(*args, **kwargs)), strict=True):
                if address(old) != address(new):
                    old.copy_(new)


class Capture(TorchDispatchMode):
    """Records operators into a graph, and the values that `undo` writes back."""

    def __init__(self, graph: Graph):
        super().__init__()
        self.graph, self.allocated, self.overwritten = graph, {}, {}  # both by the address of the memory
        self.generators = [*graph.generators, torch.default_generator]
        self.generator_states = [generator.get_state() for generator in self.generators]

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, operator._schema.name.removeprefix("aten::")
        if name in HOST_READS:
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        leaves = tree_leaves((args, kwargs))
        used = {x._cdata for x in leaves if isinstance(x, torch.Generator)}
        if used - {generator._cdata for generator in self.generators}:
            raise RuntimeError(f"{name}: this generator is not registered with the graph")
        for x in written_tensors(operator, args, kwargs):
            if address(x) not in self.allocated and address(x) not in self.overwritten:
                self.overwritten[address(x)] = x.untyped_storage(), x.untyped_storage().clone()
        output = operator(*args, **kwargs)
        inputs, results = {address(x) for x in tensors_in(leaves)}, tensors_in(output)
        self.allocated |= {address(x): x.detach() for x in results if address(x) not in inputs}
        view = all(address(x) in inputs for x in results) and not operator._schema.is_mutable
        if not view and not name.startswith("empty"):  # a view stays valid, and `empty` must not forget at a replay
            recorded = tree_map_only(Tensor, Tensor.detach, (args, kwargs, results))
            self.graph.operations.append((operator, *recorded))
        return output

    def undo(self) -> None:
        for memory, saved in self.overwritten.values():
            memory.copy_(saved)
        for generator, state in zip(self.generators, self.generator_states, strict=True):
            generator.set_state(state)
        for x in self.allocated.values():
            if x.is_floating_point():
                x.fill_(float("nan"))


@contextlib.contextmanager
def capture(graph: Graph, *_, **__):
    """Stands in for torch.cuda.graph."""
    recorder = Capture(graph)
    try:
        with recorder:
            yield
        graph.captured = True
    finally:
        recorder.undo()


@contextlib.contextmanager
def emulated_graphs():
    """Replace the graphs and streams of torch.cuda."""
    names = dict(CUDAGraph=Graph, graph=capture, Stream=mock.Mock, current_stream=mock.Mock())
    names |= dict.fromkeys(("stream", "device"), lambda _: contextlib.nullcontext())
    with mock.patch.multiple(torch.cuda, **names):
        yield
