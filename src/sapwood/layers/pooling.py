"""From the hidden states of a text's tokens to the one vector that stands for the text."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.schema.pooling import Method


class Pooler:
    """Collects what each running request needs of its hidden states, step by step.

    A mean is the sum over all steps of a prompt; so prompts may be computed in chunks.
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
        """`num_rows`: requests that run together at most."""
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
        """The vectors of the texts that end in this step: [answering, hidden] fp32.

        hidden        [T, hidden]: of the step's tokens, request by request
        rows          [R] int64: each request's row; lengths: its tokens in this step
        positions     [T] int64: index of each token in its text
        answering     [A] int64: those of the R whose text ends in this step
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
        """[A, hidden] -> the same, scaled to length 1 if the model's vectors are."""
        return F.normalize(vectors, dim=-1) if self._normalize else vectors
