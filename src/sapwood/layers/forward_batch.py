"""The input of one forward pass on one rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from sapwood.kernels.interface import AttentionBatch


@dataclass(frozen=True, slots=True)
class InputEmbeds:
    """Vectors in the place of the embeddings of E tokens of a step.

    at       [E] int64; rows of the T
    vectors  [E, hidden], of any floating-point dtype
    """

    at: Tensor
    vectors: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """T new tokens of R requests, in the order of the requests.

    token_ids      [T] int64
    positions      [T] int64; a token's index in its request
    write_index    [T] int64; where its KV goes: page * page_size + offset
    attention      which keys each token attends to
    kv_caches      per layer: (keys, values), each [num_pages, Hk, page_size, D], or in 8 bits
    logits_index   [S] int64; rows of the T whose logits are wanted
    token_types    [T] int64, which text of a pair each token is of; None: there are no pairs
    embeds         in the place of what token_ids say of some tokens; None: of none
    attend         called instead of the kernels' paged_attention, with its arguments: where a step
                   is recorded piece by piece, attention is between the pieces
    """

    token_ids: Tensor
    positions: Tensor
    write_index: Tensor
    attention: AttentionBatch
    kv_caches: Sequence[tuple[Tensor, Tensor]]
    logits_index: Tensor
    token_types: Tensor | None = None
    embeds: InputEmbeds | None = None
    attend: Callable[..., Tensor] | None = None
