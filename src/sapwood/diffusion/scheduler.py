"""Which pictures take part in the next turn: a piece of preparing, a step, a piece of decoding.

The unit of scheduling is the step, not the picture. Trajectories join after any step and leave
after any step; those of one step may be at different timesteps. What a turn costs is bounded: by
a budget of tokens for the step, and by one piece (a text to encode, a tile to decode) for each of
the stages around it, so that a large picture holds up others by no more than one turn.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from sapwood.base.clock import Clock
from sapwood.schema.painting import Paint, PaintFailed

MAX_PRIORITY = 100
"""Priorities are -100 to 100: so the most urgent request holds up the least urgent one for a
bounded number of turns."""


class Phase(Enum):
    WAITING = "waiting"
    PREPARING = "preparing"
    DENOISING = "denoising"
    DECODING = "decoding"
    FINISHED = "finished"


_NEXT = {
    Phase.WAITING: {Phase.PREPARING, Phase.FINISHED},
    Phase.PREPARING: {Phase.DENOISING, Phase.FINISHED},
    Phase.DENOISING: {Phase.DECODING, Phase.FINISHED},
    Phase.DECODING: {Phase.FINISHED},
    Phase.FINISHED: set(),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PaintingLimits:
    """What bounds the memory and the length of a turn.

    max_running      pictures that have latents at once
    max_waiting      pictures that wait for that
    max_step_tokens  tokens of all rows of a step; a picture that has more goes alone
    aging_turns      turns without being served after which a picture counts as one priority higher
    """

    max_running: int = 16
    max_waiting: int = 256
    max_step_tokens: int = 16384
    aging_turns: int = 8

    def __post_init__(self) -> None:
        for name in ("max_running", "max_waiting", "max_step_tokens", "aging_turns"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")


@dataclass(slots=True, kw_only=True, eq=False)
class PictureState:
    """One picture as the scheduler sees it.

    order        number of its arrival
    deadline_s   when it must be there; infinite: whenever
    num_tokens   of all its rows in a step; known once it is prepared
    served_turn  the turn in which it was served last, or arrived
    started_s    when its first step began; None: it has not
    """

    request: Paint
    order: int
    arrived_s: float
    deadline_s: float
    served_turn: int
    num_tokens: int = 0
    phase: Phase = Phase.WAITING
    started_s: float | None = None

    @property
    def request_id(self) -> str:
        return self.request.request_id

    def move_to(self, phase: Phase) -> None:
        if phase not in _NEXT[self.phase]:
            raise RuntimeError(f"{self.request_id}: {self.phase.value} -> {phase.value}")
        self.phase = phase


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What is to be done next, by request id; prepare and decode are one piece each."""

    prepare: str | None
    step: tuple[str, ...]
    decode: str | None

    @property
    def is_empty(self) -> bool:
        return not self.step and self.prepare is None and self.decode is None


def by_urgency(
    pictures: Iterable[PictureState], *, turn: int, aging_turns: int
) -> list[PictureState]:
    """The most urgent first: by priority, which grows while a picture is not served; then by
    deadline; then the one that was served longest ago; then by arrival."""

    def key(picture: PictureState) -> tuple[float, float, int, int]:
        aged = (turn - picture.served_turn) // aging_turns
        return (
            -(picture.request.priority + aged),
            picture.deadline_s,
            picture.served_turn,
            picture.order,
        )

    return sorted(pictures, key=key)


def within_budget(pictures: Sequence[PictureState], max_tokens: int) -> list[PictureState]:
    """The first picture, whatever its size, and all after it that still fit."""
    chosen: list[PictureState] = []
    num_tokens = 0
    for picture in pictures:
        if not chosen or num_tokens + picture.num_tokens <= max_tokens:
            chosen.append(picture)
            num_tokens += picture.num_tokens
    return chosen


