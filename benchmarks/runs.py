"""Runs a set of trainings from runs.toml and writes a file of results for each.

A result that is there is not measured again without --force. A training that was interrupted continues from its last
checkpoint, at the same commit only. Times are the trainer's own, without compilation and evaluations.
"""

from __future__ import annotations

import gzip
import itertools
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from argparse import Namespace
from pathlib import Path

import vecsim_torch as vecsim
from benchmarks import environments, machine, tables
from benchmarks.comparisons import place, units
from benchmarks.referee import Contender, environment_of, on_cores, save, say

SETS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
TASK = re.compile(r"\w+-(?:v5|Flat|Rough)")
CURVE_COLUMNS = "env_steps wall_seconds velocity_error episode_length terrain_level imitation_loss".split()


# ----------------------------------------------------------------------------------------------------------------------
# From the table of a set to its runs
# ----------------------------------------------------------------------------------------------------------------------


def command_of(run: dict, options: Namespace) -> str:
    """What a user would type for this training; for another library its program and variant."""
    if "program" in run:
        return f"{run['program']}, {run['variant']}"
    total = options.total_timesteps or run.get("total_timesteps")
    words = ["python", run["script"], "--env-id", run["env_id"], *run["flags"].split(), *run.get("always", "").split()]
    words += ["--seed", str(run["seed"])] if run["seed"] else []
    words += ["--eval-every", str(run["every"])] if "every" in run else []
    words += ["--total-timesteps", str(total)] if total else []
    words += ["--device", "cpu"] if options.device == "cpu" else []
    words += ["--compilation-cache", ""] if run["script"] == "ppo_mjx_jax.py" else []  # JAX compiles cold
    return shlex.join(words)


def trainings(name: str, options: Namespace) -> list[dict]:
    """The runs of a set, each with all its keys, its file and its command; seed by seed, so that all have as many."""
    shared = {key: value for key, value in SETS[name].items() if key != "runs"}
    found, above = [], ""
    for run_name, own in SETS[name]["runs"].items():
        run = dict(flags=f"{above} {own['adds']}" if "adds" in own else "") | shared | own
        above = run["flags"]
        own_task = run.get("env_id") or TASK.match(run_name)[0]
        tasks = options.env_id or [own_task]
        if "env_id" not in shared:  # else the set is about one task, which may be any
            tasks = [own_task] if own_task in tasks else []
        for env_id, seed in itertools.product(tasks, run.get("seeds", [None])):
            folder = f"{run['folder']}/{env_id}" if "env_id" in shared else run["folder"]
            one = run | dict(env_id=env_id, seed=seed, file=f"{folder}/{run_name}-seed{seed}")
            one["contender"] = Path(run_name).name  # of `peers`
            if run["kind"] == "profile":
                parts = Path(run["script"]).stem, env_id, place(options), run.get("stage")
                one["file"] = f"{folder}/{'-'.join(filter(None, parts))}"
            elif not seed:
                one["file"] = f"{folder}/{run_name}{'/training' if run['kind'] == 'panel' else ''}"
            found.append(one | dict(command=command_of(one, options)))
    return sorted(found, key=lambda run: run["seed"] or 0)


def tasks_of(name: str) -> list[str]:
    """The tasks of a set; none: it takes any task."""
    if "env_id" in SETS[name]:
        return []
    runs = SETS[name]["runs"]
    return list(dict.fromkeys(own.get("env_id") or TASK.match(run_name)[0] for run_name, own in runs.items()))


# ----------------------------------------------------------------------------------------------------------------------
# The kinds of runs: each takes a run and returns the record that becomes its file
# ----------------------------------------------------------------------------------------------------------------------


def call(command: str, *more: str | Path, options: Namespace, quiet: bool = False) -> None:
    """Run a command of runs.toml with this Python; RuntimeError if it fails."""
    words = [*on_cores(options), sys.executable, *shlex.split(command)[1:], *map(str, more)]
    status = subprocess.run(words, cwd=machine.ROOT, stdout=subprocess.DEVNULL if quiet else None).returncode
    if status:
        raise RuntimeError(f"stopped with status {status}; the same command continues it")


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def curve_of(path: Path) -> list[list[float]]:
    """[environment steps, seconds of training, score in Gymnasium] of each evaluation in a log."""
    names = "env_steps", "wall_seconds", "gymnasium_return"
    return [[round(line[name], 1) for name in names] for line in lines_of(path) if "gymnasium_return" in line]


