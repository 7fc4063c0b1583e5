"""Chooses the files of a hub repository that a model needs, and gets them by huggingface_hub."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sapwood.base.errors import ModelSourceError
from sapwood.store.catalogue import HubSpec
from sapwood.store.files import (
    ADAPTER,
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    FORMATS,
    choose_projector,
    detect_format,
    is_sidecar,
    list_choices,
)
from sapwood.store.manifest import Checksum


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """The files of a repository.

    commit     the commit that the revision stood for at the time of the call
    files      name -> size in bytes; None: unknown
    checksums  the files' checksums, as far as the hub knows them
    """

    commit: str
    files: Mapping[str, int | None]
    checksums: Mapping[str, Checksum] = field(default_factory=dict)


class HubClient(Protocol):
    """Both methods raise ModelSourceError with the reason when the hub does not answer."""

    def list_files(self, repository: str, revision: str | None) -> Listing: ...

    def download(self, repository: str, commit: str, names: Sequence[str], cache: Path) -> Path:
        """Download these files. Returns the directory below `cache` that has them by name."""
        ...


def choose_files(
    label: str, names: Sequence[str], load_format: str, spec: HubSpec
) -> tuple[str, ...]:
    """The configuration, the tokenizer and the weights of one format among a repository's files.

    Raises ModelSourceError if the wanted file does not exist, if the repository has no weights in
    the wanted format, or if there are several GGUF files to choose from.
    """
    # Directories hold other things: "original/" weights, ONNX exports, training checkpoints.
    top = [name for name in names if "/" not in name]
    sidecars = [name for name in names if is_sidecar(name) and not name.endswith(".index.json")]
    if spec.file is not None:
        return (*sidecars, *_parts_of(label, spec.file, names), *_projector_of(spec.file, top))
    if load_format == ADAPTER:
        tensors = next((name for name in ADAPTER_WEIGHTS if name in top), None)
        if tensors is None or ADAPTER_CONFIG not in top:
            raise ModelSourceError(
                f"{label} is no LoRA adapter: it needs {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS[0]}"
            )
        return ADAPTER_CONFIG, tensors
    if load_format == "dummy":
        return tuple(sidecars)
    weight_format = _choose_format(label, top, load_format)
    if weight_format == "gguf":
        chosen = _only_choice(label, top)
        return (*sidecars, *_parts_of(label, chosen, names), *_projector_of(chosen, top))
    weights = [name for name in top if detect_format(Path(name)) == weight_format]
    standard = [name for name in weights if not name.startswith("consolidated")]
    indexes = [
        name
        for name in top
        if name in ("model.safetensors.index.json", "pytorch_model.bin.index.json")
        and (name.startswith("model") == (weight_format == "safetensors"))
    ]
    return (*sidecars, *indexes, *(standard or weights))


def _choose_format(label: str, top: Sequence[str], load_format: str) -> str:
    present = {detect_format(Path(name)) for name in top} & set(FORMATS)
    wanted = FORMATS if load_format == "auto" else (load_format,)
    for weight_format in wanted:
        if weight_format in present:
            return weight_format
    raise ModelSourceError(
        f"{label} has no weights in {' or '.join(wanted)} "
        f"(it has: {', '.join(sorted(present)) or 'none that sapwood reads'})"
    )


def _only_choice(label: str, top: Sequence[str]) -> str:
    choices = list_choices(list(top))
    if len(choices) != 1:
        raise ModelSourceError(
            f"{label} has {len(choices)} GGUF files; choose one as {label}:FILE out of "
            f"{', '.join(choices)}"
        )
    return choices[0]


def _projector_of(file: str, top: Sequence[str]) -> tuple[str, ...]:
    """The file of the tower of a GGUF, if the repository has one."""
    if "/" in file or detect_format(Path(file)) != "gguf":
        return ()
    found = choose_projector(top)
    return () if found is None else (found,)


def _parts_of(label: str, file: str, names: Sequence[str]) -> tuple[str, ...]:
    """The file itself and, of a split GGUF, its other parts."""
    if file not in names:
        choices = ", ".join(list_choices(list(names))) or "no GGUF"
        raise ModelSourceError(f"{label}: the repository has no file {file} (it has: {choices})")
    stem, part, rest = file.rpartition("-00001-of-")
    return tuple(name for name in names if part and _is_part(name, stem, rest)) or (file,)


def _is_part(name: str, stem: str, rest: str) -> bool:
    middle = name.removeprefix(f"{stem}-").removesuffix(f"-of-{rest}")
    return len(middle) == 5 and middle.isdigit() and name == f"{stem}-{middle}-of-{rest}"


HTTP_LIBRARIES = ("httpx", "httpx2", "requests")
"""Whose errors huggingface_hub lets through; which of them, its version decides."""


class HuggingFaceHub:
    """The real hub, with the user's own endpoint, token and proxies."""

    def list_files(self, repository: str, revision: str | None) -> Listing:
        from huggingface_hub import HfApi

        with _explained(repository, revision):
            info = HfApi().model_info(repository, revision=revision, files_metadata=True)
        siblings = info.siblings or ()
        sizes = {file.rfilename: file.size for file in siblings}
        sums = {file.rfilename: _checksum(file) for file in siblings}
        known = {name: digest for name, digest in sums.items() if digest is not None}
        return Listing(commit=str(info.sha), files=sizes, checksums=known)

    def download(self, repository: str, commit: str, names: Sequence[str], cache: Path) -> Path:
        from huggingface_hub import snapshot_download

        with _explained(repository, commit):
            path = snapshot_download(
                repository,
                revision=commit,
                cache_dir=cache,
                allow_patterns=[glob.escape(name) for name in names],
                tqdm_class=_silent_bar(),
            )
        return Path(path)


def _checksum(file: Any) -> Checksum | None:
    """A file's checksum: the SHA-256 of a file in LFS, whose blob is only a pointer; else git's."""
    if file.lfs is not None:
        return Checksum(sha256=str(file.lfs.sha256).lower(), size=file.lfs.size)
    if file.blob_id is not None:
        return Checksum(git_sha1=str(file.blob_id).lower(), size=file.size)
    return None


def _silent_bar() -> Any:
    """Disables the progress bar of huggingface_hub, which would disturb our own bar."""
    from huggingface_hub import utils

    class SilentBar(utils.tqdm):  # type: ignore[misc, name-defined]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

    return SilentBar


@contextmanager
def _explained(repository: str, revision: str | None) -> Iterator[None]:
    """Turn errors of huggingface_hub into ModelSourceError with a useful reason."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelSourceError(
            "access is gated: accept its terms on the hub, then `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelSourceError(f"{repository} has no revision {revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelSourceError(
            "no such repository, or it is private: check the name or `hf auth login`"
        ) from error
    except Exception as error:
        is_of_network = type(error).__module__.partition(".")[0] in HTTP_LIBRARIES
        if not is_of_network and not isinstance(
            error, errors.HfHubHTTPError | OSError | ValueError
        ):
            raise
        first_line = next(iter(str(error).strip().splitlines()), "")
        raise ModelSourceError(f"{type(error).__name__}: {first_line}") from error
