"""The ops that layers call, with the signatures that every implementation has.

Shapes use: T new tokens of all requests, R requests, Hq query heads, Hk key and value heads, D head
size.

The KV cache of one layer is a pair of tensors [num_pages, Hk, page_size, D]: one page holds
page_size consecutive tokens of one request, and the tokens of one head lie together in it: a head's
part of a page is one contiguous tile. A token's `write_index` is page * page_size + offset within
the page. A cache of an 8-bit dtype (`kernels/kv_cache.py`) is [num_pages, Hk, page_size, D + 2],
since its tiles hold numbers and then scales; every op takes either kind.
"""

from __future__ import annotations

from typing import Protocol

from sapwood.kernels.ops.attention import AttentionOps
from sapwood.kernels.ops.elementwise import ElementwiseOps
from sapwood.kernels.ops.latent import LatentOps
from sapwood.kernels.ops.products import ProductOps
from sapwood.kernels.ops.sampling import SamplingOps
from sapwood.kernels.ops.states import StateOps
from sapwood.kernels.ops.steps import StepOps


class Kernels(
    AttentionOps, LatentOps, ElementwiseOps, StateOps, ProductOps, SamplingOps, StepOps, Protocol
):
    """The ops of one platform. All tensors of a call are on one device.

    multiplies_quantized  whether `pack_quantized_linear` keeps weights quantised; else it
                          dequantises them, and they are no smaller than dense ones
    can_be_captured       whether a batch's sizes are read from its tensors alone, so that what a
                          device captured of these ops stays right for other batches; the numbers
                          that `AttentionBatch` has on the host are then upper bounds of decodes
    captures_experts      whether `pack_experts` gives what can be captured, at least if all experts
                          are stored alike
    isa                   the instruction set used, or "" for those that have no choice
    """

    name: str
    multiplies_quantized: bool
    can_be_captured: bool
    captures_experts: bool

    @property
    def isa(self) -> str: ...

    @property
    def exact_products(self) -> bool:
        """What `set_exact_products` chose: then layers, too, compute a row in one way, whatever
        other rows there are."""
        ...

    def set_num_threads(self, num_threads: int) -> None:
        """Threads that compute an op on a CPU, the caller included."""
        ...

    def set_exact_products(self, exact: bool) -> None:
        """Whether a row of a product depends on that row and the weights alone, and attention on a
        token's query and keys alone (which it does anyhow on CPUs); at first it does not. Layers
        that are packed already follow. Raises ConfigError if these kernels have no such choice."""
        ...
