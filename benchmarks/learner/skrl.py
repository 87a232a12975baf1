# /// script
# dependencies = ["skrl==2.1.1", "torch==2.13.0", "gymnasium[mujoco]==1.4.0", "mujoco==4.0.0"]
# ///
"""skrl's PPO.update, or PPO_RNN.update, on a memory filled through `act` and `record_transition`."""

import numpy as np
import torch
from skrl.agents.torch.ppo import PPO, PPO_RNN
from skrl.memories.torch import RandomMemory
from skrl.resources.preprocessors.torch import RunningStandardScaler
from skrl.resources.schedulers.torch import KLAdaptiveLR

from benchmarks.learner.common import action_size, epochs, hidden, minibatches, num_envs, num_steps, obs_size, samples
from benchmarks.learner.skrl_models import Policy, RecurrentPolicy, RecurrentValue, Value, box
from benchmarks.meter import device, meter, settings

spaces = dict(observation_space=box(obs_size, np.inf), action_space=box(action_size, 1.0), device=device)
kinds, memory = (Policy, Value), ()
if "memory_width" in settings:
    kinds, memory = (RecurrentPolicy, RecurrentValue), (settings["memory_width"], num_steps, num_envs)
policy, value = (kind(spaces, hidden, *memory).to(device) for kind in kinds)
learner = (PPO_RNN if memory else PPO)(
    models={"policy": policy, "value": value},
    memory=RandomMemory(memory_size=num_steps, num_envs=num_envs, device=device),
    **spaces,
    cfg=dict(
        rollouts=num_steps, learning_epochs=epochs, mini_batches=minibatches, grad_norm_clip=1.0, value_clip=0.0,
        learning_rate=1e-3, learning_rate_scheduler=KLAdaptiveLR, learning_rate_scheduler_kwargs={"kl_threshold": 0.01},
        observation_preprocessor=RunningStandardScaler,
        observation_preprocessor_kwargs={"size": spaces["observation_space"], "device": device},
        value_preprocessor=RunningStandardScaler, value_preprocessor_kwargs={"size": 1, "device": device},
        experiment={"write_interval": 0, "checkpoint_interval": 0},
    ),
)  # fmt: skip
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
