"""The processor "disallowed_tokens": some tokens are never chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sapwood.base.errors import InvalidRequest
from sapwood.executor.sampling.custom import Process


def disallowed_tokens(params: Mapping[str, Any], prompt_ids: Sequence[int]) -> Process:
    """params  {"token_ids": [...]}: the tokens that may not be chosen

    Raises InvalidRequest if there are none, or other parameters."""
    token_ids = params.get("token_ids")
    is_list = isinstance(token_ids, list) and all(type(one) is int for one in token_ids)
    if not is_list or not token_ids or set(params) != {"token_ids"}:
        raise InvalidRequest(
            'custom_params must be {"token_ids": [...]} with at least one token id',
            param="custom_params",
        )
    ids = torch.tensor(token_ids)

    def process(logits: Tensor, output_ids: Sequence[int]) -> None:
        logits[ids.to(logits.device)] = -torch.inf

    return process
