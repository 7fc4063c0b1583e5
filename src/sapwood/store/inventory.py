"""The models in the cache on disk: what they are, how large, when they were last used."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sapwood.base.errors import ModelSourceError, WeightError
from sapwood.store.catalogue import (
    CatalogueEntry,
    HubSpec,
    WheelFolderSpec,
    WheelSpec,
)
from sapwood.store.files import FORMATS, choose_format, find_weights
from sapwood.store.gguf_header import read_header
from sapwood.store.progress import bytes_under
from sapwood.store.safetensors_header import read_safetensors_header
from sapwood.store.used import HUB, MODELS, used_file

_HUB_PREFIX = "models--"
UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredModel:
    """A model in the cache.

    names      names by which it can be asked for, the shortest first
    directory  its files
    markers    files elsewhere in the cache that say that it is complete
    num_bytes  size of all its files
    numbers    how its weights are stored: "Q4_1", "BF16", "gptq"
    used_s     when it was last asked for, in seconds since 1970; None: nobody has written that down
    """

    names: tuple[str, ...]
    directory: Path
    markers: tuple[Path, ...]
    num_bytes: int
    numbers: str
    used_s: float | None


def stored_models(home: Path, catalogue: Mapping[str, CatalogueEntry]) -> list[StoredModel]:
    """All models in the cache below `home`, the last used first.

    All files of a hub repository are one model, whatever revisions of it were fetched."""
    found = [*_from_wheels(home, catalogue), *_from_hub(home, catalogue)]
    return sorted(found, key=lambda model: (-(model.used_s or 0.0), model.names))


def remove(home: Path, model: StoredModel) -> None:
    """Remove a model's files. A server that has opened them keeps them until it ends."""
    for marker in model.markers:  # first: without it nobody takes the rest for complete
        marker.unlink(missing_ok=True)
    shutil.rmtree(model.directory)
    used_file(home, model.directory).unlink(missing_ok=True)


def _from_wheels(home: Path, catalogue: Mapping[str, CatalogueEntry]) -> Iterator[StoredModel]:
    names: dict[str, list[str]] = {}
    for entry in catalogue.values():
        for source in entry.sources:
            if isinstance(source, WheelSpec | WheelFolderSpec):
                names.setdefault(source.sha256[:32], []).append(entry.name)
    for directory in _directories(home / MODELS):
        known = names.get(directory.name, [directory.name])
        paths = sorted(directory.iterdir())
        if paths:
            yield _stored(home, directory, known, paths[0], ())


def _from_hub(home: Path, catalogue: Mapping[str, CatalogueEntry]) -> Iterator[StoredModel]:
    markers: dict[str, list[Path]] = {}
    shots: dict[str, list[Path]] = {}
    for marker in sorted((home / HUB / "complete").glob("*.json")):
        content = json.loads(marker.read_text("utf-8"))
        folder = Path(content["snapshot"]).parts[0]
        markers.setdefault(folder, []).append(marker)
        snapshot = home / HUB / content["snapshot"]
        weights = [name for name in content["files"] if name.endswith(".gguf")]
        shots.setdefault(folder, []).append(snapshot / weights[0] if weights else snapshot)
    for folder, its_markers in markers.items():
        directory = home / HUB / folder
        if not directory.is_dir():
            continue
        repository = folder.removeprefix(_HUB_PREFIX).replace("--", "/", 1)
        short = [
            entry.name
            for entry in catalogue.values()
            for source in entry.sources
            if isinstance(source, HubSpec) and source.repository == repository
        ]
        yield _stored(home, directory, [*short, repository], shots[folder][0], its_markers)


def _directories(parent: Path) -> list[Path]:
    return sorted(path for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []


def _stored(
    home: Path, directory: Path, names: Sequence[str], model: Path, markers: Sequence[Path]
) -> StoredModel:
    used = used_file(home, directory)
    return StoredModel(
        names=tuple(names),
        directory=directory,
        markers=tuple(markers),
        num_bytes=bytes_under(directory),
        numbers=_numbers(model),
        used_s=used.stat().st_mtime if used.exists() else None,
    )


def _numbers(model: Path) -> str:
    """How the weights of a file or directory are stored; UNKNOWN if that cannot be read."""
    try:
        weight_format = choose_format(model, "auto")
        weights = find_weights(model, weight_format) if weight_format in FORMATS else ()
        if weight_format == "gguf":
            return _gguf_type(weights)
        folder = model if model.is_dir() else model.parent
        config = json.loads((folder / "config.json").read_text("utf-8"))
        quantization = config.get("quantization_config")
        if isinstance(quantization, dict):
            return str(quantization.get("quant_method", UNKNOWN))
        if weight_format == "safetensors":
            return _most(
                [(one.dtype, one.num_bytes) for one in read_safetensors_header(weights[0])]
            )
        return str(config.get("dtype") or config.get("torch_dtype") or UNKNOWN)
    except (OSError, ValueError, ModelSourceError, WeightError):
        return UNKNOWN


def _gguf_type(weights: Sequence[Path]) -> str:
    """The type that most weights of the layers have."""
    return _most(
        [
            (tensor.type, math.prod(tensor.shape))
            for path in weights
            for tensor in read_header(path).tensors
            if tensor.name.startswith("blk.") and len(tensor.shape) == 2
        ]
    )


def _most(sizes: Sequence[tuple[str, int]]) -> str:
    """The name with the largest sum; UNKNOWN if there is none."""
    sums: Counter[str] = Counter()
    for name, size in sizes:
        sums[name] += size
    return sums.most_common(1)[0][0] if sums else UNKNOWN
