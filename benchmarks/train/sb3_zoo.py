"""Stable-Baselines3 for `runs peers`, with the tuned settings of RL Baselines3 Zoo; variants ppo and sac.

The settings are those of hyperparams/ppo.yml and sac.yml for MuJoCo's tasks. The Zoo has none for SAC on the pendulum,
which trains with SB3's defaults."""

import torch
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from benchmarks.meter import device, meter, settings, threads, variant

wide = dict(log_std_init=-2, ortho_init=False, activation_fn=torch.nn.ReLU, net_arch=dict(pi=[256, 256], vf=[256, 256]))
ZOO = {
    "InvertedPendulum-v5": dict(
        batch_size=64, n_steps=32, gamma=0.999, learning_rate=0.000222425, ent_coef=1.37976e-07, clip_range=0.4,
        n_epochs=5, gae_lambda=0.9, max_grad_norm=0.3, vf_coef=0.19816),
    "HalfCheetah-v5": dict(
        batch_size=64, n_steps=512, gamma=0.98, learning_rate=2.0633e-05, ent_coef=0.000401762, clip_range=0.1,
        n_epochs=20, gae_lambda=0.92, max_grad_norm=0.8, vf_coef=0.58096, policy_kwargs=wide),
    "Hopper-v5": dict(
        batch_size=32, n_steps=512, gamma=0.999, learning_rate=9.80828e-05, ent_coef=0.00229519, clip_range=0.2,
        n_epochs=5, gae_lambda=0.99, max_grad_norm=0.7, vf_coef=0.835671, policy_kwargs=wide),
}  # fmt: skip
of_each = 200  # environment steps between looks at the clock


class Ticks(BaseCallback):
    def _on_step(self):
        if self.n_calls % of_each == 0:
            meter.tick(of_each)
        return True


torch.set_num_threads(threads)
env_id, seed = settings["env_id"], settings["seed"]
env = make_vec_env(env_id, 1, seed=seed)
if variant == "ppo":
    env = VecNormalize(env, gamma=ZOO[env_id]["gamma"])
    model = PPO("MlpPolicy", env, device=device, seed=seed, **ZOO[env_id])
    meter.ready(lambda obs: model.predict(env.normalize_obs(obs), deterministic=True)[0])
else:
    learning_starts = dict(learning_starts=10_000) if env_id != "InvertedPendulum-v5" else {}
    model = SAC("MlpPolicy", env, device=device, seed=seed, **learning_starts)
    meter.ready(lambda obs: model.predict(obs, deterministic=True)[0])
model.learn(1_000_000, callback=Ticks())