def train(run: dict, options: Namespace, last: str) -> Path:
    """Train to the end, from the last checkpoint if there is one; returns the folder, in which `last` is a file."""
    folder = environments.CACHE / "runs" / machine.commit().replace(" ", "-") / run["file"]
    if options.total_timesteps:
        folder = folder.with_name(f"{folder.name}-{options.total_timesteps}-steps")
    if options.force and (folder / last).exists():
        shutil.rmtree(folder)  # a finished training; an interrupted one continues
    if not (folder / last).exists():
        stages = [folder / stage for stage in run.get("stages", [""])]
        checkpoints = [file for stage in stages for file in sorted(stage.glob("checkpoint.*"))]
        if checkpoints:
            call(run["command"], "--resume", checkpoints[-1], options=options)
        else:
            shutil.rmtree(folder, ignore_errors=True)  # interrupted before its first checkpoint
            call(run["command"], "--run-dir", folder, options=options)
    return folder


def scored(folder: Path) -> dict:
    """eval.json of a run, if it came to its end, and its curve, which ends with that score."""
    end = folder / "eval.json"
    record = json.loads(end.read_text()) if end.exists() else {}
    return tables.to_the_end(record | dict(curve=curve_of(folder / "metrics.jsonl")))


def score(run: dict, options: Namespace) -> dict:
    """One training with evaluations on the way: its scores, and when it reached the threshold."""
    record = scored(train(run, options, "eval.json"))
    steps, seconds = next(((x, t) for x, t, reached in record["curve"] if reached >= run["threshold"]), (None, None))
    record |= dict(threshold=run["threshold"], steps_to_threshold=steps, cores_shared=options.shared)
    record |= dict(seconds_to_threshold=None if options.shared else seconds)
    return dict(versions=vecsim.versions()) | record


def agents(run: dict, options: Namespace) -> dict:
    """Trainings of one and of many agents in turn, each in a fresh process."""
    found = {count: [] for count in run["counts"]}
    with tempfile.TemporaryDirectory() as scratch:
        for repeat in range(options.repeats):
            for count in found:
                folder = Path(scratch) / f"{count}-agents-{repeat}"
                call(run["command"], "--num-seeds", str(count), "--run-dir", folder, options=options, quiet=True)
                found[count].append(json.loads((folder / "eval.json").read_text()))
                seconds = found[count][-1]["train_seconds"]
                say(f"  round {repeat + 1}/{options.repeats}  {count} agents: {seconds:.1f} s")
    rows = []
    for count, members in found.items():
        row = dict(num_seeds=count, env_steps=members[0]["env_steps"])
        for name in ("train_seconds", "compile_seconds"):
            row[name] = [round(member[name], 2) for member in members]
            row[f"median_{name}"] = statistics.median(row[name])
        rows.append(row)
    first = found[run["counts"][0]][0]
    return {name: first[name] for name in ("env_id", "algorithm", "versions")} | dict(rows=rows)


def stage_times(trace: Path) -> dict[str, dict]:
    """Seconds and share of each stage of an iteration, from a trace of torch.profiler; on a GPU of the GPU's work."""
    with gzip.open(trace) as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("cat", "").endswith("user_annotation")]
    iterations = [x for x in events if x["name"].startswith("ProfilerStep") and x["cat"] == "user_annotation"]
    kind = "gpu_user_annotation" if any(x["cat"] == "gpu_user_annotation" for x in events) else "user_annotation"
    whole = sum(x["dur"] for x in iterations)
    stages = {}
    for name in ("simulate", "infer", "targets", "sample", "update"):
        spent = sum(x["dur"] for x in events if x["name"] == name and x["cat"] == kind)
        if spent:
            stages[name] = dict(seconds=spent / len(iterations) / 1e6, share=spent / whole)
    share = 1.0 - sum(stage["share"] for stage in stages.values())
    return stages | {"the rest": dict(seconds=share * whole / len(iterations) / 1e6, share=share)}


def profile(run: dict, options: Namespace) -> dict:
    """A short training under --profile: where the time of an iteration goes."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        call(run["command"], "--run-dir", folder, options=options, quiet=True)
        stages = stage_times(folder / run.get("stage", "") / "trace.json.gz")
        first, second, *_ = lines_of(folder / run.get("stage", "") / "metrics.jsonl")  # --log-every 1
    about = dict(script=run["script"], env_id=run["env_id"], stage=run.get("stage", ""), versions=vecsim.versions())
    return about | dict(steps=second["env_steps"] - first["env_steps"], stages=stages)


def panel(run: dict, options: Namespace) -> dict:
    """A training of one or several policies, which eval_panel.py then judges; its evidence lies beside the record."""
    folder = train(run, options, f"{run['stages'][-1]}/curve.png".lstrip("/"))  # the last file that a stage writes
    out = (options.results / run["file"]).parent / "panel"
    if options.force:
        shutil.rmtree(out, ignore_errors=True)
    checkpoints = [folder / stage / "checkpoint.pt" for stage in run["stages"]]
    device = shlex.join(["--device", options.device])
    call(f"python eval_panel.py {run['panel']} {device} --out {shlex.quote(str(out))}", *checkpoints, options=options)
    policies, curves = {}, {}
    for stage in run["stages"]:
        name, log = stage or "policy", lines_of(folder / stage / "metrics.jsonl")
        policies[name] = dict(env_steps=log[-1]["env_steps"], train_seconds=log[-1]["wall_seconds"])
        curves[name] = [[line.get(column) for column in CURVE_COLUMNS] for line in log]
    about = dict(env_id=run["env_id"], versions=vecsim.versions(), policies=policies)
    return about | dict(curve_columns=CURVE_COLUMNS, curves=curves)


def minutes(run: dict, options: Namespace) -> dict:
    """Training for some minutes on one core, ours or a peer's: a curve of scores in Gymnasium.

    The clock excludes imports, evaluations and compilation, whose seconds are kept apart."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        contest = our_minutes if "script" in run else peer_minutes
        about = contest(run, options, Path(scratch))
    steps, seconds, final = about["curve"][-1]
    say(f"  {final:,.0f} after {seconds:.0f} s, {steps:,} steps")
    return {name: run[name] for name in ("env_id", "contender", "seed", "minutes")} | about


