"""Alternating updates: a layer computes one of several streams of hidden states, predicts all of
them, and corrects the predictions by what it computed.

Sources: Baykal et al. 2023, arXiv:2301.13310; Gemma 3n's model code, Google 2025."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sapwood.layers.build import Build
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.layers.layer import FeedForward, Layer, Mixer, Sublayer, summed
from sapwood.layers.norm import RMSNorm
from sapwood.layers.per_layer import PerLayerBlock, PerLayerInputs
from sapwood.layers.quantization.dense import DENSE
from sapwood.layers.streams import Streams, WholeLinear
from sapwood.layers.targets import Target, prefixed, whole


@dataclass(frozen=True, slots=True, kw_only=True)
class AltUpForm:
    """The streams of a model.

    number         of the streams
    active         the one that layers compute
    hidden_size    of each
    input_size     inputs of each layer beside the streams (layers/per_layer.py)
    scales_output  whether the corrected active stream has a learned factor before these inputs
                   come in
    """

    number: int
    active: int
    hidden_size: int
    input_size: int
    scales_output: bool
    eps: float

    @property
    def width(self) -> int:
        """Entries of all streams."""
        return self.number * self.hidden_size


class AltUpStreams(Streams):
    """All streams, then the inputs of all layers: [T, width + layers * input_size]. The first
    stream is the embedding, the others are projections of it that are as long."""

    def __init__(
        self, build: Build, form: AltUpForm, inputs: PerLayerInputs, norm: RMSNorm
    ) -> None:
        """norm: that after the last layer"""
        size, others = form.hidden_size, range(form.number - 1)
        self._form = form
        self._inputs = inputs
        self._norm = norm
        self._opening = [WholeLinear(build, size, size) for _ in others]
        self._closing = [WholeLinear(build, size, size) for _ in others]

    def opened(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        others = [_as_long_as(x, layer(x)) for layer in self._opening]
        return torch.cat((x, *others, self._inputs(x, batch.token_ids)), dim=-1)

    def closed(self, x: Tensor) -> Tensor:
        form = self._form
        first, *others = torch.split(x[:, : form.width], form.hidden_size, dim=-1)
        total = first.clone()
        for layer, other in zip(self._closing, others, strict=True):
            total += _as_long_as(first, layer(other.contiguous()))
        return self._norm(total / form.number)

    def targets(self) -> dict[str, Target]:
        found = self._inputs.targets() | prefixed("model.norm", self._norm.targets())
        for name, layers in (
            ("altup_projections", self._opening),
            ("altup_unembed_projections", self._closing),
        ):
            for index, layer in enumerate(layers):
                found |= prefixed(f"model.{name}.{index}", layer.targets())
        return found

    def pack(self) -> None:
        self._inputs.pack()
        for layer in (*self._opening, *self._closing):
            layer.pack()


def _as_long_as(wanted: Tensor, x: Tensor) -> Tensor:
    """x [T, hidden], each row scaled to the root mean square of the wanted row."""
    length = wanted.square().mean(dim=-1, keepdim=True).sqrt()
    own = x.square().mean(dim=-1, keepdim=True).clamp(min=1e-5).sqrt()
    return x * length / own


def _mixed(weights: Tensor, streams: Tensor) -> Tensor:
    """weights [T, n, n] times streams [T, n, hidden], stream after stream: a product of matrices
    adds in another order for another number of tokens."""
    total = torch.zeros(streams.shape, dtype=torch.float32, device=streams.device)
    for index in range(streams.shape[1]):
        total += weights[:, :, index, None].float() * streams[:, None, index].float()
    return total.to(streams.dtype)


class AltUpLayer(Layer):
    """A layer over the streams, in place. Between attention and feed-forward comes a projection of
    low rank that runs beside attention (Laurel: Menghani et al. 2024, arXiv:2411.07501)."""

    def __init__(
        self,
        build: Build,
        index: int,
        form: AltUpForm,
        mixer: Sublayer[Mixer],
        feed_forward: Sublayer[FeedForward],
        block: PerLayerBlock,
        *,
        rank: int,
    ) -> None:
        """index: of the layer; rank: of the projection beside attention"""
        super().__init__(mixer, feed_forward)
        size, number = form.hidden_size, form.number
        self._form = form
        self._block = block
        first = form.width + index * form.input_size
        self._own_inputs = slice(first, first + form.input_size)
        self._router_norm = RMSNorm(build, size, eps=form.eps)
        # Small products, whose weights are never quantised.
        dense = replace(build, scheme=DENSE)
        self._router = WholeLinear(dense, size, number)
        self._predicting = WholeLinear(dense, number, number * number)
        self._correcting = WholeLinear(dense, number, number)
        self._scale = build.empty(size)
        self._left = WholeLinear(build, size, rank)
        self._right = WholeLinear(build, rank, size)
        self._low_rank_norm = RMSNorm(build, size, eps=form.eps)

    def __call__(
        self, x: Tensor, residual: Tensor | None, batch: ForwardBatch
    ) -> tuple[Tensor, Tensor | None]:
        """x [T, all streams and inputs], which is changed; there is never a residual"""
        form, mixer, feed_forward = self._form, self._mixer, self._feed_forward
        streams = x[:, : form.width].reshape(-1, form.number, form.hidden_size)
        active = streams[:, form.active].contiguous()
        mixing = self._predicting(self._modalities(active))
        predicted = streams + _mixed(mixing.view(-1, form.number, form.number), streams)
        active = predicted[:, form.active].contiguous()
        normed, total = mixer.normed(active, None)
        low_rank = normed + self._low_rank_norm(self._right(self._left(normed)))
        # Sums are made here: what Sublayer leaves to be added is not wanted apart.
        out, rest = mixer.finished(mixer.body(normed, batch), total)
        hidden = (summed(out, rest) + low_rank) * math.sqrt(0.5)
        normed, total = feed_forward.normed(hidden, None)
        out, rest = feed_forward.finished(feed_forward.body(normed), total)
        computed = summed(out, rest)
        shares = self._correcting(self._modalities(computed)) + 1.0
        corrected = predicted + shares[:, :, None] * (computed - active)[:, None]
        first = corrected[:, form.active].contiguous()
        if form.scales_output:
            first = first * self._scale
        corrected[:, 1:] += self._block(first, x[:, self._own_inputs])[:, None]
        x[:, : form.width] = corrected.flatten(1)
        return x, None

    def _modalities(self, x: Tensor) -> Tensor:
        """x [T, hidden] -> [T, streams]"""
        normed = self._router_norm(x) * (1.0 / self._form.hidden_size)
        return self._router(normed).float().tanh().to(x.dtype)

    def targets(self) -> dict[str, Target]:
        altup = {
            **prefixed("modality_router", self._router.targets()),
            **prefixed("prediction_coefs", self._predicting.targets()),
            **prefixed("correction_coefs", self._correcting.targets()),
            "correct_output_scale": whole(self._scale),
            **prefixed("router_norm", self._router_norm.targets()),
        }
        laurel = {
            **prefixed("linear_left", self._left.targets()),
            **prefixed("linear_right", self._right.targets()),
            **prefixed("post_laurel_norm", self._low_rank_norm.targets()),
        }
        return {
            **super().targets(),
            **self._block.targets(),
            **prefixed("altup", altup),
            **prefixed("laurel", laurel),
        }

    def pack(self) -> None:
        super().pack()
        self._block.pack()
        own = (self._router, self._predicting, self._correcting, self._left, self._right)
        for layer in own:
            layer.pack()
