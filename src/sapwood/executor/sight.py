"""What a rank knows of the pictures, videos and sounds of prompts: vectors, places, positions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sapwood.executor.rows import RowTable
from sapwood.kernels.attention_batch import SeenBothWays
from sapwood.kernels.transfer import upload_one
from sapwood.layers.forward_batch import AxisPositions, InputEmbeds
from sapwood.models.vision.interface import Tower
from sapwood.schema.step import RowStart, ScheduledTokens, StepPlan


@dataclass(frozen=True, slots=True)
class Shown:
    """Some tokens in a row of a prompt that show a medium.

    start, length  in the prompt
    first          of the medium's vectors that stands there
    """

    digest: bytes
    start: int
    length: int
    first: int


@dataclass(frozen=True, slots=True)
class ShowingRow:
    """A row whose prompt shows something.

    positions  [3, tokens of the prompt]; None: each is a token's index
    """

    shown: tuple[Shown, ...]
    positions: NDArray[np.int64] | None


class Sight:
    """A tower, the vectors that it has made, and the rows that need them.

    The scheduler says what is encoded and what is forgotten; here nothing is counted.
    """

    def __init__(self, tower: Tower, *, hidden_size: int, device: torch.device) -> None:
        self._tower = tower
        self._hidden_size = hidden_size
        self._device = device
        self._axis_of_pair = tower.axis_of_pair
        self._attends_both_ways = tower.attends_both_ways
        self._vectors: dict[bytes, Tensor] = {}
        self._rows: dict[int, ShowingRow] = {}
        self._across: dict[int, bytes] = {}

    @property
    def has_rows(self) -> bool:
        return bool(self._rows)

    def follow(self, plan: StepPlan) -> float:
        """Forget and encode as the plan says. Returns the seconds that encoding took."""
        for digest in plan.forgets:
            del self._vectors[digest]
        if not plan.encodes:
            return 0.0
        start_s = time.perf_counter()
        for medium, vectors in zip(plan.encodes, self._tower.encode(plan.encodes), strict=True):
            self._vectors[medium.digest] = vectors.clone()
        return time.perf_counter() - start_s

    def start(self, start: RowStart, rows: RowTable) -> None:
        """A request takes its row, of which `rows` has heard."""
        self._rows.pop(start.row, None)
        self._across.pop(start.row, None)
        if not start.media:
            return
        if start.media[0].num_across:
            self._across[start.row] = start.media[0].digest
            return
        positions = self._tower.positions(start.num_prompt, start.media)
        if positions is not None:
            # What comes after the prompt has one position, behind all of the prompt's.
            rows.first_positions[start.row] += int(positions.max()) + 1 - start.num_prompt
        shown = []
        for medium in start.media:
            first = 0
            for at, length in medium.spans:
                shown.append(Shown(medium.digest, at, length, first))
                first += length
        self._rows[start.row] = ShowingRow(tuple(shown), positions)

    def positions(
        self, scheduled: Sequence[ScheduledTokens], found: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], AxisPositions | None]:
        """(the positions of a step's tokens, their three positions if these differ)

        found  [T]: positions as they would be if no prompt showed anything"""
        axes: NDArray[np.int64] | None = None
        at = 0
        for entry in scheduled:
            row = self._rows.get(entry.row)
            if row is not None and row.positions is not None:
                own = row.positions[:, entry.position : entry.position + entry.num_new]
                if own.shape[1]:
                    axes = np.tile(found, (3, 1)) if axes is None else axes
                    axes[:, at : at + own.shape[1]] = own
            at += entry.num_new
        if axes is None:
            return found, None
        if self._axis_of_pair is None or not (axes != axes[0]).any():
            return axes[0], None
        there = upload_one(axes.ravel(), np.int64, self._device).view(3, -1)
        return axes[0], AxisPositions(there, self._axis_of_pair)

    def both_ways(self, scheduled: Sequence[ScheduledTokens]) -> tuple[SeenBothWays, ...]:
        """The step's tokens of pictures, if the decoder's attention lets them see one another."""
        if not self._attends_both_ways:
            return ()
        found: list[SeenBothWays] = []
        at = 0
        for index, entry in enumerate(scheduled):
            row = self._rows.get(entry.row)
            for shown in () if row is None else row.shown:
                first = max(shown.start, entry.position)
                end = min(shown.start + shown.length, entry.end)
                if first < end:
                    start = at + first - entry.position
                    found.append(
                        SeenBothWays(
                            request=index, start=start, end=start + end - first, first=first
                        )
                    )
            at += entry.num_new
        return tuple(found)

    def across(self, scheduled: Sequence[ScheduledTokens]) -> tuple[Tensor | None, ...]:
        """By entry of a step: the vectors that its layers attend to across."""
        if not self._across:
            return ()
        digests = [self._across.get(entry.row) for entry in scheduled]
        return tuple(None if one is None else self._vectors[one] for one in digests)

    def embeds(
        self, scheduled: Sequence[ScheduledTokens], others: InputEmbeds | None
    ) -> InputEmbeds | None:
        """The vectors of a step's tokens, besides those that requests have brought themselves."""
        places: list[int] = []
        pieces: list[Tensor] = []
        at = 0
        for entry in scheduled:
            row = self._rows.get(entry.row)
            for shown in () if row is None else row.shown:
                begin = max(shown.start, entry.position)
                end = min(shown.start + shown.length, entry.end)
                if begin < end:
                    first = shown.first + begin - shown.start
                    pieces.append(self._vectors[shown.digest][first : first + end - begin])
                    places += range(at + begin - entry.position, at + end - entry.position)
            at += entry.num_new
        if not pieces:
            return others
        vectors = torch.cat(pieces)
        where = upload_one(places, np.int64, self._device)
        size = self._hidden_size
        own, *later = torch.split(vectors, size, dim=1)
        if others is None:
            return InputEmbeds(where, own, tuple(later))
        at_all = torch.cat((where, others.at))
        given = others.vectors.to(own.dtype)
        nothing = torch.zeros_like(given)
        return InputEmbeds(
            at_all, torch.cat((own, given)), tuple(torch.cat((one, nothing)) for one in later)
        )
