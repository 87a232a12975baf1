"""Speed and error of the simulator beside MuJoCo C on the same cores, and whether it can simulate a robot.

    python vecsim_torch.py --check my_robot.xml
    python vecsim_torch.py --env-id Ant-v5

`main` is the command of vecsim_torch.py.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mujoco
import numpy as np
import torch
from mujoco import rollout
from torch import Tensor
from torch.utils.benchmark import Timer

import vecsim_torch as vecsim
from benchmarks import machine

ROUNDS = 5  # of timing each simulator


@dataclass
class BenchmarkArgs:
    """Speed of a task under random actions and error of its accelerations, beside MuJoCo C on the same cores."""

    env_id: str = "Ant-v5"  # task
    num_envs: int = 4096  # environments (>= 1)
    device: str = "auto"  # auto (CUDA where there is a GPU), cpu, cuda or cuda:N
    integrator: Literal["euler", "implicitfast", "rk4"] = "euler"  # of vecsim and of MuJoCo C, whatever the MJCF says
    iterations: int = 4  # Newton iterations of vecsim (>= 1)
    compile: bool = True  # compile the step; on CUDA also capture it as one graph
    threads: int = machine.cpu_cores("")  # CPU threads of vecsim and of MuJoCo C (>= 1)
    seconds: float = 10.0  # how long each simulator is timed in all, after as long a warm-up, s
    json: Path | None = None  # file to write the figures to
    check: Path | None = None  # an MJCF in place of a task: what is supported, error and speed, on one page


def random_actions(env: vecsim.VecSim, generator: torch.Generator) -> Tensor:
    """Actions (N, nu), uniform in the action space."""
    low, high = (x.to(env.device, env.dtype) for x in env.task.action_range(env.model))
    shape = env.num_envs, env.model.nu
    return vecsim.scaled(torch.rand(shape, device=env.device, dtype=env.dtype, generator=generator), (low, high))


def seconds_per_call(args: BenchmarkArgs, *functions: Callable[[], Any]) -> list[float]:
    """Median time of a call of each function, over ROUNDS rounds of repeated calls; waits for the GPU.

    Every round times every function, so that a slow spell of a shared machine meets them all.
    """
    timers = [Timer("function()", globals={"function": function}, num_threads=args.threads) for function in functions]
    seconds = args.seconds / ROUNDS
    rounds = [[timer.blocked_autorange(min_run_time=seconds).median for timer in timers] for _ in range(ROUNDS)]
    return np.median(rounds, axis=0).tolist()


@contextlib.contextmanager
def mujoco_rollout(env: vecsim.VecSim, episode: int, args: BenchmarkArgs) -> Iterator[tuple[Callable[[], Any], int]]:
    """A function that steps robots by mujoco.rollout, and how many physics steps of MuJoCo C it makes.

    64 robots on each thread start anew after `episode` environment steps. Actions are random and drawn beforehand.
    There are no observations and no rewards.
    """
    m, frame_skip, count = copy.deepcopy(env.mj_model), env.task.frame_skip, 64 * args.threads
    m.opt.jacobian = mujoco.mjtJacobian.mjJAC_DENSE  # see `converged`
    m.opt.integrator = getattr(mujoco.mjtIntegrator, f"mjINT_{args.integrator.upper()}")
    data, full = [mujoco.MjData(m) for _ in range(args.threads)], mujoco.mjtState.mjSTATE_FULLPHYSICS
    start = np.empty((1, mujoco.mj_stateSize(m, full)))
    mujoco.mj_getState(m, data[0], start[0], full)
    ctrl = np.random.default_rng(1).uniform(*m.actuator_ctrlrange.T, (count, episode, m.nu)).repeat(frame_skip, axis=1)
    with rollout.Rollout(nthread=args.threads) as pool:
        states, sensors = pool.rollout(m, data, start, ctrl)
        again = functools.partial(pool.rollout, m, data, start, ctrl, state=states, sensordata=sensors)
        yield again, count * episode * frame_skip


@torch.no_grad()
def acceleration_errors(env: vecsim.VecSim, actions: Tensor, iterations: int) -> np.ndarray:
    """Relative error of qacc against converged MuJoCo C, the largest over all dofs: (k,) of the first k <= 512 robots.

    It runs the functions that `env.step` compiled, on a whole chunk of robots in their present states.
    """
    ctrl = env.task.control(env.model, actions.T)
    *state, ctrl = (x[:, env._parts[0]] for x in (*env.state(), ctrl))
    qacc = vecsim.forward(env.model, vecsim.State(*state), ctrl, iterations, env._run).solution.qacc
    *inputs, ours = (x[:, : min(512, env.num_envs)].double().cpu().numpy().T for x in (*state, ctrl, qacc))
    m, exact = converged(env.mj_model), []
    data = mujoco.MjData(m)
    for data.qpos[:], data.qvel[:], data.qacc_warmstart[:], data.ctrl[:] in zip(*inputs, strict=True):
        mujoco.mj_forward(m, data)
        exact.append(data.qacc.copy())
    return np.abs(ours - exact).max(1) / (1 + np.abs(exact).max(1))


def converged(m: mujoco.MjModel) -> mujoco.MjModel:
    """A copy whose solver is Newton's method run to convergence. Every solver has this one solution.

    The Jacobian is dense in every model that serves as a reference: MuJoCo 4.0.0 factorises its sparse Newton matrix
    wrongly (fixed in 4.0.1), and mjJAC_AUTO is sparse from 60 dofs on.
    """
    m = copy.deepcopy(m)
    m.opt.solver, m.opt.jacobian = mujoco.mjtSolver.mjSOL_NEWTON, mujoco.mjtJacobian.mjJAC_DENSE
    m.opt.tolerance, m.opt.iterations, m.opt.ls_iterations = 1e-15, 100, 50
    return m


def benchmark(args: BenchmarkArgs) -> dict[str, Any]:
    """The figures that the command prints and that --json writes."""
    if args.threads < 1 or not 0 < args.seconds < math.inf:
        raise vecsim.InputError(f"threads = {args.threads} and seconds = {args.seconds} must be positive and finite")
    torch.set_num_threads(args.threads)
    device = vecsim.pick_device(args.device)
    options = {"integrator": args.integrator, "iterations": args.iterations, "compile": args.compile}
    env = vecsim.make(args.env_id, args.num_envs, device=device, seed=1, random_initial_ages=True, **options)
    generator = torch.Generator(device).manual_seed(1)
    env.reset(seed=1)
    start = time.perf_counter()
    env.step(random_actions(env, generator))[1].cpu()
    first_step = time.perf_counter() - start

    def step() -> None:
        env.step(random_actions(env, generator))

    seconds_per_call(args, step)  # warms up
    warm = env.pop_statistics()
    # MuJoCo C's robots start anew as often as vecsim's fall.
    episode = min(200, round(warm["episode_length"])) if warm["episodes"] else 200
    with mujoco_rollout(env, episode, args) as (roll, steps_of_mujoco):
        step_seconds, rollout_seconds = seconds_per_call(args, step, roll)
    statistics = env.pop_statistics()
    result = {"env_id": args.env_id, "num_envs": args.num_envs, "threads": args.threads} | options
    result |= {
        "device": str(device),
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else vecsim.cpu_name(),
        "versions": vecsim.versions(),
        "physics_steps_per_second": args.num_envs * env.task.frame_skip / step_seconds,
        "env_steps_per_second": args.num_envs / step_seconds,
        "mujoco_c_physics_steps_per_second": steps_of_mujoco / rollout_seconds,
        "compile_seconds": max(0.0, first_step - step_seconds),
        "invalid": statistics["invalid"],
        "dropped_contacts": statistics["dropped_contacts"],
    }
    if env.model.terrain is None:  # MuJoCo C has no terrain like vecsim's
        actions = random_actions(env, generator)
        errors = {n: float(np.percentile(acceleration_errors(env, actions, n), 99)) for n in (2, 3, 4)}
        result["qacc_error_p99_by_iterations"] = errors
    command = shlex.join(["python", "vecsim_torch.py", *sys.argv[1:]])
    return result | {"command": command, "commit": machine.commit()}


@dataclass(frozen=True)
class AnyRobot(vecsim.Task):
    """A robot without a goal, for --check. Actuators without a ctrlrange get actions from -1 to 1."""

    def observe(self, model, p, sensed):
        return {"qpos": p.qpos, "qvel": p.qvel}

    def reward(self, model, p, sensed, action, velocity):
        return {"reward_none": torch.zeros_like(p.qpos[0])}

    def action_range(self, model):
        ranges = torch.stack((model.ctrl_low[:, 0], model.ctrl_high[:, 0]))
        one = torch.ones_like(ranges[0])
        return tuple(torch.where(ranges.isinf().any(0), torch.stack((-one, one)), ranges))


def random_steps(m: mujoco.MjModel, count: int) -> list[Tensor]:
    """`count` steps of MuJoCo C under random actions: qpos, qvel, warmstart, ctrl before, qpos, qvel after, and (1,
    count) how many constraint rows each has."""
    m, rng, rows = converged(m), np.random.default_rng(1), []
    data, low_high = mujoco.MjData(m), np.where(m.actuator_ctrllimited[:, None], m.actuator_ctrlrange, (-1.0, 1.0)).T
    if m.nkey:
        mujoco.mj_resetDataKeyframe(m, data, 0)
    for _ in range(count):
        data.ctrl[:] = rng.uniform(*low_high)
        before = [x.copy() for x in (data.qpos, data.qvel, data.qacc_warmstart, data.ctrl)]
        mujoco.mj_step(m, data)
        rows.append((*before, data.qpos.copy(), data.qvel.copy(), [data.nefc]))
    return [torch.tensor(np.array(column).T) for column in zip(*rows, strict=True)]


def load_and_step(m: mujoco.MjModel, self_collision: bool = True) -> vecsim.Model:
    """The model. InputError if it cannot be loaded, or not be stepped with the integrator of its MJCF."""
    model = vecsim.load_model(m, self_collision=self_collision)
    rest = torch.zeros(model.nv, 1)
    vecsim.step(model, vecsim.State(model.qpos0, rest, rest), torch.zeros(model.nu, 1))
    return model


def without_self_collision(m: mujoco.MjModel) -> mujoco.MjModel:
    """A copy that MuJoCo simulates as vecsim does with self_collision=False. InputError if contype has too few bits.

    Fixed geoms that the same geoms can touch share a bit of contype, and those geoms have it in conaffinity.
    """
    moves, partners = m.body_treeid[m.geom_bodyid] >= 0, {}
    for pair in vecsim.collision_candidates(m, self_collision=False)[0]:
        fixed, moving = sorted(pair.tolist(), key=lambda g: moves[g])
        partners.setdefault(fixed, set()).add(moving)
    groups = [*dict.fromkeys(map(frozenset, partners.values()))]
    if len(groups) > 31:
        raise vecsim.InputError("no comparison with MuJoCo C: contype has too few bits for the geoms that are fixed")
    m = copy.copy(m)
    m.pair_margin[moves[m.pair_geom1] & moves[m.pair_geom2]] = -1e6  # m: <pair> ignores contype
    m.geom_contype[:] = m.geom_conaffinity[:] = 0
    for fixed, moving in partners.items():
        m.geom_contype[fixed] = 1 << groups.index(frozenset(moving))
        m.geom_conaffinity[[*moving]] |= m.geom_contype[fixed]
    return m


def check(args: BenchmarkArgs) -> int:
    """Print on one page whether this simulator computes an MJCF, its error and its speed. Returns the exit status."""
    m = vecsim.compile_mjcf(args.check)
    kinds = [mujoco.mjtJoint(int(kind)).name.removeprefix("mjJNT_").lower() for kind in m.jnt_type]
    joints = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    print(f"{args.check.name}: {m.nbody - 1} bodies, {m.njnt} joints ({joints}), {m.nu} actuators, {m.ngeom} geoms")
    print(f"nq {m.nq}, nv {m.nv}; a physics step is {1000 * m.opt.timestep:g} ms, {vecsim.integrator_of(m)}")
    problems: dict[str, None] = {}
    enabled = vecsim.without_disabled(m)
    for load in (vecsim.refuse_unsupported, vecsim.build_tree, vecsim.collision_candidates, load_and_step):
        try:
            model = load(enabled)
        except vecsim.InputError as error:
            problems |= dict.fromkeys(getattr(error, "features", [str(error).removeprefix("unsupported: ")]))
    for feature in problems:
        print(f"NOT SUPPORTED: {feature}")
    if problems:
        try:
            model = load_and_step(m, self_collision=False)
        except vecsim.InputError:
            return 1
        print("With --env-kwargs self_collision False it is supported. What follows has no contacts of moving geoms:")
        m = without_self_collision(m)
    free = [m.actuator(k).name or str(k) for k in np.flatnonzero(m.actuator_ctrllimited == 0)]
    if free or not m.nu:
        what = f"give these actuators a ctrlrange: {', '.join(free)}" if free else "it has no actuators"
        print(f"To train it: {what}")
    pairs = f"{len(model.pair_geoms)} pairs of moving geoms, of which {model.pair_slots} are solved at once"
    print(f"Supported. Contacts: {len(model.contact_geom)} with what is fixed, {pairs} (pair_slots)")
    *start, ctrl, qpos, qvel, constraints = random_steps(m, 200)
    constrained = int((constraints > 0).sum())
    print(f"200 random steps of MuJoCo C, {constrained} with constraints; each is done again from its state.")
    print("Error of qpos and qvel after it, median and 99th percentile:")
    worst = {}
    for dtype, iterations in ((torch.float64, 20), *((torch.float32, count) for count in (2, 4, 8, 16))):
        state = vecsim.State(*(x.to(dtype) for x in start))
        model = vecsim.load_model(m, dtype=dtype, self_collision=not problems)
        after, dynamics = vecsim.step(model, state, ctrl.to(dtype), iterations=iterations)
        ours, exact = torch.cat((after.qpos, after.qvel)), torch.cat((qpos, qvel))
        wrong = ((ours - exact).abs() / (1 + exact.abs())).amax(0)
        dropped = int((dynamics.smooth.constraints.dropped > 0).sum())
        note = f"; in {dropped} of them contacts found no slot" if dropped else ""
        worst[iterations] = float(wrong.quantile(0.99))
        print(f"  {dtype}, {iterations} iterations: {wrong.median():.1e}, {worst[iterations]:.1e}{note}")
    enough = next((count for count in (4, 8) if worst[count] <= 3 * worst[16]), 16)
    if constrained < 20:
        print("Too few constraints to tell how many iterations are enough; start a robot where it touches (<keyframe>)")
    elif worst[16] <= 1e-3:
        print(f"Train with --solver-iterations {enough}" + ", the default" * (enough == 4))
    else:
        print("Not even 16 iterations are enough; try a smaller timestep")
    if m.nu:
        print("Speed; compiling takes up to a minute (--no-compile omits it)", flush=True)
        robot = type("CheckedRobot", (AnyRobot,), {"source": lambda self: m, "self_collision": not problems})
        result = benchmark(dataclasses.replace(args, env_id=robot, integrator=vecsim.integrator_of(m)))
        ours, theirs = result["physics_steps_per_second"], result["mujoco_c_physics_steps_per_second"]
        how = "" if args.compile else ", not compiled"
        print(f"  {ours:,.0f} physics steps/s here{how}, {theirs:,.0f} in MuJoCo C", end="; ")
        print(f"{args.num_envs} environments on {result['device']}, {args.threads} CPU threads")
    return 1 if problems else 0


def main() -> None:
    import tyro

    args = tyro.cli(BenchmarkArgs)
    try:
        if args.check:
            sys.exit(check(args))
        print(f"{args.env_id}, {args.num_envs} environments; {vecsim.COMPILING}", flush=True)
        result = benchmark(args)
        text = json.dumps(result, indent=1)
        print(text)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(text + "\n")
    except (vecsim.InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
