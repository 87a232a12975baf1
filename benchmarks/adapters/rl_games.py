"""rl_games on vecsim: the adapter `Envs`, and a training of InvertedPendulum-v5 with it.

    pip install rl-games     # environments.py has the version that is tested
    python -m benchmarks.adapters.rl_games [iterations]

By default it makes 655,360 environment steps. The policy then scores 1,000 in all of 100 episodes; all this took 102 s
on one AMD EPYC core."""

import tempfile

from rl_games.algos_torch.a2c_continuous import A2CAgent
from rl_games.common.algo_observer import DefaultAlgoObserver
from rl_games.common.ivecenv import IVecEnv
from rl_games.common.tr_helpers import DefaultRewardsShaper


class Envs(IVecEnv):
    """A `VecSim` for rl_games, which maps actions of -1 and 1 to the ends of the action range."""

    def __init__(self, env):
        self.env = env

    def get_env_info(self):
        spaces = dict(observation_space=self.env.single_observation_space, action_space=self.env.single_action_space)
        return spaces | dict(agents=1, value_size=1)

    def reset(self):
        return self.env.reset(seed=1)[0]

    def step(self, actions):
        obs, reward, terminated, truncated, _ = self.env.step(actions)
        return obs, reward, terminated | truncated, {"time_outs": truncated}


def make_agent(vec_env, num_actors, horizon, minibatch, epochs, hidden, device, memory_width=None, **more):
    """rl_games' continuous PPO agent; options as in its configurations for Ant."""
    network = dict(
        name="actor_critic", separate=True,
        space=dict(continuous=dict(
            mu_activation="None", sigma_activation="None", mu_init=dict(name="default"),
            sigma_init=dict(name="const_initializer", val=0), fixed_sigma=True,
        )),
        mlp=dict(units=hidden, activation="elu", initializer=dict(name="default")),
    )  # fmt: skip
    if memory_width:
        order = dict(before_mlp=True, concat_input=False, concat_output=True)
        network["rnn"] = dict(name="gru", units=memory_width, layers=1, layer_norm=False) | order
        more["seq_length"] = horizon
    config = dict(
        name="benchmark", env_name="benchmark", env_info=vec_env.get_env_info(), vec_env=vec_env, device=device,
        num_actors=num_actors, horizon_length=horizon, minibatch_size=minibatch, mini_epochs=epochs,
        normalize_input=True, normalize_value=True, normalize_advantage=True, reward_shaper=DefaultRewardsShaper(),
        gamma=0.99, tau=0.95, learning_rate=3e-4, lr_schedule="adaptive", kl_threshold=0.008, e_clip=0.2,
        clip_value=False, critic_coef=2, entropy_coef=0.0, bounds_loss_coef=1e-4, truncate_grads=True, grad_norm=1.0,
        features=dict(observer=DefaultAlgoObserver()), print_stats=False, save_best_after=10**9,
        **more,
    )  # fmt: skip
    return A2CAgent("benchmark", dict(network=network, model=dict(name="continuous_a2c_logstd"), config=config))


def train(env, iterations, num_steps=32):
    files = dict(max_epochs=iterations, train_dir=tempfile.mkdtemp())
    batch = env.num_envs * num_steps
    agent = make_agent(Envs(env), env.num_envs, num_steps, batch // 4, 5, [64, 64], str(env.device), **files)
    agent.train()
    return lambda obs, started: agent.preprocess_actions(agent.get_action_values({"obs": obs})["mus"])


if __name__ == "__main__":
    from benchmarks.adapters.example import run

    run(train, iterations=40)
