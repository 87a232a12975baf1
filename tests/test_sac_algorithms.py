"""sac_gpu_torch's pure functions and its replay against cases by hand, numerical integrals and NumPy."""

from __future__ import annotations

import collections
import dataclasses
import math

import gymnasium
import numpy as np
import pytest
import torch

import sac_gpu_torch as sac

KINDS = ("mlp", "layer_norm", "flash")


def make_args(env_id="probe", preset="best", **changes):
    small = dict(device="cpu", actor_hidden=(16,), critic_hidden=(16,), compile=False, run_dir="unused")
    return dataclasses.replace(sac.task_defaults(env_id, preset), **(small | changes))


def make_agent(args, obs_size=3, actions=2, critic_obs_size=None):
    torch.manual_seed(0)
    space = gymnasium.spaces.Box(-1.0, 1.0, (actions,), np.float32)
    agent = sac.Agent(obs_size, critic_obs_size, space, args)
    with torch.no_grad():  # away from the special point of the initial weights
        for parameter in (*agent.actor.parameters(), *agent.critics.parameters(), *agent.target_critics.parameters()):
            parameter += 0.1 * torch.randn(parameter.shape)
    return agent


def make_replay(agent, slots, envs, half_precision=False):
    sizes = sac.derive_sizes(make_args(num_envs=envs), world_size=1)._replace(slots=slots)
    return sac.allocate_replay(agent, sizes, half_precision)


def random_batch(size=32, obs_size=3, actions=2, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(size, *shape, generator=generator)

    obs, next_obs, discount, weight = normal(obs_size), normal(obs_size), normal(), normal()
    discount, weight = 0.9 * (discount < 1.0), (weight < 1.3).float()
    batch = sac.Batch(obs, obs, normal(actions).tanh(), normal(), discount, next_obs, next_obs, weight)
    return batch, normal(actions)


# The categorical critic -----------------------------------------------------------------------------------------------


# Atoms -1, 0, 1. name, probability, reward, discount, projected
PROJECTIONS = [
    ("nothing moves", [0.2, 0.3, 0.5], 0.0, 1.0, [0.2, 0.3, 0.5]),
    ("half an atom up is shared by both neighbours", [0.0, 1.0, 0.0], 0.5, 1.0, [0.0, 0.5, 0.5]),
    ("a quarter down", [0.0, 1.0, 0.0], -0.25, 1.0, [0.25, 0.75, 0.0]),
    ("upper edge: beyond it everything is the last atom", [0.2, 0.3, 0.5], 7.0, 1.0, [0.0, 0.0, 1.0]),
    ("lower edge", [0.2, 0.3, 0.5], -7.0, 1.0, [1.0, 0.0, 0.0]),
    ("exactly onto the upper edge", [0.0, 1.0, 0.0], 1.0, 1.0, [0.0, 0.0, 1.0]),
    ("exactly onto the lower edge", [0.0, 1.0, 0.0], -1.0, 1.0, [1.0, 0.0, 0.0]),
    ("only what passes the edge stops there", [0.5, 0.0, 0.5], 0.5, 1.0, [0.25, 0.25, 0.5]),
    ("terminal: the reward alone", [0.2, 0.3, 0.5], 0.25, 0.0, [0.0, 0.75, 0.25]),
    ("terminal on an atom", [0.2, 0.3, 0.5], 0.0, 0.0, [0.0, 1.0, 0.0]),
    ("terminal beyond the edge", [0.2, 0.3, 0.5], -3.0, 0.0, [1.0, 0.0, 0.0]),
    ("the discount draws towards zero", [1.0, 0.0, 0.0], 0.0, 0.5, [0.5, 0.5, 0.0]),
]


@pytest.mark.parametrize("case", PROJECTIONS, ids=lambda case: case[0])
def test_projection_by_hand(case):
    _, probability, reward, discount, expected = case
    row = lambda x: torch.tensor([x])  # noqa: E731
    atoms = torch.tensor([-1.0, 0.0, 1.0])
    projected = sac.project_categorical(row(probability), row(reward), row(discount), atoms)
    torch.testing.assert_close(projected, row(expected))


def test_projection_is_bellemare_and_others_algorithm_1_and_keeps_mass_and_mean():
    generator = torch.Generator().manual_seed(0)
    atoms = torch.linspace(-5.0, 5.0, 101)
    probability = torch.randn(50, 101, generator=generator).mul(3.0).softmax(-1)
    reward, discount = 4.0 * torch.randn(50, generator=generator), torch.rand(50, generator=generator)
    projected = sac.project_categorical(probability, reward, discount, atoms)
    expected, spacing = np.zeros((50, 101)), 0.1
    for b in range(50):
        for j in range(101):
            moved = np.clip(reward[b].item() + discount[b].item() * atoms[j].item(), -5.0, 5.0)
            position = (moved + 5.0) / spacing
            low, high = math.floor(position + 1e-9), math.ceil(position - 1e-9)
            expected[b, low] += probability[b, j].item() * (high - position if high > low else 1.0)
            expected[b, high] += probability[b, j].item() * (position - low if high > low else 0.0)
    np.testing.assert_allclose(projected, expected, atol=2e-5)
    torch.testing.assert_close(projected.sum(1), torch.ones(50))
    inside = (reward.abs() + 5.0 * discount) < 5.0
    mean = reward + discount * (probability @ atoms)
    assert inside.sum() > 5
    torch.testing.assert_close((projected @ atoms)[inside], mean[inside], rtol=1e-4, atol=1e-4)


def test_a_fresh_categorical_critic_says_zero_and_is_narrow():
    torch.manual_seed(0)
    args = make_args(critic="categorical", value_limit=10.0)
    agent = sac.Agent(3, None, gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32), args)
    outputs = agent.critics(torch.randn(20, 3), torch.randn(20, 2).tanh(), learning=True)
    assert agent.value(outputs).abs().max() < 0.2
    deviation = (outputs.softmax(-1) @ agent.atoms.square()).sqrt()
    torch.testing.assert_close(deviation, torch.full_like(deviation, 2.0), rtol=0.1, atol=0)


