"""skrl's SAC: act, record_transition and post_interaction, as its trainer calls them.

The models are those of its documentation."""

import torch
from skrl.agents.torch.sac import SAC
from skrl.memories.torch import RandomMemory
from skrl.models.torch import DeterministicMixin, Model

from benchmarks.learner.common import hidden, num_envs, obs_size, spaces
from benchmarks.learner.skrl_agent import Policy, mlp
from benchmarks.meter import device, meter, settings


class SquashedPolicy(Policy):
    def compute(self, inputs, role):
        mean, outputs = super().compute(inputs, role)
        return torch.tanh(mean), outputs


class Critic(DeterministicMixin, Model):
    def __init__(self, spaces, hidden):
        Model.__init__(self, **spaces)
        DeterministicMixin.__init__(self)
        self.net = mlp(self.num_observations + self.num_actions, hidden, 1)

    def compute(self, inputs, role):
        return self.net(torch.cat([inputs["observations"], inputs["taken_actions"]], dim=1)), {}


spaces |= dict(device=device)
critics = ("critic_1", "critic_2", "target_critic_1", "target_critic_2")
updates = settings["updates_per_step"]
agent = SAC(
    models={"policy": SquashedPolicy(spaces, hidden)} | {name: Critic(spaces, hidden) for name in critics},
    memory=RandomMemory(memory_size=settings["replay_steps"], num_envs=num_envs, device=device),
    **spaces,
    cfg=dict(
        gradient_steps=updates, batch_size=settings["batch_size"], polyak=0.005, learn_entropy=True, grad_norm_clip=0.0,
        learning_starts=settings["first_steps"], experiment={"write_interval": 0, "checkpoint_interval": 0},
    ),
)  # fmt: skip
agent.init()
agent.enable_training_mode(True)
obs = torch.randn(num_envs, obs_size, device=device)
reward = torch.randn(num_envs, 1, device=device)
never = torch.zeros(num_envs, 1, dtype=torch.bool, device=device)
timestep = 0
while True:
    with torch.no_grad():
        actions, _ = agent.act(obs, None, timestep=timestep, timesteps=10**9)
        agent.record_transition(
            observations=obs, states=None, actions=actions, rewards=reward, next_observations=obs, next_states=None,
            terminated=never, truncated=never, infos={}, timestep=timestep, timesteps=10**9,
        )  # fmt: skip
    agent.post_interaction(timestep=timestep, timesteps=10**9)
    if timestep >= settings["first_steps"]:
        meter.tick(updates)
    timestep += 1
