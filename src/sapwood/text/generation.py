"""From prompts to streams of text, with an engine that knows only token ids in between."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterator,
    Sequence,
)
from contextlib import aclosing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import msgspec

from sapwood.base.errors import InvalidRequest, PromptTooLong, UnsupportedFeature
from sapwood.observe.tracing import RequestTrace
from sapwood.schema import limits
from sapwood.schema.client import EngineClient
from sapwood.schema.handover import Handover
from sapwood.schema.logits_processors import check_processor
from sapwood.schema.logprobs import LogprobOptions
from sapwood.schema.media import Medium
from sapwood.schema.media_source import MediaSource
from sapwood.schema.output import Finish, RequestOutput, summed
from sapwood.schema.pooling import Pooling, why_not
from sapwood.schema.request import FLOAT32_BYTES, Generate, RequestOptions, TraceContext
from sapwood.schema.sampling import SamplingParams
from sapwood.text.absent import AbsentTokenizer, check_without_tokenizer
from sapwood.text.allowance import AnswerAllowance
from sapwood.text.sample import Sample
from sapwood.text.sample import ScoredPrompt as ScoredPrompt
from sapwood.text.sample import TextChunk as TextChunk
from sapwood.text.stop_regex import check_patterns
from sapwood.text.tokenizer import Tokenizer

MAX_SAMPLES = limits.SAMPLES.most
"""Samples that one request may ask for, as in OpenAI's API."""

MAX_CHARS_PER_TOKEN = 128
"""A text with more characters per token of the context than this cannot fit into the context.

Runs of blanks, which some vocabularies have as one token, are the longest tokens there are.
"""

ENCODE_IN_THREAD_CHARS = 8192
"""Longer prompts are encoded in a thread: this length would hold up the event loop for 2 ms."""

_NUM_SEEDS = 2**64

Encode = Callable[[str, bool], Awaitable[list[int]]]

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRequest:
    """One prompt and how to go on with it.

    prompt              text, or token ids, which are taken as they are; empty with input_embeds
    input_embeds        vectors that take the place of the prompt's token embeddings: fp32, little
                        endian, one piece per token
    add_special_tokens  whether the tokenizer adds BOS or EOS to a text
    media               pictures and videos, whose markers stand in the prompt in their order
    prepared            media that the engine takes as they are; the prompt is token ids
    options             what else the request asks for
    stream_interval     tokens that every chunk but the last has at least
    n                   number of samples; with a seed, sample i takes seed + i
    trace               the request's spans; None: it is not traced
    allowance           what the answer may tell besides its text; None: anything
    turn                the request's place in a session; None: it is in none
    handovers           where the pages of each sample are handed over; empty: one engine reads the
                        prompt and answers it
    """

    request_id: str
    prompt: str | list[int]
    add_special_tokens: bool = True
    options: RequestOptions
    stream_interval: int = 1
    n: int = 1
    input_embeds: Sequence[bytes] = ()
    media: Sequence[MediaSource] = ()
    prepared: Sequence[Medium] = ()
    trace: RequestTrace | None = None
    allowance: AnswerAllowance | None = None
    turn: TurnOfSession | None = None
    handovers: Sequence[Handover] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.n <= MAX_SAMPLES:
            raise InvalidRequest(f"n is {self.n} but must be in [1, {MAX_SAMPLES}]", param="n")
        if self.stream_interval < 1:
            raise InvalidRequest(
                f"stream_interval is {self.stream_interval} but must be >= 1",
                param="stream_interval",
            )


class MediaPreparer(Protocol):
    """Prepares the media of a prompt; `sapwood.multimodal.preparer` has the one that there is."""

    async def prepare(
        self, prompt: str | list[int], sources: Sequence[MediaSource], encode: Encode
    ) -> tuple[list[int], list[Medium]]: ...

    def close(self) -> None: ...


class TurnOfSession(Protocol):
    """Hears how a request goes on; `frontends.serving.sessions` has the one that there is."""

    def begun(self) -> None: ...

    def heard(self, token_ids: Sequence[int], *, is_last: bool) -> None: ...

    def ended(self) -> None: ...


