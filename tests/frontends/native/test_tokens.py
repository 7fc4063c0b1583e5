from __future__ import annotations

import pytest

PATHS = pytest.mark.parametrize("prefix", ["", "/v1"])


@PATHS
def test_a_text_and_back(api, tokenizer, prefix):
    ids = tokenizer.encode("Hi, wörld")
    answer = api.post(f"{prefix}/tokenize", {"prompt": "Hi, wörld"}).json()
    assert answer == {"tokens": ids, "count": len(ids), "max_model_len": 1024}
    assert api.post(f"{prefix}/detokenize", {"tokens": ids}).json()["text"] == "Hi, wörld"


@PATHS
def test_several_texts(api, tokenizer, prefix):
    answer = api.post(f"{prefix}/tokenize", {"prompt": ["a", "bc"], "model": "default"}).json()
    assert answer["count"] == [1, 2]
    assert answer["tokens"] == [tokenizer.encode("a"), tokenizer.encode("bc")]
    back = api.post(f"{prefix}/detokenize", {"tokens": answer["tokens"]}).json()
    assert back["text"] == ["a", "bc"]


def test_special_tokens(api_with, engine, services, tokenizer):
    class WithBos(type(tokenizer)):
        def encode(self, text, add_special_tokens=True):
            return [*([256] if add_special_tokens else []), *tokenizer.encode(text)]

    marked = object.__new__(WithBos)
    marked.__dict__.update(tokenizer.__dict__)
    generator = type(services.generator)(engine, marked)
    api = api_with(tokenizer=marked, generator=generator)
    bodies = [
        {"prompt": "ab", "add_special_tokens": True},
        {"prompt": "ab", "add_special_tokens": False},
        {"prompt": "ab"},
        {"content": "ab"},
        {"content": "ab", "add_special": True},
    ]
    counts = [api.post("/tokenize", body).json()["count"] for body in bodies]
    assert counts == [3, 2, 3, 2, 3]
    ids = [256, *tokenizer.encode("ab"), 257]
    texts = [
        api.post("/detokenize", {"tokens": ids, "skip_special_tokens": skip}).json()["text"]
        for skip in (True, False)
    ]
    assert texts == ["ab", "<|im_start|>ab<|im_end|>"]


def test_pieces_as_llama_cpp_tells_them(api, tokenizer):
    answer = api.post("/tokenize", {"content": "aö", "with_pieces": True}).json()
    ids = tokenizer.encode("aö")
    pieces = ["a", [0xC3], [0xB6]]
    assert answer["tokens"] == [
        {"id": token_id, "piece": piece} for token_id, piece in zip(ids, pieces, strict=True)
    ]
    assert api.post("/detokenize", {"tokens": ids}).json()["content"] == "aö"
    refused = api.post("/tokenize", {"content": "a", "parse_special": False})
    assert refused.status_code == 400
    assert "parse_special" in refused.json()["error"]["message"]


def test_empty_ones(api):
    assert api.post("/tokenize", {"prompt": ""}).json()["tokens"] == []
    assert api.post("/detokenize", {"tokens": []}).json()["text"] == ""
    assert api.post("/detokenize", {"tokens": [[], []]}).json()["text"] == ["", ""]


def test_long_ones_are_whole(api, tokenizer):
    text = "lang und länger " * 2000
    ids = api.post("/tokenize", {"prompt": text}).json()["tokens"]
    assert ids == tokenizer.encode(text)
    assert api.post("/detokenize", {"tokens": ids}).json()["text"] == text


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": []}, "prompt"),
        ("/tokenize", {"prompt": ["a", 5]}, "prompt[1]"),
        ("/tokenize", {"prompt": "a", "add_special_token": True}, "add_special_token"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [1, [2]]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": [1, 258]}, "tokens"),
        ("/detokenize", {"tokens": [[1], [2**40]]}, "tokens[1][0]"),
        ("/detokenize", {"tokens": [1], "skip_special": True}, "skip_special"),
    ],
)
def test_refusals_name_the_field(api, path, body, param):
    response = api.post(path, body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param, error


def test_another_model_is_not_found(api):
    for path, body in [("/tokenize", {"prompt": "a"}), ("/v1/detokenize", {"tokens": [1]})]:
        assert api.post(path, {**body, "model": "gpt-4"}).status_code == 404


def test_they_are_in_the_openapi_document(api):
    document = api.get("/openapi.json").json()
    for path in ("/tokenize", "/v1/tokenize", "/detokenize", "/v1/detokenize"):
        assert "requestBody" in document["paths"][path]["post"]
    assert "TokenizeRequest" in document["components"]["schemas"]
