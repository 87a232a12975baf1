"""dqn_gpu_torch: its pure functions by hand, a chain whose values dynamic programming knows, and whole runs.

test_trainers.py tests what all trainers do alike, and test_sac_algorithms.py the replay, which is SAC's."""

from __future__ import annotations

import dataclasses
import math

import gymnasium
import numpy as np
import pytest
import torch
from probe_envs import OF_ALGORITHM, ProbeEnv
from probe_envs import dqn_args as probe_args
from score_onnx import OnnxPolicy, check_file, read_names, save_agent
from test_ppo import assert_same, log_of, read_checkpoint, run_main
from test_sac_algorithms import WINDOWS, Story

import dqn_gpu_torch as dqn
import vecsim_torch as vecsim

algorithms = pytest.mark.parametrize("algorithm", OF_ALGORITHM)


def make_agent(args, obs_size=3, actions=2):
    torch.manual_seed(0)
    return dqn.Agent(obs_size, gymnasium.spaces.Box(-1.0, 1.0, (actions,), np.float32), args)


def constant_agent(args, online, target=None):
    """An agent whose heads (actions, bins) say the same in every state."""
    agent = make_agent(args, actions=len(online))
    with torch.no_grad():
        for network, values in ((agent.network, online), (agent.target_network, target)):
            if network is not None:
                network[-1].weight.zero_()
                network[-1].bias.copy_(torch.tensor(values).flatten())
    return agent


# Actions and exploration ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bins, values", [(2, [-1.0, 3.0]), (3, [-1.0, 1.0, 3.0]), (5, [-1.0, 0.0, 1.0, 2.0, 3.0])])
def test_bins_span_the_range_of_an_actuator(bins, values):
    args = probe_args(None, bins=bins)
    agent = dqn.Agent(3, gymnasium.spaces.Box(-1.0, 3.0, (1,), np.float32), args)
    assert agent.to_env(torch.arange(bins)[:, None]).squeeze(1).tolist() == values


def test_each_head_chooses_alone_and_the_value_is_their_mean():
    """The best joint action of 3 actuators with 2 bins, out of all 8, is each head's best bin."""
    heads = [[1.0, 4.0], [0.5, -2.0], [0.0, 0.25]]
    agent = constant_agent(probe_args(None, bins=2, algorithm="pqn"), heads)
    joint = torch.cartesian_prod(*[torch.arange(2)] * 3)
    values = dqn.action_value(torch.tensor(heads).expand(8, 3, 2), joint)
    by_hand = [(heads[0][i] + heads[1][j] + heads[2][k]) / 3 for i, j, k in joint.tolist()]
    assert values.tolist() == pytest.approx(by_hand)
    best = joint[values.argmax()]
    assert best.tolist() == [1, 0, 1] and torch.equal(agent.act(torch.zeros(4, 3))[0], 2.0 * best - 1.0)
    assert dqn.bootstrap_value(agent, torch.zeros(4, 3), True).tolist() == pytest.approx([max(by_hand)] * 4)


def test_an_actuator_acts_at_random_below_the_rate_of_its_environment():
    agent = constant_agent(probe_args(None, bins=3), [[0.0, 0.0, 1.0]] * 2, [[0.0] * 3] * 2)
    epsilon, uniform = torch.tensor([[0.0], [0.5], [1.0]]), torch.tensor([[0.0, 0.6], [0.4, 0.6], [0.4, 0.99]])
    action, env_action = dqn.policy_step(agent, torch.zeros(3, 3), epsilon, uniform, torch.zeros(3, 2).long())
    assert action.tolist() == [[2, 2], [0, 2], [0, 0]]
    assert env_action.tolist() == [[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0]]


def test_exploration_rates_are_spread_evenly_in_their_logarithm():
    assert dqn.exploration_rates(0.01, 1.0, 3).squeeze(1).tolist() == pytest.approx([0.01, 0.1, 1.0])
    assert dqn.exploration_rates(0.1, 0.1, 1).tolist() == [[pytest.approx(0.1)]]


def test_exploration_starts_uniform_and_decays_to_its_rates(tmp_path, monkeypatch):
    """640 steps at random, then 20% of 3,200 steps down to 0.1."""
    given, policy_step = [], dqn.policy_step

    def recording(agent, obs, epsilon, *rest):
        given.append(epsilon.squeeze(1).tolist())
        return policy_step(agent, obs, epsilon, *rest)

    monkeypatch.setattr(dqn, "policy_step", recording)
    changes = dict(epsilon=(0.1, 0.1), epsilon_decay=0.2, total_timesteps=3_200, log_every=64, eval_episodes=0)
    dqn.train(probe_args(tmp_path, **changes), ProbeEnv)
    rates = [row[0] for row in given[1:]]  # the first call compiles
    assert all(len(set(row)) == 1 for row in given)
    assert rates == pytest.approx([1.0] * 10 + [1.0 - 0.09 * k for k in range(10)] + [0.1] * 30)
    assert [line["epsilon"] for line in log_of(tmp_path)] == pytest.approx(rates)


