"""Text in, text out: what an engine's token ids mean to a client, as a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
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
    vocab_size      token ids that the model knows; None: as many as the tokenizer. The smaller of
                    the two counts: an id beyond it has no embedding, or no text
    """

    def __init__(
        self,
        engine: EngineClient,
        tokenizer: Tokenizer,
        *,
        context_length: int | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._context_length = context_length
        known = tokenizer.vocab_size
        self.vocab_size = known if vocab_size is None else min(known, vocab_size)
        self._open: dict[str, _Open] = {}

    async def generate(self, request: TextRequest) -> AsyncGenerator[TextChunk, None]:
        """Yield chunks until each of the n samples has had its `finish`.

        Closing the generator early aborts what still runs. What fails in the engine comes as a
        chunk whose finish is of kind "error"; a prompt or parameter that cannot be served raises
        InvalidRequest or PromptTooLong before anything is submitted.
        """
        if request.request_id in self._open:
            raise InvalidRequest(
                f"a request with the id {request.request_id!r} is still running; choose another id",
                param="rid",
            )
        # From here on an abort finds it, even while its prompt is being encoded.
        opened = self._open[request.request_id] = _Open()
        try:
            self._check_sampling(request.sampling)
            prompt_ids = await self.encode_prompt(request)
            parts = [_engine_request(request, prompt_ids, index) for index in range(request.n)]
            one = request.n == 1
            chunks = self._one(0, parts[0], opened) if one else self._merged(parts, opened)
            async with aclosing(chunks):
                async for chunk in chunks:
                    yield chunk
        finally:
            del self._open[request.request_id]

    async def abort(self, request_id: str) -> None:
        """End all samples of a request; each still gets a chunk with a finish. Unknown: no-op."""
        opened = self._open.get(request_id)
        if opened is not None:
            opened.is_aborted = True
            for part_id in list(opened.submitted):
                await self._engine.abort(part_id)

    async def encode_prompt(self, request: TextRequest) -> list[int]:
        """The prompt's token ids, checked: `generate` accepts a prompt that passes here."""
        if isinstance(request.prompt, str):
            prompt_ids = await self.encode(request.prompt, request.add_special_tokens)
            if self._tokenizer.vocab_size > self.vocab_size:
                self.check_token_ids(prompt_ids, "the prompt", param="prompt")
        else:
            prompt_ids = request.prompt
            self.check_token_ids(prompt_ids, "the prompt", param="prompt")
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

    async def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """The token ids of a text; a long one does not hold up the event loop."""
        if len(text) < ENCODE_IN_THREAD_CHARS:
            return self._tokenizer.encode(text, add_special_tokens)
        return await asyncio.to_thread(self._tokenizer.encode, text, add_special_tokens)

    def check_token_ids(self, token_ids: Collection[int], what: str, *, param: str) -> None:
        """InvalidRequest if one of them is not in the vocabulary.

        what   whose they are, for the error ("the prompt"); param: that field's name
        """
        if not token_ids or (min(token_ids) >= 0 and max(token_ids) < self.vocab_size):
            return
        wrong = next(one for one in token_ids if not 0 <= one < self.vocab_size)
        raise InvalidRequest(
            f"{what} has the token id {wrong} but this model's ids are in "
            f"[0, {self.vocab_size - 1}]; take ids of this model's tokenizer",
            param=param,
        )

    def _check_sampling(self, sampling: SamplingParams) -> None:
        self.check_token_ids(sampling.logit_bias, "logit_bias", param="logit_bias")
        self.check_token_ids(sampling.stop_token_ids, "stop_token_ids", param="stop_token_ids")

    async def _one(
        self, index: int, request: Generate, opened: _Open
    ) -> AsyncGenerator[TextChunk, None]:
        """One sample, straight from the engine's iterator: no task and no queue in between."""
        sample = _Sample(index, request, self._tokenizer)
        if opened.is_aborted:
            yield sample.ended(Finish(kind="abort"))
            return
        opened.submitted.append(request.request_id)
        outputs = self._engine.generate(request)
        try:
            async for output in outputs:
                chunk = sample.advance(output)
                if chunk.finish is not None:
                    last = chunk
                    break
                yield chunk
            else:
                last = sample.ended(_lost(request.request_id))
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

    async def _merged(
        self, parts: Sequence[Generate], opened: _Open
    ) -> AsyncGenerator[TextChunk, None]:
        """Several samples at once; chunks of a sample that wait together become one."""
        arrived: asyncio.Queue[TextChunk | asyncio.Task[None]] = asyncio.Queue()

        async def pump(index: int, part: Generate) -> None:
            chunks = self._one(index, part, opened)
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


@dataclass(slots=True)
class _Open:
    """A request that is being answered.

    submitted  ids of its samples that the engine has got; it is not asked to abort others
    """

    is_aborted: bool = False
    submitted: list[str] = field(default_factory=list)


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

    def ended(self, finish: Finish) -> TextChunk:
        """The last chunk of a sample whose end the engine did not tell."""
        output = RequestOutput(
            request_id=self._request_id,
            token_ids=[],
            num_prompt_tokens=self._num_prompt_tokens,
            finish=finish,
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


def _lost(request_id: str) -> Finish:
    message = f"the engine ended request {request_id} without saying why; send it again"
    return Finish(kind="error", message=message)


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
