"""An environment that costs nothing. It calls the meter once the trainer has begun to learn."""

import gymnasium
import numpy as np
import torch

from benchmarks.learner.common import action_size, num_envs, obs_size
from benchmarks.meter import device, meter


class RandomNumbers:
    single_critic_space = None

    def __init__(self, first_steps, work):
        bound, limit = np.full(obs_size, np.inf, np.float32), np.ones(action_size, np.float32)
        self.single_observation_space = gymnasium.spaces.Box(-bound, bound)
        self.single_action_space = gymnasium.spaces.Box(-limit, limit)
        self.obs = torch.randn(num_envs, obs_size, device=device)
        self.reward = torch.randn(num_envs, device=device)
        self.never = torch.zeros(num_envs, dtype=torch.bool, device=device)
        self.first_steps, self.work, self.taken = first_steps, work, 0

    def reset(self, **options):
        self.taken = 0
        return self.obs, {}

    def step(self, action):
        self.taken += 1
        if self.taken > self.first_steps:
            meter.tick(self.work)
        return self.obs, self.reward, self.never, self.never, {"final_obs": self.obs, "invalid": self.never}
