"""Decides which requests of a step get drafts, and how many.

A draft costs a row of the step's matrix products whether it is right or not. So a step with drafts
has few new tokens, beyond which more tokens cost about as much as more steps; and each request gets
fewer drafts after some were wrong, and more after all were right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sapwood.engine.request_state import RequestState
from sapwood.memory.ledger import Ledger
from sapwood.schema.output import Speculated
from sapwood.speculative.interface import Draft, Drafter
from sapwood.speculative.ranks import BroughtDraft

LONGEST_PAUSE = 32
"""Steps without drafts after drafts of a request were wrong again and again."""


@dataclass(slots=True)
class _Progress:
    """How one request's drafts have fared.

    most        drafts of the next step at most
    num_told    output tokens that the draft knows
    num_misses  steps in a row of which no draft was right
    pause       steps that get no drafts
    """

    draft: Draft
    most: int
    num_told: int = 0
    num_misses: int = 0
    pause: int = 0

    def tell(self, output_ids: Sequence[int]) -> None:
        """Let the draft know all output tokens."""
        self.draft.extend(output_ids[self.num_told :])
        self.num_told = len(output_ids)

    def learn(self, num_drafts: int, num_accepted: int, most_drafts: int) -> None:
        """Choose the next number of drafts, after that many of the last ones were right."""
        if num_accepted == num_drafts:
            self.most = min(2 * self.most, most_drafts)
        else:
            self.most = max(num_accepted + 1, self.most // 2)
        self.num_misses = 0 if num_accepted else self.num_misses + 1
        if self.num_misses > 1:
            self.pause = min(2**self.num_misses, LONGEST_PAUSE)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Guesses that a rank shall make: as ScheduledTokens.num_guesses and guesses_end."""

    num_guesses: int = 0
    guesses_end: int = 0


NOTHING_WANTED = Wanted()


class Speculation:
    """Drafts of all requests of an engine.

    total  how the guesses for all requests together have fared
    """

    def __init__(
        self, drafter: Drafter | None, ledger: Ledger, *, most_drafts: int, most_step_tokens: int
    ) -> None:
        """drafter  None: the ranks guess, with a draft model
        most_drafts  of one request in one step
        most_step_tokens  new tokens of a step that has drafts"""
        self._drafter = drafter
        self._ledger = ledger
        self._most_drafts = most_drafts
        self._most_step_tokens = most_step_tokens
        self._progress: dict[str, _Progress] = {}
        self._num_unsettled = 0
        self.total = Speculated()

    def waits(self, num_running: int) -> bool:
        """Whether the next step should only be planned once all tokens so far are known: for steps
        with drafts, which would otherwise split the requests into two groups, and where drafts may
        help."""
        return self._num_unsettled > 0 or num_running <= self._most_step_tokens // 2

    def drafts(
        self, shares: Sequence[tuple[RequestState, int]], token_budget: int
    ) -> dict[str, list[int]]:
        """Request id -> drafts that follow its one new token, for the requests that decode.

        The pages of these drafts are reserved; no request loses pages for that.

        shares        (request, its new tokens) of the step
        token_budget  new tokens of the step at most
        """
        spare = min(self._most_step_tokens, token_budget) - sum(num_new for _, num_new in shares)
        decoding = [
            state
            for state, num_new in shares
            if num_new == 1 and not state.num_pending_outputs and state.num_missing_tokens == 1
        ]
        found: dict[str, list[int]] = {}
        for index, state in enumerate(decoding):
            if spare <= 0:
                break
            # Each request's part of what is left, rounded up.
            drafts = self._propose(state, -(-spare // (len(decoding) - index)))
            if drafts:
                found[state.request_id] = drafts
                self._num_unsettled += 1
                spare -= len(drafts)
        return found

    def guesses_wanted(
        self, shares: Sequence[tuple[RequestState, int]], drafts: Mapping[str, Sequence[int]]
    ) -> dict[str, Wanted]:
        """Request id -> what a rank with a draft model shall guess after this step, for the step
        that follows. The pages for that are reserved; no request loses pages.

        shares  (request, its new tokens) of the step
        drafts  of the step, as `drafts` has found them
        """
        if self._drafter is not None or len(shares) > self._most_step_tokens // 2:
            return {}
        found: dict[str, Wanted] = {}
        for state, num_new in shares:
            is_last = num_new == state.num_missing_tokens and not state.num_pending_outputs
            # Of the tokens after the sampled one, none beyond the last that may be put out.
            room = min(state.num_outstanding - 1, state.most_drafts)
            progress = self._progress_of(state)
            if not is_last or state.input_embeds or room < 1 or progress.pause:
                continue
            most = min(progress.most, room - 1)
            start = state.num_computed_tokens
            end = start + num_new + len(drafts.get(state.request_id, ())) + most
            end = min(end, state.num_tokens + room)
            assert state.lease is not None, "a scheduled request has a lease"
            if most > 0 and self._ledger.reserve(state.lease, end, start):
                found[state.request_id] = Wanted(most, state.num_tokens + room)
        return found

    def bring(self, state: RequestState, guesses: Sequence[int]) -> None:
        """A rank has guessed how the request goes on after all its output tokens."""
        if not guesses:
            return
        progress = self._progress_of(state)
        progress.tell(state.output_ids)
        if isinstance(progress.draft, BroughtDraft):
            progress.draft.bring(guesses)

    def settle(self, state: RequestState, num_drafts: int, token_ids: Sequence[int]) -> int:
        """A step has brought these tokens, after that many drafts. Returns how many were right."""
        num_accepted = max(len(token_ids) - 1, 0)
        self.total = self.total.after(num_drafts, num_accepted)
        state.speculated = (state.speculated or Speculated()).after(num_drafts, num_accepted)
        if num_drafts:
            self._num_unsettled -= 1
            progress = self._progress.get(state.request_id)
            if progress is not None:
                progress.learn(num_drafts, num_accepted, self._most_drafts)
        return num_accepted

    def forget(self, state: RequestState) -> None:
        """The request has ended."""
        self._progress.pop(state.request_id, None)

    def _propose(self, state: RequestState, most: int) -> list[int]:
        # Beyond the last token that the request may put out no draft can be right.
        most = min(most, state.num_outstanding - 1, state.most_drafts)
        # Vectors in the place of tokens cannot be searched.
        if most <= 0 or state.input_embeds or state.max_new_tokens == 0:
            return []
        progress = self._progress_of(state)
        if progress.pause:
            progress.pause -= 1
            return []
        progress.tell(state.output_ids)
        drafts = progress.draft.propose(min(most, progress.most))
        start = state.num_computed_tokens
        assert state.lease is not None, "a scheduled request has a lease"
        if drafts and not self._ledger.reserve(state.lease, start + 1 + len(drafts), start):
            return []
        return drafts

    def _progress_of(self, state: RequestState) -> _Progress:
        progress = self._progress.get(state.request_id)
        if progress is None:
            drafter = self._drafter
            draft = BroughtDraft() if drafter is None else drafter.begin(state.prompt_ids)
            progress = _Progress(draft, self._most_drafts)
            self._progress[state.request_id] = progress
        return progress
