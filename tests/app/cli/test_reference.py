from pathlib import Path

import pytest

from sapwood.app.cli.main import COMMANDS, main
from sapwood.app.cli.reference import (
    PEER_PAGES,
    help_text,
    option_table,
    stale_pages,
    with_help,
    with_options,
)
from sapwood.schema.config.engine import COMPONENTS
from sapwood.schema.config.memory import MemoryConfig
from sapwood.schema.config.options import option_specs
from sapwood.schema.config.server import ServerConfig

DOCS = Path(__file__).parents[3] / "docs"


def test_the_documentation_is_up_to_date():
    stale = sorted(stale_pages(DOCS))
    assert stale == [], "run `sapwood reference docs` and commit what it writes"


def test_every_option_is_documented():
    page = (DOCS / "configuration.md").read_text("utf-8")
    for config in (*COMPONENTS, ServerConfig):
        for spec in option_specs(config):
            assert f"`{spec.flag}`" in page
            assert f"`{spec.env}`" in page


def test_every_command_is_documented():
    page = (DOCS / "command-line.md").read_text("utf-8")
    shown = [name for name, command in COMMANDS.items() if not command.is_hidden]
    assert [name for name in shown if f"\n## {name}\n" not in page] == []


def test_an_option_table_has_a_row_per_option():
    rows = option_table(MemoryConfig).splitlines()
    assert rows[0] == "### Memory"
    assert len(rows) == 4 + len(option_specs(MemoryConfig))
    assert (
        "| `--radix-eviction-policy` | `SAPWOOD_RADIX_EVICTION_POLICY` | `lru`, `lfu` | `lru` | "
        "Which unused prefix is forgotten first. |"
    ) in rows


def test_help_is_what_the_command_prints_less_the_shared_options():
    text = help_text(["chat"])
    assert text.startswith("Usage: sapwood chat [OPTIONS]\n")
    assert "-h, --help" in text
    assert "--url TEXT" in text
    assert "--page-size" not in text


def test_only_what_is_between_markers_changes():
    page = "a\n<!-- help: sapwood pull -->\nold\n<!-- end of help -->\nb\n"
    filled = with_help(page)
    assert filled.startswith("a\n<!-- help: sapwood pull -->\n```text\nUsage: sapwood pull")
    assert filled.endswith("```\n<!-- end of help -->\nb\n")
    assert "old" not in filled
    assert with_help(filled) == filled
    assert with_options(page) == page


@pytest.fixture
def copy(tmp_path):
    for name in (
        "configuration.md",
        "command-line.md",
        "fields.md",
        "limits.md",
        "models.md",
        *PEER_PAGES,
    ):
        (tmp_path / name).write_text((DOCS / name).read_text("utf-8"), "utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("configuration.md", "`--page-size`", "`--page-sise`"),
        ("limits.md", "256 characters", "257 characters"),
        ("fields.md", "`top_logprobs_num`", "`top_logprobs_sum`"),
    ],
)
def test_a_stale_page_is_found_and_written_anew(copy, capsys, name, right, wrong):
    page = copy / name
    page.write_text(page.read_text("utf-8").replace(right, wrong), "utf-8")
    assert main(["reference", str(copy), "--check"]) == 1
    assert capsys.readouterr().out == f"{name} is stale\n"
    assert wrong in page.read_text("utf-8")
    assert main(["reference", str(copy)]) == 0
    assert wrong not in page.read_text("utf-8")
    assert main(["reference", str(copy), "--check"]) == 0
