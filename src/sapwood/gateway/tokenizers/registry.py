"""The tokenizers that the gateway has, by name; they are loaded and used in threads."""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TypeVar

from sapwood.base.errors import InvalidRequest, NotFound, Overloaded, SapwoodError
from sapwood.gateway.tokenizers.cache import CacheCounts, CachedEncoder, CacheLimits
from sapwood.text.template import ChatTemplate
from sapwood.text.tokenizer import TOKENIZER_FILE, Tokenizer

log = logging.getLogger(__name__)

MAX_TOKENIZERS = 64
MAX_CHARACTERS = 4 << 20
"""Of the texts of one request: encoding these takes about a second."""
MAX_IDS = 1 << 20
"""Token ids of one request that are turned into text."""
MAX_WAITING = 256
MAX_WAITING_CHARACTERS = 4 * MAX_CHARACTERS
"""Of texts that wait for a thread; requests beyond that are refused."""
NUM_THREADS = 2
INLINE_CHARACTERS = 256
"""A shorter text is encoded at once: the way to a thread and back would take longer."""
UNNAMED = frozenset({"", "default", "unknown"})
"""What clients write into `model` where they mean any."""

_NAME = re.compile(r"[\w.:/@+-]{1,200}")

T = TypeVar("T")


class Status(Enum):
    PENDING = "pending"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"


_NEXT: dict[Status, set[Status]] = {
    Status.PENDING: {Status.PROCESSING},
    Status.PROCESSING: {Status.COMPLETED, Status.FAILED},
    Status.COMPLETED: set(),
    Status.FAILED: set(),
}


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Loaded:
    """A tokenizer that can be used, and the chat template beside it; None: there is none.

    directory  where its files are, and perhaps others of the model
    """

    directory: Path
    tokenizer: Tokenizer
    template: ChatTemplate | None
    encoder: CachedEncoder


@dataclass(slots=True, kw_only=True)
class Entry:
    """A name and the tokenizer behind it.

    source         directory of the tokenizer's files
    chat_template  file, built-in name or text of a template that replaces the tokenizer's own
    message        what has become of it
    loaded         set when it can be used
    is_brought     whether it stays and goes with workers that named it
    """

    name: str
    source: str
    chat_template: str | None = None
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    status: Status = Status.PENDING
    message: str = "the tokenizer waits to be loaded"
    loaded: Loaded | None = None
    is_brought: bool = False

    def move_to(self, status: Status, message: str) -> None:
        if status not in _NEXT[self.status]:
            raise RuntimeError(f"tokenizer {self.name}: {self.status} -> {status}")
        self.status, self.message = status, message