class TextGenerator:
    """Turns text requests into engine requests, and the engine's tokens into text.

    engine          generates the tokens
    tokenizer       the tokenizer of the engine's model
    context_length  prompt and output tokens at most; None: the engine reports it
    vocab_size      token ids that the model knows; None: as many as the tokenizer knows. An id must
                    be known to both: without the model it has no embedding, without the tokenizer
                    no text
    logits_processors  names that a request may give as its custom_logit_processor
    allow_code      whether a request may bring code as its custom_logit_processor
    tells_hidden    whether requests may ask for hidden states
    hidden_size     length of a token's embedding; None: only the engine knows
    pooling         how the model makes embeddings or scores; None: the model generates
    encode          encodes a text (text, whether to add BOS or EOS), where there is something
                    better than the tokenizer alone
    preparer        prepares pictures and videos; None: the model takes only text
    stream_interval  tokens that a chunk has at least, but for the first and the last one
    truncates       whether a prompt that is too long is cut at its end, not refused
    """

    def __init__(
        self,
        engine: EngineClient,
        tokenizer: Tokenizer,
        *,
        context_length: int | None = None,
        vocab_size: int | None = None,
        logits_processors: Collection[str] = (),
        allow_code: bool = False,
        tells_hidden: bool = False,
        hidden_size: int | None = None,
        pooling: Pooling | None = None,
        encode: Encode | None = None,
        preparer: MediaPreparer | None = None,
        stream_interval: int = 1,
        truncates: bool = False,
    ) -> None:
        self.truncates = truncates
        self._preparer = preparer
        self.stream_interval = stream_interval
        self._engine = engine
        self._encode = encode
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._logits_processors = logits_processors
        self._allow_code = allow_code
        self._tells_hidden = tells_hidden
        self._hidden_size = hidden_size
        self._pooling = pooling
        known = tokenizer.vocab_size
        self.vocab_size = known if vocab_size is None else min(known, vocab_size)
        self._open: dict[str, OpenRequest] = {}
        self._ids: set[str] = set()

    async def generate(
        self, request: TextRequest, opened: OpenRequest | None = None
    ) -> AsyncGenerator[TextChunk, None]:
        """Yield chunks until each of the n samples has had its `finish`.

        opened  of `opened`, if the caller keeps the request open; None: it is open meanwhile

        Closing the generator early aborts the samples that still run. A failure in the engine
        comes as a chunk whose finish is of kind "error"; a prompt or parameter that cannot be
        served raises InvalidRequest or PromptTooLong before anything is submitted.
        """
        unable = why_not(self._pooling, "tokens")
        if unable is not None:
            raise InvalidRequest(unable)
        with (
            self.opened(request.request_id, request.n)
            if opened is None
            else nullcontext(opened) as held
        ):
            self.check_sampling(request.options.sampling)
            request, media = await self._with_media(request)
            prompt_ids = await self.encode_prompt(request)
            if request.options.logprobs is not None:
                self._check_logprobs(request.options.logprobs, prompt_ids)
            self._check_told(request)
            if request.allowance is not None:
                self._take_prompt(request, request.allowance, len(prompt_ids))
            if request.trace is not None:
                request.trace.tokenized(len(prompt_ids))
            parts = [
                _engine_request(request, prompt_ids, media, index) for index in range(request.n)
            ]
            every = max(request.stream_interval, self.stream_interval)
            chunks = (
                self._one(0, parts[0], held, every)
                if request.n == 1
                else self._merged(parts, held, every)
            )
            async with aclosing(chunks):
                async for chunk in chunks:
                    yield chunk

    def close(self) -> None:
        """End the processes that prepare media. May be called twice."""
        if self._preparer is not None:
            self._preparer.close()

    async def _with_media(self, request: TextRequest) -> tuple[TextRequest, list[Medium]]:
        """The request with its prompt as token ids that have places for its media, and these."""
        if not request.media:
            return request, list(request.prepared)
        if request.input_embeds:
            raise InvalidRequest(
                "a prompt of input_embeds can show no pictures; send text or token ids",
                param="input_embeds",
            )
        start_ns = time.time_ns()
        token_ids, media = await self.encode_showing(
            request.prompt, request.media, add_special_tokens=request.add_special_tokens
        )
        if request.trace is not None:
            request.trace.prepared(len(media), start_ns)
        return replace(request, prompt=token_ids), media

    async def encode_showing(
        self,
        prompt: str | list[int],
        sources: Sequence[MediaSource],
        *,
        add_special_tokens: bool,
    ) -> tuple[list[int], list[Medium]]:
        """(the prompt as token ids that have places for its media, these as a tower reads them)

        sources  at least one; their markers stand in the prompt in their order
        Raises   InvalidRequest or UnsupportedFeature with the place of the one that is wrong
        """
        if self._preparer is None:
            raise UnsupportedFeature(
                f"{sources[0].where} is of the kind {sources[0].kind}, but this model "
                "takes only text; leave it out or serve a model that sees",
                param=sources[0].where,
            )
        if not isinstance(prompt, str):
            self.check_token_ids(prompt, "the prompt", param="prompt")

        async def encode(text: str, is_whole: bool) -> list[int]:
            return await self.encode(text, is_whole and add_special_tokens)

        return await self._preparer.prepare(prompt, sources, encode)

    @contextmanager
    def opened(self, request_id: str, n: int = 1) -> Iterator[OpenRequest]:
        """While the `with` block runs, the ids of the request and of its n samples are taken, and
        `abort` finds the request, even during its encoding.

        This is the one place where ids are compared: the engine relies on it.
        Raises  InvalidRequest if the id is too long, or an open request has one of these ids
        """
        limits.REQUEST_ID.check(len(request_id), "rid")
        ids = {request_id, *part_ids(request_id, n)}
        taken = ids & self._ids
        if taken:
            raise InvalidRequest(
                f"a request with rid {min(taken)!r} is still open; choose another rid", param="rid"
            )
        self._ids |= ids
        opened = self._open[request_id] = OpenRequest()
        try:
            yield opened
        finally:
            del self._open[request_id]
            self._ids -= ids

    def open_ids(self, prefix: str) -> list[str]:
        """Ids of the open requests that start with `prefix`, oldest first."""
        return [request_id for request_id in self._open if request_id.startswith(prefix)]

    async def abort(self, request_id: str) -> None:
        """End all samples of a request; each still gets a chunk with a finish.

        An id that no open request has is ignored.
        """
        opened = self._open.get(request_id)
        if opened is not None:
            opened.is_aborted = True
            for part_id in list(opened.submitted):
                await self._engine.abort(part_id)

    async def count_prompt(self, request: TextRequest) -> int:
        """Tokens of the prompt, those of its pictures and videos included, however many."""
        request, _ = await self._with_media(request)
        if isinstance(request.prompt, str):
            return len(await self.encode(request.prompt, request.add_special_tokens))
        return len(request.prompt)

    async def encode_prompt(self, request: TextRequest) -> list[int]:
        """The prompt's token ids, checked: `generate` accepts a prompt that passes here."""
        param = "input_embeds" if request.input_embeds else "prompt"
        if request.input_embeds:
            self._check_embeds(request)
            prompt_ids = [0] * len(request.input_embeds)
        elif isinstance(request.prompt, str):
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
        # The context must have room for at least one output token.
        if self.truncates and not (request.media or request.prepared or request.input_embeds):
            return prompt_ids[: context_length - 1]
        if len(prompt_ids) > context_length - 1:
            raise PromptTooLong(
                len(prompt_ids),
                context_length - 1,
                f"the context length of {context_length}",
                param=param,
            )
        return prompt_ids

    def _check_embeds(self, request: TextRequest) -> None:
        for position, vector in enumerate(request.input_embeds):
            size = len(vector) // FLOAT32_BYTES
            if self._hidden_size is not None and size != self._hidden_size:
                raise InvalidRequest(
                    f"input_embeds[{position}] has {size} numbers but this model's embeddings have "
                    f"{self._hidden_size}; take vectors of this model",
                    param="input_embeds",
                )
        if request.options.prompt_scores_start is not None:
            raise InvalidRequest(
                "logprob_start_len asks for log probabilities of the prompt, but input_embeds are "
                "no tokens that could have any; leave it out",
                param="logprob_start_len",
            )

    def _check_told(self, request: TextRequest) -> None:
        if request.options.return_hidden_states and not self._tells_hidden:
            raise InvalidRequest(
                "return_hidden_states is not possible on this server as it was started; leave it "
                "out, or start the server with --enable-return-hidden-states",
                param="return_hidden_states",
            )
        if request.options.return_routed_experts and not self._engine.info.routed_bytes:
            raise InvalidRequest(
                "return_routed_experts is not possible on this server as it was started; leave it "
                "out, or serve a model with experts and --enable-return-routed-experts",
                param="return_routed_experts",
            )

    def _take_prompt(
        self, request: TextRequest, allowance: AnswerAllowance, num_tokens: int
    ) -> None:
        """What the answer will tell of the prompt, once per sample."""
        options = request.options.logprobs
        if options is not None and options.prompt_start is not None:
            num_scored = num_tokens - 1 - options.prompt_start
            allowance.take_logprobs(request.n * num_scored * options.num_per_token)
        if request.options.return_hidden_states and self._hidden_size is not None:
            num_bytes = num_tokens * self._hidden_size * FLOAT32_BYTES
            allowance.take_prompt_bytes("return_hidden_states", request.n * num_bytes)
        if request.options.return_routed_experts:
            num_bytes = num_tokens * self._engine.info.routed_bytes
            allowance.take_prompt_bytes("return_routed_experts", request.n * num_bytes)

    async def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """The token ids of a text. A long text is encoded in a thread.

        Raises InvalidRequest if the text has too many characters for the context. Its number of
        tokens is not told then: encoding such a text could take minutes and a gigabyte.
        """
        context_length = self._context_length or self._engine.info.context_length
        longest = context_length * MAX_CHARS_PER_TOKEN
        if self.truncates:
            text = text[:longest]
        elif len(text) > longest:
            raise InvalidRequest(
                f"the text has {len(text)} characters, but with the context length of "
                f"{context_length} this server takes at most {longest}; shorten it",
                param="prompt",
            )
        if self._encode is not None:
            return await self._encode(text, add_special_tokens)
        if len(text) < ENCODE_IN_THREAD_CHARS:
            return self._tokenizer.encode(text, add_special_tokens)
        return await asyncio.to_thread(self._tokenizer.encode, text, add_special_tokens)

    def check_token_ids(self, token_ids: Collection[int], what: str, *, param: str) -> None:
        """Raises InvalidRequest if a token id is not in the vocabulary.

        what   the ids' place in the request, for the error ("the prompt")
        param  name of that field
        """
        if not token_ids or (min(token_ids) >= 0 and max(token_ids) < self.vocab_size):
            return
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < self.vocab_size)
        raise InvalidRequest(
            f"{what} has the token id {wrong} but this model's ids are in "
            f"[0, {self.vocab_size - 1}]; take ids of this model's tokenizer",
            param=param,
        )

    def _check_how_many(self, token_ids: Collection[int], name: str) -> None:
        """InvalidRequest if there are so many that some must be there more than once."""
        if len(token_ids) > self.vocab_size:
            raise InvalidRequest(
                f"{name} has {len(token_ids)} token ids but this model knows only "
                f"{self.vocab_size}; send each id once",
                param=name,
            )

    def check_sampling(self, sampling: SamplingParams) -> None:
        """Raises InvalidRequest for a parameter that this model or server cannot honour."""
        for name, token_ids in sampling.token_ids():
            self._check_how_many(token_ids, name)
            self.check_token_ids(token_ids, name, param=name)
        if sampling.stop_regex:
            check_patterns(sampling.stop_regex)
        if sampling.custom_logit_processor is not None:
            check_processor(
                sampling.custom_logit_processor, self._logits_processors, self._allow_code
            )
        if isinstance(self._tokenizer, AbsentTokenizer):
            check_without_tokenizer(sampling)

    def _check_logprobs(self, asked: LogprobOptions, prompt_ids: Sequence[int]) -> None:
        self.check_token_ids(asked.token_ids, "token_ids_logprob", param="token_ids_logprob")
        start, last = asked.prompt_start, len(prompt_ids) - 1
        if start is not None and start > last:
            raise InvalidRequest(
                f"logprob_start_len is {start} but must be in [-1, {last}], since the prompt has "
                f"{last + 1} tokens",
                param="logprob_start_len",
            )

    async def _one(
        self, index: int, request: Generate, opened: OpenRequest, every: int
    ) -> AsyncGenerator[TextChunk, None]:
        """The chunks of a single sample, straight from the engine's iterator, without a task."""
        sample = Sample(index, request, self._tokenizer)
        if opened.is_aborted:
            yield sample.ended(Finish(kind="abort"))
            return
        opened.submitted.append(request.request_id)
        outputs = self._engine.generate(request)
        waiting: TextChunk | None = None
        # What the server asks for never holds back the first token, for which somebody waits.
        is_first = every == self.stream_interval
        try:
            async for output in outputs:
                chunk = sample.advance(output)
                if waiting is not None:
                    chunk, waiting = summed([waiting, chunk]), None
                if chunk.finish is not None:
                    last = chunk
                    break
                if every > 1 and len(chunk.token_ids) < (1 if is_first else every):
                    waiting = chunk
                else:
                    is_first = False
                    yield chunk
            else:
                last = sample.ended(_lost(request.request_id))
                last = last if waiting is None else summed([waiting, last])
        finally:
            # Before the last chunk goes out: the engine should not compute tokens for nobody.
            await self._close(outputs, request.request_id)
        yield last

    async def _close(self, outputs: AsyncIterator[RequestOutput], request_id: str) -> None:
        """Close the engine's iterator, which aborts the request if it still runs."""
        if isinstance(outputs, AsyncGenerator):
            await outputs.aclose()
        else:
            await self._engine.abort(request_id)

    async def _merged(
        self, parts: Sequence[Generate], opened: OpenRequest, every: int
    ) -> AsyncGenerator[TextChunk, None]:
        """The chunks of several samples as they come; waiting chunks of one sample are joined."""
        arrived: asyncio.Queue[TextChunk | asyncio.Task[None]] = asyncio.Queue()

        async def pump(index: int, part: Generate) -> None:
            chunks = self._one(index, part, opened, every)
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
                together: defaultdict[int, list[TextChunk]] = defaultdict(list)
                ended: list[asyncio.Task[None]] = []
                for item in await _all_waiting(arrived):
                    if isinstance(item, asyncio.Task):
                        ended.append(item)
                    else:
                        together[item.index].append(item)
                for chunks in together.values():
                    yield summed(chunks)
                for task in ended:
                    task.result()
                num_running -= len(ended)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(slots=True)
