"""The LoRA adapters of a server by name: loaded, left out for a while, and in use."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from sapwood.base.errors import ConfigError, InvalidRequest, NotFound
from sapwood.schema.client import EngineClient
from sapwood.schema.config.lora import LoraConfig, LoraPath, check_adapter_name
from sapwood.schema.request import SentAdapter

NOT_ENABLED = (
    "this server has no LoRA adapters; start it with --enable-lora and --max-lora-rank, or with "
    "--lora-paths"
)
MAX_KNOWN = 10_000
"""Adapters that have been loaded and may come back; more must be unloaded first."""
SENT = "__tensor__"
"""The path of an adapter that came as tensors, as in SGLang."""
MAX_SENT_BYTES = 8 * 2**30
"""Of all adapters that came as tensors: they are kept here, so that they can come back."""


@dataclass(eq=False)
class _Entry:
    """adapter_id  of the engine, new for each load; None: the adapter is left out for now
    sent        what came over HTTP; None: the adapter is in a folder
    num_users   open calls with the adapter
    num_waiting  those of them that have not begun, because they want an adapter that is not loaded
    last_use    number of the newest call with it
    """

    source: LoraPath
    adapter_id: str | None = None
    sent: SentAdapter | None = None
    num_users: int = 0
    num_waiting: int = 0
    last_use: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class AdapterRegistry:
    """Lives on one event loop.

    What calls hold stays loaded. Beyond --max-loaded-loras the adapter unused longest is left out;
    a call that names it loads it again, and waits for that until another call has ended, if need
    be. Calls that wait hold nothing, so that they cannot wait for each other. An adapter that is
    unloaded is forgotten at once, and leaves the engine when its last call has ended. What has
    begun is carried to its end even if the caller leaves: else the engine would keep an adapter
    that nobody knows.
    """

    def __init__(self, engine: EngineClient, config: LoraConfig) -> None:
        """With the adapters of --lora-paths, which the engine loads by itself."""
        self._engine = engine
        self.is_on = config.is_on
        self._max_loaded = config.max_loaded_loras
        self._max_pinned = config.max_loras_per_batch - 1
        self._at_start = config.paths if config.is_on else ()
        self._entries = {path.name: _Entry(path) for path in self._at_start}
        self._num_calls = 0
        self._loading = asyncio.Lock()
        self._freed = asyncio.Event()
        self._begun: set[asyncio.Task[None]] = set()
        self.restarted()

    def restarted(self) -> None:
        """The engine is new: it has loaded what it starts with, and nothing else."""
        for entry in self._entries.values():
            entry.adapter_id = entry.source.name if entry.source in self._at_start else None

    @property
    def paths(self) -> dict[str, str]:
        """Where each adapter came from, by name; in the order in which they were first loaded."""
        return {name: entry.source.path for name, entry in self._entries.items()}

    @property
    def loaded(self) -> list[str]:
        return [name for name, entry in self._entries.items() if entry.adapter_id is not None]

    def knows(self, name: str) -> bool:
        return name in self._entries

    def check(self, name: str, param: str) -> str:
        """The name, if requests may use it; NotFound or InvalidRequest that names the field."""
        if not self.is_on:
            raise InvalidRequest(NOT_ENABLED, param=param)
        if name not in self._entries:
            known = ", ".join(sorted(self._entries)[:20]) or "none"
            raise NotFound(
                f"the LoRA adapter {name[:100]!r} was never loaded, or is unloaded; loaded are: "
                f"{known}",
                param=param,
            )
        return name

    async def load(
        self, name: str, path: str, *, pinned: bool = False, sent: SentAdapter | None = None
    ) -> None:
        """Load an adapter under a new name: from the path, or what was `sent`, whose path is SENT.

        Raises InvalidRequest if that cannot be."""
        if not self.is_on:
            raise InvalidRequest(NOT_ENABLED)
        try:
            check_adapter_name(name)
        except ConfigError as error:
            raise InvalidRequest(error.message, param="lora_name") from None
        await self._carried_out(self._load(LoraPath(name=name, path=path, pinned=pinned), sent))

    async def _load(self, source: LoraPath, sent: SentAdapter | None) -> None:
        name = source.name
        async with self._loading:
            if name in self._entries:
                raise InvalidRequest(
                    f"an adapter named {name!r} is loaded already, from "
                    f"{self._entries[name].source.path}; unload it first, or choose another name",
                    param="lora_name",
                )
            if len(self._entries) >= MAX_KNOWN:
                raise InvalidRequest(f"{MAX_KNOWN} adapters are known; unload some first")
            num_pinned = sum(entry.source.pinned for entry in self._entries.values())
            if source.pinned and num_pinned >= self._max_pinned:
                raise InvalidRequest(
                    f"{num_pinned} adapters are pinned already; fewer than --max-loras-per-batch, "
                    f"which is {self._max_pinned + 1}, may be",
                    param="pinned",
                )
            entry = _Entry(source, sent=sent)
            others = (one.sent for one in (entry, *self._entries.values()))
            if sum(len(one.tensors) for one in others if one is not None) > MAX_SENT_BYTES:
                raise InvalidRequest(
                    f"the adapters that came as tensors may have {MAX_SENT_BYTES} bytes together; "
                    "unload some first, or load from a folder",
                    param="serialized_tensors",
                )
            await self._bring(entry, [entry])
            self._entries[name] = entry

    async def unload(self, name: str) -> None:
        """Forget an adapter, and wait until its calls have ended. NotFound if there is none."""
        self.check(name, "lora_name")
        await self._carried_out(self._unload(self._entries.pop(name)))

    async def _unload(self, entry: _Entry) -> None:
        while entry.num_users:
            entry.changed.clear()
            await entry.changed.wait()
        async with self._loading:
            await self._leave_out(entry)

    @asynccontextmanager
    async def held(self, names: Iterable[str]) -> AsyncIterator[Mapping[str, str]]:
        """The engine's ids of these adapters, which stay loaded inside.

        Raises NotFound for an unknown one, and InvalidRequest if one cannot be loaded again."""
        wanted = [self._entries[self.check(name, "lora_path")] for name in sorted(set(names))]
        self._num_calls += 1
        for entry in wanted:
            entry.num_users += 1
            entry.last_use = self._num_calls
        try:
            if any(entry.adapter_id is None for entry in wanted):
                for entry in wanted:
                    entry.num_waiting += 1
                self._freed.set()
                await self._carried_out(self._bring_back(wanted))
            yield {entry.source.name: entry.adapter_id or "" for entry in wanted}
        finally:
            for entry in wanted:
                entry.num_users -= 1
                entry.changed.set()
            self._freed.set()

    async def _carried_out(self, work: Coroutine[None, None, None]) -> None:
        """Wait for the work, which goes on if the caller is cancelled."""
        task = asyncio.ensure_future(work)
        self._begun.add(task)
        task.add_done_callback(self._ended)
        await asyncio.shield(task)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._begun.discard(task)
        if not task.cancelled():
            task.exception()  # whoever still waits gets it, too

    async def _bring_back(self, wanted: Sequence[_Entry]) -> None:
        async with self._loading:
            try:
                for entry in wanted:
                    # Who wanted an adapter may have left, and it may have been unloaded since.
                    is_known = self._entries.get(entry.source.name) is entry
                    if entry.adapter_id is None and (is_known or entry.num_users):
                        await self._bring(entry, wanted)
            finally:
                for entry in wanted:
                    entry.num_waiting -= 1

    async def _bring(self, entry: _Entry, wanted: Sequence[_Entry]) -> None:
        """Load the adapter; `wanted` are those that stay loaded meanwhile."""
        await self._make_room(wanted)
        adapter_id = uuid.uuid4().hex
        done = await self._engine.load_adapter(adapter_id, entry.source.path, entry.sent)
        if not done.done:
            raise InvalidRequest(done.message, param="lora_path")
        entry.adapter_id = adapter_id

    async def _make_room(self, wanted: Sequence[_Entry]) -> None:
        while True:
            loaded = [entry for entry in self._entries.values() if entry.adapter_id is not None]
            if self._max_loaded is None or len(loaded) < self._max_loaded:
                return
            others = [one for one in loaded if not one.source.pinned and one not in wanted]
            if not others:
                raise InvalidRequest(
                    f"--max-loaded-loras is {self._max_loaded}, and all adapters that are loaded "
                    "are pinned, or wanted by the same call; unload some, or start the server "
                    "with more"
                )
            idle = [entry for entry in others if entry.num_users <= entry.num_waiting]
            if idle:
                await self._leave_out(min(idle, key=lambda entry: entry.last_use))
            else:
                self._freed.clear()
                await self._freed.wait()

    async def _leave_out(self, entry: _Entry) -> None:
        adapter_id, entry.adapter_id = entry.adapter_id, None
        if adapter_id is not None:
            await self._engine.unload_adapter(adapter_id)
