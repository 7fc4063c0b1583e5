"""One address for many engines: routes requests over them and copes with their failures."""
