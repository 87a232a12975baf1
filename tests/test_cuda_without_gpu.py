"""What a machine without a GPU can show of the code for GPUs.

- The CUDA kernels of the physics, compiled for the CPU, compute the numbers of eager PyTorch.
- Captured in emulated CUDA graphs, learner and simulator compute the same numbers as without graphs.
- On fake CUDA tensors, which have a shape and a device but no memory, training mixes no devices and the host reads
  nothing.
- JAX translates the training for CUDA, without float64 and without unknown calls.

Each check is tried on faults too. A fault replaces a piece of the source.
"""

import contextlib
import dataclasses
import functools
import re
import subprocess
import sys
from collections import Counter

import emulated_cuda
import emulated_graphs
import fake_cuda
import jax
import numpy as np
import pytest
import torch
from faults import broken
from test_ppo import CLOCKS, assert_same, log_of, state_of

import dqn_gpu_torch as dqn
import ppo_distill_teacher_student as distill
import ppo_gpu_torch as ppo
import ppo_mjx_jax as ppo_jax
import ppo_recurrent_gpu_torch as recurrent
import sac_gpu_torch as sac
import vecsim_torch as vecsim

TESTED = "2.9", "2.11", "2.13", "2.15"
needs_tested_torch = pytest.mark.skipif(
    not torch.__version__.startswith(tuple(f"{version}." for version in TESTED)),
    reason=f"relies on private names of PyTorch {', '.join(TESTED)}",
)

# ----------------------------------------------------------------------------------------------------------------------
# Emulated CUDA kernels
# ----------------------------------------------------------------------------------------------------------------------

# A capsule with an arm, on the ground and at the arm's limit.
CAPSULE = """<mujoco><option timestep=".004"/><worldbody><geom type="plane" size="9 9 1"/>
  <body pos="0 0 .3"><freejoint/><geom type="capsule" size=".05 .1"/>
    <body pos="0 0 .1"><joint name="arm" axis="0 1 0" range="-2 60" limited="true" damping=".1"/>
      <geom type="capsule" size=".04" fromto="0 0 0 .2 0 0"/></body>
  </body></worldbody><actuator><motor joint="arm" gear="5" ctrlrange="-1 1" ctrllimited="true"/></actuator></mujoco>"""
ROBOTS = 40  # more than a block, and no multiple of it
TOLERANCES = {torch.float32: 2e-4, torch.float64: 1e-11}  # rounding, times the condition of the contact problem
PIECES = {  # operations of a kernel, and the functions that are several kernels then
    "pendulum": (50, {"begin_dynamics", "newton_iteration"}),
    "capsule": (300, {"begin_dynamics", "newton_iteration", "advance"}),
}


@contextlib.contextmanager
def emulated(monkeypatch, robot: str):
    """Compile small kernels and emulate them. Yields a Counter of launches."""
    launched, empty = Counter(), torch.empty

    def forgetful(*size, **kind):
        """torch.empty, whose memory may hold old results that are right."""
        return empty(*size, **kind).fill_(float("nan") if kind["dtype"].is_floating_point else -1)

    with emulated_cuda.emulated_cuda(launched), monkeypatch.context() as patch:
        patch.setattr(vecsim, "KERNEL", PIECES[robot][0])
        patch.setattr(torch, "empty", forgetful)
        yield launched


@functools.cache
def start_of(robot: str, dtype: torch.dtype) -> tuple[vecsim.Model, vecsim.State, torch.Tensor]:
    """A model, states and controls. The tensors are transposed, so a kernel cannot read them as they are."""
    source = CAPSULE if robot == "capsule" else vecsim.InvertedPendulum().source()
    model, generator = vecsim.load_model(vecsim.compile_mjcf(source), dtype=dtype), torch.Generator().manual_seed(0)
    qpos, qvel, warmstart, ctrl = (
        2 * torch.rand(ROBOTS, rows, generator=generator, dtype=dtype).T - 1
        for rows in (model.nq, model.nv, model.nv, model.nu)
    )
    qpos = model.qpos0 + 0.1 * qpos
    if robot == "capsule":
        qpos[2] -= 0.2  # so its lower end is within 10 cm of the ground's surface
    return model, vecsim.State(qpos, qvel, warmstart), ctrl


