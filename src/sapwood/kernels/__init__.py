"""The ops, each with several implementations. No other room knows about hardware."""
