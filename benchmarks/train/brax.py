"""Brax's PPO in its own environment of the task, whose model is Brax's own; options as in its notebook for Ant.

The variant is the backend, Brax's word for a physics engine: generalized or spring, which is faster and less realistic.
Brax's PPO does learn on spring: it reached a return of 3,035 in its Ant after 1.5 million steps. A GPU has the
notebook's 4,096 environments and batch; a CPU has 128 environments and 2,560 transitions an iteration."""

import jax
from brax import envs

from benchmarks.learner.brax_ppo import train
from benchmarks.meter import device, settings, variant

num_envs, rows = (4096, 2048 * 32) if device == "cuda" else (128, 512)


class ExactPhysics(envs.Wrapper):
    """On a GPU, too, the physics multiplies in float32. The networks may use TF32, as all others do."""

    def step(self, state, action):
        with jax.default_matmul_precision("highest"):
            return self.env.step(state, action)


env = ExactPhysics(envs.get_environment(settings["env_id"].split("-")[0].lower(), backend=variant))
train(
    env, 5, rows, 32 if device == "cuda" else 4, num_envs=num_envs, num_updates_per_batch=4, learning_rate=3e-4,
    entropy_cost=1e-2, discounting=0.97, reward_scaling=10.0,
)  # fmt: skip
