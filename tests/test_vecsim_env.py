"""The environments of vecsim_torch.py: Gymnasium's own as the oracle of every number, and the vector environment.

Bit for bit on one CPU with the same versions: same seed, resume, chunks, neighbours of a poisoned robot. Within a
tolerance: Gymnasium, and compiled against eager.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import re
import threading
from pathlib import Path

import gymnasium
import mujoco
import numpy as np
import pytest
import torch
from test_vecsim_physics import converged, folded_humanoids, last_axis, visit

import vecsim_torch as vecsim
from benchmarks import simulator

TASKS = tuple(env_id for env_id in vecsim.TASKS if env_id.endswith("-v5"))  # Gymnasium's own
FAST = {"iterations": 2, "integrator": "euler"}  # for tests of bookkeeping, where the physics need not be exact


def random_actions(env, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    high = torch.as_tensor(env.single_action_space.high)
    draw = 2 * torch.rand(env.num_envs, len(high), generator=generator) - 1
    return (scale * high * draw).to(env.dtype)


def rollout(env, steps, seed=0):
    """All that `steps` steps return, as one list of tensors."""
    out = []
    for t in range(steps):
        obs, reward, terminated, truncated, info = env.step(random_actions(env, seed + t))
        out += [obs, reward, terminated, truncated, *(info[k] for k in sorted(info) if k != "final_info")]
    return out


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# Gymnasium
# ----------------------------------------------------------------------------------------------------------------------

OPTIONS = {
    "InvertedDoublePendulum-v5": {"healthy_reward": 5.0, "reset_noise_scale": 0.2},
    "Reacher-v5": {"reward_dist_weight": 2.0, "reward_control_weight": 0.5},
    "Pusher-v5": {"reward_near_weight": 2.0, "reward_dist_weight": 0.5, "reward_control_weight": 0.2},
    "Swimmer-v5": {"exclude_current_positions_from_observation": False, "forward_reward_weight": 2.0},
    "Hopper-v5": {"exclude_current_positions_from_observation": False, "healthy_reward": 0.5,
                  "forward_reward_weight": 2.0, "healthy_z_range": (0.9, 2.0)},
    "HalfCheetah-v5": {"exclude_current_positions_from_observation": False, "ctrl_cost_weight": 0.3},
    "Ant-v5": {"include_cfrc_ext_in_observation": False, "exclude_current_positions_from_observation": False,
               "contact_force_range": (-5.0, 5.0), "terminate_when_unhealthy": False, "contact_cost_weight": 0.1},
    "Humanoid-v5": {"include_cinert_in_observation": False, "include_cvel_in_observation": False,
                    "contact_cost_weight": 1e-3, "contact_cost_range": (-math.inf, 2.0)},
}  # fmt: skip


GYM_ONLY = {"tendon_length", "tendon_velocity"}  # of Humanoid's two tendons, which act on nothing
NOT_IN_VECSIM = {"x_position", "y_position", "distance_from_origin", "z_distance_from_origin"}  # copies of the state


def gym_position(env_id, m, d):
    """What Gymnasium measures the robot's velocity from: mjData's, which lags qpos by the integrator's last stage."""
    if env_id.startswith("Ant"):
        return d.body(1).xpos[:2].copy()
    if env_id.startswith("Humanoid-"):
        return (m.body_mass @ d.xipos / m.body_mass.sum())[:2]
    return d.qpos[: 2 if env_id.startswith("Swimmer") else 1].copy()


def gym_steps(env_id, count, options):
    """`count` consecutive steps of Gymnasium under random actions: before and after each."""
    env = gymnasium.make(env_id, **options).unwrapped
    m, d = env.model, env.data
    m.opt.solver, m.opt.tolerance, m.opt.iterations = mujoco.mjtSolver.mjSOL_NEWTON, 1e-15, 100
    m.opt.jacobian = mujoco.mjtJacobian.mjJAC_DENSE
    rng, rows, pairs = np.random.default_rng(0), [], 0
    env.reset(seed=0)
    for _ in range(count):
        qpos, qvel, position = d.qpos.copy(), d.qvel.copy(), gym_position(env_id, m, d)
        # past the control range: the physics clips, the control cost does not
        action = rng.uniform(-1.2, 1.2, m.nu) * m.actuator_ctrlrange[:, 1]
        obs, reward, terminated, _, info = env.step(action)
        pairs = max(pairs, sum(m.geom_type[c.geom[0]] != mujoco.mjtGeom.mjGEOM_PLANE for c in d.contact))
        rows.append((qpos, qvel, position, action, obs, reward, terminated, info))
        if terminated:
            env.reset()
    env.close()
    return rows, pairs


@pytest.mark.parametrize("env_id, options", [(e, {}) for e in TASKS] + list(OPTIONS.items()), ids=str)
def test_equals_gymnasium(env_id, options, record_property):
    """100 consecutive steps, every one from Gymnasium's own state: all at once, an environment each."""
    count = 100 if not options else 30
    rows, pairs = gym_steps(env_id, count, options)
    qpos, qvel, position, action, obs, reward, terminated, infos = zip(*rows, strict=True)
    env = vecsim.make(env_id, count, dtype=torch.float64, iterations=12, pair_slots=pairs + 2, **options)
    env.reset(seed=0)

    def last_axis(x):
        return torch.tensor(np.array(x).T.copy())

    env.set_state(last_axis(qpos), last_axis(qvel))
    start = env.state_dict()
    start["carry"]["position"] = last_axis(position)
    env.load_state_dict(start)
    _, our_reward, our_terminated, truncated, info = env.step(torch.tensor(np.array(action)))
    final_obs = info.pop("final_obs")
    assert not info.pop("invalid").any()
    assert final_obs.shape == np.array(obs).shape
    # some tens of solved dynamics in a row, each right to 1e-9 or better
    wrong = (final_obs - torch.tensor(np.array(obs))).abs() / (1 + torch.tensor(np.array(obs)).abs())
    if not options:
        record_property("observation of Gymnasium", (env_id, wrong.max().item()))
    assert wrong.max() <= 1e-6, divmod(int(wrong.argmax()), final_obs.shape[1])
    assert np.abs(our_reward.numpy() - np.array(reward)).max() <= 1e-6
    assert our_terminated.tolist() == [bool(x) for x in terminated]
    assert not truncated.any()
    for name in set(infos[0]) - GYM_ONLY - NOT_IN_VECSIM:
        assert np.abs(info[name].numpy() - [i[name] for i in infos]).max() <= 1e-6, name
    assert set(info) - {"_final_obs", "final_info", "_final_info"} == set(infos[0]) - GYM_ONLY - NOT_IN_VECSIM


