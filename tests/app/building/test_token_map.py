from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from sapwood.app.building.token_map import read_token_map
from sapwood.base.errors import ConfigError


def test_lists_and_tensors_are_read(tmp_path: Path) -> None:
    torch.save([5, 2, 9], tmp_path / "list.pt")
    torch.save(torch.tensor([5, 2, 9], dtype=torch.int32), tmp_path / "tensor.pt")
    (tmp_path / "list.json").write_text("[5, 2, 9]")
    for name in ("list.pt", "tensor.pt", "list.json"):
        assert read_token_map(tmp_path / name, 10) == (5, 2, 9)


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('code of the file ran')",))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", b"[1, 2", "is no JSON"),
        ("a.json", b"[" * 100_000, "is no JSON"),
        ("a.json", b'{"1": 2}', "is no list of token ids"),
        ("a.json", b"[]", "is no list of token ids"),
        ("a.json", b"[true]", "is no list of token ids"),
        ("a.json", b"[1, 10]", "has the token 10, but the model has 10 tokens"),
        ("a.json", b"[1, -1]", "has the token -1"),
        ("a.json", b"[1, 1]", "has a token twice"),
        ("a.pt", b"no archive", "neither .json nor a file of torch.save"),
        ("a.pt", pickle.dumps(Harmful()), "neither .json nor a file of torch.save"),
    ],
)
def test_other_files_are_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_token_map(tmp_path / name, 10)
    assert said in caught.value.message
    assert str(tmp_path / name) in caught.value.message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="download the file first"):
        read_token_map(tmp_path / "none.pt", 10)
