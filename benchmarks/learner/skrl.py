"""skrl's PPO.update, or PPO_RNN.update, on a memory filled through `act` and `record_transition`."""

import torch

from benchmarks.learner.common import epochs, hidden, minibatches, num_envs, num_steps, obs_size, samples, spaces
from benchmarks.learner.skrl_agent import make_agent
from benchmarks.meter import device, meter, settings

spaces |= dict(device=device)
limits = dict(memory_width=settings.get("memory_width"), grad_norm_clip=1.0, value_clip=0.0)
learner = make_agent(spaces, num_envs, num_steps, epochs, minibatches, hidden, **limits)
learner.init()
learner.enable_training_mode(True)
obs = torch.randn(num_envs, obs_size, device=device)
with torch.no_grad():
    for _ in range(num_steps):
        actions, _ = learner.act(obs, None, timestep=0, timesteps=1)
        next_obs = torch.randn_like(obs)
        ended = torch.rand(num_envs, 1, device=device) < 0.01
        learner.record_transition(
            observations=obs, states=None, actions=actions, rewards=torch.randn(num_envs, 1, device=device),
            next_observations=next_obs, next_states=None, terminated=ended, truncated=torch.zeros_like(ended), infos={},
            timestep=0, timesteps=1,
        )  # fmt: skip
        obs = next_obs
learner.enable_models_training_mode(True)
while True:
    learner.update(timestep=0, timesteps=1)
    meter.tick(samples)
