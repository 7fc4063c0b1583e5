"""From an entry of the catalogue to the source that fetches it."""

from __future__ import annotations

from pathlib import Path

from sapwood.store.catalogue import (
    HubSpec,
    SourceSpec,
    WheelFolderSpec,
    WheelPartsSpec,
    WheelSpec,
)
from sapwood.store.files import ADAPTER, detect_format
from sapwood.store.hub import HubClient
from sapwood.store.sources import (
    HubSource,
    Source,
    WheelDownload,
    WheelFolderSource,
    WheelSource,
)
from sapwood.store.wheel_parts import WheelPartsSource


def make_source(
    spec: SourceSpec, *, load_format: str, download: WheelDownload, hub: HubClient
) -> Source:
    match spec:
        case WheelSpec():
            return WheelSource(spec, download)
        case WheelPartsSpec():
            return WheelPartsSource(spec, download)
        case WheelFolderSpec():
            return WheelFolderSource(spec, download)
        case HubSpec():
            return HubSource(spec, load_format, hub)


def why_not(spec: SourceSpec, *, load_format: str, revision: str | None) -> str | None:
    """Why this source cannot provide the wanted files; None if it can."""
    if isinstance(spec, HubSpec):
        return None
    if revision is not None:
        return f"{spec.requirement} has no revision {revision!r}; only hub repositories have"
    if load_format == ADAPTER and isinstance(spec, WheelFolderSpec):
        return None
    weight_format = detect_format(Path(_weights(spec)))
    if load_format not in ("auto", "dummy", weight_format):
        return f"{spec.requirement} has {weight_format} weights, not {load_format}"
    return None


def _weights(spec: WheelSpec | WheelFolderSpec | WheelPartsSpec) -> str:
    """The name of the weight file."""
    match spec:
        case WheelSpec():
            return spec.member
        case WheelFolderSpec():
            return spec.weights
        case WheelPartsSpec():
            return spec.file
