"""A gated delta net whose values go through a convolution with weights made of each token.

Source: Gu et al. 2025, arXiv:2508.15884 (JetBlock)."""

from __future__ import annotations

from collections.abc import Generator
from itertools import accumulate

import torch
from torch import Tensor

from sapwood.kernels.activations import Activation
from sapwood.kernels.recording import Activate, Join, Program, TakeColumns
from sapwood.kernels.recording_buffers import Buffer
from sapwood.kernels.recording_states import Convolve
from sapwood.layers.build import Build
from sapwood.layers.delta import Columns, DeltaCore, DeltaLayout, DeltaNames
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.layers.linear import ColumnParallelLinear, Part, RowParallelLinear, even_part
from sapwood.layers.targets import Target

_GENERATOR = "dynamic_conv1d.kernel_generator"


class JetBlock:
    """o(norm(delta_rule(silu(q), silu(k), silu(conv(v)))) * silu(gate)), of projections of x; the
    convolution's weights are w2(silu(w1(x))), others for each token and channel."""

    def __init__(
        self,
        build: Build,
        layer: int,
        hidden_size: int,
        layout: DeltaLayout,
        *,
        generator_size: int,
        eps: float,
    ) -> None:
        """A layer without weights.

        layer   index of the layer, which picks its states
        layout  of the heads, with values alone convolved
        generator_size  outputs of w1
        eps     of the norm over each head
        Raises ConfigError if the ranks cannot have equally many heads
        """
        group = build.groups.attention
        names = DeltaNames(conv=(), norm="o_norm")
        self._core = DeltaCore(build, layer, layout, names=names, eps=eps)
        self._layer = layer
        self._kernels = build.kernels
        self._length = layout.length
        keys, _, values = layout.sizes
        sizes = {
            "q_proj": keys,
            "k_proj": keys,
            "v_proj": values,
            "g_proj": values,
            "a_proj": layout.num_heads,
            "b_proj": layout.num_heads,
        }
        parts = [even_part(name, size, group) for name, size in sizes.items()]
        # The small layer in between is the same on all ranks.
        parts.append(Part(f"{_GENERATOR}.w1", generator_size, 0, generator_size))
        self._sizes = [part.size for part in parts]
        self._in = ColumnParallelLinear(build, hidden_size, tuple(parts), bias=False)
        weights = even_part(f"{_GENERATOR}.w2", values * layout.length, group)
        self._weights = ColumnParallelLinear(build, generator_size, (weights,), bias=True)
        self._out = RowParallelLinear(build, "o_proj", values, hidden_size, bias=False, group=group)

    def __call__(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """x [T, hidden] -> [T, hidden]; advances the requests' states"""
        projected = self._in(x)
        weights = self._weights(self._generator_states(projected))
        return self._out(self._mix(projected, weights, batch))

    def steps(self, x: Tensor, batch: ForwardBatch) -> Generator[Tensor, None, Tensor]:
        """As Mixer.steps."""
        yield x
        projected = self._in(x)
        states = self._generator_states(projected)
        yield states
        mixed = self._mix(projected, self._weights(states), batch)
        yield mixed
        return self._out(mixed)

    def _generator_states(self, projected: Tensor) -> Tensor:
        """The inputs [T, generator_size] of w2."""
        return self._silu(projected[:, -self._sizes[-1] :])

    def _silu(self, x: Tensor) -> Tensor:
        return self._kernels.activate(x.contiguous(), Activation.SILU)

    def _mix(self, projected: Tensor, weights: Tensor, batch: ForwardBatch) -> Tensor:
        """projected [T, all parts] and the convolution's weights [T, values * length] -> the inputs
        of the output projection"""
        q, k, v, gate, decay, write, _ = projected.split_with_sizes(self._sizes, dim=1)
        values = batch.by_request(self._convolve, v, weights.view(*v.shape, self._length))
        queries_and_keys = self._silu(projected[:, : q.shape[1] + k.shape[1]])
        qkv = torch.cat((queries_and_keys, values), dim=1)
        return self._core(qkv, decay, write, gate, batch)

    def _convolve(self, batch: ForwardBatch, values: Tensor, weights: Tensor) -> Tensor:
        windows, _ = batch.kv_caches[self._layer]
        slots, attention = batch.slots_of(self._layer), batch.inputs_of(self._layer).attention
        return self._kernels.causal_conv(
            values, weights, None, windows, slots, attention, silu=True
        )

    def targets(self) -> dict[str, Target]:
        linears = self._in.targets() | self._weights.targets() | self._out.targets()
        return linears | self._core.targets()

    def pack(self) -> None:
        for layer in (self._in, self._weights, self._out):
            layer.linear.pack()

    def record(self, program: Program, x: Buffer) -> Buffer:
        """As Mixer.record."""
        projected = self._in.record(program, x)
        firsts = list(accumulate(self._sizes, initial=0))
        values, gate, decay, write, states = firsts[2:7]

        def silu(first: int, width: int) -> Buffer:
            taken, out = program.buffer(width), program.buffer(width)
            program.add(TakeColumns(x=projected, first=first, out=taken))
            program.add(Activate(x=taken, activation=Activation.SILU, gated=False, out=out))
            return out

        convolved = program.buffer(self._sizes[2])
        program.add(
            Convolve(
                x=projected,
                first=values,
                layer=self._layer,
                weight=self._weights.record(program, silu(states, self._sizes[-1])),
                bias=None,
                silu=True,
                out=convolved,
            )
        )
        queries_and_keys = silu(0, values)
        qkv = program.buffer(values + convolved.width)
        program.add(Join(x=queries_and_keys, y=convolved, out=qkv))
        mixed = self._core.record(
            program,
            Columns(qkv),
            Columns(projected, decay),
            Columns(projected, write),
            Columns(projected, gate),
        )
        return self._out.record(program, mixed)
