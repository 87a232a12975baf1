"""Stable-Baselines3's PPO with its defaults: 2,048 steps, minibatches of 64, 10 epochs; variants dummy and subproc."""

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

from benchmarks.meter import device, meter, threads, variant
from benchmarks.train.gymnasium_envs import make_one, num_envs


class Ticks(BaseCallback):
    def __init__(self, steps):
        """steps: of each environment, between two calls of the meter."""
        super().__init__()
        self.steps = steps

    def _on_step(self):
        if self.n_calls % self.steps == 0:
            meter.tick(self.steps * self.training_env.num_envs)
        return True


if __name__ == "__main__":  # sb3_zoo.py imports this file, and so may the processes of SubprocVecEnv
    torch.set_num_threads(threads)
    env = make_vec_env(make_one, num_envs, vec_env_cls={"dummy": DummyVecEnv, "subproc": SubprocVecEnv}[variant])
    model = PPO("MlpPolicy", env, device=device, seed=1)
    model.learn(10**12, callback=Ticks(model.n_steps))