@pytest.mark.parametrize("env_id", vecsim.TASKS)
def test_observation_names_are_those_of_the_joints_that_are_observed(env_id):
    """A named number is what MuJoCo has for that joint; the quadruped observes joints relative to its home pose."""
    env = vecsim.make(env_id, num_envs=1, dtype=torch.float64)
    env.reset(seed=0)
    names = env.observation_names(env.observation_slices)
    critic_names = env.observation_names(env.critic_slices)
    critic_size = sum(rows.stop - rows.start for rows in env.critic_slices.values())
    assert len(names) == len(set(names)) == env.single_observation_space.shape[0]
    assert len(critic_names) == len(set(critic_names)) == critic_size
    data = mujoco.MjData(env.mj_model)
    state = env.state()
    data.qpos[:], data.qvel[:] = state.qpos[:, 0].numpy(), state.qvel[:, 0].numpy()
    seen = dict(zip(names, env.set_state(state.qpos, state.qvel)[0].tolist(), strict=True))
    home = dict(zip(vecsim.coordinate_names(env.mj_model)[0], env.model.qpos0[:, 0].tolist(), strict=True))
    compared = 0
    for joint in (env.mj_model.joint(j) for j in range(env.mj_model.njnt)):
        now = data.joint(joint.id)
        if len(now.qpos) > 1:
            continue
        for name, value in (
            (f"qpos/{joint.name}", now.qpos[0]),
            (f"qvel/{joint.name}", now.qvel[0]),
            (f"arm_qpos/{joint.name}", now.qpos[0]),
            (f"arm_qvel/{joint.name}", now.qvel[0]),
            (f"joint_position/{joint.name}", now.qpos[0] - home[joint.name]),
            (f"joint_velocity/{joint.name}", now.qvel[0]),
        ):
            if name in seen:
                assert seen[name] == pytest.approx(value, abs=1e-12), name
                compared += 1
    assert compared >= 2 * env.model.nu
    assert len(env.action_names()) == env.model.nu and "" not in env.action_names()


def starts_equal(robot, qpos, qvel):
    """Each coordinate and velocity (rows, 512) has the mean, deviation and bounds of 512 resets of Gymnasium."""
    theirs = []
    for _ in range(512):
        robot.reset()
        theirs.append(np.concatenate((robot.data.qpos, robot.data.qvel)))
    ours, theirs = torch.cat((qpos, qvel)), torch.tensor(np.array(theirs)).T
    width = theirs.amax(1) - theirs.amin(1)
    assert ((ours.mean(1) - theirs.mean(1)).abs() <= 0.1 * width).all()  # five standard errors of a uniform number
    assert ((ours.std(1) - theirs.std(1)).abs() <= 0.1 * theirs.std(1)).all()
    for bound in ("amin", "amax"):
        assert ((getattr(ours, bound)(1) - getattr(theirs, bound)(1)).abs() <= 0.05 * width).all()
    if robot.model.nu == 7:
        assert ours[7:9].norm(dim=0).min() > 0.17  # m, the object from the goal
    else:
        assert 0.19 < ours[2:4].norm(dim=0).max() <= 0.2  # m, the target from the shoulder


@pytest.mark.parametrize("env_id", TASKS)
def test_reset_equals_gymnasium(env_id):
    """Observation after a reset, spaces, and the spread of the reset noise."""
    reference = gymnasium.make(env_id)
    obs, _ = reference.reset(seed=0)
    d = reference.unwrapped.data
    env = vecsim.make(env_id, 512, dtype=torch.float64)
    assert env.single_observation_space.shape == reference.observation_space.shape
    assert env.single_action_space == reference.action_space
    assert sum(s.stop - s.start for s in env.observation_slices.values()) == obs.size
    first, _ = env.reset(seed=3)
    qpos, qvel, _ = env.state()
    if env_id in ("Reacher-v5", "Pusher-v5"):
        starts_equal(gymnasium.make(env_id).unwrapped, qpos, qvel)
    else:
        noise = env.task.reset_noise_scale
        moved = qpos - torch.as_tensor(reference.unwrapped.init_qpos)[:, None]
        assert moved.abs().max() <= noise and moved.abs().amax(1).min() >= 0.9 * noise and moved.min() < 0
        if env_id in ("InvertedDoublePendulum-v5", "HalfCheetah-v5", "Ant-v5"):  # normal velocity noise
            assert abs(float(qvel.std()) / noise - 1) < 0.05 and qvel.abs().max() > 2 * noise
        else:
            assert qvel.abs().max() <= noise and qvel.abs().amax(1).min() >= 0.9 * noise
    env = vecsim.make(env_id, 1, dtype=torch.float64)
    env.reset(seed=0)
    ours = env.set_state(torch.tensor(d.qpos)[:, None], torch.tensor(d.qvel)[:, None])
    if env_id.startswith("Humanoid"):  # qfrc_actuator of mjData is zero after a reset; all else is kinematics
        assert (ours[0, env.observation_slices["qfrc_actuator"]] == 0).all()
    assert np.abs(ours[0].numpy() - obs).max() <= 1e-12  # kinematics alone
    reference.close()


def test_the_pusher_pushes():
    """The object is put beside the finger, which touches it and moves it as in Gymnasium."""
    env = gymnasium.make("Pusher-v5").unwrapped
    m, d = env.model, env.data
    m.opt.tolerance, m.opt.ccd_tolerance, m.opt.ccd_iterations = 1e-15, 1e-12, 500
    m.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_MULTICCD  # one contact of a capsule with a cylinder, as in vecsim
    env.reset(seed=0)
    rng, rows, pushed = np.random.default_rng(0), [], []

    def depths():
        return [-c.dist for c in d.contact if 3 in m.geom_type[c.geom] and 5 in m.geom_type[c.geom]]

    while len(rows) < 60:
        qpos, qvel = d.qpos.copy(), rng.normal(size=m.nv) * ([1] * 7 + [0.1] * 2 + [0] * 2)
        qpos[:7] = d.qpos[:7] = rng.uniform(*m.jnt_range[:7].T)
        mujoco.mj_kinematics(m, d)
        if abs(d.body("tips_arm").xpos[2] - d.body("object").xpos[2]) > 0.05:
            continue
        qpos[7:9] += (d.body("tips_arm").xpos + rng.uniform(-0.15, 0.15, 3) - d.body("object").xpos)[[1, 0]]
        env.set_state(qpos, qvel)
        if not depths() or max(depths()) > 0.005:  # m; they touch
            continue
        d.ctrl[:] = action = rng.uniform(-2, 2, 7)
        deepest = 0
        for _ in range(5):
            mujoco.mj_step(m, d)
            deepest = max([deepest, *depths()])
        if deepest > 0.02:  # m: the axis of a finger is inside of the object
            continue
        rows.append((qpos, qvel, action, env._get_obs(), env._get_rew(action)[0]))
        pushed.append(np.abs(d.qpos[7:9] - qpos[7:9]).max())
    assert np.mean(np.array(pushed) > 1e-3) > 0.3  # m
    qpos, qvel, action, obs, reward = map(np.array, zip(*rows, strict=True))
    ours = vecsim.make("Pusher-v5", 60, dtype=torch.float64, iterations=12)
    ours.reset(seed=0)
    ours.set_state(torch.tensor(qpos.T.copy()), torch.tensor(qvel.T.copy()))
    _, our_reward, _, _, info = ours.step(torch.tensor(action))
    wrong = (info["final_obs"] - torch.tensor(obs)).abs().amax(1)
    print(f"\npusher: errors {wrong.sort().values[[0, 30, 50, -1]].tolist()}")
    assert wrong.max() <= 1e-6
    assert np.abs(our_reward.numpy() - reward).max() <= 1e-6


