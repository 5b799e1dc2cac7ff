"""``examples/app.py``: its functions without a server, and the page in a real browser."""

import importlib.util
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from cmap_defense import CMAP
from cmap_defense.embedded import load_test_images

EXAMPLES = Path(__file__).parents[1] / "examples"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def app() -> Iterator[ModuleType]:
    """The module, whose purifiers take two iterations at most where they optimise latents."""
    specification = importlib.util.spec_from_file_location("app", EXAMPLES / "app.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["app"] = module
    specification.loader.exec_module(module)
    short = {
        name: model.variant(settings=model.settings.replace(iterations=2))
        if isinstance(model.purifier, CMAP)
        else model
        for name, model in module.purifiers().items()
    }
    module.purifiers = lambda: short
    yield module
    del sys.modules["app"]


def test_every_purifier_hands_over_its_states_and_ends_with_what_the_model_purifies(app: ModuleType) -> None:
    image = load_test_images()[0][1:2]
    assert len(app.purifiers()) >= 4
    for name, model in app.purifiers().items():
        *on_the_way, (share, versions) = app.purify(image, name, 7)
        assert share == 1
        shares = [share for share, _ in on_the_way]
        assert shares == sorted(set(shares))
        assert 0 <= shares[0] <= shares[-1] < 1
        assert all(seen.shape == versions.shape for _, seen in on_the_way)
        with torch.no_grad():
            expected = model.purify(image, seeds=[7])
        torch.testing.assert_close(versions, expected.images[0])
        names, counts = app.votes(versions)
        assert max(counts, key=lambda name: counts[name]) == app.CLASS_NAMES[expected.labels[0]]
        assert len(names) == model.purifier.n_latents
        assert sum(counts.values()) == pytest.approx(1)


def test_an_error_of_the_purification_is_raised_where_it_is_watched(app: ModuleType) -> None:
    with pytest.raises(RuntimeError):
        list(app.purify(torch.zeros(1, 2, 28, 28), next(iter(app.purifiers())), 0))


def test_the_attack_stays_within_eps_and_changes_the_label(app: ModuleType) -> None:
    image = load_test_images()[0][1:2]
    attacked = app.attack(image, 0.05, 20)
    assert (attacked - image).abs().max() <= 0.05 + 1e-6
    before, after = app.probabilities(image), app.probabilities(attacked)
    assert max(before, key=lambda name: before[name]) != max(after, key=lambda name: after[name])
    assert torch.equal(app.attack(image, 0, 5), image)


@pytest.mark.parametrize(("ground", "ink"), [(255, 0), (0, 255)])
def test_an_upload_becomes_grey_on_black(app: ModuleType, ground: int, ink: int) -> None:
    photo = Image.new("RGB", (90, 60), (ground,) * 3)
    photo.paste((ink,) * 3, (30, 15, 60, 45))
    image = app.as_input(photo)
    assert image.shape == (1, 1, 28, 28)
    assert image[0, 0, 0, 0] == 0
    assert image[0, 0, 14, 14] == 1
    assert app.picture(image[0]).size == (112, 112)


def test_the_space_installs_what_the_page_needs() -> None:
    lines = (EXAMPLES / "space" / "requirements.txt").read_text().splitlines()
    assert [line.split(">")[0] for line in lines] == ["cmap-defense", "gradio"]
    assert "app_file: app.py" in (EXAMPLES / "space" / "README.md").read_text()


VISIT = """<body><iframe id="frame" width="1280" height="1400" src="/"></iframe><script>
const pause = (time) => new Promise((done) => setTimeout(done, time));
const until = async (what) => {
  for (let n = 0; n < 600; n++) {
    const found = what(frame.contentDocument);
    if (found) return found;
    await pause(200);
  }
  throw new Error("waited in vain for " + what);
};
const text = (id) => (page) => page.querySelector(id)?.innerText;
(async () => {
  const found = {};
  try {
    (await until((page) => page.querySelectorAll("#images button img")[1])).click();
    await until((page) => page.querySelector("#input img"));
    await pause(500);
    (await until((page) => page.querySelector("#attack"))).click();
    found.after = await until((page) => /%/.test(text("#after")(page)) && text("#after")(page));
    frame.contentDocument.querySelector("#purify").click();
    await until((page) => /100% done/.test(text("#progress")(page)));
    found.votes = await until((page) => /%/.test(text("#votes")(page)) && text("#votes")(page));
    await pause(500);
    found.versions = frame.contentDocument.querySelectorAll("#versions button img").length;
    const entries = frame.contentWindow.performance.getEntriesByType("resource");
    found.fetched = entries.map((entry) => entry.name).filter((name) => !/^(data|blob):/.test(name));
    found.elsewhere = found.fetched.filter((name) => !name.startsWith(location.origin));
    const root = frame.contentDocument.documentElement;
    found.wide = root.scrollWidth > root.clientWidth;
  } catch (error) {
    found.error = String(error) + frame.contentDocument.body.innerText.slice(0, 500);
  }
  await fetch("/found", {method: "POST", body: JSON.stringify(found)});
})();
</script></body>"""


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
@pytest.mark.filterwarnings("ignore")  # of gradio and what it needs
def test_the_page_attacks_and_purifies_in_a_browser(app: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed (extra app)")
    import gradio
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import HTMLResponse

    found: dict[str, Any] = {}
    done = threading.Event()
    server = FastAPI()

    @server.get("/check", response_class=HTMLResponse)
    def check() -> str:
        return VISIT

    @server.post("/found")
    async def receive(request: Request) -> None:
        found.update(json.loads(await request.body()))
        done.set()

    gradio.mount_gradio_app(server, app.build(), path="/", theme=app.theme(), ssr_mode=False)
    running = uvicorn.Server(uvicorn.Config(server, port=0, log_level="error"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        thread.join(0.1)
        assert thread.is_alive()
    port = running.servers[0].sockets[0].getsockname()[1]
    browser = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
    address = f"http://127.0.0.1:{port}/check"
    with subprocess.Popen(
        [*browser, f"--user-data-dir={tmp_path}", address], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            assert done.wait(600), "the page has not answered"
        finally:
            process.terminate()
            running.should_exit = True
            thread.join()
    assert found.get("error") is None, found["error"]
    assert found["after"].split("\n")[1] != "pullover"  # the first line is the heading
    assert found["votes"].split("\n")[1] == "pullover"
    assert found["versions"] == 8
    assert len(found["fetched"]) > 5
    assert found["elsewhere"] == []
    assert not found["wide"]