class StepScheduler:
    """Owns the state of every open picture; each leaves by `finish` and no other way."""

    def __init__(self, limits: PaintingLimits, clock: Clock) -> None:
        self._limits = limits
        self._clock = clock
        self._open: dict[str, PictureState] = {}
        self._num_arrived = 0
        self._turn = 0
        self._closed_from: deque[int] = deque()

    @property
    def open_ids(self) -> list[str]:
        return list(self._open)

    @property
    def has_work(self) -> bool:
        return bool(self._open)

    def count(self, phase: Phase) -> int:
        return sum(picture.phase is phase for picture in self._open.values())

    def state(self, request_id: str) -> PictureState:
        return self._open[request_id]

    def add(self, request: Paint) -> PaintFailed | None:
        """Take a request in; the refusal, if there is no room or the id is open already."""
        if request.request_id in self._open:
            return refused(request.request_id, f"a request {request.request_id} is open already")
        if not -MAX_PRIORITY <= request.priority <= MAX_PRIORITY:
            return refused(
                request.request_id,
                f"priority must be -{MAX_PRIORITY} to {MAX_PRIORITY}, got {request.priority}",
                param="priority",
            )
        if self.count(Phase.WAITING) >= self._limits.max_waiting:
            return PaintFailed(
                request_id=request.request_id,
                kind="refused",
                message=f"{self._limits.max_waiting} pictures are waiting already; try again "
                "later, or start the server with a larger --max-waiting-pictures",
                status=503,
                error_type="ServiceUnavailableError",
            )
        now_s = self._clock.now_s()
        timeout_s = math.inf if request.timeout_s is None else request.timeout_s
        self._open[request.request_id] = PictureState(
            request=request,
            order=self._num_arrived,
            arrived_s=now_s,
            deadline_s=now_s + timeout_s,
            served_turn=self._turn,
        )
        self._num_arrived += 1
        return None

    def plan(self) -> Turn:
        """The next turn. What it names counts as served."""
        self._turn += 1
        self._admit()
        prepare = self._first(Phase.PREPARING)
        denoising = self._ordered(Phase.DENOISING)
        step = within_budget(denoising, self._limits.max_step_tokens)
        decode = self._first(Phase.DECODING)
        for picture in (prepare, *step, decode):
            if picture is not None:
                picture.served_turn = self._turn
        for picture in step:
            if picture.started_s is None:
                picture.started_s = self._clock.now_s()
        return Turn(
            prepare=None if prepare is None else prepare.request_id,
            step=tuple(picture.request_id for picture in step),
            decode=None if decode is None else decode.request_id,
        )

    def close(self) -> None:
        """Pictures that arrive from now on wait until `reopen`, which is for the time when all
        earlier ones are finished."""
        self._closed_from.append(self._num_arrived)

    @property
    def is_clear(self) -> bool:
        """Whether every picture that arrived before the first `close` is finished."""
        first = self._closed_from[0] if self._closed_from else self._num_arrived
        return all(picture.order >= first for picture in self._open.values())

    def reopen(self) -> None:
        """Undo the first `close`."""
        self._closed_from.popleft()

    def prepared(self, request_id: str, num_tokens: int) -> None:
        """The picture has its latents; from now on it takes part in steps."""
        picture = self._open[request_id]
        picture.num_tokens = num_tokens
        picture.move_to(Phase.DENOISING)

    def denoised(self, request_id: str) -> None:
        """The picture has taken its last step."""
        self._open[request_id].move_to(Phase.DECODING)

    def finish(self, request_id: str) -> PictureState | None:
        """Forget a picture, whatever its phase; None: it was not open."""
        picture = self._open.pop(request_id, None)
        if picture is not None:
            picture.move_to(Phase.FINISHED)
        return picture

    def overdue(self) -> list[str]:
        """Pictures whose time is up."""
        now_s = self._clock.now_s()
        return [name for name, picture in self._open.items() if picture.deadline_s <= now_s]

    def _admit(self) -> None:
        num_running = len(self._open) - self.count(Phase.WAITING)
        first = self._closed_from[0] if self._closed_from else self._num_arrived
        waiting = [one for one in self._ordered(Phase.WAITING) if one.order < first]
        for picture in waiting[: self._limits.max_running - num_running]:
            picture.move_to(Phase.PREPARING)

    def _ordered(self, phase: Phase) -> list[PictureState]:
        return by_urgency(
            (picture for picture in self._open.values() if picture.phase is phase),
            turn=self._turn,
            aging_turns=self._limits.aging_turns,
        )

    def _first(self, phase: Phase) -> PictureState | None:
        return next(iter(self._ordered(phase)), None)


def refused(request_id: str, message: str, *, param: str | None = None) -> PaintFailed:
    """The answer to a request that cannot be honoured as it is."""
    return PaintFailed(
        request_id=request_id,
        kind="refused",
        message=message,
        status=400,
        error_type="BadRequestError",
        param=param,
    )
