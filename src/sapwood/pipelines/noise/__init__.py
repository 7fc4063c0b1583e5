"""Noise schedules: which timesteps a picture goes through, and what a step does to its latents."""
