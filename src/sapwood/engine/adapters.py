"""Which LoRA adapters are loaded, and which of them the steps' slots have. Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

from sapwood.engine.request_state import RequestState
from sapwood.memory.node import TOKEN_BYTES
from sapwood.memory.prefix_tree import token_key
from sapwood.schema.output import AdapterUse
from sapwood.schema.rank import Loaded
from sapwood.schema.request import LoadAdapter

EvictionPolicy = Literal["lru", "fifo"]

LEAST_SLOTS = 64
"""There may be so many slots, even if few adapters run at once: small ones stay in theirs. Captured
steps have tables with a row for each."""

ADAPTER_PATIENCE_S = 2.0
"""A request that has waited so long for a slot gets the next one."""


class AdapterRanks(Protocol):
    """The ranks, as far as they keep adapters. Nothing here waits."""

    def load(self, order: LoadAdapter) -> None:
        """Begin to load; `finished` tells how that ended."""
        ...

    def finished(self) -> list[Loaded]:
        """What has ended since the last call."""
        ...

    def arrived(self) -> list[str]:
        """Ids of adapters that plans had copied beside steps (`StepPlan.adapter_copies`), and that
        are there since the last call."""
        ...

    def unload(self, adapter_id: str) -> None: ...


class AdapterSlots:
    """Gives adapters to the slots that steps read, on demand.

    An adapter that a running request has keeps its slot. A slot whose adapter no running request
    has may be given to another; until then a request finds its adapter there. The slots' adapters
    take `max_bytes` together at most, so that many small ones fit where few large ones would.
    """

    def __init__(
        self,
        max_per_batch: int = 0,
        max_bytes: int = 0,
        policy: EvictionPolicy = "lru",
        *,
        overlaps: bool = False,
    ) -> None:
        """Slots without adapters; by default there can be none.

        max_per_batch  different adapters that may run at once
        max_bytes      that the adapters in slots take at most
        overlaps       whether adapters are copied to the device beside steps, before a request that
                       has one begins to run
        """
        self._overlaps = overlaps
        self._arriving: set[str] = set()
        """Adapters that have a slot, but are not there yet."""
        self._copies: list[str] = []
        self._max_per_batch = max_per_batch
        self._max_bytes = max_bytes
        self._is_lru = policy == "lru"
        self._bytes: dict[str, int] = {}
        self._invocations: dict[str, bytes] = {}
        """The keys (see `token_key`) of what activates adapters that are not active everywhere."""
        self._contents: dict[str, str] = {}
        self._slots: dict[str, int] = {}
        """Of the adapters that have one, those that go first in front."""
        self._free: list[int] = []
        self._users: Counter[str] = Counter()
        self._changes: list[tuple[int, str]] = []
        self.num_evictions = 0

    @property
    def use(self) -> AdapterUse:
        return AdapterUse(
            num_used=len(self._slots),
            num_slots=self._max_per_batch,
            bytes_used=self.bytes_used,
            max_bytes=self._max_bytes,
            num_loaded=len(self._bytes),
            num_evictions=self.num_evictions,
        )

    @property
    def num_slots_used(self) -> int:
        return len(self._slots)

    @property
    def max_slots(self) -> int:
        """Slots have lower numbers than this."""
        return max(LEAST_SLOTS, 2 * self._max_per_batch)

    @property
    def max_per_batch(self) -> int:
        return self._max_per_batch

    @property
    def bytes_used(self) -> int:
        return sum(self._bytes[adapter_id] for adapter_id in self._slots)

    @property
    def max_bytes(self) -> int:
        return self._max_bytes

    def add(
        self, adapter_id: str, num_bytes: int, invocation: Sequence[int] = (), content: str = ""
    ) -> str | None:
        """Count an adapter as loaded. Returns why it can never run; None if it can.

        invocation, content  as in Loaded"""
        if num_bytes > self._max_bytes:
            return (
                f"the adapter takes {num_bytes} bytes, but all adapters of a batch have "
                f"{self._max_bytes} together; start the server with a larger --max-lora-rank or "
                "--max-loras-per-batch, or with this adapter among --lora-paths"
            )
        self._bytes[adapter_id] = num_bytes
        if invocation:
            self._invocations[adapter_id] = token_key(invocation)
        if content:
            self._contents[adapter_id] = content
        return None

    def content_of(self, adapter_id: str) -> str | None:
        """A digest of what a loaded adapter contains; None if it is not known."""
        return self._contents.get(adapter_id)

    def why_refused(self, adapter_id: str, *, has_ids: bool = True) -> str | None:
        """Why a request with this adapter cannot be taken in; None if it can.

        has_ids  whether its prompt is token ids, rather than vectors"""
        if adapter_id and adapter_id not in self._bytes:
            return "the request's LoRA adapter is not loaded, or no longer; load it again"
        if adapter_id in self._invocations and not has_ids:
            return (
                "the request's LoRA adapter is activated by tokens of the prompt "
                "(alora_invocation_tokens), so it cannot be used with input_embeds"
            )
        return None

    def begins_at(self, adapter_id: str, prompt_ids: Sequence[int]) -> int | None:
        """The first token of a request that has the adapter; None: no token ever has.

        Activated LoRA is active from the last invocation in the prompt on; outputs do not count."""
        invocation = self._invocations.get(adapter_id)
        if invocation is None:
            return 0
        key = token_key(prompt_ids)
        at = key.rfind(invocation)
        while at > 0 and at % TOKEN_BYTES:  # between two tokens
            at = key.rfind(invocation, 0, at + len(invocation) - 1)
        return None if at < 0 else at // TOKEN_BYTES

    def remove(self, adapter_id: str) -> bool:
        """Forget an adapter; False, and no change, if a running request has it."""
        if self._users[adapter_id]:
            return False
        self._leave_slot(adapter_id)
        self._arriving.discard(adapter_id)
        self._bytes.pop(adapter_id, None)
        self._invocations.pop(adapter_id, None)
        self._contents.pop(adapter_id, None)
        self._users.pop(adapter_id, None)
        return True

    def has_room(self, adapter_id: str) -> bool:
        """Whether a request with this adapter may begin to run now."""
        if not adapter_id or self._users[adapter_id] or adapter_id in self._arriving:
            return True
        running = (+self._users).keys() | self._arriving
        if len(running) >= self._max_per_batch:
            return False
        return self._bytes[adapter_id] + sum(map(self._bytes.__getitem__, running)) <= (
            self._max_bytes
        )

    def acquire(self, adapter_id: str) -> int:
        """The adapter's slot, for a request that begins to run; -1 for the base model.

        Only if it `has_room` and `is_there`. Other adapters lose their slots if need be."""
        if not adapter_id:
            return -1
        self._users[adapter_id] += 1
        slot = self._slots.get(adapter_id)
        if slot is None:
            slot = self._take_slot(adapter_id)
            self._changes.append((slot, adapter_id))
        elif self._is_lru:
            self._slots[adapter_id] = self._slots.pop(adapter_id)
        return slot

    def is_there(self, adapter_id: str) -> bool:
        """Whether the adapter, which `has_room`, is on the device; if it must be copied beside
        steps, that begins with the next plan."""
        if not adapter_id or not self._overlaps:
            return True
        if adapter_id not in self._slots:
            self._take_slot(adapter_id)
            self._arriving.add(adapter_id)
            self._copies.append(adapter_id)
        return adapter_id not in self._arriving

    def arrived(self, adapter_id: str) -> None:
        """The copy is on the device. The adapter may have been removed meanwhile."""
        if adapter_id in self._arriving:
            self._arriving.discard(adapter_id)
            self._changes.append((self._slots[adapter_id], adapter_id))

    def _take_slot(self, adapter_id: str) -> int:
        self._make_room(self._bytes[adapter_id])
        num_slots = len(self._slots) + len(self._free)
        slot = self._free.pop() if self._free else num_slots
        self._slots[adapter_id] = slot
        return slot

    def release(self, adapter_id: str) -> None:
        """A request with this adapter no longer runs."""
        if adapter_id:
            self._users[adapter_id] -= 1

    def take_changes(self) -> list[tuple[int, str]]:
        """What slots have got since the last call, for the next plan."""
        changes, self._changes = self._changes, []
        return changes

    @property
    def has_copies(self) -> bool:
        """Whether `take_copies` has some."""
        return bool(self._copies)

    def take_copies(self) -> list[str]:
        """What is to be copied to the device since the last call, for the next plan."""
        copies, self._copies = self._copies, []
        return copies

    def _make_room(self, num_bytes: int) -> None:
        for other in list(self._slots):
            has_slot = len(self._slots) < self.max_slots
            if has_slot and self.bytes_used + num_bytes <= self._max_bytes:
                return
            if not self._users[other] and other not in self._arriving:
                self._leave_slot(other)
                self.num_evictions += 1

    def _leave_slot(self, adapter_id: str) -> None:
        slot = self._slots.pop(adapter_id, None)
        if slot is not None:
            self._free.append(slot)
            self._changes.append((slot, ""))


class AdapterTurns:
    """Whom one step's admission passes over, because too many other adapters run.

    Requests behind one that is passed over may go first: they may have adapters that run already.
    But after ADAPTER_PATIENCE_S only those without an adapter may, so that its turn comes.
    """

    def __init__(self, slots: AdapterSlots, now_s: float) -> None:
        self._slots = slots
        self._now_s = now_s
        self._is_owed = False

    def passes_over(self, state: RequestState) -> bool:
        """To be asked in the order of the queue."""
        adapter_id = state.adapter
        if not adapter_id:
            return False
        if self._is_owed or not self._slots.has_room(adapter_id):
            self._is_owed |= self._now_s - state.arrival_s > ADAPTER_PATIENCE_S
            return True
        return not self._slots.is_there(adapter_id)


class AdapterDesk:
    """Loads adapters while the engine serves, and tells who asked how that ended."""

    def __init__(self, slots: AdapterSlots, ranks: AdapterRanks) -> None:
        self.slots = slots
        self._ranks = ranks
        self._num_loading = 0

    @property
    def is_loading(self) -> bool:
        return self._num_loading > 0

    def load(self, order: LoadAdapter) -> None:
        self._num_loading += 1
        self._ranks.load(order)

    def finished(self, tell: Callable[[str, bool, str], None]) -> None:
        """Calls tell(call id, whether it is loaded, message) for each load that has ended. Slots
        learn of copies that are on the device."""
        for adapter_id in self._ranks.arrived():
            self.slots.arrived(adapter_id)
        if not self._num_loading:
            return
        for one in self._ranks.finished():
            self._num_loading -= 1
            failure = one.failure or self.slots.add(
                one.adapter_id, one.num_bytes, one.invocation, one.content
            )
            if failure is not None:
                self._ranks.unload(one.adapter_id)
            tell(one.call_id, failure is None, failure or "loaded")

    def unload(self, adapter_id: str) -> str | None:
        """Returns why the adapter is kept; None: it is forgotten."""
        if not self.slots.remove(adapter_id):
            return "running requests have the adapter"
        self._ranks.unload(adapter_id)
        return None
