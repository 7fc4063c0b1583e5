"""Notices a process that gets nowhere, prints what every thread is doing, and ends it."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

log = logging.getLogger(__name__)

EXIT_STUCK = 70
"""Exit code of a process that its watchdog ended (EX_SOFTWARE of sysexits.h)."""

_MAX_POLL_S = 5.0


class Watchdog:
    """Beats say that there is progress; too long without one means that the process is stuck.

    what            the process, for messages: "the engine"
    soft_timeout_s  silence after which every thread's stack is printed, once per beat; 0: never
    hard_timeout_s  silence after which the stacks are printed, `on_stuck` is called with the
                    reason, and the process ends; 0: never
    stream          receives the stacks; it must be a file of the operating system

    Code that holds the interpreter's lock for ever stops this object's thread too. For that case a
    thread of the C library, which `faulthandler` has, is wound up again and again; when it runs
    down, it prints the stacks and ends the process with exit code 1.
    """

    def __init__(
        self,
        what: str,
        *,
        soft_timeout_s: float,
        hard_timeout_s: float,
        on_stuck: Callable[[str], None] | None = None,
        stream: TextIO | None = None,
    ) -> None:
        self._what = what
        self._soft_s = soft_timeout_s
        self._hard_s = hard_timeout_s
        self._on_stuck = on_stuck
        self._stream = stream or sys.stderr
        limits = [limit for limit in (soft_timeout_s, hard_timeout_s) if limit > 0]
        self._poll_s = min(min(limits) / 4, _MAX_POLL_S) if limits else 0.0
        self._doing = ""
        self._since_s: float | None = None
        self._reported_s: float | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self, doing: str) -> None:
        """There is progress; `doing` is what comes next. Cheap enough for every step."""
        self._doing = doing
        self._since_s = time.monotonic()

    def rest(self) -> None:
        """There is nothing to do, so no progress is expected until the next beat."""
        self._since_s = None

    @property
    def is_resting(self) -> bool:
        return self._since_s is None

    def start(self) -> None:
        if self._poll_s and self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while True:
            if self._hard_s:
                limit_s = self._hard_s + 2 * self._poll_s
                faulthandler.dump_traceback_later(limit_s, exit=True, file=self._stream)
            if self._ended.wait(self._poll_s):
                return
            since_s = self._since_s
            if since_s is None:
                continue
            stuck_s = time.monotonic() - since_s
            if 0 < self._hard_s <= stuck_s:
                self._end_process()
            if 0 < self._soft_s <= stuck_s and self._reported_s != since_s:
                self._reported_s = since_s
                self._print_stacks(f"{self._what} has got nowhere for {stuck_s:.1f} s")

    def _end_process(self) -> None:
        reason = (
            f"{self._what} has got nowhere for {self._hard_s:g} s (--watchdog-timeout) while "
            f"{self._doing}; the log has every thread's stack"
        )
        self._print_stacks(f"{reason}; ending the process")
        try:
            if self._on_stuck is not None:
                self._on_stuck(reason)
        finally:
            self._stream.flush()
            os._exit(EXIT_STUCK)

    def _print_stacks(self, message: str) -> None:
        log.error("%s, while %s; every thread's stack follows", message, self._doing)
        faulthandler.dump_traceback(file=self._stream, all_threads=True)
