"""Goes on with requests of which the engine does not know yet how far they have come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from sapwood.schema.step import GuessedTokens, ScheduledTokens, StepPlan


@dataclass(frozen=True, slots=True)
class _End:
    """Where a row's last step has left its request.

    num_known  tokens of the request
    token_id   the last of them, which no step has computed
    guess_ids  of those that follow
    """

    num_known: int
    token_id: int
    guess_ids: Sequence[int]


class OpenEnds:
    """Knows where the rows' last steps have ended, and so where spans begin that follow them."""

    def __init__(self) -> None:
        self._ends: dict[int, _End] = {}

    def note(
        self,
        plan: StepPlan,
        token_ids: Sequence[Sequence[int]],
        guesses: Mapping[int, GuessedTokens],
    ) -> None:
        """A step has brought these tokens and guesses; as in StepResult."""
        brought = iter(token_ids)
        for index, entry in enumerate(plan.scheduled):
            if entry.num_output is None:
                continue
            found = next(brought)
            num_known = entry.end - len(entry.draft_ids) + len(found)
            guessed = guesses[index].token_ids if index in guesses else []
            # A request that has failed brings no token, and ends.
            self._ends[entry.row] = _End(num_known, found[-1] if found else 0, guessed)

    def followed(self, plan: StepPlan) -> StepPlan:
        """The plan with the places, tokens and drafts of entries that follow."""
        if not any(entry.follows for entry in plan.scheduled):
            return plan
        return replace(plan, scheduled=[self._placed(entry) for entry in plan.scheduled])

    def _placed(self, entry: ScheduledTokens) -> ScheduledTokens:
        if not entry.follows:
            return entry
        end = self._ends[entry.row]
        # A failed request may have come less far than planned; it must write to no other place.
        num_more = max(end.num_known - 1 - entry.position, 0)
        # A span is as long as planned: what lacks is filled up with any token.
        num_drafts = len(entry.draft_ids)
        draft_ids = [*end.guess_ids[:num_drafts], *[0] * (num_drafts - len(end.guess_ids))]
        return replace(
            entry,
            position=entry.position + num_more,
            token_ids=[end.token_id],
            draft_ids=draft_ids,
            num_output=None if entry.num_output is None else entry.num_output + num_more,
        )
