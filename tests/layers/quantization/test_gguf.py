"""The blocks of a file, kept as they are wherever a layer can."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.distributed.groups import Group
from sapwood.kernels.blocks import FORMATS
from sapwood.kernels.quantized import QuantizedWeight
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.reference.quantized import QuantizedLinear, multiply, quantize
from sapwood.layers.build import Build, Groups
from sapwood.layers.embedding import LMHead, VocabEmbedding
from sapwood.layers.linear import ColumnParallelLinear, Linear, RowParallelLinear, even_part
from sapwood.layers.quantization.gguf import gguf_a8_scheme, gguf_scheme

CPU = torch.device("cpu")
KERNELS = ReferenceKernels()
BUILD = Build(kernels=KERNELS, device=CPU, dtype=torch.float32, scheme=gguf_a8_scheme())


def rank_of(rank: int, size: int) -> Group:
    """A rank that is placed, but has nobody to talk to."""
    return Group(rank=rank, size=size, process_group=Mock(spec=dist.ProcessGroup))


def blocks(kind: str, num_out: int, num_in: int) -> QuantizedWeight:
    return quantize(torch.randn(num_out, num_in), kind)


def place(layer: ColumnParallelLinear | RowParallelLinear | LMHead, name: str, weight: object):
    target = layer.targets()[f"{name}.weight" if name else "weight"]
    if isinstance(weight, Tensor):
        target.place(weight)
    else:
        assert isinstance(weight, QuantizedWeight)
        assert target.put_blocks is not None
        target.place_blocks(weight)


def fused(weights: dict[str, object], group: Group) -> Linear:
    sizes = {name: weight.shape[0] for name, weight in weights.items()}  # type: ignore[attr-defined]
    parts = tuple(even_part(name, size, group) for name, size in sizes.items())
    layer = ColumnParallelLinear(BUILD, 64, parts, bias=False)
    for name, weight in weights.items():
        place(layer, name, weight)
    layer.linear.pack()
    return layer.linear


@pytest.mark.parametrize("rank", [0, 1])
def test_parts_keep_their_own_kinds_and_their_bits(rank: int) -> None:
    weights = {"q": blocks("q4_1", 8, 64), "k": blocks("q8_0", 4, 64), "v": blocks("q8_0", 4, 64)}
    linear = fused(dict(weights), rank_of(rank, 2))
    assert isinstance(linear.packed, QuantizedLinear)
    for found, whole in zip(linear.packed.parts, weights.values(), strict=True):
        size = whole.shape[0] // 2
        assert found.kind == whole.kind
        assert torch.equal(found.data, whole.data[rank * size : rank * size + size])


def test_a_layer_with_a_dense_part_is_dense() -> None:
    dense = torch.randn(4, 64)
    weights = {"gate": blocks("q4_1", 4, 64), "up": dense}
    linear = fused(dict(weights), Group())
    x = torch.randn(3, 64)
    gate = weights["gate"].dequantized(torch.float32)  # type: ignore[attr-defined]
    torch.testing.assert_close(linear(x), x @ torch.cat((gate, dense)).T)


def test_a_dense_part_is_a_copy() -> None:
    """What was placed may be a piece of a tensor that would otherwise stay in memory."""
    dense = torch.randn(4, 64)
    layer = Linear(BUILD, 64, (4,), bias=False)
    layer.put(0, dense)
    x, expected = torch.randn(2, 64), dense.clone()
    dense.zero_()
    layer.pack()
    torch.testing.assert_close(layer(x), x @ expected.T)


def row_parallel(weight: QuantizedWeight, size: int) -> list[RowParallelLinear]:
    layers = []
    for rank in range(size):
        num_out, num_in = weight.shape
        group = rank_of(rank, size)
        layer = RowParallelLinear(BUILD, "down", num_in, num_out, bias=False, group=group)
        place(layer, "down", weight)
        layer.linear.pack()
        layers.append(layer)
    return layers


def test_ranks_share_the_blocks_of_a_row_and_add_up_exactly() -> None:
    weight, x = blocks("q4_1", 5, 128), torch.randn(3, 128)
    layers = row_parallel(weight, 2)
    assert all(isinstance(layer.linear.packed, QuantizedLinear) for layer in layers)
    total = sum(layer.linear(x[:, 64 * i : 64 * i + 64]) for i, layer in enumerate(layers))
    torch.testing.assert_close(total, multiply(x, weight), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "num_in", "size"), [("q4_1", 96, 2), ("q6_k", 512, 4)])
def test_ranks_that_would_cut_a_block_are_refused(kind: str, num_in: int, size: int) -> None:
    block = FORMATS[kind]
    data = torch.zeros(5, num_in // block.inputs * block.num_bytes, dtype=torch.uint8)
    share = num_in // size
    with pytest.raises(
        ConfigError,
        match=rf"a weight \[5, {num_in}\] cannot be split over the ranks: inputs 0 to {share} "
        rf"cut a block of {block.inputs} inputs of a {kind} weight; choose a smaller --tp-size",
    ):
        row_parallel(QuantizedWeight(kind, (5, num_in), data), size)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_tied_output_layer_has_the_blocks_of_the_embedding(size: int) -> None:
    """5 rows over 4 ranks: the third rank's is filled up with zeros, the fourth has none."""
    weight, hidden = blocks("q8_0", 5, 64), torch.randn(3, 64)
    logits = []
    for rank in range(size):
        group = rank_of(rank, size) if size > 1 else Group()
        build = replace(BUILD, groups=Groups.tensor_parallel(group))
        embedding = VocabEmbedding(build, 5, 64)
        head = LMHead(build, 5, 64, tied=embedding)
        assert head.targets() == {}
        target = head.tied_target()
        assert target.put_blocks is not None
        target.place_blocks(weight)
        assert isinstance(head.packed, QuantizedLinear)
        logits.append(head.packed(hidden))
        first = rank * embedding.weight.shape[0]
        own = weight.dequantized(torch.float32)[first : first + embedding.weight.shape[0]]
        assert torch.equal(embedding.weight[: len(own)], own)
        assert not embedding.weight[len(own) :].any()
    assert torch.equal(torch.cat(logits, dim=1)[:, :5], multiply(hidden, weight))


