"""What ops beside and on recurrent states have to be told besides tensors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedNormForm:
    """RMSNorms of equal groups of columns, together with a gate.

    group       columns that one norm is taken of
    eps         added to the mean of squares
    norm_first  norm(x) * weight * f(gate); else norm(x * f(gate)) * weight
    logistic    whether f is the logistic function; else it is SiLU
    Raises      ValueError if group is not positive
    """

    group: int
    eps: float
    norm_first: bool = True
    logistic: bool = False

    def __post_init__(self) -> None:
        if self.group < 1:
            raise ValueError(f"group must be >= 1, got {self.group}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeltaForm:
    """The heads and the learned numbers of a gated delta rule.

    num_key_heads  heads of queries and keys, each of which serves num_heads / num_key_heads
                   consecutive heads of values
    num_heads      heads of values, each with a state of its own [key_dim, value_dim]
    rate           [num_heads] fp32; a decay is e^(-rate * softplus(input + shift))
    shift          [num_heads] fp32, one decay per head; or [num_heads * key_dim], one per channel
                   of the keys
    write_scale    factor of the logistic function that says how much of a value is written: 1, or
                   2 for states that may change their sign (Grazzi et al. 2024, arXiv:2411.12537)
    eps            added to the sum of squares of a query, or of a key, before the root is taken
    lowest         logarithm of the lowest decay, below 0: decays are e^(lowest * logistic(rate *
                   (input + shift))) instead; None: they have no such bound
    Raises         ValueError if heads or tensors do not fit each other
    """

    num_key_heads: int
    num_heads: int
    key_dim: int
    value_dim: int
    rate: Tensor
    shift: Tensor
    write_scale: float = 1.0
    eps: float = 1e-6
    lowest: float | None = None

    def __post_init__(self) -> None:
        if self.lowest is not None and not self.lowest < 0:
            raise ValueError(f"the logarithm of a decay must be below 0, got {self.lowest}")
        if min(self.num_key_heads, self.num_heads, self.key_dim, self.value_dim) < 1:
            raise ValueError(f"impossible heads: {self}")
        if self.num_heads % self.num_key_heads:
            raise ValueError(
                f"{self.num_heads} heads are not a multiple of {self.num_key_heads} key heads"
            )
        if self.rate.shape != (self.num_heads,):
            raise ValueError(f"rate must be [{self.num_heads}], got {list(self.rate.shape)}")
        if self.shift.shape not in ((self.num_heads,), (self.num_heads * self.key_dim,)):
            raise ValueError(f"shift {list(self.shift.shape)} fits neither heads nor channels")

    @property
    def is_per_channel(self) -> bool:
        """Whether each channel of the keys has its own decay."""
        return self.key_dim > 1 and self.shift.shape[0] != self.num_heads

    @property
    def num_channels(self) -> int:
        """Columns of queries, keys and values together."""
        return 2 * self.num_key_heads * self.key_dim + self.num_heads * self.value_dim

    @property
    def out_size(self) -> int:
        return self.num_heads * self.value_dim
