"""Mamba, and Falcon Mamba. Sources: Gu and Dao 2023, arXiv:2312.00752; Zuo et al. 2024,
arXiv:2410.05355."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from sapwood.layers.layer import Layer, Mixer, PartialLayer
from sapwood.layers.mamba1 import Mamba1, Mamba1Layout
from sapwood.models.config import DecoderConfig
from sapwood.models.hf_fields import epsilon, integer, switch
from sapwood.models.lm.architecture import Architecture
from sapwood.models.lm.mamba2 import NO_HEAD_DIM, Mamba2ForCausalLM


class MambaForCausalLM(Architecture):
    """No attention and no feed-forwards: each layer is one mixer with a state."""

    absent: ClassVar = {
        **{name: one for name, one in Mamba2ForCausalLM.absent.items() if "size" not in name},
        "tie_word_embeddings": True,
    }
    spelled: ClassVar = Mamba2ForCausalLM.spelled
    has_windows = False
    can_be_rescaled = False
    names = Mamba2ForCausalLM.names

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        found = super().understood(hf)
        channels = integer(found, "expand", default=2) * integer(found, "hidden_size")
        return {"intermediate_size": channels, **found}

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        config = super().read(hf)
        layers = tuple(range(config.num_layers))
        layout = _layout(config.hf)
        return replace(
            config,
            states=(layout.cache_group(layers),),
            state_layer_parameters=layout.num_parameters(config.hidden_size),
            intermediate_sizes=(0,) * len(layers),
            head_dim=NO_HEAD_DIM,
        )

    @classmethod
    def checkpoint_name(cls, name: str) -> str:
        """The first files have the embedding in the singular."""
        return Mamba2ForCausalLM.checkpoint_name(name)

    def layer(self, index: int) -> Layer:
        return PartialLayer(mixer=self.mixer_sublayer(index))

    def mixer(self, index: int) -> Mixer:
        return self.mamba(index)

    def mamba(self, index: int, **details: Any) -> Mixer:
        """details: other parameters of Mamba1"""
        hf = self.config.hf
        return Mamba1(
            self.build,
            index,
            self.config.hidden_size,
            _layout(hf),
            bias=switch(hf, "use_bias"),
            conv_bias=switch(hf, "use_conv_bias"),
            **details,
        )


class FalconMambaForCausalLM(MambaForCausalLM):
    """Norms without weights over time steps' inputs, keys and queries."""

    def mixer(self, index: int) -> Mixer:
        eps = epsilon(self.config.hf, "mixer_rms_eps", default=1e-6)
        return self.mamba(index, norm_eps=eps, learns_norms=False)


def _layout(hf: Mapping[str, Any]) -> Mamba1Layout:
    return Mamba1Layout(
        channels=integer(hf, "intermediate_size"),
        state_size=integer(hf, "state_size", default=16),
        step_rank=step_rank(hf, "time_step_rank"),
        conv_length=integer(hf, "conv_kernel", default=4),
    )


def step_rank(hf: Mapping[str, Any], name: str) -> int:
    """A sixteenth of the hidden size, rounded up, unless config.json says a number."""
    said = {**hf, name: None} if hf.get(name) == "auto" else hf
    return integer(said, name, default=-(-integer(hf, "hidden_size") // 16))
