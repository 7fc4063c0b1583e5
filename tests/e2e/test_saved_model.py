"""A model that transformers saved, served over HTTP, says what transformers says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.e2e.server import Server

PROMPTS = ["Hello", "The capital of France is", "1, 2, 3,", "ä", "x" * 100]
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def expected(qwen3: Path) -> dict[str, list[int]]:
    """Prompt -> transformers' greedy continuation."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(qwen3, dtype=torch.float32).eval()
    found: dict[str, list[int]] = {}
    with torch.inference_mode():
        for prompt in PROMPTS:
            ids = torch.tensor([list(_bytes_of(qwen3, prompt))])
            outputs = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NUM_TOKENS,
                min_new_tokens=NUM_TOKENS,
                do_sample=False,
                pad_token_id=0,
            )
            found[prompt] = outputs[0, ids.shape[1] :].tolist()
    return found


def _bytes_of(directory: Path, prompt: str) -> list[int]:
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    return backend.encode(prompt).ids


SAMPLING = {"temperature": 0, "max_new_tokens": NUM_TOKENS, "min_new_tokens": NUM_TOKENS}


def ask(server: Server, prompts: list[str]) -> list[dict[str, Any]]:
    body = {"text": prompts, "sampling_params": SAMPLING}
    return httpx.post(f"{server.url}/generate", json=body, timeout=60).raise_for_status().json()


def test_greedy_outputs_equal_transformers(
    qwen3_server: Server, expected: dict[str, list[int]]
) -> None:
    together = ask(qwen3_server, PROMPTS)
    for prompt, answer in zip(PROMPTS, together, strict=True):
        assert answer["output_ids"] == expected[prompt]
        [alone] = ask(qwen3_server, [prompt])
        assert alone["output_ids"] == expected[prompt]
        assert alone["text"] == answer["text"]


def test_a_batch_file_gets_the_answers_of_http(
    qwen3_server: Server, qwen3: Path, tmp_path: Path
) -> None:
    chat = {
        "messages": [{"role": "user", "content": "Hi"}],
        "temperature": 0,
        "max_tokens": 12,
        "min_tokens": 12,
    }
    lines: list[dict[str, Any]] = [
        {"id": prompt, "prompt": prompt, "sampling_params": SAMPLING} for prompt in PROMPTS
    ]
    url = "/v1/chat/completions"
    lines.append({"custom_id": "chat", "method": "POST", "url": url, "body": chat})
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, "-m", "sapwood", "generate", str(source), "-o", str(target)]
    subprocess.run(
        [*command, "--model", str(qwen3), "--dtype", "float32"],
        check=True,
        timeout=120,
        capture_output=True,
    )
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    by_id = {answer.get("custom_id") or answer["id"]: answer for answer in answers}
    assert by_id.keys() == {*PROMPTS, "chat"}
    for prompt, over_http in zip(PROMPTS, ask(qwen3_server, PROMPTS), strict=True):
        for field in ("text", "output_ids"):
            assert by_id[prompt][field] == over_http[field]
    answered = httpx.post(f"{qwen3_server.url}{url}", json=chat, timeout=60).json()
    assert by_id["chat"]["response"]["body"]["choices"] == answered["choices"]