def test_vector_env_attributes():
    env = vecsim.make("Hopper-v5", 6)
    assert isinstance(env, gymnasium.vector.VectorEnv)
    assert env.num_envs == 6
    assert env.metadata["autoreset_mode"] == gymnasium.vector.AutoresetMode.SAME_STEP
    assert env.metadata["render_fps"] == 125  # 1 / (4 * 0.002 s)
    assert env.single_observation_space.shape == (11,) and env.observation_space.shape == (6, 11)
    assert env.single_action_space.shape == (3,) and env.action_space.shape == (6, 3)
    assert env.single_critic_space is None
    obs, info = env.reset(seed=0)
    assert obs.dtype == torch.float32 and obs.shape == (6, 11) and obs.is_contiguous()
    obs, reward, terminated, truncated, info = env.step(torch.zeros(6, 3))
    assert terminated.dtype == truncated.dtype == info["invalid"].dtype == torch.bool
    assert info["final_obs"].shape == obs.shape and reward.dtype == torch.float32
    assert all(value.shape[0] == 6 for value in (info | info["final_info"]).values() if value is not info["final_info"])


# ----------------------------------------------------------------------------------------------------------------------
# Episodes
# ----------------------------------------------------------------------------------------------------------------------


def test_same_step_autoreset():
    env = vecsim.make("Hopper-v5", 64, **FAST)
    env.reset(seed=0)
    noise, ended_count = env.task.reset_noise_scale, 0
    fresh = []
    for t in range(60):
        obs, _, terminated, truncated, info = env.step(random_actions(env, t))
        ended = terminated | truncated
        assert torch.equal(obs[~ended], info["final_obs"][~ended])
        at_rest = env.model.qpos0[1:, 0]
        assert ((obs[ended][:, :5] - at_rest).abs() <= noise * 1.001).all()  # float32 rounding of 1.25 m
        assert (obs[ended][:, 5:].abs() <= noise).all()
        z, angle = info["final_obs"][:, 0], info["final_obs"][:, 1]
        assert torch.equal(terminated, ~((z > 0.7) & (angle.abs() < 0.2)))
        assert torch.equal(env.state().qpos[1:].T[ended], obs[ended][:, :5])
        fresh.append(obs[ended])
        ended_count += int(ended.sum())
    assert ended_count > 64
    assert len(torch.cat(fresh).unique(dim=0)) == ended_count  # no two episodes start alike


def test_terminated_wins_over_the_time_limit():
    env = vecsim.make("Hopper-v5", 4, max_episode_steps=1, **FAST)
    env.reset(seed=0)
    state = env.state()
    qpos = state.qpos.clone()
    qpos[1, :2] = 0.3  # m: far under the healthy height
    env.set_state(qpos, state.qvel)
    _, _, terminated, truncated, _ = env.step(torch.zeros(4, 3))
    assert terminated.tolist() == [True, True, False, False]
    assert truncated.tolist() == [False, False, True, True]


def test_random_initial_ages_spread_the_time_limits():
    env = vecsim.make("HalfCheetah-v5", 64, max_episode_steps=8, random_initial_ages=True, **FAST)
    env.reset(seed=0)
    ends = torch.stack([env.step(random_actions(env, t))[3] for t in range(16)])
    assert (ends[:8].sum(0) == 1).all()  # each once in the first eight steps, at any of them
    assert (ends[:8].sum(1) > 0).all()
    assert torch.equal(ends[:8], ends[8:])  # later episodes are whole


def test_statistics_leave_out_episodes_that_began_at_a_random_age():
    """A fixed policy with return 1 per step: its mean return is that of whole episodes, also after a resume."""
    options = {"max_episode_steps": 8, "random_initial_ages": True, **FAST}
    env, other = (vecsim.make("InvertedPendulum-v5", 64, seed=seed, **options) for seed in (0, 1))
    env.reset(seed=0)
    taken, all_returns = torch.zeros(64), []
    for t in range(16):
        if t == 4:
            other.load_state_dict(env.state_dict())
            env = other
        _, reward, terminated, truncated, _ = env.step(torch.zeros(64, 1))
        taken += reward
        assert not terminated.any()
        all_returns += taken[truncated].tolist()
        taken[truncated] = 0
    whole = all_returns.count(8.0)
    assert len(all_returns) == 128 and 64 <= whole < 80
    assert np.mean(all_returns) < 6.8  # with the episodes that are cut short: too low
    statistics = env.pop_statistics()
    assert statistics["episodes"] == whole and statistics["success"] == 1
    assert statistics["episode_return"] == statistics["episode_length"] == 8.0
    env.random_initial_ages = False  # as evaluations do: first episodes count
    env.reset(seed=1)
    for _ in range(8):
        env.step(torch.zeros(64, 1))
    assert env.pop_statistics()["episodes"] == 64


def test_resets_are_fresh():
    env = vecsim.make("Ant-v5", 8)
    first, second = env.reset(seed=0)[0], env.reset()[0]
    assert not (first == second).all(1).any()
    assert len(first.unique(dim=0)) == 8
    assert torch.equal(env.reset(seed=0)[0], first)


def test_statistics_count_every_episode():
    env = vecsim.make("Hopper-v5", 32, max_episode_steps=25, **FAST)
    env.reset(seed=0)
    running, length = torch.zeros(32, dtype=torch.float64), torch.zeros(32)
    returns, lengths, limits = [], [], 0
    for t in range(60):
        _, reward, terminated, truncated, _ = env.step(random_actions(env, t, 0.5))
        running += reward
        length += 1
        ended = terminated | truncated
        returns += running[ended].tolist()
        lengths += length[ended].tolist()
        limits += int(truncated.sum())
        running[ended], length[ended] = 0, 0
    statistics = env.pop_statistics()
    assert statistics["episodes"] == len(returns) > 60 and limits and limits < len(returns)
    assert math.isclose(statistics["episode_return"], np.mean(returns), rel_tol=1e-5)  # float32 sums of 25 rewards
    assert math.isclose(statistics["episode_length"], np.mean(lengths))
    assert math.isclose(statistics["success"], limits / len(returns))
    assert statistics["invalid"] == 0
    empty = env.pop_statistics()
    assert empty["episodes"] == 0 and math.isnan(empty["episode_return"]) and math.isnan(empty["success"])


def test_returned_tensors_stay_as_they_are():
    """A learner may keep what a step returned: the next step must not write into it."""
    env = vecsim.make("Ant-v5", 4, **FAST)
    kept = [env.reset(seed=0)[0]]
    action = random_actions(env)
    given = action.clone()
    kept += rollout(env, 1)
    env.step(action)
    assert torch.equal(action, given)
    copies = [x.clone() for x in kept]
    rollout(env, 2)
    assert same(kept, copies)


