import subprocess
import sys

from sapwood.base.file_lock import FileLock

HOLD = """
import sys
from pathlib import Path
from sapwood.base.file_lock import FileLock
lock = FileLock(Path(sys.argv[1]))
print(lock.try_to_take(), flush=True)
sys.stdin.read()
"""


def test_one_at_a_time_has_it(tmp_path):
    first, second = FileLock(tmp_path / "l"), FileLock(tmp_path / "l")
    assert first.try_to_take()
    assert first.try_to_take()
    assert not second.try_to_take()
    first.close()
    assert second.try_to_take()
    second.close()


def test_a_killed_process_gives_it_back(tmp_path):
    path = tmp_path / "l"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, stdin=subprocess.PIPE
    )
    with holder:
        assert holder.stdout.readline() == b"True\n"
        lock = FileLock(path)
        assert not lock.try_to_take()
        holder.kill()
        holder.wait()
        assert lock.try_to_take()
        lock.close()
