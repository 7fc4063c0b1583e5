"""Orders about weights and memory over several ranks: each carries them out for its own part.

An update is checked on all ranks before any of them changes; if one fails all the same, all have
their old weights again. Torch-free."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, Protocol

from sapwood.base.errors import InvalidRequest, SapwoodError, WeightError
from sapwood.engine.steering import NO_WEIGHTS, ModelMemory
from sapwood.schema.rank import RankOrder, WeightsTask, WeightsTold
from sapwood.schema.weights import (
    UPDATES,
    JoinUpdateGroup,
    ReadWeight,
    UpdateFromTensors,
    WeightOrder,
)

MAX_SENT_BYTES = 1 << 29
"""Of tensors that come with an order: half of the largest message between two ranks."""

Part = Literal["check", "do", "undo"]


class RankMemory(ModelMemory, Protocol):
    """The weights and caches of one rank; see app.building.weights.ServedWeights."""

    def check(self, order: WeightOrder) -> None:
        """SapwoodError if an update cannot be; nothing has changed then."""
        ...

    def carry_out(self, order: WeightOrder) -> str:
        """What `check` has found right."""
        ...

    def undo(self) -> None:
        """Have the weights from before the last update. RuntimeError if they are nowhere."""
        ...


class Team(Protocol):
    """The other ranks; see app.ranks.ranks.RankTeam."""

    def send(self, order: RankOrder) -> None: ...

    def told(self, number: int) -> dict[int, WeightsTold]: ...


class TeamWeights:
    """Has every rank carry out an order; an `engine.steering.ModelMemory`."""

    def __init__(self, own: RankMemory, team: Team) -> None:
        """own: rank 0's"""
        self._own = own
        self._team = team
        self._numbers = itertools.count(1)
        self._joins = ThreadPoolExecutor(1, "sapwood-join-ranks")

    @property
    def why_not_ready(self) -> str | None:
        return self._own.why_not_ready

    def perform(self, order: WeightOrder) -> str:
        if isinstance(order, UpdateFromTensors) and sum(map(len, order.parts)) > MAX_SENT_BYTES:
            raise InvalidRequest(
                f"ranks take {MAX_SENT_BYTES} bytes of tensors at once; send several requests"
            )
        if not isinstance(order, UPDATES):
            return self._told_by_all(order)
        self._on_all("check", order)
        try:
            return self._on_all("do", order)[0]
        except SapwoodError as error:
            self._on_all("undo", order)
            raise WeightError(f"{error.message}; all ranks have the old weights again") from error

    def prepare(self, order: WeightOrder) -> None:
        """Ranks take orders in turn with steps, so nothing is done beside these."""

    def drop(self) -> None:
        """Nothing was prepared."""

    def join(self, order: JoinUpdateGroup) -> Future[str]:
        number = self._tell("do", order)
        own = self._own.join(order)

        def wait() -> str:
            told = own.result()
            _refuse_failures(self._team.told(number))
            return told

        return self._joins.submit(wait)

    def _told_by_all(self, order: WeightOrder) -> str:
        """Rank 0's answer; of a weight that is read, what the ranks that have it have together."""
        if not isinstance(order, ReadWeight):
            return self._on_all("do", order)[0]
        number = self._tell("do", order)
        found: list[str] = []
        failure: InvalidRequest | None = None
        try:
            found.append(self._own.carry_out(order))
        except InvalidRequest as error:
            failure = error
        told = self._team.told(number)
        found += [one.message for _, one in sorted(told.items()) if one.failure is None]
        if not found:
            assert failure is not None
            raise failure
        return _joined(found)

    def _on_all(self, part: Part, order: WeightOrder) -> list[str]:
        """What ranks say, rank 0 first. SapwoodError of the first that fails, once all are done."""
        number = self._tell(part, order)
        failure: SapwoodError | None = None
        own = ""
        try:
            own = _do(self._own, part, order)
        except SapwoodError as error:
            failure = error
        told = self._team.told(number)
        if failure is not None:
            raise failure
        _refuse_failures(told)
        return [own, *(told[rank].message for rank in sorted(told))]

    def _tell(self, part: Part, order: WeightOrder) -> int:
        number = next(self._numbers)
        self._team.send(WeightsTask(number=number, part=part, order=order))
        return number


def do_task(
    memory: RankMemory | None, task: WeightsTask, say: Callable[[WeightsTold], None]
) -> None:
    """On another rank than 0: carry out the part of an order, and tell rank 0 how it ended."""

    def tell(message: str = "", failure: str | None = None) -> None:
        say(WeightsTold(number=task.number, message=message, failure=failure))

    if memory is None:
        tell(failure=NO_WEIGHTS)
        return
    if isinstance(task.order, JoinUpdateGroup):

        def joined(future: Future[str]) -> None:
            error = future.exception()
            tell(failure=None if error is None else str(error))

        memory.join(task.order).add_done_callback(joined)
        return
    try:
        tell(_do(memory, task.part, task.order))
    except SapwoodError as error:
        tell(failure=error.message)


def _do(memory: RankMemory, part: Part, order: WeightOrder) -> str:
    match part:
        case "check":
            memory.check(order)
            return ""
        case "do":
            return memory.carry_out(order)
        case "undo":
            memory.undo()
            return ""


def _joined(found: Sequence[str]) -> str:
    """The rows of a weight, of which each rank tells its part, as ServedWeights reads it: a list if
    that is the whole. Neighbours may have the same part."""
    parts = [json.loads(one) for one in found]
    if isinstance(parts[0], list):
        return found[0]
    by_place = {part["first"]: part for part in parts}
    pieces = [by_place[first]["rows"] for first in sorted(by_place)]
    if parts[0]["dim"] == 0:
        return json.dumps([row for rows in pieces for row in rows])
    return json.dumps([list(itertools.chain(*row)) for row in zip(*pieces, strict=True)])


def _refuse_failures(told: dict[int, WeightsTold]) -> None:
    for rank, one in sorted(told.items()):
        if one.failure is not None:
            raise InvalidRequest(f"rank {rank}: {one.failure}")
