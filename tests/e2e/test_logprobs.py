"""SmolLM2's log probabilities in fp32 are transformers', over HTTP and streamed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence

import httpx
import pytest
import torch

from sapwood.store import ModelFiles
from tests.e2e.server import Server, serving

TEXT = "The three primary colours are red, yellow and blue. Mixing red and yellow gives"
CLOSE = 1e-3


@pytest.fixture(scope="module")
def fp32(smollm2_files: ModelFiles) -> Iterator[Server]:
    flags = (
        "--dtype",
        "float32",
        "--quantization",
        "none",
        "--max-total-tokens",
        "4096",
        "--chunked-prefill-size",
        "8",
    )
    with serving("--model", smollm2_files.name, *flags) as one:
        yield one


def test_native(fp32: Server, smollm2_logits: Callable[[Sequence[int]], torch.Tensor]) -> None:
    body = {
        "text": TEXT,
        "sampling_params": {"temperature": 0, "max_new_tokens": 12},
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": 3,
        "token_ids_logprob": [10, 20],
    }
    answer = httpx.post(f"{fp32.url}/generate", json=body, timeout=60).json()
    meta = answer["meta_info"]
    prompt = [token_id for _, token_id, _ in meta["input_token_logprobs"]]
    output = [token_id for _, token_id, _ in meta["output_token_logprobs"]]
    assert output == answer["output_ids"]
    expected = smollm2_logits(prompt + output).log_softmax(-1)[:-1]
    entries = [*meta["input_token_logprobs"], *meta["output_token_logprobs"]]
    assert entries[0][0] is None
    likeliest = [*meta["input_top_logprobs"], *meta["output_top_logprobs"]]
    chosen = [*meta["input_token_ids_logprobs"], *meta["output_token_ids_logprobs"]]
    for row, entry, top, asked in zip(
        expected, entries[1:], likeliest[1:], chosen[1:], strict=True
    ):
        for logprob, token_id, _ in [entry, *top, *asked]:
            assert logprob == pytest.approx(float(row[token_id]), abs=CLOSE)
        assert [one for one, _, _ in top] == pytest.approx(row.topk(3).values.tolist(), abs=CLOSE)
    # The same prompt once more: the cache has it, and it is computed again for its logits.
    again = httpx.post(f"{fp32.url}/generate", json=body, timeout=60).json()["meta_info"]
    assert again["cached_tokens"] == 0
    later = httpx.post(
        f"{fp32.url}/generate", json={**body, "logprob_start_len": len(prompt) - 2}, timeout=60
    ).json()["meta_info"]
    assert later["cached_tokens"] == (len(prompt) - 2) // 16 * 16
    assert len(later["input_token_logprobs"]) == 2


def test_a_chat_stream_with_a_stop(fp32: Server) -> None:
    messages = [{"role": "user", "content": "Count from one to ten in words."}]
    body = {
        "messages": messages,
        "temperature": 0,
        "max_tokens": 40,
        "logprobs": True,
        "top_logprobs": 2,
        "stop": ["five"],
    }
    whole = httpx.post(f"{fp32.url}/v1/chat/completions", json=body, timeout=60).json()
    [choice] = whole["choices"]
    content = choice["logprobs"]["content"]
    assert len(content) == whole["usage"]["completion_tokens"]
    streamed: list[dict[str, object]] = []
    text = ""
    with httpx.stream(
        "POST", f"{fp32.url}/v1/chat/completions", json={**body, "stream": True}, timeout=60
    ) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                [one] = json.loads(line.removeprefix("data: "))["choices"]
                text += one["delta"].get("content") or ""
                streamed += one["logprobs"]["content"] if one["logprobs"] else []
    assert text == choice["message"]["content"]
    assert [one["token"] for one in streamed] == [one["token"] for one in content]
    for one, other in zip(streamed, content, strict=True):
        assert one["logprob"] == pytest.approx(other["logprob"], abs=CLOSE)


def test_an_echoed_completion_is_scored_without_an_output(
    fp32: Server, smollm2_logits: Callable[[Sequence[int]], torch.Tensor]
) -> None:
    body = {"prompt": TEXT, "echo": True, "logprobs": 1, "max_tokens": 0}
    whole = httpx.post(f"{fp32.url}/v1/completions", json=body, timeout=60).json()
    [choice] = whole["choices"]
    assert choice["text"] == TEXT
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == TEXT
    ids = httpx.post(f"{fp32.url}/tokenize", json={"prompt": TEXT}, timeout=60).json()["tokens"]
    scores = smollm2_logits(ids).log_softmax(-1)[:-1]
    expected = scores.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:] == pytest.approx(expected.tolist(), abs=CLOSE)
    pairs = zip(logprobs["tokens"], logprobs["text_offset"], strict=True)
    starts = [TEXT.index(token, at) for token, at in pairs]
    assert starts == logprobs["text_offset"]
