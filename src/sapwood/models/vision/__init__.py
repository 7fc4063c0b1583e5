"""Towers: what makes vectors of pictures and videos, which stand in a prompt as tokens do."""
