"""Reads which tokens a draft head may guess."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from sapwood.base.errors import ConfigError

_MAX_BYTES = 1 << 26


def read_token_map(path: Path, vocab_size: int) -> tuple[int, ...]:
    """The token ids in a file: a list or a tensor that torch.save wrote, or a list in JSON.

    Raises ConfigError if there is no such file, or if it is no list of different tokens that the
    model has"""
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise ConfigError(
                f"{_named(path)} has {size} bytes, but a list of tokens has at most {_MAX_BYTES}; "
                "is it another file?"
            )
        found = _read(path)
    except OSError as error:
        raise ConfigError(
            f"{_named(path)} cannot be read ({error.strerror}); download the file first, and name "
            "its path"
        ) from error
    # With a stride of 0, a single number in the file could become a list of any length.
    is_tensor = isinstance(found, torch.Tensor) and found.numel() <= vocab_size
    token_ids = found.tolist() if is_tensor else found
    if not isinstance(token_ids, list) or not token_ids or not all(map(_is_int, token_ids)):
        raise ConfigError(f"{_named(path)} is no list of token ids; choose another file")
    wrong = next((one for one in token_ids if not 0 <= one < vocab_size), None)
    if wrong is not None:
        raise ConfigError(
            f"{_named(path)} has the token {wrong}, but the model has {vocab_size} tokens; choose "
            "the file for this model"
        )
    if len(set(token_ids)) < len(token_ids):
        raise ConfigError(f"{_named(path)} has a token twice; choose another file")
    return tuple(token_ids)


def _read(path: Path) -> Any:
    if path.suffix == ".json":
        try:
            return json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{_named(path)} is no JSON: {error}") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # given garbage, an unpickler raises errors of every kind
        raise ConfigError(
            f"{_named(path)} is neither .json nor a file of torch.save with numbers alone: "
            f"{str(error).strip().splitlines()[:1]}"
        ) from error


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _named(path: Path) -> str:
    return f"--speculative-token-map {path}"
