"""Verifies a fetched model against a manifest, or against the checksums of its origin."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from sapwood.base.errors import ConfigError, ModelSourceError
from sapwood.store.catalogue import HubSpec
from sapwood.store.files import choose_format, find_weights, is_sidecar
from sapwood.store.hub import HubClient, choose_files
from sapwood.store.integrity import Checked, check, checksums_of, names_below
from sapwood.store.manifest import Checksum, Manifest, read_manifest
from sapwood.store.prepare import sidecars_of
from sapwood.store.progress import Progress
from sapwood.store.sources import Fetched

ORIGIN = "origin"
"""Stands for the checksums that the hub, or the catalogue, has of this model."""

_REPOSITORY = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>\S+))?")


def verify(
    fetched: Fetched,
    source: str,
    *,
    load_format: str,
    hub: HubClient,
    offline: bool,
    progress: Progress,
    everything: bool = False,
) -> Checked:
    """Compare the files of a model with the checksums of `source`.

    source      path of a manifest, ORIGIN, or a hub repository ("owner/name[@revision]")
    everything  whether all listed files are compared, not just those that serving the model reads

    Raises IntegrityError if a file does not match, ModelSourceError if the source is not available,
    and ConfigError if the source has no checksums of this model.
    """
    manifest = _manifest(fetched, source, hub, offline)
    directory, read = files_read(fetched.path, load_format)
    required = {*read, *_chosen(manifest, fetched.path, load_format)}
    if everything:
        is_local = Path(source).expanduser().is_file()
        required |= {name for name in manifest.files if is_local or (directory / name).is_file()}
    return check(directory, manifest, required=required, progress=progress)


def generate(fetched: Fetched, progress: Progress) -> Mapping[str, Checksum]:
    """Checksums of all files of a model.

    These are the files in its directory, or a weight file and the files that belong to it.
    """
    path = fetched.path
    if path.is_dir():
        directory, names = path, names_below(path)
    else:
        directory, names = files_read(path, "auto")
    return checksums_of(directory, names, progress)


def files_read(path: Path, load_format: str) -> tuple[Path, list[str]]:
    """(directory, names below it) of the files that serving that model would read."""
    weight_format = choose_format(path, load_format)
    weights = [] if load_format == "dummy" else find_weights(path, weight_format)
    directory = path if path.is_dir() else path.parent
    if path.is_file() and weight_format == "gguf":
        beside = list(sidecars_of(directory))
    else:
        beside = [name for name in names_below(directory) if is_sidecar(name)]
    return directory, [*beside, *(weight.name for weight in weights)]


def _chosen(manifest: Manifest, path: Path, load_format: str) -> Sequence[str]:
    """The listed files that serving would read if all were there; these must be there."""
    if path.is_file():
        return ()
    label = manifest.source
    try:
        return choose_files(label, sorted(manifest.files), load_format, HubSpec(repository=label))
    except ModelSourceError:
        return ()  # lists no weights, or several kinds: then those that are there decide


def _manifest(fetched: Fetched, source: str, hub: HubClient, offline: bool) -> Manifest:
    path = Path(source).expanduser()
    if path.is_file():
        return read_manifest(path)
    if source == ORIGIN:
        return _origin(fetched, hub, offline)
    match = _REPOSITORY.fullmatch(source)
    if match is None or source.startswith((".", "~", "/")) or source.endswith(".json"):
        raise ModelSourceError(
            f"there is no manifest {source}; give the path of one, {ORIGIN!r}, or a hub repository "
            "(owner/name), or make one with `sapwood verify generate`"
        )
    return _of_repository(match["repository"], match["revision"], hub, offline)


def _origin(fetched: Fetched, hub: HubClient, offline: bool) -> Manifest:
    if fetched.repository is not None:
        manifest = _of_repository(fetched.repository, fetched.revision, hub, offline)
        return _below(manifest, fetched)
    if fetched.sha256 is not None:
        listed = {fetched.path.name: Checksum(sha256=fetched.sha256)}
        return Manifest(source="the catalogue", files=listed)
    raise ConfigError(
        f"nobody says checksums of the files in {fetched.path}; make a manifest of a copy that you "
        "trust with `sapwood verify generate`, and give its path, or give the hub repository that "
        "they are from (owner/name)"
    )


def _below(manifest: Manifest, fetched: Fetched) -> Manifest:
    """The names relative to the model's place, which may be a folder inside its repository."""
    parents = [] if fetched.path.is_dir() else list(fetched.path.parents)
    root = next((parent for parent in parents if parent.name == fetched.revision), None)
    if root is None or root == fetched.path.parent:
        return manifest
    prefix = f"{fetched.path.parent.relative_to(root).as_posix()}/"
    listed = {
        name.removeprefix(prefix): checksum
        for name, checksum in manifest.files.items()
        if name.startswith(prefix)
    }
    return Manifest(source=manifest.source, files=listed)


def _of_repository(
    repository: str, revision: str | None, hub: HubClient, offline: bool
) -> Manifest:
    label = f"the hub's {repository}" + (f"@{revision}" if revision else "")
    if offline:
        raise ConfigError(
            f"checksums of {label} need the network, which --offline forbids; give a manifest"
        )
    try:
        listing = hub.list_files(repository, revision)
    except ModelSourceError as error:
        raise ModelSourceError(f"cannot get the checksums of {label}: {error.message}") from error
    if not listing.checksums:
        raise ModelSourceError(f"{label} says no checksums; give a manifest")
    return Manifest(source=label, files=listing.checksums)
