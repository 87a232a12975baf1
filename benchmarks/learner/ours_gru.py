"""Targets, batches and update of ppo_recurrent_gpu_torch.py, as its training loop calls them; compiled and eager."""

import gymnasium
import numpy as np
import torch

import ppo_recurrent_gpu_torch as ppo
import vecsim_torch as vecsim
from benchmarks.learner.common import action_size, epochs, hidden, minibatches, num_envs, num_steps, obs_size, samples
from benchmarks.meter import device, meter, settings, variant

args = ppo.Args(
    num_envs=num_envs, num_steps=num_steps, update_epochs=epochs, num_minibatches=minibatches, device=device,
    actor_hidden=tuple(hidden), critic_hidden=tuple(hidden), compile=variant != "eager", memory="gru",
    memory_width=settings["memory_width"],
)  # fmt: skip
target = torch.device(device)
sizes = ppo.derive_sizes(args, world_size=1)
actions = gymnasium.spaces.Box(-np.ones(action_size, np.float32), np.ones(action_size, np.float32))
agent = ppo.Agent(obs_size, None, actions, args).to(target)
learning_rate = torch.tensor(args.learning_rate, device=target)
optimizer = vecsim.make_optimizer(agent, learning_rate)
rollout = ppo.allocate_rollout(agent, sizes, num_steps)
functions = ppo.build_functions(agent, optimizer, rollout, sizes, args)
rollout.obs.normal_()
rollout.final_critic_obs.normal_()
rollout.reward.normal_()
rollout.terminated.bernoulli_(0.01)
rollout.started[1:] = rollout.terminated[:-1]
memory = agent.empty_memory(num_envs)
for t in range(num_steps):
    noise = torch.randn_like(rollout.action[t])
    rollout.mean[t], rollout.action[t], _, memory = functions.policy(rollout.obs[t], memory, rollout.started[t], noise)
valid = ~rollout.invalid.flatten()
while True:
    order = torch.randperm(num_envs, device=target)
    batches = ppo.make_batches(agent, rollout, functions.estimate(), order, sizes, args)
    ppo.update(agent, functions, batches, learning_rate, args.desired_kl[0], args)
    agent.obs_statistics.update(rollout.obs.flatten(0, 1), valid)
    meter.tick(samples)