# Targets --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", WINDOWS, ids=lambda case: case[0])
def test_the_target_of_n_steps_by_hand(case):
    """SAC's truth table of running, terminated, truncated and both, through dqn's batch: rewards 1, 2, 4, gamma 1/2.

    The bootstrap is 8, and the normaliser and the scale of rewards are off."""
    _, terminated, truncated, invalid, total, discount, _ = case
    flags = dict(normalize_observations=False, normalize_rewards=False)
    args = probe_args(None, n_step=3, gamma=0.5, num_envs=1, replay_capacity=3, learning_starts=1, **flags)
    agent = make_agent(args)
    replay = dqn.allocate_replay(agent, dqn.derive_sizes(args, 1))
    for t in range(3):
        row = [torch.tensor([x[t]], dtype=torch.bool) for x in (terminated, truncated, invalid)]
        final_obs = torch.full((1, 3), math.nan if invalid[t] else t + 1.0)
        reward = torch.tensor([math.nan if invalid[t] else 2.0**t])
        dqn.store(replay, t, dqn.Transitions(torch.full((1, 3), float(t)), final_obs, torch.ones(1, 2), reward, *row))
    seen = []
    value_of = lambda rows: (seen.append(rows), torch.full((1,), 8.0))[1]  # noqa: E731
    batch = dqn.replay_batch(agent, replay, torch.tensor([0]), torch.tensor([0]), value_of, args)
    assert batch.target.item() == total + discount * 8.0 and batch.weight.item() == 1.0
    assert seen[0][0, 0] == case[-1] + 1  # where the last step used led to, not what the next slot holds
    assert batch.obs[0, 0] == 0.0 and batch.action.tolist() == [[1, 1]]


# gamma 1/2, lambda 1/2, rewards 1, 2, 4 and next values 8, 16, 32. Name, terminated, truncated, invalid, targets:
# the last step without an end gives 4 + 32 / 2 = 20; before it 2 + (16 + 20) / 4 = 11; before that 1 + (8 + 11) / 4.
ROLLOUTS = [
    ("running", [0, 0, 0], [0, 0, 0], [0, 0, 0], [5.75, 11.0, 20.0]),
    ("terminated at once", [1, 0, 0], [0, 0, 0], [0, 0, 0], [1.0, 11.0, 20.0]),
    ("terminated in the middle", [0, 1, 0], [0, 0, 0], [0, 0, 0], [3.5, 2.0, 20.0]),
    ("terminated at the last step", [0, 0, 1], [0, 0, 0], [0, 0, 0], [4.75, 7.0, 4.0]),
    ("truncated at once", [0, 0, 0], [1, 0, 0], [0, 0, 0], [5.0, 11.0, 20.0]),
    ("truncated in the middle", [0, 0, 0], [0, 1, 0], [0, 0, 0], [5.5, 10.0, 20.0]),
    ("truncated at the last step", [0, 0, 0], [0, 0, 1], [0, 0, 0], [5.75, 11.0, 20.0]),
    ("both in the middle: terminated wins", [0, 1, 0], [0, 1, 0], [0, 0, 0], [3.5, 2.0, 20.0]),
    ("both at the last step", [0, 0, 1], [0, 0, 1], [0, 0, 0], [4.75, 7.0, 4.0]),
    ("quarantined in the middle", [0, 0, 0], [0, 0, 0], [0, 1, 0], [5.0, None, 20.0]),
    ("quarantined at the last step", [0, 0, 0], [0, 0, 0], [0, 0, 1], [5.5, 10.0, None]),
]


@pytest.mark.parametrize("case", ROLLOUTS, ids=lambda case: case[0])
def test_q_lambda_by_hand(case):
    _, *flags, expected = case
    flags = [torch.tensor(flag).bool()[:, None] for flag in flags]
    reward, next_value = (
        torch.where(flags[2], math.nan, torch.tensor(x)[:, None]) for x in ([1.0, 2, 4], [8.0, 16, 32])
    )
    rollout = dqn.Transitions(None, None, None, reward, *flags)
    target = dqn.lambda_returns(rollout, next_value, gamma=0.5, q_lambda=0.5).squeeze(1)
    assert target.isfinite().all()
    assert [x for x, y in zip(target.tolist(), expected) if y is not None] == [y for y in expected if y is not None]


