"""Random JSON Schemas, regular expressions and EBNF grammars that can be satisfied."""

from __future__ import annotations

import random
from typing import Any

_NAMES = ["name", "id", "tags", "größe", "a b", 'q"uote', "kind", "items", "x/y", "n"]
_PATTERNS = [
    "^[A-Z][a-z]{1,8}$",
    "^\\d{3}-\\d{4}$",
    "^(red|green|blue)$",
    "^[a-f0-9]{4,8}$",
    "^[^aeiou]{2,5}$",
    "ab+c?",
    "^\\w+@\\w+\\.com$",
    "^a|b$",
    "^[\\w .-]{1,12}$",
    '^"?x\\\\y$',
]
_FORMATS = ["date", "date-time", "uuid", "email", "ipv4", "uri", "password"]


def random_schema(rng: random.Random, *, odd: float = 0.0) -> dict[str, Any]:
    """A schema, nested up to four levels, with definitions that it refers to.

    odd  the share of parts that have keywords which few backends know
    """
    names = rng.sample(["Point", "Color", "Node"], rng.randint(0, 2))
    maker = _Maker(rng, [], odd)
    definitions = {}
    for name in names:
        definitions[name] = maker.schema(2)
        maker.definitions.append(name)
    schema = maker.object(3) if rng.random() < 0.8 else maker.schema(3)
    if definitions:
        schema = {**schema, "$defs": definitions}
    return schema


class _Maker:
    def __init__(self, rng: random.Random, definitions: list[str], odd: float) -> None:
        self.rng = rng
        self.definitions = definitions
        self.odd = odd

    def schema(self, depth: int) -> dict[str, Any]:
        kinds = [self.string, self.integer, self.number, self.plain, self.literal, self.union]
        if depth > 0:
            kinds += [self.object, self.object, self.array, self.array]
        if self.definitions:
            kinds.append(self.reference)
        schema = self.rng.choice(kinds)(depth - 1)
        if self.rng.random() < 0.15:
            schema = {"title": "T", "description": "what it is", **schema}
        if self.rng.random() < self.odd:
            schema = self.odder(schema, depth)
        return schema

    def string(self, depth: int) -> dict[str, Any]:
        kind = self.rng.randrange(4)
        if kind == 0:
            least = self.rng.randint(0, 4)
            return {"type": "string", "minLength": least, "maxLength": least + 6}
        if kind == 1:
            return {"type": "string", "pattern": self.rng.choice(_PATTERNS)}
        if kind == 2:
            return {"type": "string", "format": self.rng.choice(_FORMATS)}
        return {"type": "string"}

    def integer(self, depth: int) -> dict[str, Any]:
        low = self.rng.randint(-50, 1000)
        bounds: dict[str, Any] = {
            "minimum": low,
            "exclusiveMinimum": low,
            "maximum": low + 100,
            "exclusiveMaximum": low + 90,
            "multipleOf": self.rng.choice([1, 2, 7]),
        }
        chosen = self.rng.sample(sorted(bounds), self.rng.randint(0, 2))
        return {"type": "integer"} | {word: bounds[word] for word in chosen}

    def number(self, depth: int) -> dict[str, Any]:
        low = round(self.rng.uniform(-5, 50), 2)
        return {"type": "number"} | self.rng.choice(
            [
                {},
                {"minimum": low},
                {"minimum": low, "maximum": low + 1.5},
                {"exclusiveMaximum": low},
            ]
        )

    def plain(self, depth: int) -> dict[str, Any]:
        return {
            "type": self.rng.choice(["boolean", "null", ["string", "null"], ["integer", "null"]])
        }

    def literal(self, depth: int) -> dict[str, Any]:
        values: list[Any] = ["a", "ü\n", 'q"', 3, -1.5, None, True, {"x": [1, "y"]}, "long value"]
        if self.rng.random() < 0.3:
            return {"const": self.rng.choice(values)}
        chosen = self.rng.sample(values, self.rng.randint(1, 5))
        if all(isinstance(one, str) for one in chosen):
            return {"type": "string", "enum": chosen}
        return {"enum": chosen}

    def union(self, depth: int) -> dict[str, Any]:
        if self.rng.random() < 0.3:
            branches = [
                {
                    "type": "object",
                    "properties": {"kind": {"const": kind}, "value": self.schema(depth)},
                    "required": ["kind", "value"],
                }
                for kind in ("one", "two")
            ]
            return {"oneOf": branches}
        return {"anyOf": [self.schema(depth) for _ in range(self.rng.randint(2, 3))]}

    def reference(self, depth: int) -> dict[str, Any]:
        return {"$ref": f"#/$defs/{self.rng.choice(self.definitions)}"}

    def array(self, depth: int) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": "array", "items": self.schema(depth)}
        kind = self.rng.randrange(4)
        if kind == 0:
            schema |= {"minItems": 1, "maxItems": 3}
        elif kind == 1:
            schema = {"type": "array", "prefixItems": [self.schema(depth)], "items": False}
            schema["minItems"] = 1
        else:
            schema["maxItems"] = self.rng.randint(1, 4)
        return schema

    def object(self, depth: int) -> dict[str, Any]:
        names = self.rng.sample(_NAMES, self.rng.randint(1, 4))
        schema: dict[str, Any] = {
            "type": "object",
            "properties": {name: self.schema(depth) for name in names},
            "required": self.rng.sample(names, self.rng.randint(0, len(names))),
        }
        if self.rng.random() < 0.5:
            schema["additionalProperties"] = self.rng.choice([False, False, {"type": "integer"}])
        return schema

    def odder(self, schema: dict[str, Any], depth: int) -> dict[str, Any]:
        more: list[dict[str, Any]] = [
            {"uniqueItems": True},
            {"not": {"const": 5}},
            {"minimum": 3},
            {"minLength": 2},
            {"required": ["extra"]},
            {"patternProperties": {"^z": {"type": "null"}}},
            {"propertyNames": {"pattern": "^[a-z]+$"}},
            {"minProperties": 1},
            {"maxProperties": 2},
            {"contains": {"const": 5}},
            {"multipleOf": 0.5},
            {"dependentRequired": {"name": ["id"]}},
            {"allOf": [{"description": "one"}]},
            {"allOf": [{"minimum": 3}, {"maxLength": 5}]},
            {"anyOf": [{"type": "string"}, {"type": "object"}]},
            {"if": {"type": "string"}, "then": {"minLength": 1}},
            {"type": ["string", "integer"], "enum": ["a", 3, None]},
            {"unevaluatedProperties": False},
            {"nullable": True, "x-note": 1, "default": None},
        ]
        return schema | self.rng.choice(more)


