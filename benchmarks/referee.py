"""The referee: starts the contenders of one comparison, lets them measure in turn, and saves a row for each.

Every contender starts twice: first with empty compiler caches, then with what the first start left in them; both times
are in its row. When all are ready, one after the other measures a window: A B C A B C A B C, on the same cores, one at
a time. A row is the median, lowest and highest of its windows. The file is saved after every round.

A file is complete when every row has all its windows. A complete file is not measured again without --force. An
incomplete one continues at its next round if it was measured at this commit; otherwise it is measured again.
A contender that does not install, start or finish costs one line.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import statistics
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import environments, machine

CACHES = "TORCHINDUCTOR_CACHE_DIR TRITON_CACHE_DIR JAX_COMPILATION_CACHE_DIR WARP_CACHE_PATH CUDA_CACHE_PATH".split()
JAX_SETTINGS = {
    "NPROC": "16",  # with a smaller pool XLA may wait for itself in batched LAPACK calls: see ppo_mjx_jax.py
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # all contenders stay loaded; by default one takes most of the GPU
}


@dataclass(frozen=True)
class Contender:
    name: str
    program: str  # its file in benchmarks/: "train/sb3.py"
    variant: str = ""  # what the program calls `variant`

    @property
    def file(self) -> Path:
        return machine.ROOT / "benchmarks" / self.program

    @property
    def module(self) -> str:
        return f"benchmarks.{self.program.removesuffix('.py').replace('/', '.')}"


@dataclass(frozen=True)
class Comparison:
    mode: str  # sim, learner, train or scaling
    case: str  # with the mode the name of the file
    unit: str
    settings: dict  # what every contender reads; saved in the file
    contenders: list[Contender]  # the first is the reference
    prepare: Callable[[Path], dict] | None = None  # writes files into a folder; returns settings that are not saved

    def path(self, options: Namespace) -> Path:
        return options.results / "benchmark" / f"{self.mode}-{self.case}.json"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def environment_of(contender: Contender, settings: dict, options: Namespace) -> dict[str, str]:
    """The environment variables of a contender's program: benchmarks/meter.py reads them."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    environment |= JAX_SETTINGS | ({"JAX_PLATFORMS": "cpu"} if options.device == "cpu" else {})
    environment |= dict(OMP_NUM_THREADS=str(machine.cpu_cores(options.cores)), PYTHONPATH=str(machine.ROOT))
    environment |= dict(BENCHMARK_SETTINGS=json.dumps(settings), BENCHMARK_VARIANT=contender.variant)
    return environment | dict(BENCHMARK_SECONDS=str(options.seconds), PYTHONUNBUFFERED="1")


def on_cores(options: Namespace) -> list[str]:
    """What stands before a command that must stay on --cores."""
    return ["taskset", "-c", options.cores] if options.cores else []


def end(process: subprocess.Popen, patience: float) -> None:
    """End a process and those that it started, all of one session; they have `patience` seconds to do it themselves."""
    for number, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, number)
            process.wait(seconds)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass


