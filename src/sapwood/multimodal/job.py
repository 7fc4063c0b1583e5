"""What the API process and the process that prepares media tell each other."""

from __future__ import annotations

import msgspec

from sapwood.multimodal.family import FamilySetting
from sapwood.multimodal.limits import MediaLimits
from sapwood.schema.media import MediaTensor
from sapwood.schema.media_source import MediaKind

MAX_MESSAGE_BYTES = 2**20
"""The largest of them is the setting; pixels travel in files in memory."""


OUT_OF_MEMORY = 3
"""Exit status of a copy that has reached its limit of memory."""


class ProcessSetting(msgspec.Struct, frozen=True, kw_only=True):
    """The first message."""

    family: FamilySetting
    limits: MediaLimits


class Job(msgspec.Struct, frozen=True, kw_only=True, tag="job", omit_defaults=True):
    """Prepare a medium. With it come two files in memory: one has its bytes, the other is empty and
    takes the `Result`.

    sizes  bytes of each of a video's frames, if it comes as pictures
    is_samples  whether a sound comes as samples, 16 bits each at mel.RATE, which become what the
           model reads. Else it comes as a file, which becomes such samples ("samples") and the
           places where it may be cut ("cuts", [pieces, 2])
    """

    id: int
    kind: MediaKind
    raw_size: tuple[int, int] | None = None
    sizes: tuple[int, ...] = ()
    is_samples: bool = False
    options: dict[str, int | float | str] = {}


class Cancel(msgspec.Struct, frozen=True, kw_only=True, tag="cancel"):
    """Nobody waits for that job any more."""

    id: int


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """A job has ended.

    ended_by  the signal that ended it; below 0: it ended by itself without a result, with that exit
              status, negative; 0: it has a result
    """

    id: int
    ended_by: int


class Result(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """refusal: why the medium is refused; None: the other fields are set"""

    refusal: str | None = None
    digest: bytes = b""
    tensors: dict[str, MediaTensor] = {}
    replacement: str = ""
    counts: tuple[int, ...] = ()
    parts: int = 1
