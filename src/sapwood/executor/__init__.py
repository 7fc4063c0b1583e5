"""Runs one batch on one rank."""
