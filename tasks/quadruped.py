"""A quadruped that follows velocity commands, on flat ground and on rough terrain: a task for vecsim_torch.py.

    python ppo_gpu_torch.py --env-id Quadruped-Flat
    python ppo_distill_teacher_student.py --env-id Quadruped-Rough
    python ppo_gpu_torch.py --env-id tasks/quadruped.py:Rough       # the same class, named as you would name your own

    env = vecsim_torch.make("Quadruped-Rough", num_envs=4096, device="cuda", terrain_rows=10, randomize=True)
    twin = gymnasium.make("vecsim_torch:vecsim/Quadruped-Flat")     # one robot in MuJoCo C

Copy this file to start a task of your own: subclass `vecsim_torch.Task`, return your MJCF from `source`, fill in
`observe`, `reward` and `healthy`, and give the trainers `--env-id my_task.py:MyTask`.

The robot is Unitree's Go1 in spheres and capsules. Task and rewards follow Rudin et al. 2022 (Learning to Walk in
Minutes, arXiv:2109.11978), the combination of rewards and penalties follows Ji et al. 2022 (arXiv:2202.05481).

Glossary
    N               number of robots, the last axis of every tensor
    noise           (rows, N) random numbers in [0, 1)
    command         (3, N) the speeds to follow: forward m/s, sideways m/s (left is positive), turning rad/s
    heading         (1, N) rad, the direction to walk in, as an angle from the world's x axis
    memory          quantities that a robot carries from one control step to the next
    tile            a square of terrain, 8 m wide. Its row is its difficulty, called the level; its column is its type
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import gymnasium
import mujoco
import numpy as np
import torch
from torch import Tensor

import vecsim_torch
from vecsim_torch import Measured, Model, Range, Task, Terrain, sample_terrain, scaled

# ----------------------------------------------------------------------------------------------------------------------
# The robot
# ----------------------------------------------------------------------------------------------------------------------

TIMESTEP = 0.005  # s, of the physics


def quadruped_mjcf() -> str:
    """MJCF of a Go1 with the maker's masses, inertias, link lengths, joint ranges and torque limits.

    Sources: github.com/unitreerobotics/unitree_ros, robots/go1_description; mujoco_menagerie/unitree_go1. The servos
    have gains of 35 N m/rad and 0.5 N m s/rad. Joint damping replaces Menagerie's gear friction of 0.2 N m. The robot
    touches the ground, but not itself.
    """
    legs, actuators = "", ""
    for leg, front, left in (("FR", 1, -1), ("FL", 1, 1), ("RR", -1, -1), ("RL", -1, 1)):
        legs += f"""
      <body name="{leg}_hip" pos="{0.1881 * front} {0.04675 * left} 0">
        <inertial pos="{-0.0049166 * front} {-0.00762615 * left} -8.865e-05" mass="0.68" fullinertia="0.00039938
          0.00073342 0.00046842 {-1.459e-05 * front * left} {1.2461e-06 * front} {1.5752e-06 * left}"/>
        <joint name="{leg}_hip" axis="1 0 0" range="-0.863 0.863"/>
        <body name="{leg}_thigh" pos="0 {0.08 * left} 0">
          <inertial pos="-0.00304722 {-0.019315 * left} -0.0305004" mass="1.009" fullinertia="0.0045988
            0.0046892 0.00081745 {6.1374e-05 * left} -0.00022753 {0.00061081 * left}"/>
          <joint name="{leg}_thigh" axis="0 1 0" range="-0.686 4.501"/>
          <geom name="{leg}_thigh" size="0.02" fromto="0 0 0 -0.01 0 -0.2"/>
          <body name="{leg}_calf" pos="0 0 -0.213">
            <inertial pos="0.00429862 0.000976676 -0.146197" mass="0.195862" fullinertia="0.0014845
              0.0014976 3.6068e-05 -6.1862e-07 -1.772e-05 -3.5663e-06"/>
            <joint name="{leg}_calf" axis="0 1 0" range="-2.818 -0.888"/>
            <geom name="{leg}_calf" size="0.013" fromto="0.01 0 -0.06 0.01 0 -0.15"/>
            <geom name="{leg}_foot" type="sphere" size="0.023" pos="0 0 -0.213"/>
          </body>
        </body>
      </body>"""
        for joint, torque in (("hip", 23.7), ("thigh", 23.7), ("calf", 35.55)):
            name = f"{leg}_{joint}"
            actuators += f'<position name="{name}" joint="{name}" forcerange="{-torque} {torque}"/>\n    '
    return f"""<mujoco model="quadruped">
  <compiler angle="radian" autolimits="true"/>
  <option timestep="{TIMESTEP}" integrator="implicitfast"/>
  <default>
    <geom type="capsule" contype="0" conaffinity="1" friction="1 0.005 0.0001" rgba="0.4 0.4 0.45 1"/>
    <joint damping="0.1" armature="0.01"/>
    <position kp="35" kv="0.5" inheritrange="1"/>
  </default>
  <worldbody>
    <light pos="0 0 5" directional="true"/>
    <geom name="floor" type="plane" size="0 0 0.05" contype="1" conaffinity="0"/>
    <body name="trunk" pos="0 0 0.29">
      <camera name="track" mode="trackcom" pos="0 -1.6 0.7" xyaxes="1 0 0 0 0.4 1"/>
      <inertial pos="0.0223 0.002 -0.0005" mass="5.204"
        fullinertia="0.016813 0.06301 0.071655 -0.00022968 -0.00029455 -4.1873e-05"/>
      <freejoint/>
      <geom name="trunk_right" size="0.057" fromto="-0.125 -0.04 0 0.125 -0.04 0"/>
      <geom name="trunk_left" size="0.057" fromto="-0.125 0.04 0 0.125 0.04 0"/>
      <geom name="trunk_head" size="0.04" fromto="0.25 -0.04 0 0.25 0.04 0"/>{legs}
    </body>
  </worldbody>
  <actuator>
    {actuators}</actuator>
  <keyframe>
    <key name="home" qpos="0 0 0.29 1 0 0 0 {"0 0.9 -1.8 " * 4}" ctrl="{"0 0.9 -1.8 " * 4}"/>
  </keyframe>
