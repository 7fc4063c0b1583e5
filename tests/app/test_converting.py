"""`sapwood convert` on tiny random models: what it writes is read by transformers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from click.testing import CliRunner, Result
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from sapwood.app.cli.main import cli
from sapwood.text.tokenizer import Tokenizer
from tests.gguf_sample import GgufSample
from tests.tiny import save_lfm2, save_qwen3, write_llama

WINDOW = 64
NUM_TEXT_TOKENS = 4 * WINDOW
TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 12
CALIBRATION = "Call me Ishmael. Some years ago, never mind how long precisely. " * 40

Convert = Callable[..., Result]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sizes are multiples of 128, which blocks need."""
    return save_qwen3(
        tmp_path_factory.mktemp("model") / "tiny",
        hidden_size=128,
        num_hidden_layers=2,
        num_key_value_heads=4,
    )


@pytest.fixture
def convert(tmp_path: Path) -> Convert:
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "calibration.txt").write_text(CALIBRATION)
    num_threads = torch.get_num_threads()

    def run(model: Path, *arguments: str) -> Result:
        command = ["convert", str(model), str(tmp_path / "out"), "--window", str(WINDOW)]
        command += ["--num-threads", "1", "--dtype", "float32", "--kernels", "torch"]
        command += ["--text-file", str(tmp_path / "text.txt")]
        command += ["--num-text-tokens", str(NUM_TEXT_TOKENS)]
        if not {"nearest", "--fast"} & set(arguments):
            command += ["--calibration-file", str(tmp_path / "calibration.txt")]
        environment = {"COLUMNS": "160", "SAPWOOD_HOME": str(tmp_path / "home")}
        try:
            return CliRunner(env=environment).invoke(cli, [*command, *arguments])
        finally:
            torch.set_num_threads(num_threads)

    return run


def report(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "conversion.json").read_text())
    return found


