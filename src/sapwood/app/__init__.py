"""The public API and the command line; the only room that constructs the others."""
