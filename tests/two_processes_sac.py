"""test_sac.py runs this in two processes: torchrun --nproc-per-node=2 two_processes_sac.py FOLDER"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import gymnasium
import numpy as np
import torch
from probe_envs import ProbeEnv

import sac_gpu_torch as sac
import vecsim_torch as vecsim


def probe_args(run_dir, env_id="action", preset="best", **changes):
    """Flags of SAC that solve a probe environment in seconds."""
    small = dict(num_envs=64, total_timesteps=20_000, learning_starts=640, replay_capacity=10_000, batch_size=128)
    small |= dict(updates_per_step=2, actor_hidden=(32,), critic_hidden=(32,), noise_repeat_max=1, gamma=0.9)
    small |= dict(learning_rate=3e-3, learning_rate_final=3e-3, eval_episodes=1, compile=False, device="cpu")
    small |= dict(tau=0.05, checkpoint_every=10**9, log_every=10**9, run_dir=run_dir and str(run_dir))
    return dataclasses.replace(sac.task_defaults(env_id, preset), **(small | changes))


def updates_on_fixed_data(rank: int, world_size: int, network: str = "layer_norm") -> dict:
    """3 steps of 4 updates on random batches. Their data do not depend on how many processes share them."""
    args = probe_args(None, num_envs=32, batch_size=64, updates_per_step=4, network=network, replay_capacity=640)
    sizes = sac.derive_sizes(args, world_size)
    torch.manual_seed(0)
    agent = sac.Agent(3, None, gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32), args)
    optimizers = sac.make_optimizers(agent, torch.tensor(args.learning_rate), args.temperature_learning_rate)
    functions = sac.build_functions(agent, optimizers, sac.allocate_replay(agent, sizes, False), sizes, args)
    mine = slice(rank * sizes.batch, (rank + 1) * sizes.batch)
    robots = slice(rank * sizes.envs, (rank + 1) * sizes.envs)
    for k in range(3):
        reward, invalid = torch.randn(32)[robots], (torch.randn(32) > 1.3)[robots]
        sac.follow_returns(agent, torch.zeros_like(reward), reward, torch.ones_like(invalid), invalid, args.gamma)
        agent.obs_statistics.update(torch.randn(32, 3)[robots] * 3.0 + 1.0, ~invalid)
        columns = [torch.randn(4, 64, *shape)[:, mine].flatten(0, 1) for shape in ((3,), (2,), (), (3,), (), ())]
        obs, action, reward, next_obs, discount, weight = columns
        discount, weight = 0.9 * (discount < 1.0), (weight < 1.3).float()
        batch = sac.Batch(obs, obs, action.tanh(), reward, discount, next_obs, next_obs, weight)
        noise = torch.randn(4, 2, 64, 2)[:, :, mine]
        critic_terms, policy_terms, policy_updates = sac.update(agent, functions, batch, noise, 4 * k, args)
    terms = torch.cat([critic_terms, policy_terms])
    return dict(agent=dict(agent.state_dict()), terms=terms, policy_updates=policy_updates)


def main(folder: Path) -> None:
    rank, world_size = vecsim.start_processes(torch.device("cpu"))
    for network in ("layer_norm", "flash"):
        torch.save(updates_on_fixed_data(rank, world_size, network), folder / f"{network}-{rank}.pt")
    runs = ("whole", 12_800, None), ("parts", 6_400, None), ("parts", 12_800, "parts/checkpoint.pt")
    for name, steps, resume in runs:
        args = probe_args(folder / name, total_timesteps=steps, log_every=1_600, checkpoint_replay=True, tau=0.1)
        sac.train(dataclasses.replace(args, resume=resume and str(folder / resume)), ProbeEnv)
        torch.distributed.barrier()  # the checkpoint is written
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    assert os.environ["WORLD_SIZE"] == "2"
    main(Path(sys.argv[1]))
