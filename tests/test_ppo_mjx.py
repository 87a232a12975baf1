"""The learner of ppo_mjx_jax.py: hand-computed cases, probe environments, many agents, resume, command line."""

import os
import tempfile

CACHE = os.path.join(tempfile.gettempdir(), "onefile-gpu-rl-test-programs")
FAST_COMPILE = "--xla_backend_optimization_level=0"  # the tests compile more than they compute
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST_COMPILE}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", CACHE)

import ast
import dataclasses
import errno
import functools
import json
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("mujoco.mjx")
import gae_cases  # noqa: E402
import jax.numpy as jnp  # noqa: E402

import ppo_mjx_jax as ppo  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(
    num_envs=16, num_steps=8, actor_hidden=(16,), critic_hidden=(16,), eval_episodes=0, compilation_cache=CACHE
)


class Learner:
    """One agent before its first step, with what its functions need."""

    def __init__(self, env, **changes):
        self.args = ppo.Args(**SMALL | changes)
        ppo.check_flags(self.args)
        self.setup = ppo.make_setup(env, self.args)
        self.hyper = ppo.Hyperparameters(*(jnp.asarray(x[0]) for x in ppo.hyperparameters(self.args)[0]))
        self.state = jax.jit(functools.partial(ppo.initialise, self.setup))(self.hyper, 1)


# Hand-computed cases


@pytest.mark.parametrize("case", gae_cases.CASES, ids=lambda case: case[0])
def test_advantages(case):
    _, next_values, terminated, truncated, invalid, expected = case
    ends = (jnp.array(flags, bool) for flags in (terminated, truncated, invalid))
    reward, *values = (jnp.array(x) for x in (gae_cases.REWARDS, gae_cases.VALUES, next_values))
    rollout = ppo.Transition(*[None] * 4, reward, *ends, *[None] * 3)
    discounts = dict(gamma=gae_cases.GAMMA, gae_lambda=gae_cases.GAE_LAMBDA, reward_scale=1.0)
    hyper = ppo.Hyperparameters(*ppo.hyperparameters(ppo.Args(**SMALL))[0])._replace(**discounts)
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
    learner = Learner(probe("constant"), **options)
    assert learner.setup.iterations == 8
    state = learner.state._replace(iteration=jnp.array(4))
    found = ppo.scheduled_learning_rate(learner.setup, learner.hyper, state, jnp.array(kl), jnp.array(moved))
    assert np.isclose(float(found), rate)


@pytest.mark.slow
def test_an_iteration_of_one_gradient_step_leaves_the_adaptive_learning_rate_alone():
    _, _, sums = train_on_probe("action", 5, update_epochs=1, num_minibatches=1)
    assert np.isclose(float(sums["learning_rate"]) / 5, 3e-3)


@pytest.mark.parametrize("normalized, expected", [(True, [10.0, -3.0, 0.0]), (False, [50.0, -3.0, 0.0])])
def test_what_the_networks_see_of_an_observation(normalized, expected):
    statistics = ppo.Statistics(jnp.zeros(3), jnp.ones(3), jnp.zeros(()))
    found = ppo.network_input(ppo.Args(normalize_observations=normalized), statistics, jnp.array([50.0, -3.0, 0.0]))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("done, stop", [(0, 3), (3, 4), (4, 6), (6, 7), (7, 9), (12, 14), (18, 20)])
def test_the_program_stops_where_a_multiple_is_crossed(done, stop):
    """Iterations of 100 steps, log every 300, checkpoint every 350 (crossed at 400, 700, ...), 20 iterations."""
    assert ppo.next_stop(done, 20, 100, (300, None, 350)) == stop


def test_a_sweep_over_desired_kl_sets_both_of_its_ends():
    args = dataclasses.replace(ppo.task_defaults("Ant-v5"), sweep="desired_kl=0.01,0.02", num_seeds=2)
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

    limit = 1000 if isinstance(kind, str) and kind != "truncation" else 5  # the others end sooner by themselves
    return ppo.Environment(reset, step, 3, np.array([-2.0]), np.array([2.0]), limit)


