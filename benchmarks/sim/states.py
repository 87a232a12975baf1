"""Where every simulator of `sim` starts, and the test states of its error: both from MuJoCo C under random actions.

All engines have the same integrator, timestep and solver iterations. Random actions are held for one environment step;
every robot starts again after 200 environment steps, standing or lying. The 512 start states are 1 to 200 environment
steps into an episode, so that even a short window has the contacts of a whole episode.
"""

from __future__ import annotations

from pathlib import Path

import gymnasium
import mujoco
import numpy as np

from benchmarks.simulator import converged

POOL, EPISODE, OF_EACH_EPISODE, TESTS = 512, 200, 8, 256
ITERATIONS, LS_ITERATIONS = 4, 8


def settings(env_id: str, device: str, num_envs: int) -> dict:
    """The settings of a `sim` comparison."""
    env = gymnasium.make(env_id).unwrapped
    timing = dict(integrator="euler", timestep=env.model.opt.timestep)
    solver = dict(solver="newton", iterations=ITERATIONS, ls_iterations=LS_ITERATIONS)
    settings = dict(env_id=env_id, device=device, num_envs=num_envs) | timing | solver
    return settings | dict(frame_skip=env.frame_skip, starts="mid-episode")


def start_states(model: mujoco.MjModel, frame_skip: int, rng: np.random.Generator) -> list[tuple]:
    """POOL pairs of qpos and qvel from random moments of random episodes."""
    data, (low, high), starts = mujoco.MjData(model), model.actuator_ctrlrange.T, []
    while len(starts) < POOL:
        mujoco.mj_resetData(model, data)
        data.qpos += rng.uniform(-0.1, 0.1, model.nq)
        moments = set(1 + rng.permutation(EPISODE)[:OF_EACH_EPISODE])
        for step in range(1, EPISODE + 1):
            data.ctrl = rng.uniform(low, high)
            mujoco.mj_step(model, data, frame_skip)
            if step in moments:
                starts.append((data.qpos.copy(), data.qvel.copy()))
    rng.shuffle(starts)
    return starts


def test_states(model: mujoco.MjModel, frame_skip: int, rng: np.random.Generator) -> dict[str, list]:
    """States with contacts, and the velocity and acceleration after one step with a solver that runs to convergence."""
    exact_model = converged(model)
    data, (low, high) = mujoco.MjData(model), model.actuator_ctrlrange.T
    found = {name: [] for name in ("qpos", "qvel", "warmstart", "ctrl", "next_qvel", "qacc")}
    while len(found["qpos"]) < TESTS:
        mujoco.mj_resetData(model, data)
        data.qpos += rng.uniform(-0.1, 0.1, model.nq)
        for step in range(100):
            data.ctrl = rng.uniform(low, high)
            mujoco.mj_step(model, data, frame_skip)
            if step % 10 < 9:
                continue
            data.ctrl = rng.uniform(low, high)
            exact = mujoco.MjData(exact_model)
            exact.qpos, exact.qvel, exact.ctrl = data.qpos, data.qvel, data.ctrl
            exact.qacc_warmstart = data.qacc_warmstart
            before = [x.copy() for x in (exact.qpos, exact.qvel, exact.qacc_warmstart, exact.ctrl)]
            mujoco.mj_step(exact_model, exact)
            for name, row in zip(found, (*before, exact.qvel.copy(), exact.qacc.copy())):
                found[name].append(row)
    return found


def save(env_id: str, num_envs: int, folder: Path) -> dict:
    """Write the start states, repeated for num_envs robots, and the test states; return where they and the MJCF are."""
    env = gymnasium.make(env_id).unwrapped
    model = mujoco.MjModel.from_xml_path(str(env.fullpath))
    model.opt.integrator = mujoco.mjtIntegrator.mjINT_EULER
    model.opt.solver = mujoco.mjtSolver.mjSOL_NEWTON
    model.opt.jacobian = mujoco.mjtJacobian.mjJAC_DENSE  # MuJoCo's choice for models of this size
    rng = np.random.default_rng(1)
    tests = test_states(model, env.frame_skip, rng)
    starts = zip(*start_states(model, env.frame_skip, rng))
    start, start_qvel = (np.resize(rows, (num_envs, len(rows[0]))) for rows in starts)
    path = folder / "states.npz"
    np.savez(path, start=start, start_qvel=start_qvel, **tests)
    return dict(states=str(path), xml=str(env.fullpath))