class OpenRequest:
    """A request that is being answered.

    submitted  ids of the samples that the engine has got; only these can be aborted there
    """

    is_aborted: bool = False
    submitted: list[str] = field(default_factory=list)


def part_ids(request_id: str, n: int) -> list[str]:
    """The engine's ids of a request's samples."""
    return [request_id] if n == 1 else [f"{request_id}-{index}" for index in range(n)]


def _engine_request(
    request: TextRequest, prompt_ids: list[int], media: list[Medium], index: int
) -> Generate:
    options = request.options
    sampling = options.sampling
    if index > 0 and sampling.seed is not None:
        seed = sampling.seed + index
        seed = seed if seed < _NUM_SEEDS else seed - _NUM_SEEDS
        sampling = msgspec.structs.replace(sampling, seed=seed)
        options = msgspec.structs.replace(options, sampling=sampling)
    if request.handovers:
        options = msgspec.structs.replace(options, handover=request.handovers[index])
    return Generate(
        request_id=part_ids(request.request_id, request.n)[index],
        prompt_ids=prompt_ids,
        options=options,
        input_embeds=list(request.input_embeds),
        media=media,
        trace=_trace_context(request),
    )


def _trace_context(request: TextRequest) -> TraceContext | None:
    if request.trace is None or not request.trace.parent:
        return None
    return TraceContext(request.trace.parent, time.time_ns())


def _lost(request_id: str) -> Finish:
    message = f"the engine ended request {request_id} without saying why; send it again"
    return Finish(kind="error", message=message)


async def _all_waiting(queue: asyncio.Queue[T]) -> list[T]:
    """Wait for one item, then take all further items that have arrived already."""
    items = [await queue.get()]
    while not queue.empty():
        items.append(queue.get_nowait())
    return items
