"""The learner of ppo_mjx_jax.py: hand-computed cases, probe environments, many agents, resume, command line."""

import ast
import dataclasses
import errno
import functools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import types
from pathlib import Path

import gae_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppo_mjx_jax as ppo

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(num_envs=16, num_steps=8, actor_hidden=(16,), critic_hidden=(16,), eval_episodes=0, compilation_cache="")


def hyper_of(args):
    """The hyperparameters of one agent."""
    return ppo.Hyperparameters(*(jnp.asarray(x[0]) for x in ppo.hyperparameters(args)[0]))


# Hand-computed cases


@pytest.mark.parametrize("case", gae_cases.CASES, ids=lambda case: case[0])
def test_advantages(case):
    _, next_values, terminated, truncated, invalid, expected = case
    ends = (jnp.array(flags, bool) for flags in (terminated, truncated, invalid))
    reward, *values = (jnp.array(x) for x in (gae_cases.REWARDS, gae_cases.VALUES, next_values))
    rollout = ppo.Transition(*[None] * 4, reward, *ends, *[None] * 3)
    hyper = hyper_of(ppo.Args(gamma=gae_cases.GAMMA, gae_lambda=gae_cases.GAE_LAMBDA))
    advantage = ppo.advantages_gae(rollout, *values, hyper)
    np.testing.assert_allclose(advantage, expected, rtol=1e-6)


def test_kl_is_exact():
    """By quadrature, in one dimension: KL(N(0.3, 0.5) || N(-0.2, 0.8))."""
    x, (m, s), (n, t) = np.linspace(-6, 6, 20001), (0.3, 0.5), (-0.2, 0.8)
    density = lambda x, m, s: np.exp(-0.5 * ((x - m) / s) ** 2) / s / np.sqrt(2 * np.pi)  # noqa: E731
    p, q = density(x, m, s), density(x, n, t)
    kl = ppo.gaussian_kl(jnp.array([[m]]), jnp.log(jnp.array([s])), jnp.array([[n]]), jnp.log(jnp.array([t])))
    assert abs(float(kl[0]) - np.sum(p * np.log(p / q)) * (x[1] - x[0])) < 1e-5
    log_prob = ppo.gaussian_log_prob(jnp.array([[0.1]]), jnp.array([[m]]), jnp.log(jnp.array([s])))
    assert abs(float(log_prob[0]) - np.log(density(0.1, m, s))) < 1e-6


def test_statistics_merge_like_one_batch_and_skip_invalid_rows():
    rows, valid = np.random.default_rng(0).normal(3, 2, (100, 4)).astype(np.float32), np.arange(100) % 3 > 0
    rows[~valid] = np.nan
    merged = ppo.Statistics(jnp.zeros(4), jnp.ones(4), jnp.zeros(()))
    for part in (slice(0, 30), slice(30, 100)):
        merged = merged.merge(ppo.Statistics.of(jnp.array(rows[part]), jnp.array(valid[part])))
    np.testing.assert_allclose(merged.mean, rows[valid].mean(0), rtol=1e-5)
    np.testing.assert_allclose(merged.variance, rows[valid].var(0), rtol=1e-5)
    unchanged = merged.merge(ppo.Statistics.of(jnp.array(rows), jnp.zeros(100, bool)))
    for before, after in zip(merged, unchanged):
        np.testing.assert_array_equal(before, after)


def test_explained_variance_leaves_quarantined_transitions_out():
    value, target = jnp.array([[1.0, 2.0], [3.0, 1e6]]), jnp.array([[1.0, 6.0], [2.5, 5.0]])
    weight = jnp.array([[4.0, 4.0], [4.0, 0.0]]) / 3
    batch = ppo.Batch(None, None, None, None, value=value, target=target, advantage=None, weight=weight)
    errors, targets = np.array([0.0, 4.0, -0.5]), np.array([1.0, 6.0, 2.5])
    assert float(ppo.explained_variance(batch)) == pytest.approx(1 - errors.var() / targets.var(), rel=1e-5)


