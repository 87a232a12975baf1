"""Gymnasium environments that count their steps and call the meter where an iteration begins."""

import gymnasium
import mujoco

from benchmarks.meter import count_steps, settings

num_envs = settings["num_envs"]


def make_one(*wrappers):
    env = gymnasium.make(settings["env_id"], **settings["env_kwargs"])
    if "integrator" in settings:  # else that of the task's MJCF: RK4 for all tasks but HalfCheetah and Pusher
        env.unwrapped.model.opt.integrator = getattr(mujoco.mjtIntegrator, f"mjINT_{settings['integrator'].upper()}")
    for wrapper in wrappers:
        env = wrapper(env)
    return env


def make_vector(num_steps, kind, *wrappers):
    functions = [lambda: make_one(*wrappers)] * num_envs
    options = dict(autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP)
    if kind == "async":
        envs = gymnasium.vector.AsyncVectorEnv(functions, context="fork", **options)
    else:
        envs = gymnasium.vector.SyncVectorEnv(functions, **options)
    return count_steps(envs, num_steps, num_steps * num_envs)
