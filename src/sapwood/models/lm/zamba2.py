"""Zamba 2: Mamba 2 in each layer; before some of these, one of a few blocks that they share.

Source: Glorioso et al. 2024, arXiv:2411.15242."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from sapwood.base.errors import ConfigError
from sapwood.layers.build import Build
from sapwood.layers.layer import Layer, Mixer, Sublayer
from sapwood.layers.linear import Arrangement, even_part
from sapwood.layers.mamba2 import Mamba2
from sapwood.layers.rope_config import RopeConfig
from sapwood.layers.shared_block import (
    BesideEmbedding,
    EmbeddingBeside,
    LowRankAddition,
    Outputs,
    SharedBlock,
    SharedBlockLayer,
)
from sapwood.layers.streams import Streams
from sapwood.models.config import AttentionHeads, DecoderConfig
from sapwood.models.hf_fields import integer, number, switch
from sapwood.models.lm.architecture import Architecture, Names, heads_of
from sapwood.models.lm.state_space import LINEAR, Mamba2Fields, kinds_of, with_states

HYBRID = "hybrid"
"""Kind of the layers with a shared block, in config.json's layers_block_type."""
_BLOCK = "shared_transformer"
_LONG_CONTEXT = 16_384
_USUAL_USERS = (6, 12, 18, 24, 30, 36, 42, 47, 51)
"""Layers with a shared block, if config.json does not say the kinds of its layers."""
FIELDS = Mamba2Fields(
    heads=("n_mamba_heads", 8),
    head_dim=("mamba_headdim", None),
    groups=("mamba_ngroups", 1),
    state_size=("mamba_d_state", 64),
    length=("mamba_d_conv", 4),
    expand=("mamba_expand", 2),
)


