"""What both engines must agree on before a page goes from one to the other."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PageFacts:
    """Of one engine's cache.

    identity   a digest of all that a page's bytes depend on besides its tokens
    page_size  tokens of a page
    row_bytes  per pool the bytes of a page, or of a state, in all layers
    """

    identity: str
    page_size: int
    row_bytes: tuple[int, ...]
