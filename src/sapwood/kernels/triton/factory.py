"""Says whether the Triton kernels can serve a need.

Importing this module does not import triton, which would cost every start on a CPU 0.3 s. Triton's
interpreter is not offered for serving; tests make a TritonKernels themselves.
"""

from __future__ import annotations

import importlib.util
import warnings

import torch

from sapwood.kernels.attention_batch import (
    ALIBI,
    CHOSEN_KEYS,
    LATENT,
    SINKS,
    SLIDING_WINDOW,
    SOFT_CAP,
    lacking,
)
from sapwood.kernels.interface import Kernels
from sapwood.kernels.registry import Need

MAX_HEAD_DIM = 256
"""The largest head whose keys and values the attention kernels hold on chip."""

_LEAST_CAPABILITY = (8, 0)
"""Ampere: the first with bfloat16 matrix products."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ATTENTION = frozenset({SLIDING_WINDOW, SOFT_CAP, SINKS, ALIBI, LATENT, CHOSEN_KEYS})


class TritonFactory:
    """A `KernelsFactory`."""

    def why_not(self, need: Need) -> str | None:
        if need.device != "cuda":
            return f"they run on cuda, not on {need.device}"
        if importlib.util.find_spec("triton") is None:
            return 'triton is not installed; install it with pip install "sapwood[gpu]"'
        if need.dtype not in _DTYPES:
            return f"{need.dtype} is not float32, bfloat16 or float16"
        if reason := need.why_not_kv() or lacking(need.attention, _ATTENTION):
            return reason
        if need.head_dim > MAX_HEAD_DIM:
            return f"head size {need.head_dim} is above {MAX_HEAD_DIM}"
        return _why_not_gpu()

    def __call__(self) -> Kernels:
        # Triton 3.9 warns that products and sums may be fused; nothing here depends on it.
        warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
        from sapwood.kernels.triton.ops import TritonKernels

        return TritonKernels()


TRITON = TritonFactory()


def _why_not_gpu() -> str | None:
    if torch.version.hip is not None:
        return "they are for NVIDIA GPUs, and this torch is built for AMD's"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < _LEAST_CAPABILITY:
        found, least = (".".join(map(str, pair)) for pair in (capability, _LEAST_CAPABILITY))
        return f"the GPU has compute capability {found}, and they need {least}"
    return None