class Process:
    """A contender that runs."""

    def __init__(self, contender: Contender, settings: dict, options: Namespace, scratch: Path, caches: Path | None):
        """caches: folder for what compilers keep; None: where they keep it by default."""
        python = environments.interpreter(contender.file, options.device)
        self.patience, self.cores = options.patience, machine.cpu_cores(options.cores)
        self.log = environments.CACHE / f"{re.sub(r'[^a-z0-9]+', '-', contender.program)}-{contender.variant}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        environment = environment_of(contender, settings, options)
        if python == sys.executable:
            environment["PYTHONPATH"] = machine.python_path()
        if caches:
            environment |= {name: str(caches / name) for name in CACHES}
            environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # else it keeps only what took a second
        replies, of_contender = os.pipe()
        environment["BENCHMARK_REPLIES"] = str(of_contender)
        words = [*on_cores(options), python, "-m", contender.module]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=self.log.open("wb"), stderr=subprocess.STDOUT, pass_fds=[of_contender],
            env=environment, cwd=scratch, start_new_session=True,
        )  # fmt: skip
        os.close(of_contender)
        self.replies = os.fdopen(replies)
        try:
            self.ready = self.reply()
        except BaseException:
            self.stop()
            raise

    def reply(self) -> dict:
        """The next line that the contender reports. RuntimeError with the reason if it ends or stays silent."""
        readable, _, _ = select.select([self.replies], [], [], self.patience)
        if not readable:
            raise RuntimeError(f"no answer within {self.patience:g} s (log: {self.log})")
        line = self.replies.readline()
        if not line:
            lines = self.log.read_text(errors="replace").strip().splitlines() or ["no message"]
            errors = [x for x in lines if re.match(r"[\w.]*(Error|Exception|error)\b", x)] or lines
            raise RuntimeError(f"{errors[-1][:160]} (log: {self.log})")
        return json.loads(line)

    def measure(self) -> dict:
        try:
            self.process.stdin.write(b"go\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; reply() tells why
        return self.reply()

    def stop(self) -> None:
        end(self.process, 5)


def save(path: Path, record: dict) -> None:
    """Write a new file, then rename it: an interrupted run or a full disk leaves the older file whole."""
    beside = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        print(json.dumps(record))  # on standard output, so that nothing measured is lost
        reason = f"error: {path} cannot be written ({error.strerror}); its content was printed instead"
        raise SystemExit(reason) from None


class Measurement:
    """The rows of one comparison while it runs."""

    def __init__(self, comparison: Comparison, options: Namespace) -> None:
        self.comparison, self.options = comparison, options
        self.path, self.commit = comparison.path(options), machine.commit()
        self.hardware = machine.hardware(options.device)
        self.rows, self.failed, self.running = {}, {}, {}
        self.complete = False
        if self.path.exists() and not options.force:
            earlier = json.loads(self.path.read_text())
            windows = [len(row["values"]) for row in earlier["rows"] if "stopped" not in row]
            self.complete = min(windows, default=0) >= options.repeats
            if not self.complete and earlier["commit"] == self.commit:
                self.rows = {row["contender"]: row for row in earlier["rows"]}
                self.failed = earlier["failed"]

    def leave_out(self, name: str, reason: str) -> None:
        """Say why a contender measures no more; the file keeps the reason without the path of a log."""
        say(f"  {name}: left out: {reason}")
        if name in self.running:
            self.running.pop(name).stop()
        lasting = reason.split(" (log:")[0]
        if self.rows.get(name, {}).get("values"):
            self.rows[name]["stopped"] = lasting
        else:
            self.rows.pop(name, None)
            self.failed[name] = lasting

    def start(self, contender: Contender, settings: dict, scratch: Path) -> None:
        """Start a contender, first with empty caches; a row that continues has been started so before."""
        name, comparison = contender.name, self.comparison
        caches, first_start = None, {}
        if comparison.mode != "scaling" and name not in self.rows:
            caches = Path(tempfile.mkdtemp(dir=scratch))
            first = Process(contender, settings, self.options, scratch, caches)
            first.stop()
            first_start = dict(first_start_seconds=first.ready["warmup_seconds"])
            say(f"  {name}: ready after {first.ready['warmup_seconds']:.0f} s with empty caches")
        process = self.running[name] = Process(contender, settings, self.options, scratch, caches)
        say(f"  {name}: ready after {process.ready['warmup_seconds']:.0f} s")
        row = dict(mode=comparison.mode, case=comparison.case, contender=name, unit=comparison.unit, values=[])
        row |= dict(warmup_seconds=process.ready["warmup_seconds"], versions=process.ready["versions"])
        row |= dict(command=self.options.command, cores=process.cores, hardware=self.hardware, commit=self.commit)
        self.rows.setdefault(name, first_start | row | process.ready["facts"])

    def window(self, name: str) -> None:
        """Let one contender measure one window."""
        row = self.rows[name]
        reply = self.running[name].measure()
        row["values"].append(reply["work"] / reply["seconds"])
        row["peak_memory_mib"] = reply["peak_memory_mib"]
        say(f"  round {len(row['values'])}/{self.options.repeats}  {name}: {row['values'][-1]:,.0f} {row['unit']}")

    def save(self) -> None:
        comparison, options = self.comparison, self.options
        rows = [self.rows[c.name] for c in comparison.contenders if self.rows.get(c.name, {}).get("values")]
        for row in rows:
            values = row["values"]
            row |= dict(median=statistics.median(values), minimum=min(values), maximum=max(values))
        record = dict(mode=comparison.mode, case=comparison.case, unit=comparison.unit, seconds=options.seconds)
        record |= dict(cores=options.cores, hardware=self.hardware, commit=self.commit, command=options.command)
        record |= dict(reference=comparison.contenders[0].name, settings=comparison.settings, failed=self.failed)
        save(self.path, record | dict(rows=rows))

    def run(self, scratch: Path) -> bool:
        """Start all contenders and measure all rounds; False: no contender could be measured."""
        settings = self.comparison.settings
        if self.comparison.prepare:
            settings = settings | self.comparison.prepare(scratch)
        for contender in self.comparison.contenders:
            if contender.name in self.failed or "stopped" in self.rows.get(contender.name, {}):
                continue
            try:
                self.start(contender, settings, scratch)
            except RuntimeError as error:
                self.leave_out(contender.name, str(error))
        for turn in range(self.options.repeats):
            for name in [name for name in self.running if len(self.rows[name]["values"]) == turn]:
                try:
                    self.window(name)
                except RuntimeError as error:
                    self.leave_out(name, f"stopped in round {turn + 1}: {error}")
            if self.running:
                self.save()
        return bool(self.rows)


def measure(comparison: Comparison, options: Namespace) -> bool:
    """Measure one comparison, or continue it, or say that it is complete; False: it failed."""
    label = f"{comparison.mode} {comparison.case}"
    if options.dry_run:
        names = ", ".join(contender.name for contender in comparison.contenders)
        print(f"{label}: {names}")
        return True
    measurement = Measurement(comparison, options)
    if measurement.complete:
        record = json.loads(measurement.path.read_text())
        made = f"`{record['command']}`, {record['hardware']}, commit {record['commit']}"
        say(f"{label}: complete in {measurement.path} ({made}); --force measures again, --results DIR keeps both")
        return True
    say(label)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        try:
            measured = measurement.run(Path(scratch))
        finally:
            for process in measurement.running.values():
                process.stop()
    if not measured:
        say(f"error: {label}: no contender could be measured")
    return measured
