"""Which keys a token attends to, chosen by a small attention of its own (lightning indexer).

Source: DeepSeek-AI 2025, DeepSeek-V3.2-Exp."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from sapwood.kernels.attention_batch import AttentionBatch
from sapwood.kernels.recording import ChooseKeys, Norm, Program, RotateAndWriteLatent
from sapwood.kernels.recording_buffers import Buffer
from sapwood.layers.build import Build
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.layers.heads import halves_of_pairs
from sapwood.layers.linear import Arrangement, ColumnParallelLinear, Part
from sapwood.layers.quantization.dense import DENSE
from sapwood.layers.targets import Target, prefixed

_EPS = 1e-6
_CHOSEN = "keys chosen by an indexer"


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexSizes:
    """An indexer's heads.

    num_heads, head_dim  of its queries; it has one key per token
    num_chosen           keys that a token attends to at most
    Raises               ValueError for a size below 1, or an odd head_dim: 8-bit caches have none
    """

    num_heads: int
    head_dim: int
    num_chosen: int

    def __post_init__(self) -> None:
        if min(self.num_heads, self.head_dim, self.num_chosen) < 1 or self.head_dim % 2:
            raise ValueError(f"an indexer cannot have the sizes {self}")


class Chooser:
    """Says which keys the tokens of a layer attend to: those that an earlier layer has chosen."""

    def __init__(self, num_chosen: int) -> None:
        self._num_chosen = num_chosen

    def leaves_out(self, batch: AttentionBatch) -> bool:
        """Whether a token of the step sees more keys than are chosen."""
        return max(batch.context_lens, default=0) > self._num_chosen

    def chosen(self, batch: AttentionBatch) -> Tensor:
        """[T, num_chosen] int64: positions of the keys, then -1"""
        if _CHOSEN not in batch.cache:
            raise RuntimeError("no layer before this one has chosen keys")
        return cast(Tensor, batch.cache[_CHOSEN])


class Indexer(Chooser):
    """Chooses itself: by the sum over heads of weight * relu(query * key), with a key per token.

    Every rank has the whole indexer, so that all choose the same keys."""

    def __init__(
        self,
        build: Build,
        layer: int,
        hidden_size: int,
        query_rank: int,
        sizes: IndexSizes,
        *,
        cos_sin: Tensor,
        pairs: bool,
    ) -> None:
        """An indexer.

        query_rank  entries of the latents that queries are made of
        cos_sin     table of cosines and sines; the first entries of queries and keys are rotated
        pairs       whether neighbouring entries rotate together; else halves
        """
        super().__init__(sizes.num_chosen)
        self._layer = layer
        self._sizes = sizes
        self._kernels = build.kernels
        self._cos_sin = cos_sin
        heads, width = sizes.num_heads, sizes.head_dim
        self._order = halves_of_pairs(width, cos_sin.shape[1] if pairs else 0)
        rows = (torch.arange(heads)[:, None] * width + self._order).flatten()
        self._q = ColumnParallelLinear(
            build,
            query_rank,
            (Part("wq_b", heads * width, 0, heads * width),),
            bias=False,
            arrangement=Arrangement(rows=(rows,)),
        )
        self._k = ColumnParallelLinear(
            build,
            hidden_size,
            (Part("wk", width, 0, width),),
            bias=False,
            arrangement=Arrangement(rows=(self._order,)),
        )
        # Never quantised, as a router is not: it is small, and decides.
        self._weights = ColumnParallelLinear(
            replace(build, scheme=DENSE),
            hidden_size,
            (Part("weights_proj", heads, 0, heads),),
            bias=False,
        )
        self._norm = build.empty(2, width)
        self._no_norm = build.empty(0)
        self._scale = (heads * width) ** -0.5

    def prepare(self, x: Tensor, queries: Tensor, batch: ForwardBatch) -> tuple[Tensor, ...]:
        """Write the new tokens' keys.

        x        [T, hidden], the layer's inputs
        queries  [T, query_rank]
        Returns  what `choose` takes: queries [T, heads, head_dim] and weights [T, heads] fp32;
                 nothing if all keys are chosen anyway"""
        sizes, tokens = self._sizes, batch.inputs_of(self._layer)
        cache = batch.kv_caches[self._layer][1]
        key = self._kernels.layer_norm(self._k(x), self._norm[0], self._norm[1], _EPS)
        # Pieces of a step do not know its lengths.
        is_partial = batch.between is not None or self.leaves_out(tokens.attention)
        q = x.new_empty(x.shape[0], 0, sizes.head_dim)
        if is_partial:
            q = self._q(queries).view(x.shape[0], sizes.num_heads, sizes.head_dim)
        # A row without a latent: all of a key may be rotated.
        self._kernels.norm_rope_write_latent(
            q,
            key,
            norm=self._no_norm,
            eps=_EPS,
            cos_sin=self._cos_sin,
            positions=batch.positions,
            cache=cache,
            write_index=tokens.write_index,
        )
        if not is_partial:
            return ()
        return q, self._weights.linear.packed.fp32(x) * self._scale

    def choose(self, batch: ForwardBatch, q: Tensor, weights: Tensor) -> None:
        """Choose for all tokens, of keys of which some are left out."""
        cache, attention = batch.kv_caches[self._layer][1], batch.inputs_of(self._layer).attention
        attention.cache[_CHOSEN] = self._kernels.choose_keys(
            q, weights, cache, attention, self._sizes.num_chosen
        )

    def record(self, program: Program, x: Buffer, queries: Buffer) -> None:
        """Add the ops of `choose` to a recorded step; RuntimeError before `pack`."""
        sizes = self._sizes
        key = program.buffer(sizes.head_dim)
        program.add(
            Norm(
                x=self._k.record(program, x),
                residual=None,
                weight=self._norm[0],
                bias=self._norm[1],
                centered=True,
                eps=_EPS,
                out=key,
            )
        )
        q = self._q.record(program, queries)
        program.add(
            RotateAndWriteLatent(
                x=key,
                residual=q,
                layer=self._layer,
                num_heads=sizes.num_heads,
                row=sizes.head_dim,
                norm=self._no_norm,
                eps=_EPS,
                cos_sin=self._cos_sin,
                cache=1,
            )
        )
        program.add(
            ChooseKeys(
                x=x,
                queries=q,
                weights=self._weights.linear.packed,
                scale=self._scale,
                layer=self._layer,
                num_heads=sizes.num_heads,
                num_chosen=sizes.num_chosen,
            )
        )

    def targets(self) -> dict[str, Target]:
        found = self._q.targets() | self._k.targets() | self._weights.targets()
        width = self._sizes.head_dim
        norms = {
            name: Target((width,), partial(self._put_norm, own))
            for name, own in zip(("weight", "bias"), self._norm, strict=True)
        }
        return found | prefixed("k_norm", norms)

    def _put_norm(self, own: Tensor, whole: Tensor) -> None:
        own.copy_(whole[self._order.to(whole.device)])

    def pack(self) -> None:
        for layer in (self._q, self._k, self._weights):
            layer.linear.pack()
