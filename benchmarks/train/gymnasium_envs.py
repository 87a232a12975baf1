"""Gymnasium environments that count their steps and call the meter where an iteration begins."""

import gymnasium
import mujoco

from benchmarks.meter import meter, settings

num_envs = settings["num_envs"]


def make_one(*wrappers):
    env = gymnasium.make(settings["env_id"], **settings["env_kwargs"])
    if "integrator" in settings:  # else that of the task's MJCF: RK4 for all tasks but HalfCheetah
        env.unwrapped.model.opt.integrator = getattr(mujoco.mjtIntegrator, f"mjINT_{settings['integrator'].upper()}")
    for wrapper in wrappers:
        env = wrapper(env)
    return env


class CountedSteps(gymnasium.vector.VectorWrapper):
    def __init__(self, env, num_steps):
        super().__init__(env)
        self.num_steps, self.taken = num_steps, 0

    def step(self, actions):
        if self.taken and self.taken % self.num_steps == 0:
            meter.tick(self.num_steps * self.num_envs)
        self.taken += 1
        return self.env.step(actions)


def make_vector(num_steps, kind, *wrappers):
    functions, options = (
        [lambda: make_one(*wrappers)] * num_envs,
        dict(autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP),
    )
    if kind == "async":
        return CountedSteps(gymnasium.vector.AsyncVectorEnv(functions, context="fork", **options), num_steps)
    return CountedSteps(gymnasium.vector.SyncVectorEnv(functions, **options), num_steps)
