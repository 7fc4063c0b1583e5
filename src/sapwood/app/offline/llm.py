"""`sapwood.LLM`: the engine inside this process, for scripts and notebooks."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import (
    AsyncGenerator,
    Callable,
    Coroutine,
    Generator,
    Mapping,
    Sequence,
)
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from sapwood.app.building.default_model import with_named_model
from sapwood.app.building.resolving import resolve_config
from sapwood.app.offline.chat import chat_turn
from sapwood.app.offline.in_process import InProcessEngine
from sapwood.app.offline.loop_thread import LoopThread
from sapwood.app.offline.media import media_of, per_prompt, with_images
from sapwood.app.offline.prompts import (
    Prompt,
    adapter_of_each,
    as_prompt,
    as_prompts,
    sampling_of_each,
)
from sapwood.app.offline.sampling import Sampling, sampling_params
from sapwood.app.serving.replica_engines import ReplicaEngines
from sapwood.app.serving.services import build_services
from sapwood.base.channel import QueueChannel
from sapwood.base.errors import ConfigError, EngineUnavailable, InvalidRequest, Overloaded
from sapwood.engine.client import AsyncEngineClient
from sapwood.engine.replicas import ReplicatedClient
from sapwood.frontends.serving.adapters import SENT, AdapterRegistry
from sapwood.frontends.serving.chat import Turn
from sapwood.frontends.serving.embed import check_dimensions, embed_all
from sapwood.frontends.serving.generate import Choice, EngineFailed, adapted
from sapwood.frontends.serving.scoring import scored_prompts, scores_of
from sapwood.frontends.serving.services import Services
from sapwood.schema.config.engine import COMPONENTS, EngineConfig
from sapwood.schema.config.options import gather
from sapwood.schema.config.scheduler import ResolvedScheduler
from sapwood.schema.env import environment, home
from sapwood.schema.media_source import MediaSource
from sapwood.schema.output import EngineStatus, Finish
from sapwood.schema.request import EngineInput, RequestOptions, SentAdapter
from sapwood.store.default_model import DEFAULT
from sapwood.text.answer import AnswerShape
from sapwood.text.embedding import EmbedRequest, PoolingOutput, shortened
from sapwood.text.events import Answer
from sapwood.text.generation import TextChunk, TextRequest

T = TypeVar("T")
Message = Mapping[str, Any]
OnFinish = Callable[[int, "GenerationResult"], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationResult:
    """The whole output of one prompt; `finish` says why it ended.

    text    as the model wrote it
    answer  of a chat: its content, the thinking before it, and its calls of tools, told apart
    """

    prompt_index: int
    text: str
    token_ids: tuple[int, ...]
    finish: Finish
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    answer: Answer | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingResult:
    """The embedding of a text, or the outputs of a classification head: `values`, [n] fp32."""

    values: NDArray[np.float32]
    num_prompt_tokens: int
    num_cached_tokens: int


class LLM:
    """One model, served inside this process by two threads: an event loop and the engine.

    With dp_size=N there are N engines, each in a process of its own.

        with LLM("smollm2-135m") as llm:
            print(llm.chat([{"role": "user", "content": "Hello"}])[0].text)

    model    catalogue name, hub repository id, or path; None: the default model, as for
             `sapwood serve`
    options  any option of `sapwood serve` that concerns the engine, by its name with underscores
             (max_total_tokens=4096); or give a whole `config`, and neither model nor options

    Raises StartupError if the model cannot be had or does not fit. Methods may be called from any
    thread. What cannot be served raises InvalidRequest; an engine that failed, or an LLM that was
    closed, raises EngineUnavailable. Any number of prompts may be given: as many are open at a time
    as the engine takes in, and the others wait here.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        config: EngineConfig | None = None,
        **options: Any,
    ) -> None:
        store = home(environment())
        asked = with_named_model(_asked(model, config, options), home=store)
        resolved = resolve_config(asked, home=store)
        self.config = resolved.config
        self._engine: InProcessEngine | ReplicaEngines
        self._client: AsyncEngineClient | ReplicatedClient
        self.services: Services
        if asked.parallel.dp_size > 1:
            replicas = self._engine = ReplicaEngines(asked, store)
            self._client = replicas.client
            self.services = build_services(
                replicas.client, resolved.files, resolved.config, replicas=replicas.replicas
            )
        else:
            channel: QueueChannel[EngineInput] = QueueChannel()
            client = self._client = AsyncEngineClient(channel)
            self.services = build_services(client, resolved.files, resolved.config)
            self._engine = InProcessEngine(resolved, channel, client)
        # Entered by every request, so that a full queue refuses none.
        self._num_open = _open_at_most(resolved.config.scheduler) * asked.parallel.dp_size
        self.room = asyncio.Semaphore(self._num_open)
        self._numbers = itertools.count(1)  # safe to share: any thread may take the next number

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
        images: Any = None,
        videos: Any = None,
        lora_path: str | Sequence[str | None] | None = None,
        on_finish: OnFinish | None = None,
    ) -> list[GenerationResult]:
        """The continuation of each prompt (text or token ids), in their order.

        sampling   one for all prompts, or one per prompt
        images     of one prompt, a picture or a list of them; of several, a list with that of each.
                   A picture is a URL, a path, bytes, one of PIL's, or an array [height, width, 3]
                   of uint8. The prompt has the model's marker for each
        videos     the same for videos; one may also be a list of frames
        lora_path  the name of a loaded LoRA adapter, for all prompts or one per prompt
        on_finish  called with (index, result) as each one ends, on the engine's event loop: it
                   should be quick, and use no method of this LLM that waits

        An error of one prompt (or of on_finish) ends all of them: what is open is aborted, then
        the error is raised, with a note that says which prompt it was. What had ended before was
        given to on_finish. An interrupt (Ctrl-C) aborts what is open likewise.
        """
        many = as_prompts(prompts)
        is_single = isinstance(prompts, str) or (len(many) == 1 and not isinstance(many[0], str))
        requests = [
            self._request(prompt, params, adapter, add_special_tokens=True, media=media)
            for prompt, params, adapter, media in zip(
                many,
                sampling_of_each(sampling, len(many)),
                adapter_of_each(lora_path, len(many)),
                self._media(images, videos, len(many), is_single=is_single),
                strict=True,
            )
        ]
        return self.run(self._collect_all(requests, on_finish))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling: Sampling | Sequence[Sampling] = None,
        *,
        images: Any = None,
        lora_path: str | None = None,
        on_finish: OnFinish | None = None,
        **template_options: Any,
    ) -> list[GenerationResult]:
        """The answer to one conversation, or to each of several, in their order.

        images     pictures before the text of the user's last message, as in `generate`; messages
                   may also have parts {"type": "image", "image": …}, {"type": "video", "video": …}
                   and OpenAI's

        As `generate` otherwise. Options that POST /v1/chat/completions has too (tools, tool_choice,
        parallel_tool_calls, documents, reasoning_effort, thinking_budget, separate_reasoning,
        continue_final_message) mean the same here; all others go to the chat template. The result's
        `answer` has the calls.
        """
        is_single = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = [messages] if is_single else messages
        shown = [images] if is_single else per_prompt(images, len(conversations), "images")
        conversations = [
            conversation if pictures is None else with_images(conversation, pictures)
            for conversation, pictures in zip(conversations, shown, strict=True)
        ]
        turns = [
            self._turn(conversation, each, template_options)
            for conversation, each in zip(
                conversations, sampling_of_each(sampling, len(conversations)), strict=True
            )
        ]
        requests = [self._chat_request(turn, lora_path) for turn in turns]
        shapes = [turn.shape for turn in turns]
        return self.run(self._collect_all(requests, on_finish, shapes))

    async def agenerate(
        self,
        prompt: Prompt,
        sampling: Sampling = None,
        *,
        images: Any = None,
        videos: Any = None,
        lora_path: str | None = None,
    ) -> GenerationResult:
        """`generate` of one prompt for an asyncio program; cancelling it aborts the request."""
        request = self._plain_request(prompt, sampling, lora_path, images, videos)
        return await self.loop.run_async(self._collect(0, request))

    # ---- as it comes -------------------------------------------------------------------------

    def stream(
        self,
        prompt: Prompt,
        sampling: Sampling = None,
        *,
        images: Any = None,
        videos: Any = None,
        lora_path: str | None = None,
    ) -> Generator[TextChunk, None, None]:
        """Chunks of text as they are generated.

        The request starts with the first chunk that is asked for; closing the generator aborts it.
        """
        request = self._plain_request(prompt, sampling, lora_path, images, videos)
        return self.loop.items(self._chunks(request))

    def stream_chat(
        self,
        messages: Sequence[Message],
        sampling: Sampling = None,
        *,
        lora_path: str | None = None,
        **template_options: Any,
    ) -> Generator[TextChunk, None, None]:
        """`stream` of the answer to a conversation, as the model writes it."""
        request = self._chat_request(self._turn(messages, sampling, template_options), lora_path)
        return self.loop.items(self._chunks(request))

    def astream(
        self,
        prompt: Prompt,
        sampling: Sampling = None,
        *,
        images: Any = None,
        videos: Any = None,
        lora_path: str | None = None,
    ) -> AsyncGenerator[TextChunk, None]:
        """`stream` for an asyncio program; its event loop is not held up."""
        request = self._plain_request(prompt, sampling, lora_path, images, videos)
        return self.loop.items_async(self._chunks(request))

    # ---- numbers -----------------------------------------------------------------------------

    def encode(
        self, prompts: Prompt | Sequence[Prompt], *, dimensions: int | None = None
    ) -> list[EmbeddingResult]:
        """The vector of each text (or of its token ids), in their order: for embedding models.

        Of a model with a classification head, what that says of the text, before any softmax.
        dimensions  so many numbers of each vector; None: all
        """
        pooling = self.services.pooling
        self.services.check_task("embed" if pooling is None else pooling.task)
        check_dimensions(self.services, dimensions)
        requests = [
            EmbedRequest(request_id=f"llm-{next(self._numbers)}", text=prompt, param="prompt")
            for prompt in as_prompts(prompts)
        ]
        normalize = pooling is not None and pooling.normalize
        return [
            EmbeddingResult(
                values=shortened(output.values, dimensions, normalize=normalize)
                if dimensions is not None
                else output.values,
                num_prompt_tokens=output.num_prompt_tokens,
                num_cached_tokens=output.num_cached_tokens,
            )
            for output in self._embed_all(requests)
        ]

    def score(
        self,
        query: Prompt,
        items: Prompt | Sequence[Prompt],
        label_token_ids: Sequence[int],
        *,
        apply_softmax: bool = False,
        item_first: bool = False,
    ) -> list[list[float]]:
        """How likely each of the labels follows the query and an item: a list per item.

        The query and the items are all texts, or all token ids.
        apply_softmax  among the labels only, so that they sum to 1; else among all tokens
        item_first     the item comes before the query
        """
        self.services.check_task("tokens")
        if not label_token_ids:
            raise InvalidRequest("label_token_ids is empty; give one", param="label_token_ids")
        prompts = scored_prompts(
            self.services, as_prompt(query, "the query"), as_prompts(items), item_first=item_first
        )
        requests = [
            EmbedRequest(
                request_id=f"llm-{next(self._numbers)}",
                text=prompt,
                param="items",
                label_ids=tuple(int(label) for label in label_token_ids),
            )
            for prompt in prompts
        ]
        answers = self._embed_all(requests)
        return [scores_of(answer, apply_softmax=apply_softmax) for answer in answers]

    def _embed_all(self, requests: Sequence[EmbedRequest]) -> list[PoolingOutput]:
        try:
            return self.run(embed_all(self.services, requests, room=self.room))
        except EngineFailed as error:
            finish = Finish(kind="error", message=error.message, status=error.status)
            raise self._error(finish) from error

    # ---- the engine --------------------------------------------------------------------------

    def stats(self) -> EngineStatus:
        """Counters and gauges of the engine."""
        return self.run(self._client.status())

    def flush_cache(self) -> bool:
        """Forget all cached prefixes; False while requests are open."""
        return self.run(self._client.flush_cache()).done

    def load_lora_adapter(
        self, lora_name: str, lora_path: str | Path, *, pinned: bool = False
    ) -> None:
        """Load the adapter in a folder while the model serves. InvalidRequest if it cannot be."""
        self.run(self._adapters.load(lora_name, str(lora_path), pinned=pinned))

    def load_lora_adapter_from_tensors(
        self,
        lora_name: str,
        tensors: Mapping[str, Tensor],
        config_dict: Mapping[str, Any],
        *,
        pinned: bool = False,
    ) -> None:
        """Load an adapter from PEFT's tensors, by their names, and what adapter_config.json has.

        Raises InvalidRequest if it cannot be served."""
        sent = SentAdapter(
            config=msgspec.json.encode(dict(config_dict)),
            tensors=save({name: tensor.contiguous() for name, tensor in tensors.items()}),
        )
        self.run(self._adapters.load(lora_name, SENT, pinned=pinned, sent=sent))

    def unload_lora_adapter(self, lora_name: str) -> None:
        """Forget an adapter, once its open requests have ended. NotFound if there is none."""
        self.run(self._adapters.unload(lora_name))

    @property
    def _adapters(self) -> AdapterRegistry:
        assert self.services.adapters is not None, "build_services makes the registry"
        return self.services.adapters

    @property
    def loop(self) -> LoopThread:
        """The engine's event loop: what uses `services` must run on it."""
        return self._engine.loop

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the engine's event loop and wait for its result."""
        return self.loop.run(coroutine)

    def close(self) -> None:
        """End everything and free the memory; may be called twice.

        What is open ends with the finish "abort", what had not started with EngineUnavailable.
        """
        self._engine.close()
        self.services.close()

    # ---- inside ------------------------------------------------------------------------------

    def _request(
        self,
        prompt: str | list[int],
        sampling: Sampling,
        adapter: str | None,
        *,
        add_special_tokens: bool,
        media: Sequence[MediaSource] = (),
    ) -> TextRequest:
        return TextRequest(
            request_id=f"llm-{next(self._numbers)}",
            prompt=prompt,
            media=media,
            add_special_tokens=add_special_tokens,
            options=RequestOptions(
                sampling=sampling_params(sampling, self.services.default_sampling),
                adapter=self.services.adapter_of("", adapter),
            ),
        )

    def _turn(
        self, messages: Sequence[Message], sampling: Sampling, options: Mapping[str, Any]
    ) -> Turn:
        params = sampling_params(sampling, self.services.default_sampling)
        return chat_turn(self.services, messages, params, options)

    def _chat_request(self, turn: Turn, adapter: str | None) -> TextRequest:
        return self._request(
            turn.prompt, turn.sampling, adapter, add_special_tokens=False, media=turn.media
        )

    def _plain_request(
        self, prompt: Prompt, sampling: Sampling, adapter: str | None, images: Any, videos: Any
    ) -> TextRequest:
        [media] = self._media(images, videos, 1, is_single=True)
        text = as_prompt(prompt)
        return self._request(text, sampling, adapter, add_special_tokens=True, media=media)

    def _media(
        self, images: Any, videos: Any, count: int, *, is_single: bool
    ) -> list[Sequence[MediaSource]]:
        """The media of each prompt."""
        kinds = self.services.media_markers
        if is_single:
            return [media_of(images, videos, kinds)]
        by_prompt = zip(
            per_prompt(images, count, "images"), per_prompt(videos, count, "videos"), strict=True
        )
        return [
            media_of(pictures, films, kinds, where=f"prompts[{i}].")
            for i, (pictures, films) in enumerate(by_prompt)
        ]

    async def _collect_all(
        self,
        requests: Sequence[TextRequest],
        on_finish: OnFinish | None,
        shapes: Sequence[AnswerShape] = (),
    ) -> list[GenerationResult]:
        """All results in order, as many requests at a time as there is room for.

        shapes  of chats: how their answers are read
        """
        results: dict[int, GenerationResult] = {}
        numbered = iter(enumerate(requests))

        async def work() -> None:
            for index, request in numbered:
                try:
                    shape = shapes[index] if shapes else None
                    results[index] = await self._collect(index, request, shape)
                except Exception as error:
                    if len(requests) > 1:
                        error.add_note(f"this was prompt {index} of {len(requests)}, from 0")
                    raise
                if on_finish is not None:
                    on_finish(index, results[index])

        workers = [asyncio.create_task(work()) for _ in range(min(len(requests), self._num_open))]
        try:
            for worker in await _until_error(workers):
                worker.result()
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        return [results[index] for index in range(len(requests))]

    async def _collect(
        self, index: int, request: TextRequest, shape: AnswerShape | None = None
    ) -> GenerationResult:
        choice = Choice()
        async with aclosing(self._chunks(request)) as chunks:
            async for chunk in chunks:
                choice.add(chunk)
        whole = choice.whole
        assert whole.finish is not None, "the last chunk of a request has a finish"
        return GenerationResult(
            prompt_index=index,
            text=whole.text,
            token_ids=whole.token_ids,
            finish=whole.finish,
            num_prompt_tokens=whole.num_prompt_tokens,
            num_output_tokens=whole.num_output_tokens,
            num_cached_tokens=whole.num_cached_tokens,
            answer=None if shape is None else shape.parsed(whole.text),
        )

    async def _chunks(self, request: TextRequest) -> AsyncGenerator[TextChunk, None]:
        """The request's chunks, once there is room for it. A finish of kind "error" is raised."""
        async with (
            self.room,
            adapted(self.services, [request]) as [own],
            aclosing(self.services.generator.generate(own)) as chunks,
        ):
            async for chunk in chunks:
                if chunk.finish is not None and chunk.finish.kind == "error":
                    raise self._error(chunk.finish)
                yield chunk

    def _error(self, finish: Finish) -> InvalidRequest | Overloaded | EngineUnavailable:
        message = finish.message or "the engine failed"
        if finish.status < 500:
            return InvalidRequest(message)
        serves = self._client.unavailable_reason is None
        return Overloaded(message) if serves else EngineUnavailable(message)


def _asked(
    model: str | None, config: EngineConfig | None, options: Mapping[str, Any]
) -> EngineConfig:
    if config is None:
        given = {"model": DEFAULT if model is None else model, **options}
        return EngineConfig.of(gather(COMPONENTS, flags={}, env={}, file=given, file_name="LLM(…)"))
    if options:
        raise ConfigError("give either a config or single options, not both")
    if model not in (None, config.model.model):
        raise ConfigError(
            f"the model is {model!r} but that of the config is {config.model.model!r}; give one"
        )
    return config


def _open_at_most(config: ResolvedScheduler) -> int:
    """Requests that may be open at a time without one being refused, however few can run.

    With no more of them than the queue holds, the queue is never full; with no more than there are
    rows, there is one for whoever would have to wait.
    """
    return max(config.max_queued_requests, config.max_running_requests)


async def _until_error(tasks: Sequence[asyncio.Task[None]]) -> list[asyncio.Task[None]]:
    """Those that have ended when all have, or the first of them failed."""
    if not tasks:
        return []
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    return [task for task in tasks if task in done]
