"""The chat page in a headless Chromium: what becomes of an answer's text."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from playwright.sync_api import expect

from sapwood.text.formats import AnswerFormats
from sapwood.text.reasoning.registry import REASONING_FORMATS
from tests.frontends.web.chromium import answered, ask, needs_chromium

pytestmark = needs_chromium


@pytest.fixture
def services(services):
    """Of a model that thinks."""
    return replace(services, formats=AnswerFormats(reasoning=REASONING_FORMATS.get("qwen3")))


@pytest.fixture
def show(page, engine):
    """Has the engine answer with a text, and returns the body of that answer, the last one."""
    shown: list[str] = []

    def show(text: str):
        shown.append(text)
        engine.reply = text
        ask(page, "Show")
        answered(page, len(shown))
        return page.locator(".message.assistant .body").nth(len(shown) - 1)

    return show


def test_markdown_becomes_nodes(show):
    answer = show(
        "# Title\nSome *soft* and **strong** words, ~~old~~ 2 * 3 * 4.\n\n- one\n- two\n  more\n\n"
        "3. three\n4. four\n   - nested\n\n> quoted\n\n---\n\nEnd `x`"
    )
    expect(answer.locator("h3")).to_have_text("Title")
    expect(answer.locator("em")).to_have_text(["soft"])
    expect(answer.locator("strong")).to_have_text(["strong"])
    expect(answer.locator("s")).to_have_text(["old"])
    expect(answer.locator("> ul > li")).to_have_text(["one", re.compile(r"two\s*more")])
    expect(answer.locator("ol > li")).to_have_count(2)
    expect(answer.locator("ol ul li")).to_have_text("nested")
    assert answer.locator("ol").get_attribute("start") == "3"
    expect(answer.locator("blockquote p")).to_have_text("quoted")
    expect(answer.locator("hr")).to_have_count(1)
    expect(answer.locator("p code")).to_have_text("x")


def test_a_table_is_one_and_scrolls_by_itself(show):
    answer = show("| tree | height |\n|:--|--:|\n| oak | 20 |\n| yew | 10 |\n")
    expect(answer.locator("th")).to_have_text(["tree", "height"])
    expect(answer.locator("td")).to_have_text(["oak", "20", "yew", "10"])
    side = answer.locator("td").nth(1).evaluate("one => getComputedStyle(one).textAlign")
    assert side.endswith("right")
    expect(answer.get_by_role("region", name="Table")).to_be_visible()


def test_code_is_coloured_and_can_be_copied(show, page, context):
    answer = show("```python\ndef f():\n    return 'a'  # why\n\n\nf()\n```\n")
    code = answer.locator("pre code")
    assert code.inner_text() == "def f():\n    return 'a'  # why\n\n\nf()"
    expect(answer.locator(".code-head span")).to_have_text("python")
    expect(code.locator(".hljs-keyword").first).to_have_text("def")
    expect(code.locator(".hljs-comment")).to_have_text("# why")
    plain = page.evaluate("() => getComputedStyle(document.body).color")
    keyword = code.locator(".hljs-keyword").first
    assert keyword.evaluate("one => getComputedStyle(one).color") != plain
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    answer.get_by_role("button", name="Copy this code").click()
    expect(answer.get_by_text("Copied")).to_be_visible()
    copied = page.evaluate("() => navigator.clipboard.readText()")
    assert copied == "def f():\n    return 'a'  # why\n\n\nf()"


def test_code_of_an_unknown_language_and_an_open_fence_are_code_too(show):
    answer = show("```nonsense\n<b>\n```\n\n```\nunfinished")
    expect(answer.locator("pre code")).to_have_text(["<b>", "unfinished"])
    expect(answer.locator(".code-head span")).to_have_text(["nonsense", "text"])


FORMULAS = [
    ("so $a^2 + b^2$ is", "a^2 + b^2", False),
    (r"so \(\frac{a}{b}\) is", r"\frac{a}{b}", False),
    ("$$\n\\int_0^1 x\\,dx\n$$", r"\int_0^1 x\,dx", True),
    (
        "\\[\n\\begin{pmatrix}1\\\\2\\end{pmatrix}\n\\]",
        r"\begin{pmatrix}1\\2\end{pmatrix}",
        True,
    ),
    (r"\[ x \]", "x", True),
    ("it is $$x$$ here", "x", True),
    ("- in a list:\n  $$\n  x\n  $$", "x", True),
    ("$f: A \\to B$", "f: A \\to B", False),
    ("`code` $x$", "x", False),
]
"""(text, the formula in it, whether it has lines of its own)"""


def test_formulas_are_drawn(show):
    for text, formula, is_display in FORMULAS:
        found = show(text).locator(".formula")
        expect(found, text).to_have_count(1)
        expect(found.locator("annotation")).to_have_text(formula)
        assert ("display" in found.get_attribute("class")) is is_display, text
        box = found.locator(".katex-html").bounding_box()
        assert box["width"] > 4, text
        assert box["height"] > 4, text


def test_other_dollars_are_text(show):
    for text in (
        "It costs $5 and $10.", "an open $x", r"\( never closed", "`$x$`", "```\n$$x$$\n```",
        "$ x $",
    ):  # fmt: skip
        answer = show(text)
        expect(answer).to_contain_text("$" if "$" in text else "(")
        expect(answer.locator(".formula, .katex"), text).to_have_count(0)


def test_a_formula_that_is_none_is_shown_as_it_was_written(show):
    answer = show(r"Look: $\nosuchcommand{x}$ and $\frac{a$")
    expect(answer.locator("code")).to_have_text([r"\nosuchcommand{x}", r"\frac{a"])


def test_thinking_is_open_while_it_lasts_and_then_folded(page, engine):
    engine.reply = "<think>\nLet me *count* to $3$.\n</think>\n\nThree."
    engine.hold_after = len("<think>\nLet me *count*")
    ask(page, "How many?")
    thinking = page.locator("details.thinking")
    expect(thinking.locator("summary")).to_have_text("Thinking…")
    expect(thinking.locator(".thoughts em")).to_be_visible()
    engine.hold_after = None
    answered(page)
    expect(page.locator(".message.assistant .body")).to_have_text("Three.")
    expect(thinking.locator("summary")).to_have_text(re.compile(r"Thought for [\d.]+ m?s"))
    expect(thinking.locator(".thoughts")).to_be_hidden()
    thinking.locator("summary").click()
    expect(thinking.locator(".thoughts")).to_contain_text("Let me count to")
    expect(thinking.locator(".thoughts .katex")).to_have_count(1)


def test_thinking_can_be_turned_off_and_limited(page, engine):
    page.get_by_label("Thinking tokens").fill("7")
    with page.expect_request("**/v1/chat/completions") as request:
        ask(page, "How many?")
    assert request.value.post_data_json["thinking_budget"] == 7
    answered(page)
    assert engine.submitted[0].options.sampling.thinking_budget.max_tokens == 7
    page.get_by_label("Thinking tokens").fill("")
    page.get_by_label("Thinking", exact=True).select_option("low")
    with page.expect_request("**/v1/chat/completions") as request:
        ask(page, "And now?")
    assert request.value.post_data_json["reasoning_effort"] == "low"
    answered(page, 2)


# ---- hostile answers -----------------------------------------------------------------------------


def test_markup_is_text_and_never_runs(show, page):
    hostile = (
        "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
        "**<b>bold</b>** `<i>code</i>`\n```html\n<script>document.title='owned'</script>\n```"
    )
    answer = show(hostile)
    assert answer.locator("img, script, b, i").count() == 0
    expect(answer).to_contain_text("<img src=x onerror=")
    expect(answer.locator("strong")).to_have_text("<b>bold</b>")
    expect(answer.locator("p code")).to_have_text("<i>code</i>")
    expect(answer.locator("pre code")).to_have_text("<script>document.title='owned'</script>")
    ask(page, hostile)
    expect(page.locator(".message.user .body").last).to_have_text(hostile)
    assert "owned" not in page.title()


def test_links_that_could_do_something_are_text(show):
    for text in (
        "[a](javascript:alert(1))",
        "[a](JaVaScRiPt:alert(1))",
        "[a](data:text/html,<script>alert(1)</script>)",
        "[a](vbscript:x)",
        "[a](/flush_cache)",
        "[a](#x)",
        "[a](//user@)",
        "<javascript:alert(1)>",
        "$\\href{javascript:alert(1)}{x}$",
        "$\\htmlData{x=y}{x}$ $\\includegraphics{http://evil.example/x.png}$",
    ):
        expect(show(text).locator("a, img"), text).to_have_count(0)


def test_a_link_to_this_server_is_text(show, live):
    answer = show(f"[free]({live.url}/flush_cache) and {live.url}/abort")
    expect(answer.locator("a")).to_have_count(0)
    expect(answer).to_have_text(f"free ({live.url}/flush_cache) and {live.url}/abort")


def test_other_links_tell_nothing_of_this_page(show):
    answer = show("[one](https://example.org/a) https://example.org/b <mailto:a@example.org>")
    links = answer.locator("a")
    expect(links).to_have_count(3)
    for link in links.all():
        assert link.get_attribute("rel") == "noopener noreferrer nofollow"
        assert link.get_attribute("target") == "_blank"


def test_images_are_links_and_load_nothing(show):
    """The fixture `page` fails at any request elsewhere."""
    answer = show("![a cat](https://example.org/cat.png) ![](/flush_cache)")
    expect(answer.locator("img")).to_have_count(0)
    expect(answer.locator("a")).to_have_text("Image: a cat")
    expect(answer).to_contain_text("Image: without a name (/flush_cache)")


def test_a_reply_cannot_take_the_names_of_the_page(show, page):
    answer = show('<a id="prompt" name="send">x</a>\n\n[x]: #prompt "t"\n\n## prompt')
    expect(answer.locator("[id], [name]")).to_have_count(0)


def test_no_text_holds_the_page_up(page):
    """Steps are not to be counted in a library; a page that hangs fails by the test's own limit."""
    units = ["\\(", "$", "$a $", "\\[\n", "$$\n", "`", "[", "*a ", "> ", "- ", "|", "<", "![", "&#"]
    for unit in units:
        length = page.evaluate(
            """async (text) => {
                const { markdownView } = await import("/web/chat/markdown.js");
                const target = document.createElement("div");
                markdownView(target)(text);
                return target.textContent.length;
            }""",
            unit * (60_000 // len(unit)),
        )
        assert length > 0, unit


def test_a_text_beyond_the_limit_is_shown_as_it_is(page):
    shown = page.evaluate(
        """async () => {
            const { markdownView } = await import("/web/chat/markdown.js");
            const target = document.createElement("div");
            const show = markdownView(target);
            show("**a**" + "b".repeat(100));
            const before = target.querySelectorAll("strong").length;
            show("**a**" + "b".repeat(200_000));
            return [before, target.querySelectorAll("strong").length, target.textContent.length];
        }"""
    )
    assert shown == [1, 0, 200_005]


def test_only_the_blocks_that_changed_are_made_anew(page):
    kept = page.evaluate(
        """async () => {
            const { markdownView } = await import("/web/chat/markdown.js");
            const target = document.createElement("div");
            const show = markdownView(target);
            show("# One\\n\\ntwo");
            const [first, second] = target.children;
            show("# One\\n\\ntwo **three**\\n\\nfour");
            return [target.children[0] === first, target.children[1] === second,
                    target.textContent.replace(/\\n/g, " ").trim()];
        }"""
    )
    assert kept[:2] == [True, False]
    assert re.sub(r"\s+", " ", kept[2]) == "One two three four"
