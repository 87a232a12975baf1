"""What memory adds to PPO: cells against PyTorch's, sequences, resets and V(final_obs) by hand, probes, export, panel.

tests/test_trainers.py and tests/test_cuda_without_gpu.py run this trainer too: reproducibility, resume, compilation,
CUDA graphs, run folder and command line."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys

import gymnasium
import numpy as np
import onnxruntime
import pytest
import torch
from probe_envs import ProbeEnv, probe_args
from score_onnx import write_checkpoint

import ppo_gpu_torch as ppo
import ppo_recurrent_gpu_torch as recurrent

KINDS = ("gru", "lstm", "mingru")
make_args = functools.partial(probe_args, flags=recurrent.Args, memory_width=32)


def make_agent(obs_size=3, actions=2, critic_obs_size=None, **flags):
    """An agent away from the special point of its initial weights, and its flags."""
    args = make_args(None, **dict(memory_width=5, actor_hidden=(7,), critic_hidden=(6,)) | flags)
    space = gymnasium.spaces.Box(-1.0, 1.0, (actions,), np.float32)
    torch.manual_seed(0)
    agent = recurrent.Agent(obs_size, critic_obs_size, space, args)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    return agent, args


def make_accumulator(**flags):
    """An agent with one observation whose mean action and value are h_t = h_(t-1) / 2 + obs_t."""
    plain = dict(memory="mingru", memory_width=1, actor_hidden=(), critic_hidden=(), gamma=0.5, gae_lambda=0.0)
    plain |= dict(normalize_observations=False, normalize_values=False, normalize_advantages=False)
    agent, args = make_agent(obs_size=1, actions=1, **plain | flags)
    for network in (agent.actor, agent.critic):
        gate, late = network.memory.from_input[0], network.late[0]
        gate.weight.data, gate.bias.data = torch.tensor([[0.0], [2.0]]), torch.zeros(2)  # z = 1/2, candidate 2 obs
        late.weight.data, late.bias.data = torch.tensor([[0.0, 1.0]]), torch.zeros(1)  # (obs, h) -> h
    return agent, args


def random_rollout(agent, args, steps=6, envs=4):
    """A rollout as a training would fill it, with ends inside, from a memory that is not empty."""
    generator = torch.Generator().manual_seed(1)
    sizes = recurrent.derive_sizes(dataclasses.replace(args, num_envs=envs, num_steps=steps), 1)
    rollout = recurrent.allocate_rollout(agent, sizes, steps)
    for x in (rollout.obs, rollout.critic_obs, rollout.final_critic_obs, rollout.critic_memory, rollout.reward):
        x.normal_(generator=generator)
    for x in (rollout.started, rollout.terminated, rollout.truncated):
        x.copy_(torch.rand(x.shape, generator=generator) < 0.25)
    memory = torch.randn(envs, agent.actor.state_size, generator=generator)
    for t in range(steps):
        if t % sizes.sequence == 0:
            rollout.memory[t // sizes.sequence] = memory
        noise = torch.randn(envs, len(agent.log_std), generator=generator)
        step = recurrent.policy_step(agent, rollout.obs[t], memory, rollout.started[t], noise)
        rollout.mean[t], rollout.action[t], _, memory = step
    return rollout, sizes


def batches_of(agent, args, rollout, sizes):
    estimate = recurrent.values_and_advantages(agent, rollout, args.gamma, args.gae_lambda)
    return recurrent.make_batches(agent, rollout, estimate, torch.arange(sizes.envs), sizes, args)


# Cells ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, order", [("gru", (1, 0, 2)), ("lstm", (1, 0, 3, 2))])
def test_cells_are_those_of_pytorch(kind, order):
    """order: where our gates keep, reset, candidate and keep, enter, leave, candidate are in PyTorch's matrices."""
    agent, _ = make_agent(memory=kind, memory_layers=2)
    ours = agent.actor.memory
    theirs = dict(gru=torch.nn.GRU, lstm=torch.nn.LSTM)[kind](3, 5, num_layers=2)
    for layer in range(2):
        for name, linear in (("ih", ours.from_input[layer]), ("hh", ours.from_state[layer])):
            for part in ("weight", "bias"):
                gates = getattr(linear, part).detach().chunk(len(order))
                getattr(theirs, f"{part}_{name}_l{layer}").data = torch.cat(
                    [gates[order.index(k)] for k in range(len(order))]
                )
    x, state = torch.randn(9, 4, 3), torch.randn(4, ours.state_size)
    before = state.unflatten(1, (2, -1, 5)).movedim(0, 2)  # (layers, h or c, B, width)
    before = before[:, 0].contiguous() if kind == "gru" else (before[:, 0].contiguous(), before[:, 1].contiguous())
    expected, _ = theirs(x, before)
    outputs, _ = ours(x, state, torch.zeros(9, 4, dtype=torch.bool))
    torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-6)


