"""Which replica of the model gets a request: rules over the loads of those that could take it.

The process that sends all requests knows what is open, so that no replica has to be asked.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Protocol

from sapwood.gateway.policies.text_tree import TextTree
from sapwood.schema.output import RequestOutput
from sapwood.schema.request import Generate

OPEN_REQUEST_TOKENS = 256
"""What an open request costs a newcomer, in prompt tokens to compute: its output is about as long,
and each output token takes at least as long as a token of a prompt."""
MAX_TREE_BYTES = 2**26
"""Of remembered prompts; four bytes per token."""
_TOKEN_BYTES = array("i").itemsize


@dataclass(eq=False)
class Load:
    """What one replica has to do.

    num_requests      open requests
    num_tokens        their prompt tokens, and their output tokens so far
    num_new_tokens    prompt tokens that are probably still to be computed
    last_chosen       number of the latest request that was placed here
    """

    rank: int
    num_requests: int = 0
    num_tokens: int = 0
    num_new_tokens: int = 0
    last_chosen: int = 0


@dataclass(eq=False)
class Placement:
    """A request at a replica; counts in its load from `open` until `close`.

    num_new  prompt tokens that the replica has to compute, as far as is known
    """

    load: Load
    num_new: int
    _num_tokens: int = field(default=0, init=False)

    def open(self, request: Generate) -> None:
        self.load.num_requests += 1
        self.load.num_new_tokens += self.num_new
        self._add_tokens(len(request.prompt_ids))

    def on_output(self, output: RequestOutput) -> None:
        self._computed()
        self._add_tokens(len(output.token_ids))

    def close(self) -> None:
        self._computed()
        self.load.num_requests -= 1
        self._add_tokens(-self._num_tokens)

    def _computed(self) -> None:
        self.load.num_new_tokens -= self.num_new
        self.num_new = 0

    def _add_tokens(self, count: int) -> None:
        self.load.num_tokens += count
        self._num_tokens += count


class Balancer(Protocol):
    """Chooses one of several replicas."""

    def place(self, loads: Sequence[Load], request: Generate) -> Placement:
        """A place at one of these replicas, of which there is at least one."""
        ...

    def forget(self, rank: int) -> None:
        """The replica's cache is empty."""
        ...


class RoundRobin:
    """One replica after another."""

    def __init__(self) -> None:
        self._num_placed = 0

    def place(self, loads: Sequence[Load], request: Generate) -> Placement:
        chosen = loads[self._num_placed % len(loads)]
        self._num_placed += 1
        return Placement(chosen, len(request.prompt_ids))

    def forget(self, rank: int) -> None:
        """Nothing is remembered of single replicas."""


class LeastLoaded:
    """The replica with the least of something; of equal ones the one chosen longest ago."""

    def __init__(self, measure: Callable[[Load], int]) -> None:
        self._measure = measure
        self._num_placed = 0

    def place(self, loads: Sequence[Load], request: Generate) -> Placement:
        self._num_placed += 1
        chosen = min(loads, key=lambda load: (self._measure(load), load.last_chosen))
        chosen.last_chosen = self._num_placed
        return Placement(chosen, len(request.prompt_ids))

    def forget(self, rank: int) -> None:
        """Nothing is remembered."""


class PrefixAware:
    """The replica that has the least to compute if it gets the request: what is left of the
    prompt behind the longest beginning that it was sent before, the prompts that wait there, and
    OPEN_REQUEST_TOKENS for each open request.

    So a conversation stays where its beginning is cached until waiting there would cost more than
    computing it again elsewhere. The tree says what a replica was sent, not what it still holds.
    """

    def __init__(self, max_tree_bytes: int = MAX_TREE_BYTES) -> None:
        self._tree = TextTree(max_tree_bytes)
        self._num_placed = 0

    def place(self, loads: Sequence[Load], request: Generate) -> Placement:
        self._num_placed += 1
        num_tokens = len(request.prompt_ids)
        key = b"" if request.input_embeds else _key(request)
        known = {load.rank: self._num_known(key, load.rank, num_tokens) for load in loads if key}
        left = {load.rank: num_tokens - known.get(load.rank, 0) for load in loads}
        chosen = min(loads, key=lambda load: (_work(load) + left[load.rank], load.last_chosen))
        chosen.last_chosen = self._num_placed
        if key:
            self._tree.insert(key, str(chosen.rank))
        return Placement(chosen, left[chosen.rank])

    def forget(self, rank: int) -> None:
        self._tree.forget(str(rank))

    def _num_known(self, key: bytes, rank: int, num_tokens: int) -> int:
        """Prompt tokens that the replica probably has; at least one is computed in any case."""
        num_before = len(key) - num_tokens * _TOKEN_BYTES
        num_bytes = self._tree.match(key, (str(rank),)).num_bytes - num_before
        return min(max(num_bytes, 0) // _TOKEN_BYTES, num_tokens - 1)


def _work(load: Load) -> int:
    return load.num_new_tokens + OPEN_REQUEST_TOKENS * load.num_requests


def _key(request: Generate) -> bytes:
    """The prompt as bytes, behind those of its namespace: only in one are prefixes shared."""
    options = request.options
    space = b""
    if options.adapter or options.namespace:
        name = f"{len(options.adapter)}:{options.adapter}{options.namespace}"
        space = blake2b(name.encode(), digest_size=16).digest()
    return space + array("i", request.prompt_ids).tobytes()


BALANCERS: Mapping[str, Callable[[], Balancer]] = {
    "round_robin": RoundRobin,
    "total_requests": lambda: LeastLoaded(lambda load: load.num_requests),
    "total_tokens": lambda: LeastLoaded(lambda load: load.num_tokens),
    "prefix_aware": PrefixAware,
}
"""By the names of `ParallelConfig.balance`."""
