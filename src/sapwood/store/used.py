"""When the models in the cache were last asked for. Every start does this, so it imports little."""

from __future__ import annotations

import contextlib
from pathlib import Path

MODELS, HUB, USED = "models", "hub", "used"
"""Folders of the cache."""


def mark_used(home: Path, path: Path) -> None:
    """Note that a model was asked for; `path` is one of its files, in the cache or elsewhere."""
    directory = _directory_of(home, path)
    if directory is None:
        return
    # A cache that cannot be written serves too, for instance one that is part of an image.
    with contextlib.suppress(OSError):
        used = used_file(home, directory)
        used.parent.mkdir(exist_ok=True)
        used.touch()


def _directory_of(home: Path, path: Path) -> Path | None:
    """home/models/<digest> or home/hub/models--<owner>--<name>; None for a path elsewhere."""
    for parent in (home / MODELS, home / HUB):
        if path.is_relative_to(parent):
            return parent / path.relative_to(parent).parts[0]
    return None


def used_file(home: Path, directory: Path) -> Path:
    """The file whose time says when the model in a directory of the cache was last asked for."""
    return home / USED / f"{directory.parent.name}.{directory.name}"
