"""From a text to its embedding, its scores, or the likelihood of given next tokens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
from numpy.typing import NDArray

from sapwood.base.errors import InvalidRequest, PromptTooLong
from sapwood.schema.client import EngineClient
from sapwood.schema.logprobs import LogprobOptions
from sapwood.schema.media import Medium
from sapwood.schema.media_source import MediaSource
from sapwood.schema.output import Finish, RequestOutput
from sapwood.schema.request import Embed, Generate, RequestOptions
from sapwood.schema.sampling import SamplingParams
from sapwood.text.generation import ENCODE_IN_THREAD_CHARS, OpenRequest, TextGenerator
from sapwood.text.tokenizer import Tokenizer

NO_OUTPUT = SamplingParams(max_new_tokens=0)
NEXT_TOKEN = SamplingParams(max_new_tokens=1, temperature=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedRequest:
    """A request for the embedding or the scores of one text.

    text       a text; token ids, which are taken as they are; or a pair of texts, which the
               tokenizer joins as in the model's training
    add_special_tokens  whether the tokenizer adds BOS or EOS to a single text
    media      pictures and videos, whose markers stand in a single text in their order
    param      the text's field in the client's request, for errors
    label_ids  for a model that generates: tokens whose log probabilities as the next token are
               wanted; None: the model's embedding or class scores are wanted
    options    what else the request asks for; its sampling and log probabilities are not read
    """

    request_id: str
    text: str | list[int] | tuple[str, str]
    add_special_tokens: bool = True
    media: Sequence[MediaSource] = ()
    param: str = "input"
    label_ids: tuple[int, ...] | None = None
    options: RequestOptions = field(default_factory=RequestOptions)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingOutput:
    """The embedding or scores of one text.

    values  [n] fp32; empty unless the finish is of kind "length", which stands for success here: a
            request without output tokens is at its limit when its prompt is computed
    """

    request_id: str
    values: NDArray[np.float32]
    finish: Finish
    num_prompt_tokens: int
    num_cached_tokens: int
    queue_time_s: float


class TextEmbedder:
    """Turns embed requests into engine requests. An abort finds them by `generator`."""

    def __init__(
        self, engine: EngineClient, generator: TextGenerator, tokenizer: Tokenizer
    ) -> None:
        self._engine = engine
        self._generator = generator
        self._tokenizer = tokenizer

    async def embed(self, request: EmbedRequest, opened: OpenRequest) -> PoolingOutput:
        """Compute one text's embedding or scores. Cancelling this call aborts the request.

        opened  of `TextGenerator.opened`
        Raises InvalidRequest or PromptTooLong, before anything is submitted, if the text cannot be
        served. A failure in the engine is reported by the `finish`.
        """
        media: list[Medium] = []
        num_first: int | None = None
        if request.media and not isinstance(request.text, tuple):
            prompt_ids, media = await self._generator.encode_showing(
                request.text, request.media, add_special_tokens=request.add_special_tokens
            )
        else:
            prompt_ids, num_first = await self._encode(request)
        labels = request.label_ids
        if self._generator.truncates and not media:
            prompt_ids = prompt_ids[: self._longest(request)]
            num_first = None if num_first is None else min(num_first, len(prompt_ids))
        self._check(prompt_ids, request)
        asked = Generate(
            request_id=request.request_id,
            prompt_ids=prompt_ids,
            media=media,
            options=msgspec.structs.replace(
                request.options,
                sampling=NO_OUTPUT if labels is None else NEXT_TOKEN,
                logprobs=None if labels is None else LogprobOptions(token_ids=labels),
                embed=Embed(num_first=num_first) if labels is None else None,
            ),
        )
        return _pooling_output(await self._ask(asked, opened), has_labels=labels is not None)

    async def _encode(self, request: EmbedRequest) -> tuple[list[int], int | None]:
        """The token ids, and for a pair of texts how many of them belong to the first text."""
        match request.text:
            case str(text):
                return await self._generator.encode(text, request.add_special_tokens), None
            case (str(first), str(second)):
                if len(first) + len(second) < ENCODE_IN_THREAD_CHARS:
                    return self._tokenizer.encode_pair(first, second)
                return await asyncio.to_thread(self._tokenizer.encode_pair, first, second)
            case token_ids:
                return list(token_ids), None

    def _check(self, prompt_ids: Sequence[int], request: EmbedRequest) -> None:
        param = request.param
        if not prompt_ids:
            raise InvalidRequest(f"{param} has no tokens; it must have at least one", param=param)
        self._generator.check_token_ids(prompt_ids, param, param=param)
        if request.label_ids is not None:
            self._generator.check_token_ids(
                request.label_ids, "label_token_ids", param="label_token_ids"
            )
        limit = self._longest(request)
        if len(prompt_ids) > limit:
            context = self._engine.info.context_length
            raise PromptTooLong(
                len(prompt_ids), limit, f"the context length of {context}", param=param
            )

    def _longest(self, request: EmbedRequest) -> int:
        """Tokens of a prompt at most."""
        context = self._engine.info.context_length
        # The context must have room for a token after the text, whose likelihood is asked for.
        return context if request.label_ids is None else context - 1

    async def _ask(self, asked: Generate, opened: OpenRequest) -> RequestOutput:
        """Submit the request and wait for its one output, which has a `finish`."""
        if opened.is_aborted:
            return _ended(asked, Finish(kind="abort"))
        opened.submitted.append(asked.request_id)
        outputs = self._engine.generate(asked)
        try:
            async for output in outputs:
                if output.finish is not None:
                    return output
        finally:
            if isinstance(outputs, AsyncGenerator):
                await outputs.aclose()
            else:
                await self._engine.abort(asked.request_id)
        message = f"the engine ended request {asked.request_id} without saying why; send it again"
        return _ended(asked, Finish(kind="error", message=message))


def _ended(asked: Generate, finish: Finish) -> RequestOutput:
    return RequestOutput(
        request_id=asked.request_id,
        token_ids=[],
        num_prompt_tokens=len(asked.prompt_ids),
        finish=finish,
    )


def _pooling_output(output: RequestOutput, *, has_labels: bool) -> PoolingOutput:
    assert output.finish is not None
    packed = output.values
    if has_labels:
        packed = b"" if output.logprobs is None else output.logprobs.chosen
    return PoolingOutput(
        request_id=output.request_id,
        values=np.frombuffer(packed, dtype="<f4").astype(np.float32),
        finish=output.finish,
        num_prompt_tokens=output.num_prompt_tokens,
        num_cached_tokens=output.num_cached_tokens,
        queue_time_s=output.queue_time_s,
    )


def shortened(vector: NDArray[np.float32], size: int, *, normalize: bool) -> NDArray[np.float32]:
    """The first `size` numbers of an embedding, scaled to length 1 if `normalize`.

    For models that are trained so that the first numbers of an embedding are an embedding too
    (Kusupati et al. 2022, arXiv:2205.13147).
    """
    kept = vector[:size]
    norm = float(np.linalg.norm(kept))
    return kept / np.float32(norm) if normalize and norm > 0 else kept


def softmax(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """[n] -> [n], positive and of sum 1"""
    weights = np.exp(values - values.max())
    return np.asarray(weights / weights.sum(), dtype=np.float32)


def sigmoid(values: NDArray[np.float32]) -> NDArray[np.float32]:
    # By tanh, which does not overflow.
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * values)), dtype=np.float32)
