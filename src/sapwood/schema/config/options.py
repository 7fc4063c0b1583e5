"""Fields of a config struct that are also flags, environment variables and keys of a YAML file.

A value is taken from the first that has it: the command line, the environment (SAPWOOD_<NAME>),
the file of --config, the default. An empty environment variable counts as not set. Where two
commands mean different things by one flag, one of them has another name for it in the environment
and in the file: both are shared by all commands.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from sapwood.base.errors import ConfigError
from sapwood.base.registry import plugin_names

ENV_PREFIX = "SAPWOOD_"
_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})
_TYPE_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text (quote it if it looks like a number)",
}

C = TypeVar("C")


def option(
    default: Any,
    help: str,  # noqa: A002 - the word that every command line uses
    *,
    choices: Sequence[str] = (),
    plugins: str = "",
    lacking: Mapping[str, str] | None = None,
    aliases: Sequence[str] = (),
    unit: str = "",
    bare: str | None = None,
    secret: bool = False,
    many: bool = False,
    scope: str = "",
    peer_env: str = "",
) -> Any:
    """A field of a config struct.

    choices  the values it may have, if they can be listed
    plugins  group of entry points whose names are choices too: those of packages beside sapwood
    lacking  values that it has elsewhere and not here, each with the reason and the way out
    aliases  further flag names without dashes in front ("model-path")
    unit     what a number counts ("tokens", "seconds")
    bare     the value of the flag when none follows it; None: one must
    secret   the value is not shown where the struct is printed, nor in an error
    many     on a command line several values may follow the flag; they become the value's lines
    peer_env  SGLang's variable of the environment, read where sapwood's own is not set
    scope    stands before the name in the environment and in a file ("gateway": gateway_model_path)
    """
    return dataclasses.field(
        default=default,
        repr=not secret,
        metadata={
            "help": help,
            "choices": tuple(choices),
            "plugins": plugins,
            "lacking": tuple((lacking or {}).items()),
            "aliases": tuple(aliases),
            "unit": unit,
            "bare": bare,
            "secret": secret,
            "many": many,
            "scope": scope,
            "peer_env": peer_env,
        },
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionSpec:
    """One option as the command line, the environment and the docs see it."""

    name: str
    type: type
    optional: bool
    default: Any
    help: str
    choices: tuple[str, ...]
    aliases: tuple[str, ...]
    unit: str
    bare: str | None = None
    secret: bool = False
    many: bool = False
    scope: str = ""
    peer_env: str = ""
    lacking: tuple[tuple[str, str], ...] = ()
    plugins: str = ""

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def env(self) -> str:
        return ENV_PREFIX + self.file_keys[0].upper()

    @property
    def file_keys(self) -> tuple[str, ...]:
        """The keys that a file may have for it; the first one is its own name."""
        names = (self.name, *(alias.replace("-", "_") for alias in self.aliases))
        return tuple(f"{self.scope}_{name}" for name in names) if self.scope else names

    def parse(self, value: Any, *, source: str) -> Any:
        """`value` (text, or what YAML made of it) as this option's type; ConfigError if not one."""
        if value is None and self.optional:
            return None
        parsed = _as_type(value, self.type)
        complaint = self._why_not(value if parsed is None else parsed)
        if complaint is not None:
            shown = self._shown(value)
            raise ConfigError(f"{self.name} is {shown} (from {source}) but {complaint}")
        return parsed

    def check(self, value: Any) -> None:
        """ConfigError if a struct cannot have `value` for this option."""
        if value is None and self.optional:
            return
        complaint = self._why_not(value)
        if complaint is not None:
            raise ConfigError(f"{self.flag} is {self._shown(value)} but {complaint}")

    def _shown(self, value: Any) -> str:
        return "(not shown)" if self.secret else repr(value)

    def _why_not(self, value: Any) -> str | None:
        accepted = (int, float) if self.type is float else self.type
        is_stray_bool = isinstance(value, bool) and self.type is not bool
        if not isinstance(value, accepted) or is_stray_bool:
            return f"must be {_TYPE_WORDS[self.type]}"
        if isinstance(value, float) and math.isnan(value):
            return "must be a number"
        if self.choices and value not in self.choices:
            plugins = plugin_names(self.plugins) if self.plugins else []
            if value in plugins:
                return None
            known = f"must be one of: {', '.join((*self.choices, *plugins))}"
            return next((why for name, why in self.lacking if name == value), known)
        return None


def option_specs(config: type) -> tuple[OptionSpec, ...]:
    """The options of a config struct, in the order of its fields."""
    return _option_specs(cast(Hashable, config))


def check_options(config: Any) -> None:
    """ConfigError if a field of a config struct has the wrong type or is not among its choices.

    For structs that are built in Python; what `gather` returns has been checked by `parse`.
    """
    for spec in option_specs(type(config)):
        spec.check(getattr(config, spec.name))


