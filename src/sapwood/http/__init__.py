"""HTTP, whatever is served: bodies, tables of endpoints, errors, streams, and who may call."""
