"""`sapwood bench ops`: every op alone, beside torch and beside the machine's limits."""
