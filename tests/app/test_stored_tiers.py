"""A storage behind the host tier: prefixes outlive the engine, and no fault changes an output."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from sapwood import LLM
from sapwood.base.errors import ConfigError
from sapwood.memory.storage.interface import StorageUser
from sapwood.memory.storage.opening import open_storage
from tests.app.llms import llms_of
from tests.app.test_tiers import SMALL, outputs_of
from tests.app.test_windows import MODELS as WINDOWED
from tests.app.test_windows import save, text
from tests.memory.storage.lmcache_server import lmcache_server
from tests.memory.storage.mooncake_server import mooncake_master
from tests.tiny import save_lfm2, save_llama

PROMPTS = [text(90 + index, seed=index) for index in range(3)]
KEPT = 88
"""Tokens of each prompt that come back."""
MODELS: dict[str, Callable[[Path], Path]] = {
    "pages": save_llama,
    "states": save_lfm2,
    "windows": lambda path: save(path, **WINDOWED["layers take turns"]),
}


@pytest.fixture(scope="module")
def path_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    known: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in known:
            known[name] = MODELS[name](tmp_path_factory.mktemp("stored"))
        return known[name]

    return of


@pytest.fixture
def make_llm(path_of: Callable[[str], Path], tmp_path: Path) -> Iterator[Callable[..., LLM]]:
    with llms_of(path_of("pages"), **{**SMALL, "page_size": 8}) as make:

        def tiered(
            name: str = "pages", *, extra: dict[str, Any] | None = None, **options: Any
        ) -> LLM:
            told = {"prefetch_threshold": 16, "directory": str(tmp_path / "kv"), **(extra or {})}
            if name == "windows":
                options["swa_full_tokens_ratio"] = 1.0
            return make(
                **{
                    "model": path_of(name),
                    "enable_hierarchical_cache": True,
                    "hicache_ratio": 6.0,
                    "hicache_storage_backend": "file",
                    "hicache_storage_prefetch_policy": "wait_complete",
                    "hicache_storage_backend_extra_config": json.dumps(told),
                    **options,
                }
            )

        yield tiered


@pytest.fixture(scope="module")
def expected(path_of: Callable[[str], Path]) -> Callable[[str], Any]:
    known: dict[str, Any] = {}

    def of(name: str) -> Any:
        if name not in known:
            options = {**SMALL, "page_size": 8, "disable_radix_cache": True}
            with llms_of(path_of(name), **options) as make:
                known[name] = outputs_of(make(), PROMPTS)
        return known[name]

    return of


@pytest.mark.parametrize("name", MODELS)
def test_prefixes_outlive_the_engine(
    make_llm: Callable[..., LLM], expected: Callable[[str], Any], name: str
) -> None:
    first = make_llm(name)
    assert outputs_of(first, PROMPTS) == expected(name)
    assert first.stats().num_cached_tokens == 0
    first.close()
    second = make_llm(name)
    assert outputs_of(second, PROMPTS) == expected(name)
    assert second.stats().num_cached_tokens == KEPT * len(PROMPTS)


@pytest.mark.parametrize("ranks", [{"tp_size": 2}, {"pp_size": 2}, {"dp_size": 2}])
def test_each_rank_keeps_its_part_under_its_own_name(
    make_llm: Callable[..., LLM], tmp_path: Path, ranks: dict[str, int]
) -> None:
    first = make_llm(**ranks)
    computed = outputs_of(first, PROMPTS)
    first.close()
    names = [path.stem for path in (tmp_path / "kv").iterdir()]
    pages = {name[:64] for name in names}
    endings = {name[-4:] for name in names}
    assert endings == ({"_0_1"} if "dp_size" in ranks else {"_0_2", "_1_2"})
    assert len(names) == len(pages) * len(endings), "every page has all its parts"
    second = make_llm(**ranks)
    assert outputs_of(second, PROMPTS) == computed
    assert second.stats().num_cached_tokens == KEPT * len(PROMPTS)
    second.close()
    if "dp_size" in ranks:
        return
    for path in sorted((tmp_path / "kv").glob("*_1_2.bin")):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    third = make_llm(**ranks)
    assert outputs_of(third, PROMPTS) == computed
    assert third.stats().num_cached_tokens == 0, "one part is broken, so the page is"


def test_ranks_refuse_a_storage_together(make_llm: Callable[..., LLM]) -> None:
    with pytest.raises(ConfigError, match="cannot be used"):
        make_llm(tp_size=2, extra={"directory": "/proc/nowhere"})


def page_keys(tokens: list[int]) -> list[str]:
    """SGLang's keys of the whole pages: SHA-256 over the digest of the page before and the page's
    tokens, each as 4 bytes, the lowest first."""
    keys, digest = [], b""
    for start in range(0, len(tokens) // 8 * 8, 8):
        digest = hashlib.sha256(digest + struct.pack("<8I", *tokens[start : start + 8])).digest()
        keys.append(digest.hex())
    return keys


def test_files_have_sglangs_keys_where_there_is_no_namespace(
    make_llm: Callable[..., LLM], tmp_path: Path
) -> None:
    first = make_llm()
    ((output, _),) = outputs_of(first, PROMPTS[:1])
    first.close()
    names = [path.name for path in (tmp_path / "kv").iterdir()]
    computed = [*PROMPTS[0], *output[:-1]]
    assert sorted(name[:64] for name in names) == sorted(page_keys(computed))
    assert {name[64] + name[-8:] for name in names} == {"__0_1.bin"}


def test_copies_of_other_weights_numbers_and_tenants_are_not_found(
    make_llm: Callable[..., LLM], expected: Callable[[str], Any], path_of: Callable[[str], Path]
) -> None:
    first = make_llm()
    outputs_of(first, PROMPTS)
    first.close()
    for options in ({"kv_cache_dtype": "fp8_e4m3"}, {"context_length": 200}):
        other = make_llm(**options)
        outputs_of(other, PROMPTS)
        assert other.stats().num_cached_tokens == 0, options
        other.close()
    weights = next(path_of("pages").glob("*.safetensors"))
    weights.touch()  # as if it were another one of the same size
    touched = make_llm()
    assert outputs_of(touched, PROMPTS) == expected("pages")
    assert touched.stats().num_cached_tokens == 0


@pytest.mark.parametrize("fault", ["flipped", "torn", "gone", "sealed otherwise"])
def test_broken_copies_are_computed_again(
    make_llm: Callable[..., LLM], expected: Callable[[str], Any], tmp_path: Path, fault: str
) -> None:
    first = make_llm(extra={"encryption_key": "ab" * 32} if "sealed" in fault else None)
    outputs_of(first, PROMPTS)
    first.close()
    for index, path in enumerate(sorted((tmp_path / "kv").iterdir())):
        content = bytearray(path.read_bytes())
        if fault == "flipped":
            content[100 + index] ^= 4
            path.write_bytes(content)
        elif fault == "torn":
            path.write_bytes(content[: 40 * index])
        elif fault == "gone":
            path.unlink()
    second = make_llm(extra={"encryption_key": "cd" * 32} if "sealed" in fault else None)
    assert outputs_of(second, PROMPTS) == expected("pages")
    assert second.stats().num_cached_tokens == 0


@pytest.mark.parametrize("fault", ["the directory goes", "the disk is full"])
def test_a_running_engine_goes_on_without_its_storage(
    make_llm: Callable[..., LLM],
    expected: Callable[[str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: str,
) -> None:
    llm = make_llm()
    want = expected("pages")
    assert outputs_of(llm, PROMPTS[:1]) == want[:1]
    if fault == "the directory goes":
        # In one move: pages may still be on their way to the directory.
        (tmp_path / "kv").rename(tmp_path / "moved away")
    else:

        def full(file: int, views: Any, offset: int) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "pwritev", full)
    assert outputs_of(llm, PROMPTS[1:]) == want[1:]
    assert outputs_of(llm, PROMPTS) == want
    assert llm.stats().num_leased_pages == 0
    llm.close()
    told = [one.message for one in caplog.records if one.levelname in ("WARNING", "ERROR")]
    assert len(told) <= 1, told
    if fault == "the disk is full":
        assert "No space left on device" in told[0]


def test_prefixes_come_back_from_mooncakes_store(
    make_llm: Callable[..., LLM], expected: Callable[[str], Any], tmp_path: Path
) -> None:
    pytest.importorskip("mooncake.store", exc_type=ImportError)
    with mooncake_master(tmp_path) as address:
        # Memory of this process, which outlives both engines.
        memory = open_storage(
            "mooncake",
            {"master_server_address": address, "global_segment_size": "0.125gb"},
            StorageUser(default_directory=tmp_path),
        )
        told = {"master_server_address": address, "global_segment_size": "0gb"}
        for cached in (0, KEPT * len(PROMPTS)):
            llm = make_llm(hicache_storage_backend="mooncake", extra=told)
            assert outputs_of(llm, PROMPTS) == expected("pages")
            assert llm.stats().num_cached_tokens == cached
            llm.close()
        memory.close()


@pytest.mark.parametrize("backend", ["nixl", "lmcache"])
def test_prefixes_come_back_from_storages_of_others(
    make_llm: Callable[..., LLM], expected: Callable[[str], Any], backend: str
) -> None:
    if backend == "nixl":
        pytest.importorskip("nixl_cu12", exc_type=ImportError)
    with lmcache_server() as url:
        extra = {"url": url} if backend == "lmcache" else {}
        for cached in (0, KEPT * len(PROMPTS)):
            llm = make_llm(hicache_storage_backend=backend, extra=extra)
            assert outputs_of(llm, PROMPTS) == expected("pages")
            assert llm.stats().num_cached_tokens == cached
            llm.close()


class SlowStorage:
    """A plug-in for SGLang's interface that answers late, or never finds out whether it can."""

    kept: ClassVar[dict[str, Any]] = {}
    get_s = 0.0
    is_dead = False

    def __init__(self, storage_config: Any, kwargs: dict[str, Any]) -> None:
        assert storage_config.tp_size == 1

    def exists(self, key: str) -> bool:
        if self.is_dead:
            raise ConnectionError("the server is gone")
        return key in self.kept

    def get(self, key: str, target: Any = None) -> Any:
        time.sleep(self.get_s)
        found = self.kept.get(key)
        return found if found is None else target.copy_(found)

    def set(self, key: str, value: Any) -> bool:
        if self.is_dead:
            raise ConnectionError("the server is gone")
        self.kept[key] = value.clone()
        return True

    def clear(self) -> None:
        self.kept.clear()


