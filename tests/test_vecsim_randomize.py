"""Randomised environments of vecsim_torch.py: what reaches the physics, when it changes, and what a delay is.

Accelerations are held against MuJoCo C with the same parameter written into mjModel, in float64. Bit for bit: resume,
and an environment whose options are off against one that never heard of them.
"""

from __future__ import annotations

import copy
import math

import mujoco
import numpy as np
import pytest
import torch
from test_vecsim_env import FAST, RANDOMIZED, random_actions, rollout, same
from test_vecsim_physics import batch, c_forward, c_step, converged, error, visit

import vecsim_torch as vecsim

# ----------------------------------------------------------------------------------------------------------------------
# Each parameter reaches the physics as it would in MuJoCo
# ----------------------------------------------------------------------------------------------------------------------


def scale_masses(m, old, k, factor):
    for b, link in enumerate(vecsim.build_tree(m).body_link):
        if link < m.njnt:
            m.body_mass[b] = old.body_mass[b] * factor[link, k]
            m.body_inertia[b] = old.body_inertia[b] * factor[link, k]


def move_trunk(m, old, k, shift):
    tree = vecsim.build_tree(m)
    trunk = next(b for b in range(m.nbody) if tree.body_link[b] < m.njnt and m.body_mass[b] > 0)
    m.body_ipos[trunk] = old.body_ipos[trunk] + shift[:, k]
    m.body_sameframe[trunk] = mujoco.mjtSameFrame.mjSAMEFRAME_NONE  # else MuJoCo takes the body's frame for granted
    m.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_MIDPHASE  # its boxes were compiled about the old centre of mass


def strengthen(m, old, k, factor):
    for field in ("actuator_gainprm", "actuator_biasprm", "actuator_forcerange"):
        getattr(m, field)[:] = getattr(old, field) * factor[:, k : k + 1]


def stiffen(m, old, k, factor):
    m.actuator_gainprm[:, 0] = old.actuator_gainprm[:, 0] * factor[:, k]
    m.actuator_biasprm[:, 1] = old.actuator_biasprm[:, 1] * factor[:, k]


def damp(m, old, k, factor):
    m.actuator_biasprm[:, 2] = old.actuator_biasprm[:, 2] * factor[:, k]


IN_MUJOCO = {  # how to write robot k's numbers (rows, N) into mjModel, and a range that matters
    "mass": (scale_masses, 0.5),
    "centre_of_mass": (move_trunk, 0.1),
    "friction": (lambda m, old, k, x: np.copyto(m.geom_friction[:, 0], old.geom_friction[:, 0] * x[0, k]), 0.6),
    "damping": (lambda m, old, k, x: np.copyto(m.dof_damping, old.dof_damping * x[:, k]), 0.8),
    "armature": (lambda m, old, k, x: np.copyto(m.dof_armature, old.dof_armature * x[:, k]), 0.8),
    "motor_strength": (strengthen, 0.5),
    "position_gain": (stiffen, 0.5),
    "velocity_gain": (damp, 0.8),
    "gravity": (lambda m, old, k, x: np.copyto(m.opt.gravity, old.opt.gravity * x[0, k]), 0.5),
}  # fmt: skip
PARITY = [("Hopper-v5", name) for name in IN_MUJOCO if "gain" not in name] + [("Quadruped-Flat", n) for n in IN_MUJOCO]
COUNT = 24


@pytest.fixture(scope="module")
def states():
    """Touching states of each task's model under random actions, and vecsim's accelerations without randomisation."""
    out = {}
    for env_id in ("Hopper-v5", "Quadruped-Flat"):
        env = vecsim.make(env_id, COUNT, dtype=torch.float64)
        m = converged(env.mj_model)
        visited = visit(m, COUNT, seed=2, stride=5, touching=True)
        state, ctrl = batch(visited)
        plain = vecsim.forward(env.model, state, ctrl, 16).solution.qacc
        assert error(plain, c_forward(m, visited).qacc) <= 1e-9
        out[env_id] = (visited, state, ctrl, plain)
    return out


