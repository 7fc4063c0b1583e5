"""The chat page in a headless Chromium: branches of a chat, and the chats that are kept."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.frontends.web.chromium import answered, ask, needs_chromium, watched

pytestmark = needs_chromium

ANSWER = ".message.assistant .body"


def chat(page, *questions: str) -> None:
    """Begin a new chat with these questions."""
    page.get_by_role("button", name="New chat").click()
    for number, question in enumerate(questions, 1):
        ask(page, question)
        answered(page, number)


def titles(page):
    return page.locator("#chats .chat-title")


def choose(page, title: str, entry: str) -> None:
    page.get_by_role("button", name=f"More about {title}").click()
    page.get_by_role("menuitem", name=entry).click()


# ---- branches ------------------------------------------------------------------------------------


def test_another_answer_is_a_branch_beside_the_first(page, engine, prompt_of):
    ask(page, "Hi")
    answered(page)
    engine.reply = "Good day."
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(ANSWER)).to_have_text("Good day.")
    expect(page.locator(".branches").last).to_contain_text("2/2")
    assert "Hello, wörld!" not in prompt_of()
    page.get_by_role("button", name="Show the branch before").click()
    expect(page.locator(ANSWER)).to_have_text("Hello, wörld!")
    ask(page, "More")
    answered(page, 2)
    assert "Hello, wörld!" in prompt_of()
    assert "Good day." not in prompt_of()
    page.get_by_role("button", name="Show the next branch").click()
    expect(page.locator(ANSWER)).to_have_text(["Good day."])


def test_an_edited_question_is_a_branch_too(page, engine, prompt_of):
    chat(page, "one", "two")
    page.get_by_role("button", name="Edit").first.click()
    box = page.get_by_label("Edit the message")
    expect(box).to_be_focused()
    box.fill("uno")
    box.press("Enter")
    answered(page, 1)
    expect(page.locator(".message.user .body")).to_have_text(["uno"])
    assert "one" not in prompt_of()
    page.get_by_role("button", name="Show the branch before").click()
    expect(page.locator(".message.user .body")).to_have_text(["one", "two"])
    page.get_by_role("button", name="Edit").first.click()
    page.get_by_label("Edit the message").press("Escape")
    expect(page.locator(".message.user .body")).to_have_text(["one", "two"])
    assert len(engine.submitted) == 3


def test_a_stopped_answer_is_continued(page, engine, prompt_of):
    engine.hold_after = 5
    ask(page, "Hi")
    expect(page.locator(ANSWER)).to_have_text("Hello")
    page.get_by_role("button", name="Stop").click()
    answered(page)
    engine.hold_after = None
    engine.reply = " again."
    page.get_by_role("button", name="Continue").click()
    expect(page.locator(ANSWER)).to_have_text("Hello again.")
    assert prompt_of().endswith("<|im_start|>assistant\nHello")
    expect(page.get_by_role("button", name="Continue")).to_be_hidden()


def test_a_whole_message_can_be_copied(page, context):
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    ask(page, "Hi")
    answered(page)
    page.locator(".assistant").get_by_role("button", name="Copy").click()
    expect(page.locator(".assistant").get_by_text("Copied")).to_be_visible()
    assert page.evaluate("() => navigator.clipboard.readText()") == "Hello, wörld!"


def test_nothing_else_is_asked_while_an_answer_is_written(page, engine):
    chat(page, "one")
    engine.hold_after = 2
    ask(page, "two")
    expect(page.locator(ANSWER).last).to_have_text("He")
    page.get_by_role("button", name="Regenerate").first.click()
    expect(page.locator(".notice")).to_contain_text("Stop it first")
    ask(page, "three")
    expect(page.get_by_label("Message", exact=True)).to_have_value("three")
    assert len(engine.submitted) == 2
    engine.hold_after = None
    answered(page, 2)


# ---- chats that are kept -------------------------------------------------------------------------


def test_nothing_is_lost_that_is_written_while_the_page_opens(context, live):
    """The browser's database may open slowly; until then a message would go nowhere."""
    context.add_init_script(
        "const open = IDBFactory.prototype.open;"
        "IDBFactory.prototype.open = function (...given) {"
        "  const asked = {};"
        "  setTimeout(() => {"
        "    const real = open.apply(this, given);"
        "    for (const name of ['onsuccess', 'onerror', 'onupgradeneeded'])"
        "      real[name] = (event) => {"
        "        asked.result = real.result;"
        "        asked[name]?.(event);"
        "      };"
        "  }, 700);"
        "  return asked;"
        "};"
    )
    with watched(context, live.url) as page:
        page.goto(live.url)
        chat(page, "What is **oak**?")
        expect(page.locator(ANSWER)).to_have_text("Hello, wörld!")


def test_a_chat_is_there_after_the_page_was_closed(page, context, live):
    chat(page, "What is **oak**?")
    address = page.url
    page.goto("about:blank")  # which leaves the page at once, as a user does
    page.close()
    with watched(context, live.url) as again:
        again.goto(live.url)
        expect(titles(again)).to_have_text(["What is **oak**?"])
        titles(again).click()
        expect(again.locator(ANSWER)).to_have_text("Hello, wörld!")
        assert again.url == address
        again.reload()
        expect(again.locator(ANSWER)).to_have_text("Hello, wörld!")


