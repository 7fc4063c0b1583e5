"""`sapwood cache`: the page copies that servers have left in a storage directory."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import click

from sapwood.app.cli.pull import in_units
from sapwood.app.cli.stored import ago, print_table
from sapwood.base.errors import ConfigError
from sapwood.memory.storage.names import CopyOf, copy_of
from sapwood.schema.env import environment, hicache_directory


@dataclass(slots=True)
class _Held:
    """What a directory has of one model with one set of weights.

    oldest_s, newest_s  times of the last use, of the copy unused for longest and of the newest
    """

    num_copies: int
    num_bytes: int
    oldest_s: float
    newest_s: float

    def add(self, num_bytes: int, used_s: float) -> None:
        self.num_copies += 1
        self.num_bytes += num_bytes
        self.oldest_s = min(self.oldest_s, used_s)
        self.newest_s = max(self.newest_s, used_s)


@click.command()
@click.argument("directory", required=False, metavar="[DIR]", type=click.Path(path_type=Path))
@click.option("--clear", is_flag=True, help="Remove all of them; other files stay.")
def cache(directory: Path | None, clear: bool) -> None:
    """Show what a storage directory holds: pages of KV that `sapwood serve` keeps there.

    DIR is the directory of --hicache-storage-backend file. Without it, that is
    $SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR, or the folder hicache among the temporary files.

    WEIGHTS tells apart what cannot be shared: other weights, numbers or page sizes of a model. USED
    is when a copy was last written or read, OLDEST the same of the one that would go first. With
    --clear, a server that uses the directory goes on, and computes what it misses.
    """
    where = hicache_directory(environment()) if directory is None else directory
    held = _held_in(where)
    if not held:
        click.echo(f"no pages in {where}", err=True)
        return
    num_copies = sum(one.num_copies for one in held.values())
    size = in_units(sum(one.num_bytes for one in held.values()))
    if clear:
        _clear(where)
        click.echo(f"removed {num_copies} copies, {size}, from {where}")
        return
    titles = ("MODEL", "WEIGHTS", "COPIES", "SIZE", "USED", "OLDEST")
    print_table([titles, *_rows(held.items(), time.time())])
    click.echo(f"\n{num_copies} copies, {size}, in {where}")


def _held_in(directory: Path) -> dict[CopyOf, _Held]:
    """ConfigError if there is no such directory, or it cannot be read."""
    from sapwood.memory.storage.file import copies_in

    held: dict[CopyOf, _Held] = {}
    try:
        for name, num_bytes, used_s in copies_in(directory):
            model = copy_of(Path(name).stem)
            assert model is not None, "copies have such names"
            one = held.setdefault(model, _Held(0, 0, used_s, used_s))
            one.add(num_bytes, used_s)
    except OSError as error:
        raise ConfigError(
            f"{directory} cannot be read: {error.strerror}; name the directory of "
            "--hicache-storage-backend file"
        ) from error
    return held


def _clear(directory: Path) -> None:
    from sapwood.memory.storage.file import FileStorage
    from sapwood.memory.storage.interface import StorageUnavailable

    try:
        FileStorage(directory).clear()
    except StorageUnavailable as error:
        raise ConfigError(str(error)) from error


def _rows(held: Iterable[tuple[CopyOf, _Held]], now_s: float) -> list[tuple[str, ...]]:
    """The model used last comes first."""
    return [
        (
            of.model,
            of.identity[:8],
            str(one.num_copies),
            in_units(one.num_bytes),
            ago(now_s - one.newest_s),
            ago(now_s - one.oldest_s),
        )
        for of, one in sorted(held, key=lambda item: -item[1].newest_s)
    ]
