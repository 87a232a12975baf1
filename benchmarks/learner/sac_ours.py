"""sac_gpu_torch.train on an environment of random numbers; variants eager and compiled."""

import tempfile

import sac_gpu_torch as sac
from benchmarks.learner.common import hidden, num_envs
from benchmarks.learner.random_numbers import RandomNumbers
from benchmarks.meter import device, settings, variant

args = sac.Args(
    preset="vanilla", num_envs=num_envs, batch_size=settings["batch_size"],
    updates_per_step=settings["updates_per_step"], actor_hidden=tuple(hidden), critic_hidden=tuple(hidden),
    learning_starts=num_envs * settings["first_steps"], replay_capacity=num_envs * settings["replay_steps"],
    env_kwargs={}, total_timesteps=10**12, eval_episodes=0, device=device, compile=variant == "compiled",
    run_dir=tempfile.mkdtemp(dir="."),
)  # fmt: skip
sac.train(args, lambda env_id, **options: RandomNumbers(settings["first_steps"] + 1, settings["updates_per_step"]))
