"""return_routed_experts of a whole engine, over HTTP: what transformers' gates choose."""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from sapwood import LLM
from sapwood.app.building.resolving import resolve_config
from sapwood.base.errors import ConfigError
from sapwood.frontends.server import create_app
from sapwood.schema.config.engine import EngineConfig
from tests.app.llms import llms_of
from tests.models.lm.peer import make_peer
from tests.tiny import VOCAB, write_llama, write_tokenizer

NUM_LAYERS, NUM_CHOSEN, DENSE = 3, 2, 1
GREEDY = {"temperature": 0, "max_new_tokens": 9, "ignore_eos": True}
STEM = list(range(20, 60))
PROMPTS = [[7, 30, 90, 200, 11], [*STEM, 3], [*STEM, 4, 4], [44]]


@pytest.fixture(scope="module")
def theirs() -> Any:
    """Three layers, of which the second has no experts."""
    peer = make_peer(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        vocab_size=VOCAB,
        num_hidden_layers=NUM_LAYERS,
        head_dim=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=8,
        num_experts_per_tok=NUM_CHOSEN,
        moe_intermediate_size=32,
        mlp_only_layers=[DENSE],
        norm_topk_prob=True,
        eos_token_id=257,
        bos_token_id=None,
    )
    return peer.model


@pytest.fixture(scope="module")
def model_path(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mixture")
    theirs.save_pretrained(directory)
    write_tokenizer(directory)
    return directory


@pytest.fixture
def make_llm(model_path: Path) -> Iterator[Callable[..., LLM]]:
    with llms_of(model_path, page_size=4, enable_return_routed_experts=True) as make:
        yield make


def post(llm: LLM, path: str, body: dict[str, Any]) -> httpx.Response:
    async def call() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(llm.services))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, json=body)

    return llm.run(call())


def ask(llm: LLM, **body: Any) -> Any:
    answer = post(llm, "/generate", {"sampling_params": GREEDY, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def decoded(text: str) -> np.ndarray[Any, Any]:
    flat = np.frombuffer(b64decode(text), dtype="<i4")
    return flat.reshape(-1, NUM_LAYERS, NUM_CHOSEN)


@torch.inference_mode()
def check(theirs: Any, prompt: list[int], output: list[int], told: str) -> None:
    found = decoded(told)
    assert len(found) == len(prompt) + len(output) - 1
    whole = theirs(torch.tensor([prompt + output]), output_router_logits=True, use_cache=False)
    gates = iter(whole.router_logits)
    for layer in range(NUM_LAYERS):
        if layer == DENSE:
            assert not found[:, layer].any()
            continue
        chosen = next(gates).topk(NUM_CHOSEN).indices[: len(found)]
        assert found[:, layer].tolist() == chosen.tolist()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunked_prefill_size": 6, "overlap_depth": 2},
        {"kernels": "torch", "chunked_prefill_size": 9},
        {"speculative_algorithm": "NGRAM", "disable_speculative_adaptation": True},
    ],
)
def test_they_are_those_of_the_gates(
    make_llm: Callable[..., LLM], theirs: Any, options: dict[str, Any]
) -> None:
    llm = make_llm(**options)
    # Twice: the second time all prompts are cached, and some requests do not ask.
    for wants in ([True] * len(PROMPTS), [True, False, True, True]):
        answers = ask(llm, input_ids=PROMPTS, return_routed_experts=wants)
        for prompt, answer, is_wanted in zip(PROMPTS, answers, wants, strict=True):
            told = answer["meta_info"].get("routed_experts")
            assert (told is not None) == is_wanted
            if told is not None:
                check(theirs, prompt, answer["output_ids"], told)


def test_after_retractions(make_llm: Callable[..., LLM], theirs: Any) -> None:
    llm = make_llm(max_total_tokens=96, schedule_conservativeness=0.0)
    prompts = [list(range(first, first + 20)) for first in (5, 50, 100, 150)]
    answers = ask(llm, input_ids=prompts, return_routed_experts=True)
    assert llm.stats().num_retractions > 0
    for prompt, answer in zip(prompts, answers, strict=True):
        check(theirs, prompt, answer["output_ids"], answer["meta_info"]["routed_experts"])


