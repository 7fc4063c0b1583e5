"""`--init-expert-location`: which rank has which experts at the start."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.layers.expert_balance import balanced
from sapwood.layers.expert_slots import first_placement
from sapwood.models.config import DecoderConfig
from sapwood.schema.config.parallel import ParallelConfig

TRIVIAL = "trivial"
MAP, COUNT = "physical_to_logical_map", "logical_count"
_FLAG = "--init-expert-location"


def initial_placements(
    parallel: ParallelConfig, config: DecoderConfig
) -> Mapping[int, tuple[int, ...]]:
    """By layer, the expert of each slot over all ranks; empty: as the layers have them by
    themselves. ConfigError if what was asked for does not fit the model or the ranks."""
    if parallel.init_expert_location == TRIVIAL:
        return {}
    experts = config.experts
    assert experts is not None, "only a model with experts has them on several ranks"
    found = _read(parallel.init_expert_location)
    if MAP not in found and COUNT not in found:
        raise ConfigError(f"{_FLAG} has neither {MAP} nor {COUNT}")
    name = MAP if MAP in found else COUNT
    rows = _numbers(name, found[name])
    layers = config.expert_layers
    if len(rows) == config.num_layers:
        rows = rows[layers]
    if len(rows) != len(layers):
        raise ConfigError(
            f"{_FLAG} has {len(rows)} layers in {name}, but the model has {config.num_layers}, "
            f"{len(layers)} of them with experts"
        )
    num_slots = experts.num_experts + parallel.ep_num_redundant_experts
    width = num_slots if name == MAP else experts.num_experts
    if rows.shape[1] != width:
        raise ConfigError(
            f"{_FLAG} has {rows.shape[1]} numbers per layer in {name}, but the model has "
            f"{experts.num_experts} experts, with --ep-num-redundant-experts "
            f"{parallel.ep_num_redundant_experts}: it must be {width}"
        )
    first = first_placement(experts.num_experts, num_slots)
    placements = {}
    for layer, row in zip(layers, rows.tolist(), strict=True):
        if name == COUNT:
            placements[layer] = balanced(first, row, parallel.ep_size)
        else:
            _check(layer, row, experts.num_experts, parallel.ep_size)
            placements[layer] = tuple(row)
    return placements


def _read(text: str) -> Mapping[str, Any]:
    """What the file has, or the text itself."""
    path = Path(text)
    try:
        if text.endswith(".pt"):
            found = torch.load(path, map_location="cpu", weights_only=True)
        else:
            found = json.loads(path.read_bytes() if text.endswith(".json") else text)
    except (OSError, ValueError, RuntimeError, RecursionError, pickle.UnpicklingError) as error:
        raise ConfigError(
            f"{_FLAG} is {text[:80]!r}, which is neither trivial nor JSON, nor the path of a "
            f"readable .json or .pt file: {error}"
        ) from None
    if not isinstance(found, Mapping):
        raise ConfigError(f"{_FLAG} must have {MAP} or {COUNT} by name, not {type(found).__name__}")
    return found


def _numbers(name: str, value: Any) -> Tensor:
    """[layers, numbers] int64; counts of several steps are added up."""
    try:
        found = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{_FLAG} has a {name} that is no table of numbers: {error}") from None
    if name == COUNT and found.dim() == 3:
        found = found.sum(dim=0)
    if found.dim() != 2 or found.is_complex() or found.is_floating_point():
        raise ConfigError(
            f"{_FLAG} has a {name} of shape {tuple(found.shape)} and {found.dtype}, but it must be "
            "a table of whole numbers, layers by slots or experts"
        )
    if bool((found < 0).any()):
        raise ConfigError(f"{_FLAG} has numbers below 0 in {name}")
    return found.long()


def _check(layer: int, placement: Sequence[int], num_experts: int, num_ranks: int) -> None:
    """Raises ConfigError if an expert has no slot, or two on one rank."""
    missing = sorted(set(range(num_experts)) - set(placement))
    unknown = sorted(set(placement) - set(range(num_experts)))
    if missing or unknown:
        what = f"lacks expert {missing[0]}" if missing else f"has an expert {unknown[0]}"
        raise ConfigError(
            f"{_FLAG}: layer {layer} {what}, but each of the model's experts 0 to "
            f"{num_experts - 1} needs a slot, and no others"
        )
    size = len(placement) // num_ranks
    for rank in range(num_ranks):
        own = placement[rank * size : (rank + 1) * size]
        if len(set(own)) < len(own):
            raise ConfigError(
                f"{_FLAG}: layer {layer} has an expert twice on rank {rank}, whose slots have "
                f"{', '.join(map(str, own))}; copies must be on different ranks"
            )
