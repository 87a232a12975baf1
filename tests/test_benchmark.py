"""benchmarks/: a fair referee that loses nothing, tables that follow from the files, commands that the trainers accept.

The referee is tested with contenders that only count; what the real ones measure is seen by running benchmark.sh."""

import importlib
import inspect
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import eval_panel
from benchmarks import comparisons, environments, machine, plots, referee, report, runs, tables
from benchmarks.__main__ import parse_args
from benchmarks.referee import Comparison, Contender
from benchmarks.sim import states

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmark.sh"

# One piece of work is one sleep; each window leaves the contender's name in a shared file. `variant` is a name and the
# number of the window that fails, or what the contender does before it begins.
COUNTING = """
import os, subprocess, sys, time
from pathlib import Path
from benchmarks.meter import meter, settings, variant

name, _, task = variant.partition(" ")
if task == "compile":
    for cache in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "JAX_COMPILATION_CACHE_DIR"):
        file = Path(os.environ[cache]) / "kernel"
        if not file.exists():
            time.sleep(0.5)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("")
if task == "hold memory":
    held = "import time; held = bytearray(200 * 2**20); held[::4096] = b'x' * len(held[::4096]); print(flush=True); "
    child = subprocess.Popen([sys.executable, "-c", held + "time.sleep(600)"], stdout=subprocess.PIPE)
    child.stdout.readline()
if task == "be silent":
    time.sleep(600)
windows, clock = 0, None
while True:
    time.sleep(0.01)
    meter.tick(1)
    with open(settings["trace"], "a") as trace:
        trace.write(name + " ")
    if clock != meter.clock:
        clock, windows = meter.clock, windows + 1
    if task == str(windows):
        raise RuntimeError("this contender breaks")
"""


def run(*words, **options):
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=120, **options)


def options(tmp_path, *words, mode=("train",), **change):
    """The options of a command line, on a CPU, with short windows."""
    parsed = parse_args([*mode, "--device", "cpu", "--results", str(tmp_path / "results"), *words])
    parsed.seconds, parsed.patience = 0.05, 60
    return type(parsed)(**vars(parsed) | change)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """measure(first task, second task, repeats=...) compares two counting contenders; returns the record."""
    package = tmp_path / "package" / "benchmarks"
    (package / "toy").mkdir(parents=True)
    for name in ("__init__.py", "meter.py"):
        (package / name).write_text((ROOT / "benchmarks" / name).read_text())
    (package / "toy" / "counting.py").write_text(COUNTING)
    monkeypatch.setattr(machine, "ROOT", tmp_path / "package")
    monkeypatch.setattr(machine, "commit", lambda: "abc")
    monkeypatch.setattr(environments, "CACHE", tmp_path / "cache")
    settings = {"trace": str(tmp_path / "trace")}

    def measure(first="", second="", repeats=3, mode="train", **change):
        names = dict(first=first, second=second)
        contenders = [Contender(name, "toy/counting.py", f"{name} {task}".strip()) for name, task in names.items()]
        comparison = Comparison(mode, "toy", "steps/s", settings, contenders)
        chosen = options(tmp_path, repeats=repeats, **change)
        assert referee.measure(comparison, chosen)
        return json.loads(comparison.path(chosen).read_text())

    measure.trace = tmp_path / "trace"
    measure.file = tmp_path / "results" / "benchmark" / "train-toy.json"
    return measure


def rows_of(record):
    return {row["contender"]: row for row in record["rows"]}


