"""Mamba 1: a short convolution, and channels whose states decay at rates of their own.

Source: Gu and Dao 2023, arXiv:2312.00752."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.kernels.coded import LinearPart
from sapwood.kernels.recording import Multiply, Program
from sapwood.kernels.recording_buffers import Buffer
from sapwood.kernels.recording_states import Convolve, SelectiveScan
from sapwood.kernels.state_space import StateSpace
from sapwood.layers.build import Build
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.layers.linear import (
    Arrangement,
    ColumnParallelLinear,
    Linear,
    RowParallelLinear,
    divide,
    even_part,
)
from sapwood.layers.norm import RMSNorm
from sapwood.layers.targets import Slice, Target, prefixed
from sapwood.schema.cache import ACTIVATIONS, RECURRENT, CacheGroup, CacheKind, CacheTensor

_MOST_CHANNELS = 64
"""Channels of a head, at most: a power of two, so that all ranks and kernels divide them evenly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mamba1Layout:
    """The channels of the whole model, and their convolution.

    step_rank    inputs of the layer that makes time steps
    conv_length  inputs that an output of the convolution depends on
    Raises       ConfigError for impossible sizes
    """

    channels: int
    state_size: int
    step_rank: int
    conv_length: int

    def __post_init__(self) -> None:
        if min(self.channels, self.state_size, self.step_rank) < 1:
            raise ConfigError(f"the model has impossible state space layers: {self}")
        if not 2 <= self.conv_length <= 1024:
            raise ConfigError(
                f"the model's convolutions have {self.conv_length} factors but must have from 2 to "
                "1024"
            )

    @property
    def head_dim(self) -> int:
        """Kernels take channels in heads (StateSpace); any number that divides them will do."""
        size = _MOST_CHANNELS
        while self.channels % size:
            size //= 2
        return size

    @property
    def num_heads(self) -> int:
        return self.channels // self.head_dim

    def num_parameters(self, hidden_size: int) -> int:
        """Weights of a layer's matrices."""
        inner = 2 * self.step_rank + 3 * self.state_size + self.conv_length
        return self.channels * (3 * hidden_size + inner)

    def cache_group(self, layers: tuple[int, ...]) -> CacheGroup:
        """What these layers keep of each request."""
        return CacheGroup(
            kind=CacheKind.STATE,
            layers=layers,
            tensors={
                "conv": CacheTensor((self.channels, self.conv_length - 1), ACTIVATIONS),
                "state": CacheTensor((self.num_heads, self.state_size, self.head_dim), RECURRENT),
            },
        )


