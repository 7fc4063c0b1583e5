"""The processor "disallowed_tokens": some tokens are never chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sapwood.executor.sampling.custom import Process
from sapwood.schema.logits_processors import disallowed_token_ids


def disallowed_tokens(params: Mapping[str, Any], prompt_ids: Sequence[int]) -> Process:
    """params  {"token_ids": [...]}: the tokens that may not be chosen, which the model knows"""
    ids = torch.tensor(sorted(set(disallowed_token_ids(params))))

    def process(logits: Tensor, output_ids: Sequence[int]) -> None:
        logits[ids.to(logits.device)] = -torch.inf

    return process