@pytest.mark.parametrize("schedule, kl, moved, rate", [
    ("constant", 9.0, True, 1e-3),
    ("linear", 9.0, True, 5e-4),
    ("adaptive", 0.031, True, 1e-3 / 1.5),
    ("adaptive", 0.029, True, 1e-3),
    ("adaptive", 0.008, True, 1e-3),
    ("adaptive", 0.007, True, 1.5e-3),
    ("adaptive", 0.0, False, 1e-3),  # before the first gradient step of an iteration
])  # fmt: skip
def test_schedules_half_way(schedule, kl, moved, rate):
    """The fourth iteration of eight, so desired_kl is 0.015."""
    options = dict(desired_kl=(0.01, 0.02), learning_rate_schedule=schedule, total_timesteps=1024)
    args = ppo.Args(**SMALL | options)
    state = ppo.AgentState(*[None] * 8)._replace(iteration=4, learning_rate=1e-3)
    found = ppo.scheduled_learning_rate(ppo.make_setup(probe("constant"), args), hyper_of(args), state, kl, moved)
    assert np.isclose(found, rate)


@pytest.mark.parametrize("normalized, expected", [(True, [10.0, -3.0, 0.0]), (False, [50.0, -3.0, 0.0])])
def test_what_the_networks_see_of_an_observation(normalized, expected):
    statistics = ppo.Statistics(jnp.zeros(3), jnp.ones(3), jnp.zeros(()))
    found = ppo.network_input(ppo.Args(normalize_observations=normalized), statistics, jnp.array([50.0, -3.0, 0.0]))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_sweep_over_desired_kl_sets_both_of_its_ends():
    args = dataclasses.replace(ppo.task_defaults("Ant-v5"), sweep="desired_kl", sweep_values=(0.01, 0.02), num_seeds=2)
    hyper, seeds = ppo.hyperparameters(args)
    np.testing.assert_allclose(hyper.desired_kl, [[0.01, 0.01], [0.01, 0.01], [0.02, 0.02], [0.02, 0.02]])
    np.testing.assert_allclose(hyper.gamma, 0.98)
    np.testing.assert_array_equal(seeds, [1, 2, 1, 2])


# Probe environments: tiny, with known answers; each tells which part is broken


PROBES = ("constant", "value", "action", "delayed", "truncation", "broken")


def probe(kind):
    """x is -1 or 1, drawn at reset; observation = (x, age, first action). kind: a name, or a traced index of PROBES.

    constant    one step, reward 1                                    V = 1
    value       one step, reward x                                    V = x
    action      one step, reward -(a - x / 2)^2                       a = x / 2: the policy follows the advantage
    delayed     two steps, the second pays -(a_0 - x / 2)^2           a_0 = x / 2: credit goes back through time
    truncation  reward 1 forever, cut by a time limit of 5 steps      V = 1 / (1 - gamma) = 5: a time limit is no end
    broken      as action, but where x is 1 half the steps are NaN    its NaN must not reach the learner
    """
    number = PROBES.index(kind) if isinstance(kind, str) else kind

    def reset(key):
        x = 2.0 * jax.random.bernoulli(key) - 1.0
        return (x, jnp.zeros(()), jnp.zeros(())), jnp.array([x, 0.0, 0.0])

    def step(state, action):
        x, age, first = state
        last = jnp.array([1, 1, 1, 2, 10**9, 1])[number]
        first, age = jnp.where(age == 0, action[0], first), age + 1
        error = -jnp.square(first - x / 2)
        broken = jnp.where((x > 0) & (action[0] > 0.5), jnp.nan, error)
        reward = jnp.stack([jnp.ones(()), x, error, error * (age == 2), jnp.ones(()), broken])[number]
        return (x, age, first), jnp.array([x, age, first]), jnp.asarray(reward, x.dtype), age >= last

    return ppo.Environment(reset, step, np.array([-2.0]), np.array([2.0]), max_episode_steps=5)


