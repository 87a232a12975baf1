"""Markdown tables of the result files. Each function takes the content of files and returns text."""

from __future__ import annotations

import csv
import json
import re
import statistics
from collections import Counter
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

ALGORITHMS = {"ppo": "PPO", "ppo_mjx": "PPO, JAX", "sac": "SAC", "dqn": "DQN", "pqn": "PQN"}
PEERS = {f"ours-{name}": f"ours, {ALGORITHMS[name]}" for name in ("ppo", "sac", "dqn", "pqn")}
PEERS |= {"sb3-ppo": "SB3, PPO", "sb3-sac": "SB3, SAC", "cleanrl-ppo": "CleanRL-style, PPO"}
PEERS_GOALS = {"InvertedPendulum-v5": 1000, "HalfCheetah-v5": 3000, "Hopper-v5": 2500, "Walker2d-v5": 2500}
REMOVED_FLAG = "--weight-projection"  # of sac_gpu_torch.py; one row of the ablation was measured with it
NOT_SETTINGS = "env_id env_kwargs device states xml hidden ours".split()


def load(results: Path, pattern: str) -> list[dict]:
    """The files that match, in the order of their names; `name` is a file's name without its ending and its seed."""
    found = []
    for path in sorted(results.glob(pattern)):
        place = dict(path=path, name=path.stem.split("-seed")[0], folder=path.parent.name)
        found.append(to_the_end(json.loads(path.read_text())) | place)
    return found


def to_the_end(run: dict) -> dict:
    """The run with its final score, unrounded, at the end of its curve; a log has it rounded, or not at all."""
    if run.get("curve") and run.get("gymnasium"):
        end = [run["env_steps"], run["train_seconds"], run["gymnasium"]["mean"]]
        run["curve"] = [point for point in run["curve"] if point[0] < end[0]] + [end]
    return run


def grouped(runs: list[dict], *keys: str) -> list[list[dict]]:
    """Runs that are next to each other and agree in these keys."""
    return [list(members) for _, members in groupby(runs, key=lambda run: [run[key] for key in keys])]


def table(title: str, rows: list[dict], note: str = "") -> str:
    """rows: cells by heading; "-" for one that is missing. Headings that differ in spaces at the end look alike."""
    headings = dict.fromkeys(heading for row in rows for heading in row)
    lines = [f"**{title}**", "", "| " + " | ".join(map(str.rstrip, headings)) + " |", "|" + "---|" * len(headings)]
    lines += ["| " + " | ".join(str(row.get(heading, "-")) for heading in headings) + " |" for row in rows]
    return "\n".join([*lines, "", note] if note else lines) + "\n"


def each(values: Iterable, form: str = ",.0f") -> str:
    """Values of the seeds; "-" for one that is missing."""
    return " / ".join("-" if value is None else f"{value:{form}}" for value in values)


def of_each(runs: list[dict], key: str, form: str = ",.0f") -> str:
    return each((run.get(key) for run in runs), form)


def scores_of(runs: list[dict]) -> list[float]:
    """The final score of each run in Gymnasium."""
    return [run["gymnasium"]["mean"] for run in runs]


def made_by(record: dict, command: str | None = None) -> str:
    return f"Commit {record['commit']}, `{command or record['command']}`."


def made_in_turn(records: list[dict], command: str) -> str:
    """`made_by` for files that one command may have written at several commits."""
    commits = ", ".join(dict.fromkeys(record["commit"] for record in records))
    return f"Commits {commits}, `{command}`"


def package_list(versions: dict) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


# ----------------------------------------------------------------------------------------------------------------------
# sim, learner, train
# ----------------------------------------------------------------------------------------------------------------------


def speed(row: dict) -> str:
    form = ",.0f" if row["median"] >= 100 else ".2f"
    return f"{row['median']:{form}} ({row['minimum']:{form}} to {row['maximum']:{form}})"


def memory(row: dict) -> str:
    return ", ".join(f"{value / 1024:.1f} GiB {where}" for where, value in row["peak_memory_mib"].items())


def reference(record: dict) -> dict | None:
    """The row of the contender that the others are compared with; None if it was not measured."""
    return next((row for row in record["rows"] if row["contender"] == record["reference"]), None)


