"""Flags, --config and SAPWOOD_* variables of a command, generated from typed configs.

    @click.command(cls=ConfigCommand)
    @config_options(*COMPONENTS)
    def check(asked: Asked) -> None:
        engine: EngineConfig = asked.engine()

A value is taken from the first that has it: flag, environment, file, default.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sapwood.app.cli.peer_flags import (
    Hint,
    file_without_peer_keys,
    say_hints,
    without_peer_flags,
)
from sapwood.app.cli.suggestions import flag_hint
from sapwood.base.errors import ConfigError
from sapwood.schema.config.engine import COMPONENTS, EngineConfig
from sapwood.schema.config.gateway import GatewayConfig
from sapwood.schema.config.observability import ObservabilityConfig
from sapwood.schema.config.options import (
    ENV_PREFIX,
    Given,
    OptionSpec,
    build,
    gather_given,
    option_specs,
)
from sapwood.schema.config.painting import PaintingConfig
from sapwood.schema.config.server import ServerConfig
from sapwood.schema.env import environment

SHARED_CONFIGS: tuple[type, ...] = (
    *COMPONENTS,
    ServerConfig,
    ObservabilityConfig,
    GatewayConfig,
    PaintingConfig,
)
"""Configs whose keys every --config file may have, so that all commands can share one file."""

EPILOG = (
    f"Each option under a component's name can also be set as {ENV_PREFIX}<NAME> in the "
    "environment, or as `name: value` in the YAML file of --config. A flag wins over the "
    "environment, the environment over the file. Each switch has a --no- form that turns it off."
)

_HINTS = "sapwood.hints"
"""The key of click's context under which a command line's hints lie."""

C = TypeVar("C")
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Asked:
    """All options that were given in any place; an option not in `given` has its default."""

    given: Mapping[str, Given]
    hints: tuple[Hint, ...] = ()
    """Flags of SGLang that have nothing to choose here."""

    def build(self, config: type[C]) -> C:
        return build(config, {name: item.value for name, item in self.given.items()})

    def with_model(self, name: str | None) -> Asked:
        """The same options with --model NAME, if the command was given NAME as its argument.

        Raises ConfigError if --model was given as well."""
        if name is None:
            return self
        model = self.given.get("model")
        if model is not None and model.source == "the command line":
            raise ConfigError(f"the model is given twice, as {name} and by --model; leave one out")
        given = {**self.given, "model": Given(name, "the command line")}
        return Asked(given, self.hints)

    def engine(self) -> EngineConfig:
        return EngineConfig.of({name: item.value for name, item in self.given.items()})

    def from_command_line(self, configs: Sequence[type]) -> list[str]:
        """The flags of these configs that were given on the command line."""
        specs = [spec for config in configs for spec in option_specs(config)]
        return [
            spec.flag
            for spec in specs
            if spec.name in self.given and self.given[spec.name].source == "the command line"
        ]


if TYPE_CHECKING:
    _ParamType = click.ParamType[Any]
else:  # a plain class before click 8.3
    _ParamType = click.ParamType


class SpecType(_ParamType):
    """Reads a flag's value as its config says."""

    def __init__(self, spec: OptionSpec) -> None:
        self.spec = spec
        self.name = spec.type.__name__

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self.spec.parse(value, source="the command line")
        except ConfigError as error:
            raise click.UsageError(error.message, ctx) from error


class ConfigOption(click.Option):
    """A flag that is generated from a config; help lists it under the heading `component`."""

    def __init__(self, spec: OptionSpec, component: str) -> None:
        self.spec = spec
        self.component = component
        is_flag = spec.type is bool
        # Where there is a flag_value, click takes the -1 of `--option -1` for another option.
        bare: dict[str, Any] = {} if spec.bare is None else {"flag_value": spec.bare}
        super().__init__(
            [spec.name, *flags_of(spec)],
            # None means "not given here": the environment and the file are asked next.
            default=None,
            type=bool if is_flag else SpecType(spec),
            metavar=None if is_flag else metavar_of(spec),
            is_flag=is_flag,
            help=spec.help,
            **bare,
        )

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        spec = self.spec
        names = ", ".join(f"--{name}" for name in names_of(spec))
        value = "" if spec.type is bool else f" {metavar_of(spec)}"
        value = value if spec.bare is None else f" [{metavar_of(spec)}]"
        return f"{names}{value}", f"{spec.help}  [{notes_of(spec)}]"


class ConfigCommand(click.Command):
    """A command that lists its options by component, and knows the names that peers give them."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        specs = [param.spec for param in self.get_params(ctx) if isinstance(param, ConfigOption)]
        many = {flag for spec in specs if spec.many for flag in flags_of(spec)}
        args = self._without_peer_flags(ctx, args)
        try:
            return super().parse_args(ctx, joined_values(args, many))
        except click.NoSuchOption as error:
            flags = {flag for param in self.get_params(ctx) for flag in param.opts}
            hint = flag_hint(error.option_name, flags)
            message = f"{self.name} has no option {error.option_name}{hint}"
            raise click.UsageError(message, ctx) from error

    def _without_peer_flags(self, ctx: click.Context, args: list[str]) -> list[str]:
        """The arguments without SGLang's flags, whose hints are kept for `Asked`."""
        params = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        own = {flag for param in params for flag in (*param.opts, *param.secondary_opts)}
        valued = [p for p in params if not p.is_flag and not p._flag_needs_value]
        own_with_value = {
            flag
            for param in valued
            if not (isinstance(param, ConfigOption) and param.spec.many)
            for flag in param.opts
        }
        try:
            kept, hints = without_peer_flags(args, own, own_with_value)
        except ConfigError as error:
            raise click.UsageError(f"{self.name}: {error.message}", ctx) from error
        ctx.meta[_HINTS] = tuple(hints)
        return kept

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Options": []}
        for param in self.get_params(ctx):
            if isinstance(param, click.Argument):
                continue  # the usage line has its name, and the description its meaning
            record = param.get_help_record(ctx)
            if record is not None:
                title = param.component if isinstance(param, ConfigOption) else "Options"
                sections.setdefault(title, []).append(record)
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl(rows)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_epilog(ctx, formatter)
        formatter.write_paragraph()
        formatter.write_text(EPILOG)


