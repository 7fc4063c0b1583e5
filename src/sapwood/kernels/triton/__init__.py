"""The ops as Triton kernels, for NVIDIA GPUs. Its interpreter runs them on a CPU, for tests."""
