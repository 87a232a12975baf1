"""benchmark.sh: its programs are sound Python, its referee is fair and loses nothing, its tables follow from the files.

The referee is tested with contenders that only count; what the real ones measure is seen by running benchmark.sh."""

import importlib
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmark.sh"

# One piece of work is one sleep; each window leaves its name in a shared file. `variant` is the number of the window that fails.
COUNTING = """
windows, clock = 0, None
while True:
    time.sleep(0.01)
    meter.tick(1)
    with open(settings["trace"], "a") as trace:
        trace.write(sys.argv[0].split("/")[-1][:-3] + " ")
    if clock != meter.clock:
        clock, windows = meter.clock, windows + 1
    if variant == str(windows):
        raise RuntimeError("this contender breaks")
"""


def run(*words, **options):
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=120, **options)


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("programs")
    assert run(SCRIPT, "programs", folder, env={"PATH": "/usr/bin:/bin", "HOME": str(folder)}).returncode == 0
    meter = (folder / "train_ours.py").read_text().split("meter = Meter()\n")[0] + "meter = Meter()\n"
    for name in ("first", "second"):
        (folder / f"{name}.py").write_text(meter + COUNTING)
    return folder


@pytest.fixture
def comparison(programs, tmp_path):
    """Two counting contenders, three short windows each."""
    contenders = [dict(name=name, peer="project", python=sys.executable, program=name, variant="", installed=True) for name in ("first", "second")]
    return dict(
        mode="train", case="toy", unit="steps/s", settings={"trace": str(tmp_path / "trace")}, contenders=contenders,
        repeats=3, seconds=0.05, patience=60, cores="", command="./benchmark.sh train", commit="abc", skipped={},
        root=str(ROOT), programs=str(programs), logs=str(tmp_path), scratch=str(tmp_path), force=0, dry_run=0,
        results=str(tmp_path), path=str(tmp_path / "results" / "train-toy.json"), reference="first", shown=str(tmp_path / "shown"),
    )  # fmt: skip


def referee(comparison, **options):
    file = Path(comparison["scratch"]) / "comparison.json"
    file.write_text(json.dumps(comparison))
    return run(sys.executable, Path(comparison["programs"]) / "referee.py", file, **options)


def rows_of(comparison):
    return {row["contender"]: row for row in json.loads(Path(comparison["path"]).read_text())["rows"]}


def test_syntax_and_programs(programs):
    assert run("bash", "-n", SCRIPT).returncode == 0
    checked = run(
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--config",
        ROOT / "pyproject.toml",
        "--extend-ignore",
        "I001,F811",
        programs,
    )
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["fly"], "unknown mode 'fly'"),
        ([], "unknown mode ''"),
        (["train", "--repeats", "2"], "--repeats must be at least 3"),
        (["train", "--seconds", "soon"], "--seconds must be a whole number"),
        (["train", "--device", "tpu"], "--device must be cpu or cuda"),
        (["train", "--env-id"], "--env-id needs a value"),
        (["train", "--slow"], "unknown option '--slow'"),
        (["scores", "--set", "a2c"], "--set must be ppo, sac, candidates or mjx"),
        (["cost", "--dollars-per-hour", "0.0"], "--dollars-per-hour must be more than 0"),
        (["walk", "--quick"], "--quick does nothing in walk"),
        (["ablate", "--env-id", "Hopper-v5,Ant-v5"], "ablate takes one task, not Hopper-v5 Ant-v5"),
        (["sim", "--env-id", "Ant-v6"], "sim knows no task Ant-v6; choose among InvertedPendulum-v5"),
        (["train", "--env-id", "Ant-v5,Quadruped-Flat"], "train knows no task Quadruped-Flat"),
        (["walk", "--env-id", "Quadruped"], "walk knows no task Quadruped; choose among"),
        (["sim", "--env-id", ""], "--env-id must name a task"),
        (["scores", "--env-id", ","], "--env-id must name a task"),
        (["table", "--results", SCRIPT], f"--results must name a folder, and {SCRIPT} is a file"),
        (["table", "--results", ""], "--results must name a folder"),
    ],
)
def test_bad_input_is_one_line_and_status_2(words, complaint):
    answer = run(SCRIPT, *words)
    assert answer.returncode == 2 and answer.stdout == ""
    assert answer.stderr.startswith("error: ") and complaint in answer.stderr and answer.stderr.count("\n") == 1


@pytest.mark.parametrize("content", [None, "", "Collecting torch\n"])
def test_a_log_without_an_error_tells_the_free_space(tmp_path, content):
    """A full disk takes no log either."""
    log = tmp_path / "peer.log"
    if content is not None:
        log.write_text(content)
    function = SCRIPT.read_text().split("\none_line() ")[1].split("\n}\n")[0]
    answer = run("bash", "-euo", "pipefail", "-c", f"one_line() {function}\n}}\ncache={tmp_path}\none_line 'does not install' {log}")
    assert answer.returncode == 0 and answer.stdout.startswith("does not install: no message; "), answer.stderr
    assert f"free on the disk of {tmp_path} (log: {log})" in answer.stdout and answer.stdout.count("\n") == 1


