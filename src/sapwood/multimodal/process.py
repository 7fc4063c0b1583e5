"""The process in which media are prepared: python -m sapwood.multimodal.process SOCKET

For each medium it makes a copy of itself, which decodes and prepares it within limits of time and
memory, so that a hostile file ends that copy only, and memory returns whatever a decoder does.
The process ends when its socket does.
"""

from __future__ import annotations

import gc
import hashlib
import os
import resource
import selectors
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import msgspec
import numpy as np

from sapwood.base.errors import InvalidRequest
from sapwood.multimodal import image
from sapwood.multimodal.family import Family, Prepared, SoundFamily, Tensor, family_of
from sapwood.multimodal.job import (
    MAX_MESSAGE_BYTES,
    OUT_OF_MEMORY,
    Cancel,
    Ended,
    Job,
    ProcessSetting,
    Result,
)
from sapwood.multimodal.limits import MediaLimits
from sapwood.schema.media import MediaTensor

NICENESS = 10
"""Of a copy: the engine's own threads go first."""
LOW_DETAIL = 512
"""Pixels that the longer side of a picture keeps whose `detail` is "low", as in OpenAI's API."""
PROCESS_SIZE = Path("/proc/self/statm")
LACKS_AV = (
    "is a {kind}, for which this server lacks the package av; its operator installs it by "
    "pip install 'sapwood[media]'"
)
FRAMES_PER_SECOND = Fraction(2)
"""Of a video that comes as a list of pictures and says nothing about their times."""


def main() -> None:
    # Ctrl-C in a terminal reaches this process too; it ends when the API process closes its socket.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    link = socket.socket(fileno=int(sys.argv[1]))
    setting = msgspec.json.decode(link.recv(MAX_MESSAGE_BYTES), type=ProcessSetting)
    family = family_of(setting.family)
    if find_spec("av") is not None:
        # Read once here instead of in every copy.
        import sapwood.multimodal.sound
        import sapwood.multimodal.video  # noqa: F401
    gc.collect()
    gc.freeze()
    Copies(family, setting, link).serve()


@dataclass(frozen=True, slots=True)
class _Copy:
    job_id: int
    pid: int


class Copies:
    """Runs each job in a copy of this process, as many at a time as are asked for."""

    def __init__(self, family: Family, setting: ProcessSetting, link: socket.socket) -> None:
        self._family = family
        self._setting = setting
        self._digest = hashlib.sha256(msgspec.json.encode(setting.family)).digest()
        self._link = link
        self._selector = selectors.DefaultSelector()
        self._copies: dict[int, _Copy] = {}
        self._decoder = msgspec.json.Decoder(Job | Cancel)

    def serve(self) -> None:
        """Serve until the other end of the socket is closed."""
        self._selector.register(self._link, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select():
                if key.fd != self._link.fileno():
                    self._ended(key.fd)
                elif not self._receive():
                    self._end_all()
                    return

    def _receive(self) -> bool:
        message, files, _, _ = socket.recv_fds(self._link, MAX_MESSAGE_BYTES, 2)
        if not message:
            return False
        received = self._decoder.decode(message)
        if isinstance(received, Job):
            self._begin(received, *files)
        else:
            for copy in self._copies.values():
                if copy.job_id == received.id:
                    os.kill(copy.pid, signal.SIGKILL)
        return True

    def _begin(self, job: Job, source: int, target: int) -> None:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            prepare = partial(prepared, self._family, self._digest, self._setting.limits)
            _run(prepare, job, source, target, self._setting.limits)
        for descriptor in (writer, source, target):
            os.close(descriptor)
        self._copies[reader] = _Copy(job.id, pid)
        self._selector.register(reader, selectors.EVENT_READ)

    def _ended(self, reader: int) -> None:
        self._selector.unregister(reader)
        os.close(reader)
        copy = self._copies.pop(reader)
        _, status = os.waitpid(copy.pid, 0)
        ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)
        self._link.send(msgspec.json.encode(Ended(id=copy.job_id, ended_by=ended_by)))

    def _end_all(self) -> None:
        for copy in self._copies.values():
            os.kill(copy.pid, signal.SIGKILL)
            os.waitpid(copy.pid, 0)


