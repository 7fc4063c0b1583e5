"""A gated short convolution, which mixes each token with the few before it."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sapwood.kernels.coded import LinearPart
from sapwood.kernels.recording import Multiply, Program
from sapwood.kernels.recording_buffers import Buffer
from sapwood.kernels.recording_states import Convolve
from sapwood.layers.adapters import AdapterTarget
from sapwood.layers.build import Build
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.layers.linear import Linear, RowParallelLinear, divide
from sapwood.layers.targets import Slice, Target, prefixed
from sapwood.schema.cache import ACTIVATIONS, CacheGroup, CacheKind, CacheTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvLayout:
    """The convolution of the whole model.

    channels  convolutions of a layer, one for each entry of the hidden states
    length    inputs that an output depends on: the token's own and those before it; at least 2
    """

    channels: int
    length: int

    def cache_group(self, layers: tuple[int, ...]) -> CacheGroup:
        """What these layers keep of each request: the newest inputs of its convolutions."""
        shape = (self.channels, self.length - 1)
        return CacheGroup(
            kind=CacheKind.STATE,
            layers=layers,
            tensors={"conv": CacheTensor(shape, ACTIVATIONS)},
        )


class ShortConv:
    """out(c * conv(b * y)), where b, c and y are three projections of x.

    Source: Liquid AI 2025, arXiv:2511.23404 (LFM2)."""

    def __init__(self, build: Build, layer: int, layout: ConvLayout, *, bias: bool = False) -> None:
        """A mixer whose hidden states have as many entries as there are channels.

        layer  index of the layer, which picks its states
        bias   whether the convolution and both projections have biases
        Raises ConfigError if the ranks cannot have equally many channels
        """
        group = build.groups.attention
        self._layer = layer
        self._kernels = build.kernels
        self._whole = layout.channels
        self._size = divide(layout.channels, group, f"{layout.channels} channels")
        # The three projections lie one after another in one tensor of the checkpoint.
        self._shares = [
            Slice(dim=0, first=part * self._whole + group.rank * self._size, size=self._size)
            for part in range(3)
        ]
        if group.size == 1:
            self._shares = [Slice(dim=0, first=0, size=3 * self._whole)]
        sizes = tuple(share.size for share in self._shares)
        self._in = Linear(build, layout.channels, sizes, bias=bias)
        self._site = build.adapter_site(layout.channels, sum(sizes))
        self._weight = build.empty(self._size, layout.length)
        self._bias = build.empty(self._size) if bias else None
        self._out = RowParallelLinear(
            build, "out_proj", layout.channels, layout.channels, bias=bias, group=group
        )

    def __call__(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """x [T, hidden] -> [T, hidden]; advances the requests' states"""
        return self._out(self._mix(x, batch))

    def steps(self, x: Tensor, batch: ForwardBatch) -> Generator[Tensor, None, Tensor]:
        """As Mixer.steps."""
        yield x
        mixed = self._mix(x, batch)
        yield mixed
        return self._out(mixed)

    def _mix(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """x [T, hidden] -> the inputs [T, this rank's channels] of the output projection"""
        projected = self._in(x)
        if self._site is not None:
            self._site.add(x, projected)
        before, after, y = projected.chunk(3, dim=-1)
        return batch.by_request(self._convolve, before * y).mul_(after)

    def _convolve(self, batch: ForwardBatch, x: Tensor) -> Tensor:
        (states,) = batch.kv_caches[self._layer]
        slots, attention = batch.slots_of(self._layer), batch.inputs_of(self._layer).attention
        return self._kernels.causal_conv(x, self._weight, self._bias, states, slots, attention)

    def targets(self) -> dict[str, Target]:
        blocks = self._put_blocks if self._in.takes_blocks else None
        adapter = None
        if self._site is not None:
            shape = (3 * self._whole, self._whole)
            adapter = AdapterTarget(site=self._site, shape=shape, outputs=self._own_rows)
        found = {
            "in_proj.weight": Target(
                (3 * self._whole, self._whole), self._put, blocks, adapter=adapter
            )
        }
        own = Slice.unless_whole(0, self._shares[0].first, self._size, self._whole)
        length = self._weight.shape[1]
        conv = {"weight": Target((self._whole, 1, length), partial(_copy, self._weight), part=own)}
        if self._bias is not None:
            assert self._in.bias is not None
            found["in_proj.bias"] = Target((3 * self._whole,), self._put_bias)
            conv["bias"] = Target((self._whole,), partial(_copy, self._bias), part=own)
        return found | prefixed("conv", conv) | self._out.targets()

    def _put(self, whole: Tensor) -> None:
        for part, share in enumerate(self._shares):
            self._in.put(part, share.of(whole))

    def _put_blocks(self, whole: LinearPart) -> None:
        for part, share in enumerate(self._shares):
            self._in.put_blocks(part, share.of_blocks(whole))

    def _put_bias(self, whole: Tensor) -> None:
        assert self._in.bias is not None
        self._in.bias.copy_(self._own_rows(whole))

    def _own_rows(self, whole: Tensor) -> Tensor:
        return torch.cat([share.of(whole) for share in self._shares])

    def pack(self) -> None:
        self._in.pack()
        self._out.linear.pack()

    def record(self, program: Program, x: Buffer) -> Buffer:
        """As Mixer.record."""
        projected, mixed = program.buffer(3 * self._size), program.buffer(self._size)
        program.add(Multiply(x=x, layer=self._in.packed, out=projected))
        if self._site is not None:
            self._site.record(program, x, projected)
        program.add(
            Convolve(
                x=projected,
                layer=self._layer,
                weight=self._weight,
                bias=self._bias,
                gated=True,
                out=mixed,
            )
        )
        return self._out.record(program, mixed)


def _copy(parameter: Tensor, tensor: Tensor) -> None:
    parameter.copy_(tensor.view(parameter.shape))
