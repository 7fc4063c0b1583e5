"""sapwood's own Python API as an engine under test."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sapwood.base.errors import SapwoodError
from sapwood.bench.offline import Generated
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.sampling import SamplingParams


@contextmanager
def open_llm(config: EngineConfig) -> Iterator[SapwoodGenerator]:
    """Load the model of that config; leaving the context frees it."""
    from sapwood.app.offline.llm import LLM

    llm = LLM(model=config.model.model, config=config)
    try:
        yield SapwoodGenerator(llm)
    finally:
        llm.close()


class SapwoodGenerator:
    """Greedy outputs of exact lengths from a `sapwood.LLM`, which the caller owns and closes."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def generate(
        self, prompts: Sequence[Sequence[int]], output_lengths: Sequence[int]
    ) -> list[Generated]:
        """The outputs of all prompts; SapwoodError if a request ends with an error or an abort."""
        by_length = {length: _greedy(length) for length in set(output_lengths)}
        results = self._llm.generate(
            [list(prompt) for prompt in prompts], [by_length[length] for length in output_lengths]
        )
        for result in results:
            if result.finish.kind in ("error", "abort"):
                raise SapwoodError(
                    f"a request ended with {result.finish.kind}: {result.finish.message}"
                )
        return [
            Generated(
                num_output_tokens=result.num_output_tokens,
                num_cached_tokens=result.num_cached_tokens,
            )
            for result in results
        ]


def _greedy(num_output_tokens: int) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=num_output_tokens,
        min_new_tokens=num_output_tokens,
        temperature=0.0,
        ignore_eos=True,
    )
