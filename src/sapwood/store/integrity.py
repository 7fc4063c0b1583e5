"""Hashes of a model's files, and their comparison with a manifest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from sapwood.base.errors import IntegrityError
from sapwood.store.manifest import MANIFEST_NAME, Checksum, Manifest
from sapwood.store.progress import Progress, stage

_CHUNK_BYTES = 1 << 22
_MAX_THREADS = 8
"""More threads do not help: then disk and memory are the limit."""
_NAMED_AT_MOST = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """The files whose contents were compared: their number and their bytes together."""

    num_files: int
    num_bytes: int


def names_below(directory: Path) -> list[str]:
    """All files below a directory except for hidden files and manifests, sorted."""
    names = []
    for path in directory.rglob("*"):
        relative = path.relative_to(directory)
        is_hidden = any(part.startswith(".") for part in relative.parts)
        if path.is_file() and not is_hidden and path.name != MANIFEST_NAME:
            names.append(relative.as_posix())
    return sorted(names)


def checksums_of(
    directory: Path, names: Collection[str], progress: Progress
) -> dict[str, Checksum]:
    """SHA-256 and size of these files, hashed in parallel. OSError if one cannot be read."""
    return {
        name: Checksum(sha256=digest, size=size)
        for name, (digest, size) in _hashed(
            directory, dict.fromkeys(names, _sha256), progress, f"hashing {directory.name}"
        ).items()
    }


def check(
    directory: Path,
    manifest: Manifest,
    *,
    required: Collection[str],
    progress: Progress,
) -> Checked:
    """Compare the files with the manifest.

    Raises IntegrityError, with the name of each file that is missing, not listed, or different."""
    mistakes = [f"{name}: is not listed" for name in required if name not in manifest.files]
    to_hash: dict[str, _Hash] = {}
    for name in required:
        expected = manifest.files.get(name)
        if expected is None:
            continue
        try:
            size = (directory / name).stat().st_size
        except OSError as error:
            mistakes.append(f"{name}: is missing ({error.strerror})")
            continue
        if expected.size is not None and size != expected.size:
            mistakes.append(f"{name}: found {size} bytes, expected {expected.size}")
        else:
            to_hash[name] = _sha256 if expected.sha256 is not None else _git_sha1
    found = _hashed(directory, to_hash, progress, f"verifying {directory.name}")
    for name, (digest, _) in found.items():
        expected = manifest.files[name]
        wanted = expected.sha256 or expected.git_sha1
        if digest != wanted:
            kind = "SHA-256" if expected.sha256 is not None else "git SHA-1"
            mistakes.append(f"{name}: found {kind} {digest}, expected {wanted}")
    if mistakes:
        raise IntegrityError(_explained(directory, manifest.source, mistakes, len(required)))
    return Checked(num_files=len(found), num_bytes=sum(size for _, size in found.values()))


def _explained(directory: Path, source: str, mistakes: Sequence[str], num_files: int) -> str:
    listed = "".join(f"\n  - {mistake}" for mistake in sorted(mistakes)[:_NAMED_AT_MOST])
    more = len(mistakes) - _NAMED_AT_MOST
    rest = f"\n  - and {more} more" if more > 0 else ""
    return (
        f"{len(mistakes)} of {num_files} files in {directory} are not what {source} says:"
        f"{listed}{rest}\n"
        "Download the model again; if it was changed on purpose, make a new manifest with "
        "`sapwood verify generate`."
    )


_Hash = Callable[[FileIO, int, Callable[[int], None]], str]


def _sha256(file: FileIO, size: int, advance: Callable[[int], None]) -> str:
    return _digest(hashlib.sha256(), file, advance)


def _git_sha1(file: FileIO, size: int, advance: Callable[[int], None]) -> str:
    """Git's hash of a blob: SHA-1 of "blob SIZE", a zero byte, and the contents."""
    return _digest(hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False), file, advance)


def _digest(hasher: hashlib._Hash, file: FileIO, advance: Callable[[int], None]) -> str:
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    while count := file.readinto(buffer):
        hasher.update(buffer[:count])
        advance(count)
    return hasher.hexdigest()


def _hashed(
    directory: Path, hashes: Mapping[str, _Hash], progress: Progress, label: str
) -> dict[str, tuple[str, int]]:
    """(digest, size) of each file, computed in threads, since hashlib frees the interpreter's lock.

    The largest files are begun first, so that no thread works alone for long at the end.
    """
    if not hashes:
        return {}
    sizes = {name: (directory / name).stat().st_size for name in hashes}

    def hash_and_size(name: str) -> tuple[str, int]:
        with (directory / name).open("rb", buffering=0) as file:
            return hashes[name](file, sizes[name], progress.advance), sizes[name]

    order = sorted(sizes, key=lambda name: -sizes[name])
    num_threads = min(os.cpu_count() or 1, _MAX_THREADS, len(order))
    with (
        stage(progress, label, sum(sizes.values())),
        ThreadPoolExecutor(num_threads, thread_name_prefix="sapwood-hash") as pool,
    ):
        return dict(zip(order, pool.map(hash_and_size, order), strict=True))
