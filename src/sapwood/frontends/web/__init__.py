"""The chat page at /: static files without a build step and without external resources."""