def test_q_lambda_is_one_step_at_0_and_the_whole_rollout_at_1():
    generator = torch.Generator().manual_seed(0)
    reward, next_value = (torch.randn(6, 5, generator=generator) for _ in range(2))
    never = torch.zeros(6, 5, dtype=torch.bool)
    rollout = dqn.Transitions(None, None, None, reward, never, never, never)
    targets = [dqn.lambda_returns(rollout, next_value, 0.9, x) for x in (0.0, 1.0)]
    torch.testing.assert_close(targets[0], reward + 0.9 * next_value)
    discounts = 0.9 ** torch.arange(6)
    torch.testing.assert_close(targets[1][0], (discounts[:, None] * reward).sum(0) + 0.9**6 * next_value[-1])


@pytest.mark.parametrize("double_q, value", [(True, 7.0), (False, 9.0)])
def test_double_q_values_with_the_target_network_what_the_online_network_prefers(double_q, value):
    """Two heads. Online prefers bins 0 and 1, which the target network values with 8 and 6; its own best are 12, 6."""
    agent = constant_agent(probe_args(None, bins=2), [[1.0, 0.0], [0.0, 1.0]], [[8.0, 12.0], [-5.0, 6.0]])
    assert dqn.bootstrap_value(agent, torch.zeros(2, 3), double_q).tolist() == [value, value]


def test_loss_by_hand():
    """Q = (2 + 4) / 2 = 3. Huber of 0.5: 0.125; of 3: 3 - 0.5. The quarantined row counts as 0."""
    agent = constant_agent(probe_args(None, bins=2), [[0.0, 2.0], [4.0, 0.0]], [[0.0] * 2] * 2)
    action = torch.tensor([[1, 0]] * 3)
    batch = dqn.Batch(torch.zeros(3, 3), action, torch.tensor([2.5, 6.0, 100.0]), torch.tensor([1.0, 1.0, 0.0]))
    loss, terms = dqn.q_loss(agent, batch)
    terms = dqn.LossTerms(*terms.tolist())
    assert loss.item() == terms.loss == pytest.approx((0.125 + 2.5) / 3)
    assert (terms.value, terms.target) == (pytest.approx(6.0 / 3), pytest.approx(8.5 / 3))


def test_a_rollout_becomes_rows_in_the_order_given():
    args = probe_args(None, algorithm="pqn", num_envs=3, num_steps=4, batch_size=4, gamma=0.9, q_lambda=0.0)
    args = dataclasses.replace(args, normalize_observations=False, normalize_rewards=False, reward_scale=2.0)
    agent, story = make_agent(args), Story()
    sizes = dqn.derive_sizes(args, 1)
    assert (sizes.slots, sizes.updates) == (4, 6)
    rollout = dqn.allocate_replay(agent, sizes)
    steps = [story.next() for _ in range(4)]
    for number, step in enumerate(steps):
        dqn.store(rollout, number, dqn.Transitions(*step[:2], torch.full((3, 2), number), *step[3:7]))
    order = torch.arange(12).flip(0)
    batch = dqn.rollout_batch(agent, rollout, order, lambda rows: 10.0 * rows[:, 2], args)
    for k, (obs, target) in enumerate(zip(batch.obs.tolist(), batch.target.tolist(), strict=True)):
        number, env = divmod(11 - k, 3)
        assert obs == steps[number].obs[env].tolist() and batch.action[k].tolist() == [number] * 2
        followed = 0.0 if steps[number].terminated[env] else 10.0 * (obs[2] + 1)  # the age that the step led to
        assert target == pytest.approx(2.0 * steps[number].reward[env].item() + 0.9 * followed)


