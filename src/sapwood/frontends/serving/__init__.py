"""From a request to its answer without HTTP: what the dialects share, and `sapwood.LLM` uses."""
