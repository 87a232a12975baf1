"""README and results/README.md say what the result files say.

tests/test_benchmark.py checks that results/README.md is what `./benchmark.sh report` makes. Here are README and the
prose of both."""

import csv
import inspect
import json
import math
import re
import statistics
import textwrap
from pathlib import Path
from typing import NamedTuple

import eval_panel
import vecsim_torch
from benchmarks import gpu_kernels, report
from benchmarks.runs import SETS
from benchmarks.tables import grouped, in_time, load, scores_of

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "results/README.md").read_text()


def tables(text):
    """Title (the line above), header and rows of each markdown table."""
    for title, block in re.findall(r"(?:^([^|\n].*)\n)?\n*((?:^\|.*\n)+)", text, re.MULTILINE):
        header, _, *rows = block.splitlines()
        yield title, header, rows


def cells(row):
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_the_scores_are_those_of_the_result_files():
    """README's score table has some columns of the table for PPO in results/README.md."""
    header, rows = next((header, rows) for _, header, rows in tables(README) if header.startswith("| task |"))
    full_header, full_rows = next((h, r) for _, h, r in tables(RESULTS) if h.startswith("| task | algorithm | seeds |"))
    columns = [cells(full_header).index(name) for name in cells(header)]
    assert len(columns) >= 4
    assert [cells(row) for row in rows] == [[cells(row)[k] for k in columns] for row in full_rows]


def test_line_counts_are_true():
    """Within 3%, so that a small edit does not break the table."""
    rows = [cells(row) for _, header, rows in tables(README) if header.startswith("| file |") for row in rows]
    assert len(rows) == 10
    for names, lines, *_ in rows:
        paths = [ROOT / name for name in re.findall(r"`([^`]+)`", names)]
        files = [file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path])]
        count = sum(len(file.read_text().splitlines()) for file in files)
        assert abs(int(lines.replace(",", "")) - count) <= 0.03 * count, (names, count)


def result(name):
    return json.loads((ROOT / "results" / name).read_text())


def speeds(name):
    """Median speed of each contender of a comparison."""
    return {row["contender"]: round(row["median"]) for row in result(name)["rows"]}


def at_equal_time(env_id):
    """Medians of DQN, PQN, PPO and SAC after the minutes of the longest run of Q-learning."""
    found = {name: [] for name in ("dqn", "pqn", "ppo", "sac")}
    for path in [*ROOT.glob(f"results/dqn/{env_id}-*seed*.json"), *ROOT.glob(f"results/peers/{env_id}/ours-*.json")]:
        [run] = load(path.parent, path.name)
        found[run.get("algorithm") or run["contender"].removeprefix("ours-")].append(run)
    minutes = max(run["train_seconds"] for run in found["dqn"] + found["pqn"]) / 60
    for runs in found.values():
        assert len(runs) == 3
        curves = [in_time(run | dict(minutes=minutes)) for run in runs]
        yield f"{statistics.median(curve[-1][2] for curve in curves):,.0f}"


class MedianRun(NamedTuple):
    """Medians over the seeds of a task."""

    score: str
    seconds: float  # of training
    steps: int
    seeds: int


def median_run(name, env_id):
    """Of a set of runs.toml, which must have a file for each seed."""
    seeds = SETS[name]["runs"][env_id].get("seeds", SETS[name]["seeds"])
    found = [result(f"{name}/{env_id}-seed{seed}.json") for seed in seeds]
    [steps] = {run["env_steps"] for run in found}
    middle = statistics.median(run["gymnasium"]["mean"] for run in found)
    seconds = statistics.median(run["train_seconds"] for run in found)
    return MedianRun(f"{middle:,.0f}", seconds, steps, len(seeds))


