"""Lightning attention: linear attention whose states fade at a fixed rate per head.

Source: Qin et al. 2024, arXiv:2401.04658; MiniMax 2025, arXiv:2501.08313."""

from __future__ import annotations

from collections.abc import Generator
from functools import partial

import torch
from torch import Tensor

from sapwood.kernels.activations import Activation
from sapwood.kernels.recording import (
    Activate,
    Buffer,
    GatedNorm,
    Program,
    SelectiveScan,
)
from sapwood.kernels.state_forms import GatedNormForm
from sapwood.kernels.state_space import StateSpace
from sapwood.layers.build import Build
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
        self._layer = layer
        self._num_ranks = group.size
        self._kernels = build.kernels
        self._activation = activation
        number, size = heads.num_heads_of(group), heads.head_dim
        first, whole_width = group.rank * number, heads.num_heads * size
        width = self._width = number * size
        self._part = Slice.unless_whole(0, first * size, width, whole_width)
        self._whole_width = whole_width
        # The checkpoint has each head's query, key and value together.
        own_heads = first + torch.arange(number)
        places = (own_heads * 3 * size).unsqueeze(1) + torch.arange(size)
        self._qkv = ColumnParallelLinear(
            build,
            hidden_size,
            tuple(even_part(name, whole_width, group) for name in (VALUES, KEYS, QUERIES)),
            bias=False,
            arrangement=Arrangement(
                rows=tuple((places + at * size).flatten() for at in (2, 1, 0)), fused="qkv_proj"
            ),
        )
        self._gate = ColumnParallelLinear(
            build, hidden_size, (even_part("output_gate", whole_width, group),), bias=False
        )
        self._norm = GatedNormForm(group=whole_width, eps=1e-6, logistic=True)
        self._norm_weight = build.empty(width)
        self._norm_over_ranks: GatedNormOverRanks | None = None
        if group.size > 1:
            self._norm_over_ranks = GatedNormOverRanks(group, self._norm, num_groups=1)
        rates = -slopes(heads.num_heads, layer, num_layers)[first : first + number]
        self._space = StateSpace(
            num_heads=number,
            head_dim=size,
            num_groups=number,
            state_size=size,
            rates=rates.contiguous().to(build.device),
        )
        self._out = RowParallelLinear(
            build, "out_proj", whole_width, hidden_size, bias=False, group=group
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
        attended = batch.by_request(self._scan, values, keys, queries)
        gate = self._gate(x)
        if self._norm_over_ranks is not None:
            return self._norm_over_ranks(attended, gate, self._norm_weight)
        return self._kernels.gated_rms_norm(attended, gate, self._norm_weight, self._norm)

    def _scan(self, batch: ForwardBatch, values: Tensor, keys: Tensor, queries: Tensor) -> Tensor:
        (states,) = batch.kv_caches[self._layer]
        slots, attention = batch.slots_of(self._layer), batch.inputs_of(self._layer).attention
        return self._kernels.selective_scan(
            values, keys, queries, None, self._space, states, slots, attention
        )

    def targets(self) -> dict[str, Target]:
        copied = partial(_copy, self._norm_weight)
        weight = Target((self._whole_width,), copied, part=self._part)
        found = self._qkv.targets() | self._gate.targets() | self._out.targets()
        return found | {"norm.weight": weight}

    def pack(self) -> None:
        for layer in (self._qkv, self._gate, self._out):
            layer.linear.pack()

    def record(self, program: Program, x: Buffer) -> Buffer:
        """As Mixer.record."""
        if self._norm_over_ranks is not None:
            program.refuse_sum_over(self._num_ranks)
        width = self._width
        projected, gate = self._qkv.record(program, x), self._gate.record(program, x)
        qkv, attended, normed = (program.buffer(size) for size in (3 * width, width, width))
        program.add(Activate(x=projected, activation=self._activation, gated=False, out=qkv))
        program.add(
            SelectiveScan(
                x=qkv,
                b=qkv,
                c=qkv,
                dt=None,
                gate=None,
                firsts=(0, width, 2 * width, 0, 0),
                layer=self._layer,
                tensor=0,
                space=self._space,
                out=attended,
            )
        )
        program.add(
            GatedNorm(
                x=attended,
                gate=gate,
                first=0,
                weight=self._norm_weight,
                form=self._norm,
                out=normed,
            )
        )
        return self._out.record(program, normed)


def _copy(parameter: Tensor, tensor: Tensor) -> None:
    parameter.copy_(tensor)
