"""Decides which requests of a step get drafts, and how many.

A draft costs a row of the step's matrix products whether it is right or not. So a step with drafts
has few new tokens, beyond which more tokens cost about as much as more steps; and each request gets
fewer drafts after some were wrong, and more after all were right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sapwood.engine.request_state import RequestState
from sapwood.memory.ledger import Ledger
from sapwood.schema.output import Speculated
from sapwood.speculative.interface import Draft, Drafter

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

    def learn(self, num_drafts: int, num_accepted: int, most_drafts: int) -> None:
        """Choose the next number of drafts, after that many of the last ones were right."""
        if num_accepted == num_drafts:
            self.most = min(2 * self.most, most_drafts)
        else:
            self.most = max(num_accepted + 1, self.most // 2)
        self.num_misses = 0 if num_accepted else self.num_misses + 1
        if self.num_misses > 1:
            self.pause = min(2**self.num_misses, LONGEST_PAUSE)


class Speculation:
    """Drafts of all requests of an engine.

    total  how the guesses for all requests together have fared
    """

    def __init__(
        self, drafter: Drafter, ledger: Ledger, *, most_drafts: int, most_step_tokens: int
    ) -> None:
        """most_drafts  of one request in one step
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
        progress = self._progress.get(state.request_id)
        if progress is None:
            progress = _Progress(self._drafter.begin(state.prompt_ids), self._most_drafts)
            self._progress[state.request_id] = progress
        if progress.pause:
            progress.pause -= 1
            return []
        progress.draft.extend(state.output_ids[progress.num_told :])
        progress.num_told = len(state.output_ids)
        drafts = progress.draft.propose(min(most, progress.most))
        start = state.num_computed_tokens
        assert state.lease is not None, "a scheduled request has a lease"
        if drafts and not self._ledger.reserve(state.lease, start + 1 + len(drafts), start):
            return []
        return drafts
