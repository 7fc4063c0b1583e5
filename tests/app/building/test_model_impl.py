"""Which models are computed by transformers, and what such an engine says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sapwood import LLM
from sapwood.app.building.model_impl import SLOW
from sapwood.app.building.resolving import Resolved, resolve_config
from sapwood.app.converting import prepare
from sapwood.base.errors import ConfigError
from sapwood.convert.options import ConvertOptions
from sapwood.schema.config.engine import EngineConfig
from tests.models.lm.cases import CASES
from tests.models.lm.peer import make_peer
from tests.tiny import VOCAB, llama_config, write_tokenizer

NUM_NEW = 12
STEM = list(range(10, 70))
PROMPTS = [[5, 9, 77, 30, 8, 61, 200, 4], [90, 3], [*STEM, 7], [*STEM, 9, 9]]
NANOCHAT = ("nanochat", "NanoChatForCausalLM", {"hidden_size": 64, "num_attention_heads": 2})
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "nanochat": NANOCHAT,
    "qwen2, window in one layer": CASES["qwen2, window in one layer"],
    "gpt_oss": CASES["gpt_oss"],
}
CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class ElizaConfig(LlamaConfig):
    model_type = "eliza"

class ElizaForCausalLM(LlamaForCausalLM):
    config_class = ElizaConfig
"""


def save(directory: Path, model_type: str, architecture: str, fields: dict[str, Any]) -> Any:
    ends = {"vocab_size": VOCAB, "eos_token_id": 257, "bos_token_id": None, "pad_token_id": None}
    peer = make_peer(model_type, architecture, **fields | ends)
    peer.model.generation_config.eos_token_id = None
    peer.model.save_pretrained(directory)
    write_tokenizer(directory)
    return peer.model


def resolved(directory: Path, **options: object) -> Resolved:
    return resolve_config(EngineConfig.of({"model": str(directory), **options}), home=directory)


def greedy(
    directory: Path, prompts: list[list[int]], **options: Any
) -> tuple[list[list[int]], int]:
    """The outputs, asked for twice and equal; how many tokens came from the cache."""
    settings = {"temperature": 0, "max_new_tokens": NUM_NEW, "ignore_eos": True}
    sizes: dict[str, Any] = {"page_size": 8, "chunked_prefill_size": 16, "max_running_requests": 3}
    with LLM(str(directory), dtype="float32", num_threads=1, **sizes, **options) as llm:
        first, second = (
            [list(one.token_ids) for one in llm.generate(prompts, settings)] for _ in range(2)
        )
        assert first == second
        return first, llm.stats().num_cached_tokens


@pytest.mark.parametrize("case", MODELS)
def test_greedy_texts_equal_generate(case: str, tmp_path: Path) -> None:
    model = save(tmp_path, *MODELS[case])
    got, num_cached = greedy(tmp_path, PROMPTS, model_impl="transformers")
    assert num_cached >= 2 * (len(STEM) // 8 * 8)
    with torch.inference_mode():
        for prompt, own in zip(PROMPTS, got, strict=True):
            whole = model.generate(torch.tensor([prompt]), max_new_tokens=NUM_NEW, do_sample=False)
            assert own == whole[0, len(prompt) :].tolist()


def test_an_architecture_that_sapwood_lacks_is_served_the_slow_way(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, *NANOCHAT)
    (decision,) = [one for one in resolved(tmp_path).decisions if one.option == "model_impl"]
    assert decision.value == "transformers"
    assert decision.reason == f"sapwood has no NanoChatForCausalLM; {SLOW}"
    threads = torch.get_num_threads()
    with LLM(str(tmp_path), dtype="float32", num_threads=3) as llm:
        assert len(llm.generate([[5, 9]], {"max_new_tokens": 3})) == 1
        assert torch.get_num_threads() == 3, "torch computes the layers"
    torch.set_num_threads(threads)
    assert f"NanoChatForCausalLM: {SLOW}" in caplog.messages
    with pytest.raises(ConfigError, match="unknown architecture 'NanoChatForCausalLM'"):
        resolved(tmp_path, model_impl="sapwood")


def test_guesses_and_grammars(tmp_path: Path) -> None:
    save(tmp_path, *NANOCHAT)
    plain, _ = greedy(tmp_path, PROMPTS)
    assert (
        greedy(
            tmp_path, PROMPTS, speculative_algorithm="NGRAM", disable_speculative_adaptation=True
        )[0]
        == plain
    )
    with LLM(str(tmp_path), dtype="float32", num_threads=1) as llm:
        (answer,) = llm.generate(["Say"], {"max_new_tokens": 8, "regex": "(yes|no)"})
        assert answer.text in ("yes", "no")


def test_an_architecture_that_sapwood_has_is_its_own(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(llama_config()))
    write_tokenizer(tmp_path)
    (decision,) = [
        one
        for one in resolved(tmp_path, load_format="dummy").decisions
        if one.option == "model_impl"
    ]
    assert (decision.value, decision.reason) == ("sapwood", "sapwood has this architecture")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quantization": "w8a16"}, "cannot be quantised while they load; leave out"),
        ({"dtype": "float32", "weight_dtype": "bfloat16"}, "--weight-dtype bfloat16 needs"),
        ({"tp_size": 2}, "--tp-size"),
        ({"is_embedding": True}, "computes models that generate"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    save(tmp_path, *NANOCHAT)
    with pytest.raises(ConfigError, match=words):
        resolved(tmp_path, model_impl="transformers", **options)


def test_quantised_checkpoints_are_refused(tmp_path: Path) -> None:
    save(tmp_path, *NANOCHAT)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="takes weights that are not quantised"):
        resolved(tmp_path)


def test_conversion_needs_a_class_of_sapwood(tmp_path: Path) -> None:
    save(tmp_path / "model", *NANOCHAT)
    home = tmp_path / "home"

    def convert(**options: object) -> None:
        config = EngineConfig.of({"model": str(tmp_path / "model"), **options})
        prepare(config, ConvertOptions(), tmp_path / "out", ignore=(), force=False, home=home)

    with pytest.raises(ConfigError, match="leave out --model-impl transformers"):
        convert(model_impl="transformers")
    with pytest.raises(ConfigError, match="unknown architecture 'NanoChatForCausalLM'"):
        convert()


def test_code_beside_the_checkpoint_runs_only_if_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    directory = tmp_path / "model"
    save(directory, "llama", "LlamaForCausalLM", {})
    plain, _ = greedy(directory, PROMPTS)
    (directory / "modeling_eliza.py").write_text(CODE)
    config = json.loads((directory / "config.json").read_text())
    config |= {"architectures": ["ElizaForCausalLM"], "model_type": "eliza"}
    config["auto_map"] = {
        "AutoConfig": "modeling_eliza.ElizaConfig",
        "AutoModelForCausalLM": "modeling_eliza.ElizaForCausalLM",
    }
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"\(auto_map\).*only if --trust-remote-code asks"):
        resolved(directory)
    with pytest.raises(ConfigError, match="which sapwood's own classes never run"):
        resolved(directory, model_impl="sapwood", trust_remote_code=True)
    assert greedy(directory, PROMPTS, trust_remote_code=True)[0] == plain


def test_weights_in_pickles_are_refused(tmp_path: Path) -> None:
    model = save(tmp_path, *NANOCHAT)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="takes weights from safetensors files"):
        resolved(tmp_path)
