"""sac_gpu_torch: what train does with its replay, noise and learning rate, on a GPU, and export.

test_trainers.py tests what all trainers do alike, and test_service.py the functions that they share."""

from __future__ import annotations

import dataclasses
import weakref

import pytest
import torch
from probe_envs import ProbeEnv
from probe_envs import sac_args as probe_args
from score_onnx import OnnxPolicy, check_file, read_names, write_checkpoint
from test_ppo import log_of, read_checkpoint, run_main

import sac_gpu_torch as sac
import vecsim_torch as vecsim

# What train does with what it is given --------------------------------------------------------------------------------


class Recorder(ProbeEnv):
    """Keeps the steps since the last reset. In `privileged`, environment 0 is always quarantined."""

    def reset(self, **options):
        obs, info = super().reset(**options)
        self.steps, self.before = [], (obs.clone(), info["critic_obs"].clone())
        return obs, info

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        if self.env_id == "privileged":
            info["invalid"][0] = True
        given = dict(obs=self.before[0], critic_obs=self.before[1], fresh=obs, fresh_critic=info["critic_obs"])
        given |= dict(reward=reward, terminated=terminated, truncated=truncated)
        given |= {name: info[name] for name in ("final_obs", "final_critic_obs", "invalid")}
        self.steps.append({name: x.clone() for name, x in given.items()})
        self.before = obs.clone(), info["critic_obs"].clone()
        return obs, reward, terminated, truncated, info


def recorded(monkeypatch, run_dir, env_id):
    """A short run: the Recorder's steps, and the steps that were stored."""
    environments, stored, store = [], [], sac.store

    def make(*arguments, **options):
        environments.append(Recorder(*arguments, **options))
        return environments[0]

    def recording(replay, number, step):
        assert number == len(stored)
        stored.append(sac.Transitions(*(x if x is None else x.clone() for x in step)))
        store(replay, number, step)

    monkeypatch.setattr(sac, "store", recording)
    sac.train(probe_args(run_dir, env_id, total_timesteps=12 * 64, eval_episodes=0), make)
    assert len(environments) == 1 and len(stored) == len(environments[0].steps) == 12
    return environments[0].steps, stored


@pytest.mark.parametrize("env_id", ["truncation", "privileged", "broken"])
def test_the_replay_gets_where_a_step_led_to_and_not_the_state_after_its_reset(env_id, tmp_path, monkeypatch):
    given, stored = recorded(monkeypatch, tmp_path, env_id)
    for step, transitions in zip(given, stored, strict=True):
        assert (transitions.critic_obs is None) == (env_id != "privileged")
        assert transitions.action.abs().max() <= 1.0
        for name, x in transitions._asdict().items():
            if x is not None and name != "action":
                torch.testing.assert_close(x, step[name], rtol=0, atol=0, equal_nan=True)
    ended = torch.stack([step["terminated"] | step["truncated"] for step in given])
    for final, fresh in (("final_obs", "fresh"), ("final_critic_obs", "fresh_critic")):
        final, fresh = (torch.stack([step[name] for step in given]) for name in (final, fresh))
        assert not torch.equal(final[ended], fresh[ended])  # otherwise the comparison above would show nothing


def test_statistics_follow_both_observations_and_skip_quarantined_rows(tmp_path, monkeypatch):
    given, _ = recorded(monkeypatch, tmp_path, "privileged")  # the Recorder quarantines environment 0
    state = read_checkpoint(tmp_path)["agent"]
    for name in ("obs", "critic_obs"):
        rows = torch.cat([step[name][1:] for step in given]).double()
        assert state[f"{name}_statistics.count"] == len(rows) == 12 * 63
        torch.testing.assert_close(state[f"{name}_statistics.mean"], rows.mean(0))
        torch.testing.assert_close(state[f"{name}_statistics.variance"], rows.var(0, correction=0))


def test_the_policy_acts_on_noise_that_is_held(tmp_path, monkeypatch):
    given, policy_step = [], sac.policy_step

    def recording(agent, obs, noise):
        given.append(noise.clone())
        return policy_step(agent, obs, noise)

    monkeypatch.setattr(sac, "policy_step", recording)
    for longest, least, most in ((1, 0.0, 0.0), (16, 0.3, 0.9)):
        given.clear()
        run = tmp_path / str(longest)
        sac.train(probe_args(run, total_timesteps=18 * 64, noise_repeat_max=longest, eval_episodes=0), ProbeEnv)
        noise = torch.stack(given[1:])  # the first call compiles
        same = (noise[1:] == noise[:-1]).float().mean().item()
        assert len(noise) == 8 and least <= same <= most
        assert (noise[1:] != noise[:-1]).any()


def test_actions_are_uniform_at_first_and_never_leave_the_action_space(tmp_path):
    seen = []

    class Watched(ProbeEnv):
        def step(self, action):
            seen.append(action.clone())
            return super().step(action)

    sac.train(probe_args(tmp_path, total_timesteps=1_280, eval_episodes=0), Watched)
    actions = torch.cat(seen[1:11])  # 10 steps before learning starts, without the compiling step
    assert actions.abs().max() <= 2.0 and actions.var().item() == pytest.approx(4.0 / 3.0, rel=0.15)
    assert torch.cat(seen[12:]).abs().max() <= 2.0


def test_the_learning_rate_moves_linearly_to_its_final_value(tmp_path):
    rates = dict(learning_rate=1e-3, learning_rate_final=2e-4)
    sac.train(probe_args(tmp_path, total_timesteps=20 * 64, log_every=64, eval_episodes=0, **rates), ProbeEnv)
    logged = [line["learning_rate"] for line in log_of(tmp_path)][10:]  # learning starts at the 10th
    assert logged == pytest.approx([1e-3 - 8e-4 * iteration / 20 for iteration in range(10, 20)])


