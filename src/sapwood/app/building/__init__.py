"""Resolves a configuration, loads a model and builds the engine around it."""
