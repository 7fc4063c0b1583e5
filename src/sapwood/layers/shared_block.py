"""Blocks of attention and feed-forward whose weights several layers of a model use, each with its
own cache and its own low-rank additions. Source: Glorioso et al. 2024, arXiv:2411.15242 (Zamba 2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.kernels.recording import Add, Join, Program, TakeColumns
from sapwood.kernels.recording_buffers import Buffer
from sapwood.layers.attention import Attention
from sapwood.layers.build import Build
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.layers.layer import FeedForward, Layer, Mixer, NamedNorm, Stream, Sublayer
from sapwood.layers.linear import Arrangement, ColumnParallelLinear, Part
from sapwood.layers.mlp import GatedMLP
from sapwood.layers.streams import Streams, WholeLinear
from sapwood.layers.targets import Target, prefixed


class EmbeddingBeside(Streams):
    """Hidden states and then the embedding, which stays: [T, 2 * hidden]."""

    def __init__(self, norm: NamedNorm, hidden_size: int) -> None:
        """norm: that after the last layer, with its whole name"""
        self._norm = norm
        self._hidden_size = hidden_size

    def opened(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        return torch.cat((x, x), dim=-1)

    def closed(self, x: Tensor) -> Tensor:
        return self._norm.norm(x[:, : self._hidden_size].contiguous())

    def record_opened(self, program: Program, x: Buffer) -> Buffer:
        both = program.buffer(2 * self._hidden_size)
        program.add(Join(x=x, y=x, out=both))
        return both

    def record_closed(self, program: Program, x: Buffer) -> Buffer:
        hidden = program.buffer(self._hidden_size)
        program.add(TakeColumns(x=x, first=0, out=hidden))
        return self._norm.norm.record(program, hidden)

    def targets(self) -> dict[str, Target]:
        return prefixed(self._norm.name, self._norm.norm.targets())

    def pack(self) -> None:
        """There are no linear layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """Outputs of a linear layer that a product of two small matrices adds to.

    name         of the list of these two layers in the checkpoint, which are "0" and "1"
    parts        this rank's outputs, of all that lie together in the layer "1"
    arrangement  of that layer; None: there is one part, whose name is `<name>.1`
    """

    name: str
    parts: tuple[Part, ...]
    arrangement: Arrangement | None = None


class LowRankAddition:
    """outputs += up(down(x)), for several outputs that lie one after another."""

    def __init__(self, build: Build, in_size: int, rank: int, outputs: Sequence[Outputs]) -> None:
        # The small layers that come first are the same on all ranks.
        downs = tuple(Part(f"{one.name}.0", rank, 0, rank) for one in outputs)
        self._down = ColumnParallelLinear(build, in_size, downs, bias=False)
        self._ups = [
            ColumnParallelLinear(build, rank, one.parts, bias=False, arrangement=one.arrangement)
            for one in outputs
        ]

    def __call__(self, x: Tensor, outputs: Tensor) -> None:
        """x [T, in]; outputs [T, this rank's], changed in place"""
        start = 0
        for up, low in zip(self._ups, self._down(x).chunk(len(self._ups), dim=-1), strict=True):
            added = up(low.contiguous())
            outputs[:, start : start + added.shape[1]] += added
            start += added.shape[1]

    def record(self, program: Program, x: Buffer, outputs: Buffer) -> None:
        """Add the same to a recorded step; RuntimeError before `pack`."""
        lows = self._down.record(program, x)
        rank, start = lows.width // len(self._ups), 0
        for index, up in enumerate(self._ups):
            low = program.buffer(rank)
            program.add(TakeColumns(x=lows, first=index * rank, out=low))
            added = up.record(program, low)
            program.add(Add(x=added, residual=outputs, first=start))
            start += added.width

    def targets(self) -> dict[str, Target]:
        found = self._down.targets()
        for up in self._ups:
            found |= up.targets()
        return found

    def pack(self) -> None:
        self._down.linear.pack()
        for up in self._ups:
            up.linear.pack()


