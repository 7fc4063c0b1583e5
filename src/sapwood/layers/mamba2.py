"""Mamba 2: a short convolution, and heads whose states decay as fast as each token says.

Source: Dao and Gu 2024, arXiv:2405.21060."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.kernels.recording import Program, ScaleColumns
from sapwood.kernels.recording_buffers import Buffer
from sapwood.kernels.recording_states import Convolve, GatedNorm, SelectiveScan
from sapwood.kernels.state_forms import GatedNormForm
from sapwood.kernels.state_space import StateSpace
from sapwood.layers.build import Build
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.layers.linear import (
    Arrangement,
    ColumnParallelLinear,
    Part,
    RowParallelLinear,
    divide,
    share,
)
from sapwood.layers.norms_over_ranks import GatedNormOverRanks
from sapwood.layers.targets import Slice, Target, prefixed
from sapwood.schema.cache import ACTIVATIONS, RECURRENT, CacheGroup, CacheKind, CacheTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Mamba2Layout:
    """The heads of the whole model, as StateSpace has them, and their convolution.

    conv_length  inputs that an output of the convolution depends on
    Raises       ConfigError if the sizes do not fit each other
    """

    num_heads: int
    head_dim: int
    num_groups: int
    state_size: int
    conv_length: int

    def __post_init__(self) -> None:
        sizes = (self.num_heads, self.head_dim, self.num_groups, self.state_size)
        if min(sizes) < 1 or self.num_heads % self.num_groups:
            raise ConfigError(
                f"the model has {self.num_heads} state space heads of {self.head_dim} channels in "
                f"{self.num_groups} groups with {self.state_size} states each, which is impossible"
            )
        if not 2 <= self.conv_length <= 1024:
            raise ConfigError(
                f"the model's convolutions have {self.conv_length} factors but must have from 2 to "
                "1024"
            )

    @property
    def width(self) -> int:
        """Channels of all heads."""
        return self.num_heads * self.head_dim

    @property
    def keys(self) -> int:
        """Entries of the keys of all groups, and of the queries."""
        return self.num_groups * self.state_size

    @property
    def conv_channels(self) -> int:
        return self.width + 2 * self.keys

    def num_parameters(self, hidden_size: int) -> int:
        """Weights of a layer's matrices."""
        outputs = self.width + self.conv_channels + self.num_heads
        return hidden_size * (outputs + self.width) + self.conv_channels * self.conv_length

    def cache_group(self, layers: tuple[int, ...]) -> CacheGroup:
        """What these layers keep of each request."""
        return CacheGroup(
            kind=CacheKind.STATE,
            layers=layers,
            tensors={
                "conv": CacheTensor(
                    (self.conv_channels, self.conv_length - 1),
                    ACTIVATIONS,
                    units=(
                        (self.num_heads, self.head_dim),
                        (self.num_groups, self.state_size),
                        (self.num_groups, self.state_size),
                    ),
                ),
                "state": CacheTensor((self.num_heads, self.state_size, self.head_dim), RECURRENT),
            },
        )


