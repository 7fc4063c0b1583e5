"""The gateway's own tokenizers: their names, their caches, and the routes that show them."""
