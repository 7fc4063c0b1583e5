"""LoRA: adapters that are applied to a model from outside, many of them at once."""
