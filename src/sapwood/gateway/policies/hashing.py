"""Policies that send what belongs together to one worker, without remembering anything.

Each worker's rank for a key is a hash of both (rendezvous hashing): when a worker comes or goes,
only the keys move that it gets or had. Gateways that know the same workers by the same addresses
choose alike, so several of them need no shared state.

Source: Thaler and Ravishankar 1998, "Using name-based mappings to increase hit rates"; the bound on
loads is that of Mirrokni, Thorup and Zadimoghaddam 2018, arXiv:1608.01350.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from hashlib import blake2b

from sapwood.gateway.policies.interface import C, Call, Candidate

BYTES_PER_TOKEN = 4
"""What an English text has, roughly."""


class ConsistentHashing:
    """The worker that ranks first for the routing key; any worker if there is no key."""

    needs_text = False
    prefixes = None

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def choose(self, candidates: Sequence[C], call: Call) -> C:
        if not call.key:
            return self._rng.choice(candidates)
        key = call.key.encode()
        return max(candidates, key=lambda candidate: rank(key, candidate))

    def forget(self, worker_id: str) -> None:
        """Nothing is remembered."""


class PrefixHash:
    """The first worker for the prompt's beginning that has room: equal beginnings stay together.

    A worker has room while its load is at most `load_factor` times the average, this request
    included.
    """

    needs_text = True
    prefixes = None

    def __init__(self, *, num_tokens: int, load_factor: float) -> None:
        self._num_bytes = num_tokens * BYTES_PER_TOKEN
        self._load_factor = load_factor

    def choose(self, candidates: Sequence[C], call: Call) -> C:
        return self._with_room(candidates, call.text[: self._num_bytes])

    def _with_room(self, candidates: Sequence[C], key: bytes) -> C:
        total = sum(candidate.load for candidate in candidates) + 1
        most = math.ceil(self._load_factor * total / len(candidates))
        ranked = sorted(candidates, key=lambda candidate: rank(key, candidate), reverse=True)
        for candidate in ranked:
            if candidate.load + 1 <= most:
                return candidate
        # Costs other than 1 can leave no worker with room.
        return min(ranked, key=lambda candidate: candidate.load)

    def forget(self, worker_id: str) -> None:
        """Nothing is remembered."""


class BoundedLoad(PrefixHash):
    """Likewise for the routing key; a request without one is placed by its beginning."""

    def choose(self, candidates: Sequence[C], call: Call) -> C:
        if not call.key:
            return super().choose(candidates, call)
        return self._with_room(candidates, call.key.encode())


def rank(key: bytes, candidate: Candidate) -> bytes:
    # The id's length keeps ("ab", "c") and ("a", "bc") apart.
    worker = candidate.id.encode()
    return blake2b(b"%d:%s%s" % (len(worker), worker, key), digest_size=8).digest()