def test_min_takes_the_distribution_of_lower_value_and_mean_mixes_both():
    outputs = torch.tensor([[[0.0, 0.0, 9.0], [9.0, 0.0, 0.0]], [[0.0, 9.0, 0.0], [0.0, 9.0, 0.0]]])
    reward, discount = torch.zeros(2), torch.ones(2)
    for reduction in ("min", "mean"):
        agent = make_agent(make_args(critic="categorical", critic_reduction=reduction, num_atoms=3, value_limit=1.0))
        target = sac.critic_target(agent, outputs, reward, discount)
        p = outputs.softmax(-1)
        expected = torch.stack([p[1, 0], p[0, 1]]) if reduction == "min" else p.mean(0)
        torch.testing.assert_close(target, expected)
        torch.testing.assert_close(agent.combined_value(outputs), expected @ agent.atoms)
        agent = make_agent(make_args(critic="scalar", critic_reduction=reduction))
        target = sac.critic_target(agent, torch.tensor([[[1.0]], [[3.0]]]), torch.tensor([10.0]), torch.tensor([0.5]))
        assert target.tolist() == [[10.5 if reduction == "min" else 11.0]]


# Returns of n steps ---------------------------------------------------------------------------------------------------


# gamma = 1/2, rewards 1, 2, 4: each counts 1. name, terminated, truncated, invalid, return, discount, last step used
WINDOWS = [
    ("running", [0, 0, 0], [0, 0, 0], [0, 0, 0], 3.0, 0.125, 2),
    ("terminated at once", [1, 0, 0], [0, 0, 0], [0, 0, 0], 1.0, 0.0, 0),
    ("terminated in the middle", [0, 1, 0], [0, 0, 0], [0, 0, 0], 2.0, 0.0, 1),
    ("terminated at the last step", [0, 0, 1], [0, 0, 0], [0, 0, 0], 3.0, 0.0, 2),
    ("truncated at once", [0, 0, 0], [1, 0, 0], [0, 0, 0], 1.0, 0.5, 0),
    ("truncated in the middle", [0, 0, 0], [0, 1, 0], [0, 0, 0], 2.0, 0.25, 1),
    ("truncated at the last step", [0, 0, 0], [0, 0, 1], [0, 0, 0], 3.0, 0.125, 2),
    ("both in the middle", [0, 1, 0], [0, 1, 0], [0, 0, 0], 2.0, 0.0, 1),
    ("the next episode's end is not ours", [0, 0, 1], [0, 1, 0], [0, 0, 0], 2.0, 0.25, 1),
    ("quarantined in the middle", [0, 0, 0], [0, 0, 0], [0, 1, 0], 1.0, 0.5, 0),
    ("quarantined at the last step", [0, 0, 0], [0, 0, 0], [0, 0, 1], 2.0, 0.25, 1),
    ("quarantined after a termination", [1, 0, 0], [0, 0, 0], [0, 1, 0], 1.0, 0.0, 0),
]


