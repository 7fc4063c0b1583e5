"""The served model as Anthropic's API lists models. Source: Anthropic's API reference.

OpenAI's API has the same path; Anthropic's clients are recognised by the version header, which they
must send.
"""

from __future__ import annotations

from datetime import UTC, datetime

from sapwood.frontends.serving.services import Services

ANTHROPIC_VERSION = "anthropic-version"
"""The header that Anthropic's clients send with every request."""


def anthropic_model(services: Services) -> dict[str, object]:
    since = datetime.fromtimestamp(services.created, UTC)
    return {
        "type": "model",
        "id": services.model_name,
        "display_name": services.model_name,
        "created_at": since.isoformat().replace("+00:00", "Z"),
        "max_input_tokens": services.engine.info.context_length,
    }


def anthropic_models(services: Services) -> dict[str, object]:
    name = services.model_name
    return {
        "data": [anthropic_model(services)],
        "has_more": False,
        "first_id": name,
        "last_id": name,
    }
