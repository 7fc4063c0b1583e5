"""Who computes a model's layers: sapwood's own classes, or transformers."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sapwood.base.errors import ConfigError
from sapwood.models.config import architecture_of
from sapwood.schema.config.decision import Decision
from sapwood.schema.config.model import ModelConfig
from sapwood.store import ModelFiles

SAPWOOD, TRANSFORMERS = "sapwood", "transformers"
SLOW = (
    "transformers computes the layers op by op, which is slower than sapwood's own classes; "
    "KV cache, attention and sampling are sapwood's"
)


def choose_impl(
    asked: ModelConfig,
    hf_config: dict[str, Any],
    files: ModelFiles,
    known: Collection[str],
    *,
    generates: bool,
) -> Decision:
    """The choice of `model_impl` for this model, with its reason.

    known      the architectures that sapwood has
    generates  whether the model generates, and does not make embeddings or scores
    Raises     ConfigError if what was asked for cannot compute this model
    """
    names = hf_config.get("architectures") or []
    is_known = any(name in known for name in names)
    if asked.model_impl == TRANSFORMERS:
        if not generates:
            raise ConfigError(
                "--model-impl transformers computes models that generate, and this one makes "
                "embeddings or scores; leave the option out"
            )
        _refuse_weights(asked, hf_config, files)
        return Decision("model_impl", TRANSFORMERS, f"asked for; {SLOW}")
    if is_known or asked.model_impl == SAPWOOD or not generates:
        # An unknown architecture is refused where its class is looked up.
        _refuse_foreign_code(hf_config, known)
        return Decision("model_impl", SAPWOOD, "sapwood has this architecture")
    name = architecture_of(hf_config)
    _refuse_weights(asked, hf_config, files)
    return Decision("model_impl", TRANSFORMERS, f"sapwood has no {name}; {SLOW}")


def _refuse_weights(asked: ModelConfig, hf_config: dict[str, Any], files: ModelFiles) -> None:
    """Raises ConfigError for weights that transformers' modules cannot take here."""
    name = architecture_of(hf_config)
    here = f"transformers computes {name}, over sapwood's KV cache"
    if asked.load_format != "dummy" and files.weight_format != "safetensors":
        raise ConfigError(
            f"{here}, and takes weights from safetensors files; those of {files.name} are "
            f"{files.weight_format or 'missing'}; use the model's safetensors version"
        )
    if hf_config.get("quantization_config") is not None:
        raise ConfigError(
            f"{here}, and takes weights that are not quantised; the checkpoint of {files.name} is. "
            "Use the model's unquantised checkpoint, or an architecture of `sapwood models`"
        )
    if asked.quantization not in (None, "none"):
        raise ConfigError(
            f"{here}, and its weights cannot be quantised while they load; leave out "
            f"--quantization {asked.quantization}"
        )


def _refuse_foreign_code(config: dict[str, Any], known: Collection[str]) -> None:
    """Raises ConfigError for an architecture that is only Python code beside the checkpoint."""
    names = config.get("architectures") or []
    if config.get("auto_map") and not any(name in known for name in names):
        raise ConfigError(
            f"the architecture {', '.join(map(str, names)) or '(none named)'} is Python code that "
            "came with the checkpoint (auto_map), which sapwood's own classes never run; known: "
            f"{', '.join(sorted(known))}. A package can add an architecture (the entry point "
            "sapwood.architectures, see ARCHITECTURE.md)"
        )
