"""Arguments of SGLang's `Engine` as options of sapwood."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from typing import Any

from sapwood.app.cli.peer_flags import file_without_peer_keys
from sapwood.base.errors import ConfigError
from sapwood.schema.config.engine import COMPONENTS
from sapwood.schema.config.observability import ObservabilityConfig
from sapwood.schema.config.options import OptionSpec, option_specs
from sapwood.schema.config.server import ServerConfig

log = logging.getLogger(__name__)


def engine_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `sapwood.LLM` for the arguments of SGLang's Engine.

    server_args among them is a dataclass of such arguments; those with their defaults count as not
    given, and so does None. What only a server or SGLang's kernels would need is logged. Raises
    ConfigError for an argument that asks for what sapwood does not do.
    """
    asked = {**_of_dataclass(given.get("server_args")), **given}
    asked.pop("server_args", None)
    level = asked.pop("log_level", None)
    if level is not None:
        logging.getLogger("sapwood").setLevel(str(level).upper())
    specs = {
        key: spec
        for config in COMPONENTS
        for spec in option_specs(config)
        for key in spec.file_keys
    }
    of_server = {
        key
        for config in (ServerConfig, ObservabilityConfig)
        for spec in option_specs(config)
        for key in spec.file_keys
    }
    kept, hints = file_without_peer_keys(asked, {*specs, *of_server})
    for hint in hints:
        log.info("%s has nothing to choose here: %s", hint.written, hint.says)
    found: dict[str, Any] = {}
    for name, value in kept.items():
        if value is None:
            continue
        if name in specs:
            found[specs[name].name] = _joined(specs[name], value)
        elif name in of_server:
            log.info("%s is for a server, and an Engine listens nowhere", name)
        else:
            raise ConfigError(f"Engine has no argument {name!r}; see docs/configuration.md")
    if "model" not in found:
        raise ConfigError("Engine needs a model_path")
    return found


def _of_dataclass(server_args: Any) -> dict[str, Any]:
    if server_args is None:
        return {}
    if not dataclasses.is_dataclass(server_args):
        raise ConfigError("server_args must be a dataclass, as SGLang's ServerArgs")
    return {
        field.name: value
        for field in dataclasses.fields(server_args)
        if (value := getattr(server_args, field.name)) != field.default
    }


def _joined(spec: OptionSpec, value: Any) -> Any:
    """Several values as a command line gives them to one flag; one value as it is."""
    if not isinstance(value, list | tuple | dict):
        return value
    listed = [f"{key}={one}" for key, one in value.items()] if isinstance(value, dict) else value
    items = [json.dumps(one) if isinstance(one, dict) else one for one in listed]
    if not all(isinstance(item, str | int) for item in items):
        raise ConfigError(f"{spec.name} must be a list of texts or numbers")
    return ("\n" if spec.many else ",").join(map(str, items))
