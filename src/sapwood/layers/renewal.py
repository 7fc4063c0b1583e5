"""New weights of a model that computes: put beside the old ones, until all change at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Renewed(Protocol):
    """A layer that has numbers beside those that it computes with."""

    def pack(self) -> None:
        """Make the new numbers ready, once all are put."""
        ...

    def change(self) -> object:
        """Compute with the new numbers. Returns what held the old ones."""
        ...

    def forget(self) -> None:
        """Drop the new numbers."""
        ...


class Renewal:
    """Which layers of a model have new numbers beside those that they compute with.

    While it `is_open`, a layer of this model may be filled by one thread while another computes.
    Where a device has captured addresses of weights, these must be refilled in place: layers then
    keep new numbers as the checkpoint has them, and pack them when they change.
    """

    def __init__(self) -> None:
        self.is_open = False
        self.in_place = False
        """Whether weights stay at their addresses."""
        self._layers: dict[int, Renewed] = {}

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Layers that are filled meanwhile go on with their old numbers. If it ends with an error,
        the new ones are dropped."""
        self.is_open = True
        try:
            yield
            for layer in self._layers.values():
                layer.pack()
        except BaseException:
            self.forget()
            raise
        finally:
            self.is_open = False

    def note(self, layer: Renewed) -> None:
        self._layers[id(layer)] = layer

    def change(self) -> list[object]:
        """Have all noted layers compute with their new numbers. Returns what held the old ones:
        memory that takes time to give back."""
        layers, self._layers = self._layers, {}
        return [layer.change() for layer in layers.values()]

    def forget(self) -> None:
        layers, self._layers = self._layers, {}
        for layer in layers.values():
            layer.forget()