def ratio(first: dict | None, row: dict) -> str:
    if first is None:
        return "-"
    times = first["median"] / row["median"]
    return "1" if row is first else f"{times:.2f}" if times < 10 else f"{times:.0f}"


def small(row: dict, name: str) -> str:
    return f"{row[name]:.0e}" if name in row else "-"


def protocol(record: dict) -> str:
    """How a comparison was measured, and which contenders are missing or incomplete."""
    row, rows = record["rows"][0], record["rows"]
    cores = f"{row['cores']} core{'s' if row['cores'] > 1 else ''}"
    settings = [f"{k.replace('_', ' ')} {v}" for k, v in record["settings"].items() if k not in NOT_SETTINGS]
    windows = f"{max(len(row['values']) for row in rows)} windows of {record['seconds']} s in turn"
    packages = sorted({f"{name} {version}" for row in rows for name, version in row["versions"].items()})
    lines = [
        f"{cores} of {record['hardware']}; {', '.join(settings)}; {windows}.",
        f"{', '.join(packages)}. {made_by(record)}",
    ]
    lines += [f"{name} is missing: {reason}." for name, reason in record["failed"].items()]
    for row in rows:
        if "stopped" in row:
            lines.append(f"{row['contender']} has {len(row['values'])} of them; it stopped: {row['stopped']}.")
    return "\n".join(lines)


def comparison(record: dict, dollars_per_hour: float | None = None) -> str:
    rows = []
    for row in record["rows"]:
        cells = {"": row["contender"], record["unit"]: speed(row)}
        cells[f"{record['reference']} / this row"] = ratio(reference(record), row)
        if record["mode"] == "sim":
            cells |= {"error of one step, median": small(row, "step_error_p50"), "p99": small(row, "step_error_p99")}
        cells["first start"] = f"{row['first_start_seconds']:.0f} s"
        cells |= {"second start": f"{row['warmup_seconds']:.0f} s", "memory": memory(row)}
        if dollars_per_hour:
            steps = row["median"] * 3600 / dollars_per_hour
            cells[f"steps per dollar, at {dollars_per_hour:g} an hour"] = f"{steps / 1e6:,.1f} M"
        rows.append(cells)
    return table(f"{record['mode']}, {record['case']}", rows, protocol(record))


def scaling(records: list[dict]) -> str:
    """One row for each number of environments; each is a comparison with one contender."""
    records = sorted(records, key=lambda record: record["settings"]["num_envs"])
    first, rows = records[0], []
    for row in (record["rows"][0] for record in records):
        cells = {"": row["contender"], first["unit"]: speed(row)}
        rows.append(cells | {"imports and compilation": f"{row['warmup_seconds']:.0f} s", "memory": memory(row)})
    settings = {name: value for name, value in first["settings"].items() if name != "num_envs"}
    return table(f"scaling, {family(first)}", rows, protocol(first | dict(settings=settings)))


def family(record: dict) -> str:
    """The case of a scaling record without its number of environments."""
    return re.sub(r"-\d+-envs", "-envs", record["case"])


# ----------------------------------------------------------------------------------------------------------------------
# Simulator: files of the tests and of vecsim_torch.py
# ----------------------------------------------------------------------------------------------------------------------


def parity(record: dict) -> str:
    """Worst errors that the tests measured. They name a model as its task or as its MJCF file; a row has both."""
    rows = {}
    for model, worst in record["rows"].items():
        row = rows.setdefault(re.sub("[^a-z0-9]|_?-?v5$", "", model.lower()), {"task": model})
        row |= worst | ({"task": model} if "-" in model else {})
    columns = ["qacc", *(f"qpos after a step of {name}" for name in ("euler", "implicitfast", "rk4"))]
    columns.append("observation of Gymnasium")
    cells = [dict(task=row["task"]) | {column: small(row, column) for column in columns} for row in rows.values()]
    note = f"`{record['command']}`, {package_list(record['versions'])}."
    return table("worst relative error against MuJoCo C, float64", cells, note)


