"""A few of the acceptance's grammars with SmolLM2 at temperature 1."""

from __future__ import annotations

import pytest

from sapwood import LLM
from sapwood.store import ModelFiles
from tests.executor.grammar.acceptance import cases, count


@pytest.mark.parametrize("backend", ["xgrammar", "llguidance"])
def test_every_output_that_ends_matches(smollm2_files: ModelFiles, backend: str) -> None:
    with LLM(smollm2_files.name, max_total_tokens=16384, grammar_backend=backend) as llm:
        counts = count(llm, cases(8, 4, 2), max_new_tokens=150)
    assert not [name for name in counts if "WRONG" in name]
    assert counts["json_schema matched"] >= 3
    assert counts["regex matched"] >= 2
