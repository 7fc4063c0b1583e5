"""`sapwood.LLM`: an engine inside a Python program, without a server."""
