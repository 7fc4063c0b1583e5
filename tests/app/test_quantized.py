"""Quantised weights end to end: an engine in this process with a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sapwood import LLM
from sapwood.app.building.resolving import resolve_config
from sapwood.base.errors import ConfigError
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.config.execution import ExecutionConfig
from sapwood.schema.config.model import ModelConfig
from tests.tiny import llama_config

MakeLLM = Callable[..., LLM]
GREEDY = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
PROMPTS = ["Hello", "What is wood?", "1, 2, 3"]


@pytest.mark.parametrize("quantization", ["w8a8_int8", "w4a8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_outputs_do_not_depend_on_graphs_or_company(
    make_llm: MakeLLM, quantization: str, dtype: str
) -> None:
    options = {"quantization": quantization, "dtype": dtype}
    llm = make_llm(**options)
    together = [result.token_ids for result in llm.generate(PROMPTS, GREEDY)]
    assert all(len(token_ids) == 12 for token_ids in together)
    by_ops = make_llm(**options, disable_graphs=True)
    assert [result.token_ids for result in by_ops.generate(PROMPTS, GREEDY)] == together


@pytest.mark.parametrize("kernels", ["torch", "reference"])
def test_kernels_that_dequantise_say_so(tiny_llama: Path, tmp_path: Path, kernels: str) -> None:
    asked = EngineConfig(
        model=ModelConfig(
            model=str(tiny_llama), load_format="dummy", dtype="float32", quantization="w8a8_int8"
        ),
        execution=ExecutionConfig(kernels=kernels),
    )
    decisions = resolve_config(asked, home=tmp_path).decisions
    reasons = [one.reason for one in decisions if one.option == "quantization"]
    said = "torch kernels dequantise: no less memory than float32" in reasons
    assert said == (kernels == "torch")


def test_kernels_that_dequantise_serve_as_well(make_llm: MakeLLM) -> None:
    llm = make_llm(quantization="w4a8", kernels="torch")
    [result] = llm.generate("Hello", GREEDY)
    assert len(result.token_ids) == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "gguf"}, "--quantization gguf uses the blocks of a GGUF file"),
        ({"quantization": "w4a8", "dtype": "float16"}, "not with float16; use --dtype bfloat16"),
        ({"quantization": "awq"}, "quantization"),
    ],
)
def test_combinations_that_cannot_be(
    make_llm: MakeLLM, options: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_llm(**options)


@pytest.mark.parametrize(("hidden", "refused"), [(64, False), (80, True)])
def test_four_bits_need_layers_of_whole_blocks(
    tmp_path: Path, make_llm: MakeLLM, tiny_llama: Path, hidden: int, refused: bool
) -> None:
    directory = tmp_path / "odd"
    directory.mkdir()
    for file in tiny_llama.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    (directory / "config.json").write_text(json.dumps(llama_config(hidden_size=hidden)))
    options = {"load_format": "dummy", "dtype": "float32", "num_threads": 1}
    if not refused:
        with LLM(str(directory), quantization="w4a8", **options) as llm:
            assert len(llm.generate("Hello", GREEDY)[0].token_ids) == 12
        return
    with pytest.raises(ConfigError, match=r"a linear layer of this model has 80.*w8a8_int8"):
        LLM(str(directory), quantization="w4a8", **options)
    with LLM(str(directory), quantization="w8a8_int8", **options) as llm:
        assert len(llm.generate("Hello", GREEDY)[0].token_ids) == 12


def test_a_checkpoint_that_is_quantised_in_an_unknown_way_is_refused_by_name(
    tmp_path: Path, tiny_llama: Path
) -> None:
    directory = tmp_path / "quip"
    directory.mkdir()
    for file in tiny_llama.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    config = llama_config(quantization_config={"quant_method": "quip", "bits": 2})
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"weights are quantised with 'quip'"):
        LLM(str(directory), load_format="dummy", quantization="w8a8_int8")
