"""The tower and projector that llama.cpp keeps in a GGUF file of their own ("mmproj"), beside the
one of the text model.

Keys and names of tensors: llama.cpp, tools/mtmd/clip-impl.h, and gguf-py's tensor_mapping.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sapwood.base.errors import ModelSourceError
from sapwood.store.gguf_config import shortest
from sapwood.store.gguf_header import GgufHeader, TensorEntry, read_header

log = logging.getLogger(__name__)

_BLOCK = re.compile(r"v\.blk\.(\d+)\.(.+)\.(weight|bias)")
_SIGLIP: Mapping[str, str] = MappingProxyType(
    {
        "v.patch_embd": "embeddings.patch_embedding",
        "v.position_embd": "embeddings.position_embedding",
        "v.post_ln": "post_layernorm",
    }
)
_SIGLIP_BLOCK: Mapping[str, str] = MappingProxyType(
    {
        "ln1": "layer_norm1",
        "ln2": "layer_norm2",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_out": "self_attn.out_proj",
        "ffn_up": "mlp.fc1",
        "ffn_down": "mlp.fc2",
    }
)
Settings = dict[str, dict[str, Any]]
"""Name of a JSON file -> its content."""


class Keys:
    """Metadata of a projector's file: `keys["patch_size"]` is that of clip.vision.patch_size."""

    def __init__(self, header: GgufHeader) -> None:
        self._header = header

    def get(self, name: str, default: Any = None) -> Any:
        value = self._header.metadata.get(f"clip.vision.{name}", default)
        return shortest(value) if isinstance(value, float) else value

    def __getitem__(self, name: str) -> Any:
        value = self.get(name)
        if value is None:
            raise ModelSourceError(f"{self._header.path} lacks clip.vision.{name} in its metadata")
        return value

    def vision_config(self) -> dict[str, Any]:
        return {
            "hidden_size": int(self["embedding_length"]),
            "intermediate_size": int(self["feed_forward_length"]),
            "num_hidden_layers": int(self["block_count"]),
            "num_attention_heads": int(self["attention.head_count"]),
            "image_size": int(self["image_size"]),
            "patch_size": int(self["patch_size"]),
            "layer_norm_eps": self.get("attention.layer_norm_epsilon", 1e-6),
        }

    def vectors_of_tile(self, scale: int) -> int:
        """If `scale` x `scale` patches become one vector."""
        return (int(self["image_size"]) // int(self["patch_size"]) // scale) ** 2

    def pixels(self) -> dict[str, Any]:
        """How a preprocessor_config.json tells of colours."""
        return {
            name: [shortest(float(value)) for value in self[name]]
            for name in ("image_mean", "image_std")
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Projector:
    """A kind of projector, and the model that it makes with a text model.

    class_name, model_type  of the whole model's config.json
    text        general.architecture of the text file
    token       text of the token in whose place vectors stand
    tower       what names of the tower's tensors begin with
    names       names of the other tensors
    one_more    those to which the file has added one
    fields      further fields of config.json
    settings    the files that tell how pictures are prepared
    """

    class_name: str
    model_type: str
    text: str
    token: str
    tower: str
    names: Mapping[str, str]
    fields: Callable[[Keys], dict[str, Any]]
    settings: Callable[[Keys], Settings]
    one_more: frozenset[str] = frozenset()


def _idefics3_settings(keys: Keys) -> Settings:
    edge, tile = keys.get("preproc_image_size"), int(keys["image_size"])
    vectors = keys.vectors_of_tile(int(keys["projector.scale_factor"]))
    # Files of before autumn 2025 do not tell how large a picture that is cut into tiles may be.
    pictures = {"do_image_splitting": edge is not None, "size": {"longest_edge": edge or tile}}
    return {
        "preprocessor_config.json": {
            **keys.pixels(),
            **pictures,
            "max_image_size": {"longest_edge": tile},
        },
        "processor_config.json": {"image_seq_len": vectors},
    }


def _gemma3_vectors(keys: Keys) -> int:
    return keys.vectors_of_tile(int(keys.get("projector.scale_factor", 4)))


def _gemma3_settings(keys: Keys) -> Settings:
    side = int(keys["image_size"])
    return {
        "preprocessor_config.json": {**keys.pixels(), "size": {"height": side, "width": side}},
        "processor_config.json": {"image_seq_length": _gemma3_vectors(keys)},
    }


PROJECTORS: Mapping[str, Projector] = {
    "idefics3": Projector(
        class_name="Idefics3ForConditionalGeneration",
        model_type="idefics3",
        text="llama",
        token="<image>",
        tower="model.vision_model",
        names={"mm.model.fc.weight": "model.connector.modality_projection.proj.weight"},
        fields=lambda keys: {"scale_factor": int(keys["projector.scale_factor"])},
        settings=_idefics3_settings,
    ),
    "gemma3": Projector(
        class_name="Gemma3ForConditionalGeneration",
        model_type="gemma3",
        text="gemma3",
        token="<image_soft_token>",
        tower="model.vision_tower.vision_model",
        names={
            "mm.input_projection.weight": (
                "model.multi_modal_projector.mm_input_projection_weight"
            ),
            "mm.soft_emb_norm.weight": "model.multi_modal_projector.mm_soft_emb_norm.weight",
        },
        fields=lambda keys: {"mm_tokens_per_image": _gemma3_vectors(keys)},
        settings=_gemma3_settings,
        one_more=frozenset({"mm.soft_emb_norm.weight"}),
    ),
}
"""clip.projector_type -> what it is."""


def checked(path: Path, *, is_asked: bool) -> Path | None:
    """The file, if sapwood can read the tower that it has; else None, and a line in the log.

    is_asked  whether somebody named the file; then ModelSourceError says why it cannot be read"""
    try:
        kind_of(read_header(path))
    except ModelSourceError as error:
        if is_asked:
            raise
        log.warning("only text is served: %s", error)
        return None
    return path


def kind_of(header: GgufHeader) -> Projector:
    """ModelSourceError if the file has no tower that sapwood reads from GGUF."""
    if header.metadata.get("general.architecture") != "clip":
        raise ModelSourceError(
            f"{header.path} is no projector: its general.architecture is not clip"
        )
    name = str(header.metadata.get("clip.projector_type"))
    if name not in PROJECTORS:
        raise ModelSourceError(
            f"{header.path} has a projector of the kind {name!r}, which sapwood does not read from "
            f"GGUF; known: {', '.join(PROJECTORS)}. Serve the model's safetensors, or its text "
            "alone with --mmproj none"
        )
    return PROJECTORS[name]


def rows_of(header: GgufHeader, file: int) -> list[dict[str, Any]]:
    """The file's tensors for tensors.json, each with its name in Hugging Face's layout.

    file  index of this file among the model's"""
    kind, keys = kind_of(header), Keys(header)
    inner = int(keys["feed_forward_length"])
    rows = []
    for tensor in header.tensors:
        name = _hf_name(tensor, kind, inner)
        if name is None:
            raise ModelSourceError(
                f"{header.path} has a tensor {tensor.name}, which sapwood knows no place for in a "
                f"{kind.model_type}; serve the model's safetensors"
            )
        added = 1.0 if tensor.name in kind.one_more else 0.0
        rows.append({**asdict(tensor), "file": file, "hf_name": name, "larger_by": added})
    return rows


def seeing(
    header: GgufHeader, text: GgufHeader, text_config: Mapping[str, Any]
) -> tuple[dict[str, Any], Settings]:
    """(config.json of the whole model, the files that tell how pictures are prepared)

    Raises ModelSourceError if that text model does not belong to that projector."""
    kind, keys = kind_of(header), Keys(header)
    architecture = text.metadata.get("general.architecture")
    if architecture != kind.text:
        raise ModelSourceError(
            f"{header.path} is for text models of the architecture {kind.text}, but {text.path} is "
            f"a {architecture}"
        )
    width = text_config["hidden_size"]
    if keys.get("projection_dim", width) != width:
        raise ModelSourceError(
            f"{header.path} makes vectors of {keys['projection_dim']} numbers, but {text.path} "
            f"has {width}: they are not of the same model"
        )
    tokens = text.metadata.get("tokenizer.ggml.tokens") or []
    if kind.token not in tokens:
        raise ModelSourceError(
            f"{text.path} has no token {kind.token}, in whose place {header.path} would put a "
            "picture; they are not of the same model"
        )
    config = {
        "architectures": [kind.class_name],
        "model_type": kind.model_type,
        "text_config": {
            name: value for name, value in text_config.items() if name != "architectures"
        },
        "vision_config": keys.vision_config(),
        "image_token_id": tokens.index(kind.token),
        "tie_word_embeddings": text_config["tie_word_embeddings"],
        "dtype": text_config["dtype"],
        **kind.fields(keys),
    }
    return config, kind.settings(keys)


def _hf_name(tensor: TensorEntry, kind: Projector, inner: int) -> str | None:
    if tensor.name in kind.names:
        return kind.names[tensor.name]
    whole, _, ending = tensor.name.rpartition(".")
    if whole in _SIGLIP:
        return f"{kind.tower}.{_SIGLIP[whole]}.{ending}"
    block = _BLOCK.fullmatch(tensor.name)
    if block is None or block[2] not in _SIGLIP_BLOCK:
        return None
    part = block[2]
    if part in ("ffn_up", "ffn_down"):
        # Some files call the two by each other's names; the first has more rows than columns.
        part = "ffn_up" if tensor.shape[0] == inner else "ffn_down"
    return f"{kind.tower}.encoder.layers.{block[1]}.{_SIGLIP_BLOCK[part]}.{ending}"
