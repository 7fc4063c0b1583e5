"""Typed configuration: one frozen struct per component, resolved once by pure functions."""
