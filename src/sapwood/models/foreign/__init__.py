"""Models that transformers computes, over the KV cache and attention kernels of sapwood."""
