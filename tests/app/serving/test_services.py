from __future__ import annotations

from pathlib import Path

import pytest

from sapwood.app.serving.services import build_services, default_sampling
from sapwood.base.channel import CallbackSender
from sapwood.base.errors import ConfigError, InvalidRequest, ModelSourceError
from sapwood.engine.client import AsyncEngineClient
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.config.model import ModelConfig
from sapwood.schema.sampling import SamplingParams
from sapwood.store import fetch_model
from tests.tiny import VOCAB, write_llama


def build(directory: Path, **options: object):
    values = {"model": str(directory), "load_format": "dummy", **options}
    files = fetch_model(str(directory), home=directory, load_format="dummy")
    client = AsyncEngineClient(CallbackSender(lambda _: None))
    return build_services(client, files, EngineConfig.of(values))


def test_what_a_models_directory_says(tmp_path: Path) -> None:
    directory = write_llama(tmp_path / "m")
    (directory / "generation_config.json").write_text('{"temperature": 0.3}')
    services = build(directory, served_model_name="tiny", page_size=8)
    assert services.model_name == "tiny"
    assert services.model_type == "llama"
    assert services.architectures == ("LlamaForCausalLM",)
    assert services.default_sampling == {"temperature": 0.3}
    assert services.tokenizer_path == str(directory)
    assert services.options["page_size"] == 8
    assert services.template is not None
    rendered = services.template.render([{"role": "user", "content": "Hi"}])
    assert rendered.startswith("<|im_start|>user\nHi<|im_end|>")


def test_the_models_own_defaults_can_be_left_out(tmp_path: Path) -> None:
    directory = write_llama(tmp_path / "m")
    (directory / "generation_config.json").write_text('{"temperature": 0.3}')
    assert build(directory, sampling_defaults="openai").default_sampling == {}
    assert build(directory, sampling_defaults="model").default_sampling == {"temperature": 0.3}


def test_how_the_model_calls_and_thinks(tmp_path: Path) -> None:
    directory = write_llama(tmp_path / "m")
    by_default = build(directory).formats.calls
    assert by_default is not None
    assert by_default.name == "generic"
    named = build(
        directory, tool_call_parser="mistral", reasoning_parser="qwen3", unknown_tool_calls="call"
    )
    assert named.formats.calls is not None
    assert named.formats.calls.name == "mistral"
    assert named.formats.reasoning is not None
    assert named.formats.keeps_unknown
    by_template = build(directory, chat_template="chatml-tools").formats
    assert by_template.calls is not None
    assert by_template.calls.name == "qwen25"
    for option in ("tool_call_parser", "reasoning_parser"):
        with pytest.raises(ConfigError, match=r"nope.*known"):
            build(directory, **{option: "nope"})


@pytest.mark.parametrize("allowed", [False, True])
def test_code_from_requests_is_an_option(tmp_path: Path, allowed: bool) -> None:
    services = build(write_llama(tmp_path / "m"), enable_custom_logit_processor=allowed)
    sampling = SamplingParams(custom_logit_processor='{"callable": "80"}')
    if allowed:
        services.generator.check_sampling(sampling)
    else:
        with pytest.raises(InvalidRequest, match="--enable-custom-logit-processor"):
            services.generator.check_sampling(sampling)


@pytest.mark.parametrize(("vocab_size", "known"), [(VOCAB, 258), (300, 258), (200, 200)])
def test_only_ids_with_a_text_and_an_embedding_count(
    tmp_path: Path, vocab_size: int, known: int
) -> None:
    services = build(write_llama(tmp_path / "m", vocab_size=vocab_size))
    assert services.generator.vocab_size == known


def test_another_tokenizer_and_template(tmp_path: Path) -> None:
    directory, other = write_llama(tmp_path / "m"), write_llama(tmp_path / "other")
    (directory / "tokenizer.json").write_text("{}")
    services = build(
        directory, tokenizer_path=str(other), chat_template="{{ messages[0].content }}"
    )
    assert services.tokenizer_path == str(other)
    assert services.template is not None
    assert services.template.render([{"role": "user", "content": "Hi"}]) == "Hi"
    with pytest.raises(ModelSourceError, match=r"tokenizer\.json cannot be read"):
        build(directory)


def test_defaults_out_of_range_are_the_models_fault(tmp_path: Path) -> None:
    directory = write_llama(tmp_path / "m")
    (directory / "generation_config.json").write_text('{"top_p": 3}')
    with pytest.raises(ConfigError, match="the model's default sampling parameters"):
        build(directory)


def test_what_the_models_files_leave_open_comes_from_the_catalogue(tmp_path: Path) -> None:
    config = ModelConfig(model="smollm2-135m")
    assert default_sampling(tmp_path, config) == {"temperature": 0}
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.3, "top_k": 5}')
    assert default_sampling(tmp_path, config) == {"temperature": 0.3, "top_k": 5}
    assert default_sampling(tmp_path, ModelConfig(model=str(tmp_path))) == {
        "temperature": 0.3,
        "top_k": 5,
    }
    config = ModelConfig(model="smollm2-135m", sampling_defaults="openai")
    assert default_sampling(tmp_path, config) == {}
