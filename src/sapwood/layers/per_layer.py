"""Inputs that each layer of a model gets of every token, beside the hidden states.

Source: Gemma 3n's model code, Google 2025."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sapwood.kernels.activations import Activation
from sapwood.layers.build import Build
from sapwood.layers.embedding import VocabEmbedding
from sapwood.layers.norm import RMSNorm
from sapwood.layers.streams import WholeLinear
from sapwood.layers.targets import Target, prefixed


class PerLayerInputs:
    """(norm(projection(x) / sqrt(hidden)) + embedding) / sqrt(2), for all layers at once."""

    def __init__(
        self,
        build: Build,
        *,
        hidden_size: int,
        num_layers: int,
        size: int,
        vocab_size: int,
        eps: float,
    ) -> None:
        """size: inputs of one layer; vocab_size: rows of the embedding, of which the first serves
        tokens beyond the last"""
        # Rounded like the scale of the usual embedding.
        scale = torch.tensor(size**0.5, dtype=build.dtype).item()
        self._embedding = VocabEmbedding(build, vocab_size, num_layers * size, scale=scale)
        self._projection = WholeLinear(build, hidden_size, num_layers * size)
        self._norm = RMSNorm(build, size, eps=eps)
        self._vocab_size = vocab_size
        self._size = size
        self._scale = hidden_size**-0.5

    def __call__(self, x: Tensor, token_ids: Tensor) -> Tensor:
        """Embeddings x [T, hidden] and token_ids [T] -> [T, layers * size]"""
        projected = (self._projection(x) * self._scale).view(-1, self._size)
        normed = self._norm(projected).view(x.shape[0], -1)
        known = token_ids.masked_fill(token_ids >= self._vocab_size, 0)
        return (normed + self._embedding(known)) * math.sqrt(0.5)

    def targets(self) -> dict[str, Target]:
        return {
            **prefixed("model.embed_tokens_per_layer", self._embedding.targets()),
            **prefixed("model.per_layer_model_projection", self._projection.targets()),
            **prefixed("model.per_layer_projection_norm", self._norm.targets()),
        }

    def pack(self) -> None:
        self._projection.pack()


class PerLayerBlock:
    """norm(projection(activation(gate(x)) * inputs)) of one layer."""

    def __init__(
        self, build: Build, *, hidden_size: int, size: int, activation: Activation, eps: float
    ) -> None:
        self._gate = WholeLinear(build, hidden_size, size)
        self._projection = WholeLinear(build, size, hidden_size)
        self._norm = RMSNorm(build, hidden_size, eps=eps)
        self._activation = activation
        self._kernels = build.kernels

    def __call__(self, x: Tensor, inputs: Tensor) -> Tensor:
        """x [T, hidden], inputs [T, size] -> [T, hidden]"""
        gated = self._kernels.activate(self._gate(x), self._activation) * inputs
        return self._norm(self._projection(gated))

    def targets(self) -> dict[str, Target]:
        return {
            **prefixed("per_layer_input_gate", self._gate.targets()),
            **prefixed("per_layer_projection", self._projection.targets()),
            **prefixed("post_per_layer_input_norm", self._norm.targets()),
        }

    def pack(self) -> None:
        self._gate.pack()
        self._projection.pack()
