"""OPT. Source: Zhang et al. 2022, arXiv:2205.01068."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from sapwood.kernels.recording import Program
from sapwood.kernels.recording_buffers import Buffer
from sapwood.layers.embedding import LearnedPositions, LMHead, VocabEmbedding
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.layers.layer import FeedForward, Layer, Mixer
from sapwood.layers.norm import Norm
from sapwood.layers.rope_config import RopeConfig
from sapwood.layers.streams import Streams, WholeLinear
from sapwood.layers.targets import Target, prefixed
from sapwood.models.hf_fields import integer, switch
from sapwood.models.lm.architecture import Architecture, Names


class OPTForCausalLM(Architecture):
    """Learned positions, the first of which is in row 2; LayerNorms, no gates, biases. The model of
    350 million parameters has norms after the layers, and embeddings of another size."""

    absent: ClassVar = {
        "do_layer_norm_before": True,
        "enable_bias": True,
        "hidden_act": "relu",
        "layer_norm_elementwise_affine": True,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    spelled: ClassVar = {
        "hidden_act": "activation_function",
        "intermediate_size": "ffn_dim",
        "num_key_value_heads": (),
    }
    names = Names(
        embedding="model.decoder.embed_tokens",
        positions="model.decoder.embed_positions",
        layers="model.decoder.layers",
        norm="model.decoder.final_layer_norm",
        feed_forward="",
        before_mixer="self_attn_layer_norm",
        before_feed_forward="final_layer_norm",
    )
    lacks_prefix = "model."
    has_gates = False
    has_windows = False
    can_be_rescaled = False

    def streams(self) -> Streams | None:
        config = self.config
        size = self._embedding_size()
        norms_before = switch(config.hf, "do_layer_norm_before")
        if size == config.hidden_size and norms_before:
            return None
        return _Ends(self, size if size != config.hidden_size else None, norms=norms_before)

    def _embedding_size(self) -> int:
        size = self.config.hidden_size
        return integer(self.config.hf, "word_embed_proj_dim", default=size)

    def embedding(self, *, scale: float = 1.0) -> VocabEmbedding:
        size, number = self._embedding_size(), self.config.vocab_size
        return VocabEmbedding(self.build, number, size, scale=scale)

    def head(self, tied: VocabEmbedding | None, **details: Any) -> LMHead:
        size, number = self._embedding_size(), self.config.vocab_size
        return LMHead(self.build, number, size, tied=tied, **details)

    def layer(self, index: int) -> Layer:
        """As usual, or norm(x + attention(x)), then norm(x + feed_forward(x))."""
        mixer, feed_forward = self.mixer_sublayer(index), self.feed_forward_sublayer(index)
        if not switch(self.config.hf, "do_layer_norm_before"):
            mixer = replace(mixer, before=None, over=mixer.before)
            feed_forward = replace(feed_forward, before=None, over=feed_forward.before)
        return Layer(mixer, feed_forward)

    def positions(self) -> LearnedPositions:
        config = self.config
        length = config.rope.trained_length
        return LearnedPositions(self.build, length, config.hidden_size, offset=2)

    def rope_of(self, index: int) -> RopeConfig | None:
        return None

    def norm(self, size: int | None = None) -> Norm:
        is_learned = switch(self.config.hf, "layer_norm_elementwise_affine")
        return self.layer_norm(size, is_learned=is_learned)

    def mixer(self, index: int) -> Mixer:
        bias = switch(self.config.hf, "enable_bias")
        return self.attention(index, qkv_bias=bias, o_bias=bias, o_name="out_proj")

    def feed_forward(self, index: int) -> FeedForward:
        return self.plain_mlp("fc1", "fc2", bias=switch(self.config.hf, "enable_bias"))


class _Ends(Streams):
    """Projections between embeddings of `size` and the hidden states, and the last norm if there is
    one. `size` None: there are no projections."""

    def __init__(self, model: OPTForCausalLM, size: int | None, *, norms: bool) -> None:
        width = model.config.hidden_size
        self._norm_name = model.names.norm
        self._norm = model.norm() if norms else None
        self._in = None if size is None else WholeLinear(model.build, size, width)
        self._out = None if size is None else WholeLinear(model.build, width, size)

    def opened(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        return x if self._in is None else self._in(x)

    def closed(self, x: Tensor) -> Tensor:
        if self._norm is not None:
            x = self._norm(x)
        return x if self._out is None else self._out(x)

    def record_opened(self, program: Program, x: Buffer) -> Buffer:
        return x if self._in is None else self._in.record(program, x)

    def record_closed(self, program: Program, x: Buffer) -> Buffer:
        if self._norm is not None:
            x = self._norm.record(program, x)
        return x if self._out is None else self._out.record(program, x)

    def targets(self) -> dict[str, Target]:
        found: dict[str, Target] = {}
        if self._norm is not None:
            found |= prefixed(self._norm_name, self._norm.targets())
        for name, one in (("project_in", self._in), ("project_out", self._out)):
            if one is not None:
                found |= prefixed(f"model.decoder.{name}", one.targets())
        return found

    def pack(self) -> None:
        for one in (self._in, self._out):
            if one is not None:
                one.pack()
