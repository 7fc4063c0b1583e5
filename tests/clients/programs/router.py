"""sglang-router or smg, started as its users start it, before one server or two.

Usage: router.py LAUNCH_MODULE POLICY; the servers' addresses are in the environment: CHAT_URL,
EMBEDDING_URL, RANKING_URL. With "grpc" as POLICY: before GRPC_URL, with the tokenizer of TOKENIZER.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def post(url: str, body: dict) -> dict:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise SystemExit(f"{url}: {error.code} {error.read().decode()[:600]}") from None


def lines_of(url: str, body: dict) -> list[str]:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return [line.decode().strip() for line in answer if line.strip()]


class Router:
    def __init__(self, module: str, policy: str, *workers: str, more: tuple[str, ...] = ()) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", *module.split(), "--host", "127.0.0.1"]
        command += ["--port", str(port), "--prometheus-port", str(free_port())]
        # power_of_two wants two workers; a server has two addresses.
        urls = [
            url for worker in workers for url in (worker, worker.replace("127.0.0.1", "localhost"))
        ]
        command += ["--policy", policy, "--log-level", "error", "--worker-urls", *urls, *more]
        self.process = subprocess.Popen(command)

    def __enter__(self) -> "Router":
        end = time.monotonic() + 120
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise SystemExit(f"the router ended with {self.process.returncode}")
            try:
                with urllib.request.urlopen(f"{self.url}/readiness", timeout=5) as answer:
                    if answer.status == 200:
                        return self
            except OSError:
                pass
            time.sleep(0.3)
        raise SystemExit("the router was not ready within two minutes")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


def texts(url: str) -> None:
    sampling = {"max_new_tokens": 8, "temperature": 0}
    prompt = {"model": "smollm2-135m", "text": "Water boils at", "sampling_params": sampling}
    answer = post(f"{url}/generate", prompt)
    if isinstance(answer, list):  # so by gRPC
        (answer,) = answer
    assert answer["text"], answer
    assert answer["meta_info"]["completion_tokens"] == 8, answer
    events = lines_of(f"{url}/generate", prompt | {"stream": True})
    assert events[-1] == "data: [DONE]", events[-2:]
    assert json.loads(events[-2][6:])["text"] == answer["text"], events[-2]
    question = [{"role": "user", "content": "What is the capital of Japan?"}]
    asked = {"model": "smollm2-135m", "messages": question, "max_tokens": 30}
    answer = post(f"{url}/v1/chat/completions", asked)
    assert "Tokyo" in answer["choices"][0]["message"]["content"], answer
    events = lines_of(f"{url}/v1/chat/completions", asked | {"stream": True})
    assert events[-1] == "data: [DONE]", events[-2:]
    completion = {"model": "smollm2-135m", "prompt": "Water boils at", "max_tokens": 4}
    assert post(f"{url}/v1/completions", completion)["usage"]["completion_tokens"] == 4


def main() -> None:
    module, policy = sys.argv[1:]
    if policy == "grpc":
        more = ("--model-path", os.environ["TOKENIZER"])
        with Router(module, "round_robin", os.environ["GRPC_URL"], more=more) as router:
            texts(router.url)
        return
    chat_url, embedding_url, ranking_url = (
        os.environ[name] for name in ("CHAT_URL", "EMBEDDING_URL", "RANKING_URL")
    )
    with Router(module, policy, chat_url) as router:
        texts(router.url)
    with Router(module, policy, embedding_url) as router:
        asked = {"model": "all-minilm-l6-v2", "input": ["a cat", "a kitten"]}
        answer = post(f"{router.url}/v1/embeddings", asked)
        assert [len(one["embedding"]) for one in answer["data"]] == [384, 384], answer
    with Router(module, policy, ranking_url) as router:
        asked = {"query": "cats", "documents": ["a cat", "a stone"], "model": "default"}
        answer = post(f"{router.url}/v1/rerank", asked)
        results = answer["results"] if isinstance(answer, dict) else answer
        assert len(results) == 2, answer


main()
