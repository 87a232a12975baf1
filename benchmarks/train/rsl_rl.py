"""rsl_rl's OnPolicyRunner: the networks of SB3's defaults, half SB3's batch, rsl_rl's epochs and minibatches.

On vecsim (variant vecsim) it has the sizes of ours, and its networks are compiled, as ours are."""

from rsl_rl.runners import OnPolicyRunner

from benchmarks.adapters.rsl_rl import Envs, configuration
from benchmarks.meter import device
from benchmarks.train.vecsim_envs import make_envs, on_vecsim, ours_sizes

num_steps, epochs, minibatches, hidden = 1024, 5, 4, [64, 64]
if on_vecsim:
    num_steps, epochs, minibatches, hidden = ours_sizes
config = configuration(num_steps, epochs, minibatches, hidden, entropy_coef=0.0)
config |= dict(torch_compile_mode="default" if on_vecsim else None, check_for_nan=False)
OnPolicyRunner(Envs(make_envs(num_steps)), config, device=device).learn(10**9)
