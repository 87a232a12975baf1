"""skrl's PPO, with policy and value function as its documentation builds them, without and with a GRU."""

from itertools import pairwise

import torch
from skrl.agents.torch.ppo import PPO, PPO_RNN
from skrl.memories.torch import RandomMemory
from skrl.models.torch import DeterministicMixin, GaussianMixin, Model
from skrl.resources.preprocessors.torch import RunningStandardScaler
from skrl.resources.schedulers.torch import KLAdaptiveLR
from torch import nn


def mlp(inputs, hidden, outputs):
    layers = []
    for size, next_size in pairwise([inputs, *hidden]):
        layers += [nn.Linear(size, next_size), nn.ELU()]
    return nn.Sequential(*layers, nn.Linear(hidden[-1], outputs))


class Net(nn.Module):
    """An MLP; with memory = (width, steps, environments) behind a GRU, whose output and input the MLP sees."""

    def __init__(self, inputs, hidden, outputs, memory):
        super().__init__()
        self.gru, self.specification = None, {}
        if memory:
            width, self.length, num_envs = memory
            self.gru = nn.GRU(inputs, width, batch_first=True)
            self.specification = {"rnn": {"sequence_length": self.length, "sizes": [(1, num_envs, width)]}}
        self.mlp = mlp(inputs + (memory[0] if memory else 0), hidden, outputs)

    def forward(self, inputs):
        """In a rollout one step of each environment; in an update sequences, cut where an episode ends."""
        obs = inputs["observations"]
        if not self.gru:
            return self.mlp(obs), {}
        length = self.length if "terminated" in inputs else 1
        obs = obs.unflatten(0, (-1, length))
        state, outputs, cuts = inputs["rnn"][0].unflatten(1, (-1, length))[:, :, 0].contiguous(), [], [0, 1]
        if length > 1:
            ended = (inputs["terminated"] | inputs["truncated"]).view(-1, length)
            cuts = [0, *(ended[:, :-1].any(0).nonzero().flatten() + 1).tolist(), length]
        for first, end in pairwise(cuts):
            output, state = self.gru(obs[:, first:end], state)
            outputs.append(output)
            if end < length:
                state = state * ~ended[:, end - 1, None]
        seen = torch.cat([torch.cat(outputs, 1), obs], -1)
        return self.mlp(seen.flatten(0, 1)), {"rnn": [state]}


class Policy(GaussianMixin, Model):
    def __init__(self, spaces, hidden, memory=None):
        Model.__init__(self, **spaces)
        GaussianMixin.__init__(self)
        self.net = Net(self.num_observations, hidden, self.num_actions, memory)
        self.log_std = nn.Parameter(torch.zeros(self.num_actions))

    def get_specification(self):
        return self.net.specification

    def compute(self, inputs, role):
        mean, state = self.net(inputs)
        return mean, {"log_std": self.log_std} | state


class Value(DeterministicMixin, Model):
    def __init__(self, spaces, hidden, memory=None):
        Model.__init__(self, **spaces)
        DeterministicMixin.__init__(self)
        self.net = Net(self.num_observations, hidden, 1, memory)

    def get_specification(self):
        return self.net.specification

    def compute(self, inputs, role):
        return self.net(inputs)


def make_agent(spaces, num_envs, num_steps, epochs, minibatches, hidden, desired_kl=0.01, memory_width=None, **more):
    """skrl's PPO, or with memory_width its PPO_RNN; options as in its Gymnasium examples."""
    memory, device = (memory_width, num_steps, num_envs) if memory_width else None, spaces["device"]
    policy, value = (kind(spaces, hidden, memory).to(device) for kind in (Policy, Value))
    return (PPO_RNN if memory_width else PPO)(
        models={"policy": policy, "value": value},
        memory=RandomMemory(memory_size=num_steps, num_envs=num_envs, device=device),
        **spaces,
        cfg=dict(
            rollouts=num_steps, learning_epochs=epochs, mini_batches=minibatches, learning_rate=1e-3,
            learning_rate_scheduler=KLAdaptiveLR, learning_rate_scheduler_kwargs={"kl_threshold": desired_kl},
            observation_preprocessor=RunningStandardScaler,
            observation_preprocessor_kwargs={"size": spaces["observation_space"], "device": device},
            value_preprocessor=RunningStandardScaler, value_preprocessor_kwargs={"size": 1, "device": device},
            experiment={"write_interval": 0, "checkpoint_interval": 0}, **more,
        ),
    )  # fmt: skip
