"""Structural tags: changes the schemas in them, and translates them to llguidance's syntax.

Formats: xgrammar's documentation of structural tags. Syntax: llguidance's of Lark grammars.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import llguidance

from sapwood.base.errors import InvalidRequest
from sapwood.executor.grammar.vocabulary import Vocabulary

_ANY_TEXT = r"/(.|\n)*/"


def with_parts(
    form: Any, schema: Callable[[Any], Any], regex: Callable[[str], str] = lambda text: text
) -> Any:
    """The format with `schema` applied to each JSON Schema in it, `regex` to each expression."""
    if isinstance(form, list):
        return [with_parts(part, schema, regex) for part in form]
    if not isinstance(form, Mapping):
        return form
    if form.get("type") == "json_schema":
        return {**form, "json_schema": schema(form.get("json_schema"))}
    if form.get("type") == "regex" and isinstance(form.get("pattern"), str):
        return {**form, "pattern": regex(form["pattern"])}
    return {key: with_parts(value, schema, regex) for key, value in form.items()}


def regex_body(text: str) -> str:
    """A regular expression as llguidance's syntax wants it between slashes.

    \\d, \\w and \\s are ASCII, as in the other backend."""
    return llguidance.regex_to_lark(text, use_ascii="dws").replace("\n", "\\n")


def to_lark(form: Mapping[str, Any], vocabulary: Vocabulary, json_options: str) -> str:
    """A format as a grammar of llguidance.

    form          its JSON Schemas are simplified already
    json_options  the value of x-guidance for the schemas
    Raises        InvalidRequest, naming the format's type, if llguidance has no such format
    """
    writer = _LarkWriter(vocabulary, json_options)
    start = writer.rule(form, is_last=True)
    return "\n".join(["%llguidance {}", f"start: {start}", *writer.lines])


class _LarkWriter:
    def __init__(self, vocabulary: Vocabulary, json_options: str) -> None:
        self.lines: list[str] = []
        self._vocabulary = vocabulary
        self._json_options = json_options
        self._num_names = 0

    def rule(self, form: Mapping[str, Any], *, is_last: bool = False) -> str:
        """An expression for the format; is_last: nothing comes after it."""
        kind = form.get("type")
        try:
            if kind in ("sequence", "any_text"):
                write = {"sequence": self._sequence, "any_text": self._any_text}[kind]
                return write(form, is_last)
            if kind == "triggered_tags":
                return self._triggered(form, is_last)
            if kind in _WRITERS:
                return _WRITERS[kind](self, form)
        except (KeyError, TypeError, AttributeError) as error:
            raise InvalidRequest(
                f"a structural tag's format {kind!r} is incomplete: {error}"
            ) from None
        raise InvalidRequest(
            f"a structural tag's format of type {kind!r} is not one that llguidance has; use "
            "--grammar-backend xgrammar"
        )

    def literal(self, text: str) -> str:
        """An expression for the text; the special tokens in it are matched as single tokens."""
        parts: list[str] = []
        plain = ""
        specials = [
            (self._vocabulary.tokens[token_id].decode("utf-8", "replace"), token_id)
            for token_id in self._vocabulary.special
        ]
        while text:
            found = max(
                ((name, token_id) for name, token_id in specials if name and text.startswith(name)),
                key=lambda pair: len(pair[0]),
                default=None,
            )
            if found is None:
                plain, text = plain + text[0], text[1:]
                continue
            parts += [json.dumps(plain, ensure_ascii=False)] if plain else []
            parts.append(f"<[{found[1]}]>")
            plain, text = "", text[len(found[0]) :]
        parts += [json.dumps(plain, ensure_ascii=False)] if plain else []
        return " ".join(parts) if parts else '""'

    def _name(self, prefix: str) -> str:
        self._num_names += 1
        return f"{prefix}_{self._num_names}"

    def _define(self, prefix: str, expression: str) -> str:
        name = self._name(prefix)
        self.lines.append(f"{name}: {expression}")
        return name

    def _schema(self, form: Mapping[str, Any]) -> str:
        if form.get("style", "json") != "json":
            raise InvalidRequest(
                f"a structural tag's style {form['style']!r} is not one that llguidance has; use "
                "--grammar-backend xgrammar"
            )
        schema = form["json_schema"]
        if isinstance(schema, bool):
            schema = {} if schema else {"not": {}}
        with_options = {"x-guidance": json.loads(self._json_options), **schema}
        return self._define("json", "%json " + json.dumps(with_options, ensure_ascii=False))

    def _regex(self, form: Mapping[str, Any]) -> str:
        return self._define("R", f"/{regex_body(form['pattern'])}/")

    def _const(self, form: Mapping[str, Any]) -> str:
        return self.literal(form["value"])

    def _or(self, form: Mapping[str, Any]) -> str:
        return self._define(
            "either", " | ".join(self.rule(element) for element in form["elements"])
        )

    def _sequence(self, form: Mapping[str, Any], is_last: bool) -> str:
        elements = form["elements"]
        last = len(elements) - 1
        parts = [
            self.rule(element, is_last=is_last and i == last) for i, element in enumerate(elements)
        ]
        return self._define("seq", " ".join(parts))

    def _repeated(self, form: Mapping[str, Any], times: str) -> str:
        return f"({self.rule(form['content'])}){times}"

    def _repeat(self, form: Mapping[str, Any]) -> str:
        most = "" if form["max"] == -1 else int(form["max"])
        return self._repeated(form, f"{{{int(form['min'])},{most}}}")

    def _any_text(self, form: Mapping[str, Any], is_last: bool) -> str:
        if not is_last or form.get("excludes"):
            raise InvalidRequest(
                "any_text of a structural tag must come last, or have a tag's end after it, and "
                "exclude nothing, for llguidance; use --grammar-backend xgrammar"
            )
        return self._define("TEXT", _ANY_TEXT)

    def _tag(self, form: Mapping[str, Any], begin: str | None = None) -> str:
        """begin: the rest of the tag's beginning after a trigger; None: the whole beginning."""
        head = self.literal(form["begin"] if begin is None else begin)
        content, end = form["content"], form["end"]
        if not isinstance(end, str):
            end = end[0] if isinstance(end, list) and len(end) == 1 else ""
            if not isinstance(end, str) or not end:
                raise InvalidRequest(
                    "a structural tag's end must be one string for llguidance; use "
                    "--grammar-backend xgrammar"
                )
        if content.get("type") == "any_text" and end:
            name = self._name("until")
            self.lines.append(f"{name}[lazy]: {_ANY_TEXT} {json.dumps(end, ensure_ascii=False)}")
            return self._define("tag", f"{head} {name}")
        return self._define("tag", f"{head} {self.rule(content)} {self.literal(end)}")

    def _separated(self, form: Mapping[str, Any]) -> str:
        any_tag = self._define("tags", " | ".join(self._tag(tag) for tag in form["tags"]))
        more = (
            ""
            if form.get("stop_after_first")
            else f" ({self.literal(form['separator'])} {any_tag})*"
        )
        all_tags = f"({any_tag}{more})"
        return all_tags if form.get("at_least_one") else f"{all_tags}?"

    def _triggered(self, form: Mapping[str, Any], is_last: bool) -> str:
        if not is_last or form.get("excludes"):
            raise InvalidRequest(
                "triggered_tags must come last, and exclude nothing, for llguidance; use "
                "--grammar-backend xgrammar"
            )
        text = self._define("TEXT", _ANY_TEXT)
        options: list[str] = []
        for trigger in form["triggers"]:
            tags = [tag for tag in form["tags"] if tag["begin"].startswith(trigger)]
            rests = [self._tag(tag, tag["begin"][len(trigger) :]) for tag in tags]
            special = self._vocabulary.special_named(trigger)
            if special is not None:
                head = self._define("trigger", f"{text} <[{special}]>")
            else:
                head = self._name("trigger")
                quoted = json.dumps(trigger, ensure_ascii=False)
                self.lines.append(f"{head}[lazy]: {text} {quoted}")
            options.append(f"{head} ({' | '.join(rests)})")
        once = self._define("triggered", " | ".join(options))
        if form.get("stop_after_first"):
            return once if form.get("at_least_one") else f"({once} | {text})"
        return f"{once}{'+' if form.get('at_least_one') else '*'} {text}"


_WRITERS: dict[str, Callable[[_LarkWriter, Mapping[str, Any]], str]] = {
    "const_string": _LarkWriter._const,
    "json_schema": _LarkWriter._schema,
    "regex": _LarkWriter._regex,
    "or": _LarkWriter._or,
    "optional": lambda writer, form: writer._repeated(form, "?"),
    "plus": lambda writer, form: writer._repeated(form, "+"),
    "star": lambda writer, form: writer._repeated(form, "*"),
    "repeat": _LarkWriter._repeat,
    "tag": _LarkWriter._tag,
    "tags_with_separator": _LarkWriter._separated,
}
