"""ppo_distill_teacher_student: hand-computed cases, probe environments, resume, the guards, the command line and the evidence.

Bit for bit on one CPU with the same versions: same seed, resume, and a stage by itself. Statistical or within a tolerance: the rest."""

from __future__ import annotations

import ast
import csv
import dataclasses
import inspect
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import probe_envs
import pytest
import source_lint
import torch
from score_onnx import OnnxPolicy, check_file, randomize, read_names
from torch import nn

import ppo_distill_teacher_student as distill
import ppo_gpu_torch as ppo
import vecsim_torch

TESTS = Path(__file__).parent
SOURCE = Path(distill.__file__).read_text()
FUNCTIONS = source_lint.functions(SOURCE)


class RecallEnv(probe_envs.ProbeEnv):
    """Three steps, each pays -(a - x / 2)^2; x is -1 or 1 and shown in the first only, but privileged always.

    Observation (x or 0, age), privileged observation (x, age): a policy must remember x to know what to do."""

    observation_slices = {"clue": slice(0, 1), "age": slice(1, 2)}
    critic_slices = {"clue": slice(0, 1), "age": slice(1, 2)}

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
        self.sums += torch.stack(
            [(x * ended).sum() for x in (self.episode_return, self.age, ended.float())] + [ended.sum() * 0]
        )
        self.x = torch.where(ended, self.draw(), self.x)
        self.age, self.episode_return = (torch.where(ended, 0.0, x) for x in (self.age, self.episode_return))
        info |= dict(critic_obs=self.privileged())
        return self.observation(), reward, ended, torch.zeros_like(ended), info


class DriftEnv(RecallEnv):
    """The state adds up the actions that were taken and is seen by everybody; a time limit of three steps cuts every episode."""

    observation_slices = critic_slices = {"place": slice(0, 1), "age": slice(1, 2)}

    def observation(self):
        return torch.stack([self.x, self.age], 1)

    def step(self, action):
        obs, reward, ended, _, info = super().step(action)
        self.x = torch.where(ended, self.x, self.x + action[:, 0].detach())
        info["final_obs"] = torch.where(ended[:, None], info["final_obs"], self.observation())
        info["final_critic_obs"], info["critic_obs"] = info["final_obs"], self.privileged()
        return self.observation(), reward, torch.zeros_like(ended), ended, info


