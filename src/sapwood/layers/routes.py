"""Keeps which experts a forward pass has chosen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor


class RouteLog:
    """Shared by the routers of a model. It costs nothing unless it is open."""

    def __init__(self) -> None:
        self._chosen: list[Tensor] | None = None

    @contextmanager
    def open(self) -> Iterator[None]:
        """While the `with` block runs, routers add what they choose; after it, nothing is kept."""
        self._chosen = []
        try:
            yield
        finally:
            self._chosen = None

    def add(self, chosen: Tensor) -> None:
        """chosen [T, k]: the experts of each token in the next layer that has some"""
        if self._chosen is not None:
            self._chosen.append(chosen)

    def take(self) -> list[Tensor]:
        """What was added since the log was opened, layer by layer; the log must be open."""
        assert self._chosen is not None, "the log is open"
        found, self._chosen = self._chosen, []
        return found
