"""The `sapwood` command. Its modules import what they need when a sub-command runs."""
