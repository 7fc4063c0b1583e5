"""An engine with random weights in this process, whose loop is turned by hand and timed."""

from __future__ import annotations

import gc
import json
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sapwood.app.building.resolving import resolve_config
from sapwood.app.building.wiring import Engine, build_engine
from sapwood.base.channel import CallbackSender, QueueChannel
from sapwood.base.errors import SapwoodError
from sapwood.bench.gpu.shapes import Shape
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.output import EngineOutput, StepOutputs
from sapwood.schema.request import EngineInput, Generate, RequestOptions
from sapwood.schema.sampling import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """Seconds from the requests to the first token, to the last, and to each request's end."""

    first_token_s: float
    last_token_s: float
    num_output_tokens: int


class EngineUnderTest:
    """Made by `open_engine`. Requests are greedy and have exact lengths."""

    def __init__(self, engine: Engine, channel: QueueChannel[EngineInput], vocab_size: int) -> None:
        self.engine = engine
        self._channel = channel
        self._vocab_size = vocab_size
        self._random = random.Random(0)
        self._num_requests = 0
        self._num_finished = 0
        self._num_tokens = 0
        self._first_token_s: float | None = None

    def take(self, message: EngineOutput) -> None:
        if not isinstance(message, StepOutputs):
            return
        for output in message.outputs:
            self._num_tokens += len(output.token_ids)
            if output.finish is None:
                continue
            if output.finish.kind in ("error", "abort"):
                raise SapwoodError(f"a request ended with an error: {output.finish.message}")
            self._num_finished += 1
        if self._num_tokens and self._first_token_s is None:
            self._first_token_s = time.perf_counter()

    def ask(self, num_requests: int, prompt_tokens: int, output_tokens: int) -> None:
        """Send requests with random prompts, none of which is a prefix of another."""
        greedy = SamplingParams(temperature=0.0, max_new_tokens=output_tokens, ignore_eos=True)
        for _ in range(num_requests):
            prompt = [self._random.randrange(self._vocab_size) for _ in range(prompt_tokens)]
            name = str(self._num_requests)
            self._channel.send(
                Generate(
                    request_id=name, prompt_ids=prompt, options=RequestOptions(sampling=greedy)
                )
            )
            self._num_requests += 1

    def turn(self, count: int) -> None:
        for _ in range(count):
            self.engine.loop.turn(0.0)

    def run(self, num_requests: int, prompt_tokens: int, output_tokens: int) -> Turns:
        """Send all requests at once, and run until the last one has ended."""
        before, self._first_token_s = self._num_tokens, None
        self.ask(num_requests, prompt_tokens, output_tokens)
        start_s = time.perf_counter()
        self.finish()
        end_s = time.perf_counter()
        assert self._first_token_s is not None, "tokens were put out"
        return Turns(
            first_token_s=self._first_token_s - start_s,
            last_token_s=end_s - start_s,
            num_output_tokens=self._num_tokens - before,
        )

    def finish(self) -> None:
        while self._num_finished < self._num_requests:
            self.turn(1)
        # The step after the last token is still in flight.
        self.turn(2)

    @property
    def graphs(self) -> str:
        """The engine's notes about its graphs."""
        return next((note for note in self.engine.ready.notes if note.startswith("graphs")), "")


@contextmanager
def open_engine(shape: Shape, options: dict[str, Any]) -> Iterator[EngineUnderTest]:
    """An engine of that shape; leaving the context frees its memory."""
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        (home / "config.json").write_text(json.dumps(dict(shape.config)))
        values = {
            "model": str(home),
            "load_format": "dummy",
            "disable_radix_cache": True,
            "grammar_backend": "none",
            **options,
        }
        resolved = resolve_config(EngineConfig.of(values), home=home)
        channel: QueueChannel[EngineInput] = QueueChannel()
        taken: list[EngineUnderTest] = []
        sender: CallbackSender[EngineOutput] = CallbackSender(
            lambda message: taken[0].take(message)
        )
        engine = build_engine(resolved, channel, sender)
        under_test = EngineUnderTest(engine, channel, int(shape.config["vocab_size"]))
        taken.append(under_test)
        try:
            yield under_test
        finally:
            engine.executor.close()
            del under_test.engine, engine, resolved
            free_memory()


def free_memory() -> None:
    """Give unused memory back to the device, for the next measurement."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]
