"""Writes results/README.md, every table and picture of the files in results/, and draws the pictures."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from benchmarks import tables

HEAD = """# Results

`./benchmark.sh report` makes this page from the files in this folder; do not edit it. Nearly every file names its
hardware, commit and command, and most tables do. Files of older commits may name options that are gone or have other
defaults. Speeds are medians, with the lowest and highest window in brackets. "X / this row" is the speed of X divided
by that of the row: above 1, X is faster. Memory is the peak of all processes of a contender together.
"""

SIMULATOR = """## Simulator

The first table compares one physics step with MuJoCo C, in float64; the second compares speed with MuJoCo C alone. In
the second, vecsim computes in float32 with 4 Newton iterations, observations, rewards and resets included. MuJoCo C
makes physics steps alone, in float64, with the solver and the tolerance of each MJCF (PGS for Humanoid, else Newton).
The second table was measured within one hour on a shared machine, and its speeds vary from run to run. The rk4 runs and
those on two cores found most of their code in the cache, so they compiled faster. A second core helps Ant most: with
two, Ant makes 1.92 times the steps of one core. The pendulum makes fewer.

`sim` compares six simulators on the same robots: the same integrator, time step, solver and iterations, random actions
held for one environment step, and the same start states from the middle of episodes. Only Brax has its own solver,
which makes as many steps of projected gradient. vecsim is timed with observations, rewards and resets; the others
simulate physics alone, in their favour. The error of one step is the difference in qvel from MuJoCo C, whose solver
runs to convergence: the largest over the degrees of freedom, divided by timestep x (1 + the largest acceleration). A
training ran on the other core meanwhile.
"""

MJCF = """Models of other packages: each MJCF file that compiles alone and has a joint. A refused file counts under one
rule, the first that applies. Errors are relative and in float64, in states of a simulation under random actions. The
robot of point.xml in gymnasium_robotics slides in a plane at distance zero from the ground, and rounding decides if it
touches; no other accepted file has an error above 1e-10.
"""

LEARNER = """## Learner

The update alone, on a filled rollout: 65,536 samples (2,048 environments x 32 steps), 5 epochs, 4 minibatches, ELU
networks of 256-128-64, 27 observations and 8 actions for all. With a GRU it is 1,024 environments, and a GRU of 128
before both networks, through which the gradient flows for 32 steps: skrl makes 6,713 samples/s, rl_games 6,758 and ours
6,336. SAC runs as a whole trainer with random numbers in place of the simulator.
"""

TRAIN = """## Whole trainings

Environment steps/s from the second iteration on, logging included. Other libraries run on 8 Gymnasium environments with
their own settings, but rsl_rl has SB3's networks and 8 x 1,024 steps. SB3 makes 10 epochs of minibatches of 64 samples,
skrl and CleanRL-style PPO make 10 epochs of 32 minibatches, rsl_rl 5 of 4, rl_games 4 of 2. Their networks are 64-64,
those of rl_games 256-128-64. Three run on vecsim too, with our 1,024 environments (the note says 8), our 4 epochs of 8
minibatches and our networks of 256-128-64. All contenders of a table integrate alike, except Brax, which has 128
environments, models and networks of its own. `rk4` is how Gymnasium ships Ant, and how PPO trains it; it is about four
times the work of `euler`. The first start has empty compiler caches; the second finds what the first left. A training
ran on the other core meanwhile.
"""

GPU = """## GPU

No GPU has run this project. Launches, traffic and registers are counted in the code for an H100: the CUDA C++ that
vecsim writes. Rates are predicted from them by a model. In it a launch takes 1.5 to 2.5 us and the cycles that its
instructions wait, or the time of its traffic if that is longer. More than 8,192 environments are stepped in chunks of
that many. The model is an upper bound, because it knows no waiting for memory. Registers and stacks are the most of all
kernels of a function. A stack holds spilled registers, arrays that are indexed, and 32 bytes for the sine and cosine of
large angles.

The quadrupeds are counted with implicitfast, all others with Euler. Runge-Kutta evaluates the dynamics four times, and
PPO trains Ant, Hopper, Humanoid and Walker2d with it.

