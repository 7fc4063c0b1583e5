"""The API process's side of hearing: from a file to the sounds that a model takes one by one.

A small file may hold hours of silence. So long files are decoded apart from pieces, which never
wait for them, and all long recordings together have a limit; short ones are heard beside them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import numpy as np

from sapwood.base.errors import InvalidRequest, Overloaded
from sapwood.multimodal.family import FamilySetting
from sapwood.multimodal.job import Job
from sapwood.multimodal.limits import MIB, MediaLimits
from sapwood.multimodal.mel import RATE
from sapwood.multimodal.pool import PreparingPool
from sapwood.schema.media import Medium

_SAMPLE_BYTES = 2
FILES_AT_ONCE = 4
"""Files that are decoded at a time."""
SHORT_S = 60.0
"""Recordings up to this long do not count for the limit of all."""
LONGEST_AT_ONCE = 4
"""So many recordings of --max-audio-seconds may be open at a time, or as much in shorter ones."""


@dataclass(frozen=True, slots=True)
class Recording:
    """A file's sound.

    samples  16 bits each, little endian, at RATE
    cuts     (first sample, end) of pieces that are not too long for the model, one after another
    """

    samples: bytes
    cuts: Sequence[tuple[int, int]]

    @property
    def seconds(self) -> float:
        return len(self.samples) / _SAMPLE_BYTES / RATE

    def start_of(self, piece: int) -> float:
        """In seconds."""
        return self.cuts[piece][0] / RATE

    def end_of(self, piece: int) -> float:
        """In seconds."""
        return self.cuts[piece][1] / RATE


class Listener:
    """Decodes files, and prepares their pieces, in a process of its own."""

    def __init__(
        self, setting: FamilySetting, limits: MediaLimits, *, num_copies: int, num_vectors: int
    ) -> None:
        """num_copies: pieces that are prepared at a time; num_vectors: of each piece"""
        self._limits = limits
        self._files = PreparingPool(setting, limits, num_copies=FILES_AT_ONCE)
        self._pieces = PreparingPool(setting, limits, num_copies=num_copies)
        self._held_s = 0.0
        self._num_vectors = num_vectors

    @property
    def max_bytes(self) -> int:
        """Of a file."""
        return self._limits.max_audio_bytes

    @asynccontextmanager
    async def opened(self, data: bytes) -> AsyncIterator[Recording]:
        """The recording, which counts for the limit of all until the block ends.

        Raises  InvalidRequest, which names the field, if the file cannot be heard, and Overloaded
                if too many long recordings are open
        """
        recording = await self._decoded(data)
        seconds = 0.0 if recording.seconds <= SHORT_S else recording.seconds
        most = LONGEST_AT_ONCE * self._limits.max_audio_seconds
        if seconds and self._held_s + seconds > most:
            raise Overloaded(
                f"recordings of {self._held_s:.0f} s are being heard and this one has "
                f"{seconds:.0f} s, but this server hears {most:g} s at a time; send it again later"
            )
        self._held_s += seconds
        try:
            yield recording
        finally:
            self._held_s -= seconds

    async def _decoded(self, data: bytes) -> Recording:
        if len(data) > self.max_bytes:
            raise InvalidRequest(
                f"file has {len(data)} bytes but this server takes at most {self.max_bytes} "
                f"({self.max_bytes // MIB} MiB); send a compressed or a shorter one",
                param="file",
            )
        try:
            result = await self._files.prepare(Job(id=0, kind="audio"), [data])
        except InvalidRequest as error:
            raise InvalidRequest(f"file {error.message}", param="file") from None
        cuts = np.frombuffer(result.tensors["cuts"].data, "<i8").reshape(-1, 2)
        return Recording(result.tensors["samples"].data, [(int(a), int(b)) for a, b in cuts])

    async def piece(self, recording: Recording, index: int) -> Medium:
        """What the model reads of that piece."""
        return await self._of_samples(recording, *recording.cuts[index])

    async def between(self, recording: Recording, start: float, end: float) -> Medium:
        """What the model reads of these seconds, which must not be more than a piece has."""
        return await self._of_samples(recording, round(start * RATE), round(end * RATE))

    async def _of_samples(self, recording: Recording, start: int, end: int) -> Medium:
        samples = memoryview(recording.samples)[start * _SAMPLE_BYTES : end * _SAMPLE_BYTES]
        job = Job(id=0, kind="audio", is_samples=True)
        result = await self._pieces.prepare(job, [bytes(samples)])
        return Medium(
            kind="audio",
            digest=result.digest,
            tensors=result.tensors,
            spans=((0, 1),),
            num_across=self._num_vectors,
        )

    def close(self) -> None:
        self._files.close()
        self._pieces.close()
