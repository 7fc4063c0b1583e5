"""What the endpoints of observability answer, for the OpenAPI document.

Answers may have further fields; those that are named here are always there.
"""

from __future__ import annotations

from typing import Any

import msgspec


class Loads(msgspec.Struct, frozen=True, kw_only=True):
    timestamp: str
    version: str
    dp_rank_count: int
    loads: list[dict[str, Any]]
    aggregate: dict[str, float]


class Load(msgspec.Struct, frozen=True, kw_only=True):
    dp_rank: int
    num_reqs: int
    num_waiting_reqs: int
    num_tokens: int


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """The data of the live page."""

    model: str
    version: str
    state: str
    samples: list[dict[str, Any]]


class Logging(msgspec.Struct, frozen=True, kw_only=True):
    success: bool
    log_requests: bool
    log_requests_level: int
    log_requests_format: str
