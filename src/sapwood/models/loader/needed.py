"""Which tensors of a checkpoint this rank reads: not those that other ranks have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from sapwood.layers.targets import Target
from sapwood.models.loader.fused_experts import FusedExperts
from sapwood.models.loader.reading import Wanted, every

Experts = Callable[[str], Sequence[int] | None]
"""By name, the experts of a tensor [experts, …] that a rank has; None of any other tensor."""


def no_experts(name: str) -> None:
    """An Experts of which no tensor is of all experts."""
    del name


class Needed:
    """A Wanted, by the names in the checkpoint.

    targets  of the model, by the names in the model
    name_of  from the former names to the latter
    wanted   by the names in the checkpoint: nothing else is needed
    """

    def __init__(
        self,
        targets: Mapping[str, Target],
        name_of: Callable[[str], str] = str,
        wanted: Wanted = every,
    ) -> None:
        self._targets = targets
        self._name_of = name_of
        self._wanted = wanted
        self._fused = FusedExperts(targets)

    def __call__(self, name: str) -> bool:
        if not self._wanted(name):
            return False
        experts = self.experts(name)
        if experts is not None:
            return bool(experts)
        own = self._name_of(name)
        target = self._targets.get(own)
        if target is None:
            owner = owner_of(own, self._targets)
            target = None if owner is None else self._targets[f"{owner}.weight"]
        return target is None or not target.is_elsewhere

    def experts(self, name: str) -> Sequence[int] | None:
        """The experts of a tensor [experts, …] that are read; None of any other tensor."""
        return self._fused.experts(self._name_of(name))


def owner_of(name: str, targets: Mapping[str, Target]) -> str | None:
    """The layer whose weight the tensor is a part of; None for a bias, a norm, …"""
    module = name
    while "." in module:
        module, _, _ = module.rpartition(".")
        target = targets.get(f"{module}.weight")
        if target is not None and len(target.shape) == 2:
            is_own = name != f"{module}.weight" and name in targets
            return None if is_own else module
    return None
