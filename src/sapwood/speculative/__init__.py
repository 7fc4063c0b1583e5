"""Guesses of the next tokens of a request, which a step then verifies."""
