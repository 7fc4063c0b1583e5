"""Endpoints about the server itself: metrics, loads, the live page's figures, profiles."""
