"""Decides what each step computes. Torch-free; it acts on the ledger and on nothing else.

There is no prefill phase and no decode phase. A request has `num_computed_tokens` and wants to
reach `num_tokens`; a step hands every chosen request a number of new tokens out of one budget.
Chunked prefill, prefix hits, recomputation after a retraction, and decoding are this one rule.

`plan` may be called again before the previous plan's result is known (overlap): the token that a
request is about to get counts as pending, and the executor fills in its id. Plans run in order, so
what a request held can be given to another as soon as it is released.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable

from sapwood.base.clock import Clock
from sapwood.engine.admission import OutputReserve
from sapwood.engine.policy import LPM_QUEUE_LIMIT, SCHEDULE_POLICIES, Waiting
from sapwood.engine.request_state import Phase, RequestState
from sapwood.memory.ledger import Lease, Ledger
from sapwood.schema.config.scheduler import SchedulerConfig
from sapwood.schema.output import EngineStatus, Finish, RequestOutput
from sapwood.schema.request import Generate
from sapwood.schema.step import RowStart, ScheduledTokens, StepPlan, StepResult

UNLIMITED = 2**31 - 1


class Scheduler:
    """Requests of one engine, from arrival to their one terminal output."""

    def __init__(
        self,
        config: SchedulerConfig,
        ledger: Ledger,
        *,
        context_length: int,
        vocab_size: int,
        eos_token_ids: Iterable[int],
        clock: Clock,
    ) -> None:
        """`config` is resolved: none of its values is None."""
        assert config.max_running_requests is not None
        assert config.max_queued_requests is not None
        assert config.chunked_prefill_size is not None
        self._ledger = ledger
        self._context_length = context_length
        self._vocab_size = vocab_size
        self._eos_token_ids = frozenset(eos_token_ids)
        self._clock = clock
        self._max_queued = config.max_queued_requests
        chunk = config.chunked_prefill_size
        self._token_budget = UNLIMITED if chunk == -1 else chunk
        self._prefix_threshold = config.in_batch_prefix_threshold if ledger.keeps_prefixes else -1
        self._policy_name = config.schedule_policy
        self._reserve = OutputReserve(config.schedule_conservativeness)
        self._rng = random.Random(config.random_seed)
        self._free_rows = list(range(config.max_running_requests - 1, -1, -1))
        self._waiting: list[RequestState] = []
        self._running: list[RequestState] = []
        self._open: dict[str, RequestState] = {}
        self._in_flight: dict[int, list[tuple[RequestState, int, int | None]]] = {}
        self._being_computed: dict[int, RequestState] = {}
        self._num_arrivals = 0
        self._num_steps = 0
        self._counts: Counter[str] = Counter()

    # ---- requests in -----------------------------------------------------------------------

    @property
    def has_open_requests(self) -> bool:
        return bool(self._open)

    @property
    def open_request_ids(self) -> list[str]:
        return list(self._open)

    def add(self, request: Generate) -> RequestOutput | None:
        """Take the request in; the terminal output if it is refused."""
        refusal = self._why_refused(request)
        if refusal is not None:
            self._counts["refused"] += 1
            return RequestOutput(
                request_id=request.request_id,
                token_ids=[],
                num_prompt_tokens=len(request.prompt_ids),
                finish=refusal,
            )
        limit = min(self._context_length, self._pool_tokens) - len(request.prompt_ids)
        asked = request.sampling.max_new_tokens
        seed = request.sampling.seed
        state = RequestState(
            request,
            max_new_tokens=limit if asked is None else min(asked, limit),
            seed=self._rng.getrandbits(63) if seed is None else seed,
            arrival=self._num_arrivals,
            arrival_s=self._clock.now_s(),
        )
        self._num_arrivals += 1
        self._open[state.request_id] = state
        self._waiting.append(state)
        return None

    def abort(self, request_id: str, *, reason: str | None = None) -> RequestOutput | None:
        """End that request now, in whatever state it is; None if it is not open."""
        state = self._open.get(request_id)
        if state is None:
            return None
        self._counts["aborted"] += 1
        self._end(state, Finish(kind="abort", message=reason))
        return self._output(state, [])

    # ---- steps -----------------------------------------------------------------------------

    def plan(self) -> StepPlan | None:
        """The next step; None if nothing can be computed before an earlier result is known."""
        shares: list[tuple[RequestState, int]] = []
        num_retractions = self._counts["retracted"]
        budget = self._serve_running(self._token_budget, shares)
        # What had to make room just now must not be taken in again by the same step.
        may_admit = self._counts["retracted"] == num_retractions
        starts = self._admit(budget, shares) if may_admit else []
        if not shares:
            return None
        shares.sort(key=lambda share: share[1] != 1)
        entries = [self._schedule(state, num_new) for state, num_new in shares]
        plan = StepPlan(
            step=self._num_steps,
            starts=[self._start(state) for state in starts],
            scheduled=entries,
        )
        self._in_flight[plan.step] = [
            (state, state.num_runs, entry.num_output)
            for (state, _), entry in zip(shares, entries, strict=True)
        ]
        for (state, num_new), entry in zip(shares, entries, strict=True):
            state.num_computed_tokens += num_new
            if entry.num_output is not None:
                state.num_pending_outputs += 1
        self._num_steps += 1
        self._counts["computed"] += sum(num_new for _, num_new in shares)
        self._reserve.after_step()
        return plan

    def update(self, plan: StepPlan, result: StepResult) -> list[RequestOutput]:
        """Take the results of a plan in; plans complete in the order in which they were made."""
        outputs: list[RequestOutput] = []
        sampled = iter(result.token_ids)
        for state, num_runs, num_output in self._in_flight.pop(plan.step):
            token_id = next(sampled) if num_output is not None else None
            if state.phase is Phase.FINISHED:
                continue
            if token_id is not None:
                state.num_pending_outputs -= 1
                state.output_ids.append(token_id)
                self._counts["output"] += 1
                self._settle(state, token_id)
                outputs.append(self._output(state, [token_id]))
            elif state.is_exhausted and state.max_new_tokens == 0:
                self._finish(state, Finish(kind="length"))
                outputs.append(self._output(state, []))
            if state.phase is Phase.RUNNING and state.num_runs == num_runs:
                self._share_prompt(state)
        return outputs

    # ---- the cache and the counters ----------------------------------------------------------

    def flush_cache(self) -> bool:
        """Forget all prefixes; False, and no change, while requests are open."""
        if self._open:
            return False
        self._ledger.flush()
        return True

    def status(self, call_id: str = "") -> EngineStatus:
        counts = self._counts
        return EngineStatus(
            call_id=call_id,
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_pages=self._ledger.num_pages,
            num_free_pages=self._ledger.num_free_pages,
            num_cached_pages=self._ledger.num_cached_pages,
            num_leased_pages=self._ledger.num_leased_pages,
            num_steps=self._num_steps,
            num_computed_tokens=counts["computed"],
            num_cached_tokens=counts["cached"],
            num_output_tokens=counts["output"],
            num_finished=counts["finished"],
            num_aborted=counts["aborted"],
            num_refused=counts["refused"],
            num_retractions=counts["retracted"],
        )

    # ---- refusal -----------------------------------------------------------------------------

    @property
    def _pool_tokens(self) -> int:
        return self._ledger.num_pages * self._ledger.page_size

    def _why_refused(self, request: Generate) -> Finish | None:
        def refuse(message: str, status: int, error_type: str) -> Finish:
            return Finish(kind="error", message=message, status=status, error_type=error_type)

        if request.request_id in self._open:
            return refuse(
                f"the request id {request.request_id!r} is in use; send another rid, or none",
                400,
                "BadRequestError",
            )
        num_tokens = len(request.prompt_ids)
        if num_tokens == 0:
            return refuse("the prompt is empty; send at least one token", 400, "BadRequestError")
        limit = min(self._context_length, self._pool_tokens) - 1
        if num_tokens > limit:
            return refuse(
                f"the prompt has {num_tokens} tokens but this engine accepts at most {limit} "
                f"(context length {self._context_length}, KV pool {self._pool_tokens}); "
                f"shorten it by {num_tokens - limit}",
                400,
                "BadRequestError",
            )
        outside = self._token_outside_vocabulary(request)
        if outside is not None:
            return refuse(
                f"token id {outside} is outside the model's vocabulary, 0 to "
                f"{self._vocab_size - 1}",
                400,
                "BadRequestError",
            )
        if len(self._waiting) >= self._max_queued and not self._can_run_at_once():
            return refuse("The request queue is full.", 503, "ServiceUnavailableError")
        return None

    def _token_outside_vocabulary(self, request: Generate) -> int | None:
        """A tokenizer may know more tokens than its model; such an id must not reach a kernel."""
        sampling = request.sampling
        for ids in (request.prompt_ids, sampling.stop_token_ids, sampling.logit_bias):
            if ids and not (min(ids) >= 0 and max(ids) < self._vocab_size):
                return next(one for one in ids if not 0 <= one < self._vocab_size)
        return None

    def _can_run_at_once(self) -> bool:
        return len(self._waiting) < len(self._free_rows)

    # ---- sharing a step's tokens out -----------------------------------------------------------

    def _serve_running(self, budget: int, shares: list[tuple[RequestState, int]]) -> int:
        """Running requests first: those that decode, then prompts as they were admitted.

        A request is only admitted with budget left over, so every decode fits into the budget.
        """
        order = sorted(self._running, key=lambda state: state.num_missing_tokens > 1)
        for state in order:
            if budget == 0:
                break
            if state.phase is not Phase.RUNNING or state.is_exhausted:
                continue
            num_new = min(state.num_missing_tokens, budget)
            if num_new > 0 and self._make_room(state, num_new, shares):
                shares.append((state, num_new))
                budget -= num_new
        return budget

    def _make_room(
        self, state: RequestState, num_new: int, shares: list[tuple[RequestState, int]]
    ) -> bool:
        """Pages for its next tokens; retracts others, at last the request itself, to have them."""
        assert state.lease is not None, "a running request has a lease"
        while not self._ledger.reserve(state.lease, state.num_computed_tokens + num_new):
            chosen = {id(share[0]) for share in shares}
            victims = [one for one in self._running if id(one) not in chosen]
            victim = max(victims, key=lambda one: (-one.priority, one.arrival))
            self._retract(victim)
            if victim is state:
                return False
        return True

    def _admit(self, budget: int, shares: list[tuple[RequestState, int]]) -> list[RequestState]:
        starts: list[RequestState] = []
        if budget == 0 or not self._waiting or not self._free_rows:
            return starts
        growth = sum(self._expected_growth(state) for state in self._running)
        for state in self._in_policy_order():
            if budget == 0 or not self._free_rows:
                break
            if state.num_pending_outputs or self._prefix_is_being_computed(state):
                continue
            # The lease locks the prefix before room is counted: locked pages are not evictable.
            lease, num_hit = self._ledger.lease(state.namespace, state.key())
            num_tokens = state.num_tokens
            kept_back = self._ledger.pages_for(growth + self._expected_growth(state))
            missing = self._ledger.pages_for(num_tokens) - len(lease.pages)
            alone = not self._running
            fits = alone or missing + kept_back <= self._ledger.num_available_pages
            if not fits or not self._ledger.reserve(lease, num_tokens):
                self._ledger.release(lease)
                break
            self._run(state, lease, num_hit)
            starts.append(state)
            num_new = min(state.num_missing_tokens, budget)
            shares.append((state, num_new))
            budget -= num_new
            growth += self._expected_growth(state)
        return starts

    def _expected_growth(self, state: RequestState) -> int:
        """Tokens that the request is expected to add to those it has pages for."""
        outstanding = state.max_new_tokens - state.num_outputs
        return int(outstanding * self._reserve.ratio) + 1

    def _in_policy_order(self) -> list[RequestState]:
        name = self._policy_name
        if name == "lpm" and len(self._waiting) > LPM_QUEUE_LIMIT:
            name = "fcfs"
        policy = SCHEDULE_POLICIES[name]
        seen = [
            Waiting(
                index=index,
                priority=state.priority,
                arrival=state.arrival,
                max_new_tokens=state.max_new_tokens - state.num_outputs,
                path=self._ledger.prefix_path(state.namespace, state.key())
                if policy.needs_path
                else (),
            )
            for index, state in enumerate(self._waiting)
        ]
        return [self._waiting[one.index] for one in policy.order(seen, self._rng)]

    # ---- one prefix is computed once ---------------------------------------------------------

    def _prefix_is_being_computed(self, state: RequestState) -> bool:
        """Whether a running request will soon have much more of this prefix than the cache has."""
        if self._prefix_threshold < 0 or not self._being_computed:
            return False
        page_size = self._ledger.page_size
        hit = sum(tokens for _, tokens in self._ledger.prefix_path(state.namespace, state.key()))
        wanted = (hit + max(self._prefix_threshold, 1) - 1) // page_size
        hashes = state.page_hashes(page_size)
        # The page with the last prompt token is computed in any case.
        if (wanted + 1) * page_size > state.num_prompt_tokens - 1:
            return False
        other = self._being_computed.get(hashes[wanted])
        return other is not None and other is not state

    def _announce_prefix(self, state: RequestState) -> None:
        if self._prefix_threshold >= 0 and state.num_computed_tokens < state.num_prompt_tokens:
            for page_hash in state.page_hashes(self._ledger.page_size):
                self._being_computed.setdefault(page_hash, state)

    def _withdraw_prefix(self, state: RequestState) -> None:
        if not self._being_computed:
            return
        for page_hash in state.page_hashes(self._ledger.page_size):
            if self._being_computed.get(page_hash) is state:
                del self._being_computed[page_hash]

    def _share_prompt(self, state: RequestState) -> None:
        """Let others hit what is computed of the prompt, after each of its chunks."""
        assert state.lease is not None, "a running request has a lease"
        num_computed = min(state.num_computed_tokens, state.num_prompt_tokens)
        if num_computed // self._ledger.page_size > state.lease.num_shared:
            self._ledger.commit(state.lease, state.key(num_computed))
        if num_computed == state.num_prompt_tokens:
            self._withdraw_prefix(state)

    # ---- lifecycle ---------------------------------------------------------------------------

    def _run(self, state: RequestState, lease: Lease, num_hit: int) -> None:
        state.move_to(Phase.RUNNING)
        state.lease = lease
        state.row = self._free_rows.pop()
        state.num_runs += 1
        state.num_computed_tokens = num_hit
        if state.num_cached_tokens is None:
            state.num_cached_tokens = min(num_hit, state.num_prompt_tokens)
            state.queue_time_s = self._clock.now_s() - state.arrival_s
            self._counts["cached"] += state.num_cached_tokens
        self._waiting.remove(state)
        self._running.append(state)
        self._announce_prefix(state)

    def _retract(self, state: RequestState) -> None:
        """Back to waiting; what it computed stays as a prefix for as long as the pool has room."""
        self._counts["retracted"] += 1
        self._reserve.after_retraction()
        self._leave(state)
        state.move_to(Phase.WAITING)
        state.num_computed_tokens = 0
        self._waiting.append(state)

    def _leave(self, state: RequestState) -> None:
        """Give back the row and the pages of a running request."""
        assert state.lease is not None, "a running request has a lease"
        num_shareable = min(state.num_computed_tokens, state.num_known_tokens)
        self._ledger.commit(state.lease, state.key(num_shareable))
        self._ledger.release(state.lease)
        self._withdraw_prefix(state)
        state.lease = None
        self._free_rows.append(state.row)
        state.row = -1
        self._running.remove(state)

    def _settle(self, state: RequestState, token_id: int) -> None:
        """End the request if its newest output token ends it."""
        sampling = state.sampling
        may_stop = len(state.output_ids) > sampling.min_new_tokens
        is_eos = token_id in self._eos_token_ids and not sampling.ignore_eos
        if may_stop and (is_eos or token_id in sampling.stop_token_ids):
            self._finish(state, Finish(kind="stop", matched=token_id))
        elif len(state.output_ids) >= state.max_new_tokens:
            self._finish(state, Finish(kind="length"))

    def _finish(self, state: RequestState, finish: Finish) -> None:
        self._counts["finished"] += 1
        self._end(state, finish)

    def _end(self, state: RequestState, finish: Finish) -> None:
        if state.phase is Phase.RUNNING:
            self._leave(state)
        elif state.phase is Phase.WAITING:
            self._waiting.remove(state)
        state.move_to(Phase.FINISHED)
        state.finish = finish
        del self._open[state.request_id]

    # ---- messages ----------------------------------------------------------------------------

    def _start(self, state: RequestState) -> RowStart:
        return RowStart(
            row=state.row,
            sampling=state.sampling,
            seed=state.seed,
            prompt_ids=state.prompt_ids,
            output_ids=list(state.output_ids),
        )

    def _schedule(self, state: RequestState, num_new: int) -> ScheduledTokens:
        assert state.lease is not None, "a scheduled request has a lease"
        first_page, pages = state.lease.take_changes()
        reaches_end = state.num_computed_tokens + num_new == state.num_tokens
        samples = reaches_end and state.max_new_tokens > 0
        return ScheduledTokens(
            row=state.row,
            position=state.num_computed_tokens,
            token_ids=state.new_token_ids(num_new),
            first_page=first_page,
            pages=pages,
            num_output=state.num_outputs if samples else None,
        )

    def _output(self, state: RequestState, token_ids: list[int]) -> RequestOutput:
        return RequestOutput(
            request_id=state.request_id,
            token_ids=token_ids,
            num_prompt_tokens=state.num_prompt_tokens,
            num_cached_tokens=state.num_cached_tokens or 0,
            queue_time_s=state.queue_time_s,
            finish=state.finish,
        )
