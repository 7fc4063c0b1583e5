"""The parts of examples/rl that learn: losses, advantages and rewards."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import save_llama

EXAMPLE = Path(__file__).parents[2] / "examples" / "rl"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Its modules, which import each other as programs in one folder do."""
    names = ("checkpoint", "curve", "grpo", "server", "sums", "train")
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import train

    yield train
    for name in names:
        sys.modules.pop(name, None)


def test_the_loss_is_that_of_every_sample_alone(example: Any, tmp_path: Path) -> None:
    """Padding, different lengths and equal samples change nothing."""
    import grpo

    folder = save_llama(tmp_path / "model", num_hidden_layers=1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    samples = [
        grpo.Sample([1, 2, 3], [4, 5], 1.5),
        grpo.Sample([1, 2], [7], -0.5),
        grpo.Sample([1, 2, 3], [4, 5], 0.5),
    ]
    expected = 0.0
    for one in samples:
        ids = torch.tensor([one.prompt_ids + one.output_ids])
        log_probs = model(ids).logits.float().log_softmax(-1)[0]
        for place, token in enumerate(one.output_ids, len(one.prompt_ids)):
            expected -= one.advantage * log_probs[place - 1, token].item() / 5
    assert grpo.loss_of(model, samples).item() == pytest.approx(expected, rel=1e-5)


def test_advantages_and_rewards(example: Any) -> None:
    import grpo
    import sums
    from curve import running_mean

    (first, second) = grpo.advantages([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5]])
    assert first == pytest.approx([1, -1, -1, 1], abs=1e-3)
    assert second == [0.0, 0.0]
    problem = sums.Problem(7, 8)
    assert problem.prompt.endswith("7 + 8 =")
    for answer, expected in ((" 15\n9", 1.0), (" 16", 0.1), (" fifteen", 0.0), ("", 0.0)):
        assert math.isclose(sums.reward(problem, answer), expected)
    assert running_mean([0.0, 1.0, 2.0], 2) == [0.0, 0.5, 1.5]


def test_a_server_follows_the_trainer_by_each_way(example: Any, tmp_path: Path) -> None:
    """Three steps against `sapwood serve`: every step samples with the weights of the step before,
    and at the end the server has the trainer's, those that learn and those that do not."""
    import random

    import server as server_module
    import sums

    folder = save_llama(tmp_path / "start", num_hidden_layers=2)
    flags = ("--dtype", "bfloat16", "--max-total-tokens", "1024", "--log-level", "warning")
    settings = example.Settings(samples=4, max_new_tokens=4, learning_rate=1e-2, trained_layers=1)
    with server_module.serving(folder, *flags) as server:
        trainer = example.Trainer(folder, server, settings)
        before = {name: one.detach().clone() for name, one in trainer._trained.items()}
        draw = random.Random(0)
        for number, way in enumerate(example.WAYS):
            step = trainer.step(
                number,
                way,
                sums.draw_problems(draw, 2),
                lambda problem, answer: sum(ord(letter) % 2 for letter in answer) / 8,
            )
            assert step.way == way
        assert server.post("/generate", {"text": "1", "sampling_params": {"max_new_tokens": 1}})[
            "meta_info"
        ]["weight_version"] == str(len(example.WAYS))
        state = trainer.model.state_dict()
        for name in ("model.layers.1.mlp.down_proj.weight", "model.layers.0.mlp.down_proj.weight"):
            rows = server.post("/get_weights_by_name", {"name": name, "truncate_size": 4096})
            assert torch.equal(torch.tensor(rows), state[name].bfloat16().float())
        changed = [name for name, one in trainer._trained.items() if not one.equal(before[name])]
        assert changed
        trainer.close()
