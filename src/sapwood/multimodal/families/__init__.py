"""How each family of vision models wants its pictures: one file per way of preparing."""
