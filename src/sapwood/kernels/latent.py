"""Latent attention: the sizes of its heads, and which of its two forms costs less. No torch.

A token leaves one row behind for all heads: a latent, of which each head makes a key and a value,
and a rotated key that all heads share. Attention has two forms, which give the same result:

- absorbed: a query is multiplied into the space of the rows first, so that all heads read the rows
  as they are; of a row the latent is the value, too;
- expanded: keys and values of all heads are made of the rows, once for all new tokens of a request.

The first form makes each pair of a query and a key dearer, the second one makes each key dearer.

Source: DeepSeek-AI 2024, arXiv:2405.04434 (DeepSeek-V2), section 2.1.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSizes:
    """The heads of latent attention, of all ranks together.

    num_heads   query heads
    rank        entries of a latent
    rope_dim    entries of the rotated key that all heads share
    nope_dim    entries of a head's own key, which is not rotated
    value_dim   entries of a head's value
    query_rank  entries of the latent that queries are made of; None: they are made of the layer's
                inputs
    Raises      ValueError for a size below 1, or an odd row, which 8-bit caches cannot hold
    """

    num_heads: int
    rank: int
    rope_dim: int
    nope_dim: int
    value_dim: int
    query_rank: int | None = None

    def __post_init__(self) -> None:
        sizes = (self.num_heads, self.rank, self.rope_dim, self.nope_dim, self.value_dim)
        if min(*sizes, self.query_rank or 1) < 1:
            raise ValueError(f"sizes of latent attention must be >= 1, got {self}")
        if self.row % 2:
            raise ValueError(f"rank and rope_dim must add up to an even number, got {self.row}")

    @property
    def row(self) -> int:
        """Entries that a token leaves behind."""
        return self.rank + self.rope_dim

    @property
    def key_dim(self) -> int:
        """Entries of a head's query, and of its key."""
        return self.nope_dim + self.rope_dim

    @property
    def made(self) -> int:
        """Entries that a head makes of a latent: its own key, then its value."""
        return self.nope_dim + self.value_dim

    @property
    def expanded_dim(self) -> int:
        """Entries of a head in the expanded form, where keys and values are equally long."""
        longer = max(self.key_dim, self.value_dim)
        return -(-longer // _STEP) * _STEP

    def num_parameters(self, hidden_size: int) -> int:
        """Weights of a layer's matrices."""
        queries = self.num_heads * self.key_dim
        first = self.query_rank or 0
        return (
            hidden_size * (first + self.row + self.num_heads * self.value_dim)
            + (self.query_rank or hidden_size) * queries
            + self.rank * self.num_heads * self.made
        )

    def expands(self, num_new: int, num_keys: int) -> bool:
        """Whether the expanded form costs fewer multiplications for a request of `num_keys` tokens,
        of which the last `num_new` ones are new."""
        if num_new < _FEW_ROWS:
            return False
        pairs = num_new * num_keys - num_new * (num_new - 1) // 2
        absorbed = num_new * self.rank * self.made + pairs * (self.row + self.rank)
        expanded = num_keys * self.rank * self.made + pairs * 2 * self.expanded_dim
        return expanded < absorbed


_STEP = 32
"""Expanded heads are filled up with zeros to a multiple of this number, as kernels want them."""

_FEW_ROWS = 16
"""Fewer new tokens are not worth a request's own products."""
