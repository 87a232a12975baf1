"""The pictures in results/: learning curves in each folder, speed.png, scaling.png and peers.png."""

from __future__ import annotations

import itertools
import statistics
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from benchmarks import tables

INK, FAINT, GRID, OURS, THEIRS = "#22262b", "#8a9099", "#eceff2", "#1f6feb", "#b6bec9"
COLOURS = {"ppo": "#1f6feb", "sac": "#d9480f", "ppo_mjx": "#2b8a3e", "dqn": "#7048e8", "pqn": "#0c8599"}
STAGE_COLOURS = {"policy": OURS, "teacher": "#2b8a3e", "student": "#1f6feb", "finetune": "#d9480f", "baseline": FAINT}
PEER_COLOURS = {name: COLOURS[name.removeprefix("ours-")] for name in tables.PEERS if name.startswith("ours")}
PEER_COLOURS |= {"sb3-ppo": "#2b8a3e", "sb3-sac": "#7048e8", "cleanrl-ppo": "#8a9099"}
STYLE = {
    "font.size": 10, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": FAINT, "xtick.color": FAINT, "ytick.color": FAINT,
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlesize": 11,
}  # fmt: skip
SCORE = "Deterministic score in gymnasium.make(task), one line for each seed"


def short(value: float, _: int | None = None) -> str:
    """1,234,567 -> 1.23M"""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def panels(
    path: Path, items: list, columns: int, size: tuple, title: str = "", runs: list[dict] = ()
) -> Iterator[tuple]:
    """Each item with its panel of a grid, which is saved at the end: a title above, these runs' hardware below."""
    if not items:
        return
    columns = min(columns, len(items))
    lines = -(-len(items) // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * lines + 0.5), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis in axes[len(items) :]:
        axis.set_visible(False)
    yield from zip(axes, items)
    if title:
        figure.suptitle(title, x=0.01, ha="left", size=11)
    if runs:
        hardware = dict.fromkeys(run["hardware"].split(", shared")[0] for run in runs)
        figure.supxlabel("; ".join(hardware), size=8, color=FAINT)
    figure.savefig(path, dpi=150, facecolor="white")
    print(path)


def label_axes(axis: Axes, title: str, words: str) -> None:
    axis.set_title(title)
    axis.set_xlabel(words)
    for line in (axis.xaxis, axis.yaxis):
        line.set_major_formatter(FuncFormatter(short))
    axis.grid(axis="y", color=GRID)
    axis.set_axisbelow(True)


def with_curves(results: Path, pattern: str) -> list[dict]:
    return [run for run in tables.load(results, pattern) if run.get("curve")]


def by_task(runs: list[dict]) -> list[tuple[str, list[dict]]]:
    """Each task with its runs, in the order of the runs."""
    tasks = dict.fromkeys(run["env_id"] for run in runs)
    return [(env_id, [run for run in runs if run["env_id"] == env_id]) for env_id in tasks]


def learning_curves(axis: Axes, runs: list[dict], over: int, scale: float = 1.0) -> None:
    """One line for each seed, one colour and one label for each algorithm.

    over: 0 draws scores over environment steps, 1 over seconds; scale divides them."""
    for algorithm in sorted({run["algorithm"] for run in runs}, reverse=True):
        colour, seeds = COLOURS[algorithm], [run for run in runs if run["algorithm"] == algorithm]
        for run in seeds:
            curve = np.array(run["curve"])
            axis.plot(curve[:, over] / scale, curve[:, 2], ".-", color=colour, lw=1.6, alpha=0.75, ms=3)
        last = [run["curve"][-1][2] for run in seeds]
        middle, worst = (f"{x:,.0f}" if abs(x) >= 100 else f"{x:.1f}" for x in (statistics.median(last), min(last)))
        label = f"{tables.ALGORITHMS[algorithm]}: {middle}, one seed"
        if len(last) > 1:
            label = f"{tables.ALGORITHMS[algorithm]}: median {middle}, worst {worst} of {len(last)} seeds"
        axis.plot([run["curve"][-1][over] / scale for run in seeds], last, "o", color=colour, ms=4.5, label=label)
    threshold = next((run["threshold"] for run in runs if "threshold" in run), None)
    if threshold:
        axis.axhline(threshold, color=FAINT, lw=1, ls=(0, (4, 3)), zorder=0)
        words = dict(xycoords=("axes fraction", "data"), textcoords="offset points", color=FAINT, size=8)
        axis.annotate(f"{threshold:,}", (0, threshold), (3, 3), **words)
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.15 * len(axis.get_legend_handles_labels()[1]) * (high - low))  # room for the legend
    axis.legend(loc="upper left", frameon=False, fontsize=8.5, labelcolor="linecolor", handlelength=0)


