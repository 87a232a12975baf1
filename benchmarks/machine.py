"""What a row of results says about the machine and the code, and the joules that a window of work took."""

from __future__ import annotations

import os
import platform
import re
import statistics
import subprocess
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def output(*command: str) -> str:
    """Standard output of a command; empty where the command is missing."""
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def commit() -> str:
    """Commit of this repository, "with changes" where Python or shell files differ from it."""
    name = output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD") or "unknown"
    changed = output("git", "-C", str(ROOT), "status", "--porcelain", "--", "*.py", "*.sh", "*.toml")
    return f"{name} with changes" if changed else name


def cpu_cores(cores: str) -> int:
    """Number of CPU cores in a list as taskset writes it ("0-3,6"); of all that this process may use where it is ""."""
    if not cores:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(output("taskset", "-c", cores, "nproc") or 0)


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.processor())


def gpu(field: str = "name") -> list[str]:
    """One field of nvidia-smi for each GPU."""
    return output("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits").splitlines()


def hardware(device: str) -> str:
    """Processor and, where it is used, GPU."""
    name = f"{processor()}, {os.cpu_count()} cores"
    return f"{gpu('name,driver_version')[0]}; {name}" if device == "cuda" else name


class EnergyMeter:
    """Joules that the GPU (power by nvidia-smi, twice a second) or the processor (RAPL) takes while the block runs.

    `joules` is None where the hardware does not tell. Other work on the same machine counts too."""

    def __init__(self, device: str) -> None:
        self.device, self.joules = device, None

    @staticmethod
    def counters() -> list[tuple[int, int]]:
        """(microjoules so far, value at which the counter starts again) of each processor package."""
        found = []
        for folder in sorted(Path("/sys/class/powercap").glob("intel-rapl:[0-9]*")):
            if folder.name.count(":") == 1 and os.access(folder / "energy_uj", os.R_OK):
                names = "energy_uj", "max_energy_range_uj"
                found.append(tuple(int((folder / name).read_text()) for name in names))
        return found

    def sample(self) -> None:
        while not self.stopped.wait(0.5):
            draws = gpu("power.draw")
            if draws and all(re.fullmatch(r"[\d.]+", x) for x in draws):
                self.watts.append(sum(float(x) for x in draws))

    def __enter__(self) -> EnergyMeter:
        self.watts, self.before, self.started = [], self.counters(), time.perf_counter()
        self.stopped, self.sampler = threading.Event(), threading.Thread(target=self.sample)
        if self.device == "cuda":
            self.sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        if self.device == "cuda":
            self.sampler.join()
        seconds = time.perf_counter() - self.started
        if self.watts:
            self.joules = statistics.mean(self.watts) * seconds
        elif self.before and self.device == "cpu":
            pairs = zip(self.before, self.counters())
            self.joules = sum((after - before) % wraps for (before, wraps), (after, _) in pairs) * 1e-6
