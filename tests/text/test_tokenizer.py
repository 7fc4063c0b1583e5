"""Loading a tokenizer from a directory, against transformers on the same files."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from sapwood.base.errors import InvalidRequest, ModelSourceError
from sapwood.text.tokenizer import Tokenizer

TEXTS = ["Hello world", " two  spaces\n", "你好 😀 été", "<|begin|>hi<|end|> <tool_call>", ""]


def write(directory: Path, backend: Backend, config: dict[str, Any] | None = None) -> Path:
    backend.save(str(directory / "tokenizer.json"))
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def named(**more: Any) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        **more,
    }


def assert_same_as_transformers(directory: Path) -> Tokenizer:
    ours = Tokenizer.from_directory(directory)
    theirs = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    for text in TEXTS:
        for add in (True, False):
            ids = ours.encode(text, add)
            assert ids == theirs.encode(text, add_special_tokens=add)
            assert ours.decode(ids, False) == theirs.decode(ids, skip_special_tokens=False)
            assert ours.decode(ids, True) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.vocab_size == len(theirs)
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_id == theirs.eos_token_id
    special = {key: token for key, token in ours.special_tokens.items() if token}
    assert special == theirs.special_tokens_map
    assert set(theirs.all_special_ids) <= ours.special_token_ids
    return ours


@pytest.mark.parametrize("add_bos_token", [None, False, True])
@pytest.mark.parametrize("processor_adds_bos", [False, True])
def test_bos_is_added_as_transformers_adds_it(
    tmp_path, backends, bos_processor, add_bos_token, processor_adds_bos
):
    backend = backends["byte_level"]()
    if processor_adds_bos:
        backend.post_processor = bos_processor(backend, "<|begin|>")
    config = named() if add_bos_token is None else named(add_bos_token=add_bos_token)
    tokenizer = assert_same_as_transformers(write(tmp_path, backend, config))
    ids = tokenizer.encode("Hello")
    assert (ids[0] == tokenizer.bos_token_id) is processor_adds_bos
    assert tokenizer.encode("Hello", add_special_tokens=False)[0] != tokenizer.bos_token_id


def test_truncation_and_padding_in_the_file_are_not_applied(tmp_path, backends):
    backend = backends["byte_level"]()
    backend.enable_truncation(2)
    backend.enable_padding(length=50, pad_token="<|end|>")
    directory = write(tmp_path, backend, named(pad_token="<|end|>"))
    tokenizer = assert_same_as_transformers(directory)
    assert 2 < len(tokenizer.encode("Hello world, how are you")) < 50


def test_special_tokens_that_only_the_config_has_are_added(tmp_path, backends):
    config = named(pad_token="<|pad|>", additional_special_tokens=["<|extra|>"])
    tokenizer = assert_same_as_transformers(write(tmp_path, backends["byte_level"](), config))
    [pad] = tokenizer.encode("<|pad|>", False)
    [extra] = tokenizer.encode("<|extra|>", False)
    assert {pad, extra} <= tokenizer.special_token_ids
    assert tokenizer.decode([pad, extra]) == ""


def test_added_tokens_of_the_config_go_before_those_of_the_file(tmp_path, backends):
    backend = backends["byte_level"]()
    token_id = backend.token_to_id("<tool_call>")
    declared = {
        str(token_id): {
            "content": "<tool_call>",
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "single_word": False,
            "special": True,
        }
    }
    config = named(added_tokens_decoder=declared)
    tokenizer = assert_same_as_transformers(write(tmp_path, backend, config))
    assert token_id in tokenizer.special_token_ids


def test_special_tokens_map_is_read_where_the_config_is_old(tmp_path, backends):
    write(tmp_path, backends["byte_level"](), {"tokenizer_class": "PreTrainedTokenizerFast"})
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": "<|end|>", "lstrip": False, "rstrip": False}})
    )
    tokenizer = assert_same_as_transformers(tmp_path)
    assert tokenizer.eos_token_id is not None
    assert tokenizer.bos_token_id is None


@pytest.mark.parametrize("name", ["llama_2", "gemma", "metaspace", "word_piece"])
def test_every_kind_encodes_as_transformers(tmp_path, backends, name):
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    assert_same_as_transformers(write(tmp_path, backends[name](), config))


def test_a_directory_with_nothing_but_tokenizer_json_is_enough(tmp_path, backends):
    tokenizer = Tokenizer.from_directory(write(tmp_path, backends["byte_level"]()))
    assert tokenizer.decode(tokenizer.encode("Hello 你好")) == "Hello 你好"
    assert (tokenizer.bos_token_id, tokenizer.chat_template) == (None, None)


def test_older_files_are_converted_by_transformers(tmp_path, backends):
    backend = backends["byte_level"]()
    backend.model.save(str(tmp_path))
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|end|>", "bos_token": "<|begin|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "unk_token": "<|end|>"}))
    tokenizer = Tokenizer.from_directory(tmp_path)
    for text in TEXTS[:3]:
        assert tokenizer.encode(text) == backends_ids(backend, text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_token_id == backend.token_to_id("<|end|>")


def backends_ids(backend: Backend, text: str) -> list[int]:
    """What the model itself makes of a text, without the tokens that were added later."""
    bare = Backend(backend.model)
    bare.pre_tokenizer = backend.pre_tokenizer
    return bare.encode(text).ids


def test_loading_needs_neither_transformers_nor_torch(tmp_path, backends):
    write(tmp_path, backends["byte_level"](), named())
    script = (
        "import sys; from sapwood.text import generation, template;"
        "from sapwood.text.tokenizer import Tokenizer;"
        f"Tokenizer.from_directory({str(tmp_path)!r}).encode('x');"
        "print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no tokenizer.json"),
        ({"tokenizer.json": "{"}, "cannot be read"),
        ({"tokenizer.json": "{}", "tokenizer_config.json": "{"}, "not valid JSON"),
        ({"tokenizer.json": "{}", "tokenizer_config.json": "[]"}, "must hold a JSON object"),
        ({"tokenizer_config.json": '{"chat_template": [{"a": 1}]}'}, "no name and template"),
    ],
)
def test_a_broken_directory_says_what_is_wrong(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ModelSourceError, match=message):
        Tokenizer.from_directory(tmp_path)


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(ModelSourceError, match="nowhere"):
        Tokenizer.from_directory(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config.json": {"chat_template": "A"}}, {"default": "A"}),
        (
            {
                "tokenizer_config.json": {
                    "chat_template": [
                        {"name": "default", "template": "A"},
                        {"name": "tool_use", "template": "B"},
                    ]
                }
            },
            {"default": "A", "tool_use": "B"},
        ),
        ({"chat_template.json": {"chat_template": "C"}}, {"default": "C"}),
        (
            {"chat_template.jinja": "D", "tokenizer_config.json": {"chat_template": "A"}},
            {"default": "D"},
        ),
        (
            {"chat_template.jinja": "D", "additional_chat_templates/tool_use.jinja": "E"},
            {"default": "D", "tool_use": "E"},
        ),
        ({}, {}),
    ],
)
def test_chat_templates_are_found_in_every_place(tmp_path, backends, files, expected):
    write(tmp_path, backends["byte_level"]())
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name).write_text(text)
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.chat_templates == expected
    assert tokenizer.chat_template == expected.get("default")


def test_half_a_surrogate_pair_is_refused(byte_level_tokenizer):
    with pytest.raises(InvalidRequest, match="surrogate"):
        byte_level_tokenizer.encode("a\ud800")


def test_a_thread_that_encodes_lets_the_event_loop_run(byte_level_tokenizer):
    text = "Hello world, how are you today? " * 20_000

    async def ticks_while_encoding() -> int:
        encoding = asyncio.create_task(asyncio.to_thread(byte_level_tokenizer.encode, text))
        ticks = 0
        while not encoding.done():
            await asyncio.sleep(0.001)
            ticks += 1
        assert len(encoding.result()) > 100_000
        return ticks

    # A call that kept the interpreter lock would leave room for one or two.
    assert asyncio.run(ticks_while_encoding()) > 10


def test_an_id_past_a_hole_is_within_the_vocabulary(backends: dict[str, Callable[[], Backend]]):
    fields = json.loads(backends["word_level"]().to_str())
    for token in fields["added_tokens"]:
        if token["content"] == "</s>":
            token["id"] = fields["model"]["vocab"]["</s>"]
    fields["model"]["vocab"]["far"] = 50
    fields["added_tokens"].append({**fields["added_tokens"][0], "id": 50, "content": "far"})
    tokenizer = Tokenizer(Backend.from_str(json.dumps(fields)))
    assert tokenizer.vocab_size == 51
