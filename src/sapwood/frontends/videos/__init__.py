"""OpenAI's routes for videos, over an engine that draws."""
