"""Ollama's dialect: chat, generate, and what its clients ask about models."""
