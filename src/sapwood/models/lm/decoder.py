"""The decoder-only language model that Llama and its relatives are.

An architecture is a subclass that says what its layers are made of; DecoderConfig has the sizes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from sapwood.distributed.groups import Group
from sapwood.kernels.interface import AttentionTraits, Kernels
from sapwood.kernels.recording import DecoderParts, LayerParts
from sapwood.layers.attention import Attention, AttentionParts, HeadLayout
from sapwood.layers.embedding import LMHead, VocabEmbedding
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.layers.mlp import GatedMLP
from sapwood.layers.norm import RMSNorm
from sapwood.layers.quantization.dense import DENSE
from sapwood.layers.quantization.interface import LinearScheme
from sapwood.layers.rotary import cos_sin_table
from sapwood.layers.targets import Target, once_filled, prefixed
from sapwood.models.config import DecoderConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRecipe:
    """The parts that an architecture's layers may have.

    qkv_bias, o_bias, mlp_bias  whether those linear layers add a bias
    qk_norm                     whether each q and k head is RMS-normalised before rotation
    """

    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False


class DecoderLayer:
    """x + attention(norm(x)), then x + mlp(norm(x)); the sums are fused with the next norm."""

    def __init__(
        self,
        index: int,
        config: DecoderConfig,
        recipe: LayerRecipe,
        *,
        cos_sin: Tensor,
        kernels: Kernels,
        group: Group,
        device: torch.device,
        dtype: torch.dtype,
        scheme: LinearScheme,
    ) -> None:
        eps = config.rms_norm_eps
        norm = partial(
            RMSNorm, config.hidden_size, eps=eps, kernels=kernels, device=device, dtype=dtype
        )
        self._before_attention, self._before_mlp = norm(), norm()
        self._attention = Attention(
            index,
            config.hidden_size,
            HeadLayout(
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
            ),
            qkv_bias=recipe.qkv_bias,
            o_bias=recipe.o_bias,
            qk_norm=recipe.qk_norm,
            eps=eps,
            cos_sin=cos_sin,
            kernels=kernels,
            group=group,
            device=device,
            dtype=dtype,
            scheme=scheme,
            traits=AttentionTraits(window=config.window_of(index)),
        )
        self._mlp = GatedMLP(
            config.hidden_size,
            config.intermediate_size,
            bias=recipe.mlp_bias,
            kernels=kernels,
            group=group,
            device=device,
            dtype=dtype,
            scheme=scheme,
        )

    def __call__(
        self, x: Tensor, residual: Tensor | None, batch: ForwardBatch
    ) -> tuple[Tensor, Tensor]:
        """x [T, hidden] and a residual that is not yet added to it -> both after this layer."""
        if residual is None:
            normed, residual = self._before_attention(x), x
        else:
            normed, residual = self._before_attention.add(x, residual)
        normed, residual = self._before_mlp.add(self._attention(normed, batch), residual)
        return self._mlp(normed), residual

    def steps(self, x: Tensor, batch: ForwardBatch) -> Iterator[Tensor]:
        """Like a call without a residual, with a pause before each linear layer.

        Yields the inputs of the linear layers in the order of the computation (q, k and v are one
        layer, and so are gate and up), then the hidden states [T, hidden] after this layer. A
        linear layer computes when the value after its inputs is asked for.
        """
        normed, residual = self._before_attention(x), x
        yield normed
        attended = self._attention.attend(normed, batch)
        yield attended
        normed, residual = self._before_mlp.add(self._attention.project(attended), residual)
        yield normed
        expanded = self._mlp.expand(normed)
        yield expanded
        yield self._mlp.project(expanded) + residual

    def targets(self) -> dict[str, Target]:
        return (
            prefixed("input_layernorm", self._before_attention.targets())
            | prefixed("self_attn", self._attention.targets())
            | prefixed("post_attention_layernorm", self._before_mlp.targets())
            | prefixed("mlp", self._mlp.targets())
        )

    def pack(self) -> None:
        self._attention.pack()
        self._mlp.pack()

    def attention_parts(self) -> AttentionParts:
        return self._attention.parts()

    def parts(self) -> LayerParts:
        """This rank's parts of the layer; RuntimeError before `pack`."""
        attention = self._attention.parts()
        return LayerParts(
            input_norm=self._before_attention.weight,
            qkv=attention.qkv,
            q_norm=attention.q_norm,
            k_norm=attention.k_norm,
            o=attention.o,
            post_norm=self._before_mlp.weight,
            gate_up=self._mlp.gate_up,
            down=self._mlp.down,
        )


