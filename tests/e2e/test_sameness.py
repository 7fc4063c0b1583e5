"""The same words every time: SmolLM2's greedy answers and their log probabilities, bit by bit,
whatever was cached before, whatever runs beside them, in chunks of any size, with drafts, by any
number of threads."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence

import pytest

from sapwood import LLM
from sapwood.schema.logprobs import LogprobOptions
from sapwood.schema.request import RequestOptions
from sapwood.schema.sampling import SamplingParams
from sapwood.store import ModelFiles
from sapwood.text.generation import TextRequest
from tests.e2e.test_exactness import PROMPTS

NUMBERS = itertools.count()

Answer = tuple[list[int], list[float]]
"""Token ids, and the log probability of each."""

TOPICS = (
    "bread", "rivers", "a fox", "the moon", "old maps", "music", "glass", "trade", "snow", "bees",
)  # fmt: skip


def prompts(number: int) -> list[str]:
    """Short ones, and some of several hundred tokens that begin alike."""
    system = "You are a patient teacher. " * 40
    made = []
    for i in range(number):
        text = PROMPTS[i % len(PROMPTS)]
        topic = TOPICS[i // len(PROMPTS) % len(TOPICS)]
        text = text if i < len(PROMPTS) else f"About {topic}: {text}"
        made.append(system + text if i % 3 == 2 else text)
    return made


async def answer(llm: LLM, text: str, num_tokens: int) -> Answer:
    sampling = SamplingParams(temperature=0.0, max_new_tokens=num_tokens, ignore_eos=True)
    request = TextRequest(
        request_id=f"same-{next(NUMBERS)}",
        prompt=text,
        options=RequestOptions(sampling=sampling, logprobs=LogprobOptions()),
    )
    tokens: list[int] = []
    logprobs: list[float] = []
    async for chunk in llm.services.generator.generate(request):
        assert chunk.finish is None or chunk.finish.kind == "length", chunk.finish
        tokens += chunk.token_ids
        logprobs += [] if chunk.logprobs is None else chunk.logprobs.of_tokens()
    assert len(tokens) == len(logprobs) == num_tokens
    return tokens, logprobs


def answers(llm: LLM, asked: Sequence[str], num_tokens: int, together: int) -> list[Answer]:
    async def some(texts: Sequence[str]) -> list[Answer]:
        return list(await asyncio.gather(*(answer(llm, text, num_tokens) for text in texts)))

    begins = range(0, len(asked), together)
    return [one for begin in begins for one in llm.run(some(asked[begin : begin + together]))]


@pytest.mark.parametrize(
    ("number", "num_tokens"),
    [(6, 16), pytest.param(200, 8, marks=[pytest.mark.long, pytest.mark.timeout(3600)])],
)
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float32", "quantization": "none"},
        {"cpu_products": "exact"},  # the blocks of the GGUF file, as by default
    ],
    ids=str,
)
def test_answers_depend_on_the_request_alone(
    smollm2_files: ModelFiles, options: dict[str, object], number: int, num_tokens: int
) -> None:
    asked = prompts(number)
    common = {"max_total_tokens": 16384, **options}
    ways = {
        "two threads": {"num_threads": 2},
        "chunks of 32": {"num_threads": 1, "chunked_prefill_size": 32},
        "chunks of 1024": {"num_threads": 2, "chunked_prefill_size": 1024},
        "drafts": {"num_threads": 2, "speculative_algorithm": "NGRAM"},
    }
    with LLM(smollm2_files.name, num_threads=1, **common) as llm:
        want = answers(llm, asked, num_tokens, 1)
        assert answers(llm, asked, num_tokens, 1) == want, "warm"
        assert llm.flush_cache()
        assert answers(llm, asked, num_tokens, 16) == want, "together"
    for name, way in ways.items():
        with LLM(smollm2_files.name, **common, **way) as llm:
            assert answers(llm, asked, num_tokens, 16) == want, f"{name}, together"
            assert answers(llm, asked, num_tokens, 1) == want, f"{name}, warm and alone"
