"""README says what the result files say: each row of its tables is one that `./benchmark.sh table` prints from results/."""

import os
import re
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
    """Header and rows of each markdown table."""
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        header, _, *rows = block.splitlines()
        yield header, rows


def test_every_row_of_a_table_of_figures_comes_from_a_file(printed):
    headers = {header for header, _ in tables(printed)}
    rows = [row for header, rows in tables(README) if header in headers for row in rows]
    assert len(rows) > 20
    made = set(printed.splitlines())
    assert [row for row in rows if row not in made] == []
    of_words = {header for header, _ in tables(README) if header not in headers}
    assert of_words == {"| file | what it is | needs beside it |", "| name | meaning |"}  # the rest is figures


def test_every_figure_in_prose_comes_from_a_file(printed):
    prose = "\n".join(line for line in README.splitlines() if not line.startswith("|"))
    prose = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", prose, flags=re.DOTALL)
    figures = set(re.findall(r"\d{1,3}(?:,\d{3})+|\d+\.\d+(?= times)", prose))
    known = set(re.findall(r"[\d,]*\d(?:\.\d+)?", printed)) | {"65,536"}  # samples of a batch, which the table gives as its factors
    assert figures and figures <= known, figures - known


def test_every_file_and_picture_that_it_names_is_there():
    named = set(re.findall(r"\]\((?!http)([^)]+)\)", README)) | set(re.findall(r"^\| `([^`]+)` \|", README, re.MULTILINE))
    assert {"vecsim_torch.py", "results/curves.png"} <= named
    metrics = set(re.findall(r"^\| `(\w+)`", README, re.MULTILINE))
    assert [name for name in named - metrics if not (ROOT / name).exists()] == []


def test_every_flag_that_it_names_is_one(printed):
    flags = set(re.findall(r"(?<=[ `])--([a-z][a-z0-9-]+)", README)) - {"nproc-per-node"}
    sources = "".join((ROOT / name).read_text() for name in os.listdir(ROOT) if name.endswith((".py", ".sh")))
    sources += (ROOT / "tests/conftest.py").read_text()
    unknown = [flag for flag in flags if not re.search(rf"\b{flag.removeprefix('no-').replace('-', '[-_]')}\b", sources)]
    assert len(flags) > 8 and unknown == []
