"""Errors, registry, channel, process, clock: every room uses them, and they use no other room."""