@torch.inference_mode()
def perplexity_in_transformers(
    directory: Path, *, dequantize: bool = False, dtype: torch.dtype = torch.float32
) -> float:
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    loaded = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, **(options if dequantize else {})
    ).eval()
    token_ids = Tokenizer.from_directory(directory).encode(TEXT, add_special_tokens=False)
    total = 0.0
    for first in range(0, NUM_TEXT_TOKENS, WINDOW):
        window = torch.tensor([token_ids[first : first + WINDOW]])
        scores = loaded(window).logits[0, :-1].float().log_softmax(dim=-1)
        total -= scores.gather(1, window[0, 1:, None]).sum().item()
    return math.exp(total / (NUM_TEXT_TOKENS // WINDOW * (WINDOW - 1)))


SCHEMES = {
    "int8": ["--scheme", "int8"],
    "fp8": ["--scheme", "fp8", "--method", "nearest"],
    "fp8_block": ["--scheme", "fp8_block", "--method", "nearest"],
    "int4": ["--scheme", "int4", "--group-size", "32"],
    "int4 asymmetric": ["--scheme", "int4", "--asymmetric", "--rescale", "--no-act-order"],
    "nvfp4": ["--scheme", "nvfp4"],
    "mxfp4": ["--scheme", "mxfp4"],
    "nf4": ["--scheme", "nf4"],
    "bitsandbytes int8": ["--scheme", "int8", "--format", "bitsandbytes"],
}


@pytest.mark.parametrize("arguments", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_transformers_finds_the_perplexity_that_is_reported(
    arguments: list[str], model: Path, convert: Convert, tmp_path: Path
) -> None:
    result = convert(model, *arguments)
    assert result.exit_code == 0, result.output
    found = report(tmp_path / "out")
    assert f"{found['perplexity_after']:.4f}" in result.output
    assert found["num_scored_tokens"] == 4 * (WINDOW - 1)
    before = perplexity_in_transformers(model)
    assert found["perplexity_before"] == pytest.approx(before, rel=1e-3)
    # The library rounds inputs a little differently (its int8 has 255 steps), so not exactly.
    # transformers makes unpacked zero points on the meta device, and then finds packed ones.
    dequantize = "--asymmetric" in arguments
    # Weights in FP4 it rounds to bfloat16, and computes with nothing else.
    is_fp4 = arguments[1].endswith("fp4")
    dtype = torch.bfloat16 if is_fp4 else torch.float32
    after = perplexity_in_transformers(tmp_path / "out", dequantize=dequantize, dtype=dtype)
    assert found["perplexity_after"] == pytest.approx(after, rel=1e-2 if is_fp4 else 5e-3)
    assert found["perplexity_after"] != found["perplexity_before"]
    weights = tmp_path / "out" / "model.safetensors"
    assert found["bytes_after"] == sum(one.nbytes for one in load_file(weights).values())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_layers_with_states_are_converted(convert: Convert, tmp_path: Path) -> None:
    hybrid = save_lfm2(tmp_path / "hybrid", hidden_size=128)
    result = convert(hybrid, "--scheme", "int8")
    assert result.exit_code == 0, result.output
    found = report(tmp_path / "out")
    before = perplexity_in_transformers(hybrid)
    assert found["perplexity_before"] == pytest.approx(before, rel=1e-3)
    after = perplexity_in_transformers(tmp_path / "out")
    assert found["perplexity_after"] == pytest.approx(after, rel=1e-2)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights["model.layers.0.conv.in_proj.weight"].dtype == torch.int8


def test_a_layer_that_is_ignored_is_as_it_was(
    model: Path, convert: Convert, tmp_path: Path
) -> None:
    result = convert(model, "--scheme", "int4", "--ignore", r".*\.1\.mlp")
    assert result.exit_code == 0, result.output
    before = load_file(model / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("lm_head", "model.embed_tokens", "model.norm", "model.layers.1.mlp.up_proj"):
        assert torch.equal(before[f"{name}.weight"], after[f"{name}.weight"])
    assert "model.layers.0.mlp.up_proj.weight_packed" in after
    assert "model.layers.0.mlp.up_proj.weight" not in after
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "model.layers.1.mlp.up_proj" in config["ignore"]
    # Exactly the packed weights, read by the library, are what was computed with.
    scheme = QuantizationConfig(**config).config_groups["group_0"]
    name = "model.layers.0.mlp.down_proj"
    stored = {key.removeprefix(f"{name}."): value for key, value in after.items() if name in key}
    read = BaseCompressor.get_value_from_registry(config["format"]).decompress(stored, scheme)
    error = (read["weight"] - before[f"{name}.weight"]).norm() / before[f"{name}.weight"].norm()
    (row,) = (row for row in report(tmp_path / "out")["layers"] if row["name"] == name)
    assert row["weight_error"] == pytest.approx(error.item(), rel=1e-4)


def test_the_tokenizer_comes_along_and_shards_are_read(
    model: Path, convert: Convert, tmp_path: Path
) -> None:
    arguments = ["--method", "nearest", "--no-rescale", "--num-text-tokens", "0"]
    result = convert(model, *arguments, "--max-shard-size", "0.0002")
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert report(tmp_path / "out")["perplexity_after"] is None
    tokenizer = Tokenizer.from_directory(tmp_path / "out")
    assert tokenizer.encode("times") == Tokenizer.from_directory(model).encode("times")
    assert tokenizer.chat_templates
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert "model.layers.0.self_attn.q_proj.weight_scale" in index["weight_map"]


def test_a_dry_run_says_the_size_and_writes_nothing(
    model: Path, convert: Convert, tmp_path: Path
) -> None:
    result = convert(model, "--scheme", "int4", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "14 linear layers in int4, a scale per 128 inputs; gptq" in result.output
    assert not (tmp_path / "out").exists()
    assert convert(model, "--scheme", "int4").exit_code == 0
    size = report(tmp_path / "out")["bytes_after"]
    assert f"become {size / 1e6:.1f} MB" in result.output


def test_a_conversion_says_how_long_it_takes_and_how_far_it_is(
    model: Path, convert: Convert
) -> None:
    result = convert(model, "--scheme", "int4")
    assert result.exit_code == 0, result.output
    assert re.search(r"takes about \d+ s on this machine", result.output)
    label = f"converting {model} to int4"
    assert re.search(rf"{re.escape(label)}: \d+% after \d+ s, about \d+ s left", result.stderr)


def test_a_source_that_is_quantised_already_is_named(convert: Convert, tmp_path: Path) -> None:
    sample = GgufSample()
    kind = gguf.GGMLQuantizationType.Q4_1
    for name, weight in sample.weights().items():
        if name.startswith("blk.") and weight.ndim == 2:
            sample.raw[name] = gguf.quantize(weight, kind), kind
    source = sample.write(tmp_path / "q4.gguf")
    arguments = ["--dry-run", "--num-text-tokens", "0", "--fast"]
    result = convert(source, "--scheme", "int8", *arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "quantised already (Q4_1, 5.0 bits a weight), with fewer bits than the" in result.output
    assert "serve the file as it is" in result.output
    result = convert(source, "--scheme", "int4", "--group-size", "32", *arguments)
    assert "its weights are rounded a second time" in result.output
    plain = GgufSample().write(tmp_path / "f32.gguf")
    assert "quantised already" not in convert(plain, "--scheme", "int8", *arguments).output


def test_a_fast_conversion_needs_no_text(model: Path, convert: Convert, tmp_path: Path) -> None:
    result = convert(model, "--scheme", "int4", "--fast")
    assert result.exit_code == 0, (result.output, result.exception)
    assert report(tmp_path / "out")["layers"][0]["output_error"] is None


def test_what_is_there_is_not_overwritten(model: Path, convert: Convert, tmp_path: Path) -> None:
    nearest = ["--method", "nearest", "--no-rescale", "--num-text-tokens", "0"]
    assert convert(model, *nearest).exit_code == 0
    first = (tmp_path / "out" / "conversion.json").read_text()
    result = convert(model, *nearest)
    assert result.exit_code != 0
    assert "--force" in str(result.exception)
    assert (tmp_path / "out" / "conversion.json").read_text() == first
    assert convert(model, *nearest, "--scheme", "fp8", "--force").exit_code == 0
    assert report(tmp_path / "out")["options"]["scheme"] == "fp8"


def test_what_was_converted_is_not_converted_again(
    model: Path, convert: Convert, tmp_path: Path
) -> None:
    nearest = ["--method", "nearest", "--no-rescale", "--num-text-tokens", "0"]
    assert convert(model, *nearest).exit_code == 0
    (tmp_path / "out").rename(tmp_path / "converted")
    result = convert(tmp_path / "converted", *nearest)
    assert "quantised" in str(result.exception)


def test_weights_that_are_no_numbers_are_named(
    model: Path, convert: Convert, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in model.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors[name] = tensors[name].clone()
    tensors[name][3, 4] = math.inf
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    result = convert(broken)
    assert f"{name} has numbers that are not finite" in str(result.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--window", "5000"], "the model's context is 256 tokens"),
        (["--load-format", "dummy"], "no weights to convert"),
        (["--text-file", "/nowhere"], "cannot read --text-file /nowhere"),
        (["--calibration-tokens", "32"], "at least one --window"),
    ],
)
def test_what_cannot_be_done_is_explained(
    arguments: list[str], message: str, model: Path, convert: Convert, tmp_path: Path
) -> None:
    if "5000" in arguments:
        arguments = [*arguments, "--num-text-tokens", "5000"]
    result = convert(model, *arguments)
    assert result.exit_code != 0
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_a_directory_without_weights_is_refused(convert: Convert, tmp_path: Path) -> None:
    result = convert(write_llama(tmp_path / "empty"))
    assert "weights" in str(result.exception)


def test_a_tied_model_is_converted_and_measured(convert: Convert, tmp_path: Path) -> None:
    tied = save_qwen3(tmp_path / "tied", num_hidden_layers=1, tie_word_embeddings=True)
    result = convert(tied, "--scheme", "int8")
    assert result.exit_code == 0, (result.output, result.exception)
    found = report(tmp_path / "out")
    assert found["perplexity_before"] == pytest.approx(perplexity_in_transformers(tied), rel=1e-3)
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
