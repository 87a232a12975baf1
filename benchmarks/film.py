"""README's moving picture: the newest PPO run of each task that `runs ppo` left, filmed in Gymnasium's environments.

Writes results/robots.gif, and robots.json beside it: which runs, command, commit and versions. With `--film Ant-v5` it
films that task alone, into Ant-v5.gif."""

from __future__ import annotations

import os
from argparse import Namespace
from importlib import metadata
from pathlib import Path

if "DISPLAY" not in os.environ:
    os.environ.setdefault("MUJOCO_GL", "egl")
import gymnasium
import numpy as np
import torch
from PIL import Image, ImageDraw

import ppo_gpu_torch
from benchmarks import environments, machine
from benchmarks.referee import save, say

TASKS = ("Hopper-v5", "HalfCheetah-v5", "Walker2d-v5", "Ant-v5", "Humanoid-v5")
SIZE, FRAMES, PER_SECOND, SKIPPED_SECONDS = 200, 60, 15, 2.0


def frames_of(path: Path) -> list[Image.Image]:
    """Four seconds of one episode of a checkpoint's policy, from the second second on, with the task's name."""
    checkpoint = ppo_gpu_torch.load_checkpoint(str(path))
    act, args = ppo_gpu_torch.load_policy(checkpoint), checkpoint["args"]
    view = dict(render_mode="rgb_array", camera_name="track", width=2 * SIZE, height=2 * SIZE)
    env = gymnasium.make(args["env_id"], **view, **args["env_kwargs"])
    (obs, _), images, step, started = env.reset(seed=args["seed"]), [], 0, True
    while len(images) < FRAMES:
        if step * env.unwrapped.dt >= SKIPPED_SECONDS + len(images) / PER_SECOND:
            image = Image.fromarray(env.render()).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
            ImageDraw.Draw(image).text((6, 4), args["env_id"], fill="white")
            images.append(image)
        action = act(torch.as_tensor(obs, dtype=torch.float32)[None], torch.tensor([started]))[0]
        obs, _, terminated, truncated, _ = env.step(np.asarray(action))
        step, started = step + 1, terminated or truncated
        if started:
            obs, _ = env.reset()
    env.close()
    return images


def draw(options: Namespace) -> None:
    runs, strips, filmed = environments.CACHE / "runs", [], {}
    for task in options.film or TASKS:
        found = sorted(runs.glob(f"*/ppo/{task}-seed*/checkpoint.pt"), key=lambda file: file.stat().st_mtime)
        if not found:
            say(f"film: {task} is left out: ./benchmark.sh runs ppo --env-id {task} trains it")
            continue
        strips.append(frames_of(found[-1]))
        filmed[task] = found[-1].parent.relative_to(runs).as_posix()  # commit of its training, then its name
    if not strips:
        raise SystemExit(f"error: no trained robot under {runs}; ./benchmark.sh runs ppo trains them")
    film = []
    for moment in zip(*strips, strict=True):
        frame = Image.new("RGB", (SIZE * len(moment), SIZE))
        for column, image in enumerate(moment):
            frame.paste(image, (SIZE * column, 0))
        film.append(frame.quantize(64, dither=Image.Dither.NONE))
    path = options.results / f"{'-'.join(options.film) or 'robots'}.gif"
    timing = dict(duration=1000 // PER_SECOND, loop=0, optimize=True)
    film[0].save(path, save_all=True, append_images=film[1:], **timing)
    versions = {name: metadata.version(name) for name in ("torch", "mujoco", "gymnasium", "pillow")}
    about = dict(command=options.command, hardware=machine.hardware("cpu"), commit=machine.commit())
    save(path.with_suffix(".json"), about | dict(runs=filmed, versions=versions))
    print(path)
