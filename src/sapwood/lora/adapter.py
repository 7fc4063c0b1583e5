"""An adapter: what it adds to each linear layer of a model, on this rank."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.kernels.low_rank import LowRank
from sapwood.layers.adapters import AdapterSite, AdapterTarget
from sapwood.layers.targets import FusedIn, Target
from sapwood.lora.config import AdapterConfig

_PREFIXES = ("base_model.model.", "base_model.")
_A, _B = ".lora_A.weight", ".lora_B.weight"
_SAFETENSORS, _PICKLED = "adapter_model.safetensors", "adapter_model.bin"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Adapter:
    """additions  on the host, by the linear layer that they belong to
    num_bytes  that they take
    rank       the largest of a layer
    is_covered  whether a recorded step has all of the additions
    """

    additions: Mapping[AdapterSite, LowRank]
    num_bytes: int
    rank: int
    is_covered: bool


FusedAdapter = tuple[FusedIn, AdapterTarget]
"""Where a layer of an expert is in a fused tensor, and how its adapters lie in a site."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptableModel:
    """What a model says about adapters.

    targets  of the layers that can have adapters, by their paths in the checkpoint
    fused    of the experts whose layers a checkpoint may have as one tensor, by the tensor's path
    name_of  from a tensor's name in a checkpoint to the name in the model
    dtype    of activations, and so of additions
    """

    targets: Mapping[str, AdapterTarget]
    fused: Mapping[str, Sequence[FusedAdapter]]
    name_of: Callable[[str], str]
    dtype: torch.dtype