class Decoder(ABC):
    """From token ids to logits.

    To use a decoder, construct it (parameters are uninitialised memory), fill all `targets()` (see
    models/loader/assign), call `finalize()`, then `compute` under torch.inference_mode().
    """

    ignorable: ClassVar[tuple[str, ...]] = (
        "*.rotary_emb.inv_freq",
        "*.self_attn.[kv]_scale",  # of a calibrated 8-bit KV cache; ours makes a scale per token
    )
    """Patterns of checkpoint tensors that are not parameters of the model."""
    ignorable_when_tied: ClassVar[tuple[str, ...]] = ("lm_head.weight",)
    """Patterns of tensors that are superfluous when the embedding is the output layer too."""

    def __init__(
        self,
        config: DecoderConfig,
        kernels: Kernels,
        group: Group,
        device: torch.device,
        dtype: torch.dtype,
        scheme: LinearScheme = DENSE,
        embedding_dtype: torch.dtype | None = None,
    ) -> None:
        """A decoder without weights.

        dtype            of activations, norms and biases
        embedding_dtype  in which the embedding is kept, if narrower than dtype
        scheme           stores the weights of all linear layers, the output layer's among them
        Raises           ConfigError if the ranks cannot have equal parts, or sizes do not fit the
                         scheme
        """
        self.config = config
        self._group = group
        recipe = self.recipe(config)
        cos_sin = cos_sin_table(
            config.rope,
            head_dim=config.head_dim,
            context_length=config.context_length,
            device=device,
        )
        self._embedding = VocabEmbedding(
            config.vocab_size,
            config.hidden_size,
            kernels=kernels,
            group=group,
            device=device,
            dtype=dtype,
            weight_dtype=embedding_dtype,
        )
        self._layers = tuple(
            DecoderLayer(
                index,
                config,
                recipe,
                cos_sin=cos_sin,
                kernels=kernels,
                group=group,
                device=device,
                dtype=dtype,
                scheme=scheme,
            )
            for index in range(config.num_layers)
        )
        self._norm = RMSNorm(
            config.hidden_size, eps=config.rms_norm_eps, kernels=kernels, device=device, dtype=dtype
        )
        self._lm_head = LMHead(
            config.vocab_size,
            config.hidden_size,
            tied=self._embedding if config.tie_word_embeddings else None,
            kernels=kernels,
            group=group,
            device=device,
            dtype=dtype,
            scheme=scheme,
        )

    @staticmethod
    @abstractmethod
    def recipe(config: DecoderConfig) -> LayerRecipe:
        """The parts of this architecture's layers."""

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Hidden states after the last norm, [T, hidden]; writes every layer's KV."""
        x = self._embedding(batch.token_ids)
        if batch.embeds is not None:
            x = x.index_copy(0, batch.embeds.at, batch.embeds.vectors.to(x.dtype))
        residual: Tensor | None = None
        for layer in self._layers:
            x, residual = layer(x, residual, batch)
        return self._norm(x) if residual is None else self._norm.add(x, residual)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, hidden] -> [S, vocab], in fp32"""
        return self._lm_head(hidden)

    def compute(self, batch: ForwardBatch) -> Tensor:
        """Logits of the rows at batch.logits_index, [S, vocab]; no others are computed."""
        return self.logits(self.forward(batch).index_select(0, batch.logits_index))

    def targets(self) -> dict[str, Target]:
        """The target of every parameter of this rank, by the name in the checkpoint.

        A layer is packed as soon as all of its tensors are placed.
        """
        found = self.body_targets()
        if self.config.tie_word_embeddings:
            found["model.embed_tokens.weight"] = self._lm_head.tied_target()
            return found
        head = once_filled(self._lm_head.targets(), self._lm_head.pack)
        return found | prefixed("lm_head", head)

    def body_targets(self) -> dict[str, Target]:
        """The targets without the output layer's, for a model that does not use that layer."""
        found = prefixed("model.embed_tokens", self._embedding.targets())
        for index, layer in enumerate(self._layers):
            found |= prefixed(f"model.layers.{index}", once_filled(layer.targets(), layer.pack))
        return found | prefixed("model.norm", self._norm.targets())

    def ignorable_tensors(self) -> tuple[str, ...]:
        """Patterns (fnmatch) of tensors that a checkpoint may have and that are not used."""
        tied = self.ignorable_when_tied if self.config.tie_word_embeddings else ()
        return self.ignorable + tied

    def finalize(self) -> None:
        """Pack the linear layers, once all weights are placed."""
        self.pack_layers()
        self._lm_head.pack()

    def pack_layers(self) -> None:
        """Pack all linear layers but the output layer, for a model that does not use that layer."""
        for layer in self._layers:
            layer.pack()

    def parts(self) -> DecoderParts:
        """This rank's parts of the model, for kernels that run its step in one call.

        RuntimeError before `finalize`."""
        attention = self._layers[0].attention_parts()
        return DecoderParts(
            dtype=self._norm.weight.dtype,
            embedding=self._embedding.weight,
            layers=[layer.parts() for layer in self._layers],
            final_norm=self._norm.weight,
            lm_head=self._lm_head.packed,
            cos_sin=attention.cos_sin,
            num_heads=attention.num_heads,
            num_kv_heads=attention.num_kv_heads,
            head_dim=self.config.head_dim,
            eps=self.config.rms_norm_eps,
            scale=attention.scale,
            num_ranks=self._group.size,
        )
