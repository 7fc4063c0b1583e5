"""What one running request holds in each pool of the cache."""

from __future__ import annotations

from dataclasses import dataclass, field

from sapwood.memory.namespace import Namespace
from sapwood.memory.node import Node
from sapwood.memory.pages import PageAllocator

NO_PAGE = -1
"""In a window's table: the page was given back."""


@dataclass(slots=True, eq=False)
class WindowLease:
    """The pages of one request in a window pool.

    pages        page table: entry i holds tokens i * page_size .. of the request, or is NO_PAGE
    first        index of the first page that is held; those before it were given back
    locked_from  the tree's nodes from this page on, up to the lease's node, are locked for it
    unlock_at    end of the first of these nodes: once `first` is there, it can be unlocked
    """

    pages: list[int]
    first: int = 0
    locked_from: int = 0
    unlock_at: int = 0
    first_changed: int = 0

    def take_changes(self) -> tuple[int, list[int]]:
        """(index, pages from that index on): the part that has changed since the last call."""
        first = max(self.first_changed, self.first)
        self.first_changed = len(self.pages)
        return first, self.pages[first:]


@dataclass(slots=True, eq=False)
class StateLease:
    """The state of one request, and states of its prefixes that the tree does not know yet.

    slot         holds the state after all tokens that are planned, and is written by the next step;
                 None: the next step starts from a copy of `source`
    source       slot with the state after all planned tokens, which no step may write; None: `slot`
                 has that state, or there are no tokens yet
    source_node  the tree's node that has `source`; None: it is in `kept`
    kept         (end in pages, slot): states of prefixes, in ascending order
    copies       (source, target) before the next step
    before_trial  slot with the state before a step that may have to be taken back; None: there is
                 no such step
    """

    slot: int | None = None
    source: int | None = None
    source_node: Node | None = None
    kept: list[tuple[int, int]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    before_trial: int | None = None

    @property
    def slots(self) -> list[int]:
        """The slots that nobody else owns."""
        own = [slot for _, slot in self.kept]
        return [*own, *(slot for slot in (self.slot, self.before_trial) if slot is not None)]

    @property
    def planned_slot(self) -> int:
        """The slot that the next step writes; only after `reserve`."""
        assert self.slot is not None, "the lease was reserved for this step"
        return self.slot

    @property
    def num_missing(self) -> int:
        """Slots that the next step needs besides those that the request could use itself."""
        return 0 if any(slot == self.source for _, slot in self.kept) else self.num_wanted

    @property
    def num_wanted(self) -> int:
        """Slots that the next step takes, less those that nobody needs any more then, if there are
        enough: a state that is kept stays so."""
        if self.slot is not None:
            return 0
        return 0 if self.source_node is not None and self.source_node.num_pins == 1 else 1


@dataclass(slots=True, eq=False)
class Lease:
    """What one running request holds; only the ledger changes it.

    pages          table of the pool that keeps every token: entry i holds tokens i * page_size ..
                   of the request; empty if the model has no such pool
    num_shared     number of pages of tokens, from the first on, that belong to the prefix tree
    first_changed  the lowest index whose page changed since `take_changes`
    windows        one per window pool
    state          None: the model keeps no states
    num_readers    those who read the pages at their own pace, outside the order of the steps
    withheld       (pool, page or slot) that the request has given up while somebody read
    is_released    the request has ended; its readers have not
    """

    namespace: Namespace
    pages: list[int]
    num_shared: int
    node: Node | None
    first_changed: int = 0
    windows: tuple[WindowLease, ...] = ()
    state: StateLease | None = None
    num_readers: int = 0
    withheld: list[tuple[int, int]] = field(default_factory=list)
    is_released: bool = False

    def take_changes(self) -> tuple[int, list[int]]:
        """(index, pages from that index on): the part that has changed since the last call."""
        first = self.first_changed
        self.first_changed = len(self.pages)
        return first, self.pages[first:]

    def give_up(self, allocator: PageAllocator, pool: int, number: int) -> None:
        """The request has no use for a private page or slot any more."""
        if self.num_readers:
            self.withheld.append((pool, number))
        else:
            allocator.give_back([number])

    def take_copies(self) -> list[tuple[int, int]]:
        """(source, target) slots that must be copied before the next step, told once."""
        if self.state is None:
            return []
        copies, self.state.copies = self.state.copies, []
        return copies
