"""How much a request needs in each pool of the cache, from its lease and its tokens."""

from __future__ import annotations

from collections.abc import Sequence

from sapwood.memory.lease import Lease
from sapwood.memory.prefix_tree import first_needed_page
from sapwood.schema.cache import CacheKind, CachePool, pages_of_window


class Needs:
    """Counts in pages, and in slots for a pool of states; lists have one number per pool.

    full            index of the pool that keeps every token; None: there is none
    windows         (index, window) of each window pool
    state           index of the pool of states; None: the model keeps none
    is_plain        whether there is one pool, which keeps every token
    state_interval  tokens between the states that are kept for prefixes
    """

    def __init__(self, pools: Sequence[CachePool], page_size: int, state_interval: int) -> None:
        kinds = [pool.kind for pool in pools]
        self.full = kinds.index(CacheKind.FULL) if CacheKind.FULL in kinds else None
        self.state = kinds.index(CacheKind.STATE) if CacheKind.STATE in kinds else None
        self.windows = [
            (at, pool.window) for at, pool in enumerate(pools) if pool.window is not None
        ]
        self.is_plain = self.full == 0 and len(pools) == 1
        self.page_size = page_size
        self.state_interval = state_interval
        self._num_pools = len(pools)

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def most_tokens(self, sizes: Sequence[int], step_tokens: int) -> int | None:
        """Tokens that one request may have at most, if a step computes up to `step_tokens` of them
        and the pools have these sizes; None: the pools set no limit, because windows give back what
        the next step needs."""
        limits = [] if self.full is None else [sizes[self.full]]
        limits += [
            sizes[pool]
            for pool, window in self.windows
            if sizes[pool] < pages_of_window(window, step_tokens, self.page_size)
        ]
        return min(limits) * self.page_size if limits else None

    def missing(self, lease: Lease, num_tokens: int, start: int, end: int) -> list[int]:
        """Per pool: what the lease lacks to hold the request's first `num_tokens` tokens, of which
        the next step computes start .. end - 1. What it gives back itself is not counted."""
        if self.is_plain:
            return [max(self.pages_for(num_tokens) - len(lease.pages), 0)]
        missing = [0] * self._num_pools
        if self.full is not None:
            missing[self.full] = max(self.pages_for(num_tokens) - len(lease.pages), 0)
        for (pool, window), held in zip(self.windows, lease.windows, strict=True):
            begin = max(len(held.pages), first_needed_page(window, start, self.page_size))
            missing[pool] = max(self.pages_for(end) - begin, 0)
        if lease.state is not None:
            assert self.state is not None
            missing[self.state] = lease.state.num_missing
        return missing

    def wanted(self, lease: Lease, num_tokens: int, start: int, end: int) -> list[int]:
        """Like `missing`, for a request that takes what it likes before others are admitted."""
        wanted = self.missing(lease, num_tokens, start, end)
        if lease.state is not None:
            assert self.state is not None
            wanted[self.state] = lease.state.num_wanted
        return wanted

    def most_missing(self, lease: Lease, num_tokens: int, num_new: int) -> list[int]:
        """Like `missing` for a step of at most `num_new` tokens, wherever it begins: a hit may end
        elsewhere once other requests have left their prefixes in the cache."""
        missing = self.missing(lease, num_tokens, 0, min(num_tokens, num_new))
        for (pool, window), held in zip(self.windows, lease.windows, strict=True):
            most = min(pages_of_window(window, num_new, self.page_size), self.pages_for(num_tokens))
            missing[pool] = most - (len(held.pages) - held.first)
        return missing

    def growth(self, num_growing: int, of_windows: Sequence[int]) -> list[int]:
        """Per pool: pages for `num_growing` more tokens of all requests together, of which those in
        window pools were found by `window_growth`."""
        pages = self.pages_for(num_growing)
        if self.is_plain:
            return [pages]
        growth = [0] * self._num_pools
        if self.full is not None:
            growth[self.full] = pages
        for (pool, _), of_window in zip(self.windows, of_windows, strict=True):
            growth[pool] = of_window
        return growth

    def window_growth(self, num_tokens: int, num_growing: int) -> list[int]:
        """Per window pool: pages that a request of `num_tokens` takes when it grows."""
        growth = []
        for _, window in self.windows:
            most = pages_of_window(window, 1, self.page_size)
            before = min(self.pages_for(num_tokens), most)
            growth.append(min(self.pages_for(num_tokens + num_growing), most) - before)
        return growth

    def end_of_step(self, start: int, end: int, num_prompt: int) -> int:
        """Where a step that computes tokens from `start` on, up to `end`, must stop so that a state
        can be kept there: every `state_interval` tokens, and at the last end of a page of a prompt
        from which the same prompt can go on."""
        if self.state is None:
            return end
        stops = (start - start % self.state_interval + self.state_interval,)
        last = (num_prompt - 1) // self.page_size * self.page_size
        return min(end, *stops, *((last,) if last > start else ()))

    def before_state(self, start: int, end: int) -> int:
        """Where a step that computes tokens from `start` on, up to `end`, must end so as not to
        reach a place where a state is kept; `end` if there are no states."""
        if self.state is None:
            return end
        return min(end, start - start % self.state_interval + self.state_interval - 1)
