"""Chooses the implementation of the ops: the fastest of those that can serve a given need."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, cast

import torch

from sapwood.base.errors import ConfigError
from sapwood.base.registry import Registry
from sapwood.kernels.interface import Kernels
from sapwood.kernels.kv_cache import LARGEST_NUMBER

IMPLEMENTATIONS: Mapping[str, str] = {
    "triton": "sapwood.kernels.triton.factory:TRITON",
    "cpu": "sapwood.kernels.cpu:CpuKernels",
    "torch": "sapwood.kernels.torch_ops:TorchKernels",
    "reference": "sapwood.kernels.reference:ReferenceKernels",
}
"""Name -> "module:Name", the fastest first. The target is a `KernelsFactory`, loaded when asked."""

PLUGINS = "sapwood.kernels"
"""The group of entry points by which packages add implementations (docs/hardware.md). They come
after what is made for a GPU or a CPU here, and before what runs wherever torch does."""

EVERYWHERE = frozenset({"torch", "reference"})
"""Implementations that run wherever torch does."""

VARIANTS: Mapping[str, str] = {"cpu": "sapwood.kernels.cpu:with_isa"}
"""Name -> "module:name" of a function that makes these kernels with less than this machine has:
"cpu:avx2" is variant "avx2" of "cpu". ValueError for a variant that cannot be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """The device and the model that the ops must serve.

    device     torch's device type: "cpu", "cuda", …
    dtype      dtype of weights and activations
    head_dim   entries of one attention head
    page_size  tokens of one KV page
    attention  features of AttentionTraits (kernels/interface.py) that the model's layers have
    kv_dtype   dtype of the KV cache, whose 8-bit kinds are in kernels/kv_cache.py; None: `dtype`
    """

    device: str
    dtype: torch.dtype
    head_dim: int
    page_size: int
    attention: frozenset[str] = frozenset()
    kv_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.head_dim < 1 or self.page_size < 1:
            raise ValueError(
                f"head_dim and page_size must be >= 1, got {self.head_dim} and {self.page_size}"
            )

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        parts = [f"{dtype} on {self.device}", f"head size {self.head_dim}"]
        if self.kv_dtype not in (None, self.dtype):
            parts.append(f"KV cache in {str(self.kv_dtype).removeprefix('torch.')}")
        return ", ".join([*parts, f"page size {self.page_size}", *sorted(self.attention)])

    def why_not_kv(self) -> str | None:
        """Why ops for KV caches of `dtype` or 8 bits cannot serve the need; None if they can."""
        if self.kv_dtype in (None, self.dtype):
            return None
        if self.kv_dtype in LARGEST_NUMBER:
            is_odd = self.head_dim % 2 != 0
            return (
                f"an 8-bit KV cache needs an even head size, not {self.head_dim}"
                if is_odd
                else None
            )
        return f"the KV cache is {self.kv_dtype}, neither {self.dtype} nor in 8 bits"


class KernelsFactory(Protocol):
    """An implementation, as the table names it: a class with a `why_not` of its own."""

    def why_not(self, need: Need) -> str | None:
        """Why this implementation cannot serve the need (no compiler, …); None if it can."""
        ...

    def __call__(self) -> Kernels:
        """Make the ops. Only called after `why_not` has returned None."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The chosen implementation.

    kernels   the ops
    refusals  name -> reason, for each faster implementation that could not serve the need
    why       one line for the operator
    """

    kernels: Kernels
    refusals: Mapping[str, str]
    why: str


def select_kernels(
    need: Need, only: str | None = None, table: Mapping[str, str] = IMPLEMENTATIONS
) -> Selection:
    """The fastest implementation that can serve `need`; with `only`, the one of that name.

    only    a name, or a name and a variant: "cpu:avx2"
    Raises  ConfigError with the reason of each implementation if none can serve the need, and if
            there is no implementation called `only`
    """
    registry: Registry[KernelsFactory] = Registry("kernels", dict(table), entry_point=PLUGINS)
    asked, _, variant = (only or "").partition(":")
    names = [asked] if asked else kernel_names(table)
    refusals: dict[str, str] = {}
    for name in names:
        factory, reason = _load(registry, name, need)
        if factory is not None and reason is None:
            kernels = _variant(name, variant) if variant else factory()
            return Selection(kernels=kernels, refusals=refusals, why=_explain(name, only, refusals))
        refusals[name] = reason or "unavailable"
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
    raise ConfigError(
        f"no kernels for {need} ({reasons}); "
        "choose another --dtype, --kv-cache-dtype or --device, or leave the choice of kernels to "
        "sapwood"
    )


def kernel_names(table: Mapping[str, str] = IMPLEMENTATIONS) -> list[str]:
    """The names of all implementations in the order in which they are tried."""
    known = Registry[KernelsFactory]("kernels", dict(table), entry_point=PLUGINS).names()
    added = [name for name in known if name not in table]
    made_here = [name for name in table if name not in EVERYWHERE]
    return [*made_here, *added, *(name for name in table if name in EVERYWHERE)]


def _variant(name: str, variant: str) -> Kernels:
    """ConfigError if these kernels have no such variant on this machine."""
    if name not in VARIANTS:
        raise ConfigError(f"kernels {name} have no variants; use --kernels {name}")
    make = Registry[Callable[[str], Kernels]]("kernels' variants", dict(VARIANTS)).get(name)
    try:
        return make(variant)
    except ValueError as error:
        raise ConfigError(f"--kernels is {name}:{variant}, but {error}") from error


def _load(
    registry: Registry[KernelsFactory], name: str, need: Need
) -> tuple[KernelsFactory | None, str | None]:
    """An implementation, or the reason why it cannot serve; failing to import is such a reason."""
    try:
        factory = registry.get(name)
    except ImportError as error:
        return None, f"cannot be imported ({error})"
    return factory, cast(Callable[[Need], str | None], factory.why_not)(need)


def _explain(name: str, only: str | None, refusals: Mapping[str, str]) -> str:
    if only is not None:
        return f"{only}: asked for"
    if not refusals:
        return f"{name}: the fastest"
    reasons = "; ".join(f"{other}: {reason}" for other, reason in refusals.items())
    return f"{name}: the fastest that can ({reasons})"
