from __future__ import annotations

import pytest

from sapwood.base.errors import ConfigError
from sapwood.schema.config.grammar import GrammarConfig


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"grammar_backend": "outlines"}, "auto, xgrammar, llguidance, none"),
        ({"grammar_compile_timeout": 0.0}, "> 0"),
        ({"grammar_max_bytes": 0}, ">= 1"),
        ({"constrained_json_whitespace_pattern": "("}, "no regular expression"),
        (
            {
                "constrained_json_whitespace_pattern": " ",
                "constrained_json_disable_any_whitespace": True,
            },
            "contradict",
        ),
    ],
)
def test_what_is_refused(values, said):
    with pytest.raises(ConfigError) as caught:
        GrammarConfig(**values)
    assert said in caught.value.message
