"""`sapwood bench perplexity`, on tiny models made on the spot."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from sapwood.base.errors import ConfigError, WeightError
from sapwood.bench.cli import bench
from tests.tiny import VOCAB, write_llama

TEXT = "It was the best of times, it was the worst of times. " * 12

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    model = write_llama(tmp_path / "tiny")
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    num_threads = torch.get_num_threads()

    def run(*arguments: str) -> Result:
        command = [
            "perplexity",
            *("--model", str(model), "--load-format", "dummy", "--num-threads", "1"),
            *("--text-file", str(text), "--window", "64", "--num-text-tokens", "192"),
            *("--output-dir", str(tmp_path / "out"), *arguments),
        ]
        try:
            environment = {"COLUMNS": "160", "SAPWOOD_HOME": str(tmp_path / "home")}
            return CliRunner(env=environment).invoke(bench, command)
        finally:
            torch.set_num_threads(num_threads)

    return run


def report(tmp_path: Path) -> dict[str, Any]:
    (path,) = (tmp_path / "out").glob("perplexity-*.json")
    found = json.loads(path.read_text())
    path.unlink()
    return found


def test_random_weights_know_about_nothing(run: Run, tmp_path: Path) -> None:
    result = run("--dtype", "float32")
    assert result.exit_code == 0, result.output
    found = report(tmp_path)
    assert found["num_tokens"] == 3 * 63
    assert found["perplexity"] == pytest.approx(math.exp(found["negative_log_likelihood"]))
    assert found["perplexity"] == pytest.approx(VOCAB, rel=0.1)
    assert f"{found['perplexity']:.4f}" in result.output
    assert found["options"]["engine"]["model"]["dtype"] == "float32"


@pytest.mark.parametrize("quantization", ["w8a8_int8", "w4a8"])
def test_quantised_weights_are_named_and_nearly_as_good(
    run: Run, tmp_path: Path, quantization: str
) -> None:
    assert run("--dtype", "float32").exit_code == 0
    exact = report(tmp_path)["perplexity"]
    result = run("--dtype", "float32", "--quantization", quantization)
    assert result.exit_code == 0, result.output
    assert quantization in result.output
    found = report(tmp_path)["perplexity"]
    assert found != exact
    assert found == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--window", "300", "--num-text-tokens", "300"), "--window is 300 but the model's"),
        (("--text-file", "nowhere.txt"), "cannot read --text-file nowhere.txt"),
        (("--quantization", "gguf"), "--quantization gguf uses the blocks of a GGUF file"),
    ],
)
def test_what_cannot_be_measured_says_why(
    run: Run, arguments: tuple[str, ...], message: str
) -> None:
    result = run(*arguments)
    assert result.exit_code != 0
    assert isinstance(result.exception, ConfigError | WeightError)
    assert message in str(result.exception)
