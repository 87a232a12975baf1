"""README says what the result files say: each row of its tables is one that `./benchmark.sh table` prints from results/."""

import csv
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def printed():
    answer = subprocess.run(
        [ROOT / "benchmark.sh", "table"], capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable}
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


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


def claims():
    """What README's prose says of measurements, made from the result files; each must stand there as it is here."""
    walk = result("quadruped/Quadruped-Flat.json")
    yield f"{walk['env_steps']:,} environment steps in {walk['train_seconds']:.0f} s on one core"
    summary = result("distill/Quadruped-Rough/evidence.json")["summary"]
    yield f"keeps {summary['student']['nominal']['tracking_of_teacher']:.0%} of its teacher's tracking score"
    score = {(policy, name): f"{row['tracking']:.2f}" for policy, rows in summary.items() for name, row in rows.items()}
    friction, pushes = ([score[policy, name] for policy in ("finetune", "baseline", "student")] for name in ("low_friction", "pushes"))
    yield f"under low friction ({friction[0]} against {friction[1]}) and pushes ({pushes[0]} against {pushes[1]})"
    yield f"does not beat it ({friction[2]} and {pushes[2]})"
    yield f"5 of its {result('ppo/Humanoid-v5-seed1.json')['gymnasium']['mean'] / 1000:.1f} a step"
    teacher, student = (x["env_steps"] / 1e6 for x in result("panel/Quadruped-Flat/record.json")["checkpoints"])
    yield f"A teacher of {teacher:.1f} million steps and its student of {student:.1f} million"
    returns = {}
    for row in csv.DictReader((ROOT / "results/panel/HalfCheetah-v5/episodes.csv").open()):
        returns.setdefault((row["checkpoint"], row["perturbation"]), []).append(float(row["return"]))
    ppo, sac = ([f"{statistics.median(returns[name, x]):,.0f}" for x in ("none", "mujoco_c", "mjx")] for name in ("ppo", "sac"))
    yield f"{ppo[0]}, {ppo[1]} and {ppo[2]} for PPO and {sac[0]}, {sac[1]} and {sac[2]} for SAC"
    lowest = sorted(returns["ppo", "none"])
    assert lowest[1] > 8000 and min(returns["ppo", "mujoco_c"] + returns["ppo", "mjx"]) > 7900
    yield f"One of PPO's {len(lowest)} episodes falls in vecsim alone, with a return of {lowest[0]:,.0f}"
    folder = "sac/ablation/HalfCheetah-v5"
    times = [
        result(f"{folder}/all-with-flash-blocks-seed{seed}.json")["train_seconds"]
        / result(f"{folder}/held-noise-seed{seed}.json")["train_seconds"]
        for seed in (1, 2, 3)
    ]
    words = "zero one two three four five six seven eight nine".split()
    yield f"take {words[round(min(times))]} to {words[round(max(times))]} times as long to train"


# What is defined or aimed at, or a version: no measurement.
DEFINITIONS = {"65,536", "0.25", "80%", "95%", "30%", "10%", "3.11", "2.13", "3.17", "20 s", "120 ms"}


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
    sources = {path.name: path.read_text() for path in [*ROOT.glob("*.py"), ROOT / "benchmark.sh", ROOT / "tests/conftest.py"]}

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
