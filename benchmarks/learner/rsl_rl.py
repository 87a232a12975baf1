# /// script
# dependencies = ["rsl-rl-lib==5.5.1", "torch==2.13.0", "gymnasium[mujoco]==1.4.0", "mujoco==4.0.0"]
# ///
"""rsl_rl's PPO.compute_returns and PPO.update on a storage filled through PPO.act; variants eager, compiled, bf16."""

from types import SimpleNamespace

import torch
from rsl_rl.algorithms import PPO
from tensordict import TensorDict

from benchmarks.learner.common import action_size, epochs, hidden, minibatches, num_envs, num_steps, obs_size, samples
from benchmarks.meter import device, meter, variant


def observe():
    return TensorDict({"policy": torch.randn(num_envs, obs_size, device=device)}, batch_size=[num_envs], device=device)


network = dict(class_name="MLPModel", hidden_dims=hidden, activation="elu", obs_normalization=True)
config = dict(
    algorithm=dict(
        class_name="PPO", num_learning_epochs=epochs, num_mini_batches=minibatches, schedule="adaptive",
        desired_kl=0.01, entropy_coef=0.0, max_grad_norm=1.0,
        use_clipped_value_loss=False, use_mixed_precision=variant == "bf16",
    ),
    actor=network | dict(distribution_cfg=dict(class_name="GaussianDistribution", init_std=1.0)),
    critic=network,
    obs_groups=dict(actor=["policy"], critic=["policy"]),
    num_steps_per_env=num_steps,
    multi_gpu=None,
    torch_compile_mode=None if variant == "eager" else "default",
)  # fmt: skip
learner = PPO.construct_algorithm(
    observe(), SimpleNamespace(num_envs=num_envs, num_actions=action_size), config, device
)
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
