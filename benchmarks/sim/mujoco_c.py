"""MuJoCo C by mujoco.rollout, one thread for each core or as many as the variant says."""

import mujoco
import numpy as np
from mujoco import rollout

from benchmarks.meter import meter, threads, variant
from benchmarks.sim.common import episode, frame_skip, load_model, note_errors, num_envs, states

model, threads = load_model(), int(variant or threads)
rng, (low, high) = np.random.default_rng(1), model.actuator_ctrlrange.T
full = mujoco.mjtState.mjSTATE_FULLPHYSICS
size = mujoco.mj_stateSize(model, full)


def full_states(qpos, qvel):
    """(N, size) states as mujoco.rollout takes them."""
    data, rows = mujoco.MjData(model), np.empty((len(qpos), size))
    for row, data.qpos, data.qvel in zip(rows, qpos, qvel):
        mujoco.mj_getState(model, data, row, full)
    return rows


with rollout.Rollout(nthread=threads) as pool:
    data = [mujoco.MjData(model) for _ in range(threads)]
    tests = full_states(states["qpos"], states["qvel"])
    after, _ = pool.rollout(model, data, tests, states["ctrl"][:, None], initial_warmstart=states["warmstart"])
    note_errors(after[:, 0, 1 + model.nq : 1 + model.nq + model.nv])  # a state is time, qpos, qvel
    start, length = full_states(states["start"], states["start_qvel"]), 10
    while True:
        now = start
        for _ in range(0, episode, length):
            ctrl = rng.uniform(low, high, (num_envs, length, model.nu)).repeat(frame_skip, axis=1)
            after, _ = pool.rollout(model, data, now, ctrl)
            now = after[:, -1]
            meter.tick(num_envs * length * frame_skip)
