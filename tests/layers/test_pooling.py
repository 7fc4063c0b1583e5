from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sapwood.layers.pooling import Pooler
from sapwood.schema.pooling import METHODS, Method

CPU = torch.device("cpu")


def step(pooler: Pooler, entries: list[tuple[int, int, Tensor, bool]]) -> Tensor:
    """entries: (row, position of its first token, hidden states, whether its text ends)."""
    return pooler.pool(
        torch.cat([hidden for _, _, hidden, _ in entries]),
        rows=torch.tensor([row for row, *_ in entries]),
        lengths=torch.tensor([len(hidden) for _, _, hidden, _ in entries]),
        positions=torch.cat([first + torch.arange(len(hidden)) for _, first, hidden, _ in entries]),
        answering=torch.tensor(
            [index for index, entry in enumerate(entries) if entry[3]], dtype=torch.int64
        ),
        context_lens=torch.tensor([first + len(hidden) for _, first, hidden, _ in entries]),
    )


def whole(hidden: Tensor, method: Method) -> Tensor:
    return {"last": hidden[-1], "mean": hidden.mean(0), "cls": hidden[0]}[method]


@pytest.mark.parametrize("method", METHODS)
def test_chunks_of_several_texts_give_the_vectors_of_the_wholes(method: Method) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(length, 5, generator=generator) for length in (9, 4, 1))
    pooler = Pooler(method, num_rows=3, hidden_size=5, device=CPU, normalize=False)
    for row in range(3):
        pooler.start(row)
    first = step(pooler, [(2, 0, a[:5], False), (0, 0, b, True)])
    torch.testing.assert_close(first, whole(b, method)[None])
    pooler.start(0)  # another request takes the row
    nothing = step(pooler, [(2, 5, a[5:7], False)])
    assert nothing.shape == (0, 5)
    last = step(pooler, [(0, 0, c, True), (2, 7, a[7:], True)])
    torch.testing.assert_close(last, torch.stack([whole(c, method), whole(a, method)]))


def test_a_mean_is_taken_in_fp32() -> None:
    hidden = torch.full((4096, 2), 1.0, dtype=torch.bfloat16)
    pooler = Pooler("mean", num_rows=1, hidden_size=2, device=CPU, normalize=False)
    pooler.start(0)
    assert torch.equal(step(pooler, [(0, 0, hidden, True)]), torch.ones(1, 2))


@pytest.mark.parametrize(("normalize", "want"), [(True, [[0.6, 0.8]]), (False, [[3.0, 4.0]])])
def test_vectors_are_scaled_if_the_models_are(normalize: bool, want: list[list[float]]) -> None:
    pooler = Pooler("last", num_rows=1, hidden_size=2, device=CPU, normalize=normalize)
    torch.testing.assert_close(pooler.finish(torch.tensor([[3.0, 4.0]])), torch.tensor(want))