class NoiseEnv(RecallEnv):
    """Observations are Gaussian noise, three numbers anew in every step, and nothing is privileged."""

    observation_slices = {"noise": slice(0, 2), "more": slice(2, 3)}
    critic_slices = {}

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
    """Flags under which the probes are solved in seconds."""
    small = dict(
        env_id="recall", num_envs=64, num_steps=6, num_minibatches=2, actor_hidden=(32,), critic_hidden=(32,),
        student_hidden=(32,), student_history=3, student_memory=16, total_timesteps=60_000, student_timesteps=15_000,
        finetune_timesteps=6_000, learning_rate=3e-3, distill_steps=12, gradient_length=6, distill_minibatches=2, gamma=0.9,
        critic_warmup_iterations=3, eval_episodes=8, compile=False, device="cpu", checkpoint_every=10**9, log_every=10**9,
    )  # fmt: skip
    return distill.Args(run_dir=run_dir and str(run_dir), **(small | changes))


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Drawing takes longer than these runs; the fixtures of the module, which come before this one, draw."""
    monkeypatch.setattr(distill, "plot_curve", lambda *arguments: None)


def make_args(**changes):
    return distill.with_task_defaults(small_args(**changes))


def make_agent(args, remembers=True, obs_size=2, actions=2):
    torch.manual_seed(0)
    space = gymnasium.spaces.Box(-2.0, 2.0, (actions,), np.float32)
    agent = distill.Agent(obs_size, obs_size, space, remembers, args)
    with torch.no_grad():  # away from the special point of the initial weights
        for parameter in agent.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return agent


def saved(run_dir, stage):
    return torch.load(Path(run_dir) / stage / "checkpoint.pt", weights_only=True)


def logged(run_dir, stage, name):
    return [json.loads(line)[name] for line in (Path(run_dir) / stage / "metrics.jsonl").open()]


def assert_same(one, other, where="checkpoint"):
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for k, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}[{k}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


def state_of(run_dir, stage):
    """What a stage ends with, without the clocks and the flags."""
    names = ("agent", "moments", "learning_rate", "processes", "env_steps", "teacher", "groups")
    return {name: saved(run_dir, stage)[name] for name in names}


# Copies -------------------------------------------------------------------------------------------------------------------

# What both trainers define under one name and mean differently; everything else must be the same, word for word.
MEANT_TO_DIFFER = set(
    "Args with_task_defaults Sizes derive_sizes Agent Rollout allocate_rollout Batch LossTerms policy_step make_batch ppo_loss "
    "accumulate_gradients apply_gradients update check_resumable check_env_kwargs film train ExportedPolicy play "
    "parse_args".split()
)


def definitions(module):
    own = {name: x for name, x in vars(module).items() if inspect.isfunction(x) or inspect.isclass(x)}
    return {name: x for name, x in own.items() if x.__module__ == module.__name__}


def test_helpers_that_both_trainers_define_are_the_same_word_for_word():
    ours, theirs = definitions(distill), definitions(ppo)
    shared = ours.keys() & theirs.keys()
    assert shared >= MEANT_TO_DIFFER and len(shared - MEANT_TO_DIFFER) >= 30
    for name in shared - MEANT_TO_DIFFER:
        assert inspect.getsource(ours[name]) == inspect.getsource(theirs[name]).replace('"ppo"', '"distill"'), name
    for name in MEANT_TO_DIFFER:
        assert inspect.getsource(ours[name]) != inspect.getsource(theirs[name]), f"{name} needs no exception"
    assert inspect.getsource(distill.Agent.to_env) == inspect.getsource(ppo.Agent.to_env)


# Memory -------------------------------------------------------------------------------------------------------------------


def test_history_by_hand():
    """One environment, observations 1, 2, 3, 4 after 8 and 9; an episode begins at the third."""
    obs = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1)
    fresh = torch.tensor([False, False, True, False]).view(4, 1)
    features, memory = distill.stack_history(obs, torch.tensor([[8.0, 9.0]]), fresh, history=3)
    assert features[:, 0].tolist() == [[8.0, 9.0, 1.0], [9.0, 1.0, 2.0], [0.0, 0.0, 3.0], [0.0, 3.0, 4.0]]
    assert memory.tolist() == [[3.0, 4.0]]


def test_history_of_two_numbers_and_two_environments_by_hand():
    obs = torch.tensor([[[1.0, 10.0], [5.0, 50.0]], [[2.0, 20.0], [6.0, 60.0]]])
    fresh = torch.tensor([[True, False], [False, True]])
    features, memory = distill.stack_history(obs, torch.tensor([[7.0, 70.0], [8.0, 80.0]]), fresh, history=2)
    assert features[:, 0].tolist() == [[0.0, 0.0, 1.0, 10.0], [1.0, 10.0, 2.0, 20.0]]
    assert features[:, 1].tolist() == [[8.0, 80.0, 5.0, 50.0], [0.0, 0.0, 6.0, 60.0]]
    assert memory.tolist() == [[2.0, 20.0], [6.0, 60.0]]


def test_without_history_nothing_is_remembered():
    obs = torch.randn(4, 3, 2)
    features, memory = distill.stack_history(obs, torch.zeros(3, 0), torch.zeros(4, 3, dtype=torch.bool), history=1)
    assert torch.equal(features, obs) and memory.shape == (3, 0)


def test_gru_by_hand():
    """All weights 0 but the candidate's input: r = z = 1/2, so h' = tanh(x) / 2 + h / 2, and h = 0 where an episode begins."""
    cell = nn.GRUCell(1, 1)
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.zero_()
        cell.weight_ih[2] = 1.0
    obs, fresh = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1), torch.tensor([False, True, False]).view(3, 1)
    features, memory = distill.unroll_gru(cell, obs, torch.tensor([[0.8]]), fresh)
    first, second = math.tanh(1.0) / 2 + 0.4, math.tanh(2.0) / 2
    third = math.tanh(3.0) / 2 + second / 2
    torch.testing.assert_close(features[:, 0], torch.tensor([[1.0, first], [2.0, second], [3.0, third]]))
    torch.testing.assert_close(memory, torch.tensor([[third]]))


@pytest.mark.parametrize("network", ["mlp", "gru"])
def test_a_sequence_at_once_equals_its_steps_one_by_one_and_its_slices(network):
    agent = make_agent(make_args(student_network=network))
    generator = torch.Generator().manual_seed(1)
    obs, fresh = torch.randn(9, 5, 2, generator=generator), torch.rand(9, 5, generator=generator) < 0.3
    memory = torch.randn(5, agent.memory_size, generator=generator)
    means, last = agent.policy_mean(obs, memory, fresh)
    for length in (1, 4):
        parts, carried = [], memory
        for x, begins in zip(obs.split(length), fresh.split(length), strict=True):
            mean, carried = agent.policy_mean(x, carried, begins)
            parts.append(mean)
        torch.testing.assert_close(torch.cat(parts), means)
        torch.testing.assert_close(carried, last)
    forgotten = agent.policy_mean(obs, torch.zeros_like(memory), fresh)[0]
    assert not torch.allclose(forgotten, means)  # the memory is read


@pytest.mark.parametrize("network", ["mlp", "gru"])
def test_no_gradient_crosses_a_reset(network):
    agent = make_agent(make_args(student_network=network))
    obs = torch.randn(4, 1, 2, requires_grad=True)
    fresh = torch.tensor([True, False, True, False]).view(4, 1)
    agent.policy_mean(obs, agent.blank(1)[0], fresh)[0][3].sum().backward()
    seen = obs.grad.abs().sum((1, 2)) > 0
    assert seen.tolist() == [False, False, True, True]


def test_rollout_stores_the_memory_it_began_with_and_the_update_sees_the_same_means(tmp_path, monkeypatch):
    """Across iterations and resets: replaying a rollout from its stored memory gives the means with which the policy acted."""
    checked = []
    make_batch = distill.make_batch

    def recording(agent, rollout, value, advantage, order):
        obs = agent.obs_statistics.normalize(rollout.obs)
        mean, _ = agent.policy_mean(obs, rollout.memory, rollout.fresh)
        torch.testing.assert_close(mean, rollout.mean)
        checked.append((rollout.memory.abs().max().item(), rollout.fresh.clone()))
        return make_batch(agent, rollout, value, advantage, order)

    monkeypatch.setattr(distill, "make_batch", recording)
    args = small_args(tmp_path, stages=("baseline",), total_timesteps=3 * 256, num_steps=4, student_network="gru",
                      student_timesteps=1, finetune_timesteps=1)  # fmt: skip
    distill.train(args, RecallEnv)
    memories, fresh = zip(*checked, strict=True)
    assert memories[0] == 0.0 and min(memories[1:]) > 0.0  # it goes on from iteration to iteration
    begins = torch.cat(fresh)[:, 0].tolist()
    assert begins == [t % 3 == 0 for t in range(12)]  # episodes of three steps, across iterations of four


# Imitation ----------------------------------------------------------------------------------------------------------------


def test_imitation_loss_by_hand():
    """Means 0 from a zeroed policy; differences 1, 2 and 3, 0; the second environment is quarantined in the second step."""
    agent = make_agent(make_args(student_history=1))
    with torch.no_grad():
        agent.actor[-1].weight.zero_()
        agent.actor[-1].bias.zero_()
    obs, fresh, memory = torch.randn(2, 2, 2), torch.zeros(2, 2, dtype=torch.bool), torch.zeros(2, 0)
    label = torch.tensor([[[1.0, 2.0], [3.0, 0.0]], [[0.0, 0.0], [9.0, 9.0]]])
    weight = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    loss, terms, _ = distill.imitation_loss(agent, obs, fresh, memory, label, weight)
    assert loss.item() == pytest.approx(((1 + 4) / 2 + 9 / 2 + 0) / 3)
    assert terms.tolist() == pytest.approx([loss.item(), (1.5 + 1.5 + 0) / 3])


def test_slices_follow_one_another_in_time_with_a_detached_memory():
    args = make_args(student_network="gru", distill_steps=4, gradient_length=2, distill_epochs=1, num_envs=4)
    sizes = distill.derive_sizes(args, world_size=1)
    agent = make_agent(args)
    rollout = distill.allocate_rollout(4, 4, 2, agent.memory_size, 2, 2, torch.device("cpu"))
    for k, x in enumerate((rollout.obs, rollout.memory)):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(k)))
    rollout.fresh[2, 1] = True
    calls = []

    def recording(agent, obs, fresh, memory, label, weight):
        assert not memory.requires_grad and memory.grad_fn is None
        loss, terms, after = distill.imitation_loss(agent, obs, fresh, memory, label, weight)
        assert after.requires_grad
        calls.append((obs, fresh, memory, after.detach()))
        return loss, terms, after

    optimizer = distill.make_optimizer(agent, torch.tensor(1e-3))
    before = {name: x.clone() for name, x in agent.named_parameters()}
    order = torch.tensor([2, 0, 3, 1])
    distill.imitate(agent, optimizer, rollout, torch.ones(4, 4, 2), order, sizes, recording, args)
    assert len(calls) == 4  # 2 minibatches x 2 slices
    for k, part in enumerate((order[:2], order[2:])):
        (obs_0, _, memory_0, after_0), (obs_1, fresh_1, memory_1, _) = calls[2 * k], calls[2 * k + 1]
        torch.testing.assert_close(obs_0, rollout.obs[:2, part])  # but for the floor under the deviation
        torch.testing.assert_close(obs_1, rollout.obs[2:, part])
        assert torch.equal(memory_0, rollout.memory[part]) and torch.equal(memory_1, after_0)
        assert torch.equal(fresh_1, rollout.fresh[2:, part])
    moved = {name for name, x in agent.named_parameters() if not torch.equal(x, before[name])}
    assert moved == {name for name in before if name.startswith(("gru", "actor"))}  # neither critic nor noise


def test_the_teacher_labels_without_noise_and_with_frozen_statistics():
    args = make_args()
    teacher = make_agent(args, remembers=False)
    teacher.obs_statistics.update(torch.randn(50, 2), torch.ones(50, dtype=torch.bool))
    before = {name: x.clone() for name, x in teacher.state_dict().items()}
    view = distill.View(True, {"clue": 1, "age": 1}, torch.tensor([2, 0]))
    obs = torch.randn(3, 4, 5)
    label = distill.teacher_actions(teacher, view, obs)
    for t in range(3):
        blank = teacher.blank(4)
        action, _ = teacher.act(obs[t][:, [2, 0]], *blank)
        torch.testing.assert_close(teacher.to_env(label[t]), action)
    assert torch.equal(distill.teacher_actions(teacher, view, obs), label) and not label.requires_grad
    assert_same(before, dict(teacher.state_dict()))


@pytest.fixture(scope="module")
def recall_teacher(tmp_path_factory):
    """A teacher of the recall probe, trained by PPO on its privileged observation."""
    folder = tmp_path_factory.mktemp("teacher")
    distill.train(small_args(folder, stages=("teacher",)), RecallEnv)
    return folder / "teacher" / "checkpoint.pt"


def test_teacher_learns_from_what_it_alone_sees(recall_teacher):
    score = json.loads((recall_teacher.parent / "eval.json").read_text())
    assert score["vecsim"]["mean"] > -0.02 and score["vecsim"]["episodes"] == 64
    assert saved(recall_teacher.parents[1], "teacher")["agent"]["obs_statistics.count"] >= 39_000


@pytest.mark.parametrize("network", ["mlp", "gru"])
def test_student_with_a_memory_learns_what_it_saw_earlier_and_the_loss_falls(network, recall_teacher, tmp_path):
    args = small_args(
        tmp_path, stages=("student",), teacher=str(recall_teacher), student_network=network, log_every=768
    )
    result = distill.train(args, RecallEnv)["student"]
    loss = logged(tmp_path, "student", "imitation_loss")
    assert len(loss) == 20 and loss[-1] < 0.1 * loss[0]
    assert result["action_error"] < 0.03 and result["vecsim"]["mean"] > -0.05
    assert result["action_std"] == pytest.approx(0.1)  # the noise with which it drives


def test_the_student_drives_with_noise_and_its_memory_restarts_after_a_truncation(tmp_path, monkeypatch):
    """States depend on actions here: only who drives himself meets his own states."""
    rollouts, taken = [], []

    class Watched(DriftEnv):
        def step(self, action):
            taken.append(action.clone())
            return super().step(action)

    def watch(agent, optimizer, rollout, *rest):
        rollouts.append([x.clone() for x in (rollout.obs, rollout.fresh, rollout.mean, rollout.action, rollout.truncated)])
        rollouts[-1].append(rollout.final_critic_obs.clone())
        return imitate(agent, optimizer, rollout, *rest)

    imitate = distill.imitate
    monkeypatch.setattr(distill, "imitate", watch)
    flags = small_args(tmp_path, env_id="drift", stages=("teacher", "student"), total_timesteps=4_000, student_timesteps=1_536, finetune_timesteps=1)  # fmt: skip
    distill.train(flags, Watched)
    start = len(taken) - 2 * 12 - 3  # two iterations of the student, then the three steps of its score
    for k, (obs, fresh, mean, action, truncated, final_critic_obs) in enumerate(rollouts):
        sent = torch.stack(taken[start + 12 * k : start + 12 * (k + 1)])
        torch.testing.assert_close(sent, 2.0 * action)  # in half ranges of 2
        noise = action - mean
        assert 0.08 < noise.std() < 0.12 and noise.mean().abs() < 0.02
        assert truncated.any() and torch.equal(fresh[1:], truncated[:-1])
        assert (final_critic_obs[truncated][:, 1] == 3).all()  # the last of the episode, not the first of the next
        moved = obs[1:, :, 0] - obs[:-1, :, 0]
        torch.testing.assert_close(moved[~truncated[:-1]], sent[:-1, :, 0][~truncated[:-1]])


def test_student_without_a_memory_cannot(recall_teacher, tmp_path):
    args = small_args(tmp_path, stages=("student",), teacher=str(recall_teacher), student_history=1)
    result = distill.train(args, RecallEnv)["student"]
    assert result["action_error"] > 0.1 and result["vecsim"]["mean"] < -0.3


def test_a_student_given_the_teachers_own_observation_recovers_the_teacher(tmp_path):
    """A nonlinear teacher of three numbers, actions of deviation about 0.5, on states that the student was not trained on."""
    args = small_args(env_id="noise", stages=("student",), teacher=str(tmp_path / "teacher.pt"), student_history=1,
                      student_hidden=(64, 64), actor_hidden=(16,), run_dir=str(tmp_path / "run"), num_envs=128,
                      student_timesteps=200_000, total_timesteps=900_000, distill_learning_rate=5e-3)  # fmt: skip
    filled = distill.with_task_defaults(args)
    env = NoiseEnv("noise")
    views = distill.make_views(env, filled)
    torch.manual_seed(3)
    teacher = distill.make_agent("teacher", views, env.single_action_space, filled)
    nn.init.normal_(teacher.actor[-1].weight, std=0.3)
    groups = {who: view.groups for who, view in views.items()}
    checkpoint = dict(algorithm="distill", stage="teacher", args=dataclasses.asdict(filled), groups=groups)
    torch.save(checkpoint | dict(agent=teacher.state_dict()), tmp_path / "teacher.pt")
    distill.train(args, NoiseEnv)
    student = distill.make_agent("student", views, env.single_action_space, filled)
    student.load_state_dict(saved(tmp_path / "run", "student")["agent"])
    obs = torch.randn(2_000, 3, generator=torch.Generator().manual_seed(9))
    label = distill.teacher_actions(teacher, views["teacher"], obs[None])[0]
    action, _ = student.act(obs, *student.blank(2_000))
    assert label.std() > 0.2
    assert (student.act(obs, *student.blank(2_000))[0] / 2.0 - label).abs().mean() < 1e-2  # half ranges of 2


# Fine-tuning and the baseline ---------------------------------------------------------------------------------------------


def test_while_the_policy_stands_the_value_function_learns_and_adam_starts_afresh():
    args = make_args(student_network="gru")
    agent, other = make_agent(args), make_agent(args)
    optimizers = [distill.make_optimizer(x, torch.tensor(1e-2)) for x in (agent, other)]
    generator = torch.Generator().manual_seed(0)
    policy = {name for name, _ in agent.named_parameters() if not name.startswith("critic.")}
    before = {name: x.detach().clone() for name, x in agent.named_parameters()}

    def set_gradients(module):
        generator.manual_seed(1)
        for parameter in module.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)

    for _ in range(5):
        set_gradients(agent)
        distill.apply_gradients(agent, optimizers[0], 1.0, args.log_std_min, policy_stands=True)
    moved = {name for name, x in agent.named_parameters() if not torch.equal(x, before[name])}
    assert moved == before.keys() - policy
    for module, optimizer in zip((agent, other), optimizers, strict=True):
        set_gradients(module)
        distill.apply_gradients(module, optimizer, 1.0, args.log_std_min, policy_stands=False)
    fresh = dict(other.named_parameters())
    for name, x in agent.named_parameters():
        if name in policy:
            torch.testing.assert_close(x, fresh[name])
            assert not torch.equal(x, before[name])


def test_finetuning_warms_up_the_inherited_critic_then_moves_the_policy(recall_teacher, tmp_path, capsys):
    student = small_args(
        tmp_path / "student", stages=("student",), teacher=str(recall_teacher), student_timesteps=1_536
    )
    distill.train(student, RecallEnv)
    start, teacher = saved(tmp_path / "student", "student"), torch.load(recall_teacher, weights_only=True)
    for name, value in teacher["agent"].items():
        if name.startswith(("critic", "return")):
            assert torch.equal(start["agent"][name], value), name
    path = str(tmp_path / "student" / "student" / "checkpoint.pt")
    common = dict(stages=("finetune",), student=path, critic_warmup_iterations=4)
    ends = {}
    for name, iterations in (("standing", 4), ("moving", 40)):
        args = small_args(tmp_path / name, **common, finetune_timesteps=iterations * 384)
        ends[name] = distill.train(args, RecallEnv)["finetune"], saved(tmp_path / name, "finetune")["agent"]
        assert ("all of it is warm-up" in capsys.readouterr().out) is (name == "standing")
    result, standing = ends["standing"]
    unlike = {name for name, x in standing.items() if not torch.equal(x, start["agent"][name])}
    assert {name.split(".")[0] for name in unlike} == {
        "critic",
        "critic_obs_statistics",
        "return_statistics",
        "log_std",
    }
    assert standing["log_std"].exp() == pytest.approx(math.exp(-1.6)) and result["learning_rate"] == pytest.approx(3e-3)
    result, moving = ends["moving"]
    assert 1e-5 <= result["learning_rate"] <= 5e-3
    assert not torch.equal(moving["actor.0.weight"], start["agent"]["actor.0.weight"])
    score = json.loads((tmp_path / "student" / "student" / "eval.json").read_text())["vecsim"]["mean"]
    assert score < -0.1 and result["vecsim"]["mean"] > score + 0.05


@pytest.mark.parametrize("network", ["mlp", "gru"])
def test_a_policy_with_memory_learns_by_ppo_alone(network, tmp_path):
    args = small_args(tmp_path, stages=("baseline",), student_network=network, total_timesteps=80_000)
    result = distill.train(args, RecallEnv)["baseline"]
    assert result["vecsim"]["mean"] > -0.05  # without memory -0.5: a = 0 in two of three steps


def test_baseline_has_as_many_steps_as_the_three_others_together():
    sizes = distill.derive_sizes(make_args(total_timesteps=384_000, student_timesteps=76_800), world_size=1)
    steps = {stage: plan.iterations * plan.steps_per_iteration for stage, plan in sizes.plans.items()}
    assert steps["student"] == 76_800 and steps["baseline"] == 384_000
    assert steps["baseline"] == pytest.approx(steps["teacher"] + steps["student"] + steps["finetune"], abs=3 * 768)


# Reproducibility and resume -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """All training stages in one go, of a few iterations each."""
    flags = dict(total_timesteps=7_680, student_timesteps=3_072, finetune_timesteps=2_304, student_network="gru")
    flags |= dict(checkpoint_every=1_536, log_every=768, stages=("teacher", "student", "finetune", "baseline"))
    folder = tmp_path_factory.mktemp("whole") / "run"
    distill.train(small_args(folder, **flags), RecallEnv)
    return folder, flags


# Vector steps: a teacher's or fine-tuning iteration takes 6, a student's 12; the score of a stage takes 3.
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
    distill.train(dataclasses.replace(small_args(None, **flags), resume=str(path)), RecallEnv)
    for name in ("teacher", "student", "finetune", "baseline"):
        assert_same(state_of(whole, name), state_of(tmp_path / "run", name))
        for metric in ("env_steps", "learning_rate", "episode_return"):
            assert logged(whole, name, metric) == logged(tmp_path / "run", name, metric)


def test_a_signal_saves_the_stage_at_hand_and_the_run_resumes_bit_for_bit(whole_run, tmp_path, monkeypatch, capsys):
    """SIGTERM in the middle of the second iteration of the student, of four."""
    whole, flags = whole_run

    class Signalled(RecallEnv):
        steps_taken = 0

        def step(self, action):
            self.steps_taken += 1
            if self.steps_taken == 1 + 6 * 6 + 3 + 12 + 5:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().step(action)

    args = small_args(tmp_path / "run", **flags)
    monkeypatch.setattr(distill, "train", lambda _, stop, train=distill.train: train(args, Signalled, stop=stop))
    status, err = run_main(monkeypatch, capsys)
    monkeypatch.undo()
    path = tmp_path / "run" / "student" / "checkpoint.pt"
    assert status == 143 and f"stopped: {path} is the last checkpoint; --resume continues from it" in err
    assert saved(tmp_path / "run", "student")["iteration"] == 2
    distill.train(dataclasses.replace(args, resume=str(path)), RecallEnv)
    for name in ("student", "finetune"):
        assert_same(state_of(whole, name), state_of(tmp_path / "run", name))


def test_a_stage_by_itself_equals_that_stage_of_a_whole_run(whole_run, tmp_path):
    whole, flags = whole_run
    for stage, start in (("student", dict(teacher="teacher")), ("finetune", dict(student="student")), ("baseline", {})):
        paths = {flag: str(whole / folder / "checkpoint.pt") for flag, folder in start.items()}
        distill.train(small_args(tmp_path / stage, **(flags | dict(stages=(stage,)) | paths)), RecallEnv)
        assert_same(state_of(whole, stage), state_of(tmp_path / stage, stage))


def test_a_finished_stage_goes_on_with_the_next_and_another_seed_is_another_run(whole_run, tmp_path):
    whole, flags = whole_run
    distill.train(small_args(tmp_path, **(flags | dict(stages=("teacher",), seed=2))), RecallEnv)
    assert not torch.equal(
        saved(tmp_path, "teacher")["agent"]["actor.0.weight"], saved(whole, "teacher")["agent"]["actor.0.weight"]
    )
    resume = dict(resume=str(tmp_path / "teacher" / "checkpoint.pt"), stages=("student",), seed=2, run_dir=None)
    distill.train(dataclasses.replace(small_args(tmp_path, **(flags | dict(seed=2))), **resume), RecallEnv)
    assert saved(tmp_path, "student")["env_steps"] == 3_072
    assert_same(saved(tmp_path, "student")["teacher"], saved(tmp_path, "teacher")["agent"])  # inside its checkpoint


def test_profile_times_the_parts_of_each_stage_and_leaves_the_training_as_it_was(tmp_path):
    flags = dict(total_timesteps=14 * 384 + 14 * 768 + 1, student_timesteps=14 * 768, finetune_timesteps=1)
    flags |= dict(stages=("teacher", "student"))
    for name in ("plain", "profiled"):
        distill.train(small_args(tmp_path / name, profile=name == "profiled", **flags), RecallEnv)
    assert_same(state_of(tmp_path / "plain", "student"), state_of(tmp_path / "profiled", "student"))
    for stage, steps in (("teacher", 384), ("student", 768)):
        table = json.loads((tmp_path / "profiled" / stage / "profile.json").read_text())
        assert table["steps"] == steps
        assert list(table["stages"]) == ["infer", "simulate", "targets", "update", "the rest"]
        assert all(part["seconds"] > 0 for part in table["stages"].values())
        assert (tmp_path / "profiled" / stage / "trace.json.gz").stat().st_size > 1000
    assert not list((tmp_path / "plain").glob("*/profile.json"))


def test_profile_counts_from_where_a_stage_resumes():
    args = make_args(profile=True, stages=("finetune",), finetune_timesteps=20 * 384)
    checkpoint = dict(stage="finetune", iteration=6)
    distill.derive_sizes(args, 1, checkpoint=checkpoint)
    with pytest.raises(distill.InputError, match="finetune, of 7,680 steps, has 13 left"):
        distill.derive_sizes(args, 1, checkpoint=checkpoint | dict(iteration=7))


@pytest.fixture(scope="module")
def finetuned(whole_run, tmp_path_factory):
    """Fine-tunings of 6 iterations, 2 of them warm-up, and of 4, all of them warm-up: the paths of their checkpoints."""
    whole, flags = whole_run
    paths = []
    for iterations, warm_up in ((6, 2), (4, 8)):
        folder = tmp_path_factory.mktemp("finetuned")
        changes = dict(stages=("finetune",), finetune_timesteps=iterations * 384, critic_warmup_iterations=warm_up)
        start = dict(student=str(whole / "student" / "checkpoint.pt"))
        distill.train(small_args(folder, **(flags | changes | start)), RecallEnv)
        paths.append(folder / "finetune" / "checkpoint.pt")
    return paths


def resumed_rate(path, tmp_path, iterations=1, **changes):
    """The learning rate after so many further iterations, in which the schedule changes nothing."""
    checkpoint = torch.load(path, weights_only=True)
    single = dict(num_minibatches=1, update_epochs=1, stages=("finetune",), run_dir=str(tmp_path / "resumed"))
    steps = dict(finetune_timesteps=(checkpoint["iteration"] + iterations) * 384)
    args = distill.Args(**(checkpoint["args"] | single | steps | changes | dict(resume=str(path))))
    return distill.train(args, RecallEnv)["finetune"]["learning_rate"]


def test_resume_of_a_moving_policy_takes_its_new_learning_rate_and_keeps_it_moving(finetuned, tmp_path):
    moving, _ = finetuned
    adapted = torch.load(moving, weights_only=True)["learning_rate"]
    assert resumed_rate(moving, tmp_path / "a") == pytest.approx(float(adapted))
    assert resumed_rate(moving, tmp_path / "b", learning_rate=2e-3) == pytest.approx(float(adapted))  # of the teacher
    assert resumed_rate(moving, tmp_path / "c", finetune_learning_rate=2e-4) == pytest.approx(2e-4)
    with pytest.raises(distill.InputError, match="was trained with critic_warmup_iterations = 2, not 30"):
        resumed_rate(moving, tmp_path / "d", critic_warmup_iterations=30)


@pytest.mark.parametrize("warm_up, rate", [(2, 1e-4), (4, 1e-4), (6, 3e-3)])
def test_resume_during_the_warm_up_may_change_its_length(warm_up, rate, finetuned, tmp_path):
    _, standing = finetuned
    assert resumed_rate(standing, tmp_path, critic_warmup_iterations=warm_up) == pytest.approx(rate)


def test_run_folder_has_the_names_that_machines_read(whole_run):
    folder, _ = whole_run
    assert {path.name for path in folder.iterdir()} == {"config.json", "teacher", "student", "finetune", "baseline"}
    for stage in ("teacher", "student", "finetune", "baseline"):
        names = {path.name for path in (folder / stage).iterdir()}
        assert {"config.json", "metrics.jsonl", "checkpoint.pt", "eval.json", "curve.png"} <= names
        line = json.loads((folder / stage / "metrics.jsonl").read_text().splitlines()[-1])
        assert {
            "env_steps",
            "wall_seconds",
            "steps_per_second",
            "episode_return",
            "episode_length",
            "episodes",
        } <= line.keys()
        evaluation = json.loads((folder / stage / "eval.json").read_text())
        expected = "env_id algorithm seed env_steps train_seconds compile_seconds vecsim gymnasium stage outcomes"
        assert evaluation.keys() == set(expected.split()) and evaluation["stage"] == stage
        assert evaluation["vecsim"].keys() == {"mean", "std", "min", "episodes", "mean_length"}


# Compiled, on several processes -------------------------------------------------------------------------------------------


def test_compiled_and_eager_losses_agree():
    args = make_args(student_network="gru")
    agent, generator = make_agent(args), torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(3, 4, *shape, generator=generator)

    fresh, memory = normal() > 0.5, normal(agent.memory_size)[0]
    batch = distill.Batch(
        normal(2), fresh, memory[None], normal(2), *(normal(2) for _ in range(2)), *(normal() for _ in range(4))
    )
    old_log_std = agent.log_std.detach()
    losses = {
        "ppo": lambda f: f(agent, batch, old_log_std, 12, args),
        "imitation": lambda f: f(agent, batch.obs, fresh, memory, batch.action, batch.weight.abs()),
    }
    for name, call in losses.items():
        function = getattr(distill, f"{name}_loss")
        answers = []
        for f in (function, torch.compile(function, dynamic=False)):
            agent.zero_grad()
            loss, terms, *_ = call(f)
            loss.backward()
            gradients = [x.grad for x in agent.parameters() if x.grad is not None]
            answers.append((loss.detach(), terms, *gradients))
        torch.testing.assert_close(answers[0], answers[1], rtol=1e-4, atol=1e-5)


def test_two_processes_train_one_run_of_all_stages(tmp_path):
    """Run by torchrun over Gloo: one writer, own robots and noise for each process, the same weights in both."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(TESTS / "two_processes_distill.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"agents-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first.keys() == {"teacher", "student", "finetune"}
    assert_same(first, second)  # bit for bit, or they would drift apart
    for stage in first:
        assert len((tmp_path / "run" / stage / "metrics.jsonl").read_text().splitlines()) == 2  # one writer
        one, other = saved(tmp_path / "run", stage)["processes"]
        assert not torch.equal(one["env"]["x"], other["env"]["x"]) and not torch.equal(
            one["generator"], other["generator"]
        )
        assert_same(saved(tmp_path / "run", stage)["agent"], first[stage])