# ----------------------------------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["fly"], "invalid choice: 'fly'"),
        (["train", "--repeats", "2"], "must be at least 3"),
        (["train", "--seconds", "soon"], "must be a whole number"),
        (["runs", "a2c"], "invalid choice: 'a2c'"),
        (["runs", "ppo", "--quick"], "unrecognized arguments: --quick"),
        (["sim", "--num-envs", "16,0"], "must be a whole number of at least 1"),
        (["sim", "--env-id", "Ant-v6"], "unknown task 'Ant-v6'; choose from InvertedPendulum-v5"),
        (["train", "--env-id", "Ant-v5,Quadruped-Flat"], "Gymnasium's tasks only, not Quadruped-Flat"),
        (["runs", "peers", "--env-id", "Ant-v5"], "the tasks of the set peers are InvertedPendulum-v5, HalfChee"),
        (["runs", "walk", "--env-id", "Ant-v5"], "the tasks of the set walk are Quadruped-Flat, not Ant-v5"),
        (["report", "--dollars-per-hour", "0.0"], "must be more than 0"),
        (["report", "--results", str(SCRIPT)], "must be a folder"),
    ],
)
def test_bad_input_is_one_line_and_status_2(words, complaint, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(words)
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.out == ""
    assert printed.err.startswith("error: ") and complaint in printed.err and printed.err.count("\n") == 1


@pytest.mark.slow
def test_the_shell_script_calls_the_modes_from_any_folder(tmp_path):
    environment = os.environ | {"PYTHON": sys.executable}
    answer = run(SCRIPT, "train", "--dry-run", "--env-id", "HalfCheetah-v5", cwd=tmp_path, env=environment)
    assert answer.returncode == 0, answer.stderr
    assert "train HalfCheetah-v5-euler-" in answer.stdout and "SB3, DummyVecEnv" in answer.stdout
    assert run(SCRIPT, "fly", env=environment).returncode == 2
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------------------
# The referee
# ----------------------------------------------------------------------------------------------------------------------


def test_rows_hold_what_a_reader_needs_and_windows_alternate(toy):
    for row in rows_of(toy()).values():
        assert len(row["values"]) == 3
        assert row["minimum"] == min(row["values"]) <= row["median"] <= max(row["values"]) == row["maximum"]
        assert 20 < row["median"] < 101  # pieces of at least 10 ms each
        assert row["warmup_seconds"] > 0.01 and row["peak_memory_mib"]["host"] > 5
        assert {"command", "hardware", "commit", "cores", "unit", "versions"} <= row.keys()
    trace = toy.trace.read_text().split()
    changes = [name for i, name in enumerate(trace) if i == 0 or name != trace[i - 1]]
    assert changes[-6:] == ["first", "second"] * 3
    assert not list(toy.file.parent.glob("*.tmp"))


@pytest.mark.slow
def test_a_contender_starts_with_empty_caches_and_then_with_what_it_left_there(toy, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # the user's, which no contender may see
    for change in ({}, dict(force=True)):
        for row in rows_of(toy("compile", "compile", **change)).values():
            assert row["first_start_seconds"] > 1.5 > 0.5 + row["warmup_seconds"]


def test_scaling_starts_a_contender_once(toy, tmp_path):
    comparison = Comparison("scaling", "toy", "steps/s", {"trace": "/dev/null"}, [Contender("a", "toy/counting.py")])
    assert referee.measure(comparison, options(tmp_path, repeats=3))
    [row] = json.loads(toy.file.with_name("scaling-toy.json").read_text())["rows"]
    assert "first_start_seconds" not in row


def test_memory_is_that_of_all_processes(toy):
    first, second = (row["peak_memory_mib"]["host"] for row in rows_of(toy("", "hold memory")).values())
    assert 200 < second - first < 240


def test_a_complete_file_is_not_measured_again_unless_forced(toy, capsys):
    before = toy()
    assert toy() == before and "complete in" in capsys.readouterr().err
    assert toy(force=True) != before


def test_an_incomplete_file_continues_at_the_same_commit_only(toy, monkeypatch):
    before = rows_of(toy())["first"]["values"]
    again = rows_of(toy(repeats=4))
    assert again["first"]["values"][:3] == before and [len(row["values"]) for row in again.values()] == [4, 4]
    monkeypatch.setattr(machine, "commit", lambda: "def")
    last = rows_of(toy(repeats=5))
    assert len(last["first"]["values"]) == 5 and last["first"]["values"][:3] != before


def test_an_interrupted_run_keeps_its_rounds(toy, tmp_path):
    program = f"""
import signal, sys
sys.path[:0] = [{str(ROOT)!r}]
from argparse import Namespace
from pathlib import Path
from benchmarks import environments, machine, referee

machine.ROOT, machine.commit = Path({str(machine.ROOT)!r}), lambda: "abc"
environments.CACHE = Path({str(environments.CACHE)!r})
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
contenders = [referee.Contender("first", "toy/counting.py"), referee.Contender("second", "toy/counting.py")]
comparison = referee.Comparison("train", "toy", "steps/s", {{"trace": "/dev/null"}}, contenders)
shared = dict(results=Path({str(tmp_path / "results")!r}), device="cpu", cores="", command="", dry_run=False)
referee.measure(comparison, Namespace(**shared, force=False, repeats=50, seconds=0.2, patience=60))
"""
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    deadline = time.time() + 60
    while not toy.file.exists() and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    kept = rows_of(json.loads(toy.file.read_text()))["first"]["values"]
    assert 1 <= len(kept) < 50
    after = rows_of(toy(repeats=len(kept) + 1, seconds=0.2))
    assert after["first"]["values"][:-1] == kept and len(after["second"]["values"]) == len(kept) + 1


def test_a_contender_that_breaks_costs_one_line(toy, capsys):
    record = toy("", "2")
    assert len([line for line in capsys.readouterr().err.splitlines() if "this contender breaks" in line]) == 1
    first, second = record["rows"]
    assert len(first["values"]) == 3 and "stopped" not in first
    assert len(second["values"]) == 1 and "this contender breaks" in second["stopped"]
    assert "(log: " not in str(record)  # a path of this machine
    assert toy("", "2") == record  # complete: what stopped is measured again with --force only


@pytest.mark.slow
def test_a_contender_that_never_gets_ready_is_left_out(toy, capsys):
    record = toy("", "be silent", patience=3)
    assert "second: left out: no answer within 3 s" in capsys.readouterr().err
    assert record["failed"] == {"second": "no answer within 3 s"} and rows_of(record).keys() == {"first"}


def test_a_full_disk_loses_nothing(tmp_path):
    """A limit on the size of files acts like a full disk."""
    path = tmp_path / "file.json"
    path.write_text("before")
    record = dict(rows=["measured"] * 100)
    program = f"from benchmarks.referee import *; save(Path({str(path)!r}), {record!r})"
    small = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    answer = run(sys.executable, "-c", program, preexec_fn=small, cwd=ROOT)
    assert answer.returncode == 1 and answer.stderr.startswith("error: ") and answer.stderr.count("\n") == 1
    assert json.loads(answer.stdout) == record and path.read_text() == "before"


# ----------------------------------------------------------------------------------------------------------------------
# Contenders and their environments
# ----------------------------------------------------------------------------------------------------------------------


def test_every_contender_is_a_file_that_says_what_it_needs(tmp_path):
    modes = comparisons.sim, comparisons.learner, comparisons.train
    plans = [mode(options(tmp_path, "--env-id", "Ant-v5", mode=(mode.__name__,))) for mode in modes]
    files = {contender.file for plan in plans for comparison in plan for contender in comparison.contenders}
    assert len(files) > 15 and all(file.exists() for file in files)
    assert not [file for file in files if file.parent.name == "train" and '"cpu"' in file.read_text()]
    environments_of = {}
    for file in [*files, ROOT / "benchmarks/train/sb3_zoo.py"]:
        packages = environments.dependencies(file, "cpu")
        assert all("==" in name or name == "jax" for name in packages)
        if packages:
            environments_of.setdefault(environments.folder_of(packages).name, []).append(packages)
    assert {"skrl", "rsl-rl-lib", "rl-games", "stable-baselines3", "brax", "mujoco-mjx"} <= environments_of.keys()
    for lists in environments_of.values():
        assert all(packages == lists[0] for packages in lists)  # files that share an environment share its list


@pytest.mark.slow
def test_jax_on_a_gpu_is_the_build_for_it_and_computes_there():
    for name in ("sim/mjx.py", "train/brax.py"):
        file = ROOT / "benchmarks" / name
        assert "jax[cuda12]" in environments.dependencies(file, "cuda")
        assert "jax" in environments.dependencies(file, "cpu")
    code = "from benchmarks.meter import check_jax; check_jax()"
    answer = contend(sys.executable, "-c", code, settings=dict(device="cuda"), JAX_PLATFORMS="cpu")
    assert "RuntimeError: JAX computes on the cpu, not on cuda" in answer.stderr


@pytest.mark.slow
def test_a_failed_installation_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(environments, "CACHE", tmp_path)
    monkeypatch.setitem(environments.PACKAGES, "contender", ["no-such-package==1"])
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError, match="does not install: ERROR: No matching distribution") as error:
        environments.interpreter(Path("contender.py"), "cpu")
    assert "\n" not in str(error.value)
    (tmp_path / "empty.log").write_text("")
    assert "GiB free on the disk" in environments.last_error(tmp_path / "empty.log")  # a full disk keeps no log either


def contend(python, *words, settings, variant="", cwd=None, **environment):
    """Run a contender, which gets one line from the referee."""
    environment |= dict(BENCHMARK_SETTINGS=json.dumps(settings), BENCHMARK_VARIANT=variant, PYTHONPATH=str(ROOT))
    environment |= dict(BENCHMARK_SECONDS="0.01", OMP_NUM_THREADS="1", BENCHMARK_REPLIES="1")
    return run(python, *words, input="go\n", env=os.environ | environment, cwd=cwd)


def reports(answer):
    """What a contender told the referee, between what libraries print."""
    found = [json.loads(line) for line in answer.stdout.splitlines() if line.startswith('{"')]
    assert found, answer.stderr
    return found


def train_settings(env_id, integrator, num_envs):
    sizes = dict(num_envs=num_envs, num_steps=4, update_epochs=2, num_minibatches=2, solver_iterations=4, hidden=[16])
    return dict(env_id=env_id, device="cpu", num_envs=2, integrator=integrator, env_kwargs={}, ours=sizes)


@pytest.mark.slow
@pytest.mark.parametrize("integrator, code", [("euler", 0), ("rk4", 1)])
def test_all_contenders_of_a_training_integrate_alike(integrator, code):
    """Gymnasium's environments and vecsim in the hands of others, on a task whose MJCF says RK4."""
    note = """
from benchmarks.meter import meter
from benchmarks.train.gymnasium_envs import make_one
from benchmarks.train.vecsim_envs import make_envs
meter.facts["theirs"] = int(make_one().unwrapped.model.opt.integrator)
meter.facts["vecsim"] = make_envs(1).settings.integrator
meter.tick(1)
"""
    answer = contend(sys.executable, "-c", note, settings=train_settings("Hopper-v5", integrator, 2), variant="vecsim")
    assert reports(answer)[0]["facts"] == dict(theirs=code, vecsim=integrator)


@pytest.mark.slow
@pytest.mark.parametrize(
    "module, work, settings",
    [
        ("learner.ours", 8 * 4, dict(num_envs=8, num_steps=4, epochs=2, minibatches=2)),
        ("learner.ours", 8 * 4, dict(num_envs=8, num_steps=4, epochs=2, minibatches=2, memory_width=4)),
        ("learner.sac_ours", 2, dict(num_envs=8, batch_size=16, updates_per_step=2, first_steps=4, replay_steps=10)),
        ("train.ours", 8 * 4, None),
    ],
)
def test_our_own_trainers_contend(module, work, settings, tmp_path):
    """Without compilation, which takes a minute."""
    if settings is None:
        settings, variant = train_settings("InvertedPendulum-v5", "euler", 8), "1,16"
    else:
        settings, variant = settings | dict(obs_size=5, action_size=2, hidden=[16]), "eager"
    words, environment = ("-m", f"benchmarks.{module}"), dict(TORCHDYNAMO_DISABLE="1")
    answer = contend(sys.executable, *words, settings=settings, variant=variant, cwd=tmp_path, **environment)
    ready, measured = reports(answer)
    assert ready["ready"] and measured["work"] % work == 0


@pytest.mark.parametrize("peer, module", [("rsl-rl-lib", "rsl_rl"), ("skrl", "skrl"), ("rl-games", "rl_games")])
def test_other_learners_train_on_vecsim(peer, module):
    """In the peer's own environment, if ./benchmark.sh has built it; without compilation, which takes a minute."""
    file = ROOT / "benchmarks/train" / f"{module}.py"
    packages = environments.dependencies(file, "cpu")
    if not environments.is_built(packages):
        pytest.skip(f"{peer} is not installed; ./benchmark.sh train installs it")
    settings, python = train_settings("InvertedPendulum-v5", "euler", 8), environments.interpreter(file, "cpu")
    words = ("-m", f"benchmarks.train.{module}")
    answer = contend(python, *words, settings=settings, variant="vecsim", TORCHDYNAMO_DISABLE="1")
    ready, measured = reports(answer)
    assert ready["ready"] and measured["work"] == 4 * 8  # one iteration


@pytest.mark.parametrize("module", ["rsl_rl", "skrl", "rl_games", "sb3"])
def test_the_adapters_train(module):
    """One iteration of each example; the example prints the score of its policy."""
    file = ROOT / "benchmarks/adapters" / f"{module}.py"
    packages = environments.dependencies(file, "cpu")
    if not environments.is_built(packages):
        pytest.skip(f"{packages[0]} is not installed; ./benchmark.sh train installs it")
    environment = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    answer = run(environments.interpreter(file, "cpu"), "-m", f"benchmarks.adapters.{module}", "1", env=environment)
    assert answer.returncode == 0, answer.stderr
    assert 1 <= float(answer.stdout.split("score: ")[1].split()[0]) <= 1000


def test_a_training_is_compared_under_each_integrator(tmp_path):
    plan = list(comparisons.train(options(tmp_path, "--env-id", "Ant-v5,HalfCheetah-v5", "--cores", "0")))
    cases = "Ant-v5-euler-cpu1 Ant-v5-rk4-cpu1 HalfCheetah-v5-euler-cpu1"
    assert [comparison.case for comparison in plan] == cases.split()
    names = [contender.name for contender in plan[0].contenders]
    assert names[0] == "ours" and {"rsl_rl on vecsim", "Brax, its own model, spring"} <= set(names)
    quick = list(comparisons.train(options(tmp_path, "--quick", "--cores", "0")))
    assert [comparison.case for comparison in quick] == ["Ant-v5-euler-cpu1-quick", "Ant-v5-rk4-cpu1-quick"]


def test_sim_compares_engines_or_sizes(tmp_path):
    [one] = comparisons.sim(options(tmp_path, "--quick", "--cores", "0", mode=("sim",)))
    assert one.case == "Ant-v5-cpu1-quick" and one.settings["num_envs"] == 1024 and len(one.contenders) == 6
    two = list(comparisons.sim(options(tmp_path, "--num-envs", "16,64", "--cores", "0", mode=("sim",))))
    assert [comparison.case for comparison in two] == ["Ant-v5-cpu1-16-envs", "Ant-v5-cpu1-64-envs"]
    assert [comparison.settings["num_envs"] for comparison in two] == [16, 64]
    assert all(comparison.mode == "scaling" and len(comparison.contenders) == 1 for comparison in two)


def test_the_physics_of_jax_is_in_float32():
    """On Ampere and newer GPUs its matrix products are else in TF32."""
    assert '"jax_default_matmul_precision", "highest"' in (ROOT / "benchmarks/sim/jax_engine.py").read_text()
    assert 'with jax.default_matmul_precision("highest"):' in (ROOT / "benchmarks/train/brax.py").read_text()


@pytest.mark.parametrize("num_envs", [8, 600])
def test_simulators_start_from_states_in_the_middle_of_episodes(tmp_path, num_envs):
    assert states.settings("Hopper-v5", "cpu", num_envs)["starts"] == "mid-episode"
    saved = np.load(states.save("Hopper-v5", num_envs, tmp_path)["states"])
    qpos, qvel = saved["start"], saved["start_qvel"]
    assert qpos.shape == qvel.shape == (num_envs, 6) and np.isfinite(qpos).all() and (np.abs(qvel).max(1) > 1e-3).all()
    assert len(np.unique(qpos, axis=0)) == min(num_envs, 512)
    if num_envs == 600:
        height = qpos[:, 1]  # some stand, some have fallen
        assert (qpos[512:] == qpos[:88]).all() and (height < 0.6).mean() > 0.1 and (height > 1.0).mean() > 0.1


# ----------------------------------------------------------------------------------------------------------------------
# Tables and pictures
# ----------------------------------------------------------------------------------------------------------------------


def test_results_readme_is_what_the_files_say():
    made = report.page(ROOT / "results")
    assert (ROOT / "results/README.md").read_text() == made, "./benchmark.sh report writes it anew"
    assert made.count("**\n\n| ") > 20  # tables


def sample_row(name, median, **more):
    row = dict(contender=name, unit="steps/s", values=[median] * 3, median=median)
    row |= dict(minimum=0.9 * median, maximum=1.1 * median, first_start_seconds=80.0, warmup_seconds=12.0)
    return row | dict(peak_memory_mib={"host": 512.0}, cores=1, versions={"torch": "2.13.0"}, commit="abc") | more


RECORD = dict(mode="sim", case="Ant-v5-cpu1", unit="steps/s", settings={"env_id": "Ant-v5"}, seconds=10, cores="")
RECORD |= dict(hardware="a CPU", commit="abc", command="./benchmark.sh sim", failed={"Brax": "does not install"})
RECORD |= dict(reference="vecsim", rows=[sample_row("vecsim", 1e5, step_error_p50=1e-7, step_error_p99=2e-5)])
RECORD["rows"].append(sample_row("MJX", 8e3))


def test_a_comparison_names_its_reference_and_what_is_missing():
    text = tables.comparison(RECORD)
    assert "| steps/s | vecsim / this row |" in text and "| first start | second start |" in text
    assert "| vecsim | 100,000 (90,000 to 110,000) | 1 | 1e-07 | 2e-05 | 80 s | 12 s | 0.5 GiB host |" in text
    assert "| MJX | 8,000 (7,200 to 8,800) | 12 | - | - | 80 s | 12 s | 0.5 GiB host |" in text
    assert "Brax is missing: does not install." in text
    stopped = RECORD | dict(rows=[RECORD["rows"][1] | dict(stopped="in round 4: broken")])
    text = tables.comparison(stopped)  # the reference was not measured
    assert "vecsim / this row" in text and "| MJX | 8,000 (7,200 to 8,800) | - |" in text
    assert "MJX has 3 of them; it stopped: in round 4: broken." in text
    scaled = RECORD | dict(case="Ant-v5-cpu1-16-envs", settings=dict(num_envs=16))
    scaled |= dict(rows=[sample_row("16 environments", 9e3)])
    assert "| 16 environments | 9,000 (8,100 to 9,900) | 12 s |" in tables.scaling([scaled])
    record = RECORD | dict(mode="train", reference="ours", rows=[sample_row("ours", 2e4)])
    row = "| ours | 20,000 (18,000 to 22,000) | 1 | 80 s | 12 s | 0.5 GiB host | 36.0 M |"
    assert row in tables.comparison(record, 2.0)


def sample_run(score=4000.0, **more):
    run = dict(name="Ant-v5", env_id="Ant-v5", algorithm="ppo", seed=1, env_steps=2_000_000, train_seconds=120.0)
    run |= dict(compile_seconds=40.0, threshold=3000, seconds_to_threshold=60.0, hardware="a CPU", commit="abc")
    run |= dict(gymnasium=dict(mean=score, std=10.0, min=score), vecsim=dict(mean=4100.0, std=20.0, min=60.0))
    return run | dict(command="python ppo_gpu_torch.py", curve=[[1, 60.0, 0.0], [2, 120.0, score]]) | more


def test_scores_have_a_row_for_the_seeds_of_a_task():
    text = tables.scores("ppo", [sample_run(), sample_run(2900.0, seed=2, seconds_to_threshold=None)])
    both = "3,450 | 4,000 ± 10 / 2,900 ± 10 | 4,100 (60) / 4,100 (60) | 3,000 | 60 / not reached |"
    assert f"| Ant-v5 | PPO | 1 / 2 | 2,000,000 | 120 / 120 | 40 / 40 | {both}" in text
    text = tables.scores("sac", [sample_run(algorithm="sac", cores_shared=True, steps_to_threshold=500_000)])
    assert "| Ant-v5 | SAC | 1 | 2,000,000 | 4,000 | 4,000 ± 10 | 4,100 (60) | 3,000 | 500,000 |" in text


def test_a_curve_ends_with_the_final_score(tmp_path):
    """A log rounds it, or lacks it: 15.46 is no 15.5, which would be 16."""
    for seed, last in ((1, [[9, 59.0, 15.5]]), (2, [])):
        curve = [[5, 30.0, 7.0], *last]
        run = sample_run(15.46, env_steps=9, train_seconds=59.04, curve=curve)
        (tmp_path / f"Ant-v5-seed{seed}.json").write_text(json.dumps(run))
    assert [run["curve"] for run in tables.load(tmp_path, "*")] == [[[5, 30.0, 7.0], [9, 59.04, 15.46]]] * 2


def test_q_learning_stands_beside_ppo_and_sac_of_the_same_minutes():
    """Its runs count as long as theirs: an evaluation after their minutes does not."""
    shared = dict(env_id="HalfCheetah-v5", compile_seconds=20.0)
    runs = [sample_run(algorithm="dqn", train_seconds=180.0, curve=[[7, 90.0, 50.0], [9, 150.0, 3500.0]], **shared)]
    runs += [sample_run(algorithm="pqn", curve=[[8, 179.0, 1000.0], [9, 200.0, 9000.0]], **shared)]
    others = [dict(contender="ours-sac", minutes=3, compile_seconds=90.0, curve=[[5, 100.0, 3000.0]])]
    text = tables.at_equal_time(runs, others)
    assert "| ours, SAC | 1 | 5 | 3,000 | 100 | 90 |\n| ours, DQN | 1 | 9 | 3,500 | 150 | 20 |" in text
    assert "| ours, PQN | 1 | 8 | 1,000 | - | 20 |" in text and "(10 episodes, of Q-learning 20)" in text


def test_the_ablation_says_what_each_rung_adds():
    found, faster = [], "vanilla --tau 0.05"
    rungs = dict(all="best", faster=faster, layer=f"{faster} --network layer_norm", textbook="vanilla")
    for name, flags in rungs.items():
        for seed, scores in enumerate(((10.0, 40.0), (30.0, 50.0), (20.0, 90.0)), 1):
            command = f"python sac_gpu_torch.py --env-id Ant-v5 --preset {flags} --num-envs 32 --seed {seed}"
            found.append(sample_run(scores[name in ("layer", "all")], name=name, command=command))
    text = tables.ablation(found)
    assert text.count("| 3 |") == 4
    assert (
        "| textbook | 20 | 10 | 10 | 5 | 3 | `--preset vanilla` |\n"
        "| + faster | 20 | 10 | 10 | 5 | 3 | `--tau 0.05` |\n"
        "| + layer | 50 | 40 | 25 | 20 | 3 | `--network layer_norm` |\n"
        "| all | 50 | 40 | 25 | 20 | 3 | `--preset best` |\n"
    ) in text


def test_agents_are_compared_with_one_agent():
    compiled = dict(compile_seconds=[9.0, 7.0, 8.0], median_compile_seconds=8.0)
    rows = [
        dict(num_seeds=k, env_steps=500, train_seconds=[x, 2.0 * x, 3.0 * x], median_train_seconds=2.0 * x) | compiled
        for k, x in ((1, 5.0), (8, 15.0))
    ]
    text = tables.agents(sample_run(versions={"jax": "0.10.2"}, rows=rows))
    assert "| 8 | 30.0 s (15.0 to 45.0) | 3.00 | 8.0 s | 37.0 s | 2.18 | 500 |" in text  # 30 + 7 against 10 + 7


@pytest.fixture
def results(tmp_path):
    """A folder with a file of every kind."""

    def write(name, content):
        path = tmp_path / "results" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))

    write("benchmark/sim-Ant-v5-cpu1.json", RECORD)
    scaled = dict(mode="scaling", case="Ant-v5-cpu1-16-envs", settings={"env_id": "Ant-v5", "num_envs": 16})
    scaled |= dict(rows=[sample_row("16 environments", 9e3)])
    write("benchmark/scaling-Ant-v5-cpu1-16-envs.json", RECORD | scaled)
    for name in ("ppo/Ant-v5", "mjx/Ant-v5-torch"):
        write(f"{name}-seed1.json", sample_run())
    write("mjx/Ant-v5-seed1.json", sample_run(algorithm="ppo_mjx"))
    write("sac/Ant-v5-seed1.json", sample_run(algorithm="sac", cores_shared=True))
    write("dqn/HalfCheetah-v5-seed1.json", sample_run(algorithm="dqn", env_id="HalfCheetah-v5"))
    peer = dict(env_id="HalfCheetah-v5", minutes=3, hardware="a CPU", compile_seconds=0.0)
    for seed, score in ((1, 2000), (2, 3500)):
        curve = [[50_000, 90.0, 100.0], [100_000, 180.0, score]]
        write(f"peers/HalfCheetah-v5/sb3-sac-seed{seed}.json", peer | dict(contender="sb3-sac", seed=seed, curve=curve))
    ours = dict(contender="ours-ppo", seed=1, curve=[[900_000, 60.4, 3000.0]], compile_seconds=81.2)
    write("peers/HalfCheetah-v5/ours-ppo-seed1.json", peer | ours)
    columns, line = runs.CURVE_COLUMNS, [500, 1.0, 0.3, 900.0, 2.0, None]
    trained = dict(env_id="Quadruped-Rough", policies={"teacher": dict(env_steps=500, train_seconds=9.0)})
    trained |= dict(hardware="a CPU", commit="abc", command="python", curve_columns=columns, curves={"teacher": [line]})
    write("distill/Quadruped-Rough/training.json", trained)
    return tmp_path / "results"


