"""ppo_gpu_torch's pure functions against cases computed by hand, torch.distributions and NumPy."""

from __future__ import annotations

import dataclasses
import math

import gae_cases
import gymnasium
import numpy as np
import probe_envs
import pytest
import torch

import ppo_gpu_torch as ppo
import vecsim_torch as vecsim

CPU = torch.device("cpu")


def make_args(**changes):
    small = dict(env_id="probe", device="cpu", actor_hidden=(16,), critic_hidden=(16,), compile=False)
    return ppo.Args(**(small | changes))


def make_agent(args, obs_size=3, actions=2, seed=0, critic_obs_size=None):
    torch.manual_seed(seed)
    space = gymnasium.spaces.Box(-1.0, 1.0, (actions,), np.float32)
    agent = ppo.Agent(obs_size, critic_obs_size, space, args)
    with torch.no_grad():  # away from the special point of the initial weights
        for parameter in agent.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return agent


def random_rollout(agent, steps=4, envs=8, obs_size=3, actions=2, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(steps, envs, *shape, generator=generator)

    obs = normal(obs_size)
    flags = [normal() > 1.5 for _ in range(3)]
    mean = agent.policy_mean(obs.flatten(0, 1)).view(steps, envs, actions).detach()
    action = mean + agent.log_std.detach().exp() * normal(actions)
    return ppo.Rollout(obs, obs, normal(obs_size), action, mean, normal(), *flags)


def make_batch(agent, args, rollout):
    value, advantage = ppo.values_and_advantages(agent, rollout, 5, args.gamma, args.gae_lambda)
    return ppo.make_batch(agent, rollout, value, advantage, args.normalize_advantages, torch.arange(value.numel()))


# Advantages -----------------------------------------------------------------------------------------------------------


def as_columns(case):
    name, next_values, terminated, truncated, invalid, advantages = case
    numbers = (gae_cases.REWARDS, gae_cases.VALUES, next_values)
    flags = (terminated, truncated, invalid)
    return [
        *(torch.tensor(x)[:, None] for x in numbers),
        *(torch.tensor(x, dtype=torch.bool)[:, None] for x in flags),
        torch.tensor(advantages)[:, None],
    ]


def advantages_of(reward, value, next_value, *ends):
    rollout = ppo.Rollout(*[None] * 5, reward, *ends)
    return ppo.advantages_gae(rollout, value, next_value, gae_cases.GAMMA, gae_cases.GAE_LAMBDA)


def test_advantages_by_hand():
    """All cases at once, an environment each, so they do not mix either."""
    *inputs, expected = (torch.cat(columns, 1) for columns in zip(*map(as_columns, gae_cases.CASES), strict=True))
    advantages = advantages_of(*inputs)
    for n, (name, *_) in enumerate(gae_cases.CASES):
        assert torch.equal(advantages[:, n], expected[:, n]), name


def test_nan_of_an_invalid_step_goes_nowhere():
    reward, value, next_value, terminated, truncated, _, _ = as_columns(gae_cases.CASES[0])
    invalid = torch.tensor([[False], [True], [False]])
    reward, next_value = (torch.where(invalid, torch.nan, x) for x in (reward, next_value))
    advantages = advantages_of(reward, value, next_value, terminated, truncated, invalid)
    assert advantages.isfinite().all() and advantages[1] == 0


# Distributions and statistics -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_std", [0.0, -2.0, -5.0])
def test_log_prob_and_kl_are_those_of_torch_distributions(log_std):
    mean, new_mean, action = torch.randn(3, 50, 4, generator=torch.Generator().manual_seed(0)).double()
    old, new = torch.full((4,), log_std).double(), torch.full((4,), log_std + 0.1).double()
    p = torch.distributions.Independent(torch.distributions.Normal(mean, old.exp()), 1)
    q = torch.distributions.Independent(torch.distributions.Normal(new_mean, new.exp()), 1)
    torch.testing.assert_close(ppo.gaussian_log_prob(action, mean, old), p.log_prob(action))
    torch.testing.assert_close(ppo.gaussian_kl(mean, old, new_mean, new), torch.distributions.kl_divergence(p, q))
    single = mean.float(), old.float()
    assert (ppo.gaussian_kl(*single, *single) == 0).all()  # no bias at any deviation


def test_running_statistics_equal_numpy_over_all_valid_rows():
    statistics, generator, seen = ppo.RunningStatistics(3, enabled=True), torch.Generator().manual_seed(0), []
    for size in (5, 1000, 17):
        x = 100.0 + torch.tensor([1.0, 1e-2, 30.0]) * torch.randn(size, 3, generator=generator)
        valid = torch.rand(size, generator=generator) > 0.2
        statistics.update(torch.where(valid[:, None], x, torch.nan), valid)
        seen.append(x[valid].double().numpy())
    seen = np.concatenate(seen)
    np.testing.assert_allclose(statistics.mean, seen.mean(0), rtol=1e-12)
    np.testing.assert_allclose(statistics.variance, seen.var(0), rtol=1e-6)
    assert statistics.count == len(seen)
    x = torch.tensor([[101.0, 100.01, 70.0]])
    torch.testing.assert_close(statistics.denormalize(statistics.normalize(x)), x)


def test_a_batch_without_a_valid_row_changes_no_statistics():
    statistics, x = ppo.RunningStatistics(1, enabled=True), torch.tensor([[3.0], [5.0]])
    statistics.update(x, torch.tensor([False, False]))
    assert (statistics.mean, statistics.variance, statistics.count) == (0.0, 1.0, 0.0)
    statistics.update(x, torch.tensor([True, True]))
    statistics.update(x, torch.tensor([False, False]))
    assert (statistics.mean, statistics.variance, statistics.count) == (4.0, 1.0, 2.0)


def test_statistics_that_are_switched_off_change_nothing():
    statistics = ppo.RunningStatistics(2, enabled=False)
    x = torch.tensor([[1e6, -3.0]])
    statistics.update(x, torch.tensor([True]))
    assert statistics.count == 0 and statistics.normalize(x) is x and statistics.denormalize(x) is x


def test_observations_are_limited_and_returns_are_not():
    agent = make_agent(make_args())
    assert agent.obs_statistics.normalize(torch.tensor([[1e6, 0.0, 0.0]])).max() == 10.0
    assert agent.return_statistics.normalize(torch.tensor([1e6])).max() > 1e5


# Loss and gradients ---------------------------------------------------------------------------------------------------


def test_loss_by_hand():
    """One action; old policy N(0, 1), new policy N(0.5, 1), action 1: log ratio = 0.5 - 0.125 = 0.375."""
    args = make_args(clip_coef=0.2, bounds_coef=0.1, entropy_coef=0.01, log_std_init=0.0)
    agent = make_agent(args, obs_size=1, actions=1)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.zero_()
        agent.actor[-1].bias.fill_(0.5)
        agent.critic[-1].bias.fill_(2.0)
    old_log_prob = -0.5 - 0.5 * math.log(2 * math.pi)
    rows = [torch.tensor([[x]]) for x in (0.0, 0.0, 1.0, 0.0)]  # both observations, action, old mean
    for advantage in (1.0, -1.0):
        batch = ppo.Batch(*rows, *(torch.tensor([x]) for x in (old_log_prob, 3.0, advantage, 1.0)))
        loss, terms = ppo.ppo_loss(agent, batch, torch.zeros(1), 1, args)
        terms = ppo.LossTerms(*terms.tolist())
        ratio = math.exp(0.375)  # 1.455: clipped to 1.2 where that lowers the objective
        expected = -1.2 if advantage > 0 else ratio
        assert terms.policy_loss == pytest.approx(expected)
        assert terms.value_loss == pytest.approx(0.5 * (2.0 - 3.0) ** 2)
        assert terms.bounds_loss == 0.0 and terms.clip_fraction == 1.0
        assert terms.kl == pytest.approx(0.125)
        entropy = 0.5 * math.log(2 * math.pi * math.e)
        assert terms.entropy == pytest.approx(entropy)
        assert loss.item() == pytest.approx(expected + 0.5 - 0.01 * entropy)
    with torch.no_grad():
        agent.actor[-1].bias.fill_(-1.6)
    loss, terms = ppo.ppo_loss(agent, batch, torch.zeros(1), 1, args)  # advantage -1, ratio e^-2.88: clipped at 0.8
    assert ppo.LossTerms(*terms.tolist()).bounds_loss == pytest.approx(0.25)
    assert loss.item() == pytest.approx(0.8 + 0.5 + 0.1 * 0.25 - 0.01 * entropy)


def test_micro_batches_add_up_to_the_minibatch():
    args = make_args()
    agent = make_agent(args)
    batch = make_batch(agent, args, random_rollout(agent))
    gradients = []
    for microbatch in (32, 7):
        terms = ppo.accumulate_gradients(agent, batch, agent.log_std.detach(), microbatch, ppo.ppo_loss, args)
        gradients.append([terms, *(parameter.grad.clone() for parameter in agent.parameters())])
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


def test_quarantined_environments_are_as_if_they_were_not_there():
    """The oracle is the same rollout without their columns. Each column is one environment, so nothing else changes."""
    args = make_args()
    quarantined = torch.tensor([False, True, False, False, True, True, False, False])
    results = []
    for removed in (False, True):
        agent = make_agent(args)
        rollout = random_rollout(agent)
        columns = quarantined.expand(4, 8)
        rollout = rollout._replace(
            invalid=columns,
            reward=torch.where(columns, torch.nan, rollout.reward),
            final_critic_obs=torch.where(columns[..., None], torch.nan, rollout.final_critic_obs),
        )
        if removed:
            kept = [x[:, ~quarantined] for x in rollout[2:]]
            obs = rollout.obs[:, ~quarantined]
            rollout = ppo.Rollout(obs, obs, *kept)
            assert not rollout.invalid.any()
        valid = ~rollout.invalid.flatten()
        batch = make_batch(agent, args, rollout)
        assert batch.weight.mean().item() == pytest.approx(1.0) and (batch.weight == 0).sum() == (~valid).sum()
        terms = ppo.accumulate_gradients(agent, batch, agent.log_std.detach(), 7, ppo.ppo_loss, args)
        agent.obs_statistics.update(rollout.obs.flatten(0, 1), valid)
        statistics = [x for name, x in agent.named_buffers() if "statistics" in name]
        gradients = [parameter.grad for parameter in agent.parameters()]
        results.append([*statistics, batch.advantage[valid], batch.target[valid], terms, *gradients])
    assert len(statistics) == 6  # mean, variance and count, of observations and of returns
    for masked, oracle in zip(*results, strict=True):
        assert oracle.isfinite().all()
        torch.testing.assert_close(masked, oracle, rtol=1e-4, atol=1e-6)


def test_explained_variance_leaves_quarantined_transitions_out():
    value, advantage = torch.randn(6, 5), torch.randn(6, 5)
    invalid = torch.zeros(6, 5, dtype=torch.bool)
    invalid[1:3, 2] = True
    expected = 1 - advantage[~invalid].var() / (advantage + value)[~invalid].var()
    for broken in (1e6, math.nan):
        value[invalid] = broken
        torch.testing.assert_close(ppo.explained_variance(value, advantage, invalid), expected)


def test_bf16_rounds_the_networks_and_nothing_else():
    """bfloat16 keeps 8 bits: outputs near 1 differ from float32, by less than 2^-6."""
    agents = [make_agent(make_args(bf16=bf16)) for bf16 in (False, True)]
    obs = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))
    exact, rounded = (torch.cat([agent.policy_mean(obs), agent.normalized_value(obs)[:, None]], 1) for agent in agents)
    difference = (rounded - exact).abs() / exact.abs().clamp(min=1.0)
    assert rounded.dtype == torch.float32
    assert 0.0 < difference.max() < 2**-6
    assert all(parameter.dtype == torch.float32 for parameter in agents[1].parameters())


