"""What SGLang's script for --enable-deterministic-inference asks of a server, in its modes: batches
of any size of one prompt, of several prompts, of prompts with a common beginning, and answers from
the prefix cache beside those without it. Each prompt has one answer."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from sapwood.store import ModelFiles
from tests.e2e.server import serving
from tests.e2e.test_exactness import PROMPTS
from tests.tiny import save_qwen3

FLAG = "--enable-deterministic-inference"
TEMPERATURES = (0.0, 1.0)
Output = tuple[str, tuple[float, ...]]
"""A text, and the log probability of each of its tokens."""


@pytest.fixture(scope="module", params=["tiny", pytest.param("smollm2", marks=pytest.mark.long)])
def client(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    if request.param == "tiny":
        path = save_qwen3(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=2048)
        flags = ("--model", str(path), "--dtype", "bfloat16")
    else:
        files: ModelFiles = request.getfixturevalue("smollm2_files")
        flags = ("--model", files.name)
    with (
        serving(*flags, "--max-total-tokens", "16384", FLAG) as server,
        httpx.Client(base_url=server.url, timeout=120) as one,
    ):
        yield one


def outputs(client: httpx.Client, prompts: list[str], temperature: float) -> list[Output]:
    params: dict[str, Any] = {"temperature": temperature, "max_new_tokens": 24, "ignore_eos": True}
    params["sampling_seed"] = 42
    body = {"text": prompts, "sampling_params": params, "return_logprob": True}
    answers = client.post("/generate", json=body).raise_for_status().json()
    return [
        (one["text"], tuple(told[0] for told in one["meta_info"]["output_token_logprobs"]))
        for one in answers
    ]


def flush(client: httpx.Client) -> None:
    client.post("/flush_cache").raise_for_status()


def with_beginnings() -> list[str]:
    """Prompts with ever longer beginnings in common."""
    beginning = "The old lighthouse keeper counted the ships. " * 24
    return [beginning[: 260 * length] + PROMPTS[length] for length in range(1, 5)]


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_single(client: httpx.Client, temperature: float) -> None:
    prompt = PROMPTS[0]
    found = {one for size in (1, 2, 5, 16) for one in outputs(client, [prompt] * size, temperature)}
    assert len(found) == 1


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_mixed_and_prefix(client: httpx.Client, temperature: float) -> None:
    """Prompts drawn into batches, with an empty cache each time and with whatever is cached."""
    prompts = [*with_beginnings(), PROMPTS[0], PROMPTS[1]]
    drawn = random.Random(7)
    found: dict[str, set[Output]] = defaultdict(set)
    for size in (1, 3, 8, 13):
        for empties in (True, False):
            batch = [drawn.choice(prompts) for _ in range(size)]
            if empties:
                flush(client)
            for prompt, one in zip(batch, outputs(client, batch, temperature), strict=True):
                found[prompt].add(one)
    assert len(found) == len(prompts)
    assert {len(one) for one in found.values()} == {1}
    assert len(set().union(*found.values())) == len(prompts)


def test_radix_cache(client: httpx.Client) -> None:
    """A prompt's answer, and what follows when the prompt has half of that answer."""
    (prompt,) = with_beginnings()[-1:]
    flush(client)
    cold = outputs(client, [prompt], 0.0)
    assert outputs(client, [prompt], 0.0) == cold
    flush(client)
    assert outputs(client, [prompt], 0.0) == cold
