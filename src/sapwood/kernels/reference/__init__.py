"""The plainest right implementation of the ops; every other one is tested against it."""

from sapwood.kernels.reference.ops import ReferenceKernels

__all__ = ["ReferenceKernels"]
