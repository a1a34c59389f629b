"""The chat page in a browser, against a scripted server: what it shows, keeps, sends and survives, and what it never runs."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from browsers import chromium
from injections import INJECTIONS
from page_server import MODEL, PageServer, Reply, events
from playwright.sync_api import Browser, Dialog, Locator, Page, Request, expect

LONG = "A long line of an answer that goes on for a while.\n\n" * 40
MIXED = ["Grüße, ", "世界", " 🙂👩‍👩‍👧 ", "e\u0301 ", "**fett** ", "`x`\n\n", "- один\n- два\n"]
"""An answer with characters of one to four bytes, and some of several code points."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as launched:
        yield launched


@dataclass
class Visit:
    """A visitor: the server, the browser's context (its storage), the page, and whatever must not have happened."""

    server: PageServer
    browser: Browser
    options: dict[str, Any] = field(default_factory=dict)
    troubles: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.context = self.browser.new_context(accept_downloads=True, **self.options)
        self.context.set_default_timeout(5000)
        self.page = self.open()

    def open(self, prepare: str = "") -> Page:
        """Another tab. `prepare` is run in it before the page's own script."""
        page = self.context.new_page()
        page.add_init_script(
            "window.violations = []; document.addEventListener('securitypolicyviolation', (e) => violations.push(e.violatedDirective));"
            + prepare
        )
        page.on("pageerror", lambda error: self.troubles.append(f"error: {error}"))
        page.on("dialog", self._dialog)
        page.on("request", self._request)
        page.on("popup", lambda popup: self.troubles.append(f"popup: {popup.url}"))
        page.on(
            "console", lambda said: said.text.startswith("Failed to load resource") or self.troubles.append(said.text)
        )
        page.goto(self.server.url)
        return page

    def _dialog(self, dialog: Dialog) -> None:
        self.troubles.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _request(self, request: Request) -> None:
        if not request.url.startswith((self.server.url, f"blob:{self.server.url}")):
            self.troubles.append(f"request: {request.url}")

    def leave(self) -> None:
        """Nothing forbidden has happened in any tab."""
        for page in self.context.pages:
            assert page.evaluate("violations") == []
            assert page.evaluate("typeof window.canary") == "undefined"
            assert page.url == self.server.url
            assert len(page.frames) == 1
        self.context.close()
        assert self.troubles == []


@pytest.fixture
def server() -> Iterator[PageServer]:
    with PageServer() as running:
        yield running


@pytest.fixture
def visit(server: PageServer, browser: Browser) -> Iterator[Visit]:
    visiting = Visit(server, browser)
    yield visiting
    visiting.leave()


@pytest.fixture
def page(visit: Visit) -> Page:
    return visit.page


@pytest.fixture
def hold() -> Iterator[threading.Event]:
    """Holds a stream up; let go at the end, so that no thread waits on."""
    event = threading.Event()
    yield event
    event.set()


def _ask(page: Page, text: str) -> None:
    page.get_by_label("Your question").fill(text)
    page.keyboard.press("Enter")


def _answers(page: Page) -> Locator:
    return page.locator("article.assistant .body")


def _last(page: Page, text: str | re.Pattern[str]) -> None:
    expect(_answers(page).last).to_have_text(text)
    expect(page.locator("#log")).to_have_attribute("aria-busy", "false")


def _said(body: dict[str, Any]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in body["messages"]]


def _button(page: Page, name: str) -> Locator:
    return page.get_by_role("button", name=name, exact=True)


# ---- A conversation ----