def two_steps(robot: str, dtype: torch.dtype, integrator: str, run: vecsim.Regions) -> tuple:
    """The state after two steps, and the dynamics of the second one."""
    model, state, ctrl = start_of(robot, dtype)
    with torch.no_grad():
        for _ in range(2):
            state, dynamics = vecsim.step(model, state, ctrl, integrator, 2, run)
    return state, dynamics


def assert_emulation_is_exact(robot: str, dtype: torch.dtype, integrator: str, run: vecsim.Regions) -> None:
    """`run` computes what eager PyTorch does: every tensor of the state and of the dynamics."""
    found = vecsim.named_tensors(two_steps(robot, dtype, integrator, run), "")
    right = vecsim.named_tensors(two_steps(robot, dtype, integrator, vecsim.EAGER), "")
    for (name, x), (_, exact) in zip(found, right, strict=True):
        wrong = (x - exact.expand_as(x)).abs() / (1 + exact.abs())  # what is the same for all robots may be (..., 1)
        assert (wrong <= TOLERANCES[dtype]).all(), name


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    "robot, integrator", [("pendulum", "euler"), ("pendulum", "rk4"), ("capsule", "euler"), ("capsule", "implicitfast")]
)
def test_the_cuda_kernels_of_the_physics_compute_what_eager_pytorch_does(robot, integrator, dtype, monkeypatch):
    with emulated(monkeypatch, robot) as launched:
        run = vecsim.compile_regions(start_of(robot, dtype)[0])
        assert_emulation_is_exact(robot, dtype, integrator, run)
    codes = {name: code for name, function in vars(run).items() for code in function.codes.values()}
    in_pieces = {name for name, code in codes.items() if len(code.kernels) > 1 and code.scratch["s"] > 0}
    assert in_pieces == PIECES[robot][1] & codes.keys()
    evaluations = 2 * (4 if integrator == "rk4" else 1)  # of the dynamics
    per_evaluation = len(codes["begin_dynamics"].kernels) + 2 * len(codes["newton_iteration"].kernels)
    rest = launched.total() - evaluations * per_evaluation
    assert rest == 2 * (4 if integrator == "rk4" else len(codes["advance"].kernels))
    if robot == "capsule":
        constraints = two_steps(robot, dtype, integrator, vecsim.EAGER)[1]
        active = vecsim.active_weights(constraints.smooth.constraints, constraints.solution)
        assert (active.contact > 0).any() and (active.limit > 0).any()


FAULTS_OF_KERNELS = {  # the owner of a function, its name, a piece of its source, what replaces it
    "a kernel is left out": (
        vecsim.Code, "__call__", "zip(self.launches, self.places, strict=True)",
        "zip(self.launches[:-1], self.places)"),
    "the kernels run in the wrong order": (
        vecsim.Code, "__call__", "zip(self.launches, self.places, strict=True)",
        "zip(self.launches[::-1], self.places[::-1])"),
    "two values share a row of scratch": (
        vecsim, "write_kernels", "(tensor, scratch[tensor])", "(tensor, scratch[tensor] // 2)"),
    "inputs are read as if they were contiguous": (vecsim.Interface, "read", " or not x.is_contiguous()", ""),
    "the last block is not launched": (vecsim.Code, "__call__", "math.ceil(n / BLOCK)", "n // BLOCK"),
    "a thread computes the robot of another": (vecsim, "cuda_source", "+ threadIdx.x", "+ threadIdx.x / 2"),
    "a block computes the robots of another": (vecsim, "cuda_source", "blockIdx.x * blockDim.x + ", ""),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS_OF_KERNELS)
