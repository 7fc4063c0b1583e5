from __future__ import annotations

import pytest

from sapwood.app.cli.options import joined_values
from sapwood.base.errors import ConfigError
from sapwood.schema.config.lora import LoraConfig, LoraPath


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/a/mine", [("mine", "/a/mine", False)]),
        ("/a/mine/", [("mine", "/a/mine/", False)]),
        ("x=/a y=/b", [("x", "/a", False), ("y", "/b", False)]),
        ("x=/a b\ny=/c", [("x", "/a b", False), ("y", "/c", False)]),
        ("x=org/name", [("x", "org/name", False)]),
        ('{"lora_name": "x", "lora_path": "/a b", "pinned": true}', [("x", "/a b", True)]),
        (
            '[{"lora_name": "x", "lora_path": "/a"}, "y=/b"]',
            [("x", "/a", False), ("y", "/b", False)],
        ),
    ],
)
def test_lora_paths(text: str, expected: list[tuple[str, str, bool]]) -> None:
    config = LoraConfig(lora_paths=text)
    assert config.is_on
    assert config.paths == tuple(
        LoraPath(name=name, path=path, pinned=pinned) for name, path, pinned in expected
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_paths": "x=/a x=/b"}, "twice"),
        ({"lora_paths": "=/a"}, "cannot be an adapter's name"),
        ({"lora_paths": '{"lora_name": "x"}'}, "without lora_name and lora_path"),
        ({"lora_paths": '{"lora_name": "x", "lora_path": "/a", "pin": 1}'}, "nothing else"),
        ({"lora_paths": "{x"}, "is no JSON"),
        ({"enable_lora": True}, "needs --max-lora-rank"),
        ({"max_lora_rank": 8}, "does nothing without --enable-lora"),
        ({"lora_paths": "/a", "max_loras_per_batch": 0}, "must be >= 1"),
        ({"lora_paths": "/a", "max_loaded_loras": 3}, "at least --max-loras-per-batch"),
        (
            {"lora_paths": "/a /b /c", "max_loaded_loras": 2, "max_loras_per_batch": 2},
            "has 3 adapters",
        ),
        (
            {
                "lora_paths": '{"lora_name": "x", "lora_path": "/a", "pinned": true}',
                "max_loras_per_batch": 1,
            },
            "may be pinned",
        ),
        ({"lora_paths": "/a", "enable_lora_overlap_loading": True}, "needs --max-loaded-loras"),
        (
            {"lora_paths": "/a", "enable_lora_overlap_loading": True, "max_loaded_loras": 17},
            "at most twice",
        ),
        ({"lora_paths": "/a", "lora_eviction_policy": "random"}, "lora-eviction-policy"),
    ],
)
def test_refusals(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**options)


def test_modules() -> None:
    def of(text: str | None) -> frozenset[str] | None:
        return LoraConfig(lora_paths="/a", lora_target_modules=text).modules

    assert of(None) is None
    assert of("q_proj all") is None
    assert of("qkv_proj o_proj") == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_values_after_a_flag_are_joined() -> None:
    args = ["model", "--lora-paths", "x=/a", "y=/b", "--port", "1", "--lora-paths"]
    assert joined_values(args, {"--lora-paths"}) == [
        "model", "--lora-paths", "x=/a\ny=/b", "--port", "1", "--lora-paths",
    ]  # fmt: skip
    again = ["--prefill", "http://a", "8998", "--port=1", "--prefill=http://b"]
    assert joined_values(again, {"--prefill"}) == [
        "--prefill", "http://a\n8998\nhttp://b", "--port=1",
    ]  # fmt: skip
