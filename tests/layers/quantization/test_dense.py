"""Weights of the model's dtype, also where the checkpoint's are quantised."""

from __future__ import annotations

import pytest
import torch

from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.reference.quantized import quantize
from sapwood.layers.build import Build
from sapwood.layers.linear import Linear
from sapwood.layers.quantization import SCHEMES
from sapwood.schema.config.model import ON_THE_FLY


def build(dtype: torch.dtype) -> Build:
    return Build(kernels=ReferenceKernels(), device=torch.device("cpu"), dtype=dtype)


def test_there_is_a_scheme_for_every_choice_and_it_knows_its_name() -> None:
    names = ("none", *ON_THE_FLY, "gguf")
    assert {name: SCHEMES.get(name)().name for name in names} == {name: name for name in names}


def test_blocks_are_dequantised_into_the_part_that_they_are() -> None:
    layer = Linear(build(torch.bfloat16), 32, (2, 3), bias=False)
    first, second = torch.randn(2, 32), quantize(torch.randn(3, 32), "q4_1")
    layer.put(0, first)
    layer.put_blocks(1, second)
    assert torch.equal(layer.weight[:2], first.bfloat16())
    assert torch.equal(layer.weight[2:], second.dequantized(torch.bfloat16))


def test_a_tied_layer_has_no_weight_before_it_is_shared() -> None:
    layer = Linear(build(torch.float32), 32, (2,), bias=False, tied=True)
    with pytest.raises(RuntimeError, match="has not been shared yet"):
        _ = layer.weight
    table = torch.randn(2, 32)
    layer.share(table, None)
    assert layer.weight is table
