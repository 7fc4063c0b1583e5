"""Gemma 4 without its parts that see and hear. Source: Google 2026, its model code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.kernels.recording import CannotRecord, Program
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.layers.heads import QkvForm
from sapwood.layers.layer import FeedForward, Layer, Mixer, Stream, summed
from sapwood.layers.norm import RMSNorm
from sapwood.layers.per_layer import PerLayerBlock, PerLayerInputs
from sapwood.layers.streams import Streams
from sapwood.layers.targets import Target, prefixed, whole
from sapwood.models.config import FULL, AttentionHeads, DecoderConfig, every_nth_full
from sapwood.models.hf_fields import integer, switch
from sapwood.models.lm.gemma3 import Gemma3ForCausalLM
from sapwood.models.lm.gemma3n import (
    kv_sources,
    per_layer_block,
    per_layer_inputs,
    per_layer_parameters,
    unscaled_attention,
)

_ROPES = {
    "full_attention": {
        "rope_type": "proportional",
        "partial_rotary_factor": 0.25,
        "rope_theta": 1_000_000.0,
    },
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}


class Gemma4ForCausalLM(Gemma3ForCausalLM):
    """Gemma 3 where layers without a window have larger heads, whose values may be their keys; last
    layers attend to the keys and values of earlier ones; and each layer has a factor, and inputs of
    its own if config.json says so."""

    absent: ClassVar = {
        **Gemma3ForCausalLM.absent,
        "hidden_size": 2304,
        "hidden_size_per_layer_input": 256,
        "intermediate_size": 9216,
        "num_attention_heads": 8,
        "num_hidden_layers": 30,
        "num_key_value_heads": 4,
        "num_kv_shared_layers": 0,
        "rope_parameters": _ROPES,
        "sliding_window": 512,
        "vocab_size": 262_144,
        "vocab_size_per_layer_input": 262_144,
    }

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        found = {**cls.absent, **{name: value for name, value in hf.items() if value is not None}}
        kinds = found.get("layer_types") or every_nth_full(integer(found, "num_hidden_layers"), 6)
        return super().understood({**found, "layer_types": [*kinds[:-1], FULL]})

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        if hf.get("enable_moe_block") or hf.get("use_bidirectional_attention") == "all":
            raise ConfigError(
                "config.json asks for enable_moe_block, or for 'all' as "
                "use_bidirectional_attention, which are not implemented for Gemma 4"
            )
        # The other value of that field is for images.
        config = super().read({**hf, "use_bidirectional_attention": None})
        found = config.hf
        sources = kv_sources(found["layer_types"], integer(found, "num_kv_shared_layers"))
        is_wide, size = switch(found, "use_double_wide_mlp"), config.intermediate_size
        return replace(
            config,
            heads_by_layer=tuple(
                replace(_heads(config, index), source=source)
                for index, source in enumerate(sources)
            ),
            intermediate_sizes=tuple(
                2 * size if is_wide and source is not None else size for source in sources
            ),
            other_parameters=per_layer_parameters(config),
        )

    def norm(self, size: int | None = None) -> RMSNorm:
        return self.rms_norm(size)

    def mixer(self, index: int) -> Mixer:
        is_full = self.config.hf["layer_types"][index] == FULL
        are_keys = is_full and switch(self.config.hf, "attention_k_eq_v")
        return unscaled_attention(self, index, form=QkvForm(values_are_keys=are_keys))

    def feed_forward(self, index: int) -> FeedForward:
        return self.gated_mlp(size=self.config.intermediate_size_of(index))

    def streams(self) -> Streams | None:
        if not integer(self.config.hf, "hidden_size_per_layer_input"):
            return None
        return _WithInputs(per_layer_inputs(self), self.norm(), self.config.hidden_size)

    def layer(self, index: int) -> Layer:
        size, hidden_size = (
            integer(self.config.hf, "hidden_size_per_layer_input"),
            self.config.hidden_size,
        )
        first = hidden_size + index * size
        return _FactorLayer(
            super().layer(index),
            hidden_size,
            factor=self.build.empty(1),
            block=per_layer_block(self) if size else None,
            inputs=slice(first, first + size),
        )


class _WithInputs(Streams):
    """The hidden states, then the inputs of all layers: [T, hidden + layers * size]."""

    def __init__(self, inputs: PerLayerInputs, norm: RMSNorm, hidden_size: int) -> None:
        self._inputs = inputs
        self._norm = norm
        self._hidden_size = hidden_size

    def opened(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        return torch.cat((x, self._inputs(x, batch.token_ids)), dim=-1)

    def closed(self, x: Tensor) -> Tensor:
        return self._norm(x[:, : self._hidden_size].contiguous())

    def targets(self) -> dict[str, Target]:
        return self._inputs.targets() | prefixed("model.norm", self._norm.targets())

    def pack(self) -> None:
        self._inputs.pack()


class _FactorLayer(Layer):
    """factor * (x + block(x, inputs)) after another layer; without a block, factor * x."""

    def __init__(
        self,
        inner: Layer,
        hidden_size: int,
        *,
        factor: Tensor,
        block: PerLayerBlock | None,
        inputs: slice,
    ) -> None:
        """inputs: where those of this layer are in the streams"""
        self._inner = inner
        self._hidden_size = hidden_size
        self._factor = factor
        self._block = block
        self._own_inputs = inputs

    def __call__(
        self, x: Tensor, residual: Tensor | None, batch: ForwardBatch
    ) -> tuple[Tensor, Tensor | None]:
        """x [T, hidden], or [T, streams], which is changed then; there is never a residual"""
        if self._block is None:
            return summed(*self._inner(x, residual, batch)) * self._factor, None
        hidden = summed(*self._inner(x[:, : self._hidden_size].clone(), None, batch))
        hidden = hidden + self._block(hidden, x[:, self._own_inputs])
        x[:, : self._hidden_size] = hidden * self._factor
        return x, None

    def change_feed_forwards(self, change: Callable[[FeedForward], FeedForward]) -> None:
        self._inner.change_feed_forwards(change)

    def targets(self) -> dict[str, Target]:
        block = {} if self._block is None else self._block.targets()
        return self._inner.targets() | block | {"layer_scalar": whole(self._factor)}

    def pack(self) -> None:
        self._inner.pack()
        if self._block is not None:
            self._block.pack()

    def record(self, program: Program, stream: Stream) -> Stream:
        raise CannotRecord("a recorded step has no factors of layers")


def _heads(config: DecoderConfig, index: int) -> AttentionHeads:
    """Those of a layer, as the newest files say them, or the first ones."""
    hf = config.hf
    num_kv_heads, head_dim = config.num_kv_heads, config.head_dim
    if hf["layer_types"][index] == FULL:
        head_dim = integer(hf, "global_head_dim", default=512)
        if switch(hf, "attention_k_eq_v"):
            num_kv_heads = integer(hf, "num_global_key_value_heads", default=num_kv_heads)
    own = (hf.get("per_layer_config") or {}).get(str(index), {})
    return AttentionHeads(
        num_heads=config.num_heads,
        num_kv_heads=integer(own, "num_key_value_heads", default=num_kv_heads),
        head_dim=integer(own, "head_dim", default=head_dim),
    )
