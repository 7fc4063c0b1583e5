"""What a request brings besides text, before it is fetched, decoded and prepared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

MediaKind = Literal["image", "video", "audio"]
KINDS: tuple[MediaKind, ...] = ("image", "video", "audio")

MAX_MEDIA = 64
"""Pictures, videos and sounds of one request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaSource:
    """One picture, video or sound of a request. Exactly one of url, data and frames is set.

    where    its place in the request, for errors: "messages[0].content[1]"
    url      http, https, data or file; or, where the dialect allows it, base64 alone
    data     the bytes of a file, or of pixels if raw_size is set
    raw_size  (width, height) of a picture whose data is RGB pixels, 8 bits each, row by row
    frames   URLs of a video's frames, in order
    options  what the part says about its preparing: detail, max_dynamic_patch, fps, …
    """

    kind: MediaKind
    where: str
    url: str = ""
    data: bytes = b""
    raw_size: tuple[int, int] | None = None
    frames: tuple[str, ...] = ()
    options: Mapping[str, int | float | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if sum(bool(one) for one in (self.url, self.data, self.frames)) != 1:
            raise ValueError("a medium has exactly one of url, data and frames")
