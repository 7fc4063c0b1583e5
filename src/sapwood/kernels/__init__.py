"""One op, many implementations; the only room that knows hardware."""
