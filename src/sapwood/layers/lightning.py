"""Lightning attention: linear attention whose states fade at a fixed rate per head.

Source: Qin et al. 2024, arXiv:2401.04658; MiniMax 2025, arXiv:2501.08313."""

from __future__ import annotations

from collections.abc import Generator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sapwood.kernels.activations import Activation
from sapwood.kernels.recording import Activate, Program
from sapwood.kernels.recording_buffers import Buffer
from sapwood.kernels.recording_states import GatedNorm, SelectiveScan
from sapwood.kernels.state_forms import GatedNormForm
from sapwood.kernels.state_space import StateSpace
from sapwood.layers.build import Build
from sapwood.layers.delta import Columns
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.layers.heads import HeadLayout
from sapwood.layers.linear import (
    Arrangement,
    ColumnParallelLinear,
    RowParallelLinear,
    even_part,
)
from sapwood.layers.norms_over_ranks import GatedNormOverRanks
from sapwood.layers.targets import Slice, Target
from sapwood.schema.cache import RECURRENT, CacheGroup, CacheKind, CacheTensor

VALUES, KEYS, QUERIES = "values", "keys", "queries"


def cache_group(heads: HeadLayout, layers: tuple[int, ...]) -> CacheGroup:
    """What such layers keep of each request."""
    shape = (heads.num_heads, heads.head_dim, heads.head_dim)
    return CacheGroup(
        kind=CacheKind.STATE, layers=layers, tensors={"state": CacheTensor(shape, RECURRENT)}
    )


def slopes(num_heads: int, layer: int, num_layers: int) -> Tensor:
    """[num_heads] fp32: how fast the heads' states fade, less in later layers and heads."""
    depth = 1 - layer / (num_layers - 1 + 1e-5) + 1e-5
    head = torch.arange(1, num_heads + 1, dtype=torch.float32)
    return torch.pow(2.0 ** (-8.0 / num_heads), head) * depth


class ValuesKeysQueries(NamedTuple):
    """The inputs of linear attention; in a recorded step, where they are."""

    values: Columns
    keys: Columns
    queries: Columns


