"""What a real server tells about itself, and what it does when it is stuck or dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.parser import text_string_to_metric_families

from sapwood.executor.sampling.custom import CustomLogitProcessor
from tests.e2e.server import Server, serving

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"


class NeverEnds(CustomLogitProcessor):
    """A step with it does not end: a kernel that hangs."""

    def __call__(self, logits, custom_param_list):  # type: ignore[no-untyped-def]
        import time

        time.sleep(10_000)
        return logits


def metrics_of(url: str) -> dict[str, float]:
    """Sums over all labels."""
    text = httpx.get(f"{url}/metrics").raise_for_status().text
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name.removeprefix("sapwood:")
            sums[name] = sums.get(name, 0.0) + sample.value
    return sums


def wait_for(condition, limit_s: float = 20.0) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.05)


def stream_a_little(url: str, num_events: int) -> None:
    body = {"prompt": "Go on", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        for _, line in zip(range(num_events), answer.iter_lines(), strict=False):
            assert line is not None


def test_counters_add_up_whatever_happens_to_requests(qwen3: Path) -> None:
    with serving("--model", str(qwen3), "--dtype", "float32", "--enable-metrics") as server:
        url = f"{server.url}/v1/completions"
        finish = [
            threading.Thread(
                target=lambda i=i: httpx.post(
                    url, json={"prompt": f"a{i}", "max_tokens": 30, "n": 1 + i % 2}, timeout=60
                ).raise_for_status()
            )
            for i in range(12)
        ]
        leave = [
            threading.Thread(target=stream_a_little, args=(server.url, 4 + i)) for i in range(6)
        ]
        refuse = [
            threading.Thread(target=lambda: httpx.post(url, json={"prompt": "x" * 4000}))
            for _ in range(4)
        ]
        # Whoever leaves does so long before the end: all 200 tokens would take 10 seconds.
        slowed = httpx.post(f"{server.url}/slow_down", json={"forward_sleep_time": 0.05})
        slowed.raise_for_status()
        for thread in (*finish, *leave, *refuse):
            thread.start()
        for thread in (*finish, *leave, *refuse):
            thread.join()
        server.wait_until_idle()
        wait_for(lambda: metrics_of(server.url)["num_open_requests"] == 0)
        found = metrics_of(server.url)
        assert found["num_requests_total"] == 22
        assert found["num_finished_requests_total"] == 12
        assert found["num_refused_requests_total"] == 4
        assert found["num_aborted_requests_total"] == 6
        assert found["num_failed_requests_total"] == 0
        assert found["e2e_request_latency_seconds_count"] == 18
        counters = server.counters()
        # Tokens of those who left are counted as far as anybody read them.
        assert found["generation_tokens_total"] <= counters["num_output_tokens"]
        assert found["process_cpu_seconds_total"] > 0
        assert found["engine_startup_time"] > 0
        page = httpx.get(f"{server.url}/dashboard/figures").json()
        assert page["requests"]["num_requests"] == 22
        assert page["memory"]["weights"] > 0
        (pool,) = page["pools"]
        assert pool.pop("name") == "full"
        assert pool == {owner: page["memory"][owner] for owner in pool}


@pytest.fixture
def collector() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """An OTLP endpoint, and what it has received."""
    received: list[ExportTraceServiceRequest] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                import gzip

                body = gzip.decompress(body)
            received.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            return

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1/traces", received
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_trace_goes_through_both_processes(qwen3: Path, collector) -> None:  # type: ignore[no-untyped-def]
    endpoint, received = collector
    flags = ("--dtype", "float32", "--enable-trace", "--otlp-traces-endpoint", endpoint)
    with serving("--model", str(qwen3), *flags) as server:
        httpx.post(
            f"{server.url}/v1/completions",
            json={"prompt": "Hi", "max_tokens": 5},
            headers={"traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-01"},
        ).raise_for_status()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
    services: dict[str, set[str]] = {}
    for message in received:
        for resource in message.resource_spans:
            names = {one.key: one.value.string_value for one in resource.resource.attributes}
            for scope in resource.scope_spans:
                for span in scope.spans:
                    assert span.trace_id.hex() == TRACE_ID
                    services.setdefault(names["service.name"], set()).add(span.name)
    assert services == {
        "sapwood-api": {"POST /v1/completions", "request", "tokenize"},
        "sapwood-engine": {"dispatch", "prefill_waiting", "prefill_forward", "decode_loop"},
    }


def test_a_stuck_engine_is_reported_and_ends_the_server(qwen3: Path, tmp_path: Path) -> None:
    flags = (
        *("--dtype", "float32", "--enable-custom-logit-processor"),
        # Longer than importing torch takes on a busy machine: start-up is watched too.
        *("--soft-watchdog-timeout", "2", "--watchdog-timeout", "15"),
        *("--crash-dump-folder", str(tmp_path)),
    )
    with serving("--model", str(qwen3), *flags) as server:
        body = {"text": "Hi", "custom_logit_processor": NeverEnds.to_str(), "rid": "the-culprit"}
        answer = httpx.post(f"{server.url}/generate", json=body, timeout=60)
        assert answer.status_code == 503
        assert "has got nowhere for 15 s (--watchdog-timeout)" in answer.text
        assert server.process.wait(30) == 1
        log = server.log
    assert "has got nowhere for 2." in log
    assert "in __call__" in log
    assert "Current thread" in log or "Thread 0x" in log
    [path] = tmp_path.iterdir()
    dumped = json.loads(path.read_text())
    assert "watchdog" in dumped["reason"]
    assert [one["request_id"] for one in dumped["requests"]] == ["the-culprit"]


def test_a_killed_engine_leaves_a_dump(qwen3: Path, tmp_path: Path) -> None:
    flags = ("--dtype", "float32", "--crash-dump-folder", str(tmp_path))
    with serving("--model", str(qwen3), *flags) as server:
        httpx.post(f"{server.url}/generate", json={"text": "before"}).raise_for_status()
        os.kill(server.engine_pid(), signal.SIGKILL)
        assert server.process.wait(30) == 1
    [path] = tmp_path.iterdir()
    dumped = json.loads(path.read_text())
    assert "SIGKILL" in dumped["reason"]
    assert dumped["requests"][0]["prompt"] == "before"


def test_a_signal_prints_the_stacks_and_the_server_goes_on(qwen3_server: Server) -> None:
    for pid in (qwen3_server.process.pid, qwen3_server.engine_pid()):
        os.kill(pid, signal.SIGUSR1)
    wait_for(lambda: qwen3_server.log.count("most recent call first") >= 2)
    assert httpx.get(f"{qwen3_server.url}/health_generate").status_code == 200


def test_the_request_log_goes_to_files(qwen3: Path, tmp_path: Path) -> None:
    flags = (
        *("--dtype", "float32", "--log-requests", "--log-requests-format", "json"),
        *("--log-requests-target", str(tmp_path), "--log-scheduler-status-interval", "0.01"),
        *("--decode-log-interval", "5"),
    )
    with serving("--model", str(qwen3), *flags) as server:
        body = {"text": "logged", "sampling_params": {"max_new_tokens": 30, "ignore_eos": True}}
        httpx.post(f"{server.url}/generate", json=body).raise_for_status()
        wait_for(lambda: "step 5: running 1" in server.log)
    lines: dict[str, list[dict[str, object]]] = {}
    for path in tmp_path.iterdir():
        kind = path.name.partition("-")[0]
        lines[kind] = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["event"] for line in lines["requests"]] == ["request.received", "request.finished"]
    assert {line["event"] for line in lines["scheduler"]} == {"scheduler.status"}


def test_a_profile_is_written(qwen3_server: Server, tmp_path: Path) -> None:
    url = qwen3_server.url
    order = {"output_dir": str(tmp_path), "num_steps": 3}
    httpx.post(f"{url}/start_profile", json=order, timeout=60).raise_for_status()
    body = {"text": "Hi", "sampling_params": {"max_new_tokens": 20, "ignore_eos": True}}
    httpx.post(f"{url}/generate", json=body, timeout=60).raise_for_status()
    again = httpx.post(f"{url}/stop_profile", timeout=60)
    assert again.status_code == 400
    [path] = tmp_path.iterdir()
    assert path.name.endswith(".trace.json.gz")


@pytest.mark.skipif(
    find_spec("opentelemetry.exporter.otlp.proto.grpc") is not None,
    reason="the package whose absence is tested is installed",
)
def test_a_collector_that_cannot_be_used_is_said_at_once(qwen3: Path) -> None:
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "sapwood", "serve", "--model", str(qwen3)),
            *("--port", "0", "--enable-trace", "--otlp-traces-endpoint", "localhost:4317"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 1
    assert "opentelemetry-exporter-otlp-proto-grpc" in ended.stderr
    assert "Traceback" not in ended.stderr