def test_the_page_and_the_pictures_follow_from_the_files(results):
    plots.draw(results)
    page = report.page(results)
    names = "curves.png mjx/curves.png sac/curves.png dqn/curves.png speed.png scaling.png peers.png".split()
    for name in [*names, "distill/Quadruped-Rough/curves.png"]:
        assert (results / name).stat().st_size > 10_000
    assert all(f"]({name})" in page for name in names)
    assert "**HalfCheetah-v5, 3 minutes of training on one core**" in page and "| 3,000 reached after, s |" in page
    assert "| ours, PPO | 1 | 900,000 | 3,000 | 60 | 81 |" in page
    assert "| SB3, SAC | 2 | 100,000 | 2,000 / 3,500 | - / 180 | 0 |" in page
    assert "| teacher | 500 | 9 s |" in page


# ----------------------------------------------------------------------------------------------------------------------
# Runs
# ----------------------------------------------------------------------------------------------------------------------

TRAINER = """
import gzip, json, sys
from pathlib import Path

flags = {}
for word in sys.argv[1:]:  # a flag, then none, one or more values
    if word.startswith("--"):
        name = word
    flags[name] = "" if word == name else (flags[name] + " " + word).strip()
agents, folder = int(flags.get("--num-seeds", 1)), Path(flags["--run-dir"])
score = dict(mean=1000.0, std=0.0, min=1000.0, episodes=20, mean_length=1000.0)
result = dict(env_id=flags["--env-id"], algorithm="ppo_mjx", seed=1, env_steps=500, train_seconds=10.0 + agents)
result |= dict(compile_seconds=7.0, gymnasium=score, versions={"jax": "0.10.2"}, flags=flags)
events = [dict(name=f"ProfilerStep#{k}", cat="user_annotation", ts=k * 1e6, dur=1e6) for k in (3, 4)]
events += [dict(name="simulate", cat="user_annotation", ts=k * 1e6, dur=0.75e6) for k in (3, 4)]
for stage in ("teacher", "student", "finetune", "baseline") if "distill" in sys.argv[0] else ("",):
    place = folder / stage
    place.mkdir(parents=True)
    (place / "eval.json").write_text(json.dumps(result))
    for name in ("checkpoint.pt", "curve.png"):
        (place / name).write_text("")
    (place / "trace.json.gz").write_bytes(gzip.compress(json.dumps(dict(traceEvents=events)).encode()))
    line = dict(env_steps=500, wall_seconds=11.0, gymnasium_return=1000.0, velocity_error=0.3)
    log = [line | dict(env_steps=484, gymnasium_return=0.0), line] if "--profile" in flags else [line]
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in log))
"""
PANEL = """
import sys
from pathlib import Path

folder = Path(sys.argv[sys.argv.index("--out") + 1])
folder.mkdir(parents=True)
(folder / "postmortem.md").write_text("# A panel\\n" + " ".join(sys.argv[1:]))
rows = [f"{name},none,26.02,0.96,0.1" for name in ("ppo", "teacher", "student", "finetune")]
(folder / "summary.csv").write_text("\\n".join(["checkpoint,perturbation,return,success,tracking", *rows]))
"""


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """measure("ppo", flags...) runs a set with stand-ins for the trainers; returns its records by file."""
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr(machine, "commit", lambda: "abc")
    monkeypatch.setattr(environments, "CACHE", tmp_path / "cache")
    (tmp_path / "eval_panel.py").write_text(PANEL)
    for name in eval_panel.TRAINERS.values():
        (tmp_path / f"{name}.py").write_text(TRAINER)

    def run_set(*words):
        chosen = options(tmp_path, *words, mode=("runs",))
        assert runs.run_set(chosen.set, chosen)
        files = sorted(chosen.results.rglob("*.json"))
        return {str(file.relative_to(chosen.results))[:-5]: json.loads(file.read_text()) for file in files}

    return run_set


