"""Where checkpoint tensors go in fused and split layers, and what may not be done to a layer."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist

from sapwood.base.errors import ConfigError
from sapwood.distributed.groups import Group
from sapwood.kernels.reference import ReferenceKernels
from sapwood.layers.build import Build, Groups
from sapwood.layers.embedding import VocabEmbedding
from sapwood.layers.heads import HeadLayout
from sapwood.layers.linear import (
    ColumnParallelLinear,
    Linear,
    Part,
    RowParallelLinear,
    even_part,
)

BUILD = Build(kernels=ReferenceKernels(), device=torch.device("cpu"), dtype=torch.float32)


def rank_of(rank: int, size: int) -> Group:
    """A rank that is placed, but has nobody to talk to."""
    return Group(rank=rank, size=size, process_group=Mock(spec=dist.ProcessGroup))


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_gets_its_rows_of_every_part(rank: int) -> None:
    group = rank_of(rank, 2)
    parts = (even_part("gate", 4, group), even_part("up", 4, group))
    layer = ColumnParallelLinear(BUILD, 3, parts, bias=True)
    targets = layer.targets()
    assert {name: target.shape for name, target in targets.items()} == {
        "gate.weight": (4, 3),
        "gate.bias": (4,),
        "up.weight": (4, 3),
        "up.bias": (4,),
    }
    gate, up = torch.arange(12.0).view(4, 3), 100 + torch.arange(12.0).view(4, 3)
    for name, tensor in (("gate", gate), ("up", up)):
        targets[f"{name}.weight"].place(tensor)
        targets[f"{name}.bias"].place(tensor[:, 0])
    rows = slice(2 * rank, 2 * rank + 2)
    weight = layer.linear.weight
    assert torch.equal(weight, torch.cat((gate[rows], up[rows])))
    assert torch.equal(layer.linear.bias, weight[:, 0])


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_adds_the_bias_of_a_row_parallel_layer(rank: int) -> None:
    layer = RowParallelLinear(BUILD, "o", 4, 3, bias=True, group=rank_of(rank, 2))
    whole = torch.arange(12.0).view(3, 4)
    layer.targets()["o.weight"].place(whole)
    layer.targets()["o.bias"].place(torch.ones(3))
    assert torch.equal(layer.linear.weight, whole[:, 2 * rank : 2 * rank + 2])
    assert (layer.linear.bias is None) == (rank == 1)


def test_ranks_share_a_kv_head_when_there_are_more_ranks_than_heads() -> None:
    heads = HeadLayout(num_heads=8, num_kv_heads=2, head_dim=16)
    first_rows = [heads.qkv_parts(rank_of(rank, 4))[1].first for rank in range(4)]
    assert first_rows == [0, 0, 16, 16]
    assert heads.num_kv_heads_of(rank_of(3, 4)) == 1
    assert heads.num_kv_heads_of(Group()) == 2


@pytest.mark.parametrize(
    ("heads", "size", "message"),
    [
        ((9, 3), 2, "9 attention heads cannot be split evenly over 2 ranks"),
        ((8, 4), 6, "8 attention heads cannot"),
        ((12, 3), 2, "3 key and value heads cannot be split evenly"),
        ((12, 4), 6, "4 key and value heads cannot be shared evenly by 6 ranks"),
    ],
)
def test_heads_that_do_not_divide(heads: tuple[int, int], size: int, message: str) -> None:
    layout = HeadLayout(num_heads=heads[0], num_kv_heads=heads[1], head_dim=8)
    with pytest.raises(ConfigError, match=message):
        layout.qkv_parts(rank_of(0, size))


def test_the_last_rank_of_a_vocabulary_is_filled_up_with_zeros() -> None:
    table = 1 + torch.arange(10.0).view(5, 2)
    rows = []
    for rank in range(3):
        build = replace(BUILD, groups=Groups.tensor_parallel(rank_of(rank, 3)))
        layer = VocabEmbedding(build, 5, 2)
        layer.targets()["weight"].place(table)
        rows.append(layer.weight)
    assert torch.equal(torch.cat(rows), torch.cat((table, torch.zeros(1, 2))))


def test_a_layer_is_used_after_packing_and_filled_before() -> None:
    layer = Linear(BUILD, 2, (3,), bias=False)
    with pytest.raises(RuntimeError, match="finalize"):
        layer(torch.ones(1, 2))
    layer.weight.fill_(2.0)
    layer.pack()
    assert torch.equal(layer(torch.ones(1, 2)), torch.full((1, 3), 4.0))
    with pytest.raises(RuntimeError, match="packed"):
        _ = layer.weight
    layer.pack()


def test_a_packed_layer_can_be_filled_again() -> None:
    """It computes with the old weights until all of the new ones are there and packed."""
    layer = ColumnParallelLinear(BUILD, 2, (Part("a", 1, 0, 1), Part("b", 2, 0, 2)), bias=True)
    x = torch.ones(1, 2)

    def fill(number: float, names: tuple[str, ...]) -> None:
        targets = layer.targets()
        for name in names:
            target = targets[name]
            target.place(torch.full(target.shape, number))

    fill(1.0, ("a.weight", "b.weight", "a.bias", "b.bias"))
    layer.linear.pack()
    assert torch.equal(layer(x), torch.full((1, 3), 3.0))
    fill(5.0, ("a.weight",))
    assert torch.equal(layer(x), torch.full((1, 3), 3.0))
    fill(5.0, ("b.weight",))
    layer.linear.pack()
    assert torch.equal(layer(x), torch.full((1, 3), 11.0))


def test_a_target_names_the_part_that_its_rank_places() -> None:
    """What is put is what placing the whole tensor puts."""
    whole = torch.arange(24.0).view(4, 6)
    group = rank_of(1, 2)
    for make in (
        lambda: ColumnParallelLinear(BUILD, 6, (even_part("w", 4, group),), bias=False),
        lambda: RowParallelLinear(BUILD, "w", 6, 4, bias=False, group=group),
    ):
        cut, placed = make(), make()
        target = cut.targets()["w.weight"]
        assert target.part is not None
        target.put(target.part.of(whole).clone())
        placed.targets()["w.weight"].place(whole)
        assert torch.equal(cut.linear.weight, placed.linear.weight)
    alone = ColumnParallelLinear(BUILD, 6, (even_part("w", 4, Group()),), bias=False)
    assert alone.targets()["w.weight"].part is None
