"""Pauses, and orders about weights and memory: what happens between steps, not in one.

An update must not fall between two steps of a request, whose KV would be of two models, unless the
order says that it may. First it is prepared beside the steps, while requests run and are admitted;
then it waits until none runs, while none is admitted. A paused engine carries it out as soon as it
is prepared, with the requests that a pause in place leaves where they are.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol

from sapwood.base.errors import SapwoodError
from sapwood.engine.scheduler import Scheduler
from sapwood.schema.output import RequestOutput
from sapwood.schema.request import OrderWeights, Pause
from sapwood.schema.weights import UPDATES, WAITING, JoinUpdateGroup, ReleaseMemory, WeightOrder

log = logging.getLogger(__name__)

Tell = Callable[[str, bool, str], None]
"""Answers a call: its id, whether it is done, and what there is to say."""

NO_WEIGHTS = (
    "the weights of this model cannot be changed while it is served, nor its memory be released: "
    "it makes embeddings or scores, is computed by transformers, or was started with "
    "--enable-dp-attention or --enable-eplb"
)
NO_WEIGHTS_OF_TOWERS = (
    "weights cannot be changed, nor memory be released, while the server sees or hears: what makes "
    "vectors of pictures and sounds has weights of its own, which this does not reach; start the "
    "server with --language-only"
)
_HELD = (
    "requests that are paused in place hold KV of the old weights; send flush_cache false to keep "
    "it, or pause with mode retract or abort"
)


class ModelMemory(Protocol):
    """The weights and caches of this rank."""

    @property
    def why_not_ready(self) -> str | None:
        """Why no step may be computed, as while memory is released; None: steps may be."""
        ...

    def perform(self, order: WeightOrder) -> str:
        """Carry the order out and say what was done. SapwoodError, and nothing has changed, if that
        cannot be."""
        ...

    def prepare(self, order: WeightOrder) -> Future[None] | None:
        """Begin what can be done of an order beside the steps, before `perform`; None: nothing."""
        ...

    def drop(self) -> None:
        """Forget what was prepared: the order will not be performed."""
        ...

    def join(self, order: JoinUpdateGroup) -> Future[str]:
        """Join a group beside the steps, since that waits for other processes."""
        ...


class Steering:
    """Says when steps may be computed, and carries orders out between them."""

    def __init__(
        self, scheduler: Scheduler, memory: ModelMemory | None, *, why_none: str = NO_WEIGHTS
    ) -> None:
        """memory: None: orders are refused, and `why_none` says why"""
        self._why_no_weights = why_none
        self._scheduler = scheduler
        self._memory = memory
        self._orders: deque[OrderWeights] = deque()
        self._preparing: Future[None] | None = None
        """What is done for the first order beside the steps; None: nothing, or not yet begun."""
        self._joining: list[tuple[str, Future[str]]] = []
        self._pauses: list[Pause] = []
        self.is_paused = False

    @property
    def may_step(self) -> bool:
        ready = self._memory is None or self._memory.why_not_ready is None
        return not self.is_paused and ready and not self._wants_gap

    @property
    def is_busy(self) -> bool:
        """Whether there is something to do as soon as no step is in flight."""
        return bool(self._pauses) or self._is_due

    @property
    def waits_for_others(self) -> bool:
        """Whether threads work for an order: one joins a group, or prepares an update."""
        is_prepared = self._preparing is None or self._preparing.done()
        return bool(self._joining) or not is_prepared

    @property
    def _is_quiet(self) -> bool:
        return not self.may_step or not self._scheduler.has_running

    @property
    def _is_due(self) -> bool:
        """Whether the first order can be prepared, or carried out once no step is in flight."""
        if not self._orders:
            return False
        if self._preparing is None:
            return self._is_quiet or isinstance(self._orders[0].order, UPDATES)
        return self._preparing.done() and self._is_quiet

    @property
    def _wants_gap(self) -> bool:
        """Whether an order is prepared that is to be carried out between two steps."""
        is_prepared = self._preparing is not None and self._preparing.done()
        return is_prepared and self._orders[0].between_steps

    def pause(self, message: Pause) -> None:
        """Compute no more steps. The answer comes when those in flight have ended."""
        self.is_paused = True
        self._pauses.append(message)

    def go_on(self) -> str:
        was_paused, self.is_paused = self.is_paused, False
        return "generation goes on" if was_paused else "generation was not paused"

    def order(self, message: OrderWeights) -> None:
        self._orders.append(message)
        self._scheduler.admits = self._may_admit

    def between_steps(self, tell: Tell, *, is_idle: bool) -> None:
        """To be called once per turn of the loop.

        is_idle  whether no step is in flight"""
        self._answer_joined(tell)
        if not is_idle:
            return
        for message in self._pauses:
            if message.mode == "retract":
                self._scheduler.retract_all()
            tell(message.call_id, True, "generation is paused")
        self._pauses.clear()
        while self._orders and self._is_ready(self._orders[0]):
            self._carry_out(self._orders.popleft(), tell)
        self._scheduler.admits = self._may_admit

    def _is_ready(self, message: OrderWeights) -> bool:
        """Whether the first order can be carried out. Begins its preparation."""
        if not isinstance(message.order, WAITING):
            return True
        if self._preparing is None and self._memory is not None:
            self._preparing = self._memory.prepare(message.order) or _done()
        if self._preparing is not None and not self._preparing.done():
            return False
        has_failed = self._preparing is not None and self._preparing.exception() is not None
        return has_failed or self._is_quiet

    @property
    def _may_admit(self) -> bool:
        """Whether new requests may run: not while the first order only waits for those that do."""
        if not self._orders:
            return True
        first, preparing = self._orders[0], self._preparing
        if first.abort_all or not isinstance(first.order, UPDATES):
            return False
        return preparing is not None and (first.between_steps or not preparing.done())

    def abort_all(self, reason: str) -> list[RequestOutput]:
        """End all open requests. Returns their terminal outputs."""
        scheduler = self._scheduler
        ended = [scheduler.abort(one, reason=reason) for one in scheduler.open_request_ids]
        return [output for output in ended if output is not None]

    def _carry_out(self, message: OrderWeights, tell: Tell) -> None:
        order, memory = message.order, self._memory
        if memory is None:
            tell(message.call_id, False, self._why_no_weights)
            return
        if isinstance(order, JoinUpdateGroup):
            self._joining.append((message.call_id, memory.join(order)))
            return
        preparing, self._preparing = self._preparing, None
        if preparing is not None and (failure := preparing.exception()) is not None:
            # Whatever it was, as a lack of memory: nothing has changed, so the engine goes on.
            unforeseen = None if isinstance(failure, SapwoodError) else failure
            log.warning("an update of weights was not prepared: %s", failure, exc_info=unforeseen)
            tell(message.call_id, False, str(failure) or type(failure).__name__)
            return
        makes_stale = isinstance(order, UPDATES) and message.flush_cache
        forgets = isinstance(order, ReleaseMemory) and (not order.tags or "kv_cache" in order.tags)
        if (makes_stale or forgets) and self._scheduler.has_running:
            memory.drop()
            tell(message.call_id, False, _HELD)
            return
        try:
            told = memory.perform(order)
        except SapwoodError as error:
            tell(message.call_id, False, error.message)
            return
        if isinstance(order, UPDATES):
            self._scheduler.weights_changed()
        if makes_stale or forgets:
            self._scheduler.forget_prefixes()
        tell(message.call_id, True, told)

    def _answer_joined(self, tell: Tell) -> None:
        for call_id, joining in [one for one in self._joining if one[1].done()]:
            self._joining.remove((call_id, joining))
            error = joining.exception()
            tell(call_id, error is None, joining.result() if error is None else str(error))


def _done() -> Future[None]:
    done: Future[None] = Future()
    done.set_result(None)
    return done
