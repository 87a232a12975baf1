"""Environments for rsl_rl, skrl and rl_games: Gymnasium's, or in the variant vecsim those of `ours`.

On vecsim the learners have the number of environments, batch and networks of `ours` too."""

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


def make_envs(num_steps):
    return VecsimEnvs() if on_vecsim else make_vector(num_steps, "sync")
