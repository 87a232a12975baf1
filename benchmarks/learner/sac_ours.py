"""sac_gpu_torch.train on an environment of random numbers; variants eager and compiled."""

import tempfile

import sac_gpu_torch as sac
from benchmarks.learner.common import hidden, num_envs
from benchmarks.learner.random_numbers import RandomNumbers
from benchmarks.meter import device, settings, variant

flags = ["--preset", "vanilla", "--device", device, "--num-envs", num_envs, "--batch-size", settings["batch_size"]]
flags += ["--updates-per-step", settings["updates_per_step"], "--actor-hidden", *hidden, "--critic-hidden", *hidden]
flags += ["--learning-starts", num_envs * settings["first_steps"], "--total-timesteps", 10**12, "--eval-episodes", 0]
flags += ["--replay-capacity", num_envs * settings["replay_steps"], "--run-dir", tempfile.mkdtemp(dir=".")]
flags += ["--no-compile"] if variant == "eager" else []
args = sac.parse_args([str(flag) for flag in flags])
sac.train(args, lambda env_id, **options: RandomNumbers(settings["first_steps"] + 1, settings["updates_per_step"]))
