"""How much of growing conversations do the caches of the engines behind a gateway still hold?

The traffic: each conversation begins with one of several system prompts, and each turn sends all
that was said so far with a new message. All conversations take their turn, in an order drawn anew,
before any of them takes the next one, so that a conversation finds its beginning only at an engine
whose cache holds its share of all of them.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
from rich.table import Table

from sapwood.base.errors import ConfigError, StartupError
from sapwood.bench.http_stream import Endpoint, HttpError, fetch_json
from sapwood.bench.workloads.vocabulary import WORDS, WordVocabulary
from sapwood.schema.config.options import option

CALL_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationsOptions:
    """The conversations."""

    url: str = option("http://127.0.0.1:8000", "Base URL of the gateway or server, without /v1.")
    conversations: int = option(40, "How many there are.", unit="conversations")
    turns: int = option(12, "Messages of the user in each.", unit="turns")
    system_prompts: int = option(8, "Conversations share so many, drawn at random.", unit="prompts")
    system_words: int = option(80, "Words of a system prompt; a word is about a token.")
    document_words: int = option(800, "Words in front of a conversation's first message.")
    message_words: int = option(30, "Words of a message.")
    answer_tokens: int = option(16, "Longest answer.", unit="tokens")
    concurrency: int = option(8, "Requests in flight.", unit="requests")
    model: str = option("m", "Sent as `model`.")
    api_key: str | None = option(None, "Sent as a bearer token.", secret=True)
    seed: int = option(0, "Seed of all that is random.")

    def __post_init__(self) -> None:
        for name in ("conversations", "turns", "system_prompts", "message_words", "concurrency"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be >= 1")
        if min(self.system_words, self.document_words) < 0 or self.answer_tokens < 1:
            raise ConfigError(
                "--system-words and --document-words must be >= 0 and --answer-tokens >= 1"
            )


@dataclass(slots=True)
class KnownTokens:
    """What the engines answered.

    num_known_tokens  of the prompts' tokens, those that an engine had in its cache
    """

    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_known_tokens: int = 0

    @property
    def share(self) -> float:
        return self.num_known_tokens / max(1, self.num_prompt_tokens)


class _Details(msgspec.Struct):
    cached_tokens: int = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int
    prompt_tokens_details: _Details | None = None


class _Message(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    message: _Message


class _Answer(msgspec.Struct):
    choices: list[_Choice]
    usage: _Usage


@dataclass(slots=True)
class _Conversation:
    messages: list[dict[str, str]]


class Conversations:
    """One run."""

    def __init__(self, options: ConversationsOptions) -> None:
        self._options = options
        self._endpoint = Endpoint.parse(options.url)
        self._rng = random.Random(options.seed)
        systems = [self._words(options.system_words) for _ in range(options.system_prompts)]
        self._conversations = [
            _Conversation([{"role": "system", "content": self._rng.choice(systems)}])
            for _ in range(options.conversations)
        ]
        self.known = KnownTokens()

    async def run(self) -> KnownTokens:
        """StartupError if a request fails: a part of the traffic would be another traffic."""
        options = self._options
        for turn in range(options.turns):
            document_words = 0 if turn else options.document_words
            order = list(self._conversations)
            self._rng.shuffle(order)
            for conversation in order:
                text = self._words(document_words + options.message_words)
                conversation.messages.append({"role": "user", "content": text})
            waiting = iter(order)
            try:
                async with asyncio.TaskGroup() as clients:
                    for _ in range(options.concurrency):
                        clients.create_task(self._take(waiting))
            except* HttpError as failed:
                raise StartupError(
                    f"{options.url} did not answer: {failed.exceptions[0]}"
                ) from failed
        return self.known

    async def _take(self, waiting: Iterator[_Conversation]) -> None:
        for conversation in waiting:
            await self._ask(conversation)

    async def _ask(self, conversation: _Conversation) -> None:
        options = self._options
        body = {
            "model": options.model,
            "messages": conversation.messages,
            "max_tokens": options.answer_tokens,
            "temperature": 0,
        }
        key = options.api_key
        told = await fetch_json(
            self._endpoint,
            "POST",
            "/v1/chat/completions",
            body=body,
            headers={} if key is None else {"authorization": f"Bearer {key}"},
            timeout_s=CALL_TIMEOUT_S,
        )
        try:
            answer = msgspec.convert(told, _Answer)
            content = answer.choices[0].message.content
        except (msgspec.ValidationError, IndexError) as error:
            raise HttpError(f"the answer is no chat completion: {error}") from None
        # An empty text, since some templates refuse an answer without any.
        conversation.messages.append({"role": "assistant", "content": content or ""})
        details = answer.usage.prompt_tokens_details
        self.known.num_requests += 1
        self.known.num_prompt_tokens += answer.usage.prompt_tokens
        self.known.num_known_tokens += 0 if details is None else details.cached_tokens

    def _words(self, count: int) -> str:
        vocabulary = WordVocabulary(WORDS)
        return str(vocabulary.render(vocabulary.draw(self._rng, count)))


def known_table(options: ConversationsOptions, known: KnownTokens) -> Table:
    table = Table("conversations", "turns", "requests", "prompt tokens", "known", "share")
    table.add_row(
        str(options.conversations),
        str(options.turns),
        str(known.num_requests),
        str(known.num_prompt_tokens),
        str(known.num_known_tokens),
        f"{known.share:.1%}",
    )
    return table
