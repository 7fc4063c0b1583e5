"""Which grammars may force an output that never ends.

What a grammar leaves no choice about is put out without being sampled. A rule that refers to itself
may force text without an end (`root ::= "ab" root`), for which a backend would search for ever. So
nothing is put out at once for a grammar whose rules refer to themselves; its tokens are sampled one
by one, and max_tokens ends them.
"""

from __future__ import annotations

import re

from sapwood.schema.grammar import Grammar

_LITERALS = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\n]*')
_RULE = re.compile(r"([\w.-]+)\s*::=")
_NAME = re.compile(r"[\w.-]+")
_REFERENCES = ('"$ref"', '"$dynamicRef"', '"$recursiveRef"', '"grammar"')
"""Keys of a schema, or of a structural tag, whose values may lead back to where they stand."""


def may_repeat_itself(grammar: Grammar) -> bool:
    """Whether a part of the grammar may contain itself; True where that is not known."""
    if grammar.kind == "ebnf":
        return _has_cycle(_references(grammar.text))
    if grammar.kind in ("json_schema", "structural_tag"):
        return any(key in grammar.text for key in _REFERENCES)
    return False


def _references(text: str) -> dict[str, set[str]]:
    """Rule -> the names in it. Takes time linear in the text."""
    parts = _RULE.split(_LITERALS.sub(" ", text))
    found: dict[str, set[str]] = {}
    for name, body in zip(parts[1::2], parts[2::2], strict=True):
        found.setdefault(name, set()).update(_NAME.findall(body))
    return found


def _has_cycle(references: dict[str, set[str]]) -> bool:
    """Whether rules remain after all those are taken away that refer to no remaining rule."""
    users: dict[str, list[str]] = {name: [] for name in references}
    num_open = dict.fromkeys(references, 0)
    for name, used in references.items():
        for other in used & references.keys():
            users[other].append(name)
            num_open[name] += 1
    settled = [name for name, count in num_open.items() if count == 0]
    for name in settled:
        for user in users[name]:
            num_open[user] -= 1
            if num_open[user] == 0:
                settled.append(user)
    return len(settled) < len(references)
