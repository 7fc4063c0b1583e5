"""Runs what tests/suites.toml registers, and keeps what came out (docs/testing.md)."""
