#!/usr/bin/env bash
# The comparisons of README, measured again: this project beside what a user would pick instead.
#
# Three kinds of README's figures come from elsewhere: errors against MuJoCo C from `python -m pytest --figures FILE`,
# the speed beside MuJoCo C alone from `python vecsim_torch.py --json FILE`, the panels from `python eval_panel.py`.
#
#     ./benchmark.sh sim        physics steps/s and one-step error: vecsim, MuJoCo C, MJX, Brax, mujoco-torch, MuJoCo Warp
#     ./benchmark.sh learner    samples/s of the PPO update alone: ours, rsl_rl, skrl, rl_games, Brax; SAC updates/s against skrl
#     ./benchmark.sh train      environment steps/s of whole trainings: ours, SB3, CleanRL-style PPO, skrl, rsl_rl, rl_games, Brax
#     ./benchmark.sh scores     time to a score in Gymnasium's own environments (hours)
#     ./benchmark.sh peers      minutes to a score in Gymnasium's environments: our PPO and SAC, SB3's, CleanRL-style PPO (about two hours)
#     ./benchmark.sh walk       a quadruped trained here, judged here and in MuJoCo C (about half an hour on one core)
#     ./benchmark.sh distill    teacher, student, fine-tuned student and blind baseline under perturbations (hours)
#     ./benchmark.sh seeds      ppo_mjx_jax.py: eight agents in one program beside one agent
#     ./benchmark.sh ablate     sac_gpu_torch.py: textbook SAC, trick upon trick, and all, on the same budget
#     ./benchmark.sh sizes      ppo_gpu_torch.py: environments, horizon, minibatches and networks, on the same budget (half an hour)
#     ./benchmark.sh scaling    vecsim over the number of environments; training over the number of processes
#     ./benchmark.sh cost       steps per joule and per dollar, and memory, of the trainings that `train` measured
#     ./benchmark.sh profile    where an iteration's time goes: parts of it, by the trainers' own --profile
#     ./benchmark.sh film       README's moving picture: the trained robots of `scores` in Gymnasium's own environments
#     ./benchmark.sh plot       redraws the pictures in results/
#     ./benchmark.sh table      prints README's tables from results/
#     ./benchmark.sh programs DIR    writes the Python programs below out as files, to read or to lint
#
# How a comparison is made. Every contender is one small Python program of this file, in the virtual environment of its peer.
# It sets itself up (imports, compilation, first pass: its start, timed apart) and then waits. It starts twice: first
# with empty compiler caches, then with what the first start left in them, and measures. (`scaling` starts each
# contender once, with the user's caches.) When all are ready, the referee lets one after the other measure one
# window: A B C A B C A B C, on the same cores, one at a time. A row is the median, lowest and highest of its windows.
# A finished round is saved, so an interrupted run goes on at the next round; a finished comparison is not run again
# without --force. A peer that does not install or start costs one line, no more.
#
# Peers live in ${XDG_CACHE_HOME:-~/.cache}/onefile-gpu-rl-bench, each in its own virtual environment, built when first
# needed. They take torch by pip as it is configured, which on Linux brings CUDA: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
# lets it find the CPU build. The interpreter of this project is $PYTHON (default: python). Needs bash 4.3 or newer, and GNU coreutils.
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: ./benchmark.sh MODE [options]      MODE: sim learner train scores peers walk distill seeds ablate sizes scaling cost profile film plot table programs

  --env-id LIST        tasks, separated by commas (default: those of README)
  --device NAME        cpu or cuda (default: cuda where there is a GPU)
  --cores LIST         CPU cores to stay on, as taskset writes them: 0 or 0,1 or 0-7 (default: all)
  --num-envs N         environments of each simulator in `sim` (default 1024 on a CPU, 8192 on a GPU)
  --solver-iterations N Newton iterations of every simulator in `sim` (default 4)
  --max-envs N         largest number of environments in `scaling` (default 16384 on a CPU, 131072 on a GPU)
  --max-processes N    largest number of processes in `scaling` (default: the cores, or the GPUs)
  --total-timesteps N  environment steps of each run in `scores`, `walk`, `distill`, `seeds`, `ablate` and `sizes` (default: that of the mode's rows,
                       else the trainer's, for the task)
  --set NAME           of `scores` only the trainings of this set: ppo, sac (PPO beside it over environment steps), candidates (for SAC's default), or
                       mjx (JAX and PyTorch on the same batch)
  --shared             say in the rows of `scores` and `ablate` that other work shared the cores: their times then count for nothing
  --repeats N          windows of each contender, at least 3 (default 5; with --quick 3)
  --seconds N          length of a window (default 10; with --quick 3)
  --patience N         seconds that a contender may take to get ready (default 1500; with --quick 300)
  --dollars-per-hour X price of this machine, for `cost`
  --results DIR        where rows and pictures go (default: results)
  --quick              one task, short windows: a first look; its rows are kept apart
  --dry-run            say what would run, how long it may take and what memory it may need; run nothing
  --force              measure again what is finished

Peers take torch by pip as it is configured; for its CPU build set PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
USAGE
}

# ----------------------------------------------------------------------------------------------------------------------
# Options
# ----------------------------------------------------------------------------------------------------------------------

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache="${XDG_CACHE_HOME:-$HOME/.cache}/onefile-gpu-rl-bench"
command_line="./benchmark.sh $*"
project_python=$(command -v "${PYTHON:-python}" || echo "${PYTHON:-python}") # by its whole path: programs run in other folders
[[ "$project_python" != */* || "$project_python" = /* ]] || project_python=$PWD/$project_python

say() { printf '%s\n' "$*" >&2; }

refuse() { # bad input: one line, status 2
  say "error: $*"
  exit 2
}

give_up() { # anything else that stops a run: one line, status 1
  say "error: $*"
  exit 1
}

mode=${1:-}
[ $# -gt 0 ] && shift
case "$mode" in
  -h | --help) usage && exit 0 ;;
  sim | learner | train | scores | peers | walk | distill | seeds | ablate | sizes | scaling | cost | profile | film | plot | table | programs) ;;
  *) refuse "unknown mode '$mode'; choose one of sim learner train scores peers walk distill seeds ablate sizes scaling cost profile film plot table programs" ;;
esac

gymnasium_tasks="InvertedPendulum-v5 Hopper-v5 Walker2d-v5 HalfCheetah-v5 Ant-v5 Humanoid-v5"
env_ids="" device="" cores="" num_envs="" solver_iterations=4 max_envs="" max_processes="" total_timesteps="" set="" repeats="" seconds=""
patience="" dollars_per_hour="" results="$root/results" quick="" dry_run="" force="" shared="" programs_folder=""
while [ $# -gt 0 ]; do
  case "$1" in
    --quick) quick=1 ;;
    --dry-run) dry_run=1 ;;
    --force) force=1 ;;
    --shared) shared=1 ;;
    -h | --help) usage && exit 0 ;;
    --env-id | --device | --cores | --num-envs | --solver-iterations | --max-envs | --max-processes | --total-timesteps | \
      --set | --repeats | --seconds | --patience | --dollars-per-hour | --results)
      [ $# -ge 2 ] || refuse "$1 needs a value"
      name=${1#--}
      name=${name//-/_}
      [[ "$name" != env_id || "$2" =~ [^,\ ] ]] || refuse "--env-id must name a task"
      if [ "$name" = env_id ]; then env_ids=${2//,/ }; else printf -v "$name" %s "$2"; fi
      shift
      ;;
    *)
      [ "$mode" = programs ] && [ -z "$programs_folder" ] || refuse "unknown option '$1'; see ./benchmark.sh --help"
      programs_folder=$1
      ;;
  esac
  shift
done
for name in num_envs solver_iterations max_envs max_processes total_timesteps repeats seconds patience; do
  [[ -z "${!name}" || "${!name}" =~ ^[1-9][0-9]*$ ]] || refuse "--${name//_/-} must be a whole number of at least 1, not ${!name}"
done
[[ -z "$dollars_per_hour" || "$dollars_per_hour" =~ ^[0-9]*\.?[0-9]+$ ]] || refuse "--dollars-per-hour must be a number, not $dollars_per_hour"
[[ ! "$dollars_per_hour" =~ ^[0.]+$ ]] || refuse "--dollars-per-hour must be more than 0"
[[ "$set" =~ ^(ppo|sac|candidates|mjx)?$ ]] || refuse "--set must be ppo, sac, candidates or mjx, not $set"
[ -n "$results" ] || refuse "--results must name a folder"
[ ! -e "$results" ] || [ -d "$results" ] || refuse "--results must name a folder, and $results is a file"
for env_id in $env_ids; do
  tasks=$gymnasium_tasks
  [[ "$mode" =~ ^(sim|train|scaling|cost)$ ]] || tasks+=" Quadruped-Flat Quadruped-Rough"
  [[ " $tasks " = *" $env_id "* ]] || refuse "$mode knows no task $env_id; choose among $tasks"
done
[[ "$mode" != ablate && "$mode" != sizes || "$env_ids" != *" "* ]] || refuse "$mode takes one task, not $env_ids"
[[ -z "$quick" || "$mode" =~ ^(sim|learner|train|scaling|cost)$ ]] || refuse "--quick does nothing in $mode; it is for sim, learner, train, scaling and cost"
[[ "$device" =~ ^(cpu|cuda)?$ ]] || refuse "--device must be cpu or cuda, not $device"
: "${repeats:=$([ -n "$quick" ] && echo 3 || echo 5)}"
: "${seconds:=$([ -n "$quick" ] && echo 3 || echo 10)}"
: "${patience:=$([ -n "$quick" ] && echo 300 || echo 1500)}"
[ "$repeats" -ge 3 ] || refuse "--repeats must be at least 3, not $repeats: a median of fewer says nothing"

# ----------------------------------------------------------------------------------------------------------------------
# Peers: one virtual environment each, built when first needed
# ----------------------------------------------------------------------------------------------------------------------

packages_of() { # PEER -> what pip installs, one call per line; torch goes first, so that no peer chooses its build
  local gymnasium='gymnasium[mujoco]==1.4.0 mujoco==4.0.0' cuda_jax=
  [ "$device" != cuda ] || cuda_jax=' jax[cuda12]' # else pip takes the build for CPUs
  case "$1" in
    sb3) printf '%s\n' torch==2.13.0 "stable-baselines3==2.9.2 $gymnasium" ;;
    skrl) printf '%s\n' torch==2.13.0 "skrl==2.1.1 $gymnasium" ;;
    rsl_rl) printf '%s\n' torch==2.13.0 "rsl-rl-lib==5.5.1 $gymnasium" ;;
    rl_games) printf '%s\n' torch==2.13.0 "rl-games==1.6.5 $gymnasium" ;;
    brax) printf '%s\n' "brax==0.14.2 mujoco==4.0.0$cuda_jax" ;;
    mjx) printf '%s\n' "mujoco-mjx==3.17.0 mujoco==4.0.0$cuda_jax" ;; # on a CPU this project's own environment has it
    mujoco_torch) printf '%s\n' torch==2.13.0 "mujoco-torch==0.2.0 mujoco==3.6.0" ;; # it does not know MuJoCo 4
    mujoco_warp) printf '%s\n' "mujoco-warp==4.0.0 mujoco==4.0.0" ;;
  esac
}

interpreter_of() { # PEER -> its Python; `project` is this project's own
  if [ "$1" = project ]; then echo "$project_python"; else echo "$cache/$1/bin/python"; fi
}

is_installed() { # PEER; the marker is written last and holds the list of packages: half an environment, or an older list, is built again
  [ "$1" = project ] || [ "$(cat "$cache/$1/.complete" 2>/dev/null)" = "$(packages_of "$1")" ]
}

prepare_peer() { # PEER: builds its environment unless it stands; on failure prints the reason in one line
  local peer=$1 folder=$cache/$1 line
  is_installed "$peer" && return 0
  say "installing $peer: $(packages_of "$peer" | tr '\n' ' ')"
  mkdir -p "$cache" && rm -rf "$folder" && "$project_python" -m venv "$folder" >"$cache/$peer.log" 2>&1 || {
    one_line "no virtual environment" "$cache/$peer.log"
    return 1
  }
  while read -r line; do
    # shellcheck disable=SC2086  # a line is a list of requirements
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check $line >"$cache/$peer.log" 2>&1 || {
      one_line "does not install" "$cache/$peer.log"
      return 1
    }
  done < <(packages_of "$peer")
  packages_of "$peer" >"$folder/.complete"
}

one_line() { # TEXT LOG -> the text and the last error of a log, in one line
  local line
  line=$(grep -iE 'error|no space' "$2" 2>/dev/null | tail -n 1 | cut -c1-200) || true
  # A full disk takes no log either.
  [ -n "$line" ] || line="no message; $(df -Ph "$cache" 2>/dev/null | awk 'END { print $4 }') free on the disk of $cache"
  printf '%s: %s (log: %s)\n' "$1" "$line" "$2"
}

# ----------------------------------------------------------------------------------------------------------------------
# The meter: the head of every contender's program
# ----------------------------------------------------------------------------------------------------------------------

program_meter() {
  cat <<'PYTHON'
"""The meter: a contender works in an endless loop and calls `meter.tick(work)` after each piece of it.

The first piece is the warm-up. After it the contender says that it is ready, and from then on measures one window each time
the referee sends a line: it works until the window is long enough, reports work and seconds, and waits again."""

import json
import os
import resource
import sys
import time
from importlib import metadata
from pathlib import Path

sys.path[:0] = [os.environ["BENCHMARK_ROOT"]]
replies = os.fdopen(os.dup(1), "w")  # what libraries print on standard output goes to the log instead
os.dup2(2, 1)
settings = json.loads(os.environ["BENCHMARK_SETTINGS"])
variant = os.environ["BENCHMARK_VARIANT"]
window = float(os.environ["BENCHMARK_SECONDS"])
threads = int(os.environ["OMP_NUM_THREADS"])
device = settings.get("device", "cpu")


def versions():
    packages = "torch jax jaxlib mujoco mujoco-mjx mujoco-warp warp-lang mujoco-torch brax gymnasium numpy"
    packages += " stable-baselines3 skrl rsl-rl-lib rl-games"
    found = {"python": sys.version.split()[0]}
    for name in packages.split():
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return found


def synchronize():
    """Wait for the GPU, so that a clock read means something."""
    if "torch" in sys.modules and device == "cuda":
        sys.modules["torch"].cuda.synchronize()


def session_memory_kib():
    """The peaks of all live processes of this contender, which is a session of its own, summed: 0 where there is no /proc."""
    total, session = 0, os.getsid(0)
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            if os.getsid(int(status.parent.name)) == session:
                total += sum(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        except (OSError, ValueError):  # it has ended meanwhile
            continue
    return total


def peak_memory_mib():
    """Resident memory: the sum of the peaks of all processes of this contender, or the largest of one that has ended, if that is more;
    pages that processes share count once in each. And PyTorch's largest on the GPU."""
    who = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    memory = {"host": max(session_memory_kib(), *(resource.getrusage(x).ru_maxrss for x in who)) / 1024}
    if "torch" in sys.modules and device == "cuda":
        memory["gpu"] = sys.modules["torch"].cuda.max_memory_allocated() / 2**20
    return memory


class Meter:
    def __init__(self):
        self.facts = {}  # what else a row should hold: errors, sizes
        self.started, self.clock = time.perf_counter(), None

    def ready(self, act):
        """Only `peers` scores the policy."""

    def tick(self, work, seconds=None):
        """`seconds`: what the work took, where the contender knows better than this clock."""
        synchronize()
        if self.clock is None:
            now = time.perf_counter()
            self.report(ready=True, warmup_seconds=now - self.started, versions=versions(), facts=self.facts)
        else:
            self.work += work
            self.seconds = time.perf_counter() - self.clock if seconds is None else self.seconds + seconds
            if self.seconds < window:
                return
            self.report(work=self.work, seconds=self.seconds, peak_memory_mib=peak_memory_mib())
        if not sys.stdin.readline():
            os._exit(0)  # the referee is done: no trainer's clean-up is needed
        self.work, self.seconds, self.clock = 0, 0.0, time.perf_counter()

    def report(self, **reply):
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


meter = Meter()
PYTHON
}

# ----------------------------------------------------------------------------------------------------------------------
# sim: one model, the same integrator, timestep and solver iterations in every engine
#
# Random actions, held for one environment step; every robot starts anew after 200 environment steps, standing or lying: vecsim is told not
# to end the episode of one that fell (InvertedPendulum has no such option). All start from the same states of MuJoCo C under random actions,
# 1 to 200 environment steps into an episode, 512 of them, repeated: even a window of few steps has the contacts of a whole episode.
# vecsim is timed with observations, rewards and resets inside, its robots of random ages; the others step physics alone, in their favour.
# The error is that of one step from states of MuJoCo C with contacts: |qvel - qvel of MuJoCo C| / (timestep * (1 + max |qacc|)),
# the largest over the degrees of freedom, against a solver of MuJoCo C that runs to convergence.
# ----------------------------------------------------------------------------------------------------------------------

program_states() {
  cat <<'PYTHON'
"""Prints the settings of a `sim` comparison, and saves start states, from the middle of episodes, and test states of one task, by MuJoCo C."""

import copy
import json
import sys
from pathlib import Path

import gymnasium
import mujoco
import numpy as np

env_id, device, num_envs, iterations, path = sys.argv[1:]
env = gymnasium.make(env_id).unwrapped
xml = Path(env.fullpath)
model = mujoco.MjModel.from_xml_path(str(xml))
model.opt.integrator = mujoco.mjtIntegrator.mjINT_EULER
model.opt.solver = mujoco.mjtSolver.mjSOL_NEWTON
model.opt.jacobian = mujoco.mjtJacobian.mjJAC_DENSE  # see `converged` in vecsim_torch.py
converged = copy.copy(model)
converged.opt.iterations, converged.opt.ls_iterations, converged.opt.tolerance = 100, 50, 1e-15

rng, data = np.random.default_rng(1), mujoco.MjData(model)
low, high = model.actuator_ctrlrange.T
tests = {name: [] for name in ("qpos", "qvel", "warmstart", "ctrl", "next_qvel", "qacc")}
while len(tests["qpos"]) < 256:
    mujoco.mj_resetData(model, data)
    data.qpos += rng.uniform(-0.1, 0.1, model.nq)
    for step in range(100):
        data.ctrl = rng.uniform(low, high)
        mujoco.mj_step(model, data, env.frame_skip)
        if step % 10 == 9:  # the answer of the converged solver to this very state
            data.ctrl = rng.uniform(low, high)
            exact = mujoco.MjData(converged)
            exact.qpos, exact.qvel, exact.ctrl, exact.qacc_warmstart = data.qpos, data.qvel, data.ctrl, data.qacc_warmstart
            rows = exact.qpos.copy(), exact.qvel.copy(), exact.qacc_warmstart.copy(), exact.ctrl.copy()
            mujoco.mj_step(converged, exact)
            for name, row in zip(tests, (*rows, exact.qvel.copy(), exact.qacc.copy())):
                tests[name].append(row)
pool, episode, of_each, starts = 512, 200, 8, []
while len(starts) < pool:
    mujoco.mj_resetData(model, data)
    data.qpos += rng.uniform(-0.1, 0.1, model.nq)
    moments = set(1 + rng.permutation(episode)[:of_each])
    for step in range(1, episode + 1):
        data.ctrl = rng.uniform(low, high)
        mujoco.mj_step(model, data, env.frame_skip)
        if step in moments:
            starts.append((data.qpos.copy(), data.qvel.copy()))
rng.shuffle(starts)
start, start_qvel = (np.resize(rows, (int(num_envs), len(rows[0]))) for rows in zip(*starts))
np.savez(path, start=start, start_qvel=start_qvel, **tests)
settings = dict(env_id=env_id, device=device, num_envs=int(num_envs), integrator="euler", timestep=model.opt.timestep)
settings |= dict(solver="newton", iterations=int(iterations), ls_iterations=8, frame_skip=env.frame_skip, starts="mid-episode")
print(json.dumps(settings | dict(xml=str(xml), states=path)))
PYTHON
}

program_sim_common() {
  cat <<'PYTHON'
import mujoco
import numpy as np

states = np.load(settings["states"])
num_envs, frame_skip = settings["num_envs"], settings["frame_skip"]
episode = 200  # environment steps before a robot starts anew


def load_model(load=mujoco.MjModel.from_xml_path):
    """The task's MJCF, with the settings that all engines share."""
    model = load(settings["xml"])
    model.opt.integrator = mujoco.mjtIntegrator.mjINT_EULER
    model.opt.solver = mujoco.mjtSolver.mjSOL_NEWTON
    model.opt.jacobian = mujoco.mjtJacobian.mjJAC_DENSE
    model.opt.iterations, model.opt.ls_iterations = settings["iterations"], settings["ls_iterations"]
    return model


def test_states():
    """qpos, qvel, warmstart and ctrl of the test states, repeated or cut to num_envs rows: for engines that compile for a size."""
    return [np.resize(states[name], (num_envs, states[name].shape[1])) for name in ("qpos", "qvel", "warmstart", "ctrl")]


def note_errors(next_qvel):
    """Error of one step from the first of the 256 test states, next_qvel: (rows, nv), as a fact of this contender's row."""
    count = min(len(next_qvel), len(states["qvel"]))
    scale = settings["timestep"] * (1.0 + np.abs(states["qacc"][:count]).max(1))
    errors = np.abs(np.asarray(next_qvel, np.float64)[:count] - states["next_qvel"][:count]).max(1) / scale
    quantiles = {"step_error_p50": 0.5, "step_error_p99": 0.99, "step_error_max": 1.0}
    meter.facts |= {name: float(np.quantile(errors, q)) for name, q in quantiles.items()}
PYTHON
}

program_sim_vecsim() {
  cat <<'PYTHON'
import torch

import vecsim_torch

ends_at_a_fall = hasattr(vecsim_torch.TASKS[settings["env_id"]], "terminate_when_unhealthy")
env = vecsim_torch.make(
    settings["env_id"], num_envs, device=device, seed=1, integrator="euler", iterations=settings["iterations"],
    max_episode_steps=episode, random_initial_ages=True, compile=True, **dict(terminate_when_unhealthy=False) if ends_at_a_fall else {},
)  # fmt: skip
chunk = env._slices[0].stop  # the compiled functions that are timed below take this many robots
rows = (np.resize(states[name], (chunk, states[name].shape[1])).T for name in ("qpos", "qvel", "warmstart", "ctrl"))
qpos, qvel, warmstart, ctrl = (torch.tensor(x, dtype=env.dtype, device=device).contiguous() for x in rows)
with torch.no_grad():
    state, run = vecsim_torch.State(qpos, qvel, warmstart), env._regions[chunk]
    after, _ = vecsim_torch.step(env._models[0], state, ctrl, "euler", settings["iterations"], run)
note_errors(after.qvel.T.cpu())
env.reset(seed=1)
env.set_state(*(torch.tensor(states[name].T) for name in ("start", "start_qvel")))
generator = torch.Generator(device).manual_seed(1)
env.step(vecsim_torch.random_actions(env, generator))  # compiles
while True:
    for _ in range(5):
        env.step(vecsim_torch.random_actions(env, generator))
    meter.tick(5 * num_envs * frame_skip)
PYTHON
}

program_sim_mujoco() {
  cat <<'PYTHON'
from mujoco import rollout

model = load_model()
rng, (low, high) = np.random.default_rng(1), model.actuator_ctrlrange.T
full = mujoco.mjtState.mjSTATE_FULLPHYSICS
size = mujoco.mj_stateSize(model, full)


def full_states(qpos, qvel):
    """(N, size) states as mujoco.rollout takes them."""
    data, rows = mujoco.MjData(model), np.empty((len(qpos), size))
    for row, data.qpos, data.qvel in zip(rows, qpos, qvel):
        mujoco.mj_getState(model, data, row, full)
    return rows


with rollout.Rollout(nthread=threads) as pool:
    data = [mujoco.MjData(model) for _ in range(threads)]
    after, _ = pool.rollout(
        model, data, full_states(states["qpos"], states["qvel"]), states["ctrl"][:, None], initial_warmstart=states["warmstart"]
    )
    note_errors(after[:, 0, 1 + model.nq : 1 + model.nq + model.nv])  # a state is time, qpos, qvel
    start, length = full_states(states["start"], states["start_qvel"]), 10
    while True:
        now = start
        for _ in range(0, episode, length):
            ctrl = rng.uniform(low, high, (num_envs, length, model.nu)).repeat(frame_skip, axis=1)
            after, _ = pool.rollout(model, data, now, ctrl)
            now = after[:, -1]
            meter.tick(num_envs * length * frame_skip)
PYTHON
}

program_sim_jax() {
  cat <<'PYTHON'
"""MJX (variant mjx) and Brax's generalized-coordinates engine (variant brax): one compiled program for an environment step."""

import jax
import jax.numpy as jnp

jax.config.update("jax_default_matmul_precision", "highest")  # else a GPU computes the physics in TF32
if variant == "mjx":
    from mujoco import mjx

    model = load_model()
    mjx_model, blank = mjx.put_model(model), mjx.make_data(model)

    def initial(qpos, qvel, warmstart):
        return blank.replace(qpos=qpos, qvel=qvel, qacc_warmstart=warmstart)

    def physics_step(data, ctrl):
        return mjx.step(mjx_model, data.replace(ctrl=ctrl))

    def velocity(data):
        return data.qvel
else:
    from brax.generalized import pipeline
    from brax.io import mjcf

    model = load_model(mjcf.load_mjmodel)  # its own reader, which welds bodies without joints
    system = mjcf.load_model(model)

    def initial(qpos, qvel, warmstart):
        return pipeline.init(system, qpos, qvel)

    def physics_step(state, ctrl):
        return pipeline.step(system, state, ctrl)

    def velocity(state):
        return state.qd


low, high = jnp.asarray(model.actuator_ctrlrange.T)
start_of = jax.jit(jax.vmap(initial))


@jax.jit
def advance(batch, ctrl, steps):
    return jax.lax.fori_loop(0, steps, lambda _, batch: jax.vmap(physics_step)(batch, ctrl), batch)


*tests, ctrl = (jnp.asarray(rows, jnp.float32) for rows in test_states())
note_errors(velocity(advance(start_of(*tests), ctrl, 1)))
start = start_of(*(jnp.asarray(x, jnp.float32) for x in (states["start"], states["start_qvel"], np.zeros((num_envs, model.nv)))))
random_ctrl = jax.jit(lambda key: jax.random.uniform(key, (num_envs, model.nu), minval=low, maxval=high))
key = jax.random.PRNGKey(1)
while True:
    now = start
    for _ in range(episode):
        key, key_now = jax.random.split(key)
        now = jax.block_until_ready(advance(now, random_ctrl(key_now), frame_skip))
        meter.tick(num_envs * frame_skip)
PYTHON
}

program_jax() {
  cat <<'PYTHON'
if 1 < threads < 16:  # else XLA's pool may wait for itself in batched LAPACK calls: see ppo_mjx_jax.py
    os.environ.setdefault("NPROC", "16")
if device == "cpu":
    os.environ["JAX_PLATFORMS"] = "cpu"
# Else it takes three quarters of the GPU's memory, and all contenders stay loaded.
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"

import jax

if jax.default_backend() != {"cpu": "cpu", "cuda": "gpu"}[device]:
    raise RuntimeError(f"JAX computes on the {jax.default_backend()}, not on {device}")
PYTHON
}

program_sim_mujoco_torch() {
  cat <<'PYTHON'
"""mujoco-torch: torch.vmap over its step, compiled (variant compiled) or not (variant eager).

Eager, its solver runs all its iterations: with PyTorch 2.13 the loop that stops early fails under vmap unless it is compiled."""

import mujoco_torch
import torch

torch.manual_seed(1)
model = load_model()
mx = mujoco_torch.device_put(model, dtype=torch.float32).to(device)
one = mujoco_torch.device_put(mujoco.MjData(model), dtype=torch.float32).to(device)
low, high = torch.tensor(model.actuator_ctrlrange.T, dtype=torch.float32, device=device)
step = torch.vmap(lambda data: mujoco_torch.step(mx, data, fixed_iterations=variant == "eager"))
if variant == "compiled":
    step = torch.compile(step, fullgraph=True)


def batch_of(qpos, qvel, warmstart, ctrl):
    batch = torch.stack([one] * len(qpos))
    rows = (torch.tensor(x, dtype=torch.float32, device=device) for x in (qpos, qvel, warmstart, ctrl))
    return batch.replace(**dict(zip(("qpos", "qvel", "qacc_warmstart", "ctrl"), rows)))


with torch.no_grad():
    note_errors(step(batch_of(*test_states())).qvel.cpu().numpy())
    rest = np.zeros((num_envs, model.nv))
    start = batch_of(states["start"], states["start_qvel"], rest, np.zeros((num_envs, model.nu)))
    while True:
        now = start
        for _ in range(episode):
            now = now.replace(ctrl=low + (high - low) * torch.rand(num_envs, model.nu, device=device))
            for _ in range(frame_skip):
                now = step(now)
            meter.tick(num_envs * frame_skip)
PYTHON
}

program_sim_mujoco_warp() {
  cat <<'PYTHON'
import mujoco_warp
import warp

warp.init()
model = load_model()
low, high = model.actuator_ctrlrange.T
rng = np.random.default_rng(1)


def simulation(qpos, qvel, warmstart):
    """A model and its data, with these rows as state."""
    data = mujoco_warp.make_data(model, nworld=len(qpos))
    for name, rows in (("qpos", qpos), ("qvel", qvel), ("qacc_warmstart", warmstart)):
        getattr(data, name).assign(rows.astype(np.float32))
    mx = mujoco_warp.put_model(model)
    mx.opt.warn_overflow = 0  # else it prints whenever a robot uses all its solver iterations
    return mx, data


with warp.ScopedDevice(device):
    mx, data = simulation(states["qpos"], states["qvel"], states["warmstart"])
    data.ctrl.assign(states["ctrl"].astype(np.float32))
    mujoco_warp.step(mx, data)
    note_errors(data.qvel.numpy())
    rest = np.zeros((num_envs, model.nv))
    mx, data = simulation(states["start"], states["start_qvel"], rest)
    graph = None
    if device == "cuda":  # as its documentation advises
        mujoco_warp.step(mx, data)
        with warp.ScopedCapture() as capture:
            mujoco_warp.step(mx, data)
        graph = capture.graph
    while True:
        for name, rows in (("qpos", states["start"]), ("qvel", states["start_qvel"]), ("qacc_warmstart", rest)):
            getattr(data, name).assign(rows.astype(np.float32))
        for _ in range(episode):
            data.ctrl.assign(rng.uniform(low, high, (num_envs, model.nu)).astype(np.float32))
            for _ in range(frame_skip):
                warp.capture_launch(graph) if graph else mujoco_warp.step(mx, data)
            warp.synchronize()
            meter.tick(num_envs * frame_skip)
PYTHON
}

# ----------------------------------------------------------------------------------------------------------------------
# learner: the PPO update alone
#
# One update is 65,536 samples (2,048 environments x 32 steps) x 5 epochs x 4 minibatches: separate ELU networks 256-128-64 for
# actor and critic, 27 observations, 8 actions, observation statistics, learning rate from the KL divergence, gradients
# clipped at 1. The unit is samples of the batch per second; each is visited 5 times. Every learner runs its own code:
# advantages, shuffling, normalisation and logging included as it does them (rl_games: all but the advantages, in its favour).
# ----------------------------------------------------------------------------------------------------------------------

program_learner_common() {
  cat <<'PYTHON'
import torch

torch.manual_seed(1)
torch.set_num_threads(threads)
if device == "cuda":
    torch.set_float32_matmul_precision("high")  # TF32, for every learner alike
num_envs, obs_size, action_size, hidden = (settings[x] for x in ("num_envs", "obs_size", "action_size", "hidden"))
PYTHON
}

program_learner_ours() {
  cat <<'PYTHON'
"""Targets, batch and update of ppo_gpu_torch.py, as its training loop calls them; variants eager, compiled, bf16."""

import gymnasium
import numpy as np

import ppo_gpu_torch as ppo

args = ppo.with_task_defaults(ppo.Args(
    num_envs=num_envs, num_steps=num_steps, update_epochs=epochs, num_minibatches=minibatches, device=device,
    actor_hidden=tuple(hidden), critic_hidden=tuple(hidden), compile=variant != "eager", bf16=variant == "bf16",
))  # fmt: skip
sizes = ppo.derive_sizes(args, world_size=1)
target = torch.device(device)
actions = gymnasium.spaces.Box(-np.ones(action_size, np.float32), np.ones(action_size, np.float32))
agent = ppo.Agent(obs_size, None, actions, args).to(target)
learning_rate = torch.tensor(args.learning_rate, device=target)
optimizer = ppo.make_optimizer(agent, learning_rate)
rollout = ppo.allocate_rollout(num_steps, num_envs, obs_size, None, action_size, target)
policy, targets, accumulate, apply = ppo.build_functions(agent, optimizer, rollout, sizes, args)
for tensor in (rollout.obs, rollout.final_critic_obs, rollout.reward):
    tensor.normal_()
rollout.terminated.bernoulli_(0.01)
for t in range(num_steps):
    rollout.mean[t], rollout.action[t], _ = policy(rollout.obs[t], torch.randn_like(rollout.action[t]))
valid = ~rollout.invalid.flatten()
while True:
    value, advantage = targets()
    order = torch.randperm(sizes.batch, device=target)
    batch = ppo.make_batch(agent, rollout, value, advantage, args.normalize_advantages, order)
    ppo.update(agent, batch, accumulate, apply, learning_rate, args.desired_kl, sizes.minibatch, args)
    agent.obs_statistics.update(rollout.obs.flatten(0, 1), valid)
    meter.tick(samples)
PYTHON
}

program_learner_rsl_rl() {
  cat <<'PYTHON'
"""rsl_rl's PPO.compute_returns and PPO.update on a storage filled through PPO.act; variants eager, compiled, bf16."""

from types import SimpleNamespace

from rsl_rl.algorithms import PPO
from tensordict import TensorDict


def observe():
    return TensorDict({"policy": torch.randn(num_envs, obs_size, device=device)}, batch_size=[num_envs], device=device)


network = dict(class_name="MLPModel", hidden_dims=hidden, activation="elu", obs_normalization=True)
config = dict(
    algorithm=dict(
        class_name="PPO", num_learning_epochs=epochs, num_mini_batches=minibatches, schedule="adaptive", desired_kl=0.01,
        entropy_coef=0.0, max_grad_norm=1.0, use_clipped_value_loss=False, use_mixed_precision=variant == "bf16",
    ),
    actor=network | dict(distribution_cfg=dict(class_name="GaussianDistribution", init_std=1.0)),
    critic=network,
    obs_groups=dict(actor=["policy"], critic=["policy"]),
    num_steps_per_env=num_steps,
    multi_gpu=None,
    torch_compile_mode=None if variant == "eager" else "default",
)  # fmt: skip
learner = PPO.construct_algorithm(observe(), SimpleNamespace(num_envs=num_envs, num_actions=action_size), config, device)
learner.train_mode()
with torch.inference_mode():
    for _ in range(num_steps):
        learner.act(observe())
        done = torch.rand(num_envs, device=device) < 0.01
        learner.process_env_step(observe(), torch.randn(num_envs, device=device), done, {})
while True:
    with torch.inference_mode():
        learner.compute_returns(observe())
    learner.update()
    meter.tick(samples)
PYTHON
}

program_ppo_batch() {
  cat <<'PYTHON'
num_steps, epochs, minibatches = (settings[x] for x in ("num_steps", "epochs", "minibatches"))
samples = settings["num_envs"] * num_steps
PYTHON
}

program_skrl_models() {
  cat <<'PYTHON'
# Policy and value function of skrl, as its documentation builds them.
import gymnasium
import numpy as np
import torch
from skrl.models.torch import DeterministicMixin, GaussianMixin, Model
from torch import nn


def mlp(inputs, hidden, outputs):
    sizes, layers = [inputs, *hidden], []
    for i in range(len(hidden)):
        layers += [nn.Linear(sizes[i], sizes[i + 1]), nn.ELU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))


class Policy(GaussianMixin, Model):
    def __init__(self, spaces, hidden):
        Model.__init__(self, **spaces)
        GaussianMixin.__init__(self)
        self.net = mlp(self.num_observations, hidden, self.num_actions)
        self.log_std = nn.Parameter(torch.zeros(self.num_actions))

    def compute(self, inputs, role):
        return self.net(inputs["observations"]), {"log_std": self.log_std}


class Value(DeterministicMixin, Model):
    def __init__(self, spaces, hidden):
        Model.__init__(self, **spaces)
        DeterministicMixin.__init__(self)
        self.net = mlp(self.num_observations, hidden, 1)

    def compute(self, inputs, role):
        return self.net(inputs["observations"]), {}


def box(size, limit):
    return gymnasium.spaces.Box(-limit, limit, (size,), np.float32)
PYTHON
}

program_learner_skrl() {
  cat <<'PYTHON'
"""skrl's PPO.update on a memory filled through PPO.act and PPO.record_transition."""

from skrl.agents.torch.ppo import PPO
from skrl.memories.torch import RandomMemory
from skrl.resources.preprocessors.torch import RunningStandardScaler
from skrl.resources.schedulers.torch import KLAdaptiveLR

spaces = dict(observation_space=box(obs_size, np.inf), action_space=box(action_size, 1.0), device=device)
learner = PPO(
    models={"policy": Policy(spaces, hidden).to(device), "value": Value(spaces, hidden).to(device)},
    memory=RandomMemory(memory_size=num_steps, num_envs=num_envs, device=device),
    **spaces,
    cfg=dict(
        rollouts=num_steps, learning_epochs=epochs, mini_batches=minibatches, grad_norm_clip=1.0, value_clip=0.0,
        learning_rate=1e-3, learning_rate_scheduler=KLAdaptiveLR, learning_rate_scheduler_kwargs={"kl_threshold": 0.01},
        observation_preprocessor=RunningStandardScaler,
        observation_preprocessor_kwargs={"size": spaces["observation_space"], "device": device},
        value_preprocessor=RunningStandardScaler, value_preprocessor_kwargs={"size": 1, "device": device},
        experiment={"write_interval": 0, "checkpoint_interval": 0},
    ),
)  # fmt: skip
learner.init()
learner.enable_training_mode(True)
obs = torch.randn(num_envs, obs_size, device=device)
with torch.no_grad():
    for _ in range(num_steps):
        actions, _ = learner.act(obs, None, timestep=0, timesteps=1)
        next_obs = torch.randn_like(obs)
        ended = torch.rand(num_envs, 1, device=device) < 0.01
        learner.record_transition(
            observations=obs, states=None, actions=actions, rewards=torch.randn(num_envs, 1, device=device),
            next_observations=next_obs, next_states=None, terminated=ended, truncated=torch.zeros_like(ended), infos={},
            timestep=0, timesteps=1,
        )  # fmt: skip
        obs = next_obs
learner.enable_models_training_mode(True)
while True:
    learner.update(timestep=0, timesteps=1)
    meter.tick(samples)
PYTHON
}

program_rl_games_agent() {
  cat <<'PYTHON'
"""rl_games' continuous PPO agent on a given vector environment; options as in its configurations for Ant."""

import gymnasium
import numpy as np
import torch
from rl_games.algos_torch.a2c_continuous import A2CAgent
from rl_games.common.algo_observer import DefaultAlgoObserver
from rl_games.common.ivecenv import IVecEnv
from rl_games.common.tr_helpers import DefaultRewardsShaper


def make_agent(vec_env, num_actors, horizon, minibatch, epochs, hidden):
    network = dict(
        name="actor_critic", separate=True,
        space=dict(continuous=dict(
            mu_activation="None", sigma_activation="None", mu_init=dict(name="default"),
            sigma_init=dict(name="const_initializer", val=0), fixed_sigma=True,
        )),
        mlp=dict(units=hidden, activation="elu", initializer=dict(name="default")),
    )  # fmt: skip
    config = dict(
        name="benchmark", env_name="benchmark", env_info=vec_env.get_env_info(), vec_env=vec_env, device=device,
        num_actors=num_actors, horizon_length=horizon, minibatch_size=minibatch, mini_epochs=epochs,
        normalize_input=True, normalize_value=True, normalize_advantage=True, reward_shaper=DefaultRewardsShaper(),
        gamma=0.99, tau=0.95, learning_rate=3e-4, lr_schedule="adaptive", kl_threshold=0.008, e_clip=0.2, clip_value=False,
        critic_coef=2, entropy_coef=0.0, bounds_loss_coef=1e-4, truncate_grads=True, grad_norm=1.0,
        features=dict(observer=DefaultAlgoObserver()), print_stats=False, save_best_after=10**9,
    )  # fmt: skip
    return A2CAgent("benchmark", dict(network=network, model=dict(name="continuous_a2c_logstd"), config=config))


def describe_spaces(observation_space, action_space):
    return dict(observation_space=observation_space, action_space=action_space, agents=1, value_size=1)
PYTHON
}

program_brax_ppo() {
  cat <<'PYTHON'
import itertools

import jax
import jax.numpy as jnp

# Brax 0.14.2 calls this, and JAX 0.10 has it no more.
jax.device_put_replicated = lambda tree, devices: jax.tree.map(lambda x: jnp.stack([x] * len(devices)), tree)

from brax import envs
from brax.training.agents.ppo import train as ppo


def train(env, num_steps, rows, minibatches, **options):
    """Brax's PPO, one iteration of rows x num_steps transitions between two calls of the meter; its evaluations are left out."""
    iterations, work, begun = 10**6, rows * num_steps, itertools.count()

    def progress(*_):
        if next(begun):  # JAX compiles the first iteration, and the second once more
            meter.tick(work)

    ppo.train(
        env, num_timesteps=iterations * work, num_evals=iterations + 1, run_evals=False, progress_fn=progress,
        unroll_length=num_steps, batch_size=rows // minibatches, num_minibatches=minibatches, episode_length=1000,
        normalize_observations=True, **options,
    )  # fmt: skip
PYTHON
}

program_learner_brax() {
  cat <<'PYTHON'
"""Brax's PPO on an environment of random numbers: its rollout, one more pass of the policy for each sample, is inside."""

import functools

from brax.training.agents.ppo import networks
from flax import linen


class RandomNumbers(envs.Env):
    observation_size, action_size, backend = settings["obs_size"], settings["action_size"], None

    def reset(self, rng):
        obs = jax.random.normal(rng, (self.observation_size,))
        return envs.State(None, obs, jnp.zeros(()), jnp.zeros(()), {}, {"rng": rng})

    def step(self, state, action):
        rng, key_obs, key_end = jax.random.split(state.info["rng"], 3)
        obs = jax.random.normal(key_obs, (self.observation_size,))
        done = jax.random.bernoulli(key_end, 0.01).astype(jnp.float32)
        return state.replace(obs=obs, reward=obs[0], done=done, info=state.info | {"rng": rng})


hidden = tuple(settings["hidden"])
train(
    RandomNumbers(), num_steps, settings["num_envs"], minibatches, num_envs=settings["num_envs"], num_updates_per_batch=epochs,
    learning_rate=1e-3, learning_rate_schedule="ADAPTIVE_KL", max_grad_norm=1.0, entropy_cost=0.0,
    network_factory=functools.partial(
        networks.make_ppo_networks, policy_hidden_layer_sizes=hidden, value_hidden_layer_sizes=hidden, activation=linen.elu
    ),
)  # fmt: skip
PYTHON
}

program_learner_rl_games() {
  cat <<'PYTHON'
"""rl_games' train_epoch, its rollout replaced by one that it collected before."""


class RandomNumbers(IVecEnv):
    def get_env_info(self):
        bound = np.full(obs_size, np.inf, np.float32)
        limit = np.ones(action_size, np.float32)
        return describe_spaces(gymnasium.spaces.Box(-bound, bound), gymnasium.spaces.Box(-limit, limit))

    def reset(self):
        return torch.randn(num_envs, obs_size, device=device)

    def step(self, actions):
        done = torch.rand(num_envs, device=device) < 0.01
        return self.reset(), torch.randn(num_envs, device=device), done, {}


agent = make_agent(RandomNumbers(), num_envs, num_steps, samples // minibatches, epochs, hidden)
agent.init_tensors()
agent.is_tensor_obses = True
agent.obs = agent.env_reset()
agent.set_eval()
with torch.no_grad():
    collected = agent.play_steps()
# The update overwrites the means and deviations that it is given.
agent.play_steps = lambda: collected | {name: collected[name].clone() for name in ("mus", "sigmas")}
while True:
    agent.train_epoch()
    meter.tick(samples)
PYTHON
}

# SAC: updates/s of the whole trainer but for the simulator, whose place random numbers take: 128 environments, 8 updates after
# each of their steps, each on a batch of 4,096: policy and twin critics of two layers of 256, textbook SAC. Acting and storing are
# inside, for both.

program_random_numbers() {
  cat <<'PYTHON'
"""An environment with vecsim's contract that costs nothing, and calls the meter once the trainer has begun to learn."""

import gymnasium
import numpy as np


class RandomNumbers:
    single_critic_space = None

    def __init__(self, first_steps, work):
        bound, limit = np.full(obs_size, np.inf, np.float32), np.ones(action_size, np.float32)
        self.single_observation_space = gymnasium.spaces.Box(-bound, bound)
        self.single_action_space = gymnasium.spaces.Box(-limit, limit)
        self.obs = torch.randn(num_envs, obs_size, device=device)
        self.reward = torch.randn(num_envs, device=device)
        self.never = torch.zeros(num_envs, dtype=torch.bool, device=device)
        self.first_steps, self.work, self.taken = first_steps, work, 0

    def reset(self, **options):
        self.taken = 0
        return self.obs, {}

    def step(self, action):
        self.taken += 1
        if self.taken > self.first_steps:
            meter.tick(self.work)
        return self.obs, self.reward, self.never, self.never, {"final_obs": self.obs, "invalid": self.never}
PYTHON
}

program_learner_sac_ours() {
  cat <<'PYTHON'
"""sac_gpu_torch.train as it stands, on an environment of random numbers; variants eager and compiled."""

import tempfile

import sac_gpu_torch as sac

args = sac.Args(
    preset="vanilla", num_envs=num_envs, batch_size=settings["batch_size"], updates_per_step=settings["updates_per_step"],
    actor_hidden=tuple(hidden), critic_hidden=tuple(hidden), learning_starts=num_envs * settings["first_steps"], env_kwargs={},
    replay_capacity=num_envs * settings["replay_steps"], total_timesteps=10**12, eval_episodes=0, device=device,
    compile=variant == "compiled", run_dir=tempfile.mkdtemp(dir="."),
)  # fmt: skip
sac.train(args, lambda env_id, **options: RandomNumbers(settings["first_steps"] + 1, settings["updates_per_step"]))
PYTHON
}

program_learner_sac_skrl() {
  cat <<'PYTHON'
"""skrl's SAC: act, record_transition and post_interaction, as its trainer calls them; models as in its documentation."""

from skrl.agents.torch.sac import SAC
from skrl.memories.torch import RandomMemory


class SquashedPolicy(Policy):
    def compute(self, inputs, role):
        return torch.tanh(self.net(inputs["observations"])), {"log_std": self.log_std}


class Critic(DeterministicMixin, Model):
    def __init__(self, spaces, hidden):
        Model.__init__(self, **spaces)
        DeterministicMixin.__init__(self)
        self.net = mlp(self.num_observations + self.num_actions, hidden, 1)

    def compute(self, inputs, role):
        return self.net(torch.cat([inputs["observations"], inputs["taken_actions"]], dim=1)), {}


spaces = dict(observation_space=box(obs_size, np.inf), action_space=box(action_size, 1.0), device=device)
critics = ("critic_1", "critic_2", "target_critic_1", "target_critic_2")
updates = settings["updates_per_step"]
agent = SAC(
    models={"policy": SquashedPolicy(spaces, hidden)} | {name: Critic(spaces, hidden) for name in critics},
    memory=RandomMemory(memory_size=settings["replay_steps"], num_envs=num_envs, device=device),
    **spaces,
    cfg=dict(
        gradient_steps=updates, batch_size=settings["batch_size"], polyak=0.005, learn_entropy=True, grad_norm_clip=0.0,
        learning_starts=settings["first_steps"], experiment={"write_interval": 0, "checkpoint_interval": 0},
    ),
)  # fmt: skip
agent.init()
agent.enable_training_mode(True)
obs = torch.randn(num_envs, obs_size, device=device)
reward = torch.randn(num_envs, 1, device=device)
never = torch.zeros(num_envs, 1, dtype=torch.bool, device=device)
timestep = 0
while True:
    with torch.no_grad():
        actions, _ = agent.act(obs, None, timestep=timestep, timesteps=10**9)
        agent.record_transition(
            observations=obs, states=None, actions=actions, rewards=reward, next_observations=obs, next_states=None,
            terminated=never, truncated=never, infos={}, timestep=timestep, timesteps=10**9,
        )  # fmt: skip
    agent.post_interaction(timestep=timestep, timesteps=10**9)
    if timestep >= settings["first_steps"]:
        meter.tick(updates)
    timestep += 1
PYTHON
}

# ----------------------------------------------------------------------------------------------------------------------
# train: environment steps/s of a whole training, from the second iteration on
#
# ppo_gpu_torch.py with its defaults, its log included, against PPO implementations on 8 Gymnasium environments, the way their
# users run them on such a machine, and against other learners on vecsim itself. A window is whole iterations, rollout
# and update. All contenders of a comparison integrate alike, except Brax, whose models and engines are its own: with
# Euler, as our defaults train, or with RK4, as Gymnasium ships all tasks but HalfCheetah. RK4 is four times the work.
# ----------------------------------------------------------------------------------------------------------------------

program_train_ours() {
  cat <<'PYTHON'
"""ppo_gpu_torch.train as it stands; its environment counts the steps, and calls the meter where an iteration begins.

The variant is a number of processes and, where it changes them, the hidden layers of both networks. This process, rank 0, starts the
others as torchrun would; while it waits for its turn, they wait for its gradients."""

import socket
import subprocess
import tempfile

import torch

processes, *hidden = map(int, variant.split(","))
rank = int(os.environ.get("RANK", 0))
torch.set_num_threads(max(1, threads // processes))
if processes > 1 and "RANK" not in os.environ:
    with socket.create_server(("localhost", 0)) as free:
        os.environ |= dict(MASTER_ADDR="localhost", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE=str(processes))
    os.environ |= dict(RANK="0", LOCAL_RANK="0")
    for other in range(1, processes):
        environment = os.environ | dict(RANK=str(other), LOCAL_RANK=str(other))
        subprocess.Popen([sys.executable, __file__], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment)

import ppo_gpu_torch as ppo
import vecsim_torch

args = ppo.with_task_defaults(ppo.Args(
    env_id=settings["env_id"], device=device, total_timesteps=10**12, log_every=150_000, eval_episodes=0, run_dir=tempfile.mkdtemp(dir="."),
    actor_hidden=tuple(hidden) or None, critic_hidden=tuple(hidden) or None, integrator=settings["integrator"],
))  # fmt: skip


class CountedSteps:
    """A vecsim environment whose steps are counted from its last reset on."""

    def __init__(self, env):
        self.env, self.taken = env, 0

    def __getattr__(self, name):
        return getattr(self.env, name)

    def reset(self, **options):
        self.taken = 0
        return self.env.reset(**options)

    def step(self, action):
        if rank == 0 and self.taken and self.taken % args.num_steps == 0:
            meter.tick(args.num_steps * args.num_envs)
        self.taken += 1
        return self.env.step(action)


ppo.train(args, lambda env_id, **options: CountedSteps(vecsim_torch.make(env_id, **options)))
PYTHON
}

program_gymnasium_envs() {
  cat <<'PYTHON'
"""8 Gymnasium environments that count their steps and call the meter where an iteration begins."""

import gymnasium
import mujoco

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
    functions, options = [lambda: make_one(*wrappers)] * num_envs, dict(autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP)
    if kind == "async":
        return CountedSteps(gymnasium.vector.AsyncVectorEnv(functions, context="fork", **options), num_steps)
    return CountedSteps(gymnasium.vector.SyncVectorEnv(functions, **options), num_steps)
PYTHON
}

program_vecsim_envs() {
  cat <<'PYTHON'
"""For rsl_rl, skrl and rl_games: their variant vecsim has the environments, batch and network sizes of `ours`."""

import torch

torch.set_num_threads(threads)
torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as ours
on_vecsim, ours = variant == "vecsim", settings["ours"]
ours_sizes = [ours[name] for name in ("num_steps", "update_epochs", "num_minibatches", "hidden")]
if on_vecsim:
    num_envs = ours["num_envs"]


class VecsimEnvs:
    """vecsim as `ours` makes it. It counts its steps and calls the meter where an iteration begins."""

    def __init__(self):
        import vecsim_torch

        self.env = vecsim_torch.make(
            settings["env_id"], num_envs, device=device, seed=1, compile=True, random_initial_ages=True,
            integrator=settings["integrator"], iterations=ours["solver_iterations"], **settings["env_kwargs"],
        )  # fmt: skip
        self.single_observation_space = self.env.single_observation_space
        self.single_action_space = self.env.single_action_space
        self.taken = 0

    def reset(self, seed=1):
        return self.env.reset(seed=seed)

    def step(self, actions):
        if self.taken and self.taken % ours["num_steps"] == 0:
            meter.tick(ours["num_steps"] * num_envs)
        self.taken += 1
        return self.env.step(actions)


def make_envs(num_steps):
    return VecsimEnvs() if on_vecsim else make_vector(num_steps, "sync")
PYTHON
}

program_train_sb3() {
  cat <<'PYTHON'
"""Stable-Baselines3's PPO with its defaults: 2,048 steps, minibatches of 64, 10 epochs; variants dummy and subproc."""

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv


class Ticks(BaseCallback):
    def _on_step(self):
        return True

    def _on_rollout_start(self):
        if self.num_timesteps:
            meter.tick(self.model.n_steps * self.training_env.num_envs)


if __name__ == "__main__":  # the processes of SubprocVecEnv may import this file
    torch.set_num_threads(threads)
    env = make_vec_env(make_one, num_envs, vec_env_cls={"dummy": DummyVecEnv, "subproc": SubprocVecEnv}[variant])
    PPO("MlpPolicy", env, device=device, seed=1).learn(10**12, callback=Ticks())
PYTHON
}

program_train_cleanrl() {
  cat <<'PYTHON'
"""PPO for continuous actions in CleanRL's manner, with its published hyperparameters; variants sync and async."""

import itertools

import numpy as np
import torch
from gymnasium.wrappers import ClipAction, NormalizeObservation, NormalizeReward, RecordEpisodeStatistics
from gymnasium.wrappers import TransformObservation, TransformReward
from torch import nn

num_steps, minibatches, epochs, clip = 2048, 32, 10, 0.2
seed = settings.get("seed", 1)
torch.manual_seed(seed)
torch.set_num_threads(threads)


def clip_observation(env):
    return TransformObservation(env, lambda obs: np.clip(obs, -10, 10), None)


def clip_reward(env):
    return TransformReward(env, lambda reward: float(np.clip(reward, -10, 10)))


wrappers = RecordEpisodeStatistics, ClipAction, NormalizeObservation, clip_observation, NormalizeReward, clip_reward
envs = make_vector(num_steps, variant, *wrappers)
obs_size, action_size = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]


def layer(inputs, outputs, gain=2**0.5):
    linear = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(linear.weight, gain)
    nn.init.zeros_(linear.bias)
    return linear


def network(outputs, gain):
    return nn.Sequential(layer(obs_size, 64), nn.Tanh(), layer(64, 64), nn.Tanh(), layer(64, outputs, gain)).to(device)


actor, critic = network(action_size, 0.01), network(1, 1.0)
log_std = nn.Parameter(torch.zeros(action_size, device=device))
parameters = [*actor.parameters(), *critic.parameters(), log_std]
optimizer = torch.optim.Adam(parameters, lr=3e-4, eps=1e-5)


def tensor(array):
    return torch.as_tensor(array, dtype=torch.float32, device=device)


def distribution(obs):
    return torch.distributions.Normal(actor(obs), log_std.exp())


obs_buffer = torch.zeros(num_steps, num_envs, obs_size, device=device)
action_buffer = torch.zeros(num_steps, num_envs, action_size, device=device)
log_probs, rewards, dones, values = torch.zeros(4, num_steps, num_envs, device=device)
obs, done = tensor(envs.reset(seed=seed)[0]), torch.zeros(num_envs, device=device)


def act(obs):
    """The deterministic action for one raw observation; the wrappers of the first environment hold the running moments."""
    env = envs.env.envs[0]
    while not isinstance(env, NormalizeObservation):
        env = env.env
    obs = (obs - env.obs_rms.mean) / np.sqrt(env.obs_rms.var + env.epsilon)
    with torch.no_grad():
        return actor(tensor(obs.clip(-10, 10))).cpu().numpy()


meter.ready(act)
updates = 1_000_000 // (num_steps * num_envs)  # as published: the learning rate falls to zero over a million steps
for update in itertools.count():
    optimizer.param_groups[0]["lr"] = 3e-4 * max(0.0, 1.0 - update / updates)
    for t in range(num_steps):
        obs_buffer[t], dones[t] = obs, done
        with torch.no_grad():
            policy = distribution(obs)
            action = policy.sample()
            action_buffer[t], log_probs[t], values[t] = action, policy.log_prob(action).sum(-1), critic(obs).squeeze(-1)
        next_obs, reward, terminated, truncated, _ = envs.step(action.cpu().numpy())
        obs, rewards[t], done = tensor(next_obs), tensor(reward), tensor(terminated | truncated)

    with torch.no_grad():
        advantages, following, next_value, next_done = torch.zeros_like(rewards), 0.0, critic(obs).squeeze(-1), done
        for t in reversed(range(num_steps)):
            delta = rewards[t] + 0.99 * next_value * (1 - next_done) - values[t]
            advantages[t] = following = delta + 0.99 * 0.95 * (1 - next_done) * following
            next_value, next_done = values[t], dones[t]
        returns = advantages + values

    rows = [x.flatten(0, 1) for x in (obs_buffer, action_buffer, log_probs, values, advantages, returns)]
    batch_size = num_steps * num_envs
    for _ in range(epochs):
        for index in torch.randperm(batch_size, device=device).split(batch_size // minibatches):
            b_obs, b_action, b_log_prob, b_value, advantage, b_return = (x[index] for x in rows)
            policy = distribution(b_obs)
            ratio = (policy.log_prob(b_action).sum(-1) - b_log_prob).exp()
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
            policy_loss = torch.max(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)).mean()
            value = critic(b_obs).squeeze(-1)
            clipped = b_value + (value - b_value).clamp(-clip, clip)
            value_loss = 0.5 * torch.max((value - b_return) ** 2, (clipped - b_return) ** 2).mean()
            optimizer.zero_grad()
            (policy_loss + 0.5 * value_loss).backward()
            nn.utils.clip_grad_norm_(parameters, 0.5)
            optimizer.step()
PYTHON
}

program_train_skrl() {
  cat <<'PYTHON'
"""skrl's PPO and SequentialTrainer, options as in its Gymnasium examples; variant vecsim: the sizes of ours."""

from skrl import config
from skrl.agents.torch.ppo import PPO
from skrl.envs.wrappers.torch import Wrapper, wrap_env
from skrl.memories.torch import RandomMemory
from skrl.resources.preprocessors.torch import RunningStandardScaler
from skrl.resources.schedulers.torch import KLAdaptiveLR
from skrl.trainers.torch import SequentialTrainer



class VecsimWrapper(Wrapper):
    """Spaces of one environment, rewards and ends as columns."""

    device, num_envs = torch.device(device), num_envs
    observation_space = property(lambda self: self._env.single_observation_space)
    action_space = property(lambda self: self._env.single_action_space)

    def reset(self):
        return self._env.reset()

    def step(self, actions):
        obs, reward, terminated, truncated, info = self._env.step(actions)
        return obs, reward[:, None], terminated[:, None], truncated[:, None], info

    def state(self):
        return None

    def render(self):
        pass

    def close(self):
        pass


config.torch.device = device
num_steps, epochs, minibatches, hidden = 1024, 10, 32, [64, 64]
if on_vecsim:
    num_steps, epochs, minibatches, hidden = ours_sizes
env = VecsimWrapper(VecsimEnvs()) if on_vecsim else wrap_env(make_vector(num_steps, "sync"), wrapper="gymnasium")
spaces = dict(observation_space=env.observation_space, action_space=env.action_space, device=device)
agent = PPO(
    models={"policy": Policy(spaces, hidden).to(device), "value": Value(spaces, hidden).to(device)},
    memory=RandomMemory(memory_size=num_steps, num_envs=num_envs, device=device),
    **spaces,
    cfg=dict(
        rollouts=num_steps, learning_epochs=epochs, mini_batches=minibatches, learning_rate=1e-3,
        learning_rate_scheduler=KLAdaptiveLR, learning_rate_scheduler_kwargs={"kl_threshold": 0.008},
        observation_preprocessor=RunningStandardScaler,
        observation_preprocessor_kwargs={"size": env.observation_space, "device": device},
        value_preprocessor=RunningStandardScaler, value_preprocessor_kwargs={"size": 1, "device": device},
        experiment={"write_interval": 0, "checkpoint_interval": 0},
    ),
)  # fmt: skip
SequentialTrainer(env=env, agents=agent, cfg={"timesteps": 10**9, "headless": True, "disable_progressbar": True}).train()
PYTHON
}

program_train_rsl_rl() {
  cat <<'PYTHON'
"""rsl_rl's OnPolicyRunner: the batch and networks of SB3's defaults, rsl_rl's epochs and minibatches.

On vecsim (variant vecsim) it has the sizes of ours, and its networks are compiled, as ours are."""

import torch
from rsl_rl.env import VecEnv
from rsl_rl.runners import OnPolicyRunner
from tensordict import TensorDict

num_steps, epochs, minibatches, hidden = 1024, 5, 4, [64, 64]
if on_vecsim:
    num_steps, epochs, minibatches, hidden = ours_sizes


def tensor(rows, dtype=torch.float32):
    return torch.as_tensor(rows, dtype=dtype, device=device)


class Envs(VecEnv):
    def __init__(self):
        self.envs = make_envs(num_steps)
        self.num_envs, self.num_actions = num_envs, self.envs.single_action_space.shape[0]
        self.max_episode_length, self.episode_length_buf = 1000, torch.zeros(num_envs, dtype=torch.long, device=device)
        self.device, self.cfg = device, {}
        self.obs = self.envs.reset(seed=1)[0]

    def get_observations(self):
        return TensorDict({"policy": tensor(self.obs)}, batch_size=[num_envs], device=device)

    def step(self, actions):
        actions = actions.clamp(-1, 1)
        self.obs, reward, terminated, truncated, _ = self.envs.step(actions if on_vecsim else actions.cpu().numpy())
        extras = {"time_outs": tensor(truncated, torch.bool)}
        return self.get_observations(), tensor(reward), tensor(terminated | truncated, torch.bool), extras


network = dict(class_name="MLPModel", hidden_dims=hidden, activation="elu", obs_normalization=True)
config = dict(
    algorithm=dict(
        class_name="PPO", num_learning_epochs=epochs, num_mini_batches=minibatches,
        schedule="adaptive", entropy_coef=0.0,
    ),
    torch_compile_mode="default" if on_vecsim else None,
    actor=network | dict(distribution_cfg=dict(class_name="GaussianDistribution", init_std=1.0)),
    critic=network,
    obs_groups=dict(actor=["policy"], critic=["policy"]),
    num_steps_per_env=num_steps,
    save_interval=10**9,
    check_for_nan=False,
)  # fmt: skip
OnPolicyRunner(Envs(), config, device=device).learn(10**9)
PYTHON
}

program_train_rl_games() {
  cat <<'PYTHON'
"""rl_games' A2CAgent.train, horizon and minibatch as in its configuration for Ant on 64 environments.

On vecsim (variant vecsim) it has the sizes of ours."""

num_steps, epochs, minibatches, hidden = 512, 4, 2, [256, 128, 64]
if on_vecsim:
    num_steps, epochs, minibatches, hidden = ours_sizes


def as_float32(rows):
    return rows.float() if on_vecsim else rows.astype(np.float32)


class Envs(IVecEnv):
    def __init__(self):
        self.envs = make_envs(num_steps)

    def get_env_info(self):
        return describe_spaces(self.envs.single_observation_space, self.envs.single_action_space)

    def reset(self):
        return as_float32(self.envs.reset(seed=1)[0])

    def step(self, actions):
        obs, reward, terminated, truncated, _ = self.envs.step(actions)
        return as_float32(obs), as_float32(reward), terminated | truncated, {"time_outs": truncated}


make_agent(Envs(), num_envs, num_steps, num_envs * num_steps // minibatches, epochs, hidden).train()
PYTHON
}

program_train_brax() {
  cat <<'PYTHON'
"""Brax's PPO in its own environment of the task, whose model is Brax's own; options as in its notebook for Ant, on a
smaller batch. The variant is the backend, Brax's word for a physics engine. The notebook trains on generalized,
positional and spring alike, and says that they get faster, and less realistic, in this order. Spring does learn: Brax's
PPO reached a return of 3,035 in its Ant after 1.5 million steps, and 1,927 in its HalfCheetah after 0.4 million.

A GPU has the notebook's 4,096 environments and batch; a CPU 128, and 2,560 transitions an iteration."""

num_envs, rows = (4096, 2048 * 32) if device == "cuda" else (128, 512)


class ExactPhysics(envs.Wrapper):
    """The physics multiplies in float32 on a GPU, too; the networks may in TF32, as all others."""

    def step(self, state, action):
        with jax.default_matmul_precision("highest"):
            return self.env.step(state, action)


env = ExactPhysics(envs.get_environment(settings["env_id"].split("-")[0].lower(), backend=variant))
train(
    env, 5, rows, 32 if device == "cuda" else 4, num_envs=num_envs, num_updates_per_batch=4, learning_rate=3e-4,
    entropy_cost=1e-2, discounting=0.97, reward_scaling=10.0,
)  # fmt: skip
PYTHON
}

# ----------------------------------------------------------------------------------------------------------------------
# scaling: training over 1..K processes, by torchrun (over environments: the program of `sim`)
# ----------------------------------------------------------------------------------------------------------------------

program_scaling_processes() {
  cat <<'PYTHON'
"""A training of half a minute by torchrun with `variant` processes, again and again; speed from the latter half of its log."""

import pathlib
import subprocess
import tempfile

processes = int(variant)
environment = os.environ | {"OMP_NUM_THREADS": str(max(1, threads // processes) if device == "cpu" else 4)}
while True:
    run_dir = pathlib.Path(tempfile.mkdtemp(dir="."))
    trainer = os.path.join(os.environ["BENCHMARK_ROOT"], "ppo_gpu_torch.py")
    flags = dict(env_id=settings["env_id"], device=device, num_envs=settings["num_envs"], eval_episodes=0, log_every=1, run_dir=run_dir)
    flags |= dict(total_timesteps=settings["num_envs"] * 32 * settings["training_iterations"])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", trainer]
    flags = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    subprocess.run([*launcher, *flags], check=True, env=environment)
    log = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    half, last = log[len(log) // 2], log[-1]
    meter.tick(last["env_steps"] - half["env_steps"], last["wall_seconds"] - half["wall_seconds"])
PYTHON
}

# ----------------------------------------------------------------------------------------------------------------------
# The referee: starts the contenders of one comparison, lets them measure in turn, and keeps the rows
# ----------------------------------------------------------------------------------------------------------------------

program_referee() {
  cat <<'PYTHON'
"""python referee.py COMPARISON.json: one comparison from start to finish, or from where it was interrupted.

The comparison names mode, case, unit, settings, contenders {name, peer, python, program, variant, installed}, the reference among them,
repeats, seconds, patience, cores, command, commit, the file of its rows, and the file that lists what this run has to show. Exit status 0:
the rows stand, or those of other hardware or settings are kept; 1: no contender could be measured, or the disk is full."""

import json
import os
import platform
import re
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib import metadata
from pathlib import Path


def say(text):
    print(text, file=sys.stderr, flush=True)


def hardware(device):
    """Processor and, where it is used, GPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.processor())
    gpu = ""
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        gpu = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()[0] + "; "
    return f"{gpu}{cpu}, {os.cpu_count()} cores"


class EnergyMeter:
    """Joules of the processor packages (RAPL) and of the GPU (power by nvidia-smi, twice a second) while the block runs.

    `joules` is None where the hardware does not tell. Other work on the same machine is counted too."""

    def __init__(self, device):
        self.device, self.joules, self.watts = device, None, []

    @staticmethod
    def packages():
        """Microjoules so far, and the value at which the counter starts again, of each processor package."""
        counters = []
        for folder in Path("/sys/class/powercap").glob("intel-rapl:[0-9]*"):
            if folder.name.count(":") == 1 and os.access(folder / "energy_uj", os.R_OK):
                numbers = ((folder / name).read_text() for name in ("energy_uj", "max_energy_range_uj"))
                counters.append(tuple(int(x) for x in numbers))
        return counters

    def sample(self):
        query = ["nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits"]
        while not self.stopped.wait(0.5):
            draws = subprocess.run(query, capture_output=True, text=True).stdout.split()
            self.watts += [sum(float(x) for x in draws)] if draws and all(re.fullmatch(r"[\d.]+", x) for x in draws) else []

    def __enter__(self):
        self.before, self.started, self.stopped = self.packages(), time.perf_counter(), threading.Event()
        self.sampler = threading.Thread(target=self.sample) if self.device == "cuda" else None
        if self.sampler:
            self.sampler.start()
        return self

    def __exit__(self, *_):
        self.stopped.set()
        if self.sampler:
            self.sampler.join()
        seconds = time.perf_counter() - self.started
        pairs = zip(self.before, self.packages())
        parts = [((now - then) % wraps) * 1e-6 for (then, wraps), (now, _) in pairs]
        if self.watts:
            parts.append(statistics.mean(self.watts) * seconds)
        if parts and (self.watts or self.device == "cpu"):
            self.joules = sum(parts)


CACHES = "TORCHINDUCTOR_CACHE_DIR TRITON_CACHE_DIR JAX_COMPILATION_CACHE_DIR WARP_CACHE_PATH CUDA_CACHE_PATH".split()


class Contender:
    def __init__(self, description, comparison, cache=None):
        """`cache`: folder for what its compilers keep; None: where they keep it by themselves."""
        self.name, self.description = description["name"], description
        programs = Path(comparison["programs"])
        self.log = Path(comparison["logs"]) / (re.sub(r"\W+", "-", f"{comparison['mode']}-{comparison['case']}-{self.name}") + ".log")
        cores = comparison["cores"]
        count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        if cores:
            count = int(subprocess.run(["taskset", "-c", cores, "nproc"], capture_output=True, text=True, check=True).stdout)
        self.cores = count
        environment = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
        environment |= dict(
            OMP_NUM_THREADS=str(count), BENCHMARK_ROOT=comparison["root"], BENCHMARK_SETTINGS=json.dumps(comparison["settings"]),
            BENCHMARK_VARIANT=description["variant"], BENCHMARK_SECONDS=str(comparison["seconds"]), PYTHONUNBUFFERED="1",
        )  # fmt: skip
        if cache:
            environment |= {name: str(Path(cache) / name) for name in CACHES}
            environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # else it keeps only what took a second
        launch = ["taskset", "-c", cores] if cores else []
        self.process = subprocess.Popen(
            [*launch, description["python"], programs / f"{description['program']}.py"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log.open("wb"), env=environment, cwd=comparison["scratch"],
            start_new_session=True,
        )  # fmt: skip

    def reply(self, patience):
        """The next line that the contender reports; RuntimeError with the reason if it ends or stays silent."""
        readable, _, _ = select.select([self.process.stdout], [], [], patience)
        if not readable:
            raise RuntimeError(f"no answer within {patience:g} s (log: {self.log})")
        line = self.process.stdout.readline()
        if not line:
            lines = self.log.read_text(errors="replace").strip().splitlines() or ["no message"]
            errors = [x for x in lines if re.match(r"[\w.]*(Error|Exception|error)\b", x)] or lines
            raise RuntimeError(f"{errors[-1][:160]} (log: {self.log})")
        return json.loads(line)

    def measure(self, patience):
        self.process.stdin.write(b"go\n")
        self.process.stdin.flush()
        return self.reply(patience)

    def stop(self):
        """End this contender and the processes that it started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(5)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass


def start(description, comparison, cache=None):
    """A contender that is ready to measure, and its first report; RuntimeError if it does not get ready."""
    contender = Contender(description, comparison, cache)
    try:
        return contender, contender.reply(comparison["patience"])
    except BaseException:
        contender.stop()
        raise


def save(path, record):
    """Write beside, then rename: an interrupted run or a full disk leaves the older file whole."""
    text, beside = json.dumps(record, indent=1) + "\n", path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text)
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        for row in record["rows"]:
            print(json.dumps(row))  # on standard output, so that nothing measured is lost
        raise SystemExit(f"error: {path} cannot be written ({error.strerror}); its rows were printed instead") from None


def summarize(row):
    values = row["values"]
    return row | dict(median=statistics.median(values), minimum=min(values), maximum=max(values))


PATHS = "states", "xml"  # settings that only say where files lie, in another folder each time: neither compared nor saved


def without_log(reason):
    """A reason as a file keeps it: where its log lies is told on the terminal, and true on one machine only."""
    return reason.split(" (log:")[0]


def lasting(settings):
    return {name: value for name, value in settings.items() if name not in PATHS}


def differences(record, comparison):
    """In what an earlier record differs from this comparison, so that its windows are none of these."""
    then, now = ({name: x[name] for name in ("hardware", "seconds")} | lasting(x["settings"]) for x in (record, comparison))
    names = [name for name in then | now if then.get(name) != now.get(name)]
    return [f"{name.replace('_', ' ')} ({then.get(name, 'not named')} there, {now.get(name, 'not named')} here)" for name in names]


def other_versions(record, comparison):
    """Packages of this project's own programs that have another version than in the record."""
    own = {c["name"] for c in comparison["contenders"] if c["peer"] == "project"}
    then = {}
    for row in record["rows"]:
        then |= row["versions"] if row["contender"] in own else {}
    now = {"python": sys.version.split()[0]}
    for name in then.keys() - now:
        try:
            now[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            now[name] = "none"
    return [f"{name} ({version} there, {now[name]} here)" for name, version in sorted(then.items()) if now[name] != version]


class Standing:
    """What an earlier run left: `rows` to keep or to go on from, and `wanted`, the contenders that have yet to measure.

    A contender that failed, stopped, or was not known yet measures all its windows, later than the others. Where the others have not all
    theirs, and commit, cores or versions are other ones, all is measured afresh: windows of two programs do not mix in a row."""

    def __init__(self, record, comparison):
        self.record, self.rows, self.older, self.note = record, {}, {}, ""
        self.wanted, failed = comparison["contenders"], {}
        rows = {row["contender"]: row for row in record["rows"]} if record else {}
        lengths = [len(row["values"]) for row in rows.values() if "stopped" not in row]
        self.complete = min(lengths, default=0) >= comparison["repeats"]
        other = other_versions(record, comparison) if record else []
        same = record and not other and all(record[name] == comparison[name] for name in ("commit", "cores"))
        if self.complete or same:
            self.rows = {name: row for name, row in rows.items() if "stopped" not in row}
            self.older = {name: row for name, row in rows.items() if "stopped" in row}  # kept where a new attempt measures less
            short = {name for name, row in self.rows.items() if len(row["values"]) < comparison["repeats"]}
            self.wanted = [c for c in comparison["contenders"] if c["name"] in short or c["name"] not in self.rows]
            failed = record["failed"]
        if self.complete and self.wanted and other:
            self.note = f"; {', '.join(c['name'] for c in self.wanted)} not measured beside other versions: {', '.join(other)}"
            self.wanted = []
        names = {c["name"] for c in self.wanted} | self.rows.keys() | self.older.keys()
        self.failed = {name: why for name, why in (failed | comparison["skipped"]).items() if name not in names}
        self.rounds = max(map(len, (row["values"] for row in self.rows.values())), default=0)

    def save(self, path, comparison):
        """The file anew: every row that has a window, in the order of the contenders. False: there is none, and what stood there stays."""
        order = [c["name"] for c in comparison["contenders"]]
        rows = {name: row for name, row in self.rows.items() if row["values"]}
        for name, row in self.older.items():
            if name not in rows or len(rows[name]["values"]) < len(row["values"]):
                rows[name] = row
        if not rows:
            return False
        names = sorted(rows, key=lambda name: order.index(name) if name in order else len(order))
        record = {k: comparison[k] for k in ("mode", "case", "unit", "seconds", "cores", "hardware", "commit", "command", "reference")}
        if self.complete:  # by then the file was whole: what came later says so in its row
            record |= {k: self.record[k] for k in ("cores", "commit", "command")}
        failed = {name: without_log(reason) for name, reason in self.failed.items()}
        for row in rows.values():
            row |= {"stopped": without_log(row["stopped"])} if "stopped" in row else {}
        record |= dict(settings=lasting(comparison["settings"]), failed=failed)
        save(path, record | dict(rows=[summarize(rows[name]) for name in names]))
        return True


def describe_plan(comparison, wanted):
    """What --dry-run prints: time and memory from earlier rows of the same task, device and number of environments, where there are any."""
    known, same = {}, ("env_id", "device", "num_envs", "integrator")
    for file in sorted(Path(comparison["results"]).glob("*.json")):
        record = json.loads(file.read_text())
        if record["mode"] == comparison["mode"] and all(record["settings"].get(x) == comparison["settings"].get(x) for x in same):
            known |= {row["contender"]: row for row in record["rows"]}
    names = [c["name"] for c in wanted]
    rows = [known[name] for name in names if name in known]
    print(f"{comparison['mode']} {comparison['case']}: {' | '.join(names)}")
    overrun = 1.5  # a window ends with the piece of work in which it runs out
    seconds = len(rows) * overrun * comparison["repeats"] * comparison["seconds"]
    seconds += sum(row.get("first_start_seconds", 0.0) + row["warmup_seconds"] for row in rows)
    memory = sum(row["peak_memory_mib"].get("host", 0.0) for row in rows)
    words = [f"about {seconds / 60:.0f} minutes, {memory / 1024:.1f} GiB (all contenders stay loaded)"] if rows else []
    unknown = [name for name in names if name not in known]
    words += [f"minutes and GiB unknown of {' | '.join(unknown)}"] if unknown else []
    missing = dict.fromkeys(c["peer"] for c in wanted if not c["installed"])
    words += [f"not installed yet: {', '.join(missing)}"] if missing else []
    print(f"  {'; '.join(words)}")


def show(path, comparison):
    """Name the file for the tables that end a run."""
    with Path(comparison["shown"]).open("a") as shown:
        shown.write(f"{path}\n")


def main():
    comparison = json.loads(Path(sys.argv[1]).read_text())
    path, label = Path(comparison["path"]), f"{comparison['mode']} {comparison['case']}"
    comparison["hardware"] = hardware(comparison["settings"].get("device", "cpu"))
    record = json.loads(path.read_text()) if path.exists() and not comparison["force"] else None
    if record and (other := differences(record, comparison)):
        say(f"{label}: not measured: {path} differs in {', '.join(other)} and is kept; --force measures again, --results DIR keeps both")
        return 0
    standing = Standing(record, comparison)
    if not standing.wanted:
        say(f"{label}: finished, in {path} (--force measures again){standing.note}")
        show(path, comparison)
        return 0
    if comparison["dry_run"]:
        describe_plan(comparison, standing.wanted)
        return 0
    if standing.complete:
        say(f"{label}: {path} stands; measured beside it: {', '.join(c['name'] for c in standing.wanted)}")
    contenders, rows, failed, patience = {}, standing.rows, standing.failed, comparison["patience"]
    try:
        for description in standing.wanted:
            name, cache, first_start = description["name"], None, {}
            try:
                if comparison["mode"] != "scaling" and name not in rows:
                    cache = tempfile.mkdtemp(dir=comparison["scratch"])
                    contender, ready = start(description, comparison, cache)
                    contender.stop()
                    first_start = dict(first_start_seconds=ready["warmup_seconds"])
                    say(f"  {name}: ready after {ready['warmup_seconds']:.0f} s with empty caches")
                contenders[name], ready = start(description, comparison, cache)
            except RuntimeError as error:
                say(f"  {name}: left out: {error}")
                if name in rows:
                    rows[name]["stopped"] = f"did not start again: {error}"
                elif name not in standing.older:
                    failed[name] = str(error)
                continue
            say(f"  {name}: ready after {ready['warmup_seconds']:.0f} s")
            rows.setdefault(name, first_start | dict(
                mode=comparison["mode"], case=comparison["case"], contender=name, unit=comparison["unit"],
                values=[], joules_per_unit=[], warmup_seconds=ready["warmup_seconds"], peak_memory_mib={},
                command=comparison["command"], cores=contenders[name].cores, versions=ready["versions"],
                hardware=comparison["hardware"], commit=comparison["commit"],
            ) | ready["facts"] | (dict(measured_later=True) if standing.rounds else {}))  # fmt: skip
        for turn in range(comparison["repeats"]):
            behind = [name for name in contenders if len(rows[name]["values"]) <= turn]  # one that came later catches up alone
            for name in behind:
                row = rows[name]
                try:
                    with EnergyMeter(comparison["settings"].get("device", "cpu")) as energy:
                        reply = contenders[name].measure(patience)
                except (RuntimeError, BrokenPipeError) as error:
                    say(f"  {name}: left out: stopped in round {turn + 1}: {error}")
                    contenders.pop(name).stop()
                    if row["values"]:
                        row["stopped"] = f"in round {turn + 1}: {error}"
                    else:
                        rows.pop(name)
                        failed |= {} if name in standing.older else {name: f"stopped in round {turn + 1}: {error}"}
                    continue
                row["values"].append(reply["work"] / reply["seconds"])
                if energy.joules is not None:
                    row["joules_per_unit"].append(energy.joules / reply["work"])
                row["peak_memory_mib"] = reply["peak_memory_mib"]
                say(f"  round {turn + 1}/{comparison['repeats']}  {name}: {row['values'][-1]:,.0f} {comparison['unit']}")
            if behind:
                standing.save(path, comparison)
        if not standing.save(path, comparison):
            say(f"error: {label}: no contender could be measured")
            return 1
        show(path, comparison)
    finally:
        for contender in contenders.values():
            contender.stop()
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
PYTHON
}

# ----------------------------------------------------------------------------------------------------------------------
# The head of the programs that run a trainer: what stands already
# ----------------------------------------------------------------------------------------------------------------------

program_job() {
  cat <<'PYTHON'
import json
import sys
from pathlib import Path

job = json.loads(sys.argv[1])


def budget(command):
    """--total-timesteps of a command; the last one counts."""
    words = ["", "the trainer's own", *command.split()]
    return next(words[i + 1] for i in reversed(range(len(words) - 1)) if words[i] in ("", "--total-timesteps"))


def show(*paths):
    """Name files for the tables that end a run."""
    with Path(job["shown"]).open("a") as shown:
        shown.write("".join(f"{path}\n" for path in paths))


def stands(label, *paths, done=True):
    """Whether these files take the place of this job, which is said in one line: finished, or of other hardware or length, and kept."""
    if job["force"] or not paths:
        return False
    record = json.loads(paths[0].read_text())
    then, now = (dict(hardware=x.get("hardware"), total_timesteps=budget(x["command"])) for x in (record, job))
    other = [f"{name.replace('_', ' ')} ({then[name]} there, {now[name]} here)" for name in now if then[name] != now[name]]
    if other:
        other = f"{paths[0]} differs in {', '.join(other)} and is kept"
        print(f"{label}: not measured: {other}; --force measures again, --results DIR keeps both", file=sys.stderr)
    elif done:
        print(f"{label}: finished, in {paths[0]} (--force measures again)", file=sys.stderr)
        show(*paths)
    return bool(other or done)


PYTHON
}

# ----------------------------------------------------------------------------------------------------------------------
# scores: time to a score in Gymnasium's own environments
# ----------------------------------------------------------------------------------------------------------------------

program_scores() {
  cat <<'PYTHON'
"""One training by one of the trainers with evaluations on the way; writes results/<set>/<task>-seed<k>.json.

An interrupted training goes on from its last checkpoint. Times are the trainer's own: compilation and evaluations apart."""

import os
import shlex
import shutil
import subprocess
from importlib import metadata

run_dir, path = Path(job["run_dir"]), Path(job["path"])
name = f"{path.parent.name}/{path.stem}"
if path.exists() and stands(f"scores {name}", path):
    sys.exit(0)
if job["dry_run"]:
    print(f"scores {name}: {job['command']}\n  about {job['minutes']} minutes, 1.5 GiB (guessed)")
    sys.exit(0)

if job["force"] and (run_dir / "eval.json").exists():
    shutil.rmtree(run_dir)  # a finished training; one that was interrupted goes on, forced or not
if not (run_dir / "eval.json").exists():
    command = shlex.split(job["command"])[1:]
    checkpoints = [file for file in (run_dir / "checkpoint.pt", run_dir / "checkpoint.npz") if file.exists()]  # PyTorch's, JAX's
    resumed = ["--resume", str(checkpoints[0])] if checkpoints else []
    if not resumed:
        shutil.rmtree(run_dir, ignore_errors=True)  # cut off before its first checkpoint: the trainer starts in an empty folder
    launch = ["taskset", "-c", job["cores"]] if job["cores"] else []
    trainer = [*launch, job["python"], *command, "--run-dir", str(run_dir), *resumed]
    status = subprocess.run(trainer, cwd=job["root"]).returncode
    if status:
        sys.exit(f"error: scores {name}: the trainer stopped with status {status}; the same command goes on from {run_dir}")

record = json.loads((run_dir / "eval.json").read_text())
log = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
curve = [[x["env_steps"], round(x["wall_seconds"], 1), round(x["gymnasium_return"], 1)] for x in log if "gymnasium_return" in x]
reached = [(steps, seconds) for steps, seconds, score in curve if score >= job["threshold"]]
shared = job["shared"]  # then the times count for nothing
record |= dict(
    command=job["command"], hardware=job["hardware"], commit=job["commit"], threshold=job["threshold"],
    steps_to_threshold=reached[0][0] if reached else None, seconds_to_threshold=reached[0][1] if reached and not shared else None,
    cores_shared=bool(shared), curve=curve,
    versions=record.get("versions") or {name: metadata.version(name) for name in ("torch", "mujoco", "gymnasium")},
)  # fmt: skip
beside = path.with_suffix(".tmp")
try:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(beside, path)
except OSError as error:
    beside.unlink(missing_ok=True)
    sys.exit(f"error: {path} cannot be written ({error.strerror}); the run is kept in {run_dir}")
outcome = f"reached after {reached[0][0]:,} steps, {reached[0][1]:,.0f} s" if reached else "not reached"
score, seconds = record["gymnasium"]["mean"], f"{record['train_seconds']:,.0f} s, compiled in {record['compile_seconds']:.0f} s"
show(path)
print(f"scores {name}: {score:,.0f} after {seconds}; {job['threshold']:,} {outcome}", file=sys.stderr)
PYTHON
}

# ----------------------------------------------------------------------------------------------------------------------
# peers: minutes of training against the score in Gymnasium's environment
#
# Each run trains one seed for the minutes of its task, on the same core. The clock excludes imports, evaluations and compilation, whose
# seconds each row has beside it: the first seed compiles from an empty cache, the others find what it compiled. A score is the mean return of 10 episodes with deterministic actions. Our trainers run
# with the defaults of the task, SB3 with the tuned settings of RL Baselines3 Zoo (SAC on the pendulum: SB3's defaults, the Zoo has none),
# CleanRL-style PPO with CleanRL's published settings on one environment.
# ----------------------------------------------------------------------------------------------------------------------

program_score_meter() {
  cat <<'PYTHON'
"""The meter of `peers`: it starts its clock when the program is ready, stops it now and then to score the policy, and ends the run
when the minutes are over.

The last argument of the program is the file that receives the curve: [environment steps, seconds, score]."""

import json
import os
import sys
import time
from pathlib import Path

settings, variant = json.loads(sys.argv[1]), sys.argv[2]
device, threads, seconds = "cpu", int(os.environ["OMP_NUM_THREADS"]), 60.0 * settings["minutes"]


class Meter:
    def __init__(self):
        self.curve, self.steps, self.elapsed = [], 0, 0.0

    def ready(self, act):
        """Imports are done; `act` maps a raw observation to the deterministic action."""
        self.act, self.clock = act, time.perf_counter()

    def tick(self, work):
        """Count `work` environment steps; score the policy after every sixth of the time."""
        now = time.perf_counter()
        self.steps += work
        self.elapsed += now - self.clock
        if self.elapsed >= (len(self.curve) + 1) * seconds / 6:
            self.curve.append([self.steps, round(self.elapsed, 1), round(score(self.act), 1)])
            Path(sys.argv[3]).write_text(json.dumps(self.curve))
            if self.elapsed >= seconds:
                os._exit(0)
        self.clock = time.perf_counter()


def score(act, episodes=10):
    """Mean return of whole episodes in Gymnasium's environment."""
    env, total = gymnasium.make(settings["env_id"]), 0.0
    for episode in range(episodes):
        obs, over = env.reset(seed=episode)[0], False
        while not over:
            action = np.clip(act(obs), env.action_space.low, env.action_space.high)
            obs, reward, terminated, truncated, _ = env.step(action)
            over, total = terminated or truncated, total + reward
    return total / episodes


meter = Meter()
PYTHON
}

program_peers_sb3() {
  cat <<'PYTHON'
"""Stable-Baselines3's PPO and SAC with the tuned settings of RL Baselines3 Zoo (hyperparams/ppo.yml and sac.yml, MuJoCo tasks)."""

import gymnasium
import numpy as np
import torch
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

wide = dict(log_std_init=-2, ortho_init=False, activation_fn=torch.nn.ReLU, net_arch=dict(pi=[256, 256], vf=[256, 256]))
ZOO = {
    "InvertedPendulum-v5": dict(
        batch_size=64, n_steps=32, gamma=0.999, learning_rate=0.000222425, ent_coef=1.37976e-07, clip_range=0.4, n_epochs=5,
        gae_lambda=0.9, max_grad_norm=0.3, vf_coef=0.19816),
    "HalfCheetah-v5": dict(
        batch_size=64, n_steps=512, gamma=0.98, learning_rate=2.0633e-05, ent_coef=0.000401762, clip_range=0.1, n_epochs=20,
        gae_lambda=0.92, max_grad_norm=0.8, vf_coef=0.58096, policy_kwargs=wide),
    "Hopper-v5": dict(
        batch_size=32, n_steps=512, gamma=0.999, learning_rate=9.80828e-05, ent_coef=0.00229519, clip_range=0.2, n_epochs=5,
        gae_lambda=0.99, max_grad_norm=0.7, vf_coef=0.835671, policy_kwargs=wide),
}  # fmt: skip
of_each = 200  # environment steps between looks at the clock


class Ticks(BaseCallback):
    def _on_step(self):
        if self.n_calls % of_each == 0:
            meter.tick(of_each)
        return True


torch.set_num_threads(threads)
env_id, seed = settings["env_id"], settings["seed"]
env = make_vec_env(env_id, 1, seed=seed)
if variant == "ppo":
    env = VecNormalize(env, gamma=ZOO[env_id]["gamma"])
    model = PPO("MlpPolicy", env, device="cpu", seed=seed, **ZOO[env_id])
    meter.ready(lambda obs: model.predict(env.normalize_obs(obs), deterministic=True)[0])
else:
    learning_starts = dict(learning_starts=10_000) if env_id != "InvertedPendulum-v5" else {}
    model = SAC("MlpPolicy", env, device="cpu", seed=seed, **learning_starts)
    meter.ready(lambda obs: model.predict(obs, deterministic=True)[0])
model.learn(1_000_000, callback=Ticks())
PYTHON
}

program_peers() {
  cat <<'PYTHON'
"""One run of `peers`, ours or another library's; writes results/peers/<task>/<contender>-seed<k>.json."""

import os
import re
import subprocess
import tempfile
import time

path = Path(job["path"])
name = f"{job['env_id']}, {job['contender']}, seed {job['seed']}"
if path.exists() and stands(f"peers {name}", path):
    sys.exit(0)
if job["dry_run"]:
    print(f"peers {name}: about {job['minutes']} minutes, evaluations apart")
    sys.exit(0)

folder = Path(tempfile.mkdtemp(dir=job["scratch"]))
launch = ["taskset", "-c", job["cores"]] if job["cores"] else []
threads = str(len(os.sched_getaffinity(0)) if not job["cores"] else job["threads"])
compiled = Path(job["scratch"]) / f"compiled-{job['contender']}-{job['env_id']}"  # empty for the first seed
environment = os.environ | dict(OMP_NUM_THREADS=threads, TORCHINDUCTOR_CACHE_DIR=str(compiled))


def run_peer():
    """Seconds of compilation, none, and the curve of a program that scores itself."""
    settings = dict(env_id=job["env_id"], seed=job["seed"], minutes=job["minutes"], num_envs=1, env_kwargs={})
    command = [*launch, job["python"], job["program"], json.dumps(settings), job["variant"], str(folder / "curve.json")]
    status = subprocess.run(command, env=environment, cwd=folder).returncode
    if status:
        sys.exit(f"error: peers {name}: stopped with status {status}")
    return 0.0, json.loads((folder / "curve.json").read_text())


def run_ours():
    """Seconds of compilation, and the curve of one of our trainers, from its log; ended when its minutes are over."""
    command = [*launch, *job["command"].replace("python", job["python"], 1).split(), "--run-dir", str(folder / "run")]
    metrics, curve = folder / "run/metrics.jsonl", []
    with (folder / "out").open("w") as out:
        trainer = subprocess.Popen(command, env=environment, cwd=job["root"], stdout=out, stderr=subprocess.STDOUT)
        while True:
            ended = trainer.poll() is not None
            lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
            if lines:
                prepared = float(re.search(r"prepared in ([0-9.]+) s", (folder / "out").read_text())[1])
                names = "env_steps", "wall_seconds", "gymnasium_return"
                curve = [[round(line[name], 1) for name in names] for line in lines if names[-1] in line]
                if not ended and curve and curve[-1][1] >= 60 * job["minutes"]:
                    trainer.kill()
            if ended:
                break
            time.sleep(0.5)
    if not curve:
        sys.exit(f"error: peers {name}: no evaluation; the trainer's output:\n{(folder / 'out').read_text()[-2000:]}")
    return prepared, curve


compile_seconds, curve = run_peer() if job["program"] else run_ours()
record = {name: job[name] for name in "env_id contender seed minutes command hardware commit versions".split()}
path.parent.mkdir(parents=True, exist_ok=True)
path.write_text(json.dumps(record | dict(compile_seconds=compile_seconds, curve=curve), indent=1) + "\n")
show(path)
print(f"peers {name}: {curve[-1][2]:,.0f} after {curve[-1][1]:.0f} s, {curve[-1][0]:,} steps", file=sys.stderr)
PYTHON
}

# ----------------------------------------------------------------------------------------------------------------------
# walk: the quadruped that `scores` trained, in its own simulator and in MuJoCo C
# ----------------------------------------------------------------------------------------------------------------------

program_walk() {
  cat <<'PYTHON'
"""Whole episodes of a trained quadruped in vecsim and in MuJoCo C, from one MJCF; adds `walk` to the results of its training.

The policy is deterministic, its statistics are frozen, nothing is randomised. Errors are means over the steps of all episodes."""

import os

path, checkpoint = Path(job["path"]), Path(job["run_dir"]) / "checkpoint.pt"
if job["dry_run"]:
    print(f"walk: {job['episodes']} episodes of 20 s in each simulator of {checkpoint}\n  about 5 minutes, 1 GiB (guessed)")
    sys.exit(0)
record = json.loads(path.read_text())
if stands("walk", path, done="walk" in record):
    sys.exit(0)
if not checkpoint.exists():
    sys.exit(f"error: walk: {path} is there, but not what it was trained to, {checkpoint}; --force trains again")
sys.path.insert(0, job["root"])

import gymnasium
import torch

import ppo_gpu_torch as ppo
import vecsim_torch

ERRORS = ("velocity_error", "yaw_error")


def outcome(returns, steps, fell, errors):
    names = dict(zip(ERRORS, (errors / steps.sum()).tolist(), strict=True))
    return dict(episodes=len(fell), without_a_fall=1 - fell.double().mean().item(), **names,
                episode_return=returns.mean().item(), seconds=steps.mean().item() / 50)  # fmt: skip


def judge(step, obs, episodes):
    """step(action (N, nu), running) -> obs, reward, terminated, truncated and errors, each (N, ...); first episodes count."""
    returns, steps, errors = torch.zeros(episodes), torch.zeros(episodes), torch.zeros(len(ERRORS))
    running, fell = torch.ones(episodes, dtype=torch.bool), torch.zeros(episodes, dtype=torch.bool)
    while running.any():
        obs, reward, terminated, truncated, error = step(agent.act(obs), running)
        returns += reward * running
        steps += running
        errors += (error * running[:, None]).sum(0)
        fell |= running & terminated
        running &= ~(terminated | truncated)
    return outcome(returns, steps, fell, errors)


def in_vecsim(env):
    def step(action, running):
        obs, reward, terminated, truncated, info = env.step(action)
        return obs, reward, terminated, truncated, torch.stack([info[name] for name in ERRORS], 1)

    return judge(step, env.reset(seed=args.seed)[0], env.num_envs)


def in_mujoco(episodes):
    options = ppo.gymnasium_options(args.env_kwargs)
    envs = [gymnasium.make(args.env_id, **options) for _ in range(episodes)]

    def step(action, running):
        rows = []
        for env, chosen, goes_on in zip(envs, action, running.tolist(), strict=True):
            if not goes_on:
                rows.append(idle)  # of an episode that is over: not counted
                continue
            obs, reward, terminated, truncated, info = env.step(chosen.numpy())
            rows.append((torch.as_tensor(obs), reward, terminated, truncated, [info[name] for name in ERRORS]))
        obs, *rest = zip(*rows, strict=True)
        return torch.stack(obs), *(torch.tensor(x) for x in rest)

    obs = torch.stack([torch.as_tensor(env.reset(seed=args.seed + k)[0]) for k, env in enumerate(envs)])
    idle = (obs[0], 0.0, False, False, [0.0] * len(ERRORS))
    return judge(step, obs, episodes)


torch.set_num_threads(1)
trained = ppo.load_checkpoint(str(checkpoint), "ppo")
args = ppo.Args(**trained["args"])
options = dict(integrator=args.integrator, iterations=args.solver_iterations) | ppo.gymnasium_options(args.env_kwargs)
env = vecsim_torch.make(args.env_id, job["episodes"], device="cpu", **options)
agent = ppo.Agent(env.single_observation_space.shape[0], env.single_critic_space.shape[0], env.single_action_space, args)
agent.load_state_dict(trained["agent"])
record["walk"] = dict(vecsim=in_vecsim(env), mujoco=in_mujoco(job["episodes"]))
beside = path.with_suffix(".tmp")
beside.write_text(json.dumps(record, indent=1) + "\n")
os.replace(beside, path)
show(path)
for name, found in record["walk"].items():
    shown = ", ".join(f"{key} {value:.3f}" for key, value in found.items() if key != "episodes")
    print(f"walk in {name}, {found['episodes']} episodes: {shown}", file=sys.stderr)
PYTHON
}

# ----------------------------------------------------------------------------------------------------------------------
# distill: teacher, student, fine-tuned student and blind baseline
# ----------------------------------------------------------------------------------------------------------------------

program_distill() {
  cat <<'PYTHON'
"""One run of ppo_distill_teacher_student.py; writes results/distill/<task>/: its evidence, its pictures and the curves of its stages.

An interrupted run goes on from its last checkpoint."""

import os
import shlex
import shutil
import subprocess

run_dir, folder = Path(job["run_dir"]), Path(job["path"])
path, stages = folder / "evidence.json", ("teacher", "student", "finetune", "baseline")
if path.exists() and stands(f"distill {folder.name}", path):
    sys.exit(0)
if job["dry_run"]:
    print(f"distill {folder.name}: {job['command']}\n  about {job['minutes']} minutes on one core, 2 GiB (guessed)")
    sys.exit(0)

if job["force"] and (run_dir / "evidence.json").exists():
    shutil.rmtree(run_dir)  # a finished run; one that was interrupted goes on, forced or not
if not (run_dir / "evidence.json").exists():
    checkpoints = [file for stage in stages if (file := run_dir / stage / "checkpoint.pt").exists()]
    if checkpoints:
        how = ["--resume", str(checkpoints[-1])]
    else:
        shutil.rmtree(run_dir, ignore_errors=True)  # cut off before its first checkpoint
        how = ["--run-dir", str(run_dir)]
    launch = ["taskset", "-c", job["cores"]] if job["cores"] else []
    status = subprocess.run([*launch, job["python"], *shlex.split(job["command"])[1:], *how], cwd=job["root"]).returncode
    if status:
        sys.exit(f"error: distill {folder.name}: the trainer stopped with status {status}; the same command goes on from {run_dir}")

record = json.loads((run_dir / "evidence.json").read_text())
columns = ["env_steps", "wall_seconds", "velocity_error", "episode_length", "terrain_level", "imitation_loss"]
logs = {stage: [json.loads(line) for line in (run_dir / stage / "metrics.jsonl").read_text().splitlines()] for stage in stages}
curves = {
    stage: [[x if (x := line.get(name)) is None else float(f"{x:.6g}") for name in columns] for line in log]
    for stage, log in logs.items()
}
record |= dict(command=job["command"], hardware=job["hardware"], commit=job["commit"], curve_columns=columns, curves=curves)
record["args"] |= dict(run_dir=None, resume=None)
folder.mkdir(parents=True, exist_ok=True)
for name in ("evidence.csv", "evidence.png", "pictures.png"):
    if (run_dir / name).exists():
        shutil.copy(run_dir / name, folder / name)
beside = path.with_suffix(".tmp")
beside.write_text(json.dumps(record, indent=1) + "\n")
os.replace(beside, path)
show(path)
PYTHON
}

# ----------------------------------------------------------------------------------------------------------------------
# seeds: many agents in one program of ppo_mjx_jax.py
# ----------------------------------------------------------------------------------------------------------------------

program_seeds() {
  cat <<'PYTHON'
"""Trainings of 1 and of 8 agents in turn, each in a fresh process and compiled cold; writes results/mjx/seeds.json.

Times are the trainer's own: training, with compilation apart and without evaluation."""

import os
import shlex
import statistics
import subprocess

path, counts = Path(job["path"]), (1, 8)
if path.exists() and stands("seeds", path):
    sys.exit(0)
if job["dry_run"]:
    print(f"seeds: {job['repeats']} times {' and '.join(map(str, counts))} agents: {job['command']} --num-seeds K\n  about 10 minutes, 1.5 GiB (guessed)")
    sys.exit(0)

launch = ["taskset", "-c", job["cores"]] if job["cores"] else []
runs = {count: [] for count in counts}
for repeat in range(job["repeats"]):
    for count in counts:
        run_dir = Path(job["scratch"]) / f"{count}-agents-{repeat}"
        flags = [*shlex.split(job["command"])[1:], "--num-seeds", str(count), "--run-dir", str(run_dir)]
        status = subprocess.run([*launch, job["python"], *flags], cwd=job["root"], stdout=subprocess.DEVNULL).returncode
        if status:
            sys.exit(f"error: seeds: the trainer of {count} agents stopped with status {status}")
        runs[count].append(json.loads((run_dir / "eval.json").read_text()))
        last = runs[count][-1]
        say = f"round {repeat + 1}/{job['repeats']}  {count} agents: {last['train_seconds']:.1f} s, compiled in {last['compile_seconds']:.1f} s"
        print(say, file=sys.stderr)


def row(count):
    names = ("train_seconds", "compile_seconds")
    values = {name: [round(run[name], 2) for run in runs[count]] for name in names}
    medians = {f"median_{name}": statistics.median(values[name]) for name in names}
    return dict(num_seeds=count, env_steps=runs[count][0]["env_steps"], **values, **medians)


rows = [row(count) for count in counts]
record = {name: runs[1][0][name] for name in ("env_id", "algorithm", "versions")}
record |= {name: job[name] for name in ("command", "hardware", "commit")}
ratio = rows[-1]["median_train_seconds"] / rows[0]["median_train_seconds"]
record |= dict(rows=rows, times_one_seed=ratio)
beside = path.with_suffix(".tmp")
path.parent.mkdir(parents=True, exist_ok=True)
beside.write_text(json.dumps(record, indent=1) + "\n")
os.replace(beside, path)
show(path)
print(f"seeds: {counts[-1]} agents take {ratio:.2f} times as long as one", file=sys.stderr)
PYTHON
}

# ----------------------------------------------------------------------------------------------------------------------
# stages, for the mode profile: of a trainer's iteration
# ----------------------------------------------------------------------------------------------------------------------

program_stages() {
  cat <<'PYTHON'
"""A short training under --profile; writes results/profile/<script>-<task>.json, the trainer's own table and what it was measured on.

A trainer of several stages has a table, and so a file, for each."""

import os
import shlex
import subprocess
import tempfile
from importlib import metadata

path = Path(job["path"])
if stands(f"profile {path.stem}", *path.parent.glob(path.name), *path.parent.glob(f"{path.stem}-*.json")):
    sys.exit(0)
if job["dry_run"]:
    print(f"profile {path.stem}: {job['command']}\n  about 3 minutes, 1.5 GiB (guessed)")
    sys.exit(0)
launch = ["taskset", "-c", job["cores"]] if job["cores"] else []
with tempfile.TemporaryDirectory(dir=job["scratch"]) as scratch:
    run_dir = Path(scratch) / "run"
    trainer = [*launch, job["python"], *shlex.split(job["command"])[1:], "--run-dir", str(run_dir)]
    status = subprocess.run(trainer, cwd=job["root"], stdout=subprocess.DEVNULL).returncode
    if status:
        sys.exit(f"error: profile {path.stem}: the trainer stopped with status {status}")
    tables = {file.parent.relative_to(run_dir).name: json.loads(file.read_text()) for file in run_dir.rglob("profile.json")}
packages = ("jax", "mujoco-mjx", "gymnasium") if "jax" in job["script"] else ("torch", "mujoco", "gymnasium")
path.parent.mkdir(parents=True, exist_ok=True)
for stage, record in tables.items():  # "" where a trainer has but one
    record |= {name: job[name] for name in ("script", "env_id", "command", "hardware", "commit")} | dict(stage=stage)
    record |= dict(versions={name: metadata.version(name) for name in packages})
    file = path.with_stem(f"{path.stem}-{stage}" if stage else path.stem)
    beside = file.with_suffix(".tmp")
    beside.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(beside, file)
    show(file)
PYTHON
}

# ----------------------------------------------------------------------------------------------------------------------
# film: trained robots side by side
# ----------------------------------------------------------------------------------------------------------------------

program_film() {
  cat <<'PYTHON'
"""The newest PPO run of each task that `scores` kept, four seconds from one episode of Gymnasium's own environment; writes results/robots.gif,
and beside it robots.json: which runs they are of, command, commit and versions."""

import json
import os
import sys
from importlib import metadata
from pathlib import Path

if "DISPLAY" not in os.environ:
    os.environ.setdefault("MUJOCO_GL", "egl")
import gymnasium
import ppo_gpu_torch as ppo
import torch
from PIL import Image, ImageDraw

runs, path = Path(sys.argv[1]), Path(sys.argv[2]) / "robots.gif"
tasks = ("Hopper-v5", "HalfCheetah-v5", "Walker2d-v5", "Ant-v5", "Humanoid-v5")
SIZE, FRAMES, PER_SECOND, SKIPPED_SECONDS = 200, 60, 15, 2.0


def frames_of(checkpoint_path):
    checkpoint = torch.load(checkpoint_path, map_location="cpu", weights_only=True)
    args = ppo.with_task_defaults(ppo.Args(**checkpoint["args"] | dict(device="cpu", resume=None, play=None)))
    options = dict(camera_name="track", width=2 * SIZE, height=2 * SIZE) | ppo.gymnasium_options(args.env_kwargs)
    env = gymnasium.make(args.env_id, render_mode="rgb_array", **options)
    agent = ppo.Agent(env.observation_space.shape[0], None, env.action_space, args)
    agent.load_state_dict(checkpoint["agent"])
    obs, _ = env.reset(seed=args.seed)
    dt, images, step = env.unwrapped.dt, [], 0
    while len(images) < FRAMES:
        if step * dt >= SKIPPED_SECONDS + len(images) / PER_SECOND:
            images.append(Image.fromarray(env.render()).resize((SIZE, SIZE), Image.Resampling.LANCZOS))
        obs, _, terminated, truncated, _ = env.step(agent.act(torch.as_tensor(obs).float()[None])[0].numpy())
        step += 1
        if terminated or truncated:
            obs, _ = env.reset()
    env.close()
    for image in images:
        ImageDraw.Draw(image).text((6, 4), args.env_id, fill="white")
    return images


strips, filmed = [], {}
for task in tasks:
    found = sorted(runs.glob(f"*/{task}-seed*/checkpoint.pt"), key=lambda file: file.stat().st_mtime)
    if found:
        print(f"film: {task} from {found[-1]}", file=sys.stderr)
        strips.append(frames_of(found[-1]))
        filmed[task] = found[-1].parent.relative_to(runs).as_posix()  # commit of its training, then its name
    else:
        print(f"film: {task} is left out: no run of it yet; ./benchmark.sh scores --env-id {task} makes one", file=sys.stderr)
if not strips:
    sys.exit(f"error: no trained robot under {runs}; ./benchmark.sh scores trains them")
film = []
for moment in zip(*strips, strict=True):
    frame = Image.new("RGB", (SIZE * len(moment), SIZE))
    for column, image in enumerate(moment):
        frame.paste(image, (SIZE * column, 0))
    film.append(frame.quantize(64, dither=Image.Dither.NONE))
path.parent.mkdir(parents=True, exist_ok=True)
film[0].save(path, save_all=True, append_images=film[1:], duration=1000 // PER_SECOND, loop=0, optimize=True)
record = dict(command=sys.argv[3], commit=sys.argv[4], runs=filmed)
record |= dict(versions={name: metadata.version(name) for name in ("torch", "mujoco", "gymnasium", "pillow")})
path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
print(path)
PYTHON
}

# ----------------------------------------------------------------------------------------------------------------------
# table and cost: what README shows, from the files alone
# ----------------------------------------------------------------------------------------------------------------------

program_table() {
  cat <<'PYTHON'
"""python table.py RESULTS MODES [DOLLARS_PER_HOUR [LIST]]: markdown tables of what is finished; LIST names the files to show, else all."""

import json
import re
import statistics
import sys
from pathlib import Path

ALGORITHMS = {"ppo": "PPO", "ppo_mjx": "PPO, JAX"}
PEERS = {"ours-ppo": "ours, PPO", "ours-sac": "ours, SAC", "sb3-ppo": "SB3, PPO", "sb3-sac": "SB3, SAC",
         "cleanrl-ppo": "CleanRL-style, PPO"}  # fmt: skip
PEERS_GOALS = {"InvertedPendulum-v5": 1000, "HalfCheetah-v5": 3000, "Hopper-v5": 2500}
results, modes = Path(sys.argv[1]), sys.argv[2].split(",")
dollars = float(sys.argv[3]) if len(sys.argv) > 3 and sys.argv[3] else None
shown = {Path(line).resolve() for line in Path(sys.argv[4]).read_text().splitlines()} if len(sys.argv) > 4 else None


def files(pattern, folder=results):
    return [path for path in sorted(folder.glob(pattern)) if shown is None or path.resolve() in shown]


def print_table(header, rows):
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def speed(row):
    median, minimum, maximum = (f"{row[k]:,.0f}" if row["median"] >= 100 else f"{row[k]:.2f}" for k in ("median", "minimum", "maximum"))
    return f"{median} ({minimum} to {maximum})"


def memory(row):
    return ", ".join(f"{value / 1024:.1f} GiB {where}" for where, value in row["peak_memory_mib"].items())


def reference_of(record):
    """Name and row of the contender that the others are held against; the row is None where it was not measured."""
    name = record.get("reference", record["rows"][0]["contender"])
    return name, next((row for row in record["rows"] if row["contender"] == name), None)


def times(reference, row):
    if reference is None:
        return "-"
    ratio = reference["median"] / row["median"]
    return "1" if row is reference else f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


def number(row, name):
    return f"{row[name]:.0e}" if name in row else "-"


def kernels(row):
    count = row.get("kernels_per_physics_step")
    return "-" if count is None else f"{count:.1f}"


def starts(row):
    """The first start, with empty compiler caches, and the second; an older row has one start, of unknown kind."""
    both = ("first_start_seconds", "warmup_seconds")
    return [f"{row[x]:.0f} s" if "first_start_seconds" in row else "-" for x in both]


def settings_line(record):
    hidden = "env_id env_kwargs device states xml hidden ours".split()
    words = [f"{k.replace('_', ' ')} {v}" for k, v in record["settings"].items() if k not in hidden]
    row = record["rows"][0]
    cores, most = f"{row['cores']} core{'s' if row['cores'] > 1 else ''}", max(len(row["values"]) for row in record["rows"])
    versions = ", ".join(f"{k} {v}" for k, v in sorted({i for r in record["rows"] for i in r["versions"].items()}))
    print(f"\n{cores} of {record['hardware']}; {', '.join(words)}; {most} windows of {record['seconds']} s in turn.")
    print(f"{versions}. Commit {record['commit']}, `{record['command']}`.")
    for name, reason in record["failed"].items():
        print(f"{name} is missing: {reason.split(' (log:')[0]}.")
    for row in record["rows"]:
        if "stopped" in row:
            print(f"{row['contender']} has {len(row['values'])} of them; it stopped: {row['stopped'].split(' (log:')[0]}.")
        if row.get("measured_later"):
            print(f"{row['contender']} was measured in a later run, not in turn with the others; commit {row['commit']}.")


def comparison_table(record):
    name, reference = reference_of(record)
    header = ["", record["unit"], f"{name} / this row"]
    if record["mode"] == "sim":
        header += ["error of one step, median", "p99"]
    started_twice = any("first_start_seconds" in row for row in record["rows"])  # no row of an older file was
    rows = []
    for row in record["rows"]:
        cells = [row["contender"], speed(row), times(reference, row)]
        if record["mode"] == "sim":
            cells += [number(row, "step_error_p50"), number(row, "step_error_p99")]
        rows.append([*cells, *(starts(row) if started_twice else []), memory(row)])
    print_table([*header, *(["first start", "second start"] if started_twice else []), "memory"], rows)


def cost_table(record):
    """Per joule where the hardware told, per dollar where the user gave a price."""
    rows = []
    for row in record["rows"]:
        joules = sorted(row["joules_per_unit"])
        watts = "-" if not joules else f"{joules[len(joules) // 2] * row['median']:,.0f}"
        per_joule = "-" if not joules else f"{1 / joules[len(joules) // 2]:,.0f}"
        per_dollar = "-" if dollars is None else f"{row['median'] * 3600 / dollars / 1e6:,.1f} M"
        rows.append([row["contender"], f"{row['median']:,.0f}", watts, per_joule, per_dollar, memory(row)])
    print_table(["", record["unit"], "watts", "steps per joule", "steps per dollar", "memory"], rows)
    missing = [] if any(row["joules_per_unit"] for row in record["rows"]) else ["this machine tells no power"]
    missing += ["no --dollars-per-hour was given"] if dollars is None else []
    print("\n" + "; ".join([f"{dollars} dollars per hour"] if dollars else []) + "; ".join(missing))


def scaling_tables(records):
    """One line for each number of environments or processes: each is a comparison of its own."""
    groups = {}
    for record in records:
        groups.setdefault(re.sub(r"-\d+-(envs|processes)", r"-\1", record["case"]), []).append(record)
    for case, members in groups.items():
        print(f"\n**scaling, {case}**\n")
        rows = [r["rows"][0] for r in members]
        rows.sort(key=lambda row: int(row["contender"].split()[0]))
        print_table(
            ["", rows[0]["unit"], "kernels per physics step", "imports and compilation", "memory"],
            [[row["contender"], speed(row), kernels(row), f"{row['warmup_seconds']:.0f} s", memory(row)] for row in rows],
        )
        settings = {name: value for name, value in members[0]["settings"].items() if name != "num_envs" or "processes" in case}
        settings_line(members[0] | dict(settings=settings))


def score_tables():
    """A table for each set; a line for the seeds of a task that trained for the same number of steps. Each seed's command is in its file."""
    sets = {}
    for path in files("*/*-seed*.json"):
        run = json.loads(path.read_text())
        if run.get("gymnasium"):
            groups = sets.setdefault(path.parent.name, {})
            groups.setdefault((path.stem.rsplit("-seed", 1)[0], run["env_steps"]), []).append(run)
    for name, groups in sets.items():
        shared = any(run.get("cores_shared") for runs in groups.values() for run in runs)  # then times say nothing, and steps stand for them
        header = ["task", "algorithm", "seeds", "environment steps", *([] if shared else ["training, s", "compiled in, s"])]
        header += ["score of each seed (20 episodes)", "in the training simulator, mean (lowest)", "threshold"]
        header += ["reached after, environment steps" if shared else "reached after, s"]
        print(f"\n**scores in Gymnasium's own environments, {name}**\n")
        print_table(header, [score_line(runs, shared) for runs in groups.values()])


def seconds_of_compilation(run):
    return f"{run['compile_seconds']:,.0f}" if "compile_seconds" in run else "-"


def score_line(runs, shared):
    first = runs[0]
    simulated = [run.get("vecsim") or run.get("mjx") for run in runs]
    reached = [run.get("steps_to_threshold" if shared else "seconds_to_threshold") for run in runs]
    columns = [
        [str(run["seed"]) for run in runs],
        [f"{first['env_steps']:,}"],
        *([] if shared else [[f"{run['train_seconds']:,.0f}" for run in runs], [seconds_of_compilation(run) for run in runs]]),
        [f"{run['gymnasium']['mean']:,.0f} ± {run['gymnasium']['std']:,.0f}" for run in runs],
        [f"{score['mean']:,.0f} ({score['min']:,.0f})" if score else "-" for score in simulated],
        [f"{first['threshold']:,}" if "threshold" in first else "-"],
        ["not reached" if x is None else f"{x:,.0f}" for x in reached] if "threshold" in first else ["-"],
    ]
    algorithm = ALGORITHMS.get(first["algorithm"], first["algorithm"].upper())
    return [first["env_id"], algorithm, *(" / ".join(column) for column in columns)]


def peers_tables():
    """Scores after the same minutes of training on the same core, and minutes to a score."""
    runs = [json.loads(path.read_text()) for path in files("peers/*/*-seed*.json")]
    for env_id in sorted({run["env_id"] for run in runs}):
        rows = []
        for contender, title in PEERS.items():
            members = [run for run in runs if (run["env_id"], run["contender"]) == (env_id, contender)]
            if not members:
                continue
            goal = PEERS_GOALS[env_id]
            first = [next((t for _, t, score in run["curve"] if score >= goal), None) for run in members]
            compiled = [run["compile_seconds"] for run in members]
            rows.append([
                title, str(len(members)), f"{statistics.median_low(run['curve'][-1][0] for run in members):,}",
                " / ".join(f"{run['curve'][-1][2]:,.0f}" for run in members),
                " / ".join("-" if t is None else f"{t:,.0f}" for t in first),
                " / ".join(f"{t:.0f}" for t in compiled) if any(compiled) else "0",
            ])  # fmt: skip
        minutes = max(run["minutes"] for run in runs if run["env_id"] == env_id)
        print(f"\n**{env_id}, {minutes:g} minute{'s' if minutes != 1 else ''} of training on one core**\n")
        header = "", "seeds", "environment steps", "score of each seed (10 episodes)"
        print_table([*header, f"{PEERS_GOALS[env_id]:,} reached after, s", "compilation, s"], rows)


def candidate_tables():
    """The settings that could be SAC's default: scores after the whole budget, and the time that they take."""
    runs = {}
    for path in files("sac/candidates/*-seed*.json"):
        runs.setdefault(path.stem.split("-seed")[0], []).append(json.loads(path.read_text()))
    rows = []
    for name, members in runs.items():
        task, scores = members[0]["env_id"], [run["gymnasium"]["mean"] for run in members]
        flags = members[0]["command"].split(f"--env-id {task} ")[1].split(" --seed")[0]
        reached = [run["seconds_to_threshold"] for run in members]
        rows.append([
            name.removeprefix(f"{task}-").replace("-", " "), f"{statistics.median_low(scores):,.0f}",
            " / ".join(f"{score:,.0f}" for score in scores), " / ".join(f"{run['train_seconds']:,.0f}" for run in members),
            " / ".join("-" if seconds is None else f"{seconds:,.0f}" for seconds in reached), f"`{flags}`",
        ])  # fmt: skip
    if rows:
        first = members[0]
        print(f"\n**candidates for SAC's default, {task}, {first['env_steps']:,} environment steps of each**\n")
        header = "", "score, median", "score of each seed (20 episodes)", "training, s"
        print_table([*header, f"{first['threshold']:,} reached after, s", "flags"], rows)


def ablation_tables():
    """The ladder, rung by rung, then the variants of the highest; each with the flags that it adds. Scores after the whole budget, and
    over the curve, which luck at the end moves less."""
    for folder in sorted(results.glob("sac/ablation/*")):
        runs = {}
        for path in files("*-seed*.json", folder):
            runs.setdefault(path.stem.split("-seed")[0], []).append(json.loads(path.read_text()))
        flags_of = {name: members[0]["command"].split(f"--env-id {folder.name} ")[1].split(" --num-envs")[0] for name, members in runs.items()}
        ladder = sorted((name for name, flags in flags_of.items() if "vanilla" in flags), key=lambda name: len(flags_of[name]))
        rows, below = [], ""
        for name in ladder + [name for name in flags_of if name not in ladder]:
            members, rung = runs[name], name in ladder
            last = [run["gymnasium"]["mean"] for run in members]
            over_curve = [statistics.fmean(score for _, _, score in run["curve"]) for run in members]
            numbers = [statistics.median(last), min(last), statistics.median(over_curve), min(over_curve)]
            added = flags_of[name].removeprefix(below).strip()
            words = ("+ " if rung and below else "") + name.replace("-", " ")
            rows.append([words, *(f"{x:,.0f}" for x in numbers), str(len(members)), f"`{added}`"])
            below = flags_of[name] if rung else below
        if rows:
            steps = members[0]["env_steps"]
            print(f"\n**SAC, trick upon trick, {folder.name}, {steps:,} environment steps of each**\n")
            print_table(["", "score, median", "worst", "mean over the curve, median", "worst", "seeds", "flags"], rows)
            print(f"\nScores of 20 episodes in Gymnasium's own environment. Commit {members[0]['commit']}, `./benchmark.sh ablate`.")


def written_numbers(command):
    """What follows the flags of a command, in order: environments, steps, minibatches, layers."""
    return [int(word) for word in command.split(" --seed")[0].split() if word.isdecimal()]


def sizes_tables():
    """PPO with other sizes on the same budget."""
    for folder in sorted(results.glob("ppo/sizes/*")):
        runs = {}
        for path in files("*-seed*.json", folder):
            runs.setdefault(path.stem.split("-seed")[0], []).append(json.loads(path.read_text()))
        rows = []
        for members in sorted(runs.values(), key=lambda members: written_numbers(members[0]["command"])):
            flags = members[0]["command"].split(f"--env-id {folder.name} ")[1].split(" --seed")[0]
            last = [run["gymnasium"]["mean"] for run in members]
            seconds = statistics.median(run["train_seconds"] for run in members)
            rows.append([f"`{flags}`", f"{statistics.median(last):,.0f}", f"{min(last):,.0f}", f"{seconds:,.0f}"])
        if not rows:
            continue
        first = members[0]
        print(f"\n**PPO by its sizes, {folder.name}, {first['env_steps']:,} environment steps**\n")
        print_table(["sizes", "score, median", "worst", "training, s"], rows)
        print(f"\n{len(members)} seeds of each. Scores of 20 episodes in Gymnasium's own environment. {first['hardware']}. Commit {first['commit']}, `./benchmark.sh sizes`.")


def seeds_table(record):
    def both(row):  # of each run, what its user waits for
        return statistics.median(map(sum, zip(row["train_seconds"], row["compile_seconds"], strict=True)))

    rows, one = [], record["rows"][0]
    for row in record["rows"]:
        seconds = row["train_seconds"]
        times = row["median_train_seconds"] / one["median_train_seconds"]
        spread = f"{row['median_train_seconds']:,.1f} s ({min(seconds):,.1f} to {max(seconds):,.1f})"
        cells = [str(row["num_seeds"]), spread, f"{times:.2f}", f"{row['median_compile_seconds']:,.1f} s"]
        rows.append([*cells, f"{both(row):,.1f} s", f"{both(row) / both(one):.2f}", f"{row['env_steps']:,}"])
    print(f"\n**agents in one program, {record['env_id']}**\n")
    header = ["agents", "training time", "training, times one agent", "compiled in", "both", "both, times one agent", "environment steps of each"]
    print_table(header, rows)
    versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items())
    print(f"\n{record['hardware']}; {len(seconds)} trainings of each in turn. {versions}. Commit {record['commit']}, `{record['command']} --num-seeds K`.")


def parity_table(record):
    """Worst errors that the tests measured; they name a model as its task or as its MJCF file, a row has both."""
    rows = {}
    for model, worst in record["rows"].items():
        rows.setdefault(re.sub("[^a-z0-9]|_?-?v5$", "", model.lower()), {"task": model}).update(worst | ({"task": model} if "-" in model else {}))
    columns = ["qacc", "qpos after a step of euler", "qpos after a step of implicitfast", "qpos after a step of rk4", "observation of Gymnasium"]
    print("\n**worst relative error against MuJoCo C, float64**\n")
    print_table(["task", *columns], [[row["task"], *(number(row, column) for column in columns)] for row in rows.values()])
    print(f"\n`{record['command']}`, {', '.join(f'{k} {v}' for k, v in record['versions'].items())}.")


def physics_table(records):
    """Of `python vecsim_torch.py --json`: whole environment steps beside MuJoCo C's physics alone, in one run."""
    rows = []
    for run in records:
        ours, theirs = run["physics_steps_per_second"], run["mujoco_c_physics_steps_per_second"]
        errors = [f"{run['qacc_error_p99_by_iterations'][count]:.0e}" for count in "234"]
        where = f"{run['threads']} of {run['hardware']}" if run["device"] == "cpu" else run["hardware"]
        rows.append([run["env_id"], f"{ours:,.0f}", f"{theirs:,.0f}", f"{ours / theirs:.2f}", f"{run['compile_seconds']:.0f} s", *errors, where])
    print("\n**vecsim, whole environment steps, beside MuJoCo C's physics alone on one core**\n")
    header = ["task", "vecsim, physics steps/s", "MuJoCo C", "vecsim / MuJoCo C", "compiled in"]
    header += ["error of qacc, 99th percentile, 2 iterations", "3 iterations", "4 iterations", "cores"]
    print_table(header, rows)


def profile_table(records):
    names = ("simulate", "infer", "targets", "sample", "update", "the rest")
    rows = []
    for run in records:
        stages = [run["stages"].get(name) for name in names]
        cells = [f"{stage['seconds'] * 1e3:,.1f} ms ({stage['share']:.0%})" if stage else "-" for stage in stages]
        script = f"`{run['script']}`" + (f", {run['stage']}" if run.get("stage") else "")
        rows.append([script, run["env_id"], f"{run['steps']:,}", *cells])
    print("\n**where an iteration's time goes**\n")
    print_table(["script", "task", "steps per iteration", *names], rows)
    print(f"\n{records[0]['hardware']}. Commit {records[0]['commit']}, by `./benchmark.sh profile`.")


def walk_table(record):
    rows = [
        [name, str(found["episodes"]), f"{found['without_a_fall']:.0%}", *(f"{found[error]:.3f}" for error in ("velocity_error", "yaw_error")), f"{found['episode_return']:.1f}"]
        for name, found in (("vecsim", record["walk"]["vecsim"]), ("MuJoCo C", record["walk"]["mujoco"]))
    ]
    print(f"\n**a quadruped trained in vecsim, {record['env_steps']:,} environment steps in {record['train_seconds']:,.0f} s**\n")
    print_table(["simulator", "episodes of 20 s", "without a fall", "velocity error, m/s", "turning error, rad/s", "return"], rows)
    print(f"\n{record['hardware']}. Commit {record['commit']}, `{record['command']}`.")


def distill_table(record):
    """Tracking score and share of falls of each policy under each perturbation."""
    summary, policies = record["summary"], list(record["policies"])

    def share(policy, name):  # of next to nothing it says nothing
        return f"{summary[policy][name]['tracking_of_teacher']:.0%}" if summary[policies[0]][name]["tracking"] >= 0.05 else "-"

    rows = [
        [name.replace("_", " "), *(f"{summary[policy][name]['tracking']:.2f} ({summary[policy][name]['falls']:.0%})" for policy in policies),
         *(share(policy, name) for policy in policies[1:])]
        for name in record["perturbations"]
    ]  # fmt: skip
    print(f"\n**teacher and students, {record['env_id']}: tracking score (falls), and share of the teacher's score**\n")
    print_table(["", *policies, *(f"{policy}, of teacher" for policy in policies[1:])], rows)
    rows = [[policy, f"{x['env_steps']:,}", f"{x['train_seconds']:,.0f} s"] for policy, x in record["policies"].items()]
    print()
    print_table(["", "environment steps", "training"], rows)
    print(f"\n{record['hardware']}. Commit {record['commit']}, `{record['command']}`.")


records = [json.loads(path.read_text()) for path in files("benchmark/*.json")]
if "physics" in modes:
    if (results / "parity.json").exists():
        parity_table(json.loads((results / "parity.json").read_text()))
    if runs := [json.loads(path.read_text()) for path in sorted(results.glob("vecsim/*.json"))]:
        physics_table(runs)
for record in records:
    if record["mode"] in modes and record["mode"] != "scaling":
        print(f"\n**{record['mode']}, {record['case']}**\n")
        comparison_table(record)
        settings_line(record)
    if record["mode"] == "train" and "cost" in modes:
        print(f"\n**cost, {record['case']}**\n")
        cost_table(record)
if "scaling" in modes:
    scaling_tables([record for record in records if record["mode"] == "scaling"])
if "profile" in modes and (runs := [json.loads(path.read_text()) for path in files("profile/*.json")]):
    profile_table(runs)
if "scores" in modes:
    score_tables()
    candidate_tables()
if "peers" in modes:
    peers_tables()
if "ablate" in modes:
    ablation_tables()
if "sizes" in modes:
    sizes_tables()
if "walk" in modes:
    for path in files("quadruped/*.json"):
        walk_table(json.loads(path.read_text()))
if "distill" in modes:
    for path in files("distill/*/evidence.json"):
        distill_table(json.loads(path.read_text()))
if "seeds" in modes:
    for path in files("mjx/seeds.json"):
        seeds_table(json.loads(path.read_text()))
PYTHON
}

# ----------------------------------------------------------------------------------------------------------------------
# plot
# ----------------------------------------------------------------------------------------------------------------------

program_plot() {
  cat <<'PYTHON'
"""python plot.py RESULTS: the curves.png of each folder, speed.png and scaling.png from the files in RESULTS."""

import json
import re
import statistics
import sys
import textwrap
from pathlib import Path

from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

results = Path(sys.argv[1])
INK, FAINT, OURS, THEIRS = "#22262b", "#8a9099", "#1f6feb", "#b6bec9"
COLOURS = {"ppo": "#1f6feb", "sac": "#d9480f", "ppo_mjx": "#2b8a3e", "distill": "#7048e8",
           "teacher": "#2b8a3e", "student": "#1f6feb", "finetune": "#d9480f", "baseline": "#8a9099"}  # fmt: skip
rcParams.update({
    "font.size": 10, "axes.edgecolor": FAINT, "axes.labelcolor": INK, "text.color": INK, "xtick.color": FAINT,
    "ytick.color": FAINT, "axes.spines.top": False, "axes.spines.right": False, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.titlesize": 11,
})  # fmt: skip


def save(figure, name):
    figure.savefig(results / name, dpi=150, facecolor="white")
    print(results / name)


def short(value, _=None):
    """1,234,567 -> 1.23M"""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def grid(figure, lines, columns, count):
    """`count` panels in a grid; those that are left over stay blank."""
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis in panels[count:]:
        axis.set_visible(False)
    return panels[:count]


def plot_curves():
    """Score in Gymnasium's own environment over training time: one panel for each task, one line for each seed."""
    runs = {}
    for path in sorted(results.glob("*/*-seed*.json")):
        run = json.loads(path.read_text())
        apart = path.parent.name == "mjx" or path.stem.split("-seed")[0].endswith("-ppo")  # plot_twins, plot_off_policy
        if run.get("curve") and not apart and not run.get("cores_shared"):
            runs.setdefault(run["env_id"], []).append(run)
    if not runs:
        return
    columns = min(3, len(runs))
    lines = -(-len(runs) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.1 * lines + 0.5), layout="constrained")
    panels = grid(figure, lines, columns, len(runs))
    for axis, (env_id, members) in zip(panels, runs.items()):
        longest = max(run["curve"][-1][1] for run in members)
        unit, name = (60.0, "minutes") if longest > 180 else (1.0, "seconds")
        for line, algorithm in enumerate(sorted({run["algorithm"] for run in members}, reverse=True)):
            colour, seeds = COLOURS.get(algorithm, INK), [run for run in members if run["algorithm"] == algorithm]
            for run in seeds:
                axis.plot([p[1] / unit for p in run["curve"]], [p[2] for p in run["curve"]], "-", color=colour, lw=1.6, alpha=0.75)
                axis.plot(run["curve"][-1][1] / unit, run["curve"][-1][2], "o", color=colour, ms=4.5)
            last = [run["curve"][-1][2] for run in seeds]
            label = f"{algorithm.upper()}  {last[0]:,.0f}, one seed"
            if len(last) > 1:
                label = f"{algorithm.upper()}  median {statistics.median(last):,.0f}, worst {min(last):,.0f} of {len(last)} seeds"
            axis.annotate(label, (0.98, 0.05 + 0.09 * line), xycoords="axes fraction", ha="right", color=colour, weight="bold", size=8.5)
        threshold = next((run["threshold"] for run in members if "threshold" in run), None)
        if threshold:
            axis.axhline(threshold, color=FAINT, lw=1, ls=(0, (4, 3)), zorder=0)
            axis.annotate(f"{threshold:,}", (0, threshold), (3, 3), xycoords=("axes fraction", "data"),
                          textcoords="offset points", color=FAINT, size=8)  # fmt: skip
        axis.set_title(env_id)
        axis.set_xlabel(f"{name} of training")
        axis.set_xlim(left=0)
        lowest = min(p[2] for run in members for p in run["curve"])
        axis.set_ylim(min(0.0, 1.1 * lowest), None)
        axis.margins(y=0.1)
        axis.yaxis.set_major_formatter(FuncFormatter(short))
        axis.grid(axis="y", color="#eceff2")
        axis.set_axisbelow(True)
    hardware = "; ".join(sorted({run["hardware"].split(", shared")[0] for members in runs.values() for run in members}))
    figure.suptitle("Deterministic score in gymnasium.make(task), one line for each seed", x=0.01, ha="left", size=11)
    figure.supxlabel(hardware, size=8, color=FAINT)
    save(figure, "curves.png")


def plot_twins():
    """ppo_mjx_jax.py beside ppo_gpu_torch.py, same task and flags: score over environment steps, and over training time."""
    runs = [json.loads(path.read_text()) for path in sorted(results.glob("mjx/*-seed*.json"))]
    runs = [run for run in runs if run.get("curve")]
    tasks = sorted({run["env_id"] for run in runs}, reverse=True)
    if not runs:
        return
    names = {"ppo": "ppo_gpu_torch.py", "ppo_mjx": "ppo_mjx_jax.py"}
    figure = Figure(figsize=(9.0, 3.1 * len(tasks) + 0.5), layout="constrained")
    for (over_steps, over_time), env_id in zip(figure.subplots(len(tasks), 2, squeeze=False, sharey="row"), tasks):
        members = [run for run in runs if run["env_id"] == env_id]
        for line, algorithm in enumerate(names):
            seeds = [run for run in members if run["algorithm"] == algorithm]
            for run in seeds:
                steps, seconds, scores = zip(*run["curve"])
                for axis, x in ((over_steps, steps), (over_time, seconds)):
                    axis.plot(x, scores, "-", color=COLOURS[algorithm], lw=1.6, alpha=0.75)
                    axis.plot(x[-1], scores[-1], "o", color=COLOURS[algorithm], ms=4.5)
            if seeds:
                compiled = statistics.median(run["compile_seconds"] for run in seeds)
                label = f"{names[algorithm]}, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}, + {compiled:.0f} s of compilation"
                over_time.annotate(label, (0.98, 0.05 + 0.09 * line), xycoords="axes fraction", ha="right",
                                   color=COLOURS[algorithm], weight="bold", size=8.5)  # fmt: skip
        for axis, label in ((over_steps, "environment steps"), (over_time, "seconds of training")):
            axis.set_title(env_id)
            axis.set_xlabel(label)
            axis.set_xlim(left=0)
            axis.xaxis.set_major_formatter(FuncFormatter(short))
            axis.yaxis.set_major_formatter(FuncFormatter(short))
            axis.grid(axis="y", color="#eceff2")
    figure.suptitle("Deterministic score in gymnasium.make(task), one line for each seed; same task, batch and flags", x=0.01, ha="left", size=11)
    figure.supxlabel("; ".join(sorted({run["hardware"] for run in runs})), size=8, color=FAINT)
    save(figure, "mjx/curves.png")


def plot_off_policy():
    """SAC beside PPO over environment steps, one panel for each task that SAC learned; PPO's curve is cut where SAC's longest ends."""
    runs = [json.loads(path.read_text()) for path in sorted(results.glob("sac/*-seed*.json"))]
    tasks = sorted({run["env_id"] for run in runs if run.get("curve") and run["algorithm"] == "sac"})
    if not tasks:
        return
    figure = Figure(figsize=(4.6 * len(tasks), 3.6), layout="constrained")
    for axis, env_id in zip(grid(figure, 1, len(tasks), len(tasks)), tasks):
        members = [run for run in runs if run["env_id"] == env_id and run.get("curve")]
        if all(run["algorithm"] == "sac" for run in members):  # PPO was not trained for this comparison: its usual run
            usual = [json.loads(path.read_text()) for path in sorted(results.glob(f"ppo/{env_id}-seed*.json"))]
            members += [run for run in usual if run.get("curve")]
        last = max(run["curve"][-1][0] for run in members if run["algorithm"] == "sac")
        for line, algorithm in enumerate(("sac", "ppo")):
            seeds = [run for run in members if run["algorithm"] == algorithm]
            for run in seeds:
                steps, _, scores = zip(*run["curve"])
                axis.plot(steps, scores, ".-", color=COLOURS[algorithm], lw=1.6, alpha=0.75, ms=4)
            if seeds:
                label = f"{algorithm.upper()}, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
                axis.annotate(label, (0.03, 0.88 - 0.08 * line), xycoords="axes fraction", color=COLOURS[algorithm], weight="bold", size=8.5)
        threshold = members[0]["threshold"]
        axis.axhline(threshold, color=FAINT, lw=1, ls=(0, (4, 3)), zorder=0)
        axis.annotate(f"{threshold:,}", (1, threshold), (-3, 3), xycoords=("axes fraction", "data"), textcoords="offset points", color=FAINT, size=8, ha="right")
        reached = [[step for step, _, score in run["curve"] if score >= threshold] for run in members]
        reached_first = [steps[0] for steps in reached if steps]
        axis.set_xscale("log")  # SAC's steps and PPO's, ten to twenty times as many, both legible
        axis.set_xlim(0.8 * min(run["curve"][0][0] for run in members), 1.05 * max([last, *reached_first]))
        axis.set_title(env_id)
        axis.set_xlabel("environment steps")
        axis.xaxis.set_major_formatter(FuncFormatter(short))
        axis.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: short(value) if f"{value:.0e}"[0] in "25" else ""))
        axis.yaxis.set_major_formatter(FuncFormatter(short))
        axis.grid(axis="y", color="#eceff2")
    figure.suptitle("Deterministic score in gymnasium.make(task), one line for each seed", x=0.01, ha="left", size=11)
    save(figure, "sac/curves.png")


