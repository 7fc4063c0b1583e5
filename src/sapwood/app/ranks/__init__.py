"""The processes that share one engine's model, and the experts that move between them."""