@pytest.mark.parametrize("env_id, name", PARITY)
def test_parameter_equals_mujoco(states, env_id, name):
    write, spread = IN_MUJOCO[name]
    env = vecsim.make(env_id, COUNT, dtype=torch.float64, randomize={name: spread}, **FAST)
    env.reset(seed=4)
    values = env.parameters()
    assert list(values) == [name]
    visited, state, ctrl, plain = states[env_id]
    m, old, numbers = converged(copy.deepcopy(env.mj_model)), env.mj_model, values[name].numpy()
    change = lambda m, k: write(m, old, k, numbers)
    reference = c_forward(m, visited, change=change)
    ours = vecsim.forward(env.robots(), state, ctrl, 20).solution.qacc
    changed = (ours - plain).abs().amax(0)
    assert changed.max() > 1e-3  # the parameter matters
    worst = error(ours, reference.qacc)
    print(f"\n{env_id} {name}: {worst:.1e}, changes qacc by up to {changed.max():.1e}")
    assert worst <= 1e-9  # as for the model's own parameters
    for integrator in ("euler", "implicitfast"):
        qpos, qvel = c_step(m, visited, integrator, change)
        after, _ = vecsim.step(env.robots(), state, ctrl, integrator, 20)
        assert error(after.qpos, qpos) <= 1e-10 and error(after.qvel, qvel) <= 1e-9


def test_friction_loss_equals_mujoco():
    class Rubbing(vecsim.Hopper):
        def source(self):
            m = vecsim.compile_mjcf(super().source())
            m.dof_frictionloss[:] = 2.0
            return m

    env = vecsim.make(Rubbing, COUNT, dtype=torch.float64, randomize={"frictionloss": 0.8}, **FAST)
    env.reset(seed=4)
    numbers, m = env.parameters()["frictionloss"].numpy(), converged(env.mj_model)
    visited = visit(m, COUNT, seed=2, stride=5, touching=True)
    state, ctrl = batch(visited)
    plain, ours = (vecsim.forward(model, state, ctrl, 30).solution.qacc for model in (env.model, env.robots()))
    assert (ours - plain).abs().max() > 1e-3  # the parameter matters
    reference = c_forward(m, visited, change=lambda m, k: np.copyto(m.dof_frictionloss, 2.0 * numbers[:, k]))
    assert error(ours, reference.qacc) <= 1e-9


def test_all_parameters_together_equal_mujoco(states):
    env = vecsim.make(
        "Quadruped-Flat", COUNT, dtype=torch.float64, randomize={n: x for n, (_, x) in IN_MUJOCO.items()}, **FAST
    )
    env.reset(seed=4)
    values = {name: x.numpy() for name, x in env.parameters().items()}
    visited, state, ctrl, _ = states["Quadruped-Flat"]
    old = env.mj_model

    def change(m, k):
        m.actuator_gainprm[:], m.actuator_biasprm[:] = old.actuator_gainprm, old.actuator_biasprm
        for name in IN_MUJOCO:
            if "gain" not in name and name != "motor_strength":
                IN_MUJOCO[name][0](m, old, k, values[name])
        stiffen(m, old, k, values["position_gain"])
        m.actuator_biasprm[:, 2] *= values["velocity_gain"][:, k]
        strengthen(m, copy.deepcopy(m), k, values["motor_strength"])
        m.actuator_forcerange[:] = old.actuator_forcerange * values["motor_strength"][:, k : k + 1]

    reference = c_forward(converged(copy.deepcopy(old)), visited, change=change)
    assert error(vecsim.forward(env.robots(), state, ctrl, 20).solution.qacc, reference.qacc) <= 1e-9


