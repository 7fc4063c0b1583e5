"""How likely given tokens follow a query and an item."""

from __future__ import annotations

import numpy as np

from sapwood.base.errors import InvalidRequest
from sapwood.frontends.serving.embed import Text
from sapwood.text.embedding import PoolingOutput, softmax


def scores_of(answer: PoolingOutput, *, apply_softmax: bool) -> list[float]:
    """Log probabilities of the labels -> their probabilities, in the same order."""
    likely = softmax(answer.values) if apply_softmax else np.exp(answer.values)
    return [float(probability) for probability in likely.tolist()]


def scored_prompt(query: Text, item: Text, *, item_first: bool) -> Text:
    """The prompt of one item; InvalidRequest if one is a text and the other token ids."""
    if isinstance(query, str) and isinstance(item, str):
        return item + query if item_first else query + item
    if isinstance(query, list) and isinstance(item, list):
        return item + query if item_first else query + item
    raise InvalidRequest(
        "query and items must all be texts, or all be lists of token ids", param="items"
    )
