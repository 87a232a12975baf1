"""rl_games' continuous PPO agent on a given vector environment; options as in its configurations for Ant."""

from rl_games.algos_torch.a2c_continuous import A2CAgent
from rl_games.common.algo_observer import DefaultAlgoObserver
from rl_games.common.tr_helpers import DefaultRewardsShaper


def make_agent(vec_env, num_actors, horizon, minibatch, epochs, hidden, device, memory_width=None, **more):
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


def describe_spaces(observation_space, action_space):
    return dict(observation_space=observation_space, action_space=action_space, agents=1, value_size=1)
