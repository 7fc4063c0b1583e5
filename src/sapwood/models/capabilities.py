"""What works for each architecture, found by building a tiny model of it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from sapwood.kernels.recording import CannotRecord
from sapwood.kernels.torch_ops import TorchKernels
from sapwood.layers.build import Build
from sapwood.models.encoder.names import ENCODERS
from sapwood.models.lm.architecture import Architecture
from sapwood.models.lm.decoder import Decoder
from sapwood.models.lm.mixture import MixtureArchitecture
from sapwood.models.loader.assign import load_weights
from sapwood.models.loader.dummy import random_weights
from sapwood.models.registry import ARCHITECTURES, decoder_class
from sapwood.models.text_part import TEXT_ARCHITECTURES, WRAPPERS
from sapwood.models.vision.registry import TOWERS
from sapwood.store.gguf_architectures import ARCHITECTURES as DENSE_GGUF
from sapwood.store.gguf_mixtures import MIXTURES as GGUF_MIXTURES

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    **dict.fromkeys(("head_dim", "v_head_dim"), 32),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim"), 32),
    "max_position_embeddings": 64,
    "num_kv_shared_layers": 0,
    # Layers of both kinds in models that keep states.
    "full_attention_interval": 2,
    "hybrid_override_pattern": "M*",
    "linear_attn_config": {"full_attn_layers": [2]},
}
_EXPERTS = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
_OWN: dict[str, dict[str, Any]] = {
    "BailingMoeV2_5ForCausalLM": {"n_group": 1, "topk_group": 1},
    "JetNemotronForCausalLM": {
        "layer_types": ["jet", "attn"],
        "efficient_attention_config": {"jet": {"num_heads": 4, "head_dim": 32}},
    },
}
"""Fields that mean something in one architecture alone, by its name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What works for a decoder's architecture with the fields that config.json may leave out.

    name         as config.json has it
    models       the models that have it, in words
    gguf         names of the GGUF architectures that are read as this one
    is_recorded  whether a step is one call on CPUs; else it is computed op by op
    converts     whether `sapwood convert` takes it
    sees         whether requests may show it pictures
    """

    name: str
    models: str
    gguf: tuple[str, ...]
    is_recorded: bool
    converts: bool
    sees: bool = False


def capabilities() -> Iterator[Capabilities]:
    """Of all decoders, by name, and of the models whose text part is one."""
    towers = TOWERS.names()
    for name in sorted((*ARCHITECTURES.names(), *WRAPPERS), key=str.lower):
        if name in WRAPPERS:
            usual = TEXT_ARCHITECTURES[WRAPPERS[name][0]]
            one = _capabilities_of(usual)
            sees = name in towers
            what = "A model that also sees" if sees else "The text part of a model that also sees"
            words = f"{what}, for instance a {usual}"
            yield replace(one, name=name, models=words, gguf=(), converts=False, sees=sees)
        elif name not in ENCODERS:
            yield _capabilities_of(name)


@functools.cache
def _capabilities_of(name: str) -> Capabilities:
    found = decoder_class(name)
    config = found.read(_example(name, found))
    build = Build(kernels=TorchKernels(), device=torch.device("cpu"), dtype=torch.float32)
    parts = found(config, build)
    model = Decoder(parts)
    targets = model.targets()
    load_weights(model, random_weights(targets, seed=0, dtype=torch.float32))
    model.finalize()
    try:
        model.program()
    except CannotRecord:
        is_recorded = False
    else:
        is_recorded = True
    return Capabilities(
        name=name,
        models=_models_of(found),
        gguf=tuple(
            file
            for files in (DENSE_GGUF, GGUF_MIXTURES)
            for file, known in files.items()
            if name in (known.class_name, *known.known_as)
        ),
        is_recorded=is_recorded,
        converts=all(target.has_rows for target in targets.values())
        and parts.streams() is None
        and not config.heads_by_layer
        and config.latent is None,
    )


def _example(name: str, architecture: type[Architecture]) -> dict[str, Any]:
    """A config.json that leaves out what may be left out."""
    found: dict[str, Any] = {**_SIZES, **_OWN.get(name, {}), "architectures": [name]}
    if issubclass(architecture, MixtureArchitecture):
        found |= _EXPERTS
    for ours, theirs in architecture.spelled.items():
        value = found.pop(ours, None)
        names = (theirs,) if isinstance(theirs, str) else theirs
        if value is not None and names:
            found[names[0]] = value
    return found


def _models_of(architecture: type[Architecture]) -> str:
    """The first words of the module's docstring, which names the models and then its source."""
    text = sys.modules[architecture.__module__].__doc__ or architecture.__name__
    return " ".join(text.split()).partition(". Source")[0].rstrip(".")
