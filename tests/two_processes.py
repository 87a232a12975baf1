"""test_ppo.py runs this in two processes: torchrun --nproc-per-node=2 two_processes.py FOLDER"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from pathlib import Path

import gymnasium
import numpy as np
import torch
from probe_envs import ProbeEnv, probe_args

import ppo_gpu_torch as ppo
import vecsim_torch as vecsim


def updates_on_fixed_data(rank: int, world_size: int) -> dict:
    """3 iterations of 6 gradient steps. Their random data do not depend on how many processes share them."""
    args = probe_args(None, num_envs=32, num_minibatches=1, update_epochs=6)
    sizes = ppo.derive_sizes(args, world_size, torch.device("cpu"))._replace(microbatch=50)
    torch.manual_seed(0)
    agent = ppo.Agent(3, None, gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32), args)
    learning_rate = torch.tensor(args.learning_rate)
    optimizer = vecsim.make_optimizer(agent, learning_rate)
    mine = slice(rank * sizes.envs, (rank + 1) * sizes.envs)
    for _ in range(3):
        shapes = (3,), (3,), (2,), (), (), (), ()
        obs, final_obs, action, reward, *flags = (torch.randn(8, 32, *shape)[:, mine] for shape in shapes)
        obs, final_obs, flags = 3 * obs + 1, 3 * final_obs + 1, [flag > 1.3 for flag in flags]
        mean = agent.policy_mean(agent.obs_statistics.normalize(obs.flatten(0, 1))).detach().view_as(action)
        rollout = ppo.Rollout(obs, obs, final_obs, action, mean, reward, *flags)
        _, estimate, accumulate, take_step = ppo.build_functions(agent, optimizer, rollout, sizes, args)
        value, advantage = estimate()
        batch = ppo.make_batch(agent, rollout, value, advantage, True, torch.arange(sizes.batch))
        terms = ppo.update(agent, batch, accumulate, take_step, learning_rate, 0.01, sizes.minibatch, args)
        agent.obs_statistics.update(obs.flatten(0, 1), ~rollout.invalid.flatten())
    statistics = dict(
        episode_return=float(rank), episode_length=2.0, success=float("nan"), episodes=1 + rank, invalid=1
    )
    episodes = vecsim.merge_episode_statistics(statistics, learning_rate.device)
    return dict(agent=dict(agent.state_dict()), learning_rate=learning_rate, terms=terms, episodes=episodes)


class Stopped(ProbeEnv):
    """The second process gets SIGTERM in its third iteration."""

    steps_taken = 0

    def step(self, action):
        self.steps_taken += 1
        if self.steps_taken == 1 + 2 * 8 + 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return super().step(action)


def stop_and_resume(folder: Path) -> None:
    args = probe_args(folder / "stopped", total_timesteps=20_480, log_every=2_560)
    stop = vecsim.StopSignals()
    stop.install()
    try:
        ppo.train(args, Stopped, stop=stop)
    except KeyboardInterrupt:
        assert stop.number == signal.SIGTERM
    torch.distributed.barrier()  # the checkpoint is written
    checkpoint = folder / "stopped" / "checkpoint.pt"
    if os.environ["RANK"] == "0":
        steps = torch.load(checkpoint, weights_only=True)["env_steps"]
        (folder / "stopped.txt").write_text(str(steps))
    ppo.train(dataclasses.replace(args, resume=str(checkpoint)), ProbeEnv)


def main(folder: Path) -> None:
    rank, world_size = vecsim.start_processes(torch.device("cpu"))
    torch.save(updates_on_fixed_data(rank, world_size), folder / f"update-{rank}.pt")
    runs = ("whole", 20_480, None), ("parts", 10_240, None), ("parts", 20_480, "parts/checkpoint.pt")
    for name, steps, resume in runs:
        args = probe_args(folder / name, total_timesteps=steps, log_every=2_560)
        ppo.train(dataclasses.replace(args, resume=resume and str(folder / resume)), ProbeEnv)
        torch.distributed.barrier()  # the checkpoint is written
    stop_and_resume(folder)
    with vecsim.first_process_first():
        time.sleep(0.2 if rank == 0 else 0.0)
        torch.save(time.monotonic(), folder / f"compiled-{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    assert os.environ["WORLD_SIZE"] == "2"
    main(Path(sys.argv[1]))
