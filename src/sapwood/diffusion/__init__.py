"""Denoising requests over time: which pictures take part in the next step."""
