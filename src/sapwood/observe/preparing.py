"""Figures of preparing pictures and videos, which happens before a request reaches the engine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(slots=True)
class PreparingFigures:
    """
    num_prepared  media that were fetched, decoded and prepared
    num_refused   media that were refused meanwhile
    seconds       from a medium's turn to its end, added up
    num_waiting   requests whose media wait for their turn
    num_open      requests whose media are fetched and prepared
    """

    num_prepared: int = 0
    num_refused: int = 0
    seconds: float = 0.0
    num_waiting: int = 0
    num_open: int = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        self.num_waiting += 1
        try:
            yield
        finally:
            self.num_waiting -= 1

    @contextmanager
    def opened(self) -> Iterator[None]:
        self.num_open += 1
        try:
            yield
        finally:
            self.num_open -= 1

    @contextmanager
    def timed(self) -> Iterator[None]:
        """One medium; an exception means that it is refused, or that nobody waits any more."""
        start_s = time.monotonic()
        try:
            yield
        except Exception:
            self.num_refused += 1
            raise
        else:
            self.num_prepared += 1
        finally:
            self.seconds += time.monotonic() - start_s
