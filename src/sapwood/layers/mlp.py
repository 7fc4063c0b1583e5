"""The gated feed-forward layer (SwiGLU). Source: Shazeer 2020, arXiv:2002.05202."""

from __future__ import annotations

import torch
from torch import Tensor

from sapwood.distributed.groups import Group
from sapwood.kernels.activations import Activation
from sapwood.kernels.interface import Kernels, PackedLinear
from sapwood.layers.linear import ColumnParallelLinear, RowParallelLinear, even_part
from sapwood.layers.quantization.dense import DENSE
from sapwood.layers.quantization.interface import LinearScheme
from sapwood.layers.targets import Target


class GatedMLP:
    """down(silu(gate(x)) * up(x)), gate and up as one matrix product."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool,
        kernels: Kernels,
        group: Group,
        device: torch.device,
        dtype: torch.dtype,
        scheme: LinearScheme = DENSE,
    ) -> None:
        self._kernels = kernels
        self._gate_up = ColumnParallelLinear(
            hidden_size,
            tuple(even_part(name, intermediate_size, group) for name in ("gate_proj", "up_proj")),
            bias=bias,
            kernels=kernels,
            device=device,
            dtype=dtype,
            scheme=scheme,
        )
        self._down = RowParallelLinear(
            "down_proj",
            intermediate_size,
            hidden_size,
            bias=bias,
            kernels=kernels,
            group=group,
            device=device,
            dtype=dtype,
            scheme=scheme,
        )

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, hidden] -> [T, hidden]"""
        return self.project(self.expand(x))

    def expand(self, x: Tensor) -> Tensor:
        """x [T, hidden] -> silu(gate(x)) * up(x), [T, intermediate]"""
        return self._kernels.activate_and_mul(self._gate_up(x), Activation.SILU)

    def project(self, expanded: Tensor) -> Tensor:
        """expanded [T, intermediate] -> [T, hidden]"""
        return self._down(expanded)

    def targets(self) -> dict[str, Target]:
        return self._gate_up.targets() | self._down.targets()

    def pack(self) -> None:
        self._gate_up.linear.pack()
        self._down.linear.pack()

    @property
    def gate_up(self) -> PackedLinear:
        """hidden -> this rank's gates, then its ups; RuntimeError before `pack`."""
        return self._gate_up.linear.packed

    @property
    def down(self) -> PackedLinear:
        return self._down.linear.packed
