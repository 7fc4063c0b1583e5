"""Sums up a model's weight files from their headers, without reading a tensor."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable

from sapwood.schema.weight_summary import WeightSummary
from sapwood.store.files import ModelFiles
from sapwood.store.safetensors_header import read_safetensors_header

_WHOLE_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""Types of safetensors whose elements are the model's numbers; others may pack several into one."""


def summarize(files: ModelFiles) -> WeightSummary:
    """WeightError, with the file's name, if the header of a safetensors file is damaged."""
    num_bytes = sum(path.stat().st_size for path in files.weights)
    types: Counter[str] = Counter()
    num_parameters = 0
    for type_name, shape, size in _tensors(files):
        types[type_name] += size
        num_parameters += math.prod(shape)
    of_most = types.most_common(1)[0][0] if types else None
    is_packed = files.weight_format == "safetensors" and of_most not in _WHOLE_FLOATS
    return WeightSummary(
        weight_format=files.weight_format,
        num_bytes=num_bytes,
        num_parameters=None if of_most is None or is_packed else num_parameters,
        type_name=None if is_packed else of_most,
    )


def _tensors(files: ModelFiles) -> Iterable[tuple[str, tuple[int, ...], int]]:
    """Type, shape and bytes of each tensor; nothing for formats without a header of shapes."""
    if files.weight_format == "safetensors":
        for path in files.weights:
            for entry in read_safetensors_header(path):
                yield entry.dtype, entry.shape, entry.num_bytes
    if files.weight_format == "gguf":
        table = json.loads((files.path / "tensors.json").read_text("utf-8"))
        for tensor in table["tensors"]:
            yield tensor["type"], tuple(tensor["shape"]), tensor["num_bytes"]
