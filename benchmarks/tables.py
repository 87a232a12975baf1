"""Markdown tables of the result files. Each function takes the content of files and returns text."""

from __future__ import annotations

import csv
import json
import re
import statistics
from collections import Counter
from itertools import groupby
from pathlib import Path

ALGORITHMS = {"ppo": "PPO", "ppo_mjx": "PPO, JAX", "sac": "SAC", "dqn": "DQN", "pqn": "PQN"}
PEERS = {
    "ours-ppo": "ours, PPO",
    "ours-sac": "ours, SAC",
    "ours-dqn": "ours, DQN",
    "ours-pqn": "ours, PQN",
    "sb3-ppo": "SB3, PPO",
    "sb3-sac": "SB3, SAC",
    "cleanrl-ppo": "CleanRL-style, PPO",
}
PEERS_GOALS = {"InvertedPendulum-v5": 1000, "HalfCheetah-v5": 3000, "Hopper-v5": 2500, "Walker2d-v5": 2500}
REMOVED_FLAG = "--weight-projection"  # of sac_gpu_torch.py; one row of the ablation was measured with it
NOT_SETTINGS = "env_id env_kwargs device states xml hidden ours".split()


def load(results: Path, pattern: str) -> list[dict]:
    """The files that match, in the order of their names; `name` is a file's name without its ending and its seed."""
    found = []
    for path in sorted(results.glob(pattern)):
        found.append(json.loads(path.read_text()) | dict(name=path.stem.split("-seed")[0], folder=path.parent.name))
    return found


def grouped(runs: list[dict], *keys: str) -> list[list[dict]]:
    """Runs that are next to each other and agree in these keys."""
    return [list(members) for _, members in groupby(runs, key=lambda run: [run[key] for key in keys])]


def table(title: str, header: list[str], rows: list[list[str]], note: str = "") -> str:
    lines = [f"**{title}**", "", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, "", note] if note else lines) + "\n"


def each(values: list, form: str = ",.0f") -> str:
    """Values of the seeds; "-" for one that is missing."""
    return " / ".join("-" if value is None else f"{value:{form}}" for value in values)


def made_by(record: dict, command: str | None = None) -> str:
    return f"Commit {record['commit']}, `{command or record['command']}`."


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


def reference(record: dict) -> tuple[str, dict | None]:
    """Name and row of the contender that the others are compared with; no row if it was not measured."""
    name = record.get("reference", record["rows"][0]["contender"])
    return name, next((row for row in record["rows"] if row["contender"] == name), None)


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
    packages = sorted({item for row in rows for item in row["versions"].items()})
    lines = [
        f"{cores} of {record['hardware']}; {', '.join(settings)}; {windows}.",
        f"{', '.join(f'{name} {version}' for name, version in packages)}. {made_by(record)}",
    ]
    lines += [f"{name} is missing: {reason.split(' (log:')[0]}." for name, reason in record["failed"].items()]
    for row in rows:
        if "stopped" in row:
            stopped = row["stopped"].split(" (log:")[0]
            lines.append(f"{row['contender']} has {len(row['values'])} of them; it stopped: {stopped}.")
    return "\n".join(lines)


def comparison(record: dict, dollars_per_hour: float | None = None) -> str:
    name, first = reference(record)
    errors = {"error of one step, median": "step_error_p50", "p99": "step_error_p99"} if record["mode"] == "sim" else {}
    starts = {"first start": "first_start_seconds", "second start": "warmup_seconds"}
    if not any("first_start_seconds" in row for row in record["rows"]):  # the contenders of an older file started once
        starts = {}
    rows = []
    for row in record["rows"]:
        seconds = [f"{row[key]:.0f} s" if "first_start_seconds" in row else "-" for key in starts.values()]
        cells = [row["contender"], speed(row), ratio(first, row), *(small(row, key) for key in errors.values())]
        price = [f"{row['median'] * 3600 / dollars_per_hour / 1e6:,.1f} M"] if dollars_per_hour else []
        rows.append([*cells, *seconds, memory(row), *price])
    price = [f"steps per dollar, at {dollars_per_hour:g} an hour"] if dollars_per_hour else []
    header = ["", record["unit"], f"{name} / this row", *errors, *starts, "memory", *price]
    return table(f"{record['mode']}, {record['case']}", header, rows, protocol(record))


