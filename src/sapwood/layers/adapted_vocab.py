"""Adapters of the layers with a row per token of the vocabulary: the embedding and the output
layer. An adapter adds to them, or brings a whole weight that takes the place of the model's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sapwood.kernels.packed import PackedLinear
from sapwood.layers.adapters import AdapterContext, Addition, Site


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabTarget:
    """What adapters may do to the embedding, or to the output layer as a whole.

    site      where
    shape     (vocabulary, hidden) of the checkpoint's tensor
    whole     from a weight of that shape to what puts it in the model's place on this rank
    low_rank  from PEFT's A [rank, vocab] and B [hidden, rank] times the scaling to what adds to
              the vectors of tokens; None: the layer is no embedding
    """

    site: Site
    shape: tuple[int, int]
    whole: Callable[[Tensor], Addition]
    low_rank: Callable[[Tensor, Tensor], Addition] | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EmbeddingAddition:
    """What an adapter does to the vectors of tokens.

    table  [vocab, rank]; the token's row times b is added. Without b [vocab, hidden]: the token's
           row takes the place of the model's
    b      [rank, hidden] or None
    """

    table: Tensor
    b: Tensor | None

    @property
    def num_bytes(self) -> int:
        return self.table.nbytes + (0 if self.b is None else self.b.nbytes)

    def to(self, device: torch.device) -> EmbeddingAddition:
        b = None if self.b is None else self.b.to(device, non_blocking=True)
        return EmbeddingAddition(table=self.table.to(device, non_blocking=True), b=b)


class EmbeddingSite:
    """An embedding that adapters change; a Site of EmbeddingAddition."""

    def __init__(
        self,
        context: AdapterContext,
        pack: Callable[[Tensor], PackedLinear],
        *,
        is_recorded: bool,
    ) -> None:
        """pack: a weight [hidden, rank] into a product whose rows do not depend on each other"""
        self.is_recorded = is_recorded
        self._context = context
        self._pack = pack
        self._additions: dict[int, EmbeddingAddition] = {}
        self._expands: dict[int, PackedLinear] = {}

    def place(self, slot: int, addition: EmbeddingAddition | None) -> None:
        self._additions.pop(slot, None)
        self._expands.pop(slot, None)
        if addition is not None:
            self._additions[slot] = addition
            if addition.b is not None:
                self._expands[slot] = self._pack(addition.b.t().contiguous())

    @property
    def is_changed(self) -> bool:
        """Whether an adapter of the step that is computed now changes vectors."""
        step = self._context.step
        return step is not None and any(slot in self._additions for slot in step.rows.slots)

    def change(self, token_ids: Tensor, vectors: Tensor) -> None:
        """Change the vectors [T, hidden] of these tokens [T], in place, by the step's adapters."""
        step = self._context.step
        if step is None:
            return
        for slot, rows in step.rows.each():
            addition = self._additions.get(slot)
            if addition is None:
                continue
            found = addition.table.index_select(0, token_ids.index_select(0, rows))
            if slot in self._expands:
                found = vectors.index_select(0, rows).float() + self._expands[slot].fp32(found)
            vectors.index_copy_(0, rows, found.to(vectors.dtype))


class HeadWeight:
    """A whole weight of the output layer, packed by the kernels where it is used."""

    def __init__(
        self, weight: Tensor, pack: Callable[[Tensor], PackedLinear], device: torch.device
    ) -> None:
        """The weight [this rank's outputs, hidden], on the host; `device` is where it is used."""
        self.num_bytes = weight.nbytes
        self._weight, self._pack = weight, pack
        self.packed: PackedLinear | None = None
        if weight.device == device:  # now, in the thread that loads, lest a step wait for it
            self.packed, self._weight = pack(weight), weight[:0]

    def to(self, device: torch.device) -> HeadWeight:
        if self.packed is not None:
            return self
        return HeadWeight(self._weight.to(device), self._pack, device)


class HeadSite:
    """An output layer in whose place adapters put others; a Site of HeadWeight."""

    is_recorded = False

    def __init__(self, context: AdapterContext) -> None:
        self._context = context
        self._weights: dict[int, PackedLinear] = {}

    def place(self, slot: int, addition: HeadWeight | None) -> None:
        self._weights.pop(slot, None)
        if addition is not None:
            assert addition.packed is not None, "the weight is where it is used"
            self._weights[slot] = addition.packed

    def replace(self, hidden: Tensor, logits: Tensor) -> None:
        """Compute anew the logits [S, outputs] of those rows of hidden [S, hidden] whose adapters
        have an output layer of their own; in place."""
        rows = self._context.head_rows
        if rows is None or not self._weights:
            return
        for slot, own in rows.each():
            weight = self._weights.get(slot)
            if weight is not None:
                logits.index_copy_(0, own, weight.fp32(hidden.index_select(0, own)))
