"""Targets, batch and update of ppo_gpu_torch.py, as its training loop calls them; variants eager, compiled, bf16."""

import gymnasium
import numpy as np
import torch

import ppo_gpu_torch as ppo
import vecsim_torch as vecsim
from benchmarks.learner.common import action_size, epochs, hidden, minibatches, num_envs, num_steps, obs_size, samples
from benchmarks.meter import device, meter, variant

args = ppo.Args(
    num_envs=num_envs, num_steps=num_steps, update_epochs=epochs, num_minibatches=minibatches, device=device,
    actor_hidden=tuple(hidden), critic_hidden=tuple(hidden), compile=variant != "eager", bf16=variant == "bf16",
)  # fmt: skip
target = torch.device(device)
sizes = ppo.derive_sizes(args, world_size=1, device=target)
actions = gymnasium.spaces.Box(-np.ones(action_size, np.float32), np.ones(action_size, np.float32))
agent = ppo.Agent(obs_size, None, actions, args).to(target)
learning_rate = torch.tensor(args.learning_rate, device=target)
optimizer = vecsim.make_optimizer(agent, learning_rate)
rollout = ppo.allocate_rollout(num_steps, num_envs, obs_size, None, action_size, target)
functions = ppo.build_functions(agent, optimizer, rollout, sizes, args)
for tensor in (rollout.obs, rollout.final_critic_obs, rollout.reward):
    tensor.normal_()
rollout.terminated.bernoulli_(0.01)
for t in range(num_steps):
    rollout.mean[t], rollout.action[t], _ = functions.policy(rollout.obs[t], torch.randn_like(rollout.action[t]))
valid = ~rollout.invalid.flatten()
while True:
    value, advantage = functions.estimate()
    order = torch.randperm(sizes.batch, device=target)
    batch = ppo.make_batch(agent, rollout, value, advantage, args.normalize_advantages, order)
    ppo.update(agent, functions, batch, learning_rate, args.desired_kl[0], args)
    agent.obs_statistics.update(rollout.obs.flatten(0, 1), valid)
    meter.tick(samples)
