"""How likely given tokens follow a query and an item."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sapwood.base.errors import InvalidRequest
from sapwood.frontends.serving.embed import Text
from sapwood.frontends.serving.services import Services
from sapwood.text.embedding import PoolingOutput, softmax


def scores_of(answer: PoolingOutput, *, apply_softmax: bool) -> list[float]:
    """Log probabilities of the labels -> their probabilities, in the same order."""
    likely = softmax(answer.values) if apply_softmax else np.exp(answer.values)
    return [float(probability) for probability in likely.tolist()]


def scored_prompts(
    services: Services, query: Text, items: Sequence[Text], *, item_first: bool
) -> list[Text]:
    """The prompt of each item; InvalidRequest unless all are texts, or all are token ids.

    Each item is scored by itself: its prompt is the query, the token of
    --multi-item-scoring-delimiter if there is one, and the item.
    """
    delimiter = services.options.get("multi_item_scoring_delimiter")
    between: list[int] = [delimiter] if isinstance(delimiter, int) else []
    return [
        _joined(services, item, between, query)
        if item_first
        else _joined(services, query, between, item)
        for item in items
    ]


def _joined(services: Services, first: Text, between: list[int], second: Text) -> Text:
    if isinstance(first, str) and isinstance(second, str):
        middle = services.tokenizer.decode(between, skip_special_tokens=False) if between else ""
        return first + middle + second
    if isinstance(first, list) and isinstance(second, list):
        return [*first, *between, *second]
    raise InvalidRequest(
        "query and items must all be texts, or all be lists of token ids", param="items"
    )