# ----------------------------------------------------------------------------------------------------------------------
# Quarantine
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", ["Hopper-v5", "Ant-v5"])
def test_poisoned_robots_harm_no_other(env_id):
    """Twelve robots get a number that none can have, each at another place, and four stay healthy."""
    sick = list(itertools.product(("qpos", "qvel", "warmstart", "action"), (math.nan, 1e30, math.inf)))
    healthy, poisoned = (vecsim.make(env_id, len(sick) + 4, max_episode_steps=50, **FAST) for _ in range(2))
    for env in (healthy, poisoned):
        env.reset(seed=0)
        rollout(env, 3)
    action, state, others = random_actions(healthy, 9), poisoned.state_dict(), slice(len(sick), None)
    sick_action = action.clone()
    for k, (field, poison) in enumerate(sick):
        if field == "action":
            sick_action[k, 0] = poison
        else:
            state["carry"][field][1, k] = poison
    poisoned.load_state_dict(state)
    healthy.pop_statistics(), poisoned.pop_statistics()
    good, bad = healthy.step(action), poisoned.step(sick_action)
    for answer in good, bad:  # these are in info too
        del answer[4]["final_info"]
    for ours, theirs in zip((*bad[:4], *bad[4].values()), (*good[:4], *good[4].values()), strict=True):
        assert torch.equal(ours[others], theirs[others]) and torch.isfinite(ours[others]).all()
    obs, reward, terminated, truncated, info = bad
    assert torch.isfinite(obs).all() and torch.isfinite(reward).all() and torch.isfinite(info["final_obs"]).all()
    invalid = info["invalid"]
    # a warm start that is no better than none is not used
    assert not invalid[others].any() and all(invalid[k] or field == "warmstart" for k, (field, _) in enumerate(sick))
    assert (reward[invalid] == 0).all() and truncated[invalid].all() and not terminated[invalid].any()
    assert torch.equal(obs[invalid], info["final_obs"][invalid])
    statistics = poisoned.pop_statistics()
    assert statistics["invalid"] == invalid.sum() and statistics["episodes"] == 0
    for step in rollout(poisoned, 3), rollout(healthy, 3):
        assert all(torch.isfinite(x).all() for x in step)


# ----------------------------------------------------------------------------------------------------------------------
# Reproducibility
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", ["Hopper-v5", "Ant-v5", "Pusher-v5", "Quadruped-Rough"])
def test_seeds(env_id):
    runs = []
    for seed in (1, 1, 2):
        env = vecsim.make(env_id, 8, seed=seed, max_episode_steps=4, **FAST)
        runs.append([env.reset()[0], *rollout(env, 6)])
        runs.append([env.reset(seed=seed)[0], *rollout(env, 6)])
    assert same(runs[0], runs[2]) and same(runs[1], runs[3])
    assert not torch.equal(runs[0][0], runs[4][0]) and not torch.equal(runs[1][0], runs[5][0])


RANDOMIZED = {"randomize": True, "randomize.push": 1.0, "randomize.push_interval": 0.03, "action_delay_ms": 20,
              "observation_noise": 0.1}  # fmt: skip


@pytest.mark.parametrize("env_id, options", [
    ("Hopper-v5", RANDOMIZED), ("Ant-v5", {}), ("Humanoid-v5", {}), ("Quadruped-Rough", {"randomize": True}),
])  # fmt: skip
def test_chunks_change_nothing(env_id, options):
    """Sizes that are multiples of 64: torch sums what is left over in another order."""
    options = {"max_episode_steps": 4, **options, **FAST}
    whole, parts = (vecsim.make(env_id, 128, chunk=chunk, **options) for chunk in (128, 64))
    assert torch.equal(whole.reset(seed=0)[0], parts.reset(seed=0)[0])
    assert same(rollout(whole, 5), rollout(parts, 5))
    assert whole.pop_statistics() == pytest.approx(parts.pop_statistics())


def chunk_sizes(env):
    return [env._part(torch.zeros(1, env.num_envs), part).shape[1] for part in env._parts]


def test_chunks_share_the_robots():
    """Equally, in whole cache lines."""
    env = vecsim.make("InvertedPendulum-v5", 2)
    for env.dtype, line in ((torch.float32, 16), (torch.float64, 8)):
        for env.num_envs in (*range(1, 300), *range(448, 50_000, 4003), 65536):
            env._prepare_chunks(None)
            sizes = [part.stop - part.start for part in env._parts]
            assert sum(sizes) == env.num_envs and max(sizes) <= vecsim.CHUNK
            assert len(sizes) == 1 or sizes[0] % line == 0
            assert len(sizes) == math.ceil(env.num_envs / vecsim.CHUNK) and sizes[0] < env.num_envs / len(sizes) + line
    compiled = {n: chunk_sizes(vecsim.make("InvertedPendulum-v5", n, compile=True)) for n in (5, 128, 10_000)}
    assert compiled == {5: [16], 128: [128], 10_000: [5008, 5008]}
    assert chunk_sizes(vecsim.make("InvertedPendulum-v5", 10_000)) == [5008, 4992]
    assert chunk_sizes(vecsim.make("InvertedPendulum-v5", 10, chunk=5000, compile=True)) == [10]