# Guards -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "then, now, message",
    [
        (
            {"a": 3, "b": 2},
            {"a": 3},
            "the teacher sees the group b, 2 numbers, which task does not give it here; it gives a",
        ),
        (
            {"a": 3},
            {"a": 3, "b": 2},
            "the teacher does not see the group b, 2 numbers, which task gives it here; it sees a",
        ),
        ({"a": 3, "b": 2}, {"a": 3, "b": 4}, "the teacher sees 2 numbers of the group b; task has 4 here"),
        ({"a": 3, "b": 2}, {"b": 2, "a": 3}, "the teacher sees its groups in the order a, b, not b, a"),
    ],
)
def test_the_wrong_observation_group_is_named(then, now, message):
    with pytest.raises(distill.InputError) as error:
        distill.check_groups("the teacher", then, now, "task")
    assert str(error.value) == message
    distill.check_groups("the teacher", then, then, "task")


def test_views_choose_named_groups_in_the_order_given():
    args = make_args(env_id="noise", student_groups=("more",), teacher_groups=("more", "noise"))
    views = distill.make_views(NoiseEnv("noise"), args)
    obs = torch.tensor([[1.0, 2.0, 3.0]])
    assert views["student"].of(obs, -obs).tolist() == [[3.0]] and views["student"].groups == {"more": 1}
    assert views["teacher"].of(obs, -obs).tolist() == [[-3.0, -1.0, -2.0]] and views["critic"].groups == {
        "noise": 2,
        "more": 1,
    }
    for groups, message in (
        (("heights",), "student_groups: heights is no group; the student of noise can see noise, more"),
        ((), "student_groups: at least one, and each once"),
        (("more", "more"), "student_groups: at least one, and each once"),
    ):
        with pytest.raises(distill.InputError, match=message):
            distill.make_views(NoiseEnv("noise"), dataclasses.replace(args, student_groups=groups))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(env_id="noise"), "the teacher, policy, sees the group clue, 1 numbers, which noise does not give it here"),
        (dict(teacher_groups=("age",)), "the teacher, policy, sees the group clue, 1 numbers, which recall does not give"),
        (dict(actor_hidden=(8,)), r"the teacher was trained with actor_hidden = \(32,\), not \(8,\); give --actor-hidden as it"),
        (dict(critic_hidden=(8,)), "the teacher was trained with critic_hidden"),
        (dict(stages=("finetune",)), "the stage finetune starts from a student: add it to --stages, or give --student PATH"),
        (dict(stages=("teacher",)), "--teacher stands for the stage teacher, which --stages asks for"),
        (dict(student="teacher"), "is the checkpoint of a teacher, not of a student"),
    ],
)  # fmt: skip
def test_a_teacher_that_does_not_fit_is_refused_before_training(changes, message, recall_teacher, tmp_path):
    changes = changes | (dict(student=str(recall_teacher), stages=("finetune",)) if "student" in changes else {})
    args = small_args(tmp_path, **(dict(stages=("student",), teacher=str(recall_teacher)) | changes))
    with pytest.raises(distill.InputError, match=message):
        distill.train(args, NoiseEnv if args.env_id == "noise" else RecallEnv)
    assert not any(tmp_path.iterdir())


