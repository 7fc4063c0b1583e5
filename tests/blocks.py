"""Random blocks of GGUF's types: any bytes are valid but for the fp16 numbers among them."""

from __future__ import annotations

import torch

from sapwood.kernels.blocks import FORMATS
from sapwood.kernels.quantized import QuantizedWeight

HALVES_AT = {
    **dict.fromkeys(("q4_1", "q5_1", "q4_k", "q5_k"), (0, 2)),
    "q2_k": (80, 82),
    "q3_k": (108,),
    "q6_k": (208,),
}
"""Where the fp16 numbers of a block lie; of the other types, at its beginning."""


def random_blocks(kind: str, num_out: int, num_in: int, *, scale: float = 0.01) -> QuantizedWeight:
    """fp16 numbers are normal ones of standard deviation `scale`."""
    of = FORMATS[kind]
    blocks = torch.randint(0, 256, (num_out, num_in // of.inputs, of.num_bytes)).to(torch.uint8)
    for at in HALVES_AT.get(kind, (0,)):
        halves = (torch.randn(num_out, num_in // of.inputs, 1) * scale).half()
        blocks[..., at : at + 2] = halves.view(torch.uint8)
    return QuantizedWeight(kind, (num_out, num_in), blocks.view(num_out, -1))