def scaling(records: list[dict]) -> str:
    """One row for each number of environments; each is a comparison with one contender."""
    records = sorted(records, key=lambda record: int(record["rows"][0]["contender"].split()[0]))
    rows = []
    for row in (record["rows"][0] for record in records):
        kernels = f"{row['kernels_per_physics_step']:.1f}" if "kernels_per_physics_step" in row else "-"
        rows.append([row["contender"], speed(row), kernels, f"{row['warmup_seconds']:.0f} s", memory(row)])
    first = records[0]
    settings = {name: value for name, value in first["settings"].items() if name != "num_envs"}
    header = ["", first["unit"], "kernels per physics step", "imports and compilation", "memory"]
    return table(f"scaling, {family(first)}", header, rows, protocol(first | dict(settings=settings)))


def family(record: dict) -> str:
    """The case of a scaling record without its number of environments."""
    return re.sub(r"-\d+-(envs|processes)", r"-\1", record["case"])


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
    cells = [[row["task"], *(small(row, column) for column in columns)] for row in rows.values()]
    note = f"`{record['command']}`, {package_list(record['versions'])}."
    return table("worst relative error against MuJoCo C, float64", ["task", *columns], cells, note)


def mjcf(records: list[dict]) -> str:
    """Files of other packages that the simulator accepts, and the rules that refuse the others: before, and now."""
    now, earlier = records[-1], records[0]

    def counts(key: str, of: dict) -> Counter:
        return Counter(row.get(key, "accepted") for row in of["rows"])

    def of_package(name: str, record: dict) -> list[dict]:
        return [row for row in record["rows"] if row["package"] == name and "error" in row]

    rows = []
    for name, files in counts("package", now).items():
        accepted = of_package(name, now)
        worst = f"{max(row['error'] for row in accepted):.0e}" if accepted else "-"
        rows.append([name, str(files), str(len(of_package(name, earlier))), str(len(accepted)), worst])
    note = f"{made_by(now)} {package_list(now['versions'])}."
    first = table(
        "MJCF files of public packages",
        ["package", "files", f"accepted, commit {earlier['commit']}", "accepted", "worst error of qacc"],
        rows,
        note,
    )
    rules, before = counts("refused", now), counts("refused", earlier)
    names = sorted((rules | before).keys() - {"accepted"}, key=lambda name: (-rules[name], name))
    rows = [[name, str(before[name]), str(rules[name])] for name in names]
    return (
        first
        + "\n"
        + table("files by the first rule that refuses them", ["rule", f"commit {earlier['commit']}", "now"], rows)
    )


def physics(records: list[dict]) -> str:
    """Files of `python vecsim_torch.py --json`: whole environment steps beside MuJoCo C's physics alone."""
    rows = []
    for run in records:
        ours, theirs = run["physics_steps_per_second"], run["mujoco_c_physics_steps_per_second"]
        errors = [f"{run['qacc_error_p99_by_iterations'][count]:.0e}" for count in "234"]
        where = f"{run['threads']} of {run['hardware']}" if run["device"] == "cpu" else run["hardware"]
        speeds = [f"{ours:,.0f}", f"{theirs:,.0f}", f"{ours / theirs:.2f}", f"{run['compile_seconds']:.0f} s"]
        rows.append([run["env_id"], *speeds, *errors, where])
    header = ["task", "vecsim, physics steps/s", "MuJoCo C", "vecsim / MuJoCo C", "compiled in"]
    header += ["error of qacc, 99th percentile, 2 iterations", "3 iterations", "4 iterations", "cores"]
    return table("vecsim, whole environment steps, beside MuJoCo C's physics alone on one core", header, rows)


# ----------------------------------------------------------------------------------------------------------------------
# runs
# ----------------------------------------------------------------------------------------------------------------------


