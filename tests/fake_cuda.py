"""Train on fake CUDA tensors, which have a shape, a dtype and a device but no memory. Needs no GPU.

    echo ppo | python tests/fake_cuda.py GUARD      # GUARD: a library that build_guard has built

Reads names of RUNS or FAULTS, one a line, and answers each with a line: how many operators ran in the training, or the
error. It is an error if a GPU would be slow or fail during training: the host reads a number, or an operator gets
tensors of two devices. Around the training both are legal; numbers that are read there are invented.

A process that runs this believes in CUDA until it ends, because functions of PyTorch are replaced for good.
"""

import contextlib
import ctypes
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

# A CPU build of PyTorch has no guard for CUDA devices, which fake tensors need, and says that it has no accelerator,
# which stops autograd. This library registers both. It must be loaded before PyTorch is imported.
GUARD = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>
namespace { C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::FakeGuardImpl<c10::DeviceType::CUDA>) }
namespace at { namespace {
struct FakeHooks final : CUDAHooksInterface {
  explicit FakeHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex deviceCount() const override { return 1; }
};
RegistererCUDAHooksRegistry fake("CUDAHooks", CUDAHooksRegistry(),
    RegistererCUDAHooksRegistry::DefaultCreator<FakeHooks>, "fake");
} }
"""


def build_guard(folder: Path) -> Path:
    """Compile the library, which takes a few seconds."""
    torch_folder = Path(importlib.util.find_spec("torch").origin).parent
    source, library = folder / "guard.cpp", folder / "guard.so"
    source.write_text(GUARD)
    flags = f"-shared -fPIC -std=c++20 -O0 -I{torch_folder}/include -L{torch_folder}/lib -lc10 -ltorch_cpu"
    subprocess.run(["g++", source, *flags.split(), f"-Wl,-rpath,{torch_folder}/lib", "-o", library], check=True)
    return library


if __name__ == "__main__":
    ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from faults import broken
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dqn_gpu_torch as dqn
import ppo_distill_teacher_student as distill
import ppo_gpu_torch as ppo
import ppo_recurrent_gpu_torch as recurrent
import sac_gpu_torch as sac
import vecsim_torch as vecsim

RECURRENT = dict(num_envs=64, num_steps=2, num_minibatches=2, total_timesteps=256)
SAC = dict(num_envs=64, total_timesteps=7 * 64, learning_starts=128, batch_size=64, replay_capacity=1024)
SMALL = dict(batch_size=64, learning_starts=0)
SHORT = dict(num_envs=8, num_steps=1, num_minibatches=1, total_timesteps=8)
DISTILL = dict(
    env_id="tasks/reacher.py:Reacher", num_envs=16, stages=("teacher", "student", "finetune"), num_steps=2,
    distill_steps=2, gradient_length=1, distill_minibatches=2, num_minibatches=2, total_timesteps=192,
    student_timesteps=64, finetune_timesteps=64, critic_warmup_iterations=1,
)  # fmt: skip
RUNS = {  # trainer, iterations (of each stage), arguments
    "ppo": (ppo, 2, dict(num_envs=64, num_steps=2, num_minibatches=2, total_timesteps=256, bf16=True)),
    "ppo-lstm": (recurrent, 2, RECURRENT | dict(memory="lstm", bf16=True)),
    "sac": (sac, 7, SAC | dict(n_step=3, normalize_rewards=True, bf16=True)),
    "sac-flash": (sac, 7, SAC | dict(network="flash", half_precision_replay=True, noise_repeat_max=1)),
    "dqn": (dqn, 7, dict(num_envs=64, total_timesteps=7 * 64, learning_starts=128, batch_size=64, bf16=True)),
    "pqn": (dqn, 2, dict(algorithm="pqn", num_envs=64, num_steps=2, total_timesteps=256, bf16=True, **SMALL)),
    "distill": (distill, 2, DISTILL),
    "distill-gru": (distill, 2, DISTILL | dict(student_network="gru")),
    "rough": (ppo, 1, SHORT | dict(env_id="Quadruped-Rough")),
    "humanoid": (ppo, 1, SHORT | dict(env_id="Humanoid-v5")),
    "rk4": (
        ppo, 1, SHORT | dict(env_id="Hopper-v5", integrator="rk4",
        env_kwargs={"randomize": True, "action_delay_ms": 10.0, "observation_noise": 0.1})),
}  # fmt: skip


FAULTS = {  # the run that must stop, the owner of a function, its name, a piece of its source, what replaces it
    "the update reads a number": ("ppo", ppo, "update", "total += terms", "total += terms[0].item() + terms"),
    "the update makes a tensor on the host": (
        "ppo", ppo, "update", "device=old_log_std.device", "device='cpu'"),
    "the loss takes a constant from the host": (
        "ppo", ppo, "gaussian_log_prob", "math.log(2.0 * math.pi)", "torch.tensor(2.0 * math.pi).log()"),
    "the simulator asks whether an episode ended": (
        "ppo", vecsim.VecSim, "_step_chunks", "t = transitions[0]", "t = transitions[0]; bool(t.truncated.any())"),
    "the actor indexes by a mask": (
        "sac", sac, "hold_noise", "torch.where(over, duration, remaining) - 1", "remaining[over]"),
}  # fmt: skip


class Watch(TorchDispatchMode):
    """Sees every operator. `training`: from the first iteration on, until the last one logs and saves."""

    def __init__(self):
        super().__init__()
        self.training, self.operators = False, 0  # operators: how many ran during training

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, operator._schema.name.removeprefix("aten::")
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_cuda = any(x.device.type == "cuda" for x in inputs)
        self.operators += self.training
        if on_cuda and self.reads(name, inputs):
            if self.training:
                raise RuntimeError(f"the host reads a tensor: {name}")
            if name == "_local_scalar_dense":
                return 1  # true, where an optimizer checks its learning rate
            return torch.empty(0, inputs[0].ndim, dtype=torch.long, device="cuda")
        if name in WITHOUT_META_KERNEL:
            output = WITHOUT_META_KERNEL[name](*args)
        else:
            output = operator(*args, **kwargs)
        outputs = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
        if self.training and len({x.device.type for x in inputs + outputs}) > 1:
            raise RuntimeError(f"CPU and CUDA are mixed: {name}")
        return output

    @staticmethod
    def reads(name: str, inputs: list[Tensor]) -> bool:
        """Whether the host waits for the values: numbers, and shapes that depend on them."""
        by_mask = name == "index" and any(x.dtype == torch.bool for x in inputs[1:])
        return by_mask or name in ("_local_scalar_dense", "equal", "nonzero", "masked_select")


def gru_forward(inputs: Tensor, hidden: Tensor, state: Tensor, *biases: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(state), state.new_empty(5 * state.numel())


def gru_backward(gradient: Tensor, workspace: Tensor, has_bias: bool) -> tuple[Tensor, ...]:
    batch, size = gradient.shape
    gates = [gradient.new_empty(batch, 3 * size) for _ in range(2)]
    return *gates, torch.empty_like(gradient), *(gradient.new_empty(3 * size) for _ in range(2))


WITHOUT_META_KERNEL = {  # operators that PyTorch cannot run on fake tensors: the shapes of their outputs
    "_fused_adam_": lambda *_: None,
    "_thnn_fused_gru_cell": gru_forward,
    "_thnn_fused_gru_cell_backward": gru_backward,
}


class Generator(torch.Generator):
    """A CPU build has none for CUDA."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")

    @property
    def device(self):
        return torch.device("cuda", 0)

    def get_state(self):
        return torch.zeros(16, dtype=torch.uint8)

    def set_state(self, state):
        assert state.device.type == "cpu"


