from __future__ import annotations

import pytest
import torch

from sapwood.layers.bidirectional import attend, group_texts

CPU = torch.device("cpu")


@pytest.mark.parametrize("lengths", [(4,), (3, 3), (1, 5, 2, 5, 1, 1)])
def test_every_token_attends_to_its_own_text_only(lengths: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), 2, 8, generator=generator) for _ in range(3))
    got = attend(q, k, v, group_texts(lengths, CPU), 0.3)
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    want = [
        torch.einsum("hqk,khd->qhd", (0.3 * torch.einsum("qhd,khd->hqk", a, b)).softmax(-1), c)
        for a, b, c in parts
    ]
    torch.testing.assert_close(got, torch.cat(want).reshape(-1, 16), atol=1e-5, rtol=1e-5)


def test_texts_are_grouped_by_length() -> None:
    groups = group_texts((2, 1, 2), CPU)
    assert {group.length: group.rows.tolist() for group in groups} == {2: [0, 1, 3, 4], 1: [2]}
    [only] = group_texts((3, 3), CPU)
    assert only.rows is None
