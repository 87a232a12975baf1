"""Targets, batches and update of our PPO as its training loop calls them; variants eager, compiled, bf16.

With `memory_width` in the settings it is ppo_recurrent_gpu_torch.py with a GRU, else ppo_gpu_torch.py."""

import importlib

import torch

import vecsim_torch as vecsim
from benchmarks.learner.common import epochs, hidden, minibatches, num_envs, num_steps, obs_size, samples, spaces
from benchmarks.meter import device, meter, settings, variant

recurrent = "memory_width" in settings
ppo = importlib.import_module("ppo_recurrent_gpu_torch" if recurrent else "ppo_gpu_torch")
memory_flags = dict(memory="gru", memory_width=settings["memory_width"]) if recurrent else {}
args = ppo.Args(
    num_envs=num_envs, num_steps=num_steps, update_epochs=epochs, num_minibatches=minibatches, device=device,
    actor_hidden=tuple(hidden), critic_hidden=tuple(hidden), compile=variant != "eager", bf16=variant == "bf16",
    **memory_flags,
)  # fmt: skip
target = torch.device(device)
action_space = spaces["action_space"]
agent = ppo.Agent(obs_size, None, action_space, args).to(target)
learning_rate = torch.tensor(args.learning_rate, device=target)
optimizer = vecsim.make_optimizer(agent, learning_rate)
if recurrent:
    sizes = ppo.derive_sizes(args, world_size=1)
    rollout = ppo.allocate_rollout(agent, sizes, num_steps)
else:
    sizes = ppo.derive_sizes(args, world_size=1, device=target)
    rollout = ppo.allocate_rollout(num_steps, num_envs, obs_size, None, action_space.shape[0], target)
functions = ppo.build_functions(agent, optimizer, rollout, sizes, args)
for tensor in (rollout.obs, rollout.final_critic_obs, rollout.reward):
    tensor.normal_()
rollout.terminated.bernoulli_(0.01)
memory = []
if recurrent:
    rollout.started[1:] = rollout.terminated[:-1]
    memory = [agent.empty_memory(num_envs)]
for t in range(num_steps):
    inputs = (rollout.obs[t], *memory, rollout.started[t]) if recurrent else (rollout.obs[t],)
    noise = torch.randn_like(rollout.action[t])
    rollout.mean[t], rollout.action[t], _, *memory = functions.policy(*inputs, noise)
valid = ~rollout.invalid.flatten()
while True:
    order = torch.randperm(num_envs if recurrent else samples, device=target)
    if recurrent:
        batch = ppo.make_batches(agent, rollout, functions.estimate(), order, sizes, args)
    else:
        batch = ppo.make_batch(agent, rollout, *functions.estimate(), args.normalize_advantages, order)
    ppo.update(agent, functions, batch, learning_rate, args.desired_kl[0], args)
    agent.obs_statistics.update(rollout.obs.flatten(0, 1), valid)
    meter.tick(samples)
