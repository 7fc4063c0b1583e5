"""Which models can have their layers shared out to stages."""

from __future__ import annotations

from sapwood.base.errors import ConfigError
from sapwood.models.config import DecoderConfig
from sapwood.models.registry import decoder_class
from sapwood.schema.stage import Stage


def refuse_split(config: DecoderConfig, stage: Stage) -> None:
    """Raises ConfigError if layers of this stage need something that is in another one."""
    if decoder_class(config.architecture).shares_weights:
        raise ConfigError(
            f"layers of {config.architecture} have weights in common, which stages cannot share; "
            "use --tp-size instead of --pp-size"
        )
    for layer in range(config.num_layers):
        heads = config.heads_of(layer)
        source = None if heads is None else heads.source
        if source is not None and (layer in stage.layers) != (source in stage.layers):
            raise ConfigError(
                f"layer {layer} of the model attends to the keys and values of layer {source}, "
                "which must be in the same stage; set --pp-layer-partition, or use --tp-size "
                "instead of --pp-size"
            )