def scores(name: str, runs: list[dict]) -> str:
    """A row for the seeds of a task that trained for as many steps. Where cores were shared, times do not count."""
    shared = any(run.get("cores_shared") for run in runs)
    rows = []
    for members in grouped(runs, "name", "env_steps"):
        first = members[0]
        simulated = [run.get("vecsim") or run.get("mjx") for run in members]
        reached = [run.get("steps_to_threshold" if shared else "seconds_to_threshold") for run in members]
        row = [first["env_id"], ALGORITHMS[first["algorithm"]], each([run["seed"] for run in members], "d")]
        row.append(f"{first['env_steps']:,}")
        if not shared:
            row.append(each([run["train_seconds"] for run in members]))
            row.append(each([run.get("compile_seconds") for run in members]))
        form = ",.0f" if abs(first["gymnasium"]["mean"]) >= 100 else ".1f"
        scored = [run["gymnasium"] for run in members]
        row.append(" / ".join(f"{x['mean']:{form}} ± {x['std']:{form}}" for x in scored))
        row.append(" / ".join(f"{x['mean']:{form}} ({x['min']:{form}})" if x else "-" for x in simulated))
        if "threshold" in first:
            row += [f"{first['threshold']:,}", each(reached).replace("-", "not reached")]
        rows.append(row + ["-", "-"] * ("threshold" not in first))
    times = [] if shared else ["training, s", "compiled in, s"]
    header = ["task", "algorithm", "seeds", "environment steps", *times, "score of each seed (20 episodes)"]
    header += ["in the training simulator, mean (lowest)", "threshold"]
    header += ["reached after, environment steps" if shared else "reached after, s"]
    return table(f"scores in Gymnasium's own environments, {name}", header, rows)


def in_time(run: dict) -> list:
    """The evaluations (steps, s, score) within the minutes of a run, or a fiftieth later: a peer ends its rollout."""
    return [point for point in run["curve"] if point[1] <= 1.02 * 60 * run["minutes"]]


def at_equal_time(env_id: str, runs: list[dict], others: list[dict]) -> str:
    """Runs of q-learning beside our PPO and SAC of `peers`, all for as long as the longest of these runs."""
    minutes = max(run["train_seconds"] for run in runs) / 60
    ours = [run | dict(contender=f"ours-{run['algorithm']}") for run in runs]
    episodes = "10 episodes, of Q-learning 20" if others else "20 episodes"
    return peers(env_id, [run | dict(minutes=minutes) for run in ours + others], episodes)


def peers(env_id: str, runs: list[dict], episodes: str = "10 episodes") -> str:
    """Scores after the same minutes of training on the same core, and seconds to a score."""
    rows, goal = [], PEERS_GOALS[env_id]
    for contender, title in PEERS.items():
        members = [run for run in runs if run["contender"] == contender]
        if not members:
            continue
        curves = [in_time(run) for run in members]
        reached = [next((t for _, t, score in curve if score >= goal), None) for curve in curves]
        compiled = [run["compile_seconds"] for run in members]
        steps = statistics.median_low(curve[-1][0] for curve in curves)
        row = [title, str(len(members)), f"{steps:,}", each([curve[-1][2] for curve in curves])]
        rows.append([*row, each(reached), each(compiled) if any(compiled) else "0"])
    header = ["", "seeds", "environment steps", f"score of each seed ({episodes})"]
    header += [f"{goal:,} reached after, s", "compilation, s"]
    minutes = max(run["minutes"] for run in runs)
    title = f"{env_id}, {minutes:.3g} minute{'s' if minutes != 1 else ''} of training on one core"
    return table(title, header, rows)


def flags_of(run: dict, end: str) -> str:
    """The flags of a run's command between its task and `end`."""
    return run["command"].split(f"--env-id {run['env_id']} ")[1].split(end)[0]


def candidates(runs: list[dict], words: str) -> str:
    """Settings of one algorithm: scores after the whole budget, and the time that they take."""
    rows, first = [], runs[0]
    for members in grouped(runs, "name"):
        final = [run["gymnasium"]["mean"] for run in members]
        name = members[0]["name"].removeprefix(f"{first['env_id']}-").replace("-", " ")
        times = [each([run[key] for run in members]) for key in ("train_seconds", "seconds_to_threshold")]
        flags = flags_of(members[0], "--seed").strip()
        rows.append([name, f"{statistics.median_low(final):,.0f}", each(final), *times, f"`{flags}`" if flags else ""])
    header = ["", "score, median", "score of each seed (20 episodes)", "training, s"]
    header += [f"{first['threshold']:,} reached after, s", "flags"]
    title = f"{words}, {first['env_id']}, {first['env_steps']:,} environment steps of each"
    return table(title, header, rows)