def prepared(
    family: Family, setting_digest: bytes, limits: MediaLimits, job: Job, data: bytes
) -> Result:
    """Raises InvalidRequest, worded as the end of a sentence about the medium."""
    content = hashlib.sha256(setting_digest)
    content.update(msgspec.json.encode([job.kind, sorted(job.options.items())]))
    if job.kind == "audio" and not job.is_samples:
        return _of_sound(family, limits, data)
    if job.kind == "audio":
        content.update(data)
        assert isinstance(family, SoundFamily), "the API process asks only what the model hears"
        outcome = family.audio(np.frombuffer(data, "<i2"))
    elif job.kind == "video":
        outcome = _of_video(family, limits, job, data, content.update)
    else:
        pixels = _pixels(job, data, limits)
        content.update(repr(pixels.shape).encode() + pixels.tobytes())
        outcome = family.image(pixels, job.options)
    return Result(
        digest=content.digest(),
        tensors=_tensors(outcome.tensors),
        replacement=outcome.replacement,
        counts=outcome.counts,
        parts=outcome.parts,
    )


def _tensors(found: Mapping[str, Tensor]) -> dict[str, MediaTensor]:
    return {
        name: MediaTensor(dtype=str(value.dtype), shape=value.shape, data=value.tobytes())
        for name, value in found.items()
    }


def _of_sound(family: Family, limits: MediaLimits, data: bytes) -> Result:
    try:
        from sapwood.multimodal import sound
    except ImportError:
        raise InvalidRequest(LACKS_AV.format(kind="sound")) from None
    assert isinstance(family, SoundFamily), "the API process asks only what the model hears"
    samples = sound.samples_of(data, max_seconds=limits.max_audio_seconds)
    cuts = sound.cuts_of(samples, longest=family.longest, shortest=family.longest * 2 // 3)
    return Result(tensors=_tensors({"samples": samples, "cuts": np.array(cuts, dtype=np.int64)}))


def _pixels(job: Job, data: bytes, limits: MediaLimits) -> image.Pixels:
    if job.raw_size is not None:
        pixels = image.of_raw(data, *job.raw_size, max_pixels=limits.max_pixels)
    else:
        pixels = image.decoded(data, max_pixels=limits.max_pixels)
    return image.shrunk(pixels, LOW_DETAIL) if job.options.get("detail") == "low" else pixels


def _of_video(
    family: Family,
    limits: MediaLimits,
    job: Job,
    data: bytes,
    count_in: Callable[[bytes], None],
) -> Prepared:
    """count_in: takes what the result depends on"""
    try:
        from sapwood.multimodal import video
    except ImportError:
        raise InvalidRequest(LACKS_AV.format(kind="video")) from None

    def choose(total: int, fps: Fraction) -> Sequence[int]:
        return family.frames_of(total, fps, job.options)

    if job.sizes:
        frames, start = [], 0
        for size in job.sizes:
            frame = data[start : start + size]
            frames.append(image.decoded(frame, max_pixels=limits.max_pixels))
            start += size
        # The client has chosen these frames: none is left out.
        clip = video.of_frames(frames, FRAMES_PER_SECOND)
    else:
        clip = video.clip_of(
            data, choose, max_pixels=limits.max_pixels, max_frames=limits.max_frames
        )
    count_in(repr((clip.indices, clip.total, clip.fps, clip.frames[0].shape)).encode())
    for each in clip.frames:
        count_in(each.tobytes())
    return family.video(clip, job.options)


def _run(
    prepare: Callable[[Job, bytes], Result], job: Job, source: int, target: int, limits: MediaLimits
) -> None:
    """Prepare one medium in a copy of the process, then end the copy; never returns."""
    status = 1
    try:
        _limit(limits, limits.seconds_for(job.kind))
        with os.fdopen(source, "rb") as file:
            file.seek(0)
            data = file.read()
        try:
            result = prepare(job, data)
        except InvalidRequest as error:
            result = Result(refusal=error.message)
        with os.fdopen(target, "wb") as file:
            file.write(msgspec.msgpack.encode(result))
        status = 0
    except MemoryError:
        status = OUT_OF_MEMORY
    finally:
        # No exit handlers: they belong to the process that this is a copy of.
        os._exit(status)


def _limit(limits: MediaLimits, seconds: float) -> None:
    """Limit this process's time and memory, and let other processes go first."""
    # SIGALRM's default action ends the process, also where it never returns from native code.
    signal.setitimer(signal.ITIMER_REAL, seconds)
    os.nice(NICENESS)
    most = {resource.RLIMIT_CORE: 0}
    if PROCESS_SIZE.exists():
        pages = int(PROCESS_SIZE.read_text().split()[0])
        most[resource.RLIMIT_AS] = pages * resource.getpagesize() + limits.memory_bytes
    for limit, value in most.items():
        soft, hard = resource.getrlimit(limit)
        allowed = [value, *(bound for bound in (soft, hard) if bound != resource.RLIM_INFINITY)]
        resource.setrlimit(limit, (min(allowed), hard))


if __name__ == "__main__":
    main()
