"""Physics of vecsim_torch.py against MuJoCo C, conservation laws and finite differences, all in float64.

The reference is MuJoCo's own Newton solver, converged: both minimise the same convex cost, so their accelerations agree
to what rounding leaves. States come from MuJoCo's simulation under random actions and are compared as one batch. Errors
are |a - b|max / (1 + |b|max), per state, so that a small entry of a large vector is not measured by its own size.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import mujoco
import numpy as np
import pytest
import torch

import vecsim_torch as vecsim
from benchmarks import simulator

ASSETS = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets"
TOUCHING = ("hopper", "walker2d_v5", "half_cheetah", "ant", "humanoid", "humanoidstandup", "pusher_v5")
MODELS = (
    "inverted_pendulum",
    "inverted_double_pendulum",
    "reacher",
    "swimmer",
    *TOUCHING,
)  # the first have limits only
INTEGRATORS = {
    "euler": mujoco.mjtIntegrator.mjINT_EULER,
    "rk4": mujoco.mjtIntegrator.mjINT_RK4,
    "implicitfast": mujoco.mjtIntegrator.mjINT_IMPLICITFAST,
}
FIELDS = ("qacc", "qfrc_bias", "qfrc_constraint", "qfrc_actuator", "qfrc_passive", "qacc_smooth")
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


def visit(m, count, seed=0, stride=3, episode=150, speed=0.5, touching=False, acts=None):
    """(qpos, qvel, warmstart, ctrl), (count, ...) each: every `stride`-th state of MuJoCo under random actions.

    touching: only states with a contact. acts: only states for which acts(m, d) is true after mj_forward.
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
            probe.qpos[:], probe.qvel[:], probe.ctrl[:] = d.qpos, d.qvel, d.ctrl
            mujoco.mj_forward(m, probe)
            if (probe.ncon or not touching) and (acts is None or acts(m, probe)):
                rows.append(row)
        mujoco.mj_step(m, d)
        t += 1
        assert t < 100 * count, "too few states touch anything, or in too few the feature acts"
    return SimpleNamespace(
        **{
            name: np.array(column)
            for name, column in zip(("qpos", "qvel", "warmstart", "ctrl"), zip(*rows, strict=True), strict=True)
        }
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
    geoms_touch = request.param in TOUCHING
    states = visit(m, 500, touching=geoms_touch, speed=0.5 if geoms_touch else 3.0)
    reference = c_forward(m, states, FIELDS)
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


def assert_dynamics_equal(model, state, dynamics, reference):
    """All forces, the mass matrix and both accelerations; returns the worst error of qacc."""
    smooth = dynamics.smooth
    fluid = vecsim.fluid_force(model, smooth.xpos, smooth.xmat, smooth.origin, smooth.cdof, smooth.cvel)
    passive = vecsim.passive_force(model, state.qpos, state.qvel) + fluid
    # closed sums without a solver: only rounding over some 20 links
    assert error(smooth.qfrc_bias, reference.qfrc_bias) <= 1e-12
    assert error(smooth.qfrc_actuator, reference.qfrc_actuator) <= 1e-12
    assert error(passive, reference.qfrc_passive) <= 1e-12
    # summed about another point than MuJoCo's, so a distance of some metres costs two digits
    padded = torch.cat((smooth.mass_matrix, torch.zeros_like(smooth.mass_matrix[:1])))
    assert error(padded[model.unpack_index], reference.mass_matrix) <= 1e-12
    unconstrained = vecsim.solve_packed(model, smooth.mass_matrix, smooth.qfrc_smooth.unsqueeze(1))
    assert error(unconstrained, reference.qacc_smooth) <= 1e-10  # the condition of M, some 1e4
    worst = error(dynamics.solution.qacc, reference.qacc)
    assert worst <= 1e-9  # rounding (1e-16) times the condition of the contact problem, some 1e5, and a margin
    # M times an acceleration that is right to 1e-9
    assert error(vecsim.constraint_force(model, dynamics), reference.qfrc_constraint) <= 1e-9
    assert np.abs(reference.qfrc_constraint).max() > 1  # there is something to compare
    return worst


def test_acceleration(visited, record_property):
    if visited.name in TOUCHING:
        assert all(visited.reference.contacts)
    worst = assert_dynamics_equal(visited.model, visited.state, visited.dynamics, visited.reference)
    record_property("qacc", (visited.name, worst))


def test_contact_geometry(visited):
    """Every contact of MuJoCo is one of ours with its distance, point and frame; we have no active one besides."""
    model, m = visited.model, visited.m
    smooth = visited.dynamics.smooth
    point, normal, distance, tangent = vecsim.ground_contacts(model, smooth.xpos, smooth.xmat, smooth.origin)
    normal = normal.expand_as(point)
    margin = model.contact_softness.margin
    ours = [[] for _ in visited.reference.contacts]
    for row, n in (distance < margin).nonzero().tolist():
        frame = torch.stack((normal[row, :, n], *tangent[:, row, :, n]))
        at = point[row, :, n] + smooth.origin[:, n]
        ours[n].append((model.contact_geom[row], float(distance[row, n]), frame.flatten().numpy(), at.numpy()))
    if model.pair_slots:
        index, pairs, _ = vecsim.pair_contacts(model, smooth.xpos, smooth.xmat, smooth.origin)
        point, normal, distance, tangent = pairs
        active = distance < model.pair_softness.margin[:, 0][index]
        for row, n in active.nonzero().tolist():
            geoms = model.pair_geoms[int(index[row, n])]
            at = point[row, :, n] + smooth.origin[:, n]
            frame = torch.stack((normal[row, :, n], *tangent[:, row, :, n]))
            ours[n].append((geoms, float(distance[row, n]), frame.flatten().numpy(), at.numpy()))

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


def test_humanoid_standups_own_solver(record_property):
    """Its MJCF asks for 50 iterations of PGS. How far is what Gymnasium computes from the solution?"""
    m, own = gym_model("humanoidstandup"), mujoco.MjModel.from_xml_path(str(ASSETS / "humanoidstandup.xml"))
    states = visit(m, 500, touching=True)
    exact, theirs = (c_forward(model, states).qacc for model in (m, own))
    left = np.abs(theirs - exact).max(1) / (1 + np.abs(exact).max(1))
    print(f"\nGymnasium's own solver: qacc wrong by {np.percentile(left, [50, 90, 99])}")
    record_property("qacc of Gymnasium's own solver, median", ("humanoidstandup", float(np.median(left))))
    assert 1e-8 < np.median(left) < 1e-5  # so Gymnasium itself cannot be the reference


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_one_step(visited, integrator, record_property):
    if visited.name == "swimmer" and integrator == "implicitfast":
        with pytest.raises(ValueError, match="fluid or tendon forces with implicitfast"):
            vecsim.step(visited.model, visited.state, visited.ctrl, integrator)
        return
    qpos, qvel = c_step(visited.m, visited.states, integrator)
    # four dynamics in a row cost Runge-Kutta time, so it gets as many pair slots as the states fill and one to spare
    slots = pairs_seen(visited.m, visited.reference.contacts) + 2
    model = vecsim.load_model(visited.m, dtype=torch.float64, pair_slots=slots)
    after, _ = vecsim.step(model, visited.state, visited.ctrl, integrator, 16)
    worst_qpos, worst_qvel = error(after.qpos, qpos), error(after.qvel, qvel)
    record_property(f"qpos after a step of {integrator}", (visited.name, worst_qpos))
    # h times the acceleration's error; Runge-Kutta's later stages see it again
    assert worst_qpos <= 1e-10
    assert worst_qvel <= 1e-9


# ----------------------------------------------------------------------------------------------------------------------
# Trajectories
# ----------------------------------------------------------------------------------------------------------------------

# Growth of a 1e-9 disturbance of qpos over the 100 steps, in MuJoCo itself, tells whether the window is chaotic.
DISTURBANCE = 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_trajectory(name):
    m = gym_model(name)
    m.opt.integrator = INTEGRATORS["euler"]
    n, steps, rng = 8, 100, np.random.default_rng(3)
    d = mujoco.MjData(m)
    start_qpos = np.tile(m.qpos0, (n, 1)) + 0.02 * rng.normal(size=(n, m.nq))
    for row in start_qpos:
        mujoco.mj_normalizeQuat(m, row)
    start_qvel = 0.1 * rng.normal(size=(n, m.nv))
    ctrls = np.array([[random_ctrl(m, rng) for _ in range(n)] for _ in range(steps)])

    def c_rollout(shift):
        rows = []
        for k in range(n):
            mujoco.mj_resetData(m, d)
            d.qpos[:], d.qvel[:] = start_qpos[k], start_qvel[k]
            d.qpos += shift
            for t in range(steps):
                d.ctrl[:] = ctrls[t, k]
                mujoco.mj_step(m, d)
            rows.append(d.qpos.copy())
        return np.array(rows)

    theirs = c_rollout(0.0)
    growth = np.abs(c_rollout(DISTURBANCE) - theirs).max(1) / DISTURBANCE
    model = vecsim.load_model(m, dtype=torch.float64, pair_slots=8)
    state = vecsim.State(last_axis(start_qpos), last_axis(start_qvel), torch.zeros(m.nv, n, dtype=torch.float64))
    for t in range(steps):
        state, _ = vecsim.step(model, state, last_axis(ctrls[t]), "euler", 10)
    difference = np.abs(state.qpos.T.numpy() - theirs).max(1)
    print(f"\n100 steps {name}: error {difference.max():.1e}, growth of a disturbance {growth.max():.1e}")
    # a rounding error of 1e-12 a step (measured 1e-13), grown by what MuJoCo's own trajectory grows
    assert (difference <= 1e-12 * steps * np.maximum(growth, 1)).all()
    assert (difference[growth < 1e3] <= 1e-6).all()


# ----------------------------------------------------------------------------------------------------------------------
# Models that nobody wrote
# ----------------------------------------------------------------------------------------------------------------------


def random_tree(seed):
    """MJCF of a random tree that touches the ground and itself, with every supported feature somewhere."""
    rng = np.random.default_rng(seed)

    def numbers(*values):
        return " ".join(f"{v:.6g}" for v in values)

    def pick(*choices):
        return choices[rng.integers(len(choices))]

    def chance(p):
        return rng.random() < p

    def constraint(prefix=""):
        kind = rng.integers(4)
        text = ""
        if kind == 1:
            text += f' solref{prefix}="{numbers(rng.uniform(0.005, 0.05), rng.uniform(0.5, 1.5))}"'
        elif kind == 2:
            text += f' solref{prefix}="{numbers(-rng.uniform(300, 3000), -rng.uniform(10, 80))}"'
        if chance(0.5):
            low = rng.uniform(0.5, 0.9)
            impedance = low, rng.uniform(low, 0.99), rng.uniform(0.0005, 0.02), rng.uniform(0.2, 0.8), pick(1, 2, 2.7)
            text += f' solimp{prefix}="{numbers(*impedance)}"'
        return text

    def contact():
        text = f' condim="{pick(1, 3)}" friction="{numbers(rng.uniform(0.2, 1.5))} 0.01 0.001"' + constraint()
        text += f' margin="{rng.uniform(0, 0.02):.4f}"' if chance(0.4) else ""
        text += f' solmix="{rng.uniform(0.2, 2):.3f}"' if chance(0.3) else ""
        return text + (f' priority="{pick(1, 2)}"' if chance(0.15) else "")

    def geom(boxes):
        kind = pick("box", "cylinder", "ellipsoid") if boxes and chance(0.25) else pick("capsule", "capsule", "sphere")
        pose = f'pos="{numbers(*rng.uniform(-0.08, 0.08, 3))}" euler="{numbers(*rng.uniform(-90, 90, 3))}"'
        size = {
            "capsule": (rng.uniform(0.03, 0.06), rng.uniform(0.05, 0.15)),
            "sphere": (rng.uniform(0.04, 0.1),),
            "cylinder": (rng.uniform(0.03, 0.1), rng.uniform(0.03, 0.1)),
            "box": tuple(rng.uniform(0.03, 0.1, 3)),
            "ellipsoid": tuple(rng.uniform(0.03, 0.1, 3)),
        }[kind]
        bits = ' contype="2" conaffinity="0"' if kind in ("box", "cylinder", "ellipsoid") else ""  # of the plane alone
        if kind == "capsule" and chance(0.3):
            a = rng.uniform(-0.1, 0.1, 3)
            pose, size = f'fromto="{numbers(*a, *(a + rng.uniform(0.05, 0.2, 3)))}"', size[:1]
        density = f'density="{rng.uniform(300, 2000):.1f}"'
        return f'<geom type="{kind}" size="{numbers(*size)}" {pose}{bits} {density}{contact()}/>'

    joints, actuators = [], []
    names = (f"j{k}" for k in range(1000))

    def joint(kind):
        name = next(names)
        text = f'<joint name="{name}" type="{kind}" pos="{numbers(*rng.uniform(-0.05, 0.05, 3))}"'
        text += f' armature="{rng.uniform(0, 0.05):.4f}" damping="{pick(0.0, rng.uniform(0, 1)):.4f}"'
        text += f' frictionloss="{rng.uniform(0, 1):.4f}"' + constraint("friction") if chance(0.3) else ""
        if kind != "ball":
            text += f' axis="{numbers(*rng.normal(size=3))}"'
            scale = 1.0 if kind == "hinge" else 0.01  # ranges of hinges are degrees
            if chance(0.4):
                text += f' stiffness="{rng.uniform(0, 20):.3f}" springref="{rng.uniform(-30, 30) * scale:.4f}"'
            if chance(0.3):
                text += f' ref="{rng.uniform(-20, 20) * scale:.4f}"'
            if chance(0.6):
                bounds = rng.uniform(-60, -25) * scale, rng.uniform(25, 60) * scale
                text += f' limited="true" range="{numbers(*bounds)}"' + constraint("limit")
                text += f' margin="{rng.uniform(0, 0.05):.4f}"' if chance(0.4) else ""
            if chance(0.3):
                text += f' actuatorfrcrange="{numbers(-rng.uniform(1, 5), rng.uniform(1, 5))}"'
            joints.append(name)
        return text + "/>"

    def body(depth, boxes):
        where = rng.normal(size=3)
        where *= rng.uniform(0.25, 0.4) / np.linalg.norm(where)
        text = f'<body pos="{numbers(*where)}" euler="{numbers(*rng.uniform(-180, 180, 3))}">'
        kinds = pick(["hinge"], ["hinge"], ["slide"], ["ball"], ["hinge", "hinge"], ["slide", "hinge", "hinge"], [])
        text += "".join(joint(kind) for kind in kinds)
        return text + inside(depth, boxes) + "</body>"

    def inside(depth, boxes):
        text = "".join(geom(boxes) for _ in range(rng.integers(1, 3)))
        if chance(0.2):
            full = numbers(*rng.uniform(0.01, 0.012, 3), *rng.uniform(-0.002, 0.002, 3))
            text += f'<inertial pos="{numbers(*rng.uniform(-0.05, 0.05, 3))}" mass="{rng.uniform(0.5, 3):.3f}"'
            text += f' fullinertia="{full}"/>'
        if depth < 3:
            text += "".join(body(depth + 1, boxes) for _ in range(rng.integers(1 if depth < 1 else 0, 3)))
        return text

    world = ""
    boxes = chance(0.5)
    for _ in range(pick(1, 1, 2)):  # one robot, or two that can collide
        base = "<freejoint/>" if chance(0.7) else joint("slide") + joint("hinge")
        pose = f'pos="{numbers(*rng.uniform(-0.4, 0.4, 2), rng.uniform(0.3, 0.5))}"'
        pose += f' euler="{numbers(*rng.uniform(-180, 180, 3))}"'
        world += f"<body {pose}>{base}{inside(0, boxes)}</body>"
    if chance(0.4):
        world += f'<geom type="sphere" size="0.2" pos="{numbers(*rng.uniform(-0.5, 0.5, 2), 0.1)}"{contact()}/>'
    for name in joints:
        drive = pick("motor", "position", "velocity", "general", None)
        limits = f' ctrlrange="-1 1" gear="{rng.uniform(0.5, 3) * pick(-1, 1):.3f}"'
        limits += f' forcerange="{numbers(-rng.uniform(1, 6), rng.uniform(1, 6))}"' if chance(0.5) else ""
        target = f'{pick("joint", "joint", "jointinparent")}="{name}"'
        gains = {
            "motor": "",
            "position": f' kp="{rng.uniform(2, 20):.3f}" kv="{rng.uniform(0, 1):.3f}"',
            "velocity": f' kv="{rng.uniform(0.2, 2):.3f}"',
            "general": f' gainprm="{rng.uniform(1, 5):.3f}" biastype="affine"'
            f' biasprm="{numbers(*rng.uniform(-2, 0, 3))}"',
        }
        if drive:
            actuators.append(f"<{drive} {target}{limits}{gains[drive]}/>")
    gravity = numbers(*rng.uniform(-1, 1, 2), -9.81)
    tilt = numbers(*rng.uniform(-20, 20, 2), 0)
    fluid = (
        f'density="{rng.uniform(1, 500):.1f}" viscosity="{rng.uniform(0, 1):.2f}" wind="{numbers(*rng.normal(size=3))}"'
    )
    return f"""<mujoco><compiler autolimits="true"/>
      <option timestep="{pick(0.002, 0.004)}" gravity="{gravity}" impratio="{pick(1, 1, 3)}" {fluid * (seed % 4 == 0)}/>
      <worldbody>
        <geom type="plane" size="5 5 1" pos="0 0 {rng.uniform(-0.1, 0.1):.3f}" euler="{tilt}" contype="3"
          conaffinity="3"{contact()}/>
        {world}
      </worldbody><actuator>{"".join(actuators)}</actuator></mujoco>"""


@pytest.mark.parametrize("seed", range(20))
def test_random_model(seed):
    m = converged(mujoco.MjModel.from_xml_string(random_tree(seed)))
    states = visit(m, 60, seed, stride=7, episode=210, speed=0.3)
    reference = c_forward(m, states, FIELDS)
    pairs = pairs_seen(m, reference.contacts)
    model = vecsim.load_model(m, dtype=torch.float64, pair_slots=pairs + 1)
    state, ctrl = batch(states)
    worst = assert_dynamics_equal(model, state, vecsim.forward(model, state, ctrl, 14), reference)
    contacts = max(map(len, reference.contacts))
    print(f"\nrandom model {seed}: nv {m.nv}, contacts up to {contacts}, pairs {pairs}, {worst:.1e}")
    # one integrator a seed keeps the time in bounds
    integrator = ("euler", "implicitfast")[seed % 2]
    qpos, qvel = c_step(m, states, integrator)
    after, _ = vecsim.step(model, state, ctrl, integrator, 12)
    assert error(after.qpos, qpos) <= 1e-10
    assert error(after.qvel, qvel) <= 1e-9


# ----------------------------------------------------------------------------------------------------------------------
# Features that Gymnasium's models use little or not at all: 500 states in which each of them acts
# ----------------------------------------------------------------------------------------------------------------------


def thrown(*geoms, world='<geom type="plane" size="5 5 1" euler="4 3 0"/>', option="", more="", height=0.3):
    """MJCF of bodies above each other, each with one geom, that fall onto `world`."""
    bodies = (f'<body pos="0.02 {0.03 * k} {height + 0.4 * k}" euler="{50 * k} 20 0"><freejoint/><geom {geom}/></body>'
              for k, geom in enumerate(geoms))  # fmt: skip
    return f"<mujoco><option {option}/><worldbody>{world}{''.join(bodies)}</worldbody>{more}</mujoco>"


def arm(joint, option=""):
    """MJCF of an arm with a motor, whose first joint and last joint, a ball, have these attributes."""
    return f"""<mujoco>{option}<worldbody><geom type="plane" size="5 5 1"/><body pos="0 0 .3"><freejoint/>
      <geom type="capsule" size=".05 .2"/><body pos="0 0 .2"><joint name="a" axis="0 1 0" range="-20 20" {joint}/>
      <geom type="capsule" size=".04" fromto=".08 0 .03 .22 0 0"/><body pos=".3 0 0"><joint type="ball" {joint}/>
      <geom size=".06"/></body></body></body></worldbody><actuator>
      <motor joint="a" ctrlrange="-2 2" ctrllimited="true"/><position joint="a" kp="5" kv=".5" group="2"/>
      </actuator></mujoco>"""


def chain(more):
    """MJCF of an arm of two hinges and a slide."""
    return f"""<mujoco><compiler autolimits="true" angle="radian"/><worldbody>
      <body><joint name="a" axis="0 1 0" ref=".2"/><geom type="capsule" size=".03" fromto="0 0 0 .3 0 0"/>
      <body pos=".3 0 0"><joint name="b" axis="0 1 1"/><geom type="capsule" size=".03" fromto=".1 0 0 .3 0 0"/>
      <body pos=".3 .2 0"><joint name="c" type="slide" axis="0 0 1" armature=".1"/><geom size=".05"/>
      </body></body></body></worldbody>{more}</mujoco>"""


def touches(kind, other):
    kinds = {int(getattr(mujoco.mjtGeom, f"mjGEOM_{name}")) for name in (kind, other)}
    return lambda m, d: any({*m.geom_type[c.geom].tolist()} == kinds for c in d.contact)


FIXED_CYLINDER = '<geom type="cylinder" size=".3 .2" euler="30 20 0"/>'
HINGED_CYLINDER = (
    '<body euler="10 20 0"><joint type="ball" pos="0 0 -.3"/><geom type="cylinder" size=".3 .2" friction=".5"/></body>'
)
FIXED_BOX, HINGED_BOX = (
    x.replace("cylinder", "box").replace(".3 .2", ".3 .25 .2") for x in (FIXED_CYLINDER, HINGED_CYLINDER)
)
GROUND = '<geom name="g" type="plane" size="5 5 1" contype="0" conaffinity="0"/>'
PAIRS = (
    '<contact><pair geom1="g" geom2="a" margin=".02" gap=".005" friction=".3 .3 0 0 0" solref=".03 1"/>'
    '<pair geom1="a" geom2="b" condim="1" solimp=".8 .9 .01 .4 3"/></contact>'
)
FEATURES = {  # name: MJCF, and whether the feature acts in the state of an mjData after mj_forward
    "joint friction loss": (
        arm('frictionloss=".2" solimpfriction=".8 .9 .01"'),
        lambda m, d: mujoco.mjtConstraint.mjCNSTR_FRICTION_DOF in d.efc_type[: d.nefc],
    ),
    "drag of a fluid with wind": (
        thrown(
            'type="box" size=".1 .2 .3"',
            'type="capsule" size=".1 .2" contype="0" conaffinity="0"',
            option='density="800" viscosity=".3" wind="1 2 3"',
        ),
        lambda m, d: np.abs(d.qfrc_fluid).max() > 1,
    ),
    "plane against cylinder": (thrown('type="cylinder" size=".1 .2"'), touches("PLANE", "CYLINDER")),
    "plane against ellipsoid": (thrown('type="ellipsoid" size=".1 .2 .15"'), touches("PLANE", "ELLIPSOID")),
    "sphere against fixed cylinder": (
        thrown('size=".1"', world=FIXED_CYLINDER, height=0.6),
        touches("SPHERE", "CYLINDER"),
    ),
    "capsule against fixed cylinder": (
        thrown('type="capsule" size=".1 .15"', world=FIXED_CYLINDER, height=0.6),
        touches("CAPSULE", "CYLINDER"),
    ),
    "capsule against moving cylinder": (
        thrown('type="capsule" size=".1 .15"', world=HINGED_CYLINDER, height=0.6),
        touches("CAPSULE", "CYLINDER"),
    ),
    "sphere against fixed box": (thrown('size=".1"', world=FIXED_BOX, height=0.6), touches("SPHERE", "BOX")),
    "sphere against moving box": (thrown('size=".1"', world=HINGED_BOX, height=0.6), touches("SPHERE", "BOX")),
    "box against fixed sphere": (
        thrown('type="box" size=".1 .2 .15"', world='<geom size=".3"/>', height=0.6),
        touches("SPHERE", "BOX"),
    ),
    "explicit pairs with a gap": (
        thrown('name="a" size=".1"', 'name="b" type="capsule" size=".1 .1"', world=GROUND, more=PAIRS),
        lambda m, d: d.ncon > 0,
    ),
    "fixed tendons": (
        chain(
            '<tendon><fixed name="t" stiffness="5" damping=".2" springlength=".1 .3"><joint joint="a" coef="1"/>'
            '<joint joint="b" coef="-2"/></fixed><fixed name="u" limited="true" range="-.2 .1" margin=".02" '
            'solreflimit=".03 1"><joint joint="b" coef=".5"/><joint joint="c" coef="1"/></fixed></tendon>'
            '<actuator><position tendon="t" kp="3" gear="2" ctrlrange="-1 1"/>'
            '<motor joint="c" ctrlrange="-1 1"/></actuator>'
        ),
        lambda m, d: mujoco.mjtConstraint.mjCNSTR_LIMIT_TENDON in d.efc_type[: d.nefc] and d.qfrc_spring.any(),
    ),
    "equalities": (
        chain(
            '<tendon><fixed name="t"><joint joint="b" coef="1"/><joint joint="c" coef="2"/></fixed></tendon>'
            '<equality><joint joint1="a" joint2="b" polycoef=".1 .5 .2 -.3 .1" solref=".05 1"/><tendon tendon1="t"/>'
            '<joint joint1="c" active="false"/></equality>'
        ),
        lambda m, d: d.ne == 2,
    ),
    "gap": (thrown('size=".1" margin=".03" gap=".02"'), lambda m, d: d.ncon > 0),
}


def touching_point(m, d, capsule, cylinder):
    """Where the axis of a capsule comes nearest to a cylinder, m from its middle: bisection of the distance's slope."""
    turn, (radius, half) = d.geom_xmat[cylinder].reshape(3, 3), m.geom_size[cylinder, :2]
    centre, axis = turn.T @ (d.geom_xpos[capsule] - d.geom_xpos[cylinder]), turn.T @ d.geom_xmat[capsule, 2::3]
    low, high = -m.geom_size[capsule, 1], m.geom_size[capsule, 1]
    for _ in range(60):
        place = 0.5 * (low + high)
        x, y, z = centre + place * axis
        outside = max(math.hypot(x, y) - radius, 0), max(abs(z) - half, 0)
        slope = outside[0] * (x * axis[0] + y * axis[1]) / math.hypot(x, y) + outside[1] * math.copysign(
            axis[2], axis[2] * z
        )
        low, high = (place, high) if slope < 0 else (low, place)
    return place


def by_formula(m, states):
    """A model and `change` for `c_forward` and `c_step`, in which MuJoCo collides cylinders by a formula.

    MuJoCo finds the contact of a capsule with a cylinder by iterations that end when the distance no longer changes.
    The distance is then exact, but the normal only to about the root of the rounding error. A sphere at the capsule's
    nearest point has the same contact with the cylinder, and MuJoCo has a formula for it.
    """
    capsules, cylinders = (np.flatnonzero(m.geom_type == kind) for kind in (CAPSULE, CYLINDER))
    if not len(capsules) or not len(cylinders):
        return m, None
    m, sphere, d = copy.copy(m), copy.copy(m), mujoco.MjData(m)
    sphere.geom_type[capsules], sphere.geom_sameframe[capsules] = mujoco.mjtGeom.mjGEOM_SPHERE, 0

    def change(_, k):
        d.qpos[:] = states.qpos[k]
        mujoco.mj_kinematics(m, d)
        sphere.geom_pos[capsules[0], 2] = touching_point(m, d, capsules[0], cylinders[0])

    return sphere, change


CAPSULE, CYLINDER = mujoco.mjtGeom.mjGEOM_CAPSULE, mujoco.mjtGeom.mjGEOM_CYLINDER


@pytest.mark.parametrize("name", FEATURES)
def test_feature(name, record_property):
    mjcf, acts = FEATURES[name]
    m = converged(mujoco.MjModel.from_xml_string(mjcf))
    m.opt.ccd_tolerance, m.opt.ccd_iterations = 1e-12, 500
    m.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_MULTICCD  # one contact of a capsule with a cylinder, as here
    states = visit(m, 500, stride=1, episode=300, acts=acts)
    state, ctrl = batch(states)
    model = vecsim.load_model(m, dtype=torch.float64)
    qacc = vecsim.forward(model, state, ctrl, ITERATIONS).solution.qacc
    exact, change = by_formula(m, states)
    worst = error(qacc, c_forward(exact, states, change=change).qacc)
    record_property("qacc", (name, worst))
    assert worst <= 1e-9  # as for Gymnasium's models
    assert error(qacc, c_forward(m, states).qacc) <= (1e-3 if change else 1e-9)
    qpos, qvel = c_step(exact, states, "euler", change)
    after, _ = vecsim.step(model, state, ctrl, "euler", ITERATIONS)
    assert error(after.qpos, qpos) <= 1e-10 and error(after.qvel, qvel) <= 1e-9


FLAGS = (
    "constraint equality frictionloss limit contact spring damper gravity clampctrl warmstart filterparent actuation"
)
FLAGS = [*FLAGS.split(), "refsafe", "sensor", "midphase", "eulerdamp", "nativeccd", "multiccd", "island", "autoreset"]
NO_EFFECT = {"equality", "warmstart", "sensor", "midphase", "nativeccd", "multiccd", "island", "autoreset"}


@pytest.mark.parametrize("flag", [*FLAGS, "springs and dampers", "group"])
def test_disabled_features(flag):
    """What an option flag of MuJoCo switches off is off here too, under Euler and implicitfast."""
    off = {"springs and dampers": '<flag spring="disable" damper="disable"/>', "group": ""}
    option = off.get(flag, f'<flag {flag}="disable"/>')
    option = (
        f'<option timestep=".02" {"actuatorgroupdisable=" + repr("2") if flag == "group" else ""}>{option}</option>'
    )
    mjcf = arm('frictionloss=".2" damping=".02" solreflimit=".03 1"', option).replace(
        ' range="', ' stiffness=".5" limited="true" range="'
    )
    m = converged(mujoco.MjModel.from_xml_string(mjcf))
    states, model = visit(m, 100, stride=2), vecsim.load_model(m, dtype=torch.float64)
    (state, ctrl), reference = batch(states), c_forward(m, states).qacc
    assert error(vecsim.forward(model, state, ctrl, ITERATIONS).solution.qacc, reference) <= 1e-9
    plain, changed = mujoco.MjModel.from_xml_string(mjcf), False
    plain.opt.disableflags = plain.opt.disableactuator = 0
    for integrator in ("euler", "implicitfast"):
        qpos, qvel = c_step(m, states, integrator)
        after, _ = vecsim.step(model, state, ctrl, integrator, ITERATIONS)
        assert error(after.qpos, qpos) <= 1e-10 and error(after.qvel, qvel) <= 1e-9
        changed |= np.abs(c_step(converged(plain), states, integrator)[1] - qvel).max() > 1e-3
    assert changed == (flag not in NO_EFFECT)


# ----------------------------------------------------------------------------------------------------------------------
# Integration of fast rotations
# ----------------------------------------------------------------------------------------------------------------------

SPINNING = """<mujoco><option timestep="0.005" gravity="0 0 0" integrator="RK4"/><worldbody><body>
  <freejoint/><geom type="capsule" size=".05 .2" contype="0" conaffinity="0"/>
  <body pos=".1 .2 .3"><joint type="ball" pos=".05 0 .1"/>
    <geom type="capsule" size=".04 .15" pos=".1 0 0" euler="20 30 40" contype="0" conaffinity="0"/></body>
</body></worldbody></mujoco>"""


@pytest.mark.parametrize("turn", [0.0, 0.01, 0.1, 0.3])
def test_fast_rotation(turn):
    """`turn` rad per timestep. MuJoCo's chart has the inverse of the exponential's derivative in closed form.

    Past half a turn a stage MuJoCo takes the short way round; at such speeds neither answer means anything.
    """
    m = converged(mujoco.MjModel.from_xml_string(SPINNING))
    n, rng = 50, np.random.default_rng(5)
    qpos = rng.normal(size=(n, m.nq))
    for row in qpos:
        mujoco.mj_normalizeQuat(m, row)
    qvel = rng.normal(size=(n, m.nv))
    for dof in (3, 6):
        spin = qvel[:, dof : dof + 3]
        spin *= turn / m.opt.timestep / np.linalg.norm(spin, axis=1, keepdims=True)
    states = SimpleNamespace(qpos=qpos, qvel=qvel, warmstart=0 * qvel, ctrl=np.zeros((n, 0)))
    model = vecsim.load_model(m, dtype=torch.float64)
    state, ctrl = batch(states)
    for _ in range(3):
        states.qpos, states.qvel = c_step(m, states, "rk4")
        state, _ = vecsim.step(model, state, ctrl, "rk4", 2)
        worst = max(error(state.qpos, states.qpos), error(state.qvel, states.qvel))
        print(f"\n{turn} rad a step: {worst:.1e}")
        assert worst <= 1e-10  # rounding; a truncated series shows from 0.1 rad on
        state = vecsim.State(last_axis(states.qpos), last_axis(states.qvel), state.warmstart)


# ----------------------------------------------------------------------------------------------------------------------
# Conservation laws and closed forms: these need no MuJoCo to be true
# ----------------------------------------------------------------------------------------------------------------------

CHAIN = """<mujoco><option timestep="0.002" integrator="RK4"/>
<default><geom contype="0" conaffinity="0"/></default><worldbody>
  <body><joint axis="0 1 0"/><geom type="capsule" size=".03" fromto="0 0 0 0 0 -.4"/>
    <body pos="0 0 -.4"><joint axis="1 .3 0"/><geom type="capsule" size=".03" fromto="0 0 0 .1 0 -.3"/>
      <body pos=".1 0 -.3"><joint type="ball"/><geom type="sphere" size=".06" pos="0 .1 -.2"/>
</body></body></body></worldbody></mujoco>"""


def energy(model, m, state):
    """Kinetic plus potential energy (N,) from link masses alone."""
    xpos, xmat = vecsim.kinematics(model, state.qpos)
    smooth = vecsim.smooth_dynamics(model, state.qpos, state.qvel, state.qpos.new_zeros(m.nu, state.qpos.shape[1]))
    kinetic = 0.5 * vecsim.inner(
        model, smooth.inertia, *[vecsim.Iterate(state.qvel, smooth.cvel, vecsim.Rows(*(torch.zeros(1),) * 3))] * 2
    )
    com = xpos + vecsim.apply(xmat, model.com)
    return kinetic - (model.mass * (com * model.gravity).sum(1)).sum(0)


@pytest.mark.slow
def test_energy_of_a_pendulum_chain():
    m = mujoco.MjModel.from_xml_string(CHAIN)
    model = vecsim.load_model(m, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    qpos = 0.5 * torch.randn(m.nq, 8, dtype=torch.float64, generator=generator)
    qpos[2] += 1
    qpos[2:6] /= qpos[2:6].norm(dim=0)
    qvel = 0.5 * torch.randn(m.nv, 8, dtype=torch.float64, generator=generator)
    state = vecsim.State(qpos, qvel, torch.zeros_like(qvel))
    ctrl = torch.zeros(0, 8, dtype=torch.float64)
    before = energy(model, m, state)
    swing = torch.zeros(8, dtype=torch.float64)
    first = state.qpos
    for _ in range(250):
        state, _ = vecsim.step(model, state, ctrl, "rk4", 1)
        swing = torch.maximum(swing, (state.qpos - first).abs().amax(0))
    assert (swing > 0.3).all()  # rad: they do swing
    drift = ((energy(model, m, state) - before).abs() / (1 + before.abs())).max()
    print(f"\nenergy over 0.5 s: {drift:.1e}")
    assert drift <= 1e-6  # the order of the method leaves 1e-10 at this timestep


FLOATING = """<mujoco><option timestep="0.002" gravity="0 0 0" integrator="RK4"/><default><geom condim="1"/></default>
<worldbody><body>
  <freejoint/><geom type="sphere" size=".1"/>
  <body pos=".2 0 0"><joint name="a" axis="0 1 0" damping=".1"/><geom type="capsule" size=".04" fromto="0 0 0 .3 0 0"/>
    <body pos=".3 0 0"><joint name="b" axis="0 .5 1" range="-20 20" limited="true"/>
      <geom type="capsule" size=".03" fromto=".1 0 0 .3 0 0"/></body></body>
  <body pos="-.2 0 0"><joint name="c" type="slide" axis="0 0 1" stiffness="20"/><geom type="sphere" size=".07"/></body>
  <body pos="0 .13 0"><joint type="ball"/><geom type="capsule" size=".03" fromto="0 0 0 0 .3 0"/>
    <body pos="-.1 .1 .0"><joint type="slide" axis="0 -1 0"/><geom type="sphere" size=".06"/></body></body>
</body></worldbody>
<actuator><motor joint="a"/><motor joint="b" gear=".5"/><motor joint="c" gear="5"/></actuator></mujoco>"""


def momentum(model, state):
    """Linear and angular momentum about the world's origin, (6, N)."""
    xpos, xmat = vecsim.kinematics(model, state.qpos)
    origin = torch.zeros_like(xpos[0])
    cdof = vecsim.motion_subspace(model, xpos, xmat, origin)
    inertia = vecsim.spatial_inertia(model, xpos, xmat, origin)
    return vecsim.apply_symmetric(inertia, vecsim.link_motion(model, cdof, state.qvel)).sum(0)


@pytest.mark.slow
def test_momentum_of_a_floating_robot():
    """Motors, springs, dampers, limits and self-contacts are internal: they change no momentum."""
    m = mujoco.MjModel.from_xml_string(FLOATING)
    model = vecsim.load_model(m, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    n = 16
    state = vecsim.State(
        model.qpos0.repeat(1, n),
        torch.randn(m.nv, n, dtype=torch.float64, generator=generator),
        torch.zeros(m.nv, n, dtype=torch.float64),
    )
    before = momentum(model, state)
    pushed = 0
    for _ in range(60):
        ctrl = torch.randn(m.nu, n, dtype=torch.float64, generator=generator)
        state, dynamics = vecsim.step(model, state, ctrl, "rk4", 6)
        force = vecsim.constraint_force(model, dynamics)
        pushed += int((force.abs().amax(0) > 1e-3).sum())
        assert force[:3].abs().max() <= 1e-9  # N: action equals reaction, to the rounding of forces of some 100 N
    assert pushed > 50  # constraints did act
    drift = ((momentum(model, state) - before).abs().amax(0) / (1 + before.abs().amax(0))).max()
    print(f"\nmomentum over 0.12 s: {drift:.1e}")
    # only the integrator's truncation: h^4 where the motion is smooth, less where a constraint switches on in a step
    assert drift <= 1e-6


def test_free_fall_and_spring():
    """A thrown ball and a mass on a damped spring against their formulas."""
    xml = """<mujoco><option timestep="0.002" integrator="RK4"/><worldbody>
      <body><freejoint/><geom type="sphere" size=".1" mass="2" contype="0" conaffinity="0"/></body>
      <body><joint type="slide" axis="1 0 0" stiffness="50" damping="1"/>
        <geom type="sphere" size=".1" mass="2" contype="0" conaffinity="0"/></body>
    </worldbody></mujoco>"""
    model = vecsim.load_model(xml, dtype=torch.float64)
    qpos, qvel = model.qpos0.clone(), torch.zeros(7, 1, dtype=torch.float64)
    qvel[:6, 0] = torch.tensor([1.0, -2.0, 3.0, 4.0, 5.0, 6.0])
    qpos[7] = 0.3
    state = vecsim.State(qpos, qvel, torch.zeros_like(qvel))
    for _ in range(125):
        state, _ = vecsim.step(model, state, torch.zeros(0, 1, dtype=torch.float64), "rk4", 1)
    t, decay = 0.25, 0.25
    omega = math.sqrt(25 - decay**2)
    spring = 0.3 * math.exp(-decay * t) * (math.cos(omega * t) + decay / omega * math.sin(omega * t))
    # a sphere spins at a constant rate, so the rotation is exp(w t); truncation of the spring is 1e-10
    w = torch.tensor([[4.0], [5.0], [6.0]], dtype=torch.float64) * t
    expected = torch.cat(
        (torch.tensor([[t], [-2 * t], [3 * t - 0.5 * 9.81 * t * t]], dtype=torch.float64), vecsim.quat_exponential(w))
    )
    expected[3:] *= torch.sign((expected[3:] * state.qpos[3:7]).sum())
    assert (state.qpos[:7] - expected).abs().max() <= 1e-12 * 125
    assert abs(float(state.qpos[7]) - spring) <= 1e-9


# ----------------------------------------------------------------------------------------------------------------------
# Gradients
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("env_id", ["Hopper-v5", "Ant-v5"])
def test_gradient_of_a_return(env_id):
    """d(return of 10 steps) / d(actions), robots that stand or lie on the ground, against central differences."""
    task = vecsim.TASKS[env_id]()
    m = converged(mujoco.MjModel.from_xml_path(str(ASSETS / task.xml_file)))
    model = vecsim.load_model(m, dtype=torch.float64, pair_slots=1)
    steps, starts, rng = 10, 3, np.random.default_rng(0)
    d = mujoco.MjData(m)
    kept = []
    for _ in range(starts):
        mujoco.mj_resetData(m, d)
        for t in range(1000):  # until it has landed and rests on something
            d.ctrl[:] = 0.1 * random_ctrl(m, rng)
            mujoco.mj_step(m, d)
            if t >= 250 and d.ncon >= 2:
                break
        assert d.ncon >= 2
        kept.append((d.qpos.copy(), d.qvel.copy(), d.qacc_warmstart.copy()))
    qpos, qvel, warmstart = (np.array(column) for column in zip(*kept, strict=True))
    actions = 0.3 * torch.tensor(rng.uniform(-1, 1, (steps, m.nu, starts)))

    def total(actions, state):
        """Return (N,) of actions (steps, nu, N): distance, speed and control cost."""
        result = 0
        for action in actions:
            before = state.qpos[0]
            state, _ = vecsim.step(model, state, action, "euler", 10)
            result = result + (state.qpos[0] - before) / model.timestep - 0.05 * (action**2).sum(0)
            result = result - 0.1 * (state.qvel**2).sum(0)
        return result

    start = vecsim.State(*map(last_axis, (qpos, qvel, warmstart)))
    leaf = actions.clone().requires_grad_()
    total(leaf, start).sum().backward()
    assert torch.isfinite(leaf.grad).all()

    count = steps * m.nu

    def differences(size):
        shifts = torch.eye(count, dtype=torch.float64).view(count, steps, m.nu).permute(1, 2, 0)  # (steps, nu, count)
        shifts = size * torch.cat((shifts, -shifts), -1)
        out = []
        for k in range(starts):
            shifted = actions[..., k : k + 1] + shifts
            repeated = vecsim.State(*(x[:, k : k + 1].expand(-1, 2 * count) for x in start))
            up, down = total(shifted, repeated).view(2, count)
            out.append(((up - down) / (2 * size)).view(steps, m.nu))
        return torch.stack(out, -1)

    with torch.no_grad():
        numeric = differences(1e-5)
        coarse = differences(4e-5)
    scale = numeric.abs().amax((0, 1))
    # where two sizes of difference disagree, a contact switches in between and there is no derivative to compare
    smooth = (coarse - numeric).abs().amax((0, 1)) <= 1e-6 * scale
    relative = (leaf.grad - numeric).abs().amax((0, 1)) / scale
    print(f"\ngradient {env_id}: {relative.tolist()}, smooth {smooth.tolist()}")
    assert smooth.sum() >= 2
    # central differences: rounding 1e-15 / 1e-5 times the size of the return, truncation 1e-10
    assert (relative[smooth] <= 1e-6).all()


def test_gradient_is_finite_at_singular_points():
    """At rest, at zero rotation, limbs aligned and touching nothing: square roots of zero everywhere."""
    m = mujoco.MjModel.from_xml_string(FLOATING)
    model = vecsim.load_model(m, dtype=torch.float64)
    qpos = model.qpos0.clone().requires_grad_()
    qvel = torch.zeros(m.nv, 1, dtype=torch.float64, requires_grad=True)
    ctrl = torch.zeros(m.nu, 1, dtype=torch.float64, requires_grad=True)
    for integrator in INTEGRATORS:
        state = vecsim.State(qpos, qvel, torch.zeros_like(qvel).detach())
        state, _ = vecsim.step(model, state, ctrl, integrator, 4)
        for gradient in torch.autograd.grad((state.qpos.sum() + state.qvel.sum()), (qpos, qvel, ctrl)):
            assert torch.isfinite(gradient).all(), integrator


# ----------------------------------------------------------------------------------------------------------------------
# What is refused
# ----------------------------------------------------------------------------------------------------------------------

BALL = '<body><freejoint/><geom size=".1"/></body>'
ARM = '<body name="arm"><joint name="j"/><geom size=".1"/></body>'
REFUSED = {
    "weld": (
        f'<worldbody>{ARM}</worldbody><equality><weld body1="arm"/></equality>',
        "equality constraints other than",
    ),
    "spatial tendon": (
        '<worldbody><site name="w"/><body><joint/><geom size=".1"/><site name="s"/></body></worldbody>'
        '<tendon><spatial stiffness="1"><site site="w"/><site site="s"/></spatial></tendon>',
        "spatial tendons",
    ),
    "tendon": (
        f'<worldbody>{ARM}</worldbody><tendon><fixed armature="1"><joint joint="j" coef="1"/></fixed></tendon>',
        "tendons with armature",
    ),
    "pair": (
        '<worldbody><geom name="g" type="plane" size="1 1 1"/><body><freejoint/><geom name="b" size=".1"/></body>'
        '</worldbody><contact><pair geom1="g" geom2="b" friction="1 2 0 0 0"/></contact>',
        "explicit contact pairs .* two friction coefficients",
    ),
    "gravcomp": ('<worldbody><body gravcomp="1"><joint/><geom size=".1"/></body></worldbody>', "gravity compensation"),
    "ball stiffness": (
        '<worldbody><body><joint type="ball" stiffness="1"/><geom size=".1"/></body></worldbody>',
        "stiffness on free and ball joints",
    ),
    "ball limit": (
        '<worldbody><body><joint type="ball" limited="true" range="0 30"/><geom size=".1"/></body></worldbody>',
        "limits on free and ball joints",
    ),
    "elliptic": (f'<option cone="elliptic"/><worldbody>{ARM}</worldbody>', "elliptic"),
    "ellipsoid in a fluid": (
        '<option density="1"/><worldbody><body><joint/><geom size=".1" fluidshape="ellipsoid"/></body></worldbody>',
        "fluid forces on ellipsoids",
    ),
    "flag": (f'<option><flag override="enable"/></option><worldbody>{ARM}</worldbody>', "option flags override"),
    "noslip": (f'<option noslip_iterations="3"/><worldbody>{ARM}</worldbody>', "noslip"),
    "integrator": (f'<option integrator="implicit"/><worldbody>{ARM}</worldbody>', "integrator implicit"),
    "adhesion": (
        '<worldbody><geom name="g" type="plane" size="1 1 1"/><body><freejoint/><geom name="b" size=".1"/></body>'
        '</worldbody><contact><pair geom1="g" geom2="b" adhesion="5"/></contact>',
        "adhesion",
    ),
    "plastic tendon": (
        f'<worldbody>{ARM}</worldbody><tendon><fixed stiffness="5" springyield=".1"><joint joint="j" coef="1"/></fixed>'
        "</tendon>",
        "plastic springs",
    ),
    "no joints": ('<worldbody><geom size=".1"/></worldbody>', "no joints"),
    "condim": (
        '<worldbody><geom type="plane" size="1 1 1" condim="6"/>' + BALL + "</worldbody>",
        "condim 6",
    ),
    "a capsule and a box": (
        '<worldbody><geom type="box" size="1 1 1"/>'
        '<body pos="0 0 3"><freejoint/><geom type="capsule" size=".1 .1"/></body></worldbody>',
        "collision of geom",
    ),
    "ellipsoid": (
        '<worldbody><geom size=".1"/>'
        '<body><freejoint/><geom name="egg" type="ellipsoid" size=".1 .2 .3"/></body></worldbody>',
        "collision of geom .*egg",
    ),
    "cylinders": (
        '<worldbody><geom type="cylinder" size="1 1"/>'
        '<body><freejoint/><geom name="can" type="cylinder" size=".1 .2"/></body></worldbody>',
        "collision of geom .*can",
    ),
    "activation": (
        f'<worldbody>{ARM}</worldbody><actuator><general joint="j" dyntype="integrator"/></actuator>',
        "activation",
    ),
    "site transmission": (
        '<worldbody><body><joint/><geom size=".1"/><site name="s"/></body></worldbody>'
        '<actuator><motor site="s"/></actuator>',
        "transmissions",
    ),
    "actuator on a ball joint": (
        '<worldbody><body><joint name="b" type="ball"/><geom size=".1"/></body></worldbody>'
        '<actuator><motor joint="b" gear="1 0 0"/></actuator>',
        "actuators on free and ball joints",
    ),
    "muscle": (f'<worldbody>{ARM}</worldbody><actuator><muscle joint="j" lengthrange="0 1"/></actuator>', "actuator"),
    "affine gain": (
        f'<worldbody>{ARM}</worldbody><actuator><general joint="j" gaintype="affine" gainprm="1 1"/></actuator>',
        "gain types",
    ),
    "not MJCF": ("<worldbody><body>", "does not compile"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_features_are_named(case):
    mjcf, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        vecsim.load_model(f"<mujoco>{mjcf}</mujoco>")


def test_warnings_of_mujoco_are_pythons(tmp_path, monkeypatch, recwarn):
    """Gymnasium's half_cheetah.xml loads silently. No warning goes to a file in the working folder."""
    monkeypatch.chdir(tmp_path)
    vecsim.load_model(ASSETS / "half_cheetah.xml")
    assert not list(recwarn) and not list(tmp_path.iterdir())


def test_supported_neighbours_of_refused_features():
    """Tendons without effect, geoms that collide with nothing, and exclusions load."""
    xml = f"""<mujoco><worldbody>{ARM}
      <body name="other" pos="0 0 5"><freejoint/><geom type="cylinder" size=".1 .1"/></body>
      </worldbody><contact><exclude body1="arm" body2="other"/></contact>
      <tendon><fixed><joint joint="j" coef="1"/></fixed></tendon></mujoco>"""
    assert vecsim.load_model(xml).nv == 7
    with pytest.raises(ValueError, match="pair_slots must be at least 1"):
        vecsim.load_model(xml, pair_slots=0)


def test_a_robot_that_walked_far_is_as_exact():
    """In float32. Its first link moves up and down only, as in dm_control's walker, and stays behind."""
    model = vecsim.load_model("""<mujoco><worldbody><geom type="plane" size="5 5 1"/><body pos="0 0 1">
      <joint type="slide" axis="0 0 1"/><joint type="slide" axis="1 0 0"/><joint axis="0 1 0"/>
      <geom type="capsule" size=".05" fromto="0 0 .3 0 0 -.3"/><body pos="0 0 -.3">
      <joint axis="0 1 0"/><geom type="capsule" size=".05" fromto="0 0 0 .1 0 -.4"/></body></body>
      </worldbody></mujoco>""")
    qpos = torch.tensor([[-0.26] * 3, [0.0, 30.0, 100.0], [0.1] * 3, [0.2] * 3])
    qvel = torch.tensor([0.1, 1.0, -2.0, 3.0])[:, None].expand(-1, 3)
    state = vecsim.State(qpos, qvel, torch.zeros_like(qvel))
    dynamics = vecsim.forward(model, state, torch.zeros(0, 3), 8)
    qacc = dynamics.solution.qacc
    assert (vecsim.normal_forces(dynamics).sum(0) > 1.0).all()
    assert ((qacc - qacc[:, :1]).abs() / (1 + qacc.abs().max())).max() <= 1e-3


# ----------------------------------------------------------------------------------------------------------------------
# Corners of the contact model, each against C in float64
# ----------------------------------------------------------------------------------------------------------------------

CORNERS = {
    "a ball whose centre is inside a box": (
        '<geom type="box" size=".3 .2 .25" euler="30 20 0"/>'
        '<body pos=".05 .04 .1"><freejoint/><geom size=".1"/></body>',
        [0.2, 0.5, -1.0, 0, 0, 0],
    ),
    "a ball in the middle of a box": (
        '<geom type="box" size=".3 .2 .2"/><body><freejoint/><geom size=".1"/></body>',
        [0.2, 0.5, -1.0, 0, 0, 0],
    ),
    "a ball above the edge of two stairs": (
        '<geom type="box" size=".3 1 .1" pos="0 0 .1"/><geom type="box" size=".3 1 .1" pos=".3 0 .3"/>'
        '<body pos="-.05 0 .28"><freejoint/><geom size=".1" friction=".5"/></body>',
        [0.7, 0.2, -1.0, 0, 3.0, 0],
    ),
    "an upright cylinder": (
        '<geom type="plane" size="5 5 1"/><body pos="0 0 .19"><freejoint/><geom type="cylinder" size=".1 .2"/></body>',
        [0.2, 0.5, 0, 0, 0, 1.0],
    ),
    "friction zero is mjMINMU": (
        '<geom type="plane" size="5 5 1" friction="0 0 0"/><body pos="0 0 .09"><freejoint/>'
        '<geom type="sphere" size=".1" friction="0 0 0"/></body>',
        [1.0, 0, 0, 0, 0, 0],
    ),
    "a static obstacle": (
        '<geom type="capsule" size=".1" fromto="-1 0 0 1 0 0"/><body pos="0 .02 .19"><freejoint/>'
        '<geom type="sphere" size=".1"/></body>',
        [0.3, 0, -0.1, 0, 0, 0],
    ),
    "coinciding centres": (
        '<geom type="sphere" size=".1"/><body><freejoint/><geom type="sphere" size=".1"/></body>',
        [0.0, 0, 0, 0, 0, 0],
    ),
    "a capsule all but upright": (
        '<geom type="plane" size="5 5 1"/><body pos="0 0 .29" euler=".0000005 0 0"><freejoint/>'
        '<geom type="capsule" size=".1 .2"/></body>',
        [0.2, 0.5, 0, 0, 0, 0],
    ),
}


@pytest.mark.parametrize("case", CORNERS)
def test_corner_of_the_contact_model(case):
    world, velocity = CORNERS[case]
    m = converged(mujoco.MjModel.from_xml_string(f"<mujoco><worldbody>{world}</worldbody></mujoco>"))
    data = mujoco.MjData(m)
    data.qvel[:] = velocity
    mujoco.mj_forward(m, data)
    assert data.ncon
    model = vecsim.load_model(m, dtype=torch.float64, self_collision=False)  # obstacles of the world still collide
    state = vecsim.State(*(torch.tensor(x)[:, None] for x in (data.qpos, data.qvel, 0 * data.qvel)))
    qacc = vecsim.forward(model, state, torch.zeros(0, 1, dtype=torch.float64), 20).solution.qacc[:, 0]
    # the solver stops on its own arithmetic: forces of up to 1e3 N, so 1e-9 relative
    assert np.abs(qacc.numpy() - data.qacc).max() <= 1e-9 * (1 + np.abs(data.qacc).max())


def folded_humanoids(count):
    """qpos (count, nq) of humanoids in the air that touch themselves 10 to 12 times, and how often (count,)."""
    m, rng = gym_model("humanoid"), np.random.default_rng(0)
    d, rows, contacts = mujoco.MjData(m), [], []
    low, high = m.jnt_range[1:].T
    while len(rows) < count:
        mujoco.mj_resetData(m, d)
        d.qpos[2], d.qpos[7:] = 5, low + (high - low) * rng.uniform(-0.25, 1.25, m.nq - 7)
        mujoco.mj_fwdPosition(m, d)
        if 10 <= d.ncon <= 12:
            rows.append(d.qpos.copy()), contacts.append(d.ncon)
    return np.array(rows), np.array(contacts)


def test_twelve_self_contacts():
    m = gym_model("humanoid")
    qpos, counts = folded_humanoids(9)
    zero = np.zeros((9, m.nv))
    states = SimpleNamespace(qpos=qpos, qvel=zero, warmstart=zero, ctrl=np.zeros((9, m.nu)))
    reference = c_forward(m, states).qacc
    state, ctrl = batch(states)
    assert counts.min() >= 10
    model = vecsim.load_model(m, dtype=torch.float64, pair_slots=12)
    dynamics = vecsim.forward(model, state, ctrl, ITERATIONS)
    assert error(dynamics.solution.qacc, reference) <= 1e-9  # rounding, as for the other states of these models
    assert not dynamics.smooth.constraints.dropped.any()
    model = vecsim.load_model(m, dtype=torch.float64)
    dynamics = vecsim.forward(model, state, ctrl, ITERATIONS)
    assert model.pair_slots == 8 and error(dynamics.solution.qacc, reference) > 0.1
    assert dynamics.smooth.constraints.dropped.tolist() == (counts - 8).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_deepest_pairs_are_chosen(dtype):
    """Numbers that are equal, of both signs, zero, infinite or not a number: always as many different rows."""
    values = torch.randn(109, 50, dtype=dtype, generator=torch.Generator().manual_seed(0))
    values[:, 1] = values[:, 1].round()
    values[:, 2], values[3:, 3], values[5:, 4] = -0.5, math.inf, math.nan
    rows = vecsim.smallest(values, 8)
    assert rows.shape == (8, 50) and all(len(column.unique()) == 8 for column in rows.T)
    assert (rows >= 0).all() and (rows < 109).all()
    exact = values.sort(0)[0][:8]
    torch.testing.assert_close(values.gather(0, rows)[:, :4], exact[:, :4], rtol=1e-4, atol=0)


def test_contacts_with_fixed_balls_are_never_dropped():
    """Twelve balls, each pressed 5 mm into a ball of the world: MuJoCo accelerates every one upwards."""
    world = "".join(
        f'<geom size=".1" pos="{k} 0 0"/><body pos="{k} 0 .195"><freejoint/><geom size=".1"/></body>' for k in range(12)
    )
    m = converged(mujoco.MjModel.from_xml_string(f"<mujoco><worldbody>{world}</worldbody></mujoco>"))
    d = mujoco.MjData(m)
    mujoco.mj_forward(m, d)
    assert d.ncon == 12 and (d.qacc[2::6] > 10).all()
    for options in ({}, {"pair_slots": 1}, {"self_collision": False}):
        model = vecsim.load_model(m, dtype=torch.float64, **options)
        state = vecsim.State(*(torch.tensor(x)[:, None] for x in (d.qpos, d.qvel, 0 * d.qvel)))
        dynamics = vecsim.forward(model, state, torch.zeros(0, 1, dtype=torch.float64), 12)
        assert np.abs(dynamics.solution.qacc[:, 0].numpy() - d.qacc).max() <= 1e-9 * (1 + np.abs(d.qacc).max())
        assert dynamics.smooth.constraints.dropped.tolist() == [0]


@pytest.mark.parametrize("swap", [False, True])
def test_forces_between_a_robot_and_a_fixed_body(swap):
    """Either geom may come first: the sphere does, and of two spheres that with the lower number."""
    fixed = '<body pos="0 0 .1"><geom type="capsule" size=".1" fromto="-.3 0 0 .3 .1 0"/></body>'
    ball = '<body pos=".1 .03 .29"><freejoint/><geom type="sphere" size=".1"/></body>'
    if swap:
        fixed = fixed.replace('type="capsule" size=".1" fromto="-.3 0 0 .3 .1 0"', 'type="sphere" size=".12"')
    m = converged(mujoco.MjModel.from_xml_string(f"<mujoco><worldbody>{fixed}{ball}</worldbody></mujoco>"))
    d = mujoco.MjData(m)
    d.qvel[:] = 0.3, -0.2, -0.5, 1, 2, 3
    mujoco.mj_forward(m, d)
    mujoco.mj_rnePostConstraint(m, d)
    assert d.ncon == 1
    model = vecsim.load_model(m, dtype=torch.float64)
    state = vecsim.State(*(torch.tensor(x)[:, None] for x in (d.qpos, d.qvel, 0 * d.qvel)))
    dynamics = vecsim.forward(model, state, torch.zeros(0, 1, dtype=torch.float64), 12)
    wrench = vecsim.contact_wrenches(model, dynamics, torch.tensor(d.subtree_com[2])[:, None])[..., 0].numpy()
    scale = np.abs(d.cfrc_ext).max()
    assert scale > 1 and np.abs(dynamics.solution.qacc[:, 0].numpy() - d.qacc).max() <= 1e-9 * np.abs(d.qacc).max()
    assert np.abs(wrench[1] - d.cfrc_ext[2]).max() <= 1e-9 * scale
    assert np.abs(wrench[0, 3:] - d.cfrc_ext[1, 3:]).max() <= 1e-9 * scale  # its torque is about another point


def test_every_reference_has_a_dense_jacobian():
    """MuJoCo 4.0.0 factorises sparse ones wrongly, see `benchmarks.simulator.converged`."""
    for name in ("states", "common"):  # MuJoCo C takes its model from common
        source = Path(vecsim.__file__).parent / "benchmarks" / "sim" / f"{name}.py"
        assert "opt.jacobian = mujoco.mjtJacobian.mjJAC_DENSE" in source.read_text(), name
    pendulum = mujoco.MjModel.from_xml_path(str(ASSETS / "inverted_pendulum.xml"))
    assert pendulum.opt.jacobian == mujoco.mjtJacobian.mjJAC_AUTO
    for dense in (simulator.converged(pendulum), converged(pendulum)):
        assert dense.opt.jacobian == mujoco.mjtJacobian.mjJAC_DENSE


def test_step_refuses_what_it_does_not_know():
    model = vecsim.load_model("<mujoco><worldbody><body><joint/><geom size='.1'/></body></worldbody></mujoco>")
    state = vecsim.State(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2))
    for options, message in (({"integrator": "RK4"}, "unknown integrator"), ({"iterations": 0}, "iterations must be")):
        with pytest.raises(ValueError, match=message):
            vecsim.step(model, state, torch.zeros(0, 2), **options)
    thrown = "<mujoco><worldbody><body><freejoint/><geom {}/></body></worldbody></mujoco>"
    state = vecsim.State(torch.eye(7)[3:4].T, torch.zeros(6, 1), torch.zeros(6, 1))
    for geom in ('size=".1" pos=".1 .2 0"', 'type="box" size=".1 .1 .1" euler="10 20 30"'):
        vecsim.step(vecsim.load_model(thrown.format(geom)), state, torch.zeros(0, 1), "implicitfast")
    for geom in ('type="box" size=".1 .2 .3"', 'type="capsule" size=".1 .2"'):  # MuJoCo derives its gyroscopic forces
        with pytest.raises(vecsim.InputError, match="unequal moments of inertia with implicitfast"):
            vecsim.step(vecsim.load_model(thrown.format(geom)), state, torch.zeros(0, 1), "implicitfast")


@pytest.mark.parametrize(
    "options, root, rest, height, expected",
    [
        ('<flag actuation="disable"/>', "joint axis='0 0 1'", "<motor joint='j' forcerange='1 5'/>", 0.13, 0.0),
        ("", "joint axis='0 0 1' actuatorfrcrange='1 5'", "", 0.13, 0.0),
        ("", "joint type='slide' axis='0 0 1'", "<!-- the first pair has the larger margin -->", 0.13, 49.5),
    ],
)
def test_what_is_off_exerts_no_force_and_each_pair_has_its_margin(options, root, rest, height, expected):
    pairs = '<pair geom1="g" geom2="s" margin=".05"/><pair geom1="s" geom2="g" margin=".01"/>'
    mjcf = f"""<mujoco><compiler autolimits="true"/><option>{options}</option><worldbody>
      <geom name="g" type="plane" size="5 5 1" contype="0" conaffinity="0"/>
      <body pos="0 0 {height}"><{root} name="j"/><geom name="s" size=".1"/></body></worldbody>
      <contact>{pairs}</contact><actuator>{rest}</actuator></mujoco>"""
    m = converged(mujoco.MjModel.from_xml_string(mjcf))
    d = mujoco.MjData(m)
    mujoco.mj_forward(m, d)
    zero = torch.zeros(1, 1, dtype=torch.float64)
    ours = vecsim.forward(vecsim.load_model(m, dtype=torch.float64), vecsim.State(zero, zero, zero), zero[: m.nu], 20)
    assert d.qacc[0] == pytest.approx(expected, abs=0.1)
    assert float(ours.solution.qacc[0, 0]) == pytest.approx(d.qacc[0], abs=1e-9)
