"""PPO for continuous actions in CleanRL's manner, with its published hyperparameters; variants sync and async.

This is our own re-implementation, not CleanRL's file."""

import itertools

import numpy as np
import torch
from gymnasium import wrappers
from torch import nn

from benchmarks.meter import device, meter, settings, threads, variant
from benchmarks.train.gymnasium_envs import make_vector, num_envs

num_steps, minibatches, epochs, clip = 2048, 32, 10, 0.2
seed = settings.get("seed", 1)
torch.manual_seed(seed)
torch.set_num_threads(threads)


def clip_observation(env):
    return wrappers.TransformObservation(env, lambda obs: np.clip(obs, -10, 10), None)


def clip_reward(env):
    return wrappers.TransformReward(env, lambda reward: float(np.clip(reward, -10, 10)))


chain = [wrappers.RecordEpisodeStatistics, wrappers.ClipAction, wrappers.NormalizeObservation, clip_observation]
chain += [wrappers.NormalizeReward, clip_reward]
envs = make_vector(num_steps, variant, *chain)
obs_size, action_size = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]


def layer(inputs, outputs, gain=2**0.5):
    linear = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(linear.weight, gain)
    nn.init.zeros_(linear.bias)
    return linear


def network(outputs, gain):
    return nn.Sequential(layer(obs_size, 64), nn.Tanh(), layer(64, 64), nn.Tanh(), layer(64, outputs, gain)).to(device)


actor, critic = network(action_size, 0.01), network(1, 1.0)
log_std = nn.Parameter(torch.zeros(action_size, device=device))
parameters = [*actor.parameters(), *critic.parameters(), log_std]
optimizer = torch.optim.Adam(parameters, lr=3e-4, eps=1e-5)


def tensor(array):
    return torch.as_tensor(array, dtype=torch.float32, device=device)


def distribution(obs):
    return torch.distributions.Normal(actor(obs), log_std.exp())


obs_buffer = torch.zeros(num_steps, num_envs, obs_size, device=device)
action_buffer = torch.zeros(num_steps, num_envs, action_size, device=device)
log_probs, rewards, dones, values = torch.zeros(4, num_steps, num_envs, device=device)
obs, done = tensor(envs.reset(seed=seed)[0]), torch.zeros(num_envs, device=device)


def act(obs):
    """The deterministic action for one raw observation; the first environment's wrapper holds the running moments."""
    env = envs.envs[0]
    while not isinstance(env, wrappers.NormalizeObservation):
        env = env.env
    obs = (obs - env.obs_rms.mean) / np.sqrt(env.obs_rms.var + env.epsilon)
    with torch.no_grad():
        return actor(tensor(obs.clip(-10, 10))).cpu().numpy()


meter.ready(act)
updates = 1_000_000 // (num_steps * num_envs)  # as published: the learning rate falls to zero over a million steps
for update in itertools.count():
    optimizer.param_groups[0]["lr"] = 3e-4 * max(0.0, 1.0 - update / updates)
    for t in range(num_steps):
        obs_buffer[t], dones[t] = obs, done
        with torch.no_grad():
            policy = distribution(obs)
            action = policy.sample()
            action_buffer[t], log_probs[t], values[t] = action, policy.log_prob(action).sum(-1), critic(obs).squeeze(-1)
        next_obs, reward, terminated, truncated, _ = envs.step(action.cpu().numpy())
        obs, rewards[t], done = tensor(next_obs), tensor(reward), tensor(terminated | truncated)

    with torch.no_grad():
        advantages, following, next_value, next_done = torch.zeros_like(rewards), 0.0, critic(obs).squeeze(-1), done
        for t in reversed(range(num_steps)):
            delta = rewards[t] + 0.99 * next_value * (1 - next_done) - values[t]
            advantages[t] = following = delta + 0.99 * 0.95 * (1 - next_done) * following
            next_value, next_done = values[t], dones[t]
        returns = advantages + values

    rows = [x.flatten(0, 1) for x in (obs_buffer, action_buffer, log_probs, values, advantages, returns)]
    batch_size = num_steps * num_envs
    for _ in range(epochs):
        for index in torch.randperm(batch_size, device=device).split(batch_size // minibatches):
            b_obs, b_action, b_log_prob, b_value, advantage, b_return = (x[index] for x in rows)
            policy = distribution(b_obs)
            ratio = (policy.log_prob(b_action).sum(-1) - b_log_prob).exp()
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
            policy_loss = torch.max(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)).mean()
            value = critic(b_obs).squeeze(-1)
            clipped = b_value + (value - b_value).clamp(-clip, clip)
            value_loss = 0.5 * torch.max((value - b_return) ** 2, (clipped - b_return) ** 2).mean()
            optimizer.zero_grad()
            (policy_loss + 0.5 * value_loss).backward()
            nn.utils.clip_grad_norm_(parameters, 0.5)
            optimizer.step()
