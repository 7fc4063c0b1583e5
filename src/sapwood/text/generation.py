"""Text in, text out: what an engine's token ids mean to a client, as a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from sapwood.base.errors import InvalidRequest, PromptTooLong
from sapwood.schema.client import EngineClient
from sapwood.schema.output import Finish, RequestOutput
from sapwood.schema.request import Generate
from sapwood.schema.sampling import SamplingParams
from sapwood.text.detokenizer import IncrementalDetokenizer
from sapwood.text.stops import StopMatcher
from sapwood.text.tokenizer import Tokenizer

MAX_SAMPLES = 128
"""Samples that one request may ask for, as in OpenAI's API."""

ENCODE_IN_THREAD_CHARS = 8192
"""From this length on a prompt is encoded in a thread: it would hold up the event loop for 2 ms."""

_NUM_SEEDS = 2**64

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRequest:
    """One prompt and how to go on with it.

    prompt              text, or token ids, which are taken as they are
    add_special_tokens  encode text with the BOS or EOS that the tokenizer adds
    n                   how many samples; with a seed, sample i takes seed + i
    extra_key           prefix pages are shared only among requests with the same key
    priority            larger is sooner, where the policy looks at it
    """

    request_id: str
    prompt: str | list[int]
    add_special_tokens: bool = True
    sampling: SamplingParams
    n: int = 1
    extra_key: str = ""
    priority: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.n <= MAX_SAMPLES:
            raise InvalidRequest(f"n is {self.n} but must be in [1, {MAX_SAMPLES}]", param="n")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextChunk:
    """What is new in one sample. The last chunk of a sample, and only that one, has a `finish`.

    index              which of the n samples
    text               new text; may be "" while a character or a stop string is not complete
    token_ids          new output tokens, up to and including the one that completed a stop
    num_output_tokens  output tokens of this sample so far
    num_cached_tokens  prompt tokens that came from the prefix cache
    queue_time_s       seconds between arrival and the first step that computed something
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish: Finish | None
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    queue_time_s: float


class TextGenerator:
    """Turns text requests into engine requests, and the engine's tokens into text.

    engine          where the tokens come from
    tokenizer       of the model that the engine serves
    context_length  prompt and output tokens at most; None: what the engine says
    """

    def __init__(
        self, engine: EngineClient, tokenizer: Tokenizer, *, context_length: int | None = None
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._open: dict[str, list[str]] = {}

    async def generate(self, request: TextRequest) -> AsyncGenerator[TextChunk, None]:
        """Yield chunks until each of the n samples has had its `finish`.

        Closing the generator early aborts what still runs. What fails in the engine comes as a
        chunk whose finish is of kind "error"; a prompt that cannot be served raises InvalidRequest
        or PromptTooLong before anything is submitted.
        """
        prompt_ids = await self.encode_prompt(request)
        if request.request_id in self._open:
            raise InvalidRequest(
                f"a request with the id {request.request_id!r} is still running; choose another id",
                param="rid",
            )
        parts = [_engine_request(request, prompt_ids, index) for index in range(request.n)]
        self._open[request.request_id] = [part.request_id for part in parts]
        chunks = self._one(0, parts[0]) if request.n == 1 else self._merged(parts)
        try:
            async for chunk in chunks:
                yield chunk
        finally:
            try:
                await chunks.aclose()
            finally:
                del self._open[request.request_id]

    async def abort(self, request_id: str) -> None:
        """End all samples of a request; each still gets a chunk with a finish. Unknown: no-op."""
        for part_id in self._open.get(request_id, ()):
            await self._engine.abort(part_id)

    async def encode_prompt(self, request: TextRequest) -> list[int]:
        """The prompt's token ids, checked: `generate` accepts a prompt that passes here."""
        if isinstance(request.prompt, str):
            prompt_ids = await self._encode(request.prompt, request.add_special_tokens)
        else:
            prompt_ids = request.prompt
            _check_in_vocabulary(prompt_ids, self._tokenizer.vocab_size)
        if not prompt_ids:
            raise InvalidRequest(
                "the prompt is empty; it must have at least one token", param="prompt"
            )
        context_length = self._context_length or self._engine.info.context_length
        # One token of the context must be left for the output.
        if len(prompt_ids) > context_length - 1:
            raise PromptTooLong(
                len(prompt_ids),
                context_length - 1,
                f"the context length of {context_length}",
                param="prompt",
            )
        return prompt_ids

    async def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if len(text) < ENCODE_IN_THREAD_CHARS:
            return self._tokenizer.encode(text, add_special_tokens)
        return await asyncio.to_thread(self._tokenizer.encode, text, add_special_tokens)

    async def _one(self, index: int, request: Generate) -> AsyncGenerator[TextChunk, None]:
        """One sample, straight from the engine's iterator: no task and no queue in between."""
        sample = _Sample(index, request, self._tokenizer)
        outputs = self._engine.generate(request)
        try:
            async for output in outputs:
                chunk = sample.advance(output)
                if chunk.finish is not None:
                    last = chunk
                    break
                yield chunk
            else:
                last = sample.lost()
        finally:
            # Before the last chunk goes out: the engine should not compute what nobody will read.
            await self._close(outputs, request.request_id)
        yield last

    async def _close(self, outputs: AsyncIterator[RequestOutput], request_id: str) -> None:
        """Close the engine's iterator, which aborts the request if it still runs."""
        if isinstance(outputs, AsyncGenerator):
            await outputs.aclose()
        else:
            await self._engine.abort(request_id)

    async def _merged(self, parts: Sequence[Generate]) -> AsyncGenerator[TextChunk, None]:
        """Several samples at once; chunks of a sample that wait together become one."""
        arrived: asyncio.Queue[TextChunk | asyncio.Task[None]] = asyncio.Queue()

        async def pump(index: int, part: Generate) -> None:
            chunks = self._one(index, part)
            try:
                async for chunk in chunks:
                    arrived.put_nowait(chunk)
            finally:
                await chunks.aclose()

        tasks = [asyncio.create_task(pump(index, part)) for index, part in enumerate(parts)]
        for task in tasks:
            task.add_done_callback(arrived.put_nowait)
        num_running = len(tasks)
        try:
            while num_running > 0:
                together: dict[int, TextChunk] = {}
                ended: list[asyncio.Task[None]] = []
                for item in await _all_waiting(arrived):
                    if isinstance(item, asyncio.Task):
                        ended.append(item)
                    else:
                        earlier = together.get(item.index)
                        together[item.index] = item if earlier is None else _joined(earlier, item)
                for chunk in together.values():
                    yield chunk
                for task in ended:
                    task.result()
                num_running -= len(ended)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class _Sample:
    """One sample's way from token ids to text."""

    def __init__(self, index: int, request: Generate, tokenizer: Tokenizer) -> None:
        sampling = request.sampling
        self._index = index
        self._no_trim = sampling.no_stop_trim
        self._detokenizer = IncrementalDetokenizer(
            tokenizer,
            skip_special_tokens=sampling.skip_special_tokens,
            spaces_between_special_tokens=sampling.spaces_between_special_tokens,
        )
        self._stops = StopMatcher(sampling.stop, no_trim=self._no_trim) if sampling.stop else None
        self._num_prompt_tokens = len(request.prompt_ids)
        self._request_id = request.request_id
        self._num_output_tokens = 0

    def advance(self, output: RequestOutput) -> TextChunk:
        """The chunk for what the engine answered; nothing follows one with a `finish`."""
        token_ids, finish = output.token_ids, output.finish
        shown = token_ids
        if finish is not None and not self._no_trim and _ends_with_stop_token(token_ids, finish):
            shown = token_ids[:-1]
        if self._stops is None:
            text = self._detokenizer.push(shown)
            if finish is not None:
                text += self._detokenizer.finish()
        else:
            text, matched, num_used = self._match(self._stops, shown, is_last=finish is not None)
            if matched is not None:
                token_ids = token_ids[:num_used]
                finish = Finish(kind="stop", matched=matched)
        self._num_output_tokens += len(token_ids)
        return TextChunk(
            index=self._index,
            text=text,
            token_ids=tuple(token_ids),
            finish=finish,
            num_prompt_tokens=output.num_prompt_tokens,
            num_output_tokens=self._num_output_tokens,
            num_cached_tokens=output.num_cached_tokens,
            queue_time_s=output.queue_time_s,
        )

    def lost(self) -> TextChunk:
        """The end of a request that the engine left without one."""
        message = f"the engine ended request {self._request_id} without saying why; send it again"
        output = RequestOutput(
            request_id=self._request_id,
            token_ids=[],
            num_prompt_tokens=self._num_prompt_tokens,
            finish=Finish(kind="error", message=message),
        )
        return self.advance(output)

    def _match(
        self, stops: StopMatcher, token_ids: Sequence[int], *, is_last: bool
    ) -> tuple[str, str | None, int]:
        """New text, the stop string that was completed, and how many of the tokens led to it."""
        parts: list[str] = []
        for count, token_id in enumerate(token_ids, start=1):
            # One by one, because the token that completes a stop string is the last that counts.
            result = stops.push(self._detokenizer.push((token_id,)))
            parts.append(result.text)
            if result.matched is not None:
                return "".join(parts), result.matched, count
        if is_last:
            result = stops.push(self._detokenizer.finish())
            parts.append(result.text)
            if result.matched is not None:
                return "".join(parts), result.matched, len(token_ids)
            parts.append(stops.finish())
        return "".join(parts), None, len(token_ids)