def plot_peers():
    """Score over minutes of training, beside other libraries on the same core: thin lines are seeds, a thick one is the median seed."""
    names = {"ours-ppo": ("our PPO", "#1f6feb"), "ours-sac": ("our SAC", "#d9480f"), "sb3-ppo": ("SB3 PPO", "#2b8a3e"),
             "sb3-sac": ("SB3 SAC", "#7048e8"), "cleanrl-ppo": ("CleanRL-style PPO", "#8a9099")}  # fmt: skip
    runs = [json.loads(path.read_text()) for path in sorted(results.glob("peers/*/*-seed*.json"))]
    tasks = [task for task in ("InvertedPendulum-v5", "HalfCheetah-v5", "Hopper-v5") if any(run["env_id"] == task for run in runs)]
    if not tasks:
        return
    figure = Figure(figsize=(4.4 * len(tasks), 3.8), layout="constrained")
    for axis, env_id in zip(grid(figure, 1, len(tasks), len(tasks)), tasks):
        for contender, (label, colour) in names.items():
            seeds = [run for run in runs if (run["env_id"], run["contender"]) == (env_id, contender)]
            seeds.sort(key=lambda run: run["curve"][-1][2])
            for rank, run in enumerate(seeds):
                middle = rank == len(seeds) // 2
                minutes, scores = [0.0] + [t / 60 for _, t, _ in run["curve"]], [0.0] + [score for *_, score in run["curve"]]
                axis.plot(minutes, scores, ".-", color=colour, lw=2.2 if middle else 0.9, alpha=1.0 if middle else 0.5, ms=4,
                          label=label if middle else None)  # fmt: skip
        axis.set_title(env_id)
        axis.set_xlabel("minutes of training, compilation apart")
        axis.set_xlim(0, max(run["minutes"] for run in runs if run["env_id"] == env_id) * 1.05)
        axis.yaxis.set_major_formatter(FuncFormatter(short))
        axis.grid(axis="y", color="#eceff2")
    axis.legend(frameon=False, fontsize=8)
    figure.suptitle("Score in gymnasium.make(task) on one CPU core; thick: the median seed", x=0.01, ha="left", size=11)
    figure.supxlabel("; ".join(sorted({run["hardware"] for run in runs})), size=8, color=FAINT)
    save(figure, "peers.png")


