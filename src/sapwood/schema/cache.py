"""What tokens and requests leave behind in a model's layers, and how much memory that takes.

Layers whose tokens leave the same thing behind are a cache group; a model's configuration says
which groups it has. Groups whose memory comes and goes at the same times share a pool: a number of
a pool means one page, or one slot, in each of its groups. Everything that sizes, allocates, leases,
matches or evicts memory reads these two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from sapwood.base.dtypes import DTYPE_BYTES, KV_CACHE_8_BIT, KV_SCALE_BYTES

KV = "kv"
"""The dtype of a tensor whose numbers --kv-cache-dtype chooses."""
ACTIVATIONS = "activations"
"""The dtype of a tensor whose numbers are those of the activations."""
RECURRENT = "recurrent"
"""The dtype of a tensor of recurrent states, whose numbers --mamba-ssm-dtype chooses."""


class CacheKind(StrEnum):
    """What a layer keeps.

    FULL    keys and values of every token
    LATENT  one row for keys and values together, of every token
    WINDOW  keys and values of the last tokens
    STATE   one state per request, however many tokens it has
    """

    FULL = "full"
    LATENT = "latent"
    WINDOW = "window"
    STATE = "state"


@dataclass(frozen=True, slots=True)
class CacheTensor:
    """One tensor of a layer's cache.

    shape  of one token, or of one slot if the group's kind is STATE
    dtype  its name as in base/dtypes, KV, ACTIVATIONS, or RECURRENT
    split  dimension that ranks share out: heads, or channels. Where ranks outnumber its units,
           several have the same one. None: every rank has the whole
    units  what the split dimension has one after another: (units, entries of each); none: all of
           its entries, as units of one
    """

    shape: tuple[int, ...]
    dtype: str = KV
    split: int | None = 0
    units: tuple[tuple[int, int], ...] = ()

    def of_rank(self, num_ranks: int) -> CacheTensor:
        """One rank's part, of as many ranks."""
        if self.split is None:
            return self
        sizes = list(self.shape)
        units = self.units or ((sizes[self.split], 1),)
        own = tuple((max(1, number // num_ranks), entries) for number, entries in units)
        sizes[self.split] = sum(number * entries for number, entries in own)
        return replace(self, shape=tuple(sizes), units=own if self.units else ())

    @property
    def num_bytes(self) -> int:
        """Bytes of one token or slot. An 8-bit dtype has a scale for each vector."""
        num_entries = math.prod(self.shape)
        if self.dtype in KV_CACHE_8_BIT:
            return num_entries + num_entries // self.shape[-1] * KV_SCALE_BYTES
        return num_entries * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheGroup:
    """Layers whose tokens leave the same thing behind.

    layers   indices into the model's layers
    tensors  by name: keys and values, one latent row, or convolution and recurrent state
    window   tokens that stay visible, the newest included; None unless the kind is WINDOW
    Raises   ValueError if there is no layer or no tensor, or if kind and window contradict
    """

    kind: CacheKind
    layers: tuple[int, ...]
    tensors: Mapping[str, CacheTensor]
    window: int | None = None

    def __post_init__(self) -> None:
        if not self.layers or not self.tensors:
            raise ValueError("a cache group needs at least one layer and one tensor")
        if (self.kind is CacheKind.WINDOW) != (self.window is not None):
            raise ValueError(f"a cache group of kind {self.kind} has the window {self.window}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be >= 1, got {self.window}")

    @property
    def unit_bytes(self) -> int:
        """Bytes of one token, or of one slot, in all layers together."""
        return self.bytes_of(len(self.layers))

    def bytes_of(self, num_layers: int) -> int:
        """Bytes of one token, or of one slot, in so many of the layers."""
        return num_layers * sum(tensor.num_bytes for tensor in self.tensors.values())

    def of_rank(self, num_ranks: int) -> CacheGroup:
        """What one of the ranks keeps that share each layer; each has whole latent rows."""
        if self.kind is CacheKind.LATENT:
            return self
        tensors = {name: tensor.of_rank(num_ranks) for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors)

    def with_dtypes(self, *, kv: str, activations: str, recurrent: str = "float32") -> CacheGroup:
        """The group with names of dtypes in the places of KV, ACTIVATIONS and RECURRENT."""
        names = {KV: kv, ACTIVATIONS: activations, RECURRENT: recurrent}
        tensors = {
            name: replace(tensor, dtype=names.get(tensor.dtype, tensor.dtype))
            for name, tensor in self.tensors.items()
        }
        return replace(self, tensors=tensors)


def keys_and_values(
    layers: Sequence[int],
    *,
    num_kv_heads: int,
    head_dim: int,
    window: int | None = None,
    dtype: str = KV,
) -> CacheGroup:
    """The group of attention layers that keep a key and a value per token and head."""
    tensor = CacheTensor((num_kv_heads, head_dim), dtype)
    return CacheGroup(
        kind=CacheKind.FULL if window is None else CacheKind.WINDOW,
        layers=tuple(layers),
        tensors={"k": tensor, "v": tensor},
        window=window,
    )


def latent_rows(
    layers: Sequence[int], *, width: int, index_width: int = 0, dtype: str = KV
) -> CacheGroup:
    """The group of attention layers that keep one row of `width` entries per token, for all heads
    and on every rank; and with an index_width another one, by which they choose keys."""
    tensors = {"latent": CacheTensor((1, width), dtype)}
    if index_width:
        tensors["index"] = CacheTensor((1, index_width), dtype)
    return CacheGroup(kind=CacheKind.LATENT, layers=tuple(layers), tensors=tensors)


def shifted(groups: Sequence[CacheGroup], first_layer: int) -> tuple[CacheGroup, ...]:
    """The same groups of layers that are numbered from `first_layer` on: those of a second model
    whose caches come after the first one's."""
    return tuple(
        replace(group, layers=tuple(first_layer + layer for layer in group.layers))
        for group in groups
    )


def within(groups: Sequence[CacheGroup], context_length: int) -> tuple[CacheGroup, ...]:
    """The same groups for a context of that length: a window that holds it all is none."""
    alike: dict[int, CacheGroup] = {}
    for index, group in enumerate(groups):
        if group.window is not None and group.window >= context_length:
            group = replace(group, kind=CacheKind.FULL, window=None)
        same = next(
            (at for at, kept in alike.items() if replace(kept, layers=group.layers) == group), index
        )
        if same in alike:
            group = replace(group, layers=tuple(sorted({*alike[same].layers, *group.layers})))
        alike[same] = group
    return tuple(alike.values())


@dataclass(frozen=True, slots=True)
class CachePool:
    """Groups that share page numbers, because they keep the same tokens, or slot numbers.

    kind    FULL if every token is kept, latent rows included; WINDOW; or STATE
    groups  indices of the groups
    """

    kind: CacheKind
    groups: tuple[int, ...]
    window: int | None = None

    @property
    def name(self) -> str:
        """Tells the pools of a model apart: "full", "window_4096", "state"."""
        return str(self.kind) if self.window is None else f"{self.kind}_{self.window}"


FULL_POOL = CachePool(CacheKind.FULL, (0,))
"""The one pool of a model with full attention in all layers."""


def pools_of(groups: Sequence[CacheGroup]) -> tuple[CachePool, ...]:
    """The pools of a model: at most one that keeps every token, then one for each window, the
    shortest first, then at most one of slots."""
    members: dict[tuple[int, int], list[int]] = {}
    for index, group in enumerate(groups):
        place = {CacheKind.WINDOW: 1, CacheKind.STATE: 2}.get(group.kind, 0)
        members.setdefault((place, group.window or 0), []).append(index)
    kinds = (CacheKind.FULL, CacheKind.WINDOW, CacheKind.STATE)
    return tuple(
        CachePool(kinds[place], tuple(indices), window or None)
        for (place, window), indices in sorted(members.items())
    )


def pages_of_window(window: int, num_new: int, page_size: int) -> int:
    """Pages of a window pool that a step of `num_new` tokens of one request touches at most."""
    num_tokens = window - 1 + num_new
    return 1 + -(-(num_tokens - 1) // page_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What the pools must serve at once.

    num_requests  running requests
    step_tokens   new tokens of one step, over all requests
    """

    num_requests: int
    step_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CachePlan:
    """How a model's cache groups share memory; the groups must have definite dtypes.

    state_interval  tokens between the states that are kept for prefixes
    num_states      size of the pool of states; None: as `sizes` finds it
    state_memory_ratio  memory of the states for prefixes at most, relative to that of the pages
    window_share    tokens of a window pool, relative to all tokens of context; None: as `sizes`
                    finds it
    held            numbers of the layers whose memory this rank has, if others have the rest; None:
                    all. Pools have the same sizes on all ranks, but not the same bytes
    """

    groups: tuple[CacheGroup, ...]
    page_size: int
    demand: Demand
    state_interval: int = 256
    num_states: int | None = None
    state_memory_ratio: float = 1.0
    window_share: float | None = None
    held: frozenset[int] | None = None

    @property
    def pools(self) -> tuple[CachePool, ...]:
        return pools_of(self.groups)

    def sizes(self, num_tokens: int) -> tuple[int, ...]:
        """Pages, or slots, of each pool, for `num_tokens` tokens of context over all requests.

        A window pool has no more than running requests can use at once: all windows, and the new
        tokens of a step. If a share was asked for, the pool has this, but always what one request
        can use. A pool of states has a slot for each running request, and as many again
        for prefixes; or as many for these as there are places for them in all tokens of context, if
        they take no more memory than `state_memory_ratio` times the pages of these tokens.
        """
        pages = num_tokens // self.page_size
        sizes = []
        for pool in self.pools:
            if pool.window is not None:
                sizes.append(min(pages, self._wanted_window_pages(pool.window, pages)))
            elif pool.kind is CacheKind.STATE:
                sizes.append(self.num_states or self._enough_states(num_tokens))
            else:
                sizes.append(pages)
        return tuple(sizes)

    def explained(self, num_tokens: int) -> str:
        """What each pool of these sizes has, and why."""
        parts = []
        for pool, size in zip(self.pools, self.sizes(num_tokens), strict=True):
            number = sum(len(self._held(index)) for index in pool.groups)
            layers = f"{number} layer" if number == 1 else f"{number} layers"
            mib = size * self.unit_bytes(pool) / 2**20
            if pool.window is not None:
                kept = size * self.page_size
                parts.append(
                    f"{kept} tokens for windows of {pool.window} in {layers}, {mib:.1f} MiB: "
                    f"{self._why_window_pages(pool.window, size, num_tokens // self.page_size)}"
                )
            elif pool.kind is CacheKind.STATE:
                kept = max(size - self.demand.num_requests, 0)
                parts.append(
                    f"{size} states in {layers}, {mib:.1f} MiB: {size - kept} for running "
                    f"requests, and {kept} for prefixes, every {self.state_interval} tokens and at "
                    "the end of each prompt"
                )
            else:
                parts.append(f"all {size * self.page_size} tokens in {layers}, {mib:.1f} MiB")
        return "; ".join(parts)

    def num_bytes(self, num_tokens: int) -> int:
        """Bytes of all pools of these sizes."""
        sizes = self.sizes(num_tokens)
        return sum(
            size * self.unit_bytes(pool) for pool, size in zip(self.pools, sizes, strict=True)
        )

    def most_tokens(self, num_bytes: int, *, enough: int) -> int:
        """The most tokens of context, in whole pages, whose pools fit into `num_bytes`.

        enough  the limit for a model without layers that keep every token: there more context takes
                no more memory once the window pools have all that requests can use
        """
        per_token = sum(
            self.groups[index].bytes_of(len(self._held(index)))
            for pool in self.pools
            if pool.kind is CacheKind.FULL
            for index in pool.groups
        )
        limit = num_bytes // per_token if per_token else enough
        low, high = 0, limit // self.page_size
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.num_bytes(middle * self.page_size) <= num_bytes
            low, high = (middle, high) if fits else (low, middle - 1)
        return low * self.page_size

    def unit_bytes(self, pool: CachePool) -> int:
        """Bytes of a page, or of a slot, of a pool, on this rank."""
        num_tokens = 1 if pool.kind is CacheKind.STATE else self.page_size
        return num_tokens * sum(
            self.groups[index].bytes_of(len(self._held(index))) for index in pool.groups
        )

    def _held(self, group: int) -> tuple[int, ...]:
        """Those layers of the group whose memory this rank has."""
        layers, held = self.groups[group].layers, self.held
        return layers if held is None else tuple(layer for layer in layers if layer in held)

    def _enough_states(self, num_tokens: int) -> int:
        """Slots of the pool of states; at least two for each running request."""
        whole = replace(self, held=None)
        pools, num_requests = self.pools, self.demand.num_requests
        full_bytes = sum(
            num_tokens // self.page_size * whole.unit_bytes(pool)
            for pool in pools
            if pool.kind is CacheKind.FULL
        )
        affordable = int(self.state_memory_ratio * full_bytes) // whole.unit_bytes(pools[-1])
        return num_requests + max(num_requests, min(num_tokens // self.state_interval, affordable))

    def _wanted_window_pages(self, window: int, pages: int) -> int:
        """Pages of a window pool; it may be more than there are of context."""
        if self.window_share is None:
            return self._most_window_pages(window, self.demand.num_requests)
        return max(math.ceil(self.window_share * pages), self._most_window_pages(window, 1))

    def _most_window_pages(self, window: int, num_requests: int) -> int:
        """Pages that so many requests use at once, together with a step's new tokens."""
        per_request = pages_of_window(window, 1, self.page_size) + 1
        return num_requests * per_request + -(-self.demand.step_tokens // self.page_size)

    def _why_window_pages(self, window: int, size: int, pages: int) -> str:
        if size == pages:
            return "as many as there is context"
        if self.window_share is None:
            return "all that running requests need"
        if size == self._most_window_pages(window, 1):
            return "what one request needs, which is more than --swa-full-tokens-ratio asks for"
        return f"{self.window_share:g} of all tokens, by --swa-full-tokens-ratio"
