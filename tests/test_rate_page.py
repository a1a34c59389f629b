"""The page on which people rate: by keyboard, with progress and undo, for several raters, blindly, and without running what an answer says."""

from __future__ import annotations

import json
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from browsers import chromium
from injections import INJECTIONS
from playwright.sync_api import Browser, Page, Response, expect

from gemmary.errors import GemmaryError
from gemmary.evaluate.pairs import Pair
from gemmary.evaluate.questions import Question
from gemmary.evaluate.ratings import Ratings
from gemmary.evaluate.speakers import Said
from gemmary.serve.rate import RateServer


def pair(id: str, a: list[str], b: list[str], asked: list[str] | None = None) -> Pair:
    """Answers of A and of B, turn by turn."""
    turns = tuple(
        ({"role": "user", "content": text},) for text in (asked or [f"Question {id}.{i}" for i in range(len(a))])
    )
    return Pair(
        Question(id, "writing", turns), tuple(Said(text, False) for text in a), tuple(Said(text, False) for text in b)
    )


PAIRS = [pair(f"secret-{i}", [f"The A answer {i}."], [f"The B answer {i}."], [f"Question {i}"]) for i in range(4)]


@dataclass
class Site:
    """The page's server with its ratings."""

    pairs: list[Pair]
    path: Path
    server: RateServer = field(init=False)

    def __enter__(self) -> Site:
        self.ratings = Ratings(self.path)
        self.server = RateServer(self.pairs, self.ratings, port=0)
        self._thread = threading.Thread(target=self.server.run_until_closed, args=(lambda line: None,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.close()
        self._thread.join()
        self.ratings.close()

    @property
    def url(self) -> str:
        return self.server.address

    def given(self) -> dict[str, dict[str, float]]:
        """By prompt: what each rater gave to A."""
        ids = {one.key: one.question.id for one in self.pairs}
        return {ids[key]: by for key, by in self.ratings.by_pair().items()}

    def ask(self, route: str, body: Any, **headers: str) -> tuple[int, Any]:
        """A request as another program would send it."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"Content-Type": "application/json", **{key.replace("_", "-"): value for key, value in headers.items()}}
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + route, data, sent), timeout=5) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with Site(PAIRS, tmp_path / "ratings.sqlite") as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as launched:
        yield launched


class Visit:
    """A rater's browser; `leave` checks that nothing forbidden has happened."""

    def __init__(self, browser: Browser, site: Site, **options: Any) -> None:
        self.site, self.troubles, self.answers = site, list[str](), list[Response]()
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(5000)
        self.page = self.context.new_page()
        self.page.add_init_script(
            "window.violations = []; document.addEventListener('securitypolicyviolation', (e) => violations.push(e.violatedDirective));"
        )
        self.page.on("pageerror", lambda error: self.troubles.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: (self.troubles.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        self.page.on("console", lambda said: said.text.startswith("Failed to load") or self.troubles.append(said.text))
        self.page.on(
            "request", lambda asked: asked.url.startswith(site.url) or self.troubles.append(f"request: {asked.url}")
        )
        self.page.on("response", lambda answer: self.answers.append(answer))
        self.page.goto(site.url)

    def begin(self, name: str) -> None:
        self.page.get_by_label("Your name").fill(name)
        self.page.keyboard.press("Enter")
        expect(self.page.locator("#count")).to_have_text(re.compile(r"\d of \d"))

    def side(self, of: str) -> str:
        """The key that prefers this model's answer, as the page stands."""
        texts = self.page.locator(".answer .text").all_inner_texts()
        return str(1 + next(i for i, text in enumerate(texts) if f"The {of} answer" in text))

    def question(self) -> str:
        return self.page.locator(".asked .text").first.inner_text().replace("Question ", "secret-")

    def done(self, count: int, total: int = 4) -> None:
        expect(self.page.locator("#count")).to_have_text(f"{count} of {total}")

    def leave(self) -> None:
        assert self.page.evaluate("violations") == []
        assert self.page.evaluate("typeof window.canary") == "undefined"
        assert self.page.url == self.site.url
        self.context.close()
        assert self.troubles == []


@pytest.fixture
def visit(browser: Browser, site: Site) -> Iterator[Visit]:
    visiting = Visit(browser, site)
    yield visiting
    visiting.leave()


# ---- Rating ----


def test_rating_by_keyboard(visit: Visit) -> None:
    """A's answer is preferred wherever it stands; then a tie, a skip, and the end."""
    visit.begin("Anna")
    visit.done(0)
    asked = []
    for count, key in enumerate(("A", "B", "0", "s"), 1):
        asked.append(visit.question())
        visit.page.keyboard.press(visit.side(key) if key in "AB" else key)
        visit.done(count)
    expect(visit.page.get_by_text("All done. Thank you.")).to_be_visible()
    assert sorted(asked) == [one.question.id for one in PAIRS]
    assert visit.site.given() == {asked[0]: {"Anna": 1.0}, asked[1]: {"Anna": 0.0}, asked[2]: {"Anna": 0.5}}
    for key in ("1", "2", "0", "s", "x", "Enter"):
        visit.page.keyboard.press(key)
    visit.done(4)


def test_undo_brings_the_pair_back(visit: Visit) -> None:
    visit.begin("Anna")
    expect(visit.page.get_by_role("button", name="Undo")).to_be_disabled()
    visit.page.keyboard.press("u")
    first = visit.question()
    visit.page.keyboard.press("1")
    visit.done(1)
    second = visit.question()
    assert second != first
    visit.page.keyboard.press("s")
    visit.done(2)
    visit.page.keyboard.press("U")
    visit.done(1)
    assert visit.question() == second
    visit.page.get_by_role("button", name="Undo").click()
    visit.done(0)
    assert visit.question() == first
    assert visit.site.given() == {}
    visit.page.keyboard.press(visit.side("B"))
    visit.done(1)
    assert visit.site.given() == {first: {"Anna": 0.0}}


def test_buttons_do_as_keys(visit: Visit) -> None:
    visit.begin("Anna")
    first = visit.question()
    visit.page.get_by_role("button", name="Tie").click()
    visit.done(1)
    assert visit.site.given() == {first: {"Anna": 0.5}}


def test_keys_of_the_browser_and_typing_rate_nothing(visit: Visit) -> None:
    visit.page.get_by_label("Your name").press_sequentially("u12s0")
    visit.begin("u12s0")
    visit.page.keyboard.press("Control+1")
    visit.page.keyboard.press("Alt+2")
    visit.page.wait_for_timeout(100)
    visit.done(0)
    assert visit.site.ratings.by_pair() == {}


def test_two_raters_and_a_name_that_comes_back(browser: Browser, site: Site, visit: Visit) -> None:
    visit.begin("Anna")
    question = visit.question()
    visit.page.keyboard.press(visit.side("A"))
    visit.done(1)
    other = Visit(browser, site)
    other.begin("Ben")
    other.done(0)
    for _ in range(4):
        if other.question() == question:
            other.page.keyboard.press(other.side("B"))
            break
        before = other.question()
        other.page.keyboard.press("s")
        expect(other.page.locator(".asked .text")).not_to_have_text(before.replace("secret-", "Question "))
    expect(other.page.locator("#count")).not_to_have_text("0 of 4")
    other.leave()
    visit.page.reload()  # the tab knows who rates
    visit.done(1)
    visit.page.get_by_role("button", name="Anna").click()  # somebody else sits down
    visit.begin("Ben")
    visit.done(len(site.ratings.seen("Ben")))
    assert site.given()[question] == {"Anna": 1.0, "Ben": 0.0}


def test_sides_are_of_chance_and_stay(browser: Browser, tmp_path: Path) -> None:
    many = [pair(str(i), [f"The A answer {i}."], [f"The B answer {i}."]) for i in range(40)]
    with Site(many, tmp_path / "many.sqlite") as site:
        sides = {}
        view = site.ask("next", {"rater": "Anna"})[1]
        while "pair" in view:
            again = site.ask("next", {"rater": "Anna"})[1]
            assert again == view
            sides[view["pair"]] = "A" in view["turns"][0]["first"]
            view = site.ask("rate", {"rater": "Anna", "pair": view["pair"], "choice": "first"})[1]
        assert 8 < sum(sides.values()) < 32
        given = site.ratings.by_pair()
        assert all(given[key]["Anna"] == float(first) for key, first in sides.items())


def test_two_turns_and_an_earlier_answer(browser: Browser, tmp_path: Path) -> None:
    history = (
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two"},
        {"role": "user", "content": "Three"},
    )
    question = Question("x", "all", (history, ({"role": "user", "content": "Four"},)))
    one = Pair(question, (Said("a1", False), Said("", False)), (Said("b1", False), Said("b2", False)))
    equal = pair("equal", ["The same."], ["The same. "])
    with Site([one, equal], tmp_path / "two.sqlite") as site:
        visit = Visit(browser, site)
        visit.begin("Anna")
        visit.done(0, total=1)
        assert visit.page.locator(".asked .text").all_inner_texts() == ["One", "Two", "Three", "Four"]
        assert visit.page.locator(".asked small").all_inner_texts().count("An earlier answer, of neither") == 1
        answers = visit.page.locator(".answer .text").all_inner_texts()
        assert answers in (["a1", "b1", "(an empty answer)", "b2"], ["b1", "a1", "b2", "(an empty answer)"])
        visit.leave()


# ---- Blind, and safe ----


def test_nothing_says_whose_answer_it_is(visit: Visit) -> None:
    visit.begin("Anna")
    for count in range(1, 5):
        visit.page.keyboard.press("1")
        visit.done(count)
    visit.page.keyboard.press("u")
    visit.done(3)
    seen = [f"{answer.all_headers()} {answer.text()}" for answer in visit.answers]
    sent = "\n".join(seen) + visit.page.content()
    assert "The A answer" in sent  # the texts are there; ids, categories and names are not
    for word in ("secret", "writing", "category"):
        assert word not in sent
    views = [json.loads(text[text.index('{"done"') :]) for text in seen if '{"done"' in text]
    assert len(views) == 6
    assert all(set(view) <= {"done", "total", "pair", "turns"} for view in views)
    assert all(set(turn) == {"asked", "first", "second"} for view in views for turn in view.get("turns", ()))


def test_scripts_in_answers_do_not_run(browser: Browser, tmp_path: Path) -> None:
    whole = "\n".join(INJECTIONS)
    some = [pair("all", [whole], ["x"], [whole])]
    some += [pair(str(i), [text], ["x"]) for i, text in enumerate(INJECTIONS[::16])]
    with Site(some, tmp_path / "bad.sqlite") as site:
        visit = Visit(browser, site)
        visit.begin("<img src=x onerror=window.canary=1>")
        texts = []
        for count in range(1, len(some) + 1):
            texts += visit.page.locator(".answer .text").evaluate_all("nodes => nodes.map((node) => node.textContent)")
            assert (
                visit.page.locator("#turns").evaluate(
                    "node => node.querySelectorAll('script, img, a, svg, iframe, style').length"
                )
                == 0
            )
            visit.page.keyboard.press("0")
            visit.done(count, total=len(some))
        shown = [text.strip() for text in (whole, *INJECTIONS[::16])]
        assert sorted(text for text in texts if text != "x") == sorted(shown)
        visit.page.wait_for_timeout(100)
        visit.leave()


def test_the_policy_lets_nothing_else_run(site: Site) -> None:
    with urllib.request.urlopen(site.url, timeout=5) as answer:
        policy, page = answer.headers["content-security-policy"], answer.read().decode()
    for word in ("default-src 'none'", "require-trusted-types-for 'script'", "frame-ancestors 'none'"):
        assert word in policy
    assert "unsafe" not in policy
    assert len(re.findall("'sha256-", policy)) == 2
    assert not re.findall(r"(?:src|href)=|https?://|innerHTML|insertAdjacent", page)
    assert len(page.splitlines()) < 300


def test_a_server_that_is_gone_is_said_and_nothing_is_lost(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "gone.sqlite"
    with Site(PAIRS, path) as site:
        visit = Visit(browser, site)
        visit.begin("Anna")
        visit.page.keyboard.press("1")
        visit.done(1)
        visit.context.set_offline(True)
        visit.page.keyboard.press("2")
        expect(visit.page.get_by_role("alert")).to_contain_text("The server does not answer. Nothing was changed")
        visit.done(1)
        visit.context.set_offline(False)
        visit.page.keyboard.press("2")
        visit.done(2)
        expect(visit.page.get_by_role("alert")).to_be_hidden()
        visit.context.close()
    with closing(Ratings(path)) as again:
        assert len(again.by_pair()) == 2


def test_requests_that_are_refused(site: Site) -> None:
    key = PAIRS[0].key
    rating = {"rater": "Anna", "pair": key, "choice": "first"}
    bad: list[tuple[str, Any, dict[str, str], int]] = [
        ("rate", {**rating, "choice": "a"}, {}, 400),
        ("rate", {**rating, "rater": "  "}, {}, 400),
        ("rate", {**rating, "rater": "x" * 61}, {}, 400),
        ("rate", {**rating, "rater": "a\nb"}, {}, 400),
        ("rate", {**rating, "rater": 5}, {}, 400),
        ("rate", {**rating, "more": 1}, {}, 400),
        ("rate", {**rating, "pair": "f" * 32}, {}, 404),
        ("rate", b"{", {}, 400),
        ("rate", b'{"rater": "\\ud800", "pair": "", "choice": "tie"}', {}, 400),
        ("rate", b" " * 5000, {}, 413),
        ("rate", rating, {"Content_Type": "text/plain"}, 415),
        ("rate", rating, {"Host": "elsewhere.example"}, 403),
        ("elsewhere", rating, {}, 404),
    ]
    for route, body, headers, status in bad:
        code, answer = site.ask(route, body, **headers)
        assert (code, set(answer)) == (status, {"error"}), (route, body)
    assert site.ratings.by_pair() == {}
    assert site.ask("rate", rating)[1]["done"] == 1


def test_other_machines_need_the_key(browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GEMMARY_API_KEY", raising=False)
    with closing(Ratings(tmp_path / "r.sqlite")) as ratings:
        server = RateServer(PAIRS, ratings, host="0.0.0.0", port=0)
        thread = threading.Thread(target=server.run_until_closed, args=(lambda line: None,))
        thread.start()
        try:
            address, _, key = server.address.partition("#")
            assert len(key) > 20
            port = int(address.rstrip("/").rpartition(":")[2])
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/next", b'{"rater": "A"}', {"Content-Type": "application/json"}
            )
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(request, timeout=5)
            assert refused.value.code == 401
            refused.value.close()
            page: Page = browser.new_page()
            page.goto(f"http://127.0.0.1:{port}/#{key}")
            page.get_by_label("Your name").fill("Anna")
            page.keyboard.press("Enter")
            expect(page.locator("#count")).to_have_text("0 of 4")
            page.close()
        finally:
            server.close()
            thread.join()


def test_an_address_that_is_taken(tmp_path: Path, site: Site) -> None:
    port = int(site.url.rstrip("/").rpartition(":")[2])
    with pytest.raises(GemmaryError, match=f"cannot listen on 127.0.0.1 port {port}: .*--port"):
        RateServer(PAIRS, site.ratings, port=port)


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window(browser: Browser, tmp_path: Path, width: int) -> None:
    long = pair("x", ["word " * 300 + "\n" + "x" * 500], ["    code = 1\n" * 30], ["y" * 400])
    with Site([long], tmp_path / "long.sqlite") as site:
        visit = Visit(browser, site, viewport={"width": width, "height": 800})
        visit.begin("A name of sixty characters, which is the most that may be given"[:60])
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
        for name in ("First", "Tie", "Second", "Skip", "Undo"):
            expect(visit.page.get_by_role("button", name=name, exact=False).last).to_be_in_viewport()
        visit.leave()
