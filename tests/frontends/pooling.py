"""An application whose engine answers each prompt with numbers that only this prompt has."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

import numpy as np

from sapwood.frontends.serving.services import Services
from sapwood.schema.logprobs import TokenLogprobs
from sapwood.schema.output import EngineReady, Finish, RequestOutput
from sapwood.schema.pooling import Pooling
from sapwood.schema.request import Generate
from sapwood.text.generation import TextGenerator

SIZE = 6

EMBEDS = Pooling(task="embed", method="mean", why="", size=SIZE)


def classifies(*labels: str, **fields: object) -> Pooling:
    given = {"task": "classify", "method": "cls", "why": "", "size": SIZE, "normalize": False}
    return Pooling(**(given | {"labels": labels} | fields))  # type: ignore[arg-type]


def vector_of(prompt_ids: list[int], size: int = SIZE) -> np.ndarray:
    """Of length 1, different for different prompts."""
    rng = np.random.default_rng([len(prompt_ids), *prompt_ids])
    numbers = rng.standard_normal(size).astype(np.float32)
    return numbers / np.linalg.norm(numbers)


def logprob_of(prompt_ids: list[int], label: int) -> float:
    return -float(1 + (sum(prompt_ids) * 31 + label * 17) % 50) / 10


@dataclass
class PoolingEngine:
    """hold: nothing is answered until it is False again; failure: what everything ends with."""

    num_values: int = SIZE
    hold: bool = False
    failure: Finish | None = None
    unavailable_reason: str | None = None
    submitted: list[Generate] = field(default_factory=list)
    open: dict[str, bool] = field(default_factory=dict)
    abandoned: list[str] = field(default_factory=list)
    most_open: int = 0

    @property
    def info(self) -> EngineReady:
        return EngineReady(context_length=64, max_total_tokens=4096, page_size=16, notes=[])

    async def generate(self, request: Generate) -> AsyncIterator[RequestOutput]:
        self.submitted.append(request)
        self.open[request.request_id] = True
        self.most_open = max(self.most_open, len(self.open))
        answered = False
        try:
            await asyncio.sleep(0)
            while self.hold and self.open[request.request_id]:
                await asyncio.sleep(0.002)
            answered = True
            yield self._output(request)
        finally:
            if not answered:
                self.abandoned.append(request.request_id)
            del self.open[request.request_id]

    def _output(self, request: Generate) -> RequestOutput:
        ids = request.prompt_ids
        finish = self.failure or Finish(kind="length")
        if not self.open[request.request_id]:
            finish = Finish(kind="abort")
        values, logprobs = b"", None
        if request.options.embed is not None:
            assert request.options.sampling.max_new_tokens == 0
            values = vector_of(ids, self.num_values).tobytes()
        else:
            assert request.options.logprobs is not None
            chosen = [logprob_of(ids, label) for label in request.options.logprobs.token_ids]
            logprobs = TokenLogprobs(tokens=bytes(4), chosen=np.float32(chosen).tobytes())
        return RequestOutput(
            request_id=request.request_id,
            token_ids=[],
            num_prompt_tokens=len(ids),
            num_cached_tokens=1,
            queue_time_s=0.25,
            values=values,
            logprobs=logprobs,
            finish=finish,
        )

    async def abort(self, request_id: str) -> None:
        if request_id in self.open:
            self.open[request_id] = False


def over(services: Services, engine: PoolingEngine, pooling: Pooling | None) -> Services:
    """The same services over that engine, whose model answers so."""
    generator = TextGenerator(engine, services.tokenizer, pooling=pooling)  # type: ignore[arg-type]
    return replace(services, engine=engine, generator=generator, pooling=pooling)
