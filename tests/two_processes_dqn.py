"""test_dqn.py runs this in two processes: torchrun --nproc-per-node=2 two_processes_dqn.py FOLDER"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import gymnasium
import numpy as np
import torch
from probe_envs import ProbeEnv

import dqn_gpu_torch as dqn
import vecsim_torch as vecsim

OF_ALGORITHM = dict(
    dqn=dict(learning_starts=640, replay_capacity=10_000, batch_size=128, updates=2, tau=0.05),
    pqn=dict(num_steps=8, learning_starts=0, batch_size=128, update_epochs=2),
)


def probe_args(run_dir, env_id="action", algorithm="dqn", **changes):
    """Flags that solve a probe environment in seconds. Of 9 bins over -2 to 2, two are the best actions."""
    small = dict(num_envs=64, total_timesteps=20_000, bins=9, n_step=1, critic_hidden=(32,), gamma=0.9)
    small |= dict(learning_rate=3e-3, learning_rate_final=3e-3, eval_episodes=1, compile=False, device="cpu")
    small |= dict(checkpoint_every=10**9, log_every=10**9, run_dir=run_dir and str(run_dir))
    small |= OF_ALGORITHM[algorithm]
    return dataclasses.replace(dqn.task_defaults(env_id, algorithm), **(small | changes))


def make_agent(args, obs_size=3, actions=2):
    torch.manual_seed(0)
    return dqn.Agent(obs_size, gymnasium.spaces.Box(-1.0, 1.0, (actions,), np.float32), args)


def updates_on_fixed_data(rank: int, world_size: int, algorithm: str) -> dict:
    """3 iterations of gradient steps on random rollouts. Their data do not depend on how many processes share them."""
    args = probe_args(None, algorithm=algorithm, num_envs=32, batch_size=64, replay_capacity=256, learning_starts=1)
    sizes = dqn.derive_sizes(args, world_size)
    agent = make_agent(args)
    optimizer = vecsim.make_optimizer(agent.network, torch.tensor(args.learning_rate))
    mine, replay = slice(rank * sizes.envs, (rank + 1) * sizes.envs), dqn.allocate_replay(agent, sizes)
    functions = dqn.build_functions(agent, optimizer, replay, sizes, args)
    total = torch.zeros(len(dqn.LossTerms._fields))
    for _ in range(3):
        for number in range(8):
            obs, final_obs, reward, *flags = (torch.randn(32, *shape)[mine] for shape in ((3,), (3,), (), (), (), ()))
            terminated, truncated, invalid = (flag > 1.3 for flag in flags)
            action = torch.randint(9, (32, 2))[mine]
            agent.obs_statistics.update(3.0 * obs + 1.0, ~invalid)
            dqn.follow_returns(agent, torch.zeros_like(reward), reward, terminated, invalid, args.gamma)
            step = dqn.Transitions(3.0 * obs + 1.0, final_obs, action, reward, terminated, truncated, invalid)
            dqn.store(replay, number, step)
        # Step by step, so that the parts of both processes together are the gradient step of one.
        order = torch.arange(8 * sizes.envs)
        if algorithm == "dqn":
            order = order[: sizes.updates * sizes.batch]
            batch = dqn.replay_batch(agent, replay, order // sizes.envs, order % sizes.envs, functions.value, args)
        else:
            batch = dqn.rollout_batch(agent, replay, order.repeat(args.update_epochs), functions.value, args)
        total += dqn.update(agent, functions, batch, sizes.updates)
    return dict(agent=dict(agent.state_dict()), terms=total)


def main(folder: Path) -> None:
    rank, world_size = vecsim.start_processes(torch.device("cpu"))
    for algorithm in OF_ALGORITHM:
        torch.save(updates_on_fixed_data(rank, world_size, algorithm), folder / f"{algorithm}-{rank}.pt")
        for name, steps, resume in (("whole", 6_144, None), ("parts", 3_072, None), ("parts", 6_144, "checkpoint.pt")):
            run_dir = folder / algorithm / name
            changes = dict(log_every=1_024, checkpoint_replay=True, epsilon_decay=1e-9, total_timesteps=steps)
            args = probe_args(run_dir, "action", algorithm, **changes)
            dqn.train(dataclasses.replace(args, resume=resume and str(run_dir / resume)), ProbeEnv)
            torch.distributed.barrier()  # the checkpoint is written
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    assert os.environ["WORLD_SIZE"] == "2"
    main(Path(sys.argv[1]))
