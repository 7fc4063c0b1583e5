"""What a policy is, and what it may look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar


class Candidate(Protocol):
    """A worker that could take the request.

    load  open requests at the worker, times its cost
    """

    @property
    def id(self) -> str: ...
    @property
    def load(self) -> float: ...


C = TypeVar("C", bound=Candidate)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What a policy knows of a request.

    text  the prompt as its JSON spells it, up to some length; b"" if the policy needs none
    ids   likewise the prompt's token ids; b"": it has none, or the worker's cache keeps it apart
          from other prompts
    key   the routing key: requests with the same one belong together; "": none
    """

    text: bytes = b""
    ids: bytes = b""
    key: str = ""


@dataclass(slots=True)
class PrefixCounts:
    """Bytes of prompts, and how many of these their workers had probably seen before."""

    num_bytes: int = 0
    num_known_bytes: int = 0


class Policy(Protocol):
    """Chooses one of several workers.

    needs_text  whether `Call.text` is looked at, so that the body must be read for it
    prefixes    what was found of the prompts' beginnings; None: the policy does not look
    """

    @property
    def needs_text(self) -> bool: ...
    @property
    def prefixes(self) -> PrefixCounts | None: ...

    def choose(self, candidates: Sequence[C], call: Call) -> C:
        """One of the candidates, of which there is at least one.

        The policy may remember its choice: the request is sent to that worker."""
        ...

    def forget(self, worker_id: str) -> None:
        """The worker is gone, or was down: it holds no prefixes any more."""
        ...


def least_loaded(candidates: Sequence[C]) -> C:
    return min(candidates, key=lambda candidate: candidate.load)


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """When workers count as unbalanced: if both thresholds are exceeded."""

    abs_threshold: float = 64
    rel_threshold: float = 1.5

    def is_lost(self, candidates: Sequence[Candidate]) -> bool:
        loads = [candidate.load for candidate in candidates]
        low, high = min(loads), max(loads)
        return high - low > self.abs_threshold and high > low * self.rel_threshold
