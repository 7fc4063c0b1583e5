"""Where pages go that the device has no room for, and come back from."""