class Zamba2ForCausalLM(Architecture):
    """A block takes hidden states and embeddings, so that its heads are twice as wide as usual. Its
    result is added to Mamba's inputs, and to nothing else."""

    shares_weights: ClassVar = True
    absent: ClassVar = {
        "adapter_rank": 128,
        "hidden_act": "gelu",
        "max_position_embeddings": 4096,
        "num_mem_blocks": 1,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "time_step_min": 0.001,
    }
    spelled: ClassVar = {"head_dim": "attention_head_dim"}
    has_windows = False
    can_be_rescaled = False
    names = Names(norm="model.final_layernorm", mixer="mamba")

    def __init__(self, config: DecoderConfig, build: Build) -> None:
        super().__init__(config, build)
        self._blocks: dict[int, SharedBlock] = {}

    @property
    def ignorable(self) -> tuple[str, ...]:  # type: ignore[override]
        """Some files repeat a block in all layers that use it."""
        later = _users(self.config)[self._num_blocks :]
        repeated = (f"{self.names.layer(index)}.{_BLOCK}.*" for index in later)
        return (*Architecture.ignorable, *repeated)

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        found = super().understood(hf)
        heads, hidden = (integer(found, name) for name in ("num_attention_heads", "hidden_size"))
        if "head_dim" not in found:
            if heads < 1 or 2 * hidden % heads:
                raise ConfigError(
                    f"config.json's num_attention_heads is {heads} but must divide twice its "
                    f"hidden_size, {hidden}"
                )
            found["head_dim"] = 2 * hidden // heads
        found.setdefault("intermediate_size", 4 * hidden)
        if switch(found, "use_long_context"):
            found["max_position_embeddings"] = _LONG_CONTEXT
        return found

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        config = super().read(hf)
        users = _users(config)
        num_blocks, rank = (integer(config.hf, x) for x in ("num_mem_blocks", "adapter_rank"))
        if num_blocks < 1 or rank < 1:
            raise ConfigError(
                f"config.json has num_mem_blocks {num_blocks} and adapter_rank {rank}; both must "
                "be >= 1"
            )
        heads = AttentionHeads(
            num_heads=config.num_heads, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim
        )
        every = range(config.num_layers)
        states = sorted(_cache_of_states(config, index) for index in every)
        return with_states(
            config,
            FIELDS.layout(config.hf),
            tuple(states),
            heads_by_layer=tuple(heads if index in users else None for index in every),
            intermediate_sizes=tuple(
                config.intermediate_size if index in users[:num_blocks] else 0 for index in every
            ),
            other_parameters=_other_parameters(config, len(users), num_blocks, rank),
        )

    def streams(self) -> Streams:
        return EmbeddingBeside(self.named_norm(self.names.norm), self.config.hidden_size)

    def layer(self, index: int) -> Layer:
        hidden = self.config.hidden_size
        users = _users(self.config)
        mixer: Sublayer[Mixer] = Sublayer(
            name=self.names.mixer,
            body=self.mixer(index),
            before=self.named_norm(self.names.before_mixer),
        )
        if index not in users:
            return BesideEmbedding(mixer, hidden)
        use = users.index(index)
        return SharedBlockLayer(
            self.build,
            index,
            mixer,
            self._block(use % self._num_blocks),
            hidden,
            mixer_prefix="mamba_decoder",
            block_name=_BLOCK if use < self._num_blocks else None,
        )

    def mixer(self, index: int) -> Mixer:
        hf, config = self.config.hf, self.config
        return Mamba2(
            self.build,
            _cache_of_states(config, index),
            config.hidden_size,
            FIELDS.layout(hf),
            bias=switch(hf, "add_bias_linear"),
            norm_eps=1e-5,
            dt_range=(number(hf, "time_step_min"), float("inf")),
        )

    def rope_of(self, index: int) -> RopeConfig | None:
        return self.config.rope if switch(self.config.hf, "use_mem_rope") else None

    @property
    def _num_blocks(self) -> int:
        return integer(self.config.hf, "num_mem_blocks")

    def _block(self, block: int) -> SharedBlock:
        """The same for all layers that use it."""
        if block not in self._blocks:
            self._blocks[block] = self._new_block(block)
        return self._blocks[block]

    def _new_block(self, block: int) -> SharedBlock:
        config, hf = self.config, self.config.hf
        users = _users(config)
        own = {use: layer for use, layer in enumerate(users) if use % self._num_blocks == block}
        first = users[block]
        hidden = config.hidden_size
        adapts_attention = switch(hf, "use_shared_attention_adapter")
        return SharedBlock(
            self.attention(first, in_size=2 * hidden, scale=(config.head_dim / 2) ** -0.5),
            self.gated_mlp(bias=switch(hf, "add_bias_linear"), fused="gate_up_proj"),
            before_attention=self.named_norm("input_layernorm", 2 * hidden),
            before_mlp=self.named_norm("pre_ff_layernorm"),
            of_attention={
                layer: self._attention_addition(use, layer)
                for use, layer in own.items()
                if adapts_attention
            },
            of_mlp={layer: self._mlp_addition(use) for use, layer in own.items()},
        )

    def _attention_addition(self, use: int, layer: int) -> LowRankAddition:
        """To queries, keys and values."""
        names = [f"linear_{part}_adapter_list.{use}" for part in "qkv"]
        last = (f"{names[0]}.1", f"{names[1]}.1", f"{names[2]}.1")
        parts = heads_of(self.config, layer).qkv_parts(self.build.groups.attention, last)
        return self._addition(
            2 * self.config.hidden_size,
            *(Outputs(name=name, parts=(part,)) for name, part in zip(names, parts, strict=True)),
        )

    def _mlp_addition(self, use: int) -> LowRankAddition:
        """To the gate and what it multiplies."""
        name, size = f"gate_up_proj_adapter_list.{use}", self.config.intermediate_size
        gate, up = (even_part(part, size, self.build.groups.tp) for part in ("gate", "up"))
        fused = Arrangement.in_sequence((gate, up), fused=f"{name}.1")
        outputs = Outputs(name=name, parts=(gate, up), arrangement=fused)
        return self._addition(self.config.hidden_size, outputs)

    def _addition(self, in_size: int, *outputs: Outputs) -> LowRankAddition:
        rank = integer(self.config.hf, "adapter_rank")
        return LowRankAddition(self.build, in_size, rank, outputs)


def _users(config: DecoderConfig) -> tuple[int, ...]:
    """Indices of the layers with a shared block."""
    kinds = kinds_of(
        config.hf,
        (LINEAR, HYBRID),
        "layers_block_type",
        "layer_types",
        num_layers=config.num_layers,
    )
    if kinds is None:
        return tuple(index for index in _USUAL_USERS if index < config.num_layers)
    return tuple(index for index, kind in enumerate(kinds) if kind == HYBRID)


def _cache_of_states(config: DecoderConfig, layer: int) -> int:
    """A layer has one cache, so that a layer with a block, which has keys and values, has its
    states in the cache of a layer after the last one."""
    users = _users(config)
    return config.num_layers + users.index(layer) if layer in users else layer


def _other_parameters(config: DecoderConfig, num_users: int, num_blocks: int, rank: int) -> int:
    """Weights of blocks' attention and of what their users add, less those of the usual attention,
    which DecoderConfig counts for each user."""
    hidden = config.hidden_size
    queries, keys = (heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads))
    usual = 2 * hidden * (queries + keys)
    attention = 2 * hidden * (queries + 2 * keys) + hidden * queries
    added = hidden**2 + rank * (hidden + 2 * config.intermediate_size)
    if switch(config.hf, "use_shared_attention_adapter"):
        added += rank * (6 * hidden + queries + 2 * keys)
    return min(num_blocks, num_users) * attention + num_users * (added - usual)
