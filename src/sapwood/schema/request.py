"""What the API process asks of an engine: tagged msgspec structs, never pickle."""

from __future__ import annotations

import msgspec

from sapwood.schema.sampling import SamplingParams


class Generate(msgspec.Struct, frozen=True, tag=True, kw_only=True, omit_defaults=True):
    """One request for one continuation.

    prompt_ids  at least one token id
    extra_key   prefix pages are shared only among requests with the same key
    priority    larger is sooner, where the policy looks at it
    """

    request_id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    extra_key: str = ""
    priority: int = 0


class Abort(msgspec.Struct, frozen=True, tag=True):
    """End that request now, in whatever state it is; an id that has ended is ignored."""

    request_id: str


class FlushCache(msgspec.Struct, frozen=True, tag=True):
    """Forget every prefix that no request uses; answered by a `CacheFlushed` with the same id."""

    call_id: str


class GetStatus(msgspec.Struct, frozen=True, tag=True):
    """Answered by an `EngineStatus` with the same id."""

    call_id: str


class Drain(msgspec.Struct, frozen=True, tag=True):
    """Refuse new requests, finish the open ones, then end the loop.

    timeout_s  what is still open after this long is aborted
    """

    timeout_s: float


EngineInput = Generate | Abort | FlushCache | GetStatus | Drain