</mujoco>"""


def yaw_of(rotation: Tensor) -> Tensor:
    """Direction (N,) rad that a robot faces, seen from above, from its rotation matrix (3, 3, N)."""
    return torch.atan2(rotation[1, 0], rotation[0, 0])


# ----------------------------------------------------------------------------------------------------------------------
# Terrain: a grid of tiles, difficulty in rows along x, type in columns along y
# ----------------------------------------------------------------------------------------------------------------------

TERRAIN_TYPES = ("slope", "rough slope", "stairs up", "stairs down", "blocks")
TERRAIN_SHARES = (0.1, 0.1, 0.35, 0.25, 0.2)  # of the columns
TILE = 8.0  # m, side of a tile
CELL = 0.1  # m, from one height to the next
POINTS = round(TILE / CELL)  # cells along the side of a tile
BORDER = round(2.0 / CELL)  # cells of level ground around all tiles


def tile_heights(kind: str, difficulty: float, inward: bool, rng: np.random.Generator) -> np.ndarray:
    """Heights (POINTS + 1, POINTS + 1) m of one tile. The edge is at height zero.

    kind: one of TERRAIN_TYPES. difficulty: from 0, level ground, to 1. All heights are proportional to it. At 1,
    slopes rise by 0.4 m per metre, roughness is +-6 cm, stairs have steps of 23 cm every 31 cm, and blocks are up to
    25 cm high or deep. inward: a slope climbs towards its edge, not towards its middle.
    "stairs up" lead out of a pit, "stairs down" lead down from a mound. A riser is one cell wide. The ground within 1 m
    of the middle is level, except for roughness, so that robots can start there.
    """
    from_middle = np.abs(np.arange(POINTS + 1) - POINTS / 2) * CELL
    ring = np.maximum(from_middle[:, None], from_middle[None, :])  # m from the middle, along the square's rings
    to_edge = TILE / 2 - np.maximum(ring, 1.0)
    if kind in ("slope", "rough slope"):
        heights = 0.4 * difficulty * to_edge * (-1 if inward else 1)
        if kind == "rough slope":
            heights = heights + roughness(0.06 * difficulty, rng)
    elif kind in ("stairs up", "stairs down"):
        steps = np.ceil(to_edge / 0.31)
        heights = 0.23 * difficulty * steps * (-1 if kind == "stairs up" else 1)
    else:
        heights = np.zeros_like(ring)
        tallest = 0.25 * difficulty
        for _ in range(20):
            width, depth = rng.integers(round(1 / CELL), round(2 / CELL), 2)
            i, j = rng.integers(1, POINTS - width), rng.integers(1, POINTS - depth)
            heights[i : i + width, j : j + depth] = tallest * rng.choice((-1.0, -0.5, 0.5, 1.0))
        heights[ring <= 1.0] = 0
    return heights


def roughness(amplitude: float, rng: np.random.Generator) -> np.ndarray:
    """Heights (POINTS + 1, POINTS + 1) m: random at every second point, linear in between, zero at the edge."""
    coarse = amplitude * rng.uniform(-1, 1, (POINTS // 2 + 1, POINTS // 2 + 1))
    coarse[[0, -1], :] = coarse[:, [0, -1]] = 0
    fine = np.zeros((POINTS + 1, POINTS + 1))
    fine[::2, ::2] = coarse
    fine[1::2] = 0.5 * (fine[:-1:2] + fine[2::2])
    fine[:, 1::2] = 0.5 * (fine[:, :-1:2] + fine[:, 2::2])
    return fine


def build_terrain(rows: int, columns: int, seed: int) -> Terrain:
    """Terrain of rows x columns tiles, as numpy arrays. Its `origins` are the centres of the tiles, row by row.

    Difficulty grows evenly from 0 in the first row to 1 in the last; a single row is level. Columns are divided among
    TERRAIN_TYPES by TERRAIN_SHARES.
    """
    heights = np.zeros((rows * POINTS + 2 * BORDER + 1, columns * POINTS + 2 * BORDER + 1))
    origins = np.zeros((rows * columns, 3))
    kinds = np.searchsorted(np.cumsum(TERRAIN_SHARES), (np.arange(columns) + 0.5) / columns)
    for row in range(rows):
        for column in range(columns):
            rng = np.random.default_rng((seed, row, column))
            tile = tile_heights(TERRAIN_TYPES[kinds[column]], row / max(rows - 1, 1), column % 2 == 0, rng)
            i, j = BORDER + row * POINTS, BORDER + column * POINTS
            heights[i : i + POINTS + 1, j : j + POINTS + 1] = tile
            middle = tile[POINTS // 2, POINTS // 2]
            origins[row * columns + column] = (row + 0.5) * TILE, (column + 0.5) * TILE, middle
    return Terrain(heights, CELL, (-BORDER * CELL, -BORDER * CELL), origins)


def height_scan(terrain: Terrain, position: Tensor, yaw: Tensor) -> Tensor:
    """What a robot sees of the ground: (187, N) m, clipped to +-1.

    position: (3, N) m of the trunk; yaw: (N,) rad. The scan covers 17 points forward times 11 points sideways around
    the robot, 0.1 m apart. Each number is the trunk's height over the ground there, minus a standing height of 0.3 m.
    """
    forward = torch.arange(-8, 9, device=yaw.device, dtype=yaw.dtype)[:, None, None] * 0.1
    sideways = torch.arange(-5, 6, device=yaw.device, dtype=yaw.dtype)[None, :, None] * 0.1
    x = position[0] + torch.cos(yaw) * forward - torch.sin(yaw) * sideways
    y = position[1] + torch.sin(yaw) * forward + torch.cos(yaw) * sideways
    ground = sample_terrain(terrain, x, y)[0].flatten(0, 1)
    return (position[2] - 0.3 - ground).clamp(-1, 1)


def next_level(level: Tensor, walked: Tensor, commanded: Tensor, seconds: Tensor, rows: int, uniform: Tensor) -> Tensor:
    """Level of the next episode; every tensor is (N,) (Rudin et al. 2022, section 3.1).

    level: of the episode that ended. walked: m, from its start to its end. commanded: m/s, the speed commanded at its
    end. seconds: its time limit. uniform: in [0, 1).
    A robot that left its tile moves up. A robot that covered less than half of the commanded distance moves down. A
    robot that moves up from the last row goes to a random row, so that no level is forgotten.
    """
    up = walked > TILE / 2
    down = ~up & (walked < 0.5 * commanded * seconds)
    level = torch.where(up, level + 1, torch.where(down, level - 1, level))
    return torch.where(level >= rows, torch.floor(uniform * rows), level.clamp(min=0))


# ----------------------------------------------------------------------------------------------------------------------
# The task on flat ground
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flat(Task):
    """Follow commands of forward, sideways and turning speed on flat ground. `Task` documents what each method does.

    An action is the offset of each servo's target from the home pose, in units of `action_scale`. The physics clips
    targets to the joints' ranges. `obs` holds what a real robot senses. `critic_obs` adds what only a simulator knows.
    Observation noise is off unless `observation_noise` is set, and never affects `critic_obs`. Reward weights are per
    second of a control step of 20 ms. Changing `timestep_scale` does not change the reward of a step.
    """

    xml_file: str = dataclasses.field(default="", init=False)
    frame_skip: int = 4
    reset_noise_scale: float = 0.1
    action_scale: float = 0.5  # rad
    command_forward: Range = (-1.0, 1.0)  # m/s
    command_sideways: Range = (-1.0, 1.0)  # m/s
    command_yaw: Range = (-1.0, 1.0)  # rad/s
    heading_command: bool = False  # draw a heading; the commanded turning speed then steers towards it
    standing_share: float = 0.1  # share of commands that are zero
    resample_seconds: float = 10.0  # s, until a new command is drawn
    velocity_in_observation: bool = False  # the trunk's linear velocity, which no real robot senses directly
    terminate_when_unhealthy: bool = True
    healthy_tilt: float = 1.2  # rad from upright
    track_velocity_weight: float = 1.0
    track_yaw_weight: float = 0.5
    vertical_velocity_weight: float = -2.0
    roll_pitch_weight: float = -0.05
    orientation_weight: float = -1.0
    torque_weight: float = -2e-4
    joint_acceleration_weight: float = -2.5e-7
    action_rate_weight: float = -0.01
    air_time_weight: float = 0.5
    air_time_target: float = 0.25  # s; a foot that lands sooner is penalised, one that lands later is rewarded
    collision_weight: float = -1.0
    joint_limit_weight: float = -10.0
    penalty_scale: float = 0.02  # of the reward, see `total`: a penalty of 1 per second divides it by e

    randomization = {
        "mass": 0.1, "centre_of_mass": 0.03, "friction": (0.4, 1.25), "damping": 0.5, "armature": 0.2,
        "motor_strength": 0.1, "position_gain": 0.1, "velocity_gain": 0.1, "gravity": 0.02, "initial_velocity": 0.3,
        "push": 1.0,
    }  # fmt: skip
    noise_scale = {
        "velocity": 0.1, "angular_velocity": 0.2, "gravity": 0.05, "command": 0.0, "joint_position": 0.01,
        "joint_velocity": 1.5, "last_action": 0.0, "heights": 0.1,
    }  # fmt: skip
    random_rows = 7  # of `noise`: 0 to 3 for a command, 4 to 6 for x, y and yaw of a start
    averaged = (
        "velocity_error", "yaw_error", "reward_track_velocity", "reward_track_yaw", "reward_vertical_velocity",
        "reward_roll_pitch", "reward_orientation", "reward_torque", "reward_joint_acceleration", "reward_action_rate",
        "reward_air_time", "reward_collision", "reward_joint_limit",
    )  # fmt: skip

    def source(self):
        return quadruped_mjcf()

    def furnish(self, model, m):
        """Start from the home pose."""
        home = torch.as_tensor(m.key_qpos[0], dtype=model.qpos0.dtype, device=model.qpos0.device)
        return dataclasses.replace(model, qpos0=home[:, None])

    def control(self, model, action):
        return model.qpos0[7:] + self.action_scale * action

    def action_range(self, model):
        one = torch.ones_like(model.ctrl_low[:, 0])
        return -one, one

    def action_limits(self, model):
        low, high = ((limit - model.qpos0[7:]) / self.action_scale for limit in (model.ctrl_low, model.ctrl_high))
        return low[:, 0], high[:, 0]

    def begin(self, model, qpos, noise, ended, limit):
        """Start at the origin, facing any direction, with the joints near the home pose."""
        return self.start_at(torch.zeros_like(noise[:2]), model, qpos, noise)

    def start_at(self, place: Tensor, model: Model, qpos: Tensor, noise: Tensor):
        """qpos and memory of robots that start at a place (2, N) m, a little above the ground."""
        half_yaw = math.pi * noise[6:7]
        zero = torch.zeros_like(half_yaw)
        ground = zero if model.terrain is None else sample_terrain(model.terrain, place[:1], place[1:])[0]
        yaw = torch.cat((torch.cos(half_yaw), zero, zero, torch.sin(half_yaw)))
        tilt = qpos[3:7] * torch.rsqrt(vecsim_torch.dot(qpos[3:7], qpos[3:7]))
        quat = vecsim_torch.quat_multiply(yaw, tilt)
        qpos = torch.cat((place, ground + model.qpos0[2:3] + 0.02, quat, qpos[7:]))
        command, heading = self.draw_command(noise)
        return qpos, {
            "command": self.steer(command, heading, quat),
            "heading": heading,
            "command_age": zero,
            "last_action": zero.expand(12, -1),
            "joint_velocity": zero.expand(12, -1),
            "air_time": zero.expand(4, -1),
            "contact": zero.expand(4, -1),
        }

    def draw_command(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """A command (3, N) and a heading (1, N). Walking speeds under 0.2 m/s and `standing_share` of all are zero."""
        ranges = (self.command_forward, self.command_sideways, self.command_yaw)
        drawn = zip(ranges, noise[:3], strict=True)
        forward, sideways, turn = (scaled(uniform, bounds) for bounds, uniform in drawn)
        walks = (torch.hypot(forward, sideways) > 0.2).to(noise.dtype)
        moves = (noise[3] >= self.standing_share).to(noise.dtype)
        command = torch.stack((forward * walks * moves, sideways * walks * moves, turn * moves))
        return command, 2 * math.pi * noise[2:3] - math.pi

    def steer(self, command: Tensor, heading: Tensor, quat: Tensor) -> Tensor:
        """The command (3, N). With `heading_command`, a walking robot's turning speed is half its heading error."""
        if not self.heading_command:
            return command
        error = heading[0] - yaw_of(vecsim_torch.quat_to_matrix(quat))
        turn = (0.5 * torch.atan2(torch.sin(error), torch.cos(error))).clamp(*self.command_yaw)
        walks = torch.hypot(command[0], command[1]) > 0
        return torch.stack((command[0], command[1], turn * walks))

    def sense(self, model, p):
        rotation = vecsim_torch.quat_to_matrix(p.qpos[3:7])
        force = torch.zeros_like(p.qpos[:1]).expand(len(model.contact_names), -1)
        torque = torch.zeros_like(p.qpos[7:])
        if p.dynamics is not None:
            force, torque = vecsim_torch.normal_forces(p.dynamics), p.dynamics.smooth.qfrc_actuator[6:]
        sensed = {
            "position": p.qpos[:3],
            "velocity": vecsim_torch.apply(rotation.transpose(0, 1), p.qvel[:3]),  # in the trunk's frame
            "gravity": -rotation[2],  # the direction of gravity in the trunk's frame
            "yaw": yaw_of(rotation),
            "torque": torque,
            **self.touch(model, force),
        }
        if model.terrain is not None:
            sensed["heights"] = height_scan(model.terrain, p.qpos[:3], sensed["yaw"])
        return sensed

    def touch(self, model: Model, force: Tensor) -> dict[str, Tensor]:
        """Which parts touch the ground, from the normal force (nc, N) N of every contact point."""

        def on(part: str) -> Tensor:
            return torch.stack([row for row, name in zip(force, model.contact_names, strict=True) if part in name])

        return {
            "foot_force": on("foot"),
            "leg_contact": (torch.cat((on("thigh"), on("calf"))) > 0.1).to(force.dtype),
            "trunk_force": on("trunk").amax(0),
        }

    def observe(self, model, p, sensed):
        groups = {"velocity": sensed["velocity"]} if self.velocity_in_observation else {}
        return groups | {
            "angular_velocity": p.qvel[3:6],
            "gravity": sensed["gravity"],
            "command": p.memory["command"],
            "joint_position": p.qpos[7:] - model.qpos0[7:],
            "joint_velocity": p.qvel[6:],
            "last_action": p.memory["last_action"],
        }

    def privileged(self, model, p, sensed):
        n = p.qpos.shape[1]
        groups = {
            "velocity": sensed["velocity"],
            **self.observe(model, p, sensed),
            "foot_contact": (sensed["foot_force"] > 1.0).to(p.qpos.dtype),
            "leg_contact": sensed["leg_contact"],
            "friction": model.friction[:1].expand(-1, n),
            "mass": model.mass.expand(-1, n),
            "centre_of_mass": model.com[model.trunk].expand(-1, n),
            "position_gain": model.actuator_gain.expand(-1, n),
            "push": p.push,
        }
        return groups | ({"heights": sensed["heights"]} if "heights" in sensed else {})

    def reward(self, model, p, sensed, action, velocity):
        seconds = self.frame_skip * model.timestep
        command, memory, joints = p.memory["command"], p.memory, p.qpos[7:]
        error = torch.hypot(command[0] - sensed["velocity"][0], command[1] - sensed["velocity"][1])
        yaw_error = (command[2] - p.qvel[5]).abs()
        contact = (sensed["foot_force"] > 1.0) | (memory["contact"] > 0)
        landed = contact & (memory["air_time"] > 0)
        air_time = ((memory["air_time"] + seconds - self.air_time_target) * landed).sum(0)
        air_time = air_time * (torch.hypot(command[0], command[1]) > 0.1)
        centre, half = (model.ctrl_high + model.ctrl_low) / 2, (model.ctrl_high - model.ctrl_low) / 2
        terms = {
            "track_velocity": torch.exp(-error.square() / 0.25),
            "track_yaw": torch.exp(-yaw_error.square() / 0.25),
            "vertical_velocity": sensed["velocity"][2].square(),
            "roll_pitch": p.qvel[3:5].square().sum(0),
            "orientation": sensed["gravity"][:2].square().sum(0),
            "torque": sensed["torque"].square().sum(0),
            "joint_acceleration": ((p.qvel[6:] - memory["joint_velocity"]) / seconds).square().sum(0),
            "action_rate": (action - memory["last_action"]).square().sum(0),
            "air_time": air_time,
            "collision": sensed["leg_contact"].sum(0),
            "joint_limit": ((joints - centre).abs() - 0.9 * half).clamp(min=0).sum(0),
        }
        nominal = self.frame_skip * TIMESTEP
        rewards = {f"reward_{name}": getattr(self, f"{name}_weight") * nominal * x for name, x in terms.items()}
        return rewards | {"velocity_error": error, "yaw_error": yaw_error}

    def total(self, terms):
        """Sum of the positive terms, times exp(sum of the negative terms / penalty_scale) (Ji et al. 2022).

        The reward is never negative, so that ending an episode early never pays. Unlike a sum that is cut off at zero,
        it also has a slope for a beginner who collects many penalties.
        """
        rewards = torch.stack([x for name, x in terms.items() if name.startswith("reward_")])
        return rewards.clamp(min=0).sum(0) * torch.exp(rewards.clamp(max=0).sum(0) / self.penalty_scale)

    def healthy(self, p, sensed):
        """The trunk is off the ground and not tilted too far."""
        return (sensed["trunk_force"] < 1.0) & (-sensed["gravity"][2] > math.cos(self.healthy_tilt))

    def remember(self, model, p, sensed, action, noise):
        seconds = self.frame_skip * model.timestep
        age = p.memory["command_age"] + seconds
        due = age > self.resample_seconds - 0.5 * seconds
        fresh_command, fresh_heading = self.draw_command(noise)
        command = torch.where(due, fresh_command, p.memory["command"])
        heading = torch.where(due, fresh_heading, p.memory["heading"])
        touching = (sensed["foot_force"] > 1.0).to(age.dtype)
        contact = torch.maximum(touching, p.memory["contact"])  # in this step or the last one, because forces flicker
        return p.memory | {
            "command": self.steer(command, heading, p.qpos[3:7]),
            "heading": heading,
            "command_age": torch.where(due, 0.0, age),
            "last_action": action,
            "joint_velocity": p.qvel[6:],
            "air_time": torch.where(contact > 0, 0.0, p.memory["air_time"] + seconds),
            "contact": touching,
        }


