"""Who gets how many of a step's tokens: first the requests that run, then those that wait.

Both objects take from one budget and from one `PrefillShare`, and end a request's tokens where its
`StepReach` says. What they choose, the scheduler writes into the step's plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from sapwood.base.clock import Clock
from sapwood.engine.adapters import AdapterSlots, AdapterTurns
from sapwood.engine.admission import (
    ExpectedGrowth,
    OutputReserve,
    PrefillDelayer,
    PrefillShare,
    has_room,
)
from sapwood.engine.grammar_gate import GrammarGate
from sapwood.engine.media import MediaVectors
from sapwood.engine.preemption import Preemption, Urgency
from sapwood.engine.prefixes import PrefixesInProgress
from sapwood.engine.queue_order import QueueOrder
from sapwood.engine.request_state import Phase, RequestState
from sapwood.engine.running import RunningRequests
from sapwood.engine.speculation import Speculation
from sapwood.engine.tiers import CacheTiers
from sapwood.memory.ledger import Ledger

Share = tuple[RequestState, int]
"""A request, and how many of its tokens a step computes."""


class StepReach:
    """How far one step may compute a request, besides what the budget allows: up to the next state
    that the cache keeps, and before a picture whose vectors are not there.

    media  knows the vectors of pictures; None: no request shows one
    """

    def __init__(self, ledger: Ledger, media: MediaVectors | None) -> None:
        self._needs = ledger.needs
        self._keeps_states = ledger.keeps_states and ledger.keeps_prefixes
        self._media = media

    def of(self, state: RequestState, start: int, num_new: int) -> int:
        """How many of `num_new` tokens from `start` on the step may compute.

        Vectors that these tokens show are given to the request, or ordered for it.
        """
        if self._keeps_states:
            end = self._needs.end_of_step(start, start + num_new, state.num_prompt_tokens)
            num_new = end - start
        if self._media is None or not state.media:
            return num_new
        return self._media.grant(state, start, num_new)

    def leave(self, state: RequestState) -> None:
        """The request does not run, or no longer: it gives its vectors back."""
        if self._media is not None and state.media:
            self._media.leave(state)


class RunningTurns:
    """Gives the running requests their tokens of a step, and memory for these.

    speculation   holds requests back whose guesses are not known; None: nothing is guessed
    most_decodes  of requests in one step; None: any number
    feeds_rows    ranks hand sampled tokens to the next step: nobody waits for a pending token
    requeue       lets a running request wait again
    retract       the same for one that had to make room
    """

    def __init__(
        self,
        ledger: Ledger,
        running: RunningRequests,
        preemption: Preemption,
        prefill_share: PrefillShare,
        reach: StepReach,
        *,
        speculation: Speculation | None,
        most_decodes: int | None,
        feeds_rows: bool,
        urgency: Urgency,
        requeue: Callable[[RequestState], None],
        retract: Callable[[RequestState], None],
    ) -> None:
        self._ledger = ledger
        self._running = running
        self._preemption = preemption
        self._prefill_share = prefill_share
        self._reach = reach
        self._speculation = speculation
        self._most_decodes = most_decodes
        self._feeds_rows = feeds_rows
        self._urgency = urgency
        self._requeue = requeue
        self._retract = retract

    def serve(self, budget: int, shares: list[Share], now_s: float) -> int:
        """Add the shares of requests that decode, then those of prompts as they were admitted; not
        of those that pause because their grammars are slow.

        A request is only admitted with budget left over, so every decode fits into the budget.
        Returns what is left of it.
        """
        decodes_left = self._most_decodes
        for state in sorted(self._running, key=self._turn):
            if budget == 0:
                break
            if state.phase is not Phase.RUNNING or state.is_exhausted:
                continue
            if state.has_outgrown:
                self._requeue(state)
                continue
            if state.num_pending_outputs and not self._feeds_rows:
                continue
            if state.pauses_until_s > now_s:
                continue
            if self._speculation is not None and self._speculation.is_held_back(state):
                continue
            is_decode = state.num_missing_tokens == 1
            num_new = min(state.num_missing_tokens, budget)
            num_new = num_new if is_decode else self._prefill_share.of(num_new)
            if num_new == 0:
                continue
            if is_decode and decodes_left == 0:
                continue
            num_new = self._reach.of(state, state.num_computed_tokens, num_new)
            if num_new > 0 and self._make_room(state, num_new, shares):
                shares.append((state, num_new))
                budget = max(0, budget - num_new)  # a picture that is not cut may exceed it
                if not is_decode:
                    self._prefill_share.take(num_new)
                elif decodes_left is not None:
                    decodes_left -= 1
        return budget

    def _turn(self, state: RequestState) -> tuple[bool, int]:
        is_prompt = state.num_missing_tokens > 1
        # Where not all may decode, whoever was left out comes first.
        return is_prompt, 0 if is_prompt or self._most_decodes is None else state.last_step

    def _make_room(self, state: RequestState, num_new: int, shares: list[Share]) -> bool:
        """Reserve memory for the next tokens of a running request. Returns whether it has that.

        If a pool lacks pages, less urgent requests are retracted; if that does not help, the
        request itself is.
        """
        assert state.lease is not None, "a running request has a lease"
        start = state.num_computed_tokens
        num_tokens = start + num_new
        if self._ledger.reserve(state.lease, num_tokens, start):
            return True

        def standing(running: RequestState) -> tuple[int, int]:
            return self._urgency(running), -running.arrival

        served = {id(share[0]) for share in shares}
        own = standing(state)
        victims = [
            running
            for running in self._running
            if id(running) not in served and standing(running) < own
        ]
        victims.sort(key=standing, reverse=True)
        retracted = self._preemption.to_retract(state, num_tokens, victims)
        for victim in [state] if retracted is None else retracted:
            self._retract(victim)
        return retracted is not None and self._ledger.reserve(state.lease, num_tokens, start)


class WaitingTurns:
    """Lets waiting requests begin, as long as they fit into the step.

    waiting        the scheduler's own list, from which those that begin are taken
    order          the waiting requests in the order of the schedule policy
    prefixes       that running requests compute, and for which others had better wait
    gate           holds requests back until their grammars are compiled
    reserve        how much of the KV pool is kept back for outputs
    delayer        holds prompts back while others decode; None: nothing holds them back
    tiers          bring prefixes back that the KV pool has given away; None: there are none
    whole_prompts  a prompt cannot be computed in chunks
    urgency        gives a request's urgency now
    counts         the scheduler's counters
    requeue        lets a running request wait again
    """

    def __init__(
        self,
        waiting: list[RequestState],
        order: QueueOrder,
        ledger: Ledger,
        running: RunningRequests,
        preemption: Preemption,
        prefill_share: PrefillShare,
        reach: StepReach,
        *,
        prefixes: PrefixesInProgress,
        adapters: AdapterSlots,
        gate: GrammarGate,
        reserve: OutputReserve,
        delayer: PrefillDelayer | None,
        tiers: CacheTiers | None,
        clock: Clock,
        whole_prompts: bool,
        urgency: Urgency,
        counts: Counter[str],
        requeue: Callable[[RequestState], None],
    ) -> None:
        self._waiting = waiting
        self._order = order
        self._ledger = ledger
        self._running = running
        self._preemption = preemption
        self._prefill_share = prefill_share
        self._reach = reach
        self._prefixes = prefixes
        self._adapters = adapters
        self._gate = gate
        self._reserve = reserve
        self._delayer = delayer
        self._tiers = tiers
        self._clock = clock
        self._whole_prompts = whole_prompts
        self._urgency = urgency
        self._counts = counts
        self._requeue = requeue

    def preempt(self) -> RequestState | None:
        """Take running requests back so that the most urgent waiting request fits into this step.

        Returns that waiting request; None if none had to be taken back for it, or none could be.
        """
        victims = self._preemption.victims(self._waiting)
        if not victims:
            return None
        most = max(self._urgency(state) for state in self._waiting)
        ready = (
            state
            for state in self._order.of(self._waiting, self._running.states)
            if not state.num_pending_outputs
            and not self._gate.holds(state)
            and not self._is_fetching(state)
            and self._adapters.has_room(state.adapter)
            and self._adapters.is_there(state.adapter)
        )
        first = next(ready, None)
        if (
            first is None
            or self._urgency(first) < most
            or self._prefixes.are_worth_waiting_for(first, self._ledger)
        ):
            return None
        num_taken = self._preemption.make_room(first, victims, self._requeue)
        self._counts["preempted"] += num_taken
        return first if num_taken > 0 else None

    def are_held_back(self, budget: int) -> bool:
        """Whether the prefill delayer keeps this step from admitting requests."""
        if self._delayer is None or not self._waiting or not self._running.free_rows or budget == 0:
            return False
        return self._delayer.holds_back(
            num_running=len(self._running),
            fills_a_step=len(self._waiting) >= len(self._running.free_rows)
            or sum(state.num_missing_tokens for state in self._waiting) >= budget,
            token_usage=self._ledger.num_leased_pages / self._ledger.num_pages,
        )

    def admit(
        self, budget: int, shares: list[Share], preferred: RequestState | None
    ) -> list[RequestState]:
        """Let waiting requests run as long as they fit into this step; returns them.

        preferred  the request for which others were preempted; it comes before all others
        """
        starts: list[RequestState] = []
        self._prefill_share.keeps_place = False
        if budget == 0 or not self._waiting or not self._running.free_rows:
            return starts
        growth = ExpectedGrowth(self._ledger, self._reserve)
        for running in self._running:
            growth.count(running)
        order = self._order.of(self._waiting, self._running.states)
        if preferred is not None:
            order = [preferred, *(state for state in order if state is not preferred)]
        turns = AdapterTurns(self._adapters, self._clock.now_s())
        share = self._prefill_share
        for state in order:
            if budget == 0 or not self._running.free_rows or share.of(1) == 0:
                break
            if self._passes_over(state, turns):
                continue
            wants = state.num_missing_tokens
            if self._whole_prompts and (wants > budget or not share.has_room_for_all(wants)):
                break
            num_new = self._begin(state, budget, growth)
            if num_new is None:
                break
            if num_new == 0:
                continue
            starts.append(state)
            shares.append((state, num_new))
            budget = max(0, budget - num_new)
            share.take(num_new)
        return starts

    def _passes_over(self, state: RequestState, turns: AdapterTurns) -> bool:
        """Whether the request cannot begin now, or had better not: those behind it may go first."""
        return (
            state.num_pending_outputs > 0
            or self._gate.holds(state)
            or turns.passes_over(state)
            or self._is_fetching(state)
            or self._prefixes.are_worth_waiting_for(state, self._ledger)
        )

    def _is_fetching(self, state: RequestState) -> bool:
        return self._tiers is not None and self._tiers.holds(state)

    def _begin(self, state: RequestState, budget: int, growth: ExpectedGrowth) -> int | None:
        """Let a waiting request run if the pools have room for it.

        Returns how many of its tokens the step computes. 0: none, since it shows a picture whose
        vectors are not there, and it waits on; None: there is no room, and it waits on.
        """
        # The lease locks the prefix before room is counted: locked pages are not evictable.
        lease, num_hit = self._ledger.lease(state.namespace, state.matchable_key())
        if self._tiers is not None:
            num_hit = self._tiers.extend(state, lease)
        num_new = min(state.num_tokens - num_hit, budget)
        num_new = num_new if self._whole_prompts else self._prefill_share.of(num_new)
        num_new = self._reach.of(state, num_hit, num_new)
        if num_new == 0:
            self._ledger.release(lease)
            return 0
        end = num_hit + num_new
        growth.count(state)
        fits = has_room(
            missing=self._ledger.needs.missing(lease, state.num_tokens, num_hit, end),
            kept_back=growth.of_all(),
            available=self._ledger.available(),
            is_alone=not self._running,
        )
        if not fits or not self._ledger.reserve(lease, state.num_tokens, num_hit, end):
            self._ledger.release(lease)
            self._reach.leave(state)
            return None
        self._running.begin(state, lease, num_hit, self._counts)
        if self._tiers is not None:
            self._tiers.leave(state)
        self._waiting.remove(state)
        return num_new
