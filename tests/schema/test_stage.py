"""How a model's layers are shared out to stages."""

from __future__ import annotations

import pytest

from sapwood.base.errors import ConfigError
from sapwood.schema.config.parallel import ParallelConfig
from sapwood.schema.stage import Stage, stages_of, whole_model


@pytest.mark.parametrize(
    ("num_layers", "count", "sizes"),
    [(4, 2, [2, 2]), (7, 3, [3, 2, 2]), (8, 3, [3, 3, 2]), (3, 3, [1, 1, 1])],
)
def test_what_is_left_over_goes_to_the_first_stages(
    num_layers: int, count: int, sizes: list[int]
) -> None:
    stages = stages_of(num_layers, count)
    assert [len(stage.layers) for stage in stages] == sizes
    assert [layer for stage in stages for layer in stage.layers] == list(range(num_layers))
    assert [stage.is_first for stage in stages] == [True] + [False] * (count - 1)
    assert [stage.is_last for stage in stages] == [False] * (count - 1) + [True]


def test_the_whole_model_is_one_stage() -> None:
    assert whole_model(5) == stages_of(5, 1)[0]
    assert whole_model(5).is_first
    assert whole_model(5).is_last


def test_layers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="--pp-size is 4, but the model has 3 layers"):
        stages_of(3, 4)
    with pytest.raises(ConfigError, match=r"--pp-layer-partition 2,2 is for 4 layers.* has 5"):
        stages_of(5, 2, [2, 2])
    with pytest.raises(ValueError, match="is no stage"):
        Stage(index=0, count=1, layers=range(0))


def test_rank_0_is_in_the_last_stage() -> None:
    parallel = ParallelConfig(tp_size=2, pp_size=3, pp_layer_partition="2, 1,4")
    stages = [parallel.stage_of(rank, 7) for rank in range(6)]
    assert [stage.index for stage in stages] == [2, 2, 0, 0, 1, 1]
    assert [stage.layers for stage in stages[::2]] == [range(3, 7), range(2), range(2, 3)]


def test_decodes_of_a_step_are_an_even_share() -> None:
    assert ParallelConfig().most_decodes(9) is None
    assert ParallelConfig(pp_size=2).most_decodes(9) == 5
    assert ParallelConfig(pp_size=2, pp_max_micro_batch_size=2).most_decodes(9) == 2
