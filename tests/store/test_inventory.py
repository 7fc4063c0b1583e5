from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sapwood.store.catalogue import CatalogueEntry, HubSpec, WheelSpec
from sapwood.store.inventory import StoredModel, remove, stored_models
from sapwood.store.used import mark_used
from tests.gguf_sample import GgufSample

DIGEST = "a" * 64
CATALOGUE = {
    "tiny": CatalogueEntry(
        name="tiny",
        description="tiny",
        license="MIT",
        sources=(
            WheelSpec(
                requirement="tiny==1",
                member="tiny/tiny.gguf",
                sha256=DIGEST,
                num_bytes=1,
                num_wheel_bytes=1,
            ),
        ),
    ),
    "short": CatalogueEntry(
        name="short", description="short", license="MIT", sources=(HubSpec(repository="Org/A-b"),)
    ),
}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A file from a wheel, and a repository with two fetched revisions."""
    wheel = tmp_path / "models" / DIGEST[:32]
    wheel.mkdir(parents=True)
    GgufSample().write(wheel / "tiny.gguf")
    repository = tmp_path / "hub" / "models--Org--A-b"
    complete = tmp_path / "hub" / "complete"
    complete.mkdir(parents=True)
    for commit in ("one", "two"):
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text("{}")
        save_file({"x": torch.zeros(100, dtype=torch.bfloat16)}, snapshot / "model.safetensors")
        marker = {"snapshot": f"models--Org--A-b/snapshots/{commit}", "files": {"config.json": 2}}
        (complete / f"{commit}.json").write_text(json.dumps(marker))
    return tmp_path


def by_name(home: Path) -> dict[str, StoredModel]:
    return {model.names[0]: model for model in stored_models(home, CATALOGUE)}


def test_models_of_wheels_and_of_the_hub_are_found(home: Path) -> None:
    found = by_name(home)
    assert found["tiny"].names == ("tiny",)
    assert found["tiny"].numbers == "F32"
    assert found["tiny"].num_bytes == (found["tiny"].directory / "tiny.gguf").stat().st_size
    assert found["short"].names == ("short", "Org/A-b")
    assert found["short"].numbers == "BF16"
    assert len(found["short"].markers) == 2


def test_an_empty_cache_has_none(tmp_path: Path) -> None:
    assert stored_models(tmp_path / "nothing", CATALOGUE) == []


def test_the_last_used_comes_first(home: Path) -> None:
    assert {model.used_s for model in stored_models(home, CATALOGUE)} == {None}
    for time_s, name in ((2000, "short"), (1000, "tiny")):
        mark_used(home, by_name(home)[name].directory / "some" / "file")
        (used,) = (home / "used").glob(f"*{by_name(home)[name].directory.name}")
        os.utime(used, (time_s, time_s))
    models = stored_models(home, CATALOGUE)
    assert [(model.names[0], model.used_s) for model in models] == [("short", 2000), ("tiny", 1000)]


def test_a_path_elsewhere_is_not_written_down(home: Path) -> None:
    mark_used(home, Path("/somewhere/model.gguf"))
    assert not (home / "used").exists()


def test_a_removed_model_is_gone_and_others_stay(home: Path) -> None:
    model = by_name(home)["short"]
    mark_used(home, model.directory)
    remove(home, model)
    assert list(by_name(home)) == ["tiny"]
    assert list((home / "hub" / "complete").iterdir()) == []
    assert list((home / "used").iterdir()) == []


def test_damaged_files_are_listed_too(home: Path) -> None:
    (by_name(home)["tiny"].directory / "tiny.gguf").write_bytes(b"GGUF")
    (home / "hub" / "models--Org--A-b" / "snapshots" / "one" / "model.safetensors").write_bytes(b"")
    assert {model.numbers for model in stored_models(home, CATALOGUE)} == {"unknown"}
