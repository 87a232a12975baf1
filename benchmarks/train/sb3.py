"""Stable-Baselines3's PPO with its defaults: 2,048 steps, minibatches of 64, 10 epochs; variants dummy and subproc."""

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

from benchmarks.meter import device, meter, threads, variant
from benchmarks.train.gymnasium_envs import make_one, num_envs


class Ticks(BaseCallback):
    def _on_step(self):
        return True

    def _on_rollout_start(self):
        if self.num_timesteps:
            meter.tick(self.model.n_steps * self.training_env.num_envs)


if __name__ == "__main__":  # the processes of SubprocVecEnv may import this file
    torch.set_num_threads(threads)
    env = make_vec_env(make_one, num_envs, vec_env_cls={"dummy": DummyVecEnv, "subproc": SubprocVecEnv}[variant])
    PPO("MlpPolicy", env, device=device, seed=1).learn(10**12, callback=Ticks())
