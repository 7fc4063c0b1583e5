"""Assembles the weights of checkpoints that other tools quantised, layer by layer.

A quantised layer has several tensors: codes, scales, zero points. They are held until all tensors
of the layer have been read, and then become its weight.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from sapwood.base.errors import WeightError
from sapwood.kernels.coded import LinearPart
from sapwood.layers.quantization.formats.interface import (
    CheckpointFormat,
    LinearTensors,
    is_unused,
)
from sapwood.layers.quantization.formats.parts import parts_of
from sapwood.layers.targets import Slice, Target, unused
from sapwood.models.loader import safetensors
from sapwood.models.loader.fused_experts import FusedExperts
from sapwood.models.loader.needed import Needed, owner_of
from sapwood.models.loader.reading import Advance, Wanted, every, ignore
from sapwood.store.files import ModelFiles

log = logging.getLogger(__name__)


def iterate(
    files: ModelFiles,
    form: CheckpointFormat,
    targets: Mapping[str, Target],
    advance: Advance = ignore,
    name_of: Callable[[str], str] = str,
    wanted: Wanted = every,
) -> Iterator[tuple[str, Tensor | LinearPart]]:
    """Every wanted weight, once, as (name, quantised weight, or tensor in the checkpoint's dtype).

    targets  of the model, by name. Where a rank places some rows or columns of a weight only, these
             are read and come alone, if the format lets its tensors be cut there
    name_of  from a tensor's name in the checkpoint to its name in the model
    wanted   by the names in the checkpoint
    Raises WeightError, with the name, for a tensor that is missing or does not fit."""
    if files.weight_format != "safetensors":
        raise WeightError(
            f"{files.name} is a {form.name} checkpoint with {files.weight_format} weights; such "
            "checkpoints are read from safetensors only"
        )
    fused, needed = FusedExperts(targets), Needed(targets, name_of, wanted)
    shapes = safetensors.shapes(files)
    names = fused.names(name_of(name) for name in shapes if needed(name))
    tensor_parts, cut = _own_parts(shapes, form, targets, name_of)
    read = safetensors.iterate(files, None, advance, needed, tensor_parts, needed.experts)
    tensors = ((name_of(name), one) for name, one in read)
    yield from assembled(fused.split(tensors), names, form, targets, cut)


def _own_parts(
    shapes: Mapping[str, tuple[int, ...]],
    form: CheckpointFormat,
    targets: Mapping[str, Target],
    name_of: Callable[[str], str],
) -> tuple[dict[str, Target], set[str]]:
    """What this rank reads of which tensors, by their names in the checkpoint, and the names of the
    layers whose tensors these are, in the model. `shapes`: of all tensors, by the former names."""
    found: dict[str, Target] = {}
    layers: dict[str, dict[str, str]] = {}
    for stored in shapes:
        name = name_of(stored)
        owner = owner_of(name, targets)
        if owner is not None:
            layers.setdefault(owner, {})[name.removeprefix(f"{owner}.")] = stored
        elif name in targets:
            found[stored] = targets[name]
    cut: set[str] = set()
    for owner, kinds in layers.items():
        target = targets[f"{owner}.weight"]
        if target.part is None:
            continue
        parts = parts_of(
            {kind: shapes[stored] for kind, stored in kinds.items()},
            (target.shape[0], target.shape[1]),
            target.part,
            form.units(owner),
        )
        if parts is not None:
            cut.add(owner)
            for kind, part in parts.items():
                stored = kinds[kind]
                found[stored] = replace(unused(shapes[stored]), part=part)
    return found, cut


def assembled(
    tensors: Iterable[tuple[str, Tensor]],
    names: Sequence[str],
    form: CheckpointFormat,
    targets: Mapping[str, Target],
    cut: Container[str] = (),
) -> Iterator[tuple[str, Tensor | LinearPart]]:
    """The weights made of these tensors; `names` has the names of all tensors that will come, `cut`
    those of the layers of whose weights only this rank's parts come."""
    owners = {name: owner_of(name, targets) for name in names}
    passed_over = [name for name in owners if is_unused(name)]
    awaited: dict[str, set[str]] = {}
    for name, owner in owners.items():
        if owner is not None and not is_unused(name):
            awaited.setdefault(owner, set()).add(name)
    held: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        owner = owners.get(name)
        if is_unused(name):
            continue
        if owner is None:
            yield name, tensor
            continue
        parts = held.setdefault(owner, {})
        parts[name.removeprefix(f"{owner}.")] = tensor
        awaited[owner].discard(name)
        if not awaited[owner]:
            part = targets[f"{owner}.weight"].part if owner in cut else None
            yield f"{owner}.weight", _weight(owner, held.pop(owner), form, targets, part)
    if passed_over:
        log.info(
            "%d scales of activations or of the KV cache are not used: activations are not in the "
            "checkpoint's 8 bits, and --dtype is the cache's (first: %s)",
            len(passed_over),
            passed_over[0],
        )


def _weight(
    module: str,
    parts: dict[str, Tensor],
    form: CheckpointFormat,
    targets: Mapping[str, Target],
    part: Slice | None,
) -> Tensor | LinearPart:
    shape = targets[f"{module}.weight"].shape
    tensors = LinearTensors(module, (shape[0], shape[1]), parts, form.name, part)
    weight = form.linear(tensors)
    tensors.refuse_others()
    return weight
