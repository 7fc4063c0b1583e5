"""Schemes of weight quantisation, by the name that --quantization gives them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sapwood.base.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable

    from sapwood.layers.quantization.interface import LinearScheme

SCHEMES: Registry[Callable[[], LinearScheme]] = Registry(
    "quantization",
    {
        "none": "sapwood.layers.quantization.dense:DenseScheme",
        "w8a8_int8": "sapwood.layers.quantization.on_the_fly:Int8Scheme",
        "w4a8": "sapwood.layers.quantization.on_the_fly:Int4Scheme",
        "fp8": "sapwood.layers.quantization.on_the_fly:fp8_scheme",
        "w8a16": "sapwood.layers.quantization.on_the_fly:w8a16_scheme",
        "gguf": "sapwood.layers.quantization.gguf:gguf_scheme",
        "gguf_a8": "sapwood.layers.quantization.gguf:gguf_a8_scheme",
    },
)
