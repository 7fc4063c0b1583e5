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