def test_derived_constants_stay_as_compiled(states):
    """mj_setConst after a change of mass recomputes the invweights, which soften contacts: the error without it."""
    env = vecsim.make("Quadruped-Flat", COUNT, dtype=torch.float64, randomize={"mass": 0.2}, **FAST)
    env.reset(seed=4)
    factor = env.parameters()["mass"].numpy()
    visited, state, ctrl, _ = states["Quadruped-Flat"]
    m, old, data = converged(copy.deepcopy(env.mj_model)), env.mj_model, mujoco.MjData(env.mj_model)

    def change(m, k):
        scale_masses(m, old, k, factor)
        mujoco.mj_setConst(m, data)

    reference = c_forward(m, visited, change=change).qacc
    ours = vecsim.forward(env.robots(), state, ctrl, 20).solution.qacc.T.numpy()
    wrong = np.abs(ours - reference).max(1) / (1 + np.abs(reference).max(1))
    print(f"\nmass +-20%, qacc against a model with mj_setConst: median {np.median(wrong):.1e}, max {wrong.max():.1e}")
    assert 1e-6 < wrong.max() < 0.1 and np.median(wrong) < 0.01


# ----------------------------------------------------------------------------------------------------------------------
# When and where they change
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", ["Hopper-v5", "Quadruped-Flat"])
def test_drawn_at_reset_and_only_then(env_id):
    env = vecsim.make(env_id, 16, randomize=True, max_episode_steps=9, random_initial_ages=True, **FAST)
    env.reset(seed=0)
    before, ended_once = env.parameters(), torch.zeros(16, dtype=torch.bool)
    assert set(before) >= {"mass", "friction", "motor_strength", "gravity"}
    for name, values in before.items():
        assert len(values.unique(dim=1).T) == 16, name  # no two robots alike
        low, high = env.settings.ranges[name]
        assert low <= values.min() and values.max() <= high and values.std() > 0
    for t in range(10):
        _, _, terminated, truncated, _ = env.step(random_actions(env, t))
        ended, after = terminated | truncated, env.parameters()
        for name in before:
            assert torch.equal(after[name][:, ~ended], before[name][:, ~ended]), name
            assert (after[name] != before[name]).any(0)[ended].all(), name
        before, ended_once = after, ended_once | ended
    assert ended_once.all()


@pytest.mark.parametrize("env_id", ["Hopper-v5", "Quadruped-Flat"])
def test_a_step_is_that_of_the_randomised_robots(env_id):
    """`env.step` steps `env.robots()`: in the middle of an episode, and for fresh robots after a reset."""
    off = {"randomize.push": None} if env_id == "Quadruped-Flat" else {}
    env = vecsim.make(env_id, 8, dtype=torch.float64, randomize=True, max_episode_steps=3, **off, **FAST)
    env.reset(seed=0)
    for t in range(6):
        robots, before, action = env.robots(), env.state(), random_actions(env, t)
        _, _, _, _, info = env.step(action)
        ends = {}
        for name, model in (("theirs", robots), ("nominal", env.model)):
            state = before
            for _ in range(env.task.frame_skip):
                state, _ = vecsim.step(model, state, env.task.control(env.model, action.T), "euler", 2)
            ends[name] = state.qpos, state.qvel
        measured = vecsim.Measured(*ends["theirs"], None, env._get_carry().memory, torch.zeros_like(before.qpos[:2]))
        groups = env.task.observe(robots, measured, env.task.sense(robots, measured))
        for name in groups.keys() - {"command", "last_action"}:  # of the memory, which a reset renews
            assert torch.equal(info["final_obs"][:, env.observation_slices[name]], groups[name].T), (t, name)
        if t % 3 < 2:  # nothing has ended
            assert all(torch.equal(a, b) for a, b in zip(env.state()[:2], ends["theirs"], strict=True))
        assert ((ends["nominal"][1] - ends["theirs"][1]).abs().amax(0) > 1e-3).all()  # the parameters matter
        if env_id == "Quadruped-Flat":  # the critic is told of the robots that acted, and then of those that follow
            for told, model in (("final_critic_obs", robots), ("critic_obs", env.robots())):
                assert torch.equal(info[told][:, env.critic_slices["mass"]].T, model.mass)