def test_a_student_of_another_network_is_refused(whole_run, tmp_path):
    whole, flags = whole_run
    changes = dict(stages=("finetune",), student=str(whole / "student" / "checkpoint.pt"))
    changes |= dict(student_network="mlp")
    with pytest.raises(distill.InputError, match="the student was trained with student_network = gru, not mlp; give"):
        distill.train(small_args(tmp_path, **(flags | changes)), RecallEnv)


# Flags --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(num_minibatches=3),
            "num_minibatches = 3 does not divide num_envs = 64; use 2 or 4",
        ),
        (dict(gradient_length=5), "gradient_length = 5 does not divide distill_steps = 12; use 4 or 6"),
        (dict(num_envs=10**14, num_minibatches=7), "does not divide num_envs = 100,000,000,000,000; use 5 or 8"),
        (
            dict(total_timesteps=20_000),
            "total_timesteps = 20000 must be > student_timesteps + finetune_timesteps = 21,000",
        ),
        (dict(distill_noise=0.0), "distill_noise = 0.0 must be > 0 and finite"),
        (dict(finetune_log_std=-9.0), "finetune_log_std = -9.0 must be finite and >= log_std_min"),
        (dict(finetune_learning_rate=1.0), "finetune_learning_rate = 1.0 must be between learning_rate_min"),
        (dict(stages=()), "stages = () must be one stage or more"),
        (dict(evidence_perturbations=("wind",)), "must be some of: nominal, observation_noise"),
        (dict(student_history=0), "student_history = 0 must be >= 1"),
        (dict(gamma=math.nan), "gamma = nan must be between 0 and 1"),
        (
            dict(profile=True, finetune_timesteps=4_000),
            "profile needs 14 iterations of each stage; finetune, of 4,000 steps, has 11",
        ),
    ],
)
def test_illegal_flags_name_the_rule_and_legal_values(changes, message):
    with pytest.raises(distill.InputError) as error:
        distill.derive_sizes(make_args(**changes), world_size=1)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_task_defaults_yield_to_flags_and_fill_everything_else():
    for task in distill.TASK_DEFAULTS:
        args = distill.with_task_defaults(distill.Args(env_id=task, device="cpu"))
        distill.derive_sizes(args, world_size=1)
        left = {field.name for field in dataclasses.fields(args) if getattr(args, field.name) is None}
        assert left == {"teacher", "student", "resume", "play", "export", "teacher_groups", "student_groups"}
        assert args.env_kwargs == {"randomize": True}
        assert distill.with_task_defaults(distill.Args(env_id=task, device="cpu", num_envs=8)).num_envs == 8
    assert all(set(row) <= set(distill.COMMON) for row in distill.TASK_DEFAULTS.values())


