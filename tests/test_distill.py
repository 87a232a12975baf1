"""ppo_distill_teacher_student: hand-computed cases, probe environments, resumption and the command line.

test_trainers.py trains it in two processes.
Bit for bit on one CPU with equal versions: two runs of one seed, a resumed run, and a stage by itself. Everything else
has a tolerance."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import os
import signal
import sys
from pathlib import Path

import gymnasium
import numpy as np
import probe_envs
import pytest
import torch
from score_onnx import OnnxPolicy, check_file, read_names, save_agent
from test_ppo import assert_same
from torch import nn

import ppo_distill_teacher_student as distill
import vecsim_torch as vecsim

CPU = torch.device("cpu")
STAGES = ("teacher", "student", "finetune", "baseline")


class RecallEnv(probe_envs.ProbeEnv):
    """Episodes of three steps, each pays -(a - x / 2)^2. `obs` shows x only in the first step, `critic_obs` always.

    x is -1 or 1. obs is (x or 0, age), critic_obs (x, age): a policy must remember x to know what to do."""

    def __init__(self, env_id, num_envs=64, **options):
        super().__init__(env_id, num_envs, **options)
        self.single_observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.single_critic_space = self.single_observation_space

    def observation(self):
        return torch.stack([self.x * (self.age == 0), self.age], 1)

    def privileged(self):
        return torch.stack([self.x, self.age], 1)

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)[0], {"critic_obs": self.privileged()}

    def step(self, action):
        if self.steps_left is not None:
            self.steps_left -= 1
            if self.steps_left < 0:
                raise KeyboardInterrupt
        reward = -(action[:, 0] - self.x / 2).square()
        self.age = self.age + 1
        self.episode_return = self.episode_return + reward
        ended = self.age == 3
        info = dict(final_obs=self.observation(), final_critic_obs=self.privileged(), invalid=torch.zeros_like(ended))
        returns, lengths, episodes = (
            (x * ended).sum() for x in (self.episode_return, self.age, torch.ones_like(reward))
        )
        self.sums += torch.stack([returns, lengths, episodes, torch.zeros_like(returns)])
        self.x = torch.where(ended, self.draw(), self.x)
        self.age, self.episode_return = (torch.where(ended, 0.0, x) for x in (self.age, self.episode_return))
        info |= dict(critic_obs=self.privileged())
        return self.observation(), reward, ended, torch.zeros_like(ended), info


class DriftEnv(RecallEnv):
    """The state is the sum of the actions, and everybody sees it. A time limit of three steps cuts every episode."""

    def observation(self):
        return torch.stack([self.x, self.age], 1)

    def step(self, action):
        obs, reward, ended, _, info = super().step(action)
        self.x = torch.where(ended, self.x, self.x + action[:, 0].detach())
        info["final_obs"] = torch.where(ended[:, None], info["final_obs"], self.observation())
        info["final_critic_obs"], info["critic_obs"] = info["final_obs"], self.privileged()
        return self.observation(), reward, torch.zeros_like(ended), ended, info


class NoiseEnv(RecallEnv):
    """Observations are Gaussian noise, three new numbers in every step. Nothing is privileged."""

    def __init__(self, env_id, num_envs=64, **options):
        super().__init__(env_id, num_envs, **options)
        self.single_observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.single_critic_space = None

    def observation(self):
        return torch.randn(self.num_envs, 3, generator=self.generator)

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)[0], {}

    def step(self, action):
        *rest, info = super().step(action)
        del info["critic_obs"], info["final_critic_obs"]
        return *rest, info


def small_args(run_dir=None, **changes):
    """Flags that solve the probes in seconds."""
    small = dict(env_id="recall", num_envs=64, num_steps=6, num_minibatches=2, gamma=0.9, learning_rate=3e-3)
    small |= dict(actor_hidden=(32,), critic_hidden=(32,), student_hidden=(32,), student_history=3, student_memory=16)
    small |= dict(total_timesteps=60_000, student_timesteps=15_000, finetune_timesteps=6_000, eval_episodes=8)
    small |= dict(distill_steps=12, gradient_length=6, distill_minibatches=2, critic_warmup_iterations=3)
    small |= dict(compile=False, device="cpu", checkpoint_every=10**9, log_every=10**9)
    return distill.Args(run_dir=run_dir and str(run_dir), **(small | changes))


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Drawing takes longer than these runs. Module fixtures come before this one, so they do draw."""
    monkeypatch.setattr(vecsim, "plot_curve", lambda *arguments: None)


def make_agent(args, stage="student", obs_size=2, actions=2):
    torch.manual_seed(0)
    agent = distill.Agent(stage, obs_size, obs_size, gymnasium.spaces.Box(-2.0, 2.0, (actions,), np.float32), args)
    with torch.no_grad():  # away from the special point of the initial weights
        for parameter in agent.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return agent


def saved(run_dir, stage):
    return torch.load(Path(run_dir) / stage / "checkpoint.pt", weights_only=True)


def logged(run_dir, stage, name):
    return [json.loads(line)[name] for line in (Path(run_dir) / stage / "metrics.jsonl").open()]


