from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sapwood.app.building.model_defaults import (
    checkpoint_dtype,
    eos_token_ids,
    read_json,
    read_json_if_there,
    sampling_defaults,
)
from sapwood.base.errors import ModelSourceError


def write(directory: Path, name: str, content: Any) -> None:
    (directory / name).write_text(json.dumps(content))


def test_a_missing_or_broken_file_says_which(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(ModelSourceError, match=r"config\.json is missing"):
        read_json(path)
    assert read_json_if_there(path) == {}
    for content, words in [("{", "not valid JSON"), ("[1]", "must hold a JSON object")]:
        path.write_text(content)
        with pytest.raises(ModelSourceError, match=words):
            read_json_if_there(path)
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ModelSourceError, match="not valid JSON"):
        read_json(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ModelSourceError, match="cannot be read"):
        read_json(path)


@pytest.mark.parametrize(
    ("generation", "config", "ids"),
    [
        ({"eos_token_id": [2, 5]}, {"eos_token_id": 9}, {2, 5}),
        ({"eos_token_id": 2}, None, {2}),
        ({"eos_token_id": 0}, None, {0}),
        ({"eos_token_id": None}, {"eos_token_id": 9}, {9}),
        ({"eos_token_id": []}, {"eos_token_id": 9}, {9}),
        (None, {"eos_token_id": [9]}, {9}),
        (None, None, set()),
        ({}, {}, set()),
    ],
)
def test_ends_of_sequence(tmp_path: Path, generation: Any, config: Any, ids: set[int]) -> None:
    if generation is not None:
        write(tmp_path, "generation_config.json", generation)
    if config is not None:
        write(tmp_path, "config.json", config)
    assert eos_token_ids(tmp_path, vocab_size=10) == ids


@pytest.mark.parametrize("wrong", ["</s>", [2, "</s>"], True, 2.5])
def test_an_end_of_sequence_that_is_no_id_is_refused(tmp_path: Path, wrong: object) -> None:
    write(tmp_path, "generation_config.json", {"eos_token_id": wrong})
    with pytest.raises(ModelSourceError, match=r"eos_token_id in .*generation_config\.json"):
        eos_token_ids(tmp_path, vocab_size=10)


@pytest.mark.parametrize("beyond", [10, -1, 2**40])
def test_an_end_of_sequence_beyond_the_vocabulary_is_refused(tmp_path: Path, beyond: int) -> None:
    write(tmp_path, "generation_config.json", {"eos_token_id": [9, beyond]})
    with pytest.raises(ModelSourceError, match=f"is {beyond}, but the model has only 10 tokens"):
        eos_token_ids(tmp_path, vocab_size=10)


@pytest.mark.parametrize("wrong", [True, "0.7", [0.7]])
def test_a_sampling_default_that_is_no_number_is_refused(tmp_path: Path, wrong: object) -> None:
    write(tmp_path, "generation_config.json", {"temperature": wrong})
    with pytest.raises(ModelSourceError, match=r"temperature in .*generation_config\.json is"):
        sampling_defaults(tmp_path)


def test_sampling_defaults(tmp_path: Path) -> None:
    assert sampling_defaults(tmp_path) == {}
    write(
        tmp_path,
        "generation_config.json",
        {
            "temperature": 0.6,
            "top_p": 0.9,
            "top_k": 0,
            "min_p": None,
            "max_length": 20,
            "do_sample": True,
        },
    )
    assert sampling_defaults(tmp_path) == {"temperature": 0.6, "top_p": 0.9, "top_k": -1}


def test_the_checkpoints_data_type() -> None:
    assert checkpoint_dtype({"dtype": "bfloat16", "torch_dtype": "float16"}) == "bfloat16"
    assert checkpoint_dtype({"torch_dtype": "float16"}) == "float16"
    assert checkpoint_dtype({}) == "float32"
