"""What every room needs and knows nothing back: errors, registry, channel, process, clock."""
