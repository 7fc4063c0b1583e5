"""Rules that choose a worker for a request."""
