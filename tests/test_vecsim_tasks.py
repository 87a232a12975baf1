"""Tasks of a user's own: quantities by name against MuJoCo C, mistakes that get one line, tasks/, and --check."""

from __future__ import annotations

import math
from dataclasses import dataclass

import mujoco
import numpy as np
import pytest
import torch
from test_vecsim_env import rollout
from test_vecsim_physics import batch, converged, visit

import vecsim_torch as vecsim
from benchmarks import simulator

ARM = """<mujoco><worldbody>
  <geom name="floor" type="plane" size="5 5 1"/><site name="mark" pos="1 2 3" euler="0 0 90"/>
  <body name="arm" pos="0 0 .2" euler="10 20 30">
    <joint name="lift" axis="0 1 0" pos="0 .1 0"/><joint name="roll" axis="1 0 0"/>
    <geom name="arm" type="capsule" size=".05" fromto="0 0 0 .3 0 0"/>
    <body name="welded" pos=".1 0 .05" euler="0 30 0">
      <geom name="welded" size=".04"/><site name="tip" pos=".1 .2 .3" euler="40 0 0"/>
    </body>
    <body name="swinging" pos=".3 0 0" euler="0 0 15">
      <joint name="wrist" type="ball" damping=".1"/><geom name="swinging" type="capsule" size=".05 .15" pos="0 0 -.1"/>
    </body>
  </body>
  <body name="ball" pos=".1 0 .33"><freejoint name="root"/><geom name="ball" size=".1"/></body>
  </worldbody><actuator><motor joint="lift" ctrlrange="-1 1"/></actuator></mujoco>"""


# ----------------------------------------------------------------------------------------------------------------------
# Quantities by the names of the MJCF
# ----------------------------------------------------------------------------------------------------------------------


def c_contact_forces(m, d):
    """Sum of the contact forces on each geom (ngeom, 3) and on each body (nbody, 3), world axes."""
    on_geom, wrench = np.zeros((m.ngeom, 3)), np.zeros(6)
    for k, contact in enumerate(d.contact):
        mujoco.mj_contactForce(m, d, k, wrench)
        force = contact.frame.reshape(3, 3).T @ wrench[:3]
        on_geom[contact.geom[0]] -= force
        on_geom[contact.geom[1]] += force
    on_body = np.zeros((m.nbody, 3))
    np.add.at(on_body, m.geom_bodyid, on_geom)
    return on_geom, on_body


def test_poses_velocities_and_forces_by_name_equal_mujoco():
    m = converged(mujoco.MjModel.from_xml_string(ARM))
    model = vecsim.load_model(m, dtype=torch.float64)
    states = visit(m, 40, seed=0, stride=4, touching=True)
    state, ctrl = batch(states)
    p = vecsim.Measured(*state[:2], vecsim.forward(model, state, ctrl, 20), {}, torch.zeros_like(state.qpos[:2]))
    assert model.pose(state, site="tip").position.shape == (3, 40)
    d, moving, pairs, frames = mujoco.MjData(m), np.zeros(6), 0, mujoco.mjtObj
    kinds = {
        "body": (frames.mjOBJ_XBODY, m.nbody, d.xpos, d.xmat),
        "site": (frames.mjOBJ_SITE, m.nsite, d.site_xpos, d.site_xmat),
        "geom": (frames.mjOBJ_GEOM, m.ngeom, d.geom_xpos, d.geom_xmat),
    }
    for k in range(40):
        d.qpos[:], d.qvel[:], d.ctrl[:] = (x[:, k].numpy() for x in (*state[:2], ctrl))
        mujoco.mj_forward(m, d)
        forces = dict(zip(("geom", "body"), c_contact_forces(m, d), strict=True))
        pairs += any((contact.geom > 0).all() for contact in d.contact)
        for kind, (frame, count, position, rotation) in kinds.items():
            for i in range(count):
                named = {kind: getattr(m, kind)(i).name}
                pose, velocity = model.pose(p, **named), model.velocity(p, **named)
                mujoco.mj_objectVelocity(m, d, frame, i, moving, 0)
                assert np.abs(pose.position[:, k].numpy() - position[i]).max() <= 1e-12
                assert np.abs(pose.rotation[..., k].numpy() - rotation[i].reshape(3, 3)).max() <= 1e-12
                assert np.abs(velocity.angular[:, k].numpy() - moving[:3]).max() <= 1e-10
                assert np.abs(velocity.linear[:, k].numpy() - moving[3:]).max() <= 1e-10
                if kind != "site" and i > 0:
                    force = model.contact_force(p, **named)[:, k].numpy()
                    assert np.abs(force - forces[kind][i]).max() <= 1e-8 * (1 + np.abs(forces[kind]).max()), named
    assert pairs >= 3
    assert (model.contact_force(p._replace(dynamics=None), body="arm") == 0).all()
    assert (model.qpos_of("roll"), model.dof_of("roll")) == (slice(1, 2), slice(1, 2))
    assert (model.qpos_of("wrist"), model.dof_of("wrist")) == (slice(2, 6), slice(2, 5))
    assert (model.qpos_of("root"), model.dof_of("root")) == (slice(6, 13), slice(5, 11))