def random_regex(rng: random.Random, depth: int = 2) -> str:
    atoms = ["a", "x", "[a-f]", "[^x-z]", "\\d", "\\w", "é", "\\.", "[A-Z0-9_]", "hello", "-", " "]
    if depth == 0 or rng.random() < 0.3:
        return rng.choice(atoms) + rng.choice(["", "", "+", "?", "{2}", "{1,3}", "*"])
    parts = [random_regex(rng, depth - 1) for _ in range(rng.randint(1, 3))]
    if rng.random() < 0.4:
        return f"({'|'.join(parts)})" + rng.choice(["", "?", "{1,2}"])
    return "".join(parts)


def random_ebnf(rng: random.Random) -> tuple[str, str]:
    """An EBNF grammar whose rules refer only to later ones, and a regex of the same language."""
    num_rules = rng.randint(2, 5)
    rules: list[str] = []
    meanings: list[str] = []
    for number in reversed(range(num_rules)):
        written, meaning = [], []
        for _ in range(rng.randint(1, 3)):
            symbol, regex = _ebnf_symbol(rng, meanings, number)
            times = rng.choice(["", "", "?", "*", "+"])
            written.append(symbol + times)
            meaning.append(f"(?:{regex}){times}")
        if rng.random() < 0.4:
            rules.append(f"{_rule_name(number)} ::= {' | '.join(written)}")
            meanings.append(f"(?:{'|'.join(meaning)})")
        else:
            rules.append(f"{_rule_name(number)} ::= {' '.join(written)}")
            meanings.append(f"(?:{''.join(meaning)})")
    return "\n".join(reversed(rules)) + "\n", meanings[-1]


def _rule_name(number: int) -> str:
    return "root" if number == 0 else f"rule{number}"


def _ebnf_symbol(rng: random.Random, meanings: list[str], number: int) -> tuple[str, str]:
    if meanings and rng.random() < 0.5:
        index = rng.randrange(len(meanings))
        return _rule_name(number + len(meanings) - index), meanings[index]
    return rng.choice([('"ab"', "ab"), ("[0-9]", "[0-9]"), ('"é "', "é "), ("[^a-z]", "[^a-z]")])
