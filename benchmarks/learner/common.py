"""The batch of `learner`, the same for all.

PPO: one update is 65,536 samples (2,048 environments x 32 steps) x 5 epochs x 4 minibatches, with separate ELU networks
256-128-64 for actor and critic, 27 observations, 8 actions, observation statistics, a learning rate from the KL
divergence, and gradients clipped at 1. The unit is samples of the batch per second; each is visited 5 times. Every
learner runs its own code, with its advantages, shuffling, normalisation and logging; rl_games without the advantages,
in its favour.

PPO with memory: 1,024 environments, and before each network a GRU of 128, whose output and input the network sees. The
gradient flows through the 32 steps.

SAC: updates/s of the whole trainer, with random numbers in place of the simulator: 128 environments, 8 updates after
each of their steps, each on a batch of 4,096, with policy and twin critics of two layers of 256. Acting and storing are
inside, for both.
"""

import gymnasium
import numpy as np
import torch

from benchmarks.meter import device, settings, threads

torch.manual_seed(1)
torch.set_num_threads(threads)
if device == "cuda":
    torch.set_float32_matmul_precision("high")  # TF32, for every learner alike
num_envs, obs_size, action_size, hidden = (settings[x] for x in ("num_envs", "obs_size", "action_size", "hidden"))
num_steps, epochs, minibatches = (settings.get(x, 1) for x in ("num_steps", "epochs", "minibatches"))  # of PPO
samples = num_envs * num_steps
spaces = dict(
    observation_space=gymnasium.spaces.Box(-np.inf, np.inf, (obs_size,), np.float32),
    action_space=gymnasium.spaces.Box(-1.0, 1.0, (action_size,), np.float32),
)