def adaptable(
    targets: Mapping[str, Target], name_of: Callable[[str], str], dtype: torch.dtype
) -> AdaptableModel:
    """What a model says by the targets of its tensors; without adapters there are no sites."""
    found: dict[str, AdapterTarget] = {}
    fused: dict[str, list[FusedAdapter]] = defaultdict(list)
    for name, target in targets.items():
        if target.adapter is None:
            continue
        found[name.removesuffix(".weight")] = target.adapter
        if target.fused_in is not None:
            fused[target.fused_in.name].append((target.fused_in, target.adapter))
    return AdaptableModel(targets=found, fused=fused, name_of=name_of, dtype=dtype)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of the adapter in a folder, on the host.

    Raises ConfigError if they are not there or cannot be read."""
    safe, pickled = folder / _SAFETENSORS, folder / _PICKLED
    try:
        if safe.is_file():
            return load_file(safe)
        if pickled.is_file():
            found = torch.load(pickled, map_location="cpu", weights_only=True)
            return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}
    except (
        OSError, SafetensorError, UnpicklingError, RuntimeError, ValueError, AttributeError
    ) as error:  # fmt: skip
        raise ConfigError(f"{folder}: the adapter's tensors cannot be read: {error}") from error
    raise ConfigError(f"{folder} has neither {_SAFETENSORS} nor {_PICKLED}")


def build_adapter(
    tensors: Mapping[str, Tensor],
    config: AdapterConfig,
    model: AdaptableModel,
    *,
    source: str,
    max_rank: int,
    modules: frozenset[str] | None = None,
) -> Adapter:
    """The adapter of these tensors, whose names are PEFT's.

    source    names the adapter in errors
    max_rank  the largest rank that the server takes
    modules   last parts of the paths of layers that may have adapters; None: any
    Raises    ConfigError for a tensor that belongs to no layer, or does not fit its layer
    """
    pairs = _pairs(tensors, source)
    parts: dict[AdapterSite, list[tuple[int, Tensor, Tensor]]] = defaultdict(list)
    rank = 0
    for path, (a, b) in pairs.items():
        name = model.name_of(f"{path}.weight").removesuffix(".weight")
        target = model.targets.get(name)
        experts = None if target is not None else _experts(name, a, b, model)
        if experts is not None:
            rank = max(rank, _take_experts(parts, *experts, a, b, config, source, max_rank))
            continue
        if target is None:
            raise ConfigError(
                f"{source} has an adapter of {path}, but the model has no such linear layer, or "
                "none that adapters are served for; train the adapter without"
            )
        if modules is not None and path.rpartition(".")[2] not in modules:
            raise ConfigError(
                f"{source} has an adapter of {path}, which --lora-target-modules leaves out; "
                "start the server with that module, or with all"
            )
        rank = max(rank, _checked_rank(a.shape[0], path, source, max_rank))
        target.check(path, a, b, source)
        scaled = b.float() * config.scaling(path, a.shape[0])
        parts[target.site].append(target.part(a, scaled))
    additions = {site: LowRank.of(found, model.dtype) for site, found in parts.items()}
    return Adapter(
        additions=additions,
        num_bytes=sum(addition.num_bytes for addition in additions.values()),
        rank=rank,
        is_covered=all(site.is_recorded for site in additions),
    )


def _experts(
    name: str, a: Tensor, b: Tensor, model: AdaptableModel
) -> tuple[str, Sequence[FusedAdapter]] | None:
    """The fused tensor that PEFT's target_parameters adapt at this path, and its experts; None:
    there is none that fits.

    PEFT names the module, not the tensor: an adapter of a second tensor of the same module is at
    `<path>.base_layer`. The sizes tell which is which."""
    module = name
    while module.endswith(".base_layer"):
        module = module.removesuffix(".base_layer")
    for path, experts in model.fused.items():
        if path.rpartition(".")[0] != module:
            continue
        fused, target = experts[0]
        outputs, inputs = target.shape
        if (a.shape[1], b.shape[0]) == (inputs, outputs * fused.num_parts):
            return path, experts
    return None


def _take_experts(
    parts: dict[AdapterSite, list[tuple[int, Tensor, Tensor]]],
    path: str,
    experts: Sequence[FusedAdapter],
    a: Tensor,
    b: Tensor,
    config: AdapterConfig,
    source: str,
    max_rank: int,
) -> int:
    """Add the parts of all experts' layers; returns the rank of each.

    a  [experts * rank, in]: expert after expert; b [out, rank * experts]: rank after rank
    """
    num_experts = experts[0][0].num_experts
    if a.shape[0] % num_experts:
        raise ConfigError(f"{source} has {a.shape[0]} ranks at {path} for {num_experts} experts")
    rank = _checked_rank(a.shape[0] // num_experts, path, source, max_rank)
    of_expert = a.view(num_experts, rank, -1)
    scaled = (b.float() * config.scaling(path, rank)).view(b.shape[0], rank, num_experts)
    for fused, target in experts:
        outputs, size = scaled[:, :, fused.expert], target.shape[0]
        own = (
            outputs[fused.part :: fused.num_parts]
            if fused.takes_turns
            else outputs[fused.part * size : (fused.part + 1) * size]
        )
        parts[target.site].append(target.part(of_expert[fused.expert], own))
    return rank


def _checked_rank(rank: int, path: str, source: str, max_rank: int) -> int:
    if rank > max_rank:
        raise ConfigError(
            f"{source} has rank {rank} at {path}, more than --max-lora-rank {max_rank}"
        )
    return rank


def _pairs(tensors: Mapping[str, Tensor], source: str) -> dict[str, tuple[Tensor, Tensor]]:
    """(A [rank, in], B [out, rank]) by the path of their layer; ConfigError for anything else."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, a in tensors.items():
        plain = next((name[len(p) :] for p in _PREFIXES if name.startswith(p)), name)
        if not plain.endswith((_A, _B)):
            raise ConfigError(
                f"{source} has the tensor {name}, which is neither lora_A nor lora_B of a linear "
                "layer; such adapters are not served yet"
            )
        if plain.endswith(_B):
            continue
        b = tensors.get(name[: -len(_A)] + _B)
        if b is None:
            raise ConfigError(f"{source} has {name} without its lora_B")
        if a.ndim != 2 or b.ndim != 2 or not (a.is_floating_point() and b.is_floating_point()):
            raise ConfigError(f"{source}: {name} and its lora_B must be matrices of floats")
        if a.shape[0] != b.shape[1] or a.shape[0] < 1:
            raise ConfigError(
                f"{source}: {name} is {list(a.shape)}, but its lora_B is {list(b.shape)}"
            )
        found[plain[: -len(_A)]] = (a, b)
    if 2 * len(found) != len(tensors):
        raise ConfigError(f"{source} has a lora_B without its lora_A")
    if not found:
        raise ConfigError(f"{source} has no tensors")
    return found