def test_a_relative_interpreter_is_made_absolute(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\necho "$0" >>{tmp_path}/calls\nexec {sys.executable} "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    answer = run(SCRIPT, "table", "--results", tmp_path, cwd=tmp_path, env={**os.environ, "PYTHON": "bin/python"})
    assert answer.returncode == 0 and set((tmp_path / "calls").read_text().split()) == {f"{tmp_path}/bin/python"}


def test_an_edit_during_a_run_breaks_nothing():
    """Nothing is left to read once the last line has begun."""
    assert SCRIPT.read_text().endswith("}\n\nmain; exit\n")


def test_rows_hold_what_a_reader_needs_and_windows_alternate(comparison):
    assert referee(comparison).returncode == 0
    rows = rows_of(comparison)
    for row in rows.values():
        assert len(row["values"]) == 3
        assert row["minimum"] == min(row["values"]) <= row["median"] <= max(row["values"]) == row["maximum"]
        assert 20 < row["median"] < 101  # pieces of at least 10 ms each
        assert row["warmup_seconds"] > 0.01 and row["peak_memory_mib"]["host"] > 5
        assert {"command", "hardware", "commit", "cores", "unit", "versions"} <= row.keys()
    trace = Path(comparison["settings"]["trace"]).read_text().split()
    changes = [name for i, name in enumerate(trace) if i == 0 or name != trace[i - 1]]
    assert changes == ["first", "second"] * 3
    assert not list(Path(comparison["path"]).parent.glob("*.tmp"))


COMPILING = """
for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "JAX_COMPILATION_CACHE_DIR"):
    file = Path(os.environ[name]) / "kernel"
    if not file.exists():
        time.sleep(0.5)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
meter.facts["keeps_all"] = os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "0"
"""


def test_a_contender_starts_first_with_empty_caches_and_then_with_what_it_left_there(comparison, programs, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", comparison["scratch"])  # the user's, which no contender may see
    counting = (programs / "first.py").read_text().replace("meter = Meter()\n", "meter = Meter()\n" + COMPILING)
    (programs / "compiling.py").write_text(counting)
    comparison["contenders"] = [contender | dict(program="compiling") for contender in comparison["contenders"]]
    for change in ({}, dict(force=1)):
        assert referee(comparison | change).returncode == 0
        for row in rows_of(comparison).values():
            assert row["first_start_seconds"] > 1.5 > 0.5 + row["warmup_seconds"] and row["keeps_all"]


def test_scaling_starts_a_contender_once(comparison):
    assert referee(comparison | dict(mode="scaling")).returncode == 0
    assert not any("first_start_seconds" in row for row in rows_of(comparison).values())


def test_memory_is_that_of_all_processes(comparison, programs):
    held = "import time; held = bytearray(200 * 2**20); held[::4096] = b'x' * len(held[::4096]); print(flush=True); time.sleep(600)"
    start = f"import subprocess\nchild = subprocess.Popen([sys.executable, '-c', {held!r}], stdout=subprocess.PIPE)\nchild.stdout.readline()\n"
    counting = (programs / "second.py").read_text().replace("windows, clock = 0, None\n", start + "windows, clock = 0, None\n")
    (programs / "with_a_child.py").write_text(counting)
    comparison["contenders"][1]["program"] = "with_a_child"
    assert referee(comparison).returncode == 0
    first, second = (row["peak_memory_mib"]["host"] for row in rows_of(comparison).values())
    assert 200 < second - first < 240


def train_settings(env_id, integrator, num_envs):
    sizes = dict(num_envs=num_envs, num_steps=4, update_epochs=2, num_minibatches=2, solver_iterations=4, hidden=[16])
    return dict(env_id=env_id, device="cpu", num_envs=2, integrator=integrator, env_kwargs={}, ours=sizes)


def contend(program, settings, variant="", python=sys.executable, **environment):
    """What a contender reports: that it is ready, and its first window if its work is enough for one."""
    environment |= dict(BENCHMARK_SETTINGS=json.dumps(settings), BENCHMARK_VARIANT=variant, BENCHMARK_ROOT=str(ROOT))
    environment |= dict(BENCHMARK_SECONDS="0.01", OMP_NUM_THREADS="1")
    answer = run(python, program, input="go\n", env=os.environ | environment, cwd=program.parent)
    assert answer.returncode == 0, answer.stderr
    return [json.loads(line) for line in answer.stdout.splitlines()]


def beginning(programs, name, last):
    """A program up to a line."""
    before, found, _ = (programs / f"{name}.py").read_text().partition(last)
    assert found
    return before


@pytest.mark.parametrize("integrator, code", [("euler", 0), ("rk4", 1)])
def test_all_contenders_of_a_training_integrate_alike(programs, integrator, code):
    """Gymnasium's environments, vecsim in others' hands, and our own training, on a task whose MJCF says RK4."""
    note = """
meter.facts["theirs"] = int(make_one().unwrapped.model.opt.integrator)
meter.facts["vecsim"] = make_envs(1).env.settings.integrator
meter.tick(1)
"""
    theirs, ours = programs / f"theirs_{integrator}.py", programs / f"ours_{integrator}.py"
    theirs.write_text(beginning(programs, "train_skrl", "# Policy and value function") + note)
    note = "\nmeter.facts['ours'] = args.integrator\nmeter.tick(1)\n"
    ours.write_text(beginning(programs, "train_ours", "class CountedSteps") + note)
    settings = train_settings("Hopper-v5", integrator, num_envs=2)
    assert contend(theirs, settings, "vecsim")[0]["facts"] == dict(theirs=code, vecsim=integrator)
    assert contend(ours, settings, "1")[0]["facts"] == dict(ours=integrator)


@pytest.mark.parametrize("peer", ["rsl_rl", "skrl", "rl_games"])
def test_other_learners_train_on_vecsim(programs, peer):
    """In the peer's own environment, where ./benchmark.sh has built it; without compilation, which takes a minute."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "onefile-gpu-rl-bench" / peer
    if not (folder / ".complete").exists():
        pytest.skip(f"{peer} is not installed; ./benchmark.sh train installs it")
    settings = train_settings("InvertedPendulum-v5", "euler", num_envs=8)
    program, python = programs / f"train_{peer}.py", folder / "bin" / "python"
    ready, measured = contend(program, settings, "vecsim", python, TORCHDYNAMO_DISABLE="1")
    assert ready["ready"] and measured["work"] == 4 * 8  # one iteration


def test_a_training_is_compared_under_each_integrator(tmp_path):
    home = dict(PYTHON=sys.executable, XDG_CACHE_HOME=str(tmp_path))
    words = ("train", "--dry-run", "--device", "cpu", "--env-id", "Ant-v5,HalfCheetah-v5", "--results", tmp_path)
    plan = run(SCRIPT, *words, env=os.environ | home).stdout
    cases = [line.split(":")[0].rsplit("-", 1)[0] for line in plan.splitlines() if line.startswith("train ")]
    assert cases == ["train Ant-v5-euler", "train Ant-v5-rk4", "train HalfCheetah-v5-euler"]
    assert plan.count("rsl_rl on vecsim") == plan.count("Brax, its own model, spring") >= 2


@pytest.mark.parametrize("name", ["train_sb3", "train_skrl", "train_rsl_rl", "train_rl_games"])
def test_no_peer_is_fixed_to_the_cpu(programs, name):
    program = (programs / f"{name}.py").read_text().split("meter = Meter()\n")[1]
    assert '"cpu"' not in program and "device=device" in program.replace(", device)", ", device=device)")


def test_jax_on_a_gpu_is_the_build_for_it_and_computes_there(programs):
    function = SCRIPT.read_text().split("\npackages_of() ")[1].split("\n}\n")[0]
    for peer in ("brax", "mjx"):
        for device, built in (("cuda", True), ("cpu", False)):
            commands = f"packages_of() {function}\n}}\ndevice={device}\npackages_of {peer}"
            answer = run("bash", "-euo", "pipefail", "-c", commands)
            assert ("jax[cuda12]" in answer.stdout) == built, answer.stderr
    with pytest.raises(AssertionError, match="RuntimeError: JAX computes on the cpu, not on cuda"):
        contend(programs / "sim_jax.py", dict(device="cuda"), "mjx", JAX_PLATFORMS="cpu")


def test_the_physics_of_jax_is_in_float32(programs):
    """On Ampere and newer GPUs its matrix products are else in TF32."""
    import jax
    import jax.numpy as jnp

    set_for_all = 'jax.config.update("jax_default_matmul_precision", "highest")'
    assert set_for_all in beginning(programs, "sim_jax", "if variant ==")
    wrapper = (programs / "train_brax.py").read_text().split("class ExactPhysics")[1].split("\n\n\n")[0]

    class Wrapper:
        def __init__(self, env):
            self.env = env

    class Env:
        def step(self, state, action):
            return state @ action

    scope = dict(envs=SimpleNamespace(Wrapper=Wrapper), jax=jax)
    exec("class ExactPhysics" + wrapper, scope)
    with jax.default_matmul_precision("default"):  # other tests may have set it for the whole process
        exact, usual = (jax.make_jaxpr(env.step)(jnp.ones((2, 2)), jnp.ones(2)) for env in (scope["ExactPhysics"](Env()), Env()))
    assert "HIGHEST" in str(exact) and "HIGHEST" not in str(usual)


@pytest.mark.parametrize("num_envs", [8, 600])
def test_simulators_start_from_states_in_the_middle_of_episodes(programs, tmp_path, num_envs):
    answer = run(sys.executable, programs / "states.py", "Hopper-v5", "cpu", num_envs, 4, tmp_path / "states.npz")
    assert answer.returncode == 0 and json.loads(answer.stdout)["starts"] == "mid-episode"
    states = np.load(tmp_path / "states.npz")
    qpos, qvel = states["start"], states["start_qvel"]
    assert qpos.shape == qvel.shape == (num_envs, 6) and np.isfinite(qpos).all() and (np.abs(qvel).max(1) > 1e-3).all()
    assert len(np.unique(qpos, axis=0)) == min(num_envs, 512)
    if num_envs == 600:
        height = qpos[:, 1]  # some stand, some have fallen
        assert (qpos[512:] == qpos[:88]).all() and (height < 0.6).mean() > 0.1 and (height > 1.0).mean() > 0.1


def test_what_is_finished_is_not_measured_again_unless_forced(comparison):
    referee(comparison)
    before = Path(comparison["path"]).read_text()
    answer = referee(comparison)
    assert answer.returncode == 0 and "finished" in answer.stderr
    assert Path(comparison["path"]).read_text() == before
    referee(comparison | dict(force=1))
    assert Path(comparison["path"]).read_text() != before


def test_more_repeats_keep_the_rounds_that_stand(comparison):
    referee(comparison)
    first = rows_of(comparison)["first"]["values"]
    referee(comparison | dict(repeats=4))
    assert rows_of(comparison)["first"]["values"][:3] == first
    assert [len(row["values"]) for row in rows_of(comparison).values()] == [4, 4]


def test_an_interrupted_run_goes_on_at_the_next_round(comparison):
    file = Path(comparison["scratch"]) / "comparison.json"
    file.write_text(json.dumps(comparison | dict(repeats=50, seconds=0.2)))
    process = subprocess.Popen(
        [sys.executable, Path(comparison["programs"]) / "referee.py", file], stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 60
    while not Path(comparison["path"]).exists() and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    rounds = len(rows_of(comparison)["first"]["values"])
    kept = rows_of(comparison)["first"]["values"]
    assert 1 <= rounds < 50
    referee(comparison | dict(repeats=rounds + 1, seconds=0.2))
    assert rows_of(comparison)["first"]["values"][:rounds] == kept
    assert [len(row["values"]) for row in rows_of(comparison).values()] == [rounds + 1] * 2


def test_rounds_of_another_commit_are_not_mixed(comparison):
    referee(comparison)
    first = rows_of(comparison)["first"]["values"]
    referee(comparison | dict(repeats=4, commit="def"))
    assert len(rows_of(comparison)["first"]["values"]) == 4 and rows_of(comparison)["first"]["values"][:3] != first


def test_a_contender_that_breaks_costs_one_line(comparison):
    comparison["contenders"][1]["variant"] = "2"
    comparison["skipped"] = {"third": "does not install: no such package"}
    answer = referee(comparison)
    assert answer.returncode == 0
    assert len([line for line in answer.stderr.splitlines() if "this contender breaks" in line]) == 1
    record = json.loads(Path(comparison["path"]).read_text())
    first, second = record["rows"]
    assert len(first["values"]) == 3 and "stopped" not in first
    assert len(second["values"]) == 1 and "this contender breaks" in second["stopped"] and record["reference"] == "first"
    assert set(record["failed"]) == {"third"}
    assert "(log: " in answer.stderr and "(log: " not in str(record)  # a path of this machine
    comparison["contenders"][1]["variant"] = ""  # mended; the next run measures it alone, all its windows
    answer = referee(comparison | dict(commit="def"))
    assert answer.returncode == 0 and "first: ready" not in answer.stderr
    again = rows_of(comparison)
    assert again["first"] == first and json.loads(Path(comparison["path"]).read_text())["commit"] == "abc"
    assert len(again["second"]["values"]) == 3 and "stopped" not in again["second"]
    assert again["second"]["measured_later"] and again["second"]["commit"] == "def"


def test_a_contender_that_stops_again_keeps_its_longer_row(comparison):
    comparison["contenders"][1]["variant"] = "2"
    referee(comparison)
    kept = rows_of(comparison)["second"]
    comparison["contenders"][1]["variant"] = "1"
    referee(comparison)
    assert rows_of(comparison)["second"] == kept


def test_states_of_another_folder_do_not_hinder_a_run_from_going_on(comparison):
    settings = [comparison["settings"] | dict(states=f"/tmp/{name}/states.npz", xml=f"/{name}/ant.xml") for name in "ab"]
    referee(comparison | dict(settings=settings[0]))
    first = rows_of(comparison)["first"]["values"]
    assert json.loads(Path(comparison["path"]).read_text())["settings"] == comparison["settings"]
    assert "finished" in referee(comparison | dict(settings=settings[1])).stderr
    referee(comparison | dict(settings=settings[1], repeats=4))
    assert rows_of(comparison)["first"]["values"][:3] == first and len(rows_of(comparison)["first"]["values"]) == 4


def test_a_reference_that_does_not_start_again_keeps_its_row_and_its_place(comparison, programs):
    referee(comparison)
    (programs / "broken.py").write_text("raise RuntimeError('no such library')\n")
    comparison["contenders"][0]["program"] = "broken"
    assert referee(comparison | dict(repeats=4)).returncode == 0
    record = json.loads(Path(comparison["path"]).read_text())
    first, second = record["rows"]
    assert len(first["values"]) == 3 and first["stopped"].startswith("did not start again") and len(second["values"]) == 4
    assert record["reference"] == first["contender"] == "first"


def test_a_contender_that_the_file_does_not_know_is_measured_alone(comparison):
    second = comparison["contenders"].pop()
    comparison["skipped"] = {"second": "does not install: no net"}
    referee(comparison)
    first = rows_of(comparison)["first"]
    assert "finished" in referee(comparison).stderr
    comparison["skipped"], comparison["contenders"] = {}, [*comparison["contenders"], second]
    referee(comparison)
    record = json.loads(Path(comparison["path"]).read_text())
    assert record["failed"] == {} and record["rows"][0] == first and "measured_later" not in first
    assert record["rows"][1]["measured_later"] and len(record["rows"][1]["values"]) == 3


def test_a_contender_is_not_measured_later_beside_other_versions(comparison):
    second = comparison["contenders"].pop()
    referee(comparison)
    file = Path(comparison["path"])
    file.write_text(file.read_text().replace('"numpy": "', '"numpy": "0.'))
    before = file.read_text()
    answer = referee(comparison | dict(contenders=[*comparison["contenders"], second]))
    assert answer.returncode == 0 and "second not measured beside other versions: numpy" in answer.stderr
    assert file.read_text() == before


@pytest.mark.parametrize("change", [dict(seconds=0.06), dict(hardware="another CPU"), dict(settings={"num_envs": 3})])
def test_a_file_of_other_hardware_or_settings_is_kept(comparison, change):
    referee(comparison)
    file = Path(comparison["path"])
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    before = file.read_text()
    answer = referee(comparison | dict(repeats=4))
    assert answer.returncode == 0 and "--results DIR keeps both" in answer.stderr and answer.stderr.count("\n") == 1
    assert list(change)[0] in answer.stderr or "num envs (3 there" in answer.stderr
    assert file.read_text() == before


def test_a_contender_that_never_gets_ready_is_left_out(comparison, programs):
    (programs / "silent.py").write_text("import time\ntime.sleep(600)\n")
    comparison["contenders"][1]["program"] = "silent"
    answer = referee(comparison | dict(patience=3))
    assert answer.returncode == 0 and "second: left out: no answer within 3 s" in answer.stderr


def test_a_full_disk_loses_nothing(comparison):
    """A limit on the size of files stands in for the full disk."""
    referee(comparison)
    before = Path(comparison["path"]).read_text()

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    file = Path(comparison["scratch"]) / "comparison.json"
    file.write_text(json.dumps(comparison | dict(force=1, settings={"trace": "/dev/null"})))
    answer = run(sys.executable, Path(comparison["programs"]) / "referee.py", file, preexec_fn=small_files)
    assert answer.returncode == 1
    assert [line for line in answer.stderr.splitlines() if line.startswith("error: ")][0].endswith(
        "its rows were printed instead"
    )
    assert "Traceback" not in answer.stderr
    assert [json.loads(line)["contender"] for line in answer.stdout.splitlines()] == ["first", "second"]
    assert Path(comparison["path"]).read_text() == before


def sample_row(name, median, **more):
    row = dict(
        mode="sim", case="Ant-v5-cpu1", contender=name, unit="physics steps/s", values=[median] * 3, joules_per_unit=[]
    )
    row |= dict(
        median=median, minimum=0.9 * median, maximum=1.1 * median, warmup_seconds=12.0, peak_memory_mib={"host": 512.0}
    )
    return (
        row
        | dict(command="./benchmark.sh sim", cores=1, versions={"torch": "2.13.0"}, hardware="a CPU", commit="abc")
        | more
    )


def test_no_program_hides_a_module_that_python_brings(programs):
    """They lie in one folder, which is the first place where each of them looks for an import."""
    assert not {path.stem for path in programs.glob("*.py")} & sys.stdlib_module_names


@pytest.fixture
def results(tmp_path):
    errors = dict(step_error_p50=1e-7, step_error_p99=2e-5)
    rows = [sample_row("vecsim", 100_000.0, first_start_seconds=80.0, **errors), sample_row("MJX", 8_000.0)]
    record = dict(
        mode="sim", case="Ant-v5-cpu1", unit="physics steps/s", settings={"env_id": "Ant-v5"}, seconds=10, cores=""
    )
    record |= dict(
        hardware="a CPU",
        commit="abc",
        command="./benchmark.sh sim",
        rows=rows,
        failed={"Brax": "does not install (log: x)"},
    )
    training = record | dict(
        mode="train", rows=[sample_row("ours", 20_000.0, joules_per_unit=[0.002] * 3), sample_row("SB3", 1_600.0)]
    )
    scaling = record | dict(
        mode="scaling",
        case="Ant-v5-cpu1-16-envs",
        rows=[sample_row("16 environments", 9_000.0, kernels_per_physics_step=14.2)],
    )
    run = dict(
        env_id="Ant-v5",
        algorithm="ppo",
        seed=1,
        env_steps=2_000_000,
        train_seconds=120.0,
        compile_seconds=40.0,
        threshold=3000,
        seconds_to_threshold=60.0,
    )
    run |= dict(
        gymnasium=dict(mean=4000.0, std=10.0, min=3990.0),
        vecsim=dict(mean=4100.0, std=20.0, min=60.0),
        hardware="a CPU",
        command="python ppo_gpu_torch.py",
        commit="abc",
    )
    run |= dict(curve=[[1_000_000, 60.0, 3000.0], [2_000_000, 120.0, 4000.0]])
    for name, content in (("sim", record), ("train", training), ("scaling", scaling)):
        (tmp_path / "benchmark").mkdir(exist_ok=True)
        (tmp_path / "benchmark" / f"{name}-{content['case']}.json").write_text(json.dumps(content))
    (tmp_path / "ppo").mkdir()
    (tmp_path / "ppo" / "Ant-v5-seed1.json").write_text(json.dumps(run))
    other = dict(seed=2, seconds_to_threshold=None, gymnasium=dict(mean=2900.0, std=5.0, min=2800.0))
    (tmp_path / "ppo" / "Ant-v5-seed2.json").write_text(json.dumps(run | other))
    (tmp_path / "mjx").mkdir()
    for name, algorithm in (("Ant-v5", "ppo_mjx"), ("Ant-v5-torch", "ppo")):
        (tmp_path / "mjx" / f"{name}-seed1.json").write_text(json.dumps(run | dict(algorithm=algorithm)))
    (tmp_path / "sac" / "ablation" / "Ant-v5").mkdir(parents=True)
    off_policy = run | dict(algorithm="sac", cores_shared=True, seconds_to_threshold=None, steps_to_threshold=500_000)
    (tmp_path / "sac" / "Ant-v5-seed1.json").write_text(json.dumps(off_policy))
    for seed, (textbook, all_together) in enumerate(((10.0, 40.0), (30.0, 50.0), (20.0, 90.0)), 1):
        rungs = dict(textbook="vanilla", faster="vanilla --tau 0.05", layer="vanilla --tau 0.05 --network layer_norm")
        for name, flags in rungs.items() | {("all", "best")}:
            score = all_together if name in ("layer", "all") else textbook
            one = off_policy | dict(gymnasium=dict(mean=score), curve=[[1, 1.0, 0.0], [2, 2.0, score]])
            one |= dict(command=f"python sac_gpu_torch.py --env-id Ant-v5 --preset {flags} --num-envs 32 --seed {seed}")
            (tmp_path / "sac" / "ablation" / "Ant-v5" / f"{name}-seed{seed}.json").write_text(json.dumps(one))
    seeds = [dict(num_seeds=k, env_steps=500, train_seconds=[x, 2.0 * x, 3.0 * x], median_train_seconds=2.0 * x,
                  compile_seconds=[9.0, 7.0, 8.0], median_compile_seconds=8.0) for k, x in ((1, 5.0), (8, 15.0))]  # fmt: skip
    seeds = dict(env_id="Ant-v5", command="python ppo_mjx_jax.py", hardware="a CPU", commit="abc", versions={"jax": "0.10.2"}, rows=seeds)
    (tmp_path / "mjx" / "seeds.json").write_text(json.dumps(seeds))
    return tmp_path


def test_tables_follow_from_the_files(programs, results):
    text = run(sys.executable, programs / "table.py", results, "sim,train,scaling,scores,seeds,ablate,cost", "2").stdout
    assert "| first start | second start |" in text
    assert "| vecsim | 100,000 (90,000 to 110,000) | 1 | 1e-07 | 2e-05 | 80 s | 12 s | 0.5 GiB host |" in text
    without_starts = "| MJX | 8,000 (7,200 to 8,800) | 12 | - | - | - | - | 0.5 GiB host |"  # an older row
    assert without_starts in text
    assert "Brax is missing: does not install." in text
    assert (
        "| ours | 20,000 | 40 | 500 | 36.0 M | 0.5 GiB host |" in text
    )  # 0.002 J and 1e-4 s of 2 dollars an hour each
    assert "| ours | 20,000 (18,000 to 22,000) | 1 | 0.5 GiB host |" in text  # no row of the file was started twice
    assert "| 16 environments | 9,000 (8,100 to 9,900) | 14.2 |" in text
    both = "| 1 / 2 | 2,000,000 | 120 / 120 | 40 / 40 | 4,000 ± 10 / 2,900 ± 5 | 4,100 (60) / 4,100 (60) | 3,000 | 60 / not reached |"
    assert f"| Ant-v5 | PPO {both}" in text
    for algorithm in ("PPO", "PPO, JAX"):  # the other set's runs, which are no seeds of the first's
        assert f"| Ant-v5 | {algorithm} | 1 | 2,000,000 | 120 | 40 | 4,000 ± 10 | 4,100 (60) | 3,000 | 60 |" in text
    assert "| 8 | 30.0 s (15.0 to 45.0) | 3.00 | 8.0 s | 37.0 s | 2.18 | 500 |" in text  # 30 + 7 against 10 + 7
    assert "| Ant-v5 | SAC | 1 | 2,000,000 | 4,000 ± 10 | 4,100 (60) | 3,000 | 500,000 |" in text
    ladder = (
        "| textbook | 20 | 10 | 10 | 5 | 3 | `--preset vanilla` |\n"
        "| + faster | 20 | 10 | 10 | 5 | 3 | `--tau 0.05` |\n"
        "| + layer | 50 | 40 | 25 | 20 | 3 | `--network layer_norm` |\n"
        "| all | 50 | 40 | 25 | 20 | 3 | `--preset best` |\n"
    )
    assert ladder in text


def test_a_table_names_its_reference_and_who_stopped_or_came_later(programs, results):
    file = results / "benchmark" / "sim-Ant-v5-cpu1.json"
    record = json.loads(file.read_text()) | dict(reference="vecsim")
    record["rows"][0]["stopped"] = "in round 4: RuntimeError: broken (log: x)"
    record["rows"][1]["measured_later"] = True
    file.write_text(json.dumps(record))
    text = run(sys.executable, programs / "table.py", results, "sim").stdout
    assert "| physics steps/s | vecsim / this row |" in text and "| MJX | 8,000 (7,200 to 8,800) | 12 |" in text
    assert "vecsim has 3 of them; it stopped: in round 4: RuntimeError: broken." in text
    assert "MJX was measured in a later run, not in turn with the others; commit abc." in text
    file.write_text(json.dumps(record | dict(rows=record["rows"][1:])))
    text = run(sys.executable, programs / "table.py", results, "sim").stdout
    assert "vecsim / this row" in text and "| MJX | 8,000 (7,200 to 8,800) | - |" in text
    assert run(sys.executable, programs / "plot.py", results).returncode == 0


def test_a_table_of_a_run_shows_its_files_alone(programs, results, tmp_path):
    (tmp_path / "shown").write_text(f"{results}/ppo/Ant-v5-seed1.json\n")
    text = run(sys.executable, programs / "table.py", results, "sim,scores", "", tmp_path / "shown").stdout
    assert text.count("| Ant-v5 |") == 1 and "vecsim /" not in text


def test_pictures_are_drawn(programs, results):
    answer = run(sys.executable, programs / "plot.py", results)
    assert answer.returncode == 0, answer.stderr
    for name in ("curves.png", "mjx/curves.png", "sac/curves.png", "speed.png", "scaling.png"):
        assert (results / name).stat().st_size > 10_000


TRAINER = """
import json, sys
from pathlib import Path

flags = {}
for word in sys.argv[1:]:  # a flag, then none, one or more values
    if word.startswith("--"):
        name = word
    flags[name] = "" if word == name else (flags[name] + " " + word).strip()
agents, folder = int(flags.get("--num-seeds", 1)), Path(flags["--run-dir"])
folder.mkdir(parents=True)
score = dict(mean=1000.0, std=0.0, min=1000.0, episodes=20, mean_length=1000.0)
result = dict(env_id=flags["--env-id"], algorithm="ppo_mjx", seed=1, env_steps=500, train_seconds=10.0 + agents, compile_seconds=7.0)
(folder / "eval.json").write_text(json.dumps(result | dict(gymnasium=score, versions={"jax": "0.10.2"}, flags=flags)))
stages = {"simulate": dict(seconds=0.75, share=0.75), "update": dict(seconds=0.25, share=0.25)}
for place in [folder / stage for stage in flags.get("--stages", "").split()] or [folder]:
    place.mkdir(exist_ok=True)
    (place / "profile.json").write_text(json.dumps(dict(steps=16384, stages=stages)))
curve = [dict(env_steps=500, wall_seconds=11.0, gymnasium_return=1000.0)]
(folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in curve))
if "distill" in sys.argv[0] and "--stages" not in flags:
    policies = ("teacher", "student", "finetune", "baseline")
    summary = {name: {"nominal": dict(tracking=0.8, falls=0.05, tracking_of_teacher=1.0)} for name in policies}
    for name in policies:
        (folder / name).mkdir()
        line = dict(env_steps=500, wall_seconds=1.0, velocity_error=0.3, terrain_level=2.0)
        (folder / name / "metrics.jsonl").write_text(json.dumps(line) + "\\n")
    sources = {name: dict(stage=name, env_steps=500, train_seconds=9.0) for name in policies}
    evidence = dict(env_id=flags["--env-id"], perturbations=dict(nominal={}), policies=sources, summary=summary, rows=[], args=flags)
    (folder / "evidence.json").write_text(json.dumps(evidence))
    (folder / "evidence.csv").write_text("policy\\n")
"""


@pytest.fixture
def project(tmp_path):
    """A copy of benchmark.sh beside a stand-in for the trainers, with a cache of its own."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "benchmark.sh").write_text(SCRIPT.read_text())
    (folder / "benchmark.sh").chmod(0o755)
    for name in ("ppo_gpu_torch.py", "sac_gpu_torch.py", "ppo_mjx_jax.py", "ppo_distill_teacher_student.py"):
        (folder / name).write_text(TRAINER)

    def benchmark(*words):
        home = dict(XDG_CACHE_HOME=str(tmp_path / "cache"), PYTHON=sys.executable)
        return run(folder / "benchmark.sh", *words, "--device", "cpu", env=os.environ | home)

    return folder, benchmark


def test_scores_of_the_jax_script_and_of_its_twin_go_to_one_folder(project):
    folder, benchmark = project
    answer = benchmark("scores", "--set", "mjx", "--env-id", "HalfCheetah-v5")
    assert answer.returncode == 0, answer.stderr
    written = {path.name: json.loads(path.read_text()) for path in (folder / "results").rglob("*.json")}
    assert set(written) == {"HalfCheetah-v5-seed1.json", "HalfCheetah-v5-torch-seed1.json"}
    jax, twin = written["HalfCheetah-v5-seed1.json"], written["HalfCheetah-v5-torch-seed1.json"]
    apart = {"--run-dir", "--compilation-cache"}
    shared = [{name: value for name, value in run["flags"].items() if name not in apart} for run in (jax, twin)]
    assert shared[0] == shared[1] and jax["flags"]["--compilation-cache"] == ""
    assert jax["curve"] == [[500, 11.0, 1000.0]] and jax["compile_seconds"] == 7.0 and jax["versions"] == {"jax": "0.10.2"}
    assert "| HalfCheetah-v5 | PPO, JAX | 1 | 500 | 11 | 7 |" in answer.stdout


def test_results_of_other_hardware_or_length_are_kept_and_named(project):
    folder, benchmark = project
    words = ("scores", "--set", "mjx", "--env-id", "HalfCheetah-v5")
    benchmark(*words)
    answer = benchmark(*words)
    assert answer.stderr.count("finished, in") == 2 and answer.stdout.count("| HalfCheetah-v5 |") == 2
    files = list((folder / "results").rglob("*.json"))
    files[0].write_text(json.dumps(json.loads(files[0].read_text()) | dict(hardware="another CPU")))
    before = [file.read_text() for file in files]
    answer = benchmark(*words)
    assert answer.returncode == 0 and "hardware (another CPU there" in answer.stderr and "--results DIR keeps both" in answer.stderr
    assert answer.stderr.count("finished, in") == 1 and answer.stdout.count("| HalfCheetah-v5 |") == 1
    answer = benchmark(*words, "--total-timesteps", "2000")
    assert answer.stderr.count("total timesteps (1500000 there, 2000 here)") == 2 and answer.stdout == ""
    assert [file.read_text() for file in files] == before


def test_walk_stays_on_a_range_of_cores(project):
    folder, benchmark = project
    cores = sorted(os.sched_getaffinity(0))
    spoken = f"{cores[0]}-{cores[0]}"
    judged = "import os, sys\nif __name__ != '__main__':\n    sys.exit(f'on {sorted(os.sched_getaffinity(0))}')\n"
    trainer = TRAINER + '(folder / "checkpoint.pt").write_text("")\n'
    (folder / "ppo_gpu_torch.py").write_text(judged + trainer)
    assert f"on [{cores[0]}]" in benchmark("walk", "--cores", spoken).stderr


def test_the_set_sac_trains_ppo_beside_it(project):
    folder, benchmark = project
    answer = benchmark("scores", "--set", "sac", "--env-id", "HalfCheetah-v5", "--shared")
    assert answer.returncode == 0, answer.stderr
    written = {path.name: json.loads(path.read_text()) for path in (folder / "results" / "sac").glob("*.json")}
    assert set(written) == {f"HalfCheetah-v5{ppo}-seed{seed}.json" for ppo in ("", "-ppo") for seed in (1, 2, 3)}
    assert all(run["cores_shared"] and run["seconds_to_threshold"] is None for run in written.values())
    assert written["HalfCheetah-v5-seed2.json"]["flags"]["--seed"] == "2"
    assert "ppo_gpu_torch.py" in written["HalfCheetah-v5-ppo-seed1.json"]["command"]


def test_ablate_gives_every_variant_the_same_budget_and_goes_on_where_it_was_cut_off(project):
    folder, benchmark = project
    rows = folder / "results" / "sac" / "ablation" / "HalfCheetah-v5"
    assert benchmark("ablate").returncode == 0
    runs = [json.loads(path.read_text()) for path in rows.glob("*.json")]
    assert len(runs) == 3 * len({path.name.rsplit("-seed", 1)[0] for path in rows.glob("*.json")}) >= 30
    budget = "--num-envs --learning-starts --batch-size --updates-per-step --total-timesteps --eval-every".split()
    assert len({tuple(run["flags"][name] for name in budget) for run in runs}) == 1
    (rows / "held-noise-seed3.json").unlink()
    kept = (rows / "textbook-seed3.json").read_text()
    answer = benchmark("ablate")
    assert answer.stderr.count("finished") == len(runs) - 1 and (rows / "held-noise-seed3.json").exists()
    assert (rows / "textbook-seed3.json").read_text() == kept and "| + held noise | 1,000 | 1,000 |" in answer.stdout


def test_seeds_compares_eight_agents_with_one(project):
    folder, benchmark = project
    answer = benchmark("seeds", "--repeats", "3")
    assert answer.returncode == 0, answer.stderr
    record = json.loads((folder / "results" / "mjx" / "seeds.json").read_text())
    assert [row["num_seeds"] for row in record["rows"]] == [1, 8] and record["times_one_seed"] == 18 / 11
    assert [row["train_seconds"] for row in record["rows"]] == [[11.0] * 3, [18.0] * 3]
    assert {"command", "hardware", "commit", "versions"} <= record.keys() and "| 8 | 18.0 s" in answer.stdout
    assert "finished" in benchmark("seeds", "--repeats", "3").stderr


def test_distill_keeps_evidence_and_curves_and_draws_them(project):
    folder, benchmark = project
    answer = benchmark("distill", "--cores", "0")
    assert answer.returncode == 0, answer.stderr
    for env_id in ("Quadruped-Flat", "Quadruped-Rough"):
        kept = folder / "results" / "distill" / env_id
        record = json.loads((kept / "evidence.json").read_text())
        assert {"command", "hardware", "commit", "summary"} <= record.keys() and (kept / "evidence.csv").exists()
        assert dict(zip(record["curve_columns"], record["curves"]["baseline"][0], strict=True))["terrain_level"] == 2.0
        assert f"{env_id}: tracking score" in answer.stdout
    assert "| nominal | 0.80 (5%) | 0.80 (5%) | 0.80 (5%) | 0.80 (5%) | 100% | 100% | 100% |" in answer.stdout
    assert "| student | 500 | 9 s |" in answer.stdout
    assert benchmark("distill", "--cores", "0").stderr.count("finished") == 2
    assert benchmark("plot").returncode == 0
    assert (folder / "results" / "distill" / "Quadruped-Rough" / "curves.png").stat().st_size > 10_000


def test_profile_keeps_the_trainers_own_table(project):
    folder, benchmark = project
    answer = benchmark("profile", "--env-id", "Ant-v5", "--cores", "0")
    assert answer.returncode == 0, answer.stderr
    record = json.loads((folder / "results" / "profile" / "ppo_gpu_torch-Ant-v5-cpu1.json").read_text())
    assert {"command", "hardware", "commit", "versions", "stages"} <= record.keys()
    assert "| `ppo_gpu_torch.py` | Ant-v5 | 16,384 | 750.0 ms (75%) | - | - | - | 250.0 ms (25%) | - |" in answer.stdout
    assert "finished" in benchmark("profile", "--env-id", "Ant-v5", "--cores", "0").stderr


def test_profile_has_a_row_for_each_stage(project):
    folder, benchmark = project
    answer = benchmark("profile", "--env-id", "Quadruped-Flat", "--cores", "0")
    assert answer.returncode == 0, answer.stderr
    names = {path.name for path in (folder / "results" / "profile").iterdir()}
    script = "ppo_distill_teacher_student"
    assert names == {f"{script}-Quadruped-Flat-cpu1-{stage}.json" for stage in ("teacher", "student")}
    for stage in ("teacher", "student"):
        assert f"| `{script}.py`, {stage} | Quadruped-Flat | 16,384 |" in answer.stdout
    assert "finished" in benchmark("profile", "--env-id", "Quadruped-Flat", "--cores", "0").stderr


def accept(words):
    """What the trainer of this command checks before it allocates anything, with its own functions; refuses what it would refuse."""
    trainer = importlib.import_module(words[1].removesuffix(".py"))
    args = trainer.parse_args(words[2:])
    if trainer.__name__ == "ppo_mjx_jax":
        return  # parse_args has checked all; its --profile needs no iterations of the training
    args = trainer.with_task_defaults(args)
    sizes = trainer.derive_sizes(args, 1)
    trainer.check_env_kwargs(args)
    if trainer.__name__ == "sac_gpu_torch":
        trainer.check_length(args, sizes, None, trainer.PROFILED)


def planned(mode, tmp_path):
    """The commands that a mode would run, as its dry run tells them."""
    home = dict(PYTHON=sys.executable, XDG_CACHE_HOME=str(tmp_path))
    answer = run(SCRIPT, mode, "--dry-run", "--device", "cpu", "--results", tmp_path, env=os.environ | home)
    assert answer.returncode == 0, answer.stderr
    commands = [line[line.index("python ") :] for line in answer.stdout.splitlines() if "python " in line]
    return [shlex.split(command.replace("--num-seeds K", "--num-seeds 8")) for command in commands]


@pytest.mark.parametrize("mode, least", [("scores", 30), ("ablate", 39), ("sizes", 18), ("walk", 1), ("distill", 2), ("profile", 5), ("seeds", 1)])
def test_the_trainers_accept_every_command(mode, least, tmp_path):
    commands = planned(mode, tmp_path)
    assert len(commands) >= least and all(words[0] == "python" for words in commands)
    for words in commands:
        accept(words)


@pytest.mark.parametrize(
    "mode, change",
    [
        ("profile", ["--total-timesteps", "40000"]),  # fewer iterations than --profile times
        ("scores", ["--no-such-flag"]),
        ("scores", ["--num-minibatches", "7"]),
        ("ablate", ["--preset", "none"]),
        ("distill", ["--num-envs", "7"]),
        ("seeds", ["--num-minibatches", "7"]),
    ],
)
def test_a_command_that_a_trainer_refuses_is_found(mode, change, tmp_path):
    """Of each mode the first command, with a flag that does not fit."""
    words = planned(mode, tmp_path)[0]
    accept(words)
    trainer = importlib.import_module(words[1].removesuffix(".py"))
    with pytest.raises(trainer.InputError):
        accept([*words, *change])


def test_a_dry_run_knows_only_what_was_measured_of_the_same(comparison):
    referee(comparison)
    file = Path(comparison["path"])
    settings = comparison["settings"] | dict(num_envs=8)
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(settings=settings)))
    comparison["contenders"][1] |= dict(peer="skrl", installed=False)
    asked = comparison | dict(dry_run=1, results=str(file.parent), path=str(file.parent / "other.json"))
    answer = referee(asked | dict(settings=settings))
    assert "about 0 minutes, 0." in answer.stdout and "unknown" not in answer.stdout
    assert "not installed yet: skrl" in answer.stdout
    answer = referee(asked | dict(settings=settings | dict(num_envs=16)))
    assert "minutes and GiB unknown of first | second" in answer.stdout and "about" not in answer.stdout


