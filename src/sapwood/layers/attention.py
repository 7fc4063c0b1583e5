"""Self-attention over the paged KV cache, usually with rotary positions."""

from __future__ import annotations

from collections.abc import Callable, Generator
from copy import copy
from dataclasses import replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.kernels.attention_batch import PLAIN, AttentionTraits
from sapwood.kernels.recording import (
    Attend,
    CannotRecord,
    Clip,
    GateColumns,
    Program,
    ResizeHeads,
    RotateAndWrite,
    Scale,
    ScaleByPosition,
    ScaleColumns,
)
from sapwood.kernels.recording_buffers import Buffer
from sapwood.layers.both_ways import attend_both_ways
from sapwood.layers.build import Build
from sapwood.layers.chunks import in_chunks
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.layers.heads import SEPARATE, HeadLayout, QkvForm, halves_of_pairs
from sapwood.layers.linear import Addition, ColumnParallelLinear, RowParallelLinear, even_part
from sapwood.layers.norm import HeadLayerNorm, HeadNormForm, RMSNorm
from sapwood.layers.norms_over_ranks import NormsOverRanks
from sapwood.layers.targets import Slice, Target, prefixed, shared_by, whole

RMSNormMaker = Callable[[int], RMSNorm]
"""From a size to a norm without weights."""


class HeadNorm(Protocol):
    """A norm of queries, or of keys, before their rotation, that is no RMSNorm of each head."""

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, heads * head_dim] -> the same shape"""
        ...

    def record_columns(self, program: Program, x: Buffer, first: int) -> None:
        """Add the norms of x's columns from `first` on to a recorded step, in place."""
        ...

    def targets(self) -> dict[str, Target]: ...