@pytest.mark.parametrize("env_id, randomized", [
    ("Hopper-v5", True), ("Quadruped-Flat", True), ("Quadruped-Rough", True), ("Ant-v5", False),
])  # fmt: skip
def test_resume(env_id, randomized, tmp_path):
    options = {"max_episode_steps": 5, "random_initial_ages": True, **FAST}
    if randomized:
        options |= RANDOMIZED | {"randomize.push_interval": (0.02, 0.06)}
    env = vecsim.make(env_id, 8, **options)
    env.reset(seed=0)
    rollout(env, 4)
    torch.save(env.state_dict(), tmp_path / "state.pt")
    expected, statistics = rollout(env, 6, seed=50), env.pop_statistics()
    other = vecsim.make(env_id, 8, seed=99, **options)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert same(rollout(other, 6, seed=50), expected)
    assert other.pop_statistics() == statistics and statistics["episodes"] >= 8
    with pytest.raises(ValueError, match="this state is of ranges"):
        vecsim.make(env_id, 8, **options | {"randomize.mass": 0.01}).load_state_dict(env.state_dict())


def test_off_is_off():
    """Nothing drawn, nothing carried: bit for bit the physics of the plain model, from resets that draw qpos and qvel
    alone. Written out here, so that what randomisation adds to a step cannot creep in unseen."""
    env = vecsim.make("Hopper-v5", 8, randomize=False, max_episode_steps=3, **FAST)
    model = vecsim.load_model(env.mj_model, pair_slots=8)
    generator = torch.Generator().manual_seed(0)

    def fresh():
        position, velocity = (torch.rand(rows, 8, generator=generator) for rows in (model.nq, model.nv))
        return vecsim.State(
            model.qpos0 + 5e-3 * (2 * position - 1), 5e-3 * (2 * velocity - 1), torch.zeros(model.nv, 8)
        )

    def observed(state):
        return torch.cat((state.qpos[1:], state.qvel.clamp(-10, 10))).T

    state = fresh()
    assert torch.equal(env.reset(seed=0)[0], observed(state))
    for t in range(1, 8):
        action = random_actions(env, t)
        obs, _, terminated, truncated, info = env.step(action)
        for _ in range(4):
            state, _ = vecsim.step(model, state, action.T, "euler", 2)
        assert torch.equal(info["final_obs"], observed(state))
        ended = terminated | truncated
        assert ended.all() if t % 3 == 0 else not ended.any()
        drawn = fresh()  # every step draws, whether or not an episode ends
        state = drawn if t % 3 == 0 else state
        assert all(torch.equal(a, b) for a, b in zip(env.state(), state, strict=True))
        assert torch.equal(obs, observed(state))
    assert env.robots() is env.model and env.parameters() == {}
    carry = env.state_dict()["carry"]
    assert carry["parameters"] == carry["memory"] == {} and carry["delayed"].numel() == 0 and not carry["push"].any()


def test_initial_state():
    options = {"reset_noise_scale": 0.0, "randomize.initial_position": 0.2, "randomize.initial_velocity": (1.0, 2.0)}
    env = vecsim.make("Quadruped-Flat", 256, max_episode_steps=1, **options, **FAST)
    env.reset(seed=0)
    for _ in range(2):
        state = env.state()
        moved = state.qpos[7:] - env.model.qpos0[7:]
        assert moved.abs().max() <= 0.2 and moved.amax(1).min() > 0.15 and moved.amin(1).max() < -0.15
        assert 1 <= state.qvel.min() < 1.1 and 1.9 < state.qvel.max() <= 2
        env.step(torch.zeros(256, 12))  # ends every episode