@pytest.fixture(scope="module")
def trained():
    """trained(name, iterations): V where x is -1 and 1, the actions there, the log; one program trains all probes."""
    sizes = dict(num_envs=64, num_steps=16, update_epochs=4, num_minibatches=2, log_std_init=-0.7, gamma=0.8)
    args = ppo.Args(**SMALL | sizes | dict(learning_rate=3e-3, desired_kl=(0.02, 0.02)))
    hyper = hyper_of(args)

    def train(number, iterations):
        setup = ppo.make_setup(probe(number), args)
        state, sums = ppo.advance(setup, hyper, ppo.initialise(setup, hyper, 1), iterations)
        obs = jnp.array([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
        action = 2.0 * ppo.policy_mean(setup, state.parameters, state.obs_statistics, obs)[:, 0]
        return ppo.values_of(setup, state, obs), action, sums

    program = jax.jit(jax.vmap(train, in_axes=(0, None)))
    program = functools.cache(functools.partial(program, np.arange(len(PROBES))))
    return lambda name, iterations: jax.tree.map(lambda x: np.asarray(x[PROBES.index(name)]), program(iterations))


@pytest.mark.parametrize("name, values", [("constant", [1, 1]), ("value", [-1, 1]), ("truncation", [5, 5])])
def test_the_value_function_learns(name, values, trained):
    np.testing.assert_allclose(trained(name, 250)[0], values, rtol=0.06, atol=0.06)


@pytest.mark.parametrize("name", ["action", "delayed"])
def test_the_policy_learns(name, trained):
    np.testing.assert_allclose(trained(name, 250)[1], [-0.5, 0.5], atol=0.12)


def test_a_nan_is_quarantined_and_never_learned_from(trained):
    _, action, sums = trained("broken", 250)
    assert int(sums["invalid"]) > 0 and all(np.isfinite(x).all() for x in sums.values())
    assert abs(action[0] + 0.5) < 0.12 and np.isfinite(action).all()


def test_episodes_that_began_at_a_random_age_are_left_out_of_the_log(trained):
    """The truncation probe pays 1 for each of its 5 steps: whole episodes return 5, shortened ones less."""
    _, _, sums = trained("truncation", 2)
    assert sums["episode_return"] == 5 * sums["episodes"] == sums["episode_length"]
    assert sums["success"] == sums["episodes"] and 64 * 4 < sums["episodes"] < 64 * 32 / 5


def test_a_quarantined_step_changes_neither_loss_nor_gradient_nor_statistics():
    """Whatever its observation, action and reward are. The only gradient step leaves the adaptive learning rate."""
    args = ppo.Args(**SMALL, update_epochs=1, num_minibatches=1)
    setup, hyper = ppo.make_setup(probe("action"), args), hyper_of(args)
    state = jax.jit(functools.partial(ppo.initialise, setup))(hyper, 1)
    rng, shape = np.random.default_rng(0), (args.num_steps, args.num_envs)
    draw = lambda *k: jnp.asarray(rng.normal(size=(*shape, *k)), jnp.float32)  # noqa: E731
    invalid, never = jnp.asarray(rng.random(shape) < 0.3), jnp.zeros(shape, bool)
    fields = draw(3), draw(3), draw(1), draw(1), draw()  # obs, final_obs, action, mean, reward

    @jax.jit
    def learned(wrong):
        spoilt = [jnp.where(invalid.reshape(*shape, *[1] * (x.ndim - 2)), wrong, x) for x in fields]
        rollout = ppo.Transition(*spoilt, never, never, invalid, fields[-1], fields[-1], fields[-1])
        batch, returns = ppo.make_batch(setup, hyper, state, rollout, jax.random.PRNGKey(0))
        minibatch, log_std = jax.tree.map(lambda x: x[0], batch), state.parameters["actor"]["log_std"]
        loss = jax.value_and_grad(ppo.ppo_loss, argnums=2, has_aux=True)
        after, _ = ppo.update(setup, hyper, state, batch)
        return loss(setup, hyper, state.parameters, minibatch, log_std), returns, after.learning_rate

    for found, expected in zip(*map(jax.tree.leaves, (learned(3.0), learned(0.0)))):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert learned(0.0)[2] == hyper.learning_rate


def test_final_obs_is_the_state_before_the_reset_and_resets_differ():
    env = probe("delayed")
    slots = jax.vmap(functools.partial(ppo.first_slot, env))(jax.random.split(jax.random.PRNGKey(0), 256))
    slots = slots._replace(age=jnp.zeros(256, int))
    step = jax.vmap(functools.partial(ppo.autoreset_step, env))
    action = jnp.full((256, 1), 0.25)
    slots, first = step(slots, action, action, jax.random.split(jax.random.PRNGKey(1), 256))
    slots, second = step(slots, action, action, jax.random.split(jax.random.PRNGKey(2), 256))
    assert not first.terminated.any() and second.terminated.all()
    np.testing.assert_array_equal(first.final_obs, second.obs)
    np.testing.assert_allclose(second.final_obs, np.c_[second.obs[:, 0], np.full(256, 2.0), np.full(256, 0.5)])
    assert (slots.obs[:, 0] != second.obs[:, 0]).mean() > 0.3 and not np.asarray(slots.obs[:, 1:]).any()


def test_the_matrix_products_of_the_physics_are_true_float32():
    """A GPU would otherwise take TF32. Nothing is compiled."""
    args = ppo.task_defaults("Ant-v5")
    ppo.configure(dataclasses.replace(args, compilation_cache=""))
    env = ppo.make_environment(ppo.make_task(args))
    state, _ = jax.eval_shape(env.reset, jax.random.PRNGKey(0))
    text = jax.jit(env.step).lower(state, jnp.zeros(len(env.action_low))).as_text()
    products = re.findall("dot_general .*", text)
    assert len(products) > 3 and all("precision = [HIGHEST, HIGHEST]" in product for product in products)


# Whole runs, on a probe


def final_state(run_dir):
    return ppo.load_checkpoint(run_dir / "checkpoint.npz")["arrays"]


def run(run_dir, **changes):
    """Train on a probe; return the arrays of the last checkpoint."""
    ppo.train(ppo.Args(**SMALL | dict(total_timesteps=512, run_dir=str(run_dir)) | changes), probe("action"))
    return final_state(run_dir)


def assert_same(found, expected, tolerance=0.0):
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    """The folder of a run of four iterations without an interruption."""
    folder = tmp_path_factory.mktemp("plain")
    run(folder)
    return folder


@pytest.mark.slow
def test_a_sweep_trains_every_seed_with_every_value_and_a_diverged_agent_does_not_stop_the_others(plain_run, tmp_path):
    """A learning rate of 1e30 breaks its two agents. Alone, such an agent is an error."""
    swept = dict(sweep="learning_rate", sweep_values=(1e-3, 1e30), num_seeds=2)
    together = run(tmp_path / "together", **swept)
    alone = final_state(plain_run), run(tmp_path / "alone", seed=2)
    for k in (0, 1):
        assert_same({name: x[[k]] for name, x in together.items()}, alone[k], tolerance=1e-3)
    kernels = [x for name, x in together.items() if name.startswith("parameters") and "kernel" in name]
    assert all((x[0] != x[1]).any() and not np.isfinite(x[2:]).all() for x in kernels)
    lines = (tmp_path / "together" / "metrics.jsonl").read_text()
    assert "NaN" not in lines and "Infinity" not in lines and '"agent_episode_return"' in lines
    with pytest.raises(FloatingPointError, match="training diverged"):
        run(tmp_path / "diverged", learning_rate=1e30)


TINY_RUN = "--num-envs 16 --num-steps 8 --num-minibatches 8 --actor-hidden 16 --critic-hidden 16 --total-timesteps 512"
TINY_RUN = [*TINY_RUN.split(), "--eval-episodes", "0", "--compilation-cache", ""]  # as SMALL


def main_on_probe(monkeypatch, *words, **patches):
    """The exit status of the command line, trained on a probe environment in place of the task."""
    with monkeypatch.context() as patch:
        for name, value in dict(train=functools.partial(ppo.train, env=probe("action")), **patches).items():
            patch.setattr(ppo, name, value)
        patch.setattr(sys, "argv", ["ppo_mjx_jax.py", *TINY_RUN, *map(str, words)])
        return ppo.main()


@pytest.mark.slow
def test_a_run_that_a_full_disk_ends_and_then_a_signal_goes_on_bit_for_bit(plain_run, tmp_path, monkeypatch, capsys):
    """The disk is full at the second of four checkpoints; the signal comes in the third iteration."""
    path, savez, metrics_record = tmp_path / "checkpoint.npz", np.savez, ppo.metrics_record

    def full(file, **arrays):
        savez(file, **arrays)
        if path.exists():
            os.truncate(file, 1000)
            raise OSError(errno.ENOSPC, "No space left on device")

    def interrupted(sums, iterations, counters, speed):
        if counters["env_steps"] == 384:
            os.kill(os.getpid(), signal.SIGTERM)
        return metrics_record(sums, iterations, counters, speed)

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        assert main_on_probe(monkeypatch, "--run-dir", tmp_path, "--checkpoint-every", 128) == 2
    assert "error: [Errno 28] No space left on device\n" in capsys.readouterr().err
    assert ppo.load_checkpoint(path)["env_steps"] == 128
    assert main_on_probe(monkeypatch, "--resume", path, metrics_record=interrupted) == 128 + signal.SIGINT
    assert f"stopped after 384 steps; continue with --resume {path}" in capsys.readouterr().out
    assert main_on_probe(monkeypatch, "--resume", path) == 0
    assert_same(final_state(tmp_path), final_state(plain_run))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["env_steps"] for row in rows] == [128, 256, 512]


@pytest.mark.slow
def test_a_checkpoint_gives_the_flags_and_refuses_those_that_do_not_fit(plain_run, monkeypatch):
    path = str(plain_run / "checkpoint.npz")
    args = ppo.parse_args(["--resume", path, "--total-timesteps", "1024", "--gamma", "0.9"])
    assert (args.num_envs, args.actor_hidden, args.gamma, args.run_dir) == (16, (16,), 0.9, None)
    for change in ("--num-steps 4", "--seed 2", "--actor-hidden 8", "--total-timesteps 512"):
        with pytest.raises(ppo.InputError, match="omit that flag|give a larger --total-timesteps"):
            ppo.train(ppo.parse_args(["--resume", path, *change.split()]))


def command(program, *arguments):
    """Run Python in a process that sees two devices."""
    xla_flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    environment = os.environ | dict(XLA_FLAGS=xla_flags, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    words = [sys.executable, *program, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == 0 and "2 device(s)" in done.stdout, done.stderr


@pytest.mark.slow
def test_two_devices_share_the_environments(plain_run, tmp_path):
    train = 'ppo.train = functools.partial(ppo.train, env=probe("action"))'
    command(["-c", f"from test_ppo_mjx import *; {train}; sys.exit(ppo.main())"], *TINY_RUN, "--run-dir", tmp_path)
    assert_same(final_state(tmp_path), final_state(plain_run), tolerance=1e-3)


@pytest.mark.slow
def test_the_pendulum_is_solved_in_gymnasiums_own_environment_and_the_run_folder_is_complete(tmp_path, capsys):
    """The first command of the header, end to end, on two devices. Then its checkpoint is played."""
    command([ROOT / "ppo_mjx_jax.py"], "--run-dir", tmp_path, "--compilation-cache", "", "--eval-every", 131_072)
    result = json.loads((tmp_path / "eval.json").read_text())
    names = "env_id algorithm seed env_steps train_seconds compile_seconds versions".split()
    assert set(names) <= result.keys()
    assert result["gymnasium"]["mean"] == result["gymnasium"]["min"] == 1000 and result["gymnasium"]["episodes"] == 20
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    names = "env_steps wall_seconds steps_per_second episode_return episode_length episodes".split()
    assert set(names) <= rows[-1].keys() and rows[-1]["env_steps"] == result["env_steps"]
    scored = {row["env_steps"]: row["gymnasium_return"] for row in rows if "gymnasium_return" in row}
    assert scored.keys() == {131_072, result["env_steps"]} and scored[result["env_steps"]] == 1000
    assert {"config.json", "checkpoint.npz", "curve.png"} <= {path.name for path in tmp_path.iterdir()}
    assert any(path.name.startswith("events") for path in tmp_path.iterdir())
    [agent] = ppo.play(ppo.parse_args(["--play", str(tmp_path / "checkpoint.npz"), "--eval-episodes", "3"]))
    assert agent["gymnasium"] == dict(mean=1000.0, std=0.0, min=1000.0, episodes=3, mean_length=1000.0)
    assert "seed 1: 1000.0 ± 0.0 (worst 1000.0)" in capsys.readouterr().out


def test_the_policies_of_a_checkpoint_are_its_agents_and_a_diverged_one_has_no_score(tmp_path, capsys):
    options = dict(eval_episodes=2, num_seeds=2, sweep="gamma", sweep_values=(0.9, 0.99))
    args, keys = ppo.Args(**SMALL | options), jax.random.split(jax.random.PRNGKey(0), 4)
    actor = ppo.MLP(args.actor_hidden, 1, 0.5)
    network = jax.vmap(actor.init, (0, None))(keys, jnp.zeros((1, 4)))
    network = jax.tree.map(lambda x: x.at[3].set(jnp.nan), network)
    mean, variance = (jax.random.uniform(key, (4, 4)) for key in keys[:2])
    statistics, path = ppo.Statistics(mean, variance, jnp.ones(4)), tmp_path / "checkpoint.npz"
    state = ppo.AgentState({"actor": {"network": network}}, (), jnp.ones(4), statistics, *[()] * 4)
    ppo.save_checkpoint(path, args, state, dict(env_steps=0))
    checkpoint, obs = ppo.load_checkpoint(path), np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    for k in range(3):
        seen = np.clip((obs - mean[k]) / np.sqrt(variance[k] + 1e-6), -10, 10)
        expected = 3.0 * actor.apply(jax.tree.map(lambda x, k=k: x[k], network), seen)  # the cart's range is +-3
        action = ppo.load_policy(checkpoint, k)(obs, np.zeros(5, bool))
        assert isinstance(action, np.ndarray)
        np.testing.assert_allclose(action, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ppo.InputError, match="agent = 4: the checkpoint holds 4"):
        ppo.load_policy(checkpoint, 4)
    agents = ppo.evaluate(args, checkpoint)
    assert [(x["seed"], x["value"]) for x in agents] == [(1, 0.9), (2, 0.9), (1, 0.99), (2, 0.99)]
    assert [x["gymnasium"] and x["gymnasium"]["episodes"] for x in agents] == [2, 2, 2, None]
    assert "seed 2, gamma 0.99: no score: it diverged" in capsys.readouterr().out


def test_the_log_holds_rows_of_numbers_and_drops_what_is_run_again(tmp_path, monkeypatch):
    """Weights & Biases reads TensorBoard's file: here is a stand-in for the package."""
    started = []
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **options: started.append(options)))
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"env_steps": {n}}}\n' for n in (128, 256, 384)) + '{"env_st')
    log = ppo.RunLog(tmp_path, ppo.Args(**SMALL, track=True), first_step=256)
    log.write(dict(env_steps=384, episode_return=3.0, episode_length=None, agent_episode_return=[2.0, 4.0]))
    log.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["env_steps"] for row in rows] == [128, 256, 384] and rows[-1]["agent_episode_return"] == [2.0, 4.0]
    assert started[0]["sync_tensorboard"] and started[0]["config"]["num_envs"] == 16
    (events,) = tmp_path.glob("events*")
    assert b"episode_return" in events.read_bytes() and b"agent_episode_return" not in events.read_bytes()


