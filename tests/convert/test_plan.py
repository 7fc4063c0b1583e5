from __future__ import annotations

from typing import Any

import pytest

from sapwood.base.errors import ConfigError, WeightError
from sapwood.convert.options import ConvertOptions
from sapwood.convert.plan import Plan, make_plan
from sapwood.kernels.torch_ops import TorchKernels
from sapwood.models.registry import decoder_class, read_decoder
from tests.tiny import llama_config

DOWN = "model.layers.0.mlp.down_proj"


def plan(*ignore: str, options: ConvertOptions | None = None, **fields: Any) -> Plan:
    decoder = read_decoder(llama_config(**fields))
    return make_plan(
        decoder_class(decoder.architecture),
        decoder,
        TorchKernels(),
        options or ConvertOptions(scheme="int4"),
        ignore=ignore,
    )


def test_every_linear_layer_but_the_output_layer_is_converted() -> None:
    found = plan()
    assert len(found.converted) == 2 * 7
    assert found.ignored == ("lm_head",)
    assert ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj") in found.fused
    assert "lm_head.weight" not in plan(tie_word_embeddings=True).shapes


def test_what_is_ignored_is_named_whole() -> None:
    found = plan(r".*\.mlp\.down_proj$", "lm_head")
    assert found.ignored == (DOWN, "model.layers.1.mlp.down_proj", "lm_head")
    assert len(found.converted) == 2 * 6


@pytest.mark.parametrize(
    ("ignore", "message"),
    [
        ("(", "no regular expression"),
        ("down_proj", "matches none of the 14 linear layers.*begin it with"),
        (r".*q_proj", "computes? as one product; ignore all or none"),
        (r".*", "leaves no layer to convert"),
    ],
)
def test_what_cannot_be_ignored(ignore: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(ignore)


def test_the_largest_group_that_fits_is_chosen() -> None:
    assert plan().scheme.group_size == 32  # sizes are 64 and 96
    assert plan(intermediate_size=128).scheme.group_size == 64
    assert plan(r".*down_proj").scheme.group_size == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ConvertOptions(scheme="int4", group_size=128), "down_proj.*96 inputs are no multiple"),
        (ConvertOptions(scheme="fp8_block"), "no multiples of 128"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: ConvertOptions, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(options=options)


def test_tensors_are_checked_before_any_work() -> None:
    found = plan(tie_word_embeddings=True)
    names = set(found.shapes)
    found.check_names({*names, "lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"})
    with pytest.raises(WeightError, match=f"1 tensors are missing.*{DOWN}"):
        found.check_names(names - {f"{DOWN}.weight"})
    with pytest.raises(WeightError, match=r"unexpected.*other\.weight"):
        found.check_names({*names, "other.weight"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scheme": "int8", "group_size": 32}, "for --format gptq, not for int8 in"),
        ({"scheme": "fp8", "asymmetric": True}, "are for --scheme int4 and for"),
        (
            {"scheme": "fp8", "format": "awq"},
            "--format awq cannot hold --scheme fp8, which compressed-tensors can; it holds int4",
        ),
        (
            {"scheme": "nf4", "format": "gptq"},
            "which bitsandbytes can; it holds int4 and int8",
        ),
        ({"scheme": "int4", "group_size": 0}, "--group-size is 0"),
        ({"method": "nearest", "damping": 0.1}, "--damping is an option of gptq"),
        ({"method": "nearest", "act_order": False}, "--act-order is an option of gptq"),
        (
            {"scheme": "fp8", "method": "nearest", "calibration_tokens": 4096},
            "uses no calibration text",
        ),
        ({"fast": True, "method": "gptq"}, "which --method gptq needs"),
        ({"fast": True, "rescale": True}, "which --rescale needs"),
        ({"fast": True, "calibration_tokens": 4096}, "uses no calibration text"),
        ({"scheme": "int4", "damping": 0.0}, "above 0 and at most 1"),
        ({"window": 1}, "--window is 1"),
        ({"num_text_tokens": 10}, "--num-text-tokens is 10 but must be at least one --window"),
        ({"max_shard_size": 0.0}, "--max-shard-size is 0.0"),
        ({"scheme": "int5"}, "must be one of: int8, fp8, fp8_block, int4, nvfp4, mxfp4, nf4"),
    ],
)
def test_options_that_contradict_each_other(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ConvertOptions(**fields)


def test_fast_needs_no_text() -> None:
    fast = ConvertOptions(fast=True)
    assert (fast.rounding, fast.rescales, fast.needs_calibration) == ("nearest", False, False)
    assert fast.scored_tokens == 0
    assert ConvertOptions(fast=True, num_text_tokens=4096).scored_tokens == 4096
    assert ConvertOptions(fast=True, text_file="text.txt").scored_tokens > 0
    slow = ConvertOptions()
    assert (slow.rounding, slow.rescales) == ("gptq", True)
    assert slow.scored_tokens > 0
