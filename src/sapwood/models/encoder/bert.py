"""BERT, RoBERTa and XLM-RoBERTa. Source: Devlin et al. 2018, arXiv:1810.04805; Liu et al. 2019,
arXiv:1907.11692; Conneau et al. 2019, arXiv:1911.02116.

A layer adds first and normalises then (post-norm); all linear layers have biases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.distributed.groups import Group
from sapwood.kernels.interface import Kernels
from sapwood.kernels.texts import EqualTexts, group_texts
from sapwood.layers.embedding import VocabEmbedding
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.layers.linear import ColumnParallelLinear, RowParallelLinear, divide, even_part
from sapwood.layers.norm import LayerNorm
from sapwood.layers.quantization.dense import DENSE
from sapwood.layers.quantization.interface import LinearScheme
from sapwood.layers.targets import Target, once_filled, prefixed, whole
from sapwood.models.encoder.config import Activation, EncoderConfig
from sapwood.models.encoder.heads import Head

BASES = ("bert.", "roberta.")
"""Prefixes of the names in checkpoints of models with a head."""


class EncoderLayer:
    """norm(x + attention(x)), then norm(y + mlp(y))."""

    def __init__(
        self,
        config: EncoderConfig,
        *,
        kernels: Kernels,
        group: Group,
        device: torch.device,
        dtype: torch.dtype,
        scheme: LinearScheme,
    ) -> None:
        size, inner = config.hidden_size, config.intermediate_size
        column = partial(
            ColumnParallelLinear,
            bias=True,
            kernels=kernels,
            device=device,
            dtype=dtype,
            scheme=scheme,
        )
        row = partial(
            RowParallelLinear,
            "dense",
            bias=True,
            kernels=kernels,
            group=group,
            device=device,
            dtype=dtype,
            scheme=scheme,
        )
        self._kernels = kernels
        self._num_heads = divide(config.num_heads, group, f"{config.num_heads} attention heads")
        self._head_dim = config.head_dim
        parts = tuple(even_part(name, size, group) for name in ("query", "key", "value"))
        self._qkv, self._o = column(size, parts), row(size, size)
        self._up = column(size, (even_part("dense", inner, group),))
        self._down = row(inner, size)
        self._activation = _function(config.activation)
        norm = partial(LayerNorm, size, eps=config.layer_norm_eps, device=device, dtype=dtype)
        self._after_attention, self._after_mlp = norm(), norm()

    def __call__(self, x: Tensor, texts: Sequence[EqualTexts]) -> Tensor:
        """x [T, hidden] -> [T, hidden]"""
        qkv = self._qkv(x).view(x.shape[0], 3, self._num_heads, self._head_dim)
        q, k, v = qkv.unbind(1)
        mixed = self._kernels.bidirectional_attention(q, k, v, texts, self._head_dim**-0.5)
        x = self._after_attention(x + self._o(mixed.flatten(1)))
        return self._after_mlp(x + self._down(self._activation(self._up(x))))

    def targets(self) -> dict[str, Target]:
        return (
            prefixed("attention.self", self._qkv.targets())
            | prefixed("attention.output", self._o.targets())
            | prefixed("attention.output.LayerNorm", self._after_attention.targets())
            | prefixed("intermediate", self._up.targets())
            | prefixed("output", self._down.targets())
            | prefixed("output.LayerNorm", self._after_mlp.targets())
        )

    def pack(self) -> None:
        for layer in (self._qkv, self._o, self._up, self._down):
            layer.linear.pack()


class Encoder:
    """From token ids to hidden states, and from a text's pooled state to its embedding or scores.

    It is built, filled and finalized like a Decoder (models/lm/decoder).
    """

    def __init__(
        self,
        config: EncoderConfig,
        head: Head,
        kernels: Kernels,
        group: Group,
        device: torch.device,
        dtype: torch.dtype,
        scheme: LinearScheme = DENSE,
    ) -> None:
        self.config = config
        self._head = head
        size = config.hidden_size
        self._words = VocabEmbedding(
            config.vocab_size, size, kernels=kernels, group=group, device=device, dtype=dtype
        )
        num_positions = config.first_position + config.num_positions
        self._positions = torch.empty(num_positions, size, device=device, dtype=dtype)
        self._types = torch.empty(config.num_types, size, device=device, dtype=dtype)
        self._norm = LayerNorm(size, eps=config.layer_norm_eps, device=device, dtype=dtype)
        self._layers = tuple(
            EncoderLayer(
                config, kernels=kernels, group=group, device=device, dtype=dtype, scheme=scheme
            )
            for _ in range(config.num_layers)
        )

    def hidden(self, batch: ForwardBatch) -> Tensor:
        """Hidden states [T, hidden] after the last layer. Texts are whole, and no KV is kept."""
        positions = batch.positions + self.config.first_position
        x = self._words(batch.token_ids) + F.embedding(positions, self._positions)
        if batch.token_types is None or self.config.num_types == 1:
            x = x + self._types[0]
        else:
            x = x + F.embedding(batch.token_types, self._types)
        x = self._norm(x)
        texts = group_texts(batch.attention.query_lens, x.device)
        for layer in self._layers:
            x = layer(x, texts)
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


def _function(activation: Activation) -> Callable[[Tensor], Tensor]:
    match activation:
        case Activation.GELU:
            return F.gelu
        case Activation.GELU_NEW | Activation.GELU_PYTORCH_TANH:
            return partial(F.gelu, approximate="tanh")
        case Activation.RELU:
            return F.relu
