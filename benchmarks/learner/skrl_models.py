"""Policy and value function of skrl, as its documentation builds them."""

import gymnasium
import numpy as np
import torch
from skrl.models.torch import DeterministicMixin, GaussianMixin, Model
from torch import nn


def mlp(inputs, hidden, outputs):
    sizes, layers = [inputs, *hidden], []
    for i in range(len(hidden)):
        layers += [nn.Linear(sizes[i], sizes[i + 1]), nn.ELU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))


class Policy(GaussianMixin, Model):
    def __init__(self, spaces, hidden):
        Model.__init__(self, **spaces)
        GaussianMixin.__init__(self)
        self.net = mlp(self.num_observations, hidden, self.num_actions)
        self.log_std = nn.Parameter(torch.zeros(self.num_actions))

    def compute(self, inputs, role):
        return self.net(inputs["observations"]), {"log_std": self.log_std}


class Value(DeterministicMixin, Model):
    def __init__(self, spaces, hidden):
        Model.__init__(self, **spaces)
        DeterministicMixin.__init__(self)
        self.net = mlp(self.num_observations, hidden, 1)

    def compute(self, inputs, role):
        return self.net(inputs["observations"]), {}


def box(size, limit):
    return gymnasium.spaces.Box(-limit, limit, (size,), np.float32)