def ablation(runs: list[dict]) -> str:
    """The ladder from the textbook, rung by rung with what each adds, then variants on top of all tricks.

    Scores after the whole budget, and as means over the curve, which depend less on luck at the end."""
    variants = sorted(grouped(runs, "name"), key=lambda members: len(flags_of(members[0], " --num-envs")))
    ladder = [members for members in variants if "vanilla" in members[0]["command"]]
    others = [members for members in grouped(runs, "name") if "vanilla" not in members[0]["command"]]
    rows, below = [], ""
    for members in ladder + others:
        final = [run["gymnasium"]["mean"] for run in members]
        over_curve = [statistics.fmean(score for _, _, score in run["curve"]) for run in members]
        numbers = [statistics.median(final), min(final), statistics.median(over_curve), min(over_curve)]
        flags, name = flags_of(members[0], " --num-envs"), members[0]["name"].replace("-", " ")
        added = f"`{flags.removeprefix(below).strip()}`"
        if REMOVED_FLAG in flags:
            added += ", a flag that has been removed since"
        if members in ladder:
            name, below = "+ " * bool(below) + name, flags
        rows.append([name, *(f"{number:,.0f}" for number in numbers), str(len(members)), added])
    header = ["", "score, median", "worst", "mean over the curve, median", "worst", "seeds", "flags"]
    title = f"SAC, trick upon trick, {runs[0]['env_id']}, {runs[0]['env_steps']:,} environment steps of each"
    note = "Scores of 20 episodes in Gymnasium's own environment. " + made_by(runs[-1], "./benchmark.sh runs ablate")
    return table(title, header, rows, note)


def memories(runs: list[dict]) -> str:
    """PPO without and with a memory on the same budget, where it sees no velocities; the best first."""
    rows, first = [], runs[0]
    for members in grouped(runs, "name"):
        scores = " / ".join("{mean:,.0f} ± {std:,.0f}".format(**run["gymnasium"]) for run in members)
        middle = statistics.median(run["gymnasium"]["mean"] for run in members)
        times = [each([run[key] for run in members]) for key in ("train_seconds", "compile_seconds")]
        reached = each([run["steps_to_threshold"] for run in members]).replace("-", "not reached")
        rows.append((-middle, [members[0]["name"].replace("-", " "), scores, reached, *times]))
    header = ["", "score of each seed (20 episodes)", f"{first['threshold']:,} reached after, environment steps"]
    title = f"memory, {first['env_id']} without velocities, {first['env_steps']:,} environment steps of each"
    commits = ", ".join(dict.fromkeys(run["commit"] for run in runs))
    note = f"{first['hardware']}. Commits {commits}, `./benchmark.sh runs memory`."
    return table(title, [*header, "training, s", "compiled in, s"], [cells for _, cells in sorted(rows)], note)


def sizes(runs: list[dict]) -> str:
    """PPO with other sizes on the same budget, from few environments to many."""
    rows, first = [], runs[0]
    for members in grouped(runs, "name"):
        final = [run["gymnasium"]["mean"] for run in members]
        seconds = statistics.median(run["train_seconds"] for run in members)
        flags = flags_of(members[0], " --seed")
        numbers = [int(word) for word in flags.split() if word.isdecimal()]  # environments, steps, minibatches, layers
        cells = [f"`{flags}`", f"{statistics.median(final):,.0f}", f"{min(final):,.0f}", f"{seconds:,.0f}"]
        rows.append((numbers, cells))
    header = ["sizes", "score, median", "worst", "training, s"]
    note = f"{len(members)} seeds of each. Scores of 20 episodes in Gymnasium's own environment. {first['hardware']}. "
    title = f"PPO by its sizes, {first['env_id']}, {first['env_steps']:,} environment steps"
    cells = [cells for _, cells in sorted(rows)]
    return table(title, header, cells, note + made_by(first, "./benchmark.sh runs sizes"))


def agents(record: dict) -> str:
    """Many agents in one program of ppo_mjx_jax.py beside one agent."""

    def both(row: dict) -> float:  # the time that a user waits
        return statistics.median(map(sum, zip(row["train_seconds"], row["compile_seconds"], strict=True)))

    rows, one = [], record["rows"][0]
    for row in record["rows"]:
        seconds, middle = row["train_seconds"], row["median_train_seconds"]
        spread = f"{middle:,.1f} s ({min(seconds):,.1f} to {max(seconds):,.1f})"
        cells = [str(row["num_seeds"]), spread, f"{middle / one['median_train_seconds']:.2f}"]
        cells += [f"{row['median_compile_seconds']:,.1f} s", f"{both(row):,.1f} s", f"{both(row) / both(one):.2f}"]
        rows.append([*cells, f"{row['env_steps']:,}"])
    header = ["agents", "training time", "training, times one agent", "compiled in", "both"]
    header += ["both, times one agent", "environment steps of each"]
    note = f"{record['hardware']}; {len(seconds)} trainings of each in turn. {package_list(record['versions'])}. "
    note += made_by(record, f"{record['command']} --num-seeds K")
    return table(f"agents in one program, {record['env_id']}", header, rows, note)


