"""sac_gpu_torch.train on an environment of random numbers; variants eager and compiled."""

import tempfile

import torch

import sac_gpu_torch as sac
from benchmarks.learner.common import hidden, num_envs, obs_size, spaces
from benchmarks.meter import device, meter, settings, variant


class RandomNumbers:
    """It costs nothing, and calls the meter once the trainer has begun to learn."""

    single_observation_space, single_action_space = spaces["observation_space"], spaces["action_space"]
    obs, reward = torch.randn(num_envs, obs_size, device=device), torch.randn(num_envs, device=device)
    never = torch.zeros(num_envs, dtype=torch.bool, device=device)

    def reset(self, **options):
        self.taken = 0
        return self.obs, {}

    def step(self, action):
        self.taken += 1
        if self.taken > settings["first_steps"] + 1:
            meter.tick(settings["updates_per_step"])
        return self.obs, self.reward, self.never, self.never, {"final_obs": self.obs}


flags = ["--preset", "vanilla", "--device", device, "--num-envs", num_envs, "--batch-size", settings["batch_size"]]
flags += ["--updates-per-step", settings["updates_per_step"], "--actor-hidden", *hidden, "--critic-hidden", *hidden]
flags += ["--learning-starts", num_envs * settings["first_steps"], "--total-timesteps", 10**12, "--eval-episodes", 0]
flags += ["--replay-capacity", num_envs * settings["replay_steps"], "--run-dir", tempfile.mkdtemp(dir=".")]
flags += ["--no-compile"] if variant == "eager" else []
sac.train(sac.parse_args([str(flag) for flag in flags]), lambda env_id, **options: RandomNumbers())
