"""The names that tensors have in files of their models' first authors, which ComfyUI, kohya's
trainer and GGUF files keep: what diffusers has as several layers is often one there.

Source: diffusers' conversions of single files (loaders/single_file_utils)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Origin:
    """What a tensor of such a file holds.

    names  of the tensors here that it has, one after another in its rows
    turns  whether the halves of its rows change places: it has shift and scale, we scale and shift
    """

    names: tuple[str, ...]
    turns: bool = False

    def parts(self, rows: Tensor, sizes: Iterable[int]) -> Iterator[tuple[str, Tensor]]:
        """(name, its rows) of a tensor whose first dimension is cut; ValueError if they do not
        add up. sizes: rows of each name"""
        counts = list(sizes)
        if sum(counts) != rows.shape[0]:
            raise ValueError(f"{rows.shape[0]} rows, but must have {sum(counts)}")
        start = 0
        for name, count in zip(self.names, counts, strict=True):
            own = rows[start : start + count]
            yield name, own.roll(count // 2, 0) if self.turns else own
            start += count


Origins = Mapping[str, Origin]
"""By the name in the file, without the ending .weight or .bias; whole names where those differ."""

_Maker = Callable[[set[str], Mapping[str, Any]], dict[str, Origin]]

_QKV = ("to_q", "to_k", "to_v")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")


def _under(prefix: str, names: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{prefix}.{name}" for name in names)


_FLUX_DOUBLE, _FLUX_SINGLE = "transformer_blocks.#", "single_transformer_blocks.#"
_FLUX: dict[str, tuple[str, ...]] = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    **{
        f"{theirs}.{layer}_layer": (f"time_text_embed.{ours}_embedder.linear_{number}",)
        for theirs, ours in (
            ("time_in", "timestep"),
            ("vector_in", "text"),
            ("guidance_in", "guidance"),
        )
        for number, layer in ((1, "in"), (2, "out"))
    },
    "double_blocks.#.img_mod.lin": (f"{_FLUX_DOUBLE}.norm1.linear",),
    "double_blocks.#.txt_mod.lin": (f"{_FLUX_DOUBLE}.norm1_context.linear",),
    "double_blocks.#.img_attn.qkv": _under(f"{_FLUX_DOUBLE}.attn", _QKV),
    "double_blocks.#.txt_attn.qkv": _under(f"{_FLUX_DOUBLE}.attn", _ADDED),
    "double_blocks.#.img_attn.proj": (f"{_FLUX_DOUBLE}.attn.to_out.0",),
    "double_blocks.#.txt_attn.proj": (f"{_FLUX_DOUBLE}.attn.to_add_out",),
    "double_blocks.#.img_attn.norm.query_norm.scale": (f"{_FLUX_DOUBLE}.attn.norm_q.weight",),
    "double_blocks.#.img_attn.norm.key_norm.scale": (f"{_FLUX_DOUBLE}.attn.norm_k.weight",),
    "double_blocks.#.txt_attn.norm.query_norm.scale": (f"{_FLUX_DOUBLE}.attn.norm_added_q.weight",),
    "double_blocks.#.txt_attn.norm.key_norm.scale": (f"{_FLUX_DOUBLE}.attn.norm_added_k.weight",),
    "double_blocks.#.img_mlp.0": (f"{_FLUX_DOUBLE}.ff.net.0.proj",),
    "double_blocks.#.img_mlp.2": (f"{_FLUX_DOUBLE}.ff.net.2",),
    "double_blocks.#.txt_mlp.0": (f"{_FLUX_DOUBLE}.ff_context.net.0.proj",),
    "double_blocks.#.txt_mlp.2": (f"{_FLUX_DOUBLE}.ff_context.net.2",),
    "single_blocks.#.modulation.lin": (f"{_FLUX_SINGLE}.norm.linear",),
    "single_blocks.#.linear1": (
        *_under(f"{_FLUX_SINGLE}.attn", _QKV),
        f"{_FLUX_SINGLE}.proj_mlp",
    ),
    "single_blocks.#.linear2": (f"{_FLUX_SINGLE}.proj_out",),
    "single_blocks.#.norm.query_norm.scale": (f"{_FLUX_SINGLE}.attn.norm_q.weight",),
    "single_blocks.#.norm.key_norm.scale": (f"{_FLUX_SINGLE}.attn.norm_k.weight",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
_TURNED = {"final_layer.adaLN_modulation.1"}

_Z_BLOCKS = ("layers.#", "noise_refiner.#", "context_refiner.#")
_Z_IMAGE: dict[str, tuple[str, ...]] = {
    "x_embedder": ("all_x_embedder.2-1",),
    "final_layer.linear": ("all_final_layer.2-1.linear",),
    "final_layer.adaLN_modulation.1": ("all_final_layer.2-1.adaLN_modulation.1",),
    **{f"{block}.attention.qkv": _under(f"{block}.attention", _QKV) for block in _Z_BLOCKS},
    **{f"{block}.attention.out": (f"{block}.attention.to_out.0",) for block in _Z_BLOCKS},
    **{f"{block}.attention.q_norm": (f"{block}.attention.norm_q",) for block in _Z_BLOCKS},
    **{f"{block}.attention.k_norm": (f"{block}.attention.norm_k",) for block in _Z_BLOCKS},
}

_SD3_BLOCK = "transformer_blocks.#"
_SD3: dict[str, tuple[str, ...]] = {
    "pos_embed": ("pos_embed.pos_embed",),
    "x_embedder.proj": ("pos_embed.proj",),
    "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
    "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
    "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
    "joint_blocks.#.x_block.attn.qkv": _under(f"{_SD3_BLOCK}.attn", _QKV),
    "joint_blocks.#.x_block.attn2.qkv": _under(f"{_SD3_BLOCK}.attn2", _QKV),
    "joint_blocks.#.context_block.attn.qkv": _under(f"{_SD3_BLOCK}.attn", _ADDED),
    "joint_blocks.#.x_block.attn.ln_q": (f"{_SD3_BLOCK}.attn.norm_q",),
    "joint_blocks.#.x_block.attn.ln_k": (f"{_SD3_BLOCK}.attn.norm_k",),
    "joint_blocks.#.x_block.attn2.ln_q": (f"{_SD3_BLOCK}.attn2.norm_q",),
    "joint_blocks.#.x_block.attn2.ln_k": (f"{_SD3_BLOCK}.attn2.norm_k",),
    "joint_blocks.#.context_block.attn.ln_q": (f"{_SD3_BLOCK}.attn.norm_added_q",),
    "joint_blocks.#.context_block.attn.ln_k": (f"{_SD3_BLOCK}.attn.norm_added_k",),
    "joint_blocks.#.x_block.attn.proj": (f"{_SD3_BLOCK}.attn.to_out.0",),
    "joint_blocks.#.x_block.attn2.proj": (f"{_SD3_BLOCK}.attn2.to_out.0",),
    "joint_blocks.#.context_block.attn.proj": (f"{_SD3_BLOCK}.attn.to_add_out",),
    "joint_blocks.#.x_block.adaLN_modulation.1": (f"{_SD3_BLOCK}.norm1.linear",),
    "joint_blocks.#.context_block.adaLN_modulation.1": (f"{_SD3_BLOCK}.norm1_context.linear",),
    "joint_blocks.#.x_block.mlp.fc1": (f"{_SD3_BLOCK}.ff.net.0.proj",),
    "joint_blocks.#.x_block.mlp.fc2": (f"{_SD3_BLOCK}.ff.net.2",),
    "joint_blocks.#.context_block.mlp.fc1": (f"{_SD3_BLOCK}.ff_context.net.0.proj",),
    "joint_blocks.#.context_block.mlp.fc2": (f"{_SD3_BLOCK}.ff_context.net.2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}


def _by_table(table: Mapping[str, tuple[str, ...]], turned: set[str]) -> _Maker:
    """# in a name stands for the number of a block."""

    def make(own: set[str], config: Mapping[str, Any]) -> dict[str, Origin]:
        found: dict[str, Origin] = {}
        for theirs, ours in table.items():
            pattern = re.compile(re.escape(ours[0]).replace(r"\#", r"(\d+)"))
            for name in own:
                match = pattern.fullmatch(name)
                if match is None:
                    continue
                number = match[1] if match.groups() else ""
                names = tuple(one.replace("#", number) for one in ours)
                found[theirs.replace("#", number)] = Origin(names, theirs in turned)
        return found

    return make


