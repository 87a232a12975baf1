"""vecsim, with observations, rewards and resets inside; its robots have random ages."""

import contextlib

import torch

import vecsim_torch
from benchmarks.meter import device, meter, settings, threads, variant
from benchmarks.sim.common import episode, frame_skip, note_errors, num_envs, states, test_states
from benchmarks.simulator import random_actions

# As in all simulators, a robot that fell stays down until its 200 steps are over.
falls = settings["env_id"] in ("Hopper-v5", "Walker2d-v5", "Ant-v5", "Humanoid-v5")
lying = dict(terminate_when_unhealthy=False) if falls else {}
torch.set_num_threads(int(variant or threads))
env = vecsim_torch.make(
    settings["env_id"], num_envs, device=device, seed=1, integrator="euler", iterations=settings["iterations"],
    max_episode_steps=episode, random_initial_ages=True, compile=True, **lying,
)  # fmt: skip
chunk = len(torch.arange(num_envs)[env._parts[0]])  # the compiled functions that are timed below take so many robots
tests = [torch.tensor(rows.T, dtype=env.dtype, device=device).contiguous() for rows in test_states(chunk)]
with torch.no_grad(), vecsim_torch.one_thread() if env._cores > 1 else contextlib.nullcontext():  # as in env.step
    state, ctrl = vecsim_torch.State(*tests[:3]), tests[3]
    after, _ = vecsim_torch.step(env.model, state, ctrl, "euler", settings["iterations"], env._run)
note_errors(after.qvel.T.cpu())
env.reset(seed=1)
env.set_state(*(torch.tensor(states[name].T) for name in ("start", "start_qvel")))
generator = torch.Generator(device).manual_seed(1)
while True:
    for _ in range(5):
        env.step(random_actions(env, generator))
    meter.tick(5 * num_envs * frame_skip)
