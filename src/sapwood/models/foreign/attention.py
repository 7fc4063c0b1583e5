"""The attention that transformers' models call, by transformers' attention interface.

A model calls `attention(module, query, key, value, …)` in each of its layers. What runs then is
found at the module itself, so that models do not share anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sapwood.base.errors import ConfigError
from sapwood.kernels.attention_batch import AttentionTraits
from sapwood.kernels.interface import Kernels
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.layers.rotary import unrotated
from sapwood.models.config import DecoderConfig

NAME = "sapwood"
"""What transformers calls this attention. It makes no masks for a name that it does not know."""
_ATTENTION = "sapwood_attention"
"""The attribute of a module with what runs when it calls attention."""
_TENSORS_WITHOUT_EFFECT = frozenset({"position_ids", "cache_position"})
"""Tensors that models pass on and that change nothing here: positions are known otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Call:
    """What one layer asks of its attention.

    value_dim  size of a head's values
    head_dim   size of what the cache keeps of each: that of keys or of values, if these are larger
    scale      factor of the scores
    window, soft_cap, sinks  as in AttentionTraits
    """

    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    window: int | None
    soft_cap: float | None
    sinks: Tensor | None

    @staticmethod
    def of(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, asked: dict[str, Any]
    ) -> Call:
        """query [1, Hq, T, D], key [1, Hk, T, D], value [1, Hk, T, E].

        asked   the other arguments of the call, by name
        Raises  ConfigError for what paged attention does not have"""
        layer = getattr(module, "layer_idx", None)
        if not isinstance(layer, int):
            raise ConfigError(f"{type(module).__name__} does not know the index of its layer")
        if (asked.get("is_causal"), getattr(module, "is_causal", True)) in _BIDIRECTIONAL:
            raise ConfigError(f"the tokens of layer {layer} attend to later ones")
        known = _TENSORS_WITHOUT_EFFECT | {"s_aux", "sinks"}
        others = [
            name for name, one in asked.items() if isinstance(one, Tensor) and name not in known
        ]
        if others:
            raise ConfigError(
                f"the attention of layer {layer} takes {', '.join(others)}, which the kernels lack"
            )
        if key.shape[2] != query.shape[2]:
            raise ConfigError(
                f"layer {layer} attends to {key.shape[2]} keys of {query.shape[2]} tokens"
            )
        scale, cap = asked.get("scaling"), asked.get("softcap")
        sinks = asked.get("s_aux")
        return Call(
            layer=layer,
            num_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            head_dim=max(query.shape[3], value.shape[3]),
            value_dim=value.shape[3],
            scale=query.shape[3] ** -0.5 if scale is None else float(scale),
            window=asked.get("sliding_window") or None,
            soft_cap=None if cap is None else float(cap),
            sinks=asked.get("sinks") if sinks is None else sinks,
        )


_BIDIRECTIONAL = frozenset({(False, False), (False, True), (None, False)})
"""(is_causal of the call, of the module): the first counts, if it is there."""

Attention = Callable[[Call, Tensor, Tensor, Tensor], Tensor]
"""(call, query, key, value) as in Call.of -> [1, T, Hq, value_dim]"""


def register() -> None:
    """Make the attention known to transformers, by NAME. May be called again."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attention)


def attach(model: nn.Module, attention: Attention) -> None:
    """Let `attention` run wherever the modules of the model call attention."""
    for module in model.modules():
        setattr(module, _ATTENTION, attention)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **asked: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it; returns the result, and no weights."""
    if attention_mask is not None:
        raise ConfigError("the model makes a mask of its own for its attention")
    call = Call.of(module, query, key, value, asked)
    attention: Attention = getattr(module, _ATTENTION)
    return attention(call, query, key, value), None


class PagedAttention:
    """Attention over the paged KV cache, of the step whose batch is `batch`."""

    def __init__(self, kernels: Kernels, config: DecoderConfig, device: torch.device) -> None:
        self.batch: ForwardBatch | None = None
        self._kernels = kernels
        self._config = config
        # Queries and keys come rotated.
        self._cos_sin = unrotated(config.context_length, device)
        self._traits: dict[int, AttentionTraits] = {}

    def __call__(self, call: Call, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch = self.batch
        assert batch is not None, "a step sets the batch"
        num_tokens = query.shape[2]
        # Where keys and values differ in size, zeros add nothing to scores, nor to results.
        parts = [_padded(one[0], call.head_dim) for one in (query, key, value)]
        heads = torch.cat(parts).transpose(0, 1)
        key_cache, value_cache = batch.kv_caches[call.layer]
        inputs = batch.inputs_of(call.layer)
        q = self._kernels.qk_norm_rope_write_kv(
            heads.reshape(num_tokens, -1),
            num_heads=call.num_heads,
            num_kv_heads=call.num_kv_heads,
            head_dim=call.head_dim,
            q_norm=None,
            k_norm=None,
            eps=0.0,
            cos_sin=self._cos_sin,
            positions=batch.positions,
            key_cache=key_cache,
            value_cache=value_cache,
            write_index=inputs.write_index,
        )
        out = self._kernels.paged_attention(
            q, key_cache, value_cache, inputs.attention, call.scale, self._traits_of(call)
        )
        return out[None, :, :, : call.value_dim]

    def _traits_of(self, call: Call) -> AttentionTraits:
        if call.layer not in self._traits:
            self._traits[call.layer] = AttentionTraits(
                window=self._config.window_of(call.layer),
                soft_cap=call.soft_cap,
                sinks=None if call.sinks is None else call.sinks.float().contiguous(),
            )
        return self._traits[call.layer]


def _padded(heads: Tensor, size: int) -> Tensor:
    """heads [H, T, <= size] -> [H, T, size], with zeros"""
    missing = size - heads.shape[2]
    return functional.pad(heads, (0, missing)) if missing else heads
