"""OpenAI's routes for pictures, over an engine that draws."""
