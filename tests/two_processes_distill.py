"""Run by torchrun, twice at once: a short teacher, student and fine-tuning on the recall probe; each process saves its agents."""

import sys
from pathlib import Path

import torch
from test_distill import RecallEnv, small_args
from torch import distributed

import ppo_distill_teacher_student as distill

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    kept = {}
    train_stage = distill.train_stage

    def keeping(stage, *arguments):
        state, results = train_stage(stage, *arguments)
        kept[stage] = state["agent"]
        return state, results

    distill.train_stage = keeping
    steps = dict(total_timesteps=3_072, student_timesteps=1_536, finetune_timesteps=768, log_every=384)
    stages = ("teacher", "student", "finetune")
    distill.train(small_args(folder / "run", **steps, stages=stages, critic_warmup_iterations=1), RecallEnv)
    torch.save(kept, folder / f"agents-{distributed.get_rank()}.pt")
    distributed.destroy_process_group()
