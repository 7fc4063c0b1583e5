"""The table of endpoints: nothing is reachable that the table does not declare."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastapi import FastAPI, Request, Response

from sapwood.http.access import Access
from sapwood.http.endpoints import Dialect, Endpoint, EndpointTable
from sapwood.http.errors import NATIVE_ERRORS, OLLAMA_ERRORS, OPENAI_ERRORS

REPOSITORY = Path(__file__).parents[2]
KEY, ADMIN = "user-key", "admin-key"
ADMIN_PATHS = {
    "/abort_request",
    "/configure_logging",
    "/flush_cache",
    "/start_expert_distribution_record",
    "/stop_expert_distribution_record",
    "/dump_expert_distribution_record",
    "/freeze_gc",
    "/load_lora_adapter",
    "/load_lora_adapter_from_tensors",
    "/slow_down",
    "/unload_lora_adapter",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/start_profile",
    "/stop_profile",
    "/update_weights_from_disk",
    "/update_weights_from_tensor",
    "/init_weights_update_group",
    "/update_weights_from_distributed",
    "/update_weights_from_ipc",
    "/init_weights_send_group_for_remote_instance",
    "/send_weights_to_remote_instance",
    "/destroy_weights_update_group",
    "/update_weight_version",
    "/set_internal_state",
    "/get_weights_by_name",
    "/weights_checker",
    "/pause_generation",
    "/continue_generation",
    "/release_memory_occupation",
    "/resume_memory_occupation",
    "/hicache/storage-backend",
    "/hicache/storage-backend/clear",
    "/clear_hicache_storage_backend",
}
OPEN_PATHS = {
    "/",
    "/dashboard",
    "/docs",
    "/docs/start.css",
    "/docs/start.js",
    "/docs/swagger-ui-bundle.js",
    "/docs/swagger-ui.css",
    "/favicon.svg",
    "/health",
    "/health_generate",
    "/metrics",
    "/pictures",
    "/ping",
}


def paths_with(api, access: str) -> set[str]:
    endpoints = api.app.state.endpoints
    return {path for endpoint in endpoints if endpoint.access == access for path in endpoint.paths}


def row(*paths: str, **said) -> Endpoint:
    return Endpoint(
        **{"paths": paths, "methods": ("GET",), "access": "user", "is_documented": False} | said
    )


def dialect(*endpoints: Endpoint, **fields) -> Dialect:
    made = Dialect("test", **fields)
    for endpoint in endpoints:
        made.serves(endpoint)(answer)
    return made


async def answer(request: Request) -> Response:
    return Response("done")


def test_an_endpoint_without_access_cannot_be_made():
    with pytest.raises(TypeError, match="access"):
        Endpoint(paths=("/new",), methods=("POST",), is_documented=False)
    with pytest.raises(ValueError, match=r"/new: access is 'amdin'.*'admin'"):
        row("/new", access="amdin")


def test_a_route_that_no_dialect_declares_is_refused(api):
    app = api.app
    app.state.endpoints.check_routes(app.routes)
    app.add_api_route("/steer", answer, methods=["POST"])
    with pytest.raises(RuntimeError, match=r"/steer.*with its access"):
        app.state.endpoints.check_routes(app.routes)


def test_a_method_that_no_dialect_declares_is_refused(api):
    app = api.app
    app.add_api_route("/health", answer, methods=["DELETE"])
    with pytest.raises(RuntimeError, match="/health"):
        app.state.endpoints.check_routes(app.routes)


def test_an_application_mounted_inside_is_refused():
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.mount("/inner", FastAPI())
    with pytest.raises(RuntimeError, match="/inner"):
        EndpointTable([]).check_routes(app.routes)


def test_every_admin_endpoint_refuses_a_users_key(guarded):
    api = guarded(access=Access(api_key=KEY, admin_api_key=ADMIN))
    assert paths_with(api, "admin") == ADMIN_PATHS
    for endpoint in api.app.state.endpoints:
        for path in endpoint.paths if endpoint.access == "admin" else ():
            for method in endpoint.methods:
                refused = api.request(
                    method, path, json={}, headers={"Authorization": f"Bearer {KEY}"}
                )
                assert refused.status_code == 403, f"{method} {path}"
                assert "admin key" in refused.text


def test_only_what_is_declared_open_answers_without_a_key(guarded):
    api = guarded(access=Access(api_key=KEY, admin_api_key=ADMIN))
    pages = {path for path in paths_with(api, "open") if path.startswith("/web/")}
    assert paths_with(api, "open") - pages == OPEN_PATHS
    assert "/web/chat/main.js" in pages
    for endpoint in api.app.state.endpoints:
        for path in endpoint.paths:
            for method in endpoint.methods:
                status = api.request(method, path, json={}).status_code
                assert (status != 401) == (endpoint.access == "open"), f"{method} {path}"


def test_every_admin_get_is_refused_to_pages_of_other_origins(api):
    hostile = {"origin": "https://evil.example", "sec-fetch-site": "cross-site"}
    for path in [*paths_with(api, "admin"), "/health_generate"]:
        assert api.get(path, headers=hostile).status_code == 403, path


def test_the_documentation_names_every_admin_endpoint(api):
    text = (REPOSITORY / "docs/access.md").read_text()
    assert {path for path in paths_with(api, "admin") if f"`{path}`" not in text} == set()


def test_two_endpoints_cannot_answer_the_same_call():
    with pytest.raises(ValueError, match="two endpoints answer GET, HEAD /a"):
        EndpointTable([dialect(row("/a")), dialect(row("/a"))])
    with pytest.raises(ValueError, match="two endpoints answer GET, HEAD /a/b"):
        EndpointTable([dialect(row("/a/{name}"), row("/a/b"))])
    EndpointTable([dialect(row("/a/{name}"), row("/a/b", methods=("POST",)))])


def test_two_dialects_cannot_spell_the_same_errors():
    EndpointTable([dialect(errors={"/a": OPENAI_ERRORS}), dialect(errors={"/a": OPENAI_ERRORS})])
    with pytest.raises(ValueError, match="below /a"):
        EndpointTable(
            [dialect(errors={"/a": OPENAI_ERRORS}), dialect(errors={"/a": OLLAMA_ERRORS})]
        )


def test_a_documented_endpoint_says_what_it_answers_and_how_to_ask():
    with pytest.raises(ValueError, match="does not say what it answers"):
        row("/a", is_documented=True)
    with pytest.raises(ValueError, match="no example"):
        row("/a", is_documented=True, answers=("text/plain",), body=OPENAI_ERRORS.shape)


def test_the_longest_beginning_says_how_errors_are_spelled():
    table = EndpointTable(
        [
            dialect(row("/v1/own", errors=NATIVE_ERRORS), errors={"/v1": OPENAI_ERRORS}),
            dialect(errors={"/v1/a": OLLAMA_ERRORS}),
        ]
    )
    spelled = {
        "/v1": OPENAI_ERRORS,
        "/v1/b": OPENAI_ERRORS,
        "/v1/ab": OPENAI_ERRORS,
        "/v1/a": OLLAMA_ERRORS,
        "/v1/a/c": OLLAMA_ERRORS,
        "/v1/own": NATIVE_ERRORS,
        "/v11": NATIVE_ERRORS,
        "/": NATIVE_ERRORS,
    }
    assert {path: table.error_form(path) for path in spelled} == spelled


def test_an_endpoint_is_found_by_method_and_path():
    reads, writes = row("/a/{name}"), row("/a/{name}", methods=("POST",), access="admin")
    table = EndpointTable([dialect(reads, writes)])
    assert table.find("GET", "/a/b") is reads
    assert table.find("POST", "/a/b") is writes
    assert table.find("PUT", "/a/b") is reads
    assert table.find("GET", "/a/b/c") is None
    assert table.find("GET", "/a/") is None
