"""LoRA adapters over several ranks: each rank reads the whole adapter and keeps its slices.

Torch-free."""

from __future__ import annotations

from typing import Protocol

from sapwood.engine.adapters import AdapterRanks
from sapwood.schema.rank import Loaded, RankOrder
from sapwood.schema.request import LoadAdapter, SentAdapter, UnloadAdapter

MAX_SENT_BYTES = 1 << 29
"""Of an adapter that comes as bytes: half of the largest message between two ranks."""


class Team(Protocol):
    """The other ranks; see app.ranks.ranks.RankTeam."""

    @property
    def num_others(self) -> int: ...

    def send(self, order: RankOrder) -> None: ...

    def loaded(self) -> list[tuple[int, Loaded]]: ...


class TeamAdapters:
    """Has every rank load an adapter; an `engine.adapters.AdapterRanks`.

    A load has ended once it has ended on every rank, so no plan names an adapter that a rank lacks.
    If one rank fails, the load has failed; the desk then has all ranks forget the adapter.
    """

    def __init__(self, own: AdapterRanks, team: Team) -> None:
        """own: rank 0's"""
        self._own = own
        self._team = team
        self._ends: dict[str, dict[int, Loaded]] = {}
        """By call id: how the load ended on the ranks that have told."""
        self._refused: list[Loaded] = []

    def load(self, order: LoadAdapter) -> None:
        failure = _why_not_sent(order.sent)
        if failure is not None:
            refused = Loaded(call_id=order.call_id, adapter_id=order.adapter_id, failure=failure)
            self._refused.append(refused)
            return
        self._ends[order.call_id] = {}
        self._team.send(order)
        self._own.load(order)

    def finished(self) -> list[Loaded]:
        found, self._refused = self._refused, []
        for rank, one in [*((0, one) for one in self._own.finished()), *self._team.loaded()]:
            ends = self._ends[one.call_id]
            ends[rank] = one
            if len(ends) == 1 + self._team.num_others:
                del self._ends[one.call_id]
                found.append(_of_all(ends))
        return found

    def arrived(self) -> list[str]:
        return self._own.arrived()

    def unload(self, adapter_id: str) -> None:
        self._team.send(UnloadAdapter(call_id="", adapter_id=adapter_id))
        self._own.unload(adapter_id)


def _of_all(ends: dict[int, Loaded]) -> Loaded:
    """Rank 0's end of the load, or else the first rank's that failed."""
    own = ends[0]
    if own.failure is not None:
        return own
    for rank, one in sorted(ends.items()):
        if one.failure is not None:
            return Loaded(
                call_id=one.call_id,
                adapter_id=one.adapter_id,
                failure=f"rank {rank} cannot load the adapter: {one.failure}",
            )
    return own


def _why_not_sent(sent: SentAdapter | None) -> str | None:
    """Why the ranks cannot be sent an adapter; None: they can, or read it from a folder."""
    size = 0 if sent is None else len(sent.tensors) + len(sent.config)
    if size <= MAX_SENT_BYTES:
        return None
    return (
        f"the adapter was sent as {size} bytes, but ranks take {MAX_SENT_BYTES} at most; save it "
        "to a folder and load it from there"
    )
