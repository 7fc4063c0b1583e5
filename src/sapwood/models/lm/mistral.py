"""Mistral 7B and its successors. Source: Jiang et al. 2023, arXiv:2310.06825."""

from __future__ import annotations

from sapwood.models.lm.architecture import Architecture


class MistralForCausalLM(Architecture):
    """No biases, whatever the config says; a sliding window in all layers, or in none."""
