"""Log probabilities in the fields of OpenAI's chat and completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from sapwood.base.errors import InvalidRequest
from sapwood.frontends.openai.protocol import ChatRequest, CompletionRequest
from sapwood.frontends.serving.encoded_lists import EncodedList, in_pieces
from sapwood.frontends.serving.generate import Choice
from sapwood.frontends.serving.sampling import renamed
from sapwood.frontends.serving.token_entries import token_entries
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


async def choice_logprobs(
    kind: Kind, request: TextRequest, tokenizer: Tokenizer, choice: Choice, opening: str = ""
) -> dict[str, object] | None:
    """The log probabilities of a finished sample; None if the request did not ask for them.

    opening  the text that the choice begins with, before its output
    """
    if request.options.logprobs is None:
        return None
    return await _told(kind, request, tokenizer, choice.whole, opening)


async def chunk_logprobs(
    kind: Kind, request: TextRequest, tokenizer: Tokenizer, chunk: TextChunk, opening: str = ""
) -> dict[str, object] | None:
    """The log probabilities of one chunk; None for a chunk that only has text."""
    if chunk.logprobs is None and chunk.prompt is None:
        return None
    return await _told(kind, request, tokenizer, chunk, opening)


async def _told(
    kind: Kind,
    request: TextRequest,
    tokenizer: Tokenizer,
    told: TextChunk,
    opening: str,
) -> dict[str, object]:
    assert request.options.logprobs is not None, "log probabilities were asked for"
    names, values = TokenNames(tokenizer.texts), told.logprobs or TokenLogprobs()
    if kind == "chat":
        entries = await token_entries(
            names, told.token_ids, values, request.options.logprobs.num_per_token
        )
        return {"content": entries.json, "refusal": None}
    lists = _Lists(names, request.options.logprobs)
    if told.prompt is not None:
        offsets = _offsets(request, tokenizer, told.prompt.token_ids)
        await lists.add_prompt(told.prompt, offsets)
    await lists.add(told.token_ids, [len(opening) + offset for offset in told.offsets], values)
    return lists.fields()


class _Lists:
    """The four lists of a completion's logprobs."""

    def __init__(self, names: TokenNames, options: LogprobOptions) -> None:
        self._names = names
        self._num_per_token = options.num_per_token
        self._wants_top = options.num_top > 0
        self._offsets = EncodedList()
        self._token_logprobs = EncodedList()
        self._tokens = EncodedList()
        self._top = EncodedList()

    async def add_prompt(self, prompt: ScoredPrompt, offsets: Sequence[int]) -> None:
        """The first token has no probability: nothing comes before it."""
        self._offsets.extend([offsets[0]])
        self._token_logprobs.extend([None])
        self._tokens.extend([self._names.name(prompt.token_ids[0])])
        self._top.extend([None])
        if prompt.logprobs is not None:
            await self.add(prompt.token_ids[1:], offsets[1:], prompt.logprobs)

    async def add(
        self, token_ids: Sequence[int], offsets: Sequence[int], values: TokenLogprobs
    ) -> None:
        name = self._names.name
        async for first, ids, part in in_pieces(token_ids, values, self._num_per_token):
            logprobs = part.of_tokens()
            self._offsets.extend(offsets[first : first + len(ids)])
            self._token_logprobs.extend(logprobs)
            self._tokens.extend(list(map(name, ids)))
            if self._wants_top:
                # As OpenAI has it, the token itself is among them even if it is not so likely.
                self._top.extend(
                    [
                        {name(one): likely for likely, one in likeliest} | {name(token_id): logprob}
                        for token_id, logprob, likeliest in zip(
                            ids, logprobs, part.of_likeliest(), strict=True
                        )
                    ]
                )

    def fields(self) -> dict[str, object]:
        return {
            "text_offset": self._offsets.json,
            "token_logprobs": self._token_logprobs.json,
            "tokens": self._tokens.json,
            "top_logprobs": self._top.json if self._wants_top else None,
        }


def _offsets(request: TextRequest, tokenizer: Tokenizer, token_ids: Sequence[int]) -> list[int]:
    """For each token: where it begins in the text of all these tokens."""
    detokenizer = IncrementalDetokenizer(
        tokenizer, skip_special_tokens=request.options.sampling.skip_special_tokens
    )
    offsets, num_characters = list[int](), 0
    for token_id in token_ids:
        offsets.append(num_characters)
        num_characters += len(detokenizer.push((token_id,)))
    return offsets
