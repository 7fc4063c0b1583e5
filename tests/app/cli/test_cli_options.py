import click
import pytest
from click.testing import CliRunner

from sapwood.app.cli.options import (
    Asked,
    ConfigCommand,
    config_options,
    read_config_file,
)
from sapwood.base.errors import ConfigError
from sapwood.schema.config.engine import COMPONENTS, EngineConfig
from sapwood.schema.config.gateway import GatewayConfig
from sapwood.schema.config.listening import ListeningConfig
from sapwood.schema.config.memory import MemoryConfig
from sapwood.schema.config.model import ModelConfig
from sapwood.schema.config.observability import ObservabilityConfig
from sapwood.schema.config.options import option_specs
from sapwood.schema.config.server import ServerConfig


def ask(*args, env=None, configs=(*COMPONENTS, ServerConfig), only=None) -> Asked:
    """What a command with these options is called with."""
    seen = []

    @click.command(cls=ConfigCommand)
    @config_options(*configs, only=only)
    def command(asked):
        seen.append(asked)

    result = CliRunner().invoke(command, args, env=env, catch_exceptions=False)
    if result.exit_code:
        raise click.UsageError(result.output)
    return seen[0]


def test_nothing_given_gives_the_defaults():
    asked = ask()
    assert asked.given == {}
    assert asked.engine() == EngineConfig()
    assert asked.build(ServerConfig) == ServerConfig()


def test_flags_reach_their_configs():
    asked = ask("--page-size", "32", "--port=8000", "--schedule-policy", "fcfs", "--tp-size", "1")
    engine = asked.engine()
    assert engine.memory.page_size == 32
    assert engine.scheduler.schedule_policy == "fcfs"
    assert asked.build(ServerConfig).port == 8000


def test_a_number_may_be_negative():
    asked = ask("--chunked-prefill-size", "-1", "--tp-size", "1")
    assert asked.engine().scheduler.chunked_prefill_size == -1


@pytest.mark.parametrize("flag", ["--model", "--model-path"])
def test_a_flag_has_its_aliases(flag):
    assert ask(flag, "a/b").engine().model.model == "a/b"


@pytest.mark.parametrize("flag", ["--disable-radix-cache", "--disable-prefix-cache"])
def test_a_switch_turns_on_and_off(flag):
    negated = flag.replace("--", "--no-", 1)
    env = {"SAPWOOD_DISABLE_RADIX_CACHE": "1"}
    assert ask(flag).engine().memory.disable_radix_cache is True
    assert ask(env=env).engine().memory.disable_radix_cache is True
    assert ask(negated, env=env).engine().memory.disable_radix_cache is False