def claims():
    """What README's prose says of measurements, made from the result files; each must stand there as it is here."""
    rows = csv.DictReader((ROOT / "results/distill/Quadruped-Rough/panel/summary.csv").open())
    judged = {(row["checkpoint"], row["perturbation"]): row for row in rows}
    teacher, student, finetune, baseline = (
        judged[name, "none"] for name in ("teacher", "student", "finetune", "baseline")
    )
    returns = [float(row["return"]) for row in (teacher, student, finetune)]
    share = returns[1] / returns[0]
    yield f"keeps {share:.0%} of its teacher's return: {returns[1]:.1f} of {returns[0]:.1f}"

    def lower(row):
        """By how much the return is below the teacher's, with its interval."""
        middle, *ends = (-float(row[f"return_beyond_teacher{end}"]) for end in ("", "_high", "_low"))
        return "{:.2f} [{:.2f}, {:.2f}]".format(middle, *ends)

    def succeeds(name, perturbation="none"):
        return f"{float(judged[name, perturbation]['success']):.0%}"

    yield f"the middle of the differences is {lower(student)}; for the baseline it is {lower(baseline)}"
    rates = succeeds("student"), succeeds("teacher"), succeeds("baseline")
    yield "student succeeds in {} of the episodes, its teacher in {}, the baseline in {}".format(*rates)
    yield "succeeds in {} of the episodes, its teacher in {} and a blind baseline of as many steps in {}".format(*rates)
    grown = [float(row["tracking"]) for row in (student, finetune)]
    yield "the return is {:.1f}, and the velocity error grows from {:.3f} to {:.3f} m/s".format(returns[2], *grown)
    heavy = [succeeds(name, "mass") for name in ("teacher", "student", "finetune")]
    yield "succeeds in {} of the episodes, the student in {} and the fine-tuned one in {}".format(*heavy)
    stages = result("distill/Quadruped-Rough/training.json")["policies"].values()
    assert {float(row["success"]) for (_, name), row in judged.items() if name == "action_delay"} == {0.0}
    *chain, alone = (round(stage["env_steps"] / 1e6) for stage in stages)
    assert sum(chain) == alone
    yield f"had {alone} million steps together"
    speed = {
        name: speeds(f"benchmark/train-{name}.json")
        for name in ("Ant-v5-euler-cpu1", "Ant-v5-rk4-cpu1", "HalfCheetah-v5-euler-cpu1")
    }
    for rows in speed.values():
        others = [
            rows[name]
            for name in rows
            if name.startswith(("SB3", "CleanRL", "skrl", "rsl_rl", "rl_games")) and "vecsim" not in name
        ]
        assert len(others) >= 4 and rows["rsl_rl"] == max(others)
    ratio, of_cores = {}, {1: {}, 2: {}}
    for path in (ROOT / "results/vecsim").glob("*.json"):
        run = json.loads(path.read_text())
        if run["device"] == "cpu" and run["integrator"] == "euler" and run["threads"] in of_cores:
            of_cores[run["threads"]][run["env_id"]] = run["physics_steps_per_second"]
            if run["threads"] == 1:
                ratio[run["env_id"]] = run["physics_steps_per_second"] / run["mujoco_c_physics_steps_per_second"]
    gain = {name: speed / of_cores[1][name] for name, speed in of_cores[2].items()}
    least, *_, most = sorted(gain, key=gain.get)
    assert (least, most) == ("InvertedPendulum-v5", "Ant-v5") and gain[least] < 1
    yield f"with two, Ant makes {gain[most]:.2f} times the steps of one core. The pendulum makes fewer"
    humanoids = [result(f"ppo/Humanoid-v5-seed{seed}.json") for seed in (1, 2, 3)]
    a_step = [run["gymnasium"]["mean"] / run["gymnasium"]["mean_length"] for run in humanoids]
    yield f"it earns {min(a_step):.1f} to {max(a_step):.1f} a step: 5 for not falling, and 1.25 times its speed"
    speed_at_least = math.floor(10 * (min(a_step) - 5) / 1.25) / 10
    yield f"Humanoid runs at more than {speed_at_least} m/s"
    yield f"So it runs at more than {speed_at_least} m/s"
    under_euler = result("euler/Humanoid-v5-seed3.json")
    lengths = [under_euler[where]["mean_length"] for where in ("vecsim", "gymnasium")]
    yield "lasts {:.0f} of 1,000 steps in the training simulator, and {:.0f} in Gymnasium".format(*lengths)
    assert lengths[1] == min(
        result(f"euler/Humanoid-v5-seed{seed}.json")["gymnasium"]["mean_length"] for seed in (1, 2, 3)
    )
    runs = [json.loads(path.read_text()) for path in (ROOT / "results/ppo").glob("*-seed*.json")]
    assert len(runs) == 28
    [missed] = [run for run in runs if run["gymnasium"]["mean"] < run["threshold"]]
    assert missed["env_id"] == "Walker2d-v5"
    jax, twin = (
        {
            task: statistics.median(result(f"mjx/{task}-v5{twin}-seed{seed}.json")["train_seconds"] for seed in seeds)
            for task, seeds in (("InvertedPendulum", (1, 2, 3)), ("HalfCheetah", (1,)))
        }
        for twin in ("", "-torch")
    )
    assert round(jax["HalfCheetah"] / twin["HalfCheetah"]) == 5
    files = [[f"mjx/InvertedPendulum-v5{x}-seed{seed}.json" for seed in (1, 2, 3)] for x in ("", "-torch")]
    compiled = [max(result(file)["compile_seconds"] for file in found) for found in files]
    times = jax["InvertedPendulum"], twin["InvertedPendulum"]
    yield "trains the pendulum in {:.0f} s and PPO in PyTorch in {:.0f} s".format(*times)
    yield "after at most {:.0f} and {:.0f} s of compilation".format(*compiled)
    yield "HalfCheetah in five times the time of PyTorch (one seed)"
    means = [
        statistics.median(result(file)["gymnasium"]["mean"] for file in files)
        for files in (
            [f"sac/HumanoidStandup-v5-seed{seed}.json" for seed in (1, 2, 3)],
            [f"tasks/HumanoidStandup-v5-seed{seed}.json" for seed in (1, 2, 3)],
        )
    ]
    sac, ppo = (mean / 1000 * 0.003 for mean in means)  # 1,000 steps
    yield f"divided by 0.003 m: SAC holds it at about {sac:.1f} m, PPO at {ppo:.1f} m"
    humanoid = ratio.pop("Humanoid-v5")
    ratio = {name: value for name, value in ratio.items() if name.endswith("-v5")}
    yield f"{min(ratio.values()):.2f} to {max(ratio.values()):.2f} times as fast as MuJoCo C's on one core"
    yield f"Humanoid's {humanoid:.2f} times"
    euler, rk4, cheetah = speed.values()
    alike = "ours, networks 64-64"
    yield f"Ant with Euler, networks of 64-64: a whole training makes {euler[alike]:,} environment steps/s. rsl_rl"
    yield f"makes {euler['rsl_rl']:,}. On HalfCheetah it is {cheetah[alike]:,} against {cheetah['rsl_rl']:,}"
    yield f"Our larger networks make {euler['ours']:,} and {cheetah['ours']:,}"
    yield f"On Ant with RK4 they make {rk4['ours']:,}, and rsl_rl's of 64-64 make {rk4['rsl_rl']:,}"
    yield f"On vecsim, with our batch and larger networks, it makes {euler['rsl_rl on vecsim']:,}"
    gru = speeds("benchmark/learner-gru-cpu1.json")
    ours, skrl, rl_games = (
        gru[name] for name in ("ours with a GRU, compiled", "skrl with a GRU", "rl_games with a GRU")
    )
    yield f"skrl makes {skrl:,} samples/s, rl_games {rl_games:,} and ours {ours:,}"
    ant, cheetah, humanoid = (median_run("ppo", f"{task}-v5") for task in ("Ant", "HalfCheetah", "Humanoid"))
    yield f"Ant scores {ant.score} after {ant.seconds / 60:.0f} minutes on one core"
    assert ant.seeds == cheetah.seeds
    yield f"HalfCheetah {cheetah.score} after {cheetah.seconds / 60:.0f} (medians of {cheetah.seeds} seeds"
    yield f"Humanoid {humanoid.score} after {humanoid.seconds / 60:.0f} ({humanoid.seeds} seeds)"
    tasks = "Ant", "Hopper", "Walker2d", "Humanoid"
    old, new = ([median_run(name, f"{task}-v5") for task in tasks] for name in ("euler", "ppo"))
    pairs = [f"{task} {x.score} and {y.score}" for task, x, y in zip(tasks, old, new, strict=True)]
    yield ", ".join(pairs)
    millions = old[3].steps / 1e6, new[3].steps / 1e6
    yield "Humanoid had {:.0f} million steps with Euler, and {:.0f} million with RK4".format(*millions)
    of_mjcf = {}
    for task in vecsim_torch.TASKS:
        model = vecsim_torch.compile_mjcf(vecsim_torch.build_task(task, {}).source())
        of_mjcf[task] = vecsim_torch.integrator_of(model)
    assert {task for task in of_mjcf if of_mjcf[task] == "euler"} == {"HalfCheetah-v5", "Pusher-v5"}
    assert vecsim_torch.RunFlags().integrator == "mjcf"
    rows = [re.findall(r"\nTASKS = {.*?\n}", path.read_text(), re.DOTALL) for path in ROOT.glob("*.py")]
    assert sum(map(len, rows)) == 6 and "integrator=" not in str(rows)
    short = [median_run("bf16", f"{task}-v5") for task in ("Ant", "HalfCheetah")]
    assert short[1].seeds == ant.seeds
    yield "Ant scores {} after {:.0f} s ({} seeds) and HalfCheetah {} after {:.0f} s ({} seeds)".format(
        *(x for run in short for x in (run.score, run.seconds, run.seeds))
    )
    undisturbed = statistics.median(result(f"ppo/Ant-v5-seed{seed}.json")["train_seconds"] for seed in (4, 5))
    yield f"Its undisturbed seeds 4 and 5 take {10 * round(undisturbed / 10)} s"
    shares = short[1].seconds / cheetah.seconds, short[0].seconds / undisturbed
    yield "HalfCheetah trains in {:.0%} of the time, Ant in {:.0%} of its undisturbed seeds' time".format(*shares)
    yield f"Ant scores {short[0].score} with it and {ant.score} without"
    yield f"HalfCheetah {short[1].score} and {cheetah.score} (medians of {ant.seeds} seeds"
    yield f"of Ant with it of {short[0].seeds})"
    for name, plain, other in zip(("Ant", "HalfCheetah"), (ant, cheetah), short, strict=True):
        files = list((ROOT / "results/bf16").glob(f"{name}-v5-seed*.json"))
        assert len(files) == other.seeds
        scores = [json.loads(file.read_text())["gymnasium"]["mean"] for file in files]
        gap = abs(float(plain.score.replace(",", "")) - float(other.score.replace(",", "")))
        assert gap < max(scores) - min(scores)  # the seeds differ by more
    peers = []
    for name in ("ours-ppo", "sb3-ppo"):
        curves = [result(f"peers/HalfCheetah-v5/{name}-seed{seed}.json")["curve"] for seed in (1, 2, 3)]
        last = [[score for _, seconds, score in curve if seconds <= 183.6][-1] for curve in curves]
        peers.append(f"{statistics.median(last):,.0f}")
    yield f"minutes after compilation, HalfCheetah scores {peers[0]} with our PPO and {peers[1]} with SB3's"
    sac = {task: median_run("sac", f"{task}-v5") for task in ("HalfCheetah", "Ant", "Walker2d", "Humanoid")}
    runs = [result(f"sac/HalfCheetah-v5-ppo-seed{seed}.json") for seed in (1, 2, 3)]
    middle = f"{statistics.median(scores_of(runs)):,.0f} after {runs[0]['env_steps']:,}"
    yield f"SAC scores {sac['HalfCheetah'].score} on HalfCheetah after {sac['HalfCheetah'].steps:,} steps, PPO {middle}"
    assert sac["Ant"].steps == sac["Walker2d"].steps
    yield f"After {sac['Ant'].steps:,} it scores {sac['Ant'].score} on Ant and {sac['Walker2d'].score} on Walker2d"
    humanoid, of_ppo = sac["Humanoid"], median_run("ppo", "Humanoid-v5")
    assert abs(humanoid.seconds / of_ppo.seconds - 1) < 0.02
    yield (
        f"On Humanoid it scores {humanoid.score} after {humanoid.steps:,}; in as much time PPO scores {of_ppo.score}"
    )
    ours = [(run, 60 * run["minutes"]) for run in load(ROOT / "results", "peers/*/ours-*.json")]
    ages = [limit - in_time(run)[-1][1] for run, limit in ours if run["curve"][-1][1] >= limit]  # not ended before
    yield f"their last evaluation may be {max(ages):.0f} s old"
    rerun = load(ROOT / "results", "sac/HalfCheetah-v5-seed*.json")
    [steps] = {run["curve"][-1][0] for run in load(ROOT / "results", "peers/HalfCheetah-v5/ours-sac-*.json")}
    assert steps == rerun[0]["env_steps"]
    yield f"On HalfCheetah SAC had ended ({steps:,} steps)"
    found = load(ROOT / "results", "sac/candidates/HalfCheetah-v5-*.json")
    middle = {runs[0]["name"][15:]: statistics.median(scores_of(runs)) for runs in grouped(found, "name")}
    assert sorted(middle, key=middle.get)[-2:] == ["one-step-mean", "flash-blocks"]
    again = statistics.median(scores_of(rerun))
    assert again < middle["one-step-mean"]
    yield f"measured again later, the default scores less, {again:,.0f}"
    flash, default = ([run for run in found if name in run["name"]] for name in ("flash-blocks", "one-step-mean"))
    assert all(x["seconds_to_threshold"] > y["seconds_to_threshold"] for x, y in zip(flash, default, strict=True))
    yield f"On every seed the default reaches {default[0]['threshold']:,} before them"
    folder = "sac/ablation/HalfCheetah-v5"
    below, mean = (
        load(ROOT / "results", f"{folder}/{name}-seed*") for name in ("categorical-critic", "mean-of-critics")
    )
    assert all(x > y for x, y in zip(scores_of(below), scores_of(mean), strict=True))  # lowers every seed
    updates = [run["stages"]["update"]["share"] for run in load(ROOT / "results", "profile/ppo_gpu_torch-*.json")]
    assert [round(6 * x) for x in sorted(updates)] == [4, 5]  # two thirds to five sixths
    limit = eval_panel.CONTRACTS["Quadruped-Flat"].largest_tracking
    yield f"reaches the time limit with a mean velocity error of at most {limit} m/s"
    middle = {}
    for row in csv.DictReader((ROOT / "results/panel/HalfCheetah-v5/summary.csv").open()):
        ends = [float(row[f"return_change_from_none{end}"]) for end in ("_low", "_high")]
        middle[row["checkpoint"], row["perturbation"]] = f"{float(row['return']):,.0f}", ends
    names = ("none", "mujoco_c", "mjx")
    ppo, sac = ([middle[policy, name][0] for name in names] for policy in ("ppo", "sac"))
    yield f"{ppo[0]}, {ppo[1]} and {ppo[2]} for PPO and {sac[0]}, {sac[1]} and {sac[2]} for SAC"
    apart = [middle[policy, name][1] for policy in ("ppo", "sac") for name in names[1:]]
    assert all(low < 0 < high for low, high in apart)  # no difference is shown
    onnx, clipped, plain = (
        result("export/HalfCheetah-v5.json")["scores"][name] for name in ("onnx", "pytorch_clipped", "pytorch")
    )
    score = ["{mean:,.0f} ± {std:,.0f}".format(**x) for x in (onnx, clipped, plain)]
    yield f"scores {score[0]} in Gymnasium, and the PyTorch policy {score[1]} with the same clipping (100 episodes)"
    yield f"Without clipping it is {score[2]}"
    assert {onnx["episodes"], clipped["episodes"], plain["episodes"]} == {100}
    for task in ("HalfCheetah", "Hopper", "Walker2d"):
        scores = list(at_equal_time(f"{task}-v5"))
        yield "On {} DQN scores {} and PQN {}, PPO {} and SAC {}".format(task, *scores)
        dqn, pqn, ppo, sac = (int(score.replace(",", "")) for score in scores)
        assert ppo > max(dqn, pqn, sac)  # ahead on each task
        shown = dict(HalfCheetah=min(dqn, pqn) > sac, Hopper=max(dqn, pqn) < sac, Walker2d=dqn < sac)
        assert shown[task]
        if task == "Walker2d":  # level: the seeds differ by more
            of_sac = scores_of(load(ROOT / "results", "dqn/Walker2d-v5-sac-seed*.json"))
            assert abs(pqn - sac) < max(of_sac) - min(of_sac)
    middle, ends = {}, {}
    for name in ("no-layer-norm", "default", "five-bins", "512-environments"):
        runs = [result(f"dqn/ablation/HalfCheetah-v5/{name}-seed{seed}.json") for seed in (1, 2, 3)]
        lowest, median, highest = sorted(run["gymnasium"]["mean"] for run in runs)
        middle[name], ends[name] = f"{median:,.0f}", (lowest, highest)
    assert ends["five-bins"][0] > ends["default"][1] > ends["512-environments"][0]
    yield f"without it the median is {middle['no-layer-norm']}, with it {middle['default']}"
    yield f"Five bins score {middle['five-bins']}, and each of their seeds is above all of the default's"
    yield f"512 environments score {middle['512-environments']} in less time"
    kinds = "gru", "mingru", "lstm", "stack-of-4-observations", "no-memory", "everything-observed"
    runs = {kind: [result(f"memory/HalfCheetah-v5/{kind}-seed{seed}.json") for seed in (1, 2, 3)] for kind in kinds}
    of_memory = {kind: [run["gymnasium"]["mean"] for run in runs[kind]] for kind in kinds}
    gru, mingru, lstm, stack, without, everything = (f"{statistics.median(of_memory[kind]):,.0f}" for kind in kinds)
    yield f"with a GRU the policy scores {gru}, with a minGRU {mingru}, with an LSTM {lstm}, with the stack {stack}"
    yield f"without memory {without}. With velocities it scores {everything}"
    yield f"Without velocities HalfCheetah scores {gru} with a GRU, {without} without memory"
    runs = {kind: [result(f"memory/Ant-v5/{kind}-seed{seed}.json") for seed in (1, 2, 3)] for kind in kinds}
    scores = {kind: [run["gymnasium"]["mean"] for run in runs[kind]] for kind in kinds}
    gru, mingru, lstm, stack, without, everything = (f"{statistics.median(scores[kind]):,.0f}" for kind in kinds)
    yield f"without memory the policy scores {without}, with the stack {stack}, with a GRU {gru}"
    yield f"with a minGRU {mingru}, with an LSTM {lstm}. With velocities it scores {everything}"
    assert min(scores["no-memory"]) > max(x for kind in ("gru", "mingru", "lstm") for x in scores[kind])
    lowest, _, highest = sorted(scores["everything-observed"])
    yield f"its seeds differ most ({lowest:,.0f} to {highest:,.0f})"
    assert highest - lowest == max(max(found) - min(found) for found in scores.values())
    errors = {}
    for path in sorted((ROOT / "results/walk-memory/Quadruped-Flat").glob("*/panel/summary.csv")):
        with path.open() as file:
            of_vecsim = [row for row in csv.DictReader(file) if row["perturbation"] == "none"]
        errors |= {row["checkpoint"]: f"{float(row['tracking']):.3f}" for row in of_vecsim}
    yield f"without memory is off by {errors['ppo']} m/s in this simulator"
    yield f"the fine-tuned student by {errors['finetune']}"
    yield f"and the GRU by {errors['ppo_recurrent']}"
    (_, pqn, ppo, _), (_, slow_pqn, fast_ppo, _) = (
        tuple(at_equal_time(f"{x}-v5")) for x in ("Walker2d", "HalfCheetah")
    )
    yield f"PQN scores {pqn} on Walker2d and PPO {ppo}; on HalfCheetah it is {slow_pqn} and {fast_ppo}"
    assert min(of_memory["gru"]) > max(of_memory["no-memory"])
    folder = "sac/ablation/HalfCheetah-v5"
    times = [
        result(f"{folder}/all-with-flash-blocks-seed{seed}.json")["train_seconds"]
        / result(f"{folder}/held-noise-seed{seed}.json")["train_seconds"]
        for seed in (1, 2, 3)
    ]
    words = "zero one two three four five six seven eight nine".split()
    low, high = (f"{1e6 * seconds:g}" for seconds in gpu_kernels.LAUNCH)
    yield f"a launch takes {low} to {high} us and the cycles"
    yield f"More than {vecsim_torch.CHUNK:,} environments are stepped in chunks"
    [ant] = [task for task in result("gpu/predicted.json")["tasks"] if task["env_id"] == "Ant-v5"]
    launches = ant["launches"] + ant["outside"]
    assert launches <= 300 and ant["bytes"] <= 300e3
    yield f"with Euler is 300 launches and 300 KB: it makes {launches} launches and moves {ant['bytes'] / 1e3:.0f} KB"
    ant = gpu_kernels.with_runge_kutta(ant)
    yield f"it is {ant['launches'] + ant['outside']} launches and {ant['bytes'] / 1e3:,.0f} KB"
    yield f"take {words[round(min(times))]} to {words[round(max(times))]} times as long to train on a CPU"