def test_an_answer_goes_on_while_another_chat_is_shown(page, engine):
    engine.hold_after = 3
    ask(page, "slow")
    expect(page.locator(ANSWER)).to_have_text("Hel")
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".message")).to_have_count(0)
    expect(titles(page)).to_have_text("slow is answering")
    engine.hold_after = None
    expect(titles(page)).to_have_text("slow")
    titles(page).click()
    expect(page.locator(ANSWER)).to_have_text("Hello, wörld!")


def test_what_came_is_kept_when_the_page_is_closed_amid_an_answer(page, engine, until):
    engine.hold_after = 5
    ask(page, "Hi")
    expect(page.locator(ANSWER)).to_have_text("Hello")
    page.reload()
    until(lambda: len(engine.abandoned) == 1)
    expect(page.locator(ANSWER)).to_have_text("Hello")
    expect(page.get_by_role("button", name="Continue")).to_be_visible()


def test_search_finds_titles_and_words_of_answers(page, engine):
    chat(page, "about trees")
    engine.reply = "The brown fox jumps."
    chat(page, "about animals")
    expect(titles(page)).to_have_text(["about animals", "about trees"])
    page.get_by_label("Search").fill("TREES")
    expect(titles(page)).to_have_text(["about trees"])
    page.get_by_label("Search").fill("fox")
    expect(titles(page)).to_have_text([re.compile("about animals.*brown fox jumps")])
    page.get_by_label("Search").fill("zebra")
    expect(page.get_by_text("No chat has these words.")).to_be_visible()
    page.get_by_label("Search").fill("")
    expect(titles(page)).to_have_count(2)


def test_a_chat_is_renamed(page):
    chat(page, "old name")
    choose(page, "old name", "Rename")
    page.get_by_label("New title").fill("<b>new</b>")
    page.get_by_label("New title").press("Enter")
    expect(titles(page)).to_have_text("<b>new</b>")
    page.reload()
    expect(titles(page)).to_have_text("<b>new</b>")


def test_a_deleted_chat_can_be_had_back_for_a_while(page):
    chat(page, "precious")
    choose(page, "precious", "Delete")
    expect(titles(page)).to_have_count(0)
    expect(page.locator(".message")).to_have_count(0)
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(ANSWER)).to_have_text("Hello, wörld!")
    choose(page, "precious", "Delete")
    expect(titles(page)).to_have_count(0)
    page.reload()
    expect(page.get_by_text("No chats yet.")).to_be_visible()


def test_deleting_a_chat_aborts_its_answer(page, engine, until):
    engine.hold_after = 3
    ask(page, "slow")
    expect(page.locator(ANSWER)).to_have_text("Hel")
    choose(page, "slow", "Delete")
    until(lambda: len(engine.abandoned) == 1)
    page.reload()
    expect(page.get_by_text("No chats yet.")).to_be_visible()


def test_a_new_chat_forgets_the_one_before(page, prompt_of):
    chat(page, "secret")
    chat(page, "Hi")
    assert "secret" not in prompt_of()
    expect(titles(page)).to_have_text(["Hi", "secret"])


def test_two_tabs_know_of_each_other(page, context, live):
    chat(page, "first")
    with watched(context, live.url) as other:
        other.goto(page.url)
        expect(other.locator(ANSWER)).to_have_text("Hello, wörld!")
        ask(other, "second")
        answered(other, 2)
        expect(page.locator(".message.user .body")).to_have_text(["first", "second"])
        chat(page, "third")
        expect(titles(other)).to_have_text(["third", "first"])
        choose(page, "third", "Delete")
        expect(titles(other)).to_have_text(["first"])


# ---- bounds --------------------------------------------------------------------------------------


def put_chats(page, count: int, characters: int) -> None:
    """Into the page's database, each with so many characters of JSON, and reload."""
    page.evaluate(
        """async ([count, characters]) => {
            const { openStore } = await import("/web/chat/store.js");
            const { addMessage, newChat } = await import("/web/chat/tree.js");
            const store = await openStore(() => {}, Infinity);
            for (let i = 0; i < count; i += 1) {
                const chat = newChat();
                const message = addMessage(chat, null, { role: "user", content: `big ${i}` });
                message.content += " ".repeat(characters - JSON.stringify(chat).length);
                await store.put(chat);
            }
        }""",
        [count, characters],
    )
    page.reload()


def test_a_history_that_fills_up_is_said_and_what_is_beyond_is_not_kept(page):
    put_chats(page, 4, 4_999_900)
    expect(page.locator("#fullness")).to_contain_text("The history is 100% full.")
    expect(page.locator("#model")).to_have_text("org/tiny")
    ask(page, "Hi")
    answered(page)
    expect(page.locator(".notice")).to_contain_text("The history is full (20 MB): this chat ends")
    expect(page.locator(ANSWER)).to_have_text("Hello, wörld!")
    page.reload()
    expect(titles(page)).to_have_count(4)
    choose(page, "big 0", "Delete")
    expect(page.locator("#fullness")).to_be_hidden()


