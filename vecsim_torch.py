"""vecsim: MuJoCo's rigid-body physics for thousands of robots at once, in one file of plain PyTorch. Copy me.

    env = vecsim_torch.make("Ant-v5", num_envs=4096, device="cuda", seed=1, compile=True)
    obs, info = env.reset(seed=1)
    obs, reward, terminated, truncated, info = env.step(action)     # tensors on the device, environment axis first

    vecsim_torch.make("Quadruped-Rough", randomize=True)            # every robot is different in every episode
    vecsim_torch.make("Hopper-v5", randomize={"mass": (0.8, 1.2)}, action_delay_ms=120)

    python vecsim_torch.py --check my_robot.xml                     # can it do my robot? how exactly, how fast?
    python vecsim_torch.py --env-id Ant-v5                          # speed and error, beside MuJoCo C
    python vecsim_torch.py --env-id Ant-v5 --num-envs 1024 --threads 1 --json results/vecsim/Ant-v5-cpu-1core.json

`Options` lists the options of an environment, and `VecSim` says what `reset` and `step` return. These commands are in
benchmarks/simulator.py, and all tasks but six in tasks/. Everything else is in this file.

The idea: write the physics of one robot, and replace every number by a vector over all robots. Inside the simulator,
the environment axis is the LAST axis of every tensor: `qpos` is (nq, N), and `qpos[3]` is coordinate 3 of all N robots.
Memory is contiguous along N. So each operation runs over all robots at once, as wide vector instructions on a CPU and
as coalesced kernels on a GPU. With compile=True, the section "Compiler" turns the same functions into C++.

MuJoCo is the specification. It compiles the MJCF; this file then computes the same smooth dynamics, the same soft
constraints and the same integrators. The constraint problem is convex, so it has one solution, and the tests check that
both simulators find it. In float64, accelerations of Gymnasium's models and of the quadruped differ from MuJoCo C's by
at most 4e-13 (relative, 150 to 500 states of each; see also `Pusher`). In float32 with 4 Newton iterations, the 99th
percentile of the error is 3e-7 to 1.4e-5, depending on the model. Speeds are in results/README.md.

Read in this order: spatial algebra, model and its loading, the data of a physics step, kinematics, smooth dynamics,
constraints, Newton solver, integrators (with `step`, one physics step), tasks, randomisation, environment step,
compiler, vector environment, evaluation, what the trainers share. To follow a contact force, read `VecSim.step`,
`_step_chunks`, `environment_step`, `step`, `forward`, `newton_system` and `contact_force`; `make_constraints` sets up
what these need for each contact.

Your own task is one class in one file; PyTorch trainers take it as `--env-id my_task.py:SwingUp`:

    from dataclasses import dataclass

    import torch

    import vecsim_torch

    @dataclass(frozen=True)  # each option has a type; it is a bool, a number or a range (low, high)
    class SwingUp(vecsim_torch.Task):
        frame_skip: int = 4  # physics steps in a control step
        reset_noise_scale: float = 0.1
        effort_weight: float = 0.001

        def source(self):  # or name a file beside this one: xml_file: str = "my_robot.xml"
            return '''<mujoco><option timestep="0.005"/>
              <worldbody><body><joint name="pivot" axis="0 1 0"/><site name="tip" pos="0 0 -1"/>
                <geom type="capsule" size="0.05" fromto="0 0 0 0 0 -1"/></body></worldbody>
              <actuator><motor joint="pivot" gear="10" ctrlrange="-1 1"/></actuator></mujoco>'''

        def observe(self, model, p, sensed):  # named groups, (rows, N) each
            return {"angle": torch.cat((p.qpos.cos(), p.qpos.sin())), "velocity": p.qvel}

        def reward(self, model, p, sensed, action, velocity):  # (N,) each; terms called reward_... are summed
            height, effort = model.pose(p, site="tip").position[2], action.square().sum(0)
            return {"reward_up": height, "reward_effort": -self.effort_weight * effort}

tasks/ has a cart-pole; an arm with a command that changes, a memory and observations for the critic alone; and a
quadruped, with termination, terrain and a curriculum. `Task` documents all methods; a wrong shape is an error when the
environment is made. p is the state of the robots, see `Measured`. `Model` gives quantities by the names of the MJCF:
pose(p, body=..., site=... or geom=...), velocity and contact_force of the same, p.qpos[model.qpos_of("pivot")] and
p.qvel[model.dof_of("pivot")], which have one row for a hinge or slide: [0] is (N,). Every actuator needs a ctrlrange.

Glossary
    N               number of environments, always the last axis inside the simulator
    nq, nv, nu      coordinates (a free joint has 7, a ball joint 4), degrees of freedom (6 and 3), controls
    nl              links. A link is one joint and the mass that moves with it. Bodies without joints are welded into
                    their parent; a body with three joints becomes a chain of three links, the first two massless
    nc              contacts that can occur between a moving geom and a geom fixed to the world
    P, S            pairs of moving geoms that can touch; slots for pairs: only the S deepest of the P pairs are solved
    qpos            (nq, N) m or rad. Quaternions are (w, x, y, z). A free joint has its position, then its quaternion,
                    both in world axes
    qvel            (nv, N) m/s or rad/s. A free joint has its linear velocity in world axes, then its angular velocity
                    in body axes
    world           z up, SI units
    step            a physics step is one timestep (`step`, MuJoCo's mj_step). An environment step, or control step, is
                    frame_skip physics steps under one action (`VecSim.step`)
    motion, force   spatial vectors, (angular, linear) and (torque, force), in world axes about `origin` (Featherstone
                    2008, chapter 2). `origin` is where the first link that has mass is at this instant. Velocities
                    about it treat it as a fixed point of the world. A point far away would cost digits: the inertia of
                    a link about a point grows with its distance
    wrench          a spatial force
    cdof            (nv, 6, N) motion of a link and all links below it when one degree of freedom has velocity 1
    inertia         (nl, 21, N) symmetric 6x6 matrices about `origin`; `apply_symmetric` gives the order of the entries
    terrain         heights on a grid that replace the ground plane, bilinear between the grid's points
    packed          (nnz, N) a symmetric (nv, nv) matrix without the entries that are zero in every state
    J, aref, D      Jacobian, reference acceleration and weight of the constraint rows, see `Constraints`
    contact normal  points from what is fixed, or from the first geom, into the geom that moves, or into the second.
                    Distance is negative in penetration

Needs torch 2.9, numpy 2.1 and gymnasium 1.4, or newer, and mujoco 4.0 (version 3 lacks fields that are read here). To
compile on a CPU it needs g++, or the compiler that $CXX names.
"""

from __future__ import annotations

import bisect
import contextlib
import copy
import ctypes
import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import operator
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import typing
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gymnasium
import mujoco
import numpy as np
import torch
from torch import Tensor, distributed
from torch._decomp import decomposition_table
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_map_only
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type


class InputError(ValueError):
    """A user's mistake. The scripts print its message on one line and exit with status 2."""


class Unsupported(InputError):
    """A model has `features` that this simulator does not compute: texts with advice. The message has the first one."""

    def __init__(self, features: list[str]):
        super().__init__(f"unsupported model feature: {features[0]}")
        self.features = features


def check_at_least(least: float, **values: Any) -> None:
    """InputError for a value below `least` or infinite, or not whole, if `least` is an int. None is no value."""
    for name, value in values.items():
        if value is not None and isinstance(least, int) and not isinstance(value, (int, np.integer)):
            raise InputError(f"{name} must be a whole number, not {value!r}")
        if value is not None and not least <= value < math.inf:
            rule = "finite" if value == math.inf else f"at least {least:g}"
            raise InputError(f"{name} must be {rule}, not {value}")


def check_types(kind: type, options: dict[str, Any]) -> dict[str, Any]:
    """The options, with Python's numbers and tuples for arrays and lists. InputError for types that `kind` lacks."""

    def plain(x: Any) -> Any:
        x = x.tolist() if isinstance(x, (np.generic, np.ndarray)) else x
        return tuple(map(plain, x)) if isinstance(x, (list, tuple)) else str(x) if isinstance(x, Path) else x

    try:
        hints = typing.get_type_hints(kind)
    except NameError:  # a name that only type checkers know
        hints = {}
    checked, every = {}, CollectionCheckStrategy.ALL_ITEMS
    for name, value in options.items():
        hint = hints.get(name, Any)
        for form in (value, plain(value)):  # the last that fits
            with contextlib.suppress(TypeCheckError):
                check_type(form, hint, collection_check_strategy=every)
                checked[name] = form
        if name not in checked:
            words = hint.__name__ if isinstance(hint, type) else hint
            words = f"{words} (on a command line low:high)" if typing.get_origin(hint) is tuple else words
            raise InputError(f"{name} must be of type {words}, not {value!r}")
    return checked


# ----------------------------------------------------------------------------------------------------------------------
# Spatial algebra, environment axis last
# ----------------------------------------------------------------------------------------------------------------------


def cross(a: Tensor, b: Tensor) -> Tensor:
    """Cross product of (..., 3, N) vectors."""
    ax, ay, az = a.unbind(-2)
    bx, by, bz = b.unbind(-2)
    return torch.stack((ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx), -2)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product over the next-to-last axis: (..., k, N) and (..., k, N) give (..., N)."""
    return (a * b).sum(-2)


def compose(a: Tensor, b: Tensor) -> Tensor:
    """(..., 3, 3, N) times (..., 3, 3, N)."""
    return (a.unsqueeze(-2) * b.unsqueeze(-4)).sum(-3)


def normalized(vector: Tensor, fallback: Tensor, eps: float) -> Tensor:
    """Unit vector of (..., 3, N), or `fallback` where the norm is under `eps`; differentiable at zero."""
    square = dot(vector, vector).unsqueeze(-2)
    degenerate = square < eps * eps
    return torch.where(degenerate, fallback, vector * torch.rsqrt(torch.where(degenerate, 1.0, square)))


def quat_multiply(p: Tensor, q: Tensor) -> Tensor:
    """Hamilton product of (..., 4, N) quaternions (w, x, y, z)."""
    pw, px, py, pz = p.unbind(-2)
    qw, qx, qy, qz = q.unbind(-2)
    return torch.stack(
        (
            pw * qw - px * qx - py * qy - pz * qz,
            pw * qx + px * qw + py * qz - pz * qy,
            pw * qy - px * qz + py * qw + pz * qx,
            pw * qz + px * qy - py * qx + pz * qw,
        ),
        -2,
    )


def quat_to_matrix(quat: Tensor) -> Tensor:
    """Rotation matrices (..., 3, 3, N) of quaternions (..., 4, N), normalised first as MuJoCo's kinematics does."""
    w, x, y, z = (quat * torch.rsqrt(dot(quat, quat)).unsqueeze(-2)).unbind(-2)
    rows = (
        torch.stack((1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)), -2),
        torch.stack((2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)), -2),
        torch.stack((2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)), -2),
    )
    return torch.stack(rows, -3)


def quat_exponential(rotation: Tensor) -> Tensor:
    """Quaternion (..., 4, N) of a rotation vector (..., 3, N) in rad; differentiable at zero."""
    square = dot(rotation, rotation)
    small = square < 1e-12
    angle = torch.sqrt(torch.where(small, 1.0, square))
    scale = torch.where(small, 0.5 - square / 48, torch.sin(0.5 * angle) / angle)
    real = torch.where(small, 1 - square / 8, torch.cos(0.5 * angle))
    return torch.cat((real.unsqueeze(-2), rotation * scale.unsqueeze(-2)), -2)


def cross_motion(velocity: Tensor, motion: Tensor) -> Tensor:
    """Rate of change of a motion vector (..., 6, N) fixed in a body with `velocity` (Featherstone 2008, eq. 2.31)."""
    angular, linear = velocity[..., :3, :], velocity[..., 3:, :]
    upper, lower = motion[..., :3, :], motion[..., 3:, :]
    return torch.cat((cross(angular, upper), cross(angular, lower) + cross(linear, upper)), -2)


def cross_force(velocity: Tensor, force: Tensor) -> Tensor:
    """Rate of change of a force vector (..., 6, N) fixed in a body with `velocity` (Featherstone 2008, eq. 2.32)."""
    angular, linear = velocity[..., :3, :], velocity[..., 3:, :]
    torque, push = force[..., :3, :], force[..., 3:, :]
    return torch.cat((cross(angular, torque) + cross(linear, push), cross(angular, push)), -2)


def apply(matrix: Tensor, vector: Tensor) -> Tensor:
    """(..., i, j, N) times (..., j, N)."""
    return (matrix * vector.unsqueeze(-3)).sum(-2)


def apply_symmetric(matrix: Tensor, motion: Tensor) -> Tensor:
    """Symmetric 6x6 matrices (..., 21, N) times motions (..., 6, N).

    The matrix is [[A, C], [C^T, L]] with 3x3 blocks: A for angular, L for linear motion. Its 21 numbers are the upper
    triangle of A (xx, xy, xz, yy, yz, zz), then C row by row, then the upper triangle of L. The inertia of a link and
    the Hessian of a contact both have this form, so they can be added.
    """
    axx, axy, axz, ayy, ayz, azz, c00, c01, c02, c10, c11, c12, c20, c21, c22, lxx, lxy, lxz, lyy, lyz, lzz = (
        matrix.unbind(-2)
    )
    p, q, r, x, y, z = motion.unbind(-2)
    return torch.stack(
        (
            axx * p + axy * q + axz * r + c00 * x + c01 * y + c02 * z,
            axy * p + ayy * q + ayz * r + c10 * x + c11 * y + c12 * z,
            axz * p + ayz * q + azz * r + c20 * x + c21 * y + c22 * z,
            c00 * p + c10 * q + c20 * r + lxx * x + lxy * y + lxz * z,
            c01 * p + c11 * q + c21 * r + lxy * x + lyy * y + lyz * z,
            c02 * p + c12 * q + c22 * r + lxz * x + lyz * y + lzz * z,
        ),
        -2,
    )


def shift_to_origin(point: Tensor, linear: tuple[Tensor, ...]) -> Tensor:
    """A 3x3 matrix for the linear motion of `point` (..., 3, N), as a 6x6 matrix (..., 21, N) about the origin.

    linear: upper triangle (xx, xy, xz, yy, yz, zz) of the 3x3 matrix L, for example of a mass. The other blocks of
    `apply_symmetric` are C = [p]x L and A = [p]x L [p]x^T, where [p]x y is the cross product of `point` and y.
    """
    lxx, lxy, lxz, lyy, lyz, lzz = linear
    x, y, z = point.unbind(-2)
    c00, c01, c02 = y * lxz - z * lxy, y * lyz - z * lyy, y * lzz - z * lyz
    c10, c11, c12 = z * lxx - x * lxz, z * lxy - x * lyz, z * lxz - x * lzz
    c20, c21, c22 = x * lxy - y * lxx, x * lyy - y * lxy, x * lyz - y * lxz
    upper = (y * c02 - z * c01, z * c00 - x * c02, x * c01 - y * c00, z * c10 - x * c12, x * c11 - y * c10)
    bottom = x * c21 - y * c20
    return torch.stack((*upper, bottom, c00, c01, c02, c10, c11, c12, c20, c21, c22, *linear), -2)


def force_at(point: Tensor, force: Tensor) -> Tensor:
    """Wrench (..., 6, N) about the origin of forces (..., 3, N) at points (..., 3, N).

    If `force` is a direction, the inner product of this wrench and a link's motion is a velocity: that of the link's
    point at `point`, along the direction.
    """
    return torch.cat((cross(point, force), force), -2)


# ----------------------------------------------------------------------------------------------------------------------
# Model: constant tables and parameters of one robot
# ----------------------------------------------------------------------------------------------------------------------


class Softness(NamedTuple):
    """How constraint rows yield: MuJoCo's solref, solimp and margin in the form that the solver needs, each (rows, 1).

    Source: MuJoCo documentation, Computation, Constraint model, Parameters.
    """

    stiffness: Tensor  # 1/s^2, k in aref = -b J qvel - k d (distance - margin); see `impedance` for d
    damping: Tensor  # 1/s, b in the same formula
    impedance_min: Tensor
    impedance_max: Tensor
    width: Tensor  # m or rad
    midpoint: Tensor
    power: Tensor
    margin: Tensor  # m or rad
    # MuJoCo's estimate of the diagonal of J M^-1 J^T, from which `row_terms` computes the weight D. It is not 1/D.
    invweight: Tensor  # 1/kg or 1/(kg m^2)
    quadratic: bool  # True if all powers are 2, MuJoCo's default; a product then replaces `pow`

    def choose(self, rows: Any) -> Softness:
        return Softness(*(parameter[rows] for parameter in self[:-1]), self.quadratic)


class Segments(NamedTuple):
    """P pairs of G spheres, capsules, cylinders and boxes, in the frames of their links.

    Each geom is a segment with a radius. For a box, that is its centre, and it has axes and a size too.
    """

    link_index: Tensor  # (G) nl for the world
    centre: Tensor  # (G, 3, 1) m
    axis: Tensor  # (G, 3, 1) m, half-length times axis; zero for a sphere
    radius: Tensor  # (G, 1) m
    first_index: Tensor  # (P) the first geom of each pair
    second_index: Tensor  # (P) the second one
    cylinder_index: Tensor  # the pairs whose second geom is a cylinder
    box_index: Tensor  # the B pairs whose second geom is a box
    box_axes: Tensor  # (B, 3, 3, 1) the box's axes, as columns
    box_size: Tensor  # (B, 3, 1) m, half lengths


class Terrain(NamedTuple):
    """A height field that replaces the ground plane."""

    heights: Tensor  # (points along x, points along y) m; bilinear in between, constant beyond the edge
    cell: float  # m from one point to the next
    corner: tuple[float, float]  # m, x and y of the first point
    origins: Tensor  # (k, 3) m, places where robots can start


class Pose(NamedTuple):
    """A frame in the world."""

    position: Tensor  # (3, N) m
    rotation: Tensor  # (3, 3, N) the columns are the frame's axes


class Velocity(NamedTuple):
    """How a frame moves, in world axes."""

    angular: Tensor  # (3, N) rad/s
    linear: Tensor  # (3, N) m/s, of the frame's position


@dataclass(frozen=True)
class Model:
    """One robot. A floating-point tensor ends in an environment axis of size 1, or N where robots differ; a terrain has
    no such axis.

    Tuples describe structure: loops over them unroll when a function is compiled. `*_index` tensors gather rows.
    To change parameters, use `dataclasses.replace`. As in an mjModel, fields that depend on the changed ones stay as
    they are. To make a robot heavier, scale `mass` and `inertia`, and scale `body_mass` and `body_inertia` too if an
    observation reports them.
    """

    nq: int
    nv: int
    nu: int
    nl: int
    timestep: float  # s
    integrator: str  # the MJCF's own: euler, implicitfast or rk4
    # tree
    parent: tuple[int, ...]  # (nl) parent link, -1 for the world
    dofs: tuple[tuple[int, ...], ...]  # (nl) degrees of freedom of each link
    # For each depth of the tree: the rows of its links in a list of all links sorted by joint type (hinges and slides,
    # balls, frees), and the rows of their parents in the level above.
    link_levels: tuple[tuple[Tensor, Tensor], ...]
    link_order_index: Tensor  # (nl) the row of each link in a list of all links sorted by depth
    dof_link_index: Tensor  # (nv)
    dof_order_index: Tensor  # (nv) the row of each dof in a list sorted by joint type, as above
    turns: Tensor  # (nv, 1, 1) 0 for the translations of a free joint, whose axes do not turn; else 1
    qpos_dof_index: Tensor  # (nq) the dof whose velocity integrates into each entry; 0 for quaternions
    dof_qpos_index: Tensor  # (nv) the first qpos entry of each dof's joint
    # packed symmetric matrices: entry e is (entry_row[e], entry_column[e]), row >= column, column an ancestor of row
    entries: tuple[tuple[int, int], ...]
    entry_row_index: Tensor  # (nnz)
    entry_column_index: Tensor  # (nnz)
    entry_diagonal: Tensor  # (nnz, 1) 1 on the diagonal
    unpack_index: Tensor  # (nv, nv) which entry is at each place of the full matrix; nnz where it is zero
    # Hinge and slide joints. With R = scalar_rotation and q the coordinate, a link's rotation in its parent's frame is
    # R[0] + sin(q) R[1] + (1 - cos(q)) R[2]. The position has the same form, plus a term in q for slides.
    scalar_qpos_index: Tensor  # (ns)
    scalar_link_index: Tensor  # (ns)
    scalar_reference: Tensor  # (ns, 1) rad or m, the coordinate in the pose of the MJCF: q = qpos - reference
    scalar_rotation: Tensor  # (3, ns, 3, 3, 1) in the parent link's frame
    scalar_position: Tensor  # (4, ns, 3, 1) m; q multiplies the fourth entry
    scalar_axis: Tensor  # (ns, 3, 1) in the link's frame
    scalar_anchor: Tensor  # (ns, 3, 1) m, in the link's frame
    scalar_hinge: Tensor  # (ns, 1, 1) 1 for a hinge, 0 for a slide
    # ball and free joints
    balls: tuple[tuple[int, int], ...]  # (link, qpos address)
    frees: tuple[tuple[int, int], ...]
    quaternions: tuple[tuple[int, int], ...]  # (qpos address, dof address) of each quaternion
    ball_rotation: Tensor  # (nb, 3, 3, 1) fixed offset in the parent link's frame
    ball_position: Tensor  # (nb, 3, 1) m, the joint's centre in the parent link's frame
    ball_anchor: Tensor  # (nb, 3, 1) m, the same centre in the link's frame
    # inertia, springs and dampers
    mass: Tensor  # (nl, 1) kg
    com: Tensor  # (nl, 3, 1) m, in the link's frame
    inertia: Tensor  # (nl, 3, 3, 1) kg m^2 about the centre of mass, link axes
    dof_armature: Tensor  # (nv, 1) kg m^2 or kg
    dof_stiffness: Tensor  # (nv, 1) N m/rad or N/m, of springs
    dof_spring: Tensor  # (nv, 1) rad or m, where the spring exerts no force
    dof_damping: Tensor  # (nv, 1) N m s/rad or N s/m
    euler_damps: bool  # True if Euler is implicit in the damping of a joint, which needs a second solve, see `step`
    implicitfast_damps: bool  # the same of implicitfast, for the damping of a joint or of an actuator
    gyroscopic: bool  # True if a free body without other joints has unequal moments of inertia, see `step`
    has_frictionloss: bool
    frictionloss: Tensor  # (nv, 1) N m or N, the largest force of dry friction in each dof
    frictionloss_weight: Tensor  # (nv, 1) D of the same dofs, see `dry_friction`
    frictionloss_damping: Tensor  # (nv, 1) 1/s, b in aref = -b qvel
    gravity: Tensor  # (3, 1) m/s^2
    # drag of a fluid on nf bodies, in the body's principal axes: -(viscous + drag |v|) v, see `fluid_force`
    fluid_link_index: Tensor  # (nf)
    fluid_point: Tensor  # (nf, 3, 1) m, centre of mass in the link's frame
    fluid_axes: Tensor  # (nf, 3, 3, 1) the principal axes in the link's frame
    fluid_viscous: Tensor  # (nf, 6, 1) N m s/rad, then N s/m
    fluid_drag: Tensor  # (nf, 6, 1) N m s^2/rad^2, then N s^2/m^2
    wind: Tensor  # (3, 1) m/s, velocity of the fluid
    # fixed tendons: a length is the sum of moment * qpos over the dofs. A spring acts outside of two lengths
    tendon_moment: Tensor  # (nt, nv, 1) of the tendons with springs or dampers
    tendon_spring: Tensor  # (2, nt, 1) m or rad
    tendon_stiffness: Tensor  # (nt, 1)
    tendon_damping: Tensor  # (nt, 1)
    # couplings: rows of the constraint problem with an explicit Jacobian, see `coupling_rows`
    couplings: int  # how many rows
    tendon_limit_moment: Tensor  # (limits, nv, 1) moment of a tendon with a limit; negated for an upper limit
    tendon_limit_bound: Tensor  # (limits, 1) m or rad; negated for an upper limit
    tendon_limit_softness: Softness
    equality_moment: Tensor  # (2, ne, nv, 1) moments of two joints or tendons: length 1 = polynomial of length 2
    equality_reference: Tensor  # (2, ne, 1) m or rad, from which both are measured
    equality_polynomial: Tensor  # (5, ne, 1) coefficients from the constant to the fourth power
    equality_softness: Softness
    # actuators: force = gain * ctrl + bias[0] + bias[1] * length + bias[2] * velocity
    actuator_moment: Tensor  # (nu, nv, 1) gear times how the length of the joint or tendon changes with each coordinate
    actuated_tendons: bool  # True if any actuator pulls on a tendon
    actuator_gain: Tensor  # (nu, 1)
    actuator_bias: Tensor  # (3, nu, 1)
    ctrl_low: Tensor  # (nu, 1)
    ctrl_high: Tensor  # (nu, 1)
    force_low: Tensor  # (nu, 1)
    force_high: Tensor  # (nu, 1)
    dof_force_low: Tensor  # (nv, 1) limits of the summed actuator force on a joint
    dof_force_high: Tensor  # (nv, 1)
    # joint limits of hinges and slides, lower rows then upper rows
    limit_qpos_index: Tensor  # (2 nlim)
    limit_dof_index: Tensor  # (2 nlim)
    limit_sign: Tensor  # (2 nlim, 1) +1 lower, -1 upper
    limit_bound: Tensor  # (2 nlim, 1) rad or m
    limit_softness: Softness
    # contacts with geoms fixed to the world, ordered by the link that moves. With a plane, a sphere, an ellipsoid, each
    # end of a capsule and each corner of a box make one contact, and a cylinder makes four. Fixed spheres, capsules,
    # cylinders and boxes are called obstacles; `nearest_points` says what can touch them
    contact_link_index: Tensor  # (nc)
    contact_ranges: tuple[tuple[int, int], ...]  # (nl) first and past-the-end contact of each link
    contact_geom: tuple[int, ...]  # (nc) mjModel's number of the moving geom
    contact_names: tuple[str, ...]  # (nc) of the same geoms, empty where the MJCF gives none
    contact_point: Tensor  # (nc, 3, 1) m, centre of the sphere in the link's frame
    contact_radius: Tensor  # (nc, 1) m
    contact_axis: Tensor  # (nc, 3, 1) capsule axis in the link's frame, zero for others
    contact_corner: Tensor  # (nc, 3, 1) m, box corner from the box's centre, zero for others
    contact_softness: Softness
    friction: Tensor  # (nc, 1) coefficient, zero for frictionless contacts (condim 1)
    impratio: float  # ratio of frictional to normal impedance
    body_contacts: Tensor  # (nbody - 1, nc, 1, 1) 1 for the body that moves, -1 for the fixed body that it touches
    boxes: bool  # some contact is one of a box's corners with a plane
    round_row_index: Tensor  # (nr) the contacts of cylinders and ellipsoids with planes, as rows of the nc contacts
    round_axes: Tensor  # (nr, 3, 3, 1) the geom's axes in the link's frame
    round_size: Tensor  # (nr, 3, 1) m, the geom's size in MuJoCo
    round_place: Tensor  # (nr, 3, 1) where a cylinder's contact lies, see `round_points`; zero for an ellipsoid
    plane_normal: Tensor  # (nc, 3, 1)
    plane_height: Tensor  # (nc, 1) m, along the normal
    terrain: Terrain | None  # a height field in place of the ground plane
    walls: tuple[str, ...]  # planes that a terrain cannot replace: all if there are several, or a tilted one
    obstacle_row_index: Tensor  # (Q) the contacts with obstacles, as rows of the nc contacts
    obstacle_segments: Segments  # the obstacle and the geom that moves, in MuJoCo's order
    obstacle_sign: Tensor  # (Q, 1, 1) +1 where the second geom is the one that moves
    # contacts between moving geoms: spheres, capsules, cylinders against those, and boxes against spheres
    pair_slots: int  # S, how many of the P pairs are solved, the deepest first
    pair_geoms: tuple[tuple[int, int], ...]  # (P) mjModel's numbers
    pair_segments: Segments
    pair_sign: Tensor  # (P, nv, 1) +1 where a dof moves only the second geom, -1 where only the first, else 0
    pair_body_sign: Tensor  # (P, nbody, 1) +1 second body, -1 first body
    pair_edges: int  # 1 if all pairs are frictionless, else 4
    pair_friction: Tensor  # (P, 1)
    pair_softness: Softness
    # bodies, for observations
    nbody: int
    body_link_index: Tensor  # (nbody) nl for the world
    body_mass: Tensor  # (nbody, 1) kg
    body_com: Tensor  # (nbody, 3, 1) m, in the link's frame
    body_inertia: Tensor  # (nbody, 3, 3, 1) kg m^2 about the body's centre of mass, link axes
    qpos0: Tensor  # (nq, 1)
    trunk: int  # the first link that has mass
    # for randomisation
    push_motion: Tensor  # (nv, 2, 1) dof velocities of a horizontal push of 1 m/s along the world's x and y
    # names of the MJCF, see `pose` and the methods after it
    joint_rows: dict[str, tuple[int, int, int, int]]  # first and past-the-end row of each joint in qpos, then in qvel
    frames: dict[str, dict[str, tuple[int, int, tuple[int, ...]]]]  # of body, site, geom; name: frame, link, geoms
    frame_position: Tensor  # (frames, 3, 1) m, in the link's frame
    frame_rotation: Tensor  # (frames, 3, 3, 1)

    def __post_init__(self):
        if self.terrain is not None and (self.walls or self.boxes or len(self.round_row_index)):
            what = f"planes {', '.join(self.walls)}" if self.walls else "geoms on the ground but spheres and capsules"
            raise InputError(f"unsupported model feature: terrain with {what}; it replaces one horizontal plane")

    # Quantities by the names of the MJCF, for tasks. p is a `Measured` or a `State`. A name that the MJCF does not have
    # is an InputError; a `VecSim` calls all methods of its task when it is made, so it finds wrong names then.

    def pose(self, p: Measured | State, **named: str) -> Pose:
        """Where a frame is at p.qpos: pose(p, body="hand"), pose(p, site="fingertip") or pose(p, geom="ball")."""
        return self.pose_on_links(*kinematics(self, p.qpos), **named)

    def pose_on_links(self, xpos: Tensor, xmat: Tensor, **named: str) -> Pose:
        """The same from the poses of the links, for example those of p.dynamics.smooth, which are one step older."""
        frame, link, _ = self._find(named)
        place, turn = self.frame_position[frame], self.frame_rotation[frame]
        if link == self.nl:
            return Pose(place.expand_as(xpos[0]), turn.expand_as(xmat[0]))
        return Pose(xpos[link] + apply(xmat[link], place), compose(xmat[link], turn))

    def velocity(self, p: Measured | State, **named: str) -> Velocity:
        """How a frame moves at p.qpos and p.qvel, named as in `pose`."""
        link, (xpos, xmat) = self._find(named)[1], kinematics(self, p.qpos)
        if link == self.nl:
            return Velocity(torch.zeros_like(xpos[0]), torch.zeros_like(xpos[0]))
        origin = xpos[self.trunk]
        angular, linear = link_motion(self, motion_subspace(self, xpos, xmat, origin), p.qvel)[link].split(3)
        arm = self.pose_on_links(xpos, xmat, **named).position - origin
        return Velocity(angular, linear + cross(angular, arm))

    def contact_force(self, p: Measured, **named: str) -> Tensor:
        """Sum of the contact forces (3, N) on a body or geom that moves, in newton and world axes; named as in `pose`.

        They are those of the last evaluation of the dynamics, as in mjData after a step, and zero after a reset.
        """
        _, link, geoms = self._find(named)
        if link == self.nl:
            raise InputError(f"{named} does not move; take the contact force on what touches it")
        total = torch.zeros_like(p.qpos[:1]).expand(3, -1)
        if p.dynamics is None:
            return total
        force, pair_force = contact_forces(self, p.dynamics)
        for geom, of_contact in zip(self.contact_geom, force.unbind(0), strict=True):
            total = total + of_contact if geom in geoms else total
        for k, (first, second) in enumerate(self.pair_geoms):
            if (first in geoms) != (second in geoms):
                here = (p.dynamics.smooth.constraints.pair_index == k).unsqueeze(1)  # (S, 1, N)
                total = total + (1 if second in geoms else -1) * (here * pair_force).sum(0)
        return total

    def qpos_of(self, joint: str) -> slice:
        """The rows of a joint in qpos: p.qpos[model.qpos_of("knee")] is (1, N) for a hinge or slide."""
        return slice(*look_up(self.joint_rows, joint, "joint")[:2])

    def dof_of(self, joint: str) -> slice:
        """The rows of a joint in qvel, qacc and forces."""
        return slice(*look_up(self.joint_rows, joint, "joint")[2:])

    def _find(self, named: dict[str, str]) -> tuple[int, int, tuple[int, ...]]:
        ((kind, name),) = named.items()
        return look_up(self.frames[kind], name, kind)


def look_up(table: dict[str, Any], name: str, kind: str) -> Any:
    """table[name], or InputError with the names that there are."""
    if name not in table:
        raise InputError(f"the MJCF has no {kind} {name!r}; it has {', '.join(table) or 'none with a name'}")
    return table[name]


# ----------------------------------------------------------------------------------------------------------------------
# Loading: from an mjModel to a Model. The tables are numpy arrays, which `load_model` converts at the end.
# ----------------------------------------------------------------------------------------------------------------------

FREE, BALL, SLIDE, HINGE = range(4)  # mjtJoint
PLANE, HFIELD, SPHERE, CAPSULE, ELLIPSOID, CYLINDER, BOX = range(7)  # mjtGeom
MINIMP, MAXIMP, MINVAL = 1e-4, 0.9999, 1e-15  # mjMINIMP, mjMAXIMP, mjMINVAL
INTEGRATORS = ("euler", "implicitfast", "rk4")


def compile_mjcf(source: str | Path | mujoco.MjModel) -> mujoco.MjModel:
    """mjModel from an MJCF path or an MJCF string. An mjModel is returned as it is."""
    if isinstance(source, mujoco.MjModel):
        return source
    try:
        with warnings.catch_warnings():
            # Gymnasium's half_cheetah.xml raises this warning, and its users can do nothing about it.
            warnings.filterwarnings("ignore", message="compiler attribute 'settotalmass'")
            if str(source).lstrip().startswith("<"):
                return mujoco.MjSpec.from_string(str(source)).compile()
            return mujoco.MjSpec.from_file(str(source)).compile()
    except ValueError as error:
        raise InputError(f"MuJoCo does not compile this model: {' '.join(str(error).split())}") from None


def integrator_of(m: mujoco.MjModel) -> str:
    """The integrator of an mjModel: one of INTEGRATORS, or one that this simulator does not have."""
    return mujoco.mjtIntegrator(int(m.opt.integrator)).name.removeprefix("mjINT_").lower()


def refuse_unsupported(m: mujoco.MjModel) -> None:
    """Raise `Unsupported` with the features of `m` that this simulator does not compute."""
    springs = (m.tendon_stiffnesspoly, m.tendon_dampingpoly, m.tendon_plasticadr >= 0)
    tendon_extras = (m.tendon_armature, m.tendon_frictionloss, *springs)
    couples = np.isin(m.eq_type, (mujoco.mjtEq.mjEQ_JOINT, mujoco.mjtEq.mjEQ_TENDON))
    # flags that do not change the motion
    harmless = sum(getattr(mujoco.mjtEnableBit, f"mjENBL_{name}") for name in ("ENERGY", "FWDINV", "INVDISCRETE"))
    is_fluid = m.opt.density > 0 or m.opt.viscosity > 0
    simple_joints = m.jnt_type >= SLIDE
    on_joint = np.isin(m.actuator_trntype, (mujoco.mjtTrn.mjTRN_JOINT, mujoco.mjtTrn.mjTRN_JOINTINPARENT))
    on_tendon = m.actuator_trntype == mujoco.mjtTrn.mjTRN_TENDON
    rules = {
        f'integrator {integrator_of(m)}; set <option integrator="implicitfast"/>': integrator_of(m) not in INTEGRATORS,
        "equality constraints other than joint and tendon": m.eq_active0[~couples].any(),
        "tendons with armature, friction loss, polynomial or plastic springs": any(x.any() for x in tendon_extras),
        "tendons with a range of actuator forces": m.tendon_actfrclimited.any(),
        "spatial tendons": np.any(m.wrap_type[m.tendon_adr[tendons_that_act(m)]] != mujoco.mjtWrap.mjWRAP_JOINT),
        "explicit contact pairs (<pair>) with two friction coefficients or solreffriction": m.pair_solreffriction.any()
        or np.any(m.pair_friction[:, 0] != m.pair_friction[:, 1]),
        "flexes": m.nflex > 0,
        "plugins": m.nplugin > 0,
        "gravity compensation": m.body_gravcomp.any() or m.jnt_actgravcomp.any(),
        "polynomial or plastic joint springs and dampers": m.jnt_stiffnesspoly.any()
        or m.dof_dampingpoly.any()
        or np.any(m.jnt_plasticadr >= 0),
        "stiffness on free and ball joints": m.jnt_stiffness[~simple_joints].any(),
        "limits on free and ball joints": m.jnt_limited[~simple_joints].any(),
        'elliptic friction cones; set <option cone="pyramidal"/>': m.opt.cone != mujoco.mjtCone.mjCONE_PYRAMIDAL,
        "fluid forces on ellipsoids (fluidshape)": is_fluid and m.geom_fluid[:, 0].any(),
        "option flags override, sleep and other enabled ones; remove <flag>": m.opt.enableflags & ~harmless,
        "noslip iterations": m.opt.noslip_iterations > 0,
        "contact adhesion and surface velocity": m.geom_adhesion.any()
        or m.pair_adhesion.any()
        or m.geom_surfacevel.any(),
        "actuators with activation, delay, damping or armature; use motor, position or velocity": m.na > 0
        or m.actuator_delay.any()
        or m.actuator_damping.any()
        or m.actuator_armature.any(),
        "actuators with more than one input or output": np.any(m.actuator_ctrlnum != 1)
        or np.any(m.actuator_outnum != 1),
        "actuator transmissions other than joint and tendon": not np.all(on_joint | on_tendon),
        "actuators on free and ball joints": not simple_joints[m.actuator_trnid[on_joint, 0]].all(),
        "actuator gain types other than fixed": np.any(m.actuator_gaintype != mujoco.mjtGain.mjGAIN_FIXED),
        "actuator bias types other than none and affine": not np.isin(
            m.actuator_biastype, (mujoco.mjtBias.mjBIAS_NONE, mujoco.mjtBias.mjBIAS_AFFINE)
        ).all(),
    }
    features = [feature for feature, found in rules.items() if found]
    if features:
        raise Unsupported([x if ";" in x else f"{x}; remove it from the MJCF or use MuJoCo" for x in features])


def tendons_that_act(m: mujoco.MjModel) -> np.ndarray:
    """The tendons that exert forces or that others depend on."""
    acts = (m.tendon_stiffness > 0) | (m.tendon_damping > 0) | (m.tendon_limited > 0)
    pulled = m.actuator_trnid[m.actuator_trntype == mujoco.mjtTrn.mjTRN_TENDON, 0]
    equal = (m.eq_type == mujoco.mjtEq.mjEQ_TENDON) & (m.eq_active0 > 0)
    used = np.concatenate((pulled, m.eq_obj1id[equal], m.eq_obj2id[equal]))
    return np.flatnonzero(acts | np.isin(range(m.ntendon), used))


def without_disabled(m: mujoco.MjModel) -> mujoco.MjModel:
    """A copy of `m` in which everything that its option flags switch off is zero.

    The other flags: MuJoCo itself applies filterparent and contact when it finds the pairs that can collide, `soften`
    applies refsafe, and `Model.euler_damps` is eulerdamp. What remains does not change the motion.
    """
    m = copy.copy(m)
    off = np.isin(m.actuator_group, np.flatnonzero(m.opt.disableactuator >> np.arange(31) & 1))
    m.actuator_gainprm[off] = m.actuator_biasprm[off] = 0
    fields = {
        "LIMIT": "jnt_limited tendon_limited",
        "FRICTIONLOSS": "dof_frictionloss tendon_frictionloss",
        "EQUALITY": "eq_active0",
        "CONSTRAINT": "jnt_limited tendon_limited dof_frictionloss tendon_frictionloss eq_active0",
        "SPRING": "jnt_stiffness jnt_stiffnesspoly tendon_stiffness",
        "DAMPER": "dof_damping dof_dampingpoly tendon_damping",
        "GRAVITY": "opt.gravity body_gravcomp",
        "CLAMPCTRL": "actuator_ctrllimited",
        "ACTUATION": "actuator_gainprm actuator_biasprm actuator_forcelimited jnt_actfrclimited",
    }
    for name, zero in fields.items():
        if is_disabled(m, name):
            for field in zero.split():
                operator.attrgetter(field)(m)[:] = 0
    if is_disabled(m, "SPRING") and is_disabled(m, "DAMPER"):
        m.opt.density = m.opt.viscosity = 0
        m.body_gravcomp[:] = 0
    return m


def is_disabled(m: mujoco.MjModel, name: str) -> bool:
    """Whether the MJCF switches off this flag of mjtDisableBit."""
    return bool(m.opt.disableflags & getattr(mujoco.mjtDisableBit, f"mjDSBL_{name}"))


def rotation_matrix(quat: np.ndarray) -> np.ndarray:
    """(3, 3) of a quaternion (w, x, y, z)."""
    out = np.zeros(9)
    mujoco.mju_quat2Mat(out, quat)
    return out.reshape(3, 3)


def skew(v: np.ndarray) -> np.ndarray:
    """The matrix that maps x to the cross product of v and x."""
    return np.array([[0, -v[2], v[1]], [v[2], 0, -v[0]], [-v[1], v[0], 0]])


def soften(
    m: mujoco.MjModel, solref: np.ndarray, solimp: np.ndarray, margin: np.ndarray, invweight: np.ndarray
) -> Softness:
    """Rows with these solref (n, 2), solimp (n, 5), margins (n) and inverse weights (n). Source: mj_makeImpedance."""
    standard = solref[:, 0] > 0
    mixed = standard != (solref[:, 1] > 0)
    if mixed.any():
        wrong = tuple(solref[mixed][0].tolist())
        raise InputError(f"unsupported model feature: solref {wrong} mixes standard and direct format")
    least, most = (MINIMP, MINIMP, 0, MINIMP, 1), (MAXIMP, MAXIMP, np.inf, MAXIMP, np.inf)
    dmin, dmax, width, midpoint, power = np.clip(solimp, least, most).T
    shortest = 0 if is_disabled(m, "REFSAFE") else 2 * m.opt.timestep
    time_constant, ratio = np.maximum(solref[:, 0], shortest), solref[:, 1]
    own_stiffness = 1 / np.maximum(MINVAL, (dmax * time_constant * ratio) ** 2)
    own_damping = 2 / np.maximum(MINVAL, dmax * time_constant)
    stiffness = np.where(standard, own_stiffness, -solref[:, 0] / dmax**2)
    damping = np.where(standard, own_damping, -solref[:, 1] / dmax)
    constant = width <= MINVAL
    dmin, dmax = (np.where(constant, 0.5 * (dmin + dmax), x) for x in (dmin, dmax))
    width = np.where(constant, 1.0, width)
    return Softness(stiffness, damping, dmin, dmax, width, midpoint, power, margin, invweight, bool(np.all(power == 2)))


class Tree(NamedTuple):
    """The joints of an mjModel as links: link l is what joint l moves."""

    parent: np.ndarray  # (nl) parent link, -1 for the world
    offset: np.ndarray  # (nl, 3) m, position in the parent link's frame before the joint moves
    offset_turn: np.ndarray  # (nl, 3, 3) rotation of the same pose
    body_link: np.ndarray  # (nbody) nl for the world and the bodies welded to it
    body_place: np.ndarray  # (nbody, 3) m, position in the frame of the body's link
    body_turn: np.ndarray  # (nbody, 3, 3) rotation of the same pose
    moves: np.ndarray  # (nl + 1, nv) bool: dof d moves link l; the last row is the world

    def on_links(self, bodies: Any, position: np.ndarray, quat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions (n, 3) and rotations (n, 3, 3) in the links' frames, of poses in the frames of n bodies."""
        turn = self.body_turn[bodies]
        rotation = np.array([rotation_matrix(q) for q in quat]).reshape(-1, 3, 3)
        return self.body_place[bodies] + (turn @ position[..., None])[..., 0], turn @ rotation


def build_tree(m: mujoco.MjModel) -> Tree:
    """Links of one joint each. A body with several joints becomes a chain of links; its frame is the last link's."""
    if not m.njnt:
        raise InputError("unsupported model: it has no joints")
    place, turn, body_link = np.zeros((m.nbody, 3)), np.tile(np.eye(3), (m.nbody, 1, 1)), np.full(m.nbody, -1)
    offset, offset_turn, parent = np.zeros((m.njnt, 3)), np.tile(np.eye(3), (m.njnt, 1, 1)), np.arange(m.njnt) - 1
    for b in range(1, m.nbody):
        up, joint = m.body_parentid[b], m.body_jntadr[b]
        position, rotation = place[up] + turn[up] @ m.body_pos[b], turn[up] @ rotation_matrix(m.body_quat[b])
        if joint < 0:
            body_link[b], place[b], turn[b] = body_link[up], position, rotation
        else:
            body_link[b] = joint + m.body_jntnum[b] - 1
            parent[joint], offset[joint], offset_turn[joint] = body_link[up], position, rotation
    moves = np.arange(m.njnt + 1)[:, None] == m.dof_jntid
    for link, up in enumerate(parent):
        moves[link] |= moves[up]  # -1 is the world's row
    return Tree(parent, offset, offset_turn, np.where(body_link < 0, m.njnt, body_link), place, turn, moves)


def tree_tables(m: mujoco.MjModel, tree: Tree) -> dict[str, Any]:
    """Fields of `Model`: the order of links and dofs, and which entries of a matrix over dofs can be non-zero."""
    depth = tree.moves[:-1, m.jnt_dofadr].sum(1) - 1  # how many joints move the parent
    by_depth = [np.flatnonzero(depth == d) for d in range(max(depth) + 1)]
    kind = -np.minimum(m.jnt_type, SLIDE)  # sorts joints into hinges and slides, balls, frees
    order = np.argsort(np.argsort(kind, kind="stable"))
    parents = [np.searchsorted(by_depth[d - 1], tree.parent[level]) for d, level in enumerate(by_depth)]
    address = np.arange(m.nv) - m.jnt_dofadr[m.dof_jntid]  # of each dof within its joint
    translates = (m.jnt_type[m.dof_jntid] == FREE) & (address < 3)
    integrates = np.flatnonzero(translates | (m.jnt_type[m.dof_jntid] >= SLIDE))
    qpos_dof = np.zeros(m.nq, dtype=int)
    qpos_dof[(m.jnt_qposadr[m.dof_jntid] + address)[integrates]] = integrates
    row, column = np.nonzero(np.tril(tree.moves[m.dof_jntid]))
    unpack = np.full((m.nv, m.nv), len(row))
    unpack[row, column] = unpack[column, row] = range(len(row))
    return dict(
        parent=tuple(tree.parent.tolist()),
        dofs=tuple(tuple(np.flatnonzero(m.dof_jntid == link).tolist()) for link in range(m.njnt)),
        link_levels=tuple((order[level], up) for level, up in zip(by_depth, parents, strict=True)),
        link_order_index=np.argsort(np.concatenate(by_depth)),
        dof_link_index=m.dof_jntid,
        dof_order_index=np.argsort(np.argsort(kind[m.dof_jntid], kind="stable")),
        turns=~translates[:, None],
        qpos_dof_index=qpos_dof,
        dof_qpos_index=m.jnt_qposadr[m.dof_jntid],
        entries=tuple(zip(row.tolist(), column.tolist())),
        entry_row_index=row,
        entry_column_index=column,
        entry_diagonal=row == column,
        unpack_index=unpack,
    )


def joint_tables(m: mujoco.MjModel, tree: Tree) -> dict[str, Any]:
    """Fields of `Model`: how each joint moves its link.

    A hinge turns its link by Rodrigues' formula about an axis through the anchor. The anchor does not move in the
    parent's frame; this determines the position.
    """
    scalars = np.flatnonzero(m.jnt_type >= SLIDE)
    balls, frees = (np.flatnonzero(m.jnt_type == kind).tolist() for kind in (BALL, FREE))
    rotation, position = np.zeros((3, len(scalars), 3, 3)), np.zeros((4, len(scalars), 3))
    rotation[0], position[0] = tree.offset_turn[scalars], tree.offset[scalars]
    for k, j in enumerate(scalars):
        axis, anchor, turn = m.jnt_axis[j], m.jnt_pos[j], rotation[0, k]
        if m.jnt_type[j] == HINGE:
            rotation[1, k], rotation[2, k] = turn @ skew(axis), turn @ skew(axis) @ skew(axis)
            position[1, k], position[2, k] = -rotation[1, k] @ anchor, -rotation[2, k] @ anchor
        else:
            position[3, k] = turn @ axis
    ball_rotation = tree.offset_turn[balls]
    push_motion = np.zeros((m.nv, 2))
    for j, dof in enumerate(m.jnt_dofadr):
        if m.jnt_type[j] == FREE:
            push_motion[dof : dof + 2] = np.eye(2)
        elif m.jnt_type[j] == SLIDE and tree.parent[j] < 0:
            push_motion[dof] = (tree.offset_turn[j] @ m.jnt_axis[j])[:2]
    qpos, dof = m.jnt_qposadr.tolist(), m.jnt_dofadr.tolist()
    quaternions = [(qpos[j], dof[j]) for j in balls] + [(qpos[j] + 3, dof[j] + 3) for j in frees]
    return dict(
        scalar_qpos_index=m.jnt_qposadr[scalars],
        scalar_link_index=scalars,
        scalar_reference=m.qpos0[m.jnt_qposadr[scalars]],
        scalar_rotation=rotation,
        scalar_position=position,
        scalar_axis=m.jnt_axis[scalars],
        scalar_anchor=m.jnt_pos[scalars],
        scalar_hinge=m.jnt_type[scalars, None] == HINGE,
        balls=tuple((j, qpos[j]) for j in balls),
        frees=tuple((j, qpos[j]) for j in frees),
        quaternions=tuple(quaternions),
        ball_rotation=ball_rotation,
        ball_position=tree.offset[balls] + (ball_rotation @ m.jnt_pos[balls][..., None])[..., 0],
        ball_anchor=m.jnt_pos[balls],
        push_motion=push_motion,
    )


def inertia_tables(m: mujoco.MjModel, tree: Tree) -> dict[str, Any]:
    """Fields of `Model`: inertia of the bodies and of the links that they form, springs, dampers and dry friction."""
    body_com, body_axes = tree.on_links(range(m.nbody), m.body_ipos, m.body_iquat)
    body_inertia = body_axes @ (m.body_inertia[..., None] * np.eye(3)) @ body_axes.swapaxes(1, 2)
    mass, moment, about_frame = np.zeros(m.njnt + 1), np.zeros((m.njnt + 1, 3)), np.zeros((m.njnt + 1, 3, 3))
    for b, link in enumerate(tree.body_link):
        mass[link] += m.body_mass[b]
        moment[link] += m.body_mass[b] * body_com[b]
        about_frame[link] += body_inertia[b] - m.body_mass[b] * skew(body_com[b]) @ skew(body_com[b])
    mass, moment = mass[:-1], moment[:-1]  # without the world
    com = moment / np.maximum(mass, MINVAL)[:, None]
    inertia = np.stack([about_frame[k] + mass[k] * skew(com[k]) @ skew(com[k]) for k in range(m.njnt)])
    alone = np.setdiff1d(np.flatnonzero(m.jnt_type == FREE), tree.parent)  # free bodies that carry no other joint
    about_x = inertia[:, :1, :1]
    is_equal = (np.abs(inertia - about_x * np.eye(3)) <= 1e-9 * about_x).all((1, 2))  # about all axes, to rounding
    rubbing = np.flatnonzero(m.dof_frictionloss)
    solref, solimp, invweight = m.dof_solref[rubbing], m.dof_solimp[rubbing], m.dof_invweight0[rubbing]
    rows = soften(m, solref, solimp, np.zeros(len(rubbing)), invweight)
    weight, damping = np.zeros(m.nv), np.zeros(m.nv)
    impedance, damping[rubbing] = rows.impedance_min, rows.damping  # the distance is always 0
    weight[rubbing] = 1 / np.maximum((1 - impedance) / impedance * invweight, MINVAL)
    return fluid_tables(m, tree, body_com, body_axes) | dict(
        mass=mass,
        com=com,
        inertia=inertia,
        dof_stiffness=m.jnt_stiffness[m.dof_jntid],
        dof_spring=m.qpos_spring[m.jnt_qposadr[m.dof_jntid]],
        euler_damps=bool(m.dof_damping.any()) and not is_disabled(m, "EULERDAMP"),
        gyroscopic=not is_equal[alone].all(),
        has_frictionloss=len(rubbing) > 0,
        frictionloss=m.dof_frictionloss,
        frictionloss_weight=weight,
        frictionloss_damping=damping,
        body_link_index=tree.body_link,
        body_com=body_com,
        body_inertia=body_inertia,
        trunk=int(np.argmax(mass > 0)),
    )


def fluid_tables(m: mujoco.MjModel, tree: Tree, body_com: np.ndarray, body_axes: np.ndarray) -> dict[str, Any]:
    """Fields of `Model`: each body as the box of equal inertia, in a fluid (mj_inertiaBoxFluidModel).

    body_com, body_axes: centres of mass (nbody, 3) and principal axes (nbody, 3, 3) in the links' frames.
    """
    is_fluid = m.opt.density > 0 or m.opt.viscosity > 0
    bodies = np.flatnonzero((tree.body_link < m.njnt) & (m.body_mass >= MINVAL) & is_fluid)
    others = m.body_inertia[bodies].sum(1, keepdims=True) - 2 * m.body_inertia[bodies]
    box = np.sqrt(np.maximum(MINVAL, others) / m.body_mass[bodies, None] * 6)  # m, sides
    diameter = box.mean(1, keepdims=True)
    y, z = np.roll(box, -1, 1), np.roll(box, -2, 1)
    return dict(
        fluid_link_index=tree.body_link[bodies],
        fluid_point=body_com[bodies],
        fluid_axes=body_axes[bodies],
        fluid_viscous=m.opt.viscosity * math.pi * np.concatenate((diameter**3, 3 * diameter), 1).repeat(3, 1),
        fluid_drag=m.opt.density * np.concatenate((box * (y**4 + z**4) / 64, y * z / 2), 1),
        wind=m.opt.wind,
    )


def actuator_tables(m: mujoco.MjModel) -> dict[str, Any]:
    """Fields of `Model`: actuators on hinges and slides."""
    on_tendon = m.actuator_trntype == mujoco.mjtTrn.mjTRN_TENDON
    joints = np.where(on_tendon, 0, m.actuator_trnid[:, 0])
    moment = length_moments(m)[np.where(on_tendon, m.actuator_trnid[:, 0], m.ntendon + m.jnt_dofadr[joints])]
    affine = m.actuator_biastype == mujoco.mjtBias.mjBIAS_AFFINE
    bias = np.where(affine, m.actuator_biasprm[:, :3].T, 0)

    def bounds(limited: np.ndarray, ranges: np.ndarray) -> np.ndarray:
        return np.where(limited.astype(bool), ranges.T, [[-np.inf], [np.inf]])

    ctrl_low, ctrl_high = bounds(m.actuator_ctrllimited, m.actuator_ctrlrange)
    force_low, force_high = bounds(m.actuator_forcelimited, m.actuator_forcerange)
    joint_low, joint_high = bounds(m.jnt_actfrclimited & (m.nu > 0), m.jnt_actfrcrange)
    return dict(
        actuator_moment=m.actuator_gear[:, :1] * moment,
        actuated_tendons=bool(on_tendon.any()),
        actuator_gain=m.actuator_gainprm[:, 0],
        actuator_bias=bias,
        implicitfast_damps=bool(m.dof_damping.any() or bias[2].any()),
        ctrl_low=ctrl_low,
        ctrl_high=ctrl_high,
        force_low=force_low,
        force_high=force_high,
        dof_force_low=joint_low[m.dof_jntid],
        dof_force_high=joint_high[m.dof_jntid],
    )


def length_moments(m: mujoco.MjModel) -> np.ndarray:
    """(ntendon + nv, nv) how the lengths of the fixed tendons, then of all dofs, change with each coordinate."""
    moment = np.concatenate((np.zeros((m.ntendon, m.nv)), np.eye(m.nv)))
    for t in np.flatnonzero(m.wrap_type[m.tendon_adr] == mujoco.mjtWrap.mjWRAP_JOINT):
        wraps = slice(m.tendon_adr[t], m.tendon_adr[t] + m.tendon_num[t])
        moment[t, m.jnt_dofadr[m.wrap_objid[wraps]]] = m.wrap_prm[wraps]
    return moment


def coupling_tables(m: mujoco.MjModel) -> dict[str, Any]:
    """Fields of `Model`: springs and limits of fixed tendons, and equalities."""
    moment = length_moments(m)
    sprung, limited = (np.flatnonzero(x) for x in ((m.tendon_stiffness > 0) | (m.tendon_damping > 0), m.tendon_limited))
    rows, sign = np.tile(limited, 2), np.repeat([1.0, -1.0], len(limited))
    limits = m.tendon_solref_lim[rows], m.tendon_solimp_lim[rows], m.tendon_margin[rows], m.tendon_invweight0[rows]

    equal = np.flatnonzero(m.eq_active0)
    ids = np.stack((m.eq_obj1id, m.eq_obj2id))[:, equal]
    of_joint, alone = m.eq_type[equal] == mujoco.mjtEq.mjEQ_JOINT, ids[1] < 0
    row = np.where(of_joint, m.ntendon + m.jnt_dofadr[ids % m.njnt], ids)
    lengths = np.concatenate((m.tendon_length0, m.qpos0[m.jnt_qposadr[m.dof_jntid]]))
    weights = np.concatenate((m.tendon_invweight0, m.dof_invweight0))
    polynomial = m.eq_data[equal, :5].T
    polynomial[1:, alone] = 0
    invweight = weights[row[0]] + np.where(alone, 0, weights[row[1]])
    return dict(
        tendon_moment=moment[sprung],
        tendon_spring=m.tendon_lengthspring[sprung].T,
        tendon_stiffness=m.tendon_stiffness[sprung],
        tendon_damping=m.tendon_damping[sprung],
        couplings=len(rows) + 2 * len(equal),
        tendon_limit_moment=sign[:, None] * moment[rows],
        tendon_limit_bound=sign * m.tendon_range[limited].T.flatten(),
        tendon_limit_softness=soften(m, *limits),
        equality_moment=moment[row],
        equality_reference=lengths[row],
        equality_polynomial=polynomial,
        equality_softness=soften(m, m.eq_solref[equal], m.eq_solimp[equal], np.zeros(len(equal)), invweight),
    )


def limit_tables(m: mujoco.MjModel) -> dict[str, Any]:
    """Fields of `Model`: limits of hinges and slides, lower rows then upper rows."""
    joints = np.flatnonzero(m.jnt_limited)
    rows = np.tile(joints, 2)
    dofs = m.jnt_dofadr[rows]
    return dict(
        limit_qpos_index=m.jnt_qposadr[rows],
        limit_dof_index=dofs,
        limit_sign=np.repeat([1.0, -1.0], len(joints)),
        limit_bound=m.jnt_range[joints].T.flatten(),
        limit_softness=soften(m, m.jnt_solref[rows], m.jnt_solimp[rows], m.jnt_margin[rows], m.dof_invweight0[dofs]),
    )


def geom_name(m: mujoco.MjModel, g: int) -> str:
    """'left_foot' (capsule), for messages; without a name 12 of body 'left_leg' (capsule)."""
    kind = mujoco.mjtGeom(int(m.geom_type[g])).name.removeprefix("mjGEOM_").lower()
    body = m.geom_bodyid[g]
    name = repr(m.geom(g).name) if m.geom(g).name else f"{g} of body {m.body(body).name or int(body)!r}"
    return f"{name} ({kind})"


def collision_candidates(m: mujoco.MjModel, self_collision: bool = True) -> tuple[np.ndarray, np.ndarray, Softness]:
    """Pairs of geoms (n, 2) that MuJoCo's filters admit, with the friction (n) and softness that MuJoCo mixes for each.
    Without self_collision, those of two moving geoms are omitted.

    The filters reject pairs by bit masks, by bodies (same, welded, parent and child) and by <exclude>, but not by
    shape. To apply them, this function makes every geom in a copy of the model a sphere with an enormous gap.
    MuJoCo's collision detection then reports each admitted pair exactly once. The geom with the lower mjtGeom type is
    first in its pair; for equal types, that with the lower number. Friction is 0 for condim 1.
    """
    probe = copy.copy(m)
    probe.geom_type[:] = SPHERE
    probe.geom_gap[:] = probe.pair_gap[:] = 1e6  # m
    probe.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_MIDPHASE
    data = mujoco.MjData(probe)
    mujoco.mj_kinematics(probe, data)
    mujoco.mj_collision(probe, data)
    if data.warning[mujoco.mjtWarning.mjWARN_CONTACTFULL].number:
        raise InputError("unsupported model: too many pairs of geoms can collide; set contype/conaffinity")
    geoms, contact = np.sort(data.contact.geom, axis=1), data.contact
    order = np.lexsort((geoms[:, 1], geoms[:, 0]))
    moving = (m.body_treeid[m.geom_bodyid[geoms[order]]] >= 0).sum(1)  # geoms that move; <pair> admits none
    kept = (moving == 1) | (self_collision & (moving == 2))
    order, moving = order[kept], moving[kept]
    geoms, condim = geoms[order], contact.dim[order]
    swap = m.geom_type[geoms[:, 0]] > m.geom_type[geoms[:, 1]]
    geoms[swap] = geoms[swap, ::-1]

    first, second = m.geom_type[geoms].T
    on_plane = (first == PLANE) & np.isin(second, (SPHERE, CAPSULE, ELLIPSOID, CYLINDER, BOX))
    on_round = np.isin(first, (SPHERE, CAPSULE)) & np.isin(second, (SPHERE, CAPSULE, CYLINDER))
    supported = on_plane | on_round | ((first == SPHERE) & (second == BOX))
    shapes = "simpler shapes: spheres and capsules can touch each other and cylinders, spheres also boxes, and all "
    shapes += "shapes except meshes can touch planes"
    omitted = "self_collision=False (--env-kwargs self_collision False) omits contacts between moving geoms"
    examples = {}  # one of each two shapes that move or not, and one of each condim
    for pair, dim, is_supported, count in zip(geoms, condim, supported, moving, strict=True):
        names = [geom_name(m, g) for g in pair]
        if not is_supported:
            advice = f"give one contype and conaffinity 0, or {shapes}" + (f". Or {omitted}" if count == 2 else "")
            collision = f"collision of geom {names[0]} with {names[1]}; {advice}"
            examples.setdefault((*m.geom_type[pair], count), collision)
        elif dim not in (1, 3):
            examples.setdefault(dim, f"condim {dim} of the contact of geom {names[0]} with {names[1]}; use 1 or 3")
    if examples:
        raise Unsupported([*examples.values()])
    friction = np.where(condim == 1, 0, contact.friction[order, 0])
    invweight = m.body_invweight0[m.geom_bodyid[geoms], 0].sum(1)
    parameters = (x[order] for x in (contact.solref, contact.solimp, contact.includemargin))
    return geoms, friction, soften(m, *parameters, invweight)


def contact_tables(m: mujoco.MjModel, tree: Tree, self_collision: bool) -> dict[str, Any]:
    """Fields of `Model`: contacts with what is fixed, ordered by the link that moves, and pairs of moving geoms."""
    link = tree.body_link[m.geom_bodyid]
    centre, axes = tree.on_links(m.geom_bodyid, m.geom_pos, m.geom_quat)
    half = axes[:, :, 2] * m.geom_size[:, 1:2] * np.isin(m.geom_type, (CAPSULE, CYLINDER))[:, None]

    def segments(geoms: np.ndarray) -> Segments:
        used, place = np.unique(geoms, return_inverse=True)
        cylinders, boxes = (np.flatnonzero(m.geom_type[geoms[:, 1]] == kind) for kind in (CYLINDER, BOX))
        parts = (link[used], centre[used], half[used], m.geom_size[used, 0], *place.reshape(-1, 2).T, cylinders)
        return Segments(*parts, boxes, axes[geoms[boxes, 1]], m.geom_size[geoms[boxes, 1]])

    def points_on_plane(g: int) -> list[np.ndarray]:
        """Points that can touch, from the geom's centre: a sphere's centre, a capsule's ends, a box's corners. For a
        cylinder, the coordinates of `round_points` in place of points."""
        if m.geom_type[g] == CAPSULE:
            return [half[g], -half[g]]
        if m.geom_type[g] == BOX:
            return [axes[g] @ (m.geom_size[g] * (x, y, z)) for z, y, x in itertools.product((-1, 1), repeat=3)]
        if m.geom_type[g] == CYLINDER:
            return np.array([[1, 1, 0], [-1, 1, 0], [1, -0.5, 1], [1, -0.5, -1]])
        return [np.zeros(3)]

    geoms, friction, softness = collision_candidates(m, self_collision)
    first_moves, second_moves = (link[geoms] < m.njnt).T
    fixed, moving = np.where(first_moves, geoms.T[::-1], geoms.T)
    on_plane = m.geom_type[fixed] == PLANE

    # Obstacle rows get a plane as well, so that all rows have one form; `fixed_contacts` overwrites its result.
    rows, offsets = [], []
    for k in np.argsort(link[moving], kind="stable"):
        if not (first_moves[k] and second_moves[k]):
            points = points_on_plane(moving[k]) if on_plane[k] else [np.zeros(3)]
            rows += [k] * len(points)
            offsets += list(points)
    rows, offset = np.array(rows, dtype=int), np.array(offsets).reshape(-1, 3)
    obstacle, moving, fixed = ~on_plane[rows], moving[rows], fixed[rows]
    shape = m.geom_type[moving]
    is_box, is_round = shape == BOX, np.isin(shape, (CYLINDER, ELLIPSOID))
    rounded = np.flatnonzero(is_round & ~obstacle)
    place, offset[rounded] = offset[rounded], 0
    normal = axes[fixed, :, 2]
    planes = np.unique(fixed[~obstacle])
    level = len(planes) <= 1 and np.all(np.abs(axes[planes, 2, 2]) > 1 - 1e-9)
    pairs = np.flatnonzero(first_moves & second_moves)
    first, second = geoms[pairs].T
    body, moves = np.eye(m.nbody)[m.geom_bodyid], 1.0 * tree.moves[link]  # (ngeom, nbody), (ngeom, nv)
    return dict(
        contact_link_index=link[moving],
        contact_ranges=tuple(itertools.pairwise(np.searchsorted(link[moving], range(m.njnt + 1)).tolist())),
        contact_geom=tuple(moving.tolist()),
        contact_names=tuple(m.geom(g).name for g in moving),
        contact_point=centre[moving] + offset,
        contact_radius=np.where(is_box | is_round, 0, m.geom_size[moving, 0]),
        contact_axis=axes[moving, :, 2] * (shape == CAPSULE)[:, None],
        contact_corner=offset * is_box[:, None],
        contact_softness=softness.choose(rows),
        friction=friction[rows],
        impratio=float(m.opt.impratio),
        body_contacts=(body[moving] - body[fixed]).T[1:, :, None],
        boxes=bool(np.any(is_box & ~obstacle)),
        round_row_index=rounded,
        round_axes=axes[moving[rounded]],
        round_size=m.geom_size[moving[rounded]],
        round_place=place,
        plane_normal=normal,
        plane_height=(normal * centre[fixed]).sum(1),
        terrain=None,
        walls=() if level else tuple(geom_name(m, g) for g in planes),
        obstacle_row_index=np.flatnonzero(obstacle),
        obstacle_segments=segments(geoms[rows[obstacle]]),
        obstacle_sign=np.where(first_moves[rows[obstacle], None], -1.0, 1.0),
        pair_geoms=tuple(map(tuple, geoms[pairs].tolist())),
        pair_segments=segments(geoms[pairs]),
        pair_sign=moves[second] - moves[first],
        pair_body_sign=body[second] - body[first],
        pair_edges=4 if friction[pairs].any() else 1,
        pair_friction=friction[pairs],
        pair_softness=softness.choose(pairs),
    )


def name_tables(m: mujoco.MjModel, tree: Tree) -> dict[str, Any]:
    """Fields of `Model`: the named joints, bodies, sites and geoms, and the pose of each in the frame of its link."""
    qpos, dof = np.append(m.jnt_qposadr, m.nq).tolist(), np.append(m.jnt_dofadr, m.nv).tolist()
    joints = {m.joint(j).name: (*qpos[j : j + 2], *dof[j : j + 2]) for j in range(m.njnt)}
    link = tree.body_link.tolist()
    bodies = {m.body(b).name: (b, link[b], tuple(np.flatnonzero(m.geom_bodyid == b).tolist())) for b in range(m.nbody)}
    sites = {m.site(s).name: (m.nbody + s, link[b], ()) for s, b in enumerate(m.site_bodyid)}
    geoms = {m.geom(g).name: (m.nbody + m.nsite + g, link[b], (g,)) for g, b in enumerate(m.geom_bodyid)}
    for named in (joints, bodies, sites, geoms):
        named.pop("", None)
    on_sites = tree.on_links(m.site_bodyid, m.site_pos, m.site_quat)
    on_geoms = tree.on_links(m.geom_bodyid, m.geom_pos, m.geom_quat)
    return dict(
        joint_rows=joints,
        frames={"body": bodies, "site": sites, "geom": geoms},
        frame_position=np.concatenate((tree.body_place, on_sites[0], on_geoms[0])),
        frame_rotation=np.concatenate((tree.body_turn, on_sites[1], on_geoms[1])),
    )


def load_model(
    source: str | Path | mujoco.MjModel,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    self_collision: bool = True,
    pair_slots: int | None = None,
) -> Model:
    """Compile MJCF (path or string) or take an mjModel, and arrange it as a `Model` on `device`.

    self_collision: contacts between moving geoms. pair_slots: how many of them are solved at once, the deepest first.
    Default: one slot for each pair that can touch, but at most 8, or 4 if any pair has friction, because a slot then
    needs four rows. Contacts with what is fixed to the world need no slots and are never dropped. Raises InputError
    with the name of any feature that this simulator does not compute.
    """
    m = without_disabled(compile_mjcf(source))
    refuse_unsupported(m)
    check_at_least(1, pair_slots=pair_slots)
    if dtype not in (torch.float32, torch.float64):
        raise InputError(f"dtype must be torch.float32 or torch.float64, not {dtype}")
    tree = build_tree(m)
    tables = tree_tables(m, tree) | joint_tables(m, tree) | inertia_tables(m, tree) | actuator_tables(m)
    tables |= limit_tables(m) | contact_tables(m, tree, self_collision) | name_tables(m, tree) | coupling_tables(m)
    if pair_slots is None:
        pair_slots = 8 if tables["pair_edges"] == 1 else 4
    copied = "nq nv nu nbody qpos0 body_mass dof_armature dof_damping"  # fields that have MuJoCo's names
    tables |= {name: getattr(m, name) for name in copied.split()}
    tables |= dict(
        nl=m.njnt,
        timestep=float(m.opt.timestep),
        integrator=integrator_of(m),
        gravity=m.opt.gravity,
        pair_slots=min(pair_slots, len(tables["pair_geoms"])),
    )

    def to_torch(table: np.ndarray) -> Tensor:
        """Integers are row numbers. All others are parameters, which get an environment axis of size 1 at the end."""
        if np.issubdtype(table.dtype, np.integer):
            return torch.tensor(table, dtype=torch.int64, device=device)
        return torch.tensor(table, dtype=dtype, device=device)[..., None]

    return Model(**tree_map_only(np.ndarray, to_torch, tables))


# ----------------------------------------------------------------------------------------------------------------------
# What a physics step works on: its state, the constraint problem and the solution
# ----------------------------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """What one timestep passes to the next."""

    qpos: Tensor  # (nq, N)
    qvel: Tensor  # (nv, N)
    warmstart: Tensor  # (nv, N) acceleration of the last timestep


class Contacts(NamedTuple):
    """n points where two geoms touch, or nearly do."""

    point: Tensor  # (n, 3, N) m, from the origin
    normal: Tensor  # (n, 3, N) world axes; (n, 3, 1) where all touch planes
    distance: Tensor  # (n, N) m, negative in penetration
    tangent: Tensor  # (2, n, 3, N) unit vectors


class Pyramids(NamedTuple):
    """Friction pyramids of n contacts. The edges are n + s1, n - s1, n + s2 and n - s2, with normal n and sides s."""

    point: Tensor  # (n, 3, N) m, from the origin
    normal: Tensor  # (n, 3, N)
    side: Tensor  # (2, n, 3, N) unit tangents times the friction coefficient


class Rows(NamedTuple):
    """A number for each row of the constraint problem."""

    contact: Tensor  # (nc, 4, N) contacts with what is fixed to the world; (nc, 1, N) if its four rows have one number
    limit: Tensor  # (2 nlim, N) limits of joints
    pair: Tensor  # (nr, N) pairs of moving geoms, 4 S rows or S if no pair has friction, then couplings

    def times(self, other: Rows) -> Rows:
        return Rows(*(x * y for x, y in zip(self, other, strict=True)))

    def dot(self, other: Rows) -> list[Tensor]:
        """Inner products (N) of the rows of contacts, of those of limits and of those of pairs."""
        return [x.sum(tuple(range(x.dim() - 1))) for x in self.times(other)]


class Constraints(NamedTuple):
    """Soft constraints J x >= aref on the acceleration x (nv, N). J is the Jacobian, aref the reference acceleration.

    A row whose J x is below aref pushes with the force D (aref - J x). Its weight D is 0 where the distance to the
    other geom, or to the joint's limit, is above the margin. A contact has four rows, one for each edge of its friction
    pyramid. An equality is two opposite rows.

    Only the rows of pairs of moving geoms and of couplings store their J. All other rows act on one link or one dof, so
    J x follows from its motion. MuJoCo calls 1/D the regularizer R.
    """

    contacts: Pyramids  # nc, with what is fixed to the world
    weight: Rows  # D; the four rows of a contact share theirs, (nc, 1, N)
    reference: Rows  # aref, m/s^2
    pair_jacobian: Tensor  # (nr, nv, N)
    pairs: Pyramids  # S slots
    pair_index: Tensor  # (S, N) which pair is in each slot
    dropped: Tensor  # (N) how many touching pairs of moving geoms found no slot
    frictionloss_reference: Tensor  # (nv, N) aref of dry friction; no rows for a model without it


class Smooth(NamedTuple):
    """Everything about a state except the solution of its constraint problem."""

    xpos: Tensor  # (nl, 3, N) m
    xmat: Tensor  # (nl, 3, 3, N)
    origin: Tensor  # (3, N) m
    cdof: Tensor  # (nv, 6, N)
    cvel: Tensor  # (nl, 6, N) about the origin
    inertia: Tensor  # (nl, 21, N) about the origin
    mass_matrix: Tensor  # packed (nnz, N)
    qfrc_bias: Tensor  # (nv, N)
    qfrc_actuator: Tensor  # (nv, N)
    qfrc_smooth: Tensor  # (nv, N) all forces except those of constraints
    actuator_damping: Tensor  # (nv, N) -d(qfrc_actuator)/d(qvel)
    constraints: Constraints | None = None  # made last, from the fields above


class Iterate(NamedTuple):
    """A candidate acceleration x, its link accelerations and J x - aref of all rows.

    A direction in which x moves has the same form without aref. So a line search only scales and adds.
    """

    qacc: Tensor  # (nv, N) x
    motion: Tensor  # (nl, 6, N) the part of the links' accelerations that x causes
    residual: Rows  # J x - aref


class Dynamics(NamedTuple):
    """What `forward` computed at one state. Observations and tests read it."""

    smooth: Smooth
    solution: Iterate


# ----------------------------------------------------------------------------------------------------------------------
# Sums over the tree. Parents come before children, so one pass is enough. The loops unroll when they are compiled.
# ----------------------------------------------------------------------------------------------------------------------


def link_motion(model: Model, cdof: Tensor, rates: Tensor) -> Tensor:
    """Spatial motion (nl, 6, N) of each link if the dofs move at `rates` (nv, N). From qvel: the links' velocities."""
    weighted = (cdof * rates.unsqueeze(1)).unbind(0)
    motion: list[Tensor] = []
    for up, dofs in zip(model.parent, model.dofs, strict=True):
        total = motion[up] if up >= 0 else torch.zeros_like(weighted[0])
        for dof in dofs:
            total = total + weighted[dof]
        motion.append(total)
    return torch.stack(motion)


def subtree_sum(model: Model, rows: Tensor, contacts: Tensor | None = None) -> Tensor:
    """(nl, k, N): for each link, the sum of `rows` (nl, k, N) and `contacts` (nc, k, N) over it and all links below."""
    total = list(rows.unbind(0))
    for link in reversed(range(model.nl)):
        if contacts is not None:
            for row in contacts[slice(*model.contact_ranges[link])].unbind(0):
                total[link] = total[link] + row
        up = model.parent[link]
        if up >= 0:
            total[up] = total[up] + total[link]
    return torch.stack(total)


def generalized_force(model: Model, cdof: Tensor, wrench: Tensor, contacts: Tensor | None = None) -> Tensor:
    """Force on each dof (nv, N) of one wrench per link (nl, 6, N) and one per contact (nc, 6, N)."""
    return dot(cdof, subtree_sum(model, wrench, contacts)[model.dof_link_index])


def add_limits(model: Model, values: Tensor) -> Tensor:
    """(nv, N): for each dof, the sum of the rows of its limits in `values` (2 nlim, N)."""
    return values.new_zeros(model.nv, values.shape[-1]).index_add(0, model.limit_dof_index, values)


# ----------------------------------------------------------------------------------------------------------------------
# Kinematics (mj_kinematics, mj_comPos)
# ----------------------------------------------------------------------------------------------------------------------


def kinematics(model: Model, qpos: Tensor) -> tuple[Tensor, Tensor]:
    """xpos (nl, 3, N) and xmat (nl, 3, 3, N): pose of each link's frame in the world."""
    n = qpos.shape[-1]
    coordinate = (qpos[model.scalar_qpos_index] - model.scalar_reference).unsqueeze(1)
    sine, versine = torch.sin(coordinate), 1 - torch.cos(coordinate)
    rotation, position = model.scalar_rotation, model.scalar_position
    local_position = [position[0] + sine * position[1] + versine * position[2] + coordinate * position[3]]
    sine, versine = sine.unsqueeze(1), versine.unsqueeze(1)
    local_rotation = [rotation[0] + sine * rotation[1] + versine * rotation[2]]
    if model.balls:
        turn = quat_to_matrix(torch.stack([qpos[adr : adr + 4] for _, adr in model.balls]))
        local_rotation.append(compose(model.ball_rotation, turn))
        local_position.append(model.ball_position - apply(local_rotation[-1], model.ball_anchor))
    if model.frees:
        local_rotation.append(quat_to_matrix(torch.stack([qpos[adr + 3 : adr + 7] for _, adr in model.frees])))
        local_position.append(torch.stack([qpos[adr : adr + 3] for _, adr in model.frees]))
    turn, place = torch.cat(local_rotation), torch.cat(local_position)
    xpos, xmat = [], []
    for links, parents in model.link_levels:
        level_turn, level_place = turn[links].expand(-1, 3, 3, n), place[links].expand(-1, 3, n)
        if xpos:
            up = xmat[-1][parents]
            level_place, level_turn = xpos[-1][parents] + apply(up, level_place), compose(up, level_turn)
        xpos.append(level_place)
        xmat.append(level_turn)
    return torch.cat(xpos)[model.link_order_index], torch.cat(xmat)[model.link_order_index]


def motion_subspace(model: Model, xpos: Tensor, xmat: Tensor, origin: Tensor) -> Tensor:
    """cdof (nv, 6, N) about `origin` (3, N): a hinge turns about its axis through its anchor, a slide translates."""
    at, turn = xpos[model.scalar_link_index], xmat[model.scalar_link_index]
    axis = apply(turn, model.scalar_axis)
    arm = at + apply(turn, model.scalar_anchor) - origin
    angular = axis * model.scalar_hinge
    linear = torch.where(model.scalar_hinge > 0, cross(arm, axis), axis)
    rows = [torch.cat((angular, linear), 1)]
    translations = torch.eye(6, dtype=xpos.dtype, device=xpos.device)[3:, :, None]
    for k, (link, _) in enumerate(model.balls):
        axes = xmat[link].transpose(0, 1)
        arm = xpos[link] + apply(xmat[link], model.ball_anchor[k]) - origin
        rows.append(torch.cat((axes, cross(arm.expand_as(axes), axes)), 1))
    for link, _ in model.frees:
        axes = xmat[link].transpose(0, 1)
        rows.append(translations.expand(-1, -1, axes.shape[-1]))
        rows.append(torch.cat((axes, cross((xpos[link] - origin).expand_as(axes), axes)), 1))
    return torch.cat(rows)[model.dof_order_index]


# ----------------------------------------------------------------------------------------------------------------------
# Smooth dynamics (mj_crb, mj_rne, mj_fwdActuation, mj_passive)
# ----------------------------------------------------------------------------------------------------------------------


def spatial_inertia(model: Model, xpos: Tensor, xmat: Tensor, origin: Tensor) -> Tensor:
    """(nl, 21, N) inertia of each link about `origin`, world axes (Featherstone 2008, eq. 2.63)."""
    centre = xpos + apply(xmat, model.com) - origin
    about_com = compose(compose(xmat, model.inertia), xmat.transpose(1, 2))
    mass = model.mass + torch.zeros_like(centre[:, 0])
    zero = torch.zeros_like(mass)
    shifted = shift_to_origin(centre, (mass, zero, zero, mass, zero, mass))
    i = about_com
    own = torch.stack((i[:, 0, 0], i[:, 0, 1], i[:, 0, 2], i[:, 1, 1], i[:, 1, 2], i[:, 2, 2]), 1)
    return torch.cat((shifted[:, :6] + own, shifted[:, 6:]), 1)


def composite(model: Model, cdof: Tensor, matrices: Tensor, diagonal: Tensor, contacts: Tensor | None = None) -> Tensor:
    """Packed (nnz, N) matrix: the sum of J^T X J over 6x6 matrices X, plus a diagonal matrix.

    X: `matrices` of the links (nl, 21, N) and `contacts` (nc, 21, N). J is the Jacobian of the link's motion.
    With the links' inertias alone, this is the mass matrix M by the composite-rigid-body algorithm (mj_crb;
    Featherstone 2008, section 6.2). With `contact_hessian` added, the same pass gives M + J^T D J, the Hessian of the
    constraint problem.
    """
    force = apply_symmetric(subtree_sum(model, matrices, contacts)[model.dof_link_index], cdof)
    packed = dot(force[model.entry_row_index], cdof[model.entry_column_index])
    return packed + diagonal[model.entry_row_index] * model.entry_diagonal


def bias_force(model: Model, cdof: Tensor, cvel: Tensor, inertia: Tensor, qvel: Tensor) -> Tensor:
    """qfrc_bias (nv, N): Coriolis, centrifugal and gravity forces (recursive Newton-Euler at zero acceleration)."""
    # The links' accelerations at qacc = 0: the axes of the joints turn, and gravity counts as an acceleration upwards.
    drift = cross_motion(cvel[model.dof_link_index], cdof * qvel.unsqueeze(1)) * model.turns
    acceleration = link_motion(model, drift, torch.ones_like(qvel))
    acceleration = torch.cat((acceleration[:, :3], acceleration[:, 3:] - model.gravity), 1)
    wrench = apply_symmetric(inertia, acceleration) + cross_force(cvel, apply_symmetric(inertia, cvel))
    return generalized_force(model, cdof, wrench)


def actuator_force(model: Model, qpos: Tensor, qvel: Tensor, ctrl: Tensor) -> tuple[Tensor, Tensor]:
    """qfrc_actuator (nv, N) of ctrl (nu, N), and the damping -d(force)/d(qvel) (nv, N) that implicitfast needs."""
    moment, bias = model.actuator_moment, model.actuator_bias
    length, velocity = (moment * qpos[model.dof_qpos_index]).sum(1), (moment * qvel).sum(1)
    clipped = torch.clamp(ctrl, model.ctrl_low, model.ctrl_high)
    unclamped = model.actuator_gain * clipped + bias[0] + bias[1] * length + bias[2] * velocity
    force = torch.clamp(unclamped, model.force_low, model.force_high)
    total = (moment * force.unsqueeze(1)).sum(0)
    saturated = (force <= model.force_low) | (force >= model.force_high)
    damping = torch.where(saturated.unsqueeze(1), 0.0, -moment * moment * bias[2].unsqueeze(1)).sum(0)
    limited = (total <= model.dof_force_low) | (total >= model.dof_force_high)
    return torch.clamp(total, model.dof_force_low, model.dof_force_high), torch.where(limited, 0.0, damping)


def passive_force(model: Model, qpos: Tensor, qvel: Tensor) -> Tensor:
    """qfrc_passive (nv, N): springs and dampers of joints and tendons."""
    coordinate = qpos[model.dof_qpos_index]
    force = -model.dof_stiffness * (coordinate - model.dof_spring) - model.dof_damping * qvel
    if len(model.tendon_moment):
        length, velocity = (model.tendon_moment * coordinate).sum(1), (model.tendon_moment * qvel).sum(1)
        stretch = length - length.clamp(*model.tendon_spring)
        pull = -model.tendon_stiffness * stretch - model.tendon_damping * velocity
        force = force + (model.tendon_moment * pull.unsqueeze(1)).sum(0)
    return force


def fluid_force(model: Model, xpos: Tensor, xmat: Tensor, origin: Tensor, cdof: Tensor, cvel: Tensor) -> Tensor:
    """Force on each dof (nv, N) of the fluid around the bodies (mj_inertiaBoxFluidModel)."""
    at, turn, motion = (x[model.fluid_link_index] for x in (xpos, xmat, cvel))
    point, axes = at + apply(turn, model.fluid_point) - origin, compose(turn, model.fluid_axes)
    velocity = torch.stack((motion[:, :3], motion[:, 3:] + cross(motion[:, :3], point) - model.wind), 1)
    local = apply(axes.transpose(1, 2).unsqueeze(1), velocity).flatten(1, 2)
    local = -(model.fluid_viscous + model.fluid_drag * local.abs()) * local
    torque, force = apply(axes.unsqueeze(1), local.unflatten(1, (2, 3))).unbind(1)
    wrench = torch.cat((torque + cross(point, force), force), 1)
    links = torch.zeros_like(cvel).index_add(0, model.fluid_link_index, wrench)
    return generalized_force(model, cdof, links)


Sparse = dict[tuple[int, int], Tensor]  # the entries (i, j) of a lower triangular matrix that are not zero


def factorize(matrix: Sparse, n: int) -> Sparse:
    """L with H = L^T L of a positive-definite matrix H of n rows. The diagonal holds one over that of L."""
    factor = dict(matrix)
    for k in reversed(range(n)):
        before = [j for j in range(k) if (k, j) in factor]
        factor[k, k] = torch.rsqrt(factor[k, k])
        for i in before:
            factor[k, i] = factor[k, i] * factor[k, k]
        for i in before:
            for j in before:
                if j <= i:
                    factor[i, j] = factor[i, j] - factor[k, i] * factor[k, j]
    return factor


def solve_upper(factor: Sparse, x: Sequence[Tensor]) -> list[Tensor]:
    """L^-T x, with one tensor per row."""
    x = list(x)
    for k in reversed(range(len(x))):
        x[k] = x[k] * factor[k, k]
        for i in range(k):
            if (k, i) in factor:
                x[i] = x[i] - factor[k, i] * x[k]
    return x


def solve_lower(factor: Sparse, x: Sequence[Tensor]) -> list[Tensor]:
    """L^-1 x, with one tensor per row."""
    x = list(x)
    for k in range(len(x)):
        for i in range(k):
            if (k, i) in factor:
                x[k] = x[k] - factor[k, i] * x[i]
        x[k] = x[k] * factor[k, k]
    return x


def solve_packed(model: Model, packed: Tensor, right: Tensor) -> Tensor:
    """Solve (H + W W^T) x = g for x (nv, N). H: packed, positive definite (nnz, N). right: g and W, (nv, 1 + R, N).

    Compiled: a Cholesky factorisation of H, unrolled over the entries. The last dof is eliminated first, so leaves come
    before their parents and zeros stay zero (Featherstone 2008, section 6.5). W couples branches of the tree. With
    H = L^T L and Z = L^-T W, the Woodbury identity gives x = L^-1 (z - Z (1 + Z^T Z)^-1 Z^T z), where z = L^-T g.
    Eager: LAPACK or cuSOLVER solves the unpacked matrices. If the matrix of an environment is not positive definite,
    the result of that environment is NaN.
    """
    if not isinstance(_get_current_dispatch_mode(), Recorder):
        padded = torch.cat((packed, torch.zeros_like(packed[:1])))
        gradient, low_rank = right.permute(2, 0, 1).split((1, right.shape[1] - 1), -1)
        factor, failed = torch.linalg.cholesky_ex(padded[model.unpack_index].permute(2, 0, 1) + low_rank @ low_rank.mT)
        factor = torch.where((failed > 0)[:, None, None], math.nan, factor)
        return torch.cholesky_solve(gradient, factor).permute(1, 2, 0)[:, 0]
    factor = factorize(dict(zip(model.entries, packed.unbind(0), strict=True)), model.nv)
    rows = torch.stack(solve_upper(factor, right.unbind(0)))
    z, low_rank = rows[:, 0], rows[:, 1:]
    if low_rank.shape[1]:
        gram = (low_rank.unsqueeze(2) * low_rank.unsqueeze(1)).sum(0)  # (R, R, N)
        small = {(i, j): gram[i, j] + (i == j) for i in range(len(gram)) for j in range(i + 1)}
        factor_of_small = factorize(small, len(gram))
        along = solve_upper(factor_of_small, (low_rank * z.unsqueeze(1)).sum(0).unbind(0))
        z = z - (low_rank * torch.stack(solve_lower(factor_of_small, along))).sum(1)
    return torch.stack(solve_lower(factor, z.unbind(0)))


# ----------------------------------------------------------------------------------------------------------------------
# Constraints (mj_collision, mj_makeConstraint, mj_makeImpedance, mj_referenceConstraint)
# ----------------------------------------------------------------------------------------------------------------------


def impedance(softness: Softness, violation: Tensor) -> Tensor:
    """Impedance d in (0, 1) at violation = distance - margin (MuJoCo: Computation, Constraint model, Impedance)."""
    x = (violation.abs() / softness.width).clamp(max=1.0)
    mid = softness.midpoint
    if softness.quadratic:
        rise = torch.where(x <= mid, x * x / mid, 1 - (1 - x) * (1 - x) / (1 - mid))
    else:
        p = softness.power
        low = x.clamp(min=1e-12).pow(p) / mid.pow(p - 1)
        rise = torch.where(x <= mid, low, 1 - (1 - x).clamp(min=1e-12).pow(p) / (1 - mid).pow(p - 1))
    return softness.impedance_min + rise * (softness.impedance_max - softness.impedance_min)


def row_terms(softness: Softness, invweight: Tensor, distance: Tensor) -> tuple[Tensor, Tensor]:
    """Weight D, and the part of aref that depends on the distance, -k d (distance - margin): (rows, N) each."""
    violation = distance - softness.margin
    d = impedance(softness, violation)
    regularization = ((1 - d) / d * invweight).clamp(min=MINVAL)
    weight = torch.where(distance < softness.margin, 1 / regularization, 0.0)
    return weight, -softness.stiffness * d * violation


def pyramid_invweight(model: Model, friction: Tensor, invweight: Tensor) -> Tensor:
    """Inverse weight that the four rows of a contact share (mj_diagApprox, mj_makeImpedance).

    A frictionless contact is a pyramid of zero width. Its four rows together push as hard as MuJoCo's single row.
    """
    square = friction * friction
    return torch.where(friction > 0, 2 * square / model.impratio * (1 + square) * invweight, 4 * invweight)


def tangents_of(normal: Tensor) -> Tensor:
    """Two unit tangents (2, n, 3, N) of normals (n, 3, N).

    The first is the world's y axis projected onto the tangent plane, or the z axis if the normal is near the y axis.
    """
    upright = (normal[:, 1:2].abs() >= 0.5).to(normal.dtype)
    guess = torch.cat((torch.zeros_like(upright), 1 - upright, upright), 1)
    first = guess - dot(guess, normal).unsqueeze(1) * normal
    first = first * torch.rsqrt(dot(first, first)).unsqueeze(1)
    return torch.stack((first, cross(normal, first)))


def sample_terrain(terrain: Terrain, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Height (m) and its slopes along x and y at points (x, y) of any shape. Bilinear; constant beyond the edge."""
    rows, columns = terrain.heights.shape
    u = ((x - terrain.corner[0]) / terrain.cell).clamp(0, rows - 1)
    v = ((y - terrain.corner[1]) / terrain.cell).clamp(0, columns - 1)
    i, j = u.long().clamp(0, rows - 2), v.long().clamp(0, columns - 2)  # the second clamp is for NaN
    u, v = u - i, v - j
    heights, first = terrain.heights.view(-1), i * columns + j
    h00, h01, h10, h11 = (heights[first + shift] for shift in (0, 1, columns, columns + 1))
    along_low, along_high = h10 - h00, h11 - h01
    height = h00 + u * along_low + v * (h01 - h00 + u * (along_high - along_low))
    slope_x = along_low + v * (along_high - along_low)
    slope_y = h01 - h00 + u * (along_high - along_low)
    return height, slope_x / terrain.cell, slope_y / terrain.cell


def round_points(model: Model, turn: Tensor, normal: Tensor) -> Tensor:
    """Points (nr, 3, N) of cylinders and ellipsoids that can touch a plane, from the geom's centre.

    An ellipsoid has its lowest point (mjc_PlaneConvex). A cylinder has the lowest points of its two rims and two more
    on the lower rim (mjc_PlaneCylinder). `round_place` gives their coordinates along the axis, in half lengths, and
    across it towards the plane and sideways, in radii.
    """
    axes = compose(turn[model.round_row_index], model.round_axes)
    normal, size, place = normal[model.round_row_index], model.round_size, model.round_place
    axis = axes[..., 2, :] * torch.where(dot(normal, axes[..., 2, :]) > 0, -1.0, 1.0).unsqueeze(1)
    across = normalized(dot(normal, axis).unsqueeze(1) * axis - normal, axes[..., 0, :], MINVAL)
    sideways = math.sqrt(0.75) * cross(across, axis)
    radius, half = size[:, 0:1], size[:, 1:2]
    on_cylinder = place[:, 0:1] * half * axis + radius * (place[:, 1:2] * across + place[:, 2:3] * sideways)
    scaled_normal = size * apply(axes.transpose(1, 2), normal.expand_as(axis))
    lowest = -apply(axes, size * scaled_normal * torch.rsqrt(dot(scaled_normal, scaled_normal)).unsqueeze(1))
    return torch.where(place.abs().sum(1, keepdim=True) > 0, on_cylinder, lowest)


def ground_contacts(model: Model, xpos: Tensor, xmat: Tensor, origin: Tensor) -> Contacts:
    """The nc contacts with planes, or with the terrain that replaces the plane.

    The first tangent lies along a capsule's axis (mjc_PlaneCapsule); for other shapes see `tangents_of`.

    Terrain: every sphere and every end of a capsule touches the tangent plane of the field under its centre. That is
    one contact each, and it is exact on slopes. MuJoCo is different: its height field consists of triangles, whole
    capsules collide with it, and a sphere touches an edge beside it before its centre is over the edge.
    tests/test_vecsim_quadruped.py measures the difference for a foot.
    """
    at, turn = xpos[model.contact_link_index], xmat[model.contact_link_index]
    centre = at + apply(turn, model.contact_point)
    if model.terrain is None:
        normal = model.plane_normal
        if len(model.round_row_index):
            centre = centre.index_add(0, model.round_row_index, round_points(model, turn, normal))
        distance = dot(centre, normal) - model.plane_height - model.contact_radius
    else:
        height, slope_x, slope_y = sample_terrain(model.terrain, centre[:, 0], centre[:, 1])
        upright = torch.rsqrt(1 + slope_x * slope_x + slope_y * slope_y)
        normal = torch.stack((-slope_x * upright, -slope_y * upright, upright), 1)
        distance = (centre[:, 2] - height) * upright - model.contact_radius
    point = centre - (model.contact_radius + 0.5 * distance).unsqueeze(1) * normal - origin
    if model.boxes:  # a corner that points away from the plane does not touch (mjc_PlaneBox)
        away = dot(apply(turn, model.contact_corner), normal) > 0
        distance = torch.where(away, model.contact_softness.margin + 1.0, distance)
    axis = apply(turn, model.contact_axis)
    along = axis - dot(axis, normal).unsqueeze(1) * normal
    first = normalized(along, tangents_of(normal)[0], 1e-6 if xpos.dtype == torch.float32 else MINVAL)
    return Contacts(point, normal, distance, torch.stack((first, cross(normal.expand_as(first), first))))


def nearest_to_cylinder(
    between: Tensor, segment: Tensor, axis: Tensor, radius: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Where segments come nearest to solid cylinders: x (P, N) in [-1, 1] from one end of the segment to the other,
    the cylinder's outward normal (P, 3, N) there and the signed distance (P, N) from its surface.

    between: (P, 3, N) m from the cylinder's centre to the segment's. segment, axis: (P, 3, N) m, half-length times
    axis. radius: (P, 1) m. The signed distance is convex along a segment, so bisection of its slope finds the minimum.
    """
    half = torch.sqrt(dot(axis, axis))
    up = axis / half.unsqueeze(1)
    height, climb = dot(between, up), dot(segment, up)
    side, across = between - height.unsqueeze(1) * up, segment - climb.unsqueeze(1) * up
    aa, ab, bb = dot(side, side), dot(side, across), dot(across, across)

    def gradient(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Factors of the vector from the axis and of the axis in the normal at x, and the signed distance."""
        above = height + climb * x
        from_axis = torch.sqrt((aa + 2 * ab * x + bb * x * x).clamp(min=MINVAL))
        beyond_side, beyond_end = from_axis - radius, above.abs() - half
        outside = torch.hypot(beyond_side.clamp(min=0), beyond_end.clamp(min=0))
        inside, nearer_side = outside == 0, (beyond_side > beyond_end).to(x.dtype)
        safe = torch.where(inside, 1.0, outside)
        along_side = torch.where(inside, nearer_side, beyond_side.clamp(min=0) / safe) / from_axis
        along_axis = torch.where(inside, 1 - nearer_side, beyond_end.clamp(min=0) / safe)
        distance = torch.where(inside, torch.maximum(beyond_side, beyond_end), outside)
        return along_side, torch.where(above < 0, -along_axis, along_axis), distance

    low = -torch.ones_like(aa)
    high = -low
    for _ in range(52 if aa.dtype == torch.float64 else 24):  # bits of the mantissa
        x = 0.5 * (low + high)
        along_side, along_axis, _ = gradient(x)
        descends = along_side * (ab + bb * x) + along_axis * climb < 0
        low, high = torch.where(descends, x, low), torch.where(descends, high, x)
    along_side, along_axis, distance = gradient(x)
    normal = along_side.unsqueeze(1) * (side + x.unsqueeze(1) * across) + along_axis.unsqueeze(1) * up
    return x, normal, distance


def nearest_to_box(between: Tensor, turn: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """The outward normal (P, 3, N) of boxes where they come nearest to points, and the signed distance (P, N).

    between: (P, 3, N) m from the box's centre to the point. turn: (P, 3, 3, N) the box's axes, as columns. size:
    (P, 3, 1) m, half lengths. A point inside is nearest to one face (mjc_SphereBox).
    """
    local = apply(turn.transpose(1, 2), between)
    beyond = local.abs() - size
    outside = beyond.clamp(min=0)
    square = dot(outside, outside).unsqueeze(1)
    inside = square <= MINVAL**2
    length = torch.sqrt(torch.where(inside, 1.0, square))
    x, y, z = beyond.unbind(1)
    nearest_x = (x >= y) & (x >= z)
    face = torch.stack((nearest_x, ~nearest_x & (y >= z), ~nearest_x & (y < z)), 1).to(local.dtype)
    outward = torch.where(local > 0, 1.0, -1.0) * torch.where(inside, face, outside / length)
    return apply(turn, outward), torch.where(inside, beyond.amax(1, keepdim=True), length).squeeze(1)


def nearest_points(segments: Segments, xpos: Tensor, xmat: Tensor, origin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Contact point (P, 3, N) from the origin, normal (P, 3, N) and distance (P, N) of pairs of geoms.

    The first geom is a sphere or a capsule, the second may also be a cylinder or, for a sphere, a box. A sphere is a
    capsule of zero length.
    The nearest points of two segments follow mjraw_CapsuleCapsule. Two exactly parallel geoms get one contact here;
    MuJoCo gives them up to two, and its flag multiccd gives a capsule on a cylinder up to five. The axis of a capsule
    must stay outside of the cylinder.
    """
    eye = torch.eye(3, dtype=xpos.dtype, device=xpos.device)[..., None].expand(1, 3, 3, xpos.shape[-1])
    xpos, xmat = torch.cat((xpos, torch.zeros_like(xpos[:1]))), torch.cat((xmat, eye))  # the last is the world
    turn = xmat[segments.link_index]
    centre, axis = xpos[segments.link_index] + apply(turn, segments.centre) - origin, apply(turn, segments.axis)
    i, j = segments.first_index, segments.second_index
    centre1, centre2, axis1, axis2 = centre[i], centre[j], axis[i], axis[j]
    radius1, radius2 = segments.radius[i], segments.radius[j]
    between = centre1 - centre2
    aa, ab, bb = dot(axis1, axis1), -dot(axis1, axis2), dot(axis2, axis2)
    u, v = -dot(axis1, between), dot(axis2, between)
    determinant = aa * bb - ab * ab
    parallel = determinant <= 8 * torch.finfo(xpos.dtype).eps * aa * bb
    safe_aa, safe_bb = torch.where(aa > 0, aa, 1.0), torch.where(bb > 0, bb, 1.0)
    x1 = torch.where(parallel, 0.0, (bb * u - ab * v) / torch.where(parallel, 1.0, determinant)).clamp(-1, 1)
    x2 = (v - ab * x1) / safe_bb
    beyond = x2.abs() > 1
    x2 = x2.clamp(-1, 1)
    x1 = torch.where(beyond | parallel, ((u - ab * x2) / safe_aa).clamp(-1, 1), x1)
    rows = segments.cylinder_index
    if len(rows):
        x, outward, depth = nearest_to_cylinder(between[rows], axis1[rows], axis2[rows], radius2[rows])
        x1 = x1.index_copy(0, rows, x)
    first = centre1 + x1.unsqueeze(1) * axis1
    gap = centre2 + x2.unsqueeze(1) * axis2 - first
    square = dot(gap, gap)
    length = torch.sqrt(torch.where(square > 0, square, 1.0))
    distance = torch.where(square > 0, length, 0.0) - radius1 - radius2
    ahead = eye[:, 0]  # the normal of coinciding centres, as in mju_normalize3
    normal = torch.where(square.unsqueeze(1) > 0, gap / length.unsqueeze(1), ahead)
    if len(rows):
        normal = normal.index_copy(0, rows, -outward)
        distance = distance.index_copy(0, rows, depth - radius1[rows])
    rows = segments.box_index
    if len(rows):
        outward, depth = nearest_to_box(between[rows], compose(turn[j[rows]], segments.box_axes), segments.box_size)
        normal = normal.index_copy(0, rows, -outward)
        distance = distance.index_copy(0, rows, depth - radius1[rows])
    return first + (radius1 + 0.5 * distance).unsqueeze(1) * normal, normal, distance


def fixed_contacts(model: Model, xpos: Tensor, xmat: Tensor, origin: Tensor) -> Contacts:
    """The nc contacts with geoms fixed to the world: planes, or the terrain, and obstacles.

    A contact with a fixed geom acts on one link only. So it couples no branches of the tree, and the solver treats
    planes and obstacles alike.
    """
    ground, rows = ground_contacts(model, xpos, xmat, origin), model.obstacle_row_index
    if not len(rows):
        return ground
    point, normal, distance = nearest_points(model.obstacle_segments, xpos, xmat, origin)
    return Contacts(
        ground.point.index_copy(0, rows, point),
        ground.normal.expand_as(ground.point).index_copy(0, rows, model.obstacle_sign * normal),
        ground.distance.index_copy(0, rows, distance),
        ground.tangent.index_copy(1, rows, tangents_of(normal)),
    )


def choose_pairs(parameter: Tensor, index: Tensor) -> Tensor:
    """Gather `parameter` (P, 1 or N) for the pair in each slot, `index` (S, N); returns (S, N)."""
    return torch.gather(parameter.expand(-1, index.shape[-1]), 0, index)


def smallest(values: Tensor, count: int) -> Tensor:
    """Rows (count, N) of the smallest numbers in each column of values (P, N), the smallest first.

    torch.topk does the same, but of 109 pairs the 8 deepest cost it more than twice the operations in compiled code. So
    the last bits of each number become its row. Numbers that differ only in these bits count as equal.
    """
    integers = torch.int32 if values.dtype == torch.float32 else torch.int64
    bits, largest = values.view(integers), torch.iinfo(integers).max
    row_bits = (1 << (len(values) - 1).bit_length()) - 1
    in_order = torch.where(bits < 0, bits ^ largest, bits)  # as an integer, a larger negative number is smaller
    keys = in_order & ~row_bits | torch.arange(len(values), dtype=integers, device=values.device)[:, None]
    found = [keys.amin(0)]
    while len(found) < count:
        found.append(torch.where(keys > found[-1], keys, largest).amin(0))
    return (torch.stack(found) & row_bits).long()


def pair_contacts(model: Model, xpos: Tensor, xmat: Tensor, origin: Tensor) -> tuple[Tensor, Contacts, Tensor]:
    """The S deepest of the P candidate pairs: their index (S, N), their contacts, and how many others touch (N)."""
    point, normal, distance = nearest_points(model.pair_segments, xpos, xmat, origin)
    if model.pair_slots < len(model.pair_geoms):
        margin = model.pair_softness.margin
        dropped = ((distance < margin).sum(0) - model.pair_slots).clamp(min=0)
        index = smallest(distance - margin, model.pair_slots)
        distance = torch.gather(distance, 0, index)
        along = index.unsqueeze(1).expand(-1, 3, -1)
        point, normal = torch.gather(point, 0, along), torch.gather(normal, 0, along)
    else:
        index = torch.arange(model.pair_slots, device=xpos.device)[:, None].expand(-1, xpos.shape[-1])
        dropped = index.new_zeros(xpos.shape[-1])
    return index, Contacts(point, normal, distance, tangents_of(normal)), dropped


def pair_rows(
    model: Model, qvel: Tensor, cdof: Tensor, index: Tensor, distance: Tensor, c: Pyramids
) -> tuple[Tensor, Tensor, Tensor]:
    """Explicit Jacobian rows (nr, nv, N), weights and references (nr, N) of the pairs in the slots."""
    softness = model.pair_softness
    softness = Softness(*(choose_pairs(x, index) for x in softness[:-1]), softness.quadratic)
    first, second = c.side
    if model.pair_edges == 1:
        edges, invweight = c.normal.unsqueeze(1), softness.invweight
    else:
        edges = torch.stack((c.normal + first, c.normal - first, c.normal + second, c.normal - second), 1)
        invweight = pyramid_invweight(model, choose_pairs(model.pair_friction, index), softness.invweight)
    weight, position = row_terms(softness, invweight, distance)
    wrench = force_at(c.point.unsqueeze(1).expand_as(edges), edges)
    sign = model.pair_sign.squeeze(-1)[index].transpose(1, 2)  # (S, nv, N)
    rows = dot(cdof, wrench.unsqueeze(2)) * sign.unsqueeze(1)  # (S, edges, nv, N)
    velocity = (rows * qvel).sum(2)
    reference = position.unsqueeze(1) - softness.damping.unsqueeze(1) * velocity
    return rows.flatten(0, 1), weight.unsqueeze(1).expand_as(velocity).flatten(0, 1), reference.flatten(0, 1)


def coupling_rows(model: Model, qpos: Tensor, qvel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Jacobian (nr, nv, N), weights and references (nr, N) of tendon limits and equalities.

    An equality becomes two opposite rows, one of which pushes: together they make its quadratic cost.
    """
    coordinate, softness = qpos[model.dof_qpos_index], model.tendon_limit_softness
    distance = (model.tendon_limit_moment * coordinate).sum(1) - model.tendon_limit_bound
    weight, position = row_terms(softness, softness.invweight, distance)
    moment = model.tendon_limit_moment.expand(-1, -1, qpos.shape[-1])
    reference = position - softness.damping * (moment * qvel).sum(1)

    first, second = (model.equality_moment * coordinate).sum(2) - model.equality_reference
    c0, c1, c2, c3, c4 = model.equality_polynomial
    error = first - (c0 + second * (c1 + second * (c2 + second * (c3 + second * c4))))
    slope = c1 + second * (2 * c2 + second * (3 * c3 + second * 4 * c4))
    jacobian = model.equality_moment[0] - slope.unsqueeze(1) * model.equality_moment[1]
    softness = model.equality_softness
    d = impedance(softness, error)
    stiff = 1 / ((1 - d) / d * softness.invweight).clamp(min=MINVAL)
    target = -softness.stiffness * d * error - softness.damping * (jacobian * qvel).sum(1)
    return (
        torch.cat((moment, jacobian, -jacobian)),
        torch.cat((weight, stiff, stiff)),
        torch.cat((reference, target, -target)),
    )


def contact_velocity(model: Model, c: Pyramids, motion: Tensor) -> Tensor:
    """Speed (nc, 4, N) of the points of contacts with fixed geoms, along the four edges of their pyramids.

    motion: (nl, 6, N) velocities of the links. The solver passes accelerations, and so gets accelerations, J x.
    """
    carrier = motion[model.contact_link_index]
    at = carrier[:, 3:] + cross(carrier[:, :3], c.point)
    along, first, second = dot(at, c.normal), dot(at, c.side[0]), dot(at, c.side[1])
    return torch.stack((along + first, along - first, along + second, along - second), 1)


def contact_force(c: Pyramids, edge_force: Tensor) -> Tensor:
    """Contact force (n, 3, N) in world axes, from the forces (n, 4, N) along the four edges of its pyramid."""
    a, b, d, e = edge_force.unsqueeze(2).unbind(1)
    return c.normal * (a + b + d + e) + c.side[0] * (a - b) + c.side[1] * (d - e)


def contact_hessian(c: Pyramids, weight: Tensor) -> Tensor:
    """What contacts add to the Hessian (n, 21, N) about the origin: the sum of weight (n, 4, N) e e^T over edges e."""
    a, b, d, e = weight.unbind(1)
    n, (p, q) = c.normal.unbind(1), (c.side[0].unbind(1), c.side[1].unbind(1))
    normal, first, second, along_first, along_second = a + b + d + e, a + b, d + e, a - b, d - e

    def entry(i: int, j: int) -> Tensor:
        return (
            normal * n[i] * n[j]
            + first * p[i] * p[j]
            + second * q[i] * q[j]
            + along_first * (n[i] * p[j] + p[i] * n[j])
            + along_second * (n[i] * q[j] + q[i] * n[j])
        )

    return shift_to_origin(c.point, (entry(0, 0), entry(0, 1), entry(0, 2), entry(1, 1), entry(1, 2), entry(2, 2)))


def make_constraints(model: Model, qpos: Tensor, qvel: Tensor, smooth: Smooth) -> Constraints:
    """All rows of the constraint problem at this state. aref = -b J qvel - k d (distance - margin), see `Softness`."""
    place = smooth.xpos, smooth.xmat, smooth.origin
    point, normal, distance, tangent = fixed_contacts(model, *place)
    contacts = Pyramids(point, normal, tangent * model.friction.unsqueeze(1))
    softness = model.contact_softness
    invweight = pyramid_invweight(model, model.friction, softness.invweight)
    contact_weight, position = row_terms(softness, invweight, distance)
    velocity = contact_velocity(model, contacts, smooth.cvel)
    contact_reference = position.unsqueeze(1) - softness.damping.unsqueeze(1) * velocity

    softness = model.limit_softness
    distance_to_limit = model.limit_sign * (qpos[model.limit_qpos_index] - model.limit_bound)
    limit_weight, position = row_terms(softness, softness.invweight, distance_to_limit)
    limit_reference = position - softness.damping * model.limit_sign * qvel[model.limit_dof_index]

    index, (point, normal, distance, tangent), dropped = pair_contacts(model, *place)
    pairs = Pyramids(point, normal, tangent * choose_pairs(model.pair_friction, index).unsqueeze(1))
    rows = pair_rows(model, qvel, smooth.cdof, index, distance, pairs)
    if model.couplings:
        rows = map(torch.cat, zip(rows, coupling_rows(model, qpos, qvel), strict=True))
    jacobian, pair_weight, pair_reference = rows
    weight = Rows(contact_weight.unsqueeze(1), limit_weight, pair_weight)
    reference = Rows(contact_reference, limit_reference, pair_reference)
    friction = -model.frictionloss_damping * qvel if model.has_frictionloss else qvel[:0]
    return Constraints(contacts, weight, reference, jacobian, pairs, index, dropped, friction)


# ----------------------------------------------------------------------------------------------------------------------
# Newton solver (mj_solNewton): minimise 1/2 (x - a0)^T M (x - a0) + sum over rows of 1/2 D min(J x - aref, 0)^2,
# where a0 = M^-1 qfrc_smooth is the acceleration without constraints. At the minimum, M x = qfrc_smooth + J^T f with
# the constraint forces f = -D min(J x - aref, 0). Dry friction adds further terms, see `dry_friction`
# ----------------------------------------------------------------------------------------------------------------------


def linear_terms(model: Model, smooth: Smooth, x: Tensor) -> Iterate:
    """x (nv, N), its link accelerations and J x of every row, without aref: the `Iterate` of a direction x."""
    c, motion = smooth.constraints, link_motion(model, smooth.cdof, x)
    contact = contact_velocity(model, c.contacts, motion)
    return Iterate(x, motion, Rows(contact, model.limit_sign * x[model.limit_dof_index], (c.pair_jacobian * x).sum(1)))


def candidate(model: Model, smooth: Smooth, x: Tensor) -> Iterate:
    """The `Iterate` at acceleration x (nv, N)."""
    it = linear_terms(model, smooth, x)
    return it._replace(residual=map_tensors(torch.sub, it.residual, smooth.constraints.reference))


def active_weights(c: Constraints, it: Iterate) -> Rows:
    """D of the rows that push (J x < aref), 0 for others. D times the residual J x - aref is minus a row's force."""
    return map_tensors(lambda residual, weight: torch.where(residual < 0, weight, 0.0), it.residual, c.weight)


SEARCH_STEPS = 8  # of the line search with dry friction


def dry_friction(model: Model, c: Constraints, qacc: Tensor) -> tuple[Tensor, Tensor]:
    """Force (nv, N) of joint friction loss, and the dofs' D (nv, N) where it is below its bound, else 0.

    The force is -D (x - aref), but at most `frictionloss`. So its cost is quadratic in x near aref and linear beyond.
    """
    unbounded = -model.frictionloss_weight * (qacc - c.frictionloss_reference)
    sticks = unbounded.abs() < model.frictionloss
    return unbounded.clamp(-model.frictionloss, model.frictionloss), torch.where(sticks, model.frictionloss_weight, 0.0)


def inner(model: Model, inertia: Tensor, a: Iterate, b: Iterate) -> Tensor:
    """a^T M b (N), summed over the links, as for kinetic energy."""
    return dot(a.motion, apply_symmetric(inertia, b.motion)).sum(0) + (model.dof_armature * a.qacc * b.qacc).sum(0)


def cost(model: Model, smooth: Smooth, it: Iterate) -> Tensor:
    """The objective (N), up to the constant 1/2 a0^T M a0."""
    c = smooth.constraints
    contact, limit, pair = active_weights(c, it).times(it.residual).dot(it.residual)
    total = 0.5 * inner(model, smooth.inertia, it, it) - (it.qacc * smooth.qfrc_smooth).sum(0) + 0.5 * contact
    if model.has_frictionloss:
        force = dry_friction(model, c, it.qacc)[0].abs()
        slack = force / model.frictionloss_weight.clamp(min=MINVAL)
        total = total + (force * ((it.qacc - c.frictionloss_reference).abs() - 0.5 * slack)).sum(0)
    return total + 0.5 * (limit + pair)


def newton_system(model: Model, smooth: Smooth, it: Iterate) -> tuple[Tensor, Tensor]:
    """The system of the Newton direction for `solve_packed`: H (nnz, N), and g beside W (nv, 1 + nr, N).

    g is minus the gradient. The rows of pairs couple branches of the tree. H has the tree's sparsity, so it leaves them
    out. Each of them gives W a column sqrt(D) J^T.
    """
    c = smooth.constraints
    weight = active_weights(c, it)
    minus_force = weight.times(it.residual)
    diagonal = model.dof_armature + add_limits(model, weight.limit)
    if model.has_frictionloss:
        friction, sticking = dry_friction(model, c, it.qacc)
        diagonal = diagonal + sticking
    hessian = composite(model, smooth.cdof, smooth.inertia, diagonal, contact_hessian(c.contacts, weight.contact))
    wrench = apply_symmetric(smooth.inertia, it.motion)
    at_contacts = force_at(c.contacts.point, contact_force(c.contacts, minus_force.contact))
    gradient = generalized_force(model, smooth.cdof, wrench, at_contacts)
    gradient = gradient + model.dof_armature * it.qacc - smooth.qfrc_smooth
    gradient = gradient + add_limits(model, model.limit_sign * minus_force.limit)
    gradient = gradient + (c.pair_jacobian * minus_force.pair.unsqueeze(1)).sum(0)
    if model.has_frictionloss:
        gradient = gradient - friction
    scaled = (c.pair_jacobian * torch.sqrt(weight.pair).unsqueeze(1)).transpose(0, 1)
    return hessian, torch.cat((-gradient.unsqueeze(1), scaled), 1)


def derivatives(model: Model, smooth: Smooth, full: Iterate, direction: Iterate) -> tuple[Tensor, Tensor]:
    """Slope and curvature (N) of the cost at `full` along `direction`."""
    c, change = smooth.constraints, direction.residual
    weight = active_weights(c, full)
    slope = inner(model, smooth.inertia, direction, full) - (direction.qacc * smooth.qfrc_smooth).sum(0)
    slope = sum(weight.times(full.residual).dot(change), slope)
    curvature = sum(weight.dot(change.times(change)), inner(model, smooth.inertia, direction, direction))
    if model.has_frictionloss:
        friction, sticking = dry_friction(model, c, full.qacc)
        slope = slope - (friction * direction.qacc).sum(0)
        curvature = curvature + (sticking * direction.qacc**2).sum(0)
    return slope, curvature


def line_search(model: Model, smooth: Smooth, it: Iterate, direction: Tensor) -> Iterate:
    """Move along the Newton direction (nv, N).

    The length is 1, with one correction by Newton's method on the cost along the direction. With dry friction one
    correction may overshoot. Then Newton's method between bounds minimises the cost along the direction.
    """
    direction = linear_terms(model, smooth, direction)
    moved = lambda length: map_tensors(lambda start, change: start + length * change, it, direction)
    length, low, high = 1.0, 0.0, math.inf
    for _ in range(SEARCH_STEPS if model.has_frictionloss else 1):
        slope, curvature = derivatives(model, smooth, moved(length), direction)
        correction = slope / curvature.clamp(min=torch.finfo(slope.dtype).tiny)
        if model.has_frictionloss:
            low, high = torch.where(slope < 0, length, low), torch.where(slope < 0, high, length)
            newton = length - correction
            bounded = (low <= newton) & (newton <= high) | (correction.abs() < 1e-6)
            correction = torch.where(
                bounded, correction, length - torch.where(high < math.inf, 0.5 * (low + high), 2 * length)
            )
        length = length - correction
    return moved(length)


# ----------------------------------------------------------------------------------------------------------------------
# Forward dynamics and integrators (mj_forward, mj_Euler, mj_implicit, mj_RungeKutta)
# ----------------------------------------------------------------------------------------------------------------------


def smooth_dynamics(model: Model, qpos: Tensor, qvel: Tensor, ctrl: Tensor) -> Smooth:
    """Kinematics, inertia, forces and constraint rows of a state (qpos, qvel) under ctrl (nu, N)."""
    xpos, xmat = kinematics(model, qpos)
    origin = xpos[model.trunk]
    cdof = motion_subspace(model, xpos, xmat, origin)
    cvel = link_motion(model, cdof, qvel)
    inertia = spatial_inertia(model, xpos, xmat, origin)
    mass_matrix = composite(model, cdof, inertia, model.dof_armature)
    qfrc_bias = bias_force(model, cdof, cvel, inertia, qvel)
    qfrc_actuator, actuator_damping = actuator_force(model, qpos, qvel, ctrl)
    qfrc_smooth = qfrc_actuator + passive_force(model, qpos, qvel) - qfrc_bias
    if len(model.fluid_link_index):
        qfrc_smooth = qfrc_smooth + fluid_force(model, xpos, xmat, origin, cdof, cvel)
    smooth = Smooth(
        xpos, xmat, origin, cdof, cvel, inertia, mass_matrix, qfrc_bias, qfrc_actuator, qfrc_smooth, actuator_damping
    )
    return smooth._replace(constraints=make_constraints(model, qpos, qvel, smooth))


def integrate_position(model: Model, qpos: Tensor, move: Tensor) -> Tensor:
    """qpos moved by `move` (nv, N), a velocity times a duration; quaternions turn in body axes (mj_integratePos)."""
    rows = list((qpos + move[model.qpos_dof_index]).unbind(0))
    for adr, dof in model.quaternions:
        quat = quat_multiply(qpos[adr : adr + 4], quat_exponential(move[dof : dof + 3]))
        rows[adr : adr + 4] = (quat * torch.rsqrt(dot(quat, quat))).unbind(0)
    return torch.stack(rows)


def chart_rate(model: Model, qvel: Tensor, duration: float, rate: Tensor) -> Tensor:
    """How fast each coordinate of a stage's displacement changes (nv, N), if the stage has velocity `qvel`.

    For hinges, slides and translations this is qvel. For a quaternion, the displacement is the rotation vector u =
    duration * rate. If the body turns at w in its own axes, u changes at w + u x w / 2 + c u x (u x w), where t = |u|
    and c = (1 - (t/2) cot(t/2)) / t^2. MuJoCo uses this form too (Iserles et al. 2000, Lie-group methods, B.3).
    """
    rows = list(qvel.unbind(0))
    for _, dof in model.quaternions:
        w, u = qvel[dof : dof + 3], duration * rate[dof : dof + 3]
        square = dot(u, u)
        small = square < 1e-8
        half = 0.5 * torch.sqrt(torch.where(small, 1.0, square))
        c = torch.where(small, 1 / 12 + square / 720, (1 - half / torch.tan(half)) / torch.where(small, 1.0, square))
        bracket = cross(u, w)
        rows[dof : dof + 3] = (w + 0.5 * bracket + c * cross(u, bracket)).unbind(0)
    return torch.stack(rows)


def stage(model: Model, state: State, duration: float, rate: Tensor, qacc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """qpos, qvel and `chart_rate` of a Runge-Kutta stage: `state` after `duration` s at velocity `rate` and `qacc`."""
    qvel = state.qvel + duration * qacc
    return integrate_position(model, state.qpos, duration * rate), qvel, chart_rate(model, qvel, duration, rate)


def combine_stages(model: Model, state: State, rates: list[Tensor], qaccs: list[Tensor]) -> State:
    """The classical weights 1/6, 1/3, 1/3, 1/6 over four stages."""
    rate, qacc = ((k[0] + 2 * k[1] + 2 * k[2] + k[3]) / 6 for k in (rates, qaccs))
    qpos = integrate_position(model, state.qpos, model.timestep * rate)
    return State(qpos, state.qvel + model.timestep * qacc, qaccs[0].clone())


# run.f is the function f of a step, eager or compiled. EAGER has the eager functions, which are the reference; it is
# filled below `end_step`, the last of them. `compile_regions` makes compiled ones.
Regions = types.SimpleNamespace
EAGER = Regions()


def begin_dynamics(model: Model, state: State, ctrl: Tensor) -> Dynamics:
    """What `forward` computes before the first Newton iteration.

    As in MuJoCo, it starts from the better of the warm start and the acceleration without constraints.
    """
    smooth = smooth_dynamics(model, state.qpos, state.qvel, ctrl)
    unconstrained = solve_packed(model, smooth.mass_matrix, smooth.qfrc_smooth.unsqueeze(1))
    free, warm = (candidate(model, smooth, x) for x in (unconstrained, state.warmstart))
    better = cost(model, smooth, warm) < cost(model, smooth, free)
    return Dynamics(smooth, map_tensors(lambda w, f: torch.where(better, w, f), warm, free))


def newton_iteration(model: Model, smooth: Smooth, it: Iterate) -> Iterate:
    """One Newton iteration, with its line search."""
    matrix, right = newton_system(model, smooth, it)
    return line_search(model, smooth, it, solve_packed(model, matrix, right))


def forward(model: Model, state: State, ctrl: Tensor, iterations: int, run: Regions = EAGER) -> Dynamics:
    """Acceleration of `state` under ctrl (nu, N), after a fixed number of Newton iterations."""
    smooth, it = run.begin_dynamics(model, state, ctrl)
    for _ in range(iterations):
        it = run.newton_iteration(model, smooth, it)
    return Dynamics(smooth, it)


def advance(model: Model, state: State, dynamics: Dynamics, implicitfast: bool) -> State:
    """The state after a timestep of mj_Euler or mj_implicit: semi-implicit Euler. Damping slows qacc."""
    smooth, qacc = dynamics.smooth, dynamics.solution.qacc
    slowing = torch.zeros_like(qacc)
    damps = model.implicitfast_damps if implicitfast else model.euler_damps
    if damps:
        damping = model.timestep * (model.dof_damping + (smooth.actuator_damping if implicitfast else 0.0))
        damping = damping.expand_as(qacc)
        matrix = smooth.mass_matrix + damping[model.entry_row_index] * model.entry_diagonal
        slowing = solve_packed(model, matrix, (damping * qacc).unsqueeze(1))
    qvel = state.qvel + model.timestep * (qacc - slowing)
    return State(integrate_position(model, state.qpos, model.timestep * qvel), qvel, qacc.clone())


def runge_kutta(model: Model, state: State, ctrl: Tensor, iterations: int, run: Regions) -> tuple[State, Dynamics]:
    """mj_RungeKutta of MuJoCo 4: classical fourth order, on rotations in the Runge-Kutta-Munthe-Kaas form.

    Returns the dynamics of the fourth stage, which is what MuJoCo leaves in mjData.
    """
    dynamics = forward(model, state, ctrl, iterations, run)
    rates, qaccs = [state.qvel], [dynamics.solution.qacc]
    for part in (0.5, 0.5, 1.0):
        duration = part * model.timestep
        qpos, qvel, rate = run.stage(model, state, duration, rates[-1], qaccs[-1])
        dynamics = forward(model, State(qpos, qvel, qaccs[-1]), ctrl, iterations, run)
        rates.append(rate)
        qaccs.append(dynamics.solution.qacc)
    return run.combine_stages(model, state, rates, qaccs), dynamics


def step(
    model: Model, state: State, ctrl: Tensor, integrator: str = "mjcf", iterations: int = 4, run: Regions = EAGER
) -> tuple[State, Dynamics]:
    """Advance every robot by one timestep under ctrl (nu, N). Returns the next state and the last dynamics computed.

    integrator: euler (mj_Euler: implicit in the joints' damping), implicitfast (mj_implicit: also in the actuators'
    damping), rk4, or mjcf for that of the MJCF. iterations: of Newton's method, at least 1. run: the compiled or eager
    functions.

    For euler and implicitfast, MuJoCo solves (M + h B) a = qfrc_smooth + qfrc_constraint with timestep h and damping B.
    Once Newton's method has converged, the right side is M qacc, and so a = qacc - (M + h B)^-1 h B qacc. This file
    uses the second form. It contains no constraint force, so a force that has not converged cannot disturb it.
    """
    check_at_least(1, iterations=iterations)
    integrator = model.integrator if integrator == "mjcf" else integrator
    if integrator not in INTEGRATORS:
        raise InputError(f"unknown integrator {integrator!r}; choose one of mjcf, {', '.join(INTEGRATORS)}")
    if integrator == "rk4":
        return runge_kutta(model, state, ctrl, iterations, run)
    implicitfast = integrator == "implicitfast"
    unsupported = {  # forces whose derivatives MuJoCo takes (documentation, Computation, Gyroscopic derivatives)
        "fluid or tendon forces": len(model.fluid_link_index) or len(model.tendon_moment) or model.actuated_tendons,
        "a free body without other joints and with unequal moments of inertia": model.gyroscopic,
    }
    for what, found in unsupported.items():
        if implicitfast and found:
            raise InputError(f"unsupported: {what} with implicitfast; use --integrator euler or rk4")
    dynamics = forward(model, state, ctrl, iterations, run)
    return run.advance(model, state, dynamics, implicitfast), dynamics


# ----------------------------------------------------------------------------------------------------------------------
# Contact forces and body quantities as MuJoCo reports them (mj_comPos, mj_comVel, mj_rnePostConstraint)
# ----------------------------------------------------------------------------------------------------------------------


def normal_forces(dynamics: Dynamics) -> Tensor:
    """Normal force (nc, N) in newtons of each contact with a fixed geom."""
    c, it = dynamics.smooth.constraints, dynamics.solution
    return -active_weights(c, it).times(it.residual).contact.sum(1)


def constraint_force(model: Model, dynamics: Dynamics) -> Tensor:
    """qfrc_constraint (nv, N) = J^T f of all constraints, with f = -D min(J x - aref, 0)."""
    smooth, it = dynamics
    c = smooth.constraints
    minus_force = active_weights(c, it).times(it.residual)
    at_contacts = force_at(c.contacts.point, contact_force(c.contacts, minus_force.contact))
    total = generalized_force(model, smooth.cdof, torch.zeros_like(smooth.cvel), at_contacts)
    total = total + add_limits(model, model.limit_sign * minus_force.limit)
    total = total + (c.pair_jacobian * minus_force.pair.unsqueeze(1)).sum(0)
    return dry_friction(model, c, it.qacc)[0] - total if model.has_frictionloss else -total


def centre_of_mass(model: Model, xpos: Tensor, xmat: Tensor) -> Tensor:
    """Centre of mass (3, N) of all links in the world, m."""
    return (model.mass.unsqueeze(1) * (xpos + apply(xmat, model.com))).sum(0) / model.mass.sum(0)


def body_inertias(model: Model, xpos: Tensor, xmat: Tensor, com: Tensor) -> Tensor:
    """cinert (nbody - 1, 10, N): inertia about `com` (xx, yy, zz, xy, xz, yz), mass times offset from `com`, mass."""
    at, turn = xpos[model.body_link_index[1:]], xmat[model.body_link_index[1:]]
    offset = at + apply(turn, model.body_com[1:]) - com
    mass = model.body_mass[1:, None] + torch.zeros_like(offset[:, :1])
    i = compose(compose(turn, model.body_inertia[1:]), turn.transpose(1, 2))
    own = torch.stack((i[:, 0, 0], i[:, 1, 1], i[:, 2, 2], i[:, 0, 1], i[:, 0, 2], i[:, 1, 2]), 1)
    x, y, z = offset.unbind(1)
    carried = torch.stack((y * y + z * z, x * x + z * z, x * x + y * y, -x * y, -x * z, -y * z), 1)
    return torch.cat((own + mass * carried, mass * offset, mass), 1)


def body_velocities(model: Model, cvel: Tensor, com_from_origin: Tensor) -> Tensor:
    """cvel (nbody - 1, 6, N) of each body about the centre of mass. com_from_origin: (3, N) m from the origin to it."""
    moving = cvel[model.body_link_index[1:]]
    arm = com_from_origin.expand_as(moving[:, :3])
    return torch.cat((moving[:, :3], moving[:, 3:] + cross(moving[:, :3], arm)), 1)


def contact_forces(model: Model, dynamics: Dynamics) -> tuple[Tensor, Tensor]:
    """Contact forces in world axes: (nc, 3, N) of fixed geoms on the geoms that move, (S, 3, N) on each second geom."""
    c, it = dynamics.smooth.constraints, dynamics.solution
    minus_force = active_weights(c, it).times(it.residual)
    force = -contact_force(c.contacts, minus_force.contact)
    slots = model.pair_slots, model.pair_edges
    edge_force = -minus_force.pair[: math.prod(slots)].unflatten(0, slots)
    return force, contact_force(c.pairs, edge_force) if model.pair_edges == 4 else c.pairs.normal * edge_force


def contact_wrenches(model: Model, dynamics: Dynamics, com: Tensor) -> Tensor:
    """cfrc_ext (nbody - 1, 6, N): torque about `com` (3, N) and force of all contacts on each body, world axes."""
    c, (force, pair_force) = dynamics.smooth.constraints, contact_forces(model, dynamics)
    arm = dynamics.smooth.origin - com
    total = (model.body_contacts * force_at(c.contacts.point + arm, force)).sum(1)
    wrench = force_at(c.pairs.point + arm, pair_force)
    sign = model.pair_body_sign.squeeze(-1)[c.pair_index].transpose(1, 2)  # (S, nbody, N)
    return total + (sign[:, 1:].unsqueeze(2) * wrench.unsqueeze(1)).sum(0)


# ----------------------------------------------------------------------------------------------------------------------
# Tasks: Gymnasium's own, option by option (gymnasium/envs/mujoco/*_v5.py); five more are in tasks/gymnasium_more.py
# ----------------------------------------------------------------------------------------------------------------------


Range = tuple[float, float]
Tensors = dict[str, Tensor]  # named tensors, (rows, N) or (N,)


def scaled(uniform: Tensor, bounds: Range) -> Tensor:
    """`uniform` in [0, 1), mapped to [low, high)."""
    return bounds[0] + (bounds[1] - bounds[0]) * uniform


def inside(value: Tensor, bounds: Range) -> Tensor:
    """Whether low < value < high."""
    return (bounds[0] < value) & (value < bounds[1])


class Measured(NamedTuple):
    """What a task sees of the robots after a step, or after a reset, when there is no `dynamics`.

    Gymnasium reads qpos and qvel after the step, and everything else from mjData, which still holds the last evaluation
    of the dynamics before the step ended. `Task.sense` reproduces that.
    """

    qpos: Tensor  # (nq, N)
    qvel: Tensor  # (nv, N)
    dynamics: Dynamics | None
    memory: Tensors  # what the task remembers from step to step
    push: Tensor  # (2, N) m/s along the world's x and y: the push of this step, zero for most robots
    invalid: Tensor | None = None  # (N,) bool: the simulation diverged in this step; known only in `begin`


@dataclass(frozen=True)
class Task:
    """A robot, what it observes and what it is rewarded for. The fields are options, under Gymnasium's names.

    The methods are written for one robot, in columns of tensors. No robot sees another. The methods are compiled:
    numbers of Python, and tensors that are not arguments, become constants, and the value of a tensor cannot decide
    what Python does. Random numbers come from `noise`. With dtype float32, compiled integers have 32 bits.

    A task of your own is a subclass with the same decorator. It names its MJCF, overrides `observe` and `reward`, and
    perhaps others. Shapes: actions (nu, N), rewards (N,), groups of observations (rows, N). `check_task` checks them.
    """

    xml_file: str = ""  # MJCF: a path from the folder of the task's file, or the name of one of Gymnasium's
    frame_skip: int = 1  # physics steps in a control step
    reset_noise_scale: float = 0.0  # the initial qpos and qvel differ from the model's by up to this

    # Attributes of the class, which are not options.
    max_episode_steps = 1000  # the time limit, where `VecSim` is given none
    solver_iterations = 4  # Newton iterations of the contact solver, where `VecSim` is given no number
    self_collision = True  # False omits contacts between moving geoms, where `VecSim` is given no choice
    terminate_when_unhealthy = True
    velocity_noise_scale = None  # of the initial qvel; None: reset_noise_scale
    normal_velocity_noise = False  # the initial qvel is normal with this deviation, instead of uniform
    resting_dofs = 0  # the last dofs, whose initial qvel is zero
    random_rows = 0  # how many random numbers `begin` and `remember` need
    averaged = ()  # names in `reward`'s answer whose means `VecSim.pop_statistics` reports
    noise_scale = {}  # scale of the observation noise of each group; 1 for others
    randomization = {  # parameters of `parameter_rows` for `randomize=True`; what a model lacks is left out
        "mass": 0.1, "centre_of_mass": 0.01, "friction": 0.3, "damping": 0.2, "armature": 0.2, "motor_strength": 0.1,
        "gravity": 0.05,
    }  # fmt: skip

    def source(self) -> str | Path:
        """The MJCF: a path, or the text itself."""
        own_file = getattr(sys.modules[type(self).__module__], "__file__", None) or "notebook"
        assets = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets"
        return find_file(self.xml_file, Path(own_file).parent, assets)

    def furnish(self, model: Model, m: mujoco.MjModel) -> Model:
        """Hook to modify the loaded model, for example to set the home pose or attach a terrain."""
        return model

    def sense(self, model: Model, p: Measured) -> Tensors:
        """Measurements. "position" (k, N) m is required: its change over a step is the velocity in `reward`."""
        return {"position": p.qpos[:1]}

    def observe(self, model: Model, p: Measured, sensed: Tensors) -> Tensors:
        """The groups of the observation by name, in order."""
        raise NotImplementedError

    def reward(self, model: Model, p: Measured, sensed: Tensors, action: Tensor, velocity: Tensor) -> Tensors:
        """Reward terms, under Gymnasium's names in `info`. `total` sums those that start with "reward_"."""
        raise NotImplementedError

    def total(self, terms: Tensors) -> Tensor:
        """The reward, from the terms."""
        return sum(value for name, value in terms.items() if name.startswith("reward_"))

    def healthy(self, p: Measured, sensed: Tensors) -> Tensor:
        """(N,) bool: False ends the episode, if terminate_when_unhealthy. `sense` measures what it needs of a model."""
        return torch.ones_like(p.qpos[0], dtype=torch.bool)

    def control(self, model: Model, action: Tensor) -> Tensor:
        """ctrl (nu, N) of an action. PD control of a joint is `<position kp="..." kv="..."/>` in the MJCF."""
        return action

    def action_range(self, model: Model) -> tuple[Tensor, Tensor]:
        """Lowest and highest action, (nu,) each."""
        return model.ctrl_low[:, 0], model.ctrl_high[:, 0]

    def action_limits(self, model: Model) -> tuple[Tensor, Tensor]:
        """Lowest and highest action, (nu,) each, that the actuators can follow. The physics clips beyond them."""
        return self.action_range(model)

    def begin(
        self, model: Model, qpos: Tensor, noise: Tensor, ended: Measured | None, limit: Tensor
    ) -> tuple[Tensor, Tensors]:
        """qpos of fresh episodes, and what the task remembers: (rows, N) each, by name.

        noise: (random_rows, N) in [0, 1). ended, limit: see `begin_episode`.
        """
        return qpos, {}

    def remember(self, model: Model, p: Measured, sensed: Tensors, action: Tensor, noise: Tensor) -> Tensors:
        """The memory after a step; p.memory is that before it. It has the names and shapes that `begin` returned."""
        return {}

    def privileged(self, model: Model, p: Measured, sensed: Tensors) -> Tensors:
        """Groups of what only a critic or a teacher sees, by name."""
        return {}

    def drawn_model(self, model: Model, m: mujoco.MjModel) -> mujoco.MjModel:
        """The mjModel to draw the robot with, for example with a terrain that `m` lacks."""
        return m


@dataclass(frozen=True)
class InvertedPendulum(Task):
    """Balance a pole on a cart: reward 1 while it stands."""

    xml_file: str = "inverted_pendulum.xml"
    frame_skip: int = 2
    reset_noise_scale: float = 0.01

    def observe(self, model: Model, p: Measured, sensed: Tensors) -> Tensors:
        return {"qpos": p.qpos, "qvel": p.qvel}

    def reward(self, model, p, sensed, action, velocity) -> Tensors:
        return {"reward_survive": self.healthy(p, sensed).to(p.qpos.dtype)}

    def healthy(self, p: Measured, sensed: Tensors) -> Tensor:
        return p.qpos[1].abs() <= 0.2


@dataclass(frozen=True)
class Locomotion(Task):
    """Move along x: what Gymnasium's tasks of this kind have in common."""

    frame_skip: int = 5
    forward_reward_weight: float = 1.0
    ctrl_cost_weight: float = 0.1
    exclude_current_positions_from_observation: bool = True
    places = 1  # coordinates that are excluded: x, or x and y

    def sense(self, model: Model, p: Measured) -> Tensors:
        return {"position": p.qpos[: self.places]}

    def observe(self, model: Model, p: Measured, sensed: Tensors) -> Tensors:
        return {"qpos": p.qpos[self.places * self.exclude_current_positions_from_observation :], "qvel": p.qvel}

    def reward(self, model, p, sensed, action, velocity) -> Tensors:
        forward = {
            "reward_forward": self.forward_reward_weight * velocity[0],
            "reward_ctrl": -self.ctrl_cost_weight * (action * action).sum(0),
        }
        return forward | dict(zip(("x_velocity", "y_velocity"), velocity.unbind(0)))


@dataclass(frozen=True)
class Hopper(Locomotion):
    """Hop forward on one leg."""

    xml_file: str = "hopper.xml"
    frame_skip: int = 4
    reset_noise_scale: float = 5e-3
    ctrl_cost_weight: float = 1e-3
    healthy_reward: float = 1.0
    terminate_when_unhealthy: bool = True
    healthy_state_range: Range = (-100.0, 100.0)
    healthy_z_range: Range = (0.7, math.inf)
    healthy_angle_range: Range = (-0.2, 0.2)

    def observe(self, model: Model, p: Measured, sensed: Tensors) -> Tensors:
        return super().observe(model, p, sensed) | {"qvel": p.qvel.clamp(-10, 10)}

    def reward(self, model, p, sensed, action, velocity) -> Tensors:
        survive = {"reward_survive": self.healthy_reward * self.healthy(p, sensed)}
        return super().reward(model, p, sensed, action, velocity) | survive

    def healthy(self, p: Measured, sensed: Tensors) -> Tensor:
        return (
            inside(torch.cat((p.qpos[2:], p.qvel)), self.healthy_state_range).all(0)
            & inside(p.qpos[1], self.healthy_z_range)
            & inside(p.qpos[2], self.healthy_angle_range)
        )


@dataclass(frozen=True)
class Walker2d(Hopper):
    """Walk forward on two legs."""

    xml_file: str = "walker2d_v5.xml"
    healthy_state_range: Range = dataclasses.field(default=(-math.inf, math.inf), init=False)
    healthy_z_range: Range = (0.8, 2.0)
    healthy_angle_range: Range = (-1.0, 1.0)


@dataclass(frozen=True)
class HalfCheetah(Locomotion):
    """Run forward; never terminates."""

    xml_file: str = "half_cheetah.xml"
    reset_noise_scale: float = 0.1
    normal_velocity_noise = True


@dataclass(frozen=True)
class Ant(Locomotion):
    """Walk forward on four legs; contact forces are observed and penalised."""

    xml_file: str = "ant.xml"
    reset_noise_scale: float = 0.1
    ctrl_cost_weight: float = 0.5
    contact_cost_weight: float = 5e-4
    contact_cost_range: Range = dataclasses.field(default=(-math.inf, math.inf), init=False)
    healthy_reward: float = 1.0
    terminate_when_unhealthy: bool = True
    healthy_z_range: Range = (0.2, 1.0)
    contact_force_range: Range = (-1.0, 1.0)
    include_cfrc_ext_in_observation: bool = True
    normal_velocity_noise = True
    places = 2

    def sense(self, model: Model, p: Measured) -> Tensors:
        if p.dynamics is None:
            return {"position": p.qpos[:2], "cfrc_ext": p.qpos.new_zeros(6 * (model.nbody - 1), p.qpos.shape[1])}
        xpos, xmat = p.dynamics.smooth[:2]
        wrenches = contact_wrenches(model, p.dynamics, centre_of_mass(model, xpos, xmat)).flatten(0, 1)
        return {"position": xpos[0, :2], "cfrc_ext": wrenches.clamp(*self.contact_force_range)}

    def observe(self, model: Model, p: Measured, sensed: Tensors) -> Tensors:
        names = ("cinert", "cvel", "qfrc_actuator", "cfrc_ext")
        included = [name for name in names if getattr(self, f"include_{name}_in_observation", False)]
        return Locomotion.observe(self, model, p, sensed) | {name: sensed[name] for name in included}

    def reward(self, model, p, sensed, action, velocity) -> Tensors:
        contact_cost = self.contact_cost_weight * (sensed["cfrc_ext"] ** 2).sum(0)
        return super().reward(model, p, sensed, action, velocity) | {
            "reward_contact": -contact_cost.clamp(*self.contact_cost_range),
            "reward_survive": self.healthy_reward * self.healthy(p, sensed),
        }

    def healthy(self, p: Measured, sensed: Tensors) -> Tensor:
        low, high = self.healthy_z_range
        return (low <= p.qpos[2]) & (p.qpos[2] <= high)


@dataclass(frozen=True)
class Humanoid(Ant):
    """Walk forward on two legs, in three dimensions."""

    xml_file: str = "humanoid.xml"
    reset_noise_scale: float = 1e-2
    forward_reward_weight: float = 1.25
    ctrl_cost_weight: float = 0.1
    contact_cost_weight: float = 5e-7
    contact_cost_range: Range = (-math.inf, 10.0)
    contact_force_range: Range = dataclasses.field(default=(-math.inf, math.inf), init=False)
    healthy_reward: float = 5.0
    healthy_z_range: Range = (1.0, 2.0)
    include_cinert_in_observation: bool = True
    include_cvel_in_observation: bool = True
    include_qfrc_actuator_in_observation: bool = True
    normal_velocity_noise = False

    def sense(self, model: Model, p: Measured) -> Tensors:
        if p.dynamics is None:
            xpos, xmat = kinematics(model, p.qpos)
            cvel = link_motion(model, motion_subspace(model, xpos, xmat, xpos[model.trunk]), p.qvel)
            com = centre_of_mass(model, xpos, xmat)
            qfrc_actuator = torch.zeros_like(p.qvel)
            cfrc_ext = p.qpos.new_zeros(model.nbody - 1, 6, p.qpos.shape[1])
        else:
            smooth = p.dynamics.smooth
            xpos, xmat, cvel, qfrc_actuator = smooth.xpos, smooth.xmat, smooth.cvel, smooth.qfrc_actuator
            com = centre_of_mass(model, xpos, xmat)
            cfrc_ext = contact_wrenches(model, p.dynamics, com)
        return {
            "position": com[:2],
            "cinert": body_inertias(model, xpos, xmat, com).flatten(0, 1),
            "cvel": body_velocities(model, cvel, com - xpos[model.trunk]).flatten(0, 1),
            "qfrc_actuator": qfrc_actuator[6:],
            "cfrc_ext": cfrc_ext.flatten(0, 1),
        }

    def reward(self, model, p, sensed, action, velocity) -> Tensors:
        terms = super().reward(model, p, sensed, action, velocity)
        return {"reward_survive": terms.pop("reward_survive")} | terms  # the first term of Gymnasium's sum

    def healthy(self, p: Measured, sensed: Tensors) -> Tensor:
        return inside(p.qpos[2], self.healthy_z_range)


HERE = Path(__file__).resolve().parent
TASKS: dict[str, type[Task] | str] = {  # a class, or file:class, which is loaded when it is asked for
    "InvertedPendulum-v5": InvertedPendulum,
    "InvertedDoublePendulum-v5": f"{HERE}/tasks/gymnasium_more.py:InvertedDoublePendulum",
    "Reacher-v5": f"{HERE}/tasks/gymnasium_more.py:Reacher",
    "Pusher-v5": f"{HERE}/tasks/gymnasium_more.py:Pusher",
    "Hopper-v5": Hopper,
    "Walker2d-v5": Walker2d,
    "HalfCheetah-v5": HalfCheetah,
    "Swimmer-v5": f"{HERE}/tasks/gymnasium_more.py:Swimmer",
    "Ant-v5": Ant,
    "Humanoid-v5": Humanoid,
    "HumanoidStandup-v5": f"{HERE}/tasks/gymnasium_more.py:HumanoidStandup",
    "Quadruped-Flat": f"{HERE}/tasks/quadruped.py:Flat",
    "Quadruped-Rough": f"{HERE}/tasks/quadruped.py:Rough",
}


def find_file(name: str, *folders: Path) -> Path:
    """The file `name` of the first of these folders that has it, or InputError."""
    places = [(folder / name).resolve() for folder in folders]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise InputError(f"no file {' or '.join(dict.fromkeys(map(str, places)))}")
    return found


def load_class(location: str) -> Any:
    """The class that `file.py:Class` names. The file is executed once in a process.

    A relative path starts at the working directory, or else at the folder of this file. InputError if the file or the
    class does not exist.
    """
    file, _, name = location.rpartition(":")
    path = find_file(file, Path.cwd(), HERE)
    module_name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, path)
        sys.modules[module_name] = importlib.util.module_from_spec(spec)  # Python's dataclasses looks for it there
        try:
            spec.loader.exec_module(sys.modules[module_name])
        except BaseException:  # a mistake in the file; the next call executes it again
            del sys.modules[module_name]
            raise
    kind = getattr(sys.modules[module_name], name, None)
    if not isinstance(kind, type):
        raise InputError(f"{path} has no class {name!r}")
    return kind


def find_task(env_id: str) -> type[Task]:
    """The class of a task: an id in TASKS, or `file.py:Class`. InputError if there is no such task."""
    kind = TASKS.get(env_id, env_id)
    if isinstance(kind, type):
        return kind
    if ".py:" not in kind:
        raise InputError(f"unknown task {env_id!r}; choose one of {', '.join(TASKS)}, or file.py:Class")
    return load_class(kind)


def build_task(env_id: str, options: dict[str, Any]) -> Task:
    """The task with its options. InputError for an unknown task or option, or a class that breaks a rule of tasks."""
    kind = find_task(env_id)
    rule = f"{env_id} must be a subclass of vecsim_torch.Task with the decorator @dataclass(frozen=True)"
    if not issubclass(kind, Task):
        raise InputError(rule)
    for cls in kind.__mro__[: kind.__mro__.index(Task)]:
        typed = inspect.get_annotations(cls)
        if typed and "__dataclass_fields__" not in vars(cls):
            raise InputError(f"{rule}; {cls.__name__} has no decorator, so its options would have no effect")
        for name in {field.name for field in dataclasses.fields(kind)}:
            if name in vars(cls).keys() - typed.keys():
                raise InputError(f"{cls.__name__}.{name} is an option, so it needs a type annotation")
    for name in ("observe", "reward"):
        if getattr(kind, name) is getattr(Task, name):
            raise InputError(f"{env_id} must define the method {name}")
    legal = [field.name for field in dataclasses.fields(kind) if field.init]
    for name in options:
        if name not in legal:
            raise InputError(f"unknown option {name!r} of {env_id}; it takes {', '.join(legal)}")
    clash = {field.name for field in dataclasses.fields(Options)} & {field.name for field in dataclasses.fields(kind)}
    if clash:
        advice = "omit its annotation" if hasattr(Task, min(clash)) else "rename it"
        raise InputError(f"{env_id} has an option {min(clash)!r}, which vecsim_torch.Options has too; {advice}")
    task = kind(**check_types(kind, options))
    numbers = "frame_skip max_episode_steps solver_iterations".split()
    check_at_least(1, **{name: getattr(task, name) for name in numbers})
    if not isinstance(task.self_collision, bool) or task.solver_iterations is None:
        raise InputError(f"{kind.__name__}.self_collision must be True or False, and solver_iterations a number")
    return task


# ----------------------------------------------------------------------------------------------------------------------
# Randomisation: how robots differ from the MJCF and from each other
# ----------------------------------------------------------------------------------------------------------------------

FACTORS = "mass friction damping armature frictionloss motor_strength position_gain velocity_gain gravity".split()
OF_THE_ROBOT = (*FACTORS, "centre_of_mass")  # parameters that stay the same for a whole episode


def parameter_rows(model: Model) -> dict[str, int]:
    """The parameters in which the robots can differ, of those that this model has, and how many numbers each needs.

    A heavier link is a denser link: its inertia scales with its mass. MuJoCo derives body_invweight0 and
    dof_invweight0, which soften contacts and limits, from the masses when it compiles a model. Here they keep their
    compiled values, as in MuJoCo when one changes mjModel's fields without mj_setConst. For a quadruped on the ground
    with masses 20% off, that changes qacc by 0.1% in the median and 2.4% at most (tests/test_vecsim_randomize.py).
    """
    has_servos = model.actuator_bias[1].any()
    rows = {  # name: how many numbers, and a field of the model that is zero where there is nothing to vary
        "mass": (model.nl, model.mass),  # factor of each link's mass and inertia
        "centre_of_mass": (3, model.mass),  # m, offset along each axis of the first link that has mass
        "friction": (1, torch.cat((model.friction, model.pair_friction))),  # factor of all contacts of a robot
        "damping": (model.nv, model.dof_damping),  # factor
        "armature": (model.nv, model.dof_armature),  # factor
        "frictionloss": (model.nv, model.frictionloss),  # factor of the dry friction of each dof
        "motor_strength": (model.nu, model.actuator_gain),  # factor of an actuator's force and force limits
        "position_gain": (model.nu, model.actuator_bias[1]),  # factor, of a position servo
        "velocity_gain": (model.nu, model.actuator_bias[2] * has_servos),  # factor, of a position servo
        "gravity": (1, model.gravity),  # factor
        "initial_position": (len(model.scalar_qpos_index), model.scalar_axis),  # rad or m, offset of hinges and slides
        "initial_velocity": (model.nv, model.mass),  # rad/s or m/s, offset of each dof at a reset
        "push": (1, model.push_motion),  # m/s, added to the robot's horizontal velocity
        "push_interval": (1, model.push_motion),  # s, from one push to the next; default 5 to 10
        "push_direction": (1, model.push_motion),  # rad about the world's z, from x; default all around
    }
    return {name: count for name, (count, needed) in rows.items() if needed.any()}


def choose_ranges(
    randomize: bool | dict[str, Any] | None, single: dict[str, Any], task: Task, model: Model
) -> dict[str, Range]:
    """The ranges (low, high) from which every robot draws its parameters, uniformly at each reset.

    randomize: True for the task's own ranges, or those of some parameters of `parameter_rows`. single: parameters given
    one by one; they replace the others. InputError for a parameter that this robot does not have.
    Equal ends give all robots the same value: friction=(0.5, 0.5) halves the friction of all. None keeps the MJCF's
    value. A single number x is short for (1 - x, 1 + x) of a factor, (0, x) of a push, (x, x) of an interval and
    (-x, x) of everything else.
    """
    known = parameter_rows(model)
    if randomize is True:
        randomize = {name: value for name, value in task.randomization.items() if name in known}
    of_pushes = {"push_interval": (5.0, 10.0), "push_direction": (0.0, 2 * math.pi)}
    given = (randomize or {}) | single
    if "push" not in given and (useless := of_pushes.keys() & given):
        raise InputError(f"randomize.{min(useless)} has no effect without randomize.push")
    given = of_pushes | given
    if given.get("push") is None:
        del given["push_interval"], given["push_direction"]
    for name in given:
        if name not in known:
            raise InputError(f"randomize.{name}: this robot has no {name} to vary; it has {', '.join(known)}")
    return {name: as_range(name, given[name]) for name in known if given.get(name) is not None}


def as_range(name: str, value: Any) -> Range:
    """(low, high) of a parameter that is given as a range or a number. InputError for a range that makes no sense."""
    centre = 1.0 if name in FACTORS else 0.0
    if isinstance(value, (int, float)):
        spread = {"push": (0.0, value), "push_interval": (value, value)}
        value = spread.get(name, (centre - value, centre + value))
    lowest = {"push": 0.0, "push_interval": 1e-3}.get(name, 1e-3 if name in FACTORS else -math.inf)
    is_pair = isinstance(value, (tuple, list)) and len(value) == 2
    if not is_pair or not lowest <= value[0] <= value[1] < math.inf:
        rule = f"a number or a range (low, high), low at least {lowest:g}"
        raise InputError(f"randomize.{name} = {value!r} must be {rule}")
    return float(value[0]), float(value[1])


def randomized_fields(model: Model, values: Tensors) -> dict[str, Tensor]:
    """The fields of `Model` that differ between robots, (..., N), from the `values` (rows, N) of the parameters."""
    factors = (
        ("mass", "mass"), ("friction", "friction"), ("friction", "pair_friction"), ("damping", "dof_damping"),
        ("armature", "dof_armature"), ("frictionloss", "frictionloss"), ("motor_strength", "force_low"),
        ("motor_strength", "force_high"), ("gravity", "gravity"),
    )  # fmt: skip
    fields = {field: getattr(model, field) * values[name] for name, field in factors if name in values}
    if "mass" in values:
        factor = values["mass"]
        of_body = torch.cat((factor, torch.ones_like(factor[:1])))[model.body_link_index]  # the last is the world
        fields["inertia"] = model.inertia * factor[:, None, None]
        fields["body_mass"] = model.body_mass * of_body
        fields["body_inertia"] = model.body_inertia * of_body[:, None, None]
    if "centre_of_mass" in values:
        shift = values["centre_of_mass"]
        is_trunk = torch.arange(model.nl, device=shift.device)[:, None, None] == model.trunk
        fields["com"] = model.com + is_trunk * shift
        fields["body_com"] = model.body_com + (model.body_link_index == model.trunk)[:, None, None] * shift
    names = "position_gain", "velocity_gain", "motor_strength"
    if values.keys() & names:
        of_position, of_velocity, strength = (values.get(name, 1.0) for name in names)
        gain, (offset, position, velocity) = model.actuator_gain, model.actuator_bias.unbind(0)
        biases = offset * strength, position * of_position * strength, velocity * of_velocity * strength
        fields["actuator_gain"] = torch.where(position != 0, gain * of_position, gain) * strength
        fields["actuator_bias"] = torch.stack(torch.broadcast_tensors(*biases))
    return fields


# ----------------------------------------------------------------------------------------------------------------------
# Environment step: pure functions of tensors, which can be split into chunks, compiled and captured
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What a `VecSim` was built with. It does not change from step to step."""

    task: Task
    integrator: str
    iterations: int
    max_episode_steps: int
    ranges: dict[str, Range]  # of `choose_ranges`
    observation_noise: float
    delay: int  # physics steps from an action to its effect
    hidden_observations: tuple[str, ...] | None  # groups of the observation that are left out
    stack_observations: int  # how many observations the policy sees at once
    delay_observations: int  # control steps until it sees an observation


class Noise(NamedTuple):
    """The random numbers of one step. They are drawn in every step, whether or not an episode ends."""

    qpos: Tensor  # (nq, N) in [0, 1)
    qvel: Tensor  # (nv, N) in [0, 1), or normal for a task with `normal_velocity_noise`
    task: Tensor  # (random_rows, N) in [0, 1), for the task's `begin` and `remember`
    parameters: Tensors  # values in the ranges of `Settings`
    observation: Tensor  # (obs, N) in [0, 1); no rows without observation noise


class Carry(NamedTuple):
    """All state of the environments between two steps."""

    qpos: Tensor  # (nq, N)
    qvel: Tensor  # (nv, N)
    warmstart: Tensor  # (nv, N) acceleration of the last physics step
    position: Tensor  # (k, N) m, from which the task measures the velocity
    age: Tensor  # (N,) steps counted towards the time limit; larger than episode_length after a late start
    episode_length: Tensor  # (N,) steps since the reset
    episode_return: Tensor  # (N,)
    parameters: Tensors  # the randomised parameters of this episode's robots
    push_countdown: Tensor  # (N,) s until the next push
    push: Tensor  # (2, N) m/s along the world's x and y: the push of the last step
    delayed: Tensor  # (k, nu, N) past actions that have not taken full effect, the newest first
    seen: Tensor  # (k, obs, N) past observations that the policy will still see, the newest first
    memory: Tensors  # what the task remembers


class Transition(NamedTuple):
    """What a step returns, environment axis last."""

    obs: Tensor  # (obs, N) after auto-reset
    final_obs: Tensor  # (obs, N) before auto-reset
    critic_obs: Tensor  # (critic obs, N) after auto-reset; no rows if the task has none
    final_critic_obs: Tensor  # (critic obs, N) before auto-reset
    reward: Tensor  # (N,)
    terminated: Tensor  # (N,) bool
    truncated: Tensor  # (N,) bool
    invalid: Tensor  # (N,) bool
    terms: Tensors  # (N,) each: reward terms and other measurements of the task; zero where invalid
    counted: Tensor  # (k, N) what `VecSim.pop_statistics` sums: STATISTICS, then the task's `averaged`


def map_tensors(function: Callable[..., Tensor], first: Any, *others: Any) -> Any:
    """Apply `function` to the tensors that have the same place in equally built NamedTuples and dicts."""
    if isinstance(first, Tensor):
        return function(first, *others)
    if isinstance(first, dict):
        return {name: map_tensors(function, first[name], *(other[name] for other in others)) for name in first}
    return type(first)(*(map_tensors(function, *parts) for parts in zip(first, *others, strict=True)))


def copy_tensors(to: Any, source: Any) -> None:
    """Copy the tensors of `source` to those that have the same place in `to`, in one operation for each type."""
    pairs: dict[torch.dtype, list] = {}
    map_tensors(lambda mine, theirs: pairs.setdefault(mine.dtype, []).append((mine, theirs)), to, source)
    for of_a_type in pairs.values():
        torch._foreach_copy_(*map(list, zip(*of_a_type, strict=True)))


RUNAWAY = 1e6  # a coordinate or velocity beyond this (m, rad, per s) is a diverged simulation


def reset_state(task: Task, model: Model, qpos_noise: Tensor, qvel_noise: Tensor) -> tuple[Tensor, Tensor]:
    """qpos (nq, N) and qvel (nv, N) of fresh episodes, from the random numbers of `Noise`."""
    qpos = model.qpos0 + task.reset_noise_scale * (2 * qpos_noise - 1)
    scale = task.reset_noise_scale if task.velocity_noise_scale is None else task.velocity_noise_scale
    qvel = scale * (qvel_noise if task.normal_velocity_noise else 2 * qvel_noise - 1)
    moving = model.nv - task.resting_dofs
    return qpos, torch.cat((qvel[:moving], torch.zeros_like(qvel[moving:])))


def begin_episode(
    settings: Settings, model: Model, noise: Noise, ended: Measured | None, limit: Tensor
) -> tuple[Carry, Measured, Tensors]:
    """Fresh episodes of the robots `model`: the state they begin with, what the task sees and what it senses.

    ended: the final state of the previous episodes, or None before the first. limit: (N,) steps that those episodes had
    from their start to the time limit.
    """
    task, drawn = settings.task, noise.parameters
    qpos, qvel = reset_state(task, model, noise.qpos, noise.qvel)
    if "initial_position" in drawn:
        qpos = qpos.index_add(0, model.scalar_qpos_index, drawn["initial_position"])
    if "initial_velocity" in drawn:
        qvel = qvel + drawn["initial_velocity"]
    qpos, memory = task.begin(model, qpos, noise.task, ended, limit)
    no_push = torch.zeros_like(qpos[:2])
    measured = Measured(qpos, qvel, None, memory, no_push)
    sensed = task.sense(model, measured)
    zero = torch.zeros_like(qpos[0])
    steps = torch.zeros_like(zero, dtype=torch.long)
    kept_actions = math.ceil(settings.delay / task.frame_skip)
    carry = Carry(
        qpos=qpos,
        qvel=qvel,
        warmstart=torch.zeros_like(qvel),
        position=sensed["position"],
        age=steps,
        episode_length=steps,
        episode_return=zero,
        parameters={name: rows for name, rows in drawn.items() if name in OF_THE_ROBOT},
        push_countdown=drawn["push_interval"][0] if "push" in drawn else zero,
        push=no_push,
        delayed=zero.expand(kept_actions, model.nu, -1),
        seen=zero.expand(0, 0, -1),  # there is no observation yet
        memory=memory,
    )
    return carry, measured, sensed


def observed(settings: Settings, model: Model, measured: Measured, sensed: Tensors) -> Tensors:
    """The groups of the observation, without the hidden ones."""
    groups, hidden = settings.task.observe(model, measured, sensed), settings.hidden_observations or ()
    return {name: rows for name, rows in groups.items() if name not in hidden}


def observations(
    settings: Settings, model: Model, measured: Measured, sensed: Tensors, noise: Noise
) -> tuple[Tensor, Tensor]:
    """obs (obs, N), what the policy sees, with noise; critic_obs (critic obs, N), what only a critic sees."""
    task = settings.task
    groups = observed(settings, model, measured, sensed)
    obs = torch.cat(list(groups.values()))
    if settings.observation_noise:
        scale = torch.cat([task.noise_scale.get(name, 1.0) * torch.ones_like(rows) for name, rows in groups.items()])
        obs = obs + settings.observation_noise * scale * (2 * noise.observation - 1)
    privileged = task.privileged(model, measured, sensed)
    return obs, torch.cat(list(privileged.values())) if privileged else obs[:0]


def show(settings: Settings, obs: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the policy sees now, (stack x obs, N), and the new `seen` of `Carry`.

    obs (obs, N) is the newest observation. The policy gets `stack_observations` of them, the oldest first; the newest
    of these is `delay_observations` steps old. seen: that of `Carry`, or None when an episode starts: then copies of
    obs take the place of past observations.
    """
    kept = settings.stack_observations - 1 + settings.delay_observations
    if seen is None:
        seen = obs.expand(kept, -1, -1)
    if not kept:
        return obs, seen
    newest_first = torch.cat((obs[None], seen))
    return newest_first[settings.delay_observations :].flip(0).flatten(0, 1), newest_first[:-1]


def begin_step(
    settings: Settings, model: Model, carry: Carry, action: Tensor, noise: Noise
) -> tuple[Carry, list[Tensor]]:
    """Push the robots whose time has come. Returns the carry, and ctrl (nu, N) of this action and of the delayed ones,
    the newest first."""
    task, drawn = settings.task, noise.parameters
    if "push" in drawn:
        due = carry.push_countdown <= 0
        speed, direction, interval = (drawn[name][0] for name in ("push", "push_direction", "push_interval"))
        kick = torch.stack((speed * torch.cos(direction), speed * torch.sin(direction)))
        kick = torch.where(due, kick, 0.0)
        countdown = torch.where(due, interval, carry.push_countdown) - task.frame_skip * model.timestep
        qvel = carry.qvel + (model.push_motion * kick).sum(1)
        carry = carry._replace(qvel=qvel, push=kick, push_countdown=countdown)
    actions = [action, *carry.delayed.unbind(0)]
    if settings.delay:
        carry = carry._replace(delayed=torch.stack(actions[:-1]))
    return carry, [task.control(model, past) for past in actions]


Answers = list[tuple[str, Tensor]]  # methods of a task, and what they answered


def check_task(settings: Settings, model: Model, noise: Noise) -> tuple[Tensors, Tensors, Answers]:
    """Call every method of the task once, for the N robots of `noise`. Returns what `observe` and `privileged` answered
    at the start, and all answers. InputError if one has a wrong shape, or if the integrator is not possible."""
    task, n, answers = settings.task, noise.qpos.shape[-1], []

    def check(method: str, answer: Any, *rows: int | None) -> Tensor:
        """The answer, which must be (*rows, N); None is any number."""
        given = tuple(answer.shape) if isinstance(answer, Tensor) else (type(answer).__name__,)
        if len(given) != len(rows) + 1 or any(x not in (y, None) for x, y in zip((*rows, n), given)):
            shape = ", ".join("rows" if x is None else str(x) for x in rows)
            rule = f"{method} must be a tensor of shape ({shape and f'{shape}, '}N)"
            raise InputError(f"{rule}, not ({', '.join(map(str, given))}); in this check N = {n}")
        answers.append((method, answer))
        return answer

    def check_named(method: str, answer: Any, *rows: int | None, like: Tensors | None = None) -> Tensors:
        given = list(answer) if isinstance(answer, dict) else type(answer).__name__
        if isinstance(given, str) or (like is not None and answer.keys() != like.keys()):
            names = "" if like is None else f" with the names {list(like)}"
            raise InputError(f"{method} must be a dict of tensors{names}, not {given}")
        for name, value in answer.items():
            check(f"{method}[{name!r}]", value, *(rows if like is None else like[name].shape[:-1]))
            if like is not None and value.dtype != (first := like[name].dtype):
                raise InputError(f"{method}[{name!r}] must be of {first}, as at the start, not {value.dtype}")
        return answer

    def begin(ended: Measured | None, like: Tensors | None = None) -> tuple[Tensor, Tensors]:
        first, memory = task.begin(model, qpos, noise.task, ended, torch.ones_like(qpos[0], dtype=torch.long))
        return check("the qpos of begin", first, model.nq), check_named("the memory of begin", memory, None, like=like)

    qpos, qvel = reset_state(task, model, noise.qpos, noise.qvel)
    qpos, memory = begin(None)
    start = Measured(qpos, qvel, None, memory, torch.zeros_like(qpos[:2]))
    sensed = task.sense(model, start)
    if not isinstance(sensed, dict) or "position" not in sensed:
        raise InputError('sense must be a dict of tensors with the name "position"')
    check("sense['position']", sensed["position"], None)
    groups = check_named("observe", task.observe(model, start, sensed), None)
    privileged = check_named("privileged", task.privileged(model, start, sensed), None)
    action = noise.qvel[:1].expand(model.nu, -1)
    ctrl = check("control", task.control(model, action), model.nu)
    _, dynamics = step(model, State(qpos, qvel, torch.zeros_like(qvel)), ctrl, settings.integrator, 1)
    qpos, qvel = qpos + 0.1 * noise.qpos, qvel + 0.1 * noise.qvel  # robots differ
    after = start._replace(qpos=qpos, qvel=qvel, dynamics=dynamics)
    now = check_named("sense", task.sense(model, after), like=sensed)
    velocity = noise.qvel[:1].expand_as(now["position"])
    terms = check_named("reward", task.reward(model, after, now, action, velocity))
    check("the sum of the rewards whose names start with reward_", task.total(terms))
    for name in {"invalid", "final_obs", "final_info", "critic_obs", "final_critic_obs"} & terms.keys():
        raise InputError(f"reward[{name!r}] needs another name, because `step` reports something else under it")
    for name in task.averaged:
        if name in STATISTICS:
            raise InputError(f"averaged has {name!r}, which `pop_statistics` reports already; rename it")
        if name not in terms:
            raise InputError(f"averaged has {name!r}, but may name only what reward answers: {', '.join(terms)}")
    healthy = check("healthy", task.healthy(after, now))
    if healthy.dtype != torch.bool:
        raise InputError(f"healthy must be a tensor of torch.bool, not {healthy.dtype}")
    check_named("remember", task.remember(model, after, now, action, noise.task), like=memory)
    begin(after._replace(invalid=~healthy), like=memory)
    check_named("observe", task.observe(model, after, now), like=groups)
    check_named("privileged", task.privileged(model, after, now), like=privileged)
    return groups, privileged, answers


def check_independence(many: Answers, one: Answers) -> None:
    """InputError if an answer for the last of `many` robots differs from that for this robot alone, in `one`.

    Batched solvers round differently, and contacts amplify that; a difference of 0.1% of all numbers together passes.
    """
    for (name, given), (_, alone) in zip(many, one, strict=True):
        given, alone = given[..., -1:].double(), alone.double()
        tolerance = 1e-3 * (1 + float(alone.nan_to_num().abs().sum()))  # host sync
        if not torch.allclose(given, alone, rtol=0, atol=tolerance, equal_nan=True):
            raise InputError(f"{name} of a robot depends on the other robots, but a task computes each of them alone")


def end_step(
    settings: Settings,
    model: Model,
    following: Model,
    carry: Carry,
    dynamics: Dynamics,
    dropped: Sequence[Tensor],
    action: Tensor,
    noise: Noise,
) -> tuple[Carry, Transition]:
    """Reward, termination and auto-reset after the physics of a control step.

    following: the robots of the episodes that begin if this step ends one; `model` has those of the episodes that run.
    carry: qpos, qvel and warmstart are already those of the new state. dropped: (N,) contacts that found no pair slot,
    in each physics step. action: (nu, N). A robot whose simulation diverged (not finite, or beyond RUNAWAY) is reset
    alone. It is reported as invalid and truncated, with reward 0 and with its fresh observation as `final_obs`.
    """
    task = settings.task
    moving = torch.cat((carry.qpos, carry.qvel))
    invalid = ~(moving.abs() < RUNAWAY).all(0) | ~torch.isfinite(carry.warmstart).all(0)
    after = Measured(carry.qpos, carry.qvel, dynamics, carry.memory, carry.push)
    sensed = task.sense(model, after)
    velocity = (sensed["position"] - carry.position) / (task.frame_skip * model.timestep)
    terms = task.reward(model, after, sensed, action, velocity)
    reward = task.total(terms)
    invalid = invalid | ~torch.isfinite(reward)
    reward = torch.where(invalid, 0.0, reward)

    age, length = carry.age + 1, carry.episode_length + 1
    terminated = ~invalid & ~task.healthy(after, sensed) & task.terminate_when_unhealthy
    truncated = ((age >= settings.max_episode_steps) & ~terminated) | invalid
    ended = terminated | truncated
    episode_return = carry.episode_return + reward

    limit = settings.max_episode_steps - (carry.age - carry.episode_length)
    fresh, fresh_measured, fresh_sensed = begin_episode(
        settings, following, noise, after._replace(invalid=invalid), limit
    )
    after = after._replace(memory=task.remember(model, after, sensed, action, noise.task))
    fresh_obs, fresh_critic_obs = observations(settings, following, fresh_measured, fresh_sensed, noise)
    final_obs, final_critic_obs = observations(settings, model, after, sensed, noise)
    fresh_obs, fresh_seen = show(settings, fresh_obs, None)
    final_obs, seen = show(settings, final_obs, carry.seen)
    goes_on = carry._replace(position=sensed["position"], age=age, episode_length=length, seen=seen)
    goes_on = goes_on._replace(episode_return=episode_return, memory=after.memory)
    next_carry = map_tensors(lambda new, old: torch.where(ended, new, old), fresh._replace(seen=fresh_seen), goes_on)

    final_obs = torch.where(invalid, fresh_obs, final_obs)
    final_critic_obs = torch.where(invalid, fresh_critic_obs, final_critic_obs)
    terms = {name: torch.where(invalid, 0.0, value.to(final_obs.dtype)) for name, value in terms.items()}
    whole = ended & ~invalid & (age == length)  # an episode that began at a random age is older than its length
    of_episodes = torch.ones_like(episode_return), episode_return, length, truncated
    counted = [torch.where(whole, x, 0.0) for x in of_episodes] + [invalid, ~invalid, sum(dropped)]
    counted += [terms[name] for name in task.averaged]
    return next_carry, Transition(
        obs=torch.where(ended, fresh_obs, final_obs),
        final_obs=final_obs,
        critic_obs=torch.where(ended, fresh_critic_obs, final_critic_obs),
        final_critic_obs=final_critic_obs,
        reward=reward,
        terminated=terminated,
        truncated=truncated,
        invalid=invalid,
        terms=terms,
        counted=torch.stack([x.to(final_obs.dtype) for x in counted]),
    )


@torch.no_grad()
def environment_step(
    settings: Settings, model: Model, carry: Carry, action: Tensor, noise: Noise, run: Regions
) -> tuple[Carry, Transition]:
    """One control step: frame_skip physics steps under action (nu, N), reward, auto-reset.

    A delay of d physics steps: physics step j of this control step sees the action given ceil((d - j) / frame_skip)
    control steps ago, or this step's action if d <= j. Before the first action of an episode the robot gets zeros.
    """
    now, following, skip = model, model, settings.task.frame_skip
    if carry.parameters:
        drawn = {name: noise.parameters[name] for name in carry.parameters}
        values = carry.parameters, drawn
        now, following = (dataclasses.replace(model, **run.randomized_fields(model, x)) for x in values)
    carry, ctrl = run.begin_step(settings, now, carry, action, noise)
    state, dropped = State(carry.qpos, carry.qvel, carry.warmstart), []
    for j in range(skip):
        steps_ago = max(0, math.ceil((settings.delay - j) / skip))
        state, dynamics = step(now, state, ctrl[steps_ago], settings.integrator, settings.iterations, run)
        dropped.append(dynamics.smooth.constraints.dropped)
    carry = carry._replace(qpos=state.qpos, qvel=state.qvel, warmstart=state.warmstart)
    return run.end_step(settings, now, following, carry, dynamics, dropped, action, noise)


PHYSICS = begin_dynamics, newton_iteration, advance, stage, combine_stages
COMPILED = *PHYSICS, randomized_fields, begin_step, end_step
vars(EAGER).update((function.__name__, function) for function in COMPILED)


def on_gpu(device: torch.device) -> bool:
    """Whether code is compiled for a GPU and captured in CUDA graphs. Tests emulate one."""
    return device.type == "cuda"


def compile_regions(base: Model) -> Regions:
    """The functions of a step, compiled for one model. Each is compiled when it is called first."""
    run = Regions(**{function.__name__: CompiledFunction(function, base) for function in COMPILED})
    found: dict[str, list] = {}

    def known(model: Changed, count: int) -> list:
        """What is known of the arguments: a model, `count` tensors of which nothing is known, and the dynamics."""
        key = signature(model)
        if key not in found:
            found[key] = known_values(base, model)
        return [None] * (len(named_tensors(model, "")) + count) + found[key]

    run.newton_iteration.known = lambda args: known(args[0], 0)
    run.advance.known = lambda args: known(args[0], 3)  # no row of the `State` is a constant
    return run


# ----------------------------------------------------------------------------------------------------------------------
# Compiler: a function of a step becomes C++ that computes one robot with scalars
#
# A step has no branches, and its tables are the same for all robots. So a function is called once with one robot, and
# every operation on tensors is recorded as operations on their elements. An element is a constant or a `Value`.
# Constants fold, products with zero vanish, and equal operations are one. What is left becomes C++, with a variable for
# each value. On a CPU a variable holds as many robots as a vector register: a block. One loop over the blocks makes all
# calls of a control step, so a block stays in the processor's cache. On a GPU a thread has one robot. As a thread has
# at most 255 registers, a function is cut into kernels there.
# ----------------------------------------------------------------------------------------------------------------------


class Value(int):
    """The place of an operation in `Program.operations`. Constants are a float, an int or a bool."""


FOLD = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "neg": operator.neg, "abs": abs,
    "div": lambda a, b: a / b if b else math.copysign(math.inf, b) * a,
    "sqrt": lambda a: math.sqrt(a) if a >= 0 else math.nan,
    "max": lambda a, b: b if a < b or b != b else a, "min": lambda a, b: b if b < a or b != b else a,
    "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge, "eq": operator.eq, "ne": operator.ne,
    "and": operator.and_, "or": operator.or_, "xor": operator.xor, "not": lambda a: not a,
    "where": lambda condition, a, b: a if condition else b, "to_number": float, "to_integer": int,
    "floor_div": lambda a, b: np.floor_divide(a, b).item(), "mod": lambda a, b: np.remainder(a, b).item(),
}  # fmt: skip
TRIGONOMETRIC = "sin cos tan".split()
OF_ONE_NUMBER = "exp exp2 expm1 log log1p log2 log10 tanh sinh cosh asin acos atan erf floor ceil trunc rint".split()
OF_TWO_NUMBERS = "pow hypot atan2 fmod".split()


def fold(name: str, *args: float) -> float:
    """A function of the C library, of constants."""
    return math.erf(*args) if name == "erf" else float(getattr(np, name)(*args))


FOLD |= {name: functools.partial(fold, name) for name in (*TRIGONOMETRIC, *OF_ONE_NUMBER, *OF_TWO_NUMBERS)}
COMPARISONS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
INFIX = COMPARISONS | {"add": "+", "sub": "-", "mul": "*", "div": "/", "and": "&", "or": "|", "xor": "^"}


class Program:
    """Operations on the numbers of one robot, each after those that it needs.

    An operation has a kind (number, integer or truth), a name and arguments. Its name is one of FOLD, or:
    load (tensor, row): an element of an input. table (tensor, Value): an element of a constant tensor.
    pick (Value, *elements): one of several elements.

    exact: whether constants divide as PyTorch's do, and what is not finite times zero is NaN, as a task may expect. The
    physics is faster otherwise: products with zero vanish, and to divide by a constant is to multiply.
    """

    def __init__(self, dtype: torch.dtype = torch.float64, exact: bool = False):
        self.dtype, self.exact = dtype, exact  # dtype: that of numbers. Integers have as many bits
        self.operations: list[tuple[str, str, tuple]] = []
        self.values: dict[tuple, Value] = {}
        self.tables: dict[tuple, str] = {}  # elements of constant tensors, and the tensors' names

    def append(self, kind: str, name: str, *args: Any) -> Value:
        key = name, *((type(x), repr(x)) for x in args)  # 0.0 and -0.0 are equal
        if key not in self.values:
            self.values[key] = Value(len(self.operations))
            self.operations.append((kind, name, args))
        return self.values[key]

    def kind(self, x: Any) -> str:
        if isinstance(x, Value):
            return self.operations[x][0]
        return {bool: "truth", int: "integer", float: "number"}[type(x)]

    def convert(self, kind: str, x: Any) -> Any:
        mine = self.kind(x)
        if mine == kind:
            return x
        if kind == "truth":
            return self.apply("ne", x, 0)
        if mine == "truth" and isinstance(x, Value):
            return self.apply("where", x, *((1.0, 0.0) if kind == "number" else (1, 0)))
        return self.apply("to_number" if kind == "number" else "to_integer", x)

    def apply(self, name: str, *args: Any) -> Any:
        """The value of an operation: a constant where it can be, an older value where it is equal."""
        operands = args[1:] if name == "where" else args
        kinds = [self.kind(x) for x in operands]
        of_numbers = name in ("div", "sqrt", *TRIGONOMETRIC, *OF_ONE_NUMBER, *OF_TWO_NUMBERS)
        kind = "number" if "number" in kinds or of_numbers else "integer" if "integer" in kinds else "truth"
        if kind == "truth":
            name = {"add": "or", "max": "or", "mul": "and", "min": "and"}.get(name, name)
            kind = "integer" if name in COMPARISONS else kind  # in C++ a truth is 0 or -1
        if kind != "truth" and name == "not":
            raise NotImplementedError("the compiler inverts truths only")
        if name == "to_number" or name == "to_integer":
            kind = name.removeprefix("to_")
        else:
            args = args[: -len(operands)] + tuple(self.convert(kind, x) for x in operands)
        if not any(isinstance(x, Value) for x in args):
            return FOLD[name](*args)
        simpler = self.simplify(name, args)
        if simpler is not None:
            return simpler
        if name in ("add", "mul"):
            args = tuple(sorted(args, key=lambda x: (not isinstance(x, Value), x)))
        return self.append("truth" if name in COMPARISONS else kind, name, *args)

    def simplify(self, name: str, args: tuple) -> Any:
        """What needs no new operation of this name, or None."""
        first, last = args[0], args[-1]
        is_constant = lambda x, value: not isinstance(x, Value) and x == value
        if name in ("add", "mul", "and", "or") and not isinstance(first, Value):
            first, last = last, first
        if name in ("add", "sub") and is_constant(last, 0):
            return first
        if name == "sub" and is_constant(first, 0):
            return self.apply("neg", last)
        if name == "mul":
            if is_constant(last, 0) and not self.exact:
                return last
            if is_constant(last, 1) or is_constant(last, -1):
                return first if last == 1 else self.apply("neg", first)
        if name == "div" and is_constant(first, 0) and not self.exact:
            return first
        if name == "div" and not isinstance(last, Value) and last:
            is_power_of_two = math.frexp(last)[0] in (-0.5, 0.5)
            return self.apply("mul", first, 1 / last) if is_power_of_two or not self.exact else None
        if name == "neg":
            _, inner_name, inner_args = self.operations[first]
            if inner_name == "neg":
                return inner_args[0]
            if inner_name == "sub":
                return self.apply("sub", *reversed(inner_args))
        if is_constant(last, -math.inf if name == "max" else math.inf) and name in ("max", "min"):
            return first
        if name in ("and", "or") and isinstance(last, bool):
            return first if last == (name == "and") else last
        if name == "where":
            condition, yes, no = args
            if not isinstance(condition, Value):
                return yes if condition else no
            if type(yes) is type(no) and yes == no:
                return yes
        return None

    def pick(self, indices: Sequence[Any], elements: tuple) -> list[Any]:
        """elements[index] for each of the indices. Negative ones count from the end; one too large means the last."""
        kinds, count = {self.kind(x) for x in elements}, len(elements)
        if len(kinds) == 1 and len(set(elements)) == 1:
            return [elements[0]] * len(indices)
        kind = "number" if "number" in kinds else "integer"  # truths are stored as integers
        stored = tuple(self.convert(kind, x) for x in elements)
        if any(isinstance(x, Value) for x in stored):
            new = lambda index: self.append(kind, "pick", index, *stored)
        else:
            table = self.tables.setdefault((kind, stored), f"{TABLES[kind]}{len(self.tables)}")
            new = lambda index: self.append(kind, "table", table, index)

        def element(index: Any) -> Any:
            if not isinstance(index, Value):
                return elements[index]
            index = self.apply("where", self.apply("lt", index, 0), self.apply("add", index, count), index)
            found = new(self.apply("min", self.apply("max", index, 0), count - 1))
            return self.convert("truth", found) if kinds == {"truth"} else found

        return [element(index) for index in indices]

    def needed(self, roots: Iterable[Any]) -> list[Value]:
        """The operations that `roots` need, depth first, and of several arguments the newest: values are used soon."""
        order: dict[Value, None] = {}
        waiting = [root for root in reversed([*roots]) if isinstance(root, Value)]
        while waiting:
            arguments = (x for x in self.operations[waiting[-1]][2] if isinstance(x, Value))
            missing = sorted(x for x in arguments if x not in order)
            if missing:
                waiting += missing
            else:
                order[waiting.pop()] = None
        return [*order]


class Recorder(TorchDispatchMode):
    """Records PyTorch's operators in a `Program`. A tensor with the numbers of one robot is an array of their values.

    The operators also run. So shapes are PyTorch's, and what does not depend on an input is a constant."""

    def __init__(self, program: Program):
        super().__init__()
        self.program = program
        self.arrays: dict[int, tuple[Tensor, np.ndarray]] = {}  # by id; the tensor keeps its id alive
        self.constants: dict[int, tuple[Tensor, np.ndarray]] = {}  # the same, of tensors that do not depend on an input
        self.inputs: set[int] = set()  # ids of the inputs, which no method may change

    def array(self, x: Tensor) -> np.ndarray:
        if id(x) in self.arrays:
            return self.arrays[id(x)][1]
        if id(x) not in self.constants:
            self.constants[id(x)] = x, as_objects(x.flatten().tolist(), x.shape)  # host sync
        return self.constants[id(x)][1]

    def keep(self, x: Tensor, array: np.ndarray) -> None:
        assert x.shape == array.shape, f"{x.shape} is not {array.shape}"
        self.arrays[id(x)] = x, array

    def input(self, number: int, x: Tensor, known: np.ndarray | None) -> Tensor:
        """Make x (..., N) an input, and return it for one robot. known: its values elsewhere; constants stay."""
        kind, one = kind_of(x), of_one_robot(x)
        values = list(known.flat) if known is not None else [Value()] * one.numel()
        for row, value in enumerate(values):
            if isinstance(value, Value):
                values[row] = self.program.append(kind, "load", number, row)
        self.keep(one, as_objects(values, one.shape))
        self.inputs.add(id(one))
        return one

    def elementwise(self, name: str, *args: Any) -> np.ndarray:
        function = np.frompyfunc(functools.partial(self.program.apply, name), len(args), 1)
        with np.errstate(all="ignore"):
            return np.asarray(function(*args), dtype=object)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.overloadpacket.__name__
        if torch.Tag.nondeterministic_seeded in function.tags:
            raise NotImplementedError("random numbers would be drawn once for all steps: use the task's random_rows")
        is_known = any(id(x) in self.arrays for x in tree_leaves((args, kwargs)))
        if name == "copy_" and id(args[0]) in self.inputs:  # torch.func.functionalize writes back what changed
            raise NotImplementedError("a task changed an argument of its method in place: clone it before")
        if is_known and (name not in RULES or kwargs.keys() - OF_MEMORY):
            simpler = SIMPLER[name] if name in SIMPLER else decomposition_table.get(function, function.decompose)
            with self:
                result = simpler(*args, **kwargs)
            if result is NotImplemented:
                raise NotImplementedError(f"the compiler has no rule for {function}; see RULES in vecsim_torch.py")
            return result
        result = function(*args, **kwargs)
        if is_known:
            rule, arrays = RULES[name], tree_map_only(Tensor, self.array, args)
            if rule is move:
                found = move(function, arrays)
            elif isinstance(rule, str):
                found = self.elementwise(rule, *arrays)
            else:
                found = rule(self, result, *arrays)
            for x, array in zip(tree_leaves(result), tree_leaves(found), strict=True):
                self.keep(x, convert(self, x, np.asarray(array, dtype=object)))
        return result


def as_objects(values: Iterable[Any], shape: Sequence[int]) -> np.ndarray:
    """An array of Python objects. np.array would convert them to numbers of numpy."""
    flat = list(values)
    array = np.empty(len(flat), dtype=object)
    array[:] = flat
    return array.reshape(shape)


def move(function: Callable, arrays: Sequence[Any]) -> Any:
    """What an operator returns that only moves elements: PyTorch moves their numbers instead."""
    elements: list[Any] = []

    def numbered(array: np.ndarray) -> Tensor:
        elements.extend(array.flat)
        return torch.arange(len(elements) - array.size, len(elements)).view(array.shape)

    moved = function(*tree_map_only(np.ndarray, numbered, arrays))
    return tree_map_only(Tensor, lambda x: as_objects([elements[k] for k in x.flatten().tolist()], x.shape), moved)


def fixed(index: np.ndarray) -> np.ndarray:
    """An index or a mask that is the same for all robots."""
    if any(isinstance(x, Value) for x in index.flat):
        raise NotImplementedError("what differs between robots can only index the first axis, or use torch.gather")
    return index.astype(bool if any(isinstance(x, bool) for x in index.flat) else int)


def take(r: Recorder, result: Tensor, x: np.ndarray, index: Sequence[Any]) -> np.ndarray:
    """x[index] of tensors. What differs between robots indexes the first axis."""
    rows, *others = index
    if any(i is not None for i in others) or not any(isinstance(i, Value) for i in rows.flat):
        return x[tuple(slice(None) if i is None else fixed(i) for i in index)]
    if r.program.kind(rows.flat[0]) == "truth":
        raise NotImplementedError("how many elements a mask chooses would differ between robots: use torch.where")
    columns = [r.program.pick(list(rows.flat), tuple(column)) for column in x.reshape(len(x), -1).T]
    return as_objects(itertools.chain(*zip(*columns, strict=True)), result.shape)


def gather(r: Recorder, result: Tensor, x: np.ndarray, axis: int, index: np.ndarray) -> np.ndarray:
    """torch.gather."""
    x, index = np.moveaxis(x, axis, 0), np.moveaxis(index, axis, 0)
    found = np.empty(index.shape, dtype=object)
    for place in np.ndindex(index.shape[1:]):
        found[:, *place] = r.program.pick(list(index[:, *place]), tuple(x[:, *place]))
    return np.moveaxis(found, 0, axis)


def add_rows(
    r: Recorder, result: Tensor, x: np.ndarray, axis: int, index: np.ndarray, source: np.ndarray
) -> np.ndarray:
    """torch.index_add. A row may occur several times in the index."""
    copy = x.copy()
    rows = np.moveaxis(copy, axis, 0)
    for row, added in zip(fixed(index), np.moveaxis(source, axis, 0), strict=True):
        rows[row] = r.elementwise("add", rows[row], added)
    return copy


def reduce(name: str, r: Recorder, result: Tensor, x: np.ndarray, axes: Sequence[int] = (), *_) -> np.ndarray:
    """An operation of all elements along these axes; none means all. What has no elements is a constant."""
    if not x.size:
        return r.array(result)
    x = convert(r, result, x)
    for axis in [axes] if isinstance(axes, int) else axes or range(x.ndim):
        x = functools.reduce(functools.partial(r.elementwise, name), np.split(x, x.shape[axis], axis))
    return x.reshape(result.shape)


def clamp(r: Recorder, result: Tensor, x: np.ndarray, low: Any = None, high: Any = None) -> np.ndarray:
    if low is not None:
        x = r.elementwise("max", x, low)
    return x if high is None else r.elementwise("min", x, high)


def power(r: Recorder, result: Tensor, x: np.ndarray, exponent: Any) -> np.ndarray:
    known = exponent if isinstance(exponent, (int, float)) else None
    if known == 0.5:
        return r.elementwise("sqrt", x)
    return r.elementwise("mul", x, x) if known == 2 else r.elementwise("pow", x, exponent)


def variance(x: Tensor, axes: Sequence[int] | None = None, correction: float = 1, keepdim: bool = False) -> Tensor:
    """The sum of squares about the mean, divided by the count without `correction`."""
    axes = axes or tuple(range(x.dim()))
    count = math.prod(x.shape[axis] for axis in axes)
    off = x - x.sum(axes, keepdim=True) / count
    return (off * off).sum(axes, keepdim) / (count - correction)


def put(r: Recorder, result: Tensor, x: np.ndarray, index: Sequence[Any], value: np.ndarray, add: bool = False) -> Any:
    """x after x[index] = value. A mask may differ between robots if `value` is one number."""
    if add:
        raise NotImplementedError("the compiler cannot add to what an index names: use torch.index_add")
    mask = index[0]
    is_mask = mask is not None and {r.program.kind(i) for i in mask.flat} == {"truth"}
    if is_mask and len(index) == 1 and value.size == 1 and any(isinstance(i, Value) for i in mask.flat):
        mask = mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
        return r.elementwise("where", mask, value.reshape(()), x)
    copy = x.copy()
    copy[tuple(slice(None) if i is None else fixed(i) for i in index)] = value
    return copy


def extreme(is_better: Callable, x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """The first of the largest or smallest rows, and its index. `is_better` compares a later row with it."""
    best, *others = x.unbind(dim)
    index = torch.zeros_like(best, dtype=torch.long)
    for k, row in enumerate(others, 1):
        is_first_nan = (row != row) & (best == best)
        better = is_better(row, best) | is_first_nan
        best, index = torch.where(better, row, best), torch.where(better, k, index)
    return (best.unsqueeze(dim), index.unsqueeze(dim)) if keepdim else (best, index)


def sort(
    x: Tensor, dim: int = -1, descending: bool = False, stable: bool = True, count: float = math.inf
) -> tuple[Tensor, Tensor]:
    """The rows, of which the first `count` are in order, NaN above all numbers; and their indices.

    Each pass goes from the last row to the first, and neighbours in the wrong order change places. Equal rows keep
    their order."""
    rows = [(row, torch.full_like(row, k, dtype=torch.long)) for k, row in enumerate(x.unbind(dim))]
    for first in range(min(count, len(rows) - 1)):
        for k in range(len(rows) - 2, first - 1, -1):
            pair = rows[k : k + 2]
            (low, _), (high, _) = reversed(pair) if descending else pair
            swap = (high < low) | (low != low) & (high == high)
            for place, (yes, no) in ((k, pair[::-1]), (k + 1, pair)):
                rows[place] = tuple(torch.where(swap, a, b) for a, b in zip(yes, no, strict=True))
    if not rows:
        return x.clone(), torch.zeros_like(x, dtype=torch.long)
    return tuple(torch.stack(column, dim) for column in zip(*rows, strict=True))


def top(x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Tensor, Tensor]:
    """torch.topk, with NaN above all numbers. Of equal rows it takes the first, PyTorch any."""
    return tuple(y.narrow(dim, 0, k) for y in sort(x, dim, largest, count=k))


def convert(r: Recorder, result: Tensor, x: np.ndarray, *_) -> np.ndarray:
    """x as the kind of numbers that the result has."""
    return as_objects((r.program.convert(kind_of(result), value) for value in x.flat), x.shape)


def cast(r: Recorder, result: Tensor, x: np.ndarray, *_) -> np.ndarray:
    """Tensor.to. A program has one precision, and integers of one size. NotImplementedError for a smaller one."""
    kinds = {r.program.kind(value) for value in x.flat} - {"truth"}
    if kinds and result.dtype not in (torch.float32, torch.float64, torch.int32, torch.int64, torch.bool):
        raise NotImplementedError(f"compiled code computes in {r.program.dtype}, not in {result.dtype}")
    return convert(r, result, x)


def view(r: Recorder, result: Tensor, x: np.ndarray, shape: Any) -> np.ndarray:
    if isinstance(shape, torch.dtype):  # the bits of numbers
        if not all(isinstance(value, Value) and r.program.kind(value) == "number" for value in x.flat):
            raise NotImplementedError("the compiler knows the bits of numbers only, which are no constants")
        return as_objects((r.program.append("integer", "bits", value) for value in x.flat), x.shape)
    return x.reshape(result.shape)


SAME_NAME = "add sub mul div neg abs sqrt sin cos tan hypot atan2 fmod lt le gt ge eq ne where".split()
SAME_NAME += [name for name in OF_ONE_NUMBER if name != "rint"]
MOVES = "_unsafe_view broadcast_in_dim cat clone copy detach expand flip permute repeat select select_scatter".split()
MOVES += "slice slice_scatter split_with_sizes squeeze stack transpose unbind unsqueeze view_of".split()
NEW = "zeros_like ones_like full_like new_zeros new_ones new_full".split()  # they do not depend on an input
REDUCTIONS = dict(sum="add", prod="mul", amin="min", amax="max", any="or", all="and")
OF_MEMORY = {"dtype", "layout", "device", "pin_memory", "non_blocking", "memory_format"}  # known from the result
RULES: dict[str, Any] = {  # the name of an operation on elements, `move`, or a function of recorder, result, arguments
    **{name: name for name in SAME_NAME},
    **{f"bitwise_{name}": name for name in ("and", "or", "xor", "not")},
    **{"maximum": "max", "minimum": "min", "round": "rint", "remainder": "mod", "floor_divide": "floor_div"},
    **dict.fromkeys(MOVES, move),
    **dict.fromkeys(NEW, lambda r, result, *_: r.array(result)),
    "reciprocal": lambda r, _, x: r.elementwise("div", 1.0, x),
    "rsqrt": lambda r, _, x: r.elementwise("div", 1.0, r.elementwise("sqrt", x)),
    "pow": power,
    "clamp": clamp,
    **{name: functools.partial(reduce, operation) for name, operation in REDUCTIONS.items()},
    "_to_copy": cast,
    "view": view,
    "index": take,
    "index_put": put,
    "index_add": add_rows,
    "gather": gather,
}
SIMPLER: dict[str, Callable] = {  # operators in terms of simpler ones; PyTorch has such forms of many others
    **dict.fromkeys(("mm", "bmm"), lambda a, b: (a[..., None] * b[..., None, :, :]).sum(-2)),
    "signbit": lambda x: torch.where(x == 0, 1 / x, x) < 0,
    "sign": lambda x: torch.where(x > 0, 1, torch.where(x < 0, -1, 0)).to(x.dtype),
    "var": variance,
    "max": lambda x, *how: extreme(torch.gt, x, *how) if how else x.amax(),
    "min": lambda x, *how: extreme(torch.lt, x, *how) if how else x.amin(),
    "argmax": lambda x, *how: extreme(torch.gt, x, *how)[1],
    "argmin": lambda x, *how: extreme(torch.lt, x, *how)[1],
    "sort": sort,
    "topk": top,
}


# Both preludes define a number F and an integer I of the robots of a variable, and the functions of the operations. A
# truth is an I.
CPU_PRELUDE = """
#include <math.h>
#define FUNCTION static inline __attribute__((always_inline))
enum {{ ROBOTS = {robots} }};
typedef {real} real;
typedef {integer} integer;
typedef real F __attribute__((vector_size(ROBOTS * sizeof(real))));
typedef integer I __attribute__((vector_size(ROBOTS * sizeof(real))));
FUNCTION F number(real x) {{ return x - F{{}}; }}
FUNCTION I whole(integer x) {{ return x - I{{}}; }}
FUNCTION F load(const real* p) {{ F x; __builtin_memcpy(&x, p, sizeof x); return x; }}
FUNCTION void store(real* p, F x) {{ __builtin_memcpy(p, &x, sizeof x); }}
#define EACH(R, expression) {{ R y; for (int l = 0; l < ROBOTS; l++) y[l] = expression; return y; }}
FUNCTION I load(const long long* p) EACH(I, p[l])
FUNCTION void store(long long* p, I x) {{ for (int l = 0; l < ROBOTS; l++) p[l] = x[l]; }}
FUNCTION I load(const bool* p) EACH(I, -p[l])
FUNCTION void store(bool* p, I x) {{ for (int l = 0; l < ROBOTS; l++) p[l] = x[l] != 0; }}
FUNCTION F table(const real* p, I i) EACH(F, p[i[l]])
FUNCTION I table(const long long* p, I i) EACH(I, p[i[l]])
FUNCTION F pick(const F* p, I i) EACH(F, p[i[l]][l])
FUNCTION I pick(const I* p, I i) EACH(I, p[i[l]][l])
#define OF_ONE(f) FUNCTION F f_##f(F x) EACH(F, f(x[l]))
#define OF_TWO(f) FUNCTION F f_##f(F a, F b) EACH(F, f(a[l], b[l]))
FUNCTION F f_to_number(I x) {{ return __builtin_convertvector(x, F); }}
FUNCTION I f_to_integer(F x) {{ return __builtin_convertvector(x, I); }}
FUNCTION I f_bits(F x) {{ return (I)x; }}
// x = k pi/2 + r with |r| <= pi/4, in three parts of pi/2 (Cody and Waite), then the Taylor series of sine and cosine
FUNCTION F sine(F x, integer quarters) {{
    F k = x * (real)0.636619772367581343 + (real){big} - (real){big};
    F r = x - k * (real){half_pi[0]} - k * (real){half_pi[1]} - k * (real){half_pi[2]};
    F z = r * r, s = number(1), c = number(1);
#pragma GCC unroll 8
    for (int n = 16; n > 0; n -= 2) {{
        s = 1 - z * s * (real)(1. / (n * (n + 1)));
        c = 1 - z * c * (real)(1. / (n * (n - 1)));
    }}
    I quadrant = f_to_integer(k) + quarters;
    F y = (quadrant & 1) != 0 ? c : r * s;
    y = (quadrant & 2) != 0 ? -y : y;
    I large = x * x > (real)1e10;  // beyond, k has too many digits
    integer any = 0;
    for (int l = 0; l < ROBOTS; l++) any |= large[l];
    if (any) for (int l = 0; l < ROBOTS; l++) if (large[l]) y[l] = quarters ? cos(x[l]) : sin(x[l]);
    return y;
}}
FUNCTION F f_sin(F x) {{ return sine(x, 0); }}
FUNCTION F f_cos(F x) {{ return sine(x, 1); }}
FUNCTION F f_tan(F x) {{ return sine(x, 0) / sine(x, 1); }}
"""
CUDA_PRELUDE = """
#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fffffff)
#define FUNCTION static __device__ inline
typedef {real} real;
typedef real F;
typedef {integer} I;
FUNCTION F number(real x) {{ return x; }}
FUNCTION I whole(I x) {{ return x; }}
FUNCTION F load(const real* p) {{ return *p; }}
FUNCTION I load(const long long* p) {{ return *p; }}
FUNCTION void store(real* p, F x) {{ *p = x; }}
FUNCTION void store(long long* p, I x) {{ *p = x; }}
FUNCTION I load(const bool* p) {{ return *p; }}
FUNCTION void store(bool* p, I x) {{ *p = x != 0; }}
FUNCTION F table(const real* p, I i) {{ return p[i]; }}
FUNCTION I table(const long long* p, I i) {{ return p[i]; }}
FUNCTION F pick(const F* p, I i) {{ return p[i]; }}
FUNCTION I pick(const I* p, I i) {{ return p[i]; }}
#define OF_ONE(f) FUNCTION F f_##f(F x) {{ return f(x); }}
#define OF_TWO(f) FUNCTION F f_##f(F a, F b) {{ return f(a, b); }}
FUNCTION F f_to_number(I x) {{ return x; }}
FUNCTION I f_to_integer(F x) {{ return x; }}
FUNCTION I f_bits(F x) {{ union {{ F number; I bits; }} u = {{x}}; return u.bits; }}
FUNCTION F f_sin(F x) {{ return sin(x); }}
FUNCTION F f_cos(F x) {{ return cos(x); }}
FUNCTION F f_tan(F x) {{ return tan(x); }}
"""
SHARED_PRELUDE = "\n".join(f"OF_ONE({name})" for name in ("sqrt", *OF_ONE_NUMBER))
SHARED_PRELUDE += "\n" + "\n".join(f"OF_TWO({name})" for name in OF_TWO_NUMBERS)
SHARED_PRELUDE += """
FUNCTION F f_neg(F x) { return -x; }
FUNCTION I f_neg(I x) { return -x; }
FUNCTION F f_abs(F x) { return x > 0 ? x : 0 - x; }  // so that it is 0 of -0
FUNCTION I f_abs(I x) { return x < 0 ? -x : x; }
FUNCTION I f_not(I x) { return x == 0; }
FUNCTION F f_where(I condition, F a, F b) { return condition ? a : b; }
FUNCTION I f_where(I condition, I a, I b) { return condition ? a : b; }
FUNCTION I f_floor_div(I a, I b) {
    I q = a / f_where(b == 0, whole(1), b), r = a - q * b;
    return q - f_where((r != 0) & ((r < 0) ^ (b < 0)), whole(1), whole(0));
}
FUNCTION I f_mod(I a, I b) { return a - f_floor_div(a, b) * b; }
FUNCTION F f_mod(F a, F b) {
    F r = f_fmod(a, b);
    return f_where((r != 0) & ((r < 0) ^ (b < 0)), r + b, r);
}
FUNCTION F f_floor_div(F a, F b) {
    F r = f_fmod(a, b), q = (a - r) / b - f_where((r != 0) & ((r < 0) ^ (b < 0)), number(1), number(0));
    return f_where(b == 0, a / b, f_rint(q));
}
FUNCTION F f_max(F a, F b) { return (a < b) | (b != b) ? b : a; }
FUNCTION I f_max(I a, I b) { return a < b ? b : a; }
FUNCTION F f_min(F a, F b) { return (b < a) | (b != b) ? b : a; }
FUNCTION I f_min(I a, I b) { return b < a ? b : a; }
"""
C_KINDS = {"number": "F", "integer": "I", "truth": "I"}
C_TYPES = {torch.float32: ("float", "int"), torch.float64: ("double", "long long")}
BIG = {torch.float32: 1.5 * 2**23, torch.float64: 1.5 * 2**52}  # adding it rounds to an integer
HALF_PI = {  # as a sum whose first two parts have so few bits that their products with k are exact
    torch.float32: (1.5703125, 4.837512969970703e-4, 7.549789948768648e-8),
    torch.float64: (1.5707963267341256, 6.077100506303966e-11, 2.0222662487959506e-21),
}


TABLES = {"number": "t", "integer": "u"}
INPUTS = {"number": "x", "integer": "k", "truth": "q"}
OUTPUTS = {"number": "y", "integer": "z", "truth": "w"}
POINTERS = {  # C types, by the first letter of a tensor's name
    "x": "const real*", "k": "const long long*", "q": "const bool*", "t": "const real*", "u": "const long long*",
    "y": "real*", "z": "long long*", "w": "bool*", "s": "real*", "j": "long long*",
}  # fmt: skip


def write_kernels(program: Program, outputs: dict[str, Sequence], size: float) -> tuple[list[Kernel], dict[str, int]]:
    """C++ that stores the values of each of OUTPUTS, in kernels of up to `size` operations, and the rows of s and j."""
    roots = [*itertools.chain(*outputs.values())]
    order = program.needed(roots)
    computed = [v for v in order if program.operations[v][1] != "load"]
    ends = kernel_ends(program, computed, roots, size)
    home = {v: bisect.bisect_right(ends, k) for k, v in enumerate(computed)}  # the kernel that computes a value
    places: dict[Any, list[tuple[str, int]]] = {}  # where a value is stored
    others: list[tuple[str, int, Any]] = []  # stores of constants and of inputs
    for tensor, values in outputs.items():
        for row, x in enumerate(values):
            if x in home and isinstance(x, Value):
                places.setdefault(x, []).append((tensor, row))
            else:
                others.append((tensor, row, x))
    scratch = {"s": 0, "j": 0}
    for v in computed:
        for x in program.operations[v][2]:
            if isinstance(x, Value) and x in home and home[x] != home[v] and x not in places:
                tensor = "s" if program.kind(x) == "number" else "j"
                places[x] = [(tensor, scratch[tensor])]
                scratch[tensor] += 1
    kernels = [Kernel(program, places) for _ in ends]
    for v in computed:
        kernels[home[v]].compute(v)
    for tensor, row, x in others:
        kernels[-1].store(tensor, row, x)
    return kernels, scratch


def kernel_ends(program: Program, computed: list[Value], outputs: Sequence, size: float) -> list[int]:
    """Where the kernels end among the operations `computed`, with the fewest rows to load and store, and launches.

    The cost of a kernel depends on its two ends alone. So the best ends up to any place follow from those before it."""
    count = len(computed)
    if count <= size:
        return [count]
    last_use: dict[Value, float] = {}
    for place, v in enumerate(computed):
        last_use |= {x: place for x in program.operations[v][2] if isinstance(x, Value)}
    last_use |= {x: math.inf for x in outputs if isinstance(x, Value)}
    step = max(1, int(size) // 100)  # ends are multiples of it
    best = {0: (0, -1)}  # the least cost of the kernels that end at a place, and where the last of them starts
    for end in (*range(step, count, step), count):
        loaded: set[Value] = set()
        stored, choices = 0, []
        for start in range(end - 1, max(end - int(size), 0) - 1, -1):
            stored += last_use[computed[start]] >= end
            loaded.discard(computed[start])
            loaded.update(x for x in program.operations[computed[start]][2] if isinstance(x, Value))
            if start in best:
                choices.append((best[start][0] + len(loaded) + stored + LAUNCH, start))
        best[end] = min(choices)
    ends = [count]
    while best[ends[0]][1] > 0:
        ends.insert(0, best[ends[0]][1])
    return ends


class Kernel:
    """A piece of a program. Its lines read and write rows of tensors. These are the inputs x0, x1, ... (numbers), k0,
    k1, ... (integers) and q0, q1, ... (truths), constant tables t0, u1, ..., and the outputs y (numbers), z (integers)
    and w (truths). In s (numbers) and j (others), values go from one kernel to another.

    places: the tensors and rows where a value is stored."""

    def __init__(self, program: Program, places: dict[Any, list[tuple[str, int]]]):
        self.program, self.places = program, places
        self.lines: list[str] = []
        self.tensors: dict[str, None] = {}  # by their names, in the order in which the lines use them
        self.known: set[Value] = set()  # values that have a variable
        self.arrays: dict[str, str] = {}  # names of arrays, by their elements

    def row(self, tensor: str, row: int) -> str:
        self.tensors[tensor] = None
        return f"{tensor} + {row} * n + i"

    def store(self, tensor: str, row: int, x: Any) -> None:
        self.lines.append(f"store({self.row(tensor, row)}, {self.operand(x, self.program.kind(x))});")

    def define(self, v: Value, text: str) -> None:
        self.known.add(v)
        self.lines.append(f"const {C_KINDS[self.program.kind(v)]} v{v:d} = {text};")

    def operand(self, x: Any, kind: str) -> str:
        """The name of a value, which is loaded if it comes from memory; or a constant."""
        if not isinstance(x, Value):
            if kind != "number":
                bits = 8 * self.program.dtype.itemsize
                if not -(1 << bits - 1) <= x < 1 << bits - 1:
                    raise NotImplementedError(f"compiled code has integers of {bits} bits, but a task uses {x:d}")
                return "(whole(0) == 0)" if x is True else f"whole({x:d})"
            text = {math.inf: "INFINITY", -math.inf: "-INFINITY"}.get(x, repr(x))
            return f"number({'NAN' if math.isnan(x) else text})"
        if x not in self.known:
            kind, name, args = self.program.operations[x]
            place = self.places[x][0] if name != "load" else (f"{INPUTS[kind]}{args[0]}", args[1])
            self.define(x, f"load({self.row(*place)})")
        return f"v{x:d}"

    def compute(self, v: Value) -> None:
        kind, name, args = self.program.operations[v]
        if name == "table":
            self.tensors[args[0]] = None
            self.define(v, f"table({args[0]}, {self.operand(args[1], 'integer')})")
        elif name == "pick":
            index, elements = self.operand(args[0], "integer"), ", ".join(self.operand(x, kind) for x in args[1:])
            if elements not in self.arrays:
                self.arrays[elements] = f"a{len(self.arrays)}"
                self.lines.append(f"const {C_KINDS[kind]} {self.arrays[elements]}[] = {{{elements}}};")
            self.define(v, f"pick({self.arrays[elements]}, {index})")
        else:
            if name in COMPARISONS:
                kind = next(self.program.kind(x) for x in args if isinstance(x, Value))
            words = [self.operand(x, kind) for x in args]
            self.define(v, f" {INFIX[name]} ".join(words) if name in INFIX else f"f_{name}({', '.join(words)})")
        for place in self.places.get(v, []):
            self.store(*place, v)


def cpp_source(kernel: Kernel, dtype: torch.dtype, robots: int) -> str:
    """A function of the addresses of the kernel's tensors, which are (rows, robots): a vector for each row."""
    real, integer = C_TYPES[dtype]
    prelude = CPU_PRELUDE.format(real=real, integer=integer, robots=robots, big=BIG[dtype], half_pi=HALF_PI[dtype])
    start = [prelude + SHARED_PRELUDE, 'extern "C" void run(void* const* tensors) {', "enum { n = ROBOTS, i = 0 };"]
    pointers = [f"auto {name} = ({POINTERS[name[0]]})tensors[{k}];" for k, name in enumerate(kernel.tensors)]
    return "\n".join([*start, *pointers, *kernel.lines, "}"])


def cuda_source(kernel: Kernel, dtype: torch.dtype, n: int) -> str:
    """A kernel for n robots with the tensors as arguments. A thread computes one robot.

    As n is a constant, so are the distances between rows. Half of the instructions would compute them otherwise."""
    real, integer = C_TYPES[dtype]
    arguments = ", ".join(f"{POINTERS[name[0]]} __restrict__ {name}" for name in kernel.tensors)
    prelude = CUDA_PRELUDE.format(real=real, integer=integer) + SHARED_PRELUDE
    robot = [f"const long long n = {n};", "const int i = blockIdx.x * blockDim.x + threadIdx.x;", "if (i >= n) return;"]
    return "\n".join([prelude, f'extern "C" __global__ void run({arguments}) {{', *robot, *kernel.lines, "}"])


def instruction_set() -> str:
    """What this CPU can execute, as far as the system tells."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else [platform.processor()]
    flags = [line for line in lines if line.startswith(("flags", "Features"))]
    return f"{torch.backends.cpu.get_cpu_capability()} {platform.machine()} {(flags or lines)[0]}"


DIGEST = hashlib.sha256().digest_size


def from_cache(key: str, suffix: str, build: Callable[[Path], None]) -> Path:
    """The file with the compiled code of `key`, in the folder where PyTorch keeps its own.

    `build` writes the code to the path that it is given. It is called if the file is missing or damaged. The file ends
    with a digest of the code, which the loader of a library ignores."""
    folder = Path(cache_dir()) / "vecsim"
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()}{suffix}"
    data = path.read_bytes() if path.exists() else b""
    if hashlib.sha256(data[:-DIGEST]).digest() != data[-DIGEST:]:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / "code"
            build(built)
            data = built.read_bytes()
            built.write_bytes(data + hashlib.sha256(data).digest())
            built.replace(path)  # whole or not at all: other processes look for it
    return path


def cpp_compiler() -> list[str]:
    """The command of the C++ compiler: $CXX or g++. InputError if it cannot be executed."""
    words = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if shutil.which(words[0]) is None:
        advice = "install it, name a C++ compiler in $CXX, or run many times slower with --no-compile (compile=False)"
        raise InputError(f"{words[0]} cannot be executed; {advice}")
    return words


def build_cpp(source: str) -> Callable[..., None]:
    """Compile with $CXX or g++. Returns the C function `run`. Python's lock is free while it runs.

    InputError if there is no compiler; OSError if it cannot start; RuntimeError if it fails."""
    flags = "-O2 -march=native -fno-math-errno -fno-trapping-math -ffp-contract=fast -fPIC -shared -Wno-psabi".split()
    words = [*cpp_compiler(), *flags]

    def build(path: Path) -> None:
        code = path.with_suffix(".cpp")
        code.write_text(source)
        done = subprocess.run([*words, code, "-o", path], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{words[0]} failed: {done.stderr[-2000:]}")

    key = " ".join((instruction_set(), *platform.libc_ver(), *words, source))
    function = ctypes.CDLL(str(from_cache(key, ".so", build))).run
    function.restype = None
    return function


def nvrtc(source: str, capability: tuple[int, int]) -> bytes:
    """The machine code (cubin) of CUDA C++ for a GPU of this capability. RuntimeError if NVRTC fails."""
    library = torch.cuda._utils._get_nvrtc_library()
    version, update = ctypes.c_int(), ctypes.c_int()
    library.nvrtcVersion(ctypes.byref(version), ctypes.byref(update))
    flags = "--gpu-architecture=sm_{}{}".format(*capability), "--prec-div=false", "--prec-sqrt=false", "-w"

    def build(path: Path) -> None:
        program, size = ctypes.c_void_p(), ctypes.c_size_t()
        options = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
        library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"step.cu", 0, None, None)
        failed = library.nvrtcCompileProgram(program, len(flags), options)
        what = "ProgramLog" if failed else "CUBIN"
        getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        answer = ctypes.create_string_buffer(size.value)
        getattr(library, f"nvrtcGet{what}")(program, answer)
        library.nvrtcDestroyProgram(ctypes.byref(program))
        if failed:
            raise RuntimeError(f"NVRTC failed: {answer.value.decode()}")
        path.write_bytes(answer.raw)

    key = " ".join((f"NVRTC {version.value}.{update.value}", *flags, source))
    return from_cache(key, ".cubin", build).read_bytes()[:-DIGEST]


BLOCK = 32  # threads of a block on a GPU: a warp, so that 4,096 robots are on 128 multiprocessors
KERNEL = 2500  # the most operations of a kernel on a GPU: larger ones spill more registers
LAUNCH = 700  # rows of 4,096 robots that a GPU loads in the time of a launch, see benchmarks/gpu_kernels.py


def kind_of(x: Tensor) -> str:
    """The kind of its elements in a `Program`."""
    return "number" if x.dtype.is_floating_point else "truth" if x.dtype == torch.bool else "integer"


def of_one_robot(x: Tensor) -> Tensor:
    """x (..., N) of the first robot, or zeros if there is none."""
    return x[..., :1].clone() if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)


def named_tensors(tree: Any, name: str) -> list[tuple[str, Tensor]]:
    """The tensors of nested tuples, lists and dicts, with the expression that gives each of them from `name`."""
    leaves, _ = tree_flatten_with_path(tree)
    return [(name + keystr(path), x) for path, x in leaves if isinstance(x, Tensor)]


def signature(tree: Any) -> str:
    """What `tree` has besides the numbers in its tensors."""
    return repr(tree_map_only(Tensor, kind_of, tree))


class Changed(NamedTuple):
    """A model, as the fields in which it differs from the one that code is compiled for."""

    fields: dict[str, Any]


class Recording:
    """What `function` of `args` does, in plain PyTorch, recorded as a `Program`.

    args: trees of tensors, which are inputs. All else is constant. A `Changed` stands for the model `base` with other
    fields. known: arrays of values of the tensors, see `Recorder.input`."""

    def __init__(self, function: Callable, base: Model, args: tuple, known: Iterable = (), exact: bool = False):
        self.program, self.inputs = Program(base.gravity.dtype, exact), named_tensors(args, "args")
        recorder, numbers, known = Recorder(self.program), itertools.count(), iter(known)
        args = tree_map_only(Tensor, lambda x: recorder.input(next(numbers), x, next(known, None)), args)
        model = lambda changed: dataclasses.replace(base, **changed.fields)
        args = tree_map_only(Changed, model, args, is_leaf=lambda x: isinstance(x, Changed))
        try:
            with torch.no_grad(), recorder, HostReads():
                self.result = torch.func.functionalize(function)(*args)
        except NotImplementedError as error:
            not_a_task = __file__, str(Path(torch.__file__).parent)
            lines = [x for x in traceback.extract_tb(error.__traceback__) if not x.filename.startswith(not_a_task)]
            where = f"{lines[-1].filename}:{lines[-1].lineno}, {lines[-1].line}" if lines else function.__name__
            error.add_note(f"This was compiled: {where}\ncompile=False (--no-compile) accepts all operators.")
            raise
        self.outputs = [x for _, x in named_tensors(self.result, "")]
        self.values = [recorder.array(x) for x in self.outputs]


class HostReads(TorchFunctionMode):
    """Refuses to make numbers of Python from tensors, because they would be those of one robot in one step."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in ("item", "tolist", "numpy", "__array__", "__bool__", "__float__", "__int__", "__index__"):
            raise NotImplementedError(f"{name}: compiled code has no numbers of Python; use tensors, and torch.where")
        if name in ("__ior__", "__iand__", "__ixor__"):  # functionalize does not know them
            function = getattr(Tensor, f"bitwise_{name[3:-2]}_")
        return function(*args, **(kwargs or {}))


def known_values(base: Model, changed: Changed) -> list[np.ndarray | None]:
    """Values of the tensors of `Dynamics`, before and after Newton iterations: which of their rows are constants.

    A robot in a plane has many of them. A solution has those that an iteration keeps, or none."""
    zeros = [base.qpos0.new_zeros(rows, 1) for rows in (base.nq, base.nv, base.nv, base.nu)]
    begun = Recording(begin_dynamics, base, (changed, State(*zeros[:3]), zeros[3]))
    given = [None] * len(named_tensors(changed, "")) + begun.values
    iterated = Recording(newton_iteration, base, (changed, *begun.result), given)
    count = len(iterated.values)
    pairs = zip(*(itertools.chain(*(x.flat for x in values)) for values in (begun.values[-count:], iterated.values)))
    kept = all(isinstance(old, Value) or (not isinstance(new, Value) and old == new) for old, new in pairs)
    return begun.values if kept else begun.values[:-count] + [None] * count


class Expression(str):
    """Python. `repr` of a tree of these is Python that makes the tree."""

    __repr__ = str.__str__


class Interface:
    """The inputs and the result of compiled code, as tensors (..., N).

    given: the inputs, and the expressions that find them in `args`. result: a tree of tensors, whose NamedTuples are of
    this file. Both are as for one robot. TypeError if a result has a dtype that compiled code lacks."""

    def __init__(self, given: Sequence[tuple[str, Tensor]], result: Any, dtype: torch.dtype, device: torch.device):
        self.device = device
        self.dtypes = {"number": dtype, "integer": torch.int64, "truth": torch.bool}
        for where, x in named_tensors(result, "result"):
            if x.dtype != self.dtypes[kind_of(x)]:
                types = ", ".join(map(str, self.dtypes.values()))
                raise TypeError(f"compiled code returns {types}, but {where} is {x.dtype}")
        self.inputs = eval(f"lambda args: ({''.join(f'{where}, ' for where, _ in given)})")
        self.wanted = [(x.shape[:-1], self.dtypes[kind_of(x)]) for _, x in given]
        self.sizes: dict[str, list[int]] = {kind: [] for kind in OUTPUTS}

        def piece(x: Tensor) -> Expression:
            """What makes the result x from lists y, z and w of (rows, n). `sizes` gets its rows."""
            rows, tensor = self.sizes[kind_of(x)], OUTPUTS[kind_of(x)]
            rows.append(x.numel())
            text = f"{tensor}[{len(rows) - 1}]"
            shape = ", ".join([*map(str, x.shape[:-1]), "n"])
            return Expression(text if x.dim() == 2 else f"{text}.view({shape})")

        self.result = eval(f"lambda {', '.join(OUTPUTS.values())}, n: {tree_map_only(Tensor, piece, result)!r}")
        self.rows = [sum(rows) for rows in self.sizes.values()]

    def read(self, args: tuple, n: int) -> list[Tensor]:
        """The inputs, contiguous. ValueError if they are not what the code was compiled for."""
        tensors = list(self.inputs(args))
        for k, (x, (shape, dtype)) in enumerate(zip(tensors, self.wanted, strict=True)):
            if x.dtype != dtype or x.device != self.device or x.shape[:-1] != shape:
                wanted = f"a tensor {(*shape, n)} of {dtype} on {self.device}"
                raise ValueError(f"compiled for {wanted}, not for {tuple(x.shape)} of {x.dtype} on {x.device}")
            if x.requires_grad and torch.is_grad_enabled():
                raise ValueError("compiled code has no gradients; use torch.no_grad() or eager functions")
            if x.shape[-1] != n or not x.is_contiguous():
                tensors[k] = x.expand(*shape, n).contiguous()
        return tensors

    def new(self, rows: Iterable[int], n: int) -> list[Tensor]:
        """Empty tensors, one of each kind."""
        dtypes = self.dtypes.values()
        return [torch.empty(count, n, dtype=dtype, device=self.device) for count, dtype in zip(rows, dtypes)]

    def results(self, outputs: Sequence[Tensor], n: int) -> Any:
        """outputs: of `new` with `rows`."""
        pieces = (x.split(sizes) for x, sizes in zip(outputs, self.sizes.values(), strict=True))
        return self.result(*pieces, n)


class Code:
    """A compiled `Recording`. On a CPU, `function` computes a block of `robots`, see `Loop`; on a GPU, a call launches
    kernels for exactly so many."""

    def __init__(self, recording: Recording, dtype: torch.dtype, device: torch.device, robots: int):
        self.device, program = device, recording.program
        values: dict[str, list] = {tensor: [] for tensor in OUTPUTS.values()}
        for x, array in zip(recording.outputs, recording.values, strict=True):
            kind = kind_of(x)
            values[OUTPUTS[kind]] += [program.convert(kind, value) for value in array.flat]
        on_cpu = not on_gpu(device)
        self.kernels, self.scratch = write_kernels(program, values, math.inf if on_cpu else KERNEL)
        used = sorted({name for kernel in self.kernels for name in kernel.tensors if name[0] in INPUTS.values()})
        given = [(where, of_one_robot(x)) for where, x in (recording.inputs[int(name[1:])] for name in used)]
        self.interface = Interface(given, recording.result, dtype, device)
        dtypes = self.interface.dtypes
        self.tables = [torch.tensor(x, dtype=dtypes[kind], device=device) for kind, x in program.tables]
        place = [*used, *program.tables.values(), *OUTPUTS.values(), *self.scratch]
        self.places = [[place.index(name) for name in kernel.tensors] for kernel in self.kernels]
        if on_cpu:
            [kernel] = self.kernels
            self.function = build_cpp(cpp_source(kernel, dtype, robots))
            call = self, [x for _, x in given], recording.outputs
            self.loop = Loop([call], given, recording.result, dtype, robots)
        else:
            capability = torch.cuda.get_device_capability(device)
            sources = [cuda_source(kernel, dtype, robots) for kernel in self.kernels]
            with ThreadPoolExecutor() as pool:
                codes = list(pool.map(lambda source: nvrtc(source, capability), sources))
            load = torch.cuda._utils._cuda_load_module  # in this thread, which has the device's context
            self.launches = [load(code, ["run"])["run"] for code in codes]

    def __call__(self, args: tuple, n: int) -> Any:
        """The result of the function for n robots."""
        if not on_gpu(self.device):
            return self.loop(args, n)
        inputs, outputs = self.interface.read(args, n), self.interface.new(self.interface.rows, n)
        tensors = [*inputs, *self.tables, *outputs, *self.interface.new(self.scratch.values(), n)]
        grid, block = (math.ceil(n / BLOCK), 1, 1), (BLOCK, 1, 1)
        for launch, places in zip(self.launches, self.places, strict=True):
            launch(grid, block, [tensors[k] for k in places])
        return self.interface.results(outputs, n)


# For each block from first_block on, before `end`: copy rows of tensors (rows, n) into the memory of the block, call
# functions, and copy back.
CPU_LOOP = """
#include <string.h>
enum {{ ROBOTS = {robots} }};
struct Rows {{ char* block; char* tensor; long long rows, bytes; }};  // bytes of a number
template <int BYTES, bool IN> static void copy(const Rows& x, long long n, long long i) {{
    for (long long row = 0; row < x.rows; row++) {{
        char *a = x.block + row * ROBOTS * BYTES, *b = x.tensor + (row * n + i) * BYTES;
        memcpy(IN ? a : b, IN ? b : a, ROBOTS * BYTES);
    }}
}}
template <bool IN> static void copy(const Rows* x, long long count, long long n, long long i) {{
    for (; count; count--, x++) (x->bytes == 1 ? copy<1, IN> : x->bytes == 4 ? copy<4, IN> : copy<8, IN>)(*x, n, i);
}}
extern "C" void run(
    long long n, long long first_block, long long end, long long calls, void (**functions)(void* const*),
    const long long* first, void* const* pointers, long long inputs, const Rows* input, long long outputs,
    const Rows* output
) {{
    for (long long start = first_block * ROBOTS; start < end * ROBOTS; start += ROBOTS) {{
        const long long i = start + ROBOTS <= n ? start : n - ROBOTS;  // the last block may repeat robots
        copy<true>(input, inputs, n, i);
        for (long long k = 0; k < calls; k++) functions[k](pointers + first[k]);
        copy<false>(output, outputs, n, i);
    }}
}}
"""


CACHE_LINE = 64  # bytes
SHARE = 1_000_000  # operations on blocks that are worth a thread: about 0.2 ms


class Loop:
    """C++ for a CPU that makes calls of compiled functions for one block of robots after the other.

    So what a call hands to another stays in the processor's cache. calls: (code, its inputs, its results), as tensors
    of one robot. What a call takes from another is the same object. given, result: see `Interface`."""

    def __init__(self, calls: list[tuple[Code, list, list]], given: list, result: Any, dtype: torch.dtype, robots: int):
        self.codes, self.robots = [code for code, _, _ in calls], robots
        self.operations = sum(len(code.kernels[0].lines) for code in self.codes)
        outputs = [x for _, x in named_tensors(result, "")]
        last = {id(x): k for k, (_, inputs, _) in enumerate(calls) for x in inputs}  # the call that needs a tensor last
        last |= {id(x): len(calls) for x in outputs}
        given = [(where, x) for where, x in given if id(x) in last]
        self.interface = Interface(given, result, dtype, torch.device("cpu"))
        item_bytes = {kind: dtype.itemsize for kind, dtype in self.interface.dtypes.items()}
        self.bytes = 0  # of the memory of a block
        places: dict[int, int] = {}  # where a tensor begins in it
        free: dict[int, list[int]] = {}  # pieces that no later call needs, by their bytes
        ending: dict[int, list[tuple[int, int]]] = {}  # pieces that no call after this one needs

        def place(tensors: Sequence[Tensor], k: int) -> list[int]:
            """Give memory to `tensors` from call k on, a piece for each kind. Returns the starts of the pieces."""
            starts = []
            for kind, size in item_bytes.items():
                mine = [x for x in tensors if kind_of(x) == kind]
                total = robots * size * sum(x.numel() for x in mine)
                total = math.ceil(total / CACHE_LINE) * CACHE_LINE
                if free.get(total):
                    start = free[total].pop()
                else:
                    start, self.bytes = self.bytes, self.bytes + total
                starts.append(start)
                end = max((last.get(id(x), k) for x in mine), default=k)
                ending.setdefault(end, []).append((total, start))
                for x in mine:
                    places[id(x)], start = start, start + robots * size * x.numel()
            return starts

        place([x for _, x in given], 0)
        pointers: list[tuple[int, bool]] = []  # of all calls: addresses, or places in the memory of a block
        firsts: list[int] = []  # the first pointer of each call
        for k, (code, inputs, results) in enumerate(calls):
            tensors = [(places[id(x)], True) for x in inputs] + [(x.data_ptr(), False) for x in code.tables]
            tensors += [(start, True) for start in place(results, k)]
            firsts.append(len(pointers))
            pointers += [tensors[at] for at in code.places[0]]
            for total, start in ending.pop(k, ()):
                free.setdefault(total, []).append(start)

        def copies(tensors: list[Tensor]) -> np.ndarray:
            table = [(places[id(x)], 0, x.numel(), item_bytes[kind_of(x)]) for x in tensors]
            return np.array(table, dtype=np.int64).reshape(-1, 4)  # see `Rows` in CPU_LOOP

        self.pointers, self.is_place = np.array(pointers, dtype=np.int64).reshape(-1, 2).T
        self.firsts = np.array(firsts, dtype=np.int64)
        self.functions = np.array([ctypes.cast(code.function, ctypes.c_void_p).value for code in self.codes])
        self.loads = copies([x for _, x in given])
        self.stores = copies(outputs)
        self.kinds = np.array([[*OUTPUTS].index(kind_of(x)) for x in outputs], dtype=np.int64)
        starts = {kind: itertools.accumulate(rows, initial=0) for kind, rows in self.interface.sizes.items()}
        self.first_rows = np.array([next(starts[kind_of(x)]) for x in outputs], dtype=np.int64)  # among their kind
        self.run = build_cpp(CPU_LOOP.format(robots=robots))
        self.pool = ThreadPoolExecutor(os.cpu_count())  # its threads start when there is work for them

    def __call__(self, args: tuple, n: int, threads: int = 1) -> Any:
        """The results for n robots. So many threads share the blocks if that is worth the time to wake them."""
        inputs, outputs = self.interface.read(args, n), self.interface.new(self.interface.rows, n)
        blocks = math.ceil(n / self.robots)
        shares = max(1, min(threads, self.operations * blocks // SHARE))
        ends = [blocks * k // shares for k in range(shares + 1)]
        memory = torch.empty(shares, self.bytes, dtype=torch.uint8)
        loads, stores = self.loads.copy(), self.stores.copy()
        loads[:, 1] = [x.data_ptr() for x in inputs]
        addresses = np.array([x.data_ptr() for x in outputs], dtype=np.int64)
        stores[:, 1] = addresses[self.kinds] + self.first_rows * stores[:, 3] * n

        def compute(k: int) -> None:
            block = memory[k].data_ptr()
            to_block = np.array([block, 0, 0, 0])
            calls = self.functions, self.firsts, self.pointers + self.is_place * block
            tables = calls, (loads + to_block,), (stores + to_block,)
            words = [n, ends[k], ends[k + 1]]
            for arrays in tables:
                words += [len(arrays[0]), *(x.ctypes.data for x in arrays)]
            self.run(*map(ctypes.c_int64, words))

        jobs = [self.pool.submit(compute, k) for k in range(1, shares)]
        compute(0)
        for job in jobs:
            job.result()
        return self.interface.results(outputs, n)


class CompiledFunction:
    """`function` of a step, compiled for the model `base` when it is called first.

    Fields of models may be replaced, as randomisation does. Arguments that are not tensors are constants of the code.
    known: a function of the arguments, which gives `known` of `Recording`."""

    def __init__(self, function: Callable, base: Model, known: Callable = lambda args: ()):
        self.function, self.base, self.known = function, base, known
        tensors = tree_leaves([*vars(base).values()])
        self.tensors = [x for x in tensors if isinstance(x, Tensor) and not x.is_inference()]  # those count changes
        self.changes = self.count_changes()
        self.codes: dict[str, Code] = {}
        self.one_at_a_time = threading.Lock()

    def count_changes(self) -> int:
        """How often the model's tensors have been changed in place."""
        return sum(x._version for x in self.tensors)

    def check_model(self) -> None:
        """ValueError if the model was changed in place, because its tensors are constants of the code."""
        if self.count_changes() != self.changes:
            raise ValueError("the compiled model was changed in place; use dataclasses.replace instead")

    def difference(self, model: Model) -> Changed:
        """The fields that have been replaced. Their tensors are inputs: numbers (..., N), or it is a ValueError."""
        fields = {name: field for name, field in vars(model).items() if field is not getattr(self.base, name)}
        for name, field in fields.items():  # the tensors of a terrain have no axis of robots
            if isinstance(field, Terrain) or any(kind_of(x) != "number" for _, x in named_tensors(field, name)):
                raise ValueError(f"compiled for another model, which differs in {name}")
        return Changed(fields)

    def without_models(self, args: tuple) -> tuple:
        """The arguments with a `Changed` in place of each model. ValueError for tensors of a wrong type or device."""
        self.check_model()
        args, like = tree_map_only(Model, self.difference, args), self.base.gravity
        for name, x in named_tensors(args, "args"):
            if x.dtype not in (like.dtype, torch.int64, torch.bool) or x.device != like.device:
                wanted = f"{name} must be of {like.dtype}, torch.int64 or torch.bool on {like.device}"
                raise ValueError(f"{wanted}, not of {x.dtype} on {x.device}")
        return args

    def robots(self, n: int) -> int:
        """The number of robots for which code is compiled, if there are n."""
        if on_gpu(self.base.gravity.device):
            return n
        bits = {"AVX512": 512, "AVX2": 256}.get(torch.backends.cpu.get_cpu_capability(), 128)  # of a register
        return min(bits // 8 // self.base.gravity.itemsize, 1 << max(0, n.bit_length() - 1))

    def compile(self, args: tuple, robots: int) -> Code:
        """The code for these arguments, of `without_models`, and for so many robots."""
        key, like = f"{robots} {signature(args)}", self.base.gravity
        with self.one_at_a_time:
            if key not in self.codes:
                exact = self.function not in PHYSICS
                recording = Recording(self.function, self.base, args, self.known(args), exact)
                self.codes[key] = Code(recording, like.dtype, like.device, robots)
            return self.codes[key]

    def __call__(self, *args: Any) -> Any:
        args = self.without_models(args)
        n = max(x.shape[-1] for _, x in named_tensors(args, ""))
        return self.compile(args, self.robots(n))(args, n)


class CompiledCalls:
    """`function` of (*args, run) for a CPU. All its arithmetic is in functions of `run`, whose calls become one `Loop`.

    In each call, args must be trees of the same structure, of tensors only. The first tensor has N columns."""

    def __init__(self, function: Callable, run: Regions, threads: int = 1):
        self.function, self.run, self.threads = function, run, threads
        self.loops: dict[int, Loop] = {}
        self.one_at_a_time = threading.Lock()

    def loop(self, args: tuple, robots: int) -> Loop:
        """Call the function eagerly with one robot, note what it calls, and compile that for blocks of `robots`."""
        pool = ThreadPoolExecutor(self.threads)
        jobs: dict[tuple, Any] = {}  # what the pool compiles
        calls: list[tuple] = []

        def noted(compiled: CompiledFunction) -> Callable:
            def call(*args: Any) -> Any:
                given = compiled.without_models(args)
                key = compiled, signature(given)
                if key not in jobs:
                    jobs[key] = pool.submit(compiled.compile, given, robots)
                result = tree_map_only(Tensor, torch.clone, compiled.function(*args))  # each tensor is another object
                calls.append((jobs[key], given, [x for _, x in named_tensors(result, "")]))
                return result

            return call

        args = tree_map_only(Tensor, of_one_robot, args)
        with pool, torch.no_grad():
            result = self.function(*args, Regions(**{name: noted(x) for name, x in vars(self.run).items()}))
            codes = [(job.result(), args, results) for job, args, results in calls]
        calls = [(code, code.interface.inputs(args), results) for code, args, results in codes]
        base = self.run.begin_dynamics.base
        return Loop(calls, named_tensors(args, "args"), result, base.gravity.dtype, robots)

    def __call__(self, *args: Any) -> Any:
        first, tree = self.run.begin_dynamics, args
        first.check_model()
        while not isinstance(tree, Tensor):
            tree = tree[0]
        n, robots = tree.shape[-1], first.robots(tree.shape[-1])
        with self.one_at_a_time:
            if robots not in self.loops:
                self.loops[robots] = self.loop(args, robots)
        return self.loops[robots](args, n, self.threads)


# ----------------------------------------------------------------------------------------------------------------------
# The vector environment
# ----------------------------------------------------------------------------------------------------------------------


def pick_device(name: str | torch.device) -> torch.device:
    """The device with the name auto, cpu, cuda or cuda:N. Under torchrun, process r of a machine takes GPU r.

    auto is a GPU where there is one. A torch.device is returned as it is. InputError for a device that is not here.
    """
    if isinstance(name, torch.device):
        return name
    available = torch.cuda.device_count()
    if name == "cpu" or (name == "auto" and not available):
        return torch.device("cpu")
    match = re.fullmatch(r"auto|cuda(?::(\d+))?", name)
    if not match:
        raise InputError(f"device = {name} must be auto, cpu, cuda or cuda:N")
    if match[1] and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError(f"device = {name}: several processes cannot share one GPU; use --device cuda")
    index = int(match[1] or os.environ.get("LOCAL_RANK", 0))
    if index >= available:
        seen = f"PyTorch {torch.__version__} sees {available} GPUs here"
        raise InputError(f"device = {name}: there is no GPU {index}; {seen}; use another one, fewer processes or cpu")
    return torch.device("cuda", index)


SAME_STEP = gymnasium.vector.AutoresetMode.SAME_STEP
MEANS_OVER_EPISODES = ("episode_return", "episode_length", "success")
STATISTICS = ("episodes", *MEANS_OVER_EPISODES, "invalid", "steps", "dropped_contacts")
COMPILED_ROWS = 32  # the most rows of `Constraints.pair_jacobian` that compile in minutes: their solver is unrolled
CHUNK = 8192  # the most environments that are stepped together, so that their tensors stay in a cache


def transposed(x: Tensor) -> Tensor:
    """A copy (N, k) of x (k, N), or the other way round."""
    return torch.clone(x.T, memory_format=torch.contiguous_format)


def normal_tensors(method: Callable) -> Callable:
    """Run the method without gradients, and outside `torch.inference_mode()`.

    A state that is created inside it could not be updated outside it later."""
    return torch.inference_mode(False)(torch.no_grad()(method))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch's operations use one thread inside, also in new threads: a step, and the policy between two steps.

    Its further threads wait busily for some milliseconds after an operation. They would keep the cores from those of
    the step. PyTorch's number of threads belongs to the process, so this is not for two threads at once."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def to_numpy(values: Any) -> Any:
    """The tensors in `values` (a tensor, dicts) as numpy arrays."""
    return map_tensors(lambda x: x.cpu().numpy(), values)  # host sync


@dataclass(frozen=True)
class Options:
    """The options of a `VecSim`. Those of its task come on top."""

    device: str | torch.device = "cpu"  # auto, cpu, cuda, cuda:N or a torch.device
    seed: int = 0  # of every random number that the environment draws
    dtype: torch.dtype = torch.float32  # or torch.float64
    integrator: str = "mjcf"  # mjcf (that of the MJCF), euler, implicitfast or rk4
    iterations: int | None = None  # Newton iterations per evaluation of the dynamics; default: the task's own
    # How many contacts between moving geoms are solved at once, see `load_model`; `pop_statistics` counts the others.
    pair_slots: int | None = None
    # False omits contacts between moving geoms, of whatever shapes; default: the task's own, usually True.
    self_collision: bool | None = None
    max_episode_steps: int | None = None  # the time limit; default the task's own
    random_initial_ages: bool = False  # the first episodes start at random ages, so their time limits do not coincide
    compile: bool = False  # compile the step; on CUDA also capture it as one graph
    chunk: int | None = None  # environments stepped together; default: equal shares of CHUNK or less
    # True for the task's own ranges, or ranges of `parameter_rows`: {"friction": (0.5, 1.25)}.
    randomize: bool | dict[str, Any] | None = None
    observation_noise: float = 0.0  # size of the uniform noise in obs, times the task's scale of each group
    hidden_observations: str | None = None  # groups that obs leaves out, for example "qvel" or "qvel,cvel"
    stack_observations: int = 1  # obs has so many observations, oldest first; at first copies of an episode's first one
    delay_observations: int = 0  # obs is that of so many control steps ago
    action_delay_ms: float = 0.0  # actions reach the robot this much later, rounded to physics steps
    timestep_scale: float = 1.0  # factor of the physics timestep; a control step keeps its number of physics steps
    numpy: bool = False  # `reset` answers in numpy arrays


class VecSim(gymnasium.vector.VectorEnv):
    """N robots of one task on one device, in tensors or numpy arrays, with same-step auto-reset.

    `step` takes actions (N, nu) and returns obs (N, obs), reward (N,), terminated (N,) bool, truncated (N,) bool, info.
    info["final_obs"] (N, obs) is always the observation before auto-reset. info["invalid"] (N,) bool marks transitions
    that a learner must mask: their simulation diverged. info also has every reward term, under Gymnasium's name.
    `terminated` wins over `truncated`. The physics clips actions to the control range; as in Gymnasium, costs see them
    unclipped. A task with privileged observations reports them as info["critic_obs"] and info["final_critic_obs"];
    they are complete, without noise and not late.

    gymnasium.make_vec("vecsim_torch:vecsim/Ant-v5", num_envs=64) makes one for Gymnasium's vector wrappers. (Those that
    change observations refuse every environment with same-step resets.)
    `step` answers in the kind of its actions. `reset` answers in tensors, or in numpy with numpy=True, which make_vec
    sets. info follows Gymnasium's SAME_STEP: final_obs, final_info and the masks _final_obs and _final_info of the
    environments whose episode ended. With tensors, these four are in every info, and no other key has a mask. With
    numpy, they are there when an episode ended, and every key has a mask; ignore values where the mask is False.

    env_id is a name in TASKS, or a task of your own as my_task.py:MyTask. The options are the fields of `Options` and
    those of the task: reset_noise_scale, ctrl_cost_weight, ... "randomize.friction" is one entry of `randomize`.

    One random generator draws starts and commands. A second one draws everything optional: randomisation, pushes and
    observation noise. So randomisation, pushes and noise do not change the starts and commands of a seed.
    """

    @normal_tensors
    def __init__(self, env_id: str, num_envs: int = 4096, **options: Any):
        known = options.keys() & {field.name for field in dataclasses.fields(Options)}
        given = Options(**check_types(Options, {name: options.pop(name) for name in known}))
        check_at_least(1, num_envs=num_envs, iterations=given.iterations, max_episode_steps=given.max_episode_steps)
        check_at_least(1, chunk=given.chunk, stack_observations=given.stack_observations)
        check_at_least(0, delay_observations=given.delay_observations)
        check_at_least(0.0, observation_noise=given.observation_noise, action_delay_ms=given.action_delay_ms)
        check_at_least(1e-3, timestep_scale=given.timestep_scale)
        single = [name for name in options if name.startswith("randomize.")]
        single = {name.removeprefix("randomize."): options.pop(name) for name in single}
        self.env_id, self.num_envs, self.dtype, self.numpy = env_id, num_envs, given.dtype, given.numpy
        self.device, self.compiled = pick_device(given.device), given.compile
        self.random_initial_ages = given.random_initial_ages
        self.task = build_task(env_id, options)
        self.mj_model = compile_mjcf(self.task.source())
        self.mj_model.opt.timestep *= given.timestep_scale
        self_collision = self.task.self_collision if given.self_collision is None else given.self_collision
        slots = dict(self_collision=self_collision, pair_slots=given.pair_slots)
        model = load_model(self.mj_model, dtype=self.dtype, device=self.device, **slots)
        self.model = self.task.furnish(model, self.mj_model)
        rows = self.model.pair_slots * self.model.pair_edges + self.model.couplings
        if self.compiled and rows > COMPILED_ROWS:
            raise InputError(
                f"{rows} rows of self-contacts (pair_slots={self.model.pair_slots}, {self.model.pair_edges} a slot) "
                f"take too long to compile, at most {COMPILED_ROWS}; use fewer pair_slots, condim 1, "
                "self_collision=False or compile=False"
            )
        if self.compiled and self.device.type == "cpu":
            cpp_compiler()  # without one, say so before the networks are compiled
        if on_gpu(self.device) and not self.compiled:
            print("compile=False on a GPU launches tens of thousands of kernels a step: very slow", file=sys.stderr)
        self.settings = Settings(
            task=self.task,
            integrator=self.model.integrator if given.integrator == "mjcf" else given.integrator,
            iterations=given.iterations or self.task.solver_iterations,
            max_episode_steps=given.max_episode_steps or self.task.max_episode_steps,
            ranges=choose_ranges(given.randomize, single, self.task, self.model),
            observation_noise=given.observation_noise,
            delay=round(given.action_delay_ms / 1000 / self.model.timestep),
            hidden_observations=given.hidden_observations and tuple(given.hidden_observations.split(",")),
            stack_observations=given.stack_observations,
            delay_observations=given.delay_observations,
        )
        self.control_step = self.task.frame_skip * self.model.timestep  # s
        self.metadata = dict(autoreset_mode=SAME_STEP, render_fps=round(1 / self.control_step))
        rows = parameter_rows(self.model)
        self._parameter_rows = {name: rows[name] for name in self.settings.ranges}
        bounds = [(low, high - low) for name, (low, high) in self.settings.ranges.items() for _ in range(rows[name])]
        self._parameter_bounds = torch.tensor(bounds, dtype=self.dtype, device=self.device).view(-1, 2, 1).unbind(1)
        self._generators = [torch.Generator(self.device) for _ in range(2)]
        self._seed(given.seed)
        self._prepare_spaces()
        self._prepare_chunks(given.chunk)
        sums = len(STATISTICS) + len(self.task.averaged)
        self._statistics = torch.zeros(sums, dtype=torch.float64, device=self.device)
        self._captured: Callable[[Tensor], Transition] | None = None

    # -- random numbers ------------------------------------------------------------------------------------------------

    def _seed(self, seed: int) -> None:
        if not isinstance(seed, (int, np.integer)):
            raise InputError(f"seed must be one whole number, not {seed!r}")
        first = int(seed) % 2**64
        second = np.random.SeedSequence((first, 1)).generate_state(1)[0]
        for generator, number in zip(self._generators, (first, second), strict=True):
            generator.manual_seed(int(number))

    def _draw_noise(self) -> Noise:
        """The random numbers of one step. They do not depend on the chunks."""
        first, second = self._generators

        def draw(rows: int, generator: torch.Generator, normal: bool = False) -> Tensor:
            random = torch.randn if normal else torch.rand
            return random(rows, self.num_envs, generator=generator, device=self.device, dtype=self.dtype)

        qpos, qvel = draw(self.model.nq, first), draw(self.model.nv, first, self.task.normal_velocity_noise)
        task, (low, width) = draw(self.task.random_rows, first), self._parameter_bounds
        drawn = (low + width * draw(len(low), second)).split(list(self._parameter_rows.values()))
        parameters = dict(zip(self._parameter_rows, drawn, strict=True))
        return Noise(qpos, qvel, task, parameters, draw(self._observation_rows, second))

    # -- spaces and names ----------------------------------------------------------------------------------------------

    def _prepare_spaces(self) -> None:
        self._observation_rows = 0  # not known yet
        columns = torch.arange(13, device=self.device) % self.num_envs  # few tensors have 13 rows by chance
        of_many, generator = map_tensors(lambda x: x[..., columns], self._draw_noise()), torch.Generator(self.device)
        generator.manual_seed(0)
        different = (torch.rand(x.shape, generator=generator, out=torch.empty_like(x)) for x in of_many[:3])
        of_many = Noise(*different, *of_many[3:])
        of_one = map_tensors(lambda x: x[..., -1:], of_many)
        checks = (check_task(self.settings, self._robots(x.parameters), x) for x in (of_many, of_one))
        (groups, privileged, many), (_, _, one) = checks
        check_independence(many, one)
        hidden = set(self.settings.hidden_observations or ())
        if not groups:
            raise InputError("observe must be a dict with at least one group")
        if hidden - groups.keys() or hidden >= groups.keys():
            raise InputError(f"hidden_observations must leave some of {', '.join(groups)} and hide nothing else")
        groups = {name: rows for name, rows in groups.items() if name not in hidden}
        if self.settings.observation_noise:
            self._observation_rows = sum(len(rows) for rows in groups.values())
        delay = self.settings.delay_observations
        ages = reversed(range(delay, delay + self.settings.stack_observations))
        shown = {f"{name}[-{age}]" if age else name: rows for age in ages for name, rows in groups.items()}
        self.observation_slices, self.single_observation_space = spaces_of(shown)
        self.critic_slices, self.single_critic_space = spaces_of(privileged)
        low, high = self.task.action_range(self.model)
        unbounded = (high - low).isinf().nonzero().flatten().tolist()  # host sync
        if unbounded:
            names = ", ".join(self.mj_model.actuator(k).name or str(k) for k in unbounded)
            raise InputError(f"actuators without a control range: {names}; give them a ctrlrange in the MJCF")
        low, high = (x.float().cpu().numpy() for x in (low, high))  # host sync
        self.single_action_space = gymnasium.spaces.Box(low, high)
        self.observation_space = gymnasium.vector.utils.batch_space(self.single_observation_space, self.num_envs)
        self.action_space = gymnasium.vector.utils.batch_space(self.single_action_space, self.num_envs)

    def action_names(self) -> list[str]:
        """The actuators, (nu,). An actuator without a name gets the name of its joint or tendon."""
        m = self.mj_model
        pulled = [m.tendon if kind == mujoco.mjtTrn.mjTRN_TENDON else m.joint for kind in m.actuator_trntype]
        return [m.actuator(i).name or pulled[i](m.actuator_trnid[i, 0]).name for i in range(m.nu)]

    def observation_names(self, slices: dict[str, slice]) -> list[str]:
        """A name for each number of `observation_slices` or `critic_slices`: group/joint, else group[index].

        A group of k control steps ago has the name group[-k]."""
        qpos, qvel = coordinate_names(self.mj_model)
        rows = {"qpos": qpos, "joint_position": qpos}
        rows |= dict.fromkeys(("last_action", "arm_qpos", "arm_qvel"), self.action_names())
        rows |= dict.fromkeys(("qvel", "joint_velocity", "qfrc_actuator"), qvel)
        names = []
        for group, columns in slices.items():
            size = columns.stop - columns.start
            known = rows.get(group.split("[")[0], [])[-size:]  # a group may omit the first coordinates
            names += [f"{group}/{known[i]}" if len(known) == size else f"{group}[{i}]" for i in range(size)]
        return names

    # -- reset and step ------------------------------------------------------------------------------------------------

    def _prepare_chunks(self, chunk: int | None) -> None:
        """Which environments are stepped together, and the functions and threads that step them."""
        on_cpu = self.device.type == "cpu"
        cores = self._cores = torch.get_num_threads() if on_cpu else 1
        if chunk is None:
            line = CACHE_LINE // self.dtype.itemsize if on_cpu else 1  # numbers in a cache line
            chunk = line * math.ceil(self.num_envs / math.ceil(self.num_envs / CHUNK) / line)
        else:
            chunk = min(chunk, self.num_envs)
        starts = range(0, self.num_envs, chunk)
        self._parts: list[slice | Tensor] = [slice(start, min(start + chunk, self.num_envs)) for start in starts]
        if self.compiled and len(starts) * chunk > self.num_envs:  # copies make all chunks equally large
            self._parts[-1] = torch.arange(starts[-1], starts[-1] + chunk, device=self.device) % self.num_envs
        self._carries: list[Carry] = []
        self._run = compile_regions(self.model) if self.compiled else EAGER
        step = functools.partial(environment_step, self.settings, self.model)
        self._environment_step = functools.partial(step, run=self._run)  # of a chunk's carry, actions and noise
        if isinstance(self._run.begin_step, CompiledFunction) and not on_gpu(self.device):
            self._environment_step = CompiledCalls(step, self._run, cores)

    def _part(self, tensors: Any, part: slice | Tensor) -> Any:
        """`tensors` (..., N) of one chunk. The last chunk may end with copies."""
        return map_tensors(lambda x: x[..., part].contiguous(), tensors)

    def _join(self, chunks: Sequence[Any]) -> Any:
        """The tensors (..., N) of which `chunks` are the parts, without the copies."""
        return map_tensors(lambda *parts: torch.cat(parts, -1)[..., : self.num_envs], *chunks)

    def _set_carry(self, carry: Carry) -> None:
        chunks = [self._part(carry, part) for part in self._parts]
        if not self._carries:
            self._carries = [map_tensors(torch.clone, chunk) for chunk in chunks]
        for mine, theirs in zip(self._carries, chunks, strict=True):
            copy_tensors(mine, theirs)  # in place: the graph needs fixed addresses

    def _get_carry(self) -> Carry:
        if not self._carries:
            raise ValueError("this environment has no state yet; call reset() first")
        return self._join(self._carries)

    def _robots(self, parameters: Tensors) -> Model:
        """The model with these randomised parameters."""
        if not parameters:
            return self.model
        return dataclasses.replace(self.model, **randomized_fields(self.model, parameters))

    @normal_tensors
    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode in every environment. Without a seed the random generators continue.

        One seed serves all environments; a list of seeds is an InputError. There are no options.
        """
        if seed is not None:
            self._seed(seed)
        noise = self._draw_noise()
        model = self._robots(noise.parameters)
        limit = torch.zeros(self.num_envs, dtype=torch.long, device=self.device)
        carry, measured, sensed = begin_episode(self.settings, model, noise, None, limit)
        obs, critic_obs = observations(self.settings, model, measured, sensed, noise)
        obs, seen = show(self.settings, obs, None)
        carry = carry._replace(seen=seen)
        if self.random_initial_ages:
            longest, generator = self.settings.max_episode_steps, self._generators[0]
            age = torch.randint(longest, (self.num_envs,), device=self.device, generator=generator)
            carry = carry._replace(age=age)
        self._set_carry(carry)
        self._statistics.zero_()
        obs, info = obs.T.contiguous(), {}
        if self.single_critic_space:
            info["critic_obs"] = critic_obs.T.contiguous()
        if self.numpy:
            return to_numpy(obs), with_masks(to_numpy(info), np.zeros(self.num_envs, bool))
        return obs, info

    @normal_tensors
    def step(self, actions: Tensor | np.ndarray) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """One control step of every environment with actions (N, nu). The docstring of VecSim says what it returns."""
        if not self._carries:
            raise ValueError("call reset() before step()")
        given, shape = getattr(actions, "shape", type(actions).__name__), (self.num_envs, self.model.nu)
        if given != shape:
            raise ValueError(f"actions must be a tensor or a numpy array of shape {shape}, not {given}")
        if isinstance(actions, np.ndarray):
            *answer, info = map(to_numpy, self.step(torch.tensor(actions, dtype=self.dtype, device=self.device)))
            return *answer, with_masks(info, info["_final_obs"])
        with one_thread() if self.compiled and self._cores > 1 else contextlib.nullcontext():
            return self._step(actions.to(self.device, self.dtype))

    def _step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """`step` from actions that are a tensor (N, nu) on the device."""
        if self.compiled and on_gpu(self.device):
            if isinstance(self._run.begin_dynamics, CompiledFunction):
                self._run.begin_dynamics.check_model()  # ValueError if the graph has old constants
            with torch.cuda.device(self.device):
                t = self._replay(actions.T)
        else:
            t = self._step_chunks(transposed(actions))
        copy = torch.clone  # the next replay overwrites the results; on a CPU they are views of one large tensor
        terms, ended = map_tensors(copy, {"invalid": t.invalid, **t.terms}), t.terminated | t.truncated
        info = {"final_obs": transposed(t.final_obs), "_final_obs": ended, "final_info": terms, "_final_info": ended}
        info |= terms
        if self.single_critic_space:
            info |= {"critic_obs": transposed(t.critic_obs), "final_critic_obs": transposed(t.final_critic_obs)}
        return transposed(t.obs), copy(t.reward), copy(t.terminated), copy(t.truncated), info

    def _step_chunks(self, action: Tensor) -> Transition:
        """`environment_step` of every chunk, from action (nu, N). Updates states and statistics in place."""
        drawn, transitions = self._draw_noise(), []
        for part, carry in zip(self._parts, self._carries, strict=True):
            mine, noise = (self._part(x, part) for x in (action, drawn))
            new, transition = self._environment_step(carry, mine, noise)
            copy_tensors(carry, new)
            transitions.append(transition)
        t = transitions[0]
        if len(transitions) > 1 or len(t.reward) > self.num_envs:
            t = self._join(transitions)
        self._statistics += t.counted.sum(1, dtype=torch.float64)
        return t

    def _replay(self, action: Tensor) -> Transition:
        """`_step_chunks` as one CUDA graph: captured in the first call, then one launch with fresh random numbers."""
        if self._captured is None:
            state = self.state_dict()
            try:
                self._captured = capture(self._step_chunks, (action,), self._generators)
            finally:  # the warm-up leaves no trace
                self.load_state_dict(state)
        return self._captured(action)

    # -- statistics and state ------------------------------------------------------------------------------------------

    def pop_statistics(self) -> dict[str, float]:
        """Statistics since the last call. Means over nothing are NaN.

        episodes            whole episodes that ended. One that began at a random age is not counted: the time limit
                            cuts it short, so its return would be too low
        episode_return, episode_length, success
                            means over these episodes; success is the share that reached the time limit
        invalid             steps whose simulation diverged
        dropped_contacts    contacts per robot and physics step that found no pair slot
        ...                 the measurements that the task lists in `averaged`: means over all valid steps
        """
        names = (*STATISTICS, *self.task.averaged)
        sums = dict(zip(names, self._statistics.tolist(), strict=True))  # host sync
        self._statistics.zero_()
        sums["dropped_contacts"] /= self.task.frame_skip
        counts = dict.fromkeys(MEANS_OVER_EPISODES, sums["episodes"])
        counts |= dict.fromkeys(("dropped_contacts", *self.task.averaged), sums.pop("steps"))
        return sums | {name: sums[name] / count if count else math.nan for name, count in counts.items()}

    def parameters(self) -> Tensors:
        """The randomised parameters of the robots as they are now, (rows, N) each; see `parameter_rows`."""
        return self._get_carry().parameters

    def robots(self) -> Model:
        """The model of the robots as they are now. Randomised parameters are (..., N)."""
        return self._robots(self.parameters())

    def state(self) -> State:
        """Copies of qpos (nq, N), qvel (nv, N) and the warm start."""
        carry = self._get_carry()
        return State(carry.qpos, carry.qvel, carry.warmstart)

    @normal_tensors
    def set_state(self, qpos: Tensor, qvel: Tensor) -> Tensor:
        """Put every robot at qpos (nq, N), qvel (nv, N), like Gymnasium's set_state. Returns obs without noise.

        Past observations are forgotten, as at the start of an episode."""
        carry, model = self._get_carry(), self.robots()
        if qpos.shape != carry.qpos.shape or qvel.shape != carry.qvel.shape:
            raise ValueError(f"qpos must be {tuple(carry.qpos.shape)} and qvel {tuple(carry.qvel.shape)}")
        qpos, qvel = (x.to(self.device, self.dtype) for x in (qpos, qvel))
        measured = Measured(qpos, qvel, None, carry.memory, carry.push)
        sensed = self.task.sense(model, measured)
        obs = torch.cat(list(observed(self.settings, model, measured, sensed).values()))
        obs, seen = show(self.settings, obs, None)
        moved = carry._replace(qpos=qpos, qvel=qvel, warmstart=torch.zeros_like(qvel), position=sensed["position"])
        self._set_carry(moved._replace(seen=seen))
        return obs.T.contiguous()

    def _configuration(self) -> dict[str, Any]:
        """The options that a loaded state must have been made with."""
        options = {"env_id": self.env_id, "num_envs": self.num_envs, "dtype": str(self.dtype)}
        options |= {"pair_slots": self.model.pair_slots, "timestep": self.model.timestep}
        settings = dataclasses.asdict(self.settings)
        return options | settings.pop("task") | settings

    @normal_tensors
    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on: tensors and plain values, for torch.save."""
        return {
            "configuration": self._configuration(),
            "device": self.device.type,
            "carry": map_tensors(lambda x: x.cpu(), self._get_carry())._asdict(),  # host sync
            "generators": [generator.get_state() for generator in self._generators],
            "statistics": self._statistics.cpu().clone(),  # host sync
        }

    @normal_tensors
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken. InputError if the state was made with other options.

        A state from another kind of device (cpu, cuda) continues with the random generators of this environment.
        """
        for name, value in self._configuration().items():
            theirs = state["configuration"].get(name)
            if theirs != value:
                raise InputError(f"this state is of {name} {theirs}, not {value}")
        self._set_carry(map_tensors(lambda x: x.to(self.device), Carry(**state["carry"])))
        if state["device"] == self.device.type:
            for generator, theirs in zip(self._generators, state["generators"], strict=True):
                generator.set_state(theirs)
        self._statistics.copy_(state["statistics"])


def with_masks(info: dict[str, Any], ended: np.ndarray) -> dict[str, Any]:
    """`info` of arrays with Gymnasium's masks: "_key" (N,) bool tells which environments have `key`.

    Where an episode `ended` (N,) bool, what the step measured is in "final_info" and not in info itself.
    """
    masked = {}
    for name, value in info.items():
        final = name.startswith("final_")
        if name.startswith("_") or (final and not ended.any()):
            continue
        if name == "final_info":
            value = value | {f"_{term}": ended for term in value}
        mask = ended if final else ~ended | (name == "critic_obs")  # critic_obs is also of the episode that began
        masked |= {name: value, f"_{name}": mask}
    return masked


def spaces_of(groups: Tensors) -> tuple[dict[str, slice], gymnasium.spaces.Box | None]:
    """The rows of each group in an observation, and the space of one observation; None without groups."""
    bounds = [0, *itertools.accumulate(map(len, groups.values()))]
    slices = {name: slice(a, b) for name, (a, b) in zip(groups, itertools.pairwise(bounds), strict=True)}
    return slices, gymnasium.spaces.Box(-np.inf, np.inf, (bounds[-1],), np.float32) if groups else None


def coordinate_names(m: mujoco.MjModel) -> tuple[list[str], list[str]]:
    """Names of the rows of qpos and of qvel: the joint's name, and for a ball or free joint also the component."""
    components = {FREE: ("x y z qw qx qy qz", "vx vy vz wx wy wz"), BALL: ("qw qx qy qz", "wx wy wz")}
    qpos, qvel = [], []
    for j in range(m.njnt):
        joint = m.joint(j).name or f"joint{j}"
        for rows, parts in zip((qpos, qvel), components.get(m.jnt_type[j], ("", "")), strict=True):
            rows += [f"{joint}/{part}" for part in parts.split()] or [joint]
    return qpos, qvel


VECSIM_ALONE = {  # options that Gymnasium does not have
    "randomize", "observation_noise", "action_delay_ms", "timestep_scale", "pair_slots", "self_collision", "chunk",
}  # fmt: skip


def options_from_text(options: dict[str, Any]) -> dict[str, Any]:
    """`options` with the texts of a command line understood: "0.2:0.8" is a range; true, false and none are values."""
    words = {"true": True, "false": False, "none": None}
    parsed = {}
    for name, value in options.items():
        if isinstance(value, str):
            value = words.get(value.lower(), value)
        if isinstance(value, str):
            with contextlib.suppress(ValueError):  # it is not two numbers
                low, high = value.split(":")
                value = float(low), float(high)
        parsed[name] = value
    return parsed


def make(env_id: str, num_envs: int = 4096, **options: Any) -> VecSim:
    """A `VecSim` with these `Options` and those of its task. Texts are understood: "0.2:0.8" is a range."""
    try:
        return VecSim(env_id, num_envs, **options_from_text(options))
    except (MemoryError, RuntimeError) as error:
        if "allocate" not in str(error):
            raise
        raise InputError(f"num_envs = {num_envs:,} needs more memory than there is: {error}") from error


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation and film: what every trainer does with a finished policy
#
# A policy is a function act(obs, started) -> action. obs (N, k) float32; started (N,) bool is True where an episode
# begins, and a policy with memory clears it there; action (N, nu) in the environment's units.
# ----------------------------------------------------------------------------------------------------------------------

Act = Callable[[Tensor, Tensor], Tensor]


def policy_of(agent: Any) -> Act:
    """The deterministic policy of a trainer's agent. It keeps the memory of an agent that has one between its calls.

    Such an agent has empty_memory(N) and act(obs, memory, started) -> action, next memory; it clears what `started`
    names.
    """
    if not hasattr(agent, "empty_memory"):
        return agent.act
    memory = None

    def act(obs: Tensor, started: Tensor) -> Tensor:
        nonlocal memory
        if memory is None or len(memory) != len(obs):
            memory = agent.empty_memory(len(obs))
        action, memory = agent.act(obs, memory, started)
        return action

    return act


@torch.no_grad()
def evaluate(env: gymnasium.vector.VectorEnv, act: Act, seed: int, observes: str = "obs") -> dict[str, float]:
    """Score the first episode of each environment: mean, std and min of the returns, episodes, mean_length.

    env: a `VecSim` in tensors, or a vector environment of Gymnasium. observes: "obs" or "critic_obs".
    Every environment counts once, so short episodes weigh no more than long ones. An environment that was quarantined
    in its first episode is left out. FloatingPointError if all were.
    """
    obs, info = env.reset(seed=seed)
    in_tensors = isinstance(obs, Tensor)
    returns = torch.zeros(env.num_envs, dtype=torch.float64, device=obs.device if in_tensors else "cpu")
    lengths = torch.zeros_like(returns)
    failed = torch.zeros_like(returns, dtype=torch.bool)
    started = running = ~failed
    while running.any():  # host sync
        seen = torch.as_tensor(obs if observes == "obs" else info[observes]).float()
        action = act(seen, started)
        obs, reward, terminated, truncated, info = env.step(action if in_tensors else action.cpu().numpy())  # host sync
        invalid = torch.as_tensor(info.get("invalid", torch.zeros_like(failed)))
        started = torch.as_tensor(terminated | truncated) | invalid
        returns += torch.where(running & ~invalid, torch.as_tensor(reward), 0.0)
        lengths += running
        failed |= running & invalid
        running = running & ~started
    if failed.all():  # host sync
        raise FloatingPointError("every environment of the evaluation diverged: the policy breaks the simulator")
    returns, lengths = (x[~failed].cpu().numpy() for x in (returns, lengths))  # host sync
    of_returns = dict(mean=float(returns.mean()), std=float(returns.std()), min=float(returns.min()))
    return of_returns | dict(episodes=len(returns), mean_length=float(lengths.mean()))


def gymnasium_options(env_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The options of `make` that gymnasium.make takes too, with texts understood."""
    shared = {name: value for name, value in env_kwargs.items() if name.split(".")[0] not in VECSIM_ALONE}
    return options_from_text(shared)


def gymnasium_id(env_id: str) -> str | None:
    """The task's name in Gymnasium, where it is one robot in MuJoCo C; None if Gymnasium does not have it."""
    names = [name for name in (env_id, f"vecsim/{env_id}") if name in gymnasium.registry]
    return next((name for name in names if gymnasium.registry[name].entry_point), None)


def split_view(env_id: str, options: dict[str, Any]) -> tuple[dict[str, Any], slice | list[int], int, int]:
    """`options` without those of what a policy sees; and these: columns that are not hidden, stack and delay."""
    options = dict(options)
    stack, delay = options.pop("stack_observations", 1), options.pop("delay_observations", 0)
    plain = {name: value for name, value in options.items() if name != "hidden_observations"}
    if plain == options:
        return plain, slice(None), stack, delay
    whole, part = (make(env_id, 1, **x).observation_slices for x in (plain, options))
    columns = [column for name in part for column in range(whole[name].start, whole[name].stop)]
    return plain, columns, stack, delay


def partly_observed(env: gymnasium.Env, columns: slice | list[int], stack: int, delay: int) -> gymnasium.Env:
    """One of Gymnasium's environments, seen as in `show`; copies of an episode's first observation are its past."""
    size, wrap = len(np.zeros(env.observation_space.shape)[columns]), gymnasium.wrappers.TransformObservation
    env = wrap(env, lambda obs: obs[columns], gymnasium.spaces.Box(-np.inf, np.inf, (size,)))
    env = gymnasium.wrappers.FrameStackObservation(env, stack + delay)  # the oldest first
    return wrap(env, lambda frames: frames[:stack].flatten(), gymnasium.spaces.Box(-np.inf, np.inf, (stack * size,)))


def gymnasium_maker(env_id: str, env_kwargs: dict[str, Any], **more: Any) -> Callable[[], gymnasium.Env]:
    """A function that makes one of Gymnasium's own environments, in MuJoCo C, seen as `env_kwargs` says.

    env_kwargs: options of `make`; those that only vecsim has are left out. more: of gymnasium.make.
    """
    options, *view = split_view(env_id, gymnasium_options(env_kwargs))
    if "xml_file" in options:  # vecsim looks for it in other folders than Gymnasium
        options["xml_file"] = str(build_task(env_id, {"xml_file": options["xml_file"]}).source())
    make_one = functools.partial(gymnasium.make, gymnasium_id(env_id), **options, **more)
    return make_one if view == [slice(None), 1, 0] else lambda: partly_observed(make_one(), *view)


def gymnasium_envs(env_id: str, count: int, env_kwargs: dict[str, Any], **more: Any) -> gymnasium.vector.VectorEnv:
    """A vector of the environments of `gymnasium_maker`."""
    make_one = gymnasium_maker(env_id, env_kwargs, **more)
    mujoco.set_mju_user_warning(lambda text: None)  # otherwise MUJOCO_LOG.TXT gets a warning about half_cheetah.xml
    try:
        return gymnasium.vector.SyncVectorEnv([make_one] * count, autoreset_mode=SAME_STEP)
    except TypeError as error:
        raise InputError(f"env_kwargs: {error}") from error
    finally:
        mujoco.set_mju_user_warning(None)


def evaluate_in_gymnasium(
    env_id: str, act: Act, episodes: int, seed: int, env_kwargs: dict[str, Any], observes: str = "obs"
) -> dict[str, float] | None:
    """`evaluate` on the CPU in an environment of `gymnasium_maker`; None where Gymnasium has no such task."""
    if not gymnasium_id(env_id):
        return None
    envs = gymnasium_envs(env_id, episodes, env_kwargs)
    score = evaluate(envs, act, seed, observes)
    envs.close()
    return score


def make_renderer(env: VecSim) -> Any:
    """Gymnasium's renderer for the first robot of `env`."""
    from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer

    scene = copy.copy(env.task.drawn_model(env.model, env.mj_model))
    of_robot = scene.geom_bodyid > 0
    if not np.any(scene.geom_group[of_robot] <= 2):  # MuJoCo draws the groups 0 to 2; collision geoms are often in 3
        scene.geom_group[of_robot] = 0
    return MujocoRenderer(scene, mujoco.MjData(scene), width=480, height=480, camera_name="track")


def film(args: Any, act: Act, path: Path, observes: str = "obs") -> Path:
    """Film one episode into an .mp4 file, in Gymnasium's environment if there is one, and return its path.

    args: the flags of the training.
    """
    import imageio.v2 as imageio

    if "DISPLAY" not in os.environ:
        # Without a screen MuJoCo draws through EGL. Where that is missing too, set MUJOCO_GL=osmesa.
        os.environ.setdefault("MUJOCO_GL", "egl")
    # The camera "track" follows the robot. Gymnasium takes a free camera if the model has none of this name.
    frames, in_gymnasium = [], gymnasium_id(args.env_id) is not None
    if in_gymnasium:
        envs = gymnasium_envs(args.env_id, 1, args.env_kwargs, render_mode="rgb_array", camera_name="track")
    else:
        envs = whole_episodes(args, None, 1)
        renderer = make_renderer(envs)

    def draw_and_act(obs: Tensor, started: Tensor) -> Tensor:
        if in_gymnasium:
            frames.append(envs.render()[0])
        else:
            renderer.data.qpos[:] = envs.state().qpos[:, 0].tolist()  # host sync
            mujoco.mj_forward(renderer.model, renderer.data)
            frames.append(renderer.render("rgb_array"))
        return act(obs, started)

    evaluate(envs, draw_and_act, args.seed, observes)
    envs.close()
    imageio.mimwrite(path, frames, fps=envs.metadata["render_fps"], macro_block_size=8)
    return path


def to_onnx(
    policy: torch.nn.Module, inputs: dict[str, Tensor], outputs: list[str], checkpoint: dict[str, Any], **facts: Any
) -> bytes:
    """The content of an ONNX file with the policy of a checkpoint. Its metadata hold `facts` and name every column.

    policy: a module from the inputs to the outputs. The first output is the action in the environment's units; the file
    clips it to the task's limits. inputs: an example (2, k) of each by name; the file takes any number of rows.
    """
    try:
        import onnx
    except ImportError:
        raise InputError("an export needs ONNX; run `pip install onnx`") from None

    options = checkpoint["args"]["env_kwargs"]
    env = make(checkpoint["env_id"], num_envs=1, **options)
    low, high = env.task.action_limits(env.model)

    def clip(module: torch.nn.Module, args: tuple, result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        action, *memory = result if isinstance(result, tuple) else (result,)
        return action.clamp(low, high), *memory

    file, rows = io.BytesIO(), {name: {0: "batch"} for name in [*inputs, *outputs]}
    names = dict(input_names=[*inputs], output_names=outputs, dynamic_axes=rows)
    with warnings.catch_warnings(), policy.register_forward_hook(clip):
        # The newer exporter (dynamo=True) needs two more packages and takes twenty times as long.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(policy, tuple(inputs.values()), file, dynamo=False, opset_version=17, **names)
    slices = env.critic_slices if checkpoint.get("observes") == "critic_obs" else env.observation_slices
    facts |= dict(env_id=checkpoint["env_id"], env_kwargs=options, env_steps=checkpoint["env_steps"])
    facts |= dict(observation_names=env.observation_names(slices), action_names=env.action_names())
    facts |= dict(control_step_seconds=env.control_step, versions=checkpoint["versions"])
    texts = {name: x if isinstance(x, str) else json.dumps(x) for name, x in facts.items()}
    model = onnx.load_from_string(file.getvalue())
    onnx.helper.set_model_props(model, texts)
    return model.SerializeToString()


def describe(score: dict[str, float]) -> str:
    """One line about a score of `evaluate`."""
    spread = f"{score['mean']:.1f} +- {score['std']:.1f} (lowest {score['min']:.1f}"
    return f"{spread}, {score['episodes']} episodes of {score['mean_length']:.0f} steps)"


def check_env_kwargs(env_kwargs: dict[str, Any]) -> None:
    """InputError for options of `make` that a trainer sets itself."""
    flags = {name: f"--{name.replace('_', '-')}" for name in "env_id num_envs device seed compile integrator".split()}
    flags |= {"iterations": "--solver-iterations"}
    for name in (*flags, "dtype", "random_initial_ages", "numpy"):
        if name in env_kwargs:
            advice = f"use {flags[name]}" if name in flags else "omit it"
            raise InputError(f"env_kwargs sets {name}, which this script sets itself; {advice}")


def merge_episode_statistics(statistics: dict[str, float], device: torch.device) -> dict[str, float | None]:
    """Merge `VecSim.pop_statistics` of all torchrun processes; None where no episode ended, or for a missing value.

    Return, length and success are means over episodes. Everything else that a task averages is a mean over steps, and
    every process makes equally many steps.
    """
    weights = {name: statistics["episodes"] if name in MEANS_OVER_EPISODES else 1.0 for name in statistics}
    weighted = [(value * weights[name] if weights[name] else 0.0, weights[name]) for name, value in statistics.items()]
    sums = sum_over_processes(torch.tensor(weighted, dtype=torch.float64, device=device)).tolist()  # host sync
    means = [total / weight if weight and math.isfinite(total) else None for total, weight in sums]
    merged = dict(zip(statistics, means, strict=True))
    return merged | {name: int(total) for name, (total, _) in zip(statistics, sums) if name in ("episodes", "invalid")}


def cpu_name() -> str:
    """The processor and its cores, as the operating system names it."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return f"{found[1] if found else platform.processor()}, {os.cpu_count()} cores"


class CompletedEnv:
    """A user's own vector environment, completed to what the trainers read from a `VecSim`.

    All values are tensors on the environment's device. It must have

        single_observation_space, single_action_space    flat Box spaces, (k,) and (a,)
        reset(seed=None) -> obs (N, k), info
        step(action (N, a)) -> obs, reward (N,), terminated (N,) bool, truncated (N,) bool, info

    and reset an environment in the same step in which its episode ends. Observations are float32. info["final_obs"]
    (N, k) is the observation that the step led to, before any reset. Every episode must end at some time: the score
    after a training waits for that. Optional are

        single_critic_space          of a privileged observation for the value function or the teacher; then info holds
                                     critic_obs, and after a step final_critic_obs too
        info["invalid"]              (N,) bool: transitions that a learner must mask; default: none
        state_dict, load_state_dict  for exact resumption, with tensors and plain values; default: a resumed run
                                     begins new episodes
    """

    def __init__(self, env: Any):
        self.env = env
        self.single_observation_space, self.single_action_space = env.single_observation_space, env.single_action_space
        self.single_critic_space = getattr(env, "single_critic_space", None)
        self.close = getattr(env, "close", lambda: None)

    def kept(self, obs: Tensor, info: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Copies of what a policy sees: the environment may write its next observation into the same tensors."""
        return obs.clone(), info | {name: x.clone() for name, x in info.items() if name == "critic_obs"}

    def reset(self, *, seed: int | None = None) -> tuple[Tensor, dict[str, Any]]:
        obs, info = self.kept(*self.env.reset(seed=seed))
        self.num_envs = len(obs)
        self.running = torch.zeros(2, len(obs), device=obs.device)  # return and length of the current episodes
        self.sums = torch.zeros(4, dtype=torch.float64, device=obs.device)  # returns, lengths, episodes, invalid
        return obs, info

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        obs, info = self.kept(obs, info)
        invalid = info.get("invalid", torch.zeros_like(terminated))
        ended = (terminated | truncated) & ~invalid
        self.running += torch.stack([torch.where(invalid, 0.0, reward), torch.ones_like(reward)])
        self.sums += torch.stack([*(self.running * ended).sum(1), ended.sum(), invalid.sum()])
        self.running *= ~(ended | invalid)
        return obs, reward, terminated, truncated, info | {"invalid": invalid}

    def pop_statistics(self) -> dict[str, float]:
        returns, lengths, episodes, invalid = self.sums.tolist()  # host sync
        self.sums.zero_()
        means = {"episode_return": returns, "episode_length": lengths, "success": math.nan}
        means = {name: value / episodes if episodes else math.nan for name, value in means.items()}
        return {"episodes": episodes, "invalid": invalid} | means

    def state_dict(self) -> dict[str, Any]:
        if not hasattr(self.env, "state_dict"):
            return {}
        return {"env": self.env.state_dict(), "running": self.running, "sums": self.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.env.load_state_dict(state["env"])
        self.running.copy_(state["running"])
        self.sums.copy_(state["sums"])


def versions() -> dict[str, str]:
    """Versions that a result depends on, for checkpoints and reports."""
    packages = (torch, mujoco, gymnasium, np)
    return {"python": platform.python_version()} | {package.__name__: str(package.__version__) for package in packages}


_quadruped_in_mujoco = lambda env_id, numpy, **options: load_class(f"{HERE}/tasks/quadruped.py:InMujoco")(**options)
for _name in TASKS:
    _in_mujoco = _name == "Quadruped-Flat"  # also one robot, for gymnasium.make, which cuts its episodes
    gymnasium.register(
        f"vecsim/{_name}",
        entry_point=_quadruped_in_mujoco if _in_mujoco else None,
        vector_entry_point="vecsim_torch:VecSim",
        kwargs={"env_id": _name, "numpy": True},
        max_episode_steps=Task.max_episode_steps if _in_mujoco else None,
        disable_env_checker=True,
    )


# ----------------------------------------------------------------------------------------------------------------------
# Around a training: command line, processes, run folder, log, checkpoint, CUDA graphs
#
# The trainers share these functions. `args` is the dataclass of a trainer's flags. The simulator alone does not need
# tyro, tqdm, TensorBoard and matplotlib, so each is imported where it is used.
# ----------------------------------------------------------------------------------------------------------------------


COMPILING = "compiling, about half a minute the first time, some seconds once the cache has the code"


@dataclass
class RunFlags:
    """The flags that all trainers have. Steps are environment steps, summed over all environments."""

    env_id: str = "Ant-v5"
    """task: a name that vecsim_torch.make knows, or your own as my_task.py:MyTask"""
    seed: int = 1
    """seed of the weights, the environments and the noise (>= 0)"""
    device: str = "auto"
    """auto (a GPU if there is one, else the CPU), cpu, cuda or cuda:N"""
    compile: bool = True
    """compile the simulator, the policy and the losses; takes about half a minute the first time.
    Without, a run starts at once, and its steps take many times as long"""
    cuda_graphs: bool = True
    """capture the policy and the gradient steps in CUDA graphs (no effect on a CPU)"""
    run_dir: str | None = None
    """folder of the output, without a run (default: runs/<env_id>__<algorithm>__<seed>__<time>-<pid>, or --resume's)"""
    resume: str | None = None
    """checkpoint to continue; omitted flags keep its values"""
    checkpoint_every: int | None = None
    """steps between checkpoints (>= 1; default: a tenth of total_timesteps); the last state is always saved"""
    log_every: int | None = None
    """steps between log records (>= 1; default: total_timesteps / 200), rounded up to whole iterations"""
    eval_episodes: int = 20
    """episodes of an evaluation in Gymnasium and of --play (>= 0; 0: no evaluation). The score in vecsim after a
    training is of one episode of each environment"""
    eval_every: int | None = None
    """steps between evaluations in Gymnasium (>= 1; default: only a final one); training times exclude them"""
    play: str | None = None
    """checkpoint to play deterministically on the CPU instead of training; prints its score"""
    export: str | None = None
    """with --play: write policy, normaliser and action scale to this ONNX file"""
    capture_video: bool = False
    """with --play: film one episode in Gymnasium's environment, or in vecsim if Gymnasium has none, into the
    checkpoint's folder"""
    track: bool = False
    """log to Weights & Biases too (needs `pip install wandb`)"""
    profile: bool = False
    """profile iterations 4 to 6 of learning, or the last: print a table of the stages and write trace.json.gz"""
    env_kwargs: dict[str, bool | int | float | str] = dataclasses.field(default_factory=dict)
    """options of the environment, added to those in TASKS; for example ctrl_cost_weight 0.1 randomize.mass 0.8:1.2"""
    integrator: Literal["mjcf", "euler", "implicitfast", "rk4"] = "mjcf"
    """integrator of the training physics; mjcf: that of the MJCF, where MuJoCo's default is euler"""
    solver_iterations: int | None = None
    """Newton iterations of the contact solver (>= 1; default: the task's own, usually 4)"""
    reward_scale: float = 1.0
    """factor on the rewards that the learner sees (> 0; no effect if it normalises them); logs are unscaled"""


def parse_flags(words: list[str], default: Any, description: str | None) -> Any:
    """`default`, a dataclass of flags, changed by a command line. InputError with the parser's message on one line."""
    import tyro

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(type(default), args=words, default=default, description=description)
    except SystemExit as stop:
        if not stop.code:
            raise  # --help
        printable = re.sub(r"[^\x20-\x7e]+", " ", complaint.getvalue())
        raise InputError(" ".join(printable.split())) from None


def parse_args(
    argv: list[str], algorithm: str, default: Any, of_task: Callable[[Any], Any], description: str | None
) -> Any:
    """The flags of a trainer. Omitted flags have the task's values, or the checkpoint's with --resume and --play.

    default: the flags without a command line. of_task: the defaults of the task that the given flags name.
    """
    given = parse_flags([word for word in argv if word not in ("-h", "--help")], default, description)
    for name in "run_dir resume play export".split():
        if getattr(given, name) == "":
            raise InputError(f"{name} is empty; give a path or omit --{name.replace('_', '-')}")
    if given.resume and given.play:
        raise InputError("--resume continues training and --play plays; give one of them")
    path, flags = given.resume or given.play, type(default)
    default = of_task(given)
    if path:
        of_one_command = dict(resume=None, play=None, run_dir=None, export=None, capture_video=False, profile=False)
        of_one_command |= dict(track=False, eval_every=None) if given.play else {}
        default = flags(**load_checkpoint(path, algorithm, flags)["args"] | of_one_command)
    # The dict is empty here, because tyro would make each of its keys a flag.
    args = parse_flags(argv, dataclasses.replace(default, env_kwargs={}), description)
    if args.track and importlib.util.find_spec("wandb") is None:
        raise InputError("track needs Weights & Biases; run `pip install wandb` or omit --track")
    if (args.export or args.capture_video) and not args.play:
        raise InputError("--export and --capture-video need a checkpoint; give it with --play")
    return dataclasses.replace(args, env_kwargs=default.env_kwargs | args.env_kwargs)


def sizes_for_device(args: Any, scaled_flags: str, factor: int, most: int) -> Any:
    """The defaults of a task for the device of `args`: a CPU leaves them as they are, a GPU needs more robots.

    On a GPU num_envs and the flags in scaled_flags are `factor` times as large, with at most `most` environments. Steps
    of the run are among them, so iterations and gradient steps keep their number, and each sees more samples.
    """
    if pick_device(args.device).type == "cpu":
        return args
    factor = max(1, min(factor, most // args.num_envs))
    larger = {name: factor * getattr(args, name) for name in ("num_envs", *scaled_flags.split())}
    return dataclasses.replace(args, **larger)


def check_rules(args: Any, rules: Iterable[tuple[str, Callable[[Any], bool], str]]) -> None:
    """InputError for the first flag that breaks a rule: (names of flags, whether a value is legal, rule in words)."""
    shared = (
        ("num_envs total_timesteps", lambda x: x >= 1, ">= 1"),
        ("solver_iterations checkpoint_every log_every eval_every", lambda x: x is None or x >= 1, ">= 1"),
        ("seed", lambda x: 0 <= x < 2**63, "between 0 and 2**63 - 1"),
        ("eval_episodes", lambda x: x >= 0, ">= 0"),
        ("eval_episodes", lambda x: x >= 1 or not args.eval_every, ">= 1 with eval_every"),
        ("eval_every", lambda x: not x or gymnasium_id(args.env_id), f"omitted: Gymnasium has no {args.env_id}"),
        ("reward_scale", lambda x: 0 < x < math.inf, "> 0 and finite"),
    )
    for names, legal, rule in (*shared, *rules):
        for name in names.split():
            if not legal(getattr(args, name)):
                raise InputError(f"{name} = {getattr(args, name)} must be {rule}")


def run_command(parse_args: Callable, train: Callable, play: Callable) -> int:
    """The command of a trainer: train, or play with --play. Return the exit status; a user's mistake is one line.

    After a signal, `train` raises KeyboardInterrupt with what it has to say.
    """
    from tqdm import tqdm

    stop, rank = StopSignals(), int(os.environ.get("RANK", 0))
    stop.install()
    try:
        args = parse_args(sys.argv[1:])
        if args.play:
            stop.phase = "during play"
            play(args)
        else:
            train(args, stop=stop)
        if distributed.is_initialized():
            distributed.destroy_process_group()
    except (InputError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:  # a mistake, or no resources
        if rank > 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(10.0)  # the first process prints the same error, and torchrun then ends this one
        tqdm.write(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        if rank == 0:
            print(str(interrupt) or f"stopped {stop.phase}")
        return 128 + (stop.number or signal.SIGINT)  # as shells report a process that a signal ended
    return 0


class StopSignals:
    """Ctrl-C and SIGTERM. During training the first one is only noted: the loop saves a checkpoint, then stops.

    A second one, or one outside of training, raises KeyboardInterrupt. One that follows within a second is ignored,
    because `timeout` signals a process and then its group.
    """

    def __init__(self):
        self.number, self.time = 0, -math.inf  # of the last signal
        self.phase = "before training"  # then "during training ...", then "after training ..."

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

    def receive(self, number: int, _) -> None:
        if time.monotonic() - self.time < 1.0:
            return
        first = self.number == 0
        self.number, self.time = number, time.monotonic()
        if not (first and self.phase.startswith("during training")):
            raise KeyboardInterrupt

    def requested(self) -> bool:
        """Whether any process was signalled. All processes get the same answer."""
        number = torch.tensor(self.number)  # on the host, so that no process waits for its GPU
        if distributed.is_initialized():
            distributed.all_reduce(number, distributed.ReduceOp.MAX)
        self.number = int(number)
        return self.number > 0


def start_processes(device: torch.device) -> tuple[int, int]:
    """Rank and number of the processes that torchrun started (0 and 1 without it)."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1 and not distributed.is_initialized():
        distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return int(os.environ.get("RANK", 0)), world_size


@contextlib.contextmanager
def first_process_first():
    """The first process of each machine compiles alone. The others then find its results in the compiler's cache."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if distributed.is_initialized() and not first:
        distributed.barrier()
    yield
    if distributed.is_initialized() and first:
        distributed.barrier()


def sum_over_processes(x: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place."""
    if distributed.is_initialized():
        distributed.all_reduce(x)
    return x


def weighted_moments(x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count (), mean (k,) and variance (k,) of the valid rows of x (B, k), over all processes, in float64."""
    rows = torch.where(valid[:, None], x, 0.0).double()
    sums = sum_over_processes(torch.cat([valid.sum().double()[None], rows.sum(0), rows.square().sum(0)]))
    mean, mean_square = (sums[1:] / sums[0].clamp(min=1.0)).chunk(2)
    return sums[0], mean, (mean_square - mean.square()).clamp(min=0.0)


class RunningStatistics(torch.nn.Module):
    """Running mean and variance of vectors. Only `update` changes them. Checkpoints contain them: they are buffers."""

    def __init__(self, size: int, enabled: bool, limit: float = math.inf):
        super().__init__()
        self.enabled, self.limit = enabled, limit
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(size, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def update(self, x: Tensor, valid: Tensor) -> None:
        """Merge in the valid rows of x (B, size) of all processes (Chan et al. 1983)."""
        if not self.enabled:
            return
        count, mean, variance = weighted_moments(x, valid)
        total = self.count + count
        divisor = total.clamp(min=1.0)
        shift = mean - self.mean
        squares = self.variance * self.count + variance * count + shift.square() * self.count * count / divisor
        self.mean += shift * count / divisor
        self.variance.copy_(torch.where(total > 0, squares / divisor, self.variance))  # unchanged before any valid row
        self.count.copy_(total)

    def deviation(self) -> Tensor:
        return (self.variance + 1e-6).sqrt().float()

    def normalize(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return x
        return ((x - self.mean.float()) / self.deviation()).clamp(-self.limit, self.limit)

    def denormalize(self, x: Tensor) -> Tensor:
        return x * self.deviation() + self.mean.float() if self.enabled else x


def average_over_processes(tensors: list[Tensor]) -> None:
    """Replace each tensor by its mean over all processes, with one all-reduce of one flat vector."""
    if not distributed.is_initialized():
        return
    flat = torch.cat([x.flatten() for x in tensors])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for x, mean in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
        x.copy_(mean.view_as(x))


def stream_seed(seed: int, rank: int, stream: int) -> int:
    """Seed of one process and one use (stream). All are independent, even if users choose neighbouring seeds."""
    return int(np.random.SeedSequence((seed, rank, stream)).generate_state(1)[0])


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Write beside `path`, then rename: a failed write leaves the old file as it was."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path} cannot be written: {error.strerror}") from error


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_file(path, buffer.getbuffer())  # without another copy


def load_checkpoint(path: str, algorithm: str, flags: type) -> dict[str, Any]:
    """Read a checkpoint of a trainer onto the CPU. InputError if it is damaged, or not of this trainer.

    flags: the trainer's dataclass of flags, which must know all flags of the checkpoint.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not read the checksums
        if damaged:
            raise ValueError(f"the checksum of {damaged} in it is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types
        raise InputError(f"checkpoint {path} cannot be read: {str(error)[:100]}") from None
    known = {field.name for field in dataclasses.fields(flags)}
    ours = isinstance(checkpoint, dict) and checkpoint.get("algorithm") == algorithm
    if not ours or checkpoint["args"].keys() - known:
        script = Path(inspect.getfile(flags)).name
        raise InputError(f"checkpoint {path} was not written by this version of {script}")
    return checkpoint


def check_resumable(checkpoint: dict[str, Any], args: Any, fixed: str, world_size: int) -> None:
    """InputError for flags that do not fit the checkpoint's state. fixed: names of flags that must not change."""
    for name in f"{fixed} integrator solver_iterations".split():
        then, now = checkpoint["args"][name], getattr(args, name)
        if now != then:
            then = "the task's own" if then is None else then
            raise InputError(f"the checkpoint was trained with {name} = {then}, not {now}; omit that flag")
    done, processes = checkpoint["env_steps"], len(checkpoint["processes"])
    if args.total_timesteps <= done and "stage" not in checkpoint:  # a stage of the distillation has its own budget
        raise InputError(f"the checkpoint has {done:,} steps already; give a larger --total-timesteps")
    if processes != world_size:
        raise InputError(f"the checkpoint was written by {processes} processes, not {world_size}")


def load_moments(optimizer: torch.optim.Optimizer, saved: list[dict[str, Tensor]]) -> None:
    """Copy the saved moments of Adam into its own, which keep their addresses."""
    for moments, theirs in zip(optimizer.state.values(), saved, strict=True):
        for name, moment in moments.items():
            moment.copy_(theirs[name])


def pick_run_dir(args: Any, algorithm: str, stages: Sequence[str] = ()) -> Path:
    """The folder of this run; each of its stages has a folder inside.

    InputError if a folder that this run will write contains a run, unless this run resumes that one.
    """
    task = re.sub(r"[^\w.-]+", "-", args.env_id)  # the task may be a file: path/to/robot.py:Task
    run_dir = Path(f"runs/{task}__{algorithm}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    resumed = Path(args.resume).parent if args.resume else None
    if args.run_dir:
        run_dir = Path(args.run_dir)
    elif resumed:
        run_dir = resumed.parent if stages else resumed
    for folder in [run_dir / stage for stage in stages] or [run_dir]:
        own = resumed and folder.resolve() == resumed.resolve()
        if (folder / "metrics.jsonl").exists() and not own:
            raise InputError(f"{folder} contains a run; choose another --run-dir, or --resume its checkpoint.pt")
    return run_dir


class RunLog:
    """Progress bar, metrics.jsonl, TensorBoard and W&B of one run. Only the first process has one."""

    def __init__(self, run_dir: Path, args: Any, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        config = dataclasses.asdict(args)
        run_dir.mkdir(parents=True, exist_ok=True)
        write_file(run_dir / "config.json", json.dumps(config, indent=2).encode())
        self.metrics = run_dir / "metrics.jsonl"
        if self.metrics.exists():  # drop what will be logged again, and the half line that a killed run may leave
            lines = self.metrics.read_text().split("\n")[:-1]
            kept = [f"{line}\n" for line in lines if json.loads(line)["env_steps"] <= first_step]
            write_file(self.metrics, "".join(kept).encode())
        if args.track:
            import wandb

            wandb.init(project="onefile-gpu-rl", name=run_dir.name, config=config, sync_tensorboard=True)
        self.tensorboard = SummaryWriter(run_dir, purge_step=first_step + 1 if first_step else None)

    def start_bar(self, first_step: int, last_step: int) -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=last_step, initial=first_step, unit=" steps", unit_scale=True)

    def write(self, record: dict[str, Any]) -> None:
        with self.metrics.open("a") as file:
            file.write(json.dumps(record) + "\n")
        for name, value in record.items():
            if value is not None:
                self.tensorboard.add_scalar(name, value, record["env_steps"])
        episode_return = record["episode_return"]
        shown = "no whole episode" if episode_return is None else f"return {episode_return:.1f}"
        self.bar.set_postfix_str(shown, refresh=False)
        self.bar.update(record["env_steps"] - self.bar.n)

    def close(self) -> None:
        self.bar.close()
        self.tensorboard.close()


def make_environment(args: Any, make_env: Callable | None, num_envs: int, device: torch.device, seed: int) -> Any:
    """vecsim's environment with the flags of a trainer, or the user's own if make_env is not None."""
    options = dict(num_envs=num_envs, device=str(device), seed=seed) | args.env_kwargs
    if make_env is not None:
        return CompletedEnv(make_env(args.env_id, **options))
    options |= dict(compile=args.compile, integrator=args.integrator, iterations=args.solver_iterations)
    options |= dict(device=device)  # its name, "cuda:1", would be refused where several processes run
    return make(args.env_id, random_initial_ages=True, **options)


def whole_episodes(args: Any, make_env: Callable | None, num_envs: int) -> Any:
    """The environment of a training on the CPU, for evaluations: the first episodes are whole ones too."""
    try:
        cpp_compiler()
    except InputError:  # a policy from a GPU may be played where there is no compiler
        args = dataclasses.replace(args, compile=False)
    env = make_environment(args, make_env, num_envs, torch.device("cpu"), args.seed)
    env.random_initial_ages = False
    return env


class Run:
    """What surrounds the loop of a trainer: processes, seeds, environment, clock, log, evaluations and checkpoints.

    A trainer calls `start`, `restore` and `start_clock`. In its loop it asks whether something is `due` after an
    iteration, and then calls `write_record`, `save` if save_now, and `go_on`. It ends with `finish`. All processes call
    all methods; the first one alone has a log, and writes."""

    checkpoints = 10  # how many a run writes, if --checkpoint-every is omitted
    observes = "obs"  # what the policy sees: obs or critic_obs
    label = ""  # what is trained, for messages

    def __init__(self, args: Any, algorithm: str, make_env: Callable | None, stop: StopSignals | None):
        """algorithm: the name that the trainer's checkpoints have."""
        self.args, self.algorithm, self.stop, self.make_env = args, algorithm, stop or StopSignals(), make_env
        self.device = pick_device(args.device)
        self.rank, self.world_size = start_processes(self.device)
        if make_env is None:
            check_env_kwargs(args.env_kwargs)
        elif args.eval_every:
            raise InputError("eval_every scores in Gymnasium's environments; omit it with your own environment")
        self.checkpoint = load_checkpoint(args.resume, algorithm, type(args)) if args.resume else None
        done = self.checkpoint or dict(iteration=0, env_steps=0, train_seconds=0.0)
        self.iteration, self.env_steps, self.train_seconds = done["iteration"], done["env_steps"], done["train_seconds"]
        self.record: dict[str, Any] = {}  # the last line of the log
        self.score, self.log, self.profiler = None, None, None

    def start(self, envs: int, what: str, name: str | None = None, stages: Sequence[str] = ()) -> Any:
        """Print what the run does, seed PyTorch, and make the environment of this process with `envs` robots.

        name: of the run's folder and in eval.json; default the algorithm. stages: see `pick_run_dir`."""
        args, checkpoint, self.began = self.args, self.checkpoint, time.perf_counter()
        self.name = name or self.algorithm
        self.run_dir = pick_run_dir(args, self.name, stages)
        other_device = checkpoint is not None and checkpoint["device"] != self.device.type
        if self.rank == 0:
            print(f"{args.env_id} on {self.device} with {self.world_size} process(es), into {self.run_dir}\n{what}")
            if other_device:
                old, new = checkpoint["device"], self.device.type
                print(f"the checkpoint is from {old}; on {new} the random numbers are different")
            if args.compile:
                print(COMPILING, flush=True)
        if self.device.type == "cpu" and not args.compile:
            torch.set_num_threads(1)  # small operations get slower with more threads
        torch.manual_seed(args.seed)  # the initial weights, the same in every process
        torch.set_float32_matmul_precision("high")  # TF32 for the networks on a GPU; the physics calls no matmul
        self.seed = stream_seed(args.seed, self.env_steps, stream=2) if other_device else args.seed
        self.generator = torch.Generator(self.device).manual_seed(stream_seed(self.seed, self.rank, stream=0))
        self.env_seed = stream_seed(self.seed, self.rank, stream=1)
        self.env = make_environment(args, self.make_env, envs, self.device, self.env_seed)
        if not stages:
            self.open_log()
        return self.env

    def open_log(self) -> None:
        """Called before the compilation: a folder or a W&B that does not work is an error at once."""
        if self.rank == 0:
            self.log = RunLog(self.run_dir, self.args, self.env_steps)

    def restore(self) -> dict[str, Any]:
        """Put environment and random generator into the checkpoint's state; return all that this process saved."""
        if not self.checkpoint:
            return {}
        saved = self.checkpoint["processes"][self.rank]
        if saved["env"]:  # the user's own environment may have no state_dict; it then begins new episodes
            self.env.load_state_dict(saved["env"])
        if self.checkpoint["device"] == self.device.type:
            self.generator.set_state(saved["generator"])
        return saved

    def start_clock(self, steps_per_iteration: int, iterations: int, waiting: int = 0) -> range:
        """Everything is compiled. Returns the iterations that are left.

        waiting: how many of them come before the first gradient step, and are not profiled."""
        self.steps_per_iteration, self.iterations = steps_per_iteration, iterations
        self.logged_step, self.logged_seconds = self.env_steps, self.train_seconds
        self.compile_seconds = time.perf_counter() - self.began
        if self.log:
            self.log.start_bar(self.env_steps, iterations * steps_per_iteration)
            if self.args.profile:
                self.profiler = start_profiler(self.run_dir, iterations - self.iteration - waiting)
        self.clock, self.stop.phase = time.perf_counter(), f"during training{self.label}"
        return range(self.iteration, iterations)

    def due(self, iteration: int) -> bool:
        """Whether this iteration, which has ended, needs a record: a multiple of some interval was crossed."""
        args, before = self.args, iteration * self.steps_per_iteration
        self.iteration, self.env_steps = iteration + 1, before + self.steps_per_iteration
        self.stopping = self.stop.requested()
        self.last = self.stopping or self.iteration == self.iterations
        self.evaluate_now = crossed(args.eval_every, before, self.env_steps)
        every = args.checkpoint_every or args.total_timesteps / self.checkpoints
        self.save_now = self.last or crossed(every, before, self.env_steps)
        log_now = crossed(args.log_every or args.total_timesteps / 200, before, self.env_steps)
        return self.evaluate_now or self.save_now or log_now

    def write_record(self, agent: Any, means: dict[str, Tensor], needed: Sequence[str], **more: Any) -> None:
        """Log `means` () over what happened since the last record, statistics of the episodes, and `more`.

        A mean that is not finite becomes None; FloatingPointError if it is one of those `needed`."""
        numbers = torch.stack([*means.values()]).tolist()  # host sync
        episodes = merge_episode_statistics(self.env.pop_statistics(), self.device)  # host sync
        self.train_seconds += time.perf_counter() - self.clock
        speed = (self.env_steps - self.logged_step) / (self.train_seconds - self.logged_seconds)
        record = dict(env_steps=self.env_steps, wall_seconds=self.train_seconds, steps_per_second=speed) | episodes
        record |= {name: x if math.isfinite(x) else None for name, x in zip(means, numbers, strict=True)}
        if None in [record[name] for name in needed]:
            raise FloatingPointError(f"training{self.label} diverged by {self.env_steps:,} steps: {record}")
        record |= more
        if self.log and self.evaluate_now:
            self.score = score_in_gymnasium(agent, self.args, self.observes)
            record |= dict(gymnasium_return=self.score["mean"]) if self.score else {}
        if self.log:
            self.log.write(record)
        self.record, self.logged_step, self.logged_seconds = record, self.env_steps, self.train_seconds

    def save(self, of_process: dict[str, Any], **state: Any) -> None:
        """Write the checkpoint: `state`, and what each process adds to its environment and its random generator."""
        mine = dict(env=self.env.state_dict(), generator=self.generator.get_state()) | of_process
        processes = [mine] * self.world_size
        if distributed.is_initialized():  # of all processes in the order of their ranks, with tensors on the CPU
            distributed.all_gather_object(processes, tree_map_only(Tensor, lambda x: x.cpu(), mine))
        if self.log:
            args = tree_map_only(np.generic, lambda x: x.item(), dataclasses.asdict(self.args))
            state |= dict(algorithm=self.algorithm, env_id=self.args.env_id, args=args, device=self.device.type)
            state |= dict(iteration=self.iteration, env_steps=self.env_steps, train_seconds=self.train_seconds)
            save_checkpoint(self.run_dir / "checkpoint.pt", state | dict(processes=processes, versions=versions()))

    def go_on(self) -> None:
        """All is written: start the clock again, or close the log. After a signal: KeyboardInterrupt."""
        self.clock = time.perf_counter()
        if not self.last:
            return
        self.stop.phase = f"after training{self.label}"
        if self.profiler:
            self.profiler.stop()
        if self.log:
            self.log.close()
        if self.stopping:
            path = self.run_dir / "checkpoint.pt"
            raise KeyboardInterrupt(f"stopped after {self.env_steps:,} steps; continue with --resume {path}")

    def finish(self, agent: Any, title: str, **facts: Any) -> dict[str, Any]:
        """Plot the curve, score the policy in vecsim and in Gymnasium, write eval.json; return all that is known.

        title: of the plot. facts: more entries of eval.json. Only the first process scores."""
        if not self.log:
            return self.record
        args = self.args
        plot_curve(self.run_dir, f"{args.env_id}, {title}, seed {args.seed}")
        scores = dict(vecsim=None, gymnasium=None)
        if args.eval_episodes:
            print("scoring the policy without exploration noise", flush=True)
            self.env.random_initial_ages = False  # whole episodes
            scores["vecsim"] = evaluate(self.env, policy_of(agent), args.seed, self.observes)
            if not self.make_env:  # Gymnasium's environment of the same name is another one
                scored = self.score if self.evaluate_now else score_in_gymnasium(agent, args, self.observes)
                scores["gymnasium"] = scored
        evaluation = dict(env_id=args.env_id, algorithm=self.name, **facts, seed=args.seed, env_steps=self.env_steps)
        evaluation |= dict(train_seconds=self.train_seconds, compile_seconds=self.compile_seconds) | scores
        write_file(self.run_dir / "eval.json", json.dumps(evaluation, indent=2).encode())
        reason = f"no score, because Gymnasium has no {args.env_id}" if args.eval_episodes else "not evaluated"
        reason = "not scored, because the environment is your own" if self.make_env else reason
        for name, score in scores.items():
            print(f"{title}, {name}: {describe(score) if score else reason}")
        return self.record | evaluation


def score_in_gymnasium(agent: Any, args: Any, observes: str = "obs") -> dict[str, float] | None:
    """The score in Gymnasium's own environment, which is on the CPU; None if Gymnasium has no such task."""
    act = policy_of(copy.deepcopy(agent).cpu())  # host sync
    return evaluate_in_gymnasium(args.env_id, act, args.eval_episodes, args.seed, args.env_kwargs, observes)


def play_checkpoint(
    args: Any, checkpoint: dict[str, Any], agent: Any, export: Callable, make_env: Callable | None
) -> dict[str, float] | None:
    """Export, score and film the policy of a checkpoint, each on request; return the score.

    export(path, checkpoint) writes the ONNX file. The score of a task of vecsim comes from Gymnasium's own environment
    if it exists. All other scores come from the training's environment."""
    act, observes, score = policy_of(agent), checkpoint.get("observes", "obs"), None
    if Path(args.env_id).name != Path(checkpoint["env_id"]).name:  # a task's file may lie in another folder now
        raise InputError(f"the checkpoint is of {checkpoint['env_id']}, not of {args.env_id}; omit --env-id")
    if make_env and (args.export or args.capture_video):
        raise InputError("--export and --capture-video need a task of vecsim")
    if args.export:
        export(args.export, checkpoint)
        print(f"ONNX: {args.export}")
    if args.eval_episodes:
        print(f"playing {args.eval_episodes} episodes; it may take minutes", flush=True)
        score = None if make_env else score_in_gymnasium(agent, args, observes)
        if score is None:
            score = evaluate(whole_episodes(args, make_env, args.eval_episodes), act, args.seed, observes)
        name = ", ".join(filter(None, (args.env_id, checkpoint.get("stage"))))
        print(f"{name}, {checkpoint['env_steps']:,} steps of training: {describe(score)}")
    if args.capture_video:
        path = Path(args.play).with_name("play.mp4")
        print(f"video: {film(args, act, path, observes)}")
    return score


def plot_curve(run_dir: Path, title: str) -> None:
    """curve.png: returns of training episodes and scores in Gymnasium, over steps and over time."""
    from matplotlib.figure import Figure

    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    clocks = (("env_steps", "million environment steps", 1e6), ("wall_seconds", "minutes of training", 60.0))
    for axis, (clock, unit, scale) in zip(axes, clocks, strict=True):
        for metric, style in (("episode_return", "-"), ("gymnasium_return", "o")):
            shown = [record for record in records if record.get(metric) is not None]
            axis.plot([r[clock] / scale for r in shown], [r[metric] for r in shown], style, label=metric)
        axis.set_xlabel(unit)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(title)
    figure.savefig(run_dir / "curve.png", dpi=120)


def start_profiler(run_dir: Path, iterations: int) -> torch.profiler.profile:
    """Profile iterations 4 to 6; then print a table of the stages and write trace.json.gz.

    A run of fewer iterations is profiled from the fourth on, or only in its last one.
    """
    from tqdm import tqdm

    def report(profiler: torch.profiler.profile) -> None:
        tqdm.write(profiler.key_averages().table(sort_by="cpu_time_total", row_limit=80, max_name_column_width=40))
        profiler.export_chrome_trace(str(run_dir / "trace.json.gz"))

    before = min(3, max(0, iterations - 1))
    active = min(3, max(1, iterations - before))
    warmup = min(1, before)
    schedule = torch.profiler.schedule(wait=before - warmup, warmup=warmup, active=active, repeat=1)
    profiler = torch.profiler.profile(schedule=schedule, on_trace_ready=report)
    profiler.start()
    return profiler


def crossed(every: float | None, before: int, after: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]; False if `every` is None."""
    return every is not None and after // every > before // every


def make_optimizer(module: torch.nn.Module, learning_rate: Tensor) -> torch.optim.Adam:
    """Adam for CUDA graphs: the learning rate is a tensor, and the moments exist from the start, at fixed addresses."""
    optimizer = torch.optim.Adam(module.parameters(), lr=learning_rate, fused=True, capturable=learning_rate.is_cuda)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # with zero gradients this creates the moments and changes no weight
    for moments in optimizer.state.values():
        moments["step"].zero_()
    return optimizer


def prepare(
    functions: Sequence[Callable],
    examples: Sequence[tuple[Tensor, ...]],
    agent: torch.nn.Module,
    optimizers: Iterable[torch.optim.Optimizer],
    cuda_graphs: bool,
) -> list[Callable]:
    """Make the functions of a trainer ready before the clock of the training starts.

    Each runs on its example, which compiles it. On a GPU with cuda_graphs it is captured first. They run in their
    order, so a function may read what an earlier one leaves. They may change agent and optimizers, which are restored
    afterwards, and gradients, which are not.
    """
    moments = [x for optimizer in optimizers for state in optimizer.state.values() for x in state.values()]
    state, prepared = [*agent.state_dict().values(), *moments], []
    before, captures = [x.clone() for x in state], cuda_graphs and on_gpu(state[0].device)
    for function, example in zip(functions, examples, strict=True):
        prepared.append(capture(function, example) if captures else function)
        prepared[-1](*example)  # a capture only records; this makes the gradients that the next function reads
    for x, saved in zip(state, before, strict=True):
        x.copy_(saved)
    return prepared


def capture(function: Callable, inputs: tuple[Tensor, ...], generators: Sequence[torch.Generator] = ()) -> Callable:
    """Capture `function` in a CUDA graph; call the result like the function. Its outputs live until the next call.

    The function must not copy from the device to the host, and draws random numbers only from `generators`. It runs
    three times as a warm-up before the capture, which compiles it; the caller restores what these calls change.
    """
    static_inputs = tuple(torch.clone(x, memory_format=torch.contiguous_format) for x in inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function(*static_inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        outputs = function(*static_inputs)

    def replay(*inputs: Tensor) -> Any:
        for static, x in zip(static_inputs, inputs, strict=True):
            static.copy_(x)
        graph.replay()
        return outputs

    return replay


if __name__ == "__main__":
    sys.modules["vecsim_torch"] = sys.modules["__main__"]  # for files that import vecsim_torch
    try:
        from benchmarks.simulator import main  # speed and error beside MuJoCo C, --check
    except ModuleNotFoundError:
        sys.exit("error: the commands of vecsim_torch.py are in the folder benchmarks/ of its repository")
    main()