def plot_curves(results: Path) -> None:
    """Scores over training time, PPO and SAC, one panel for each task."""
    runs = [run for run in with_curves(results, "*/*-seed*.json") if run["folder"] in ("ppo", "sac")]
    runs = [run for run in runs if not run["name"].endswith("-ppo") and not run.get("cores_shared")]
    for axis, (env_id, members) in panels(results / "curves.png", by_task(runs), 3, (4.2, 3.1), SCORE, runs):
        longest = max(run["curve"][-1][1] for run in members)
        scale, unit = (60.0, "minutes") if longest > 180 else (1.0, "seconds")
        learning_curves(axis, members, 1, scale)
        label_axes(axis, env_id, f"{unit} of training")
        axis.set_xlim(left=0)
        axis.set_ylim(min(0.0, 1.1 * min(point[2] for run in members for point in run["curve"])), None)


def plot_twins(results: Path) -> None:
    """ppo_mjx_jax.py beside ppo_gpu_torch.py on the same task and batch, over environment steps and over time."""
    runs = with_curves(results, "mjx/*-seed*.json")
    items, title = list(itertools.product(by_task(runs)[::-1], (0, 1))), f"{SCORE}; same task, batch and flags"
    for axis, ((env_id, members), over) in panels(results / "mjx/curves.png", items, 2, (4.5, 3.1), title, runs):
        learning_curves(axis, members, over)
        label_axes(axis, env_id, ("environment steps", "seconds of training, compilation apart")[over])
        axis.set_xlim(left=0)


def plot_off_policy(results: Path) -> None:
    """SAC beside PPO over environment steps; PPO's curve is cut where both have reached the threshold."""
    runs = by_task(with_curves(results, "sac/*-seed*.json"))
    for axis, (env_id, members) in panels(results / "sac/curves.png", runs, 3, (4.6, 3.1), SCORE):
        if all(run["algorithm"] == "sac" for run in members):  # PPO was not trained for this comparison: its usual run
            members += [run for name in ("ppo", "tasks") for run in with_curves(results, f"{name}/{env_id}-seed*.json")]
        learning_curves(axis, members, 0)
        ends = [run["curve"][-1][0] for run in members if run["algorithm"] == "sac"]
        for run in members:  # a run that never passes is shown whole
            passed = (steps for steps, _, score in run["curve"] if score >= run["threshold"])
            ends.append(next(passed, run["curve"][-1][0]))
        axis.set_xscale("log")  # PPO takes ten to twenty times as many steps as SAC
        axis.set_xlim(0.8 * min(run["curve"][0][0] for run in members), 1.05 * max(ends))
        label_axes(axis, env_id, "environment steps")
        axis.xaxis.set_minor_formatter(FuncFormatter(lambda x, _: short(x) if f"{x:.0e}"[0] in "25" else ""))


def plot_q_learning(results: Path) -> None:
    """DQN and PQN over seconds of training, beside PPO and SAC on the same core for as long."""
    runs = with_curves(results, "dqn/*-seed*.json")
    for axis, (env_id, members) in panels(results / "dqn/curves.png", by_task(runs), 2, (5.6, 3.3), SCORE, runs):
        minutes = max(run["train_seconds"] for run in members) / 60
        for other in with_curves(results, f"peers/{env_id}/ours-*-seed*.json"):
            members.append(other | dict(algorithm=other["contender"].removeprefix("ours-")))
        members = [run | dict(curve=tables.in_time(run | dict(minutes=minutes))) for run in members]
        learning_curves(axis, members, 1)
        label_axes(axis, env_id, "seconds of training, compilation apart")
        axis.set_xlim(left=0)


