"""How good a model's outputs are, whatever made it faster."""
