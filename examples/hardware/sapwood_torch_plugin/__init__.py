"""Kernels and a kind of devices for sapwood, from a package of their own."""
