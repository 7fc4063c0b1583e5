"""Weights that are quantised while they are placed."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist

from sapwood.base.errors import ConfigError
from sapwood.distributed.groups import Group
from sapwood.kernels.quantized import QuantizedWeight
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.reference.quantized import QuantizedLinear, quantize
from sapwood.layers.build import Build
from sapwood.layers.embedding import LMHead, VocabEmbedding
from sapwood.layers.linear import (
    ColumnParallelLinear,
    Linear,
    RowParallelLinear,
    even_part,
)
from sapwood.layers.quantization import SCHEMES

CPU = torch.device("cpu")
KERNELS = ReferenceKernels()
LAYER_KINDS = {"w8a8_int8": "int8", "w4a8": "q4_1"}

every_scheme = pytest.mark.parametrize("name", LAYER_KINDS)


def rank_of(rank: int, size: int) -> Group:
    """A rank that is placed, but has nobody to talk to."""
    return Group(rank=rank, size=size, process_group=Mock(spec=dist.ProcessGroup))


def build_with(name: str) -> Build:
    """`name`: of the scheme"""
    return Build(kernels=KERNELS, device=CPU, dtype=torch.float32, scheme=SCHEMES.get(name)())


def packed_parts(linear: Linear) -> tuple[QuantizedWeight, ...]:
    assert isinstance(linear.packed, QuantizedLinear)
    return linear.packed.parts


@every_scheme
def test_a_placed_part_is_what_the_kernels_quantise(name: str) -> None:
    weights = {part: torch.randn(3, 64) for part in ("gate", "up")}
    parts = tuple(even_part(part, 3, Group()) for part in weights)
    layer = ColumnParallelLinear(build_with(name), 64, parts, bias=True)
    targets = layer.targets()
    for part, weight in weights.items():
        assert targets[f"{part}.weight"].put_blocks is None  # those are dequantised first
        targets[f"{part}.weight"].place(weight)
        targets[f"{part}.bias"].place(torch.full((3,), 2.0))
    layer.linear.pack()
    found = packed_parts(layer.linear)
    assert [part.kind for part in found] == [LAYER_KINDS[name]] * 2
    for part, weight in zip(found, weights.values(), strict=True):
        assert torch.equal(part.data, quantize(weight, LAYER_KINDS[name]).data)
    x = torch.zeros(1, 64)
    assert torch.equal(layer(x), torch.full((1, 6), 2.0))


@every_scheme
@pytest.mark.parametrize("tied", [False, True])
def test_output_layers_have_eight_bits_and_a_scale_per_block(name: str, tied: bool) -> None:
    table = torch.randn(10, 32)
    build = build_with(name)
    embedding = VocabEmbedding(build, 10, 32)
    head = LMHead(build, 10, 32, tied=embedding if tied else None)
    target = head.tied_target() if tied else embedding.targets()["weight"]
    target.place(table)
    for target in head.targets().values():
        target.place(table)
    head.pack()
    (part,) = head.packed.parts  # type: ignore[attr-defined]
    assert part.kind == "q8_0"
    assert torch.equal(part.data, quantize(table, "q8_0").data)
    assert torch.equal(embedding.weight, table)  # looked up as it is


def test_int8_takes_any_number_of_inputs_also_in_the_output_layer() -> None:
    for makes_logits in (False, True):
        layer = Linear(build_with("w8a8_int8"), 33, (4,), bias=False, makes_logits=makes_logits)
        layer.put(0, torch.randn(4, 33))
        layer.pack()
        assert packed_parts(layer)[0].kind == "int8"


def test_four_bits_need_whole_blocks_and_say_what_takes_any_size() -> None:
    with pytest.raises(ConfigError, match=r"w4a8 takes blocks of 32.* has 48 on each rank.*w8a8"):
        RowParallelLinear(build_with("w4a8"), "down", 96, 4, bias=False, group=rank_of(0, 2))


@every_scheme
def test_ranks_of_a_row_parallel_layer_add_up(name: str) -> None:
    whole, x = torch.randn(5, 128), torch.randn(3, 128)
    total = torch.zeros(3, 5)
    for rank in range(2):
        layer = RowParallelLinear(
            build_with(name), "down", 128, 5, bias=False, group=rank_of(rank, 2)
        )
        layer.targets()["down.weight"].place(whole)
        layer.linear.pack()
        total += layer.linear(x[:, 64 * rank : 64 * rank + 64])
    error = total - x @ whole.T
    assert error.std() <= (0.02 if name == "w8a8_int8" else 0.12) * (x @ whole.T).std()


@every_scheme
def test_what_may_not_be_done(name: str) -> None:
    layer = Linear(build_with(name), 32, (2, 2), bias=False)
    layer.put(1, torch.randn(2, 32))
    with pytest.raises(RuntimeError, match=r"kept as \w+ numbers only"):
        _ = layer.weight
    with pytest.raises(RuntimeError, match="has not been placed"):
        layer.pack()


@every_scheme
def test_blocks_of_a_file_are_quantised_anew(name: str) -> None:
    weight = quantize(torch.randn(3, 64), "q4_1")
    layer = Linear(build_with(name), 64, (3,), bias=False)
    layer.put_blocks(0, weight)
    layer.pack()
    found = packed_parts(layer)[0].dequantized(torch.float32)
    exact = weight.dequantized(torch.float32)
    assert (found - exact).abs().max() <= 0.02 * exact.abs().max()