def run_main(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["ppo_distill_teacher_student.py", *map(str, arguments)])
    status = distill.main()
    return status, capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--stages", "pupil"], "pupil"),
        (["--gamma", "2"], "gamma = 2.0 must be between 0 and 1"),
        (["--resume", "nowhere.pt"], "checkpoint nowhere.pt does not exist"),
        (["--seed", "1" * 23], "seed = 11111111111111111111111 must be between 0 and 2**63 - 1"),
        (["--evidence-seeds", "1" * 23, "--device", "cpu"], "must be one seed or more, between 0 and 2**63 - 1"),
        (["--teacher", ""], "--teacher is empty: give a path or omit it"),
        (["--resume", "a.pt", "--play", "b.pt"], "give one of them"),
        (["--capture-video"], "--capture-video draws a checkpoint: give --play"),
        (["--stages", "student", "--teacher", "nowhere.pt", "--device", "cpu"], "checkpoint nowhere.pt does not exist"),
        (["--stages", "evidence", "--device", "cpu"], "the stage evidence has no policy to look at"),
        (
            ["--env-kwargs", "iterations", "8", "--device", "cpu"],
            "which this script sets itself; use --solver-iterations",
        ),
        (["--env-id", "Nothing-v0", "--device", "cpu"], "unknown task 'Nothing-v0'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    status, err = run_main(monkeypatch, capsys, *arguments)
    assert status == 2 and message in err and err.count("\n") == 1, err
    assert not any(tmp_path.iterdir())


def test_a_perturbation_that_the_task_cannot_have_is_refused_before_the_training():
    args = distill.with_task_defaults(distill.Args(env_id="InvertedPendulum-v5", device="cpu", evidence_perturbations=("shove",)))
    with pytest.raises(distill.InputError, match="evidence, perturbation shove: .*friction_scale"):
        distill.check_evidence(args, vecsim_torch.make, torch.device("cpu"), panel={"shove": {"friction_scale": -1.0}})


def test_a_film_that_the_task_cannot_have_is_refused_before_the_training():
    args = distill.with_task_defaults(distill.Args(device="cpu", env_kwargs={"terrain_rows": 2}, evidence_perturbations=("nominal",)))
    with pytest.raises(distill.InputError, match="evidence, film: terrain_level must be under terrain_rows = 2"):
        distill.check_evidence(args, vecsim_torch.make, torch.device("cpu"))


def test_the_evidence_is_taken_under_its_perturbation_without_randomisation():
    made = []

    def make(env_id, **options):
        made.append(options)
        return RecallEnv(env_id, options["num_envs"])

    args = make_args(evidence_perturbations=("nominal", "pushes"), env_kwargs={"randomize": True, "perturb.push": 1.0, "gait": 2})
    distill.gather_evidence({}, args, make, torch.device("cpu"), task_options={"recall": {"curriculum": False}})
    assert [options["perturb"] for options in made] == [{}, {"push": 1.5, "push_interval": 3.0}]
    assert all(options["gait"] == 2 and options["curriculum"] is False and options["num_envs"] == 8 for options in made)
    assert not any(name.split(".")[0] == "randomize" or name.startswith("perturb.") for options in made for name in options)


def test_differences_between_policies_are_paired_by_seed():
    """Of 0.1, 0.2 and 0.3: mean 0.2, standard error 0.1 / sqrt(3), and t = 4.303 with two degrees of freedom."""
    values = dict(student=(0.5, 0.2, 0.9), teacher=(0.4, 0.0, 0.6))
    rows = [dict(policy=policy, perturbation="nominal", seed=seed, tracking=x)
            for policy, own in values.items() for seed, x in zip((3, 7, 11), own, strict=True)]  # fmt: skip
    found = distill.paired_difference(rows, "student", "teacher", "nominal", "tracking")
    assert found == pytest.approx(dict(mean=0.2, low=0.2 - 0.2484, high=0.2 + 0.2484), abs=1e-4)
    assert distill.paired_difference(rows[::3], "student", "teacher", "nominal", "tracking") is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--student-timesteps", "20480", "--total-timesteps", "40000", "--num-envs", "128"],
            "was trained with num_envs = 64, not 128; leave that flag away",
        ),
        (
            ["--student-timesteps", "6144", "--total-timesteps", "20000", "--distill-noise", "0.3"],
            "was trained with distill_noise = 0.1, not 0.3",
        ),
        (
            ["--stages", "teacher", "student"],
            "steps of the stage student already and --stages teacher student names none",
        ),
        (["--stages", "finetune"], "holds a run already; choose another, or --resume a checkpoint.pt in it"),
    ],
)
def test_resume_refuses_what_does_not_fit(arguments, message, whole_run, monkeypatch, capsys):
    folder, _ = whole_run
    status, err = run_main(monkeypatch, capsys, "--resume", folder / "student" / "checkpoint.pt", *arguments)
    assert status == 2 and message in err and err.count("\n") == 1, err


