"""SGLang's own dialect: /generate, and routes that describe or control the server."""