def mjcf(records: list[dict]) -> str:
    """Files of other packages that the simulator accepts, and the rules that refuse the others: before, and now."""
    earlier, now = records[0], records[-1]

    def counts(record: dict, key: str, of: str) -> Counter:
        """How many rows that have `of`, by their `key`."""
        return Counter(row[key] for row in record["rows"] if of in row)

    commit, rows = f"commit {earlier['commit']}", []
    before, accepted = (counts(record, "package", "error") for record in (earlier, now))
    for name, files in counts(now, "package", "file").items():
        row = {"package": name, "files": files, f"accepted, {commit}": before[name], "accepted": accepted[name]}
        errors = [row["error"] for row in now["rows"] if row["package"] == name and "error" in row]
        rows.append(row | {"worst error of qacc": f"{max(errors):.0e}" if errors else "-"})
    note = f"{made_by(now)} {package_list(now['versions'])}."
    first = table("MJCF files of public packages", rows, note)
    before, rules = (counts(record, "refused", "refused") for record in (earlier, now))
    names = sorted(rules | before, key=lambda name: (-rules[name], name))
    rows = [{"rule": name, commit: before[name], "now": rules[name]} for name in names]
    return first + "\n" + table("files by the first rule that refuses them", rows)


def physics(records: list[dict]) -> str:
    """Files of `python vecsim_torch.py --json`: whole environment steps beside MuJoCo C's physics alone."""
    rows = []
    for run in records:
        ours, theirs = run["physics_steps_per_second"], run["mujoco_c_physics_steps_per_second"]
        row = {"task": run["env_id"], "integrator": run["integrator"]}
        row |= {"vecsim, physics steps/s": f"{ours:,.0f}", "MuJoCo C": f"{theirs:,.0f}"}
        row |= {"vecsim / MuJoCo C": f"{ours / theirs:.2f}", "compiled in": f"{run['compile_seconds']:.0f} s"}
        errors = run.get("qacc_error_p99_by_iterations", {})  # MuJoCo C has no terrain like vecsim's
        for words, count in (("error of qacc, 99th percentile, 2", "2"), ("3", "3"), ("4", "4")):
            row[f"{words} iterations"] = f"{errors[count]:.0e}" if errors else "-"
        where = f"{run['threads']} of {run['hardware']}" if run["device"] == "cpu" else run["hardware"]
        rows.append(row | {"cores": where})
    return table("vecsim, whole environment steps, beside MuJoCo C's physics alone on as many cores", rows)


# ----------------------------------------------------------------------------------------------------------------------
# runs
# ----------------------------------------------------------------------------------------------------------------------


def scores(name: str, runs: list[dict]) -> str:
    """A row for the seeds of a task that trained for as many steps. Where cores were shared, times do not count."""
    shared = any(run.get("cores_shared") for run in runs)
    unit, reached = ("environment steps", "steps_to_threshold") if shared else ("s", "seconds_to_threshold")
    rows = []
    for members in grouped(runs, "name", "env_steps"):
        first, scored = members[0], [run["gymnasium"] for run in members]
        row = {"task": first["env_id"], "algorithm": ALGORITHMS[first["algorithm"]]}
        row |= {"seeds": of_each(members, "seed", "d"), "environment steps": f"{first['env_steps']:,}"}
        if not shared:
            times = [of_each(members, key) for key in ("train_seconds", "compile_seconds")]
            row |= {"training, s": times[0], "compiled in, s": times[1]}
        form = ",.0f" if abs(scored[0]["mean"]) >= 100 else ".1f"
        row["median score"] = f"{statistics.median(scores_of(members)):{form}}"
        texts = (f"{x['mean']:{form}} ± {x['std']:{form}}" for x in scored)
        row["score of each seed (20 episodes)"] = " / ".join(texts)
        simulated = (run.get("vecsim") or run.get("mjx") for run in members)
        texts = (f"{x['mean']:{form}} ({x['min']:{form}})" if x else "-" for x in simulated)
        row["in the training simulator, mean (lowest)"] = " / ".join(texts)
        row["threshold"] = f"{first['threshold']:,}"
        rows.append(row | {f"reached after, {unit}": of_each(members, reached).replace("-", "not reached")})
    return table(f"scores in Gymnasium's own environments, {name}", rows)


def in_time(run: dict) -> list:
    """The evaluations (steps, s, score) within the minutes of a run, or a fiftieth later: a peer ends its rollout."""
    return [point for point in run["curve"] if point[1] <= 1.02 * 60 * run["minutes"]]


