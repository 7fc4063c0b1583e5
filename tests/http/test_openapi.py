"""The OpenAPI document, as it is made from the table of endpoints."""

import pytest

ROUTES = {
    ("/v1/responses", "post"): (200, 400, 404, 413, 503),
    ("/v1/responses/{response_id}", "get"): (200, 400, 404),
    ("/v1/responses/{response_id}", "delete"): (200, 400, 404),
    ("/v1/responses/{response_id}/cancel", "post"): (200, 400, 404),
    ("/v1/responses/{response_id}/input_items", "get"): (200, 400, 404),
    ("/v1/files", "post"): (200, 400, 413),
    ("/v1/files", "get"): (200, 400),
    ("/v1/files/{file_id}", "get"): (200, 400, 404),
    ("/v1/files/{file_id}", "delete"): (200, 400, 404),
    ("/v1/files/{file_id}/content", "get"): (200, 400, 404),
    ("/v1/batches", "post"): (200, 400),
    ("/v1/batches", "get"): (200, 400),
    ("/v1/batches/{batch_id}", "get"): (200, 400, 404),
    ("/v1/batches/{batch_id}/cancel", "post"): (200, 400, 404),
    ("/ping", "get"): (200, 503),
    ("/invocations", "post"): (200, 400, 404, 413, 503),
    ("/vertex_generate", "post"): (200, 400, 413, 503),
}


@pytest.fixture
def document(api):
    return api.get("/openapi.json").json()


def references(part):
    if isinstance(part, dict):
        if "$ref" in part:
            yield part["$ref"]
        for held in part.values():
            yield from references(held)
    elif isinstance(part, list):
        for held in part:
            yield from references(held)


@pytest.mark.parametrize(("path", "method"), ROUTES)
def test_a_route_says_what_it_takes_and_answers(document, path, method):
    described = document["paths"][path][method]
    # Others may come with keys, limits and timeouts.
    assert set(map(int, described["responses"])) >= set(ROUTES[path, method])
    named = {name.strip("{}") for name in path.split("/") if name.startswith("{")}
    parameters = described.get("parameters", [])
    assert {one["name"] for one in parameters if one["in"] == "path"} == named
    for reference in references(described):
        name = reference.removeprefix("#/components/schemas/")
        assert name in document["components"]["schemas"]


def test_bodies_are_described(document):
    upload = document["paths"]["/v1/files"]["post"]["requestBody"]["content"]
    assert upload["multipart/form-data"]["schema"]["required"] == ["file", "purpose"]
    schemas = document["components"]["schemas"]
    assert "previous_response_id" in schemas["ResponsesRequest"]["properties"]
    assert schemas["CreateBatchRequest"]["required"] == [
        "input_file_id",
        "endpoint",
        "completion_window",
    ]
    assert "results_id" not in schemas["Batch"]["properties"]
