"""Tensors of GGUF files, either dequantised or as blocks.

The table of tensors comes from tensors.json, which store.prepare wrote. A matrix is turned
into 32-bit floats piece by piece, and each piece is cast into the resulting tensor while it is
still in the core's cache. A pool of threads was measured to be slower: many short calls of numpy
spend their time handing the interpreter's lock around.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from sapwood.base.errors import WeightError
from sapwood.kernels.blocks import FORMATS
from sapwood.kernels.coded import CodedWeight, LinearPart
from sapwood.kernels.quantized import QuantizedWeight
from sapwood.layers.quantization.formats.fp4 import MX_GROUP
from sapwood.layers.quantization.formats.packing import packed_nibbles
from sapwood.layers.targets import Slice, Target
from sapwood.models.loader.checkpoint import as_dtype
from sapwood.models.loader.gguf_heads import TiledHeads, tiled_heads
from sapwood.models.loader.reading import (
    Advance,
    Stored,
    Wanted,
    empty,
    every,
    ignore,
    read_ahead,
    read_bytes,
    read_columns,
)
from sapwood.store.files import ModelFiles
from sapwood.store.gguf_header import TensorEntry
from sapwood.store.gguf_mixtures import architecture_named

PIECE_NUMBERS = 1 << 17
"""Numbers dequantised by one call of numpy: 512 KiB of fp32."""

SERIAL_NUMBERS = 1 << 15
"""Numbers that torch casts in one thread.

Torch shares larger casts among its threads. If another process keeps one of these off its core, the
others wait for milliseconds, a thousand times per model.
"""

GLOBAL_NAMES: Mapping[str, str] = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_NAMES: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROWS = ("mlp.shared_expert_gate.weight", "mlp.moe_statics.e_score_correction_bias")
"""Ends of names of tensors [1, n]."""
_CONVOLUTIONS = (
    ".shortconv.conv.weight",
    ".ssm_conv1d.weight",
    *(f".ssm_conv1d_{part}.weight" for part in "qkv"),
)
_KEYS, _VALUES = ".attn_k_b.weight", ".attn_v_b.weight"
"""Ends of names of the halves of latent attention's kv_b_proj."""
CONFIGURATION = frozenset(
    {"rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"}
)
"""Tensors that are no weights: store has put them into config.json."""

