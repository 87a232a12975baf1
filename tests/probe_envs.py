"""Tiny vector environments with known answers. Each one tells whether a part of a trainer works.

    constant     one step, reward 1                                   V = 1: the value function learns a constant
    value        one step, reward x, which is observed                V = x: the critic reads the observation
    privileged   one step, reward x, which only the critic sees       V = x: the critic reads critic_obs
    action       one step, reward -(a - x / 2)^2                      a = x / 2: the policy follows the advantage
    delayed      two steps, the second pays -(a_0 - x / 2)^2          a_0 = x / 2: credit goes back through time
    truncation   reward 1 in every step, time limit of 5 steps        V = 1 / (1 - gamma): a time limit is no end
    broken       like action, but environment 0 is quarantined        its NaN must not reach the learner
    recall-k     k + 1 steps, the last pays -(a - x / 2)^2            a = x / 2: the policy remembers x for k steps
    t-maze       a corridor of 8 cells: a > 0 goes on, else -0.1;     the mean return is 1; without memory it is 0
                 at its end the sign of a turns, and x is the side
                 that pays 1; the other pays -1

x is -1 or 1, drawn at reset; observation = (x, age, a_0). The two for memory show x in the first step only, and then
whether the robot is at the end: observation = (x or 0, at the end, 0).
"""

from __future__ import annotations

import dataclasses

import gymnasium
import numpy as np
import torch

import dqn_gpu_torch as dqn
import ppo_gpu_torch as ppo
import sac_gpu_torch as sac

EPISODE_STEPS = {"delayed": 2, "truncation": 5, "t-maze": 40}
CELLS = {"recall-1": 1, "recall-8": 8, "recall-32": 32, "t-maze": 8}  # from the first step to the end
STATE = ("x", "age", "first_action", "episode_return", "cell", "sums")


class ProbeEnv(gymnasium.vector.VectorEnv):
    metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}

    def __init__(self, env_id, num_envs=64, device="cpu", seed=1, **options):
        self.env_id, self.num_envs, self.device, self.options = env_id, num_envs, torch.device(device), options
        box = gymnasium.spaces.Box
        self.single_observation_space = box(-np.inf, np.inf, (3,), np.float32)
        self.single_action_space = box(-2.0, 2.0, (1,), np.float32)
        self.single_critic_space = box(-np.inf, np.inf, (1,), np.float32) if env_id == "privileged" else None
        self.generator = torch.Generator(self.device)
        self.steps_left = None  # a test may set it: KeyboardInterrupt after that many steps
        self.reset(seed=seed)

    def draw(self):
        return torch.randint(0, 2, (self.num_envs,), generator=self.generator, device=self.device) * 2.0 - 1.0

    def observation(self):
        if self.env_id in CELLS:
            return torch.stack([self.x * (self.age == 0), self.at_end().float(), torch.zeros_like(self.x)], 1)
        seen = torch.zeros_like(self.x) if self.env_id == "privileged" else self.x
        return torch.stack([seen, self.age, self.first_action], 1)

    def at_end(self):
        return self.cell == CELLS.get(self.env_id, -1)

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.generator.manual_seed(seed)
        self.x = self.draw()
        self.age, self.first_action, self.episode_return, self.cell = (torch.zeros_like(self.x) for _ in range(4))
        self.sums = torch.zeros(4, device=self.device)  # return, length, episodes, invalid
        return self.observation(), {"critic_obs": self.x[:, None].clone()}

    def step(self, action):
        if self.steps_left is not None:
            self.steps_left -= 1
            if self.steps_left < 0:
                raise KeyboardInterrupt
        a = action[:, 0].clamp(-2.0, 2.0)
        self.first_action = torch.where(self.age == 0, a, self.first_action)
        self.age = self.age + 1
        at_end, goes_on = self.at_end(), (a > 0) | (self.env_id != "t-maze")
        self.cell = self.cell + goes_on
        error = -(self.first_action - self.x / 2).square()
        rewards = dict(value=self.x, privileged=self.x, action=error, broken=error, delayed=error * (self.age == 2))
        rewards |= {"t-maze": torch.where(at_end, self.x * a.sign(), -0.1 * ~goes_on)}
        if self.env_id.startswith("recall"):
            rewards[self.env_id] = -(a - self.x / 2).square() * at_end
        reward = rewards.get(self.env_id, torch.ones_like(self.x))
        ended = at_end if self.env_id in CELLS else self.age == EPISODE_STEPS.get(self.env_id, 1)
        never = torch.zeros_like(ended)
        terminated, truncated = (never, ended) if self.env_id == "truncation" else (ended, never)
        if self.env_id == "t-maze":  # a robot that stands still
            truncated = (self.age == EPISODE_STEPS["t-maze"]) & ~ended
            ended = ended | truncated
        final_obs, final_critic_obs, invalid = self.observation(), self.x[:, None].clone(), never.clone()
        if self.env_id == "broken":
            invalid[0] = True
            reward, terminated = reward.clone(), terminated & ~invalid
            reward[0], final_obs[0] = torch.nan, torch.nan
        self.episode_return = self.episode_return + torch.where(invalid, 0.0, reward)
        counted = ended & ~invalid
        columns = (self.episode_return * counted, self.age * counted, counted, invalid)
        self.sums += torch.stack([x.float().sum() for x in columns])
        fresh = ended | invalid
        self.x = torch.where(fresh, self.draw(), self.x)
        self.age, self.first_action, self.episode_return, self.cell = (
            torch.where(fresh, 0.0, x) for x in (self.age, self.first_action, self.episode_return, self.cell)
        )
        info = dict(final_obs=final_obs, invalid=invalid)
        info |= dict(critic_obs=self.x[:, None].clone(), final_critic_obs=final_critic_obs)
        return self.observation(), reward, terminated, truncated, info

    def pop_statistics(self):
        returns, lengths, episodes, invalid = self.sums.tolist()
        self.sums.zero_()
        count = episodes or float("nan")
        means = dict(episode_return=returns / count, episode_length=lengths / count, success=float("nan"))
        return means | dict(episodes=episodes, invalid=invalid)

    def state_dict(self):
        return {name: getattr(self, name).clone() for name in STATE} | {"generator": self.generator.get_state()}

    def load_state_dict(self, state):
        for name in STATE:
            setattr(self, name, state[name].clone().to(self.device))
        self.generator.set_state(state["generator"])