# ----------------------------------------------------------------------------------------------------------------------
# Pushes
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(0.5, 1.0), (0.7, 0.7)])
def test_pushes(size):
    """A push is a jump of the horizontal velocity, of the size and at the time asked for; then physics as ever."""
    randomize = {"push": size, "push_interval": 0.1}
    env = vecsim.make("Quadruped-Flat", 64, dtype=torch.float64, randomize=randomize, **FAST)
    plain = vecsim.make("Quadruped-Flat", 64, dtype=torch.float64, **FAST)
    env.reset(seed=0), plain.reset(seed=0)
    low, high = size
    for t in range(1, 14):
        state = env.state()
        env.step(torch.zeros(64, 12, dtype=torch.float64))
        push = env.state_dict()["carry"]["push"]
        speed = torch.hypot(push[0], push[1])
        assert ((low - 1e-9 <= speed) & (speed <= high + 1e-9)).all() if t in (6, 11) else (speed == 0).all()
        if t == 6:
            state.qvel[:2] += push
            plain.set_state(state.qpos, state.qvel)
            start = plain.state_dict()
            start["carry"]["warmstart"] = state.warmstart
            plain.load_state_dict(start)
            plain.step(torch.zeros(64, 12, dtype=torch.float64))
            assert (plain.state().qvel - env.state().qvel).abs().max() <= 1e-12
            angle = torch.atan2(push[1], push[0])
            assert angle.min() < -2 and angle.max() > 2  # rad: from every side


def test_planar_robots_are_pushed_along_their_plane():
    env = vecsim.make("Hopper-v5", 4)
    assert env.model.push_motion[..., 0].tolist() == [[1, 0], [0, 0], [0, 0], [0, 0], [0, 0], [0, 0]]


# ----------------------------------------------------------------------------------------------------------------------
# Perturbations
# ----------------------------------------------------------------------------------------------------------------------


