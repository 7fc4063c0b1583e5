"""The ops in eager torch, with few calls: fast on CPUs without a compiler, right on any device."""

from sapwood.kernels.torch_ops.ops import TorchKernels

__all__ = ["TorchKernels"]
