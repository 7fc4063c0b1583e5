"""How a converted layer is stored in a checkpoint and described in config.json.

Sources: compressed-tensors, https://github.com/vllm-project/compressed-tensors; AWQ and GPTQ as
AutoAWQ and GPTQModel write them, bitsandbytes as it writes its state: see layers/quantization/
formats, which reads them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sapwood.convert.rounding import Grid, nf4_indices, nf4_values
from sapwood.convert.scheme import BLOCK, PACKED_BITS, WeightScheme
from sapwood.layers.quantization.formats.awq import PLACES
from sapwood.layers.quantization.formats.bitsandbytes import NF4_STATE


def stored_tensors(codes: Tensor, grid: Grid, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one layer in a checkpoint: "weight" or "weight_packed", "weight_scale", …

    codes  [out, in] fp32
    dtype  dtype that readers give to weights if they dequantise them
    """
    match grid.scheme.layout:
        case "awq":
            return _awq(codes, grid)
        case "gptq":
            return _gptq(codes, grid)
        case "bitsandbytes" if grid.scheme.numbers == "nf4":
            return _nf4(codes, grid, dtype)
        case "bitsandbytes":
            return {
                "weight": codes.to(torch.int8),
                "SCB": grid.scale[:, 0] * 127.0,
                "weight_format": torch.tensor(0, dtype=torch.uint8),
            }
        case _:
            return _compressed(codes, grid)