@dataclass(frozen=True, slots=True)
class Given:
    """A value that somebody gave, and where: "the command line", "the environment (…)", a file."""

    value: Any
    source: str


def gather(
    configs: Sequence[type],
    *,
    flags: Mapping[str, Any],
    env: Mapping[str, str],
    file: Mapping[str, Any],
    file_name: str = "the config file",
) -> dict[str, Any]:
    """`gather_given` without the sources: what `build` takes."""
    given = gather_given(configs, flags=flags, env=env, file=file, file_name=file_name)
    return {name: item.value for name, item in given.items()}


def gather_given(
    configs: Sequence[type],
    *,
    flags: Mapping[str, Any],
    env: Mapping[str, str],
    file: Mapping[str, Any],
    file_name: str = "the config file",
    known_elsewhere: Sequence[type] = (),
) -> dict[str, Given]:
    """One value per option that was given anywhere; names are unique over all `configs`.

    flags            option name -> value, only those given on the command line
    env              the process's environment
    file             the parsed YAML mapping; keys with "-" or "_"; an unknown key is a ConfigError
    known_elsewhere  configs of other commands that may share the file; their keys are passed over
    """
    specs = {spec.name: spec for config in configs for spec in option_specs(config)}
    by_any_name = {alias: spec for spec in specs.values() for alias in spec.file_keys}
    others = {
        name
        for config in known_elsewhere
        for spec in option_specs(config)
        for name in spec.file_keys
    }
    given: dict[str, Given] = {}
    for key, value in file.items():
        plain_key = str(key).replace("-", "_")
        spec = by_any_name.get(plain_key)
        if spec is None and plain_key in others:
            continue
        if spec is None:
            raise ConfigError(_unknown(str(key), {*by_any_name, *others}, file_name))
        if spec.name in given:
            raise ConfigError(f"{file_name} gives {spec.name} twice; keep one of its names")
        given[spec.name] = Given(spec.parse(value, source=file_name), file_name)
    for spec in specs.values():
        variable = spec.env if env.get(spec.env) else spec.peer_env
        if variable and env.get(variable):
            source = f"the environment ({variable})"
            given[spec.name] = Given(spec.parse(env[variable], source=source), source)
    for name, value in flags.items():
        if name in specs:
            given[name] = Given(value, "the command line")
    return given


def build(config: type[C], values: Mapping[str, Any]) -> C:
    """A config struct from the values that are its own."""
    own = {spec.name for spec in option_specs(config)}
    return config(**{name: value for name, value in values.items() if name in own})


def decided(config: type[C], asked: Any, **values: Any) -> C:
    """A resolved struct: what was asked, with the values of what has been decided.

    config  a subclass of the asked struct's class that declares the decided options once more,
            with types that have no None
    Raises  ConfigError if one of these is still None
    """
    given = {field.name: getattr(asked, field.name) for field in dataclasses.fields(asked)}
    return config(**{**given, **values})


@functools.cache
def _option_specs(config: Any) -> tuple[OptionSpec, ...]:
    hints = typing.get_type_hints(config)
    described = {
        field.name: field
        for base in reversed(config.__mro__)
        if dataclasses.is_dataclass(base)
        for field in dataclasses.fields(base)
        if field.metadata
    }
    return tuple(_spec(field, hints[field.name]) for field in described.values())


def _spec(field: dataclasses.Field[Any], hint: Any) -> OptionSpec:
    """hint: the option's type, which a subclass may have narrowed"""
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    plain = [member for member in members if member is not type(None)]
    return OptionSpec(
        name=field.name,
        type=plain[0],
        optional=len(plain) < len(members),
        default=field.default,
        help=field.metadata["help"],
        choices=field.metadata["choices"],
        aliases=field.metadata["aliases"],
        unit=field.metadata["unit"],
        bare=field.metadata["bare"],
        secret=field.metadata["secret"],
        many=field.metadata["many"],
        scope=field.metadata["scope"],
        peer_env=field.metadata["peer_env"],
        lacking=field.metadata["lacking"],
        plugins=field.metadata["plugins"],
    )


def _unknown(key: str, known: Iterable[str], file_name: str) -> str:
    close = difflib.get_close_matches(key.replace("-", "_"), sorted(known), n=3)
    hint = f"; did you mean {', '.join(close)}?" if close else ""
    return f"{file_name} has the unknown key {key!r}{hint}"


def _as_type(value: Any, wanted: type) -> Any:
    """`value` as `wanted`, or None where that would change what was written (3.5 as an int)."""
    if wanted is bool:
        word = str(value).lower()
        return True if word in _TRUE else False if word in _FALSE else None
    if wanted is str:
        return value if isinstance(value, str) else None
    if isinstance(value, bool) or (wanted is int and isinstance(value, float)):
        return None
    try:
        return wanted(value)
    except (TypeError, ValueError):
        return None
