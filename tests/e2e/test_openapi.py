"""The OpenAPI document is true: what a fuzzer makes of it is answered as it says.

`pytest tests/e2e/test_openapi.py --max-examples 40` asks more than 2,000 times; the default is a
sample of it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from sapwood.schema import limits
from tests.e2e.server import Server, serving
from tests.tiny import write_llama

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "unsupported_method",
)
NOT_FOR_A_FUZZER = (
    *("/start_profile", "/configure_logging", "/slow_down"),
    *("/pause_generation", "/release_memory_occupation", "/update_weights_from_disk"),
    *("/init_weights_update_group", "/update_weights_from_distributed"),
)
"""They take paths of files to write, make all that follows slow or wait, or wait for a trainer."""


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("models")
    model = write_llama(directory / "m")
    flags = ("--enable-metrics", "--state-dir", str(directory / "state"))
    with serving("--model", str(model), "--load-format", "dummy", *flags) as server:
        yield server


def test_a_fuzzer_finds_nothing(
    fuzzed: Server, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    max_examples = request.config.getoption("--max-examples")
    excluded = [word for path in NOT_FOR_A_FUZZER for word in ("--exclude-path", path)]
    command = [str(Path(sys.executable).parent / "schemathesis"), "run"]
    command += [f"{fuzzed.url}/openapi.json", "--checks", ",".join(CHECKS), *excluded]
    command += ["--phases", "examples,coverage,fuzzing" if max_examples > 5 else "examples,fuzzing"]
    command += ["--max-examples", str(max_examples), "--request-timeout", "30", "--seed", "1"]
    command += ["--continue-on-failure", "--no-color", "--suppress-health-check", "all"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "Traceback" not in fuzzed.log
    counters = fuzzed.wait_until_idle()
    assert counters["num_leased_pages"] == 0


def test_every_route_tells_what_it_answers(fuzzed: Server) -> None:
    """Each operation tells of its answer and its errors, and has an example of its body."""
    document = httpx.get(f"{fuzzed.url}/openapi.json").json()
    lacking = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            where = f"{method.upper()} {path}"
            content = operation["responses"]["200"].get("content", {})
            if not content or not all(kind.get("schema") for kind in content.values()):
                lacking.append(f"{where}: no schema of its answer")
            for kind, media in operation.get("requestBody", {}).get("content", {}).items():
                if kind == "application/json" and "example" not in media:
                    lacking.append(f"{where}: no example")
                if "400" not in operation["responses"]:
                    lacking.append(f"{where}: takes a body, but tells of no 400")
    assert lacking == []
    references = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert references <= set(document["components"]["schemas"])


def test_limits_of_texts_are_told(fuzzed: Server) -> None:
    """Under the numbers of docs/limits.md, wherever a body has such a field."""
    document = httpx.get(f"{fuzzed.url}/openapi.json").json()
    most = {"rid": limits.REQUEST_ID.most, "routing_key": limits.ROUTING_KEY.most}
    most |= dict.fromkeys(("extra_key", "cache_salt"), limits.CACHE_KEY.most)
    told = [
        (name, text["maxLength"])
        for schema in document["components"]["schemas"].values()
        for name, field in schema.get("properties", {}).items()
        if name in most
        for one in [field, *field.get("anyOf", ())]
        for text in (one, one.get("items", {}))
        if text.get("type") == "string"
    ]
    assert len(told) > 12
    assert [one for one in told if one[1] != most[one[0]]] == []