@pytest.mark.parametrize("case", WINDOWS, ids=lambda case: case[0])
def test_n_step_return_by_hand(case):
    _, *flags, total, discount, last = case
    flags = [torch.tensor([flag]).bool() for flag in flags]
    reward = torch.where(flags[2], torch.nan, torch.tensor([[1.0, 2.0, 4.0]]))
    result = sac.n_step_returns(reward, *flags, 0.5)
    assert [x.item() for x in result] == [total, discount, last]


# Replay ---------------------------------------------------------------------------------------------------------------


class Story:
    """Steps of environments that tell where they are: obs = (environment, episode, step in the episode).

    Episodes of environment e last 2 + e steps. Odd episodes terminate, even ones are truncated. The reward is
    1000 episode + step."""

    def __init__(self, envs=3):
        self.env = torch.arange(envs).float()
        self.episode, self.age = torch.zeros(envs), torch.zeros(envs)

    def seen(self):
        return torch.stack([self.env, self.episode, self.age], 1)

    def next(self):
        """One vector step."""
        obs, reward, episode = self.seen(), 1000.0 * self.episode + self.age, self.episode.clone()
        self.age = self.age + 1
        final_obs, ended = self.seen(), self.age == 2 + self.env
        terminated, truncated = ended & (episode % 2 == 1), ended & (episode % 2 == 0)
        self.episode = self.episode + ended
        self.age = torch.where(ended, 0.0, self.age)
        never = torch.zeros_like(ended)
        return sac.Transitions(obs, final_obs, torch.zeros(len(obs), 1), reward, terminated, truncated, never)


@pytest.mark.parametrize("n_step", [1, 2, 3])
@pytest.mark.parametrize("slots", [3, 5, 8])
def test_no_sample_crosses_an_episode_or_the_write_head_at_any_phase(slots, n_step):
    """The ring is written three times over. After every write all legal transitions are drawn and no others. Their
    returns and next observations, final ones included, are those of their own episodes."""
    args = make_args(n_step=n_step, gamma=1.0, normalize_observations=False, normalize_rewards=False)
    agent = make_agent(args, actions=1)
    replay = make_replay(agent, slots, 3)
    generator, story, written = torch.Generator().manual_seed(0), Story(), []
    for step in range(3 * slots + 1):
        written.append(story.next())
        sac.store(replay, step, written[-1])
        if step + 1 < n_step:
            continue
        slot, env = sac.draw_transitions(replay, step + 1, n_step, 600, generator)
        batch = sac.gather_batch(agent, replay, slot, env, args)
        oldest = max(0, step + 1 - slots)
        legal = {tuple(row) for s in range(oldest, step + 2 - n_step) for row in written[s].obs.tolist()}
        assert {tuple(row) for row in batch.obs.tolist()} == legal
        for (e, episode, age), reward, discount, after in zip(
            batch.obs.tolist(), batch.reward.tolist(), batch.discount.tolist(), batch.next_obs.tolist(), strict=True
        ):
            used = min(n_step, int(2 + e - age))  # up to the end of its own episode
            assert after == [e, episode, age + used]
            assert reward == sum(1000 * episode + age + k for k in range(used))
            assert discount == (0.0 if age + used == 2 + e and episode % 2 == 1 else 1.0)


def test_draws_are_uniform():
    """Chi-square over the 7 x 5 legal cells of a full ring: 34 degrees of freedom, 99.9% below 65.2."""
    generator = torch.Generator().manual_seed(0)
    slot, env = sac.draw_transitions(make_replay(make_agent(make_args()), 9, 5), 23, 3, 70_000, generator)
    counts = collections.Counter(zip(slot.tolist(), env.tolist(), strict=True))
    assert {s for s, _ in counts} == {step % 9 for step in range(14, 21)} and len(counts) == 35
    assert sum((count - 2000) ** 2 / 2000 for count in counts.values()) < 65.2


def test_privileged_observations_are_stored_beside():
    args = make_args(normalize_observations=False, normalize_rewards=False)
    agent = make_agent(args, critic_obs_size=1)
    replay = make_replay(agent, 4, 2)
    seen, final, privileged, final_privileged = (
        torch.full((2, k), x) for k, x in ((3, 1.0), (3, 2.0), (1, 3.0), (1, 4.0))
    )
    flags = [torch.zeros(2, dtype=torch.bool)] * 3
    step = sac.Transitions(seen, final, torch.zeros(2, 2), torch.ones(2), *flags, privileged, final_privileged)
    sac.store(replay, 0, step)
    batch = sac.gather_batch(agent, replay, torch.tensor([0]), torch.tensor([1]), args)
    rows = batch.obs, batch.critic_obs, batch.next_obs, batch.next_critic_obs
    assert [x.unique().tolist() for x in rows] == [[1.0], [3.0], [2.0], [4.0]]