def plot_stages():
    """Of each distillation: velocity error, and terrain level where there is terrain, over the steps of each stage in its log."""
    for path in sorted(results.glob("distill/*/evidence.json")):
        record = json.loads(path.read_text())
        column = {name: k for k, name in enumerate(record["curve_columns"])}
        titles = dict(velocity_error="velocity error, m/s", terrain_level="mean terrain level", imitation_loss="imitation loss of the student")
        shown = {name: title for name, title in titles.items() if any(row[column[name]] is not None for rows in record["curves"].values() for row in rows)}
        figure = Figure(figsize=(4.4 * len(shown), 3.4), layout="constrained")
        for axis, (name, title) in zip(grid(figure, 1, len(shown), len(shown)), shown.items()):
            for stage, rows in record["curves"].items():
                points = [(row[column["env_steps"]], row[column[name]]) for row in rows if row[column[name]] is not None]
                if points:
                    axis.plot(*zip(*points), color=COLOURS[stage], lw=1.6, label=stage)
            axis.set_title(title)
            axis.set_xlabel("environment steps of the stage")
            axis.xaxis.set_major_formatter(FuncFormatter(short))
            axis.set_ylim(bottom=0)
            axis.grid(axis="y", color="#eceff2")
            axis.legend(frameon=False, fontsize=8)
        figure.suptitle(f"{record['env_id']}: training, with exploration noise and randomised robots", x=0.01, ha="left", size=11)
        save(figure, f"distill/{path.parent.name}/curves.png")


