"""Evaluations: how good a model's outputs are, after everything that makes it faster."""