class Mamba2:
    """out(norm(scan(conv(x'), dt), z)), where z, x' and dt are parts of one projection of x."""

    def __init__(
        self,
        build: Build,
        layer: int,
        hidden_size: int,
        layout: Mamba2Layout,
        *,
        bias: bool = False,
        out_bias: bool | None = None,
        conv_bias: bool = True,
        norm_eps: float | None = 1e-5,
        norms_first: bool = False,
        dt_range: tuple[float, float] = (0.0, float("inf")),
        factors: tuple[float, float, float, float, float] | None = None,
    ) -> None:
        """A layer without weights.

        layer        index of the layer, which picks its states
        bias         whether the first projection has a bias; `out_bias` likewise, None: as `bias`
        norm_eps     of the gated norm over each group; None: the scan's output is only gated
        norms_first  whether the norm comes before the gate
        dt_range     as in StateSpace
        factors      of the parts of the first projection: z, x', keys, queries and dt; None: 1
        Raises       ConfigError if the ranks cannot have equally many heads and groups

        Where ranks outnumber the groups of keys and queries, neighbours have the same one.
        """
        group = build.groups.attention
        self._layer = layer
        self._num_ranks = group.size
        self._kernels = build.kernels
        self._layout = layout
        self._heads = divide(layout.num_heads, group, f"{layout.num_heads} state space heads")
        self._first_head = group.rank * self._heads
        first_group, groups = share(
            layout.num_groups, group, f"{layout.num_groups} groups of state space heads"
        )
        self._width, self._keys = self._heads * layout.head_dim, groups * layout.state_size
        self._channels = self._width + 2 * self._keys
        sizes = (layout.width, layout.width, layout.keys, layout.keys, layout.num_heads)
        heads, width = (self._first_head, self._heads), (group.rank * self._width, self._width)
        keys = (first_group * layout.state_size, self._keys)
        own = tuple(
            Part(name, size, *part)
            for name, size, part in zip(
                ("z", "x", "b", "c", "dt"), sizes, (width, width, keys, keys, heads), strict=True
            )
        )
        self._own_sizes = tuple(part.size for part in own)
        arrangement: Arrangement | None = None
        parts: tuple[Part, ...] = (Part("in_proj", sum(sizes), 0, sum(sizes)),)
        if group.size > 1:
            arrangement, parts = Arrangement.in_sequence(own, fused="in_proj"), own
        self._in = ColumnParallelLinear(
            build, hidden_size, parts, bias=bias, arrangement=arrangement
        )
        starts = accumulate((part.whole_size for part in own[1:4]), initial=0)
        self._conv_rows = torch.cat(
            [
                torch.arange(part.first, part.first + part.size) + start
                for part, start in zip(own[1:4], starts, strict=False)
            ]
        )
        self._conv_weight = build.empty(self._channels, layout.conv_length)
        self._conv_bias = build.empty(self._channels) if conv_bias else None
        self._space = StateSpace(
            num_heads=self._heads,
            head_dim=layout.head_dim,
            num_groups=groups,
            state_size=layout.state_size,
            rates=_empty_fp32(build, self._heads),
            dt_bias=_empty_fp32(build, self._heads),
            skip=_empty_fp32(build, self._heads),
            dt_range=dt_range,
        )
        self._norm: GatedNormForm | None = None
        self._norm_over_ranks: GatedNormOverRanks | None = None
        if norm_eps is not None:
            self._norm = GatedNormForm(
                group=layout.width // layout.num_groups, eps=norm_eps, norm_first=norms_first
            )
            self._norm_weight = build.empty(self._width)
            if layout.num_groups < group.size:
                self._norm_over_ranks = GatedNormOverRanks(group, self._norm, layout.num_groups)
        self._factors: Tensor | None = None
        if factors is not None and set(factors) != {1.0}:
            self._factors = torch.cat(
                [
                    torch.full((size,), factor, device=build.device, dtype=build.dtype)
                    for size, factor in zip(self._own_sizes, factors, strict=True)
                ]
            )
        self._out = RowParallelLinear(
            build,
            "out_proj",
            layout.width,
            hidden_size,
            bias=bias if out_bias is None else out_bias,
            group=group,
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
        if self._factors is not None:
            projected.mul_(self._factors)
        z, inputs, dt = projected.split_with_sizes(
            (self._width, self._channels, self._heads), dim=-1
        )
        if self._norm is None:
            return batch.by_request(self._advance, inputs, dt, z)
        out = batch.by_request(self._advance, inputs, dt)
        if self._norm_over_ranks is not None:
            return self._norm_over_ranks(out, z, self._norm_weight)
        return self._kernels.gated_rms_norm(out, z, self._norm_weight, self._norm)

    def _advance(
        self, batch: ForwardBatch, inputs: Tensor, dt: Tensor, gate: Tensor | None = None
    ) -> Tensor:
        slots, attention = batch.slots_of(self._layer), batch.inputs_of(self._layer).attention
        conv_states, states = batch.kv_caches[self._layer]
        convolved = self._kernels.causal_conv(
            inputs, self._conv_weight, self._conv_bias, conv_states, slots, attention, silu=True
        )
        values, keys, queries = convolved.split_with_sizes(
            (self._width, self._keys, self._keys), dim=-1
        )
        return self._kernels.selective_scan(
            values, keys, queries, dt, self._space, states, slots, attention, gate=gate
        )

    def targets(self) -> dict[str, Target]:
        layout, space = self._layout, self._space
        assert space.dt_bias is not None
        assert space.skip is not None
        conv = {"weight": self._conv_target(self._conv_weight, (1, layout.conv_length))}
        if self._conv_bias is not None:
            conv["bias"] = self._conv_target(self._conv_bias, ())
        found = {
            "dt_bias": self._head_target(space.dt_bias.copy_),
            "A_log": self._head_target(lambda logs: space.rates.copy_(-logs.float().exp())),
            "D": self._head_target(space.skip.copy_),
        }
        if self._norm is not None:
            first = self._first_head * layout.head_dim
            part = Slice.unless_whole(0, first, self._width, layout.width)
            weight = Target((layout.width,), partial(_copy, self._norm_weight), part=part)
            found["norm.weight"] = weight
        return found | self._in.targets() | prefixed("conv1d", conv) | self._out.targets()

    def _head_target(self, put: Callable[[Tensor], object]) -> Target:
        """Of a number per head."""
        own = Slice.unless_whole(0, self._first_head, self._heads, self._layout.num_heads)
        return Target((self._layout.num_heads,), lambda tensor: _done(put(tensor)), part=own)

    def _conv_target(self, parameter: Tensor, inner: tuple[int, ...]) -> Target:
        """Of a tensor whose rows are the convolution's channels."""

        def put(tensor: Tensor) -> None:
            rows = self._conv_rows.to(tensor.device)
            parameter.copy_(tensor[rows].view(parameter.shape))

        return Target((self._layout.conv_channels, *inner), put)

    def pack(self) -> None:
        self._in.linear.pack()
        self._out.linear.pack()

    def record(self, program: Program, x: Buffer) -> Buffer:
        """As Mixer.record."""
        width, keys = self._width, self._keys
        projected = self._in.record(program, x)
        if self._factors is not None:
            program.add(ScaleColumns(residual=projected, first=0, factors=self._factors))
        convolved, out = program.buffer(self._channels), program.buffer(width)
        program.add(
            Convolve(
                x=projected,
                first=width,
                layer=self._layer,
                weight=self._conv_weight,
                bias=self._conv_bias,
                silu=True,
                out=convolved,
            )
        )
        program.add(
            SelectiveScan(
                x=convolved,
                b=convolved,
                c=convolved,
                dt=projected,
                gate=projected if self._norm is None else None,
                firsts=(0, width, width + keys, width + self._channels, 0),
                layer=self._layer,
                tensor=1,
                space=self._space,
                out=out,
            )
        )
        if self._norm is None:
            return self._out.record(program, out)
        if self._norm_over_ranks is not None:
            program.refuse_sum_over(self._num_ranks)
        normed = program.buffer(width)
        program.add(
            GatedNorm(
                x=out, gate=projected, first=0, weight=self._norm_weight, form=self._norm,
                out=normed,
            )
        )  # fmt: skip
        return self._out.record(program, normed)


def _empty_fp32(build: Build, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=build.device)


def _copy(parameter: Tensor, tensor: Tensor) -> None:
    parameter.copy_(tensor)


def _done(_: object) -> None:
    """For a call whose result nobody wants."""
