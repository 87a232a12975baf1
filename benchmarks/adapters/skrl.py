# /// script
# dependencies = ["skrl==2.1.1", "torch==2.13.0", "gymnasium[mujoco]==1.4.0", "mujoco==4.0.0"]
# ///
"""skrl on vecsim: the adapter `Envs`, and a training of InvertedPendulum-v5 with it.

    python -m benchmarks.adapters.skrl [iterations]

By default it makes 655,360 environment steps. The policy then scores 1,000 in all of 100 episodes; all this took 97 s
on one AMD EPYC core."""

import sys

import torch
from skrl.agents.torch.ppo import PPO
from skrl.envs.wrappers.torch import Wrapper
from skrl.memories.torch import RandomMemory
from skrl.resources.preprocessors.torch import RunningStandardScaler
from skrl.resources.schedulers.torch import KLAdaptiveLR
from skrl.trainers.torch import SequentialTrainer

import vecsim_torch
from benchmarks.learner.skrl_models import Policy, Value


class Envs(Wrapper):
    """A `VecSim` for skrl: spaces of one environment, rewards and ends as columns."""

    observation_space = property(lambda self: self._env.single_observation_space)
    action_space = property(lambda self: self._env.single_action_space)

    def reset(self):
        return self._env.reset(seed=1)

    def step(self, actions):
        obs, reward, terminated, truncated, info = self._env.step(actions)
        return obs, reward[:, None], terminated[:, None], truncated[:, None], info

    def state(self):
        return None

    def render(self):
        pass

    def close(self):
        pass


def train(iterations, num_steps=32):
    env = Envs(vecsim_torch.make("InvertedPendulum-v5", num_envs=512, integrator="euler", random_initial_ages=True))
    spaces = dict(observation_space=env.observation_space, action_space=env.action_space, device=env.device)
    agent = PPO(
        models={"policy": Policy(spaces, [64, 64]), "value": Value(spaces, [64, 64])},
        memory=RandomMemory(memory_size=num_steps, num_envs=env.num_envs, device=env.device),
        **spaces,
        cfg=dict(
            rollouts=num_steps, learning_epochs=5, mini_batches=4, learning_rate=1e-3,
            learning_rate_scheduler=KLAdaptiveLR, learning_rate_scheduler_kwargs={"kl_threshold": 0.01},
            observation_preprocessor=RunningStandardScaler,
            observation_preprocessor_kwargs={"size": env.observation_space, "device": env.device},
            value_preprocessor=RunningStandardScaler, value_preprocessor_kwargs={"size": 1, "device": env.device},
            experiment={"write_interval": 0, "checkpoint_interval": 0},
        ),
    )  # fmt: skip
    limits = {"timesteps": iterations * num_steps, "headless": True, "disable_progressbar": True}
    SequentialTrainer(env=env, agents=agent, cfg=limits).train()
    agent.enable_training_mode(False)
    return lambda obs, started: agent.act(obs, None, timestep=0, timesteps=1)[1]["mean_actions"]


if __name__ == "__main__":
    torch.manual_seed(1)
    act = train(int(sys.argv[1]) if len(sys.argv) > 1 else 40)
    score = vecsim_torch.evaluate(vecsim_torch.make("InvertedPendulum-v5", num_envs=100), act, seed=1)
    print("score:", vecsim_torch.describe(score))
