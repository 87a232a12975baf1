"""rl_games' train_epoch, its rollout replaced by one that it collected before."""

import torch

from benchmarks.adapters.rl_games import Envs, make_agent
from benchmarks.learner.common import epochs, hidden, minibatches, num_envs, num_steps, obs_size, samples, spaces
from benchmarks.meter import device, meter, settings


class RandomNumbers:
    single_observation_space, single_action_space = spaces["observation_space"], spaces["action_space"]

    def reset(self, seed=None):
        return torch.randn(num_envs, obs_size, device=device), {}

    def step(self, actions):
        (obs, info), done = self.reset(), torch.rand(num_envs, device=device) < 0.01
        return obs, torch.randn(num_envs, device=device), done, torch.zeros_like(done), info


memory_width = settings.get("memory_width")
sizes = num_envs, num_steps, samples // minibatches, epochs, hidden
agent = make_agent(Envs(RandomNumbers()), *sizes, device, memory_width)
agent.init_tensors()
agent.is_tensor_obses = True
agent.obs = agent.env_reset()
agent.set_eval()
collect = "play_steps_rnn" if memory_width else "play_steps"
with torch.no_grad():
    collected = getattr(agent, collect)()
# The update overwrites the means and deviations that it is given.
replay = lambda: collected | {name: collected[name].clone() for name in ("mus", "sigmas")}
setattr(agent, collect, replay)
while True:
    agent.train_epoch()
    meter.tick(samples)
