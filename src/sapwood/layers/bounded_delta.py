"""Kimi delta attention whose decays may have a lowest value.

Source: Ling Team 2026, the model code of Ling 3."""

from __future__ import annotations

from collections.abc import Generator
from itertools import accumulate

from torch import Tensor

from sapwood.kernels.recording import Program
from sapwood.kernels.recording_buffers import Buffer
from sapwood.layers.build import Build
from sapwood.layers.delta import Columns, DeltaCore, DeltaLayout, DeltaNames
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.layers.linear import ColumnParallelLinear, RowParallelLinear, even_part
from sapwood.layers.targets import Target


class BoundedDeltaAttention:
    """o(norm(delta_rule(silu(conv(q, k, v)))) * logistic(gate)), of projections of x; the decays
    of channels are made of f(x)."""

    def __init__(
        self,
        build: Build,
        layer: int,
        hidden_size: int,
        layout: DeltaLayout,
        *,
        eps: float,
    ) -> None:
        """A layer without weights.

        layer   index of the layer, which picks its states
        layout  of the heads, with a decay per channel, and the lowest of them if there is one
        eps     of the norm over each head
        """
        group = build.groups.attention
        names = DeltaNames(conv=("q_conv1d", "k_conv1d", "v_conv1d"), norm="o_norm")
        self._core = DeltaCore(build, layer, layout, names=names, eps=eps, logistic=True)
        keys, _, values = layout.sizes
        sizes = {
            **dict(zip(("q_proj", "k_proj", "v_proj"), layout.sizes, strict=True)),
            "f_proj": keys,
            "g_proj": values,
            "b_proj": layout.num_heads,
        }
        parts = tuple(even_part(name, size, group) for name, size in sizes.items())
        self._in = ColumnParallelLinear(build, hidden_size, parts, bias=False)
        form = self._core.form
        self._sizes = (form.num_channels, form.shift.shape[0], form.out_size, form.num_heads)
        self._out = RowParallelLinear(build, "o_proj", values, hidden_size, bias=False, group=group)

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
        """x [T, hidden] -> the inputs of the output projection"""
        qkv, decay, gate, write = self._in(x).split_with_sizes(self._sizes, dim=1)
        return self._core(qkv, decay, write, gate, batch)

    def targets(self) -> dict[str, Target]:
        return self._in.targets() | self._core.targets() | self._out.targets()

    def pack(self) -> None:
        self._in.linear.pack()
        self._out.linear.pack()

    def record(self, program: Program, x: Buffer) -> Buffer:
        """As Mixer.record."""
        made = self._in.record(program, x)
        firsts = list(accumulate(self._sizes, initial=0))
        qkv, decay, gate, write = (Columns(made, first) for first in firsts[:4])
        return self._out.record(program, self._core.record(program, qkv, decay, write, gate))
