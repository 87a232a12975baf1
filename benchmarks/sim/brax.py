"""Brax's engine in generalized coordinates."""

from brax.generalized import pipeline
from brax.io import mjcf

from benchmarks.sim import jax_engine
from benchmarks.sim.common import load_model

model = load_model(mjcf.load_mjmodel)  # its own reader, which welds bodies without joints
system = mjcf.load_model(model)


def initial(qpos, qvel, warmstart):
    return pipeline.init(system, qpos, qvel)


def physics_step(state, ctrl):
    return pipeline.step(system, state, ctrl)


jax_engine.run(model, initial, physics_step, velocity=lambda state: state.qd)
