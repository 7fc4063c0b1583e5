"""Metadata of a GGUF file as the config.json and generation_config.json of Hugging Face models.

Keys: ggml, docs/gguf.md and gguf-py's constants.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from sapwood.base.errors import ModelSourceError
from sapwood.store.gguf_architecture import Architecture
from sapwood.store.gguf_architectures import ARCHITECTURES
from sapwood.store.gguf_header import GgufHeader, TensorEntry
from sapwood.store.gguf_mixtures import MIXTURES, architecture_named

_RMS, _LAYER = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
_EPSILONS = {"rms": (_RMS,), "layer": (_LAYER,), "rms or layer": (_RMS, _LAYER)}
_MAX_FLOAT32 = 3.4e38
_LLAMA3_LOW_FREQ_FACTOR = 1.0
_LLAMA3_HIGH_FREQ_FACTOR = 4.0
_LLAMA3_ORIGINAL_CONTEXT = 8192


KV_HEADS, SIZES = "num_key_value_heads_per_layer", "intermediate_sizes_per_layer"
"""Fields of config.json that architectures have whose layers differ."""


class Fields:
    """Metadata of one architecture: `fields["block_count"]` is the value of llama.block_count."""

    def __init__(self, header: GgufHeader, tensors: Mapping[str, TensorEntry]) -> None:
        """`tensors`: all of them, by name."""
        self.path = header.path
        self._tensors = tensors
        self.architecture = str(header.metadata.get("general.architecture"))
        self._metadata = header.metadata

    def get(self, name: str, default: Any = None) -> Any:
        value = self._metadata.get(f"{self.architecture}.{name}", default)
        return shortest(value) if isinstance(value, float) else value

    def plain(self, key: str) -> Any:
        """The value of a key that does not begin with the architecture; None if there is none."""
        return self._metadata.get(key)

    def __getitem__(self, name: str) -> Any:
        value = self.get(name)
        if value is None:
            raise ModelSourceError(
                f"{self.path} lacks {self.architecture}.{name} in its metadata; "
                f"convert the model again"
            )
        return value

    def first(self, *names: str) -> Any:
        """The first of these values that there is."""
        found = (self.get(name) for name in names)
        value = next((one for one in found if one is not None), None)
        return self[names[-1]] if value is None else value

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Of a tensor by its whole name."""
        if tensor not in self._tensors:
            raise ModelSourceError(f"{self.path} has no {tensor}, so it is no whole model")
        return self._tensors[tensor].shape

    def has(self, tensor: str) -> bool:
        """Whether some layer has that tensor: "attn_q.bias", …"""
        return bool(self.layers_with(tensor))

    def layers_with(self, tensor: str) -> list[int]:
        """The layers that have that tensor: "attn_q.bias", …"""
        number = int(self["block_count"])
        return [layer for layer in range(number) if f"blk.{layer}.{tensor}" in self._tensors]

    def uniform(self, name: str, default: int | None = None, *, skips: bool = False) -> int:
        """An integer that may be given per layer, provided that all layers agree; `skips`: but for
        those with 0."""
        value = self[name] if default is None else self.get(name, default)
        values = set(value) if isinstance(value, list) else {value}
        if skips and len(values) > 1:
            values.discard(0)
        if len(values) != 1:
            raise ModelSourceError(
                f"{self.path}: {self.architecture}.{name} differs between layers, "
                f"which sapwood does not serve"
            )
        return int(values.pop())

    def of_layers(self, number: int) -> dict[str, list[int]]:
        """Key and value heads and intermediate size of each of `number` layers."""
        found = {}
        for field, name in ((KV_HEADS, "attention.head_count_kv"), (SIZES, "feed_forward_length")):
            value = self[name]
            found[field] = value if isinstance(value, list) else [value] * number
            if len(found[field]) != number:
                raise ModelSourceError(
                    f"{self.path}: {self.architecture}.{name} has {len(found[field])} numbers for "
                    f"{number} layers"
                )
        return found


def shortest(value: float) -> float:
    """The shortest decimal that is the same 32-bit float: 1e-05 rather than 9.99999974e-06."""
    if not abs(value) < _MAX_FLOAT32:
        return value
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == struct.pack("<f", value):
            return short
    return value


def architecture_of(header: GgufHeader) -> Architecture:
    """The file's architecture. ModelSourceError, with all known ones, if sapwood has no such."""
    name = str(header.metadata.get("general.architecture"))
    found = architecture_named(name, has_experts=has_experts(header))
    if found is None:
        known = MIXTURES if has_experts(header) else ARCHITECTURES
        kind = " with experts" if has_experts(header) else ""
        raise ModelSourceError(
            f"{header.path} has architecture {name!r}{kind}, which sapwood does not read from "
            f"GGUF; known{kind}: {', '.join(known)}. A safetensors version of the model may be "
            "served"
        )
    return found


def has_experts(header: GgufHeader) -> bool:
    return bool(Fields(header, {}).get("expert_count", 0))


