"""Physics of vecsim_torch.py against MuJoCo C, conservation laws and finite differences, all in float64.

The reference is MuJoCo's own Newton solver, converged: both minimise the same convex cost, so their accelerations agree
to what rounding leaves. States come from MuJoCo's simulation under random actions and are compared as one batch. Errors
are relative as |a - b|max / (1 + |b|max), per state, so that a small entry of a large vector is not held to its own size.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import mujoco
import numpy as np
import pytest
import torch

import vecsim_torch as vecsim

ASSETS = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets"
MODELS = ("inverted_pendulum", "hopper", "walker2d_v5", "half_cheetah", "ant", "humanoid")
INTEGRATORS = {
    "euler": mujoco.mjtIntegrator.mjINT_EULER,
    "rk4": mujoco.mjtIntegrator.mjINT_RK4,
    "implicitfast": mujoco.mjtIntegrator.mjINT_IMPLICITFAST,
}
ITERATIONS = 24  # Newton needs under 10 from a warm start; the rest shows that more do no harm


# ----------------------------------------------------------------------------------------------------------------------
# References
# ----------------------------------------------------------------------------------------------------------------------


def converged(m):
    """Let MuJoCo's solver run until rounding stops it."""
    m.opt.solver = mujoco.mjtSolver.mjSOL_NEWTON
    m.opt.jacobian = mujoco.mjtJacobian.mjJAC_DENSE
    m.opt.tolerance, m.opt.ls_tolerance = 1e-15, 1e-10
    m.opt.iterations, m.opt.ls_iterations = 100, 50
    return m


def gym_model(name):
    return converged(mujoco.MjModel.from_xml_path(str(ASSETS / f"{name}.xml")))


def random_ctrl(m, rng):
    low = np.where(m.actuator_ctrllimited, m.actuator_ctrlrange[:, 0], -1)
    high = np.where(m.actuator_ctrllimited, m.actuator_ctrlrange[:, 1], 1)
    return rng.uniform(1.1 * low, 1.1 * high)  # past the range too: both must clip


def visit(m, count, seed=0, stride=3, episode=150, speed=0.5, touching=False):
    """(qpos, qvel, warmstart, ctrl), (count, ...) each: every `stride`-th state of MuJoCo under random actions.

    touching: only states with a contact.
    """
    rng, d, probe = np.random.default_rng(seed), mujoco.MjData(m), mujoco.MjData(m)
    rows, t = [], 0
    while len(rows) < count:
        if t % episode == 0:
            mujoco.mj_resetData(m, d)
            d.qvel[:] = speed * rng.normal(size=m.nv)
        d.ctrl[:] = random_ctrl(m, rng)
        if t % stride == 0:
            row = d.qpos.copy(), d.qvel.copy(), d.qacc_warmstart.copy(), d.ctrl.copy()
            probe.qpos[:] = d.qpos
            mujoco.mj_fwdPosition(m, probe)
            if probe.ncon or not touching:
                rows.append(row)
        mujoco.mj_step(m, d)
        t += 1
        assert t < 100 * count, "too few states touch anything"
    return SimpleNamespace(
        **{name: np.array(column) for name, column in zip(("qpos", "qvel", "warmstart", "ctrl"), zip(*rows, strict=True), strict=True)}
    )


def load(m, d, states, k):
    mujoco.mj_resetData(m, d)
    d.qpos[:], d.qvel[:] = states.qpos[k], states.qvel[k]
    d.qacc_warmstart[:], d.ctrl[:] = states.warmstart[k], states.ctrl[k]