def test_a_finished_stage_ties_the_next_to_nothing_but_its_groups_and_networks(whole_run, tmp_path):
    """Evidence and later stages need no environments of the same number, nor the device of the checkpoint's generators."""
    folder, flags = whole_run
    args = small_args(tmp_path / "more", **(flags | dict(stages=("student",), num_envs=32)))
    args = dataclasses.replace(args, teacher=str(folder / "teacher" / "checkpoint.pt"))
    assert distill.train(args, RecallEnv)["student"]["vecsim"]["episodes"] == 32


def test_a_run_never_writes_over_another(whole_run):
    folder, flags = whole_run
    before = (folder / "teacher" / "metrics.jsonl").read_bytes()
    with pytest.raises(distill.InputError, match="holds a run already"):
        distill.train(small_args(folder, **flags), RecallEnv)
    assert (folder / "teacher" / "metrics.jsonl").read_bytes() == before


# Scores and evidence ------------------------------------------------------------------------------------------------------


def test_first_episodes_of_a_probe_by_hand():
    args, env = make_args(), RecallEnv("recall", num_envs=8)
    agent = make_agent(args, remembers=True, actions=1)
    with torch.no_grad():
        agent.actor[-1].weight.zero_()
        agent.actor[-1].bias.zero_()  # a = 0 pays -1/4 in each of three steps
    view = distill.make_views(env, args)["student"]
    outcomes = distill.first_episode_outcomes(agent, view, env, seed=1)
    assert outcomes.keys() == {"episode_return", "length", "fell", "failed"}
    assert outcomes["episode_return"].tolist() == [-0.75] * 8 and outcomes["length"].tolist() == [3.0] * 8
    result = distill.score(outcomes, levels=None)
    assert result["success"] == 0.0 and result["falls"] == 1.0 and result["velocity_error"] is None


