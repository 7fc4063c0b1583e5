"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from sapwood.frontends.serving.services import Services


def model_list(services: Services) -> dict[str, object]:
    return {"object": "list", "data": [model_card(services), *adapter_cards(services)]}


def adapter_cards(services: Services) -> list[dict[str, object]]:
    """A card per LoRA adapter, which has the served model as its parent."""
    paths = {} if services.adapters is None else services.adapters.paths
    return [
        model_card(services) | {"id": name, "root": path, "parent": services.model_name}
        for name, path in paths.items()
    ]


def card_of(services: Services, asked: str) -> dict[str, object]:
    """The card of the model, or of the adapter, with that name; NotFound."""
    name = services.adapter_of(asked)
    cards = [card for card in adapter_cards(services) if card["id"] == name]
    return cards[0] if cards else model_card(services)


def model_card(services: Services) -> dict[str, object]:
    """The served model's card; EngineUnavailable until the engine reports its context length.

    is_generation  whether the model writes text; others make embeddings or scores
    media          kinds that the model takes besides text: image, video
    has_reasoning  whether the server tells the model's thinking from its answer
    """
    formats = services.formats
    return {
        "id": services.model_name,
        "object": "model",
        "created": services.created,
        "owned_by": "sapwood",
        "root": services.model_path,
        "parent": None,
        "max_model_len": services.engine.info.context_length,
        "is_generation": services.pooling is None,
        "media": sorted(services.media_markers),
        "has_reasoning": formats.reasoning is not None,
        "tool_call_parser": None if formats.calls is None else formats.calls.name,
    }
