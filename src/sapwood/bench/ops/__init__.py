"""`sapwood bench ops`: compares every op alone with torch and with the machine's limits."""
