"""The common part of all dialects: bodies, fields, errors, event streams, services."""
