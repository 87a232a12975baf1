#!/usr/bin/env bash
# The measurements behind results/README.md: this project beside what a user would pick instead.
#
#     ./benchmark.sh sim        speed and error of a physics step: vecsim, MuJoCo, MJX, Brax, MuJoCo Warp, mujoco-torch
#     ./benchmark.sh sim --num-envs 16,1024,65536     vecsim alone over the number of environments
#     ./benchmark.sh learner    samples/s of the PPO update alone: ours, rsl_rl, skrl, rl_games, Brax; SAC against skrl
#     ./benchmark.sh train      steps/s of whole trainings: ours, SB3, CleanRL-style, skrl, rsl_rl, rl_games, Brax
#     ./benchmark.sh runs SET   trainings; benchmarks/runs.toml lists the sets:
#         ppo euler bf16        time to a score in Gymnasium's own environments (hours)
#         sac mjx               the same with SAC, and with PPO in JAX (an hour each)
#         q-learning            DQN and PQN beside PPO and SAC, at equal time (an hour)
#         q-ablation            DQN with one thing changed (half an hour)
#         memory                PPO that sees no velocities, without and with a memory (an hour)
#         tasks                 the same for Gymnasium's other five tasks
#         peers                 minutes to a score, beside SB3 and CleanRL-style PPO (two hours)
#         candidates ablate     sac_gpu_torch.py with other settings; trick upon trick
#         sizes                 ppo_gpu_torch.py with other sizes on the same budget
#         seeds                 ppo_mjx_jax.py: eight agents in one program beside one
#         walk distill          a quadruped in two simulators; teacher, students and baseline (hours)
#         walk-memory           a quadruped without base velocity: no memory, a GRU, a taught student (an hour)
#         profile               where an iteration's time goes
#     ./benchmark.sh gpu        the first hour on a GPU, in blocks of at most 9 minutes: --dry-run lists them, and
#                               --device cpu --quick rehearses them
#     ./benchmark.sh gpu-kernels   predicts the speed on a GPU from the code for it; needs no GPU
#     ./benchmark.sh mjcf DIR   which MJCF files below a folder the simulator accepts, and its error
#     ./benchmark.sh report     writes results/README.md and draws its pictures, from the files in results/
#
# `./benchmark.sh MODE --help` lists the options of a mode. For a first look: sim --quick, train --quick.
#
# Contenders are small programs in benchmarks/. They measure in turn, on the same cores, one at a time: see
# benchmarks/referee.py. Other libraries are installed when first needed, each in its own virtual environment in
# ${XDG_CACHE_HOME:-~/.cache}/onefile-gpu-rl-bench. On Linux pip installs torch for CUDA; for the build for CPUs set
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu. $PYTHON is this project's interpreter (default: python).
set -euo pipefail

python=$(command -v "${PYTHON:-python}") || { echo "error: there is no ${PYTHON:-python}; set PYTHON" >&2; exit 1; }
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
"$python" -c "import gymnasium, matplotlib, mujoco, numpy" 2>/dev/null || {
  echo "error: $python lacks this project's packages; activate its environment, or set PYTHON" >&2
  exit 1
}
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$python" -P -m benchmarks "$@"
