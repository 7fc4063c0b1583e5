"""`sapwood.LLM`: the engine inside this process, for scripts and notebooks."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from sapwood.app.services import build_services
from sapwood.app.wiring import Engine, build_engine, resolve_config
from sapwood.base.channel import CallbackSender, QueueChannel
from sapwood.base.errors import ConfigError, EngineUnavailable, InvalidRequest
from sapwood.engine.client import AsyncEngineClient
from sapwood.frontends.common.services import Services
from sapwood.schema.config.engine import COMPONENTS, EngineConfig
from sapwood.schema.config.options import gather
from sapwood.schema.env import environment, home
from sapwood.schema.output import EngineOutput, EngineStatus, Finish
from sapwood.schema.request import EngineInput
from sapwood.schema.sampling import SamplingParams
from sapwood.text.generation import TextChunk, TextRequest

log = logging.getLogger(__name__)

T = TypeVar("T")
Prompt = str | list[int]
Message = Mapping[str, Any]
Sampling = SamplingParams | Mapping[str, Any] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationResult:
    """The whole output of one prompt; `finish` says why it ended."""

    prompt_index: int
    text: str
    token_ids: tuple[int, ...]
    finish: Finish
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int


class LLM:
    """One model, served inside this process by two threads: an event loop and the engine.

        with LLM("smollm2-135m") as llm:
            print(llm.chat([{"role": "user", "content": "Hello"}])[0].text)

    model    catalogue name, hub repository id, or path
    options  any option of `sapwood serve` that concerns the engine, by its name with underscores
             (max_total_tokens=4096); or give a whole `config` instead

    Raises StartupError if the model cannot be had or does not fit. Methods may be called from any
    thread. What the engine refuses raises InvalidRequest; an engine that died, EngineUnavailable.
    """

    def __init__(
        self,
        model: str = "smollm2-135m",
        *,
        config: EngineConfig | None = None,
        **options: Any,
    ) -> None:
        asked = config if config is not None else _config(model, options)
        if config is not None and options:
            raise ConfigError("give either a config or single options, not both")
        resolved = resolve_config(asked, home=home(environment()))
        self.config = resolved.config
        self._loop = asyncio.new_event_loop()
        self._loop_thread = threading.Thread(
            target=self._loop.run_forever, name="sapwood-loop", daemon=True
        )
        channel: QueueChannel[EngineInput] = QueueChannel()
        self._client = AsyncEngineClient(channel)
        sender: CallbackSender[EngineOutput] = CallbackSender(self._deliver)
        self._engine = build_engine(resolved, channel, sender)
        self.services: Services = build_services(self._client, resolved.files, resolved.config)
        self._engine_thread = threading.Thread(
            target=self._serve, args=(self._engine,), name="sapwood-engine", daemon=True
        )
        self._closed = False
        self._num_requests = 0
        self._loop_thread.start()
        self._deliver(self._engine.ready)
        self._engine_thread.start()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- all at once -------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] = None,
        *,
        on_finish: Callable[[int, GenerationResult], None] | None = None,
    ) -> list[GenerationResult]:
        """The continuation of each prompt (text or token ids), in their order.

        sampling   one for all prompts, or one per prompt
        on_finish  called with (index, result) as each one ends
        """
        many = _as_prompts(prompts)
        requests = [
            self._request(prompt, one, add_special_tokens=True)
            for prompt, one in zip(many, _as_many(sampling, len(many)), strict=True)
        ]
        return self.run(self._gather(requests, on_finish))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling: Sampling | Sequence[Sampling] = None,
        *,
        on_finish: Callable[[int, GenerationResult], None] | None = None,
        **template_options: Any,
    ) -> list[GenerationResult]:
        """The answer to one conversation, or to each of several, in their order."""
        one = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = [messages] if one else messages
        requests = [
            self._chat_request(conversation, each, template_options)
            for conversation, each in zip(
                conversations, _as_many(sampling, len(conversations)), strict=True
            )
        ]
        return self.run(self._gather(requests, on_finish))

    # ---- as it comes -------------------------------------------------------------------------

    def stream(self, prompt: Prompt, sampling: Sampling = None) -> Iterator[TextChunk]:
        """Chunks of text as they are generated; closing the iterator aborts the request."""
        return self._iterate(self._request(prompt, sampling, add_special_tokens=True))

    def stream_chat(
        self, messages: Sequence[Message], sampling: Sampling = None, **template_options: Any
    ) -> Iterator[TextChunk]:
        return self._iterate(self._chat_request(messages, sampling, template_options))

    async def astream(self, prompt: Prompt, sampling: Sampling = None) -> AsyncIterator[TextChunk]:
        """`stream` for an asyncio program; its event loop is not held up."""
        chunks = self.stream(prompt, sampling)
        try:
            while (chunk := await asyncio.to_thread(next, chunks, None)) is not None:
                yield chunk
        finally:
            await asyncio.to_thread(_close, chunks)

    async def agenerate(self, prompt: Prompt, sampling: Sampling = None) -> GenerationResult:
        """`generate` of one prompt for an asyncio program."""
        request = self._request(prompt, sampling, add_special_tokens=True)
        return await asyncio.wrap_future(self._submit(self._collect(0, request, None)))

    # ---- the engine --------------------------------------------------------------------------

    def stats(self) -> EngineStatus:
        """Counters and gauges of the engine."""
        return self.run(self._client.status())

    def flush_cache(self) -> bool:
        """Forget all cached prefixes; False while requests are open."""
        return self.run(self._client.flush_cache()).done

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the engine's event loop and wait for its result."""
        result: T = self._submit(coroutine).result()
        return result

    def close(self) -> None:
        """Abort what is open and free the memory. May be called twice."""
        if self._closed:
            return
        self._closed = True
        self._loop.call_soon_threadsafe(self._client.drain, 0.0)
        self._engine_thread.join()
        self._engine.executor.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._loop_thread.join()
        self._loop.close()

    # ---- inside ------------------------------------------------------------------------------

    def _serve(self, engine: Engine) -> None:
        try:
            engine.loop.run()
        except Exception as error:
            log.exception("the engine failed")
            reason = f"the engine failed: {type(error).__name__}: {error}"
            self._loop.call_soon_threadsafe(self._client.fail, reason)

    def _deliver(self, message: EngineOutput) -> None:
        self._loop.call_soon_threadsafe(self._client.deliver, message)

    def _submit(self, coroutine: Coroutine[Any, Any, T]) -> Any:
        if self._closed:
            coroutine.close()
            raise EngineUnavailable("this LLM was closed; make a new one")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _request(
        self, prompt: Prompt, sampling: Sampling, *, add_special_tokens: bool
    ) -> TextRequest:
        self._num_requests += 1
        return TextRequest(
            request_id=f"llm-{self._num_requests}",
            prompt=prompt,
            add_special_tokens=add_special_tokens,
            sampling=_params(sampling, self.services.default_sampling),
        )

    def _chat_request(
        self, messages: Sequence[Message], sampling: Sampling, options: Mapping[str, Any]
    ) -> TextRequest:
        if self.services.template is None:
            raise InvalidRequest(
                f"{self.services.model_name} has no chat template; use generate, or give one with "
                "chat_template="
            )
        prompt = self.services.template.render(list(messages), **options)
        return self._request(prompt, sampling, add_special_tokens=False)

    async def _gather(
        self,
        requests: Sequence[TextRequest],
        on_finish: Callable[[int, GenerationResult], None] | None,
    ) -> list[GenerationResult]:
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._collect(index, request, on_finish))
                for index, request in enumerate(requests)
            ]
        return [task.result() for task in tasks]

    async def _collect(
        self,
        index: int,
        request: TextRequest,
        on_finish: Callable[[int, GenerationResult], None] | None,
    ) -> GenerationResult:
        texts: list[str] = []
        token_ids: list[int] = []
        last: TextChunk | None = None
        async for chunk in self.services.generator.generate(request):
            texts.append(chunk.text)
            token_ids += chunk.token_ids
            last = chunk
        assert last is not None
        assert last.finish is not None
        _raise_if_error(last.finish)
        result = GenerationResult(
            prompt_index=index,
            text="".join(texts),
            token_ids=tuple(token_ids),
            finish=last.finish,
            num_prompt_tokens=last.num_prompt_tokens,
            num_output_tokens=last.num_output_tokens,
            num_cached_tokens=last.num_cached_tokens,
        )
        if on_finish is not None:
            on_finish(index, result)
        return result

    def _iterate(self, request: TextRequest) -> Iterator[TextChunk]:
        chunks = self.services.generator.generate(request)
        try:
            while (chunk := self.run(anext(chunks, None))) is not None:
                if chunk.finish is not None:
                    _raise_if_error(chunk.finish)
                yield chunk
        finally:
            if not self._closed:
                self.run(chunks.aclose())


