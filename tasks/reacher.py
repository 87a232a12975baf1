"""A planar arm whose fingertip follows a moving goal: a task with memory for vecsim_torch.py. Copy me.

    python ppo_gpu_torch.py --env-id tasks/reacher.py:Reacher --num-envs 512 --num-minibatches 4 \
        --total-timesteps 2000000

On one AMD EPYC core this takes 83 s. It then scores 886 +- 62 in episodes of 1,000 steps, where 1,000 is out of reach,
because the arm needs time to arrive. While it explores, the fingertip is 2 cm from the goal on average.

The goal moves on a circle around the shoulder. Each episode draws its radius and speed. They and the goal's angle are
the memory; `remember` moves the goal on. The arm sees where the goal is, and only the critic sees how fast it moves.
README.md explains how to write a task.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

import vecsim_torch
from vecsim_torch import Range, scaled

MJCF = """
<mujoco model="arm">
  <option timestep="0.005" gravity="0 0 0"/>
  <default>
    <geom type="capsule" size="0.015" contype="0" conaffinity="0" density="1000" rgba="0.3 0.4 0.6 1"/>
    <joint axis="0 0 1" damping="0.05" armature="0.005"/>
    <motor ctrlrange="-1 1"/>
  </default>
  <worldbody>
    <light pos="0 0 2"/>
    <camera name="track" pos="0 0 1.2"/>
    <body name="upper">
      <joint name="shoulder"/>
      <geom fromto="0 0 0 0.2 0 0"/>
      <body name="lower" pos="0.2 0 0">
        <joint name="elbow" range="-160 160"/>
        <geom fromto="0 0 0 0.15 0 0"/>
        <body name="hand" pos="0.15 0 0">
          <joint name="wrist" range="-120 120"/>
          <geom fromto="0 0 0 0.1 0 0"/>
          <site name="fingertip" pos="0.1 0 0"/>
        </body>
      </body>
    </body>
  </worldbody>
  <actuator>
    <motor joint="shoulder" gear="0.5"/>
    <motor joint="elbow" gear="0.3"/>
    <motor joint="wrist" gear="0.1"/>
  </actuator>
</mujoco>
"""


@dataclass(frozen=True)
class Reacher(vecsim_torch.Task):
    frame_skip: int = 4
    reset_noise_scale: float = 0.5  # rad
    goal_radius: Range = (0.1, 0.4)  # m from the shoulder
    goal_speed: Range = (-1.0, 1.0)  # rad/s on its circle
    tolerance: float = 0.05  # m
    effort_weight: float = 0.02

    random_rows = 3  # of `noise` in `begin`: radius, angle and speed of the goal
    averaged = ("distance",)  # its mean is in every line of the log

    def source(self):
        return MJCF

    def begin(self, model, qpos, noise, ended, limit):
        angle, speed = 2 * math.pi * noise[1:2], scaled(noise[2:3], self.goal_speed)
        return qpos, {"radius": scaled(noise[:1], self.goal_radius), "angle": angle, "speed": speed}

    def remember(self, model, p, sensed, action, noise):
        seconds = self.frame_skip * model.timestep
        return p.memory | {"angle": p.memory["angle"] + p.memory["speed"] * seconds}

    def sense(self, model, p):
        return {"position": model.pose(p, site="fingertip").position[:2]}

    def goal(self, p):
        """Where the goal is now, (2, N) m."""
        angle = p.memory["angle"]
        return p.memory["radius"] * torch.cat((angle.cos(), angle.sin()))

    def observe(self, model, p, sensed):
        joints, goal = torch.cat((p.qpos.cos(), p.qpos.sin())), self.goal(p)
        return {"joints": joints, "qvel": p.qvel, "goal": goal, "to_goal": goal - sensed["position"]}

    def privileged(self, model, p, sensed):
        return self.observe(model, p, sensed) | {"goal_speed": p.memory["speed"]}

    def reward(self, model, p, sensed, action, velocity):
        distance = torch.hypot(*(self.goal(p) - sensed["position"]))
        return {
            "reward_distance": -distance,
            "reward_close": torch.exp(-(distance / self.tolerance).square()),
            "reward_effort": -self.effort_weight * action.square().sum(0),
            "distance": distance,
        }
