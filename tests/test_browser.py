"""The explorers of chapter 21 in a real browser: JupyterLab in headless Chromium, worked by keyboard. With SCREENSHOTS=folder its pictures are kept there."""

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from readme import ROOT

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROME = next(filter(None, map(shutil.which, BROWSERS)), None)
if CHROME is None:
    pytest.skip(f"no browser: install one of {', '.join(BROWSERS)}", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'deepseek-lit[test]'")

SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},  # all cells are in the page, wherever it is scrolled
}
READ = "image => fetch(image.src).then(answer => answer.arrayBuffer()).then(bytes => Array.from(new Uint8Array(bytes)))"
OVERFLOWS = """box => { const found = [];
    for (const part of [box, ...box.querySelectorAll('*')])
        if (['auto', 'scroll'].some(o => [getComputedStyle(part).overflowX, getComputedStyle(part).overflowY].includes(o))
            && (part.scrollWidth > part.clientWidth + 1 || part.scrollHeight > part.clientHeight + 1)) found.push(part.className);
    return found; }"""


@pytest.fixture
def lab(tmp_path):
    """Address of a JupyterLab, on a free port and with a token, that serves a copy of the chapter without its outputs."""
    (tmp_path / "figures").mkdir()
    (tmp_path / "notebooks").mkdir()
    shutil.copy(ROOT / "notebooks/book.mplstyle", tmp_path / "notebooks")
    chapter = json.loads((ROOT / "notebooks/21_viz.ipynb").read_text(encoding="utf-8"))
    for cell in chapter["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    (tmp_path / "notebooks/21_viz.ipynb").write_text(json.dumps(chapter), encoding="utf-8")
    for name, settings in SETTINGS.items():
        file = tmp_path / f"settings/@jupyterlab/{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings))
    folders = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime", "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "IPYTHONDIR": "ipython"}  # fmt: skip
    environment = os.environ | {name: str(tmp_path / folder) for name, folder in folders.items()} | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    token = secrets.token_hex(16)
    options = ["--no-browser", "--ServerApp.ip=127.0.0.1", "--ServerApp.port=0", "--ServerApp.allow_root=True", f"--IdentityProvider.token={token}"]
    with open(tmp_path / "server.log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], cwd=tmp_path / "notebooks", env=environment, stdout=log, stderr=log)
    try:
        yield f"{address(server, tmp_path)}doc/tree/21_viz.ipynb?token={token}"
    finally:
        server.terminate()  # it takes its kernels along
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


def address(server: subprocess.Popen, folder: Path) -> str:
    """Where the server listens, which it writes down once it does."""
    for _ in range(1200):
        assert server.poll() is None, (folder / "server.log").read_text()
        for file in (folder / "runtime").glob("jpserver-*.json"):
            try:
                return json.loads(file.read_text())["url"]
            except ValueError:  # half written
                pass
        time.sleep(0.1)
    raise AssertionError("JupyterLab did not start: " + (folder / "server.log").read_text())


@pytest.fixture
def page():
    """A page of the browser, and a list of all errors that happen in it."""
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROME, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"])
        try:
            page = browser.new_page(viewport={"width": 1280, "height": 1000})
            page.set_default_timeout(120_000)
            yield page
        finally:
            browser.close()


def run_all(page, url: str) -> None:
    page.goto(url, wait_until="domcontentloaded")
    page.locator(".jp-CodeCell").last.wait_for(state="attached")
    page.locator("#jp-main-statusbar").get_by_text("| Idle").wait_for()  # with a kernel
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    playwright.expect(page.locator(".jp-CodeCell .jp-InputPrompt").last).to_have_text(re.compile(r"\[\d+\]"), timeout=240_000)


def changed(image, before: list[int], act) -> list[int]:
    """The bytes of the picture after `act`, once they are others than `before`."""
    act()
    for _ in range(1000):
        try:
            if (now := image.evaluate(READ)) != before:
                return now
        except playwright.Error:  # between two pictures
            pass
        time.sleep(0.05)
    raise AssertionError("the picture stayed the same")


def test_explorers_in_a_browser(lab, page, tmp_path):
    shots, errors = Path(os.environ.get("SCREENSHOTS", tmp_path)), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    run_all(page, lab)
    explorers = page.locator(".jp-OutputArea-output .widget-vbox:has(> .widget-image)")
    assert explorers.count() == 2
    for explorer, name in zip(explorers.all(), ("router", "attention")):
        explorer.scroll_into_view_if_needed()
        image, sliders = explorer.locator("img"), explorer.locator(".noUi-handle")
        start = image.evaluate(READ)
        readout = explorer.locator(".widget-readout").last
        token = int(readout.inner_text())
        explorer.screenshot(path=shots / f"{name}-1.png")
        next_token = changed(image, start, lambda: sliders.last.press("ArrowRight"))
        assert int(readout.inner_text()) == token + 1
        explorer.screenshot(path=shots / f"{name}-2.png")
        assert changed(image, next_token, lambda: sliders.last.press("ArrowLeft")) == start  # and back again: the same picture
        other_layer = changed(image, start, lambda: sliders.first.press("ArrowRight"))
        explorer.screenshot(path=shots / f"{name}-3.png")
        changed(image, other_layer, explorer.get_by_role("button", name="arithmetic").click)
        explorer.screenshot(path=shots / f"{name}-4.png")
        assert image.evaluate("image => image.complete && image.naturalWidth") >= 800
        assert explorer.evaluate(OVERFLOWS) == []  # no scroll bars
    assert page.locator("[data-mime-type='application/vnd.jupyter.error'], [data-mime-type='application/vnd.jupyter.stderr']").count() == 0
    assert errors == []
