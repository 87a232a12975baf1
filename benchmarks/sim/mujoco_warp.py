# /// script
# dependencies = ["mujoco-warp==4.0.0", "mujoco==4.0.0"]
# ///
"""MuJoCo Warp; on a GPU as a CUDA graph, as its documentation advises."""

import mujoco_warp
import numpy as np
import warp

from benchmarks.meter import device, meter
from benchmarks.sim.common import episode, frame_skip, load_model, note_errors, num_envs, states

warp.init()
model = load_model()
low, high = model.actuator_ctrlrange.T
rng = np.random.default_rng(1)


def simulation(qpos, qvel, warmstart):
    """A model and its data, with these rows as the state."""
    data = mujoco_warp.make_data(model, nworld=len(qpos))
    for name, rows in (("qpos", qpos), ("qvel", qvel), ("qacc_warmstart", warmstart)):
        getattr(data, name).assign(rows.astype(np.float32))
    mx = mujoco_warp.put_model(model)
    mx.opt.warn_overflow = 0  # else it prints whenever a robot uses all its solver iterations
    return mx, data


with warp.ScopedDevice(device):
    mx, data = simulation(states["qpos"], states["qvel"], states["warmstart"])
    data.ctrl.assign(states["ctrl"].astype(np.float32))
    mujoco_warp.step(mx, data)
    note_errors(data.qvel.numpy())
    rest = np.zeros((num_envs, model.nv))
    mx, data = simulation(states["start"], states["start_qvel"], rest)
    graph = None
    if device == "cuda":
        mujoco_warp.step(mx, data)
        with warp.ScopedCapture() as capture:
            mujoco_warp.step(mx, data)
        graph = capture.graph
    while True:
        for name, rows in (("qpos", states["start"]), ("qvel", states["start_qvel"]), ("qacc_warmstart", rest)):
            getattr(data, name).assign(rows.astype(np.float32))
        for _ in range(episode):
            data.ctrl.assign(rng.uniform(low, high, (num_envs, model.nu)).astype(np.float32))
            for _ in range(frame_skip):
                warp.capture_launch(graph) if graph else mujoco_warp.step(mx, data)
            warp.synchronize()
            meter.tick(num_envs * frame_skip)
