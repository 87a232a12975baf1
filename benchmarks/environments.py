"""One virtual environment for each peer, built when it is first needed.

PACKAGES lists what a peer needs. The first package names the environment. `jax` becomes `jax[cuda12]` on a GPU. A
contender that is not there runs in this project's own environment.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onefile-gpu-rl-bench"
LEARNER = ["torch==2.13.0", "gymnasium[mujoco]==1.4.0", "mujoco==4.0.0"]
PACKAGES = {  # by the names of files without their endings, whichever their folder
    "brax": ["brax==0.14.2", "mujoco==4.0.0", "jax"],
    "mjx": ["mujoco-mjx==3.17.0", "mujoco==4.0.0", "jax"],
    "mujoco_torch": ["mujoco-torch==0.2.0", "torch==2.13.0", "mujoco==3.6.0"],
    "mujoco_warp": ["mujoco-warp==4.0.0", "mujoco==4.0.0"],
    "rl_games": ["rl-games==1.6.5", *LEARNER],
    "rsl_rl": ["rsl-rl-lib==5.5.1", *LEARNER],
    "sac_skrl": ["skrl==2.1.1", *LEARNER],
    "sb3": ["stable-baselines3==2.9.2", *LEARNER],
    "sb3_zoo": ["stable-baselines3==2.9.2", *LEARNER],
    "skrl": ["skrl==2.1.1", *LEARNER],
}


def dependencies(source: Path, device: str) -> list[str]:
    """The packages that a contender's file needs; none: this project's environment has them."""
    packages = PACKAGES.get(source.stem, [])
    return ["jax[cuda12]" if name == "jax" and device == "cuda" else name for name in packages]


def folder_of(packages: list[str]) -> Path:
    return CACHE / re.match(r"[\w.-]+", packages[0])[0]


def is_built(packages: list[str]) -> bool:
    """Whether the environment is there and was built from this very list; the list is written when all is installed."""
    done = folder_of(packages) / "dependencies.txt"
    return done.exists() and done.read_text().split("\n") == packages


def interpreter(source: Path, device: str) -> str:
    """The Python that runs this contender; builds its environment first. RuntimeError with the reason in one line."""
    packages = dependencies(source, device)
    if not packages:
        return sys.executable
    folder = folder_of(packages)
    python, log = folder / "bin" / "python", folder.with_suffix(".log")
    if not is_built(packages):
        print(f"installing {' '.join(packages)}", file=sys.stderr)
        CACHE.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
        for command in ([sys.executable, "-m", "venv", folder], install):
            with log.open("w") as out:
                status = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT).returncode
            if status:
                raise RuntimeError(f"does not install: {last_error(log)}")
        (folder / "dependencies.txt").write_text("\n".join(packages))
    return str(python)


def last_error(log: Path) -> str:
    """The last error of pip's log; a full disk may keep even the log empty, so say how much space is left."""
    errors = [x for x in log.read_text(errors="replace").splitlines() if re.search("error|no space", x, re.IGNORECASE)]
    free = shutil.disk_usage(CACHE).free / 2**30
    return f"{errors[-1][:160] if errors else f'no message; {free:.1f} GiB free on the disk'} (log: {log})"
