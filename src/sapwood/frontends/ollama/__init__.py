"""Ollama's dialect: chat, generate, and the routes about models."""
