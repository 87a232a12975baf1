"""The configuration of rsl_rl's PPO, as in its documentation."""


def configuration(num_steps, epochs, minibatches, hidden, **algorithm):
    """algorithm: options of rsl_rl's PPO that have other values than its defaults."""
    network = dict(class_name="MLPModel", hidden_dims=hidden, activation="elu", obs_normalization=True)
    shared = dict(class_name="PPO", num_learning_epochs=epochs, num_mini_batches=minibatches, schedule="adaptive")
    return dict(
        algorithm=shared | algorithm,
        actor=network | dict(distribution_cfg=dict(class_name="GaussianDistribution", init_std=1.0)),
        critic=network,
        obs_groups=dict(actor=["policy"], critic=["policy"]),
        num_steps_per_env=num_steps,
        save_interval=10**9,
    )
