"""The page in headless Chromium (the system's, or Playwright's own) against a real server process: `make test-ui`.

The model's tokens are bytes, so answers are noise; what is asserted is what the page does with them.
"""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from .conftest import KEY, ServerProcess

pytestmark = pytest.mark.browser


def expect(locator: Any) -> Any:
    from playwright.sync_api import expect

    return expect(locator)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, server: ServerProcess) -> Iterator[Any]:
    """The page with its key, on a desktop."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(f"{server.url}/")
    page.fill("#key", KEY)
    page.keyboard.press("Enter")
    page.wait_for_selector(".welcome")
    page.click("#show-settings")
    page.fill("[name=max_tokens]", "24")
    page.fill("[name=temperature]", "0")
    yield page
    context.close()
    assert not wrong


def say(page: Any, text: str, status: str = "Answered.") -> None:
    page.fill("#input", text)
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text(status, timeout=30_000)


def test_a_conversation_is_kept_edited_and_answered_again(page: Any) -> None:
    say(page, "Hello")
    say(page, "Again")
    assert page.locator(".message").count() == 4
    assert "24 tokens" in page.locator(".message .stats").nth(1).inner_text()
    first = page.locator(".message .content").nth(1).inner_text()
    page.locator(".message.assistant .retry").first.click()
    expect(page.locator(".message")).to_have_count(2)
    expect(page.locator("#status")).to_have_text("Answered.", timeout=30_000)
    assert page.locator(".message .content").nth(1).inner_text() == first
    page.locator(".message.user .edit").first.click()
    assert page.input_value("#input") == "Hello" and page.locator(".message").count() == 0
    say(page, "Other")
    page.reload()
    page.wait_for_selector(".message")
    assert page.locator(".message.user .content").inner_text() == "Other"
    page.click("#new")
    assert page.locator(".message").count() == 0
    page.locator("#conversations .open").first.click()
    assert page.locator(".message.user .content").inner_text() == "Other"


def test_escape_stops_an_answer_and_what_was_said_stays(page: Any, server: ServerProcess) -> None:
    page.fill("[name=max_tokens]", "")
    page.fill("#input", "Hello")
    page.keyboard.press("Enter")
    expect(page.locator("#stop")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#send")).to_be_visible(timeout=10_000)
    expect(page.locator("#status")).to_have_text("Stopped.")


def test_what_a_model_or_a_user_writes_is_text(page: Any) -> None:
    say(page, "<img src=x onerror=alert(1)> **bold** `code`")
    content = page.locator(".message.user .content")
    assert content.locator("img").count() == 0
    assert content.locator("strong").inner_text() == "bold"
    assert content.locator("code").inner_text() == "code"


def test_views_by_the_keyboard_and_what_they_show(page: Any) -> None:
    page.focus("#tab-chat")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#server")).to_be_visible()
    expect(page.locator("#server-state")).to_contain_text("in flight", timeout=5_000)
    assert page.locator("#plots figure").count() == 6
    page.keyboard.press("ArrowRight")
    expect(page.locator("#card-content")).to_contain_text("no accuracy card")


def test_light_and_dark_are_the_readers_choice(browser: Any, server: ServerProcess) -> None:
    context = browser.new_context(color_scheme="dark")
    page = context.new_page()
    page.goto(f"{server.url}/ui")
    page.fill("#key", KEY)
    page.keyboard.press("Enter")
    page.wait_for_selector(".welcome")
    paper = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(f"() => {paper}")
    page.click("#theme")
    light = page.evaluate(f"() => {paper}")
    page.reload()
    page.wait_for_selector(".welcome")
    assert dark != light == page.evaluate(f"() => {paper}")
    context.close()


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_screen(browser: Any, server: ServerProcess, width: int) -> None:
    context = browser.new_context(viewport={"width": width, "height": 740})
    page = context.new_page()
    page.goto(f"{server.url}/")
    page.fill("#key", KEY)
    page.keyboard.press("Enter")
    page.wait_for_selector(".welcome")
    for tab in ("chat", "server", "card"):
        page.click(f"#tab-{tab}")
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    context.close()


def test_a_wrong_key_is_asked_for_again(browser: Any, server: ServerProcess) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"{server.url}/")
    page.fill("#key", "wrong")
    page.keyboard.press("Enter")
    page.fill("#key", KEY)
    page.keyboard.press("Enter")
    page.wait_for_selector(".welcome")
    assert (
        page.evaluate("() => Object.keys(localStorage).some((name) => /key/.test(name))") is False
    )
    context.close()
