"""`sapwood gateway`: builds the router of engines from its options."""
