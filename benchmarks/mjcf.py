"""Which MJCF files of other packages the simulator accepts, why it refuses the others, and how exact it is.

Every file below the folders is compiled by MuJoCo. Files that do not compile alone, or that have no joints, are parts
of models and are left out. The states of an accepted model come from MuJoCo C under random actions. The error is that
of qacc in float64: the largest over the degrees of freedom, divided by 1 + the largest acceleration.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections import Counter
from pathlib import Path

import mujoco
import numpy as np
import torch

import vecsim_torch as vecsim
from benchmarks import machine
from benchmarks.referee import save
from benchmarks.simulator import converged

STATES, STRIDE, ITERATIONS = 24, 5, 24  # of each model; physics steps from one to the next; of Newton's method


def rule_of(message: str) -> str:
    """The rule behind a refusal, without the names of this model's geoms."""
    pair = re.search(r"collision of geom .*\((\w+)\) with .*\((\w+)\);", message)
    if pair:
        return f"collision of {pair[1]} with {pair[2]}"
    return re.split(r" of the contact of geom |; ", message.removeprefix("unsupported model feature: "))[0]


def worst_error(m: mujoco.MjModel) -> float:
    """The worst relative error of qacc over states that MuJoCo C visits under random actions."""
    m, rng, rows, pairs = converged(m), np.random.default_rng(0), [], 0
    data, probe = mujoco.MjData(m), mujoco.MjData(m)
    low, high = np.where(m.actuator_ctrllimited[:, None], m.actuator_ctrlrange, [-1, 1]).T
    data.qvel[:] = 0.5 * rng.normal(size=m.nv)
    for t in range(STATES * STRIDE):
        data.ctrl[:] = rng.uniform(low, high)
        if t % STRIDE == 0:
            probe.qpos[:], probe.qvel[:], probe.ctrl[:] = data.qpos, data.qvel, data.ctrl
            mujoco.mj_forward(m, probe)
            moves = m.body_weldid[m.geom_bodyid[probe.contact.geom]] > 0
            pairs = max(pairs, int(moves.all(1).sum()))
            rows.append([x.copy() for x in (probe.qpos, probe.qvel, probe.ctrl, probe.qacc)])
        mujoco.mj_step(m, data)
    qpos, qvel, ctrl, qacc = (torch.tensor(np.array(x).T) for x in zip(*rows, strict=True))
    model = vecsim.load_model(m, dtype=torch.float64, pair_slots=min(pairs + 1, 16))
    state = vecsim.State(qpos, qvel, torch.zeros_like(qvel))
    ours = vecsim.forward(model, state, ctrl, ITERATIONS).solution.qacc
    return float(((ours - qacc).abs().amax(0) / (1 + qacc.abs().amax(0))).max())


def examine(path: Path) -> dict | None:
    """The rule that refuses this file, or its error; None for a part of a model."""
    try:
        m = vecsim.compile_mjcf(path)
    except ValueError:
        return None
    if not m.njnt:
        return None
    try:
        vecsim.load_model(m, dtype=torch.float64)
    except vecsim.InputError as error:
        return dict(refused=rule_of(str(error)))
    return dict(error=worst_error(m))


def measure(options: Namespace) -> None:
    rows = []
    for root in options.folders:
        for path in sorted(root.rglob("*.xml")):
            if found := examine(path):
                rows.append(dict(package=root.name, file=path.relative_to(root).as_posix()) | found)
                print(*rows[-1].values(), flush=True)
    print(len(rows), "files", Counter(row.get("refused", "accepted") for row in rows).most_common())
    about = dict(command=options.command, hardware=machine.hardware("cpu"), commit=machine.commit())
    save(options.results / "mjcf.json", about | dict(versions=vecsim.versions(), rows=rows))
