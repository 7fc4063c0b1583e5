from __future__ import annotations

from dataclasses import replace

import pytest

from sapwood.base.errors import ConfigError
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.config.resolve import resolve
from sapwood.schema.config.speculation import SpeculationConfig
from tests.schema.config.test_resolve import CPU, MODEL


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"speculative_algorithm": "EAGLE"}, "NGRAM"),
        ({"speculative_num_draft_tokens": 4}, "does nothing without --speculative-algorithm"),
        ({"speculative_algorithm": "NGRAM", "speculative_num_draft_tokens": 1}, ">= 2"),
        ({"speculative_algorithm": "NGRAM", "speculative_max_step_tokens": 1}, ">= 2"),
        (
            {
                "speculative_algorithm": "NGRAM",
                "speculative_ngram_min_match_window_size": 3,
                "speculative_ngram_max_match_window_size": 2,
            },
            "at least --speculative-ngram-min-match-window-size, which is 3",
        ),
    ],
)
def test_what_is_refused(values, said):
    with pytest.raises(ConfigError) as caught:
        SpeculationConfig(**values)
    assert said in caught.value.message


ASKED = EngineConfig(speculation=SpeculationConfig(speculative_algorithm="NGRAM"))


def test_encoders_have_no_tokens_to_guess():
    with pytest.raises(ConfigError) as caught:
        resolve(ASKED, CPU, replace(MODEL, whole_prompts=True))
    assert "is an encoder" in caught.value.message
    assert MODEL.name in caught.value.message


def test_other_models_are_fine():
    config, _ = resolve(ASKED, CPU, MODEL)
    assert config.speculation == ASKED.speculation
