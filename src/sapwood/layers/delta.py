"""Gated delta rules as mixers: linear attention whose state forgets and corrects itself.

Sources: Yang et al. 2024, arXiv:2412.06464 (gated delta net); Kimi Team 2025, arXiv:2510.26692
(Kimi delta attention, with a decay per channel)."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sapwood.kernels.recording import Program
from sapwood.kernels.recording_buffers import Buffer
from sapwood.kernels.recording_states import Convolve, DeltaRule, GatedNorm
from sapwood.kernels.state_forms import DeltaForm, GatedNormForm
from sapwood.layers.build import Build
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.layers.linear import (
    Arrangement,
    ColumnParallelLinear,
    Part,
    RowParallelLinear,
    divide,
    even_part,
)
from sapwood.layers.targets import Target
from sapwood.schema.cache import ACTIVATIONS, RECURRENT, CacheGroup, CacheKind, CacheTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaLayout:
    """The heads of the whole model, as DeltaForm has them.

    length       inputs that an output of the convolutions depends on, the token's own included
    per_channel  whether each channel of the keys has its own decay
    lowest       as in DeltaForm
    convolves_keys  whether queries and keys are convolved as values are
    """

    num_key_heads: int
    num_heads: int
    key_dim: int
    value_dim: int
    length: int
    per_channel: bool = False
    write_scale: float = 1.0
    convolves_keys: bool = True
    lowest: float | None = None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Columns of all queries, of all keys, of all values."""
        keys = self.num_key_heads * self.key_dim
        return keys, keys, self.num_heads * self.value_dim

    def cache_group(self, layers: tuple[int, ...]) -> CacheGroup:
        """What these layers keep of each request: newest inputs of convolutions, and states."""
        state = (self.num_heads, self.key_dim, self.value_dim)
        convolved = sum(self.sizes) if self.convolves_keys else self.sizes[2]
        return CacheGroup(
            kind=CacheKind.STATE,
            layers=layers,
            tensors={
                "conv": CacheTensor((convolved, self.length - 1), ACTIVATIONS),
                "state": CacheTensor(state, RECURRENT),
            },
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaNames:
    """Names in the checkpoint of what comes between a mixer's projections.

    conv  one convolution of queries, keys and values, or one of each; none if the mixer convolves
    rate_shape  of the tensor of rates; None: [heads]
    """

    conv: tuple[str, ...] = ("conv1d",)
    rate: str = "A_log"
    shift: str = "dt_bias"
    norm: str = "norm"
    rate_shape: tuple[int, ...] | None = None


class Columns(NamedTuple):
    """Columns of a buffer, from `first` on."""

    buffer: Buffer
    first: int = 0


class DeltaCore:
    """Convolution, gated delta rule and gated norm: what lies between a mixer's projections.

    A mixer that convolves by itself gives names without a convolution."""

    def __init__(
        self,
        build: Build,
        layer: int,
        layout: DeltaLayout,
        *,
        names: DeltaNames,
        eps: float,
        logistic: bool = False,
    ) -> None:
        """eps, logistic: as in GatedNormForm. ConfigError if ranks cannot have equal heads."""
        group, device = build.groups.attention, build.device
        num_heads = divide(layout.num_heads, group, f"{layout.num_heads} heads of values")
        num_key_heads = divide(layout.num_key_heads, group, f"{layout.num_key_heads} key heads")
        num_shifts = num_heads * (layout.key_dim if layout.per_channel else 1)
        self.form = DeltaForm(
            num_key_heads=num_key_heads,
            num_heads=num_heads,
            key_dim=layout.key_dim,
            value_dim=layout.value_dim,
            rate=torch.empty(num_heads, dtype=torch.float32, device=device),
            shift=torch.empty(num_shifts, dtype=torch.float32, device=device),
            write_scale=layout.write_scale,
            lowest=layout.lowest,
        )
        self._rank, self._num_ranks = group.rank, group.size
        self._layer = layer
        self._layout = layout
        self._names = names
        self._kernels = build.kernels
        self._conv = build.empty(self.form.num_channels, layout.length) if names.conv else None
        self._norm = build.empty(self.form.out_size)
        self._norm_form = GatedNormForm(group=layout.value_dim, eps=eps, logistic=logistic)

    def __call__(
        self, qkv: Tensor, decay: Tensor, write: Tensor, gate: Tensor, batch: ForwardBatch
    ) -> Tensor:
        """qkv [T, channels], decay and write as Kernels.gated_delta_rule has them, gate [T, out]
        -> [T, out]; advances the requests' states

        Without a convolution here, qkv is convolved already."""
        mixed = batch.by_request(self._advance, qkv, decay, write)
        return self._kernels.gated_rms_norm(mixed, gate, self._norm, self._norm_form)

    def _advance(self, batch: ForwardBatch, qkv: Tensor, decay: Tensor, write: Tensor) -> Tensor:
        attention = batch.inputs_of(self._layer).attention
        slots = batch.slots_of(self._layer)
        windows, states = batch.kv_caches[self._layer]
        if self._conv is not None:
            qkv = self._kernels.causal_conv(
                qkv, self._conv, None, windows, slots, attention, silu=True
            )
        return self._kernels.gated_delta_rule(
            qkv, decay, write, self.form, states, slots, attention
        )

    def record(
        self, program: Program, qkv: Columns, decay: Columns, write: Columns, gate: Columns
    ) -> Buffer:
        """Add the same to a recorded step; qkv that is convolved already is a whole buffer."""
        form, convolved = self.form, qkv.buffer
        if self._conv is not None:
            convolved = program.buffer(form.num_channels)
            program.add(
                Convolve(
                    x=qkv.buffer,
                    first=qkv.first,
                    layer=self._layer,
                    weight=self._conv,
                    bias=None,
                    silu=True,
                    out=convolved,
                )
            )
        mixed, out = program.buffer(form.out_size), program.buffer(form.out_size)
        program.add(
            DeltaRule(
                qkv=convolved,
                decay=decay.buffer,
                decay_first=decay.first,
                write=write.buffer,
                write_first=write.first,
                layer=self._layer,
                form=form,
                out=mixed,
            )
        )
        program.add(
            GatedNorm(
                x=mixed,
                gate=gate.buffer,
                first=gate.first,
                weight=self._norm,
                form=self._norm_form,
                out=out,
            )
        )
        return out

    def targets(self) -> dict[str, Target]:
        layout, names = self._layout, self._names
        num_shifts = self._num_ranks * self.form.shift.shape[0]
        found = {
            names.rate: Target(names.rate_shape or (layout.num_heads,), self._put_rate),
            names.shift: Target((num_shifts,), self._put_shift),
            f"{names.norm}.weight": Target((layout.value_dim,), self._put_norm),
        }
        if self._conv is None:
            return found
        if len(names.conv) == 1:
            shape = (sum(layout.sizes), 1, layout.length)
            put = partial(self._put_conv, self._conv)
            return found | {f"{names.conv[0]}.weight": Target(shape, put)}
        first = 0
        for name, size in zip(names.conv, layout.sizes, strict=True):
            rows = self._conv[first : first + size // self._num_ranks]
            shape = (size, 1, layout.length)
            found[f"{name}.weight"] = Target(shape, partial(self._put_rows, rows))
            first += len(rows)
        return found

    def _put_rate(self, logarithm: Tensor) -> None:
        self.form.rate.copy_(self._own(logarithm.flatten().float().exp()))

    def _put_shift(self, shift: Tensor) -> None:
        self.form.shift.copy_(self._own(shift))

    def _put_norm(self, weight: Tensor) -> None:
        self._norm.copy_(weight.repeat(self.form.num_heads))

    def _put_conv(self, conv: Tensor, weight: Tensor) -> None:
        keys, _, _ = self._layout.sizes
        parts = weight.squeeze(1).tensor_split((keys, 2 * keys))
        conv.copy_(torch.cat([self._own(part) for part in parts]))

    def _put_rows(self, rows: Tensor, weight: Tensor) -> None:
        rows.copy_(self._own(weight.squeeze(1)))

    def _own(self, whole: Tensor) -> Tensor:
        """This rank's rows of rows that are shared evenly."""
        return whole.chunk(self._num_ranks)[self._rank]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaProjections:
    """How a checkpoint keeps the projections of a gated delta net.

    names    to queries, keys, values, gates of the output, inputs of what is written, and of decays
    qkv      name of one layer for the first three, all queries first; None: there are three
    grouped_inputs  name of one layer for the first four instead, which has all rows of one key head
                    before those of the next; None: there is none such
    grouped_gates   the same for the others
    """

    names: tuple[str, str, str, str, str, str]
    qkv: str | None = None
    grouped_inputs: str | None = None
    grouped_gates: str | None = None


class GatedDeltaNet:
    """out(norm(delta_rule(silu(conv(q, k, v)))) * silu(gate)), of projections of x."""

    def __init__(
        self,
        build: Build,
        layer: int,
        hidden_size: int,
        layout: DeltaLayout,
        *,
        projections: DeltaProjections,
        names: DeltaNames,
        out_name: str,
        eps: float,
    ) -> None:
        group = build.groups.attention
        self._core = DeltaCore(build, layer, layout, names=names, eps=eps)
        keys, _, values = layout.sizes
        sizes = (keys, keys, values, values, layout.num_heads, layout.num_heads)
        parts = [even_part(*pair, group) for pair in zip(projections.names, sizes, strict=True)]
        inputs, gates = tuple(parts[:4]), tuple(parts[4:])
        of_inputs: Arrangement | None = None
        of_gates: Arrangement | None = None
        if projections.grouped_inputs is not None:
            of_inputs = _by_key_heads(projections.grouped_inputs, inputs, layout.num_key_heads)
        elif projections.qkv is not None:
            rows = Arrangement.in_sequence(inputs[:3], fused=projections.qkv).rows
            gate = torch.arange(inputs[3].first, inputs[3].first + inputs[3].size)
            of_inputs = Arrangement(
                rows=(*rows, gate), fused=projections.qkv, fused_parts=(0, 1, 2)
            )
        if projections.grouped_gates is not None:
            of_gates = _by_key_heads(projections.grouped_gates, gates, layout.num_key_heads)
        self._in, self._gates = (
            ColumnParallelLinear(build, hidden_size, some, bias=False, arrangement=arrangement)
            for some, arrangement in ((inputs, of_inputs), (gates, of_gates))
        )
        self._out = RowParallelLinear(build, out_name, values, hidden_size, bias=False, group=group)

    def __call__(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """x [T, hidden] -> [T, hidden]; advances the requests' states"""
        return self._out(self._mix(self._in(x), self._gates(x), batch))

    def steps(self, x: Tensor, batch: ForwardBatch) -> Generator[Tensor, None, Tensor]:
        """As Mixer.steps."""
        yield x
        projected = self._in(x)
        yield x
        mixed = self._mix(projected, self._gates(x), batch)
        yield mixed
        return self._out(mixed)

    def _mix(self, projected: Tensor, gates: Tensor, batch: ForwardBatch) -> Tensor:
        """What the two layers make of x -> the inputs of the output projection"""
        form = self._core.form
        qkv, gate = projected.tensor_split((form.num_channels,), dim=1)
        write, decay = gates.tensor_split((form.num_heads,), dim=1)
        return self._core(qkv, decay, write, gate, batch)

    def targets(self) -> dict[str, Target]:
        projections = self._in.targets() | self._gates.targets()
        return projections | self._core.targets() | self._out.targets()

    def pack(self) -> None:
        for layer in (self._in, self._gates, self._out):
            layer.linear.pack()

    def record(self, program: Program, x: Buffer) -> Buffer:
        """As Mixer.record."""
        form = self._core.form
        projected, gates = self._in.record(program, x), self._gates.record(program, x)
        mixed = self._core.record(
            program,
            Columns(projected),
            Columns(gates, form.num_heads),
            Columns(gates),
            Columns(projected, form.num_channels),
        )
        return self._out.record(program, mixed)


class KimiDeltaAttention:
    """The same with a decay per channel; decays and gates come from two small layers each."""

    def __init__(
        self, build: Build, layer: int, hidden_size: int, layout: DeltaLayout, *, eps: float
    ) -> None:
        group = build.groups.attention
        names = DeltaNames(
            conv=("q_conv1d", "k_conv1d", "v_conv1d"),
            norm="o_norm",
            rate_shape=(1, 1, layout.num_heads, 1),
        )
        self._core = DeltaCore(build, layer, layout, names=names, eps=eps, logistic=True)
        *_, values = layout.sizes

        def linear(in_size: int, *parts: Part) -> ColumnParallelLinear:
            return ColumnParallelLinear(build, in_size, parts, bias=False)

        keys = layout.num_heads * layout.key_dim
        names_of_parts = zip(("q_proj", "k_proj", "v_proj"), layout.sizes, strict=True)
        self._qkv = linear(hidden_size, *(even_part(*pair, group) for pair in names_of_parts))
        self._write = linear(hidden_size, even_part("b_proj", layout.num_heads, group))
        # The small layers in between are the same on all ranks.
        low = layout.value_dim
        self._decay_in = linear(hidden_size, Part("f_a_proj", low, 0, low))
        self._decay_out = linear(low, even_part("f_b_proj", keys, group))
        self._gate_in = linear(hidden_size, Part("g_a_proj", low, 0, low))
        self._gate_out = linear(low, even_part("g_b_proj", values, group))
        self._out = RowParallelLinear(build, "o_proj", values, hidden_size, bias=False, group=group)
        self._inputs = (self._qkv, self._write, self._decay_in, self._gate_in)
        self._others = (self._decay_out, self._gate_out)

    def __call__(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """x [T, hidden] -> [T, hidden]; advances the requests' states"""
        qkv, write, decay, gate = (layer(x) for layer in self._inputs)
        return self._out(
            self._core(qkv, self._decay_out(decay), write, self._gate_out(gate), batch)
        )

    def steps(self, x: Tensor, batch: ForwardBatch) -> Generator[Tensor, None, Tensor]:
        """As Mixer.steps."""
        yield x
        qkv, write, decay, gate = (layer(x) for layer in self._inputs)
        yield decay
        decay = self._decay_out(decay)
        yield gate
        mixed = self._core(qkv, decay, write, self._gate_out(gate), batch)
        yield mixed
        return self._out(mixed)

    def targets(self) -> dict[str, Target]:
        found = self._core.targets() | self._out.targets()
        for layer in (*self._inputs, *self._others):
            found |= layer.targets()
        return found

    def pack(self) -> None:
        for layer in (*self._inputs, *self._others, self._out):
            layer.linear.pack()

    def record(self, program: Program, x: Buffer) -> Buffer:
        """As Mixer.record."""
        qkv, write, decay, gate = (layer.record(program, x) for layer in self._inputs)
        decay = self._decay_out.record(program, decay)
        gate = self._gate_out.record(program, gate)
        mixed = self._core.record(
            program, Columns(qkv), Columns(decay), Columns(write), Columns(gate)
        )
        return self._out.record(program, mixed)


def _by_key_heads(name: str, parts: tuple[Part, ...], num_key_heads: int) -> Arrangement:
    """Rows of a layer that has those of one key head, of each part, before those of the next."""
    widths = [part.whole_size // num_key_heads for part in parts]
    rows, start = [], 0
    for part, width in zip(parts, widths, strict=True):
        row = torch.arange(part.first, part.first + part.size)
        rows.append(row // width * sum(widths) + start + row % width)
        start += width
    return Arrangement(rows=tuple(rows), fused=name)
