"""Score a checkpoint of ppo_gpu_torch.py and the ONNX file of --export in Gymnasium's environment, on the same seeds:

    python tests/score_onnx.py runs/NAME/checkpoint.pt results/export/HalfCheetah-v5.json
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnxruntime
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ppo_gpu_torch as ppo
import vecsim_torch


class OnnxPolicy:
    """An ONNX file that acts like a trainer's Agent, in ONNX Runtime."""

    def __init__(self, path: Path):
        self.session = onnxruntime.InferenceSession(path)
        self.metadata = self.session.get_modelmeta().custom_metadata_map
        self.seen = []  # the observations of each step, (B, obs), and the actions, (B, actions)

    def act(self, obs: torch.Tensor) -> torch.Tensor:
        action = torch.from_numpy(self.session.run(["action"], {"obs": obs.numpy()})[0])
        self.seen.append((obs, action))
        return action

    # What evaluate_gymnasium does with an agent before it plays: this one is on the CPU already.

    def __deepcopy__(self, memo: dict) -> OnnxPolicy:
        return self

    def cpu(self) -> OnnxPolicy:
        return self


def randomize(agent: torch.nn.Module) -> None:
    """Weights and running moments unlike those of a fresh agent."""
    generator = torch.Generator().manual_seed(0)
    for weights in agent.parameters():
        weights.data += 0.05 * torch.randn(weights.shape, generator=generator)
    for module in agent.modules():
        if hasattr(module, "variance"):  # of observations, and of a network's batch norm
            module.mean.normal_(0.0, 2.0, generator=generator)
            module.variance.uniform_(0.01, 9.0, generator=generator)


def check_file(
    policy: OnnxPolicy,
    act,
    statistics: torch.nn.Module,
    limits: tuple[torch.Tensor, torch.Tensor],
    squashed: bool = False,
) -> None:
    """The file gives act(obs), clipped to limits, for 1,000 observations together and for one alone.

    A third of the observations are far outside the normaliser's range. squashed: no action is outside the limits."""
    generator = torch.Generator().manual_seed(1)
    obs = torch.randn(1000, len(statistics.mean), generator=generator)
    obs = obs * statistics.deviation() + statistics.mean.float()
    obs[::3] *= 1000.0
    assert (statistics.normalize(obs).abs() == statistics.limit).any(1).sum() > 300
    raw = act(obs)
    wanted = raw.clamp(*limits)
    share = float((wanted != raw).float().mean())
    assert 0.05 < share < 0.95 or squashed, share
    assert (policy.act(obs) - wanted).abs().max() <= 1e-5
    for k in (0, 1):  # outside the range and inside
        assert (policy.act(obs[k : k + 1]) - wanted[k : k + 1]).abs().max() <= 1e-5


def read_names(policy: OnnxPolicy, script: str, env_steps: int) -> tuple[list[str], list[str], float]:
    """Names of observations and actions and the control step, after a look at the other facts."""
    facts = policy.metadata
    assert facts["script"] == script and facts["env_steps"] == str(env_steps)
    assert {"python", "torch", "gymnasium", "numpy"} <= json.loads(facts["versions"]).keys()
    names = json.loads(facts["observation_names"]), json.loads(facts["action_names"])
    sizes = {x.name: x.shape[1] for x in policy.session.get_inputs() + policy.session.get_outputs()}
    assert (len(names[0]), len(names[1])) == (sizes["obs"], sizes["action"])
    assert len(set(names[0])) == len(names[0])
    return *names, float(facts["control_step_seconds"])


def score_all(checkpoint: str, path: Path, episodes: int = 100) -> dict:
    """Export to `path`; scores of the PyTorch policy, of the same with clipped actions, and of the ONNX file.

    MuJoCo clips every action, so the robot moves alike; but Gymnasium's control cost counts an action as it was given.
    The largest action difference is that between the ONNX file and the clipped PyTorch policy, over all observations of
    the ONNX file's episodes."""
    args = ppo.parse_args(["--play", checkpoint, "--export", str(path), "--eval-episodes", str(episodes)])
    scores = dict(pytorch=ppo.play(args))
    env = vecsim_torch.make(args.env_id, num_envs=1, **args.env_kwargs)
    agent = ppo.Agent(env.single_observation_space.shape[0], None, env.single_action_space, args)
    agent.load_state_dict(ppo.load_checkpoint(checkpoint, "ppo")["agent"])
    agent.to_env = lambda action: ppo.Agent.to_env(agent, action).clamp(*env.task.action_limits(env.model))
    policy = OnnxPolicy(path)
    scores |= dict(pytorch_clipped=ppo.evaluate_gymnasium(agent, args), onnx=ppo.evaluate_gymnasium(policy, args))
    obs, action = (torch.cat(parts) for parts in zip(*policy.seen, strict=True))
    difference = float((action - agent.act(obs)).abs().max())
    return dict(scores=scores, largest_action_difference=difference, metadata=policy.metadata)


def main(checkpoint: str, result: Path) -> None:
    scored = score_all(checkpoint, Path(checkpoint).with_name("policy.onnx"))
    commit = subprocess.check_output(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, text=True)
    record = dict(command=f"python tests/score_onnx.py {checkpoint} {result}", commit=commit.strip())
    versions = ppo.versions() | dict(onnxruntime=onnxruntime.__version__)
    record |= dict(hardware=vecsim_torch.cpu_name(), versions=versions)
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(record | scored, indent=1) + "\n")
    print(f"{result}:", *(f"{name} {ppo.describe(score)}" for name, score in scored["scores"].items()), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
