"""HTTP dialects: each translates its wire format to text requests and back, and nothing more."""