def state_of(run_dir, stage):
    """The checkpoint of a stage without the clocks and the flags."""
    names = ("agent", "moments", "learning_rate", "processes", "env_steps", "teacher", "description")
    return {name: saved(run_dir, stage)[name] for name in names}


# Memory ---------------------------------------------------------------------------------------------------------------


def test_history_by_hand():
    """One environment with observations 1, 2, 3, 4 after 8 and 9. An episode begins at the third."""
    obs = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1)
    started = torch.tensor([False, False, True, False]).view(4, 1)
    features, memory = distill.stack_history(obs, torch.tensor([[8.0, 9.0]]), started, history=3)
    assert features[:, 0].tolist() == [[8.0, 9.0, 1.0], [9.0, 1.0, 2.0], [0.0, 0.0, 3.0], [0.0, 3.0, 4.0]]
    assert memory.tolist() == [[3.0, 4.0]]


def test_history_of_two_numbers_and_two_environments_by_hand():
    obs = torch.tensor([[[1.0, 10.0], [5.0, 50.0]], [[2.0, 20.0], [6.0, 60.0]]])
    started = torch.tensor([[True, False], [False, True]])
    features, memory = distill.stack_history(obs, torch.tensor([[7.0, 70.0], [8.0, 80.0]]), started, history=2)
    assert features[:, 0].tolist() == [[0.0, 0.0, 1.0, 10.0], [1.0, 10.0, 2.0, 20.0]]
    assert features[:, 1].tolist() == [[8.0, 80.0, 5.0, 50.0], [0.0, 0.0, 6.0, 60.0]]
    assert memory.tolist() == [[2.0, 20.0], [6.0, 60.0]]


def test_without_history_nothing_is_remembered():
    obs = torch.randn(4, 3, 2)
    features, memory = distill.stack_history(obs, torch.zeros(3, 0), torch.zeros(4, 3, dtype=torch.bool), history=1)
    assert torch.equal(features, obs) and memory.shape == (3, 0)


def test_gru_by_hand():
    """All weights are 0 except the candidate's input: r = z = 1/2, so h' = tanh(x) / 2 + h / 2; h = 0 at a start."""
    cell = nn.GRUCell(1, 1)
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.zero_()
        cell.weight_ih[2] = 1.0
    obs, started = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1), torch.tensor([False, True, False]).view(3, 1)
    features, memory = distill.unroll_gru(cell, obs, torch.tensor([[0.8]]), started)
    first, second = math.tanh(1.0) / 2 + 0.4, math.tanh(2.0) / 2
    third = math.tanh(3.0) / 2 + second / 2
    torch.testing.assert_close(features[:, 0], torch.tensor([[1.0, first], [2.0, second], [3.0, third]]))
    torch.testing.assert_close(memory, torch.tensor([[third]]))


@pytest.mark.parametrize("network", ["mlp", "gru"])
def test_a_sequence_at_once_equals_its_steps_one_by_one_and_its_slices(network):
    agent = make_agent(small_args(student_network=network))
    generator = torch.Generator().manual_seed(1)
    obs, started = torch.randn(9, 5, 2, generator=generator), torch.rand(9, 5, generator=generator) < 0.3
    memory = torch.randn(5, agent.memory_size, generator=generator)
    means, last = agent.policy_mean(obs, memory, started)
    for length in (1, 4):
        parts, carried = [], memory
        for x, begins in zip(obs.split(length), started.split(length), strict=True):
            mean, carried = agent.policy_mean(x, carried, begins)
            parts.append(mean)
        torch.testing.assert_close(torch.cat(parts), means)
        torch.testing.assert_close(carried, last)
    forgotten = agent.policy_mean(obs, torch.zeros_like(memory), started)[0]
    assert not torch.allclose(forgotten, means)  # the memory is read


@pytest.mark.parametrize("network", ["mlp", "gru"])
def test_no_gradient_crosses_a_reset(network):
    agent = make_agent(small_args(student_network=network))
    obs = torch.randn(4, 1, 2, requires_grad=True)
    started = torch.tensor([True, False, True, False]).view(4, 1)
    agent.policy_mean(obs, agent.empty_memory(1), started)[0][3].sum().backward()
    seen = obs.grad.abs().sum((1, 2)) > 0
    assert seen.tolist() == [False, False, True, True]


def test_rollout_stores_the_memory_it_began_with_and_the_update_sees_the_same_means(tmp_path, monkeypatch):
    """Across iterations and resets: a rollout replayed from its stored memory gives the same means."""
    checked, make_batch = [], distill.make_batch

    def recording(agent, rollout, value, advantage, order):
        obs = agent.obs_statistics.normalize(rollout.obs)
        mean, _ = agent.policy_mean(obs, rollout.memory, rollout.started)
        torch.testing.assert_close(mean, rollout.mean)
        checked.append((rollout.memory.abs().max().item(), rollout.started.clone()))
        return make_batch(agent, rollout, value, advantage, order)

    monkeypatch.setattr(distill, "make_batch", recording)
    steps = dict(total_timesteps=3 * 256, num_steps=4, student_timesteps=1, finetune_timesteps=1)
    distill.train(small_args(tmp_path, stages=("baseline",), student_network="gru", **steps), RecallEnv)
    memories, started = zip(*checked, strict=True)
    assert memories[0] == 0.0 and min(memories[1:]) > 0.0  # it goes on from iteration to iteration
    begins = torch.cat(started)[:, 0].tolist()
    assert begins == [t % 3 == 0 for t in range(12)]  # episodes of three steps, across iterations of four