def joined_values(args: Sequence[str], flags: Collection[str]) -> list[str]:
    """The same arguments; those that follow one of `flags`, up to the next flag, become one, a line
    each, and so do those of the same flag given again: click knows no option with any number of
    values."""
    found: list[str] = []
    places: dict[str, int] = {}
    rest = deque(args)
    while rest:
        found.append(rest.popleft())
        flag, equals, value = found[-1].partition("=")
        if flag not in flags:
            continue
        values = [value] if equals else []
        while rest and not rest[0].startswith("-"):
            values.append(rest.popleft())
        found[-1] = flag
        if not values:
            continue
        if flag in places:
            found.pop()
            found[places[flag]] += "\n" + "\n".join(values)
        else:
            places[flag] = len(found)
            found.append("\n".join(values))
    return found


def config_options(
    *configs: type, only: Collection[str] | None = None
) -> Callable[[F], Callable[..., Any]]:
    """Give a command the options of these configs and --config; it gets them as `asked: Asked`.

    only  names of options with a flag; others are still read from the environment and the file
    """
    shown = [
        (spec, config)
        for config in configs
        for spec in option_specs(config)
        if only is None or spec.name in only
    ]
    names = [spec.name for spec, _ in shown]
    if len(set(names)) < len(names):
        raise TypeError(f"two of these configs share an option: {sorted(names)}")

    def decorate(function: F) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*, config_file: str | None, **values: Any) -> Any:
            flags = {name: value for name in names if (value := values.pop(name)) is not None}
            asked = read_asked(configs, flags, config_file)
            strict = asked.given.get("strict_flags")
            say_hints(asked.hints, is_strict=strict is not None and bool(strict.value))
            return function(asked=asked, **values)

        params: list[click.Parameter] = getattr(call, "__click_params__", [])
        own = [ConfigOption(spec, component_title(config)) for spec, config in shown]
        # click keeps the parameters of a function in reverse, as decorators are applied.
        call.__click_params__ = [*reversed([config_file_option(), *own]), *params]  # type: ignore[attr-defined]
        return call

    return decorate


def read_asked(configs: Sequence[type], flags: Mapping[str, Any], config_file: str | None) -> Asked:
    """Flags, then the environment, then the file, which SAPWOOD_CONFIG may name too."""
    env = environment()
    path = config_file or env.get(f"{ENV_PREFIX}CONFIG") or None
    elsewhere = [config for config in SHARED_CONFIGS if config not in configs]
    known = {
        key
        for config in (*configs, *elsewhere)
        for spec in option_specs(config)
        for key in spec.file_keys
    }
    content = {} if path is None else read_config_file(Path(path))
    file, hints = file_without_peer_keys(content, known)
    given = gather_given(
        configs,
        flags=flags,
        env=env,
        file=file,
        file_name=path or "",
        known_elsewhere=elsewhere,
    )
    context = click.get_current_context(silent=True)
    from_flags = () if context is None else context.meta.get(_HINTS, ())
    return Asked(given, (*from_flags, *hints))


def read_config_file(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; ConfigError if the file holds no mapping, or a key twice."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the config file {path} cannot be read: {error}") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the config file {path} is not YAML: {error}") from error
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode) or not isinstance(content, dict):
        raise ConfigError(
            f"the config file {path} holds no mapping; write one `name: value` per line"
        )
    keys = [key.value for key, _ in node.value]
    twice = sorted({str(key) for key in keys if keys.count(key) > 1})
    if twice:
        raise ConfigError(f"the config file {path} has the key {twice[0]!r} twice; keep one")
    return content


def config_file_option() -> click.Option:
    return click.Option(
        ["--config", "config_file"],
        metavar="FILE",
        help=f"YAML file with further options.  [env: {ENV_PREFIX}CONFIG]",
    )


def names_of(spec: OptionSpec) -> list[str]:
    return [spec.name.replace("_", "-"), *spec.aliases]


def flags_of(spec: OptionSpec) -> list[str]:
    """All spellings of an option's flag; a switch has a --no- form, to overrule a file."""
    if spec.type is bool:
        return [f"--{name}/--no-{name}" for name in names_of(spec)]
    return [f"--{name}" for name in names_of(spec)]


def metavar_of(spec: OptionSpec) -> str:
    if spec.choices:
        return f"[{'|'.join(spec.choices)}]"
    return {int: "N", float: "X", str: "TEXT"}[spec.type]


def notes_of(spec: OptionSpec) -> str:
    """What a help text says in brackets: unit, default and environment variable."""
    unit = [spec.unit] if spec.unit else []
    # Some options explain in words what happens when they are not given.
    default = [] if "default:" in spec.help else [f"default: {default_of(spec)}"]
    return "; ".join([*unit, *default, f"env: {spec.env}"])


def default_of(spec: OptionSpec) -> str:
    """An option's default in words."""
    if spec.default is None:
        return "auto"
    if spec.type is bool:
        return "on" if spec.default else "off"
    return str(spec.default) or "none"


def component_title(config: type) -> str:
    """ "Memory" for MemoryConfig."""
    return config.__name__.removesuffix("Config").removesuffix("Options")
