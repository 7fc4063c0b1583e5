"""Attention of a decoder's tokens to the vectors of a sound, which are made once and never grow.

Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.3."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.kernels.recording import CannotRecord, Program
from sapwood.kernels.recording_buffers import Buffer
from sapwood.layers.build import Build
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.layers.heads import HeadLayout
from sapwood.layers.layer import FeedForward, Layer, Mixer, Stream, Sublayer
from sapwood.layers.linear import ColumnParallelLinear, RowParallelLinear, even_part
from sapwood.layers.targets import Target


class CrossAttention:
    """o(attention(q(x), keys, values)), where keys and values are those of the request's sound.

    A request without a sound adds nothing."""

    def __init__(
        self,
        build: Build,
        layer: int,
        hidden_size: int,
        heads: HeadLayout,
        *,
        names: tuple[str, str],
    ) -> None:
        """layer: which of `ForwardBatch.across` is its own; names: of the projections to queries
        and to the output, which have biases"""
        group = build.groups.attention
        if group.size > 1:
            raise ConfigError("attention to sounds cannot be shared by ranks; leave out --tp-size")
        width = heads.num_heads * heads.head_dim
        self._layer = layer
        self._num_heads, self._head_dim = heads.num_heads, heads.head_dim
        self._q = ColumnParallelLinear(
            build, hidden_size, (even_part(names[0], width, group),), bias=True
        )
        self._o = RowParallelLinear(build, names[1], width, hidden_size, bias=True, group=group)

    def __call__(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """x [T, hidden] -> [T, hidden]"""
        return self._o(batch.by_request(self._attend, self._q(x)))

    def steps(self, x: Tensor, batch: ForwardBatch) -> Generator[Tensor, None, Tensor]:
        """As Mixer.steps."""
        yield x
        attended = batch.by_request(self._attend, self._q(x))
        yield attended
        return self._o(attended)

    def _attend(self, batch: ForwardBatch, q: Tensor) -> Tensor:
        """q [T, heads * head_dim] -> the same shape"""
        q = q.view(len(q), self._num_heads, self._head_dim)
        out = torch.zeros_like(q)
        start = 0
        for index, length in enumerate(batch.attention.query_lens):
            own = batch.across[index] if batch.across else None
            if own is not None:
                keys, values = own[self._layer].to(q.dtype)
                rows = slice(start, start + length)
                # With a dimension for the batch torch takes its fused form, many times as fast.
                asked = q[rows].transpose(0, 1)[None]
                mixed = F.scaled_dot_product_attention(asked, keys[None], values[None])
                out[rows] = mixed[0].transpose(0, 1)
            start += length
        return out.flatten(1)

    def targets(self) -> dict[str, Target]:
        return self._q.targets() | self._o.targets()

    def pack(self) -> None:
        self._q.linear.pack()
        self._o.linear.pack()

    def record(self, program: Program, x: Buffer) -> Buffer:
        raise CannotRecord("its layers attend to sounds")


class CrossLayer(Layer):
    """Attention to earlier tokens, attention to the sound, then the feed-forward."""

    def __init__(
        self,
        mixer: Sublayer[Mixer],
        across: Sublayer[Mixer],
        feed_forward: Sublayer[FeedForward],
    ) -> None:
        super().__init__(mixer, feed_forward)
        self._across = across

    def __call__(
        self, x: Tensor, residual: Tensor | None, batch: ForwardBatch
    ) -> tuple[Tensor, Tensor | None]:
        for mixer in (self._mixer, self._across):
            normed, residual = mixer.normed(x, residual)
            x, residual = mixer.finished(mixer.body(normed, batch), residual)
        normed, residual = self._feed_forward.normed(x, residual)
        return self._feed_forward.finished(self._feed_forward.body(normed), residual)

    def steps(self, x: Tensor, batch: ForwardBatch) -> Iterator[Tensor]:
        raise ConfigError("a model that hears cannot be converted by what texts show of it")

    def targets(self) -> dict[str, Target]:
        return self._across.targets() | super().targets()

    def pack(self) -> None:
        super().pack()
        self._across.body.pack()

    def record(self, program: Program, stream: Stream) -> Stream:
        return self._feed_forward.record(
            program, self._across.record(program, self._mixer.record(program, stream))
        )
