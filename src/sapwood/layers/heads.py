"""The heads of attention, and how checkpoints keep their projections."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sapwood.distributed.groups import Group
from sapwood.layers.linear import Arrangement, Part, divide, even_part, share


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadLayout:
    """The heads of the whole model.

    num_heads     query heads
    num_kv_heads  key and value heads; num_heads is a multiple of this number
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int

    def num_heads_of(self, group: Group) -> int:
        """Query heads of one rank; ConfigError if the ranks cannot have equally many."""
        return divide(self.num_heads, group, f"{self.num_heads} attention heads")

    def num_kv_heads_of(self, group: Group) -> int:
        """Key and value heads of one rank; several ranks share a head if there are more ranks.

        Raises ConfigError if the ranks cannot have equally many."""
        return share(self.num_kv_heads, group, f"{self.num_kv_heads} key and value heads")[1]

    def first_kv_head_of(self, group: Group) -> int:
        """The first key and value head of this rank."""
        return group.rank * self.num_kv_heads // group.size

    def qkv_parts(
        self,
        group: Group,
        names: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj"),
        value_dim: int | None = None,
    ) -> tuple[Part, Part, Part]:
        """This rank's q, k and v in the fused projection.

        names      theirs in the checkpoint
        value_dim  size of a value head; None: head_dim
        """
        self.num_heads_of(group)
        num_kv_heads = self.num_kv_heads_of(group)
        first = self.first_kv_head_of(group)
        k, v = (
            Part(name, self.num_kv_heads * size, first * size, num_kv_heads * size)
            for name, size in zip(
                names[1:], (self.head_dim, value_dim or self.head_dim), strict=True
            )
        )
        return even_part(names[0], self.num_heads * self.head_dim, group), k, v


@dataclass(frozen=True, slots=True, kw_only=True)
class QkvForm:
    """How a checkpoint keeps the projections to queries, keys and values.

    names       of the three layers, if each is one
    fused       name of the one layer that holds all three; None: there are three
    grouped     in the fused one: the queries of a key and value head, then its key and its value,
                before those of the next head; else all queries, all keys, all values
    transposed  whether weights are [in, out]
    pairs       how many of a head's first entries rotate as neighbouring pairs. Kernels rotate two
                halves, so these rows of queries and keys are put in that order: scores stay the
                same, since both change alike. 0: the entries are in that order already
    gated       whether the layer of queries has, of each head, the query and then as many inputs of
                a gate on what attention gives; only of separate layers
    values_are_keys  whether there is no layer for values: they are the projected keys, before
                norms and rotation; only of separate layers
    """

    names: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj")
    fused: str | None = None
    grouped: bool = False
    transposed: bool = False
    pairs: int = 0
    gated: bool = False
    values_are_keys: bool = False

    def arrangement(self, heads: HeadLayout, group: Group) -> Arrangement | None:
        """Which rows of the checkpoint's tensors are this rank's; None: nothing is unusual."""
        if self.fused is None and not self.transposed and not self.pairs and not self.gated:
            return None
        num_kv_heads = heads.num_kv_heads_of(group)
        num_heads = heads.num_heads_of(group)
        first_kv = heads.first_kv_head_of(group)
        queries = torch.arange(num_heads) + group.rank * num_heads
        others = torch.arange(num_kv_heads) + first_kv
        if self.fused is None:
            places = (queries * 2 if self.gated else queries, others, others)
        elif self.grouped:
            per_group = heads.num_heads // heads.num_kv_heads
            width = per_group + 2
            places = (
                queries // per_group * width + queries % per_group,
                others * width + per_group,
                others * width + per_group + 1,
            )
        else:
            places = (
                queries,
                others + heads.num_heads,
                others + heads.num_heads + heads.num_kv_heads,
            )
        order = halves_of_pairs(heads.head_dim, self.pairs)
        plain = torch.arange(heads.head_dim)
        rows = tuple(
            (place[:, None] * heads.head_dim + within).flatten()
            for place, within in zip(places, (order, order, plain), strict=True)
        )
        return Arrangement(rows=rows, fused=self.fused, transposed=self.transposed)

    def gates(self, heads: HeadLayout, group: Group) -> Arrangement:
        """Which rows of the layer of queries are this rank's gates, if it is `gated`."""
        own = heads.num_heads_of(group)
        places = (torch.arange(own) + group.rank * own) * 2 + 1
        rows = places[:, None] * heads.head_dim + torch.arange(heads.head_dim)
        return Arrangement(rows=(rows.flatten(),))


SEPARATE = QkvForm()


def halves_of_pairs(head_dim: int, num_paired: int) -> Tensor:
    """[head_dim] int64: the order of a head's entries in which its first `num_paired` ones, which
    rotate as neighbouring pairs, come as two halves; the others stay where they are."""
    paired = torch.arange(num_paired)
    return torch.cat((paired[0::2], paired[1::2], torch.arange(num_paired, head_dim)))


def alibi_slopes(num_heads: int, *, max_bias: float = 8.0) -> Tensor:
    """[num_heads] fp32: the slopes of ALiBi, 2 ** (-max_bias * i / n) for i = 1 to n heads. If n is
    no power of 2, every second slope of the next power comes first, then the ones between.
    Source: Press et al. 2021, arXiv:2108.12409, and its model code."""
    count = 1 << max(0, num_heads - 1).bit_length()
    slopes = torch.exp2(-max_bias / count * torch.arange(1, count + 1, dtype=torch.float32))
    if count != num_heads:
        slopes = torch.cat((slopes[1::2], slopes[::2]))[:num_heads]
    return slopes.contiguous()
