"""The command line of the benchmarks; ../benchmark.sh calls it."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from pathlib import Path

from benchmarks import comparisons, gpu, gpu_kernels, machine, mjcf, referee, report, runs

OTHERS = "InvertedDoublePendulum-v5 Reacher-v5 Pusher-v5 Swimmer-v5 HumanoidStandup-v5 Quadruped-Flat Quadruped-Rough"
TASKS = [*comparisons.GYMNASIUM_TASKS, *OTHERS.split()]


class Parser(argparse.ArgumentParser):
    """Bad input is one line and exit status 2."""

    def error(self, message: str) -> None:
        words = " ".join(["./benchmark.sh", *self.prog.split()[1:], "--help"])
        self.exit(2, f"error: {message}; see {words}\n")


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)


def counts(text: str) -> list[int]:
    return [count(part) for part in text.split(",")]


def repeats(text: str) -> int:
    if count(text) < 3:
        raise argparse.ArgumentTypeError(f"must be at least 3, not {text}: a median of fewer says nothing")
    return count(text)


def price(text: str) -> float:
    if not float(text) > 0:
        raise argparse.ArgumentTypeError("must be more than 0")
    return float(text)


def folder(text: str) -> Path:
    if not text or (Path(text).exists() and not Path(text).is_dir()):
        raise argparse.ArgumentTypeError(f"must be a folder, not {text!r}")
    return Path(text).absolute()


def known(kind: str, name: str, names: list[str]) -> str:
    if name not in names:
        raise argparse.ArgumentTypeError(f"unknown {kind} {name!r}; choose from {', '.join(names)}")
    return name


def tasks(text: str) -> list[str]:
    return [known("task", name, TASKS) for name in text.split(",")]


def block(text: str) -> str:
    return known("block", text, [block.name for block in gpu.BLOCKS])


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="./benchmark.sh", description=__doc__)
    modes = parser.add_subparsers(dest="mode", required=True, metavar="MODE")
    everywhere = argparse.ArgumentParser(add_help=False)
    everywhere.add_argument("--results", type=folder, default=machine.ROOT / "results", help="folder of the results")
    running = argparse.ArgumentParser(add_help=False, parents=[everywhere])
    running.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is a GPU")
    running.add_argument("--dry-run", action="store_true", help="say what would run; run nothing")
    running.add_argument("--force", action="store_true", help="measure again what is complete")
    measuring = argparse.ArgumentParser(add_help=False, parents=[running])
    cores = "CPU cores to use, as taskset writes them: 0 or 0,1 or 0-7 (all)"
    measuring.add_argument("--cores", default="", help=cores)
    measuring.add_argument("--env-id", type=tasks, default=[], help="tasks, separated by commas")
    measuring.add_argument("--repeats", type=repeats, help="windows of each contender, at least 3 (5; with --quick 3)")
    comparing = argparse.ArgumentParser(add_help=False, parents=[measuring])
    comparing.add_argument("--seconds", type=count, help="length of a window (10; with --quick 3)")
    comparing.add_argument("--quick", action="store_true", help="one task, short windows, files of their own")
    comparing.add_argument("--contenders", nargs="+", default=[], help="these alone, into a file of their own")

    sim = modes.add_parser("sim", parents=[comparing], help="physics steps/s and error of one step of six simulators")
    sim.add_argument("--num-envs", type=counts, default=[], metavar="A,B,...", help="vecsim alone, with so many robots")
    modes.add_parser("learner", parents=[comparing], help="samples/s of the PPO update, updates/s of SAC")
    modes.add_parser("train", parents=[comparing], help="environment steps/s of whole trainings")
    sets = modes.add_parser("runs", parents=[measuring], help="trainings to a score and others, listed in runs.toml")
    sets.add_argument("set", choices=runs.SETS, help=f"one of {' '.join(runs.SETS)}", metavar="SET")
    sets.add_argument("--total-timesteps", type=count, help="environment steps of each run")
    sets.add_argument("--shared", action="store_true", help="other work shares the cores, so times do not count")
    hour = modes.add_parser("gpu", parents=[running], help="the first hour on a GPU, in blocks of at most 9 minutes")
    hour.add_argument("blocks", nargs="*", type=block, help="default: all; --dry-run lists them", metavar="BLOCK")
    hour.add_argument("--quick", action="store_true", help="a rehearsal: small sizes, files of their own")
    kernels = modes.add_parser("gpu-kernels", parents=[everywhere], help="predicts speed on a GPU")
    kernels.add_argument("--env-id", type=tasks, default=[], help="tasks, separated by commas")
    kernels.add_argument("--emulate", action="store_true", help="run the kernels on the CPU, beside eager PyTorch")
    write = modes.add_parser("report", parents=[everywhere], help="tables and pictures of all results")
    write.add_argument("--dollars-per-hour", type=price, help="price of the machine, for steps per dollar")
    film = "film the trained robots of `runs ppo`, too, or these alone, into a file of their own"
    write.add_argument("--film", nargs="?", const=[], type=tasks, metavar="A,B,...", help=film)

    files = modes.add_parser("mjcf", parents=[everywhere], help="which MJCF files the simulator accepts, and its error")
    files.add_argument("folders", type=folder, nargs="+", help="searched for .xml files, for example unpacked wheels")

    options = parser.parse_args(argv)
    options.command = shlex.join(["./benchmark.sh", *argv])
    if options.mode in ("report", "mjcf", "gpu-kernels"):
        return options
    options.device = options.device or ("cuda" if machine.gpus() else "cpu")
    if options.device == "cuda" and not machine.gpus():
        parser.error("--device cuda: nvidia-smi sees no GPU")
    if options.mode == "gpu":
        if options.device == "cpu" and not (options.quick or options.dry_run):
            parser.error("gpu: there is no GPU, and a CPU takes a day; rehearse with --device cpu --quick")
        return options
    quick = options.quick = getattr(options, "quick", False)
    options.repeats = options.repeats or (3 if quick else 5)
    options.seconds = getattr(options, "seconds", None) or (3 if quick else 10)
    options.patience = 300 if quick else 1500  # seconds until a contender must be ready
    if not machine.cpu_cores(options.cores):
        parser.error(f"--cores {options.cores}: taskset knows no such cores here")
    allowed, words = comparisons.GYMNASIUM_TASKS, f"{options.mode} takes Gymnasium's tasks only"
    if options.mode == "runs":
        allowed = runs.tasks_of(options.set) or TASKS
        words = f"the tasks of the set {options.set} are {', '.join(allowed)}"
    for name in options.env_id:
        if name not in allowed:
            parser.error(f"--env-id: {words}, not {name}")
    return options


def main(argv: list[str]) -> int:
    options, done = parse_args(argv), True
    if options.mode == "report":
        report.write(options)
    elif options.mode == "mjcf":
        mjcf.measure(options)
    elif options.mode == "gpu-kernels":
        gpu_kernels.write(options)
    elif options.mode == "gpu":
        done = gpu.run(options)
    elif options.mode == "runs":
        done = runs.run_set(options.set, options)
    else:
        plan = comparisons.chosen(getattr(comparisons, options.mode)(options), options)
        done = all([referee.measure(comparison, options) for comparison in plan])
        if not options.dry_run:
            report.show([comparison.path(options) for comparison in plan])
    return 0 if done else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("interrupted: what is finished is kept; the same command continues")
