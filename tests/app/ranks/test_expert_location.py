"""Where experts are at the start, as files and JSON say it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sapwood.app.ranks.expert_location import initial_placements
from sapwood.base.errors import ConfigError
from sapwood.models.registry import read_decoder
from sapwood.schema.config.parallel import ParallelConfig
from tests.models.lm.cases import peer_of


def placements(location: Any, *, redundant: int = 2) -> Any:
    """Of six experts over two ranks, in two layers."""
    text = location if isinstance(location, str) else json.dumps(location)
    parallel = ParallelConfig(
        tp_size=2, ep_size=2, ep_num_redundant_experts=redundant, init_expert_location=text
    )
    config = read_decoder(peer_of("qwen3_moe").hf_config)
    return initial_placements(parallel, config)


OWN = [[5, 4, 3, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 0, 1]]


def test_maps_of_all_forms(tmp_path: Path) -> None:
    config = read_decoder(peer_of("qwen3_moe").hf_config)
    layers = config.expert_layers
    asked = {"physical_to_logical_map": OWN[: len(layers)]}
    expected = dict(zip(layers, map(tuple, OWN), strict=False))
    (tmp_path / "map.json").write_text(json.dumps(asked))
    torch.save({name: torch.tensor(rows) for name, rows in asked.items()}, tmp_path / "map.pt")
    for location in (asked, str(tmp_path / "map.json"), str(tmp_path / "map.pt")):
        assert placements(location) == expected
    assert placements("trivial") == {}


def test_experts_that_were_chosen_most_get_the_copies() -> None:
    num_layers = read_decoder(peer_of("qwen3_moe").hf_config).num_layers
    steps = [[[9, 1, 1, 1, 1, 9]] * num_layers] * 2
    for found in placements({"logical_count": steps}).values():
        assert found.count(0) == found.count(5) == 2
        assert len({*found[:4]}) == len({*found[4:]}) == 4


@pytest.mark.parametrize(
    ("location", "why"),
    [
        ("nowhere", "neither trivial nor JSON"),
        ("missing.pt", "readable .json or .pt"),
        ([1], "not list"),
        ({}, "neither physical_to_logical_map nor logical_count"),
        ({"logical_count": "many"}, "no table of numbers"),
        ({"logical_count": [1, 2]}, r"shape \(2,\)"),
        ({"logical_count": [[0.5] * 6] * 2}, "whole numbers"),
        ({"logical_count": [[-1] * 6] * 2}, "below 0"),
        ({"logical_count": [[1] * 5] * 2}, "must be 6"),
        ({"logical_count": [[1] * 6] * 7}, "7 layers"),
        ({"physical_to_logical_map": [[0, 1, 2, 3, 4, 5]] * 2}, "must be 8"),
        ({"physical_to_logical_map": [[0, 1, 2, 3, 4, 4, 0, 1]] * 2}, "lacks expert 5"),
        ({"physical_to_logical_map": [[0, 1, 2, 3, 4, 5, 9, 1]] * 2}, "has an expert 9"),
        ({"physical_to_logical_map": [[0, 0, 2, 3, 4, 5, 1, 2]] * 2}, "twice on rank 0"),
    ],
)
def test_what_does_not_fit_is_refused(location: Any, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        placements(location)