def compare(ratio):
    """How many times as fast the reference is, in words that fit a bar."""
    if ratio >= 10:
        return f"{ratio:.0f}× slower"
    if ratio >= 1.05:
        return f"{ratio:.1f}× slower" if ratio >= 1.5 else f"{ratio:.2f}× slower"
    return "level" if ratio > 0.95 else f"{1 / ratio:.2f}× faster"


def plot_speed():
    """Every comparison of sim, learner and train as bars, ours on top, the ratio at the end of each bar."""
    records = [json.loads(path.read_text()) for path in sorted(results.glob("benchmark/*.json"))]
    records = [r for r in records if r["mode"] in ("sim", "learner", "train")]
    full = [r for r in records if not r["case"].endswith("-quick")]
    records = full or records
    if not records:
        return
    records.sort(key=lambda r: ("sim", "learner", "train").index(r["mode"]))
    columns = min(2, len(records))
    lines = -(-len(records) // columns)
    tallest = max(len(r["rows"]) for r in records)
    figure = Figure(figsize=(6.6 * columns, (0.36 * tallest + 1.0) * lines + 0.4), layout="constrained")
    panels = grid(figure, lines, columns, len(records))
    titles = {"sim": "Simulator", "learner": "PPO update alone", "train": "Whole training"}
    for axis, record in zip(panels, records):
        rows, name = record["rows"], record.get("reference", record["rows"][0]["contender"])
        reference = next((row for row in rows if row["contender"] == name), None)
        colours = [OURS if row["contender"].startswith(("ours", "vecsim")) else THEIRS for row in rows]
        names = [textwrap.fill(row["contender"], 28) for row in rows]
        axis.barh(names, [row["median"] for row in rows], color=colours, height=0.68)
        for place, row in enumerate(rows):
            axis.plot([row["minimum"], row["maximum"]], [place, place], color=INK, lw=1.2, solid_capstyle="butt")
            ratio = None if reference in (None, row) else reference["median"] / row["median"]
            text = short(row["median"]) + ("" if ratio is None else "  " + compare(ratio))
            axis.annotate(text, (row["maximum"], place), (5, 0), textcoords="offset points", va="center", size=9)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.6 * max(row["maximum"] for row in rows))
        axis.xaxis.set_major_formatter(FuncFormatter(short))
        axis.tick_params(axis="y", length=0, labelcolor=INK)
        axis.spines["left"].set_visible(False)
        title = "SAC without its simulator" if "sac" in record["case"] else titles[record["mode"]]
        shown = [record["settings"].get(name, "") for name in ("env_id", "integrator")]
        axis.set_title(", ".join([title, *filter(None, shown)]))
        cores = rows[0]["cores"]
        axis.set_xlabel(f"{record['unit']}, {cores} core{'s' if cores > 1 else ''}" + ("; a first look (--quick)" if record["case"].endswith("-quick") else ""))
    machines = dict.fromkeys(record["hardware"] for record in records)
    figure.supxlabel(f"{'; '.join(machines)}; medians, with lowest and highest window", size=8, color=FAINT)
    save(figure, "speed.png")


