"""Engines that the gateway gives token ids, and whose answers it turns into text itself."""
