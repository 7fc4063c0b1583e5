"""OpenAI's routes for speech: files of sound become text."""
