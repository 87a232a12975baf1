"""rl_games' A2CAgent.train, horizon and minibatch as in its configuration for Ant on 64 environments.

On vecsim (variant vecsim) it has the sizes of ours."""

from benchmarks.adapters.rl_games import Envs, make_agent
from benchmarks.meter import device
from benchmarks.train.vecsim_envs import make_envs, num_envs, on_vecsim, ours_sizes

num_steps, epochs, minibatches, hidden = 512, 4, 2, [256, 128, 64]
if on_vecsim:
    num_steps, epochs, minibatches, hidden = ours_sizes
envs = Envs(make_envs(num_steps))
make_agent(envs, num_envs, num_steps, num_envs * num_steps // minibatches, epochs, hidden, device).train()