@pytest.mark.parametrize("network", ["mlp", "gru"])
def test_a_loaded_policy_clears_its_memory_where_an_episode_begins(network):
    args = small_args(student_network=network)
    agent = make_agent(args)
    checkpoint = dict(stage="student", args=dataclasses.asdict(args), agent=agent.state_dict())
    act, obs = distill.load_policy(checkpoint), torch.randn(4, 3, 2)
    started = torch.tensor([[True] * 3, [False] * 3, [False, True, False], [False] * 3])
    actions = torch.stack([act(*x) for x in zip(obs, started, strict=True)])
    mean, _ = agent.policy_mean(agent.obs_statistics.normalize(obs), agent.empty_memory(3), started)
    torch.testing.assert_close(actions, agent.to_env(mean))
    assert torch.equal(act(obs[0], started[0]), actions[0])  # other episodes: nothing is left of the last ones


# Imitation ------------------------------------------------------------------------------------------------------------


def test_imitation_loss_by_hand():
    """The policy's means are 0. The differences are (1, 2) and (3, 0), then (0, 0); the last transition is masked."""
    agent = make_agent(small_args(student_history=1))
    with torch.no_grad():
        agent.actor[-1].weight.zero_()
        agent.actor[-1].bias.zero_()
    obs, started, memory = torch.randn(2, 2, 2), torch.zeros(2, 2, dtype=torch.bool), torch.zeros(2, 0)
    label = torch.tensor([[[1.0, 2.0], [3.0, 0.0]], [[0.0, 0.0], [9.0, 9.0]]])
    weight = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    loss, terms, _ = distill.imitation_loss(agent, obs, started, memory, label, weight)
    assert loss.item() == pytest.approx(((1 + 4) / 2 + 9 / 2 + 0) / 3)
    assert terms.tolist() == pytest.approx([loss.item(), (1.5 + 1.5 + 0) / 3])


def test_slices_follow_one_another_in_time_with_a_detached_memory():
    args = small_args(student_network="gru", distill_steps=4, gradient_length=2, distill_epochs=1, num_envs=4)
    agent = make_agent(args)
    rollout = distill.allocate_rollout(4, 4, agent, CPU)
    for k, x in enumerate((rollout.obs, rollout.memory)):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(k)))
    rollout.started[2, 1] = True
    calls = []

    def recording(agent, obs, started, memory, label, weight):
        assert not memory.requires_grad and memory.grad_fn is None
        loss, terms, after = distill.imitation_loss(agent, obs, started, memory, label, weight)
        assert after.requires_grad
        calls.append((obs, started, memory, after.detach()))
        return loss, terms, after

    optimizer = vecsim.make_optimizer(agent, torch.tensor(1e-3))
    before = {name: x.clone() for name, x in agent.named_parameters()}
    order = torch.tensor([2, 0, 3, 1])
    gradients = lambda *inputs: distill.imitation_gradients(agent, recording, *inputs)
    functions = distill.ImitationFunctions(None, None, gradients, optimizer.step)
    distill.imitate(agent, functions, rollout, torch.ones(4, 4, 2), order, args)
    assert len(calls) == 4  # 2 minibatches x 2 slices
    for k, part in enumerate((order[:2], order[2:])):
        (obs_0, _, memory_0, after_0), (obs_1, started_1, memory_1, _) = calls[2 * k], calls[2 * k + 1]
        torch.testing.assert_close(obs_0, rollout.obs[:2, part])  # except the 1e-6 in the deviation
        torch.testing.assert_close(obs_1, rollout.obs[2:, part])
        assert torch.equal(memory_0, rollout.memory[part]) and torch.equal(memory_1, after_0)
        assert torch.equal(started_1, rollout.started[2:, part])
    moved = {name for name, x in agent.named_parameters() if not torch.equal(x, before[name])}
    assert moved == {name for name in before if name.startswith(("gru", "actor"))}  # neither critic nor noise


def test_the_teacher_labels_without_noise_and_with_frozen_statistics():
    teacher = make_agent(small_args(), "teacher")
    teacher.obs_statistics.update(torch.randn(50, 2), torch.ones(50, dtype=torch.bool))
    before = {name: x.clone() for name, x in teacher.state_dict().items()}
    obs = torch.randn(3, 4, 2)
    label, act = distill.teacher_actions(teacher, obs), vecsim.policy_of(teacher)
    for t in range(3):
        torch.testing.assert_close(teacher.to_env(label[t]), act(obs[t], torch.ones(4, dtype=torch.bool)))
    assert torch.equal(distill.teacher_actions(teacher, obs), label) and not label.requires_grad
    assert_same(before, dict(teacher.state_dict()))


@pytest.fixture(scope="module")
def recall_teacher(tmp_path_factory):
    """The checkpoint of a teacher of the recall probe."""
    folder = tmp_path_factory.mktemp("teacher")
    distill.train(small_args(folder, stages=("teacher",)), RecallEnv)
    return folder / "teacher" / "checkpoint.pt"