def test_a_scan_by_hand():
    """1; 0 x 1 + 2; 2 x 2 + 3; -1 x 7 + 4; 1/2 x -3 + 5."""
    decay, value = (torch.tensor(x)[:, None, None] for x in ([9.0, 0.0, 2.0, -1.0, 0.5], [1.0, 2.0, 3.0, 4.0, 5.0]))
    assert recurrent.parallel_scan(decay, value).flatten().tolist() == [1.0, 2.0, 7.0, -3.0, 3.5]


def test_mingru_by_hand_with_an_episode_that_begins_inside():
    """h: 4/2 + 1 = 3; 3/2 + 1 = 2.5; a new episode: 1; 1/2 + 1 = 1.5. The second robot begins at once: 1; 1.5; ..."""
    agent, _ = make_accumulator()
    started = torch.tensor([[False, True], [False, False], [True, False], [False, False]])
    mean, states = agent.policy_mean(torch.ones(4, 2, 1), torch.tensor([[4.0], [4.0]]), started)
    assert mean[:, 0, 0].tolist() == states[:, 0, 0].tolist() == [3.0, 2.5, 1.0, 1.5]
    assert mean[:, 1, 0].tolist() == [1.0, 1.5, 1.75, 1.875]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("position, layers", [("before", 1), ("after", 2)])