@dataclass(frozen=True)
class Feeling(vecsim.Task):
    """Observes everything that has a name."""

    reset_noise_scale: float = 0.1

    def source(self):
        return ARM

    def sense(self, model, p):
        force = torch.cat((model.contact_force(p, body="ball"), model.contact_force(p, geom="swinging")))
        return {"position": model.pose(p, site="tip").position, "force": force}

    def observe(self, model, p, sensed):
        pose, velocity = model.pose(p, geom="swinging"), model.velocity(p, body="welded")
        lift = torch.cat((p.qpos[model.qpos_of("lift")], p.qvel[model.dof_of("lift")]))
        return {"lift": lift, "axes": pose.rotation.flatten(0, 1), "linear": velocity.linear, **sensed}

    def reward(self, model, p, sensed, action, velocity):
        return {"reward_force": sensed["force"][2]}


@pytest.mark.slow
def test_names_are_understood_by_the_compiler(monkeypatch):
    """It records all methods, and the results are the same."""
    monkeypatch.setitem(vecsim.TASKS, "Feeling", Feeling)
    envs = [vecsim.make("Feeling", 8, compile=flag, dtype=torch.float64) for flag in (False, True)]
    for env in envs:
        env.reset(seed=0)
    eager, compiled = (rollout(env, 30) for env in envs)
    rewards = eager[1 :: len(eager) // 30]
    assert max(reward.abs().max() for reward in rewards) > 1.0
    for ours, theirs in zip(eager, compiled, strict=True):
        assert torch.allclose(ours.double(), theirs.double(), rtol=1e-6, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes
# ----------------------------------------------------------------------------------------------------------------------

IMPORTS = "from dataclasses import dataclass\nimport torch\nimport vecsim_torch\n"
FROZEN, PENDULUM = "@dataclass(frozen=True)\n", "class Mine(vecsim_torch.InvertedPendulum):\n    "
METHOD = {
    "observe": "def observe(self, model, p, sensed): return ",
    "reward": "def reward(self, model, p, sensed, action, velocity): return ",
    "begin": "def begin(self, model, qpos, noise, ended, limit): return ",
    "remember": "def remember(self, model, p, sensed, action, noise): return ",
    "sense": "def sense(self, model, p): return ",
    "healthy": "def healthy(self, p, sensed): return ",
    "control": "def control(self, model, action): return ",
    "privileged": "def privileged(self, model, p, sensed): return ",
}
MISTAKES = {
    "class Mine: pass": r"Mine must be a subclass of vecsim_torch.Task with the decorator @dataclass\(frozen=True\)$",
    PENDULUM + "weight: float = 1.0": "decorator.*; Mine has no decorator, so its options would have no effect$",
    FROZEN + PENDULUM + "frame_skip = 4": "Mine.frame_skip is an option, so it needs a type annotation$",
    PENDULUM + "frame_skip = 4": "Mine.frame_skip is an option, so it needs a type annotation$",
    FROZEN + "class Mine(vecsim_torch.Task):\n    " + METHOD["observe"] + "{}": "Mine must define the method reward$",
    PENDULUM + METHOD["observe"] + "{'a': p.qpos[0]}": r"observe\['a'\] must be .*\(rows, N\), not \(13\); .* N = 13",
    PENDULUM + METHOD["observe"] + "{'a': p.qpos - p.qpos.mean(1, keepdim=True)}": (
        r"observe\['a'\] of a robot depends on the other robots"
    ),
    PENDULUM + METHOD["reward"] + "{'reward_a': p.qvel[0].flip(0)}": "of a robot depends on the other robots",
    PENDULUM + METHOD["reward"] + "{'reward_a': p.qvel[0] / p.qpos.shape[1]}": "of a robot depends on the other robots",
    PENDULUM + METHOD["observe"] + "{'a': p.qpos.T}": r"observe\['a'\] must be .* shape \(rows, N\), not \(13, 2\)",
    PENDULUM + METHOD["observe"] + "p.qpos": "observe must be a dict of tensors, not Tensor$",
    PENDULUM + METHOD["privileged"] + "{'a': 1.0}": r"privileged\['a'\] must be .* shape \(rows, N\), not \(float\)",
    PENDULUM + METHOD["reward"] + "{'reward_a': p.qpos[:1]}": r"reward\['reward_a'\] must be .*\(N\), not \(1, 13\)",
    PENDULUM + METHOD["reward"] + "{'a': p.qpos[0]}": "names start with reward_ must be a tensor",
    PENDULUM + METHOD["healthy"] + "p.qpos[0]": "healthy must be a tensor of torch.bool, not torch.float32$",
    PENDULUM + METHOD["control"] + "action[0]": r"control must be .* shape \(1, N\), not \(13\)",
    PENDULUM + METHOD["begin"] + "(qpos[:1], {})": r"the qpos of begin must be .* shape \(2, N\), not \(1, 13\)",
    PENDULUM + METHOD["begin"] + "(qpos, {'a': qpos})": r"remember must be .* with the names \['a'\], not \[\]$",
    PENDULUM + METHOD["begin"] + "(qpos, {'a': qpos})\n    " + METHOD["remember"] + "{'a': action}": (
        r"remember\['a'\] must be a tensor of shape \(2, N\), not \(1, 13\)"
    ),
    PENDULUM + METHOD["begin"] + "(qpos, {'a': qpos.long()})\n    " + METHOD["remember"] + "{'a': p.qpos}": (
        r"remember\['a'\] must be of torch.int64, as at the start, not torch.float32"
    ),
    PENDULUM + METHOD["reward"] + "{'reward_a': p.qvel[0], 'invalid': p.qvel[0]}": r"reward\['invalid'\] needs another",
    PENDULUM + "averaged = ('success',)\n    " + METHOD["reward"] + "{'reward_a': p.qvel[0], 'success': p.qpos[0]}": (
        "averaged has 'success', which `pop_statistics` reports already; rename it$"
    ),
    PENDULUM + "averaged = ('upright',)": "averaged has 'upright', but may name only what reward answers: ",
    PENDULUM + METHOD["observe"] + "{}": "observe must be a dict with at least one group$",
    FROZEN + PENDULUM + "max_episode_steps: int = 300": "has an option 'max_episode_steps', .* omit its annotation$",
    FROZEN + PENDULUM + "dtype: float = 1.0": "has an option 'dtype', which vecsim_torch.Options has too; rename it$",
    "class Mixin:\n    frame_skip = 4\nclass Mine(Mixin, vecsim_torch.InvertedPendulum): pass": (
        "Mixin.frame_skip is an option, so it needs a type annotation$"
    ),
    PENDULUM + "max_episode_steps = 0": "max_episode_steps must be at least 1, not 0$",
    PENDULUM + METHOD["sense"] + "{'a': p.qpos}": 'sense must be a dict of tensors with the name "position"',
    PENDULUM + METHOD["observe"] + "{'a': model.pose(p, body='hand').position}": (
        "the MJCF has no body 'hand'; it has world, cart, pole$"
    ),
    PENDULUM + METHOD["observe"] + "{'a': p.qpos[model.qpos_of('knee')]}": (
        "the MJCF has no joint 'knee'; it has slider, hinge$"
    ),
    PENDULUM + METHOD["observe"] + "{'a': model.contact_force(p, geom='rail')}": "'rail'} does not move; take",
    FROZEN + PENDULUM + "xml_file: str = 'absent.xml'": "no file .*absent.xml or .*assets/absent.xml$",
}


@pytest.mark.parametrize("number", range(len(MISTAKES)))
def test_a_mistake_in_a_task_is_one_line_that_names_the_rule(number, tmp_path):
    code, message = list(MISTAKES.items())[number]
    (tmp_path / "my.py").write_text(IMPORTS + code)
    with pytest.raises(vecsim.InputError, match=message) as error:
        vecsim.make(f"{tmp_path}/my.py:Mine", 2)
    assert "\n" not in str(error.value)


def test_methods_get_in_the_check_what_they_get_in_a_step(tmp_path):
    """The time limit counts in whole numbers. Only `begin` is told which robots diverged."""
    begin = METHOD["begin"] + "(qpos + 0 * (limit >> 1), {})\n    "
    (tmp_path / "my.py").write_text(IMPORTS + "class Mixin: pass\n" + PENDULUM.replace("(", "(Mixin, ") + begin)
    env = vecsim.make(f"{tmp_path}/my.py:Mine", 2, max_episode_steps=1)
    env.reset(seed=0)
    env.step(torch.zeros(2, 1))
    (tmp_path / "other.py").write_text(IMPORTS + PENDULUM + METHOD["reward"] + "{'reward_a': 1.0 * p.invalid}")
    with pytest.raises(TypeError):
        vecsim.make(f"{tmp_path}/other.py:Mine", 2)


def test_equal_names_of_files_and_folders_are_different_modules(tmp_path):
    kinds = []
    for folder, file in (("a_b", "c.py"), ("a", "b_c.py")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text(IMPORTS + PENDULUM + "pass")
        kinds.append(vecsim.find_task(f"{tmp_path / folder / file}:Mine"))
    assert kinds[0] is not kinds[1]


def test_a_file_that_failed_is_executed_again(tmp_path):
    file = tmp_path / "my.py"
    file.write_text("raise RuntimeError('a mistake')")
    with pytest.raises(RuntimeError, match="a mistake"):
        vecsim.find_task(f"{file}:Mine")
    file.write_text(IMPORTS + PENDULUM + "pass")
    assert vecsim.find_task(f"{file}:Mine").__name__ == "Mine"


def test_an_mjcf_lies_beside_its_task(tmp_path, monkeypatch):
    (tmp_path / "robot.xml").write_text(ARM)
    methods = "\n    ".join((METHOD["observe"] + "{'qpos': p.qpos}", METHOD["reward"] + "{'reward_a': p.qvel[0]}"))
    task = FROZEN + "class Mine(vecsim_torch.Task):\n    xml_file: str = 'robot.xml'\n    " + methods
    (tmp_path / "my.py").write_text(IMPORTS + task)
    env = vecsim.make(f"{tmp_path}/my.py:Mine", 2)
    assert env.reset(seed=0)[0].shape == (2, 13) and (env.task.frame_skip, env.task.reset_noise_scale) == (1, 0.0)
    assert vecsim.make(f"{tmp_path}/my.py:Mine", 2, xml_file="hopper.xml").model.nv == 6  # Gymnasium's


# ----------------------------------------------------------------------------------------------------------------------
# tasks/
# ----------------------------------------------------------------------------------------------------------------------


def test_the_cart_pole_is_rewarded_upright_in_the_middle():
    angles = vecsim.make("tasks/cartpole_swingup.py:SwingUp", 512).reset(seed=0)[0][:, 1]
    assert angles.min() < -0.99 and angles.max() > 0.99  # their cosine
    hanging = dict(reset_noise_scale=0.0, start_range=(0.0, 0.0))
    env = vecsim.make("tasks/cartpole_swingup.py:SwingUp", 3, dtype=torch.float64, **hanging)
    obs, _ = env.reset(seed=0)
    assert env.single_observation_space.shape == (5,) and torch.equal(obs[0, 1:3], torch.tensor([1.0, 0.0]).double())
    env.set_state(torch.tensor([[0.0, 0.0, 1.0], [0.0, math.pi, math.pi]]).double(), torch.zeros(2, 3).double())
    _, reward, terminated, _, info = env.step(torch.zeros(3, 1, dtype=torch.float64))
    assert torch.allclose(reward, torch.tensor([0.0, 1.0, 0.5]).double(), atol=1e-4) and not terminated.any()
    assert info["upright"].tolist() == pytest.approx([0.0, 1.0, 1.0], abs=1e-4)
    env.step(torch.ones(3, 1, dtype=torch.float64))
    assert (env.state().qvel[0] > 0).all()


def test_the_arm_sees_its_goal_and_the_goal_moves_on_its_circle():
    env = vecsim.make("tasks/reacher.py:Reacher", 64, dtype=torch.float64)
    obs, info = env.reset(seed=0)
    rows = env.observation_slices
    assert env.single_critic_space.shape[0] == obs.shape[1] + 1
    speed, before = info["critic_obs"][:, -1], obs[:, rows["goal"]]
    lengths, angles = torch.tensor([0.2, 0.15, 0.1]).double(), env.state().qpos.cumsum(0).T
    tip = torch.stack(((lengths * angles.cos()).sum(1), (lengths * angles.sin()).sum(1)), 1)
    assert torch.allclose(obs[:, rows["to_goal"]], before - tip, atol=1e-12)
    obs, reward, _, _, info = env.step(torch.zeros(64, 3, dtype=torch.float64))
    after = obs[:, rows["goal"]]
    turned = torch.atan2(before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0], (before * after).sum(1))
    assert torch.allclose(turned, 0.02 * speed) and torch.allclose(before.norm(dim=1), after.norm(dim=1))
    assert 0.1 <= before.norm(dim=1).min() and before.norm(dim=1).max() <= 0.4 and speed.abs().max() <= 1
    close = torch.exp(-((info["distance"] / 0.05) ** 2))
    assert torch.allclose(reward, close - info["distance"]) and env.pop_statistics()["distance"] > 0.1


@pytest.mark.parametrize("env_id", ["tasks/cartpole_swingup.py:SwingUp", "tasks/reacher.py:Reacher"])
def test_the_physics_of_the_tasks_equals_mujoco(env_id):
    m = vecsim.compile_mjcf(vecsim.build_task(env_id, {}).source())
    *start, ctrl, qpos, qvel, _ = simulator.random_steps(m, 100)
    after, _ = vecsim.step(vecsim.load_model(m, dtype=torch.float64), vecsim.State(*start), ctrl, iterations=20)
    assert (after.qpos - qpos).abs().max() <= 1e-12 and (after.qvel - qvel).abs().max() <= 1e-9


# ----------------------------------------------------------------------------------------------------------------------
# --check
# ----------------------------------------------------------------------------------------------------------------------


def checked(tmp_path, mjcf, capsys):
    (tmp_path / "robot.xml").write_text(mjcf)
    small = dict(num_envs=16, compile=False, threads=1, seconds=0.1, device="cpu")
    status = simulator.check(simulator.BenchmarkArgs(check=tmp_path / "robot.xml", **small))
    return status, capsys.readouterr().out


def test_check_compares_a_robot_with_mujoco(tmp_path, capsys):
    status, text = checked(tmp_path, ARM, capsys)
    assert status == 0 and "Supported." in text and "NOT SUPPORTED" not in text and "To train" not in text
    errors = [line.split("iterations: ")[1].split(", ") for line in text.splitlines() if "iterations: " in line]
    exact, *single = ((float(median), float(worst.split(";")[0])) for median, worst in errors)
    assert exact[1] <= 1e-9 and len(single) == 4
    assert 1e-9 < single[-1][0] <= 1e-5 and single[-1][1] <= 1e-3 and single[-1][1] <= single[0][1]
    assert "34 with constraints" in text and "Train with --solver-iterations 4, the default" in text
    assert "4 joints (2 hinge, 1 ball, 1 free)" in text and " in MuJoCo C; 16 environments on cpu" in text


def test_check_names_all_that_is_not_supported(tmp_path, capsys):
    mjcf = """<mujoco><option cone="elliptic"/><worldbody>
      <body><freejoint/><geom name="a" type="box" size=".1 .1 .1"/></body>
      <body><freejoint/><geom name="b" type="box" size=".1 .1 .1"/></body>
      <body><joint/><geom name="c" type="capsule" size=".1 .1"/></body></worldbody></mujoco>"""
    status, text = checked(tmp_path, mjcf, capsys)
    assert status == 1 and text.count("NOT SUPPORTED") == 3
    assert 'elliptic friction cones; set <option cone="pyramidal"/>' in text
    assert "collision of geom 'a' (box) with 'b' (box); give one" in text and "'c' (capsule) with 'a' (box)" in text
    assert "With --env-kwargs self_collision False" not in text and "Supported." not in text


def test_check_says_whether_a_robot_is_supported_without_self_collision(tmp_path, capsys):
    """Two box feet that touch each other in MuJoCo, as those of many humanoids; by a <pair> too."""
    mjcf = """<mujoco><worldbody><geom type="plane" size="5 5 1"/><body pos="0 0 1"><freejoint/><geom size=".1"/>
      <body pos="0 .03 -.3"><joint/><geom name="left" type="box" size=".1 .04 .02"/></body>
      <body pos="0 -.03 -.3"><joint/><geom name="right" type="box" size=".1 .04 .02"/></body></body></worldbody>
      <contact><pair geom1="left" geom2="right"/></contact></mujoco>"""
    status, text = checked(tmp_path, mjcf, capsys)
    assert status == 1 and "NOT SUPPORTED: collision of geom 'left' (box) with 'right' (box)" in text
    assert (
        "With --env-kwargs self_collision False it is supported" in text
        and "Contacts: 17 with what is fixed, 0 pairs" in text
    )
    assert float(text.split("float64, 20 iterations: ")[1].split(", ")[1].split()[0]) <= 1e-12
    model = vecsim.load_model(mjcf, self_collision=False)
    assert model.pair_geoms == () and len(model.contact_geom) == 1 + 8 + 8  # the sphere and each corner of the boxes


def test_check_does_not_judge_iterations_where_nothing_touches(tmp_path, capsys):
    ball = '<body pos="0 0 9"><freejoint/><geom size=".1"/></body>'
    mjcf = f'<mujoco><worldbody><geom type="plane" size="5 5 1"/>{ball}</worldbody></mujoco>'
    status, text = checked(tmp_path, mjcf, capsys)
    assert status == 0 and "0 with constraints" in text and "Too few constraints" in text and "Train with" not in text


def test_check_without_self_collision_keeps_each_contact_with_what_is_fixed():
    """The hand touches the wall alone, the foot the floor and the wall, and neither touches the other."""
    m = mujoco.MjModel.from_xml_string("""<mujoco><worldbody>
      <geom name="floor" type="plane" size="5 5 1" contype="1" conaffinity="1"/>
      <geom name="wall" type="sphere" size=".2" contype="2" conaffinity="2"/>
      <geom name="air" type="sphere" size=".2" contype="0" conaffinity="0"/>
      <body><freejoint/><geom name="hand" size=".1" contype="2" conaffinity="2"/></body>
      <body><freejoint/><geom name="foot" size=".1" contype="3" conaffinity="3"/></body></worldbody></mujoco>""")
    expected = {("floor", "foot"), ("wall", "foot"), ("wall", "hand")}
    for model, more in ((m, {("hand", "foot")}), (simulator.without_self_collision(m), set())):
        pairs, *_ = vecsim.collision_candidates(model)
        assert {tuple(model.geom(g).name for g in pair) for pair in pairs} == expected | more


def test_a_task_chooses_self_collision_and_solver_iterations_for_its_robot():
    class Alone(vecsim.Humanoid):
        self_collision, solver_iterations = False, 7

    cases = (vecsim.Humanoid, None, True), (vecsim.Humanoid, False, False), (Alone, None, False), (Alone, True, True)
    for task, given, collides in cases:
        assert bool(vecsim.make(task, 1, self_collision=given).model.pair_geoms) == collides
    for task, given, expected in ((vecsim.Ant, None, 4), (Alone, None, 7), (Alone, 3, 3)):
        assert vecsim.make(task, 1, iterations=given).settings.iterations == expected


def test_check_accepts_what_a_flag_disables(tmp_path, capsys):
    mjcf = """<mujoco><option><flag gravity="disable"/></option><worldbody>
      <body gravcomp="1"><joint name="j"/><geom size=".1"/></body></worldbody>
      <actuator><motor joint="j" ctrlrange="-1 1"/></actuator></mujoco>"""
    assert checked(tmp_path, mjcf, capsys)[0] == 0
    status, text = checked(tmp_path, mjcf.replace("disable", "enable"), capsys)
    assert status == 1 and "NOT SUPPORTED: gravity compensation" in text


def test_check_tries_the_integrator_of_the_mjcf(tmp_path, capsys):
    mjcf = """<mujoco><option integrator="{}"/><worldbody>
      <body><freejoint/><geom type="box" size=".1 .2 .3"/></body></worldbody></mujoco>"""
    assert checked(tmp_path, mjcf.format("Euler"), capsys)[0] == 0
    status, text = checked(tmp_path, mjcf.format("implicitfast"), capsys)
    assert status == 1 and "NOT SUPPORTED: a free body without other joints" in text


def test_check_says_what_a_training_needs(tmp_path, capsys):
    status, text = checked(tmp_path, ARM.replace(' ctrlrange="-1 1"', ' name="push"'), capsys)
    assert status == 0 and "To train it: give these actuators a ctrlrange: push" in text
    status, text = checked(tmp_path, ARM.split("<actuator>")[0] + "</mujoco>", capsys)
    assert status == 0 and "To train it: it has no actuators" in text and "Speed" not in text
