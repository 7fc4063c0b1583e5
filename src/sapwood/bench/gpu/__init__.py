"""`sapwood bench gpu`: checks kernels on a device, and compares steps with the device's limits."""
