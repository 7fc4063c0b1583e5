"""One prefix is computed once: who is computing which, so that others wait for it and hit it."""

from __future__ import annotations

from sapwood.engine.request_state import RequestState


class PrefixesInProgress:
    """Prefixes of prompts that running requests have not computed yet, by hashes of their pages.

    threshold  a request waits for one that has at least so many more tokens of its prefix than the
               cache; -1: never
    """

    def __init__(self, *, page_size: int, threshold: int) -> None:
        self._page_size = page_size
        self._threshold = threshold
        self._computing: dict[int, RequestState] = {}
        self._announced: set[RequestState] = set()

    @property
    def is_empty(self) -> bool:
        return not self._computing

    def are_worth_waiting_for(self, state: RequestState, num_hit_tokens: int) -> bool:
        """Whether a running request will soon have much more of this prefix than the cache has."""
        wanted = (num_hit_tokens + max(self._threshold, 1) - 1) // self._page_size
        # What a hit may not cover is computed in any case, and so is the last prompt token.
        usable = min(state.num_matchable_tokens, state.num_prompt_tokens - 1)
        if (wanted + 1) * self._page_size > usable:
            return False
        other = self._computing.get(state.page_hashes(self._page_size)[wanted])
        return other is not None and other is not state

    def announce(self, state: RequestState) -> None:
        if self._threshold < 0 or not state.shares_prefixes:
            return
        if state.num_computed_tokens < state.num_prompt_tokens:
            self._announced.add(state)
            for page_hash in state.page_hashes(self._page_size):
                self._computing.setdefault(page_hash, state)

    def withdraw(self, state: RequestState) -> None:
        """Free for a request that has announced nothing: in each step all that decode come here."""
        if state not in self._announced:
            return
        self._announced.remove(state)
        for page_hash in state.page_hashes(self._page_size):
            if self._computing.get(page_hash) is state:
                del self._computing[page_hash]
