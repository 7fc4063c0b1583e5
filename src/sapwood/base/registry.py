"""Names to implementations: registered as "module:Name", loaded when first asked for."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar, cast

from sapwood.base.errors import ConfigError

T = TypeVar("T")


@cache
def plugins_of(group: str) -> Mapping[str, EntryPoint]:
    """The entry points of a group by name, as they were when a process first asked: looking through
    those of all packages takes 10 ms, and a step asks for kinds of devices. Nothing is imported."""
    return {point.name: point for point in entry_points(group=group)}


def plugin_names(group: str) -> list[str]:
    """The names of a group of entry points, sorted."""
    return sorted(plugins_of(group))


class Registry(Generic[T]):
    """A table from a name to "module:Name"; plugins add to it through an entry-point group.

    what         what is registered, in words, for the error ("architecture", "policy")
    targets      name -> "module:Name"
    entry_point  group whose entry points are consulted when a name is not in the table
    """

    def __init__(
        self, what: str, targets: dict[str, str], *, entry_point: str | None = None
    ) -> None:
        self._what = what
        self._targets = dict(targets)
        self._entry_point = entry_point

    def names(self) -> list[str]:
        return sorted({*self._targets, *self._plugins()})

    def get(self, name: str) -> T:
        """The implementation of that name; ConfigError lists the known ones if there is none."""
        target = self._targets.get(name)
        if target is not None:
            module, _, attribute = target.partition(":")
            return cast(T, getattr(import_module(module), attribute))
        plugins = self._plugins()
        if name in plugins:
            return cast(T, plugins[name].load())
        raise ConfigError(f"unknown {self._what} {name!r}; known: {', '.join(self.names())}")

    def _plugins(self) -> Mapping[str, EntryPoint]:
        return {} if self._entry_point is None else plugins_of(self._entry_point)