class SharedBlock:
    """mlp(norm(attention(norm(hidden states and embedding)))), with nothing added in between."""

    def __init__(
        self,
        attention: Attention,
        mlp: GatedMLP,
        *,
        before_attention: NamedNorm,
        before_mlp: NamedNorm,
        of_attention: Mapping[int, LowRankAddition],
        of_mlp: Mapping[int, LowRankAddition],
    ) -> None:
        """of_attention, of_mlp: per layer that uses the block, what is added there to queries, keys
        and values, and to the first product of the feed-forward; of_attention may be empty"""
        self._attention = attention
        self._mlp = mlp
        self._before_attention = before_attention
        self._before_mlp = before_mlp
        self._of_attention = of_attention
        self._of_mlp = of_mlp
        self._uses = {
            layer: (
                attention.of_layer(layer, of_attention.get(layer)),
                mlp.with_addition(addition),
            )
            for layer, addition in of_mlp.items()
        }

    def __call__(self, x: Tensor, layer: int, batch: ForwardBatch) -> Tensor:
        """x [T, 2 * hidden] -> [T, hidden]; writes keys and values of this layer"""
        attention, mlp = self._uses[layer]
        attended = attention(self._before_attention.norm(x), batch)
        return mlp(self._before_mlp.norm(attended))

    def record(self, program: Program, x: Buffer, layer: int) -> Buffer:
        """Add a call to a recorded step; RuntimeError before `pack`."""
        attention, mlp = self._uses[layer]
        normed = self._before_attention.norm.record(program, x)
        attended = attention.record(program, normed)
        return mlp.record(program, self._before_mlp.norm.record(program, attended))

    def targets(self) -> dict[str, Target]:
        attention, mlp = self._attention.targets(), self._mlp.targets()
        for addition in self._of_attention.values():
            attention |= addition.targets()
        for addition in self._of_mlp.values():
            mlp |= addition.targets()
        found = prefixed("self_attn", attention) | prefixed("feed_forward", mlp)
        for named in (self._before_attention, self._before_mlp):
            found |= prefixed(named.name, named.norm.targets())
        return found

    def pack(self) -> None:
        self._attention.pack()
        self._mlp.pack()
        for addition in (*self._of_attention.values(), *self._of_mlp.values()):
            addition.pack()


class BesideEmbedding(Layer):
    """x + mixer(norm(x)) over the hidden states of an EmbeddingBeside, in place."""

    def __init__(self, mixer: Sublayer[Mixer], hidden_size: int) -> None:
        self._only_mixer = mixer
        self._hidden_size = hidden_size

    def __call__(
        self, x: Tensor, residual: Tensor | None, batch: ForwardBatch
    ) -> tuple[Tensor, Tensor | None]:
        """x [T, 2 * hidden], which is changed; there is never a residual"""
        hidden = x[:, : self._hidden_size]
        normed, _ = self._only_mixer.normed(self.inputs(x, batch), None)
        hidden += self._only_mixer.body(normed, batch)
        return x, None

    def inputs(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """x [T, 2 * hidden] -> what the mixer's norm takes [T, hidden]"""
        return x[:, : self._hidden_size].contiguous()

    def steps(self, x: Tensor, batch: ForwardBatch) -> Iterator[Tensor]:
        raise ConfigError("a layer beside the embedding cannot be converted")

    def change_feed_forwards(self, change: Callable[[FeedForward], FeedForward]) -> None:
        raise ConfigError(
            "ranks with requests of their own cannot share a block of several layers; leave out "
            "--enable-dp-attention"
        )

    def targets(self) -> dict[str, Target]:
        return self._only_mixer.targets()

    def pack(self) -> None:
        self._only_mixer.body.pack()

    def record(self, program: Program, stream: Stream) -> Stream:
        normed, _ = self._only_mixer.record_normed(
            program, Stream(self.record_inputs(program, stream.x), None)
        )
        program.add(Add(x=self._only_mixer.body.record(program, normed), residual=stream.x))
        return stream

    def record_inputs(self, program: Program, x: Buffer) -> Buffer:
        """Add `inputs` to a recorded step."""
        hidden = program.buffer(self._hidden_size)
        program.add(TakeColumns(x=x, first=0, out=hidden))
        return hidden


class SharedBlockLayer(BesideEmbedding):
    """x + mixer(norm(x + linear(block(x and embedding))))."""

    def __init__(
        self,
        build: Build,
        layer: int,
        mixer: Sublayer[Mixer],
        block: SharedBlock,
        hidden_size: int,
        *,
        mixer_prefix: str,
        block_name: str | None,
    ) -> None:
        """A layer without weights.

        layer         its index, which picks its keys and values
        mixer_prefix  in the names of the mixer and its norm
        block_name    of the block, whose weights this layer loads; None: another layer does
        """
        super().__init__(mixer, hidden_size)
        self._layer = layer
        self._block = block
        self._mixer_prefix = mixer_prefix
        self._block_name = block_name
        self._linear = WholeLinear(build, hidden_size, hidden_size)

    def inputs(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        return super().inputs(x, batch) + self._linear(self._block(x, self._layer, batch))

    def record_inputs(self, program: Program, x: Buffer) -> Buffer:
        total = super().record_inputs(program, x)
        made = self._linear.record(program, self._block.record(program, x, self._layer))
        program.add(Add(x=made, residual=total))
        return total

    def targets(self) -> dict[str, Target]:
        found = prefixed(self._mixer_prefix, super().targets())
        found |= prefixed("linear", self._linear.targets())
        if self._block_name is not None:
            found |= prefixed(self._block_name, self._block.targets())
        return found

    def pack(self) -> None:
        super().pack()
        self._linear.pack()
        if self._block_name is not None:
            self._block.pack()
