"""How many pages a GPU's memory holds beside everything else: pure functions of measured sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sapwood.base.errors import ConfigError

MARGIN = 0.02
"""Share of the memory that stays free, because allocators lose some between their pieces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Bytes of one device once the weights are loaded.

    free_bytes   free memory; weights and other programs have the rest of total_bytes
    step_bytes   memory of the largest step at its peak, beside weights and KV
    graph_bytes  memory that captured steps will take
    """

    total_bytes: int
    free_bytes: int
    step_bytes: int
    graph_bytes: int

    @property
    def used_bytes(self) -> int:
        return self.total_bytes - self.free_bytes

    @property
    def most_pool_bytes(self) -> int:
        """Bytes that are left for the pool."""
        margin = int(self.total_bytes * MARGIN)
        return self.free_bytes - self.step_bytes - self.graph_bytes - margin

    def __str__(self) -> str:
        return (
            f"of {_gib(self.total_bytes)}, {_gib(self.used_bytes)} are in use, the largest step "
            f"takes {_gib(self.step_bytes)} and captured steps {_gib(self.graph_bytes)}"
        )


@dataclass(frozen=True, slots=True)
class PoolSize:
    """num_pages of KV, and one line that says why."""

    num_pages: int
    why: str


def size_pool(
    use: MemoryUse,
    *,
    pages_in: Callable[[int], int],
    bytes_of: Callable[[int], int],
    mem_fraction_static: float | None = None,
    wanted_pages: int | None = None,
) -> PoolSize:
    """Pages of context that fit beside everything else, in all layers together.

    pages_in, bytes_of  pages whose memory has so many bytes at most; bytes of so many pages
    mem_fraction_static  share of the whole memory for weights and pool together; None: as much as
                         is left
    wanted_pages         the pool's number of pages; None: as many as fit
    Raises               ConfigError if the wanted pages, or a single page, do not fit
    """
    most = pages_in(max(use.most_pool_bytes, 0))
    if wanted_pages is not None:
        if wanted_pages > most:
            raise ConfigError(
                f"--max-total-tokens takes {_gib(bytes_of(wanted_pages))} of KV but "
                f"{_gib(max(use.most_pool_bytes, 0))} are left for it: {use}; ask for fewer "
                "tokens, or lower --chunked-prefill-size or --max-running-requests"
            )
        return PoolSize(wanted_pages, "asked for; it fits")
    if mem_fraction_static is None:
        num_pages, why = most, f"what is left: {use}"
    else:
        by_bytes = int(use.total_bytes * mem_fraction_static) - use.used_bytes
        by_fraction = pages_in(max(by_bytes, 0))
        num_pages = min(by_fraction, most)
        limit = "--mem-fraction-static" if by_fraction <= most else "what the largest step leaves"
        why = f"{limit}: {use}"
    if num_pages < 1:
        raise ConfigError(
            f"no page of KV fits: {use}; free some memory, choose a smaller model or "
            "--quantization, lower --chunked-prefill-size or --max-running-requests, or raise "
            "--mem-fraction-static"
        )
    return PoolSize(num_pages, why)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
