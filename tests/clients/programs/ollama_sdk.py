"""chat, generate, list, ps, show, pull and embed of the official SDK."""

import os

import ollama

MODEL = "smollm2-135m"
QUESTION = [{"role": "user", "content": "What is the capital of Japan?"}]

client = ollama.Client(host=os.environ["CHAT_URL"])
assert client.pull(MODEL).status == "success"
assert [step.status for step in client.pull(MODEL, stream=True)][-1] == "success"
assert "Tokyo" in client.chat(MODEL, QUESTION, options={"num_ctx": 4096}).message.content
parts = client.chat(MODEL, QUESTION, stream=True, keep_alive="10m")
assert "Tokyo" in "".join(part.message.content for part in parts)
assert client.generate(MODEL, "Name a tree.", options={"num_predict": 8}).response
schema = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}},
    "required": ["name"],
}
assert client.chat(MODEL, QUESTION, format=schema).message.content.startswith("{")
[listed] = client.list().models
assert listed.size > 90_000_000
assert listed.details.quantization_level
[running] = client.ps().models
assert running.size > 0
assert "completion" in client.show(MODEL).capabilities

embedder = ollama.Client(host=os.environ["EMBEDDING_URL"])
made = embedder.embed("all-minilm-l6-v2", ["a cat", "a kitten"])
assert [len(vector) for vector in made.embeddings] == [384, 384]
assert len(embedder.embeddings("all-minilm-l6-v2", "a cat").embedding) == 384
