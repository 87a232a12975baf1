"""README says what the result files say: each row of its tables is one of results/README.md."""

import csv
import json
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def printed():
    """Every table: tests/test_benchmark.py checks that this page is what the files say."""
    return (ROOT / "results/README.md").read_text()


def tables(text):
    """Title (the line above), header and rows of each markdown table."""
    for title, block in re.findall(r"(?:^([^|\n].*)\n)?\n*((?:^\|.*\n)+)", text, re.MULTILINE):
        header, _, *rows = block.splitlines()
        yield title, header, rows


def test_every_row_of_a_table_of_figures_comes_from_a_file(printed):
    made = {}
    for title, header, rows in tables(printed):
        made.setdefault(header, []).append((title, set(rows)))
    figures = [table for table in tables(README) if table[1] in made]
    assert sum(len(rows) for _, _, rows in figures) > 20
    for title, header, rows in figures:
        task = re.fullmatch(r"(\w+-v\d):", title)  # a table of one task stands under its name
        assert any(set(rows) <= known and (not task or task[1] in made_title) for made_title, known in made[header]), (title, rows)
    of_words = {header for _, header, _ in tables(README) if header not in made}
    assert of_words == {"| file | what it is | needs beside it |", "| name | meaning |"}  # the rest is figures


def result(name):
    return json.loads((ROOT / "results" / name).read_text())


def speeds(name):
    """Median speed of each contender of a comparison."""
    return {row["contender"]: round(row["median"]) for row in result(name)["rows"]}


def noise_floor():
    """The teacher's rows nominal and observation noise of the distillation's evidence are the same experiment."""
    rows = csv.DictReader((ROOT / "results/distill/Quadruped-Rough/evidence.csv").open())
    rows = [row for row in rows if row["policy"] == "teacher" and row["perturbation"] in ("nominal", "observation_noise")]
    of_seed = {(row["perturbation"], row["seed"]): row for row in rows}
    apart = [
        [float(of_seed["observation_noise", seed][name]) - float(of_seed["nominal", seed][name]) for name in ("tracking", "falls")]
        for seed in sorted({row["seed"] for row in rows})
    ]
    tracking, falls = zip(*apart)
    yield f"about {abs(statistics.fmean(tracking)):.2f} in score and {100 * abs(statistics.fmean(falls)):.0f} points of falls"
    yield f"as much as {max(map(abs, tracking)):.2f} and {100 * max(map(abs, falls)):.0f} points"


def claims():
    """What README's prose says of measurements, made from the result files; each must stand there as it is here."""
    walk = result("quadruped/Quadruped-Flat.json")
    yield f"{walk['env_steps']:,} environment steps in {walk['train_seconds']:.0f} s on one core"
    summary = result("distill/Quadruped-Rough/evidence.json")["summary"]
    yield f"keeps {summary['student']['nominal']['tracking_of_teacher']:.0%} of its teacher's tracking score"
    def beyond(policy, name, other, metric="tracking", sign=1, scale=1.0):
        """A difference paired by seed, with its interval; a negative sign turns it round."""
        of = summary[policy][name][f"{metric}_beyond"][other]
        ends = sorted(sign * scale * of[end] for end in ("low", "high"))
        return sign * scale * of["mean"], *ends

    def signed(policy, name, other):
        return "{:+.3f} [{:.3f}, {:.3f}]".format(*beyond(policy, name, other))

    yield "{:.3f} less [{:.3f}, {:.3f}]".format(*beyond("student", "nominal", "teacher", sign=-1))
    yield "by {:.3f} [{:.3f}, {:.3f}]".format(*beyond("finetune", "nominal", "teacher"))
    over = {name: signed("finetune", name, "baseline") for name in summary["finetune"]}
    yield f"the nominal setting ({over['nominal']}) and strong gravity ({over['strong_gravity']})"
    yield f"low friction ({over['low_friction']}), pushes ({over['pushes']})"
    shown = {name for name in over if beyond("finetune", name, "baseline")[1] > 0 and name != "action_delay"}  # all fall
    assert shown == {"nominal", "strong_gravity"}
    assert all(beyond("finetune", name, "teacher")[1] > 0 for name in over if name != "action_delay")
    falls = {name: beyond("finetune", name, "baseline", "falls", scale=100) for name in over}
    more = [mean for name, (mean, *_) in falls.items() if name not in ("pushes", "action_delay")]
    yield f"by {min(more):.0f} to {max(more):.0f} points"
    assert falls["pushes"][1] < 0 < falls["pushes"][2]
    yield f"(nominal: {signed('student', 'nominal', 'baseline')})"
    yield f"(nominal: {signed('teacher', 'nominal', 'baseline')})"
    yield "(by {:.0f} points [{:.0f}, {:.0f}])".format(*beyond("teacher", "heavy", "student", "falls", scale=100))
    yield from noise_floor()
    speed = {name: speeds(f"benchmark/train-{name}.json") for name in ("Ant-v5-euler-cpu1", "Ant-v5-rk4-cpu1", "HalfCheetah-v5-euler-cpu1")}
    for rows in speed.values():
        others = [rows[name] for name in rows if name.startswith(("SB3", "CleanRL", "skrl", "rsl_rl", "rl_games")) and "vecsim" not in name]
        assert len(others) >= 4 and rows["rsl_rl"] == max(others)
    euler, rk4, cheetah = speed.values()
    yield f"Ant with Euler {euler['ours']:,} and {euler['rsl_rl']:,}, Ant with RK4 {rk4['ours']:,} and {rk4['rsl_rl']:,}"
    yield f"HalfCheetah {cheetah['ours']:,} and {cheetah['rsl_rl']:,} (all on one core)"
    yield f"Ant {euler['ours']:,} and {euler['rsl_rl on vecsim']:,}"
    yield f"5 of its {result('ppo/Humanoid-v5-seed1.json')['gymnasium']['mean'] / 1000:.1f} a step"
    teacher, student = (x["env_steps"] / 1e6 for x in result("panel/Quadruped-Flat/record.json")["checkpoints"])
    yield f"A teacher of {teacher:.1f} million steps and its student of {student:.1f} million"
    middle = {}
    for row in csv.DictReader((ROOT / "results/panel/HalfCheetah-v5/summary.csv").open()):
        ends = [float(row[f"return_change_from_none{end}"]) for end in ("_low", "_high")]
        middle[row["checkpoint"], row["perturbation"]] = f"{float(row['return']):,.0f}", ends
    names = ("none", "mujoco_c", "mjx")
    ppo, sac = ([middle[policy, name][0] for name in names] for policy in ("ppo", "sac"))
    yield f"{ppo[0]}, {ppo[1]} and {ppo[2]} for PPO and {sac[0]}, {sac[1]} and {sac[2]} for SAC"
    apart = [middle[policy, name][1] for policy in ("ppo", "sac") for name in names[1:]]
    assert all(low < 0 < high for low, high in apart)  # no difference is shown
    onnx, clipped, plain = (result("export/HalfCheetah-v5.json")["scores"][name] for name in ("onnx", "pytorch_clipped", "pytorch"))
    score = ["{mean:,.0f} ± {std:,.0f}".format(**x) for x in (onnx, clipped, plain)]
    yield f"{score[0]} as ONNX and {score[1]} in PyTorch with the same clipping (100 episodes; {score[2]} without it"
    assert {onnx["episodes"], clipped["episodes"], plain["episodes"]} == {100}
    folder = "sac/ablation/HalfCheetah-v5"
    times = [
        result(f"{folder}/all-with-flash-blocks-seed{seed}.json")["train_seconds"]
        / result(f"{folder}/held-noise-seed{seed}.json")["train_seconds"]
        for seed in (1, 2, 3)
    ]
    words = "zero one two three four five six seven eight nine".split()
    yield f"take {words[round(min(times))]} to {words[round(max(times))]} times as long to train"


