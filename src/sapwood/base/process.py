"""Child processes that end when their parent does, however the parent ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Protocol


class Child(Protocol):
    """A process that this one has started, here or on another machine; `subprocess.Popen` is one.

    stdin  of the process, to which `hand_over` writes; None: it has got its line already
    """

    @property
    def stdin(self) -> IO[bytes] | None: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def kill(self) -> None: ...

    def send_signal(self, sig: int) -> None: ...


def start_module(module: str) -> subprocess.Popen[bytes]:
    """Start `python -m module`; it waits for the line of `hand_over`.

    Its standard input is the tether: the end of that pipe tells the child that the parent is gone.
    The child shares the parent's standard output and error.
    """
    # Unbuffered: else the interpreter would try at its end to write to a child that is gone.
    return subprocess.Popen([sys.executable, "-m", module], stdin=subprocess.PIPE, bufsize=0)


def hand_over(child: Child, line: bytes) -> None:
    """Write the child's line to it, once.

    A child that has ended already is no error here: whoever watches the child reports its end.
    """
    assert child.stdin is not None
    with suppress(BrokenPipeError):
        child.stdin.write(line.rstrip(b"\n") + b"\n")


def read_first_line() -> bytes:
    """For the child: the line from the parent's `hand_over`; EOFError if the parent has ended."""
    line = bytearray()
    while not line.endswith(b"\n"):
        piece = os.read(sys.stdin.fileno(), 1 << 16)
        if not piece:
            raise EOFError("the parent ended before it had handed anything over")
        line += piece
    return bytes(line)


def leave_signals_to_parent() -> None:
    """In the child: a terminal's Ctrl-C and a SIGTERM to the process group reach both processes,
    but the parent decides when the child ends, so that open requests can be finished."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def end_with_parent() -> None:
    """In the child, after its first line: leave at once when the tether breaks."""

    def wait_for_end() -> None:
        # Not through sys.stdin: a thread inside its lock would disturb the interpreter's end.
        while os.read(sys.stdin.fileno(), 4096):
            continue
        os._exit(1)

    threading.Thread(target=wait_for_end, name="tether", daemon=True).start()


def watch(child: Child, on_exit: Callable[[str, int], None]) -> threading.Thread:
    """Call `on_exit(what happened, exit code)` from a thread when the child has ended."""

    def wait() -> None:
        code = child.wait()
        on_exit(describe_exit(code), code)

    thread = threading.Thread(target=wait, name="watch", daemon=True)
    thread.start()
    return thread


def end_in_order(child: Child, patience_s: float) -> None:
    """Wait that long for the child's end, then kill it."""
    try:
        child.wait(patience_s)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    if child.stdin is not None:
        child.stdin.close()


def describe_exit(code: int) -> str:
    """An exit code in words; negative ones are signals, as subprocess reports them."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = str(-code)
    hint = "; the system may have run out of memory" if -code == signal.SIGKILL else ""
    return f"was ended by signal {name}{hint}"
