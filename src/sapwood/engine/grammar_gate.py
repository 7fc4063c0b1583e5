"""Holds requests back until their grammars are compiled, without holding up others."""

from __future__ import annotations

from typing import Protocol

from sapwood.base.errors import SapwoodError
from sapwood.engine.request_state import RequestState
from sapwood.schema.grammar import Grammar
from sapwood.schema.output import Finish
from sapwood.schema.sampling import SamplingParams


class Grammars(Protocol):
    """Compiles each grammar once, beside the loop, and keeps those that open requests need."""

    def enter(self, grammar: Grammar) -> None:
        """A request that needs the grammar has come."""
        ...

    def leave(self, grammar: Grammar) -> None:
        """A request that needed the grammar has ended."""
        ...

    def is_ready(self, grammar: Grammar) -> bool:
        """Whether the grammar is compiled. Raises SapwoodError if it cannot be used."""
        ...


class GrammarGate:
    """grammars: compiles them; None: the gate refuses every request that has a grammar."""

    def __init__(self, grammars: Grammars | None) -> None:
        self._grammars = grammars
        self._held: dict[str, RequestState] = {}

    @property
    def num_held(self) -> int:
        """Requests that wait for their grammar."""
        return len(self._held)

    def why_refused(self, sampling: SamplingParams) -> str | None:
        if sampling.grammar is None or self._grammars is not None:
            return None
        return (
            f"this request's {sampling.grammar.kind} cannot be enforced, since the server does not "
            "have a grammar backend; leave it out, or start the server without --grammar-backend "
            "none"
        )

    def enter(self, state: RequestState) -> None:
        if state.options.sampling.grammar is not None and self._grammars is not None:
            self._grammars.enter(state.options.sampling.grammar)
            self._held[state.request_id] = state

    def leave(self, state: RequestState) -> None:
        """The request has ended, in whatever way."""
        if state.options.sampling.grammar is not None and self._grammars is not None:
            self._grammars.leave(state.options.sampling.grammar)
            self._held.pop(state.request_id, None)

    def holds(self, state: RequestState) -> bool:
        return state.request_id in self._held

    def release_ready(self) -> list[tuple[RequestState, Finish]]:
        """Hold the requests back no longer whose grammars are ready.

        Returns the requests whose grammars cannot be used, each with the `Finish` that it gets.
        """
        if not self._held or self._grammars is None:
            return []
        refused: list[tuple[RequestState, Finish]] = []
        for state in list(self._held.values()):
            grammar = state.options.sampling.grammar
            assert grammar is not None, "only requests with a grammar are held"
            try:
                is_ready = self._grammars.is_ready(grammar)
            except SapwoodError as error:
                finish = Finish(
                    kind="error", message=error.message, status=error.status, error_type=error.type
                )
                refused.append((state, finish))
                continue
            if is_ready:
                del self._held[state.request_id]
        return refused