def test_a_replay_that_does_not_fit_is_one_line(tmp_path):
    with pytest.raises(sac.InputError, match="the replay of .* transitions does not fit into the memory of cpu; use a"):
        sac.train(probe_args(tmp_path, replay_capacity=10**15), ProbeEnv)


# Reproducibility and resume -------------------------------------------------------------------------------------------


def test_no_copy_of_the_replay_stays_alive(tmp_path, monkeypatch):
    """Neither that of a checkpoint that was loaded nor that of one that was written."""
    copies = []

    def watch(name, rings_of):
        function = getattr(sac, name)

        def watched(*inputs):
            result = function(*inputs)
            copies.append(weakref.ref(rings_of(inputs, result)["rings"]["obs"]))
            return result

        monkeypatch.setattr(sac, name, watched)

    def gathering(*inputs, gather=sac.gather_batch):
        assert not any(copy() is not None for copy in copies)
        return gather(*inputs)

    watch("filled_part", lambda inputs, result: result)
    watch("load_replay", lambda inputs, result: inputs[1])
    monkeypatch.setattr(sac, "gather_batch", gathering)
    common = dict(checkpoint_replay=True, eval_episodes=0, checkpoint_every=5 * 64)
    sac.train(probe_args(tmp_path, total_timesteps=20 * 64, **common), ProbeEnv)
    assert len(copies) == 4
    resume = str(tmp_path / "checkpoint.pt")
    sac.train(probe_args(tmp_path, total_timesteps=22 * 64, resume=resume, **common), ProbeEnv)
    assert len(copies) == 6


# Compiled, reduced precision, on a GPU --------------------------------------------------------------------------------


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


def agent_on_a_gpu(**changes):
    args = probe_args("unused", device="cuda", **changes)
    return args, sac.Agent(3, None, ProbeEnv("action").single_action_space, args).cuda()


@needs_cuda
def test_a_step_on_a_gpu_never_waits_for_the_host():
    """The work of steps with updates under sync debug mode "error", graphs and all."""
    args, agent = agent_on_a_gpu(n_step=3, noise_repeat_max=16)
    sizes = sac.derive_sizes(args, 1)
    optimizers = sac.make_optimizers(agent, torch.tensor(1e-3, device="cuda"), 1e-3)
    replay = sac.allocate_replay(agent, sizes, False)
    functions = sac.build_functions(agent, optimizers, replay, sizes, args)
    generator, durations = torch.Generator("cuda"), sac.zeta_distribution(16).cuda()
    obs, noise = torch.randn(64, 3, device="cuda"), torch.zeros(64, 1, device="cuda")
    uniform = torch.rand(64, device="cuda")
    remaining, never = torch.zeros_like(uniform, dtype=torch.long), torch.zeros_like(uniform, dtype=torch.bool)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(4):
            noise, remaining = sac.hold_noise(noise, remaining, torch.randn_like(noise), uniform, durations)
            action, _ = functions.policy(obs, noise)
            sac.store(replay, number, sac.Transitions(obs, obs, action, uniform, never, never, never))
            agent.obs_statistics.update(obs, ~never)
            sac.follow_returns(agent, uniform, uniform, never, never, args.gamma)
        drawn = sac.draw_transitions(replay, 4, 3, 2 * sizes.batch, generator)
        batch = functions.sample(*drawn)
        sac.update(agent, functions, batch, torch.randn(2, 2, sizes.batch, 1, device="cuda"), 0, args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Run folder and command line ------------------------------------------------------------------------------------------


def test_resume_refuses_another_shape_of_the_replay_only_if_the_checkpoint_has_one():
    checkpoint = dict(args=dataclasses.asdict(probe_args(None)), env_steps=6_400, processes=[{}])
    for name, value in (("replay_capacity", 20_000), ("half_precision_replay", True)):
        args = sac.Args(**checkpoint["args"] | {"total_timesteps": 12_800, name: value})
        sac.check_resumable(checkpoint, args, world_size=1)
        with_replay = checkpoint | dict(args=checkpoint["args"] | dict(checkpoint_replay=True))
        with pytest.raises(sac.InputError, match=f"was trained with {name} = "):
            sac.check_resumable(with_replay, args, world_size=1)


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")  # a frozen number may be the number of rows
@pytest.mark.parametrize("network", ["mlp", "layer_norm", "flash"])
def test_exported_policy_acts_like_the_trained_one(network, tmp_path, monkeypatch, capsys):
    env_id = "InvertedPendulum-v5"
    agent, path = write_checkpoint(tmp_path, sac, "sac", env_id, network=network)
    flags = ["--play", path, "--export", tmp_path / "policy.onnx", "--eval-episodes", "1"]
    assert run_main(monkeypatch, capsys, *flags, trainer=sac) == (0, "")
    policy = OnnxPolicy(tmp_path / "policy.onnx")
    check_file(policy, agent.act, agent.obs_statistics, (torch.tensor([-3.0]), torch.tensor([3.0])), squashed=True)
    names = ["qpos/slider", "qpos/hinge", "qvel/slider", "qvel/hinge"], ["slide"]
    assert read_names(policy, "sac_gpu_torch.py", env_steps=640) == (*names, pytest.approx(0.04))
    ours, theirs = (vecsim.evaluate_in_gymnasium(env_id, act, 1, 1, {}) for act in (agent.act, policy.act))
    assert ours == pytest.approx(theirs) and ours["mean_length"] > 1