def test_teacher_learns_from_the_privileged_observation(recall_teacher):
    score = json.loads((recall_teacher.parent / "eval.json").read_text())
    assert score["vecsim"]["mean"] > -0.02 and score["vecsim"]["episodes"] == 64
    checkpoint = saved(recall_teacher.parents[1], "teacher")
    assert checkpoint["observes"] == "critic_obs" and checkpoint["agent"]["obs_statistics.count"] >= 39_000


@pytest.mark.parametrize("network", ["mlp", "gru"])
def test_student_with_a_memory_learns_what_it_saw_earlier_and_the_loss_falls(network, recall_teacher, tmp_path):
    flags = dict(stages=("student",), teacher=str(recall_teacher), student_network=network, log_every=768)
    result = distill.train(small_args(tmp_path, **flags), RecallEnv)["student"]
    loss = logged(tmp_path, "student", "imitation_loss")
    assert len(loss) == 20 and loss[-1] < 0.1 * loss[0] and saved(tmp_path, "student")["observes"] == "obs"
    assert result["action_error"] < 0.03 and result["vecsim"]["mean"] > -0.05
    assert result["action_std"] == pytest.approx(0.1)  # the noise with which it acts


def test_student_without_a_memory_cannot(recall_teacher, tmp_path):
    args = small_args(tmp_path, stages=("student",), teacher=str(recall_teacher), student_history=1)
    result = distill.train(args, RecallEnv)["student"]
    assert result["action_error"] > 0.1 and result["vecsim"]["mean"] < -0.3


def test_the_student_acts_with_noise_and_its_memory_restarts_after_a_truncation(tmp_path, monkeypatch):
    """States depend on actions here: only a student that acts meets its own states."""
    rollouts, taken, imitate = [], [], distill.imitate

    class Watched(DriftEnv):
        def step(self, action):
            taken.append(action.clone())
            return super().step(action)

    def watch(agent, functions, rollout, *rest):
        rollouts.append(type(rollout)(*(x.clone() for x in rollout)))
        return imitate(agent, functions, rollout, *rest)

    monkeypatch.setattr(distill, "imitate", watch)
    steps = dict(total_timesteps=4_000, student_timesteps=1_536, finetune_timesteps=1)
    distill.train(small_args(tmp_path, env_id="drift", stages=("teacher", "student"), **steps), Watched)
    start = len(taken) - 2 * 12 - 3  # two iterations of the student, then the three steps of its score
    for k, rollout in enumerate(rollouts):
        sent = torch.stack(taken[start + 12 * k : start + 12 * (k + 1)])
        torch.testing.assert_close(sent, 2.0 * rollout.action)  # in half ranges of 2
        noise, cut = rollout.action - rollout.mean, rollout.truncated
        assert 0.08 < noise.std() < 0.12 and noise.mean().abs() < 0.02
        assert cut.any() and torch.equal(rollout.started[1:], cut[:-1])
        assert (rollout.final_critic_obs[cut][:, 1] == 3).all()  # the last of the episode, not the first of the next
        moved = rollout.obs[1:, :, 0] - rollout.obs[:-1, :, 0]
        torch.testing.assert_close(moved[~cut[:-1]], sent[:-1, :, 0][~cut[:-1]])


def test_a_student_that_sees_what_its_teacher_sees_recovers_the_teacher(tmp_path):
    """A nonlinear teacher of three numbers, judged on states that the student was not trained on."""
    args = small_args(tmp_path / "run", env_id="noise", stages=("student",), teacher=str(tmp_path / "teacher.pt"))
    changes = dict(
        student_history=1, student_hidden=(64, 64), actor_hidden=(16,), num_envs=128, total_timesteps=900_000
    )
    changes |= dict(student_timesteps=200_000, distill_learning_rate=5e-3)
    args, env = dataclasses.replace(args, **changes), vecsim.CompletedEnv(NoiseEnv("noise"))
    torch.manual_seed(3)
    teacher = distill.make_agent("teacher", env, args)
    nn.init.normal_(teacher.actor[-1].weight, std=0.3)
    checkpoint = dict(algorithm="distill", stage="teacher", args=dataclasses.asdict(args), agent=teacher.state_dict())
    checkpoint |= dict(description=distill.describe_agent("teacher", env, args))
    torch.save(checkpoint, tmp_path / "teacher.pt")
    distill.train(args, NoiseEnv)
    act = distill.load_policy(saved(tmp_path / "run", "student"))
    obs = torch.randn(2_000, 3, generator=torch.Generator().manual_seed(9))
    label = distill.teacher_actions(teacher, obs[None])[0]
    action = act(obs, torch.ones(2_000, dtype=torch.bool))
    assert label.std() > 0.2
    assert (action / 2.0 - label).abs().mean() < 1e-2  # half ranges of 2


# Fine-tuning and the baseline -----------------------------------------------------------------------------------------


