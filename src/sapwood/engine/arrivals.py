"""Requests whose prompts another engine reads for this one: their pages arrive.

Such a request waits until its pages are there, in rows of the host's memory, under the same names
as any pages of the host tier. Then it is admitted like every request: its prefix is found there,
and the few tokens after it are computed here. Pages that the prefix tree has are not asked for.
If some do not come though all went well, they are computed here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from sapwood.distributed.transfer.messages import Run
from sapwood.distributed.transfer.receiving import Fetched, Freed, Order, PageReceiver
from sapwood.engine.prompt_digest import PromptDigests
from sapwood.engine.request_state import RequestState
from sapwood.memory.tiers.host import HostTier
from sapwood.memory.tiers.slots import PageCopy
from sapwood.schema.config.disaggregation import DisaggregationConfig
from sapwood.schema.handover import NO_PEER, Handover
from sapwood.schema.output import Finish, HandoverCounts
from sapwood.schema.request import Generate

HostPage = tuple[int, int, bytes]
"""(pool, index in the prompt, digest)"""


@dataclass(slots=True, eq=False)
class _Arrival:
    """One request's pages on their way.

    pages    what its prefix needs of the host
    copies   where these are, or will be; pinned
    own      those of them that this request has asked for
    number   of its order; 0: it waits for rows
    is_fetched  whether nothing more will come of its order
    is_over  whether nothing more will come for it, nor of others' orders for the same pages
    """

    state: RequestState
    pages: Sequence[HostPage]
    copies: dict[HostPage, PageCopy] = field(default_factory=dict)
    own: dict[tuple[int, int], HostPage] = field(default_factory=dict)
    number: int = 0
    is_fetched: bool = False
    is_over: bool = False


class Arrivals:
    """What the scheduler tells of such requests, and asks about them."""

    def __init__(
        self,
        host: HostTier,
        receiver: PageReceiver | None,
        config: DisaggregationConfig,
        digests: PromptDigests,
    ) -> None:
        """receiver  None: nothing is fetched, and every prompt is computed here"""
        self._host = host
        self._receiver = receiver
        self._config = config
        self.digests = digests
        self._waiting: deque[_Arrival] = deque()
        self._by_id: dict[str, _Arrival] = {}
        self._orders: dict[int, _Arrival] = {}
        self._pinned: dict[int, list[tuple[int, PageCopy]]] = {}
        self._num_orders = 0
        self._num_polls = 0
        self._failed: list[tuple[str, Finish]] = []
        self.num_taken_over = 0
        self.num_failed = 0

    # ---- what the scheduler asks ---------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        """Whether to look again soon."""
        return bool(self._by_id or self._pinned)

    @property
    def num_held(self) -> int:
        """Requests that wait for their pages."""
        return sum(not one.is_over for one in self._by_id.values())

    def why_refused(self, request: Generate) -> str:
        """Why the request's pages cannot be fetched; "" if they can."""
        place = request.options.handover
        if place is None or self._receiver is None or place.host == NO_PEER:
            return ""
        if request.input_embeds:
            return "a prompt of vectors is handed over by no engine; send token ids or a text"
        if request.options.tells_of_tokens:
            return (
                "hidden states and routed experts of a prompt are known only where it is read; "
                "send the request to an engine that does both"
            )
        return self._config.why_not_from(place.host)

    def has_place(self, place: Handover | None) -> bool:
        """Whether the prompt of a request with that place is read elsewhere."""
        return place is not None and self._receiver is not None and place.host != NO_PEER

    def begin(self, state: RequestState, pages: Sequence[HostPage]) -> None:
        """The request waits for these pages from now on; perhaps there are none, because its prefix
        is here already: then it only tells the other engine so."""
        arrival = _Arrival(state, pages)
        self._by_id[state.request_id] = arrival
        self._waiting.append(arrival)
        self._order_waiting()

    def holds(self, request_id: str) -> bool:
        arrival = self._by_id.get(request_id)
        return arrival is not None and not arrival.is_over

    def leave(self, state: RequestState) -> None:
        """The request begins to run, or was ended."""
        arrival = self._by_id.pop(state.request_id, None)
        if arrival is None:
            return
        if arrival in self._waiting:
            self._waiting.remove(arrival)
        if arrival.number and not arrival.is_fetched and self._receiver is not None:
            self._receiver.leave(arrival.number)
        # Those that the next plan copies to the device are pinned for that by the host tier.
        self._unpin([(page[0], copy) for page, copy in arrival.copies.items()])

    def poll(self) -> None:
        """Take in what the receiver tells. To be called once per turn."""
        self._num_polls += 1
        if self._num_polls % self._config.disaggregation_decode_polling_interval:
            return
        while self._receiver is not None and not self._receiver.events.empty():
            event = self._receiver.events.get()
            match event:
                case Fetched():
                    self._take(event)
                case Freed():
                    self._unpin(self._pinned.pop(event.number))
        self._order_waiting()
        for arrival in self._by_id.values():
            if arrival.is_fetched and not arrival.is_over:
                arrival.is_over = all(
                    copy.is_filled or copy.is_forgotten for copy in arrival.copies.values()
                )

    def take_failed(self) -> list[tuple[str, Finish]]:
        """(id, why) of requests whose pages will not come."""
        failed, self._failed = self._failed, []
        return failed

    @property
    def counts(self) -> HandoverCounts:
        return HandoverCounts(
            part="decode",
            num_done=self.num_taken_over,
            num_failed=self.num_failed,
            num_under_way=self.num_held,
        )

    def close(self) -> None:
        if self._receiver is not None:
            self._receiver.close()

    # ---- orders ----------------------------------------------------------------------------------

    def _order_waiting(self) -> None:
        """Fetch the pages of those for which there are rows, in the order in which they came."""
        while self._waiting and self._order(self._waiting[0]):
            self._waiting.popleft()

    def _order(self, arrival: _Arrival) -> bool:
        """Whether there were rows for all that is missing; nothing was done if there were not."""
        own: dict[tuple[int, int], HostPage] = {}
        copies: dict[HostPage, PageCopy] = {}
        for page in arrival.pages:
            pool, index, digest = page
            slots = self._host.slots[pool]
            copy = slots.find(digest)
            if copy is None:
                copy = slots.add(digest)
                if copy is None:
                    self._take_back(own, copies)
                    return False
                copy.is_filled = False
                own[pool, index] = page
            slots.pin(copy)
            copies[page] = copy
        arrival.own, arrival.copies = own, copies
        self._num_orders += 1
        number = arrival.number = self._num_orders
        self._orders[number] = arrival
        pinned = [(pool, copies[page]) for (pool, _), page in own.items()]
        for pool, copy in pinned:
            self._host.slots[pool].pin(copy)
        self._pinned[number] = pinned
        place = arrival.state.options.handover
        assert place is not None
        assert self._receiver is not None
        keys = sorted(own)
        self._receiver.fetch(
            Order(
                number=number,
                place=place,
                prompt=self.digests.of(arrival.state),
                runs=_runs(keys),
                rows=[copies[own[key]].slot for key in keys],
            )
        )
        return True

    def _take_back(
        self, own: dict[tuple[int, int], HostPage], copies: dict[HostPage, PageCopy]
    ) -> None:
        for (pool, _, _), copy in copies.items():
            self._host.slots[pool].unpin(copy)
        for pool, _, digest in own.values():
            self._host.slots[pool].drop(digest)

    def _take(self, event: Fetched) -> None:
        """Nothing more comes of an order."""
        arrival = self._orders.pop(event.number)
        arrival.is_fetched = True
        for key, (pool, _, digest) in arrival.own.items():
            copy = arrival.copies[arrival.own[key]]
            slots = self._host.slots[pool]
            copy.is_filled = key in event.arrived
            if not copy.is_filled and slots.find(digest) is copy:
                slots.drop(digest)
        is_gone = self._by_id.get(arrival.state.request_id) is not arrival
        if not event.why:
            self.num_taken_over += 1
        elif not is_gone:
            self.num_failed += 1
            why = f"the prompt's pages did not come: {event.why}"
            finish = Finish(
                kind="error", message=why, status=503, error_type="ServiceUnavailableError"
            )
            self._failed.append((arrival.state.request_id, finish))

    def _unpin(self, pinned: Sequence[tuple[int, PageCopy]]) -> None:
        for pool, copy in pinned:
            self._host.slots[pool].unpin(copy)


def _runs(keys: Sequence[tuple[int, int]]) -> list[Run]:
    """Keys (pool, index) in ascending order as runs."""
    runs: list[Run] = []
    for pool, index in keys:
        last = runs[-1] if runs else None
        if last is not None and last.pool == pool and last.first + last.count == index:
            runs[-1] = Run(pool, last.first, last.count + 1)
        else:
            runs.append(Run(pool, index, 1))
    return runs
