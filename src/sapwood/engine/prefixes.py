"""Each prefix is computed once: requests wait for a running request that computes their prefix."""

from __future__ import annotations

from sapwood.engine.request_state import RequestState
from sapwood.memory.ledger import Ledger


class PrefixesInProgress:
    """Prefixes of prompts that running requests have not computed yet, by hashes of their pages.

    threshold  a request waits for a running one whose prompt shares at least so many more tokens
               with its own than the cache has; -1: never
    """

    def __init__(self, *, page_size: int, threshold: int) -> None:
        self._page_size = page_size
        self._threshold = threshold
        self._computing: dict[int, RequestState] = {}
        self._announced: set[RequestState] = set()

    def are_worth_waiting_for(self, state: RequestState, ledger: Ledger) -> bool:
        """Whether a running request will soon have much more of the prefix than the cache has."""
        if not self._computing or state.num_matchable_tokens == 0:
            return False
        path = ledger.prefix_path(state.namespace, state.matchable_key())
        num_hit_tokens = sum(num_tokens for _, num_tokens in path)
        wanted = (num_hit_tokens + max(self._threshold, 1) - 1) // self._page_size
        # Tokens that a hit may not cover are computed in any case, and so is the last prompt token.
        usable = min(state.num_matchable_tokens, state.num_prompt_tokens - 1)
        if (wanted + 1) * self._page_size > usable:
            return False
        computed_by = self._computing.get(state.page_hashes(self._page_size)[wanted])
        return computed_by is not None and computed_by is not state

    def announce(self, state: RequestState) -> None:
        if self._threshold < 0 or not state.shares_prefixes:
            return
        if state.num_computed_tokens < state.num_prompt_tokens:
            self._announced.add(state)
            for page_hash in state.page_hashes(self._page_size):
                self._computing.setdefault(page_hash, state)

    def withdraw(self, state: RequestState) -> None:
        """Forget what the request has announced. It must cost nothing where that is nothing: every
        request that decodes comes here in each step."""
        if state not in self._announced:
            return
        self._announced.remove(state)
        for page_hash in state.page_hashes(self._page_size):
            if self._computing.get(page_hash) is state:
                del self._computing[page_hash]