class Graph:
    def register_generator_state(self, generator) -> None:
        pass

    def replay(self) -> None:
        pass


def move(module: nn.Module, device) -> nn.Module:
    """nn.Module.to cannot replace fake tensors."""
    for part in module.modules():
        for name, x in part._parameters.items():
            part._parameters[name] = None if x is None else nn.Parameter(x.detach().to(device), x.requires_grad)
        for name, x in part._buffers.items():
            part._buffers[name] = None if x is None else x.to(device)
    return module


def deepcopy(x: FakeTensor, memo: dict) -> Tensor:
    """FakeTensor would copy its mode too."""
    copied = x.detach().clone()
    return nn.Parameter(copied, x.requires_grad) if isinstance(x, nn.Parameter) else copied


@contextlib.contextmanager
def fake_cuda():
    """Everything of CUDA that the project uses, without a GPU. Yields the Watch."""
    watch, mode = Watch(), FakeTensorMode()

    @contextlib.contextmanager
    def capture(graph):
        before, watch.training = watch.training, True
        yield
        watch.training = before

    FakeTensorMode.avoid_device_init = property(lambda self: True)
    FakeTensor.__deepcopy__ = deepcopy
    fake_tensor.init_gpu_context = lambda device: None
    torch.Generator, torch.compile, nn.Module.to = Generator, lambda function, **_: function, move
    vecsim.compile_regions = lambda model: vecsim.EAGER
    vecsim.check_independence = lambda many, one: None  # a fake tensor has no values
    Tensor.numpy = lambda x: np.zeros(x.shape, str(x.dtype).removeprefix("torch."))
    replaced = dict(CUDAGraph=Graph, graph=capture, Stream=mock.Mock, current_stream=mock.Mock())
    replaced |= dict.fromkeys(("stream", "device"), lambda _: contextlib.nullcontext())
    replaced |= dict.fromkeys(("is_available", "is_initialized", "is_bf16_supported"), lambda *_: True)
    replaced |= dict.fromkeys(("_lazy_init", "set_device", "synchronize"), lambda *_: None)
    replaced |= dict(device_count=lambda: 1, current_device=lambda: 0)
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
    with mode, watch:
        yield watch


def train(name: str, folder: str) -> str:
    module, iterations, args = RUNS[name]

    class Stop(vecsim.StopSignals):
        """Tells the watch when training begins and ends."""

        @property
        def phase(self) -> str:
            return self.now

        @phase.setter
        def phase(self, value: str) -> None:
            self.now, self.left = value, iterations
            watch.training = value == "during training"

        def requested(self) -> bool:
            self.left -= 1
            watch.training = self.left > 0
            return False

    rare = dict(log_every=10**9, checkpoint_every=10**9, eval_episodes=0)
    with fake_cuda() as watch:
        vecsim.save_checkpoint = lambda path, checkpoint: None
        common = dict(env_id="InvertedPendulum-v5", device="cuda", run_dir=f"{folder}/run", solver_iterations=1)
        env_kwargs = {"frame_skip": 1} | args.get("env_kwargs", {})
        module.train(module.Args(**common | rare | args | dict(env_kwargs=env_kwargs)), stop=Stop())
    return f"{watch.operators:,} operators in training"


def answer(job: str) -> str:
    """Train a run of RUNS, or the run of a fault with this fault."""
    run, owner, function, *replacement = FAULTS.get(job, (job, ppo, "train"))
    right = getattr(owner, function)
    if replacement:
        setattr(owner, function, broken(owner, function, *replacement))
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            return train(run, folder)
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())
    finally:
        setattr(owner, function, right)


if __name__ == "__main__":
    for line in sys.stdin:
        print(answer(line.strip()), flush=True)