def num_layers(header: GgufHeader) -> int:
    """Without the last ones, which guess further tokens and are not used."""
    fields = Fields(header, {})
    return int(fields["block_count"]) - int(fields.get("nextn_predict_layers", 0))


def hf_config(header: GgufHeader, tensors: Sequence[TensorEntry]) -> dict[str, Any]:
    """The model's config.json; `tensors` has the tensors of all its files.

    Fields are called as most architectures call them, whatever this one's own config.json does."""
    architecture = architecture_of(header)
    by_name = {tensor.name: tensor for tensor in tensors}
    fields = Fields(header, by_name)
    _refuse_unserved(fields, architecture)
    embedding = by_name.get("token_embd.weight")
    if embedding is None:
        raise ModelSourceError(f"{header.path} has no token_embd.weight, so it is no whole model")
    differs = architecture.differs
    num_heads = fields.uniform("attention.head_count", skips=differs)
    per_layer = fields.of_layers(num_layers(header)) if differs else {}
    hidden_size = int(fields["embedding_length"])
    no_dense_size = 1 if has_experts(header) else None  # of files whose layers all have experts
    # 0 heads: an architecture without attention, whose `more` has the fields of its other heads.
    head_dim = int(fields.get("attention.key_length", hidden_size // max(1, num_heads)))
    config: dict[str, Any] = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers(header),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads
        if differs
        else fields.uniform("attention.head_count_kv", num_heads, skips=architecture.mixes),
        "head_dim": head_dim,
        "intermediate_size": max(per_layer[SIZES])
        if differs
        else fields.uniform("feed_forward_length", no_dense_size, skips=architecture.mixes),
        **per_layer,
        "hidden_act": architecture.activation,
        "vocab_size": embedding.shape[0],
        "rms_norm_eps": fields.first(*_EPSILONS[architecture.norm]),
        "rope_theta": fields.get("rope.freq_base", 10000.0),
        "max_position_embeddings": int(fields["context_length"]),
        "tie_word_embeddings": "output.weight" not in by_name,
        "attention_bias": fields.has("attn_q.bias"),
        "mlp_bias": fields.has("ffn_up.bias"),
        "dtype": _dtype(tensors),
        "gguf_projections": "fused" if fields.has("attn_qkv.weight") else "separate",
        **special_ids(header),
    }
    rotary_dim = int(fields.get("rope.dimension_count", head_dim))
    if 0 < rotary_dim < head_dim:
        # The next larger number, so that its product with head_dim is not rounded to below.
        config["partial_rotary_factor"] = math.nextafter(rotary_dim / head_dim, 2.0)
    scaling = _rope_scaling(header, fields, by_name, rotary_dim, config["rope_theta"])
    if scaling is not None:
        config["rope_scaling"] = scaling
    window = int(fields.get("attention.sliding_window", 0))
    if 0 < window < config["max_position_embeddings"]:
        if not architecture.has_windows:
            raise ModelSourceError(
                f"{header.path} has a sliding window of {window} tokens, which sapwood does not "
                f"serve for {fields.architecture}"
            )
        config["sliding_window"] = window
    return {**config, **architecture.more(fields, config)}


def special_ids(header: GgufHeader) -> dict[str, int]:
    """bos_token_id, eos_token_id and pad_token_id, as far as the file has them."""
    keys = {"bos": "bos", "eos": "eos", "pad": "padding"}
    found = {
        f"{name}_token_id": header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in keys.items()
    }
    return {name: int(value) for name, value in found.items() if value is not None}


def generation_config(header: GgufHeader) -> dict[str, Any]:
    """generation_config.json; eos_token_id lists every token that ends an answer."""
    ids = special_ids(header)
    config: dict[str, Any] = {name: value for name, value in ids.items() if name != "eos_token_id"}
    ends = [
        header.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")
    ]
    unique = list(dict.fromkeys(int(end) for end in ends if end is not None))
    if unique:
        config["eos_token_id"] = unique
    return config


def _refuse_unserved(fields: Fields, architecture: Architecture) -> None:
    """Raise an error for metadata that asks for a computation which sapwood does not have."""
    for name, neutral in (
        ("expert_count", 0),
        ("attention.temperature_scale", 0.0),
        ("attention.clamp_kqv", 0.0),
        ("logit_scale", 1.0),
        ("embedding_scale", 1.0),
        ("residual_scale", 1.0),
        ("attention.scale", 0.0),
        ("rope.scaling.yarn_log_multiplier", 0.0),
    ):
        value = fields.get(name)
        if value is not None and value != neutral and name not in architecture.reads:
            raise ModelSourceError(
                f"{fields.path} has {fields.architecture}.{name} = {value}, "
                f"which sapwood does not serve from GGUF"
            )
    key_length, value_length = (fields.get(f"attention.{kind}_length") for kind in ("key", "value"))
    differ = value_length is not None and key_length is not None and key_length != value_length
    if differ and "attention.value_length" not in architecture.reads:
        raise ModelSourceError(
            f"{fields.path} has keys of {key_length} and values of {value_length} numbers per "
            f"head, which sapwood does not serve"
        )


def _dtype(tensors: Sequence[TensorEntry]) -> str:
    """The data type of the stored matrices; for quantised matrices it is bfloat16."""
    matrices = {tensor.type for tensor in tensors if len(tensor.shape) > 1}
    if matrices == {"F32"}:
        return "float32"
    return "float16" if matrices <= {"F32", "F16"} else "bfloat16"


def _rope_scaling(
    header: GgufHeader,
    fields: Fields,
    by_name: Mapping[str, TensorEntry],
    head_dim: int,
    theta: float,
) -> dict[str, Any] | None:
    factors = by_name.get("rope_freqs.weight")
    if factors is not None:
        return _scaling_from_factors(_read_floats(header, factors), head_dim, theta)
    own = [by_name.get(f"rope_factors_{kind}.weight") for kind in ("short", "long")]
    if own[0] is not None and own[1] is not None:
        short, long = (_read_floats(header, one) for one in own if one is not None)
        return _longrope(fields, short, long)
    kind = fields.get("rope.scaling.type", "none")
    factor = float(fields.get("rope.scaling.factor", fields.get("rope.scale_linear", 0.0)))
    original = fields.get("rope.scaling.original_context_length")
    if kind == "none" and fields.get("rope.scale_linear"):
        kind = "linear"  # how files from before rope.scaling.type say it
    if kind == "none" or factor in (0.0, 1.0):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise ModelSourceError(
            f"{header.path} scales its rotary embedding by {kind!r}, which sapwood does not read "
            f"from GGUF; known: none, linear, yarn, and frequency factors"
        )
    scaling: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
    if original is not None:
        scaling["original_max_position_embeddings"] = int(original)
    attention = fields.get("rope.scaling.attn_factor", 1.0)
    if attention != 1.0:
        # llama.cpp multiplies YaRN's own magnitude by it; Hugging Face's key replaces that.
        scaling["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0)
    for name in ("beta_fast", "beta_slow"):
        value = fields.get(f"rope.scaling.yarn_{name}")
        if value is not None:
            scaling[name] = value
    return scaling


def _longrope(fields: Fields, short: Sequence[float], long: Sequence[float]) -> dict[str, Any]:
    scaling: dict[str, Any] = {
        "rope_type": "longrope",
        "short_factor": [shortest(factor) for factor in short],
        "long_factor": [shortest(factor) for factor in long],
        "original_max_position_embeddings": int(fields["rope.scaling.original_context_length"]),
    }
    attention = fields.get("rope.scaling.attn_factor")
    if attention is not None:
        scaling["attention_factor"] = attention
    return scaling


def _read_floats(header: GgufHeader, tensor: TensorEntry) -> list[float]:
    if tensor.type != "F32":
        raise ModelSourceError(f"{header.path}: {tensor.name} is {tensor.type} instead of F32")
    with header.path.open("rb") as file:
        file.seek(tensor.offset)
        raw = file.read(tensor.num_bytes)
    return list(struct.unpack(f"<{tensor.num_bytes // 4}f", raw))


def _scaling_from_factors(
    factors: Sequence[float], head_dim: int, theta: float
) -> dict[str, Any] | None:
    """The rope_scaling that divides each rotary frequency by its factor.

    A file has the results of Llama 3's formula instead of its parameters. All Llama 3 models have
    the same parameters but for the largest factor, so these are tried. If they do not give the
    file's factors, the factors are passed on as "longrope", whose two lists of factors are such
    divisors.
    """
    largest = shortest(max(factors))
    if all(factor == 1.0 for factor in factors):
        return None
    expected = _llama3_factors(len(factors), head_dim, theta, largest)
    if all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(factors, expected, strict=True)):
        return {
            "rope_type": "llama3",
            "factor": largest,
            "low_freq_factor": _LLAMA3_LOW_FREQ_FACTOR,
            "high_freq_factor": _LLAMA3_HIGH_FREQ_FACTOR,
            "original_max_position_embeddings": _LLAMA3_ORIGINAL_CONTEXT,
        }
    exact = [shortest(factor) for factor in factors]
    return {
        "rope_type": "longrope",
        "short_factor": exact,
        "long_factor": exact,
        "factor": 1.0,
        "attention_factor": 1.0,
    }


def _llama3_factors(count: int, head_dim: int, theta: float, factor: float) -> list[float]:
    """The divisor of each rotary frequency in Llama 3.

    Source  Meta's llama-models, `apply_scaling`: wavelengths longer than the original context are
            stretched by `factor`, wavelengths shorter than a quarter of the context are kept, and
            those in between are blended
    """
    low, high = _LLAMA3_LOW_FREQ_FACTOR, _LLAMA3_HIGH_FREQ_FACTOR
    divisors = []
    for pair in range(count):
        turns = _LLAMA3_ORIGINAL_CONTEXT / (2 * math.pi * theta ** (2 * pair / head_dim))
        blend = min(max((turns - low) / (high - low), 0.0), 1.0)
        divisors.append(1.0 / ((1.0 - blend) / factor + blend))
    return divisors
