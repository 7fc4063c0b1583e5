"""Responses and conversations that outlive a request: one interface, and stores behind it."""