def test_while_the_policy_is_frozen_the_value_function_learns_and_adam_starts_afresh():
    args = small_args(student_network="gru")
    agent, other = make_agent(args), make_agent(args)
    optimizers = [vecsim.make_optimizer(x, torch.tensor(1e-2)) for x in (agent, other)]
    generator = torch.Generator().manual_seed(0)
    policy = {name for name, _ in agent.named_parameters() if not name.startswith("critic.")}
    before = {name: x.detach().clone() for name, x in agent.named_parameters()}

    def set_gradients(module):
        generator.manual_seed(1)
        for parameter in module.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)

    for _ in range(5):
        set_gradients(agent)
        distill.apply_gradients(agent, optimizers[0], True, args)
    moved = {name for name, x in agent.named_parameters() if not torch.equal(x, before[name])}
    assert moved == before.keys() - policy
    for module, optimizer in zip((agent, other), optimizers, strict=True):
        set_gradients(module)
        distill.apply_gradients(module, optimizer, False, args)
    fresh = dict(other.named_parameters())
    for name, x in agent.named_parameters():
        if name in policy:
            torch.testing.assert_close(x, fresh[name])
            assert not torch.equal(x, before[name])


def test_finetuning_warms_up_the_inherited_critic_then_moves_the_policy(recall_teacher, tmp_path):
    flags = dict(stages=("student",), teacher=str(recall_teacher), student_timesteps=1_536)
    distill.train(small_args(tmp_path / "student", **flags), RecallEnv)
    start, teacher = saved(tmp_path / "student", "student"), torch.load(recall_teacher, weights_only=True)
    for name, value in teacher["agent"].items():
        if name.startswith(("critic", "return")):
            assert torch.equal(start["agent"][name], value), name
    path = tmp_path / "student" / "student" / "checkpoint.pt"
    ends = {}
    for name, iterations in (("frozen", 4), ("moving", 40)):
        flags = dict(stages=("finetune",), student=str(path), critic_warmup_iterations=4)
        args = small_args(tmp_path / name, finetune_timesteps=iterations * 384, **flags)
        ends[name] = distill.train(args, RecallEnv)["finetune"], saved(tmp_path / name, "finetune")["agent"]
    result, frozen = ends["frozen"]
    unlike = {name.split(".")[0] for name, x in frozen.items() if not torch.equal(x, start["agent"][name])}
    assert unlike == {"critic", "critic_obs_statistics", "return_statistics", "log_std"}
    assert frozen["log_std"].exp() == pytest.approx(math.exp(-1.6)) and result["learning_rate"] == pytest.approx(3e-3)
    result, moving = ends["moving"]
    assert 1e-5 <= result["learning_rate"] <= 5e-3
    assert not torch.equal(moving["actor.0.weight"], start["agent"]["actor.0.weight"])
    score = json.loads((path.parent / "eval.json").read_text())["vecsim"]["mean"]
    assert score < -0.1 and result["vecsim"]["mean"] > score + 0.05


@pytest.mark.slow
@pytest.mark.parametrize("network", ["mlp", "gru"])
def test_a_policy_with_memory_learns_by_ppo_alone(network, tmp_path):
    args = small_args(tmp_path, stages=("baseline",), student_network=network, total_timesteps=80_000)
    result = distill.train(args, RecallEnv)["baseline"]
    assert result["vecsim"]["mean"] > -0.05  # without memory -0.5: a = 0 in two of three steps


def test_baseline_has_as_many_steps_as_the_three_others_together():
    sizes = distill.derive_sizes(small_args(total_timesteps=384_000, student_timesteps=76_800), 1, CPU)
    steps = {stage: plan.iterations * plan.steps_per_iteration for stage, plan in sizes.plans.items()}
    assert steps["student"] == 76_800 and steps["baseline"] == 384_000
    assert steps["baseline"] == pytest.approx(steps["teacher"] + steps["student"] + steps["finetune"], abs=3 * 768)


# Reproducibility and resumption ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """All stages in one run, a few iterations each: its folder and its flags."""
    flags = dict(total_timesteps=7_680, student_timesteps=3_072, finetune_timesteps=2_304, student_network="gru")
    flags |= dict(checkpoint_every=1_536, log_every=768)
    folder = tmp_path_factory.mktemp("whole") / "run"
    distill.train(small_args(folder, **flags), RecallEnv)
    return folder, flags


# Vector steps: an iteration of teacher or finetune takes 6, one of the student 12. The score of a stage takes 3.
@pytest.mark.parametrize(
    "stage, steps", [("teacher", 5 * 6), ("student", 6 * 6 + 3 + 3 * 12), ("finetune", 6 * 6 + 3 + 4 * 12 + 3 + 5 * 6)]
)
def test_a_run_killed_in_any_stage_resumes_bit_for_bit(stage, steps, whole_run, tmp_path):
    whole, flags = whole_run

    def mortal(*arguments, **options):
        env = RecallEnv(*arguments, **options)
        env.steps_left = 1 + steps + 2  # the compiling step, and a bit past a checkpoint
        return env

    with pytest.raises(KeyboardInterrupt):
        distill.train(small_args(tmp_path / "run", **flags), mortal)
    path = tmp_path / "run" / stage / "checkpoint.pt"
    assert saved(tmp_path / "run", stage)["env_steps"] < saved(whole, stage)["env_steps"]
    distill.train(small_args(None, resume=str(path), **flags), RecallEnv)
    for name in STAGES:
        assert_same(state_of(whole, name), state_of(tmp_path / "run", name))
        for metric in ("env_steps", "learning_rate", "episode_return"):
            assert logged(whole, name, metric) == logged(tmp_path / "run", name, metric)


