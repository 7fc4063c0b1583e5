"""A model directory in Hugging Face layout, written whole or not at all."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.store.cache import publish

COPIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
    "LICENSE.txt",
)
COPIED_FOLDERS = ("additional_chat_templates",)


@contextmanager
def new_directory(target: Path, *, force: bool) -> Iterator[Path]:
    """A directory beside `target`, for the `with` block to fill.

    It takes the place of `target` when the block ends, and is removed if the block raises.

    force   whether an existing model is replaced
    Raises  ConfigError like `check_target`, and if nothing can be written there
    """
    check_target(target, force=force)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ConfigError(f"cannot write beside {target}: {error}") from error
    try:
        written = staging / "model"
        written.mkdir()
        yield written
        if target.exists():
            target.replace(staging / "replaced")
        publish(written, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_target(target: Path, *, force: bool) -> None:
    """Raises ConfigError if the directory exists and may not be replaced."""
    if not target.exists():
        return
    if not force:
        raise ConfigError(f"{target} exists; name another directory, or replace it with --force")
    if not (target / "config.json").is_file():
        raise ConfigError(
            f"{target} exists and is no model (it has no config.json), so --force does not remove "
            "it; name another directory"
        )


class ShardWriter:
    """Tensors into safetensors files of a maximum size, in the order in which they come.

    A tensor that is larger than the maximum gets a file of its own.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self.num_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self._pending and self._pending_bytes + tensor.nbytes > self._max_bytes:
            self._flush()
        # Contiguous, and in memory of its own: safetensors refuses tensors that share memory.
        self._pending[name] = tensor.detach().cpu().contiguous()
        self._pending_bytes += tensor.nbytes
        self.num_bytes += tensor.nbytes

    def finish(self) -> None:
        """Write the last file, and give all files their names; several files get an index."""
        self._flush()
        count = len(self._shards)
        table: dict[str, str] = {}
        for number, names in enumerate(self._shards, start=1):
            name = "model.safetensors"
            if count > 1:
                name = f"model-{number:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self._directory / name)
            table |= dict.fromkeys(names, name)
        if count > 1:
            index = {"metadata": {"total_size": self.num_bytes}, "weight_map": table}
            write_json(self._directory / "model.safetensors.index.json", index)

    def _flush(self) -> None:
        if not self._pending:
            return
        self._shards.append(list(self._pending))
        part = self._part(len(self._shards))
        part.touch()
        mode = part.stat().st_mode  # as the umask has it; safetensors lets only the owner read
        save_file(self._pending, part, metadata={"format": "pt"})
        part.chmod(mode)
        self._pending = {}
        self._pending_bytes = 0

    def _part(self, number: int) -> Path:
        return self._directory / f"part-{number}.safetensors"


def copy_side_files(source: Path, target: Path) -> None:
    """Copy tokenizer, chat templates, generation defaults and licence, as far as there are any."""
    for name in COPIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    for name in COPIED_FOLDERS:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
