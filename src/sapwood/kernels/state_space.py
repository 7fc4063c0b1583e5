"""What a state space layer knows of its heads: how fast states decay, and what they are fed.

Mamba's layers have these, and so has lightning attention, whose states decay at fixed rates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StateSpace:
    """H heads of P channels. Each head has a state [N, P], and the keys and queries (Mamba's B and
    C) of its group, one of G.

    rates     how fast states decay, at most 0, fp32: [H], or [H, N, P] if each entry of a state has
              its own
    dt_bias   added to the time steps, fp32: [H], or [H * P] if each channel has its own time step;
              None: there are no time steps, all are 1
    skip      factor of the input that is added to the output, fp32, as many as `dt_bias`; None: the
              input is not added
    dt_range  the smallest and the largest time step
    Raises    ValueError if the sizes do not fit each other
    """

    num_heads: int
    head_dim: int
    num_groups: int
    state_size: int
    rates: Tensor
    dt_bias: Tensor | None = None
    skip: Tensor | None = None
    dt_range: tuple[float, float] = (0.0, float("inf"))

    def __post_init__(self) -> None:
        if self.num_heads % self.num_groups:
            raise ValueError(f"{self.num_groups} groups cannot have equally many of the "
                             f"{self.num_heads} heads")  # fmt: skip
        each, per_head = self.shape, (self.num_heads,)
        wanted = (self.width,) if self.has_own_rates else per_head
        if self.rates.shape not in (per_head, each) or (self.has_own_rates and not self.has_steps):
            raise ValueError(f"rates {list(self.rates.shape)} must be {list(per_head)}, or with "
                             f"time steps {list(each)}")  # fmt: skip
        for name, tensor in (("dt_bias", self.dt_bias), ("skip", self.skip)):
            if tensor is not None and tensor.shape != wanted:
                raise ValueError(f"{name} {list(tensor.shape)} must be {list(wanted)}")
        for tensor in (self.rates, self.dt_bias, self.skip):
            if tensor is not None and tensor.dtype != torch.float32:
                raise ValueError("rates, dt_bias and skip must be float32")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a request's state: [H, N, P]."""
        return (self.num_heads, self.state_size, self.head_dim)

    @property
    def width(self) -> int:
        """Channels of all heads: H * P."""
        return self.num_heads * self.head_dim

    @property
    def has_own_rates(self) -> bool:
        """Whether each entry of a state has a rate, and each channel a time step (Mamba 1)."""
        return self.rates.dim() == 3

    @property
    def has_steps(self) -> bool:
        return self.dt_bias is not None

    @property
    def num_steps(self) -> int:
        """Time steps of a token."""
        if not self.has_steps:
            return 0
        return self.width if self.has_own_rates else self.num_heads

    def check(
        self, x: Tensor, b: Tensor, c: Tensor, dt: Tensor | None, gate: Tensor | None
    ) -> None:
        """ValueError unless these are inputs of one step, as Kernels.selective_scan takes them."""
        num_tokens, keys = x.shape[0], self.num_groups * self.state_size
        wanted = [("x", x, self.width), ("b", b, keys), ("c", c, keys)]
        if (dt is not None) != self.has_steps:
            raise ValueError("a layer has time steps and their bias, or neither")
        if dt is not None:
            wanted.append(("dt", dt, self.num_steps))
        if gate is not None:
            wanted.append(("gate", gate, self.width))
        for name, tensor, width in wanted:
            if tensor.shape != (num_tokens, width) or tensor.dtype != x.dtype:
                raise ValueError(
                    f"{name} {list(tensor.shape)} {tensor.dtype} must be [{num_tokens}, {width}] "
                    f"{x.dtype}"
                )
