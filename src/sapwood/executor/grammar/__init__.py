"""Holding outputs to a grammar: compiled once, then a mask of the allowed tokens at each step."""
