"""Which regular expressions mean the same to every engine that meets them here.

A JSON Schema's pattern is matched by one engine and validated by another, and some engines skip
what they do not know. So a pattern is looked at before it is handed on.
"""

from __future__ import annotations

_CLASS_ESCAPES = frozenset("dDwWsS")
_LITERAL_ESCAPES = frozenset(".^$*+?()[]{}|-/_:;,!@#%&=<>~`' ")


def why_not_plain(pattern: str) -> str | None:
    """None if the pattern is made of literals, classes, groups, alternatives and repetition only,
    matches from its beginning to its end, and matches no character that JSON writes as an escape;
    else the first part of the pattern that is otherwise."""
    body = pattern[1:] if pattern.startswith("^") else pattern
    if body.endswith("$") and not _ends_escaped(body[:-1]):
        body = body[:-1]
    is_anchored = body != pattern
    depth, position = 0, 0
    while position < len(body):
        character = body[position]
        if character == "\\":
            following = body[position + 1 : position + 2]
            if following not in _CLASS_ESCAPES and following not in _LITERAL_ESCAPES:
                return f"the escape \\{following}"
            position += 1
        elif character == "[":
            end, problem = _class_end(body, position)
            if problem is not None:
                return problem
            position = end
        elif character in '^$"' or ord(character) < 0x20:
            return f"the character {character!r} inside"
        elif character == "(":
            if (
                body[position + 1 : position + 2] == "?"
                and body[position + 2 : position + 3] != ":"
            ):
                return f"the group {body[position : position + 4]!r}"
            depth += 1
        elif character == ")":
            depth -= 1
        elif character == "|" and depth == 0 and is_anchored:
            return "an anchor of one alternative only"
        position += 1
    return None


def _ends_escaped(text: str) -> bool:
    return (len(text) - len(text.rstrip("\\"))) % 2 == 1


def _class_end(body: str, start: int) -> tuple[int, str | None]:
    """(index of the class's closing bracket, the part of the class that is not plain or None)"""
    position = start + 1
    if body[position : position + 1] == "^":
        position += 1
    first = position
    while position < len(body):
        character = body[position]
        if character == "]" and position > first:
            return position, None
        if character == "\\":
            following = body[position + 1 : position + 2]
            if following not in _CLASS_ESCAPES and following not in _LITERAL_ESCAPES:
                return position, f"the escape \\{following} in a class"
            position += 1
        elif character in '["' or ord(character) < 0x20:
            return position, f"the character {character!r} in a class"
        position += 1
    return position, "a class that is not closed"
