"""Tool calls in an answer: one file per wire format, and one parser for streams and whole texts."""
