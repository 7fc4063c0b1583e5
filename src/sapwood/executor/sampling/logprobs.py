"""Log probabilities of sampled tokens and of prompts, for the rows that want them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sapwood.kernels.transfer import Download, download, upload_one
from sapwood.schema.logprobs import LEAST_LOGPROB, LogprobOptions, TokenLogprobs
from sapwood.schema.step import EntryLogprobs, RowStart, ScheduledTokens

PIECE_BYTES = 64 * 2**20
"""Bytes of a prompt's logits that are held at a time: 111 rows with a vocabulary of 150,000."""

LogitsOf = Callable[[Tensor, int, int], Tensor]
"""(hidden [n, hidden], row of the request, position of the first) -> [n, vocab]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """The log probabilities that one row wants; it has the prompt only if those are wanted."""

    options: LogprobOptions
    token_ids: Tensor | None
    prompt_ids: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RawLogits:
    """Some entries' logits as the model computed them, kept before processors change them.

    indices  the entries' indices among the rows that are sampled
    at       the same indices, on the device
    logits   [len(indices), vocab]
    """

    indices: list[int]
    at: Tensor
    logits: Tensor


@dataclass(frozen=True, slots=True)
class Measured:
    """Log probabilities on their way to the host, as the fields of TokenLogprobs."""

    pieces: Sequence[Mapping[str, Download]]

    def tell(self) -> TokenLogprobs:
        """Wait for the log probabilities, and return them."""
        return TokenLogprobs.joined(
            [
                TokenLogprobs(**{name: _packed(tensor.wait()) for name, tensor in piece.items()})
                for piece in self.pieces
            ]
        )


class LogprobRecorder:
    """Records log probabilities for the rows that want some, at no cost for the others."""

    def __init__(
        self,
        device: torch.device,
        *,
        piece_bytes: int = PIECE_BYTES,
        download: Callable[[Tensor], Download] = download,
    ) -> None:
        self._device = device
        self._download = download
        self._piece_bytes = piece_bytes
        self._wanted: dict[int, _Wanted] = {}

    def start(self, start: RowStart) -> None:
        """Another request takes the row."""
        self._wanted.pop(start.row, None)
        options = start.options.logprobs
        if options is None:
            return
        wants_prompt = options.prompt_start is not None
        self._wanted[start.row] = _Wanted(
            options=options,
            token_ids=self._ids(options.token_ids) if options.token_ids else None,
            prompt_ids=self._ids(start.prompt_ids) if wants_prompt else None,
        )

    def scores(self, scheduled: Sequence[ScheduledTokens]) -> bool:
        """Whether this step must score prompt tokens."""
        return bool(self._wanted) and any(entry.num_scored for entry in scheduled)

    def keep(self, logits: Tensor, rows: Sequence[int]) -> RawLogits | None:
        """Copies of the logits [S, vocab] of the rows that want log probabilities."""
        if not self._wanted:
            return None
        indices = [index for index, row in enumerate(rows) if row in self._wanted]
        if not indices:
            return None
        at = upload_one(indices, np.int64, logits.device)
        return RawLogits(indices=indices, at=at, logits=logits.index_select(0, at))

    def of_output(
        self, kept: RawLogits, rows: Sequence[int], chosen: Tensor
    ) -> dict[int, Measured]:
        """Log probabilities of the tokens in chosen [S], by index in `rows`."""
        found: dict[int, Measured] = {}
        targets = chosen.index_select(0, kept.at)
        for place, index in enumerate(kept.indices):
            at = slice(place, place + 1)
            wanted = self._wanted[rows[index]]
            found[index] = Measured([self._measure(kept.logits[at], targets[at], wanted)])
        return found

    def of_spans(
        self,
        kept: RawLogits,
        rows: Sequence[int],
        entries: Sequence[ScheduledTokens],
        chosen: Sequence[Sequence[int]],
    ) -> dict[int, Measured]:
        """Log probabilities of the tokens that each entry brought, by index in `entries`.

        rows    row of each place that was sampled; an entry with drafts has several
        chosen  tokens of each entry: of its first places
        """
        tokens = [0] * len(rows)
        owners: list[int | None] = [None] * len(rows)
        first = 0
        for index, (entry, brought) in enumerate(zip(entries, chosen, strict=True)):
            tokens[first : first + len(brought)] = brought
            owners[first : first + len(brought)] = [index] * len(brought)
            first += len(entry.logits_for)
        pieces: dict[int, list[Mapping[str, Download]]] = {}
        for place, measured in self.of_output(kept, rows, self._ids(tokens)).items():
            owner = owners[place]
            if owner is not None:
                pieces.setdefault(owner, []).extend(measured.pieces)
        return {index: Measured(parts) for index, parts in pieces.items()}

    def of_prompts(
        self,
        scheduled: Sequence[ScheduledTokens],
        hidden: Tensor,
        logits_of: LogitsOf,
    ) -> dict[int, Measured]:
        """Log probabilities of the tokens that follow scored ones, by index in `scheduled`.

        hidden     [T, hidden]: hidden states of the step's tokens, after the last norm
        logits_of  called with few tokens at a time, so that a long prompt's logits never exist all
                   at once
        """
        found: dict[int, Measured] = {}
        begin = 0
        for index, entry in enumerate(scheduled):
            wanted = self._wanted.get(entry.row)
            if entry.num_scored and wanted is not None and wanted.prompt_ids is not None:
                # The successor of a chunk's last token is in the prompt, not in the chunk.
                after = wanted.prompt_ids[entry.first_scored + 1 :][: entry.num_scored]
                first = begin + entry.first_scored - entry.position
                rows = hidden[first : first + entry.num_scored]
                position = entry.first_scored
                found[index] = self._in_pieces(rows, after, entry.row, position, logits_of)
            begin += entry.num_new
        return found

    def _in_pieces(
        self,
        hidden: Tensor,
        targets: Tensor,
        row: int,
        position: int,
        logits_of: LogitsOf,
    ) -> Measured:
        """Apply `logits_of` to pieces; the first row's logits show how many rows make a piece."""
        wanted = self._wanted[row]
        logits = logits_of(hidden[:1], row, position)
        found = [self._measure(logits, targets[:1], wanted)]
        size = max(1, self._piece_bytes // (logits.element_size() * logits.shape[-1]))
        pieces = zip(torch.split(hidden[1:], size), torch.split(targets[1:], size), strict=True)
        found += [
            self._measure(logits_of(piece, row, position + 1 + index * size), after, wanted)
            for index, (piece, after) in enumerate(pieces)
            if len(piece)
        ]
        return Measured(found)

    def _measure(self, logits: Tensor, targets: Tensor, wanted: _Wanted) -> dict[str, Download]:
        """logits [n, vocab], targets [n] -> wanted log probabilities, by TokenLogprobs' names."""
        logits = logits.float()
        total = torch.logsumexp(logits, dim=-1, keepdim=True)
        found = {"tokens": logits.gather(-1, targets[:, None]) - total}
        num_top = min(wanted.options.num_top, logits.shape[-1])
        if num_top:
            values, found["top_ids"] = logits.topk(num_top, dim=-1)
            found["top"] = values - total
        if wanted.token_ids is not None:
            found["chosen"] = logits.index_select(-1, wanted.token_ids) - total
        return {name: self._download(tensor) for name, tensor in found.items()}

    def _ids(self, token_ids: Sequence[int]) -> Tensor:
        return upload_one(token_ids, np.int64, self._device)


def by_entry(
    sampling: Sequence[int],
    outputs: Mapping[int, TokenLogprobs],
    prompts: Mapping[int, TokenLogprobs],
) -> dict[int, EntryLogprobs]:
    """The log probabilities of outputs and prompts together, by index in `scheduled`.

    sampling  indices in `scheduled` of the entries that sample
    """
    of_output = {sampling[index]: found for index, found in outputs.items()}
    return {
        index: EntryLogprobs(output=of_output.get(index), prompt=prompts.get(index))
        for index in sorted({*of_output, *prompts})
    }


def _packed(values: Tensor) -> bytes:
    """values on the host: fp32, or integers as int32; little endian."""
    if values.is_floating_point():
        return values.clamp(min=LEAST_LOGPROB).numpy().astype("<f4").tobytes()
    return values.numpy().astype("<i4").tobytes()
