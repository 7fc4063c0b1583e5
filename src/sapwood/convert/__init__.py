"""Conversion of checkpoints to fewer bits, from the loader's tensors to a model directory.

Imports nothing itself: `options` and `scheme` need no torch."""