def test_quarantined_transitions_leave_no_trace():
    """NaN there changes nothing, and neither does any other number."""
    gradients = []
    for garbage in (torch.nan, 1e9):
        args = make_args(n_step=2)
        agent = make_agent(args)
        replay = make_replay(agent, 4, 8)
        generator = torch.Generator().manual_seed(0)
        for step in range(4):
            obs, final, action, reward, *flags = (
                torch.randn(8, *k, generator=generator) for k in ((3,), (3,), (2,), (), (), (), ())
            )
            flags = [flag > 1.0 for flag in flags]
            reward, final = torch.where(flags[2], garbage, reward), torch.where(flags[2][:, None], garbage, final)
            sac.store(replay, step, sac.Transitions(obs, final, action.tanh(), reward, *flags))
        slot, env = sac.draw_transitions(replay, 4, 2, 64, generator)
        batch = sac.gather_batch(agent, replay, slot, env, args)
        assert 0 < (batch.weight == 0).sum() < 64 and replay.invalid.any()
        noise = torch.randn(64, 2, generator=generator)
        for loss in (sac.critic_loss, sac.policy_loss):
            loss(agent, noise, batch, args)[0].backward()
        gradients.append([p.grad for p in (*agent.actor.parameters(), *agent.critics.parameters())])
    for one, other in zip(*gradients, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_half_precision_halves_the_observations_and_keeps_three_digits():
    agent = make_agent(make_args(), obs_size=30)
    whole, half = (make_replay(agent, 4, 2, half_precision) for half_precision in (False, True))
    assert whole.obs.nbytes == 2 * half.obs.nbytes and whole.reward.dtype == half.reward.dtype == torch.float32
    obs, never = torch.randn(2, 30), torch.zeros(2, dtype=torch.bool)
    obs[0, 0] = 1e6
    sac.store(half, 5, sac.Transitions(obs, obs, torch.zeros(2, 2), torch.zeros(2), never, never, never))
    assert half.obs[1, 0, 0] == 65504.0  # not inf
    torch.testing.assert_close(half.obs[1].float()[:, 1:], obs[:, 1:], rtol=1e-3, atol=1e-6)


def test_a_checkpoint_copies_only_the_filled_part_of_the_replay():
    replay = make_replay(make_agent(make_args()), 8, 2)
    saved = sac.filled_part(replay, 5)["rings"]
    assert saved.keys() == {name for name, ring in replay._asdict().items() if ring is not None}
    for name, x in saved.items():
        assert x.untyped_storage().nbytes() == x.nbytes == getattr(replay, name).nbytes * 5 // 8


# Policy and temperature -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean, log_std", [(0.0, 0.0), (0.7, -1.0), (-1.5, 0.5), (0.3, -3.0)])
def test_squashed_log_prob_against_numerical_integrals(mean, log_std):
    """The density integrates to 1, to the probability of u in an interval, and to the mean of tanh(u)."""
    std = math.exp(log_std)
    noise = torch.linspace(-8.0, 8.0, 200_001, dtype=torch.float64)[:, None]
    column = torch.full_like(noise, 1.0)
    action, log_prob = sac.squashed_gaussian(mean * column, log_std * column, noise)
    action, density = action[:, 0], log_prob.exp()
    inside = action.abs() < 1.0  # in float64 tanh reaches 1, where no area is left
    action, density, noise = action[inside], density[inside], noise[inside, 0]
    assert torch.trapezoid(density, action).item() == pytest.approx(1.0, abs=1e-5)
    for low, high in ((-1.0, 0.5), (0.0, 2.0)):
        part = (noise > low) & (noise < high)
        exact = 0.5 * (math.erf(high / math.sqrt(2.0)) - math.erf(low / math.sqrt(2.0)))
        assert torch.trapezoid(density[part], action[part]).item() == pytest.approx(exact, abs=1e-4)
    normal = torch.exp(-0.5 * noise**2) / math.sqrt(2.0 * math.pi)
    expected = torch.trapezoid((mean + std * noise).tanh() * normal, noise).item()
    assert torch.trapezoid(action * density, action).item() == pytest.approx(expected, abs=1e-5)


def test_squashed_log_prob_adds_up_over_actions_and_survives_saturation():
    mean, log_std, noise = torch.tensor([[0.2, -0.4]]), torch.tensor([[-1.0, 0.3]]), torch.tensor([[0.5, -2.0]])
    whole = sac.squashed_gaussian(mean, log_std, noise)[1]
    parts = [sac.squashed_gaussian(mean[:, k : k + 1], log_std[:, k : k + 1], noise[:, k : k + 1])[1] for k in (0, 1)]
    torch.testing.assert_close(whole, parts[0] + parts[1])
    far = torch.tensor([[40.0]], requires_grad=True)
    action, log_prob = sac.squashed_gaussian(far, torch.zeros(1, 1), torch.zeros(1, 1))
    log_prob.sum().backward()
    assert action == 1.0 and log_prob.isfinite() and far.grad == pytest.approx(2.0)


def test_log_deviation_stays_within_its_bounds():
    agent = make_agent(make_args())
    with torch.no_grad():
        agent.actor.head.weight *= 1e4
    log_std = agent.policy(torch.randn(100, 3), learning=False)[1]
    assert log_std.min() == -5.0 and log_std.max() == 2.0


@pytest.mark.parametrize("entropy, rises", [(-2.5, True), (-1.5, False)])
def test_temperature_rises_where_the_entropy_is_below_its_target(entropy, rises):
    """Target -2. By hand the gradient on log(temperature) is temperature x (entropy - target)."""
    temperature = sac.Temperature(0.5)
    log_prob = torch.full((4,), -entropy, requires_grad=True)
    sac.temperature_loss(temperature(), log_prob, -2.0).mean().backward()
    gradient = temperature.log_value.grad.item()
    assert gradient == pytest.approx(0.5 * (entropy + 2.0)) and (gradient < 0) == rises
    assert log_prob.grad is None  # the policy does not follow this loss


def test_noise_is_held_for_its_time_and_no_longer():
    durations = sac.zeta_distribution(4)
    weights = np.array([1, 1 / 4, 1 / 9, 1 / 16])
    np.testing.assert_allclose(durations, np.cumsum(weights) / weights.sum(), rtol=1e-6)
    held, remaining = torch.zeros(3, 1), torch.zeros(3, dtype=torch.long)
    uniform = torch.tensor([0.0, 0.75, 0.9999999])  # durations 1, 2 and 4
    seen = []
    for step in range(8):
        held, remaining = sac.hold_noise(held, remaining, torch.full((3, 1), float(step)), uniform, durations)
        seen.append(held[:, 0].tolist())
    assert np.transpose(seen).tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [0, 0, 2, 2, 4, 4, 6, 6],
        [0, 0, 0, 0, 4, 4, 4, 4],
    ]
    generator, lengths = (
        torch.Generator().manual_seed(0),
        torch.rand(100_000, generator=torch.Generator().manual_seed(1)),
    )
    fresh, none = torch.randn(100_000, 1, generator=generator), torch.zeros(100_000, dtype=torch.long)
    _, left = sac.hold_noise(torch.zeros_like(fresh), none, fresh, lengths, durations)
    shares = torch.bincount(left, minlength=4) / 100_000
    np.testing.assert_allclose(shares, weights / weights.sum(), atol=0.006)


