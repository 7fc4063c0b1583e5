"""The workloads of benchmarks: prompts and lengths that depend only on a seed."""