def test_step_by_step_equals_the_sequence(kind, position, layers):
    """To 1e-6, relative where a value is above 1: with the larger initial weights it is."""
    agent, _ = make_agent(memory=kind, memory_position=position, memory_layers=layers)
    x, started = torch.randn(33, 8, 3), torch.rand(33, 8) < 0.1
    for network in (agent.actor, agent.critic):
        memory = start = torch.randn(8, network.state_size)
        outputs, states = network(x, start, started)
        for t in range(33):
            output, after = network(x[t : t + 1], memory, started[t : t + 1])
            memory = after[0]
            torch.testing.assert_close(output[0], outputs[t], rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(memory, states[t], rtol=1e-6, atol=1e-6)
        fresh, _ = network(x[5:], torch.zeros_like(start), started[5:])  # an episode sees nothing of those before it
        new = started[5:].cumsum(0) > 0
        torch.testing.assert_close(fresh[new], outputs[5:][new], rtol=1e-6, atol=1e-6)


def test_a_value_function_with_privileged_observations_has_no_memory():
    agent, args = make_agent(critic_obs_size=2)
    assert agent.critic.state_size == 0 and agent.actor.state_size == 5
    rollout, sizes = random_rollout(agent, args)
    value, _, memory = recurrent.values_and_advantages(agent, rollout, 0.9, 0.9)
    expected = agent.critic.late(rollout.critic_obs)[..., 0]
    torch.testing.assert_close(value, expected.detach(), rtol=1e-5, atol=1e-6)
    assert memory.shape == (6, 4, 0) and all(
        x.critic_memory.shape == (1, 2, 0) for x in batches_of(agent, args, rollout, sizes)
    )


# Targets --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["truncated", "terminated", "invalid"])
def test_values_and_advantages_by_hand(end):
    """One robot, V = h. Its second step ends the episode with final_obs 10; what begins then sees 4.

    V(s): 8/2 + 1 = 5; 5/2 + 2 = 4.5; 4, because the memory is empty.
    V(final_obs): 5/2 + 2 = 4.5; 4.5/2 + 10 = 12.25 with the memory of the episode that ends; 4/2 + 6 = 8.
    Advantage: r + V(final_obs)/2 - V(s) = 1 + 2.25 - 5; 1 + 6.125 - 4.5, or 1 - 4.5 after a real end; 1 + 4 - 4."""
    agent, args = make_accumulator(num_steps=3, num_envs=1, num_minibatches=1)
    rollout = recurrent.allocate_rollout(agent, recurrent.derive_sizes(args, 1), 3)
    rollout.obs[:, 0, 0] = torch.tensor([1.0, 2.0, 4.0])
    rollout.final_critic_obs[:, 0, 0] = torch.tensor([2.0, math.nan if end == "invalid" else 10.0, 6.0])
    rollout.critic_memory.fill_(8.0)
    rollout.started[2], rollout.reward[:] = True, 1.0
    getattr(rollout, end)[1] = True
    value, advantage, memory = recurrent.values_and_advantages(agent, rollout, args.gamma, args.gae_lambda)
    second = dict(truncated=2.625, terminated=-3.5, invalid=0.0)[end]
    assert value[:, 0].tolist() == memory[:, 0, 0].tolist() == [5.0, 4.5, 4.0]
    assert advantage[:, 0].tolist() == [-1.75, second, 1.0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_value_of_what_follows_is_that_of_the_next_step(kind):
    """final_obs of a step that goes on is the next observation: with lambda 0, A = r + gamma V(s_(t+1)) - V(s_t)."""
    agent, args = make_agent(memory=kind, normalize_values=False)
    rollout, _ = random_rollout(agent, args)
    for x in (rollout.started, rollout.terminated, rollout.truncated):
        x.zero_()
    rollout.final_critic_obs[:-1] = rollout.critic_obs[1:]
    value, advantage, _ = recurrent.values_and_advantages(agent, rollout, 0.9, 0.0)
    torch.testing.assert_close(advantage[:-1], rollout.reward[:-1] + 0.9 * value[1:] - value[:-1], rtol=0, atol=2e-6)


# Minibatches ----------------------------------------------------------------------------------------------------------


def test_minibatches_are_whole_sequences_of_whole_environments():
    """obs of step t in environment n is 10 n + t; the memories before the sequence that begins with it are 0.5 more."""
    agent, args = make_accumulator(num_steps=6, sequence_length=2, num_envs=4, num_minibatches=2)
    sizes = recurrent.derive_sizes(args, 1)
    rollout = recurrent.allocate_rollout(agent, sizes, 6)
    names = (10 * torch.arange(4.0) + torch.arange(6.0)[:, None])[..., None]  # (T, N, 1)
    rollout.obs.copy_(names)
    rollout.memory.copy_(names[::2] + 0.5)
    rollout.critic_memory.copy_(names[0] + 0.5)
    after = torch.cat([names[1:], names[:1]]) + 0.5  # what the value function remembers after each step
    estimate = rollout.reward, rollout.reward, after
    batches = recurrent.make_batches(agent, rollout, estimate, torch.tensor([3, 0, 2, 1]), sizes, args)
    assert [batch.obs[0, :, 0].tolist() for batch in batches] == [[30, 32, 34, 0, 2, 4], [20, 22, 24, 10, 12, 14]]
    for batch in batches:
        assert torch.equal(batch.obs[1], batch.obs[0] + 1)
        assert torch.equal(batch.memory[0], batch.obs[0] + 0.5) and torch.equal(batch.critic_memory, batch.memory)
        assert batch.weight.shape == (2, 6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [2, 6])
def test_gradients_flow_through_a_sequence_and_not_further(kind, length):
    """The oracle steps through time, one environment after the other, and cuts the graph every `length` steps."""
    agent, args = make_agent(memory=kind, num_steps=6, sequence_length=length, num_minibatches=1)
    rollout, sizes = random_rollout(agent, args)
    (batch,) = batches_of(agent, args, rollout, sizes)
    old_log_std = agent.log_std.detach().clone()
    recurrent.compute_gradients(agent, batch, old_log_std, recurrent.ppo_loss, args)
    ours = [parameter.grad.clone() for parameter in agent.parameters()]
    agent.zero_grad()
    losses = []
    for env in range(4):
        memories = [rollout.memory[0, env : env + 1], rollout.critic_memory[env : env + 1]]
        for t in range(6):
            if t % length == 0:
                memories = [x.detach() for x in memories]
            column = env * (6 // length) + t // length
            one = recurrent.Batch(*[x[None] for x in memories], *(x[t % length, column][None, None] for x in batch[2:]))
            losses.append(recurrent.ppo_loss(agent, one, old_log_std, args)[0])
            inputs = one.obs, one.started, one.critic_obs
            memories = [
                agent.policy_mean(inputs[0], memories[0], inputs[1])[1][0],
                agent.normalized_value(inputs[2], memories[1], inputs[1])[1][0],
            ]
    torch.stack(losses).mean().backward()
    for (name, parameter), gradient in zip(agent.named_parameters(), ours, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_quarantined_transitions_leave_no_trace(kind):
    """NaN there changes nothing, and neither does any other number."""
    gradients = []
    for garbage in (torch.nan, 1e9):
        agent, args = make_agent(memory=kind, num_steps=6)
        rollout, sizes = random_rollout(agent, args)
        rollout.invalid[2, 1] = rollout.started[3, 1] = rollout.invalid[5, 0] = True
        rollout.reward[rollout.invalid], rollout.final_critic_obs[rollout.invalid] = garbage, garbage
        batches = batches_of(agent, args, rollout, sizes)
        assert sum((batch.weight == 0).sum() for batch in batches) == 2
        for batch in batches:
            recurrent.compute_gradients(agent, batch, agent.log_std.detach(), recurrent.ppo_loss, args)
            gradients.append(
                [agent.return_statistics.mean, *(parameter.grad.clone() for parameter in agent.parameters())]
            )
    for one, other in zip(gradients[0] + gradients[1], gradients[2] + gradients[3], strict=True):
        assert one.isfinite().all() and torch.equal(one, other)


@pytest.mark.parametrize("kind, sequence_length", [("gru", 4), ("lstm", 2), ("mingru", None)])
def test_the_update_sees_the_policy_that_acted(kind, sequence_length, tmp_path, monkeypatch):
    """In a training every batch gives the means of the rollout again, so the probability ratio is 1.

    The episodes have 1 step, where robot 0 is quarantined, and 9 steps, which go on in the next rollouts of 4."""
    differences, starts, make_batches = [], [], recurrent.make_batches

    def checking(agent, rollout, *others):
        starts.append(rollout.started.clone())
        batches = make_batches(agent, rollout, *others)
        for batch in batches:
            mean, _ = agent.policy_mean(batch.obs, batch.memory[0], batch.started)
            differences.append(float((mean - batch.mean).abs().max().detach()))
        return batches

    monkeypatch.setattr(recurrent, "make_batches", checking)
    for env_id, length in (("broken", 1), ("recall-8", 9)):
        flags = dict(memory=kind, num_steps=4, sequence_length=sequence_length, total_timesteps=1_024, eval_episodes=0)
        recurrent.train(make_args(tmp_path / env_id, env_id, **flags), ProbeEnv)
        assert torch.equal(torch.cat(starts), (torch.arange(16) % length == 0)[:, None].expand(16, 64))
        starts.clear()
    assert len(differences) == 2 * 4 * 2 and max(differences) <= 2e-6


# Sizes ----------------------------------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_ppo():
    """test_service.py shows that they are legal."""
    assert recurrent.TASKS == ppo.TASKS


# Whole trainings ------------------------------------------------------------------------------------------------------

SOLVED = {  # a probe that only a memory solves: its flags, and the score that shows it; without memory -1/4 and 0
    "recall-1": (dict(num_steps=8, total_timesteps=30_000), -0.02),
    "recall-8": (dict(num_steps=18, total_timesteps=120_000), -0.02),
    "recall-32": (dict(num_steps=33, total_timesteps=150_000), -0.02),
    "t-maze": (dict(num_steps=18, total_timesteps=120_000), 0.9),
}
TRIED = [("recall-1", kind) for kind in KINDS]
TRIED += [pytest.param("recall-8", kind, marks=pytest.mark.slow) for kind in KINDS]
TRIED += [pytest.param(*x, marks=pytest.mark.slow) for x in (("recall-32", "gru"), ("t-maze", "lstm"))]


@pytest.mark.parametrize("env_id, kind", TRIED)
def test_a_memory_solves_what_needs_one(env_id, kind, tmp_path):
    flags, score = SOLVED[env_id]
    result = recurrent.train(make_args(tmp_path, env_id, memory=kind, **flags), ProbeEnv)
    assert result["vecsim"]["mean"] > score and result["train_seconds"] < 60


@pytest.mark.parametrize("env_id", ["recall-1", pytest.param("t-maze", marks=pytest.mark.slow)])
def test_without_memory_nobody_does(env_id, tmp_path):
    flags, _ = SOLVED[env_id]
    result = ppo.train(probe_args(tmp_path, env_id, **flags), ProbeEnv)
    assert result["vecsim"]["mean"] < (-0.2 if env_id == "recall-1" else 0.5)


# A policy after its training ------------------------------------------------------------------------------------------


def actions_by_hand(agent, obs, started):
    """Actions (T, B, actions) from observations (T, B, obs): a fresh memory for each episode of each robot."""
    actions = torch.zeros(*obs.shape[:2], len(agent.log_std))
    for robot in range(obs.shape[1]):
        memory = None
        for t in range(len(obs)):
            memory = agent.empty_memory(1) if started[t, robot] else memory
            actions[t, robot : robot + 1], memory = agent.act(obs[t, robot : robot + 1], memory)
    return actions


def story(size, steps=12):
    """Observations (T, 3, obs) and starts (T, 3) of robots whose episodes end at different times."""
    started = torch.zeros(steps, 3, dtype=torch.bool)
    started[0] = started[5, 0] = started[7, 1] = True
    return torch.randn(steps, 3, size, generator=torch.Generator().manual_seed(2)), started


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_keeps_the_memory_of_each_robot_and_the_panel_judges_it(kind, tmp_path):
    panel = pytest.importorskip("eval_panel")
    flags = dict(memory=kind, env_kwargs={"hidden_observations": "qvel"})
    agent, path = write_checkpoint(tmp_path, recurrent, "ppo_recurrent", "HalfCheetah-v5", **flags)
    (obs, started) = story(8)
    expected = actions_by_hand(agent, obs, started)
    (subject,) = panel.load_subjects(panel.check_args(panel.Args((str(path),), device="cpu")))
    policy = recurrent.load_policy(recurrent.load_checkpoint(str(path)))
    for act in (policy, subject.act):
        for _ in range(2):  # a second evaluation begins anew
            actions = torch.stack([act(*step) for step in zip(obs, started, strict=True)])
            torch.testing.assert_close(actions, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")  # a frozen number may be the number of rows
def test_an_export_carries_its_memory_over_an_episode_with_a_reset(kind, tmp_path, monkeypatch, capsys):
    flags = dict(memory=kind, memory_layers=2, memory_position="after", bf16=True)
    agent, path = write_checkpoint(tmp_path, recurrent, "ppo_recurrent", "HalfCheetah-v5", **flags)
    file = tmp_path / "policy.onnx"
    words = f"ppo_recurrent_gpu_torch.py --play {path} --export {file} --eval-episodes 0".split()
    monkeypatch.setattr(sys, "argv", words)
    assert recurrent.main() == 0 and capsys.readouterr().err == ""
    session, agent.bf16 = onnxruntime.InferenceSession(file), False
    assert [x.name for x in session.get_inputs()] == ["obs", "memory_in"]
    assert [x.name for x in session.get_outputs()] == ["action", "memory_out"]
    assert "memory_in is zero where an episode begins" in session.get_modelmeta().custom_metadata_map["memory"]
    obs, started = story(17)
    expected = actions_by_hand(agent, obs, started).clamp(-1.0, 1.0)
    memory = np.zeros((3, agent.actor.state_size), np.float32)
    for t in range(len(obs)):
        memory[started[t].numpy()] = 0.0
        action, memory = session.run(None, {"obs": obs[t].numpy(), "memory_in": memory})
        np.testing.assert_allclose(action, expected[t], rtol=0, atol=1e-5)


def test_an_evaluation_in_gymnasium_has_one_memory_for_each_episode(tmp_path):
    """The pendulum falls at different times. Its episodes, one after the other with fresh memories, score alike."""
    flags = dict(env_id="InvertedPendulum-v5", memory="lstm", env_kwargs={"hidden_observations": "qvel"})
    agent, path = write_checkpoint(tmp_path, recurrent, "ppo_recurrent", **flags)
    score = recurrent.play(recurrent.parse_args(["--play", str(path), "--eval-episodes", "4", "--seed", "5"]))
    lengths = []
    for k in range(4):
        env = gymnasium.make("InvertedPendulum-v5")
        obs, _ = env.reset(seed=5 + k)
        memory, ended, length = agent.empty_memory(1), False, 0
        while not ended:
            action, memory = agent.act(torch.tensor(obs[:2]).float()[None], memory)
            obs, _, terminated, truncated, _ = env.step(action[0].numpy())
            ended, length = terminated or truncated, length + 1
        lengths.append(length)
    assert score["mean_length"] == np.mean(lengths) and len(set(lengths)) > 1


def test_bf16_leaves_the_memory_in_float32():
    agent, _ = make_agent(bf16=True, memory="lstm")
    mean, states = agent.policy_mean(torch.randn(4, 2, 3), agent.empty_memory(2), torch.zeros(4, 2, dtype=torch.bool))
    assert mean.dtype == states.dtype == torch.float32
