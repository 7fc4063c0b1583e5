"""xgrammar: fast masks from a pushdown automaton whose work on the vocabulary is done once.

Source: Dong et al. 2024, arXiv:2411.15100.
"""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import xgrammar
from numpy.typing import NDArray

from sapwood.base.errors import InvalidRequest
from sapwood.executor.grammar.interface import DeadEnd, check_rollback
from sapwood.executor.grammar.json_schema import for_xgrammar, simplified, why_inexact
from sapwood.executor.grammar.patterns import why_not_plain
from sapwood.executor.grammar.structural_tags import with_parts
from sapwood.executor.grammar.vocabulary import Vocabulary
from sapwood.schema.grammar import Grammar

_PLACE = re.compile(r"^\[[\d:]+\] \S+?: ?(Check failed: .*? is \w+: )?")


class XGrammarMatcher:
    def __init__(self, compiled: Any) -> None:
        self._matcher = xgrammar.GrammarMatcher(compiled)
        self._num_taken = 0

    @property
    def has_ended(self) -> bool:
        return bool(self._matcher.is_terminated())

    def fill(self, masks: NDArray[np.int32], index: int) -> None:
        if not self._matcher.fill_next_token_bitmask(masks, index):
            masks[index] = -1
        elif not masks[index].any():
            raise DeadEnd("the grammar allows no token of this model here")

    def accept(self, token_id: int) -> bool:
        # xgrammar writes a warning for each token after the end.
        is_taken = not self.has_ended and bool(self._matcher.accept_token(token_id))
        self._num_taken += is_taken
        return is_taken

    def rollback(self, num_tokens: int) -> None:
        check_rollback(num_tokens, self._num_taken)
        self._num_taken -= num_tokens
        self._matcher.rollback(num_tokens)


class XGrammarCompiled:
    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self.num_bytes = int(compiled.memory_size_bytes)

    def matcher(self) -> XGrammarMatcher:
        return XGrammarMatcher(self._compiled)


class XGrammarBackend:
    """any_whitespace: allow any whitespace between the parts of a schema's JSON; False: one line.
    whitespace_pattern: xgrammar has no such thing, so with a pattern JSON Schemas are refused."""

    name = "xgrammar"

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        any_whitespace: bool = True,
        whitespace_pattern: str | None = None,
    ) -> None:
        self._any_whitespace = any_whitespace
        self._has_pattern = whitespace_pattern is not None
        hidden = [
            b"" if token_id in vocabulary.special else token
            for token_id, token in enumerate(vocabulary.tokens)
        ]
        self._compiler = _compiler(hidden, vocabulary)
        # The marks of a structural tag may be special tokens, which are no text elsewhere.
        self._tag_compiler = _compiler(list(vocabulary.tokens), vocabulary)

    def compile(self, grammar: Grammar) -> XGrammarCompiled:
        try:
            return XGrammarCompiled(self._compile(grammar))
        except RuntimeError as error:
            first_line = _PLACE.sub("", str(error).strip()).partition("\n")[0]
            raise InvalidRequest(f"xgrammar: {first_line}", param=grammar.kind) from None

    def _compile(self, grammar: Grammar) -> Any:
        if grammar.kind == "json_schema":
            schema = for_xgrammar(self._exact(simplified(grammar.text)))
            return self._compiler.compile_json_schema(
                json.dumps(schema), any_whitespace=self._any_whitespace, strict_mode=True
            )
        if grammar.kind == "regex":
            return self._compiler.compile_regex(_checked_regex(grammar.text))
        if grammar.kind == "ebnf":
            return self._compiler.compile_grammar(grammar.text)
        if grammar.kind == "choice":
            options = " | ".join(json.dumps(option) for option in json.loads(grammar.text))
            return self._compiler.compile_grammar(f"root ::= {options}\n")
        tag = with_parts(json.loads(grammar.text), self._of_tag, _checked_regex)
        return self._tag_compiler.compile_structural_tag(json.dumps(tag))

    def _exact(self, schema: Any) -> Any:
        if self._has_pattern:
            raise InvalidRequest("xgrammar has no pattern for whitespace")
        reason = why_inexact(schema)
        if reason is not None:
            raise InvalidRequest(f"xgrammar cannot enforce {reason}", param="json_schema")
        return schema

    def _of_tag(self, schema: Any) -> Any:
        if not self._any_whitespace:
            raise InvalidRequest("xgrammar allows any whitespace in a structural tag's JSON")
        return for_xgrammar(self._exact(simplified(json.dumps(schema))))


def _compiler(tokens: list[bytes], vocabulary: Vocabulary) -> Any:
    info = xgrammar.TokenizerInfo(
        tokens,
        xgrammar.VocabType.RAW,
        vocab_size=vocabulary.size,
        stop_token_ids=list(vocabulary.ends),
    )
    # No cache here: the caller keeps compiled grammars, and compiles each only once.
    return xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)


def _checked_regex(text: str) -> str:
    """Anchors and lookarounds are skipped by xgrammar instead of obeyed."""
    reason = why_not_plain(text)
    if reason is not None and ("inside" in reason or "group" in reason or "anchor" in reason):
        is_harmless = '"' in reason or "\\n" in reason or "\\t" in reason
        if not is_harmless:
            raise InvalidRequest(f"xgrammar cannot enforce a regex with {reason}", param="regex")
    return text
