from dataclasses import replace

import pytest

from sapwood.base.errors import ConfigError
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.config.facts import CheckpointFacts
from sapwood.schema.config.memory import MemoryConfig
from sapwood.schema.config.model import CHECKPOINT_FORMATS, ON_THE_FLY, ModelConfig
from sapwood.schema.config.resolve import QUANTIZED_BYTES, resolve
from tests.schema.config.test_resolve import CPU, GIB, MODEL

GGUF = replace(MODEL, weight_format="gguf")
SAFETENSORS = replace(MODEL, weight_format="safetensors")


def asked(quantization, **memory):
    return EngineConfig(model=ModelConfig(quantization=quantization), memory=MemoryConfig(**memory))


def reason(config, model):
    _, decisions = resolve(config, CPU, model)
    return next(one.reason for one in decisions if one.option == "quantization")


def test_nobody_asked_for_quantisation():
    _, decisions = resolve(asked(None), CPU, GGUF)
    assert "quantization" not in {one.option for one in decisions}


@pytest.mark.parametrize("quantization", ON_THE_FLY)
def test_what_was_quantised_before_is_dequantised_first_and_that_is_said(quantization):
    assert "dequantised first" in reason(asked(quantization), GGUF)
    assert "dequantised" not in reason(asked(quantization), SAFETENSORS)


def test_blocks_of_a_gguf_file_are_taken_as_they_are():
    blocks = "asked for; the file's own blocks,"
    assert reason(asked("gguf"), GGUF) == f"{blocks} activations in 16 bits"
    assert reason(asked("gguf_a8"), GGUF) == f"{blocks} int8 activations"


@pytest.mark.parametrize("weight_format", ["safetensors", "pt", "dummy", ""])
def test_blocks_of_other_files_are_refused(weight_format):
    model = replace(MODEL, weight_format=weight_format)
    wanted = rf"weights of small are {weight_format or 'of another format'}; use .*w4a8 or w8a8"
    with pytest.raises(ConfigError, match=f"--quantization gguf.*{wanted}"):
        resolve(asked("gguf"), CPU, model)


@pytest.mark.parametrize("quantization", [*ON_THE_FLY, "gguf"])
def test_fp16_activations_are_refused(quantization):
    config = EngineConfig(model=ModelConfig(quantization=quantization, dtype="float16"))
    with pytest.raises(ConfigError, match=rf"{quantization} .*not with float16.*--dtype bfloat16"):
        resolve(config, CPU, GGUF)


def test_choices_that_do_not_exist_are_refused():
    with pytest.raises(ConfigError, match=r"quantization.*qoq"):
        ModelConfig(quantization="qoq")


@pytest.mark.parametrize("name", sorted(set(CHECKPOINT_FORMATS) - {"fp8"}))
def test_formats_of_other_tools_need_such_a_checkpoint(name):
    with pytest.raises(ConfigError, match=rf"--quantization {name} is for checkpoints.*fp8"):
        resolve(asked(name), CPU, SAFETENSORS)


AWQ = replace(SAFETENSORS, quantized=CheckpointFacts("awq", "AWQ: 4-bit weights", 0.5))


@pytest.mark.parametrize("named", [None, "awq"])
def test_a_quantised_checkpoint_says_itself_what_it_is(named):
    config, _ = resolve(asked(named), CPU, AWQ)
    assert config.model.quantization == "awq"
    assert reason(asked(named), AWQ) == "the checkpoint's own; AWQ: 4-bit weights"


@pytest.mark.parametrize("other", ["w8a8_int8", "fp8", "gptq", "gguf"])
def test_a_quantised_checkpoint_cannot_be_something_else(other):
    message = rf"--quantization {other} was asked for, but .* quantised already \(AWQ: 4-bit"
    with pytest.raises(ConfigError, match=message):
        resolve(asked(other), CPU, AWQ)


def test_random_weights_are_not_in_a_checkpoints_format():
    with pytest.raises(ConfigError, match=r"dummy makes weights that are not quantised.*awq"):
        resolve(asked(None), CPU, replace(AWQ, weight_format="dummy"))


def test_a_quantised_checkpoint_cannot_be_computed_in_fp16():
    config = EngineConfig(model=ModelConfig(dtype="float16"))
    with pytest.raises(ConfigError, match="awq computes with bfloat16"):
        resolve(config, CPU, AWQ)


BLOCKS = replace(GGUF, file_bytes=GGUF.num_parameters * 5 // 8)
HALVES = replace(GGUF, file_bytes=GGUF.num_parameters * 2)


def test_a_gguf_files_own_blocks_are_the_default_on_a_cpu():
    config, _ = resolve(asked(None), CPU, BLOCKS)
    assert config.model.quantization == "gguf"
    said = reason(asked(None), BLOCKS)
    assert "5.0 bits per weight" in said
    assert "--quantization none expands them" in said


@pytest.mark.parametrize(
    ("options", "model", "device"),
    [
        ({"quantization": "none"}, BLOCKS, "cpu"),
        ({}, HALVES, "cpu"),
        ({}, replace(BLOCKS, weight_format="safetensors"), "cpu"),
        ({}, BLOCKS, "cuda"),
        ({"dtype": "float16"}, BLOCKS, "cpu"),
        ({"dtype": "float32", "weight_dtype": "bfloat16"}, BLOCKS, "cpu"),
        ({}, replace(BLOCKS, whole_prompts=True), "cpu"),
    ],
    ids=["none", "16 bits", "another format", "GPU", "float16", "weight dtype", "encoder"],
)
def test_where_blocks_are_not_the_default(options, model, device):
    machine = replace(CPU, device=device)
    config, decisions = resolve(EngineConfig(model=ModelConfig(**options)), machine, model)
    assert config.model.quantization is None
    assert all(one.option != "quantization" for one in decisions)


def test_no_choice_of_weight_dtype_is_told_where_weights_are_blocks():
    machine = replace(CPU, fast_bfloat16=False)
    _, decisions = resolve(asked(None), machine, BLOCKS)
    assert all(one.option != "weight_dtype" for one in decisions)


def test_smaller_weights_leave_more_for_the_pool():
    model = replace(
        GGUF, num_parameters=4 * 10**9, num_embedding_parameters=10**9, context_length=16384
    )
    bytes_per_token = sum(
        group.with_dtypes(kv="bfloat16", activations="bfloat16").unit_bytes for group in model.cache
    )
    pools = {
        choice: resolve(asked(choice, mem_fraction_static=0.5), CPU, model)[
            0
        ].memory.max_total_tokens
        * bytes_per_token
        for choice in (None, *QUANTIZED_BYTES)
    }
    for choice in QUANTIZED_BYTES:
        # The embedding is looked up in the model's dtype beside the quantised output layer.
        weight_bytes = 4 * 10**9 * QUANTIZED_BYTES[choice] + 2 * 10**9
        assert pools[choice] == pytest.approx(12 * GIB - weight_bytes, abs=1e6)
    assert pools[None] == pytest.approx(12 * GIB - 8 * 10**9, abs=1e6)
