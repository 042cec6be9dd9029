"""The kiosk page in a real browser: questions about samples, the boxes of gazes, citations."""

import io
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image
from playback import BOXES, QUESTION, SCRIPT, PlaybackPolicy

from gog_edge.picture import MEDIA_TYPES

playwright = pytest.importorskip("playwright.sync_api")

CHROMIUM = shutil.which("chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]

# The sides of compared pictures, in pixels, that are larger than the boxes around them.
IMAGES_FIT = """() => [...document.querySelectorAll(".pair .shot > *")].flatMap((image) => {
  const inner = image.getBoundingClientRect(), outer = image.parentElement.getBoundingClientRect();
  return [inner.width - outer.width, inner.height - outer.height].filter((excess) => excess > 0.5);
})"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Opens the page; its requests and errors are recorded on the page object."""
    contexts = []

    def open_at(url, **options):
        contexts.append(browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options}))
        page = contexts[-1].new_page()
        page.set_default_timeout(120_000)
        page.hosts, page.faults = set(), []
        page.on("request", lambda request: page.hosts.add(request.url.split("/")[2] if "://" in request.url else ""))
        page.on("console", lambda line: page.faults.append(line.text) if line.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.goto(url)
        page.wait_for_selector(".chip")
        return page

    yield open_at
    for context in contexts:
        context.close()


def keep(page, name: str) -> None:
    """Save a screenshot to the folder KIOSK_SHOTS, if that is set."""
    if folder := os.environ.get("KIOSK_SHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


def test_ask_about_a_sample(start, make_runtime, open_page):
    url = start(make_runtime(PlaybackPolicy(pause_s=0.02)))
    page = open_page(url)
    keep(page, "start")
    page.click(f".chip:has-text('{QUESTION}')")
    page.wait_for_selector("#overlay g.part .box")
    rect = {name: float(page.get_attribute("#overlay g.part .box", name)) for name in ("x", "y", "width", "height")}
    box = BOXES["Romania"]
    assert rect == {"x": box.x0, "y": box.y0, "width": box.width, "height": box.height}
    keep(page, "gaze")
    page.wait_for_selector("#answer .says")
    assert page.inner_text("#answer .says").startswith("The Romanian leu.")
    assert "Romania" in page.inner_text("#answer .cite") and page.locator("#answer .related").count() == 0
    page.wait_for_timeout(700)
    keep(page, "answer")
    page.click("#answer .ref")
    page.wait_for_selector(".quote.hit:has-text('The currency of Romania is the Romanian leu.')")
    keep(page, "citation")
    thought = page.inner_text(".thought >> nth=0")
    assert thought == "The flag on the right has a blue, a yellow and a red stripe. I look closer."
    assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    assert page.evaluate(IMAGES_FIT) == []
    assert page.hosts - {""} == {url.split("/")[2]}  # "" is data: and blob:
    assert page.faults == []


def test_dark_and_small(start, make_runtime, open_page):
    url = start(make_runtime())
    page = open_page(url, color_scheme="dark")
    page.click(".chip >> nth=0")
    page.wait_for_selector("#answer .says")
    page.wait_for_timeout(700)
    keep(page, "dark")
    phone = open_page(url, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True,
                      device_scale_factor=2)
    keep(phone, "phone-start")
    assert phone.is_visible("#camera")
    phone.tap(".chip >> nth=0")
    phone.wait_for_selector("#answer .says")
    phone.wait_for_timeout(700)
    keep(phone, "phone-answer")
    assert phone.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.faults == phone.faults == []


def test_own_picture_by_keyboard(start, make_runtime, open_page, scene_png):
    page = open_page(start(make_runtime()))
    page.set_input_files("#file", {"name": "mine.png", "mimeType": "image/png", "buffer": scene_png})
    page.wait_for_selector("#picture[alt='Your picture']")
    assert page.locator(".chip").count() == 0
    page.focus("#question")
    page.keyboard.type(QUESTION)
    page.keyboard.press("Enter")
    page.wait_for_selector("#answer .says")
    assert page.faults == []


def test_a_file_that_is_not_a_picture(start, make_runtime, open_page):
    page = open_page(start(make_runtime()))
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": b"no picture"})
    page.wait_for_selector("#answer.oops:has-text('cannot be shown as a picture')")
    keep(page, "oops")
    assert page.is_disabled("#go") and page.locator(".chip").count() == 0


@pytest.mark.parametrize("name, kind, body", [
    ("a.svg", "image/svg+xml", b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>"),
    ("a.tif", "image/tiff", b"II*\0"), ("a", "", b"no picture"),
])  # fmt: skip
def test_a_file_of_a_type_that_is_not_accepted(start, make_runtime, open_page, name, kind, body):
    """A browser shows a drawing, which the server refuses."""
    page = open_page(start(make_runtime()))
    page.set_input_files("#file", {"name": name, "mimeType": kind, "buffer": body})
    page.wait_for_selector("#answer.oops:has-text('Choose a JPEG, PNG, WebP, GIF, BMP or AVIF file.')")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF"])
def test_what_the_page_shows_is_accepted(start, make_runtime, open_page, form):
    page = open_page(start(make_runtime()))
    assert MEDIA_TYPES[form] in page.get_attribute("#file", "accept").split(",")
    stream = io.BytesIO()
    Image.new("RGB", (300, 200), (200, 50, 50)).save(stream, form)
    page.set_input_files("#file", {"name": "a", "mimeType": MEDIA_TYPES[form], "buffer": stream.getvalue()})
    page.fill("#question", QUESTION)
    page.click("#go")
    page.wait_for_selector("#answer .says")
    assert page.faults == []


def test_a_passage_without_the_answer_is_shown_as_related(start, make_runtime, open_page):
    script = [SCRIPT[0], ("", type(SCRIPT[1][1])("A sort of money"))]
    page = open_page(start(make_runtime(PlaybackPolicy(script=script))))
    page.click(".chip >> nth=0")
    page.wait_for_selector("#answer .says")
    assert page.inner_text("#answer .related").startswith("Related passage")
    assert "The currency of Romania is the Romanian leu." in page.inner_text("#answer .related .cite")
    assert page.locator("#answer .ref").count() == 0
    page.wait_for_timeout(700)
    keep(page, "related")
    page.click("#answer .related .cite")
    page.wait_for_selector(".quote.hit:has-text('The currency of Romania is the Romanian leu.')")
    assert page.faults == []


def test_stop(start, make_runtime, open_page):
    policy = PlaybackPolicy(script=[("word " * 400, SCRIPT[0][1])], pause_s=0.02)
    page = open_page(start(make_runtime(policy)))
    page.click(".chip >> nth=0")
    page.wait_for_selector(".thought:has-text('word word')")
    page.click("#go")
    page.wait_for_selector("#answer:has-text('Stopped')")
    assert policy.opened[0].closed.wait(60)


def test_evidence_is_text_only(start, make_runtime, open_page):
    script = [("<reason>look</reason>", SCRIPT[0][1]), ("", type(SCRIPT[1][1])("<img src=x onerror=alert(1)>"))]
    page = open_page(start(make_runtime(PlaybackPolicy(script=script))))
    page.click(".chip >> nth=0")
    page.wait_for_selector("#answer .says")
    assert page.inner_text("#answer .says").startswith("<img src=x")
    assert page.locator("#answer img[src=x]").count() == 0