# What is defined or aimed at, or a version: no measurement.
DEFINITIONS = {"65,536", "0.25", "80%", "95%", "30%", "10%", "3.11", "2.13", "3.17", "4.0", "20 s", "120 ms"}


def test_every_figure_in_prose_comes_from_a_file():
    prose = "\n".join(line for line in README.splitlines() if not line.startswith("|"))
    prose = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", prose, flags=re.DOTALL)
    prose = " ".join(prose.split())
    for claim in claims():
        assert claim in prose
        prose = prose.replace(claim, "")
    figures = set(re.findall(r"\d{1,3}(?:,\d{3})+|\d+\.\d+(?!\w)|\d+%|\d+ (?:s|ms|seconds|minutes|MiB|GiB)\b", prose))
    assert figures <= DEFINITIONS, figures - DEFINITIONS


def test_every_result_says_how_it_was_made():
    """Command and commit (of a panel, the simulator's hash), and the hardware for all but the errors of the parity table."""
    for path in sorted((ROOT / "results").glob("**/*.json")):
        record = json.loads(path.read_text())
        rows = record["rows"] if isinstance(record.get("rows"), list) else []
        needed = ["command", "versions"] if path.name == "parity.json" else ["command", "hardware", "simulator" if "panel" in path.parts else "commit"]
        missing = [name for name in needed if name not in record and not (rows and all(name in row for row in rows))]
        assert not missing, (path, missing)
        assert not re.search(r"/(?:tmp|root|home)/", path.read_text()), path  # of no other machine


def test_every_file_and_picture_that_it_names_is_there():
    named = set(re.findall(r"\]\((?!http)([^)]+)\)", README)) | set(re.findall(r"^\| `([^-`][^`]*)` \|", README, re.MULTILINE))
    assert {"vecsim_torch.py", "results/curves.png"} <= named
    metrics = set(re.findall(r"^\| `(\w+)`", README, re.MULTILINE))
    assert [name for name in named - metrics if not (ROOT / name).exists()] == []


def test_every_flag_that_it_names_is_one(printed):
    """In a command, of the script that it starts; elsewhere, of any of them."""
    sources = {path.name: path.read_text() for path in [*ROOT.glob("*.py"), ROOT / "tests/conftest.py"]}
    sources["benchmark.sh"] = (ROOT / "benchmarks/__main__.py").read_text()

    def is_flag(flag, source):
        field = flag.removeprefix("no-").replace("-", "_")
        return re.search(rf"^    {field}: |[\"' |]--{flag}\b", source, re.MULTILINE)

    flags = set(re.findall(r"(?<=[ `])--([a-z][a-z0-9-]+)", README)) - {"nproc-per-node", "index-url"}  # of torchrun and pip
    assert len(flags) > 8 and [flag for flag in flags if not is_flag(flag, "".join(sources.values()))] == []
    code = "\n".join(block or words for block, words in re.findall(r"```bash\n(.*?)```|`([^`\n]*)`", README, re.DOTALL))
    commands = re.findall(r"(\w+\.(?:py|sh)) ?([^\n#]*)", code)
    checked = [(script, flag) for script, words in commands if script in sources for flag in re.findall(r"--([a-z][a-z0-9-]+)", words)]
    assert len(checked) > 10
    assert [pair for pair in checked if not is_flag(pair[1], sources[pair[0]])] == []
