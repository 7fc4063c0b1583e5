"""BERT, RoBERTa and XLM-RoBERTa. Source: Devlin et al. 2018, arXiv:1810.04805; Liu et al. 2019,
arXiv:1907.11692; Conneau et al. 2019, arXiv:1911.02116.

A layer adds first and normalises then (post-norm); all linear layers have biases.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from sapwood.kernels.activations import Activation
from sapwood.layers.bidirectional import BidirectionalAttention
from sapwood.layers.build import Build
from sapwood.layers.embedding import VocabEmbedding
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.layers.layer import Layer, NamedNorm, Sublayer
from sapwood.layers.mlp import PlainMLP
from sapwood.layers.norm import LayerNorm
from sapwood.layers.targets import Target, once_filled, prefixed, whole
from sapwood.models.encoder.config import EncoderConfig
from sapwood.models.encoder.heads import encoder_head

BASES = ("bert.", "roberta.")
"""Prefixes of the names in checkpoints of models with a head."""


def make_layer(config: EncoderConfig, build: Build) -> Layer:
    """over(x + attention(x)), then over(y + mlp(y))."""
    size = config.hidden_size

    def norm(name: str) -> NamedNorm:
        return NamedNorm(name, LayerNorm(build, size, eps=config.layer_norm_eps))

    attention = BidirectionalAttention(
        build,
        size,
        config.num_heads,
        names=("self.query", "self.key", "self.value", "output.dense"),
    )
    mlp = PlainMLP(
        build,
        size,
        config.intermediate_size,
        activation=Activation(config.activation),
        bias=True,
        names=("intermediate.dense", "output.dense"),
    )
    return Layer(
        Sublayer(name="attention", body=attention, over=norm("attention.output.LayerNorm")),
        Sublayer(name="", body=mlp, over=norm("output.LayerNorm")),
    )


class Encoder:
    """From token ids to hidden states, and from a text's pooled state to its embedding or scores.

    It is filled and finalized like a Decoder (models/lm/decoder).
    """

    head_names: ClassVar[tuple[str, str]] = ("pooler.dense", "classifier")
    """Of the layers of a classification head."""

    def __init__(self, config: EncoderConfig, build: Build, *, num_labels: int) -> None:
        """num_labels: outputs of the classification head; 0: there is none"""
        self.config = config
        self._head = encoder_head(self.head_names, config.hidden_size, num_labels, build.device)
        size = config.hidden_size
        self._words = VocabEmbedding(build, config.vocab_size, size)
        self._positions = build.empty(config.first_position + config.num_positions, size)
        self._types = build.empty(config.num_types, size)
        self._norm = LayerNorm(build, size, eps=config.layer_norm_eps)
        self._layers = tuple(make_layer(config, build) for _ in range(config.num_layers))

    @classmethod
    def read(cls, hf: Mapping[str, Any], *, max_tokens: int | None = None) -> EncoderConfig:
        """The facts in config.json, as EncoderConfig.from_hf says."""
        return EncoderConfig.from_hf(hf, max_tokens=max_tokens)

    def hidden(self, batch: ForwardBatch) -> Tensor:
        """Hidden states [T, hidden] after the last layer. Texts are whole, and no KV is kept."""
        positions = batch.positions + self.config.first_position
        x = self._words(batch.token_ids) + F.embedding(positions, self._positions)
        if batch.token_types is None or self.config.num_types == 1:
            x = x + self._types[0]
        else:
            x = x + F.embedding(batch.token_types, self._types)
        x = self._norm(x)
        residual: Tensor | None = None
        for layer in self._layers:
            x, residual = layer(x, residual, batch)
        return x

    def answer(self, pooled: Tensor) -> Tensor:
        """The output of the head: pooled [R, hidden] fp32 -> [R, outputs] fp32."""
        return self._head(pooled)

    def targets(self) -> dict[str, Target]:
        found = prefixed("embeddings.word_embeddings", self._words.targets())
        found["embeddings.position_embeddings.weight"] = whole(self._positions)
        found["embeddings.token_type_embeddings.weight"] = whole(self._types)
        found |= prefixed("embeddings.LayerNorm", self._norm.targets())
        for index, layer in enumerate(self._layers):
            found |= prefixed(f"encoder.layer.{index}", once_filled(layer.targets(), layer.pack))
        return found | self._head.targets()

    def ignorable_tensors(self) -> tuple[str, ...]:
        """Patterns of unused tensors: position ids, BERT's own pooler, heads from its training."""
        return ("embeddings.position_ids", "pooler.*", "cls.*", "lm_head.*")

    @staticmethod
    def checkpoint_name(name: str) -> str:
        """The name in `targets()` of a tensor of the checkpoint."""
        for base in BASES:
            name = name.removeprefix(base)
        # The names of LayerNorm's parameters when BERT came out.
        return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
            "LayerNorm.beta", "LayerNorm.bias"
        )

    def finalize(self) -> None:
        """Pack the linear layers, once all weights are placed."""
        for layer in self._layers:
            layer.pack()


class RobertaEncoder(Encoder):
    """Its first position comes after the padding token's id."""

    head_names = ("classifier.dense", "classifier.out_proj")

    @classmethod
    def read(cls, hf: Mapping[str, Any], *, max_tokens: int | None = None) -> EncoderConfig:
        first = int(hf.get("pad_token_id") or 0) + 1
        return EncoderConfig.from_hf(hf, first_position=first, max_tokens=max_tokens)
