"""VecSim as one of Gymnasium's vector environments: numpy arrays, `info`, registration and Gymnasium's own wrappers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import gymnasium
import mujoco
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import vector as wrappers
from test_vecsim_env import FAST

import vecsim_torch as vecsim
from benchmarks import simulator


def make_vec(env_id="Hopper-v5", num_envs=4, **options):
    return gymnasium.make_vec(f"vecsim/{env_id}", num_envs=num_envs, **FAST | options)


def same(a, b):
    """Equal in kind, dtype and value, dicts included."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    return type(a) is type(b) and a.dtype == b.dtype and np.array_equal(a, b)


def test_make_vec_imports_the_module():
    program = """
import gymnasium, sys
assert "vecsim_torch" not in sys.modules
env = gymnasium.make_vec("vecsim_torch:vecsim/InvertedPendulum-v5", num_envs=3)
obs, info = env.reset(seed=1)
assert env.observation_space.contains(obs)
env.action_space.seed(0)
obs, reward, terminated, truncated, info = env.step(env.action_space.sample())
assert env.observation_space.contains(obs) and reward.shape == (3,)
print(env)
"""
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(vecsim.__file__).parent, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout == "VecSim(vecsim/InvertedPendulum-v5, num_envs=3)\n"
    assert all(f"vecsim/{env_id}" in gymnasium.registry for env_id in vecsim.TASKS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("env_id", ["Hopper-v5", "Quadruped-Flat"])
def test_numpy_answers_are_those_in_tensors(env_id, dtype):
    options = {"dtype": dtype, "max_episode_steps": 2, **FAST}
    ours, theirs = (vecsim.make(env_id, 3, numpy=flag, **options) for flag in (True, False))
    (obs, info), (tensor, tensors) = ours.reset(seed=5), theirs.reset(seed=5)
    assert same(obs, tensor.numpy())
    assert same(info.get("critic_obs", obs), tensors.get("critic_obs", tensor).numpy())
    assert info.get("_critic_obs", np.ones(3, bool)).all()
    rng = np.random.default_rng(0)
    for t in range(4):
        action = rng.uniform(-1, 1, ours.action_space.shape)  # float64, as numpy draws it
        answer, tensors = ours.step(action), theirs.step(torch.tensor(action, dtype=dtype))
        assert all(same(x, y.numpy()) for x, y in zip(answer[:4], tensors[:4], strict=True))
        info, expected = answer[4], tensors[4]
        assert ("final_obs" in info) == (t % 2 == 1)
        for name in set(expected) - {"final_info"}:
            if name in info:
                assert same(info[name], expected[name].numpy()), name
        for name, value in info.get("final_info", {}).items():
            assert same(value, np.ones(3, bool) if name.startswith("_") else expected["final_info"][name].numpy()), name


def test_a_numpy_action_is_copied():
    env = make_vec()
    env.reset(seed=0)
    action = np.zeros((4, 3), np.float32)
    action.flags.writeable = False  # as numpy.from_dlpack gives it
    env.step(action)
    assert not action.any()


def test_info_in_tensors_costs_nothing():
    """Gymnasium's keys are there in every step, as the tensors that exist anyway."""
    env = vecsim.make("Hopper-v5", 8, max_episode_steps=10, **FAST)
    env.reset(seed=0)
    seen = torch.zeros((), dtype=torch.bool)
    for t in range(12):
        *_, terminated, truncated, info = env.step(torch.full((8, 3), 1.0 - 0.2 * t))
        assert torch.equal(info["_final_obs"], terminated | truncated)
        assert info["_final_info"] is info["_final_obs"]
        assert info["final_info"].keys() == info.keys() - {"final_obs", "_final_obs", "final_info", "_final_info"}
        assert all(value is info[name] for name, value in info["final_info"].items())
        seen |= info["_final_obs"].any()
    assert seen


def entries(info, i):
    """What `info` holds of environment i, by its masks."""
    held = [name for name in info if not name.startswith("_") and info[f"_{name}"][i]]
    assert all(info[f"_{name}"].dtype == np.bool_ for name in held)
    return {name: entries(info[name], i) if isinstance(info[name], dict) else info[name][i] for name in held}


def test_info_follows_gymnasium():
    """From the same states and actions: what SyncVectorEnv answers under SAME_STEP, environment by environment."""
    count, horizon, differing = 3, 5, {"x_position", "z_distance_from_origin"}  # vecsim does not repeat the state
    reference = SyncVectorEnv(
        [lambda: gymnasium.make("Hopper-v5", max_episode_steps=horizon)] * count, autoreset_mode=AutoresetMode.SAME_STEP
    )
    robots = [env.unwrapped for env in reference.envs]
    for robot in robots:
        robot.model.opt.integrator = mujoco.mjtIntegrator.mjINT_EULER
        robot.model.opt.jacobian = mujoco.mjtJacobian.mjJAC_DENSE
    env = make_vec(num_envs=count, max_episode_steps=horizon, dtype=torch.float64, iterations=8)
    assert env.metadata["autoreset_mode"] == reference.metadata["autoreset_mode"]
    assert env.reset(seed=0)[1] == {}
    reference.reset(seed=0)
    rng, ends = np.random.default_rng(0), []
    for t in range(2 * horizon):
        if t == 2:  # one robot is tipped over
            robots[1].set_state(robots[1].data.qpos + [0, 0, 0.3, 0, 0, 0], robots[1].data.qvel)
        env.set_state(*(torch.tensor(np.stack([getattr(r.data, x) for r in robots], 1)) for x in ("qpos", "qvel")))
        action = rng.uniform(-1, 1, (count, 3)).astype(np.float32)
        theirs, ours = reference.step(action), env.step(action)
        ended = theirs[2] | theirs[3]
        assert same(ours[2], theirs[2]) and same(ours[3], theirs[3])
        assert np.allclose(ours[1], theirs[1], atol=1e-6)
        assert {"final_obs", "final_info"} & ours[4].keys() == {"final_obs", "final_info"} & theirs[4].keys()
        for i in range(count):
            a, b = entries(ours[4], i), entries(theirs[4], i)
            if ended[i]:
                assert not a.keys() - {"final_obs", "final_info"} and b.keys() - a.keys() == differing
                assert np.allclose(a["final_obs"], b["final_obs"], atol=1e-6)
                a, b = a["final_info"], b["final_info"]
            assert not a.pop("invalid") and b.keys() - a.keys() <= differing
            assert np.allclose(list(a.values()), [b[name] for name in a], atol=1e-6)
        ends.append(ended.sum())
    assert set(ends) == {0, 1, 2} and ours[3].sum() == 2  # alone and together, by a fall and by the time limit
    reference.close()


# ----------------------------------------------------------------------------------------------------------------------
# Gymnasium's wrappers, each over at least one end of an episode
# ----------------------------------------------------------------------------------------------------------------------


def pendulum(**options):
    """Four pendulums that are released at up to 0.19 rad and fall at 0.2."""
    return make_vec("InvertedPendulum-v5", reset_noise_scale=0.19, **options)


def steps_of(env, steps=25):
    """What `steps` random steps from Gymnasium's action space return; several episodes end."""
    env.action_space.seed(0)
    env.reset(seed=0)
    ended = 0
    for _ in range(steps):
        action = env.action_space.sample()
        answer = env.step(torch.tensor(action) if isinstance(env, wrappers.NumpyToTorch) else action)
        ended += int((answer[2] | answer[3]).sum())
        yield action, answer
    assert ended >= 8


def test_record_episode_statistics():
    env = wrappers.RecordEpisodeStatistics(pendulum())
    returns, lengths, recorded = np.zeros(4), np.zeros(4, int), 0
    for _, (_, reward, terminated, truncated, info) in steps_of(env):
        returns, lengths, ended = returns + reward, lengths + 1, terminated | truncated
        assert ("episode" in info) == ended.any()
        if ended.any():
            assert same(info["_episode"], ended)
            assert np.allclose(info["episode"]["r"][ended], returns[ended])
            assert (info["episode"]["l"][ended] == lengths[ended]).all()
            recorded += ended.sum()
            returns[ended], lengths[ended] = 0, 0
    assert env.episode_count == recorded == len(env.return_queue)


def test_numpy_to_torch():
    """The quadruped too, whose reset has info."""
    pytest.importorskip("array_api_compat")
    for make in (pendulum, lambda: make_vec("Quadruped-Flat", max_episode_steps=10)):
        env, direct = wrappers.NumpyToTorch(make()), make()
        direct.reset(seed=0)
        assert all(isinstance(x, torch.Tensor) for x in (env.reset(seed=0)[0], *env.reset(seed=0)[1].values()))
        for action, answer in steps_of(env):
            assert all(same(vecsim.to_numpy(x), y) for x, y in zip(answer, direct.step(action), strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# Policies in Gymnasium's own environments
# ----------------------------------------------------------------------------------------------------------------------


def lean(obs, started):
    """A pendulum's cart moves under its pole, for a while."""
    return (2 * obs[:, 1:2] + 0.3 * obs[:, 3:4]).clamp(-3, 3)


def test_evaluation_in_gymnasium():
    """Each episode against Gymnasium alone; options that only vecsim has are left out."""
    options = {"reset_noise_scale": 0.15, "max_episode_steps": 60}
    score = vecsim.evaluate_in_gymnasium("InvertedPendulum-v5", lean, 5, 7, options | {"randomize.mass": 0.1})
    env, returns = gymnasium.make("InvertedPendulum-v5", **options), []
    for episode in range(5):
        obs, _ = env.reset(seed=7 + episode)
        returns.append(0.0)
        ended = False
        while not ended:
            obs, reward, terminated, truncated, _ = env.step(lean(torch.tensor(obs).float()[None], None)[0].numpy())
            returns[-1] += reward
            ended = terminated or truncated
    assert len(set(returns)) > 1
    assert score["mean"] == pytest.approx(np.mean(returns)) and score["min"] == min(returns) and score["episodes"] == 5
    assert vecsim.evaluate_in_gymnasium("Quadruped-Rough", lean, 5, 7, {}) is None


def test_evaluation_in_gymnasium_of_a_policy_that_sees_everything():
    sizes = []

    def act(obs, started):
        sizes.append((obs.shape, obs.dtype))
        return torch.zeros(2, 12)

    options = {"max_episode_steps": 3}
    score = vecsim.evaluate_in_gymnasium("Quadruped-Flat", act, 2, 0, options, observes="critic_obs")
    space = vecsim.make("Quadruped-Flat", 1).single_critic_space
    assert score["mean_length"] == 3.0 and set(sizes) == {((2, *space.shape), torch.float32)}


@pytest.mark.parametrize("env_id", ["InvertedPendulum-v5", "tasks/cartpole_swingup.py:SwingUp"])
def test_film(env_id, tmp_path, monkeypatch):
    """In Gymnasium's own environment, or in vecsim where Gymnasium has none."""
    monkeypatch.delenv("DISPLAY", raising=False)
    args = vecsim.RunFlags(env_id=env_id, env_kwargs={"max_episode_steps": 5}, compile=False)
    try:
        path = vecsim.film(args, lambda obs, started: 0 * obs[:, :1], tmp_path / "play.mp4")
    except Exception as error:  # MuJoCo's renderers raise AttributeError, ImportError, RuntimeError or their own
        if re.search(r"\b(E?GL|OSMesa|OpenGL|GLFW|gladLoad\w*|DISPLAY)", str(error), re.IGNORECASE):
            pytest.skip(f"no OpenGL on this machine: {error}")
        raise
    assert path.name == "play.mp4" and path.stat().st_size > 1_000


def test_evaluations_have_the_physics_of_the_training():
    flags = dict(integrator="rk4", solver_iterations=7, compile=False)
    env = vecsim.whole_episodes(vecsim.RunFlags(env_id="tasks/cartpole_swingup.py:SwingUp", **flags), None, 2)
    assert (env.settings.integrator, env.settings.iterations, env.random_initial_ages) == ("rk4", 7, False)


@pytest.mark.parametrize("groups, drawn", [((3, 3), (0, 0)), ((3, 1), (3, 1)), ((5, 4), (0, 0))])
def test_a_film_shows_a_robot_whose_geoms_are_all_in_groups_that_are_not_drawn(groups, drawn):
    class Grouped(vecsim.InvertedPendulum):
        def source(self):
            m = vecsim.compile_mjcf(super().source())
            m.geom_group[m.geom_bodyid > 0] = groups
            return m

    env = vecsim.make(Grouped, 1)
    scene = vecsim.make_renderer(env).model
    assert tuple(scene.geom_group[scene.geom_bodyid > 0]) == drawn
    assert tuple(env.mj_model.geom_group[scene.geom_bodyid > 0]) == groups


def test_hidden_observations_are_missing_everywhere_and_change_nothing_else():
    """In vecsim, after an episode's end, for a critic, in set_state, in the names, and in Gymnasium."""
    options = dict(max_episode_steps=3, observation_noise=0.1)
    for env_id, hidden in (("HalfCheetah-v5", "qvel"), ("Quadruped-Flat", "joint_velocity,angular_velocity")):
        whole, part = (vecsim.make(env_id, 2, **options, **x) for x in ({}, {"hidden_observations": hidden}))
        slices = whole.observation_slices
        assert list(part.observation_slices) == [name for name in slices if name not in hidden.split(",")]
        columns = torch.cat([torch.arange(slices[name].start, slices[name].stop) for name in part.observation_slices])
        names = whole.observation_names(slices)
        assert part.observation_names(part.observation_slices) == [names[k] for k in columns]
        seen = {env: [env.reset(seed=3)[0]] for env in (whole, part)}
        for env, rows in seen.items():
            for k in range(4):
                obs, reward, *_, info = env.step(torch.full((2, env.model.nu), 0.1 * k))
                rows += [obs, info["final_obs"]]
            rows += [env.set_state(*env.state()[:2])]
        noise = seen[whole][0][:, columns] - seen[part][0]
        assert noise.abs().max() < 0.3  # perhaps of other random numbers, because there are fewer
        assert torch.equal(seen[whole][-1][:, columns], seen[part][-1])
        assert all(x.shape == (2, len(columns)) for x in seen[part])
        assert whole.single_critic_space == part.single_critic_space


def test_gymnasium_hides_what_vecsim_hides():
    seen = {}
    for hidden in (None, "qvel"):
        rows = seen[hidden] = []

        def act(obs, started, rows=rows):
            rows.append(obs)
            return torch.zeros(2, 6)

        options = {"max_episode_steps": 4} | ({"hidden_observations": hidden} if hidden else {})
        vecsim.evaluate_in_gymnasium("HalfCheetah-v5", act, 2, 7, options)
    assert torch.equal(torch.stack(seen["qvel"]), torch.stack(seen[None])[..., :8])


def shown(history, stack, delay):
    """The last `stack` observations without the newest `delay`; copies of the first one fill what is missing."""
    ages = reversed(range(delay, delay + stack))
    return torch.cat([history[max(0, len(history) - 1 - age)] for age in ages])


@pytest.mark.parametrize("stack, delay", [(3, 0), (1, 2), (2, 1)])
def test_past_observations_are_those_of_the_same_episode(stack, delay):
    """Beside an environment that shows all: after resets, in final_obs, after set_state and load_state_dict."""
    options = dict(max_episode_steps=4, hidden_observations="qvel", seed=5, random_initial_ages=True)
    past = dict(stack_observations=stack, delay_observations=delay)
    plain, late = vecsim.make("HalfCheetah-v5", 3, **options), vecsim.make("HalfCheetah-v5", 3, **options, **past)
    names = [f"qpos[-{age}]" if age else "qpos" for age in reversed(range(delay, delay + stack))]
    assert list(late.observation_slices) == names
    assert late.observation_names(late.observation_slices)[-1] == f"{names[-1]}/ffoot"
    now, seen = plain.reset()[0], late.reset()[0]
    histories = [[row] for row in now]
    saved = None
    for k in range(9):
        assert torch.equal(seen, torch.stack([shown(history, stack, delay) for history in histories])), k
        if k == 6:
            saved = late.state_dict()
        action = torch.full((3, 6), 0.1 * k)
        now, _, _, truncated, info = plain.step(action)
        seen, *_, late_info = late.step(action)
        for history, final in zip(histories, info["final_obs"], strict=True):
            history.append(final)
        assert torch.equal(late_info["final_obs"], torch.stack([shown(x, stack, delay) for x in histories]))
        histories = [[row] if over else x for row, over, x in zip(now, truncated, histories, strict=True)]
    again = vecsim.make("HalfCheetah-v5", 3, **options, **past)
    again.load_state_dict(saved)
    assert torch.equal([again.step(torch.full((3, 6), 0.1 * k))[0] for k in (6, 7, 8)][-1], seen)
    assert torch.equal(late.set_state(*plain.state()[:2]), plain.set_state(*plain.state()[:2]).repeat(1, stack))


def test_gymnasium_shows_the_past_as_vecsim_does():
    history = []

    def act(obs, started):
        history.append(obs[0])
        return torch.zeros(1, 6)

    options = {"max_episode_steps": 6, "hidden_observations": "qvel"}
    vecsim.evaluate_in_gymnasium("HalfCheetah-v5", act, 1, 7, options)
    whole, history = history, []
    options |= {"stack_observations": 2, "delay_observations": 1}
    vecsim.evaluate_in_gymnasium("HalfCheetah-v5", act, 1, 7, options)
    expected = [shown(whole[: k + 1], 2, 1) for k in range(6)]
    assert torch.equal(torch.stack(history[:6]), torch.stack(expected))


def test_options_that_can_be():
    of_vecsim = {"randomize": True, "randomize.mass": 0.1, "self_collision": False, "chunk": 8}
    shared = {"reset_noise_scale": 0.1, "max_episode_steps": 50}
    assert vecsim.gymnasium_options(of_vecsim | shared) == shared
    vecsim.check_env_kwargs(of_vecsim | shared)


# ----------------------------------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_benchmark(tmp_path):
    """The command as a user starts it, for a task that imports vecsim_torch too."""
    flags = "--num-envs 8 --no-compile --threads 1 --seconds 0.01 --json figures/result.json".split()
    command = [sys.executable, vecsim.__file__, "--env-id", "Quadruped-Flat", *flags]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    result = json.loads((tmp_path / "figures/result.json").read_text())
    assert result["env_id"] == "Quadruped-Flat" and result["threads"] == 1
    assert result["physics_steps_per_second"] > 0 and result["mujoco_c_physics_steps_per_second"] > 0
    assert result["invalid"] == 0 and 0 <= result["dropped_contacts"] < 1  # per robot and physics step
    assert result["command"].endswith("figures/result.json") and all(f'"{name}": ' in answer.stdout for name in result)
    errors = result["qacc_error_p99_by_iterations"]
    assert list(errors) == ["2", "3", "4"] and 0 < errors["4"] <= errors["2"]


def test_gymnasiums_half_cheetah_leaves_no_log_file(tmp_path, monkeypatch):
    """MuJoCo warns about its MJCF, by default in a file in the working directory."""
    monkeypatch.chdir(tmp_path)
    vecsim.gymnasium_envs("HalfCheetah-v5", 1, {}).close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["--seconds", "nan"], ["--seconds", "0"], ["--threads", "0"]])
def test_the_benchmark_refuses_impossible_times_and_threads(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vecsim_torch.py", *words])
    with pytest.raises(SystemExit) as stop:
        simulator.main()
    assert stop.value.code == 2 and "must be positive and finite" in capsys.readouterr().err
