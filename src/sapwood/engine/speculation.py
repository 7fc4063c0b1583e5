"""Decides which requests of a step get drafts, and how many.

A draft costs a row of the step's matrix products whether it is right or not. How often guesses of a
kind are right is measured per request and for all, also of guesses that no step verified; what a
step of that many tokens costs is measured, too. So each step verifies the guesses with which it
brings the most tokens per second: many of an edit, few of a chat, none where steps are busy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sapwood.base.clock import Clock
from sapwood.engine.request_state import RequestState
from sapwood.memory.ledger import Ledger
from sapwood.schema.output import Speculated
from sapwood.schema.step import ScheduledTokens, StepPlan
from sapwood.speculative.acceptance import Acceptance
from sapwood.speculative.choice import best_guesses, shared_out
from sapwood.speculative.costs import StepCosts
from sapwood.speculative.depth import DraftDepth
from sapwood.speculative.interface import NO_GUESSES, Draft, Drafter, Guesses
from sapwood.speculative.ranks import BroughtDraft, BroughtDrafter

LONGEST_PAUSE = 8
"""Tokens for which nothing is guessed after wrong guesses again and again."""
PATIENCE = 2
"""Wrong first guesses in a row, after which there is a pause."""
OWN_MEMORY = 0.9
COMMON_MEMORY = 0.99


@dataclass(slots=True)
class _Progress:
    """How one request's guesses fare.

    guesses     how the request may go on after its first `num_told` output tokens
    num_misses  tokens in a row that the first guess got wrong
    pause       tokens that are not guessed
    """

    draft: Draft
    acceptance: Acceptance
    guesses: Guesses = NO_GUESSES
    num_told: int = 0
    num_misses: int = 0
    pause: int = 0

    def learn(self, token_ids: Sequence[int]) -> None:
        """These tokens followed those that the draft was told."""
        self.pause = max(self.pause - len(token_ids), 0)
        if self.guesses.token_ids and token_ids:
            self.acceptance.learn(self.guesses, token_ids)
            is_right = token_ids[0] == self.guesses.token_ids[0]
            self.num_misses = 0 if is_right else self.num_misses + 1
            if self.num_misses > PATIENCE:
                self.pause = min(1 << (self.num_misses - PATIENCE), LONGEST_PAUSE)
        self.guesses = NO_GUESSES


@dataclass(frozen=True, slots=True)
class Wanted:
    """Guesses that a rank shall make: as ScheduledTokens.num_guesses and guesses_end."""

    num_guesses: int = 0
    guesses_end: int = 0


NOTHING_WANTED = Wanted()


class Speculation:
    """Drafts of all requests of an engine.

    total  how the drafts of all requests together have fared
    """

    def __init__(
        self,
        drafter: Drafter | None,
        ledger: Ledger,
        *,
        most_drafts: int,
        most_step_tokens: int,
        clock: Clock,
        costs: StepCosts | None = None,
    ) -> None:
        """drafter      None: the ranks guess, with a draft model
        most_drafts  of one request in one step
        most_step_tokens  new tokens of a step that has drafts
        costs        what steps cost; None: every request always gets as many drafts as it may"""
        self._drafter = BroughtDrafter() if drafter is None else drafter
        self._asks_ranks = drafter is None
        self._depth = None if costs is None else DraftDepth(costs)
        self._ledger = ledger
        self._most_drafts = most_drafts
        self._most_step_tokens = most_step_tokens
        self._clock = clock
        self._costs = costs
        self._acceptance = Acceptance(memory=COMMON_MEMORY)
        self._progress: dict[str, _Progress] = {}
        self._num_unsettled = 0
        self._is_worth_waiting = True
        self._timed: dict[int, _Timed] = {}
        self._asked_for: dict[int, list[int]] = {}
        self._began_s = self._ended_s = 0.0
        self.total = Speculated()

    @property
    def waits(self) -> bool:
        """Whether the next step should only be planned once all tokens so far are known: for steps
        with drafts, which would otherwise split the requests into two groups, and where the last
        step has shown that drafts would help."""
        return self._num_unsettled > 0 or self._is_worth_waiting

    def drafts(
        self, shares: Sequence[tuple[RequestState, int]], token_budget: int
    ) -> dict[str, Sequence[int]]:
        """Request id -> drafts that follow its one new token, for the requests that decode.

        The pages of these drafts are reserved; no request loses pages for that.

        shares        (request, its new tokens) of the step
        token_budget  new tokens of the step at most
        """
        self._began_s = self._clock.now_s()
        num_tokens = sum(num_new for _, num_new in shares)
        spare = min(self._most_step_tokens, token_budget) - num_tokens
        decoding = [
            (state, guesses)
            for state, num_new in shares
            if num_new == state.num_missing_tokens
            and state.output_ids
            and num_new <= self._most_drafts + 1
            for guesses in [self._guesses(state)]
            if guesses.token_ids
        ]
        if spare <= 0 or not decoding:
            self._is_worth_waiting = False
            return {}
        chosen = self._choose(decoding, spare, len(shares), num_tokens)
        self._is_worth_waiting = any(chosen)
        if any(state.num_pending_outputs for state, _ in decoding):
            return {}
        num_new_of = {state.request_id: num_new for state, num_new in shares}
        found = {
            state.request_id: guesses.token_ids[:count]
            for (state, guesses), count in zip(decoding, chosen, strict=True)
            if self._reserves(state, num_new_of[state.request_id], count)
        }
        self._num_unsettled += len(found)
        return found

    def guesses_wanted(
        self, shares: Sequence[tuple[RequestState, int]], drafts: Mapping[str, Sequence[int]]
    ) -> dict[str, Wanted]:
        """Request id -> what a rank with a draft model shall guess after this step, for the step
        that follows. The pages for that are reserved; no request loses pages.

        shares  (request, its new tokens) of the step
        drafts  of the step, as `drafts` has found them
        """
        if not self._asks_ranks or len(shares) > self._most_step_tokens // 2:
            return {}
        rooms: list[tuple[RequestState, int, int]] = []
        for state, num_new in shares:
            is_last = num_new == state.num_missing_tokens and not state.num_pending_outputs
            # Of the tokens after the sampled one, none beyond the last that may be put out.
            room = min(state.num_outstanding - 1, state.most_drafts)
            is_paused = self._depth is not None and self._progress_of(state).pause > 0
            if is_last and room > 1 and not state.input_embeds and not is_paused:
                rooms.append((state, num_new, room))
        most = self._most_drafts
        if self._depth is not None:
            survivals = [
                self._progress_of(state).acceptance.survivals(
                    Guesses(token_ids=[0] * count, kinds=[0] * count)
                )
                for state, _, room in rooms
                for count in [min(most, room - 1)]
            ]
            most = self._depth.best(survivals, len(shares))
        found = {
            state.request_id: Wanted(min(most, room - 1), state.num_tokens + room)
            for state, num_new, room in rooms
            if most and self._reserves_guesses(state, num_new, drafts, most, room)
        }
        self._is_worth_waiting = self._is_worth_waiting or bool(found)
        return found

    def bring(self, state: RequestState, guesses: Sequence[int]) -> None:
        """A rank has guessed how the request goes on after all its output tokens."""
        if not guesses:
            return
        progress = self._progress_of(state)
        progress.draft.extend(state.output_ids[progress.num_told :])
        progress.num_told = len(state.output_ids)
        if isinstance(progress.draft, BroughtDraft):
            progress.draft.bring(guesses)

    def begin_step(self, plan: StepPlan) -> None:
        """The step begins for which `drafts` was asked last."""
        scheduled = plan.scheduled
        if self._costs is None or any(
            not entry.num_output or len(entry.token_ids) > self._most_drafts + 1
            for entry in scheduled
        ):
            return
        asked_for = [entry.num_guesses for entry in scheduled if entry.num_guesses]
        if asked_for:
            self._asked_for[plan.step] = asked_for
        num_tokens = sum(entry.num_new for entry in scheduled)
        self._timed[plan.step] = _Timed(len(scheduled), num_tokens, self._began_s)

    def end_step(self, step: int, drafting_s: float = 0.0) -> None:
        """The result of the step is there; a draft model took so many seconds of it."""
        now_s = self._clock.now_s()
        asked_for = self._asked_for.pop(step, [])
        if asked_for and self._depth is not None:
            self._depth.observe(len(asked_for), max(asked_for), drafting_s)
        timed = self._timed.pop(step, None)
        if timed is not None and self._costs is not None and timed.num_requests:
            # A step that was planned while another one ran began when that one ended.
            seconds = now_s - max(timed.began_s, self._ended_s) - drafting_s
            self._costs.observe(timed.num_requests, timed.num_tokens, seconds)
        self._ended_s = now_s

    def settle(
        self,
        state: RequestState,
        entry: ScheduledTokens,
        token_ids: Sequence[int],
        *,
        is_same_run: bool,
    ) -> None:
        """A step has brought these tokens. Of its tokens, the request has computed those that it
        had, and the drafts that were right; none if its state cannot leave out the wrong ones, and
        has to go back.

        is_same_run  whether the request still runs, and was not retracted meanwhile
        """
        num_drafts = len(entry.draft_ids)
        num_accepted = max(len(token_ids) - 1, 0)
        self.total = self.total.after(num_drafts, num_accepted)
        state.speculated = (state.speculated or Speculated()).after(num_drafts, num_accepted)
        if num_drafts:
            self._num_unsettled -= 1
        progress = self._progress.get(state.request_id)
        if progress is not None and progress.num_told == len(state.output_ids):
            progress.learn(token_ids)
        if not is_same_run or not num_drafts:
            return
        assert state.lease is not None, "a running request has a lease"
        if state.lease.state is None or num_accepted == num_drafts:
            state.num_computed_tokens += num_accepted
        else:
            state.num_computed_tokens = entry.position
        self._ledger.end_trial(state.lease, succeeded=num_accepted == num_drafts)

    def forget(self, state: RequestState) -> None:
        """The request has ended."""
        progress = self._progress.pop(state.request_id, None)
        if progress is not None:
            progress.draft.extend(state.output_ids[progress.num_told :])
            progress.draft.close()

    def _guesses(self, state: RequestState) -> Guesses:
        """How the request may go on after its known tokens."""
        # Beyond the last token that the request may put out no draft can be right.
        most = min(self._most_drafts, state.num_outstanding - 1, state.most_drafts)
        # Nor may a step with drafts, which may have to be taken back, leave a state to keep.
        end = state.num_tokens
        start = state.num_computed_tokens
        most = min(most, self._ledger.needs.before_state(start, end + most) - end)
        # Vectors in the place of tokens cannot be searched.
        if most <= 0 or state.input_embeds or state.max_new_tokens == 0:
            return NO_GUESSES
        progress = self._progress_of(state)
        progress.draft.extend(state.output_ids[progress.num_told :])
        progress.num_told = len(state.output_ids)
        if progress.pause and self._costs is not None:
            progress.guesses = NO_GUESSES
        else:
            progress.guesses = progress.draft.propose(most)
        return progress.guesses

    def _progress_of(self, state: RequestState) -> _Progress:
        progress = self._progress.get(state.request_id)
        if progress is None:
            progress = self._progress[state.request_id] = _Progress(
                self._drafter.begin(state.text_namespace, state.prompt_ids),
                Acceptance(memory=OWN_MEMORY, prior=self._acceptance),
            )
        return progress

    def _choose(
        self,
        decoding: Sequence[tuple[RequestState, Guesses]],
        spare: int,
        num_requests: int,
        num_tokens: int,
    ) -> list[int]:
        """How many guesses of each request to verify."""
        if self._costs is None:
            return shared_out([len(guesses.token_ids) for _, guesses in decoding], spare)
        survivals = [
            self._progress[state.request_id].acceptance.survivals(guesses)
            for state, guesses in decoding
        ]
        most = min(spare, sum(map(len, survivals)))
        costs = self._costs.by_tokens(num_requests, num_tokens, num_tokens + most)
        return best_guesses(survivals, costs, num_requests)

    def _reserves(self, state: RequestState, num_new: int, num_drafts: int) -> bool:
        """Make room for the drafts of a request; False if it has no drafts, or gets none."""
        assert state.lease is not None, "a scheduled request has a lease"
        start = state.num_computed_tokens
        return (
            num_drafts > 0
            and self._ledger.reserve(state.lease, start + num_new + num_drafts, start)
            and self._ledger.begin_trial(state.lease)
        )

    def _reserves_guesses(
        self,
        state: RequestState,
        num_new: int,
        drafts: Mapping[str, Sequence[int]],
        most: int,
        room: int,
    ) -> bool:
        """Make room for what a draft model computes in order to guess so many tokens."""
        assert state.lease is not None, "a scheduled request has a lease"
        start = state.num_computed_tokens
        verified = drafts.get(state.request_id, ())
        end = min(start + num_new + len(verified) + most, state.num_tokens + room)
        return self._ledger.reserve(state.lease, end, start)


@dataclass(frozen=True, slots=True)
class _Timed:
    num_requests: int
    num_tokens: int
    began_s: float
