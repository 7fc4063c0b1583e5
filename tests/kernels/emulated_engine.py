"""A whole engine, for test_emulated_processors.py to run on this processor and on emulated ones.

    python -m tests.kernels.emulated_engine MODEL

prints one JSON object: the instruction sets that are usable, and per way of storing weights what
the engine says of its kernels, and the log probabilities of a prompt and of the tokens after it.

    python -m tests.kernels.emulated_engine MODEL same

prints the ways of storing weights with which answers depend on how they were computed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from sapwood import LLM
from sapwood.kernels.cpu import CpuKernels
from sapwood.schema.logprobs import LogprobOptions, TokenLogprobs
from sapwood.schema.request import RequestOptions
from sapwood.schema.sampling import SamplingParams
from sapwood.text.generation import TextRequest
from tests.app.turned_engine import Question, TurnedEngine

PROMPT = list(range(3, 40))
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=3, ignore_eos=True)
STORAGE: dict[str, dict[str, str]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "integers of 8 bits": {"dtype": "float32", "quantization": "w8a8_int8"},
    "integers of 4 bits": {"dtype": "float32", "quantization": "w4a8"},
    "codes": {"dtype": "bfloat16", "quantization": "fp8"},
}
"""A way for each kernel of linear layers."""


def run(model: str, **options: Any) -> tuple[str, list[float]]:
    """(the engine's note on its kernels, log probabilities)"""
    with LLM(model, num_threads=1, max_total_tokens=512, **options) as llm:
        logprobs = llm.run(_score(llm))  # first, since the engine tells nothing before it is ready
        [note] = [note for note in llm.services.engine.info.notes if note.startswith("kernels")]
        return note, logprobs


async def _score(llm: LLM) -> list[float]:
    request = TextRequest(
        request_id="a",
        prompt=PROMPT,
        options=RequestOptions(sampling=GREEDY, logprobs=LogprobOptions(prompt_start=0)),
    )
    found: list[TokenLogprobs] = []
    async for chunk in llm.services.generator.generate(request):
        assert chunk.finish is None or chunk.finish.kind != "error", chunk.finish
        found += [part for part in (chunk.prompt and chunk.prompt.logprobs, chunk.logprobs) if part]
    return [number for part in found for number in part.of_tokens()]


def differs(model: str, **options: Any) -> bool:
    """Whether answers of requests alone, with whole prompts, are others than those of the same
    requests together, in chunks, by two threads."""
    questions = [Question(PROMPT[:length], 3, arrives=length % 4) for length in (3, 20, 37)]
    common = {"page_size": 16, "max_total_tokens": 512, **options}
    with TurnedEngine(Path(model), **common) as engine:
        expected = engine.alone([Question(one.prompt, 3) for one in questions])
    with TurnedEngine(Path(model), **common, num_threads=2, chunked_prefill_size=9) as engine:
        return engine.answers(questions) != expected


def main(model: str, what: str = "") -> None:
    told: Any
    if what == "same":
        told = [name for name, options in STORAGE.items() if differs(model, **options)]
    else:
        found = {name: run(model, **options) for name, options in STORAGE.items()}
        told = {"usable": CpuKernels.usable_isas(), "found": found}
    sys.stdout.write(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
