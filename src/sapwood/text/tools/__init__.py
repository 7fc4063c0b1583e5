"""Calls of tools in an answer: one file per wire format, one machine for streams and texts."""
