"""sapwood beside what users would pick instead, on the same prompts, in turn, on one machine."""
