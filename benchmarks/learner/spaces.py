"""The spaces of the environments of `learner`."""

import gymnasium
import numpy as np

from benchmarks.learner.common import action_size, obs_size


def box(size, limit):
    return gymnasium.spaces.Box(-limit, limit, (size,), np.float32)


obs_space, action_space = box(obs_size, np.inf), box(action_size, 1.0)
