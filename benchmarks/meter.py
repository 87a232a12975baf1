"""How a contender reports its speed: it works in an endless loop and calls `meter.tick(work)` after each piece of work.

A contender is one file of sim/, learner/ or train/. It runs in its own virtual environment, so this file uses the
standard library only. The referee passes everything through environment variables: see `referee.Contender`.

The first piece of work is the warm-up: imports, compilation, first pass. After it the contender says that it is ready.
From then on it measures one window each time the referee sends a line: it works until the window is long enough,
reports work and seconds, and waits again.
"""

import json
import os
import resource
import sys
import time
from importlib import metadata
from pathlib import Path

settings = json.loads(os.environ["BENCHMARK_SETTINGS"])
variant = os.environ["BENCHMARK_VARIANT"]
window = float(os.environ["BENCHMARK_SECONDS"])
threads = int(os.environ["OMP_NUM_THREADS"])
device = settings.get("device", "cpu")

PACKAGES = """torch jax jaxlib mujoco mujoco-mjx mujoco-warp warp-lang mujoco-torch brax gymnasium numpy
stable-baselines3 skrl rsl-rl-lib rl-games""".split()


def versions():
    """Versions of Python and of the packages of PACKAGES that are installed here."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return found


def check_jax():
    """RuntimeError where JAX computes on another device, because its build for GPUs is missing, for one."""
    import jax

    if jax.default_backend() != {"cpu": "cpu", "cuda": "gpu"}[device]:
        raise RuntimeError(f"JAX computes on the {jax.default_backend()}, not on {device}")


def synchronize():
    """Wait for the GPU, so that the clock counts finished work only."""
    if "torch" in sys.modules and device == "cuda":
        sys.modules["torch"].cuda.synchronize()


def session_memory_kib():
    """Sum of the peak memory of all live processes of this contender, which is its own session; 0 without /proc."""
    total, session = 0, os.getsid(0)
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            if os.getsid(int(status.parent.name)) == session:
                lines = status.read_text().splitlines()
                total += sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
        except (OSError, ValueError):  # this process has just ended
            continue
    return total


def peak_memory_mib():
    """Peak resident memory of all processes of this contender, and PyTorch's peak on the GPU.

    Pages that processes share count once in each. A process that has ended counts if it alone used more than all live
    ones together. The kernel's own peak of this process would include that of the referee, which started it."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    memory = {"host": max(session_memory_kib(), ended) / 1024}
    if "torch" in sys.modules and device == "cuda":
        memory["gpu"] = sys.modules["torch"].cuda.max_memory_allocated() / 2**20
    return memory


class Meter:
    """Measures windows of work for the referee."""

    def __init__(self):
        self.facts = {}  # what else the row should hold: errors
        self.started, self.clock = time.perf_counter(), None

    def ready(self, act):
        """Only ScoreMeter scores the policy."""

    def tick(self, work):
        """Count a piece of work; at the end of a window, report it and wait for the referee."""
        synchronize()
        now = time.perf_counter()
        if self.clock is None:
            self.report(ready=True, warmup_seconds=now - self.started, versions=versions(), facts=self.facts)
        else:
            self.work += work
            if now - self.clock < window:
                return
            self.report(work=self.work, seconds=now - self.clock, peak_memory_mib=peak_memory_mib())
        if not sys.stdin.readline():
            os._exit(0)  # the referee is done; no clean-up is needed
        self.work, self.clock = 0, time.perf_counter()

    def report(self, **reply):
        """One line to the referee, by its own pipe: standard output is the log, because libraries print there."""
        os.write(int(os.environ["BENCHMARK_REPLIES"]), json.dumps(reply).encode() + b"\n")


class ScoreMeter:
    """The meter of `runs peers`: it stops its clock six times to score the policy, then ends the process.

    It writes the curve, a list of [environment steps, seconds of training, score], to the file settings["curve"]."""

    def __init__(self):
        self.curve, self.steps, self.elapsed = [], 0, 0.0

    def ready(self, act):
        """Start the clock. act(observation) -> deterministic action, both NumPy arrays of one environment."""
        self.act, self.clock = act, time.perf_counter()

    def tick(self, work):
        """Count `work` environment steps; score the policy after every sixth of the time."""
        limit, now = 60.0 * settings["minutes"], time.perf_counter()
        self.steps += work
        self.elapsed += now - self.clock
        if self.elapsed >= (len(self.curve) + 1) * limit / 6:
            self.curve.append([self.steps, round(self.elapsed, 1), round(score(self.act), 1)])
            Path(settings["curve"]).write_text(json.dumps(self.curve))
            if self.elapsed >= limit:
                os._exit(0)
        self.clock = time.perf_counter()


def score(act, episodes=10):
    """Mean return of whole episodes in Gymnasium's environment."""
    import gymnasium
    import numpy as np

    env, total = gymnasium.make(settings["env_id"]), 0.0
    for episode in range(episodes):
        obs, over = env.reset(seed=episode)[0], False
        while not over:
            action = np.clip(act(obs), env.action_space.low, env.action_space.high)
            obs, reward, terminated, truncated, _ = env.step(action)
            over, total = terminated or truncated, total + reward
    return total / episodes


meter = ScoreMeter() if "curve" in settings else Meter()


def count_steps(env, num_steps, work):
    """Make a vector environment call meter.tick(work) where an iteration of num_steps begins; return it.

    Steps count from its last reset on."""
    reset, step, taken = env.reset, env.step, 0

    def counted_reset(**options):
        nonlocal taken
        taken = 0
        return reset(**options)

    def counted_step(actions):
        nonlocal taken
        if taken and taken % num_steps == 0:
            meter.tick(work)
        taken += 1
        return step(actions)

    env.reset, env.step = counted_reset, counted_step
    return env
