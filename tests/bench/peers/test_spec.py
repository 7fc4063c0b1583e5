import pytest

from sapwood.base.errors import ConfigError
from sapwood.bench.peers.spec import PeerSpec, peer_specs


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "peers.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_a_known_peer_needs_no_file():
    assert peer_specs(["sapwood"], None) == {"sapwood": PeerSpec(kind="sapwood")}


def test_the_file_names_kinds_options_models_and_interpreters(write):
    file = write(
        "int8: {kind: sapwood, options: {quantization: w8a8_int8}}\n"
        "vllm: {python: /opt/vllm/bin/python, model: /models/x}\n"
        "unused: {kind: server, options: {command: [serve, '{port}']}}\n"
    )
    assert peer_specs(["vllm", "int8"], file) == {
        "vllm": PeerSpec(kind="vllm", python="/opt/vllm/bin/python", model="/models/x"),
        "int8": PeerSpec(kind="sapwood", options={"quantization": "w8a8_int8"}),
    }


def test_an_unknown_peer_is_told_which_there_are(write):
    with pytest.raises(ConfigError, match=r"unknown peer 'other'; known: .*mine.*transformers"):
        peer_specs(["other"], write("mine: {kind: server}"))


def test_an_unknown_kind_is_refused(write):
    with pytest.raises(ConfigError, match=r"each of a kind: .*server"):
        peer_specs(["mine"], write("mine: {kind: toaster}"))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("mine: {speed: 9}", "speed"),
        ("mine: {options: 3}", "options"),
        ("- mine", "object"),
        ("mine: [", ""),
    ],
)
def test_a_bad_file_is_named(write, text, complaint):
    with pytest.raises(ConfigError, match=rf"--peers-file .*peers\.yaml: .*{complaint}"):
        peer_specs(["mine"], write(text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        peer_specs(["mine"], tmp_path / "none.yaml")
