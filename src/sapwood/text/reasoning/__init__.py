"""The thinking before an answer, taken apart from it."""
