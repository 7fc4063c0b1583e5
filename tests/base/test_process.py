from __future__ import annotations

import signal
import subprocess
import sys
import threading

from sapwood.base.process import describe_exit, hand_over, start_module, watch

CHILD = """
import time
from sapwood.base.process import end_with_parent, read_first_line
print(read_first_line().decode().strip(), flush=True)
end_with_parent()
time.sleep(60)
"""


def start_child() -> subprocess.Popen[bytes]:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(b"hello\n")
    child.stdin.flush()
    assert child.stdout.readline() == b"hello\n"
    return child


def test_a_child_ends_when_its_tether_breaks() -> None:
    with start_child() as child:
        assert child.stdin is not None
        child.stdin.close()
        assert child.wait(10) == 1


def test_what_is_handed_over_to_a_child_that_has_ended_is_lost_without_an_error() -> None:
    with start_module("sapwood.base") as child:
        child.wait(10)
        hand_over(child, b"hello")


def test_the_end_of_a_child_is_reported() -> None:
    reports: list[tuple[str, int]] = []
    reported = threading.Event()

    def on_exit(what: str, code: int) -> None:
        reports.append((what, code))
        reported.set()

    with start_child() as child:
        watch(child, on_exit)
        child.send_signal(signal.SIGKILL)
        assert reported.wait(10)
    assert reports[0][1] == -signal.SIGKILL
    assert "SIGKILL" in reports[0][0]


def test_exit_codes_in_words() -> None:
    assert describe_exit(3) == "exited with code 3"
    assert "SIGSEGV" in describe_exit(-signal.SIGSEGV)
