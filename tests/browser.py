"""A real browser that opens pages as people do: narrow and wide, light and dark, without a network.

It lives in a thread of its own: Playwright keeps an event loop running where it is started, and others start theirs in
the main thread.
"""

import dataclasses
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

EXECUTABLES = ("chromium", "chromium-browser", "google-chrome")
OWN_SCHEMES = ("file:", "data:")  # of requests that need no network
VIEWS = ((400, "light"), (400, "dark"), (1200, "dark"))
HEIGHT = 900
PATIENCE_MS = 600_000  # a busy machine is slow; a browser that hangs fails its test
LEAST_CONTRAST = 4.5  # of WCAG 2 AA, for text of normal size
# Where to keep a picture of each page and view, to look at them.
SCREENSHOTS = os.environ.get("FLOWAR_TEST_SCREENSHOTS")

LOOK = """() => {
  const numbers = colour => (colour.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => {
    const linear = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    return 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  };
  const ground = element => {
    for (let own = element; own; own = own.parentElement) {
      const colour = numbers(getComputedStyle(own).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];  // nobody has set one: the browser's
  };
  const texts = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || element.closest('title') || !element.getClientRects().length) continue;
    const style = getComputedStyle(element), isDrawn = element.namespaceURI.endsWith('svg');
    const [a, b] = [light(numbers(isDrawn ? style.fill : style.color)), light(ground(element))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    texts.push([contrast, walker.currentNode.data.trim().slice(0, 40)]);
  }
  return {
    texts,
    ground: light(ground(document.body)),
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    images: [...document.images].map(one => [
      one.alt, ...['width', 'height'].map(name => Number(one.getAttribute(name))), one.naturalWidth, one.naturalHeight,
    ]),
    foreign: [...document.querySelectorAll('script, iframe, object, embed, form, [onerror], [onload], [onclick]')]
      .map(one => one.outerHTML.slice(0, 80)),
    text: document.body.innerText,
    title: document.title,
  };
}"""


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a browser found on a page, in one view."""

    requests: list[str]  # but those of files and of data inside the page
    complaints: list[str]  # of the console, of scripts, dialogs
    texts: list[tuple[float, str]]  # each with its contrast
    ground: float  # how light the background is, 0 to 1
    overflow: int  # pixels that the page is wider than the window
    images: list[tuple[str, int, int, int, int]]  # text, size as written, size of the picture itself
    foreign: list[str]  # elements that no page has
    text: str
    title: str


def find_browser() -> str | None:
    """Return the path of a Chromium, or None."""
    return next((path for name in EXECUTABLES if (path := shutil.which(name))), None)


class Browser:
    """A Chromium without a window."""

    def __init__(self, executable: str) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._thread.submit(self._start, executable).result()

    def _start(self, executable: str) -> None:
        from playwright.sync_api import sync_playwright

        self._playwright = sync_playwright().start()
        arguments = ["--no-sandbox", "--disable-gpu"]  # the sandbox refuses root, who tests in containers
        self._chromium = self._playwright.chromium.launch(
            executable_path=executable, args=arguments, timeout=PATIENCE_MS
        )

    def close(self) -> None:
        """End it."""
        self._thread.submit(self._chromium.close).result()
        self._thread.submit(self._playwright.stop).result()
        self._thread.shutdown()

    def look(self, file: Path, width: int, scheme: str) -> Seen:
        """Return what there is on a page in a window of this width, "light" or "dark"."""
        return self._thread.submit(self._look, file, width, scheme).result()

    def _look(self, file: Path, width: int, scheme: str) -> Seen:
        context = self._chromium.new_context(viewport={"width": width, "height": HEIGHT}, color_scheme=scheme)
        context.set_default_timeout(PATIENCE_MS)
        try:
            page, requests, complaints = context.new_page(), [], []
            page.on("request", lambda request: requests.append(request.url))
            page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("dialog", lambda dialog: (complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
            page.goto(file.absolute().as_uri())
            if SCREENSHOTS:
                name = re.sub(r"[^\w.-]+", "_", "_".join(file.parts[-3:]))
                page.screenshot(path=Path(SCREENSHOTS) / f"{name}_{width}_{scheme}.png", full_page=True)
            found = page.evaluate(LOOK)
        finally:
            context.close()
        foreign = [url for url in requests if not url.startswith(OWN_SCHEMES)]
        return Seen(requests=foreign, complaints=complaints, **found)


def check_page(browser: Browser, file: Path, *, names: tuple[str, ...] = (), num_images: int | None = None) -> None:
    """Open a page in all views: it asks for nothing, complains of nothing, fits, is readable and has its pictures.

    Args:
        browser: of the fixture.
        file: the page.
        names: that must stand there as they are, and not as markup.
        num_images: how many pictures; None: any number.
    """
    for width, scheme in VIEWS:
        seen, where = browser.look(file, width, scheme), f"{file.name}, {width} px, {scheme}"
        assert seen.requests == [], where
        assert seen.complaints == [], where
        assert seen.foreign == [], where
        assert seen.overflow <= 0, where
        assert (seen.ground < 0.1) == (scheme == "dark"), where
        assert [text for text in seen.texts if text[0] < LEAST_CONTRAST] == [], where
        assert len(seen.texts) > 10 and seen.title, where
        for image in seen.images:
            assert image[0] and min(image[1:]) > 0 and image[1:3] == image[3:5], (where, image)
        assert num_images in (None, len(seen.images)), where
        for name in names:
            assert name in seen.text, (where, name)
