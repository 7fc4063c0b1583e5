"""llguidance: masks computed from derivatives of regular expressions and an Earley parser.

llguidance knows more of JSON Schema than xgrammar, and names the keywords that it refuses.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import llguidance
import numpy as np
from numpy.typing import NDArray

from sapwood.base.errors import InvalidRequest
from sapwood.executor.grammar import gbnf
from sapwood.executor.grammar.interface import DeadEnd, GrammarFailed, check_rollback
from sapwood.executor.grammar.json_schema import simplified
from sapwood.executor.grammar.structural_tags import regex_body, to_lark, with_parts
from sapwood.executor.grammar.vocabulary import Vocabulary
from sapwood.schema.grammar import Grammar

_SPECIAL_MARK = b"\xff"
"""How llguidance tells special tokens from text, which never has this byte."""
_BYTES_PER_CHARACTER = 200
"""An estimate of a grammar's memory per character of its text: llguidance doesn't tell."""


LARK_MARK = "%llguidance"
"""Begins a grammar in llguidance's own form of Lark, which guidance sends; it is never GBNF."""


class LLGuidanceMatcher:
    """llguidance's matcher knows no end-of-sequence token but its own, so ends are kept here."""

    def __init__(self, matcher: Any, ends: frozenset[int]) -> None:
        self._matcher = matcher
        self._ends = ends
        self._num_taken = 0
        self.has_ended = False

    def fill(self, masks: NDArray[np.int32], index: int) -> None:
        row_bytes = masks.strides[0]
        self._matcher.unsafe_compute_mask_ptr(masks.ctypes.data + index * row_bytes, row_bytes)
        if self._matcher.is_error():
            raise GrammarFailed(_first_line(self._matcher.get_error()))
        if self._matcher.is_accepting():
            # llguidance's mask allows one end-of-sequence token; a model may have several.
            for end in self._ends:
                masks[index, end // 32] |= np.int32(_BITS[end % 32])
        elif not masks[index].any():
            raise DeadEnd("the grammar allows no token of this model here")

    def accept(self, token_id: int) -> bool:
        if self.has_ended:
            return False
        if token_id in self._ends:
            is_taken = self.has_ended = bool(self._matcher.is_accepting())
        else:
            is_taken = bool(self._matcher.try_consume_tokens([token_id]) == 1)
            if self._matcher.is_error():
                raise GrammarFailed(_first_line(self._matcher.get_error()))
        self._num_taken += is_taken
        return is_taken

    def rollback(self, num_tokens: int) -> None:
        check_rollback(num_tokens, self._num_taken)
        self._num_taken -= num_tokens
        if num_tokens and self.has_ended:
            self.has_ended = False
            num_tokens -= 1
        self._matcher.rollback(num_tokens)


_BITS = [1 << bit if bit < 31 else -(1 << 31) for bit in range(32)]


class LLGuidanceCompiled:
    """first: a matcher at the grammar's beginning, which is copied for each output."""

    def __init__(self, first: Any, ends: frozenset[int], num_bytes: int) -> None:
        self._first = first
        self._ends = ends
        self.num_bytes = num_bytes

    def matcher(self) -> LLGuidanceMatcher:
        return LLGuidanceMatcher(self._first.deep_copy(), self._ends)


class _Tokens:
    """A vocabulary as llguidance takes it."""

    is_tokenizer_wrapper = True
    bos_token_id: int | None = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.eos_token_id = vocabulary.ends[0]
        self.special_token_ids: Sequence[int] = sorted(vocabulary.special | {*vocabulary.ends})
        marked = set(self.special_token_ids)
        self.tokens: Sequence[bytes] = [
            _SPECIAL_MARK + (token or b"<%d>" % token_id) if token_id in marked else token
            for token_id, token in enumerate(vocabulary.tokens)
        ]
        self._encode = vocabulary.encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))


class LLGuidanceBackend:
    """any_whitespace, whitespace_pattern: what may stand between the parts of a schema's JSON."""

    name = "llguidance"

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        any_whitespace: bool = True,
        whitespace_pattern: str | None = None,
    ) -> None:
        self._vocabulary = vocabulary
        self._ends = frozenset(vocabulary.ends)
        self._tokenizer = llguidance.LLTokenizer(
            _Tokens(vocabulary),  # type: ignore[arg-type]
            n_vocab=vocabulary.size,
            eos_token=list(vocabulary.ends),
        )
        options: dict[str, Any] = {"lenient": False, "whitespace_flexible": any_whitespace}
        if not any_whitespace:
            options |= {"item_separator": ", ", "key_separator": ": "}
        if whitespace_pattern is not None:
            options["whitespace_pattern"] = whitespace_pattern
        self._options = options

    def compile(self, grammar: Grammar) -> LLGuidanceCompiled:
        try:
            source = self._source(grammar)
        except InvalidRequest:
            raise
        except Exception as error:  # noqa: BLE001 - llguidance's converters raise errors of any type
            raise _refusal(grammar, str(error)) from None
        matcher = llguidance.LLMatcher(self._tokenizer, source, log_level=0)
        if matcher.is_error():
            raise _refusal(grammar, matcher.get_error())
        return LLGuidanceCompiled(matcher, self._ends, _BYTES_PER_CHARACTER * len(source))

    def _source(self, grammar: Grammar) -> str:
        if grammar.kind == "json_schema":
            schema: Any = simplified(grammar.text)
            if isinstance(schema, bool):
                schema = {} if schema else {"not": {}}
            return str(
                llguidance.LLMatcher.grammar_from_json_schema(
                    json.dumps(schema),
                    overrides=self._options,  # type: ignore[arg-type]
                )
            )
        if grammar.kind == "regex":
            return str(
                llguidance.LLMatcher.grammar_from_lark(f"start: /{regex_body(grammar.text)}/")
            )
        if grammar.kind == "ebnf":
            text = grammar.text
            lark = text if text.startswith(LARK_MARK) else gbnf.to_lark(text)
            return str(llguidance.LLMatcher.grammar_from_lark(lark))
        if grammar.kind == "choice":
            options = " | ".join(
                json.dumps(option, ensure_ascii=False) for option in json.loads(grammar.text)
            )
            return str(llguidance.LLMatcher.grammar_from_lark(f"start: {options}"))
        form = with_parts(
            json.loads(grammar.text)["format"], lambda schema: simplified(json.dumps(schema))
        )
        lark = to_lark(form, self._vocabulary, json.dumps(self._options))
        return str(llguidance.LLMatcher.grammar_from_lark(lark))


def _refusal(grammar: Grammar, message: str) -> InvalidRequest:
    return InvalidRequest(f"llguidance: {_first_line(message)}", param=grammar.kind)


def _first_line(message: str) -> str:
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    return " ".join(lines[:4])[:400] if lines else "no reason given"
