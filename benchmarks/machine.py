"""What a row of results says about the machine and the code."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import vecsim_torch

ROOT = Path(__file__).parents[1]


def output(*command: str) -> str:
    """Standard output of a command; empty where the command is missing."""
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def python_path() -> str:
    """$PYTHONPATH for programs that need this repository and this interpreter's packages."""
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def commit() -> str:
    """Commit of this repository, "with changes" where Python or shell files differ from it; without git $COMMIT."""
    name = output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD") or os.environ.get("COMMIT", "unknown")
    changed = output("git", "-C", str(ROOT), "status", "--porcelain", "--", "*.py", "*.sh", "*.toml")
    return f"{name} with changes" if changed else name


def cpu_cores(cores: str) -> int:
    """Number of CPU cores in a list as taskset writes it ("0-3,6"); of all that this process may use where it is ""."""
    if not cores:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(output("env", "-u", "OMP_NUM_THREADS", "taskset", "-c", cores, "nproc") or 0)  # nproc obeys it


def gpus() -> list[str]:
    """Name and driver of each GPU."""
    return output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader").splitlines()


def hardware(device: str) -> str:
    """Processor and, where it is used, GPU."""
    name = vecsim_torch.cpu_name()
    return f"{gpus()[0]}; {name}" if device == "cuda" else name