# ----------------------------------------------------------------------------------------------------------------------
# The task on rough terrain
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rough(Flat):
    """The same on slopes, rough ground, stairs and blocks, with a curriculum: see `next_level` and `build_terrain`.

    The heights around the robot are part of `critic_obs`, and of `obs` only with `heights_in_observation`.
    """

    heading_command: bool = True  # a robot that walks in circles would never leave its tile
    heights_in_observation: bool = False
    terrain_rows: int = 10  # number of levels; the lowest is level ground
    terrain_columns: int = 20  # each has one terrain type; a robot stays in its column
    terrain_seed: int = 0
    curriculum: bool = True  # False draws the level of every episode at random
    first_levels: int = 5  # each robot's first episode starts on one of this many lowest levels
    terrain_level: int = -1  # a fixed level for all episodes; -1 fixes none

    random_rows = Flat.random_rows + 2  # 7 for the level, 8 for the column
    averaged = (*Flat.averaged, "terrain_level")

    def __post_init__(self) -> None:
        for name in ("terrain_rows", "terrain_columns", "first_levels"):
            if getattr(self, name) < 1:
                raise vecsim_torch.InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not -1 <= self.terrain_level < self.terrain_rows:
            rule = f"terrain_level must be at least -1 and under terrain_rows = {self.terrain_rows}"
            raise vecsim_torch.InputError(f"{rule}, not {self.terrain_level}")

    def furnish(self, model, m):
        """Replace the ground plane by the terrain."""
        model = super().furnish(model, m)
        terrain = build_terrain(self.terrain_rows, self.terrain_columns, self.terrain_seed)
        to = {"dtype": model.qpos0.dtype, "device": model.qpos0.device}
        heights, origins = torch.as_tensor(terrain.heights, **to), torch.as_tensor(terrain.origins, **to)
        return dataclasses.replace(model, terrain=terrain._replace(heights=heights, origins=origins))

    def begin(self, model, qpos, noise, ended, limit):
        """Start within a metre of the middle of a tile."""
        rows, columns, anywhere = self.terrain_rows, self.terrain_columns, noise[7]
        if ended is None:
            column = torch.floor(noise[8] * columns)
            level = torch.floor(anywhere * min(self.first_levels, rows))
        else:
            column, old = ended.memory["column"][0], ended.memory["level"][0]
            walked = torch.hypot(*(ended.qpos[:2] - ended.memory["start"]))
            commanded = torch.hypot(*ended.memory["command"][:2])
            level = next_level(old, walked, commanded, limit * self.frame_skip * model.timestep, rows, anywhere)
            level = torch.where(ended.invalid, old, level)  # the position of a diverged robot means nothing
        if not self.curriculum:
            level = torch.floor(anywhere * rows)
        if self.terrain_level >= 0:
            level = torch.full_like(level, self.terrain_level)
        origin = model.terrain.origins[(level * columns + column).long()].T
        start = origin[:2] + 2 * noise[4:6] - 1
        qpos, memory = self.start_at(start, model, qpos, noise)
        return qpos, memory | {"level": level.unsqueeze(0), "column": column.unsqueeze(0), "start": start}

    def observe(self, model, p, sensed):
        groups = super().observe(model, p, sensed)
        return groups | ({"heights": sensed["heights"]} if self.heights_in_observation else {})

    def reward(self, model, p, sensed, action, velocity):
        terms = super().reward(model, p, sensed, action, velocity)
        return terms | {"terrain_level": p.memory["level"][0], "terrain_column": p.memory["column"][0]}

    def drawn_model(self, model, m):
        return height_field_model(model.terrain)