Our aim for Ant with Euler is 300 launches and 300 KB: it makes 124 launches and moves 276 KB. At 4,096 environments
launches and arithmetic limit it about equally. With RK4, as PPO trains Ant, it is 439 launches and 1,078 KB.
"""

MEASURED = """## GPU, measured

Each row has what was predicted beside it. Predictions of speed are those of the simulator alone.
"""

SCORES = """## Time to a score

The score is the mean return of deterministic episodes in `gymnasium.make(task)`, ± the standard deviation over
episodes; a cell lists the seeds in order. Beside it is the same policy in the training simulator, over a thousand
episodes, which shows rare falls that 20 episodes miss. Training time is without compilation and evaluations. We
evaluate once per million steps, Humanoid once per three million (four with Euler), and the pendulum, SAC, Q-learning
and JAX more often, so "reached after" is an upper bound. We chose the thresholds. Hyperparameters were tuned on these
tasks and partly on these seeds; expect worse on new tasks.

- Each PPO run had one core, while the other core trained or tested something else, and so had SAC's of Humanoid. Other
  work slowed PPO's seeds 1 to 3 of Ant. Its undisturbed seeds 4 and 5 take 430 s. The seeds that compiled longest had
  an empty cache, the others found most of the code.
- With PPO one seed of Walker2d ends below its threshold; every other seed in the first table reaches its own.
- Trainings integrate as Gymnasium does: HalfCheetah and Pusher with Euler, the others with RK4. Two exceptions: SAC
  trained HumanoidStandup with Euler, and `euler` is PPO with Euler where Gymnasium has RK4. Median scores with Euler
  and with RK4 are: Ant 4,293 and 6,639, Hopper 3,368 and 3,560, Walker2d 4,690 and 5,387, Humanoid 10,609 and 11,054.
  Humanoid had 20 million steps with Euler, and 15 million with RK4. A policy relies on the physics in which it has
  learned: trained with Euler, the worst of three Humanoids lasts 974 of 1,000 steps in the training simulator, and 642
  in Gymnasium.
- The thresholds of InvertedDoublePendulum, Reacher, Pusher, Swimmer and HumanoidStandup are about the best scores of
  PPO, SAC and CrossQ in [SLM-Lab's table](https://github.com/kengz/SLM-Lab/blob/main/docs/BENCHMARKS.md), after one to
  ten million steps.
- Ant sees 27 numbers (`include_cfrc_ext_in_observation=False`). Humanoid sees its positions and velocities alone.
  In Gymnasium it earns 10.8 to 11.1 a step: 5 for not falling, and 1.25 times its speed without what its motors cost.
  So it runs at more than 4.6 m/s.
- `bf16` has the networks in bfloat16. On this CPU with AVX512_BF16 HalfCheetah trains in 49% of the time, Ant in 61%
  of its undisturbed seeds' time. Ant scores 6,673 with it and 6,639 without, HalfCheetah 9,330 and 8,014 (medians of
  5 seeds, of Ant with it of 3). The seeds differ by more than that, so no difference is shown. The runs with it were
  made later than those without.
- Swimmer ends below the threshold with all seeds of PPO, and SAC does not learn it in 200 thousand steps. The reward
  of HumanoidStandup is the height of the torso divided by 0.003 m: SAC holds it at about 0.8 m, PPO at 0.5 m.
- SAC's settings for HalfCheetah were chosen on seeds 1 and 2, out of about ten tries, at an older commit, where both
  scored more. At equal seeds the losses of both commits agree at first, and then rounding separates them. The settings
  of Ant, Walker2d and Humanoid are those of Hopper, with more steps. Two of five seeds of Hopper end low: scores of SAC
  swing between evaluations, and the last one counts. Other work slowed the seeds of Ant and two of Walker2d. Where
  cores were shared all the time, times are left out.
- On one core PPO in JAX trains the pendulum in 3 s and PPO in PyTorch in 2 s, after at most 28 and 20 s of compilation.
  JAX trains HalfCheetah in five times the time of PyTorch (one seed). Eight agents in one program, with Euler, train
  longer than eight in turn on one core, but compile only once.
"""

EXPORT = """## Export

