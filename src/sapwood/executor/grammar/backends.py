"""The grammar backends by name."""

from __future__ import annotations

from collections.abc import Sequence

from sapwood.base.errors import InvalidRequest
from sapwood.executor.grammar.interface import CompiledGrammar, GrammarBackend
from sapwood.executor.grammar.vocabulary import Vocabulary
from sapwood.schema.config.grammar import GrammarConfig
from sapwood.schema.grammar import Grammar


class FirstThatCan:
    """Asks the backends in turn; the first that can enforce a grammar compiles it."""

    def __init__(self, backends: Sequence[GrammarBackend]) -> None:
        self._backends = backends
        self.name = backends[0].name

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        reasons: list[str] = []
        for backend in self._backends:
            try:
                return backend.compile(grammar)
            except InvalidRequest as error:
                reasons.append(error.message)
        # The last backend knows most, so its reason comes first; equal reasons are given once.
        distinct = list(dict.fromkeys(reversed(reasons)))
        raise InvalidRequest(
            f"the {grammar.kind} of this request cannot be enforced: {'; '.join(distinct)}",
            param=grammar.kind,
        )


def make_backend(config: GrammarConfig, vocabulary: Vocabulary) -> GrammarBackend:
    """Imports the libraries of the backends only here, since that takes a second."""
    any_whitespace = not config.constrained_json_disable_any_whitespace
    pattern = config.constrained_json_whitespace_pattern
    from sapwood.executor.grammar.llguidance_backend import LLGuidanceBackend

    general = LLGuidanceBackend(
        vocabulary, any_whitespace=any_whitespace, whitespace_pattern=pattern
    )
    if config.grammar_backend == "llguidance":
        return FirstThatCan([general])
    from sapwood.executor.grammar.xgrammar_backend import XGrammarBackend

    fast = XGrammarBackend(vocabulary, any_whitespace=any_whitespace, whitespace_pattern=pattern)
    return FirstThatCan([fast, general])
