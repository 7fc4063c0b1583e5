"""Self-attention of every token to all tokens of its text, without pages and without padding."""

from __future__ import annotations

from collections.abc import Generator

from torch import Tensor

from sapwood.kernels.recording import CannotRecord, Program
from sapwood.kernels.recording_buffers import Buffer
from sapwood.kernels.texts import group_texts
from sapwood.layers.build import Build
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.layers.heads import HeadLayout
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
        self._kernels = build.kernels
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
        attend = self._kernels.bidirectional_attention
        return attend(q, k, v, cache[TEXTS], self._head_dim**-0.5).flatten(1)

    def targets(self) -> dict[str, Target]:
        return self._qkv.targets() | self._o.targets()

    def pack(self) -> None:
        self._qkv.linear.pack()
        self._o.linear.pack()

    def record(self, program: Program, x: Buffer) -> Buffer:
        raise CannotRecord("its attention looks at later tokens")


TEXTS = "texts of equal length"
"""Where a step keeps what `group_texts` found."""
