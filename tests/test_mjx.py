"""Physics and tasks of ppo_mjx_jax.py against MuJoCo C and Gymnasium, in float64.

One state sequence per task drives everything: random actions in Gymnasium's own environment, contacts included.
"""

import copy
import functools
import types

import gymnasium
import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from mujoco import mjx

import ppo_mjx_jax as ppo


@pytest.fixture(autouse=True)
def float64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def random_states(model, count, seed=0):
    """(qpos, qvel, qacc_warmstart, ctrl), (count, ...) each: robots that fall, land and lie, under random controls."""
    rng, data, rows = np.random.default_rng(seed), mujoco.MjData(model), []
    low, high = model.actuator_ctrlrange.T
    while len(rows) < count:
        mujoco.mj_resetData(model, data)
        data.qpos += rng.uniform(-0.1, 0.1, model.nq)
        data.qvel = 0.1 * rng.normal(size=model.nv)
        for step in range(100):
            data.ctrl = rng.uniform(low, high)
            if step % 4 == 3:
                mujoco.mj_normalizeQuat(model, data.qpos)
                rows.append([x.copy() for x in (data.qpos, data.qvel, data.qacc_warmstart, data.ctrl)])
            mujoco.mj_step(model, data)
    return [np.array(column) for column in zip(*rows[:count])]


def accelerations(forward, task, states):
    """qacc (count, nv) after forward(data), for every state."""

    def one(qpos, qvel, warmstart, ctrl):
        return forward(task.blank.replace(qpos=qpos, qvel=qvel, qacc_warmstart=warmstart, ctrl=ctrl)).qacc

    return np.asarray(jax.jit(jax.vmap(one))(*states))


def accelerations_in_c(model, states):
    """The same after mj_forward."""
    data, rows = mujoco.MjData(model), []
    for data.qpos[:], data.qvel[:], data.qacc_warmstart[:], data.ctrl[:] in zip(*states):
        mujoco.mj_forward(model, data)
        rows.append(data.qacc.copy())
    return np.array(rows)


def errors(mine, reference):
    """Largest difference of each state, relative to its largest entry if that is above 1."""
    return np.abs(mine - reference).max(1) / np.maximum(1.0, np.abs(reference).max(1))


