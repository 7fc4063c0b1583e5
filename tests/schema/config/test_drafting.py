from __future__ import annotations

import pytest

from sapwood.base.errors import ConfigError
from sapwood.schema.config.drafting import DraftingConfig
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.config.resolve import resolve
from tests.schema.config.test_resolve import CPU, MODEL


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"speculative_draft_model_path": "small"}, "does nothing without --speculative-algorithm"),
        (
            {"speculative_algorithm": "NGRAM", "speculative_num_steps": 2},
            "--speculative-num-steps does nothing without",
        ),
    ],
)
def test_options_that_do_not_go_together(values: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(EngineConfig.of(values), CPU, MODEL)
    assert said in caught.value.message


def test_at_least_one_token_is_guessed() -> None:
    with pytest.raises(ConfigError, match="--speculative-num-steps is 0"):
        DraftingConfig(speculative_num_steps=0)


def test_trees_fit_into_a_span() -> None:
    DraftingConfig(speculative_eagle_topk=7, speculative_num_steps=10)
    with pytest.raises(ConfigError, match=r"8 \* 8 = 64 guesses of a tree, but at most 63"):
        DraftingConfig(speculative_eagle_topk=8, speculative_num_steps=9)
    with pytest.raises(ConfigError, match="--speculative-eagle-topk is 0"):
        DraftingConfig(speculative_eagle_topk=0)
