"""The panel: policies act as in their trainers, labels and intervals by hand, one line for each refusal."""

from __future__ import annotations

import dataclasses
import errno
import inspect
import json
import math
import re
from pathlib import Path
from statistics import NormalDist
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

pd = pytest.importorskip("pandas")
pytest.importorskip("tabulate")

import eval_panel as panel  # noqa: E402
import ppo_gpu_torch as ppo  # noqa: E402
import sac_gpu_torch as sac  # noqa: E402
import vecsim_torch  # noqa: E402

STEPS = 6  # of an episode: enough for a fall here and a time limit there
PENDULUM = dict(env_id="InvertedPendulum-v5", options=dict(max_episode_steps=STEPS))


def save(path, trainer, algorithm, env_id="InvertedPendulum-v5", bias=None, **flags):
    """Write a checkpoint of random weights with the fields that the trainer writes; return the trainer's agent.

    bias: makes the last layer give this whatever the observation is."""
    torch.manual_seed(1)
    flags = dict(actor_hidden=(8, 8), critic_hidden=(8,), env_kwargs={"max_episode_steps": STEPS}) | flags
    args = trainer.Args(env_id=env_id, **flags)
    env = vecsim_torch.make(env_id, 1, **args.env_kwargs)
    agent = trainer.Agent(env.single_observation_space.shape[0], None, env.single_action_space, args)
    agent.obs_statistics.mean.normal_()
    agent.obs_statistics.variance.uniform_(0.5, 2.0)
    if bias is not None:
        last = [x for name, x in agent.named_parameters() if re.fullmatch(r"actor\.(head|4)\.(weight|bias)", name)]
        for x in last:
            x.data.fill_(bias if x.ndim == 1 else 0.0)
    state = dict(algorithm=algorithm, env_id=env_id, args=dataclasses.asdict(args), agent=agent.state_dict())
    torch.save(state | dict(env_steps=1, versions=vecsim_torch.versions()), path)
    return agent


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two policies of one task: one that does nothing, one that pushes the cart to one side until the pole falls."""
    folder = tmp_path_factory.mktemp("checkpoints")
    save(folder / "still.pt", ppo, "ppo", bias=0.0)
    save(folder / "pushes.pt", sac, "sac", bias=20.0)
    return [str(folder / "still.pt"), str(folder / "pushes.pt")]


def run(capsys, monkeypatch, *words):
    """Exit status and standard error."""
    monkeypatch.setattr(panel.sys, "argv", ["eval_panel.py", *map(str, words)])
    return panel.main(), capsys.readouterr().err.strip()


SMALL = ("--seeds", "3", "7", "--episodes", "3", "--integrator", "euler", "--device", "cpu", "--resamples", "100")
SMALL += ("--no-compile",)


def subject_of(act, label="ppo", env_id="InvertedPendulum-v5", options=PENDULUM["options"], observes="obs"):
    return panel.Subject(label, "", env_id, options, act, observes, 0, label, {})


def load(path, **flags):
    (subject,) = panel.load_subjects(panel.check_args(panel.Args((str(path),), device="cpu", compile=False, **flags)))
    return subject


# Policies


@pytest.mark.parametrize("trainer, algorithm, flags", [
    (ppo, "ppo", dict(bf16=True)),
    (sac, "sac", dict(network="layer_norm")),
])  # fmt: skip
def test_a_loaded_policy_acts_as_its_trainer_bit_for_bit(tmp_path, trainer, algorithm, flags):
    agent = save(tmp_path / "checkpoint.pt", trainer, algorithm, **flags)
    obs, started = 3 * torch.randn(16, 4), torch.zeros(16, dtype=torch.bool)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "checkpoint.pt").act(obs, started), agent.act(obs, started))
        assert agent.act(obs, started).std() > 0


@pytest.mark.slow
def test_an_agent_of_the_jax_trainer_acts_as_there(tmp_path):
    trainer = pytest.importorskip("ppo_mjx_jax")
    args = trainer.Args(num_envs=4, num_steps=4, actor_hidden=(8,), critic_hidden=(8,), num_seeds=2)
    setup = trainer.make_setup(trainer.make_environment(trainer.make_task(args)), args)
    hyper, seeds = trainer.hyperparameters(args)
    initialise = trainer.jax.vmap(trainer.functools.partial(trainer.initialise, setup))
    state = trainer.jax.jit(initialise)(hyper, seeds)
    counters = dict(env_steps=7, train_seconds=0.0, compile_seconds=0.0)
    trainer.save_checkpoint(tmp_path / "checkpoint.npz", args, state, counters)
    obs, started = torch.randn(5, 4), torch.zeros(5, dtype=torch.bool)
    for agent in (0, 1):
        subject = load(tmp_path / "checkpoint.npz", agent=agent)
        policy = trainer.load_policy(trainer.load_checkpoint(str(tmp_path / "checkpoint.npz")), agent)
        np.testing.assert_array_equal(subject.act(obs, started).numpy(), policy(obs.numpy()))
        assert (subject.label, subject.env_steps) == ("ppo_mjx", 7)
    with pytest.raises(panel.InputError, match="holds 2, numbered from 0"):
        load(tmp_path / "checkpoint.npz", agent=2)


# Labels, middles and intervals


def cell(**columns):
    """Four episodes that lasted to the time limit, except what `columns` says."""
    cell = {name: np.zeros(4) for name in panel.MEASURED} | dict(survived=np.ones(4, bool), success=np.zeros(4, bool))
    return cell | {name: np.array(x, bool) for name, x in (dict(invalid=[0] * 4, terminated=[0] * 4) | columns).items()}


def test_a_failure_gets_the_first_label_that_holds():
    none = cell(success=[True, True, False, False])
    mass = cell(success=[True, False, False, False], terminated=[0, 1, 1, 0])
    push = cell(invalid=[1, 1, 0, 0], terminated=[0, 0, 0, 1])
    cells = {("ppo", name, 3): x for name, x in (("none", none), ("mass", mass), ("push", push))}
    table = panel.episode_table(cells)
    assert list(table["label"]) == [
        "", "", "too slow", "too slow",
        "", "twin succeeded", "fell", "too slow",
        "quarantined", "quarantined", "too slow", "fell",
    ]  # fmt: skip
    counts = panel.failure_table(table)
    assert list(counts.columns) == list(panel.LABELS) and list(counts.loc["ppo", "push"]) == [2, 0, 1, 1]
    assert [pair[1] for pair in counts.index] == ["none", "mass", "push"]


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


def episodes(returns, checkpoint="ppo"):
    """A table of episodes with these returns by perturbation; all succeeded."""
    rows = []
    for name, values in returns.items():
        for k, value in enumerate(values):
            row = dict.fromkeys(panel.MEASURED, 0.0) | dict(checkpoint=checkpoint, perturbation=name, seed=3, episode=k)
            rows.append(row | {"return": value, "label": "", "success": 1})
    return pd.DataFrame(rows)


def test_differences_are_paired_and_one_fall_makes_none():
    """Twins differ by noise about 0; then by 0.5 each; then one of them falls, which would move the mean by 90."""
    rng = np.random.default_rng(2)
    none = 100 * rng.standard_normal(100)
    fall = none + rng.standard_normal(100) + np.where(np.arange(100) == 7, -9000.0, 0.0)
    returns = {"none": none, "mass": none + rng.standard_normal(100), "gravity": none - 0.5, "push": fall}
    summary = panel.summarize(episodes(returns), 1000)
    _, noise, shift, fall = (row for _, row in summary.iterrows())
    assert [shift[f"return_change_from_none{end}"] for end in ("", "_low", "_high")] == pytest.approx([-0.5] * 3)
    assert panel.verdict(shift, "return_change_from_none") == -1
    for row in (noise, fall):
        assert panel.verdict(row, "return_change_from_none") == 0
        assert row["return_change_from_none_high"] - row["return_change_from_none_low"] < 1
    text = "\n".join(panel.sentences(summary))
    assert "**ppo** is worse under gravity; weakest under gravity: success 100% [100, 100], return changed by" in text
    changes = list(panel.score_table(summary)["change of return"])
    assert changes == ["", "no difference shown", "-0.5 [-0.5, -0.5]", "no difference shown"]


def test_checkpoints_are_compared_where_both_ran():
    first, second = {"none": [1.0, 2.0, 3.0, 4.0]}, {"none": [2.0, 3.0, 4.0, 5.0], "mass": [1.0, 2.0, 3.0, 4.0]}
    summary = panel.summarize(pd.concat([episodes(first), episodes(second, "sac")]), 100)
    line = panel.sentences(summary)[-1]
    assert line == "**sac** against **ppo**, return, paired by episode: more under none."
    assert math.isnan(summary.iloc[2]["return_beyond_ppo"])


def test_the_worst_are_failures_of_each_label_first():
    rows = [("", "none"), ("fell", "mass"), ("fell", "mass"), ("fell", "push"), ("too slow", "mass")]
    table = [{"return": float(k), "label": label, "success": int(not label)} for k, (label, _) in enumerate(rows)]
    table = pd.DataFrame(table)
    for count, expected in ((1, [1]), (2, [1, 4]), (3, [1, 2, 4]), (9, [1, 2, 3, 4])):
        assert list(panel.choose_worst(table, count).index) == expected
    assert list(panel.choose_worst(table[table["success"] == 1], 3).index) == [0]


# The panel, end to end


@pytest.fixture(scope="module")
def evidence(checkpoints, tmp_path_factory):
    """Both checkpoints under five conditions. One of them cannot run."""

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


def test_the_folder_can_be_read_without_running_anything(evidence, checkpoints):
    names = "record.json episodes.csv summary.csv worst.npz scores.png failures.png worst.png postmortem.md"
    assert {path.name for path in evidence.iterdir()} == set(names.split())
    record, page = json.loads((evidence / "record.json").read_text()), (evidence / "postmortem.md").read_text()
    assert record["task"]["time_limit"] == "6 steps, 0.24 s"
    assert record["task"]["control_step"] == "0.04 s, 2 physics steps"
    assert record["simulator"] == panel.simulator_hash(PENDULUM["env_id"]) and len(record["simulator"]) == 64
    assert record["left_out"]["push, sac"] == "push has nothing to vary" and "Left out: push, ppo" in page
    assert record["left_out"]["mass"] == "not asked for"
    assert [c["label"] for c in record["checkpoints"]] == ["ppo", "sac"] and "act" not in record["checkpoints"][0]
    assert record["hardware"] and record["versions"]["torch"] and record["configuration"]["seeds"] == [3, 7]
    assert "**sac** against **ppo**" in page and "less under none" in page
    assert f"- **ppo** is `{checkpoints[0]}`\n- **sac** is `{checkpoints[1]}`\n" in page
    for path in evidence.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_episodes_add_up_and_the_two_policies_get_what_they_deserve(evidence):
    table = pd.read_csv(evidence / "episodes.csv", keep_default_na=False)
    summary = pd.read_csv(evidence / "summary.csv")
    conditions = ["none", "observation_noise", "sparse_reward", "mujoco_c"]
    counts = table.groupby(["checkpoint", "perturbation", "seed"]).size()
    assert len(counts) == 2 * 4 * 2 and set(counts) == {3}
    still = table["checkpoint"] == "ppo"
    assert ((table["success"] == 1) == still).all() and ((table["label"] == "") == still).all()
    assert (table["length"][still] == STEPS).all() and (table["length"][~still] < STEPS).all()
    assert set(table["label"][~still]) == {"fell"}
    for _, mine in summary.iterrows():
        own = table[(table["checkpoint"] == mine["checkpoint"]) & (table["perturbation"] == mine["perturbation"])]
        middle = np.mean(sorted(own["return"])[1:-1])  # of six, a quarter is one
        assert mine["return"] == pytest.approx(middle, rel=1e-4)
        assert mine["return_low"] <= mine["return"] <= mine["return_high"]
    assert list(summary["perturbation"][summary["checkpoint"] == "ppo"]) == conditions
    columns = [*panel.MEASURED, "seed", "episode"]
    plain, sparse = (table[table["perturbation"] == name][columns].to_numpy() for name in ("none", "sparse_reward"))
    np.testing.assert_array_equal(plain, sparse)  # the bookkeeping holds


def test_worst_traces_are_the_episodes_of_the_table(evidence):
    table = pd.read_csv(evidence / "episodes.csv")
    rows = {panel.episode_name(row): row for row in table.to_dict("records")}
    with np.load(evidence / "worst.npz") as file:
        names = {key.rsplit("/", 1)[0] for key in file.files}
        assert sorted(name.split("/")[0] for name in names) == ["ppo", "ppo", "sac", "sac"]
        for name in names:
            length = int(rows[name]["length"])
            assert file[f"{name}/qpos"].shape == (length, 2) and file[f"{name}/obs"].shape == (length, 4)
            assert file[f"{name}/reward"].sum() == pytest.approx(rows[name]["return"])
            assert np.abs(file[f"{name}/qpos"][0]).max() <= 0.01  # begins where Gymnasium's resets begin
            np.testing.assert_allclose(file[f"{name}/action"][:, 0], 3.0 if name.startswith("sac") else 0.0, atol=1e-3)
    assert "sibling" not in (evidence / "postmortem.md").read_text()  # each replay returned what the panel saw


def test_the_same_panel_for_both_checkpoints_and_the_same_again(evidence, checkpoints, tmp_path):
    words = [checkpoints[1], *SMALL, "--perturbations", "none", "--no-video", "--out", str(tmp_path / "b")]
    again = panel.evaluate(panel.parse_args(words))
    first, second = (json.loads((folder / "record.json").read_text()) for folder in (evidence, again))
    for place, digest in second["initial_states"].items():
        assert first["initial_states"][place] == digest  # of another checkpoint, in another run
    assert len(set(first["initial_states"].values())) == 2, "two seeds, whatever the condition and the simulator"
    theirs, mine = (pd.read_csv(folder / "episodes.csv") for folder in (evidence, again))
    theirs = theirs[(theirs["checkpoint"] == "sac") & (theirs["perturbation"] == "none")]
    pd.testing.assert_frame_equal(theirs.reset_index(drop=True), mine)
    assert "under any" not in (again / "postmortem.md").read_text(), "no perturbation was run"


@pytest.mark.parametrize("place", [("b", "none", 3), ("a", "push", 3)])
def test_starts_that_differ_between_checkpoints_or_perturbations_are_a_defect(place):
    cells = {("a", "none", 3): dict(start=np.array("1")), ("a", "none", 7): dict(start=np.array("2"))}
    panel.check_same_starts(cells | {place: dict(start=np.array("1")), ("a", "mujoco_c", 3): dict(start=np.array("3"))})
    with pytest.raises(RuntimeError, match=f"{place[0]} began {place[1]}, seed 3, .* than a began none"):
        panel.check_same_starts(cells | {place: dict(start=np.array("2"))})


PAST = {"hidden_observations": "qpos", "stack_observations": 2, "delay_observations": 1}
OF_MJX = (({}, 4), ({"hidden_observations": "qpos"}, 2))


@pytest.mark.parametrize(
    "name, hidden, size",
    [("mujoco_c", {}, 4), ("mujoco_c", PAST, 4), *(pytest.param("mjx", *x, marks=pytest.mark.slow) for x in OF_MJX)],
)
def test_simulators_agree_step_by_step(tmp_path, name, hidden, size):
    """The pendulum under a policy that tilts it: what is left is float32."""
    if name == "mjx":
        pytest.importorskip("ppo_mjx_jax").jax.config.update("jax_default_matmul_precision", None)
    options = {"max_episode_steps": STEPS} | hidden
    save(tmp_path / "checkpoint.pt", ppo, "ppo", actor_hidden=(4,), env_kwargs=options)
    subject = load(tmp_path / "checkpoint.pt")
    args = panel.check_args(panel.Args(("x",), episodes=2, device="cpu", compile=False))
    results = []
    for condition in ("none", name):
        simulator = panel.open_simulator(subject, condition, args)
        results.append(panel.run_batch(subject, simulator, seed=5, watched=(0, 1)))
    if name == "mjx":  # a GPU would otherwise take TF32
        assert pytest.importorskip("jax").config.jax_default_matmul_precision == "highest"
    (mine, trace), (theirs, other) = results
    np.testing.assert_array_equal(mine["start"], theirs["start"])
    assert trace["obs"].shape[-1] == size
    for key in ("return", "length", "survived", "terminated"):
        np.testing.assert_array_equal(mine[key], theirs[key])
    for key in ("qpos", "qvel", "obs", "action"):
        np.testing.assert_allclose(trace[key], other[key], rtol=1e-4, atol=1e-5)


def quadruped(observes="obs", **options):
    """A subject of random weights that trots nowhere, and its panel."""
    env = vecsim_torch.make("Quadruped-Flat", 1)
    size = (env.single_observation_space if observes == "obs" else env.single_critic_space).shape[0]
    weights = 0.1 * torch.randn(size, 12, generator=torch.Generator().manual_seed(0))
    options = dict(max_episode_steps=8) | options
    subject = subject_of(lambda obs, started: (obs @ weights).tanh(), env_id="Quadruped-Flat", options=options)
    args = panel.check_args(panel.Args(("x",), episodes=3, device="cpu", compile=False, solver_iterations=2))
    return subject._replace(observes=observes, label="teacher" if observes == "critic_obs" else "student"), args


def test_every_condition_of_a_quadruped_starts_alike_and_gets_the_same_commands():
    """Past a change of command, which comes in other steps if these are longer."""
    subject, args = quadruped(resample_seconds=0.06)
    first, commands, starts = {}, {}, {}
    for name in ("none", "push", "observation_noise", "mass", "action_delay", "timestep", "mujoco_c"):
        simulator = panel.open_simulator(subject, name, args)
        cell, traces = panel.run_batch(subject, simulator, seed=5, watched=(0, 1, 2))
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


def test_a_quadruped_in_mujoco_tracks_like_in_vecsim():
    subject, args = quadruped()
    cells = [panel.run_batch(subject, panel.open_simulator(subject, x, args), seed=5)[0] for x in ("none", "mujoco_c")]
    for name in ("return", "length", "tracking"):
        np.testing.assert_allclose(*(cell[name] for cell in cells), rtol=0.05, atol=0.02, err_msg=name)


def test_noise_is_for_policies_that_see_it(tmp_path, monkeypatch):
    """Noise changes what a student sees. A teacher reads privileged observations, so it runs none."""
    subjects = [quadruped("critic_obs")[0], quadruped()[0]]
    args = dataclasses.replace(quadruped()[1], perturbations=("none", "observation_noise"), seeds=(3, 7))
    bar = MagicMock()
    monkeypatch.setattr(panel, "tqdm", bar)
    cells, left_out = panel.run_panel(subjects, args, tmp_path)
    steps = bar().__enter__().update.call_args_list
    assert sum(step.args[0] for step in steps) == bar.call_args_list[0].kwargs["total"] == 8
    assert {label for label, name, _ in cells if name == "observation_noise"} == {"student"}
    assert "privileged" in left_out.pop("observation_noise, teacher")
    assert set(left_out.values()) == {"not asked for"}
    assert not np.array_equal(cells["student", "none", 3]["return"], cells["student", "observation_noise", 3]["return"])
    table = panel.episode_table(cells)
    summary = panel.summarize(table, 100)
    noisy = summary[summary["perturbation"] == "observation_noise"].iloc[0]
    assert math.isnan(noisy["return_beyond_teacher"]) and not math.isnan(noisy["return_change_from_none"])
    (line,) = [line for line in panel.sentences(summary) if "against" in line]
    assert "noise" not in line and "under none" in line
    panel.plot_scores(tmp_path / "scores.png", summary, "")
    panel.plot_failures(tmp_path / "failures.png", table, "")


@pytest.mark.parametrize("name", [name for name, x in panel.PERTURBATIONS.items() if x.simulator == "vecsim"])
def test_every_perturbation_of_vecsim_suits_a_quadruped(name):
    subject, args = quadruped()
    settings = panel.open_simulator(subject, name, args).env.settings
    assert settings.observation_noise == (1.0 if name == "observation_noise" else 0.0)
    assert settings.delay == (24 if name == "action_delay" else 0), "physics steps of 5 ms"


def test_batches_are_cut_to_the_episodes_that_were_asked_for():
    subject = subject_of(lambda obs, started: torch.zeros(len(obs), 1))
    args = panel.check_args(panel.Args(("x",), episodes=5, num_envs=2, device="cpu", compile=False))
    cell = panel.run_cell(subject, panel.open_simulator(subject, "none", args), "none", 3, args)
    assert all(len(x) == 5 for name, x in cell.items() if name != "start")
    other = panel.run_cell(subject, panel.open_simulator(subject, "none", args), "none", 7, args)
    assert str(cell["start"]) != str(other["start"])


def test_a_task_that_a_simulator_lacks_is_left_out():
    subject = subject_of(None, env_id="Quadruped-Rough", options={})
    for name, words in (("mujoco_c", "Gymnasium has no"), ("mjx", "ppo_mjx_jax.py has no")):
        with pytest.raises((ValueError, ImportError), match=f"{words} Quadruped-Rough"):
            panel.open_simulator(subject, name, panel.Args(episodes=1))


def test_contracts_are_of_every_task_and_success_is_what_they_say(monkeypatch):
    assert set(panel.CONTRACTS) == set(vecsim_torch.TASKS)
    assert panel.CONTRACTS["Hopper-v5"].success().endswith("at a mean forward speed of at least 1 m/s")
    assert "0.3 m/s" in panel.CONTRACTS["Quadruped-Flat"].success()

    class Robots:
        seconds = 0.5

        def reset(self, seed):
            self.age = 0
            return torch.zeros(3, 1)

        def start(self):
            return torch.zeros(1, 3)

        def unit_action(self, action):
            return action

        def state(self):
            return torch.zeros(1, 3), torch.tensor([[0.0, 0.0, 25.0 * (self.age == 1)]])

        def step(self, action):
            self.age += 1
            one, no = torch.ones(3), torch.zeros(3, dtype=torch.bool)
            fell = torch.tensor([False, self.age == 2, False])
            speed = torch.tensor([0.9, 2.0, 1.1])
            return panel.Step(torch.zeros(3, 1), one, fell, no | (self.age == 4), no, speed, one * math.nan)

    subject = subject_of(lambda obs, started: torch.ones(len(obs), 2), env_id="Hopper-v5")
    contract = panel.CONTRACTS["Hopper-v5"]._replace(safety=panel.SafetyLimit("", "qvel", slice(0, None), 20.0))
    monkeypatch.setitem(panel.CONTRACTS, "Hopper-v5", contract)
    for name in ("none", "sparse_reward"):
        cell = panel.run_cell(subject, Robots(), name, 3, panel.Args(episodes=3))
        np.testing.assert_array_equal(cell["success"], [False, False, True])  # too slow; fell; neither
        np.testing.assert_array_equal(cell["survived"], [True, False, True])
        np.testing.assert_array_equal(cell["return"], [4, 2, 4])
        np.testing.assert_allclose(cell["speed"], [0.9, 2.0, 1.1], rtol=1e-6)
        np.testing.assert_array_equal(cell["unsafe"], [0, 0, 0.25])
        np.testing.assert_array_equal(cell["saturation"], [1, 1, 1])
        np.testing.assert_array_equal(cell["seconds"], [2, 1, 2])


def test_a_task_of_a_users_own_file_is_judged_in_vecsim(tmp_path):
    readme = Path(vecsim_torch.__file__).with_name("README.md").read_text()
    (tmp_path / "swing.py").write_text(re.search(r"```python\n(.*?class SwingUp.*?)```", readme, re.DOTALL)[1])
    env_id = f"{tmp_path / 'swing.py'}:SwingUp"
    save(tmp_path / "checkpoint.pt", ppo, "ppo", env_id=env_id)
    words = [str(tmp_path / "checkpoint.pt"), *SMALL, "--perturbations", "mass", "friction", "mujoco_c", "mjx"]
    out = panel.evaluate(panel.parse_args([*words, "--no-video", "--out", str(tmp_path / "out")]))
    table, page = pd.read_csv(out / "episodes.csv"), (out / "postmortem.md").read_text()
    assert set(table["perturbation"]) == {"none", "mass"} and (table["success"] == 1).all() and len(table) == 2 * 6
    assert table["return"].abs().min() > 0.1 and table["unsafe"].isna().all() and "unsafe steps |" not in page
    record = json.loads((out / "record.json").read_text())
    assert record["integrator"] == "euler" and "Integrator: euler." in page
    assert {f"{name}, ppo" for name in ("friction", "mujoco_c", "mjx")} <= record["left_out"].keys()
    assert record["task"]["safety_constraint"] == "none"


# Nothing lost


def test_a_full_disk_keeps_the_finished_cells_and_the_panel_goes_on(checkpoints, tmp_path, capsys, monkeypatch):
    out, savez, ran, run_cell = tmp_path / "out", np.savez, [], panel.run_cell
    words = [checkpoints[0], *SMALL, "--perturbations", "none", "--no-video", "--out", out]

    def counted(*args):
        ran.append(args[3])
        return run_cell(*args)

    def full(path, **arrays):
        if len(ran) == 2:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        savez(path, **arrays)

    monkeypatch.setattr(panel, "run_cell", counted)
    monkeypatch.setattr(np, "savez", full)
    status, line = run(capsys, monkeypatch, *words)
    assert status == 2 and line.startswith("error: ") and "No space left on device" in line and "\n" not in line
    monkeypatch.setattr(np, "savez", savez)
    assert run(capsys, monkeypatch, *words)[0] == 0
    assert ran == [3, 7, 7], "the finished cell is not run again"
    assert not (out / "cells").exists() and len(pd.read_csv(out / "episodes.csv")) == 6
    status, line = run(capsys, monkeypatch, *words)
    assert status == 2 and "holds a finished panel" in line and ran == [3, 7, 7]


def test_cells_of_another_panel_are_not_taken(checkpoints, tmp_path):
    args = panel.check_args(
        panel.Args((checkpoints[0],), seeds=(3,), episodes=2, perturbations=(), device="cpu", compile=False)
    )
    subjects = panel.load_subjects(args)
    few, _ = panel.run_panel(subjects, args, tmp_path)
    more, _ = panel.run_panel(subjects, dataclasses.replace(args, episodes=3), tmp_path)
    assert [len(x["ppo", "none", 3]["return"]) for x in (few, more)] == [2, 3]


def test_cells_are_not_taken_when_the_file_of_the_task_has_changed(tmp_path):
    file, code = tmp_path / "my.py", "import vecsim_torch\nclass Mine(vecsim_torch.InvertedPendulum): pass\n"
    subject = subject_of(lambda obs, started: torch.zeros(len(obs), 1), env_id=f"{file}:Mine")
    args = panel.Args(seeds=(3,), episodes=2, perturbations=("none",), device="cpu", compile=False)
    for text, count in ((code, 1), (code, 1), (code + "# other rewards\n", 2)):
        file.write_text(text)
        panel.run_panel([subject], args, tmp_path / "cells")
        assert len(list((tmp_path / "cells").iterdir())) == count


def of_a_fall(seconds=0.3):
    """A traced episode of a Hopper that sinks."""
    env = vecsim_torch.make("Hopper-v5", 1)
    qpos = np.tile(env.mj_model.qpos0, (round(seconds / 0.008), 1))
    qpos[:, 1] -= np.linspace(0, 0.8, len(qpos))
    place = dict(checkpoint="ppo", perturbation="none", seed=3, episode=0)
    return place | dict(env=env, trace=dict(qpos=qpos))


@pytest.mark.slow
def test_a_film_is_drawn(tmp_path):
    from imageio.v2 import mimread

    try:
        words = panel.film(tmp_path / "worst.mp4", of_a_fall())
    except (ImportError, AttributeError, RuntimeError) as error:
        if not re.search(r"\b(E?GL|OSMesa|OpenGL|GLFW|gladLoad\w*|DISPLAY)", str(error), re.IGNORECASE):
            raise
        pytest.skip(f"no offscreen rendering on this machine: {error}")
    assert words == "the last 0.3 s of ppo/none/3/0, 7 times slower"
    frames = np.array(mimread(tmp_path / "worst.mp4"))
    assert frames.shape[1:3] == (480, 480) and len(frames) >= 30
    assert frames[0].std() > 5 and np.abs(frames[0].astype(float) - frames[-1]).mean() > 1, "it sinks in sight"


def test_without_a_renderer_the_film_is_one_line(checkpoints, tmp_path, capsys, monkeypatch):
    def no_renderer(path, row):
        raise RuntimeError("no GL\ncontext")

    monkeypatch.setattr(panel, "film", no_renderer)
    words = [checkpoints[0], *SMALL, "--perturbations", "none", "--out", tmp_path / "out"]
    assert run(capsys, monkeypatch, *words)[0] == 0
    page = (tmp_path / "out" / "postmortem.md").read_text()
    assert "Film: none, because MuJoCo cannot draw here (no GL context)." in page


# Refusals


@pytest.fixture(scope="module")
def bad(checkpoints, tmp_path_factory):
    """Files and folders that the panel must refuse, by name."""
    folder = tmp_path_factory.mktemp("bad")
    whole = open(checkpoints[0], "rb").read()
    (folder / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    checkpoint = torch.load(checkpoints[0], weights_only=True)
    statistics = checkpoint["agent"]["obs_statistics.mean"].numpy().tobytes()
    flipped = bytearray(whole)
    flipped[whole.index(statistics) + 5] ^= 1
    (folder / "flipped.pt").write_bytes(flipped)
    np.savez(folder / "other.npz", header="{}")
    torch.save([1, 2], folder / "list.pt")
    torch.save(checkpoint | dict(env_id="Walker3d-v5"), folder / "gone.pt")
    torch.save(checkpoint | dict(algorithm="td3"), folder / "td3.pt")
    torch.save(checkpoint | dict(algorithm=["ppo"]), folder / "two.pt")
    torch.save(checkpoint | dict(agent={}), folder / "hollow.pt")
    strange = checkpoint["args"] | dict(env_kwargs={"gravity_on_mars": True})
    torch.save(checkpoint | dict(args=strange), folder / "strange.pt")
    save(folder / "hopper.pt", ppo, "ppo", env_id="Hopper-v5")
    save(folder / "longer.pt", ppo, "ppo", env_kwargs={"max_episode_steps": STEPS + 1})
    return folder


@pytest.mark.parametrize("words, rule", [
    ([], "give at least one checkpoint"),
    (["{bad}/nothing.pt"], "nothing.pt cannot be read: FileNotFoundError"),
    (["{bad}"], "cannot be read: IsADirectoryError"),
    (["{bad}/truncated.pt"], "cannot be read"),
    (["{bad}/flipped.pt"], "checksum"),
    (["{bad}/other.npz"], "other.npz cannot be read: KeyError"),
    (["{bad}/list.pt"], "cannot be read"),
    (["{bad}/td3.pt"], "algorithm 'td3'; the panel knows ppo, ppo_recurrent, sac, dqn, distill, ppo_mjx"),
    (["{bad}/two.pt"], "algorithm \"['ppo']\"; the panel knows"),
    (["{good}", "--agent", "5"], "each of these checkpoints holds one agent; omit --agent"),
    (["{bad}/gone.pt"], "unknown task 'Walker3d-v5'; choose one of InvertedPendulum-v5"),
    (["{bad}/hollow.pt"], "hollow.pt: "),
    (["{bad}/strange.pt"], "gravity_on_mars"),
    (["{good}", "{bad}/hopper.pt"], "one panel, one task"),
    (["{good}", "{bad}/longer.pt"], "one panel, one task"),
    (["{good}", "--perturbations", "earthquake"], "unknown perturbation 'earthquake'; choose from none"),
    (["{good}", "--seeds", "3", "3"], "all different"),
    (["{good}", "--episodes", "1"], "episodes = 1 must be >= 2"),
    (["{good}", "--device", "cuda:99"], "cuda"),
    (["{good}", "--out", "{bad}/list.pt"], "is a file"),
    (["{good}", "--nonsense"], "nonsense"),
])  # fmt: skip
def test_bad_input_gets_one_line_and_status_2(words, rule, bad, checkpoints, capsys, monkeypatch, tmp_path):
    words = [word.format(bad=bad, good=checkpoints[0]) for word in words]
    out = [] if "--out" in words else ["--out", tmp_path / "out"]
    status, line = run(capsys, monkeypatch, *words, *out)
    assert status == 2 and line.startswith("error: ") and "\n" not in line and rule in line
    assert not list(tmp_path.glob("out/*.csv"))


def test_every_flag_acts():
    source = inspect.getsource(panel)
    for field in dataclasses.fields(panel.Args):
        assert f"args.{field.name}" in source, field.name
    quick = panel.check_args(panel.Args(("x",), quick=True, device="cpu"))
    assert quick.episodes == 8 and not quick.video and quick.perturbations == tuple(panel.PERTURBATIONS)
    slow = panel.check_args(panel.Args(("x",), perturbations=("mass",), device="cpu"))
    assert slow.episodes == 64 and slow.video and slow.perturbations == ("none", "mass")
