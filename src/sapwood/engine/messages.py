"""What the scheduler says about a request: to the ranks, and to whoever asked."""

from __future__ import annotations

from msgspec.structs import replace

from sapwood.engine.request_state import RequestState
from sapwood.schema.logprobs import TokenLogprobs
from sapwood.schema.output import Finish, RequestOutput
from sapwood.schema.step import ScheduledTokens


def scheduled_tokens(state: RequestState, num_new: int) -> ScheduledTokens:
    """The next `num_new` tokens of a running request, and what has changed in its lease."""
    lease = state.lease
    assert lease is not None, "a scheduled request has a lease"
    first_page, pages = lease.take_changes()
    reaches_end = state.num_computed_tokens + num_new == state.num_tokens
    samples = reaches_end and state.max_new_tokens > 0
    first_scored, num_scored = state.scored_among(num_new)
    entry = ScheduledTokens(
        row=state.row,
        position=state.num_computed_tokens,
        token_ids=state.new_token_ids(num_new),
        first_page=first_page,
        pages=pages,
        num_output=state.num_outputs if samples else None,
        first_scored=first_scored,
        num_scored=num_scored,
        num_hidden=state.num_hidden_among(num_new),
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
        queue_time_s=state.queue_time_s,
        logprobs=logprobs,
        prompt_logprobs=state.prompt_logprobs_to_tell(),
        hidden_states=state.hidden_states_to_tell(),
        values=values,
        finish=state.finish,
    )


def failed(message: str) -> Finish:
    """The request cannot go on because of its grammar, or of a logits processor that it brought."""
    return Finish(kind="error", message=message, status=400, error_type="BadRequestError")


def queue_is_full(message: str) -> Finish:
    """There is no place in the queue, or no longer."""
    return Finish(kind="error", message=message, status=503, error_type="ServiceUnavailableError")
