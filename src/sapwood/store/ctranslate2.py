"""Turns a folder of CTranslate2's Whisper into Hugging Face's layout, once.

Such a folder is what faster-whisper reads: model.bin, config.json and tokenizer.json. Matrices that
CTranslate2 keeps together are taken apart, 8-bit ones become float16.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from sapwood.base.errors import ModelSourceError
from sapwood.store import cache
from sapwood.store.progress import Progress, stage

WEIGHTS = "model.bin"
_LAYOUT = 1
"""Version of the written files. A change must raise it, so that old directories are not used."""


def is_ctranslate2(path: Path) -> bool:
    """Whether the folder is one of CTranslate2's."""
    weights, config = path / WEIGHTS, path / "config.json"
    if not path.is_dir() or not weights.is_file() or not config.is_file():
        return False
    with weights.open("rb") as file:
        start = file.read(6)
    # PyTorch's files begin with the magic numbers of zip or pickle.
    return len(start) == 6 and struct.unpack("<I", start[:4])[0] in range(1, 20)


def prepare_ctranslate2(folder: Path, *, home: Path, progress: Progress) -> Path:
    """The folder in Hugging Face's layout, made if it is not there yet.

    Raises ModelSourceError if the file is damaged, or is of no model that sapwood serves
    """
    identity: list[Any] = [_LAYOUT]
    for name in (WEIGHTS, "config.json", "tokenizer.json"):
        path = folder / name
        if not path.is_file():
            raise ModelSourceError(f"{folder} is a folder of CTranslate2 but has no {name}")
        status = path.stat()
        identity.append([str(path.absolute()), status.st_size, status.st_mtime_ns])
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    key = f"{cache.safe_key(folder.name)}-{digest[:20]}"
    target = home / "prepared" / key
    if target.is_dir():
        return target
    with cache.staging(home, f"prepared-{key}", progress) as directory:
        if not target.is_dir():
            staged = directory / "model"
            staged.mkdir()
            with stage(progress, f"preparing {folder.name}", None):
                _write_explained(folder, staged)
            cache.publish(staged, target)
    return target


def _write_explained(folder: Path, target: Path) -> None:
    # Imported only here: a warm cache needs no numpy.
    from sapwood.store.ctranslate2_format import write_as_hugging_face

    try:
        write_as_hugging_face(folder, target, WEIGHTS)
    except (TypeError, ValueError, LookupError, struct.error) as error:
        raise ModelSourceError(
            f"{folder / WEIGHTS} makes no model ({type(error).__name__}: {error}); download or "
            "convert the model again"
        ) from error