def plot_scaling():
    """Steps/s and memory over the number of environments or processes."""
    groups = {}
    for path in sorted(results.glob("benchmark/scaling-*.json")):
        record = json.loads(path.read_text())
        case = re.sub(r"-\d+-(envs|processes)", r"-\1", record["case"])
        groups.setdefault(case, []).append((int(record["rows"][0]["contender"].split()[0]), record))
    if not groups:
        return
    figure = Figure(figsize=(5.2 * len(groups), 3.6), layout="constrained")
    for axis, (case, members) in zip(figure.subplots(1, len(groups), squeeze=False).flat, groups.items()):
        members.sort(key=lambda m: m[0])
        counts, rows = [m[0] for m in members], [m[1]["rows"][0] for m in members]
        axis.fill_between(counts, [r["minimum"] for r in rows], [r["maximum"] for r in rows], color=OURS, alpha=0.15, lw=0)
        axis.plot(counts, [r["median"] for r in rows], "o-", color=OURS, ms=4)
        best = max(rows, key=lambda r: r["median"])
        axis.annotate(short(best["median"]), (counts[rows.index(best)], best["median"]), (0, 7), textcoords="offset points", ha="center", color=OURS, weight="bold")
        axis.set_xscale("log", base=2)
        axis.set_ylim(0, 1.2 * max(r["maximum"] for r in rows))
        axis.set_xticks(counts, [f"{c:,}" for c in counts], rotation=45 if len(counts) > 6 else 0)
        axis.minorticks_off()
        axis.yaxis.set_major_formatter(FuncFormatter(short))
        axis.set_title(members[0][1]["settings"]["env_id"])
        axis.set_ylabel(rows[0]["unit"])
        axis.set_xlabel("environments" if "envs" in case else "processes")
        axis.grid(axis="y", color="#eceff2")
    figure.supxlabel(f"{rows[0]['cores']} core{'s' if rows[0]['cores'] > 1 else ''} of {members[0][1]['hardware']}", size=8, color=FAINT)
    save(figure, "scaling.png")


