"""Trains a model with GRPO while a sapwood server makes its samples.

    python examples/rl/train.py --steps 40

The server is another process; after every step it takes the new weights, in turn from disk, from
tensors in a request, and from a process group. Prints a line per step, and writes curve.json.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
from checkpoint import write_checkpoint
from grpo import Sample, advantages, loss_of
from server import Group, Server, in_serving_dtype, serving
from sums import Problem, draw_problems, reward
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

WAYS = ("disk", "tensor", "group")


@dataclass(frozen=True)
class Step:
    """reward: the mean over all samples; share_right: of samples that have the sum"""

    step: int
    way: str
    reward: float
    share_right: float
    sample_s: float
    train_s: float
    update_s: float


@dataclass(frozen=True, kw_only=True)
class Settings:
    steps: int = 40
    prompts: int = 4
    samples: int = 8
    max_new_tokens: int = 4
    learning_rate: float = 2e-5
    trained_layers: int = 6
    seed: int = 0


class Trainer:
    """The model that learns, and the server that must follow it."""

    def __init__(self, folder: Path, server: Server, settings: Settings) -> None:
        """folder: the checkpoint with which the server was started; new ones go beside it"""
        torch.manual_seed(settings.seed)
        self.settings = settings
        self._folder = folder
        self._server = server
        self._draw = random.Random(settings.seed)
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32
        )
        first = self.model.config.num_hidden_layers - settings.trained_layers
        self._trained = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if name.startswith("model.layers.") and int(name.split(".")[2]) >= first
        }
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in self._trained)
        self._optimizer = torch.optim.AdamW(self._trained.values(), lr=settings.learning_rate)
        self._whole = safetensors.torch.load_file(folder / "model.safetensors")
        self._group = Group(server)
        self._ways: dict[str, Callable[[Mapping[str, Tensor], str], None]] = {
            "disk": self._by_disk,
            "tensor": server.take_tensors,
            "group": self._group.send,
        }

    def step(
        self,
        number: int,
        way: str,
        problems: Sequence[Problem],
        rate: Callable[[Problem, str], float],
    ) -> Step:
        """Sample, learn, and have the server take the new weights."""
        settings = self.settings
        started_s = time.monotonic()
        answers = self._server.generate(
            [problem.prompt for problem in problems],
            samples=settings.samples,
            max_new_tokens=settings.max_new_tokens,
        )
        versions = {answer["meta_info"]["weight_version"] for answer in answers}
        if number and versions != {str(number)}:
            raise RuntimeError(f"step {number} was sampled with the weights {versions}")
        groups = [
            answers[first : first + settings.samples]
            for first in range(0, len(answers), settings.samples)
        ]
        rewards = [
            [rate(problem, answer["text"]) for answer in group]
            for problem, group in zip(problems, groups, strict=True)
        ]
        sampled_s = time.monotonic()
        self._learn(problems, groups, advantages(rewards))
        trained_s = time.monotonic()
        self._ways[way](in_serving_dtype(self._trained), str(number + 1))
        flat = [one for group in rewards for one in group]
        return Step(
            step=number,
            way=way,
            reward=sum(flat) / len(flat),
            share_right=sum(one == 1.0 for one in flat) / len(flat),
            sample_s=sampled_s - started_s,
            train_s=trained_s - sampled_s,
            update_s=time.monotonic() - trained_s,
        )

    def run(self) -> list[Step]:
        found: list[Step] = []
        for number in range(self.settings.steps):
            problems = draw_problems(self._draw, self.settings.prompts)
            found.append(self.step(number, WAYS[number % len(WAYS)], problems, reward))
            sys.stdout.write(f"{found[-1]}\n")
            sys.stdout.flush()
        return found

    def close(self) -> None:
        self._group.close()

    def _learn(
        self,
        problems: Sequence[Problem],
        groups: Sequence[Sequence[Mapping[str, object]]],
        of_groups: Sequence[Sequence[float]],
    ) -> None:
        prompts = self._server.post(
            "/tokenize", {"prompt": [problem.prompt for problem in problems]}
        )["tokens"]
        samples = [
            Sample(prompt, list(answer["output_ids"]), advantage)  # type: ignore[call-overload]
            for prompt, group, of_group in zip(prompts, groups, of_groups, strict=True)
            for answer, advantage in zip(group, of_group, strict=True)
            if advantage != 0.0
        ]
        if not samples:
            return
        self._optimizer.zero_grad()
        loss_of(self.model, samples).backward()
        torch.nn.utils.clip_grad_norm_(self._trained.values(), 1.0)
        self._optimizer.step()

    def _by_disk(self, changed: Mapping[str, Tensor], version: str) -> None:
        """A whole checkpoint in a folder of its own."""
        target = self._folder.parent / "update"
        target.mkdir(exist_ok=True)
        for file in self._folder.iterdir():
            if file.suffix != ".safetensors":
                (target / file.name).write_bytes(file.read_bytes())
        self._whole.update(changed)
        safetensors.torch.save_file(self._whole, target / "model.safetensors", {"format": "pt"})
        self._server.take_from_disk(target, version)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--prompts", type=int, default=Settings.prompts)
    parser.add_argument("--samples", type=int, default=Settings.samples)
    parser.add_argument("--threads", type=int, help="of the trainer; default: torch's")
    parser.add_argument("--learning-rate", type=float, default=Settings.learning_rate)
    parser.add_argument("--output", type=Path, default=Path("curve.json"))
    asked = parser.parse_args()
    settings = Settings(
        steps=asked.steps,
        prompts=asked.prompts,
        samples=asked.samples,
        learning_rate=asked.learning_rate,
    )
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    with tempfile.TemporaryDirectory() as folder:
        model = write_checkpoint(asked.model, Path(folder) / "start")
        with serving(model, "--dtype", "bfloat16", "--max-total-tokens", "8192",
                     "--log-level", "warning") as server:  # fmt: skip
            trainer = Trainer(model, server, settings)
            steps = trainer.run()
            trainer.close()
    asked.output.write_text(json.dumps([asdict(step) for step in steps], indent=1))


if __name__ == "__main__":
    main()
