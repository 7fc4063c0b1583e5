"""Open WebUI's server with two connections to sapwood, asked as its page asks it."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

CHAT = os.environ["CHAT_URL"]
PORT = 30_917
URL = f"http://127.0.0.1:{PORT}"
START_LIMIT_S = 400
QUESTION = [{"role": "user", "content": "What is the capital of Japan?"}]


def wait_until_ready(server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_LIMIT_S
    while True:
        try:
            if httpx.get(f"{URL}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            assert server.poll() is None, "Open WebUI has ended"
        assert time.monotonic() < end, "Open WebUI does not answer"
        time.sleep(1)


def streamed(client: httpx.Client, path: str, body: dict) -> str:
    """The text of an answer in server-sent events, or in JSON lines."""
    text = ""
    with client.stream("POST", path, json=body) as lines:
        assert lines.status_code == 200, lines.read()
        for line in lines.iter_lines():
            data = line.removeprefix("data: ")
            if data and data != "[DONE]":
                event = json.loads(data)
                if event.get("choices"):
                    text += event["choices"][0]["delta"].get("content") or ""
                elif "message" in event:
                    text += event["message"]["content"]
    return text


def check(client: httpx.Client) -> None:
    # Without accounts, whoever signs in is its administrator.
    signed_in = client.post("/api/v1/auths/signin", json={"email": "", "password": ""})
    client.headers["Authorization"] = f"Bearer {signed_in.raise_for_status().json()['token']}"
    models = {model["id"] for model in client.get("/api/models").raise_for_status().json()["data"]}
    assert "smollm2-135m" in models, models
    body = {"model": "smollm2-135m", "messages": QUESTION, "stream": False}
    answer = client.post("/api/chat/completions", json=body).raise_for_status().json()
    assert "Tokyo" in answer["choices"][0]["message"]["content"]
    assert "Tokyo" in streamed(client, "/api/chat/completions", body | {"stream": True})
    assert "Tokyo" in streamed(client, "/openai/chat/completions", body | {"stream": True})
    tags = client.get("/ollama/api/tags").raise_for_status().json()["models"]
    assert tags
    body |= {"model": tags[0]["model"], "stream": True}
    assert "Tokyo" in streamed(client, "/ollama/api/chat", body)


with tempfile.TemporaryDirectory() as folder:
    settings = os.environ | {
        "DATA_DIR": folder,
        "WEBUI_AUTH": "False",
        "WEBUI_SECRET_KEY": "none",
        "OPENAI_API_BASE_URL": f"{CHAT}/v1",
        "OPENAI_API_KEY": "none",
        "OLLAMA_BASE_URL": CHAT,
        # Nothing is fetched: no model for searching in documents, no news of versions.
        "OFFLINE_MODE": "True",
        "RAG_EMBEDDING_ENGINE": "openai",
    }
    program = Path(sys.executable).with_name("open-webui")
    server = subprocess.Popen(
        [program, "serve", "--host", "127.0.0.1", "--port", str(PORT)], cwd=folder, env=settings
    )
    try:
        wait_until_ready(server)
        with httpx.Client(base_url=URL, timeout=180) as client:
            check(client)
    finally:
        server.terminate()
        server.wait(60)
