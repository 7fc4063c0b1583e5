"""Requests whose prompts this engine reads for another one: their pages leave.

Such a request computes its prompt, and no output token. After each chunk the pages that are whole
are sent. It ends once the other engine has them all: until then its answer is held back, and its
pages stay. The last tokens of a prompt, which fill no page, are left to the other engine, which
computes them to have the first token's logits; so whatever a request asks of its tokens (grammar,
penalties, seed, log probabilities) is done in one place, and nothing of it has to move.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from sapwood.base.clock import Clock
from sapwood.distributed.transfer.messages import Run
from sapwood.distributed.transfer.sending import (
    Batch,
    Ended,
    Joined,
    PagePieces,
    PageSender,
    Read,
)
from sapwood.engine.prompt_digest import PromptDigests
from sapwood.engine.request_state import RequestState
from sapwood.memory.lease import NO_PAGE, Lease
from sapwood.memory.ledger import Ledger
from sapwood.schema.handover import NO_PEER
from sapwood.schema.output import Finish, HandoverCounts, RequestOutput
from sapwood.schema.request import Generate

ReadPage = Callable[[int, int], PagePieces]
"""The bytes of a page or state: (pool, number) -> pieces. They are valid while it is leased, and
those of a state only until the next step."""


@dataclass(slots=True, eq=False)
class _Departure:
    """One request's pages on their way.

    wanted      per pool the pages that the other side lacks; None: it has not come yet
    num_whole   pages of the prompt that are computed
    sent        (pool, index) of those that were handed over
    copied_state  the state at the end of all these pages; empty: there is none (yet)
    lease       with which they were computed
    is_kept     whether the pages are kept for it though the request has ended
    answer      its output, which waits until the other side has everything
    until_s     when its patience ends, if the other side does not come
    """

    state: RequestState
    room: int
    wanted: dict[int, frozenset[int]] | None = None
    num_whole: int = 0
    is_computed: bool = False
    sent: set[tuple[int, int]] = field(default_factory=set)
    copied_state: PagePieces = ()
    lease: Lease | None = None
    is_kept: bool = False
    answer: RequestOutput | None = None
    until_s: float = 0.0


class Departures:
    """What the scheduler tells of such requests, and asks about them."""

    def __init__(
        self,
        ledger: Ledger,
        sender: PageSender | None,
        read: ReadPage,
        clock: Clock,
        digests: PromptDigests,
        *,
        wait_s: float,
    ) -> None:
        """sender  None: nothing is sent, and every request ends with its prompt
        wait_s  how long a prompt that was read waits for the other engine"""
        self._ledger = ledger
        self._sender = sender
        self._read = read
        self._clock = clock
        self.digests = digests
        self._wait_s = wait_s
        self._by_room: dict[int, _Departure] = {}
        self._rooms: dict[str, int] = {}
        self._reading: dict[int, Lease] = {}
        self._num_batches = 0
        self._ended: list[RequestOutput] = []
        self._failed: list[tuple[str, Finish]] = []
        self.num_handed_over = 0
        self.num_failed = 0

    # ---- what the scheduler asks ---------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        """Whether to look again soon."""
        return bool(self._by_room or self._reading or self._ended or self._failed)

    @property
    def num_held(self) -> int:
        """Requests that have ended but for the other engine, or whose answers are still to be
        given."""
        return len(self._ended) + sum(one.answer is not None for one in self._by_room.values())

    def why_refused(self, request: Generate) -> str:
        """Why the request's pages cannot leave; "" if they can."""
        place = request.options.handover
        if place is None:
            return ""
        if place.room in self._by_room:
            return f"bootstrap_room {place.room} is that of another open request"
        if request.input_embeds:
            return "a prompt of vectors is handed to no other engine; send token ids or a text"
        return ""

    def arrive(self, state: RequestState) -> None:
        place = state.options.handover
        if place is None:
            return
        state.max_new_tokens = 0
        if self._sender is None or place.host == NO_PEER:
            return
        departure = _Departure(state, place.room)
        self._by_room[place.room] = departure
        self._rooms[state.request_id] = place.room
        if self._ledger.keeps_states:
            # The state at the end of the whole pages is read when a step has just computed it.
            last = (state.num_prompt_tokens - 1) // self._ledger.page_size
            state.most_matchable = max(last - 1, 0) * self._ledger.page_size
        self._sender.offer(place.room, self.digests.of(state))

    def computed(self, state: RequestState, end: int) -> None:
        """The step is done that ends at the request's token `end`; it still has its lease."""
        departure = self._of(state)
        if departure is None:
            return
        assert state.lease is not None, "the request runs"
        departure.lease = state.lease
        page_size = self._ledger.page_size
        last = (state.num_prompt_tokens - 1) // page_size
        departure.num_whole = min(end // page_size, last)
        departure.is_computed = end >= state.num_prompt_tokens
        pool = self._ledger.needs.state
        kept = [] if state.lease.state is None else state.lease.state.kept
        if pool is not None and end == last * page_size and kept and kept[-1][0] == last:
            pieces = self._read(pool, kept[-1][1])
            departure.copied_state = [piece.copy() for piece in pieces]
        self._send(departure)
        if departure.is_computed:
            self._keep(departure)

    def holds_back(self, state: RequestState, answer: RequestOutput) -> bool:
        """Whether the answer is not to be given yet."""
        departure = self._of(state)
        if departure is None or answer.finish is None:
            return False
        if not departure.is_computed or answer.finish.kind == "error":
            self._end(departure, "the request has failed where its prompt is read")
            return False
        departure.answer = answer
        departure.until_s = self._clock.now_s() + self._wait_s
        return True

    def leave(self, state: RequestState) -> None:
        """The request was ended in another way than by its prompt."""
        departure = self._of(state)
        if departure is not None and not departure.is_computed:
            self._end(departure, "the request was ended where its prompt is read")

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request that only waits for the other engine; None if there is no such."""
        room = self._rooms.get(request_id)
        departure = None if room is None else self._by_room[room]
        if departure is None or departure.answer is None:
            return None
        self._end(departure, "the request was aborted where its prompt is read")
        return msgspec.structs.replace(departure.answer, finish=Finish(kind="abort"))

    def poll(self) -> None:
        """Take in what the sender tells. To be called once per turn."""
        if self._sender is None:
            return
        while not self._sender.events.empty():
            event = self._sender.events.get()
            match event:
                case Read():
                    self._ledger.end_read(self._reading.pop(event.token))
                case Joined():
                    self._join(event.room, event.runs)
                case Ended():
                    self._over(event.room, event.why)
        now_s = self._clock.now_s()
        for departure in list(self._by_room.values()):
            is_awaited = departure.answer is not None and departure.wanted is None
            if is_awaited and departure.until_s <= now_s:
                self._fail(departure, f"nobody has come for them in {self._wait_s:g} s")

    def take_ended(self) -> list[RequestOutput]:
        """Of requests that only waited for the other engine."""
        ended, self._ended = self._ended, []
        return ended

    def take_failed(self) -> list[tuple[str, Finish]]:
        """(id, why) of requests that still compute, for nobody."""
        failed, self._failed = self._failed, []
        return failed

    @property
    def counts(self) -> HandoverCounts:
        return HandoverCounts(
            part="prefill",
            num_done=self.num_handed_over,
            num_failed=self.num_failed,
            num_under_way=len(self._by_room),
        )

    def close(self) -> None:
        if self._sender is not None:
            self._sender.close()

    # ---- rooms -----------------------------------------------------------------------------------

    def _of(self, state: RequestState) -> _Departure | None:
        room = self._rooms.get(state.request_id)
        return None if room is None else self._by_room[room]

    def _join(self, room: int, runs: Sequence[Run]) -> None:
        departure = self._by_room.get(room)
        if departure is None:
            return  # it was withdrawn meanwhile
        wanted: dict[int, set[int]] = {}
        last = (departure.state.num_prompt_tokens - 1) // self._ledger.page_size
        for run in runs:
            pages = range(run.first, min(run.first + run.count, last))
            wanted.setdefault(run.pool, set()).update(pages)
        departure.wanted = {pool: frozenset(pages) for pool, pages in wanted.items()}
        self._send(departure)

    def _over(self, room: int, why: str) -> None:
        departure = self._by_room.get(room)
        if departure is None:
            return
        if why:
            self._fail(departure, why)
            return
        self.num_handed_over += 1
        assert departure.answer is not None, "all was sent, so all was computed"
        self._ended.append(departure.answer)
        self._forget(departure)

    def _fail(self, departure: _Departure, why: str) -> None:
        """Whoever asked here is told; a request that computes is ended by the scheduler."""
        self.num_failed += 1
        finish = Finish(
            kind="error",
            message=f"the prompt's pages were not handed over: {why}",
            status=503,
            error_type="ServiceUnavailableError",
        )
        if departure.answer is None:
            self._failed.append((departure.state.request_id, finish))
        else:
            self._ended.append(msgspec.structs.replace(departure.answer, finish=finish))
        self._end(departure, why)

    def _end(self, departure: _Departure, why: str) -> None:
        assert self._sender is not None
        self._sender.withdraw(departure.room, why)
        self._forget(departure)

    def _forget(self, departure: _Departure) -> None:
        del self._rooms[departure.state.request_id]
        del self._by_room[departure.room]
        if departure.is_kept:
            assert departure.lease is not None
            self._ledger.end_read(departure.lease)

    # ---- pages -----------------------------------------------------------------------------------

    def _keep(self, departure: _Departure) -> None:
        """Keep the pages that are still to be sent, whatever becomes of the request."""
        if not departure.is_kept:
            assert departure.lease is not None
            self._ledger.begin_read(departure.lease)
            departure.is_kept = True

    def _send(self, departure: _Departure) -> None:
        """Hand over what is computed and wanted, and was not handed over."""
        lease, wanted = departure.lease, departure.wanted
        if lease is None or wanted is None or self._sender is None:
            return
        if lease is not departure.state.lease and not departure.is_kept:
            return  # it was retracted, and computes its prompt once more
        needs = self._ledger.needs
        if needs.full is not None:
            self._send_pages(departure, lease, needs.full, lease.pages, wanted)
        if not departure.is_computed:
            return
        # What windows hold is known when all is computed: before, they give pages back.
        for (pool, _), held in zip(needs.windows, lease.windows, strict=True):
            self._send_pages(departure, lease, pool, held.pages, wanted)
        if needs.state is not None and departure.copied_state and wanted.get(needs.state):
            index = departure.num_whole - 1
            self._put(departure, lease, needs.state, index, [departure.copied_state])
        self._sender.finish(departure.room)

    def _send_pages(
        self,
        departure: _Departure,
        lease: Lease,
        pool: int,
        table: Sequence[int],
        wanted: dict[int, frozenset[int]],
    ) -> None:
        """Those of one pool, as runs of pages in a row."""
        run: list[PagePieces] = []
        asked = wanted.get(pool, frozenset())
        for index in range(departure.num_whole + 1):
            is_due = (
                index < departure.num_whole
                and index in asked
                and (pool, index) not in departure.sent
                and table[index] != NO_PAGE
            )
            if is_due:
                departure.sent.add((pool, index))
                run.append(self._read(pool, table[index]))
            elif run:
                self._put(departure, lease, pool, index - len(run), run)
                run = []

    def _put(
        self,
        departure: _Departure,
        lease: Lease,
        pool: int,
        first: int,
        pages: Sequence[PagePieces],
    ) -> None:
        assert self._sender is not None
        self._num_batches += 1
        self._reading[self._num_batches] = lease
        self._ledger.begin_read(lease)
        self._sender.send(departure.room, Batch(self._num_batches, pool, first, list(pages)))
