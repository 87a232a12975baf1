"""Brax's PPO on an environment of random numbers.

Its rollout, one more pass of the policy for each sample, is inside."""

import functools

import jax
import jax.numpy as jnp
from brax import envs
from brax.training.agents.ppo import networks
from flax import linen

from benchmarks.learner.brax_ppo import train
from benchmarks.meter import settings


class RandomNumbers(envs.Env):
    observation_size, action_size, backend = settings["obs_size"], settings["action_size"], None

    def reset(self, rng):
        obs = jax.random.normal(rng, (self.observation_size,))
        return envs.State(None, obs, jnp.zeros(()), jnp.zeros(()), {}, {"rng": rng})

    def step(self, state, action):
        rng, key_obs, key_end = jax.random.split(state.info["rng"], 3)
        obs = jax.random.normal(key_obs, (self.observation_size,))
        done = jax.random.bernoulli(key_end, 0.01).astype(jnp.float32)
        return state.replace(obs=obs, reward=obs[0], done=done, info=state.info | {"rng": rng})


hidden, epochs = tuple(settings["hidden"]), settings["epochs"]
num_envs, num_steps, minibatches = settings["num_envs"], settings["num_steps"], settings["minibatches"]
sizes = dict(policy_hidden_layer_sizes=hidden, value_hidden_layer_sizes=hidden)
make_networks = functools.partial(networks.make_ppo_networks, activation=linen.elu, **sizes)
train(
    RandomNumbers(), num_steps, num_envs, minibatches, num_envs=num_envs, num_updates_per_batch=epochs,
    learning_rate=1e-3, learning_rate_schedule="ADAPTIVE_KL", max_grad_norm=1.0, entropy_cost=0.0,
    network_factory=make_networks,
)  # fmt: skip
