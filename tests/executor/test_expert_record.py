"""What is recorded of experts, in all modes, and read again to place experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from sapwood.base.errors import InvalidRequest
from sapwood.executor.expert_record import ExpertRecord
from sapwood.layers.forward_batch import ForwardBatch

LAYERS = [1, 2]
STEPS = [
    (torch.tensor([5, 6, 7]), [torch.tensor([[0, 1], [0, 2], [0, 3]]), torch.tensor([[3, 1]] * 3)]),
    (torch.tensor([8]), [torch.tensor([[1, 2]]), torch.tensor([[0, 4]])]),  # 4 gives what it takes
]


class Batch:
    def __init__(self, token_ids: Tensor) -> None:
        self.token_ids, self.positions = token_ids, torch.arange(len(token_ids))


def dumped(folder: Path, mode: str, *, max_steps: int | None = None) -> dict[str, Any]:
    record = ExpertRecord(
        mode, layers=LAYERS, num_layers=3, num_experts=4, max_steps=max_steps, folder=folder
    )
    record.start()
    for token_ids, chosen in STEPS:
        record.add(cast(ForwardBatch, Batch(token_ids)), chosen)
    assert not (record.stop(), record.is_on)[1]
    told = record.dump("-dp1")
    (path,) = folder.glob("*-dp1.pt")
    assert str(path) in told
    with pytest.raises(InvalidRequest, match="no step has been recorded"):
        record.dump()
    return cast(dict[str, Any], torch.load(path, weights_only=True))


@pytest.mark.parametrize("mode", ["stat", "stat_approx"])
def test_counts_of_steps(tmp_path: Path, mode: str) -> None:
    counts = dumped(tmp_path / "new", mode)["logical_count"]
    first = [[0, 0, 0, 0], [3, 1, 1, 1], [0, 3, 0, 3]]
    assert counts.tolist() == [first, [[0, 0, 0, 0], [0, 1, 1, 0], [1, 0, 0, 0]]]


def test_the_last_steps_with_their_sizes(tmp_path: Path) -> None:
    (step,) = dumped(tmp_path, "per_pass", max_steps=1)["records"]
    assert (step["forward_pass_id"], step["num_tokens"]) == (1, 1)
    assert step["logical_count"].tolist() == [[0, 0, 0, 0], [0, 1, 1, 0], [1, 0, 0, 0]]


def test_the_experts_of_each_token(tmp_path: Path) -> None:
    first, second = dumped(tmp_path, "per_token")["records"]
    assert first["input_ids"].tolist() == [5, 6, 7]
    assert first["positions"].tolist() == [0, 1, 2]
    assert first["topk_ids_of_layer"][1].tolist() == [[0, 1], [0, 2], [0, 3]]
    assert second["topk_ids_of_layer"].tolist() == [[[0, 0]], [[1, 2]], [[0, 4]]]
