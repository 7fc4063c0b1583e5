"""A model's files on disk, recognised by their names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sapwood.base.errors import ModelSourceError

FORMATS = ("safetensors", "gguf", "pt")
"""Weight formats in the order in which "auto" prefers them."""

LOAD_FORMATS = ("auto", *FORMATS, "dummy")

ADAPTER = "adapter"
"""In the place of a weight format: the files are a LoRA adapter's, not a model's."""
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""In the order of preference."""

_SUFFIXES = {
    ".safetensors": "safetensors",
    ".gguf": "gguf",
    ".bin": "pt",
    ".pt": "pt",
    ".pth": "pt",
}
# Files with a weight suffix that hold no weights of the model itself.
_NOT_WEIGHTS = re.compile(
    r"^(training_args|optimizer|scheduler|scaler|rng_state|adapter_model)|mmproj", re.IGNORECASE
)
_PROJECTOR = re.compile(r"mmproj[^/]*\.gguf", re.IGNORECASE)
_SIDECAR_SUFFIXES = (".json", ".jinja", ".model", ".tiktoken", ".txt")
_SPLIT_GGUF = re.compile(r"(?P<stem>.*)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """The files of a model.

    name           the name by which the model was asked for
    path           directory with config.json and, if the model has them, tokenizer.json,
                   tokenizer_config.json, generation_config.json and chat_template.jinja
    weights        weight files, in order; for a GGUF, `path` also holds tensors.json
    weight_format  "safetensors", "gguf", "pt", or "none": no weights on disk, so that only
                   --load-format dummy can serve the model
    """

    name: str
    path: Path
    weights: tuple[Path, ...]
    weight_format: str

    def __post_init__(self) -> None:
        if self.weight_format not in (*FORMATS, "none"):
            raise ValueError(f"unknown weight format {self.weight_format!r}")
        if (self.weight_format == "none") != (not self.weights):
            raise ValueError(f"format {self.weight_format!r} with {len(self.weights)} weight files")


def is_sidecar(name: str) -> bool:
    """Whether a file of that name may be a model's configuration, tokenizer, template or index."""
    return Path(name).suffix in _SIDECAR_SUFFIXES and (
        "/" not in name
        or name.startswith("additional_chat_templates/")
        or name.endswith("_Pooling/config.json")
    )


def detect_format(path: Path) -> str:
    """The weight format of a file or directory: "safetensors", "gguf", "pt" or "none"."""
    if path.is_dir():
        present = {detect_format(child) for child in path.iterdir() if child.is_file()}
        return next((known for known in FORMATS if known in present), "none")
    if _NOT_WEIGHTS.search(path.name):
        return "none"
    return _SUFFIXES.get(path.suffix.lower(), "none")


def choose_format(path: Path, load_format: str) -> str:
    """The format in which to read `path`; ModelSourceError if it does not have the wanted one."""
    found = detect_format(path)
    if load_format == "dummy" or (load_format == "auto" and found != "none"):
        return found
    if load_format in FORMATS and _weight_files(path, load_format):
        return load_format
    wanted = "weights" if load_format == "auto" else f"{load_format} weights"
    raise ModelSourceError(
        f"{path} has no {wanted} (found: {found}); give a model that has them, "
        f"or use --load-format dummy to serve random weights"
    )


def find_weights(path: Path, weight_format: str) -> tuple[Path, ...]:
    """The weight files of one format below a directory, in order; or the file itself.

    Raises ModelSourceError if a shard of an index, or of a split GGUF, is missing, or if there are
    several GGUF files and none was chosen.
    """
    if path.is_file():
        return split_parts(path) if weight_format == "gguf" else (path,)
    if weight_format == "gguf":
        return split_parts(_only_gguf(path))
    index = find_index(path, weight_format)
    if index is not None:
        return _shards(index)
    found = _weight_files(path, weight_format)
    # A repository may hold the same weights twice: in the layout we read and as "consolidated".
    standard = [file for file in found if not file.name.startswith("consolidated")]
    return tuple(standard or found)


def find_index(directory: Path, weight_format: str) -> Path | None:
    """The file that says which shard holds which tensor, if there is one."""
    names = {
        "safetensors": "model.safetensors.index.json",
        "pt": "pytorch_model.bin.index.json",
    }
    path = directory / names.get(weight_format, "")
    return path if path.is_file() else None


def read_index(index: Path) -> dict[str, str]:
    """Tensor name to shard file name; ModelSourceError if the file is no such index."""
    try:
        table = json.loads(index.read_text("utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelSourceError(
            f"{index} is not a readable weight index ({error!r}); download the model again"
        ) from error
    if not isinstance(table, dict) or not table:
        raise ModelSourceError(
            f"{index} is not a readable weight index (its weight_map is no table of tensors); "
            "download the model again"
        )
    for name, shard in table.items():
        # A name with directories could point anywhere on this machine.
        if not isinstance(shard, str) or shard in ("", ".", "..") or Path(shard).name != shard:
            raise ModelSourceError(
                f"{index} says that {name} is in {shard!r}, which is no file beside it; download "
                "the model again"
            )
    return table


def split_parts(path: Path) -> tuple[Path, ...]:
    """All parts of a GGUF that is split as NAME-00001-of-00003.gguf; else just the file."""
    match = _SPLIT_GGUF.fullmatch(path.name)
    if match is None:
        return (path,)
    count = int(match["count"])
    parts = tuple(
        path.with_name(f"{match['stem']}-{part:05d}-of-{count:05d}.gguf")
        for part in range(1, count + 1)
    )
    _require(parts, f"{path.name} is part of a GGUF in {count} files")
    return parts


def choose_projector(names: Iterable[str]) -> str | None:
    """The file of the tower of a GGUF among these names: the one in 16 bits, if there are several.

    None: there is none"""
    found = sorted(name for name in names if _PROJECTOR.fullmatch(name))
    exact = [name for name in found if "f16" in name.lower()]
    return next(iter(exact or found), None)


def list_choices(names: list[str]) -> list[str]:
    """The GGUF files among `names` that can be chosen; a split file is chosen by its first part."""
    choices = []
    for name in sorted(names):
        match = _SPLIT_GGUF.fullmatch(name)
        is_later_part = match is not None and int(match["part"]) != 1
        if detect_format(Path(name)) == "gguf" and not is_later_part:
            choices.append(name)
    return choices


def _weight_files(path: Path, weight_format: str) -> list[Path]:
    candidates = sorted(path.iterdir()) if path.is_dir() else [path]
    return [file for file in candidates if file.is_file() and detect_format(file) == weight_format]


def _only_gguf(directory: Path) -> Path:
    choices = list_choices([file.name for file in _weight_files(directory, "gguf")])
    if len(choices) != 1:
        raise ModelSourceError(
            f"{directory} has {len(choices)} GGUF files ({', '.join(choices)}); "
            f"give the path of the one to serve"
        )
    return directory / choices[0]


def _shards(index: Path) -> tuple[Path, ...]:
    shards = tuple(index.parent / name for name in dict.fromkeys(read_index(index).values()))
    _require(shards, f"{index.name} lists {len(shards)} shards")
    return shards


def _require(files: tuple[Path, ...], what: str) -> None:
    missing = [file for file in files if not file.is_file()]
    if missing:
        names = ", ".join(file.name for file in missing)
        raise ModelSourceError(
            f"{what} but {len(missing)} of them are missing from {files[0].parent}: {names}; "
            f"download the model again"
        )
