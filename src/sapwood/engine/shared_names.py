"""What namespaces are called where several engines meet: in a storage that they share."""

from __future__ import annotations

from collections.abc import Callable

from sapwood.engine.request_state import adapter_in
from sapwood.memory.namespace import MEDIUM, Branch, Namespace


class SharedNames:
    """An engine's own names of adapters say nothing to others; what these contain does."""

    def __init__(self, content_of: Callable[[str], str | None], *, has_lengths: bool) -> None:
        """content_of   a digest of what an adapter contains; None: it is not known (any more)
        has_lengths  as `adapter_in`"""
        self._content_of = content_of
        self._has_lengths = has_lengths

    def root(self, name: str) -> str | None:
        """Of the requests with that `text_namespace`; None: others must not take it for theirs."""
        adapter = adapter_in(name, has_lengths=self._has_lengths)
        if not adapter:
            return name
        content = self._content_of(adapter)
        if content is None:
            return None
        before, _, key = name.partition("\0")
        length = before.partition(" ")[0] + " " if self._has_lengths else ""
        return f"{length}{content}\0{key}"

    def branch(self, name: str) -> str | None:
        """The same of a branch: what a picture shows means the same everywhere."""
        return name if name.startswith(MEDIUM) else self._content_of(name)

    def of(self, namespace: Namespace) -> Namespace | None:
        if not isinstance(namespace, Branch):
            return self.root(namespace)
        base, name = self.of(namespace.base), self.branch(namespace.name)
        if base is None or name is None:
            return None
        return Branch(base=base, first_token=namespace.first_token, name=name)