def probe_args(run_dir, env_id="action", flags=ppo.Args, **changes):
    """Flags of PPO that solve a probe environment in seconds; flags: the dataclass of a trainer."""
    small = dict(num_envs=64, num_steps=8, total_timesteps=40_000, num_minibatches=2, learning_rate=3e-3, gamma=0.9)
    small |= dict(actor_hidden=(32,), critic_hidden=(32,), eval_episodes=1, compile=False, device="cpu")
    small |= dict(checkpoint_every=10**9, log_every=10**9)
    return flags(env_id=env_id, run_dir=run_dir and str(run_dir), **(small | changes))


def sac_args(run_dir, env_id="action", preset="best", **changes):
    """Flags of SAC that solve a probe environment in seconds."""
    small = dict(num_envs=64, total_timesteps=20_000, learning_starts=640, replay_capacity=10_000, batch_size=128)
    small |= dict(updates_per_step=2, actor_hidden=(32,), critic_hidden=(32,), noise_repeat_max=1, gamma=0.9)
    small |= dict(learning_rate=3e-3, learning_rate_final=3e-3, eval_episodes=1, compile=False, device="cpu")
    small |= dict(tau=0.05, checkpoint_every=10**9, log_every=10**9, run_dir=run_dir and str(run_dir))
    return dataclasses.replace(sac.task_defaults(env_id, preset), **(small | changes))


OF_ALGORITHM = dict(
    dqn=dict(learning_starts=640, replay_capacity=10_000, batch_size=128, updates=2, tau=0.05),
    pqn=dict(num_steps=8, learning_starts=0, batch_size=128, update_epochs=2),
)


def dqn_args(run_dir, env_id="action", algorithm="dqn", **changes):
    """Flags that solve a probe environment in seconds. Of 9 bins over -2 to 2, two are the best actions."""
    small = dict(num_envs=64, total_timesteps=20_000, bins=9, n_step=1, critic_hidden=(32,), gamma=0.9)
    small |= dict(learning_rate=3e-3, learning_rate_final=3e-3, eval_episodes=1, compile=False, device="cpu")
    small |= dict(checkpoint_every=10**9, log_every=10**9, run_dir=run_dir and str(run_dir))
    small |= OF_ALGORITHM[algorithm]
    return dataclasses.replace(dqn.task_defaults(env_id, algorithm), **(small | changes))


def mortal(steps, kind=ProbeEnv):
    """Makes probe environments that raise KeyboardInterrupt after the compiling step and `steps` more."""

    def make(*arguments, **options):
        env = kind(*arguments, **options)
        env.steps_left = 1 + steps
        return env

    return make


def documented_a2c():
    """The flags of the A2C command in ppo_gpu_torch's docstring."""
    (command,) = [line for line in ppo.__doc__.splitlines() if "--clip-coef inf" in line]
    words = command.split()
    assert words[:2] == ["python", "ppo_gpu_torch.py"]
    return ppo.parse_args(words[2:])
