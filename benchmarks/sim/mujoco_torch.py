"""mujoco-torch: torch.vmap over its step; variants compiled and eager.

The eager solver runs all its iterations: with PyTorch 2.13 the loop that stops early fails under vmap unless it is
compiled."""

import mujoco
import mujoco_torch
import numpy as np
import torch

from benchmarks.meter import device, meter, variant
from benchmarks.sim.common import episode, frame_skip, load_model, note_errors, num_envs, states, test_states

torch.manual_seed(1)
model = load_model()
mx = mujoco_torch.device_put(model, dtype=torch.float32).to(device)
one = mujoco_torch.device_put(mujoco.MjData(model), dtype=torch.float32).to(device)
low, high = torch.tensor(model.actuator_ctrlrange.T, dtype=torch.float32, device=device)
step = torch.vmap(lambda data: mujoco_torch.step(mx, data, fixed_iterations=variant == "eager"))
if variant == "compiled":
    step = torch.compile(step, fullgraph=True)


def batch_of(qpos, qvel, warmstart, ctrl):
    batch = torch.stack([one] * len(qpos))
    rows = (torch.tensor(x, dtype=torch.float32, device=device) for x in (qpos, qvel, warmstart, ctrl))
    return batch.replace(**dict(zip(("qpos", "qvel", "qacc_warmstart", "ctrl"), rows)))


with torch.no_grad():
    note_errors(step(batch_of(*test_states())).qvel.cpu().numpy())
    rest = np.zeros((num_envs, model.nv))
    start = batch_of(states["start"], states["start_qvel"], rest, np.zeros((num_envs, model.nu)))
    while True:
        now = start
        for _ in range(episode):
            now = now.replace(ctrl=low + (high - low) * torch.rand(num_envs, model.nu, device=device))
            for _ in range(frame_skip):
                now = step(now)
            meter.tick(num_envs * frame_skip)