def test_scores_of_the_jax_script_and_of_its_twin_go_to_one_folder(measure):
    found = measure("mjx", "--env-id", "HalfCheetah-v5")
    assert set(found) == {"mjx/HalfCheetah-v5-seed1", "mjx/HalfCheetah-v5-torch-seed1"}
    jax, twin = found.values()
    apart = {"--run-dir", "--compilation-cache"}
    shared = [{name: value for name, value in run["flags"].items() if name not in apart} for run in (jax, twin)]
    assert shared[0] == shared[1] and jax["flags"]["--compilation-cache"] == ""
    assert jax["curve"] == [[500, 11.0, 1000.0]] and jax["compile_seconds"] == 7.0
    assert jax["seconds_to_threshold"] is None and jax["threshold"] == 2000
    assert {"command", "hardware", "commit", "versions"} <= jax.keys()


def test_what_is_there_is_not_measured_again_unless_forced(measure, capsys):
    words = ("sac", "--env-id", "HalfCheetah-v5", "--shared")
    found = measure(*words)
    seeds = [("", seed) for seed in (1, 2, 3, 4, 5)] + [("-ppo", seed) for seed in (1, 2, 3)]
    assert set(found) == {f"sac/HalfCheetah-v5{ppo}-seed{seed}" for ppo, seed in seeds}
    assert all(run["cores_shared"] and run["seconds_to_threshold"] is None for run in found.values())
    assert found["sac/HalfCheetah-v5-seed2"]["flags"]["--seed"] == "2"
    assert "ppo_gpu_torch.py" in found["sac/HalfCheetah-v5-ppo-seed1"]["command"]
    capsys.readouterr()
    assert measure(*words) == found and capsys.readouterr().err.count("--force measures again") == 8
    assert measure(*words, "--force").keys() == found.keys()
    assert capsys.readouterr().err.count("--force measures again") == 0


