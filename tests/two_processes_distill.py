"""Run by torchrun in two processes: three stages on the recall probe. Each process saves its agents."""

import sys
from pathlib import Path

import torch
from test_distill import RecallEnv, small_args
from torch import distributed

import ppo_distill_teacher_student as distill

if __name__ == "__main__":
    folder, kept = Path(sys.argv[1]), {}

    class Keeping(distill.StageRun):
        def __init__(self, stage, *arguments):
            super().__init__(stage, *arguments)
            kept[stage] = self.agent

    distill.StageRun = Keeping
    steps = dict(total_timesteps=3_072, student_timesteps=1_536, finetune_timesteps=768, log_every=384)
    stages = ("teacher", "student", "finetune")
    distill.train(small_args(folder / "run", **steps, stages=stages, critic_warmup_iterations=1), RecallEnv)
    weights = {stage: agent.state_dict() for stage, agent in kept.items()}
    torch.save(weights, folder / f"agents-{distributed.get_rank()}.pt")
    distributed.destroy_process_group()
