"""One worker's KV events in their order: duplicates are skipped, and gaps filled by asking again.

What is known of a cache is right but for what was missed; so after a gap that nobody can fill all
of it is forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from sapwood.gateway.policies.known_pages import PageSet

MOST_HELD = 10_000
"""Messages that wait while older ones are sent again."""


class _Stored(msgspec.Struct, array_like=True, tag="BlockStored"):
    block_hashes: list[int]
    parent_block_hash: msgspec.Raw
    token_ids: msgspec.Raw
    block_size: int
    lora_id: msgspec.Raw = msgspec.Raw(b"")
    medium: str | None = None


class _Removed(msgspec.Struct, array_like=True, tag="BlockRemoved"):
    block_hashes: list[int]
    medium: str | None = None


class _Cleared(msgspec.Struct, array_like=True, tag="AllBlocksCleared"):
    pass


class _Batch(msgspec.Struct, array_like=True):
    ts: float
    events: list[_Stored | _Removed | _Cleared]


_decode = msgspec.msgpack.Decoder(_Batch).decode


@dataclass(slots=True)
class EventNumbers:
    """The state of one source of events.

    pages       what its cache holds
    can_replay  whether messages can be asked for again
    is_behind   whether they have been, and have not all come
    num_gaps    times that messages were lost for good
    num_bad     messages that are not of this format
    """

    pages: PageSet
    can_replay: bool
    is_behind: bool = False
    num_events: int = 0
    num_gaps: int = 0
    num_bad: int = 0
    _next: int = 0
    _held: list[tuple[int, bytes]] = field(default_factory=list)

    def begin(self) -> int | None:
        """Forget all. Returns the number from which on messages are to be asked for; None: they
        cannot."""
        self.pages.names.clear()
        self._held.clear()
        self._next = 0
        self.is_behind = self.can_replay
        return 0 if self.can_replay else None

    def take(self, number: int, payload: bytes) -> int | None:
        """A message has come. Returns as `begin` does; None: nothing is missing."""
        if self.is_behind:
            self._held.append((number, payload))
            if len(self._held) > MOST_HELD:
                self.end_replay()
            return None
        if number < self._next:  # another engine has begun in its place
            self.pages.names.clear()
            self._next = 0
        if number == self._next or not self.can_replay:
            self._apply(number, payload)
            return None
        self.is_behind = True
        self._held = [(number, payload)]
        return self._next

    def take_again(self, number: int, payload: bytes) -> None:
        """A message that was asked for has come."""
        if self.is_behind and number >= self._next:
            self._apply(number, payload)

    def end_replay(self) -> None:
        """All that can be had again has come, or will not come any more."""
        held, self._held, self.is_behind = self._held, [], False
        for number, payload in held:
            if number >= self._next:
                self._apply(number, payload)

    def _apply(self, number: int, payload: bytes) -> None:
        if self._next and number > self._next:
            self.num_gaps += 1
            self.pages.names.clear()
        self._next = number + 1
        try:
            batch = _decode(payload)
        except msgspec.DecodeError:
            self.num_bad += 1
            self.pages.names.clear()
            return
        for event in batch.events:
            self.num_events += 1
            if isinstance(event, _Stored):
                self.pages.add(event.block_hashes, event.block_size, event.medium)
            elif isinstance(event, _Removed):
                self.pages.remove(event.block_hashes, event.medium)
            else:
                self.pages.names.clear()
