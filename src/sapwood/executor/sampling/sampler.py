"""Chooses one token per row of logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sapwood.executor.grammar.masks import GrammarMasks
from sapwood.executor.rows import RowTable
from sapwood.executor.sampling.acceptance import AcceptThresholds
from sapwood.executor.sampling.processors import LogitsProcessor
from sapwood.executor.sampling.random_numbers import acceptance_numbers, uniforms
from sapwood.kernels.sampling_settings import SamplingSettings
from sapwood.kernels.transfer import upload_one
from sapwood.schema.sampling import SamplingParams
from sapwood.schema.step import RowStart


class SamplingOps(Protocol):
    """The ops that choose tokens from logits: those of `Kernels`, or a capture of them."""

    def argmax(self, logits: Tensor) -> Tensor: ...

    def sample(self, logits: Tensor, settings: SamplingSettings) -> Tensor: ...


class Sampler:
    """Applies the processors, then chooses a token per row, independently of all other rows."""

    def __init__(
        self,
        rows: RowTable,
        processors: Sequence[LogitsProcessor],
        ops: SamplingOps,
        failures: dict[int, str] | None = None,
        grammars: GrammarMasks | None = None,
        thresholds: AcceptThresholds | None = None,
    ) -> None:
        """A sampler.

        failures  row -> why its request cannot go on; the processors write here
        grammars  applied after all processors, so that none can allow a forbidden token again
        thresholds  by which requests that sample take guesses; None: guesses change no token
        """
        self._thresholds = thresholds
        self._grammars = grammars
        self._failures = {} if failures is None else failures
        self._rows = rows
        self._ops = ops
        self._processors = processors

    @property
    def takes_guesses(self) -> bool:
        """Whether `sample` wants to know the guesses."""
        return self._thresholds is not None

    def start(self, start: RowStart) -> None:
        self._failures.pop(start.row, None)
        for processor in self._processors:
            processor.start(start)
        if self._grammars is not None:
            self._grammars.start(start)

    def end(self, row: int) -> None:
        """The row's request has left: drop the state of its grammar."""
        if self._grammars is not None:
            self._grammars.end(row)

    def jump(self, rows: Sequence[int]) -> dict[int, list[int]]:
        """Row -> tokens that must follow the token just sampled; they count as put out now."""
        jumps = {} if self._grammars is None else self._grammars.jump(rows)
        for row, token_ids in jumps.items():
            for processor in self._processors:
                for token_id in token_ids:
                    processor.accept([row], [token_id])
        return jumps

    def has_failed(self, row: int) -> bool:
        """Whether the row has failed since the last `take_failures`."""
        return row in self._failures

    def take_failures(self) -> dict[int, str]:
        """Row -> why its request cannot go on, for the rows that failed since the last call."""
        if not self._failures:
            return {}
        taken = dict(self._failures)
        self._failures.clear()
        return taken

    def take_pauses(self) -> dict[int, float]:
        """Row -> seconds during which it shall not step, as `GrammarMasks` tells."""
        return {} if self._grammars is None else self._grammars.take_pauses()

    def sample(
        self,
        logits: Tensor,
        rows: Sequence[int],
        num_outputs: Sequence[int],
        guesses: Sequence[Sequence[int]] = (),
    ) -> Tensor:
        """logits [S, vocab], may be overwritten -> token ids [S] int64, on the logits' device.

        The tokens of stateful rows must be accepted before these rows are sampled again.

        rows         row of each entry
        num_outputs  output tokens of each request so far, which number the random numbers
        guesses      of the token of each entry; none at all where nothing is guessed
        """
        for processor in self._processors:
            processor.apply(logits, rows, num_outputs)
        if self._grammars is not None:
            self._grammars.apply(logits, rows)
        taken = self._take_guesses(logits, rows, num_outputs, guesses)
        params = [self._rows.sampling[row] for row in rows]
        random = [index for index, setting in enumerate(params) if not setting.is_greedy]
        if len(random) == len(params):
            chosen = self._ops.sample(logits, self._settings(rows, params, num_outputs))
        else:
            chosen = self._ops.argmax(logits)
            if random:
                settings = self._settings(
                    [rows[index] for index in random],
                    [params[index] for index in random],
                    [num_outputs[index] for index in random],
                )
                at = upload_one(random, np.int64, logits.device)
                chosen.index_copy_(0, at, self._ops.sample(logits.index_select(0, at), settings))
        if taken is not None:
            chosen.index_copy_(0, *taken)
        return chosen

    def _take_guesses(
        self,
        logits: Tensor,
        rows: Sequence[int],
        num_outputs: Sequence[int],
        guesses: Sequence[Sequence[int]],
    ) -> tuple[Tensor, Tensor] | None:
        """(entries, their tokens) where the thresholds decide; None: nowhere."""
        if self._thresholds is None:
            return None
        params = [self._rows.sampling[row] for row in rows]
        some = [at for at, tokens in enumerate(guesses) if tokens and not params[at].is_greedy]
        if not some:
            return None
        settings = self._settings(
            [rows[at] for at in some],
            [params[at] for at in some],
            [num_outputs[at] for at in some],
            numbers=acceptance_numbers,
        )
        places = upload_one(some, np.int64, logits.device)
        guessed = [guesses[at] for at in some]
        return places, self._thresholds.choose(logits.index_select(0, places), guessed, settings)

    def stateful_rows(self, rows: Sequence[int]) -> set[int]:
        """The rows among `rows` whose tokens must be accepted."""
        wanted, found = set(rows), set[int]()
        for processor in self._processors:
            if processor.stateful_rows:
                found |= wanted & processor.stateful_rows
        if self._grammars is not None and self._grammars.stateful_rows:
            found |= wanted & self._grammars.stateful_rows
        return found

    def accept(self, rows: Sequence[int], token_ids: Sequence[int]) -> None:
        """Take note of the tokens that were chosen for these rows. Called in the order of steps."""
        for processor in self._processors:
            processor.accept(rows, token_ids)
        if self._grammars is not None:
            self._grammars.accept(rows, token_ids)

    def _settings(
        self,
        rows: Sequence[int],
        params: Sequence[SamplingParams],
        num_outputs: Sequence[int],
        numbers: Callable[[NDArray[np.uint64], NDArray[np.uint64]], NDArray[np.float64]] = uniforms,
    ) -> SamplingSettings:
        counters = np.array(num_outputs, dtype=np.uint64)
        return SamplingSettings(
            temperature=[setting.temperature for setting in params],
            top_k=[setting.top_k for setting in params],
            top_p=[setting.top_p for setting in params],
            min_p=[setting.min_p for setting in params],
            numbers=numbers(self._rows.seeds[list(rows)], counters).tolist(),
        )