def profile(records: list[dict]) -> str:
    names, rows = ("simulate", "infer", "targets", "sample", "update", "the rest"), []
    for run in records:
        stages = [run["stages"].get(name) for name in names]
        cells = [f"{stage['seconds'] * 1e3:,.1f} ms ({stage['share']:.0%})" if stage else "-" for stage in stages]
        script = f"`{run['script']}`" + (f", {run['stage']}" if run.get("stage") else "")
        rows.append([script, run["env_id"], f"{run['steps']:,}", *cells])
    commits = ", ".join(dict.fromkeys(run["commit"] for run in records))
    note = f"{records[0]['hardware']}. Commits {commits}, `./benchmark.sh runs profile` (all but the JAX script)."
    header = ["script", "task", "steps per iteration", *names]
    return table("where an iteration's time goes", header, rows, note)


def walk(record: dict) -> str:
    """A trained quadruped in its own simulator and in MuJoCo C."""
    rows = []
    for name, key in (("vecsim", "vecsim"), ("MuJoCo C", "mujoco")):
        found = record["walk"][key]
        errors = [f"{found[error]:.3f}" for error in ("velocity_error", "yaw_error")]
        share, score = f"{found['without_a_fall']:.0%}", f"{found['episode_return']:.1f}"
        rows.append([name, str(found["episodes"]), share, *errors, score])
    header = [
        "simulator",
        "episodes of 20 s",
        "without a fall",
        "velocity error, m/s",
        "turning error, rad/s",
        "return",
    ]
    trained = f"{record['env_steps']:,} environment steps in {record['train_seconds']:,.0f} s"
    note = f"{record['hardware']}. {made_by(record)}"
    return table(f"a quadruped trained in vecsim, {trained}", header, rows, note)


def distill(record: dict) -> str:
    """Tracking score and share of falls of each policy under each perturbation."""
    summary, policies = record["summary"], list(record["policies"])
    teacher, others = policies[0], policies[1:]
    rows = []
    for name in record["perturbations"]:
        cells = [
            f"{summary[policy][name]['tracking']:.2f} ({summary[policy][name]['falls']:.0%})" for policy in policies
        ]
        shares = [f"{summary[policy][name]['tracking_of_teacher']:.0%}" for policy in others]
        if summary[teacher][name]["tracking"] < 0.05:  # a share of almost nothing says nothing
            shares = ["-"] * len(others)
        rows.append([name.replace("_", " "), *cells, *shares])
    title = f"teacher and students, {record['env_id']}: tracking score (falls), and share of the teacher's score"
    header = ["", *policies, *(f"{policy}, of teacher" for policy in others)]
    return table(title, header, rows) + "\n" + stages(record)


def judged(record: dict, summary: Path) -> str:
    """The panel that `runs walk` and `runs distill` leave beside the record of their training: return (success)."""
    with summary.open() as file:
        cells = {(row["perturbation"], row["checkpoint"]): row for row in csv.DictReader(file)}
    policies = list(dict.fromkeys(policy for _, policy in cells))
    rows = []
    for perturbation in dict.fromkeys(name for name, _ in cells):
        found = [cells.get((perturbation, policy)) for policy in policies]
        shown = [f"{float(row['return']):,.1f} ({float(row['success']):.0%})" if row else "-" for row in found]
        rows.append([perturbation.replace("_", " "), *shown])
    return table(f"{record['env_id']}: return, interquartile mean, and share of successes", ["", *policies], rows)


