"""Conversations to prompts, in dialects where a last message of the assistant is a prefill."""

from __future__ import annotations

from collections.abc import Sequence

from sapwood.base.errors import InvalidRequest, UnsupportedFeature
from sapwood.frontends.common.services import Services
from sapwood.text.template import Message


def chat_prompt(services: Services, messages: Sequence[Message], *, instead: str) -> str:
    """The prompt, special tokens included; the model goes on with a last message of its own.

    instead  what a client may do if the model has no chat template
    Raises   InvalidRequest or UnsupportedFeature, which names messages
    """
    if services.template is None:
        raise UnsupportedFeature(
            f"this model has no chat template; {instead}, or start the server with --chat-template",
            param="messages",
        )
    goes_on = bool(messages) and messages[-1]["role"] == "assistant"
    try:
        return services.template.render(
            messages, add_generation_prompt=not goes_on, continue_final_message=goes_on
        )
    except InvalidRequest as error:
        if error.param != "continue_final_message":
            raise
        raise InvalidRequest(
            "the last of messages is the assistant's, but the chat template of this model leaves "
            "out its end, so that the model cannot go on with it; end with a message of the user",
            param="messages",
        ) from error
