"""Sessions: a request goes on from an earlier one without sending its prompt again, as in SGLang.

A session is a tree of turns. Each turn keeps what it adds: where it cuts its parent's token ids,
its own new ones, and its output. The prompt that the engine gets is written out, so that it hits
the prefix cache like any other, and the answer is that to the whole prompt.
"""

from __future__ import annotations

import uuid
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from sapwood.base.clock import Clock
from sapwood.base.errors import InvalidRequest, Overloaded
from sapwood.schema.limits import REQUEST_ID

MAX_SESSIONS = 4096
MAX_SESSION_IDS = 1 << 22
MAX_IDS = 1 << 24
"""Token ids of one session, and of all, of 4 bytes each."""
TURN_IDS = 128
"""What a turn counts as, besides its own ids: what is kept for it takes about as much memory."""
MAX_IDLE_S = 3600.0
"""A session is closed when it was not used for this long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionParams:
    """Where in a session a request goes on.

    session_id   an open session
    request_id   the turn to go on from; None: the request begins a conversation
    offset       so many of that turn's token ids are kept, from the end if it is negative;
                 0: all of them
    replaces     the turns after that one are forgotten, and those that run are aborted; without
                 request_id all turns are
    drops_output the turn's output is left out
    """

    session_id: str
    request_id: str | None = None
    offset: int = 0
    replaces: bool = False
    drops_output: bool = False


@dataclass(slots=True, eq=False)
class Turn:
    """One request of a session.

    num_kept  of the parent's token ids, at the beginning
    """

    session: Session
    request_id: str
    parent: Turn | None
    num_kept: int
    new_ids: array[int]
    output_ids: array[int] = field(default_factory=lambda: array("i"))
    children: list[Turn] = field(default_factory=list)
    is_running: bool = False
    has_finished: bool = False

    def begun(self) -> None:
        self.is_running = True

    def heard(self, token_ids: Sequence[int], *, is_last: bool) -> None:
        """Tokens of the output have come."""
        self.output_ids.extend(token_ids)
        self.has_finished = self.has_finished or is_last
        self.session.count(self, len(token_ids))

    def ended(self) -> None:
        """No more will come. A request that was refused is no turn."""
        self.is_running = False
        if not self.has_finished and not self.output_ids:
            self.session.forget(self)

    @property
    def num_prompt_ids(self) -> int:
        return self.num_kept + len(self.new_ids)

    def prompt_ids(self) -> list[int]:
        """The whole prompt."""
        pieces = [self.new_ids]
        turn, length = self.parent, self.num_kept
        while turn is not None:
            if length > turn.num_kept:
                pieces.append((turn.new_ids + turn.output_ids)[: length - turn.num_kept])
                length = turn.num_kept
            turn = turn.parent
        return [token_id for piece in reversed(pieces) for token_id in piece]


@dataclass(slots=True, eq=False)
class Session:
    """The turns of one session, by the ids of their requests.

    num_ids  token ids of all turns; a turn itself counts as TURN_IDS
    """

    owner: Sessions
    session_id: str
    used_s: float
    turns: dict[str, Turn] = field(default_factory=dict)
    num_ids: int = 0

    def add(self, turn: Turn) -> None:
        self.turns[turn.request_id] = turn
        if turn.parent is not None:
            turn.parent.children.append(turn)
        self.count(turn, TURN_IDS + len(turn.new_ids))

    def count(self, turn: Turn, num_ids: int) -> None:
        """So many ids are kept, or no longer. Those of a turn that was forgotten do not count."""
        if self.turns.get(turn.request_id) is turn:
            self.num_ids += num_ids
            self.owner.num_ids += num_ids

    def forget(self, turn: Turn) -> list[Turn]:
        """Forget a turn and all after it. Returns those of them that run."""
        running: list[Turn] = []
        waiting = [turn]
        while waiting:
            one = waiting.pop()
            waiting += one.children
            self.count(one, -(TURN_IDS + len(one.new_ids) + len(one.output_ids)))
            if self.turns.get(one.request_id) is one:
                del self.turns[one.request_id]
            if one.is_running:
                running.append(one)
        if turn.parent is not None and turn in turn.parent.children:
            turn.parent.children.remove(turn)
        return running


class Sessions:
    """All open sessions of a server."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._open: dict[str, Session] = {}
        """Those that were not used for longest come first."""
        self.num_ids = 0

    def __len__(self) -> int:
        return len(self._open)

    def open(self, session_id: str | None = None) -> str:
        """Returns the session's id. InvalidRequest if one of that id is open; Overloaded if too
        many are."""
        self._close_idle()
        if session_id is None:
            session_id = uuid.uuid4().hex
        REQUEST_ID.check(len(session_id), "session_id")
        if not session_id:
            raise InvalidRequest("session_id is empty; leave it out", param="session_id")
        if session_id in self._open:
            raise InvalidRequest(
                f"the session {session_id!r} is open already; close it, or take another id",
                param="session_id",
            )
        if len(self._open) >= MAX_SESSIONS:
            raise Overloaded(f"{MAX_SESSIONS} sessions are open; close those that are done")
        self._open[session_id] = Session(self, session_id, self._clock.now_s())
        return session_id

    def close(self, session_id: str) -> bool:
        """Whether there was one. Requests of it that run go on."""
        session = self._open.pop(session_id, None)
        if session is None:
            return False
        for turn in list(session.turns.values()):
            session.forget(turn)
        return True

    def begin(
        self,
        params: SessionParams,
        request_id: str,
        new_ids: Sequence[int],
        *,
        bos: int | None,
    ) -> tuple[Turn, list[Turn]]:
        """A turn for a request, and those that run and must be aborted.

        new_ids  the request's own token ids; bos is cut off where they go on from others
        Raises   InvalidRequest if there is no such session or turn, the turn still runs, or the
                 session is too long
        """
        self._close_idle()
        session = self._open.get(params.session_id)
        if session is None:
            raise InvalidRequest(
                f"the session {params.session_id[:256]!r} does not exist, or was closed",
                param="session_params.id",
            )
        parent = self._parent(session, params)
        stopped: list[Turn] = []
        if params.replaces:
            roots = [one for one in session.turns.values() if one.parent is None]
            for turn in roots if parent is None else list(parent.children):
                stopped += session.forget(turn)
            if parent is not None and parent.is_running:
                stopped.append(parent)
        ids = array("i", new_ids)
        num_kept = 0
        if parent is not None:
            if ids and ids[0] == bos:
                ids = ids[1:]
            of_parent = parent.num_prompt_ids
            of_parent += 0 if params.drops_output else len(parent.output_ids)
            num_kept = _cut(of_parent, params.offset)
        self._check_room(session, len(ids))
        turn = Turn(session, request_id, parent, num_kept, ids)
        known = session.turns.get(request_id)
        if known is not None:
            stopped += session.forget(known)
        session.add(turn)
        session.used_s = self._clock.now_s()
        self._open[session.session_id] = self._open.pop(session.session_id)
        return turn, stopped

    def _parent(self, session: Session, params: SessionParams) -> Turn | None:
        if params.request_id is None:
            return None
        parent = session.turns.get(params.request_id)
        if parent is None:
            raise InvalidRequest(
                f"the session has no request {params.request_id[:256]!r}; it was replaced, or "
                "never was",
                param="session_params.rid",
            )
        if parent.is_running and not params.replaces:
            raise InvalidRequest(
                "the request to go on from has not finished; wait for it, or set replace",
                param="session_params.rid",
            )
        return parent

    def _check_room(self, session: Session, num_new: int) -> None:
        num_new += TURN_IDS
        if session.num_ids + num_new > MAX_SESSION_IDS:
            raise InvalidRequest(
                f"the session would hold more than {MAX_SESSION_IDS} token ids; open another",
                param="session_params.id",
            )
        if self.num_ids + num_new > MAX_IDS:
            raise Overloaded(
                f"the open sessions hold {MAX_IDS} token ids, which is the most; close those that "
                "are done"
            )

    def _close_idle(self) -> None:
        before_s = self._clock.now_s() - MAX_IDLE_S
        while self._open:
            oldest = next(iter(self._open.values()))
            if oldest.used_s > before_s:
                return
            del self._open[oldest.session_id]
            if any(turn.is_running for turn in oldest.turns.values()):
                oldest.used_s = self._clock.now_s()
                self._open[oldest.session_id] = oldest
                continue
            for turn in list(oldest.turns.values()):
                oldest.forget(turn)


def _cut(count: int, offset: int) -> int:
    """How many of `count` an offset keeps; 0 keeps all."""
    if offset == 0:
        return count
    return min(count, offset) if offset > 0 else max(0, count + offset)
