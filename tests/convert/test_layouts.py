"""What files hold of a layer, against the formats' own libraries and against our readers."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationConfig
from torch import Tensor

from sapwood.convert.layouts import (
    num_bytes,
    pack,
    pack_e2m1,
    quantization_config,
    stored_tensors,
)
from sapwood.convert.rounding import Grid
from sapwood.convert.scheme import MXFP4, NF4, NVFP4, WeightScheme
from sapwood.kernels.coded import CodedWeight
from sapwood.layers.quantization.formats import format_of
from sapwood.layers.quantization.formats.interface import LinearTensors
from tests.convert.test_rounding import (
    FP8,
    FP8_BLOCK,
    INT8,
    best_grid,
    int4,
    random_weight,
)
from tests.quantized_checkpoints import four_bit_floats

COMPRESSED = [INT8, FP8, FP8_BLOCK, int4(32), int4(64, symmetric=False), NVFP4, MXFP4]
INT8_ROWS = replace(INT8, rounds_activations=False, layout="bitsandbytes")
GPTQ8 = replace(int4(32), num_bits=8, layout="gptq")
OTHERS = [
    replace(int4(64, symmetric=False), layout="awq"),
    replace(int4(32), layout="awq"),
    replace(int4(64, symmetric=False), layout="gptq"),
    replace(int4(128), layout="gptq"),
    GPTQ8,
    replace(GPTQ8, symmetric=False),
    NF4,
    INT8_ROWS,
]
LOSS = {(8, "int"): 0.012, (8, "e4m3"): 0.03, (4, "int"): 0.12, (4, "e2m1"): 0.12, (4, "nf4"): 0.1}
"""Relative error of normal numbers, by bits and numbers."""


def names(scheme: WeightScheme) -> str:
    zeros = "" if scheme.symmetric else "-asymmetric"
    return f"{scheme.layout}-{scheme.numbers}{scheme.num_bits}-{scheme.strategy}{zeros}"


@cache
def grid_of(scheme: WeightScheme, dtype: torch.dtype) -> Grid:
    """Of `random_weight`."""
    return best_grid(random_weight(), scheme, dtype)


@pytest.mark.parametrize("scheme", COMPRESSED, ids=names)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_library_reads_exactly_the_weights_that_were_meant(
    scheme: WeightScheme, dtype: torch.dtype
) -> None:
    weight = random_weight()
    grid = grid_of(scheme, dtype)
    codes = grid.codes(weight)
    tensors = stored_tensors(codes, grid, dtype)
    stated = quantization_config(scheme, ["lm_head"], act_order=False, dtype=dtype)
    config = QuantizationConfig(**stated)
    group = config.config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(config.format)
    # Scales as fp32: the same numbers, and the library's product is then not rounded again.
    wide = {
        name: tensor.float() if tensor.dtype == dtype else tensor
        for name, tensor in tensors.items()
    }
    read = compressor.decompress(wide, group)["weight"]
    if scheme.is_e2m1:  # which the library rounds to bfloat16
        exact = four_bit_floats(tensors, weight.shape[1])
        torch.testing.assert_close(grid.values(codes).double(), exact, rtol=1e-6, atol=0)
        torch.testing.assert_close(read.double(), exact, rtol=2**-7, atol=0)
    else:
        assert torch.equal(read.float(), grid.values(codes))
        assert tensors["weight_scale"].dtype == dtype
    assert (read - weight).norm() < LOSS[scheme.num_bits, scheme.numbers] * weight.norm()


@pytest.mark.parametrize("scheme", OTHERS, ids=names)
def test_the_reader_of_the_format_finds_exactly_the_weights_that_were_meant(
    scheme: WeightScheme,
) -> None:
    """The readers were tested with checkpoints of the tools that the formats are of."""
    weight = random_weight()
    grid = grid_of(scheme, torch.bfloat16)
    codes = grid.codes(weight)
    stored = stored_tensors(codes, grid, torch.bfloat16)
    config = quantization_config(scheme, ["lm_head"], act_order=False, dtype=torch.bfloat16)
    form = format_of({"quantization_config": config})
    assert form is not None
    layer = LinearTensors("layer", (256, 384), stored, form.name)
    found = form.linear(layer)
    layer.refuse_others()
    assert isinstance(found, CodedWeight)
    read = found.dequantized(torch.float32)
    torch.testing.assert_close(read, grid.values(codes), rtol=1e-6, atol=1e-7)
    loss = (grid.values(codes) - weight).norm() / weight.norm()
    assert loss < LOSS[scheme.num_bits, scheme.numbers]


def test_bitsandbytes_reads_its_nf4() -> None:
    from bitsandbytes import functional

    weight = random_weight()
    grid = best_grid(weight, NF4, torch.float32)
    codes = grid.codes(weight)
    stored = stored_tensors(codes, grid, torch.float32)
    data = stored.pop("weight")
    own = {name.removeprefix("weight."): tensor for name, tensor in stored.items()}
    state = functional.QuantState.from_dict(own, device=torch.device("cpu"))
    read = functional.dequantize_4bit(data, state)
    torch.testing.assert_close(read, grid.values(codes), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scheme", [*COMPRESSED, *OTHERS], ids=names)
def test_the_planned_size_is_the_size(scheme: WeightScheme) -> None:
    weight = random_weight()
    grid = grid_of(scheme, torch.bfloat16)
    tensors = stored_tensors(grid.codes(weight), grid, torch.bfloat16)
    size = sum(one.nbytes for one in tensors.values())
    assert size == num_bytes(scheme, (256, 384), torch.bfloat16)


@pytest.mark.parametrize("num_bits", [4, 8])
def test_packing_is_the_library_s(num_bits: int) -> None:
    half = 2 ** (num_bits - 1)
    codes = torch.randint(-half, half, (24, 64))
    expected = pack_to_int32(codes.to(torch.int8), num_bits)
    assert torch.equal(pack((codes + half).to(torch.int32), num_bits), expected)


def test_packing_of_e2m1_is_the_library_s() -> None:
    numbers = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    choice = torch.randint(16, (24, 64))
    codes: Tensor = numbers[choice % 8] * torch.where(choice < 8, 1.0, -1.0)
    # The library keeps the sign of zero, which we do not.
    assert torch.equal(pack_e2m1(codes), pack_fp4_to_uint8(codes + 0.0))


def test_layers_that_stay_are_named_as_each_format_does() -> None:
    ignored = ["model.layers.1.mlp.up_proj", "lm_head"]

    def config(scheme: WeightScheme) -> dict[str, Any]:
        return quantization_config(scheme, ignored, act_order=True, dtype=torch.float16)

    assert config(int4(32))["ignore"] == ignored
    assert config(replace(int4(32), layout="awq"))["modules_to_not_convert"] == ignored
    assert config(NF4)["llm_int8_skip_modules"] == ignored
    assert config(NF4)["bnb_4bit_compute_dtype"] == "float16"
    assert list(config(GPTQ8)["dynamic"]) == [r"-:^model\.layers\.1\.mlp\.up_proj$"]