def test_score_by_hand():
    """Six robots on three levels: one falls, one strays by 0.6 m/s, one is quarantined."""
    outcomes = dict(
        fell=[0, 0, 1, 0, 0, 0], failed=[0, 0, 0, 0, 0, 1], velocity_error=[0.1, 0.2, 0.3, 0.6, 0.3, 9.0],
        yaw_error=[0.1] * 6, tracking=[0.9, 0.9, 0.2, 0.4, 0.6, 0.0], terrain_level=[0, 0, 1, 1, 2, 2],
        episode_return=[1.0, 2.0, 3.0, 4.0, 5.0, 9.0], length=[10.0, 10.0, 5.0, 10.0, 10.0, 1.0],
    )  # fmt: skip
    result = distill.score({name: np.array(x, dtype=float) for name, x in outcomes.items()}, levels=4)
    assert result["success"] == pytest.approx(3 / 6) and result["falls"] == pytest.approx(2 / 6)
    assert result["velocity_error"] == pytest.approx(0.3) and result["tracking"] == pytest.approx(0.5)
    assert result["by_level"] == [[2, 2], [2, 0], [2, 1], [0, 0]]
    assert (result["episodes"], result["quarantined"]) == (6, 1)


@pytest.mark.parametrize(
    "seeds, mastered",
    [
        ([[[2, 2], [2, 1], [2, 0]]], 2),  # half of them is enough
        ([[[2, 2], [2, 0], [2, 2]]], 1),  # what lies above a level that is not mastered does not count
        ([[[2, 2], [1, 0], [1, 1]], [[1, 0], [2, 2], [1, 1]]], 3),  # the seeds together, though each fails somewhere
        ([[[0, 0], [2, 2]]], 0),  # nobody was put on the lowest
    ],
)
def test_levels_mastered_by_hand(seeds, mastered):
    assert distill.levels_mastered(seeds) == mastered


def test_all_stages_on_the_quadruped_with_evidence(tmp_path, monkeypatch, capsys):
    flags = "--env-id Quadruped-Flat --device cpu --no-compile --num-envs 8 --num-steps 4 --num-minibatches 2 --distill-steps 6"
    flags += " --gradient-length 3 --distill-minibatches 1 --total-timesteps 176 --student-timesteps 48 --finetune-timesteps 64"
    flags += (
        " --actor-hidden 16 --critic-hidden 16 --student-hidden 16 --student-history 2 --critic-warmup-iterations 1"
    )
    flags += " --eval-episodes 3 --evidence-seeds 3 7 --evidence-perturbations nominal pushes --env-kwargs max_episode_steps 12"
    status, err = run_main(monkeypatch, capsys, *flags.split(), "--run-dir", tmp_path)
    assert status == 0, err
    evidence = json.loads((tmp_path / "evidence.json").read_text())
    policies = ["teacher", "student", "finetune", "baseline"]
    assert list(evidence["summary"]) == policies and evidence["args"]["env_kwargs"]["randomize"] is True
    assert evidence["perturbations"]["pushes"] == {"push": 1.5, "push_interval": 3.0}
    for policy in policies:
        for name in ("nominal", "pushes"):
            cell = evidence["summary"][policy][name]
            rows = [row for row in evidence["rows"] if (row["policy"], row["perturbation"]) == (policy, name)]
            assert [row["seed"] for row in rows] == [3, 7] and {row["episodes"] for row in rows} == {3}
            assert cell["velocity_error"] == pytest.approx(sum(row["velocity_error"] for row in rows) / 2)
            teacher = evidence["summary"]["teacher"][name]["tracking"]
            assert cell["tracking_of_teacher"] == pytest.approx(cell["tracking"] / teacher)
            assert cell["levels_mastered"] is None and cell["quarantined"] == 0
            others = [other for other in policies if other != policy]
            assert list(cell["tracking_beyond"]) == list(cell["falls_beyond"]) == others
    rows = list(csv.DictReader((tmp_path / "evidence.csv").open()))
    assert (
        len(rows) == 16 and {"policy", "perturbation", "seed", "success", "velocity_error", "falls"} <= rows[0].keys()
    )
    assert (tmp_path / "evidence.png").stat().st_size > 10_000
    groups = saved(tmp_path, "student")["groups"]
    assert groups["student"].keys().isdisjoint({"velocity", "heights"}) and "velocity" in groups["teacher"]
    assert evidence["policies"]["baseline"]["env_steps"] >= 176
    play = ["--play", tmp_path / "student" / "checkpoint.pt", "--eval-episodes", "2"]
    assert run_main(monkeypatch, capsys, *play)[0] == 0


