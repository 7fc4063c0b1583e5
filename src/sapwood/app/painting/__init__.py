"""Serving and calling diffusion models; not imported where a language model is served."""
