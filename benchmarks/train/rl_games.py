# /// script
# dependencies = ["rl-games==1.6.5", "torch==2.13.0", "gymnasium[mujoco]==1.4.0", "mujoco==4.0.0"]
# ///
"""rl_games' A2CAgent.train, horizon and minibatch as in its configuration for Ant on 64 environments.

On vecsim (variant vecsim) it has the sizes of ours."""

import numpy as np
from rl_games.common.ivecenv import IVecEnv

from benchmarks.learner.rl_games_agent import describe_spaces, make_agent
from benchmarks.train.vecsim_envs import make_envs, num_envs, on_vecsim, ours_sizes

num_steps, epochs, minibatches, hidden = 512, 4, 2, [256, 128, 64]
if on_vecsim:
    num_steps, epochs, minibatches, hidden = ours_sizes


def as_float32(rows):
    return rows.float() if on_vecsim else rows.astype(np.float32)


class Envs(IVecEnv):
    def __init__(self):
        self.envs = make_envs(num_steps)

    def get_env_info(self):
        return describe_spaces(self.envs.single_observation_space, self.envs.single_action_space)

    def reset(self):
        return as_float32(self.envs.reset(seed=1)[0])

    def step(self, actions):
        obs, reward, terminated, truncated, _ = self.envs.step(actions)
        return as_float32(obs), as_float32(reward), terminated | truncated, {"time_outs": truncated}


make_agent(Envs(), num_envs, num_steps, num_envs * num_steps // minibatches, epochs, hidden).train()
