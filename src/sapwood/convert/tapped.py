"""Linear layers whose weights can be replaced.

Decoder layers are built with this scheme while they are converted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from sapwood.convert.scheme import WeightScheme
from sapwood.kernels.coded import LinearPart
from sapwood.kernels.interface import Kernels
from sapwood.kernels.packed import PackedLinear
from sapwood.layers.targets import Target


class TappedLinear:
    """One linear layer of the model, perhaps of several checkpoint tensors one above the other.

    names    names of the checkpoint's layers: "model.layers.0.self_attn.q_proj", …
    weights  the checkpoint's weights, [outputs, in] each, with rows as the checkpoint has them
    """

    def __init__(
        self,
        names: list[str],
        weights: list[Tensor],
        bias: Tensor | None,
        kernels: Kernels,
        dtype: torch.dtype,
        device: torch.device,
        order: Tensor | None,
    ) -> None:
        """order [outputs of all] int64: output i is row order[i] of the weights; None: row i"""
        self.names = names
        self.weights = weights
        self._order = order
        self._bias = bias
        self._kernels = kernels
        self._dtype = dtype
        self.use(torch.cat([weight.to(device, dtype) for weight in weights]))

    @property
    def in_size(self) -> int:
        return self.weights[0].shape[1]

    def use(self, weight: Tensor) -> None:
        """Compute with this weight [rows of all, in] from now on, in the activations' dtype."""
        own = self._in_order(weight).to(self._dtype)
        self._layer: PackedLinear = self._kernels.pack_linear(own, self._bias)

    def use_rounded(self, scheme: WeightScheme, codes: Tensor, scale: Tensor) -> None:
        """Compute as the scheme does from now on, with rounded inputs.

        codes  [rows of all, in] fp32, with a scale per row
        scale  [rows of all] fp32
        """
        inner = self._kernels.pack_linear(self._in_order(codes).to(self._dtype), None)
        self._layer = _PerToken(scheme, inner, self._in_order(scale), self._bias)

    def use_block_rounded(self, scheme: WeightScheme, weight: Tensor) -> None:
        """Like `use`, but also round the inputs, per token and group of inputs."""
        self.use(weight)
        self._layer = _PerBlock(scheme, self._layer)

    def _in_order(self, rows: Tensor) -> Tensor:
        return rows if self._order is None else rows[self._order]

    def __call__(self, x: Tensor) -> Tensor:
        return self._layer(x)

    def fp32(self, x: Tensor) -> Tensor:
        return self._layer.fp32(x)

    def unpacked(self) -> None:
        return None

    def refill(self, weight: Tensor) -> bool:
        return False


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

    def unpacked(self) -> None:
        return None

    def refill(self, weight: Tensor) -> bool:
        return False


class _PerBlock:
    def __init__(self, scheme: WeightScheme, layer: PackedLinear) -> None:
        self._scheme = scheme
        self._layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        return self._layer(rounded_inputs(x, self._scheme))

    def fp32(self, x: Tensor) -> Tensor:
        return self._layer.fp32(rounded_inputs(x, self._scheme))

    def unpacked(self) -> None:
        return None

    def refill(self, weight: Tensor) -> bool:
        return False


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
        self._rows: list[Tensor | None] = [None] * num_parts
        self._sources: dict[str, Tensor] = {}

    @property
    def names(self) -> list[str]:
        """Names of the checkpoint's layers that the parts were placed from, in order."""
        return self._names

    @property
    def weight(self) -> Tensor:
        raise RuntimeError("a layer that is converted keeps its parts apart")

    def place(self, part: int, shard: Tensor) -> None:
        name = self._scheme.placing.removesuffix(".weight")
        self._names[part] = name
        if self._scheme.is_finding_rows:
            self._rows[part] = shard[:, 0].long()
        else:
            whole = self._scheme.whole
            is_part = self._rows[part] is not None
            self._sources[name] = whole if is_part and whole is not None else shard

    def place_blocks(self, part: int, shard: LinearPart) -> None:
        self.place(part, shard.dequantized(self._dtype))

    def share(self, weight: Tensor, blocks: LinearPart | None) -> None:
        self.place(0, weight)

    def repack(self, packed: PackedLinear, bias: Tensor | None) -> TappedLinear:
        return self.pack(bias)

    def pack(self, bias: Tensor | None) -> TappedLinear:
        if not self._sources.keys() >= set(self._names):
            raise RuntimeError("a part of this layer has not been placed")
        names = list(dict.fromkeys(self._names))
        linear = TappedLinear(
            names,
            [self._sources[name] for name in names],
            bias,
            self._kernels,
            self._dtype,
            self._device,
            self._order(names),
        )
        self._scheme.linears.append(linear)
        return linear

    def _order(self, names: Sequence[str]) -> Tensor | None:
        """Of the parts' rows, among those of all checkpoint's tensors one above the other."""
        if all(rows is None for rows in self._rows):
            return None
        sizes = [len(self._sources[name]) for name in names]
        first = dict(zip(names, accumulate(sizes, initial=0), strict=False))
        return torch.cat(
            [
                first[name]
                + (torch.arange(len(self._sources[name])) if rows is None else rows).cpu()
                for name, rows in zip(self._names, self._rows, strict=True)
            ]
        ).to(self._device)


class TappedScheme:
    """A LinearScheme for one decoder layer.

    storages  storages of all linear layers, in the order of the computation
    linears   the layers that were packed
    placing   name of the checkpoint tensor that is being placed: layers do not know their names
    whole     that tensor; None: nobody has said
    is_finding_rows  whether tensors are placed whose rows are their own numbers
    """

    name = "convert"

    def __init__(self) -> None:
        self.storages: list[TappedStorage] = []
        self.linears: list[TappedLinear] = []
        self.placing = ""
        self.whole: Tensor | None = None
        self.is_finding_rows = False

    def find_rows(self, targets: Mapping[str, Target], device: torch.device) -> None:
        """Learn which rows of rearranged tensors become which outputs, by placing row numbers."""
        self.is_finding_rows = True
        for name, target in targets.items():
            if target.is_rearranged and target.has_rows and len(target.shape) == 2:
                self.placing = name
                numbers = torch.arange(target.shape[0], dtype=torch.float64, device=device)
                target.place(numbers[:, None].expand(target.shape))
        self.is_finding_rows = False

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
            self.placing, self.whole = name, tensor
            yield name, tensor