class LightningCore:
    """Linear attention and a gated norm: what lies between a mixer's projections."""

    def __init__(
        self,
        build: Build,
        layer: int,
        heads: HeadLayout,
        slopes: Tensor,
        *,
        norm: GatedNormForm,
    ) -> None:
        """What this rank computes.

        layer   index of the layer, which picks its states
        heads   of all ranks together
        slopes  [heads of all ranks]
        norm    of groups of all ranks' columns; neighbouring ranks share a group where there are
                fewer of them
        """
        group = build.groups.attention
        number = heads.num_heads_of(group)
        own = slice(group.rank * number, (group.rank + 1) * number)
        self._layer = layer
        self._num_ranks = group.size
        self._kernels = build.kernels
        self._form = norm
        self.width = number * heads.head_dim
        self._whole = heads.num_heads * heads.head_dim
        self._part = Slice.unless_whole(0, group.rank * self.width, self.width, self._whole)
        self._weight = build.empty(self.width)
        self._norm_over_ranks: GatedNormOverRanks | None = None
        if norm.group > self.width:
            self._norm_over_ranks = GatedNormOverRanks(group, norm, self._whole // norm.group)
        self._space = StateSpace(
            num_heads=number,
            head_dim=heads.head_dim,
            num_groups=number,
            state_size=heads.head_dim,
            rates=-slopes[own].to(build.device, torch.float32).contiguous(),
        )

    def __call__(
        self, values: Tensor, keys: Tensor, queries: Tensor, gate: Tensor, batch: ForwardBatch
    ) -> Tensor:
        """Each [T, this rank's width] -> [T, width]; advances the requests' states"""
        attended = batch.by_request(self._scan, values, keys, queries)
        if self._norm_over_ranks is not None:
            return self._norm_over_ranks(attended, gate, self._weight)
        return self._kernels.gated_rms_norm(attended, gate, self._weight, self._form)

    def _scan(self, batch: ForwardBatch, values: Tensor, keys: Tensor, queries: Tensor) -> Tensor:
        (states,) = batch.kv_caches[self._layer]
        slots, attention = batch.slots_of(self._layer), batch.inputs_of(self._layer).attention
        return self._kernels.selective_scan(
            values, keys, queries, None, self._space, states, slots, attention
        )

    def record(self, program: Program, inputs: ValuesKeysQueries, gate: Buffer) -> Buffer:
        """Add the same to a recorded step."""
        if self._norm_over_ranks is not None:
            program.refuse_sum_over(self._num_ranks)
        attended, normed = program.buffer(self.width), program.buffer(self.width)
        program.add(
            SelectiveScan(
                x=inputs.values.buffer,
                b=inputs.keys.buffer,
                c=inputs.queries.buffer,
                dt=None,
                gate=None,
                firsts=(inputs.values.first, inputs.keys.first, inputs.queries.first, 0, 0),
                layer=self._layer,
                tensor=0,
                space=self._space,
                out=attended,
            )
        )
        program.add(
            GatedNorm(
                x=attended, gate=gate, first=0, weight=self._weight, form=self._form, out=normed
            )
        )
        return normed

    def norm_target(self) -> Target:
        """Of the norm's weight."""
        return Target((self._whole,), partial(_copy, self._weight), part=self._part)


class LightningAttention:
    """out(norm(attention(silu(qkv(x)))) * logistic(gate(x)))."""

    def __init__(
        self,
        build: Build,
        layer: int,
        num_layers: int,
        hidden_size: int,
        heads: HeadLayout,
        *,
        activation: Activation,
    ) -> None:
        """A layer without weights.

        layer       index of the layer, which picks its states
        num_layers  of the model
        activation  of queries, keys and values
        Raises      ConfigError if the ranks cannot have equally many heads
        """
        group = build.groups.attention
        self._kernels = build.kernels
        self._activation = activation
        number, size = heads.num_heads_of(group), heads.head_dim
        width = heads.num_heads * size
        # The checkpoint has each head's query, key and value together.
        own_heads = group.rank * number + torch.arange(number)
        places = (own_heads * 3 * size).unsqueeze(1) + torch.arange(size)
        self._qkv = ColumnParallelLinear(
            build,
            hidden_size,
            tuple(even_part(name, width, group) for name in (VALUES, KEYS, QUERIES)),
            bias=False,
            arrangement=Arrangement(
                rows=tuple((places + at * size).flatten() for at in (2, 1, 0)), fused="qkv_proj"
            ),
        )
        self._gate = ColumnParallelLinear(
            build, hidden_size, (even_part("output_gate", width, group),), bias=False
        )
        self._core = LightningCore(
            build,
            layer,
            heads,
            slopes(heads.num_heads, layer, num_layers),
            norm=GatedNormForm(group=width, eps=1e-6, logistic=True),
        )
        self._out = RowParallelLinear(
            build, "out_proj", width, hidden_size, bias=False, group=group
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
        values, keys, queries = self._kernels.activate(self._qkv(x), self._activation).chunk(
            3, dim=-1
        )
        return self._core(values, keys, queries, self._gate(x), batch)

    def targets(self) -> dict[str, Target]:
        found = self._qkv.targets() | self._gate.targets() | self._out.targets()
        return found | {"norm.weight": self._core.norm_target()}

    def pack(self) -> None:
        for layer in (self._qkv, self._gate, self._out):
            layer.linear.pack()

    def record(self, program: Program, x: Buffer) -> Buffer:
        """As Mixer.record."""
        projected, gate = self._qkv.record(program, x), self._gate.record(program, x)
        qkv = program.buffer(projected.width)
        program.add(Activate(x=projected, activation=self._activation, gated=False, out=qkv))
        width = self._core.width
        inputs = ValuesKeysQueries(*(Columns(qkv, at * width) for at in range(3)))
        return self._out.record(program, self._core.record(program, inputs, gate))


def _copy(parameter: Tensor, tensor: Tensor) -> None:
    parameter.copy_(tensor)
