"""Tools of MCP servers, called by the gateway while it makes a response."""
