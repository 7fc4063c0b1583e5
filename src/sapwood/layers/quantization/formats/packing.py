"""Numbers of a few bits that tools pack into 32-bit words."""

from __future__ import annotations

import torch
from torch import Tensor


def unpacked(words: Tensor, bits: int) -> Tensor:
    """words [rows, n] int32 -> [rows, n * 32 / bits] uint8, those of the lowest bits first.

    bits  4 or 8
    """
    as_bytes = words.contiguous().view(torch.uint8)
    return as_bytes if bits == 8 else nibbles(as_bytes)


def nibbles(as_bytes: Tensor) -> Tensor:
    """[rows, n] uint8 -> [rows, 2 n] uint8, the low half of a byte first."""
    return torch.stack((as_bytes & 15, as_bytes >> 4), dim=-1).flatten(1)


def packed_nibbles(codes: Tensor) -> Tensor:
    """[rows, n] uint8 below 16 -> [rows, ceil(n / 2)] as kernels/coded.py has them."""
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, ::2] | codes[:, 1::2] << 4


def swapped_nibbles(as_bytes: Tensor) -> Tensor:
    return (as_bytes >> 4) | (as_bytes << 4)


def order_of(group_index: Tensor, group: int) -> Tensor | None:
    """GPTQ's g_idx [in], the group of each input -> an order of inputs that keeps groups together.

    None if they are together already. Raises ValueError if a group has not `group` inputs; only the
    last may have fewer.
    """
    order = torch.argsort(group_index, stable=True).int()
    num_in = group_index.numel()
    wanted = torch.arange(num_in, device=order.device) // group
    if not torch.equal(group_index.long()[order.long()], wanted):
        raise ValueError(f"its groups have not {group} inputs each")
    return None if torch.equal(order.long(), torch.arange(num_in, device=order.device)) else order
