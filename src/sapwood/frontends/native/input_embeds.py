"""Prompts that come as embeddings instead of tokens."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

from sapwood.base.errors import InvalidRequest

Vectors = list[bytes]
"""One prompt's vectors: fp32, little endian, one piece per token."""

NAME = "input_embeds"


def prompts_of_vectors(given: Sequence[Sequence[Any]]) -> tuple[list[Vectors], bool]:
    """(the embeddings of each prompt, whether the prompts came as a list)

    given   one prompt, [tokens][hidden size], or a list of prompts
    Raises  InvalidRequest, with the place of anything that is empty, mixed, or no finite fp32
    """
    if not given or not given[0]:
        raise InvalidRequest(
            f"{NAME} is empty, or its first entry is; send at least one vector", param=NAME
        )
    if not isinstance(given[0][0], list):
        return [_packed(given, NAME)], False
    return [_packed(prompt, f"{NAME}[{i}]") for i, prompt in enumerate(given)], True


def _packed(vectors: Sequence[Any], where: str) -> Vectors:
    if not vectors:
        raise InvalidRequest(f"{where} has no vectors; send at least one", param=NAME)
    return [_vector(vector, f"{where}[{i}]") for i, vector in enumerate(vectors)]


def _vector(numbers: Any, where: str) -> bytes:
    if not isinstance(numbers, list) or any(isinstance(number, list) for number in numbers):
        raise InvalidRequest(
            f"{where} must be a list of numbers; send one list of vectors, or a list of such lists",
            param=NAME,
        )
    try:
        packed = struct.pack(f"<{len(numbers)}f", *numbers)
    except (struct.error, OverflowError):
        packed = None
    if packed is None or not all(map(math.isfinite, numbers)):
        wrong = next(index for index, number in enumerate(numbers) if not _is_fp32(number))
        raise InvalidRequest(
            f"{where}[{wrong}] is {str(numbers[wrong])[:40]} but must be a finite number of fp32",
            param=NAME,
        )
    return packed


def _is_fp32(number: Any) -> bool:
    try:
        struct.pack("<f", number)
        return math.isfinite(number)
    except (struct.error, OverflowError):
        return False