def test_a_signal_saves_the_current_stage(tmp_path, monkeypatch, capsys):
    """SIGTERM in the middle of the second iteration of the student."""

    class Signalled(RecallEnv):
        steps_taken = 0

        def step(self, action):
            self.steps_taken += 1
            if self.steps_taken == 1 + 6 + 3 + 12 + 5:  # the teacher has an iteration and a score
                os.kill(os.getpid(), signal.SIGTERM)
            return super().step(action)

    steps = dict(total_timesteps=384 + 3_072 + 2_304, student_timesteps=3_072, finetune_timesteps=2_304)
    args = small_args(tmp_path, student_network="gru", **steps)
    monkeypatch.setattr(distill, "train", lambda _, stop, train=distill.train: train(args, Signalled, stop=stop))
    status, out, _ = run_main(monkeypatch, capsys)
    assert status == 143 and f"continue with --resume {tmp_path / 'student' / 'checkpoint.pt'}" in out
    assert saved(tmp_path, "student")["iteration"] == 2


def test_a_stage_by_itself_equals_that_stage_of_a_whole_run(whole_run, tmp_path):
    whole, flags = whole_run
    for stage, start in (("student", dict(teacher="teacher")), ("finetune", dict(student="student")), ("baseline", {})):
        paths = {flag: str(whole / folder / "checkpoint.pt") for flag, folder in start.items()}
        distill.train(small_args(tmp_path / stage, stages=(stage,), **flags, **paths), RecallEnv)
        assert_same(state_of(whole, stage), state_of(tmp_path / stage, stage))


def test_a_finished_stage_goes_on_with_the_next_and_another_seed_is_another_run(whole_run, tmp_path):
    whole, flags = whole_run
    distill.train(small_args(tmp_path, stages=("teacher",), seed=2, **flags), RecallEnv)
    weights = [saved(folder, "teacher")["agent"]["actor.0.weight"] for folder in (tmp_path, whole)]
    assert not torch.equal(*weights)
    path = str(tmp_path / "teacher" / "checkpoint.pt")
    distill.train(small_args(None, resume=path, stages=("student",), seed=2, **flags), RecallEnv)
    assert saved(tmp_path, "student")["env_steps"] == 3_072
    assert_same(saved(tmp_path, "student")["teacher"], saved(tmp_path, "teacher")["agent"])  # inside its checkpoint


@pytest.mark.slow
def test_a_profile_of_each_stage(tmp_path, capsys):
    flags = dict(total_timesteps=8 * 384 + 8 * 768 + 1, student_timesteps=8 * 768, finetune_timesteps=1)
    distill.train(small_args(tmp_path, profile=True, stages=("teacher", "student"), **flags), RecallEnv)
    assert "infer" in capsys.readouterr().out
    for stage in ("teacher", "student"):
        trace = json.loads(gzip.decompress((tmp_path / stage / "trace.json.gz").read_bytes()))
        assert {"infer", "simulate", "targets", "update"} <= {event.get("name") for event in trace["traceEvents"]}


def test_resume_takes_a_new_learning_rate_or_the_adapted_one(whole_run, tmp_path):
    whole, flags = whole_run
    start = dict(student=str(whole / "student" / "checkpoint.pt"), stages=("finetune",), critic_warmup_iterations=2)
    steps = {"finetune_timesteps": 6 * 384}
    distill.train(small_args(tmp_path / "first", **(flags | start | steps)), RecallEnv)
    path = str(tmp_path / "first" / "finetune" / "checkpoint.pt")
    adapted = float(torch.load(path, weights_only=True)["learning_rate"])
    # One gradient step in an iteration: nothing adapts the rate.
    further = dict(resume=path, num_minibatches=1, update_epochs=1, finetune_timesteps=7 * 384)
    for number, (changes, rate) in enumerate(
        [({}, adapted), (dict(learning_rate=2e-3), adapted), (dict(finetune_learning_rate=2e-4), 2e-4)]
    ):
        args = small_args(tmp_path / str(number), **(flags | start | further | changes))
        assert distill.train(args, RecallEnv)["finetune"]["learning_rate"] == pytest.approx(rate)
    with pytest.raises(distill.InputError, match="was trained with critic_warmup_iterations = 2, not 30"):
        distill.train(small_args(None, **(flags | start | further | dict(critic_warmup_iterations=30))), RecallEnv)


def test_run_folder_has_the_names_that_machines_read(whole_run):
    folder, _ = whole_run
    assert {path.name for path in folder.iterdir()} == set(STAGES)
    for stage in STAGES:
        names = {path.name for path in (folder / stage).iterdir()}
        assert {"config.json", "metrics.jsonl", "checkpoint.pt", "eval.json", "curve.png"} <= names
        line = json.loads((folder / stage / "metrics.jsonl").read_text().splitlines()[-1])
        expected = "env_steps wall_seconds steps_per_second episode_return episode_length episodes"
        assert set(expected.split()) <= line.keys()
        evaluation = json.loads((folder / stage / "eval.json").read_text())
        expected = "env_id algorithm seed env_steps train_seconds compile_seconds vecsim gymnasium stage"
        assert evaluation.keys() == set(expected.split()) and evaluation["stage"] == stage
        assert evaluation["vecsim"].keys() == {"mean", "std", "min", "episodes", "mean_length"}