def test_scores_in_the_headers_of_scripts_are_those_of_the_files():
    pendulum, cheetah, hopper, ant = (
        median_run("ppo", f"{task}-v5") for task in ("InvertedPendulum", "HalfCheetah", "Hopper", "Ant")
    )
    assert {pendulum.seeds, cheetah.seeds, hopper.seeds, ant.seeds} == {pendulum.seeds}
    expected = {
        "ppo_gpu_torch.py": f"Scores on one AMD EPYC core, medians of {pendulum.seeds} seeds in Gymnasium's own "
        f"environments: InvertedPendulum-v5 {pendulum.score} after {pendulum.seconds:.0f} s, "
        f"HalfCheetah-v5 {cheetah.score} after {cheetah.seconds / 60:.0f} minutes, "
        f"Hopper-v5 {hopper.score} after {hopper.seconds / 60:.0f}, Ant-v5 {ant.score} after {ant.seconds / 60:.0f}. "
    }
    tasks = "Ant", "Walker2d", "HalfCheetah", "Hopper", "Humanoid"
    ant, walker, cheetah, hopper, humanoid = (median_run("sac", f"{task}-v5") for task in tasks)
    runs = [result(f"sac/InvertedPendulum-v5-seed{seed}.json") for seed in (1, 2, 3)]
    pendulum = sorted(round(run["steps_to_threshold"] / 1000) for run in runs)
    expected["sac_gpu_torch.py"] = (
        f"medians of {ant.seeds} or {cheetah.seeds} seeds in Gymnasium's own environments: Ant-v5 {ant.score} and "
        f"Walker2d-v5 {walker.score} after {ant.steps / 1000:.0f} thousand environment steps, HalfCheetah-v5 "
        f"{cheetah.score} after {cheetah.steps / 1000:.0f} thousand, Hopper-v5 {hopper.score} after "
        f"{hopper.steps / 1000:.0f} thousand, Humanoid-v5 {humanoid.score} after {humanoid.steps / 1e6:.1f} million, "
        f"InvertedPendulum-v5 1,000 after {pendulum[0]} to {pendulum[-1]} thousand."
    )
    dqn, pqn = zip(*(list(at_equal_time(f"{task}-v5"))[:2] for task in ("HalfCheetah", "Hopper", "Walker2d")))
    expected["dqn_gpu_torch.py"] = (
        f"HalfCheetah-v5 {dqn[0]} with DQN and {pqn[0]} with PQN; Hopper-v5 {dqn[1]} and {pqn[1]}; "
        f"Walker2d-v5 {dqn[2]} and {pqn[2]}. "
    )
    for name, text in expected.items():
        assert text in " ".join((ROOT / name).read_text().split()), (name, text)


