"""The loop of a simulator in JAX: one compiled program for each environment step."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.meter import check_jax, meter
from benchmarks.sim.common import episode, frame_skip, note_errors, num_envs, states, test_states

jax.config.update("jax_default_matmul_precision", "highest")  # else a GPU computes the physics in TF32


def run(model, initial, physics_step, velocity):
    """Simulate forever.

    initial(qpos, qvel, warmstart) -> state of one robot; physics_step(state, ctrl) -> state; velocity(state) -> qvel"""
    check_jax()
    low, high = jnp.asarray(model.actuator_ctrlrange.T)
    start_of = jax.jit(jax.vmap(initial))

    @jax.jit
    def advance(batch, ctrl, steps):
        return jax.lax.fori_loop(0, steps, lambda _, batch: jax.vmap(physics_step)(batch, ctrl), batch)

    *tests, ctrl = (jnp.asarray(rows, jnp.float32) for rows in test_states())
    note_errors(velocity(advance(start_of(*tests), ctrl, 1)))
    rest = np.zeros((num_envs, model.nv))
    start = start_of(*(jnp.asarray(x, jnp.float32) for x in (states["start"], states["start_qvel"], rest)))
    random_ctrl = jax.jit(lambda key: jax.random.uniform(key, (num_envs, model.nu), minval=low, maxval=high))
    key = jax.random.PRNGKey(1)
    while True:
        now = start
        for _ in range(episode):
            key, key_now = jax.random.split(key)
            now = jax.block_until_ready(advance(now, random_ctrl(key_now), frame_skip))
            meter.tick(num_envs * frame_skip)
