"""A whole engine in this thread, turned by hand, and what it answers: token ids and the log
probability of each, as they are."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sapwood.app.building.resolving import resolve_config
from sapwood.app.building.wiring import Engine, build_engine
from sapwood.base.channel import CallbackSender, QueueChannel
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.logprobs import LogprobOptions
from sapwood.schema.output import (
    CacheFlushed,
    CallDone,
    EngineOutput,
    EngineStatus,
    StepOutputs,
)
from sapwood.schema.request import (
    EngineInput,
    FlushCache,
    Generate,
    GetStatus,
    LoadAdapter,
    RequestOptions,
)
from sapwood.schema.sampling import SamplingParams

Told = TypeVar("Told", bound=EngineOutput)
Answer = tuple[list[int], tuple[float, ...]]
"""Output tokens, and the log probability of each."""
MOST_TURNS = 4000
LIMIT_S = 60.0


@dataclass(frozen=True)
class Question:
    """One request, and the turn of the engine at which it comes."""

    prompt: list[int]
    num_outputs: int
    temperature: float = 0.0
    seed: int = 0
    arrives: int = 0
    adapter: str = ""

    def generate(self, request_id: str) -> Generate:
        sampling = SamplingParams(
            temperature=self.temperature,
            seed=self.seed,
            max_new_tokens=self.num_outputs,
            ignore_eos=True,
        )
        options = RequestOptions(sampling=sampling, logprobs=LogprobOptions(), adapter=self.adapter)
        return Generate(request_id=request_id, prompt_ids=self.prompt, options=options)


class TurnedEngine:
    """Raises AssertionError if a request ends in another way than by its length."""

    def __init__(self, directory: Path, **options: Any) -> None:
        values = {
            "model": str(directory),
            "dtype": "float32",
            "num_threads": 1,
            "cpu_products": "exact",
            "skip_server_warmup": True,
            **options,
        }
        self._channel: QueueChannel[EngineInput] = QueueChannel()
        self._told: list[EngineOutput] = []
        sender: CallbackSender[EngineOutput] = CallbackSender(self._told.append)
        resolved = resolve_config(EngineConfig.of(values), home=directory)
        self.engine: Engine = build_engine(resolved, self._channel, sender)

    def __enter__(self) -> TurnedEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.executor.close()

    def answers(self, questions: Sequence[Question]) -> list[Answer]:
        """All of them together."""
        tokens: list[list[int]] = [[] for _ in questions]
        logprobs: list[tuple[float, ...]] = [() for _ in questions]
        num_open = len(questions)
        for turn in range(MOST_TURNS):
            for index, question in enumerate(questions):
                if question.arrives == turn:
                    self._channel.send(question.generate(f"r{index}"))
            self.engine.loop.turn(0.0)
            for message in self._taken():
                assert isinstance(message, StepOutputs), message
                for output in message.outputs:
                    index = int(output.request_id[1:])
                    tokens[index] += output.token_ids
                    if output.logprobs is not None:
                        logprobs[index] += output.logprobs.of_tokens()
                    if output.finish is not None:
                        assert output.finish.kind == "length", output.finish
                        num_open -= 1
            if not num_open:
                return list(zip(tokens, logprobs, strict=True))
        raise AssertionError(f"{num_open} of {len(questions)} requests never ended")

    def alone(self, questions: Sequence[Question]) -> list[Answer]:
        """One after the other."""
        return [self.answers([question])[0] for question in questions]

    def load(self, adapter: str, path: Path) -> None:
        self._channel.send(LoadAdapter(call_id="load", adapter_id=adapter, path=str(path)))
        done = self._until(CallDone)
        assert done.done, done

    def flush(self) -> None:
        self._channel.send(FlushCache("flush"))
        assert self._until(CacheFlushed).done

    def status(self) -> EngineStatus:
        self._channel.send(GetStatus("status"))
        return self._until(EngineStatus)

    def _until(self, kind: type[Told]) -> Told:
        end_s = time.monotonic() + LIMIT_S
        while time.monotonic() < end_s:  # what is in flight comes to its end
            self.engine.loop.turn(0.0)
            for message in self._taken():
                if isinstance(message, kind):
                    return message
        raise AssertionError(f"the engine did not answer with {kind.__name__}")

    def _taken(self) -> list[EngineOutput]:
        taken, self._told[:] = list(self._told), []
        return taken
