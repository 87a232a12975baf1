"""test_trainers.py runs this in two processes: torchrun --nproc-per-node=2 two_processes.py FOLDER"""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
import sys
import time
from pathlib import Path

import gymnasium
import numpy as np
import torch
from probe_envs import ProbeEnv, dqn_args, probe_args, sac_args
from test_distill import RecallEnv, small_args

import dqn_gpu_torch as dqn
import ppo_distill_teacher_student as distill
import ppo_gpu_torch as ppo
import ppo_recurrent_gpu_torch as recurrent
import sac_gpu_torch as sac
import vecsim_torch as vecsim

SPACE = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
RUNS = {  # trainer, makes its flags, environment steps
    "ppo": (ppo, probe_args, 20_480),
    "ppo_recurrent": (recurrent, functools.partial(probe_args, flags=recurrent.Args, memory_width=8), 4_096),
    "sac": (sac, functools.partial(sac_args, checkpoint_replay=True, tau=0.1), 12_800),
    "dqn": (dqn, functools.partial(dqn_args, checkpoint_replay=True, epsilon_decay=1e-9), 6_144),
    "pqn": (dqn, functools.partial(dqn_args, algorithm="pqn", epsilon_decay=1e-9), 6_144),
}


# Gradient steps on fixed random data, which do not depend on how many processes share them ----------------------------


def updates_of_ppo(rank: int, world_size: int) -> dict:
    """3 iterations of 6 gradient steps."""
    args = probe_args(None, num_envs=32, num_minibatches=1, update_epochs=6)
    sizes = ppo.derive_sizes(args, world_size, torch.device("cpu"))._replace(microbatch=50)
    torch.manual_seed(0)
    agent = ppo.Agent(3, None, SPACE, args)
    learning_rate = torch.tensor(args.learning_rate)
    optimizer = vecsim.make_optimizer(agent, learning_rate)
    mine = slice(rank * sizes.envs, (rank + 1) * sizes.envs)
    for _ in range(3):
        shapes = (3,), (3,), (2,), (), (), (), ()
        obs, final_obs, action, reward, *flags = (torch.randn(8, 32, *shape)[:, mine] for shape in shapes)
        obs, final_obs, flags = 3 * obs + 1, 3 * final_obs + 1, [flag > 1.3 for flag in flags]
        mean = agent.policy_mean(agent.obs_statistics.normalize(obs.flatten(0, 1))).detach().view_as(action)
        rollout = ppo.Rollout(obs, obs, final_obs, action, mean, reward, *flags)
        functions = ppo.build_functions(agent, optimizer, rollout, sizes, args)
        value, advantage = functions.estimate()
        batch = ppo.make_batch(agent, rollout, value, advantage, True, torch.arange(sizes.batch))
        terms = ppo.update(agent, functions, batch, learning_rate, 0.01, args)
        agent.obs_statistics.update(obs.flatten(0, 1), ~rollout.invalid.flatten())
    return dict(agent=dict(agent.state_dict()), learning_rate=learning_rate, terms=terms)


def updates_of_sac(rank: int, world_size: int, network: str) -> dict:
    """3 steps of 4 updates."""
    args = sac_args(None, num_envs=32, batch_size=64, updates_per_step=4, network=network, replay_capacity=640)
    sizes = sac.derive_sizes(args, world_size)
    torch.manual_seed(0)
    agent = sac.Agent(3, None, SPACE, args)
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
    assert policy_updates == 2
    return dict(agent=dict(agent.state_dict()), terms=torch.cat([critic_terms, policy_terms]))


def updates_of_dqn(rank: int, world_size: int, algorithm: str) -> dict:
    """3 iterations of gradient steps on rollouts."""
    args = dqn_args(None, algorithm=algorithm, num_envs=32, batch_size=64, replay_capacity=256, learning_starts=1)
    sizes = dqn.derive_sizes(args, world_size)
    torch.manual_seed(0)
    agent = dqn.Agent(3, SPACE, args)
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


UPDATES = {
    "ppo": updates_of_ppo,
    "sac": functools.partial(updates_of_sac, network="layer_norm"),
    "sac-flash": functools.partial(updates_of_sac, network="flash"),
    "dqn": functools.partial(updates_of_dqn, algorithm="dqn"),
    "pqn": functools.partial(updates_of_dqn, algorithm="pqn"),
}


# Whole runs -----------------------------------------------------------------------------------------------------------


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


def train_stages(folder: Path) -> dict:
    """Three stages of the distillation on the recall probe. Returns the weights that this process has at their ends."""
    kept = {}

    class Keeping(distill.StageRun):
        def __init__(self, stage, *arguments):
            super().__init__(stage, *arguments)
            kept[stage] = self.agent

    distill.StageRun = Keeping
    steps = dict(total_timesteps=3_072, student_timesteps=1_536, finetune_timesteps=768, log_every=384)
    args = small_args(folder, stages=("teacher", "student", "finetune"), critic_warmup_iterations=1, **steps)
    distill.train(args, RecallEnv)
    return {stage: dict(agent.state_dict()) for stage, agent in kept.items()}


def main(folder: Path) -> None:
    rank, world_size = vecsim.start_processes(torch.device("cpu"))
    found = {name: update(rank, world_size) for name, update in UPDATES.items()}
    statistics = dict(
        episode_return=float(rank), episode_length=2.0, success=float("nan"), episodes=1 + rank, invalid=1
    )
    found["episodes"] = vecsim.merge_episode_statistics(statistics, torch.device("cpu"))
    with vecsim.first_process_first():
        time.sleep(0.2 if rank == 0 else 0.0)
        found["compiled"] = time.monotonic()
    found["distill"] = train_stages(folder / "distill")
    torch.save(found, folder / f"process-{rank}.pt")
    for name, (module, make_args, total) in RUNS.items():
        for part, steps, resume in (("whole", total, None), ("parts", total // 2, None), ("parts", total, "resumed")):
            args = make_args(folder / name / part, total_timesteps=steps, log_every=total // 8)
            checkpoint = resume and str(folder / name / part / "checkpoint.pt")
            module.train(dataclasses.replace(args, resume=checkpoint), ProbeEnv)
            torch.distributed.barrier()  # the checkpoint is written
    stop_and_resume(folder / "ppo")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    assert os.environ["WORLD_SIZE"] == "2"
    main(Path(sys.argv[1]))
