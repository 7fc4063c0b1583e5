"""Compares sapwood with its peers, on the same prompts, in turn, on one machine."""