# The scale of rewards -------------------------------------------------------------------------------------------------


def test_rewards_are_scaled_so_that_returns_fit_the_atoms():
    """Reward 1 for ever at gamma 0.9 is worth 10: a time limit must not hide that, a termination must."""
    args = make_args(value_limit=5.0, gamma=0.9, normalize_rewards=True)
    agent = make_agent(args)
    returns, one = torch.zeros(2), torch.ones(2)
    terminated, invalid = torch.tensor([False, True]), torch.tensor([False, False])
    for _ in range(200):
        returns = sac.follow_returns(agent, returns, one, terminated, invalid, 0.9)
    assert returns.tolist() == pytest.approx([10.0, 0.0])
    assert agent.largest_return.item() == pytest.approx(10.0)
    assert agent.return_statistics.count == 400
    assert agent.reward_divisor().item() == pytest.approx(
        agent.return_statistics.deviation().item()
    )  # 4.3: over 10 / 5
    agent.largest_return.fill_(100.0)
    assert agent.reward_divisor().item() == pytest.approx(20.0)
    assert make_agent(make_args(normalize_rewards=False)).reward_divisor() == 1.0


def test_a_batch_has_rewards_in_the_learners_scale():
    """reward_scale times the reward, over the divisor."""
    for normalized, expected in ((False, 1.5), (True, 0.375)):
        args = make_args(reward_scale=0.5, normalize_rewards=normalized, value_limit=5.0)
        agent = make_agent(args)
        agent.largest_return.fill_(20.0)  # over 5: a divisor of 4
        replay = make_replay(agent, 1, 2)
        replay.reward.fill_(3.0)
        batch = sac.gather_batch(agent, replay, torch.tensor([0]), torch.tensor([1]), args)
        assert batch.reward.item() == expected