def walkers(folder: Path) -> str:
    """The policies of `runs walk-memory`, one row each: velocity error and share of falls under each perturbation.

    Steps and seconds of a student include those of its teacher."""
    rows, conditions, records = [], {}, []
    for training in sorted(folder.glob("*/training.json")):
        run = training.parent.name.replace("-", " ")
        records.append(json.loads(training.read_text()))
        with (training.parent / "panel/summary.csv").open() as file:
            judged = list(csv.DictReader(file))
        conditions |= dict.fromkeys(row["perturbation"] for row in judged)
        spent, took = 0, 0.0
        for policy, of_policy in records[-1]["policies"].items():
            spent, took = spent + of_policy["env_steps"], took + of_policy["train_seconds"]
            found = {row["perturbation"]: row for row in judged if policy in ("policy", row["checkpoint"])}
            shown = [found.get(name) for name in conditions]
            cells = [f"{float(x['tracking']):.3f} ({1 - float(x['success']):.0%})" if x else "-" for x in shown]
            rows.append([run if policy == "policy" else policy, f"{spent:,}", f"{took:,.0f}", *cells])
    names = ["vecsim" if name == "none" else name.replace("_", " ") for name in conditions]
    commits = ", ".join(dict.fromkeys(record["commit"] for record in records))
    note = f"{records[0]['hardware']}. Commits {commits}, `./benchmark.sh runs walk-memory`."
    title = f"{records[0]['env_id']} without base velocity: velocity error, m/s (falls)"
    return table(title, ["", "environment steps", "training, s", *names], rows, note)


def stages(record: dict) -> str:
    """What the trainings of a teacher and its students took, or that of one policy."""
    rows = [[name, f"{x['env_steps']:,}", f"{x['train_seconds']:,.0f} s"] for name, x in record["policies"].items()]
    header = ["", "environment steps", "training"]
    title = f"{'trainings of teacher and students' if len(rows) > 1 else 'training'}, {record['env_id']}"
    return table(title, header, rows, f"{record['hardware']}. {made_by(record)}")


# ----------------------------------------------------------------------------------------------------------------------
# GPU
# ----------------------------------------------------------------------------------------------------------------------


def predicted(record: dict) -> str:
    """What gpu_kernels.py counted and predicts: one row for each task, then one for each region of a task."""
    rows, tasks = [], record["tasks"]
    sizes = list(tasks[0]["rates"])
    for task in tasks:
        ranges = [" to ".join(f"{rate / 1e6:.2f}" for rate in task["rates"][size]) for size in sizes]
        launches = f"{task['launches']:,} + {task['outside']}"
        rows.append([task["env_id"], "predicted", launches, f"{task['bytes'] / 1e3:,.0f} KB", *ranges])
    header = ["task", "", "launches of an environment step, in regions + outside", "traffic of an environment and step"]
    header += [f"million environment steps/s at {int(size):,}" for size in sizes]
    commits = ", ".join(dict.fromkeys(task["commit"] for task in tasks))
    note = f"{record['hardware']}; {package_list(record['versions'])}. Commits {commits}, `{record['command']}`."
    return table("an environment step on an H100", header, rows, note) + "\n" + kernels(tasks)


def kernels(tasks: list[dict]) -> str:
    rows = []
    for task in tasks:
        for region in task["regions"]:
            best = min(region["registers"], key=lambda configuration: configuration["stack"])
            worst = max(configuration["stack"] for configuration in region["registers"])
            launches = f"{len(region['bytes'])} x {region['calls']}"
            moved = f"{sum(region['bytes']) / 1e3:.1f} KB"
            cells = [launches, moved, str(best["registers"]), f"{best['stack']} B", f"{worst} B"]
            rows.append([f"{task['env_id']}, {region['region']}", "predicted", *cells])
    header = ["task and region", "", "launches x calls in a step", "traffic of an environment and call"]
    header += ["registers of the heaviest kernel", "its stack", "its stack in the worst configuration"]
    return table("regions", header, rows)


def first_hour(records: list[dict]) -> str:
    """What the blocks of `./benchmark.sh gpu` found beside what was predicted."""
    from benchmarks.gpu import shown

    rows = []
    for record in records:
        for name, (found, expected) in record["figures"].items():
            rows.append([record["block"], name, shown(found), "-" if expected is None else shown(expected)])
    rows += [[record["block"], record["status"], "-", "-"] for record in records if record["status"] != "done"]
    commits = ", ".join(dict.fromkeys(record["commit"] for record in records))
    note = f"{records[0]['hardware']}. Commits {commits}, `./benchmark.sh gpu`."
    return table("the first hour", ["block", "figure", "found", "predicted"], rows, note)
