"""Environments for rsl_rl, skrl and rl_games: Gymnasium's, or in the variant vecsim those of `ours`.

On vecsim the learners have the number of environments, batch and networks of `ours` too."""

import gymnasium
import torch

from benchmarks.meter import device, meter, settings, threads, variant
from benchmarks.train.gymnasium_envs import make_vector

torch.set_num_threads(threads)
torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as ours
on_vecsim, ours = variant == "vecsim", settings["ours"]
ours_sizes = [ours[name] for name in ("num_steps", "update_epochs", "num_minibatches", "hidden")]
num_envs = ours["num_envs"] if on_vecsim else settings["num_envs"]


class VecsimEnvs:
    """vecsim as `ours` makes it. It counts its steps and calls the meter where an iteration begins."""

    def __init__(self):
        import vecsim_torch

        self.env = vecsim_torch.make(
            settings["env_id"], num_envs, device=device, seed=1, compile=True, random_initial_ages=True,
            integrator=settings["integrator"], iterations=ours["solver_iterations"], **settings["env_kwargs"],
        )  # fmt: skip
        self.num_envs, self.device = num_envs, self.env.device
        self.single_observation_space = self.env.single_observation_space
        self.single_action_space = self.env.single_action_space
        self.taken = 0

    def reset(self, seed=1):
        return self.env.reset(seed=seed)

    def step(self, actions):
        if self.taken and self.taken % ours["num_steps"] == 0:
            meter.tick(ours["num_steps"] * num_envs)
        self.taken += 1
        return self.env.step(actions)


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
    return VecsimEnvs() if on_vecsim else InTensors(make_vector(num_steps, "sync"))
