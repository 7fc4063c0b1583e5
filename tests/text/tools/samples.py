"""What models write around and inside calls, for every format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.text.tools.spelling import SPELLERS, WHOLE_ANSWERS, Call

TOOLS: dict[str, Any] = {
    "get_weather": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    },
    "search": {
        "type": "object",
        "properties": {
            "query": {"type": "string"},
            "limit": {"type": ["integer", "null"]},
            "exact": {"type": "boolean"},
            "weights": {"type": "array", "items": {"type": "number"}},
            "filter": {"$ref": "#/$defs/filter"},
            "ratio": {"anyOf": [{"type": "number"}, {"type": "null"}]},
            "order": {"enum": ["up", "down", 1]},
        },
        "$defs": {"filter": {"type": "object", "properties": {"site": {"type": "string"}}}},
    },
    "now": {"type": "object", "properties": {}},
    "write_file": {
        "type": "object",
        "properties": {"path": {"type": "string"}, "text": {"type": "string"}},
    },
}

PARIS: Call = ("get_weather", {"city": "Paris", "days": 3})
ROME: Call = ("get_weather", {"city": "Rome", "days": 1})
NOW: Call = ("now", {})
CALL_LISTS: dict[str, list[Call]] = {
    "one": [PARIS],
    "two of one tool": [PARIS, ROME],
    "three tools": [PARIS, NOW, ("search", {"query": "wood", "limit": 5})],
    "no arguments": [NOW],
    "nothing twice": [NOW, NOW],
    "nested": [("search", {"query": "a", "filter": {"site": "x.org", "tags": ["b", {"c": []}]}})],
    "types": [
        (
            "search",
            {"query": "12", "limit": None, "exact": True, "weights": [1, 2.5, -3e-2], "ratio": 0.5},
        )
    ],
    "null and enum": [("search", {"query": "null", "ratio": None, "order": 1, "exact": False})],
    "enum text": [("search", {"query": "true", "order": "down"})],
    "empty text": [("get_weather", {"city": ""})],
    "quotes": [("search", {"query": "she said \"no\", he said 'yes' \\ back/slash"})],
    "unicode": [("search", {"query": "Größe 東京 😀 é"})],
    "code": [
        ("write_file", {"path": "a.py", "text": 'def f(x):\n    return {"a": [x], "b": 1 < 2}\n\n'})
    ],
    "tags": [("write_file", {"path": "a.html", "text": "<b>bold</b> & </p> <tool> [x] {y}"})],
    "long": [("write_file", {"path": "b.txt", "text": "lorem ipsum dolor sit amet " * 8})],
    "spaces": [("search", {"query": "  two  spaces  "})],
}

TEXT_AROUND = {
    "text before": ("Let me look that up.\n", ""),
    "text after": ("", "\nThat is all."),
    "text on both sides": ("First: ", "\n\nand then some."),
    "text with tags": ("a < b, <br> and [1] {2} ", ""),
}


@dataclass(frozen=True)
class Sample:
    label: str
    text: str
    content: str
    calls: Sequence[Call]


def samples_of(name: str) -> list[Sample]:
    """At least 20 per format."""
    samples: list[Sample] = []
    for spell in SPELLERS[name]:
        samples += [
            Sample(f"{spell.__name__}: {label}", spell(calls), "", calls)
            for label, calls in CALL_LISTS.items()
        ]
        if spell in WHOLE_ANSWERS:
            continue
        for label, (before, after) in TEXT_AROUND.items():
            if name == "gpt-oss" and before:
                before = f"<|channel|>commentary<|message|>{before}<|end|><|start|>assistant"
            if name == "gpt-oss" and after:
                after = f"<|start|>assistant<|channel|>final<|message|>{after}"
            samples.append(
                Sample(
                    f"{spell.__name__}: {label}",
                    before + spell([PARIS, NOW]) + after,
                    _shown(name, *TEXT_AROUND[label]),
                    [PARIS, NOW],
                )
            )
    return samples


def _shown(name: str, before: str, after: str) -> str:
    """Space between two pieces of content stays, space beside calls alone goes."""
    if name == "gpt-oss":
        # Each piece is a message of its own.
        return before.rstrip() + after if after else before.rstrip()
    return before.rstrip() + (after if before else after.lstrip())
