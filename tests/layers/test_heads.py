"""Where the rows of queries, keys and values lie in a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from sapwood.kernels.quantized import QuantizedWeight
from sapwood.layers.heads import HeadLayout, QkvForm, alibi_slopes, halves_of_pairs

HEADS = HeadLayout(num_heads=4, num_kv_heads=2, head_dim=4)
ROWS = torch.arange((4 + 2 + 2) * 4)


@dataclass
class Ranks:
    """As much of a group of ranks as a form asks for."""

    rank: int = 0
    size: int = 1


def rows_of(form: QkvForm, ranks: Ranks) -> list[list[int]]:
    found = form.arrangement(HEADS, ranks)  # type: ignore[arg-type]
    assert found is not None
    return [rows.tolist() for rows in found.rows]


def test_separate_tensors_need_no_arrangement() -> None:
    assert QkvForm().arrangement(HEADS, Ranks()) is None  # type: ignore[arg-type]


def test_one_after_another() -> None:
    q, k, v = rows_of(QkvForm(fused="qkv"), Ranks())
    assert q + k + v == ROWS.tolist()


def test_grouped_by_key_and_value_head() -> None:
    q, k, v = rows_of(QkvForm(fused="qkv", grouped=True), Ranks())
    whole = ROWS.view(2, 4, 4)  # per group two queries, a key and a value
    assert q == whole[:, :2].flatten().tolist()
    assert k == whole[:, 2].flatten().tolist()
    assert v == whole[:, 3].flatten().tolist()


@pytest.mark.parametrize("form", [QkvForm(fused="qkv"), QkvForm(fused="qkv", grouped=True)])
@pytest.mark.parametrize("pairs", [0, 2, 4])
def test_ranks_share_the_rows(form: QkvForm, pairs: int) -> None:
    form = QkvForm(fused=form.fused, grouped=form.grouped, pairs=pairs)
    parts = [rows_of(form, Ranks(rank, 2)) for rank in range(2)]
    assert [first + second for first, second in zip(*parts, strict=True)] == rows_of(form, Ranks())


def test_pairs_become_halves() -> None:
    assert halves_of_pairs(6, 4).tolist() == [0, 2, 1, 3, 4, 5]
    q, k, v = rows_of(QkvForm(pairs=4), Ranks())
    assert (q[:8], k[:4], v[:4]) == ([0, 2, 1, 3, 4, 6, 5, 7], [0, 2, 1, 3], [0, 1, 2, 3])


def test_rows_of_a_quantised_weight_in_another_order() -> None:
    weight = QuantizedWeight(
        "int8",
        (4, 3),
        torch.arange(12, dtype=torch.int8).view(4, 3),
        torch.tensor([1.0, 2.0, 3.0, 4.0]),
    )
    rows = torch.tensor([2, 0])
    chosen = weight.chosen(rows)
    assert torch.equal(chosen.dequantized(torch.float32), weight.dequantized(torch.float32)[rows])


@pytest.mark.parametrize("num_heads", [1, 4, 6, 12, 32, 71])
def test_slopes_equal_those_of_bloom(num_heads: int) -> None:
    want: Tensor = build_alibi_tensor(torch.ones(1, 2), num_heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(alibi_slopes(num_heads), want)
