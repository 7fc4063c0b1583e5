"""Diffusion transformers: one file per architecture, over the layers of the house."""
