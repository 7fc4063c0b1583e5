"""Architectures, the store of model files, and the reading of weights."""
