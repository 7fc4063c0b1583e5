"""Holds requests back until all ranks have compiled their grammars, without holding up others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from sapwood.engine.request_state import RequestState
from sapwood.schema.output import Finish
from sapwood.schema.rank import CompileGrammar, GrammarAnswer, RankMessage, ReleaseGrammar
from sapwood.schema.sampling import SamplingParams


class GrammarRanks(Protocol):
    """The ranks, each of which compiles grammars for itself, beside its steps."""

    @property
    def num_ranks(self) -> int: ...

    def send(self, message: RankMessage) -> None:
        """Send a message to every rank; messages arrive in their order. Does not wait."""
        ...

    def answers(self) -> Sequence[GrammarAnswer]:
        """The answers that have come since the last call. Does not wait."""
        ...


@dataclass(slots=True, eq=False)
class _Ordered:
    """A grammar that open requests need.

    missing    ranks that have not answered
    num_users  open requests that need the grammar
    held       those of them that wait until no rank is missing, by request id
    """

    id: int
    missing: set[int]
    num_users: int = 0
    held: dict[str, RequestState] = field(default_factory=dict)


class GrammarGate:
    """ranks: compile grammars; None: the gate refuses every request that has a grammar."""

    def __init__(self, ranks: GrammarRanks | None) -> None:
        self._ranks = ranks
        self._ordered: dict[tuple[str, str], _Ordered] = {}
        self._by_id: dict[int, _Ordered] = {}
        self._num_orders = 0
        self._held: set[str] = set()

    @property
    def num_held(self) -> int:
        """Requests that wait for their grammar."""
        return len(self._held)

    def why_refused(self, sampling: SamplingParams) -> str | None:
        if sampling.grammar is None or self._ranks is not None:
            return None
        return (
            f"this request's {sampling.grammar.kind} cannot be enforced, since the server does not "
            "have a grammar backend; leave it out, or start the server without --grammar-backend "
            "none"
        )

    def enter(self, state: RequestState) -> None:
        grammar = state.options.sampling.grammar
        if grammar is None or self._ranks is None:
            return
        ordered = self._ordered.get(grammar.key)
        if ordered is None:
            ordered = _Ordered(self._num_orders, set(range(self._ranks.num_ranks)))
            self._num_orders += 1
            self._ordered[grammar.key] = self._by_id[ordered.id] = ordered
            self._ranks.send(CompileGrammar(id=ordered.id, grammar=grammar))
        ordered.num_users += 1
        if ordered.missing:
            ordered.held[state.request_id] = state
            self._held.add(state.request_id)

    def leave(self, state: RequestState) -> None:
        """The request has ended, in whatever way."""
        grammar = state.options.sampling.grammar
        if grammar is None or self._ranks is None:
            return
        ordered = self._ordered[grammar.key]
        ordered.num_users -= 1
        ordered.held.pop(state.request_id, None)
        self._held.discard(state.request_id)
        if not ordered.num_users:
            del self._ordered[grammar.key], self._by_id[ordered.id]
            self._ranks.send(ReleaseGrammar(id=ordered.id))

    def holds(self, state: RequestState) -> bool:
        return state.request_id in self._held

    def release_ready(self) -> list[tuple[RequestState, Finish]]:
        """Hold the requests back no longer whose grammars are ready on all ranks.

        Returns the requests whose grammars some rank refuses, each with the `Finish` that it gets;
        the caller ends them at once.
        """
        refused: list[tuple[RequestState, Finish]] = []
        for answer in () if self._ranks is None else self._ranks.answers():
            # All requests that needed the grammar may have left before this answer came.
            ordered = self._by_id.get(answer.id)
            if ordered is None:
                continue
            if answer.refusal is not None:
                refused += [(state, answer.refusal) for state in ordered.held.values()]
                ordered.held.clear()
                continue
            ordered.missing.discard(answer.rank)
            if not ordered.missing:
                self._held -= ordered.held.keys()
                ordered.held.clear()
        return refused
