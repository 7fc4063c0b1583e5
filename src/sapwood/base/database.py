"""SQLite for data that outlives a request: one database, used from one thread of its own.

The event loop never waits for the disk. A piece of work is a function of the connection; the
database's thread runs one after the other, each as one transaction.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from sapwood.base.errors import ConfigError

log = logging.getLogger(__name__)

T = TypeVar("T")

Work = Callable[[sqlite3.Connection], T]

BUSY_TIMEOUT_S = 10.0
"""How long a transaction waits for another server's transaction on the same file."""


class Database:
    """One database. It is opened at once, so that an unwritable directory is an error at the start.

    path        the file; None: the database is in memory, and gone with the process
    migrations  one script per version, which makes or changes the tables; the database remembers
                how many have run. Servers that start together may run a script twice, without harm
    Raises      ConfigError if the file cannot be opened, or if a newer version wrote it
    """

    def __init__(self, path: Path | None, migrations: Sequence[str]) -> None:
        self._name = "memory" if path is None else str(path)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sqlite")
        self._closed = False
        try:
            self._connection = self._thread.submit(_open, path, migrations).result()
        except BaseException:
            self._thread.shutdown()
            raise

    async def run(self, work: Work[T]) -> T:
        """Run `work` and return its result. Cancelling the caller does not stop running work."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._do, work)

    def run_soon(self, work: Work[None]) -> None:
        """Run `work` without waiting for it, for instance while a stream is being closed."""
        if not self._closed:
            self._thread.submit(self._do, work).add_done_callback(_log_failure)

    def close(self) -> None:
        """Finish the work that was asked for, and close the database. No work may follow."""
        if not self._closed:
            self._closed = True
            self._thread.submit(self._connection.close)
            self._thread.shutdown()

    def _do(self, work: Work[T]) -> T:
        with self._connection:
            # Takes the write lock at once: two readers that both want to write would deadlock.
            self._connection.execute("BEGIN IMMEDIATE")
            return work(self._connection)


def _log_failure(future: Future[None]) -> None:
    error = future.exception()
    if error is not None:
        log.error("a change of the database was lost", exc_info=error)


def _open(path: Path | None, migrations: Sequence[str]) -> sqlite3.Connection:
    try:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(
            ":memory:" if path is None else path,
            timeout=BUSY_TIMEOUT_S,
            isolation_level=None,
        )
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        # Deleted conversations must not stay readable in the file's free pages.
        connection.execute("PRAGMA secure_delete = ON")
        _migrate(connection, migrations, path)
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(
            f"the database {path} cannot be opened: {error}; choose another --state-dir"
        ) from error
    return connection


def _migrate(connection: sqlite3.Connection, migrations: Sequence[str], path: Path | None) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > len(migrations):
        raise ConfigError(
            f"the database {path} is of version {version}, but this sapwood knows versions up to "
            f"{len(migrations)}; use the newer sapwood, or another --state-dir"
        )
    for number, script in enumerate(migrations[version:], start=version + 1):
        connection.executescript(
            f"BEGIN IMMEDIATE; {script}; PRAGMA user_version = {number}; COMMIT;"
        )
