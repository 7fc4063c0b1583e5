"""Torch-free nouns that cross a boundary: requests, outputs, steps, configuration."""