def test_quarantined_rewards_do_not_reach_the_scale():
    agent = make_agent(make_args())
    invalid = torch.tensor([True, False])
    reward = torch.tensor([torch.nan, 2.0])
    returns = sac.follow_returns(agent, torch.tensor([1.0, 1.0]), reward, torch.zeros(2).bool(), invalid, 0.5)
    assert returns.tolist() == [0.0, 2.5] and agent.largest_return == 2.5 and agent.return_statistics.count == 1


# Losses and gradient steps --------------------------------------------------------------------------------------------


def constant_agent(args, critic_value, target_value, actions=1):
    """Policy N(0, exp(-1.5)) before squashing; critics and target critics that say two numbers each."""
    agent = make_agent(args, obs_size=1, actions=actions)
    with torch.no_grad():
        for parameter in (*agent.actor.parameters(), *agent.critics.parameters(), *agent.target_critics.parameters()):
            parameter.zero_()
        for critics, values in ((agent.critics, critic_value), (agent.target_critics, target_value)):
            for network, value in zip((critics.first, critics.second), values, strict=True):
                network.head.bias.fill_(value)
    return agent


def test_scalar_losses_by_hand():
    """Noise 0: action tanh(0) = 0, log pi = 1.5 - log(sqrt(2 pi)).

    Temperature 0.5, discount 0.8, reward 1, target critics 3 and 2."""
    args = make_args(network="mlp", critic="scalar", critic_reduction="min", temperature_init=0.5, target_entropy=-1.0)
    agent = constant_agent(args, (1.0, 4.0), (3.0, 2.0))
    row = lambda x: torch.tensor([[x]])  # noqa: E731
    column = lambda x: torch.tensor([x])  # noqa: E731
    batch = sac.Batch(row(0.0), row(0.0), row(0.3), column(1.0), column(0.8), row(0.0), row(0.0), column(1.0))
    log_prob = 1.5 - 0.5 * math.log(2.0 * math.pi)
    target = 1.0 + 0.8 * (2.0 - 0.5 * log_prob)
    loss, terms = sac.critic_loss(agent, row(0.0), batch, args)
    assert loss.item() == pytest.approx(0.5 * (1.0 - target) ** 2 + 0.5 * (4.0 - target) ** 2)
    terms = sac.CriticTerms(*terms.tolist())
    assert terms.value == 1.0 and terms.target_clipped == 0.0
    loss, terms = sac.policy_loss(agent, row(0.0), batch, args)
    terms = sac.PolicyTerms(*terms.tolist())
    assert terms.policy_loss == pytest.approx(0.5 * log_prob - 1.0) and terms.entropy == pytest.approx(-log_prob)
    assert terms.temperature == pytest.approx(0.5)
    assert loss.item() == pytest.approx(terms.policy_loss - 0.5 * (log_prob - 1.0))
    terminal = batch._replace(discount=column(0.0))
    assert sac.critic_loss(agent, row(0.0), terminal, args)[0].item() == pytest.approx(0.5 * (1 - 1) ** 2 + 0.5 * 3**2)


