"""Self-attention over the keys and values that another layer has computed.

Source: Brandon et al. 2024, arXiv:2405.12981."""

from __future__ import annotations

from collections.abc import Generator

from torch import Tensor

from sapwood.kernels.attention_batch import AttentionTraits
from sapwood.kernels.recording import CannotRecord, Program
from sapwood.kernels.recording_buffers import Buffer
from sapwood.layers.attention import RMSNormMaker
from sapwood.layers.build import Build
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.layers.heads import HeadLayout
from sapwood.layers.linear import ColumnParallelLinear, RowParallelLinear, even_part
from sapwood.layers.rotary import rotated
from sapwood.layers.targets import Target, prefixed


class SharedAttention:
    """o(attention(rope(norm(q(x))))), which writes no keys and values."""

    def __init__(
        self,
        build: Build,
        source: int,
        hidden_size: int,
        heads: HeadLayout,
        *,
        cos_sin: Tensor,
        q_norm: RMSNormMaker,
        scale: float,
        traits: AttentionTraits,
        bias: bool = False,
    ) -> None:
        """An attention layer.

        source  index of the layer whose keys and values these queries attend to
        q_norm  makes the norm of each query head
        others  as in Attention
        """
        group = build.groups.attention
        self._source = source
        self._num_heads = heads.num_heads_of(group)
        self._head_dim = heads.head_dim
        self._cos_sin = cos_sin
        self._scale = scale
        self._traits = traits
        self._kernels = build.kernels
        width = heads.num_heads * heads.head_dim
        self._q = ColumnParallelLinear(
            build, hidden_size, (even_part("q_proj", width, group),), bias=bias
        )
        self._norm = q_norm(heads.head_dim)
        self._o = RowParallelLinear(build, "o_proj", width, hidden_size, bias=bias, group=group)

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
        heads = self._norm(self._q(x).view(-1, self._head_dim))
        q = rotated(
            heads.view(x.shape[0], self._num_heads, self._head_dim), self._cos_sin, batch.positions
        )
        out = batch.by_request(self._paged_attention, q)
        return out.view(x.shape[0], self._num_heads * self._head_dim)

    def _paged_attention(self, batch: ForwardBatch, q: Tensor) -> Tensor:
        keys, values = batch.kv_caches[self._source]
        attention = batch.inputs_of(self._source).attention
        return self._kernels.paged_attention(q, keys, values, attention, self._scale, self._traits)

    def targets(self) -> dict[str, Target]:
        return self._q.targets() | self._o.targets() | prefixed("q_norm", self._norm.targets())

    def pack(self) -> None:
        self._q.linear.pack()
        self._o.linear.pack()

    def record(self, program: Program, x: Buffer) -> Buffer:
        raise CannotRecord("a recorded step has no attention over another layer's keys and values")
