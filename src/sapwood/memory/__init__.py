"""The pages of the KV cache: who owns each, and which prefixes are kept."""