def test_a_video_is_a_film_of_one_episode(tmp_path):
    path = tmp_path / "play.mp4"
    try:
        ppo.film(ppo.Args(), lambda obs: np.zeros((len(obs), 1)), path)
    except (ImportError, AttributeError, RuntimeError) as error:
        if not re.search(r"\b(E?GL|OSMesa|OpenGL|GLFW|gladLoad\w*|DISPLAY)", str(error), re.IGNORECASE):
            raise
        pytest.skip(f"no offscreen rendering on this machine: {error}")
    assert path.stat().st_size > 1000


# Command line


@pytest.mark.parametrize("damage", ["nothing", "one array", "no flags", "a list", "another byte"])
def test_a_damaged_checkpoint_is_one_line(damage, tmp_path, monkeypatch, capsys):
    path = tmp_path / "checkpoint.npz"
    with open(path, "wb") as file:
        if damage == "one array":
            np.save(file, np.zeros(3))
        elif damage == "another byte":
            np.savez(file, header=json.dumps(dict(args={})), weights=np.full(1000, 1.0))
            file.seek(4000)
            file.write(b"!")
        elif damage != "nothing":
            np.savez(file, header=json.dumps([] if damage == "a list" else {"env_steps": 1}))
    monkeypatch.setattr(sys, "argv", ["ppo_mjx_jax.py", "--play", str(path)])
    assert ppo.main() == 2
    err = capsys.readouterr().err
    assert err.startswith("error: checkpoint") and "cannot be read" in err and err.count("\n") == 1


