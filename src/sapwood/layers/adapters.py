"""Where adapters add to a model's layers, and which rows of a step have which adapter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.kernels.interface import Kernels
from sapwood.kernels.low_rank import AdapterRows, LowRank, LowRankLayer
from sapwood.kernels.recording import AddLowRank, Program
from sapwood.kernels.recording_buffers import Buffer


@dataclass(frozen=True, slots=True, kw_only=True)
class StepAdapters:
    """The adapters of one step.

    rows        of all tokens
    selected    of the rows whose logits are wanted, counted among these; a recorded step computes
                its last layers for these alone
    is_covered  whether a recorded step has all that these adapters add
    """

    rows: AdapterRows
    selected: AdapterRows
    is_covered: bool = True


class AdapterContext:
    """The adapters of the step that is computed now.

    Linear layers are called with activations alone. So the step's adapters are told here, once for
    all layers of a model, before the step runs op by op; recorded steps get them as an argument.
    """

    def __init__(self) -> None:
        self.step: StepAdapters | None = None
        self.head_rows: AdapterRows | None = None
        """Of the rows that the output layer computes."""

    def site(self, kernels: Kernels, in_size: int, out_size: int) -> AdapterSite:
        """Where adapters add to a linear layer of these sizes."""
        return AdapterSite(self, kernels, in_size, out_size)

    @contextmanager
    def of(self, step: StepAdapters) -> Iterator[None]:
        """The step's adapters hold inside."""
        self.step, self.head_rows = step, step.selected
        try:
            yield
        finally:
            self.step = self.head_rows = None

    @contextmanager
    def scoring(self, slot: int, first: int, num_rows: int, device: torch.device) -> Iterator[None]:
        """Inside, the output layer computes num_rows rows, of which those from `first` on have
        this slot's adapter; slot -1: none has one."""
        before = self.head_rows
        is_adapted = slot >= 0 and first < num_rows
        self.head_rows = AdapterRows.from_row(first, num_rows, slot, device) if is_adapted else None
        try:
            yield
        finally:
            self.head_rows = before


class Addition(Protocol):
    """What one adapter adds at one site."""

    @property
    def num_bytes(self) -> int: ...

    def to(self, device: torch.device) -> Self:
        """The same on another device; what is there already is not copied."""
        ...


class Site(Protocol):
    """A place in a model where adapters add, in numbered slots.

    is_recorded  whether a recorded step has the additions
    """

    @property
    def is_recorded(self) -> bool: ...

    def place(self, slot: int, addition: Any) -> None:
        """From now on the slot has this addition, one of the kind that the site takes; None: it has
        none. ValueError if the addition does not fit."""
        ...


class AdapterSite:
    """A linear layer of this rank, to which adapters add; a Site of LowRank."""

    def __init__(
        self, context: AdapterContext, kernels: Kernels, in_size: int, out_size: int
    ) -> None:
        self.is_recorded = True
        self._context = context
        self._slots: set[int] = set()
        self._of_experts: Counter[int] | None = None
        self.layer: LowRankLayer = kernels.low_rank(in_size, out_size)

    def place(self, slot: int, addition: LowRank | None) -> None:
        """As LowRankLayer.place."""
        self.layer.place(slot, addition)
        if self._of_experts is not None:
            self._of_experts[slot] += (addition is not None) - (slot in self._slots)
        (self._slots.discard if addition is None else self._slots.add)(slot)

    def belongs_to_experts(self, slots: Counter[int], *, is_recorded: bool) -> None:
        """From now on `slots` counts, by slot, the sites of a mixture that have an addition."""
        self.is_recorded = is_recorded
        self._of_experts = slots

    def add(self, x: Tensor, out: Tensor) -> None:
        """out += what the adapters of the step that is computed now add, in place."""
        step = self._context.step
        if step is not None:
            self.layer.add(x, out, step.rows)

    def add_to_head(self, x: Tensor, out: Tensor) -> None:
        """The same for the output layer, which computes some rows only."""
        if self._context.head_rows is not None:
            self.layer.add(x, out, self._context.head_rows)

    def add_to(self, x: Tensor, out: Tensor, rows: AdapterRows) -> None:
        """The same for rows of one's own."""
        self.layer.add(x, out, rows)

    def record(self, program: Program, x: Buffer, out: Buffer) -> None:
        program.add(AddLowRank(x=x, layer=self.layer, residual=out))


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterTarget:
    """How an adapter of one of the checkpoint's layers lies in a site.

    site       the linear layer that has the checkpoint's layer as a part, or is it
    shape      (outputs, inputs) of the checkpoint's layer
    first_out  the part's first output in the site
    inputs     A [rank, all inputs] -> [rank, this rank's]
    outputs    B [all outputs, rank] -> [this rank's, rank], in the site's order
    """

    site: AdapterSite
    shape: tuple[int, int]
    first_out: int = 0
    inputs: Callable[[Tensor], Tensor] = lambda a: a
    outputs: Callable[[Tensor], Tensor] = lambda b: b

    def check(self, path: str, a: Tensor, b: Tensor, source: str) -> None:
        """ConfigError unless A [rank, in] and B [out, rank] fit the layer with that path."""
        if (b.shape[0], a.shape[1]) != self.shape:
            raise ConfigError(
                f"{source} has an adapter of {path} for {a.shape[1]} inputs and {b.shape[0]} "
                f"outputs, but the model's layer has {self.shape[1]} and {self.shape[0]}; is the "
                "adapter for another model?"
            )

    def part(self, a: Tensor, b: Tensor) -> tuple[int, Tensor, Tensor]:
        """As LowRank.of takes a part."""
        return self.first_out, self.inputs(a), self.outputs(b)
