"""The page in a real browser: headless Chromium through Playwright. Skipped where there is no Chromium."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving import Running, serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SHOTS = os.environ.get("LIFT_SCREENSHOTS")  # a folder: pictures go there
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt-get install chromium)")
BELLS = "# The bells of Corriden\n\n" + "The ferryman Oswin Tarrel rang the bell of Corriden on 3 May 1743. " * 12


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    home = tmp_path_factory.mktemp("home")
    with serving(tiny_folder, "tasks.writer=extractive", "server.document_epochs=5000", home=home) as running:
        yield running


def open_page(browser: Any, url: str, **options: Any) -> tuple[Any, list[str]]:
    """A page of a fresh browser profile, and what goes wrong on it."""
    page = browser.new_context(**options).new_page()
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.set_default_timeout(60_000)
    page.goto(url)
    page.get_by_text("Ready ·").wait_for()
    return page, wrong


def shot(page: Any, name: str) -> None:
    if SHOTS:
        page.screenshot(path=f"{SHOTS}/{name}.png")


def test_upload_ask_reload_delete(browser: Any, server: Running, tmp_path: Path) -> None:
    page, wrong = open_page(browser, server.url)
    file = tmp_path / "bells.md"
    file.write_text(BELLS)
    page.get_by_label("Add a document").set_input_files(file)
    page.get_by_text("Or paste text").click()
    page.get_by_label("Epochs").fill("3")
    page.get_by_role("button", name="Absorb").click()
    page.get_by_role("heading", name="The bells of Corriden").wait_for()
    page.get_by_label("Question").wait_for()  # the tab of asking opens when it is ready
    assert "ready" in page.locator("#facts").inner_text()

    page.get_by_label("Text in the window").select_option("none")
    page.get_by_label("Also answer without the document").check()
    page.get_by_label("Question").fill("Who rang the bell?")
    page.get_by_label("Question").press("Enter")
    page.locator(".answer[aria-busy=false] small", has_text="tokens in").nth(1).wait_for()
    answers = page.locator(".answer")
    assert answers.count() == 2
    model = server.client.get("/v1/documents").json()["data"][0]["id"]
    body = {"messages": [{"role": "user", "content": "Who rang the bell?"}]}
    for at, sent in enumerate([body | {"model": model, "context": "none"}, body | {"model": "tiny-llama"}]):
        told = server.client.post("/v1/chat/completions", json=sent).json()["choices"][0]["message"]["content"]
        assert answers.nth(at).locator("p").text_content() == told
    page.get_by_label("Question").fill("When?")  # the second turn holds the first
    page.get_by_role("button", name="Ask", exact=True).click()
    page.locator(".turn").nth(1).locator(".answer[aria-busy=false]").nth(1).wait_for()

    for number in range(4):  # however long the talk grows, the question box stays in sight
        page.get_by_label("Question").fill(f"And then, {number}?")
        page.get_by_label("Question").press("Enter")
        page.locator(".turn").nth(number + 2).locator(".answer[aria-busy=false]").nth(1).wait_for()
    assert page.evaluate("document.documentElement.scrollHeight > innerHeight + 200")
    assert page.evaluate("document.getElementById('ask').getBoundingClientRect().bottom <= innerHeight + 1")
    shot(page, "answered")
    page.get_by_role("tab", name="Tasks").click()
    page.locator("#tasks li").first.wait_for()
    shot(page, "tasks")
    total = page.locator("#task-count").inner_text()
    assert "questions" in total
    page.get_by_label("Search").last.fill("no such words at all")
    page.get_by_text("No tasks.").wait_for()
    page.get_by_role("tab", name="Loss").click()
    assert page.locator("#curve path").count() == 2
    assert "Loss (nats a token)" in page.locator("#curve-text").inner_text()

    page.reload()
    page.get_by_role("heading", name="The bells of Corriden").wait_for()
    page.get_by_label("Question").wait_for()
    page.locator("#search").fill("nothing like it")
    page.get_by_text("No document matches.").wait_for()
    page.locator("#search").fill("corriden")
    page.locator("#documents button").wait_for()

    page.get_by_role("button", name="Delete this document").click()
    page.get_by_role("button", name="Keep it").click()
    page.get_by_role("button", name="Delete this document").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    page.locator("#search").fill("")
    page.get_by_text("Nothing here yet.").wait_for()
    assert server.client.get("/v1/documents").json()["data"] == []
    assert [text for text in wrong if "413" not in text] == []  # a talk over the window loses its oldest turns


def test_absorbing_is_shown_while_it_goes_on_and_can_be_cancelled(browser: Any, server: Running) -> None:
    page, wrong = open_page(browser, server.url)
    reply = server.client.post("/v1/documents", json={"text": BELLS, "settings": {"training": {"epochs": 3000}}})
    page.reload()
    page.locator("#documents button").click()
    page.locator("#step", has_text=" of ").wait_for()
    first = page.locator("#step").inner_text()
    page.wait_for_function("first => document.getElementById('step').textContent !== first", arg=first)
    for figure in ("#loss", "#speed", "#left"):
        assert any(map(str.isdigit, page.locator(figure).inner_text())), figure
    assert page.locator("#curve path").count() == 2
    assert page.get_by_role("tab", name="Ask", exact=True).is_disabled()
    shot(page, "absorbing")
    page.get_by_role("button", name="Cancel").click()
    page.locator("#facts", has_text="cancelled").wait_for()
    server.client.delete(f"/v1/documents/{reply.json()['id']}")
    assert wrong == []


@pytest.mark.slow
def test_errors_are_sentences(browser: Any, server: Running, tmp_path: Path) -> None:
    page, _ = open_page(browser, server.url)
    problem = page.locator("#problem")
    page.get_by_role("button", name="Absorb").click()
    problem.get_by_text("Choose a file or paste some text first.").wait_for()
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0")
    page.get_by_label("Add a document").set_input_files(picture)
    page.get_by_role("button", name="Absorb").click()
    problem.get_by_text('"picture.png" is a PNG image, which cannot be converted to text.').wait_for()
    page.get_by_role("button", name="Dismiss").click()
    assert problem.is_hidden()
    text = "A <b>bold</b> title with <img src=x onerror=alert(1)>"
    document = server.absorb(f"{text}\n\n{BELLS}")
    page.reload()
    page.locator("#documents button").click()
    assert "<img" in page.locator("#document-title").inner_text()  # shown, not run
    page.get_by_label("Question").fill("Who? " * 300)
    page.get_by_role("button", name="Ask", exact=True).click()
    page.locator(".answer p.failed", has_text="more than the window of 256").wait_for()
    server.client.delete(f"/v1/documents/{document['id']}")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phones_width(browser: Any, server: Running, scheme: str) -> None:
    document = server.absorb(BELLS)
    page, wrong = open_page(browser, server.url, viewport={"width": 360, "height": 740}, color_scheme=scheme)
    for _ in range(2):
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= 360
        small = page.evaluate(
            "[...document.querySelectorAll('button')].filter(b => b.offsetHeight && b.offsetHeight < 32).map(b => b.outerHTML)"
        )
        assert small == []
        page.locator("#documents button").click()
        page.get_by_label("Question").wait_for()
        assert page.locator("#library").is_hidden()
        shot(page, f"phone-{scheme}")
        page.get_by_role("button", name="← Documents").click()
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, colour[4:-1].split(","))) < 200) == (scheme == "dark")
    server.client.delete(f"/v1/documents/{document['id']}")
    assert wrong == []


@pytest.mark.slow
def test_by_keyboard_alone(browser: Any, server: Running) -> None:
    document = server.absorb(BELLS)
    page, wrong = open_page(browser, server.url)

    def tab_to(found: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate("sel => document.activeElement.matches(sel)", found):
                outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert outline != "none" or found == "#file"
                return
        raise AssertionError(f"{found} is not reached")

    tab_to("#file")
    tab_to("#documents button")
    page.keyboard.press("Enter")
    page.get_by_label("Question").wait_for()
    tab_to("#tab-chat")
    page.keyboard.press("ArrowRight")
    page.locator("#tasks li").first.wait_for()
    page.keyboard.press("ArrowLeft")
    tab_to("#question")
    page.keyboard.type("Who rang?")
    page.keyboard.press("Enter")
    page.locator(".answer[aria-busy=false]").wait_for()
    tab_to("#delete")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.get_by_text("Nothing here yet.").wait_for()
    assert server.client.get(f"/v1/documents/{document['id']}").status_code == 404
    assert wrong == []


@pytest.mark.slow
def test_a_key_is_asked_for_and_kept_in_the_tab(browser: Any, tiny_folder: Path, tmp_path: Path) -> None:
    from liftlm.server.keys import make_key

    with serving(tiny_folder, home=tmp_path / "home", keys_required=True) as server:
        _, key = make_key(server.service.store, "me")
        page = browser.new_context().new_page()
        page.goto(server.url)
        page.get_by_label("Key", exact=True).fill("wrong")
        page.get_by_role("button", name="Use it").click()
        page.get_by_label("Key", exact=True).fill(key)
        page.get_by_role("button", name="Use it").click()
        page.get_by_text("Ready ·").wait_for()
        page.reload()
        page.get_by_text("Ready ·").wait_for()