PLAIN_TYPES: Mapping[str, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
MXFP4 = "MXFP4"
_Bytes = npt.NDArray[np.uint8]
W = TypeVar("W")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """The place of one tensor in its file.

    heads  number of rotary heads whose rows are in llama.cpp's order; 0: rows are in our order
    larger_by  what was added to the tensor when the file was made
    values     the tensor [heads, values, rank] that belongs to this one, [heads, rank, keys], if
               both are halves of kv_b_proj [heads * (keys + values), rank]
    is_rates   whether the file has -exp(x) instead of the tensor x: rates of decay, not their logs
    is_dense   whether the tensor comes as numbers, even where others come as blocks
    tiles      the heads whose rows or columns are in llama.cpp's order; None: there are none such
    row_bytes  from a row to the next in the file, of a tensor that is some columns of a larger one;
               0: its rows lie together
    """

    name: str
    shape: tuple[int, ...]
    type: str
    file: int
    offset: int
    num_bytes: int
    heads: int
    larger_by: float = 0.0
    is_rates: bool = False
    is_dense: bool = False
    values: StoredTensor | None = None
    tiles: TiledHeads | None = None
    row_bytes: int = 0

    @property
    def numbers(self) -> int:
        others = 0 if self.values is None else self.values.numbers
        return math.prod(self.shape) + others


def iterate(
    files: ModelFiles,
    dtype: torch.dtype,
    advance: Advance = ignore,
    wanted: Wanted = every,
    targets: Mapping[str, Target] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """As `weights.iterate_weights`."""
    return read_ahead(
        (
            _lazy(stored, stored.numbers * dtype.itemsize, partial(_read, stored, files, dtype))
            for stored in _own_parts(files, wanted, targets or {})
        ),
        advance=advance,
    )


def iterate_blocks(
    files: ModelFiles,
    dtype: torch.dtype,
    advance: Advance = ignore,
    wanted: Wanted = every,
    targets: Mapping[str, Target] | None = None,
) -> Iterator[tuple[str, torch.Tensor | LinearPart]]:
    """Like `iterate`, but quantised matrices come as blocks (kernels/blocks.py), and those of MXFP4
    as codes (kernels/coded.py)."""
    tensors: list[Stored[torch.Tensor | LinearPart]] = []
    for stored in _own_parts(files, wanted, targets or {}):
        is_blocks = stored.type == MXFP4 or stored.type.lower() in FORMATS
        is_blocks = is_blocks and not stored.is_dense
        if is_blocks and len(stored.shape) == 2 and _can_reorder_blocks(stored):
            tensors.append(_lazy(stored, stored.num_bytes, partial(_read_blocks, stored, files)))
        else:
            size = stored.numbers * dtype.itemsize
            tensors.append(_lazy(stored, size, partial(_read, stored, files, dtype)))
    return read_ahead(tensors, advance=advance)


def each_tensor(
    path: Path, tensors: Sequence[TensorEntry], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor | LinearPart]]:
    """The tensors of a file that has other names than llama.cpp's, under its own ones: matrices
    whose blocks kernels take as these, others dequantised."""
    files = ModelFiles(name=path.name, path=path.parent, weights=(path,), weight_format="gguf")
    for entry in tensors:
        stored = StoredTensor(
            name=entry.name,
            shape=entry.shape,
            type=entry.type,
            file=0,
            offset=entry.offset,
            num_bytes=entry.num_bytes,
            heads=0,
        )
        if entry.type.lower() in FORMATS and len(entry.shape) == 2:
            yield entry.name, _read_blocks(stored, files)
        else:
            yield entry.name, _read(stored, files, dtype)


def _own_parts(
    files: ModelFiles, wanted: Wanted, targets: Mapping[str, Target]
) -> Iterator[StoredTensor]:
    """The wanted tensors; where a rank places some rows or columns of one only, these alone."""
    for stored in stored_tensors(files):
        if not wanted(stored.name):
            continue
        target = targets.get(stored.name)
        part = None
        if target is not None and target.part is not None and stored.shape == target.shape:
            part = _part(stored, target.part)
        yield part or stored


def _part(stored: StoredTensor, own: Slice) -> StoredTensor | None:
    """A part of a tensor; None if it would cut a block or a rotary head, if heads have to be put in
    order first, or if the tensor is no matrix."""
    num_rows, *others = stored.shape
    row_bytes = stored.num_bytes // num_rows
    if stored.values is not None or stored.tiles is not None or len(others) > 1:
        return None
    if own.dim == 0:
        head_size = num_rows // stored.heads if stored.heads else 1
        if own.first % head_size or own.size % head_size:
            return None
        return replace(
            stored,
            shape=(own.size, *others),
            offset=stored.offset + own.first * row_bytes,
            num_bytes=own.size * row_bytes,
            heads=own.size // head_size if stored.heads else 0,
        )
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[stored.type]]
    if own.first % block or own.size % block:
        return None
    return replace(
        stored,
        shape=(num_rows, own.size),
        offset=stored.offset + own.first // block * block_bytes,
        num_bytes=num_rows * own.size // block * block_bytes,
        row_bytes=row_bytes,
    )


def _lazy(stored: StoredTensor, num_bytes: int, read: Callable[[], W]) -> Stored[W]:
    """A tensor that `read` will read; `num_bytes` is the size of the result."""
    return Stored(
        name=stored.name,
        file_bytes=stored.num_bytes + (stored.values.num_bytes if stored.values else 0),
        num_bytes=max(stored.num_bytes, num_bytes),
        read=read,
    )