def test_compiled_chunks_and_threads_change_nothing(monkeypatch):
    """The second chunk of 128 is one of 64 with 64 copies, which count nowhere."""
    chosen = []
    monkeypatch.setattr(vecsim, "SHARE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    options = {"compile": True, "max_episode_steps": 3, "random_initial_ages": True, **FAST}
    whole, parts = (vecsim.make("InvertedPendulum-v5", 192, chunk=chunk, **options) for chunk in (192, 128))
    assert torch.equal(whole.reset(seed=0)[0], parts.reset(seed=0)[0])
    assert same(rollout(whole, 5), rollout(parts, 5))
    assert len(parts._environment_step.loops) == 1  # both chunks run the same code
    assert chunk_sizes(whole) == [192] and chunk_sizes(parts) == [128, 128]
    assert chosen == [1, 2] * 10  # a step keeps PyTorch's own threads off the cores
    assert whole.pop_statistics() == pytest.approx(parts.pop_statistics(), nan_ok=True)


def make_compiled(env_id, **options):
    """An eager environment and a compiled one of 32 robots in two chunks, for two threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 2)
        envs = [vecsim.make(env_id, 32, compile=flag, chunk=16, **options) for flag in (False, True)]
    first, other = (env.reset(seed=0)[0] for env in envs)
    assert torch.equal(first, other) and chunk_sizes(envs[1]) == [16, 16]
    return envs


def assert_rollouts_agree(eager, compiled, steps, tolerance):
    """Both return the same in steps from the same state."""
    compiled.load_state_dict(eager.state_dict())
    for a, b in zip(rollout(eager, steps), rollout(compiled, steps), strict=True):
        assert a.dtype == b.dtype and ((a.double() - b.double()).abs() / (1 + a.double().abs())).max() <= tolerance


def test_the_first_step_compiles_on_all_cores(monkeypatch):
    """Each function is built once, for both chunks, and not all in one thread."""
    built, build = [], vecsim.build_cpp
    started = threading.Barrier(2, timeout=60)

    def spy(source):
        built.append((source, threading.get_ident()))
        if len(built) <= 2:
            started.wait()  # breaks if no second thread compiles
        return build(source)

    monkeypatch.setattr(vecsim, "build_cpp", spy)
    _, compiled = make_compiled("InvertedPendulum-v5", **FAST)
    for _ in range(2):
        compiled.step(random_actions(compiled))
    built = [call for call in built if call[0] != vecsim.CPU_LOOP.format(robots=16)]
    sources, threads = zip(*built, strict=True)
    assert len(set(sources)) == len(sources) == 5  # begin, iteration and advance; before and after them
    assert len(set(threads)) == 2


@pytest.mark.slow
def test_compiled_equals_eager():
    """In float32, randomised, by Runge-Kutta and over resets. Rounding is 1e-7; the stages amplify it by some tens."""
    options = {"max_episode_steps": 3, "integrator": "rk4", **RANDOMIZED}
    eager, compiled = make_compiled("InvertedPendulum-v5", **options)
    for _ in range(3):  # the third one resets
        assert_rollouts_agree(eager, compiled, 1, 1e-5)
    assert eager.pop_statistics() == pytest.approx(compiled.pop_statistics(), rel=1e-5)


class Limbs(vecsim.Humanoid):
    """A small robot with what Humanoid and the quadruped compile: a quaternion, limits, a servo, more pairs than slots,
    bumpy ground, and contact forces in the observation."""

    def source(self):
        limb, shape = 'axis="0 1 0" range="-50 50" armature=".02" damping=".3"', 'fromto="0 0 0 0 0 -.22"'
        return f"""<mujoco><compiler autolimits="true"/><option timestep=".004"/><default><geom condim="1"/></default>
          <worldbody><geom type="plane" size="9 9 1" condim="3"/>
          <body pos="0 0 .5"><freejoint/><geom type="capsule" size=".08 .12"/>
          <body pos=".05 0 -.15"><joint name="left" {limb}/><geom type="capsule" size=".05" {shape}/></body>
          <body pos="-.05 0 -.15"><joint name="right" {limb}/><geom type="capsule" size=".05" {shape}/>
            <geom size=".07" pos=".02 0 -.3"/></body>
          </body></worldbody><actuator><position joint="left" kp="30" kv="1" ctrlrange="-1 1"/>
          <motor joint="right" gear="9" ctrlrange="-1 1"/></actuator></mujoco>"""

    def furnish(self, model, m):
        heights = 0.02 * torch.rand(81, 81, generator=torch.Generator().manual_seed(0), dtype=model.qpos0.dtype)
        terrain = vecsim.Terrain(heights, 0.2, (-8.0, -8.0), torch.zeros(1, 3))
        return dataclasses.replace(model, terrain=terrain)


def put_in_contact(env):
    """Put robots where MuJoCo's lie on the ground and on themselves, and some against their joint limits."""
    n, model = env.num_envs, env.model
    states = visit(converged(copy.deepcopy(env.mj_model)), 200, stride=20, episode=1000, touching=True)
    qpos, qvel = last_axis(states.qpos), last_axis(states.qvel)
    touching = torch.arange(200) % 13  # any, spread over the episodes, where there are no pairs
    if model.pair_geoms:
        xpos, xmat = vecsim.kinematics(model, qpos)
        touching = (vecsim.nearest_points(model.pair_segments, xpos, xmat, xpos[0])[2] < 0).sum(0)
    chosen = touching.argsort(descending=True)[:n]
    qpos, qvel = qpos[:, chosen], qvel[:, chosen]
    qpos[model.limit_qpos_index[0], :8] = model.limit_bound[0] - 0.05
    qvel[model.limit_dof_index[0], :8] = -20.0  # on its way out, or a servo's pull would leave the limit idle
    if model.terrain is not None and len(model.terrain.origins) > 1:
        qpos[:3] += model.terrain.origins[:: len(model.terrain.origins) // n][:n].T
    env.set_state(qpos, qvel)


EULER = {"integrator": "euler"}  # fewer functions to compile than Runge-Kutta's
LIMBS = {"integrator": "implicitfast", "pair_slots": 1, "healthy_z_range": (0.1, 2.0)}
LIMBS |= {"include_cinert_in_observation": False, "include_cvel_in_observation": False}


@pytest.mark.slow
@pytest.mark.parametrize(
    "env_id, compiler, options, active",
    [
        ("HalfCheetah-v5", "", EULER, ("contact", "limit")),
        ("Limbs", "", LIMBS, ("contact", "limit", "pair")),
        ("Ant-v5", "quickly_built", {}, ("contact", "limit")),  # Runge-Kutta
        ("Quadruped-Rough", "quickly_built", RANDOMIZED, ("contact", "limit")),
        ("Humanoid-v5", "quickly_built", EULER, ("contact", "limit", "pair")),
    ],
)
def test_compiled_equals_eager_in_contact(env_id, compiler, options, active, monkeypatch, request):
    """Robots that lie on the ground, on themselves and against their joint limits, in float64.

    Two small robots are compiled as in a training. For the large ones, g++ does not optimise."""
    if compiler:
        request.getfixturevalue(compiler)
    monkeypatch.setitem(vecsim.TASKS, "Limbs", Limbs)
    eager, compiled = make_compiled(env_id, dtype=torch.float64, **options)
    put_in_contact(eager)
    model, action = eager.robots(), random_actions(eager)
    with torch.no_grad():
        dynamics = vecsim.forward(model, eager.state(), eager.task.control(model, action.T), 4)
        c, it = dynamics.smooth.constraints, dynamics.solution
    for name, weight in vecsim.active_weights(c, it)._asdict().items():
        pushes = (weight > 0).flatten(0, -2).any(0) if len(weight) else torch.zeros(32, dtype=torch.bool)
        assert (pushes.sum() >= 4) == (name in active), name
    assert_rollouts_agree(eager, compiled, 2, 1e-7)  # rounding, 1e-16, times the condition of the contact problem


def test_pytorch_compiles_nothing(monkeypatch):
    """A compiled environment needs no other compiler than this file's and C++'s."""
    monkeypatch.setattr(torch, "compile", None)
    env = vecsim.make("InvertedPendulum-v5", 4, compile=True, **FAST)
    assert all(isinstance(function, vecsim.CompiledFunction) for function in vars(env._run).values())
    assert vars(env._run).keys() == vars(vecsim.EAGER).keys()
    env.reset(seed=0)
    env.step(random_actions(env))
    inputs = env.model, env.state(), random_actions(env).T
    for integrator in ("euler", "rk4"):
        for a, b in zip(
            vecsim.step(*inputs, integrator, 2, env._run)[0], vecsim.step(*inputs, integrator, 2)[0], strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_task_reads_the_dynamics_in_any_method(monkeypatch):
    """Eager and compiled. A reset has no dynamics."""

    class Reader(vecsim.InvertedPendulum):
        def observe(self, model, p, sensed):
            bias = torch.zeros_like(p.qvel) if p.dynamics is None else p.dynamics.smooth.qfrc_bias
            return super().observe(model, p, sensed) | {"bias": bias}

        def healthy(self, p, sensed):
            return super().healthy(p, sensed) & (p.dynamics.solution.qacc[0].abs() < 1e9)

    monkeypatch.setitem(vecsim.TASKS, "Reader", Reader)
    obs = []
    for flag in (False, True):
        env = vecsim.make("Reader", 8, compile=flag, **FAST)
        env.reset(seed=0)
        obs.append(env.step(random_actions(env))[0])
    assert obs[0][:, -2:].abs().min() > 0
    torch.testing.assert_close(*obs, rtol=1e-4, atol=1e-4)


def test_a_compiled_function_takes_any_number_of_robots_and_a_tensor_twice():
    """The first Runge-Kutta stage gets the velocity as rate too."""
    env = vecsim.make("InvertedPendulum-v5", 8)
    run = vecsim.compile_regions(env.model)
    for n in (8, 5, 8):
        qpos, qvel, other, qacc = (torch.rand(2, n, generator=torch.Generator().manual_seed(k)) for k in range(4))
        for rate in (qvel, other):
            inputs = env.model, vecsim.State(qpos, qvel, qacc), 0.5 * env.model.timestep, rate, qacc
            for ours, exact in zip(run.stage(*inputs), vecsim.stage(*inputs), strict=True):
                assert ours.shape == exact.shape and (ours - exact).abs().max() <= 1e-6
    assert len(run.stage.codes) <= 2  # for registers of 8 and of 4 robots


def test_compiled_systems_are_solved_as_eager_ones():
    """Without and with columns W beside the right-hand side."""
    packed = torch.tensor([[2.0], [0.5], [1.0]]).expand(-1, 8).contiguous()
    pendulum = vecsim.make("InvertedPendulum-v5", 8).model
    for count in (1, 3):  # columns
        solve = vecsim.CompiledFunction(vecsim.solve_packed, pendulum)
        right = torch.rand(2, count, 8, generator=torch.Generator().manual_seed(count))
        wrong = solve(pendulum, packed, right) - vecsim.solve_packed(pendulum, packed, right)
        assert wrong.shape == right[:, 0].shape and wrong.abs().max() <= 1e-5


def test_the_benchmarks_error_is_that_of_the_functions_it_timed(monkeypatch):
    env, seen = vecsim.make("InvertedPendulum-v5", 24, chunk=16), []
    env.reset(seed=0)

    def spy(model, smooth, it):
        seen.append(it.qacc.shape[1])
        return vecsim.newton_iteration(model, smooth, it)

    monkeypatch.setattr(env, "_run", vecsim.Regions(**vars(vecsim.EAGER) | {"newton_iteration": spy}))
    errors = simulator.acceleration_errors(env, random_actions(env), 4)
    assert seen == [16] * 4 and errors.shape == (16,) and errors.max() <= 1e-4


def test_the_benchmarks_error_compiles_nothing_new():
    """It runs what was compiled for the timed steps."""
    env = vecsim.make("InvertedPendulum-v5", 16, compile=True)
    env.reset(seed=0), env.step(random_actions(env)), env.step(random_actions(env))

    def compiled():
        return {name: len(function.codes) for name, function in vars(env._run).items()}

    before = compiled()
    simulator.acceleration_errors(env, random_actions(env), 2)
    simulator.acceleration_errors(env, random_actions(env), 4)
    assert before["newton_iteration"] == before["end_step"] == 1 and compiled() == before


# ----------------------------------------------------------------------------------------------------------------------
# Tasks
# ----------------------------------------------------------------------------------------------------------------------


def test_a_task_that_overrides_control_has_it_called(monkeypatch):
    class Reversed(vecsim.InvertedPendulum):
        def control(self, model, action):
            return -action

    monkeypatch.setitem(vecsim.TASKS, "Reversed", Reversed)
    plain, turned = vecsim.make("InvertedPendulum-v5", 4, **FAST), vecsim.make("Reversed", 4, **FAST)
    plain.reset(seed=0), turned.reset(seed=0)
    action = random_actions(plain)
    assert torch.equal(plain.step(action)[0], turned.step(-action)[0])


MY_TASK = """
from dataclasses import dataclass

import vecsim_torch


@dataclass(frozen=True)
class Heavy(vecsim_torch.Hopper):
    healthy_reward: float = 2.0
"""


def test_a_task_in_a_file(tmp_path, monkeypatch):
    """A relative path starts at the working directory, else beside vecsim_torch.py. The file is executed once."""
    (tmp_path / "my_task.py").write_text(MY_TASK)
    monkeypatch.chdir(tmp_path)
    env = vecsim.make("my_task.py:Heavy", 2, healthy_z_range="0.5:2.0", **FAST)
    assert env.task.healthy_reward == 2.0 and env.task.healthy_z_range == (0.5, 2.0)
    assert vecsim.find_task(f"{tmp_path}/my_task.py:Heavy") is type(env.task)
    assert vecsim.find_task("tasks/quadruped.py:Rough") is vecsim.find_task("Quadruped-Rough")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/quadruped.py").write_text(MY_TASK)  # another quadruped, which the short ids do not mean
    assert vecsim.find_task("Quadruped-Flat").__name__ == "Flat"
    for env_id, message in (
        ("Hoper-v5", "unknown task 'Hoper-v5'; choose one of InvertedPendulum-v5, .*, or file.py:Class$"),
        ("absent.py:Heavy", f"no file {tmp_path}/absent.py or .*/absent.py$"),
        ("my_task.py:Light", f"{tmp_path}/my_task.py has no class 'Light'$"),
    ):
        with pytest.raises(vecsim.InputError, match=message):
            vecsim.make(env_id, 2)


def test_the_task_of_the_readme(tmp_path, monkeypatch):
    """The example in README.md works as it is printed there."""
    readme = Path(vecsim.__file__).with_name("README.md").read_text()
    (tmp_path / "my_task.py").write_text(re.search(r"```python\n(.*?class SwingUp.*?)```", readme, re.DOTALL)[1])
    monkeypatch.chdir(tmp_path)
    env = vecsim.make("my_task.py:SwingUp", 4, effort_weight=0.5)
    assert env.reset(seed=0)[0].shape == (4, 3) and env.action_space.shape == (4, 1)
    info = env.step(torch.ones(4, 1))[4]
    assert torch.equal(info["reward_effort"], torch.full((4,), -0.5)) and (info["reward_up"] < -0.9).all()


def test_an_actuator_without_a_control_range_is_refused(monkeypatch):
    class Free(vecsim.InvertedPendulum):
        def source(self):
            return """<mujoco>
              <worldbody><body><joint name="j" type="slide"/><joint/><geom size=".1"/></body></worldbody><actuator>
              <motor name="push" joint="j"/></actuator></mujoco>"""

    class Bounded(Free):
        def action_range(self, model):
            return torch.tensor([-2.0]), torch.tensor([2.0])

    monkeypatch.setitem(vecsim.TASKS, "Free", Free)
    monkeypatch.setitem(vecsim.TASKS, "Bounded", Bounded)
    with pytest.raises(ValueError, match="actuators without a control range: push; .* ctrlrange"):
        vecsim.make("Free", 2)
    assert vecsim.make("Bounded", 2).single_action_space.high == 2.0


class Balls(vecsim.InvertedPendulum):
    """Five balls that can touch each other, with friction, and a motor."""

    def source(self):
        balls = "".join(f'<body pos="{k} 0 0"><freejoint/><geom size=".1"/></body>' for k in range(5))
        return f"""<mujoco><worldbody><body><joint name="j"/><geom size=".1" contype="0" conaffinity="0"/></body>{balls}
          </worldbody><actuator><motor joint="j" ctrllimited="true" ctrlrange="-1 1"/></actuator></mujoco>"""


def test_many_rows_of_self_contacts_are_not_compiled(monkeypatch):
    monkeypatch.setitem(vecsim.TASKS, "Balls", Balls)
    with pytest.raises(ValueError, match=r"36 rows .*pair_slots=9, 4 a slot.* at most 32; use fewer pair_slots"):
        vecsim.make("Balls", 2, pair_slots=9, compile=True)
    assert vecsim.make("Balls", 2, pair_slots=9).model.pair_slots == 9
    assert vecsim.make("Balls", 2, compile=True).model.pair_slots == 4


def test_dropped_contacts_are_counted():
    """A mean over robots and physics steps; here of one step."""
    folded, counts = folded_humanoids(6)
    for chunk in (6, 4):
        env = vecsim.make("Humanoid-v5", 6, dtype=torch.float64, chunk=chunk, frame_skip=1, **FAST)
        env.reset(seed=0)
        qpos = last_axis(folded)
        env.set_state(qpos, torch.zeros(env.model.nv, 6, dtype=torch.float64))
        assert not env.step(random_actions(env))[4]["invalid"].any()
        assert env.pop_statistics()["dropped_contacts"] == pytest.approx(np.mean(counts - 8))
        assert math.isnan(env.pop_statistics()["dropped_contacts"])
        env.reset(seed=0), env.step(random_actions(env))
        assert env.pop_statistics()["dropped_contacts"] == 0


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation, and what the trainers share
# ----------------------------------------------------------------------------------------------------------------------


def all_of(count):
    return torch.ones(count, dtype=torch.bool)


@pytest.mark.parametrize("observes", ["obs", "critic_obs"])
def test_evaluation_scores_the_first_episode_of_each_environment(observes):
    """Against a loop written out here: each environment counts once, however many episodes it could have had."""
    options = {"max_episode_steps": 12, "reset_noise_scale": 0.4, **FAST}
    env, sizes, starts = vecsim.make("Quadruped-Flat", 8, **options), [], []

    def act(obs, started):
        sizes.append(obs.shape[1])
        starts.append(started)
        return 2 * torch.sin(obs[:, :12])

    score = vecsim.evaluate(env, act, seed=3, observes=observes)
    assert set(sizes) == {(env.single_observation_space if observes == "obs" else env.single_critic_space).shape[0]}
    obs, info = env.reset(seed=3)
    returns, lengths, running, began = torch.zeros(8), torch.zeros(8), all_of(8), [all_of(8)]
    while running.any():
        seen = obs if observes == "obs" else info["critic_obs"]
        obs, reward, terminated, truncated, info = env.step(2 * torch.sin(seen[:, :12]))
        returns += reward * running
        lengths += running
        running &= ~(terminated | truncated)
        began.append(terminated | truncated)
    expected = [returns.mean(), returns.std(correction=0), returns.min(), 8, lengths.mean()]
    assert list(score) == ["mean", "std", "min", "episodes", "mean_length"]
    assert list(score.values()) == pytest.approx([float(x) for x in expected])
    assert all(torch.equal(a, b) for a, b in zip(starts, began))
    assert vecsim.describe(score).endswith(f"8 episodes of {score['mean_length']:.0f} steps)")


def test_evaluation_leaves_out_quarantined_environments():
    env = vecsim.make("InvertedPendulum-v5", 4, max_episode_steps=3, **FAST)
    step, broken = env.step, torch.tensor([True, False, False, False])

    def breaking(action):
        *answer, info = step(action)
        return *answer, info | {"invalid": broken}

    env.step = breaking
    score = vecsim.evaluate(env, lambda obs, started: torch.zeros(4, 1), seed=0)
    assert score == dict(mean=3.0, std=0.0, min=3.0, episodes=3, mean_length=3.0)
    broken = ~torch.zeros_like(broken)
    with pytest.raises(FloatingPointError, match="every environment of the evaluation diverged"):
        vecsim.evaluate(env, lambda obs, started: torch.zeros(4, 1), seed=0)


def test_merged_statistics_are_none_where_undefined():
    statistics = dict(episode_return=3.0, episode_length=10.0, episodes=4.0, success=math.nan, invalid=1.0)
    statistics |= dict(velocity_error=0.25, terrain_level=math.nan)
    merged = vecsim.merge_episode_statistics(statistics, torch.device("cpu"))
    expected = dict(episode_return=3.0, episode_length=10.0, episodes=4, success=None, invalid=1)
    assert merged == expected | dict(velocity_error=0.25, terrain_level=None)
    none_ended = vecsim.merge_episode_statistics(statistics | dict(episodes=0.0), torch.device("cpu"))
    assert none_ended["episode_return"] is None and none_ended["episodes"] == 0


def test_each_process_needs_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert vecsim.pick_device("cuda") == vecsim.pick_device(torch.device("cuda", 1)) == torch.device("cuda", 1)
    with pytest.raises(vecsim.InputError, match="several processes cannot share one GPU; use --device cuda"):
        vecsim.pick_device("cuda:0")
    made = []
    monkeypatch.setattr(vecsim, "make", lambda env_id, device, **options: made.append(vecsim.pick_device(device)))
    vecsim.make_environment(vecsim.RunFlags("Ant-v5"), None, 8, vecsim.pick_device("cuda"), seed=1)
    assert made == [torch.device("cuda", 1)]
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(vecsim.InputError, match="there is no GPU 3; .* sees 2 GPUs here"):
        vecsim.pick_device("auto")
    monkeypatch.delenv("WORLD_SIZE")
    assert vecsim.pick_device("cuda:1") == torch.device("cuda", 1)


# ----------------------------------------------------------------------------------------------------------------------
# Illegal input
# ----------------------------------------------------------------------------------------------------------------------


ROUGH = {"env_id": "Quadruped-Rough"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"env_id": "Walker3d-v5"}, "unknown task 'Walker3d-v5'; choose one of .*Ant-v5"),
        ({"num_envs": 0}, "num_envs must be at least 1, not 0"),
        ({"num_envs": 2.5}, "num_envs must be a whole number, not 2.5"),
        ({"delay_observations": 1.5}, "delay_observations must be of type int, not 1.5"),
        ({"chunk": 1.5}, r"chunk must be of type int \| None, not 1.5"),
        ({"num_envs": 99_999_999_999_999}, "num_envs = 99,999,999,999,999 needs more memory than there is"),
        ({"iterations": 0}, "iterations must be at least 1, not 0"),
        ({"pair_slots": 0, "env_id": "Ant-v5"}, "pair_slots must be at least 1, not 0"),
        ({"max_episode_steps": 0}, "max_episode_steps must be at least 1, not 0"),
        ({"integrator": "rk5"}, "unknown integrator 'rk5'; choose one of .*rk4"),
        ({"chunk": 0}, "chunk must be at least 1, not 0"),
        ({"frame_skip": 0}, "frame_skip must be at least 1, not 0"),
        ({"observation_noise": -0.1}, "observation_noise must be at least 0, not -0.1"),
        ({"action_delay_ms": math.nan}, "action_delay_ms must be at least 0, not nan"),
        ({"timestep_scale": 0}, "timestep_scale must be at least 0.001, not 0"),
        ({"seed": 1.5}, "seed must be of type int, not 1.5"),
        ({"observation_noise": "much"}, "observation_noise must be of type float, not 'much'"),
        ({"timestep_scale": math.inf}, "timestep_scale must be finite, not inf"),
        ({"hidden_observations": "true"}, r"hidden_observations must be of type str \| None, not True"),
        ({"ctrl_cost_weight": "abc"}, "ctrl_cost_weight must be of type float, not 'abc'"),
        ({"terminate_when_unhealthy": 0}, "terminate_when_unhealthy must be of type bool, not 0"),
        ({"healthy_z_range": 5}, r"healthy_z_range must be of type tuple\[float, float\] .*low:high\), not 5"),
        ({"device": "abacus"}, "device = abacus must be auto, cpu, cuda or cuda:N"),
        ({"ctrl_cost": 1.0}, "unknown option 'ctrl_cost' of Hopper-v5; it takes .*ctrl_cost_weight"),
        ({"healthy_state_range": (0, 1), "env_id": "Walker2d-v5"}, "unknown option 'healthy_state_range'"),
        ({"terrain_rows": 0, **ROUGH}, "terrain_rows must be at least 1, not 0"),
        ({"terrain_columns": 0, **ROUGH}, "terrain_columns must be at least 1, not 0"),
        ({"terrain_rows": 3, "terrain_level": 3, **ROUGH}, "at least -1 and under terrain_rows = 3, not 3"),
        ({"first_levels": 0, **ROUGH}, "first_levels must be at least 1, not 0"),
        ({"gait": 2, **ROUGH}, "unknown option 'gait' of Quadruped-Rough; it takes .*action_scale"),
        ({"randomize": {"frction": 0.1}}, "randomize.frction: .* no frction to vary; it has mass, .*gravity"),
        ({"randomize": {"mass": (-1, 2)}}, r"randomize.mass = \(-1, 2\) must be a number or a range .*at least 0.001"),
        ({"randomize": {"gravity": (2, 1)}}, r"randomize.gravity = \(2, 1\) must be a number or a range"),
        ({"randomize": {"mass": math.nan}}, "randomize.mass"),
        ({"randomize": {"mass": "heavy"}}, "randomize.mass = 'heavy' must be a number or a range"),
        ({"randomize": {"push": -1}}, "randomize.push = .* low at least 0"),
        ({"randomize": 3}, r"randomize must be of type bool \| dict.*, not 3"),
        ({"randomize.position_gain": 0.1}, "this robot has no position_gain to vary; it has mass"),
        ({"randomize.push_interval": 1.0}, "randomize.push_interval has no effect without randomize.push"),
        ({"randomise.mass": 0.1}, "unknown option 'randomise.mass'"),
        ({"perturb": {"push": 1.0}}, "unknown option 'perturb'"),
        ({"hidden_observations": "velocity"}, "hidden_observations must leave some of qpos, qvel and hide nothing"),
        ({"hidden_observations": "qpos,qvel"}, "hidden_observations must leave some of qpos, qvel and hide nothing"),
        ({"hidden_observations": "qvel,qacc"}, "hidden_observations must leave some of qpos, qvel and hide nothing"),
    ],
)
def test_make_refuses(arguments, message):
    with pytest.raises(vecsim.InputError, match=message):
        vecsim.make(**{"env_id": "Hopper-v5", "num_envs": 2} | arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA GPU, which is not refused")
def test_make_refuses_a_missing_gpu():
    with pytest.raises(ValueError, match="sees 0 GPUs here; use .* cpu"):
        vecsim.make("Hopper-v5", 2, device="cuda")


def test_step_and_reset_refuse():
    env = vecsim.make("Hopper-v5", 2)
    with pytest.raises(ValueError, match="call reset"):
        env.step(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"seed must be one whole number, not \[1, 2\]"):
        env.reset(seed=[1, 2])
    env.reset(seed=0)
    for wrong in (torch.zeros(3, 2), torch.zeros(3), np.zeros((3, 2), np.float32), [[0.0] * 3] * 2):
        with pytest.raises(ValueError, match=r"actions must be a tensor or a numpy array of shape \(2, 3\)"):
            env.step(wrong)
    assert env.step(torch.zeros(2, 3, dtype=torch.float64))[0].dtype == torch.float32
    state = env.state_dict()
    for other in (vecsim.make("Hopper-v5", 3), vecsim.make("Walker2d-v5", 2)):
        with pytest.raises(vecsim.InputError, match="this state is of"):
            other.load_state_dict(state)


# ----------------------------------------------------------------------------------------------------------------------
# The device
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("env_id, randomized", [
    ("Hopper-v5", RANDOMIZED), ("Ant-v5", {}), ("Quadruped-Flat", {"randomize": True}),
    ("Quadruped-Rough", {"randomize": True}),
])  # fmt: skip
def test_cuda_graph(env_id, randomized):
    """Replay equals eager, its random numbers are fresh, and nothing reads the device."""
    options = {"device": "cuda", "max_episode_steps": 3, **randomized}
    eager, graph = (vecsim.make(env_id, 64, compile=flag, **options) for flag in (False, True))
    assert torch.equal(eager.reset(seed=0)[0], graph.reset(seed=0)[0])
    resets, masses = [], []
    for t in range(6):
        graph.load_state_dict(eager.state_dict())
        action = random_actions(vecsim.make(env_id, 64), t).cuda()
        ours, theirs = graph.step(action), eager.step(action)
        for a, b in zip(ours[:4], theirs[:4], strict=True):
            wrong = (a.double() - b.double()).abs() / (1 + b.double().abs())
            assert wrong.max() <= 1e-3  # float32 contact forces, other summation order
        for name, values in graph.parameters().items():
            assert torch.equal(values, eager.parameters()[name])
        if t % 3 == 2:
            assert ours[3].all()
            resets.append(ours[0].clone())
            masses.append(graph.parameters().get("mass"))
    assert not (resets[0] == resets[1]).all(1).any()
    assert not randomized or not torch.equal(*masses)
    torch.cuda.set_sync_debug_mode("error")
    try:
        eager.step(action), graph.step(action)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    a, b = graph.reset(seed=5)[0], graph.reset(seed=5)[0]
    assert torch.equal(a, b)
    kept = graph.step(action)
    copies = [x.clone() for x in kept[:4]]
    graph.step(action)
    assert same(list(kept[:4]), copies)


def test_inference_mode_leaves_an_ordinary_environment():
    """rsl_rl and others roll out under it; what comes after must not care, and must be the same."""
    plain, env = (vecsim.make("InvertedPendulum-v5", 4, max_episode_steps=3, **FAST) for _ in range(2))
    with torch.inference_mode():
        made = vecsim.make("InvertedPendulum-v5", 4, max_episode_steps=3, **FAST)
        env.reset(seed=0), env.step(random_actions(env, 0))
        state = env.state_dict()
        made.reset(seed=1), made.load_state_dict(state)
        made.set_state(*made.state()[:2]), made.load_state_dict(state)
    plain.reset(seed=0), plain.step(random_actions(plain, 0))
    for t in range(1, 5):
        action = random_actions(plain, t)
        expected = plain.step(action)
        for other in (env, made):
            out = other.step(action.clone().requires_grad_())  # autograd is on, and finds nothing to record
            assert torch.equal(out[0], expected[0]) and not out[0].requires_grad and not out[0].is_inference()
    weights = torch.ones(4, 1, requires_grad=True)
    (out[0] * weights).sum().backward()
    assert plain.pop_statistics() == env.pop_statistics() == made.pop_statistics()
    env.reset(seed=3)


def test_a_snapshot_is_not_touched_by_later_steps():
    env = vecsim.make("Hopper-v5", 8, max_episode_steps=3, **FAST)
    with pytest.raises(ValueError, match="reset"):
        env.state_dict()
    env.reset(seed=0)
    snapshot = env.state_dict()
    kept = {name: x for name, x in snapshot["carry"].items() if isinstance(x, torch.Tensor)}
    kept["statistics"] = snapshot["statistics"]
    before = {name: x.clone() for name, x in kept.items()}
    other = vecsim.make("Hopper-v5", 8, max_episode_steps=3, **FAST)
    other.load_state_dict(snapshot)
    for _ in range(5):
        env.step(random_actions(env))
        other.step(random_actions(other))
    for name, x in kept.items():
        assert torch.equal(x, before[name]), name
    assert env.pop_statistics()["episodes"] > 0
    with pytest.raises(ValueError, match="max_episode_steps"):
        vecsim.make("Hopper-v5", 8, max_episode_steps=4, **FAST).load_state_dict(snapshot)
