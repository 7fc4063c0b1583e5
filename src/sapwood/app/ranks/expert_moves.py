"""Moves experts between ranks while a model serves, so that all have about as much to compute.

Each rank reads the experts that come to it from the checkpoint, scales with them, between two
steps. All ranks count the same steps, and rank 0's counts of chosen experts decide for all.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from sapwood.app.building.loading import stored_weights
from sapwood.app.building.resolving import Resolved
from sapwood.base.errors import SapwoodError
from sapwood.distributed.groups import Group
from sapwood.kernels.coded import LinearPart
from sapwood.layers.expert_balance import balanced, busiest
from sapwood.layers.expert_slots import Movable, MovableExperts
from sapwood.layers.targets import Target, elsewhere
from sapwood.models.lm.decoder import Decoder
from sapwood.models.loader.assign import load_weights
from sapwood.schema.step import StepPlan

log = logging.getLogger(__name__)

R = TypeVar("R")


class ExpertMoves:
    """Counts steps, and moves experts before some of them.

    If a rank cannot read an expert, the experts stay where they are on all ranks, for good.
    """

    def __init__(
        self, model: Decoder, experts: MovableExperts, resolved: Resolved, tp: Group
    ) -> None:
        """experts  the layers of the model, all with counts
        tp       the ranks over which experts are spread"""
        parallel = resolved.config.parallel
        self._model = model
        self._layers: Sequence[Movable] = experts.layers
        self._resolved = resolved
        self._tp = tp
        self._ep_size = parallel.ep_size
        self._num_steps = 0
        self._due = parallel.eplb_rebalance_num_iterations
        self._chunk = parallel.eplb_rebalance_layers_per_chunk or len(self._layers)
        self._waiting: deque[tuple[Movable, tuple[int, ...]]] = deque()
        self._has_failed = False

    def before(self, run: Callable[[StepPlan], R]) -> Callable[[StepPlan], R]:
        """The same function; experts move before some of its steps."""

        def moved_and_run(plan: StepPlan) -> R:
            if plan.scheduled and not self._has_failed:
                self._before_step()
            return run(plan)

        return moved_and_run

    def _before_step(self) -> None:
        if self._waiting:
            size = min(self._chunk, len(self._waiting))
            self._move([self._waiting.popleft() for _ in range(size)])
            return
        if self._num_steps < self._due:
            self._num_steps += 1
            return
        self._num_steps = 0
        self._plan()

    def _plan(self) -> None:
        """Decide where experts go; they move before the next steps."""
        counts = [layer.slots.counts for layer in self._layers]
        every = torch.stack([one for one in counts if one is not None])
        # Ranks count alike unless rounding differs between them; of placements, there is one.
        of_layers: list[list[int]] = self._tp.broadcast(every).tolist()
        before = after = 0.0
        for layer, loads in zip(self._layers, of_layers, strict=True):
            now = layer.slots.placement
            then = balanced(now, loads, self._ep_size)
            before += busiest(now, loads, self._ep_size)
            after += busiest(then, loads, self._ep_size)
            if then != now:
                self._waiting.append((layer, then))
        for one in counts:
            assert one is not None, "the layers count"
            one.zero_()
        mean = sum(map(sum, of_layers)) / self._ep_size or 1.0
        log.info(
            "experts: the busiest rank of each layer had %.2f x the mean load; moving those of %d "
            "layers makes it %.2f x",
            before / mean,
            len(self._waiting),
            after / mean,
        )

    def _move(self, moves: Sequence[tuple[Movable, tuple[int, ...]]]) -> None:
        moving = {id(layer): placement for layer, placement in moves}
        for layer in self._layers:
            layer.plan_move(moving.get(id(layer), layer.slots.placement))
        coming = Coming(self._model)
        failure: str | None = None
        try:
            weights = [one for one in self._stored(coming) if one[0] in coming.names]
        except (SapwoodError, OSError) as error:
            failure = str(error)
        failed = torch.tensor([float(failure is not None)], device=self._resolved.device)
        if self._tp.all_reduce(failed).item():
            for layer in self._layers:
                layer.cancel()
            self._waiting.clear()
            self._has_failed = True
            log.error("experts stay where they are: %s", failure or "another rank cannot read some")
            return
        load_weights(coming, weights)
        for layer in self._layers:
            layer.settle()
        log.info("experts: moved the experts of %d layers", len(moves))

    def _stored(self, coming: Coming) -> Iterator[tuple[str, torch.Tensor | LinearPart]]:
        return stored_weights(
            coming.targets(),
            self._resolved.files,
            self._resolved.config,
            self._resolved.dtype,
            name_of=self._model.checkpoint_name,
            wanted=lambda name: not self._model.is_elsewhere(name),
        )


class Coming:
    """The tensors of the experts that come to this rank; the model needs no others."""

    def __init__(self, model: Decoder) -> None:
        self._ignorable = model.ignorable_tensors()
        self._targets = {name: _if_coming(one) for name, one in model.targets().items()}
        self.names = {name for name, one in self._targets.items() if not one.is_elsewhere}

    def targets(self) -> Mapping[str, Target]:
        return self._targets

    def ignorable_tensors(self) -> Sequence[str]:
        return self._ignorable


def _if_coming(target: Target) -> Target:
    if target.of_expert:
        return target
    return replace(elsewhere(target.shape), fused_in=target.fused_in)
