"""Lightning attention whose queries and keys are normed and rotated.

Source: Ling Team 2026, the model code of Ling 2.5."""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.kernels.recording import Program, RotateAndWrite, TakeColumns
from sapwood.kernels.recording_buffers import Buffer
from sapwood.kernels.state_forms import GatedNormForm
from sapwood.layers.build import Build
from sapwood.layers.delta import Columns
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.layers.heads import HeadLayout, QkvForm
from sapwood.layers.lightning import LightningCore, ValuesKeysQueries
from sapwood.layers.linear import ColumnParallelLinear, RowParallelLinear, even_part, share
from sapwood.layers.norm import RMSNorm
from sapwood.layers.targets import Target, prefixed

_FUSED = QkvForm(fused="query_key_value")


class RotatedLightningAttention:
    """dense(norm(attention(rope(qk_norm(qkv(x))))) * logistic(gate(x))), with scores divided by the
    root of a head's size."""

    def __init__(
        self,
        build: Build,
        layer: int,
        hidden_size: int,
        heads: HeadLayout,
        slopes: Tensor,
        *,
        cos_sin: Tensor,
        num_groups: int,
        eps: float,
        norms_heads: bool,
        qkv_bias: bool,
        out_name: str,
    ) -> None:
        """A layer without weights.

        layer        index of the layer, which picks its states
        slopes       [heads] fp32: how fast their states fade
        cos_sin      table of cosines and sines of queries and keys (layers/rotary)
        num_groups   of heads; the norm of what attention gives is over one of them
        eps          of all norms
        norms_heads  whether queries and keys are normed, each head alone
        out_name     of the output projection in the checkpoint
        Raises       ConfigError if heads or ranks cannot have equally many of these groups
        """
        group, (number, size) = build.groups.attention, (heads.num_heads, heads.head_dim)
        if num_groups < 1 or number * size % num_groups:
            raise ConfigError(
                f"the norms of linear attention are over {num_groups} groups, which must divide "
                f"the {number * size} entries of all heads"
            )
        share(num_groups, group, f"{num_groups} groups of linear attention's norms")
        self._kernels = build.kernels
        self._layer = layer
        self._head_dim = size
        self._num_heads = heads.num_heads_of(group)
        self._cos_sin = cos_sin
        self._eps = eps
        parts = heads.qkv_parts(group)
        self._qkv = ColumnParallelLinear(
            build, hidden_size, parts, bias=qkv_bias, arrangement=_FUSED.arrangement(heads, group)
        )
        self._norms: tuple[RMSNorm, ...] = ()
        if norms_heads:
            self._norms = (RMSNorm(build, size, eps=eps), RMSNorm(build, size, eps=eps))
        gate = even_part("g_proj", number * size, group)
        self._gate = ColumnParallelLinear(build, hidden_size, (gate,), bias=False)
        # The norm takes sums of products that were not divided by the root: so its eps grows.
        norm = GatedNormForm(group=number * size // num_groups, eps=eps * size, logistic=True)
        self._core = LightningCore(build, layer, heads, slopes, norm=norm)
        self._out = RowParallelLinear(
            build, out_name, number * size, hidden_size, bias=False, group=group
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
        """x [T, hidden] -> the inputs of the output projection"""
        qkv = self._qkv(x)
        q, k, v = qkv.chunk(3, dim=1)
        if self._norms:
            q, k = (self._normed(*pair) for pair in zip((q, k), self._norms, strict=True))
        # As heads of queries alone: nothing goes to a cache.
        none = qkv.new_empty(1, 0, 1, self._head_dim)
        rotated = self._kernels.qk_norm_rope_write_kv(
            torch.cat((q, k), dim=1),
            num_heads=2 * self._num_heads,
            num_kv_heads=0,
            head_dim=self._head_dim,
            q_norm=None,
            k_norm=None,
            eps=self._eps,
            cos_sin=self._cos_sin,
            positions=batch.positions,
            key_cache=none,
            value_cache=none,
            write_index=torch.zeros_like(batch.positions),
        )
        q, k = rotated.flatten(1).chunk(2, dim=1)
        return self._core(v, k, q, self._gate(x), batch)

    def _normed(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """x [T, heads * head_dim], each head normed"""
        return norm(x.reshape(-1, self._head_dim)).view(x.shape)

    def targets(self) -> dict[str, Target]:
        found = self._qkv.targets() | self._gate.targets() | self._out.targets()
        found["g_norm.weight"] = self._core.norm_target()
        names = ("query_layernorm", "key_layernorm")
        for name, norm in zip(names, self._norms, strict=False):
            found |= prefixed(name, norm.targets())
        return found

    def pack(self) -> None:
        for layer in (self._qkv, self._gate, self._out):
            layer.linear.pack()

    def record(self, program: Program, x: Buffer) -> Buffer:
        """As Mixer.record."""
        qkv, gate = self._qkv.record(program, x), self._gate.record(program, x)
        width = self._core.width
        for index, norm in enumerate(self._norms):
            norm.record_columns(program, qkv, index * width, self._num_heads)
        taken, rotated = program.buffer(2 * width), program.buffer(2 * width)
        program.add(TakeColumns(x=qkv, first=0, out=taken))
        program.add(
            RotateAndWrite(
                x=taken,
                layer=self._layer,
                num_heads=2 * self._num_heads,
                num_kv_heads=0,
                head_dim=self._head_dim,
                q_norm=None,
                k_norm=None,
                eps=self._eps,
                cos_sin=self._cos_sin,
                out=rotated,
            )
        )
        inputs = ValuesKeysQueries(
            Columns(qkv, 2 * width), Columns(rotated, width), Columns(rotated)
        )
        return self._out.record(program, self._core.record(program, inputs, gate))
