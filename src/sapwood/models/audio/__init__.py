"""Towers that hear, and decoders that attend to them."""