The ONNX file of a trained HalfCheetah scores 5,057 ± 111 in Gymnasium, and the PyTorch policy 5,043 ± 107 with the
same clipping (100 episodes). Without clipping it is 4,910 ± 105, because Gymnasium's control cost counts actions
before they are clipped.
"""

PEERS = """## Minutes to a score, beside other libraries

Each run trains for the same minutes on the same core. Our trainers have their defaults, SB3 has the tuned settings of
RL Baselines3 Zoo (for SAC on the pendulum SB3's defaults), and CleanRL-style PPO has CleanRL's published settings on
one environment. The clock excludes imports, evaluations and compilation: add the last column for a first start. The
last evaluation within the minutes counts. It may be 2% late, because a library finishes its rollout first. Our trainers
evaluate at fixed numbers of steps, so their last evaluation may be 16 s old. Other work ran on the other core. Our SAC,
and our PPO on the pendulum, ended before their time, because their steps were done; their last score counts. Our runs
are newer than those of the other libraries. Three minutes after compilation, HalfCheetah scores 7,747 with our PPO and
3,168 with SB3's.
"""

Q_LEARNING = """## Q-learning, beside PPO and SAC within the same minutes

Both algorithms of `dqn_gpu_torch.py` with bang-bang actions: each actuator is at one end of its range or at the other.
PPO and SAC act continuously, on the same core. The runs of PPO and SAC are those of the tables above, cut off in the
middle of longer schedules. On HalfCheetah SAC had ended (160,000 steps), and on the pendulum both had. On Walker2d both
were trained for this comparison, with schedules that end with it. The last score within the minutes of the longest run
of Q-learning counts, and some runs end earlier. Full effort has its price: Gymnasium's reward on all but the pendulum
has a control cost.

Medians of three seeds. On HalfCheetah DQN scores 5,644 and PQN 4,952, PPO 7,573 and SAC 4,413. On Hopper DQN scores
2,652 and PQN 2,418, PPO 3,221 and SAC 3,177. On Walker2d DQN scores 1,809 and PQN 3,882, PPO 4,704 and SAC 3,926. So
PPO is ahead on each task, on Hopper by less than the seeds differ. Both kinds of Q-learning are ahead of SAC on
HalfCheetah, and behind it on Hopper. On Walker2d PQN is level with SAC, and DQN is behind it. Three seeds differ by as
much as a factor of two.
"""

Q_ABLATION = """DQN on HalfCheetah for 160 thousand steps, with one thing changed in each row. Layer norm counts most:
without it the median is 985, with it 2,678. Five bins score 3,795, and each of their seeds is above all of the
default's: bang-bang actions cost some score here. 512 environments score 3,354 in less time, which is within the spread
of the default's seeds. The other rows show no difference. The defaults were chosen before this table was made.
"""

SETTINGS = """## Settings on the same budget

SAC on HalfCheetah. The ladder trains for 61 thousand steps, with one update for every sixteen (textbook SAC makes one
for each). Each rung keeps the tricks above it, and the last is the default. A row that begins with "all" adds one trick
to that. FlashSAC's blocks score most there, and take three to eight times as long to train on a CPU: they are a flag,
for a GPU. The mean of the critics lowers every seed of the ladder. It is in the default for its score over 160 thousand
steps: the row `one step mean`, which is the default, led the candidates that cost the same, by less than the spread of
the seeds. That was at an older commit; measured again later, the default scores less, 4,436. FlashSAC's blocks learn
more from each step, but a run takes nearly three times as long. On every seed the default reaches 3,000 before them.

PPO on HalfCheetah, sizes. `num_envs` x `num_steps` is the batch; 16 thousand samples serve most tasks here. In the same
batch, long rollouts of few environments learn more from each step, and many environments step faster. Minibatches of
about two thousand samples are best in the median, though seeds overlap: fewer and larger ones learn less, many small
ones learn less and take longer. The update takes two thirds to five sixths of an iteration and grows with the networks.
On a GPU, start with 4,096 environments and double them until steps per second stop growing.
"""

MEMORY = """## Memory

PPO without velocities: `--env-kwargs hidden_observations qvel` leaves positions and angles alone, in training and in
Gymnasium; `stack_observations 4` shows the last four of them. The environment steps and all flags of the learner are
the same, and the budget is short. Medians of three seeds on HalfCheetah: with a GRU the policy scores 1,735, with a
minGRU 1,681, with an LSTM 1,384, with the stack 1,276, without memory 1,181. With velocities it scores 4,280. Each seed
of the GRU is above all without memory. The memories themselves are not ranked: their seeds differ by more than their
medians. On a CPU training with a memory takes one and a half times to almost three times as long.

On Ant the same budget shows no gain from memory: without memory the policy scores 2,290, with the stack 2,421, with a
GRU 1,729, with a minGRU 1,928, with an LSTM 1,708. With velocities it scores 2,174, and its seeds differ most (1,793 to
2,860). Every seed without memory is above every seed with one. Ant needs nine times as many steps for its score in the
first table.
"""

WALK_MEMORY = """`walk-memory` trains a quadruped without its base velocity, each robot with other masses, gains and
friction, under noise and pushes. Only the teacher and the value functions see everything. The budgets are equal: that
of the students includes their teacher's. Each cell has 40 robots of nominal parameters, each for one episode under
random commands, in this simulator and in MuJoCo C. An episode succeeds that reaches the time limit with a mean velocity
error of at most 0.3 m/s. With one training seed each, the policy without memory is off by 0.081 m/s in this simulator,
the fine-tuned student by 0.096 and the GRU by 0.107: on flat ground neither a memory nor a teacher helped within this
budget.
"""

QUADRUPED = """## Quadruped: teacher, students, two simulators

`walk` trains on flat ground and judges the policy in this simulator and in MuJoCo C with the same MJCF. `distill`
trains on rough ground, and judges on all ten levels of difficulty alike. The teacher sees the ground; the other
policies see what a robot senses. Teacher, student and fine-tuning had 60 million steps together; the blind baseline,
which learns by PPO alone, had as many. An episode succeeds that lasts to the time limit with a mean velocity error of
at most 0.5 m/s, on flat ground 0.3 m/s. The velocity error is an interquartile mean. Differences in return are paired
by episode, with 95% intervals.

- The student keeps 94% of its teacher's return: 19.1 of 20.4. Episode by episode, the middle of the differences is 0.33
  [0.20, 0.48]; for the baseline it is 2.26 [2.03, 2.54]. The student succeeds in 62% of the episodes, its teacher in
  69%, the baseline in 55%.
- Fine-tuning with rewards does not help: the return is 18.9, and the velocity error grows from 0.211 to 0.257 m/s.
- With 30% more mass the teacher succeeds in 48% of the episodes, the student in 61% and the fine-tuned one in 64%.
- Nobody walks with 120 ms between decision and effect; no delay was trained.

One training seed each: another training may give other differences. Of so many intervals, one in twenty excludes 0 by
chance. Other work shared the cores.
"""

PANELS = """## Panels of eval_panel.py

The panel of HalfCheetah is of an older version of the script, with other labels of failures. It shows no difference
between simulators: the interquartile mean returns in vecsim, MuJoCo C and MJX are 8,491, 8,496 and 8,505 for PPO and
5,254, 5,252 and 5,251 for SAC.
"""


def sections(results: Path, dollars_per_hour: float | None) -> Iterator[str]:
    """The page in parts: prose, tables, pictures; only what has files."""

    def load(pattern: str) -> list[dict]:
        return tables.load(results, pattern)

    def picture(name: str, words: str) -> list[str]:
        return [f"![{words}]({name})\n"] if (results / name).exists() else []

    def part(pattern: str, make: Callable[[list[dict]], str], *before: str, by: str = "") -> Iterator[str]:
        """What stands before, then one table of all files that match, or one for each value of a key."""
        if found := load(pattern):
            yield from before
            yield from map(make, tables.grouped(found, by) if by else [found])

    records = load("benchmark/*.json")
    of_mode = {mode: [record for record in records if record["mode"] == mode] for mode in ("sim", "learner", "train")}
    yield HEAD
    yield from picture("robots.gif", "trained robots in Gymnasium's environments")
    yield from picture("speed.png", "simulators, learners and whole trainings side by side")
    yield SIMULATOR
    yield from map(tables.parity, load("parity.json"))
    yield from part("vecsim/*.json", tables.physics)
    yield from part("mjcf*.json", tables.mjcf, MJCF)
    yield from map(tables.comparison, of_mode["sim"])
    scaling = [record for record in records if record["mode"] == "scaling"]
    yield from picture("scaling.png", "steps per second over the number of environments")
    for case in sorted({tables.family(record) for record in scaling}):
        yield tables.scaling([record for record in scaling if tables.family(record) == case])
    yield LEARNER
    yield from map(tables.comparison, of_mode["learner"])
    yield TRAIN
    for record in of_mode["train"]:
        yield tables.comparison(record, dollars_per_hour)
    yield from part("profile/*.json", tables.profile)
    yield from part("gpu/predicted.json", lambda found: tables.predicted(found[0]), GPU)
    measured = [record for record in load("gpu/*.json") if "block" in record and not record["name"].endswith("-quick")]
    if measured:
        yield MEASURED
        yield tables.first_hour(measured)
    yield SCORES
    yield from picture("curves.png", "score over training time")
    for name in ("ppo", "euler", "bf16", "sac", "dqn", "mjx", "tasks"):
        if found := [run for run in load(f"{name}/*-seed*.json") if run.get("gymnasium")]:
            yield tables.scores(name, found)
            if name != "ppo":
                yield from picture(f"{name}/curves.png", f"learning curves, {name}")
    yield from map(tables.agents, load("mjx/seeds.json"))
    if load("export/*.json"):
        yield EXPORT
    curves = picture("peers.png", "score over minutes of training, beside other libraries")
    yield from part("peers/*/*-seed*.json", tables.peers, PEERS, *curves, by="env_id")
    if found := load("dqn/*-seed*.json"):
        yield Q_LEARNING
        for members in tables.grouped(found, "env_id"):
            yield tables.at_equal_time(members, load(f"peers/{members[0]['env_id']}/ours-*-seed*.json"))
    q_ablation = partial(tables.candidates, words="DQN with one thing changed")
    yield from part("dqn/ablation/*/*-seed*.json", q_ablation, Q_ABLATION, by="folder")
    yield SETTINGS
    yield from part("sac/candidates/*-seed*.json", partial(tables.candidates, words="candidates for SAC's default"))
    yield from part("sac/ablation/*/*-seed*.json", tables.ablation, by="folder")
    yield from part("ppo/sizes/*/*-seed*.json", tables.sizes, by="folder")
    curves = picture("memory/curves.png", "score over environment steps, with and without memory")
    yield from part("memory/*/*-seed*.json", tables.memories, MEMORY, *curves, by="folder")
    yield from part("walk-memory/*/*/training.json", tables.walkers, WALK_MEMORY)
    yield QUADRUPED
    for record in [*load("quadruped/*/training.json"), *load("distill/*/training.json")]:
        folder = record["path"].parent
        if (summary := folder / "panel/summary.csv").exists():
            yield tables.judged(record, summary)
        yield tables.stages(record)
        yield from picture(f"{folder.relative_to(results)}/curves.png", "training of the policies")
    if found := sorted(results.glob("**/postmortem.md")):
        yield PANELS
        heads = [(path, path.read_text().splitlines()[0].lstrip("# ")) for path in found]
        yield "\n".join(f"- [{head}]({path.relative_to(results)})" for path, head in heads) + "\n"


def page(results: Path, dollars_per_hour: float | None = None) -> str:
    return "\n".join(sections(results, dollars_per_hour))


def show(paths: list[Path]) -> None:
    """Print the tables of these comparisons."""
    for path in paths:
        if path.exists():
            record = json.loads(path.read_text())
            print(tables.scaling([record]) if record["mode"] == "scaling" else tables.comparison(record))


def write(options: Namespace) -> None:
    """Draw the pictures first: the page shows those that are there."""
    from benchmarks import film, plots

    if options.film is not None:
        film.draw(options)
    plots.draw(options.results)
    path = options.results / "README.md"
    path.write_text(page(options.results, options.dollars_per_hour))
    print(path)
