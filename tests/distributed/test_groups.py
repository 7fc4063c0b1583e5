"""A group of one, and groups that cannot be."""

from __future__ import annotations

import pytest
import torch

from sapwood.distributed.groups import Group


def test_alone_nothing_is_exchanged() -> None:
    x = torch.randn(2, 3)
    assert Group().all_reduce(x) is x
    assert Group().all_gather(x) is x


def test_impossible_groups() -> None:
    with pytest.raises(ValueError, match=r"rank must be in 0 \.\. 1, got 2"):
        Group(rank=2, size=2)
    with pytest.raises(ValueError, match="needs a process group"):
        Group(rank=0, size=2)
