"""Engines on a Ray cluster. Nothing else imports Ray, and `sapwood[ray]` brings it."""
