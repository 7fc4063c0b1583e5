"""From a file of sound to what is said in it: its pieces are heard side by side.

A piece that reads like noise is heard again with a higher temperature, as by OpenAI's program.
Source: Radford et al. 2022, arXiv:2212.04356, section 4.5."""

from __future__ import annotations

import asyncio
import math
import uuid
import zlib
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

import msgspec
import numpy as np

from sapwood.base.errors import InvalidRequest
from sapwood.frontends.serving.generate import collect
from sapwood.frontends.serving.services import Services
from sapwood.multimodal.listener import Listener, Recording
from sapwood.schema.logprobs import LogprobOptions, TokenLogprobs
from sapwood.schema.media import Medium
from sapwood.schema.request import RequestOptions
from sapwood.schema.sampling import SamplingParams
from sapwood.text.generation import TextRequest
from sapwood.text.speech import SpeechVocabulary, Task, segments_of

TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Tried one after another."""
LEAST_LOGPROB = -1.0
"""On average over a piece's tokens; below, it is tried again."""
MOST_COMPRESSION = 2.4
"""How much longer a text is than its zlib form; above, it repeats itself, and is tried again."""
SILENCE = 0.6
"""A piece whose chance to be silence is larger, and whose text is unlikely, has no speech."""
AT_ONCE = 8
"""Pieces of one file that are prepared or heard at a time."""
_LEAST_REST_S = 1.0
"""What is left of a piece after its last segment is heard again if it is longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """language: a code; "": the model finds out. temperature: 0: TEMPERATURES"""

    task: Task
    language: str = ""
    prompt: str = ""
    temperature: float = 0.0
    priority: int | None = None


class SpokenSegment(msgspec.Struct, frozen=True, kw_only=True):
    """A segment as verbose_json has it; times are in seconds, seek in steps of 10 ms."""

    id: int
    seek: int
    start: float
    end: float
    text: str
    tokens: tuple[int, ...]
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float


@dataclass(frozen=True, slots=True)
class _Heard:
    """What one transcription of a sound says."""

    token_ids: tuple[int, ...]
    text: str
    temperature: float
    avg_logprob: float
    no_speech_prob: float

    @property
    def compression_ratio(self) -> float:
        raw = self.text.encode()
        return len(raw) / len(zlib.compress(raw)) if raw else 0.0

    @property
    def is_silence(self) -> bool:
        return self.no_speech_prob > SILENCE and self.avg_logprob < LEAST_LOGPROB

    @property
    def reads_like_noise(self) -> bool:
        is_unlikely = self.avg_logprob < LEAST_LOGPROB
        return not self.is_silence and (is_unlikely or self.compression_ratio > MOST_COMPRESSION)


class Transcriber:
    """Hears files with the engine's model."""

    def __init__(
        self, services: Services, listener: Listener, vocabulary: SpeechVocabulary
    ) -> None:
        self._services = services
        self._listener = listener
        self._vocabulary = vocabulary

    @property
    def translates(self) -> bool:
        return bool(self._vocabulary.tasks)

    def check_language(self, named: str) -> None:
        """Raises InvalidRequest for a language that the model does not know."""
        self._vocabulary.language(named)

    def opened(self, data: bytes) -> AbstractAsyncContextManager[Recording]:
        """As Listener.opened."""
        return self._listener.opened(data)

    async def language_of(self, recording: Recording, ask: Ask) -> str:
        """The code of what is spoken, as asked for or as the first piece sounds."""
        languages = self._vocabulary.languages
        if ask.language:
            return self._vocabulary.language(ask.language)
        if not languages:
            return "en"
        sound = await self._listener.piece(recording, 0)
        allowed = SamplingParams(
            max_new_tokens=1, temperature=0.0, allowed_token_ids=tuple(languages.values())
        )
        options = RequestOptions(sampling=allowed, priority=ask.priority)
        [[choice]] = await collect(
            self._services, [self._request([self._vocabulary.start], sound, options)]
        )
        [token_id] = choice.whole.token_ids
        return next(code for code, one in languages.items() if one == token_id)

    async def segments(
        self, recording: Recording, ask: Ask, language: str
    ) -> AsyncGenerator[list[SpokenSegment], None]:
        """The segments of each piece of the recording, in order; their ids count from 0."""
        before = await self._before(ask.prompt)
        turn = asyncio.Semaphore(AT_ONCE)
        prompt = self._vocabulary.prompt(language, ask.task, before)

        async def heard(index: int) -> list[SpokenSegment]:
            async with turn:
                return await self._piece(recording, index, ask, prompt)

        tasks = [asyncio.ensure_future(heard(index)) for index in range(len(recording.cuts))]
        count = 0
        try:
            for task in tasks:
                found = [
                    msgspec.structs.replace(segment, id=count + number)
                    for number, segment in enumerate(await task)
                ]
                count += len(found)
                yield found
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _before(self, prompt: str) -> list[int]:
        """The last token ids of the prompt, as many as the model has room for."""
        text = prompt.strip()
        if not text:
            return []
        if self._vocabulary.previous is None:
            raise InvalidRequest("this model takes no prompt; leave it out", param="prompt")
        ids = await self._services.generator.encode(f" {text}", False)
        context = self._services.engine.info.context_length
        return ids[-(context // 2 - 1) :]

    async def _piece(
        self, recording: Recording, index: int, ask: Ask, prompt: list[int]
    ) -> list[SpokenSegment]:
        start, end = recording.start_of(index), recording.end_of(index)
        found: list[SpokenSegment] = []
        while True:
            sound = await self._listener.between(recording, start, end)
            heard = await self._heard(sound, ask, prompt)
            if heard.is_silence:
                return found
            segments, until = segments_of(heard.token_ids, self._vocabulary, seconds=end - start)
            for segment in segments:
                text = self._services.tokenizer.decode(segment.token_ids)
                if text.strip():
                    found.append(
                        SpokenSegment(
                            id=0,
                            seek=round(start * 100),
                            start=round(start + segment.start, 2),
                            end=round(start + segment.end, 2),
                            text=text,
                            tokens=segment.token_ids,
                            temperature=heard.temperature,
                            avg_logprob=heard.avg_logprob,
                            compression_ratio=heard.compression_ratio,
                            no_speech_prob=heard.no_speech_prob,
                        )
                    )
            start += until
            if end - start < _LEAST_REST_S or until < _LEAST_REST_S:
                return found

    async def _heard(self, sound: Medium, ask: Ask, prompt: list[int]) -> _Heard:
        temperatures = TEMPERATURES if ask.temperature == 0.0 else (ask.temperature,)
        for temperature in temperatures:
            heard = await self._once(sound, prompt, temperature, ask.priority)
            if not heard.reads_like_noise:
                break
        return heard

    async def _once(
        self, sound: Medium, prompt: list[int], temperature: float, priority: int | None
    ) -> _Heard:
        vocabulary = self._vocabulary
        silence = () if vocabulary.silence is None else (vocabulary.silence,)
        options = RequestOptions(
            sampling=SamplingParams(
                max_new_tokens=None,
                temperature=temperature,
                # So that the same sound has the same text every time.
                seed=int.from_bytes(sound.digest[:7]),
                speech=vocabulary.rules,
            ),
            logprobs=LogprobOptions(prompt_start=prompt.index(vocabulary.start), token_ids=silence),
            priority=priority,
        )
        [[choice]] = await collect(self._services, [self._request(prompt, sound, options)])
        whole = choice.whole
        own = np.frombuffer(whole.logprobs.tokens if whole.logprobs else b"", "<f4")
        ids = tuple(one for one in whole.token_ids if one != vocabulary.end)
        text = [one for one in ids if one < vocabulary.end]
        return _Heard(
            token_ids=ids,
            text=self._services.tokenizer.decode(text).strip(),
            temperature=temperature,
            avg_logprob=float(own.mean()) if len(own) else 0.0,
            no_speech_prob=_chance_of_silence(whole.prompt.logprobs if whole.prompt else None),
        )

    def _request(self, prompt: list[int], sound: Medium, options: RequestOptions) -> TextRequest:
        return TextRequest(
            request_id=f"speech-{uuid.uuid4().hex}",
            prompt=prompt,
            prepared=[sound],
            options=options,
        )


def _chance_of_silence(scored: TokenLogprobs | None) -> float:
    """From the log probabilities after the token that begins a transcription."""
    chosen = b"" if scored is None else scored.chosen
    return math.exp(float(np.frombuffer(chosen, "<f4")[0])) if chosen else 0.0