@algorithms
def test_quarantined_transitions_leave_no_trace(algorithm):
    """NaN there changes nothing, and neither does any other number."""
    gradients = []
    for garbage in (math.nan, 1e9):
        args = probe_args(None, algorithm=algorithm, num_envs=8, num_steps=4, n_step=2, replay_capacity=32)
        args = dataclasses.replace(args, learning_starts=1, batch_size=32, normalize_rewards=False)
        agent, generator = make_agent(args), torch.Generator().manual_seed(0)
        replay = dqn.allocate_replay(agent, dqn.derive_sizes(args, 1))
        for number in range(4):
            obs, final_obs = (torch.randn(8, 3, generator=generator) for _ in range(2))
            reward, invalid = torch.randn(8, generator=generator), torch.rand(8, generator=generator) < 0.3
            final_obs[invalid], reward[invalid] = garbage, garbage
            never = torch.zeros_like(invalid)
            step = dqn.Transitions(obs, final_obs, torch.zeros(8, 2), reward, never, never, invalid)
            dqn.store(replay, number, step)
            agent.obs_statistics.update(obs, ~invalid)
        value_of = lambda rows, agent=agent: dqn.bootstrap_value(agent, rows, True)  # noqa: E731
        if algorithm == "dqn":
            slot, env = torch.arange(3).repeat_interleave(8), torch.arange(8).repeat(3)
            batch = dqn.replay_batch(agent, replay, slot, env, value_of, args)
        else:
            batch = dqn.rollout_batch(agent, replay, torch.arange(32), value_of, args)
        assert 0 < (batch.weight == 0).sum() < len(batch.weight)
        dqn.q_loss(agent, batch)[0].backward()
        gradients.append([p.grad for p in agent.network.parameters()])
    assert_same(*gradients)
    assert all(x.isfinite().all() for x in gradients[0])


@algorithms
def test_gradient_steps_move_the_network_and_the_target_network_follows_by_tau(algorithm):
    args = probe_args(None, algorithm=algorithm, tau=0.25, max_grad_norm=0.5, updates=1)
    agent = make_agent(args)
    optimizer = vecsim.make_optimizer(agent.network, torch.tensor(1e-2))
    sizes = dqn.derive_sizes(args, 1)._replace(batch=8)
    untouched = {key: value.clone() for key, value in agent.state_dict().items()}
    functions = dqn.build_functions(agent, optimizer, dqn.allocate_replay(agent, sizes), sizes, args)
    assert_same(untouched, dict(agent.state_dict()))  # building leaves the agent as it was
    online = [p.detach().clone() for p in agent.network.parameters()]
    batch = dqn.Batch(torch.randn(8, 3), torch.randint(9, (8, 2)), 100.0 * torch.randn(8), torch.ones(8))
    dqn.update(agent, functions, batch, 1)
    norm = torch.stack([p.grad.square().sum() for p in agent.network.parameters()]).sum().sqrt()
    assert norm.item() == pytest.approx(0.5, rel=1e-3)
    assert all(not torch.equal(p, old) for p, old in zip(agent.network.parameters(), online))
    if algorithm == "dqn":
        for target, p, old in zip(agent.target_network.parameters(), agent.network.parameters(), online, strict=True):
            torch.testing.assert_close(target, 0.75 * old + 0.25 * p.detach())
    else:
        assert agent.target_network is None


# Dynamic programming --------------------------------------------------------------------------------------------------


class Chain:
    """Five states in a row. The right end pays 1 and terminates; each step left pays 0.07. Time limit: 6 steps.

    A new episode starts anywhere. The observation is one-hot."""

    NEXT = np.array([[max(0, s - 1), s + 1] for s in range(5)])  # (state, left or right); state 5: the end
    REWARD = np.array([[0.07, float(s == 4)] for s in range(5)])

    def __init__(self, env_id, num_envs, device, seed):
        self.num_envs, self.generator = num_envs, torch.Generator().manual_seed(seed)
        self.single_observation_space = gymnasium.spaces.Box(0.0, 1.0, (5,), np.float32)
        self.single_action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def see(self, state):
        return torch.nn.functional.one_hot(state, 6)[:, :5].float()

    def reset(self, seed=None):
        self.state = torch.randint(5, (self.num_envs,), generator=self.generator)
        self.age = torch.zeros_like(self.state)
        return self.see(self.state), {}

    def step(self, action):
        right = (action[:, 0] > 0).long()
        reward = torch.tensor(self.REWARD).float()[self.state, right]
        led_to, self.age = torch.tensor(self.NEXT)[self.state, right], self.age + 1
        terminated, truncated = led_to == 5, self.age == 6
        fresh = torch.randint(5, (self.num_envs,), generator=self.generator)
        self.state = torch.where(terminated | truncated, fresh, led_to)
        self.age = torch.where(terminated | truncated, 0, self.age)
        return self.see(self.state), reward, terminated, truncated, {"final_obs": self.see(led_to)}

    @classmethod
    def values(cls, gamma):
        """Q (5, 2) by value iteration. The time limit is no end."""
        value = np.zeros(6)
        for _ in range(1000):
            q = cls.REWARD + gamma * value[cls.NEXT]
            value[:5] = q.max(1)
        return q


