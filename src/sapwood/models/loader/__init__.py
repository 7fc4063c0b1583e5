"""Reads files on disk into tensors with Hugging Face's names."""
