"""Settings that must come before PyTorch and JAX are imported, the order of the tests, and the option --figures.

PyTorch takes one thread, because each worker of pytest-xdist has one core. XLA takes one Eigen thread per call and a
large pool: jaxlib 0.10.2 on two cores sometimes hangs in MJX's batched LAPACK calls, when they fill the pool that they
wait for.
"""

import json
import os
import shlex
import signal
import tempfile
from importlib import metadata
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"  # the tests of JAX compile more than they compute
if metadata.version("jaxlib").startswith("0.10."):  # another release may refuse a flag that it does not know
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "onefile-gpu-rl-test-programs"))


@pytest.fixture(autouse=True)
def signal_handlers():
    """A trainer's main installs its own."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def quickly_built(monkeypatch, tmp_path):
    """g++ does not optimise: large robots are compiled in a tenth of the time."""
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))


def pytest_addoption(parser):
    parser.addoption("--figures", metavar="FILE", help="write the worst errors that the tests measured as JSON")


SHARED = {"two_processes", "plain_run", "plain_runs", "on_fake_cuda"}  # fixtures that take long


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items):
    """Groups for --dist loadgroup: a file stays on one worker, but each slow test is its own group and starts early.

    Slow tests that share a fixture of SHARED are one group."""
    for item in items:
        shared = SHARED.intersection(item.fixturenames)
        slow = item.get_closest_marker("slow")
        of_slow = shared.pop() if shared else item.nodeid.replace("@", "_")
        item.add_marker(pytest.mark.xdist_group(of_slow if slow else item.path.name))
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_terminal_summary(terminalreporter, config):
    """What passing tests gave to record_property("a column of README's parity table", (model, worst error))."""
    path = config.getoption("--figures")
    if not path:
        return
    rows = {}
    for report in terminalreporter.stats.get("passed", []):
        for column, (model, worst) in report.user_properties:
            rows.setdefault(model, {})[column] = worst
    command = "python -m pytest " + shlex.join(config.invocation_params.args)
    versions = {name: metadata.version(name) for name in ("torch", "mujoco", "gymnasium")}
    Path(path).write_text(json.dumps(dict(command=command, versions=versions, rows=rows), indent=1) + "\n")
    terminalreporter.write_line(f"figures in {path}")
