"""Forbidding tokens by bit masks with torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def mask_logits(logits: Tensor, masks: Tensor, rows: Sequence[int]) -> None:
    """As Kernels.mask_logits."""
    forbidden = _unpacked(masks, logits)
    if len(rows) == logits.shape[0] and list(rows) == list(range(len(rows))):
        logits.masked_fill_(forbidden, -torch.inf)
        return
    for place, row in enumerate(rows):
        logits[row].masked_fill_(forbidden[place], -torch.inf)


def _unpacked(masks: Tensor, logits: Tensor) -> Tensor:
    """[n, vocab] bool on the logits' device: where the bit is 0."""
    vocab = logits.shape[1]
    if logits.is_cpu:
        # A tenth of the time that shifts and comparisons take.
        inverted = np.bitwise_not(masks.numpy()).view(np.uint8)
        bits = np.unpackbits(inverted, axis=1, count=vocab, bitorder="little")
        return torch.from_numpy(bits).view(torch.bool)
    words = masks.to(logits.device, non_blocking=True)
    places = torch.arange(32, dtype=torch.int32, device=logits.device)
    bits_of_words = torch.bitwise_right_shift(words[:, :, None], places) & 1
    return bits_of_words.view(len(masks), -1)[:, :vocab] == 0
