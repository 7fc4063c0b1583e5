"""Self-attention whose keys and values are made of one cached row per token (kernels/latent.py)."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.kernels.attention_batch import PLAIN, AttentionBatch
from sapwood.kernels.interface import Kernels
from sapwood.kernels.latent import LatentSizes
from sapwood.kernels.packed import PackedHeads, PackedLinear
from sapwood.kernels.recording import (
    Attend,
    GateRows,
    MultiplyHeads,
    Program,
    RotateAndWriteLatent,
    TakeColumns,
)
from sapwood.kernels.recording_buffers import Buffer
from sapwood.kernels.torch_ops.latent import read_rows
from sapwood.layers.build import Build
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.layers.heads import halves_of_pairs
from sapwood.layers.indexer import Chooser, Indexer
from sapwood.layers.linear import (
    Arrangement,
    ColumnParallelLinear,
    Part,
    RowParallelLinear,
    divide,
    even_part,
)
from sapwood.layers.norm import RMSNorm
from sapwood.layers.targets import Slice, Target, prefixed

_EXPANDED_BYTES = 64 << 20
"""Keys and values of so many heads at once as fit into this, or of one head."""

_PAGE = 64
"""Keys of a page in the expanded form: one number for all lengths, since Triton compiles anew for
each page size."""


class LatentAttention:
    """o(attention(rope(q_b(norm(q_a(x)))), rope(norm(kv_a(x))))) for one layer of a decoder.

    Ranks share the heads; each of them keeps all rows."""

    def __init__(
        self,
        build: Build,
        layer: int,
        hidden_size: int,
        sizes: LatentSizes,
        *,
        cos_sin: Tensor,
        eps: float,
        scale: float | None = None,
        latent_scale: float = 1.0,
        pairs: bool = True,
        bias: bool = False,
        gate_name: str | None = None,
        chooser: Chooser | None = None,
    ) -> None:
        """An attention layer.

        layer    index of the layer, which picks its rows in the cache
        sizes    of all ranks together
        cos_sin  table of cosines and sines for rope_dim entries (layers/rotary)
        eps      of the norms of both latents
        scale    factor of the scores; None: key_dim ** -0.5
        latent_scale  factor of a normed latent, of which keys and values are made
        pairs    whether neighbouring entries rotate together; else halves
        bias     whether the projections to the latents, and the last one, have biases
        gate_name  name of a linear layer of x with an output per head, whose logistic function
                 multiplies what this head gives to the last projection; None: there is none
        chooser  says which keys a token attends to; None: all of them. An Indexer needs latents of
                 queries
        """
        group = build.groups.attention
        self._build = build
        self._layer = layer
        self._whole = sizes
        num_heads = divide(sizes.num_heads, group, f"{sizes.num_heads} attention heads")
        self._sizes = replace(sizes, num_heads=num_heads)
        self._kernels = build.kernels
        self._cos_sin = cos_sin
        self._eps = eps
        self._scale = sizes.key_dim**-0.5 if scale is None else scale
        self._latent_scale = latent_scale
        order = halves_of_pairs(sizes.rope_dim, cos_sin.shape[1] if pairs else 0)
        row = torch.cat((torch.arange(sizes.rank), sizes.rank + order))
        parts = [Part("kv_a_proj_with_mqa", sizes.row, 0, sizes.row)]
        rows = [row]
        if sizes.query_rank is not None:
            parts.append(Part("q_a_proj", sizes.query_rank, 0, sizes.query_rank))
            rows.append(torch.arange(sizes.query_rank))
        self._a = ColumnParallelLinear(
            build, hidden_size, tuple(parts), bias=bias, arrangement=Arrangement(rows=tuple(rows))
        )
        self._q_norm = None
        if sizes.query_rank is not None:
            self._q_norm = RMSNorm(build, sizes.query_rank, eps=eps)
        self._q = self._query_layer(build, hidden_size, order)
        self._norm = RMSNorm(build, sizes.rank, eps=eps)
        self._gate = None
        if gate_name is not None:
            part = even_part(gate_name, sizes.num_heads, group)
            self._gate = ColumnParallelLinear(build, hidden_size, (part,), bias=False)
        self._o = RowParallelLinear(
            build,
            "o_proj",
            sizes.num_heads * sizes.value_dim,
            hidden_size,
            bias=bias,
            group=group,
        )
        self._chooser = chooser
        self._indexer = chooser if isinstance(chooser, Indexer) else None
        assert self._indexer is None or sizes.query_rank is not None, "what an indexer reads"
        self._made: Tensor | None = None
        self._packed: _Made | None = None

    def _query_layer(self, build: Build, hidden_size: int, order: Tensor) -> ColumnParallelLinear:
        """order [rope_dim]: of the rotated entries"""
        sizes = self._whole
        name, inputs = "q_b_proj", sizes.query_rank
        if inputs is None:
            name, inputs = "q_proj", hidden_size
        part = even_part(name, sizes.num_heads * sizes.key_dim, build.groups.attention)
        entry = torch.cat((torch.arange(sizes.nope_dim), sizes.nope_dim + order))
        first = torch.arange(part.first, part.first + part.size, sizes.key_dim)
        rows = (first[:, None] + entry).flatten()
        arrangement = Arrangement(rows=(rows,))
        return ColumnParallelLinear(build, inputs, (part,), bias=False, arrangement=arrangement)

    def __call__(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """x [T, hidden] -> [T, hidden]; writes the new tokens' rows to the cache"""
        made = self._a(x)
        return self._o(self._attend(x, made, self._query_inputs(x, made), batch))

    def steps(self, x: Tensor, batch: ForwardBatch) -> Generator[Tensor, None, Tensor]:
        """As Mixer.steps. Raises ConfigError: the layer that makes keys and values is none of the
        linear layers that a conversion knows."""
        raise ConfigError("latent attention cannot be converted")

    def _query_inputs(self, x: Tensor, made: Tensor) -> Tensor:
        """What queries are made of; made [T, row, and entries of queries' latents]"""
        if self._q_norm is None:
            return x
        return self._q_norm(made[:, self._sizes.row :].contiguous())

    def _attend(self, x: Tensor, made: Tensor, inputs: Tensor, batch: ForwardBatch) -> Tensor:
        """The inputs [T, heads * value_dim] of the last projection; writes the new tokens' rows."""
        sizes = self._sizes
        q = self._q(inputs).view(x.shape[0], sizes.num_heads, sizes.key_dim)
        cache = batch.kv_caches[self._layer][0]
        tokens = batch.inputs_of(self._layer)
        self._kernels.norm_rope_write_latent(
            q,
            made[:, : sizes.row],
            norm=self._norm.weight,
            eps=self._eps,
            cos_sin=self._cos_sin,
            positions=batch.positions,
            cache=cache,
            write_index=tokens.write_index,
        )
        index: tuple[Tensor, ...] = ()
        if self._indexer is not None:
            index = self._indexer.prepare(x, inputs, batch)
        out = batch.by_request(self._latent_attention, q, *index)
        if self._gate is not None:
            self._kernels.gate_rows(out.view(-1, sizes.value_dim), self._gate(x).view(-1, 1))
        return out.flatten(1)

    def _latent_attention(self, batch: ForwardBatch, q: Tensor, *index: Tensor) -> Tensor:
        """q [T, heads, key_dim] -> [T, heads, value_dim]; index: as Indexer.prepare gives it"""
        cache, attention = batch.kv_caches[self._layer][0], batch.inputs_of(self._layer).attention
        if self._chooser is None or not self._chooser.leaves_out(attention):
            return self._dense(q, cache, attention)
        if self._indexer is not None:
            self._indexer.choose(batch, *index)
        return self._absorbed(q, cache, attention, self._chooser.chosen(attention))

    def _dense(self, q: Tensor, cache: Tensor, batch: AttentionBatch) -> Tensor:
        """Attention to all keys, each request in the form that costs less; absorbed, if a token's
        result must not depend on how it came into the step. q [T, heads, key_dim] ->
        [T, heads, value_dim]"""
        if self._kernels.exact_products:
            return self._absorbed(q, cache, batch)
        sizes, forms = self._sizes, _forms_of(batch, self._whole)
        if forms.absorbed is not None and forms.rows is None:
            return self._absorbed(q, cache, forms.absorbed)
        out = q.new_empty(q.shape[0], sizes.num_heads, sizes.value_dim)
        if forms.absorbed is not None:
            rows = cast(Tensor, forms.rows)
            out[rows] = self._absorbed(q[rows], cache, forms.absorbed)
        for request in forms.expanded:
            own = slice(request.first_row, request.first_row + request.num_new)
            self._expand(q[own], cache, request, out[own])
        return out

    def _absorbed(
        self, q: Tensor, cache: Tensor, batch: AttentionBatch, chosen: Tensor | None = None
    ) -> Tensor:
        """q [T, heads, key_dim] -> [T, heads, value_dim]; chosen: as in sparse_latent_attention"""
        sizes, made = self._sizes, self._filled()
        rows = q.new_empty(q.shape[0], sizes.num_heads, sizes.row)
        made.keys(q, rows)
        kernels, scale, rank = self._kernels, self._scale, sizes.rank
        if chosen is None:
            latents = kernels.latent_attention(rows, cache, batch, scale, rank)
        else:
            latents = kernels.sparse_latent_attention(rows, cache, batch, scale, rank, chosen)
        out = q.new_empty(q.shape[0], sizes.num_heads, sizes.value_dim)
        made.values(latents, out)
        return out

    def _expand(self, q: Tensor, cache: Tensor, request: _Expanded, out: Tensor) -> None:
        """q [n, heads, key_dim] of one request -> out [n, heads, value_dim]"""
        sizes = self._sizes
        length, width = request.length, sizes.expanded_dim
        pages = request.pages[: -(-length // cache.shape[2])]
        num_pages = request.alone.page_table.shape[1]
        rows = read_rows(cache, pages, sizes.row, q.dtype)[:length]
        rows = F.pad(rows, (0, 0, 0, num_pages * _PAGE - length))
        latents = rows[:, : sizes.rank].contiguous()
        for first, layer in self._filled().parts:
            count = min(self._heads_at_once(q.dtype), sizes.num_heads - first)
            made = layer(latents).view(num_pages, _PAGE, count, sizes.made).transpose(1, 2)
            rotated = rows[:, sizes.rank :].view(num_pages, 1, _PAGE, sizes.rope_dim)
            keys, values = q.new_zeros(2, num_pages, count, _PAGE, width).unbind(0)
            keys[..., : sizes.nope_dim] = made[..., : sizes.nope_dim]
            keys[..., sizes.nope_dim : sizes.key_dim] = rotated
            values[..., : sizes.value_dim] = made[..., sizes.nope_dim :]
            queries = q.new_zeros(q.shape[0], count, width)
            queries[..., : sizes.key_dim] = q[:, first : first + count]
            found = self._kernels.paged_attention(queries, keys, values, request.alone, self._scale)
            out[:, first : first + count] = found[..., : sizes.value_dim]

    def _heads_at_once(self, dtype: torch.dtype) -> int:
        """Heads whose keys and values are made together: a bound of memory for the longest text."""
        sizes = self._sizes
        per_head = self._cos_sin.shape[0] * 2 * sizes.expanded_dim * dtype.itemsize
        return max(1, min(sizes.num_heads, _EXPANDED_BYTES // per_head))

    def _filled(self) -> _Made:
        if self._packed is None:
            raise RuntimeError(
                "this layer is not packed; call the model's finalize() after loading"
            )
        return self._packed

    def targets(self) -> dict[str, Target]:
        whole, sizes = self._whole, self._sizes
        num_rows = whole.num_heads * whole.made
        own = sizes.num_heads * sizes.made
        first = self._build.groups.attention.rank * own
        kv_b = Target(
            (num_rows, whole.rank),
            self._put_made,
            part=Slice.unless_whole(0, first, own, num_rows),
        )
        found = self._a.targets() | self._q.targets() | self._o.targets()
        found |= prefixed("kv_a_layernorm", self._norm.targets())
        if self._q_norm is not None:
            found |= prefixed("q_a_layernorm", self._q_norm.targets())
        if self._gate is not None:
            found |= self._gate.targets()
        if self._indexer is not None:
            found |= prefixed("indexer", self._indexer.targets())
        return found | {"kv_b_proj.weight": kv_b}

    def _put_made(self, weight: Tensor) -> None:
        """weight [heads * made, rank]. A quantised one comes dequantised: it is cut into products
        of a few heads, in two directions."""
        if self._made is None:
            self._made = self._build.empty(*weight.shape)
        self._made.copy_(weight.float() * self._latent_scale)

    def pack(self) -> None:
        self._a.linear.pack()
        self._q.linear.pack()
        self._o.linear.pack()
        if self._gate is not None:
            self._gate.linear.pack()
        if self._indexer is not None:
            self._indexer.pack()
        if self._made is not None:
            self._packed = self._pack_made(self._made)
            self._made = None

    def _pack_made(self, weight: Tensor) -> _Made:
        sizes, kernels = self._sizes, self._kernels
        heads = weight.view(sizes.num_heads, sizes.made, sizes.rank)
        keys, values = heads[:, : sizes.nope_dim], heads[:, sizes.nope_dim :]
        step = self._heads_at_once(weight.dtype)
        return _Made(
            keys=kernels.pack_heads(keys.transpose(1, 2)),
            values=kernels.pack_heads(values),
            parts=[
                (first, kernels.pack_linear(heads[first : first + step].flatten(0, 1), None))
                for first in range(0, sizes.num_heads, step)
            ],
        )

    def record(self, program: Program, x: Buffer) -> Buffer:
        """As Mixer.record. Long prompts are left out where the expanded form costs them less."""
        sizes, made = self._sizes, self._filled()
        program.left_out.add(_LongPrompts(self._whole, self._kernels))
        latent = self._a.record(program, x)
        inputs = x
        if self._q_norm is not None:
            inputs = program.buffer(self._q_norm.weight.shape[0])
            program.add(TakeColumns(x=latent, first=sizes.row, out=inputs))
            inputs = self._q_norm.record(program, inputs)
        q = self._q.record(program, inputs)
        program.add(
            RotateAndWriteLatent(
                x=latent,
                residual=q,
                layer=self._layer,
                num_heads=sizes.num_heads,
                row=sizes.row,
                norm=self._norm.weight,
                eps=self._eps,
                cos_sin=self._cos_sin,
            )
        )
        if self._indexer is not None:
            self._indexer.record(program, x, inputs)
        rows, latents, out = (
            program.buffer(sizes.num_heads * width)
            for width in (sizes.row, sizes.rank, sizes.value_dim)
        )
        program.add(MultiplyHeads(x=q, layer=made.keys, kept=sizes.rope_dim, out=rows))
        program.add(
            Attend(
                x=rows,
                layer=self._layer,
                num_heads=sizes.num_heads,
                num_kv_heads=1,
                head_dim=sizes.row,
                scale=self._scale,
                traits=PLAIN,
                out=latents,
                rank=sizes.rank,
                sparse=self._chooser is not None,
            )
        )
        program.add(MultiplyHeads(x=latents, layer=made.values, kept=0, out=out))
        if self._gate is not None:
            program.add(GateRows(gate=self._gate.record(program, x), residual=out))
        return self._o.record(program, out)


@dataclass(frozen=True, slots=True)
class _LongPrompts:
    """Batches with a request that is computed in the expanded form, since that costs less."""

    sizes: LatentSizes
    kernels: Kernels

    def applies(self, batch: AttentionBatch) -> bool:
        if self.kernels.exact_products:
            return False
        lengths = zip(batch.query_lens, batch.context_lens, strict=True)
        return any(self.sizes.expands(*one) for one in lengths)


@dataclass(frozen=True, slots=True)
class _Made:
    """What heads make of latents, packed for both forms.

    keys    from a head's own part of a query to the space of latents
    values  from that space to a head's value
    parts   (first head, keys and values of some heads from there on)
    """

    keys: PackedHeads
    values: PackedHeads
    parts: Sequence[tuple[int, PackedLinear]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Expanded:
    """A request in the expanded form.

    first_row, num_new  its new tokens in the step
    length              its tokens
    pages               [max_pages] of its rows, then unused entries
    alone               the request over pages of _PAGE keys that are made for it
    """

    first_row: int
    num_new: int
    length: int
    pages: Tensor
    alone: AttentionBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class _Forms:
    """Which requests of a step are computed in which form.

    absorbed  those in the absorbed form; None: there are none
    rows      their new tokens in the step; None: all of the step
    """

    absorbed: AttentionBatch | None
    rows: Tensor | None
    expanded: Sequence[_Expanded]


def _forms_of(batch: AttentionBatch, sizes: LatentSizes) -> _Forms:
    """Chosen once for all layers of a step."""
    key = f"latent forms {sizes}"
    if key not in batch.cache:
        batch.cache[key] = _choose_forms(batch, sizes)
    return cast(_Forms, batch.cache[key])


def _choose_forms(batch: AttentionBatch, sizes: LatentSizes) -> _Forms:
    lengths = list(zip(batch.query_lens, batch.context_lens, strict=True))
    long = [index for index, one in enumerate(lengths) if sizes.expands(*one)]
    if not long:
        return _Forms(absorbed=batch, rows=None, expanded=())
    starts = [sum(batch.query_lens[:index]) for index in range(len(lengths) + 1)]
    expanded = [_alone(batch, index, starts[index]) for index in long]
    others = [index for index in range(len(lengths)) if index not in long]
    if not others:
        return _Forms(absorbed=None, rows=None, expanded=expanded)
    device = batch.page_table.device
    chosen = torch.tensor(others, device=device)
    query_lens = tuple(batch.query_lens[index] for index in others)
    query_start = [sum(query_lens[:index]) for index in range(len(others) + 1)]
    absorbed = AttentionBatch(
        page_table=batch.page_table[chosen],
        query_start=torch.tensor(query_start, dtype=torch.int32, device=device),
        context_len=batch.context_len[chosen],
        query_lens=query_lens,
        context_lens=tuple(batch.context_lens[index] for index in others),
        num_decodes=batch.num_decodes,  # none of them is long
    )
    rows = [row for index in others for row in range(starts[index], starts[index + 1])]
    return _Forms(absorbed=absorbed, rows=torch.tensor(rows, device=device), expanded=expanded)


def _alone(batch: AttentionBatch, index: int, first_row: int) -> _Expanded:
    num_new, length = batch.query_lens[index], batch.context_lens[index]
    device = batch.page_table.device
    tensor = partial(torch.tensor, dtype=torch.int32, device=device)
    return _Expanded(
        first_row=first_row,
        num_new=num_new,
        length=length,
        pages=batch.page_table[index].long(),
        alone=AttentionBatch(
            page_table=torch.arange(-(-length // _PAGE), dtype=torch.int32, device=device)[None],
            query_start=tensor([0, num_new]),
            context_len=tensor([length]),
            query_lens=(num_new,),
            context_lens=(length,),
            num_decodes=0,
        ),
    )
