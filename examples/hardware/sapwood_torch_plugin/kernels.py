"""Ops of torch behind sapwood's signatures.

`TorchKernels` serves whatever runs torch, so that a package for new hardware starts with all ops,
and replaces one after the other by a faster one. Two are replaced here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.kernels.registry import Need
from sapwood.kernels.torch_ops import TorchKernels

DEVICES = ("cpu", "xpu")


class PluginKernels(TorchKernels):
    name = "torch-plugin"

    @staticmethod
    def why_not(need: Need) -> str | None:
        """Why these kernels cannot serve the need, in words for `sapwood check`; None: they can."""
        if need.device not in DEVICES:
            return f"they run on {' and '.join(DEVICES)}, not on {need.device}"
        return TorchKernels.why_not(need)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps).to(x.dtype)

    def argmax(self, logits: Tensor) -> Tensor:
        return torch.max(logits, dim=-1).indices
