"""The plan of a conversion: which layers become what, decided from the model's sizes alone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch

from sapwood.base.errors import ConfigError, WeightError
from sapwood.convert.layouts import num_bytes
from sapwood.convert.options import ConvertOptions
from sapwood.convert.scheme import WeightScheme, choose_scheme
from sapwood.convert.tapped import TappedScheme
from sapwood.kernels.interface import Kernels
from sapwood.layers.build import Build
from sapwood.layers.targets import Target, prefixed
from sapwood.models.config import DecoderConfig
from sapwood.models.lm.architecture import Architecture
from sapwood.models.text_part import IS_TEXT_PART


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The layers and tensors of a conversion.

    scheme     scheme of the converted layers
    targets    all tensors that the model wants, by name, without memory
    fused      all linear layers, in groups of names: a group is one product, and all or none of it
               is converted
    converted  names of the linear layers that are converted
    ignored    names of the linear layers that are not converted. The output layer is always one:
               readers expect it so, and it is often the embedding too. Routers are never converted
    ignorable  patterns of tensors that the checkpoint may have and that are left out
    name_of    from a tensor's name in the checkpoint to its name in `targets`
    """

    scheme: WeightScheme
    targets: Mapping[str, Target]
    fused: Sequence[tuple[str, ...]]
    converted: frozenset[str]
    ignored: tuple[str, ...]
    ignorable: tuple[str, ...]
    name_of: Callable[[str], str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors that the model wants, by name."""
        return {name: target.shape for name, target in self.targets.items()}

    def num_bytes(self, dtype: torch.dtype) -> tuple[int, int]:
        """(bytes of all tensors before, bytes after); `dtype` is the checkpoint's."""
        before = after = 0
        for name, shape in self.shapes.items():
            plain = math.prod(shape) * dtype.itemsize
            before += plain
            if len(shape) == 2 and name.removesuffix(".weight") in self.converted:
                after += num_bytes(self.scheme, (shape[0], shape[1]), dtype)
            else:
                after += plain
        return before, after

    def check_names(self, names: Iterable[str]) -> None:
        """Raises WeightError if tensors are missing or unknown to the model."""
        given = set(names)
        missing = sorted(self.shapes.keys() - given)
        unexpected = sorted(
            name
            for name in given - self.shapes.keys()
            if not any(fnmatchcase(name, pattern) for pattern in self.ignorable)
        )
        for kind, found in (("missing", missing), ("unexpected", unexpected)):
            if found:
                raise WeightError(
                    f"{len(found)} tensors are {kind} in the checkpoint: "
                    f"{', '.join(found[:10])}; check that config.json and the weights are of the "
                    "same model and complete"
                )


def make_plan(
    architecture: type[Architecture],
    decoder: DecoderConfig,
    kernels: Kernels,
    options: ConvertOptions,
    *,
    ignore: Sequence[str],
) -> Plan:
    """The plan for a model.

    ignore  regular expressions; a linear layer whose name begins with a match is not converted
    Raises  ConfigError for an invalid expression or one without a match, for fused layers of which
            only some are ignored, and for layers whose sizes do not fit the scheme"""
    _refuse_rescaling(architecture, decoder, options)
    nowhere = torch.device("meta")  # shapes without memory
    parts = architecture(decoder, Build(kernels=kernels, device=nowhere, dtype=torch.float32))
    if IS_TEXT_PART in decoder.hf:
        raise ConfigError(
            f"this {decoder.architecture} is one part of a model, whose conversion is not "
            "implemented; --quantization quantises it while it is loaded"
        )
    if parts.streams() is not None or decoder.heads_by_layer:
        raise ConfigError(
            f"{decoder.architecture} has layers that differ or a computation around them, whose "
            "conversion is not implemented; --quantization quantises them while they are loaded"
        )
    targets, fused = _linear_layers(parts)
    shapes = {name: target.shape for name, target in targets.items()}
    names = [name for group in fused for name in group]
    output_layer = architecture.names.head
    ignored = _matching(names, ignore, output_layer)
    for group in fused:
        if 0 < len(ignored.intersection(group)) < len(group):
            raise ConfigError(
                f"--ignore takes {', '.join(sorted(ignored.intersection(group)))} but not all of "
                f"{', '.join(group)}, which engines compute as one product; ignore all or none"
            )
    converted = frozenset(names) - ignored
    if not converted:
        raise ConfigError("--ignore leaves no layer to convert")
    in_sizes = {shapes[f"{name}.weight"][1] for name in converted}
    scheme = choose_scheme(options, sorted(in_sizes))
    _check_sizes(scheme, {name: shapes[f"{name}.weight"] for name in sorted(converted)})
    tied = decoder.tie_word_embeddings
    return Plan(
        scheme=scheme,
        targets={**_other_targets(parts), **targets},
        fused=fused,
        converted=converted,
        ignored=(
            *(name for name in names if name in ignored),
            *_routers(shapes, names),
            output_layer,
        ),
        ignorable=parts.ignorable + (parts.ignorable_when_tied if tied else ()),
        name_of=architecture.checkpoint_name,
    )


def _refuse_rescaling(
    architecture: type[Architecture], decoder: DecoderConfig, options: ConvertOptions
) -> None:
    if options.rescales and not architecture.can_be_rescaled:
        raise ConfigError(
            f"--rescale moves factors from norms into the layers after them, which the norms of "
            f"{decoder.architecture} do not allow; leave the option out"
        )


def _linear_layers(
    architecture: Architecture,
) -> tuple[dict[str, Target], list[tuple[str, ...]]]:
    """The targets of all layers, and the names of the linear layers, grouped as fused."""
    found: dict[str, Target] = {}
    fused: list[tuple[str, ...]] = []
    for index in range(architecture.config.num_layers):
        scheme = TappedScheme()
        build = replace(architecture.build, scheme=scheme)
        targets = architecture.rebuilt(build).layer(index).targets()
        for name, target in prefixed(architecture.names.layer(index), targets).items():
            scheme.placing = name
            target.place(torch.empty(target.shape, device=build.device))
            found[name] = target
        groups = [tuple(dict.fromkeys(storage.names)) for storage in scheme.storages]
        _refuse_unwritable(groups, found, architecture.config)
        fused += groups
    return found, fused


def _refuse_unwritable(
    groups: Sequence[tuple[str, ...]], targets: Mapping[str, Target], decoder: DecoderConfig
) -> None:
    names = [name for group in groups for name in group]
    for name in names:
        if not targets[f"{name}.weight"].has_rows or names.count(name) > 1:
            raise ConfigError(
                f"{name} does not hold the outputs of one linear layer as its rows "
                f"({decoder.architecture}), which formats of quantised weights want; "
                "--quantization quantises such layers while they are loaded"
            )


def _routers(shapes: Mapping[str, tuple[int, ...]], linears: Sequence[str]) -> list[str]:
    """Layers that stay as they are whatever the scheme is."""
    others = shapes.keys() - {f"{name}.weight" for name in linears}
    return sorted(
        name.removesuffix(".weight")
        for name in others
        if name.endswith(".weight") and len(shapes[name]) == 2
    )


def _other_targets(architecture: Architecture) -> dict[str, Target]:
    """The tensors outside of all layers."""
    embedding = architecture.embedding()
    tied = embedding if architecture.config.tie_word_embeddings else None
    names = architecture.names
    targets = (
        prefixed(names.embedding, embedding.targets())
        | prefixed(names.norm, architecture.norm().targets())
        | prefixed(names.head, architecture.head(tied).targets())
    )
    positions, norm = architecture.positions(), architecture.embedding_norm()
    if positions is not None:
        targets |= prefixed(names.positions, positions.targets())
    if norm is not None:
        targets |= prefixed(names.embedding_norm, norm.targets())
    return targets


def _matching(names: Sequence[str], patterns: Sequence[str], output_layer: str) -> frozenset[str]:
    found: set[str] = set()
    for pattern in patterns:
        try:
            matched = {name for name in names if re.match(pattern, name)}
        except re.error as error:
            raise ConfigError(f"--ignore {pattern!r} is no regular expression: {error}") from error
        if not matched and not re.match(pattern, output_layer):
            raise ConfigError(
                f"--ignore {pattern!r} matches none of the {len(names)} linear layers, such as "
                f"{names[0]}; begin it with '.*' if it is to match anywhere"
            )
        found |= matched
    return frozenset(found)


def _check_sizes(scheme: WeightScheme, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        reason = scheme.why_not((shape[0], shape[1]))
        if reason is not None:
            raise ConfigError(
                f"{name} cannot be stored as asked: {reason}; choose another --scheme or "
                "--group-size, or leave such layers as they are with --ignore"
            )
