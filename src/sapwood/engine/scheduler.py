"""Decides what each step computes. Torch-free; it acts on the ledger and on nothing else.

There is no prefill phase and no decode phase. A request has `num_computed_tokens` and wants to
reach `num_tokens`; a step hands every chosen request a number of new tokens out of one budget.
Chunked prefill, prefix hits, recomputation after a retraction, and decoding are this one rule.

`plan` may be called again before the previous plan's result is known (overlap): the token that a
request is about to get counts as pending, and whoever feeds it back (`TokenFeed`) fills in its id.
Plans run in order, so the row and the pages of a request can be given to another as soon as they
are released. Where a step has drafts, nobody knows yet how many are right: a request counts as if
none were, and either waits for the step or is moved on by the rank (`ScheduledTokens.follows`).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable

from sapwood.base.clock import Clock
from sapwood.engine.adapters import AdapterSlots
from sapwood.engine.admission import OutputReserve, Precedence, PrefillDelayer, PrefillShare
from sapwood.engine.deadlines import Deadlines
from sapwood.engine.figures import engine_status
from sapwood.engine.grammar_gate import GrammarGate, GrammarRanks
from sapwood.engine.handovers import NO_HANDOVERS, Handovers
from sapwood.engine.limits import RequestBounds
from sapwood.engine.media import MediaVectors
from sapwood.engine.messages import (
    failed,
    queue_is_full,
    request_output,
    scheduled_tokens,
    take_extras,
)
from sapwood.engine.preemption import Preemption
from sapwood.engine.prefixes import PrefixesInProgress
from sapwood.engine.queue_order import QueueOrder
from sapwood.engine.request_state import Phase, RequestState
from sapwood.engine.running import RunningRequests
from sapwood.engine.speculation import NOTHING_WANTED, Speculation
from sapwood.engine.step_time import StepTimeTarget
from sapwood.engine.tiers import CacheTiers
from sapwood.engine.turns import RunningTurns, Share, StepReach, WaitingTurns
from sapwood.memory.ledger import Ledger
from sapwood.schema.config.scheduler import ResolvedScheduler
from sapwood.schema.output import EngineStatus, Finish, RequestOutput
from sapwood.schema.pooling import Pooling
from sapwood.schema.request import Generate
from sapwood.schema.step import ScheduledTokens, StepPlan, StepResult, TokenFeed
from sapwood.schema.weights import SetLimits
from sapwood.speculative.interface import NO_GUESSES

UNLIMITED = 2**31 - 1


class Scheduler:
    """Requests of one engine, from arrival to their one terminal output."""

    def __init__(
        self,
        config: ResolvedScheduler,
        ledger: Ledger,
        *,
        context_length: int,
        vocab_size: int,
        eos_token_ids: Iterable[int],
        clock: Clock,
        pooling: Pooling | None = None,
        hidden_size: int = 0,
        grammars: GrammarRanks | None = None,
        token_feed: TokenFeed = TokenFeed.ROW,
        most_decodes: int | None = None,
        speculation: Speculation | None = None,
        switch_length: int | None = None,
        adapters: AdapterSlots | None = None,
        media: MediaVectors | None = None,
        tiers: CacheTiers | None = None,
        handovers: Handovers = NO_HANDOVERS,
    ) -> None:
        """A scheduler without requests.

        config       its limits on requests and on tokens of a step
        pooling      how the model makes embeddings or scores; None: the model generates
        hidden_size  length of the vectors that requests may bring in the place of tokens
        grammars     ranks that compile grammars; None: requests that have one are refused
        token_feed   who hands sampled tokens to the steps that compute them
        most_decodes  of requests in one step, so that others are left for the steps that run at the
                     same time; None: any number
        speculation  guesses tokens, which steps then verify; None: nothing is guessed
        switch_length  as RopeConfig.switch_length
        adapters     which LoRA adapters are loaded; None: requests with one are refused
        media        knows the vectors of pictures; None: requests that show some are refused
        tiers        bring prefixes back that the KV pool has given away; None: there are none
        handovers    knows requests that another engine has a part in
        """
        self._tiers = tiers
        self._handovers = handovers
        self._switch_length = switch_length
        self._gate = GrammarGate(grammars)
        self._ledger = ledger
        self._keeps_states = ledger.keeps_states and ledger.keeps_prefixes
        chunk = config.chunked_prefill_size
        self._token_budget = UNLIMITED if chunk == -1 else chunk
        step_tokens = min(self._token_budget, context_length)
        pool_tokens = ledger.needs.most_tokens(ledger.pool_sizes, step_tokens)
        self._bounds = RequestBounds(
            context_length=context_length,
            pool_tokens=context_length if pool_tokens is None else pool_tokens,
            vocab_size=vocab_size,
            max_prompt_tokens=config.max_prompt_tokens,
            pooling=pooling,
            hidden_size=hidden_size,
        )
        self._eos_token_ids = frozenset(eos_token_ids)
        self._clock = clock
        self._rests = False
        self._pooling = pooling
        self._max_queued = config.max_queued_requests
        prefixes = PrefixesInProgress(
            page_size=ledger.page_size,
            threshold=config.in_batch_prefix_threshold if ledger.keeps_prefixes else -1,
        )
        self._precedence = Precedence.of(config)
        self._deadlines = Deadlines(config)
        self._reserve = OutputReserve(
            config.schedule_conservativeness, handovers.num_reserved_tokens
        )
        self._rng = random.Random(config.random_seed)
        self._waiting: list[RequestState] = []
        self._adapters = AdapterSlots() if adapters is None else adapters
        self._media = media
        self._running = RunningRequests(
            ledger, prefixes, self._adapters, clock, num_rows=config.max_running_requests
        )
        self._preemption = Preemption(
            self._precedence,
            ledger,
            self._reserve,
            running=self._running.states,
            free_rows=self._running.free_rows,
            token_budget=self._token_budget,
            urgency=self._urgency,
        )
        self._open: dict[str, RequestState] = {}
        self._in_flight: dict[int, list[tuple[RequestState, int]]] = {}
        self._ended_between_steps: list[RequestOutput] = []
        self._num_arrivals = 0
        self._counts: Counter[str] = Counter()
        self._prefill_share = PrefillShare(config.max_prefill_tokens, config.prefill_max_requests)
        self._reach = StepReach(ledger, media)
        self._running_turns = RunningTurns(
            ledger,
            self._running,
            self._preemption,
            self._prefill_share,
            self._reach,
            speculation=speculation,
            most_decodes=most_decodes,
            feeds_rows=token_feed is TokenFeed.ROW,
            urgency=self._urgency,
            requeue=self._requeue,
            retract=self._retract,
        )
        self._waiting_turns = WaitingTurns(
            self._waiting,
            QueueOrder(config.schedule_policy, ledger, self._rng, self._urgency),
            ledger,
            self._running,
            self._preemption,
            self._prefill_share,
            self._reach,
            prefixes=prefixes,
            adapters=self._adapters,
            gate=self._gate,
            reserve=self._reserve,
            delayer=PrefillDelayer.of(config),
            tiers=tiers,
            clock=clock,
            # Tokens of an encoder attend to later ones too: its prompts cannot be cut.
            whole_prompts=pooling is not None and pooling.is_encoder,
            urgency=self._urgency,
            counts=self._counts,
            requeue=self._requeue,
        )
        self._step_time = StepTimeTarget(config.max_step_time_ms / 1000, clock)
        self._speculation = speculation
        self.admits = True
        """Whether waiting requests may begin to run."""

    def set_limits(self, limits: SetLimits) -> None:
        """Those that wait or run already stay, also where they are more than a new limit."""
        if limits.max_queued_requests is not None:
            self._max_queued = limits.max_queued_requests
        if limits.pp_max_micro_batch_size is not None:
            self._most_decodes = limits.pp_max_micro_batch_size

    # ---- requests in -----------------------------------------------------------------------

    @property
    def has_open_requests(self) -> bool:
        return bool(self._open) or self._handovers.num_held > 0

    @property
    def has_work(self) -> bool:
        """Whether there is anything to do now besides waiting for grammars to be compiled, and for
        requests that pause."""
        return not self._rests and (
            len(self._open) > self._gate.num_held + self._num_fetching
            or self._running.has_ended_rows
            or self._has_page_orders
        )

    @property
    def is_fetching(self) -> bool:
        """Whether a storage or another engine is at work, whose results `plan` takes in."""
        return self._handovers.is_busy or (self._tiers is not None and self._tiers.is_busy)

    @property
    def _num_fetching(self) -> int:
        return 0 if self._tiers is None else self._tiers.num_held

    @property
    def _has_page_orders(self) -> bool:
        return self._tiers is not None and self._tiers.has_orders

    @property
    def open_request_ids(self) -> list[str]:
        return list(self._open)

    def request_ids(self, phase: Phase) -> list[str]:
        """Of the open requests in this phase."""
        return [state.request_id for state in self._open.values() if state.phase is phase]

    def add(self, request: Generate) -> RequestOutput | None:
        """Take the request in. Returns its terminal output if it is refused, else None."""
        self._counts["arrived"] += 1
        refusal = self._why_refused(request)
        if refusal is not None:
            self._counts["refused"] += 1
            return RequestOutput(
                request_id=request.request_id,
                token_ids=[],
                num_prompt_tokens=len(request.prompt_ids),
                finish=refusal,
            )
        request = self._handovers.own_part(request)
        limit = self._bounds.max_tokens - len(request.prompt_ids)
        asked = request.options.sampling.max_new_tokens
        seed = request.options.sampling.seed
        state = RequestState(
            request,
            max_new_tokens=limit if asked is None else min(asked, limit),
            seed=self._rng.getrandbits(63) if seed is None else seed,
            arrival=self._num_arrivals,
            arrival_s=self._clock.now_s(),
            switch_length=self._switch_length,
            adapter_start=self._adapters.begins_at(request.options.adapter, request.prompt_ids),
        )
        state.priority = self._precedence.rank(request.options.priority)
        state.uses_prefixes &= self._pooling is None or self._pooling.uses_prefixes
        self._num_arrivals += 1
        self._open[state.request_id] = state
        self._gate.enter(state)
        self._waiting.append(state)
        self._handovers.arrive(state)
        if self._tiers is not None:
            self._tiers.arrive(state)
        return None

    def abort(self, request_id: str, *, reason: str | None = None) -> RequestOutput | None:
        """End a request now, in whatever state it is. Returns its terminal output; None if no open
        request has that id."""
        state = self._open.get(request_id)
        if state is None:
            return self._handovers.abort(request_id)
        self._counts["aborted"] += 1
        self._end(state, Finish(kind="abort", message=reason))
        return request_output(state, [])

    def end_overdue(self) -> list[RequestOutput]:
        """End the requests whose time is up or whose grammar cannot be used.

        Returns their terminal outputs, and those of requests that have lost their place in the
        queue since the last call. To be called between any two steps.
        """
        for state, finish in self._deadlines.overdue(self._open.values(), self._clock.now_s()):
            self._counts["timed out"] += 1
            self._end_between_steps(state, finish)
        for state, finish in self._gate.release_ready():
            self._counts["refused"] += 1
            self._end_between_steps(state, finish)
        for request_id, finish in self._handovers.take_failed():
            if request_id in self._open:
                self._end_between_steps(self._open[request_id], finish)
        self._ended_between_steps += self._handovers.take_ended()
        ended, self._ended_between_steps = self._ended_between_steps, []
        return ended

    # ---- steps -----------------------------------------------------------------------------

    def plan(self) -> StepPlan | None:
        """The next step; None if nothing can be computed before an earlier result is known."""
        speculation = self._speculation
        self._handovers.poll()
        if self._tiers is not None:
            self._tiers.poll()
        if speculation is not None and self._in_flight and speculation.waits:
            return None
        shares: list[Share] = []
        now_s = self._clock.now_s()
        self._rests = False
        self._prefill_share.begin_step()
        if self._media is not None:
            # Those that have computed their prompts: every token of theirs is a gap that is seen.
            self._media.begin_step(
                others_decode=any(
                    one.num_computed_tokens >= len(one.prompt_ids) for one in self._running
                )
            )
        num_retractions = self._counts["retracted"]
        preferred = self._waiting_turns.preempt() if self.admits else None
        self._prefill_share.keeps_place = preferred is not None
        budget = self._running_turns.serve(
            self._step_time.budget(self._running, self._token_budget), shares, now_s
        )
        # A request that had to make room just now must not be admitted again by the same step.
        may_admit = self._counts["retracted"] == num_retractions and (
            preferred is not None or not self._waiting_turns.are_held_back(budget)
        )
        starts: list[RequestState] = []
        if may_admit and self.admits:
            starts = self._waiting_turns.admit(budget, shares, preferred)
        ends = self._running.take_ended_rows()
        if not (shares or ends or self._adapters.has_copies or self._has_page_orders):
            self._rests = any(state.pauses_until_s > now_s for state in self._running)
            return None
        encodes, forgets = ([], []) if self._media is None else self._media.take_orders()
        drafts = {} if speculation is None else speculation.drafts(shares, self._token_budget)
        wanted = {} if speculation is None else speculation.guesses_wanted(shares, drafts)
        # Drafts take pages too: what they push out must be saved before this step writes there.
        saves, loads = (
            ([], []) if self._tiers is None else self._tiers.take_orders(self._counts["steps"])
        )
        entries = [
            (
                state,
                scheduled_tokens(
                    state,
                    num_new,
                    drafts.get(state.request_id, NO_GUESSES),
                    wanted.get(state.request_id, NOTHING_WANTED),
                    follows=bool(state.unsettled),
                ),
            )
            for state, num_new in shares
        ]
        entries.sort(key=lambda entry: entry[1].num_new != 1)
        plan = StepPlan(
            step=self._counts["steps"],
            starts=[state.row_start() for state in starts],
            scheduled=[entry for _, entry in entries],
            ends=ends,
            adapters=self._adapters.take_changes(),
            adapter_copies=self._adapters.take_copies(),
            forgets=forgets,
            encodes=encodes,
            saves=saves,
            loads=loads,
        )
        if speculation is not None:
            speculation.begin_step(plan)
        self._in_flight[plan.step] = [(state, state.num_runs) for state, _ in entries]
        self._step_time.begin(plan.step, shares)
        if self._tiers is not None:
            num_prompt = sum(num_new for _, num_new in shares if num_new > 1)
            self._tiers.begin_step(plan.step, num_prompt)
        for state, entry in entries:
            state.last_step = plan.step
            self._count_as_computed(state, entry)
        self._counts["steps"] += 1
        self._reserve.after_step()
        return plan

    def _count_as_computed(self, state: RequestState, entry: ScheduledTokens) -> None:
        """What the planned entry will have done; its drafts count when they were right."""
        num_new = entry.num_new - len(entry.draft_ids)
        num_prompt_left = state.num_prompt_tokens - state.num_computed_tokens
        if num_prompt_left > 0:
            self._counts["prefilled"] += min(num_new, num_prompt_left)
        state.num_computed_tokens += num_new
        if self._media is not None and state.media:
            self._media.computed(state, state.num_computed_tokens)
        if self._keeps_states and state.shares_prefixes:
            assert state.lease is not None
            self._ledger.keep_state(state.lease, state.num_computed_tokens, state.num_prompt_tokens)
        if entry.num_output is not None:
            state.num_pending_outputs += 1
        if entry.draft_ids or entry.num_guesses:
            state.unsettled.append(entry)
        self._counts["computed"] += entry.num_new

    def update(self, plan: StepPlan, result: StepResult) -> list[RequestOutput]:
        """Take the results of a plan in; plans complete in the order in which they were made."""
        outputs: list[RequestOutput] = []
        self._step_time.end(plan.step, result.encoding_s)
        if self._tiers is not None:
            self._tiers.end_step(plan.step)
        if self._speculation is not None:
            self._speculation.end_step(plan.step, result.drafting_s)
        if self._media is not None:
            self._media.encoded(plan.encodes, result.encoding_s)
        sampled = iter(result.token_ids)
        pairs = zip(plan.scheduled, self._in_flight.pop(plan.step), strict=True)
        for index, (entry, (state, num_runs)) in enumerate(pairs):
            token_ids = next(sampled) if entry.num_output is not None else None
            is_same_run = state.phase is Phase.RUNNING and state.num_runs == num_runs
            if token_ids is not None and self._speculation is not None:
                self._speculation.settle(state, entry, token_ids, is_same_run=is_same_run)
            if state.phase is Phase.FINISHED:
                continue
            new_ids: list[int] = []
            if token_ids is not None:
                state.num_pending_outputs -= 1
                new_ids = self._take(state, [*token_ids, *result.forced.get(index, ())])
            logprobs = take_extras(state, entry, result, index, new_ids)
            if is_same_run and state.phase is Phase.RUNNING:
                self._handovers.computed(state, entry.end)
            if index in result.pauses:
                state.pauses_until_s = self._clock.now_s() + result.pauses[index]
            self._finish_if_done(state, entry, result, index)
            if self._speculation is not None and state.finish is None:
                self._speculation.bring(state, result.guesses.get(index))
            if token_ids is not None or state.finish is not None:
                values = result.values.get(index, b"")
                output = request_output(state, new_ids, logprobs, values=values)
                if not self._handovers.holds_back(state, output):
                    outputs.append(output)
            if state.phase is Phase.RUNNING and state.num_runs == num_runs:
                self._running.share_prompt(state)
        return outputs

    def _finish_if_done(
        self, state: RequestState, entry: ScheduledTokens, result: StepResult, index: int
    ) -> None:
        """End a request that cannot go on, or that wants no output tokens."""
        if state.phase is Phase.FINISHED:
            return
        if index in result.failures:
            self._finish(state, failed(result.failures[index]))
        elif index in result.values or (
            state.ends_with_prompt and entry.end == state.num_prompt_tokens
        ):
            self._finish(state, Finish(kind="length"))

    # ---- the cache and the counters ----------------------------------------------------------

    def flush_cache(self) -> bool:
        """Forget all prefixes; False, and no change, while requests are open."""
        return not self._open and self.forget_prefixes()

    def forget_prefixes(self) -> bool:
        """The same, also while requests wait; False, and no change, while requests run."""
        if self.has_running:
            return False
        self._ledger.flush()
        if self._tiers is not None:
            self._tiers.clear()
        return True

    def weights_changed(self) -> None:
        """Pages that are computed from now on must not be taken for those before."""
        if self._tiers is not None:
            self._tiers.weights_changed()
        self._handovers.weights_changed()

    @property
    def has_running(self) -> bool:
        return len(self._running) > 0

    def retract_all(self) -> None:
        """Let all running requests wait again. To be called while no step is in flight."""
        for state in list(self._running):
            self._requeue(state)

    def status(self, call_id: str = "") -> EngineStatus:
        return engine_status(
            call_id,
            self._counts,
            self._ledger,
            self._speculation,
            self._adapters,
            self._media,
            self._tiers,
            self._handovers.counts,
            running=self._running.states,
            num_waiting=len(self._waiting),
            open_requests=self._open.values(),
            new_token_ratio=self._reserve.ratio,
        )

    # ---- refusal -----------------------------------------------------------------------------

    def _why_refused(self, request: Generate) -> Finish | None:
        wrong = (
            self._bounds.why_refused(request)
            or self._gate.why_refused(request.options.sampling)
            or self._precedence.why_refused(request.options.priority)
            or self._adapters.why_refused(request.options.adapter, has_ids=not request.input_embeds)
            or self._why_media_refused(request)
            or self._handovers.why_refused(request)
        )
        if wrong is not None:
            return failed(wrong)
        if (
            len(self._waiting) >= self._max_queued
            and len(self._waiting) >= len(self._running.free_rows)  # else it runs at once
            and not self._displace(self._precedence.rank(request.options.priority))
        ):
            return queue_is_full("The request queue is full.")
        return None

    def _why_media_refused(self, request: Generate) -> str | None:
        if self._media is not None:
            return self._media.why_refused(request)
        if request.media:
            return "this engine takes only text: it has no part that sees pictures"
        return None

    def _displace(self, rank: int) -> bool:
        """Make room in the queue for a new request of that rank, by ending the least urgent waiting
        request if it is less urgent. Returns whether there is room."""
        least = self._preemption.displaced(self._waiting, rank)
        if least is None:
            return False
        self._counts["refused"] += 1
        why = "The request queue is full, and a more urgent request took this one's place."
        self._end_between_steps(least, queue_is_full(why))
        return True

    def _end_between_steps(self, state: RequestState, finish: Finish) -> None:
        self._end(state, finish)
        self._ended_between_steps.append(request_output(state, []))

    # ---- who goes first ------------------------------------------------------------------------

    def _urgency(self, state: RequestState) -> int:
        return self._precedence.urgency(state.priority, self._clock.now_s() - state.arrival_s)

    # ---- lifecycle ---------------------------------------------------------------------------

    def _retract(self, state: RequestState) -> None:
        self._counts["retracted"] += 1
        self._reserve.after_retraction()
        self._requeue(state)

    def _requeue(self, state: RequestState) -> None:
        """Let a running request wait again; its KV stays as a prefix while the pool has room."""
        self._running.leave(state)
        self._reach.leave(state)
        state.move_to(Phase.WAITING)
        state.num_computed_tokens = 0
        self._waiting.append(state)

    def _take(self, state: RequestState, token_ids: list[int]) -> list[int]:
        """Append output tokens until one ends the request. Returns those that were appended."""
        for count, token_id in enumerate(token_ids, start=1):
            state.output_ids.append(token_id)
            self._counts["output"] += 1
            finish = state.finish_after(token_id, self._eos_token_ids)
            if finish is not None:
                self._finish(state, finish)
                return token_ids[:count]
        return token_ids

    def _finish(self, state: RequestState, finish: Finish) -> None:
        self._counts["finished"] += 1
        self._end(state, finish)

    def _end(self, state: RequestState, finish: Finish) -> None:
        if state.phase is Phase.RUNNING:
            self._running.leave(state)
        elif state.phase is Phase.WAITING:
            self._waiting.remove(state)
        self._reach.leave(state)
        self._gate.leave(state)
        if self._speculation is not None:
            self._speculation.forget(state)
        if self._tiers is not None:
            self._tiers.leave(state)
        self._handovers.leave(state)
        state.move_to(Phase.FINISHED)
        state.finish = finish
        del self._open[state.request_id]
