"""The token embedding and the output layer, with the vocabulary split over the ranks.

Each rank holds ceil(vocab / ranks) rows; the last rank may have fewer, and then zeros.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.distributed.groups import Group
from sapwood.kernels.coded import LinearPart
from sapwood.kernels.packed import PackedLinear
from sapwood.kernels.recording import AddPositions, Embed, Logits, Program, finish_logits
from sapwood.kernels.recording_buffers import Buffer
from sapwood.layers.adapted_vocab import (
    EmbeddingAddition,
    EmbeddingSite,
    HeadSite,
    HeadWeight,
    VocabTarget,
)
from sapwood.layers.adapters import AdapterTarget
from sapwood.layers.build import Build
from sapwood.layers.linear import Linear
from sapwood.layers.quantization.dense import DENSE, check_range
from sapwood.layers.targets import Slice, Target, unused, whole

_COLUMNS_AT_ONCE = 64
"""Of a weight that is read back from the kernels: so many rows of logits are held meanwhile."""


class VocabEmbedding:
    """weight [this rank's vocab, hidden]"""

    def __init__(
        self, build: Build, vocab_size: int, hidden_size: int, *, scale: float = 1.0
    ) -> None:
        """scale: factor of the vectors, which the weight does not have"""
        self._kernels = build.kernels
        self._group = build.groups.attention
        self._dtype = build.dtype
        self._scale = scale
        self._vocab_size = vocab_size
        size = rows_per_rank(vocab_size, self._group)
        self._first = self._group.rank * size
        dtype = build.embedding_dtype or build.dtype
        self.weight = torch.empty(size, hidden_size, device=build.device, dtype=dtype)
        self._next: Tensor | None = None
        self._renewal = build.renewal
        self._site: EmbeddingSite | None = None
        if build.adapters is not None:
            # A captured step has no place for them.
            is_recorded = not build.kernels.can_be_captured
            pack = partial(build.kernels.pack_linear, bias=None)
            self._site = EmbeddingSite(build.adapters, pack, is_recorded=is_recorded)

    def __call__(self, token_ids: Tensor) -> Tensor:
        """token_ids [T] int64 -> [T, hidden], the same on every rank"""
        rows = self._rows(token_ids)
        if self._site is not None:
            self._site.change(token_ids, rows)
        return rows if self._scale == 1.0 else rows * self._scale

    def _rows(self, token_ids: Tensor) -> Tensor:
        if self._group.size == 1:
            return self._kernels.embedding(token_ids, self.weight, self._dtype)
        local = token_ids - self._first
        elsewhere = (local < 0) | (local >= self.weight.shape[0])
        rows = self._kernels.embedding(local.masked_fill(elsewhere, 0), self.weight, self._dtype)
        return self._group.all_reduce(rows.masked_fill_(elsewhere.unsqueeze(1), 0.0))

    def targets(self) -> dict[str, Target]:
        def put(rows: Tensor) -> None:
            own = with_rows(rows, self.weight.shape[0])
            if self._renewal.is_open:
                self._next = torch.empty_like(self.weight)
                self._renewal.note(self)
            self.newest.copy_(own)
            check_range(self.newest, own)

        def put_blocks(rows: LinearPart) -> None:
            put(rows.dequantized(torch.float32))

        shape = (self._vocab_size, self.weight.shape[1])
        adapter = self._vocab_adapter(shape)
        target = Target(
            shape,
            put,
            put_blocks,
            part=self._part(),
            vocab_adapter=adapter,
            is_beside=True,
            read=self._read,
        )
        return {"weight": target}

    @property
    def newest(self) -> Tensor:
        """The weight that was put last, also if the layer does not yet compute with it."""
        return self.weight if self._next is None else self._next

    def pack(self) -> None:
        """As Renewed.pack: the rows are ready as they were put."""

    def change(self) -> Tensor | None:
        """As Renewed.change."""
        if self._next is None:
            return None
        if self._renewal.in_place:
            self.weight.copy_(self._next)
            old = self._next
        else:
            old, self.weight = self.weight, self._next
        self._next = None
        return old

    def forget(self) -> None:
        self._next = None

    def _read(self) -> Tensor:
        return self.weight[: own_rows(self.weight.shape[0], self._vocab_size, self._first)]

    def _vocab_adapter(self, shape: tuple[int, int]) -> VocabTarget | None:
        """Every rank changes the whole vectors, which all have."""
        if self._site is None:
            return None
        dtype = self._dtype

        def low_rank(a: Tensor, b: Tensor) -> EmbeddingAddition:
            table, expands = (turned.t().to(dtype).contiguous() for turned in (a, b))
            return EmbeddingAddition(table=table, b=expands)

        def replacing(weight: Tensor) -> EmbeddingAddition:
            return EmbeddingAddition(table=weight.to(dtype).contiguous(), b=None)

        return VocabTarget(site=self._site, shape=shape, whole=replacing, low_rank=low_rank)

    def _part(self) -> Slice | None:
        """This rank's rows that are in the vocabulary; None: all."""
        num_own = own_rows(self.weight.shape[0], self._vocab_size, self._first)
        return Slice.unless_whole(0, min(self._first, self._vocab_size), num_own, self._vocab_size)

    def record(self, program: Program) -> Buffer:
        """Add the vectors of a step's tokens to a recorded step."""
        program.refuse_sum_over(self._group.size)
        out = program.buffer(self.weight.shape[1])
        changed = self._changed
        program.add(Embed(weight=self.weight, scale=self._scale, out=out, changed=changed))
        return out

    def _changed(self, token_ids: Tensor) -> Tensor | None:
        """What this layer gives if adapters of the step change it; else None."""
        if self._site is None or not self._site.is_changed:
            return None
        return self(token_ids)


class LearnedPositions:
    """A vector per position, which is added to that of the token. Every rank holds all."""

    def __init__(self, build: Build, num_positions: int, hidden_size: int, *, offset: int) -> None:
        """offset: the row of the first position"""
        self._kernels = build.kernels
        self._dtype = build.dtype
        self._offset = offset
        self._weight = build.empty(num_positions + offset, hidden_size)

    def __call__(self, positions: Tensor) -> Tensor:
        """positions [T] int64 -> [T, hidden]"""
        return self._kernels.embedding(positions + self._offset, self._weight, self._dtype)

    def record(self, program: Program, x: Buffer) -> None:
        """Add the vectors of a step's positions to x, in a recorded step."""
        program.add(AddPositions(table=self._weight, first=self._offset, residual=x))

    def targets(self) -> dict[str, Target]:
        return {"weight": whole(self._weight)}


class LMHead:
    """The output layer: from hidden states to logits over the whole vocabulary.

    A layer that shares the weight of the embedding `tied` has the target `tied_target` instead of
    one of its own.
    """

    def __init__(
        self,
        build: Build,
        vocab_size: int,
        hidden_size: int,
        *,
        tied: VocabEmbedding | None,
        scale: float = 1.0,
        soft_cap: float | None = None,
        bias: bool = False,
        normalises: bool = False,
    ) -> None:
        """The output layer.

        scale, soft_cap  what happens to logits, as recording.Logits says
        normalises       whether each row of the weight is divided by its length when it is placed
        """
        self._normalises = normalises
        # Whole on every rank, and in the dtype of logits.
        shape, device = (vocab_size,), build.device
        self._bias = torch.empty(shape, device=device, dtype=torch.float32) if bias else None
        self._shape = (vocab_size, hidden_size)
        self._kernels = build.kernels
        groups = build.groups
        self._group = groups.attention if tied is not None else groups.head or groups.attention
        self._size = rows_per_rank(vocab_size, self._group)
        self._first = self._group.rank * self._size
        self._tied = tied
        self._scale = scale
        self._soft_cap = soft_cap
        self._linear = Linear(
            build,
            hidden_size,
            (self._size,),
            bias=False,
            makes_logits=True,
            tied=tied is not None,
        )
        self._build = build
        self._site = build.adapter_site(hidden_size, self._size)
        self._wholes = None if build.adapters is None else HeadSite(build.adapters)

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden [S, hidden] -> [S, vocab] in fp32, the same on every rank of the layer"""
        own = self._linear.packed.fp32(hidden)
        if self._wholes is not None and self._site is not None:
            self._wholes.replace(hidden, own)
            self._site.add_to_head(hidden, own)
        logits = self._group.all_gather(own)[:, : self._shape[0]]
        return finish_logits(self._kernels, logits, self._scale, self._soft_cap, self._bias)

    @property
    def num_ranks(self) -> int:
        """Over which the vocabulary is split."""
        return self._group.size

    def empty(self) -> Tensor:
        """The logits of no rows, which this rank has without the others."""
        return torch.empty(0, self.vocab_size, dtype=torch.float32, device=self._build.device)

    @property
    def vocab_size(self) -> int:
        return self._shape[0]

    @property
    def packed(self) -> PackedLinear:
        """This rank's rows, packed by the kernels."""
        return self._linear.packed

    def record(self, program: Program, x: Buffer) -> None:
        """Add the logits of x to a recorded step, as its result. RuntimeError before `pack`."""
        program.refuse_sum_over(self._group.size)
        program.add(
            Logits(
                x=x,
                layer=self._linear.packed,
                vocab_size=self._shape[0],
                scale=self._scale,
                soft_cap=self._soft_cap,
                bias=self._bias,
                additions=None if self._site is None else self._site.layer,
            )
        )

    def targets(self) -> dict[str, Target]:
        bias = {} if self._bias is None else {"bias": whole(self._bias)}
        if self._tied is not None:
            return bias
        linear, vocab_size = self._linear, self._shape[0]

        def put(rows: Tensor) -> None:
            if self._normalises:
                rows = F.normalize(rows.float(), dim=-1)
            linear.put(0, with_rows(rows, self._size))

        def put_blocks(rows: LinearPart) -> None:
            linear.put_blocks(0, rows.with_rows(self._size))

        num_own = own_rows(self._size, vocab_size, self._first)
        part = Slice.unless_whole(0, min(self._first, vocab_size), num_own, vocab_size)
        blocks = put_blocks if linear.takes_blocks and not self._normalises else None
        weight = Target(self._shape, put, blocks, part=part, is_beside=True)
        return {"weight": weight, **bias}

    def adapter_targets(self) -> dict[str, Target]:
        """What adapters may change, also if the weight is the embedding's: that stays as it is."""
        if self._site is None or self._wholes is None:
            return {}
        build, first, dtype = self._build, self._first, self._build.dtype

        def own_rows_of(weight: Tensor) -> Tensor:
            return with_rows(weight[first : first + self._size], self._size)

        def replacing(weight: Tensor) -> HeadWeight:
            if self._normalises:
                weight = F.normalize(weight.float(), dim=-1)
            return HeadWeight(
                own_rows_of(weight).to(dtype).contiguous(),
                lambda rows: build.kernels.pack_linear(rows, None, dtype),
                build.device,
            )

        adapter = AdapterTarget(site=self._site, shape=self._shape, outputs=own_rows_of)
        wholes = VocabTarget(site=self._wholes, shape=self._shape, whole=replacing)
        return {"weight": replace(unused(self._shape), adapter=adapter, vocab_adapter=wholes)}

    def tied_target(self) -> Target:
        """The target of the shared weight: it fills the embedding and this layer, and packs this.

        Raises RuntimeError if the layer is not tied."""
        if self._tied is None:
            raise RuntimeError("this output layer has a weight of its own")
        tied, linear = self._tied, self._linear
        target = tied.targets()["weight"]

        def put(rows: Tensor) -> None:
            target.put(rows)
            linear.share(tied.newest, None)
            linear.pack()

        def put_blocks(rows: LinearPart) -> None:
            assert target.put_blocks is not None
            target.put_blocks(rows)
            linear.share(tied.newest, rows.with_rows(self._size))
            linear.pack()

        return replace(target, put=put, put_blocks=put_blocks)

    def pack(self) -> None:
        self._linear.pack()

    def only(self, token_ids: Tensor) -> LMHead:
        """The output layer for these tokens alone, with a dense weight of its own, packed.

        Adapters do not change that one. RuntimeError before `pack`, and if several ranks share the
        vocabulary.

        token_ids  [tokens] int64"""
        if self._group.size > 1:
            raise RuntimeError("each rank has a part of the vocabulary only")
        size, bias = self._shape[1], self._bias
        found = LMHead(
            replace(self._build, scheme=DENSE, adapters=None),
            len(token_ids),
            size,
            tied=None,
            scale=self._scale,
            soft_cap=self._soft_cap,
            bias=bias is not None,
        )
        weight = found._linear.weight
        # Kernels lay a packed weight out as they like, but multiply by ones exactly.
        units = torch.eye(size, dtype=self._build.dtype, device=weight.device)
        for first in range(0, size, _COLUMNS_AT_ONCE):
            columns = slice(first, first + _COLUMNS_AT_ONCE)
            logits = self._linear.packed.fp32(units[columns])
            weight[:, columns] = logits.index_select(1, token_ids).t().to(weight.dtype)
        if bias is not None and found._bias is not None:
            found._bias.copy_(bias.index_select(0, token_ids))
        found.pack()
        return found


def rows_per_rank(vocab_size: int, group: Group) -> int:
    return -(-vocab_size // group.size)


def own_rows(size: int, vocab_size: int, first: int) -> int:
    """How many of a rank's rows first .. first + size are in the vocabulary."""
    return max(0, min(size, vocab_size - first))


def with_rows(rows: Tensor, size: int) -> Tensor:
    """The rows, and zeros after the vocabulary's last token until there are `size`."""
    return rows if rows.shape[0] == size else F.pad(rows, (0, 0, 0, size - rows.shape[0]))
