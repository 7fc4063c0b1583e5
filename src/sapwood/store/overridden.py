"""A model's folder with another config.json, which leaves the model's own files as they are."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sapwood.base.errors import ModelSourceError
from sapwood.store.files import ModelFiles

CONFIG = "config.json"


def with_changed_config(files: ModelFiles, changes: Mapping[str, Any], home: Path) -> ModelFiles:
    """The same model in a folder below `home` of links to its files, and of config.json with
    `changes`; an object among them is merged with the one that is there.

    Raises ModelSourceError if config.json is missing or is no object.
    """
    path = files.path / CONFIG
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelSourceError(
            f"--json-model-override-args changes {path}, which cannot be read: {error}"
        ) from error
    if not isinstance(config, dict):
        raise ModelSourceError(f"{path} holds no JSON object, so that nothing in it can be changed")
    text = json.dumps(merged(config, changes), indent=2, sort_keys=True)
    source = files.path.resolve()
    key = hashlib.sha256(f"{source}\0{text}".encode()).hexdigest()[:32]
    folder = home / "overrides" / key
    folder.mkdir(parents=True, exist_ok=True)
    for child in source.iterdir():
        if child.name != CONFIG:
            _link(folder / child.name, child)
    with tempfile.NamedTemporaryFile("w", dir=folder, delete=False, encoding="utf-8") as file:
        file.write(text)
    Path(file.name).replace(folder / CONFIG)
    return replace(files, path=folder)


def merged(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(config)
    for name, value in changes.items():
        old = found.get(name)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        found[name] = merged(old, value) if both and old is not None else value
    return found


def _link(link: Path, target: Path) -> None:
    """`link` leads to `target`, also where another process makes it at the same time."""
    if link.is_symlink() and link.readlink() == target:
        return
    with tempfile.TemporaryDirectory(dir=link.parent) as folder:
        new = Path(folder) / "link"
        new.symlink_to(target)
        new.replace(link)
