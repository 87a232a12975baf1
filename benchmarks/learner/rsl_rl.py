"""rsl_rl's PPO.compute_returns and PPO.update on a storage filled through PPO.act; variants eager, compiled, bf16."""

from types import SimpleNamespace

import torch
from rsl_rl.algorithms import PPO
from tensordict import TensorDict

from benchmarks.adapters.rsl_rl import configuration
from benchmarks.learner.common import action_size, epochs, hidden, minibatches, num_envs, num_steps, obs_size, samples
from benchmarks.meter import device, meter, variant


def observe():
    return TensorDict({"policy": torch.randn(num_envs, obs_size, device=device)}, batch_size=[num_envs], device=device)


config = configuration(
    num_steps, epochs, minibatches, hidden, desired_kl=0.01, entropy_coef=0.0, max_grad_norm=1.0,
    use_clipped_value_loss=False, use_mixed_precision=variant == "bf16",
)  # fmt: skip
config |= dict(multi_gpu=None, torch_compile_mode=None if variant == "eager" else "default")
sizes = SimpleNamespace(num_envs=num_envs, num_actions=action_size)
learner = PPO.construct_algorithm(observe(), sizes, config, device)
learner.train_mode()
with torch.inference_mode():
    for _ in range(num_steps):
        learner.act(observe())
        done = torch.rand(num_envs, device=device) < 0.01
        learner.process_env_step(observe(), torch.randn(num_envs, device=device), done, {})
while True:
    with torch.inference_mode():
        learner.compute_returns(observe())
    learner.update()
    meter.tick(samples)
