"""Hidden states of a whole engine, and prompts of vectors, against transformers, over HTTP."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from torch import Tensor

from sapwood import LLM
from sapwood.frontends.server import create_app
from tests.app.llms import llms_of
from tests.tiny import save_qwen3, write_llama

CLOSE = {"rtol": 1e-4, "atol": 2e-4}
GREEDY = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
PROMPTS = [[7, 30, 90, 200, 11], [5] * 21, [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 11, 12, 13], [44]]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen3(tmp_path_factory.mktemp("models") / "tiny-qwen3")


@pytest.fixture(scope="module")
def theirs(model_path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()


@pytest.fixture
def make_llm(model_path: Path) -> Iterator[Callable[..., LLM]]:
    with llms_of(model_path, page_size=4, enable_return_hidden_states=True) as make:
        yield make


def post(llm: LLM, path: str, body: dict[str, Any]) -> httpx.Response:
    async def call() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(llm.services))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, json=body)

    return llm.run(call())


def generate(llm: LLM, body: dict[str, Any]) -> Any:
    answer = post(llm, "/generate", {"sampling_params": GREEDY, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def message_of(answer: httpx.Response) -> str:
    return str(answer.json()["error"]["message"])


def refused(llm: LLM, body: dict[str, Any]) -> str:
    answer = post(llm, "/generate", {"sampling_params": GREEDY, **body})
    assert answer.status_code == 400, answer.text
    return message_of(answer)


def random_vectors(count: int, seed: int) -> Tensor:
    return torch.randn(count, 96, generator=torch.Generator().manual_seed(seed)) * 0.1


class Reference:
    """What transformers makes of a prompt's vectors and an output."""

    @torch.inference_mode()
    def __init__(self, theirs: Any, prompt: Tensor, output: Sequence[int]) -> None:
        """prompt [T, hidden]"""
        after = theirs.get_input_embeddings()(torch.tensor(output, dtype=torch.int64))
        found = theirs(inputs_embeds=torch.cat([prompt, after])[None], output_hidden_states=True)
        self.num_prompt, self.output = len(prompt), output
        self.hidden = found.hidden_states[-1][0].numpy()
        self.logprobs = found.logits[0, self.num_prompt - 1 :].log_softmax(-1)

    def check_tokens(self) -> None:
        assert self.logprobs.argmax(-1)[: len(self.output)].tolist() == list(self.output)

    def check_hidden(self, told: Sequence[Any]) -> None:
        prompt, *others = told
        assert len(others) == max(len(self.output) - 1, 0)
        np.testing.assert_allclose(prompt, self.hidden[: self.num_prompt], **CLOSE)
        if others:
            end = self.num_prompt + len(others)
            np.testing.assert_allclose(others, self.hidden[self.num_prompt : end], **CLOSE)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunked_prefill_size": 6, "overlap_depth": 2},
        {"max_total_tokens": 48, "schedule_conservativeness": 0.0},
        {"kernels": "torch", "chunked_prefill_size": 9},
    ],
)
def test_hidden_states_and_vectors_are_transformers_whatever_the_steps(
    make_llm: Callable[..., LLM], theirs: Any, options: dict[str, Any]
) -> None:
    llm = make_llm(**options)
    embedding = theirs.get_input_embeddings()
    by_ids = [embedding(torch.tensor(prompt)).detach() for prompt in PROMPTS]
    vectors = [random_vectors(length, length) for length in (1, 7, 18)]
    for body, prompts in (
        ({"input_ids": PROMPTS}, by_ids),
        ({"input_embeds": [one.tolist() for one in vectors + by_ids]}, vectors + by_ids),
    ):
        wants = [index % 3 != 1 for index in range(len(prompts))]
        more = {"return_hidden_states": wants, "return_logprob": True}
        for answer, prompt, is_wanted in zip(
            generate(llm, body | more), prompts, wants, strict=True
        ):
            meta = answer["meta_info"]
            reference = Reference(theirs, prompt, answer["output_ids"])
            reference.check_tokens()
            assert meta["prompt_tokens"] == len(prompt)
            told = [one for one, *_ in meta["output_token_logprobs"]]
            output = torch.tensor(answer["output_ids"])
            wanted = reference.logprobs[:-1].gather(-1, output[:, None])[:, 0]
            np.testing.assert_allclose(told, wanted, atol=1e-3)
            assert ("hidden_states" in meta) == is_wanted
            if is_wanted:
                assert meta["cached_tokens"] == 0
                reference.check_hidden(meta["hidden_states"])
    if "schedule_conservativeness" in options:
        status = llm.run(llm.services.engine.status())
        assert status.num_retractions > 0