plot_curves()
plot_twins()
plot_off_policy()
plot_peers()
plot_stages()
plot_speed()
plot_scaling()
PYTHON
}

# ----------------------------------------------------------------------------------------------------------------------
# Modes
# ----------------------------------------------------------------------------------------------------------------------

write_programs() { # FOLDER: each program as a file; a contender's begins with the meter and with what its mode shares
  local name
  mkdir -p "$1"
  for name in states referee film table plot; do "program_$name" >"$1/$name.py"; done
  for name in scores peers walk distill seeds stages; do { program_job && "program_$name"; } >"$1/$name.py"; done
  contender_program "$1" sim sim_vecsim sim_mujoco sim_mujoco_torch sim_mujoco_warp
  contender_program "$1" "jax sim" sim_jax
  contender_program "$1" "learner ppo_batch" learner_ours learner_rsl_rl
  contender_program "$1" "learner ppo_batch skrl_models" learner_skrl
  contender_program "$1" "learner ppo_batch rl_games_agent" learner_rl_games
  contender_program "$1" "jax ppo_batch brax_ppo" learner_brax
  contender_program "$1" "learner random_numbers" learner_sac_ours
  contender_program "$1" "learner skrl_models" learner_sac_skrl
  contender_program "$1" "" train_ours scaling_processes
  contender_program "$1" gymnasium_envs train_sb3 train_cleanrl
  contender_program "$1" "gymnasium_envs vecsim_envs" train_rsl_rl
  contender_program "$1" "gymnasium_envs vecsim_envs skrl_models" train_skrl
  contender_program "$1" "gymnasium_envs vecsim_envs rl_games_agent" train_rl_games
  { program_score_meter && program_peers_sb3; } >"$1/peers_sb3.py"
  { program_score_meter && program_gymnasium_envs && program_train_cleanrl; } >"$1/peers_cleanrl.py"
  contender_program "$1" "jax brax_ppo" train_brax
}

