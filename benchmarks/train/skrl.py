"""skrl's PPO and SequentialTrainer, options as in its Gymnasium examples; variant vecsim: the sizes of ours."""

from skrl import config
from skrl.envs.wrappers.torch import wrap_env
from skrl.trainers.torch import SequentialTrainer

from benchmarks.adapters.skrl import Envs
from benchmarks.learner.skrl_agent import make_agent
from benchmarks.meter import device
from benchmarks.train.gymnasium_envs import make_vector
from benchmarks.train.vecsim_envs import make_envs, num_envs, on_vecsim, ours_sizes

config.torch.device = device
num_steps, epochs, minibatches, hidden = 1024, 10, 32, [64, 64]
if on_vecsim:
    num_steps, epochs, minibatches, hidden = ours_sizes
env = Envs(make_envs(num_steps)) if on_vecsim else wrap_env(make_vector(num_steps, "sync"), wrapper="gymnasium")
spaces = dict(observation_space=env.observation_space, action_space=env.action_space, device=device)
agent = make_agent(spaces, num_envs, num_steps, epochs, minibatches, hidden, desired_kl=0.008)
limits = {"timesteps": 10**9, "headless": True, "disable_progressbar": True}
SequentialTrainer(env=env, agents=agent, cfg=limits).train()
