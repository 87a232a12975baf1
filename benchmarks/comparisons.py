"""What is compared with what: the contenders and settings of the modes sim, learner and train."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial

from benchmarks import machine
from benchmarks.referee import Comparison, Contender
from benchmarks.sim import states

GYMNASIUM_TASKS = "InvertedPendulum-v5 Hopper-v5 Walker2d-v5 HalfCheetah-v5 Ant-v5 Humanoid-v5".split()


def units(options: Namespace) -> int:
    """Number of GPUs, or of CPU cores in use."""
    return len(machine.gpus()) if options.device == "cuda" else machine.cpu_cores(options.cores)


def place(options: Namespace) -> str:
    """The device and how many of them, for a file's name."""
    return f"{options.device}{units(options)}"


def case(options: Namespace, *words: str) -> str:
    some = "-and-".join(re.sub(r"\W+", "-", name) for name in options.contenders)
    return "-".join(filter(None, [*words, some, options.quick and "quick"]))


def chosen(plan: Iterable[Comparison], options: Namespace) -> list[Comparison]:
    """The comparisons with the contenders of --contenders alone. SystemExit for a name that none of them has."""
    plan, names = list(plan), set(options.contenders)
    known = {contender.name: None for comparison in plan for contender in comparison.contenders}
    if names - known.keys():
        raise SystemExit(f"error: unknown contenders {sorted(names - known.keys())}; choose from {list(known)}")
    if not names:
        return plan
    kept = [[contender for contender in x.contenders if contender.name in names] for x in plan]
    return [replace(comparison, contenders=some) for comparison, some in zip(plan, kept) if some]


def simulators(options: Namespace) -> list[Contender]:
    contenders = [
        Contender("vecsim", "sim/vecsim.py"),
        Contender("MuJoCo C", "sim/mujoco_c.py"),
        Contender("MJX", "sim/mjx.py"),
        Contender("Brax, generalized", "sim/brax.py"),
        Contender("MuJoCo Warp", "sim/mujoco_warp.py"),
        Contender("mujoco-torch, eager", "sim/mujoco_torch.py", "eager"),
    ]
    if options.device == "cpu" and units(options) > 1:  # what the further cores bring
        contenders.insert(1, Contender("vecsim, one thread", "sim/vecsim.py", "1"))
        contenders.insert(3, Contender("MuJoCo C, one thread", "sim/mujoco_c.py", "1"))
    slow = Contender("mujoco-torch, compiled", "sim/mujoco_torch.py", "compiled")
    return contenders if options.quick else [*contenders, slow]


def sim(options: Namespace) -> Iterator[Comparison]:
    """Physics steps/s and error of one step; with --num-envs vecsim alone, once for each number."""
    scaling = bool(options.num_envs)
    default = 8192 if options.device == "cuda" else 1024
    for env_id in options.env_id or (["Ant-v5"] if options.quick or scaling else GYMNASIUM_TASKS):
        for num_envs in options.num_envs or [default]:
            many = f"{num_envs}-envs" if scaling else ""
            alone = [Contender(f"{num_envs} environments", "sim/vecsim.py")]
            yield Comparison(
                mode="scaling" if scaling else "sim",
                case=case(options, env_id, place(options), many),
                unit="physics steps/s",
                settings=states.settings(env_id, options.device, num_envs),
                contenders=alone if scaling else simulators(options),
                prepare=partial(states.save, env_id, num_envs),
            )