def test_ablate_gives_every_variant_the_same_budget(measure, tmp_path):
    found = measure("ablate")
    assert len(found) == 3 * len(runs.SETS["ablate"]["runs"]) >= 27
    budget = "--num-envs --learning-starts --batch-size --updates-per-step --total-timesteps --eval-every".split()
    assert len({tuple(run["flags"][name] for name in budget) for run in found.values()}) == 1
    two = runs.trainings("ablate", options(tmp_path, "ablate", "--env-id", "Ant-v5,Hopper-v5", mode=("runs",)))
    assert len(two) == 2 * len(found) and {run["file"].split("/")[2] for run in two} == {"Ant-v5", "Hopper-v5"}
    rung = found["sac/ablation/HalfCheetah-v5/layer-norm-seed1"]["command"]
    assert "--preset vanilla --learning-rate 1e-3" in rung and "--normalize-observations --network" in rung


def test_memory_hides_the_same_from_all_but_one(measure, tmp_path):
    found = measure("memory", "--env-id", "Hopper-v5")
    hidden = {Path(file).name: run["flags"].get("--env-kwargs") for file, run in found.items()}
    for seed in (1, 2, 3):
        assert hidden.pop(f"everything-observed-seed{seed}") is None
        assert hidden.pop(f"stack-of-4-observations-seed{seed}") == "hidden_observations qvel stack_observations 4"
    assert len(hidden) == 4 * 3 and set(hidden.values()) == {"hidden_observations qvel"}
    plots.draw(tmp_path / "results")
    made = report.page(tmp_path / "results")
    assert made.count("| not reached / not reached / not reached | 11 / 11 / 11 | 7 / 7 / 7 |") == 6
    assert made.count("(memory/curves.png)") == 1


