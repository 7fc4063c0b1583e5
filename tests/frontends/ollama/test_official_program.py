"""What Ollama's own command-line program sends, as its Go client writes it.

Written down from the program's source (its api and cmd packages), with all the fields that its
structs always have, also empty ones.
"""

from __future__ import annotations

import pytest

HEADERS = {
    "Content-Type": "application/json",
    "Accept": "application/x-ndjson",
    "User-Agent": "ollama/0.12.3 (amd64 linux) Go/go1.24.1",
}
MODEL = "org/tiny"

PULL = {"model": MODEL, "username": "", "password": "", "name": MODEL}
SHOW = {"model": MODEL, "system": "", "template": "", "options": None, "name": MODEL}
LOAD = {"model": MODEL, "prompt": "", "suffix": "", "system": "", "template": "", "options": None}
GENERATE = LOAD | {"prompt": "Why is the sky blue?", "options": {}, "keep_alive": "5m0s"}
CHAT = {
    "model": MODEL,
    "messages": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Who are you?"},
    ],
    "options": {},
}
COMMANDS = {
    "ollama list": [("HEAD", "/", None), ("GET", "/api/tags", None)],
    "ollama ps": [("HEAD", "/", None), ("GET", "/api/ps", None)],
    "ollama show": [("HEAD", "/", None), ("POST", "/api/show", SHOW)],
    "ollama pull": [("HEAD", "/", None), ("POST", "/api/pull", PULL)],
    "ollama run MODEL PROMPT": [
        ("HEAD", "/", None),
        ("POST", "/api/show", SHOW),
        ("POST", "/api/generate", GENERATE),
    ],
    "ollama run MODEL": [
        ("HEAD", "/", None),
        ("POST", "/api/show", SHOW),
        ("POST", "/api/generate", LOAD),
        ("POST", "/api/chat", CHAT),
    ],
    "ollama --version": [("GET", "/api/version", None)],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_request_of_a_command_is_answered(api, command):
    for method, path, body in COMMANDS[command]:
        answer = api.request(method, path, headers=HEADERS, json=body)
        assert answer.status_code == 200, answer.text


def test_an_answer_ends_as_the_program_waits_for(api, json_lines):
    for path, body in (("/api/generate", GENERATE), ("/api/chat", CHAT), ("/api/pull", PULL)):
        lines = json_lines(api.request("POST", path, headers=HEADERS, json=body).text)
        assert not any("error" in line for line in lines)
        last = lines[-1]
        assert last.get("done") or last["status"] == "success"
