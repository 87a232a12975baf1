"""A training of InvertedPendulum-v5 by an adapter's `train(env, iterations)`, and the score of its policy."""

import sys

import torch

import vecsim_torch


def run(train, iterations):
    """iterations: how many, unless the command line says."""
    torch.manual_seed(1)
    env = vecsim_torch.make("InvertedPendulum-v5", num_envs=512, compile=True, random_initial_ages=True)
    act = train(env, int(sys.argv[1]) if len(sys.argv) > 1 else iterations)
    score = vecsim_torch.evaluate(vecsim_torch.make("InvertedPendulum-v5", num_envs=100), act, seed=1)
    print("score:", vecsim_torch.describe(score))