@algorithms
def test_the_learned_values_of_a_chain_are_those_of_dynamic_programming(algorithm, tmp_path):
    """One-step targets: longer sums under random actions are the values of no policy that acts greedily."""
    plain = dict(normalize_observations=False, normalize_rewards=False, bins=2, q_lambda=0.0, epsilon=(0.5, 0.5))
    plain |= dict(learning_rate=5e-3, learning_rate_final=1e-5, total_timesteps=40_000, eval_episodes=0)
    if algorithm == "pqn":
        plain |= dict(num_steps=4, update_epochs=4)
    dqn.train(probe_args(tmp_path, "chain", algorithm, **plain), Chain)
    agent = dqn.load_agent(read_checkpoint(tmp_path))
    with torch.no_grad():
        learned = agent.values(agent.network, torch.eye(5)).squeeze(1)
    exact = Chain.values(gamma=0.9)
    assert exact.argmax(1).tolist() == [0, 1, 1, 1, 1]  # both actions are best somewhere
    np.testing.assert_allclose(learned, exact, atol=1e-2)


# Reduced precision, export, flags -------------------------------------------------------------------------------------


def test_bf16_is_what_the_network_computes_in():
    args = probe_args(None, bf16=True)
    agent, seen = make_agent(args), []
    agent.network[-1].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    loss, _ = dqn.q_loss(agent, dqn.Batch(torch.randn(8, 3), torch.randint(9, (8, 2)), torch.randn(8), torch.ones(8)))
    loss.backward()
    assert seen == [torch.bfloat16] and loss.dtype == torch.float32
    assert all(x.dtype == torch.float32 for x in agent.network.parameters())


def test_the_panel_and_an_export_act_like_the_trained_policy_through_the_same_bins(tmp_path, monkeypatch, capsys):
    panel = pytest.importorskip("eval_panel")
    args = probe_args(None, "InvertedPendulum-v5", "pqn", bins=3)
    env = vecsim.make(args.env_id, num_envs=1)
    torch.manual_seed(0)
    agent = dqn.Agent(4, env.single_action_space, args)
    path = save_agent(tmp_path, agent, args, "dqn")
    flags = ["--play", path, "--export", tmp_path / "policy.onnx", "--eval-episodes", "1"]
    assert run_main(monkeypatch, capsys, *flags, trainer=dqn) == (0, "")
    [subject] = panel.load_subjects(panel.check_args(panel.Args((str(path),), device="cpu")))
    obs = torch.randn(32, 4)
    assert subject.label == "pqn" and torch.equal(subject.act(obs, torch.zeros(32).bool()), agent.act(obs))
    policy = OnnxPolicy(tmp_path / "policy.onnx")
    check_file(policy, agent.act, agent.obs_statistics, (torch.tensor([-3.0]), torch.tensor([3.0])), squashed=True)
    actions = torch.cat([action for _, action in policy.seen])
    assert set(actions.flatten().tolist()) == {-3.0, 0.0, 3.0}
    assert read_names(policy, "dqn_gpu_torch.py", env_steps=640)[1:] == (["slide"], pytest.approx(0.04))
    ours, theirs = (vecsim.evaluate_in_gymnasium(args.env_id, act, 1, 1, {}) for act in (agent.act, policy.act))
    assert ours == pytest.approx(theirs) and ours["mean_length"] > 1


def test_environments_and_batches_must_split():
    with pytest.raises(dqn.InputError, match="num_envs = 1,000 does not split over 3 processes; use 1002"):
        dqn.derive_sizes(probe_args(None, num_envs=1000), world_size=3)
    with pytest.raises(dqn.InputError, match="batch_size must divide num_envs x num_steps = 512; use 64"):
        dqn.derive_sizes(probe_args(None, algorithm="pqn", batch_size=96), world_size=1)
    sizes = dict(num_envs=100, batch_size=64, replay_capacity=1_001, learning_starts=201, total_timesteps=450)
    assert dqn.derive_sizes(probe_args(None, **sizes, n_step=2), 2) == dqn.Sizes(50, 32, 11, 3, 2, 5)
    pqn = dict(algorithm="pqn", num_steps=16, batch_size=256, update_epochs=3, total_timesteps=5_000)
    assert dqn.derive_sizes(probe_args(None, **pqn), 2) == dqn.Sizes(32, 128, 16, 1, 12, 5)


def test_flags_win_over_tasks_and_tasks_over_the_algorithm():
    args = dqn.parse_args("--env-id InvertedPendulum-v5 --algorithm pqn --gamma 0.5".split())
    assert (args.gamma, args.critic_hidden, args.num_steps) == (0.5, (64, 64), dqn.PQN["num_steps"])
    for algorithm, task in dqn.TASKS:
        args = dqn.task_defaults(task, algorithm)
        dqn.check_ranges(args)
        dqn.derive_sizes(args, 1)
