"""What the scheduler says about a request: to the ranks, and to whoever asked."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from sapwood.engine.request_state import RequestState
from sapwood.engine.speculation import NOTHING_WANTED, Wanted
from sapwood.schema.logprobs import TokenLogprobs
from sapwood.schema.output import Finish, RequestOutput
from sapwood.schema.step import ScheduledTokens, StepResult
from sapwood.speculative.interface import NO_GUESSES, Guesses


def scheduled_tokens(
    state: RequestState,
    num_new: int,
    drafts: Guesses = NO_GUESSES,
    wanted: Wanted = NOTHING_WANTED,
    *,
    follows: bool = False,
) -> ScheduledTokens:
    """The next `num_new` tokens of a running request and drafts of the tokens that follow, and what
    has changed in its lease.

    wanted   guesses that the rank shall make for the next step
    follows  as ScheduledTokens.follows"""
    lease = state.lease
    assert lease is not None, "a scheduled request has a lease"
    first_page, pages = lease.take_changes()
    reaches_end = state.num_computed_tokens + num_new == state.num_tokens
    samples = reaches_end and state.max_new_tokens > 0
    first_scored, num_scored = state.scored_among(num_new)
    num_computed = num_new + len(drafts.token_ids)
    entry = ScheduledTokens(
        row=state.row,
        position=state.num_computed_tokens,
        token_ids=state.new_token_ids(num_new),
        draft_ids=list(drafts.token_ids),
        draft_parents=list(drafts.parents),
        follows=follows,
        num_guesses=wanted.num_guesses,
        guesses_end=wanted.guesses_end,
        first_page=first_page,
        pages=pages,
        num_output=state.num_outputs if samples else None,
        first_scored=first_scored,
        num_scored=num_scored,
        num_hidden=state.num_told_among(state.hidden_states, num_computed),
        num_routed=state.num_told_among(state.routed_experts, num_computed),
        answers=reaches_end and state.options.embed is not None,
    )
    if not lease.windows and lease.state is None:
        return entry
    return replace(
        entry,
        windows=[window.take_changes() for window in lease.windows],
        slot=-1 if lease.state is None else lease.state.planned_slot,
        copies=lease.take_copies(),
    )


def take_extras(
    state: RequestState,
    entry: ScheduledTokens,
    result: StepResult,
    index: int,
    new_ids: Sequence[int],
) -> TokenLogprobs | None:
    """Take what the entry of that index brought besides tokens.

    new_ids  the entry's output tokens: of those that it sampled, none after the request's end
    Returns  the log probabilities of these
    """
    for told, count, brought_by in (
        (state.hidden_states, entry.num_hidden, result.hidden_states),
        (state.routed_experts, entry.num_routed, result.routed_experts),
    ):
        if told is not None and count:
            # Nothing is told of a wrong draft, nor of a token after the end.
            num_wrong = 0 if entry.num_output is None else len(entry.draft_ids) + 1 - len(new_ids)
            parts = brought_by.get(index, [])
            told.take(entry.end - count, parts[: max(count - num_wrong, 0)])
    brought = result.logprobs.get(index) if result.logprobs else None
    if brought is None:
        return None
    if brought.prompt is not None:
        state.take_prompt_logprobs(entry.first_scored, brought.prompt)
    output = brought.output
    if output is None or len(output) <= len(new_ids):
        return output
    return output[: len(new_ids)] if new_ids else None


def request_output(
    state: RequestState,
    token_ids: list[int],
    logprobs: TokenLogprobs | None = None,
    *,
    values: bytes = b"",
) -> RequestOutput:
    """What is new of a request."""
    return RequestOutput(
        request_id=state.request_id,
        token_ids=token_ids,
        num_prompt_tokens=state.num_prompt_tokens,
        num_cached_tokens=state.num_cached_tokens or 0,
        tier_tokens=state.tier_tokens,
        queue_time_s=state.queue_time_s,
        logprobs=logprobs,
        prompt_logprobs=state.prompt_logprobs_to_tell(),
        hidden_states=[] if state.hidden_states is None else state.hidden_states.to_tell(),
        routed_experts=[] if state.routed_experts is None else state.routed_experts.to_tell(),
        values=values,
        speculated=state.speculated,
        finish=state.finish,
    )


def failed(message: str) -> Finish:
    """The request cannot go on because of its grammar, or of a logits processor that it brought."""
    return Finish(kind="error", message=message, status=400, error_type="BadRequestError")


def queue_is_full(message: str) -> Finish:
    """There is no place in the queue, or no longer."""
    return Finish(kind="error", message=message, status=503, error_type="ServiceUnavailableError")
