"""Writes results/README.md, every table and picture of the files in results/, and draws the pictures."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from benchmarks import tables

HEAD = """# Results

`./benchmark.sh report` makes this page from the files in this folder; do not edit it. Each table names its hardware,
commit and command. Speeds are medians, with the lowest and highest window in brackets. "X / this row" is the speed of X
divided by that of the row: above 1, X is faster. Memory is the peak of all processes of a contender together.
"""

SIMULATOR = """## Simulator

The first table compares one physics step with MuJoCo C, in float64; the second compares speed with MuJoCo C alone.

`sim` compares six simulators on the same robots: the same integrator, time step, solver and iterations, random actions
held for one environment step, and the same start states from the middle of episodes. vecsim is timed with observations,
rewards and resets; the others simulate physics alone, in their favour. The error of one step is the difference in qvel
from MuJoCo C, whose solver runs to convergence: the largest over the degrees of freedom, divided by
timestep x (1 + the largest acceleration).
"""

LEARNER = """## Learner

The update alone, on a filled rollout: 65,536 samples (2,048 environments x 32 steps), 5 epochs, 4 minibatches, ELU
networks of 256-128-64, 27 observations and 8 actions for all. SAC runs as a whole trainer with random numbers in place
of the simulator.
"""

TRAIN = """## Whole trainings

Environment steps/s from the second iteration on, logging included. Other libraries run on 8 Gymnasium environments as
their users run them, and three of them also on vecsim, with the batch and the networks of ours. All contenders of a
table integrate alike, except Brax, which has its own models: `euler` is how our defaults train; `rk4` is how Gymnasium
ships every task except HalfCheetah, and about four times the work. The first start has empty compiler caches; the
second finds what the first left.
"""

SCORES = """## Time to a score

The score is the mean return of deterministic episodes in `gymnasium.make(task)`, beside the same policy in the training
simulator. Training time is without compilation and evaluations. The policy is evaluated a few times in a training, so
"reached after" is an upper bound. Hyperparameters were tuned on these tasks and partly on these seeds; expect worse on
new tasks.
"""

PEERS = """## Minutes to a score, beside other libraries

Each run trains for the same minutes on the same core. Our trainers have the defaults of the task, SB3 has the tuned
settings of RL Baselines3 Zoo (for SAC on the pendulum SB3's defaults), and CleanRL-style PPO has CleanRL's published
settings on one environment. The clock excludes imports, evaluations and compilation.
"""

SETTINGS = """## Settings on the same budget
"""

QUADRUPED = """## Quadruped: teacher, students, two simulators

The tracking score is exp(-error²/0.25), error in m/s, averaged over the steps that an episode could have had: 1 is
perfect, and a fall scores 0 for the remaining time. In brackets: the share of robots that fell.
"""


def sections(results: Path, dollars_per_hour: float | None) -> Iterator[str]:
    """The page in parts: prose, tables, pictures; only what has files."""

    def load(pattern: str) -> list[dict]:
        return tables.load(results, pattern)

    def picture(name: str, words: str) -> Iterator[str]:
        if (results / name).exists():
            yield f"![{words}]({name})\n"

    records = load("benchmark/*.json")
    of_mode = {mode: [record for record in records if record["mode"] == mode] for mode in ("sim", "learner", "train")}
    yield HEAD
    yield from picture("robots.gif", "trained robots in Gymnasium's environments")
    yield from picture("speed.png", "simulators, learners and whole trainings side by side")
    yield SIMULATOR
    if (results / "parity.json").exists():
        yield tables.parity(json.loads((results / "parity.json").read_text()))
    if found := load("vecsim/*.json"):
        yield tables.physics(found)
    yield from map(tables.comparison, of_mode["sim"])
    scaling = [record for record in records if record["mode"] == "scaling"]
    yield from picture("scaling.png", "steps per second over the number of environments")
    for case in sorted({tables.family(record) for record in scaling}):
        yield tables.scaling([record for record in scaling if tables.family(record) == case])
    yield LEARNER
    yield from map(tables.comparison, of_mode["learner"])
    yield TRAIN
    for record in of_mode["train"]:
        yield tables.comparison(record, dollars_per_hour)
    if found := load("profile/*.json"):
        yield tables.profile(found)
    yield SCORES
    yield from picture("curves.png", "score over training time")
    for name in ("ppo", "sac", "mjx"):
        if found := [run for run in load(f"{name}/*-seed*.json") if run.get("gymnasium")]:
            yield tables.scores(name, found)
            if name != "ppo":
                yield from picture(f"{name}/curves.png", f"learning curves, {name}")
    yield from map(tables.agents, load("mjx/seeds.json"))
    if found := load("peers/*/*-seed*.json"):
        yield PEERS
        yield from picture("peers.png", "score over minutes of training, beside other libraries")
        for members in tables.grouped(found, "env_id"):
            yield tables.peers(members[0]["env_id"], members)
    yield SETTINGS
    if found := load("sac/candidates/*-seed*.json"):
        yield tables.candidates(found)
    for members in tables.grouped(load("sac/ablation/*/*-seed*.json"), "folder"):
        yield tables.ablation(members)
    for members in tables.grouped(load("ppo/sizes/*/*-seed*.json"), "folder"):
        yield tables.sizes(members)
    yield QUADRUPED
    yield from map(tables.walk, load("quadruped/*.json"))
    for record in load("distill/*/evidence.json"):
        yield tables.distill(record)
        yield from picture(f"distill/{record['env_id']}/curves.png", "training of teacher and students")
    for record in load("distill/*/training.json"):
        yield tables.stages(record)
    if found := sorted(results.glob("**/postmortem.md")):
        yield "## Panels of eval_panel.py\n"
        heads = [(path, path.read_text().splitlines()[0].lstrip("# ")) for path in found]
        yield "\n".join(f"- [{head}]({path.relative_to(results)})" for path, head in heads) + "\n"


def page(results: Path, dollars_per_hour: float | None = None) -> str:
    return "\n".join(sections(results, dollars_per_hour))


def show(paths: list[Path]) -> None:
    """Print the tables of these comparisons."""
    for path in paths:
        if path.exists():
            record = json.loads(path.read_text())
            print(tables.scaling([record]) if record["mode"] == "scaling" else tables.comparison(record))


def write(options: Namespace) -> None:
    """Draw the pictures first: the page shows those that are there."""
    from benchmarks import film, plots

    if options.film:
        film.draw(options)
    plots.draw(options.results)
    path = options.results / "README.md"
    path.write_text(page(options.results, options.dollars_per_hour))
    print(path)