def test_a_tied_output_layer_of_a_dense_embedding_is_dense() -> None:
    table, hidden = torch.randn(5, 64), torch.randn(3, 64)
    embedding = VocabEmbedding(BUILD, 5, 64)
    head = LMHead(BUILD, 5, 64, tied=embedding)
    head.tied_target().place(table)
    torch.testing.assert_close(head(hidden), hidden @ table.T)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_an_output_layer_of_its_own_is_filled_up_with_zeros(rank: int) -> None:
    weight, hidden = blocks("q8_0", 5, 64), torch.randn(2, 64)
    head = LMHead(replace(BUILD, groups=Groups.tensor_parallel(rank_of(rank, 3))), 5, 64, tied=None)
    place(head, "", weight)
    head.pack()
    expected = torch.zeros(2, 2)
    own = multiply(hidden, weight)[:, 2 * rank : 2 * rank + 2]
    expected[:, : own.shape[1]] = own
    assert torch.equal(head.packed(hidden), expected)


def test_what_may_not_be_done() -> None:
    layer = Linear(BUILD, 64, (2, 2), bias=False)
    layer.put_blocks(0, blocks("q8_0", 2, 64))
    with pytest.raises(RuntimeError, match="the file's blocks only"):
        _ = layer.weight
    with pytest.raises(RuntimeError, match="has not been placed"):
        layer.pack()


@pytest.mark.parametrize(("scheme", "bits"), [(gguf_scheme(), 16), (gguf_a8_scheme(), 8)])
def test_a_scheme_says_how_activations_are_rounded(scheme, bits):
    layer = ColumnParallelLinear(
        replace(BUILD, scheme=scheme), 64, (even_part("up", 5, Group()),), bias=False
    )
    weight = blocks("q4_1", 5, 64)
    place(layer, "up", weight)
    layer.linear.pack()
    [part] = layer.linear.packed.parts
    assert part.x_bits == bits
    x = torch.randn(3, 64)
    assert torch.equal(layer(x), multiply(x, replace(weight, x_bits=bits)))
