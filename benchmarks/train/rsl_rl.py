# /// script
# dependencies = ["rsl-rl-lib==5.5.1", "torch==2.13.0", "gymnasium[mujoco]==1.4.0", "mujoco==4.0.0"]
# ///
"""rsl_rl's OnPolicyRunner: the batch and networks of SB3's defaults, rsl_rl's epochs and minibatches.

On vecsim (variant vecsim) it has the sizes of ours, and its networks are compiled, as ours are."""

import torch
from rsl_rl.env import VecEnv
from rsl_rl.runners import OnPolicyRunner
from tensordict import TensorDict

from benchmarks.meter import device
from benchmarks.train.vecsim_envs import make_envs, num_envs, on_vecsim, ours_sizes

num_steps, epochs, minibatches, hidden = 1024, 5, 4, [64, 64]
if on_vecsim:
    num_steps, epochs, minibatches, hidden = ours_sizes


def tensor(rows, dtype=torch.float32):
    return torch.as_tensor(rows, dtype=dtype, device=device)


class Envs(VecEnv):
    def __init__(self):
        self.envs = make_envs(num_steps)
        self.num_envs, self.num_actions = num_envs, self.envs.single_action_space.shape[0]
        self.max_episode_length, self.episode_length_buf = 1000, torch.zeros(num_envs, dtype=torch.long, device=device)
        self.device, self.cfg = device, {}
        self.obs = self.envs.reset(seed=1)[0]

    def get_observations(self):
        return TensorDict({"policy": tensor(self.obs)}, batch_size=[num_envs], device=device)

    def step(self, actions):
        actions = actions.clamp(-1, 1)
        self.obs, reward, terminated, truncated, _ = self.envs.step(actions if on_vecsim else actions.cpu().numpy())
        extras = {"time_outs": tensor(truncated, torch.bool)}
        return self.get_observations(), tensor(reward), tensor(terminated | truncated, torch.bool), extras


network = dict(class_name="MLPModel", hidden_dims=hidden, activation="elu", obs_normalization=True)
config = dict(
    algorithm=dict(
        class_name="PPO", num_learning_epochs=epochs, num_mini_batches=minibatches,
        schedule="adaptive", entropy_coef=0.0,
    ),
    torch_compile_mode="default" if on_vecsim else None,
    actor=network | dict(distribution_cfg=dict(class_name="GaussianDistribution", init_std=1.0)),
    critic=network,
    obs_groups=dict(actor=["policy"], critic=["policy"]),
    num_steps_per_env=num_steps,
    save_interval=10**9,
    check_for_nan=False,
)  # fmt: skip
OnPolicyRunner(Envs(), config, device=device).learn(10**9)
