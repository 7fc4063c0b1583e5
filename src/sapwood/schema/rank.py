"""What the scheduler and the ranks tell each other besides plans and results."""

from __future__ import annotations

import msgspec

from sapwood.schema.grammar import Grammar
from sapwood.schema.output import Finish


class CompileGrammar(msgspec.Struct, frozen=True, kw_only=True, tag="compile_grammar"):
    """Compile a grammar, or keep it if it is compiled, until it is released.

    id  names this order in its answer and its release; no two orders have the same
    """

    id: int
    grammar: Grammar


class ReleaseGrammar(msgspec.Struct, frozen=True, kw_only=True, tag="release_grammar"):
    """No open request needs the grammar of that order any more."""

    id: int


RankMessage = CompileGrammar | ReleaseGrammar


class GrammarAnswer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A rank's answer to an order: plans may have rows with the grammar from now on, or not.

    refusal  how requests that need the grammar end; None: it is ready
    """

    id: int
    rank: int
    refusal: Finish | None = None
