"""`sapwood bench gpu`: kernels checked on the device, then its limits and how near steps come."""
