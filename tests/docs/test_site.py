"""The built site in a real browser: nothing scrolls sideways, formulas are set, nothing is fetched from elsewhere.

    mkdocs build --strict && python -m pytest -m browser

It needs Chromium and the folder ``site``. Each page is opened in a frame 1280 pixels wide.
"""

import functools
import html
import http.server
import json
import re
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

SITE = Path(__file__).parents[2] / "site"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

CHECK = """<body><iframe id="frame" width="1280" height="900"></iframe><pre id="found"></pre><script>
const open = (address) => new Promise((done) => {
  frame.onload = () => setTimeout(done, 300);
  frame.src = address;
});
(async () => {
  const found = {};
  for (const address of PAGES) {
    await open(address);
    const page = frame.contentDocument, view = frame.contentWindow;
    const wide = (element) => element.scrollWidth > element.clientWidth + 1 && element.clientWidth > 0;
    const boxes = "article pre, article pre > code, article .md-typeset__scrollwrap, .katex-display";
    const scrolled = [...page.querySelectorAll(boxes)].filter(wide).map((e) => e.textContent.trim().slice(0, 60));
    const fetched = view.performance.getEntriesByType("resource").map((entry) => entry.name);
    found[address] = {
      wide: wide(page.documentElement) ? ["the page", ...scrolled] : scrolled,
      formulas: page.querySelectorAll(".arithmatex").length,
      set: page.querySelectorAll(".arithmatex .katex").length,
      wrong: page.querySelectorAll(".katex-error").length,
      tall: Object.fromEntries([...page.querySelectorAll("h2.doc-heading")]
        .map((heading) => [heading.id.split(".").pop(), heading.parentElement.clientHeight / frame.clientHeight])),
      fetched: fetched.filter((name) => !name.startsWith(location.origin)),
    };
  }
  document.getElementById("found").textContent = "FOUND" + JSON.stringify(found) + "END";
})();
</script></body>"""

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")]


class Quiet(http.server.SimpleHTTPRequestHandler):
    """The site, and the page that opens all others."""

    check: bytes = b""

    def do_GET(self) -> None:
        if self.path != "/check":
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(self.check)
        return None

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the base class calls it so)
        pass


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the browser found, by the address of the page."""
    assert (SITE / "index.html").is_file(), "build the site first: mkdocs build --strict"
    addresses = ["/" + path.parent.relative_to(SITE).as_posix() + "/" for path in SITE.rglob("index.html")]
    addresses = sorted({address.replace("/./", "/") for address in addresses})
    Quiet.check = CHECK.replace("PAGES", json.dumps(addresses)).encode()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(SITE))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = subprocess.run(
            [
                str(CHROMIUM),
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
                "--virtual-time-budget=600000",
                "--dump-dom",
                f"http://127.0.0.1:{server.server_port}/check",
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        server.shutdown()
    match = re.search(r'<pre id="found">FOUND(.*?)END</pre>', done.stdout, flags=re.DOTALL)
    assert match is not None, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(html.unescape(match[1]))


def test_no_page_needs_a_horizontal_scroll_bar(pages: dict[str, dict[str, Any]]) -> None:
    assert {address: page["wide"] for address, page in pages.items() if page["wide"]} == {}
    assert len(pages) > 30


def test_a_name_of_the_reference_takes_three_screens(pages: dict[str, dict[str, Any]]) -> None:
    tall = {name: screens for page in pages.values() for name, screens in page["tall"].items()}
    assert len(tall) > 100
    assert {name for name, screens in tall.items() if screens > 3} <= {"PurifiedClassifier"}
    assert tall["PurifiedClassifier"] < 4


def test_every_formula_is_set(pages: dict[str, dict[str, Any]]) -> None:
    assert sum(page["formulas"] for page in pages.values()) > 5
    assert [a for a, page in pages.items() if page["set"] != page["formulas"] or page["wrong"]] == []


@pytest.mark.parametrize("word", ["bf16", "citation", "ImageFolder", "torch.compile", "Jupyter"])
def test_the_search_index_has_what_people_look_for(word: str) -> None:
    entries = json.loads((SITE / "search" / "search_index.json").read_text(encoding="utf-8"))["docs"]
    assert any(word.lower() in (entry["title"] + entry["text"]).lower() for entry in entries)


def test_nothing_is_fetched_from_elsewhere(pages: dict[str, dict[str, Any]]) -> None:
    assert {address: page["fetched"] for address, page in pages.items() if page["fetched"]} == {}
