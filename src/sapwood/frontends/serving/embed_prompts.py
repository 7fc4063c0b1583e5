"""What a model that makes embeddings reads of pictures: prompts in its own chat format.

The vector is that of the last token, so the prompt ends where an answer would begin, as the models
were trained: Qwen3-VL-Embedding (Li et al. 2026, arXiv:2601.04720) and GME (Zhang et al. 2024,
arXiv:2412.16855).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from sapwood.base.errors import InvalidRequest, UnsupportedFeature
from sapwood.frontends.serving.media import MediaParts
from sapwood.frontends.serving.services import Services
from sapwood.schema.fields import FieldTable, parse
from sapwood.schema.media_source import MediaKind, MediaSource


@dataclass(frozen=True, slots=True)
class EmbedPrompt:
    """A prompt whose special tokens stand in its text, and the media whose markers it has."""

    text: str
    media: tuple[MediaSource, ...]


class EmbedItem(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of `input` that shows something; at least one field besides instruction is set.

    image, video  a URL or base64
    instruction   what the vector is for: the system's message
    """

    text: str | None = None
    image: str | None = None
    video: str | None = None
    instruction: str | None = None


ITEM_FIELDS = FieldTable(title="input[] of /v1/embeddings", shape=EmbedItem)
_SHOWN: tuple[MediaKind, ...] = ("image", "video")


def prompt_of_item(given: Mapping[str, Any], where: str, services: Services) -> EmbedPrompt:
    """Raises InvalidRequest or UnsupportedFeature with its place."""
    item = parse(given, ITEM_FIELDS, where=where)
    media = MediaParts(services.media_markers)
    parts: list[dict[str, str]] = []
    for kind in _SHOWN:
        url = getattr(item, kind)
        if url is not None:
            parts.append(media.add(kind, f"{where}.{kind}", url=url))
    if item.text:
        parts.append({"type": "text", "text": item.text})
    if not parts:
        raise InvalidRequest(
            f"{where} has no text, image or video; give it at least one", param=where
        )
    messages: list[dict[str, Any]] = [{"role": "user", "content": parts}]
    if item.instruction is not None:
        messages.insert(0, {"role": "system", "content": item.instruction})
    return rendered(messages, media, services, add_generation_prompt=True)


def rendered(
    messages: Sequence[Mapping[str, Any]],
    media: MediaParts,
    services: Services,
    *,
    add_generation_prompt: bool,
    **variables: Any,
) -> EmbedPrompt:
    """The messages, which show `media`, as a prompt.

    variables  further ones of the template"""
    if services.template is None:
        raise UnsupportedFeature(
            "this model has no chat template, in which pictures and messages are shown to it; send "
            "texts, or start the server with --chat-template",
        )
    text = services.template.render(
        messages,
        add_generation_prompt=add_generation_prompt,
        markers=services.media_markers if media.sources else None,
        **variables,
    )
    return EmbedPrompt(text, tuple(media.sources))