def test_a_run_is_not_written_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ppo.InputError, match="contains a run; choose another"):
        ppo.train(ppo.Args(run_dir=str(tmp_path), **SMALL))


@pytest.mark.parametrize("flags, complaint", [
    ("--env-id Pong-v5", "Pong-v5"),
    ("--num-minibatches 3", "does not split into 3 minibatches; use 2"),
    ("--num-envs 0", "num_envs = 0 must be >= 1"),
    ("--log-every 0", "log_every = 0 must be >= 1"),
    ("--eval-every 1000 --eval-episodes 0", "eval_every needs eval_episodes >= 1"),
    ("--gamma 1.5", "gamma = 1.5 must be between 0 and 1"),
    ("--desired-kl 0 0.1", "desired_kl = (0.0, 0.1) must be > 0"),
    ("--sweep gamma --sweep-values 0.9 1.5", "gamma = 1.5 must be between 0 and 1"),
    ("--sweep num_envs --sweep-values 1 2", "num_envs"),
    ("--sweep gamma", "give both"),
    ("--device tpu", "tpu"),
    ("--nonsense 1", "nonsense"),
    ("--env-kwargs colour 3", "colour"),
    ("--env-id Humanoid-v5 --env-kwargs include_cvel_in_observation True", "this script has no include_cvel_in_obs"),
    ("--play nowhere.npz", "checkpoint nowhere.npz cannot be read: FileNotFoundError"),
    ("--resume gae_cases.py", "cannot be read"),
    ("--seed -1", "seed = -1 must be between 0 and"),
    ("--capture-video", "--capture-video needs a checkpoint"),
    ("--resume a --play b", "give one of them"),
])  # fmt: skip
def test_bad_input_is_one_line_and_status_2(flags, complaint, monkeypatch, capsys):
    monkeypatch.chdir(Path(__file__).parent)
    monkeypatch.setattr(sys, "argv", ["ppo_mjx_jax.py", *shlex.split(flags)])
    assert ppo.main() == 2
    message = capsys.readouterr().err.strip()
    assert complaint in message and message.startswith("error: ") and "\n" not in message