def test_without_a_database_the_page_works_and_says_so(page):
    page.add_init_script("IDBFactory.prototype.open = () => { throw new Error('forbidden'); };")
    page.reload()
    expect(page.locator("#model")).to_have_text("org/tiny")
    ask(page, "Hi")
    answered(page)
    expect(page.locator(".notice")).to_contain_text("keeps no history (forbidden)")
    expect(page.locator(".notice")).to_have_count(1)


# ---- files ---------------------------------------------------------------------------------------


def downloaded(page, press) -> tuple[str, str]:
    """(name, text) of the file that a press of a button gives."""
    with page.expect_download() as download:
        press()
    return download.value.suggested_filename, Path(download.value.path()).read_text("utf-8")


def test_all_chats_are_exported_and_imported(page, context):
    chat(page, "one", "two")
    page.get_by_role("button", name="Regenerate").last.click()
    expect(page.locator(".branches").last).to_contain_text("2/2")
    answered(page, 2)
    chat(page, "other")
    name, text = downloaded(page, page.get_by_role("button", name="Export all").click)
    assert name == "sapwood-chats.json"
    assert [len(one["messages"]) for one in json.loads(text)["chats"]] in ([5, 2], [2, 5])
    for title in ("one", "other"):
        choose(page, title, "Delete")
    expect(titles(page)).to_have_count(0)
    give(page, text)
    expect(titles(page)).to_have_text(["other", "one"])
    titles(page).last.click()
    expect(page.locator(".message.user .body")).to_have_text(["one", "two"])
    expect(page.locator(".branches").last).to_contain_text("2/2")
    page.reload()
    expect(titles(page)).to_have_count(2)


def test_one_chat_is_exported_as_markdown_and_as_json(page, engine):
    engine.reply = "Use `x`:\n\n| a |\n|---|\n| 1 |"
    chat(page, "How?")
    button = page.get_by_role("button", name="More about How?")

    def press(entry: str):
        button.click()
        return page.get_by_role("menuitem", name=entry).click

    name, text = downloaded(page, press("Export as Markdown"))
    assert name == "How-.md"
    assert text == f"# How?\n\n## You\n\nHow?\n\n## org/tiny\n\n{engine.reply}\n"
    name, text = downloaded(page, press("Export as JSON"))
    assert name == "How-.json"
    (one,) = json.loads(text)["chats"]
    assert [message["content"] for message in one["messages"]] == ["How?", engine.reply]


def give(page, text: str) -> None:
    file = {"name": "in.json", "mimeType": "application/json", "buffer": text.encode()}
    page.get_by_label("File to import").set_input_files([file])


MESSAGE = {"id": "m", "parent": None, "role": "user", "content": "hi", "createdMs": 1}
CHAT = {"title": "t", "model": "", "system": "", "createdMs": 1, "updatedMs": 1, "leaf": "m"}


@pytest.mark.parametrize(
    ("file", "why"),
    [
        ("{", "the file is not JSON"),
        ("[]", "it is not an export of this page"),
        ({"format": "sapwood-chats", "version": 2, "chats": []}, "not an export of this page"),
        ([{**CHAT, "messages": 5}], "chat 1: messages must be a list"),
        ([None], "chat 1: title must be a text"),
        ([{**CHAT, "messages": [{**MESSAGE, "role": "system"}]}], "message 1: role must be"),
        ([{**CHAT, "messages": [{**MESSAGE, "content": {}}]}], "message 1: content must be a text"),
        ([{**CHAT, "messages": [{**MESSAGE, "parent": "m"}]}], "its parent is not before it"),
        ([{**CHAT, "messages": [{**MESSAGE, "files": [{}]}]}], "the name of a file must be a text"),
        ([{**CHAT, "messages": [MESSAGE] * 5001}], "at most 5000"),
    ],
)
def test_a_broken_file_is_refused_with_the_reason(page, file, why):
    if isinstance(file, list):
        file = {"format": "sapwood-chats", "version": 1, "chats": file}
    give(page, file if isinstance(file, str) else json.dumps(file))
    expect(page.locator(".notice")).to_contain_text(why)
    expect(titles(page)).to_have_count(0)


def test_a_hostile_file_becomes_text(page):
    hostile = "<img src=x onerror=\"document.title='owned'\">"
    messages = [
        {**MESSAGE, "content": hostile, "files": [{"name": hostile, "text": hostile}]},
        {**MESSAGE, "id": "n", "parent": "m", "role": "assistant", "model": hostile}
        | {"content": hostile, "reasoning": hostile, "error": hostile, "html": hostile},
    ]
    given = {**CHAT, "id": "x", "title": hostile, "leaf": "n", "messages": messages}
    give(page, json.dumps({"format": "sapwood-chats", "version": 1, "chats": [given]}))
    titles(page).click()
    expect(page.locator(".message")).to_have_count(2)
    expect(page.locator(ANSWER)).to_have_text(hostile)
    expect(page.locator("img")).to_have_count(0)
    assert not page.url.endswith("#x")
