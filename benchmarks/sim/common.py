"""What all simulators of `sim` share: the model, the states, and the error of one step."""

import mujoco
import numpy as np

from benchmarks.meter import meter, settings

states = np.load(settings["states"])
num_envs, frame_skip = settings["num_envs"], settings["frame_skip"]
episode = 200  # environment steps before a robot starts again


def load_model(load=mujoco.MjModel.from_xml_path):
    """The task's MJCF with the settings that all engines share."""
    model = load(settings["xml"])
    model.opt.integrator = mujoco.mjtIntegrator.mjINT_EULER
    model.opt.solver = mujoco.mjtSolver.mjSOL_NEWTON
    model.opt.jacobian = mujoco.mjtJacobian.mjJAC_DENSE
    model.opt.iterations, model.opt.ls_iterations = settings["iterations"], settings["ls_iterations"]
    return model


def test_states(rows=num_envs):
    """qpos, qvel, warmstart and ctrl of the test states, repeated or cut to `rows`: some engines compile for a size."""
    return [np.resize(states[name], (rows, states[name].shape[1])) for name in ("qpos", "qvel", "warmstart", "ctrl")]


def note_errors(next_qvel):
    """Note the error of one step from the first of the 256 test states as facts of this contender's row.

    next_qvel: (rows, nv). The error is the largest |qvel - qvel of MuJoCo C| over the degrees of freedom, divided by
    timestep * (1 + max |qacc|), against a solver of MuJoCo C that runs to convergence."""
    count = min(len(next_qvel), len(states["qvel"]))
    scale = settings["timestep"] * (1.0 + np.abs(states["qacc"][:count]).max(1))
    errors = np.abs(np.asarray(next_qvel, np.float64)[:count] - states["next_qvel"][:count]).max(1) / scale
    quantiles = {"step_error_p50": 0.5, "step_error_p99": 0.99, "step_error_max": 1.0}
    meter.facts |= {name: float(np.quantile(errors, q)) for name, q in quantiles.items()}