def c_forward(m, states, fields=("qacc",), change=None):
    """MuJoCo's mj_forward of every state: each field (count, ...), the full mass matrix and the contacts."""
    d, out = mujoco.MjData(m), {name: [] for name in (*fields, "mass_matrix", "contacts")}
    for k in range(len(states.qpos)):
        if change:
            change(m, k)
        load(m, d, states, k)
        mujoco.mj_forward(m, d)
        for name in fields:
            out[name].append(getattr(d, name).copy())
        full = np.zeros((m.nv, m.nv))
        mujoco.mj_fullM(m, d, full)
        out["mass_matrix"].append(full)
        out["contacts"].append(
            [(tuple(map(int, c.geom)), c.dist, c.frame.copy(), c.pos.copy(), c.efc_address >= 0) for c in d.contact]
        )
    return SimpleNamespace(**{name: rows if name == "contacts" else np.array(rows) for name, rows in out.items()})


def c_step(m, states, integrator, change=None):
    """qpos, qvel after one mj_step from every state."""
    d, rows = mujoco.MjData(m), []
    m.opt.integrator = INTEGRATORS[integrator]
    for k in range(len(states.qpos)):
        if change:
            change(m, k)
        load(m, d, states, k)
        mujoco.mj_step(m, d)
        rows.append((d.qpos.copy(), d.qvel.copy()))
    return tuple(np.array(column) for column in zip(*rows, strict=True))


def last_axis(x):
    """(count, ...) array to a tensor with the environment axis last."""
    return torch.tensor(np.moveaxis(np.asarray(x), 0, -1).copy())


def batch(states):
    return vecsim.State(*map(last_axis, (states.qpos, states.qvel, states.warmstart))), last_axis(states.ctrl)


def error(ours, theirs):
    """Worst relative error over a batch: ours (..., N) tensor, theirs (N, ...) array."""
    b = last_axis(theirs)
    a = ours.expand_as(b).flatten(0, -2)
    b = b.flatten(0, -2)
    assert torch.isfinite(a).all()
    return float(((a - b).abs().amax(0) / (1 + b.abs().amax(0))).max())


def pairs_seen(m, contacts):
    """The most contacts not with a plane in any state."""
    plane = mujoco.mjtGeom.mjGEOM_PLANE
    return max(sum(m.geom_type[g[0]] != plane for g, *_ in rows) for rows in contacts)


