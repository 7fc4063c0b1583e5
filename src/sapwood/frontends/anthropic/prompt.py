"""Anthropic's system text and messages to one prompt."""

from __future__ import annotations

from typing import Any

from sapwood.base.errors import UnsupportedFeature
from sapwood.frontends.anthropic.protocol import (
    BLOCK_RULES,
    TURN_RULES,
    CountTokensRequest,
    TextBlock,
    Turn,
)
from sapwood.frontends.common.chat import chat_prompt
from sapwood.frontends.common.fields import parse
from sapwood.frontends.common.services import Services


def to_prompt(asked: CountTokensRequest, services: Services) -> str:
    """The prompt, special tokens included. Raises InvalidRequest that names the field."""
    return chat_prompt(
        services, to_messages(asked), instead="use /v1/completions, which takes a plain prompt"
    )


def to_messages(asked: CountTokensRequest) -> list[dict[str, str]]:
    """Messages as a template takes them; neighbours of one role are one message.

    Blocks and merged messages are joined by line breaks, as paragraphs are; but blocks of an
    assistant's message are the pieces of one text, and are joined as they are.
    """
    messages: list[dict[str, str]] = []
    system = _text(asked.system, "system", joined_by="\n")
    # Without a turn there is nothing to answer, and the template refuses an empty list.
    if system and asked.messages:
        messages.append({"role": "system", "content": system})
    for position, given in enumerate(asked.messages):
        where = f"messages[{position}]"
        turn = parse(given, Turn, TURN_RULES, where=where)
        joined_by = "" if turn.role == "assistant" else "\n"
        text = _text(turn.content, f"{where}.content", joined_by=joined_by)
        if messages and messages[-1]["role"] == turn.role:
            messages[-1]["content"] += f"\n{text}"
        else:
            messages.append({"role": turn.role, "content": text})
    return messages


def _text(content: str | list[dict[str, Any]], where: str, *, joined_by: str) -> str:
    if isinstance(content, str):
        return content
    return joined_by.join(_block(block, f"{where}[{i}]") for i, block in enumerate(content))


def _block(given: dict[str, Any], where: str) -> str:
    kind = given.get("type")
    if isinstance(kind, str) and kind != "text":
        raise UnsupportedFeature(
            f"{where} is of type {kind!r}, but this server takes only blocks of type 'text'",
            param=where,
        )
    return parse(given, TextBlock, BLOCK_RULES, where=where).text