def test_each_sample_has_its_own(make_llm: Callable[..., LLM], theirs: Any) -> None:
    sampling = {"temperature": 1.0, "max_new_tokens": 9, "ignore_eos": True, "n": 3}
    answers = ask(
        make_llm(), input_ids=PROMPTS[1], sampling_params=sampling, return_routed_experts=True
    )
    assert len({tuple(one["output_ids"]) for one in answers}) > 1
    for one in answers:
        check(theirs, PROMPTS[1], one["output_ids"], one["meta_info"]["routed_experts"])


def test_a_stream_tells_them_at_its_end(make_llm: Callable[..., LLM], theirs: Any) -> None:
    body = {"input_ids": PROMPTS[0], "sampling_params": GREEDY, "return_routed_experts": True}
    lines = post(make_llm(), "/generate", body | {"stream": True}).text.split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert [("routed_experts" in one["meta_info"]) for one in events[:-1]] == [False] * (
        len(events) - 1
    )
    last = events[-1]
    check(theirs, PROMPTS[0], last["output_ids"], last["meta_info"]["routed_experts"])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_in_openais_dialect(make_llm: Callable[..., LLM], path: str, stream: bool) -> None:
    """SGLang's place for the first choice, and each other choice its own."""
    prompt: dict[str, Any] = {"prompt": "Hello"}
    if "chat" in path:
        prompt = {"messages": [{"role": "user", "content": "Hello"}]}
    body = {"max_tokens": 5, "ignore_eos": True, "n": 2, "return_routed_experts": True}
    body |= {"stream": stream, "stream_options": {"include_usage": True}} if stream else {}
    answer = post(make_llm(), path, prompt | body)
    assert answer.status_code == 200, answer.text
    whole = [answer.json()] if not stream else [
        json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n")[:-2]
    ]  # fmt: skip
    first = [one["sglext"] for one in whole if "sglext" in one]
    others = {
        choice["index"]: choice["sglext"]
        for one in whole
        for choice in one["choices"]
        if "sglext" in choice
    }
    assert (len(first), list(others)) == (1, [1])
    usage = next(one["usage"] for one in reversed(whole) if one.get("usage"))
    for told in (*first, *others.values()):
        assert len(decoded(told["routed_experts"])) == usage["prompt_tokens"] + 5 - 1


def test_a_server_must_be_started_for_it(
    make_llm: Callable[..., LLM], model_path: Path, tmp_path: Path
) -> None:
    llm = make_llm(enable_return_routed_experts=False)
    body = {"input_ids": [5], "sampling_params": GREEDY, "return_routed_experts": True}
    answer = post(llm, "/generate", body)
    assert answer.status_code == 400
    assert "--enable-return-routed-experts" in answer.json()["error"]["message"]
    assert "routed_experts" not in ask(llm, input_ids=[5])["meta_info"]

    def resolve(path: Path, **options: object) -> None:
        options = {"model": str(path), "enable_return_routed_experts": True, **options}
        resolve_config(EngineConfig.of(options), home=tmp_path)

    with pytest.raises(ConfigError, match="has no experts"):
        resolve(write_llama(tmp_path / "dense"), load_format="dummy")
    with pytest.raises(ConfigError, match="transformers computes this model"):
        resolve(model_path, model_impl="transformers")


def test_a_prompt_with_too_much_to_tell_is_refused_before_it_is_computed(
    make_llm: Callable[..., LLM],
) -> None:
    llm = make_llm()
    limits = llm.services.limits
    object.__setattr__(limits, "max_embed_bytes", 10 * NUM_LAYERS * NUM_CHOSEN * 4)
    body = {"sampling_params": GREEDY, "return_routed_experts": True}
    answer = post(llm, "/generate", body | {"input_ids": [5] * 11})
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert "264 bytes of routed experts as int32" in message
    assert "--max-request-bytes" in message
    assert llm.stats().num_leased_pages == 0
