"""Whisper: an encoder of sounds, and a decoder whose layers attend to what it hears.

Source: Radford et al. 2022, arXiv:2212.04356."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.kernels.activations import Activation
from sapwood.kernels.texts import EqualTexts, group_texts
from sapwood.layers.attention import Attention
from sapwood.layers.build import Build
from sapwood.layers.cross_attention import CrossAttention, CrossLayer
from sapwood.layers.embedding import LearnedPositions
from sapwood.layers.layer import FeedForward, Layer, Mixer, Sublayer
from sapwood.layers.mlp import PlainMLP
from sapwood.layers.named_linear import NamedLinear
from sapwood.layers.norm import LayerNorm, Norm
from sapwood.layers.rope_config import RopeConfig
from sapwood.layers.targets import Target, once_filled, prefixed, whole
from sapwood.models.config import DecoderConfig
from sapwood.models.hf_fields import activation, integer, switch
from sapwood.models.lm.architecture import Architecture, Names, heads_of
from sapwood.models.vision.blocks import PatchAttention
from sapwood.models.vision.prepared import tensor_of, why_malformed
from sapwood.schema.media import Medium

FEATURES = "input_features"
"""[mel bins, frames] float32: the log mel spectrum of a sound."""
_ACROSS = ("encoder_attn.k_proj", "encoder_attn.v_proj")


class WhisperForConditionalGeneration(Architecture):
    """The decoder: learned positions, LayerNorms, biases except that of keys. The keys and values
    of a sound come from the tower, which therefore has these two projections of each layer."""

    absent: ClassVar = {
        "hidden_act": "gelu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "scale_embedding": False,
    }
    spelled: ClassVar = {
        "hidden_size": "d_model",
        "num_hidden_layers": "decoder_layers",
        "num_attention_heads": "decoder_attention_heads",
        "num_key_value_heads": (),
        "intermediate_size": "decoder_ffn_dim",
        "max_position_embeddings": "max_target_positions",
        "hidden_act": "activation_function",
    }
    names = Names(
        embedding="model.decoder.embed_tokens",
        positions="model.decoder.embed_positions",
        layers="model.decoder.layers",
        norm="model.decoder.layer_norm",
        head="proj_out",
        feed_forward="",
        before_mixer="self_attn_layer_norm",
        before_feed_forward="final_layer_norm",
    )
    ignorable = ("model.encoder.*", *(f"*.{name}.*" for name in _ACROSS))
    ignorable_when_tied = ("proj_out.weight",)
    has_gates = False
    has_windows = False
    can_be_rescaled = False

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        if switch(cls.understood(hf), "scale_embedding"):
            raise ConfigError("config.json has scale_embedding, which is not implemented here")
        return super().read(hf)

    def layer(self, index: int) -> Layer:
        across = CrossAttention(
            self.build,
            index,
            self.config.hidden_size,
            heads_of(self.config, index),
            names=("q_proj", "out_proj"),
        )
        return CrossLayer(
            self.mixer_sublayer(index),
            Sublayer(
                name="encoder_attn",
                body=across,
                before=self.named_norm("encoder_attn_layer_norm"),
            ),
            self.feed_forward_sublayer(index),
        )

    def positions(self) -> LearnedPositions:
        config = self.config
        length = config.rope.trained_length
        return LearnedPositions(self.build, length, config.hidden_size, offset=0)

    def rope_of(self, index: int) -> RopeConfig | None:
        return None

    def norm(self, size: int | None = None) -> Norm:
        return self.layer_norm(size)

    def mixer(self, index: int) -> Mixer:
        config = self.config
        return _NoKeyBias(
            self.build,
            index,
            config.hidden_size,
            heads_of(config, index),
            cos_sin=self.rotation_of(index),
            qkv_bias=True,
            o_bias=True,
            o_name="out_proj",
        )

    def feed_forward(self, index: int) -> FeedForward:
        return self.plain_mlp("fc1", "fc2", bias=True)


class _NoKeyBias(Attention):
    """Whose projection to keys has no bias, though the others have."""

    def __init__(self, *given: Any, **details: Any) -> None:
        """As Attention."""
        super().__init__(*given, **details)
        bias = self._qkv.linear.bias
        assert bias is not None
        bias.zero_()

    def targets(self) -> dict[str, Target]:
        found = super().targets()
        del found["k_proj.bias"]
        return found


class _EncoderLayer:
    """x + attention(norm(x)), then y + mlp(norm(y))."""

    def __init__(self, build: Build, hf: Mapping[str, Any], size: int) -> None:
        num_heads = integer(hf, "encoder_attention_heads")
        self._norms = [LayerNorm(build, size, eps=1e-5) for _ in range(2)]
        self._attention = PatchAttention(build, size, num_heads, key_bias=False)
        self._mlp = PlainMLP(
            build,
            size,
            integer(hf, "encoder_ffn_dim"),
            activation=_activation(hf),
            bias=True,
            names=("fc1", "fc2"),
        )

    def __call__(self, x: Tensor, sounds: Sequence[EqualTexts]) -> Tensor:
        x = x + self._attention(self._norms[0](x), sounds)
        return x + self._mlp(self._norms[1](x))

    def targets(self) -> dict[str, Target]:
        return {
            **prefixed("self_attn_layer_norm", self._norms[0].targets()),
            **prefixed("final_layer_norm", self._norms[1].targets()),
            **prefixed("self_attn", self._attention.targets()),
            **once_filled(self._mlp.targets(), self._mlp.pack),
        }


class WhisperTower:
    """From log mel spectra to the keys and values that each layer of the decoder attends to."""

    attends_both_ways = False
    over_ranks = False

    def __init__(self, hf_config: Mapping[str, Any], build: Build) -> None:
        hf = hf_config
        size = self._size = integer(hf, "d_model")
        if switch({"scale_embedding": False, **hf}, "scale_embedding"):
            raise ConfigError("config.json has scale_embedding, which is not implemented here")
        self._num_bins = integer(hf, "num_mel_bins", default=80)
        self.num_across = integer(hf, "max_source_positions", default=1500)
        self._num_layers = integer(hf, "decoder_layers")
        self._num_heads = integer(hf, "decoder_attention_heads")
        self._build = build
        self._kernels = build.kernels
        self._activation = _activation(hf)
        bins = self._num_bins
        self._convolutions = [
            (build.empty(size, inputs, 3), build.empty(size)) for inputs in (bins, size)
        ]
        self._places = build.empty(self.num_across, size)
        self._layers = [
            _EncoderLayer(build, hf, size) for _ in range(integer(hf, "encoder_layers"))
        ]
        self._norm = LayerNorm(build, size, eps=1e-5)
        outputs = dict.fromkeys(_ACROSS, size)
        self._across = [
            NamedLinear(build, size, outputs, without_bias=_ACROSS[:1])
            for _ in range(self._num_layers)
        ]
        self.vector_size = 2 * self._num_layers * size

    @property
    def axis_of_pair(self) -> Tensor | None:
        return None

    def why_unfit(self, medium: Medium) -> str | None:
        wrong = why_malformed(medium, {FEATURES: False})
        if medium.kind != "audio":
            return "this model hears sounds; it sees nothing"
        if wrong is not None:
            return wrong
        shape = medium.tensors[FEATURES].shape
        if shape != (self._num_bins, 2 * self.num_across):
            return (
                f"{FEATURES} of a prepared audio is {list(shape)}, but this model hears "
                f"{[self._num_bins, 2 * self.num_across]}"
            )
        if medium.num_across != self.num_across or medium.spans != ((0, 1),):
            return (
                f"a sound of this model has {self.num_across} vectors for all tokens from the "
                "first one on"
            )
        return None

    def num_patches(self, medium: Medium) -> int:
        return self.num_across

    def encode(self, media: Sequence[Medium]) -> list[Tensor]:
        """Of each sound: [layers, 2, heads, vectors, head_dim]"""
        x = self.states(media)
        size = self._size // self._num_heads
        found = x.new_empty(len(media), self._num_layers, 2, self._num_heads, self.num_across, size)
        for index, layer in enumerate(self._across):
            both = layer(x).view(len(media), self.num_across, 2, self._num_heads, size)
            found[:, index] = both.permute(0, 2, 3, 1, 4)
        return list(found.unbind(0))

    def states(self, media: Sequence[Medium]) -> Tensor:
        """After the last norm, [sounds * vectors, size]"""
        x = torch.stack([tensor_of(medium, FEATURES) for medium in media])
        x = x.to(self._build.device, self._build.dtype)
        for stride, (weight, bias) in enumerate(self._convolutions, start=1):
            x = F.conv1d(x, weight, bias, stride=stride, padding=1)
            x = self._kernels.activate(x, self._activation)
        x = (x.transpose(1, 2) + self._places).flatten(0, 1)
        sounds = group_texts([self.num_across] * len(media), x.device)
        for layer in self._layers:
            x = layer(x, sounds)
        return self._norm(x)

    def positions(self, num_tokens: int, media: Sequence[Medium]) -> NDArray[np.int64] | None:
        return None

    def targets(self) -> dict[str, Target]:
        found: dict[str, Target] = {}
        for number, (weight, bias) in enumerate(self._convolutions, start=1):
            own = {"weight": whole(weight), "bias": whole(bias)}
            found |= prefixed(f"model.encoder.conv{number}", own)
        found["model.encoder.embed_positions.weight"] = whole(self._places)
        for index, layer in enumerate(self._layers):
            found |= prefixed(f"model.encoder.layers.{index}", layer.targets())
        found |= prefixed("model.encoder.layer_norm", self._norm.targets())
        for index, across in enumerate(self._across):
            found |= prefixed(f"model.decoder.layers.{index}", across.targets())
        return found

    def ignorable_tensors(self) -> tuple[str, ...]:
        return ()

    def checkpoint_name(self, name: str) -> str:
        return name

    def finalize(self) -> None:
        """Each layer is packed once it is filled."""


def _activation(hf: Mapping[str, Any]) -> Activation:
    return Activation(activation(hf, "activation_function", default="gelu"))
