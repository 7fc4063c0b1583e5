"""Weights in E2M1, two to a byte: MXFP4 and NVFP4, as several tools store them.

Source: OCP Microscaling Formats v1.0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sapwood.kernels.coded import CodedWeight
from sapwood.layers.quantization.formats.interface import LinearTensors

MX_GROUP, NV_GROUP = 32, 16
_E8M0 = (torch.uint8, torch.float8_e8m0fnu)


def nvfp4_weight(
    tensors: LinearTensors, packed: str, global_scale: str, *, divides: bool
) -> CodedWeight:
    """packed [out, in / 2] uint8, weight_scale [out, in / 16] E4M3, a scale of the whole tensor.

    divides  whether weights are divided by the tensor's scale, instead of multiplied
    """
    num_out, num_in = tensors.shape
    codes = tensors.take(packed, [(num_out, num_in // 2)], [torch.uint8])
    blocks = tensors.take(
        "weight_scale", [(num_out, -(-num_in // NV_GROUP))], [torch.float8_e4m3fn]
    )
    whole = tensors.take(global_scale, [(), (1,), (1, 1)], [torch.float32]).reshape(())
    out_scales = (1 / whole if divides else whole).expand(num_out).contiguous()
    return CodedWeight("fp4", tensors.shape, codes, blocks.float(), NV_GROUP, out_scales=out_scales)


def mxfp4_weight(tensors: LinearTensors, codes: Tensor, scale: str) -> CodedWeight:
    """codes [out, in / 2] uint8, scales [out, in / 32]: exponents of 2, plus 127."""
    num_out, num_in = tensors.shape
    exponents = tensors.take(scale, [(num_out, -(-num_in // MX_GROUP))], _E8M0).view(torch.uint8)
    scales = exponents.view(torch.float8_e8m0fnu).float()
    return CodedWeight("fp4", tensors.shape, codes, scales, MX_GROUP)
