"""Checkpoints that other tools quantised, by the quant_method of their quantization_config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from sapwood.base.errors import ConfigError
from sapwood.base.registry import Registry

if TYPE_CHECKING:
    from sapwood.layers.quantization.formats.interface import CheckpointFormat

_HERE = "sapwood.layers.quantization.formats"

FORMATS: Registry[Callable[[Mapping[str, Any]], CheckpointFormat]] = Registry(
    "quant_method",
    {
        "awq": f"{_HERE}.awq:read",
        "bitsandbytes": f"{_HERE}.bitsandbytes:read",
        "compressed-tensors": f"{_HERE}.compressed_tensors:read",
        "fbgemm_fp8": f"{_HERE}.fp8:read",
        "fp8": f"{_HERE}.fp8:read",
        "gptq": f"{_HERE}.gptq:read",
        "modelopt": f"{_HERE}.modelopt:read",
        "mxfp4": f"{_HERE}.mxfp4:read",
    },
)


def format_of(hf_config: Mapping[str, Any]) -> CheckpointFormat | None:
    """The format of the weights as config.json describes it; None: they are not quantised.

    Raises ConfigError, with the way out, for a format or an option that is not supported."""
    config = hf_config.get("quantization_config") or hf_config.get("compression_config")
    if not config:
        return None
    if not isinstance(config, Mapping):
        raise ConfigError(f"quantization_config of config.json is {config!r} but must be an object")
    method = _method_of(config)
    if method not in FORMATS.names():
        raise ConfigError(
            f"the checkpoint's weights are quantised with {method!r}, which is not supported "
            f"(supported: {', '.join(FORMATS.names())}); use the model's unquantised checkpoint "
            "with --quantization w8a8_int8, w4a8, fp8 or w8a16"
        )
    return FORMATS.get(method)(config)


def _method_of(config: Mapping[str, Any]) -> str:
    """The quant_method; some tools leave it out, and are recognised by fields of their own."""
    method = config.get("quant_method")
    if method is None and (config.get("load_in_4bit") or config.get("load_in_8bit")):
        return "bitsandbytes"
    if method is None and "quant_algo" in config:
        return "modelopt"
    if method is None and "config_groups" in config:
        return "compressed-tensors"
    return str(method)
