"""The ops as Triton kernels, for NVIDIA GPUs. Tests run them on a CPU, in Triton's interpreter."""