@pytest.mark.parametrize("env_id, integrator", [
    ("InvertedPendulum-v5", "euler"),  # the programs of the others compile for long
    ("InvertedPendulum-v5", "mjcf"),  # rk4
    pytest.param("HalfCheetah-v5", "euler", marks=pytest.mark.slow),
    pytest.param("Hopper-v5", "implicitfast", marks=pytest.mark.slow),
    pytest.param("Walker2d-v5", "euler", marks=pytest.mark.slow),
    pytest.param("Ant-v5", "euler", marks=pytest.mark.slow),  # lies on near-vertical capsules: see the next test
    pytest.param("Humanoid-v5", "euler", marks=pytest.mark.slow),
    pytest.param("Hopper-v5", "mjcf", marks=pytest.mark.slow),
    pytest.param("Ant-v5", "mjcf", marks=pytest.mark.slow),
    pytest.param("Humanoid-v5", "mjcf", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_task_step_is_gymnasiums(env_id, integrator):
    """From the same states, with Gymnasium's own options: coordinates to 1e-9, and observation, reward, termination.

    A step of Ant and Humanoid is one physics step, because more of them amplify the error."""
    options = dict.fromkeys(ppo.UNSUPPORTED, False) if env_id == "Humanoid-v5" else {}
    converged = dict(solver_iterations=100, ls_iterations=50)  # so that a remaining difference is one of the equations
    task = ppo.make_task(ppo.Args(env_id=env_id, env_kwargs=options, integrator=integrator, **converged))
    env = gymnasium.make(env_id, **options).unwrapped
    env.model, env.data = task.mj_model, mujoco.MjData(task.mj_model)  # integrator, solver, collision filter
    env.model.opt.tolerance = 0.0
    if env_id in ("Ant-v5", "Humanoid-v5"):
        task, env.frame_skip = task._replace(frame_skip=1), 1
    qpos, qvel, _, ctrl = random_states(task.mj_model, 64)
    if task.mj_model.nq > task.mj_model.nv:
        qpos[::8, 2] += 0.7  # some that have left the ground,
    else:
        qpos[::8, 1] -= 0.7  # sunk into it, or tilted
    # Gymnasium's set_state leaves contact wrenches as they were; a step refreshes them.
    reads_contacts = task.options.get("contact_cost_weight") or task.options.get("include_cfrc_ext_in_observation")

    def one(qpos, qvel, action):
        state, first = ppo.state_at(task, qpos, qvel)
        after, *outcome = ppo.task_step(task, state, action)
        return (state.qpos if reads_contacts else first, jnp.concatenate([after.qpos, after.qvel]), *outcome)

    found = [np.asarray(x) for x in jax.jit(jax.vmap(one))(qpos, qvel, 1.2 * ctrl)]
    assert found[2].shape[1:] == env.observation_space.shape
    assert found[4].any() != (env_id == "HalfCheetah-v5") and not found[4].all()
    for k, (first, after, obs, reward, terminated) in enumerate(zip(*found)):
        mujoco.mj_resetData(env.model, env.data)
        env.set_state(qpos[k], qvel[k])
        if not reads_contacts:
            np.testing.assert_allclose(first, env._get_obs(), atol=1e-5)
        their_obs, their_reward, their_terminated, _, _ = env.step(1.2 * ctrl[k])
        assert errors(after[None], np.concatenate([env.data.qpos, env.data.qvel])[None]) < 1e-9
        np.testing.assert_allclose(obs, their_obs, rtol=1e-5, atol=1e-5)
        assert abs(reward - their_reward) < 1e-5 and terminated == their_terminated


def test_chart_rate_is_how_fast_the_rotation_vector_of_a_turning_root_changes():
    """Against the difference of log(exp(u) exp(w dt)) in MuJoCo's quaternions."""
    u, w, dt = np.array([0.3, -0.2, 0.1]), np.array([3.0, -5.0, 4.0]), 1e-6
    vectors = []
    for turn in (-w * dt, w * dt):
        quaternion, vector = np.array([1.0, 0.0, 0.0, 0.0]), np.zeros(3)
        for part in (u, turn):
            mujoco.mju_quatIntegrate(quaternion, part, 1.0)
        mujoco.mju_quat2Vel(vector, quaternion, 1.0)
        vectors.append(vector)
    robot = types.SimpleNamespace(mj_model=types.SimpleNamespace(jnt_type=[mujoco.mjtJoint.mjJNT_FREE]))
    others = np.arange(1.0, 4.0)
    found = ppo.chart_rate(robot, jnp.array([*others, *w, 7.0]), jnp.array([*others, *u, 9.0]))
    np.testing.assert_allclose(found, [*others, *(vectors[1] - vectors[0]) / (2 * dt), 7.0], rtol=1e-8)


CAPSULE = """<mujoco><option jacobian="dense" tolerance="1e-12" iterations="100" ls_iterations="50"/><worldbody>
  <geom type="plane" size="5 5 1"/><body><freejoint/><geom type="capsule" size="0.1 0.2"/></body>
</worldbody></mujoco>"""


def test_mjx_itself_turns_the_friction_pyramid_of_a_near_vertical_capsule():
    """Why align_capsules exists. If the last line fails, MJX has been corrected and align_capsules can go."""
    model, rng, tilt = mujoco.MjModel.from_xml_string(CAPSULE), np.random.default_rng(0), np.linspace(0.1, 1.0, 64)
    task = ppo.Task("capsule", {}, model, mjx.put_model(model, impl="jax"), mjx.make_data(model, impl="jax"), 1, 1)
    qpos, qvel, heading = np.zeros((64, 7)), rng.normal(size=(64, 6)), rng.uniform(-np.pi, np.pi, 64)
    qpos[:, 2], qvel[:, 2] = 0.09 + 0.2 * np.cos(tilt), -0.1  # the lower end is 1 cm deep, and slides
    qpos[:, 3:6] = np.c_[np.cos(tilt / 2), np.sin(tilt / 2) * np.cos(heading), np.sin(tilt / 2) * np.sin(heading)]
    states = qpos, qvel, np.zeros((64, 6)), np.zeros((64, 0))
    reference = accelerations_in_c(model, states)
    assert errors(accelerations(functools.partial(ppo.forward, task), task, states), reference).max() < 1e-9
    wrong = errors(accelerations(functools.partial(mjx.forward, task.model), task, states), reference) > 1e-6
    assert not wrong[tilt > np.pi / 6].any() and wrong[tilt < np.pi / 6].mean() > 0.5


@pytest.mark.parametrize("env_id", ppo.TASKS)
def test_resets_are_fresh_and_follow_the_tasks_rule(env_id, monkeypatch):
    task = ppo.make_task(ppo.task_defaults(env_id))
    monkeypatch.setattr(ppo, "state_at", lambda task, qpos, qvel: (qpos, qvel))  # the rest takes long to compile
    keys = jax.random.split(jax.random.PRNGKey(0), 2000)
    qpos, qvel = jax.jit(jax.vmap(functools.partial(ppo.task_reset, task)))(keys)
    scale, qpos = task.options["reset_noise_scale"], np.asarray(qpos) - task.mj_model.qpos0
    assert np.abs(qpos).max() <= scale and np.abs(np.abs(qpos).max() / scale - 1) < 0.01
    normal = env_id in ("HalfCheetah-v5", "Ant-v5")
    assert np.isclose(np.std(qvel), scale if normal else scale / 3**0.5, rtol=0.05)
    assert len(np.unique(qpos[:, 0])) == 2000


@pytest.mark.slow
def test_float32_and_few_iterations_stay_close_on_contact_states():
    """The training settings (4 Newton iterations, 2 line-search steps, float32) against a converged MuJoCo C."""
    jax.config.update("jax_enable_x64", False)
    task = ppo.make_task(ppo.task_defaults("HalfCheetah-v5"))
    states = [x.astype(np.float32) for x in random_states(task.mj_model, 200)]
    converged = copy.copy(task.mj_model)
    converged.opt.iterations, converged.opt.ls_iterations, converged.opt.tolerance = 100, 50, 0.0
    reference = accelerations_in_c(converged, states)
    found = errors(accelerations(functools.partial(ppo.forward, task), task, states), reference)
    assert np.median(found) < 1e-5 and np.percentile(found, 99) < 1e-3
