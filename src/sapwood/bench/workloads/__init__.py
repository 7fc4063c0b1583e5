"""What a benchmark sends: deterministic prompts and lengths, from a seed."""
