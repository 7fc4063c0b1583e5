"""The figures that an engine tells about itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from sapwood.engine.adapters import AdapterSlots
from sapwood.engine.media import MediaVectors
from sapwood.engine.queue_order import per_routing_key
from sapwood.engine.request_state import RequestState
from sapwood.engine.speculation import Speculation
from sapwood.engine.tiers import CacheTiers
from sapwood.memory.ledger import Ledger
from sapwood.schema.output import EngineStatus, HandoverCounts, PoolUse


def engine_status(
    call_id: str,
    counts: Counter[str],
    ledger: Ledger,
    speculation: Speculation | None,
    adapters: AdapterSlots,
    media: MediaVectors | None,
    tiers: CacheTiers | None,
    handovers: HandoverCounts | None,
    *,
    running: Sequence[RequestState],
    num_waiting: int,
    open_requests: Iterable[RequestState],
    new_token_ratio: float,
) -> EngineStatus:
    """counts  of the scheduler, by their names there"""
    return EngineStatus(
        call_id=call_id,
        num_running=len(running),
        num_waiting=num_waiting,
        num_pages=ledger.num_pages,
        num_free_pages=ledger.num_free_pages,
        num_cached_pages=ledger.num_cached_pages,
        num_leased_pages=ledger.num_leased_pages,
        num_steps=counts["steps"],
        num_computed_tokens=counts["computed"],
        num_cached_tokens=counts["cached"],
        num_output_tokens=counts["output"],
        num_finished=counts["finished"],
        num_aborted=counts["aborted"],
        num_refused=counts["refused"],
        num_retractions=counts["retracted"],
        num_preemptions=counts["preempted"],
        num_timed_out=counts["timed out"],
        num_arrived=counts["arrived"],
        num_prefill_tokens=counts["prefilled"],
        pools=tuple(
            PoolUse(num_free=free, num_leased=leased) for free, leased in ledger.free_and_leased()
        ),
        speculated=None if speculation is None else speculation.total,
        adapters=adapters.use if adapters.max_bytes else None,
        media=None if media is None else media.use,
        tiers=None if tiers is None else tiers.use,
        handovers=handovers,
        new_token_ratio=new_token_ratio,
        routing_key_running_counts=per_routing_key(running),
        routing_key_all_counts=per_routing_key(open_requests),
    )
