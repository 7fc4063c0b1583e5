"""Options of the tiers behind the KV pool."""

import json

import pytest

from sapwood.app.cli.main import main
from sapwood.base.errors import ConfigError
from sapwood.schema.config.options import gather, option_specs
from sapwood.schema.config.tiers import TiersConfig

OF_SGLANG = ("file", "mooncake", "hf3fs", "nixl", "aibrix", "dynamic", "eic")
(BACKEND,) = (one for one in option_specs(TiersConfig) if one.name == "hicache_storage_backend")


@pytest.mark.parametrize("name", [*OF_SGLANG, "lmcache", "s3", "valkey"])
def test_a_storage_of_others_is_offered_or_refused_by_its_reason(name: str) -> None:
    if name in BACKEND.choices:
        assert gather([TiersConfig], flags={}, env={BACKEND.env: name}, file={})
        return
    for ask in (
        lambda: gather([TiersConfig], flags={}, env={BACKEND.env: name}, file={}),
        lambda: gather([TiersConfig], flags={}, env={}, file={"hicache-storage-backend": name}),
        lambda: TiersConfig(enable_hierarchical_cache=True, hicache_storage_backend=name),
    ):
        with pytest.raises(ConfigError, match=f"is '{name}'.* but .*; take "):
            ask()


def test_a_storage_that_nobody_has_is_answered_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="must be one of: file, redis, s3, mooncake, nixl, "):
        TiersConfig(hicache_storage_backend="\x00\x1b[31m" * 20)


def test_the_command_line_tells_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--hicache-storage-backend", "eic"]) == 2
    assert "EIC is not called by sapwood; take redis" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("backend", "extra", "told"),
    [
        ("lmcache", {}, "needs its url"),
        ("lmcache", {"url": "lm://a", "prefix": "a@1"}, "have no room for"),
        ("lmcache", {"url": "lm://a", "prefix": "a" * 65}, "have no room for"),
        ("nixl", {"plugin": "OBJ"}, "has a plugin that is none, 'OBJ'"),
    ],
)
def test_settings_that_a_storage_cannot_have(
    backend: str, extra: dict[str, str], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        TiersConfig(
            enable_hierarchical_cache=True,
            hicache_storage_backend=backend,
            hicache_storage_backend_extra_config=json.dumps(extra),
        )