def learner(options: Namespace) -> Iterator[Comparison]:
    """PPO, without and with a GRU: samples/s of the update alone. SAC: updates/s of the trainer without a simulator."""
    device, sizes, hidden = dict(device=options.device), dict(obs_size=27, action_size=8), dict(hidden=[256, 128, 64])
    ppo = device | dict(num_envs=2048, num_steps=32, epochs=5, minibatches=4) | sizes | hidden
    contenders = [
        Contender("ours, compiled", "learner/ours.py", "compiled"),
        Contender("ours, eager", "learner/ours.py", "eager"),
        Contender("rsl_rl, compiled", "learner/rsl_rl.py", "compiled"),
        Contender("rsl_rl, eager", "learner/rsl_rl.py", "eager"),
        Contender("skrl", "learner/skrl.py"),
        Contender("rl_games", "learner/rl_games.py"),
        Contender("Brax", "learner/brax.py"),
        Contender("ours, bf16", "learner/ours.py", "bf16"),
        Contender("rsl_rl, bf16", "learner/rsl_rl.py", "bf16"),
    ]
    yield Comparison("learner", case(options, place(options)), "samples/s", ppo, contenders)
    gru = ppo | dict(num_envs=1024, memory_width=128)
    contenders = [
        Contender("ours with a GRU, compiled", "learner/ours.py", "compiled"),
        Contender("ours with a GRU, eager", "learner/ours.py", "eager"),
        Contender("skrl with a GRU", "learner/skrl.py"),
        Contender("rl_games with a GRU", "learner/rl_games.py"),
    ]
    yield Comparison("learner", case(options, "gru", place(options)), "samples/s", gru, contenders)
    sac = dict(num_envs=128, batch_size=4096, updates_per_step=8, first_steps=40, replay_steps=2000)
    sac = device | sac | sizes | dict(hidden=[256, 256])
    contenders = [
        Contender("ours, compiled", "learner/sac_ours.py", "compiled"),
        Contender("ours, eager", "learner/sac_ours.py", "eager"),
        Contender("skrl", "learner/sac_skrl.py"),
    ]
    yield Comparison("learner", case(options, "sac", place(options)), "updates/s", sac, contenders)


def train_settings(env_id: str, integrator: str, device: str) -> dict:
    """What the contenders of one `train` comparison share.

    env_kwargs are the task's options in ppo_gpu_torch.py's defaults, so that all see the same observation; `ours` is
    the sizes of the learners on vecsim."""
    import ppo_gpu_torch
    import vecsim_torch

    args = ppo_gpu_torch.parse_args(["--env-id", env_id, "--device", device])
    names = "num_envs num_steps update_epochs num_minibatches".split()
    ours = {name: getattr(args, name) for name in names} | dict(hidden=list(args.actor_hidden))
    ours |= dict(solver_iterations=vecsim_torch.find_task(env_id).solver_iterations)
    shared = dict(env_id=env_id, device=device, num_envs=8, integrator=integrator, env_kwargs=args.env_kwargs)
    return shared | dict(ours=ours)


def train(options: Namespace) -> Iterator[Comparison]:
    """Environment steps/s of whole trainings, under each integrator.

    HalfCheetah's MJCF says Euler, Ant's says RK4."""
    count = units(options)
    words = f", {count} processes" if count > 1 else ""
    processes = [Contender(f"ours{words}", "train/ours.py", str(count))] if count > 1 else []
    euler = [
        Contender("ours", "train/ours.py", "1"),
        *processes,
        Contender(f"ours{words}, networks 64-64", "train/ours.py", f"{count},64,64"),
        Contender("rsl_rl on vecsim", "train/rsl_rl.py", "vecsim"),
        Contender("skrl on vecsim", "train/skrl.py", "vecsim"),
        Contender("rl_games on vecsim", "train/rl_games.py", "vecsim"),
        Contender("SB3, DummyVecEnv", "train/sb3.py", "dummy"),
        Contender("SB3, SubprocVecEnv", "train/sb3.py", "subproc"),
        Contender("CleanRL-style, SyncVectorEnv", "train/cleanrl.py", "sync"),
        Contender("CleanRL-style, AsyncVectorEnv", "train/cleanrl.py", "async"),
        Contender("skrl", "train/skrl.py"),
        Contender("rsl_rl", "train/rsl_rl.py"),
        Contender("rl_games", "train/rl_games.py"),
        Contender("Brax, its own model, generalized", "train/brax.py", "generalized"),
        Contender("Brax, its own model, spring", "train/brax.py", "spring"),
    ]
    fewer = ("ours", "SB3, DummyVecEnv", "CleanRL-style, SyncVectorEnv", "skrl", "rsl_rl")
    rk4 = [contender for contender in euler if contender.name in fewer]
    for env_id in options.env_id or (["Ant-v5"] if options.quick else ["Ant-v5", "HalfCheetah-v5"]):
        for integrator, contenders in (("euler", euler), ("rk4", rk4)):
            if (env_id, integrator) != ("HalfCheetah-v5", "rk4"):
                yield Comparison(
                    mode="train",
                    case=case(options, env_id, integrator, place(options)),
                    unit="environment steps/s",
                    settings=train_settings(env_id, integrator, options.device),
                    contenders=contenders,
                )
