"""Self-attention of every token to all tokens of its text, without pages and without padding.

The texts of a step lie one after the other. Those of equal length are computed together, as one
batch without padding; a length that occurs once is a batch of one.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.kernels.recording import Buffer, CannotRecord, Program
from sapwood.layers.attention import HeadLayout
from sapwood.layers.build import Build
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.layers.linear import ColumnParallelLinear, RowParallelLinear
from sapwood.layers.targets import Target


class BidirectionalAttention:
    """o(attention(qkv(x))) for one layer of an encoder."""

    def __init__(
        self,
        build: Build,
        hidden_size: int,
        num_heads: int,
        *,
        names: tuple[str, str, str, str],
    ) -> None:
        """`names`: of the query, key, value and output projection in the checkpoint; all have a
        bias"""
        query, key, value, output = names
        group = build.groups.attention
        head_dim = hidden_size // num_heads
        heads = HeadLayout(num_heads=num_heads, num_kv_heads=num_heads, head_dim=head_dim)
        self._num_heads = heads.num_heads_of(group)
        self._head_dim = head_dim
        parts = heads.qkv_parts(group, (query, key, value))
        self._qkv = ColumnParallelLinear(build, hidden_size, parts, bias=True)
        self._o = RowParallelLinear(build, output, hidden_size, hidden_size, bias=True, group=group)

    def __call__(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """x [T, hidden] -> [T, hidden]"""
        return self._o(self._attend(x, batch))

    def steps(self, x: Tensor, batch: ForwardBatch) -> Generator[Tensor, None, Tensor]:
        """As Mixer.steps."""
        yield x
        attended = self._attend(x, batch)
        yield attended
        return self._o(attended)

    def _attend(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        lengths, cache = batch.attention.query_lens, batch.attention.cache
        if TEXTS not in cache:
            cache[TEXTS] = group_texts(lengths, x.device)
        q, k, v = self._qkv(x).view(x.shape[0], 3, self._num_heads, self._head_dim).unbind(1)
        return attend(q, k, v, cache[TEXTS], self._head_dim**-0.5)

    def targets(self) -> dict[str, Target]:
        return self._qkv.targets() | self._o.targets()

    def pack(self) -> None:
        self._qkv.linear.pack()
        self._o.linear.pack()

    def record(self, program: Program, x: Buffer) -> Buffer:
        raise CannotRecord("its attention looks at later tokens")


TEXTS = "texts of equal length"
"""Where a step keeps what `group_texts` found."""


@dataclass(frozen=True, slots=True)
class EqualTexts:
    """Texts of equal length.

    length  tokens of each text
    rows    [texts * length] int64: the texts' tokens among the tokens of the step, text by text;
            None: the step has no other texts
    """

    length: int
    rows: Tensor | None


def group_texts(lengths: Sequence[int], device: torch.device) -> list[EqualTexts]:
    """The step's texts by length; made once per step, used by every layer."""
    by_length: dict[int, list[int]] = {}
    for start, length in zip(accumulate(lengths, initial=0), lengths, strict=False):
        by_length.setdefault(length, []).append(start)
    if len(by_length) == 1:
        return [EqualTexts(lengths[0], None)]
    return [
        EqualTexts(
            length,
            (torch.tensor(starts)[:, None] + torch.arange(length)).view(-1).to(device),
        )
        for length, starts in by_length.items()
    ]


def attend(q: Tensor, k: Tensor, v: Tensor, texts: Sequence[EqualTexts], scale: float) -> Tensor:
    """q, k, v [T, heads, head_dim] of all texts -> [T, heads * head_dim]."""
    num_tokens, num_heads, head_dim = q.shape
    out = torch.empty(num_tokens, num_heads * head_dim, dtype=q.dtype, device=q.device)
    for group in texts:

        def of_group(x: Tensor, group: EqualTexts = group) -> Tensor:
            own = x if group.rows is None else x.index_select(0, group.rows)
            return own.reshape(-1, group.length, num_heads, head_dim).transpose(1, 2)

        mixed = F.scaled_dot_product_attention(of_group(q), of_group(k), of_group(v), scale=scale)
        mixed = mixed.transpose(1, 2).reshape(-1, num_heads * head_dim)
        if group.rows is None:
            return mixed
        out.index_copy_(0, group.rows, mixed)
    return out
