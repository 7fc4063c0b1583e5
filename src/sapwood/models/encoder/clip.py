"""CLIP's text encoder, with a projection or without. Source: Radford et al. 2021,
arXiv:2103.00020.

Tokens attend to those before them; a layer normalises first (pre-norm)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.kernels.activations import Activation
from sapwood.layers.build import Build
from sapwood.layers.masked_attention import attend
from sapwood.layers.mlp import PlainMLP
from sapwood.layers.named_linear import NamedLinear, linear
from sapwood.layers.norm import LayerNorm
from sapwood.layers.targets import Target, once_filled, prefixed, whole
from sapwood.models.encoder.prompts import PromptStates
from sapwood.models.hf_fields import activation, epsilon, integer

_FIRST_EOS = 2
"""The end token's id in config.json of the first checkpoints, which is not the tokenizer's: there
the largest id is the end."""


class ClipLayer:
    """x + attention(norm(x)), then y + mlp(norm(y))."""

    def __init__(self, build: Build, hf: Mapping[str, Any]) -> None:
        size = integer(hf, "hidden_size")
        eps = epsilon(hf, "layer_norm_eps", default=1e-5)
        self._num_heads = integer(hf, "num_attention_heads")
        self._head_dim = size // self._num_heads
        self._qkv = NamedLinear(build, size, dict.fromkeys(("q_proj", "k_proj", "v_proj"), size))
        self._out = linear(build, "out_proj", size, size)
        self._norms = tuple(LayerNorm(build, size, eps=eps) for _ in range(2))
        self._mlp = PlainMLP(
            build,
            size,
            integer(hf, "intermediate_size"),
            activation=Activation(activation(hf, "hidden_act", default="quick_gelu")),
            bias=True,
            names=("fc1", "fc2"),
        )

    def __call__(self, x: Tensor, shape: tuple[int, int]) -> Tensor:
        """x [B * L, size] -> the same shape; shape: (B, L)"""
        heads = (*shape, 3, self._num_heads, self._head_dim)
        q, k, v = self._qkv(self._norms[0](x)).view(heads).unbind(2)
        mixed = attend(q, k, v, scale=self._head_dim**-0.5, is_causal=True)
        x = x + self._out(mixed.flatten(0, 1))
        return x + self._mlp(self._norms[1](x))

    def targets(self) -> dict[str, Target]:
        return {
            **prefixed("self_attn", self._qkv.targets() | self._out.targets()),
            **prefixed("layer_norm1", self._norms[0].targets()),
            **prefixed("layer_norm2", self._norms[1].targets()),
            **prefixed("mlp", once_filled(self._mlp.targets(), self._mlp.pack)),
        }


class ClipTextEncoder:
    """Texts of equal length to the states of a layer and one vector each."""

    def __init__(self, hf: Mapping[str, Any], build: Build) -> None:
        """hf: config.json of the component, of a CLIPTextModel or CLIPTextModelWithProjection"""
        size = integer(hf, "hidden_size")
        names = hf.get("architectures") or ()
        self._eos = int(hf.get("eos_token_id", _FIRST_EOS))
        self.size = size
        self.context_length = integer(hf, "max_position_embeddings")
        self._words = build.empty(integer(hf, "vocab_size"), size)
        self._positions = build.empty(self.context_length, size)
        self.num_layers = integer(hf, "num_hidden_layers")
        self._layers = [ClipLayer(build, hf) for _ in range(self.num_layers)]
        self._norm = LayerNorm(build, size, eps=epsilon(hf, "layer_norm_eps", default=1e-5))
        self._projection = None
        if "CLIPTextModelWithProjection" in names:
            width = int(hf.get("projection_dim", 512))
            self._projection = linear(build, "text_projection", size, width, bias=False)

    def __call__(
        self, token_ids: Tensor, *, skipped_layers: int = 0, is_normed: bool = True
    ) -> PromptStates:
        """token_ids [B, L] int64

        skipped_layers  last layers without which the states are computed; `pooled` has them all
        is_normed       whether the last norm is computed of the states too
        """
        shape = (token_ids.shape[0], token_ids.shape[1])
        x = F.embedding(token_ids, self._words) + self._positions[: shape[1]]
        x = x.flatten(0, 1)
        states = x
        for index, layer in enumerate(self._layers):
            if index == self.num_layers - skipped_layers:
                states = x
            x = layer(x, shape)
        if not skipped_layers:
            states = x
        last = self._norm(x).view(*shape, -1)
        pooled = last[torch.arange(shape[0]), self._ends(token_ids)]
        if self._projection is not None:
            pooled = self._projection(pooled)
        states = self._norm(states) if is_normed else states
        return PromptStates(states.view(*shape, -1), pooled)

    def _ends(self, token_ids: Tensor) -> Tensor:
        """[B]: where each text ends"""
        if self._eos == _FIRST_EOS:
            return token_ids.argmax(dim=-1)
        return (token_ids == self._eos).int().argmax(dim=-1)

    def targets(self) -> dict[str, Target]:
        found = {
            "embeddings.token_embedding.weight": whole(self._words),
            "embeddings.position_embedding.weight": whole(self._positions),
        }
        for index, layer in enumerate(self._layers):
            found |= prefixed(f"encoder.layers.{index}", layer.targets())
        found |= prefixed("final_layer_norm", self._norm.targets())
        return found if self._projection is None else found | self._projection.targets()

    def ignorable_tensors(self) -> tuple[str, ...]:
        return ("embeddings.position_ids",)

    @staticmethod
    def checkpoint_name(name: str) -> str:
        """The name in `targets()` of a tensor of the checkpoint."""
        return name.removeprefix("text_model.")
