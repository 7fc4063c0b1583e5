"""Manifests: lists of the checksums that a model's files must have.

A manifest is a JSON file {"files": {name: {"sha256": …, "size": …}}}, with names relative to the
model's directory. The older form {"checksums": {name: sha256}} is read as well. The hub tells the
SHA-256 of a repository's files in LFS, and git's own hash of its other files.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sapwood.base.errors import ModelSourceError

MANIFEST_NAME = "checksums.json"
"""The usual name of a manifest; a file of that name never counts as part of a model."""

log = logging.getLogger(__name__)

_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checksum:
    """The checksum of one file, which has at least one of the two hashes.

    sha256    64 lower-case hex digits
    git_sha1  git's hash of the file as a blob, 40 lower-case hex digits
    size      in bytes; None: unknown
    """

    sha256: str | None = None
    git_sha1: str | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        if self.sha256 is None and self.git_sha1 is None:
            raise ValueError("a checksum needs a hash")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A list of checksums.

    source  where the list comes from, for messages
    files   checksums by name below the model's directory
    """

    source: str
    files: Mapping[str, Checksum]


def read_manifest(path: Path) -> Manifest:
    """ModelSourceError, naming the entry, if the file cannot be read or is no manifest."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _wrong(path, f"it cannot be read ({error})") from error
    if not isinstance(content, dict) or not ("files" in content or "checksums" in content):
        raise _wrong(path, 'it has neither "files" nor "checksums"')
    if "files" in content:
        table = content["files"]
    else:
        log.warning(
            'the manifest %s has the old form {"checksums": …}, which will not be read for ever; '
            "make a new one with `sapwood verify generate`",
            path,
        )
        table = content["checksums"]
        if isinstance(table, dict):
            table = {name: {"sha256": value} for name, value in table.items()}
    if not isinstance(table, dict) or not table:
        raise _wrong(path, "it lists no files")
    return Manifest(
        source=str(path), files={name: _entry(path, name, said) for name, said in table.items()}
    )


def write_manifest(path: Path, files: Mapping[str, Checksum]) -> None:
    """`files` have SHA-256 and size. The file appears whole or not at all."""
    table = {
        name: {"sha256": file.sha256, "size": file.size} for name, file in sorted(files.items())
    }
    staged = path.with_name(f".{path.name}.part")
    staged.write_text(json.dumps({"files": table}, indent=1, ensure_ascii=False) + "\n", "utf-8")
    staged.replace(path)


def _wrong(path: Path, what: str) -> ModelSourceError:
    return ModelSourceError(
        f"{path} is no manifest of checksums: {what}; make one with `sapwood verify generate`"
    )


def _entry(path: Path, name: str, said: Any) -> Checksum:
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or name.startswith("/"):
        raise _wrong(path, f"{name!r} is no name of a file below the model's directory")
    if not isinstance(said, dict):
        raise _wrong(path, f"{name} has no sha256")
    digest, size = said.get("sha256"), said.get("size")
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        raise _wrong(path, f"the sha256 of {name} is {digest!r} instead of 64 hex digits")
    if size is not None and (type(size) is not int or size < 0):
        raise _wrong(path, f"the size of {name} is {size!r} instead of a number of bytes")
    return Checksum(sha256=digest.lower(), size=size)
