"""Pictures and videos of requests become arrays that a vision model reads; no torch."""
