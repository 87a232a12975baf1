"""Score a checkpoint of ppo_gpu_torch.py and the ONNX file of --export in Gymnasium's environment, on the same seeds:

python tests/score_onnx.py runs/NAME/checkpoint.pt results/export/HalfCheetah-v5.json
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import onnxruntime
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ppo_gpu_torch as ppo
import vecsim_torch as vecsim


class OnnxPolicy:
    """An ONNX file as a policy, run by ONNX Runtime."""

    def __init__(self, path: Path):
        self.session = onnxruntime.InferenceSession(path)
        self.metadata = self.session.get_modelmeta().custom_metadata_map
        self.seen = []  # observations (B, obs) and actions (B, actions) of each call

    def act(self, obs: torch.Tensor, started: torch.Tensor | None = None) -> torch.Tensor:
        action = torch.from_numpy(self.session.run(["action"], {"obs": obs.numpy()})[0])
        self.seen.append((obs, action))
        return action


def randomize(agent: torch.nn.Module) -> None:
    """Give an agent weights and running moments that differ from those of a fresh one."""
    generator = torch.Generator().manual_seed(0)
    for weights in agent.parameters():
        weights.data += 0.05 * torch.randn(weights.shape, generator=generator)
    for module in agent.modules():
        if hasattr(module, "variance"):  # of observations, and of a network's batch norm
            module.mean.normal_(0.0, 2.0, generator=generator)
            module.variance.uniform_(0.01, 9.0, generator=generator)


def save_agent(folder: Path, agent: torch.nn.Module, args, algorithm: str, **more) -> Path:
    """`randomize` an agent and write its checkpoint; `more` is in it too. Returns the path."""
    randomize(agent)
    state = dict(algorithm=algorithm, env_id=args.env_id, args=dataclasses.asdict(args), env_steps=640)
    state |= dict(agent=agent.state_dict(), versions=vecsim.versions()) | more
    vecsim.save_checkpoint(folder / "checkpoint.pt", state)
    return folder / "checkpoint.pt"


def write_checkpoint(folder: Path, trainer, algorithm: str, env_id: str, **flags) -> tuple[torch.nn.Module, Path]:
    """An agent of PPO or SAC with random weights and observation statistics, and the path of its checkpoint."""
    args = dataclasses.replace(trainer.task_defaults(env_id), device="cpu", **flags)
    env = vecsim.make(args.env_id, num_envs=1, **args.env_kwargs)
    torch.manual_seed(0)
    agent = trainer.Agent(env.single_observation_space.shape[0], None, env.single_action_space, args)
    return agent, save_agent(folder, agent, args, algorithm)


def check_file(
    policy: OnnxPolicy,
    act,
    statistics: torch.nn.Module,
    limits: tuple[torch.Tensor, torch.Tensor],
    squashed: bool = False,
) -> None:
    """Check that the file gives act(obs), clipped to limits, for 1,000 observations at once and for one alone.

    A third of the observations are far outside of the normaliser's range. squashed: act never leaves the limits."""
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
    """Check the facts in the file; return the names of observations and actions, and the control step in seconds."""
    facts = policy.metadata
    assert facts["script"] == script and facts["env_steps"] == str(env_steps)
    assert {"python", "torch", "gymnasium", "numpy"} <= json.loads(facts["versions"]).keys()
    names = json.loads(facts["observation_names"]), json.loads(facts["action_names"])
    sizes = {x.name: x.shape[1] for x in policy.session.get_inputs() + policy.session.get_outputs()}
    assert (len(names[0]), len(names[1])) == (sizes["obs"], sizes["action"])
    assert len(set(names[0])) == len(names[0])
    return *names, float(facts["control_step_seconds"])


def score_all(checkpoint: str, path: Path, episodes: int = 100) -> dict:
    """Export to `path`; score the PyTorch policy, the same policy with clipped actions, and the ONNX file.

    MuJoCo clips every action, so the robot moves alike. But Gymnasium's control cost counts the action as it was given.
    largest_action_difference: between the ONNX file and the clipped PyTorch policy, over the file's own episodes."""
    args = ppo.parse_args(["--play", checkpoint, "--export", str(path), "--eval-episodes", str(episodes)])
    env = vecsim.make(args.env_id, num_envs=1, **args.env_kwargs)
    limits = env.task.action_limits(env.model)
    scores = dict(pytorch=ppo.play(args))
    act, policy = ppo.load_policy(ppo.load_checkpoint(checkpoint)), OnnxPolicy(path)
    others = dict(pytorch_clipped=lambda obs, started: act(obs).clamp(*limits), onnx=policy.act)
    for name, other in others.items():
        scores[name] = vecsim.evaluate_in_gymnasium(args.env_id, other, episodes, args.seed, args.env_kwargs)
    obs, action = (torch.cat(parts) for parts in zip(*policy.seen, strict=True))
    difference = float((action - act(obs).clamp(*limits)).abs().max())
    return dict(scores=scores, largest_action_difference=difference, metadata=policy.metadata)


def main(checkpoint: str, result: Path) -> None:
    scored = score_all(checkpoint, Path(checkpoint).with_name("policy.onnx"))
    commit = subprocess.check_output(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, text=True)
    record = dict(command=f"python tests/score_onnx.py {checkpoint} {result}", commit=commit.strip())
    versions = vecsim.versions() | dict(onnxruntime=onnxruntime.__version__)
    record |= dict(hardware=vecsim.cpu_name(), versions=versions)
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(record | scored, indent=1) + "\n")
    print(f"{result}:", *(f"{name} {vecsim.describe(score)}" for name, score in scored["scores"].items()), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
