"""Data types by the names that options have; torch's own types are in `kernels/interface.py`."""

from __future__ import annotations

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number, by the name of its type, which torch spells alike."""

KV_CACHE_8_BIT = {"int8": "int8", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
"""Further types, of the KV cache alone, and how torch spells them."""

KV_SCALE_BYTES = 2
"""In a KV cache of 8 bits each vector, of one token and head, has a scale of so many bytes."""
