"""skrl on vecsim: the adapter `Envs`, and a training of InvertedPendulum-v5 with it.

    pip install skrl     # environments.py has the version that is tested
    python -m benchmarks.adapters.skrl [iterations]

By default it makes 655,360 environment steps. The policy then scores 1,000 in all of 100 episodes; all this took 97 s
on one AMD EPYC core."""

from skrl.envs.wrappers.torch import Wrapper
from skrl.trainers.torch import SequentialTrainer

from benchmarks.learner.skrl_agent import make_agent


class Envs(Wrapper):
    """A `VecSim` for skrl: spaces of one environment, rewards and ends as columns."""

    observation_space = property(lambda self: self._env.single_observation_space)
    action_space = property(lambda self: self._env.single_action_space)
    state = render = close = lambda self: None

    def reset(self):
        return self._env.reset(seed=1)

    def step(self, actions):
        obs, reward, terminated, truncated, info = self._env.step(actions)
        return obs, reward[:, None], terminated[:, None], truncated[:, None], info


def train(env, iterations, num_steps=32):
    env = Envs(env)
    spaces = dict(observation_space=env.observation_space, action_space=env.action_space, device=env.device)
    agent = make_agent(spaces, env.num_envs, num_steps, epochs=5, minibatches=4, hidden=[64, 64])
    limits = {"timesteps": iterations * num_steps, "headless": True, "disable_progressbar": True}
    SequentialTrainer(env=env, agents=agent, cfg=limits).train()
    agent.enable_training_mode(False)
    return lambda obs, started: agent.act(obs, None, timestep=0, timesteps=1)[1]["mean_actions"]


if __name__ == "__main__":
    from benchmarks.adapters.example import run

    run(train, iterations=40)
