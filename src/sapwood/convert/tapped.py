"""Linear layers whose weights can be replaced.

Decoder layers are built with this scheme while they are converted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from sapwood.convert.scheme import WeightScheme
from sapwood.kernels.coded import LinearPart
from sapwood.kernels.interface import Kernels, PackedLinear


class TappedLinear:
    """One linear layer of the model, perhaps of several checkpoint tensors one above the other.

    names    names of the checkpoint's layers: "model.layers.0.self_attn.q_proj", …
    weights  the checkpoint's weights, [outputs, in] each
    """

    def __init__(
        self,
        names: list[str],
        weights: list[Tensor],
        bias: Tensor | None,
        kernels: Kernels,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.names = names
        self.weights = weights
        self._bias = bias
        self._kernels = kernels
        self._dtype = dtype
        self.use(torch.cat([weight.to(device, dtype) for weight in weights]))

    @property
    def in_size(self) -> int:
        return self.weights[0].shape[1]

    def use(self, weight: Tensor) -> None:
        """Compute with this weight [outputs of all, in] from now on, in the activations' dtype."""
        self._layer: PackedLinear = self._kernels.pack_linear(weight.to(self._dtype), self._bias)

    def use_rounded(self, scheme: WeightScheme, codes: Tensor, scale: Tensor) -> None:
        """Compute as the scheme does from now on, with rounded inputs.

        codes  [outputs of all, in] fp32, with a scale per output
        scale  [outputs of all] fp32
        """
        inner = self._kernels.pack_linear(codes.to(self._dtype), None)
        self._layer = _PerToken(scheme, inner, scale, self._bias)

    def use_block_rounded(self, scheme: WeightScheme, weight: Tensor) -> None:
        """Like `use`, but also round the inputs, per token and group of inputs."""
        self.use(weight)
        self._layer = _PerBlock(scheme, self._layer)

    def __call__(self, x: Tensor) -> Tensor:
        return self._layer(x)

    def fp32(self, x: Tensor) -> Tensor:
        return self._layer.fp32(x)


class _PerToken:
    """(codes of x) times (codes of the weight), both exact in x's dtype, then the two scales."""

    def __init__(
        self, scheme: WeightScheme, layer: PackedLinear, scale: Tensor, bias: Tensor | None
    ) -> None:
        self._scheme = scheme
        self._layer = layer
        self._scale = scale
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return self.fp32(x).to(x.dtype)

    def fp32(self, x: Tensor) -> Tensor:
        codes, scale = round_inputs(x.float(), self._scheme)
        out = self._layer.fp32(codes.to(x.dtype)) * scale * self._scale
        return out if self._bias is None else out + self._bias


class _PerBlock:
    def __init__(self, scheme: WeightScheme, layer: PackedLinear) -> None:
        self._scheme = scheme
        self._layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        return self._layer(rounded_inputs(x, self._scheme))

    def fp32(self, x: Tensor) -> Tensor:
        return self._layer.fp32(rounded_inputs(x, self._scheme))


def round_inputs(x: Tensor, scheme: WeightScheme) -> tuple[Tensor, Tensor]:
    """x [n, size] fp32 -> codes [n, size] and their scales [n, 1], fp32: one scale per row."""
    scale = x.abs().amax(dim=1, keepdim=True).div_(scheme.highest)
    scale.clamp_(min=torch.finfo(torch.float32).tiny)
    codes = x / scale
    if scheme.is_float:
        return codes.to(torch.float8_e4m3fn).float(), scale
    return codes.round_(), scale


def rounded_inputs(x: Tensor, scheme: WeightScheme) -> Tensor:
    """x [T, in] -> the inputs as a layer of that scheme rounds them, in x's dtype."""
    codes, scale = round_inputs(x.float().reshape(-1, scheme.group_size or x.shape[1]), scheme)
    return (codes * scale).view(x.shape).to(x.dtype)


class TappedStorage:
    """Keeps the checkpoint's tensors of a layer, with their names."""

    takes_blocks = False

    def __init__(
        self,
        scheme: TappedScheme,
        num_parts: int,
        kernels: Kernels,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._scheme = scheme
        self._kernels = kernels
        self._device = device
        self._dtype = dtype
        self._names = [""] * num_parts
        self._parts: list[Tensor | None] = [None] * num_parts

    @property
    def names(self) -> list[str]:
        """Names of the checkpoint's layers that were placed, in order."""
        return self._names

    @property
    def weight(self) -> Tensor:
        raise RuntimeError("a layer that is converted keeps its parts apart")

    def place(self, part: int, shard: Tensor) -> None:
        self._names[part] = self._scheme.placing.removesuffix(".weight")
        self._parts[part] = shard

    def place_blocks(self, part: int, shard: LinearPart) -> None:
        self.place(part, shard.dequantized(self._dtype))

    def share(self, weight: Tensor, blocks: LinearPart | None) -> None:
        self.place(0, weight)

    def pack(self, bias: Tensor | None) -> TappedLinear:
        weights = [part for part in self._parts if part is not None]
        if len(weights) != len(self._parts):
            raise RuntimeError("a part of this layer has not been placed")
        linear = TappedLinear(self._names, weights, bias, self._kernels, self._dtype, self._device)
        self._scheme.linears.append(linear)
        return linear


class TappedScheme:
    """A LinearScheme for one decoder layer.

    storages  storages of all linear layers, in the order of the computation
    linears   the layers that were packed
    placing   name of the checkpoint tensor that is being placed: layers do not know their names
    """

    name = "convert"

    def __init__(self) -> None:
        self.storages: list[TappedStorage] = []
        self.linears: list[TappedLinear] = []
        self.placing = ""

    def storage(
        self,
        in_size: int,
        part_sizes: tuple[int, ...],
        *,
        makes_logits: bool,
        tied: bool,
        kernels: Kernels,
        device: torch.device,
        dtype: torch.dtype,
    ) -> TappedStorage:
        storage = TappedStorage(self, len(part_sizes), kernels, device, dtype)
        self.storages.append(storage)
        return storage

    def following(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same weights; `placing` is set to the name of each when it is handed out."""
        for name, tensor in weights:
            self.placing = name
            yield name, tensor
