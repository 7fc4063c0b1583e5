"""image_data and video_data of /generate: pictures and videos in all forms that SGLang takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sapwood.base.errors import InvalidRequest
from sapwood.frontends.serving.media import MediaParts, picture_options
from sapwood.frontends.serving.services import Services
from sapwood.schema.media_source import MediaKind, MediaSource


def media_by_prompt(
    image_data: Any, video_data: Any, num_prompts: int, services: Services, *, is_list: bool
) -> list[Sequence[MediaSource]]:
    """The media of each prompt: its pictures, then its videos.

    is_list  whether the prompts came as a list; then a list has an entry per prompt, and otherwise
             an entry per picture
    """
    images = _per_prompt(image_data, num_prompts, "image_data", is_list=is_list)
    videos = _per_prompt(video_data, num_prompts, "video_data", is_list=is_list)
    found: list[Sequence[MediaSource]] = []
    for of_images, of_videos in zip(images, videos, strict=True):
        media = MediaParts(services.media_markers)
        for where, given in of_images:
            _add(media, "image", where, given)
        for where, given in of_videos:
            _add(media, "video", where, given)
        found.append(media.sources)
    return found


def _per_prompt(
    given: Any, num_prompts: int, name: str, *, is_list: bool
) -> list[list[tuple[str, Any]]]:
    """By prompt: the place and the value of each medium."""
    if given is None or given == []:
        return [[] for _ in range(num_prompts)]
    if not isinstance(given, list):
        return [_listed([given], name) for _ in range(num_prompts)]
    if not is_list:
        # SGLang's clients also send one prompt's pictures as a batch of one.
        if len(given) == 1 and isinstance(given[0], list):
            return [_listed(given[0], f"{name}[0]", numbered=True)]
        return [_listed(given, name, numbered=True)]
    if len(given) != num_prompts:
        raise InvalidRequest(
            f"{name} has {len(given)} entries but there are {num_prompts} prompts; send an entry "
            "per prompt, which may be a list",
            param=name,
        )
    return [
        _listed(each, f"{name}[{i}]", numbered=True)
        if isinstance(each, list)
        else _listed([each], f"{name}[{i}]")
        for i, each in enumerate(given)
    ]


def _listed(values: list[Any], where: str, *, numbered: bool = False) -> list[tuple[str, Any]]:
    return [
        (f"{where}[{i}]" if numbered else where, value)
        for i, value in enumerate(values)
        if value is not None
    ]


def _add(media: MediaParts, kind: MediaKind, where: str, given: Any) -> None:
    fields = given if isinstance(given, dict) else {"url": given}
    url = fields.get("url")
    if not isinstance(url, str):
        raise InvalidRequest(
            f"{where} must be a URL, a path or base64, or an object with a url", param=where
        )
    media.add(kind, where, url=url, options=picture_options(fields, where))
