"""Pooling: from the hidden states of a text's tokens to one vector for the whole text."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.schema.pooling import Method


class Pooler:
    """Pools the hidden states of each running request, step by step.

    For a mean, the sums of all steps are added up; so prompts may be computed in chunks.
    """

    def __init__(
        self,
        method: Method,
        *,
        num_rows: int,
        hidden_size: int,
        device: torch.device,
        normalize: bool,
    ) -> None:
        """A pooler for at most `num_rows` requests at a time."""
        self._method = method
        self._normalize = normalize
        self._kept: Tensor | None = None
        if method != "last":
            self._kept = torch.zeros(num_rows, hidden_size, dtype=torch.float32, device=device)

    def start(self, row: int) -> None:
        """A new request takes that row."""
        if self._kept is not None:
            self._kept[row] = 0.0

    def pool(
        self,
        hidden: Tensor,
        *,
        rows: Tensor,
        lengths: Tensor,
        positions: Tensor,
        answering: Tensor,
        context_lens: Tensor,
    ) -> Tensor:
        """The vectors of the texts that end in this step: [A, hidden] fp32.

        hidden        [T, hidden]: hidden states of the step's tokens, request by request
        rows          [R] int64: each request's row
        lengths       [R]: each request's tokens in this step
        positions     [T] int64: index of each token in its text
        answering     [A] int64: indices of the requests whose text ends in this step
        context_lens  [R]: tokens of each request up to now
        """
        ends = lengths.cumsum(0)
        if self._kept is None:
            return hidden.index_select(0, ends[answering] - 1).float()
        row_of_token = rows.repeat_interleave(lengths)
        if self._method == "mean":
            self._kept.index_add_(0, row_of_token, hidden.float())
        else:
            first = (positions == 0).nonzero().view(-1)
            self._kept.index_copy_(0, row_of_token[first], hidden[first].float())
        kept = self._kept.index_select(0, rows[answering])
        if self._method == "mean":
            kept = kept / context_lens[answering, None]
        return kept

    def finish(self, vectors: Tensor) -> Tensor:
        """[A, hidden] -> [A, hidden], scaled to length 1 if the model's embeddings are."""
        return F.normalize(vectors, dim=-1) if self._normalize else vectors