_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def _unet(own: set[str], config: Mapping[str, Any]) -> dict[str, Origin]:
    """Blocks are counted through from the first convolution on."""
    modules = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb.0.0": "add_embedding.linear_1",
        "label_emb.0.2": "add_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    num_levels = len(config["block_out_channels"])
    per_level = int(config.get("layers_per_block", 2))
    number = 1
    for level in range(num_levels):
        for layer in range(per_level):
            modules[f"input_blocks.{number}.0"] = f"down_blocks.{level}.resnets.{layer}"
            modules[f"input_blocks.{number}.1"] = f"down_blocks.{level}.attentions.{layer}"
            number += 1
        if level < num_levels - 1:
            modules[f"input_blocks.{number}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
            number += 1
    for index, name in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        modules[f"middle_block.{index}"] = f"mid_block.{name}"
    for number in range(num_levels * (per_level + 1)):
        level, layer = divmod(number, per_level + 1)
        modules[f"output_blocks.{number}.0"] = f"up_blocks.{level}.resnets.{layer}"
        attention = f"up_blocks.{level}.attentions.{layer}"
        has_attention = any(name.startswith(f"{attention}.") for name in own)
        if has_attention:
            modules[f"output_blocks.{number}.1"] = attention
        if layer == per_level and level < num_levels - 1:
            place = 2 if has_attention else 1
            modules[f"output_blocks.{number}.{place}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    back = {ours: theirs for theirs, ours in modules.items()}
    stems = {_stem(name) for name in own}
    return {
        theirs: Origin((name,)) for name in stems if (theirs := _unet_name(name, back)) is not None
    }


def _unet_name(name: str, modules: Mapping[str, str]) -> str | None:
    if name in modules:
        return modules[name]
    for module, theirs in modules.items():
        if name.startswith(f"{module}."):
            rest = name.removeprefix(f"{module}.")
            if ".resnets." in module:
                rest = next((one for one, ours in _RESNET.items() if ours == rest), rest)
            return f"{theirs}.{rest}"
    return None


_of_sd3 = _by_table(_SD3, _TURNED)


def _sd3(own: set[str], config: Mapping[str, Any]) -> dict[str, Origin]:
    found = _of_sd3(own, config)
    # The text of the last block has shift and scale alone, as the last norm has them.
    last = f"joint_blocks.{int(config.get('num_layers', 24)) - 1}.context_block.adaLN_modulation.1"
    if last in found:
        found[last] = replace(found[last], turns=True)
    return found


_MAKERS: dict[str, _Maker] = {
    "FluxTransformer2DModel": _by_table(_FLUX, _TURNED),
    "ZImageTransformer2DModel": _by_table(_Z_IMAGE, set()),
    "SD3Transformer2DModel": _sd3,
    "UNet2DConditionModel": _unet,
}


def origins(tensors: Iterable[str], config: Mapping[str, Any]) -> Origins:
    """By the names in such files, what they hold. Names that are the same there are not listed.

    tensors  that the model wants, by their names here
    config   the component's config.json
    """
    make = _MAKERS.get(str(config.get("_class_name", "")))
    if make is None:
        return {}
    own = set(tensors)
    return make(own | {_stem(name) for name in own}, config)


def _stem(name: str) -> str:
    return name.removesuffix(".weight").removesuffix(".bias")


def original(name: str, known: Origins) -> Origin:
    """What the tensor of that name holds; itself, if the names are the same."""
    if name in known:
        return known[name]
    for ending in (".weight", ".bias"):
        stem = name.removesuffix(ending)
        if stem != name and stem in known:
            found = known[stem]
            return Origin(tuple(f"{one}{ending}" for one in found.names), found.turns)
    return Origin((name,))
