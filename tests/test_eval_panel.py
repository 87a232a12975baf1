"""The panel: policies equal their trainers', rules and intervals by hand, one panel for all, nothing lost, one line per refusal."""

from __future__ import annotations

import csv
import dataclasses
import errno
import fcntl
import inspect
import json
import math
import os
import re
import shutil
import signal
from collections import Counter
from statistics import NormalDist

import numpy as np
import pytest
import torch

import eval_panel as panel
import ppo_gpu_torch as ppo
import sac_gpu_torch as sac
import vecsim_torch

STEPS = 6  # of an episode: enough for a fall here and a time limit there


def save(path, trainer, algorithm, env_id="InvertedPendulum-v5", seed=1, **flags):
    """A checkpoint of random weights with the fields that the trainer writes; returns the trainer's agent."""
    torch.manual_seed(seed)
    flags = dict(actor_hidden=(8, 8), critic_hidden=(8,), env_kwargs={"max_episode_steps": STEPS}) | flags
    args = trainer.with_task_defaults(trainer.Args(env_id=env_id, device="cpu", num_envs=4, run_dir="unused", **flags))
    env = vecsim_torch.make(env_id, 1)
    agent = trainer.Agent(env.single_observation_space.shape[0], None, env.single_action_space, args)
    agent.obs_statistics.mean.normal_()
    agent.obs_statistics.variance.uniform_(0.5, 2.0)
    state = dict(algorithm=algorithm, env_id=env_id, args=dataclasses.asdict(args), agent=agent.state_dict())
    torch.save(state | dict(env_steps=1, versions=trainer.versions()), path)
    return agent


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two policies of one task: one that does nothing, one that pushes the cart to one side until the pole falls."""
    folder = tmp_path_factory.mktemp("checkpoints")
    paths = [folder / "still.pt", folder / "pushes.pt"]
    for path, trainer, name, bias in zip(paths, (ppo, sac), ("ppo", "sac"), (0.0, 20.0), strict=True):
        save(path, trainer, name)
        checkpoint = torch.load(path, weights_only=True)
        last = [name for name in checkpoint["agent"] if re.fullmatch(r"actor\.(head|4)\.(weight|bias)", name)]
        for name in last:
            checkpoint["agent"][name].fill_(bias if name.endswith("bias") else 0.0)
        torch.save(checkpoint, path)
    return [str(path) for path in paths]


def run(capsys, *words):
    """Exit status and what stood on standard error."""
    argv, panel.sys.argv = panel.sys.argv, ["eval_panel.py", *map(str, words)]
    try:
        status = panel.main()
    finally:
        panel.sys.argv = argv
    return status, capsys.readouterr().err.strip()


SMALL = ("--seeds", "3", "7", "--episodes", "3", "--integrator", "euler", "--device", "cpu", "--resamples", "100")


# Policies -----------------------------------------------------------------------------------------------------------------


def test_copies_are_the_trainers_word_for_word():
    of_ppo = "InputError refusals_of_the_simulator mlp gymnasium_options stream_seed".split()
    of_sac = "linear_layer PlainNetwork BatchNorm ResidualBlock FlashNetwork make_network".split()
    for trainer, names in ((ppo, of_ppo), (sac, of_sac)):
        for name in names:
            assert inspect.getsource(getattr(panel, name)) == inspect.getsource(getattr(trainer, name)), name
    pairs = [
        (panel.FrozenStatistics, ppo.RunningStatistics, "__init__ deviation normalize"),
        (panel.Policy, ppo.Agent, "autocast to_env"),
    ]
    for ours, theirs, names in pairs:
        for name in names.split():
            assert inspect.getsource(getattr(ours, name)) == inspect.getsource(getattr(theirs, name)), name


def test_an_actor_with_weights_that_the_panel_does_not_know_is_refused():
    policy = panel.Policy.__new__(panel.Policy)
    torch.nn.Module.__init__(policy)
    policy.actor = torch.nn.Linear(2, 1, bias=False)
    state = {"actor.weight": torch.zeros(1, 2), "actor.bias": torch.zeros(1), "critic.weight": torch.zeros(1, 2)}
    with pytest.raises(panel.InputError, match="another version than this panel: they differ in actor.bias"):
        panel.with_actor_state(policy, state)
    del state["actor.bias"]
    panel.with_actor_state(policy, state)


@pytest.mark.parametrize(
    "trainer, algorithm, flags",
    [
        (ppo, "ppo", {}),
        (ppo, "ppo", dict(normalize_observations=False)),
        (ppo, "ppo", dict(bf16=True)),
        (sac, "sac", dict(network="mlp")),
        (sac, "sac", dict(network="layer_norm")),
        (sac, "sac", dict(network="flash", normalize_observations=False)),
    ],
)
def test_a_loaded_policy_acts_as_its_trainer_bit_for_bit(tmp_path, trainer, algorithm, flags):
    agent = save(tmp_path / "checkpoint.pt", trainer, algorithm, **flags)
    (subject,) = panel.load_subjects(panel.check_args(panel.Args((str(tmp_path / "checkpoint.pt"),), device="cpu")))
    obs = 3 * torch.randn(16, 4)
    assert torch.equal(subject.policy.act(obs), agent.act(obs))
    assert agent.act(obs).std() > 0


def test_an_agent_of_the_jax_trainer_acts_as_there(tmp_path):
    trainer = pytest.importorskip("ppo_mjx_jax")
    jax, jnp = trainer.jax, trainer.jnp
    args = trainer.resolve(trainer.Args(actor_hidden=(8, 8), critic_hidden=(8,), num_seeds=2))
    actor, keys = trainer.MLP((8, 8), 1, 1.0), jax.random.split(jax.random.PRNGKey(0), 2)
    network = jax.vmap(lambda key: actor.init(key, jnp.zeros((1, 4))))(keys)
    statistics = trainer.Statistics(jnp.array([[0.5, 0, 0, 1], [0, 2, 0, 0]]), jnp.full((2, 4), 0.3), jnp.ones(2))
    empty = dict.fromkeys(trainer.AgentState._fields, ())
    state = trainer.AgentState(**empty | dict(parameters={"actor": {"network": network}}, obs_statistics=statistics))
    trainer.save_checkpoint(tmp_path / "checkpoint.npz", args, state, dict(env_steps=7))
    obs = 3 * np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    for agent in (0, 1):
        given = panel.check_args(panel.Args((str(tmp_path / "checkpoint.npz"),), device="cpu", agent=agent))
        (subject,) = panel.load_subjects(given)
        one, moments = jax.tree.map(lambda x, agent=agent: x[agent], (network, statistics))
        expected = 3.0 * actor.apply(one, jnp.clip(moments.normalize(obs), -10, 10))  # the cart's force is within +-3 N
        np.testing.assert_allclose(subject.policy.act(torch.as_tensor(obs)).numpy(), expected, rtol=1e-5, atol=1e-5)
        assert (subject.label, subject.env_steps) == ("ppo_mjx", 7)
    with pytest.raises(panel.InputError, match="holds 2, numbered from 0"):
        panel.load_subjects(dataclasses.replace(given, agent=2))


def test_a_student_remembers_its_last_observations_oldest_first():
    policy = panel.DistilledPolicy((), 1, columns=[2, 0], privileged=False, history=2, gru_size=0)
    policy.actor[0].weight.data = torch.tensor([[1.0, 10.0, 100.0, 1000.0]])
    policy.obs_statistics.enabled = False
    policy.begin(1)
    seen = [policy.view(torch.tensor([[a, 9.0, b]]), torch.zeros(1, 3)) for a, b in ((1.0, 2.0), (3.0, 4.0))]
    assert policy.act(seen[0]).item() == 100 * 2 + 1000 * 1  # no past: zeros
    assert policy.act(seen[1]).item() == 1 * 2 + 10 * 1 + 100 * 4 + 1000 * 3
    policy.begin(1)
    assert policy.act(seen[0]).item() == 1200


@pytest.mark.parametrize("stage, network", [("teacher", "mlp"), ("student", "mlp"), ("finetune", "gru")])
def test_teacher_and_student_act_as_their_trainer(tmp_path, stage, network):
    trainer = pytest.importorskip("ppo_distill_teacher_student")
    env = vecsim_torch.make("Quadruped-Flat", 3, seed=1)
    small = dict(actor_hidden=(8,), critic_hidden=(8,), student_hidden=(8,), student_history=3, student_network=network)
    args = trainer.with_task_defaults(trainer.Args(env_id="Quadruped-Flat", device="cpu", run_dir="unused", **small))
    views = trainer.make_views(env, args)
    agent, view = (
        trainer.make_agent(stage, views, env.single_action_space, args),
        views["teacher" if stage == "teacher" else "student"],
    )
    agent.obs_statistics.mean.normal_()
    state = dict(algorithm="distill", stage=stage, env_id="Quadruped-Flat", args=dataclasses.asdict(args))
    state |= dict(agent=agent.state_dict(), groups={who: x.groups for who, x in views.items()})
    torch.save(state | dict(env_steps=1, versions={}), tmp_path / "checkpoint.pt")
    (subject,) = panel.load_subjects(panel.check_args(panel.Args((str(tmp_path / "checkpoint.pt"),), device="cpu")))
    (obs, info), (memory, fresh) = env.reset(seed=1), agent.blank(3)
    subject.policy.begin(3)
    for _ in range(4):
        action, memory = agent.act(view.of(obs, info["critic_obs"]), memory, fresh)
        torch.testing.assert_close(
            subject.policy.act(subject.policy.view(obs, info["critic_obs"])), action, rtol=0, atol=1e-6
        )
        obs, _, _, _, info = env.step(action)
        fresh = torch.zeros_like(fresh)
    assert subject.label == stage


# Rules, by hand -----------------------------------------------------------------------------------------------------------

TYPICAL = panel.Usual(episode_return=100.0, reward=1.0, saturation=0.1)
FELL = dict(success=False, survived=False, invalid=False, saturation_end=0.0, slump_seconds=0, slump_over=False)
FELL |= {"return": 10.0}
LASTED = FELL | dict(survived=True)
LABELLED = [  # what happened, what is blamed, did the twin succeed, label
    (LASTED | dict(success=True), "timing", True, ""),
    (FELL | dict(invalid=True), "timing", True, "evaluation"),
    (LASTED | dict(slump_seconds=2, slump_over=True), "timing", True, "late recovery"),
    (LASTED | dict(slump_seconds=2, slump_over=False), "timing", True, "timing"),
    (LASTED | dict(slump_seconds=1, slump_over=True), "timing", True, "timing"),
    (FELL | dict(slump_seconds=9, slump_over=True), "timing", True, "timing"),
    (LASTED | {"return": 80.0}, "timing", True, "reward"),
    (LASTED | {"return": 79.0}, "timing", True, "timing"),
    (FELL | {"return": 500.0}, "timing", True, "timing"),
    (FELL, "perception", True, "perception"),
    (FELL, "evaluation", True, "evaluation"),
    (FELL, "perception", False, "state"),
    (FELL | dict(saturation_end=0.5), "perception", False, "action"),
    (FELL | dict(saturation_end=0.5), "perception", True, "perception"),
    (FELL | dict(saturation_end=0.49), "perception", False, "state"),
]


@pytest.mark.parametrize("episode, blamed, twin_success, label", LABELLED)
def test_failure_labels(episode, blamed, twin_success, label):
    assert panel.failure_label(blamed, episode, twin_success, TYPICAL) == label


def test_every_label_can_be_given_and_is_documented():
    given = {panel.failure_label(p.blamed, FELL, True, TYPICAL) for p in panel.PERTURBATIONS.values()}
    assert given | {label for *_, label in LABELLED if label} == set(panel.LABELS)
    assert {label for key in panel.RULES for label in key.split(", ")} == set(panel.LABELS)
    assert {p.blamed for p in panel.PERTURBATIONS.values()} <= set(panel.LABELS)


def test_a_policy_that_always_saturates_is_not_blamed_for_it_and_one_without_success_has_no_usual_return():
    always = TYPICAL._replace(saturation=0.9)
    assert panel.failure_label("state", FELL | dict(saturation_end=1.0), False, always) == "state"
    never = panel.Usual(math.nan, math.nan, 0.0)
    assert panel.failure_label("state", LASTED | {"return": 1e9}, False, never) == "state"


@pytest.mark.parametrize(
    "windows, usual_reward, expected",
    [
        ([1, 1, 1], 1.0, (0, False)),
        ([1, 0.4, 0.4, 1, 0.4], 1.0, (2, True)),
        ([1, 0.4, 1, 0.4, 0.4], 1.0, (2, False)),
        ([0.5, 0.49, math.nan], 1.0, (1, False)),
        ([-1, -1, 0.9], 2.0, (3, False)),
        ([-1, -1, 1], 2.0, (2, True)),  # half the usual reward is no slump
        ([0, 0, 0], -1.0, (0, False)),
        ([0, 0, 0], math.nan, (0, False)),
    ],
)
def test_longest_slump(windows, usual_reward, expected):
    assert panel.longest_slump(np.array(windows, float), usual_reward) == expected


def test_windows_are_whole_seconds_of_an_episode_and_saturation_its_last():
    earned = torch.tensor([[1.0, 3.0, 5.0, 7.0, 9.0], [2.0, 4.0, 6.0, 0.0, 0.0]]).T
    windows = panel.window_means(earned, torch.tensor([5.0, 3.0]), second=2, count=3)
    np.testing.assert_array_equal(windows, [[2, 6, math.nan], [3, math.nan, math.nan]])
    ending, whole = panel.saturation(
        torch.tensor([[0.0, 1.0, 1.0, 0.0], [0.0, 0.5, 9.0, 9.0]]).T, torch.tensor([4.0, 2.0]), 3
    )
    np.testing.assert_allclose(ending, [2 / 3, 0.25])
    np.testing.assert_allclose(whole, [0.5, 0.25])


def test_usual_is_the_median_of_successes():
    cell = {"return": np.array([1.0, 30.0, 50.0]), "length": np.array([1.0, 10.0, 10.0])}
    cell |= dict(saturation=np.array([0.9, 0.1, 0.3]), success=np.array([False, True, True]))
    assert panel.usual([cell]) == panel.Usual(40.0, 4.0, 0.2)
    none = panel.usual([cell | dict(success=np.zeros(3, bool))])
    assert math.isnan(none.episode_return) and math.isnan(none.reward) and none.saturation == 0.3


# The bootstrap ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric, variance", [("success", 1.0), ("return", 1.195)])
def test_intervals_have_the_width_of_theory(metric, variance):
    """Of a normal sample: the variance of its mean is 1 / n, that of its interquartile mean 1.195 / n (Huber 1981)."""
    values = [NormalDist().inv_cdf((k + 0.5) / 1000) for k in range(1000)]
    middle, low, high = panel.estimate(np.array(values), metric, 4000)
    expected = 1.96 * math.sqrt(variance / 1000)
    assert middle == pytest.approx(0, abs=1e-9)
    assert high == pytest.approx(expected, rel=0.06) and low == pytest.approx(-expected, rel=0.06)


def test_middles_by_hand_and_intervals_that_repeat():
    values = np.array([100.0, 1, 2, 3, 4, 5, 6, 7])
    assert panel.estimate(values, "return", 100)[0] == 4.5 and panel.estimate(values, "unsafe", 100)[0] == 16
    assert panel.estimate(values, "return", 100) == panel.estimate(values, "return", 100)
    assert panel.estimate(np.full(9, 3.0), "return", 100) == (3, 3, 3)
    assert all(map(math.isnan, panel.estimate(np.array([1.0, math.nan]), "tracking", 100)))


def test_differences_are_paired_and_one_fall_makes_none():
    """Twins differ by noise about 0; then by 0.5 each; then one of them falls, which would move the mean by 90."""
    rng = np.random.default_rng(2)
    none = 100 * rng.standard_normal(100)
    fall = none + rng.standard_normal(100) + np.where(np.arange(100) == 7, -9000.0, 0.0)
    returns = {"none": none, "mass": none + rng.standard_normal(100), "gravity": none + 0.5, "push": fall}
    _, noise, shift, fall = panel.summarize(episodes(returns), 1000)
    assert [shift[f"return_change_from_none{end}"] for end in ("", "_low", "_high")] == pytest.approx([0.5] * 3)
    assert panel.verdict(shift, "return_change_from_none") == 1
    for row in (noise, fall):
        assert panel.verdict(row, "return_change_from_none") == 0
        assert row["return_change_from_none_high"] - row["return_change_from_none_low"] < 1


# Sentences ----------------------------------------------------------------------------------------------------------------


def summary_row(perturbation, change=0.0, success=0.0, width=1.0, **others):
    """A row of summary.csv whose changes have intervals of +-width, of success +-0.01 width."""
    row = dict(checkpoint="ppo", perturbation=perturbation, simulator=panel.PERTURBATIONS[perturbation].simulator, episodes=8)
    middles = {"return": 100 + change, "success": 0.5 + success, "return_change_from_none": change}
    middles |= {"success_change_from_none": success}
    for name, middle in middles.items():
        half = width * (0.01 if "success" in name else 1.0)
        row |= {name: middle, f"{name}_low": middle - half, f"{name}_high": middle + half}
    return row | others


def episodes(returns):
    """Rows of episodes.csv with these returns by perturbation."""
    rows = []
    for name, values in returns.items():
        for k, value in enumerate(values):
            row = dict.fromkeys(panel.MEASURED, 0.0) | dict(checkpoint="ppo", perturbation=name, seed=3, episode=k)
            rows.append(row | {"return": value, "label": "", "success": True})
    return rows


@pytest.mark.parametrize(
    "change, success, worse", [(-5, 0, True), (5, 0, False), (0, -0.2, True), (0, 0.2, False), (-0.5, 0, False)]
)
def test_worse_is_less_return_or_less_success(change, success, worse):
    row = summary_row("push", change, success)
    assert panel.is_worse(row) == worse
    subject = panel.Subject("ppo", "", "Hopper-v5", {}, None, 0, "", {})
    summary = [summary_row("none", width=0.0), summary_row("mass", 30, 0.3), row]
    rows = episodes({"none": [1.0, 2.0], "mass": [2.0, 3.0], "push": [3.0, 4.0]})
    text = "\n".join(panel.headline([subject], summary, rows))
    assert ("is weakest under push (pushed by 1 m/s" in text) == worse
    assert ("no drop of return or success is shown under any perturbation" in text) != worse


def test_the_weakest_is_the_lowest_success_of_those_that_are_worse():
    subject = panel.Subject("ppo", "", "Hopper-v5", {}, None, 0, "", {})
    summary = [summary_row("none", width=0.0), summary_row("mass", -20, -0.1), summary_row("push", -9, -0.3)]
    summary.append(summary_row("gravity", -60, 0.0))
    text = "\n".join(panel.headline([subject], summary, episodes({"none": [1.0]})))
    assert "is weakest under push (" in text and "success 20% [19, 21], return changed by -9 [-10, -8]" in text


def test_verdicts_on_another_simulator_take_return_and_success_and_no_ceiling():
    ceiling, usual = ({"none": x, "mujoco_c": x} for x in ([1000.0, 1000.0], [1.0, 2.0]))
    for row, returns, words in (
        (summary_row("mujoco_c"), usual, "no difference shown between MuJoCo C and vecsim"),
        (summary_row("mujoco_c", change=5), usual, "MuJoCo C differs from vecsim"),
        (summary_row("mujoco_c", success=-0.3), usual, "MuJoCo C differs from vecsim"),
        (summary_row("mujoco_c", success=-0.3), ceiling, "MuJoCo C differs from vecsim"),
        (summary_row("mujoco_c", width=0.0), ceiling, "MuJoCo C and vecsim are both at a return of 1,000 in every episode"),
    ):
        assert panel.swap_words(row, episodes(returns)).startswith(words)


def test_equal_returns_at_the_limit_are_not_called_unchanged():
    subject = panel.Subject("ppo", "", "Hopper-v5", {}, None, 0, "", {})
    rows = episodes({"none": [5.0, 5.0], "mass": [5.0, 5.0], "sparse_reward": [5.0, 5.0]})
    summary = [summary_row(name, width=0.0) for name in ("none", "mass", "sparse_reward")]
    text = "\n".join(panel.headline([subject], summary, rows))
    assert "every episode kept its return and length under mass." in text
    assert "no episode changed at all under sparse reward" in text
    rows[-1]["saturation"] = 0.5
    assert "at all" not in "\n".join(panel.headline([subject], summary, rows))


# The panel, end to end ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evidence(checkpoints, tmp_path_factory):
    """Both checkpoints under five conditions, of which one does not apply to the task."""

    def without_pushes(subject, name, args, open_simulator=panel.open_simulator):
        if name == "push":
            raise ValueError("push has nothing to vary")
        return open_simulator(subject, name, args)

    out = tmp_path_factory.mktemp("evidence") / "two"
    names = ("observation_noise", "push", "sparse_reward", "mujoco_c")
    words = [*checkpoints, *SMALL, "--perturbations", *names, "--worst", "2", "--no-video", "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(panel, "open_simulator", without_pushes)
        return panel.evaluate(panel.parse_args(words))


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_folder_can_be_read_without_running_anything(evidence):
    assert {path.name for path in evidence.iterdir()} == set(
        "record.json episodes.csv summary.csv worst.npz scores.png failures.png worst.png postmortem.md".split()
    )
    record, page = json.loads((evidence / "record.json").read_text()), (evidence / "postmortem.md").read_text()
    words = "observation action reward termination success safety_constraint time_limit control_step options"
    assert set(record["task"]) == set(words.split())
    assert (record["task"]["time_limit"], record["task"]["options"]) == ("6 steps, 0.24 s", "the task's own")
    assert record["task"]["control_step"] == "0.04 s, 2 physics steps"
    assert record["checkpoints"][0]["reads"] == ["qpos", "qvel"] and not record["checkpoints"][0]["reads_privileged"]
    assert record["simulator"] == panel.simulator_hash() and len(record["simulator"]) == 64
    assert "push has nothing to vary" in record["left_out"]["push"] and "Left out: push" in page
    assert record["left_out"]["mass"] == "not asked for" and "Left out: action delay; friction; mass" in page
    assert [c["label"] for c in record["checkpoints"]] == ["ppo", "sac"]
    assert record["hardware"] and record["versions"]["torch"] and record["configuration"]["seeds"] == [3, 7]
    for path in evidence.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_episodes_add_up_and_the_two_policies_get_what_they_deserve(evidence):
    rows, summary = rows_of(evidence / "episodes.csv"), rows_of(evidence / "summary.csv")
    conditions = ["none", "observation_noise", "sparse_reward", "mujoco_c"]
    assert Counter((r["checkpoint"], r["perturbation"], r["seed"]) for r in rows) == {
        (label, name, seed): 3 for label in ("ppo", "sac") for name in conditions for seed in "37"
    }
    assert [(r["checkpoint"], r["perturbation"]) for r in summary if r["checkpoint"] == "ppo"] == [
        ("ppo", n) for n in conditions
    ]
    for row in rows:
        still = row["checkpoint"] == "ppo"
        assert (row["success"] == "1") == still == (row["label"] == ""), row
        assert float(row["length"]) == STEPS if still else float(row["length"]) < STEPS
        assert row["label"] == ("" if still else "state")  # the cart is pushed with all its force, but so it is always
    for mine in summary:
        own = [
            float(r["return"])
            for r in rows
            if (r["checkpoint"], r["perturbation"]) == (mine["checkpoint"], mine["perturbation"])
        ]
        assert float(mine["return"]) == pytest.approx(np.mean(sorted(own)[1:-1]), rel=1e-4)  # of six, a quarter is one
        assert float(mine["return_low"]) <= float(mine["return"]) <= float(mine["return_high"])
    page = (evidence / "postmortem.md").read_text()
    assert "**sac** against **ppo**" in page and "less under" in page
    assert "no episode changed at all under sparse reward" in page
    assert "every episode kept its return and length under observation noise" in page
    assert "**ppo**: MuJoCo C and vecsim are both at a return of 6 in every episode" in page
    assert "no difference shown" not in page


def test_worst_traces_are_the_episodes_of_the_table(evidence):
    rows = {
        f"{r['checkpoint']}/{r['perturbation']}/{r['seed']}/{r['episode']}": r
        for r in rows_of(evidence / "episodes.csv")
    }
    with np.load(evidence / "worst.npz") as file:
        names = {key.rsplit("/", 1)[0] for key in file.files}
        assert Counter(name.split("/")[0] for name in names) == {"ppo": 2, "sac": 2}
        for name in names:
            length = int(float(rows[name]["length"]))
            assert file[f"{name}/qpos"].shape == (length, 2) and file[f"{name}/obs"].shape == (length, 4)
            assert file[f"{name}/reward"].sum() == pytest.approx(float(rows[name]["return"]))
            assert np.abs(file[f"{name}/qpos"][0]).max() <= 0.01  # begins where Gymnasium's resets begin
            np.testing.assert_allclose(file[f"{name}/action"][:, 0], 3.0 if name.startswith("sac") else 0.0, atol=1e-3)
    assert "sibling" not in (evidence / "postmortem.md").read_text()  # each replay returned what the panel saw


def test_the_same_panel_for_both_checkpoints_and_the_same_again(evidence, checkpoints, tmp_path):
    again = panel.evaluate(
        panel.parse_args(
            [checkpoints[1], *SMALL, "--perturbations", "none", "--no-video", "--out", str(tmp_path / "b")]
        )
    )
    first, second = (json.loads((folder / "record.json").read_text()) for folder in (evidence, again))
    for place, digest in second["initial_states"].items():
        assert first["initial_states"][place] == digest  # of another checkpoint, in another run
    states = set(first["initial_states"].values())
    assert len(states) == 2, "two seeds, whatever the condition and the simulator"
    theirs = [r for r in rows_of(evidence / "episodes.csv") if (r["checkpoint"], r["perturbation"]) == ("sac", "none")]
    assert rows_of(again / "episodes.csv") == theirs


def test_the_worst_are_failures_of_each_kind_first():
    def row(k, label, condition):
        return {"episode": k, "return": float(k), "label": label, "perturbation": condition, "success": not label}

    rows = [
        row(0, "", "none"),
        row(1, "state", "mass"),
        row(2, "state", "mass"),
        row(3, "state", "push"),
        row(4, "timing", "mass"),
    ]
    for count, expected in ((1, [1]), (2, [1, 4]), (3, [1, 3, 4]), (4, [1, 2, 3, 4]), (9, [1, 2, 3, 4])):
        assert [r["episode"] for r in panel.choose_worst(rows, count)] == expected
    assert [r["episode"] for r in panel.choose_worst([row(5, "", "none"), row(2, "", "mass")], 1)] == [2]


@pytest.mark.parametrize("place", [("b", "none", 3), ("a", "push", 3)])
def test_starts_that_differ_between_checkpoints_or_perturbations_are_a_defect(place):
    cells = {("a", "none", 3): dict(start=np.array("1")), ("a", "none", 7): dict(start=np.array("2"))}
    panel.check_same_starts(cells | {place: dict(start=np.array("1")), ("a", "mujoco_c", 3): dict(start=np.array("3"))})
    with pytest.raises(RuntimeError, match=f"{place[0]} began {place[1]}, seed 3, .* than a began none"):
        panel.check_same_starts(cells | {place: dict(start=np.array("2"))})


@pytest.mark.parametrize("name", ["mujoco_c", "mjx"])
def test_simulators_agree_step_by_step(tmp_path, name):
    """The pendulum under a policy that tilts it: what is left is float32."""
    if name == "mjx":
        jax = pytest.importorskip("ppo_mjx_jax").jax
        jax.config.update("jax_default_matmul_precision", None)
    save(tmp_path / "checkpoint.pt", ppo, "ppo", actor_hidden=(4,), log_std_init=0.0)
    given = panel.Args((str(tmp_path / "checkpoint.pt"),), episodes=2, device="cpu")
    args = panel.check_args(
        dataclasses.replace(given, integrator="euler" if name == "mjx" else "mjcf")
    )  # Euler compiles sooner
    (subject,) = panel.load_subjects(args)
    safety = panel.CONTRACTS[subject.env_id].safety
    results = []
    for condition in ("none", name):
        simulator = panel.open_simulator(subject, condition, args)
        results.append(panel.run_batch(subject.policy, simulator, safety, seed=5, watched=(0, 1)))
    assert name != "mjx" or jax.config.jax_default_matmul_precision == "highest", "a GPU would take TF32"
    (mine, trace), (theirs, other) = results
    np.testing.assert_array_equal(mine["start"], theirs["start"])
    for key in ("return", "length", "survived", "terminated"):
        np.testing.assert_array_equal(mine[key], theirs[key])
    for key in ("qpos", "qvel", "obs", "action"):
        np.testing.assert_allclose(trace[key], other[key], rtol=1e-4, atol=1e-5)


def quadruped(policy=None, **options):
    """A subject of random weights that trots nowhere, and its panel."""
    torch.manual_seed(0)
    policy = policy or panel.Policy(panel.mlp([45, 8, 12], 0.5), 12, 45, normalizes=False)
    subject = panel.Subject("ppo", "", "Quadruped-Flat", dict(max_episode_steps=8) | options, policy, 0, "", {})
    return subject, panel.check_args(panel.Args(("x",), episodes=3, device="cpu", solver_iterations=2))


def test_every_condition_of_a_quadruped_starts_alike_and_gets_the_same_commands():
    """Past a change of command, which comes in other steps under longer ones."""
    subject, args = quadruped(resample_seconds=0.06)
    safety, first, commands, starts = panel.CONTRACTS[subject.env_id].safety, {}, {}, {}
    for name in ("none", "push", "observation_noise", "mass", "action_delay", "timestep", "mujoco_c"):
        simulator = panel.open_simulator(subject, name, args)
        cell, traces = panel.run_batch(subject.policy, simulator, safety, seed=5, watched=(0, 1, 2))
        starts[name] = cell["start"]
        commands[name] = traces["obs"][:, :, simulator.env.observation_slices["command"]]
        first[name] = traces["obs"][0]
    assert starts["none"].shape == (3, 19 + 18 + 3 + 1) and starts["none"][:, -4:].any()
    assert len(np.unique(commands["none"], axis=0)) >= 3
    for name, start in starts.items():
        np.testing.assert_array_equal(start, starts["none"], name)
        assert np.array_equal(first[name], first["none"]) == (name != "observation_noise"), name
        steps = {"timestep": 2, "mujoco_c": 2}.get(name, 8)
        np.testing.assert_array_equal(commands[name][:steps], commands["none"][:steps], name)


def test_noise_is_for_policies_that_see_it(tmp_path):
    """Noise changes what every subject sees that runs under it; one that reads privileged observations runs none."""
    env = vecsim_torch.make("Quadruped-Flat", 1)
    blind = panel.DistilledPolicy((8,), 12, list(range(45)), privileged=False, history=1, gru_size=0)
    columns = list(range(env.single_critic_space.shape[0]))
    teacher = panel.DistilledPolicy((8,), 12, columns, privileged=True, history=1, gru_size=0)
    subjects = [quadruped(teacher)[0]._replace(label="teacher"), quadruped(blind)[0]._replace(label="student")]
    args = dataclasses.replace(quadruped()[1], perturbations=("none", "observation_noise"), seeds=(3, 7))
    cells, left_out = panel.run_panel(subjects, args, tmp_path)
    ran = {label for label, name, _ in cells if name == "observation_noise"}
    assert ran == {"student"} and "privileged" in left_out.pop("observation_noise, teacher")
    assert set(left_out) == set(panel.PERTURBATIONS) - {"none", "observation_noise"}
    assert set(left_out.values()) == {"not asked for"}
    for subject in subjects:
        safety, seen = panel.CONTRACTS[subject.env_id].safety, []
        for name in args.perturbations:
            simulator = panel.open_simulator(subject, name, args)
            seen.append(panel.run_batch(subject.policy, simulator, safety, seed=5, watched=(0,))[1]["obs"][0])
        assert np.array_equal(*seen) == (subject.label not in ran)

    rows = panel.episode_rows(subjects, cells, args.seeds)
    summary = panel.summarize(rows, 100)
    (noisy,) = [row for row in summary if row["perturbation"] == "observation_noise"]
    assert math.isnan(noisy["return_beyond_teacher"]) and not math.isnan(noisy["return_change_from_none"])
    (line,) = [line for line in panel.headline(subjects, summary, rows) if "against" in line]
    assert "noise" not in line and "under none" in line
    record = dict(env_id="Quadruped-Flat", configuration=dict(seeds=[3, 7], episodes=3), hardware="", command="", task={})
    record |= dict(film="", left_out={"observation_noise, teacher": "reason"})
    page = panel.postmortem(record, summary, rows, [], subjects)
    assert "| observation noise | not run | " in page and "Left out: observation noise, teacher: reason." in page
    panel.plot_scores(tmp_path / "scores.png", summary, "")
    panel.plot_failures(tmp_path / "failures.png", rows, "")


def test_a_quadruped_in_mujoco_c_repeats():
    subject, args = quadruped(resample_seconds=0.06)
    safety = panel.CONTRACTS[subject.env_id].safety
    simulators = [panel.open_simulator(subject, "mujoco_c", args) for _ in range(2)]
    (one, trace), (other, again) = (
        panel.run_batch(subject.policy, simulator, safety, seed=5, watched=(0, 2)) for simulator in simulators
    )
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], name)
    for name in trace:
        np.testing.assert_array_equal(trace[name], again[name], name)
    command = trace["obs"][:, :, simulators[0].env.observation_slices["command"]]
    assert not np.array_equal(command[-1, 0], command[-1, 1]), "each episode draws its own later commands"


@pytest.mark.parametrize("env_id", ["InvertedPendulum-v5", "Quadruped-Flat"])
def test_the_integrator_is_that_of_mujoco_c_too(env_id):
    subject = panel.Subject("ppo", "", env_id, {}, None, 0, "", {})
    for name, number in (("mjcf", None), ("euler", 0), ("rk4", 1), ("implicitfast", 3)):
        args = panel.check_args(panel.Args(("x",), episodes=2, device="cpu", integrator=name))
        simulator = panel.open_simulator(subject, "mujoco_c", args)
        for robot in (robot.unwrapped for robot in simulator.robots):
            assert robot.model.opt.integrator == (simulator.env.mj_model.opt.integrator if number is None else number)


def test_more_episodes_than_environments_take_several_batches(checkpoints):
    args = panel.check_args(
        panel.Args(tuple(checkpoints[1:]), episodes=3, num_envs=2, integrator="euler", device="cpu")
    )
    (subject,) = panel.load_subjects(args)
    cell = panel.run_cell(subject, panel.open_simulator(subject, "none", args), 3, args)
    assert cell["return"].shape == (3,) and cell["windows"].shape[0] == 3
    other = panel.run_cell(subject, panel.open_simulator(subject, "none", args), 7, args)
    assert str(cell["start"]) != str(other["start"])


def test_a_task_that_a_simulator_lacks_is_left_out(tmp_path):
    subject = panel.Subject("teacher", "", "Quadruped-Rough", {}, None, 0, "", {})
    for name, words in (
        ("mujoco_c", "Gymnasium has no Quadruped-Rough"),
        ("mjx", "ppo_mjx_jax.py has no Quadruped-Rough"),
    ):
        with pytest.raises((ValueError, ImportError), match=words):
            panel.open_simulator(subject, name, panel.Args(episodes=1))


def test_contracts_are_of_every_task_and_success_is_what_they_say():
    assert list(panel.CONTRACTS) == list(vecsim_torch.TASKS)
    assert panel.success_words(panel.CONTRACTS["Hopper-v5"]).endswith("at a mean forward speed of at least 1 m/s")
    assert "0.3 m/s" in panel.success_words(panel.CONTRACTS["Quadruped-Flat"])

    class Robots:
        seconds, limit = 0.5, 4

        def reset(self, seed):
            self.age = 0
            return (torch.zeros(3, 1),) * 2

        def start(self):
            return torch.zeros(1, 3)

        def state(self):
            return torch.zeros(1, 3), torch.tensor([[0.0, 0.0, 25.0 * (self.age == 1)]])

        def step(self, action):
            self.age += 1
            one, no = torch.ones(3), torch.zeros(3, dtype=torch.bool)
            fell = torch.tensor([False, self.age == 2, False])
            speed = torch.tensor([0.9, 2.0, 1.1])
            return panel.Step(
                torch.zeros(3, 1), torch.zeros(3, 1), one, one, fell, no | (self.age == 4), no, speed, one * math.nan
            )

    policy = panel.Policy(torch.nn.Linear(1, 1), 1, 1, normalizes=False)
    subject = panel.Subject("ppo", "", "Hopper-v5", {}, policy, 0, "", {})
    contract = panel.CONTRACTS["Hopper-v5"]._replace(safety=panel.SafetyLimit("", "qvel", slice(0, None), 20.0))
    contracts, panel.CONTRACTS = panel.CONTRACTS, {"Hopper-v5": contract}
    try:
        cell = panel.run_cell(subject, Robots(), 3, panel.Args(episodes=3))
    finally:
        panel.CONTRACTS = contracts
    np.testing.assert_array_equal(cell["success"], [False, False, True])  # too slow; fell; neither
    np.testing.assert_array_equal(cell["survived"], [True, False, True])
    np.testing.assert_array_equal(cell["return"], [4, 2, 4])
    np.testing.assert_allclose(cell["speed"], [0.9, 2.0, 1.1], rtol=1e-6)
    np.testing.assert_array_equal(cell["unsafe"], [0, 0, 0.25])
    np.testing.assert_array_equal(cell["seconds"], [2, 1, 2])


# Nothing lost -------------------------------------------------------------------------------------------------------------


def test_a_full_disk_keeps_the_finished_cells_and_the_panel_goes_on(checkpoints, tmp_path, capsys, monkeypatch):
    out, savez, ran, run_cell = tmp_path / "out", np.savez, [], panel.run_cell
    words = [checkpoints[0], *SMALL, "--perturbations", "none", "--no-video", "--out", out]

    def counted(*args):
        ran.append(args[2])
        return run_cell(*args)

    def full(path, **arrays):
        if len(ran) == 2:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        savez(path, **arrays)

    monkeypatch.setattr(panel, "run_cell", counted)
    monkeypatch.setattr(np, "savez", full)
    status, line = run(capsys, *words)
    assert (
        status == 1 and "No space left on device" in line and "1 finished cells are kept" in line and "\n" not in line
    )
    assert sorted(path.name for path in (out / "cells").iterdir()) == ["lock", "panel.json", "ppo--none--3.npz"]
    monkeypatch.setattr(np, "savez", savez)
    status, line = run(capsys, checkpoints[0], *SMALL, "--episodes", "4", "--no-video", "--out", out)
    assert status == 2 and "another panel (episodes differs)" in line
    assert run(capsys, *words)[0] == 0
    assert ran == [3, 7, 7], "the finished cell is not run again"
    assert not (out / "cells").exists() and len(rows_of(out / "episodes.csv")) == 6


def test_an_interrupted_panel_says_how_to_go_on(checkpoints, tmp_path, capsys, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(panel, "run_cell", interrupted)
    status, line = run(capsys, checkpoints[0], *SMALL, "--out", tmp_path / "out")
    assert status == 1 and line == f"error: interrupted; 0 finished cells are kept; go on with --out {tmp_path / 'out'}"


def no_renderer(path, row):
    raise RuntimeError("no GL\ncontext")


def aborted(path, row):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("end, reason", [(aborted, "terminated abruptly"), (no_renderer, "no GL context")])
def test_without_a_renderer_the_film_is_one_line(tmp_path, monkeypatch, end, reason):
    """Also where OpenGL takes its process down with it."""
    monkeypatch.setattr(panel, "film", end)
    monkeypatch.setenv("MUJOCO_GL", "egl")
    name, words = panel.try_film(tmp_path, {})
    assert name is None and words.startswith("no film: MuJoCo cannot draw here with MUJOCO_GL=egl (")
    assert reason in words and "\n" not in words


def of_a_fall(seconds=0.3):
    """A traced episode of a Hopper that sinks."""
    env = vecsim_torch.make("Hopper-v5", 1)
    qpos = np.tile(env.mj_model.qpos0, (round(seconds / 0.008), 1))
    qpos[:, 1] -= np.linspace(0, 0.8, len(qpos))
    place = dict(checkpoint="ppo", perturbation="none", seed=3, episode=0)
    return place | dict(scene=env.mj_model, second=0.008, trace=dict(qpos=qpos))


def test_a_film_is_drawn(tmp_path):
    from imageio.v2 import mimread

    name, words = panel.try_film(tmp_path, of_a_fall())
    if name is None:
        pytest.skip(f"nothing to draw with: {words}")
    assert words == "the last 0.3 s of ppo/none/3/0, 7 times slower"
    frames = np.array(mimread(tmp_path / name))
    assert frames.shape[1:3] == (360, 480) and len(frames) >= 30
    assert frames[0].std() > 5 and np.abs(frames[0].astype(float) - frames[-1]).mean() > 1, "it sinks in sight"


def encoder_fails(path, row):
    def write(partial):
        partial.write_bytes(b"half")
        raise OSError("encoder error -2\nwhen writing")  # as Pillow and imageio-ffmpeg have it: no number, no file

    panel.write_film(path, write)


def test_a_film_that_cannot_be_written_is_not_blamed_on_the_renderer(tmp_path, monkeypatch):
    monkeypatch.setattr(panel, "film", encoder_fails)
    name, words = panel.try_film(tmp_path, {})
    assert name is None and words.startswith("no film: it cannot be written (") and "encoder error -2 when" in words
    full = shutil.disk_usage(tmp_path)._replace(free=4096)
    monkeypatch.setattr(panel.shutil, "disk_usage", lambda folder: full)
    with pytest.raises(OSError) as caught:
        panel.try_film(tmp_path, {})
    assert caught.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


def test_a_full_disk_at_the_film_keeps_the_cells(checkpoints, tmp_path, capsys, monkeypatch):
    words = [checkpoints[0], *SMALL, "--perturbations", "none", "--out", tmp_path / "out"]
    full, usage = shutil.disk_usage(tmp_path)._replace(free=4096), shutil.disk_usage
    monkeypatch.setattr(panel, "film", encoder_fails)
    monkeypatch.setattr(panel.shutil, "disk_usage", lambda folder: full)
    status, line = run(capsys, *words)
    assert status == 1 and "No space left on device" in line and "2 finished cells are kept" in line
    monkeypatch.setattr(panel.shutil, "disk_usage", usage)
    monkeypatch.setattr(panel, "run_cell", None)  # no cell runs again
    assert run(capsys, *words)[0] == 0
    assert "no film: it cannot be written" in (tmp_path / "out" / "postmortem.md").read_text()


def test_a_disk_that_was_full_from_the_start_can_be_used_later(checkpoints, tmp_path, capsys, monkeypatch):
    words = [checkpoints[0], *SMALL, "--perturbations", "none", "--no-video", "--out", tmp_path / "out"]

    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(panel, "write_text", full)
        assert run(capsys, *words)[0] == 1
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["cells", "lock"]
    assert run(capsys, *words)[0] == 0
    (tmp_path / "other" / "cells").mkdir(parents=True)
    (tmp_path / "other" / "cells" / "mine.txt").write_text("")
    status, line = run(capsys, *words[:-1], tmp_path / "other")
    assert status == 2 and "holds something else already" in line


# Refusals -----------------------------------------------------------------------------------------------------------------


def flipped(content, array):
    """The bytes of a file, with one bit of an array in it flipped."""
    place, content = content.index(array.tobytes()), bytearray(content)
    content[place + 5] ^= 1
    return content


@pytest.fixture(scope="module")
def bad(checkpoints, tmp_path_factory):
    """Files and folders that the panel must refuse, by name."""
    folder = tmp_path_factory.mktemp("bad")
    whole = open(checkpoints[0], "rb").read()
    (folder / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    statistics = torch.load(checkpoints[0], weights_only=True)["agent"]["obs_statistics.mean"]
    (folder / "flipped.pt").write_bytes(flipped(whole, statistics.numpy()))
    arrays = np.linspace(0, 1, 50)
    np.savez(folder / "whole.npz", header="{}", arrays=arrays)
    (folder / "flipped.npz").write_bytes(flipped((folder / "whole.npz").read_bytes(), arrays))
    (folder / "empty.npz").write_bytes(b"")
    torch.save([1, 2], folder / "list.pt")
    checkpoint = torch.load(checkpoints[0], weights_only=True)
    torch.save(checkpoint | dict(env_id="Swimmer-v5"), folder / "gone.pt")
    torch.save(checkpoint | dict(algorithm="td3"), folder / "td3.pt")
    torch.save(checkpoint | dict(agent={}), folder / "hollow.pt")
    strange = checkpoint["args"] | dict(env_kwargs={"gravity_on_mars": True})
    torch.save(checkpoint | dict(args=strange), folder / "strange.pt")
    torch.save(dict(algorithm="ppo"), folder / "bare.pt")
    torch.save({name: x for name, x in checkpoint.items() if name != "versions"}, folder / "versions.pt")
    torch.save({name: x for name, x in checkpoint.items() if name != "env_steps"}, folder / "env_steps.pt")
    torch.save(checkpoint | dict(args={}), folder / "no_args.pt")
    of_student = dict(student_network="mlp", student_hidden=[8], student_history=1, env_kwargs={"wings": 2})
    student = dict(algorithm="distill", stage="student", env_id="Quadruped-Flat", args=of_student, groups={"student": {}})
    torch.save(checkpoint | student, folder / "student.pt")
    save(folder / "hopper.pt", ppo, "ppo", env_id="Hopper-v5")
    save(folder / "longer.pt", ppo, "ppo", env_kwargs={"max_episode_steps": STEPS + 1})
    (folder / "taken").mkdir()
    (folder / "taken" / "notes.txt").write_text("mine")
    return folder


@pytest.mark.parametrize(
    "words, rule",
    [
        ([], "give at least one checkpoint"),
        (["{bad}/nothing.pt"], "nothing.pt does not exist"),
        (["{bad}/" + 300 * "x"], "cannot be read"),
        (["{bad}/truncated.pt"], "cannot be read; is it damaged?"),
        (["{bad}/flipped.pt"], "differs from its checksum"),
        (["{bad}/flipped.npz"], "arrays.npy differs from its checksum"),
        (["{good}", "--out", ""], "out is empty"),
        (["{bad}/empty.npz"], "cannot be read; is it damaged?"),
        (["{bad}/list.pt"], "of no trainer that the panel knows"),
        (["{bad}/td3.pt"], "algorithm 'td3'"),
        (["{bad}/gone.pt"], "'Swimmer-v5', which is no task here; there are InvertedPendulum-v5"),
        (["{bad}/hollow.pt"], "written by another version of its trainer"),
        (["{bad}/strange.pt"], "unknown option 'gravity_on_mars'"),
        (["{bad}/student.pt"], "unknown option 'wings' of Quadruped-Flat"),
        (["{bad}/bare.pt"], "bare.pt lacks env_id, args, env_steps, versions"),
        (["{bad}/versions.pt"], "versions.pt lacks versions"),
        (["{bad}/env_steps.pt"], "env_steps.pt lacks env_steps"),
        (["{bad}/no_args.pt"], "written by another version of its trainer"),
        (["{bad}/taken"], "taken is a folder; give a file in it"),
        (["{good}", "{bad}/hopper.pt"], "one panel, one task"),
        (["{good}", "{bad}/longer.pt"], "one panel, one task"),
        (["{good}", "--perturbations", "earthquake"], "unknown perturbation 'earthquake'; choose from none"),
        (["{good}", "--seeds", "3", "3"], "no two alike"),
        (["{good}", "--seeds", "-1"], "all >= 0"),
        (["{good}", "--episodes", "1"], "episodes = 1 must be >= 2"),
        (["{good}", "--resamples", "9"], "resamples = 9 must be >= 100"),
        (["{good}", "--agent", "-1"], "agent = -1 must be >= 0"),
        (["{good}", "--device", "cuda:99"], "cuda"),
        (["{good}", "--out", "{bad}/taken"], "holds something else already"),
        (["{good}", "--out", "{bad}/list.pt"], "holds something else already"),
        (["{good}", "--nonsense"], "nonsense"),
    ],
)
def test_bad_input_gets_one_line_and_status_2(words, rule, bad, checkpoints, capsys, tmp_path):
    words = [word.format(bad=bad, good=checkpoints[0]) for word in words]
    out = [] if "--out" in words else ["--out", tmp_path / "out"]
    status, line = run(capsys, *words, *out)
    assert status == 2 and line.startswith("error: ") and "\n" not in line and rule in line
    assert not list(tmp_path.glob("out/*.csv")) and (bad / "taken" / "notes.txt").read_text() == "mine"


def test_a_folder_in_use_is_refused(checkpoints, tmp_path, capsys):
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "panel.json").write_text("{}")
    with (tmp_path / "cells" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status, line = run(capsys, checkpoints[0], *SMALL, "--out", tmp_path)
    assert status == 2 and "in use by a panel that is running" in line


def test_a_finished_folder_is_never_written_over(evidence, checkpoints, capsys):
    before = (evidence / "record.json").read_text()
    status, line = run(capsys, *checkpoints, *SMALL, "--out", evidence)
    assert status == 2 and "a finished panel" in line and (evidence / "record.json").read_text() == before


def test_every_flag_acts():
    source = inspect.getsource(panel)
    for field in dataclasses.fields(panel.Args):
        by_name = (
            field.name in "episodes num_envs integrator solver_iterations agent".split()
        )  # also in the fingerprint
        assert f"args.{field.name}" in source, field.name
        assert not by_name or re.search(rf"options = \"[^\"]*\b{field.name}\b", source), field.name
    quick = panel.check_args(panel.Args(("x",), quick=True, device="cpu"))
    assert quick.episodes == 8 and not quick.video and quick.perturbations == tuple(panel.PERTURBATIONS)
    slow = panel.check_args(panel.Args(("x",), perturbations=("mass",), device="cpu"))
    assert slow.episodes == 64 and slow.video and slow.perturbations == ("none", "mass") and slow.compile is False