def at_equal_time(runs: list[dict], others: list[dict]) -> str:
    """Runs of q-learning beside our PPO and SAC of `peers`, all for as long as the longest of these runs."""
    minutes = max(run["train_seconds"] for run in runs) / 60
    ours = [run | dict(contender=f"ours-{run['algorithm']}") for run in runs]
    episodes = "10 episodes, of Q-learning 20" if others else "20 episodes"
    return peers([run | dict(minutes=minutes) for run in ours + others], episodes)


def peers(runs: list[dict], episodes: str = "10 episodes") -> str:
    """Scores after the same minutes of training on the same core, and seconds to a score."""
    rows, env_id = [], runs[0]["env_id"]
    goal = PEERS_GOALS[env_id]
    for contender, title in PEERS.items():
        members = [run for run in runs if run["contender"] == contender]
        if not members:
            continue
        curves = [in_time(run) for run in members]
        reached = [next((t for _, t, score in curve if score >= goal), None) for curve in curves]
        steps = statistics.median_low(curve[-1][0] for curve in curves)
        row = {"": title, "seeds": len(members), "environment steps": f"{steps:,}"}
        row[f"score of each seed ({episodes})"] = each(curve[-1][2] for curve in curves)
        row[f"{goal:,} reached after, s"] = each(reached)
        compiled = any(run["compile_seconds"] for run in members)
        rows.append(row | {"compilation, s": of_each(members, "compile_seconds") if compiled else "0"})
    minutes = max(run["minutes"] for run in runs)
    title = f"{env_id}, {minutes:.3g} minute{'s' if minutes != 1 else ''} of training on one core"
    return table(title, rows)


def flags_of(run: dict, end: str) -> str:
    """The flags of a run's command between its task and `end`."""
    return run["command"].split(f"--env-id {run['env_id']} ")[1].split(end)[0]


def candidates(runs: list[dict], words: str) -> str:
    """Settings of one algorithm: scores after the whole budget, and the time that they take."""
    rows, first = [], runs[0]
    for members in grouped(runs, "name"):
        name = members[0]["name"].removeprefix(f"{first['env_id']}-").replace("-", " ")
        row = {"": name, "score, median": f"{statistics.median_low(scores_of(members)):,.0f}"}
        row["score of each seed (20 episodes)"] = each(scores_of(members))
        row["training, s"] = of_each(members, "train_seconds")
        row[f"{first['threshold']:,} reached after, s"] = of_each(members, "seconds_to_threshold")
        flags = flags_of(members[0], "--seed").strip()
        rows.append(row | {"flags": f"`{flags}`" if flags else ""})
    return table(f"{words}, {first['env_id']}, {first['env_steps']:,} environment steps of each", rows)


def ablation(runs: list[dict]) -> str:
    """The ladder from the textbook, rung by rung with what each adds, then variants on top of all tricks.

    Scores after the whole budget, and as means over the curve, which depend less on luck at the end."""
    variants = sorted(grouped(runs, "name"), key=lambda members: len(flags_of(members[0], " --num-envs")))
    ladder = [members for members in variants if "vanilla" in members[0]["command"]]
    others = [members for members in grouped(runs, "name") if "vanilla" not in members[0]["command"]]
    rows, below = [], ""
    for members in ladder + others:
        final = scores_of(members)
        over_curve = [statistics.fmean(score for _, _, score in run["curve"]) for run in members]
        numbers = {"score, median": statistics.median(final), "worst": min(final)}
        numbers |= {"mean over the curve, median": statistics.median(over_curve), "worst ": min(over_curve)}
        flags, name = flags_of(members[0], " --num-envs"), members[0]["name"].replace("-", " ")
        added = f"`{flags.removeprefix(below).strip()}`"
        if REMOVED_FLAG in flags:
            added += ", a flag that has been removed since"
        if members in ladder:
            name, below = "+ " * bool(below) + name, flags
        row = {"": name} | {heading: f"{number:,.0f}" for heading, number in numbers.items()}
        rows.append(row | {"seeds": len(members), "flags": added})
    title = f"SAC, trick upon trick, {runs[0]['env_id']}, {runs[0]['env_steps']:,} environment steps of each"
    note = "Scores of 20 episodes in Gymnasium's own environment. " + made_by(runs[-1], "./benchmark.sh runs ablate")
    return table(title, rows, note)