def test_a_conversation(visit: Visit) -> None:
    visit.server.replies = [Reply(events("Hello", ", **you**", "!", usage=(7, 3))), Reply(events("Again."))]
    page = visit.page
    expect(page.locator("#model-name")).to_have_text(MODEL)
    _ask(page, "Hi there\nsecond line")
    _last(page, "Hello, you!")
    expect(page.locator("article strong")).to_have_text("you")
    expect(page.locator(".stats")).to_have_text(re.compile(r"3 tokens · prompt 7$"))
    expect(page.locator("#title")).to_have_text("Hi there")
    _ask(page, "More")
    _last(page, "Again.")
    first, second = visit.server.asked
    assert first == {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Hi there\nsecond line"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert _said(second) == [("user", "Hi there\nsecond line"), ("assistant", "Hello, **you**!"), ("user", "More")]


def test_tokens_per_second_are_those_after_the_first(visit: Visit) -> None:
    pieces = events("a", "b", "c", usage=(2, 3))
    visit.server.replies = [Reply([*pieces[:2], 0.25, pieces[2], 0.25, *pieces[3:]])]
    _ask(visit.page, "Count")
    _last(visit.page, "abc")
    rate = re.match(r"([\d.]+) tokens/s · 3 tokens · prompt 2$", visit.page.locator(".stats").inner_text())
    assert rate
    assert 2.0 < float(rate[1]) < 4.5


def test_an_answer_at_its_limit_says_so(visit: Visit) -> None:
    visit.server.replies = [Reply(events("Cut", finish="length"))]
    _ask(visit.page, "Long?")
    _last(visit.page, "Cut")
    expect(visit.page.locator(".note")).to_contain_text("most tokens allowed")


def test_stop_keeps_what_came(visit: Visit, hold: threading.Event) -> None:
    visit.server.replies = [Reply([*events("One, two", done=False)[:2], hold])]
    page = visit.page
    _ask(page, "Count")
    expect(_answers(page)).to_have_text("One, two")
    expect(_button(page, "Stop")).to_be_visible()
    _button(page, "Stop").click()
    expect(page.locator(".note")).to_have_text("Stopped.")
    expect(page.get_by_label("Your question")).to_be_focused()
    deadline = time.monotonic() + 5
    while not visit.server.gone and time.monotonic() < deadline:
        page.wait_for_timeout(20)
    assert visit.server.gone == 1  # the server saw it leave, and can free its slot
    _ask(page, "Go on")
    _last(page, "Yes.")
    assert _said(visit.server.asked[1]) == [("user", "Count"), ("assistant", "One, two"), ("user", "Go on")]


def test_stopped_before_the_first_word_the_question_joins_the_next(visit: Visit, hold: threading.Event) -> None:
    visit.server.replies = [Reply([hold])]
    page = visit.page
    _ask(page, "First")
    expect(page.locator(".waiting")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator(".note")).to_have_text("Stopped.")
    _ask(page, "Second")
    _last(page, "Yes.")
    assert _said(visit.server.asked[1]) == [("user", "First\n\nSecond")]


def test_reload_while_an_answer_comes_loses_nothing_shown(visit: Visit, hold: threading.Event) -> None:
    visit.server.replies = [Reply([*events("So far", " 世界", done=False)[:3], hold])]
    page = visit.page
    _ask(page, "Tell")
    expect(_answers(page)).to_have_text("So far 世界")
    page.get_by_label("Your question").fill("a draft")
    page.reload()
    expect(_answers(page)).to_have_text("So far 世界")
    expect(page.locator(".trouble")).to_be_visible()
    expect(page.get_by_label("Your question")).to_have_value("a draft")
    _button(page, "Retry").click()
    _last(page, "Yes.")
    expect(_answers(page)).to_have_count(1)
    assert _said(visit.server.asked[1]) == [("user", "Tell")]


def test_what_is_shown_is_kept_even_if_the_browser_dies(visit: Visit, hold: threading.Event) -> None:
    visit.server.replies = [Reply([*events("Half an", " answer", done=False)[:3], hold])]
    page = visit.page
    page.evaluate("window.addEventListener('pagehide', (e) => e.stopImmediatePropagation(), true)")
    _ask(page, "Tell")
    expect(_answers(page)).to_have_text("Half an answer")
    kept = page.evaluate("Object.entries(localStorage).find(([key]) => key.startsWith('gemmary.chat.'))[1]")
    assert json.loads(kept)["messages"][1]["content"] == "Half an answer"


def test_edit_replaces_what_follows(visit: Visit) -> None:
    visit.server.replies = [Reply(events(text)) for text in ("A1", "A2", "B1")]
    page = visit.page
    _ask(page, "Q1")
    _last(page, "A1")
    _ask(page, "Q2")
    _last(page, "A2")
    page.get_by_role("button", name="Edit this question").first.click()
    box = page.get_by_label("Edited question")
    expect(box).to_be_focused()
    expect(page.get_by_text("What follows is replaced.")).to_be_visible()
    page.keyboard.press("Escape")
    expect(_answers(page)).to_have_count(2)
    page.get_by_role("button", name="Edit this question").first.click()
    box.fill("Q1, better")
    page.keyboard.press("Enter")
    _last(page, "B1")
    expect(page.locator("article")).to_have_count(2)
    expect(page.locator("#title")).to_have_text("Q1, better")
    assert _said(visit.server.asked[2]) == [("user", "Q1, better")]


def test_regenerate_asks_the_same_again(visit: Visit) -> None:
    visit.server.replies = [Reply(events("A")), Reply(events("B"))]
    _ask(visit.page, "Q")
    _last(visit.page, "A")
    _button(visit.page, "Regenerate").click()
    _last(visit.page, "B")
    expect(_answers(visit.page)).to_have_count(1)
    assert visit.server.asked[0] == visit.server.asked[1]


def test_copies_messages_and_code(visit: Visit) -> None:
    visit.context.grant_permissions(["clipboard-read", "clipboard-write"])
    visit.server.replies = [Reply(events("Look:\n\n```py\nprint('ü')\n\nx = 1\n```\n"))]
    page = visit.page
    _ask(page, "Code")
    expect(page.locator(".code header span")).to_have_text("py")
    _button(page, "Copy this code").click()
    assert page.evaluate("navigator.clipboard.readText()") == "print('ü')\n\nx = 1"
    page.locator("article.assistant .foot").get_by_role("button", name="Copy").click()
    assert page.evaluate("navigator.clipboard.readText()") == "Look:\n\n```py\nprint('ü')\n\nx = 1\n```\n"


def test_without_a_clipboard_it_copies_too(visit: Visit) -> None:
    page = visit.open("Object.defineProperty(navigator, 'clipboard', { value: undefined });")
    _ask(page, "Q")
    _last(page, "Yes.")
    page.locator("article.assistant .foot").get_by_role("button", name="Copy").click()
    expect(page.locator("article.assistant .foot").get_by_role("button", name="Copied")).to_be_focused()


# ---- The list ----


def test_conversations_are_listed_switched_renamed_deleted_and_brought_back(visit: Visit) -> None:
    page = visit.page
    titles = page.locator("#list .title")
    for question in ("Alpha", "Beta"):
        _button(page, "New conversation").click()
        _ask(page, question)
        _last(page, "Yes.")
    expect(titles).to_have_text(["Beta", "Alpha"])
    titles.nth(1).click()
    expect(page.locator("#title")).to_have_text("Alpha")
    expect(page.locator("article.user .body")).to_have_text("Alpha")
    page.get_by_role("button", name="Rename Alpha").click()
    page.get_by_label("New title").fill("The first")
    page.keyboard.press("Enter")
    expect(titles).to_have_text(["Beta", "The first"])
    page.reload()
    expect(page.locator("#title")).to_have_text("The first")
    page.get_by_role("button", name="Delete The first").click()
    expect(titles).to_have_text(["Beta"])
    assert page.evaluate("Object.keys(localStorage).length") == 1
    _button(page, "Undo").click()
    expect(titles).to_have_text(["Beta", "The first"])
    expect(page.locator("article.user .body")).to_have_text("Alpha")


def test_an_answer_goes_on_while_another_conversation_is_open(visit: Visit, hold: threading.Event) -> None:
    stream = events("slow", " but whole")
    visit.server.replies = [Reply([*stream[:2], hold, *stream[2:]])]
    page = visit.page
    _ask(page, "Slow")
    expect(_answers(page)).to_have_text("slow")
    _button(page, "New conversation").click()
    _ask(page, "Quick")
    _last(page, "Yes.")
    hold.set()
    page.locator("#list .title", has_text="Slow").click()
    _last(page, "slow but whole")


def test_deleting_a_conversation_stops_its_answer(visit: Visit, hold: threading.Event) -> None:
    visit.server.replies = [Reply([*events("x", done=False)[:2], hold])]
    page = visit.page
    _ask(page, "Gone")
    expect(_answers(page)).to_have_text("x")
    page.get_by_role("button", name="Delete Gone").click()
    page.wait_for_timeout(150)
    assert page.evaluate("Object.keys(localStorage)") == []
    assert page.evaluate("runs.size") == 0


def test_a_conversation_is_exported(visit: Visit) -> None:
    page = visit.page
    expect(_button(page, "Export this conversation")).to_be_disabled()
    _ask(page, "Was ist größer?")
    _last(page, "Yes.")
    with page.expect_download() as download:
        _button(page, "Export this conversation").click()
    assert download.value.suggested_filename == "Was-ist-größer.json"
    exported = json.loads(download.value.path().read_text(encoding="utf-8"))
    assert exported["title"] == "Was ist größer?"
    assert exported["model"] == MODEL
    assert exported["messages"] == [
        {"role": "user", "content": "Was ist größer?"},
        {"role": "assistant", "content": "Yes."},
    ]


def test_tabs_do_not_destroy_each_others_conversations(visit: Visit) -> None:
    one, other = visit.page, visit.open()
    _ask(one, "From one")
    _last(one, "Yes.")
    expect(other.locator("#list .title")).to_have_text(["From one"])
    _ask(other, "From the other")
    _last(other, "Yes.")
    other.locator("#list .title", has_text="From one").click()
    _ask(other, "Goes on there")
    _last(other, "Yes.")
    expect(one.locator("article.user .body")).to_have_text(["From one", "Goes on there"])
    _ask(one, "And here")
    _last(one, "Yes.")
    assert [text for role, text in _said(visit.server.asked[-1]) if role == "user"] == [
        "From one",
        "Goes on there",
        "And here",
    ]
    one.reload()
    expect(one.locator("#list .title")).to_have_text(["From one", "From the other"])


def test_of_two_tabs_in_one_conversation_the_later_question_stands(visit: Visit, hold: threading.Event) -> None:
    one, other = visit.page, visit.open()
    _ask(one, "First")
    _last(one, "Yes.")
    other.locator("#list .title").click()
    visit.server.replies = [Reply([*events("never whole", done=False)[:2], hold])]
    _ask(one, "Here")
    expect(_answers(one).last).to_have_text("never whole")
    expect(_answers(other).last).to_have_text("never whole")
    _button(other, "Retry").click()
    for tab in (other, one):
        _last(tab, "Yes.")
        expect(tab.locator("article.user .body")).to_have_text(["First", "Here"])
    one.reload()
    expect(_answers(one)).to_have_text(["Yes.", "Yes."])


# ---- Settings, the key, the model ----


def test_settings_are_checked_kept_sent_and_reset(visit: Visit) -> None:
    page = visit.page
    _button(page, "Settings").click()
    page.get_by_label("Temperature").fill("2.5")
    page.get_by_label("Top k").fill("1.5")
    page.get_by_label("Top p").fill("0")
    page.get_by_label("Seed").fill("seven")
    _button(page, "Save").click()
    expect(page.locator(".wrong:not(:empty)")).to_have_count(4)
    expect(page.get_by_label("Temperature")).to_be_focused()
    expect(page.get_by_label("Temperature")).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#w-temperature")).to_have_text("A number from 0 to 2.")
    values = {"Temperature": "0.7", "Top k": "40", "Top p": ".95", "Min p": "0.05", "Max tokens": "64"}
    for label, value in (values | {"Seed": "7", "Repetition penalty": "1.1", "System message": "Be brief."}).items():
        page.get_by_label(label).fill(value)
    page.keyboard.press("Control+Home")
    _button(page, "Save").click()
    expect(page.locator("dialog[open]")).to_have_count(0)
    page.reload()
    _ask(page, "Q")
    _last(page, "Yes.")
    asked = visit.server.asked[0]
    wanted = {"temperature": 0.7, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "max_tokens": 64, "seed": 7}
    assert {name: asked.get(name) for name in wanted} == wanted
    assert asked["repetition_penalty"] == 1.1
    assert _said(asked) == [("system", "Be brief."), ("user", "Q")]
    _button(page, "Settings").click()
    expect(page.get_by_label("Temperature")).to_have_value("0.7")
    _button(page, "Reset").click()
    _button(page, "Save").click()
    _ask(page, "Q2")
    _last(page, "Yes.")
    assert set(visit.server.asked[1]) == {"model", "messages", "stream", "stream_options"}


def test_the_key_is_asked_for_and_kept_in_this_tab(visit: Visit) -> None:
    visit.server.key = "open-sesame"
    page = visit.page
    page.reload()
    expect(page.get_by_role("dialog", name="This server asks for a key")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#notice")).to_contain_text("asks for a key")
    _ask(page, "Q")
    page.get_by_label("API key").fill("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key-wrong")).to_have_text("The server does not accept this key.")
    page.get_by_label("API key").fill("open-sesame")
    page.keyboard.press("Enter")
    _last(page, "Yes.")
    page.reload()
    expect(page.locator("#model-name")).to_have_text(MODEL)
    assert page.evaluate("JSON.stringify(localStorage)").count("sesame") == 0
    visit.server.key = "changed"
    _ask(page, "Q2")
    page.get_by_label("API key").fill("changed")
    page.keyboard.press("Enter")
    _last(page, "Yes.")


def test_a_model_is_chosen_where_there_are_several(visit: Visit) -> None:
    visit.server.models = ["small", "large"]
    visit.page.reload()
    visit.page.get_by_label("Model", exact=True).select_option("large")
    _ask(visit.page, "Q")
    _last(visit.page, "Yes.")
    assert visit.server.asked[0]["model"] == "large"


# ---- What goes wrong ----


@pytest.mark.parametrize(
    ("status", "message", "shown"),
    [
        (400, "message 0: Gemma 1 and 2 have no system role", "Gemma 1 and 2 have no system role. Change the question or the settings"),
        (404, "there is no model x here", "there is no model x here"),
        (413, "the body is longer than 1 MiB", "the body is longer than 1 MiB. Shorten the question"),
        (429, "128 requests are waiting", "128 requests are waiting. Others are being answered"),
        (500, "", "The server answered with the status 500"),
        (503, "the server is being stopped", "the server is being stopped. Retry in a moment."),
    ],
)  # fmt: skip
def test_errors_are_shown_in_place_with_a_way_on(visit: Visit, status: int, message: str, shown: str) -> None:
    visit.server.replies = [Reply(status=status, error=message)]
    page = visit.page
    _ask(page, "Q")
    expect(page.locator(".trouble span")).to_contain_text(shown)
    assert "\n" not in page.locator(".trouble span").inner_text()
    _button(page, "Retry").click()
    _last(page, "Yes.")
    assert [_said(body) for body in visit.server.asked] == [[("user", "Q")]] * 2


def test_a_busy_server_says_when_to_come_again(visit: Visit) -> None:
    visit.server.replies = [Reply(status=429, error="busy", retry_after=1)]
    page = visit.page
    _ask(page, "Q")
    expect(page.get_by_role("button", name="Retry in 1 s")).to_be_disabled()
    _button(page, "Retry").click()
    _last(page, "Yes.")


def test_an_error_in_the_middle_of_an_answer_keeps_what_came(visit: Visit) -> None:
    broken = b'data: {"error": {"message": "the device is lost", "type": "server_error", "code": 500}}\n\n'
    visit.server.replies = [Reply([*events("Half", done=False)[:2], broken])]
    page = visit.page
    _ask(page, "Q")
    expect(page.locator(".trouble span")).to_have_text("the device is lost")
    expect(_answers(page)).to_have_text("Half")
    _button(page, "Retry").click()
    _last(page, "Yes.")


def test_a_model_that_is_loading_is_waited_for(visit: Visit) -> None:
    visit.server.loading = True
    page = visit.page
    page.reload()
    expect(page.locator("#notice")).to_contain_text("the model is being loaded")
    visit.server.loading = False
    _button(page, "Try again").click()
    expect(page.locator("#notice")).to_be_empty()
    expect(page.locator("#model-name")).to_have_text(MODEL)


def test_a_server_that_is_away(visit: Visit) -> None:
    visit.context.set_offline(True)
    _ask(visit.page, "Q")
    expect(visit.page.locator(".trouble span")).to_have_text("The server cannot be reached. Is it running?")
    visit.context.set_offline(False)
    _button(visit.page, "Retry").click()
    _last(visit.page, "Yes.")


_CUTS = """([bytes, at, broken]) => {
  const stream = new ReadableStream({ start(controller) {
    const data = Uint8Array.from(bytes.slice(0, at));
    if (at % 2) for (const byte of data) controller.enqueue(Uint8Array.of(byte));
    else if (data.length) controller.enqueue(data);
  }, pull(controller) { broken ? controller.error(new TypeError("network error")) : controller.close(); } }, { highWaterMark: 0 });
  let text = "", finish = "";
  const take = (event) => { const choice = event.choices[0]; text += choice?.delta.content ?? ""; finish ||= choice?.finish_reason ?? ""; };
  return readStream(stream, take).then((whole) => [text, whole, finish], (error) => [text, false, finish, error.name]);
}"""


def test_a_stream_cut_at_every_byte(page: Page) -> None:
    """The page's parser, byte by byte and at once, ended and broken: what came in whole lines is there, and nothing else."""
    stream = b"".join(events(*MIXED))
    results = page.evaluate(
        "async (bytes) => { const cut = " + _CUTS + "; const all = []; for (let at = 0; at <= bytes.length; at++)"
        " all.push([await cut([bytes, at, false]), await cut([bytes, at, true])]); return all; }",
        list(stream),
    )
    assert len(results) == len(stream) + 1
    for at, (ended, broken) in enumerate(results):
        lines = stream[:at].split(b"\n")[:-1]
        bodies = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
        choices = [body["choices"][0] for body in bodies if body["choices"]]
        text = "".join(choice["delta"].get("content", "") for choice in choices)
        whole = b"data: [DONE]" in lines
        assert ended[:2] == [text, whole], at
        assert broken[0] == text, at
        assert broken[1] == whole, at
    assert results[-1][0][0] == "".join(MIXED)


def test_connections_lost_on_the_way(visit: Visit) -> None:
    page, stream = visit.page, b"".join(events(*MIXED))
    first = stream.index(MIXED[1].encode()[:2])
    for at in (0, 1, first + 1, first + 2, len(stream) // 2, stream.index(b'"finish_reason": "stop"')):
        visit.server.replies = [Reply([stream[:at]], broken=at % 2 == 0)]
        _button(page, "New conversation").click()
        _ask(page, f"Cut at {at}")
        expect(page.locator(".trouble span")).to_contain_text("The connection was lost")
        shown = _answers(page).evaluate("() => current.messages[1].content")
        assert "".join(MIXED).startswith(shown)
        assert "\ufffd" not in shown
    _button(page, "Retry").click()
    _last(page, "Yes.")


def test_characters_split_over_packets(visit: Visit) -> None:
    stream = b"".join(events("世🙂é"))
    visit.server.replies = [Reply([piece for byte in stream for piece in (bytes([byte]), 0.0002)])]
    _ask(visit.page, "Q")
    _last(visit.page, "世🙂é")


# ---- Nothing runs ----

_SHOWN = """(node) => {
  const read = (n) => n.nodeType === 3 ? n.data : n.className === "code" ? (n.querySelector("header span").textContent.replace(/^text$/, "") + n.querySelector("pre").textContent)
    : [...n.childNodes].map(read).join("") + (n.localName === "a" && n.textContent !== n.title ? n.title : "");
  return read(node);
}"""
_ASK_ALL = (
    "async (texts) => { const shown = "
    + _SHOWN
    + "; const all = []; for (const text of texts) { openChat(null); $('question').value = text;"
    " $('question').oninput(); $('composer').requestSubmit(); while (runs.size) await new Promise((r) => setTimeout(r, 1));"
    " all.push([document.querySelector('article.user .body').textContent, shown(document.querySelector('article.assistant .body')),"
    " $('title').textContent, document.querySelector('#list .title').textContent, current.messages[1].content]); } return all; }"
)
_ALLOWED = {
    "p",
    "em",
    "strong",
    "del",
    "code",
    "pre",
    "a",
    "ul",
    "ol",
    "li",
    "blockquote",
    "hr",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
}
_ALLOWED |= {"h3", "h4", "h5", "h6", "div", "header", "span", "button"}


def _letters(text: str) -> str:
    """Without space and without the marks that Markdown takes out."""
    return re.sub(r"[\s\d*_`~#>|\\+:()\[\]!.\"'-]", "", text)


def test_no_injection_runs_as_question_answer_or_title(visit: Visit) -> None:
    assert len(set(INJECTIONS)) >= 200
    asked = [text for text in INJECTIONS if text.strip()]
    visit.server.reply_to = lambda body: Reply(events(*re.findall(r"(?s).{1,7}", body["messages"][-1]["content"])))
    page = visit.page
    shown = page.evaluate(_ASK_ALL, asked)
    page.reload()
    for text, (question, answer, title, listed, kept) in zip(asked, shown, strict=True):
        line = re.sub(r"\r\n?", "\n", text).strip("\ufeff \t\n\r\x0b\x0c\u2028\u2029")
        assert question == kept == line
        assert _letters(answer) == _letters(
            re.sub(r"\]\((\S*) \"[^\"]*\"\)", r"](\1)", line) if answer.count("evil.example") else line
        ), text
        assert title == listed
        assert title.rstrip("…") in line
    # Each is opened again as it was kept, by a page that has newly begun.
    tags = page.evaluate(
        "[...index.keys()].flatMap((id) => { openChat(id); return [...document.querySelectorAll('.body *')].map((n) => n.localName); })"
    )
    assert set(tags) <= _ALLOWED
    names = page.evaluate(
        "[...new Set([...document.querySelectorAll('#log *')].flatMap((n) => n.getAttributeNames()))]"
    )
    assert set(names) <= {
        "class",
        "dir",
        "href",
        "title",
        "target",
        "rel",
        "type",
        "tabindex",
        "role",
        "aria-label",
        "start",
    }


def test_links_lead_out_only_by_safe_schemes(page: Page) -> None:
    for text in INJECTIONS:
        links = page.evaluate(
            "(text) => { const div = el('div'); markdownView(div)(text, false);"
            " return [...div.querySelectorAll('a')].map((a) => [a.protocol, a.rel, a.target, a.hasAttribute('ping')]); }",
            text,
        )
        for link in links:
            assert link[0] in ("http:", "https:", "mailto:"), text
            assert link[1:] == ["noopener noreferrer", "_blank", False]


def test_half_written_injections_run_nothing_and_end_as_whole_ones(page: Page) -> None:
    """Drawn again with every character that comes, a text ends in the same nodes as drawn at once."""
    differing = page.evaluate(
        "(texts) => texts.filter((text) => { const live = el('div'), once = el('div'), draw = markdownView(live);"
        " for (let i = 1; i <= text.length; i++) draw(text.slice(0, i), true);"
        " draw(text, false); markdownView(once)(text, false); return !live.isEqualNode(once); })",
        [*INJECTIONS, "".join(MIXED), "# a\n\ntext **b\n\n1. x\n   - y\n\n| a | b |\n|--|--|\n| 1 | 2 |\n\n```\nx\n"],
    )
    assert differing == []


def test_hostile_storage_breaks_nothing(visit: Visit) -> None:
    values = [
        "", "null", "5", "[]", "{", '"text"', '{"messages":5}', '{"messages":[null,5,{"role":"root","content":"x"},{"role":"user","content":{}}]}',
        '{"__proto__":{"polluted":1},"title":{"toString":1},"messages":[{"__proto__":{"polluted":1},"role":"user","content":"<b>x"}]}',
        '{"title":"<img src=x onerror=window.canary=1>","updated":"x","messages":[{"role":"assistant","content":"a","state":"<b>","stats":"<i>","trouble":5}]}',
    ]  # fmt: skip
    page = visit.page
    page.evaluate("(values) => values.forEach((value, i) => localStorage.setItem('gemmary.chat.' + i, value))", values)
    for value in values:
        for name in ("settings", "theme"):
            page.evaluate("([name, value]) => localStorage.setItem('gemmary.' + name, value)", [name, value])
        page.evaluate(
            "(value) => { for (const name of ['open', 'draft']) sessionStorage.setItem('gemmary.' + name, value); }",
            value,
        )
        page.reload()
        expect(page.locator("#model-name")).to_have_text(MODEL)
    for i in range(page.locator("#list .title").count()):
        page.locator("#list .title").nth(i).click()
    assert page.evaluate("({}).polluted") is None
    _button(page, "New conversation").click()
    _ask(page, "Q")
    _last(page, "Yes.")
    assert set(visit.server.asked[0]) == {"model", "messages", "stream", "stream_options"}


# ---- Markdown ----


@pytest.mark.parametrize(
    ("source", "drawn"),
    [
        ("a\nb\n\nc", "<p>a\nb</p><p>c</p>"),
        ("# A #\n## B\n####### C", "<h3>A</h3><h4>B</h4><p>####### C</p>"),
        ("**a** *b* __c__ _d_ ***e*** ~~f~~", "<p><strong>a</strong> <em>b</em> <strong>c</strong> <em>d</em> <strong><em>e</em></strong> <del>f</del></p>"),
        ("**a *b***", "<p><strong>a <em>b</em></strong></p>"),
        ("2 * 3 * 4, snake_case_name, **open", "<p>2 * 3 * 4, snake_case_name, **open</p>"),
        ("*a **b* c", "<p><em>a **b</em> c</p>"),
        ("`a*b*` ``x ` y`` `open", "<p><code>a*b*</code> <code>x ` y</code> `open</p>"),
        ("\\*a\\* \\<b>", "<p>*a* &lt;b&gt;</p>"),
        ("- a\n- b\n  - c\n\n    d\n- e", "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p><p>d</p></li></ul></li><li><p>e</p></li></ul>"),
        ("3. a\n4. b\n\ntext", '<ol start="3"><li><p>a</p></li><li><p>b</p></li></ol><p>text</p>'),
        ("1. a\n   ```\n   x\n   ```\n2. b", '<ol start="1"><li><p>a</p>[text:x]</li><li><p>b</p></li></ol>'),
        ("In\n2024. was", "<p>In\n2024. was</p>"),
        ("> a\n> > b\nc", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>"),
        ("---\n***\n- - -", "<hr><hr><hr>"),
        ("```js x\na\n  b\n```\nc", "[js:a\n  b]<p>c</p>"),
        ("~~~\n```\n~~~", "[text:```]"),
        ("````\n```\n````", "[text:```]"),
        ("```py\nopen", "[py:open]"),
        ("a|b\n-|:-:\n1|`x\\|y`", '<table><thead><tr><th>a</th><th class="center">b</th></tr></thead><tbody><tr><td>1</td><td class="center"><code>x|y</code></td></tr></tbody></table>'),
        ("a | b\nno table", "<p>a | b\nno table</p>"),
        ("[a *b*](https://x.org/y_(z) \"t\")", '<p><a href="https://x.org/y_(z)">a <em>b</em></a></p>'),
        ("see https://x.org/a_b_c. (http://y.org)", '<p>see <a href="https://x.org/a_b_c">https://x.org/a_b_c</a>. (<a href="http://y.org">http://y.org</a>)</p>'),
        ("[m](mailto:a@b.org) [n](ftp://x) [o]", '<p><a href="mailto:a@b.org">m</a> [n](ftp://x) [o]</p>'),
        ("<b>bold</b> &amp;", "<p>&lt;b&gt;bold&lt;/b&gt; &amp;amp;</p>"),
        ("\ta\r\nb\rc", "<p>    a\nb\nc</p>"),
    ],
)  # fmt: skip
def test_markdown(page: Page, source: str, drawn: str) -> None:
    html = page.evaluate(
        "(text) => { const div = el('div'); markdownView(div)(text, false); return div.innerHTML; }", source
    )
    html = re.sub(
        r'<div class="code"><header><span>(.*?)</span>.*?<code>(.*?)</code></pre></div>',
        r"[\1:\2]",
        html,
        flags=re.DOTALL,
    )
    html = re.sub(r"</?div.*?>", "", html)
    assert re.sub(r' (dir|title|target|rel|class)="(?!center)[^"]*"', "", html) == drawn


def test_markdown_that_is_half_written(page: Page) -> None:
    draw = "(text) => { const div = el('div'); markdownView(div)(text, true); return div.innerHTML.replaceAll(' dir=\"auto\"', ''); }"
    assert page.evaluate(draw, "a **b") == "<p>a <strong>b</strong></p>"
    assert page.evaluate(draw, "**a\n\nb") == "<p>**a</p><p>b</p>"
    assert (
        page.evaluate(draw, "[a](https://x")
        == '<p>[a](<a href="https://x" title="https://x" target="_blank" rel="noopener noreferrer">https://x</a></p>'
    )


HOSTILE = {
    "stars": "*a " * 66_000, "opening and closing": "*a**b*" * 33_000, "runs": "".join("*" * (i % 4) + "a" for i in range(80_000)),
    "brackets": "[" * 200_000, "brackets closed": "[" * 100_000 + "]" * 100_000, "links": "[a](" * 50_000, "links of links": "[a](b" * 40_000 + ")" * 9,
    "parentheses": "[a](((" * 33_000, "ticks": "".join("`" * (i % 600) + "a" for i in range(700)), "tick pairs": "`a" * 100_000,
    "urls": "http://[" * 25_000, "one url": "http://" + "a" * 200_000, "url ends": "http://a" + ")" * 200_000, "titles": '[a](http://b "' * 14_000,
    "quotes": "> " * 100_000, "quoted lines": "> a\n" * 50_000, "lists": "- " * 100_000, "items": "- a\n" * 50_000, "deeper items": "\n".join(" " * i + "- a" for i in range(600)),
    "numbers": "1. a\n" * 40_000, "rules": "- " * 100_000 + "x", "spaces": " " * 200_000 + "x", "fence and spaces": "```" + " " * 200_000 + "`", "fences": "```\na\n" * 33_000,
    "hashes": "# " * 100_000, "pipes": "|" * 200_000, "table": "|a|b|\n|-|-|\n" + "|1|2|\n" * 33_000, "wide table": "|a" * 40_000 + "\n" + "|-" * 40_000 + "\n|1|2\n",
    "heads of tables": "a|b\n-|-\n\n" * 20_000, "escapes": "\\*" * 100_000, "lines": "a\n" * 100_000, "blank lines": "\n" * 200_000, "paragraphs": "a\n\n" * 66_000,
    "one word": "a" * 200_000, "combining": "a" + "\u0301" * 200_000, "underscores": "_a" * 100_000, "tildes": "~~a " * 50_000,
}  # fmt: skip


def test_hostile_markdown_takes_linear_time(page: Page) -> None:
    """200 kB of each, drawn and half-drawn, in the time that nodes take: what backtracks would need minutes."""
    slow = {}
    for name, text in HOSTILE.items():
        took = page.evaluate(
            "(text) => { const start = performance.now(), div = el('div'), draw = markdownView(div); draw(text.slice(0, -1), true); draw(text, false);"
            " return performance.now() - start; }",
            text,
        )
        if took > 4000:
            slow[name] = took
    assert slow == {}


def test_a_long_answer_does_not_freeze_the_page(visit: Visit) -> None:
    text = "Some **words** of an answer, with `code`.\n\n" * 5000  # 200 kB
    visit.server.replies = [Reply(events(*re.findall(r"(?s).{1,2000}", text)))]
    page = visit.page
    page.evaluate(
        "window.longest = 0; window.before = performance.now(); setInterval(() => { const now = performance.now(); longest = Math.max(longest, now - before); before = now; }, 10)"
    )
    _ask(page, "Long")
    expect(page.locator(".stats")).to_be_visible(timeout=20_000)
    assert page.evaluate("current.messages[1].content.length") == len(text)
    assert page.evaluate("longest") < 2500


# ---- By keyboard, on a phone, for everyone ----


def test_with_the_keyboard_alone(visit: Visit, hold: threading.Event) -> None:
    page = visit.page
    expect(page.get_by_label("Your question")).to_be_focused()
    page.keyboard.type("line one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("line two")
    page.keyboard.press("Enter")
    _last(page, "Yes.")
    assert _said(visit.server.asked[0]) == [("user", "line one\nline two")]
    page.keyboard.press("Enter")  # nothing is sent
    visit.server.replies = [Reply([*events("part", done=False)[:2], hold])]
    page.keyboard.type("again")
    page.keyboard.press("Enter")
    expect(_answers(page).last).to_have_text("part")
    page.keyboard.press("Escape")
    expect(page.locator(".note")).to_have_text("Stopped.")
    assert len(visit.server.asked) == 2
    page.locator(".skip").focus()
    names = ["Skip to the question"]
    while True:  # everything is reached in order, and its focus is seen
        page.keyboard.press("Tab")
        name, outline, width = page.evaluate(
            "() => { const n = document.activeElement, s = getComputedStyle(n.id === 'question' ? n.parentElement : n);"
            " return [n === document.body ? '' : n.ariaLabel || n.textContent, n.id === 'question' ? s.boxShadow : s.outlineStyle,"
            " n.getBoundingClientRect().width]; }"
        )
        if not name:
            break
        names.append(name)
        assert outline != "none", name
        assert width > 0, name
    assert names[:3] == ["Skip to the question", "New conversation", "line one"]
    assert names[3:5] == ["Rename line one", "Delete line one"]
    assert {"Export this conversation", "Settings", "Edit this question", "Your question", "Regenerate"} <= set(names)


def test_the_skip_link(page: Page) -> None:
    assert page.evaluate("document.querySelector('a, button, input, textarea').className") == "skip"
    page.locator(".skip").focus()
    expect(page.locator(".skip")).to_be_in_viewport()
    page.locator(".skip").evaluate(
        "(n) => n.addEventListener('click', () => setTimeout(() => history.replaceState(null, '', '/')))"
    )
    page.keyboard.press("Enter")
    expect(page.get_by_label("Your question")).to_be_focused()


WIDE = f"# {'Word' * 40}\n\n{'x' * 300} https://example.org/{'y' * 200}\n\n```\n{'code ' * 60}\n```\n\n| {' | '.join('abcdefgh' * 2 for _ in range(8))} |\n{'|---' * 8}|\n| {'z' * 90} |\n\n> > - {'w' * 90}\n\n`{'v' * 120}`"


@pytest.mark.parametrize("width", [320, 360, 400])
def test_on_a_phone_nothing_overflows(server: PageServer, browser: Browser, width: int) -> None:
    phone = Visit(server, browser, {"viewport": {"width": width, "height": 640}, "has_touch": True, "is_mobile": True})
    page = phone.page
    fits = "() => [document.scrollingElement, document.body, $('scroll'), document.querySelector('main')].every((n) => n.scrollWidth <= innerWidth)"
    assert page.evaluate(fits)
    server.replies = [Reply(events(WIDE)), Reply(status=400, error="e" * 200)]
    _ask(page, "q" * 200)
    expect(page.locator(".stats")).to_be_visible()
    assert page.evaluate(fits)
    _ask(page, "next")
    expect(_button(page, "Retry")).to_be_visible()
    assert page.evaluate(fits)
    page.get_by_role("button", name="Edit this question").last.tap()
    assert page.evaluate(fits)
    small = "[...document.querySelectorAll('input, textarea, select')].filter((n) => parseFloat(getComputedStyle(n).fontSize) < 16).map((n) => n.id)"
    assert page.evaluate(small) == []  # smaller ones make a phone zoom in
    expect(page.locator("#side")).not_to_be_in_viewport()
    page.get_by_role("button", name="Conversations").tap()
    expect(_button(page, "New conversation")).to_be_in_viewport(ratio=1)
    expect(_button(page, "Close the list")).to_be_focused()
    assert page.evaluate(fits)
    page.keyboard.press("Escape")
    expect(page.locator("#side")).not_to_be_in_viewport()
    page.get_by_role("button", name="Conversations").tap()
    _button(page, "New conversation").tap()
    expect(page.locator("#side")).not_to_be_in_viewport()
    _button(page, "Settings").tap()
    expect(_button(page, "Save")).to_be_visible()
    assert page.evaluate(
        "$('settings-dialog').scrollWidth <= innerWidth && $('settings-dialog').getBoundingClientRect().right <= innerWidth"
    )
    phone.leave()


_CONTRAST = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const paint = (colors) => { canvas.clearRect(0, 0, 1, 1); for (const c of colors) { canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1); } return canvas.getImageData(0, 0, 1, 1).data; };
  const light = ([r, g, b]) => [r, g, b].map((v) => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4).reduce((s, v, i) => s + v * [.2126, .7152, .0722][i], 0);
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let text; text = walker.nextNode();) {
    const node = text.parentElement;
    if (!text.data.trim() || !node.checkVisibility({ visibilityProperty: true }) || node.closest("script, style, :disabled, .unseen, .skip")) continue;
    const behind = [];
    for (let n = node; n; n = n.parentElement) behind.unshift(getComputedStyle(n).backgroundColor);
    const [a, b] = [light(paint(behind)), light(paint([...behind, getComputedStyle(node).color]))].sort();
    const ratio = (b + .05) / (a + .05);
    if (ratio < 4.5) found.push([text.data.slice(0, 30), ratio]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_it_shows_can_be_read_and_is_named(server: PageServer, browser: Browser, scheme: str) -> None:
    visit = Visit(server, browser, {"color_scheme": scheme})
    page = visit.page
    text = "# A\n\ntext `code` [link](https://x.org)\n\n> quote\n\n```py\nx\n```\n\n|a|b|\n|-|-|\n|1|2|\n"
    server.replies = [Reply(events(text)), Reply(status=400, error="wrong")]
    assert page.evaluate(_CONTRAST) == []
    _ask(page, "Q")
    expect(page.locator(".stats")).to_be_visible()
    _ask(page, "Q2")
    expect(_button(page, "Retry")).to_be_visible()
    page.get_by_role("button", name="Edit this question").first.click()
    page.get_by_role("button", name="Rename Q").focus()
    page.evaluate("tell('A notice', 'Undo', () => {})")
    assert page.evaluate(_CONTRAST) == []
    page.evaluate(
        "() => { $('key-dialog').show(); $('settings-dialog').show(); $('f-seed').value = 'x'; saveSettings(); }"
    )
    assert page.evaluate(_CONTRAST) == []
    nameless = """() => [...document.querySelectorAll("button, a, input, textarea, select, dialog, nav, [role=region]")]
      .filter((n) => !(n.ariaLabel || n.getAttribute("aria-labelledby") || n.textContent.trim() || n.labels?.length)).map((n) => n.outerHTML)"""
    assert page.evaluate(nameless) == []
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((n) => n.id)")
    assert len(ids) == len(set(ids))
    pointed = page.evaluate("[...document.querySelectorAll('[aria-describedby], [aria-labelledby], [aria-controls]')].flatMap((n) =>"
        " ['aria-describedby', 'aria-labelledby', 'aria-controls'].flatMap((a) => n.getAttribute(a)?.split(' ') ?? []))")  # fmt: skip
    assert set(pointed) <= set(ids)
    assert page.evaluate("document.documentElement.lang") == "en"
    assert page.locator("h1").count() == page.locator("main").count() == 1
    expect(page.locator("#log")).to_have_attribute("aria-live", "polite")
    visit.leave()


def test_the_theme_is_toggled_and_kept(page: Page) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    _button(page, "Light or dark").click()
    dark = page.evaluate(paper)
    assert light != dark
    page.reload()
    assert page.evaluate(paper) == dark
    _button(page, "Light or dark").click()
    assert page.evaluate(paper) == light
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(paper) == dark  # back with the system, it follows the system


def test_motion_can_be_declined(visit: Visit, hold: threading.Event) -> None:
    visit.server.replies = [Reply([hold])]
    visit.page.emulate_media(reduced_motion="reduce")
    _ask(visit.page, "Q")
    expect(visit.page.locator(".waiting")).to_have_css("animation-name", "none")


def test_it_scrolls_only_for_a_reader_at_the_end(visit: Visit, hold: threading.Event) -> None:
    stream = events(LONG, LONG, "The end.")
    visit.server.replies = [Reply([*stream[:2], hold, *stream[2:]])]
    page = visit.page
    distance = "$('scroll').scrollHeight - $('scroll').scrollTop - $('scroll').clientHeight"
    _ask(page, "Long")
    expect(_answers(page)).to_contain_text("A long line")
    page.wait_for_timeout(100)
    assert page.evaluate(distance) < 2
    page.locator("#scroll").hover()
    page.mouse.wheel(0, -500)
    expect(_button(page, "Go to the newest")).to_be_visible()
    before = page.evaluate("$('scroll').scrollTop")
    hold.set()
    _last(page, re.compile("The end.$"))
    assert page.evaluate("$('scroll').scrollTop") == before
    _button(page, "Go to the newest").click()
    page.wait_for_timeout(100)
    assert page.evaluate(distance) < 2
    expect(page.locator("#latest")).to_be_hidden()


# ---- Where the browser keeps nothing ----


def test_a_full_storage_is_said_and_the_conversation_goes_on(visit: Visit) -> None:
    page = visit.page
    page.evaluate(
        "for (let n = 2 ** 22; n >= 1; n = Math.floor(n / 2)) { try { for (let i = 0; ; i++) localStorage.setItem(`x${n}.${i}`, 'x'.repeat(n)); } catch { } }"
    )
    _ask(page, "Q")
    _last(page, "Yes.")
    expect(page.locator("#notice")).to_contain_text("storage is full")
    _ask(page, "Q2")
    _last(page, "Yes.")
    _button(page, "New conversation").click()
    page.locator("#list .title").click()
    _ask(page, "Q3")
    _last(page, "Yes.")
    assert len(_said(visit.server.asked[2])) == 5
    page.evaluate("for (const key of Object.keys(localStorage)) if (key.startsWith('x')) localStorage.removeItem(key)")
    _ask(page, "Q4")
    _last(page, "Yes.")
    page.reload()
    expect(page.locator("article")).to_have_count(8)


def test_without_storage_it_says_so_and_works(visit: Visit) -> None:
    refuse = "Object.defineProperty(window, '%s', { get() { throw new DOMException('denied', 'SecurityError'); } });"
    page = visit.open(refuse % "localStorage" + refuse % "sessionStorage")
    expect(page.locator("#notice")).to_contain_text("This browser keeps nothing")
    _ask(page, "Q")
    _last(page, "Yes.")
    expect(page.locator("#list .title")).to_have_text(["Q"])
    _button(page, "New conversation").click()
    page.locator("#list .title").click()
    expect(_answers(page)).to_have_text("Yes.")