def test_the_entropy_to_hold_counts_every_action():
    """Two actions of target -0.5 each: together -1. Noise 0: log pi = 3 - log(2 pi)."""
    args = make_args(network="mlp", critic="scalar", temperature_init=0.5, target_entropy=-0.5)
    agent = constant_agent(args, (1.0, 1.0), (1.0, 1.0), actions=2)
    zeros, one = torch.zeros(1, 2), torch.ones(1)
    batch = sac.Batch(zeros[:, :1], zeros[:, :1], zeros, one, one, zeros[:, :1], zeros[:, :1], one)
    loss, terms = sac.policy_loss(agent, zeros, batch, args)
    log_prob = 3.0 - math.log(2.0 * math.pi)
    assert loss.item() == pytest.approx(terms[0].item() - 0.5 * (log_prob - 1.0))
    loss.backward()
    assert agent.temperature.log_value.grad.item() == pytest.approx(-0.5 * (log_prob - 1.0))


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_what_the_networks_compute_in(kind):
    """The heads of all networks run in bfloat16. Losses and terms stay in float32, and gradient steps stay finite."""
    args = make_args(network=kind, bf16=True)
    agent = make_agent(args)
    heads = {name: module for name, module in agent.named_modules() if name.endswith("head")}
    seen = collections.defaultdict(set)
    for name, head in heads.items():
        head.register_forward_hook(lambda module, inputs, output, name=name: seen[name].add(output.dtype))
    optimizers = sac.make_optimizers(agent, torch.tensor(1e-2), 1e-2)
    batch, noise = random_batch()
    loss, terms = sac.critic_loss(agent, noise, batch, args)
    loss.backward()
    assert loss.dtype == terms.dtype == torch.float32
    sac.critic_step(agent, optimizers["critics"], 0.05)
    sac.policy_loss(agent, noise, batch, args)[0].backward()
    optimizers["actor"].step()
    optimizers["temperature"].step()
    assert sac.policy_step(agent, batch.obs, noise)[0].dtype == torch.float32
    assert len(heads) == 5 and dict(seen) == dict.fromkeys(heads, {torch.bfloat16})
    assert all(x.isfinite().all() and x.dtype != torch.bfloat16 for x in agent.state_dict().values())


def test_categorical_loss_is_the_cross_entropy_with_the_projected_target():
    args = make_args(critic="categorical", critic_reduction="mean", num_atoms=5, value_limit=2.0, network="mlp")
    agent = make_agent(args)
    batch, noise = random_batch()
    loss, _ = sac.critic_loss(agent, noise, batch, args)
    with torch.no_grad():
        next_action, log_prob = sac.squashed_gaussian(*agent.policy(batch.next_obs, False), noise)
        p = agent.target_critics(batch.next_critic_obs, next_action, True).softmax(-1).mean(0)
        reward = batch.reward - batch.discount * agent.temperature() * log_prob
        target = sac.project_categorical(p, reward, batch.discount, agent.atoms)
        guesses = agent.critics(batch.critic_obs, batch.action, True).log_softmax(-1)
    expected = -((guesses * target).sum(-1).sum(0) * batch.weight).mean()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_each_loss_has_gradients_for_its_own_networks_only(kind):
    args = make_args(network=kind)
    agent = make_agent(args)
    batch, noise = random_batch()
    sac.critic_loss(agent, noise, batch, args)[0].backward()
    assert all(p.grad is None for p in (*agent.actor.parameters(), *agent.temperature.parameters()))
    assert all(p.grad.abs().sum() > 0 for p in agent.critics.parameters())
    agent.zero_grad(set_to_none=True)
    sac.policy_loss(agent, noise, batch, args)[0].backward()
    assert all(p.grad is None for p in agent.critics.parameters())
    assert all(p.grad.abs().sum() > 0 for p in (*agent.actor.parameters(), *agent.temperature.parameters()))


def test_layer_norm_leaves_the_size_of_the_observation_visible():
    """Without biases before it, layer norm sees only the direction of its input: large and small look alike."""
    torch.manual_seed(0)
    network = sac.make_network("layer_norm", 4, (64, 64), 1)
    x = torch.randn(256, 4)
    small, large = network.hidden(x), network.hidden(3.0 * x)
    assert (small - large).std() > 0.2 * large.std()


