"""Benchmarks of sapwood and of its peers, measured from outside."""
