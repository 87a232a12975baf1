"""Before anything imports JAX: settings under which XLA's CPU backend does not wait for itself. And --figures.

jaxlib 0.10.2 on two cores hangs now and then in MJX's batched LAPACK calls, when the calls fill the pool that they wait
for. One Eigen thread per call and a pool larger than the machine keep it moving.
"""

import json
import os
from importlib import metadata
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
os.environ.setdefault("NPROC", "16")


def pytest_addoption(parser):
    parser.addoption("--figures", metavar="FILE", help="write the worst errors that the tests measured as JSON")


def pytest_terminal_summary(terminalreporter, config):
    """What passing tests gave to record_property("a column of README's parity table", (model, worst error))."""
    path = config.getoption("--figures")
    if not path:
        return
    rows = {}
    for report in terminalreporter.stats.get("passed", []):
        for column, (model, worst) in report.user_properties:
            rows.setdefault(model, {})[column] = worst
    command = "python -m pytest " + " ".join(config.invocation_params.args)
    versions = {name: metadata.version(name) for name in ("torch", "mujoco", "gymnasium")}
    Path(path).write_text(json.dumps(dict(command=command, versions=versions, rows=rows), indent=1) + "\n")
    terminalreporter.write_line(f"figures in {path}")
