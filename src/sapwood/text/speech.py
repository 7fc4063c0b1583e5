"""The tokens by which Whisper's decoder is told what to do, and says what it has heard.

Source: Radford et al. 2022, arXiv:2212.04356, section 2.3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sapwood.base.errors import ConfigError, InvalidRequest
from sapwood.schema.speech import SpeechRules
from sapwood.text.languages import LANGUAGES
from sapwood.text.tokenizer import Tokenizer

Task = Literal["transcribe", "translate"]

STEP_S = 0.02
"""From one token that stands for a time to the next."""
_LATEST_START = 50
"""A sound's first segment begins at most a second after it, unless the model's files say more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeechVocabulary:
    """Ids of Whisper's special tokens.

    start       begins a transcription
    end         ends it; ids below it are text
    tasks       task -> its token; empty for a model of English alone
    languages   code -> its token; empty for a model of English alone
    no_times    says that no times are wanted
    previous    begins what was said before; None: the model has no such token
    silence     stands for a sound without speech; None: the model has no such token
    suppressed, suppressed_first, latest_start  as in SpeechRules
    """

    start: int
    end: int
    tasks: Mapping[str, int]
    languages: Mapping[str, int]
    no_times: int
    previous: int | None
    silence: int | None
    suppressed: tuple[int, ...]
    suppressed_first: tuple[int, ...]
    latest_start: int = _LATEST_START

    @classmethod
    def of_model(
        cls, tokenizer: Tokenizer, config: Mapping[str, Any], generation: Mapping[str, Any]
    ) -> SpeechVocabulary:
        """Of a model's tokenizer, config.json and generation_config.json; ConfigError if its tokens
        are not Whisper's."""

        def needed(token: str) -> int:
            found = tokenizer.token_id(token)
            if found is None:
                raise ConfigError(f"the tokenizer has no token {token}, as Whisper's have")
            return found

        def ids(name: str) -> tuple[int, ...]:
            found = generation.get(name, config.get(name)) or ()
            return tuple(int(one) for one in found)

        languages = {
            code: found
            for code in LANGUAGES
            if (found := tokenizer.token_id(f"<|{code}|>")) is not None
        }
        is_multilingual = generation.get("is_multilingual", config.get("vocab_size", 0) >= 51_865)
        silences = (tokenizer.token_id(f"<|{name}|>") for name in ("nospeech", "nocaptions"))
        names = ("transcribe", "translate")
        return cls(
            start=needed("<|startoftranscript|>"),
            end=needed("<|endoftext|>"),
            tasks={name: needed(f"<|{name}|>") for name in names} if is_multilingual else {},
            languages=languages if is_multilingual else {},
            no_times=needed("<|notimestamps|>"),
            previous=tokenizer.token_id("<|startofprev|>"),
            silence=next((one for one in silences if one is not None), None),
            suppressed=ids("suppress_tokens"),
            suppressed_first=ids("begin_suppress_tokens"),
            latest_start=int(generation.get("max_initial_timestamp_index") or _LATEST_START),
        )

    @property
    def first_time(self) -> int:
        return self.no_times + 1

    @property
    def rules(self) -> SpeechRules:
        """For an output with times."""
        never = {*self.suppressed, self.start, self.no_times, *self.tasks.values()}
        never |= {one for one in (self.previous, self.silence) if one is not None}
        return SpeechRules(
            suppressed=tuple(sorted(never - {self.end})),
            suppressed_first=self.suppressed_first,
            end=self.end,
            first_time=self.first_time,
            latest_start=self.latest_start,
        )

    def language(self, named: str) -> str:
        """The code of a language that is named by its code or in English.

        Raises InvalidRequest for one that the model does not know"""
        wanted = named.strip().lower()
        code = next((code for code, name in LANGUAGES.items() if name == wanted), wanted)
        if code not in (self.languages or {"en": 0}):
            known = ", ".join(self.languages or ["en"])
            raise InvalidRequest(
                f"language is {named[:40]!r}, which this model does not know; it knows {known}",
                param="language",
            )
        return code

    def prompt(self, language: str, task: Task, before: Sequence[int] = ()) -> list[int]:
        """The prompt of a transcription in that language.

        before  token ids of what was said before, or of how it shall be written"""
        head = [self.previous, *before] if before and self.previous is not None else []
        if not self.languages:
            return [*head, self.start]
        return [*head, self.start, self.languages[language], self.tasks[task]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A piece of a transcription.

    start, end  seconds after the sound's begin
    token_ids   of its text
    """

    start: float
    end: float
    token_ids: tuple[int, ...]


def segments_of(
    token_ids: Sequence[int], vocabulary: SpeechVocabulary, *, seconds: float
) -> tuple[list[Segment], float]:
    """(the segments of an output with times, up to where the sound is heard)

    seconds  how long the sound is; a segment without an end ends there

    An output that ends with two times has left the rest of the sound to another transcription."""
    first = vocabulary.first_time
    ids = [one for one in token_ids if one != vocabulary.end]
    segments: list[Segment] = []
    start, text = 0.0, list[int]()
    for token_id in ids:
        if token_id < first:
            text.append(token_id)
            continue
        time = min((token_id - first) * STEP_S, seconds)
        if text:
            segments.append(Segment(start=start, end=time, token_ids=tuple(text)))
            text = []
        start = time
    if text:
        segments.append(Segment(start=start, end=seconds, token_ids=tuple(text)))
        return segments, seconds
    is_open = len(ids) > 2 and all(one >= first for one in ids[-2:])
    return segments, start if is_open and segments else seconds
