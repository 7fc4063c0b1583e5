"""What the scheduler knows of requests that another engine has a part in."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from sapwood.engine.arrivals import Arrivals
from sapwood.engine.departures import Departures
from sapwood.engine.request_state import RequestState
from sapwood.schema.output import Finish, HandoverCounts, RequestOutput
from sapwood.schema.request import Generate

NO_PART = (
    "this engine reads prompts and answers them itself, so the request's bootstrap_room has no "
    "meaning here; start engines with --disaggregation-mode prefill and decode, or leave it out"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Handovers:
    """Requests without a room are none of its business: an engine with a part reads and answers
    them itself.

    num_reserved_tokens  kept free for each running request when another one begins, at least
    departures  set in an engine that reads prompts for others
    arrivals    set in an engine whose prompts others read
    """

    num_reserved_tokens: int = 0
    departures: Departures | None = None
    arrivals: Arrivals | None = None

    def why_refused(self, request: Generate) -> str | None:
        if request.options.handover is None:
            return None
        part = self.departures or self.arrivals
        return (NO_PART if part is None else part.why_refused(request)) or None

    def own_part(self, request: Generate) -> Generate:
        """What this engine has to tell about: the prompt's log probabilities are told where it is
        read."""
        options, arrivals = request.options, self.arrivals
        if arrivals is None or options.logprobs is None or not arrivals.has_place(options.handover):
            return request
        logprobs = msgspec.structs.replace(options.logprobs, prompt_start=None)
        return msgspec.structs.replace(
            request, options=msgspec.structs.replace(options, logprobs=logprobs)
        )

    def arrive(self, state: RequestState) -> None:
        """The request has been taken in."""
        if self.departures is not None:
            self.departures.arrive(state)

    def computed(self, state: RequestState, end: int) -> None:
        """As `Departures.computed`."""
        if self.departures is not None and state.options.handover is not None:
            self.departures.computed(state, end)

    def holds_back(self, state: RequestState, answer: RequestOutput) -> bool:
        """As `Departures.holds_back`."""
        return self.departures is not None and self.departures.holds_back(state, answer)

    def leave(self, state: RequestState) -> None:
        """The request was ended."""
        if self.departures is not None:
            self.departures.leave(state)

    def abort(self, request_id: str) -> RequestOutput | None:
        """As `Departures.abort`."""
        return None if self.departures is None else self.departures.abort(request_id)

    def poll(self) -> None:
        """To be called once per turn."""
        if self.departures is not None:
            self.departures.poll()

    def take_ended(self) -> list[RequestOutput]:
        """Of requests that only waited for another engine."""
        return [] if self.departures is None else self.departures.take_ended()

    def take_failed(self) -> list[tuple[str, Finish]]:
        """(id, why) of open requests that cannot go on."""
        part = self.departures or self.arrivals
        return [] if part is None else part.take_failed()

    def weights_changed(self) -> None:
        """Prompts that are read from now on are not those that the weights before would read."""
        part = self.departures or self.arrivals
        if part is not None:
            part.digests.num_updates += 1

    @property
    def is_busy(self) -> bool:
        """Whether to look again soon."""
        part = self.departures or self.arrivals
        return part is not None and part.is_busy

    @property
    def num_held(self) -> int:
        """Requests that the scheduler has ended, but whose answers wait for another engine."""
        return 0 if self.departures is None else self.departures.num_held

    @property
    def counts(self) -> HandoverCounts | None:
        """None: the engine has no part."""
        if self.departures is not None:
            return self.departures.counts
        return None if self.arrivals is None else self.arrivals.counts


NO_HANDOVERS = Handovers()
"""Those of an engine that has no part."""
