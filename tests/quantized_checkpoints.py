"""Layers in the formats of other tools, made by those tools or by the formats' own rules.

Each maker turns a weight [out, in] into the tensors that the format stores, and the weight that
they stand for, worked out apart from what sapwood does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Made = tuple[dict[str, Tensor], Tensor]
Maker = Callable[[Tensor], Made]


@dataclass(frozen=True)
class Case:
    """config: quantization_config of config.json; make: of every linear layer but lm_head."""

    config: Mapping[str, Any]
    make: Maker


def packed(numbers: np.ndarray, bits: int) -> Tensor:
    """[rows, n] whole numbers -> [rows, n * bits / 32] int32, the first in the lowest bits."""
    per_word = 32 // bits
    words = np.zeros((numbers.shape[0], numbers.shape[1] // per_word), dtype=np.uint32)
    for place in range(per_word):
        words |= numbers[:, place::per_word].astype(np.uint32) << np.uint32(bits * place)
    return torch.from_numpy(words.view(np.int32))


def in_groups(weight: Tensor, group: int, levels: int, symmetric: bool) -> tuple[np.ndarray, ...]:
    """Scales and zero points [out, groups], numbers [out, in]; scales are what fp16 holds."""
    blocks = weight.double().reshape(weight.shape[0], -1, group).numpy()
    low, high = blocks.min(2).clip(max=0), blocks.max(2).clip(min=0)
    if symmetric:
        high = np.maximum(-low, high)
        scales = (2 * high / levels).astype(np.float16).astype(np.float64)
        zeros = np.full(scales.shape, (levels + 1) // 2)
    else:
        scales = ((high - low) / levels).astype(np.float16).astype(np.float64)
        zeros = (-low / scales).round().astype(np.int64).clip(0, levels)
    numbers = (blocks / scales[..., None]).round() + zeros[..., None]
    return scales, zeros, numbers.clip(0, levels).astype(np.int64).reshape(weight.shape)


def dequantised(scales: np.ndarray, zeros: np.ndarray, numbers: np.ndarray, group: int) -> Tensor:
    wide = [np.repeat(one, group, axis=1) for one in (scales, zeros)]
    return torch.from_numpy((numbers - wide[1]) * wide[0])


def make_awq(group: int, symmetric: bool = False) -> Maker:
    def make(weight: Tensor) -> Made:
        scales, zeros, numbers = in_groups(weight, group, 15, symmetric)
        order = [0, 2, 4, 6, 1, 3, 5, 7]

        def words(of_input: np.ndarray) -> Tensor:
            return packed(of_input.reshape(-1, of_input.shape[1] // 8, 8)[:, :, order]
                          .reshape(of_input.shape), 4)  # fmt: skip

        tensors = {
            "qweight": words(numbers.T),
            "qzeros": words(zeros.T),
            "scales": torch.from_numpy(scales.T.astype(np.float16)),
        }
        return tensors, dequantised(scales, zeros, numbers, group)

    return make


def make_gptq(
    bits: int, group: int, *, symmetric: bool = True, act_order: bool = False, v2: bool = False
) -> Maker:
    def make(weight: Tensor) -> Made:
        num_in = weight.shape[1]
        size = num_in if group == -1 else group
        order = np.arange(num_in)
        if act_order:
            order = np.random.default_rng(num_in).permutation(num_in)
        scales, zeros, numbers = in_groups(weight[:, order], size, 2**bits - 1, symmetric)
        if not v2:
            zeros = zeros.clip(min=1)  # what is stored is one less
        index = np.empty(num_in, dtype=np.int32)
        index[order] = np.arange(num_in) // size
        original = np.empty_like(numbers)
        original[:, order] = numbers
        tensors = {
            "qweight": packed(original, bits).T.contiguous(),
            "qzeros": packed(zeros.T - (0 if v2 else 1), bits),
            "scales": torch.from_numpy(scales.T.astype(np.float16)),
            "g_idx": torch.from_numpy(index),
        }
        return tensors, torch.from_numpy(scales[:, index] * (original - zeros[:, index]))

    return make


def make_fp8(kind: str, name: str = "weight_scale") -> Maker:
    def make(weight: Tensor) -> Made:
        rows, columns = {"tensor": weight.shape, "channel": (1, weight.shape[1])}.get(
            kind, (64, 32)
        )
        blocks = (
            torch.nn.functional.pad(
                weight, (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows)
            )
            .unfold(0, rows, rows)
            .unfold(1, columns, columns)
        )
        scales = blocks.abs().amax((2, 3)) / 448.0
        wide = scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        wide = wide[: weight.shape[0], : weight.shape[1]]
        numbers = (weight / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors = {"weight": numbers, name: scales.reshape(()) if kind == "tensor" else scales}
        if kind != "block":
            tensors["input_scale"] = torch.tensor(0.5)
        return tensors, numbers.double() * wide.double()

    return make


def make_nf4(double: bool, block: int = 64) -> Maker:
    def make(weight: Tensor) -> Made:
        from bitsandbytes import functional

        numbers, state = functional.quantize_4bit(
            weight.float().contiguous(), blocksize=block, quant_type="nf4",
            compress_statistics=double,
        )  # fmt: skip
        tensors = {"weight": numbers}
        tensors |= {f"weight.{name}": one for name, one in state.as_dict(packed=True).items()}
        return tensors, functional.dequantize_4bit(numbers, state).double()

    return make


def make_bnb_int8(weight: Tensor) -> Made:
    largest = weight.abs().amax(1)
    numbers = (weight / largest[:, None] * 127).round().to(torch.int8)
    tensors = {
        "weight": numbers,
        "SCB": largest,
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return tensors, numbers.double() * largest.double()[:, None] / 127


def make_modelopt_nvfp4(weight: Tensor) -> Made:
    tensors, exact = make_compressed("nvfp4-pack-quantized", NVFP4)(weight)
    return {
        "weight": tensors["weight_packed"],
        "weight_scale": tensors["weight_scale"],
        "weight_scale_2": (1 / tensors["weight_global_scale"]).reshape(()),
        "input_scale": torch.tensor(1.0),
    }, exact


def make_mxfp4(weight: Tensor) -> Made:
    tensors, exact = make_compressed("mxfp4-pack-quantized", MXFP4)(weight)
    codes = tensors["weight_packed"]
    blocks = codes.reshape(codes.shape[0], -1, 16)
    return {"weight_blocks": blocks, "weight_scales": tensors["weight_scale"]}, exact


def make_compressed(form: str, weights: Mapping[str, Any]) -> Maker:
    """By the compressed-tensors library, which also says what the tensors stand for."""

    def make(weight: Tensor) -> Made:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from compressed_tensors.quantization.utils import calculate_qparams

        args = QuantizationArgs(**weights)
        scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)
        num_out, num_in = weight.shape
        state = {"weight": weight.float()}
        group = args.group_size if args.group_size not in (None, -1) else num_in
        if args.strategy == "block":
            rows, columns = args.block_structure
            blocks = weight.unfold(0, rows, rows).unfold(1, columns, columns).flatten(2)
        elif args.strategy == "tensor":
            blocks = weight.reshape(1, 1, -1)
        else:
            blocks = weight.reshape(num_out, num_in // group, group)
        extra = {}
        if form.startswith("nvfp4"):
            extra["global_scale"] = state["weight_global_scale"] = (
                448.0 * 6.0 / weight.abs().max()
            ).reshape(1)
        scale, zero = calculate_qparams(blocks.amin(2), blocks.amax(2), args, **extra)
        state["weight_scale"] = scale.reshape(1) if args.strategy == "tensor" else scale
        if not args.symmetric:
            state["weight_zero_point"] = zero
        compressor = BaseCompressor.get_value_from_registry(form)
        stored = compressor.compress(state, scheme)
        if form.endswith("fp4-pack-quantized"):
            exact = four_bit_floats(stored, num_in)  # the library's are rounded to bfloat16
        else:
            exact = compressor.decompress(stored, scheme)["weight"]
        return {name: one.contiguous() for name, one in stored.items()}, exact.double()

    return make


def four_bit_floats(stored: Mapping[str, Tensor], num_in: int) -> Tensor:
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

    codes, scale = stored["weight_packed"], stored["weight_scale"]
    numbers = unpack_fp4_from_uint8(codes, codes.shape[0], num_in, dtype=torch.float32).double()
    if scale.dtype == torch.uint8:
        scales = torch.exp2(scale.double() - 127)
    else:
        scales = scale.double() / stored["weight_global_scale"].double()
    return numbers * scales.repeat_interleave(num_in // scale.shape[1], dim=1)


def make_act_order(weight: Tensor) -> Made:
    """pack-quantized with weight_g_idx, which llm-compressor wrote until 2026."""
    stored, exact = make_gptq(4, 32, act_order=True, v2=True)(weight)
    rows = stored["qweight"].T.contiguous()
    return {
        "weight_packed": rows,
        "weight_scale": stored["scales"].T.contiguous(),
        "weight_shape": torch.tensor(weight.shape),
        "weight_g_idx": stored["g_idx"],
    }, exact


def int_args(bits: int, strategy: str, group: int | None = None, **more: Any) -> dict[str, Any]:
    return {
        "num_bits": bits, "type": "int", "symmetric": True, "strategy": strategy,
        "group_size": group, **more,
    }  # fmt: skip


FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
NVFP4 = {
    "num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16,
    "scale_dtype": torch.float8_e4m3fn, "zp_dtype": torch.float8_e4m3fn,
}  # fmt: skip
MXFP4 = {
    "num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32,
    "scale_dtype": torch.uint8, "zp_dtype": torch.uint8,
}  # fmt: skip
DYNAMIC_INT8 = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "strategy": "token",
    "dynamic": True,
}


def compressed(
    form: str, weights: Mapping[str, Any], activations: Mapping[str, Any] | None = None
) -> Case:
    stated = {name: value for name, value in weights.items() if not name.endswith("_dtype")}
    config = {
        "quant_method": "compressed-tensors",
        "format": form,
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"], "weights": stated, "input_activations": activations,
            }
        },
    }  # fmt: skip
    return Case(config, make_compressed(form, weights))


def gptq(bits: int, group: int, **how: bool) -> Case:
    config = {
        "quant_method": "gptq", "bits": bits, "group_size": group,
        "desc_act": how.get("act_order", False), "sym": how.get("symmetric", True),
        "checkpoint_format": "gptq_v2" if how.get("v2") else "gptq",
    }  # fmt: skip
    return Case(config, make_gptq(bits, group, **how))


def awq(group: int) -> Case:
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True}
    return Case(config, make_awq(group))


def bnb(bits: int, make: Maker) -> Case:
    config = {
        "quant_method": "bitsandbytes", f"load_in_{bits}bit": True, "bnb_4bit_quant_type": "nf4",
    }  # fmt: skip
    return Case(config, make)


CASES: dict[str, Case] = {
    "awq, groups of 32": awq(32),
    "awq, groups of 64": awq(64),
    "gptq 4, groups of 32": gptq(4, 32),
    "gptq 4, one group": gptq(4, -1),
    "gptq 4, act-order, zero points": gptq(4, 64, act_order=True, symmetric=False),
    "gptq 8, groups of 32, zero points": gptq(8, 32, symmetric=False),
    "gptq 8, v2, zero points": gptq(8, 64, symmetric=False, v2=True),
    "gptq 4, v2, zero points": gptq(4, 32, symmetric=False, v2=True),
    "fp8 per tensor": Case(
        {"quant_method": "fp8", "activation_scheme": "static"}, make_fp8("tensor")
    ),
    "fp8 per output": Case({"quant_method": "fbgemm_fp8"}, make_fp8("channel")),
    "fp8 blocks": Case(
        {"quant_method": "fp8", "weight_block_size": [64, 32]},
        make_fp8("block", "weight_scale_inv"),
    ),
    "nf4": bnb(4, make_nf4(False)),
    "nf4, double": bnb(4, make_nf4(True)),
    "int8 rows": bnb(8, make_bnb_int8),
    "modelopt fp8": Case({"quant_method": "modelopt", "quant_algo": "FP8"}, make_fp8("tensor")),
    "modelopt nvfp4": Case(
        {"quant_method": "modelopt", "quant_algo": "NVFP4"}, make_modelopt_nvfp4
    ),
    "mxfp4 blocks": Case({"quant_method": "mxfp4"}, make_mxfp4),
    "w4a16": compressed("pack-quantized", int_args(4, "group", 32)),
    "w4a16, zero points": compressed("pack-quantized", int_args(4, "group", 64, symmetric=False)),
    "w4a16, per output": compressed("pack-quantized", int_args(4, "channel")),
    "w4a16, act-order": Case(
        compressed("pack-quantized", int_args(4, "group", 32, actorder="group")).config,
        make_act_order,
    ),
    "w8a16": compressed("pack-quantized", int_args(8, "channel")),
    "w8a16, zero points": compressed("pack-quantized", int_args(8, "group", 32, symmetric=False)),
    "int8": compressed("int-quantized", int_args(8, "channel")),
    "int8, zero points": compressed("int-quantized", int_args(8, "channel", symmetric=False)),
    "w8a8": compressed("int-quantized", int_args(8, "channel"), DYNAMIC_INT8),
    "w8a8, per tensor": compressed("int-quantized", int_args(8, "tensor"), DYNAMIC_INT8),
    "fp8, compressed": compressed("float-quantized", FP8),
    "fp8 per tensor, compressed": compressed("float-quantized", FP8 | {"strategy": "tensor"}),
    "fp8 blocks, compressed": compressed(
        "float-quantized", FP8 | {"strategy": "block", "block_structure": [32, 32]}
    ),
    "nvfp4": compressed("nvfp4-pack-quantized", NVFP4),
    "mxfp4": compressed("mxfp4-pack-quantized", MXFP4),
}
ROUNDS_ACTIVATIONS = ("w8a8", "w8a8, per tensor")
"""Cases whose products round x to int8."""


def linear_weights(weights: Mapping[str, Tensor]) -> list[str]:
    """Modules whose weights a tool quantises: all linear layers but the output layer."""
    return [
        name.removesuffix(".weight")
        for name, one in weights.items()
        if one.ndim == 2 and "embed_tokens" not in name and "lm_head" not in name
    ]


def quantised(
    weights: Mapping[str, Tensor], make: Callable[[str], Maker]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A checkpoint's tensors, and the model's weights as they stand for them in fp32."""
    stored, exact = dict(weights), dict(weights)
    for module in linear_weights(weights):
        weight = stored.pop(f"{module}.weight")
        tensors, whole = make(module)(weight)
        stored |= {f"{module}.{name}": one for name, one in tensors.items()}
        exact[f"{module}.weight"] = whole.float()
    return stored, exact
