"""The documentation is right: what it names exists, and what it shows works."""

from __future__ import annotations

import ast
import json
import re
import shlex
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import httpx
import pytest

from sapwood.app.cli.llama_cpp_flags import LLAMA_CPP_ROWS
from sapwood.app.cli.main import COMMANDS, cli
from sapwood.app.cli.options import ConfigOption
from sapwood.app.cli.peer_flag import Fate
from sapwood.app.cli.vllm_flags import VLLM_ROWS
from sapwood.store import ModelFiles
from tests.app.gateway.test_assembly import gateway, read_until
from tests.e2e.server import serving
from tests.painting_models import flux, saved

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "sapwood"
PAGES = [
    ROOT / "README.md",
    ROOT / "ARCHITECTURE.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
EXAMPLE_URL = "http://127.0.0.1:30000"
EMBEDDING_URL = "http://127.0.0.1:30001"
PAINTING_URL = "http://127.0.0.1:30002"
AUDIO_URL = "http://127.0.0.1:30003"
"""Its forms are sent by tests/e2e/test_audio.py."""
EDITING_URL = "http://127.0.0.1:30005"
"""Its pictures and adapters are sent by tests/e2e/test_painting.py and tests/frontends/images."""
VIDEO_URL = "http://127.0.0.1:30006"
"""Its videos are asked for by tests/e2e/test_videos.py."""
SIGHT_URL = "http://127.0.0.1:30004"
"""Its requests are sent by tests/e2e/test_images.py, with pictures that need no Internet."""
GATEWAY_URL = "http://127.0.0.1:8000"
"""Where the pages have a server of an embedding model."""
ROOMS = sorted(path.name for path in SOURCE.iterdir() if (path / "__init__.py").is_file())
PATH_SUFFIXES = "py|pyi|md|toml|cpp|h|jinja|js|css|html|png|svg"
FOREIGN_FLAGS = {"--strict", "--max-examples", "--max-model-len"}
FOREIGN_FLAGS |= {"--enable-dp-attention", "--moe-a2a-backend"}
FOREIGN_FLAGS |= {
    "--diffusion-model",
    "--type",
    "--steps",
    "--cfg-scale",
    "-m",
    "-p",
    "-o",
    "-s",
    "-n",
}
"""Flags of other programs that the pages mention: mypy, pytest, vLLM, SGLang, sd.cpp."""

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
PEER_FLAGS = [*VLLM_ROWS.values(), *LLAMA_CPP_ROWS.values()]


# ---- reading pages -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line that it begins in."""

    language: str
    text: str
    line: int


def blocks(text: str) -> list[Block]:
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [Block(one[1], one[2], text.count("\n", 0, one.start()) + 2) for one in found]


def prose(text: str) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def code_spans(text: str) -> list[str]:
    """Inline code, with line breaks as spaces."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(text))]


def own_words(page: Path) -> str:
    """The page without what it says about other servers and clients.

    In a page about coming from another server the first cell of a table's row is about that server;
    and so are the commands and settings of clients, and the last section about pictures.
    """
    text = page.read_text("utf-8")
    if page.name.startswith("coming-from-"):
        return re.sub(r"^\|[^|]*\|", "|", text, flags=re.MULTILINE)
    if page.name == "images.md":
        return text.partition("## From SGLang")[0]
    if page.name == "clients.md":
        return re.sub(r"^\|.*\|$", "", text, flags=re.MULTILINE)
    return text


def named_paths(text: str) -> set[str]:
    """What reads as a file or folder of this repository, in prose, blocks and diagrams."""
    rooms = "|".join(ROOMS)
    patterns = (
        r"(?<![\w./:~-])((?:src|tests|docs)/[\w./-]*\w/?)",
        rf"(?<![\w./:~-])((?:{rooms})/[\w./-]*\.(?:{PATH_SUFFIXES}))\b",
        rf"`((?:{rooms})/(?:[\w.-]+/)*)`",
    )
    return {path for pattern in patterns for path in re.findall(pattern, text)}


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    kept = re.sub(r"[^\w\s-]", "", heading.replace("`", "").strip().lower())
    return re.sub(r"\s", "-", kept)


def anchors(text: str) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)}


def shell_commands(text: str) -> Iterator[list[str]]:
    """Each command of the page's shell blocks as words: variables, redirections and & are gone."""
    for block in blocks(text):
        if block.language in ("sh", "bash", "shell", "console"):
            yield from commands_of(block.text)


def commands_of(script: str) -> Iterator[list[str]]:
    # Comments go first: shlex would take the end of their line with them.
    script = re.sub(
        r"""('[^']*'|"(?:\\.|[^"\\])*")|(?<!\S)#[^\n]*""", lambda found: found[1] or "", script
    )
    lexer = shlex.shlex(script.replace("\\\n", " "), posix=True, punctuation_chars="();<>|&\n")
    lexer.commenters = ""
    lexer.whitespace = " \t\r"
    lexer.whitespace_split = True
    words: list[str] = []
    skip_next = False
    for token in [*lexer, "\n"]:
        if set(token) <= set("();|&\n"):
            if words:
                yield words
            words = []
        elif set(token) <= set("<>"):
            skip_next = True
        elif skip_next:
            skip_next = False
        elif words or not re.fullmatch(r"\w+=.*", token, re.DOTALL):
            words.append(token)


# ---- what reading finds --------------------------------------------------------------------------


def test_reading_finds_what_it_should() -> None:
    page = (
        "# A `b` c!\nSee `engine/loop.py`, src/sapwood/app/ and [x](docs/a.md), not "
        "http://h/docs/b nor text/plain.\n```sh\n# it's ./no\n"
        "A=1 sapwood chat -m 'a; # b' \\\n  --seed 1 < in.txt | tee out &  # so\nmake x\n```\n"
    )
    assert named_paths(page) == {"engine/loop.py", "src/sapwood/app/", "docs/a.md"}
    assert anchors(page) == {"a-b-c"}
    assert list(shell_commands(page)) == [
        ["sapwood", "chat", "-m", "a; # b", "--seed", "1"],
        ["tee", "out"],
        ["make", "x"],
    ]
    assert code_spans(page) == ["b", "engine/loop.py"]
    assert [(block.language, block.line) for block in blocks(page)] == [("sh", 4)]


def test_the_pages_have_enough_to_check() -> None:
    """A change of style must not make the tests below look at nothing."""
    assert len(named_paths((ROOT / "ARCHITECTURE.md").read_text("utf-8"))) > 50
    for name in ("README.md", "docs/serving.md", "docs/command-line.md", "docs/benchmarking.md"):
        commands = shell_commands((ROOT / name).read_text("utf-8"))
        assert len([words for words in commands if words[0] == "sapwood"]) > 1
    python_api = blocks((ROOT / "docs" / "python-api.md").read_text("utf-8"))
    assert len([block for block in python_api if block.language == "python"]) > 10


# ---- files and links -----------------------------------------------------------------------------


@every_page
def test_every_path_that_is_named_exists(page: Path) -> None:
    text = page.read_text("utf-8")
    dead = [
        path
        for path in sorted(named_paths(text))
        if not (ROOT / path).exists()
        and not (SOURCE / path).exists()
        and not (page.parent / path).exists()
    ]
    assert dead == []


@every_page
def test_every_link_leads_somewhere(page: Path) -> None:
    text = page.read_text("utf-8")
    dead = []
    for target in re.findall(r"\]\(([^()\s]+)\)", prose(text)):
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        if not path.exists() or (anchor and anchor not in anchors(path.read_text("utf-8"))):
            dead.append(target)
    assert dead == []


def test_the_index_has_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text("utf-8")
    pages = [path.name for path in (ROOT / "docs").glob("*.md") if path.name != "README.md"]
    assert [name for name in pages if f"]({name})" not in index] == []


# ---- commands and options ------------------------------------------------------------------------


def command_targets() -> dict[str, str]:
    """Sub-command -> "module:name", those of pyproject.toml's entry points included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    own = {name: command.target for name, command in COMMANDS.items()}
    return own | project["entry-points"]["sapwood.commands"]


def find_command(words: Sequence[str]) -> tuple[click.Command, list[str]]:
    """The command that `sapwood <words>` runs, and the words that are its arguments."""
    rest = list(words)
    targets = command_targets()
    if not rest or rest[0].startswith("-"):
        return cli, rest
    assert rest[0] in targets, f"sapwood has no command {rest[0]!r}"
    module, _, name = targets[rest.pop(0)].partition(":")
    command: click.Command = getattr(import_module(module), name)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        found = command.commands.get(rest[0])
        assert found is not None, f"sapwood {command.name} has no command {rest[0]!r}"
        command = found
        rest.pop(0)
    return command, rest


def top_context() -> click.Context:
    """The context of `sapwood` itself, from which commands inherit -h; they remember the first."""
    return click.Context(cli, info_name="sapwood", **cli.context_settings)


def flags_of(command: click.Command) -> set[str]:
    params = command.get_params(click.Context(command, parent=top_context()))
    return {flag for param in params for flag in (*param.opts, *param.secondary_opts)}


def all_commands() -> Iterator[click.Command]:
    yield cli
    for name in command_targets():
        command, _ = find_command([name])
        yield command
        if isinstance(command, click.Group):
            yield from command.commands.values()


@every_page
def test_every_sapwood_command_in_a_block_would_be_accepted(page: Path) -> None:
    """Parsed by the command itself, so flags, their values and missing arguments are checked."""
    for words in shell_commands(page.read_text("utf-8")):
        if words[0] != "sapwood":
            continue
        command, arguments = find_command(words[1:])
        assert not isinstance(command, click.Group) or arguments, " ".join(words)
        try:
            command.make_context(command.name, list(arguments), parent=top_context())
        except click.exceptions.Exit:
            continue
        except click.ClickException as error:
            raise AssertionError(f"{shlex.join(words)}: {error.format_message()}") from error


@every_page
def test_every_command_and_flag_in_prose_exists(page: Path) -> None:
    known = {flag for command in all_commands() for flag in flags_of(command)} | FOREIGN_FLAGS
    known |= {row.flag for row in PEER_FLAGS if row.fate is not Fate.REFUSED}
    unknown = []
    for span in code_spans(own_words(page)):
        words = span.split()
        if words[0] == "sapwood" and len(words) > 1 and re.fullmatch(r"[a-z]+", words[1]):
            command, arguments = find_command(words[1:])
            allowed = flags_of(command)
        else:
            arguments, allowed = words, known
        flags = [re.fullmatch(r"(--[a-z][\w-]*\w|-[a-z])(=.*)?", word) for word in arguments]
        unknown += [f"{span}: {flag[1]}" for flag in flags if flag and flag[1] not in allowed]
    assert unknown == []


@every_page
def test_every_environment_variable_exists(page: Path) -> None:
    options = [
        param
        for command in all_commands()
        for param in command.params
        if isinstance(param, ConfigOption)
    ]
    known = {option.spec.env for option in options} | {"SAPWOOD_HOME", "SAPWOOD_CONFIG"}
    cmake = (ROOT / "CMakeLists.txt").read_text("utf-8")
    known |= set(re.findall(r"^set\((SAPWOOD_\w+) .* CACHE", cmake, re.MULTILINE))
    named = set(re.findall(r"\bSAPWOOD_[A-Z][A-Z_]*\b", page.read_text("utf-8")))
    assert sorted(named - known) == []


@every_page
def test_every_make_target_exists(page: Path) -> None:
    text = page.read_text("utf-8")
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    shown = [words[1] for words in shell_commands(text) if words[0] == "make"]
    shown += [span.split()[1] for span in code_spans(text) if re.match(r"make \w", span)]
    assert sorted(set(shown) - targets) == []


# ---- code, data and requests ---------------------------------------------------------------------


@every_page
def test_python_blocks_compile(page: Path) -> None:
    for block in blocks(page.read_text("utf-8")):
        if block.language == "python":
            ast.parse("\n" * (block.line - 1) + block.text, filename=str(page))


@every_page
def test_json_blocks_are_json(page: Path) -> None:
    for block in blocks(page.read_text("utf-8")):
        if block.language == "json":
            for line in block.text.splitlines():
                json.loads(line)


@every_page
def test_names_of_modules_exist(page: Path) -> None:
    """`sapwood.schema.env` is a module, and `sapwood.LLM` something in one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    groups = {*project["entry-points"], "sapwood.architectures", "sapwood.bench_peers"}
    groups |= {"sapwood.logits_processors", "sapwood.tool_call_parsers"}
    groups |= {"sapwood.reasoning_parsers", "sapwood.evaluations", "sapwood.accelerators"}
    groups |= {"sapwood.towers", "sapwood.commands", "sapwood.schedule_policies"}
    groups.add("sapwood.gateway_policies")
    text = page.read_text("utf-8")
    spans = {one for span in code_spans(text) for one in re.findall(r"^sapwood(?:\.\w+)+", span)}
    for name in sorted(spans - groups):
        path = SOURCE.joinpath(*name.split(".")[1:])
        if path.is_dir() or path.with_suffix(".py").is_file():
            continue
        module, _, attribute = name.rpartition(".")
        assert hasattr(import_module(module), attribute), f"{page.name} names {name}"


def run_python(page: Path) -> dict[str, Any]:
    """All Python blocks of a page one after the other, as a reader would; the names they made."""
    names: dict[str, Any] = {"__name__": "docs"}
    try:
        for block in blocks(page.read_text("utf-8")):
            if block.language == "python":
                source = "\n" * (block.line - 1) + block.text
                exec(compile(source, str(page), "exec"), names)
    finally:
        if "llm" in names:
            names["llm"].close()
    return names


def test_the_python_api_page_runs(
    smollm2_files: ModelFiles, capsys: pytest.CaptureFixture[str]
) -> None:
    run_python(ROOT / "docs" / "python-api.md")
    said = capsys.readouterr().out
    assert "Paris" in said
    assert "temperature - temperature is -1" in said
    assert "float32" in said


def curl_requests(text: str, server: str) -> Iterator[tuple[str, str, str | None]]:
    """(method, path, body) of each curl command against that address of the examples."""
    for words in shell_commands(text):
        if words[0] != "curl":
            continue
        (url,) = [word for word in words if word.startswith("http")]
        body = words[words.index("-d") + 1] if "-d" in words else None
        method = words[words.index("-X") + 1] if "-X" in words else "POST" if body else "GET"
        known = (
            EXAMPLE_URL,
            EMBEDDING_URL,
            PAINTING_URL,
            EDITING_URL,
            AUDIO_URL,
            SIGHT_URL,
            VIDEO_URL,
            GATEWAY_URL,
        )
        assert url.startswith(known), url
        if url.startswith(server):
            yield method, url.removeprefix(server), body


def test_the_requests_of_the_docs_are_answered(
    smollm2_files: ModelFiles, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--model", smollm2_files.name, "--max-total-tokens", "8192")
    flags += ("--enable-return-hidden-states",)
    check_requests(EXAMPLE_URL, flags, capsys, num_requests=8, num_clients=2)


def test_the_requests_to_an_embedding_model_are_answered(
    minilm_files: ModelFiles, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--model", minilm_files.name)
    check_requests(EMBEDDING_URL, flags, capsys, num_requests=1, num_clients=0)


def test_the_requests_for_pictures_are_answered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(flux(), tmp_path / "flux")
    check_requests(PAINTING_URL, ("--model", str(folder)), capsys, num_requests=0, num_clients=0)


def test_the_requests_to_a_gateway_are_answered(smollm2_files: ModelFiles) -> None:
    texts = [page.read_text("utf-8") for page in PAGES]
    requests = [request for text in texts for request in curl_requests(text, GATEWAY_URL)]
    assert len(requests) > 2
    with serving("--model", smollm2_files.name, "--max-total-tokens", "8192") as server:
        args = (server.url, "--port", "0", "--prometheus-port", "0")
        with gateway(*args) as process, httpx.Client(trust_env=False, timeout=180) as client:
            url = read_until(process, r"the gateway is at (\S+);")
            while not any(
                one["is_healthy"] for one in client.get(f"{url}/workers").json()["workers"]
            ):
                time.sleep(0.05)
            for method, path, body in requests:
                answer = client.request(method, url + path, content=body)
                assert answer.is_success, f"{method} {path} {body}: {answer.text}"


def test_the_reasoning_page_runs(
    smollm2_files: ModelFiles, capsys: pytest.CaptureFixture[str]
) -> None:
    names = run_python(ROOT / "docs" / "reasoning.md")
    # What is asserted holds whatever the model says: its thinking is open from the first token on,
    # and the two last answers are held to a schema.
    first = names["result"]
    said = capsys.readouterr().out
    assert first.answer.reasoning
    assert f"thought: {first.answer.reasoning}" in said
    for name in ("after_thinking", "at_once"):
        told = json.loads(names[name].answer.content)
        assert set(told) == {"prime"}
        assert isinstance(told["prime"], bool)
    assert names["after_thinking"].answer.reasoning


def check_requests(
    url: str,
    flags: Sequence[str],
    capsys: pytest.CaptureFixture[str],
    *,
    num_requests: int,
    num_clients: int,
) -> None:
    """Every curl command and every use of an official client, against a real server; there are
    more of them than the numbers say."""
    texts = {page: page.read_text("utf-8") for page in PAGES}
    requests = [request for text in texts.values() for request in curl_requests(text, url)]
    clients = [
        (page, block)
        for page, text in texts.items()
        for block in blocks(text)
        if block.language == "python" and url in block.text
    ]
    assert len(requests) > num_requests
    assert len(clients) > num_clients
    with serving(*flags) as server:
        for method, path, body in requests:
            answer = httpx.request(method, server.url + path, content=body, timeout=180)
            assert answer.status_code == 200, f"{method} {path} {body}: {answer.text}"
        for page, block in clients:
            source = block.text.replace(url, server.url)
            names: dict[str, Any] = {"__name__": "docs"}
            exec(compile(source, str(page), "exec"), names)
            assert capsys.readouterr().out.strip()
            for value in names.values():  # a client keeps its connection open as long as it lives
                if hasattr(value, "close") and not isinstance(value, type):
                    value.close()
