"""Changes to the logits of single requests before a token is chosen.

Each processor keeps its own state per row and costs nothing for rows that do not ask for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sapwood.kernels.interface import Kernels
from sapwood.kernels.transfer import upload, upload_one
from sapwood.schema.sampling import SamplingParams
from sapwood.schema.step import RowStart

NOBODY: AbstractSet[int] = frozenset()
_FIRST_CAPACITY = 64


class LogitsProcessor(Protocol):
    @property
    def stateful_rows(self) -> AbstractSet[int]:
        """Rows whose next `apply` depends on earlier tokens; only their tokens must be accepted."""
        ...

    def start(self, start: RowStart) -> None:
        """Another request takes the row."""
        ...

    def apply(self, logits: Tensor, rows: Sequence[int], num_outputs: Sequence[int]) -> None:
        """Change logits [S, vocab] in place.

        Entry i belongs to rows[i], whose request has put out num_outputs[i] tokens before.
        """
        ...

    def accept(self, rows: Sequence[int], token_ids: Sequence[int]) -> None:
        """Take note of the tokens that were chosen for the rows."""
        ...


class LogitBias:
    """Adds a number to the logits of chosen tokens."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._bias: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def stateful_rows(self) -> AbstractSet[int]:
        return NOBODY

    def start(self, start: RowStart) -> None:
        self._bias.pop(start.row, None)
        bias = start.options.sampling.logit_bias
        if bias:
            ids = upload_one(list(bias), np.int64, self._device)
            values = upload_one(list(bias.values()), np.float32, self._device)
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

    @property
    def stateful_rows(self) -> AbstractSet[int]:
        return NOBODY

    def start(self, start: RowStart) -> None:
        self._ends.pop(start.row, None)
        sampling = start.options.sampling
        if sampling.min_new_tokens:
            eos = frozenset() if sampling.ignore_eos else self._eos
            ids = sorted(eos | set(sampling.stop_token_ids))
            ends = upload_one(ids, np.int64, self._device)
            self._ends[start.row] = (sampling.min_new_tokens, ends)

    def apply(self, logits: Tensor, rows: Sequence[int], num_outputs: Sequence[int]) -> None:
        if not self._ends:
            return
        for index, (row, num_output) in enumerate(zip(rows, num_outputs, strict=True)):
            if row in self._ends and num_output < self._ends[row][0]:
                logits[index].index_fill_(0, self._ends[row][1], -torch.inf)

    def accept(self, rows: Sequence[int], token_ids: Sequence[int]) -> None:
        return None


