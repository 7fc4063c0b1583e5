"""Requests over time: the scheduler, the loop around it, and the process they live in."""
