"""Latent attention's sizes, and its ops against the reference's."""

from __future__ import annotations

import pytest

from sapwood.kernels.latent import LatentSizes

DEEPSEEK_V3 = LatentSizes(
    num_heads=128, rank=512, rope_dim=64, nope_dim=128, value_dim=128, query_rank=1536
)


def test_sizes() -> None:
    assert (DEEPSEEK_V3.row, DEEPSEEK_V3.key_dim, DEEPSEEK_V3.made) == (576, 192, 256)
    # Of the published model's layers: 7168 -> 1536 and 576, 1536 -> 128 * 192, and so on.
    assert DEEPSEEK_V3.num_parameters(7168) == 187_105_280
    with pytest.raises(ValueError, match="must be >= 1"):
        LatentSizes(num_heads=1, rank=8, rope_dim=0, nope_dim=8, value_dim=8)
    with pytest.raises(ValueError, match="even"):
        LatentSizes(num_heads=1, rank=7, rope_dim=4, nope_dim=8, value_dim=8)


@pytest.mark.parametrize(
    ("num_new", "num_keys", "expands"),
    [
        (1, 1, False),
        (1, 8000, False),
        (8, 8000, False),
        (64, 64, True),
        (64, 8000, False),
        (1024, 1024, True),
        (1024, 8000, True),
        (8000, 8000, True),
    ],
)
def test_which_form_costs_less(num_new: int, num_keys: int, expands: bool) -> None:
    assert DEEPSEEK_V3.expands(num_new, num_keys) is expands
