"""`sapwood serve`: the API process, and its watch over the engine processes."""
