"""Modules in WebAssembly on the way of requests and answers. They are made of the docs' example."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.gateway.stubs import Bench, Stub, bench

wasmtime = pytest.importorskip("wasmtime", reason="the package wasmtime is not installed")

DOCS = Path(__file__).parents[3] / "docs" / "wasm"
LABEL = (DOCS / "label.wat").read_text("utf-8")

# Other tests run on the same cores.
PATIENT: dict[str, Any] = {"enable_wasm": True, "wasm_timeout_secs": 30.0}

LOOP = "(loop $for-ever (br $for-ever)) unreachable"
# Grows until it gets no more, and then writes to the memory that it did not get.
HOG = """(loop $more (br_if $more (i32.ne (i32.const -1) (memory.grow (i32.const 16)))))
  (i32.store8 (i32.shl (memory.size) (i32.const 16)) (i32.const 1)) unreachable"""
ODD_STATUS = "(call $reject (i32.const 200))"
GO_ON = "(i32.store8 (i32.const 0) (i32.const 0)) (i32.const 0)"
ECHO = """(i32.store8 (i32.const 0) (i32.const 2)) (i32.store8 (i32.const 32) (i32.const 1))
  (i32.store (i32.const 36) (local.get $body)) (i32.store (i32.const 40) (local.get $body-length))
  (i32.const 0)"""
"""Sets the body to what it is."""


def module(on_request: str = GO_ON, on_response: str = GO_ON, header: str = "x-label") -> bytes:
    text = LABEL.replace(
        """(if (i32.gt_u (local.get $body-length) (i32.const 100000))
        (then (return (call $reject (i32.const 413)))))
      (call $modify))""",
        f"{on_request})",
    )
    text = re.sub(
        r"(\(param \$body i32\) \(param \$body-length i32\) \(result i32\)\s+)\(call \$modify\)\)",
        rf"\1{on_response})",
        text,
    )
    return bytes(wasmtime.wat2wasm(text.replace("x-labelseen", f"{header:7}seen")))


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Any]:
    def write(name: str, content: bytes) -> str:
        path = tmp_path / f"{name}.wasm"
        path.write_bytes(content)
        return str(path)

    return write


async def add(made: Bench, path: str, *hooks: str, name: str = "a") -> httpx.Response:
    points = [{"Middleware": hook} for hook in hooks or ("OnRequest", "OnResponse")]
    spec = {
        "name": name,
        "file_path": path,
        "module_type": "Middleware",
        "attach_points": points,
    }
    return await made.client.post("/wasm", json={"modules": [spec]})


def of_wat(target: str) -> None:
    Path(target).write_bytes(wasmtime.wat2wasm(LABEL))


def of_c(target: str) -> None:
    for tool in ("clang", "wasm-ld"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    build = [sys.executable, str(DOCS / "build.py"), str(DOCS / "label.c"), target]
    subprocess.run(build, check=True, timeout=120)


@pytest.mark.parametrize("build", [of_wat, of_c])
def test_the_docs_examples(tmp_path: Path, build: Callable[[str], None]) -> None:
    path = str(tmp_path / "label.wasm")
    build(path)

    async def run() -> None:
        async with bench(stub := Stub("a"), **PATIENT) as made:
            told = await add(made, path)
            assert told.status_code == 200
            id_ = told.json()["modules"][0]["add_result"]["Success"]
            answer = await made.post(prompt="x" * 1000)
            assert answer.headers["x-label"] == "seen"
            assert answer.json()["worker"] == "a"
            assert stub.posts[0].headers["x-label"] == "seen"
            assert stub.posts[0].headers["content-length"] == str(len(stub.posts[0].body))
            # More than the memory with which the module begins.
            await made.post(prompt="x" * 99_000)
            assert len(stub.posts) == 2
            refused = await made.post(prompt="x" * 100_000)
            assert refused.status_code == 413
            assert len(stub.posts) == 2
            listed = (await made.client.get("/wasm")).json()
            assert listed["modules"][0]["module_uuid"] == id_
            assert listed["modules"][0]["module_meta"]["access_count"] == 5
            assert len(listed["modules"][0]["module_meta"]["sha256_hash"]) == 64
            assert listed["metrics"]["successful_executions"] == 5
            assert (await made.client.delete(f"/wasm/{id_}")).status_code == 200
            assert (await made.client.delete(f"/wasm/{id_}")).status_code == 404
            assert "x-label" not in (await made.post()).headers
            # What is not meant for workers passes no modules.
            await add(made, path)
            assert "x-label" not in (await made.client.get("/v1/models")).headers

    asyncio.run(run())


def test_bodies_pass_as_they_are(files: Any) -> None:
    async def run() -> None:
        async with bench(stub := Stub("a"), **PATIENT) as made:
            await add(made, files("echo", module(ECHO, ECHO)))
            body = bytes(range(256)) * 400
            answer = await made.client.post(
                "/v1/audio/transcriptions", content=b"{}" + b" " * 200_000
            )
            assert answer.json()["worker"] == "a"
            assert stub.posts[0].body == b"{}" + b" " * 200_000
            stub.behaviour = 400
            assert (await made.client.post("/generate", content=body)).status_code == 400
            assert stub.posts[1].body == body

    asyncio.run(run())


def test_modules_are_called_in_their_order(files: Any) -> None:
    async def run() -> None:
        async with bench(stub := Stub("a"), **PATIENT) as made:
            await add(made, files("b", module("(call $modify)", header="x-other")), name="b")
            await add(made, files("a", module("(call $reject (i32.const 451))")), name="a")
            assert (await made.post()).status_code == 451
            assert stub.posts == []
            listed = (await made.client.get("/wasm")).json()["modules"]
            assert [one["module_meta"]["access_count"] for one in listed] == [1, 1]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (LOOP, "did not end within"),
        (HOG, "out of bounds"),
        (ODD_STATUS, "no status of an error"),
        ("unreachable", "unreachable"),
    ],
)
@pytest.mark.parametrize("hook", ["OnRequest", "OnResponse"])
def test_a_module_that_fails_harms_its_own_call_only(
    code: str, reason: str, hook: str, files: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        options = PATIENT | ({"wasm_timeout_secs": 0.2} if code == LOOP else {})
        async with bench(stub := Stub("a"), **options) as made:
            await add(made, files("bad", module(code, code)), hook, name="bad")
            calls = [asyncio.create_task(made.post()) for _ in range(3)]
            # The gateway goes on while the module runs.
            assert (await made.client.get("/liveness")).status_code == 200
            for answer in await asyncio.gather(*calls):
                assert answer.status_code == 500
                assert "module 'bad' of the gateway failed" in answer.json()["message"]
            assert reason in caplog.text
            assert made.num_open() == 0
            listed = (await made.client.get("/wasm")).json()
            assert listed["metrics"]["failed_executions"] == 3
            await made.client.delete(f"/wasm/{listed['modules'][0]['module_uuid']}")
            assert (await made.post()).status_code == 200
            assert len(stub.posts) == (1 if hook == "OnRequest" else 4)

    asyncio.run(run())


def test_a_stream_is_held_back_only_where_a_module_wants_answers(files: Any) -> None:
    async def run() -> None:
        stub = Stub("a")
        stub.behaviour = "wait"
        async with bench(stub, **PATIENT) as made:
            await add(made, files("a", module("(call $modify)")), "OnRequest")
            async with made.client.stream("POST", "/v1/completions", json={"stream": True}) as told:
                pieces = told.aiter_bytes()
                # The engine goes on only when its first event has come through.
                assert await anext(pieces) == b'data: {"worker": "a", "n": 0}\n\n'
                stub.go_on.set()
                rest = b"".join([piece async for piece in pieces])
            assert rest.endswith(b"data: [DONE]\n\n")
            await add(made, files("b", module(header="x-other")), "OnResponse", name="b")
            whole = await made.post(stream=True)
            assert whole.headers["content-length"] == str(len(whole.content))
            assert whole.text.endswith("data: [DONE]\n\n")

    asyncio.run(run())


def test_a_body_that_is_too_long_for_modules(files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from sapwood.gateway.wasm import inspected

    monkeypatch.setattr(inspected, "MAX_BODY_BYTES", 100)

    async def run() -> None:
        async with bench(stub := Stub("a"), **PATIENT) as made:
            await add(made, files("a", module()), "OnRequest")
            assert (await made.post(prompt="x" * 200)).status_code == 413
            assert stub.posts == []

    asyncio.run(run())


def test_files_that_are_no_modules(files: Any, tmp_path: Path) -> None:
    plain = bytes(wasmtime.wat2wasm('(module (func (export "on-request")))'))
    other = bytes(wasmtime.wat2wasm("(component)"))
    (tmp_path / "link.wasm").symlink_to("/etc/passwd")
    (tmp_path / "folder.wasm").mkdir()
    (tmp_path / "a.txt").write_bytes(other)
    wrong = {
        files("plain", plain): "no component",
        files("other", other): "does not export",
        files("text", b"hello"): "no component",
        str(tmp_path / "none.wasm"): "cannot be read",
        str(tmp_path / "link.wasm"): "ends with .wasm",
        str(tmp_path / "folder.wasm"): "ends with .wasm",
        str(tmp_path / "a.txt"): "ends with .wasm",
        "relative.wasm": "must be absolute",
        f"{tmp_path}/../a.wasm": "must be absolute",
        "/a\0.wasm": "must be absolute",
    }

    async def run() -> None:
        async with bench(Stub("a"), **PATIENT) as made:
            for path, message in wrong.items():
                told = await add(made, path)
                assert told.status_code == 400, path
                assert message in told.json()["modules"][0]["add_result"]["Error"], path
            for body in ({}, {"modules": 1}, {"modules": [{"name": "a"}]}):
                assert (await made.client.post("/wasm", json=body)).status_code == 400
            good = files("good", module())
            assert (await add(made, good, name="")).status_code == 400
            assert (await add(made, good)).status_code == 200
            for name, message in (("a", "already"), ("b", "same file's content")):
                told = await add(made, good, name=name)
                assert message in told.json()["modules"][0]["add_result"]["Error"]
            assert len((await made.client.get("/wasm")).json()["modules"]) == 1

    asyncio.run(run())


def test_modules_are_for_those_who_steer() -> None:
    async def run() -> None:
        async with bench(Stub("a"), **PATIENT, api_key="user", admin_api_key="x") as made:
            user = {"authorization": "Bearer user"}
            assert (await made.client.get("/wasm", headers=user)).status_code == 403
        async with bench(Stub("a")) as made:
            assert (await made.client.get("/wasm")).status_code == 404

    asyncio.run(run())
