"""Swing up a pole on a cart and balance it: a small task for vecsim_torch.py. Copy me.

    python ppo_gpu_torch.py --env-id tasks/cartpole_swingup.py:SwingUp --num-envs 512 --gamma 0.98 \
        --num-minibatches 8 --actor-hidden 64 64 --critic-hidden 64 64 --solver-iterations 2 \
        --total-timesteps 2000000 --env-kwargs max_episode_steps 250

This takes 19 to 25 seconds on one core of an AMD EPYC and ends with a return of 214 to 219 of 250 (three seeds). The
pole starts at any angle, so that a beginner also sees poles that stand. The reward of a step is at most 1, for a pole
that stands still and upright over the middle of the rail. A step is 40 ms. README.md explains how to write a task.
To start all poles hanging down, add `start_range 0:0` to the options after --env-kwargs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

import vecsim_torch
from vecsim_torch import Range, scaled

MJCF = """
<mujoco model="cartpole">
  <option timestep="0.02"/>
  <default><geom contype="0" conaffinity="0"/></default>
  <worldbody>
    <light pos="0 0 4"/>
    <camera name="track" pos="0 -5 0.6" xyaxes="1 0 0 0 0 1"/>
    <geom type="capsule" fromto="-2 0 0 2 0 0" size="0.02" rgba="0.5 0.5 0.5 1"/>
    <body name="cart">
      <joint name="slider" type="slide" axis="1 0 0" range="-1.8 1.8" damping="0.0005"/>
      <geom type="box" size="0.2 0.1 0.1" mass="1" rgba="0.3 0.4 0.6 1"/>
      <body name="pole">
        <joint name="hinge" axis="0 1 0" damping="0.000002"/>
        <geom type="capsule" fromto="0 0 0 0 0 -1" size="0.045" mass="0.1" rgba="0.7 0.5 0.2 1"/>
        <site name="tip" pos="0 0 -1"/>
      </body>
    </body>
  </worldbody>
  <actuator><motor name="push" joint="slider" gear="10" ctrlrange="-1 1"/></actuator>
</mujoco>
"""


@dataclass(frozen=True)
class SwingUp(vecsim_torch.Task):
    frame_skip: int = 2
    reset_noise_scale: float = 0.1
    start_range: Range = (-math.pi, math.pi)  # rad, angles of the pole at the start; 0 hangs down
    calm_spin: float = 5.0  # rad/s
    effort_weight: float = 0.02

    random_rows = 1  # of `noise` in `begin`
    averaged = ("upright",)  # its mean is in every line of the log

    def source(self):
        return MJCF

    def begin(self, model, qpos, noise, ended, limit):
        return torch.cat((qpos[:1], qpos[1:] + scaled(noise, self.start_range))), {}

    def observe(self, model, p, sensed):
        slider, angle = p.qpos[model.qpos_of("slider")], p.qpos[model.qpos_of("hinge")]
        return {"slider": slider, "angle": torch.cat((angle.cos(), angle.sin())), "qvel": p.qvel}

    def reward(self, model, p, sensed, action, velocity):
        cart, spin = p.qpos[model.qpos_of("slider")][0], p.qvel[model.dof_of("hinge")][0]
        upright = (1 + model.pose(p, site="tip").position[2]) / 2  # the pole is 1 m long
        centred, calm = 1 / (1 + cart.square()), 1 / (1 + (spin / self.calm_spin).square())
        return {
            "reward_balance": upright * centred * (1 + calm) / 2,  # a pole that whirls earns half
            "reward_effort": -self.effort_weight * action[0].square(),
            "upright": upright,
        }
