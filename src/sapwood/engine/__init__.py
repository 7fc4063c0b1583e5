"""The engine: the scheduler, the loop around it, and the client by which others use it."""
