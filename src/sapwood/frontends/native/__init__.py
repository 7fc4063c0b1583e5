"""SGLang's own dialect: /generate and the routes that tell about and steer the server."""
