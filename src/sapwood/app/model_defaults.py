"""What a model's files say about generation: where an output ends, and how it is sampled."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import Any

from sapwood.base.errors import ConfigError, ModelSourceError

SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def read_json(path: Path) -> dict[str, Any]:
    """That file's object; ModelSourceError if it is missing or is no JSON object."""
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
    """Errors of the body are of what that file says, and name it."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}") from error
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise ConfigError(
            f"{path} makes no sense ({type(error).__name__}: {error}); download the model again"
        ) from error


def checkpoint_dtype(config: dict[str, Any]) -> str:
    """The data type that config.json gives its weights; float32 if it does not say."""
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def eos_token_ids(directory: Path) -> frozenset[int]:
    """All end-of-sequence ids of generation_config.json; of config.json if it names none."""
    for name in ("generation_config.json", "config.json"):
        given = read_json_if_there(directory / name).get("eos_token_id")
        ids = given if isinstance(given, list) else [] if given is None else [given]
        if not all(_is_number(token_id, int) for token_id in ids):
            raise ModelSourceError(
                f"eos_token_id in {directory / name} is {given!r} but must be a token id, or a "
                "list of them"
            )
        if ids:
            return frozenset(ids)
    return frozenset()


def sampling_defaults(directory: Path) -> dict[str, float]:
    """The model's own sampling defaults, for requests that leave them open."""
    generation = read_json_if_there(directory / "generation_config.json")
    found = {
        name: generation[name]
        for name in SAMPLING_DEFAULTS
        if _is_number(generation.get(name), int | float)
    }
    if found.get("top_k") == 0:  # transformers' way to say "all"
        found["top_k"] = -1
    return found


def _is_number(value: object, kind: type | UnionType) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
