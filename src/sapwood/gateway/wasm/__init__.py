"""Middleware in WebAssembly: components that look at requests and answers on their way."""
