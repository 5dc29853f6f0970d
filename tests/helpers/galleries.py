"""Parser of a gallery page, and a headless browser that opens it without a network."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

EVIL = "</script><script>document.title='broken'</script><img src=x onerror=\"alert('b')\"> &lt;"
TAGS = ["html", "head", "meta", "title", "style", "body", "header", "div", "h1", "p", "input"]
TAGS += ["select", "main", "details", "summary", "pre", "nav", "kbd", "noscript", "script"]
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")

needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no chromium or google-chrome; install one"
)


class Gallery(HTMLParser):
    """A page: its elements, the text of its script and style elements, and its data."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.elements, self.texts, self._open = [], [], None
        self.text = file.read_text(encoding="utf-8")
        self.feed(self.text)
        (self.data,) = [json.loads(t) for tag, a, t in self.texts if a.get("type")]

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            self._open = (tag, dict(attributes))

    def handle_data(self, text):
        if self._open:
            self.texts.append((*self._open, text))

    def handle_endtag(self, tag):
        self._open = None


def joined(segments) -> str:
    """The text of marked segments."""
    return "".join(text for text, _ in segments)


def dom(page: Path) -> str:
    """The page as the browser shows it after its script ran."""
    assert BROWSER is not None
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={page.with_name('profile')}",
        "--virtual-time-budget=5000", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def operate(page: Path, driver: Path, *, relaxed: bool = True):
    """The notes of a script that operates a page. None if the script did not run.

    Args:
        page: the page.
        driver: script that stores its notes as JSON in the attribute data-seen of the body.
        relaxed: whether a policy allows the script. The policy of the page blocks it.
    """
    text = page.read_text(encoding="utf-8")
    if relaxed:
        (rule,) = re.findall(r"script-src '[^']*'", text)
        text = text.replace(rule, "script-src 'unsafe-inline'")
    driven = page.with_name("driven.html")
    script = f"<script>{driver.read_text()}</script></body>"
    driven.write_text(text.replace("</body>", script), encoding="utf-8")
    seen = re.search(r'data-seen="([^"]*)"', dom(driven))
    return json.loads(html.unescape(seen[1])) if seen else None
