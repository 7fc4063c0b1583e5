"""Checkpoints that other tools quantised: an engine in this process, and `sapwood check`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from sapwood import LLM
from sapwood.app.cli.main import cli
from sapwood.base.errors import ConfigError
from tests.quantized_checkpoints import CASES, quantised
from tests.tiny import save_qwen3

GREEDY = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
PROMPTS = ["Hello", "What is wood?"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen3(tmp_path_factory.mktemp("plain"))


def quantise(plain: Path, directory: Path, case: str) -> Path:
    directory.mkdir()
    for file in plain.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    weights = load_file(plain / "model.safetensors")
    stored, _ = quantised(weights, lambda _: CASES[case].make)
    stored = {name: one.contiguous().clone() for name, one in stored.items()}
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = dict(CASES[case].config)
    (directory / "config.json").write_text(json.dumps(config, default=str))
    return directory


@pytest.mark.parametrize("case", ["awq, groups of 32", "fp8 per tensor", "w8a8"])
def test_a_quantised_checkpoint_is_served(plain: Path, tmp_path: Path, case: str) -> None:
    directory = quantise(plain, tmp_path / "quantised", case)
    # float32: in bfloat16 the matrix unit rounds otherwise than vectors, and how many tokens arrive
    # in time for the first step decides which of them multiplies.
    options: dict[str, Any] = {"dtype": "float32", "num_threads": 1}
    with LLM(str(directory), **options) as llm:
        together = [one.token_ids for one in llm.generate(PROMPTS, GREEDY)]
        alone = llm.generate(PROMPTS[0], GREEDY)[0].token_ids
    assert together[0] == alone
    with LLM(str(directory), disable_graphs=True, **options) as llm:
        assert [one.token_ids for one in llm.generate(PROMPTS, GREEDY)] == together


def test_check_says_what_the_checkpoint_is(plain: Path, tmp_path: Path) -> None:
    directory = quantise(plain, tmp_path / "quantised", "fp8 per tensor")
    found = CliRunner().invoke(cli, ["check", "--model", str(directory)], env={"COLUMNS": "400"})
    assert found.exit_code == 0, found.output
    text = " ".join(found.output.split())
    assert "FP8 E4M3 weights, scales per tensor or output; activations as they are (W8A16)" in text


@pytest.mark.parametrize("quantization", ["w8a16", "fp8"])
def test_any_checkpoint_is_quantised_to_codes_while_it_loads(
    plain: Path, quantization: str
) -> None:
    with LLM(str(plain), quantization=quantization, dtype="bfloat16", num_threads=1) as llm:
        assert [len(one.token_ids) for one in llm.generate(PROMPTS, GREEDY)] == [8, 8]


def test_a_quantised_checkpoint_is_not_quantised_again(plain: Path, tmp_path: Path) -> None:
    directory = quantise(plain, tmp_path / "quantised", "gptq 4, groups of 32")
    with pytest.raises(ConfigError, match=r"w4a8 .* quantised already \(GPTQ: 4-bit"):
        LLM(str(directory), quantization="w4a8")