def test_a_dry_run_runs_nothing(tmp_path):
    answer = run(
        SCRIPT, "train", "--quick", "--dry-run", "--results", tmp_path, env={**os.environ, "PYTHON": sys.executable}
    )
    assert answer.returncode == 0, answer.stderr
    assert "SB3, DummyVecEnv" in answer.stdout and "minutes" in answer.stdout and "GiB" in answer.stdout
    answer = run(SCRIPT, "walk", "--dry-run", "--results", tmp_path, env={**os.environ, "PYTHON": sys.executable})
    assert answer.returncode == 0, answer.stderr
    assert "--env-id Quadruped-Flat" in answer.stdout and "100 episodes of 20 s in each simulator" in answer.stdout
    assert not list(tmp_path.iterdir())


def test_peers_scores_a_policy_when_its_minutes_are_over(programs, tmp_path):
    settings = dict(env_id="InvertedPendulum-v5", seed=1, minutes=0.001, num_envs=1, env_kwargs={})
    curve = tmp_path / "curve.json"
    threads = os.environ | dict(OMP_NUM_THREADS="1")
    answer = run(sys.executable, programs / "peers_cleanrl.py", json.dumps(settings), "sync", curve, env=threads)
    assert answer.returncode == 0, answer.stderr
    [(steps, seconds, score)] = json.loads(curve.read_text())
    assert steps == 2048 and seconds > 0.06 and 1 < score < 1000