def test_flag_environment_file_default(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("port: 1\nhost: file\nlog-level: debug\n")
    env = {"SAPWOOD_PORT": "2", "SAPWOOD_HOST": "environment"}
    asked = ask("--config", str(file), "--port", "3", env=env)
    server = asked.build(ServerConfig)
    assert (server.port, server.host, server.log_level) == (3, "environment", "debug")
    assert server.drain_timeout == ServerConfig().drain_timeout
    assert asked.given["port"].source == "the command line"
    assert asked.given["host"].source == "the environment (SAPWOOD_HOST)"
    assert asked.given["log_level"].source == str(file)


def test_the_environment_may_name_the_file(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("page_size: 4")
    assert ask(env={"SAPWOOD_CONFIG": str(file)}).engine().memory.page_size == 4


def test_one_file_serves_commands_with_and_without_a_server(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("page_size: 4\nport: 8000\nmodel_path: x\n")
    asked = ask("--config", str(file), configs=[MemoryConfig])
    assert list(asked.given) == ["page_size"]


def test_an_unknown_key_is_refused(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("page_sise: 4")
    with pytest.raises(ConfigError, match="'page_sise'; did you mean page_size"):
        ask("--config", str(file))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--page-size", "many"], "page_size is 'many' (from the command line)"),
        (["--dtype", "int3"], "one of: auto, float32, bfloat16, float16"),
        (["--page-sise", "4"], "--page-size"),
    ],
)
def test_a_wrong_flag_is_wrong_usage(args, words):
    with pytest.raises(click.UsageError) as refused:
        ask(*args)
    assert words in " ".join(refused.value.message.split())


def test_only_some_flags_but_all_of_the_environment():
    asked = ask(
        "--revision", "main", env={"SAPWOOD_MODEL": "m"}, configs=[ModelConfig], only=["revision"]
    )
    assert asked.build(ModelConfig) == ModelConfig(model="m", revision="main")
    with pytest.raises(click.UsageError):
        ask("--model", "m", configs=[ModelConfig], only=["revision"])


def test_an_argument_can_stand_for_a_flag():
    asked = ask(env={"SAPWOOD_MODEL": "m"}).with_model("n")
    assert asked.engine().model.model == "n"
    assert asked.from_command_line([ModelConfig]) == ["--model"]


def test_a_model_is_given_once():
    assert ask("--model", "m").with_model(None).engine().model.model == "m"
    with pytest.raises(ConfigError, match="given twice, as n and by --model"):
        ask("--model", "m").with_model("n")


def test_help_lists_options_and_not_arguments():
    @click.command(cls=ConfigCommand)
    @click.argument("name", required=False)
    @config_options(MemoryConfig)
    def command(name, asked):
        raise NotImplementedError

    shown = CliRunner().invoke(command, ["--help"]).output
    assert "[NAME]" in shown.splitlines()[0]
    assert "[NAME]" not in shown.partition("Options:")[2]


def test_flags_of_the_command_line_are_known():
    asked = ask("--page-size", "4", "--port", "1", env={"SAPWOOD_DTYPE": "float32"})
    assert asked.from_command_line(COMPONENTS) == ["--page-size"]


def test_two_configs_with_one_name_are_a_bug():
    with pytest.raises(TypeError, match="page_size"):
        config_options(MemoryConfig, MemoryConfig)


def test_help_tells_all_of_an_option():
    @click.command(cls=ConfigCommand)
    @click.option("--extra", help="Of the command itself.")
    @config_options(*COMPONENTS, ServerConfig)
    def command(asked, extra):
        pass

    text = CliRunner().invoke(command, ["--help"]).output
    titles = [line for line in text.splitlines() if line.endswith(":") and line[0] != " "]
    assert titles == [
        "Options:",
        "Model:",
        "Memory:",
        "Tiers:",
        "Scheduler:",
        "Execution:",
        "Parallel:",
        "Disaggregation:",
        "Grammar:",
        "Speculation:",
        "Drafting:",
        "Lora:",
        "Vision:",
        "Media:",
        "Server:",
    ]
    words = " ".join(text.split())
    assert "--extra TEXT Of the command itself." in words
    assert "--disable-radix-cache, --disable-prefix-cache Keep no prefixes" in words
    assert "[seconds; default: 30.0; env: SAPWOOD_DRAIN_TIMEOUT]" in words
    assert "[auto|float32|bfloat16|float16]" in words
    assert "A flag wins over the environment" in words
    for config in (*COMPONENTS, ServerConfig):
        for spec in option_specs(config):
            # A name that is longer than its column is broken there.
            assert spec.env in "".join(text.split())
            assert spec.flag in words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n- b\n", "holds no mapping"),
        ("just text", "holds no mapping"),
        ("a: [1", "is not YAML"),
        ("port: 1\nhost: x\nport: 2\n", "'port' twice"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text, words):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words) as refused:
        read_config_file(file)
    assert str(file) in refused.value.message


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config_file(tmp_path / "none.yaml")


@pytest.mark.parametrize("text", ["", "# only a comment\n"])
def test_an_empty_file_gives_nothing(tmp_path, text):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    assert read_config_file(file) == {}


def test_a_gateway_takes_nothing_that_was_set_for_an_engine(tmp_path):
    def keys(*configs):
        return {key for one in configs for spec in option_specs(one) for key in spec.file_keys}

    # What both listen and trace with, and a directory in which their files have other names.
    same = keys(ListeningConfig) | {"state_dir", "enable_trace", "otlp_traces_endpoint"}
    engines = keys(*COMPONENTS, ServerConfig, ObservabilityConfig)
    assert keys(GatewayConfig) & engines <= same
    file = tmp_path / "config.yaml"
    file.write_text("tool_call_parser: qwen25\nchat_template: chatml\nmodel_path: /m\n")
    env = {"SAPWOOD_REASONING_PARSER": "qwen3", "SAPWOOD_TOKENIZER_PATH": "/t"}
    config = ask("--config", str(file), env=env, configs=(GatewayConfig,)).build(GatewayConfig)
    assert (config.makes_chats, config.tokenizer_source) == (False, None)
    env = {"SAPWOOD_GATEWAY_REASONING_PARSER": "qwen3", "SAPWOOD_GATEWAY_MODEL_PATH": "/m"}
    config = ask("--config", str(file), env=env, configs=(GatewayConfig,)).build(GatewayConfig)
    assert (config.reasoning_parser, config.tokenizer_source) == ("qwen3", "/m")
