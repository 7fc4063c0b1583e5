"""Checkpoints with random weights, in the sizes of known models: speed needs no trained ones."""
