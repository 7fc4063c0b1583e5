"""The routes of one run in another.

Rounding moves a token whose experts have nearly equal scores to other experts. What these make of
it is far away, so that such a run says nothing about rounding elsewhere. The weights of Phi-3.5-MoE
jump too: they depend on which experts' logits are near enough to the largest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sapwood.kernels.routing import Routing
from sapwood.kernels.torch_ops import TorchKernels

JUMP = 0.1
"""A difference of weights that is no rounding error."""
Calls = list[tuple[Tensor, Tensor]]
"""The weights [T, k] and experts [T, k] of each call."""


class Routes:
    """What the routers of a run choose; `like`: what they are made to choose.

    calls      what they chose
    num_moved  tokens that would have had other experts, or weights far from these, counted once per
               layer
    """

    def __init__(self, like: Calls | None = None) -> None:
        self._like = like
        self.calls: Calls = []
        self.num_moved = 0

    def take(self, weights: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """weights and chosen [T, k] of a router -> those to go on with."""
        if self._like is not None:
            other_weights, other = self._like[len(self.calls)]
            own, theirs = chosen.sort(), other.sort()
            is_same = (own.values == theirs.values).all(dim=-1, keepdim=True)
            jumps = weights.gather(1, own.indices) - other_weights.gather(1, theirs.indices)
            is_same &= jumps.abs().amax(dim=-1, keepdim=True) < JUMP
            weights = torch.where(is_same, weights, other_weights.to(weights.dtype))
            chosen = torch.where(is_same, chosen, other)
            self.num_moved += int((~is_same).sum())
        self.calls.append((weights, chosen))
        return weights, chosen


class RoutedKernels(TorchKernels):
    """Routers choose through `routes`."""

    def __init__(self, routes: Routes) -> None:
        super().__init__()
        self._routes = routes

    def route(self, logits: Tensor, bias: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
        return self._routes.take(*super().route(logits, bias, routing))


@contextmanager
def routed(model: nn.Module, routes: Routes) -> Iterator[None]:
    """The same for a model of transformers, whose experts are called with hidden states, chosen
    experts and weights; or whose routers give weights that are 0 for all other experts."""

    def before(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, chosen, weights = inputs
        weights, chosen = routes.take(weights, chosen)
        return x, chosen, weights

    def after(router: Any, _: Any, outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        scores, logits = outputs
        weights, chosen = routes.take(*scores.topk(router.top_k))
        return torch.zeros_like(scores).scatter_(1, chosen, weights), logits

    hooks = []
    for module in model.modules():
        name = type(module).__name__
        if name == "Llama4Router":
            hooks.append(module.register_forward_hook(after))
        elif name.endswith("Experts") and not name.startswith("Llama4"):
            hooks.append(module.register_forward_pre_hook(before))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
