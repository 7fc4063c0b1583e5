from __future__ import annotations

from dataclasses import replace

import pytest

from sapwood.base.errors import ConfigError
from sapwood.schema.cache import (
    CacheGroup,
    CacheKind,
    CacheTensor,
    keys_and_values,
    latent_rows,
)
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.config.parallel import ParallelConfig
from sapwood.schema.config.resolve import resolve
from sapwood.schema.config.speculation import SpeculationConfig
from tests.schema.config.test_resolve import CPU, MODEL


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"speculative_algorithm": "MEDUSA"}, "NGRAM"),
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
        (
            {"speculative_algorithm": "NGRAM", "speculative_accept_threshold_single": 0.0},
            "--speculative-accept-threshold-single is 0.0 but must be above 0 and at most 1",
        ),
        (
            {"speculative_algorithm": "NGRAM", "speculative_accept_threshold_acc": 1.5},
            "must be above 0 and at most 1",
        ),
        (
            {"speculative_accept_threshold_acc": 0.5},
            "does nothing without --speculative-algorithm",
        ),
        (
            {"speculative_algorithm": "NGRAM", "speculative_ngram_min_bfs_breadth": 11},
            "at least --speculative-ngram-min-bfs-breadth, which is 11",
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
    config, decisions = resolve(ASKED, CPU, MODEL)
    assert config.speculation == ASKED.speculation
    [trees] = [one for one in decisions if one.option == "speculative_ngram_max_bfs_breadth"]
    assert (trees.value, trees.reason) == (10, "guesses may be trees")


WINDOW = keys_and_values([0], num_kv_heads=3, head_dim=64, window=128)
STATES = CacheGroup(kind=CacheKind.STATE, layers=(1,), tensors={"s": CacheTensor((4, 4))})


@pytest.mark.parametrize(
    ("changes", "asked", "said"),
    [
        ({"cache": (*MODEL.cache, WINDOW)}, {}, "sliding window"),
        ({"cache": (*MODEL.cache, STATES)}, {}, "keeps a state"),
        ({"cache": (latent_rows([0], width=64),)}, {}, "latent attention"),
        ({"positions_are_places": True}, {}, "ALiBi"),
        ({}, {"parallel": ParallelConfig(tp_size=2)}, "only one of the ranks"),
    ],
)
def test_chains_where_trees_cannot_be(changes, asked, said):
    config, decisions = resolve(replace(ASKED, **asked), CPU, replace(MODEL, **changes))
    assert config.speculation.speculative_ngram_min_bfs_breadth == 1
    assert config.speculation.speculative_ngram_max_bfs_breadth == 1
    [trees] = [one for one in decisions if one.option == "speculative_ngram_max_bfs_breadth"]
    assert trees.value == 1
    assert said in trees.reason


@pytest.mark.parametrize(("cache", "topk"), [(MODEL.cache, 4), ((*MODEL.cache, WINDOW), 1)])
def test_trees_of_a_draft_model_are_told(cache, topk):
    values = {"speculative_algorithm": "EAGLE", "speculative_eagle_topk": 4}
    config, decisions = resolve(EngineConfig.of(values), CPU, replace(MODEL, cache=cache))
    assert config.drafting.speculative_eagle_topk == topk
    [trees] = [one for one in decisions if one.option == "speculative_eagle_topk"]
    assert trees.value == topk
    assert ("sliding window" in trees.reason) == (topk == 1)


def test_thresholds_are_told():
    asked = replace(ASKED.speculation, speculative_accept_threshold_acc=0.5)
    _, decisions = resolve(replace(ASKED, speculation=asked), CPU, MODEL)
    [told] = [one for one in decisions if "threshold" in one.option]
    assert (told.option, told.value) == ("speculative_accept_threshold_acc", 0.5)
    assert "not distributed as the model's" in told.reason
