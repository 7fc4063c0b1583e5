"""LiteLLM's SDK by five of its providers, and its proxy's bridge from /v1/messages to chat."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import litellm

CHAT = os.environ["CHAT_URL"]
EMBEDDING = os.environ["EMBEDDING_URL"]
MODEL = "smollm2-135m"
QUESTION = [{"role": "user", "content": "What is the capital of Japan?"}]


def sdk() -> None:
    bases = {
        "openai": f"{CHAT}/v1",
        "hosted_vllm": f"{CHAT}/v1",
        "ollama_chat": CHAT,
        "ollama": CHAT,
        "anthropic": CHAT,
    }
    for provider, base in bases.items():
        asked = {
            "model": f"{provider}/{MODEL}",
            "messages": QUESTION,
            "api_base": base,
            "api_key": "none",
            "max_tokens": 30,
        }
        answer = litellm.completion(**asked)
        assert "Tokyo" in answer.choices[0].message.content, provider
        chunks = litellm.completion(**asked, stream=True)
        text = "".join(one.choices[0].delta.content or "" for one in chunks)
        assert "Tokyo" in text, (provider, text)
    made = litellm.embedding(
        model="openai/all-minilm-l6-v2",
        input=["a cat"],
        api_base=f"{EMBEDDING}/v1",
        api_key="none",
    )
    assert len(made.data[0]["embedding"]) == 384
    told = litellm.responses(
        model=f"openai/{MODEL}",
        input="What is the capital of Japan?",
        api_base=f"{CHAT}/v1",
        api_key="none",
    )
    assert "Tokyo" in json.dumps(told.model_dump())


def proxy() -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    model = {
        "model_name": "local",
        "litellm_params": {
            "model": f"hosted_vllm/{MODEL}",
            "api_base": f"{CHAT}/v1",
            "api_key": "none",
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"
        settings = {"dangerously_permit_weak_or_unset_master_key": True}
        # JSON is YAML.
        config.write_text(json.dumps({"model_list": [model], "general_settings": settings}))
        program = str(Path(sys.executable).with_name("litellm"))
        command = [program, "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
        process = subprocess.Popen(command)
        try:
            wait(f"http://127.0.0.1:{port}/health/liveliness", process)
            body = {"model": "local", "max_tokens": 30, "messages": QUESTION}
            answer = post(f"http://127.0.0.1:{port}/v1/messages", body)
            assert "Tokyo" in answer["content"][0]["text"], answer
            answer = post(f"http://127.0.0.1:{port}/v1/chat/completions", body)
            assert "Tokyo" in answer["choices"][0]["message"]["content"], answer
        finally:
            process.terminate()
            process.wait(30)


def wait(url: str, process: subprocess.Popen) -> None:
    end = time.monotonic() + 150
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SystemExit(f"the proxy ended with {process.returncode}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise SystemExit("the proxy was not ready in time")


def post(url: str, body: dict) -> dict:
    headers = {"Content-Type": "application/json", "anthropic-version": "2023-06-01"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


sdk()
proxy()