contender_program() { # FOLDER "SHARED..." NAME...: the meter, the shared parts and the program itself, in one file
  local folder=$1 shared=$2 name part
  shift 2
  for name in "$@"; do
    {
      program_meter
      for part in $shared; do
        case "$part" in sim | learner) part=${part}_common ;; esac
        "program_$part"
      done
      "program_$name"
    } >"$folder/$name.py"
  done
}

json() { # NAME VALUE...: an object; a value that is JSON stays what it is, anything else is a string
  "$project_python" - "$@" <<'PYTHON'
import json, sys

def value(text):
    try:
        return json.loads(text)
    except ValueError:
        return text

words = sys.argv[1:]
print(json.dumps({name: value(text) for name, text in zip(words[::2], words[1::2])}))
PYTHON
}

measure() { # MODE CASE UNIT SETTINGS "NAME|PEER|PROGRAM|VARIANT"...: one comparison; the first contender is the reference
  local mode=$1 case=$2 unit=$3 settings=$4 reference=${5%%|*} contender name peer program variant reason contenders="" skipped="" status=0
  shift 4
  for contender in "$@"; do
    IFS='|' read -r name peer program variant <<<"$contender"
    if [ -z "$dry_run" ] && ! reason=$(prepare_peer "$peer"); then
      say "  $name: left out: $reason"
      skipped+="$(json "$name" "$reason")"$'\n'
      continue
    fi
    contenders+="$(json name "\"$name\"" peer "$peer" python "$(interpreter_of "$peer")" program "$program" variant "\"$variant\"" \
      installed "$(is_installed "$peer" && echo true || echo false)")"$'\n'
  done
  local file="$results/benchmark/$mode-$case${quick:+-quick}.json"
  "$project_python" - "$work/comparison.json" "$contenders" "$skipped" "$(json mode "$mode" case "$case${quick:+-quick}" unit "$unit" \
    settings "$settings" repeats "$repeats" seconds "$seconds" patience "$patience" cores "\"$cores\"" command "$command_line" \
    commit "\"$commit\"" root "$root" programs "$work/programs" logs "$cache" scratch "$work" path "$file" \
    reference "\"$reference\"" shown "$work/shown" results "$results/benchmark" force "${force:-0}" dry_run "${dry_run:-0}")" <<'PYTHON'
import json, sys

path, contenders, skipped, comparison = sys.argv[1:]
comparison = json.loads(comparison) | dict(skipped={}, contenders=[json.loads(line) for line in contenders.splitlines()])
for line in skipped.splitlines():
    comparison["skipped"] |= json.loads(line)
open(path, "w").write(json.dumps(comparison))
PYTHON
  [ -n "$dry_run" ] || say "$mode $case"
  "$project_python" "$work/programs/referee.py" "$work/comparison.json" || status=$?
  [ "$status" -le 1 ] || exit "$status" # interrupted
  [ "$status" = 0 ] || failures=$((failures + 1))
}

# TASK INTEGRATOR -> settings of a `train` comparison: from ppo_gpu_torch.py's defaults the options of the task, so that
# all see the same observation, and `ours`, the sizes of the learners on vecsim.
train_settings() {
  PYTHONPATH="$root" "$project_python" - "$1" "$2" "$device" <<'PYTHON'
import json, sys

import ppo_gpu_torch as ppo

env_id, integrator, device = sys.argv[1:]
args = ppo.with_task_defaults(ppo.Args(env_id=env_id))
names = "num_envs num_steps update_epochs num_minibatches solver_iterations"
ours = {name: getattr(args, name) for name in names.split()}
settings = dict(env_id=env_id, device=device, num_envs=8, integrator=integrator, env_kwargs=args.env_kwargs)
print(json.dumps(settings | dict(ours=ours | dict(hidden=args.actor_hidden))))
PYTHON
}

simulator_settings() { # TASK ENVIRONMENTS -> settings of a `sim` comparison; saves its test states
  "$project_python" "$work/programs/states.py" "$1" "$device" "$2" "$solver_iterations" "$work/states-$1-$2.npz"
}

run_sim() {
  local env_id settings compiled="" mjx=project
  [ "$device" = cpu ] || mjx=mjx # needs JAX's build for GPUs
  [ -n "$quick" ] || compiled="mujoco-torch, compiled|mujoco_torch|sim_mujoco_torch|compiled" # compiles for long
  for env_id in ${env_ids:-$([ -n "$quick" ] && echo Ant-v5 || echo "$gymnasium_tasks")}; do
    settings=$(simulator_settings "$env_id" "${num_envs:-$([ "$device" = cuda ] && echo 8192 || echo 1024)}") || give_up "no states of $env_id"
    measure sim "$env_id-$place" "physics steps/s" "$settings" \
      "vecsim|project|sim_vecsim|" "MuJoCo C|project|sim_mujoco|" \
      "MJX|$mjx|sim_jax|mjx" "Brax, generalized|brax|sim_jax|brax" \
      "MuJoCo Warp|mujoco_warp|sim_mujoco_warp|" "mujoco-torch, eager|mujoco_torch|sim_mujoco_torch|eager" \
      ${compiled:+"$compiled"}
  done
}