def peer_minutes(run: dict, options: Namespace, scratch: Path) -> dict:
    """A program that scores itself with meter.ScoreMeter; it compiles nothing."""
    contender, curve = Contender(run["contender"], run["program"], run["variant"]), scratch / "curve.json"
    settings = dict(env_id=run["env_id"], seed=run["seed"], minutes=run["minutes"], num_envs=1, env_kwargs={})
    environment = environment_of(contender, settings | dict(curve=str(curve)), options)
    words = [*on_cores(options), environments.interpreter(contender.file, "cpu"), "-m", contender.module]
    status = subprocess.run(words, env=environment, cwd=scratch).returncode
    if status:
        raise RuntimeError(f"stopped with status {status}")
    packages = " ".join(environments.dependencies(contender.file, "cpu")) or vecsim.versions()
    return dict(versions=packages, compile_seconds=0.0, curve=json.loads(curve.read_text()))


def our_minutes(run: dict, options: Namespace, scratch: Path) -> dict:
    """One of our trainers, whose log has the evaluations; it is ended when its minutes are over.

    It compiles between its first words and the first line of its log, which tells the seconds of training by then."""
    words = [*on_cores(options), sys.executable, *shlex.split(run["command"])[1:], "--run-dir", str(scratch / "run")]
    environment = os.environ | dict(OMP_NUM_THREADS=str(machine.cpu_cores(options.cores)), PYTHONUNBUFFERED="1")
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(scratch / "compiled")  # empty
    output, metrics, began, curve = scratch / "out", scratch / "run" / "metrics.jsonl", {}, []
    with output.open("w") as out:
        trainer = subprocess.Popen(words, env=environment, cwd=machine.ROOT, stdout=out, stderr=subprocess.STDOUT)
        while trainer.poll() is None:
            time.sleep(0.2)
            for file in (output, metrics):
                if file.exists() and file.stat().st_size:
                    began.setdefault(file, time.perf_counter())
            curve = curve_of(metrics) if metrics in began else []
            if curve and curve[-1][1] >= 60 * run["minutes"]:
                trainer.kill()
    if not curve:
        raise RuntimeError(f"no evaluation; the trainer's output:\n{output.read_text()[-2000:]}")
    seconds = began[metrics] - began[output] - lines_of(metrics)[0]["wall_seconds"]
    curve = scored(scratch / "run")["curve"]
    return dict(versions=vecsim.versions(), compile_seconds=round(max(0.0, seconds), 1), curve=curve)


KINDS = dict(score=score, agents=agents, profile=profile, panel=panel, minutes=minutes)


def run_set(name: str, options: Namespace) -> bool:
    """All runs of a set; False if one of them failed."""
    hardware = machine.hardware(options.device)
    if options.device == "cpu":
        name_of_cpu, cores = hardware.rsplit(", ", 1)
        hardware = f"{name_of_cpu}, {units(options)} of {cores}"
    failures = 0
    for run in trainings(name, options):
        path = options.results / f"{run['file']}.json"
        if options.dry_run:
            print(f"{run['file']}: {run['command']}")
        elif path.exists() and not options.force:
            record = json.loads(path.read_text())
            made = f"{record['hardware']}, commit {record['commit']}"
            say(f"{run['file']}: there ({made}); --force measures again, --results DIR keeps both")
        else:
            say(f"{run['file']}: {run['command']}")
            try:
                record = KINDS[run["kind"]](run, options)
                save(path, record | dict(command=run["command"], hardware=hardware, commit=machine.commit()))
            except RuntimeError as error:
                failures += 1
                say(f"error: {run['file']}: {error}")
    return not failures
