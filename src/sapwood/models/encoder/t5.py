"""The encoders of T5 1.1 and UMT5. Source: Raffel et al. 2019, arXiv:1910.10683; Chung et al. 2023,
arXiv:2304.09151.

Positions are numbers that are added to the scores of attention, by the distance of two tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.kernels.activations import Activation
from sapwood.layers.build import Build
from sapwood.layers.masked_attention import attend
from sapwood.layers.mlp import GatedMLP, PlainMLP
from sapwood.layers.named_linear import NamedLinear, linear
from sapwood.layers.norm import RMSNorm
from sapwood.layers.targets import Target, once_filled, prefixed, whole
from sapwood.models.encoder.prompts import PromptStates
from sapwood.models.hf_fields import epsilon, integer

_FEED_FORWARDS = {
    "gated-gelu": (True, Activation.GELU_TANH),
    "gated-silu": (True, Activation.SILU),
    "relu": (False, Activation.RELU),
    "gelu": (False, Activation.GELU),
}
"""config.json's feed_forward_proj -> (whether it is gated, its activation)"""


class T5Layer:
    """x + attention(norm(x)), then y + mlp(norm(y))."""

    def __init__(self, build: Build, hf: Mapping[str, Any], *, has_bias: bool) -> None:
        """has_bias: whether the layer has the numbers of distances"""
        size, width = integer(hf, "d_model"), integer(hf, "d_kv")
        eps = epsilon(hf, "layer_norm_epsilon", default=1e-6)
        self._num_heads, self._head_dim = integer(hf, "num_heads"), width
        inner = self._num_heads * width
        self._qkv = NamedLinear(build, size, dict.fromkeys(("q", "k", "v"), inner), bias=False)
        self._out = linear(build, "o", inner, size, bias=False)
        self._norms = tuple(RMSNorm(build, size, eps=eps) for _ in range(2))
        self._mlp = _feed_forward(build, hf)
        self._buckets = int(hf.get("relative_attention_num_buckets", 32))
        self._furthest = int(hf.get("relative_attention_max_distance", 128))
        self._bias = build.empty(self._buckets, self._num_heads) if has_bias else None

    def bias(self, length: int) -> Tensor | None:
        """[1, H, L, L]: what is added to the scores; None: the layer has no such numbers"""
        if self._bias is None:
            return None
        places = torch.arange(length)
        found = distance_buckets(
            places[None, :] - places[:, None], num_buckets=self._buckets, furthest=self._furthest
        )
        return F.embedding(found.to(self._bias.device), self._bias).permute(2, 0, 1)[None]

    def __call__(self, x: Tensor, shape: tuple[int, int], added: Tensor) -> Tensor:
        """x [B * L, size] -> the same shape; shape: (B, L); added [B or 1, H, L, L]"""
        heads = (*shape, 3, self._num_heads, self._head_dim)
        q, k, v = self._qkv(self._norms[0](x)).view(heads).unbind(2)
        mixed = attend(q, k, v, scale=1.0, added=added)
        x = x + self._out(mixed.flatten(0, 1))
        return x + self._mlp(self._norms[1](x))

    def targets(self) -> dict[str, Target]:
        attention = self._qkv.targets() | self._out.targets()
        if self._bias is not None:
            attention["relative_attention_bias.weight"] = whole(self._bias)
        return {
            **prefixed("layer.0.SelfAttention", attention),
            **prefixed("layer.0.layer_norm", self._norms[0].targets()),
            **prefixed("layer.1.DenseReluDense", once_filled(self._mlp.targets(), self._mlp.pack)),
            **prefixed("layer.1.layer_norm", self._norms[1].targets()),
        }


class T5Encoder:
    """Texts of equal length to the states after the last norm."""

    def __init__(self, hf: Mapping[str, Any], build: Build) -> None:
        """hf: config.json of the component, of a T5EncoderModel or UMT5EncoderModel"""
        size = integer(hf, "d_model")
        each = hf.get("model_type") == "umt5"
        self.size = size
        self._dtype = build.dtype
        self._words = build.empty(integer(hf, "vocab_size"), size)
        self._layers = [
            T5Layer(build, hf, has_bias=each or index == 0)
            for index in range(integer(hf, "num_layers"))
        ]
        self._norm = RMSNorm(build, size, eps=epsilon(hf, "layer_norm_epsilon", default=1e-6))

    def __call__(self, token_ids: Tensor, *, is_text: Tensor | None = None) -> PromptStates:
        """token_ids [B, L] int64

        is_text  [B, L] bool: tokens that others attend to; None: all, padding too
        """
        shape = (token_ids.shape[0], token_ids.shape[1])
        x = F.embedding(token_ids, self._words).flatten(0, 1)
        hidden = None
        if is_text is not None:
            hidden = torch.zeros(is_text.shape, dtype=self._dtype, device=x.device)
            hidden = hidden.masked_fill(~is_text, float("-inf"))[:, None, None]
        added: Tensor | None = None
        for layer in self._layers:
            own = layer.bias(shape[1])
            if own is not None:
                added = own if hidden is None else own + hidden
            assert added is not None, "the first layer has the numbers of distances"
            x = layer(x, shape, added)
        return PromptStates(self._norm(x).view(*shape, -1), None)

    def targets(self) -> dict[str, Target]:
        found = {"shared.weight": whole(self._words)}
        for index, layer in enumerate(self._layers):
            found |= prefixed(f"encoder.block.{index}", layer.targets())
        return found | prefixed("encoder.final_layer_norm", self._norm.targets())

    def ignorable_tensors(self) -> tuple[str, ...]:
        return ("decoder.*", "lm_head.*")

    @staticmethod
    def checkpoint_name(name: str) -> str:
        """The name in `targets()`: the embedding has two names, of which a checkpoint may have
        both."""
        return "shared.weight" if name == "encoder.embed_tokens.weight" else name


def distance_buckets(distances: Tensor, *, num_buckets: int, furthest: int) -> Tensor:
    """Which number belongs to each distance: the first half are for tokens before, the second for
    those after. Short distances have numbers of their own; longer ones share them, on a
    logarithmic scale, and all from `furthest` on have the last one. int64 of the same shape."""
    half = num_buckets // 2
    exact = half // 2
    after = (distances > 0).long() * half
    distances = distances.abs()
    steps = torch.log(distances.float() / exact) / math.log(furthest / exact) * (half - exact)
    shared = (exact + steps.clamp(min=0.0).long()).clamp(max=half - 1)
    return after + torch.where(distances < exact, distances, shared)


def _feed_forward(build: Build, hf: Mapping[str, Any]) -> GatedMLP | PlainMLP:
    kind = str(hf.get("feed_forward_proj", "relu"))
    if kind not in _FEED_FORWARDS:
        raise ConfigError(
            f"feed_forward_proj {kind!r} is not implemented; known: {', '.join(_FEED_FORWARDS)}"
        )
    gated, activation = _FEED_FORWARDS[kind]
    size, inner = integer(hf, "d_model"), integer(hf, "d_ff")
    if gated:
        return GatedMLP(build, size, inner, activation=activation, names=("wi_0", "wi_1", "wo"))
    return PlainMLP(build, size, inner, activation=activation, bias=False, names=("wi", "wo"))
