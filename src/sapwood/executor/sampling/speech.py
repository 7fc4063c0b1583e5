"""Keeps a transcription to the rules that Whisper's decoder was trained for."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sapwood.kernels.transfer import upload_one
from sapwood.schema.speech import SpeechRules
from sapwood.schema.step import RowStart


@dataclass(slots=True)
class _Speech:
    """One transcription.

    last, before  the last token, and the one before it; None: there is none
    latest        the latest time so far; None: there is none
    """

    rules: SpeechRules
    suppressed: Tensor
    suppressed_first: Tensor
    last: int | None = None
    before: int | None = None
    latest: int | None = None

    def accept(self, token_id: int) -> None:
        self.before, self.last = self.last, token_id
        if self.rules.first_time is not None and token_id >= self.rules.first_time:
            self.latest = token_id


class SpeechTokens:
    """Forbids what a transcription cannot have.

    With times: the first token is a time; times come in pairs, the end of a piece and the start of
    the next; they never go back; and a time comes where all times together are likelier than any
    token of text."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rows: dict[int, _Speech] = {}
        self._with_times: set[int] = set()

    @property
    def stateful_rows(self) -> AbstractSet[int]:
        return self._with_times

    def start(self, start: RowStart) -> None:
        self._rows.pop(start.row, None)
        self._with_times.discard(start.row)
        rules = start.options.sampling.speech
        if rules is None:
            return
        self._rows[start.row] = _Speech(
            rules,
            suppressed=upload_one(list(rules.suppressed), np.int64, self._device),
            suppressed_first=upload_one(list(rules.suppressed_first), np.int64, self._device),
        )
        if rules.first_time is not None:
            self._with_times.add(start.row)
        # A retracted request has put out tokens already.
        self.accept([start.row] * len(start.output_ids), start.output_ids)

    def apply(self, logits: Tensor, rows: Sequence[int], num_outputs: Sequence[int]) -> None:
        if not self._rows:
            return
        for index, (row, num_output) in enumerate(zip(rows, num_outputs, strict=True)):
            one = self._rows.get(row)
            if one is None:
                continue
            own = logits[index]
            own.index_fill_(0, one.suppressed, -torch.inf)
            if not num_output:
                own.index_fill_(0, one.suppressed_first, -torch.inf)
            if one.rules.first_time is not None:
                _keep_times(own, one, one.rules.first_time)

    def accept(self, rows: Sequence[int], token_ids: Sequence[int]) -> None:
        if not self._with_times:
            return
        for row, token_id in zip(rows, token_ids, strict=True):
            if row in self._with_times:
                self._rows[row].accept(token_id)


def _keep_times(logits: Tensor, one: _Speech, first: int) -> None:
    """Change logits [vocab] in place."""
    if one.last is None:
        logits[:first] = -torch.inf
        if one.rules.latest_start is not None:
            logits[first + one.rules.latest_start + 1 :] = -torch.inf
        return
    is_time = one.last >= first
    was_time = one.before is None or one.before >= first
    if is_time and was_time:
        logits[first:] = -torch.inf
    elif is_time:
        logits[: one.rules.end] = -torch.inf
    if one.latest is not None:
        # A piece that has begun ends later than it began.
        logits[first : one.latest + (0 if is_time and not was_time else 1)] = -torch.inf
    times, text = logits[first:].logsumexp(0), logits[:first].max()
    # Chosen on the device, which would otherwise have to be waited for.
    logits[:first] += torch.where(times > text, -torch.inf, 0.0).to(logits.dtype)
