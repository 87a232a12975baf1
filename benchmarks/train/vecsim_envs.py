"""Environments for rsl_rl, skrl and rl_games: Gymnasium's, or in the variant vecsim those of `ours`.

On vecsim the learners have the number of environments, batch and networks of `ours` too."""

import gymnasium
import torch

import vecsim_torch
from benchmarks.meter import count_steps, device, settings, threads, variant
from benchmarks.train.gymnasium_envs import make_vector

torch.set_num_threads(threads)
torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as ours
on_vecsim, ours = variant == "vecsim", settings["ours"]
ours_sizes = [ours[name] for name in ("num_steps", "update_epochs", "num_minibatches", "hidden")]
num_envs = ours["num_envs"] if on_vecsim else settings["num_envs"]


class InTensors(gymnasium.vector.VectorWrapper):
    """Gymnasium's environments with tensors in place of arrays, as vecsim has them."""

    device = torch.device(device)

    def reset(self, seed=1):
        obs, info = self.env.reset(seed=seed)
        return torch.as_tensor(obs, dtype=torch.float32, device=self.device), info

    def step(self, actions):
        *answer, info = self.env.step(actions.cpu().numpy())
        obs, reward, terminated, truncated = (torch.as_tensor(x, device=self.device) for x in answer)
        return obs.float(), reward.float(), terminated, truncated, info


def make_envs(num_steps):
    if not on_vecsim:
        return InTensors(make_vector(num_steps, "sync"))
    env = vecsim_torch.make(
        settings["env_id"], num_envs, device=device, seed=1, compile=True, random_initial_ages=True,
        integrator=settings["integrator"], iterations=ours["solver_iterations"], **settings["env_kwargs"],
    )  # fmt: skip
    return count_steps(env, num_steps, num_steps * num_envs)
