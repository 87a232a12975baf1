"""The truth table of generalised advantage estimation, computed by hand, for the tests of every trainer.

One environment, three steps, gamma = lambda = 1/2, so each step further back is weighted by gamma * lambda = 1/4:

    step t                              0    1    2
    reward r                            1    2    3
    value V(s_t)                        2    4    6
    value of the true next observation  4    6    8     (10 if an episode ended: V(final_obs), not V of the reset state)

    delta_t = r_t + gamma * V(next_t) * (1 - terminated_t) - V(s_t)
    A_t     = delta_t + gamma * lambda * (1 - ended_t) * A_{t+1},   ended = terminated or truncated
    return  = A_t + V(s_t)

A time limit (truncated) is bootstrapped with V(final_obs). A real end (terminated) is not, and it wins over truncated.
Either one stops the sum, because what follows belongs to another episode. An invalid step (a quarantined environment)
has advantage 0 and is masked in the loss. It stops the sum too: the steps before it end with their own bootstrap.
"""

GAMMA = 0.5
GAE_LAMBDA = 0.5
REWARDS = [1.0, 2.0, 3.0]
VALUES = [2.0, 4.0, 6.0]

# name, next_values, terminated, truncated, invalid, advantages
CASES = [
    # delta = 1 + 4/2 - 2 = 1, 2 + 6/2 - 4 = 1, 3 + 8/2 - 6 = 1;  A2 = 1, A1 = 1 + 1/4, A0 = 1 + 5/16
    ("running", [4.0, 6.0, 8.0], [0, 0, 0], [0, 0, 0], [0, 0, 0], [1.3125, 1.25, 1.0]),
    # delta1 = 2 - 4 = -2, and A2 does not reach back;  A0 = 1 - 2/4
    ("terminated in the middle", [4.0, 10.0, 8.0], [0, 1, 0], [0, 0, 0], [0, 0, 0], [0.5, -2.0, 1.0]),
    # delta1 = 2 + 10/2 - 4 = 3;  A0 = 1 + 3/4
    ("truncated in the middle", [4.0, 10.0, 8.0], [0, 0, 0], [0, 1, 0], [0, 0, 0], [1.75, 3.0, 1.0]),
    # the same as terminated: nothing follows a real end
    ("both in the middle", [4.0, 10.0, 8.0], [0, 1, 0], [0, 1, 0], [0, 0, 0], [0.5, -2.0, 1.0]),
    # delta2 = 3 - 6 = -3;  A1 = 1 - 3/4, A0 = 1 + 1/16
    ("terminated at the last step", [4.0, 6.0, 10.0], [0, 0, 1], [0, 0, 0], [0, 0, 0], [1.0625, 0.25, -3.0]),
    # delta2 = 3 + 10/2 - 6 = 2;  A1 = 1 + 2/4, A0 = 1 + 6/16
    ("truncated at the last step", [4.0, 6.0, 10.0], [0, 0, 0], [0, 0, 1], [0, 0, 0], [1.375, 1.5, 2.0]),
    ("both at the last step", [4.0, 6.0, 10.0], [0, 0, 1], [0, 0, 1], [0, 0, 0], [1.0625, 0.25, -3.0]),
    # A1 = 0 for any reward and values;  A0 = delta0 = 1
    ("invalid in the middle", [4.0, 10.0, 8.0], [0, 0, 0], [0, 0, 0], [0, 1, 0], [1.0, 0.0, 1.0]),
    # A2 = 0;  A1 = 1, A0 = 1 + 1/4
    ("invalid at the last step", [4.0, 6.0, 10.0], [0, 0, 0], [0, 0, 0], [0, 0, 1], [1.25, 1.0, 0.0]),
]
