"""Log probabilities in the fields of OpenAI's chat and completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from sapwood.base.errors import InvalidRequest
from sapwood.frontends.common.generate import Choice
from sapwood.frontends.common.sampling import renamed
from sapwood.frontends.openai.protocol import ChatRequest, CompletionRequest
from sapwood.schema.logprobs import LogprobOptions, TokenLogprobs
from sapwood.text.detokenizer import IncrementalDetokenizer
from sapwood.text.generation import ScoredPrompt, TextChunk, TextRequest
from sapwood.text.token_names import TokenNames
from sapwood.text.tokenizer import Tokenizer

Kind = Literal["chat", "text"]


def chat_options(asked: ChatRequest) -> LogprobOptions | None:
    if not asked.logprobs:
        # With "logprobs": false none are wanted, whatever top_logprobs says.
        if asked.top_logprobs and asked.logprobs is None:
            raise InvalidRequest(
                "top_logprobs is only for logprobs=true; set that too", param="top_logprobs"
            )
        return None
    return _options(asked.top_logprobs or 0, "top_logprobs", prompt_start=None)


def completion_options(asked: CompletionRequest) -> LogprobOptions | None:
    if asked.logprobs is None or asked.logprobs is False:
        return None
    if asked.logprobs is True:
        raise InvalidRequest(
            "logprobs is true but must be how many of the likeliest tokens to list, 0 or more",
            param="logprobs",
        )
    return _options(asked.logprobs, "logprobs", prompt_start=0 if asked.echo else None)


def _options(num_top: int, name: str, *, prompt_start: int | None) -> LogprobOptions:
    try:
        return LogprobOptions(num_top=num_top, prompt_start=prompt_start)
    except InvalidRequest as error:
        raise renamed(error, {"num_top": name}) from None


def choice_logprobs(
    kind: Kind, request: TextRequest, tokenizer: Tokenizer, choice: Choice, opening: str = ""
) -> dict[str, object] | None:
    """The log probabilities of a finished sample; None if the request did not ask for them.

    opening  the text that the choice begins with, before its output
    """
    if request.logprobs is None:
        return None
    values = TokenLogprobs.joined(choice.logprobs) if choice.logprobs else TokenLogprobs()
    if kind == "chat":
        return _chat(TokenNames(tokenizer.texts), choice.token_ids, values)
    return _completion(request, tokenizer, choice, values, opening)


def chunk_logprobs(
    kind: Kind, request: TextRequest, tokenizer: Tokenizer, chunk: TextChunk, opening: str = ""
) -> dict[str, object] | None:
    """The log probabilities of one chunk; None for a chunk that only has text."""
    if chunk.logprobs is None and chunk.prompt is None:
        return None
    values = chunk.logprobs or TokenLogprobs()
    if kind == "chat":
        return _chat(TokenNames(tokenizer.texts), chunk.token_ids, values)
    return _completion(request, tokenizer, chunk, values, opening)


def _chat(names: TokenNames, token_ids: Sequence[int], values: TokenLogprobs) -> dict[str, object]:
    def entry(token_id: int, logprob: float) -> dict[str, object]:
        raw = names.raw(token_id)
        return {"token": names.name(token_id), "bytes": list(raw), "logprob": logprob}

    positions = zip(token_ids, values.of_tokens(), values.of_likeliest(), strict=True)
    content = [
        entry(token_id, logprob)
        | {"top_logprobs": [entry(likely_id, likely) for likely, likely_id in likeliest]}
        for token_id, logprob, likeliest in positions
    ]
    return {"content": content, "refusal": None}


def _completion(
    request: TextRequest,
    tokenizer: Tokenizer,
    told: Choice | TextChunk,
    values: TokenLogprobs,
    opening: str,
) -> dict[str, object]:
    assert request.logprobs is not None, "log probabilities were asked for"
    names = TokenNames(tokenizer.texts)
    lists = _Lists(names, wants_top=request.logprobs.num_top > 0)
    if told.prompt is not None:
        lists.add_prompt(told.prompt, _offsets(request, tokenizer, told.prompt.token_ids))
    lists.add(told.token_ids, [len(opening) + offset for offset in told.offsets], values)
    return {
        "text_offset": lists.offsets,
        "token_logprobs": lists.token_logprobs,
        "tokens": lists.tokens,
        "top_logprobs": lists.top,
    }


class _Lists:
    """The four lists of a completion's logprobs."""

    def __init__(self, names: TokenNames, *, wants_top: bool) -> None:
        self._names = names
        self.offsets: list[int] = []
        self.token_logprobs: list[float | None] = []
        self.tokens: list[str] = []
        self.top: list[dict[str, float] | None] | None = [] if wants_top else None

    def add_prompt(self, prompt: ScoredPrompt, offsets: Sequence[int]) -> None:
        """Add the prompt's tokens. The first has no probability: nothing precedes it."""
        self.offsets.append(offsets[0])
        self.token_logprobs.append(None)
        self.tokens.append(self._names.name(prompt.token_ids[0]))
        if self.top is not None:
            self.top.append(None)
        if prompt.logprobs is not None:
            self.add(prompt.token_ids[1:], offsets[1:], prompt.logprobs)

    def add(self, token_ids: Sequence[int], offsets: Sequence[int], values: TokenLogprobs) -> None:
        name = self._names.name
        logprobs = values.of_tokens()
        self.offsets += offsets
        self.token_logprobs += logprobs
        self.tokens += map(name, token_ids)
        if self.top is not None:
            for token_id, logprob, likeliest in zip(
                token_ids, logprobs, values.of_likeliest(), strict=True
            ):
                # As in OpenAI's API, the token itself is listed even if others are likelier.
                self.top.append(
                    {name(likely_id): likely for likely, likely_id in likeliest}
                    | {name(token_id): logprob}
                )


def _offsets(request: TextRequest, tokenizer: Tokenizer, token_ids: Sequence[int]) -> list[int]:
    """For each token: where it begins in the text of all these tokens."""
    detokenizer = IncrementalDetokenizer(
        tokenizer, skip_special_tokens=request.sampling.skip_special_tokens
    )
    offsets, num_characters = list[int](), 0
    for token_id in token_ids:
        offsets.append(num_characters)
        num_characters += len(detokenizer.push((token_id,)))
    return offsets
