"""Each format: what is read is what the format's own rules or tool say, bit by bit or to fp32's
rounding; what is missing or does not fit is named."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from sapwood.base.errors import ConfigError, WeightError
from sapwood.kernels.coded import CodedWeight, LinearPart
from sapwood.kernels.quantized import QuantizedWeight
from sapwood.layers.quantization.formats import format_of
from sapwood.layers.quantization.formats.interface import LinearTensors
from tests.quantized_checkpoints import CASES, ROUNDS_ACTIVATIONS, make_nf4

SHAPE = (64, 128)
MODULE = "model.layers.0.self_attn.q_proj"

every_case = pytest.mark.parametrize("name", CASES)


def read(name: str, tensors: dict[str, Tensor]) -> LinearPart:
    form = format_of({"quantization_config": CASES[name].config})
    assert form is not None
    found = LinearTensors(MODULE, SHAPE, tensors, form.name)
    weight = form.linear(found)
    found.refuse_others()
    assert not isinstance(weight, Tensor)
    return weight


def made(name: str) -> tuple[dict[str, Tensor], Tensor]:
    torch.manual_seed(7)
    return CASES[name].make(torch.randn(SHAPE) * 0.1)


@every_case
def test_weights_are_what_the_format_says(name: str) -> None:
    tensors, exact = made(name)
    found = read(name, tensors).dequantized(torch.float32)
    # fp32: a product of two scales and a number, each rounded once.
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-7)


@every_case
def test_weights_stay_small(name: str) -> None:
    tensors, _ = made(name)
    weight = read(name, tensors)
    if name in ROUNDS_ACTIVATIONS:
        assert isinstance(weight, QuantizedWeight)
    else:
        assert isinstance(weight, CodedWeight)
    assert weight.num_bytes <= 1.3 * SHAPE[0] * SHAPE[1]


def test_fp8_says_whether_activations_were_meant_to_be_fp8() -> None:
    rounding = set()
    for name in CASES:
        weight = read(name, made(name)[0])
        if isinstance(weight, CodedWeight) and weight.rounds_inputs:
            rounding.add(name)
    assert rounding == {"fp8 per tensor", "fp8 per output", "fp8 blocks", "modelopt fp8"}
    config = copy.deepcopy(CASES["fp8, compressed"].config)
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "type": "float"}
    form = format_of({"quantization_config": config})
    assert form is not None
    weight = form.linear(LinearTensors(MODULE, SHAPE, made("fp8, compressed")[0], form.name))
    assert isinstance(weight, CodedWeight)
    assert weight.rounds_inputs


@every_case
def test_what_is_missing_is_named(name: str) -> None:
    tensors, _ = made(name)
    optional = {"input_scale", "weight_shape", "weight_format", "g_idx", "qzeros"}
    if name.startswith("nf4"):
        optional.add("weight.nested_absmax")  # without it absmax has the wrong type: tested below
    for gone in set(tensors) - optional:
        rest = {key: one for key, one in tensors.items() if key != gone}
        with pytest.raises(WeightError, match=rf"{MODULE}\.\S+") as raised:
            read(name, rest)
        assert gone in str(raised.value) or "weight_scale" in gone


@every_case
def test_what_has_another_shape_is_named(name: str) -> None:
    tensors, _ = made(name)
    unchecked = {"input_scale", "weight_format", "weight.quant_state.bitsandbytes__nf4"}
    for bad in set(tensors) - unchecked:
        longer = torch.cat((tensors[bad].reshape(-1), tensors[bad].reshape(-1)[:1])).reshape(1, -1)
        with pytest.raises(WeightError, match=rf"{MODULE}\.{bad} is .* but must be"):
            read(name, tensors | {bad: longer})


@pytest.mark.parametrize("name", ["awq, groups of 32", "fp8 per tensor", "w4a16", "nf4", "w8a8"])
def test_tensors_that_mean_nothing_are_refused(name: str) -> None:
    tensors, _ = made(name)
    with pytest.raises(WeightError, match=rf"has {MODULE}.smooth, which mean nothing"):
        read(name, tensors | {"smooth": torch.ones(3)})


def test_absmax_that_is_not_nested_must_be_floating_point() -> None:
    tensors, _ = made("nf4, double")
    del tensors["weight.nested_absmax"]
    with pytest.raises(WeightError, match=r"weight.absmax is \[128\] uint8 but must be"):
        read("nf4, double", tensors)


def test_blocks_of_nf4_go_on_from_row_to_row() -> None:
    """96 inputs in blocks of 64: each 32 inputs lie in one block. bitsandbytes' own dequantisation
    on CPUs is right only for rows of whole blocks, so it is given the same numbers in such rows."""
    numbers = torch.randn(10, 96)
    tensors, _ = make_nf4(True)(numbers)
    _, exact = make_nf4(True)(numbers.view(15, 64))
    form = format_of({"quantization_config": CASES["nf4"].config})
    assert form is not None
    weight = form.linear(LinearTensors(MODULE, (10, 96), tensors, form.name))
    assert isinstance(weight, CodedWeight)
    assert weight.group_inputs == 32
    found = weight.dequantized(torch.float32).double()
    torch.testing.assert_close(found, exact.view(10, 96), rtol=1e-6, atol=1e-7)


def test_an_act_order_that_does_not_fit_the_groups_is_refused() -> None:
    name = "gptq 4, act-order, zero points"
    tensors, _ = made(name)
    tensors["g_idx"] = torch.zeros_like(tensors["g_idx"])
    with pytest.raises(WeightError, match=rf"{MODULE}.g_idx does not fit group_size 64"):
        read(name, tensors)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "quip"}, r"quantised with 'quip'.*supported: awq, .*--quantization"),
        ({"quant_method": "awq", "bits": 3}, "AWQ checkpoint has bits 3; supported: 4"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version 'gemv'.*use.*'gemm'"),
        ({"quant_method": "gptq", "bits": 3}, "GPTQ checkpoint has bits 3; supported: 4, 8"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 12}, "group_size 12"),
        (
            {"quant_method": "gptq", "bits": 4, "dynamic": {"-:(": {}}},
            "'-:\\(' in dynamic, which is no",
        ),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"x": {"bits": 2}}}, "has bits 2"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"x": 8}}, "has 8 for 'x' in dynamic"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "'marlin'"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "are e5m2; only E4M3"),
        ({"quant_method": "fp8", "weight_block_size": [128, 100]}, r"blocks of \[128, 100\]"),
        ({"quant_method": "bitsandbytes"}, "neither load_in_4bit nor load_in_8bit"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "in fp4; supported: nf4"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "'W4A8_AWQ'; supported: FP8"),
        ({"quant_method": "compressed-tensors"}, "has no config_groups"),
        ("awq", "must be an object"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(config: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        format_of({"quantization_config": config})


def groups(**weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (groups(num_bits=3, type="int"), "stores 3-bit int weights in format 'pack-quantized'"),
        (groups(num_bits=4, type="int", strategy="group", group_size=20), "group_size 20"),
        (groups(num_bits=4, type="int", strategy="block", group_size=None), "in blocks"),
        (groups(num_bits=8, type="float"), "float weights in format 'pack-quantized'"),
        (groups(num_bits=4, type="int") | {"sparsity_config": {"format": "sparse-24-bitmask"}},
         "stored sparsely"),
        (groups(num_bits=4, type="int") | {"transform_config": {"config_groups": {"R1": {}}}},
         r"transforms of activations \(R1\)"),
        (groups(num_bits=4, type="int", strategy="channel") | {"ignore": ["re:(x"]},
         "no regular expression"),
    ],
)  # fmt: skip
def test_compressed_tensors_that_are_not_supported(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        format_of({"quantization_config": config})


def test_layers_are_named_by_name_pattern_and_class() -> None:
    weights = {"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": True}
    wide = weights | {"num_bits": 8}
    form = format_of(
        {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "ignore": ["lm_head", "re:.*layers\\.0\\.mlp.*"],
                "config_groups": {
                    "a": {"targets": ["Linear"], "weights": weights},
                    "b": {"targets": ["re:.*down_proj$"], "weights": wide},
                    "c": {"targets": ["model.layers.2.mlp.down_proj"], "weights": weights},
                },
            }
        }
    )
    bits = {
        name: None if (group := form.group_of(name)) is None else group.bits  # type: ignore[union-attr]
        for name in (
            "lm_head",
            "model.embed_tokens",
            "model.layers.0.mlp.down_proj",
            "model.layers.1.mlp.down_proj",
            "model.layers.2.mlp.down_proj",
            "model.layers.0.self_attn.q_proj",
        )
    }
    assert list(bits.values()) == [None, None, None, 8, 4, 4]