# Export -------------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")  # a number frozen, which may be the number of rows
@pytest.mark.parametrize(
    "stage, flags, memory_size",
    [
        ("student", dict(student_history=3), 2 * 45),
        ("finetune", dict(student_network="gru", student_groups=("joint_position", "gravity", "command")), 16),
        ("student", dict(student_history=1), 0),
        ("teacher", {}, 0),
    ],
)
def test_exported_policy_acts_like_the_trained_one(stage, flags, memory_size, tmp_path, monkeypatch, capsys):
    """In one step, and with its memory over an episode of the robot in MuJoCo."""
    small = dict(actor_hidden=(32,), student_hidden=(32,), critic_hidden=(32,), student_memory=16)
    args = distill.with_task_defaults(distill.Args(env_id="Quadruped-Flat", device="cpu", **small, **flags))
    env = vecsim_torch.make(args.env_id, num_envs=1, **args.env_kwargs)
    views = distill.make_views(env, args)
    torch.manual_seed(0)
    agent = distill.make_agent(stage, views, env.single_action_space, args)
    randomize(agent)
    state = dict(algorithm="distill", stage=stage, env_id=args.env_id, args=dataclasses.asdict(args), env_steps=640)
    state |= dict(agent=agent.state_dict(), versions=distill.versions())
    torch.save(state | dict(groups={who: view.groups for who, view in views.items()}), tmp_path / "checkpoint.pt")
    play = ["--play", tmp_path / "checkpoint.pt", "--export", tmp_path / "policy.onnx", "--eval-episodes", "0"]
    assert run_main(monkeypatch, capsys, *play) == (0, "")

    policy = OnnxPolicy(tmp_path / "policy.onnx")
    observed, actions, control_step = read_names(policy, "ppo_distill_teacher_student.py", env_steps=640)
    assert control_step == pytest.approx(0.02) and policy.metadata["stage"] == stage
    assert actions == [f"{leg}_{part}" for leg in ("FR", "FL", "RR", "RL") for part in ("hip", "thigh", "calf")]
    assert [f"joint_position/{name}" for name in actions] == [x for x in observed if x.startswith("joint_position")]
    assert "gravity[2]" in observed and ("mass[0]" in observed) == (stage == "teacher")
    home = torch.tensor([0.0, 0.9, -1.8] * 4)  # rad; an action is an offset in units of 0.5 rad, and joints have ranges
    low, high = (torch.tensor(ends * 4) for ends in ([-0.863, -0.686, -2.818], [0.863, 4.501, -0.888]))
    limits = (low - home) / 0.5, (high - home) / 0.5
    if not memory_size:
        assert "memory" not in policy.metadata
        check_file(policy, lambda obs: agent.act(obs, *agent.blank(len(obs)))[0], agent.obs_statistics, limits)
        return
    assert [x.shape for x in policy.session.get_outputs()] == [["batch", 12], ["batch", memory_size]]
    assert "zero where an episode begins" in policy.metadata["memory"]
    robot = gymnasium.make("Quadruped-Flat")
    obs, _ = robot.reset(seed=3)
    memory, fresh = agent.blank(1)
    onnx_memory = np.zeros((1, memory_size), np.float32)
    for _ in range(20):
        seen = views["student"].of(torch.as_tensor(obs)[None], None)
        wanted, memory = agent.act(seen, memory, fresh)
        inputs = {"obs": seen.numpy(), "memory_in": onnx_memory}
        action, onnx_memory = policy.session.run(["action", "memory_out"], inputs)
        assert np.abs(action - wanted.clamp(*limits).numpy()).max() <= 1e-5
        assert np.abs(onnx_memory - memory.numpy()).max() <= 1e-5
        fresh = torch.zeros(1, dtype=torch.bool)
        obs, _, fell, _, _ = robot.step(action[0])
        obs, fresh = (robot.reset()[0], ~fresh) if fell else (obs, fresh)
        onnx_memory *= not fell
    together, _ = policy.session.run(None, {name: x.repeat(1000, 0) for name, x in inputs.items()})
    assert together.shape == (1000, 12) and np.abs(together - action).max() <= 1e-5


# The source itself --------------------------------------------------------------------------------------------------------


def test_every_flag_is_read():
    read = {node.attr for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and isinstance(node.value, ast.Name) and node.value.id == "args"}  # fmt: skip
    assert {field.name for field in dataclasses.fields(distill.Args)} <= read


def test_every_flag_has_one_help_line():
    body = next(n for n in ast.walk(ast.parse(SOURCE)) if isinstance(n, ast.ClassDef) and n.name == "Args").body
    for flag, text in zip(body[1::2], body[2::2], strict=True):
        assert isinstance(flag, ast.AnnAssign) and isinstance(text, ast.Expr) and "\n" not in text.value.value, (
            flag.target.id
        )


def test_no_function_reads_a_module_variable():
    variables = {"COMMON", "TASK_DEFAULTS", "PERTURBATIONS", "EVIDENCE_OPTIONS", "FILM_OPTIONS", "FORWARD"}
    for function in FUNCTIONS.values():
        used = {node.id for statement in function.body for node in ast.walk(statement) if isinstance(node, ast.Name)}
        assert not used & variables, function.name


ON_DEVICE = (
    "policy_step stack_history unroll_gru gaussian_log_prob gaussian_kl advantages_gae values_and_advantages make_batch ppo_loss "
    "accumulate_gradients apply_gradients update imitation_loss imitate teacher_actions adapted_learning_rate weighted_moments "
    "Agent.policy_mean Agent.normalized_value Agent.act View.of privileged_observation train_stage first_episode_outcomes"
)


@pytest.mark.parametrize("name", ON_DEVICE.split())
def test_no_host_read_without_its_comment(name):
    assert not source_lint.unmarked_host_reads(FUNCTIONS[name], SOURCE)


def test_the_loop_of_a_stage_reads_the_host_only_when_it_logs():
    loops = [node for node in ast.walk(FUNCTIONS["train_stage"]) if isinstance(node, ast.For)]
    loop = next(node for node in loops if ast.unparse(node.target) == "iteration")
    gate = next(
        i for i, node in enumerate(loop.body) if isinstance(node, ast.If) and "log_now" in ast.unparse(node.test)
    )
    assert not any(source_lint.host_reads(node) for node in loop.body[:gate])