run_learner() {
  local settings
  settings=$(json device "$device" num_envs 2048 num_steps 32 epochs 5 minibatches 4 obs_size 27 action_size 8 hidden "[256,128,64]")
  measure learner "$place" "samples/s" "$settings" \
    "ours, compiled|project|learner_ours|compiled" "ours, eager|project|learner_ours|eager" \
    "rsl_rl, compiled|rsl_rl|learner_rsl_rl|compiled" "rsl_rl, eager|rsl_rl|learner_rsl_rl|eager" \
    "skrl|skrl|learner_skrl|" "rl_games|rl_games|learner_rl_games|" \
    "Brax|brax|learner_brax|" "ours, bf16|project|learner_ours|bf16" "rsl_rl, bf16|rsl_rl|learner_rsl_rl|bf16"
  [ -f "$root/sac_gpu_torch.py" ] || return 0
  settings=$(json device "$device" num_envs 128 batch_size 4096 updates_per_step 8 first_steps 40 replay_steps 2000 \
    obs_size 27 action_size 8 hidden "[256,256]")
  measure learner "sac-$place" "updates/s" "$settings" \
    "ours, compiled|project|learner_sac_ours|compiled" "ours, eager|project|learner_sac_ours|eager" "skrl|skrl|learner_sac_skrl|"
}

run_train() {
  local env_id settings processes=1 per_core= words=
  [[ "$device" = cpu && "$units" -gt 1 ]] && processes=$units words=", $units processes" per_core="ours$words|project|train_ours|$units"
  for env_id in ${env_ids:-$([ -n "$quick" ] && echo Ant-v5 || echo Ant-v5 HalfCheetah-v5)}; do
    settings=$(train_settings "$env_id" euler) || give_up "no settings of $env_id"
    measure train "$env_id-euler-$place" "environment steps/s" "$settings" \
      "ours|project|train_ours|1" ${per_core:+"$per_core"} \
      "ours$words, networks 64-64 as theirs|project|train_ours|$processes,64,64" \
      "rsl_rl on vecsim|rsl_rl|train_rsl_rl|vecsim" "skrl on vecsim|skrl|train_skrl|vecsim" \
      "rl_games on vecsim|rl_games|train_rl_games|vecsim" \
      "SB3, DummyVecEnv|sb3|train_sb3|dummy" "SB3, SubprocVecEnv|sb3|train_sb3|subproc" \
      "CleanRL-style, SyncVectorEnv|project|train_cleanrl|sync" "CleanRL-style, AsyncVectorEnv|project|train_cleanrl|async" \
      "skrl|skrl|train_skrl|" "rsl_rl|rsl_rl|train_rsl_rl|" "rl_games|rl_games|train_rl_games|" \
      "Brax, its own model, generalized|brax|train_brax|generalized" \
      "Brax, its own model, spring|brax|train_brax|spring"
    [ "$env_id" != HalfCheetah-v5 ] || continue # its MJCF says Euler, those of all others RK4
    settings=$(train_settings "$env_id" rk4) || give_up "no settings of $env_id"
    measure train "$env_id-rk4-$place" "environment steps/s" "$settings" \
      "ours|project|train_ours|1" "SB3, DummyVecEnv|sb3|train_sb3|dummy" \
      "CleanRL-style, SyncVectorEnv|project|train_cleanrl|sync" \
      "skrl|skrl|train_skrl|" "rsl_rl|rsl_rl|train_rsl_rl|"
  done
}

run_training() { # PROGRAM FILE SCRIPT TASK SEED EVERY THRESHOLD MINUTES FLAGS: PROGRAM on one training, its results into results/FILE.json
  local program=$1 file=$2 script=$3 env_id=$4 seed=$5 every=$6 threshold=$7 minutes=$8 flags=$9 command status=0
  command="python $script --env-id $env_id${flags:+ $flags} --seed $seed --eval-every $every${total_timesteps:+ --total-timesteps $total_timesteps}"
  [ "$device" = cuda ] || command+=" --device cpu"
  [ "$script" != ppo_mjx_jax.py ] || command+=" --compilation-cache ''"
  # shellcheck disable=SC2086  # a command of several words, or none
  ${cores:+taskset -c "$cores"} "$project_python" "$work/programs/$program.py" "$(json env_id "$env_id" seed "$seed" threshold "$threshold" minutes "$minutes" \
    command "$command" python "$project_python" root "$root" cores "\"$cores\"" hardware "$hardware" commit "\"$commit\"" \
    run_dir "$cache/scores/${commit// /-}/${file#ppo/}${total_timesteps:+-$total_timesteps-steps}" path "$results/$file.json" \
    shown "$work/shown" shared "${shared:-0}" force "${force:-0}" dry_run "${dry_run:-0}" episodes 100)" || status=$?
  [ "$status" -le 1 ] || exit 130
  failures=$((failures + status))
  return "$status"
}

# Rows: set and file, script, task, seeds, environment steps between evaluations, score to reach, minutes to expect on two cores, further flags.
# The set mjx compares ppo_mjx_jax.py with its twin on the same batch, one that a CPU steps in MJX in reasonable time. JAX compiles cold.
# The set candidates compares the settings that could be SAC's default, each with its training time.
# The set sac holds PPO beside SAC in HalfCheetah: 1,000,000 environment steps, evaluated every 100,000, against 160,000 and every 20,000.
run_scores() {
  local file script env_id seeds every threshold minutes flags seed
  while read -r file script env_id seeds every threshold minutes flags; do
    [[ -z "$env_ids" || " $env_ids " = *" $env_id "* ]] || continue
    [[ -z "$set" || "${file%/*}" =~ ^(sac/)?"$set"$ ]] || continue
    for seed in ${seeds//,/ }; do
      run_training scores "$file-seed$seed" "$script" "$env_id" "$seed" "$every" "$threshold" "$minutes" "$flags" || true
    done
  done <<'TASKS'
ppo/InvertedPendulum-v5 ppo_gpu_torch.py InvertedPendulum-v5 1,2,3 32768 1000 1 --no-compile
ppo/HalfCheetah-v5 ppo_gpu_torch.py HalfCheetah-v5 1,2,3 1000000 6500 30
ppo/Ant-v5 ppo_gpu_torch.py Ant-v5 1,2,3 1000000 4400 40
ppo/Hopper-v5 ppo_gpu_torch.py Hopper-v5 1,2,3 1000000 3400 20
ppo/Walker2d-v5 ppo_gpu_torch.py Walker2d-v5 1 1000000 5200 30
ppo/Humanoid-v5 ppo_gpu_torch.py Humanoid-v5 1 1000000 5000 90
sac/InvertedPendulum-v5 sac_gpu_torch.py InvertedPendulum-v5 1,2,3 2048 1000 3 --no-compile
sac/HalfCheetah-v5 sac_gpu_torch.py HalfCheetah-v5 1,2,3 20000 3000 15
sac/HalfCheetah-v5-ppo ppo_gpu_torch.py HalfCheetah-v5 1,2,3 100000 3000 2 --total-timesteps 1000000
sac/Hopper-v5 sac_gpu_torch.py Hopper-v5 1,2,3 20000 2500 15
sac/candidates/HalfCheetah-v5-one-step-mean sac_gpu_torch.py HalfCheetah-v5 1,2,3 20000 3000 4 --n-step 1 --critic-reduction mean --noise-repeat-max 16 --network layer_norm
sac/candidates/HalfCheetah-v5-three-steps-mean sac_gpu_torch.py HalfCheetah-v5 1,2,3 20000 3000 4 --n-step 3 --critic-reduction mean --noise-repeat-max 16 --network layer_norm
sac/candidates/HalfCheetah-v5-categorical-rung sac_gpu_torch.py HalfCheetah-v5 1,2,3 20000 3000 4 --n-step 1 --critic-reduction min --noise-repeat-max 1 --network layer_norm
sac/candidates/HalfCheetah-v5-flash-blocks sac_gpu_torch.py HalfCheetah-v5 1,2,3 20000 3000 15 --n-step 1 --critic-reduction mean --noise-repeat-max 16 --network flash --actor-hidden 128 128 --critic-hidden 128 128
mjx/InvertedPendulum-v5 ppo_mjx_jax.py InvertedPendulum-v5 1,2,3 32768 1000 2
mjx/InvertedPendulum-v5-torch ppo_gpu_torch.py InvertedPendulum-v5 1,2,3 32768 1000 1 --no-compile
mjx/HalfCheetah-v5 ppo_mjx_jax.py HalfCheetah-v5 1 262144 2000 20 --num-envs 256 --num-steps 64 --total-timesteps 1500000
mjx/HalfCheetah-v5-torch ppo_gpu_torch.py HalfCheetah-v5 1 262144 2000 10 --num-envs 256 --num-steps 64 --total-timesteps 1500000
TASKS
}

# Rows: task, minutes of each run, environment steps between evaluations of our PPO and of our SAC, further flags of ours.
run_peers() {
  local env_id minutes every_ppo every_sac flags seed contender peer program variant command
  local -A versions
  versions=([project]="$("$project_python" -c 'import importlib.metadata as m; print(*(f"{n} {m.version(n)}" for n in ("torch", "mujoco", "gymnasium")))')")
  while read -r env_id minutes every_ppo every_sac flags; do
    [[ -z "$env_ids" || " $env_ids " = *" $env_id "* ]] || continue
    for seed in 1 2 3; do # seed by seed: cut short, every contender has as many
      while IFS='|' read -r contender peer program variant command; do
        [ -n "$dry_run" ] || prepare_peer "$peer" || continue
        versions[$peer]=${versions[$peer]:-$(packages_of "$peer" | tr '\n' ' ')}
        [ -z "$command" ] || command="python $command --env-id $env_id --seed $seed --eval-episodes 10 --device cpu${flags:+ $flags}"
        # shellcheck disable=SC2086  # a command of several words, or none
        "$project_python" "$work/programs/peers.py" "$(json env_id "$env_id" seed "$seed" minutes "$minutes" contender "\"$contender\"" \
          python "$(interpreter_of "$peer")" program "\"${program:+$work/programs/$program.py}\"" variant "\"$variant\"" \
          command "\"${command:-$program.py, $variant}\"" root "$root" cores "\"$cores\"" threads "$units" scratch "$work" hardware "$hardware" \
          commit "\"$commit\"" versions "${versions[$peer]}" path "$results/peers/$env_id/$contender-seed$seed.json" shown "$work/shown" \
          force "${force:-0}" dry_run "${dry_run:-0}")" </dev/null || failures=$((failures + 1))
      done <<CONTENDERS
ours-ppo|project|||ppo_gpu_torch.py --eval-every $every_ppo
ours-sac|project|||sac_gpu_torch.py --eval-every $every_sac
sb3-ppo|sb3|peers_sb3|ppo|
sb3-sac|sb3|peers_sb3|sac|
cleanrl-ppo|project|peers_cleanrl|sync|
CONTENDERS
    done
  done <<'TASKS'
InvertedPendulum-v5 1 32768 2048 --no-compile
HalfCheetah-v5 3 500000 20000
Hopper-v5 3 500000 20000
TASKS
}

# Rows: name of the variant, its flags. A ladder from the textbook to all tricks, each rung with those before it, then one trick more on
# top of all, by itself. (Alone on top of the textbook no trick scores in so few updates: see the commit that says so.)
run_ablate() {
  local env_id=${env_ids:-HalfCheetah-v5} seed name flags budget rung=""
  budget="--num-envs 128 --learning-starts 5000 --batch-size 256 --updates-per-step 8" # the same for all
  : "${total_timesteps:=61440}"
  for seed in 1 2 3; do # seed by seed: cut short, every variant has as many
    rung="--preset vanilla"
    while read -r name flags; do
      case "$flags" in
        --preset*) ;;
        *) rung+="${flags:+ $flags}" flags=$rung ;;
      esac
      run_training scores "sac/ablation/$env_id/$name-seed$seed" sac_gpu_torch.py "$env_id" "$seed" $((total_timesteps / 4)) 1000 2 "$flags $budget" || true
    done <<'VARIANTS'
textbook
faster-learning --learning-rate 1e-3 --temperature-learning-rate 1e-3 --tau 0.05 --policy-frequency 2
little-noise --temperature-init 0.01 --target-entropy -0.5
scaled-observations --normalize-observations True
layer-norm --network layer_norm
scaled-rewards --normalize-rewards True
categorical-critic --critic categorical
mean-of-critics --critic-reduction mean
held-noise --noise-repeat-max 16
all-with-unit-weight-rows --preset best --weight-projection True
all-with-flash-blocks --preset best --network flash --actor-hidden 128 128 --critic-hidden 128 128
all-with-3-step-returns --preset best --n-step 3
all-with-half-precision-replay --preset best --half-precision-replay
VARIANTS
  done
}

# Rows: name of the variant, its flags, beside the row of the task: for HalfCheetah 1,024 environments of 16 steps, 8 minibatches.
run_sizes() {
  local env_id=${env_ids:-HalfCheetah-v5} seed name flags
  : "${total_timesteps:=1000000}"
  for seed in 1 2 3; do
    while read -r name flags; do
      run_training scores "ppo/sizes/$env_id/$name-seed$seed" ppo_gpu_torch.py "$env_id" "$seed" $((total_timesteps / 4)) 3000 3 "$flags" || true
    done <<'VARIANTS'
1024x16-in-8-minibatches --num-envs 1024 --num-steps 16 --num-minibatches 8
256x64-in-8-minibatches --num-envs 256 --num-steps 64 --num-minibatches 8
4096x4-in-8-minibatches --num-envs 4096 --num-steps 4 --num-minibatches 8
1024x16-in-2-minibatches --num-envs 1024 --num-steps 16 --num-minibatches 2
1024x16-in-32-minibatches --num-envs 1024 --num-steps 16 --num-minibatches 32
1024x16-networks-of-64-64 --num-envs 1024 --num-steps 16 --num-minibatches 8 --actor-hidden 64 64 --critic-hidden 64 64
VARIANTS
  done
}

run_walk() { # the same kind of row, one a task; as many steps as a CPU core makes in a quarter of an hour
  : "${total_timesteps:=12000000}"
  local file script env_id seed every threshold minutes flags row
  while read -r file script env_id seed every threshold minutes flags; do
    [[ -z "$env_ids" || " $env_ids " = *" $env_id "* ]] || continue
    row=("$file" "$script" "$env_id" "$seed" "$every" "$threshold" "$minutes" "$flags")
    run_training scores "${row[@]}" && run_training walk "${row[@]}" || true
  done <<'TASKS'
quadruped/Quadruped-Flat ppo_gpu_torch.py Quadruped-Flat 1 1000000 20 30 --num-envs 512 --actor-hidden 128 64 --critic-hidden 128 64
TASKS
}

# Rows: task, minutes, flags; robots, networks and steps that a CPU core manages.
run_distill() {
  local env_id minutes flags command
  while read -r env_id minutes flags; do
    [[ -z "$env_ids" || " $env_ids " = *" $env_id "* ]] || continue
    command="python ppo_distill_teacher_student.py --env-id $env_id $flags${total_timesteps:+ --total-timesteps $total_timesteps}"
    [ "$device" = cuda ] || command+=" --device cpu"
    "$project_python" "$work/programs/distill.py" "$(json command "$command" minutes "$minutes" python "$project_python" root "$root" \
      cores "\"$cores\"" hardware "$hardware" commit "\"$commit\"" run_dir "$cache/distill/${commit// /-}/$env_id" \
      path "$results/distill/$env_id" shown "$work/shown" force "${force:-0}" dry_run "${dry_run:-0}")" || {
      [ $? -le 1 ] || exit 130
      failures=$((failures + 1))
    }
  done <<'TASKS'
Quadruped-Flat 45 --num-envs 512 --total-timesteps 10000000 --actor-hidden 128 64 --critic-hidden 128 64 --student-hidden 128 64 --student-history 6
Quadruped-Rough 110 --num-envs 512 --total-timesteps 24000000 --env-kwargs first_levels 1 --actor-hidden 128 64 --critic-hidden 128 64 --student-hidden 128 64 --student-history 6
TASKS
}

run_seeds() {
  local command="python ppo_mjx_jax.py --env-id InvertedPendulum-v5 --eval-episodes 0 --compilation-cache ''${total_timesteps:+ --total-timesteps $total_timesteps}"
  [ "$device" = cuda ] || command+=" --device cpu"
  "$project_python" "$work/programs/seeds.py" "$(json command "$command" repeats "$repeats" python "$project_python" root "$root" \
    cores "\"$cores\"" hardware "$hardware" commit "\"$commit\"" scratch "$work" path "$results/mjx/seeds.json" shown "$work/shown" \
    force "${force:-0}" dry_run "${dry_run:-0}")" || {
    [ $? -le 1 ] || exit 130
    failures=$((failures + 1))
  }
}

run_profile() {
  local script env_id flags command
  while read -r script env_id flags; do
    [[ -z "$env_ids" || " $env_ids " = *" $env_id "* ]] || continue
    command="python $script --env-id $env_id --profile --device $device${flags:+ $flags}"
    "$project_python" "$work/programs/stages.py" "$(json script "$script" env_id "$env_id" command "$command" python "$project_python" \
      root "$root" cores "\"$cores\"" hardware "$hardware" commit "\"$commit\"" scratch "$work" \
      path "$results/profile/${script%.py}-$env_id-$place.json" shown "$work/shown" force "${force:-0}" dry_run "${dry_run:-0}")" || {
      [ $? -le 1 ] || exit 130
      failures=$((failures + 1))
    }
  done <<'TRAINERS'
ppo_gpu_torch.py Ant-v5 --eval-episodes 0 --total-timesteps 400000
ppo_gpu_torch.py HalfCheetah-v5 --eval-episodes 0 --total-timesteps 400000
sac_gpu_torch.py HalfCheetah-v5 --eval-episodes 0 --total-timesteps 25600
ppo_mjx_jax.py HalfCheetah-v5 --eval-episodes 0 --num-envs 256 --num-steps 64 --total-timesteps 16384
ppo_distill_teacher_student.py Quadruped-Flat --num-envs 512 --actor-hidden 128 64 --critic-hidden 128 64 --student-hidden 128 64 --student-history 6 --stages teacher student --total-timesteps 1120000 --student-timesteps 920000 --finetune-timesteps 20000
TRAINERS
}

run_scaling() {
  local env_id count most settings
  : "${max_envs:=$([ "$device" = cuda ] && echo 131072 || echo 16384)}"
  : "${max_processes:=$units}"
  for env_id in ${env_ids:-Ant-v5}; do
    for ((count = 16; count <= max_envs; count *= 2)); do
      [[ -n "$quick" && $count -gt 16 && $count -lt $max_envs ]] && continue # the two ends
      settings=$(simulator_settings "$env_id" "$count") || give_up "no states of $env_id"
      measure scaling "$env_id-$place-$count-envs" "physics steps/s" "$settings" "$count environments|project|sim_vecsim|"
    done
    for ((count = 1; count <= max_processes; count *= 2)); do
      settings=$(json env_id "$env_id" device "$device" num_envs 1024 training_iterations "$([ -n "$quick" ] && echo 8 || echo 16)")
      measure scaling "$env_id-$place-$count-processes" "environment steps/s" "$settings" "$count process$([ "$count" = 1 ] || echo es)|project|scaling_processes|$count"
    done
  done
}

main() { # a function, so that bash has read all of this file before it runs: an edit during a run of hours breaks nothing
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  trap 'say "interrupted: what is finished is in $results; the same command goes on from there"; exit 130' INT TERM
  failures=0
  write_programs "$work/programs"
  commit=$(git -C "$root" rev-parse --short HEAD 2>/dev/null || echo unknown)
  [ -z "$(git -C "$root" status --porcelain -- '*.py' '*.sh' 2>/dev/null)" ] || commit+=" with changes"

  case "$mode" in
    programs)
      [ -n "$programs_folder" ] || refuse "programs needs a folder"
      write_programs "$programs_folder"
      exit 0
      ;;
    table)
      "$project_python" "$work/programs/table.py" "$results" physics,sim,learner,train,scaling,profile,scores,peers,walk,distill,seeds,ablate,sizes,cost "$dollars_per_hour"
      exit 0
      ;;
    film)
      PYTHONPATH="$root" "$project_python" "$work/programs/film.py" "$cache/scores" "$results" "$command_line" "$commit"
      exit 0
      ;;
    plot)
      MPLBACKEND=agg "$project_python" "$work/programs/plot.py" "$results"
      exit 0
      ;;
  esac

  # What this machine is: its kind of device, and how many cores or GPUs there are to use.
  "$project_python" -c "import importlib.util, sys; sys.exit(not all(map(importlib.util.find_spec, ('gymnasium', 'mujoco', 'torch'))))" ||
    give_up "$project_python has not this project's dependencies; activate its environment, or set PYTHON"
  mkdir -p "$cache"
  gpus=0
  if nvidia-smi -L >/dev/null 2>&1; then
    gpus=$("$project_python" -c "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)")
  fi
  : "${device:=$([ "$gpus" -gt 0 ] && echo cuda || echo cpu)}"
  [ "$device" = cpu ] || [ "$gpus" -gt 0 ] || refuse "--device cuda: PyTorch sees no GPU here"
  [ -z "$cores" ] || taskset -c "$cores" true 2>/dev/null || refuse "--cores $cores: taskset knows no such cores here"
  if [ "$device" = cuda ]; then units=$gpus; elif [ -n "$cores" ]; then units=$(taskset -c "$cores" nproc); else units=$(nproc); fi
  place=$device$units
  hardware="$(sed -n 's/^model name.*: //p' /proc/cpuinfo 2>/dev/null | head -n 1), $units of $(getconf _NPROCESSORS_ONLN) cores"
  [ "$device" = cpu ] || hardware="$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1); $hardware"

  case "$mode" in
    sim) run_sim ;;
    learner) run_learner ;;
    train) run_train ;;
    scores) run_scores ;;
    peers) run_peers ;;
    walk) run_walk ;;
    distill) run_distill ;;
    seeds) run_seeds ;;
    ablate) run_ablate ;;
    sizes) run_sizes ;;
    scaling) run_scaling ;;
    profile) run_profile ;;
    cost) run_train ;;
  esac
  touch "$work/shown"
  [ -n "$dry_run" ] || "$project_python" "$work/programs/table.py" "$results" "$mode" "$dollars_per_hour" "$work/shown"
  [ "$failures" = 0 ] || give_up "$failures comparison(s) or training(s) failed; see above"
}

main; exit
