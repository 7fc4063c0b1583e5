"""Mamba 2. Source: Dao and Gu 2024, arXiv:2405.21060."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from sapwood.layers.layer import Layer, Mixer, PartialLayer
from sapwood.layers.mamba2 import Mamba2
from sapwood.models.config import DecoderConfig
from sapwood.models.hf_fields import switch
from sapwood.models.lm.architecture import Architecture, Names
from sapwood.models.lm.state_space import Mamba2Fields, dt_range, with_states

FIELDS = Mamba2Fields(
    heads=("num_heads", 128),
    head_dim=("head_dim", 64),
    groups=("n_groups", 8),
    state_size=("state_size", 128),
    length=("conv_kernel", 4),
    expand=("expand", 2),
)


NO_HEAD_DIM = 64
"""Of attention, which there is none of: a size that all kernels have. The field of config.json is
that of state space heads."""


class Mamba2ForCausalLM(Architecture):
    """No attention and no feed-forwards: each layer is one mixer with a state."""

    absent: ClassVar = {
        "rms_norm_eps": 1e-5,
        # Without positions a context has no limit of its own: this is the longest that was trained.
        "max_position_embeddings": 262_144,
        "num_attention_heads": 1,
        "intermediate_size": 1,
        "use_conv_bias": True,
    }
    spelled: ClassVar = {"rms_norm_eps": "layer_norm_epsilon"}
    has_windows = False
    can_be_rescaled = False
    names = Names(
        embedding="backbone.embeddings",
        layers="backbone.layers",
        norm="backbone.norm_f",
        mixer="mixer",
        before_mixer="norm",
    )

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        config = super().read(hf)
        layers = tuple(range(config.num_layers))
        return with_states(
            config,
            FIELDS.layout(config.hf),
            layers,
            intermediate_sizes=(0,) * len(layers),
            head_dim=NO_HEAD_DIM,
        )

    @classmethod
    def checkpoint_name(cls, name: str) -> str:
        """The first files have the embedding in the singular."""
        return name.replace("backbone.embedding.", "backbone.embeddings.")

    def layer(self, index: int) -> Layer:
        return PartialLayer(mixer=self.mixer_sublayer(index))

    def mixer(self, index: int) -> Mixer:
        config = self.config
        return Mamba2(
            self.build,
            index,
            config.hidden_size,
            FIELDS.layout(config.hf),
            bias=switch(config.hf, "use_bias"),
            conv_bias=switch(config.hf, "use_conv_bias"),
            norm_eps=config.norm_eps,
            dt_range=dt_range(config.hf),
        )