def test_emulated_kernels_show_the_fault(fault, monkeypatch):
    replacement = FAULTS_OF_KERNELS[fault]
    monkeypatch.setattr(*replacement[:2], broken(*replacement))
    with emulated(monkeypatch, "pendulum"), pytest.raises(AssertionError):
        run = vecsim.compile_regions(start_of("pendulum", torch.float64)[0])
        assert_emulation_is_exact("pendulum", torch.float64, "euler", run)


# ----------------------------------------------------------------------------------------------------------------------
# Emulated CUDA graphs
# ----------------------------------------------------------------------------------------------------------------------

SAC = dict(total_timesteps=16 * 12, learning_starts=64, batch_size=32, updates_per_step=4, replay_capacity=512)
RECURRENT = dict(num_steps=8, num_minibatches=4, memory_width=8, total_timesteps=16 * 8 * 3)
DQN = dict(total_timesteps=16 * 24, learning_starts=64, batch_size=32, replay_capacity=512)
DISTILL = dict(
    stages=("teacher", "student", "finetune"), num_steps=4, distill_steps=4, gradient_length=2, distill_minibatches=2,
    num_minibatches=2, total_timesteps=640, student_timesteps=128, finetune_timesteps=192, critic_warmup_iterations=1,
)  # fmt: skip
RUNS = {  # trainer, number of graphs, arguments
    "ppo": (ppo, 5, dict(num_steps=8, num_minibatches=4, total_timesteps=16 * 8 * 3)),
    "ppo-gru": (recurrent, 5, RECURRENT | dict(memory="gru", sequence_length=4)),
    "ppo-mingru": (recurrent, 5, RECURRENT | dict(memory="mingru", memory_layers=2)),
    "sac": (sac, 7, SAC | dict(n_step=3, normalize_rewards=True)),
    "sac-flash": (sac, 7, SAC | dict(network="flash", half_precision_replay=True)),
    "dqn": (dqn, 5, DQN | dict(algorithm="dqn", updates=4)),
    "pqn": (dqn, 5, DQN | dict(algorithm="pqn", num_steps=8)),
    "distill": (distill, 1 + 5 + 4 + 5, DISTILL),
    "distill-gru": (distill, 1 + 5 + 4 + 5, DISTILL | dict(student_network="gru")),
}


def train(name: str, folder, **changes) -> dict:
    """Checkpoint and log of a run in the simulator, without the clocks."""
    module, _, args = RUNS[name]
    common = dict(env_id="InvertedPendulum-v5", num_envs=16, solver_iterations=1, device="cpu", eval_episodes=0)
    common |= dict(seed=3, run_dir=str(folder))
    module.train(module.Args(**common | args | changes))
    runs = [folder / stage for stage in args.get("stages", [""])]
    log = [{name: x for name, x in record.items() if name not in CLOCKS} for run in runs for record in log_of(run)]
    return dict(checkpoints=[state_of(run) for run in runs], log=log)


@pytest.fixture(scope="module")
def plain_runs(tmp_path_factory):
    """The runs without graphs."""
    return {name: train(name, tmp_path_factory.mktemp(name), compile=False) for name in RUNS}


@contextlib.contextmanager
def captured(monkeypatch, captures: bool = True, compile=lambda function, **_: function):
    """Capture on the CPU what a GPU captures, in emulated graphs; nothing is compiled. Yields the list of graphs."""
    graphs = []

    def new_graph() -> emulated_graphs.Graph:
        graphs.append(emulated_graphs.Graph())
        return graphs[-1]

    def regions(model: vecsim.Model) -> vecsim.Regions:
        return vecsim.Regions(**{name: compile(function) for name, function in vars(vecsim.EAGER).items()})

    with emulated_graphs.emulated_graphs(), monkeypatch.context() as patch:
        patch.setattr(vecsim, "on_gpu", lambda device: captures)
        patch.setattr(torch, "compile", compile)
        patch.setattr(vecsim, "compile_regions", regions)
        patch.setattr(torch.cuda, "CUDAGraph", new_graph)
        yield graphs


