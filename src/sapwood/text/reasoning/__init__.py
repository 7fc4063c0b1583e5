"""Parsers that separate a model's thinking from its answer."""
