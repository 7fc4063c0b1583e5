"""GBNF, the form of EBNF that llama.cpp and xgrammar read, as a Lark grammar for llguidance.

llguidance's lexer is greedy: a terminal takes as much text as it can, so that `/[a-z]+/ "b"` never
takes "aab". Here every terminal is a single character, and all else is left to the parser, so that
the Lark grammar has exactly the language of the GBNF.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

DEEPEST_GROUP = 100
_ANY_CHARACTER = "/(?s:.)/"
_TOKEN = re.compile(
    r"""(?P<blank>(?:\s|\#[^\n]*)+)
      | (?P<name>[A-Za-z_][\w.-]*)
      | (?P<defines>::=)
      | (?P<literal>"(?:[^"\\]|\\.)*")
      | (?P<characters>\[(?:[^\]\\]|\\.)+\])
      | (?P<repeat>[*+?]|\{\s*\d+\s*(?:,\s*(?:\d+\s*)?)?\})
      | (?P<mark>[|().])""",
    re.VERBOSE | re.DOTALL,
)
_CHARACTER = re.compile(
    r"""\\(?:x(?P<x>[0-9a-fA-F]{2})|u(?P<u>[0-9a-fA-F]{4})|U(?P<U>[0-9a-fA-F]{8})|(?P<known>.))
      | (?P<plain>.)""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPED = {"n": "\n", "r": "\r", "t": "\t"} | {one: one for one in "\\\"'[]^-/?"}


class NotGbnf(ValueError):
    """A text is no GBNF; the message says where, and what was expected."""


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    position: int


def to_lark(text: str) -> str:
    """The Lark grammar of a GBNF grammar, whose first rule `root` becomes `start`.

    Raises NotGbnf."""
    return _Translation(text).lark()


class _Translation:
    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = _tokens(text)
        self._next = 0
        self._numbers: dict[str, int] = {}
        """The rules by name, in the order in which they are met: their names in Lark."""
        self._referred: dict[str, _Token] = {}

    def lark(self) -> str:
        rules: dict[str, str] = {}
        while self._peek().kind != "end":
            name = self._take("name", "the name of a rule")
            self._take("defines", "::=")
            if name.text in rules:
                raise self._error(name, f"the rule {name.text!r} is defined twice")
            rules[name.text] = self._alternatives(depth=0)
        for referred, token in self._referred.items():
            if referred not in rules:
                raise self._error(token, f"the rule {referred!r} is not defined")
        if "root" not in rules:
            raise NotGbnf("there is no rule 'root', with which a grammar begins")
        lines = [f"{self._rule(rule)}: {body}" for rule, body in rules.items()]
        return "\n".join([f"start: {self._rule('root')}", *lines, ""])

    def _alternatives(self, *, depth: int) -> str:
        options = [self._sequence(depth)]
        while self._peek().text == "|" and self._peek().kind == "mark":
            self._next += 1
            options.append(self._sequence(depth))
        return " | ".join(options)

    def _sequence(self, depth: int) -> str:
        items: list[str] = []
        while True:
            item = self._item(depth)
            if item is None:
                return " ".join(items) or '""'
            while self._peek().kind == "repeat":
                item = f"({item}){_repeat(self._peek().text)}"
                self._next += 1
            items.append(item)

    def _item(self, depth: int) -> str | None:
        """The next item in Lark; None, and nothing is taken, where the sequence ends."""
        token = self._peek()
        begins_rule = token.kind == "name" and self._peek(1).kind == "defines"
        if token.kind == "end" or begins_rule or (token.kind == "mark" and token.text in "|)"):
            return None
        self._next += 1
        if token.kind == "name":
            self._referred.setdefault(token.text, token)
            return self._rule(token.text)
        if token.kind == "literal":
            characters = [self._one(token, found) for found in _characters(token)]
            return " ".join(json.dumps(one) for one in characters) or '""'
        if token.kind == "characters":
            return self._class(token)
        if token.text == ".":
            return _ANY_CHARACTER
        if token.text != "(":
            raise self._error(token, f"{token.text!r} cannot stand here")
        if depth == DEEPEST_GROUP:
            raise self._error(token, f"groups are nested more than {DEEPEST_GROUP} deep")
        group = self._alternatives(depth=depth + 1)
        closing = self._take("mark", "')'")
        if closing.text != ")":
            raise self._error(closing, f"expected ')', not {closing.text!r}")
        return f"({group})"

    def _class(self, token: _Token) -> str:
        """A set of characters as a regular expression of a single character."""
        found = _characters(token)
        is_negated = found[0]["plain"] == "^"
        found = found[is_negated:]
        ranges = []
        while found:
            first = last = self._one(token, found.pop(0))
            if len(found) > 1 and found[0]["plain"] == "-":
                found.pop(0)
                last = self._one(token, found.pop(0))
            if last < first:
                raise self._error(token, f"a range ends before it begins: {token.text}")
            ranges.append(rf"\x{{{ord(first):x}}}-\x{{{ord(last):x}}}")
        if not ranges:
            raise self._error(token, "a set without characters")
        return f"/[{'^' if is_negated else ''}{''.join(ranges)}]/"

    def _one(self, token: _Token, found: re.Match[str]) -> str:
        if found["plain"]:
            return found["plain"]
        if found["known"]:
            if found["known"] not in _ESCAPED:
                raise self._error(token, f"unknown escape {found[0]} in {token.text}")
            return _ESCAPED[found["known"]]
        code = int(found["x"] or found["u"] or found["U"], 16)
        if code > 0x10FFFF or 0xD800 <= code <= 0xDFFF:
            raise self._error(token, f"{found[0]} is no character")
        return chr(code)

    def _rule(self, name: str) -> str:
        return f"rule_{self._numbers.setdefault(name, len(self._numbers))}"

    def _peek(self, ahead: int = 0) -> _Token:
        return self._tokens[min(self._next + ahead, len(self._tokens) - 1)]

    def _take(self, kind: str, expected: str) -> _Token:
        token = self._peek()
        if token.kind != kind:
            raise self._error(token, f"expected {expected}, not {token.text or 'the end'!r}")
        self._next += 1
        return token

    def _error(self, token: _Token, message: str) -> NotGbnf:
        line = self._text.count("\n", 0, token.position) + 1
        return NotGbnf(f"line {line}: {message}")


def _tokens(text: str) -> list[_Token]:
    tokens = []
    position = 0
    while position < len(text):
        found = _TOKEN.match(text, position)
        if found is None:
            line = text.count("\n", 0, position) + 1
            raise NotGbnf(f"line {line}: {text[position : position + 20]!r} is no part of GBNF")
        kind = found.lastgroup or ""
        if kind != "blank":
            tokens.append(_Token(kind, found[0], position))
        position = found.end()
    return [*tokens, _Token("end", "", len(text))]


def _characters(token: _Token) -> list[re.Match[str]]:
    """The characters between a literal's quotes, or between a set's brackets."""
    return list(_CHARACTER.finditer(token.text, 1, len(token.text) - 1))


def _repeat(text: str) -> str:
    """A repetition in Lark, which knows {n,m} but not {n}."""
    if text[0] != "{":
        return text
    least, comma, most = "".join(text[1:-1].split()).partition(",")
    return f"{{{least},{most if comma else least}}}"