def test_peers_tables_and_picture_follow_from_the_files(programs, tmp_path):
    folder = tmp_path / "peers" / "HalfCheetah-v5"
    folder.mkdir(parents=True)
    facts = dict(env_id="HalfCheetah-v5", minutes=3, hardware="a CPU", compile_seconds=0.0)
    for seed, score in ((1, 2000), (2, 3500)):
        curve = [[50_000, 90.0, 100.0], [100_000, 180.0, score]]
        record = facts | dict(contender="sb3-sac", seed=seed, curve=curve)
        (folder / f"sb3-sac-seed{seed}.json").write_text(json.dumps(record))
    record = facts | dict(contender="ours-ppo", seed=1, curve=[[900_000, 60.4, 3000.0]], compile_seconds=81.2)
    (folder / "ours-ppo-seed1.json").write_text(json.dumps(record))
    text = run(sys.executable, programs / "table.py", tmp_path, "peers").stdout
    assert "**HalfCheetah-v5, 3 minutes of training on one core**" in text and "| 3,000 reached after, s |" in text
    assert "| ours, PPO | 1 | 900,000 | 3,000 | 60 | 81 |" in text
    assert "| SB3, SAC | 2 | 100,000 | 2,000 / 3,500 | - / 180 | 0 |" in text
    assert run(sys.executable, programs / "plot.py", tmp_path).returncode == 0
    assert (tmp_path / "peers.png").stat().st_size > 10_000
