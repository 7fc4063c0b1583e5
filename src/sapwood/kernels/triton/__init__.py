"""Kernels for GPUs, written in Triton. Its interpreter runs them on a CPU for the tests."""