@functools.cache
def probe_program(update_epochs, num_minibatches):
    """The flags, and a compiled function (probe, hyper, iterations) -> values, actions, sums, for all probes."""
    sizes = dict(num_envs=64, num_steps=16, actor_hidden=(32,), critic_hidden=(32,), log_std_init=-0.7)
    sizes |= dict(update_epochs=update_epochs, num_minibatches=num_minibatches)
    args = ppo.Args(**SMALL | sizes | dict(learning_rate=3e-3, desired_kl=(0.02, 0.02)))

    def train(number, hyper, iterations):
        setup = ppo.make_setup(probe(number), args)
        state, sums = ppo.advance(setup, hyper, ppo.initialise(setup, hyper, 1), iterations)
        obs = jnp.array([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
        action = 2.0 * ppo.policy_mean(setup, state.parameters, state.obs_statistics, obs)[:, 0]
        return ppo.values_of(setup, state, obs), action, sums

    return args, jax.jit(train)


def train_on_probe(name, iterations, gamma=0.9, update_epochs=4, num_minibatches=8):
    """Values and actions where x is -1 and 1, and the sums of the log."""
    args, train = probe_program(update_epochs, num_minibatches)
    hyper, _ = ppo.hyperparameters(dataclasses.replace(args, gamma=gamma))
    values, action, sums = train(PROBES.index(name), jax.tree.map(lambda x: jnp.asarray(x[0]), hyper), iterations)
    return np.asarray(values), np.asarray(action), sums


@pytest.mark.parametrize("name, values", [("constant", [1, 1]), ("value", [-1, 1]), ("truncation", [5, 5])])
def test_the_value_function_learns(name, values):
    found, _, _ = train_on_probe(name, 250, gamma=0.8)
    np.testing.assert_allclose(found, values, rtol=0.06, atol=0.06)


@pytest.mark.parametrize("name", ["action", "delayed"])
def test_the_policy_learns(name):
    _, action, _ = train_on_probe(name, 150)
    np.testing.assert_allclose(action, [-0.5, 0.5], atol=0.12)


def test_a_quarantined_step_changes_neither_loss_nor_gradient_nor_statistics():
    """Whatever its observation, action and reward are."""
    learner = Learner(probe("action"), num_minibatches=1)
    args, setup, hyper, state = learner.args, learner.setup, learner.hyper, learner.state
    rng, shape = np.random.default_rng(0), (args.num_steps, args.num_envs)
    draw = lambda *k: jnp.asarray(rng.normal(size=(*shape, *k)), jnp.float32)  # noqa: E731
    invalid, never = jnp.asarray(rng.random(shape) < 0.3), jnp.zeros(shape, bool)
    fields = draw(3), draw(3), draw(1), draw(1), draw()  # obs, final_obs, action, mean, reward

    @jax.jit
    def learned(wrong):
        spoilt = [jnp.where(invalid.reshape(*shape, *[1] * (x.ndim - 2)), wrong, x) for x in fields]
        rollout = ppo.Transition(*spoilt, never, never, invalid, fields[-1], fields[-1], fields[-1])
        batch, returns = ppo.make_batch(setup, hyper, state, rollout, jax.random.PRNGKey(0))
        batch, log_std = jax.tree.map(lambda x: x[0], batch), state.parameters["actor"]["log_std"]
        loss = jax.value_and_grad(ppo.ppo_loss, argnums=2, has_aux=True)
        return loss(setup, hyper, state.parameters, batch, log_std), returns

    for found, expected in zip(*map(jax.tree.leaves, (learned(3.0), learned(0.0)))):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_nan_is_quarantined_and_never_learned_from():
    _, action, sums = train_on_probe("broken", 100)
    assert int(sums["invalid"]) > 0 and all(np.isfinite(x).all() for x in jax.tree.leaves(sums))
    assert abs(action[0] + 0.5) < 0.12 and np.isfinite(action).all()


def test_final_obs_is_the_state_before_the_reset_and_resets_differ():
    env = probe("delayed")
    slots = jax.vmap(functools.partial(ppo.first_slot, env, False))(jax.random.split(jax.random.PRNGKey(0), 256))
    step = jax.vmap(functools.partial(ppo.autoreset_step, env))
    action = jnp.full((256, 1), 0.25)
    slots, first = step(slots, action, action, jax.random.split(jax.random.PRNGKey(1), 256))
    slots, second = step(slots, action, action, jax.random.split(jax.random.PRNGKey(2), 256))
    assert not first.terminated.any() and second.terminated.all()
    np.testing.assert_array_equal(first.final_obs, second.obs)
    np.testing.assert_allclose(second.final_obs, np.c_[second.obs[:, 0], np.full(256, 2.0), np.full(256, 0.5)])
    assert (slots.obs[:, 0] != second.obs[:, 0]).mean() > 0.3 and not np.asarray(slots.obs[:, 1:]).any()


def test_episodes_that_began_at_a_random_age_are_left_out_of_the_log():
    """The truncation probe pays 1 for each of its 5 steps: whole episodes return 5, shortened ones less."""
    _, _, sums = train_on_probe("truncation", 2)
    assert sums["return_sum"] == 5 * sums["episodes"] == sums["length_sum"] and sums["success_sum"] == sums["episodes"]
    assert 64 * 4 < sums["episodes"] < 64 * 32 / 5


@pytest.mark.slow
def test_evaluation_leaves_quarantined_episodes_out_and_counts_only_the_first_of_each_environment():
    for name, episodes, length in (("truncation", 64, 5), ("broken", 32, 1)):
        learner = Learner(probe(name), eval_episodes=64)
        parameters = learner.state.parameters
        last = parameters["actor"]["network"]["params"]["Dense_1"]
        last["bias"] = last["bias"] + 0.5  # action 1.0: "broken" gives NaN wherever x is 1
        score = ppo.evaluate_in_mjx(learner.setup, parameters, learner.state.obs_statistics, jax.random.PRNGKey(0))
        found, (returns, lengths, failed) = ppo.summary(*score), score
        assert found["mean_length"] == length and abs(found["episodes"] - episodes) < 16
        assert found["episodes"] == 64 - int(failed.sum()) and np.isfinite(found["mean"])
    assert failed.any() and ppo.summary(returns, lengths, np.ones(64, bool)) is None


def dot_precisions(jaxpr):
    """The precision of every matrix product in a jaxpr, including its loops and calls."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append(equation.params["precision"])
        inner = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
        found += [precision for x in inner if hasattr(x, "eqns") for precision in dot_precisions(x)]
    return found


@pytest.mark.parametrize("env_id", ["InvertedPendulum-v5", "Ant-v5"])
def test_the_matrix_products_of_the_physics_are_true_float32(env_id):
    """A GPU would otherwise take TF32. Looked up in the traced step: nothing is compiled."""
    args = ppo.task_defaults(env_id)
    ppo.configure(dataclasses.replace(args, compilation_cache=CACHE))
    env = ppo.make_environment(ppo.make_task(args))
    state, _ = jax.eval_shape(env.reset, jax.random.PRNGKey(0))
    precisions = dot_precisions(jax.make_jaxpr(env.step)(state, jnp.zeros(len(env.action_low))).jaxpr)
    highest = jax.lax.Precision.HIGHEST
    assert len(precisions) > 3 and set(precisions) == {(highest, highest)}


# Whole runs


def final_state(run_dir):
    return ppo.load_checkpoint(str(run_dir / "checkpoint.npz"))["arrays"]


def run(tmp_path, name, env=None, **changes):
    """What train returns, and the arrays of the last checkpoint."""
    options = SMALL | dict(total_timesteps=1024, run_dir=str(tmp_path / name)) | changes
    return ppo.train(ppo.Args(**options), env), final_state(tmp_path / name)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-3, atol=1e-3, err_msg=name)


@pytest.mark.slow
def test_one_diverged_agent_does_not_stop_the_others(tmp_path):
    """A learning rate of 1e30 breaks its agent; the other one is trained and scored. Alone, it is an error."""
    options = dict(learning_rate_schedule="constant", eval_episodes=4)
    result, _ = run(tmp_path, "sweep", probe("action"), sweep="learning_rate=1e-3,1e30", **options)
    assert result["agents"][1]["score"] is None and result["mjx"] == result["agents"][0]["mjx"]
    lines = (tmp_path / "sweep" / "metrics.jsonl").read_text()
    assert "NaN" not in lines and "Infinity" not in lines
    with pytest.raises(FloatingPointError, match="training diverged"):
        run(tmp_path, "alone", probe("action"), learning_rate=1e30, **options)


TINY_RUN = "--num-envs 16 --num-steps 8 --actor-hidden 16 --critic-hidden 16 --eval-episodes 0 --total-timesteps 512"
TINY_RUN = [*TINY_RUN.split(), "--compilation-cache", CACHE]


def run_pendulum(run_dir, *words):
    """A short run by command line; returns the arrays of its last checkpoint."""
    ppo.train(ppo.parse_args([*TINY_RUN, "--run-dir", *map(str, (run_dir, *words))]))
    return final_state(run_dir)


@pytest.fixture(scope="module")
def pendulum_run(tmp_path_factory):
    """MJX takes long to trace and compile it."""
    return run_pendulum(tmp_path_factory.mktemp("pendulum") / "whole")


@pytest.mark.slow
def test_resume_equals_an_uninterrupted_run_bit_for_bit(pendulum_run, tmp_path, monkeypatch):
    """The other run is killed after its first checkpoint, at half the steps."""

    def save_and_die(*inputs):
        save_checkpoint(*inputs)
        raise KeyboardInterrupt

    save_checkpoint = ppo.save_checkpoint
    monkeypatch.setattr(ppo, "save_checkpoint", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        run_pendulum(tmp_path / "half", "--checkpoint-every", 256)
    monkeypatch.undo()
    half = tmp_path / "half" / "checkpoint.npz"
    assert ppo.load_checkpoint(str(half))["env_steps"] == 256
    assert_equal(run_pendulum(tmp_path / "resumed", "--resume", half), pendulum_run)
    for change in ("--num-steps 4", "--seed 2", "--actor-hidden 8", "--total-timesteps 256"):
        with pytest.raises(ppo.InputError, match="omit that flag|give a larger --total-timesteps"):
            run_pendulum(tmp_path / "refused", "--resume", half, *change.split())


def main_on_probe(monkeypatch, *words, **patches):
    """The exit status of the command line, trained on a probe environment in place of the task."""
    with monkeypatch.context() as patch:
        train = ppo.train
        patch.setattr(ppo, "train", lambda args: train(args, probe("action")))
        for name, value in patches.items():
            patch.setattr(ppo, name, value)
        patch.setattr(sys, "argv", ["ppo_mjx_jax.py", *TINY_RUN, *map(str, words)])
        return ppo.main()


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(tmp_path, monkeypatch, capsys):
    path, write, saved = tmp_path / "checkpoint.npz", Path.write_bytes, []

    def full(partial, content):
        if partial.name.startswith("checkpoint"):
            saved.append(partial)
        if len(saved) == 2:
            write(partial, bytes(content)[:1000])
            raise OSError(errno.ENOSPC, "No space left on device", str(partial))
        return write(partial, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert main_on_probe(monkeypatch, "--run-dir", tmp_path, "--checkpoint-every", 128) == 2
    assert f"error: {path} cannot be written: No space left on device\n" in capsys.readouterr().err
    assert ppo.load_checkpoint(str(path))["env_steps"] == 128 and not list(tmp_path.glob("*.tmp"))


@pytest.mark.slow
def test_a_stopped_run_saves_its_state_and_goes_on_bit_for_bit(tmp_path, monkeypatch, capsys):
    """The signal comes in the third of four iterations."""
    records, handlers = [], [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)]
    metrics_record = ppo.metrics_record

    def interrupted(*inputs):
        records.append(metrics_record(*inputs))
        if len(records) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            assert signal.getsignal(signal.SIGINT) is signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        return records[-1]

    half, whole = tmp_path / "half", tmp_path / "whole"
    assert main_on_probe(monkeypatch, "--run-dir", half, metrics_record=interrupted) == 128 + signal.SIGINT
    assert f"stopped after 384 steps; continue with --resume {half / 'checkpoint.npz'}" in capsys.readouterr().out
    assert ppo.load_checkpoint(str(half / "checkpoint.npz"))["env_steps"] == 384
    assert [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert main_on_probe(monkeypatch, "--resume", half / "checkpoint.npz") == 0
    assert main_on_probe(monkeypatch, "--run-dir", whole) == 0
    assert_equal(final_state(half), final_state(whole))


MAIN_ON_PROBE = """
import sys
from test_ppo_mjx import ppo, probe

train = ppo.train
ppo.train = lambda args: train(args, probe("action"))
sys.exit(ppo.main())
"""


@pytest.mark.slow
def test_a_second_signal_ends_a_run_at_once(tmp_path):
    """Even if the program of the first stretch would run for many minutes more."""
    steps = ("--total-timesteps", 10**9, "--log-every", 10**9, "--checkpoint-every", 10**9)
    words = [sys.executable, "-c", MAIN_ON_PROBE, *TINY_RUN, "--run-dir", tmp_path / "run", "--profile", *steps]
    environment = os.environ | dict(PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    with open(tmp_path / "out", "w") as out, open(tmp_path / "err", "w") as err:
        process = subprocess.Popen([*map(str, words)], stdout=out, stderr=err, env=environment)
    try:
        until = time.monotonic() + 300
        while not list((tmp_path / "run" / "profile").rglob("*.json.gz")) and time.monotonic() < until:
            time.sleep(0.2)  # the profile is the last file before the training
        for _ in range(2):
            time.sleep(2)
            assert process.poll() is None, (tmp_path / "err").read_text()
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM
    finally:
        process.kill()


def test_a_flipped_bit_in_a_checkpoint_is_found(tmp_path):
    """Either the file is refused, or everything that is read from it is as it was saved."""
    learner = Learner(probe("action"))
    whole, path, rng, refused = tmp_path / "whole.npz", tmp_path / "flipped.npz", np.random.default_rng(0), 0
    counters = dict(env_steps=128, train_seconds=1.0, compile_seconds=1.0)
    ppo.save_checkpoint(whole, learner.args, learner.state, counters)
    content, expected = whole.read_bytes(), ppo.load_checkpoint(str(whole))
    for place in rng.choice(len(content), 150, replace=False):
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        try:
            found = ppo.load_checkpoint(str(path))
        except ppo.InputError:
            refused += 1
            continue
        assert_equal(found["arrays"], expected["arrays"])
        assert found["args"] == expected["args"] and found["env_steps"] == 128
    assert refused > 75


@pytest.mark.slow
def test_profile_writes_a_trace_and_leaves_the_training_as_it_was(tmp_path, capsys):
    _, plain = run(tmp_path, "plain", probe("action"))
    _, profiled = run(tmp_path, "profiled", probe("action"), profile=True)
    assert_equal(profiled, plain)
    assert list((tmp_path / "profiled" / "profile").rglob("*.trace.json.gz"))
    assert "a trace of one iteration is in" in capsys.readouterr().out


@pytest.mark.slow
def test_eight_seeds_in_one_program_equal_eight_separate_runs(tmp_path):
    """After 8 iterations, in float32: batched matrix products may round differently, and training amplifies it."""
    _, together = run(tmp_path, "together", probe("action"), num_seeds=8)
    args = ppo.Args(**SMALL, total_timesteps=1024)
    setup = ppo.make_setup(probe("action"), args)

    @jax.jit  # once for all: the seed is data
    def train_one(hyper, seed):
        return ppo.advance(setup, hyper, ppo.initialise(setup, hyper, seed), setup.iterations)[0]

    for i in range(8):
        hyper, seeds = ppo.hyperparameters(dataclasses.replace(args, seed=1 + i))
        state = train_one(ppo.Hyperparameters(*(x[0] for x in hyper)), seeds[0])
        alone = {jax.tree_util.keystr(name): leaf for name, leaf in jax.tree_util.tree_leaves_with_path(state)}
        assert_close({name: leaf[i] for name, leaf in together.items()}, alone)
    _, trained = run(tmp_path, "alone", probe("action"), seed=8)  # the last of them by `train` itself
    assert_close({name: leaf[0] for name, leaf in trained.items()}, alone)
    assert any((leaf[0] != leaf[7]).any() for name, leaf in together.items() if "kernel" in name)


@pytest.mark.slow
def test_a_sweep_maps_the_value(tmp_path):
    env, constant = probe("action"), dict(learning_rate_schedule="constant")
    swept = dict(sweep="learning_rate=1e-4,1e-3", num_seeds=2, eval_episodes=2)
    result, together = run(tmp_path, "sweep", env, **constant, **swept)
    _, alone = run(tmp_path, "alone", env, **constant, learning_rate=1e-4, seed=2)
    np.testing.assert_allclose(together[".learning_rate"], [1e-4, 1e-4, 1e-3, 1e-3])
    name = next(name for name in alone if "actor" in name and "kernel" in name)
    np.testing.assert_allclose(together[name][1], alone[name][0], rtol=2e-3, atol=2e-3)
    assert [agent["value"] for agent in result["agents"]] == [1e-4, 1e-4, 1e-3, 1e-3]


def command(*arguments, **environment):
    words = [sys.executable, str(ROOT / "ppo_mjx_jax.py"), *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, env=os.environ | environment, timeout=400)


@pytest.mark.slow
def test_two_devices_share_the_environments(pendulum_run, tmp_path):
    xla_flags = f"{FAST_COMPILE} --xla_force_host_platform_device_count=2"
    done = command(*TINY_RUN, "--run-dir", tmp_path, XLA_FLAGS=xla_flags)
    assert done.returncode == 0 and "2 device(s)" in done.stdout, done.stderr
    assert_close(final_state(tmp_path), pendulum_run)


@pytest.mark.slow
def test_two_processes_share_the_environments(tmp_path, monkeypatch):
    """As two hosts would, on a probe. Only the first one writes a run folder."""
    with socket.socket() as probe_socket:
        probe_socket.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe_socket.getsockname()[1]}"
    hosts = os.environ | dict(JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2", XLA_FLAGS="")
    hosts |= dict(PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    program = [sys.executable, "-c", MAIN_ON_PROBE, *TINY_RUN, "--distributed", "--run-dir"]
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    processes = [
        subprocess.Popen([*program, str(tmp_path / rank)], env=hosts | dict(JAX_PROCESS_ID=rank), **streams)
        for rank in ("0", "1")
    ]
    try:
        outputs = [process.communicate(timeout=400)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "2 device(s)" in outputs[0] and not (tmp_path / "1").exists()
    assert main_on_probe(monkeypatch, "--run-dir", tmp_path / "one") == 0
    assert_close(final_state(tmp_path / "0"), final_state(tmp_path / "one"))


@pytest.mark.slow
def test_the_pendulum_is_solved_in_gymnasiums_own_environment_and_the_run_folder_is_complete(tmp_path):
    """The first command of the header, end to end. Then its checkpoint is played, and read by load_policy."""
    done = command("--run-dir", tmp_path, "--compilation-cache", CACHE, XLA_FLAGS="")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "eval.json").read_text())
    names = "env_id algorithm seed env_steps train_seconds compile_seconds vecsim gymnasium mjx".split()
    assert set(names) <= result.keys() and result["vecsim"] is None
    assert result["gymnasium"]["mean"] == result["mjx"]["mean"] == 1000 and result["gymnasium"]["episodes"] == 20
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    names = "env_steps wall_seconds steps_per_second episode_return episode_length episodes".split()
    assert set(names) <= rows[-1].keys() and rows[-1]["env_steps"] == result["env_steps"]
    assert {"config.json", "checkpoint.npz", "curve.png"} <= {path.name for path in tmp_path.iterdir()}
    assert any(path.name.startswith("events") for path in tmp_path.iterdir())
    played = command("--play", tmp_path / "checkpoint.npz", "--eval-episodes", 3)
    assert played.returncode == 0 and "gymnasium 1000.0" in played.stdout
    checkpoint = ppo.load_checkpoint(str(tmp_path / "checkpoint.npz"))
    returns, *_ = ppo.evaluate_in_gymnasium(ppo.Args(eval_episodes=2), ppo.load_policy(checkpoint), seed=5)
    assert list(returns) == [1000, 1000]


@pytest.mark.slow
def test_a_policy_of_many_agents_is_the_one_that_was_trained(tmp_path):
    args = ppo.Args(**SMALL, num_seeds=2)
    learner = Learner(ppo.make_environment(ppo.make_task(args)), num_seeds=2)
    setup, initialise = learner.setup, jax.jit(functools.partial(ppo.initialise, learner.setup))
    states = [initialise(learner.hyper, seed) for seed in (1, 2)]
    both = jax.tree.map(lambda *x: jnp.stack(x), *states)
    path = tmp_path / "checkpoint.npz"
    ppo.save_checkpoint(path, args, both, dict(env_steps=0, train_seconds=0.0, compile_seconds=0.0))
    obs = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    for k, state in enumerate(states):
        action = ppo.load_policy(ppo.load_checkpoint(str(path)), k)(obs, np.zeros(5, bool))
        expected = 3.0 * ppo.policy_mean(setup, state.parameters, state.obs_statistics, obs)  # the cart's range is +-3
        assert isinstance(action, np.ndarray)
        np.testing.assert_allclose(action, expected, rtol=1e-5, atol=1e-7)
    with pytest.raises(ppo.InputError, match="agent = 2: the checkpoint holds 2"):
        ppo.load_policy(ppo.load_checkpoint(str(path)), 2)


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


@pytest.mark.parametrize("damage", ["nothing", "one array", "no flags", "a list"])
def test_a_damaged_checkpoint_is_one_line(damage, tmp_path, monkeypatch, capsys):
    path = tmp_path / "checkpoint.npz"
    with open(path, "wb") as file:
        if damage == "one array":
            np.save(file, np.zeros(3))
        elif damage != "nothing":
            np.savez(file, header=json.dumps([] if damage == "a list" else {"env_steps": 1}))
    monkeypatch.setattr(sys, "argv", ["ppo_mjx_jax.py", "--play", str(path)])
    assert ppo.main() == 2
    err = capsys.readouterr().err
    assert "is not a checkpoint of this script, or it is damaged" in err and err.count("\n") == 1


def test_a_run_is_not_written_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ppo.InputError, match="contains a run; choose another"):
        ppo.train(ppo.Args(run_dir=str(tmp_path), **SMALL))


@pytest.mark.parametrize("flags, complaint", [
    ("--env-id Pong-v5", "env_id 'Pong-v5' is unknown"),
    ("--num-minibatches 3", "does not split into 3 minibatches; use 2 or 4"),
    ("--num-envs 16000001 --num-steps 128 --num-minibatches 3", "minibatches; use 2 or 4"),
    ("--num-envs 0", "num_envs = 0 must be >= 1"),
    ("--log-every 0", "log_every = 0 must be >= 1"),
    ("--eval-every 1000 --eval-episodes 0", "eval_every needs eval_episodes >= 1"),
    ("--gamma 1.5", "gamma = 1.5 must be between 0 and 1"),
    ("--desired-kl 0 0.1", "desired_kl = (0.0, 0.1) must be > 0"),
    ("--sweep gamma=0.9,1.5", "gamma = 1.5 must be between 0 and 1"),
    ("--sweep num_envs=1,2", "sweep takes one of"),
    ("--sweep gamma=high", "numbers"),
    ("--device tpu", "device = tpu must be auto, cpu or cuda"),
    ("--num-envs many", "many"),
    ("--nonsense 1", "nonsense"),
    ("--env-kwargs colour 3", "colour"),
    ("--env-id Humanoid-v5 --env-kwargs include_cvel_in_observation True", "this script has no include_cvel_in_obs"),
    ("--play nowhere.npz", "there is no checkpoint nowhere.npz"),
    ("--resume gae_cases.py", "is not a checkpoint"),
    ("--resume ../tests", "is not a checkpoint"),
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
        ppo.pick_devices(ppo.Args(device="cuda"))


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
    assert theirs.keys() - mine.keys() == {"compile", "cuda_graphs", "bf16", "export"}
    differ = {name for name in theirs.keys() & mine.keys() if mine[name].default != theirs[name].default}
    assert differ == {"env_id"}  # a CPU takes minutes to compile Ant in MJX