# ----------------------------------------------------------------------------------------------------------------------
# The robot in MuJoCo C
# ----------------------------------------------------------------------------------------------------------------------


def height_field_model(terrain: Terrain) -> mujoco.MjModel:
    """The quadruped on the same terrain as MuJoCo's own <hfield>, for pictures and comparison."""
    heights = np.asarray(terrain.heights.tolist())  # host sync
    rows, columns = heights.shape
    low, span = heights.min(), max(np.ptp(heights), 1e-6)
    half = [(count - 1) * terrain.cell / 2 for count in (rows, columns)]
    field = f'<asset><hfield name="field" nrow="{columns}" ncol="{rows}" size="{half[0]} {half[1]} {span} 1"/></asset>'
    place = f'pos="{terrain.corner[0] + half[0]} {terrain.corner[1] + half[1]} {low}"'
    colour = 'rgba="0.55 0.5 0.42 1"'  # brown, so that the grey robot can be seen
    text = quadruped_mjcf().replace("<worldbody>", field + "<worldbody>")
    text = text.replace('type="plane" size="0 0 0.05"', f'type="hfield" hfield="field" {place} {colour}')
    m = mujoco.MjModel.from_xml_string(text)
    m.hfield_data[:] = ((heights - low) / span).T.ravel()  # MuJoCo's rows run along y
    m.vis.map.znear = 0.05 / m.stat.extent  # 5 cm: znear is in units of the extent, up to 200 m for a large field
    return m


