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


def assign(data, **rows):
    for name, values in rows.items():
        getattr(data, name).assign(values.astype(np.float32))


with warp.ScopedDevice(device):
    mx = mujoco_warp.put_model(model)
    mx.opt.warn_overflow = 0  # else it prints whenever a robot uses all its solver iterations
    data = mujoco_warp.make_data(model, nworld=len(states["qpos"]))
    assign(data, qpos=states["qpos"], qvel=states["qvel"], qacc_warmstart=states["warmstart"], ctrl=states["ctrl"])
    mujoco_warp.step(mx, data)
    note_errors(data.qvel.numpy())
    data, graph = mujoco_warp.make_data(model, nworld=num_envs), None
    start = dict(qpos=states["start"], qvel=states["start_qvel"], qacc_warmstart=np.zeros((num_envs, model.nv)))
    assign(data, **start)
    if device == "cuda":
        mujoco_warp.step(mx, data)
        with warp.ScopedCapture() as capture:
            mujoco_warp.step(mx, data)
        graph = capture.graph
    while True:
        assign(data, **start)
        for _ in range(episode):
            assign(data, ctrl=rng.uniform(low, high, (num_envs, model.nu)))
            for _ in range(frame_skip):
                warp.capture_launch(graph) if graph else mujoco_warp.step(mx, data)
            warp.synchronize()
            meter.tick(num_envs * frame_skip)
