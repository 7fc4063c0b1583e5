"""`sapwood convert`, then sapwood serves what it wrote."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from sapwood.app.cli.main import cli
from sapwood.bench.cli import bench
from tests.tiny import save_qwen3

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 50
CALIBRATION = "Call me Ishmael. Some years ago, never mind how long precisely. " * 80
WINDOW = 64
SCHEMES = {
    "int8": ["--scheme", "int8"],
    "fp8": ["--scheme", "fp8"],
    "fp8_block": ["--scheme", "fp8_block"],
    "int4": ["--scheme", "int4", "--group-size", "32"],
    "int4 asymmetric": ["--scheme", "int4", "--asymmetric"],
    "nvfp4": ["--scheme", "nvfp4"],
    "mxfp4": ["--scheme", "mxfp4"],
    "nf4": ["--scheme", "nf4"],
    "awq": ["--scheme", "int4", "--format", "awq"],
    "gptq": ["--scheme", "int4", "--format", "gptq", "--asymmetric"],
    "gptq, 8 bits": ["--scheme", "int8", "--format", "gptq"],
    "bitsandbytes int8": ["--scheme", "int8", "--format", "bitsandbytes"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "tiny"
    return save_qwen3(directory, hidden_size=128, num_hidden_layers=2, num_key_value_heads=4)


@pytest.fixture
def invoke(tmp_path: Path) -> Callable[..., None]:
    num_threads = torch.get_num_threads()
    environment = {"COLUMNS": "160", "SAPWOOD_HOME": str(tmp_path / "home")}
    (tmp_path / "text.txt").write_text(TEXT)
    shared = ["--text-file", str(tmp_path / "text.txt"), "--window", str(WINDOW)]
    shared += ["--num-text-tokens", str(32 * WINDOW), "--num-threads", "1"]

    def run(command: object, *arguments: str) -> None:
        try:
            result = CliRunner(env=environment).invoke(command, [*arguments, *shared])  # type: ignore[arg-type]
        finally:
            torch.set_num_threads(num_threads)
        assert result.exit_code == 0, (result.output, result.exception)

    return run


@pytest.mark.parametrize("name", SCHEMES)
def test_what_was_converted_is_served_with_the_perplexity_that_was_reported(
    name: str, model: Path, invoke: Callable[..., None], tmp_path: Path
) -> None:
    arguments, out = SCHEMES[name], tmp_path / "out"
    options = ["--dtype", "float32", *arguments]
    if name != "int8":  # one with the text that is taken where none is given: that is long
        (tmp_path / "calibration.txt").write_text(CALIBRATION)
        options += ["--calibration-file", str(tmp_path / "calibration.txt")]
    invoke(cli, "convert", str(model), str(out), *options)
    results = ["--output-dir", str(tmp_path / "results")]
    invoke(bench, "perplexity", "--model", str(out), "--dtype", "float32", *results)
    (path,) = (tmp_path / "results").glob("perplexity-*.json")
    served = json.loads(path.read_text())["perplexity"]
    reported = json.loads((out / "conversion.json").read_text())
    # sapwood does not round the inputs of FP8 layers, and those of int8 per 64 of them. Else it
    # computes what was measured.
    rounds_inputs = arguments[1] in ("int8", "fp8", "fp8_block") and "--format" not in arguments
    difference = abs(math.log(served / reported["perplexity_after"]))
    assert difference < (0.02 if rounds_inputs else 1e-4)
