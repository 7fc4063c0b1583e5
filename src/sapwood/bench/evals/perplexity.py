"""Perplexity: how well a model, as it is served, predicts a text.

The text is cut into independent windows; in each, every token but the first is scored. The model
computes a window like the prompt of a request: over the paged KV cache, in chunks.
Source: Jelinek et al. 1977, "Perplexity - a measure of the difficulty of speech recognition tasks".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.executor.cache_inputs import CachePlaces
from sapwood.executor.runner import DecoderModel
from sapwood.kernels.attention_batch import AttentionBatch
from sapwood.layers.forward_batch import CacheInputs, ForwardBatch
from sapwood.memory.buffers import allocate_caches
from sapwood.models.config import DecoderConfig
from sapwood.schema.cache import CacheKind, pools_of

CHUNK_TOKENS = 256
"""New tokens of one forward pass, whose logits are all held at the same time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """negative_log_likelihood is the mean over the scored tokens, in nats."""

    num_tokens: int
    negative_log_likelihood: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.negative_log_likelihood)


class WindowScorer:
    """Scores windows of tokens with a model; holds the KV pages of one window."""

    def __init__(
        self,
        model: DecoderModel,
        decoder: DecoderConfig,
        *,
        window: int,
        page_size: int,
        device: torch.device,
        kv_cache_dtype: str,
        dtype: str,
    ) -> None:
        """A scorer of windows of tokens; dtype: of activations."""
        self._model = model
        self._device = device
        num_pages = -(-window // page_size)
        # A window's mask is the layer's own, and all of its pages stay.
        groups = [
            group.with_dtypes(kv=kv_cache_dtype, activations=dtype)
            for group in decoder.cache_groups
        ]
        sizes = [1 if pool.kind is CacheKind.STATE else num_pages for pool in pools_of(groups)]
        self._kv_caches = allocate_caches(groups, sizes, page_size=page_size, device=device)
        self._num_groups = len(groups)
        self._group_of_layer = CachePlaces(groups).group_of_layer
        # A window is a text of its own, which may be a long one (layers/rotary).
        switch = decoder.switch_length
        self._first_position = 0 if switch is None or window <= switch else switch
        self._slot = torch.zeros(1, dtype=torch.int64, device=device)
        self._page_table = torch.arange(num_pages, dtype=torch.int32, device=device)[None]

    @torch.inference_mode()
    def __call__(self, token_ids: Sequence[int]) -> float:
        """The summed negative log-likelihood, in nats, of all tokens but the first."""
        tokens = torch.tensor(token_ids, dtype=torch.int64, device=self._device)
        total = 0.0
        for first in range(0, len(token_ids) - 1, CHUNK_TOKENS):
            end = min(first + CHUNK_TOKENS, len(token_ids) - 1)
            logits = self._model.compute(self._batch(tokens[first:end], first))
            log_probabilities = logits.float().log_softmax(dim=-1)
            following = tokens[first + 1 : end + 1, None]
            total -= log_probabilities.gather(1, following).double().sum().item()
        return total

    def _batch(self, tokens: Tensor, first: int) -> ForwardBatch:
        num_new = tokens.numel()
        length = first + num_new
        # The window's pages are those of the pool in order: a token's place is its position.
        positions = torch.arange(first, length, device=self._device)
        inputs = CacheInputs(
            write_index=positions,
            attention=AttentionBatch(
                page_table=self._page_table,
                query_start=torch.tensor([0, num_new], dtype=torch.int32, device=self._device),
                context_len=torch.tensor([length], dtype=torch.int32, device=self._device),
                query_lens=(num_new,),
                context_lens=(length,),
                num_decodes=int(num_new == 1),
            ),
            slots=self._slot,
        )
        return ForwardBatch(
            token_ids=tokens,
            positions=positions + self._first_position,
            write_index=inputs.write_index,
            attention=inputs.attention,
            groups=[inputs] * self._num_groups if self._group_of_layer else (),
            group_of_layer=self._group_of_layer,
            kv_caches=self._kv_caches,
            logits_index=torch.arange(num_new, device=self._device),
        )


def measure(
    score: WindowScorer, token_ids: Sequence[int], *, window: int, num_tokens: int
) -> Perplexity:
    """Perplexity over whole windows of the first `num_tokens` tokens.

    Raises ConfigError if the text has less than one window."""
    num_windows = min(len(token_ids), num_tokens) // window
    if num_windows == 0:
        raise ConfigError(
            f"the text has {len(token_ids)} tokens, less than one --window of {window}; "
            "give a longer text or a shorter window"
        )
    total = sum(
        score(token_ids[index * window : (index + 1) * window]) for index in range(num_windows)
    )
    num_scored = num_windows * (window - 1)
    return Perplexity(num_tokens=num_scored, negative_log_likelihood=total / num_scored)