def plot_peers(results: Path) -> None:
    """Scores over minutes of training beside other libraries: thin lines are seeds, a thick one is the median seed."""
    runs = tables.load(results, "peers/*/*-seed*.json")
    tasks = sorted(by_task(runs), key=lambda task: list(tables.PEERS_GOALS).index(task[0]))
    between = "; " if len(tasks) > 1 else ";\n"  # a single panel is narrow
    title = f"Score in gymnasium.make(task) on one CPU core{between}thick: the median seed"
    for axis, (env_id, members) in panels(results / "peers.png", tasks, 3, (4.4, 3.3), title, runs):
        for contender, colour in PEER_COLOURS.items():
            seeds = [run for run in members if run["contender"] == contender]
            seeds.sort(key=lambda run: run["curve"][-1][2])
            for rank, run in enumerate(seeds):
                curve = np.array([[0, 0.0, 0.0], *run["curve"]])
                middle = dict(lw=2.2, label=tables.PEERS[contender])
                style = middle if rank == len(seeds) // 2 else dict(lw=0.9, alpha=0.5)
                axis.plot(curve[:, 1] / 60, curve[:, 2], ".-", color=colour, ms=4, **style)
        label_axes(axis, env_id, "minutes of training, compilation apart")
        axis.set_xlim(0, max(run["minutes"] for run in members) * 1.05)
        if env_id == tasks[-1][0]:
            axis.legend(frameon=False, fontsize=8)


def plot_memory(results: Path) -> None:
    """Scores without velocities over environment steps, without and with a memory."""
    runs = with_curves(results, "memory/*/*-seed*.json")
    for axis, (env_id, members) in panels(results / "memory/curves.png", by_task(runs), 3, (5.4, 3.6), SCORE, runs):
        for colour, seeds in enumerate(tables.grouped(members, "name")):
            for k, run in enumerate(seeds):
                label, curve = None if k else run["name"].replace("-", " "), np.array(run["curve"])
                axis.plot(curve[:, 0], curve[:, 2], ".-", color=f"C{colour}", lw=1.6, alpha=0.8, ms=4, label=label)
        label_axes(axis, env_id, "environment steps")
        axis.set_xlim(left=0)
        axis.legend(frameon=False, fontsize=8)


def plot_stages(results: Path) -> None:
    """Of each quadruped: errors, and terrain level where there is terrain, over the steps of each stage."""
    titles = dict(velocity_error="velocity error, m/s", terrain_level="mean terrain level")
    titles |= dict(imitation_loss="imitation loss of the student")
    for record in tables.load(results, "*/*/training.json"):
        column = {name: k for k, name in enumerate(record["curve_columns"])}
        rows = [row for stage in record["curves"].values() for row in stage]
        shown = [name for name in titles if any(row[column[name]] is not None for row in rows)]
        title = f"{record['env_id']}: training, with exploration noise and randomised robots"
        for axis, name in panels(record["path"].with_name("curves.png"), shown, 3, (4.4, 2.9), title):
            for stage, lines in record["curves"].items():
                points = [(row[column["env_steps"]], row[column[name]]) for row in lines]
                points = [point for point in points if point[1] is not None]
                if points:
                    axis.plot(*zip(*points), color=STAGE_COLOURS[stage], lw=1.6, label=stage)
            label_axes(axis, titles[name], "environment steps of the stage")
            axis.set_ylim(bottom=0)
            axis.legend(frameon=False, fontsize=8)