class Attention:
    """o(attention(rope(qk_norm(clip(qkv(x)))))) for one layer of a decoder."""

    def __init__(
        self,
        build: Build,
        layer: int,
        hidden_size: int,
        heads: HeadLayout,
        *,
        cos_sin: Tensor,
        qkv_bias: bool = False,
        o_bias: bool = False,
        qk_norm: RMSNormMaker | None = None,
        norms_all_heads: bool = False,
        norms_after_rotation: bool = False,
        head_norm: HeadNormForm | None = None,
        norm_names: tuple[str, str] = ("q_norm", "k_norm"),
        norms_values: bool = False,
        clip: float | None = None,
        query_scale: Tensor | None = None,
        form: QkvForm = SEPARATE,
        eps: float = 1e-6,
        scale: float | None = None,
        traits: AttentionTraits = PLAIN,
        sinks: bool = False,
        o_name: str = "o_proj",
        alibi: Tensor | None = None,
        gate_name: str | None = None,
        chunk: int | None = None,
        value_dim: int | None = None,
        value_scale: float | None = None,
        in_size: int | None = None,
    ) -> None:
        """An attention layer.

        layer    index of the layer, which picks its KV cache
        cos_sin  table of cosines and sines (layers/rotary)
        qk_norm  makes the norms of queries and keys before their rotation; None: there are none
        norms_all_heads  whether these are over all heads at once; else over each head
        norms_after_rotation  whether norms over each head come after the rotation
        head_norm    other norms of queries and keys before their rotation, instead of qk_norm
        norm_names   names of the norms of queries and of keys in the checkpoint
        norms_values whether each value head is divided by its root mean square
        clip         the projections' entries are cut to -clip .. clip; None: they are not
        query_scale  [positions] fp32: factor of a rotated query, by its position; None: 1
        form         how the checkpoint keeps the projections
        eps      of norms over each head
        scale    factor of the scores; None: head_dim ** -0.5
        traits   what its attention does beyond scores, causal mask and softmax
        sinks    whether the checkpoint has sinks (AttentionTraits), one per query head
        o_name   name of the output projection in the checkpoint, which is [in, out] if `form` says
                 `transposed`
        alibi    [heads of all ranks] fp32 slopes (AttentionTraits); None: there are none
        gate_name  name of a linear layer of x, whose logistic function multiplies what the output
                   projection takes; None: there is none
        chunk    a token sees the tokens of its own chunk of that many only (layers/chunks); None:
                 there are no chunks
        value_dim  size of a value head, at most head_dim, to which the cache fills it up with
                   zeros; None: head_dim
        value_scale  factor of values; None: 1
        in_size  entries of an input x; None: hidden_size
        """
        group = build.groups.attention
        self._layer = layer
        self._num_ranks = group.size
        self._addition: Addition | None = None
        self._num_heads = heads.num_heads_of(group)
        self._num_kv_heads = heads.num_kv_heads_of(group)
        self._head_dim = heads.head_dim
        self._value_dim = heads.head_dim if value_dim is None else value_dim
        assert self._value_dim <= heads.head_dim, "values longer than keys have no place"
        arrangement = form.arrangement(heads, group)
        assert arrangement is None or self._value_dim == heads.head_dim, "as QkvForm has values"
        self._value_scale = value_scale
        width = heads.num_heads * self._value_dim
        self._eps = eps
        self._cos_sin = cos_sin
        self._kernels = build.kernels
        self._scale = heads.head_dim**-0.5 if scale is None else scale
        self._sinks: Tensor | None = None
        if sinks:
            self._sinks = torch.empty(self._num_heads, dtype=torch.float32, device=build.device)
            traits = replace(traits, sinks=self._sinks)
        self._first_head = group.rank * self._num_heads
        self._whole_heads = heads.num_heads
        if alibi is not None:
            first = group.rank * self._num_heads
            own = alibi[first : first + self._num_heads].to(build.device, torch.float32)
            traits = replace(traits, alibi=own.contiguous())
        self._traits = traits
        self._clip = clip
        self._values_are_keys = form.values_are_keys
        self._value_norm = build.empty(heads.head_dim).fill_(1.0) if norms_values else None
        self._query_scale = query_scale
        self._chunk = chunk
        self._qkv = ColumnParallelLinear(
            build,
            hidden_size if in_size is None else in_size,
            heads.qkv_parts(group, form.names, self._value_dim)[: 2 if form.values_are_keys else 3],
            bias=qkv_bias,
            arrangement=arrangement,
        )
        self._o = RowParallelLinear(
            build,
            o_name,
            width,
            hidden_size,
            bias=o_bias,
            group=group,
            transposed=form.transposed,
        )
        self._gate: ColumnParallelLinear | None = None
        if gate_name is not None or form.gated:
            self._gate = ColumnParallelLinear(
                build,
                hidden_size,
                (even_part(gate_name or form.names[0], width, group),),
                bias=qkv_bias and form.gated,
                arrangement=form.gates(heads, group) if form.gated else None,
            )
        all_heads = (
            (heads.num_heads, self._first_head, self._num_heads),
            (heads.num_kv_heads, heads.first_kv_head_of(group), self._num_kv_heads),
        )
        self._norm_names = norm_names
        self._each_head: tuple[RMSNorm, ...] = ()
        self._head_norms: tuple[HeadNorm, ...] = ()
        self._norms_over_ranks: NormsOverRanks | None = None
        self._q_norm: Tensor | None = None
        self._k_norm: Tensor | None = None
        self._after_rotation: Tensor | None = None
        if head_norm is not None:
            order = halves_of_pairs(heads.head_dim, form.pairs)
            self._head_norms = tuple(
                HeadLayerNorm(build, head_norm, one, eps=eps, order=order) for one in all_heads
            )
        elif qk_norm is not None and norms_all_heads:
            parts = tuple(
                qk_norm(heads.head_dim * own).part_of(
                    heads.head_dim * every, heads.head_dim * first
                )
                for every, first, own in all_heads
            )
            self._head_norms = parts
            if group.size > 1:
                self._norms_over_ranks = NormsOverRanks(group, parts)
        elif qk_norm is not None:
            self._each_head = tuple(qk_norm(heads.head_dim) for _ in all_heads)
            self._q_norm, self._k_norm = (norm.weight for norm in self._each_head)
            if norms_after_rotation:
                self._q_norm = self._k_norm = torch.ones_like(self._each_head[0].weight)
                self._after_rotation = torch.ones_like(self._q_norm)

    def of_layer(self, layer: int, addition: Addition | None) -> Attention:
        """The same weights with another layer's cache; `addition` adds to queries, keys and values
        before their norms, and they lie one after another. Load and pack the original only."""
        other = copy(self)
        other._layer, other._addition = layer, addition
        return other

    def __call__(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """x [T, hidden] -> [T, hidden]; writes the new tokens' keys and values to the cache"""
        return self._o(self._attend(x, batch))

    def steps(self, x: Tensor, batch: ForwardBatch) -> Generator[Tensor, None, Tensor]:
        """As Mixer.steps."""
        yield x
        attended = self._attend(x, batch)
        yield attended
        return self._o(attended)

    def _attend(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """x [T, hidden] -> the inputs [T, heads * head_dim] of the output projection; writes the
        new tokens' keys and values to the cache"""
        qkv = self._qkv(x)
        if self._addition is not None:
            self._addition(x, qkv)
        if self._clip is not None:
            qkv = qkv.clamp(-self._clip, self._clip)
        if self._values_are_keys:
            keys = qkv[:, self._num_heads * self._head_dim :]
            qkv = torch.cat((qkv, keys), dim=-1)
        if self._head_norms:
            qkv = self._normed(qkv)
        if self._value_dim < self._head_dim:
            qkv = self._filled_up(qkv)
        if self._value_norm is not None:
            values = qkv[:, (self._num_heads + self._num_kv_heads) * self._head_dim :]
            each = values.reshape(-1, self._head_dim)
            normed = self._kernels.rms_norm(each, self._value_norm, self._eps)
            values.copy_(normed.view_as(values))
        key_cache, value_cache = batch.kv_caches[self._layer]
        inputs = batch.inputs_of(self._layer)
        cos_sin, positions = batch.rotation(self._cos_sin)
        q = self._kernels.qk_norm_rope_write_kv(
            qkv,
            num_heads=self._num_heads,
            num_kv_heads=self._num_kv_heads,
            head_dim=self._head_dim,
            q_norm=self._q_norm,
            k_norm=self._k_norm,
            eps=self._eps,
            cos_sin=cos_sin,
            positions=positions,
            key_cache=key_cache,
            value_cache=value_cache,
            write_index=inputs.write_index,
        )
        if self._after_rotation is not None:
            q = q * self._after_rotation
        if self._query_scale is not None:
            q = (q * self._query_scale[batch.positions][:, None, None]).to(q.dtype)
        out = batch.by_request(self._paged_attention, q)
        out = out.view(x.shape[0], self._num_heads, self._head_dim)
        out = out[..., : self._value_dim].flatten(1)
        if self._value_scale is not None:
            out = out * self._value_scale
        if self._gate is not None:
            out = out.contiguous()
            self._kernels.gate_columns(out, self._gate(x))
        return out

    def _paged_attention(self, batch: ForwardBatch, q: Tensor) -> Tensor:
        keys, values = batch.kv_caches[self._layer]
        attention = batch.inputs_of(self._layer).attention
        if self._chunk is not None:
            attention = in_chunks(attention, self._chunk, keys.shape[2])
        out = self._kernels.paged_attention(q, keys, values, attention, self._scale, self._traits)
        if attention.both_ways:
            attend_both_ways(out, q, keys, values, attention, self._scale, self._traits)
        return out

    def _normed(self, qkv: Tensor) -> Tensor:
        """The same with normed queries and keys."""
        q_size, k_size = (n * self._head_dim for n in (self._num_heads, self._num_kv_heads))
        q, k, v = qkv.tensor_split((q_size, q_size + k_size), dim=-1)
        if self._norms_over_ranks is not None:
            return torch.cat((*self._norms_over_ranks((q, k)), v), dim=-1)
        q, k = (norm(x.contiguous()) for norm, x in zip(self._head_norms, (q, k), strict=True))
        return torch.cat((q, k, v), dim=-1)

    def _filled_up(self, qkv: Tensor) -> Tensor:
        """The same with value heads as long as the others."""
        q_and_k = (self._num_heads + self._num_kv_heads) * self._head_dim
        values = qkv[:, q_and_k:].reshape(-1, self._num_kv_heads, self._value_dim)
        longer = F.pad(values, (0, self._head_dim - self._value_dim))
        return torch.cat((qkv[:, :q_and_k], longer.flatten(1)), dim=-1)

    def targets(self) -> dict[str, Target]:
        found = self._qkv.targets() | self._o.targets()
        for name, norm in zip(self._norm_names, self._each_head or self._head_norms, strict=False):
            found |= prefixed(name, norm.targets())
        if self._sinks is not None:
            own = Slice.unless_whole(0, self._first_head, self._num_heads, self._whole_heads)
            found["sinks"] = Target((self._whole_heads,), whole(self._sinks).put, part=own)
        if self._gate is not None:
            for name, target in self._gate.targets().items():
                found[name] = shared_by(found[name], target) if name in found else target
        return found

    def pack(self) -> None:
        self._qkv.linear.pack()
        self._o.linear.pack()
        if self._gate is not None:
            self._gate.linear.pack()
        if self._after_rotation is not None:
            # A rotation keeps a head's length, so dividing by it may come first. The weights of
            # both norms only meet in the product of a query and a key: the query takes both.
            q, k = (norm.weight.float() for norm in self._each_head)
            self._after_rotation.copy_(q * k)

    def record(self, program: Program, x: Buffer) -> Buffer:
        """As Mixer.record."""
        unknown = {
            "norms of values": self._value_norm is not None,
            "values that are keys": self._values_are_keys,
            "attention in chunks": self._chunk is not None,
        }
        for name, is_there in unknown.items():
            if is_there:
                raise CannotRecord(f"a recorded step has no {name}")
        qkv = self._qkv.record(program, x)
        if self._addition is not None:
            self._addition.record(program, x, qkv)
        width = self._num_heads * self._head_dim
        if self._clip is not None:
            program.add(Clip(residual=qkv, limit=self._clip))
        if self._norms_over_ranks is not None:
            program.refuse_sum_over(self._num_ranks)
        for norm, first in zip(self._head_norms, (0, width), strict=False):
            norm.record_columns(program, qkv, first)
        qkv = self._recorded_heads(program, qkv, self._value_dim, self._head_dim)
        q, attended = program.buffer(width), program.buffer(width)
        program.add(
            RotateAndWrite(
                x=qkv,
                layer=self._layer,
                num_heads=self._num_heads,
                num_kv_heads=self._num_kv_heads,
                head_dim=self._head_dim,
                q_norm=self._q_norm,
                k_norm=self._k_norm,
                eps=self._eps,
                cos_sin=self._cos_sin,
                out=q,
            )
        )
        if self._after_rotation is not None:
            factors = self._after_rotation.repeat(self._num_heads)
            program.add(ScaleColumns(residual=q, first=0, factors=factors))
        if self._query_scale is not None:
            program.add(ScaleByPosition(residual=q, factors=self._query_scale))
        program.add(
            Attend(
                x=q,
                layer=self._layer,
                num_heads=self._num_heads,
                num_kv_heads=self._num_kv_heads,
                head_dim=self._head_dim,
                scale=self._scale,
                traits=self._traits,
                out=attended,
            )
        )
        attended = self._recorded_heads(program, attended, self._head_dim, self._value_dim)
        if self._value_scale is not None:
            program.add(Scale(residual=attended, factor=self._value_scale))
        if self._gate is not None:
            gate = self._gate.record(program, x)
            program.add(GateColumns(gate=gate, first=0, residual=attended))
        return self._o.record(program, attended)

    def _recorded_heads(self, program: Program, x: Buffer, size: int, new_size: int) -> Buffer:
        """x with heads of another size: the value heads after queries and keys, which are made as
        long as these, or the heads that attention gives, which become value heads again."""
        if size == new_size:
            return x
        first, count = 0, self._num_heads
        if new_size == self._head_dim:
            first = (self._num_heads + self._num_kv_heads) * self._head_dim
            count = self._num_kv_heads
        out = program.buffer(first + count * new_size)
        program.add(ResizeHeads(x=x, first=first, count=count, size=size, out=out))
        return out
