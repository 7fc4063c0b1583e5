"""Decoder-only language models, made of shared layers."""
