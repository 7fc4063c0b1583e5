"""Changes to the logits of single requests before a token is chosen.

Each processor keeps its own state per row and costs nothing for rows that do not ask for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sapwood.schema.step import RowStart


class LogitsProcessor(Protocol):
    def start(self, start: RowStart) -> None:
        """Another request takes that row."""
        ...

    def apply(self, logits: Tensor, rows: Sequence[int], num_outputs: Sequence[int]) -> None:
        """Change logits [S, vocab] in place; entry i belongs to rows[i], which has put out
        num_outputs[i] tokens before."""
        ...

    def accept(self, rows: Sequence[int], token_ids: Sequence[int]) -> None:
        """These tokens were chosen."""
        ...


class LogitBias:
    """Adds a number to the logits of chosen tokens."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._bias: dict[int, tuple[Tensor, Tensor]] = {}

    def start(self, start: RowStart) -> None:
        self._bias.pop(start.row, None)
        bias = start.sampling.logit_bias
        if bias:
            ids = torch.tensor(list(bias), dtype=torch.int64, device=self._device)
            values = torch.tensor(list(bias.values()), device=self._device)
            self._bias[start.row] = (ids, values)

    def apply(self, logits: Tensor, rows: Sequence[int], num_outputs: Sequence[int]) -> None:
        if not self._bias:
            return
        for index, row in enumerate(rows):
            if row in self._bias:
                ids, values = self._bias[row]
                logits[index, ids] += values.to(logits.dtype)

    def accept(self, rows: Sequence[int], token_ids: Sequence[int]) -> None:
        return None


class MinNewTokens:
    """Forbids the tokens that would end a request before it has min_new_tokens."""

    def __init__(self, eos_token_ids: Iterable[int], device: torch.device) -> None:
        self._eos = frozenset(eos_token_ids)
        self._device = device
        self._ends: dict[int, tuple[int, Tensor]] = {}

    def start(self, start: RowStart) -> None:
        self._ends.pop(start.row, None)
        sampling = start.sampling
        if sampling.min_new_tokens:
            eos = frozenset() if sampling.ignore_eos else self._eos
            ids = sorted(eos | set(sampling.stop_token_ids))
            ends = torch.tensor(ids, dtype=torch.int64, device=self._device)
            self._ends[start.row] = (sampling.min_new_tokens, ends)

    def apply(self, logits: Tensor, rows: Sequence[int], num_outputs: Sequence[int]) -> None:
        if not self._ends:
            return
        for index, (row, num_output) in enumerate(zip(rows, num_outputs, strict=True)):
            if row in self._ends and num_output < self._ends[row][0]:
                logits[index, self._ends[row][1]] = -torch.inf

    def accept(self, rows: Sequence[int], token_ids: Sequence[int]) -> None:
        return None


@dataclass(slots=True)
class _Seen:
    """Tokens of one request: counts [vocab] over the output; in_request [vocab] over all."""

    frequency: float
    presence: float
    repetition: float
    counts: Tensor
    in_request: Tensor


class Penalties:
    """Frequency and presence penalties over the output; repetition penalty over the prompt too.

    Source of the repetition penalty: Keskar et al. 2019, arXiv:1909.05858.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._seen: dict[int, _Seen] = {}

    def start(self, start: RowStart) -> None:
        self._seen.pop(start.row, None)
        sampling = start.sampling
        additive = sampling.frequency_penalty or sampling.presence_penalty
        if not additive and sampling.repetition_penalty == 1.0:
            return
        output = torch.tensor(start.output_ids, dtype=torch.int64, device=self._device)
        prompt = torch.tensor(start.prompt_ids, dtype=torch.int64, device=self._device)
        counts = torch.bincount(output, minlength=self._vocab_size).float()
        in_request = counts > 0
        in_request[prompt] = True
        self._seen[start.row] = _Seen(
            sampling.frequency_penalty,
            sampling.presence_penalty,
            sampling.repetition_penalty,
            counts,
            in_request,
        )

    def apply(self, logits: Tensor, rows: Sequence[int], num_outputs: Sequence[int]) -> None:
        if not self._seen:
            return
        for index, row in enumerate(rows):
            seen = self._seen.get(row)
            if seen is None:
                continue
            one = logits[index]
            if seen.repetition != 1.0:
                scaled = torch.where(one > 0, one / seen.repetition, one * seen.repetition)
                one.copy_(torch.where(seen.in_request, scaled, one))
            one -= seen.frequency * seen.counts + seen.presence * (seen.counts > 0)

    def accept(self, rows: Sequence[int], token_ids: Sequence[int]) -> None:
        if not self._seen:
            return
        for row, token_id in zip(rows, token_ids, strict=True):
            seen = self._seen.get(row)
            if seen is not None:
                seen.counts[token_id] += 1
                seen.in_request[token_id] = True
