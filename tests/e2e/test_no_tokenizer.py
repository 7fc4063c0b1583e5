"""A server that reads no tokenizer, and what its further flags of SGLang change."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.server import Server, serving

SAMPLING = {"max_new_tokens": 5, "temperature": 0.0, "ignore_eos": True}
CONTEXT = 48


@pytest.fixture(scope="module")
def server(qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("without") / "model"
    shutil.copytree(qwen3, folder, ignore=shutil.ignore_patterns("tok*", "vocab*", "*.jinja"))
    switches = ["--skip-tokenizer-init", "--stream-output", "--allow-auto-truncate"]
    sizes = ["--max-model-len", str(CONTEXT), "--multi-item-scoring-delimiter", "9"]
    with serving("--model-path", str(folder), "--dtype", "float32", *switches, *sizes) as running:
        yield running


def ask(server: Server, path: str = "/generate", **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=60)


def ids(server: Server, prompt: list[int]) -> list[int]:
    answer = ask(server, input_ids=prompt, sampling_params=SAMPLING).json()
    assert "text" not in answer
    assert answer["meta_info"]["prompt_tokens"] == min(len(prompt), CONTEXT - 1)
    output: list[int] = answer["output_ids"]
    return output


def test_ids_go_in_and_ids_come_out(server: Server) -> None:
    assert len(ids(server, [5, 6, 7])) == 5
    assert ids(server, [5, 6, 7]) == ids(server, [5, 6, 7])


def test_events_of_a_stream_have_what_is_new(server: Server) -> None:
    body = {"input_ids": [5, 6, 7], "sampling_params": SAMPLING, "stream": True}
    with httpx.stream("POST", f"{server.url}/generate", json=body) as response:
        events = [
            json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")
        ]
    assert [token for event in events for token in event["output_ids"]] == ids(server, [5, 6, 7])
    assert [event["meta_info"]["completion_tokens"] for event in events][-1] == 5


def test_a_prompt_that_is_too_long_is_cut_at_its_end(server: Server) -> None:
    long = [token % 90 + 3 for token in range(200)]
    one = {**SAMPLING, "max_new_tokens": 1}
    cut = ask(server, input_ids=long, sampling_params=one).json()
    short = ask(server, input_ids=long[: CONTEXT - 1], sampling_params=one).json()
    assert cut["output_ids"] == short["output_ids"]
    assert cut["meta_info"]["prompt_tokens"] == CONTEXT - 1


def test_items_are_scored_after_the_delimiter(server: Server) -> None:
    labels = {"label_token_ids": [4, 5]}
    scores = ask(server, "/v1/score", query=[6, 7], items=[[8], [10, 11]], **labels).json()
    for item, score in zip([[8], [10, 11]], scores["scores"], strict=True):
        alone = ask(server, "/v1/score", query=[6, 7], items=[item], **labels).json()
        assert alone["scores"] == [score]
        told = ask(
            server,
            input_ids=[6, 7, 9, *item],
            return_logprob=True,
            token_ids_logprob=[4, 5],
            sampling_params={**SAMPLING, "max_new_tokens": 1},
        ).json()["meta_info"]["output_token_ids_logprobs"][0]
        likely = {token: logprob for logprob, token, *_ in told}
        assert score == pytest.approx([math.exp(likely[t]) for t in (4, 5)], rel=1e-4)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"text": "Hi"}),
        ("/generate", {"input_ids": [5], "sampling_params": {"stop": ["a"]}}),
        ("/generate", {"input_ids": [5], "sampling_params": {"stop_regex": ["a"]}}),
        ("/generate", {"input_ids": [5], "sampling_params": {"regex": "a+"}}),
        ("/v1/completions", {"model": "m", "prompt": [5, 6]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
        ("/v1/messages", {"max_tokens": 5, "messages": [{"role": "user", "content": "Hi"}]}),
        ("/v1/responses", {"input": "Hi"}),
        ("/api/generate", {"model": "m", "prompt": "Hi"}),
        ("/tokenize", {"prompt": "Hi"}),
        ("/detokenize", {"tokens": [5]}),
        ("/v1/score", {"query": "a", "items": ["b"], "label_token_ids": [5]}),
    ],
)
def test_what_needs_a_tokenizer_is_refused_with_the_way_out(
    server: Server, path: str, body: dict[str, Any]
) -> None:
    if "model" in body or (path.startswith("/v1/") and path != "/v1/score"):
        models = httpx.get(f"{server.url}/v1/models").json()
        body = {**body, "model": models["data"][0]["id"]}
    refused = ask(server, path, **body)
    assert refused.status_code == 400, refused.text
    assert "--skip-tokenizer-init" in refused.text


def test_the_server_says_that_it_is_well(server: Server) -> None:
    assert httpx.get(f"{server.url}/health_generate", timeout=60).status_code == 200
    info = httpx.get(f"{server.url}/server_info").json()
    assert info["skip_tokenizer_init"] is True