# What is defined, or a version: no measurement.
DEFINITIONS = {"0.25", "95%", "3.11", "2.9", "2.13", "2.15", "1.5", "2.5", "120 ms"}
DEFINITIONS |= {"1,024", "2,048", "4,096", "8,192", "65,536", "0.3", "0.5", "2%", "30%"}


def prose(text):
    """Without tables, code and links, on one line."""
    text = "\n".join(line for line in text.splitlines() if not line.startswith("|"))
    return " ".join(re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", text, flags=re.DOTALL).split())


def test_every_figure_in_prose_comes_from_a_file():
    texts = [value for name, value in vars(report).items() if name.isupper() and isinstance(value, str)]
    text = prose("\n".join([README, *texts]))
    for claim in claims():
        assert claim in text, claim
        text = text.replace(claim, "")
    pattern = r"\d{1,3}(?:,\d{3})+|\d+\.\d+(?!\w)|\d+%|\d+ (?:s|ms|seconds|minutes|MiB|GiB)\b"
    figures = set(re.findall(pattern, text))
    assert figures <= DEFINITIONS, figures - DEFINITIONS


def test_every_result_says_how_it_was_made():
    """Command, commit (for a panel the simulator's hash) and hardware; the parity table needs no hardware."""
    for path in sorted((ROOT / "results").glob("**/*.json")):
        record = json.loads(path.read_text())
        rows = record["rows"] if isinstance(record.get("rows"), list) else []
        needed = (
            ["command", "versions"]
            if path.name == "parity.json"
            else ["command", "hardware", "simulator" if "panel" in path.parts else "commit"]
        )
        missing = [name for name in needed if name not in record and not (rows and all(name in row for row in rows))]
        assert not missing, (path, missing)
        assert not re.search(r"/(?:tmp|root|home)/", path.read_text()), path  # of no other machine


def test_every_file_and_picture_that_it_names_is_there():
    named = set(re.findall(r"\]\((?!http)([^)]+)\)", README)) | set(
        re.findall(r"^\| `([^-`][^`]*)` \|", README, re.MULTILINE)
    )
    assert {"vecsim_torch.py", "results/curves.png"} <= named
    metrics = set(re.findall(r"^\| `(\w+)`", README, re.MULTILINE))
    assert [name for name in named - metrics if not (ROOT / name).exists()] == []


def test_every_flag_that_it_names_is_one():
    """In a command, of the script that it starts; elsewhere, of any of them."""
    sources = {path.name: path.read_text() for path in [*ROOT.glob("*.py"), ROOT / "tests/conftest.py"]}
    sources["benchmark.sh"] = (ROOT / "benchmarks/__main__.py").read_text()
    shared = inspect.getsource(vecsim_torch.RunFlags)
    sources |= {name: source + shared for name, source in sources.items() if "(vecsim.RunFlags)" in source}

    def is_flag(flag, source):
        field = flag.removeprefix("no-").replace("-", "_")
        return re.search(rf"^    {field}: |[\"' |]--{flag}\b", source, re.MULTILINE)

    flags = set(re.findall(r"(?<=[ `])--([a-z][a-z0-9-]+)", README)) - {
        "nproc-per-node",
        "index-url",
    }  # of torchrun and pip
    assert len(flags) > 8 and [flag for flag in flags if not is_flag(flag, "".join(sources.values()))] == []
    code = "\n".join(block or words for block, words in re.findall(r"```bash\n(.*?)```|`([^`\n]*)`", README, re.DOTALL))
    commands = re.findall(r"(\w+\.(?:py|sh)) ?([^\n#]*)", code)
    checked = [
        (script, flag)
        for script, words in commands
        if script in sources
        for flag in re.findall(r"--([a-z][a-z0-9-]+)", words)
    ]
    assert len(checked) > 10
    assert [pair for pair in checked if not is_flag(pair[1], sources[pair[0]])] == []


def test_the_simulator_shows_the_same_task():
    """tests/test_vecsim_env.py runs the one of README."""
    [example] = [code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "class SwingUp" in code]
    assert textwrap.indent(example, "    ") in vecsim_torch.__doc__