def plot_speed(results: Path) -> None:
    """Every comparison of sim, learner and train as bars, with their speeds as multiples of the reference."""
    titles = {"sim": "Simulator", "learner": "PPO update alone", "train": "Whole training"}
    records = [record for record in tables.load(results, "benchmark/*.json") if record["mode"] in titles]
    records = [record for record in records if not record["case"].endswith("-quick")] or records
    records.sort(key=lambda record: list(titles).index(record["mode"]))
    size = 6.6, 0.36 * max((len(record["rows"]) for record in records), default=0) + 1.0
    title = "Medians, with the lowest and highest window; 0.5×: half as fast as the first"
    for axis, record in panels(results / "speed.png", records, 2, size, title, records):
        rows, reference = record["rows"], tables.reference(record)
        colours = [OURS if row["contender"].startswith(("ours", "vecsim")) else THEIRS for row in rows]
        names = [textwrap.fill(row["contender"], 28) for row in rows]
        axis.barh(names, [row["median"] for row in rows], color=colours, height=0.68)
        for place, row in enumerate(rows):
            axis.plot([row["minimum"], row["maximum"]], [place, place], color=INK, lw=1.2, solid_capstyle="butt")
            times = ""
            if reference and row is not reference:
                ratio = row["median"] / reference["median"]
                times = f"  {ratio:.2f}×" if ratio >= 0.1 else f"  {ratio:.1g}×"
            end = row["maximum"], place
            axis.annotate(short(row["median"]) + times, end, (5, 0), textcoords="offset points", va="center", size=9)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.6 * max(row["maximum"] for row in rows))
        axis.xaxis.set_major_formatter(FuncFormatter(short))
        axis.tick_params(axis="y", length=0, labelcolor=INK)
        axis.spines["left"].set_visible(False)
        name = "SAC without its simulator" if "sac" in record["case"] else titles[record["mode"]]
        details = [record["settings"].get(name, "") for name in ("env_id", "integrator")]
        axis.set_title(", ".join([name, *filter(None, details)]))
        cores = f"{rows[0]['cores']} core{'s' if rows[0]['cores'] > 1 else ''}"
        first_look = "; a first look (--quick)" if record["case"].endswith("-quick") else ""
        axis.set_xlabel(f"{record['unit']}, {cores}{first_look}")


def plot_scaling(results: Path) -> None:
    """Physics steps/s over the number of environments."""
    records = [record for record in tables.load(results, "benchmark/scaling-*.json") if "-envs" in record["case"]]
    cases = sorted({tables.family(record) for record in records})
    for axis, case in panels(results / "scaling.png", cases, 3, (5.2, 3.1), runs=records):
        members = [record for record in records if tables.family(record) == case]
        members.sort(key=lambda record: record["settings"]["num_envs"])
        counts, rows = [record["settings"]["num_envs"] for record in members], [record["rows"][0] for record in members]
        lowest, highest = [row["minimum"] for row in rows], [row["maximum"] for row in rows]
        axis.fill_between(counts, lowest, highest, color=OURS, alpha=0.15, lw=0)
        axis.plot(counts, [row["median"] for row in rows], "o-", color=OURS, ms=4)
        best = max(range(len(rows)), key=lambda k: rows[k]["median"])
        spot, words = (counts[best], rows[best]["median"]), short(rows[best]["median"])
        axis.annotate(words, spot, (0, 7), textcoords="offset points", ha="center", color=OURS, weight="bold")
        label_axes(axis, members[0]["settings"]["env_id"], "environments")
        axis.set_xscale("log", base=2)
        axis.set_ylim(0, 1.2 * max(highest))
        axis.set_xticks(counts, [f"{count:,}" for count in counts], rotation=45 if len(counts) > 6 else 0)
        axis.minorticks_off()
        axis.set_ylabel(rows[0]["unit"])


def draw(results: Path) -> None:
    """Every picture that has files."""
    rcParams.update(STYLE)
    of_scores = plot_curves, plot_twins, plot_off_policy, plot_q_learning, plot_peers, plot_memory
    for plot in (*of_scores, plot_stages, plot_speed, plot_scaling):
        plot(results)
