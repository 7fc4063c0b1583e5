"""Checkpoints into fewer bits: from what the loader reads to a compressed-tensors directory.

Imports nothing itself: `options` and `scheme` need no torch."""