def test_a_slow_or_dead_plug_in_holds_nobody_longer_than_the_policy(
    make_llm: Callable[..., LLM],
    expected: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plug_in = {
        "backend_name": "slow",
        "module_path": __name__,
        "class_name": "SlowStorage",
        "prefetch_timeout_base": 0.05,
        "prefetch_timeout_per_ki_token": 0.0,
    }
    options = {"hicache_storage_backend": "dynamic", "extra": plug_in}
    monkeypatch.setattr(SlowStorage, "kept", {})
    first = make_llm(**options)
    assert outputs_of(first, PROMPTS) == expected("pages")
    first.close()
    assert SlowStorage.kept
    second = make_llm(**options)
    assert outputs_of(second, PROMPTS) == expected("pages")
    assert second.stats().num_cached_tokens == KEPT * len(PROMPTS)
    second.close()
    monkeypatch.setattr(SlowStorage, "get_s", 0.3)  # 3 s for each prompt
    third = make_llm(**options, hicache_storage_prefetch_policy="timeout")
    start_s = time.monotonic()
    assert outputs_of(third, PROMPTS) == expected("pages")
    assert time.monotonic() - start_s < 2.5, "waited for the storage"
    monkeypatch.setattr(SlowStorage, "get_s", 0.0)
    third.close()
    monkeypatch.setattr(SlowStorage, "is_dead", True)
    dead = make_llm(**options)
    assert outputs_of(dead, PROMPTS) == expected("pages")
    dead.close()
    told = [one.message for one in caplog.records if "the server is gone" in one.message]
    assert len(told) == 2, "once for reading, and once for writing"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"extra": {"directory": ""}}, "directory that is no text"),
        ({"extra": {"max_gb": -1}}, "max_gb '-1' but must have a number"),
        ({"extra": {"nobody": 1}}, "'nobody', but knows only"),
        ({"hicache_storage_backend": "redis"}, "redis needs its url"),
        ({"hicache_storage_backend": "s3"}, "s3 needs its bucket"),
        ({"hicache_storage_backend": "mooncake"}, "mooncake needs its master_server_address"),
        ({"extra": {"global_segment_size": "lots"}}, "global_segment_size that is none, 'lots'"),
        ({"extra": {"endpoint_url": "http://a b"}}, "endpoint_url that is none"),
        ({"extra": {"secret_access_key": "\r\n" * 50}}, "a secret_access_key that is none$"),
        ({"hicache_storage_backend": "dynamic"}, "needs module_path and class_name"),
        ({"page_size": 4, "chunked_prefill_size": 16}, "take at least 8"),
        ({"enable_hierarchical_cache": False}, "without --enable-hierarchical-cache"),
        ({"extra": {"directory": "/proc/nowhere"}}, "cannot be used"),
        (
            {
                "hicache_storage_backend": "dynamic",
                "extra": {"module_path": "no.such", "class_name": "X"},
            },
            "no storage class no.such:X",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    make_llm: Callable[..., LLM], options: dict[str, Any], why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        make_llm(**options)
