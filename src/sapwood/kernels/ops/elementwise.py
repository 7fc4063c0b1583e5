"""Embeddings, norms, activations, gates and copies: each row by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from sapwood.kernels.activations import Activation


class ElementwiseOps(Protocol):
    """See `Kernels` (kernels/interface.py) for what the letters of the shapes stand for."""

    def embedding(
        self, token_ids: Tensor, weight: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        """token_ids [T] int64, weight [vocab, hidden] -> [T, hidden] of `dtype`, by default the
        weight's own, which may be narrower."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [T, hidden] -> x / rms(x) * weight; the mean of squares is taken in fp32.
        Source: Zhang and Sennrich 2019, arXiv:1910.07467."""
        ...

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """(rms_norm(x + residual), x + residual); `residual` may be overwritten with the sum."""
        ...

    def norm_rotate_heads(
        self, x: Tensor, norm: Tensor | None, eps: float, rotations: Tensor | None, out: Tensor
    ) -> None:
        """out = each head of x, first normalised as rms_norm does, then with neighbouring pairs of
        its entries rotated in fp32.

        x          [T, H * D]; rows may lie apart
        norm       [D] of x's dtype; None: no norm
        rotations  [T, D / 2] complex64; None: nothing rotates
        out        [T, H, D], contiguous"""
        ...

    def layer_norm(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        """x [T, hidden] -> (x - mean(x)) / deviation(x) * weight + bias; mean and variance are
        taken in fp32. weight and bias are [hidden] of x's dtype, or None: 1 and 0.
        Source: Ba et al. 2016, arXiv:1607.06450."""
        ...

    def activate(self, x: Tensor, activation: Activation) -> Tensor:
        """x [T, I] -> activation(x), computed in fp32."""
        ...

    def add_to(self, x: Tensor, total: Tensor) -> None:
        """total += x, both contiguous, of one shape and one dtype."""
        ...

    def xielu(self, x: Tensor, above: float, below: float) -> Tensor:
        """x [T, I] -> above x² + x / 2 where x is more than 0, else below (e^x - 1 - x) + x / 2,
        computed in fp32. Source: Huang and Schlag 2024, arXiv:2411.13010."""
        ...

    def activate_and_mul(self, x: Tensor, activation: Activation) -> Tensor:
        """x [T, 2 * I] -> activation(x[:, :I]) * x[:, I:]. Source: Shazeer 2020,
        arXiv:2002.05202."""
        ...

    def copy_rows(self, tensor: Tensor, source: Tensor, target: Tensor) -> None:
        """tensor[target[i]] = tensor[source[i]] for all i at once, in place: every row is read
        before any is written, so that no pair reads what another one wrote.

        tensor  [N, ...], for instance pages or states
        source  [n] int64; target likewise, different ones"""
        ...

    def carry_rows(
        self, source: Tensor, target: Tensor, from_rows: Sequence[int], to_rows: Sequence[int]
    ) -> None:
        """target[to_rows[i]] = source[from_rows[i]], between the host's and the device's memory.

        source  [N, bytes] uint8, whose rows may lie apart; so may those of target [M, bytes], which
        is other memory. What is on the host is page-locked, if the device runs ahead of it: then
        the copies are queued behind the current stream's work"""
        ...

    def gate_rows(self, x: Tensor, gate: Tensor) -> None:
        """x [T, n] *= the logistic function of gate [T, 1], in fp32 and in place. x is contiguous,
        and both have one dtype."""
        ...

    def gate_columns(self, x: Tensor, gate: Tensor) -> None:
        """x [T, n] *= the logistic function of gate [T, n], in fp32 and in place. x is contiguous,
        and both have one dtype; rows of the gate may lie apart."""
        ...
