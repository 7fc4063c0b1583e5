"""What kernels make of weights once, to be called again and again."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class PackedLinear(Protocol):
    """A linear layer whose weight is in the layout that its implementation wants."""

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, out], same dtype as x."""
        ...

    def fp32(self, x: Tensor) -> Tensor:
        """The same in fp32, not rounded to x's dtype where the kernels can: for logits, of which
        bfloat16 tells apart only every eighth at 16 to 32."""
        ...

    def unpacked(self) -> Tensor | None:
        """The weight [out, in] as it was packed; None if the kernels keep it in another form."""
        ...

    def refill(self, weight: Tensor) -> bool:
        """Take other numbers [out, in] of the same dtype into the same memory, so that what refers
        to it computes with them. False, without a change, if the kernels cannot."""
        ...


class PackedHeads(Protocol):
    """A linear layer of each head, [H, out, in]."""

    def __call__(self, x: Tensor, out: Tensor) -> None:
        """out[t, h] = weight[h] @ x[t, h], and then those entries of x[t, h] that come after `in`.

        x    [T, H, in + kept], out [T, H, out + kept]; both may be parts of the entries of longer
             heads"""
        ...


class PackedExperts(Protocol):
    """The feed-forward layer of a mixture. Source: Fedus et al. 2021, arXiv:2101.03961."""

    @property
    def can_be_captured(self) -> bool:
        """Whether it never looks at the choice on the host, so that what a device captured of it
        stays right for other choices."""
        ...

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Of each token the sum over its experts of weight * down(activation(gate) * up), added up
        in fp32. Only experts that a token has are read.

        x        [T, hidden] -> [T, hidden]
        chosen   [T, k] int64, the experts of each token; weights [T, k] fp32
        Raises   ValueError for an expert that is not there"""
        ...