@pytest.fixture(scope="module", params=MODELS)
def visited(request):
    """A model of Gymnasium, 500 states of it, what MuJoCo makes of them and what vecsim does."""
    m = gym_model(request.param)
    geoms_touch = request.param != "inverted_pendulum"  # it has only its joint limit
    states = visit(m, 500, touching=geoms_touch, speed=0.5 if geoms_touch else 3.0)
    fields = ("qacc", "qfrc_bias", "qfrc_constraint", "qfrc_actuator", "qfrc_passive", "qacc_smooth")
    reference = c_forward(m, states, fields)
    model = vecsim.load_model(m, dtype=torch.float64, pair_slots=16)
    assert pairs_seen(m, reference.contacts) <= 16
    state, ctrl = batch(states)
    return SimpleNamespace(
        name=request.param, m=m, states=states, reference=reference, model=model, state=state, ctrl=ctrl,
        dynamics=vecsim.forward(model, state, ctrl, ITERATIONS),
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Gymnasium's models, field by field
# ----------------------------------------------------------------------------------------------------------------------


def test_acceleration(visited, record_property):
    if visited.name != "inverted_pendulum":
        assert all(visited.reference.contacts)
    worst = error(visited.dynamics.solution.qacc, visited.reference.qacc)
    record_property("worst", worst)
    print(f"\nqacc {visited.name}: {worst:.1e}")
    assert worst <= 1e-9  # rounding (1e-16) times the condition of the contact problem, some 1e5, and a margin


def test_smooth_forces(visited):
    smooth, reference = visited.dynamics.smooth, visited.reference
    passive = vecsim.passive_force(visited.model, visited.state.qpos, visited.state.qvel)
    # closed sums without a solver: only rounding over some 20 links
    assert error(smooth.qfrc_bias, reference.qfrc_bias) <= 1e-12
    assert error(smooth.qfrc_actuator, reference.qfrc_actuator) <= 1e-12
    assert error(passive, reference.qfrc_passive) <= 1e-12


def test_mass_matrix(visited):
    smooth, model = visited.dynamics.smooth, visited.model
    padded = torch.cat((smooth.mass_matrix, torch.zeros_like(smooth.mass_matrix[:1])))
    # summed about another point than MuJoCo's, so a distance of some metres costs two digits
    assert error(padded[model.unpack_index], visited.reference.mass_matrix) <= 1e-12
    unconstrained = vecsim.solve_packed(model, smooth.mass_matrix, smooth.qfrc_smooth.unsqueeze(1))[:, 0]
    assert error(unconstrained, visited.reference.qacc_smooth) <= 1e-10  # the condition of M, some 1e4


def test_contact_geometry(visited):
    """Every contact of MuJoCo is one of ours with its distance, point and frame; we have no active one besides."""
    model, m = visited.model, visited.m
    smooth = visited.dynamics.smooth
    point, distance, tangent = vecsim.plane_contacts(model, smooth.xpos, smooth.xmat, smooth.origin)
    normal = model.plane_normal.expand_as(point)
    margin = model.contact_solver.margin
    ours = [[] for _ in visited.reference.contacts]
    for row, n in (distance < margin).nonzero().tolist():
        frame = torch.stack((normal[row, :, n], *tangent[:, row, :, n]))
        at = point[row, :, n] + smooth.origin[:, n]
        ours[n].append((model.contact_geom[row], float(distance[row, n]), frame.flatten().numpy(), at.numpy()))
    if model.pair_slots:
        index, point, distance, frame = vecsim.pair_contacts(model, smooth.xpos, smooth.xmat, smooth.origin)
        active = distance < model.pair_solver.margin[:, 0][index]
        for row, n in active.nonzero().tolist():
            geoms = model.pair_geoms[int(index[row, n])]
            at = point[row, :, n] + smooth.origin[:, n]
            ours[n].append((geoms, float(distance[row, n]), frame[row, :, :, n].flatten().numpy(), at.numpy()))

    for mine, theirs in zip(ours, visited.reference.contacts, strict=True):
        assert len(mine) == len(theirs)
        for geom, dist, frame, pos, _ in theirs:
            key = geom[1] if m.geom_type[geom[0]] == mujoco.mjtGeom.mjGEOM_PLANE else geom
            same = [c for c in mine if c[0] == key]
            nearest = min(same, key=lambda c: np.abs(c[3] - pos).max())
            # lengths of metres in rounding; the nearest points of two segments divide by the sine of their angle
            assert abs(nearest[1] - dist) <= 1e-11
            assert np.abs(nearest[3] - pos).max() <= 1e-9
            assert np.abs(nearest[2] - frame).max() <= 1e-9


def test_constraint_force(visited):
    force = vecsim.constraint_force(visited.model, visited.dynamics.smooth, visited.dynamics.solution)
    # M times an acceleration that is right to 1e-9
    assert error(force, visited.reference.qfrc_constraint) <= 1e-9
    assert np.abs(visited.reference.qfrc_constraint).max() > 1  # there is something to compare


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_one_step(visited, integrator):
    qpos, qvel = c_step(visited.m, visited.states, integrator)
    # four dynamics in a row cost Runge-Kutta time, so it gets as many pair slots as the states fill and one to spare
    slots = pairs_seen(visited.m, visited.reference.contacts) + 2
    model = vecsim.load_model(visited.m, dtype=torch.float64, pair_slots=slots)
    after, _ = vecsim.step(model, visited.state, visited.ctrl, integrator, 16)
    worst_qpos, worst_qvel = error(after.qpos, qpos), error(after.qvel, qvel)
    print(f"\nstep {visited.name} {integrator}: qpos {worst_qpos:.1e} qvel {worst_qvel:.1e}")
    # h times the acceleration's error; Runge-Kutta's later stages see it again
    assert worst_qpos <= 1e-10
    assert worst_qvel <= 1e-9