def test_a2c_is_ppo_with_one_epoch_one_minibatch_and_no_clipping():
    """The documented flags give the gradient of -log pi(a|s) A + (V - R)^2 / 2, written without any ratio."""
    a2c = probe_envs.documented_a2c()
    ppo.check_ranges(a2c)
    ppo.derive_sizes(a2c, 1, CPU)
    assert (a2c.update_epochs, a2c.num_minibatches, a2c.learning_rate_schedule) == (1, 1, "constant")
    small = dict(env_id="probe", device="cpu", actor_hidden=(16,), critic_hidden=(16,), compile=False)
    args = dataclasses.replace(a2c, **small)
    agent = make_agent(args)
    steps = args.num_steps
    rollout = random_rollout(agent, steps=steps)._replace(invalid=torch.zeros(steps, 8, dtype=torch.bool))
    batch = make_batch(agent, args, rollout)
    ppo.accumulate_gradients(agent, batch, agent.log_std.detach(), 40, ppo.ppo_loss, args)
    ours = [parameter.grad.clone() for parameter in agent.parameters()]
    agent.zero_grad()
    policy = torch.distributions.Normal(agent.actor(batch.obs), agent.log_std.exp())
    policy_loss = -(policy.log_prob(batch.action).sum(-1) * batch.advantage).mean()
    bounds_loss = args.bounds_coef * (policy.mean.abs() - 1.1).clamp(min=0).square().sum(-1).mean()
    value_loss = 0.5 * (agent.critic(batch.critic_obs).squeeze(-1) - batch.target).square().mean()
    (policy_loss + bounds_loss + value_loss).backward()
    for parameter, gradient in zip(agent.parameters(), ours, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)


