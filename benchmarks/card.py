"""What the predictions in gpu_kernels.py assume of a card: time of a launch, speed of its memory. Writes JSON.

python -m benchmarks.card cuda card.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

import vecsim_torch
from benchmarks import machine

SMALL, LARGE = 4096, 2**26  # numbers in a tensor: as many as robots; 256 MiB, more than a cache holds
LAUNCHES = 500


def seconds(function) -> float:
    return Timer("function()", globals={"function": function}).blocked_autorange(min_run_time=0.5).median


@torch.no_grad()
def measure(device: torch.device) -> dict:
    """Seconds of a launch by itself and within a CUDA graph; bytes per second that a large copy reads and writes."""
    small, large = torch.zeros(SMALL, device=device), torch.zeros(LARGE, device=device)
    copy = torch.empty_like(large)

    def launches() -> None:
        for _ in range(LAUNCHES):
            small.add_(1.0)

    on_gpu = vecsim_torch.on_gpu(device)
    versions = vecsim_torch.versions() | dict(cuda=torch.version.cuda)
    found = dict(hardware=machine.hardware(device.type), versions=versions)
    found |= dict(launch_seconds=seconds(launches) / LAUNCHES, graph_launch_seconds=None)
    if on_gpu:
        found["graph_launch_seconds"] = seconds(vecsim_torch.capture(launches, ())) / LAUNCHES
        card = torch.cuda.get_device_properties(device)
        found |= dict(memory=card.total_memory, multiprocessors=card.multi_processor_count, cache=card.L2_cache_size)
    return found | dict(bytes_per_second=2 * 4 * LARGE / seconds(lambda: copy.copy_(large)))


if __name__ == "__main__":
    _, device, path = sys.argv
    Path(path).write_text(json.dumps(measure(vecsim_torch.pick_device(device)), indent=1))
