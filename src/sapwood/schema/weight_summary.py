"""What lists of models tell about a model's weight files."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSummary:
    """A summary of weight files, from their headers.

    weight_format   "safetensors", "gguf", "pt", or "none" without files
    num_bytes       size of all files together
    num_parameters  numbers in all tensors; None: unknown, or packed so that tensors hide the count
    type_name       type of most weights as the format spells it, such as "Q4_1"; None: unknown
    """

    weight_format: str = "none"
    num_bytes: int = 0
    num_parameters: int | None = None
    type_name: str | None = None
