"""ppo_gpu_torch: what train does with its environment and flags, another device, a GPU, evaluation and export.

test_trainers.py tests what all trainers do alike."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import resource
import sys
import time
from pathlib import Path

import pytest
import torch
from probe_envs import ProbeEnv, probe_args
from score_onnx import OnnxPolicy, check_file, read_names, write_checkpoint

import ppo_gpu_torch as ppo
import vecsim_torch as vecsim

TESTS = Path(__file__).parent


def read_checkpoint(run_dir):
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def trained_agent(run_dir):
    return ppo.load_agent(read_checkpoint(run_dir))


def log_of(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def logged(run_dir, name):
    return [record[name] for record in log_of(run_dir)]


# Environments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", ["truncation", "privileged"])
def test_the_learner_gets_the_observation_before_the_reset(env_id, tmp_path, monkeypatch):
    final, fresh = ("final_critic_obs", "critic_obs") if env_id == "privileged" else ("final_obs", None)
    led_to, after, stored, make_batch = [], [], [], ppo.make_batch

    class Recorder(ProbeEnv):
        def step(self, action):
            result = super().step(action)
            led_to.append(result[4][final].clone())
            after.append((result[4][fresh] if fresh else result[0]).clone())
            return result

    def recording(agent, rollout, *rest):
        stored.append(rollout.final_critic_obs.clone())
        return make_batch(agent, rollout, *rest)

    monkeypatch.setattr(ppo, "make_batch", recording)
    ppo.train(probe_args(tmp_path, env_id, total_timesteps=512), Recorder)
    rollout = slice(1, 9)  # the first step compiles
    assert torch.equal(stored[0], torch.stack(led_to[rollout]))
    assert not torch.equal(stored[0], torch.stack(after[rollout]))


class Bare:
    """The probe environment "delayed" with no more than a user's environment must have."""

    def __init__(self, env_id, **options):
        self.env = ProbeEnv("delayed", **options)
        self.single_observation_space, self.single_action_space = (
            self.env.single_observation_space,
            self.env.single_action_space,
        )

    def reset(self, seed=None):
        return self.env.reset(seed=seed)[0], {}

    def step(self, action):
        *transition, info = self.env.step(action)
        return *transition, {"final_obs": info["final_obs"]}


def test_an_environment_of_the_users_own(tmp_path):
    """Its episodes are counted, and a resumed run continues with its weights but with new episodes."""
    small = dict(total_timesteps=4_096, log_every=512)
    ppo.train(probe_args(tmp_path / "full", "delayed", **small), ProbeEnv)
    bare = ppo.train(probe_args(tmp_path / "bare", **small), Bare)
    assert_same(log_of(tmp_path / "full"), log_of(tmp_path / "bare"), but=(*CLOCKS, "episode_return"))
    returns = [logged(tmp_path / name, "episode_return") for name in ("full", "bare")]
    assert returns[0] == pytest.approx(returns[1])  # summed in another order
    assert bare["episode_length"] == 2.0 and bare["episodes"] == 256 and bare["vecsim"]["episodes"] == 64
    resume = dict(resume=str(tmp_path / "bare" / "checkpoint.pt"), total_timesteps=8_192)
    assert ppo.train(probe_args(tmp_path / "bare", **resume), Bare)["env_steps"] == 8_192


# Reproducibility and resume -------------------------------------------------------------------------------------------

CLOCKS = ("wall_seconds", "steps_per_second")


def state_of(run_dir):
    """The state at the end of a run, without the clocks."""
    names = {"agent", "moments", "learning_rate", "processes", "env_steps", "updates"}
    return {name: x for name, x in read_checkpoint(run_dir).items() if name in names}