@pytest.mark.slow
@needs_tested_torch
@pytest.mark.parametrize("name", RUNS)
def test_a_captured_run_is_the_plain_run_bit_for_bit(name, plain_runs, monkeypatch, tmp_path):
    """Learner and simulator are captured. Warm-up and capture leave no trace."""
    with captured(monkeypatch) as graphs:
        assert_same(train(name, tmp_path), plain_runs[name])
    assert len(graphs) == RUNS[name][1] and all(graph.replays > 0 for graph in graphs)


WRONG_NUMBERS = {  # the run that must notice it, the owner of a function, its name, a piece of its source, a fault
    "inputs are not copied": ("ppo", vecsim, "capture", "static.copy_(x)", "pass"),
    "PPO's state is not restored": ("ppo", vecsim, "prepare", "x.copy_(saved)", "pass"),
    "the state of PPO with a memory is not restored": ("ppo-gru", vecsim, "prepare", "x.copy_(saved)", "pass"),
    "SAC's state is not restored": ("sac", vecsim, "prepare", "x.copy_(saved)", "pass"),
    "DQN's state is not restored": ("dqn", vecsim, "prepare", "x.copy_(saved)", "pass"),
    "the distillation's state is not restored": ("distill", vecsim, "prepare", "x.copy_(saved)", "pass"),
    "observation statistics move to another address": (
        "ppo", ppo.RunningStatistics, "update", "self.mean += shift", "self.mean = self.mean + shift"),
    "the simulator's state moves to another address": (
        "ppo", vecsim.VecSim, "_set_carry", "if not self._carries:", "if True:"),
}  # fmt: skip
REFUSALS = {  # the same, and what the capture says
    "the host reads during the capture": (
        "not permitted when stream is capturing",
        "ppo", ppo, "apply_gradients", "optimizer.step()", "optimizer.step(), agent.log_std[0].item()"),
    "a generator is not registered": (
        "this generator is not registered",
        "ppo", vecsim, "capture", "graph.register_generator_state(generator)", "pass"),
}  # fmt: skip
OF_A_STEP = {  # a method of VecSim, a piece of its source, and a fault
    "the warm-up leaves its state": ("load_state_dict", "self._set_carry(", "id("),  # does nothing
    "the warm-up leaves its statistics": ("load_state_dict", 'self._statistics.copy_(state["statistics"])', "pass"),
    "the warm-up leaves its random generators": ("load_state_dict", "generator.set_state(theirs)", "pass"),
    "the next step overwrites results": ("_step", "copy = torch.clone", "copy = lambda x: x"),
}  # fmt: skip


@pytest.mark.slow
@needs_tested_torch
@pytest.mark.parametrize("fault", WRONG_NUMBERS)
def test_a_captured_run_shows_wrong_numbers(fault, plain_runs, monkeypatch, tmp_path):
    name, *replacement = WRONG_NUMBERS[fault]  # replacement: owner, function, right, wrong
    monkeypatch.setattr(*replacement[:2], broken(*replacement))
    with captured(monkeypatch):
        result = train(name, tmp_path)
    with pytest.raises(AssertionError):
        assert_same(result, plain_runs[name])


@needs_tested_torch
@pytest.mark.parametrize("fault", REFUSALS)
def test_a_capture_refuses_the_fault(fault, monkeypatch, tmp_path):
    message, name, *replacement = REFUSALS[fault]
    monkeypatch.setattr(*replacement[:2], broken(*replacement))
    with pytest.raises(RuntimeError, match=message), captured(monkeypatch):
        train(name, tmp_path)


def steps_of(env: vecsim.VecSim, count: int) -> list:
    """Results of some steps with growing actions, and the statistics."""
    actions = torch.linspace(-1, 1, env.num_envs)[:, None]
    results = []
    for k in range(count):
        *answer, info = env.step(k * actions)
        results += [*answer, info["final_obs"], info["invalid"], env.state().qpos]
    return [*results, env._statistics]