def test_gradient_step_moves_the_parameters_and_keeps_the_floor():
    args = make_args()
    agent = make_agent(args)
    learning_rate = torch.tensor(1e-2)

    def copies():
        return [parameter.detach().clone() for parameter in agent.parameters()]

    before = copies()
    optimizer = vecsim.make_optimizer(agent, learning_rate)
    assert all(torch.equal(p, old) for p, old in zip(agent.parameters(), before, strict=True))  # the moments are there
    for parameter in agent.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    floor = before[0].max().item()  # agent.log_std comes first: higher than it could reach from below
    ppo.apply_gradients(agent, optimizer, max_grad_norm=1.0, log_std_min=floor)
    for group in ([*agent.actor.parameters(), agent.log_std], [*agent.critic.parameters()]):
        assert math.sqrt(sum(p.grad.square().sum() for p in group)) == pytest.approx(1.0, rel=1e-3)
    for (name, parameter), old in zip(agent.named_parameters(), before, strict=True):
        if name == "log_std":
            assert (parameter == floor).all()
        else:
            torch.testing.assert_close(parameter.detach(), old - 1e-2, rtol=0, atol=1e-4)  # Adam's first step
    learning_rate.zero_()  # the optimiser reads the very tensor
    after = copies()
    ppo.apply_gradients(agent, optimizer, max_grad_norm=1.0, log_std_min=floor)
    assert all(torch.equal(p, old) for p, old in zip(agent.parameters(), after, strict=True))


