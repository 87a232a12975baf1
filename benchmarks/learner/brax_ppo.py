"""Brax's PPO, whose iterations the meter counts."""

import itertools

import jax
import jax.numpy as jnp

# Brax 0.14.2 calls this function; JAX 0.10 no longer has it.
jax.device_put_replicated = lambda tree, devices: jax.tree.map(lambda x: jnp.stack([x] * len(devices)), tree)

from brax.training.agents.ppo import train as ppo

from benchmarks.meter import check_jax, meter


def train(env, num_steps, rows, minibatches, **options):
    """Brax's PPO, one iteration of rows x num_steps transitions between two calls of the meter, without evaluations."""
    check_jax()
    iterations, work, begun = 10**6, rows * num_steps, itertools.count()

    def progress(*_):
        if next(begun):  # JAX compiles the first iteration, and the second once more
            meter.tick(work)

    ppo.train(
        env, num_timesteps=iterations * work, num_evals=iterations + 1, run_evals=False, progress_fn=progress,
        unroll_length=num_steps, batch_size=rows // minibatches, num_minibatches=minibatches, episode_length=1000,
        normalize_observations=True, **options,
    )  # fmt: skip
