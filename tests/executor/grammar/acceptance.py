"""Random schemas, regular expressions and EBNF grammars with a real model at temperature 1.

    python -m tests.executor.grammar.acceptance smollm2-135m --schemas 300 --regexes 100 --ebnf 30

Every output that ends must match; one that does not, or a grammar of a usual kind that is refused,
makes it exit with 1. Options of an engine may follow as name=value.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections import Counter

import jsonschema

from sapwood import LLM
from sapwood.schema import grammar as grammars
from sapwood.schema.grammar import Grammar
from sapwood.schema.sampling import SamplingParams
from tests.executor.grammar.schemas import random_ebnf, random_regex, random_schema


def cases(num_schemas: int, num_regexes: int, num_ebnf: int) -> list[tuple[Grammar, object]]:
    """(grammar, what its outputs must match: a schema or a regular expression)"""
    made: list[tuple[Grammar, object]] = []
    for seed in range(num_schemas):
        schema = random_schema(random.Random(seed))
        made.append((grammars.json_schema(schema), schema))
    for seed in range(num_regexes):
        pattern = random_regex(random.Random(seed))
        made.append((grammars.regex(pattern), pattern))
    for seed in range(num_ebnf):
        text, meaning = random_ebnf(random.Random(seed))
        made.append((grammars.ebnf(text), meaning))
    return made


def matches(expected: object, text: str) -> bool:
    if isinstance(expected, str):
        return re.fullmatch(expected, text, re.DOTALL) is not None
    try:
        jsonschema.Draft202012Validator(expected).validate(json.loads(text))
    except (jsonschema.ValidationError, ValueError):
        return False
    return True


def count(llm: LLM, made: list[tuple[Grammar, object]], max_new_tokens: int) -> Counter[str]:
    """How many of each kind ended, were cut, or were wrong."""
    prompt = "Write an example of a record, as short as possible: "
    asked = [
        SamplingParams(grammar=one, temperature=1.0, max_new_tokens=max_new_tokens, seed=i)
        for i, (one, _) in enumerate(made)
    ]
    counts: Counter[str] = Counter()
    results = llm.generate([prompt] * len(made), asked)
    for (grammar, expected), result in zip(made, results, strict=True):
        outcome = "cut"
        if result.finish.kind == "stop":
            outcome = "matched" if matches(expected, result.text) else "WRONG"
        counts[f"{grammar.kind} {outcome}"] += 1
        if outcome == "WRONG":
            sys.stderr.write(f"{expected}\n{result.text!r}\n")
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--schemas", type=int, default=300)
    parser.add_argument("--regexes", type=int, default=100)
    parser.add_argument("--ebnf", type=int, default=30)
    parser.add_argument("--max-new-tokens", type=int, default=400)
    parser.add_argument("options", nargs="*")
    asked = parser.parse_args()
    options = dict(one.split("=", 1) for one in asked.options)
    with LLM(asked.model, **options) as llm:
        counts = count(llm, cases(asked.schemas, asked.regexes, asked.ebnf), asked.max_new_tokens)
    for name, number in sorted(counts.items()):
        sys.stdout.write(f"{name}: {number}\n")
    return 1 if any("WRONG" in name for name in counts) else 0


if __name__ == "__main__":
    sys.exit(main())
