"""Encoders, and what makes numbers of the hidden states of any model."""
