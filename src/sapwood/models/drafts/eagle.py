"""The heads of EAGLE and EAGLE-3 for Llama's kind of layer.

Sources: Li et al. 2024, arXiv:2401.15077; Li et al. 2025, arXiv:2503.01840; names of tensors and
fields of config.json as SGLang serves them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sapwood.base.errors import ConfigError, WeightError
from sapwood.layers.build import Build
from sapwood.layers.embedding import LMHead, VocabEmbedding
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.layers.layer import Layer
from sapwood.layers.targets import Target, once_filled, prefixed
from sapwood.models.config import DecoderConfig
from sapwood.models.drafts.head import Combination, CombiningHead, of_all_tokens, projection
from sapwood.models.hf_fields import integer, switch
from sapwood.models.lm.llama import LlamaForCausalLM

EAGLE, EAGLE3 = "LlamaForCausalLMEagle", "LlamaForCausalLMEagle3"
"""What config.json calls the two."""
NUM_CAPTURED = 3
UNUSED = ("*.rotary_emb.inv_freq", "embed_tokens.weight", "t2d")


def read_eagle(hf: Mapping[str, Any], target: DecoderConfig) -> DecoderConfig:
    """The facts of a head in its config.json; ConfigError if it is for another model than
    `target`."""
    found = LlamaForCausalLM.read({**hf, "architectures": ["LlamaForCausalLM"]})
    theirs = integer(hf, "target_hidden_size", default=found.hidden_size)
    if theirs != target.hidden_size or found.hidden_size != target.hidden_size:
        raise ConfigError(
            f"the draft head takes states of {theirs} entries and has {found.hidden_size} itself, "
            f"but the model's states have {target.hidden_size}; choose a head for this model"
        )
    if found.vocab_size != target.vocab_size:
        raise ConfigError(
            f"the draft head is for a vocabulary of {found.vocab_size} tokens, but the model has "
            f"{target.vocab_size}; choose a head for this model"
        )
    return found


def eagle_head(
    config: DecoderConfig,
    build: Build,
    embedding: VocabEmbedding,
    lm_head: LMHead,
    *,
    hot_ids: Sequence[int] = (),
) -> CombiningHead:
    """EAGLE's head: its first layer has no norm before attention, and nothing has one at the end.

    embedding, lm_head  the model's
    hot_ids  as in CombiningHead
    """
    architecture, size = LlamaForCausalLM(config, build), config.hidden_size

    def layer(index: int) -> Layer:
        mixer = architecture.mixer_sublayer(index)
        if index == 0:
            mixer = replace(mixer, before=None)
        return Layer(mixer, architecture.feed_forward_sublayer(index))

    parts = Combination(
        projection=projection(
            build, "fc", 2 * size, size, bias=switch({"bias": True, **config.hf}, "bias")
        ),
        layers={f"layers.{index}": layer(index) for index in range(config.num_layers)},
    )
    return CombiningHead(
        parts,
        embedding,
        lm_head,
        name_of=lambda name: name.removeprefix("model."),
        ignorable=(*UNUSED, "lm_head.weight"),
        hot_ids=hot_ids,
    )


class Eagle3Head:
    """EAGLE-3's head: it takes the states of three layers, and may know a part of the vocabulary.

    Attention takes the norm of the embedding beside the norm of the state; what it adds to is the
    state. States for the next guesses come before the last norm.
    """

    def __init__(
        self,
        config: DecoderConfig,
        build: Build,
        target: DecoderConfig,
        embedding: VocabEmbedding,
        lm_head: LMHead,
    ) -> None:
        """A head without weights.

        target  the model; embedding, lm_head  its own, of which the head has the first, and the
                second unless it says the size of its vocabulary"""
        if config.num_layers != 1:
            raise ConfigError(
                f"the draft head has {config.num_layers} layers; of EAGLE-3 heads those with one "
                "layer are implemented"
            )
        hf, size = config.hf, config.hidden_size
        self.captures = _captures(hf, target.num_layers)
        self._embedding = embedding
        architecture = LlamaForCausalLM(config, build)
        bias = config.attention_bias
        self._fc = projection(build, "fc", NUM_CAPTURED * size, size, bias=switch(hf, "bias"))
        self._attention = architecture.attention(0, in_size=2 * size, qkv_bias=bias, o_bias=bias)
        self._embedding_norm = architecture.norm()
        self._state_norm = architecture.norm()
        self._feed_forward = architecture.feed_forward_sublayer(0)
        self._norm = architecture.norm()
        self._vocab_size = target.vocab_size
        known = integer(hf, "draft_vocab_size", default=target.vocab_size)
        self._has_own_head = hf.get("draft_vocab_size") is not None
        self._lm_head = lm_head
        if self._has_own_head:
            self._lm_head = LMHead(build, known, size, tied=None)
        # The model's id of each token that the head knows; None: it knows all.
        self._ids: Tensor | None = None
        if known != target.vocab_size:
            self._ids = torch.zeros(known, dtype=torch.int64, device=build.device)

    def taken(self, states: Tensor) -> Tensor:
        return self._fc(states)

    def forward(self, batch: ForwardBatch, states: Tensor) -> tuple[Tensor, Tensor]:
        embeds = self._embedding_norm(self._embedding(batch.token_ids))
        both = torch.cat((embeds, self._state_norm(states)), dim=-1)
        feed_forward = self._feed_forward
        normed, residual = feed_forward.normed(self._attention(both, batch), states.clone())
        return self._norm.add(feed_forward.body(normed), residual)

    def logits(self, hidden: Tensor) -> Tensor:
        found = self._lm_head(hidden)
        if self._ids is None:
            return found
        return of_all_tokens(found, self._ids, self._vocab_size)

    def targets(self) -> dict[str, Target]:
        layer = prefixed("self_attn", self._attention.targets())
        layer |= prefixed("input_layernorm", self._embedding_norm.targets())
        layer |= prefixed("hidden_norm", self._state_norm.targets())
        layer |= self._feed_forward.targets()
        found = prefixed("midlayer", once_filled(layer, self._pack_layer))
        found |= once_filled(self._fc.targets(), self._fc.linear.pack)
        found |= prefixed("norm", self._norm.targets())
        if self._has_own_head:
            found |= prefixed("lm_head", once_filled(self._lm_head.targets(), self._lm_head.pack))
        if self._ids is not None:
            found["d2t"] = Target((len(self._ids),), self._take_ids, takes_integers=True)
        return found

    def checkpoint_name(self, name: str) -> str:
        return name.removeprefix("model.").replace("layers.0.", "midlayer.", 1)

    def ignorable_tensors(self) -> tuple[str, ...]:
        return UNUSED if self._has_own_head else (*UNUSED, "lm_head.weight", "d2t")

    def finalize(self) -> None:
        self._pack_layer()
        self._fc.linear.pack()
        if self._has_own_head:
            self._lm_head.pack()

    def _pack_layer(self) -> None:
        self._attention.pack()
        self._feed_forward.body.pack()

    def _take_ids(self, differences: Tensor) -> None:
        """d2t: how much larger the model's id of each token is than the head's."""
        assert self._ids is not None
        ids = torch.arange(len(self._ids)) + differences.to("cpu", torch.int64)
        if ids.min() < 0 or ids.max() >= self._vocab_size or len(set(ids.tolist())) < len(ids):
            raise WeightError(
                "the draft head's d2t maps its tokens to ids that the model does not have, or two "
                "to one; choose a head for this model"
            )
        self._ids.copy_(ids)


def _captures(hf: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """The model's layers whose inputs the head takes; the config names the layers before them."""
    said = (hf.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    found = [2, num_layers // 2, num_layers - 3] if said is None else [one + 1 for one in said]
    if (
        len(set(found)) != NUM_CAPTURED
        or sorted(found) != found
        or not 0 <= found[0] <= found[-1] < num_layers
    ):
        raise ConfigError(
            f"the draft head takes the states that enter the layers {found}, which must be "
            f"{NUM_CAPTURED} different ones of the model's {num_layers}, in ascending order; choose"
            " a head for this model"
        )
    return tuple(found)