def _read(stored: StoredTensor, files: ModelFiles, dtype: torch.dtype) -> torch.Tensor:
    found = _tensor(_rows(stored, files), stored, dtype)
    if stored.tiles is not None and not _can_reorder_blocks(stored):
        found = stored.tiles.in_order(found)
    if stored.values is None:
        return found
    halves = (found.transpose(1, 2), _read(stored.values, files, dtype))
    return torch.cat(halves, dim=1).flatten(0, 1)


def _read_blocks(stored: StoredTensor, files: ModelFiles) -> LinearPart:
    num_out, num_in = stored.shape
    if stored.type == MXFP4:
        return _mxfp4(_rows(stored, files), (num_out, num_in))
    return QuantizedWeight(
        stored.type.lower(), (num_out, num_in), _rows(stored, files).view(num_out, -1)
    )


def _can_reorder_blocks(stored: StoredTensor) -> bool:
    """Whether the tensor's bytes can be put in order as they are in the file: not if blocks reach
    from one head into the next."""
    if stored.tiles is None or stored.tiles.dim == 0:
        return True
    block, _ = GGML_QUANT_SIZES[GGMLQuantizationType[stored.type]]
    return stored.tiles.width_of(stored.shape) % block == 0


def _mxfp4(data: torch.Tensor, shape: tuple[int, int]) -> CodedWeight:
    """Blocks of 17 bytes: an exponent of 2, then codes of inputs 0 to 15 in the low halves and of
    16 to 31 in the high ones."""
    num_out, num_in = shape
    blocks = data.view(num_out, -1, 1 + MX_GROUP // 2)
    pairs = blocks[..., 1:]
    codes = packed_nibbles(torch.cat((pairs & 15, pairs >> 4), dim=-1).view(num_out, num_in))
    scales = blocks[..., 0].contiguous().view(torch.float8_e8m0fnu).float()
    return CodedWeight("fp4", shape, codes, scales, MX_GROUP)


def hf_name(name: str, own: Mapping[str, str], layers: str = "model.layers") -> str | None:
    """Hugging Face's name of a GGUF tensor; None if no decoder of ours has such a tensor.

    A tensor of all experts has a name with "{}" for the number of one.

    own     the architecture's names that differ from those of most (`Architecture.names`): of parts
            of layers, or of such a part's "<part>.<kind>"
    layers  its name of all layers
    """
    whole, _, kind = name.rpartition(".")
    if whole in GLOBAL_NAMES or whole in own:
        return f"{own.get(whole) or GLOBAL_NAMES[whole]}.{kind}"
    prefix, _, rest = name.partition(".")
    layer, _, whole_part = rest.partition(".")
    part, _, kind = whole_part.rpartition(".")
    names = {**LAYER_NAMES, **own}
    if prefix != "blk" or not layer.isdigit():
        return None
    if whole_part in names:
        return f"{layers}.{layer}.{names[whole_part]}"
    # Files of before April 2024 have each expert's tensors apart: ffn_gate.3.
    layer_of_expert, _, expert = part.partition(".")
    if expert.isdigit() and f"{layer_of_expert}_exps" in names:
        own_name = names[f"{layer_of_expert}_exps"].format(expert)
        return f"{layers}.{layer}.{own_name}.{kind}"
    return f"{layers}.{layer}.{names[part]}.{kind}" if part in names else None


def stored_tensors(files: ModelFiles) -> Iterator[StoredTensor]:
    """The places of all weights in the files; WeightError if sapwood knows no place for one."""
    path = files.path / "tensors.json"
    try:
        table = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise WeightError(
            f"{path} cannot be read ({error}); remove {files.path} to have it made again"
        ) from error
    architecture = architecture_named(table["architecture"], has_experts=table["has_experts"])
    assert architecture is not None, "store refuses others"
    by_name = {row["name"]: row for row in table["tensors"]}
    for row in table["tensors"]:
        if "hf_name" in row:  # of a tower
            yield StoredTensor(
                name=row["hf_name"],
                shape=tuple(row["shape"]),
                type=row["type"],
                file=row["file"],
                offset=row["offset"],
                num_bytes=row["num_bytes"],
                heads=0,
                larger_by=row["larger_by"],
                is_dense=True,
            )
            continue
        half = row["name"].removesuffix(_VALUES)
        if row["name"] in CONFIGURATION or (half != row["name"] and half + _KEYS in by_name):
            continue
        half = row["name"].removesuffix(_KEYS)
        if half + _VALUES in by_name:
            yield _joined(row, by_name[half + _VALUES], f"{architecture.layers}.{half[4:]}")
            continue
        name = hf_name(row["name"], architecture.names, architecture.layers)
        if name is None:
            raise WeightError(
                f"{files.name} has a tensor {row['name']}, which sapwood knows no place for in "
                f"architecture {table['architecture']}; serve a safetensors version of the model"
            )
        stored = StoredTensor(
            name=name,
            shape=_shape(name, row),
            type=row["type"],
            file=row["file"],
            offset=row["offset"],
            num_bytes=row["num_bytes"],
            heads=_rotary_heads(row, table),
            larger_by=1.0 if architecture.adds_one and _is_plain_norm(row["name"]) else 0.0,
            is_rates=name.endswith(".A_log"),
            tiles=tiled_heads(row, table["tiled_heads"]),
        )
        if "{}" in name:
            yield from _each_expert(stored)
        else:
            yield stored


def _is_plain_norm(name: str) -> bool:
    """Whether a tensor, named as in the file, is a norm's weight, but not a gated norm's."""
    return name.endswith("norm.weight") and not name.endswith(".ssm_norm.weight")


def _joined(keys: Mapping[str, Any], values: Mapping[str, Any], layer: str) -> StoredTensor:
    """kv_b_proj of a layer, which newer files have in two halves."""
    name = f"{layer}.self_attn.kv_b_proj.weight"
    places = ("type", "file", "offset", "num_bytes")
    halves = []
    for row in (keys, values):
        if len(row["shape"]) != 3:
            raise WeightError(f"{row['name']} must have three dimensions, got {row['shape']}")
        place = {field: row[field] for field in places}
        halves.append(StoredTensor(name=name, shape=tuple(row["shape"]), heads=0, **place))
    of_keys, of_values = halves
    if (of_keys.shape[0], of_keys.shape[1]) != (of_values.shape[0], of_values.shape[2]):
        raise WeightError(
            f"{keys['name']} {list(of_keys.shape)} and {values['name']} {list(of_values.shape)} "
            "are not halves of one matrix"
        )
    return replace(of_keys, values=of_values)


def _each_expert(stored: StoredTensor) -> Iterator[StoredTensor]:
    """The tensors of each expert, which lie one after another in a tensor [experts, …]."""
    num_experts, *shape = stored.shape
    num_bytes = stored.num_bytes // num_experts
    for expert in range(num_experts):
        yield replace(
            stored,
            name=stored.name.format(expert),
            shape=tuple(shape),
            offset=stored.offset + expert * num_bytes,
            num_bytes=num_bytes,
        )


def _shape(name: str, row: Mapping[str, Any]) -> tuple[int, ...]:
    """As Hugging Face's file has it: that of a convolution [channels, 1, length]. Files lack
    dimensions of 1 there, or have more of them, and have one where a rate per head is [heads, 1];
    norms of groups are [groups, size]. Kimi's rates are [1, 1, heads, 1]."""
    shape = tuple(row["shape"])
    if len(shape) == 1 and name.endswith(_ROWS):
        return (1, *shape)
    if row["name"].endswith(_CONVOLUTIONS) and len(shape) > 1:
        return (math.prod(shape[:-1]), 1, shape[-1])
    if name.endswith(".self_attn.A_log"):
        return (1, 1, math.prod(shape), 1)
    if row["name"].endswith((".ssm_norm.weight", ".ssm_d")):
        return (math.prod(shape),)
    if row["name"].endswith(".ssm_a") and len(shape) > 1 and shape[-1] == 1:
        return shape[:-1]
    return shape


def _rotary_heads(row: Mapping[str, Any], table: Mapping[str, Any]) -> int:
    """How many heads of a tensor have llama.cpp's order of pairs; 0 for most tensors."""
    part = row["name"].split(".", 2)[-1].rpartition(".")[0]
    is_rotated = table["permuted"] and part in ("attn_q", "attn_k")
    return int(row["shape"][0]) // int(table["head_dim"]) if is_rotated else 0


def _rows(stored: StoredTensor, files: ModelFiles) -> torch.Tensor:
    """The tensor's bytes, rows in Hugging Face's order: [num_bytes] uint8.

    llama.cpp stores the two halves of each rotary head interleaved. Rows of a quantised matrix are
    independent, so they are put back in order while they are still small.
    """
    path = files.weights[stored.file]
    if stored.row_bytes:
        data = read_columns(
            path,
            stored.offset,
            num_rows=stored.shape[0],
            row_bytes=stored.row_bytes,
            first=0,
            num_bytes=stored.num_bytes // stored.shape[0],
        )
    else:
        data = read_bytes(path, stored.offset, stored.num_bytes)
    num_rows = stored.shape[0]
    if stored.tiles is not None and _can_reorder_blocks(stored):
        return stored.tiles.in_order(data.view(num_rows, -1)).reshape(-1)
    if not stored.heads:
        return data
    if num_rows % (2 * stored.heads):
        raise WeightError(f"{stored.name} has {num_rows} rows for {stored.heads} rotary heads")
    interleaved = data.view(stored.heads, num_rows // stored.heads // 2, 2, -1)
    return interleaved.transpose(1, 2).reshape(-1)


def _tensor(data: torch.Tensor, stored: StoredTensor, dtype: torch.dtype) -> torch.Tensor:
    if stored.larger_by:
        return as_dtype(
            _tensor(data, replace(stored, larger_by=0.0), torch.float32) - stored.larger_by, dtype
        )
    if stored.is_rates:  # in fp32 whatever the computation's type: logs of rates are few
        rates = _tensor(data, replace(stored, is_rates=False), torch.float32)
        if not bool((rates < 0.0).all()):
            raise WeightError(f"{stored.name} must be made of negative numbers alone")
        return (-rates).log()
    if stored.type in PLAIN_TYPES:
        return as_dtype(data.view(PLAIN_TYPES[stored.type]).view(stored.shape), dtype)
    tensor = empty(stored.shape, dtype)
    _dequantize(data.numpy(), GGMLQuantizationType[stored.type], tensor.view(-1))
    return tensor


def _dequantize(data: _Bytes, kind: GGMLQuantizationType, out: torch.Tensor) -> None:
    """Bytes of whole quantisation groups -> `out` [num_numbers], of any floating-point dtype.

    gguf works on a few rows at a time; given as rows of PIECE_NUMBERS, whatever the matrix's own
    width, a narrow matrix takes an eighth of the time.
    """
    numbers, num_bytes = GGML_QUANT_SIZES[kind]
    step = PIECE_NUMBERS // numbers * num_bytes
    for piece, start in enumerate(range(0, len(data), step)):
        values = dequantize(data[start : start + step].reshape(1, -1), kind).reshape(-1)
        first = piece * PIECE_NUMBERS
        targets = torch.split(out[first : first + len(values)], SERIAL_NUMBERS)
        sources = torch.split(torch.from_numpy(values), SERIAL_NUMBERS)
        for cast_to, cast_from in zip(targets, sources, strict=True):
            cast_to.copy_(cast_from)
