"""One sample's way from token ids to text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sapwood.schema.logprobs import TokenLogprobs
from sapwood.schema.media import num_tokens_of
from sapwood.schema.output import Finish, OutputDelta, RequestOutput
from sapwood.schema.request import Generate
from sapwood.text.detokenizer import IncrementalDetokenizer
from sapwood.text.stops import StopMatcher
from sapwood.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredPrompt:
    """The prompt's tokens from `prompt_start` on, and their log probabilities.

    logprobs  of all these tokens but the first; None if there is only one
    """

    token_ids: tuple[int, ...]
    logprobs: TokenLogprobs | None


class TextChunk(OutputDelta, frozen=True, kw_only=True, omit_defaults=True):
    """The new part of one sample. The last chunk of a sample, and only the last, has a `finish`.

    Tokens go up to and including the one that completed a stop. Their log probabilities are None in
    a chunk without tokens. The last output token never has a hidden state.

    index              number of the sample, from 0 to n - 1
    text               new text; may be "" while a character or a stop string is not complete
    num_output_tokens  output tokens of this sample so far
    num_image_tokens, num_video_tokens  prompt tokens that show pictures and videos
    offsets            if the request wants log probabilities: where in the sample's text each of
                       token_ids begins, in characters, before a stop is cut off
    prompt             the scored prompt, once per sample, if the request wants it
    """

    ADDED = (*OutputDelta.ADDED, "text", "offsets", "prompt")

    index: int
    text: str
    token_ids: tuple[int, ...]
    num_output_tokens: int
    num_image_tokens: int = 0
    num_video_tokens: int = 0
    offsets: tuple[int, ...] = ()
    prompt: ScoredPrompt | None = None
    hidden_states: tuple[bytes, ...] = ()
    routed_experts: tuple[bytes, ...] = ()


class Sample:
    """Turns the engine's outputs for one sample into chunks of text."""

    def __init__(self, index: int, request: Generate, tokenizer: Tokenizer) -> None:
        sampling = request.options.sampling
        self._index = index
        self._no_trim = sampling.no_stop_trim
        self._detokenizer = IncrementalDetokenizer(
            tokenizer,
            skip_special_tokens=sampling.skip_special_tokens,
            spaces_between_special_tokens=sampling.spaces_between_special_tokens,
        )
        self._stops: StopMatcher | None = None
        if sampling.stop or sampling.stop_regex:
            self._stops = StopMatcher(
                sampling.stop, regexes=sampling.stop_regex, no_trim=self._no_trim
            )
        self._logprobs = request.options.logprobs
        self._num_characters = 0
        self._prompt_to_tell: tuple[int, ...] = ()
        start = request.options.prompt_scores_start
        if start is not None:
            self._prompt_to_tell = tuple(request.prompt_ids[start:])
        self._num_prompt_tokens = len(request.prompt_ids)
        self._num_image_tokens = num_tokens_of(request.media, "image")
        self._num_video_tokens = num_tokens_of(request.media, "video")
        self._request_id = request.request_id
        self._num_output_tokens = 0
        self._num_told: Counter[str] = Counter()

    def advance(self, output: RequestOutput) -> TextChunk:
        """The chunk for one output of the engine; a chunk with a `finish` is the last."""
        token_ids, finish = output.token_ids, output.finish
        shown = token_ids
        if finish is not None and not self._no_trim and _ends_with_stop_token(token_ids, finish):
            shown = token_ids[:-1]
        offsets: list[int] = []
        if self._stops is None and self._logprobs is None:
            text = self._detokenizer.push(shown)
            if finish is not None:
                text += self._detokenizer.finish()
        else:
            text, matched, num_used = self._match(shown, offsets, is_last=finish is not None)
            if matched is not None:
                token_ids = token_ids[:num_used]
                finish = Finish(kind="stop", matched=matched)
        self._num_output_tokens += len(token_ids)
        logprobs = output.logprobs
        if self._logprobs is not None:
            # A stop token that is not shown would begin where the text ends.
            offsets += [self._num_characters] * (len(token_ids) - len(offsets))
            if logprobs is not None and len(logprobs) > len(token_ids):
                logprobs = logprobs[: len(token_ids)]
        return TextChunk(
            index=self._index,
            text=text,
            token_ids=tuple(token_ids),
            finish=finish,
            num_prompt_tokens=output.num_prompt_tokens,
            num_output_tokens=self._num_output_tokens,
            num_image_tokens=self._num_image_tokens,
            num_video_tokens=self._num_video_tokens,
            num_cached_tokens=output.num_cached_tokens,
            tier_tokens=output.tier_tokens,
            queue_time_s=output.queue_time_s,
            speculated=output.speculated,
            logprobs=logprobs or None,
            offsets=tuple(offsets) if self._logprobs is not None else (),
            prompt=self._scored_prompt(output) if self._prompt_to_tell else None,
            hidden_states=self._told("hidden_states", output.hidden_states),
            routed_experts=self._told("routed_experts", output.routed_experts),
        )

    def ended(self, finish: Finish) -> TextChunk:
        """The last chunk of a sample that ends without an output of the engine."""
        output = RequestOutput(
            request_id=self._request_id,
            token_ids=[],
            num_prompt_tokens=self._num_prompt_tokens,
            finish=finish,
        )
        return self.advance(output)

    def _told(self, name: str, brought: Sequence[bytes]) -> tuple[bytes, ...]:
        """What was brought of tokens, without the last output token and tokens after a stop.

        name  of what it is"""
        if not brought:
            return ()
        wanted = self._num_prompt_tokens + max(self._num_output_tokens - 1, 0)
        told = tuple(brought[: wanted - self._num_told[name]])
        self._num_told[name] += len(told)
        return told

    def _scored_prompt(self, output: RequestOutput) -> ScoredPrompt | None:
        """The scored prompt, as soon as the engine has sent its scores; None before and after.

        A prompt of a single token has no scores, so nothing has to come from the engine.
        """
        is_alone = len(self._prompt_to_tell) == 1
        was_cut_off = output.finish is not None and output.finish.kind in ("abort", "error")
        if output.prompt_logprobs is None and (not is_alone or was_cut_off):
            return None
        told = ScoredPrompt(token_ids=self._prompt_to_tell, logprobs=output.prompt_logprobs)
        self._prompt_to_tell = ()
        return told

    def _match(
        self, token_ids: Sequence[int], offsets: list[int], *, is_last: bool
    ) -> tuple[str, str | None, int]:
        """(new text, the stop that was completed or None, number of tokens up to that stop).

        The beginning of each of these tokens in the sample's text is appended to `offsets`.
        """
        parts: list[str] = []
        for count, token_id in enumerate(token_ids, start=1):
            # One by one, because the token that completes a stop string is the last that counts.
            offsets.append(self._num_characters)
            text, matched = self._pushed(self._detokenizer.push((token_id,)))
            parts.append(text)
            if matched is not None:
                return "".join(parts), matched, count
        matched = None
        if is_last:
            text, matched = self._pushed(self._detokenizer.finish())
            parts.append(text)
            if matched is None and self._stops is not None:
                result = self._stops.finish()
                parts.append(result.text)
                matched = result.matched
        return "".join(parts), matched, len(token_ids)

    def _pushed(self, text: str) -> tuple[str, str | None]:
        """(the text that may be shown now, the stop that `text` completes or None)"""
        self._num_characters += len(text)
        if self._stops is None:
            return text, None
        result = self._stops.push(text)
        return result.text, result.matched


def _ends_with_stop_token(token_ids: Sequence[int], finish: Finish) -> bool:
    is_stop = finish.kind == "stop" and isinstance(finish.matched, int)
    return is_stop and bool(token_ids) and token_ids[-1] == finish.matched