def memories(runs: list[dict]) -> str:
    """PPO without and with a memory on the same budget, where it sees no velocities; the best first.

    Where cores were shared, times do not count."""
    rows, first = [], runs[0]
    best_first = sorted(grouped(runs, "name"), key=lambda members: -statistics.median(scores_of(members)))
    for members in best_first:
        texts = " / ".join("{mean:,.0f} ± {std:,.0f}".format(**run["gymnasium"]) for run in members)
        row = {"": members[0]["name"].replace("-", " "), "score of each seed (20 episodes)": texts}
        reached = of_each(members, "steps_to_threshold").replace("-", "not reached")
        row[f"{first['threshold']:,} reached after, environment steps"] = reached
        if not any(run["cores_shared"] for run in runs):
            row["training, s"] = of_each(members, "train_seconds")
            row["compiled in, s"] = of_each(members, "compile_seconds")
        rows.append(row)
    title = f"memory, {first['env_id']} without velocities, {first['env_steps']:,} environment steps of each"
    return table(title, rows, f"{first['hardware']}. {made_in_turn(runs, './benchmark.sh runs memory')}.")


def sizes(runs: list[dict]) -> str:
    """PPO with other sizes on the same budget, from few environments to many."""

    def numbers(members: list[dict]) -> list[int]:  # environments, steps, minibatches, layers
        return [int(word) for word in flags_of(members[0], " --seed").split() if word.isdecimal()]

    rows, first = [], runs[0]
    for members in sorted(grouped(runs, "name"), key=numbers):
        final, seconds = scores_of(members), statistics.median(run["train_seconds"] for run in members)
        row = {"sizes": f"`{flags_of(members[0], ' --seed')}`", "score, median": f"{statistics.median(final):,.0f}"}
        rows.append(row | {"worst": f"{min(final):,.0f}", "training, s": f"{seconds:,.0f}"})
    note = f"{len(members)} seeds of each. Scores of 20 episodes in Gymnasium's own environment. {first['hardware']}. "
    title = f"PPO by its sizes, {first['env_id']}, {first['env_steps']:,} environment steps"
    return table(title, rows, note + made_by(first, "./benchmark.sh runs sizes"))


def agents(record: dict) -> str:
    """Many agents in one program of ppo_mjx_jax.py beside one agent."""

    def both(row: dict) -> float:  # the time that a user waits
        return statistics.median(map(sum, zip(row["train_seconds"], row["compile_seconds"], strict=True)))

    rows, one = [], record["rows"][0]
    for row in record["rows"]:
        seconds, middle = row["train_seconds"], row["median_train_seconds"]
        spread = f"{middle:,.1f} s ({min(seconds):,.1f} to {max(seconds):,.1f})"
        cells = {"agents": row["num_seeds"], "training time": spread}
        cells["training, times one agent"] = f"{middle / one['median_train_seconds']:.2f}"
        cells |= {"compiled in": f"{row['median_compile_seconds']:,.1f} s", "both": f"{both(row):,.1f} s"}
        cells["both, times one agent"] = f"{both(row) / both(one):.2f}"
        rows.append(cells | {"environment steps of each": f"{row['env_steps']:,}"})
    note = f"{record['hardware']}; {len(seconds)} trainings of each in turn. {package_list(record['versions'])}. "
    note += made_by(record, f"{record['command']} --num-seeds K")
    return table(f"agents in one program, {record['env_id']}", rows, note)


def profile(records: list[dict]) -> str:
    rows = []
    for run in records:
        script = f"`{run['script']}`" + (f", {run['stage']}" if run.get("stage") else "")
        row = {"script": script, "task": run["env_id"], "steps per iteration": f"{run['steps']:,}"}
        for name in ("simulate", "infer", "targets", "sample", "update", "the rest"):
            stage = run["stages"].get(name)
            row[name] = f"{stage['seconds'] * 1e3:,.1f} ms ({stage['share']:.0%})" if stage else "-"
        rows.append(row)
    note = (
        f"{records[0]['hardware']}. {made_in_turn(records, './benchmark.sh runs profile')} (all but the JAX script). "
    )
    note += "Ant integrates with RK4, HalfCheetah with Euler and the quadruped with implicitfast."
    return table("where an iteration's time goes", rows, note)