def test_a_missing_gpu_is_bad_input():
    if any(device.platform == "gpu" for device in jax.devices()):
        pytest.skip("this machine has a GPU")
    with pytest.raises(ppo.InputError, match="device = cuda: JAX sees none here"):
        ppo.configure(ppo.Args(device="cuda"))


def test_given_options_go_on_top_of_the_tasks(tmp_path):
    args = ppo.parse_args("--env-id Ant-v5 --env-kwargs ctrl_cost_weight 0.1 --num-envs 64".split())
    assert args.env_kwargs == {"include_cfrc_ext_in_observation": False, "ctrl_cost_weight": 0.1}
    assert args.gamma == 0.98 and args.desired_kl == (0.015, 0.009) and args.num_envs == 64


def test_every_flag_is_read():
    """As an attribute of args or hyper, outside of the function that only checks values."""
    tree = ast.parse((ROOT / "ppo_mjx_jax.py").read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", None) != "check_flags"]
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    read = {node.attr for node in attributes if ast.unparse(node.value) in ("args", "setup.args", "given", "hyper")}
    assert {field.name for field in dataclasses.fields(ppo.Args)} <= read


def test_shared_flags_and_the_defaults_of_tasks_are_those_of_the_pytorch_twin():
    twin = pytest.importorskip("ppo_gpu_torch")
    assert ppo.TASKS == {name: twin.TASKS[name] for name in ppo.TASKS}
    mine, theirs = ({f.name: f for f in dataclasses.fields(module.Args)} for module in (ppo, twin))
    assert theirs.keys() - mine.keys() == {"compile", "cuda_graphs", "bf16", "export", "profile"}
    differ = {name for name in theirs.keys() & mine.keys() if mine[name].default != theirs[name].default}
    assert differ == {"env_id", "solver_iterations"}  # a CPU takes minutes to compile Ant in MJX
    # the tasks choose the iterations of the PyTorch twin
    chosen = {twin.vecsim.find_task(name).solver_iterations for name in ppo.TASKS}
    assert {mine["solver_iterations"].default} == chosen