def test_batch_norm_uses_the_batch_when_learning_and_running_means_otherwise():
    norm = sac.BatchNorm(2)
    x = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0)) * 3.0 + 5.0
    out = norm(x, True)
    torch.testing.assert_close(out.mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(norm.mean, 0.01 * x.mean(0))
    before = norm.mean.clone(), norm.variance.clone()
    torch.testing.assert_close(norm(x, False), (x - before[0]) / (before[1] + 1e-5).sqrt())
    assert torch.equal(norm.mean, before[0]) and torch.equal(norm.variance, before[1])  # frozen


def test_flash_critics_normalise_both_halves_together():
    """One set of moments for both: shifted next observations change the values of the current ones."""
    losses = []
    for kind in ("flash", "layer_norm"):
        args = make_args(network=kind)
        agent = make_agent(args)
        batch, noise = random_batch()
        value = [
            sac.critic_loss(agent, noise, batch._replace(next_critic_obs=batch.next_critic_obs + shift), args)[1][1]
            for shift in (0.0, 3.0)
        ]
        losses.append((value[0] - value[1]).abs().item())
    assert losses[0] > 1e-6 and losses[1] == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_steps_move_everything_and_the_targets_follow_by_tau(kind):
    args = make_args(network=kind, tau=0.25, updates_per_step=4, policy_frequency=2, batch_size=8)
    agent = make_agent(args)
    optimizers = sac.make_optimizers(agent, torch.tensor(1e-2), 1e-2)
    replay = make_replay(agent, 1, 4)
    untouched = {key: value.clone() for key, value in agent.state_dict().items()}
    functions = sac.build_functions(agent, optimizers, replay, sac.derive_sizes(args, 1), args)
    for key, value in agent.state_dict().items():  # building leaves the agent as it was
        assert torch.equal(value, untouched[key]), key
    batch, _ = random_batch(8)
    noise = torch.randn(1, 2, 8, 2)
    online = [p.clone() for p in agent.critics.parameters()]
    targets = [p.clone() for p in agent.target_critics.parameters()]
    single = dataclasses.replace(args, updates_per_step=1)
    assert sac.update(agent, functions, batch, noise, 0, single)[2] == 0  # the second update is the policy's first
    for p, old, target, old_target in zip(
        agent.critics.parameters(), online, agent.target_critics.parameters(), targets, strict=True
    ):
        assert not torch.equal(p, old)
        torch.testing.assert_close(target, 0.75 * old_target + 0.25 * p.detach())
    actor = [p.clone() for p in (*agent.actor.parameters(), *agent.temperature.parameters())]
    batch, _ = random_batch(32)
    assert sac.update(agent, functions, batch, torch.randn(4, 2, 8, 2), 1, args)[2] == 2
    for p, old in zip((*agent.actor.parameters(), *agent.temperature.parameters()), actor, strict=True):
        assert not torch.equal(p, old)


# Flags ----------------------------------------------------------------------------------------------------------------


def test_environments_and_batches_must_split_over_the_processes():
    with pytest.raises(sac.InputError, match="num_envs = 1,000 does not split over 3 processes; use 1002"):
        sac.derive_sizes(make_args(num_envs=1000), world_size=3)
    with pytest.raises(sac.InputError, match="batch_size = 512 does not split over 3 processes; use 513"):
        sac.derive_sizes(make_args(num_envs=999), world_size=3)
    sizes = dict(num_envs=100, batch_size=64, replay_capacity=1_001, learning_starts=201, total_timesteps=450)
    assert sac.derive_sizes(make_args(**sizes, n_step=2), world_size=2) == sac.Sizes(50, 32, 11, 3, 5)
    assert sac.derive_sizes(make_args(**sizes, n_step=12), world_size=2)[2:4] == (12, 12)  # a window always fits


def test_flags_win_over_presets_and_presets_over_tasks():
    args = sac.parse_args("--env-id InvertedPendulum-v5 --preset vanilla --tau 0.5".split())
    assert (args.tau, args.critic, args.num_envs) == (0.5, "scalar", 32)  # flag, preset, task
    assert args.actor_hidden == (256, 256) and args.normalize_rewards is False  # preset over task
    args = sac.parse_args("--env-id InvertedPendulum-v5 --preset vanilla --normalize-rewards".split())
    assert args.normalize_rewards is True
    best = sac.parse_args("--env-id InvertedPendulum-v5".split())
    assert best.actor_hidden == (64, 64) and best.critic == "categorical"
    args = sac.parse_args("--env-id Ant-v5 --env-kwargs ctrl_cost_weight 0.1".split())
    assert args.env_kwargs == {"include_cfrc_ext_in_observation": False, "ctrl_cost_weight": 0.1}
    for task in sac.TASKS:
        for preset in ("best", "vanilla"):
            sac.check_ranges(sac.task_defaults(task, preset))


def test_vanilla_is_textbook_sac():
    args = sac.task_defaults("probe", "vanilla")
    agent = make_agent(dataclasses.replace(args, actor_hidden=(8, 8), critic_hidden=(8, 8)))
    kinds = {type(module).__name__ for module in agent.modules()}
    assert not kinds & {"LayerNorm", "BatchNorm", "RMSNorm"} and agent.atoms is None
    assert not agent.obs_statistics.enabled and not agent.return_statistics.enabled
    assert (args.n_step, args.noise_repeat_max, args.critic_reduction, args.target_entropy) == (1, 1, "min", -1.0)
