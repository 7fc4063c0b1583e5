"""Pipelines: one file per family of diffusion models, which says how its components work together.

A pipeline knows components, prompts' templates, the latents' layout and the timesteps' shift. It
knows neither requests nor batches: the engine asks it for a trajectory per picture, and computes
steps of many trajectories together."""
