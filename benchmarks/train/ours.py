"""ppo_gpu_torch.train with the task's defaults, its log included.

Its environment counts the steps and calls the meter where an iteration begins. The variant is the number of processes
and, if other than the default, the hidden layers of both networks. This process, rank 0, starts the others as torchrun
would; while it waits for its turn, they wait for its gradients."""

import os
import socket
import subprocess
import sys
import tempfile

import torch

from benchmarks.meter import count_steps, device, settings, threads, variant

count, *hidden = variant.split(",")
processes = int(count)
rank = int(os.environ.get("RANK", 0))
torch.set_num_threads(max(1, threads // processes))
if processes > 1 and "RANK" not in os.environ:
    with socket.create_server(("localhost", 0)) as free:
        os.environ |= dict(MASTER_ADDR="localhost", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE=str(processes))
    os.environ |= dict(RANK="0", LOCAL_RANK="0")
    for other in range(1, processes):
        environment = os.environ | dict(RANK=str(other), LOCAL_RANK=str(other))
        silent = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        subprocess.Popen([sys.executable, "-m", "benchmarks.train.ours"], env=environment, **silent)

import ppo_gpu_torch as ppo
import vecsim_torch

flags = ["--env-id", settings["env_id"], "--integrator", settings["integrator"], "--device", device]
flags += ["--total-timesteps", str(10**12), "--log-every", "150000", "--eval-episodes", "0"]
flags += ["--run-dir", tempfile.mkdtemp(dir=".")]
if hidden:
    flags += ["--actor-hidden", *hidden, "--critic-hidden", *hidden]
if rank == 0:
    make, sizes = vecsim_torch.make, settings["ours"]
    work = sizes["num_steps"] * sizes["num_envs"]
    vecsim_torch.make = lambda *words, **options: count_steps(make(*words, **options), sizes["num_steps"], work)
ppo.train(ppo.parse_args(flags))