def make_env() -> vecsim.VecSim:
    """Two chunks, with both random generators, automatic resets and delayed actions."""
    options = dict(integrator="euler", iterations=1, chunk=4, max_episode_steps=3, random_initial_ages=True)
    options |= dict(randomize={"mass": 0.2}, observation_noise=0.1, action_delay_ms=40.0)
    env = vecsim.make("InvertedPendulum-v5", 6, compile=True, seed=2, **options)
    env.reset()
    return env


@pytest.fixture(scope="module")
def right_steps():
    """Three steps without graphs and compilation."""
    with captured(pytest.MonkeyPatch(), captures=False):
        return steps_of(make_env(), 3)


@needs_tested_torch
def test_a_captured_simulator_steps_resets_and_loads_like_the_plain_one(monkeypatch):
    def story(captures: bool) -> list:
        with captured(monkeypatch, captures) as graphs:
            env = make_env()
            results = steps_of(env, 4)
            saved = env.state_dict()
            results += [env.reset(seed=9)[0], *steps_of(env, 4)]
            env.load_state_dict(saved)
            results += steps_of(env, 4)
            assert [graph.replays for graph in graphs] == [12] * captures
        return results

    assert_same(story(True), story(False))


@needs_tested_torch
@pytest.mark.parametrize("fault", OF_A_STEP)
def test_a_captured_step_shows_the_fault(fault, right_steps, monkeypatch):
    with captured(monkeypatch):
        replacement = OF_A_STEP[fault]
        monkeypatch.setattr(vecsim.VecSim, replacement[0], broken(vecsim.VecSim, *replacement))
        wrong = steps_of(make_env(), 3)
    with pytest.raises(AssertionError):
        assert_same(wrong, right_steps)


@needs_tested_torch
def test_a_replay_leaves_the_callers_actions_alone(monkeypatch):
    """With one actuator the transposed actions are no copy by themselves."""
    with captured(monkeypatch):
        env, first = make_env(), torch.ones(6, 1)
        env.step(first), env.step(-first)
    assert torch.equal(first, torch.ones(6, 1))


@needs_tested_torch
def test_a_step_after_a_failed_capture_captures_again(right_steps, monkeypatch):
    """The failed capture leaves no empty graph."""
    with captured(monkeypatch):
        env = make_env()
        with monkeypatch.context() as patch:
            read = broken(vecsim.VecSim, "_step_chunks", "return t\n", "return t.obs[0, 0].item()\n")
            patch.setattr(vecsim.VecSim, "_step_chunks", read)
            with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
                env.step(torch.zeros(6, 1))
        assert_same(steps_of(env, 3), right_steps)


@pytest.mark.slow
@needs_tested_torch
@pytest.mark.parametrize("replayed", [True, False])
@pytest.mark.parametrize("name", ["ppo", "ppo-gru", "distill"])
def test_the_gradients_exist_before_the_step_that_uses_them_is_captured(name, replayed, monkeypatch, tmp_path):
    """A capture computes nothing: without a replay the warm-up of the step would see arbitrary memory."""
    module = RUNS[name][0]
    seen, apply_gradients = [], module.apply_gradients

    def watching(agent, *others):
        seen.append(torch.stack([x.grad.isfinite().all() for x in agent.parameters()]).all())
        apply_gradients(agent, *others)

    monkeypatch.setattr(module, "apply_gradients", watching)
    if not replayed:
        monkeypatch.setattr(vecsim, "prepare", broken(vecsim, "prepare", "prepared[-1](*example)", "pass"))
    with captured(monkeypatch):
        train(name, tmp_path)
    assert all(seen) == replayed


@needs_tested_torch
@pytest.mark.parametrize("name", ["ppo", "sac", "distill"])
def test_a_failed_compilation_is_not_a_failed_capture(name, monkeypatch, tmp_path):
    """It shows before any graph, in its own words."""

    def fails(*inputs):
        raise RuntimeError("no compiler here")

    with captured(monkeypatch, compile=lambda function, **_: fails) as graphs:
        with pytest.raises(RuntimeError, match="^no compiler here$"):
            train(name, tmp_path)
    assert not graphs