# Compiled -------------------------------------------------------------------------------------------------------------


def test_compiled_and_eager_losses_agree():
    """aot_eager traces as Inductor does; test_trainers.py has the same losses with Inductor's kernels."""
    args = small_args(student_network="gru")
    agent, generator = make_agent(args), torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(3, 4, *shape, generator=generator)

    started, memory = normal() > 0.5, normal(agent.memory_size)[0]
    features = normal(2), started, memory[None], normal(2), normal(2), normal(2)
    batch = distill.Batch(*features, *(normal() for _ in range(4)))
    old_log_std = agent.log_std.detach()
    losses = {
        "ppo": lambda f: f(agent, batch, old_log_std, 12, args),
        "imitation": lambda f: f(agent, batch.obs, started, memory, batch.action, batch.weight.abs()),
    }
    for name, call in losses.items():
        function = getattr(distill, f"{name}_loss")
        answers = []
        for f in (function, torch.compile(function, backend="aot_eager", dynamic=False)):
            agent.zero_grad()
            loss, terms, *_ = call(f)
            loss.backward()
            gradients = [x.grad for x in agent.parameters() if x.grad is not None]
            answers.append((loss.detach(), terms, *gradients))
        torch.testing.assert_close(answers[0], answers[1], rtol=1e-4, atol=1e-5)


# Flags and guards -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(env_id="noise"), "was trained with critic_obs = 2 numbers; this run has critic_obs = 3 numbers"),
        (dict(actor_hidden=(8,)), r"trained with actor_hidden = \(32,\); this run has actor_hidden = \(8,\)"),
        (dict(critic_hidden=(8,)), "trained with critic_hidden"),
        (dict(env_kwargs={"action_scale": 0.3}), "with action_scale = None; this run has action_scale = 0.3"),
        (dict(stages=("finetune",)), "start from a student; give --student PATH or add that stage"),
        (dict(stages=("finetune",), student="teacher"), "is the checkpoint of a teacher, not of a student"),
    ],
)
def test_a_start_that_does_not_fit_is_refused_before_training(changes, message, recall_teacher, tmp_path):
    paths = {name: str(recall_teacher) for name in ("teacher", *changes.keys() & {"student"})}
    args = small_args(tmp_path, **(dict(stages=("student",)) | changes | paths))
    with pytest.raises(distill.InputError, match=message):
        distill.train(args, NoiseEnv if args.env_id == "noise" else RecallEnv)
    assert not any(tmp_path.iterdir())


def test_a_description_names_the_parts_of_the_observations():
    args = distill.task_defaults("Quadruped-Flat")
    env = vecsim.make("Quadruped-Flat", num_envs=1)
    teacher, student = (distill.describe_agent(stage, env, args) for stage in ("teacher", "student"))
    assert "obs" not in teacher and teacher["critic_obs"] == student["critic_obs"] != student["obs"]
    assert "velocity 3" in teacher["critic_obs"] and "velocity 3" not in student["obs"].split(", ")


def test_task_defaults_yield_to_flags():
    for task in distill.TASKS:
        args = distill.parse_args(["--env-id", task, "--num-envs", "8", "--env-kwargs", "first_levels", "1"])
        assert args.num_envs == 8 and args.env_kwargs == {"randomize": True, "first_levels": 1}
        assert args.total_timesteps == distill.TASKS[task]["total_timesteps"]
        distill.check_ranges(args)


def run_main(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["ppo_distill_teacher_student.py", *map(str, arguments)])
    status = distill.main()
    return status, *capsys.readouterr()


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(student_timesteps=20_480, total_timesteps=40_000, num_envs=128),
            "with num_envs = 64, not 128; omit that",
        ),
        (dict(distill_noise=0.3), "was trained with distill_noise = 0.1, not 0.3"),
        (dict(stages=("teacher", "student")), "leaves nothing to run; the checkpoint has finished student"),
        (dict(stages=("finetune",)), "finetune contains a run; choose another --run-dir, or --resume its"),
        (dict(resume=None), "teacher contains a run; choose another --run-dir, or --resume its checkpoint.pt"),
    ],
)
def test_a_run_is_not_resumed_with_other_flags_nor_overwritten(changes, message, whole_run):
    folder, flags = whole_run
    before = (folder / "teacher" / "metrics.jsonl").read_bytes()
    resume = dict(resume=str(folder / "student" / "checkpoint.pt"))
    with pytest.raises(distill.InputError, match=message):
        distill.train(small_args(folder, **(flags | resume | changes)), RecallEnv)
    assert (folder / "teacher" / "metrics.jsonl").read_bytes() == before


def test_another_number_of_environments_may_start_from_a_teacher(whole_run, tmp_path):
    folder, flags = whole_run
    start = dict(stages=("student",), num_envs=32, teacher=str(folder / "teacher" / "checkpoint.pt"))
    assert distill.train(small_args(tmp_path, **flags, **start), RecallEnv)["student"]["vecsim"]["episodes"] == 32