def _engine_request(request: TextRequest, prompt_ids: list[int], index: int) -> Generate:
    request_id, sampling = request.request_id, request.sampling
    if request.n > 1:
        request_id = f"{request_id}-{index}"
        if sampling.seed is not None:
            seed = sampling.seed + index
            seed = seed if seed < _NUM_SEEDS else seed - _NUM_SEEDS
            sampling = msgspec.structs.replace(sampling, seed=seed)
    return Generate(
        request_id=request_id,
        prompt_ids=prompt_ids,
        sampling=sampling,
        extra_key=request.extra_key,
        priority=request.priority,
    )


def _check_in_vocabulary(token_ids: list[int], vocab_size: int) -> None:
    if not token_ids or (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        return
    wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
    raise InvalidRequest(
        f"the prompt has the token id {wrong} but this model's ids are in [0, {vocab_size - 1}]; "
        "encode the prompt with this model's tokenizer",
        param="prompt",
    )


def _ends_with_stop_token(token_ids: Sequence[int], finish: Finish) -> bool:
    is_stop = finish.kind == "stop" and isinstance(finish.matched, int)
    return is_stop and bool(token_ids) and token_ids[-1] == finish.matched


async def _all_waiting(queue: asyncio.Queue[T]) -> list[T]:
    """Wait for one item, then take every other that is already there."""
    items = [await queue.get()]
    while not queue.empty():
        items.append(queue.get_nowait())
    return items


def _joined(earlier: TextChunk, later: TextChunk) -> TextChunk:
    """Two chunks of one sample as one."""
    return TextChunk(
        index=later.index,
        text=earlier.text + later.text,
        token_ids=earlier.token_ids + later.token_ids,
        finish=later.finish,
        num_prompt_tokens=later.num_prompt_tokens,
        num_output_tokens=later.num_output_tokens,
        num_cached_tokens=later.num_cached_tokens,
        queue_time_s=later.queue_time_s,
    )
