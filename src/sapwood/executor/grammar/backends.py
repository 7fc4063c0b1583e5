"""The grammar backends by name, and which of them is asked first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sapwood.base.errors import InvalidRequest
from sapwood.executor.grammar.interface import CompiledGrammar, GrammarBackend
from sapwood.executor.grammar.vocabulary import Vocabulary
from sapwood.schema.config.grammar import GrammarConfig
from sapwood.schema.grammar import Grammar

ASKED = {
    "auto": ("llguidance", "xgrammar"),
    "xgrammar": ("xgrammar", "llguidance"),
    "llguidance": ("llguidance",),
}
"""--grammar-backend -> the backends that are asked for a grammar, one after the other. llguidance
takes about a millisecond for whatever it can enforce; xgrammar walks through the vocabulary first,
for a second with repeats such as `[a-z]{10,200}`, and importing it takes seconds."""


def make_one(name: str, config: GrammarConfig, vocabulary: Vocabulary) -> GrammarBackend:
    """The backend of that name. Libraries are imported only here, since that takes time."""
    any_whitespace = not config.constrained_json_disable_any_whitespace
    pattern = config.constrained_json_whitespace_pattern
    if name == "llguidance":
        from sapwood.executor.grammar.llguidance_backend import LLGuidanceBackend

        return LLGuidanceBackend(
            vocabulary, any_whitespace=any_whitespace, whitespace_pattern=pattern
        )
    from sapwood.executor.grammar.xgrammar_backend import XGrammarBackend

    return XGrammarBackend(vocabulary, any_whitespace=any_whitespace, whitespace_pattern=pattern)


def cannot_be_enforced(grammar: Grammar, reasons: Sequence[str]) -> InvalidRequest:
    """The refusal of a grammar by all backends, each of which gives its reason."""
    # The last reason comes first; equal reasons are given once.
    distinct = list(dict.fromkeys(reversed(reasons)))
    return InvalidRequest(
        f"the {grammar.kind} of this request cannot be enforced: {'; '.join(distinct)}",
        param=grammar.kind,
    )


class FirstThatCan:
    """Asks the backends in turn; the first that can enforce a grammar compiles it.

    makers  name -> makes the backend, when it is first asked
    """

    def __init__(self, makers: dict[str, Callable[[], GrammarBackend]]) -> None:
        self._makers = makers
        self._made: dict[str, GrammarBackend] = {}
        self.name = next(iter(makers))

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        reasons: list[str] = []
        for name, make in self._makers.items():
            if name not in self._made:
                self._made[name] = make()
            try:
                return self._made[name].compile(grammar)
            except InvalidRequest as error:
                reasons.append(error.message)
        raise cannot_be_enforced(grammar, reasons)


def make_backend(config: GrammarConfig, vocabulary: Vocabulary) -> FirstThatCan:
    """The backends that the configuration asks, as one."""

    def maker(name: str) -> Callable[[], GrammarBackend]:
        return lambda: make_one(name, config, vocabulary)

    return FirstThatCan({name: maker(name) for name in ASKED[config.grammar_backend]})
