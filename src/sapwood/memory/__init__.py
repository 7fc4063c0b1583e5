"""Who owns which page of KV, on which tier."""
