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
from sapwood.engine.request_state import Phase, RequestState
from sapwood.memory.ledger import Ledger
from sapwood.schema.draft_tree import TREE_TOKENS, path_of
from sapwood.schema.output import Speculated
from sapwood.schema.step import GuessedTokens, ScheduledTokens, StepPlan
from sapwood.speculative.acceptance import Acceptance
from sapwood.speculative.choice import best_guesses, shared_out
from sapwood.speculative.costs import StepCosts
from sapwood.speculative.depth import DraftDepth
from sapwood.speculative.interface import NO_GUESSES, Draft, Drafter, Guesses
from sapwood.speculative.ranks import BroughtDraft, BroughtDrafter, siblings

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
    num_misses  tokens in a row that no guess got right
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
            guesses = self.guesses
            is_right = bool(path_of(guesses.token_ids, guesses.parents, token_ids[:1]))
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
        context_length: int,
        clock: Clock,
        costs: StepCosts | None = None,
        most_nodes: int | None = None,
        breadth: int = 1,
        overlaps: bool = False,
    ) -> None:
        """drafter      None: the ranks guess, with a draft model
        most_drafts  of one request in one step, one after the other
        most_step_tokens  new tokens of a step that has drafts
        context_length  tokens for which a request can have pages
        most_nodes   of one request in one step, in a tree; None: as most_drafts
        breadth      guesses of a draft model that may follow the same token
        costs        what steps cost; None: every request always gets as many drafts as it may
        overlaps     whether a request may be planned again before anybody knows how many of its
                     drafts were right: the rank, which guesses, goes on where the request is
                     (ScheduledTokens.follows)"""
        assert not overlaps or (drafter is None and breadth == 1 and not ledger.keeps_states)
        self.overlaps = overlaps
        self._drafter = BroughtDrafter() if drafter is None else drafter
        self._asks_ranks = drafter is None
        self._most_nodes = most_drafts if most_nodes is None else most_nodes
        self._breadth = breadth
        self._context_length = context_length
        most_guesses = min(self._most_nodes, most_drafts * breadth)
        self._depth = (
            None
            if costs is None
            else DraftDepth(costs, breadth=-(-most_guesses // max(most_drafts, 1)))
        )
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
        return not self.overlaps and (self._num_unsettled > 0 or self._is_worth_waiting)

    def is_held_back(self, state: RequestState) -> bool:
        """Whether a running request has to wait for its steps in flight: since nobody knows yet
        whether it goes on, or since there is no memory for the farthest place that its next token
        may have. Reserves that memory."""
        if not state.unsettled:
            return False
        told = (state.hidden_states, state.routed_experts)
        # What is told of a token is found by its place.
        most = min(state.num_outstanding, state.most_drafts)
        if state.num_uncertain >= most or any(one is not None for one in told):
            return True
        assert state.lease is not None, "a running request has a lease"
        start = state.num_computed_tokens
        return not self._ledger.reserve(state.lease, start + state.num_uncertain + 1, start)

    def drafts(
        self, shares: Sequence[tuple[RequestState, int]], token_budget: int
    ) -> dict[str, Guesses]:
        """Request id -> drafts that follow its one new token, for the requests that decode; where
        the rank goes on by itself, anything in the place of the guesses that it will have.

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
            and (state.output_ids or state.unsettled)
            and (state.unsettled or not (self.overlaps and state.num_pending_outputs))
            and num_new <= self._most_drafts + 1
            for guesses in [self._guesses(state)]
            if guesses.token_ids
        ]
        if spare <= 0 or not decoding:
            self._is_worth_waiting = False
            return {}
        chosen = self._choose(decoding, spare, len(shares), num_tokens)
        self._is_worth_waiting = any(chosen)
        if any(state.num_pending_outputs and not state.unsettled for state, _ in decoding):
            return {}
        num_new_of = {state.request_id: num_new for state, num_new in shares}
        found: dict[str, Guesses] = {}
        for (state, guesses), nodes in zip(decoding, chosen, strict=True):
            num_new = num_new_of[state.request_id]
            if guesses.parents:
                # A tree's guesses have more places than positions.
                room = self._context_length - state.num_computed_tokens
                nodes = nodes[: min(room, TREE_TOKENS) - num_new]
            if self._reserves(state, num_new, len(nodes)):
                found[state.request_id] = guesses.only(nodes)
        self._num_unsettled += len(found)
        return found

    def guesses_wanted(
        self, shares: Sequence[tuple[RequestState, int]], drafts: Mapping[str, Guesses]
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
            may_guess = not state.num_pending_outputs or self.overlaps
            is_last = num_new == state.num_missing_tokens and may_guess
            # Of the tokens after the sampled one, none beyond the last that may be put out.
            room = min(state.num_outstanding - 1, state.most_drafts)
            is_paused = self._depth is not None and self._progress_of(state).pause > 0
            if is_last and room > 1 and not state.input_embeds and not is_paused:
                rooms.append((state, num_new, room))
        most = self._most_drafts
        if self._depth is not None:
            # How likely one of the guesses that follow a token is right.
            rates = [
                sum(self._progress_of(state).acceptance.survivals(siblings(self._breadth)))
                for state, _, _ in rooms
            ]
            survivals = [
                [rate**depth for depth in range(1, min(most, room - 1) + 1)]
                for rate, (_, _, room) in zip(rates, rooms, strict=True)
            ]
            most = self._depth.best(survivals, len(shares))
        found = {
            state.request_id: Wanted(min(most, room - 1), state.num_tokens + room)
            for state, num_new, room in rooms
            if most and self._reserves_guesses(state, num_new, drafts, most, room)
        }
        self._is_worth_waiting = self._is_worth_waiting or bool(found)
        return found

    def bring(self, state: RequestState, guessed: GuessedTokens | None) -> None:
        """A rank may have guessed how the request goes on after all its output tokens."""
        if guessed is None or not guessed.token_ids:
            return
        progress = self._progress_of(state)
        progress.draft.extend(state.output_ids[progress.num_told :])
        progress.num_told = len(state.output_ids)
        if isinstance(progress.draft, BroughtDraft):
            progress.draft.bring(guessed)

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
        if num_drafts:
            self._num_unsettled -= 1
        if num_drafts or entry.num_guesses:
            state.unsettled.pop(0)
        if entry.follows and state.phase is Phase.FINISHED:
            return
        self.total = self.total.after(num_drafts, num_accepted)
        state.speculated = (state.speculated or Speculated()).after(num_drafts, num_accepted)
        if entry.follows:
            # The step verified what the one before it has brought.
            self._known_guesses(state)
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
        """How the request may go on after its tokens; where only the rank will know, anything."""
        if not state.unsettled:
            return self._known_guesses(state)
        most = min(state.num_outstanding - 1, state.most_drafts) - state.num_uncertain
        most = min(state.unsettled[-1].num_guesses, most)
        return Guesses(token_ids=[0] * most, kinds=[0] * most)

    def _known_guesses(self, state: RequestState) -> Guesses:
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
    ) -> list[list[int]]:
        """Which guesses of each request to verify."""
        survivals = [
            self._progress_of(state).acceptance.survivals(guesses) for state, guesses in decoding
        ]
        if self._costs is None:
            return shared_out(survivals, spare, most_each=self._most_nodes)
        most = min(spare, sum(map(len, survivals)))
        costs = self._costs.by_tokens(num_requests, num_tokens, num_tokens + most)
        return best_guesses(survivals, costs, num_requests, most_each=self._most_nodes)

    def _reserves(self, state: RequestState, num_new: int, num_drafts: int) -> bool:
        """Make room for the drafts of a request; False if it has no drafts, or gets none."""
        assert state.lease is not None, "a scheduled request has a lease"
        start = state.num_computed_tokens
        end = start + state.num_uncertain + num_new + num_drafts
        return (
            num_drafts > 0
            and self._ledger.reserve(state.lease, end, start)
            and self._ledger.begin_trial(state.lease)
        )

    def _reserves_guesses(
        self,
        state: RequestState,
        num_new: int,
        drafts: Mapping[str, Guesses],
        most: int,
        room: int,
    ) -> bool:
        """Make room for what a draft model computes in order to guess so many tokens."""
        assert state.lease is not None, "a scheduled request has a lease"
        start = state.num_computed_tokens
        verified = drafts.get(state.request_id, NO_GUESSES)
        end = start + state.num_uncertain + num_new + len(verified.token_ids)
        end += 1 + self._breadth * (most - 1)
        if self._breadth == 1:
            end = min(end, state.num_tokens + room)
        return end <= self._context_length and self._ledger.reserve(state.lease, end, start)


@dataclass(frozen=True, slots=True)
class _Timed:
    num_requests: int
    num_tokens: int
    began_s: float
