"""OpenAI's Responses API: the server keeps answers, and conversations can go on from them."""