def test_seeds_compares_eight_agents_with_one(measure):
    record = measure("seeds", "--repeats", "3")["mjx/seeds"]
    assert [row["num_seeds"] for row in record["rows"]] == [1, 8]
    assert [row["train_seconds"] for row in record["rows"]] == [[11.0] * 3, [18.0] * 3]


def test_walk_memory_shows_each_policy_in_one_row(measure, tmp_path):
    records = measure("walk-memory").values()
    made = report.page(tmp_path / "results")
    rows = [line for line in made.splitlines() if line.startswith(("| gru", "| no memory", "| teacher", "| finetune"))]
    assert len(records) == 3 and len(rows) == 4 and all("(4%)" in row for row in rows)
    assert [row.split(" | ")[1] for row in rows] == ["500", "500", "500", "1,500"]  # a student's include its teacher's


@pytest.mark.parametrize("name", ["walk", "distill"])
def test_a_panel_judges_what_was_trained(measure, tmp_path, name):
    for file, record in measure(name).items():
        page = (tmp_path / "results" / file).with_name("panel") / "postmortem.md"
        assert page.read_text().count("checkpoint.pt") == len(record["policies"]) == len(runs.SETS[name]["stages"])
        [line] = next(iter(record["curves"].values()))
        assert dict(zip(record["curve_columns"], line, strict=True))["velocity_error"] == 0.3
    plots.draw(tmp_path / "results")
    made = report.page(tmp_path / "results")
    assert made.count("| none | 96%, 0.100 m/s |") == made.count("/curves.png)") == len(runs.SETS[name]["runs"])
    assert f"| {'policy' if name == 'walk' else 'finetune'} | 500 | 11 s |" in made


