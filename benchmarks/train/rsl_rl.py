# /// script
# dependencies = ["rsl-rl-lib==5.5.1", "torch==2.13.0", "gymnasium[mujoco]==1.4.0", "mujoco==4.0.0"]
# ///
"""rsl_rl's OnPolicyRunner: the batch and networks of SB3's defaults, rsl_rl's epochs and minibatches.

On vecsim (variant vecsim) it has the sizes of ours, and its networks are compiled, as ours are."""

from rsl_rl.runners import OnPolicyRunner

from benchmarks.adapters.rsl_rl import Envs
from benchmarks.meter import device
from benchmarks.train.vecsim_envs import make_envs, on_vecsim, ours_sizes

num_steps, epochs, minibatches, hidden = 1024, 5, 4, [64, 64]
if on_vecsim:
    num_steps, epochs, minibatches, hidden = ours_sizes
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
OnPolicyRunner(Envs(make_envs(num_steps)), config, device=device).learn(10**9)
