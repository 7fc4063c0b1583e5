"""What the gateway answers itself: hostile workers' specs, and joined metrics."""

from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapwood.base.errors import InvalidRequest
from sapwood.gateway.fleet import spec_of
from sapwood.gateway.steering import joined_metrics
from sapwood.gateway.worker import WorkerSpec
from tests.gateway.stubs import Stub, bench

fields = st.sampled_from([*WorkerSpec.__struct_fields__, "bootstrap_port"])
values = st.none() | st.integers() | st.floats() | st.text(max_size=20) | st.just("http://h:1")
urls = st.text(max_size=30) | st.text(max_size=20).map(lambda text: f"http://{text}")


@given(st.dictionaries(fields, values | urls))
def test_a_spec_is_right_or_refused(told: dict[str, object]) -> None:
    try:
        spec = spec_of(told)
        spec.check()
    except InvalidRequest:
        return
    assert spec.url.startswith("http")


def test_metrics_of_several_workers_are_one_text() -> None:
    text = '# HELP a_total x\n# TYPE a_total counter\na_total{b="c"} 1.0\n'
    joined = joined_metrics([("http://one", text), ("http://two", text)]).decode()
    assert joined.count("# TYPE") == 1
    assert 'a_total{b="c",worker="http://one"} 1.0' in joined
    assert 'a_total{b="c",worker="http://two"} 1.0' in joined
    with pytest.raises(InvalidRequest):
        joined_metrics([("http://one", 'a{b="c} 1\n')])


BODIES = [
    b"",
    b"[]",
    b"null",
    b"\xff\xfe",
    b'{"url"',
    b'{"url": {}}',
    b'{"url": "http://h", "cost": 1e999}',
    b'{"url": "http://h", "labels": {"a": 1}}',
    b"[" * 5000,
    b'{"url": "http://' + b"x" * 70000 + b'", "cost": -1}',
]
PATHS = ["/workers", "/workers/x", "/workers/%00", "/v1/models/%2e%2e", "/v1/responses/%ff", "//"]


def test_malformed_requests_are_refused_and_break_nothing() -> None:
    async def run() -> None:
        async with bench(stub := Stub("a")) as made:
            for path in PATHS:
                for method in ("GET", "POST", "PUT", "DELETE", "PATCH"):
                    for body in BODIES:
                        answer = await made.client.request(method, path, content=body)
                        is_list = (method, path) == ("GET", "/workers")
                        assert (
                            answer.status_code == 200
                            if is_list
                            else (400 <= answer.status_code < 500)
                        ), (method, path, body[:40], answer.text)
                        json.loads(answer.content)
            assert (await made.post()).status_code == 200
            assert len(stub.posts) == 1

    asyncio.run(run())