def test_profile_has_a_file_for_each_trainer_and_stage(measure):
    found = measure("profile", "--cores", "0")
    names = {"ppo_gpu_torch-Ant-v5-cpu1", "ppo_distill_teacher_student-Quadruped-Flat-cpu1-student"}
    assert {f"profile/{name}" for name in names} <= found.keys() and len(found) == len(runs.SETS["profile"]["runs"])
    parts = {name: dict(seconds=x, share=x) for name, x in (("simulate", 0.75), ("the rest", 0.25))}
    assert all(record["stages"] == parts and record["steps"] == 16 for record in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("contender", ["cleanrl-ppo", "ours-ppo"])
def test_peers_scores_a_policy_when_its_minutes_are_over(contender, tmp_path):
    contests = runs.trainings("peers", options(tmp_path, "peers", "--env-id", "InvertedPendulum-v5", mode=("runs",)))
    run = next(run for run in contests if (run["seed"], run["contender"]) == (1, contender))
    record = runs.minutes(run | dict(minutes=0.001), options(tmp_path))
    steps, seconds, score = record["curve"][-1]
    assert steps == (2048 if contender == "cleanrl-ppo" else 32_768) and seconds > 0.06 and 1 < score < 1000
    assert 0 <= record["compile_seconds"] < 30
    assert run["file"] == f"peers/InvertedPendulum-v5/{contender}-seed1"


def accept(words):
    """What the trainer of this command checks before it allocates anything."""
    trainer = importlib.import_module(words[1].removesuffix(".py"))
    args = trainer.parse_args(words[2:])
    given = dict(args=args, world_size=1, device=torch.device("cpu"))
    check = trainer.check_flags if trainer.__name__ == "ppo_mjx_jax" else trainer.derive_sizes
    check(**{name: given[name] for name in inspect.signature(check).parameters if name in given})


def planned(name, tmp_path):
    commands = [run["command"] for run in runs.trainings(name, options(tmp_path, name, mode=("runs",)))]
    return [shlex.split(command) for command in commands if command.startswith("python ")]


@pytest.mark.parametrize("name", runs.SETS)
def test_the_trainers_accept_every_command(name, tmp_path):
    commands = planned(name, tmp_path)
    assert commands
    for words in commands:
        accept(words)
    if "panel" in runs.SETS[name]:
        panel = eval_panel.parse_args(["checkpoint.pt", *runs.SETS[name]["panel"].split()])
        assert set(panel.perturbations) <= set(eval_panel.PERTURBATIONS)


REFUSED = ("ppo", "--no-such-flag"), ("ppo", "--num-minibatches 7"), ("ablate", "--preset none")


@pytest.mark.parametrize("name, change", [*REFUSED, ("seeds", "--num-minibatches 7")])
def test_a_command_that_a_trainer_refuses_is_found(name, change, tmp_path):
    words = planned(name, tmp_path)[0]
    trainer = importlib.import_module(words[1].removesuffix(".py"))
    with pytest.raises(trainer.InputError):
        accept([*words, *change.split()])


def test_a_score_after_the_minutes_does_not_count():
    shared = dict(env_id="HalfCheetah-v5", minutes=3)
    ours = dict(contender="ours-ppo", compile_seconds=90.0, curve=[[5, 100.0, 20.0], [9, 205.0, 4000.0]])
    theirs = dict(contender="sb3-ppo", compile_seconds=0.0, curve=[[4, 90.0, 10.0], [8, 182.0, 3100.0]])
    text = tables.peers([shared | ours, shared | theirs])
    assert "| ours, PPO | 1 | 5 | 20 | - | 90 |" in text and "| SB3, PPO | 1 | 8 | 3,100 | 182 | 0 |" in text