@pytest.mark.slow
def test_all_stages_on_the_quadruped(tmp_path, monkeypatch, capsys):
    """Teacher and student are scored in vecsim and in MuJoCo C; then the student is played."""
    flags = "--env-id Quadruped-Flat --device cpu --no-compile --num-envs 8 --num-steps 4 --num-minibatches 2"
    flags += (
        " --distill-steps 6 --gradient-length 3 --distill-minibatches 1 --total-timesteps 176 --student-timesteps 48"
    )
    flags += " --finetune-timesteps 64 --critic-warmup-iterations 1 --actor-hidden 16 --critic-hidden 16"
    flags += " --student-hidden 16 --student-history 2 --eval-episodes 3 --env-kwargs max_episode_steps 12"
    status, out, err = run_main(monkeypatch, capsys, *flags.split(), "--run-dir", tmp_path)
    assert status == 0, err
    assert out.startswith(
        f"Quadruped-Flat on cpu with 1 process(es), into {tmp_path}\nstages: teacher, student, finetune, "
    )
    for stage in STAGES:
        evaluation = json.loads((tmp_path / stage / "eval.json").read_text())
        assert evaluation["vecsim"]["episodes"] == 8 and evaluation["gymnasium"]["episodes"] == 3
        assert saved(tmp_path, stage)["args"]["env_kwargs"]["randomize"] is True
    assert saved(tmp_path, "baseline")["env_steps"] >= 176
    for stage in ("teacher", "student"):
        play = ["--play", tmp_path / stage / "checkpoint.pt", "--eval-episodes", "2"]
        status, out, err = run_main(monkeypatch, capsys, *play)
        assert status == 0 and f"Quadruped-Flat, {stage}, " in out, err


# Export ---------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")  # it would freeze a number, perhaps that of the rows
@pytest.mark.parametrize(
    "stage, flags, memory_size",
    [
        ("student", dict(student_history=3), 2 * 45),
        ("finetune", dict(student_network="gru"), 16),
        ("student", dict(student_history=1), 0),
        ("teacher", {}, 0),
    ],
)
def test_exported_policy_acts_like_the_trained_one(stage, flags, memory_size, tmp_path, monkeypatch, capsys):
    """In one step, and with its memory over an episode of the robot in MuJoCo."""
    small = dict(actor_hidden=(32,), student_hidden=(32,), critic_hidden=(32,), student_memory=16)
    args = dataclasses.replace(distill.task_defaults("Quadruped-Flat"), device="cpu", **small, **flags)
    env = vecsim.make(args.env_id, num_envs=1, **args.env_kwargs)
    torch.manual_seed(0)
    agent = distill.make_agent(stage, env, args)
    observes = "critic_obs" if stage == "teacher" else "obs"
    path = save_agent(tmp_path, agent, args, "distill", stage=stage, observes=observes)
    play = ["--play", path, "--export", tmp_path / "policy.onnx", "--eval-episodes", "0"]
    assert run_main(monkeypatch, capsys, *play) == (0, f"ONNX: {tmp_path / 'policy.onnx'}\n", "")

    policy = OnnxPolicy(tmp_path / "policy.onnx")
    observed, actions, control_step = read_names(policy, "ppo_distill_teacher_student.py", env_steps=640)
    assert control_step == pytest.approx(0.02) and policy.metadata["stage"] == stage
    assert actions == [f"{leg}_{part}" for leg in ("FR", "FL", "RR", "RL") for part in ("hip", "thigh", "calf")]
    assert [f"joint_position/{name}" for name in actions] == [x for x in observed if x.startswith("joint_position")]
    assert "gravity[2]" in observed and ("mass[0]" in observed) == (stage == "teacher")
    home = torch.tensor([0.0, 0.9, -1.8] * 4)  # rad; an action is an offset in units of 0.5 rad, and joints have ranges
    low, high = (torch.tensor(ends * 4) for ends in ([-0.863, -0.686, -2.818], [0.863, 4.501, -0.888]))
    limits, act = ((low - home) / 0.5, (high - home) / 0.5), vecsim.policy_of(agent)
    if not memory_size:
        assert "memory" not in policy.metadata
        started = torch.ones(1000, dtype=torch.bool)
        check_file(policy, lambda obs: act(obs, started[: len(obs)]), agent.obs_statistics, limits)
        return
    assert [x.shape for x in policy.session.get_outputs()] == [["batch", 12], ["batch", memory_size]]
    assert "zero where an episode begins" in policy.metadata["memory"]
    robot = gymnasium.make("vecsim/Quadruped-Flat")
    obs, _ = robot.reset(seed=3)
    started, memory = torch.ones(1, dtype=torch.bool), np.zeros((1, memory_size), np.float32)
    for _ in range(20):
        seen = torch.as_tensor(obs)[None]
        wanted = act(seen, started)
        inputs = {"obs": seen.numpy(), "memory_in": memory}
        action, memory = policy.session.run(["action", "memory_out"], inputs)
        assert np.abs(action - wanted.clamp(*limits).numpy()).max() <= 1e-5
        obs, _, fell, _, _ = robot.step(action[0])
        obs = robot.reset()[0] if fell else obs
        started, memory = torch.tensor([fell]), memory * (not fell)
    together, _ = policy.session.run(None, {name: x.repeat(1000, 0) for name, x in inputs.items()})
    assert together.shape == (1000, 12) and np.abs(together - action).max() <= 1e-5