def judged(record: dict, summary: Path) -> str:
    """The panel that `runs walk` and `runs distill` leave beside the record of their training."""
    rows = {}
    for found in csv.DictReader(summary.read_text().splitlines()):
        row = rows.setdefault(found["perturbation"], {"": found["perturbation"].replace("_", " ")})
        row[found["checkpoint"]] = f"{float(found['success']):.0%}, {float(found['tracking']):.3f} m/s"
    return table(f"{record['env_id']}: share of episodes that succeed, and velocity error", list(rows.values()))


def walkers(records: list[dict]) -> str:
    """The policies of `runs walk-memory`, one row each: velocity error and share of failures under each perturbation.

    The steps of a student include those of its teacher. Times are left out: other work shared the cores."""
    rows = []
    for record in records:
        run, spent = record["folder"].replace("-", " "), 0
        judged = list(csv.DictReader((record["path"].parent / "panel/summary.csv").read_text().splitlines()))
        for policy, of_policy in record["policies"].items():
            spent += of_policy["env_steps"]
            row = {"": run if policy == "policy" else policy, "environment steps": f"{spent:,}"}
            for found in judged:
                if policy in ("policy", found["checkpoint"]):
                    condition = found["perturbation"].replace("none", "vecsim").replace("_", " ")
                    row[condition] = f"{float(found['tracking']):.3f} ({1 - float(found['success']):.0%})"
            rows.append(row)
    note = f"{records[0]['hardware']}. {made_in_turn(records, './benchmark.sh runs walk-memory')}."
    return table(f"{records[0]['env_id']} without base velocity: velocity error, m/s (failures)", rows, note)


def stages(record: dict) -> str:
    """What the trainings of a teacher and its students took, or that of one policy."""
    rows = [
        {"": name, "environment steps": f"{x['env_steps']:,}", "training": f"{x['train_seconds']:,.0f} s"}
        for name, x in record["policies"].items()
    ]
    title = f"{'trainings of teacher and students' if len(rows) > 1 else 'training'}, {record['env_id']}"
    return table(title, rows, f"{record['hardware']}. {made_by(record)}")


# ----------------------------------------------------------------------------------------------------------------------
# GPU
# ----------------------------------------------------------------------------------------------------------------------


def predicted(record: dict) -> str:
    """What gpu_kernels.py counted and predicts: one row for each task, then one for each of its functions."""
    rows, tasks = [], record["tasks"]
    for task in tasks:
        row = {"task": task["env_id"], "": "predicted"}
        row["launches of a step, by vecsim's compiler + others"] = f"{task['launches']:,} + {task['outside']}"
        row["traffic of an environment and step"] = f"{task['bytes'] / 1e3:,.0f} KB"
        for size, rates in task["rates"].items():
            heading = f"million environment steps/s at {int(size):,}"
            row[heading] = " to ".join(f"{rate / 1e6:.2f}" for rate in rates)
        rows.append(row)
    note = f"{record['hardware']}; {package_list(record['versions'])}. {made_in_turn(tasks, record['command'])}."
    return table("an environment step on an H100", rows, note) + "\n" + kernels(tasks)


def kernels(tasks: list[dict]) -> str:
    rows = []
    for task in tasks:
        for region in task["regions"]:
            row = {"task and function": f"{task['env_id']}, {region['region']}", "": "predicted"}
            row["launches x calls in a step"] = f"{len(region['bytes'])} x {region['calls']}"
            row["traffic of an environment and call"] = f"{sum(region['bytes']) / 1e3:.1f} KB"
            rows.append(row | {"most registers": region["registers"], "largest stack": f"{region['stack']} B"})
    return table("functions", rows)


def shown(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(map(shown, value))
    if isinstance(value, (int, float)):
        return f"{value:,.0f}" if value == 0 or abs(value) >= 100 else f"{value:.3g}"
    return "nothing" if value is None else str(value)


def first_hour(records: list[dict]) -> str:
    """What the blocks of `./benchmark.sh gpu` found beside what was predicted."""
    rows = []
    for record in records:
        for name, (found, expected) in record["figures"].items():
            row = {"block": record["block"], "figure": name, "found": shown(found)}
            rows.append(row | {"predicted": "-" if expected is None else shown(expected)})
    for record in records:
        if record["status"] != "done":
            rows.append({"block": record["block"], "figure": record["status"], "found": "-", "predicted": "-"})
    return table("the first hour", rows, f"{records[0]['hardware']}. {made_in_turn(records, './benchmark.sh gpu')}.")