def assert_same(one, other, but=(), where=""):
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one.keys() - set(but):
            assert_same(one[key], other[key], but, f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for k, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, but, f"{where}[{k}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


def test_a_learning_rate_given_with_resume_wins_over_the_adapted_one(tmp_path):
    """Each run has one gradient step, before which the adaptive schedule changes nothing."""
    single = dict(num_minibatches=1, update_epochs=1, eval_episodes=0)
    ppo.train(probe_args(tmp_path, total_timesteps=512, **single), ProbeEnv)
    resume = dict(resume=str(tmp_path / "checkpoint.pt"), **single)
    kept = ppo.train(probe_args(tmp_path, total_timesteps=1_024, **resume), ProbeEnv)
    given = ppo.train(probe_args(tmp_path, total_timesteps=1_536, learning_rate=1e-4, **resume), ProbeEnv)
    assert kept["learning_rate"] == pytest.approx(3e-3) and given["learning_rate"] == pytest.approx(1e-4)


# Compiled, reduced precision, on a GPU --------------------------------------------------------------------------------


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


def agent_on_a_gpu():
    args = probe_args("unused", device="cuda")
    agent = ppo.Agent(3, None, ProbeEnv("action").single_action_space, args).cuda()
    return args, agent, ppo.derive_sizes(args, 1, torch.device("cuda"))


@needs_cuda
def test_update_on_a_gpu_never_waits_for_the_host():
    """The work of one iteration, graphs included, under sync debug mode "error"."""
    args, agent, sizes = agent_on_a_gpu()
    learning_rate = torch.tensor(1e-3, device="cuda")
    optimizer = vecsim.make_optimizer(agent, learning_rate)
    floats = [torch.randn(8, 64, k, device="cuda") for k in (3, 3, 1, 1)]
    flags = [torch.zeros(8, 64, dtype=torch.bool, device="cuda") for _ in range(3)]
    rollout = ppo.Rollout(floats[0], floats[0], *floats[1:], torch.randn(8, 64, device="cuda"), *flags)
    functions = ppo.build_functions(agent, optimizer, rollout, sizes, args)
    generator = torch.Generator("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        functions.policy(rollout.obs[0], torch.randn(64, 1, generator=generator, device="cuda"))
        value, advantage = functions.estimate()
        order = torch.randperm(sizes.batch, generator=generator, device="cuda")
        batch = ppo.make_batch(agent, rollout, value, advantage, True, order)
        ppo.update(agent, functions, batch, learning_rate, 0.01, args)
        agent.obs_statistics.update(rollout.obs.flatten(0, 1), ~rollout.invalid.flatten())
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Flags reach the functions and the environment ------------------------------------------------------------------------


def short_args(run_dir, **changes):
    """10 iterations of one gradient step."""
    single = dict(total_timesteps=10 * 512, num_minibatches=1, update_epochs=1, log_every=512, eval_episodes=0)
    return probe_args(run_dir, **(single | changes))


def test_linear_learning_rate_by_value(tmp_path):
    ppo.train(short_args(tmp_path, learning_rate=1e-3, learning_rate_schedule="linear"), ProbeEnv)
    assert logged(tmp_path, "learning_rate") == pytest.approx([1e-3 * (1 - k / 10) for k in range(10)])


def test_desired_kl_moves_over_the_run(tmp_path, monkeypatch):
    given, update = [], ppo.update

    def recording(agent, functions, batch, learning_rate, desired_kl, args):
        given.append(desired_kl)
        return update(agent, functions, batch, learning_rate, desired_kl, args)

    monkeypatch.setattr(ppo, "update", recording)
    ppo.train(short_args(tmp_path, desired_kl=(0.02, 0.01)), ProbeEnv)
    assert given == pytest.approx([0.02 - 0.001 * k for k in range(10)])


@pytest.mark.parametrize("own", [True, False])
def test_every_flag_of_the_environment_reaches_it(own, tmp_path, monkeypatch):
    given = []

    def recording(env_id, random_initial_ages=None, compile=None, integrator=None, iterations=None, **options):
        given.append((env_id, random_initial_ages, compile, integrator, iterations, options))
        return ProbeEnv(env_id, **options)

    monkeypatch.setattr(vecsim, "make", recording)
    flags = dict(integrator="rk4", solver_iterations=7, env_kwargs={"option": 3}, seed=5)
    ppo.train(short_args(tmp_path, eval_episodes=1, **flags), recording if own else None)
    device = "cpu" if own else torch.device("cpu")
    options = dict(option=3, num_envs=64, device=device, seed=vecsim.stream_seed(5, rank=0, stream=1))
    of_vecsim = (None, None, None, None) if own else (True, False, "rk4", 7)
    assert given == [("action", *of_vecsim, options)]  # once: the final evaluation compiles no second simulator


def test_reward_scale_is_what_the_learner_sees_and_the_log_does_not(tmp_path):
    unscaled = dict(env_id="constant", normalize_values=False, update_epochs=1)
    for name, scale in (("one", 1.0), ("ten", 10.0)):
        ppo.train(short_args(tmp_path / name, **unscaled, reward_scale=scale), ProbeEnv)
        assert logged(tmp_path / name, "episode_return") == [1.0] * 10
    one, ten = (logged(tmp_path / name, "value_loss")[0] for name in ("one", "ten"))
    assert 50.0 < ten / one < 200.0  # squares, of a value function near 0


def test_a_reward_that_is_no_number_stops_the_run(tmp_path):
    class Broken(ProbeEnv):
        def step(self, action):
            obs, reward, *rest = super().step(action)
            return obs, torch.full_like(reward, torch.nan), *rest

    with pytest.raises(FloatingPointError, match="training diverged by 512 steps"):
        ppo.train(short_args(tmp_path), Broken)


# Run folder and command line ------------------------------------------------------------------------------------------


def run_main(monkeypatch, capsys, *arguments, trainer=ppo):
    """The exit status, and what main printed to stderr."""
    monkeypatch.setattr(sys, "argv", [f"{trainer.__name__}.py", *map(str, arguments)])
    status = trainer.main()
    return status, capsys.readouterr().err


def run_main_with(monkeypatch, capsys, args, env):
    """`run_main`, but with these Args and this environment."""
    with monkeypatch.context() as patch:
        patch.setattr(ppo, "train", lambda _, stop, train=ppo.train: train(args, env, stop=stop))
        return run_main(monkeypatch, capsys)


@pytest.mark.parametrize("compiled, threads", [(False, [1]), (True, [])])
def test_eager_runs_use_one_thread(compiled, threads, tmp_path, monkeypatch):
    chosen = []

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    with pytest.raises(KeyboardInterrupt):
        ppo.train(probe_args(tmp_path, compile=compiled), stop)
    assert chosen == threads


def messages(err):
    """The lines of stderr except those of the progress bar."""
    return [line.strip() for line in re.split(r"[\r\n]|\x1b\[A", err) if line.strip() and " steps/s" not in line]


class Signalled(ProbeEnv):
    """Sends `signals` to its own process in step `step_number`, with a pause in seconds after each."""

    signals, step_number, pause = (), 0, 0.0

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.steps_taken = 0

    def step(self, action):
        self.steps_taken += 1
        if self.steps_taken == self.step_number:
            for number in self.signals:
                os.kill(os.getpid(), number)
                time.sleep(self.pause)
        return super().step(action)


def signalled(**attributes):
    return type("Signalled", (Signalled,), attributes)


def written_on_a_gpu(path):
    """Change a checkpoint as if a GPU had written it: the states of its random generators have another size."""
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["device"] = "cuda"
    for process in checkpoint["processes"]:
        process["generator"] = torch.zeros(16, dtype=torch.uint8)
        process["env"] |= dict(device="cuda", generators=[process["generator"]] * 2)
    torch.save(checkpoint, path)


def test_a_checkpoint_of_another_device_continues_with_other_random_numbers_and_says_so(tmp_path, capsys):
    small = dict(env_id="InvertedPendulum-v5", num_envs=16, num_minibatches=2, eval_episodes=0)
    ppo.train(probe_args(tmp_path / "first", **small, total_timesteps=2 * 128))
    path = tmp_path / "first" / "checkpoint.pt"
    written_on_a_gpu(path)
    before, ends = torch.load(path, weights_only=True), []
    for name in "ab":
        args = probe_args(tmp_path / name, **small, total_timesteps=4 * 128, resume=str(path))
        result = ppo.train(args)
        assert "the checkpoint is from cuda; on cpu the random numbers are different" in capsys.readouterr().out
        assert result["env_steps"] == 4 * 128
        ends.append(state_of(tmp_path / name))
    assert_same(*ends)
    assert ends[0]["agent"]["obs_statistics.count"] == 2 * before["agent"]["obs_statistics.count"]  # it continued
    start = torch.Generator().manual_seed(vecsim.stream_seed(1, rank=0, stream=0)).get_state()
    assert not torch.equal(ends[0]["processes"][0]["generator"], start)
    fresh = ppo.train(probe_args(tmp_path / "fresh", **small, total_timesteps=4 * 128)) and state_of(tmp_path / "fresh")
    assert not torch.equal(fresh["processes"][0]["generator"], ends[0]["processes"][0]["generator"])  # no numbers twice


@contextlib.contextmanager
def full_disk(room):
    """Limit the files of this process to `room` bytes. Writing then fails as on a full disk, with another message."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_resume_refuses_another_number_of_processes():
    args = probe_args(None)
    checkpoint = dict(args=dataclasses.asdict(args), env_steps=0, processes=[{}])
    with pytest.raises(ppo.InputError, match="was written by 1 processes, not 2"):
        ppo.check_resumable(checkpoint, args, world_size=2)


# With the simulator ---------------------------------------------------------------------------------------------------


def test_final_evaluation_in_the_training_environment_equals_one_in_a_fresh_one(tmp_path):
    """It runs whole episodes from its own seed, whatever state the training left."""
    limit = {"max_episode_steps": 20}
    small = dict(env_id="InvertedPendulum-v5", num_envs=16, num_steps=8, num_minibatches=2, env_kwargs=limit)
    result = ppo.train(probe_args(tmp_path, **small, total_timesteps=2 * 128))
    fresh = vecsim.make("InvertedPendulum-v5", num_envs=16, iterations=4, **limit)
    assert result["vecsim"] == vecsim.evaluate(fresh, trained_agent(tmp_path).act, seed=1)
    assert result["vecsim"]["mean_length"] == result["gymnasium"]["mean_length"] == 20.0


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")  # a frozen number may be the number of rows
def test_exported_policy_acts_like_the_trained_one(tmp_path, monkeypatch, capsys):
    agent, checkpoint = write_checkpoint(tmp_path, ppo, "ppo", env_id="HalfCheetah-v5")
    flags = ["--play", checkpoint, "--export", tmp_path / "policy.onnx", "--eval-episodes", "0"]
    assert run_main(monkeypatch, capsys, *flags) == (0, "")
    policy = OnnxPolicy(tmp_path / "policy.onnx")
    limits = -torch.ones(6), torch.ones(6)
    check_file(policy, agent.act, agent.obs_statistics, limits)
    joints = ["bthigh", "bshin", "bfoot", "fthigh", "fshin", "ffoot"]
    observed, actions, control_step = read_names(policy, "ppo_gpu_torch.py", env_steps=640)
    positions, velocities = ["rootz", "rooty", *joints], ["rootx", "rootz", "rooty", *joints]
    assert observed == [f"qpos/{x}" for x in positions] + [f"qvel/{x}" for x in velocities]
    assert actions == joints and control_step == pytest.approx(0.05)
    assert policy.metadata["env_id"] == "HalfCheetah-v5" and json.loads(policy.metadata["env_kwargs"]) == {}

    policy.seen.clear()
    score = vecsim.evaluate_in_gymnasium("HalfCheetah-v5", policy.act, 2, 1, {"max_episode_steps": 50})
    assert score["mean_length"] == len(policy.seen) == 50
    assert all((action - agent.act(obs).clamp(*limits)).abs().max() <= 1e-5 for obs, action in policy.seen)


def test_exported_policy_of_a_bf16_run_is_float32_and_its_options_are_in_the_file(tmp_path, monkeypatch, capsys):
    options = {"exclude_current_positions_from_observation": False, "include_cfrc_ext_in_observation": False}
    agent, checkpoint = write_checkpoint(tmp_path, ppo, "ppo", env_id="Ant-v5", bf16=True, env_kwargs=options)
    flags = ["--play", checkpoint, "--export", tmp_path / "policy.onnx", "--eval-episodes", "0"]
    assert run_main(monkeypatch, capsys, *flags) == (0, "")
    policy, agent.bf16 = OnnxPolicy(tmp_path / "policy.onnx"), False
    check_file(policy, agent.act, agent.obs_statistics, (-torch.ones(8), torch.ones(8)))
    observed, actions, _ = read_names(policy, "ppo_gpu_torch.py", env_steps=640)
    assert observed[:8] == [f"qpos/root/{x}" for x in "x y z qw qx qy qz".split()] + ["qpos/hip_1"]
    assert observed[15:22] == [f"qvel/root/{x}" for x in "vx vy vz wx wy wz".split()] + ["qvel/hip_1"]
    assert actions == "hip_4 ankle_4 hip_1 ankle_1 hip_2 ankle_2 hip_3 ankle_3".split()
    assert json.loads(policy.metadata["env_kwargs"]) == options


def test_an_export_without_onnx_is_one_line(tmp_path, monkeypatch, capsys):
    _, checkpoint = write_checkpoint(tmp_path, ppo, "ppo", env_id="InvertedPendulum-v5")
    monkeypatch.setitem(sys.modules, "onnx", None)  # as if it were not installed
    flags = ["--play", checkpoint, "--eval-episodes", "0", "--export", tmp_path / "policy.onnx"]
    assert run_main(monkeypatch, capsys, *flags) == (2, "error: an export needs ONNX; run `pip install onnx`\n")
    assert not (tmp_path / "policy.onnx").exists()


def test_a_failed_export_is_one_line_and_keeps_the_earlier_file(tmp_path, monkeypatch, capsys):
    _, checkpoint = write_checkpoint(tmp_path, ppo, "ppo", env_id="InvertedPendulum-v5")
    flags = ["--play", checkpoint, "--eval-episodes", "0", "--export"]
    nowhere, good = tmp_path / "nowhere" / "policy.onnx", tmp_path / "good.onnx"
    status, err = run_main(monkeypatch, capsys, *flags, nowhere)
    assert status == 2 and err == f"error: {nowhere} cannot be written: No such file or directory\n"
    good.write_text("an earlier export")
    with full_disk(100):
        status, err = run_main(monkeypatch, capsys, *flags, good)
    assert status == 2 and err == f"error: {good} cannot be written: File too large\n"
    assert good.read_text() == "an earlier export" and len(list(tmp_path.iterdir())) == 2


def test_evaluations_during_training_then_play_and_film(tmp_path, monkeypatch, capsys):
    flags = "--env-id InvertedPendulum-v5 --device cpu --no-compile --num-envs 16 --num-steps 8 --total-timesteps 512"
    flags += " --eval-every 256 --eval-episodes 2 --env-kwargs randomize.mass 0.1"
    evaluations, evaluate, films = [], vecsim.evaluate_in_gymnasium, []

    def counted(*arguments):
        evaluations.append(evaluate(*arguments))
        return evaluations[-1]

    monkeypatch.setattr(vecsim, "evaluate_in_gymnasium", counted)
    monkeypatch.setattr(vecsim, "film", lambda env_id, act, path, *_: films.append(path))
    status, err = run_main(monkeypatch, capsys, *flags.split(), "--run-dir", tmp_path)
    assert status == 0, err
    scores = {line["env_steps"]: line["gymnasium_return"] for line in log_of(tmp_path) if "gymnasium_return" in line}
    assert scores == {256: evaluations[0]["mean"], 512: evaluations[1]["mean"]}
    assert len(evaluations) == 2  # the last serves as the final one
    evaluation = json.loads((tmp_path / "eval.json").read_text())
    assert evaluation["gymnasium"] == evaluations[1] and evaluation["gymnasium"]["episodes"] == 2
    play = ["--play", tmp_path / "checkpoint.pt", "--eval-episodes", "2", "--capture-video"]
    assert run_main(monkeypatch, capsys, *play)[0] == 0 and evaluations[2] == evaluations[1]
    assert films == [tmp_path / "play.mp4"]


@pytest.mark.slow
def test_inverted_pendulum_balances_in_gymnasium(tmp_path):
    """With the defaults of its row, every episode in Gymnasium's own environment lasts as long as it can."""
    args = dataclasses.replace(ppo.task_defaults("InvertedPendulum-v5"), device="cpu")
    result = ppo.train(dataclasses.replace(args, run_dir=str(tmp_path)))
    assert result["gymnasium"] == dict(mean=1000.0, std=0.0, min=1000.0, episodes=20, mean_length=1000.0)
    assert result["vecsim"]["mean"] > 990.0
