"""Encoders, and the heads that turn pooled hidden states into embeddings or scores."""
