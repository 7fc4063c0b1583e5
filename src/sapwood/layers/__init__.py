"""Tensor building blocks."""
