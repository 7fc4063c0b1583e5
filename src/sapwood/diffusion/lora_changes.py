"""Changes of LoRA adapters between pictures: who came before a change is drawn without it, who
came after it, with it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from sapwood.base.errors import InvalidRequest, NotFound
from sapwood.pipelines.loras import PictureAdapters
from sapwood.schema.painting import ChangeLoras, LoraList, LorasAnswer

NOTHING = LoraList(loaded_adapters=(), active={})


class LoraChanges:
    """The changes that wait for the pictures before them."""

    def __init__(self, adapters: PictureAdapters | None, forget_texts: Callable[[], None]) -> None:
        """forget_texts: is called after a change, since adapters may change encoders of texts too

        adapters  of the pipeline; None: it has none
        """
        self._adapters = adapters
        self._forget_texts = forget_texts
        self._waiting: deque[ChangeLoras] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, change: ChangeLoras) -> None:
        self._waiting.append(change)

    def make_next(self) -> LorasAnswer:
        """Make the change that has waited longest."""
        change = self._waiting.popleft()
        try:
            self._make(change)
        except (InvalidRequest, NotFound) as error:
            return LorasAnswer(
                call_id=change.call_id,
                listing=self._list(),
                refusal=error.message,
                status=error.status,
                param=error.param,
            )
        return self.listing(change.call_id)

    def listing(self, call_id: str) -> LorasAnswer:
        return LorasAnswer(call_id=call_id, listing=self._list())

    def _list(self) -> LoraList:
        return NOTHING if self._adapters is None else self._adapters.listing()

    def _make(self, change: ChangeLoras) -> None:
        adapters = self._adapters
        if adapters is None or not adapters.components:
            raise InvalidRequest(
                "this pipeline runs through diffusers, where sapwood changes no adapters"
            )
        if change.kind == "set":
            adapters.set(change.wishes)
        elif change.kind == "merge":
            adapters.merge(change.target, change.strength)
        else:
            adapters.unmerge(change.target)
        self._forget_texts()