class Tokenizers:
    """The gateway's tokenizers.

    limits   sizes of each tokenizer's caches
    """

    def __init__(self, limits: CacheLimits) -> None:
        self._limits = limits
        self._entries: dict[str, Entry] = {}
        self._default: Entry | None = None
        # Loading is apart, so that a large file does not hold up requests.
        self._loading = ThreadPoolExecutor(1, thread_name_prefix="load-tokenizer")
        self._encoding = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="tokenize")
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._num_waiting = 0
        self._num_waiting_characters = 0

    def __iter__(self) -> Iterator[Entry]:
        return iter(list(self._entries.values()))

    def load_default(self, name: str, source: str, chat_template: str | None) -> Loaded:
        """Load the tokenizer of requests that name no other. ModelSourceError, ConfigError."""
        entry = Entry(name=name, source=source, chat_template=chat_template)
        entry.move_to(Status.PROCESSING, "the tokenizer is being loaded")
        entry.loaded = self._load(entry)
        entry.move_to(Status.COMPLETED, "the tokenizer is loaded")
        self._entries[entry.id] = self._default = entry
        return entry.loaded

    def add(
        self,
        name: str,
        source: str,
        chat_template: str | None = None,
        *,
        is_brought: bool = False,
    ) -> Entry:
        """A new entry, which is loaded in the background. InvalidRequest if there can be none."""
        if not _NAME.fullmatch(name):
            raise InvalidRequest(
                f"name is {name[:200]!r} but must have 1 to 200 letters, digits and _ . : / @ + -",
                param="name",
            )
        known = next((entry for entry in self if entry.name == name), None)
        if known is not None and known.is_brought:
            raise _is_workers(known)
        if known is not None and known.status is not Status.FAILED:
            raise InvalidRequest(
                f"there is a tokenizer named {name!r} already; delete it first, by DELETE "
                f"/v1/tokenizers/{known.id}",
                param="name",
            )
        if known is not None:
            del self._entries[known.id]
        if len(self._entries) >= MAX_TOKENIZERS:
            raise InvalidRequest(f"there are {MAX_TOKENIZERS} tokenizers, which is the limit")
        entry = Entry(name=name, source=source, chat_template=chat_template, is_brought=is_brought)
        self._entries[entry.id] = entry
        task = asyncio.get_running_loop().create_task(self._load_later(entry))
        self._tasks[entry.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(entry.id))
        return entry

    async def settled(self, entry: Entry) -> None:
        """Returns when the entry is loaded, or has failed."""
        task = self._tasks.get(entry.id)
        if task is not None:
            await asyncio.wait([task])

    def find(self, key: str) -> Entry:
        """The entry with that id or name. NotFound if there is none."""
        found = self._entries.get(key)
        found = found or next((entry for entry in self if entry.name == key), None)
        if found is None:
            raise NotFound(f"there is no tokenizer {key[:200]!r}; GET /v1/tokenizers lists all")
        return found

    def remove(self, key: str) -> Entry:
        """The entry, which is forgotten. NotFound; InvalidRequest if workers have brought it."""
        entry = self.find(key)
        if entry.is_brought:
            raise _is_workers(entry)
        del self._entries[entry.id]
        if entry is self._default:
            self._default = None
        return entry

    def release(self, entry: Entry) -> None:
        """The last worker that brought the entry is gone."""
        del self._entries[entry.id]

    def of_model(self, model: str, *, is_only: bool) -> Loaded | None:
        """The tokenizer of that name, or else the default one; None: there is none for the model.

        is_only  whether the workers serve no other model
        """
        for entry in self._entries.values():
            if entry.name == model and entry.loaded is not None:
                return entry.loaded
        default = self._default
        if default is None or not (is_only or model in UNNAMED):
            return None
        return default.loaded

    @property
    def counts(self) -> dict[str, CacheCounts]:
        """Lookups of all tokenizers that there are, by cache: "l0", "l1"."""
        total = {"l0": CacheCounts(), "l1": CacheCounts()}
        for entry in self:
            if entry.loaded is None:
                continue
            encoder = entry.loaded.encoder
            for level, cache in (("l0", encoder.texts), ("l1", encoder.pieces)):
                if cache is not None:
                    total[level].hits += cache.counts.hits
                    total[level].misses += cache.counts.misses
        return total

    @property
    def num_bytes(self) -> dict[str, int]:
        """Memory of all tokenizers' caches, by cache."""
        total = {"l0": 0, "l1": 0}
        for entry in self:
            if entry.loaded is None:
                continue
            encoder = entry.loaded.encoder
            for level, cache in (("l0", encoder.texts), ("l1", encoder.pieces)):
                total[level] += 0 if cache is None else cache.num_bytes
        return total

    async def encode(
        self, loaded: Loaded, text: str, *, add_special_tokens: bool, param: str = "prompt"
    ) -> list[int]:
        """The token ids of a text, from a cache or from a thread.

        param   the text's field in the request, for errors
        Raises  InvalidRequest if the text is too long or no Unicode, Overloaded if too many wait
        """
        check_length(len(text), param)
        known = loaded.encoder.known(text, add_special_tokens=add_special_tokens)
        if known is not None:
            return known
        if len(text) <= INLINE_CHARACTERS:
            return loaded.encoder.encode(text, add_special_tokens=add_special_tokens)
        return await self._in_thread(
            len(text), lambda: loaded.encoder.encode(text, add_special_tokens=add_special_tokens)
        )

    async def decode(self, loaded: Loaded, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of token ids. InvalidRequest for an id that the tokenizer does not know."""
        size = loaded.tokenizer.vocab_size
        if len(ids) > MAX_IDS:
            raise InvalidRequest(
                f"tokens has {len(ids)} ids but at most {MAX_IDS} are accepted; send them in "
                "several requests",
                param="tokens",
            )
        wrong = next((one for one in ids if not 0 <= one < size), None)
        if wrong is not None:
            raise InvalidRequest(
                f"tokens has the id {wrong}, but this tokenizer's ids are in [0, {size - 1}]",
                param="tokens",
            )
        if len(ids) <= INLINE_CHARACTERS:
            return loaded.tokenizer.decode(ids, skip_special_tokens)
        return await self._in_thread(
            len(ids), lambda: loaded.tokenizer.decode(ids, skip_special_tokens)
        )

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for threads in (self._loading, self._encoding):
            threads.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, size: int, work: Callable[[], T]) -> T:
        """The result of some work, which waits for a thread."""
        if (
            self._num_waiting >= MAX_WAITING
            or self._num_waiting_characters + size > MAX_WAITING_CHARACTERS
        ):
            raise Overloaded("too many texts wait to be tokenized; try again later")
        loop = asyncio.get_running_loop()
        future = self._encoding.submit(work)
        self._num_waiting += 1
        self._num_waiting_characters += size

        def ended() -> None:
            self._num_waiting -= 1
            self._num_waiting_characters -= size

        def tell(_: object) -> None:
            # Work whose client has left still runs, and counts as long as it does.
            if not loop.is_closed():
                loop.call_soon_threadsafe(ended)

        future.add_done_callback(tell)
        return await asyncio.wrap_future(future)

    async def _load_later(self, entry: Entry) -> None:
        loop = asyncio.get_running_loop()

        def begin() -> None:
            loop.call_soon_threadsafe(
                entry.move_to, Status.PROCESSING, "the tokenizer is being loaded"
            )

        def load() -> Loaded:
            begin()
            return self._load(entry)

        try:
            entry.loaded = await loop.run_in_executor(self._loading, load)
        except SapwoodError as error:
            entry.move_to(Status.FAILED, error.message)
        except (OSError, ValueError, TypeError, LookupError) as error:
            entry.move_to(Status.FAILED, f"{type(error).__name__}: {error}"[:1000])
        else:
            entry.move_to(Status.COMPLETED, "the tokenizer is loaded")
        log.info("tokenizer %s: %s", entry.name, entry.message)

    def _load(self, entry: Entry) -> Loaded:
        """ModelSourceError or ConfigError if the files make no tokenizer or no template."""
        source = Path(entry.source).expanduser()
        directory = source.parent if source.name == TOKENIZER_FILE else source
        tokenizer = Tokenizer.from_directory(directory)
        template = ChatTemplate.of_model(tokenizer, override=entry.chat_template)
        return Loaded(directory, tokenizer, template, CachedEncoder(tokenizer, self._limits))


def check_length(num_characters: int, param: str) -> None:
    """InvalidRequest if a request has more characters than may be encoded at once."""
    if num_characters > MAX_CHARACTERS:
        raise InvalidRequest(
            f"{param} has {num_characters} characters, but at most {MAX_CHARACTERS} are encoded "
            "for one request; shorten it",
            param=param,
        )


def _is_workers(entry: Entry) -> InvalidRequest:
    return InvalidRequest(
        f"the tokenizer {entry.name!r} belongs to the workers of that model, and goes with the "
        "last one that named it",
        param="name",
    )
