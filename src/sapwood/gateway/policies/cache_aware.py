"""Sends a request where the cache probably holds most of its prompt, unless that overloads it."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence

from sapwood.gateway.policies.interface import (
    Balance,
    C,
    Call,
    Candidate,
    PrefixCounts,
    least_loaded,
)
from sapwood.gateway.policies.known_pages import KnownPages, token_ids
from sapwood.gateway.policies.text_tree import TextTree

MIN_MATCH_TOKENS = 16
MIN_MATCH_BYTES = 128
"""A shorter beginning is not worth following: some dozens of tokens are computed at once, and the
JSON around a short message is the same in every request."""
SPREAD_FACTOR = 2
"""A shared beginning is followed until its worker has got so many times its length more new text
than another one. Each worker computes that beginning once, and its cache has room for its share."""
RECENT_BYTES = 4 << 20
"""Per worker, of new text: what was given long ago is in no cache any more."""


class CacheAware:
    """Follows prefixes while the load is balanced, and the load when it is not.

    The tree says what each worker was sent, not what it still holds; the workers' events say that,
    where they are followed and the request has token ids. A prompt whose known part is
    no larger than `threshold`, or shorter than `min_match_bytes`, goes to the least loaded worker;
    of equal ones, to the one that has got the least new text lately. So does a prompt that only
    begins like others, such as with their system prompt, once their worker has got more than the
    others: its cache could not hold all that begins so.
    """

    needs_text = True

    def __init__(
        self,
        *,
        threshold: float,
        balance: Balance,
        max_tree_bytes: int,
        min_match_bytes: int = MIN_MATCH_BYTES,
        known: KnownPages | None = None,
    ) -> None:
        self._threshold = threshold
        self._min_match_bytes = min_match_bytes
        self._balance = balance
        self._tree = TextTree(max_tree_bytes)
        self._known = known
        self.prefixes = PrefixCounts()
        self._given: dict[str, float] = {}

    def choose(self, candidates: Sequence[C], call: Call) -> C:
        self.prefixes.num_bytes += len(call.text)
        chosen = self._chosen(candidates, call)
        if not call.text:
            return chosen
        new = len(call.text) - self._tree.match(call.text, (chosen.id,)).num_bytes
        self._give(chosen.id, new)
        self._tree.insert(call.text, chosen.id)
        return chosen

    def forget(self, worker_id: str) -> None:
        self._tree.forget(worker_id)
        self._given.pop(worker_id, None)

    def _chosen(self, candidates: Sequence[C], call: Call) -> C:
        if self._balance.is_lost(candidates):
            return least_loaded(candidates)
        by_id = {candidate.id: candidate for candidate in candidates}
        if call.ids and self._known is not None and self._known.follows_all(by_id):
            ids = token_ids(call.ids)
            if ids is not None:
                return self._holder(self._known, by_id, ids, call)
        match = self._tree.match(call.text, by_id)
        needed = max(self._threshold * len(call.text), self._min_match_bytes)
        if match.worker is None or match.num_bytes <= needed:
            return self._new_home(candidates)
        chosen = by_id[match.worker]
        if not match.is_whole:
            other = min(candidates, key=self._given_to)
            lead = self._given_to(chosen) - self._given_to(other)
            if lead > SPREAD_FACTOR * match.num_bytes:
                chosen, match = other, self._tree.match(call.text, (other.id,))
        self.prefixes.num_known_bytes += match.num_bytes
        return chosen

    def _holder(self, known: KnownPages, by_id: Mapping[str, C], ids: array[int], call: Call) -> C:
        """Of the workers that hold most of the prompt the least loaded one; by the rule for new
        prompts if none holds enough."""
        num_tokens, holders = known.holders(ids, by_id)
        if num_tokens <= max(self._threshold * len(ids), MIN_MATCH_TOKENS):
            return self._new_home(list(by_id.values()))
        self.prefixes.num_known_bytes += len(call.text) * num_tokens // len(ids)
        return least_loaded([by_id[one] for one in holders])

    def _new_home(self, candidates: Sequence[C]) -> C:
        return min(candidates, key=lambda one: (one.load, self._given_to(one)))

    def _given_to(self, one: Candidate) -> float:
        """Bytes of new text that the worker has got lately."""
        return self._given.get(one.id, 0)

    def _give(self, worker_id: str, num_bytes: int) -> None:
        given = self._given
        given[worker_id] = given.get(worker_id, 0) + num_bytes
        if sum(given.values()) > RECENT_BYTES * len(given):
            self._given = {one: count / 2 for one, count in given.items()}