class InMujoco(gymnasium.Env):
    """`Flat` in MuJoCo C: one robot of the same MJCF on the same flat ground, with Gymnasium's interface.

    It evaluates policies that were trained in vecsim. Physics and forces are MuJoCo's; observations, rewards and
    termination are the task's own functions. vecsim_torch registers it as Gymnasium's `vecsim/Quadruped-Flat`.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}

    def __init__(self, render_mode: str | None = None, camera_name: str = "track", **options: Any):
        self.render_mode, self.camera_name, self._renderer = render_mode, camera_name, None
        self.task = vecsim_torch.build_task("Quadruped-Flat", options)
        self.model = vecsim_torch.compile_mjcf(self.task.source())
        self.data = mujoco.MjData(self.model)
        self.robot = self.task.furnish(vecsim_torch.load_model(self.model, dtype=torch.float64), self.model)
        low, high = (bound.float().numpy() for bound in self.task.action_range(self.robot))
        self.action_space = gymnasium.spaces.Box(low, high)
        self.memory = self._begin()
        measured = self._measured()
        groups = self.task.observe(self.robot, measured, self._sense(measured))
        self.observation_space = vecsim_torch.spaces_of(groups)[1]

    def _random(self, rows: int) -> Tensor:
        return torch.as_tensor(self.np_random.random((rows, 1)))

    def _begin(self) -> dict[str, Tensor]:
        """Put the robot at the start of an episode; returns the task's memory."""
        noise = self._random(self.robot.nq), self._random(self.robot.nv)
        qpos, qvel = vecsim_torch.reset_state(self.task, self.robot, *noise)
        qpos, memory = self.task.begin(self.robot, qpos, self._random(self.task.random_rows), None, 0)
        mujoco.mj_resetData(self.model, self.data)
        self.set_state(qpos[:, 0].numpy(), qvel[:, 0].numpy())
        return memory

    def _measured(self) -> Measured:
        qpos, qvel = (torch.as_tensor(x.copy())[:, None] for x in (self.data.qpos, self.data.qvel))
        return Measured(qpos, qvel, None, self.memory, torch.zeros_like(qpos[:2]))

    def _sense(self, measured: Measured) -> dict[str, Tensor]:
        """The task's measurements, with forces and torques of MuJoCo's last evaluation of the dynamics."""
        data, geoms = self.data, self.robot.contact_geom
        force, wrench = torch.zeros(len(geoms), 1, dtype=torch.float64), np.zeros(6)
        for k, contact in enumerate(data.contact):
            mujoco.mj_contactForce(self.model, data, k, wrench)
            geom = contact.geom[1]
            along = data.geom_xmat[geom].reshape(3, 3)[:, 2] @ (contact.pos - data.geom_xpos[geom])
            is_capsule = geoms.count(geom) == 2  # a capsule has a contact at each end; the end along its axis is first
            force[geoms.index(geom) + int(is_capsule and along < 0)] = wrench[0]
        torque = torch.as_tensor(data.qfrc_actuator[6:].copy())[:, None]
        return self.task.sense(self.robot, measured) | self.task.touch(self.robot, force) | {"torque": torque}

    def _look(self, measured: Measured, sensed: dict[str, Tensor]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The observation, and info with the privileged one."""
        groups = self.task.observe(self.robot, measured, sensed), self.task.privileged(self.robot, measured, sensed)
        obs, critic_obs = (torch.cat(list(rows.values()))[:, 0].float().numpy() for rows in groups)
        return obs, {"critic_obs": critic_obs}

    def set_state(self, qpos: np.ndarray, qvel: np.ndarray) -> None:
        """As in Gymnasium's own MuJoCo environments. The task's memory stays as it is."""
        self.data.qpos[:], self.data.qvel[:] = qpos, qvel

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.memory = self._begin()
        measured = self._measured()
        return self._look(measured, self.task.sense(self.robot, measured))

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        action = torch.as_tensor(action, dtype=torch.float64).reshape(-1, 1)
        before = self._measured().qpos[:3]
        self.data.ctrl[:] = self.task.control(self.robot, action)[:, 0]
        mujoco.mj_step(self.model, self.data, self.task.frame_skip)
        measured = self._measured()
        sensed = self._sense(measured)
        velocity = (sensed["position"] - before) / (self.task.frame_skip * self.robot.timestep)
        terms = self.task.reward(self.robot, measured, sensed, action, velocity)
        fell = self.task.terminate_when_unhealthy and not bool(self.task.healthy(measured, sensed))
        self.memory = self.task.remember(self.robot, measured, sensed, action, self._random(self.task.random_rows))
        obs, info = self._look(measured._replace(memory=self.memory), sensed)
        info |= {name: float(value) for name, value in terms.items()}
        return obs, float(self.task.total(terms)), fell, False, info

    def render(self) -> np.ndarray:
        from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer

        if self._renderer is None:
            self._renderer = MujocoRenderer(self.model, self.data, width=480, height=480, camera_name=self.camera_name)
        return self._renderer.render(self.render_mode)

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
