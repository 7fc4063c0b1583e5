"""Turns a GGUF's metadata into a directory in Hugging Face layout, once.

Later starts read a few small JSON files instead of a vocabulary. The directory also holds
tensors.json, the table of tensors that models.loader reads:

    {"architecture": "llama", "has_experts": false, "permuted": true, "head_dim": 64,
     "tiled_heads": null,
     "tensors": [{"name": …, "shape": […], "type": "Q4_1", "file": 0, "offset": …, "num_bytes": …}]}

`tiled_heads` has the sizes of heads in llama.cpp's order (`Architecture.tiles_heads`): {"num_keys",
"num_values", "key_dim"}. `shape` is in torch's order, `file` an index into ModelFiles.weights,
`offset` in bytes from the start of that file.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sapwood.base.errors import ModelSourceError
from sapwood.store import cache
from sapwood.store.progress import Progress, stage

_LAYOUT = 6
"""Version of the written files. A change must raise it, so that old directories are not used."""

_SIDECARS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
)
"""Files beside a GGUF that replace those made from its metadata."""


def prepare_gguf(
    weights: Sequence[Path],
    *,
    home: Path,
    sha256: str | None,
    progress: Progress,
    projector: Path | None = None,
) -> Path:
    """The prepared directory of a GGUF in one or several files, made if it is not there yet.

    sha256   SHA-256 of the first file, which then identifies the model wherever it lies; None:
             path, size and modification time identify it
    projector  the file of its tower and projector; None: it sees nothing
    Raises   ModelSourceError if the file is damaged, or if sapwood cannot serve the model
    """
    sidecars = sidecars_of(weights[0].parent)
    key = _key(weights, sidecars, sha256, projector)
    target = home / "prepared" / key
    if target.is_dir():
        return target
    with cache.staging(home, f"prepared-{key}", progress) as directory:
        if not target.is_dir():
            staged = directory / "model"
            staged.mkdir()
            with stage(progress, f"preparing {weights[0].name}", None):
                _write_explained(staged, weights, sidecars, projector)
            cache.publish(staged, target)
    return target


def sidecars_of(directory: Path) -> dict[str, Path]:
    """The files in the directory that replace those made from a GGUF's metadata, by name."""
    return {name: directory / name for name in _SIDECARS if (directory / name).is_file()}


def _key(
    weights: Sequence[Path],
    sidecars: Mapping[str, Path],
    sha256: str | None,
    projector: Path | None,
) -> str:
    identity: list[Any] = [_LAYOUT, sha256, projector is not None]
    seeing = [] if projector is None else [projector]
    for path in (*([] if sha256 else weights), *sidecars.values(), *seeing):
        status = path.stat()
        identity.append([str(path.absolute()), status.st_size, status.st_mtime_ns])
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    return f"{cache.safe_key(weights[0].stem)}-{digest[:20]}"


def _write_explained(
    directory: Path,
    weights: Sequence[Path],
    sidecars: Mapping[str, Path],
    projector: Path | None,
) -> None:
    try:
        _write(directory, weights, sidecars, projector)
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise ModelSourceError(
            f"{weights[0]}: its metadata makes no model ({type(error).__name__}: {error}); "
            "download or convert the model again"
        ) from error


def _write(
    directory: Path,
    weights: Sequence[Path],
    sidecars: Mapping[str, Path],
    projector: Path | None,
) -> None:
    # Imported only here: a warm cache needs neither the gguf nor the tokenizers library.
    from sapwood.store import gguf_config, gguf_projector
    from sapwood.store.gguf_header import read_header

    headers = [read_header(path) for path in weights]
    main = headers[0]
    architecture = gguf_config.architecture_of(main)
    expected = main.metadata.get("split.count", 1) or 1
    if expected != len(weights):
        raise ModelSourceError(
            f"{main.path} is one of {expected} files but {len(weights)} were given; "
            f"give the first part under its original name, with the others beside it"
        )
    rows = [
        {**asdict(tensor), "file": file}
        for file, header in enumerate(headers)
        for tensor in header.tensors
        if not _is_beyond(tensor.name, gguf_config.num_layers(main))
    ]
    config = gguf_config.hf_config(main, [tensor for each in headers for tensor in each.tensors])
    table = {
        "architecture": main.metadata["general.architecture"],
        "has_experts": gguf_config.has_experts(main),
        "permuted": architecture.permuted,
        "head_dim": config["head_dim"],
        "tiled_heads": _tiled_heads(config) if architecture.tiles_heads else None,
        "tensors": rows,
    }
    if projector is not None:
        header = read_header(projector)
        rows += gguf_projector.rows_of(header, len(weights))
        config, settings = gguf_projector.seeing(header, main, config)
        for name, content in settings.items():
            _dump(directory / name, content)
    _dump(directory / "config.json", config)
    _dump(directory / "generation_config.json", gguf_config.generation_config(main))
    _dump(directory / "tensors.json", table)
    _write_tokenizer(directory, main, has_own="tokenizer.json" in sidecars)
    for name, path in sidecars.items():
        shutil.copyfile(path, directory / name)


def _tiled_heads(config: Mapping[str, Any]) -> dict[str, int]:
    return {
        "num_keys": config["linear_num_key_heads"],
        "num_values": config["linear_num_value_heads"],
        "key_dim": config["linear_key_head_dim"],
    }


def _is_beyond(tensor: str, num_layers: int) -> bool:
    """Whether the tensor is of a layer after the first `num_layers`."""
    layer = re.match(r"blk\.(\d+)\.", tensor)
    return layer is not None and int(layer[1]) >= num_layers


def _write_tokenizer(directory: Path, header: Any, *, has_own: bool) -> None:
    from sapwood.store import gguf_tokenizer

    templates = gguf_tokenizer.chat_templates(header)
    for name, text in templates.items():
        path = directory / "chat_template.jinja"
        if name != "default":
            path = directory / "additional_chat_templates" / f"{cache.safe_key(name)}.jinja"
            path.parent.mkdir(exist_ok=True)
        path.write_text(text, "utf-8")
    if not gguf_tokenizer.has_tokenizer(header):
        return
    _dump(directory / "tokenizer_config.json", gguf_tokenizer.tokenizer_config(header))
    if not has_own:
        gguf_tokenizer.build_tokenizer(header).save(str(directory / "tokenizer.json"))


def _dump(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8")