def _config(model: str, options: Mapping[str, Any]) -> EngineConfig:
    given = {"model": model, **options}
    return EngineConfig.of(gather(COMPONENTS, flags={}, env={}, file=given, file_name="LLM(…)"))


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [list(prompts)]  # type: ignore[arg-type]
    return list(prompts)  # type: ignore[arg-type]


def _as_many(sampling: Sampling | Sequence[Sampling], count: int) -> list[Sampling]:
    if sampling is None or isinstance(sampling, SamplingParams | Mapping):
        return [sampling] * count
    if len(sampling) != count:
        raise InvalidRequest(f"{len(sampling)} sampling parameters for {count} prompts")
    return list(sampling)


def _params(sampling: Sampling, defaults: Mapping[str, float]) -> SamplingParams:
    if isinstance(sampling, SamplingParams):
        return sampling
    try:
        return msgspec.convert({**defaults, **(sampling or {})}, SamplingParams)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"sampling parameters: {error}") from error


def _raise_if_error(finish: Finish) -> None:
    if finish.kind != "error":
        return
    message = finish.message or "the engine failed"
    raise InvalidRequest(message) if finish.status < 500 else EngineUnavailable(message)


def _close(chunks: Iterator[TextChunk]) -> None:
    close = getattr(chunks, "close", None)
    if close is not None:
        close()
