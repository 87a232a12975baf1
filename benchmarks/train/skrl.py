# /// script
# dependencies = ["skrl==2.1.1", "torch==2.13.0", "gymnasium[mujoco]==1.4.0", "mujoco==4.0.0"]
# ///
"""skrl's PPO and SequentialTrainer, options as in its Gymnasium examples; variant vecsim: the sizes of ours."""

from skrl import config
from skrl.agents.torch.ppo import PPO
from skrl.envs.wrappers.torch import wrap_env
from skrl.memories.torch import RandomMemory
from skrl.resources.preprocessors.torch import RunningStandardScaler
from skrl.resources.schedulers.torch import KLAdaptiveLR
from skrl.trainers.torch import SequentialTrainer

from benchmarks.adapters.skrl import Envs
from benchmarks.learner.skrl_models import Policy, Value
from benchmarks.meter import device
from benchmarks.train.gymnasium_envs import make_vector
from benchmarks.train.vecsim_envs import make_envs, num_envs, on_vecsim, ours_sizes

config.torch.device = device
num_steps, epochs, minibatches, hidden = 1024, 10, 32, [64, 64]
if on_vecsim:
    num_steps, epochs, minibatches, hidden = ours_sizes
env = Envs(make_envs(num_steps)) if on_vecsim else wrap_env(make_vector(num_steps, "sync"), wrapper="gymnasium")
spaces = dict(observation_space=env.observation_space, action_space=env.action_space, device=device)
agent = PPO(
    models={"policy": Policy(spaces, hidden).to(device), "value": Value(spaces, hidden).to(device)},
    memory=RandomMemory(memory_size=num_steps, num_envs=num_envs, device=device),
    **spaces,
    cfg=dict(
        rollouts=num_steps, learning_epochs=epochs, mini_batches=minibatches, learning_rate=1e-3,
        learning_rate_scheduler=KLAdaptiveLR, learning_rate_scheduler_kwargs={"kl_threshold": 0.008},
        observation_preprocessor=RunningStandardScaler,
        observation_preprocessor_kwargs={"size": env.observation_space, "device": device},
        value_preprocessor=RunningStandardScaler, value_preprocessor_kwargs={"size": 1, "device": device},
        experiment={"write_interval": 0, "checkpoint_interval": 0},
    ),
)  # fmt: skip
SequentialTrainer(
    env=env, agents=agent, cfg={"timesteps": 10**9, "headless": True, "disable_progressbar": True}
).train()
