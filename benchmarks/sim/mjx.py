"""MJX, the JAX version of MuJoCo."""

from mujoco import mjx

from benchmarks.sim import jax_engine
from benchmarks.sim.common import load_model

model = load_model()
mjx_model, blank = mjx.put_model(model), mjx.make_data(model)


def initial(qpos, qvel, warmstart):
    return blank.replace(qpos=qpos, qvel=qvel, qacc_warmstart=warmstart)


def physics_step(data, ctrl):
    return mjx.step(mjx_model, data.replace(ctrl=ctrl))


jax_engine.run(model, initial, physics_step, velocity=lambda data: data.qvel)
