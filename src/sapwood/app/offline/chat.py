"""Turns a Python program's conversation into a turn for the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sapwood.app.offline.media import message_with_media
from sapwood.base.errors import InvalidRequest
from sapwood.frontends.serving.chat import Conversation, Turn, plan_turn
from sapwood.frontends.serving.media import MediaParts
from sapwood.frontends.serving.services import Services
from sapwood.frontends.serving.tools import openai_tool_use
from sapwood.schema.sampling import SamplingParams

_NAMES = {
    "documents": "documents",
    "continue_final_message": "goes_on",
    "separate_reasoning": "takes_apart",
    "reasoning_effort": "effort",
    "thinking_budget": "thinking_budget",
}
_SAMPLING = {name: name for name in SamplingParams.__struct_fields__ if name not in _NAMES}
_SAMPLING |= dict.fromkeys(("max_tokens", "max_completion_tokens"), "max_new_tokens")
"""What programs give beside the messages, and the sampling parameter that it means."""


def chat_turn(
    services: Services,
    messages: Sequence[Mapping[str, Any]],
    sampling: SamplingParams,
    options: Mapping[str, Any],
) -> Turn:
    """
    options  the fields of POST /v1/chat/completions that concern tools, thinking and the template,
             by their names there; every other name is a variable of the chat template
    Raises   InvalidRequest that names the option
    """
    if not messages or not all(isinstance(message, Mapping) for message in messages):
        raise InvalidRequest(
            "a conversation must be a list of at least one message, each a mapping such as "
            '{"role": "user", "content": "Hello"}',
            param="messages",
        )
    given = dict(options)
    misplaced = next((name for name in given if name in _SAMPLING), None)
    if misplaced is not None:
        raise InvalidRequest(
            f"{misplaced} is a sampling parameter, and options of chat go to the template; give it "
            f'in the second argument: chat(messages, {{"{_SAMPLING[misplaced]}": …}})',
            param=misplaced,
        )
    use = openai_tool_use(
        given.pop("tools", None) or (),
        given.pop("tool_choice", None),
        given.pop("parallel_tool_calls", None),
    )
    goes_on = bool(given.get("continue_final_message"))
    fields = {ours: given.pop(name) for name, ours in _NAMES.items() if name in given}
    media = MediaParts(services.media_markers)
    shown = [
        message_with_media(message, f"messages[{i}]", media) for i, message in enumerate(messages)
    ]
    conversation = Conversation(
        messages=shown,
        media=media.sources,
        tools=use,
        add_generation_prompt=bool(given.pop("add_generation_prompt", not goes_on)),
        options=given,
        **fields,
    )
    return plan_turn(services, conversation, sampling, instead="use generate")
