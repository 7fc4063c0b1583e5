"""SmolLM2 puts out the same with guesses and without, for 200 prompts.

In float32: in 16 bits near ties fall either way when a step has more rows."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from sapwood import LLM
from sapwood.schema.output import Speculated
from sapwood.store import ModelFiles
from tests.app.llms import Make, llms_of

THINGS = (
    *("trains", "gardens", "music", "moon", "rivers", "bread", "chess", "winter", "cats"),
    *("clocks", "bridges", "paper", "stones", "oceans", "letters", "bees", "dreams", "glass"),
    *("horses", "islands", "tea", "wheels", "forests", "coins", "lamps"),
)
ASKED = (
    "What do you know about {}?",
    "Explain {} in a few words.",
    "Say three times '{} are fine', and then why.",
    "Write a list about {}.",
    "Write Python code that prints facts about {}.",
    "Why do people like {}? Because",
    "A story about {}: Once upon a time",
    "{0}, {0}, {0}, and",
)
PROMPTS = [asked.format(thing) for thing, asked in product(THINGS, ASKED)]
NAME = "smollm2-135m"
AT_ONCE, NUM_TOKENS = 20, 32
SHORT = {"temperature": 0.0, "max_new_tokens": NUM_TOKENS}
SAMPLED = {"temperature": 0.8, "top_p": 0.95, "seed": 3, "max_new_tokens": NUM_TOKENS}


@pytest.fixture(scope="module")
def make(smollm2_files: ModelFiles) -> Iterator[Make]:
    with llms_of(Path(NAME), max_total_tokens=8192, num_threads=2) as make:
        yield make


@pytest.fixture(scope="module")
def plain(make: Make) -> list[str]:
    return outputs(make())


def outputs(llm: LLM) -> list[str]:
    """Of every eighth prompt a sampled output too, with a seed."""
    found = []
    for start in range(0, len(PROMPTS), AT_ONCE):
        found += llm.generate(PROMPTS[start : start + AT_ONCE], SHORT)
    found += llm.generate(PROMPTS[::8], SAMPLED)
    return [one.text for one in found]


@pytest.mark.long
@pytest.mark.parametrize("adapts", [False, True], ids=["every guess", "adaptive"])
def test_guesses_by_earlier_text(make: Make, plain: list[str], adapts: bool) -> None:
    speculated = check(
        make,
        plain,
        speculative_algorithm="NGRAM",
        disable_speculative_adaptation=not adapts,
        skip_server_warmup=not adapts,
    )
    assert adapts or speculated.num_accepted > 500


@pytest.mark.long
def test_guesses_of_the_model_in_4_bits(make: Make, plain: list[str]) -> None:
    speculated = check(
        make,
        plain,
        speculative_algorithm="STANDALONE",
        speculative_draft_model_path=NAME,
        speculative_draft_model_quantization="w4a8",
        disable_speculative_adaptation=True,
    )
    assert speculated.num_accepted > speculated.num_drafted // 2


def check(make: Make, plain: list[str], **options: Any) -> Speculated:
    """All outputs are those without guesses; returns how the guesses fared."""
    llm = make(**options)
    differing = [
        (at, wanted, got)
        for at, (wanted, got) in enumerate(zip(plain, outputs(llm), strict=True))
        if wanted != got
    ]
    assert differing == []
    speculated = llm.stats().speculated
    assert speculated is not None
    return speculated