class AllowedTokens:
    """Forbids all tokens but those that the request lists.

    Comes after `MinNewTokens`: a request that lists nothing but tokens that would end it too early
    gets these, since one must be chosen.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._allowed: dict[int, Tensor] = {}

    @property
    def stateful_rows(self) -> AbstractSet[int]:
        return NOBODY

    def start(self, start: RowStart) -> None:
        self._allowed.pop(start.row, None)
        ids = sorted(set(start.options.sampling.allowed_token_ids))
        if ids:
            self._allowed[start.row] = upload_one(ids, np.int64, self._device)

    def apply(self, logits: Tensor, rows: Sequence[int], num_outputs: Sequence[int]) -> None:
        if not self._allowed:
            return
        for index, row in enumerate(rows):
            if row in self._allowed:
                ids = self._allowed[row]
                kept = logits[index].index_select(0, ids)
                # Chosen on the device, which would otherwise have to be waited for.
                kept = torch.where(kept.isneginf().all(), 0.0, kept)
                logits[index] = -torch.inf
                logits[index].index_copy_(0, ids, kept)

    def accept(self, rows: Sequence[int], token_ids: Sequence[int]) -> None:
        return None


class _Seen:
    """The distinct tokens of one request that get a penalty.

    Only the logits of these tokens are read: a vocabulary has 150,000, a request a few hundred.

    ids     [capacity] int64, of which the first `size` are in use
    counts  [capacity] fp32: how often each token is in the output; 0: only in the prompt
    """

    def __init__(self, sampling: SamplingParams, device: torch.device) -> None:
        self.frequency = sampling.frequency_penalty
        self.presence = sampling.presence_penalty
        self.repetition = sampling.repetition_penalty
        self._place: dict[int, int] = {}
        self._ids = torch.zeros(_FIRST_CAPACITY, dtype=torch.int64, device=device)
        self._counts = torch.zeros(_FIRST_CAPACITY, device=device)

    def add(self, token_ids: Sequence[int], count: int) -> None:
        """Add tokens.

        count  1 for tokens of the output, 0 for tokens of the prompt
        """
        place = self._place
        places = [place.setdefault(token_id, len(place)) for token_id in token_ids]
        while len(place) > len(self._ids):
            self._ids = torch.cat((self._ids, torch.zeros_like(self._ids)))
            self._counts = torch.cat((self._counts, torch.zeros_like(self._counts)))
        at, ids = upload(
            [np.array(places, dtype=np.int64), np.array(token_ids, dtype=np.int64)],
            self._ids.device,
        )
        self._ids[at] = ids
        if count:
            self._counts.index_add_(0, at, torch.full_like(at, count, dtype=torch.float32))

    def penalise(self, logits: Tensor, kernels: Kernels) -> None:
        """Change logits [vocab] in place."""
        kernels.penalise(
            logits,
            self._ids[: len(self._place)],
            self._counts[: len(self._place)],
            repetition=self.repetition,
            frequency=self.frequency,
            presence=self.presence,
        )


class _LastSeen:
    """The distinct tokens of one request that get a penalty, if only its last tokens do.

    A step changes one place of the arrays for the token that comes, and one for the token that
    leaves the window, however long that is.

    ids     [capacity] int64, of which as many are in use as there are distinct tokens
    counts  [capacity] fp32: how often each token is in the window's output
    """

    def __init__(self, sampling: SamplingParams, device: torch.device) -> None:
        self._sampling = sampling
        self._device = device
        # (token id, 1 for a token of the output or 0 for one of the prompt), the latest last
        self._tokens: deque[tuple[int, int]] = deque()
        self._occurrences: dict[int, int] = {}
        self._place: dict[int, int] = {}
        self._ids = np.zeros(_FIRST_CAPACITY, dtype=np.int64)
        self._counts = np.zeros(_FIRST_CAPACITY, dtype=np.float32)

    def add(self, token_ids: Sequence[int], count: int) -> None:
        """Add tokens, as `_Seen.add` does; the oldest ones leave the window."""
        window = self._sampling.penalty_window
        # A prompt may be far longer than the window.
        for token_id in token_ids[-window:]:
            self._enter(token_id, count)
            if len(self._tokens) > window:
                self._leave()

    def _enter(self, token_id: int, count: int) -> None:
        self._tokens.append((token_id, count))
        self._occurrences[token_id] = self._occurrences.get(token_id, 0) + 1
        place = self._place.setdefault(token_id, len(self._place))
        if place == len(self._ids):
            self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
            self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
        if self._occurrences[token_id] == 1:
            self._ids[place], self._counts[place] = token_id, 0.0
        self._counts[place] += count

    def _leave(self) -> None:
        token_id, count = self._tokens.popleft()
        place = self._place[token_id]
        self._counts[place] -= count
        self._occurrences[token_id] -= 1
        if self._occurrences[token_id]:
            return
        # The last token in the arrays takes the free place.
        last = len(self._place) - 1
        last_id = int(self._ids[last])
        self._ids[place], self._counts[place] = last_id, self._counts[last]
        self._place[last_id] = place
        del self._occurrences[token_id], self._place[token_id]

    def penalise(self, logits: Tensor, kernels: Kernels) -> None:
        """Change logits [vocab] in place."""
        size = len(self._place)
        ids, counts = upload([self._ids[:size], self._counts[:size]], self._device)
        kernels.penalise(
            logits,
            ids,
            counts,
            repetition=self._sampling.repetition_penalty,
            frequency=self._sampling.frequency_penalty,
            presence=self._sampling.presence_penalty,
        )


class Penalties:
    """Frequency and presence penalties over the output; repetition penalty over the prompt too.

    With a penalty_window they look no farther back than that.
    """

    def __init__(self, device: torch.device, kernels: Kernels) -> None:
        self._device = device
        self._kernels = kernels
        self._seen: dict[int, _Seen | _LastSeen] = {}

    @property
    def stateful_rows(self) -> AbstractSet[int]:
        return self._seen.keys()

    def start(self, start: RowStart) -> None:
        self._seen.pop(start.row, None)
        sampling = start.options.sampling
        additive = sampling.frequency_penalty or sampling.presence_penalty
        if sampling.penalty_window == 0 or (not additive and sampling.repetition_penalty == 1.0):
            return
        kind = _Seen if sampling.penalty_window < 0 else _LastSeen
        seen = self._seen[start.row] = kind(sampling, self._device)
        if sampling.repetition_penalty != 1.0:
            seen.add(start.prompt_ids, 0)
        seen.add(start.output_ids, 1)

    def apply(self, logits: Tensor, rows: Sequence[int], num_outputs: Sequence[int]) -> None:
        if not self._seen:
            return
        for index, row in enumerate(rows):
            if row in self._seen:
                self._seen[row].penalise(logits[index], self._kernels)

    def accept(self, rows: Sequence[int], token_ids: Sequence[int]) -> None:
        if not self._seen:
            return
        for row, token_id in zip(rows, token_ids, strict=True):
            seen = self._seen.get(row)
            if seen is not None:
                seen.add((token_id,), 1)