class Mamba1:
    """out(scan(u, dt) * silu(z)), where u = conv(x'). The first projection gives x' and z, and dt,
    keys and queries are projections of u."""

    def __init__(
        self,
        build: Build,
        layer: int,
        hidden_size: int,
        layout: Mamba1Layout,
        *,
        bias: bool = False,
        conv_bias: bool = True,
        norm_eps: float | None = None,
        learns_norms: bool = True,
    ) -> None:
        """A layer without weights.

        layer         index of the layer, which picks its states
        bias          whether the first and the last projection have biases
        norm_eps      of norms of the time steps' inputs, of keys and of queries; None: there are
                      no norms
        learns_norms  whether these have weights
        Raises        ConfigError if the ranks cannot have equally many channels
        """
        group = build.groups.attention
        self._layer, self._layout, self._group = layer, layout, group
        self._kernels = build.kernels
        heads = divide(layout.num_heads, group, f"{layout.num_heads} blocks of channels")
        width = self._width = heads * layout.head_dim
        self._first = group.rank * width
        parts = tuple(even_part(name, layout.channels, group) for name in ("x", "z"))
        self._in = ColumnParallelLinear(
            build,
            hidden_size,
            parts,
            bias=bias,
            arrangement=Arrangement.in_sequence(parts, fused="in_proj"),
        )
        self._conv_weight = build.empty(width, layout.conv_length)
        self._conv_bias = build.empty(width) if conv_bias else None
        keys = 2 * layout.state_size
        # Two layers: a recorded step multiplies whole rows, and time steps have a product more.
        self._inner = Linear(build, width, (layout.step_rank,), bias=False)
        self._keys = Linear(build, width, (keys,), bias=False)
        self._steps = ColumnParallelLinear(
            build, layout.step_rank, (even_part("dt_proj", layout.channels, group),), bias=False
        )
        self._norms: tuple[RMSNorm, ...] = ()
        if norm_eps is not None:
            self._norms = tuple(
                RMSNorm(build, size, eps=norm_eps, is_learned=learns_norms)
                for size in (layout.step_rank, layout.state_size, layout.state_size)
            )

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=build.device)

        self._bias, self._skip = empty(width), empty(width)
        self._rates = empty(heads, layout.state_size, layout.head_dim)
        self._space = StateSpace(
            num_heads=heads,
            head_dim=layout.head_dim,
            num_groups=1,
            state_size=layout.state_size,
            rates=self._rates,
            dt_bias=self._bias,
            skip=self._skip,
        )
        self._out = RowParallelLinear(
            build, "out_proj", layout.channels, hidden_size, bias=bias, group=group
        )

    def __call__(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """x [T, hidden] -> [T, hidden]; advances the requests' states"""
        mixing = self.steps(x, batch)
        try:
            while True:
                next(mixing)
        except StopIteration as end:
            out: Tensor = end.value
            return out

    def steps(self, x: Tensor, batch: ForwardBatch) -> Generator[Tensor, None, Tensor]:
        """As Mixer.steps."""
        yield x
        inputs, z = self._in(x).chunk(2, dim=-1)
        u = batch.by_request(self._convolve, inputs)
        yield u
        inner = self._group.all_reduce(self._inner(u))
        both = self._group.all_reduce(self._keys(u))
        if self._norms:
            inner = self._norms[0](inner)
        keys, queries = both.chunk(2, dim=-1)
        if self._norms:
            keys = self._norms[1](keys.contiguous())
            queries = self._norms[2](queries.contiguous())
        yield inner
        dt = self._steps(inner)
        mixed = batch.by_request(self._scan, u, keys, queries, dt, z)
        yield mixed
        return self._out(mixed)

    def _convolve(self, batch: ForwardBatch, x: Tensor) -> Tensor:
        states, _ = batch.kv_caches[self._layer]
        slots, attention = batch.slots_of(self._layer), batch.inputs_of(self._layer).attention
        weight, bias = self._conv_weight, self._conv_bias
        return self._kernels.causal_conv(x, weight, bias, states, slots, attention, silu=True)

    def _scan(
        self, batch: ForwardBatch, u: Tensor, keys: Tensor, queries: Tensor, dt: Tensor, z: Tensor
    ) -> Tensor:
        _, states = batch.kv_caches[self._layer]
        slots, attention = batch.slots_of(self._layer), batch.inputs_of(self._layer).attention
        return self._kernels.selective_scan(
            u, keys, queries, dt, self._space, states, slots, attention, gate=z
        )

    def targets(self) -> dict[str, Target]:
        layout = self._layout
        whole, size = layout.channels, self._width
        own = Slice.unless_whole(0, self._first, size, whole)

        def of(parameter: Tensor, *shape: int) -> Target:
            def put(tensor: Tensor) -> None:
                parameter.copy_(tensor.view(parameter.shape))

            return Target((whole, *shape), put, part=own)

        conv = {"weight": of(self._conv_weight, 1, layout.conv_length)}
        if self._conv_bias is not None:
            conv["bias"] = of(self._conv_bias)
        takes_blocks = self._inner.takes_blocks
        found = {
            "A_log": Target((whole, layout.state_size), self._put_rates, part=own),
            "D": of(self._skip),
            "dt_proj.bias": of(self._bias),
            "x_proj.weight": Target(
                (layout.step_rank + 2 * layout.state_size, whole),
                self._put_inner,
                self._put_inner_blocks if takes_blocks else None,
                part=Slice.unless_whole(1, self._first, size, whole),
            ),
        }
        for name, norm in zip(("dt", "b", "c"), self._norms, strict=False):
            found |= prefixed(f"{name}_layernorm", norm.targets())
        found |= self._in.targets() | self._steps.targets() | self._out.targets()
        return found | prefixed("conv1d", conv)

    def _put_rates(self, logs: Tensor) -> None:
        heads, size, width = self._rates.shape
        rates = -logs.float().exp()
        self._rates.copy_(rates.view(heads, width, size).transpose(1, 2))

    def _put_inner(self, rows: Tensor) -> None:
        rank = self._layout.step_rank
        self._inner.put(0, rows[:rank])
        self._keys.put(0, rows[rank:])

    def _put_inner_blocks(self, rows: LinearPart) -> None:
        rank = self._layout.step_rank
        self._inner.put_blocks(0, rows.rows(0, rank))
        self._keys.put_blocks(0, rows.rows(rank, 2 * self._layout.state_size))

    def pack(self) -> None:
        for layer in (self._in.linear, self._inner, self._keys, self._steps.linear):
            layer.pack()
        self._out.linear.pack()

    def record(self, program: Program, x: Buffer) -> Buffer:
        """As Mixer.record."""
        program.refuse_sum_over(self._group.size)
        layout, width = self._layout, self._width
        projected, u = self._in.record(program, x), program.buffer(width)
        program.add(
            Convolve(
                x=projected,
                layer=self._layer,
                weight=self._conv_weight,
                bias=self._conv_bias,
                silu=True,
                out=u,
            )
        )
        inner, both = program.buffer(layout.step_rank), program.buffer(2 * layout.state_size)
        program.add(Multiply(x=u, layer=self._inner.packed, out=inner))
        program.add(Multiply(x=u, layer=self._keys.packed, out=both))
        if self._norms:
            self._norms[0].record_columns(program, inner, 0)
            self._norms[1].record_columns(program, both, 0)
            self._norms[2].record_columns(program, both, layout.state_size)
        dt, mixed = self._steps.record(program, inner), program.buffer(width)
        program.add(
            SelectiveScan(
                x=u,
                b=both,
                c=both,
                dt=dt,
                gate=projected,
                firsts=(0, 0, layout.state_size, 0, width),
                layer=self._layer,
                tensor=1,
                space=self._space,
                out=mixed,
            )
        )
        return self._out.record(program, mixed)
