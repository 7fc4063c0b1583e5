"""What a check is: a function from a Case and two implementations to pairs (got, wanted)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sapwood.kernels.interface import Kernels

LIMITS = {torch.float32: 2e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Largest difference that rounding may cause, relative to the largest wanted value."""
Pair = tuple[Tensor, Tensor]
CheckFunction = Callable[["Case", Kernels, Kernels], Iterable[Pair]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes, dtype and device of random operands; the same seed gives the same operands."""

    device: torch.device
    dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    hidden_size: int = 256
    vocab_size: int = 1000
    seed: int = 0
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "generator", torch.Generator().manual_seed(self.seed))

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype}, heads {self.num_heads}/{self.num_kv_heads} x {self.head_dim}"

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Drawn on the host, so that every device gets the same numbers."""
        drawn = torch.randn(shape, generator=self.generator)
        return drawn.to(self.dtype if dtype is None else dtype).to(self.device)

    def randint(self, high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=self.generator).to(self.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """The result of one check.

    error    largest difference relative to the largest wanted value
    failure  the error that was raised; None: none was
    """

    name: str
    case: str
    error: float
    limit: float
    seconds: float
    failure: str = ""

    @property
    def passed(self) -> bool:
        return not self.failure and self.error <= self.limit


class Checks(dict[str, tuple[CheckFunction, float | None]]):
    """Name -> (check, its limit); None: the limit of the dtype."""

    def add(
        self, name: str, *, limit: float | None = None
    ) -> Callable[[CheckFunction], CheckFunction]:
        def register(function: CheckFunction) -> CheckFunction:
            self[name] = (function, limit)
            return function

        return register


def difference(got: Tensor, wanted: Tensor) -> float:
    """The largest difference; infinite if only one of both values is NaN."""
    if got.shape != wanted.shape:
        raise ValueError(f"shape is {tuple(got.shape)} but must be {tuple(wanted.shape)}")
    got, wanted = got.double().cpu(), wanted.double().cpu()
    same = (got == wanted) | (got.isnan() & wanted.isnan())
    if bool(same.all()):
        return 0.0
    scale = wanted[wanted.isfinite()].abs().max().clamp(min=1e-6)
    largest = float(((got - wanted).abs()[~same]).max() / scale)
    return largest if largest == largest else float("inf")