def delayed_by_hand(actions, delay, frame_skip):
    """ctrl of every physics step when each action takes effect `delay` physics steps late, zeros before the first."""
    applied = []
    for step in range(len(actions) * frame_skip):
        given = step - delay
        applied.append(actions[given // frame_skip] if given >= 0 else 0.0)
    return applied


@pytest.mark.parametrize("frame_skip, delay", [(4, 0), (4, 1), (4, 3), (4, 4), (4, 6), (5, 12), (2, 7), (1, 3)])
def test_delay_line(frame_skip, delay):
    """1, 2, 3 ... as actions: physics step t sees the action of `delay` physics steps before."""
    env = vecsim.make("Hopper-v5", 2, frame_skip=frame_skip, action_delay_ms=2.0 * delay, **FAST)
    assert env.settings.delay == delay  # physics steps of 2 ms
    env.reset(seed=0)
    carry, applied = env._get_carry(), []

    def spy(model, state, ctrl):
        assert (ctrl == ctrl[0, 0]).all()
        applied.append(float(ctrl[0, 0]))
        return vecsim.begin_dynamics(model, state, ctrl)

    run = vecsim.Regions(**vars(vecsim.EAGER) | {"begin_dynamics": spy})
    actions = [float(k) for k in range(1, 7)]
    for value in actions:
        action = torch.full((3, 2), value)
        carry, _ = vecsim.environment_step(env.settings, env.model, carry, action, env._draw_noise(), run)
    assert applied == delayed_by_hand(actions, delay, frame_skip)


def test_a_delay_of_120_ms():
    """24 physics steps of 5 ms, 6 control steps: the delayed robot does what the prompt one did 6 steps before."""
    prompt = vecsim.make("Quadruped-Flat", 4, dtype=torch.float64, **FAST)
    late = vecsim.make("Quadruped-Flat", 4, dtype=torch.float64, **{"action_delay_ms": 120}, **FAST)
    assert late.settings.delay == 24
    prompt.reset(seed=0), late.reset(seed=0)
    generator = torch.Generator().manual_seed(0)
    actions = [0.3 * torch.randn(4, 12, dtype=torch.float64, generator=generator) for _ in range(10)]
    for t in range(10):
        late.step(actions[t])
        prompt.step(actions[t - 6] if t >= 6 else torch.zeros(4, 12, dtype=torch.float64))
        assert torch.equal(late.state().qpos, prompt.state().qpos)


def test_an_episode_starts_with_an_empty_delay_line():
    env = vecsim.make("Hopper-v5", 4, max_episode_steps=3, **{"action_delay_ms": 20}, **FAST)
    env.reset(seed=0)
    for t in range(1, 7):
        env.step(torch.ones(4, 3))
        assert env.state_dict()["carry"]["delayed"].abs().sum() == (0 if t % 3 == 0 else 4 * 3 * min(t % 3, 3))


def test_timestep_scale():
    env, plain = vecsim.make("Ant-v5", 2, timestep_scale=1.1), vecsim.make("Ant-v5", 2)
    assert env.model.timestep == env.mj_model.opt.timestep and math.isclose(
        env.model.timestep, 1.1 * plain.model.timestep
    )
    assert env.control_step == env.task.frame_skip * env.model.timestep


def test_observation_noise():
    """Uniform, of the size asked for, in what the policy sees and nowhere else."""
    options = {"dtype": torch.float64, "seed": 0, **FAST}
    noisy = vecsim.make("Quadruped-Flat", 512, **{"observation_noise": 2.0}, **options)
    noisy.reset(seed=0)
    obs, _, _, _, info = noisy.step(torch.zeros(512, 12, dtype=torch.float64))
    critic = torch.cat([info["critic_obs"][:, noisy.critic_slices[name]] for name in noisy.observation_slices], 1)
    difference = obs - critic
    for name, rows in noisy.observation_slices.items():
        scale = 2.0 * noisy.task.noise_scale[name]
        part = difference[:, rows]
        assert part.abs().max() <= scale
        if scale:
            assert abs(float(part.std()) / (scale / math.sqrt(3)) - 1) < 0.1 and abs(float(part.mean())) < 0.1 * scale
    assert torch.equal(obs, info["final_obs"])


@pytest.mark.parametrize(
    "options",
    [
        {"randomize": {"push": (1.0, 1.0), "push_interval": 0.04}},
        {"observation_noise": 1.0},
        {"randomize": {"mass": 0.2}},
    ],
    ids=str,
)
def test_twins_get_the_same_starts_and_commands(options):
    """Options have their own random generator, so with one seed the starts, commands and headings do not change."""
    common = {"heading_command": True, "resample_seconds": 0.1, **FAST}
    envs = [vecsim.make("Quadruped-Flat", 16, **given, **common) for given in ({}, options)]
    obs, other_obs = (env.reset(seed=5)[0] for env in envs)
    assert torch.equal(obs, other_obs) == ("observation_noise" not in options)
    action, memories = torch.zeros(16, 12), []
    for _ in range(12):  # past two changes of command
        states = [env.state_dict()["carry"] for env in envs]
        memory, other = (state["memory"] for state in states)
        assert torch.equal(memory["heading"], other["heading"])
        assert torch.equal(memory["command"][:2], other["command"][:2])  # the third steers by the robot's own yaw
        memories.append(memory["heading"])
        for env in envs:
            env.step(action)
    assert len({tuple(x.flatten().tolist()) for x in memories}) == 3
    assert torch.equal(states[0]["qvel"], states[1]["qvel"]) == ("observation_noise" in options)


# ----------------------------------------------------------------------------------------------------------------------
# How they are given, and what is refused
# ----------------------------------------------------------------------------------------------------------------------


def test_ways_to_say_the_same():
    ways = [{"randomize": {"friction": 0.3}}, {"randomize.friction": (0.7, 1.3)}, {"randomize.friction": "0.7:1.3"}]
    made = [vecsim.make("Hopper-v5", 2, **way).settings for way in ways]
    assert made[0] == made[1] == made[2] and made[0].ranges == {"friction": (0.7, 1.3)}
    everything = vecsim.make("Hopper-v5", 2, randomize="true", **{"randomize.friction": 0.1}).settings.ranges
    assert everything["friction"] == (0.9, 1.1) and "mass" in everything
    assert "friction" not in vecsim.make("InvertedPendulum-v5", 2, randomize=True).settings.ranges  # it touches nothing


def test_texts_of_a_command_line():
    given = {"a": "0.2:0.8", "b": "-1:1e-3", "c": "True", "d": "none", "e": "ant.xml", "f": 3}
    assert vecsim.options_from_text(given) == dict(a=(0.2, 0.8), b=(-1.0, 1e-3), c=True, d=None, e="ant.xml", f=3)
