"""Draft heads: a few layers that go on from a model's hidden states."""
