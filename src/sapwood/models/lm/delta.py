"""What models have in common that mix tokens by a gated delta net in most layers.

Source: Yang et al. 2024, arXiv:2412.06464."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from sapwood.base.errors import ConfigError
from sapwood.layers.delta import DeltaLayout, DeltaNames, DeltaProjections, GatedDeltaNet
from sapwood.layers.layer import Mixer, Sublayer
from sapwood.models.config import FULL, DecoderConfig
from sapwood.models.hf_fields import integer
from sapwood.models.lm.architecture import Architecture

LINEAR = "linear_attention"
"""Kind of the layers with a state, in config.json's layer_types."""


class DeltaArchitecture(Architecture):
    """Layers of the kind LINEAR have a gated delta net, and the others attention."""

    projections: ClassVar[DeltaProjections]
    delta_names: ClassVar[DeltaNames] = DeltaNames()
    delta_out: ClassVar[str] = "out_proj"
    """Name of the output projection of a gated delta net."""
    delta_eps: ClassVar[float | None] = None
    """Of the norm in a gated delta net; None: the config's."""
    has_windows = False

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        return with_states(super().read(hf), cls.layout(cls.understood(hf)))

    @classmethod
    def layout(cls, hf: Mapping[str, Any]) -> DeltaLayout:
        """The heads of gated delta nets; ConfigError for what is missing or impossible."""
        return checked(
            DeltaLayout(
                num_key_heads=integer(hf, "linear_num_key_heads"),
                num_heads=integer(hf, "linear_num_value_heads"),
                key_dim=integer(hf, "linear_key_head_dim"),
                value_dim=integer(hf, "linear_value_head_dim"),
                length=integer(hf, "linear_conv_kernel_dim", default=4),
            )
        )

    def is_linear(self, index: int) -> bool:
        return index in self.config.layers_with_states

    def mixer_sublayer(self, index: int) -> Sublayer[Mixer]:
        sublayer = super().mixer_sublayer(index)
        return replace(sublayer, name="linear_attn") if self.is_linear(index) else sublayer

    def mixer(self, index: int) -> Mixer:
        return self.delta_net(index) if self.is_linear(index) else self.full_attention(index)

    def full_attention(self, index: int) -> Mixer:
        """The mixer of a layer that keeps keys and values."""
        raise NotImplementedError

    def delta_projections(self) -> DeltaProjections:
        """How the checkpoint at hand keeps the projections of gated delta nets."""
        return self.projections

    def delta_net(self, index: int) -> Mixer:
        eps = self.config.norm_eps if self.delta_eps is None else self.delta_eps
        return GatedDeltaNet(
            self.build,
            index,
            self.config.hidden_size,
            self.layout(self.config.hf),
            projections=self.delta_projections(),
            names=self.delta_names,
            out_name=self.delta_out,
            eps=eps,
        )


def every_nth_attends(num_layers: int, n: int) -> list[str]:
    """layer_types in which each n-th layer has attention, and the others a state."""
    return [FULL if n and (index + 1) % n == 0 else LINEAR for index in range(num_layers)]


def linear_layers(config: DecoderConfig) -> tuple[int, ...]:
    """The layers of the kind LINEAR; ConfigError if layer_types is not a list of known kinds."""
    kinds, number = config.hf.get("layer_types"), config.num_layers
    if not isinstance(kinds, list) or len(kinds) != number or not {FULL, LINEAR}.issuperset(kinds):
        raise ConfigError(
            f"config.json must have {FULL} or {LINEAR} for each of its {number} layers in "
            f"'layer_types', got {kinds!r}"
        )
    return tuple(index for index, kind in enumerate(kinds) if kind == LINEAR)


def with_states(config: DecoderConfig, layout: DeltaLayout) -> DecoderConfig:
    """The config with the states of its linear layers."""
    layers = linear_layers(config)
    keys, _, values = layout.sizes
    columns = 2 * keys + 3 * values + 2 * layout.num_heads
    return replace(
        config,
        states=(layout.cache_group(layers),) if layers else (),
        state_layer_parameters=config.hidden_size * columns + sum(layout.sizes) * layout.length,
    )


def checked(layout: DeltaLayout) -> DeltaLayout:
    """The same; ConfigError if there can be no such heads."""
    sizes = (layout.num_key_heads, layout.num_heads, layout.key_dim, layout.value_dim)
    if min(sizes) < 1 or layout.num_heads % layout.num_key_heads:
        raise ConfigError(f"config.json asks for impossible heads of linear attention: {layout}")
    if not 2 <= layout.length <= 1024:
        raise ConfigError(
            f"config.json's convolution of linear attention has {layout.length} inputs but must "
            "have from 2 to 1024"
        )
    return layout
