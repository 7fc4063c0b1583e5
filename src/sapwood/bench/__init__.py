"""Measure sapwood, and what users would pick instead of it, from outside."""