@needs_tested_torch
def test_kernels_that_do_not_compile_are_not_a_failed_capture(monkeypatch):
    def fails(source, capability):
        raise RuntimeError("no NVRTC here")

    compile_regions = vecsim.compile_regions
    with captured(monkeypatch) as graphs, emulated_cuda.emulated_cuda(Counter()), monkeypatch.context() as patch:
        patch.setattr(vecsim, "compile_regions", compile_regions)
        patch.setattr(vecsim, "nvrtc", fails)
        env = make_env()
        with pytest.raises(RuntimeError, match="^no NVRTC here$"):
            env.step(torch.zeros(6, 1))
    assert not graphs


def test_chunks_on_a_gpu_are_smaller_than_what_spills_registers():
    """The device is only a name here: nothing runs on it."""
    env = vecsim.make("InvertedPendulum-v5", 20_000)
    env.device = torch.device("cuda")
    env._prepare_chunks(None)
    assert [part.stop - part.start for part in env._parts] == [6667, 6667, 6666]


def test_a_gpu_without_compilation_is_told_to_be_slow(monkeypatch, capsys):
    monkeypatch.setattr(vecsim, "on_gpu", lambda device: True)
    vecsim.make("InvertedPendulum-v5", 2, compile=False)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "very slow" in said


# ----------------------------------------------------------------------------------------------------------------------
# Fake CUDA tensors
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_fake_cuda(tmp_path_factory):
    """on_fake_cuda(a run or a fault of fake_cuda.py) -> its answer, from a process that believes in CUDA."""
    if torch.version.cuda:
        pytest.skip("fake CUDA tensors need a build of PyTorch for CPUs")
    guard, pipes = fake_cuda.build_guard(tmp_path_factory.mktemp("guard")), dict(stdin=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, fake_cuda.__file__, guard], stdout=subprocess.PIPE, **pipes) as process:

        def ask(job: str) -> str:
            print(job, file=process.stdin, flush=True)
            return process.stdout.readline()

        yield ask
        process.stdin.close()


@pytest.mark.slow
@needs_tested_torch
@pytest.mark.parametrize("name", fake_cuda.RUNS)
def test_training_stays_on_the_gpu(name, on_fake_cuda):
    """No operator gets tensors of two devices, and the host reads nothing."""
    assert "operators in training" in on_fake_cuda(name)


@pytest.mark.slow
@needs_tested_torch
@pytest.mark.parametrize("fault", fake_cuda.FAULTS)
def test_fake_tensors_show_the_fault(fault, on_fake_cuda):
    shown = on_fake_cuda(fault)
    assert re.search("CPU and CUDA are mixed|the host reads a tensor|found at least two devices", shown), shown


# ----------------------------------------------------------------------------------------------------------------------
# JAX
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_jax_translates_the_training_for_cuda(tmp_path):
    """The iterations of a training run, as `train` compiles them. Nothing computes in float64."""
    sizes = dict(num_envs=64, num_steps=4, num_minibatches=2, total_timesteps=1024)
    args = dataclasses.replace(ppo_jax.task_defaults("Ant-v5"), run_dir=str(tmp_path), **sizes)
    ppo_jax.configure(args)
    setup = ppo_jax.make_setup(ppo_jax.make_environment(ppo_jax.make_task(args)), args, jax.devices("cpu"))
    hyper, seeds = ppo_jax.hyperparameters(args)
    state = jax.eval_shape(jax.vmap(functools.partial(ppo_jax.initialise, setup)), hyper, seeds)
    run = jax.jit(jax.vmap(functools.partial(ppo_jax.advance, setup), in_axes=(0, 0, None)))
    text = run.trace(hyper, state, np.int32(1)).lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.while" in text and "f64" not in text
    assert set(re.findall(r"custom_call @(\w+)", text)) <= {"cusolver_potrf_ffi", "AllocateBuffer"}
