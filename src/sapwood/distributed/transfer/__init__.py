"""How pages of a cache get from one engine to another: over TCP, or through shared memory."""