def test_learning_rate_follows_the_kl_divergence_within_its_band():
    def adapted(rate, kl):
        return ppo.adapted_learning_rate(torch.tensor(rate), torch.tensor(kl), 0.01, 1e-5, 1e-2).item()

    assert adapted(1e-3, 0.021) == pytest.approx(1e-3 / 1.5)
    assert adapted(1e-3, 0.004) == pytest.approx(1.5e-3)
    assert adapted(1e-3, 0.01) == adapted(1e-3, 0.019) == adapted(1e-3, 0.006) == pytest.approx(1e-3)
    assert adapted(1.2e-5, 1.0) == pytest.approx(1e-5) and adapted(9e-3, 0.0) == pytest.approx(1e-2)


# Flags ----------------------------------------------------------------------------------------------------------------


def test_environments_must_split_over_the_processes():
    for envs, nearest in ((1000, 1002), (2, 3)):
        message = f"num_envs = {envs:,} does not split over 3 processes; use {nearest}"
        with pytest.raises(ppo.InputError, match=message):
            ppo.derive_sizes(make_args(num_envs=envs), 3, CPU)


def test_sizes():
    args = make_args(num_envs=1000, num_steps=32, num_minibatches=4, total_timesteps=32_001)
    assert ppo.derive_sizes(args, 2, CPU) == ppo.Sizes(500, 16_000, 4_000, 2_000, 32_000, 2)
    assert ppo.derive_sizes(args, 2, torch.device("cuda")).microbatch == 4_000


def test_flags_win_over_the_defaults_of_a_task():
    row = {"include_cfrc_ext_in_observation": False}
    args = ppo.parse_args("--env-id Ant-v5 --gamma 0.5 --env-kwargs reset_noise_scale 0.0".split())
    assert (args.gamma, args.gae_lambda, args.desired_kl) == (0.5, 0.9, (0.015, 0.009))
    assert args.env_kwargs == row | {"reset_noise_scale": 0.0}
    args = ppo.parse_args("--env-id Ant-v5 --desired-kl 0.02 0.01 --env-kwargs".split() + [*row, "True"])
    assert args.desired_kl == (0.02, 0.01) and args.env_kwargs == {"include_cfrc_ext_in_observation": True}
    assert ppo.TASKS["Ant-v5"]["env_kwargs"] == row


def test_help_shows_the_defaults_of_the_task(capsys):
    with pytest.raises(SystemExit):
        ppo.parse_args(["--env-id", "Hopper-v5", "--help"])
    assert "0.995" in capsys.readouterr().out  # its gamma