def test_samples_streams_and_stops(make_llm: Callable[..., LLM], theirs: Any) -> None:
    llm = make_llm()
    embedding = theirs.get_input_embeddings()
    prompt = embedding(torch.tensor(PROMPTS[0])).detach()
    asked = {"input_ids": PROMPTS[0], "return_hidden_states": True}
    whole = generate(llm, asked)
    sampled = {**GREEDY, "n": 2, "temperature": 1.5, "sampling_seed": 3}
    samples = generate(llm, asked | {"sampling_params": sampled})
    assert samples[0]["output_ids"] != samples[1]["output_ids"]
    for one in samples:
        Reference(theirs, prompt, one["output_ids"]).check_hidden(one["meta_info"]["hidden_states"])
    stop = {**GREEDY, "stop": whole["text"][2:4]}
    for length in (0, 1):
        one = generate(llm, asked | {"sampling_params": GREEDY | {"max_new_tokens": length}})
        assert len(one["meta_info"]["hidden_states"]) == 1
        assert len(one["meta_info"]["hidden_states"][0]) == len(PROMPTS[0])
    stopped = generate(llm, asked | {"sampling_params": stop})
    assert len(stopped["output_ids"]) < len(whole["output_ids"])
    Reference(theirs, prompt, stopped["output_ids"]).check_hidden(
        stopped["meta_info"]["hidden_states"]
    )
    text = post(llm, "/generate", asked | {"sampling_params": GREEDY, "stream": True}).text
    events = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
    assert all("hidden_states" not in event["meta_info"] for event in events[:-1])
    assert events[-1]["meta_info"]["hidden_states"] == whole["meta_info"]["hidden_states"]


def test_vectors_neither_hit_nor_leave_prefixes(make_llm: Callable[..., LLM], theirs: Any) -> None:
    llm = make_llm()
    zeros, vectors = [0] * 16, random_vectors(16, 1).tolist()
    first = generate(llm, {"input_embeds": vectors})
    by_ids = generate(llm, {"input_ids": zeros})
    assert by_ids["meta_info"]["cached_tokens"] == 0
    again = generate(llm, {"input_embeds": vectors})
    assert again["output_ids"] == first["output_ids"] != by_ids["output_ids"]
    assert again["meta_info"]["cached_tokens"] == 0
    assert generate(llm, {"input_ids": zeros})["meta_info"]["cached_tokens"] == 12
    # Of a prompt of vectors, only the output can be repeated.
    penalised = {**GREEDY, "repetition_penalty": 1.3}
    ids = torch.tensor(PROMPTS[0])
    embeds = theirs.get_input_embeddings()(ids).detach().tolist()
    output = generate(llm, {"input_embeds": embeds, "sampling_params": penalised})["output_ids"]
    hidden = Reference(theirs, torch.tensor(embeds), output).hidden
    logits = theirs.lm_head(torch.from_numpy(hidden)).detach()[len(embeds) - 1 :]
    for count, token in enumerate(output):
        for seen in set(output[:count]):
            logits[count, seen] *= 1 / 1.3 if logits[count, seen] > 0 else 1.3
        assert int(logits[count].argmax()) == token


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"input_embeds": [[0.5] * 95]}, "input_embeds[0] has 95 numbers but"),
        ({"input_embeds": [[0.5] * 96, [0.5] * 97]}, "input_embeds[1] has 97 numbers"),
        ({"input_embeds": [[0.5] * 95 + ["x"]]}, "input_embeds[0][95]: expected"),
        ({"input_embeds": [[0.5] * 95 + [None]]}, "input_embeds[0][95]: expected"),
        ({"input_embeds": [[0.5] * 95 + [1e39]]}, "input_embeds[0][95] is 1e+39 but must be"),
        ({"input_embeds": [[0.5] * 95 + [[1]]]}, "input_embeds[0] must be a list of numbers"),
        ({"input_embeds": [[[0.5] * 96], []]}, "input_embeds[1] has no vectors"),
        ({"input_embeds": []}, "input_embeds is empty"),
        ({"input_embeds": [[]]}, "input_embeds is empty"),
        ({"input_embeds": 5}, "input_embeds: expected `array`".replace("`", "")),
        ({"input_embeds": [[0.5] * 96], "text": "a"}, "exactly one of text, input_ids and"),
        ({"input_embeds": [[0.5] * 96] * 256}, "at most 255"),
        (
            {"input_embeds": [[0.5] * 96], "return_logprob": True, "logprob_start_len": 0},
            "logprob_start_len",
        ),
    ],
)
def test_vectors_that_cannot_be_served_are_named(llm: LLM, body: dict[str, Any], says: str) -> None:
    assert says in refused(llm, body)


@pytest.fixture(scope="module")
def llm(model_path: Path) -> Iterator[LLM]:
    """Without the flag."""
    num_threads = torch.get_num_threads()
    with LLM(str(model_path), num_threads=1, max_total_tokens=512, skip_server_warmup=True) as one:
        yield one
    torch.set_num_threads(num_threads)


def test_a_number_that_is_none_is_refused_as_json(llm: LLM) -> None:
    async def call() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(llm.services))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post("/generate", content=b'{"input_embeds": [[0.5, NaN]]}')

    answer = llm.run(call())
    assert answer.status_code == 400
    assert "input_embeds" in message_of(answer)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"text": "a"}),
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ],
)
def test_hidden_states_need_the_servers_leave(llm: LLM, path: str, body: dict[str, Any]) -> None:
    answer = post(llm, path, body | {"return_hidden_states": True})
    assert answer.status_code == 400
    assert "--enable-return-hidden-states" in answer.text
    assert post(llm, path, body | {"return_hidden_states": False}).status_code == 200


def test_models_that_pool_name_the_field(make_llm: Callable[..., LLM], tmp_path: Path) -> None:
    pooled = make_llm(write_llama(tmp_path / "m"), load_format="dummy", is_embedding=True)
    answer = post(pooled, "/encode", {"text": "a", "input_embeds": [[0.5] * 64]})
    assert answer.status_code == 400
    assert "input_embeds is not supported" in message_of(answer)
    assert "makes embeddings" in refused(pooled, {"input_embeds": [[0.5] * 64]})