def num_bytes(scheme: WeightScheme, shape: tuple[int, int], dtype: torch.dtype) -> int:
    """Bytes of a weight with that shape on disk; `dtype` is the checkpoint's."""
    num_rows, num_columns = shape
    weights = -(-num_columns * scheme.num_bits // PACKED_BITS) * (PACKED_BITS // 8) * num_rows
    scales = math.prod(scheme.scale_shape(shape))
    zeros = scales * scheme.num_bits // 8
    match scheme.layout:
        case "awq":
            return weights + scales * 2 + zeros
        case "gptq":
            return weights + scales * 2 + zeros + num_columns * 4
        case "bitsandbytes" if scheme.numbers == "nf4":
            return weights + scales * 4 + 16 * 4 + len(_nf4_state(shape, scheme, dtype))
        case "bitsandbytes":
            return weights + scales * 4 + 1
    if scheme.is_e2m1:
        return weights + scales + (4 if scheme.strategy == "tensor_group" else 0)
    noted_shape = 16 if compressed_format(scheme) == "pack-quantized" else 0
    return weights + scales * dtype.itemsize + (0 if scheme.symmetric else zeros) + noted_shape


def quantization_config(
    scheme: WeightScheme, ignore: Sequence[str], *, act_order: bool, dtype: torch.dtype
) -> dict[str, Any]:
    """The entry "quantization_config" of config.json.

    ignore     names of linear layers that are not converted
    act_order  whether gptq rounded inputs in the order of activations; readers need not know that,
               because scales stay in place
    dtype      dtype of the checkpoint
    """
    groups = {"bits": scheme.num_bits, "group_size": scheme.group_size}
    match scheme.layout:
        case "awq":
            return {
                "quant_method": "awq",
                **groups,
                "zero_point": True,
                "version": "gemm",
                "modules_to_not_convert": list(ignore),
            }
        case "gptq":
            # The output layer has a field; other layers are excluded by regular expressions.
            others: dict[str, Any] = {
                f"-:^{re.escape(name)}$": {} for name in ignore if name != "lm_head"
            }
            return {
                "quant_method": "gptq",
                **groups,
                "desc_act": False,
                "sym": scheme.symmetric,
                "checkpoint_format": "gptq",
                "pack_dtype": "int32",
                "lm_head": False,
                **({"dynamic": others} if others else {}),
            }
        case "bitsandbytes":
            is_nf4 = scheme.numbers == "nf4"
            nf4 = {
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": False,
                "bnb_4bit_compute_dtype": _name(dtype),
                "bnb_4bit_quant_storage": "uint8",
            }
            return {
                "quant_method": "bitsandbytes",
                "load_in_4bit": is_nf4,
                "load_in_8bit": not is_nf4,
                **(nf4 if is_nf4 else {"llm_int8_threshold": 6.0}),
                "llm_int8_skip_modules": list(ignore),
            }
        case _:
            return _compressed_config(scheme, ignore, act_order=act_order)


def compressed_format(scheme: WeightScheme) -> str:
    """compressed-tensors' name of the layout."""
    if scheme.is_e2m1:
        return f"{'nv' if scheme.strategy == 'tensor_group' else 'mx'}fp4-pack-quantized"
    if scheme.is_float:
        return "float-quantized"
    return "int-quantized" if scheme.rounds_activations else "pack-quantized"


def pack(numbers: Tensor, num_bits: int) -> Tensor:
    """numbers [rows, n] int32 from 0 on, whole words of them -> [rows, n * num_bits / 32] int32,
    the first in a word's lowest bits."""
    per_word = PACKED_BITS // num_bits
    words = numbers.view(numbers.shape[0], -1, per_word)
    shifts = torch.arange(per_word, device=numbers.device, dtype=torch.int32) * num_bits
    # Numbers share no bits, so their sum is their union.
    return (words << shifts).sum(dim=2, dtype=torch.int32)


def pack_e2m1(codes: Tensor) -> Tensor:
    """codes [rows, n] fp32, numbers of E2M1 -> [rows, n / 2] uint8, the first in the lower half."""
    # Twice the size is 0, 1, 2, 3, 4, 6, 8 or 12, of which each power of two has two.
    places = torch.zeros(13, dtype=torch.uint8, device=codes.device)
    places[[0, 1, 2, 3, 4, 6, 8, 12]] = torch.arange(8, dtype=torch.uint8, device=codes.device)
    halves = places[(codes.abs() * 2).long()] + 8 * (codes < 0).to(torch.uint8)
    return halves[:, ::2] + 16 * halves[:, 1::2]


def _from_zero(codes: Tensor, scheme: WeightScheme) -> Tensor:
    """Whole codes, int32, the lowest as 0."""
    return codes.to(torch.int32) - int(scheme.lowest)


def _zeros_from_zero(grid: Grid) -> Tensor:
    """Zero points [groups, out] int32; without any, the middle of the codes."""
    zero = torch.zeros_like(grid.scale) if grid.zero is None else grid.zero
    return _from_zero(zero, grid.scheme).t().contiguous()


def _awq(codes: Tensor, grid: Grid) -> dict[str, Tensor]:
    """qweight [in, out / 8], qzeros [groups, out / 8], scales [groups, out]."""
    of_nibble = [PLACES.index(nibble) for nibble in range(len(PLACES))]

    def words(numbers: Tensor) -> Tensor:
        interleaved = numbers.view(numbers.shape[0], -1, len(PLACES))[:, :, of_nibble]
        return pack(interleaved.flatten(1), grid.scheme.num_bits)

    return {
        "qweight": words(_from_zero(codes, grid.scheme).t().contiguous()),
        "qzeros": words(_zeros_from_zero(grid)),
        "scales": grid.scales.stored(grid.scale.t().contiguous()),
    }


def _gptq(codes: Tensor, grid: Grid) -> dict[str, Tensor]:
    """qweight [in * bits / 32, out], qzeros [groups, out * bits / 32], scales [groups, out], g_idx
    [in]; zero points less one."""
    num_bits = grid.scheme.num_bits
    return {
        "qweight": pack(_from_zero(codes, grid.scheme), num_bits).t().contiguous(),
        "qzeros": pack(_zeros_from_zero(grid) - 1, num_bits),
        "scales": grid.scales.stored(grid.scale.t().contiguous()),
        "g_idx": grid.group_of(codes.shape[1]).to(torch.int32),
    }


def _nf4(codes: Tensor, grid: Grid, dtype: torch.dtype) -> dict[str, Tensor]:
    """weight [out * in / 2, 1] uint8, the earlier number in the high half."""
    indices = nf4_indices(codes).to(torch.uint8)
    state = _nf4_state((codes.shape[0], codes.shape[1]), grid.scheme, dtype)
    return {
        "weight": (16 * indices[:, ::2] + indices[:, 1::2]).reshape(-1, 1),
        "weight.absmax": grid.scale.flatten(),
        "weight.quant_map": nf4_values(codes.device).clone(),
        NF4_STATE: torch.tensor(list(state), dtype=torch.uint8),
    }


def _nf4_state(shape: tuple[int, int], scheme: WeightScheme, dtype: torch.dtype) -> bytes:
    state = {
        "quant_type": "nf4",
        "blocksize": scheme.group_size,
        "dtype": _name(dtype),
        "shape": list(shape),
    }
    return json.dumps(state).encode()


def _compressed(codes: Tensor, grid: Grid) -> dict[str, Tensor]:
    scheme = grid.scheme
    scale = grid.scale[::BLOCK] if scheme.strategy == "block" else grid.scale
    scales = {"weight_scale": grid.scales.stored(scale).contiguous()}
    if scheme.is_e2m1:
        if scheme.strategy == "tensor_group":
            scales["weight_global_scale"] = torch.tensor([grid.scales.factor])
        else:
            scales["weight_scale"] = scales["weight_scale"].view(torch.uint8)
        return {"weight_packed": pack_e2m1(codes), **scales}
    if scheme.is_float:
        return {"weight": codes.to(torch.float8_e4m3fn), **scales}
    if scheme.rounds_activations:
        return {"weight": codes.to(torch.int8), **scales}
    found = {
        "weight_packed": pack(_from_zero(codes, scheme), scheme.num_bits),
        **scales,
        "weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
    }
    if grid.zero is not None:
        packed = pack(_zeros_from_zero(grid), scheme.num_bits)
        found["weight_zero_point"] = packed.t().contiguous()
    return found


def _compressed_config(
    scheme: WeightScheme, ignore: Sequence[str], *, act_order: bool
) -> dict[str, Any]:
    """The config of compressed-tensors: one group with all Linear layers but the ignored ones.

    It says how weights are stored, and how inputs are rounded.
    """
    weights: dict[str, Any] = {
        "num_bits": scheme.num_bits,
        "type": "float" if scheme.is_float else "int",
        "symmetric": scheme.symmetric,
        "strategy": scheme.strategy,
        "dynamic": False,
    }
    if scheme.strategy in ("group", "tensor_group"):
        weights["group_size"] = scheme.group_size
    if scheme.strategy == "block":
        weights["block_structure"] = [BLOCK, BLOCK]
    if scheme.is_e2m1:
        scales = "float8_e4m3fn" if scheme.strategy == "tensor_group" else "uint8"
        weights |= {"scale_dtype": f"torch.{scales}", "zp_dtype": f"torch.{scales}"}
    if act_order:
        weights["actorder"] = "weight"
    return {
        "quant_method": "compressed-tensors",
        "format": compressed_format(scheme),
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": _activations(scheme),
                "output_activations": None,
                "format": compressed_format(scheme),
            }
        },
        "ignore": list(ignore),
        "kv_cache_scheme": None,
    }


def _activations(scheme: WeightScheme) -> dict[str, Any] | None:
    if not scheme.rounds_activations:
        return None
    found: dict[str, Any] = {
        "num_bits": 8,
        "type": "float" if scheme.is_float else "int",
        "symmetric": True,
        "strategy": "group" if scheme.strategy == "block" else "token",
        "dynamic": True,
    }
    if scheme.strategy == "block":
        found["group_size"] = BLOCK
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
