import asyncio
import sqlite3
import threading

import pytest

from sapwood.base.database import Database
from sapwood.base.errors import ConfigError

TABLE = ("CREATE TABLE IF NOT EXISTS t (x INTEGER)",)


def insert(*values):
    return lambda db: db.executemany("INSERT INTO t VALUES (?)", [(one,) for one in values])


def rows(db):
    return [x for (x,) in db.execute("SELECT x FROM t ORDER BY x")]


@pytest.fixture
def database(tmp_path):
    database = Database(tmp_path / "a" / "d.sqlite", TABLE)
    yield database
    database.close()


def test_what_is_written_stays(tmp_path):
    path = tmp_path / "d.sqlite"
    for expected in ([], [1]):
        database = Database(path, TABLE)
        assert asyncio.run(database.run(rows)) == expected
        database.run_soon(insert(1))
        database.close()
        database.close()
        database.run_soon(insert(2))


def test_work_that_fails_leaves_nothing_behind(database):
    def half(db):
        insert(1)(db)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        asyncio.run(database.run(half))
    assert asyncio.run(database.run(rows)) == []


def test_a_loss_nobody_waits_for_is_logged(database, caplog):
    def fail(db):
        raise ValueError("no")

    database.run_soon(fail)
    asyncio.run(database.run(rows))
    assert "was lost" in caplog.text


def test_the_loop_goes_on_while_the_disk_works(database):
    may_end = threading.Event()

    async def both():
        slow = asyncio.create_task(database.run(lambda db: may_end.wait(10)))
        for _ in range(10):
            await asyncio.sleep(0)
        assert not slow.done()
        may_end.set()
        return await slow

    assert asyncio.run(both())


def test_a_cancelled_caller_s_work_is_done(database):
    may_end = threading.Event()

    async def leave():
        blocked = asyncio.create_task(database.run(lambda db: may_end.wait(10)))
        waiting = asyncio.create_task(database.run(insert(7)))
        for _ in range(10):
            await asyncio.sleep(0)
        waiting.cancel()
        may_end.set()
        await blocked
        return await database.run(rows)

    # Work that had not begun when its caller left may be dropped, but never half done.
    assert asyncio.run(leave()) in ([], [7])


def test_two_servers_share_a_file(tmp_path):
    path = tmp_path / "d.sqlite"
    first, second = Database(path, TABLE), Database(path, TABLE)

    async def write():
        await asyncio.gather(*(one.run(insert(i)) for i in range(20) for one in (first, second)))
        return await first.run(rows)

    assert asyncio.run(write()) == sorted([*range(20)] * 2)
    first.close()
    second.close()


def test_migrations_are_run_once_each(tmp_path):
    path = tmp_path / "d.sqlite"
    Database(path, TABLE).close()
    newer = (*TABLE, "ALTER TABLE t ADD COLUMN y INTEGER")
    for _ in range(2):
        Database(path, newer).close()
    with sqlite3.connect(path) as db:
        assert [row[1] for row in db.execute("PRAGMA table_info(t)")] == ["x", "y"]
    db.close()
    with pytest.raises(ConfigError, match="version 2"):
        Database(path, TABLE)


def test_what_is_no_database_is_an_error(tmp_path):
    (tmp_path / "d.sqlite").write_bytes(b"x" * 4096)
    with pytest.raises(ConfigError, match="--state-dir"):
        Database(tmp_path / "d.sqlite", TABLE)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--state-dir"):
        Database(tmp_path / "file" / "d.sqlite", TABLE)
