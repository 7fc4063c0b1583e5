"""The API process's side of preparing: hands media to the process that does it, and waits."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import IO

import msgspec

from sapwood.base.errors import InvalidRequest, Overloaded
from sapwood.multimodal.family import FamilySetting
from sapwood.multimodal.job import (
    MAX_MESSAGE_BYTES,
    OUT_OF_MEMORY,
    Cancel,
    Ended,
    Job,
    ProcessSetting,
    Result,
)
from sapwood.multimodal.limits import MIB, MediaLimits

log = logging.getLogger(__name__)

END_LIMIT_S = 5.0
"""How long `close` waits for the process to end by itself."""


class PreparingPool:
    """Prepares a few media at a time; others wait for their turn. The first one starts the process.

    num_copies  media that are prepared at a time
    """

    def __init__(self, family: FamilySetting, limits: MediaLimits, *, num_copies: int) -> None:
        self._setting = ProcessSetting(family=family, limits=limits)
        self._turn = asyncio.Semaphore(num_copies)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._link: socket.socket | None = None
        self._waiting: dict[int, Future[int]] = {}
        self._num_jobs = 0
        self._is_closed = False

    async def prepare(self, job: Job, pieces: Sequence[bytes]) -> Result:
        """The result of a job; its id is set here.

        Raises InvalidRequest, worded as the end of a sentence about the medium, if it is refused,
        and Overloaded if the process is gone.
        """
        async with self._turn:
            with _file() as source, _file() as target:
                await asyncio.to_thread(source.writelines, pieces)
                source.flush()
                job_id, ended = self._begin(job, source.fileno(), target.fileno())
                try:
                    ended_by = await asyncio.wrap_future(ended)
                except asyncio.CancelledError:
                    self._cancel(job_id)
                    raise
                self._check(ended_by, job)
                result = await asyncio.to_thread(_read, target)
        if result.refusal is not None:
            raise InvalidRequest(result.refusal)
        return result

    def close(self) -> None:
        """End the process; jobs that run fail. May be called twice."""
        with self._lock:
            self._is_closed = True
            process, link = self._process, self._link
        if process is None or link is None:
            return
        # The reading thread sees the end of the socket too.
        link.shutdown(socket.SHUT_RDWR)
        try:
            process.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _begin(self, job: Job, source: int, target: int) -> tuple[int, Future[int]]:
        with self._lock:
            if self._is_closed:
                raise Overloaded("the server is ending")
            link = self._link or self._start()
            self._num_jobs += 1
            job_id = self._num_jobs
            ended = self._waiting[job_id] = Future[int]()
            message = msgspec.json.encode(msgspec.structs.replace(job, id=job_id))
            try:
                socket.send_fds(link, [message], [source, target])
            except OSError:
                # The reading thread finds out that the process is gone, and tells those that wait.
                log.debug("the process that prepares media takes no more jobs")
        return job_id, ended

    def _cancel(self, job_id: int) -> None:
        with self._lock:
            if self._link is not None and self._waiting.pop(job_id, None) is not None:
                try:
                    self._link.send(msgspec.json.encode(Cancel(id=job_id)))
                except OSError:
                    log.debug("the process that prepares media is gone already")

    def _start(self) -> socket.socket:
        # Messages keep their borders in such a socket, and files go with them.
        link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sapwood.multimodal.process", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._link = link
        link.send(msgspec.json.encode(self._setting))
        threading.Thread(
            target=self._read, args=(link, self._process), name="media-preparing", daemon=True
        ).start()
        return link

    def _read(self, link: socket.socket, process: subprocess.Popen[bytes]) -> None:
        """Tell those that wait how their jobs ended, until the process ends."""
        with link:
            while message := _received(link):
                ended = msgspec.json.decode(message, type=Ended)
                with self._lock:
                    future = self._waiting.pop(ended.id, None)
                if future is not None:
                    future.set_result(ended.ended_by)
            with self._lock:
                left, self._waiting = self._waiting, {}
                self._link = None
                if not self._is_closed:
                    log.error("the process that prepares media ended with %s", process.wait())
        for future in left.values():
            future.set_exception(
                Overloaded("the process that prepares media has ended; send the request again")
            )

    def _check(self, ended_by: int, job: Job) -> None:
        limits = self._setting.limits
        if ended_by == signal.SIGALRM:
            raise InvalidRequest(
                f"was not prepared within {limits.seconds_for(job.kind):g} s, as long as this "
                "server takes; send it smaller"
            )
        if ended_by == -OUT_OF_MEMORY:
            raise InvalidRequest(
                f"needs more than {limits.memory_bytes // MIB} MiB to be prepared; send it smaller"
            )
        if ended_by:
            raise InvalidRequest(f"cannot be decoded: its decoder failed ({ended_by})")


def _file() -> IO[bytes]:
    """A file in memory that no one else can open."""
    if sys.platform == "linux":
        return os.fdopen(os.memfd_create("sapwood-media"), "w+b")
    return tempfile.TemporaryFile()


def _read(file: IO[bytes]) -> Result:
    file.seek(0)
    return msgspec.msgpack.decode(file.read(), type=Result)


def _received(link: socket.socket) -> bytes:
    try:
        return link.recv(MAX_MESSAGE_BYTES)
    except OSError:
        return b""
