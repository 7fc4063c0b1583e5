"""The pictures and videos of a request, whatever its dialect."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sapwood.base.errors import InvalidRequest, UnsupportedFeature
from sapwood.schema.media_source import MAX_MEDIA, MediaKind, MediaSource

MOST_TILES = 64

Part = dict[str, Any]
Piece = str | Part
"""Of a message: a text, or the part that shows a picture."""


class MediaParts:
    """Collects the media of one request in the order in which its prompt shows them.

    kinds  those that the model takes; none: it takes only text
    """

    def __init__(self, kinds: Collection[MediaKind]) -> None:
        self._kinds = kinds
        self.sources: list[MediaSource] = []

    def add(
        self,
        kind: MediaKind,
        where: str,
        *,
        url: str = "",
        data: bytes = b"",
        raw_size: tuple[int, int] | None = None,
        frames: tuple[str, ...] = (),
        options: Mapping[str, int | float | str] | None = None,
    ) -> dict[str, str]:
        """The part of a message in the form that chat templates know.

        where   its place in the request
        Raises  UnsupportedFeature or InvalidRequest with that place
        """
        if kind not in self._kinds:
            raise UnsupportedFeature(
                f"{where} is of the kind {kind}, but this model takes only "
                f"{', '.join(('text', *sorted(self._kinds)))}; leave it out, or serve a model that "
                "takes it",
                param=where,
            )
        if len(self.sources) == MAX_MEDIA:
            # Here, so that thousands of them are not even collected.
            raise InvalidRequest(
                f"the request has more than {MAX_MEDIA} pictures and videos, as many as this "
                "server takes; send fewer",
                param=where,
            )
        if not (url or data or frames):
            raise InvalidRequest(f"{where} is an empty {kind}", param=where)
        self.sources.append(
            MediaSource(
                kind=kind,
                where=where,
                url=url,
                data=data,
                raw_size=raw_size,
                frames=frames,
                options=options or {},
            )
        )
        return {"type": kind}


def content_of(pieces: Sequence[Piece], *, joined_by: str) -> str | list[Part]:
    """A message's content: one text, or parts with neighbouring texts joined."""
    # Rows of texts, joined at the end: joining each to all before costs the square of their number.
    rows: list[list[str] | Part] = []
    for piece in pieces:
        if not isinstance(piece, str):
            rows.append(piece)
        elif rows and isinstance(rows[-1], list):
            rows[-1].append(piece)
        else:
            rows.append([piece])
    parts = [row if isinstance(row, dict) else _text_part(joined_by.join(row)) for row in rows]
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return [part for part in parts if part["type"] != "text" or part["text"]]


def _text_part(text: str) -> Part:
    return {"type": "text", "text": text}


_TILES = ("max_dynamic_patch", "min_dynamic_patch")


def picture_options(fields: Mapping[str, Any], where: str) -> dict[str, int | float | str]:
    """How a picture is prepared, as the object that has its URL says.

    detail   as in OpenAI's API: "low" lets it be shrunk to 512 pixels a side; the others leave it
             to the model's files
    max_dynamic_patch, min_dynamic_patch  tiles into which models such as InternVL cut it
    Raises   InvalidRequest or UnsupportedFeature for any other field but url
    """
    options: dict[str, int | float | str] = {}
    for name, value in fields.items():
        path = f"{where}.{name[:40]}"
        if name == "url" or value is None:
            continue
        if name == "detail":
            if value not in ("auto", "low", "high", "original"):
                raise InvalidRequest(
                    f"{path} must be 'auto', 'low', 'high' or 'original'", param=path
                )
            if value == "low":
                options["detail"] = "low"
        elif name in _TILES:
            if type(value) is not int or not 1 <= value <= MOST_TILES:
                raise InvalidRequest(f"{path} must be in [1, {MOST_TILES}]", param=path)
            options[name] = value
        else:
            raise UnsupportedFeature(
                f"{path} is not supported by this server: the model's files say how its pictures "
                "are prepared; leave it out",
                param=path,
            )
    return options
