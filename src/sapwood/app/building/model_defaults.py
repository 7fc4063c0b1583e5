"""The defaults in a model's files: tokens that end an output, and sampling parameters."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import Any

from sapwood.base.errors import ConfigError, ModelSourceError
from sapwood.schema.sampling import DEFAULTABLE


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ModelSourceError if the file is missing or holds no object."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ModelSourceError(
            f"{path} is missing; a model directory needs a config.json"
        ) from error
    except OSError as error:
        raise ModelSourceError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelSourceError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelSourceError(f"{path} must hold a JSON object")
    return content


def read_json_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Errors inside the `with` block come from the contents of the file; give them its name."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}") from error
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise ConfigError(
            f"{path} makes no sense ({type(error).__name__}: {error}); download the model again"
        ) from error


def checkpoint_dtype(config: dict[str, Any]) -> str:
    """The data type of the weights according to config.json; float32 if it does not say."""
    given = config.get("dtype") if config.get("dtype") is not None else config.get("torch_dtype")
    if given is not None and not isinstance(given, str):
        raise ConfigError(
            f"config.json must have the name of a data type as 'dtype', got {given!r}"
        )
    return given or "float32"


def eos_token_ids(directory: Path, *, vocab_size: int) -> frozenset[int]:
    """All end-of-sequence ids of generation_config.json, or if it has none of config.json.

    Raises ModelSourceError if an id is not among the model's `vocab_size` tokens."""
    for name in ("generation_config.json", "config.json"):
        given = read_json_if_there(directory / name).get("eos_token_id")
        ids = given if isinstance(given, list) else [] if given is None else [given]
        if not all(_is_number(token_id, int) for token_id in ids):
            raise ModelSourceError(
                f"eos_token_id in {directory / name} is {given!r} but must be a token id, or a "
                "list of them"
            )
        unknown = [token_id for token_id in ids if not 0 <= token_id < vocab_size]
        if unknown:
            raise ModelSourceError(
                f"eos_token_id in {directory / name} is {unknown[0]}, but the model has only "
                f"{vocab_size} tokens; correct the file, or download the model again"
            )
        if ids:
            return frozenset(ids)
    return frozenset()


def sampling_defaults(directory: Path) -> dict[str, float]:
    """The model's own sampling defaults, for requests that do not set these parameters."""
    path = directory / "generation_config.json"
    generation = read_json_if_there(path)
    found: dict[str, float] = {}
    for name in DEFAULTABLE:
        value = generation.get(name)
        if value is None:
            continue
        if not _is_number(value, int | float):
            raise ModelSourceError(
                f"{name} in {path} is {value!r} but must be a number; correct the file, or start "
                "with --sampling-defaults openai"
            )
        found[name] = value
    if found.get("top_k") == 0:  # transformers' way to say "all"
        found["top_k"] = -1
    return found


def _is_number(value: object, kind: type | UnionType) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
